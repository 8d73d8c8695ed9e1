#!/usr/bin/env python3
"""Learning-rate schedules for retraining a pruned network: `step -> (learning rate, momentum)`.

Retraining is the dense training loop with other start weights and another schedule, so the whole
subject of the paper (Le & Hua, ICLR 2021, section 3) is in this file. It needs nothing but Python:
copy it into any project. Nothing has state: to resume a run at step s, ask for step s.

    python schedules.py                     # the curves of the paper's 72-epoch budget
    python schedules.py --epochs 8 --dense-epochs 24 --milestones 12 18 --steps-per-epoch 79
    python schedules.py --chart curves.svg

Words: T epochs of the dense run, t epochs of retraining (the budget), S optimizer steps an epoch,
LR_max the largest and LR_min the last learning rate of the dense run.
"""
import argparse
import html
import math
import os
import signal
import sys
from typing import NamedTuple

DENSE = ("step", "cosine", "linear", "one_cycle", "constant")


class Refused(ValueError):
    """Input that cannot be used. Its text is the one line the user sees; scripts exit with 2."""


class Recipe(dict):
    """What is known of a dense run (see `dense`). Says what is missing when it is asked for."""
    def __missing__(self, key):
        raise Refused(f"this schedule needs {key!r} of the dense run, which its recipe lacks")


# ---- curves --------------------------------------------------------------------------------------

def cosine(start, end, share):
    """Half a cosine wave from `start` (share 0) to `end` (share 1)."""
    return end + (start - end) / 2 * (1 + math.cos(math.pi * share))


def cycle(step, steps, peak, end=None):
    """(lr, momentum) of torch's OneCycleLR (Smith & Topin 2019): div_factor 100, pct_start 0.1.

    Climbs from peak/100 over a tenth of the `steps` and falls to `end` (default peak/10,000), while
    the momentum goes 0.95 -> 0.85 -> 0.95. Also defined where OneCycleLR divides by zero."""
    low = peak / 100
    last = steps - 1
    top = 0.1 * steps - 1
    if end is None:
        end = low / 100
    if step <= top:
        share = step / top if top > 0 else 1.0
        return cosine(low, peak, share), cosine(0.95, 0.85, share)
    share = (step - top) / (last - top)
    return cosine(peak, end, share), cosine(0.85, 0.95, share)


def line(step, steps, peak, end=0.0):
    """A cosine warm-up from 0 over a tenth of the steps, then linear from `peak` to `end`."""
    warmup = steps // 10
    if step < warmup:
        return cosine(0.0, peak, step / warmup)
    return end + (peak - end) * (steps - step) / (steps - warmup)


# ---- the dense run -------------------------------------------------------------------------------

def dense(recipe, steps_per_epoch, stretch=1.0):
    """The dense run's own schedule as a function `step -> (lr, momentum)`.

    recipe           dict: lr, schedule (one of DENSE, default step), milestones (epochs of the x0.1
                     drops; step only), epochs (not for constant), momentum (default 0.9)
    steps_per_epoch  S; `linear` and `one_cycle` change at every step, the others once an epoch
    stretch          2.0 makes everything happen twice as late

    Past the last step the last value stays. Raises Refused for an unknown schedule, for less than
    one epoch or step, and for a recipe that lacks what its schedule needs."""
    recipe = Recipe(recipe)
    kind = recipe.get("schedule", "step")
    peak = recipe["lr"]
    momentum = recipe.get("momentum", 0.9)
    if kind not in DENSE:
        raise Refused(f"unknown dense schedule {kind!r}; known: {', '.join(DENSE)}")
    check_at_least_one(epochs=recipe.get("epochs", 1), steps_per_epoch=steps_per_epoch)
    if kind == "constant":
        return lambda step: (peak, momentum)
    if kind == "step":
        milestones = recipe["milestones"]

        def at(step):
            # Position in the unstretched run. 1e-9: 66 / (88/160) is 119.99… here and means 120.
            epoch = step // steps_per_epoch / stretch + 1e-9
            return peak * 0.1 ** sum(epoch >= m for m in milestones), momentum
        return at
    total = recipe["epochs"]
    steps = round(total * stretch) * steps_per_epoch

    def smooth(step):
        step = min(step, steps - 1)
        if kind == "linear":
            return line(step, steps, peak), momentum
        if kind == "one_cycle":
            return cycle(step, steps, peak)
        return cosine(peak, 0.0, step // steps_per_epoch / stretch / total), momentum
    return smooth


def lr_min(recipe, steps_per_epoch):
    """LR_min: the dense learning rate at the start of its last epoch, so never quite 0."""
    last = 0
    if recipe.get("schedule") != "constant":
        last = recipe["epochs"] - 1
    return dense(recipe, steps_per_epoch)(last * steps_per_epoch)[0]


def check_at_least_one(**counts):
    """Raises Refused for a number of epochs or steps below 1."""
    for name, count in counts.items():
        if not count >= 1:                              # nor nan
            raise Refused(f"{name} must be at least 1, not {count}")


# ---- retraining: one function a schedule ---------------------------------------------------------

class Retraining(NamedTuple):
    """What a retraining schedule may depend on: the arguments of `retrain`."""
    epochs: int
    steps_per_epoch: int
    recipe: Recipe
    lr: float | None
    end_lr: float | None
    cycle_momentum: bool
    distance: float
    removed: float

    @property
    def steps(self):
        return self.epochs * self.steps_per_epoch

    @property
    def peak(self):
        """LR_max, or what replaces it."""
        return self.recipe["lr"] if self.lr is None else self.lr

    @property
    def momentum(self):
        return self.recipe.get("momentum", 0.9)


def finetune(run):
    """FT (Han 2015; Liu 2019): LR_min all the way."""
    low = lr_min(run.recipe, run.steps_per_epoch) if run.end_lr is None else run.end_lr
    return lambda step: (low, run.momentum)


def lr_rewind(run):
    """LRW and WR (Renda 2020): the dense run's last t epochs again; of more than T, its first rate
    until then."""
    original = dense(run.recipe, run.steps_per_epoch)
    first = (run.recipe["epochs"] - run.epochs) * run.steps_per_epoch
    return lambda step: original(max(0, first + step))


def slr(run):
    """SLR, scaled learning-rate restarting (Le & Hua 2021, section 3).

    A warm-up LR_min -> LR_max over W = int(t/10) epochs, then the dense run squeezed into 0.9 t.
    For example CIFAR, T = 160, t = 40: epochs 0-3 warm up; drops at 4 + 18 = 22 and 4 + 27 = 31."""
    recipe = run.recipe
    total = recipe["epochs"]
    warmup = run.epochs // 10
    peak = run.peak
    low = lr_min(recipe, run.steps_per_epoch)
    original = dense(recipe, run.steps_per_epoch)
    drops = None
    if recipe.get("schedule", "step") == "step":
        # A drop comes at W + int(0.9 t f), f = milestone / T with two digits, as the authors write
        # it (0.45 t and 0.675 t on CIFAR). In integers: int() of a float product may be too early.
        drops = []
        for milestone in recipe["milestones"]:
            percent = 100 * milestone // total
            drops.append(warmup + 9 * run.epochs * percent // 1000)

    def at(step):
        epoch = step // run.steps_per_epoch
        if epoch < warmup:
            lr = cosine(low, peak, epoch / warmup)
        elif epoch == warmup:                       # at the peak, even if a drop falls on it
            lr = peak
        elif drops is not None:
            lr = peak * 0.1 ** sum(epoch >= drop for drop in drops)
        else:
            then = min(10 * (epoch - warmup) * total // (9 * run.epochs), total - 1)
            lr = peak / recipe["lr"] * original(then * run.steps_per_epoch)[0]
        return lr, run.momentum
    return at


def one_cycle(run):
    """CLR, cyclic learning-rate restarting (Le & Hua 2021): the 1-cycle of Smith & Topin 2019."""
    peak = run.peak

    def at(step):
        lr, momentum = cycle(step, run.steps, peak, run.end_lr)
        return lr, momentum if run.cycle_momentum else run.momentum
    return at


def linear(run):
    """LLR (Zimmer 2023): warm-up, then linear to 0."""
    peak = run.peak
    end = 0.0 if run.end_lr is None else run.end_lr
    return lambda step: (line(step, run.steps, peak, end), run.momentum)


def adaptive_linear(run):
    """ALLR (Zimmer 2023): `linear` from a peak that follows from how much the pruning hurt.

    LR_max * distance / sqrt(removed), but at least min(t/T, 1) * LR_max and at most LR_max."""
    wanted = 0.0
    if run.removed:
        wanted = run.peak * run.distance / math.sqrt(run.removed)
    least = run.epochs / run.recipe["epochs"] * run.peak
    return linear(run._replace(lr=min(max(wanted, least), run.peak)))


def stretched(run):
    """Scratch (Liu 2019): the dense schedule stretched to t."""
    return dense(run.recipe, run.steps_per_epoch, run.epochs / run.recipe["epochs"])


# The name of each schedule, its function, and the options of `retrain` that it uses.
SCHEDULES = {
    "finetune": (finetune, ("end_lr",)),
    "weight_rewind": (lr_rewind, ()),
    "lr_rewind": (lr_rewind, ()),
    "slr": (slr, ("lr",)),
    "one_cycle": (one_cycle, ("lr", "end_lr", "cycle_momentum")),
    "linear": (linear, ("lr", "end_lr")),
    "adaptive_linear": (adaptive_linear, ("lr", "end_lr")),
    "scratch": (stretched, ()),
    "scratch_e": (stretched, ()),
    "scratch_b": (stretched, ()),
}


def retrain(name, epochs, steps_per_epoch, recipe=None, lr=None, end_lr=None, cycle_momentum=True,
            distance=1.0, removed=1.0):
    """A retraining schedule as a function `step -> (lr, momentum)`, step from 0 to t*S - 1.

    name             one of SCHEDULES. The weights to start from are the caller's: pruned ones, but
                     for weight_rewind those of epoch T - t, for the scratch ones fresh ones
    epochs           the budget t
    steps_per_epoch  S
    recipe           what is known of the dense run (see `dense`); with `lr`, one_cycle and linear
                     need none, nor does finetune with `end_lr`
    lr               replaces LR_max, for those that use it (SCHEDULES)
    end_lr           the last learning rate (default: LR_min for finetune, LR_max/10,000 for
                     one_cycle, 0 for the linear ones)
    cycle_momentum   of one_cycle; False: constant, as the others'
    distance         for adaptive_linear: how far pruning moved the weights,
                     sqrt(| |w|^2 - |w_pruned|^2 |) / |w|
    removed          for adaptive_linear: the share of the weights that pruning took, in [0, 1]

    Past the last step the last value stays. Raises Refused for an unknown name, for less than one
    epoch or step, and for a recipe that lacks what the schedule needs."""
    if name not in SCHEDULES:
        raise Refused(f"unknown schedule {name!r}; known: {', '.join(SCHEDULES)}")
    recipe = Recipe(recipe or {})
    check_at_least_one(epochs=epochs, steps_per_epoch=steps_per_epoch)
    check_at_least_one(epochs=recipe.get("epochs", 1))
    function, _ = SCHEDULES[name]
    at = function(Retraining(epochs, steps_per_epoch, recipe, lr, end_lr, cycle_momentum, distance,
                             removed))
    last = epochs * steps_per_epoch - 1
    return lambda step: at(min(step, last))


# ---- pictures ------------------------------------------------------------------------------------

def blocks(values, low, high, width=60):
    """A curve as a line of `width` block characters, the lowest one at `low`."""
    text = ""
    for i in range(width):
        share = 0.0
        if high > low:
            share = (values[i * len(values) // width] - low) / (high - low)
        text += "▁▂▃▄▅▆▇█"[round(7 * share)]
    return text


COLOURS = ("#2f86c9", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#a0522d", "#7f7f7f")
WIDTH, HEIGHT, NAMES = 330, 250, 160        # of a panel, and of the names beside it, in pixels


def chart(panels, unit):
    """Curves as the text of an SVG file that reads on a light and on a dark page.

    panels  {title: {schedule: values}}: panels side by side, all on one scale; each value of a
            curve is one epoch's, and the schedule's name stands at the curve's end
    unit    what the values are, for the axis"""
    curves = [values for panel in panels.values() for values in panel.values()]
    low = min((min(values) for values in curves), default=0)
    high = max((max(values) for values in curves), default=0)
    width = 50 + len(panels) * (WIDTH + NAMES)
    height = HEIGHT + 70
    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
             f'width="{width}" height="{height}" font-family="sans-serif" font-size="13" '
             'fill="#777">']
    for place, (title, panel) in enumerate(panels.items()):
        left = 50 + place * (WIDTH + NAMES)
        parts.append(f'<text x="{left}" y="18" font-weight="bold">'
                     f'{html.escape(title)}</text>')
        parts += panel_parts(panel, left, low, high)
        epochs = max(len(values) for values in panel.values())
        parts.append(f'<text x="{left}" y="{HEIGHT + 60}">epoch 1 to {epochs}; {unit}</text>')
    return "\n".join([*parts, "</svg>\n"])


def panel_parts(panel, left, low, high):
    """The lines and words of one panel of a chart, a list of SVG elements. Curves that are the same
    share a colour."""
    def height(value):
        return 30 + HEIGHT * (high - value) / (high - low or 1)

    parts = []
    for value in (low, (low + high) / 2, high):
        y = height(value)
        parts.append(f'<path d="M{left} {y:.1f}h{WIDTH}" stroke="#777" stroke-opacity=".4"/>')
        parts.append(f'<text x="{left - 6}" y="{y + 4:.1f}" text-anchor="end">{value:.3g}</text>')
    longest = max(len(values) for values in panel.values())
    colours = {}                                            # of each different curve
    words = []
    for name, values in panel.items():
        place = [*SCHEDULES, *panel].index(name)            # a schedule's is the same everywhere
        colour = colours.setdefault(tuple(values), COLOURS[place % len(COLOURS)])
        points = []
        for epoch, value in enumerate(values):
            x = left + WIDTH * epoch / max(1, longest - 1)
            points.append(f"{x:.1f},{height(value):.1f}")
        parts.append(f'<polyline points="{" ".join(points)}" fill="none" stroke="{colour}" '
                     f'stroke-width="2"/>')
        words.append((height(values[-1]), name, colour))
    words.sort()
    places = apart([y for y, *_ in words], 15, HEIGHT + 45)
    for place, (_, name, colour) in zip(places, words):
        parts.append(f'<text x="{left + WIDTH + 6}" y="{place + 4:.1f}" fill="{colour}">{name}'
                     '</text>')
    return parts


def apart(places, gap, bottom):
    """Ascending places of words, moved so that they are `gap` apart and above `bottom`."""
    places = list(places)
    for i in range(1, len(places)):
        places[i] = max(places[i], places[i - 1] + gap)
    for i in reversed(range(len(places))):
        places[i] = min(places[i], bottom)
        bottom = places[i] - gap
    return places


# ---- the command ---------------------------------------------------------------------------------

def number(kind, low, high=10 ** 9):
    """An argparse type: an int or float in [low, high]."""
    def parse(text):
        value = kind(text)
        if not low <= value <= high:
            raise ValueError
        return value
    # What argparse says of a ValueError: "invalid whole number from 1 to 9 value: 'x'".
    whole = "whole " if kind is int else ""
    parse.__name__ = f"{whole}number from {low:g} to {high:g}"
    return parse


def main(argv=None):
    flags = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0],
                                    allow_abbrev=False)
    add = flags.add_argument
    add("--epochs", type=number(int, 1, 10_000), default=72, help="budget t (default 72)")
    add("--dense-epochs", type=number(int, 1, 10_000), default=160, help="T (default 160)")
    add("--schedule", choices=DENSE, default="step", help="of the dense run (default step)")
    add("--milestones", type=number(int, 1), nargs="*",
        help="epochs of its x0.1 drops (step; default T/2 3T/4)")
    add("--lr", type=number(float, 1e-9), default=0.1, help="its largest rate (default 0.1)")
    add("--steps-per-epoch", type=number(int, 1), default=782, help="default 782")
    add("--chart", type=os.path.expanduser, metavar="FILE.svg", help="draw the curves there, too")
    args = flags.parse_args(argv)
    if args.milestones and args.schedule != "step":
        flags.error("argument --milestones: belongs to --schedule step")
    total = args.dense_epochs
    milestones = args.milestones
    if milestones is None:
        milestones = sorted({total // 2, 3 * total // 4} - {0})
    recipe = {"schedule": args.schedule, "epochs": total, "lr": args.lr, "milestones": milestones}
    curves = {}
    for name in SCHEDULES:
        if name not in ("scratch_e", "scratch_b"):     # scratch, with other budgets
            at = retrain(name, args.epochs, args.steps_per_epoch, recipe)
            curves[name] = [at(epoch * args.steps_per_epoch)[0] for epoch in range(args.epochs)]
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")       # a pipe on Windows lacks the blocks
    print("epoch", *[f"{name:>15}" for name in curves])
    for epoch in range(args.epochs):
        print(f"{epoch:5}", *[f"{lrs[epoch]:15.6g}" for lrs in curves.values()])
    high = max(max(lrs) for lrs in curves.values())
    print(f"\nthe curves from 0 to {high:g}, each with its largest and its last value")
    for name, lrs in curves.items():
        print(f"{name:15} {blocks(lrs, 0, high)} {max(lrs):.6g} {lrs[-1]:.6g}")
    if args.chart:
        try:
            with open(args.chart, "w", encoding="utf-8") as file:
                file.write(chart({f"T = {total}, t = {args.epochs}": curves},
                                 "learning rate"))
        except OSError as problem:
            flags.error(f"argument --chart: {problem}")


if __name__ == "__main__":
    if hasattr(signal, "SIGPIPE"):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)           # of `| head`, which stops reading
    main()
