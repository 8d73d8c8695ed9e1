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
import contextlib
import copy
import os

import numpy as np
import torch
import torch.nn.functional as F

import models
import train
from schedules import Refused, number

METHODS = ("magnitude", "random", "taylor", "obd", "hrank")
NEED_DATA = ("taylor", "obd", "hrank")

# The paper's plans (Li 2017; Le & Hua 2021, appendix), as arguments of `filters_to_keep`: the share
# of filters removed in each stage and the conv ids that are left alone (the stem is 1). VGG-16: the
# width of each of the 13 convs.
_56, _110, _34 = (16, 18, 20, 34, 38, 54), (36, 38, 74), (2, 8, 14, 16, 26, 28, 30, 32)
PLANS = {
    "resnet56": {"A": ((.1, .1, .1), (16, 20, 38, 54)), "B": ((.6, .3, .1), _56),
                 "C": ((.6, .5, .4), _56), "D": ((.6, .6, .6), _56), "I": ((.1, .15, .2), ())},
    "resnet110": {"A": ((.5, 0, 0), (36,)), "B": ((.5, .4, .3), _110), "C": ((.5, .5, .5), _110),
                  "D": ((.5, .6, .7), _110)},
    "resnet34": {"A": ((.3, .3, .3, 0), _34), "B": ((.5, .6, .4, 0), _34)},
    "vgg16": {"A": ((32, 64, 128, 128, *[256] * 9),),
              "B": ((32, 64, 128, 128, *[196] * 5, *[256] * 4),),
              "C": ((32, 64, 64, *[128] * 4, *[196] * 6),)},
}


# ---- criteria ------------------------------------------------------------------------------------

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


def saliency(network, method, structure, names, seed, calibration=None):
    """The importance of every filter, or weight, of the tensors `names`: {name: scores}.

    Filters: scores (filters,); weights: scores shaped like the weight. Larger stays.
      magnitude  L1 norm of the filter (PFEC, Li 2017); |w| (Han 2015)
      random     uniform, a function of `seed`
      taylor     (sum of g*w)^2, or (g*w)^2, mean over mini-batches of 64 (Molchanov 2019)
      obd        h*w^2/2, h = mean of g^2 over single images, the Fisher diagonal (LeCun 1990)
      hrank      filters only: mean rank of the feature map after BN and ReLU (Lin 2020)
    calibration: (images, labels) for the methods in NEED_DATA, as the network takes them."""
    def reduce(values):
        return values.flatten(1).sum(1) if structure == "filters" else values
    if method == "magnitude":
        return {n: reduce(network.get_parameter(n).detach().abs()) for n in names}
    if method == "random":
        draw = np.random.default_rng((7, seed))
        return {n: torch.from_numpy(draw.random(reduce(network.get_parameter(n).detach()).shape))
                for n in names}
    if method == "taylor":
        return gradient_scores(network, names, lambda gw: reduce(gw) ** 2, *calibration, 64)
    if method == "obd":
        return gradient_scores(network, names, lambda gw: reduce(gw ** 2 / 2), *calibration, 1)
    ranks, (x, _) = {}, calibration
    with torch.no_grad(), contextlib.ExitStack() as hooks:
        for unit in models.prunable(network):
            def note(_, __, output, name=unit.conv + ".weight"):
                found = torch.linalg.matrix_rank(F.relu(output)).sum(0) / len(x)
                ranks[name] = ranks.get(name, 0.0) + found
            hooks.enter_context(network.get_submodule(unit.bn).register_forward_hook(note))
        for images in x.split(64):
            network(images)
    return ranks


# ---- what to keep --------------------------------------------------------------------------------

def filters_to_keep(network, shares, skipped=()):
    """How many filters each prunable conv keeps: {conv: int(C * (1 - p))}, at least 1.

    shares: p, one for all or one for each stage, skipped: the conv ids left alone; or, in place of
    shares, the width of each conv. So `filters_to_keep(network, *PLANS["resnet56"]["B"])`."""
    units = models.prunable(network)
    width = {u.conv: network.get_submodule(u.conv).out_channels for u in units}
    if len(shares) == len(units) and max(shares) > 1:
        return {u.conv: min(w, width[u.conv]) for u, w in zip(units, shares)}
    stages = units[-1].stage
    if len(shares) not in (1, stages):
        raise Refused(f"argument --sparsity: {len(shares)} values; give 1 or {stages}, one a stage")
    # 1e-9: 10 * (1 - 0.9) is 0.99…98 in floating point and means 1.
    return {u.conv: width[u.conv] if u.number in skipped else max(1, int(
        width[u.conv] * (1 - shares[(u.stage - 1) % len(shares)]) + 1e-9)) for u in units}


def keep_filters(scores, counts, scope="layer"):
    """The filters that stay: {conv: int64 indices, ascending}, by scores {conv: (filters,)}.

    layer: the counts[conv] best of each conv. global: as many in all, the best of the network, each
    layer's scores divided by their L2 norm (Molchanov 2017); the best of each layer stays."""
    if scope == "global":
        normed = [s.double() / s.double().norm().clamp(min=1e-300) for s in scores.values()]
        every = torch.cat([s.index_fill(0, s.argmax(), torch.inf) for s in normed])
        layer = torch.arange(len(normed)).repeat_interleave(torch.tensor([*map(len, normed)]))
        best = layer[every.argsort(descending=True, stable=True)[:sum(counts.values())]]
        counts = dict(zip(scores, best.bincount(minlength=len(normed)).tolist()))
    return {c: s.argsort(descending=True, stable=True)[:counts[c]].sort().values
            for c, s in scores.items()}


def weight_masks(weights, scores, sparsity, scope="global"):
    """Which weights stay: {name: bool mask}; round(sparsity * n) of the n weights do not, counting
    those already zero, which go first. global: one ranking of all (Han 2015); layer: each by
    itself. Raises Refused where that leaves none, or less than are zero already."""
    masks = {}
    for names in [list(weights)] if scope == "global" else [[name] for name in weights]:
        flat = torch.cat([torch.where(weights[n] == 0, -1.0, scores[n].double()).flatten()
                          for n in names])
        zeros, already = round(sparsity * len(flat)), (flat < 0).sum().item()
        if not already <= zeros < len(flat):
            raise Refused(f"argument --sparsity: {sparsity:.9g} of {len(flat)} weights: {already} "
                          "are zero already (sparsity is cumulative), and one has to be left")
        stay = torch.ones(len(flat), dtype=torch.bool)
        stay[flat.argsort(stable=True)[:zeros]] = False
        parts = stay.split([weights[n].numel() for n in names])
        masks |= {n: part.view(weights[n].shape) for n, part in zip(names, parts)}
    return masks


# ---- pruning a network, and a checkpoint ---------------------------------------------------------

def choose_filters(network, plan, method="magnitude", scope="layer", seed=0, calibration=None):
    """The filters to keep, {conv: indices}; plan: arguments of `filters_to_keep`."""
    counts = filters_to_keep(network, *plan)
    names = [conv + ".weight" for conv in counts]
    scores = saliency(network, method, "filters", names, seed, calibration)
    return keep_filters({n[:-7]: s.cpu() for n, s in scores.items()}, counts, scope)


def shrunk(network, sparsity=0.5, method="magnitude", plan=None, scope="layer", seed=0,
           calibration=None):
    """A smaller copy of a network in memory, in eval mode; the network itself is left as it is.

    sparsity: the share of filters to remove; plan: instead, one of PLANS, as
    PLANS["resnet56"]["B"]. method, seed, calibration: as `saliency`; scope: as `keep_filters`.
    Raises Refused for a network that cannot be cut (see `models.prunable`)."""
    if method in NEED_DATA and not calibration:
        raise Refused(f"{method} ranks by images: give calibration=(images, labels)")
    small = copy.deepcopy(network).eval()
    keep = choose_filters(small, plan or ([sparsity],), method, scope, seed, calibration)
    return models.resize(small, models.shrink(small.state_dict(), models.prunable(small), keep))


def plan_of(how, arch):
    """The arguments of `filters_to_keep` that a way of pruning means for `arch`."""
    if not how["plan"]:
        return (how["sparsity"],)
    if how["plan"] not in PLANS.get(arch, ()):
        known = ", ".join(f"{name} {''.join(plans)}" for name, plans in PLANS.items())
        raise Refused(f"argument --plan: no plan {how['plan']} for {arch}; known: {known}")
    return PLANS[arch][how["plan"]]


def prune(checkpoint, how, data, machine):
    """A pruned copy of a checkpoint dict (dense, pruned or retrained), with its test accuracy.

    how: dict with method, structure, sparsity (list), plan, scope, seed, include_linear,
    calibration_images. Records in the copy how it was made, which of the dense network's filters
    are left (`kept`), and of this call `removed` and `distance` as schedules.retrain takes them."""
    network, calibration = models.restore(checkpoint), calibration_of(how, data, machine)
    if calibration:
        network.to(machine.device)
    names = models.weight_names(network, how["include_linear"])
    state, kept = checkpoint["model"], dict(checkpoint.get("kept", {}))
    if how["structure"] == "filters":
        keep = choose_filters(network, plan_of(how, checkpoint["arch"]), how["method"],
                              how["scope"], how["seed"], calibration)
        state = models.shrink(state, models.prunable(network), keep)
        kept = {c: kept[c][k] if c in kept else k for c, k in keep.items()}
    else:
        scores = saliency(network, how["method"], "weights", names, how["seed"], calibration)
        masks = weight_masks({n: state[n] for n in names}, {n: s.cpu() for n, s in scores.items()},
                             how["sparsity"][0], how["scope"])
        state = {n: v * masks[n] if n in masks else v for n, v in state.items()}
    pruned = {**checkpoint, "kind": "pruned", "model": state, "kept": kept, "pruning": how}
    before, after = (torch.cat([s[n].flatten().double() for n in names])
                     for s in (checkpoint["model"], state))
    source, small = models.digest(checkpoint["model"]), models.restore(pruned).to(machine.device)
    params, macs = models.count(small, checkpoint["side"])
    return {**pruned, "source": source, "dense_id": checkpoint.get("dense_id", source),
            "params": params, "macs": macs, "test_accuracy": train.evaluate(small, data, machine),
            "removed": 1 - ((after != 0).sum() / (before != 0).sum()).item(),
            "distance": ((before.square().sum() - after.square().sum()).abs().sqrt()
                         / before.norm()).item()}


def calibration_of(how, data, machine):
    """The training images that `how` ranks by, or all if there are fewer, not augmented, as
    `saliency` takes them; None if it needs none."""
    if how["method"] not in NEED_DATA:
        return None
    draw, (images, labels) = np.random.default_rng((11, how["seed"])), data.train
    chosen = torch.from_numpy(draw.permutation(len(labels))[:how["calibration_images"]])
    if not isinstance(images, np.ndarray):
        images = images[:, :, train.PAD:-train.PAD, train.PAD:-train.PAD]
    batches = train.plain_batches((images, labels), chosen, data, machine)
    return tuple(torch.cat(parts) for parts in zip(*batches))


# ---- the command ---------------------------------------------------------------------------------

def amount(how):
    """What a way of pruning takes away, whatever ranks it, as a name."""
    share = (f"plan{how['plan']}" if how["plan"] else
             "_".join(f"{p:g}" for p in np.ravel(how["sparsity"])))
    usual = "layer" if how["structure"] == "filters" else "global"
    return share + f"-{how['scope']}" * (how["scope"] != usual) + "-linear" * how["include_linear"]


def target_of(source, checkpoint, how):
    """The file to write; refuses in time what cannot be done or would overwrite another one."""
    earlier = checkpoint.get("pruning", how)["structure"]
    if earlier != how["structure"]:
        raise Refused(f"{source}: its {earlier} are pruned; go on with --structure {earlier}")
    if how["structure"] == "filters":
        filters_to_keep(models.restore(checkpoint), *plan_of(how, checkpoint["arch"]))
    stem = "" if checkpoint["kind"] == "dense" else os.path.basename(source)[:-3] + "--"
    seed = f"-s{how['seed']}" * (how["seed"] != 0)
    name = f"{stem}{how['structure']}-{how['method']}-{amount(how)}{seed}.pt"
    target = os.path.join(os.path.dirname(source), name)
    there = models.read(target) if os.path.exists(target) else None
    if there and (there.get("pruning"), there.get("source")) != (
            how, models.digest(checkpoint["model"])):
        raise Refused(f"{target}: was pruned otherwise, or from another network; remove it")
    return target


def main(argv=None):
    flags, run, method = train.parser(__doc__, "[CHECKPOINT ...] ")
    run("checkpoint", nargs="*", metavar="CHECKPOINT", help="runs/shapes-resnet8-s0/dense.pt")
    run("--seed", type=number(int, 0), default=0, help="of random and of the images (default 0)")
    method("--method", nargs="+", choices=METHODS, default=["magnitude", "random"], metavar="NAME",
           help=f"{' '.join(METHODS)} (default magnitude random)")
    method("--structure", choices=("filters", "weights"), default="filters", help="default filters")
    method("--sparsity", nargs="+", type=number(float, 0, 0.9999), metavar="P",
           help="share to remove (default 0.5); filters: one, or one for each stage")
    method("--plan", choices=("A", "B", "C", "D", "I"), help="the paper's (filters; default none)")
    method("--scope", choices=("layer", "global"), help="default: filters layer, weights global")
    method("--include-linear", action="store_true", help="weights: Linear layers too (default: no)")
    method("--calibration-images", type=number(int, 1), default=640, metavar="N",
           help="for taylor, obd and hrank (default 640)")
    args = flags.parse_args(argv)
    weights = args.structure == "weights"
    sparsity = args.sparsity or ([] if args.plan else [0.5])
    for flag, bad in (
            ("--plan: is for filters, in place of --sparsity", args.plan and
             (weights or args.sparsity)),
            ("--sparsity: one value with --structure weights", weights and len(sparsity) != 1),
            ("--method: hrank ranks filters, not weights", weights and "hrank" in args.method),
            ("--include-linear: is for --structure weights", args.include_linear and not weights),
            ("--dry-run: prunes what train.py --dry-run wrote; name no checkpoint",
             args.dry_run and args.checkpoint)):
        if bad:
            flags.error(f"argument {flag}")
    hows = [{"structure": args.structure, "method": method, "sparsity": sparsity,
             "plan": args.plan, "scope": args.scope or ("global" if weights else "layer"),
             "seed": args.seed, "include_linear": args.include_linear,
             "calibration_images": args.calibration_images} for method in args.method]
    sources = args.checkpoint or [f"runs/shapes-resnet8-s0{'-dry' * args.dry_run}/dense.pt"]
    checkpoints = {s: models.read(s, "dense", "pruned", "retrained") for s in sources}
    todo = {target_of(source, checkpoint, how): (checkpoint, how)
            for source, checkpoint in checkpoints.items() for how in hows}
    machine = train.the_machine(args)
    for target, (checkpoint, how) in todo.items():
        pruned = prune(checkpoint, how, train.data_for(checkpoint, args, machine), machine)
        models.save(target, pruned)
        train.say(f"Wrote {target}: test {pruned['test_accuracy']:.2f} %, before "
                  f"{checkpoint['test_accuracy']:.2f} %; {pruned['params']:,} parameters, "
                  f"{pruned['macs']:,} MACs")
    train.say(f"Next: python retrain.py {' '.join(todo)}")


if __name__ == "__main__":
    train.command(main)
