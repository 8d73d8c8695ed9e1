#!/usr/bin/env python3
"""Train a dense network; and the one training loop, which retraining shares.

    python train.py                                    # generated images, ResNet-8, a minute or two
    python train.py --dataset cifar10 --arch resnet56  # the paper's recipe: 160 epochs
    torchrun --nproc-per-node 8 train.py --dataset imagenet --data-dir ILSVRC --arch resnet34

Run the same command again to resume after the last finished epoch. Data order and augmentation are
functions of (seed, epoch), the learning rate is one of the step, so resuming needs nothing but the
tensors and the curve so far.
"""
import argparse
import contextlib
import ctypes
import functools
import hashlib
import os
import shlex
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

import models
import schedules
from schedules import Refused, number

# ---- recipes -------------------------------------------------------------------------------------

# CIFAR as He 2016 / Le & Hua 2021, ImageNet as torchvision's V1 weights. `retrain` is the usual
# budget t of a dense run of so many epochs. shapes: small enough for a laptop.
CIFAR = {"schedule": "step", "epochs": 160, "batch_size": 64, "lr": 0.1, "milestones": [80, 120],
         "momentum": 0.9, "weight_decay": 1e-4, "retrain": 40}
IMAGENET = {"schedule": "step", "epochs": 90, "batch_size": 256, "lr": 0.1, "milestones": [30, 60],
            "momentum": 0.9, "weight_decay": 1e-4, "retrain": 45}
SHAPES = {"schedule": "step", "epochs": 26, "batch_size": 64, "lr": 0.1, "milestones": [13, 23],
          "momentum": 0.9, "weight_decay": 5e-4, "retrain": 4}
RECIPES = {"shapes": SHAPES, "cifar10": CIFAR, "cifar100": CIFAR, "imagenet": IMAGENET,
           "folder": CIFAR}


def make_recipe(args):
    """The settings of a dense run: the data set's recipe with what the command line says instead.
    A dict of plain values, as `schedules.dense` takes it."""
    base = RECIPES[args.dataset]
    recipe = {"dataset": args.dataset, "seed": args.seed, "subset": args.subset,
              "dry_run": args.dry_run, "pretrained": args.pretrained}
    for key in ("schedule", "epochs", "batch_size", "lr", "momentum", "weight_decay"):
        given = getattr(args, key)
        recipe[key] = base[key] if given is None else given
    if args.pretrained not in (None, "torchvision"):
        recipe["pretrained"] = os.path.abspath(args.pretrained)
    if args.epochs == 0:                    # the --pretrained weights, which are trained already
        recipe["epochs"] = base["epochs"]
    if args.dry_run:
        recipe["batch_size"] = 8
        recipe["epochs"] = min(recipe["epochs"], 2)
    recipe["milestones"] = milestones(args.milestones, base, recipe)
    return recipe


def milestones(given, base, recipe):
    """The epochs of the x0.1 drops. With another T than the data set's recipe they move
    proportionally: none before epoch 1, never two at once."""
    total = recipe["epochs"]
    if given is not None:
        if recipe["schedule"] != "step" and given:
            raise Refused("argument --milestones: belongs to --schedule step")
        if recipe["dry_run"]:
            given = [m for m in given if m < total]
        if given != sorted({m for m in given if m < total}):
            raise Refused("argument --milestones: must ascend, below the epochs of the run "
                          f"({total})")
        return given
    drops = set()
    if recipe["schedule"] == "step":
        for milestone in base["milestones"]:
            drops.add(max(1, milestone * total // base["epochs"]))
    return sorted(drop for drop in drops if drop < total)


def budget(recipe):
    """The default budget t: the same fraction of T as in the data set's recipe."""
    base = RECIPES[recipe["dataset"]]
    return max(1, recipe["epochs"] * base["retrain"] // base["epochs"])


def snapshot_epochs(recipe):
    """The epochs whose state is kept for weight rewinding: about eighteen, spaced evenly, among
    them T - t for the default budget t."""
    total = recipe["epochs"]
    every = max(1, total // 18)
    return range((total - budget(recipe)) % every, total, every)


# ---- the loop ------------------------------------------------------------------------------------

CURVE = ("epoch", "lr", "train_loss", "train_accuracy", "test_accuracy")


def fit(network, data, schedule, settings, machine, path, masks=None, momentum=None, keep=(),
        label=""):
    """Train `network` in place: the one loop, for dense training and every retraining.

    network   in the layout that its parameters have; is moved to the device
    data      a `Data`; machine: a `Machine`
    schedule  a function step -> (lr, momentum)
    settings  plain values that define the run; used here: epochs, batch_size, weight_decay, seed
    path      the checkpoint that the caller will write; the state lies beside it after each epoch
              (`models.state_path`), and the run resumes from it if it is there
    masks     {weight name: bool tensor}; where False, the weight stays exactly 0
    momentum  {parameter name: buffer} to start from (weight rewinding)
    keep      after these epochs the state is also kept beside `path`, for weight rewinding
    label     printed behind each epoch

    Returns (curve, seconds, made): a dict of lists, a value for each epoch (CURVE; accuracies in
    percent, lr of the epoch's first step), the time, and where it was made (`provenance`). Raises
    Refused on a loss or weights that are not finite and on a state of another run."""
    state_file = models.state_path(path)
    curve, seconds, made = {key: [] for key in CURVE}, 0.0, provenance(machine)
    state = models.read_state(state_file)
    if state:
        check_same_run(settings, state["settings"], state_file)
        network.load_state_dict(state["model"])
        momentum = state["momentum"]
        curve = state["curve"]
        seconds = state["seconds"]
        made = in_turn(state.get("made", made), made)   # older states lack it
        say(describe(curve, seconds, settings["epochs"]), label)
    network.to(machine.device, memory_format=torch.channels_last)
    optimizer = make_optimizer(network, settings["weight_decay"], momentum)
    pinned = pinned_weights(network, masks or {})
    forward = wrap(network, machine)
    slices = batch_slices(data, settings, machine)
    for epoch in range(len(curve["epoch"]), settings["epochs"]):
        began = time.perf_counter()
        network.train()
        losses, hits, seen = [], [], 0
        batches = train_batches(data, slices, settings["seed"], epoch, machine)
        for step, (x, y) in enumerate(batches, epoch * len(slices)):
            loss, right = train_step(forward, optimizer, x, y, schedule(step), machine, pinned)
            losses.append(loss * len(y))                      # stays on the device: no step waits
            hits.append(right)
            seen += len(y) * machine.world
        loss, right = epoch_totals(losses, hits, network, machine)
        if not np.isfinite(loss):
            raise Refused(f"the loss is not finite in epoch {epoch + 1}; try a smaller --lr")
        point = {"epoch": epoch + 1, "lr": schedule(epoch * len(slices))[0],
                 "train_loss": loss / seen, "train_accuracy": 100 * right / seen,
                 "test_accuracy": evaluate(network, data, machine)}
        for key, value in point.items():
            curve[key].append(value)
        seconds += time.perf_counter() - began
        state = {"settings": settings, "curve": curve, "seconds": seconds, "made": made,
                 "model": network.state_dict(), "momentum": buffers(optimizer, network)}
        if epoch + 1 in keep:
            models.save(snapshot_path(os.path.dirname(path), epoch + 1), state)
        models.save(state_file, state)
        say(describe(curve, seconds, settings["epochs"]), label)
    return curve, seconds, made


def train_step(forward, optimizer, x, y, lr_and_momentum, machine, pinned=None):
    """One step of SGD; `pinned`: see `pinned_weights`.

    Returns the loss and the number of correct predictions, still on the device."""
    group = optimizer.param_groups[0]
    group["lr"], group["momentum"] = lr_and_momentum
    try:
        with machine.autocast():
            out = forward(x)
        loss = F.cross_entropy(out.float(), y)
        loss.backward()
    except torch.OutOfMemoryError:
        raise Refused(f"argument --batch-size: {len(x)} images do not fit the memory of "
                      f"{machine.device}") from None
    except ValueError as problem:               # batch norm, of one image with one value a channel
        raise Refused(f"argument --batch-size: the last batch has {len(x)} image: {problem}"
                      ) from None
    except RuntimeError as problem:
        if not machine.compile:
            raise
        raise Refused(f"argument --compile: {str(problem).splitlines()[0]}") from None
    optimizer.step()
    optimizer.zero_grad()
    if pinned:                                  # pruned weights: back to exactly 0, all in one call
        torch._foreach_mul_(*pinned)
    return loss.detach(), (out.detach().argmax(1) == y).sum()


def epoch_totals(losses, hits, network, machine):
    """(summed loss, right answers) of an epoch, over all processes, as numbers: the one wait."""
    losses = torch.stack(losses)
    hits = torch.stack(hits)
    if machine.world > 1:    # sum over processes; everyone evaluates with rank 0's BN statistics
        torch.distributed.all_reduce(losses)
        torch.distributed.all_reduce(hits)
        for buffer in network.buffers():
            torch.distributed.broadcast(buffer, 0)
    return losses.cpu().double().sum().item(), hits.cpu().sum().item()


def evaluate(network, data, machine):
    """Percent of the test images that are classified correctly; each counted exactly once."""
    network.eval()
    count = len(data.test.labels)
    mine = torch.arange(machine.rank, count, machine.world)
    right = torch.zeros((), dtype=torch.int64, device=machine.device)
    with torch.inference_mode(), machine.autocast():
        for x, y in plain_batches(data.test, mine, data, machine):
            right += (network(x).argmax(1) == y).sum()
        if machine.world > 1:
            torch.distributed.all_reduce(right)
    return 100 * right.item() / count


def make_optimizer(network, weight_decay, momentum=None):
    """Plain SGD, fused, weight decay on everything; `momentum`: {parameter name: buffer} to start
    from. Learning rate and momentum are set at every step, from the schedule."""
    optimizer = torch.optim.SGD(network.parameters(), lr=0.0, momentum=0.9,
                                weight_decay=weight_decay, fused=True)
    for name, buffer in (momentum or {}).items():
        parameter = network.get_parameter(name)
        # Laid out as the parameter is: the fused kernel walks both memories side by side.
        laid_out = torch.empty_like(parameter).detach().copy_(buffer)
        optimizer.state[parameter]["momentum_buffer"] = laid_out
    return optimizer


def buffers(optimizer, network):
    """The optimizer's momentum as {parameter name: buffer}; nothing before its first use."""
    found = {}
    for name, parameter in network.named_parameters():
        if optimizer.state[parameter]:
            found[name] = optimizer.state[parameter]["momentum_buffer"]
    return found


def pinned_weights(network, masks):
    """(weights, masks) as two lists for one multiplication a step, each mask laid out as its
    weight; None without masks."""
    if not masks:
        return None
    weights = [network.get_parameter(name).data for name in masks]
    laid_out = [torch.empty_like(w).copy_(m) for w, m in zip(weights, masks.values())]
    return weights, laid_out


def wrap(network, machine):
    """The network as the loop calls it: one of several processes, or compiled."""
    forward = network
    if machine.world > 1:
        forward = torch.nn.parallel.DistributedDataParallel(network, broadcast_buffers=False)
    if machine.compile:
        torch.compiler.reset()                  # of an earlier run's shapes, which count
        forward = torch.compile(forward)
    return forward


def snapshot_path(folder, epoch):
    """Where the state after `epoch` epochs of the dense run in `folder` is kept."""
    return os.path.join(folder, f"epoch-{epoch:03d}.pt")


def check_same_run(wanted, found, path):
    """Raises Refused, naming the settings that differ, unless two dicts of settings are equal."""
    differ = []
    for key in dict.fromkeys([*wanted, *found]):
        here, there = wanted.get(key), found.get(key)
        if here != there:
            differ.append(f"{key} (here {here!r}, there {there!r})")
    if differ:
        raise Refused(f"{path}: belongs to another run, with another {', '.join(differ)}; "
                      "remove this file, or write to another folder")


def describe(curve, seconds, epochs):
    """The last epoch of a curve as a line of text, and how long the others will take."""
    done = curve["epoch"][-1]
    left = seconds / done * (epochs - done)
    return (f"{done:4d}/{epochs}  lr {curve['lr'][-1]:<9.4g} loss {curve['train_loss'][-1]:.4f}  "
            f"train {curve['train_accuracy'][-1]:5.2f} %  "
            f"test {curve['test_accuracy'][-1]:5.2f} %  {left / 60:.1f} min left")


# ---- the dense run -------------------------------------------------------------------------------

def train(args, machine):
    """The dense run: writes dense.pt, and the snapshots that weight rewinding needs."""
    recipe = make_recipe(args)
    folder = args.out or default_folder(args.dataset, args.arch, args.seed, args.dry_run)
    target = os.path.join(folder, "dense.pt")
    with torch.device("meta"):
        models.build(args.arch, 10, seed=None)       # refuses unknown names before data are loaded
    data_dir = args.data_dir or ("" if args.dataset == "shapes" else "data")
    if data_dir:
        data_dir = os.path.abspath(data_dir)
    data = load_data(args.dataset, data_dir, recipe["subset"], recipe["dry_run"], machine.device)
    network = models.build(args.arch, data.classes, args.seed, recipe["pretrained"])
    if recipe["pretrained"] not in (None, "torchvision"):
        recipe["weights"] = models.digest(network.state_dict())     # the file may be replaced
    settings = run_settings(recipe, args.arch, machine.precision, data.fingerprint,
                            args.epochs != 0)
    if os.path.exists(target):
        done = models.read(target, "dense")
        check_same_run(settings, recorded_settings(done), target)
        note_other_images(done["dense"], data)
        models.tidy(target)
        say(f"{target}: done already, test {done['dense']['test_accuracy']:.2f} %")
        return
    try:
        parameters, macs = models.count(network, data.side)
    except RuntimeError:
        raise Refused(f"argument --arch: {args.arch} cannot take images of {data.side} pixels"
                      ) from None
    say(f"{args.arch} on {args.dataset} ({data.fingerprint}; {len(data.test.labels)} test images): "
        f"{parameters:,} parameters, {macs:,} MACs; {recipe['epochs']} epochs, x0.1 at "
        f"{recipe['milestones']}; {machine.device}, {machine.precision}")
    if args.epochs == 0:
        curve, seconds, made = {key: [] for key in CURVE}, 0.0, provenance(machine)
        accuracy = evaluate(network.to(machine.device), data, machine)
    else:
        os.makedirs(folder, exist_ok=True)      # fails now, not after the first epoch
        schedule = schedules.dense(recipe, len(batch_slices(data, recipe, machine)))
        curve, seconds, made = fit(network, data, schedule, settings, machine, target,
                                   keep=snapshot_epochs(recipe))
        accuracy = curve["test_accuracy"][-1]
    model = network.state_dict()
    models.save(target, {
        "arch": args.arch, "classes": data.classes, "side": data.side, "mean": data.mean,
        "std": data.std, "data_dir": data_dir, "model": model,
        "dense": {
            "recipe": recipe, "data": data.fingerprint, "test_data": data.test_fingerprint,
            "precision": machine.precision,
            "digest": models.digest(model), "curve": curve, "test_accuracy": accuracy,
            "params": parameters, "macs": macs, "seconds": round(seconds, 1), **made}})
    models.tidy(target)
    say(f"test {accuracy:.2f} % after {len(curve['epoch'])} epochs, {seconds:.0f} s. "
        f"Wrote {target}. Next: python prune.py {shlex.quote(target)}")


def default_folder(dataset="shapes", arch="resnet8", seed=0, dry_run=False):
    """Where a dense run writes if it is not told."""
    return f"runs/{dataset}-{arch}-s{seed}" + ("-dry" if dry_run else "")


def run_settings(recipe, arch, precision, fingerprint, trained):
    """All that defines a dense run, as one dict of plain values; trained: not with --epochs 0."""
    return {**recipe, "arch": arch, "precision": precision, "data": fingerprint,
            "trained": trained}


def recorded_settings(checkpoint):
    """`run_settings` of the dense run that a checkpoint comes from."""
    dense = checkpoint["dense"]
    return run_settings(dense["recipe"], checkpoint["arch"], dense["precision"], dense["data"],
                        bool(dense["curve"]["epoch"]))


# ---- batches -------------------------------------------------------------------------------------

class Split(NamedTuple):
    """The training or the test images."""
    images: torch.Tensor | np.ndarray   # uint8 (n, 3, side, side), on the device; or file paths
    labels: torch.Tensor                # int64 (n,); beside paths on the CPU


def in_files(images):
    """Are these large images, an array of file paths to be decoded, rather than a tensor?"""
    return isinstance(images, np.ndarray)


class Data(NamedTuple):
    """A data set. Small images are on the device, the training ones with a black border of PAD
    pixels; large ones are files, decoded on the fly."""
    train: Split | None
    test: Split
    side: int
    classes: int
    mean: list
    std: list
    fingerprint: str = ""       # of the training images
    test_fingerprint: str = ""


FILES_AT_ONCE = 128     # to test large images
PAD = 4             # black border around small images, out of which the crop is drawn


def batch_slices(data, settings, machine):
    """Each batch of an epoch as a slice of the epoch's order. Its length is S, the number of steps.

    With several processes (torchrun) each takes every world-th image of the same global batch, and
    all as many, so that DistributedDataParallel's mean over processes is the batch's mean: a
    remainder that cannot be shared evenly is dropped."""
    count, size = len(data.train.labels), settings["batch_size"]
    slices = []
    for low in range(0, count, size):
        images = min(size, count - low)
        images -= images % machine.world
        if images:
            slices.append(slice(low + machine.rank, low + images, machine.world))
    if not slices:
        raise Refused(f"argument --batch-size: {machine.world} processes share batches of "
                      f"{min(size, count)} images; start fewer")
    return slices


def epoch_draws(seed, epoch, count):
    """What is random in an epoch, for each position in it: image index (count,), crop (dy, dx)
    (count, 2), flip (count,), bool. Drawn on the CPU, so the same on every device."""
    draw = np.random.default_rng((seed, epoch))
    order = torch.from_numpy(draw.permutation(count))
    crop = torch.from_numpy(draw.integers(0, 2 * PAD + 1, (count, 2)))
    flip = torch.from_numpy(draw.integers(0, 2, count).astype(bool))
    return order, crop, flip


def augment(padded, index, crop, flip):
    """Per-sample random crop and horizontal flip. padded: uint8 (n, 3, side+8, side+8); index (b,),
    crop (b, 2), flip (b,) on its device. Returns uint8 (b, 3, side, side).

    The crops are a view with two more axes, the offsets, so taking them is one gather."""
    side = padded.shape[-1] - 2 * PAD
    windows = padded.unfold(2, side, 1).unfold(3, side, 1)       # (n, 3, 9, 9, side, side), no copy
    x = windows[index, :, crop[:, 0], crop[:, 1]]
    return torch.where(flip[:, None, None, None], x.flip(3), x)


def normaliser(data, device):
    """A function: uint8 images -> float32, channels_last, with the data set's mean and std."""
    scale = torch.tensor([1 / (255 * s) for s in data.std], device=device).view(1, 3, 1, 1)
    shift = torch.tensor([-m / s for m, s in zip(data.mean, data.std)], device=device)
    shift = shift.view(1, 3, 1, 1)

    def normalise(x):
        x = x.to(torch.float32, memory_format=torch.channels_last)
        return x.mul_(scale).add_(shift)
    return normalise


def train_batches(data, slices, seed, epoch, machine):
    """The augmented batches of an epoch: (float images, labels) for each of the `slices`."""
    images, labels = data.train
    order, crop, flip = epoch_draws(seed, epoch, len(labels))
    if in_files(images):
        parts = [order[part] for part in slices]
        yield from file_batches(data.train, parts, data, machine, (seed, epoch))
        return
    normalise = normaliser(data, machine.device)
    order, crop, flip = [t.to(machine.device) for t in (order, crop, flip)]
    for part in slices:
        x = augment(images, order[part], crop[part], flip[part])
        yield normalise(x), labels[order[part]]


def plain_batches(split, index, data, machine):
    """(float images, labels) of the images `index` of a split, as they are."""
    images, labels = split
    if in_files(images):
        yield from file_batches(split, index.split(FILES_AT_ONCE), data, machine)
        return
    normalise = normaliser(data, machine.device)
    for part in index.to(machine.device).split(1000):
        yield normalise(images[part]), labels[part]


def plain_training_images(data, index, machine):
    """(float images, labels) of the training images `index`, neither cropped nor flipped."""
    split = data.train
    if not in_files(split.images):
        split = Split(split.images[:, :, PAD:-PAD, PAD:-PAD], split.labels)
    return plain_batches(split, index, data, machine)


def file_batches(split, parts, data, machine, seed=None):
    """(float images, labels) for each index tensor of `parts`, decoded by worker processes;
    augmented if there is a `seed`."""
    from torchvision.transforms import v2
    crop = [v2.Resize(256, antialias=True), v2.CenterCrop(224)]
    if seed:
        crop = [v2.RandomResizedCrop(224, antialias=True), v2.RandomHorizontalFlip()]
    transform = v2.Compose([*crop, v2.PILToTensor()])
    testing = min(FILES_AT_ONCE, len(data.test.labels))      # refused now, not after an epoch
    check_shared_memory(machine.workers, max(testing, *map(len, parts)))
    normalise = normaliser(data, machine.device)
    loader = torch.utils.data.DataLoader(
        range(len(split.images)), batch_sampler=[part.tolist() for part in parts],
        collate_fn=functools.partial(decoded, split, transform, seed),
        num_workers=machine.workers, pin_memory=machine.device.type == "cuda")
    for x, y, problem in loader:
        if problem:
            raise Refused(problem)
        x = x.to(machine.device, non_blocking=True)
        yield normalise(x), y.to(machine.device, non_blocking=True)


def decoded(split, transform, seed, index):
    """Some large images, decoded and transformed, as uint8 (b, 3, 224, 224), their labels, and
    what is wrong with one of them (or ""). Each image has its own seed, so the result does not
    depend on which worker decodes it."""
    images = []
    for i in index:
        draw = np.random.SeedSequence((*(seed or ()), i))
        torch.manual_seed(int(draw.generate_state(1, np.uint64)[0]) >> 1)
        try:
            images.append(transform(decode(split.images[i])))
        except Refused as problem:               # raised here it would come with its traceback
            return torch.empty(0), torch.empty(0), str(problem)
    return torch.stack(images), split.labels[index], ""


def check_shared_memory(workers, batch_size):
    """Raises Refused if /dev/shm, through which workers hand on their batches, is too small for
    them: they would wait for ever. Each has two batches ready, and one is in use."""
    if not workers or not os.path.isdir("/dev/shm"):
        return
    disk = os.statvfs("/dev/shm")
    free = disk.f_bavail * disk.f_frsize
    needed = (2 * workers + 1) * batch_size * 3 * 224 * 224
    if free < needed:
        raise Refused(f"argument --workers: {workers} workers need {needed >> 20} MB of "
                      f"/dev/shm, but {free >> 20} MB are free; use --workers 0, or "
                      "--shm-size in docker")


# ---- data sets -----------------------------------------------------------------------------------

# The authors' normalisation, kept: its std is not the per-pixel one (0.2470, 0.2435, 0.2616).
CIFAR_STATISTICS = [0.4914, 0.4822, 0.4465], [0.2023, 0.1994, 0.2010]
IMAGENET_STATISTICS = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
LARGEST_RESIDENT = 64       # pixels a side; larger images are decoded on the fly at 224
DRY_RUN_IMAGES = 16
NO_CLASSES = ("__MACOSX", "@eaDir", "lost+found")       # folders that systems make


@functools.lru_cache(1)
def load_data(dataset, data_dir, subset, dry_run, device):
    """A `Data`: of all training images (subset None) or of so many, class-balanced. Raises Refused
    if the images cannot be found or differ in size."""
    images, labels, classes = load_split(dataset, data_dir, True, subset, dry_run)
    test_images, test_labels, _ = load_split(dataset, data_dir, False, None, dry_run)
    side = side_of(images)
    if side != side_of(test_images):
        raise Refused(f"argument --data-dir: {data_dir}: training images have {side} pixels, test "
                      f"images {side_of(test_images)} (224: the first one is larger than "
                      f"{LARGEST_RESIDENT})")
    if in_files(images):
        mean, std = IMAGENET_STATISTICS
    else:
        mean, std = CIFAR_STATISTICS if "cifar" in dataset else statistics_of(images)
        images = F.pad(images, (PAD,) * 4)
    count = len(classes)
    return Data(on_device(images, labels, device), on_device(test_images, test_labels, device),
                side, count, mean, std, fingerprint(images, labels, count, side),
                fingerprint(test_images, test_labels, count, side))


def fingerprint(images, labels, classes, side):
    """What identifies the images of a split, in words and a hash: of the pixels, or of the names of
    all files and the sizes of 10,000 at most."""
    if in_files(images):
        names = ["/".join(path.replace("\\", "/").split("/")[-2:]) for path in images]
        sizes = [file_size(path) for path in images[::1 + len(images) // 10_000]]
        content = os.fsencode("".join(names)) + str(sizes).encode()
    else:
        content = images.numpy().tobytes()
    digest = hashlib.sha256(labels.numpy().tobytes() + content).hexdigest()[:8]
    return f"{len(labels)} images, {classes} classes, {side} pixels, {digest}"


def file_size(path):
    try:
        return os.path.getsize(path)
    except OSError as problem:
        raise Refused(f"{path}: not a readable image ({type(problem).__name__})") from None


def data_for(checkpoint, args, machine):
    """The `Data` that a checkpoint's network was trained on, or those of --data-dir, normalised as
    the network takes them. Says so if they are others; Refused if they do not fit it."""
    recipe = checkpoint["dense"]["recipe"]
    data = load_data(recipe["dataset"], args.data_dir or checkpoint["data_dir"], recipe["subset"],
                     recipe["dry_run"], machine.device)
    check_fits(checkpoint, data.classes, data.side)
    note_other_images(checkpoint["dense"], data)
    return data._replace(mean=checkpoint["mean"], std=checkpoint["std"])


def note_other_images(dense, data):
    """Say so if the images are not those that a dense network was trained on or tested with."""
    if data.fingerprint != dense["data"]:
        say(f"note: other images ({data.fingerprint}) than the dense network was trained on "
            f"({dense['data']})")
    if data.test_fingerprint != dense.get("test_data", data.test_fingerprint):
        say(f"note: other test images ({data.test_fingerprint}) than the dense network was tested "
            f"with ({dense['test_data']})")


def data_to_test(checkpoint, args, machine):
    """As `data_for`, without training images."""
    recipe = checkpoint["dense"]["recipe"]
    images, labels, classes = load_split(
        recipe["dataset"], args.data_dir or checkpoint["data_dir"], False, None, recipe["dry_run"])
    check_fits(checkpoint, len(classes), side_of(images))
    return Data(None, on_device(images, labels, machine.device), checkpoint["side"],
                checkpoint["classes"], checkpoint["mean"], checkpoint["std"])


def check_fits(checkpoint, classes, side):
    """Raises Refused for images of other classes or sizes than a checkpoint's network takes."""
    if (classes, side) != (checkpoint["classes"], checkpoint["side"]):
        raise Refused(f"argument --data-dir: {classes} classes, {side} pixels, but the network was "
                      f"trained for {checkpoint['classes']} classes, {checkpoint['side']} pixels")


def on_device(images, labels, device):
    """A `Split`; paths and their labels stay where they are."""
    if in_files(images):
        return Split(images, labels)
    return Split(images.to(device), labels.to(device))


def side_of(images):
    """The pixels a side at which images are shown to the network."""
    return 224 if in_files(images) else images.shape[-1]


def load_split(dataset, data_dir, training, subset, dry_run):
    """The training or test images: uint8 (n, 3, side, side) or an array of file paths; their
    labels, int64; and the names of the classes."""
    images, labels, classes = read_split(dataset, data_dir, training)
    if dry_run:
        chosen = balanced(labels, DRY_RUN_IMAGES)
    elif subset is not None:
        chosen = balanced(labels, subset)
        if len(chosen) < subset:
            raise Refused(f"argument --subset: a class has too few images for a balanced subset "
                          f"of {subset}")
    else:
        chosen = slice(None)
    images, labels = images[chosen], torch.from_numpy(labels[chosen])
    if in_files(images) and max(decode(images[0]).size) <= LARGEST_RESIDENT:
        images = resident(images)
    return images, labels, classes


def read_split(dataset, data_dir, training):
    """As `load_split`, of all images, small files not yet decoded; labels are a numpy array."""
    if dataset == "shapes":
        if data_dir:
            raise Refused("argument --data-dir: shapes are generated; for images of your own, "
                          "train.py --dataset folder")
        images, labels = shapes(3000, 0) if training else shapes(2000, 1)
        return images, labels.numpy(), list(range(10))
    if dataset in ("cifar10", "cifar100"):
        from torchvision import datasets
        try:
            found = getattr(datasets, dataset.upper())(data_dir, training, download=True)
        except (OSError, RuntimeError) as problem:
            raise Refused(f"argument --data-dir: {dataset} is not in {data_dir} and cannot be "
                          f"downloaded: {problem}") from None
        images = torch.from_numpy(found.data).permute(0, 3, 1, 2)
        return images, np.array(found.targets, np.int64), found.classes
    classes = class_folders(os.path.join(data_dir, "train"))
    names = ["train"] if training else ["test", "val"]
    for name in names:
        folder = os.path.join(data_dir, name)
        found = class_folders(folder)           # none in ImageNet's test/, so val/ is taken
        fit_training = found == classes or not classes      # --evaluate needs no train/
        if found and fit_training:
            return *image_files(folder, found), found
    wanted = "train/<class>/*" if training else "test/<class>/* or val/<class>/*"
    raise Refused(f"argument --data-dir: {data_dir} has no {wanted}"
                  + (f" with the {len(classes)} classes of train/" if classes else ""))


def class_folders(folder):
    """The names of a folder's folders, sorted, without hidden ones and those of systems."""
    if not os.path.isdir(folder):
        return []
    names = [entry.name for entry in os.scandir(folder) if entry.is_dir()]
    return sorted(name for name in names if not left_by_a_system(name))


def left_by_a_system(name):
    """Is a file or folder of this name hidden, or one that systems make?"""
    return name.startswith(".") or name in NO_CLASSES


def image_files(folder, classes):
    """(paths, labels) of the images in the folders `classes`, as torchvision's ImageFolder lists
    them, without hidden files."""
    from torchvision.datasets.folder import IMG_EXTENSIONS, make_dataset

    def shown(path):
        parts = path[len(folder):].replace("\\", "/").split("/")
        return path.lower().endswith(IMG_EXTENSIONS) and not any(map(left_by_a_system, parts))
    try:
        found = make_dataset(folder, {name: i for i, name in enumerate(classes)}, None, shown)
    except FileNotFoundError as problem:
        raise Refused(f"argument --data-dir: {folder}: {problem}") from None
    paths, labels = zip(*found)
    return np.array(paths, object), np.array(labels, np.int64)


def balanced(labels, count):
    """Indices of `count` of the `labels`, fixed and class-balanced; of a class that has too few,
    all."""
    classes = labels.max() + 1
    order = np.random.default_rng(0).permutation(len(labels))
    chosen = []
    for c in range(classes):
        share = count // classes + (c < count % classes)
        chosen.append(order[labels[order] == c][:share])
    return np.sort(np.concatenate(chosen))


def decode(path):
    """One image file as PIL RGB. Raises Refused, naming it, if it cannot be read as 8 bits."""
    from torchvision.datasets.folder import Image           # PIL's
    try:
        with Image.open(path) as image:
            if not image.mode.startswith(("I", "F")):
                return image.convert("RGB")
    except Exception as problem:      # PIL's plugins raise anything on damaged files
        raise Refused(f"{path}: not a readable image ({type(problem).__name__})") from None
    raise Refused(f"{path}: has more than 8 bits a channel, which PIL would clip to white; convert "
                  "it to 8")


def resident(paths):
    """Small image files as one uint8 tensor (n, 3, side, side), decoded on all cores."""
    with ThreadPoolExecutor() as pool:
        arrays = list(pool.map(lambda path: np.asarray(decode(path)), paths))
    first = arrays[0].shape
    for path, array in zip(paths, arrays):
        if array.shape != first or first[0] != first[1]:
            raise Refused(f"{path}: has {array.shape[1]} x {array.shape[0]} pixels, {paths[0]} "
                          f"{first[1]} x {first[0]}; images must be square and of one size, or all "
                          f"larger than {LARGEST_RESIDENT} pixels")
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2)


def statistics_of(images):
    """(mean, std) of each channel of uint8 images, two lists, from its histogram."""
    levels = [torch.bincount(images[:, c].reshape(-1).int(), minlength=256) for c in range(3)]
    levels = torch.stack(levels).double()
    share = levels / levels.sum(1, keepdim=True)
    level = torch.arange(256).double() / 255
    mean = share @ level
    variance = share @ level ** 2 - mean.float() ** 2       # float: as the tracked rows were made
    return mean.tolist(), variance.clamp(min=1e-4).sqrt().tolist()


def shapes(count, seed):
    """The generated data set: (images uint8 (count, 3, 24, 24), labels int64), a function of
    `seed`: ten fixed blobs at a random place, size, angle and colour, on a smooth random background
    with noise."""
    draw = torch.Generator().manual_seed(2021)
    blobs = F.interpolate(torch.rand(10, 1, 5, 5, generator=draw), size=24, mode="bicubic")
    draw.manual_seed(seed)

    def uniform(low, high, *shape):
        return low + (high - low) * torch.rand(count, *shape, generator=draw)
    labels = torch.arange(count) % 10
    angle = uniform(-0.4, 0.4)
    zoom = uniform(1.0, 1.6)
    cos = zoom * angle.cos()
    sin = zoom * angle.sin()
    to_blob = torch.stack([cos, -sin, uniform(-0.3, 0.3), sin, cos, uniform(-0.3, 0.3)], 1)
    grid = F.affine_grid(to_blob.view(count, 2, 3), (count, 1, 24, 24), align_corners=False)
    cover = (20 * (F.grid_sample(blobs[labels], grid, align_corners=False) - 0.5)).sigmoid()
    image = F.interpolate(uniform(0.2, 0.8, 3, 4, 4), size=24, mode="bicubic")
    image += cover * (uniform(0, 1, 3, 1, 1) - image)
    image += 0.05 * torch.randn(image.shape, generator=draw)
    return (image.clamp(0, 1) * 255).to(torch.uint8), labels


# ---- the machine ---------------------------------------------------------------------------------

class Machine(NamedTuple):
    """Where and how a run computes."""
    device: torch.device
    precision: str = "fp32"     # bf16: autocast; weights, BN statistics and loss stay float32
    compile: bool = False
    workers: int = 0
    rank: int = 0
    world: int = 1

    def autocast(self):
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16")


def make_machine(args):
    """The `Machine` of the command line; joins the process group when started by torchrun."""
    rank, world, local = processes()
    device = torch.device(args.device)
    cuda = device.type == "cuda"
    if device.type != "cpu":
        index = device.index
        if index is None:
            index = local
            there = torch.accelerator.device_count()
            if local >= there:
                raise Refused(f"torchrun started more processes than the {there} GPUs of this "
                              "machine; give --nproc-per-node")
        torch.accelerator.set_device_index(index)
    keep_memory()
    torch.backends.cudnn.benchmark = cuda
    torch.backends.cudnn.allow_tf32 = False                 # fp32 is fp32: torch's default is tf32
    if world > 1 and not torch.distributed.is_initialized():
        try:
            torch.distributed.init_process_group("nccl" if cuda else "gloo")
        except (ValueError, RuntimeError) as problem:           # the port is taken, or is none
            raise Refused(f"environment: MASTER_ADDR, MASTER_PORT: {problem}") from None
    precision = args.precision
    if precision is None:
        fast = cuda and torch.cuda.is_bf16_supported(including_emulation=False)
        precision = "bf16" if fast else "fp32"
    return Machine(device, precision, getattr(args, "compile", False), args.workers, rank, world)


def processes():
    """(rank, how many, rank on this machine), as torchrun sets them in the environment."""
    try:
        rank, world, local = [int(os.environ.get(name) or usual) for name, usual in
                              (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0))]
    except ValueError:
        raise Refused("environment: RANK, WORLD_SIZE and LOCAL_RANK must be numbers; start with "
                      "torchrun or unset them") from None
    lacking = [name for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
               if world > 1 and not os.environ.get(name)]
    if lacking or not 0 <= rank < world:
        raise Refused(f"environment: RANK={rank} of WORLD_SIZE={world}, without "
                      f"{' '.join(lacking) or 'more processes'}: start with torchrun or unset them")
    return rank, world, local


def keep_memory():
    """glibc hands every large tensor's memory back and faults it in again, a tenth of a CPU's step:
    tell it not to. Does nothing where another library is used."""
    with contextlib.suppress(OSError, TypeError, AttributeError):
        for parameter, value in ((-3, 32 << 20), (-1, 2 ** 31 - 1)):     # M_MMAP_, M_TRIM_THRESHOLD
            ctypes.CDLL(None).mallopt(parameter, value)


def provenance(machine):
    """What else a bitwise result depends on, for the record; taken when a run starts. `commit` is
    that of this code, with -dirty if it was changed since, and empty outside a clone of it."""
    here = os.path.dirname(os.path.abspath(__file__))
    name = f"{machine.device.type}, {torch.backends.cpu.get_cpu_capability()}"
    if machine.device.type == "cuda":
        name = torch.cuda.get_device_name(machine.device)
    commit = ""
    top = git(here, "rev-parse", "--show-toplevel")
    if top and os.path.realpath(top) == os.path.realpath(here):     # not somebody else's repository
        commit = git(here, "describe", "--always", "--dirty", "--exclude", "*")
    return {"device": name, "threads": torch.get_num_threads(), "torch": str(torch.__version__),
            "commit": commit}


def in_turn(earlier, now):
    """The `provenance` of a resumed run: where its sessions differ, one after the other."""
    found = {}
    for key, value in now.items():
        found[key] = earlier[key]
        if str(earlier[key]).split(", then ")[-1] != str(value):
            found[key] = f"{earlier[key]}, then {value}"
    return found


def git(folder, *words):
    """What a git command prints, or "" without git or a repository."""
    with contextlib.suppress(OSError):
        return subprocess.run(["git", *words], cwd=folder, text=True, capture_output=True
                              ).stdout.strip()
    return ""


# ---- the command line ----------------------------------------------------------------------------

def say(*words):
    """Print, once among several processes, at once."""
    if models.first_process():
        print(*words, flush=True)


def parser(doc, files=""):
    """A script's ArgumentParser, which has the flags that say where and how to compute; and its
    groups for what to run and for the method, to which the script adds its own."""
    flags = argparse.ArgumentParser(description=(doc or "").split("\n\n")[0], allow_abbrev=False,
                                    usage=f"%(prog)s {files}[flags]")
    run = flags.add_argument_group("run")
    method = flags.add_argument_group("method")
    machine = flags.add_argument_group("machine")
    gpu = torch.accelerator.current_accelerator() if torch.accelerator.device_count() else None
    devices = ["cpu"]
    if gpu:
        numbered = [f"{gpu.type}:{i}" for i in range(torch.accelerator.device_count())]
        devices = [gpu.type, *numbered, "cpu"]
    machine.add_argument("--data-dir", type=os.path.expanduser,
                         help="the images (default: data, or as in the checkpoint)")
    machine.add_argument("--device", choices=devices, default=devices[0],
                         help=f"default {devices[0]}")
    machine.add_argument("--precision", choices=("bf16", "fp32"),
                         help="default bf16 on a CUDA GPU with it, or fp32")
    machine.add_argument("--workers", type=number(int, 0, 256), default=2,
                         help="to decode large images (default 2)")
    machine.add_argument("--dry-run", action="store_true",
                         help="16 images, in runs/…-dry: seconds (default: off)")
    return flags, run, method


def refuse_others(flags, args, name, *used):
    """Ends with argparse's own error if --name would ignore a flag: if it is not among `used`."""
    for action in flags._actions:
        value = getattr(args, action.dest, action.default)
        given = value != action.default and value != []         # []: no CHECKPOINT
        if given and action.dest not in (name, *used):
            flag = action.option_strings[0] if action.option_strings else action.metavar
            flags.error(f"argument {flag}: --{name} would ignore it")


def command(main):
    """Run `main()`. Unusable input, or a failing disk, is one line and status 2; Ctrl-C and SIGTERM
    are 130."""
    if sys.stdout is None:                      # closed (>&-): files must not take its number
        sys.stdout = open(os.devnull, "w")
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w")
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")   # a file's name may be any bytes
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    status = 0
    try:
        main()
    except (Refused, OSError) as problem:
        text = " ".join(str(problem).split())
        print(f"{os.path.basename(sys.argv[0])}: error: {text}", file=sys.stderr)
        status = 2
    except KeyboardInterrupt:
        say("interrupted; run the same command again to resume")
        status = 130
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
        sys.stdout.flush()
        os._exit(status)     # DDP leaves gloo's threads, on which Python's own end sometimes aborts
    sys.exit(status)


def evaluate_file(args, machine):
    """Print a checkpoint's test accuracy and size."""
    checkpoint = models.read(args.evaluate, "dense")
    network = models.restore(checkpoint).to(machine.device)
    accuracy = evaluate(network, data_to_test(checkpoint, args, machine), machine)
    parameters, macs = models.count(network, checkpoint["side"])
    say(f"{args.evaluate}: test {accuracy:.2f} %, {parameters:,} parameters, {macs:,} MACs")


def main(argv=None):
    flags, run, method = parser(__doc__)
    add = run.add_argument
    add("--dataset", choices=RECIPES, default="shapes", help="default shapes, which are generated")
    add("--arch", default="resnet8", help="resnet8, 20 …, 18, 34, 50, vgg16 (default resnet8)")
    add("--seed", type=number(int, 0), default=0, help="default 0")
    add("--subset", type=number(int, 1), help="train on N images, class-balanced (default: all)")
    add("--out", metavar="DIR", type=os.path.expanduser,
        help="default: runs/<dataset>-<arch>-s<seed>")
    add("--pretrained", nargs="?", const="torchvision", metavar="FILE", type=os.path.expanduser,
        help="torchvision's V1 weights, or a file's (default: fresh ones)")
    add("--evaluate", metavar="CHECKPOINT", type=os.path.expanduser,
        help="only evaluate this file (default: train)")
    add("--compile", action="store_true", help="use torch.compile (default: off)")
    add = method.add_argument
    add("--epochs", type=number(int, 0), help="T (0: keep the --pretrained weights); default, as "
        "for all of these: the data set's recipe")
    add("--batch-size", type=number(int, 2))
    add("--schedule", choices=schedules.DENSE)
    add("--milestones", type=number(int, 1), nargs="*", help="epochs of its x0.1 drops (step)")
    add("--lr", type=number(float, 1e-9), help="its largest value, LR_max")
    add("--momentum", type=number(float, 0, 0.9999))
    add("--weight-decay", type=number(float, 0))
    args = flags.parse_args(argv)
    if args.epochs == 0 and not args.pretrained:
        flags.error("argument --epochs: 0 needs --pretrained")
    if args.evaluate:
        refuse_others(flags, args, "evaluate", "data_dir", "device", "precision", "workers")
        evaluate_file(args, make_machine(args))
    else:
        train(args, make_machine(args))


if __name__ == "__main__":
    command(main)
