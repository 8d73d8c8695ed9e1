#!/usr/bin/env python3
"""Retrain pruned networks: start weights x learning-rate schedule, any number of runs, one table.

    python retrain.py                                  # the default run's networks
    python retrain.py PRUNED.pt --schedule finetune one_cycle --epochs 40 72 --seed 0 1 2 --jobs 2
    python retrain.py PRUNED.pt --schedule slr --rounds 8        # retrain, prune again, retrain …
    python retrain.py --report runs/A runs/B           # the report again, from the rows alone

A retraining is `train.fit` with other start weights (`start`) and another schedule
(`schedules.retrain`); all else is the dense run's, so that all arms share batch size, weight decay,
data order and budget. A dense network is retrained the same way, for comparison. What is made from
X.pt goes to the folder X/, what is made from dense.pt goes beside it; a result is a checkpoint and
a row, the same without tensors as JSON, which says all that is needed to run it again.
"""
import argparse
import glob
import hashlib
import json
import math
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

import models
import prune
import schedules
import train
from schedules import SCHEDULES, Refused, number

DEFAULT = ("finetune", "weight_rewind", "lr_rewind", "one_cycle")
DEFAULT_UNPRUNED = ("one_cycle",)     # the others would hardly move, or repeat the dense run's end


# ---- one retraining, from start to row -----------------------------------------------------------

class Run(NamedTuple):
    """A retraining that the command line asks for."""
    source: str         # the checkpoint to retrain, dense or pruned
    schedule: str
    budget: int         # t
    seed: int


def start(run, checkpoint):
    """(network, momentum, masks) from which a variant starts.

    The checkpoint's weights; for weight_rewind the dense run's weights, BN buffers and momentum at
    epoch T - t, with the final weights' mask or filters (Renda 2020); for the scratch ones a fresh
    initialisation of the pruned shape (Liu 2019). masks: {weight name: bool}; what was ever pruned
    is False."""
    network = models.restore(checkpoint)
    momentum = None
    pruning = checkpoint.get("pruning", {"structure": "nothing", "kept": {}})
    masks = {}
    if pruning["structure"] == "weights":
        for name in models.weight_names(network):
            if (checkpoint["model"][name] == 0).any():
                masks[name] = checkpoint["model"][name] != 0
    if run.schedule == "weight_rewind":
        model, momentum = rewound(run.source, run.budget, checkpoint)
        if pruning["kept"]:
            units = models.prunable(network)
            model = models.shrink(model, units, pruning["kept"])
            momentum = models.shrink(momentum, units, pruning["kept"])
        network.load_state_dict(model)
    elif run.schedule.startswith("scratch"):
        models.initialise(network, run.seed)
    for name, mask in masks.items():
        network.get_parameter(name).data.mul_(mask)
    return network, momentum, masks


def rewound(source, budget, checkpoint):
    """(weights and buffers, momentum) of the dense run after max(0, T - t) epochs. Raises Refused
    if its snapshot is missing or belongs to another run."""
    recipe = checkpoint["dense"]["recipe"]
    epoch = max(0, recipe["epochs"] - budget)
    if not checkpoint["dense"]["curve"]["epoch"]:
        raise Refused("argument --schedule: weight_rewind needs snapshots of the dense run, and "
                      f"{source} comes from one that was not made here (--epochs 0)")
    if epoch == 0:
        network = models.build(checkpoint["arch"], checkpoint["classes"], recipe["seed"],
                               recipe["pretrained"])
        model = network.state_dict()
        if "weights" in recipe and models.digest(model) != recipe["weights"]:
            raise Refused(f"{recipe['pretrained']}: holds other weights than the dense run of "
                          f"{source} started from; put that file back")
        return model, {}
    path = snapshot_of(source, epoch)
    if not path:
        wanted = os.path.basename(train.snapshot_path("", epoch))
        near = set()
        for folder in Path(os.path.abspath(source)).parents:
            near |= {path.name for path in folder.glob("epoch-*.pt")}
        there = " ".join(sorted(near)) or "none"
        raise Refused(f"argument --schedule: weight_rewind with {budget} epochs needs {wanted} "
                      f"of the dense run, beside {source} or above; there is {there}")
    snapshot = models.read(path, "momentum")
    train.check_same_run(train.recorded_settings(checkpoint), snapshot["settings"], path)
    return snapshot["model"], snapshot["momentum"]


def snapshot_of(source, epoch):
    """The dense run's state after `epoch` epochs, in the folder of `source` or any above; or ""."""
    for folder in Path(os.path.abspath(source)).parents:
        path = train.snapshot_path(str(folder), epoch)
        if os.path.exists(path):
            return path
    return ""


def settings_of(run, checkpoint, args, machine, fingerprint):
    """All that defines a retraining, as a dict of plain values."""
    dense = checkpoint["dense"]
    recipe = dense["recipe"]
    _, options = SCHEDULES[run.schedule]
    epochs = run.budget
    if run.schedule == "scratch_e":         # as many as dense training and retraining; Liu's E: T
        epochs += recipe["epochs"]
    elif run.schedule == "scratch_b":       # as many MACs as the dense run (Liu 2019)
        macs = checkpoint.get("pruning", dense)["macs"]
        epochs = recipe["epochs"] * dense["macs"] // macs
    return {
        "network": prune.digest_of(checkpoint), "schedule": run.schedule, "budget": run.budget,
        "epochs": epochs, "seed": run.seed,
        "lr": args.lr if "lr" in options else None,
        "end_lr": args.end_lr if "end_lr" in options else None,
        "cycle_momentum": args.cycle_momentum if "cycle_momentum" in options else None,
        "batch_size": recipe["batch_size"], "weight_decay": recipe["weight_decay"],
        "precision": machine.precision, "data": fingerprint}


def target_of(source, settings):
    """The output path; its name ends with a hash of the settings."""
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8]
    name = f"{settings['schedule']}-t{settings['budget']}-s{settings['seed']}-{digest}.pt"
    return os.path.join(prune.folder_of(source), name)


def retrain(run, args, machine):
    """One run. With --rounds: prune by the same amount again and retrain, K rounds in all."""
    checkpoint = models.read(run.source, "dense")
    data = train.data_for(checkpoint, args, machine)
    if args.data_dir:
        checkpoint["data_dir"] = os.path.abspath(args.data_dir)
    target, retrained = retrain_once(run, checkpoint, args, data, machine)
    for times in range(2, args.rounds + 1):
        source, pruned = prune_again(target, retrained, checkpoint["pruning"], times, data, machine)
        target, retrained = retrain_once(run._replace(source=source), pruned, args, data, machine)


def retrain_once(run, checkpoint, args, data, machine):
    """Start weights, schedule, the loop. Writes the checkpoint and its row, or finds them done.
    Returns (the path, the retrained checkpoint)."""
    settings = settings_of(run, checkpoint, args, machine, data.fingerprint)
    target = target_of(run.source, settings)
    if os.path.exists(target):
        retrained = models.read(target, "retraining")
        accuracy = retrained["retraining"]["test_accuracy"]
        train.say(f"{target}: done already, test {accuracy:.2f} %")
    else:
        network, momentum, masks = start(run, checkpoint)
        pruning = checkpoint.get("pruning", {"distance": 0.0, "removed": 0.0})
        schedule = schedules.retrain(
            run.schedule, settings["epochs"], len(train.batch_slices(data, settings, machine)),
            checkpoint["dense"]["recipe"], settings["lr"], settings["end_lr"],
            settings["cycle_momentum"], pruning["distance"], pruning["removed"])
        curve, seconds, made = train.fit(network, data, schedule, settings, machine, target, masks,
                                         momentum, label=os.path.splitext(target)[0])
        retrained = {
            **checkpoint, "model": {n: v.cpu() for n, v in network.state_dict().items()},
            "retraining": {
                **settings, "test_data": data.test_fingerprint, "curve": curve,
                "test_accuracy": curve["test_accuracy"][-1],
                "seconds": round(seconds, 1), **made}}
        models.save(target, retrained)
    row = Path(os.path.splitext(target)[0] + ".json")
    text = json.dumps(row_of(retrained), allow_nan=False) + "\n"
    if not row.exists() or row.read_text(encoding="utf-8") != text:
        models.write(str(row), text.encode())
    models.tidy(target)
    return target, retrained


def row_of(retrained):
    """A retrained checkpoint without its tensors."""
    row = {"format": models.FORMAT, **retrained}
    del row["model"]
    if "pruning" in row:
        row["pruning"] = {k: v for k, v in row["pruning"].items() if k != "kept"}
    return row


def prune_again(source, retrained, first, times, data, machine):
    """Prune a retrained network as `first`, so that it is pruned `times` times by as much. Returns
    (the path, the pruned checkpoint)."""
    wanted = {key: first[key] for key in ("structure", "method", "sparsity", "plan", "scope",
                                          "seed", "include_linear", "calibration_images")}
    if wanted["structure"] == "weights":            # counts all zeros: .3, then .51, .66 …
        wanted["sparsity"] = round(1 - (1 - first["sparsity"]) ** times, 12)
    target = prune.target_of(source, retrained, wanted)
    if os.path.exists(target):
        return target, models.read(target)
    pruned = prune.prune(retrained, wanted, data, machine)
    models.save(target, pruned)
    return target, pruned


# ---- many runs -----------------------------------------------------------------------------------

def runs_wanted(args):
    """The runs that the command line asks for. Raises Refused for what cannot be retrained."""
    runs = []
    for source in args.checkpoint or default_sources(args.dry_run):
        checkpoint = models.read(source, "dense")
        recipe = checkpoint["dense"]["recipe"]
        if "retraining" in checkpoint:
            raise Refused(f"{source}: has been retrained already; prune it again first")
        if args.rounds > 1 and "pruning" not in checkpoint:
            raise Refused(f"argument --rounds: {source} is not pruned")
        for budget in args.epochs or [train.budget(recipe)]:
            names = schedules_for(source, checkpoint, budget, args.schedule)
            if budget >= recipe["epochs"] and {"lr_rewind", "weight_rewind"} & {*names}:
                train.say(f"{source}: T = {recipe['epochs']}; with as many epochs or more, "
                          "lr_rewind and weight_rewind start the dense run over")
            for seed in args.seed:
                runs += [Run(source, name, budget, seed) for name in names]
    return list(dict.fromkeys(runs))


def default_sources(dry_run):
    """The dense network and the pruned ones of the default run."""
    folder = train.default_folder(dry_run=dry_run)
    pruned = sorted(glob.glob(f"{folder}/filters-*.pt") + glob.glob(f"{folder}/weights-*.pt"))
    if not pruned:
        raise Refused(f"{folder}: no pruned checkpoint is there; run prune.py or name one")
    return [f"{folder}/dense.pt", *pruned]


def schedules_for(source, checkpoint, budget, wanted):
    """The schedules by which to retrain a checkpoint: those that are `wanted`, or the default
    ones. weight_rewind is refused, or left out of the default, if its snapshot is missing."""
    names = list(wanted or (DEFAULT if "pruning" in checkpoint else DEFAULT_UNPRUNED))
    if "weight_rewind" in names:
        try:
            rewound(source, budget, checkpoint)         # raises if the snapshot is missing
        except Refused as problem:
            if wanted:
                raise
            names.remove("weight_rewind")
            train.say(f"{source}: without weight_rewind: {problem}")
    return names


def perform(runs, args, machine):
    """Makes one run after the other. Returns what went wrong, a line for each run that failed."""
    failed = []
    began = time.monotonic()
    for done, run in enumerate(runs, 1):
        try:
            retrain(run, args, machine)
        except (Refused, OSError) as problem:
            if machine.world > 1:               # the other processes wait in a collective
                raise
            failed.append(f"{run.source} {run.schedule} t={run.budget} seed={run.seed}: {problem}")
        left = (time.monotonic() - began) / done * (len(runs) - done)
        train.say(f"{len(runs) - done} of {len(runs)} runs left, about {left / 60:.1f} min")
    return failed


def cores():
    """How many this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def default_jobs(runs, args, machine):
    """How many processes: the cores or the GPUs, at most the runs that are left."""
    left = 0
    checkpoints = {source: models.read(source) for source in {run.source for run in runs}}
    for run in runs:
        checkpoint = checkpoints[run.source]
        data = checkpoint.get("pruning", checkpoint["dense"])["data"]
        settings = settings_of(run, checkpoint, args, machine, data)
        if args.rounds > 1 or not os.path.exists(target_of(run.source, settings)):
            left += 1
    devices = cores()
    if machine.device.type != "cpu":
        devices = torch.accelerator.device_count() if machine.device.index is None else 1
    return max(1, min(left, devices))


SEE_ABOVE = "some runs failed, see above; run the same command again to retry them"


def in_processes(jobs, argv, part, machine):
    """Start this command `jobs` times, each with its piece of `part`, its share of the cores and a
    GPU of its own, and wait. Returns what they said of runs that failed. When this process is
    interrupted or fails, it ends them."""
    environment = dict(os.environ)
    environment.setdefault("OMP_NUM_THREADS", str(max(1, cores() // jobs)))
    first, every = part
    children = []
    flags_end = argv.index("--") if "--" in argv else len(argv)
    try:
        for place in range(jobs):
            command = [sys.executable, os.path.abspath(__file__), *argv[:flags_end], "--jobs", "1",
                       "--share", f"{first + place * every}/{every * jobs}"]
            if machine.device.type != "cpu" and machine.device.index is None:
                gpu = place % torch.accelerator.device_count()
                command += ["--device", f"{machine.device.type}:{gpu}"]
            command += argv[flags_end:]
            errors = tempfile.TemporaryFile()
            children.append((subprocess.Popen(command, env=environment, stderr=errors), errors))
        failed = []
        for child, errors in children:
            child.wait()
            errors.seek(0)
            said = errors.read().decode(errors="replace")
            if child.returncode:
                lines = said.splitlines() or [f"a process ended with status {child.returncode}"]
                failed += [line for line in lines if not line.endswith(SEE_ABOVE)]
            else:
                sys.stderr.write(said)                                  # warnings
        return failed
    finally:
        for child, _ in children:
            if child.poll() is None:
                child.terminate()
        for child, errors in children:
            child.wait()
            errors.close()


# ---- the report: what can be compared ------------------------------------------------------------

def read_rows(folders):
    """The rows of all results in `folders` and below: a list of dicts, in the order of their paths.
    They are known by their names, see `target_of`."""
    paths = {}
    for folder in folders:
        if not os.path.isdir(folder):
            raise Refused(f"argument --report: {folder}: no such folder")
        for path in Path(folder).rglob("*-t*-s*-????????.json"):
            paths[path.resolve()] = path
    rows = []
    for path in sorted(paths.values()):
        try:
            row = json.loads(path.read_text(encoding="utf-8"), parse_constant=int)   # refuses NaN
            if row["format"] != models.FORMAT or not row["retraining"] or not row["dense"]:
                raise ValueError
        except (ValueError, RecursionError, KeyError, TypeError):
            raise Refused(f"{path}: not a result row of format {models.FORMAT}; remove it"
                          ) from None
        rows.append(row)
    return rows


class Cell(NamedTuple):
    """A column of a table: runs that have this in common can be compared."""
    network: str            # and data set, plus those conditions that differ among the rows
    what: str               # was pruned; "nothing" of the dense network
    method: str
    budget: int


class Repetition(NamedTuple):
    """What two compared runs share: the dense network, by its digest, and the seeds."""
    dense: str
    pruning: int | None     # None: not pruned
    retraining: int


# The arms that are compared with each other over the repetitions that all of them have.
MAIN = ("finetune", "lr_rewind", "weight_rewind", "slr", "one_cycle")


def cells(rows):
    """{Cell: {arm: {Repetition: row}}}. The start of a finetune run is also a run of each shorter
    budget."""
    found = {}
    named = list(zip(network_names(rows), rows))
    budgets = {}
    for network, row in named:
        budgets.setdefault(network, set()).add(row["retraining"]["budget"])
    for network, row in named:
        if row["retraining"]["schedule"] == "finetune" and round_of(row) < 2:
            for budget in sorted(budgets[network]):
                if budget < row["retraining"]["budget"]:
                    put(found, network, shortened(row, budget))
    for network, row in named:
        put(found, network, row)
    return {cell: over_common_repetitions(arms) for cell, arms in found.items()}


def put(found, name, row):
    """Add a row to `found` (see `cells`) under its network's name. Raises Refused if it would stand
    for the same repetition as the row of a network that was pruned differently."""
    pruning = row.get("pruning", {"method": "", "seed": None})
    retraining = row["retraining"]
    cell = Cell(name, what_was_pruned(row), pruning["method"], retraining["budget"])
    repetition = Repetition(row["dense"]["digest"], pruning["seed"], retraining["seed"])
    runs = found.setdefault(cell, {}).setdefault(arm_of(row), {})
    alike = [other for other, known in runs.items()
             if known["retraining"]["network"] == retraining["network"]]
    if repetition in runs and repetition not in alike:
        raise Refused(f"two results of {cell.what} {cell.method}, {arm_of(row)}, seed "
                      f"{repetition.retraining} come from networks that were pruned otherwise; "
                      "report their folders apart")
    # One network under two pruning seeds (magnitude ignores them) is one repetition, not two.
    for other in alike:
        if other != repetition and other.retraining == repetition.retraining:
            return
    runs[repetition] = row


def over_common_repetitions(arms):
    """{arm: {Repetition: row}} without the repetitions that one of the MAIN arms lacks; an arm that
    has none of the common ones stays as it is."""
    sets = [set(runs) for arm, runs in arms.items() if arm in MAIN]
    common = set.intersection(*sets) if sets else set()
    found = {}
    for arm, runs in arms.items():
        shared = {key: row for key, row in runs.items() if key in common}
        found[arm] = shared or runs
    return found


def shortened(row, budget):
    """A finetune row as its first `budget` epochs."""
    curve = {key: values[:budget] for key, values in row["retraining"]["curve"].items()}
    retraining = dict(row["retraining"])
    retraining["budget"] = budget
    retraining["curve"] = curve
    retraining["test_accuracy"] = curve["test_accuracy"][-1]
    return {**row, "retraining": retraining}


def network_names(rows):
    """For each row its network and data set, and those of its conditions that are not the same in
    all rows of that network and data set."""
    values = {}                                         # {(network, condition): what it is}
    for row in rows:
        for key, value in conditions(row).items():
            values.setdefault((base_name(row), key), set()).add(repr(value))
    names = []
    for row in rows:
        name = base_name(row)
        for key, value in conditions(row).items():
            if len(values[base_name(row), key]) > 1:
                name += f", {key} {value}"
        names.append(name)
    return names


def base_name(row):
    return f"{row['arch']} on {row['dense']['recipe']['dataset']}"


def conditions(row):
    """What has to be equal in rows that are averaged, apart from what Cell and arm already say."""
    found = {}
    for key, value in row["dense"]["recipe"].items():
        if key not in ("dataset", "seed"):
            found[key.replace("_", " ")] = value
    found["dense images"] = row["dense"]["data"]
    found["dense precision"] = row["dense"]["precision"]
    found["images"] = row["retraining"]["data"]
    found["precision"] = row["retraining"]["precision"]
    if "test_data" in row["retraining"]:                # rows made before it was recorded lack it
        found["test images"] = row["retraining"]["test_data"]
    pruning = row.get("pruning", {"method": ""})
    if pruning["method"] in prune.NEED_IMAGES:
        found["ranked by"] = f"{pruning['calibration_images']} of {pruning['data']}"
    return found


def round_of(row):
    return row.get("pruning", {"round": 0})["round"]


def what_was_pruned(row):
    """Structure and amount; and the round, with what went before if it was not the same again."""
    if "pruning" not in row:
        return "nothing"
    pruning = row["pruning"]
    text = f"{pruning['structure']} {prune.amount(pruning)}"
    if pruning["round"] > 1:
        text += f" round {pruning['round']}"
    if pruning["earlier"] != usual_history(row):
        text += f" after {', '.join(pruning['earlier'])}"
    return text


def usual_history(row):
    """The steps before this pruning if --rounds made them, named as `prune.history` does: so many
    times the same pruning and the same retraining."""
    pruning = row["pruning"]
    retraining = row["retraining"]
    steps = []
    for earlier in range(1, pruning["round"]):
        sparsity = pruning["sparsity"]
        if pruning["structure"] == "weights":   # cumulative: each round leaves the same share
            sparsity = 1 - (1 - sparsity) ** (earlier / pruning["round"])
        steps.append(prune.name_of({**pruning, "sparsity": sparsity}))
        steps.append(f"{retraining['schedule']}-t{retraining['budget']}")
    return steps


def arm_of(row):
    """The schedule, with what is not as published."""
    retraining = row["retraining"]
    arm = retraining["schedule"]
    if retraining["lr"] is not None:
        arm += f"/lr={retraining['lr']:g}"
    if retraining["end_lr"] is not None:
        arm += f"/end={retraining['end_lr']:g}"
    if retraining["cycle_momentum"] is False:
        arm += "/flat-momentum"
    return arm


# ---- the report: claims --------------------------------------------------------------------------

# What is claimed of test accuracies. A side is an arm or, as a pair, the first minus the second.
# What stands behind an arm's slash, `compared` explains. `>`: the left side is larger. `=`: they
# differ by less than SAME points.
PAPER = (
    ("lr_rewind", ">", "finetune"),
    ("slr", ">", "finetune"),
    ("slr", "=", "lr_rewind"),                      # the rate matters, not the rewinding
    ("one_cycle", ">", "finetune"),
    ("one_cycle", ">", "lr_rewind"),
    ("one_cycle", ">", "weight_rewind"),
    ("one_cycle", ">", "slr"),
    ("finetune", ">", "finetune/first"),            # the paper: it gains nothing from more epochs
    ("one_cycle", ">", "dense"),                    # only a large rate recovers all accuracy
    ("dense", ">", "finetune"),
    ("one_cycle/random", ">", "finetune"),          # the schedule matters more than the criterion
    ("one_cycle", ">", "one_cycle/random"),         # which matters still, but less
    (("finetune", "finetune/random"), ">", ("one_cycle", "one_cycle/random")),
)
# Written down before the runs that decide them: what does longer training bring the dense network,
# and is it more than that; is it a large rate or only a faster one; which peak?
OURS = (
    ("one_cycle/unpruned", ">", "finetune/unpruned"),
    (("one_cycle", "finetune"), ">", ("one_cycle/unpruned", "finetune/unpruned")),
    (("one_cycle/random", "finetune"), ">", ("one_cycle/unpruned", "finetune/unpruned")),
    ("one_cycle", ">", "finetune/end=0.01"),
    ("one_cycle", ">", "finetune/end=0.03"),
    ("one_cycle/lr=0.01", ">", "finetune/end=0.01"),
    ("one_cycle/lr=0.01", ">", "one_cycle"),
    ("one_cycle/lr=0.03", ">", "one_cycle"),
    ("one_cycle/lr=0.3", ">", "one_cycle"),
)
# Added after rows had been seen.
EXPLORATORY = (
    ("one_cycle/first", ">", "finetune"),
    ("one_cycle/random", ">", "finetune/end=0.01"),     # a larger constant rate
    ("one_cycle", ">", "one_cycle/unpruned"),
    ("linear", "=", "one_cycle"),
    ("scratch_e", "=", "one_cycle"),
    ("one_cycle/end=0.001", "=", "one_cycle"),
    ("one_cycle/flat-momentum", "=", "one_cycle"),
    ("one_cycle/end=0.001/flat-momentum", "=", "one_cycle"),
)
SAME = 0.5          # points
# The 97.5 % quantiles of Student's t for 1, 2, … degrees of freedom, see `student`.
STUDENT = 12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262


def compared(found, cell):
    """{name: {Repetition: test accuracy}} of a cell's arms, of `dense`, and of arms of other cells:
    pruned at /random, the /unpruned network retrained alike, with the /first, least budget."""
    accuracies = {"dense": {}}
    for arm, runs in found[cell].items():
        accuracies[arm] = last_accuracies(runs)
        for repetition, row in runs.items():
            accuracies["dense"][repetition] = row["dense"]["test_accuracy"]
    budgets = [other.budget for other in found if other._replace(budget=cell.budget) == cell]
    random = cell._replace(method="random")
    first = cell._replace(budget=min(budgets))
    unpruned = cell._replace(what="nothing", method="")
    for suffix, other in (("/random", random), ("/first", first), ("/unpruned", unpruned)):
        if other == cell:                               # nothing is compared with itself
            continue
        for arm, runs in found.get(other, {}).items():
            values = last_accuracies(runs)
            if other == unpruned:
                values = for_each_pruning(values, accuracies["dense"])
            accuracies[arm + suffix] = values
    return accuracies


def for_each_pruning(values, repetitions):
    """The unpruned network's {Repetition: accuracy}, given to each of the `repetitions` that it
    shares dense network and retraining seed with."""
    found = {}
    for repetition in repetitions:
        without = repetition._replace(pruning=None)
        if without in values:
            found[repetition] = values[without]
    return found


def last_accuracies(runs):
    """{Repetition: test accuracy after the last epoch} of {Repetition: row}."""
    return {key: row["retraining"]["test_accuracy"] for key, row in runs.items()}


def values_of(accuracies, name):
    """{Repetition: value}: of an arm its accuracy, of a pair (left, right) left minus right, for
    the repetitions that both have. A claim is the pair of its sides, each an arm or a pair."""
    if isinstance(name, str):
        return accuracies.get(name, {})
    left = values_of(accuracies, name[0])
    right = values_of(accuracies, name[1])
    return {key: left[key] - right[key] for key in left if key in right}


def student(freedom):
    """The 97.5 % quantile of Student's t, between whole degrees of freedom by a straight line; the
    last one known serves for more."""
    return np.interp(freedom, range(1, 1 + len(STUDENT)), STUDENT)


def verdict(values, relation):
    """What `values` (left minus right side, in points) say, with Student's 95 % interval.

    `>`: yes, or *reversed* (the right side is larger), if the interval lies on one side of 0.
    `=`: yes if it lies within SAME of 0, no if wholly outside. Otherwise not decided."""
    if not values:
        return "–"
    mean = float(np.mean(values))
    n = len(values)
    if n < 3:
        return f"not decided {mean:+.2f}, n={n}"
    half = student(n - 1) * np.std(values, ddof=1) / math.sqrt(n)
    low, high = mean - half, mean + half
    word = "not decided"
    if relation == ">":
        if low > 0:
            word = "**yes**"
        elif high < 0:
            word = "**reversed**"
    elif -SAME <= low and high <= SAME:
        word = "**yes**"
    elif low > SAME or high < -SAME:
        word = "**no**"
    return f"{word} {mean:+.2f} [{low:+.2f}, {high:+.2f}], n={n}"


def changed(first, last):
    """The mean of `last` minus that of `first` (differences in points, found with other dense runs,
    so that nothing is paired), with Welch's 95 % interval (Biometrika 34, 1947)."""
    if not first or not last:
        return "–"
    mean = np.mean(last) - np.mean(first)
    if min(len(first), len(last)) < 3:
        return f"{mean:+.2f}"
    squares = [np.var(values, ddof=1) / len(values) for values in (first, last)]
    total = sum(squares)
    freedom = 1.0                                       # any: without spread the width is 0
    if total > 0:
        terms = [square ** 2 / (len(values) - 1) for square, values in zip(squares, (first, last))]
        freedom = total ** 2 / sum(terms)
    half = student(freedom) * math.sqrt(total)
    return f"{mean:+.2f} [{mean - half:+.2f}, {mean + half:+.2f}]"


def words(claim):
    """A claim as text."""
    left, relation, right = claim
    sides = [name if isinstance(name, str) else " - ".join(name) for name in (left, right)]
    margin = f" within {SAME:g}" if relation == "=" else ""
    exploratory = " (exploratory)" if claim in EXPLORATORY else ""
    return f"`{sides[0]} {relation} {sides[1]}`{margin}{exploratory}"


def claims(found, columns, corner="claim", change=False):
    """The table of the claims, a line for each that the rows can say something of; columns:
    {heading: Cell}. With `change` another column says how the first differs from the last."""
    known = [compared(found, cell) for cell in columns.values()]
    lines = {}
    for claim in (*PAPER, *OURS, *EXPLORATORY):
        left, relation, right = claim
        values = [list(values_of(accuracies, (left, right)).values()) for accuracies in known]
        if any(values):
            lines[words(claim)] = [verdict(some, relation) for some in values]
            if change:
                lines[words(claim)].append(changed(values[0], values[-1]))
    headings = [*columns, "change, first to last"] if change else columns
    return table(corner, headings, lines) if lines else ""


# ---- the report: tables and pictures -------------------------------------------------------------

def table(corner, columns, lines):
    """A markdown table; lines: {name: a text for each of the columns}."""
    text = f"| {' | '.join([corner, *columns])} |\n"
    text += "| --- " * (1 + len(columns)) + "|\n"
    for name, texts in lines.items():
        text += f"| {' | '.join([name, *texts])} |\n"
    return text


def summary(pairs):
    """Mean ± sd of [(accuracy, the dense network's)], and the mean difference."""
    if not pairs:
        return "–"
    values, dense = zip(*pairs)
    sd = f" ± {np.std(values, ddof=1):.2f}" if len(values) > 1 else ""
    gain = np.mean(values) - np.mean(dense)
    return f"{np.mean(values):.2f}{sd} ({gain:+.2f}, n={len(values)})"


def accuracies_table(corner, found, columns):
    """The test accuracies of the cells' arms, of the dense and the pruned network as they are, and
    of the dense network retrained alike; columns: {heading: Cell}."""
    lines = {}
    rows_of = [rows_in(found[cell]) for cell in columns.values()]
    pruned = all("pruning" in rows[0] for rows in rows_of)
    if pruned:
        lines["parameters, MACs left"] = [
            f"{share_left(rows, 'nonzero', 'params'):.0%}, {share_left(rows, 'macs', 'macs'):.0%}"
            for rows in rows_of]
    lines["`dense`"] = [summary(once(rows, "dense", "test_accuracy")) for rows in rows_of]
    if pruned:
        lines["not retrained"] = [summary(once(rows, "pruning", "test_accuracy"))
                                  for rows in rows_of]
        lines["only BN re-estimated"] = [summary(once(rows, "pruning", "bn_test_accuracy"))
                                         for rows in rows_of]
    known = [compared(found, cell) for cell in columns.values()]
    for arm in arms_of(found, columns):
        lines[f"`{arm}`"] = [paired(accuracies, arm) for accuracies in known]
    unpruned = {name for accuracies in known for name in accuracies if name.endswith("/unpruned")}
    for name in sorted(unpruned, key=in_order):
        lines[f"`{name}`"] = [paired(accuracies, name) for accuracies in known]
    return table(corner, columns, lines)


def rows_in(arms):
    """All rows of a cell, {arm: {Repetition: row}}."""
    rows = []
    for runs in arms.values():
        rows += runs.values()
    return rows


def share_left(rows, pruned, dense):
    """The mean share of the dense network's parameters or MACs that pruned networks have."""
    return np.mean([row["pruning"][pruned] / row["dense"][dense] for row in rows])


def once(rows, key, accuracy):
    """[(accuracy, the dense network's)] of each different network among what `key` says of rows."""
    different = {row[key]["digest"]: (row[key][accuracy], row["dense"]["test_accuracy"])
                 for row in rows}
    return list(different.values())


def paired(accuracies, arm):
    """`summary` of an arm."""
    runs = accuracies.get(arm, {})
    return summary([(value, accuracies["dense"][key]) for key, value in runs.items()])


def arms_of(found, columns):
    """The names of all arms of some cells, in the order of the schedules."""
    names = {arm for cell in columns.values() for arm in found[cell]}
    return sorted(names, key=in_order)


def in_order(arm):
    """Sorts arms in the order of the schedules."""
    return list(SCHEDULES).index(arm.split("/")[0]), arm


def mean_curves(arms):
    """{arm: mean test accuracy by epoch}, without the scratch ones."""
    curves = {}
    for arm, runs in arms.items():
        if not arm.startswith("scratch"):               # from so low that it flattens the others
            every = [row["retraining"]["curve"]["test_accuracy"] for row in runs.values()]
            curves[arm] = np.mean(every, 0).tolist()
    return curves


def pictures(found, columns):
    """The mean curves of each cell's arms, as lines of blocks that share one scale."""
    names = arms_of(found, columns)
    width = max(map(len, names))
    lines = []
    for heading, cell in columns.items():
        curves = mean_curves(found[cell])
        if curves:
            low = min(min(curve) for curve in curves.values())
            high = max(max(curve) for curve in curves.values())
            lines.append(f"{heading}: {low:.2f} to {high:.2f}")
            for arm in names:
                if arm in curves:
                    drawn = schedules.blocks(curves[arm], low, high)
                    lines.append(f"  {arm:{width}} {drawn} {max(curves[arm]):.2f} "
                                 f"{curves[arm][-1]:.2f}")
    return "```\n" + "\n".join(lines) + "\n```\n"


def chart(rows):
    """The mean curves of the schedules as they are, as SVG: a panel for each network, what was
    pruned and how, with its largest budget."""
    found = cells(rows)
    panels = {}
    for cell in sorted(found):
        longer = [other for other in found if other._replace(budget=cell.budget) == cell
                  and other.budget > cell.budget]
        curves = {arm: curve for arm, curve in mean_curves(found[cell]).items() if "/" not in arm}
        if curves and not longer:
            panels[f"{cell.network}: {cell.what} {cell.method}, t={cell.budget}"] = curves
    return schedules.chart(panels, "test accuracy, %")


def report(rows):
    """The whole report as markdown, from rows alone: a section for each network and what was pruned
    of it, with its accuracies, claims and pictures; last the claims by length of training."""
    found = cells(rows)
    made = set()
    for row in rows:
        run = row["retraining"]
        made.add(f"{run['device']}, {run['threads']} threads, {run['precision']}, torch "
                 f"{run['torch']}, code {run['commit']}")
    minutes = sum(row["retraining"]["seconds"] for row in rows) / 60
    lines = [
        f"\n{len(rows)} retrainings, {minutes:.0f} process-minutes; "
        f"{'; '.join(sorted(made))}.",
        "- Accuracy: of the last epoch, on the test images, in %: mean ± sd (difference to the "
        f"dense network, runs), over the repetitions common to those of {', '.join(MAIN)} that are "
        "present.",
        "- Claims: differences in points, paired over dense networks and seeds, with Student's "
        "interval at 95 %, each by itself: about one in twenty looks decided by chance. "
        "`/random`: pruned at random; `/unpruned`: the dense network retrained likewise; `/first`: "
        "with the smallest budget. *Reversed*: decided the other way round. Exploratory: added "
        "after rows had been seen. *Change*: not paired, with Welch's interval.",
        "- Pictures: test accuracy by epoch; its largest, its last. The dip while the learning "
        "rate is large is normal: compare the ends.\n"]
    # Retrained dense networks stand beside pruned ones, as /unpruned; without any, by themselves.
    shown = [cell for cell in found if cell.what != "nothing"]
    beside = {(cell.network, cell.budget) for cell in shown}
    shown += [cell for cell in found if (cell.network, cell.budget) not in beside]
    for network, what in dict.fromkeys((cell.network, cell.what) for cell in shown):
        columns = {}
        for cell in sorted(shown):
            if (cell.network, cell.what) == (network, what):
                columns[f"{cell.method} t={cell.budget}".strip()] = cell
        lines.append(accuracies_table(f"{network}, pruned: {what}", found, columns))
        lines.append(claims(found, columns))
        lines.append(pictures(found, columns))
    return "\n".join([*lines, *by_length(found, shown)])


def by_number(cell):
    """Sorts cells with the numbers in their networks' names ascending."""
    parts = re.split(r"(\d+)", cell.network)
    return [int(part) if part.isdigit() else part for part in parts], cell


def by_length(found, shown):
    """Tables of the claims whose columns are what differs between dense runs of one network and
    data set: above all their length T."""
    groups = {}
    for cell in sorted(shown, key=by_number):
        base, _, differs = cell.network.partition(", ")
        if differs and cell.method != "random":
            columns = groups.setdefault((base, cell.what), {})
            columns[f"{differs}, {cell.method} t={cell.budget}"] = cell
    tables = []
    for (base, what), columns in groups.items():
        if len({cell.network for cell in columns.values()}) > 1:
            corner = f"{base}, pruned: {what}, by what differs"
            tables.append(claims(found, columns, corner, change=True))
    return tables


# ---- the command ---------------------------------------------------------------------------------

def part_of(text):
    """An argparse type: i/N as (i, N)."""
    first, every = map(int, text.split("/"))
    if not 0 <= first < every:
        raise ValueError
    return first, every


# What argparse says of a ValueError: "invalid share i/N, … value: '3/3'".
part_of.__name__ = "share i/N, i from 0 to N-1,"


def check(args, flags):
    """Ends with argparse's own error for flags that would be ignored."""
    asked = args.schedule or DEFAULT
    for option in ("lr", "end_lr", "cycle_momentum"):
        users = [name for name, (_, options) in SCHEDULES.items() if option in options]
        given = getattr(args, option) != flags.get_default(option)
        if given and not set(users) & set(asked):
            flags.error(f"argument --{option.replace('_', '-')}: {' '.join(asked)} would ignore "
                        f"it; it is for {', '.join(users)}")
    if args.dry_run and args.checkpoint:
        flags.error("argument --dry-run: retrains what train.py --dry-run led to; name no file")


def main(argv=None):
    argv = [str(word) for word in (sys.argv[1:] if argv is None else argv)]
    flags, run, method = train.parser(__doc__, "[CHECKPOINT ...] ")
    add = run.add_argument
    add("checkpoint", nargs="*", metavar="CHECKPOINT", type=os.path.expanduser,
        help="pruned or dense (default: all of the default run)")
    add("--seed", nargs="+", type=number(int, 0), default=[0, 1, 2], help="default 0 1 2")
    add("--jobs", type=number(int, 1), help="runs at once (default: cores, or GPUs)")
    add("--share", type=part_of, default=(0, 1), metavar="i/N",
        help="make every N-th run, from the i-th; no report, no chart")
    add("--report", nargs="+", metavar="DIR", type=os.path.expanduser,
        help="only print the report again, from the rows")
    add("--chart", metavar="FILE.svg", type=os.path.expanduser, help="draw the accuracies there")
    add("--compile", action="store_true", help="use torch.compile (default: off)")
    add = method.add_argument
    add("--schedule", nargs="+", choices=SCHEDULES, metavar="NAME",
        help=f"{' '.join(SCHEDULES)} (default {' '.join(DEFAULT)}; dense: "
        f"{' '.join(DEFAULT_UNPRUNED)})")
    add("--epochs", nargs="+", type=number(int, 1), metavar="t",
        help="budgets (default: the recipe's share of T, a quarter for CIFAR)")
    add("--lr", type=number(float, 1e-9), help="in place of LR_max (default: the dense run's)")
    add("--end-lr", type=number(float, 0), help="the last rate (default: as published)")
    add("--cycle-momentum", action=argparse.BooleanOptionalAction, default=True,
        help="of one_cycle (default: yes, as published)")
    add("--rounds", type=number(int, 1), default=1, metavar="K",
        help="K retrainings, pruning by as much again in between (default 1)")
    args = flags.parse_args(argv)
    check(args, flags)
    if args.report:
        train.processes()               # refuses half an environment of torchrun
        train.refuse_others(flags, args, "report", "chart")
        publish(read_rows(args.report), args.chart)
        return
    machine = train.make_machine(args)
    if machine.world > 1 and (args.jobs or 1) > 1:
        raise Refused("argument --jobs: torchrun has started the processes already")
    runs = runs_wanted(args)
    first, every = args.share
    mine = runs[first::every]
    jobs = 1
    if machine.world == 1:
        jobs = min(args.jobs or default_jobs(mine, args, machine), max(1, len(mine)))
    if jobs > 1:
        failed = in_processes(jobs, argv, args.share, machine)
    else:
        failed = perform(mine, args, machine)
    if every == 1:
        rows = read_rows(dict.fromkeys(os.path.dirname(run.source) or "." for run in runs))
        if rows:
            publish(rows, args.chart)
    if failed:
        for problem in failed:
            print(problem, file=sys.stderr)
        raise Refused(SEE_ABOVE)


def publish(rows, path):
    """Print the report and, if there is a path, draw the chart."""
    if not rows:
        raise Refused("argument --report: no finished runs there")
    train.say(report(rows))
    if path:
        models.write(path, chart(rows).encode())


if __name__ == "__main__":
    train.command(main)
