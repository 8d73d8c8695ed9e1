#!/usr/bin/env python3
"""Retrain pruned networks: start weights x learning-rate schedule, as many as wanted, one table.

    python retrain.py                                  # the default run's pruned networks
    python retrain.py PRUNED.pt --schedule finetune one_cycle --epochs 40 72 --seed 0 1 2 --jobs 2
    python retrain.py PRUNED.pt --schedule slr --rounds 8        # retrain, prune again, retrain …
    python retrain.py --report runs/A runs/B           # the report again, from the rows alone

A retraining is `train.fit` with other start weights (`start`) and another schedule
(`schedules.retrain`); everything else comes from the dense run's recipe, so that all arms share
batch size, weight decay, data order and budget. Each finished run adds one line to results.jsonl in
its run folder, which says all that is needed to run it again; a run that is there is not repeated,
one that was interrupted goes on after its last finished epoch.
"""
import contextlib
import glob
import hashlib
import itertools
import json
import math
import multiprocessing
import os
import queue
import re
import signal
import sys
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import NamedTuple

import numpy as np
import torch

import models
import prune
import schedules
import train
from schedules import Refused, number
from train import say

DEFAULT = ["finetune", "weight_rewind", "lr_rewind", "slr", "one_cycle"]
EVERY = (*schedules.RETRAIN, "scratch_e", "scratch_b")


# ---- one retraining, from start to row -----------------------------------------------------------

class Run(NamedTuple):
    """What the command line asks for; what else defines a run comes from the pruned network."""
    path: str           # of the pruned network
    schedule: str
    epochs: int         # the budget t
    seed: int


def start(run, checkpoint):
    """(network, momentum, masks) from which a variant starts.

    The pruned weights; for weight_rewind the dense run's weights, BN buffers and momentum at epoch
    T - t, with the final weights' mask or filters (Renda 2020); for scratch a fresh initialisation
    of the pruned shape (Liu 2019). masks: {weight name: bool}, the pruned network's non-zero
    weights."""
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
    """(weights and buffers, momentum) of the dense run before epoch max(0, T - t): how it began, or
    as train.py kept it in the run folder."""
    epoch = max(0, checkpoint["recipe"]["epochs"] - run.epochs)
    if epoch == 0:
        return train.initial(checkpoint["recipe"], checkpoint["classes"]).state_dict(), {}
    path = train.snapshot_path(run.path, epoch)
    if not os.path.exists(path):
        kept = sorted(glob.glob(os.path.join(os.path.dirname(path), "epoch-*.pt")))
        raise Refused(f"argument --schedule: weight_rewind with {run.epochs} epochs needs {path}; "
                      f"there is {' '.join(map(os.path.basename, kept)) or 'none'}")
    snapshot = models.read(path, "state")
    train.same_run(checkpoint["settings"], snapshot["settings"], path)
    return snapshot["model"], snapshot["momentum"]


def settings_of(run, round, checkpoint, args, machine):
    """(all that defines the run, as plain values; the name of its files, which ends with their
    hash)."""
    recipe, schedule = checkpoint["recipe"], run.schedule
    longer = {"scratch_e": recipe["epochs"] + run.epochs,                  # at equal cost, Liu 2019
              "scratch_b": recipe["epochs"] * checkpoint["dense_macs"] // checkpoint["macs"]}
    settings = {
        "pruned": models.digest(checkpoint["model"]), "dense": checkpoint["dense_id"],
        "round": round, "schedule": schedule, "budget": run.epochs,
        "epochs": longer.get(schedule, run.epochs), "seed": run.seed,
        "lr": args.lr if schedule in schedules.TAKE_LR else None,
        "end_lr": args.end_lr if schedule in schedules.TAKE_END_LR else None,
        "cycle_momentum": args.cycle_momentum if schedule == "one_cycle" else None,
        "batch_size": recipe["batch_size"], "weight_decay": recipe["weight_decay"],
        "subset": recipe["subset"], "precision": "bf16" if machine.bf16 else "fp32"}
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8]
    stem = os.path.basename(run.path)[:-3] + (f"--r{round}" if round > 1 else "")
    return settings, f"{stem}-{schedule}-t{run.epochs}-s{run.seed}-{digest}"


def retrain(run, round, checkpoint, data, args, machine, send):
    """One retraining: start weights, schedule, the loop. Writes and returns the checkpoint, which
    holds its row; one that is there already is not trained again."""
    settings, name = settings_of(run, round, checkpoint, args, machine)
    target = os.path.join(os.path.dirname(run.path), name + ".pt")
    if os.path.exists(target) and (done := models.read(target))["kind"] == "retrained":
        return done
    steps = math.ceil(len(data.train[1]) / settings["batch_size"])
    network, momentum, masks = start(run, checkpoint)
    schedule = schedules.retrain(
        run.schedule, settings["epochs"], steps, checkpoint["recipe"], settings["lr"],
        settings["end_lr"], args.cycle_momentum, checkpoint["distance"], checkpoint["removed"])
    for curve, seconds in train.fit(
            network, data, schedule, {**settings, "data": checkpoint["settings"]["data"]},
            machine, target, masks, momentum):
        send("epoch", name, curve[-1], settings["epochs"])
    done = {**checkpoint, "kind": "retrained", "model": network.cpu().state_dict(),
            "test_accuracy": curve[-1]["test_accuracy"],
            "row": row_of(settings, checkpoint, curve, seconds, name, machine)}
    if machine.rank == 0:
        models.save(target, done)
    return done


def rounds(run, args, machine, send):
    """Retrain; with --rounds prune the result again by as much and retrain it, and so on. Sends
    ("epoch", name, point of the curve, epochs) and ("row", folder, row)."""
    pruned = models.read(run.path, "pruned")
    data, how = train.data_for(pruned, args, machine), pruned["pruning"]
    for round in range(1, args.rounds + 1):
        if round > 1:
            if how["structure"] == "weights":      # counts all zeros: .3, then .51, .66 …
                again = {**how, "sparsity": [1 - (1 - how["sparsity"][0]) ** round]}
            else:
                again = how
            pruned = prune.prune_and_test(pruned, again, data, machine)
        pruned = retrain(run, round, pruned, data, args, machine, send)
        send("row", os.path.dirname(run.path), pruned["row"])


def row_of(settings, checkpoint, curve, seconds, name, machine):
    """The result row: one JSON object that says all that is needed to run it again."""
    c, how = checkpoint, checkpoint["pruning"]
    same = ("arch", "dense_test_accuracy", "params", "macs", "dense_params", "dense_macs", "recipe",
            "distance", "removed")
    return {
        "format": models.FORMAT, "run": name, "dataset": c["recipe"]["dataset"],
        **{k: c[k] for k in same}, **how, **settings, "pruning_seed": how["seed"],
        "sparsity": how["sparsity"][0] if len(how["sparsity"]) == 1 else how["sparsity"] or None,
        "test_accuracy": curve[-1]["test_accuracy"],
        "pruned_test_accuracy": c["test_accuracy"],
        "nonzero": sum((v != 0).sum().item() for n, v in c["model"].items()
                       if n.endswith((".weight", ".bias"))),
        "curve": curve, "seconds": round(seconds, 1), **train.provenance(machine.device)}


# ---- many runs: their rows, their processes ------------------------------------------------------

def read_rows(folder):
    """{run: row} of a folder's results.jsonl. What follows its last newline, a crash left: that
    run's row is made again."""
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


def begin_worker(args, jobs, messages):
    """In each new process: its share of the cores, or its GPU; it ends when its parent ends."""
    def end_with_parent():
        multiprocessing.parent_process().join()
        os._exit(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)                    # Ctrl-C is the parent's
    threading.Thread(target=end_with_parent, daemon=True).start()
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, cores() // jobs))
    place = int(multiprocessing.current_process().name.split("-")[-1])    # they are numbered
    begin_worker.rest = args, train.the_machine(args, place), lambda *m: messages.put(m)


def attempt(run, args, machine, send):
    """`rounds`; what can fail in one run is sent, so that the others go on."""
    try:
        rounds(run, args, machine, send)
    except (Refused, OSError) as problem:
        send("failed", f"{run.path} {run.schedule} t={run.epochs} seed={run.seed}: {problem}")


def work(run):
    """In a worker: one run."""
    attempt(run, *begin_worker.rest)


def in_processes(todo, jobs, args, receive):
    """An `attempt` at each Run, `jobs` at a time."""
    context = multiprocessing.get_context("spawn")
    messages = context.Queue()
    with ProcessPoolExecutor(jobs, context, begin_worker, (args, jobs, messages)) as pool:
        try:
            futures = [pool.submit(work, run) for run in todo]
            while not all(future.done() for future in futures):
                with contextlib.suppress(queue.Empty):
                    receive(*messages.get(timeout=0.2))
            for future in futures:
                future.result()
        except BrokenProcessPool:
            raise Refused("a worker process was killed; the same command goes on") from None
        except BaseException:                          # Ctrl-C, a full disk: end the workers too
            for child in multiprocessing.active_children():
                child.kill()
            raise
    while not messages.empty():                        # all is sent: the workers have ended
        receive(*messages.get())


def retrain_all(runs, args, machine):
    """Every run of {Run: name} that is not there yet; rows are written as they come. Returns how
    many failed."""
    rows = {os.path.dirname(run.path): {} for run in runs}
    with contextlib.ExitStack() as stack:
        for folder in rows:
            stack.enter_context(train.working_in(folder or ".", machine))
            rows[folder] = read_rows(folder)
        todo = []
        for run, name in runs.items():
            if args.rounds == 1 and name in rows[os.path.dirname(run.path)]:
                say(f"{name}: done already")
            else:
                todo.append(run)
        began, epochs, left, failed = time.monotonic(), 0, len(todo) * args.rounds, 0
        whole = sum(run.epochs for run in todo) * args.rounds

        def receive(kind, *news):
            nonlocal epochs, left, failed
            if kind == "epoch":
                name, point, total = news
                epochs += 1
                seconds = (time.monotonic() - began) / epochs * max(0, whole - epochs)
                say(f"{train.describe(point, total)}  {name}; {left} runs left, about "
                    f"{train.clock(seconds)}")
            elif kind == "failed":
                failed += 1
                print(f"retrain.py: failed: {news[0]}", file=sys.stderr, flush=True)
            elif machine.rank == 0:
                folder, row = news
                rows[folder][row["run"]] = row
                write_rows(folder, rows[folder])
                left -= 1
        jobs = min(args.jobs or (cores() if machine.device.type == "cpu" else 1), len(todo))
        if jobs > 1 and machine.world == 1:
            in_processes(todo, jobs, args, receive)
        else:
            for run in todo:
                attempt(run, args, machine, receive)
    return failed


# ---- the report ----------------------------------------------------------------------------------

def cells(rows):
    """{(network, what was pruned, by what, budget): {arm: {pair: row}}}: what can be compared.

    arm: the schedule, with what is not as published. pair: what two compared runs share, the dense
    network and the seeds. A finetune run, whose learning rate is constant, is by the start of its
    curve also a run of each shorter budget."""
    found, budgets = {}, sorted({r["budget"] for r in rows})
    shorter = [{**r, "budget": t, "curve": r["curve"][:t],
                "test_accuracy": r["curve"][t - 1]["test_accuracy"]}
               for r in rows if r["schedule"] == "finetune" for t in budgets if t < r["budget"]]
    for row in shorter + rows:
        shares = row["sparsity"] if isinstance(row["sparsity"], list) else [row["sparsity"]]
        what = (f"{row['structure']} {prune.amount({**row, 'sparsity': shares})}"
                + f" round {row['round']}" * (row["round"] > 1)) if row["removed"] else "nothing"
        arm = (row["schedule"] + (f"/lr={row['lr']:g}" if row["lr"] is not None else "")
               + (f"/end={row['end_lr']:g}" if row["end_lr"] is not None else "")
               + ("/flat-momentum" if row["cycle_momentum"] is False else ""))
        key = f"{row['arch']} on {row['dataset']}", what, row["method"], row["budget"]
        pair = row["dense"], row["pruning_seed"], row["seed"]
        found.setdefault(key, {}).setdefault(arm, {})[pair] = row
    return found


def in_order(arms):
    """Arms in the order of the schedules' names, variants behind their schedule; each once."""
    return sorted(set(arms), key=lambda arm: (EVERY.index(arm.split("/")[0]), arm))


def spread(values):
    """`mean ± sd` of some accuracies."""
    sd = f" ± {np.std(values, ddof=1):.2f}" if len(values) > 1 else ""
    return f"{np.mean(values):.2f}{sd}"


def tables(cells):
    """Markdown: a table for each network and what was pruned; a line for each schedule, a column
    for each method and budget."""
    lines = []
    for network, what in dict.fromkeys(key[:2] for key in cells):
        mine = {key[2:]: cell for key, cell in sorted(cells.items()) if key[:2] == (network, what)}
        dense, sizes = {}, []
        for cell in mine.values():
            rows = [row for runs in cell.values() for row in runs.values()]
            dense |= {row["dense"]: row["dense_test_accuracy"] for row in rows}
            kept = rows[0]["nonzero" if rows[0]["structure"] == "weights" else "params"]
            sizes.append(f"{kept / rows[0]['dense_params']:.0%}, "
                         f"{rows[0]['macs'] / rows[0]['dense_macs']:.0%}")
        lines += [f"**{network}, pruned: {what}**; dense {spread([*dense.values()])} "
                  f"(n={len(dense)}).", "",
                  "| | " + " | ".join(f"{method}, t={t}" for method, t in mine) + " |",
                  "|---" * (1 + len(mine)) + "|",
                  "| parameters, MACs left | " + " | ".join(sizes) + " |"]
        for arm in in_order(arm for cell in mine.values() for arm in cell):
            columns = []
            for cell in mine.values():
                after, before = ([row[key] for row in cell.get(arm, {}).values()]
                                 for key in ("test_accuracy", "dense_test_accuracy"))
                columns.append(f"{spread(after)} ({np.subtract(after, before).mean():+.2f}, "
                               f"n={len(after)})" if after else "–")
            lines.append(f"| `{arm}` | " + " | ".join(columns) + " |")
        lines.append("")
    return "\n".join(lines)


def t_quantile(freedom):
    """The 97.5 % quantile of Student's t: with x = sqrt(f) tan(a) its density is cos(a)^(f-1)."""
    angle = np.linspace(-np.pi / 2, np.pi / 2, 200_001)
    density = np.cos(angle).clip(0) ** (freedom - 1)
    mass = np.concatenate([[0], np.cumsum((density[1:] + density[:-1]) / 2)])
    return math.sqrt(freedom) * math.tan(np.interp(0.975, mass / mass[-1], angle))


SAME = 1        # pp: two arms are called equal if the whole interval is within this of 0

# What the paper and this study claim: words; the accuracies that are added and subtracted, each
# (pruned by, schedule): m every method, c every one but random, - the unpruned network retrained;
# `first`: at the shortest budget; and how the sum is to be.
CLAIMS = (
    ("lr_rewind > finetune", "+m lr_rewind, -m finetune", ">"),
    ("slr > finetune", "+m slr, -m finetune", ">"),
    ("slr = lr_rewind", "+m slr, -m lr_rewind", "="),
    ("one_cycle > finetune", "+m one_cycle, -m finetune", ">"),
    ("one_cycle > lr_rewind", "+m one_cycle, -m lr_rewind", ">"),
    ("one_cycle > weight_rewind", "+m one_cycle, -m weight_rewind", ">"),
    ("one_cycle > slr", "+m one_cycle, -m slr", ">"),
    ("finetune gains nothing from more epochs", "+m finetune, -m finetune first", "<="),
    ("one_cycle > the dense network", "+m one_cycle, -m dense", ">"),
    ("finetune < the dense network", "+m dense, -m finetune", ">"),
    ("random with one_cycle > this with finetune", "+random one_cycle, -c finetune", ">"),
    ("this > random, both with one_cycle", "+c one_cycle, -random one_cycle", ">"),
    ("that gap is smaller than with finetune",
     "+c finetune, -random finetune, -c one_cycle, +random one_cycle", ">"),
    ("one_cycle > the dense network retrained with it", "+m one_cycle, -- one_cycle", ">"),
    ("one_cycle - finetune > that of the dense network",
     "+m one_cycle, -m finetune, -- one_cycle, +- finetune", ">"),
)


def differences(terms, cells, network, what, m):
    """(t, the sums of `terms` paired by dense network and seeds) at the longest budget at which
    there are any; (None, []) if there is none, or the claim would compare a thing with itself."""
    if (m == "random" and re.search("[+-]c ", terms)
            or what == "nothing" and re.search("[+-]- ", terms)):
        return None, []
    budgets = sorted({t for *key, _, t in cells if key == [network, what]}, reverse=True)

    def accuracies(who, schedule, t):
        keys = [(network, what, m if who in "mc" else who, t)] if who != "-" else [
            key for key in cells if key[::3] == (network, t) and key[1] == "nothing"]
        column = "dense_test_accuracy" if schedule == "dense" else "test_accuracy"
        return {pair: row[column] for key in keys for arm, runs in cells.get(key, {}).items()
                if schedule in (arm, "dense") for pair, row in runs.items()}
    for t in budgets[:-1] if "first" in terms else budgets:
        found = [(term[0], accuracies(*term[1:].split()[:2], budgets[-1] if "first" in term else t))
                 for term in terms.split(", ")]
        pairs = [k for k in found[0][1] if all(k in values for _, values in found)]
        if pairs:
            return t, [sum(values[k] if sign == "+" else -values[k] for sign, values in found)
                       for k in pairs]
    return None, []


def verdict(values, relation):
    """How the mean of `values` (paired sums, pp) stands to 0, with Student's 95 % interval."""
    mean, n = float(np.mean(values)), len(values)
    if n < 3:
        return f"not decided {mean:+.2f}, n={n}"
    half = t_quantile(n - 1) * np.std(values, ddof=1) / math.sqrt(n)
    low, high = mean - half, mean + half
    yes, no = {">": (low > 0, high < 0), "<=": (low <= 0 and high <= SAME, low > 0),
               "=": (-SAME <= low <= 0 <= high <= SAME, low > 0 or high < 0)}[relation]
    word = "**yes**" if yes else "**no**" if no else "not decided"
    return f"{word} {mean:+.2f} [{low:+.2f}, {high:+.2f}], n={n}"


def claims(cells):
    """The claims against the rows: markdown, a table for each network and what was pruned, a line
    for each claim that the rows can say something of."""
    lines = []
    for network, what in dict.fromkeys(key[:2] for key in cells):
        mine = {key: cell for key, cell in cells.items() if key[:2] == (network, what)}
        methods = sorted({key[2] for key in mine})
        controls = [(f"control: {arm} > {other}", f"+m {arm}, -m {other}", ">")
                    for arm in in_order(arm for cell in mine.values() for arm in cell)
                    for other in ("one_cycle", "finetune") if arm.startswith("one_cycle/")]
        head = [f"| {network}, pruned: {what} | " + " | ".join(methods) + " |",
                "|---" * (1 + len(methods)) + "|"]
        for text, terms, relation in (*CLAIMS, *controls):
            found = [differences(terms, cells, network, what, m) for m in methods]
            if any(values for _, values in found):
                lines += head + [f"| {text} | " + " | ".join(
                    f"{verdict(values, relation)}, t={t}" if values else "–"
                    for t, values in found) + " |"]
                head = []
        lines += [""] * (not head)
    return "\n".join(lines)


def pictures(cells):
    """Mean test accuracy by epoch of each pruned network's arms, as lines of blocks that share one
    scale, at the budget with the most arms; without scratch, whose low start flattens the others.
    """
    lines = []
    for setting in dict.fromkeys(key[:3] for key in cells):
        t, cell = max(((key[3], {a: cell[a] for a in in_order(cell) if not a.startswith("scratch")})
                       for key, cell in cells.items() if key[:3] == setting),
                      key=lambda item: (len(item[1]), item[0]))
        curves = {arm: np.mean([[p["test_accuracy"] for p in r["curve"]] for r in runs.values()], 0)
                  for arm, runs in cell.items()}
        low, high = (f(map(f, curves.values()), default=0) for f in (min, max))
        lines.append("{}, {} by {}: test accuracy over ".format(*setting) + f"{t} epochs, "
                     f"{low:.2f} to {high:.2f}; each one's largest, last")
        lines += [f"  {arm:16} {schedules.blocks(curve, low, high)} {max(curve):.2f} "
                  f"{curve[-1]:.2f}" for arm, curve in curves.items()]
    return "\n".join(lines)


def report(rows):
    """The whole report as markdown, from rows alone."""
    made = sorted({f"{r['device']}, {r['threads']} threads, {r['precision']}, torch {r['torch']}, "
                   f"code {r['commit']}" for r in rows})
    minutes, found = sum(r["seconds"] for r in rows) / 60, cells(rows)
    return "\n".join([
        f"\n{len(rows)} retrainings, {minutes:.0f} minutes of a process; {'; '.join(made)}.", "",
        "## Claims", "", "Differences in percentage points, paired over dense networks and seeds, "
        "with Student's interval at 95 %, each claim by itself: of twenty undecided ones, one will "
        "look decided by chance.",
        "", claims(found), "## Accuracy", "", "Of the last epoch, on the test images, in %: "
        "mean ± sd (difference to the dense network, runs).", "", tables(found), "## By epoch", "",
        "The dip while the learning rate is large is normal: compare the ends.", "", "```",
        pictures(found), "```"])


# ---- the command ---------------------------------------------------------------------------------

def runs_of(args, machine):
    """{Run: name} of all that the command line asks for; what can be refused at once, is."""
    default, runs = f"runs/shapes-resnet8-s0{'-dry' * args.dry_run}", {}
    checkpoints = {path: models.read(path, *["pruned"] * bool(args.checkpoint))
                   for path in args.checkpoint or sorted(glob.glob(f"{default}/*-*.pt"))}
    checkpoints = {path: c for path, c in checkpoints.items() if c["kind"] == "pruned"}
    if not checkpoints:
        raise Refused(f"{default}: no pruned checkpoint is there; run prune.py first, or name one")
    for path, checkpoint in checkpoints.items():
        recipe = checkpoint["recipe"]
        base = train.RECIPES[recipe["dataset"]]
        budgets = args.epochs or [max(1, recipe["epochs"] * base["retrain"] // base["epochs"])]
        for t, seed, schedule in itertools.product(budgets, args.seed, args.schedule):
            run = Run(path, schedule, t, seed)
            runs[run] = settings_of(run, 1, checkpoint, args, machine)[1]
            if schedule == "weight_rewind":
                rewound(run, checkpoint)
        if max(budgets) >= recipe["epochs"]:
            say(f"{path}: T = {recipe['epochs']}; with as many epochs or more, lr_rewind and "
                "weight_rewind start the dense run over")
    return runs


def main(argv=None):
    flags = train.parser(__doc__, "[PRUNED ...] ")
    add = flags.add_argument_group("run").add_argument
    add("checkpoint", nargs="*", metavar="PRUNED", help="default: all of the default run")
    add("--seed", nargs="+", type=number(int, 0), default=[0, 1, 2], help="default 0 1 2")
    add("--jobs", type=number(int, 1, 1024), help="runs at once (default: cores; on a GPU 1)")
    add("--report", nargs="+", metavar="DIR", help="only print the report again, from the rows")
    add = flags.add_argument_group("method").add_argument
    add("--schedule", nargs="+", choices=EVERY, default=DEFAULT, metavar="NAME",
        help=f"{' '.join(EVERY)} (default {' '.join(DEFAULT)})")
    add("--epochs", nargs="+", type=number(int, 1, 10 ** 6), metavar="t",
        help="budgets (default: the recipe's share of T, a quarter for CIFAR)")
    add("--lr", type=number(float, 1e-9), help="in place of LR_max (default: the dense run's)")
    add("--end-lr", type=number(float, 0), help="the last one, but of slr (default: as published)")
    add("--no-cycle-momentum", dest="cycle_momentum", action="store_false",
        help="one_cycle holds the momentum (default: cycles it, as published)")
    add("--rounds", type=number(int, 1, 1000), default=1, metavar="K",
        help="retrain and prune by as much again, K times (default 1)")
    train.machine_flags(flags)
    args = flags.parse_args(argv)
    for flag, given, takers in (("--lr", args.lr is not None, schedules.TAKE_LR),
                                ("--end-lr", args.end_lr is not None, schedules.TAKE_END_LR),
                                ("--no-cycle-momentum", not args.cycle_momentum, ("one_cycle",))):
        if given and not set(takers) & set(args.schedule):
            flags.error(f"argument {flag}: {' '.join(args.schedule)} would ignore it; it is for "
                        f"{', '.join(takers)}")
    if args.dry_run and args.checkpoint:
        flags.error("argument --dry-run: retrains what train.py --dry-run led to; name no file")
    folders, failed = args.report, 0
    if not folders:
        machine = train.the_machine(args)
        runs = runs_of(args, machine)
        failed = retrain_all(runs, args, machine)
        folders = dict.fromkeys(os.path.dirname(run.path) for run in runs)
    rows = [row for folder in folders for row in read_rows(folder).values()]
    if rows:
        say(report(rows))
    elif args.report:
        flags.error(f"argument --report: no finished runs in {' '.join(folders)}")
    if failed:
        raise Refused(f"{failed} of {len(runs)} runs failed; the same command tries them again")


if __name__ == "__main__":
    train.command(main)
