#!/usr/bin/env python3
"""Train a dense network, and everything that retraining shares with it: data, loop, evaluation.

    python train.py                                    # generated images, ResNet-8, a minute or two
    python train.py --dataset cifar10 --arch resnet56  # the paper's recipe: 160 epochs
    torchrun --nproc-per-node 8 train.py --dataset imagenet --data-dir ILSVRC --arch resnet34
    python train.py --benchmark --arch resnet56        # how fast is this machine?

There is one training loop (`fit`). Retraining a pruned network differs from dense training only in
start weights, masks and schedule. Data order and augmentation are functions of (seed, epoch), the
learning rate is a function of the step, so a resumed run needs nothing but counters and tensors.
"""
import copy
import ctypes
import functools
import hashlib
import itertools
import math
import os
import re
import resource
import signal
import statistics
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
# is the budget t that retrain.py takes unless told. shapes: small enough for a laptop.
CIFAR = {"schedule": "step", "epochs": 160, "batch_size": 64, "lr": 0.1, "milestones": [80, 120],
         "momentum": 0.9, "weight_decay": 1e-4, "retrain": 40}
RECIPES = {
    "shapes": {**CIFAR, "epochs": 16, "milestones": [8, 12], "weight_decay": 5e-4, "retrain": 5},
    "cifar10": CIFAR, "cifar100": CIFAR, "folder": CIFAR,
    "imagenet": {**CIFAR, "epochs": 90, "batch_size": 256, "milestones": [30, 60], "retrain": 45},
}
# The authors' normalisation; the std is not the per-pixel one (0.2470, 0.2435, 0.2616), kept as
# theirs.
CIFAR_STATISTICS = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)
IMAGENET_STATISTICS = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
PAD = 4             # black border around small images, out of which the crop is drawn
LARGEST_RESIDENT = 64   # pixels a side; larger images are decoded on the fly at 224


# ---- data ----------------------------------------------------------------------------------------

def polygon(u, v, sides):
    """1 on the edge of a regular polygon of inner radius 1, smaller inside."""
    return np.hypot(u, v) * np.cos(np.arctan2(v, u) % (2 * np.pi / sides) - np.pi / sides)


def box(u, v):
    return np.maximum(abs(u), abs(v))


# Each class of `shapes` is a function of rotated coordinates, positive inside: disc, ring, square,
# frame, triangle, cross, star, half disc, bar, crescent.
OUTLINES = (
    lambda u, v: 1 - np.hypot(u, v),
    lambda u, v: 0.25 - abs(np.hypot(u, v) - 0.75),
    lambda u, v: 0.85 - box(u, v),
    lambda u, v: 0.22 - abs(box(u, v) - 0.68),
    lambda u, v: 0.55 - polygon(u, v, 3),
    lambda u, v: np.minimum(0.25 - np.minimum(abs(u), abs(v)), 1 - box(u, v)),
    lambda u, v: 0.4 + 1.2 * abs(np.arctan2(v, u) / (0.4 * np.pi) % 1 - 0.5) - np.hypot(u, v),
    lambda u, v: np.minimum(1 - np.hypot(u, v), v + 0.3),
    lambda u, v: np.minimum(0.3 - abs(v), 1 - abs(u)),
    lambda u, v: np.minimum(1 - np.hypot(u, v), np.hypot(u - 0.5, v) - 0.7),
)


def shapes(count, seed):
    """The generated data set: (images uint8 (count, 3, 32, 32), labels int64), a function of
    `seed`.

    Ten outlines of random place, size, rotation and colour, on a smooth random background with
    small distractors and noise.
    """
    draw = np.random.default_rng((2021, seed))
    labels = np.arange(count) % 10

    def uniform(low, high, *shape):
        return draw.uniform(low, high, (count, *shape)).astype(np.float32)

    grid = np.arange(32, dtype=np.float32) - 15.5
    size, angle = uniform(6, 11, 1, 1), uniform(0, 2 * math.pi, 1, 1)
    x = (grid[None, None, :] - uniform(-5, 5, 1, 1)) / size
    y = (grid[None, :, None] - uniform(-5, 5, 1, 1)) / size
    depth = np.empty((count, 32, 32), np.float32)
    for label, outline in enumerate(OUTLINES):
        mine = slice(label, None, 10)
        cos, sin = np.cos(angle[mine]), np.sin(angle[mine])
        depth[mine] = outline(x[mine] * cos + y[mine] * sin, y[mine] * cos - x[mine] * sin)
    cover = 1 / (1 + np.exp(np.clip(-3 * depth * size, -30, 30)))[:, None]     # soft edge

    low = torch.from_numpy(uniform(0.3, 0.7, 3, 4, 4))                # smooth background
    image = F.interpolate(low, size=32, mode="bicubic", align_corners=False).numpy()
    for _ in range(4):                                            # distractors: small squares
        far = np.maximum(abs(grid[None, None, :] - uniform(-16, 16, 1, 1)),
                         abs(grid[None, :, None] - uniform(-16, 16, 1, 1)))[:, None]
        np.copyto(image, uniform(0, 1, 3, 1, 1), where=far < uniform(1, 2.5, 1, 1, 1))
    image += cover * (uniform(0, 1, 3, 1, 1) - image)
    image += draw.standard_normal(image.shape, dtype=np.float32) * 0.06
    return torch.from_numpy((image.clip(0, 1) * 255).astype(np.uint8)), torch.from_numpy(labels)


class Data(NamedTuple):
    """A data set. A split is (images, labels): images are uint8 (n, 3, side, side) on the device,
    the training ones with their black border, or a list of file paths if too large to keep there.
    """
    train: tuple
    test: tuple
    val: tuple          # held-out part of the training set; labels may be empty
    side: int
    classes: int
    mean: list
    std: list


def fingerprint(data):
    """What the training data are, as text that `--resume` compares: large images count by their
    folder and name, small ones by their pixels."""
    images, labels = data.train
    content = hashlib.sha256(labels.cpu().numpy())
    if isinstance(images, list):
        content.update(b"\n".join(b"/".join(os.fsencode(p).split(b"/")[-2:]) for p in images))
    else:
        content.update(images.cpu().contiguous().numpy())
    return (f"{len(labels)} images, {data.classes} classes, {data.side} pixels, "
            f"{content.hexdigest()[:8]}")


def balanced(labels, count, flag):
    """`count` indices of `labels`, fixed and class-balanced (Refused, naming `flag`, if
    impossible)."""
    classes = int(labels.max()) + 1
    order = np.random.default_rng(0).permutation(len(labels))
    chosen = []
    for c in range(classes):
        wanted = count // classes + (c < count % classes)
        mine = order[labels[order] == c][:wanted]
        if len(mine) < wanted:
            raise Refused(f"argument {flag}: {count} images need {wanted} of class {c}, which has "
                          f"{len(mine)}")
        chosen.append(mine)
    return np.sort(np.concatenate(chosen))


def folder_split(root, names):
    """(file paths, labels, class names) of the first of the folders `names` under `root`."""
    from torchvision.datasets import ImageFolder
    for name in names:
        path = os.path.join(root, name)
        if os.path.isdir(path):
            try:
                found = ImageFolder(path)
            except FileNotFoundError as problem:
                raise Refused(f"argument --data-dir: {problem}") from None
            return [p for p, _ in found.samples], np.array(found.targets), found.classes
    raise Refused(f"argument --data-dir: {root} has no folder {' or '.join(names)} with a folder "
                  "of images for each class")


def decode(path):
    """One image file as PIL RGB (Refused, naming the file, if it cannot be read)."""
    from torchvision.datasets.folder import default_loader
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
            raise Refused(f"{path}: is {array.shape[1]} x {array.shape[0]} pixels; all images must "
                          f"be square and of one size, like {paths[0]}")
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2)


def source(name, data_dir):
    """(labels, fetch, classes, large) of a data set: for its training and its test images the
    labels, and a function from indices to images; `large` says whether those are file paths."""
    if name == "shapes":
        sets = [shapes(n, seed) for n, seed in ((4000, 0), (2000, 1))]
        return [y.numpy() for _, y in sets], [lambda i, x=x: x[i] for x, _ in sets], 10, False
    if name in ("cifar10", "cifar100"):
        from torchvision import datasets
        try:
            sets = [getattr(datasets, name.upper())(data_dir, train, download=True)
                    for train in (True, False)]
        except (OSError, RuntimeError) as problem:
            raise Refused(f"argument --data-dir: {name} is not in {data_dir} and could not be "
                          f"downloaded ({problem})") from None
        fetch = [lambda i, s=s: torch.from_numpy(s.data[i]).permute(0, 3, 1, 2) for s in sets]
        return [np.array(s.targets) for s in sets], fetch, len(sets[0].classes), False
    splits = [folder_split(data_dir, names) for names in (("train",), ("test", "val"))]
    odd = sorted(set(splits[0][2]) ^ set(splits[1][2]))
    if odd:               # as many, but others: the labels would be silently wrong
        raise Refused(f"argument --data-dir: {data_dir} has other classes for training than "
                      f"for test, {odd[0]!r} for one")
    large = max(decode(splits[0][0][0]).size) > LARGEST_RESIDENT
    fetch = [lambda i, p=p: [p[k] for k in i] if large else resident([p[k] for k in i])
             for p, _, _ in splits]
    return [s[1] for s in splits], fetch, len(splits[0][2]), large


def statistics_of(images):
    """Mean and std of each channel of uint8 images, exact, from its histogram."""
    levels = torch.stack([torch.bincount(images[:, c].reshape(-1).int(), minlength=256)
                          for c in range(3)]).double()
    share, level = levels / levels.sum(1, keepdim=True), torch.arange(256).double() / 255
    mean = (share @ level).tolist()
    return mean, (share @ level ** 2 - torch.tensor(mean) ** 2).clamp(min=1e-4).sqrt().tolist()


def load_data(recipe, data_dir, device, dry_run=False, checkpoint=None, training=True):
    """The data set recipe["dataset"] with recipe["subset"] training images (None: all), as `Data`.

    checkpoint: one whose classes, size and normalisation are to be used. training=False: only the
    test images; needs a checkpoint.
    Raises Refused where the folder, its images or the wanted sizes do not fit."""
    labels, fetch, classes, large = source(recipe["dataset"], data_dir)
    rest, val = np.arange(len(labels[0])), np.arange(0)
    if recipe["val_size"]:
        val = balanced(labels[0], recipe["val_size"], "--val-size")
        rest = np.setdiff1d(rest, val)
    if not len(rest):
        raise Refused("argument --val-size: leaves no image for training")
    if dry_run:
        subset = min(2 * recipe["batch_size"], len(rest))
        rest = rest[::len(rest) // subset][:subset]
    elif recipe["subset"] is not None:
        rest = rest[balanced(labels[0][rest], recipe["subset"], "--subset")]
    test = np.arange(len(labels[1]))
    if dry_run:
        test = test[::max(1, len(test) // 64)][:64]
    if not training:
        rest = rest[:0]

    images = [fetch[k](i) if len(i) else None for k, i in ((0, rest), (1, test), (0, val))]
    y = [torch.from_numpy(labels[k][i]).to(device) for k, i in ((0, rest), (1, test), (0, val))]
    side = 224 if large else images[1].shape[-1]
    if images[0] is not None and not large and images[0].shape[-1] != side:
        raise Refused(f"argument --data-dir: training images are {images[0].shape[-1]} pixels "
                      f"wide, test images {side}")
    if checkpoint and (classes, side) != (checkpoint["classes"], checkpoint["side"]):
        raise Refused(f"argument --data-dir: {classes} classes of {side} pixels, but the "
                      f"checkpoint's network knows {checkpoint['classes']} classes of "
                      f"{checkpoint['side']} pixels")
    if checkpoint:
        mean, std = checkpoint["mean"], checkpoint["std"]
    elif large:
        mean, std = IMAGENET_STATISTICS
    elif recipe["dataset"] in ("cifar10", "cifar100"):
        mean, std = CIFAR_STATISTICS
    else:
        mean, std = statistics_of(images[0])
    if not large:
        if images[0] is not None:
            images[0] = F.pad(images[0], (PAD,) * 4)
        images = [i if i is None else i.to(device) for i in images]
    return Data(*zip(images, y), side, classes, list(mean), list(std))


def epoch_draws(seed, epoch, count):
    """What is random in an epoch, for each position in it: image index, crop (dy, dx), flip.

    int64 tensors (count,), (count, 2) and a bool tensor (count,); drawn on the CPU, so they are
    the same on every device."""
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


def normalise(x, data):
    """uint8 images -> float32, channels_last, with the data set's mean and std."""
    scale, shift = affine(tuple(data.mean), tuple(data.std), x.device)
    return x.to(torch.float32, memory_format=torch.channels_last).mul_(scale).add_(shift)


@functools.cache
def affine(mean, std, device):
    """The two (1, 3, 1, 1) tensors of `normalise`, brought to the device once."""
    scale, shift = [1 / (255 * s) for s in std], [-m / s for m, s in zip(mean, std)]
    return tuple(torch.tensor(v, device=device).view(1, 3, 1, 1) for v in (scale, shift))


class Files(torch.utils.data.Dataset):
    """Large images, decoded on the fly. Items are asked for as (index, seed), so that the random
    crop is a function of the seed whichever worker draws it."""
    def __init__(self, paths, labels, training):
        from torchvision.transforms import v2
        self.paths, self.labels = paths, labels.tolist()
        self.transform = v2.Compose(
            [v2.RandomResizedCrop(224, antialias=True), v2.RandomHorizontalFlip(), v2.PILToTensor()]
            if training else [v2.Resize(256, antialias=True), v2.CenterCrop(224), v2.PILToTensor()])

    def __getitem__(self, item):
        index, seed = item
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return self.transform(decode(self.paths[index])), self.labels[index]


def file_batches(split, parts, seed, machine, training):
    """Batches of large images: `parts` is a list of int64 index tensors."""
    items = [[(int(i), hash((seed, int(i)))) for i in part] for part in parts]
    try:
        yield from torch.utils.data.DataLoader(Files(*split, training), batch_sampler=items,
                                               num_workers=machine.workers, pin_memory=machine.cuda)
    except Refused as problem:     # out of a worker it comes with that one's traceback as its text
        problem.__traceback__ = None     # holds the loader, whose workers would end 5 s late
        raise Refused(str(problem).strip().rsplit("Refused: ")[-1]) from None


def train_batches(data, seed, epoch, batch_size, machine, start=0):
    """The batches of an epoch from step `start`: (float images, labels, counted, weight).

    With several processes (torchrun) each takes every world-th sample of the same global batch.
    counted: how many of these samples this process answers for; weight: what its mean loss is
    multiplied by so that DistributedDataParallel's mean over processes is the global batch's mean.
    """
    images, labels = data.train
    order, crop, flip = epoch_draws(seed, epoch, len(labels))
    parts, counted = [], []
    for low in range(start * batch_size, len(labels), batch_size):
        high = min(low + batch_size, len(labels))
        # A last batch too small to share out: everybody takes it all and the first one counts.
        small = high - low < 2 * machine.world
        parts.append(slice(low, high) if small else slice(low + machine.rank, high, machine.world))
        counted.append(0 if small and machine.rank else len(range(*parts[-1].indices(high))))
        counted[-1] = counted[-1], counted[-1] * machine.world / (high - low)
    if isinstance(images, list):
        loader = file_batches(data.train, [order[p] for p in parts], (seed, epoch), machine, True)
        for (x, y), counts in zip(loader, counted):
            yield (normalise(x.to(machine.device, non_blocking=True), data),
                   y.to(machine.device, non_blocking=True), *counts)
        return
    order, crop, flip = (t.to(machine.device) for t in (order, crop, flip))
    for part, counts in zip(parts, counted):
        index = order[part]
        yield (normalise(augment(images, index, crop[part], flip[part]), data), labels[index],
               *counts)


def calibration(data, count, seed, machine):
    """(images, labels): `count` training images without augmentation, chosen by `seed`."""
    images, labels = data.train
    if count > len(labels):
        raise Refused(f"argument --calibration-images: {count}, but there are {len(labels)} for "
                      "training")
    chosen = torch.from_numpy(np.random.default_rng((11, seed)).permutation(len(labels))[:count])
    if isinstance(images, list):
        batches = file_batches(data.train, chosen.split(64), seed, machine, False)
        x = torch.cat([x for x, _ in batches])
    else:
        x = images[chosen.to(machine.device)][:, :, PAD:-PAD, PAD:-PAD]
    return normalise(x.to(machine.device), data), labels[chosen.to(machine.device)]


# ---- the machine ---------------------------------------------------------------------------------

class Machine(NamedTuple):
    """Where and how a run computes."""
    device: torch.device
    bf16: bool          # autocast to bfloat16; weights, BN statistics and loss stay float32
    compile: str
    workers: int
    rank: int = 0
    world: int = 1

    @property
    def cuda(self):
        return self.device.type == "cuda"

    def autocast(self):
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16)


def fast_bf16(device):
    """Is bfloat16 faster here? GPUs since Ampere, AMX, AMD's AVX-512-BF16 (twice the fp32 rate).
    Not Intel's AVX-512-BF16 without AMX: there oneDNN's bf16 convs took 1.6 times as long as fp32
    ones."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device)[0] >= 8
    try:
        with open("/proc/cpuinfo") as file:
            words = set(file.read().split())
        return "amx_bf16" in words or {"avx512_bf16", "AuthenticAMD"} <= words
    except OSError:
        return False


def machine_flags(flags):
    """The flags with which train.py, prune.py and retrain.py say where and how to compute."""
    flags.add_argument("--data-dir", type=schedules.path,
                       help="where the images are (default: data, or as in the checkpoint)")
    flags.add_argument("--device", default="auto",
                       help="auto (a GPU if there is one), cpu, cuda, cuda:1")
    flags.add_argument("--precision", choices=("auto", "bf16", "fp32"), default="auto",
                       help="auto: bf16 autocast where the hardware has it")
    flags.add_argument("--compile", choices=("auto", "on", "off"), default="auto",
                       help="torch.compile; auto: long runs on a GPU")
    flags.add_argument("--workers", type=number(int, 0, 256), default=min(8, os.cpu_count() or 1),
                       help="processes that decode large images")
    flags.add_argument("--deterministic", action="store_true",
                       help="bitwise repeatable on a GPU too")
    flags.add_argument("--dry-run", action="store_true",
                       help="two steps an epoch, two epochs, 64 test images: everything is written "
                            "in seconds, nothing is learned")


def loop_flags(flags):
    """The flags of the scripts that run the training loop."""
    flags.add_argument("--resume", action="store_true", help="go on with an interrupted run")
    flags.add_argument("--save-every", type=number(int, 0), default=0, metavar="STEPS",
                       help="save every so many steps too, not only after each epoch")


def the_machine(args):
    """The `Machine` of the command line; joins the process group when started by torchrun."""
    rank, world, local = (int(os.environ.get(k, d)) for k, d in
                          (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
    name = args.device
    if name == "auto":
        name = f"cuda:{local}" if torch.cuda.is_available() else "cpu"
    if not re.fullmatch(r"cpu|cuda(:\d+)?", name):
        raise Refused(f"argument --device: {name!r} is not supported; try auto, cpu or cuda")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError):
        raise Refused(f"argument --device: {name!r} is not here; try auto or cpu") from None
    if device.type == "cpu" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        # glibc hands every large tensor's memory back and faults it in again: a tenth of a step.
        libc.mallopt(-3, 32 << 20), libc.mallopt(-1, 2 ** 31 - 1)      # M_MMAP_, M_TRIM_THRESHOLD
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.backends.cudnn.benchmark = not args.deterministic
    if args.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    if world > 1 and not torch.distributed.is_initialized():
        torch.distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
    bf16 = fast_bf16(device) if args.precision == "auto" else args.precision == "bf16"
    return Machine(device, bf16, args.compile, args.workers, rank, world)


def say(*words):
    """Print, once among several processes, at once."""
    if int(os.environ.get("RANK", 0)) == 0:
        print(*words, flush=True)


# ---- evaluation and the loop ---------------------------------------------------------------------

def evaluate(network, data, machine, split="test"):
    """Percent of the images of a split that are classified rightly; each counted exactly once."""
    images, labels = getattr(data, split)
    network.eval()
    mine = torch.arange(machine.rank, len(labels), machine.world)
    size = 1000 if data.side <= LARGEST_RESIDENT else 128
    right = torch.zeros((), dtype=torch.int64, device=machine.device)
    with torch.inference_mode():
        if isinstance(images, list):
            chunks = file_batches((images, labels), mine.split(size), 0, machine, False)
        else:
            chunks = ((images[i], labels[i]) for i in mine.to(machine.device).split(size))
        for x, y in chunks:
            with machine.autocast():
                out = network(normalise(x.to(machine.device), data))
            right += (out.argmax(1) == y.to(machine.device)).sum()
    if machine.world > 1:
        torch.distributed.all_reduce(right)
    return 100 * right.item() / len(labels)


@functools.lru_cache(maxsize=1)
def forget_compiled(shapes):
    """Drop what was compiled for other `shapes` than these: torch compiles eight variants of a
    forward, then silently no more. Called again with the same shapes it does nothing: lru_cache."""
    torch.compiler.reset()


def fastest(network, machine, steps):
    """`network`, compiled if asked for. Compiling costs half a minute or more. auto: only in long
    runs on a GPU, where a small network waits for kernel launches, which a CUDA graph replays (not
    measured yet); on a CPU it gained between nothing and a quarter."""
    if machine.compile == "on" or machine.compile == "auto" and machine.cuda and steps >= 10_000:
        forget_compiled(tuple(p.shape for p in network.parameters()))
        return torch.compile(network, mode="reduce-overhead" if machine.cuda else None)
    return network


def optimizer_of(network, weight_decay, momentum=None):
    """Plain SGD, fused, weight decay on everything; `momentum`: {parameter name: buffer} to start
    from. Learning rate and momentum are set at every step, from the schedule."""
    optimizer = torch.optim.SGD(network.parameters(), lr=0.0, momentum=0.9,
                                weight_decay=weight_decay, fused=True)
    for name, parameter in network.named_parameters():
        if momentum:
            # Laid out as the parameter is: the fused kernel walks both memories side by side.
            optimizer.state[parameter]["momentum_buffer"] = (
                torch.empty_like(parameter).detach().copy_(momentum[name]))
    return optimizer


def train_step(forward, optimizer, x, y, machine, weight=1.0, masks=None):
    """One step of SGD. Returns the loss and the number of right answers, both still on the device.
    """
    with machine.autocast():
        out = forward(x)
    loss = F.cross_entropy(out.float(), y)
    (loss * weight).backward()
    optimizer.step()
    optimizer.zero_grad()
    if masks:                                  # pruned weights: back to exactly 0, all in one call
        with torch.no_grad():
            torch._foreach_mul_(*masks)
    return loss.detach(), (out.detach().argmax(1) == y).sum()


def momentum_of(network, optimizer):
    """{parameter name: its momentum buffer}; empty before the first step."""
    held = {n: optimizer.state[p].get("momentum_buffer") for n, p in network.named_parameters()}
    return {n: buffer for n, buffer in held.items() if buffer is not None}


def check_finite(network, losses, epoch, state_path):
    """Refuse to go on after a step of this epoch whose loss, or the weights after it, overflowed.
    """
    bad = (~losses.isfinite()).nonzero()
    # The last step's loss is from before its update, so that the tensors are looked at too.
    sound = all(v.isfinite().all() for v in network.state_dict().values())
    if len(bad) or not sound:
        what, step = ("loss is", int(bad[0]) + 1) if len(bad) else ("weights are", len(losses))
        kept = (f" (in a new run: {state_path} holds the last good state of this one)"
                if os.path.exists(state_path) else "")
        raise Refused(f"the {what} not finite at epoch {epoch + 1}, step {step}: a smaller "
                      f"--lr may help{kept}")


def fit(network, data, schedule, settings, machine, state_path, *, resume=False, save_every=0,
        masks=None, momentum=None, snapshots=()):
    """Train `network` in place: the one loop, for dense training and every retraining.

    schedule: step -> (lr, momentum). settings: dict of plain values that define the run; of these
    the loop uses epochs, batch_size, weight_decay, seed, and `resume` compares all. masks: {weight
    name: bool tensor}, False stays exactly 0. momentum: {parameter name: buffer} to start from
    (weight rewinding). snapshots: epochs before which the state is also kept, beside state_path.
    state_path: what --resume reads, written after each epoch, every `save_every` steps, and on
    SIGTERM or SIGINT (then exits 143 or 130; a second signal exits at once).
    Returns (curve, seconds): a dict for each epoch, and the time spent in all sessions.
    Raises Refused on a non-finite loss and on a state of another run.
    """
    epochs, batch_size = settings["epochs"], settings["batch_size"]
    count = len(data.train[1])
    steps = math.ceil(count / batch_size)
    device, first_epoch, first_step, curve, before = machine.device, 0, 0, [], 0.0
    losses = torch.zeros(steps, dtype=torch.float64, device=device)
    hits = torch.zeros((), dtype=torch.int64, device=device)
    identity = fingerprint(data)
    if resume and os.path.exists(state_path):
        state = models.read(state_path, "state")
        same_run({**settings, "data": identity},
                 {**state["settings"], "data": state["data"]}, state_path)
        try:
            network.load_state_dict(state["model"])
            losses.copy_(state["losses"]), hits.copy_(state["hits"])
        except RuntimeError:
            raise Refused(f"{state_path}: its tensors do not fit this run; remove it") from None
        momentum, curve, before = state["momentum"], state["curve"], state["seconds"]
        first_epoch, first_step = state["epoch"], state["step"]
        say(f"resuming {state_path} at epoch {first_epoch + 1}, step {first_step}")
    network.to(device, memory_format=torch.channels_last)
    optimizer = optimizer_of(network, settings["weight_decay"], momentum)
    group = optimizer.param_groups[0]
    if masks:
        weights = dict(network.named_parameters())
        masks = ([weights[n].data for n in masks],
                 [torch.empty_like(weights[n].data).copy_(m) for n, m in masks.items()])
    whole = network
    if machine.world > 1:
        whole = torch.nn.parallel.DistributedDataParallel(network)
    forward = fastest(whole, machine, epochs * steps)
    full = len(range(machine.rank, batch_size, machine.world))
    start = time.perf_counter()

    def save(path, epoch, step):
        if machine.rank == 0:
            models.save(path, {
                "kind": "state", "settings": settings, "data": identity, "epoch": epoch,
                "step": step, "curve": curve, "model": dict(network.state_dict()),
                "momentum": momentum_of(network, optimizer), "losses": losses, "hits": hits,
                "seconds": before + time.perf_counter() - start})

    with interruptible() as signals:
        for epoch in range(first_epoch, epochs):
            if epoch in snapshots and not first_step:
                save(snapshot_path(state_path, epoch), epoch, 0)
            network.train()
            began, step = time.perf_counter(), first_step
            for x, y, counted, weight in train_batches(data, settings["seed"], epoch, batch_size,
                                                       machine, step):
                group["lr"], group["momentum"] = schedule(epoch * steps + step)
                # A last, smaller batch would be compiled anew: it takes the plain network.
                loss, right = train_step(forward if len(y) == full else whole, optimizer, x, y,
                                         machine, weight, masks)
                losses[step] = loss * counted
                hits += right * bool(counted)
                step += 1
                if sys.stdout.isatty() and machine.rank == 0 and step % 10 == 0:
                    print(f"\r{epoch + 1:4d}/{epochs}  step {step}/{steps} ", end="", flush=True)
                stopping = signals and machine.world == 1
                if step < steps and (stopping or save_every and step % save_every == 0
                                     and machine.world == 1):
                    check_finite(network, losses[:step], epoch, state_path)
                    save(state_path, epoch, step)
                if stopping:
                    break
            if step == steps:
                if machine.world > 1:
                    torch.distributed.all_reduce(losses)
                    torch.distributed.all_reduce(hits)
                    for buffer in network.buffers():       # everybody evaluates the same network
                        torch.distributed.broadcast(buffer, 0)
                check_finite(network, losses, epoch, state_path)
                speed = count * (steps - first_step) / steps / (time.perf_counter() - began)
                curve.append({
                    "epoch": epoch + 1, "lr": schedule(epoch * steps)[0],
                    "train_loss": losses.sum().item() / count,
                    "train_accuracy": 100 * hits.item() / count,
                    **{f"{split}_accuracy": evaluate(network, data, machine, split)
                       for split in ("test", "val") if len(getattr(data, split)[1])}})
                per_epoch = (time.perf_counter() - start) / (epoch + 1 - first_epoch)
                left = per_epoch * (epochs - epoch - 1)
                say("\r" * sys.stdout.isatty() + describe(curve[-1], epochs) +
                    f"  {speed:6.0f} images/s  {left // 60:.0f}:{left % 60:02.0f} left")
                losses.zero_(), hits.zero_()
                first_step = 0
                save(state_path, epoch + 1, 0)
            if signals:
                say(f"interrupted: {state_path} is saved; the same command with --resume goes on")
                raise SystemExit(128 + signals[0])
    return curve, before + time.perf_counter() - start


def describe(point, epochs):
    """One epoch of a curve as a line of text."""
    val = f"  val {point['val_accuracy']:5.2f} %" if "val_accuracy" in point else ""
    return (f"{point['epoch']:4d}/{epochs}  lr {point['lr']:<9.4g} loss {point['train_loss']:.4f}  "
            f"train {point['train_accuracy']:5.2f} %  test {point['test_accuracy']:5.2f} %{val}")


class interruptible:
    """While inside, SIGTERM and SIGINT are noted in the list it yields; a second one exits at once.
    """
    def __enter__(self):
        self.seen, self.old = [], {}

        def note(number, _):
            if self.seen:
                os._exit(128 + number)
            self.seen.append(number)
        for number in (signal.SIGTERM, signal.SIGINT):
            self.old[number] = signal.signal(number, note)
        return self.seen

    def __exit__(self, *_):
        for number, handler in self.old.items():
            signal.signal(number, handler)


def snapshot_path(state_path, epoch):
    """Where the state before `epoch` of a dense run is kept for weight rewinding."""
    return os.path.join(os.path.dirname(state_path), f"epoch-{epoch:03d}.pt")


def same_run(wanted, found, path):
    """Refuse, naming the settings that differ, unless two dicts of settings are equal."""
    differ = [f"{k} (here {wanted.get(k)!r}, there {found.get(k)!r})"
              for k in {**wanted, **found} if wanted.get(k) != found.get(k)]
    if differ:
        raise Refused(f"{path}: belongs to another run; it differs in {', '.join(differ)}")


# ---- how fast ------------------------------------------------------------------------------------

def matrix_peak(machine):
    """FLOP/s of the best of ten large matrix products in the precision of training."""
    n = 8192 if machine.cuda else 1024
    a = torch.randn(n, n, device=machine.device,
                    dtype=torch.bfloat16 if machine.bf16 else torch.float32)
    return 2 * n ** 3 / min(clock(lambda: a @ a, machine) for _ in range(10))


def clock(work, machine):
    """Seconds that `work()` takes, device included."""
    start = time.perf_counter()
    work()
    if machine.cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start


def plain_loop(network, data, batch_size, machine):
    """The loop everybody writes, as the yardstick: PIL images through torchvision's transforms in a
    DataLoader with two workers, float32, contiguous tensors, `.item()` at each step. Endless; each
    next() is a step."""
    from torchvision import transforms
    transform = transforms.Compose([
        transforms.ToPILImage(), transforms.RandomCrop(data.side, PAD),
        transforms.RandomHorizontalFlip(), transforms.ToTensor(),
        transforms.Normalize(data.mean, data.std)])

    def collate(items):
        return torch.stack([transform(x) for x, _ in items]), torch.stack([y for _, y in items])
    images, labels = (t.cpu() for t in data.train)
    loader = torch.utils.data.DataLoader(
        list(zip(images[:, :, PAD:-PAD, PAD:-PAD], labels)), batch_size, shuffle=True,
        drop_last=True, num_workers=2, collate_fn=collate, pin_memory=machine.cuda)
    network.to(machine.device).train()
    optimizer = torch.optim.SGD(network.parameters(), 0.1, 0.9, weight_decay=1e-4)
    total = 0.0
    while True:
        for x, y in loader:
            optimizer.zero_grad()
            loss = F.cross_entropy(network(x.to(machine.device)), y.to(machine.device))
            total += loss.item()
            loss.backward()
            optimizer.step()
            yield


def benchmark(args, machine, rounds=7, steps=10):
    """train.py --benchmark: the training step with its data, the same step on one fixed batch, and
    the step of the plain loop, for the dense network, one with masks, and one with half of its
    filters. All of them take turns; medians, of the ratios too."""
    recipe = the_recipe(args)
    data = load_data(recipe, args.data_dir or "data", machine.device)
    size = recipe["batch_size"]
    if isinstance(data.train[0], list):
        raise Refused("argument --benchmark: is for images of up to "
                      f"{LARGEST_RESIDENT} pixels, which stay on the device")
    if len(data.train[1]) < size:
        raise Refused(f"argument --batch-size: {size}, but there are {len(data.train[1])} images")

    def endless():
        for epoch in itertools.count():
            for x, y, counted, _ in train_batches(data, 0, epoch, size, machine):
                if counted == size:
                    yield x, y

    def contenders(net, masked):
        """Three endless generators, each next() a step: with data, on a fixed batch, plain."""
        plain = plain_loop(copy.deepcopy(net), data, size, machine)
        net.to(machine.device, memory_format=torch.channels_last).train()
        optimizer, masks = optimizer_of(net, recipe["weight_decay"]), None
        if masked:
            weights = [net.get_parameter(n).data for n in models.weight_names(net)]
            masks = weights, [(torch.rand_like(w) < 0.1).to(w.dtype) for w in weights]
        forward = fastest(net, machine, rounds * steps)

        def ours(batches):
            for x, y in batches:
                yield train_step(forward, optimizer, x, y, machine, 1.0, masks)
        return ours(endless()), ours(itertools.repeat(next(endless()))), plain

    def take(steps, generator):
        for _ in range(steps):
            next(generator)

    network = models.build(args.arch, data.classes)
    units = models.prunable(network)
    half = models.from_state(args.arch, data.classes, models.shrink(network.state_dict(), units, {
        u.conv: torch.arange(network.get_submodule(u.conv).out_channels // 2) for u in units}))
    nets = {"dense": network, "masked": copy.deepcopy(network), "half the filters": half}
    runs = {name: contenders(net, name == "masked") for name, net in nets.items()}
    memory, times = {}, {name: [] for name in runs}
    for name, generators in runs.items():                          # warm up, and compile
        if machine.cuda:
            torch.cuda.reset_peak_memory_stats()
        for generator in generators[:2]:
            take(steps, generator)
        memory[name] = (torch.cuda.max_memory_allocated() if machine.cuda
                        else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024) / 2 ** 20
        take(steps, generators[2])
    for _ in range(rounds):
        for name, (training, fixed, plain) in runs.items():
            take(4, fixed)           # untimed, as the plain loops' workers refill their queues,
            ours = [clock(lambda: take(steps, g), machine) for g in (training, fixed)]
            take(4, plain)           # and what they had prepared meanwhile is no part of its time
            times[name].append((*ours, clock(lambda: take(steps, plain), machine)))
    peak = matrix_peak(machine)
    say(f"{args.arch}, batch {size}, {'bf16' if machine.bf16 else 'fp32'}, {device_name(machine)}; "
        f"matrix product peak {peak / 1e12:.2f} TFLOP/s. Images/s:\n\n"
        "| network | training | to dense | on one fixed batch | ratio | plain loop | ratio | "
        "step, ms | share of peak | peak memory, MiB |\n" + "|---" * 10 + "|")
    for name, net in nets.items():
        seconds, bound, slow = (statistics.median(t) / steps for t in zip(*times[name]))
        to_dense, to_bound, to_plain = (
            statistics.median(other[k] / own[0] for other, own in zip(times[who], times[name]))
            for who, k in (("dense", 0), (name, 1), (name, 2)))
        work = 6 * models.count(net, data.side)[1] * size         # forward and twice that backward
        say(f"| {name} | {size / seconds:.0f} | {to_dense:.3f} | {size / bound:.0f} | "
            f"{to_bound:.3f} | {size / slow:.0f} | {to_plain:.2f} | {1000 * seconds:.1f} | "
            f"{work / seconds / peak:.1%} | {memory[name]:.0f} |")


# ---- the dense run -------------------------------------------------------------------------------

def run_folder(args):
    return args.out or os.path.join("runs", f"{args.dataset}-{args.arch}-s{args.seed}")


def the_recipe(args):
    """The settings of a dense run: the data set's recipe with what the command line says instead.
    """
    base = RECIPES[args.dataset]
    recipe = {"dataset": args.dataset, "arch": args.arch, "seed": args.seed, "subset": args.subset,
              "val_size": args.val_size, "pretrained": args.pretrained, "dry_run": args.dry_run}
    for key in ("schedule", "epochs", "batch_size", "lr", "momentum", "weight_decay", "milestones"):
        given = getattr(args, key)
        recipe[key] = base[key] if given is None else given
    if args.epochs == 0:             # the weights are torchvision's, trained by this recipe
        recipe["epochs"] = base["epochs"]
    if args.dry_run:
        recipe["epochs"] = min(recipe["epochs"], 2)
        recipe["batch_size"] = min(recipe["batch_size"], 16)
    if args.milestones is None or args.dry_run:      # the recipe's drops, at the same shares of T
        recipe["milestones"] = [m * recipe["epochs"] // base["epochs"] for m in base["milestones"]]
    elif recipe["schedule"] != "step":
        raise Refused("argument --milestones: belongs to --schedule step, not "
                      f"{recipe['schedule']}")
    elif sorted(set(recipe["milestones"])) != recipe["milestones"]:
        raise Refused("argument --milestones: must be ascending, each once")
    elif recipe["milestones"] and recipe["milestones"][-1] >= recipe["epochs"]:
        raise Refused(f"argument --milestones: {recipe['milestones'][-1]} is not within the "
                      f"{recipe['epochs']} epochs of the run")
    if recipe["schedule"] != "step":
        recipe["milestones"] = []
    return recipe


def summary(network, side):
    """Parameters and MACs as one phrase."""
    parameters, macs = models.count(network, side)
    return f"{parameters:,} parameters, {macs:,} MACs"


def check_batch(network, data, batch_size):
    """Refuse images that the network cannot take, and a last batch of one where its batch norm
    would have one value for each channel (VGG's Linear layers; small images): that cannot train."""
    count = len(data.train[1])
    shadow = copy.deepcopy(network).to("meta")
    for size in {min(count, batch_size), count % batch_size or batch_size}:
        try:
            shadow(torch.empty(size, 3, data.side, data.side, device="meta"))
        except ValueError:
            raise Refused(f"argument --batch-size: {count} images in batches of {batch_size} leave "
                          "a last batch of one, on which this network's batch norm cannot "
                          "train") from None
        except RuntimeError:
            raise Refused(f"argument --arch: this network cannot take images of {data.side} x "
                          f"{data.side} pixels") from None


def evaluate_file(args, machine):
    """train.py --evaluate: the test accuracy of any checkpoint."""
    checkpoint = models.read(args.evaluate, "dense", "pruned", "retrained")
    network = models.restore(checkpoint, args.evaluate).to(machine.device)
    data = load_data(checkpoint["recipe"], args.data_dir or checkpoint["data_dir"], machine.device,
                     args.dry_run, checkpoint, training=False)
    say(f"{args.evaluate}: test {evaluate(network, data, machine):.2f} %, "
        f"{summary(network, checkpoint['side'])}")


def pretrained(arch, classes):
    """torchvision's ImageNet network, always the V1 weights: DEFAULT is V2 for ResNet-50, trained
    with another recipe (80.86 against 76.13 %)."""
    from torchvision.models import get_model
    if arch not in models.IMAGENET or classes != 1000:
        raise Refused("argument --pretrained: torchvision has weights of "
                      f"{', '.join(models.IMAGENET)} for 1000 classes, not of {arch} for {classes}")
    try:
        return get_model(arch, weights="IMAGENET1K_V1")
    except (OSError, RuntimeError) as problem:
        raise Refused("argument --pretrained: the weights could not be downloaded "
                      f"({problem})") from None


def train(args):
    """The dense run: writes dense.pt, and the snapshots that weight rewinding needs."""
    machine = the_machine(args)
    if args.evaluate:
        return evaluate_file(args, machine)
    if args.benchmark:
        return benchmark(args, machine)
    recipe, folder = the_recipe(args), run_folder(args)
    target, state_path = os.path.join(folder, "dense.pt"), os.path.join(folder, "dense.state.pt")
    settings = {**recipe, "precision": "bf16" if machine.bf16 else "fp32"}
    if os.path.exists(target):
        done = models.read(target, "dense")
        if not done["recipe"]["dry_run"]:            # a dry run may be overwritten, a real one not
            same_run(settings, done["settings"], target)
            if not args.resume:
                raise Refused(f"{target}: this run is finished; --resume shows its result, --out "
                              "names another folder")
            say(f"{target}: finished, test {done['test_accuracy']:.2f} %")
            return None
    if os.path.exists(state_path) and not args.resume:
        raise Refused(f"{state_path}: an interrupted run is here; --resume goes on with it")
    with torch.device("meta"):
        models.build(args.arch, 10)                  # refuses unknown names before data are loaded
    data_dir = args.data_dir or "data"
    data = load_data(recipe, data_dir, machine.device, args.dry_run)
    network = (pretrained(args.arch, data.classes) if args.pretrained
               else models.build(args.arch, data.classes, recipe["seed"]))
    check_batch(network, data, recipe["batch_size"])
    counts = models.count(network, data.side)
    say(f"{args.arch} on {args.dataset} ({len(data.train[1])} training, {len(data.test[1])} test "
        f"images, {data.classes} classes): {summary(network, data.side)}; {machine.device}, "
        f"{settings['precision']}")
    every = args.snapshot_every or max(1, recipe["epochs"] // 18)
    keep = range(recipe["epochs"] % every, recipe["epochs"], every) if args.epochs != 0 else ()
    if machine.rank == 0:
        os.makedirs(folder, exist_ok=True)
    steps = math.ceil(len(data.train[1]) / recipe["batch_size"])
    curve, seconds = [], 0.0
    if args.epochs != 0:
        curve, seconds = fit(network, data, schedules.dense(recipe, steps), settings, machine,
                             state_path, resume=args.resume, save_every=args.save_every,
                             snapshots=keep)
    accuracy = (curve[-1]["test_accuracy"] if curve
                else evaluate(network.to(machine.device), data, machine))
    if machine.rank == 0:
        models.save(target, {
            "kind": "dense", "arch": args.arch, "classes": data.classes, "side": data.side,
            "mean": data.mean, "std": data.std, "data_dir": data_dir, "recipe": recipe,
            "settings": settings, "test_accuracy": accuracy, "dense_test_accuracy": accuracy,
            "dense_params": counts[0], "dense_macs": counts[1], "curve": curve, "seconds": seconds,
            "device": device_name(machine), "torch": str(torch.__version__),
            "model": dict(network.state_dict())})
        if os.path.exists(state_path):
            os.remove(state_path)
    kept = f" and {len(keep)} snapshots for weight rewinding" if len(keep) else ""
    say(f"test {accuracy:.2f} % after {len(curve)} epochs, {seconds:.0f} s. Wrote {target}{kept}. "
        f"Next: python prune.py {target}")


def device_name(machine):
    """The hardware's own name, for the record."""
    if machine.cuda:
        return torch.cuda.get_device_name(machine.device)
    try:
        with open("/proc/cpuinfo") as file:
            names = [line.split(":", 1)[1].strip() for line in file
                     if line.startswith("model name")]
        return f"{names[0]}, {torch.get_num_threads()} threads"
    except (OSError, IndexError):
        return "cpu"


def main(argv=None):
    flags = schedules.parser(__doc__)
    flags.add_argument("--dataset", choices=RECIPES, default="shapes")
    flags.add_argument("--arch", default="resnet8", help="resnet8, resnet20 … (6n+2), vgg16, "
                       "resnet18, resnet34, resnet50 (torchvision's)")
    flags.add_argument("--epochs", type=number(int, 0, 1e6), metavar="T")
    flags.add_argument("--batch-size", type=number(int, 2), metavar="B")
    flags.add_argument("--schedule", choices=schedules.DENSE,
                       help="of the dense run (default step)")
    schedules.recipe_flags(flags)
    flags.add_argument("--weight-decay", type=number(float, 0))
    flags.add_argument("--subset", type=number(int, 1),
                       help="train on a fixed, class-balanced part")
    flags.add_argument("--val-size", type=number(int, 0), default=0,
                       help="hold out so many training images and report them too")
    flags.add_argument("--seed", type=number(int, 0), default=0)
    flags.add_argument("--out", type=schedules.path, metavar="DIR",
                       help="default: runs/<dataset>-<arch>-s<seed>")
    flags.add_argument("--pretrained", action="store_true",
                       help="start from torchvision's V1 weights (--epochs 0: only evaluate and "
                            "write)")
    flags.add_argument("--snapshot-every", type=number(int, 1), metavar="K",
                       help="keep the weights K, 2K, … epochs before the end, for weight rewinding "
                            "(default T/18: the paper's budgets)")
    flags.add_argument("--evaluate", type=schedules.path, metavar="CHECKPOINT",
                       help="only evaluate this file")
    flags.add_argument("--benchmark", action="store_true", help="only measure the speed of a step")
    loop_flags(flags)
    machine_flags(flags)
    args = flags.parse_args(argv)
    if args.epochs == 0 and not args.pretrained:
        raise Refused("argument --epochs: 0 needs --pretrained")
    train(args)


if __name__ == "__main__":
    schedules.command(main)
