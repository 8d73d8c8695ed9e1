#!/usr/bin/env python3
"""Learning-rate schedules for retraining a pruned network: `step -> (learning rate, momentum)`.

Retraining is the dense training loop with other start weights and another schedule, so the whole
subject of the paper (Le & Hua, ICLR 2021, section 3) is in this file. It needs nothing but Python:
copy it into any project. Nothing has state; a run that goes on at step s asks for step s.

    python schedules.py                     # the curves of the paper's 72-epoch budget
    python schedules.py --epochs 8 --dense-epochs 24 --milestones 12 18 --steps-per-epoch 79

Words: T epochs of the dense run, t epochs of retraining (the budget), S optimizer steps an epoch,
N = t*S, LR_max the largest and LR_min the last learning rate of the dense run.
"""
import argparse
import math
import sys

DENSE = ("step", "cosine", "linear", "one_cycle", "constant")
RETRAIN = ("finetune", "lr_rewind", "weight_rewind", "slr", "one_cycle", "linear",
           "adaptive_linear", "scratch")
TAKE = {"lr": ("slr", "one_cycle", "linear", "adaptive_linear"),          # which use the argument
        "end_lr": ("finetune", "one_cycle", "linear", "adaptive_linear"),
        "cycle_momentum": ("one_cycle",)}


class Refused(ValueError):
    """Input that cannot be used. Its text is the one line the user sees; scripts exit with 2."""


class Recipe(dict):
    """What is known of a dense run (see `dense`); says what is missing when it is asked for."""
    def __missing__(self, key):
        raise Refused(f"this schedule needs {key!r} of the dense run, which its recipe lacks")


def cosine(start, end, share):
    """Half a cosine wave from `start` (share 0) to `end` (share 1)."""
    return end + (start - end) / 2 * (1 + math.cos(math.pi * share))


def one_cycle(step, steps, peak, end=None, momentum=0.9, cycle_momentum=True):
    """CLR: torch's OneCycleLR (Smith & Topin 2019) with div_factor 100, pct_start 0.1, cosine.

    Climbs from peak/100 over a tenth of the `steps` and falls to `end` (default peak/10,000), while
    the momentum goes 0.95 -> 0.85 -> 0.95. Also defined where OneCycleLR divides by zero."""
    low, last, top = peak / 100, steps - 1, 0.1 * steps - 1
    end = low / 100 if end is None else end
    if step <= top:
        share = step / top if top > 0 else 1.0
        lr, cycled = cosine(low, peak, share), cosine(0.95, 0.85, share)
    else:
        share = (step - top) / (last - top)
        lr, cycled = cosine(peak, end, share), cosine(0.85, 0.95, share)
    return lr, cycled if cycle_momentum else momentum


def linear(step, steps, peak, end=0.0):
    """LLR (Zimmer 2023): cosine warm-up from 0 over a tenth of the steps, then a line to `end`."""
    warmup = steps // 10
    if step < warmup:
        return cosine(0.0, peak, step / warmup)
    return end + (peak - end) * (steps - step) / (steps - warmup)


def dense(recipe, steps_per_epoch, stretch=1.0):
    """The dense run's own schedule as a function `step -> (lr, momentum)`.

    recipe: dict with lr, schedule (one of DENSE; default step), epochs (not for constant),
    milestones (epochs of the x0.1 drops; step only), momentum (default 0.9). stretch: 2.0 makes all
    happen twice as late. `linear` and `one_cycle` change at every step, others once an epoch."""
    recipe = Recipe(recipe)
    kind, peak, momentum = recipe.get("schedule", "step"), recipe["lr"], recipe.get("momentum", 0.9)
    if kind not in DENSE:
        raise Refused(f"unknown dense schedule {kind!r}; known: {', '.join(DENSE)}")

    def at(step):
        epoch = step // steps_per_epoch / stretch      # position in the unstretched run
        if kind == "constant":
            return peak, momentum
        if kind == "step":              # 1e-9: 66 / (88/160) is 119.99… here and means 120
            return peak * 0.1 ** sum(epoch + 1e-9 >= m for m in recipe["milestones"]), momentum
        if kind == "cosine":
            return cosine(peak, 0.0, epoch / recipe["epochs"]), momentum
        steps = round(recipe["epochs"] * stretch) * steps_per_epoch
        if kind == "linear":
            return linear(step, steps, peak), momentum
        return one_cycle(step, steps, peak)
    return at


def lr_min(recipe, steps_per_epoch):
    """LR_min: the dense learning rate at the start of its last epoch, so never quite 0."""
    last = 0 if recipe.get("schedule") == "constant" else recipe["epochs"] - 1
    return dense(recipe, steps_per_epoch)(last * steps_per_epoch)[0]


def slr(step, epochs, recipe, steps_per_epoch, peak):
    """SLR, scaled learning-rate restarting (Le & Hua 2021, section 3): the dense curve compressed.

    A warm-up LR_min -> LR_max over W = int(t/10) epochs, then the dense run squeezed into 0.9 t: a
    step recipe's drops come at W + int(0.9 t f), f = milestone / T with two digits as the authors
    write it (0.45 t and 0.675 t on CIFAR); integers, since int() of a product may be too early."""
    epoch, warmup, total = step // steps_per_epoch, epochs // 10, recipe["epochs"]
    if epoch <= warmup:
        return cosine(lr_min(recipe, steps_per_epoch), peak, epoch / warmup) if warmup else peak
    if recipe.get("schedule", "step") == "step":
        drops = [warmup + 9 * epochs * (100 * m // total) // 1000 for m in recipe["milestones"]]
        return peak * 0.1 ** sum(epoch >= d for d in drops)
    then = min(int((epoch - warmup) * total / (0.9 * epochs)), total - 1)
    return peak / recipe["lr"] * dense(recipe, steps_per_epoch)(then * steps_per_epoch)[0]


def retrain(name, epochs, steps_per_epoch, recipe=None, lr=None, end_lr=None, cycle_momentum=True,
            distance=1.0, removed=1.0):
    """A retraining schedule as a function `step -> (lr, momentum)`, step from 0 to epochs*S - 1.

    name: one of RETRAIN. epochs: the budget t. recipe: what is known of the dense run (`dense`);
    with `lr`, one_cycle and linear need none, finetune with `end_lr` neither. lr replaces
    LR_max, end_lr the last learning rate (LR_min for finetune, LR_max/10,000 for one_cycle, 0 for
    the linear ones), for those in TAKE. For adaptive_linear (Zimmer 2023), distance: how far the
    pruning moved the weights, sqrt(| |w|^2 - |w_pruned|^2 |) / |w|; removed: the share of them that
    it took away, in [0, 1).
    Raises Refused for an unknown name and for a recipe that lacks what the schedule needs."""
    recipe = Recipe(recipe or {})
    steps, momentum = epochs * steps_per_epoch, recipe.get("momentum", 0.9)
    if name == "finetune":                             # FT (Han 2015): LR_min all the way
        low = lr_min(recipe, steps_per_epoch) if end_lr is None else end_lr
        return lambda step: (low, momentum)
    if name in ("lr_rewind", "weight_rewind"):         # LRW, WR (Renda 2020): the dense run's tail
        first = (recipe["epochs"] - epochs) * steps_per_epoch
        original = dense(recipe, steps_per_epoch)
        return lambda step: original(max(0, first + step))
    if name in ("scratch", "scratch_e", "scratch_b"):  # Liu 2019
        return dense(recipe, steps_per_epoch, epochs / recipe["epochs"])
    if name not in TAKE["lr"]:
        raise Refused(f"unknown schedule {name!r}; known: {', '.join(RETRAIN)}")
    peak = recipe["lr"] if lr is None else lr
    if name == "slr":
        return lambda step: (slr(step, epochs, recipe, steps_per_epoch, peak), momentum)
    if name == "one_cycle":                            # CLR
        return lambda step: one_cycle(step, steps, peak, end_lr, momentum, cycle_momentum)
    if name == "adaptive_linear":                      # ALLR: from min(t/T, 1)*LR_max to LR_max
        wanted = peak * distance / math.sqrt(removed) if removed else 0.0
        peak = min(max(wanted, epochs / recipe["epochs"] * peak), peak)
    return lambda step: (linear(step, steps, peak, end_lr or 0.0), momentum)   # LLR


def number(kind, low, high=10 ** 9):
    """An argparse type: an int or float in [low, high]."""
    def parse(text):
        value = kind(text)
        if not low <= value <= high:
            raise ValueError
        return value
    # What argparse says of a ValueError: "invalid whole number from 1 to 9 value: 'x'".
    parse.__name__ = f"{'whole ' * (kind is int)}number from {low:g} to {high:g}"
    return parse


def blocks(values, low, high, width=60):
    """A curve as a line of `width` block characters, the lowest one at `low`."""
    shown = [values[i * len(values) // width] for i in range(width)]
    return "".join("▁▂▃▄▅▆▇█"[round(7 * (v - low) / (high - low or 1))] for v in shown)


def main(argv=None):
    flags = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                    formatter_class=argparse.RawDescriptionHelpFormatter)
    add = flags.add_argument
    add("--epochs", type=number(int, 1, 10_000), default=72, help="budget t (default 72)")
    add("--dense-epochs", type=number(int, 1, 10_000), default=160, help="T (default 160)")
    add("--schedule", choices=DENSE, default="step", help="of the dense run (default step)")
    add("--milestones", type=number(int, 1), nargs="*", default=[80, 120], help="default 80 120")
    add("--lr", type=number(float, 1e-9), default=0.1, help="its largest (default 0.1)")
    add("--steps-per-epoch", type=number(int, 1), default=782, help="default 782")
    args = flags.parse_args(argv)
    sys.stdout.reconfigure(errors="backslashreplace")       # a pipe on Windows lacks the blocks
    recipe, steps = {**vars(args), "epochs": args.dense_epochs}, args.steps_per_epoch
    schedules = {name: retrain(name, args.epochs, steps, recipe) for name in RETRAIN}
    curves = {name: [at(epoch * steps)[0] for epoch in range(args.epochs)]
              for name, at in schedules.items()}
    print("epoch", *(f"{name:>15}" for name in curves))
    for epoch, row in enumerate(zip(*curves.values())):
        print(f"{epoch:5}", *(f"{lr:15.6g}" for lr in row))
    print("\nthe curve, its largest value, its last")
    for name, lrs in curves.items():
        print(f"{name:15} {blocks(lrs, 0, max(lrs))} {max(lrs):.6g} {lrs[-1]:.6g}")


if __name__ == "__main__":
    main()
