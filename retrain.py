#!/usr/bin/env python3
"""Retrain pruned networks: start weights x learning-rate schedule, as many as wanted, one table.

    python retrain.py                                  # the default run's pruned networks
    python retrain.py PRUNED.pt --schedule finetune one_cycle --epochs 40 72 --seed 0 1 2
    python retrain.py PRUNED.pt --schedule slr --rounds 8
                                                       # iterative: retrain, prune again, retrain …
    python retrain.py --report runs/A runs/B           # the report again, from the rows alone

A retraining is `train.fit` with other start weights (`start`) and another schedule
(`schedules.retrain`); everything else comes from the dense run's recipe, so that all arms share
batch size, weight decay, data order and budget. Each finished run adds one line to results.jsonl in
its run folder, which says all that is needed to run it again; a run that is there is not repeated.
"""
import argparse
import contextlib
import fcntl
import glob
import hashlib
import itertools
import json
import math
import os
import re

import numpy as np
import torch

import models
import prune
import schedules
import train
from schedules import Refused, number
from train import say

DEFAULT = ["finetune", "weight_rewind", "lr_rewind", "slr", "one_cycle"]
EVERY = (*schedules.RETRAIN, *schedules.SCRATCH_AT_EQUAL_COST)


# ---- one run -------------------------------------------------------------------------------------

def start(schedule, epochs, checkpoint, folder, seed):
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
    if schedule == "weight_rewind":
        snapshot = rewind_point(checkpoint, epochs, folder)
        units = models.prunable(network)
        network.load_state_dict(models.shrink(snapshot["model"], units, checkpoint["kept"]))
        momentum = models.shrink(snapshot["momentum"], units, checkpoint["kept"])
    elif schedule.startswith("scratch"):
        models.initialise(network, seed)
    with torch.no_grad():
        for name, mask in masks.items():
            network.get_parameter(name).mul_(mask)
    return network, momentum, masks


def rewind_point(checkpoint, epochs, folder):
    """The dense run's state before epoch max(0, T - t), as train.py kept it in `folder`."""
    epoch = max(0, checkpoint["recipe"]["epochs"] - epochs)
    path = train.snapshot_path(os.path.join(folder, "dense.pt"), epoch)
    if not os.path.exists(path):
        names = (re.fullmatch(r"epoch-(\d+)\.pt", name) for name in os.listdir(folder or "."))
        kept = sorted(int(name[1]) for name in names if name)
        raise Refused(f"argument --schedule: weight_rewind with {epochs} epochs needs {path}, "
                      f"which was not kept (kept epochs: {' '.join(map(str, kept)) or 'none'}); "
                      "see train.py --snapshot-every")
    snapshot = models.read(path, "state")
    train.same_run(checkpoint["settings"], snapshot["settings"], path)
    return snapshot


def budget(schedule, epochs, checkpoint):
    """Epochs a variant trains for a budget of `epochs`: more for the scratch arms at equal cost."""
    total = checkpoint["recipe"]["epochs"]
    if schedule == "scratch_e":
        return total + epochs
    if schedule == "scratch_b":
        return int(total * checkpoint["dense_macs"] / checkpoint["macs"])
    return epochs


def run_id(settings):
    """16 hex digits that identify what defines a run."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]


class Run:
    """One retraining: what defines it (`settings`), its id, and where its files are."""
    def __init__(self, path, checkpoint, schedule, epochs, seed, args, machine):
        recipe = checkpoint["recipe"]
        self.path, self.checkpoint = path, checkpoint
        self.folder = os.path.dirname(path) or "."
        dry = args.dry_run
        self.asked, self.epochs = epochs, min(epochs, 2) if dry else epochs
        trained = budget(schedule, self.epochs, checkpoint)
        self.settings = {
            "pruned": models.digest(checkpoint["model"]), "dense": checkpoint["dense_id"],
            "round": checkpoint.get("round", 1), "schedule": schedule, "budget": self.epochs,
            "epochs": min(trained, 4) if dry else trained, "seed": seed,
            "lr": args.lr if schedule in schedules.TAKE_LR else None,
            "end_lr": args.end_lr if schedule in schedules.TAKE_END_LR else None,
            "cycle_momentum": args.cycle_momentum if schedule == "one_cycle" else None,
            "batch_size": recipe["batch_size"], "weight_decay": recipe["weight_decay"],
            "subset": recipe["subset"], "val_size": recipe["val_size"],
            "precision": "bf16" if machine.bf16 else "fp32", "dry_run": dry or recipe["dry_run"]}
        self.id = run_id(self.settings)
        self.name = f"{os.path.basename(path)[:-3]}-{schedule}-t{self.epochs}-s{seed}-{self.id[:6]}"
        self.target = os.path.join(self.folder, self.name + ".pt")
        self.state = os.path.join(self.folder, self.name + ".state.pt")
        if schedule == "weight_rewind":        # refuse before anything is trained
            rewind_point(checkpoint, self.asked, self.folder)

    def schedule(self, steps):
        s, c = self.settings, self.checkpoint
        return schedules.retrain(s["schedule"], s["epochs"], steps, c["recipe"], s["lr"],
                                 s["end_lr"], s["cycle_momentum"] is not False, c["distance"],
                                 c["removed"])

    def part(self, t):
        """What defines the row for budget `t`: finetune's shorter runs are the start of this one.
        """
        s = self.settings
        epochs = min(t, s["epochs"]) if s["schedule"] == "finetune" else s["epochs"]
        return {**s, "budget": t, "epochs": epochs}

    def rows(self, curve, seconds, machine, budgets):
        """The result rows: one, or for finetune one for each budget within the longest run."""
        c, pruning = self.checkpoint, self.checkpoint["pruning"]
        sparsity = pruning["sparsity"]
        for t in budgets:
            settings = self.part(t)
            part = curve[:settings["epochs"]]
            yield {
                "run": run_id(settings),
                "dataset": c["recipe"]["dataset"], "arch": c["arch"], "method": pruning["method"],
                "structure": pruning["structure"], "plan": pruning["plan"],
                "scope": pruning["scope"],
                "sparsity": sparsity[0] if len(sparsity) == 1 else sparsity or None,
                "pruning_seed": pruning["seed"], "include_linear": pruning["include_linear"],
                "calibration_images": pruning["calibration_images"], **settings,
                "test_accuracy": part[-1]["test_accuracy"],
                "dense_test_accuracy": c["dense_test_accuracy"],
                "pruned_test_accuracy": c["test_accuracy"],
                "params": c["params"], "macs": c["macs"],
                "nonzero": sum((v != 0).sum().item() for n, v in c["model"].items()
                               if n.endswith((".weight", ".bias"))),
                "dense_params": c["dense_params"], "dense_macs": c["dense_macs"], "curve": part,
                "seconds": round(seconds * len(part) / len(curve), 1),
                "device": train.device_name(machine), "torch": str(torch.__version__),
                "recipe": c["recipe"], "distance": c["distance"], "removed": c["removed"],
                "checkpoint": self.name + ".pt" if len(part) == len(curve) else None}

    def __call__(self, args, machine, data, budgets):
        """Train (or go on), write the retrained network, then the rows."""
        c, s = self.checkpoint, self.settings
        network, momentum, masks = start(s["schedule"], self.asked, c, self.folder, s["seed"])
        steps = math.ceil(len(data.train[1]) / s["batch_size"])
        say(f"{self.name}: {c['params']:,} parameters, {c['macs']:,} MACs, {s['epochs']} epochs")
        curve, seconds = train.fit(network, data, self.schedule(steps), s, machine, self.state,
                                   resume=args.resume, save_every=args.save_every, masks=masks,
                                   momentum=momentum)
        if machine.rank == 0:
            rows = list(self.rows(curve, seconds, machine, budgets))
            models.save(self.target, {**c, "kind": "retrained", "model": dict(network.state_dict()),
                                      "test_accuracy": curve[-1]["test_accuracy"], "run": self.id})
            append(os.path.join(self.folder, "results.jsonl"), rows)
            if os.path.exists(self.state):
                os.remove(self.state)


# ---- results.jsonl, shared by processes ----------------------------------------------------------

_locks = {}
MAYBE = (*models.REAL, type(None))
ROW = {"run": str, "dataset": str, "arch": str, "method": str, "structure": str, "scope": str,
       "plan": (str, type(None)), "sparsity": (float, list, type(None)), "include_linear": bool,
       "dense": str, "round": int, "schedule": set(EVERY), "budget": int, "epochs": int,
       "seed": int, "lr": MAYBE, "end_lr": MAYBE, "cycle_momentum": (bool, type(None)),
       "dry_run": bool,
       "test_accuracy": models.REAL, "dense_test_accuracy": models.REAL, "params": int, "macs": int,
       "nonzero": int, "dense_params": int, "dense_macs": int, "curve": [models.POINT],
       "seconds": models.REAL, "device": str, "torch": str, "recipe": models.RECIPE,
       "distance": models.REAL, "removed": models.REAL}


def lock(folder, name, wait):
    """Take (True) or fail to take (False) the lock `name` of a run folder; it ends with the process
    or with `unlock`. POSIX record locks on one hidden file: nothing is left behind by a killed
    process."""
    if folder not in _locks:
        _locks[folder] = open(os.path.join(folder, ".lock"), "a+b")
    at = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big")
    try:
        fcntl.lockf(_locks[folder], fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB), 1, at)
        return True
    except BlockingIOError:
        return False


def unlock(folder, name):
    at = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big")
    fcntl.lockf(_locks[folder], fcntl.LOCK_UN, 1, at)


def read_rows(path):
    """The rows of a results.jsonl (none if there is no such file)."""
    if not os.path.exists(path):
        return []
    rows = []
    with open(path, "rb") as file:
        for i, line in enumerate(file, 1):
            try:
                rows.append(json.loads(line))
            except (ValueError, RecursionError):
                rows.append(None)
            if not models.fits(rows[-1], ROW):
                raise Refused(f"{path}: line {i} is not a result row; remove it")
    return rows


@contextlib.contextmanager
def results(folder):
    """The path of a run folder's results.jsonl, which no other process changes meanwhile."""
    lock(folder, "results", wait=True)
    try:
        yield os.path.join(folder, "results.jsonl")
    finally:
        unlock(folder, "results")


def append(path, rows):
    """Add the rows that are not there yet, whole lines or nothing, while other processes do the
    same."""
    with results(os.path.dirname(path)):
        there = {row["run"] for row in read_rows(path)}
        lines = "".join(json.dumps(row) + "\n" for row in rows if row["run"] not in there).encode()
        with open(path, "a+b", buffering=0) as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - 1))
            if file.read(1) not in (b"", b"\n"):        # an edited file may lack its last line end
                lines = b"\n" + lines
            try:
                if file.write(lines) != len(lines):
                    raise OSError(f"{path}: the disk is full")
                os.fsync(file.fileno())
            except OSError:
                file.truncate(size)
                raise


# ---- the table and the report --------------------------------------------------------------------

def amount(row):
    """What was pruned, without the method: rows that agree in it can be compared."""
    share = f"plan {row['plan']}" if row["plan"] else (
        "/".join(f"{p:.0%}" for p in row["sparsity"]) if isinstance(row["sparsity"], list)
        else f"{row['sparsity']:.3g}")
    usual = "layer" if row["structure"] == "filters" else "global"
    return (f"{row['structure']} {share}" + f" {row['scope']}" * (row["scope"] != usual)
            + " +linear" * row["include_linear"] + f" round {row['round']}" * (row["round"] > 1))


def arm(row):
    """The column of a row: its schedule, with what is not as published."""
    return (row["schedule"] + (f" lr={row['lr']:g}" if row["lr"] is not None else "")
            + (f" end={row['end_lr']:g}" if row["end_lr"] is not None else "")
            + (" flat-momentum" if row["cycle_momentum"] is False else ""))


def group(rows, key):
    """{key(row): rows}, in order of first appearance."""
    found = {}
    for row in rows:
        found.setdefault(key(row), []).append(row)
    return found


def spread(values):
    """`mean ± sd (n)` of some accuracies."""
    sd = f" ± {np.std(values, ddof=1):.2f}" if len(values) > 1 else ""
    return f"{np.mean(values):.2f}{sd} (n={len(values)})"


def in_order(arms):
    """Arms in the order of SPEC'd schedule names, variants behind their schedule."""
    return sorted(arms, key=lambda a: (EVERY.index(a.split()[0]), a))


def table(rows):
    """Markdown: a line for each pruned network and budget, a column for each schedule."""
    def setting(r):
        return amount(r), r["method"], r["budget"]
    lines = []
    for (dataset, arch), part in group(rows, lambda r: (r["dataset"], r["arch"])).items():
        arms = in_order({arm(r) for r in part})
        dense = spread(list({r["dense"]: r["dense_test_accuracy"] for r in part}.values()))
        lines += [f"**{arch} on {dataset}**, dense {dense}; last-epoch test accuracy in %, "
                  "mean ± sd (n), below it the difference to the dense network in pp and the "
                  "seconds of a run.", "",
                  "| pruned | method | params / MACs left | t | " + " | ".join(arms) + " |",
                  "|---" * (4 + len(arms)) + "|"]
        for (what, method, t), same in group(sorted(part, key=setting), setting).items():
            left = same[0]["nonzero"] if same[0]["structure"] == "weights" else same[0]["params"]
            cells = []
            for name in arms:
                mine = [r for r in same if arm(r) == name]
                gains = [r["test_accuracy"] - r["dense_test_accuracy"] for r in mine]
                cells.append(f"{spread([r['test_accuracy'] for r in mine])}<br>"
                             f"{np.mean(gains):+.2f}, "
                             f"{np.mean([r['seconds'] for r in mine]):.0f} s" if mine else "–")
            lines.append(f"| {what} | {method} | {left / same[0]['dense_params']:.0%} / "
                         f"{same[0]['macs'] / same[0]['dense_macs']:.0%} | {t} | "
                         + " | ".join(cells) + " |")
        lines.append("")
    return "\n".join(lines)


def t_quantile(freedom):
    """The 97.5 % quantile of Student's t: with x = sqrt(f) tan(a) its density is cos(a)^(f-1)."""
    angle = np.linspace(-np.pi / 2, np.pi / 2, 200_001)
    density = np.cos(angle).clip(0) ** (freedom - 1)
    mass = np.concatenate([[0], np.cumsum((density[1:] + density[:-1]) / 2)])
    return math.sqrt(freedom) * math.tan(np.interp(0.975, mass / mass[-1], angle))


def interval(values):
    """(mean, half width of the 95 % confidence interval): the half width is inf for one value."""
    n = len(values)
    half = t_quantile(n - 1) * np.std(values, ddof=1) / math.sqrt(n) if n > 1 else math.inf
    return float(np.mean(values)), float(half)


SAME = 1        # pp: two arms are called equal if the whole interval is within this of 0


def verdict(values, sign=1):
    """Is the mean of `values` (paired differences, pp) above 0 (sign 1), below (-1), or equal (0)?
    """
    if not values:
        return "not decided, an arm is missing"
    mean, half = interval(values)
    if len(values) < 2:
        return f"not decided, n = 1 ({mean:+.2f})"
    text = f"{mean:+.2f} [{mean - half:+.2f}, {mean + half:+.2f}], n = {len(values)}"
    if sign == 0:
        return ("**no** " if abs(mean) > half else
                f"**yes, within {SAME:g}** " if abs(mean) + half <= SAME else "not decided ") + text
    if sign * mean > half:
        return "**yes** " + text
    return ("**no, reversed** " if -sign * mean > half else "not decided ") + text


def paired(rows, one, other):
    """Differences in accuracy between two arms (method, schedule), paired over (dense run, seed).
    """
    def accuracies(choice):
        method, schedule = choice
        return {(r["dense"], r["pruning_seed"], r["seed"]): r["test_accuracy"] for r in rows
                if r["method"] == method and arm(r) == schedule}
    a, b = accuracies(one), accuracies(other)
    return [a[k] - b[k] for k in a if k in b]


def claims(rows):
    """The paper's claims (C1-C8) against the rows: markdown with a verdict each, differences in pp.

    Where several budgets were run, at the longest one that has the arms."""
    lines = ["| claim | network | verdict: difference in pp [95 % interval] |", "|---|---|---|"]
    signs = []
    for (dataset, arch, what), part in group(
            rows, lambda r: (r["dataset"], r["arch"], amount(r))).items():
        methods = sorted({r["method"] for r in part}, key=lambda m: (m == "random", m))
        criteria = [m for m in methods if m != "random"]
        found = [claim for m in methods for claim in claims_of_method(part, m)]
        if "random" in methods:
            found += [claim for m in criteria for claim in claims_against_random(part, m)]
        signs += [np.mean(d) > 0 for text, t, d, _ in found if text.startswith("C2 CLR > FT") and d]
        lines += [f"| {text} | {arch} {what}, t={t} | {verdict(differences, sign)} |"
                  for text, t, differences, sign in found]
    if signs:
        lines.append(f"| C8 CLR − FT > 0 everywhere | all | {sum(signs)} of {len(signs)} settings "
                     "have a positive mean |")
    return "\n".join(lines) + "\n"


def longest(part, differences):
    """(t, differences(rows)) at the longest budget where there are any."""
    budgets = sorted(group(part, lambda r: r["budget"]).items(), reverse=True)
    found = [(t, differences(same)) for t, same in budgets]
    return next(((t, d) for t, d in found if d), (budgets[0][0], []))


def claims_of_method(part, m):
    """(claim, t, differences, sign for `verdict`) of the claims C1-C5 for one way of pruning."""
    mine = [r for r in part if r["method"] == m]
    arms = group(mine, arm)

    def compare(text, one, other, sign=1):
        return text, *longest(part, lambda same: paired(same, (m, one), (m, other))), sign
    yield compare(f"C1 LRW > FT ({m})", "lr_rewind", "finetune")
    yield compare(f"C1 SLR > FT ({m})", "slr", "finetune")
    yield compare(f"C1 SLR ≈ LRW ({m})", "slr", "lr_rewind", 0)
    yield compare(f"C2 CLR > FT ({m})", "one_cycle", "finetune")
    for rival in ("lr_rewind", "weight_rewind", "slr"):
        yield compare(f"C2 CLR > {rival} ({m})", "one_cycle", rival)
    for name in in_order(a for a in arms if a.startswith("one_cycle ")):
        for rival in ("one_cycle", "slr", "finetune"):          # what does the gain come from?
            yield compare(f"control: {name} > {rival} ({m})", name, rival)
    budgets = {t: {(r["dense"], r["pruning_seed"], r["seed"]): r["test_accuracy"] for r in same}
               for t, same in sorted(group(arms.get("finetune", []),
                                           lambda r: r["budget"]).items())}
    if len(budgets) > 1:
        (low, short), *_, (high, long) = budgets.items()
        yield (f"C3 FT does not gain from t={low} ({m})", high,
               [long[k] - short[k] for k in long if k in short], 0)
    for name, relation, sign in (("one_cycle", "≥", 1), ("finetune", "<", -1)):
        t, gains = longest(arms.get(name, part), lambda same: [
            r["test_accuracy"] - r["dense_test_accuracy"] for r in same if arm(r) == name
            and r["method"] == m])
        yield f"C4 {name} {relation} dense ({m})", t, gains, sign
    for t, same in group(mine, lambda r: r["budget"]).items():
        recipe = same[0]["recipe"]
        if recipe["milestones"] and t <= recipe["epochs"] - recipe["milestones"][-1]:
            yield (f"C5 LRW ≡ FT ({m})", t, paired(same, (m, "lr_rewind"), (m, "finetune")), 0)


def claims_against_random(part, m):
    """The same of C6 and C7: method `m` against random pruning."""
    yield (f"C6 random + CLR > {m} + FT", *longest(part, lambda same: paired(
        same, ("random", "one_cycle"), (m, "finetune"))), 1)
    yield (f"C7 {m} > random under CLR", *longest(part, lambda same: paired(
        same, (m, "one_cycle"), ("random", "one_cycle"))), 1)

    def shrinking(same):
        gaps = [paired(same, (m, s), ("random", s)) for s in ("finetune", "one_cycle")]
        return [f - c for f, c in zip(*gaps)] if len(gaps[0]) == len(gaps[1]) else []
    yield f"C7 the gap shrinks from FT to CLR ({m})", *longest(part, shrinking), 1


COLOURS = {"blue": "#1f77b4", "red": "#d62728", "green": "#2ca02c", "orange": "#ff7f0e",
           "purple": "#9467bd", "brown": "#8c564b", "pink": "#e377c2", "grey": "#7f7f7f",
           "olive": "#bcbd22", "cyan": "#17becf"}


def chart(title, x_title, xs, y_title, series):
    """A Mermaid xychart of {name: values}, with its legend as text (Mermaid draws none). xs: a
    label for each value, or a range as text, over which the values are spread evenly."""
    series = {k: v for k, v in list(series.items())[:len(COLOURS)]}
    values = [y for line in series.values() for y in line]
    low, high = min(values), max(values)
    margin = (high - low or abs(high) or 1) * 0.05
    low = 0 if low >= 0 and low - margin < 0 else low - margin
    legend = ", ".join(f"{colour} {name}" for colour, name in zip(COLOURS, series))
    palette = ", ".join(list(COLOURS.values())[:len(series)])

    def text(y):                # Mermaid reads no 1e-05
        return f"{y:.6f}".rstrip("0").rstrip(".")
    axis = xs if isinstance(xs, str) else "[" + ", ".join(f'"{x}"' for x in xs) + "]"
    return "\n".join([f"{title}: {legend}.", "", "```mermaid",
                      '%%{init: {"themeVariables": {"xyChart": {"plotColorPalette": "'
                      + palette + '"}}}}%%',
                      "xychart-beta", f'    x-axis "{x_title}" {axis}',
                      f'    y-axis "{y_title}" {text(low)} --> {text(high + margin)}',
                      *(f"    line [{', '.join(map(text, line))}]"
                        for line in series.values()),
                      "```", ""])


def charts(rows):
    """The pictures of a report: learning rates, accuracy by epoch, by budget and by sparsity."""
    parts = []
    for (dataset, arch, recipe), mine in group(rows, lambda r: (
            r["dataset"], r["arch"], json.dumps(r["recipe"], sort_keys=True))).items():
        # At the budget with the most arms; without scratch, whose low start flattens the others,
        # and without variants of a schedule that was run as published too.
        published = {r["schedule"] for r in mine if arm(r) == r["schedule"]}
        mine = [r for r in mine if not r["schedule"].startswith("scratch")
                and (arm(r) == r["schedule"] or r["schedule"] not in published)]
        arms = {t: group(same, arm) for t, same in group(mine, lambda r: r["budget"]).items()}
        if not arms:
            continue
        t, found = max(arms.items(), key=lambda item: (len(item[1]), item[0]))
        points, steps = 40, 100                       # of the curve, and steps an epoch: enough
        curves = {}
        for name in in_order(found):
            r = found[name][0]
            at = schedules.retrain(r["schedule"], t, steps, json.loads(recipe), r["lr"],
                                   r["end_lr"], r["cycle_momentum"] is not False,
                                   r["distance"], r["removed"])
            curves[name] = [at(i * (t * steps - 1) // (points - 1))[0] for i in range(points)]
        parts.append(chart(f"Learning rate, {arch} on {dataset}, t = {t}", "epoch", f"0 --> {t}",
                           "learning rate", curves))
        for (what, method), same in group([r for r in mine if r["budget"] == t],
                                          lambda r: (amount(r), r["method"])).items():
            found = group(same, arm)
            if t > 1:
                parts.append(chart(
                    f"Test accuracy after each epoch, {arch} on {dataset}, {what}, {method}, "
                    f"t = {t}", "epoch", range(1, t + 1), "test accuracy (%)",
                    {name: np.mean([[p["test_accuracy"] for p in r["curve"]]
                                    for r in found[name]], 0)
                     for name in in_order(found)}))
        for (what, method), same in group(mine, lambda r: (amount(r), r["method"])).items():
            parts += means_chart(same, "budget",
                                 f"by budget, {arch} on {dataset}, {what}, {method}", "epochs")
        plain = [r for r in mine if isinstance(r["sparsity"], float) and r["budget"] == t]
        for (structure, method), same in group(
                plain, lambda r: (r["structure"], r["method"])).items():
            parts += means_chart(same, "sparsity",
                                 f"by sparsity, {arch} on {dataset}, {structure}, {method}, "
                                 f"t = {t}", "sparsity")
    return "\n".join(parts)


def means_chart(rows, key, title, x_title):
    """A chart of mean accuracy against row[key], as a list: of the values at which most points can
    be drawn, since a line cannot have gaps; empty if no arm has two values."""
    arms = group(rows, arm)
    values = {name: {r[key] for r in same} for name, same in arms.items()}
    xs = sorted(max((v for v in values.values() if len(v) > 1), default=(),
                    key=lambda xs: len(xs) * sum(xs <= v for v in values.values())))
    means = {name: [np.mean([r["test_accuracy"] for r in arms[name] if r[key] == x]) for x in xs]
             for name in in_order(arms) if values[name].issuperset(xs)}
    return [chart("Test accuracy " + title, x_title, xs, "test accuracy (%)", means)] if xs else []


def report(rows):
    """The whole report as markdown, from rows alone."""
    first = rows[0]
    seconds = sum(r["seconds"] for r in rows)
    return "\n".join([
        "# Report", "", f"{len(rows)} retrainings, {seconds / 60:.0f} minutes; "
        f"{', '.join(sorted({r['device'] for r in rows}))}; torch {first['torch']}.", "",
        table(rows), "## Claims", "", "Paired over seeds; the interval is Student's t at 95 %, "
        "each claim by itself: of twenty undecided ones, one will look decided by chance.", "",
        claims(rows), "## Pictures", "",
        "The dip while the learning rate is large is normal: compare the ends.", "", charts(rows)])


# ---- the command ---------------------------------------------------------------------------------

def pruned_files(args):
    """The checkpoints to retrain: those named, or all pruned ones of the default run."""
    if args.checkpoint:
        return {p: models.read(p, "pruned") for p in args.checkpoint}
    folder = os.path.join("runs", "shapes-resnet8-s0")
    found = {p: models.read(p) for pattern in ("filters-*.pt", "weights-*.pt")
             for p in sorted(glob.glob(os.path.join(folder, pattern)))
             if not p.endswith(".state.pt")}
    found = {p: c for p, c in found.items() if c["kind"] == "pruned"}
    if not found:
        raise Refused(f"{folder}: no pruned checkpoint is there; run prune.py first, or name one")
    return found


def agree(value, machine):
    """What the first process says, in all of them."""
    if machine.world > 1:
        box = [value]
        torch.distributed.broadcast_object_list(box, 0)
        return box[0]
    return value


def retrain_chain(run, args, machine, data, budgets):
    """A run and, with --rounds, the rounds that follow from it: prune again, retrain again."""
    for left in reversed(range(args.rounds)):
        with results(run.folder) as path:
            rows = read_rows(path)
        wanted = {run_id(run.part(t)) for t in budgets}
        done = [r for r in rows if r["run"] in wanted]
        if agree(len(done) == len(wanted), machine):
            say(f"{run.name}: done already, test {done[-1]['test_accuracy']:.2f} %")
        elif agree(os.path.exists(run.state) and not args.resume, machine):
            raise Refused(f"{run.state}: an interrupted run is here; --resume goes on with it")
        else:
            run(args, machine, data, budgets)
            agree(None, machine)
        if left:
            path, pruned = prune_again(run, args, machine, data)
            run = Run(path, pruned, run.settings["schedule"], run.asked,
                      run.settings["seed"], args, machine)


def retrain_all(todo, args, machine):
    """Run each (run, budgets) of `todo`; what another process is at is looked at again at the end.
    """
    cache = {}
    for wait in (False, True):
        for item in list(todo):
            run, budgets = item
            c = run.checkpoint
            key = json.dumps([c["recipe"], c["data_dir"]])
            if key not in cache:
                cache = {key: train.load_data(c["recipe"], args.data_dir or c["data_dir"],
                                              machine.device,
                                              args.dry_run or c["recipe"]["dry_run"], c)}
            if not agree(machine.rank or lock(run.folder, run.id, wait), machine):
                continue
            retrain_chain(run, args, machine, cache[key], budgets)
            todo.remove(item)
            if not machine.rank:
                unlock(run.folder, run.id)


def prune_again(run, args, machine, data):
    """The retrained network of a round, pruned once more as before (weights: the same share of what
    is left, so .3 becomes .51, .66 …). Returns (path, checkpoint); the path only gives the name."""
    done = models.read(run.target, "retrained")
    how, following = dict(done["pruning"]), run.settings["round"] + 1
    if how["structure"] == "weights":
        how["per_round"] = how.get("per_round", how["sparsity"][0])
        how["sparsity"] = [1 - (1 - how["per_round"]) ** following]
    calibration = None
    if how["method"] in prune.NEED_DATA:
        calibration = train.calibration(data, min(how["calibration_images"], len(data.train[1])),
                                        how["seed"], machine)
    pruned = {**prune.prune(done, how, calibration, run.target), "round": following}
    network = models.restore(pruned).to(machine.device)
    pruned["test_accuracy"] = train.evaluate(network, data, machine)
    return f"{run.path[:-3].split('--r')[0]}--r{following}.pt", pruned


def write_report(folders, dry=False):
    """Print the table of the rows in `folders` and write the report: into the folder, or, of
    several, into the folder they share."""
    rows = []
    for folder in (f for f in folders if os.path.exists(os.path.join(f, "results.jsonl"))):
        with results(folder) as path:
            rows += [row for row in read_rows(path) if row["dry_run"] == dry]
    if not rows:
        raise Refused("argument --report: no results.jsonl with finished runs in "
                      f"{' '.join(folders)}")
    shared = os.path.commonpath([os.path.abspath(f) for f in folders])
    path = os.path.join(folders[0] if len(folders) == 1 else shared, "report.md")
    models.write(path, report(rows).encode())
    say("\n" + table(rows).replace("<br>", " ") + f"\nWrote {path}: this table, the paper's claims "
        "against it, and pictures. Next: read it; python prune.py RETRAINED.pt prunes further.")


def refuse_useless(args):
    """A flag that none of the chosen schedules uses would be silently ignored: refuse it."""
    for flag, given, takers in (("--lr", args.lr is not None, schedules.TAKE_LR),
                                ("--end-lr", args.end_lr is not None, schedules.TAKE_END_LR),
                                ("--no-cycle-momentum", not args.cycle_momentum, ("one_cycle",))):
        if given and not set(takers) & set(args.schedule):
            raise Refused(f"argument {flag}: {' '.join(args.schedule)} would ignore it; it is for "
                          f"{', '.join(takers)}")


def main(argv=None):
    flags = schedules.parser(__doc__)
    flags.add_argument("checkpoint", nargs="*", type=schedules.path,
                       help="pruned checkpoints (default: all of the default run)")
    flags.add_argument("--schedule", nargs="+", choices=EVERY, default=DEFAULT, metavar="NAME",
                       help=f"{' '.join(EVERY)}; scratch_e trains T + t epochs, scratch_b as many "
                            "MACs as the dense run")
    flags.add_argument("--epochs", nargs="+", type=number(int, 1, 1e6), metavar="t",
                       help="budgets (default: the data set's, 40 for CIFAR)")
    flags.add_argument("--seed", nargs="+", type=number(int, 0), default=[0], metavar="S")
    flags.add_argument("--lr", type=number(float, 1e-9),
                       help="instead of LR_max: " + ", ".join(schedules.TAKE_LR))
    flags.add_argument("--end-lr", type=number(float, 0),
                       help="the last learning rate: " + ", ".join(schedules.TAKE_END_LR))
    flags.add_argument("--cycle-momentum", action=argparse.BooleanOptionalAction, default=True,
                       help="one_cycle: cycle the momentum as published")
    flags.add_argument("--rounds", type=number(int, 1), default=1, metavar="K",
                       help="retrain and prune K times, each round from the last one's weights")
    flags.add_argument("--report", nargs="+", type=schedules.path, metavar="DIR",
                       help="only make DIR/report.md again")
    train.loop_flags(flags)
    train.machine_flags(flags)
    args = flags.parse_args(argv)
    if args.report:
        return write_report(args.report)
    refuse_useless(args)
    machine = train.the_machine(args)
    todo = []
    for path, checkpoint in pruned_files(args).items():
        usual = train.RECIPES[checkpoint["recipe"]["dataset"]]["retrain"]
        budgets = sorted(set(args.epochs or [usual]))
        for seed, schedule in itertools.product(dict.fromkeys(args.seed),
                                                dict.fromkeys(args.schedule)):
            # The longest run at a constant learning rate contains the shorter ones.
            whole = schedule == "finetune" and args.rounds == 1 and not args.dry_run
            for t in budgets[-1:] if whole else budgets:
                run = Run(path, checkpoint, schedule, t, seed, args, machine)
                todo.append((run, budgets if whole else [run.epochs]))
    folders = list(dict.fromkeys(run.folder for run, _ in todo))
    dry = todo[0][0].settings["dry_run"]
    retrain_all(todo, args, machine)
    if not machine.rank:
        write_report(folders, dry)


if __name__ == "__main__":
    schedules.command(main)
