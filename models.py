"""The networks, their surgery and their files.

    import models
    network = models.load("runs/shapes-resnet8-s0/filters-magnitude-0.5.pt")  # true size, eval mode

A filter-pruned network is described by the shapes of its tensors (`resize`). So removing filters is
an operation on a state dict (`shrink`), and serves weights, rewound weights and momentum alike.
"""
import contextlib
import glob
import hashlib
import io
import os
import re
import textwrap
import uuid
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from schedules import Refused

FORMAT = 3                                                  # of checkpoints and of result rows
TORCHVISION = ("resnet18", "resnet34", "resnet50")          # its networks, in ImageNet's layout


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


def build(arch, classes, seed=0, pretrained=None):
    """A network by name: resnet18/34/50 (torchvision's, ImageNet layout), resnet{6n+2} (CIFAR
    layout), vgg16.

    classes     the number of classes
    seed        of the fresh weights (`initialise`); None leaves torch's own initialisation
    pretrained  None; "torchvision": its weights of ImageNet, with a fresh last layer for other than
                1000 classes; or a file with a state dict, see `read_weights`

    torchvision's weights are always V1: its default is V2 for ResNet-50, of another recipe (80.86
    against 76.13 %). Raises Refused for an unknown name, and for weights that are unavailable or do
    not fit."""
    depth = re.fullmatch(r"resnet([1-9]\d{0,3})", arch)
    if pretrained == "torchvision" and arch not in TORCHVISION:
        raise Refused("argument --pretrained: torchvision has weights of "
                      f"{', '.join(TORCHVISION)}, none of {arch}; name a file")
    if arch in TORCHVISION:
        network = torchvision_resnet(arch, classes, pretrained == "torchvision")
    elif arch == "vgg16":
        network = VGG16(classes)
    elif depth and 2 < int(depth[1]) <= 1202 and int(depth[1]) % 6 == 2:
        network = CifarResNet(int(depth[1]), classes)
    else:
        raise Refused(f"argument --arch: unknown network {arch!r}; known: resnet8, resnet20, "
                      f"resnet56 … resnet1202 (6n+2), {', '.join(TORCHVISION)}, vgg16")
    if pretrained == "torchvision":
        if classes != 1000:
            network.fc = initialise(nn.Linear(network.fc.in_features, classes), seed or 0)
    elif pretrained:
        read_weights(network, pretrained)
    elif seed is not None:
        initialise(network, seed)
    return network


def torchvision_resnet(arch, classes, pretrained):
    """torchvision's ResNet, if `pretrained` with its V1 weights and 1000 classes."""
    from torchvision.models import get_model    # here, because it takes two seconds to import
    if not pretrained:
        return get_model(arch, weights=None, num_classes=classes)
    try:
        return get_model(arch, weights="IMAGENET1K_V1")
    except (OSError, RuntimeError) as problem:
        raise Refused(f"argument --pretrained: cannot be fetched: {problem}") from None


def read_weights(network, path):
    """Load a state dict that other code has saved into `network`, in place.

    It may be bare or under "state_dict" or "model", its names with DataParallel's "module." in
    front or without. Raises Refused for a file that is no state dict, and for names or shapes that
    do not fit, naming the first few."""
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as problem:                # torch raises a dozen kinds, all with one meaning
        raise Refused(f"argument --pretrained: {path}: not a file of weights that torch.load reads "
                      f"with weights_only ({type(problem).__name__})") from None
    for key in ("state_dict", "model"):
        if isinstance(found, dict) and isinstance(found.get(key), dict):
            found = found[key]
    if not isinstance(found, dict):
        raise Refused(f"argument --pretrained: {path}: holds a {type(found).__name__}, "
                      "not a state dict")
    found = {str(name).removeprefix("module."): value for name, value in found.items()}
    try:
        network.load_state_dict(found)
    except RuntimeError as problem:             # the names that do not fit, perhaps hundreds
        raise Refused(f"argument --pretrained: {path}: {textwrap.shorten(str(problem), 400)}"
                      ) from None


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
    """Load `state` into `network`, resizing layers to the tensors' shapes. Returns the network, in
    eval mode.

    state: {name: tensor} as of `network.state_dict()`, filters taken out by `shrink`."""
    for name, value in state.items():
        where, _, key = name.rpartition(".")
        module = network.get_submodule(where)
        value = value.clone()
        if key in ("weight", "bias"):
            value = nn.Parameter(value, requires_grad=getattr(module, key).requires_grad)
        setattr(module, key, value)
        if key != "weight":
            continue
        if isinstance(module, nn.Conv2d):
            module.out_channels, module.in_channels = value.shape[:2]
        elif isinstance(module, nn.Linear):
            module.out_features, module.in_features = value.shape
        else:
            module.num_features = len(value)
    return network.eval()


def count(network, side):
    """(parameters, MACs: conv and linear, of one side x side image). Leaves it in eval mode."""
    image = next(network.parameters()).new_zeros(1, 3, side, side)
    with FlopCounterMode(display=False) as flops, torch.inference_mode():
        network.eval()(image)
    parameters = sum(p.numel() for p in network.parameters())
    return parameters, flops.get_total_flops() // 2


# ---- what can be pruned, and filter surgery ------------------------------------------------------

class Unit(NamedTuple):
    """One conv whose filters can be removed, with what else that touches (names in the network)."""
    conv: str
    bn: str
    reader: str     # the layer that reads its output
    stage: int      # 1, 2, … (VGG: between poolings)
    number: int     # the paper's conv id: the stem is 1; VGG: the conv's place, from 1


def prunable(network):
    """The prunable convs in order, a list of Unit (Li 2017).

    Raises Refused for a network whose filters cannot be removed here: who reads which filter has to
    be known, not guessed."""
    units = []
    if isinstance(network, CifarResNet) or from_torchvision(network):
        units = resnet_units(network)
    elif isinstance(network, VGG16):
        units = vgg_units(network)
    wrapped = [name for name, _ in network.named_parameters()  # weight_orig, parametrizations.…
               if not name.endswith(("weight", "bias"))]
    if not units or wrapped or not all(cuttable(network, unit) for unit in units):
        raise Refused(f"{type(network).__name__}: its filters cannot be removed here, only those "
                      "of models.build and of torchvision's ResNets without grouped convs; unwrap "
                      "a DataParallel (.module), make torch.nn.utils.prune's masks permanent "
                      "(prune.remove), and for others use Torch-Pruning")
    return units


def from_torchvision(module):
    """Is it one of the classes of torchvision's ResNets?"""
    return type(module).__module__ == "torchvision.models.resnet"


def resnet_units(network):
    """The first conv of each basic block, the first two of each bottleneck, so that the residual
    stream keeps its width."""
    units = []
    number = 1                                          # the stem
    for stage in (1, 2, 3, 4):
        layer = getattr(network, f"layer{stage}", nn.Identity())     # as if cut off
        for place, block in enumerate(layer.children()):
            if not isinstance(block, BasicBlock) and not from_torchvision(block):
                return []                               # somebody else's: who reads it?
            name = f"layer{stage}.{place}"
            convs = 3 if hasattr(block, "conv3") else 2
            for i in range(1, convs):
                units.append(Unit(f"{name}.conv{i}", f"{name}.bn{i}", f"{name}.conv{i + 1}",
                                  stage, number + i))
            number += convs
    return units


def vgg_units(network):
    """Every conv; the last one's reader is the first Linear."""
    units = []
    stage = 1
    layers = [str(i) for i, m in enumerate(network) if isinstance(m, (nn.Conv2d, nn.Linear))]
    for i, module in enumerate(network):
        if isinstance(module, nn.MaxPool2d):
            stage += 1
        elif isinstance(module, nn.Conv2d):
            number = len(units) + 1
            reader = layers[number]                 # counted from 0, so the one behind this conv
            units.append(Unit(str(i), str(i + 1), reader, stage, number))
    return units


def cuttable(network, unit):
    """Is a unit what it looks like? Not with another norm than BN, a conv with a bias, nor with
    grouped convs or a Linear that reads several pixels of a filter: these have other columns."""
    conv = network.get_submodule(unit.conv)
    columns = network.get_submodule(unit.reader).weight.shape[1]
    return (isinstance(network.get_submodule(unit.bn), nn.BatchNorm2d)
            and conv.bias is None and columns == conv.out_channels)


def shrink(state, units, keep):
    """Take filters out of a state dict: the conv's rows, its BN's vectors, its reader's columns.

    state  {name: tensor}; names that it lacks are passed over, so that a dict of momentum buffers
           is cut by the same call
    units  as of `prunable`
    keep   {conv name: int64 tensor of the filters that stay, ascending}

    Returns a new dict."""
    state = dict(state)

    def cut(name, index):
        if name in state:
            state[name] = state[name][index]

    for unit in units:
        if unit.conv in keep:
            rows = keep[unit.conv]
            cut(f"{unit.conv}.weight", rows)
            cut(f"{unit.reader}.weight", (slice(None), rows))
            for vector in ("weight", "bias", "running_mean", "running_var"):
                cut(f"{unit.bn}.{vector}", rows)
    return state


def weight_names(network, include_linear=True):
    """Names of the tensors that weight pruning can take from: all conv weights and, with
    `include_linear`, the Linear ones."""
    kinds = (nn.Conv2d, nn.Linear) if include_linear else nn.Conv2d
    return [f"{name}.weight" for name, m in network.named_modules() if isinstance(m, kinds)]


def digest(state):
    """16 hex digits that identify the tensors of a state dict."""
    total = hashlib.sha256()
    for name, value in state.items():
        total.update(name.encode() + value.detach().cpu().contiguous().numpy().tobytes())
    return total.hexdigest()[:16]


# ---- files ---------------------------------------------------------------------------------------
# A checkpoint is a dict: format, arch, classes, side, mean, std, data_dir, model (a state dict).
# Each script adds one key: `dense` (train.py), `pruning` (prune.py), `retraining` (retrain.py).
# Beside a run in progress lies its state (….state.pt): settings, curve, seconds, model, momentum.

def state_path(path):
    """Where the state of the run that will write the checkpoint `path` is kept in the meantime."""
    return os.path.splitext(path)[0] + ".state.pt"


def write(path, data):
    """Put bytes at `path` so that a reader sees the old file or the whole new one, never a part.

    Several processes may write one path: each has a temporary file of its own, and removes what
    killed ones left. Of the processes of torchrun only the first one writes."""
    if not first_process():
        return
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    while True:
        temporary = f"{path}.{uuid.uuid4().hex[:8]}.tmp"
        try:
            with open(temporary, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            with contextlib.suppress(FileNotFoundError):    # swept by a faster process: once more
                os.replace(temporary, path)
                break
        except OSError:                                     # the disk is full
            remove(temporary)
            raise
    sweep(path)


def first_process():
    """Is this the process that prints and writes: the only one, or torchrun's rank 0?"""
    return int(os.environ.get("RANK") or 0) == 0


def remove(path):
    """Remove a file, if it is there. Of the processes of torchrun only the first one does."""
    if first_process():
        with contextlib.suppress(OSError):      # another one was faster, or has it open
            os.unlink(path)


def sweep(start):
    """Remove the half-written files of killed writers, of all paths that begin with `start`."""
    for leftover in glob.glob(glob.escape(start) + ".*.tmp"):
        remove(leftover)


def tidy(path):
    """Remove what a finished run, or one that was killed, left beside its checkpoint `path`: the
    state, and half-written files."""
    remove(state_path(path))
    sweep(os.path.splitext(path)[0])


def save(path, checkpoint):
    """Write a checkpoint: `torch.save` bytes, then their SHA-256. Plain `torch.load(path)` opens
    it. Raises Refused for a tensor that is not finite."""
    def on_cpu(value):
        if isinstance(value, dict):
            return {k: on_cpu(v) for k, v in value.items()}
        if not isinstance(value, torch.Tensor):
            return value
        if not value.isfinite().all():
            raise Refused(f"{path}: not written, its weights are not finite; try a smaller --lr")
        return value.detach().cpu()

    buffer = io.BytesIO()
    torch.save({"format": FORMAT, **on_cpu(checkpoint)}, buffer)
    data = buffer.getvalue()
    write(path, data + hashlib.sha256(data).digest())


def read(path, key="model"):
    """The checkpoint dict at `path`, tensors on the CPU. Nothing but plain types is unpickled
    (weights_only). Raises Refused for a file that is not there, is damaged, of another format, or
    lacks `key`."""
    if not os.path.isfile(path):
        if os.path.isfile(state_path(path)):
            raise Refused(f"{path}: that run is not finished; run its command again first")
        raise Refused(f"{path}: no such checkpoint; train.py and prune.py write them")
    with open(path, "rb") as file:
        data = file.read()
    checkpoint = {}
    if hashlib.sha256(data[:-32]).digest() == data[-32:]:
        try:
            checkpoint = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
        except Exception:         # torch raises a dozen kinds, all with one meaning here
            pass
    if not isinstance(checkpoint, dict) or checkpoint.get("format") != FORMAT:
        raise Refused(f"{path}: not a checkpoint of format {FORMAT}, or damaged; remove it and run "
                      "the command that wrote it again")
    if key not in checkpoint:
        raise Refused(f"{path}: has no {key!r}, it is another kind of checkpoint")
    return checkpoint


def read_state(path):
    """The state of an unfinished run, or None if there is none."""
    try:
        return read(path, "momentum")
    except (Refused, FileNotFoundError):
        if os.path.isfile(path):
            raise
        return None         # none yet, or another process has just finished the same run


def restore(checkpoint):
    """The network of a checkpoint dict, at its true size, in eval mode."""
    with torch.device("meta"), torch.random.fork_rng(devices=[]):
        network = build(checkpoint["arch"], checkpoint["classes"], seed=None)
    return resize(network, checkpoint["model"])


def load(path):
    """The network of any checkpoint this project writes, a pruned one at its true size, in eval
    mode. Input: (n, 3, side, side) floats, normalised with the checkpoint's mean and std."""
    return restore(read(path, "dense"))
