#!/usr/bin/env python3
"""Prune a trained network: rank its filters or weights, remove the lowest-scoring ones.

    python prune.py                                              # half the filters, L1 and random
    python prune.py runs/cifar10-resnet56-s0/dense.pt --plan B   # the paper's PFEC-B
    python prune.py DENSE.pt --structure weights --sparsity 0.9 --method magnitude taylor obd

Filters are removed physically: the network becomes smaller and computes what the masked original
computes. Weights are set to 0 and stay 0 in retraining. A pruned or retrained checkpoint can be
pruned again; weight sparsity counts what is already zero. Every criterion is a score, a function of
its own; what is kept follows from the scores in one place (`keep_filters`, `weight_masks`).
"""
import contextlib
import copy
import os
import shlex
from collections import Counter

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import models
import train
from schedules import Refused, number

# ---- the paper's plans ---------------------------------------------------------------------------

# Li 2017; Le & Hua 2021, appendix; as arguments of `filters_to_keep`: the share of filters removed
# in each stage and the conv ids left alone (the stem is 1). VGG-16: the width of each conv.
SKIPPED_56 = (16, 18, 20, 34, 38, 54)
SKIPPED_110 = (36, 38, 74)
SKIPPED_34 = (2, 8, 14, 16, 26, 28, 30, 32)
PLANS = {
    "resnet56": {
        "A": {"shares": (0.1, 0.1, 0.1), "skipped": (16, 20, 38, 54)},
        "B": {"shares": (0.6, 0.3, 0.1), "skipped": SKIPPED_56},
        "C": {"shares": (0.6, 0.5, 0.4), "skipped": SKIPPED_56},
        "D": {"shares": (0.6, 0.6, 0.6), "skipped": SKIPPED_56},
        "I": {"shares": (0.1, 0.15, 0.2)}},
    "resnet110": {
        "A": {"shares": (0.5, 0, 0), "skipped": (36,)},
        "B": {"shares": (0.5, 0.4, 0.3), "skipped": SKIPPED_110},
        "C": {"shares": (0.5, 0.5, 0.5), "skipped": SKIPPED_110},
        "D": {"shares": (0.5, 0.6, 0.7), "skipped": SKIPPED_110}},
    "resnet34": {
        "A": {"shares": (0.3, 0.3, 0.3, 0), "skipped": SKIPPED_34},
        "B": {"shares": (0.5, 0.6, 0.4, 0), "skipped": SKIPPED_34}},
    "vgg16": {
        "A": {"widths": (32, 64, 128, 128, 256, 256, 256, 256, 256, 256, 256, 256, 256)},
        "B": {"widths": (32, 64, 128, 128, 196, 196, 196, 196, 196, 256, 256, 256, 256)},
        "C": {"widths": (32, 64, 64, 128, 128, 128, 128, 196, 196, 196, 196, 196, 196)}},
}


# ---- criteria: {weight name: scores}, larger stays -----------------------------------------------
# Scores have the shape (filters,) for structure "filters", that of the weight for "weights".

def per_filter(values, structure):
    """Sums values of a weight's shape over each filter, if it is filters that are scored."""
    return values.flatten(1).sum(1) if structure == "filters" else values


def magnitude(network, structure, names, seed, calibration):
    """L1 norm of the filter (PFEC, Li 2017); |w| (Han 2015)."""
    return {n: per_filter(network.get_parameter(n).detach().abs(), structure) for n in names}


def uniform(network, structure, names, seed, calibration):
    """Uniform numbers, a function of the seed."""
    draw = np.random.default_rng((7, seed))         # 7: other numbers than calibration images have
    scores = {}
    for name in names:
        like = per_filter(network.get_parameter(name).detach(), structure)
        scores[name] = torch.from_numpy(draw.random(like.shape))
    return scores


def taylor(network, structure, names, seed, calibration):
    """(sum of g*w over the filter)^2, or (g*w)^2; mean over mini-batches of 64 (Molchanov 2019)."""
    return gradient_scores(network, names, calibration, 64,
                           lambda gw: per_filter(gw, structure) ** 2)


def obd(network, structure, names, seed, calibration):
    """h*w^2/2, h = mean of g^2 over single images, the Fisher diagonal (LeCun 1989)."""
    return gradient_scores(network, names, calibration, 1,
                           lambda gw: per_filter(gw ** 2 / 2, structure))


def gradient_scores(network, names, calibration, batch, term):
    """Mean over mini-batches of term(weight * gradient of the mini-batch's mean loss)."""
    weights = [network.get_parameter(name) for name in names]
    frozen = [weight for weight in weights if not weight.requires_grad]
    for weight in frozen:                   # for as long as it takes
        weight.requires_grad_(True)
    scores = dict.fromkeys(names, 0.0)
    images, labels = calibration
    parts = list(zip(images.split(batch), labels.split(batch)))
    for x, y in parts:
        with torch.enable_grad():
            loss = F.cross_entropy(network(x), y)
        gradients = torch.autograd.grad(loss, weights)
        for name, weight, gradient in zip(names, weights, gradients):
            scores[name] = scores[name] + term((weight * gradient).detach()) / len(parts)
    for weight in frozen:
        weight.requires_grad_(False)
    return scores


def hrank(network, structure, names, seed, calibration):
    """Filters only: the mean rank of the feature map after BN and ReLU (Lin 2020)."""
    images, _ = calibration
    ranks = {}

    def hook_for(name):
        def note(module, inputs, output):
            rank = torch.linalg.matrix_rank(F.relu(output)).sum(0) / len(images)
            ranks[name] = ranks.get(name, 0.0) + rank
        return note

    with torch.no_grad(), contextlib.ExitStack() as hooks:
        for unit in models.prunable(network):
            bn = network.get_submodule(unit.bn)
            hooks.enter_context(bn.register_forward_hook(hook_for(f"{unit.conv}.weight")))
        for x in images.split(64):
            network(x)
    return ranks


CRITERIA = {"magnitude": magnitude, "random": uniform, "taylor": taylor, "obd": obd, "hrank": hrank}
NEED_IMAGES = ("taylor", "obd", "hrank")


def saliency(network, method, structure, names, seed=0, calibration=None):
    """The importance of every filter, or weight, of the tensors `names`: {name: scores}.

    network      in eval mode
    method       one of CRITERIA
    structure    "filters": scores (filters,); "weights": scores shaped like the weight
    seed         of random
    calibration  (images, labels) as the network takes them, for the methods in NEED_IMAGES

    Raises Refused for an unknown method, hrank of weights, and a method that lacks its images."""
    if method not in CRITERIA:
        raise Refused(f"unknown method {method!r}; known: {', '.join(CRITERIA)}")
    if method == "hrank" and structure != "filters":
        raise Refused("argument --method: hrank ranks filters, not weights")
    if method in NEED_IMAGES and calibration is None:
        raise Refused(f"{method} ranks by images: give calibration=(images, labels)")
    return CRITERIA[method](network, structure, names, seed, calibration)


# ---- what to keep --------------------------------------------------------------------------------

def filters_to_keep(network, shares=None, skipped=(), widths=None):
    """How many filters each prunable conv keeps: {conv: count}, int(C * (1 - p)) and at least 1.

    shares   the share p to remove: one, or one for each stage
    skipped  the conv ids (`models.Unit.number`) left alone
    widths   in place of shares, the filters that each conv keeps"""
    units = models.prunable(network)
    stages = units[-1].stage
    counts = {}
    if widths is not None and len(widths) != len(units):
        raise Refused(f"{len(widths)} widths for {len(units)} convs that can be pruned")
    if widths is None and len(shares) not in (1, stages):
        raise Refused(f"argument --sparsity: {len(shares)} values; give 1 or {stages}, one a stage")
    if widths is None and not all(0 <= p < 1 for p in shares):
        raise Refused(f"argument --sparsity: {shares}: each must be a share, from 0 to below 1")
    for place, unit in enumerate(units):
        width = network.get_submodule(unit.conv).out_channels
        if widths is not None:
            counts[unit.conv] = min(widths[place], width)
        elif unit.number in skipped:
            counts[unit.conv] = width
        else:
            share = shares[0] if len(shares) == 1 else shares[unit.stage - 1]
            # 1e-9: 10 * (1 - 0.9) is 0.99…98 in floating point and means 1.
            counts[unit.conv] = max(1, int(width * (1 - share) + 1e-9))
    return counts


def keep_filters(scores, counts, scope="layer"):
    """The filters that stay: {conv: int64 indices, ascending}.

    scores  {conv: (filters,)}
    counts  {conv: how many}, as of `filters_to_keep`
    scope   layer: the counts[conv] best of each conv. global: as many in all, the best of the
            network, each layer's scores divided by their L2 norm (Molchanov 2017)"""
    check_scope(scope)
    if scope == "global":
        ranking = []                                    # (score, conv) of every filter
        for conv, score in scores.items():
            normed = score.double() / score.double().norm().clamp(min=1e-300)
            normed[score.argmax()] = torch.inf          # the best of each layer stays
            ranking += [(value, conv) for value in normed.tolist()]
        ranking.sort(key=lambda entry: entry[0], reverse=True)
        counts = Counter(conv for _, conv in ranking[:sum(counts.values())])
    keep = {}
    for conv, score in scores.items():
        best = score.argsort(descending=True, stable=True)[:counts[conv]]
        keep[conv] = best.sort().values
    return keep


def check_scope(scope):
    if scope not in ("layer", "global"):
        raise Refused(f"unknown scope {scope!r}; known: layer, global")


def weight_masks(weights, scores, sparsity, scope="global"):
    """Which weights stay: {name: bool mask}.

    weights   {name: tensor}; of the n weights round(sparsity * n) go, counting those already zero,
              which go first
    scores    {name: tensor of that shape}, none below 0
    sparsity  the share that is zero afterwards
    scope     global: one ranking of all (Han 2015); layer: each tensor by itself

    Raises Refused where that leaves none, or removes less than is zero already."""
    check_scope(scope)
    if scope == "layer":
        masks = {}
        for name, weight in weights.items():
            masks |= weight_masks({name: weight}, scores, sparsity, "global")   # of this one
        return masks
    flat = []
    for name, weight in weights.items():
        flat.append(torch.where(weight == 0, -1.0, scores[name].double()).flatten())
    flat = torch.cat(flat)
    zeros = round(sparsity * len(flat))
    already = (flat < 0).sum().item()
    if not already <= zeros < len(flat):
        raise Refused(f"argument --sparsity: {sparsity:.9g} of {len(flat)} weights: {already} "
                      "are zero already (sparsity is cumulative), and one has to be left")
    stay = torch.ones(len(flat), dtype=torch.bool)
    stay[flat.argsort(stable=True)[:zeros]] = False
    parts = stay.split([weight.numel() for weight in weights.values()])
    return {name: part.view(weights[name].shape) for name, part in zip(weights, parts)}


# ---- pruning a network, and a checkpoint ---------------------------------------------------------

def choose_filters(network, plan, method="magnitude", scope="layer", seed=0, calibration=None):
    """The filters to keep, {conv: indices}. plan: arguments of `filters_to_keep`; the others as of
    `saliency` and `keep_filters`."""
    counts = filters_to_keep(network, **plan)
    names = [f"{conv}.weight" for conv in counts]
    scores = saliency(network, method, "filters", names, seed, calibration)
    scores = {conv: scores[f"{conv}.weight"].cpu() for conv in counts}
    return keep_filters(scores, counts, scope)


def shrunk(network, sparsity=0.5, method="magnitude", plan=None, scope="layer", seed=0,
           calibration=None):
    """A smaller copy of a network in memory, in eval mode; the network itself is left as it is.

    sparsity     the share of filters to remove, in [0, 1): one, or a list of one for each stage
    method       one of CRITERIA
    plan         in place of sparsity, one of PLANS, as PLANS["resnet56"]["B"]
    scope        as of `keep_filters`
    seed         of random
    calibration  as of `saliency`

    Raises Refused for a network that cannot be cut (see `models.prunable`), and as `saliency`."""
    units = models.prunable(network)
    small = copy.deepcopy(network).eval()
    shares = list(np.ravel(sparsity))
    keep = choose_filters(small, plan or {"shares": shares}, method, scope, seed, calibration)
    return models.resize(small, models.shrink(small.state_dict(), units, keep))


def plan_of(wanted, arch):
    """What `wanted` (see `prune`) means for `arch`, as arguments of `filters_to_keep`."""
    if not wanted["plan"]:
        return {"shares": list(np.ravel(wanted["sparsity"]))}
    if wanted["plan"] not in PLANS.get(arch, ()):
        known = ", ".join(f"{name} {''.join(plans)}" for name, plans in PLANS.items())
        raise Refused(f"argument --plan: no plan {wanted['plan']} for {arch}; known: {known}")
    return PLANS[arch][wanted["plan"]]


def prune(checkpoint, wanted, data, machine):
    """A pruned copy of a checkpoint dict (dense, pruned or retrained), with the key `pruning`.

    wanted  dict: structure, method, sparsity (number, a list of one for each stage, or None with a
            plan), plan, scope, seed, include_linear, calibration_images
    data    a `train.Data`, to rank by, to re-estimate BN statistics and to evaluate with

    `pruning` says how the copy was made; which of the dense network's filters are left (`kept`);
    and of this call `removed` and `distance`, as schedules.retrain takes them."""
    network = models.restore(checkpoint)
    calibration = None
    if wanted["method"] in NEED_IMAGES:
        network.to(machine.device)
        calibration = calibration_images(wanted, data, machine)
    earlier = checkpoint.get("pruning", {})
    kept = dict(earlier.get("kept", {}))
    names = models.weight_names(network, wanted["include_linear"])
    before = checkpoint["model"]
    if wanted["structure"] == "filters":
        keep = choose_filters(network, plan_of(wanted, checkpoint["arch"]), wanted["method"],
                              wanted["scope"], wanted["seed"], calibration)
        state = models.shrink(before, models.prunable(network), keep)
        for conv, rows in keep.items():
            kept[conv] = kept[conv][rows] if conv in kept else rows
    else:
        scores = saliency(network, wanted["method"], "weights", names, wanted["seed"], calibration)
        scores = {name: score.cpu() for name, score in scores.items()}
        masks = weight_masks({name: before[name] for name in names}, scores, wanted["sparsity"],
                             wanted["scope"])
        state = dict(before)
        for name, mask in masks.items():
            state[name] = before[name] * mask
    pruned = {**checkpoint, "model": state}
    pruned.pop("retraining", None)
    small = models.restore(pruned).to(machine.device)
    params, macs = models.count(small, checkpoint["side"])
    removed, distance = removed_and_distance(before, state, names)
    settled = reestimated(small, data, machine)
    pruned["pruning"] = {
        **wanted, "round": earlier.get("round", 0) + 1, "earlier": history(checkpoint),
        "source": digest_of(checkpoint), "digest": models.digest(state), "data": data.fingerprint,
        "kept": kept, "removed": removed, "distance": distance, "params": params, "macs": macs,
        "nonzero": sum((p != 0).sum().item() for p in small.parameters()),
        "test_accuracy": train.evaluate(small, data, machine),
        "bn_test_accuracy": train.evaluate(settled, data, machine)}
    return pruned


def removed_and_distance(before, after, names):
    """(the share of the weights `names` that is gone, how far they moved: sqrt(| |w|^2 - |w'|^2 |)
    / |w|)."""
    one = torch.cat([before[name].flatten().double() for name in names])
    two = torch.cat([after[name].flatten().double() for name in names])
    removed = 1 - ((two != 0).sum() / (one != 0).sum()).item()
    moved = (one.square().sum() - two.square().sum()).abs().sqrt()
    return removed, (moved / one.norm()).item()


BN_IMAGES = 50_000


def reestimated(network, data, machine):
    """A copy of a network whose BN statistics are those of the training images, neither cropped nor
    flipped: cumulative averages over one epoch, of BN_IMAGES images at most. Nothing is trained; it
    shows how much of what pruning costs is only BN."""
    copied = copy.deepcopy(network)
    for module in copied.modules():
        if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
            module.reset_running_stats()
            module.momentum = None                              # torch's word for cumulative
    copied.train()
    order = np.random.default_rng(0).permutation(len(data.train.labels))[:BN_IMAGES]
    with torch.no_grad(), machine.autocast():
        for x, _ in train.plain_training_images(data, torch.from_numpy(order), machine):
            if len(x) > 1:
                copied(x)
    return copied.eval()


def digest_of(checkpoint):
    """The digest of a checkpoint's model, recorded or, of a retrained one, made."""
    if "retraining" in checkpoint:
        return models.digest(checkpoint["model"])
    return checkpoint.get("pruning", checkpoint["dense"])["digest"]


def history(checkpoint):
    """What was done to a checkpoint's network since the dense run, as names, one for each step."""
    steps = []
    if "pruning" in checkpoint:
        steps = [*checkpoint["pruning"]["earlier"], name_of(checkpoint["pruning"])]
    if "retraining" in checkpoint:
        retraining = checkpoint["retraining"]
        steps.append(f"{retraining['schedule']}-t{retraining['budget']}")
    return steps


def calibration_images(wanted, data, machine):
    """The training images to rank by, or all if there are fewer, neither cropped nor flipped, as
    `saliency` takes them: (images, labels)."""
    order = np.random.default_rng((11, wanted["seed"])).permutation(len(data.train.labels))
    chosen = torch.from_numpy(order[:wanted["calibration_images"]])
    batches = list(train.plain_training_images(data, chosen, machine))
    return torch.cat([x for x, _ in batches]), torch.cat([y for _, y in batches])


# ---- the command ---------------------------------------------------------------------------------

def amount(pruning):
    """Part of the file name: how much is pruned, e.g. `0.5` or `planB`."""
    if pruning["plan"]:
        text = f"plan{pruning['plan']}"
    else:
        text = "_".join(f"{p:g}" for p in np.ravel(pruning["sparsity"]))
    if pruning["scope"] != usual_scope(pruning["structure"]):
        text += f"-{pruning['scope']}"
    if pruning["include_linear"]:
        text += "-linear"
    return text


def usual_scope(structure):
    return "layer" if structure == "filters" else "global"


def name_of(pruning):
    """The file name of a pruned network, without .pt."""
    name = f"{pruning['structure']}-{pruning['method']}-{amount(pruning)}"
    if pruning["seed"]:
        name += f"-s{pruning['seed']}"
    return name


def folder_of(source):
    """Where what is made from the checkpoint `source` lies: beside dense.pt, else in a folder of
    its own name."""
    folder, name = os.path.split(source)
    if name == "dense.pt":
        return folder
    base, extension = os.path.splitext(source)
    return base if extension in (".pt", ".pth") else source + ".d"


def target_of(source, checkpoint, wanted, out=None):
    """The output path. Refuses early if pruning is impossible or would overwrite another result."""
    structure = checkpoint.get("pruning", wanted)["structure"]
    if structure != wanted["structure"]:
        raise Refused(f"{source}: its {structure} are pruned; prune on with --structure "
                      f"{structure}")
    if structure == "filters":
        filters_to_keep(models.restore(checkpoint), **plan_of(wanted, checkpoint["arch"]))
    target = os.path.join(out or folder_of(source), name_of(wanted) + ".pt")
    if os.path.exists(target):
        there = models.read(target, "pruning")["pruning"]
        made = {key: there[key] for key in wanted}
        if (made, there["source"]) != (wanted, digest_of(checkpoint)):
            raise Refused(f"{target}: was pruned otherwise, or from another network; remove it")
    return target


def check(args, flags):
    """Ends with argparse's own error for flags that contradict each other."""
    if args.plan and (args.structure == "weights" or args.sparsity):
        flags.error("argument --plan: is for filters, in place of --sparsity")
    if args.structure == "weights" and len(args.sparsity or [0.5]) != 1:
        flags.error("argument --sparsity: one value with --structure weights")
    if args.structure == "weights" and "hrank" in args.method:
        flags.error("argument --method: hrank ranks filters, not weights")
    if args.include_linear and args.structure == "filters":
        flags.error("argument --include-linear: is for --structure weights")
    if args.sparsity and not any(args.sparsity):
        flags.error("argument --sparsity: 0 removes nothing; retrain.py takes dense.pt itself")
    if args.dry_run and args.checkpoint:
        flags.error("argument --dry-run: prunes what train.py --dry-run wrote; name no checkpoint")


def main(argv=None):
    flags, run, method = train.parser(__doc__, "[CHECKPOINT ...] ")
    add = run.add_argument
    add("checkpoint", nargs="*", metavar="CHECKPOINT", type=os.path.expanduser,
        help="default: runs/shapes-resnet8-s0/dense.pt")
    add("--seed", type=number(int, 0), default=0, help="of random and of the images (default 0)")
    add("--out", metavar="DIR", type=os.path.expanduser,
        help="default: beside dense.pt, else in a folder of the checkpoint's name")
    add = method.add_argument
    add("--method", nargs="+", choices=CRITERIA, default=["magnitude", "random"], metavar="NAME",
        help=f"{' '.join(CRITERIA)} (default magnitude random)")
    add("--structure", choices=("filters", "weights"), default="filters", help="default filters")
    add("--sparsity", nargs="+", type=number(float, 0, 0.9999), metavar="P",
        help="share to remove (default 0.5); filters: one, or one for each stage")
    add("--plan", choices=("A", "B", "C", "D", "I"), help="the paper's (filters; default none)")
    add("--scope", choices=("layer", "global"), help="default: filters layer, weights global")
    add("--include-linear", action="store_true", help="weights: Linear layers too (default: no)")
    add("--calibration-images", type=number(int, 1), default=640, metavar="N",
        help="for taylor, obd and hrank (default 640)")
    args = flags.parse_args(argv)
    check(args, flags)
    sparsity = args.sparsity or [0.5]
    if args.plan:
        sparsity = None
    elif len(sparsity) == 1:
        sparsity = sparsity[0]
    sources = args.checkpoint or [f"{train.default_folder(dry_run=args.dry_run)}/dense.pt"]
    todo = {}                                           # {target: (checkpoint, what is wanted)}
    for source in sources:
        checkpoint = models.read(source, "dense")
        for name in dict.fromkeys(args.method):
            wanted = {"structure": args.structure, "method": name, "sparsity": sparsity,
                      "plan": args.plan, "scope": args.scope or usual_scope(args.structure),
                      "seed": args.seed, "include_linear": args.include_linear,
                      "calibration_images": args.calibration_images}
            target = target_of(source, checkpoint, wanted, args.out)
            if target in todo:
                raise Refused(f"{target}: would be written twice")
            todo[target] = checkpoint, wanted
    machine = train.make_machine(args)
    for target, (checkpoint, wanted) in todo.items():
        if os.path.exists(target):
            said = "done already"
            pruned = models.read(target)
        else:
            said = "written"
            if args.data_dir:
                checkpoint = {**checkpoint, "data_dir": os.path.abspath(args.data_dir)}
            pruned = prune(checkpoint, wanted, train.data_for(checkpoint, args, machine), machine)
            models.save(target, pruned)
        made = pruned["pruning"]
        train.say(f"{target}: {said}, test {made['test_accuracy']:.2f} %, with BN statistics "
                  f"re-estimated {made['bn_test_accuracy']:.2f} %, dense "
                  f"{checkpoint['dense']['test_accuracy']:.2f} %; {made['nonzero']:,} of "
                  f"{checkpoint['dense']['params']:,} parameters are left, {made['macs']:,} MACs")
    images = ["--data-dir", args.data_dir] if args.data_dir else []
    train.say(f"Next: python retrain.py {shlex.join([*todo, *images])}")


if __name__ == "__main__":
    train.command(main)
