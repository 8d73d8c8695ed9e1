#!/usr/bin/env python3
"""Retrain pruned networks: start weights x learning-rate schedule, as many as wanted, one table.

    python retrain.py                                  # the default run's pruned networks
    python retrain.py PRUNED.pt --schedule finetune one_cycle --epochs 40 72 --seed 0 1 2 --jobs 2
    python retrain.py PRUNED.pt --schedule slr --rounds 8        # retrain, prune again, retrain …
    python retrain.py --report runs/A runs/B           # the report again, from the rows alone

A retraining is `train.fit` with other start weights (`start`) and another schedule
(`schedules.retrain`); all else is the dense run's, so that all arms share batch size, weight decay,
data order and budget. Each finished run adds a line to results.jsonl in its run folder, which says
all that is needed to run it again. The same command goes on or is done.
"""
import argparse
import contextlib
import glob
import hashlib
import itertools
import json
import math
import multiprocessing
import os
import re
import signal
import sys
import threading
import time
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor, as_completed
from typing import NamedTuple

import numpy as np
import torch

import models
import prune
import schedules
import train
from schedules import Refused, number

DEFAULT = ["finetune", "weight_rewind", "lr_rewind", "slr", "one_cycle"]
EVERY = (*schedules.RETRAIN, "scratch_e", "scratch_b")


# ---- one retraining, from start to row -----------------------------------------------------------

class Run(NamedTuple):
    """What the command line asks for; what else defines a run comes from the pruned network."""
    path: str           # of the pruned network
    schedule: str
    epochs: int         # the budget t
    seed: int
    round: int = 1
    before: str = ""    # in later rounds: the file that the last one wrote


def start(run, checkpoint):
    """(network, momentum, masks) from which a variant starts.

    The pruned weights; for weight_rewind the dense run's weights, BN buffers and momentum at epoch
    T - t, with the final weights' mask or filters (Renda 2020); for scratch a fresh initialisation
    of the pruned shape (Liu 2019). masks: {weight name: bool}, where the pruned one is not 0."""
    network = models.restore(checkpoint)
    masks, momentum = {}, None
    if checkpoint["pruning"]["structure"] == "weights":
        names = models.weight_names(network, checkpoint["pruning"]["include_linear"])
        masks = {n: checkpoint["model"][n] != 0 for n in names}
    if run.schedule == "weight_rewind":
        units, kept = models.prunable(network), checkpoint["kept"]
        model, momentum = (models.shrink(s, units, kept) for s in rewound(run, checkpoint))
        network.load_state_dict(model)
    elif run.schedule.startswith("scratch"):
        models.initialise(network, run.seed)
    with torch.no_grad():
        for name, mask in masks.items():
            network.get_parameter(name).mul_(mask)
    return network, momentum, masks


def rewound(run, checkpoint):
    """(weights and buffers, momentum) of the dense run after max(0, T - t) epochs."""
    recipe = checkpoint["recipe"]
    epoch = max(0, recipe["epochs"] - run.epochs)
    if epoch == 0:
        return models.build(recipe["arch"], checkpoint["classes"], recipe["seed"],
                            recipe["pretrained"]).state_dict(), {}
    path = train.snapshot_path(run.path, epoch)
    if not os.path.exists(path):
        kept = sorted(glob.glob(os.path.join(os.path.dirname(path), "epoch-*.pt")))
        raise Refused(f"argument --schedule: weight_rewind with {run.epochs} epochs needs {path}; "
                      f"there is {' '.join(map(os.path.basename, kept)) or 'none'}")
    snapshot = models.read(path, "state")
    train.same_run(checkpoint["settings"], snapshot["settings"], path)
    return snapshot["model"], snapshot["momentum"]


def settings_of(run, checkpoint, args, machine):
    """(all that defines a run, as plain values; its files' name, which ends with their hash)."""
    recipe, schedule = checkpoint["recipe"], run.schedule
    longer = {"scratch_e": recipe["epochs"] + run.epochs,                  # at equal cost, Liu 2019
              "scratch_b": recipe["epochs"] * checkpoint["dense_macs"] // checkpoint["macs"]}
    settings = {
        "pruned": models.digest(checkpoint["model"]), "dense": checkpoint["dense_id"],
        "round": run.round, "schedule": schedule, "budget": run.epochs,
        "epochs": longer.get(schedule, run.epochs), "seed": run.seed,
        **{key: getattr(args, key) if schedule in takers else None
           for key, takers in schedules.TAKE.items()},
        "batch_size": recipe["batch_size"], "weight_decay": recipe["weight_decay"],
        "subset": recipe["subset"], "precision": machine.precision}
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8]
    stem = os.path.basename(run.path)[:-3] + (f"--r{run.round}" if run.round > 1 else "")
    return settings, f"{stem}-{schedule}-t{run.epochs}-s{run.seed}-{digest}"


def retrain(run, args, machine):
    """One retraining: start weights, schedule, the loop. Writes the checkpoint and returns its row;
    what is there already is not trained again."""
    checkpoint = models.read(run.path, "pruned")
    data = train.data_for(checkpoint, args, machine)
    how = dict(checkpoint["pruning"])
    if run.round > 1:               # the last round's network, pruned again by as much
        if how["structure"] == "weights":      # counts all zeros: .3, then .51, .66 …
            how["sparsity"] = [1 - (1 - how["sparsity"][0]) ** run.round]
        checkpoint = prune.prune(models.read(run.before), how, data, machine)
    settings, name = settings_of(run, checkpoint, args, machine)
    target = os.path.join(os.path.dirname(run.path), name + ".pt")
    if os.path.exists(target) and (done := models.read(target))["kind"] == "retrained":
        return done["row"]
    epochs, steps = settings["epochs"], math.ceil(len(data.train[1]) / settings["batch_size"])
    network, momentum, masks = start(run, checkpoint)
    schedule = schedules.retrain(
        run.schedule, epochs, steps, **{key: settings[key] for key in schedules.TAKE},
        **{key: checkpoint[key] for key in ("recipe", "distance", "removed")})
    for curve, seconds in train.fit(
            network, data, schedule, {**settings, "data": checkpoint["settings"]["data"]},
            machine, target, masks, momentum):
        train.say(f"{train.describe(curve, seconds, epochs)}  {name}")
    row = {
        "format": models.FORMAT, "run": name, "dataset": checkpoint["recipe"]["dataset"],
        **{k: checkpoint[k] for k in ("arch", "dense_test_accuracy", "params", "macs", "recipe",
                                      "dense_params", "dense_macs", "distance", "removed")},
        **how, **settings, "pruning_seed": how["seed"],
        "sparsity": how["sparsity"][0] if len(how["sparsity"]) == 1 else how["sparsity"] or None,
        "test_accuracy": curve[-1]["test_accuracy"],
        "pruned_test_accuracy": checkpoint["test_accuracy"],
        "nonzero": sum((v != 0).sum().item() for n, v in checkpoint["model"].items()
                       if n.endswith((".weight", ".bias"))),
        "curve": curve, "seconds": round(seconds, 1), **train.provenance(machine.device)}
    models.save(target, {**checkpoint, "kind": "retrained", "row": row,
                         "model": network.state_dict(), "test_accuracy": row["test_accuracy"]})
    if machine.world > 1:
        torch.distributed.barrier()            # the next round reads it
    return row


# ---- many runs: their rows, their processes ------------------------------------------------------

def read_rows(folder):
    """{run: row} of a folder's results.jsonl, without what a crash left behind its last newline."""
    path, rows = os.path.join(folder, "results.jsonl"), {}
    if not os.path.exists(path):
        return rows
    with open(path, encoding="utf-8", errors="replace") as file:
        lines = file.read().split("\n")[:-1]
    for i, line in enumerate(lines, 1):
        try:
            row = json.loads(line, parse_constant=int)                      # refuses NaN
            if row["format"] != models.FORMAT:
                raise ValueError
            rows[row["run"]] = row
        except (ValueError, RecursionError, KeyError, TypeError):
            raise Refused(f"{path}: line {i} is no row of format {models.FORMAT}; remove it"
                          ) from None
    return rows


def write_rows(folder, rows):
    text = "".join(json.dumps(row, allow_nan=False) + "\n" for row in rows.values())
    models.write(os.path.join(folder, "results.jsonl"), text.encode())


def cores():
    """How many this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def begin_worker(args, jobs):
    """In each new process: its share of the cores, or its GPU; it ends when its parent ends."""
    def end_with_parent():
        multiprocessing.parent_process().join()
        os._exit(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)                    # Ctrl-C is the parent's
    threading.Thread(target=end_with_parent, daemon=True).start()
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, cores() // jobs))
    os.environ["LOCAL_RANK"] = re.search(r"\d+$", multiprocessing.current_process().name)[0]
    train.the_machine(args)


def attempt(run, args, machine):
    """(run, its row or what went wrong); so one that fails does not stop the others."""
    try:
        return run, retrain(run, args, machine)
    except (Refused, OSError) as problem:
        if machine.world > 1:               # the others wait for this process in what it leaves
            raise
        return run, f"{run.path} {run.schedule} t={run.epochs} seed={run.seed}: {problem}"


@contextlib.contextmanager
def attempts(jobs, args, machine):
    """A function: attempts a list of Runs, `jobs` at a time; yields the results as they come."""
    if jobs <= 1:
        yield lambda runs: (attempt(run, args, machine) for run in runs)
        return
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, spawn, begin_worker, (args, jobs)) as pool:
        try:
            yield lambda runs: (future.result() for future in as_completed(
                [pool.submit(attempt, run, args, machine) for run in runs]))
        except BrokenExecutor:
            raise Refused("a worker process was killed; the same command goes on") from None
        finally:      # Ctrl-C, a full disk: end them. A killed one may hold what idle ones wait for
            for child in multiprocessing.active_children():
                child.kill()


def retrain_all(runs, args, machine):
    """Makes the rows of {Run: name} that are not there yet; returns how many runs failed."""
    with contextlib.ExitStack() as stack:
        rows, todo, failed = {}, [], 0
        for folder in {os.path.dirname(run.path) for run in runs}:
            stack.enter_context(train.working_in(folder or ".", machine))
            rows[folder] = read_rows(folder)
        for run, name in runs.items():
            if args.rounds == 1 and name in rows[os.path.dirname(run.path)]:
                train.say(f"{name}: done already")
            else:
                todo.append(run)
        jobs = args.jobs or (cores() if machine.device.type == "cpu" else 1)
        perform = stack.enter_context(
            attempts(min(jobs, len(todo)) if machine.world == 1 else 1, args, machine))
        began, done, every = time.monotonic(), 0, len(todo) * args.rounds
        for number in range(1, args.rounds + 1):
            results, todo = perform(todo), []
            for run, row in results:
                done += 1
                if isinstance(row, str):
                    failed += 1
                    every -= args.rounds - number       # its later rounds
                    print(f"retrain.py: failed: {row}", file=sys.stderr, flush=True)
                    continue
                folder, name = os.path.dirname(run.path), row["run"]
                rows[folder][name] = row
                write_rows(folder, rows[folder])
                todo.append(run._replace(
                    round=number + 1, before=os.path.join(folder, name + ".pt")))
                left = (time.monotonic() - began) / done * (every - done) / 60
                train.say(f"{name}: test {row['test_accuracy']:.2f} %; {every - done} runs left, "
                          f"about {left:.1f} min")
    return failed


# ---- the report ----------------------------------------------------------------------------------

def cells(rows):
    """{(network, what was pruned, by what, budget): {arm: {pair: row}}}: what can be compared.

    arm: the schedule, with what is not as published. pair: what two compared runs share, the dense
    network and the seeds. The start of a finetune run is also one of each shorter budget."""
    found, budgets = {}, sorted({r["budget"] for r in rows})
    shorter = [{**r, "budget": t, "curve": r["curve"][:t],
                "test_accuracy": r["curve"][t - 1]["test_accuracy"]}
               for r in rows if (r["schedule"], r["round"]) == ("finetune", 1)
               for t in budgets if t < r["budget"]]
    for row in shorter + rows:
        before = row["run"].rpartition(f"--{row['structure']}-")[0]      # what was pruned again
        again = f" round {row['round']}" * (row["round"] > 1) + f" of {before}" * bool(before)
        what = (f"{row['structure']} {prune.amount(row)}{again}" if row["removed"] or again
                else "nothing")
        arm = (row["schedule"] + (f"/lr={row['lr']:g}" if row["lr"] is not None else "")
               + (f"/end={row['end_lr']:g}" if row["end_lr"] is not None else "")
               + ("/flat-momentum" if row["cycle_momentum"] is False else ""))
        key = f"{row['arch']} on {row['dataset']}", what, row["method"], row["budget"]
        pair = row["dense"], row["pruning_seed"], row["seed"]
        found.setdefault(key, {}).setdefault(arm, {})[pair] = row
    return found


def table(corner, keys, lines):
    """A markdown table with a column for each of the cells `keys`; lines: {name: texts}."""
    rows = [[corner, *(f"{method}, t={t}" for *_, method, t in keys)], ["---"] * (1 + len(keys)),
            *([name, *texts] for name, texts in lines.items())]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def accuracies(corner, found, keys, arms):
    """The table of the test accuracies: of the arms, and of the dense network retrained alike."""
    def shown(runs):
        values = [row["test_accuracy"] for row in runs]
        gain = np.mean([row["test_accuracy"] - row["dense_test_accuracy"] for row in runs])
        sd = f" ± {np.std(values, ddof=1):.2f}" if values[1:] else ""
        return f"{np.mean(values):.2f}{sd} ({gain:+.2f}, n={len(values)})"
    dense = [{row["dense"]: row for row in rows["dense"].values()}.values() for rows in found]
    lines = {"parameters, MACs left": [f"{r['nonzero'] / r['dense_params']:.0%}, "
                                       f"{r['macs'] / r['dense_macs']:.0%}" for r, *_ in dense],
             "`dense`": [shown(rows) for rows in dense]}
    for arm in (*arms, *(f"{arm}/unpruned" for arm in EVERY)):
        runs = [rows.get(arm, {}).values() for rows in found]
        if any(runs):
            lines[f"`{arm}`"] = [shown(some) if some else "–" for some in runs]
    return table(corner, keys, lines)


# The 97.5 % quantiles of Student's t, for 1, 2, … degrees of freedom; the last serves for more.
STUDENT = 12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262
SAME = 1        # pp: two arms are called equal if the whole interval is within this of 0

# What the paper, and in the last three this study, claims of the accuracies of a cell's arms; what
# stands behind a slash, `comparable` explains.
CLAIMS = (
    "lr_rewind > finetune", "slr > finetune", "slr = lr_rewind",       # the rate, not the rewinding
    "one_cycle > finetune", "one_cycle > lr_rewind", "one_cycle > weight_rewind", "one_cycle > slr",
    "finetune <= finetune/first", "one_cycle/first > finetune",     # epochs do not replace the rate
    "one_cycle > dense", "dense > finetune",            # only a large rate recovers all accuracy
    "one_cycle/random > finetune",                      # the schedule matters more than the method
    "one_cycle > one_cycle/random",                     # which matters still, but less:
    "finetune - finetune/random > one_cycle - one_cycle/random",
    "linear = one_cycle",                               # a line down does as well as the cosine
    "one_cycle > one_cycle/unpruned",                   # and what is more than longer training
    "one_cycle - finetune > one_cycle/unpruned - finetune/unpruned",
)


def comparable(cells, key):
    """{name: {pair: row}} of what is compared with a cell: its arms, `dense`, and the arms of other
    cells: pruned at /random, the /unpruned network, with the /first, least budget."""
    network, what, method, t = key
    first = min(other[3] for other in cells if other[:3] == key[:3])
    others = {"/random": (network, what, "random", t), "/first": (*key[:3], first),
              **{"/unpruned": other for other in cells if other[::3] == (network, t)
                 and other[1] == "nothing"}}
    dense = {pair: {**row, "test_accuracy": row["dense_test_accuracy"]}
             for runs in cells[key].values() for pair, row in runs.items()}
    return {"dense": dense, **cells[key], **{    # and nothing is compared with itself
        arm + behind: runs for behind, other in others.items() if other != key
        for arm, runs in cells.get(other, {}).items()}}


def differences(sides, found):
    """The left side of a claim minus its right one, for each pair of which all is `found`."""
    parts = [((-1) ** (i + j), found.get(name, {})) for i, side in enumerate(sides)
             for j, name in enumerate(side.split(" - "))]
    return [sum(sign * runs[pair]["test_accuracy"] for sign, runs in parts) for pair in parts[0][1]
            if all(pair in runs for _, runs in parts)]


def verdict(values, relation):
    """How the mean of `values` (differences, pp) stands to 0, with Student's 95 % interval."""
    if not values:
        return "–"
    mean, n = float(np.mean(values)), len(values)
    if n < 3:
        return f"not decided {mean:+.2f}, n={n}"
    half = STUDENT[min(n - 2, 8)] * np.std(values, ddof=1) / math.sqrt(n)
    low, high = mean - half, mean + half
    yes, no = {">": (low > 0, high < 0), "<=": (low <= 0 and high <= SAME, low > 0),
               "=": (-SAME <= low <= 0 <= high <= SAME, low > 0 or high < 0)}[relation]
    word = "**yes**" if yes else "**no**" if no else "not decided"
    return f"{word} {mean:+.2f} [{low:+.2f}, {high:+.2f}], n={n}"


def claims(found, keys, arms):
    """The table of the claims, a line for each that the rows can say something of."""
    lines = {}
    for claim in (*CLAIMS, *(f"{arm} > {arm.split('/')[0]}" for arm in arms if "/" in arm)):
        left, relation, right = re.split(" (>|=|<=) ", claim)
        values = [differences((left, right), rows) for rows in found]
        if any(values):
            lines[f"`{claim}`"] = [verdict(some, relation) for some in values]
    return table("claim", keys, lines) if lines else ""


def pictures(found, keys, arms):
    """Mean test accuracy by epoch of each cell's arms, as lines of blocks that share one scale;
    without scratch, whose low start flattens the others."""
    lines, width = [], max(map(len, arms))
    for key, rows in zip(keys, found):
        curves = {arm: np.mean([[point["test_accuracy"] for point in row["curve"]]
                                for row in rows[arm].values()], 0)
                  for arm in arms if arm in rows and not arm.startswith("scratch")}
        low, high = (f(map(f, curves.values()), default=0) for f in (min, max))
        lines += [f"{key[2]}, t={key[3]}: {low:.2f} to {high:.2f}",
                  *(f"  {arm:{width}} {schedules.blocks(curve, low, high)} {max(curve):.2f} "
                    f"{curve[-1]:.2f}" for arm, curve in curves.items())]
    return "\n".join(lines)


def report(rows):
    """The whole report as markdown, from rows alone: a section for each network and what was pruned
    of it, with its accuracies, claims and pictures."""
    made = sorted({f"{r['device']}, {r['threads']} threads, {r['precision']}, torch {r['torch']}, "
                   f"code {r['commit']}" for r in rows})
    minutes, every = sum(r["seconds"] for r in rows) / 60, cells(rows)
    lines = [f"\n{len(rows)} retrainings, {minutes:.0f} minutes of a process; {'; '.join(made)}.",
             "- Accuracy: of the last epoch, on the test images, in %: mean ± sd (difference to the"
             " dense network, runs).",
             "- Claims: differences in points, paired over dense networks and seeds, with Student's"
             " interval at 95 %, each by itself: of twenty undecided ones, one will look decided. "
             "Behind a slash: pruned at random; the unpruned network; with the least epochs.",
             "- Pictures: test accuracy by epoch; its largest, its last. The dip while the learning"
             " rate is large is normal: compare the ends.\n"]
    for network, what in dict.fromkeys(key[:2] for key in every):
        keys = sorted(key for key in every if key[:2] == (network, what))
        arms = sorted({arm for key in keys for arm in every[key]},
                      key=lambda arm: (EVERY.index(arm.split("/")[0]), arm))
        found = [comparable(every, key) for key in keys]
        lines += [accuracies(f"{network}, pruned: {what}", found, keys, arms),
                  claims(found, keys, arms), f"```\n{pictures(found, keys, arms)}\n```\n"]
    return "\n".join(lines)


def main(argv=None):
    flags, run, method = train.parser(__doc__, "[PRUNED ...] ")
    run("checkpoint", nargs="*", metavar="PRUNED", help="default: all of the default run")
    run("--seed", nargs="+", type=number(int, 0), default=[0, 1, 2], help="default 0 1 2")
    run("--jobs", type=number(int, 1), help="runs at once (default: cores; on a GPU 1)")
    run("--report", nargs="+", metavar="DIR", help="only print the report again, from the rows")
    method("--schedule", nargs="+", choices=EVERY, default=DEFAULT, metavar="NAME",
           help=f"{' '.join(EVERY)} (default {' '.join(DEFAULT)})")
    method("--epochs", nargs="+", type=number(int, 1), metavar="t",
           help="budgets (default: the recipe's share of T, a quarter for CIFAR)")
    method("--lr", type=number(float, 1e-9), help="in place of LR_max (default: the dense run's)")
    method("--end-lr", type=number(float, 0), help="the last, but of slr (default: as published)")
    method("--cycle-momentum", action=argparse.BooleanOptionalAction, default=True,
           help="of one_cycle (default: yes, as published)")
    method("--rounds", type=number(int, 1), default=1, metavar="K",
           help="retrain and prune by as much again, K times (default 1)")
    args = flags.parse_args(argv)
    for key, takers in schedules.TAKE.items():
        if getattr(args, key) != flags.get_default(key) and not set(takers) & set(args.schedule):
            flags.error(f"argument --{key.replace('_', '-')}: {' '.join(args.schedule)} would "
                        f"ignore it; it is for {', '.join(takers)}")
    if args.dry_run and args.checkpoint:
        flags.error("argument --dry-run: retrains what train.py --dry-run led to; name no file")
    folders, failed = args.report, 0
    if not folders:
        machine = train.the_machine(args)
        default, runs = f"runs/shapes-resnet8-s0{'-dry' * args.dry_run}", {}
        for path in args.checkpoint or sorted(glob.glob(f"{default}/*-*.pt")):
            checkpoint = models.read(path, *["pruned"] * bool(args.checkpoint))
            if checkpoint["kind"] != "pruned":             # one of the default folder's others
                continue
            recipe = checkpoint["recipe"]
            budgets = args.epochs or [train.budget(recipe)]
            for t, seed, schedule in itertools.product(budgets, args.seed, args.schedule):
                wanted = Run(path, schedule, t, seed)
                runs[wanted] = settings_of(wanted, checkpoint, args, machine)[1]
                if schedule == "weight_rewind":        # refused here, not after the others
                    rewound(wanted, checkpoint)
            if max(budgets) >= recipe["epochs"]:
                train.say(f"{path}: T = {recipe['epochs']}; with as many epochs or more, lr_rewind "
                          "and weight_rewind start the dense run over")
        if not runs:
            raise Refused(f"{default}: no pruned checkpoint is there; run prune.py or name one")
        failed = retrain_all(runs, args, machine)
        folders = dict.fromkeys(os.path.dirname(run.path) for run in runs)
    rows = [row for folder in folders for row in read_rows(folder).values()]
    if rows:
        train.say(report(rows))
    elif args.report:
        flags.error(f"argument --report: no finished runs in {' '.join(folders)}")
    if failed:
        raise Refused(f"{failed} of {len(runs)} runs failed; the same command tries them again")


if __name__ == "__main__":
    train.command(main)
