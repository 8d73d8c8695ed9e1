"""Everything against oracles: torch's own schedulers and pruning, numpy, slow references, numbers
worked out by hand or published. No network, no data set, half a minute on two cores.

    python -m pytest -q
    python -m pytest -q -s -m speed     # images per second, a table; under three minutes
"""
import argparse
import atexit
import contextlib
import copy
import ctypes
import functools
import hashlib
import io
import itertools
import json
import math
import multiprocessing
import os
import pickle
import random
import re
import select
import shutil
import signal
import statistics
import struct
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image
from torch import nn
from torch.nn.utils import prune as torch_prune
from torch.optim import lr_scheduler
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.transforms import v2
from torchvision.transforms.functional import to_pil_image

import models
import prune
import retrain
import schedules
import train
from retrain import read_rows
from schedules import Refused

HERE, HOME = Path(train.__file__).parent, Path(tempfile.mkdtemp())
CPU = train.Machine(torch.device("cpu"))
atexit.register(shutil.rmtree, HOME, ignore_errors=True)
torch.set_num_threads(1)        # networks this small only make two threads wait for each other
DENSE = ["train", "--dataset", "folder", "--data-dir", HOME / "data", "--epochs", 3, "--lr", 0.05,
         "--batch-size", 2, "--milestones", 2, "--snapshot-every", 1, "--out"]

CIFAR = {"schedule": "step", "epochs": 160, "lr": 0.1, "milestones": [80, 120], "momentum": 0.9}


def lrs(name, epochs, steps=1, recipe=CIFAR, **more):
    at = schedules.retrain(name, epochs, steps, recipe, **more)
    return [at(s)[0] for s in range(epochs * steps)]


def on_meta(arch, plan=([0],), classes=10):
    """A network of shapes only, after a plan: its letter, or arguments of `filters_to_keep`."""
    with torch.device("meta"):
        network = models.build(arch, classes)
    return cut(network, prune.plan_of({"plan": plan}, arch) if isinstance(plan, str) else plan)


def cut(network, plan):
    keep = {c: torch.arange(k) for c, k in prune.filters_to_keep(network, *plan).items()}
    state = models.shrink(network.state_dict(), models.prunable(network), keep)
    return models.resize(network, state)


def noisy(arch, dtype=torch.float64):
    """A network at most 24 wide where it can be, whose batch norms have learned something."""
    network = on_meta(arch, ([24] * len(models.prunable(on_meta(arch))),)).to_empty(device="cpu")
    torch.manual_seed(0)
    for name, value in network.state_dict().items():
        value.copy_(torch.randn(value.shape) * (2 / value[0].numel()) ** 0.5 if value.dim() > 1
                    else 0.5 + torch.rand(value.shape) if re.search(r"running_var|weight", name)
                    else 0.3 * torch.randn(value.shape))
    return network.to(dtype)


def tiny_data(count=40, side=8):
    """Random images in memory as a `train.Data`, the training ones with their black border."""
    draw = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (count, 3, side, side), generator=draw, dtype=torch.uint8)
    labels = torch.arange(count) % 10
    return train.Data((F.pad(images, (4,) * 4), labels), (images, labels), side, 10,
                      [0.5, 0.4, 0.6], [0.25, 0.2, 0.3])


def fitted(network, data, at, epochs, folder, seed=0, batch_size=8, **more):
    """The curve of a whole `train.fit`."""
    wanted = {"epochs": epochs, "batch_size": batch_size, "weight_decay": 5e-4, "seed": seed}
    *_, (curve, _) = train.fit(network, data, at, wanted, CPU, f"{folder}/state.pt", **more)
    return curve


def dense_checkpoint(network=None, **recipe):
    recipe = {**CIFAR, "dataset": "shapes", "arch": "resnet8", "seed": 0, "pretrained": False,
              **recipe}
    return {"kind": "dense", "arch": "resnet8", "classes": 10, "side": 32, "recipe": recipe,
            "model": dict((network or models.build("resnet8", 10)).state_dict()),
            "settings": {"epochs": 4, "batch_size": 8, "weight_decay": 5e-4, "seed": 0}}


def pruned(checkpoint, structure="filters", sparsity=0.5, method="magnitude", **more):
    return prune.prune(checkpoint, {
        "method": method, "structure": structure, "sparsity": [sparsity], "plan": None, "seed": 0,
        "scope": "layer" if structure == "filters" else "global", "include_linear": False, **more})


# ---- schedules -----------------------------------------------------------------------------------

GOLDEN = """
e 0 1 3 7 8 20 32 36 40 54 60 71
lr_rewind .01 .01 .01 .01 .01 .01 .001 .001 .001 .001 .001 .001
slr .001 .005902041 .039485214 .1 .1 .1 .1 .1 .01 .01 .001 .001
one_cycle .001 .0056393861 .037699576 .099813971 .099962281 .090676733 .068009194 .058683488 \
.049032431 .017866459 .0082330837 6.8593579e-5
linear 0 .0046852657 .037063539 .099810679 .098764652 .08024628 .061727908 .055555117 \
.049382326 .027777559 .018518372 .0015431977
"""


def test_schedules_against_golden_values_and_torch():
    """All eight published digits; learning rate and momentum of torch's schedulers."""
    epochs, *lines = (line.split() for line in GOLDEN.strip().splitlines())
    for name, *values in lines:
        at = schedules.retrain(name, 72, 782, CIFAR)
        found = [at(782 * int(epoch)) for epoch in epochs[1:]]
        assert [float(f"{lr:.8g}") for lr, _ in found] == [*map(float, values)]
        assert name == "one_cycle" or {momentum for _, momentum in found} == {0.9}
    cycles = {n: lambda o, n=n: lr_scheduler.OneCycleLR(o, 0.1, n, div_factor=100, pct_start=0.1,
                                                        final_div_factor=100)
              for n in (2, 3, 9, 11, 37, 100, 300)}
    for kind, steps, count, make in (
            ("step", 7, 160, lambda o: lr_scheduler.MultiStepLR(o, [80, 120])),
            ("cosine", 7, 160, lambda o: lr_scheduler.CosineAnnealingLR(o, 160)),
            *(("one_cycle", 1, n, make) for n, make in cycles.items())):
        optimizer, wanted = torch.optim.SGD([torch.zeros(1)], 0.1, momentum=0.9), []
        scheduler, group = make(optimizer), optimizer.param_groups[0]
        for _ in range(count):
            wanted.append((group["lr"], group["momentum"]))
            optimizer.step()
            scheduler.step()
        at = schedules.dense({**CIFAR, "schedule": kind, "epochs": count}, steps)
        np.testing.assert_allclose([at(steps * e + e % steps) for e in range(count)], wanted, 1e-9)
        if kind == "one_cycle":
            assert lrs(kind, count) == [at(step)[0] for step in range(count)]


def test_every_budget_works_from_one_step_upwards():
    """Published ones divide by zero for short runs (SLR: t < 10; OneCycleLR: 10 steps)."""
    for kind in schedules.DENSE:
        for name in retrain.EVERY:
            for epochs, steps in ((1, 1), (1, 10), (2, 5), (9, 1), (10, 1), (19, 2), (200, 1)):
                values = lrs(name, epochs, steps, {**CIFAR, "schedule": kind}, distance=0.3)
                assert all(0 <= v <= 0.1 + 1e-12 for v in values), (kind, name, epochs, steps)
                assert kind != "step" or name == "linear" or max(values) > 0


def test_tails_stretches_and_drops():
    """LRW and WR: the dense run's tail; scratch: all of it, stretched; FT: its end. SLR drops at
    int(0.45 t) and int(0.675 t) after the warm-up; on ImageNet at int(0.297 t), int(0.594 t)."""
    dense = [schedules.dense(CIFAR, 1)(e)[0] for e in range(160)]
    for t in range(1, 161):
        assert lrs("lr_rewind", t) == dense[160 - t:] == lrs("weight_rewind", t)
    assert lrs("lr_rewind", 200, lr=9.0) == [0.1] * 40 + dense
    assert lrs("lr_rewind", 40) == lrs("finetune", 40)               # claim C5, by construction
    for name in ("scratch", "scratch_e", "scratch_b"):
        assert lrs(name, 80) == dense[::2] and lrs(name, 320, 3)[::6] == dense
    for kind in ("linear", "one_cycle"):
        recipe, whole = {**CIFAR, "schedule": kind}, lrs(kind, 160, 3)
        assert lrs("scratch", 80, 3, recipe) == lrs(kind, 80, 3)
        assert lrs("lr_rewind", 80, 3, recipe) == whole[240:]
        assert lrs("finetune", 1, 3, recipe) == whole[-3:-2] * 3
    imagenet = {**CIFAR, "epochs": 90, "milestones": [30, 60]}
    for recipe, shares in ((CIFAR, (0.45, 0.675)), (imagenet, (0.297, 0.594))):
        for t in (40, 45, 56, 72, 88, 104, 120, 136, 152):
            values, warmup = lrs("slr", t, recipe=recipe), int(0.1 * t)
            drops = [e for e in range(warmup + 1, t) if values[e] < values[e - 1] / 2]
            assert drops == [warmup + int(share * t) for share in shares]
            assert values[0] == pytest.approx(0.001) and max(values) == 0.1
    values = lrs("slr", 40, recipe={"schedule": "cosine", "lr": 0.1, "epochs": 160}, lr=0.2)
    wanted = [0.1 * (1 + math.cos(math.pi * min(int(k / 36 * 160), 159) / 160)) for k in range(36)]
    assert values[4:] == pytest.approx(wanted)


@pytest.mark.parametrize("name, epochs, steps, recipe, more, wanted", [
    # ALLR peaks at clip(LR_max d / sqrt(removed), min(t/T, 1) LR_max, LR_max)
    ("adaptive_linear", 16, 50, CIFAR, {"distance": 0.05, "removed": 0.5}, {80: 0.01}),
    ("adaptive_linear", 16, 50, CIFAR, {"distance": 0.3, "removed": 0.36}, {80: 0.05}),
    ("adaptive_linear", 16, 50, CIFAR, {"distance": 0.5, "removed": 0.25}, {80: 0.1}),
    ("adaptive_linear", 320, 50, CIFAR, {"distance": 0.0, "removed": 0.0}, {1600: 0.1}),
    ("adaptive_linear", 16, 50, CIFAR, {}, {80: 0.1}),
    ("one_cycle", 10, 10, CIFAR, {"lr": 0.2, "end_lr": 0.001, "cycle_momentum": False},
     {9: 0.2, 99: 0.001}),
    ("one_cycle", 10, 10, None, {"lr": 0.1}, {9: 0.1, 99: 1e-5}),
    ("linear", 10, 10, {}, {"lr": 0.2, "end_lr": 0.02}, {10: 0.2, 55: 0.11}),
    ("linear", 2, 2, {}, {"lr": 0.2}, {0: 0.2, 1: 0.15, 2: 0.1, 3: 0.05}),
    ("slr", 9, 1, CIFAR, {"lr": 0.2}, {0: 0.2, 3: 0.2, 4: 0.02, 6: 0.002}),
    ("finetune", 2, 1, None, {"end_lr": 0.02}, {0: 0.02, 1: 0.02}),
    ("finetune", 2, 1, CIFAR, {"end_lr": 0}, {0: 0}), ("finetune", 2, 1, CIFAR, {}, {1: 0.001}),
    ("finetune", 2, 1, {"schedule": "constant", "lr": 0.3}, {}, {0: 0.3, 1: 0.3}),
    *((name, 8, 5, {"schedule": "cosine", "lr": 0.1, "epochs": 16}, {}, {})
      for name in schedules.RETRAIN),
    *((name, 8, 5, recipe, {}, words) for name, recipe, words in (
        ("one_cycle", None, "'lr'"), ("linear", {}, "'lr'"), ("finetune", None, "'epochs'"),
        ("slr", {"lr": 0.1, "epochs": 9}, "'milestones'"), ("lr_rewind", {}, "'epochs'"),
        ("scratch", {}, "'epochs'"), ("adaptive_linear", {"lr": 0.1}, "'epochs'"),
        ("clr", CIFAR, "unknown schedule 'clr'.*finetune")))])
def test_schedules_ask_for_what_they_need_and_no_more(name, epochs, steps, recipe, more, wanted):
    if isinstance(wanted, str):
        with pytest.raises(Refused, match=wanted):
            lrs(name, epochs, steps, recipe)
    else:
        values, at = (f(name, epochs, steps, recipe, **more) for f in (lrs, schedules.retrain))
        assert {step: values[step] for step in wanted} == pytest.approx(wanted)
        assert at(0)[1] == (0.95 if name == "one_cycle" and len(more) < 3 else 0.9)


def test_the_printed_table_and_the_curves_in_blocks(capsys):
    for values, width, wanted in ((range(8), 60, "▁▂▃▄▅▆▇█"), ([3, 3], 60, "▁▁"),
                                  ([7, 0, 9, 9, 0, 0, 7, 0], 4, "▆█▁▆"), ([1, 0], 1, "▁")):
        assert schedules.blocks(values, width) == wanted
    assert len(schedules.blocks([0] * 61)) == 60
    schedules.main([])
    head, *rows = capsys.readouterr().out.split("\n\nlearning rate")[0].splitlines()
    assert head.split() == ["epoch", *schedules.RETRAIN] and len(rows) == 72
    assert len({tuple(m.end() for m in re.finditer(r"\S+", row)) for row in (head, *rows)}) == 1
    assert rows[1].split() == "1 .001 .01 .01 .00590204 .00563939 .00468527 .00468527 .1".replace(
        " .", " 0.").split()
    schedules.main("--epochs 4 --dense-epochs 8 --milestones 4 6 --lr 1".split())
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert lines[-7::6] == ["lr_rewind ██▁▁ 0.1 0.01", "scratch ██▂▁ 1 0.01"]


# ---- networks and pruning ------------------------------------------------------------------------

R56, R110, R34 = (16, 18, 20, 34, 38, 54), (36, 38, 74), (2, 8, 14, 16, 26, 28, 30, 32)
PLANS = {
    "resnet56": {"A": ((.1, .1, .1), (16, 20, 38, 54)), "B": ((.6, .3, .1), R56),
                 "C": ((.6, .5, .4), R56), "D": ((.6, .6, .6), R56), "I": ((.1, .15, .2), ())},
    "resnet110": {"A": ((.5, 0, 0), (36,)), "B": ((.5, .4, .3), R110), "C": ((.5, .5, .5), R110),
                  "D": ((.5, .6, .7), R110)},
    "resnet34": {"A": ((.3, .3, .3, 0), R34), "B": ((.5, .6, .4, 0), R34)},
    "vgg16": {"A": ((32, 64, 128, 128, *[256] * 9),), "C": ((32, 64, 64, *[128] * 4, *[196] * 6),),
              "B": ((32, 64, 128, 128, *[196] * 5, *[256] * 4),)}}


@pytest.mark.parametrize("arch, plan, params, macs", [
    ("resnet20", ([0],), 269_722, 40_551_040), ("resnet32", ([0],), 464_154, 68_862_592),
    ("resnet56", ([0],), 853_018, 125_485_696), ("resnet56", "B", 735_712, 90_907_264),
    ("resnet110", "B", 1_168_424, 155_124_352), ("vgg16", ([0],), 14_987_722, 313_463_808),
    ("vgg16", "A", 5_397_034, 206_279_680), ("resnet56", "A", 773_336, 112_435_840),
    ("resnet34", "A", 20.152e6, 3_663_761_408 * .8462),           # published, Li 2017
    ("resnet34", "B", 19.469e6, 3_663_761_408 * .7594),
    ("resnet50", ([0],), 25_557_032, 4_089_184_256),
    ("resnet50", ([.7, .7, .75, .75],), 7_961_423, 4_089_184_256 * .26664)])
def test_counts_of_networks_and_plans(arch, plan, params, macs):
    side, classes = (224, 1000) if arch in models.IMAGENET else (32, 10)
    found = models.count(on_meta(arch, plan, classes), side)
    assert found[0] == pytest.approx(params, abs=500 if isinstance(params, float) else 0)
    assert found[1] == pytest.approx(macs, rel=1e-4 if isinstance(macs, float) else 0)


def test_plans_and_what_is_prunable():
    """The stem is conv 1; ResNets: even ids, two of three in a bottleneck; VGG: all, by pooling."""
    assert prune.PLANS == PLANS
    network = on_meta("resnet56")
    for left in (691_234, 549_646, 443_410, 354_940, 286_666, 233_548, 180_430, 137_410):
        network = cut(network, PLANS["resnet56"]["I"])               # eight rounds
        assert sum(p.numel() for p in network.parameters()) == left
    for arch, numbers, stages in (("resnet20", range(2, 20, 2), "111222333"),
                                  ("resnet50", [n for n in range(2, 50) if n % 3 != 1],
                                   "1" * 6 + "2" * 8 + "3" * 12 + "4" * 6),
                                  ("vgg16", range(1, 14), "1122333444555")):
        units = models.prunable(on_meta(arch))
        assert [u.number for u in units] == [*numbers]
        assert "".join(str(u.stage) for u in units) == stages
    network, ten = on_meta("resnet8"), on_meta("resnet8", ([10, 10, 10],))
    for net, shares, skipped, widths in (
            (network, [.5], (), [8, 16, 32]), (network, [.5, 0, .99], (), [8, 32, 1]),
            (network, [.7], (4,), [4, 32, 19]), (network, [4, 99, 5], (), [4, 32, 5]),
            (ten, [.9, .7, .4], (), [1, 3, 6])):                        # 1, not 10 * 0.0999…
        assert [*prune.filters_to_keep(net, shares, skipped).values()] == widths
    for plan, arch, words in (("I", "vgg16", "no plan I for vgg16; known: A B C"),
                              ("B", "resnet8", "for resnet8; plans exist for resnet56, resnet110"),
                              (([.5, .5],), "resnet8", "--sparsity: 2 values.*give 1 or 3"),
                              *(([0], name, f"--arch: unknown network '{name}'") for name in (
                                  "resnet2", "resnet9", "resnet1208", "resnet08", "resnet20x"))):
        with pytest.raises(Refused, match=words):
            on_meta(arch, plan)


def test_initialisation_is_hes_and_the_shortcut_passes_the_gradient():
    """A function of the seed; detached, as published, the stem learns nothing through it."""
    one, same, other = (models.build("resnet20", 10, seed).state_dict() for seed in (3, 3, 4))
    assert models.digest(one) == models.digest(same) != models.digest(other)
    weight = one["layer3.0.conv1.weight"]                                # in: 32, out: 64
    assert weight.std().item() == pytest.approx(math.sqrt(2 / (9 * 64)), rel=0.02)
    x = torch.randn(2, 16, 8, 8, requires_grad=True)
    y = models.BasicBlock(16, 32).shortcut(x)
    assert torch.equal(y[:, :16], x[:, :, ::2, ::2]) and not y[:, 16:].any()
    y.sum().backward()
    assert y.shape == (2, 32, 4, 4) and (x.grad[:, :, ::2, ::2] == 1).all() and x.grad.sum() == 512


@pytest.mark.parametrize("arch", ["resnet20", "vgg16", "resnet18", "resnet34", "resnet50"])
def test_a_shrunk_network_computes_what_the_zeroed_one_computes(arch):
    """Removed filters, and their batch norms, zeroed in the original: same outputs in float64."""
    network = noisy(arch).eval()
    before = models.digest(network.state_dict())
    small, keep = prune.shrunk(network, 0.3), prune.choose_filters(network, ([0.3],))
    assert models.digest(network.state_dict()) == before and not small.training
    for unit in models.prunable(network):
        weight, bn = network.get_parameter(f"{unit.conv}.weight"), network.get_submodule(unit.bn)
        stays = torch.zeros(len(weight), dtype=torch.bool)
        stays[keep[unit.conv]] = True
        norms, conv = weight.abs().sum((1, 2, 3)), small.get_submodule(unit.conv)
        assert stays.sum() == int(len(weight) * 0.7) and norms[~stays].max() <= norms[stays].min()
        assert (conv.out_channels, conv.in_channels) == conv.weight.shape[:2]
        assert len(conv.weight) == small.get_submodule(unit.bn).num_features == stays.sum()
        for value in (weight, bn.weight, bn.bias, bn.running_mean):
            value.data[~stays] = 0
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    torch.testing.assert_close(small(x), network(x), rtol=1e-9, atol=1e-9)
    assert torch.equal(small(x), models.from_state(arch, 10, small.state_dict())(x))


def test_networks_that_cannot_be_cut_are_refused_in_one_line():
    with torch.device("meta"):
        nets = [getattr(torchvision.models, name)() for name in (
            "mobilenet_v2", "vgg11_bn", "densenet121", "resnext50_32x4d")]
        nets += [nn.DataParallel(torchvision.models.resnet18()), nn.Sequential(
            nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(32, 10))]
    for network in nets:
        with pytest.raises(Refused, match="^[^\n]*cannot be removed[^\n]*Torch-Pruning$"):
            prune.shrunk(network)


def test_weight_pruning_is_torchs_cumulative_and_leaves_something():
    """Globally, and layer by layer; what is pruned stays pruned, whatever the method."""
    dense, network = dense_checkpoint(), models.build("resnet8", 10)
    for linear, scope in ((False, "global"), (True, "global"), (True, "layer")):
        network = models.restore(dense)
        layers = [(m, "weight") for m in network.modules()
                  if isinstance(m, nn.Conv2d) or linear and isinstance(m, nn.Linear)]
        for some in [layers] if scope == "global" else [[layer] for layer in layers]:
            torch_prune.global_unstructured(some, torch_prune.L1Unstructured, amount=0.8)
        masks = {n[:-5]: b.bool() for n, b in network.named_buffers() if n.endswith("_mask")}
        found = pruned(dense, "weights", 0.8, scope=scope, include_linear=linear)
        for name, value in dense["model"].items():
            assert torch.equal(found["model"][name], value * masks.get(name, 1))
    names = models.weight_names(models.restore(dense))
    total = sum(dense["model"][n].numel() for n in names)
    for method in ("magnitude", "random"):
        first = pruned(dense, "weights", 0.3, method)
        second = pruned(first, "weights", 0.51, method, seed=5)
        weights = {n: second["model"][n] for n in names}
        assert sum((w == 0).sum().item() for w in weights.values()) == round(0.51 * total)
        assert not any(w[first["model"][n] == 0].any() for n, w in weights.items())
        assert second["dense_id"] == models.digest(dense["model"]) == first["source"]
    left = [(weights[n] != 0).double().mean().item() for n in names[1:]]
    assert left == pytest.approx([0.49] * 6, abs=0.05)             # uniform, not by layer size
    prune.check_sparsity(weights, 0.51)
    for sparsity, reason in ((0.5099, "0.5100 are zero already; .*cumulative"),
                             (1 - 0.4 / total, f"of {total} weights leaves none")):
        with pytest.raises(Refused, match=reason):
            prune.weight_masks(weights, weights, sparsity)


def test_criteria_against_single_sample_gradients_and_numpy():
    """Taylor: mini-batches of 64, here 64 and 6; OBD: single images; HRank: after the ReLU."""
    network, name = noisy("resnet8").eval(), "layer3.0.conv1.weight"
    x, y = torch.randn(70, 3, 16, 16, dtype=torch.float64), torch.arange(70) % 10
    weight = network.get_parameter(name)
    single = torch.stack([torch.autograd.grad(F.cross_entropy(network(x[i:i + 1]), y[i:i + 1]),
                                              weight)[0] * weight.detach() for i in range(70)])
    means, squares = torch.stack([g.mean(0) for g in single.split(64)]), (single ** 2).mean(0) / 2
    stream = network.layer2(network.layer1(F.relu(network.bn1(network.conv1(x)))))
    maps = F.relu(network.layer3[0].bn1(network.layer3[0].conv1(stream))).detach()
    for method, structure, reference in (
            ("taylor", "weights", (means ** 2).mean(0)), ("obd", "weights", squares),
            ("taylor", "filters", (means.sum((2, 3, 4)) ** 2).mean(0)),
            ("obd", "filters", squares.sum((1, 2, 3))),
            ("hrank", "filters", torch.tensor(np.linalg.matrix_rank(maps.numpy()).mean(0)))):
        scores = prune.saliency(network, method, structure, [name], calibration=(x, y))
        torch.testing.assert_close(scores[name].double(), reference, rtol=1e-6, atol=1e-14)


# ---- data ----------------------------------------------------------------------------------------

def test_augmentation_against_a_slow_reference_and_its_draws_are_uniform():
    """Pad with black, crop, flip, sample by sample, in numpy; chi-square over the 81 offsets."""
    data, draws = tiny_data(50), train.epoch_draws(0, 3, 50)
    for found, i, (dy, dx), flip in zip(train.augment(data.train[0], *draws), *draws):
        padded = np.pad(data.test[0][i].numpy(), ((0, 0), (4, 4), (4, 4)))
        crop = padded[:, dy:dy + 8, dx:dx + 8]
        assert np.array_equal(found, crop[:, :, ::-1] if flip else crop)
    order, crop, flip = train.epoch_draws(0, 0, 50_000)
    assert torch.equal(order.sort().values, torch.arange(50_000))
    counts = torch.bincount(crop[:, 0] * 9 + crop[:, 1]).double()
    chi2 = ((counts - 50_000 / 81) ** 2 / (50_000 / 81)).sum().item()
    assert len(counts) == 81 and abs(chi2 - 80) < 6 * math.sqrt(160)
    assert abs(flip.double().mean().item() - 0.5) < 6 * 0.5 / math.sqrt(50_000)
    one, *others = (train.epoch_draws(*k, 99)[0] for k in ((5, 7), (5, 7), (5, 8), (6, 7)))
    assert [torch.equal(one, other) for other in others] == [True, False, False]


def test_batches_show_each_image_once_and_ranks_share_them():
    """Normalised as torchvision does; the last batch, of one image, is everybody's."""
    data, draws = tiny_data(33), train.epoch_draws(0, 2, 33)
    whole = list(train.train_batches(data, 0, 2, 8, CPU))
    x, y = (torch.cat(parts) for parts in list(zip(*whole))[:2])
    torch.testing.assert_close(x, v2.Normalize(data.mean, data.std)(train.augment(
        data.train[0], *draws) / 255))
    assert torch.equal(y, data.train[1][draws[0]]) and sorted(draws[0].tolist()) == [*range(33)]
    assert [(len(y), n, w) for _, y, n, w in whole] == [(8, 8, 1)] * 4 + [(1, 1, 1)]
    assert whole[0][0].is_contiguous(memory_format=torch.channels_last)

    def ranks(count, epoch, world):
        return [list(train.train_batches(tiny_data(count), 0, epoch, 8, CPU._replace(
            rank=rank, world=world))) for rank in range(world)]
    for (x, y, *_), zero, one in zip(whole[:-1], *ranks(33, 2, 2)):
        assert torch.equal(x[0::2], zero[0]) and torch.equal(y[1::2], one[1])
    for count, world, wanted in (
            (33, 2, [[(4, 1)] * 4 + [last] for last in ((1, 2), (0, 0))]),
            (14, 3, [[(3, 9 / 8), (2, 1)], [(3, 9 / 8), (2, 1)], [(2, 6 / 8), (2, 1)]])):
        assert [[b[2:] for b in rank] for rank in ranks(count, 0, world)] == wanted


# ---- the loop ------------------------------------------------------------------------------------

def by_torch(network, data, at, epochs):
    """A loop written with torch.optim.SGD, contiguous tensors and .item(): (loss, accuracy)."""
    optimizer = torch.optim.SGD(network.train().parameters(), 0.1, 0.9, weight_decay=5e-4)
    group, found, count = optimizer.param_groups[0], [], len(data.train[1])
    for epoch in range(epochs):
        losses, right = [], 0
        for x, y, *_ in train.train_batches(data, 0, epoch, 8, CPU):
            group["lr"], group["momentum"] = at(epoch * math.ceil(count / 8) + len(losses))
            out = network(x.contiguous())
            loss = F.cross_entropy(out, y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item() * len(y))
            right += (out.argmax(1) == y).sum().item()
        found.append((pytest.approx(sum(losses) / count, rel=1e-3), 100 * right / count))
    return found


def test_the_loop_is_plain_sgd_and_goes_on_where_it_was_left(tmp_path):
    data, network = tiny_data(20), models.build("resnet8", 10)
    reference, start = copy.deepcopy(network), copy.deepcopy(network)
    at = schedules.retrain("one_cycle", 3, 3, lr=0.05)
    curve = fitted(network, data, at, 3, tmp_path, keep=[2])
    wanted = by_torch(reference, data, at, 3)
    assert [(p["train_loss"], p["train_accuracy"]) for p in curve] == wanted
    assert [(p["epoch"], p["lr"]) for p in curve] == [(e + 1, at(3 * e)[0]) for e in range(3)]
    for one, other in zip(network.state_dict().values(), reference.state_dict().values()):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3)
    right = (network(train.normalise(data.test[0], data)).argmax(1) == data.test[1]).sum().item()
    assert curve[-1]["test_accuracy"] == 100 * right / 20
    assert sorted(os.listdir(tmp_path)) == ["epoch-002.pt", "state.pt"]
    os.replace(tmp_path / "epoch-002.pt", tmp_path / "state.pt")    # as if stopped after epoch 2
    assert fitted(start, data, at, 3, tmp_path) == curve
    assert models.digest(start.state_dict()) == models.digest(network.state_dict())
    with pytest.raises(Refused, match="another run; it differs in seed .here 1, there 0"):
        fitted(start, data, at, 3, tmp_path, seed=1)


def test_pruned_weights_stay_exactly_zero(tmp_path):
    """With momentum and weight decay; torch's masks as the oracle, in training too."""
    dense, data = dense_checkpoint(), tiny_data()
    network, momentum, masks = retrain.start(retrain.Run("", "one_cycle", 1, 0),
                                             pruned(dense, "weights", 0.8))
    reference, at = models.restore(dense), schedules.retrain("one_cycle", 1, 5, CIFAR)
    torch_prune.global_unstructured([(m, "weight") for m in reference.modules() if isinstance(
        m, nn.Conv2d)], torch_prune.L1Unstructured, amount=0.8)
    fitted(network, data, at, 1, tmp_path, masks=masks, momentum=momentum)
    by_torch(reference, data, at, 1)
    for name in models.weight_names(network):
        layer, weight = reference.get_submodule(name[:-7]), network.get_parameter(name)
        assert torch.equal(weight != 0, layer.weight_mask.bool())
        torch.testing.assert_close(weight, layer.weight_orig * layer.weight_mask,
                                   rtol=1e-3, atol=1e-4)


def test_weight_rewinding_takes_the_dense_runs_state(tmp_path, monkeypatch):
    """Weights, BN buffers and momentum at epoch T - t; filters or masks of the final weights."""
    data, recipe = tiny_data(), {**CIFAR, "epochs": 4, "milestones": [2, 3]}
    network, draws = models.build("resnet8", 10), train.epoch_draws
    fitted(network, data, schedules.dense(recipe, 5), 4, tmp_path, keep=[2])
    half, dense = models.read(tmp_path / "epoch-002.pt"), dense_checkpoint(network, **recipe)
    small, masked, whole = pruned(dense), pruned(dense, "weights", 0.9), pruned(dense, "weights", 0)

    def start(checkpoint, epochs=2, schedule="weight_rewind"):
        return retrain.start(retrain.Run(f"{tmp_path}/p.pt", schedule, epochs, 7), checkpoint)
    (rewound, held, masks), kept = start(small), small["kept"]["layer2.0.conv1"]
    for found, state in ((rewound.state_dict(), half["model"]), (held, half["momentum"])):
        for key, rows in (("conv1.weight", (kept,)), ("bn1.bias", (kept,)),
                          ("conv2.weight", (slice(None), kept))):
            assert torch.equal(found[f"layer2.0.{key}"], state[f"layer2.0.{key}"][rows])
    rewound, _, masks = start(masked)
    for name, mask in masks.items():
        assert torch.equal(rewound.get_parameter(name), half["model"][name] * mask)
    for epochs in (4, 9):                                       # epoch 0 needs no snapshot
        rewound, held, _ = start(whole, epochs)
        assert not held and models.digest(rewound.state_dict()) == models.digest(
            models.build("resnet8", 10).state_dict())
    with pytest.raises(Refused, match="needs .*epoch-001.pt.*not kept .but epoch-002.pt"):
        start(whole, 3)
    scratch = start(small, 2, "scratch_e")[0].layer3[0].conv2.weight        # 64 x 32 x 3 x 3
    assert scratch.std().item() == pytest.approx(math.sqrt(2 / (9 * 64)), rel=0.02)
    # Unpruned, the rewound run is the dense run's second half, to the bit: momentum included.
    rewound, held, masks = start(whole)
    monkeypatch.setattr(train, "epoch_draws", lambda seed, epoch, n: draws(seed, epoch + 2, n))
    os.remove(tmp_path / "state.pt")
    fitted(rewound, data, schedules.retrain("weight_rewind", 2, 5, recipe), 2, tmp_path,
           masks=masks, momentum=held)
    assert models.digest(rewound.state_dict()) == models.digest(network.state_dict())


TEN = [2.412608, 2.218201, 2.335646, 2.259424, 2.326382, 2.284078, 2.22813, 2.127188, 2.107529,
       2.315349]                              # losses of ten steps of one_cycle


def test_pruned_checkpoints_say_what_is_left_and_how_far_they_moved():
    """`kept` counts from the dense network; distance and removed are Zimmer's."""
    dense, stem = dense_checkpoint(), "layer1.0.conv1"
    twice, names = pruned(pruned(dense), sparsity=0.25, method="random"), models.weight_names(
        models.restore(dense))
    assert [len(k) for k in twice["kept"].values()] == [6, 12, 24]
    assert torch.equal(twice["model"][stem + ".weight"],
                       dense["model"][stem + ".weight"][twice["kept"][stem]])
    assert (twice["params"], twice["macs"]) == models.count(models.restore(twice), 32)
    for one in (pruned(dense, "weights", 0.7), pruned(dense)):
        before, after = (np.concatenate([c["model"][n].double().flatten() for n in names])
                         for c in (dense, one))
        assert one["removed"] == pytest.approx(1 - (after != 0).sum() / len(before))
        assert one["distance"] == pytest.approx(math.sqrt(
            1 - np.linalg.norm(after) ** 2 / np.linalg.norm(before) ** 2))
    assert [round(*retrain.later({"structure": "weights", "sparsity": [.3]}, r), 2)
            for r in range(1, 10)] == [.3, .51, .66, .76, .83, .88, .92, .94, .96]


def test_filters_by_score():
    """Globally: by what a layer's scores are of their L2 norm, 374, 0.906 and 1e-9; the best of
    each layer stays. Random scores are a function of the seed: those of the study's runs."""
    scores = {"a": torch.tensor([100., 300., 200.]), "b": torch.tensor([.1, .9]),
              "c": torch.tensor([1e-9])}
    for scope, counts, kept in (("global", (1, 1, 1), [[1], [1], [0]]),
                                ("global", (2, 2, 0), [[1, 2], [1], [0]]),
                                ("global", (0, 5, 0), [[0, 1, 2], [1], [0]]),
                                ("layer", (2, 1, 1), [[1, 2], [1], [0]])):
        found = prune.keep_filters(scores, dict(zip("abc", counts)), scope)
        assert [found[c].tolist() for c in "abc"] == kept
    assert prune.keep_filters({"a": torch.ones(4)}, {"a": 2})["a"].tolist() == [0, 1]
    for more, widths in (({}, [8, 16, 32]), ({"plan": ([4, 5, 6],)}, [4, 5, 6])):
        small = prune.shrunk(models.build("resnet8", 10), **more)
        assert [small.get_submodule(u.conv).out_channels for u in models.prunable(small)] == widths
    for seed, kept in ((0, [0, 1, 2, 5, 7, 8, 14, 15]), (1, [0, 4, 5, 6, 9, 12, 13, 14])):
        found = prune.choose_filters(on_meta("resnet8"), ([0.5],), "random", seed=seed)
        assert found["layer1.0.conv1"].tolist() == kept


@pytest.mark.parametrize("side", [32, 65])
def test_folders_are_what_torchvision_reads(tmp_path, side):
    """In memory, or, if large, decoded by any number of workers to the same batches."""
    draw = np.random.default_rng(0)
    for part, count in (("train/a", 3), ("train/b", 5), ("val/a", 3), ("val/b", 5)):
        os.makedirs(tmp_path / part)
        for i in range(count):
            Image.fromarray(draw.integers(0, 256, (side, side, 3), np.uint8)).save(
                tmp_path / part / f"{i}.png")
    recipe = {"dataset": "folder", "subset": 6, "test_subset": None}
    data = train.load_data(recipe, str(tmp_path), CPU.device)
    assert (data.classes, data.train[1].tolist()) == (2, [0, 0, 0, 1, 1, 1])
    resize = [] if side == 32 else [v2.Resize(256), v2.CenterCrop(224)]
    plain = v2.Compose([*resize, v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True),
                        v2.Normalize(data.mean, data.std)])
    (x, y), = train.plain_batches(data.test, torch.arange(8), data, CPU)
    for i, (image, label) in enumerate(torchvision.datasets.ImageFolder(tmp_path / "val")):
        torch.testing.assert_close(x[i], plain(image))
        assert y[i] == label
    if side == 32:
        raw = data.train[0][:, :, 4:-4, 4:-4].double() / 255
        assert data.mean == pytest.approx(raw.mean((0, 2, 3)).tolist())
        assert data.std == pytest.approx(raw.std((0, 2, 3), correction=0).tolist())
        assert data.train[0].double().sum() == pytest.approx(255 * raw.sum().item())  # border: 0
        return
    assert (data.mean, data.std) == ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    none, two, other = ([x for x, *_ in train.train_batches(data, 0, epoch, 3, CPU._replace(
        workers=workers))] for epoch, workers in ((1, 0), (1, 2), (2, 0)))
    for x, same, later in zip(none, two, other):
        assert torch.equal(x, same) and not torch.equal(x, later) and x.shape == (3, 3, 224, 224)


def test_generated_images_subsets_and_files_that_are_refused(tmp_path):
    (images, labels), again, other = (train.shapes(200, seed) for seed in (0, 0, 1))
    assert labels.bincount().tolist() == [20] * 10 and torch.equal(images, again[0])
    assert len(torch.unique(torch.cat([images, other[0]]).flatten(1), dim=0)) == 400
    record = [21, 53, 121, 61, 93, 28, 144, 159, 155, 95, 76, 75, 185, 159, 87, 160, 139, 135]
    found = images[::37, :, 9, 20].flatten().int()              # the pictures of the study's runs
    assert images.shape == (200, 3, 32, 32) and (found - torch.tensor(record)).abs().max() <= 1
    data = tiny_data()
    images, labels = data.train
    texts = {train.fingerprint(data._replace(train=part)) for part in (
        (images, labels), (images + 1, labels), (images, labels + 1))}
    assert len(texts) == 3 and {t[:-8] for t in texts} == {"40 images, 10 classes, 8 pixels, "}
    labels = np.repeat(np.arange(10), 100)[::-1]
    chosen = train.balanced(labels, 205)
    assert len(set(chosen)) == 205 and sorted(np.bincount(labels[chosen])) == [20] * 5 + [21] * 5
    assert [*train.balanced(labels, 1000)] == [*range(1000)]
    with pytest.raises(Refused, match="--subset: 1001"):
        train.balanced(labels, 1001)
    for depth, reason in ((16, "16 bits a channel"), (8, "not a readable image")):
        header = struct.pack(">I4sIIB", 13, b"IHDR", 8, 8, depth)
        (tmp_path / "bad.png").write_bytes(b"\x89PNG\r\n\x1a\n" + header)
        with pytest.raises(Refused, match=f"bad.png: .*{reason}"):
            train.decode(f"{tmp_path}/bad.png")


class Operations(TorchDispatchMode):
    """Counts what makes the host wait for a device, and what makes float64 tensors."""
    waits = doubles = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out, name = function(*args, **kwargs or {}), function.overloadpacket.__name__
        self.waits += name in ("_local_scalar_dense", "nonzero", "masked_select", "equal")
        self.doubles += isinstance(out, torch.Tensor) and out.dtype == torch.float64
        return out


def test_no_step_waits_for_the_device(tmp_path, monkeypatch):
    """Values that leave a tensor are as many in an epoch of two steps as in one of eight; float64,
    which some devices lack, is only in the sum of an epoch's losses, on the host."""
    left, seen = [], []
    for name in ("tolist", "numpy", "cpu"):
        plain = getattr(torch.Tensor, name)
        monkeypatch.setattr(torch.Tensor, name,
                            lambda self, *a, plain=plain: left.append(1) or plain(self, *a))
    monkeypatch.setattr(models, "save", lambda *_: None)
    for size in (16, 4):
        left.clear()
        with Operations() as found:
            fitted(models.build("resnet8", 10), tiny_data(32), lambda step: (0.1, 0.9), 1, tmp_path,
                   batch_size=size)
        seen.append((len(left), found.waits, found.doubles))
    assert seen[0] == seen[1] and seen[0][::2] == (2, 2)


def test_ten_steps_and_bf16_with_weights_statistics_and_loss_in_float32(tmp_path):
    """Ten losses of one_cycle do not change unnoticed. Autocast computes the convolutions in
    bfloat16; the step is the same within its 8 bits."""
    at, losses, kinds = schedules.retrain("one_cycle", 10, 1, lr=.01), [], []
    began = time.perf_counter()
    curve = fitted(models.build("resnet8", 10), tiny_data(8), at, 10, tmp_path)
    seconds = models.read(tmp_path / "state.pt")["seconds"]
    assert 0 < seconds < time.perf_counter() - began and train.clock(3725) == "1:02:05"
    assert [p["train_loss"] for p in curve] == pytest.approx(TEN, rel=1e-4)
    x, y, *_ = next(train.train_batches(tiny_data(32), 0, 0, 32, CPU))
    for bf16 in (False, True):
        network = models.build("resnet8", 10)
        network.layer1[0].conv1.register_forward_hook(lambda m, i, out: kinds.append(out.dtype))
        optimizer = train.optimizer_of(network, 1e-4)
        optimizer.param_groups[0]["lr"] = 0.01
        losses.append(torch.stack([train.train_step(
            network, optimizer, x, y, CPU._replace(bf16=bf16))[0] for _ in range(3)]))
    tensors = [*network.state_dict().values(), losses[1],
               *(s["momentum_buffer"] for s in optimizer.state.values())]
    assert {t.dtype for t in tensors if t.is_floating_point()} == {torch.float32}
    assert kinds == 3 * [torch.float32] + 3 * [torch.bfloat16]
    torch.testing.assert_close(losses[1], losses[0], rtol=0.02, atol=0.02)
    assert not torch.equal(losses[1], losses[0])


def test_evaluation_counts_each_image_once_however_it_is_shared(monkeypatch):
    """Two ranks' counts, added up as all_reduce adds them, are one process's count."""
    data, network, counts = tiny_data(1100), noisy("resnet8", torch.float32).eval(), []
    right = (network(train.normalise(data.test[0], data)).argmax(1) == data.test[1]).sum().item()
    assert train.evaluate(network.train(), data, CPU) == 100 * right / 1100
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda value: counts.append(value.item()))
    for rank in (0, 1):
        train.evaluate(network, data, CPU._replace(rank=rank, world=2))
    assert sum(counts) == right and min(counts) > 0
    x, y = prune.calibration_of({"method": "obd", "seed": 0, "calibration_images": 30}, data, CPU)
    plain = train.normalise(data.test[0], data)                 # neither crop nor flip; all others
    where = [(plain == image).flatten(1).all(1).nonzero().item() for image in x]
    assert len(set(where)) == 30 and torch.equal(y, data.train[1][where])


def test_recipes_and_their_defaults():
    """The paper's; other epochs have their drops at the same shares, none before epoch 1."""
    base = {"schedule": "step", "epochs": 160, "batch_size": 64, "lr": 0.1, "milestones": [80, 120],
            "momentum": 0.9, "weight_decay": 1e-4, "retrain": 40}
    assert train.RECIPES == {
        **dict.fromkeys(("cifar10", "cifar100", "folder"), base),
        "shapes": {**base, "epochs": 16, "milestones": [8, 12], "weight_decay": 5e-4, "retrain": 5},
        "imagenet": {**base, "epochs": 90, "batch_size": 256, "milestones": [30, 60],
                     "retrain": 45}}
    assert train.CIFAR_STATISTICS == ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010))

    def made(given):
        return train.the_recipe(argparse.Namespace(**{
            **dict.fromkeys([*base, "subset"]), "dataset": "shapes", "arch": "resnet8", "seed": 0,
            "pretrained": False, "dry_run": False, **given}))
    for given, *wanted in (
            ({}, 16, [8, 12], 64), ({"epochs": 1}, 1, [], 64), ({"epochs": 2}, 2, [1], 64),
            ({"epochs": 3}, 3, [1, 2], 64), ({"epochs": 8}, 8, [4, 6], 64),
            ({"epochs": 0}, 16, [8, 12], 64), ({"epochs": 5, "milestones": [1, 4]}, 5, [1, 4], 64),
            ({"milestones": []}, 16, [], 64), ({"schedule": "cosine", "batch_size": 9}, 16, [], 9),
            ({"dataset": "imagenet", "epochs": 9}, 9, [3, 6], 256), ({"dry_run": True}, 2, [1], 8)):
        assert [made(given)[k] for k in ("epochs", "milestones", "batch_size")] == wanted
    for given in ({"milestones": [12, 8]}, {"milestones": [8, 16]}, {"milestones": [8, 8]},
                  {"milestones": [8], "schedule": "linear"}):
        with pytest.raises(Refused, match="--milestones: (must ascend|belongs to --schedule step)"):
            made(given)


def made_up(method, schedule, accuracies, budget=4, **more):
    """Result rows, one for each accuracy and seed; their curves climb by 1 an epoch."""
    same = {"dataset": "cifar10", "arch": "resnet56", "plan": "B", "structure": "filters",
            "scope": "layer", "sparsity": None, "round": 1, "include_linear": False, "lr": None,
            "end_lr": None, "cycle_momentum": None, "dense": "d", "pruning_seed": 0,
            "dense_test_accuracy": 93.0, "removed": 0.5, "params": 25, "dense_params": 100,
            "macs": 10, "dense_macs": 40, "nonzero": 20, "seconds": 60.0, "device": "cpu",
            "threads": 1, "precision": "fp32", "torch": "2", "commit": "c"}
    return [{**same, "method": method, "schedule": schedule, "budget": budget, "seed": seed,
             "test_accuracy": a, "curve": [{"lr": 0.1 ** e, "test_accuracy": a - budget + e}
                                           for e in range(1, budget + 1)], **more}
            for seed, a in enumerate(accuracies)]


def test_verdicts():
    """Sample sd 0.1 and n = 3: the interval is 4.303 * 0.1 / sqrt(3) = 0.25 to each side."""
    for freedom, value in ((1, 12.7062), (2, 4.30265), (4, 2.77645), (9, 2.26216), (1000, 1.96234)):
        assert retrain.t_quantile(freedom) == pytest.approx(value, rel=1e-5)
    for mean, sd, relation, words in (
            (.6, .1, ">", "**yes** +0.60 [+0.35, +0.85]"), (0, 1, "<=", "not decided +0.00"),
            (-.6, .1, ">", "**no** -0.60 [-0.85, -0.35]"), (0, 1, "=", "not decided +0.00"),
            (0, .1, ">", "not decided +0.00"), (0, .1, "=", "**yes** +0.00 [-0.25, +0.25]"),
            (.6, .1, "=", "**no** +0.60"), (-.6, .1, "=", "**no** -0.60"),
            (0, .1, "<=", "**yes** +0.00"), (.6, .1, "<=", "**no** +0.60 [+0.35, +0.85]"),
            (-2, .1, "<=", "**yes** -2.00 [-2.25, -1.75]")):             # lost accuracy
        found = retrain.verdict([mean - sd, mean, mean + sd], relation)
        assert found.startswith(words) and found.endswith("], n = 3")
    assert retrain.verdict([.5, .5], ">") == "not decided +0.50, n = 2"


def test_differences_are_paired_and_claims_leave_out_arms_that_were_not_run():
    rows = [*made_up("l1", "one_cycle", [1, 2, 3]), *made_up("l1", "finetune", [0, 5]),
            *made_up("l1", "one_cycle", [9] * 3, 8), *made_up("random", "one_cycle", [7]),
            *made_up("l1", "finetune", [30, 10], 2),
            *made_up("l1", "finetune", [1] * 3, 8, dense="e"),
            *made_up("l1", "finetune", [1], 8, pruning_seed=1)]
    bare = [*made_up("l1", "one_cycle", [50, 60], removed=0),
            *made_up("random", "finetune", [40], removed=0)]
    for terms, *found in (
            ("+m one_cycle, -m finetune", 4, [1, -3]), ("+m slr, -m finetune", None, []),
            ("+m finetune, -m finetune first", 4, [-30, -5]),
            ("+m one_cycle, -m dense", 8, [-84] * 3), ("+random one_cycle, -c finetune", 4, [7]),
            ("+m one_cycle, -- one_cycle", 4, [-49, -58]),
            ("+m one_cycle, -m finetune, -- one_cycle, +- finetune", 4, [1 - 50 + 40])):
        assert retrain.differences(terms, rows, "l1", rows + bare) == tuple(found)
    rows = [*made_up("l1", "finetune", [92.5, 92.6, 92.4]), *made_up("random", "slr", [92.9]),
            *made_up("l1", "one_cycle", [93.1, 93.2, 93.0]),
            *made_up("random", "one_cycle", [92.9]),
            *made_up("l1", "one_cycle", [92.9], lr=.2, end_lr=0., cycle_momentum=False)]
    control = "control: one_cycle/lr=0.2/end=0/flat-momentum >"
    found = [line.split(" | ") for line in retrain.claims(rows).splitlines()[2:]]
    assert {(network, t) for _, network, _, t, _ in found} == {("resnet56 filters plan B", "4")}
    assert [f"{claim} | {m} {re.search('[+-][0-9.]+', words)[0]}"
            for claim, _, m, _, words in found] == [
        "| C2 one_cycle > finetune | l1 +0.60", "| C2 one_cycle > slr | random +0.00",
        "| C4 one_cycle > dense | l1 +0.10", "| C4 one_cycle > dense | random -0.10",
        "| C4 finetune < dense | l1 +0.50",
        "| C6 random + one_cycle > c + finetune | l1 +0.40",
        "| C7 c > random under one_cycle | l1 +0.20",
        f"| {control} one_cycle | l1 -0.20", f"| {control} finetune | l1 +0.40"]


def test_the_report_to_the_digit():
    """Mean, sample sd, difference to dense, n, what is left; charts and curves at the budget with
    the most arms, without scratch; shorter budgets of finetune out of its curve."""
    rows = [*made_up("l1", "finetune", [92, 93, 94.5]), *made_up("random", "slr", [93.5]),
            *made_up("l1", "slr", [93, 94], 2), *made_up("l1", "scratch", [9], 8),
            *made_up("l1", "slr", [90], structure="weights", plan=None, sparsity=.5, round=2,
                     include_linear=True, macs=40), *made_up("random", "slr", [1], 2, removed=0)]
    text = retrain.report(rows)
    for line in (
            "9 retrainings, 9 minutes of a process; cpu, 1 threads, fp32, torch 2, code c.",
            "| pruned | by | params / MACs left | t | n | finetune | slr | scratch |",
            "| filters plan B | l1 | 25% / 25% | 2 | 2–3 | 91.17 ± 1.26 (-1.83) | "
            "93.50 ± 0.71 (+0.50) | – |",
            "| filters plan B | l1 | 25% / 25% | 4 | 3 | 93.17 ± 1.26 (+0.17) | – | – |",
            "| filters plan B | random | 25% / 25% | 4 | 1 | – | 93.50 (+0.50) | – |",
            "| weights 0.5 layer +linear round 2 | l1 | 20% / 100% | 4 | 1 | – | "
            "90.00 (-3.00) | – |",
            "| nothing | random | 25% / 25% | 2 | 1 | – | 1.00 (-92.00) | – |",
            "| C1 slr > finetune | resnet56 filters plan B | l1 | 2 | not decided +3.00, n = 2 |",
            "Learning rate by epoch, resnet56 on cifar10, filters plan B by l1, t = 4: "
            "blue finetune.", '    x-axis "epoch" 1 --> 4', "    line [90.5, 91.5, 92.5, 93.5]",
            '    y-axis "Learning rate" 0 --> 0.105', "    line [0.1, 0.01, 0.001, 0.0001]",
            '    y-axis "Test accuracy (%)" 90.35 --> 93.65'):
        assert line in text.split("\n"), (line, text)
    assert text.count("Learning rate by") == 1 and text.count("```mermaid") == 5
    assert retrain.in_blocks(rows[3:6]).splitlines() == [
        "filters plan B by random, t = 4: test accuracy by epoch, its largest, its last",
        "  slr              ▁▃▆█ 93.50 93.50",
        "filters plan B by l1, t = 2: test accuracy by epoch, its largest, its last",
        "  slr              ▁█ 93.50 93.50"]
    small = retrain.chart("T", 4, "y", {"finetune": [1e-5, 0.1], "slr": [0, 1]})
    assert small.startswith("T: blue finetune, red slr.\n") and "line [0.00001, 0.1]\n" in small


# ---- helpers -------------------------------------------------------------------------------------

def call(script, *argv):
    """(status, stdout, stderr) of a command line, in this process; a warning is an error."""
    out, err = (io.TextIOWrapper(io.BytesIO(), "utf-8", write_through=True) for _ in range(2))
    main, argv, status = sys.modules[script].main, [str(a) for a in argv], 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), \
            warnings.catch_warnings(action="error"):
        try:
            main(argv) if script == "schedules" else train.command(lambda: main(argv))
        except SystemExit as end:
            status = end.code or 0
    return status, *(s.buffer.getvalue().decode() for s in (out, err))


def ok(*command):
    """The stdout of a command line that has to succeed."""
    status, out, err = call(*command)
    assert (status, err) == (0, "")
    return out


def pictures(folder, seed=0, side=8, **counts):
    """So many random images of each class."""
    draw = np.random.default_rng(seed)
    for label, i in ((label, i) for label, count in counts.items() for i in range(count)):
        (folder / label).mkdir(parents=True, exist_ok=True)
        pixels = torch.from_numpy(draw.integers(0, 256, (3, 8, side), dtype=np.uint8))
        to_pil_image(pixels).save(folder / label / f"{i}.png")


@functools.cache
def study():
    """HOME/data: ten tiny images, in five steps an epoch; HOME/other: others; HOME/run: a dense
    network of three epochs, pruned both ways. Tests work on copies of it."""
    for i, name in enumerate(("data", "other")):
        pictures(HOME / name / "train", seed=i, a=5, b=5)
        pictures(HOME / name / "test", seed=i + 2, a=10, b=10)
    ok(*DENSE, HOME / "run")
    for kind in ("filters", "weights"):
        ok("prune", HOME / "run/dense.pt", "--structure", kind, "--method", "magnitude", "--out",
           HOME / f"run/{kind}.pt")
    return HOME / "run"


def command(folder, name, pruned=None, *more):
    """The command line of an arm in `folder`/run: "dense", or a schedule and what to retrain."""
    if study() and name == "dense":
        return [*DENSE, folder / "run", *more]
    if not (folder / "run").exists():
        shutil.copytree(study(), folder / "run")
    return ["retrain", folder / f"run/{pruned}.pt", "--schedule", name, "--epochs", 2, "--seed", 0,
            "--jobs", 1, *more]


def content(folder):
    """{(file, entry): value} of all that a run left, tensors as bytes; not how long it took."""
    def plain(value):
        if isinstance(value, dict):
            return {k: plain(v) for k, v in value.items() if k != "seconds"}
        return value.numpy().tobytes() if isinstance(value, torch.Tensor) else value
    rows = {("row", n): json.dumps({**r, "seconds": 0}) for n, r in read_rows(folder).items()}
    return rows | {(path.name, key): value for path in folder.glob("*.pt")
                   for key, value in plain(models.read(path)).items()}


def differing(one, other):
    return [k for k in {**one, **other} if one.get(k) != other.get(k)]


@functools.cache
def undisturbed(name, pruned=None):
    ok(*command(HOME / f"{name}-{pruned}", name, pruned))
    return content(HOME / f"{name}-{pruned}/run")


def listing(folder):
    """Every file and folder; of files the time of change and the size, too."""
    return {str(p): p.is_file() and (p.stat().st_mtime_ns, p.stat().st_size)
            for p in folder.rglob("*") if p.name != ".lock-journal"}


@contextlib.contextmanager
def nth(module, name, number, instead=None):
    """Inside, call `number` (from 0) of module.name is `instead(real, its arguments)`, or a signal
    of that number comes. Yields the list of calls."""
    real, seen = getattr(module, name), []

    def counted(*args, **named):
        seen.append(args)
        if len(seen) - 1 != number:
            return real(*args, **named)
        return os.kill(os.getpid(), instead) if isinstance(instead, int) else instead(real, *args)
    setattr(module, name, counted)
    try:
        yield seen
    finally:
        setattr(module, name, real)


def fork(work):
    """The process id of a copy of this process that does `work()`."""
    child = os.fork() if hasattr(os, "fork") else pytest.skip("no fork here")
    if not child:
        try:
            work()
        finally:
            os._exit(1)
    return child


# ---- the three scripts in a row ------------------------------------------------------------------

@pytest.fixture(scope="module")
def dry(tmp_path_factory):
    """(folder of dry runs, what retrain.py would do without arguments). As on Windows: no fcntl, no
    resource, nothing to load the C library with."""
    runs, real = [], ctypes.CDLL.__init__
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("dry"))
        patch.setattr(train, "shapes", functools.cache(train.shapes))
        patch.setattr(ctypes.CDLL, "__init__", lambda self, name, *more, **named: real(
            self, name + "", *more, **named))
        patch.setitem(sys.modules, "fcntl", None)
        patch.setitem(sys.modules, "resource", None)
        patch.delattr(os, "sched_getaffinity", raising=False)
        assert retrain.cores() == os.cpu_count()
        for argv in (["train"], ["prune"], ["retrain", "--seed", 0, "--jobs", 1, "--schedule",
                                            *retrain.EVERY]):
            ok(*argv, "--dry-run")
        with nth(retrain, "retrain_all", 0, lambda real, found, *_: runs.extend(found)):
            ok("retrain", "--dry-run")
        return Path("runs/shapes-resnet8-s0-dry").absolute(), runs


def test_the_scripts_chain_without_arguments(dry):
    """Every schedule, and all that a row says."""
    folder, runs = dry
    made = [f"runs/{folder.name}/filters-{m}-0.5.pt" for m in ("magnitude", "random")]
    assert set(runs) == set(itertools.product(made, retrain.DEFAULT, [1], range(3)))
    rows, dense = read_rows(folder), models.read(folder / "dense.pt", "dense")
    assert [(r["method"], r["schedule"]) for r in rows.values()] == [
        *itertools.product(["magnitude", "random"], retrain.EVERY)]
    for name, row in rows.items():
        saved, network = models.read(folder / f"{name}.pt"), models.load(folder / f"{name}.pt")
        pruned = models.read(folder / f"filters-{row['method']}-0.5.pt", "pruned")
        assert saved["row"] == row and saved["kind"] == "retrained" and not network.training
        assert models.count(network, 32) == (38314, 6341248) and 0 <= row["seconds"] < 60
        assert len(row["curve"]) == row["epochs"] and row["device"].startswith("cpu, ")
        assert row["test_accuracy"] == saved["test_accuracy"] == row["curve"][-1]["test_accuracy"]
        nonzero = sum(int((v != 0).sum()) for v in network.parameters())
        assert row | {k: pruned[k] for k in ("distance", "removed", "arch", "recipe")} | {
            "format": 2, "run": name, "dataset": "shapes", "structure": "filters", "plan": None,
            "scope": "layer", "sparsity": 0.5, "round": 1, "pruning_seed": 0, "seed": 0,
            "include_linear": False, "calibration_images": 640, "budget": 1, "lr": None,
            "epochs": {"scratch_e": 3, "scratch_b": 3}.get(row["schedule"], 1), "end_lr": None,
            "cycle_momentum": True if row["schedule"] == "one_cycle" else None, "subset": 16,
            "batch_size": 8, "weight_decay": 5e-4, "precision": "fp32", "threads": 1,
            "torch": str(torch.__version__), "dense": models.digest(dense["model"]),
            "dense_test_accuracy": dense["test_accuracy"], "dense_params": 75290,
            "dense_macs": 12239488, "params": 38314, "macs": 6341248, "commit": row["commit"],
            "pruned": models.digest(pruned["model"]), "nonzero": nonzero,
            "pruned_test_accuracy": pruned["test_accuracy"]} == row
    for path in folder.glob("*.pt"):
        assert torch.load(path)["format"] == models.FORMAT         # torch's default is the safe one
    assert sorted(p.name for p in folder.iterdir() if p.suffix != ".pt" or ".state" in p.name) == [
        ".lock", "report.md", "results.jsonl"]


def test_what_is_there_is_not_made_again(dry, monkeypatch):
    folder, before, text = dry[0], listing(dry[0]), (dry[0] / "report.md").read_text()
    monkeypatch.chdir(folder.parent.parent)
    with nth(train, "train_step", 0, signal.SIGINT):
        assert "dense.pt: done already, test " in ok("train", "--dry-run")
        assert ok("retrain", "--dry-run", "--seed", 0).count("done already") == 10
        assert f"Wrote {folder / 'report.md'}" in ok("retrain", "--report", folder)
    assert "\n| filters 0.5 | magnitude | 51% / 52% | 1 | " in text
    assert (folder / "report.md").read_text() == text and [
        k for k, v in listing(folder).items() if v != before[k]] == [str(folder / "report.md")]
    name, row = read_rows(folder).popitem()
    assert f"test {row['test_accuracy']:.2f} %, 38,314 parameters, 6,341,248 MACs" in ok(
        "train", "--evaluate", folder / f"{name}.pt")


@pytest.mark.parametrize("T, t, drops, lr", [(1, 1, "", 0.1), (2, 1, ", x0.1 at 1", 0.01),
                                             (7, 2, ", x0.1 at 3 5", 0.001)])
def test_default_budgets(tmp_path, monkeypatch, T, t, drops, lr):
    """t is the recipe's share of T, at least 1; where it is no shorter than T, that is said."""
    few = train.shapes
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train, "shapes", lambda count, seed: few(count // 100, seed))
    assert f"; {T} epochs{drops}; cpu" in ok("train", "--epochs", T)
    ok("prune", "--method", "random")
    out = ok("retrain", "--schedule", "finetune", "--seed", 0, "--jobs", 1)
    row, = read_rows("runs/shapes-resnet8-s0").values()
    assert row["budget"] == row["epochs"] == t and row["curve"][0]["lr"] == pytest.approx(lr)
    assert (f": T = {T}; with as many epochs or more" in out) == (t >= T)


def test_flags(tmp_path, monkeypatch):
    """Their help fits a screen; and each goes to the schedules that take it."""
    monkeypatch.setenv("COLUMNS", "100")
    lengths = {s: call(s, "--help")[1].count("\n")
               for s in ("schedules", "train", "prune", "retrain")}
    assert not {s: n for s, n in lengths.items() if not 10 < n <= 45}
    ok(*command(tmp_path, "slr", "filters", "--schedule", "finetune", "slr", "one_cycle", "--lr",
                0.3, "--end-lr", 0.2, "--no-cycle-momentum"))
    assert [(r["lr"], r["end_lr"], r["cycle_momentum"], r["curve"][0]["lr"])
            for r in read_rows(tmp_path / "run").values()] == [
        (None, 0.2, None, 0.2), (0.3, None, None, 0.3), (0.3, 0.2, False, 0.3)]


def test_pretrained_weights_come_with_the_recipe_that_made_them(tmp_path, monkeypatch):
    """--epochs 0 trains nothing, but rewinding needs the T that the weights were trained for."""
    monkeypatch.setattr(train, "initial", lambda recipe, classes: models.build("resnet8", 2, 5))
    ok(*DENSE[:5 * bool(study())], "--pretrained", "--epochs", 0, "--out", tmp_path)
    made = models.read(tmp_path / "dense.pt", "dense")
    assert (made["curve"], made["recipe"]["epochs"]) == ([], 160)
    assert models.digest(made["model"]) == models.digest(models.build("resnet8", 2, 5).state_dict())
    ok("prune", tmp_path / "dense.pt", "--method", "hrank")
    ok("retrain", tmp_path / "filters-hrank-0.5.pt", "--epochs", 1, "--schedule", "lr_rewind",
       "--seed", 0, "--jobs", 1)
    assert [*read_rows(tmp_path).values()][0]["curve"][0]["lr"] == pytest.approx(0.001)


# ---- interruption --------------------------------------------------------------------------------

def full_disk(real, *args):
    """Here: a limit on the size of a file."""
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        real(*args)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def bad_loss(real, network, optimizer, x, *rest):
    return real(network, optimizer, x * float("nan"), *rest)


def bad_weights(real, network, *rest):
    return (real(network, *rest), network.conv1.weight.data.fill_(float("inf")))[0]


STEP, SAVE, REMOVE = (train, "train_step"), (models, "save"), (os, "remove")
STOP, KILL = signal.SIGINT, getattr(signal, "SIGKILL", 9)
ARMS = [("dense", None, STEP, 7, STOP, 1), ("dense", None, STEP, 12, KILL, 2),
        ("dense", None, SAVE, 1, KILL, 0), ("dense", None, SAVE, 5, STOP, 3),
        ("dense", None, REMOVE, 0, STOP, 3), ("dense", None, SAVE, 2, full_disk, 1),
        ("dense", None, STEP, 0, bad_loss, 0), ("dense", None, STEP, 7, bad_loss, 1),
        ("dense", None, STEP, 4, bad_weights, 0), ("dense", None, STEP, 9, bad_weights, 1),
        ("one_cycle", "weights", STEP, 7, STOP, 1), ("weight_rewind", "filters", STEP, 5, KILL, 1),
        ("weight_rewind", "weights", STEP, 3, STOP, 0), ("slr", "filters", SAVE, 2, STOP, 2),
        ("slr", "filters", REMOVE, 0, STOP, 2), ("scratch_e", "weights", STEP, 11, STOP, 2)]
SAID = {STOP: "goes on from here", full_disk: "too large", bad_loss: "the loss is not finite in ep",
        bad_weights: "its weights are not finite; a smaller --lr may help"}


def twice(folder, name, pruned, where, number, how, done):
    """Give a command twice, the first time with an end at call `number` of `where`, with `done`
    epochs on the disk, and say what differs from one that was left alone."""
    argv, whole = command(folder, name, pruned), undisturbed(name, pruned)
    with nth(*where, number, how):
        if how is KILL:
            assert os.waitpid(fork(lambda: call(*argv)), 0)[1] == KILL
        else:
            status, out, err = call(*argv)
            assert status == (130 if how is STOP else 2) and SAID[how] in out + err
            assert err.count("\n") == (how is not STOP)
    states = [models.read(p) for p in folder.glob("run/*.state.pt")]
    assert sum(len(s["curve"]) for s in states) == done
    if name == "dense":                                          # all there is, is whole and finite
        assert len([models.read(p) for p in folder.glob("run/epoch*.pt")]) >= min(done, 2)
        assert how not in SAID or not (folder / f"run/epoch-{done + 1:03d}.pt").exists()
    with nth(*STEP, None) as steps:
        ok(*argv)
    assert len(steps) == 5 * ({"dense": 3, "scratch_e": 5}.get(name, 2) - done)
    assert not list(folder.glob("run/*.state.pt")) and not list(folder.glob("run/*.tmp"))
    return differing(whole, content(folder / "run"))


@pytest.mark.parametrize("arm", ARMS, ids=[f"{a[0]}-{a[1]}-{a[2][1]}-{a[3]}" for a in ARMS])
def test_the_same_command_goes_on(tmp_path, arm):
    """Interrupted, killed, on a full disk, diverged: weights, snapshots, curve and row are bitwise
    those of a run that was left alone."""
    assert twice(tmp_path, *arm) == []


def test_the_comparison_notices_lost_momentum(tmp_path, monkeypatch):
    """Negative control."""
    real = train.optimizer_of
    undisturbed("one_cycle", "weights"), undisturbed("dense")
    monkeypatch.setattr(train, "optimizer_of", lambda network, decay, _: real(network, decay))
    assert ("dense.pt", "model") in twice(tmp_path / "a", *ARMS[0])
    assert "row" in {key[0] for key in twice(tmp_path / "b", *ARMS[10])}


def test_another_setting_is_refused_by_its_name(tmp_path):
    """Half a run at one learning rate and half at another is worth nothing and looks like a run;
    and a finished one is not the one that was asked for."""
    argv, retraining = command(tmp_path, "dense"), command(tmp_path / "b", "slr", "filters")
    for interrupted in (argv, retraining):
        with nth(*STEP, 6, STOP):
            assert call(*interrupted)[0] == 130
    status, _, err = call(*retraining, "--data-dir", HOME / "other")
    assert status == 2 and "holds 10 images" in err and "but the network was trained on" in err
    for state in ("dense.state.pt", "dense.pt"):
        before = listing(tmp_path)
        for change in ("--lr 1", "--epochs 4", "--subset 8", "--batch-size 5", "--seed 1",
                       "--schedule cosine --milestones", "--weight-decay .1", "--momentum .5",
                       "--precision bf16", "--arch resnet14", "--milestones 1",
                       f"--data-dir {HOME}/other")[::1 if "state" in state else 11]:
            status, _, err = call(*argv, *change.split())
            name = change.split()[0][2:].replace("-", "_").replace("_dir", "")
            assert status == 2 and err.count("\n") == 1 and "--out DIR takes another" in err
            assert f"run/{state}: belongs to another run" in err and f" {name} (here " in err
            assert listing(tmp_path) == before
        ok(*argv)


def test_one_process_works_in_a_folder(tmp_path):
    """A second one would write over the first one's state; it is told so in one line."""
    argv, other = command(tmp_path, "slr", "filters"), [
        sys.executable, "-c", "import sqlite3, sys; sqlite3.connect(sys.argv[1], timeout=0)"
        ".execute('BEGIN EXCLUSIVE')", tmp_path / "run/.lock"]
    with train.working_in(tmp_path / "run", CPU):
        before = listing(tmp_path)
        for mine in (argv, command(tmp_path, "dense")):
            status, _, err = call(*mine)
            assert status == 2 and "/run: another train.py or retrain.py works in this fold" in err
        assert b"locked" in subprocess.run(other, stderr=subprocess.PIPE).stderr
        assert listing(tmp_path) == before
    assert subprocess.run(other).returncode == 0


# ---- rounds, and what is refused before it begins ------------------------------------------------

def test_rounds_prune_and_retrain_in_one_call(tmp_path):
    """Weights: 1 - (1 - p)^k are zero; a row as each round ends, also when a later one does not."""
    argv = command(tmp_path, "weight_rewind", "weights", "--rounds", 3)
    with nth(*STEP, 22, STOP):
        assert call(*argv)[0] == 130
    assert [r["round"] for r in read_rows(tmp_path / "run").values()] == [1, 2]
    ok(*argv)
    for k, (name, row) in enumerate(read_rows(tmp_path / "run").items(), 1):
        model = models.read(tmp_path / f"run/{name}.pt")["model"]
        weights = torch.cat([v.flatten() for v in model.values() if v.dim() == 4])
        assert row["round"] == k and row["sparsity"] == 1 - 0.5 ** k and ("--r" in name) == (k > 1)
        assert (weights == 0).sum() == round(len(weights) * row["sparsity"])
        assert row["removed"] == pytest.approx(0.5, abs=1e-4)
    assert k == 3
    ok(*command(tmp_path, "slr", "filters", "--rounds", 2))
    one, two = (models.read(tmp_path / f"run/{n}.pt") for n in [*read_rows(tmp_path / "run")][3:])
    assert [c["row"]["sparsity"] for c in (one, two)] == [0.5, 0.5]
    for conv, keep in one["kept"].items():
        assert len(two["model"][f"{conv}.weight"]) == len(two["kept"][conv]) == len(keep) // 2
        assert {*two["kept"][conv].tolist()} <= {*keep.tolist()}


def test_nothing_is_begun_that_cannot_end(tmp_path):
    """Rounds that would leave no weight; weight_rewind whose snapshot was not kept."""
    argv = command(tmp_path, "finetune", "weights", "--schedule", "finetune", "weight_rewind")
    (tmp_path / "run/epoch-001.pt").unlink()
    before = listing(tmp_path)
    assert "of 74160 weights leaves none" in call(*argv, "--epochs", 1, "--rounds", 40)[2]
    assert re.search(r"weight_rewind with 2 epochs needs \S+/epoch-001.pt, which was not kept "
                     r"\(but epoch-002.pt\)", call(*argv)[2])
    assert listing(tmp_path) == before
    ok(*argv, "--epochs", 1)


@pytest.mark.parametrize("structure", ["filters", "weights"])
def test_nothing_removed_is_a_control(tmp_path, structure):
    """The dense network retrained, as a row."""
    argv = command(tmp_path, "adaptive_linear", "none")
    ok("prune", tmp_path / "run/dense.pt", "--structure", structure, "--sparsity", 0, "--method",
       "magnitude", "--out", tmp_path / "run/none.pt")
    ok(*argv)
    row, = read_rows(tmp_path / "run").values()
    assert row["removed"] == row["distance"] == row["sparsity"] == 0
    assert row["pruned"] == row["dense"]
    assert "| nothing | magnitude | 100% / 100% |" in (tmp_path / "run/report.md").read_text()


# ---- files ---------------------------------------------------------------------------------------

def test_rows_survive_a_crash(tmp_path):
    """A half-written last line is dropped and its row taken from the retrained file, without
    training; a line in the middle that is no row is refused by its number. NaN is not JSON."""
    argv, path = command(tmp_path, "finetune", "filters"), tmp_path / "run/results.jsonl"
    ok(*argv, "--seed", 0, 1)
    whole = path.read_bytes()
    first, second = whole.splitlines(keepends=True)
    for text in (whole[:-20], first + b'{"', first):
        path.write_bytes(text)
        with nth(*STEP, 0, STOP):
            ok(*argv, "--seed", 0, 1)
        assert path.read_bytes() == whole
    with pytest.raises(ValueError, match="not JSON compliant"):
        retrain.write_rows(path.parent, {"a": {"test_accuracy": float("nan")}})
    other = first.replace(b'"format": 2', b'"format": 1')
    for text, number in ((whole[:-20] + b"\n", 2), (b"[]\n" + whole, 1), (other, 1),
                         (first + other + second, 2), (b"\n" + whole, 1), (b"\xff\n" + whole, 1),
                         (b"[" * 100_000 + b"\n" + whole, 1), (b'{"run": 1}\n' + whole, 1)):
        path.write_bytes(text)
        for mine in (argv, ["retrain", "--report", path.parent]):
            said = f"{path}: line {number} is not a result row of format 2; remove it\n"
            assert call(*mine)[::2] == (2, f"{Path(sys.argv[0]).name}: error: {said}")
        assert path.read_bytes() == text


def sealed(value, **named):
    """A file with the right SHA-256 at its end."""
    buffer = io.BytesIO()
    torch.save(value, buffer, **named)
    return buffer.getvalue() + hashlib.sha256(buffer.getvalue()).digest()


class Hostile:
    """A pickle that makes a folder when it is loaded."""
    def __reduce__(self):
        return os.mkdir, ("it-ran",)


def test_a_damaged_or_hostile_checkpoint_is_refused(tmp_path, monkeypatch):
    """60 flipped bytes and 20 cuts; pickles that would run something; another format; another kind;
    and none is written with NaN."""
    monkeypatch.chdir(tmp_path)
    path, draw, whole = Path("x.pt"), random.Random(0), (study() / "filters.pt").read_bytes()
    n, hostile = len(whole), {"format": 2, "kind": "dense", "settings": Hostile()}
    flips = draw.sample(range(n), 50) + draw.sample(range(n - 32, n), 10)
    cuts = [0, 1, 31, 32, 33, n - 1, *draw.sample(range(n), 14)]
    damaged = [whole[:i] + bytes([whole[i] ^ 1 << i % 8]) + whole[i + 1:] for i in flips]
    for data, kinds, said in (
            *((d, (), "not a checkpoint of this .* or damaged; write it again") for d in [
                *damaged, *(whole[:i] for i in cuts), whole + b"x", pickle.dumps(hostile),
                sealed(hostile)[:-32]]),
            (sealed({"format": 1, "kind": "dense"}), (), "not a checkpoint of this"),
            (whole, ("dense", "state"), "is a pruned checkpoint, not dense or state")):
        path.write_bytes(data)
        with pytest.raises(Refused, match=f"^x.pt: {said}"):
            models.read("x.pt", *kinds)
    assert models.read("x.pt", "dense", "pruned").keys() == models.read("x.pt").keys()
    for value in (float("nan"), float("inf")):
        with pytest.raises(Refused, match="y.pt: not written, its weights are not finite"):
            models.save("y.pt", {"model": {"w": torch.tensor([1.0, value])}})
    for new in (True, False):
        path.write_bytes(sealed(hostile, _use_new_zipfile_serialization=new))
        with pytest.raises((Refused, pickle.UnpicklingError)):
            models.read("x.pt")
    assert os.listdir() == ["x.pt"]
    torch.load("x.pt", weights_only=False)
    assert os.path.exists("it-ran")                                         # it was a loaded one


def test_a_writer_leaves_a_whole_file(tmp_path, monkeypatch):
    """Flushed and fsynced before it is renamed; and 15 processes that write checkpoints die at a
    random moment: the file on disk is a whole one."""
    path, draw, seen, rename = tmp_path / "x.pt", random.Random(0), [], os.replace
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", lambda fd: seen.append(os.fstat(fd).st_size))
        patch.setattr(os, "replace", lambda *names: (seen.append(names[1]), rename(*names)))
        models.write(path, b"new")
    assert seen == [3, path] and path.read_bytes() == b"new" and [*tmp_path.iterdir()] == [path]

    def work():
        signal.signal(signal.SIGALRM, signal.SIG_DFL)               # ends as suddenly as by SIGKILL
        for n in itertools.count():
            if n == 1:
                signal.setitimer(signal.ITIMER_REAL, moment)
            models.save(path, {"kind": "x", "n": n, "w": torch.full((9_000,), float(n))})
    for _ in range(15):
        moment = draw.uniform(0.001, 0.05)
        assert os.waitpid(fork(work), 0)[1] == signal.SIGALRM
        found = models.read(path)
        assert (found["w"] == found["n"]).all()
        seen.append(found["n"])
    assert len(set(seen)) > 4


# ---- bad input -----------------------------------------------------------------------------------

BAD = r"""
must be a whole number|train --epochs -1;train --epochs 1.5;train --batch-size 1;train --seed ten
must be a whole number|train --subset 0;train --workers 999;retrain --rounds 0;schedules --epochs 0
must be a number|train --lr nan;train --lr 0;train --momentum 1;prune --sparsity 1;schedules --lr x
invalid choice|train --dataset mnist;prune --method best;retrain --schedule b;train --precision int8
unrecognized|train --colour red;train x.pt;schedules x;train --epoch 3;train --resume
expected (one|at least one) argument|train --arch;retrain run/filters.pt --epochs
unknown network|train --arch alexnet;train --arch resnet9;train --arch resnet2
epochs: 0 needs --pretr|train --epochs 0
below the 16 epochs|train --milestones 5 3;train --milestones 99
belongs to --schedule step|train --milestones 1 --schedule cosine
argument --subset: 5000|train --subset 5000
is not here; leave it out|train --device tpu;train --device cuda:99
weights of .* for 1000 cl|train --pretrained
no such checkpoint|train --evaluate no.pt;prune run/dense.pt no.pt;prune;retrain no.pt;prune sets
x.pt: not a checkpoint .*, or damaged|prune x.pt;retrain x.pt;train --evaluate x.pt
is a state checkpoint|prune run/epoch-001.pt;train --evaluate run/epoch-001.pt
is a dense checkpoint, not pruned|retrain run/dense.pt
no pruned checkpoint is there|retrain
holds something else|prune run/dense.pt --method random --out run/weights.pt
no folder nowhere|prune run/dense.pt --method random --out nowhere/x.pt
--out: one file|prune run/dense.pt --out y.pt
leave out --sparsity|prune run/dense.pt --plan B --sparsity .5
is for filters|prune run/dense.pt --plan B --structure weights
no plan B for resnet8; plans exist for|prune run/dense.pt --plan B
hrank ranks filters|prune run/dense.pt --method hrank --structure weights
include-linear: is for|prune run/dense.pt --include-linear
2 values, but .* 3 stages|prune run/dense.pt --sparsity .1 .2
one value with|prune run/dense.pt --structure weights --sparsity .1 .2
its (weights|filters) are|prune run/weights.pt;prune run/filters.pt --structure weights
are zero already|prune run/weights.pt --structure weights --sparsity .1
name no (checkpoint|file)|prune run/dense.pt --dry-run;retrain run/filters.pt --dry-run
ignore it|retrain --schedule finetune --lr 1;retrain --schedule slr --end-lr 1 --no-cycle-momentum
no finished runs|retrain --report sets
has no (training|test) images|FOLDER nowhere;FOLDER sets/notest
not a readable image|FOLDER sets/corrupt
is 9 x 8 pixels; all images must be square|FOLDER sets/wide
differ, in class 'b'|FOLDER sets/names
3 classes of 8 pixels, but .* 2 classes of 8|prune run/dense.pt --data-dir sets/three
"""


def test_bad_input_is_one_line_and_changes_nothing(tmp_path, monkeypatch):
    """Status 2, a last line that says what is wrong, no traceback, nothing written."""
    monkeypatch.chdir(tmp_path)
    few = train.shapes
    monkeypatch.setattr(train, "shapes", lambda count, seed: few(count // 100, seed))
    shutil.copytree(study(), "run")
    Path("x.pt").write_bytes(Path("run/dense.pt").read_bytes()[:999])
    for name in ("notest", "corrupt", "wide", "names", "three"):
        for split in ("train", "test")[:1 if name == "notest" else 2]:
            pictures(Path("sets", name, split), a=2, b=2, **{"c": 1} if name == "three" else {})
    os.rename("sets/names/test/b", "sets/names/test/c")
    good = Path("sets/corrupt/train/b/1.png").read_bytes()
    Path("sets/corrupt/train/b/1.png").write_bytes(good[:99])
    pictures(Path("sets/wide/train"), side=9, a=1)
    before, wrong = listing(tmp_path), []
    for said, command in ((said, c) for line in BAD.strip().splitlines()
                          for said, them in [line.rsplit("|", 1)] for c in them.split(";")):
        argv = command.replace("FOLDER", "train --dataset folder --out new --data-dir").split()
        status, _, err = call(*argv)
        if not (status == 2 and re.search(said, err.splitlines()[-1]) and ": error: " in err
                and "Traceback" not in err and listing(tmp_path) == before):
            wrong.append((command, status, err[-200:], listing(tmp_path).keys() - before.keys()))
            before = listing(tmp_path)
    assert not wrong


# ---- processes -----------------------------------------------------------------------------------

def frozen(self, mode=True):
    """Batch norm by its running statistics: each process sees only its own part of a batch."""
    return torch.nn.Module.train(self, False)


def torchrun(folder, name="two"):
    """To train on batches of 7 and 3 images, shared out unevenly and too few to share out; and to
    retrain."""
    (folder / "driver.py").write_text(
        f"import sys; sys.path.insert(0, {str(HERE)!r}); import retrain, torch, train\n"
        "torch.nn.BatchNorm2d.train = lambda self, mode=True: torch.nn.Module.train(self, False)\n"
        "at = sys.argv.index('retrain')\n"
        "train.command(lambda: (train.main(sys.argv[2:at]), retrain.main(sys.argv[at + 1:])))\n")
    return ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2,
            folder / "driver.py", *command(folder / name, "dense")[:-1], folder / name / "new",
            "--batch-size", 7, "--lr", 0.01, *command(folder / name, "lr_rewind", "weights")]


def four_runs(folder, jobs=2):
    command(folder, "slr")
    return [HERE / "retrain.py", folder / "run/filters.pt", folder / "run/weights.pt", "--seed", 1,
            "--schedule", "one_cycle", "finetune", "--epochs", 3, "--jobs", jobs]


@functools.cache
def one_by_one():
    ok("retrain", *four_runs(HOME / "jobs", 1)[1:])
    return content(HOME / "jobs/run")


@pytest.fixture(scope="module", autouse=True)
def beside(request, tmp_path_factory):
    """{what: (folder, process)}, started before the first test: they mostly import."""
    found, names = {}, " ".join(item.name for item in request.session.items)
    for what in (torchrun, four_runs):
        if f"test_{what.__name__}" in names:
            folder = tmp_path_factory.mktemp("beside")
            found[what] = folder, subprocess.Popen(
                [sys.executable, *map(str, what(folder))], text=True, stdout=subprocess.PIPE,
                stderr=subprocess.PIPE, env={**os.environ, "OMP_NUM_THREADS": "1"})
    yield found
    for _, process in found.values():
        process.kill()


def test_torchrun_computes_what_one_process_computes(beside, monkeypatch):
    """Losses, test counts, one set of files, and an end without complaint."""
    folder, process = beside[torchrun]
    argv = torchrun(folder, "one")[6:]
    with monkeypatch.context() as patch:
        patch.setattr(torch.nn.BatchNorm2d, "train", frozen)
        ok(*argv[:argv.index("retrain")])
        ok(*argv[argv.index("retrain"):])
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0 and "terminate called" not in err, err
    assert out.count("Wrote") == 2                                      # only the first one speaks
    curves = [models.read(folder / n / "new/dense.pt")["curve"]
              + [p for r in read_rows(folder / n / "run").values() for p in r["curve"]]
              for n in ("one", "two")]
    for one, two in zip(*curves, strict=True):
        assert one == {**two, "train_loss": pytest.approx(two["train_loss"], abs=1e-4)}
    assert len({p["train_loss"] for p in curves[0]}) == 5
    assert len({frozenset(p.name for p in (folder / n).rglob("*")) for n in ("one", "two")}) == 1
    for rank, world in (("1", "1"), ("x", "2"), ("-1", "2"), ("1", None)):
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("WORLD_SIZE", world) if world else monkeypatch.delenv("WORLD_SIZE")
        assert f"RANK={rank} of WORLD_SIZE={world or 1}: start with torchrun" in call("train")[2]


def test_four_runs_by_two_workers_are_those_of_one(beside):
    """The script itself: the same bytes, but the time it took."""
    folder, process = beside[four_runs]
    out, err = process.communicate(timeout=120)
    assert (process.returncode, err) == (0, "") and out.count(" 3/3 ") == 4
    assert "; 4 runs left" in out
    assert differing(one_by_one(), content(folder / "run")) == []
    assert len(read_rows(folder / "run")) == 4


def test_workers_end_with_a_killed_parent(tmp_path):
    """Nobody trains on unseen; and the same command ends with the same rows. (Here the workers are
    forked, so that they need not import anything; those of the test above are spawned.)"""
    argv, (end, begin), context = four_runs(tmp_path)[1:], os.pipe(), multiprocessing.get_context

    def work():
        os.dup2(begin, 1)
        os.dup2(begin, 2)
        os.close(begin)
        sys.stdout = open(1, "w", closefd=False)
        multiprocessing.get_context = lambda kind: context("fork")
        retrain.main([str(a) for a in argv])
    child, said = fork(work), b"begin"
    os.close(begin)
    while said and select.select([end], [], [], 60)[0]:
        said = os.read(end, 1 << 16)         # b"": nobody is left who could write, all have ended
        if b" 1/3 " in said and child:
            os.kill(child, KILL)
            os.waitpid(child, 0)
            child = None
    os.close(end)
    assert said == b"" and not child and list(tmp_path.glob("run/*.state.pt"))
    ok("retrain", *argv[:-1], 1)
    assert differing(one_by_one(), content(tmp_path / "run")) == []


def test_a_failing_run_does_not_stop_the_others(tmp_path, monkeypatch):
    """It is reported, the exit status says so, and the same command tries it again."""
    def fails(*_):
        raise OSError("disk")
    argv = command(tmp_path, "finetune", "filters", "--seed", 0, 1, 2)
    with nth(train, "fit", 1, fails):
        status, _, err = call(*argv)
    assert status == 2 and err.splitlines()[0].endswith("filters.pt finetune t=2 seed=1: disk")
    assert err.splitlines()[1].endswith("1 of 3 runs failed; the same command tries them again")
    assert [r["seed"] for r in read_rows(tmp_path / "run").values()] == [0, 2]
    assert ok(*argv).count("done already") == 2
    assert [r["seed"] for r in read_rows(tmp_path / "run").values()] == [0, 2, 1]


# ---- speed ---------------------------------------------------------------------------------------

def plain_loop(network, data, size):
    """The loop everybody writes, each next() a step: PIL, torchvision's transforms, a DataLoader,
    contiguous tensors, `.item()`."""
    from torchvision import transforms as t
    transform = t.Compose([t.ToPILImage(), t.RandomCrop(32, 4), t.RandomHorizontalFlip(),
                           t.ToTensor(), t.Normalize(data.mean, data.std)])
    pairs = list(zip(data.train[0][:, :, 4:-4, 4:-4], data.train[1].tolist()))
    optimizer = torch.optim.SGD(network.train().parameters(), 0.1, 0.9, weight_decay=1e-4)
    for _ in itertools.count():
        for x, y in torch.utils.data.DataLoader(
                pairs, size, shuffle=True, drop_last=True, collate_fn=lambda items: (
                    torch.stack([transform(x) for x, _ in items]),
                    torch.tensor([y for _, y in items]))):
            optimizer.zero_grad()
            loss = F.cross_entropy(network(x), y)
            loss.backward()
            optimizer.step()
            yield loss.item()


def our_loop(network, data, size, fixed=False, masked=False):
    network.to(memory_format=torch.channels_last).train()
    optimizer = train.optimizer_of(network, 1e-4)
    weights = [network.get_parameter(n).data for n in models.weight_names(network)]
    masks = (weights, [(torch.rand_like(w) < 0.1).to(w.dtype) for w in weights]) if masked else None
    epochs = (train.train_batches(data, 0, epoch, size, CPU) for epoch in itertools.count())
    batches = itertools.chain.from_iterable(epochs)
    for x, y, _, weight in itertools.repeat(next(batches)) if fixed else batches:
        yield train.train_step(network, optimizer, x, y, CPU, weight, masks)


with warnings.catch_warnings(action="ignore"):          # a marker without a configuration file
    SPEED = pytest.mark.speed


@SPEED
@pytest.mark.skipif("speed" not in sys.argv, reason="long: -m speed")
def test_speed(size=64, rounds=9, steps=4):
    """Images per second of ResNet-20, one thread: medians of rounds taken in turn."""
    images = torch.randint(0, 256, (20 * size, 3, 40, 40), dtype=torch.uint8)
    split = images, torch.arange(20 * size) % 10
    new = functools.partial(models.build, "resnet20", 10)
    data = train.Data(split, split, 32, 10, [0.5] * 3, [0.25] * 3)
    loops = {"training, with its data": our_loop(new(), data, size),
             "on one fixed batch": our_loop(new(), data, size, fixed=True),
             "masked": our_loop(new(), data, size, masked=True),
             "half of the filters": our_loop(prune.shrunk(new(), 0.5), data, size),
             "the plain loop": plain_loop(new(), data, size)}
    seconds = {name: [] for name in loops}
    for _, (name, loop) in itertools.product(range(rounds + 1), loops.items()):
        began = time.perf_counter()
        for _ in range(steps):
            next(loop)
        seconds[name].append(time.perf_counter() - began)
    first, *_ = seconds.values()
    for name, taken in seconds.items():                               # the first round is a warm-up
        ratio = statistics.median(a / b for a, b in zip(first[1:], taken[1:]))
        print(f"\n{name:25} {steps * size / statistics.median(taken[1:]):6.0f} images/s  "
              f"{ratio:.2f} x training", end="")
