"""The networks, their surgery and their files.

    import models
    network = models.load("runs/shapes-resnet8-s0/filters-magnitude-0.5.pt")  # true size, eval mode

A filter-pruned network is described by the shapes of its tensors (`resize`). So removing filters is
an operation on a state dict (`shrink`), and serves weights, rewound weights and momentum alike.
"""
import hashlib
import io
import os
import re
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from schedules import Refused

FORMAT = 2                                                  # of checkpoints and of result rows
IMAGENET = ("resnet18", "resnet34", "resnet50")             # torchvision's


# ---- networks ------------------------------------------------------------------------------------

class BasicBlock(nn.Module):
    """Two 3x3 convs and the shortcut (He 2016), with torchvision's names for its parts.

    The shortcut has no parameters (option A): every second pixel, missing channels zero. The
    gradient flows through it; in the paper's published code it is detached by mistake."""
    def __init__(self, width, out):
        super().__init__()
        self.extra = out - width
        self.conv1 = nn.Conv2d(width, out, 3, 2 if self.extra else 1, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out)
        self.conv2 = nn.Conv2d(out, out, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out)

    def forward(self, x):
        y = F.relu(self.bn1(self.conv1(x)), inplace=True)
        if self.extra:
            x = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 0, self.extra))
        return F.relu(self.bn2(self.conv2(y)) + x, inplace=True)


class CifarResNet(nn.Module):
    """The 6n+2 ResNet of He et al. 2016 for small images."""
    def __init__(self, depth, classes):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        for stage, width, out in ((1, 16, 16), (2, 16, 32), (3, 32, 64)):
            others = (BasicBlock(out, out) for _ in range((depth - 8) // 6))
            self.add_module(f"layer{stage}", nn.Sequential(BasicBlock(width, out), *others))
        self.fc = nn.Linear(64, classes)

    def forward(self, x):
        x = F.relu(self.bn1(self.conv1(x)), inplace=True)
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.fc(x.mean((2, 3)))


class VGG16(nn.Sequential):
    """VGG-16 with batch norm for 32x32 images: 13 conv (no bias), Linear 512, BN, ReLU, Linear."""
    def __init__(self, classes):
        super().__init__()
        width = 3
        for widths in ((64, 64), (128, 128), (256,) * 3, (512,) * 3, (512,) * 3):
            for out in widths:
                self.extend([nn.Conv2d(width, out, 3, padding=1, bias=False),
                             nn.BatchNorm2d(out), nn.ReLU()])
                width = out
            self.append(nn.MaxPool2d(2))
        self.extend([nn.Flatten(), nn.Linear(512, 512), nn.BatchNorm1d(512), nn.ReLU(),
                     nn.Linear(512, classes)])


def build(arch, classes, seed=0, pretrained=False):
    """A freshly initialised network by name: resnet18/34/50 (torchvision's, ImageNet layout),
    resnet{6n+2} (CIFAR layout), vgg16; with seed None it has torch's initialisation.

    pretrained: with torchvision's weights, always V1: its default is V2 for ResNet-50, of another
    recipe (80.86 against 76.13 %). Raises Refused for another name and if there are no weights."""
    depth = re.fullmatch(r"resnet([1-9]\d{0,3})", arch)
    if pretrained and (arch not in IMAGENET or classes != 1000):
        raise Refused(f"argument --pretrained: there are weights of {', '.join(IMAGENET)} for 1000 "
                      f"classes, none of {arch} for {classes}")
    if arch in IMAGENET:
        from torchvision.models import get_model    # here, because it takes two seconds to import
        try:
            network = get_model(arch, weights="IMAGENET1K_V1" if pretrained else None,
                                num_classes=classes)
        except (OSError, RuntimeError) as problem:
            raise Refused(f"argument --pretrained: cannot be fetched: {problem}") from None
    elif arch == "vgg16":
        network = VGG16(classes)
    elif depth and 2 < int(depth[1]) <= 1202 and int(depth[1]) % 6 == 2:
        network = CifarResNet(int(depth[1]), classes)
    else:
        raise Refused(f"argument --arch: unknown network {arch!r}; known: resnet8, resnet20, "
                      f"resnet56 … resnet1202 (6n+2), {', '.join(IMAGENET)}, vgg16")
    return network if pretrained or seed is None else initialise(network, seed)


def initialise(network, seed):
    """He initialisation, in place: conv weights normal with std sqrt(2 / (k*k*out)), as He 2016; BN
    at identity; Linear as torch. A function of the seed and of how the tensors lie in memory."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for module in network.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif isinstance(module, (nn.Linear, nn.BatchNorm1d, nn.BatchNorm2d)):
                module.reset_parameters()
    return network


def resize(network, state):
    """Give `network` the tensors of `state` and so their widths; returns it, in eval mode.

    state: {name: tensor} as of `network.state_dict()`, filters taken out by `shrink`."""
    for name, value in state.items():
        where, _, key = name.rpartition(".")
        module, value = network.get_submodule(where), value.clone()
        setattr(module, key, nn.Parameter(value) if key in ("weight", "bias") else value)
        if key == "weight" and isinstance(module, nn.Conv2d):
            module.out_channels, module.in_channels = value.shape[:2]
        elif key == "weight" and isinstance(module, nn.Linear):
            module.out_features, module.in_features = value.shape
        elif key == "weight":
            module.num_features = len(value)
    return network.eval()


def count(network, side):
    """(parameters, MACs: conv and linear, of one side x side image). Leaves it in eval mode."""
    image = next(network.parameters()).new_zeros(1, 3, side, side)
    with FlopCounterMode(display=False) as flops, torch.inference_mode():
        network.eval()(image)
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
    a bottleneck, so that the residual stream keeps its width (Li 2017); every conv of VGG-16.
    Raises Refused for any other network: who reads which filter has to be known, not guessed."""
    units, number = [], 1
    if isinstance(network, CifarResNet) or type(network).__module__ == "torchvision.models.resnet":
        for name, module in network.named_modules():
            inner = {"BasicBlock": 1, "Bottleneck": 2}.get(type(module).__name__)
            if inner:
                units += [Unit(f"{name}.conv{i}", f"{name}.bn{i}", f"{name}.conv{i + 1}",
                               int(name[5]), number + i) for i in range(1, inner + 1)]
                number += inner + 1
    elif isinstance(network, VGG16):
        layers = [(i, m) for i, m in enumerate(network) if isinstance(m, (nn.Conv2d, nn.Linear))]
        units = [Unit(str(i), str(i + 1), str(layers[k + 1][0]),
                      1 + sum(isinstance(m, nn.MaxPool2d) for m in [*network][:i]), k + 1)
                 for k, (i, layer) in enumerate(layers) if isinstance(layer, nn.Conv2d)]
    # Grouped convs, or a Linear that reads several pixels of a filter, have other columns.
    if not units or any(network.get_submodule(u.reader).weight.shape[1]
                        != network.get_submodule(u.conv).out_channels for u in units):
        raise Refused(f"{type(network).__name__}: its filters cannot be removed here, only those "
                      "of models.build and of torchvision's ResNets without grouped convs; unwrap "
                      "a DataParallel (.module), and for others use Torch-Pruning")
    return units


def shrink(state, units, keep):
    """Take filters out of a state dict: the conv's rows, its BN's vectors, its reader's columns.

    keep: {conv name: int64 tensor of the filters that stay, ascending}. Names that `state` lacks
    are passed over, so a dict of momentum buffers is cut by the same call. Returns a new dict."""
    state = dict(state)
    for unit in units:
        rows = keep.get(unit.conv, slice(None))
        stay = {f"{unit.conv}.weight": rows, f"{unit.reader}.weight": (slice(None), rows), **{
            f"{unit.bn}.{v}": rows for v in ("weight", "bias", "running_mean", "running_var")}}
        state |= {name: state[name][where] for name, where in stay.items() if name in state}
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
    """Put bytes at `path` so that a reader sees the old file or the whole new one, never a part.
    Of several processes (torchrun) only the first one writes."""
    if int(os.environ.get("RANK", 0)) > 0:
        return
    with open(f"{path}.tmp", "wb") as file:       # a killed writer's is written over by the next
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(f"{path}.tmp", path)


def save(path, checkpoint):
    """Write a checkpoint, a dict of plain values and tensors: `torch.save` bytes, then their
    SHA-256. Plain `torch.load(path)` opens it. Raises Refused for a tensor that is not finite."""
    def on_cpu(value):
        if isinstance(value, dict):
            return {k: on_cpu(v) for k, v in value.items()}
        if isinstance(value, torch.Tensor) and not value.isfinite().all():
            raise Refused(f"{path}: not written, its weights are not finite; try a smaller --lr")
        return value.detach().cpu() if isinstance(value, torch.Tensor) else value
    buffer = io.BytesIO()
    torch.save({"format": FORMAT, **on_cpu(checkpoint)}, buffer)
    data = buffer.getvalue()
    write(path, data + hashlib.sha256(data).digest())


def read(path, *kinds):
    """The checkpoint dict at `path`, tensors on the CPU. Nothing but plain types is unpickled
    (weights_only). Raises Refused for a damaged or foreign file, and for another kind than `kinds`,
    if any are given."""
    if not os.path.isfile(path):
        raise Refused(f"{path}: no such checkpoint; train.py and prune.py write them")
    with open(path, "rb") as file:
        data = file.read()
    try:
        whole = hashlib.sha256(data[:-32]).digest() == data[-32:]
        checkpoint = whole and torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
        known = checkpoint["format"] == FORMAT
    except Exception:             # torch raises a dozen kinds, all with one meaning here
        known = False
    if not known:
        raise Refused(f"{path}: not a checkpoint of format {FORMAT}, or damaged; write it again")
    if kinds and checkpoint["kind"] not in kinds:
        raise Refused(f"{path}: is a {checkpoint['kind']} checkpoint, not {' or '.join(kinds)}")
    return checkpoint


def restore(checkpoint):
    """The network of a checkpoint dict, at its true size, in eval mode."""
    with torch.device("meta"), torch.random.fork_rng(devices=[]):
        network = build(checkpoint["arch"], checkpoint["classes"], seed=None)
    return resize(network, checkpoint["model"])


def load(path):
    """The network of any checkpoint this project writes, a pruned one at its true size, in eval
    mode. Input: (n, 3, side, side) floats, normalised with the checkpoint's mean and std."""
    return restore(read(path, "dense", "pruned", "retrained"))
