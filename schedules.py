#!/usr/bin/env python3
"""Learning-rate schedules of the study, as pure functions `step -> (learning rate, momentum)`.

Retraining a pruned network is the dense training loop with other start weights and another
schedule, so the whole subject of the paper (Le & Hua, ICLR 2021, section 3) is in this file.
Nothing here has state: a run that is resumed at step s asks for step s. Needs no torch.

    python schedules.py                     # the curves of the paper's 72-epoch budget, as a table
    python schedules.py --epochs 8 --dense-epochs 24 --milestones 12 18 --steps-per-epoch 79

Words: T epochs of the dense run, t epochs of retraining (the budget), S optimizer steps an epoch,
N = t*S, LR_max the largest and LR_min the last learning rate of the dense run.
"""
import argparse
import math
import os
import sys

DENSE = ("step", "cosine", "linear", "one_cycle", "constant")
RETRAIN = ("finetune", "lr_rewind", "weight_rewind", "slr", "one_cycle", "linear",
           "adaptive_linear", "scratch")
SCRATCH_AT_EQUAL_COST = ("scratch_e", "scratch_b")  # the same curve as scratch, longer budgets
TAKE_LR = ("slr", "one_cycle", "linear", "adaptive_linear")               # use --lr
TAKE_END_LR = ("finetune", "one_cycle", "linear", "adaptive_linear")      # use --end-lr


def cosine(start, end, share):
    """Half a cosine wave from `start` (share 0) to `end` (share 1)."""
    return end + (start - end) / 2 * (1 + math.cos(math.pi * share))


def one_cycle(step, steps, peak, end=None, momentum=0.9, cycle_momentum=True):
    """CLR: torch's OneCycleLR (Smith & Topin 2019) with div_factor 100, pct_start 0.1, cosine.

    Climbs from peak/100 over a tenth of the `steps` and falls to `end` (default peak/10,000), while
    the momentum goes 0.95 -> 0.85 -> 0.95. Defined for every number of steps, also where
    OneCycleLR divides by zero.
    """
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
    """LLR (Zimmer 2023): cosine warm-up 0 -> peak over a tenth of the steps, then a line to `end`.
    """
    warmup = steps // 10
    if step < warmup:
        return cosine(0.0, peak, step / warmup)
    return end + (peak - end) * (steps - step) / (steps - warmup)


def adaptive_peak(lr_max, budget_share, distance, removed):
    """The largest learning rate of ALLR (Zimmer 2023), between min(t/T, 1)*LR_max and LR_max.

    distance: sqrt(| |w|^2 - |w_pruned|^2 |) / |w|, how far pruning moved the weights;
    removed: the share of the weights that the same pruning took away, in [0, 1).
    """
    wanted = lr_max * distance / math.sqrt(removed) if removed else 0.0
    return min(max(wanted, min(budget_share, 1.0) * lr_max), lr_max)


def dense(recipe, steps_per_epoch, stretch=1.0):
    """The dense run's own schedule as a function `step -> (lr, momentum)`.

    recipe: dict with schedule (one of DENSE), epochs, lr, milestones (epochs; step only), momentum.
    stretch: 2.0 makes everything happen twice as late (Scratch-E and -B, Liu 2019). `step`,
    `cosine` and `constant` change once an epoch, `linear` and `one_cycle` at every step.
    """
    kind, peak, momentum = recipe["schedule"], recipe["lr"], recipe["momentum"]
    total = recipe["epochs"]

    def at(step):
        epoch = step // steps_per_epoch / stretch      # position in the unstretched run
        steps = round(total * stretch) * steps_per_epoch
        if kind == "step":
            return peak * 0.1 ** sum(epoch >= m for m in recipe["milestones"]), momentum
        if kind == "cosine":
            return cosine(peak, 0.0, epoch / total), momentum
        if kind == "linear":
            return linear(step, steps, peak), momentum
        if kind == "one_cycle":
            return one_cycle(step, steps, peak)
        return peak, momentum                          # constant
    return at


def lr_min(recipe, steps_per_epoch):
    """LR_min: the dense learning rate at the start of its last epoch, so never quite 0."""
    return dense(recipe, steps_per_epoch)((recipe["epochs"] - 1) * steps_per_epoch)[0]


def slr(epoch, epochs, recipe, steps_per_epoch, peak):
    """SLR, scaled learning-rate restarting (Le & Hua 2021, section 3): the dense curve compressed.

    A warm-up LR_min -> LR_max over W = int(t/10) epochs, then the dense run squeezed into 0.9 t:
    a step recipe's drops come at W + int(0.9 t f), f = milestone / T written with two digits as
    the authors do (0.45 t and 0.675 t on CIFAR, 0.297 t and 0.594 t on ImageNet). Exact integers,
    because int() of a rounded product lands one epoch early now and then.
    """
    warmup, total = epochs // 10, recipe["epochs"]
    if epoch <= warmup:
        return cosine(lr_min(recipe, steps_per_epoch), peak, epoch / warmup) if warmup else peak
    if recipe["schedule"] == "step":
        drops = [warmup + 9 * epochs * (100 * m // total) // 1000 for m in recipe["milestones"]]
        return peak * 0.1 ** sum(epoch >= d for d in drops)
    then = min(int((epoch - warmup) * total / (0.9 * epochs)), total - 1)
    return peak / recipe["lr"] * dense(recipe, steps_per_epoch)(then * steps_per_epoch)[0]


def retrain(name, epochs, steps_per_epoch, recipe, lr=None, end_lr=None, cycle_momentum=True,
            distance=1.0, removed=1.0):
    """A retraining schedule as a function `step -> (lr, momentum)`, step from 0 to epochs*S - 1.

    name: one of RETRAIN (or SCRATCH_AT_EQUAL_COST). epochs: the budget t. recipe: the dense run's
    (see `dense`). lr replaces LR_max where the schedule has one (TAKE_LR); end_lr replaces the last
    learning rate (TAKE_END_LR): LR_min for finetune, LR_max/10,000 for one_cycle, 0 for the linear
    ones. distance, removed: see `adaptive_peak`. Raises KeyError for an unknown name.
    """
    total, momentum = recipe["epochs"], recipe["momentum"]
    steps, peak = epochs * steps_per_epoch, recipe["lr"] if lr is None else lr
    original = dense(recipe, steps_per_epoch)
    if name == "finetune":                             # FT (Han 2015): LR_min all the way
        low = lr_min(recipe, steps_per_epoch) if end_lr is None else end_lr
        return lambda step: (low, momentum)
    if name in ("lr_rewind", "weight_rewind"):         # LRW, WR (Renda 2020): the dense run's tail
        return lambda step: original(max(0, (total - epochs) * steps_per_epoch + step))
    if name == "slr":
        return lambda step: (slr(step // steps_per_epoch, epochs, recipe, steps_per_epoch, peak),
                             momentum)
    if name == "one_cycle":                            # CLR
        return lambda step: one_cycle(step, steps, peak, end_lr, momentum, cycle_momentum)
    if name in ("linear", "adaptive_linear"):          # LLR, ALLR
        if name == "adaptive_linear":
            peak = adaptive_peak(peak, epochs / total, distance, removed)
        return lambda step: (linear(step, steps, peak, end_lr or 0.0), momentum)
    if name in ("scratch", *SCRATCH_AT_EQUAL_COST):
        return dense(recipe, steps_per_epoch, epochs / total)
    raise KeyError(name)


# ---- the command line: what all four scripts share -----------------------------------------------

class Refused(Exception):
    """Input that cannot be used. Its text is the one line the user sees; the exit status is 2."""


def number(kind, low, high=1e15, below=False):
    """An argparse type: an int or float in [low, high], or [low, high) with `below`."""
    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not (low <= value < high if below else low <= value <= high):
            name = "a whole number" if kind is int else "a number"
            upper = f"{'below' if below else 'at most'} {high:g}"
            raise argparse.ArgumentTypeError(f"must be {name}, at least {low:g} and {upper}; "
                                             f"got {text[:40]!r}")
        return value
    return parse


def path(text):
    """An argparse type: an empty name is an unset shell variable, not the wish for the default."""
    if not text:
        raise argparse.ArgumentTypeError("must not be empty")
    return text


def parser(doc):
    """An ArgumentParser whose errors are one line."""
    def error(message):
        raise Refused(message)
    made = argparse.ArgumentParser(description=doc, allow_abbrev=False,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)
    made.error = error
    return made


def command(main):
    """Run `main()`; turn input that cannot be used, and a disk that fails, into one line, status 2.
    An interrupt while nothing is trained yet ends it without a traceback, status 130."""
    sys.stdout.reconfigure(errors="backslashreplace")        # a file's name may be any bytes
    try:
        main()
        sys.stdout.flush()
    except (Refused, OSError) as problem:
        text = " ".join(str(problem).split())
        print(f"{os.path.basename(sys.argv[0])}: error: {text}", file=sys.stderr)
        try:
            sys.stdout.flush()
        except OSError:          # nobody reads it or its disk is full: not to be told again at exit
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None


def recipe_flags(flags, default=None):
    """The dense run's schedule, as flags of schedules.py and train.py."""
    default = default or {}
    flags.add_argument("--milestones", type=number(int, 0), nargs="*", metavar="E",
                       default=default.get("milestones"), help="epochs of the dense x0.1 drops")
    flags.add_argument("--lr", type=number(float, 1e-9), default=default.get("lr"),
                       help="largest learning rate of the dense run (LR_max)")
    flags.add_argument("--momentum", type=number(float, 0, 1, below=True),
                       default=default.get("momentum"))


def main(argv=None):
    flags = parser(__doc__)
    flags.add_argument("--epochs", type=number(int, 1, 1e6), default=72, help="budget t")
    flags.add_argument("--dense-epochs", type=number(int, 1, 1e6), default=160, help="T")
    flags.add_argument("--dense-schedule", choices=DENSE, default="step")
    recipe_flags(flags, {"milestones": [80, 120], "lr": 0.1, "momentum": 0.9})
    flags.add_argument("--steps-per-epoch", type=number(int, 1), default=782)
    flags.add_argument("--relative-distance", type=number(float, 0), default=1.0,
                       help="adaptive_linear: distance / sqrt(sparsity), a result of the pruning")
    args = flags.parse_args(argv)
    recipe = {"schedule": args.dense_schedule, "epochs": args.dense_epochs, "lr": args.lr,
              "milestones": args.milestones, "momentum": args.momentum}
    curves = [retrain(name, args.epochs, args.steps_per_epoch, recipe,
                      distance=args.relative_distance) for name in RETRAIN]
    print("epoch", *RETRAIN)
    for epoch in range(args.epochs):
        print(epoch, *(f"{curve(epoch * args.steps_per_epoch)[0]:.10g}" for curve in curves))


if __name__ == "__main__":
    command(main)
