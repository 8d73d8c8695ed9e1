#!/usr/bin/env python3
"""Train a dense network; and the one training loop, which retraining shares.

    python train.py                                    # generated images, ResNet-8, a minute or two
    python train.py --dataset cifar10 --arch resnet56  # the paper's recipe: 160 epochs
    torchrun --nproc-per-node 8 train.py --dataset imagenet --data-dir ILSVRC --arch resnet34

The same command, given again, goes on after the last finished epoch, or says that it is done.
Data order and augmentation are functions of (seed, epoch), the learning rate is one of the step, so
going on needs nothing but the tensors and the curve so far.
"""
import argparse
import contextlib
import ctypes
import functools
import hashlib
import math
import os
import sqlite3
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

# Dense recipes: CIFAR as He 2016 / Le & Hua 2021, ImageNet as torchvision's V1 weights. `retrain`
# is the budget t of a dense run of so many epochs. shapes: small enough for a laptop.
CIFAR = {"schedule": "step", "epochs": 160, "batch_size": 64, "lr": 0.1, "milestones": [80, 120],
         "momentum": 0.9, "weight_decay": 1e-4, "retrain": 40}
RECIPES = {
    "shapes": {**CIFAR, "epochs": 16, "milestones": [8, 12], "weight_decay": 5e-4, "retrain": 5},
    "cifar10": CIFAR, "cifar100": CIFAR, "folder": CIFAR,
    "imagenet": {**CIFAR, "epochs": 90, "batch_size": 256, "milestones": [30, 60], "retrain": 45},
}
# The authors' normalisation, kept: its std is not the per-pixel one (0.2470, 0.2435, 0.2616).
CIFAR_STATISTICS = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)
IMAGENET_STATISTICS = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
PAD = 4             # black border around small images, out of which the crop is drawn
LARGEST_RESIDENT = 64   # pixels a side; larger images are decoded on the fly at 224


# ---- the loop ------------------------------------------------------------------------------------

def fit(network, data, schedule, settings, machine, path, masks=None, momentum=None, keep=()):
    """Train `network` in place: the one loop, for dense training and every retraining.

    A generator: after each epoch it yields (curve, seconds), a dict for each epoch so far and the
    time they took. schedule: step -> (lr, momentum). settings: dict of plain values that define the
    run, of which the loop uses epochs, batch_size, weight_decay and seed. masks: {weight name: bool
    tensor}, False stays exactly 0. momentum: {parameter name: buffer} to start from (weight
    rewinding). path: where the state is written after each epoch and gone on from if it is there,
    until the caller puts the result in its place; after the epochs in `keep` also kept beside it.
    Raises Refused on a loss or weights that are not finite and on a state of another run."""
    curve, seconds = [], 0.0
    if os.path.exists(path):
        state = models.read(path, "state")
        same_run(settings, state["settings"], path)
        network.load_state_dict(state["model"])
        momentum, curve, seconds = state["momentum"], state["curve"], state["seconds"]
        yield curve, seconds
    network.to(machine.device, memory_format=torch.channels_last)
    optimizer = optimizer_of(network, settings["weight_decay"], momentum)
    group = optimizer.param_groups[0]
    if masks:
        weights = [network.get_parameter(n).data for n in masks]        # laid out alike, below
        masks = weights, [torch.empty_like(w).copy_(m) for w, m in zip(weights, masks.values())]
    forward = network if machine.world == 1 else torch.nn.parallel.DistributedDataParallel(network)
    if machine.compile:
        forward = torch.compile(forward)
    steps = math.ceil(len(data.train[1]) / settings["batch_size"])
    for epoch in range(len(curve), settings["epochs"]):
        began, losses, hits, seen = time.perf_counter(), [], [], 0
        network.train()
        batches = train_batches(data, settings["seed"], epoch, settings["batch_size"], machine)
        for step, (x, y) in enumerate(batches, epoch * steps):
            group["lr"], group["momentum"] = schedule(step)
            loss, right = train_step(forward, optimizer, x, y, machine, masks)
            losses.append(loss * len(y))                      # stays on the device: no step waits
            hits.append(right)
            seen += len(y) * machine.world
        losses, hits = torch.stack(losses), torch.stack(hits)
        if machine.world > 1:       # all learn of all; and evaluate the first one's BN statistics
            for value in (losses, hits):
                torch.distributed.all_reduce(value)
            for buffer in network.buffers():
                torch.distributed.broadcast(buffer, 0)
        losses, hits = losses.cpu(), hits.cpu()
        if not losses.isfinite().all():
            raise Refused(f"the loss is not finite in epoch {epoch + 1}; try a smaller --lr")
        curve.append({"epoch": epoch + 1, "lr": schedule(epoch * steps)[0],
                      "train_loss": losses.double().sum().item() / seen,
                      "train_accuracy": 100 * hits.sum().item() / seen,
                      "test_accuracy": evaluate(network, data, machine)})
        seconds += time.perf_counter() - began
        for file in [snapshot_path(path, epoch + 1)] * (epoch + 1 in keep) + [path]:
            models.save(file, {
                "kind": "state", "settings": settings, "curve": curve, "seconds": seconds,
                "model": network.state_dict(),
                "momentum": {name: optimizer.state[p]["momentum_buffer"] for name, p in
                             network.named_parameters() if optimizer.state[p]}})
        yield curve, seconds


def train_step(forward, optimizer, x, y, machine, masks=None):
    """One step of SGD. Returns the loss and how many answers are right, still on the device."""
    with machine.autocast():
        out = forward(x)
    loss = F.cross_entropy(out.float(), y)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    if masks:                                  # pruned weights: back to exactly 0, all in one call
        torch._foreach_mul_(*masks)
    return loss.detach(), (out.detach().argmax(1) == y).sum()


def evaluate(network, data, machine):
    """Percent of the test images that are classified rightly; each counted exactly once."""
    network.eval()
    mine = torch.arange(machine.rank, len(data.test[1]), machine.world)
    with torch.inference_mode(), machine.autocast():
        right = sum(((network(x).argmax(1) == y).sum()
                     for x, y in plain_batches(data.test, mine, data, machine)),
                    torch.zeros((), dtype=torch.int64, device=machine.device))
        if machine.world > 1:
            torch.distributed.all_reduce(right)
    return 100 * right.item() / len(data.test[1])


def optimizer_of(network, weight_decay, momentum=None):
    """Plain SGD, fused, weight decay on everything; `momentum`: {parameter name: buffer} to start
    from. Learning rate and momentum are set at every step, from the schedule."""
    optimizer = torch.optim.SGD(network.parameters(), lr=0.0, momentum=0.9,
                                weight_decay=weight_decay, fused=True)
    for name, buffer in (momentum or {}).items():
        parameter = network.get_parameter(name)
        # Laid out as the parameter is: the fused kernel walks both memories side by side.
        optimizer.state[parameter]["momentum_buffer"] = (
            torch.empty_like(parameter).detach().copy_(buffer))
    return optimizer


def snapshot_path(path, epoch):
    """Where the state after `epoch` epochs of a dense run is kept for weight rewinding."""
    return os.path.join(os.path.dirname(path), f"epoch-{epoch:03d}.pt")


def same_run(wanted, found, path):
    """Refuse, naming the settings that differ, unless two dicts of settings are equal."""
    differ = [f"{k} (here {wanted.get(k)!r}, there {found.get(k)!r})"
              for k in {**wanted, **found} if wanted.get(k) != found.get(k)]
    if differ:
        raise Refused(f"{path}: belongs to another run, with another {', '.join(differ)}; "
                      "remove this file or take another folder (--out)")


def describe(curve, seconds, epochs):
    """The last epoch of a curve as a line of text, and how long the others will take."""
    point, left = curve[-1], seconds / len(curve) * (epochs - len(curve))
    return (f"{point['epoch']:4d}/{epochs}  lr {point['lr']:<9.4g} loss {point['train_loss']:.4f}  "
            f"train {point['train_accuracy']:5.2f} %  test {point['test_accuracy']:5.2f} %  "
            f"{left / 60:.1f} min left")


# ---- batches -------------------------------------------------------------------------------------

class Data(NamedTuple):
    """A data set. A split is (images, labels): images are uint8 (n, 3, side, side) on the device,
    the training ones with their black border, or, if too large, an array of file paths."""
    train: tuple
    test: tuple
    side: int
    classes: int
    mean: list
    std: list
    fingerprint: str = ""


def epoch_draws(seed, epoch, count):
    """What is random in an epoch, for each position in it: image index (count,), crop (dy, dx)
    (count, 2), flip (count,), bool. Drawn on the CPU, so the same on every device."""
    draw = np.random.default_rng((seed, epoch))
    order = torch.from_numpy(draw.permutation(count))
    crop = torch.from_numpy(draw.integers(0, 2 * PAD + 1, (count, 2)))
    return order, crop, torch.from_numpy(draw.integers(0, 2, count).astype(bool))


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
    scale, shift = [1 / (255 * s) for s in data.std], [-m / s for m, s in zip(data.mean, data.std)]
    scale, shift = (torch.tensor(v, device=device).view(1, 3, 1, 1) for v in (scale, shift))
    return lambda x: (x.to(torch.float32, memory_format=torch.channels_last)
                      .mul_(scale).add_(shift))


def train_batches(data, seed, epoch, batch_size, machine):
    """The batches of an epoch: (float images, labels).

    With several processes (torchrun) each takes every world-th sample of the same global batch, and
    all as many, so that DistributedDataParallel's mean over processes is the batch's mean: what is
    left over of the batch, less than world samples, is left out."""
    images, labels = data.train
    order, crop, flip = epoch_draws(seed, epoch, len(labels))
    rank, world = machine.rank, machine.world
    parts = [slice(low + rank, low + size, world) for low in range(0, len(labels), batch_size)
             if (size := min(batch_size, len(labels) - low) // world * world)]
    if isinstance(images, np.ndarray):
        return file_batches(data.train, [order[p] for p in parts], data, machine, (seed, epoch))
    order, crop, flip = (t.to(machine.device) for t in (order, crop, flip))
    normalise = normaliser(data, machine.device)
    return ((normalise(augment(images, order[p], crop[p], flip[p])), labels[order[p]])
            for p in parts)


def plain_batches(split, index, data, machine):
    """(float images, labels) of the images `index` of a split, as they are."""
    images, labels = split
    if isinstance(images, np.ndarray):
        return file_batches(split, index.split(128), data, machine)
    parts, normalise = index.to(machine.device).split(1000), normaliser(data, machine.device)
    return ((normalise(images[part]), labels[part]) for part in parts)


def decoded(paths, labels, transform, seed, index):
    """Some large images, decoded and transformed, as uint8 (b, 3, 224, 224), and their labels. What
    is random in it, each draws by a seed of its own, whichever process draws it."""
    images = []
    for i in index:
        torch.manual_seed(hash((seed, i)))
        images.append(transform(decode(paths[i])))
    return torch.stack(images), labels[index]


def file_batches(split, parts, data, machine, seed=None):
    """(float images, labels) for each index tensor of `parts`; augmented if there is a `seed`."""
    from torchvision.transforms import v2
    images, labels = split
    normalise = normaliser(data, machine.device)
    crop = ([v2.RandomResizedCrop(224, antialias=True), v2.RandomHorizontalFlip()] if seed
            else [v2.Resize(256, antialias=True), v2.CenterCrop(224)])
    transform = v2.Compose([*crop, v2.PILToTensor()])
    loader = torch.utils.data.DataLoader(
        range(len(images)), batch_sampler=[part.tolist() for part in parts],
        collate_fn=functools.partial(decoded, images, labels.cpu(), transform, seed),
        num_workers=machine.workers, pin_memory=machine.device.type == "cuda")
    try:
        for x, y in loader:
            x, y = (t.to(machine.device, non_blocking=True) for t in (x, y))
            yield normalise(x), y
    except Refused as problem:     # out of a worker it comes with that one's traceback as its text
        problem.__traceback__ = None     # holds the loader, whose workers would end 5 s late
        raise Refused(str(problem).strip().rsplit("Refused: ")[-1]) from None


# ---- data sets -----------------------------------------------------------------------------------

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
    angle, zoom = uniform(-0.4, 0.4), uniform(1.0, 1.6)
    cos, sin = zoom * angle.cos(), zoom * angle.sin()
    to_blob = torch.stack([cos, -sin, uniform(-0.3, 0.3), sin, cos, uniform(-0.3, 0.3)], 1)
    grid = F.affine_grid(to_blob.view(count, 2, 3), (count, 1, 24, 24), align_corners=False)
    cover = (20 * (F.grid_sample(blobs[labels], grid, align_corners=False) - 0.5)).sigmoid()
    image = F.interpolate(uniform(0.2, 0.8, 3, 4, 4), size=24, mode="bicubic")
    image += cover * (uniform(0, 1, 3, 1, 1) - image)
    image += 0.05 * torch.randn(image.shape, generator=draw)
    return (image.clamp(0, 1) * 255).to(torch.uint8), labels


def split_of(name, data_dir, training):
    """(images: uint8 (n, 3, side, side) or an array of file paths; labels; names of classes)."""
    if name == "shapes":
        images, labels = shapes(*((3000, 0) if training else (2000, 1)))
        return images, labels.numpy(), list(range(10))
    from torchvision import datasets
    if name in ("cifar10", "cifar100"):
        try:
            found = getattr(datasets, name.upper())(data_dir, training, download=True)
        except (OSError, RuntimeError) as problem:
            raise Refused(f"argument --data-dir: no {name} in {data_dir}, nor a download: {problem}"
                          ) from None
        images = torch.from_numpy(found.data).permute(0, 3, 1, 2)
        return images, np.array(found.targets, np.int64), found.classes
    for folder in ("train",) if training else ("test", "val"):
        path = os.path.join(data_dir, folder)
        if os.path.isdir(path):
            found = datasets.ImageFolder(path)
            paths = np.array([path for path, _ in found.samples], object)
            return paths, np.array(found.targets, np.int64), found.classes
    raise Refused(f"argument --data-dir: {data_dir} has no {'training' if training else 'test'} "
                  "images: train/<class>/*, and test/ or val/<class>/*")


def balanced(labels, count):
    """`count` indices of `labels`, fixed and class-balanced; Refused if a class has too few."""
    classes, order = labels.max() + 1, np.random.default_rng(0).permutation(len(labels))
    chosen = np.concatenate([order[labels[order] == c][:count // classes + (c < count % classes)]
                             for c in range(classes)])
    if len(chosen) < count:
        raise Refused(f"argument --subset: a class has too few images for {count} evenly of all")
    return np.sort(chosen)


def decode(path):
    """One image file as PIL RGB. Raises Refused, naming it, if it cannot be read."""
    from torchvision.datasets.folder import default_loader
    with open(path, "rb") as file:
        start = file.read(25)
    if start[:4] == b"\x89PNG" and start[24:] == b"\x10":       # PIL would make it almost white
        raise Refused(f"{path}: has 16 bits a channel; convert it to 8")
    try:
        return default_loader(path)
    except Exception as problem:      # PIL's plugins raise anything on damaged files
        raise Refused(f"{path}: not a readable image ({type(problem).__name__})") from None


def resident(paths):
    """Small image files as one uint8 tensor (n, 3, side, side), decoded on all cores."""
    with ThreadPoolExecutor() as pool:
        arrays = list(pool.map(lambda path: np.asarray(decode(path)), paths))
    for path, array in zip(paths, arrays):
        if array.shape != arrays[0].shape or array.shape[0] != array.shape[1]:
            raise Refused(f"{path}: all images must be square and of one size, not "
                          f"{array.shape[1]} x {array.shape[0]}")
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2)


def statistics_of(images):
    """Mean and std of each channel of uint8 images, from its histogram."""
    levels = torch.stack([torch.bincount(images[:, c].reshape(-1).int(), minlength=256)
                          for c in range(3)]).double()
    share, level = levels / levels.sum(1, keepdim=True), torch.arange(256).double() / 255
    mean = (share @ level).tolist()
    return mean, (share @ level ** 2 - torch.tensor(mean) ** 2).clamp(min=1e-4).sqrt().tolist()


@functools.lru_cache(1)
def load_data(dataset, data_dir, subset, test_subset, device):
    """A `Data` of so many training and test images (None: all); Refused if they do not fit."""
    splits, kinds = [], []
    for training, wanted in ((True, subset), (False, test_subset)):
        images, labels, classes = split_of(dataset, data_dir, training)
        if wanted is not None:
            chosen = balanced(labels, wanted)
            images, labels = images[chosen], labels[chosen]
        if isinstance(images, np.ndarray) and max(decode(images[0]).size) <= LARGEST_RESIDENT:
            images = resident(images)
        splits.append([images, torch.from_numpy(labels)])
        kinds.append((classes, 224 if isinstance(images, np.ndarray) else images.shape[-1]))
    (classes, side), (images, labels) = kinds[0], splits[0]
    if kinds[1] != kinds[0]:       # as many classes, but others: labels would be silently wrong
        odd = sorted({*kinds[0][0]} ^ {*kinds[1][0]}) or [pixels for _, pixels in kinds]
        raise Refused(f"argument --data-dir: {data_dir}: training and test images differ in their "
                      f"classes or pixels: {' '.join(map(str, odd))}")
    if isinstance(images, np.ndarray):
        content = "".join("/".join(p.replace("\\", "/").split("/")[-2:]) for p in images).encode()
        mean, std = IMAGENET_STATISTICS
    else:
        splits[0][0] = F.pad(images, (PAD,) * 4)
        content = splits[0][0].numpy().tobytes()
        mean, std = CIFAR_STATISTICS if "cifar" in dataset else statistics_of(images)
    digest = hashlib.sha256(labels.numpy().tobytes() + content).hexdigest()[:8]
    splits = [[x if isinstance(x, np.ndarray) else x.to(device) for x in split] for split in splits]
    return Data(*splits, side, len(classes), list(mean), list(std),
                f"{len(labels)} images, {len(classes)} classes, {side} pixels, {digest}")


def data_for(checkpoint, args, machine):
    """The `Data` of a checkpoint. Raises Refused if its network was not trained on them."""
    recipe, known = checkpoint["recipe"], checkpoint["settings"]["data"]
    data_dir = args.data_dir or checkpoint["data_dir"]
    data = load_data(recipe["dataset"], data_dir, recipe["subset"], recipe["test_subset"],
                     machine.device)
    if data.fingerprint != known:
        raise Refused(f"argument --data-dir: {data_dir}: {data.fingerprint}, "
                      f"but the network was trained on {known}")
    return data


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


def the_machine(args):
    """The `Machine` of the command line; joins the process group when started by torchrun."""
    rank, world, local = (int(os.environ.get(name, default)) for name, default in
                          (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
    if rank >= world:
        raise Refused(f"environment: RANK={rank} of WORLD_SIZE={world}: start with torchrun or "
                      "unset both")
    device, gpus = torch.device(args.device), torch.accelerator.device_count()
    if device.type != "cpu":
        torch.accelerator.set_device_index(local % gpus)
    # glibc hands every large tensor's memory back and faults it in again: a tenth of a CPU's step.
    with contextlib.suppress(OSError, TypeError, AttributeError):        # another system's library
        for parameter, value in ((-3, 32 << 20), (-1, 2 ** 31 - 1)):     # M_MMAP_, M_TRIM_THRESHOLD
            ctypes.CDLL(None).mallopt(parameter, value)
    cuda = device.type == "cuda"
    torch.backends.cudnn.benchmark = cuda
    torch.backends.cudnn.allow_tf32 = False                 # fp32 is fp32: torch's default is tf32
    if world > 1 and not torch.distributed.is_initialized():
        torch.distributed.init_process_group("nccl" if cuda else "gloo")
    usual = "bf16" if cuda and torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    return Machine(device, args.precision or usual, args.compile, args.workers, rank, world)


def provenance(device):
    """What else decides the bits of a result, for the record: among it the git commit of this code,
    with -dirty if it was changed since (empty outside a clone)."""
    commit, git = "", ["git", "describe", "--always", "--dirty", "--exclude", "*"]
    with contextlib.suppress(OSError):
        commit = subprocess.run(git, cwd=os.path.dirname(os.path.abspath(__file__)), text=True,
                                capture_output=True).stdout.strip()
    name = (torch.cuda.get_device_name() if device.type == "cuda" else
            f"{device.type}, {torch.backends.cpu.get_cpu_capability()}")
    return {"device": name, "threads": torch.get_num_threads(), "torch": str(torch.__version__),
            "commit": commit}


def say(*words):
    """Print, once among several processes, at once."""
    if int(os.environ.get("RANK", 0)) == 0:
        print(*words, flush=True)


def working_in(folder, machine):
    """Inside, no other train.py or retrain.py works in this run folder, which is made if need be.

    SQLite's lock: the standard library's only one for all systems that ends with the process."""
    os.makedirs(folder, exist_ok=True)
    try:
        lock = sqlite3.connect(os.path.join(folder, ".lock"), timeout=0)
        if machine.rank == 0:
            lock.execute("BEGIN EXCLUSIVE")
    except sqlite3.OperationalError as problem:
        raise Refused(f"{folder}: another train.py or retrain.py works in this folder "
                      f"({problem})") from None
    return contextlib.closing(lock)


# ---- the dense run -------------------------------------------------------------------------------

def the_recipe(args):
    """The settings of a dense run: the data set's recipe with what the command line says instead.

    Its drops come at the same shares of other `epochs`: none before epoch 1, never two at once."""
    base = RECIPES[args.dataset]
    recipe = {key: usual if getattr(args, key) is None else getattr(args, key)
              for key, usual in base.items() if key != "retrain"}
    recipe |= {"epochs": recipe["epochs"] or base["epochs"],     # 0: torchvision's weights, trained
               "dataset": args.dataset, "arch": args.arch, "seed": args.seed, "subset": args.subset,
               "test_subset": None, "pretrained": args.pretrained}
    if args.dry_run:
        recipe |= {"subset": 16, "test_subset": 16, "batch_size": 8,
                   "epochs": min(recipe["epochs"], 2)}
    total, step = recipe["epochs"], recipe["schedule"] == "step"
    if args.milestones is None:
        scaled = {max(1, m * total // base["epochs"]) for m in base["milestones"]}
        recipe["milestones"] = sorted(m for m in scaled if m < total) if step else []
    elif args.milestones != sorted({m for m in args.milestones if m < total and step}):
        raise Refused("argument --milestones: must ascend, below the epochs of the run "
                      f"({total}), and belongs to --schedule step")
    return recipe


def budget(recipe):
    """The usual t of retraining: as large a part of this dense run's T as in its data set's."""
    base = RECIPES[recipe["dataset"]]
    return max(1, recipe["epochs"] * base["retrain"] // base["epochs"])


def train(args, machine):
    """The dense run: writes dense.pt, and the snapshots that weight rewinding needs."""
    recipe, data_dir = the_recipe(args), args.data_dir or "data"
    folder = args.out or (f"runs/{args.dataset}-{args.arch}-s{args.seed}" + "-dry" * args.dry_run)
    target = os.path.join(folder, "dense.pt")
    with torch.device("meta"):
        models.build(args.arch, 10, seed=None)       # refuses unknown names before data are loaded
    data = load_data(args.dataset, data_dir, recipe["subset"], recipe["test_subset"],
                     machine.device)
    settings = {**recipe, "precision": machine.precision, "data": data.fingerprint}
    network = models.build(args.arch, data.classes, args.seed, args.pretrained)
    try:
        parameters, macs = models.count(network, data.side)
    except RuntimeError:
        raise Refused(f"argument --arch: {args.arch} cannot take images of {data.side} pixels"
                      ) from None
    with working_in(folder, machine):
        if os.path.exists(target) and (done := models.read(target))["kind"] == "dense":
            same_run(settings, done["settings"], target)
            return say(f"{target}: done already, test {done['test_accuracy']:.2f} %")
        say(f"{args.arch} on {args.dataset} ({data.fingerprint}; {len(data.test[1])} test images): "
            f"{parameters:,} parameters, {macs:,} MACs; {recipe['epochs']} epochs, x0.1 at "
            f"{recipe['milestones']}; {machine.device}, {settings['precision']}")
        total, every = recipe["epochs"], max(1, recipe["epochs"] // 18)
        keep = range((total - budget(recipe)) % every, total, every)   # retrain.py's default, too
        schedule = schedules.dense(recipe, math.ceil(len(data.train[1]) / recipe["batch_size"]))
        curve, seconds = [], 0.0
        for curve, seconds in () if args.epochs == 0 else fit(
                network, data, schedule, settings, machine, target, keep=keep):
            say(describe(curve, seconds, recipe["epochs"]))
        accuracy = (curve[-1]["test_accuracy"] if curve else
                    evaluate(network.to(machine.device), data, machine))
        models.save(target, {
            "kind": "dense", "arch": args.arch, "classes": data.classes, "side": data.side,
            "mean": data.mean, "std": data.std, "data_dir": data_dir, "recipe": recipe,
            "settings": settings, "test_accuracy": accuracy, "dense_test_accuracy": accuracy,
            "dense_params": parameters, "dense_macs": macs, "curve": curve, "seconds": seconds,
            **provenance(machine.device), "model": network.state_dict()})
        say(f"test {accuracy:.2f} % after {len(curve)} epochs, {seconds:.0f} s. Wrote {target}. "
            f"Next: python prune.py {target}")


# ---- the command line ----------------------------------------------------------------------------

def parser(doc, files=""):
    """A script's ArgumentParser, which has the flags that say where and how to compute; and the
    functions that add flags to its groups `run` and `method`."""
    flags = argparse.ArgumentParser(description=doc.split("\n\n")[0], allow_abbrev=False,
                                    usage=f"%(prog)s {files}[flags]")
    run, method, add = (flags.add_argument_group(name).add_argument
                        for name in ("run", "method", "machine"))
    gpu = torch.accelerator.current_accelerator() if torch.accelerator.device_count() else None
    devices = [gpu.type, "cpu"] if gpu else ["cpu"]
    add("--data-dir", help="the images (default: data, or as in the checkpoint)")
    add("--device", choices=devices, default=devices[0], help=f"default {devices[0]}")
    add("--precision", choices=("bf16", "fp32"), help="default bf16 on a CUDA GPU with it, or fp32")
    add("--compile", action="store_true", help="use torch.compile (default: off)")
    add("--workers", type=number(int, 0, 256), default=2, help="to decode large images (default 2)")
    add("--dry-run", action="store_true", help="16 images, in runs/…-dry: seconds (default: off)")
    return flags, run, method


def command(main):
    """Run `main()`; unusable input, or a failing disk, is one line and status 2; Ctrl-C is 130."""
    sys.stdout.reconfigure(errors="backslashreplace")        # a file's name may be any bytes
    status = 0
    try:
        main()
    except (Refused, OSError) as problem:
        text, status = " ".join(str(problem).split()), 2
        print(f"{os.path.basename(sys.argv[0])}: error: {text}", file=sys.stderr)
    except KeyboardInterrupt:
        say("interrupted; the same command goes on from here")
        status = 130
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
        sys.stdout.flush()
        os._exit(status)     # DDP leaves gloo's threads, on which Python's own end sometimes aborts
    sys.exit(status)


def main(argv=None):
    flags, run, method = parser(__doc__)
    run("--dataset", choices=RECIPES, default="shapes", help="default shapes, which are generated")
    run("--arch", default="resnet8", help="resnet8, 20 …, 18, 34, 50, vgg16 (default resnet8)")
    run("--seed", type=number(int, 0), default=0, help="default 0")
    run("--subset", type=number(int, 1), help="train on a class-balanced part (default: all)")
    run("--out", metavar="DIR", help="default: runs/<dataset>-<arch>-s<seed>")
    run("--pretrained", action="store_true", help="torchvision's V1 weights (default: fresh ones)")
    run("--evaluate", metavar="CHECKPOINT", help="only evaluate this file (default: train)")
    method("--epochs", type=number(int, 0), help="T (0: keep the --pretrained weights); "
           "default, as for all of these: the data set's recipe")
    method("--batch-size", type=number(int, 2))
    method("--schedule", choices=schedules.DENSE)
    method("--milestones", type=number(int, 1), nargs="*", help="epochs of its x0.1 drops (step)")
    method("--lr", type=number(float, 1e-9), help="its largest value, LR_max")
    method("--momentum", type=number(float, 0, 0.9999))
    method("--weight-decay", type=number(float, 0))
    args = flags.parse_args(argv)
    if args.epochs == 0 and not args.pretrained:
        flags.error("argument --epochs: 0 needs --pretrained")
    machine = the_machine(args)
    if not args.evaluate:
        return train(args, machine)
    checkpoint = models.read(args.evaluate, "dense", "pruned", "retrained")
    network, data = models.restore(checkpoint), data_for(checkpoint, args, machine)
    accuracy = evaluate(network.to(machine.device), data, machine)
    parameters, macs = models.count(network, data.side)
    say(f"{args.evaluate}: test {accuracy:.2f} %, {parameters:,} parameters, {macs:,} MACs")


if __name__ == "__main__":
    command(main)
