"""The networks, their surgery and their files.

    import models
    network = models.load("runs/shapes-resnet8-s0/filters-magnitude-0.5.pt")  # true size, eval mode

A filter-pruned network needs no description: the shapes of its tensors are its description
(`from_state`). Removing filters is therefore an operation on a state dict, tensors by name
(`shrink`), and serves weights, rewound weights and their momentum alike.
"""
import copy
import hashlib
import io
import math
import os
import re
import zipfile
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from schedules import DENSE, Refused

FORMAT = 1
IMAGENET = ("resnet18", "resnet34", "resnet50")             # torchvision's
PRUNABLE_CONVS = {"BasicBlock": 1, "Bottleneck": 2}         # of a residual block, the first ones


# ---- networks ------------------------------------------------------------------------------------

class Shortcut(nn.Module):
    """Parameter-free shortcut (He 2016, option A): every second pixel, missing channels zero.

    The gradient flows through it; in the paper's published code it is detached by mistake.
    """
    def __init__(self, extra):
        super().__init__()
        self.extra = extra

    def forward(self, x):
        return F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 0, self.extra))


class BasicBlock(nn.Module):
    """Two 3x3 convs and the shortcut (He 2016), with torchvision's names for its parts."""
    def __init__(self, width, out):
        super().__init__()
        self.conv1 = nn.Conv2d(width, out, 3, 1 if width == out else 2, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out)
        self.conv2 = nn.Conv2d(out, out, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out)
        self.shortcut = nn.Identity() if width == out else Shortcut(out - width)

    def forward(self, x):
        y = F.relu(self.bn1(self.conv1(x)), inplace=True)
        return F.relu(self.bn2(self.conv2(y)) + self.shortcut(x), inplace=True)


class CifarResNet(nn.Module):
    """The 6n+2 ResNet of He et al. 2016 for small images."""
    def __init__(self, depth, classes):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        width = 16
        for stage, out in enumerate((16, 32, 64), 1):
            blocks = []
            for _ in range((depth - 2) // 6):
                blocks.append(BasicBlock(width, out))
                width = out
            self.add_module(f"layer{stage}", nn.Sequential(*blocks))
        self.fc = nn.Linear(64, classes)

    def forward(self, x):
        x = F.relu(self.bn1(self.conv1(x)), inplace=True)
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.fc(x.mean((2, 3)))


def vgg16(classes):
    """VGG-16 with batch norm for 32x32 images: 13 conv (no bias), Linear 512, BN, ReLU, Linear."""
    layers, width = [], 3
    for out in (64, 64, "M", 128, 128, "M", 256, 256, 256, "M",
                512, 512, 512, "M", 512, 512, 512, "M"):
        if out == "M":
            layers.append(nn.MaxPool2d(2))
        else:
            layers += [nn.Conv2d(width, out, 3, padding=1, bias=False), nn.BatchNorm2d(out),
                       nn.ReLU()]
            width = out
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(512, 512), nn.BatchNorm1d(512), nn.ReLU(),
                         nn.Linear(512, classes))


def build(arch, classes, seed=0):
    """A freshly initialised network by name: resnet18/34/50 (torchvision's, ImageNet layout),
    resnet{6n+2} (CIFAR layout), vgg16. Raises Refused for another name."""
    depth = re.fullmatch(r"resnet([1-9]\d{0,3})", arch)
    if arch in IMAGENET:
        from torchvision.models import resnet   # here, because it takes two seconds to import
        network = getattr(resnet, arch)(num_classes=classes)
    elif arch == "vgg16":
        network = vgg16(classes)
    elif depth and int(depth[1]) > 2 and int(depth[1]) % 6 == 2:
        network = CifarResNet(int(depth[1]), classes)
    else:
        raise Refused(f"argument --arch: unknown network {arch!r}; known: resnet8, resnet20, "
                      f"resnet56 … (6n+2), {', '.join(IMAGENET)}, vgg16")
    return initialise(network, seed)


def initialise(network, seed):
    """He initialisation, in place: conv weights normal with std sqrt(2 / (k*k*out)), as He 2016;
    BN at identity; Linear as torch. A function of the seed, whatever was drawn before."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for module in network.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif isinstance(module, (nn.Linear, nn.BatchNorm1d, nn.BatchNorm2d)):
                module.reset_parameters()
    return network


def from_state(arch, classes, state):
    """The network `arch` with the tensors of `state` and therefore with its widths, in eval mode.

    state: {name: tensor} as of `network.state_dict()`. Raises RuntimeError where the tensors do not
    make up such a network."""
    with torch.device("meta"), torch.random.fork_rng(devices=[]):
        network = build(arch, classes)
    for name, module in network.named_modules():
        weight = state.get(f"{name}.weight")
        if weight is None or not hasattr(module, "weight"):
            continue
        empty = {key: torch.empty_like(state[f"{name}.{key}"], device="meta")
                 for key in ("weight", "bias", "running_mean", "running_var")
                 if isinstance(state.get(f"{name}.{key}"), torch.Tensor)}
        for key, value in empty.items():
            if getattr(module, key, None) is not None:
                setattr(module, key, nn.Parameter(value) if key in ("weight", "bias") else value)
        if isinstance(module, nn.Conv2d):
            module.out_channels, module.in_channels = weight.shape[:2]
        elif isinstance(module, nn.Linear):
            module.out_features, module.in_features = weight.shape
        else:
            module.num_features = len(weight)
    network.load_state_dict({k: v.clone() for k, v in state.items()}, assign=True)
    return network.eval()


def count(network, side):
    """(parameters, MACs): MACs are the conv and linear multiply-adds of one side x side image."""
    shadow = copy.deepcopy(network).to("meta").eval()
    with FlopCounterMode(display=False) as flops, torch.inference_mode():
        shadow(torch.empty(1, 3, side, side, device="meta"))
    return sum(p.numel() for p in network.parameters()), flops.get_total_flops() // 2


# ---- what can be pruned, and filter surgery ------------------------------------------------------

class Unit(NamedTuple):
    """One conv whose filters can be removed, with what else that touches (names in the network)."""
    conv: str
    bn: str
    reader: str     # the layer that reads its output
    stage: int      # 1, 2, … (VGG: between poolings)
    number: int     # the paper's conv id: the stem is 1; VGG: the conv's place, from 1


def prunable(network):
    """The prunable convs in order (list of Unit): the first conv of a basic block, the first two of
    a bottleneck, so that the residual stream keeps its width (Li 2017); every conv of VGG-16."""
    units, number = [], 1
    for name, module in network.named_modules():
        inner = PRUNABLE_CONVS.get(type(module).__name__)
        if inner:
            stage = int(re.match(r"layer(\d+)", name)[1])
            units += [Unit(f"{name}.conv{i}", f"{name}.bn{i}", f"{name}.conv{i + 1}", stage,
                           number + i) for i in range(1, inner + 1)]
            number += inner + 1
    if not units:
        layers = [(i, m) for i, m in enumerate(network) if isinstance(m, (nn.Conv2d, nn.Linear))]
        units = [Unit(str(i), str(i + 1), str(layers[k + 1][0]),
                      1 + sum(isinstance(m, nn.MaxPool2d) for m in network[:i]), k + 1)
                 for k, (i, layer) in enumerate(layers) if isinstance(layer, nn.Conv2d)]
    return units


def shrink(state, units, keep):
    """Take filters out of a state dict: the conv's rows, its BN's vectors, its reader's columns.

    keep: {conv name: int64 tensor of the filters that stay, ascending}. Names that `state` lacks
    are passed over, so a dict of momentum buffers is cut by the same call. Returns a new dict."""
    state = dict(state)
    for unit in units:
        if unit.conv not in keep:
            continue
        rows = keep[unit.conv]
        for key in (f"{unit.conv}.weight",
                    *(f"{unit.bn}.{v}" for v in ("weight", "bias", "running_mean", "running_var"))):
            if key in state:
                state[key] = state[key][rows.to(state[key].device)]
        key = f"{unit.reader}.weight"
        if key in state:
            state[key] = state[key][:, rows.to(state[key].device)]
    return state


def weight_names(network, include_linear=False):
    """Names of the tensors that weight pruning ranks: all conv weights, optionally Linear ones."""
    kinds = (nn.Conv2d, nn.Linear) if include_linear else nn.Conv2d
    return [f"{name}.weight" for name, m in network.named_modules() if isinstance(m, kinds)]


def digest(state):
    """16 hex digits that identify the tensors of a state dict."""
    total = hashlib.sha256()
    for name, value in state.items():
        total.update(name.encode() + value.detach().cpu().contiguous().numpy().tobytes())
    return total.hexdigest()[:16]


# ---- files ---------------------------------------------------------------------------------------

def write(path, data):
    """Put bytes at `path` so that a reader sees the old file or the whole new one, never a part."""
    path = os.fspath(path)
    beside = f"{path}.{os.getpid()}.tmp"
    try:
        with open(beside, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    finally:
        if os.path.exists(beside):
            os.remove(beside)


def save(path, checkpoint):
    """Write a checkpoint: a dict of plain values and tensors. Serialised in memory first, so a full
    disk is one clean OSError. Readable by plain `torch.load(path)`."""
    def on_cpu(value):
        if isinstance(value, dict):
            return {k: on_cpu(v) for k, v in value.items()}
        return value.detach().cpu() if isinstance(value, torch.Tensor) else value
    buffer = io.BytesIO()
    torch.save({"format": FORMAT, **on_cpu(checkpoint)}, buffer)
    write(path, buffer.getbuffer())


REAL, PLAIN = (int, float), (int, float, str, list, type(None))
RECIPE = {"dataset": {"shapes", "cifar10", "cifar100", "folder", "imagenet"}, "arch": str,
          "seed": int, "subset": (int, type(None)), "val_size": int, "pretrained": bool,
          "dry_run": bool, "schedule": set(DENSE), "epochs": int, "batch_size": int, "lr": REAL,
          "momentum": REAL, "weight_decay": REAL, "milestones": [int]}
POINT = {"epoch": int, "lr": REAL, "train_loss": REAL, "train_accuracy": REAL,
         "test_accuracy": REAL}
COMMON = {"settings": {...: PLAIN}, "curve": [POINT], "seconds": REAL, "model": {...: torch.Tensor}}
NETWORK = {**COMMON, "arch": str, "classes": int, "side": int, "mean": [REAL], "std": [REAL],
           "data_dir": str, "recipe": RECIPE, "test_accuracy": REAL, "dense_test_accuracy": REAL,
           "dense_params": int, "dense_macs": int}
PRUNING = {"structure": {"filters", "weights"}, "method": str, "sparsity": [REAL], "seed": int,
           "plan": (str, type(None)), "scope": str, "include_linear": bool,
           "calibration_images": int}
PRUNED = {**NETWORK, "pruning": PRUNING, "params": int, "macs": int, "kept": {...: torch.Tensor},
          "removed": REAL, "distance": REAL, "dense_id": str}
FORMS = {"dense": NETWORK, "pruned": PRUNED, "retrained": {**PRUNED, "run": str},
         "state": {**COMMON, "data": str, "epoch": int, "step": int,
                   "momentum": {...: torch.Tensor}, "losses": torch.float64, "hits": torch.int64}}


def fits(value, form):
    """Is `value`, read from a file, of this form? A form is a type or several, a tensor's dtype, a
    set of values, a list of one form, or a dict of forms by name, with ... for every name. Numbers
    must be finite; torch.Tensor stands for what networks consist of, float32 and int64."""
    if isinstance(form, dict):
        return isinstance(value, dict) and (
            all(isinstance(k, str) and fits(v, form[...]) for k, v in value.items()) if ... in form
            else all(k in value and fits(value[k], f) for k, f in form.items()))
    if isinstance(form, list):
        return isinstance(value, list) and all(fits(v, form[0]) for v in value)
    if isinstance(form, set):
        return isinstance(value, str) and value in form
    if form is torch.Tensor or isinstance(form, torch.dtype):
        dtypes = (torch.float32, torch.int64) if form is torch.Tensor else (form,)
        return (isinstance(value, torch.Tensor) and value.dtype in dtypes
                and value.layout == torch.strided and bool(value.isfinite().all()))
    return isinstance(value, form) and not (isinstance(value, float) and not math.isfinite(value))


def read(path, *kinds):
    """The checkpoint dict at `path`, checked; tensors on the CPU.

    Every byte of content is covered by the zip's checksums, nothing but plain types is unpickled
    (weights_only), the contents have the form of their kind, which must be one of `kinds` if any
    are given. Raises Refused otherwise."""
    if not os.path.isfile(path):
        raise Refused(f"{path}: no such checkpoint; train.py and prune.py write them")
    checked = io.BytesIO()
    with open(path, "rb") as file:
        content = io.BytesIO(file.read())
    try:
        # A zip's index has no checksum, and torch's reader believes it: one flipped bit there makes
        # a tensor of whatever is in memory. So torch gets a new archive of the contents that were
        # checked.
        with zipfile.ZipFile(content) as archive, zipfile.ZipFile(checked, "w") as fresh:
            for name in set(archive.namelist()):
                fresh.writestr(name, archive.read(name))
        checked.seek(0)
        checkpoint = torch.load(checked, map_location="cpu", weights_only=True)
    except Exception as problem:  # torch and zipfile raise a dozen kinds, all with one meaning here
        raise Refused(f"{path}: not a checkpoint of this project, or damaged; write it again "
                      f"({type(problem).__name__})") from None
    if not fits(checkpoint, {"format": int, "kind": set(FORMS)}) or checkpoint["format"] != FORMAT:
        raise Refused(f"{path}: not a checkpoint of this project (format {FORMAT})")
    if not fits(checkpoint, FORMS[checkpoint["kind"]]):
        raise Refused(f"{path}: lacks parts of a {checkpoint['kind']} checkpoint, or they are of "
                      "another type or not finite; write it again")
    if kinds and checkpoint["kind"] not in kinds:
        raise Refused(f"{path}: is a {checkpoint['kind']} checkpoint, not {' or '.join(kinds)}")
    return checkpoint


def restore(checkpoint, path="checkpoint"):
    """The network of a checkpoint dict, in eval mode. Raises Refused where its tensors do not fit.
    """
    try:
        network = from_state(checkpoint["arch"], checkpoint["classes"], checkpoint["model"])
        count(network, checkpoint["side"])
        *_, last = (m for m in network.modules() if isinstance(m, nn.Linear))
        if last.out_features != checkpoint["classes"]:
            raise ValueError("classes")
    except (Refused, RuntimeError, KeyError, ValueError, TypeError, AttributeError, IndexError):
        raise Refused(f"{path}: its tensors do not make up the network it names "
                      f"({checkpoint.get('arch')})") from None
    return network


def load(path):
    """The network of any checkpoint this project writes, a pruned one at its true size, in eval
    mode. Input: (n, 3, side, side) floats, normalised with the checkpoint's mean and std."""
    return restore(read(path), path)
