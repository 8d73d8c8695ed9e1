#!/usr/bin/env python3
"""Prune a trained network: rank its filters or weights, take the lowest away.

    python prune.py                                              # half the filters, L1 and random
    python prune.py runs/cifar10-resnet56-s0/dense.pt --plan B   # the paper's PFEC-B
    python prune.py DENSE.pt --structure weights --sparsity 0.9 --method magnitude taylor obd

Filters are removed physically: the network becomes smaller and computes what the masked original
computes. Weights are set to 0 and stay 0 in retraining. A pruned or retrained checkpoint can be
pruned again; weight sparsity counts what is already zero. Every criterion is a score (`saliency`);
what is kept follows from the scores in one place (`keep_filters`, `weight_masks`).
"""
import math
import os

import numpy as np
import torch
import torch.nn.functional as F

import models
import schedules
import train
from schedules import Refused, number
from train import say

METHODS = ("magnitude", "random", "taylor", "obd", "hrank")
NEED_DATA = ("taylor", "obd", "hrank")

# The paper's plans (Li 2017; Le & Hua 2021, appendix): share of filters removed in each stage and
# the conv ids that are left alone (the stem is 1). VGG-16: the width of each of the 13 convs.
_56, _110, _34 = (16, 18, 20, 34, 38, 54), (36, 38, 74), (2, 8, 14, 16, 26, 28, 30, 32)
PLANS = {
    "resnet56": {"A": ((.1, .1, .1), (16, 20, 38, 54)), "B": ((.6, .3, .1), _56),
                 "C": ((.6, .5, .4), _56), "D": ((.6, .6, .6), _56), "I": ((.1, .15, .2), ())},
    "resnet110": {"A": ((.5, 0, 0), (36,)), "B": ((.5, .4, .3), _110), "C": ((.5, .5, .5), _110),
                  "D": ((.5, .6, .7), _110)},
    "resnet34": {"A": ((.3, .3, .3, 0), _34), "B": ((.5, .6, .4, 0), _34)},
    "vgg16": {"A": (32, 64, 128, 128, 256, 256, 256, 256, 256, 256, 256, 256, 256),
              "B": (32, 64, 128, 128, 196, 196, 196, 196, 196, 256, 256, 256, 256),
              "C": (32, 64, 64, 128, 128, 128, 128, 196, 196, 196, 196, 196, 196)},
}


# ---- criteria ------------------------------------------------------------------------------------

def per_filter(values):
    """(filters, …) -> (filters,): the sum over each filter."""
    return values.flatten(1).sum(1)


def gradient_scores(network, names, term, x, y, batch):
    """Mean over mini-batches of term(weight * gradient of the mini-batch's mean loss)."""
    weights = {n: p for n, p in network.named_parameters() if n in names}
    totals = dict.fromkeys(names, 0.0)
    parts = list(zip(x.split(batch), y.split(batch)))
    for images, labels in parts:
        loss = F.cross_entropy(network(images), labels)
        for name, gradient in zip(weights, torch.autograd.grad(loss, list(weights.values()))):
            totals[name] = totals[name] + term((weights[name] * gradient).detach()) / len(parts)
    return totals


def rank_scores(network, units, x):
    """HRank (Lin 2020): mean over images of the rank of each feature map, after BN and ReLU."""
    totals, hooks = {u.conv + ".weight": 0.0 for u in units}, []
    for unit in units:
        def note(_, __, output, name=unit.conv + ".weight"):
            totals[name] = totals[name] + torch.linalg.matrix_rank(F.relu(output)).sum(0) / len(x)
        hooks.append(network.get_submodule(unit.bn).register_forward_hook(note))
    with torch.no_grad():
        for images in x.split(64):
            network(images)
    for hook in hooks:
        hook.remove()
    return totals


def saliency(network, method, structure, names, seed=0, calibration=None):
    """The importance of every filter, or weight, of the tensors `names`: {name: scores}.

    Filters: scores (filters,); weights: scores shaped like the weight. Larger stays.
      magnitude  L1 norm of the filter (PFEC, Li 2017); |w| (Han 2015)
      random     uniform, a function of `seed`
      taylor     (sum over the filter of g*w)^2, or (g*w)^2, mean over mini-batches of 64
                 (Molchanov 2019)
      obd        h*w^2/2, h the empirical Fisher diagonal: the mean of g^2 over single images
                 (LeCun 1990)
      hrank      filters only: see `rank_scores`
    calibration: (images, labels) for the methods in NEED_DATA, as the network takes them."""
    reduce = per_filter if structure == "filters" else torch.clone
    if method == "magnitude":
        return {n: reduce(network.get_parameter(n).detach().abs()) for n in names}
    if method == "random":
        draw = np.random.default_rng((7, seed))
        return {n: torch.from_numpy(draw.random(reduce(network.get_parameter(n).detach()).shape))
                for n in names}
    if method == "taylor":
        return gradient_scores(network, names, lambda gw: reduce(gw) ** 2, *calibration, batch=64)
    if method == "obd":
        return gradient_scores(network, names, lambda gw: reduce(gw ** 2 / 2), *calibration,
                               batch=1)
    ranked = [u for u in models.prunable(network) if u.conv + ".weight" in names]
    return rank_scores(network, ranked, calibration[0])


# ---- what to keep --------------------------------------------------------------------------------

def filters_to_keep(network, arch, sparsity, plan):
    """How many filters each prunable conv keeps: {conv: int(C * (1 - p))}, at least 1.

    sparsity: one share or one for each stage; or the name of one of the paper's plans for `arch`.
    """
    units = models.prunable(network)
    width = {u.conv: network.get_submodule(u.conv).out_channels for u in units}
    if plan and plan not in PLANS.get(arch, {}):
        known = (f"known: {' '.join(PLANS[arch])}" if arch in PLANS
                 else f"plans exist for {', '.join(PLANS)}")
        raise Refused(f"argument --plan: no plan {plan} for {arch}; {known}")
    if plan and arch == "vgg16":
        return {u.conv: min(w, width[u.conv]) for u, w in zip(units, PLANS[arch][plan])}
    shares, skipped = PLANS[arch][plan] if plan else (sparsity, ())
    stages = units[-1].stage
    if len(shares) not in (1, stages):
        raise Refused(f"argument --sparsity: {len(shares)} values, but {arch} has {stages} stages; "
                      f"give 1 or {stages}")
    shares = list(shares) * (stages if len(shares) == 1 else 1)
    # 1e-9: 10 * (1 - 0.9) is 0.99…98 in floating point and means 1.
    return {u.conv: width[u.conv] if u.number in skipped else
            max(1, int(width[u.conv] * (1 - shares[u.stage - 1]) + 1e-9)) for u in units}


def keep_filters(scores, counts, scope="layer"):
    """The filters that stay: {conv: int64 indices, ascending}, by scores {conv: (filters,)}.

    layer: the counts[conv] best of each conv. global: as many in all, the best of the network after
    each layer's scores are divided by their L2 norm (Molchanov 2017); the best of each layer stays.
    """
    if scope == "global":
        scores = {c: s.double() / s.double().norm().clamp(min=1e-300) for c, s in scores.items()}
        spare = {c: s.argmax() for c, s in scores.items()}
        for c, best in spare.items():
            scores[c][best] = math.inf
        every = torch.cat(list(scores.values()))
        chosen = torch.zeros(len(every), dtype=torch.bool)
        chosen[every.argsort(descending=True, stable=True)[:sum(counts.values())]] = True
        parts = chosen.split([len(s) for s in scores.values()])
        return {c: part.nonzero()[:, 0] for c, part in zip(scores, parts)}
    return {c: s.argsort(descending=True, stable=True)[:counts[c]].sort().values
            for c, s in scores.items()}


def weight_masks(weights, scores, sparsity, scope="global"):
    """Which weights stay: {name: bool mask}; round(sparsity * n) of the n weights do not, counting
    those already zero, which go first. global: one ranking of all (Han 2015); layer: each by
    itself."""
    def mask(names):
        flat = torch.cat([torch.where(weights[n] == 0, -1.0, scores[n].double()).flatten()
                          for n in names])
        stay = torch.ones(len(flat), dtype=torch.bool)
        stay[flat.argsort(stable=True)[:round(sparsity * len(flat))]] = False
        parts = stay.split([weights[n].numel() for n in names])
        return {n: part.view(weights[n].shape) for n, part in zip(names, parts)}
    if scope == "global":
        return mask(list(weights))
    return {n: m for name in weights for n, m in mask([name]).items()}


# ---- pruning a checkpoint ------------------------------------------------------------------------

def prune(checkpoint, how, calibration=None, path="checkpoint"):
    """A pruned copy of a checkpoint dict (dense, pruned or retrained).

    how: dict with method, structure, sparsity (list), plan, scope, seed, include_linear,
    calibration_images. Records in the copy how it was made, which of the dense network's filters
    are left (`kept`), and what the adaptive linear schedule needs: `removed`, the share of the conv
    weights this call took away, and `distance`, how far it moved them (see
    schedules.adaptive_peak)."""
    network = models.restore(checkpoint, path)
    if calibration:
        network.to(calibration[0].device)
    weights = {n: network.get_parameter(n).detach().cpu()
               for n in models.weight_names(network, how["include_linear"])}
    units = models.prunable(network)
    if how["structure"] == "filters":
        zero = any((w == 0).any() for w in weights.values())
        if zero:
            raise Refused(f"{path}: its weights are pruned; --structure filters cannot go on from "
                          "there")
        names = [u.conv + ".weight" for u in units]
    else:
        if checkpoint.get("kept"):
            raise Refused(f"{path}: its filters are pruned; --structure weights cannot go on from "
                          "there")
        names = list(weights)
    scores = {n: s.cpu() for n, s in saliency(network, how["method"], how["structure"], names,
                                              how["seed"], calibration).items()}
    state, kept = checkpoint["model"], dict(checkpoint.get("kept", {}))
    if how["structure"] == "filters":
        counts = filters_to_keep(network, checkpoint["arch"], how["sparsity"], how["plan"])
        keep = keep_filters({u.conv: scores[u.conv + ".weight"] for u in units}, counts,
                            how["scope"])
        state = models.shrink(state, units, keep)
        kept = {c: kept[c][k] if c in kept else k for c, k in keep.items()}
    else:
        already = sum((w == 0).sum().item() for w in weights.values())
        total = sum(w.numel() for w in weights.values())
        if already > round(how["sparsity"][0] * total):
            raise Refused(f"argument --sparsity: {how['sparsity'][0]} of the weights, but "
                          f"{already / total:.4f} are zero already; sparsity is cumulative")
        masks = weight_masks(weights, scores, how["sparsity"][0], how["scope"])
        state = {n: v * masks[n] if n in masks else v for n, v in state.items()}
    before, after = (torch.cat([s[n].flatten().double() for n in weights])
                     for s in (checkpoint["model"], state))
    params, macs = models.count(models.from_state(checkpoint["arch"], checkpoint["classes"], state),
                                checkpoint["side"])
    return {**checkpoint, "kind": "pruned", "model": state, "kept": kept, "pruning": how,
            "params": params, "macs": macs,
            "removed": 1 - ((after != 0).sum() / (before != 0).sum()).item(),
            "distance": ((before.square().sum() - after.square().sum()).abs().sqrt()
                         / before.norm()).item(),
            "dense_id": checkpoint.get("dense_id") or models.digest(checkpoint["model"])}


def label(how):
    """The name of a way of pruning, for files and tables."""
    amount = f"plan{how['plan']}" if how["plan"] else "_".join(f"{p:g}" for p in how["sparsity"])
    usual = "layer" if how["structure"] == "filters" else "global"
    extras = [how["scope"]] * (how["scope"] != usual) + ["linear"] * how["include_linear"]
    extras += [f"s{how['seed']}"] * (how["seed"] != 0) + ["dry"] * how["dry_run"]
    return "-".join([how["structure"], how["method"], amount, *extras])


def counts_by_layer(before, after):
    """What pruning did to each layer, as `name 16->8` (filters) or `name 12 %` (weights left)."""
    lines = []
    network = models.from_state(before["arch"], before["classes"], before["model"])
    for name in models.weight_names(network, include_linear=True):
        old, new = before["model"][name], after["model"][name]
        left = (new != 0).sum().item() / new.numel()
        if old.shape[0] != new.shape[0]:
            lines.append(f"{name[:-7]} {old.shape[0]}->{new.shape[0]}")
        elif left < 1:
            lines.append(f"{name[:-7]} {100 * left:.1f} %")
    return ", ".join(lines)


def run(args):
    structure = args.structure
    how = {"structure": structure, "sparsity": args.sparsity or ([] if args.plan else [0.5]),
           "plan": args.plan, "seed": args.seed, "include_linear": args.include_linear,
           "scope": args.scope or ("layer" if structure == "filters" else "global"),
           "calibration_images": args.calibration_images}
    if args.plan and args.sparsity:
        raise Refused("argument --plan: says how much to prune; leave out --sparsity")
    if structure == "weights" and args.plan:
        raise Refused("argument --plan: is for filters; give --sparsity with --structure weights")
    if structure == "weights" and len(how["sparsity"]) != 1:
        raise Refused("argument --sparsity: one value with --structure weights")
    if structure == "weights" and "hrank" in args.method:
        raise Refused("argument --method: hrank ranks filters, not weights")
    if structure == "filters" and args.include_linear:
        raise Refused("argument --include-linear: is for --structure weights")
    sources = args.checkpoint or [os.path.join("runs", "shapes-resnet8-s0", "dense.pt")]
    if args.out and len(sources) * len(args.method) > 1:
        raise Refused("argument --out: one file, but there are several checkpoints or methods")
    checkpoints = [models.read(s, "dense", "pruned", "retrained") for s in sources]
    machine = train.the_machine(args)
    made = {}           # written when all is done: what is refused half way leaves nothing behind
    for source, checkpoint in zip(sources, checkpoints):
        network = models.restore(checkpoint, source)
        data = train.load_data(checkpoint["recipe"], args.data_dir or checkpoint["data_dir"],
                               machine.device, args.dry_run, checkpoint,
                               training=any(m in NEED_DATA for m in args.method))
        say(f"{source}: test {train.evaluate(network.to(machine.device), data, machine):.2f} %, "
            f"{train.summary(network, data.side)}")
        for method in args.method:
            calibration = (train.calibration(data, args.calibration_images, args.seed, machine)
                           if method in NEED_DATA else None)
            way = {**how, "method": method,
                   "dry_run": args.dry_run and not checkpoint["recipe"]["dry_run"]}
            pruned = prune(checkpoint, way, calibration, source)
            network = models.restore(pruned, source).to(machine.device)
            pruned["test_accuracy"] = train.evaluate(network, data, machine)
            stem = "" if checkpoint["kind"] == "dense" else os.path.basename(source)[:-3] + "--"
            target = args.out or os.path.join(os.path.dirname(source), f"{stem}{label(way)}.pt")
            check_target(target, pruned)
            made[target] = pruned
            say(f"{label(way)}: test {pruned['test_accuracy']:.2f} %, "
                f"{train.summary(network, data.side)}\n  {counts_by_layer(checkpoint, pruned)}")
    for target, pruned in made.items():
        models.save(target, pruned)
    say(f"Wrote {' '.join(made)}. Next: python retrain.py {' '.join(made)}")


def check_target(target, pruned):
    """Refuse to overwrite anything but the same pruned network, or a dry run's."""
    if not os.path.exists(target):
        return
    there = models.read(target)
    same = (there["kind"] == "pruned" and there["pruning"] == pruned["pruning"]
            and models.digest(there["model"]) == models.digest(pruned["model"]))
    if not same and not (there["kind"] == "pruned" and there["recipe"]["dry_run"]):
        raise Refused(f"{target}: holds something else; name another file with --out, or remove it")


def main(argv=None):
    flags = schedules.parser(__doc__)
    flags.add_argument("checkpoint", nargs="*", type=schedules.path,
                       help="default: runs/shapes-resnet8-s0/dense.pt")
    flags.add_argument("--method", nargs="+", choices=METHODS, default=["magnitude", "random"])
    flags.add_argument("--structure", choices=("filters", "weights"), default="filters")
    flags.add_argument("--sparsity", nargs="+", type=number(float, 0, 1, below=True), metavar="P",
                       help="share to remove (default 0.5); filters: one value, or one for each "
                            "stage")
    flags.add_argument("--plan", choices=("A", "B", "C", "D", "I"),
                       help="a plan of the paper, for filters")
    flags.add_argument("--scope", choices=("layer", "global"),
                       help="rank within each layer (default for filters) or all together "
                            "(weights)")
    flags.add_argument("--include-linear", action="store_true", help="weights: Linear layers too")
    flags.add_argument("--calibration-images", type=number(int, 1), default=640, metavar="N",
                       help="training images for taylor, obd and hrank")
    flags.add_argument("--seed", type=number(int, 0), default=0,
                       help="of random, and of those images")
    flags.add_argument("--out", type=schedules.path, metavar="FILE",
                       help="default: beside the checkpoint, named by the method")
    train.machine_flags(flags)
    run(flags.parse_args(argv))


if __name__ == "__main__":
    schedules.command(main)
