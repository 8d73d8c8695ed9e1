"""Everything against oracles: torch's own schedulers and pruning, numpy, slow references, numbers
worked out by hand or published. No network, no data set, half a minute on two cores. How fast this
machine is: python -m pytest -q -s -m speed"""
import gc
gc.disable()                    # while much is imported it costs a third of the time

import collections
import contextlib
import copy
import functools
import hashlib
import io
import itertools
import math
import multiprocessing
import os
import re
import shutil
import signal
import sys
import tempfile
import threading
import time
import types
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torch.nn.utils import prune as torch_prune
from torch.overrides import TorchFunctionMode
from torchvision.transforms import v2

import models
import prune
import retrain
import schedules
import train
from retrain import read_rows
from schedules import Refused

CPU, HERE = train.Machine(torch.device("cpu")), Path(train.__file__).parent
FORK = multiprocessing.get_context("fork")
HOME = Path((TEMPORARY := tempfile.TemporaryDirectory()).name)
CIFAR = {"schedule": "step", "epochs": 160, "lr": 0.1, "milestones": [80, 120], "momentum": 0.9}
README = (HERE / "README.md").read_text()
BLOCKS = re.findall(r"```(python)?\n(.*?)```", README, re.S)
GOLDEN = """e 0 1 3 7 8 20 32 36 40 54 60 71
lr_rewind .01 .01 .01 .01 .01 .01 .001 .001 .001 .001 .001 .001
one_cycle .001 .0056393861 .037699576 .099813971 .099962281 .090676733 .068009194 .058683488 \
.049032431 .017866459 .0082330837 6.8593579e-5
slr .001 .005902041 .039485214 .1 .1 .1 .1 .1 .01 .01 .001 .001
linear 0 .0046852657 .037063539 .099810679 .098764652 .08024628 .061727908 .055555117 \
.049382326 .027777559 .018518372 .0015431977"""
R56, R110, R34 = (16, 18, 20, 34, 38, 54), (36, 38, 74), (2, 8, 14, 16, 26, 28, 30, 32)
PLANS = {
    "resnet56": {"A": ((.1, .1, .1), (16, 20, 38, 54)), "B": ((.6, .3, .1), R56),
                 "C": ((.6, .5, .4), R56), "D": ((.6, .6, .6), R56), "I": ((.1, .15, .2), ())},
    "resnet110": {"A": ((.5, 0, 0), (36,)), "B": ((.5, .4, .3), R110), "C": ((.5, .5, .5), R110),
                  "D": ((.5, .6, .7), R110)},
    "resnet34": {"A": ((.3, .3, .3, 0), R34), "B": ((.5, .6, .4, 0), R34)},
    "vgg16": {"A": ((32, 64, 128, 128, *[256] * 9),), "C": ((32, 64, 64, *[128] * 4, *[196] * 6),),
              "B": ((32, 64, 128, 128, *[196] * 5, *[256] * 4),)}}
signal.signal(signal.SIGINT, signal.default_int_handler)    # a shell's background jobs ignore it
gc.freeze()                     # what has been imported is not looked through again and again
gc.enable()
os.fsync = lambda file: None    # no test pulls the plug
os.environ["CUDA_VISIBLE_DEVICES"] = ""         # what a GPU computes is no oracle, and after a fork
torch.accelerator.device_count = lambda: 0      # it computes nothing
torch.set_num_threads(1)        # networks this small only make two threads wait for each other


def call(script, *argv):
    """(status, stdout, stderr) of a command line, in this process; a warning is an error."""
    out, err = (io.TextIOWrapper(io.BytesIO(), "utf-8", write_through=True) for _ in range(2))
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), \
            warnings.catch_warnings(action="error"), pytest.raises(SystemExit) as end:
        train.command(lambda: sys.modules[script].main([str(a) for a in argv]))
    return end.value.code, *(s.buffer.getvalue().decode() for s in (out, err))


def ok(*argv):
    status, out, err = call(*argv)
    assert (status, err) == (0, "")
    return out


def pictures(folder, seed=0, shape=(8, 8), **counts):
    draw = torch.Generator().manual_seed(seed)
    for label, i in ((label, i) for label, count in counts.items() for i in range(count)):
        (folder / label).mkdir(parents=True, exist_ok=True)
        pixels = torch.randint(0, 256, (3, *shape), generator=draw, dtype=torch.uint8)
        v2.functional.to_pil_image(pixels).save(folder / label / f"{i}.png")


@functools.cache
def study():
    """A dense run of three epochs, of five steps, pruned both ways. Tests work on copies of it."""
    for i, name in enumerate(("data/train", "data/test", "other/train", "other/test")):
        pictures(HOME / name, seed=i, a=5 + i % 2 * 5, b=5 + i % 2 * 5)
    ok(*command(HOME, "dense"))
    for kind in ("filters", "weights"):
        ok("prune", HOME / "run/dense.pt", "--structure", kind, "--method", "magnitude")
        os.rename(HOME / f"run/{kind}-magnitude-0.5.pt", HOME / f"run/{kind}.pt")
    return HOME / "run"


def command(folder, name, pruned=None, *more):
    """The command line of an arm in `folder`/run: "dense", or a schedule and what to retrain."""
    if name == "dense":
        return ["train", "--dataset", "folder", "--data-dir", HOME / "data", "--epochs", 3, "--lr",
                0.05, "--batch-size", 2, "--milestones", 2, "--out", folder / "run", *more]
    if not (folder / "run").exists():
        shutil.copytree(study(), folder / "run")
    return ["retrain", folder / f"run/{pruned}.pt", "--schedule", name, "--epochs", 2, "--seed", 0,
            "--jobs", 1, *more]


def content(folder):
    def plain(value):
        if isinstance(value, dict):
            return {k: plain(v) for k, v in value.items() if k not in ("seconds", "commit")}
        return models.digest({"": value}) if isinstance(value, torch.Tensor) else value
    return plain(read_rows(folder) | {p.name: models.read(p) for p in folder.glob("*.pt")})


def listing(folder):
    return {str(p): p.is_file() and (p.stat().st_mtime_ns, p.stat().st_size)
            for p in folder.rglob("*") if p.name != ".lock-journal"}


@contextlib.contextmanager
def nth(module, name, number, instead=None):
    """Inside, call `number` of module.name is `instead(real, its arguments)`, or that signal."""
    seen, real = [], getattr(module, name)

    def counted(*args, **named):
        seen.append(args)
        if len(seen) - 1 != number:
            return real(*args, **named)
        return os.kill(os.getpid(), instead) if isinstance(instead, int) else instead(real, *args)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, name, counted)
        yield seen


def dense_checkpoint():
    found = models.read(study() / "dense.pt")
    return {**found, "model": {k: v.contiguous() for k, v in found["model"].items()}}


def pruned(checkpoint, structure="filters", sparsity=0.5, method="magnitude", **more):
    return prune.prune(checkpoint, {
        "method": method, "structure": structure, "sparsity": [sparsity], "plan": None, "seed": 0,
        "scope": "layer" if structure == "filters" else "global", "include_linear": False, **more},
        tiny_data(), CPU)


def on_meta(arch, plan=None, classes=10):
    with torch.device("meta"):
        network = models.build(arch, classes, seed=None)
    return prune.shrunk(network, plan=plan, method="random") if plan else network


def noisy(arch):
    network = on_meta(arch, ([24] * len(models.prunable(on_meta(arch))),)).to_empty(device="cpu")
    torch.manual_seed(0)
    for name, value in network.state_dict().items():
        value.copy_(torch.randn(value.shape) * (2 / value[0].numel()) ** 0.5 if value.dim() > 1
                    else 0.5 + torch.rand(value.shape) if re.search(r"running_var|weight", name)
                    else 0.3 * torch.randn(value.shape))
    return network.double().eval()


def tiny_data(count=40, side=8):
    images = torch.randint(0, 256, (count, 3, side, side), dtype=torch.uint8,
                           generator=torch.Generator().manual_seed(0))
    labels = torch.arange(count) % 10
    return train.Data((F.pad(images, (4,) * 4), labels), (images, labels), side, 10,
                      [0.5, 0.4, 0.6], [0.25, 0.2, 0.3])


def fitted(network, data, at, epochs, folder, batch_size=8, machine=CPU, **more):
    wanted = {"epochs": epochs, "batch_size": batch_size, "weight_decay": 5e-4, "seed": 0}
    *_, (curve, _) = train.fit(network, data, at, wanted, machine, f"{folder}/state.pt", **more)
    return curve


def lrs(name, epochs, steps=1, recipe=CIFAR, **more):
    at = schedules.retrain(name, epochs, steps, recipe, **more)
    return [at(s)[0] for s in range(epochs * steps)]


def test_schedules_against_golden_values_and_torch():
    epochs, *lines = (line.split() for line in GOLDEN.splitlines())
    for name, *values in lines:
        at = schedules.retrain(name, 72, 782, CIFAR)
        found = [at(782 * int(epoch)) for epoch in epochs[1:]]
        assert [float(f"{lr:.8g}") for lr, _ in found] == [*map(float, values)]
    for kind, steps, count, make in (
            ("step", 7, 160, lambda o, n: torch.optim.lr_scheduler.MultiStepLR(o, [80, 120])),
            ("cosine", 7, 160, torch.optim.lr_scheduler.CosineAnnealingLR),
            *(("one_cycle", 1, count, lambda o, n: torch.optim.lr_scheduler.OneCycleLR(
                o, 0.1, n, div_factor=100, pct_start=0.1, final_div_factor=100))
              for count in (2, 3, 9, 11, 37, 300))):
        optimizer, wanted = torch.optim.SGD([torch.zeros(1)], 0.1, momentum=0.9), []
        scheduler, group = make(optimizer, count), optimizer.param_groups[0]
        for _ in range(count):
            wanted.append((group["lr"], group["momentum"]))
            optimizer.step()
            scheduler.step()
        at = schedules.dense({**CIFAR, "schedule": kind, "epochs": count}, steps)
        np.testing.assert_allclose([at(steps * e + e % steps) for e in range(count)], wanted, 1e-9)


def test_tails_stretches_and_drops():
    dense = [schedules.dense(CIFAR, 1)(e)[0] for e in range(160)]
    for t in range(1, 161):
        assert lrs("lr_rewind", t) == dense[160 - t:] == lrs("weight_rewind", t)
    assert lrs("lr_rewind", 40) == lrs("finetune", 40)          # the paper's short budget
    for name in ("scratch", "scratch_e", "scratch_b"):
        assert lrs(name, 80) == dense[::2] and lrs(name, 320, 3)[::6] == dense
    recipe = {**CIFAR, "schedule": "linear"}
    assert lrs("scratch", 80, 3, recipe) == lrs("linear", 80, 3)
    assert lrs("lr_rewind", 200, 3, recipe, lr=9.0) == [0] * 120 + lrs("linear", 160, 3)
    for name, t, drops in (("scratch", 88, [44, 66]), ("scratch_e", 216, [108, 162])):
        assert [e for e, (a, b) in enumerate(itertools.pairwise(lrs(name, t)), 1) if b < a] == drops
    imagenet = {**CIFAR, "epochs": 90, "milestones": [30, 60]}
    for t, (recipe, *shares) in itertools.product(
            (40, 45, 56, 72, 152), ((CIFAR, 0.45, 0.675), (imagenet, 0.297, 0.594))):
        values, warmup = lrs("slr", t, recipe=recipe), int(0.1 * t)
        drops = [e for e in range(warmup + 1, t) if values[e] < values[e - 1] / 2]
        assert drops == [warmup + int(share * t) for share in shares]
    recipe = {**CIFAR, "schedule": "cosine"}
    assert lrs("slr", 40, 3, recipe)[3 * 22] == pytest.approx(0.05)
    assert lrs("slr", 19, recipe=recipe)[-1:] == lrs("finetune", 1, recipe=recipe)


@pytest.mark.parametrize("name, epochs, steps, recipe, more, wanted", [
    ("adaptive_linear", 16, 50, CIFAR, {"distance": 0.05, "removed": 0.5}, {80: 0.01}),     # t/T
    ("adaptive_linear", 16, 50, CIFAR, {"removed": 0}, {80: 0.01}),
    ("adaptive_linear", 16, 50, CIFAR, {"distance": 0.3, "removed": 0.36}, {80: 0.05}),     # d/√
    ("one_cycle", 10, 10, CIFAR, {"lr": 0.2, "end_lr": 0.01, "cycle_momentum": 0}, {99: 0.01}),
    ("one_cycle", 10, 10, None, {"lr": 0.1}, {9: 0.1, 99: 1e-5}),
    ("linear", 10, 10, {}, {"lr": 0.2, "end_lr": 0.02}, {10: 0.2, 55: 0.11}),
    ("slr", 9, 1, CIFAR, {"lr": 0.2}, {0: 0.2, 3: 0.2, 4: 0.02, 6: 0.002}),
    ("finetune", 2, 1, CIFAR, {"end_lr": 0}, {0: 0}), ("finetune", 2, 1, CIFAR, {}, {1: 0.001}),
    ("finetune", 2, 1, {"schedule": "constant", "lr": 0.3}, {}, {0: 0.3, 1: 0.3})])
def test_schedules_take_what_they_need_and_no_more(name, epochs, steps, recipe, more, wanted):
    values, at = (f(name, epochs, steps, recipe, **more) for f in (lrs, schedules.retrain))
    assert {step: values[step] for step in wanted} == pytest.approx(wanted)
    assert at(0)[1] == (0.95 if name == "one_cycle" and len(more) < 3 else 0.9)


def test_every_budget_works_and_is_printed():
    for kind, name in itertools.product(schedules.DENSE, retrain.EVERY):
        for epochs, steps in ((1, 1), (1, 10), (2, 5), (9, 1), (10, 1), (19, 2), (200, 1)):
            values = lrs(name, epochs, steps, {**CIFAR, "schedule": kind}, distance=0.3)
            assert all(0 <= v <= 0.1 + 1e-12 for v in values), (kind, name, epochs, steps)
    for name, words in (("slr", "'epochs'"), ("clr", "unknown schedule 'clr'.*finetune")):
        with pytest.raises(Refused, match=words):
            lrs(name, 8, 5, {"lr": 0.1})
    lines = [" ".join(line.split()) for line in ok("schedules").splitlines()]
    assert lines[0] == "epoch " + " ".join(schedules.RETRAIN) and len(lines) == 1 + 72 + 2 + 8
    assert lines[2] == "1 0.001 0.01 0.01 0.00590204 0.00563939 0.00468527 0.00468527 0.1"
    assert lines[32].startswith("31 0.001 0.01 0.01 0.1 ")
    drawn = "".join(15 * block for block in "██▂▁")
    assert ok("schedules", "--epochs", 4, "--lr", 1).endswith(f" {drawn} 1 0.01\n")
    with contextlib.redirect_stdout(io.TextIOWrapper(io.BytesIO(), "cp1252")):      # Windows' pipe
        schedules.main([])


@pytest.mark.parametrize("arch, plan, params, macs", [
    ("resnet20", ([0],), 269_722, 40_551_040), ("vgg16", ([0],), 14_987_722, 313_463_808),
    ("vgg16", PLANS["vgg16"]["A"], 5_397_034, 206_279_680),
    ("resnet56", PLANS["resnet56"]["B"], 735_712, 90_907_264),
    ("resnet110", PLANS["resnet110"]["B"], 1_168_424, 155_124_352),
    ("resnet34", PLANS["resnet34"]["B"], 19_468_900, 2_782_260_413),           # published, Li 2017
    ("resnet50", ([.7, .7, .75, .75],), 7_961_423, 1_090_340_090)])
def test_counts_of_networks_and_plans(arch, plan, params, macs):
    side, classes = (224, 1000) if arch in models.IMAGENET else (32, 10)
    found = models.count(on_meta(arch, plan, classes).to_empty(device="cpu"), side)
    assert found == pytest.approx((params, macs), rel=1e-4 if classes == 1000 else 0)


def test_plans_what_is_prunable_initialisation_and_the_shortcuts_gradient():
    assert prune.PLANS == PLANS
    for arch, numbers, stages in (("resnet20", range(2, 20, 2), "111222333"),
                                  ("resnet50", [n for n in range(2, 50) if n % 3 != 1],
                                   "1" * 6 + "2" * 8 + "3" * 12 + "4" * 6),
                                  ("vgg16", range(1, 14), "1122333444555")):
        units = models.prunable(on_meta(arch))
        assert [u.number for u in units] == [*numbers]
        assert "".join(str(u.stage) for u in units) == stages
    weight = models.build("resnet20", 10).layer3[0].conv1.weight             # in: 32, out: 64
    assert weight.std().item() == pytest.approx(math.sqrt(2 / (9 * 64)), rel=0.02)          # He's
    x = torch.rand(2, 16, 8, 8, requires_grad=True)
    block = models.BasicBlock(16, 32)
    nn.init.zeros_(block.bn2.weight)                                # only the shortcut is left
    y = block(x)
    assert torch.equal(y[:, :16], x[:, :, ::2, ::2]) and not y[:, 16:].any()
    assert torch.autograd.grad(y.sum(), x)[0].sum() == 2 * 16 * 4 * 4   # 0 as published
    ten = on_meta("resnet8", ([10, 10, 10],))
    assert [*prune.filters_to_keep(ten, [.8, .7, .99]).values()] == [2, 3, 1]      # not 0.99…
    with torch.device("meta"):
        nets = [getattr(torchvision.models, name)() for name in (
            "mobilenet_v2", "vgg11_bn", "densenet121", "resnext50_32x4d")]
        nets += [nn.DataParallel(torchvision.models.resnet18()), nn.Sequential(
            nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(32, 10))]
    for network in nets:
        with pytest.raises(Refused, match="^[^\n]*cannot be removed[^\n]*Torch-Pruning$"):
            prune.shrunk(network)


@pytest.mark.parametrize("arch", ["resnet20", "vgg16", "resnet18", "resnet50"])
def test_a_shrunk_network_computes_what_the_zeroed_one_computes(arch):
    network = noisy(arch)
    before = models.digest(network.state_dict())
    small, keep = prune.shrunk(network, 0.3), prune.choose_filters(network, ([0.3],))
    assert models.digest(network.state_dict()) == before and not small.training
    for unit in models.prunable(network):
        weight, bn = network.get_parameter(f"{unit.conv}.weight"), network.get_submodule(unit.bn)
        stays = torch.zeros(len(weight), dtype=torch.bool)
        stays[keep[unit.conv]] = True
        norms, conv = weight.abs().sum((1, 2, 3)), small.get_submodule(unit.conv)
        assert stays.sum() == int(len(weight) * 0.7) and norms[~stays].max() <= norms[stays].min()
        assert conv.out_channels == small.get_submodule(unit.bn).num_features == stays.sum()
        for value in (weight, bn.weight, bn.bias, bn.running_mean):
            value.data[~stays] = 0
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    torch.testing.assert_close(small(x), network(x), rtol=1e-9, atol=1e-9)
    assert torch.equal(small(x), models.restore({
        "arch": arch, "classes": 10, "model": small.state_dict()})(x))


def test_weight_pruning_is_torchs_and_cumulative():
    dense = dense_checkpoint()
    for linear, scope in ((False, "global"), (True, "layer")):
        network = models.restore(dense)
        layers = [(m, "weight") for m in network.modules()
                  if isinstance(m, nn.Conv2d) or linear and isinstance(m, nn.Linear)]
        for some in [layers] if scope == "global" else [[layer] for layer in layers]:
            torch_prune.global_unstructured(some, torch_prune.L1Unstructured, amount=0.8)
        masks = {n[:-5]: b.bool() for n, b in network.named_buffers() if n.endswith("_mask")}
        found = pruned(dense, "weights", 0.8, scope=scope, include_linear=linear)["model"]
        assert all(torch.equal(found[n], v * masks.get(n, 1)) for n, v in dense["model"].items())
    first = pruned(dense, "weights", 0.3, "random")
    second = pruned(first, "weights", 0.51, "random", seed=5)
    one, two, three = (torch.cat([v.double().flatten() for v in c["model"].values()
                                  if v.dim() == 4]) for c in (dense, first, second))
    assert (three == 0).sum() == round(0.51 * len(three)) and not three[two == 0].any()
    assert [c["removed"] for c in (first, second)] == [pytest.approx(0.3, abs=1e-4)] * 2
    assert first["distance"] ** 2 == pytest.approx(1 - (two.norm() / one.norm()).item() ** 2)
    twice, name = pruned(pruned(dense), sparsity=0.25, method="random"), "layer1.0.conv1"
    rows = dense["model"][f"{name}.weight"][twice["kept"][name]]
    assert torch.equal(twice["model"][f"{name}.weight"], rows) and len(rows) == 6


def test_criteria_against_single_sample_gradients_and_numpy_and_what_they_keep():
    network, name = noisy("resnet8"), "layer3.0.conv1.weight"
    x, y = torch.randn(70, 3, 10, 10, dtype=torch.float64), torch.arange(70) % 10
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
        scores = prune.saliency(network, method, structure, [name], 0, (x, y))
        torch.testing.assert_close(scores[name].double(), reference, rtol=1e-6, atol=1e-14)
    scores = {"a": torch.tensor([1., 3., 2.]), "b": torch.tensor([60., 100.]),
              "c": torch.tensor([5.] + 8 * [4.])}
    for scope, counts, kept in (("global", (1, 1, 1), [[1], [1], [0]]),
                                ("global", (2, 1, 1), [[1, 2], [1], [0]]),
                                ("global", (0, 5, 9), [[0, 1, 2], [0, 1], [*range(9)]]),
                                ("layer", (2, 1, 1), [[1, 2], [1], [0]])):
        found = prune.keep_filters(scores, dict(zip("abc", counts)), scope)
        assert [found[c].tolist() for c in "abc"] == kept


def test_augmentation_against_a_slow_reference_and_its_draws_are_uniform():
    data, draws = tiny_data(50), train.epoch_draws(0, 3, 50)
    for found, i, (dy, dx), flip in zip(train.augment(data.train[0], *draws), *draws):
        padded = np.pad(data.test[0][i].numpy(), ((0, 0), (4, 4), (4, 4)))
        crop = padded[:, dy:dy + 8, dx:dx + 8]
        assert np.array_equal(found, crop[:, :, ::-1] if flip else crop)
    order, crop, flip = train.epoch_draws(0, 0, 50_000)
    chi2 = ((torch.bincount(crop @ torch.tensor([9, 1])) - 50_000 / 81) ** 2 / (50_000 / 81)).sum()
    assert abs(chi2.item() - 80) < 6 * math.sqrt(160)
    assert abs(flip.double().mean().item() - 0.5) < 6 * 0.5 / math.sqrt(50_000)
    assert len({(*train.epoch_draws(*k, 99)[0].tolist(),) for k in ((5, 7), (5, 8), (6, 7))}) == 3


def test_batches_show_each_image_once_and_ranks_share_them():
    data, draws = tiny_data(33), train.epoch_draws(0, 2, 33)
    whole, normalise = [*train.train_batches(data, 0, 2, 8, CPU)], v2.Normalize(data.mean, data.std)
    x, y = (torch.cat(parts) for parts in zip(*whole))
    torch.testing.assert_close(x, normalise(train.augment(data.train[0], *draws) / 255))
    assert torch.equal(y, data.train[1][draws[0]])
    for world, sizes in ((1, [8, 8, 8, 8, 1]), (2, [4] * 4), (3, [2] * 4)):
        for rank in range(world):
            found = [*train.train_batches(data, 0, 2, 8, CPU._replace(rank=rank, world=world))]
            assert [len(y) for _, y in found] == sizes
            for mine, batch, size in zip(found, whole, sizes):
                assert torch.equal(mine[0], batch[0][rank::world][:size])
    x, y = prune.calibration_of({"method": "obd", "seed": 0, "calibration_images": 30}, data, CPU)
    plain = normalise(data.test[0] / 255)                                # neither crop nor flip
    where = [((plain - image).abs() < 1e-5).flatten(1).all(1).nonzero().item() for image in x]
    assert len(set(where)) == 30 and torch.equal(y, data.train[1][where])


@pytest.mark.parametrize("side", [32, 65])
def test_folders_are_what_torchvision_reads(tmp_path, side):
    for seed, part in enumerate(("train", "val")):
        pictures(tmp_path / part, seed, (side, side), a=3, b=5)
    data = train.load_data("folder", str(tmp_path), 6, None, CPU.device)
    assert (data.classes, data.train[1].tolist()) == (2, [0, 0, 0, 1, 1, 1])
    resize = [] if side == 32 else [v2.Resize(256), v2.CenterCrop(224)]
    plain = v2.Compose([*resize, v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True),
                        v2.Normalize(data.mean, data.std)])
    (x, y), = train.plain_batches(data.test, torch.arange(8), data, CPU)
    wanted = [*torchvision.datasets.ImageFolder(tmp_path / "val")]
    torch.testing.assert_close(x, torch.stack([plain(image) for image, _ in wanted]))
    assert y.tolist() == [label for _, label in wanted]
    if side == 32:
        raw = data.train[0][:, :, 4:-4, 4:-4].double() / 255
        assert data.mean == pytest.approx(raw.mean((0, 2, 3)).tolist())
        assert data.std == pytest.approx(raw.std((0, 2, 3), correction=0).tolist())
        return
    assert (data.mean, data.std) == ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    copied = train.load_data("folder", shutil.copytree(tmp_path, tmp_path / "else/where"), 6, 2,
                             CPU.device)
    assert copied.fingerprint == data.fingerprint
    none, two, other = ([x for x, _ in train.train_batches(data, 0, epoch, 3, CPU._replace(
        workers=workers))] for epoch, workers in ((1, 0), (1, 2), (2, 0)))
    for x, same, later in zip(none, two, other):
        assert torch.equal(x, same) and not torch.equal(x, later) and x.shape == (3, 3, 224, 224)


def test_recipes_subsets_and_generated_images(tmp_path, monkeypatch):
    assert [[*recipe.values()] for recipe in train.RECIPES.values()] == [
        ["step", 16, 64, 0.1, [8, 12], 0.9, 5e-4, 5],
        *3 * [["step", 160, 64, 0.1, [80, 120], 0.9, 1e-4, 40]],
        ["step", 90, 256, 0.1, [30, 60], 0.9, 1e-4, 45]]
    assert np.bincount(train.balanced(np.arange(99) % 3, 8) % 3).tolist() == [3, 3, 2]
    assert len(torch.cat([train.shapes(99, seed)[0] for seed in (0, 0, 1)]).unique(dim=0)) == 198
    assert [v.item() for v in torch.std_mean(train.shapes(500, 0)[0].double())] == pytest.approx(
        [51.575, 127.515], abs=0.01)
    assert [len(train.split_of("shapes", "", part)[1]) for part in (True, False)] == [3000, 2000]
    draw = np.random.default_rng(0).integers(0, 256, (6, 32, 32, 3), dtype=np.uint8)
    monkeypatch.setattr(torchvision.datasets, "CIFAR100", lambda root, part, download: (
        types.SimpleNamespace(data=draw[:6 if part else 2], targets=[0, 1] * 3, classes="ab")))
    data = train.load_data("cifar100", "x", None, None, CPU.device)
    assert np.array_equal(data.test[0].permute(0, 2, 3, 1), draw[:2]) and len(data.train[0]) == 6
    assert (data.mean, data.std) == ([0.4914, 0.4822, 0.4465], [0.2023, 0.1994, 0.2010])
    made = []
    monkeypatch.setattr(train, "train", lambda args, _: made.append(train.the_recipe(args)))
    for line, *wanted in (
            ("--epochs 0 --pretrained", 16, [8, 12], 64), ("--milestones", 16, [], 64),
            ("--dry-run", 2, [1], 8)):
        ok("train", *line.split())
        assert [made[-1][k] for k in ("epochs", "milestones", "batch_size")] == wanted
        assert made[-1]["seed"] == 0
    monkeypatch.undo()
    study()
    folder = "train", "--dataset", "folder", "--data-dir", HOME / "data", "--out", tmp_path
    monkeypatch.setattr(train, "fit", lambda *_, keep: fails(made.append([*keep])))
    for total in (36, 200, 335):                        # the default budget's snapshot is kept
        call(*folder, "--epochs", total)
        assert total - total // 4 in made[-1] and 17 < len(made[-1]) < 21
    monkeypatch.undo()
    monkeypatch.setattr(torchvision.models, "get_model", lambda *names, **more: (names, more))
    assert models.build("resnet50", 1000, pretrained=True) == (
        ("resnet50",), {"weights": "IMAGENET1K_V1", "num_classes": 1000})
    monkeypatch.setattr(models, "build", lambda arch, classes, seed, _=0, build=models.build:
                        build(arch, classes, seed))
    assert " after 0 epochs" in ok(*folder, "--epochs", 0, "--pretrained")


@pytest.mark.parametrize("epochs, milestones", [(1, []), (2, [1]), (3, [1, 2])])
def test_a_first_attempt_of_few_epochs_needs_no_flags(tmp_path, monkeypatch, epochs, milestones):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train, "shapes", lambda count, seed, few=train.shapes: few(16, seed))
    train.load_data.cache_clear()
    out = ok("train", "--epochs", epochs)
    assert f"; {epochs} epochs, x0.1 at {milestones}; " in out and f"   1/{epochs}  lr 0.1  " in out
    ok("prune", "--method", "magnitude")
    out = ok("retrain", "--seed", 0, "--jobs", 1, "--schedule", "lr_rewind", "finetune")
    assert (" T = 1; with as many epochs or more, lr_rewind and" in out) == (epochs == 1)
    assert [(r["budget"], r["curve"][0]["lr"]) for r in read_rows("runs/shapes-resnet8-s0").values()
            ] == 2 * [(1, pytest.approx(0.1 ** epochs))]
    assert re.search(r"epochs \(here 16, .*remove this file or .*--out\)\n", call("train")[2])


def by_torch(network, data, at, epochs, folder=None, batch_size=8):
    optimizer = torch.optim.SGD(network.train().parameters(), 0.1, 0.9, weight_decay=5e-4)
    group, found, count = optimizer.param_groups[0], [], len(data.train[1])
    for epoch in range(epochs):
        losses, right = [], 0
        for x, y in train.train_batches(data, 0, epoch, batch_size, CPU):
            group["lr"], group["momentum"] = at(epoch * math.ceil(count / batch_size) + len(losses))
            out = network(x.contiguous())
            loss = F.cross_entropy(out, y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item() * len(y))
            right += (out.argmax(1) == y).sum().item()
        found.append((pytest.approx(sum(losses) / count, rel=1e-3), 100 * right / count))
    return found


@pytest.mark.parametrize("sparsity", [0, 0.8])
def test_the_loop_is_plain_sgd_and_goes_on_where_it_was_left(tmp_path, sparsity):
    dense, data = models.build("resnet8", 10), tiny_data(20)
    checkpoint = pruned({**dense_checkpoint(), "classes": 10, "model": dict(dense.state_dict())},
                        "weights", sparsity)
    at, run = schedules.retrain("one_cycle", 3, 3, lr=0.05), retrain.Run("", "one_cycle", 3, 0)
    network, _, masks = retrain.start(run, checkpoint)
    convs = [(m, "weight") for m in dense.modules() if isinstance(m, nn.Conv2d)]
    torch_prune.global_unstructured(convs, torch_prune.L1Unstructured, amount=sparsity)
    curve, wanted = (fitted(network, data, at, 3, tmp_path, masks=masks, keep=[2]),
                     by_torch(dense, data, at, 3))
    assert [(p["train_loss"], p["train_accuracy"]) for p in curve] == wanted
    assert [(p["epoch"], p["lr"]) for p in curve] == [(e + 1, at(3 * e)[0]) for e in range(3)]
    assert train.describe(curve, 90, 12).endswith(" %  4.5 min left")
    for conv, name in convs:
        torch_prune.remove(conv, name)
    for name, value in network.state_dict().items():
        torch.testing.assert_close(value, dense.state_dict()[name], rtol=1e-3, atol=1e-3)
        assert name not in masks or torch.equal(value != 0, dense.state_dict()[name] != 0)
    right = network(train.normaliser(data, CPU.device)(data.test[0])).argmax(1) == data.test[1]
    assert curve[-1]["test_accuracy"] == 100 * right.sum().item() / 20
    (tmp_path / "0").mkdir()
    fitted(dense, data, lambda step: (0.1, 0.0), 1, tmp_path / "0")
    assert models.read(tmp_path / "0/state.pt")["momentum"] == {}
    os.replace(tmp_path / "epoch-002.pt", tmp_path / "state.pt")    # as if stopped after epoch 2
    again = retrain.start(run, checkpoint)[0]
    assert fitted(again, data, at, 3, tmp_path, masks=masks) == curve
    assert models.digest(again.state_dict()) == models.digest(network.state_dict())


def test_weight_rewinding_takes_the_dense_runs_state(tmp_path, monkeypatch):
    half, dense = models.read(study() / "epoch-001.pt"), dense_checkpoint()
    def start(checkpoint, epochs=2, schedule="weight_rewind"):
        return retrain.start(retrain.Run(f"{study()}/x.pt", schedule, epochs, 7), checkpoint)
    small = pruned(dense)
    (rewound, held, _), kept = start(small), small["kept"]["layer2.0.conv1"]
    for found, state in ((rewound.state_dict(), half["model"]), (held, half["momentum"])):
        for key, rows in (("bn1.bias", (kept,)), ("conv2.weight", (slice(None), kept))):
            assert torch.equal(found[f"layer2.0.{key}"], state[f"layer2.0.{key}"][rows])
    rewound, _, masks = start(pruned(dense, "weights", 0.9))
    assert len(masks) == 7 and all(torch.equal(
        rewound.get_parameter(n), half["model"][n] * mask) for n, mask in masks.items())
    for seed, found in enumerate((start(small, 9), start(small, 2, "scratch_e"))):     # fresh ones
        assert torch.equal(found[0].conv1.weight, models.build("resnet8", 2, 7 * seed).conv1.weight)
    # Unpruned, the rewound run is the dense run's rest, to the bit: momentum included.
    argv = command(tmp_path, "weight_rewind", "none")
    models.save(argv[1], pruned(dense, "weights", 0))
    monkeypatch.setattr(train, "epoch_draws", lambda seed, epoch, n, draws=train.epoch_draws: draws(
        seed, epoch + 1, n))
    ok(*argv)
    name, = read_rows(tmp_path / "run")
    found = models.read(tmp_path / f"run/{name}.pt")["model"]
    assert models.digest(found) == models.digest(dense["model"])


def test_no_step_waits_for_the_device(tmp_path, monkeypatch):
    class Calls(TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            out = function(*args, **kwargs or {})
            float64 = isinstance(out, torch.Tensor) and out.dtype == torch.float64
            counts[-1].update([function.__name__] + ["float64"] * float64)
            return out
    waits = ("item", "tolist", "numpy", "cpu", "nonzero", "masked_select", "equal", "__bool__")
    counts = []
    monkeypatch.setattr(models, "save", lambda *_: None)
    for size in (16, 4):
        counts.append(collections.Counter())
        with Calls():
            fitted(models.build("resnet8", 10), tiny_data(32), lambda step: (0.1, 0.9), 1, tmp_path,
                   batch_size=size)
    few, many = ([count[name] for name in (*waits, "float64")] for count in counts)
    assert few == many and counts[0]["cpu"] == counts[0]["float64"] == 2


def test_bf16_keeps_weights_statistics_and_loss_in_float32():
    losses, kinds = [], []
    (x, y), = train.train_batches(tiny_data(32), 0, 0, 32, CPU)
    for precision in ("fp32", "bf16"):
        network = models.build("resnet8", 10)
        network.layer1[0].conv1.register_forward_hook(lambda m, i, out: kinds.append(out.dtype))
        optimizer = train.optimizer_of(network, 1e-4)
        optimizer.param_groups[0]["lr"] = 0.01
        losses.append(torch.stack([train.train_step(
            network, optimizer, x, y, CPU._replace(precision=precision))[0] for _ in range(3)]))
    kept = [*network.state_dict().values(), losses[1], *optimizer.state[network.fc.bias].values()]
    assert {t.dtype for t in kept if t.is_floating_point()} == {torch.float32}
    assert kinds == 3 * [torch.float32] + 3 * [torch.bfloat16]
    torch.testing.assert_close(losses[1], losses[0], rtol=0.02, atol=0.02)


def test_verdicts():
    angle = np.linspace(0, np.pi / 2, 100_001)                      # t = √f tan(angle), f degrees
    for f, quantile in enumerate(retrain.STUDENT, 1):
        mass = np.cumsum(np.cos(angle) ** (f - 1))
        angle_of = np.interp(0.95, mass / mass[-1], angle)
        assert math.sqrt(f) * math.tan(angle_of) == pytest.approx(quantile, abs=2e-3)
    for mean, sd, relation, words in (
            (.6, .1, ">", "**yes** +0.60 [+0.35, +0.85]"), (0, 1, "<=", "not decided +0.00"),
            (-.6, .1, ">", "**no** -0.60 [-0.85, -0.35]"), (0, 1, "=", "not decided +0.00"),
            (0, .1, ">", "not decided +0.00"), (0, .1, "=", "**yes** +0.00 [-0.25, +0.25]"),
            (.6, .1, "=", "**no** +0.60"), (-.6, .1, "=", "**no** -0.60"),
            (.6, .1, "<=", "**no** +0.60"), (-2, .1, "<=", "**yes** -2.00")):    # lost accuracy
        found = retrain.verdict([mean - sd, mean, mean + sd], relation)
        assert found.startswith(words) and found.endswith("], n=3")
    assert retrain.verdict([.5, .5], ">") == "not decided +0.50, n=2"
    assert retrain.verdict([0, 1] * 9, ">") == "**yes** +0.50 [+0.23, +0.77], n=18"


def dry_runs(folder):
    """The three scripts, one after the other, as on Windows; in a process of its own."""
    os.chdir(folder)
    real = train.ctypes.CDLL.__init__
    train.ctypes.CDLL.__init__ = lambda self, name, *more, **named: real(
        self, name + "", *more, **named)
    sys.modules |= {"fcntl": None, "resource": None}
    vars(os).pop("sched_getaffinity", None)
    ok("train", "--dry-run")
    ok("prune", "--dry-run")
    ok("retrain", "--dry-run", "--seed", 0, "--jobs", 1, "--schedule", *retrain.EVERY)


def test_flags(tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    for script in ("schedules", "train", "prune", "retrain"):
        assert 10 < call(script, "--help")[1].count("\n") <= 45, script
    with nth(train, "data_for", 0, fails):                     # refused before anything is loaded
        assert "no plan B" in call("prune", study() / "dense.pt", "--plan", "B")[2]
    with nth(train, "load_data", 0, fails):
        assert "unknown network" in call("train", "--arch", "resnet9", "--seed", 0)[2]
    shutil.copytree(study(), tmp_path / "run")
    monkeypatch.setattr(retrain, "cores", lambda: 7)
    with nth(retrain, "attempts", 0, fails) as asked, nth(retrain, "retrain_all", None) as wanted:
        assert "No space" in call("retrain", tmp_path / "run/filters.pt")[2]
    assert asked[0][0] == 7 and [(r.seed, r.schedule) for r in wanted[0][0]] == [
        *itertools.product(range(3), "finetune weight_rewind lr_rewind slr one_cycle".split())]
    out = ok("prune", tmp_path / "run/filters.pt", "--method", "random", "--seed", 3)
    assert " " + str(tmp_path / "run/filters--filters-random-0.5-s3.pt") in out
    ok(*command(tmp_path, "slr", "filters", "--schedule", "finetune", "slr", "one_cycle", "--lr",
                0.3, "--end-lr", 0.2, "--no-cycle-momentum"))
    assert [(r["lr"], r["end_lr"], r["cycle_momentum"], r["curve"][0]["lr"])
            for r in read_rows(tmp_path / "run").values()] == [
        (None, 0.2, None, 0.2), (0.3, None, None, 0.3), (0.3, 0.2, False, 0.3)]


@functools.cache
def undisturbed(make, *args):
    folder = HOME / "-".join(map(str, args))
    ok(*make(folder, *args))
    return content(folder / "run")


def fails(*_):
    raise OSError("No space left on device")


def bad_loss(real, network, optimizer, x, *rest):
    return real(network, optimizer, x * float("nan"), *rest)


def bad_weights(real, network, *rest):
    network.conv1.weight.data.fill_(float("inf"))
    return torch.tensor(1.0), torch.tensor(1)


STEP, SAVE, SYNC = (train, "train_step"), (models, "save"), (os, "fsync")
STOP, KILL = signal.SIGINT, getattr(signal, "SIGKILL", 9)
SAID = {STOP: "goes on from here", fails: "No space", bad_loss: "the loss is not finite in ep",
        bad_weights: "its weights are not finite; try a smaller --lr"}


@pytest.mark.parametrize("name, pruned, where, number, how, done", [
    ("dense", None, STEP, 12, STOP, 2), ("dense", None, SAVE, 1, KILL, 0),
    ("dense", None, SAVE, 5, STOP, 3), ("dense", None, SYNC, 2, fails, 1),
    ("dense", None, STEP, 7, bad_loss, 1), ("dense", None, STEP, 9, bad_weights, 1),
    ("one_cycle", "weights", STEP, 3, STOP, 0), ("weight_rewind", "filters", STEP, 5, KILL, 1),
    ("slr", "filters", SAVE, 2, KILL, 2), ("scratch_e", "weights", STEP, 11, STOP, 2)])
def test_the_same_command_goes_on(tmp_path, name, pruned, where, number, how, done):
    """Bitwise. It ends at call `number` of `where`, with `done` epochs on the disk."""
    argv, whole = command(tmp_path, name, pruned), undisturbed(command, name, pruned)
    with nth(*where, number, how):
        if how is KILL:
            child = FORK.Process(target=call, args=argv)
            child.start()
            child.join()
            assert child.exitcode == -KILL
        else:
            status, out, err = call(*argv)
            assert status == (130 if how is STOP else 2) and SAID[how] in out + err
            assert err.count("\n") == (how is not STOP)
    states = [models.read(p) for p in tmp_path.glob("run/*.pt") if "epoch-" not in p.name]
    assert sum(len(s["curve"]) for s in states if s["kind"] == "state") == done
    with nth(*STEP, None) as steps:
        ok(*argv)
    assert len(steps) == 5 * ({"dense": 3, "scratch_e": 5}.get(name, 2) - done)
    assert not list(tmp_path.glob("run/*.tmp"))
    assert content(tmp_path / "run") == whole


def test_another_setting_and_a_second_process_are_refused(tmp_path):
    argv = command(tmp_path, "dense")
    with nth(*STEP, 6, STOP):
        assert call(*argv)[0] == 130
    with train.working_in(tmp_path / "run", CPU):
        assert "/run: another train.py or retrain.py works in this folder" in call(*argv)[2]
    for step in (1, 11):                                             # unfinished, finished
        before = listing(tmp_path)
        for change in ("--lr 1", "--epochs 4", "--subset 8", "--batch-size 5", "--seed 1",
                       "--schedule cosine --milestones", "--weight-decay .1", "--momentum .5",
                       "--precision bf16", "--arch resnet14", "--milestones 1",
                       f"--data-dir {HOME}/other")[::step]:
            status, _, err = call(*argv, *change.split())
            name = change.split()[0][2:].replace("-", "_").replace("_dir", "")
            assert status == 2 and err.count("\n") == 1 and f" {name} (here " in err
            assert "run/dense.pt: belongs to another run" in err and listing(tmp_path) == before
        ok(*argv)


def test_rounds_prune_and_retrain_in_one_call(tmp_path):
    argv, run = command(tmp_path, "weight_rewind", "weights", "--rounds", 3), tmp_path / "run"
    with nth(*STEP, 22, STOP):
        assert call(*argv)[0] == 130
    assert [r["round"] for r in read_rows(run).values()] == [1, 2]
    ok(*argv)
    for k, (name, row) in enumerate(read_rows(run).items(), 1):
        model = models.read(run / f"{name}.pt")["model"]
        zero = sum((v == 0).sum().item() for v in model.values() if v.dim() == 4)
        assert (row["round"], row["sparsity"], zero) == (k, 1 - 0.5 ** k, 74160 * (1 - 0.5 ** k))
    two_seeds = command(tmp_path, "slr", "filters", "--rounds", 2, "--seed", 1, 0)
    with nth(train, "fit", 0, fails):          # what fails has no later rounds and stops no other
        status, out, err = call(*two_seeds)
    assert status == 2 and re.search(r"filters.pt slr t=2 seed=1: No space .*\n.* 1 of 2 runs "
                                     r"failed; the same command tries them again\n$", err)
    assert "pruned: filters 0.5 round 2 |" in out and "pruned: weights 0.875 round 3 |" in out
    assert re.findall(r"; (\d) runs left, about 0\.\d min", out) == ["1", "0"]
    ok(*two_seeds)                                                  # and is tried again
    assert [r["seed"] for r in read_rows(run).values()][3:] == [0, 0, 1, 1]
    one, two = (models.read(run / f"{n}.pt")["kept"] for n in [*read_rows(run)][3:5])
    assert all(len(two[c]) == len(k) // 2 and set(two[c].tolist()) < {*k.tolist()}
               for c, k in one.items())
    (run / "epoch-001.pt").unlink()
    before = listing(tmp_path)
    with pytest.raises(Refused, match="0.999999 of 74160 weights: 0 are .* one has to be left"):
        pruned(dense_checkpoint(), "weights", 0.999999)
    assert re.search(r"weight_rewind with 2 epochs needs \S+/epoch-001.pt; there is "
                     "epoch-002.pt", call(*argv)[2]) and listing(tmp_path) == before


def test_rows_survive_a_crash(tmp_path):
    argv, path = command(tmp_path, "finetune", "filters"), tmp_path / "run/results.jsonl"
    ok(*argv, "--seed", 0, 1)
    whole = path.read_bytes()
    first, second = whole.splitlines(keepends=True)
    for text in (whole[:-20], first + b'{"', first):
        path.write_bytes(text)
        with nth(*STEP, 0, STOP):
            ok(*argv, "--seed", 0, 1)
        assert path.read_bytes() == whole
    other = first.replace(b'"format": 2', b'"format": 1')
    for text, number in ((whole[:-20] + b"\n", 2), (first + other + second, 2), (other, 1), *(
            (line + b"\n" + whole, 1) for line in (b"[]", b"\xff", b"[" * 99_999, b'{"run": 1}'))):
        path.write_bytes(text)
        said = f" error: {path}: line {number} is no row of format 2; remove it\n"
        assert call(*argv)[2].endswith(said) and path.read_bytes() == text
    with pytest.raises(ValueError):
        retrain.write_rows(tmp_path, {"run": {"test_accuracy": math.nan}})


def test_a_damaged_or_hostile_checkpoint_is_refused(tmp_path, monkeypatch):
    class Hostile:
        def __reduce__(self):
            return os.mkdir, ("it-ran",)
    def sealed(value, zipped=True):
        buffer = io.BytesIO()
        torch.save(value, buffer, _use_new_zipfile_serialization=zipped)
        return buffer.getvalue() + hashlib.sha256(buffer.getvalue()).digest()
    monkeypatch.chdir(tmp_path)
    whole, hostile = (study() / "filters.pt").read_bytes(), {"format": 2, "kind": Hostile()}
    n = len(whole)
    for data in (*(whole[:i] + bytes([whole[i] ^ 1 << i % 8]) + whole[i + 1:]
                   for i in [*range(0, n, n // 50), n - 32, n - 1]), whole + b"x",
                 *(whole[:i] for i in (0, 31, 32, 33, n - 33, n - 32, n - 1)), sealed(hostile),
                 sealed(hostile, False), sealed({"format": 1, "kind": "dense"})):
        Path("x.pt").write_bytes(data)
        with pytest.raises(Refused, match="^x.pt: not a checkpoint of format 2, or damaged;"):
            models.read("x.pt")
    seen, rename = [], os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: seen.append(os.fstat(fd).st_size))
    monkeypatch.setattr(os, "replace", lambda *names: (seen.append(names[1]), rename(*names)))
    models.write("x.pt", b"new")
    assert seen == [3, "x.pt"] and os.listdir() == ["x.pt"]


SHORT = {"SUBSET": "train --subset 5000", "TWICE": "train --milestones 8 8",
         "OTHER": str(HOME / "other"), "OTHERWISE": "prune run/dense.pt --method random --seed 5",
         "FOLDER": "train --dataset folder --out new --data-dir", "DENSE": "prune run/dense.pt",
         "WEIGHTS": "prune run/weights.pt --structure weights"}
BAD = r"""
invalid whole number|train --epochs 1.5;train --batch-size 1;train --workers 999;retrain --rounds 0
invalid number|train --lr nan;train --lr 0;train --momentum 1;prune --sparsity 1;schedules --lr x
invalid choice|train --dataset mnist;prune --method best;retrain --schedule b;train --precision int8
unrecognized|train --colour red;train x.pt;schedules x;train --epoch 3;train --resume
(unknown n|the run .16)|train --arch resnet2;train --arch resnet08;train --milestones 8 16;TWICE
(belongs to --schedule step|0 needs --pretr)|train --milestones 1 --schedule cosine;train --epochs 0
(invalid choice: 'tpu'|a class has too few)|train --device tpu;SUBSET
there are weights of .*, none of resnet18 for 10|train --arch resnet18 --pretrained
no such checkpoint|train --evaluate no.pt;prune run/dense.pt no.pt;prune;retrain no.pt;prune sets
(or damaged|is a (state|dense))|prune x.pt;train --evaluate run/epoch-001.pt;retrain run/dense.pt
was pruned otherwise, or from another|OTHERWISE
is for filters|DENSE --plan B --sparsity .5;DENSE --plan B --structure weights
(is for --structure weights|no plan B)|DENSE --include-linear;DENSE --plan B
(1 or 3, one a|one value|hrank)|DENSE --sparsity 0 0;WEIGHTS --sparsity 0 0;WEIGHTS --method hrank
(weights are pruned|zero already .sp)|prune run/weights.pt;WEIGHTS --sparsity .1
name no (checkpoint|file)|DENSE --dry-run;retrain run/filters.pt --dry-run
ignore it|retrain --schedule finetune --lr 1;retrain --schedule slr --end-lr 1 --no-cycle-momentum
(no finished runs|no pruned checkpoint is there)|retrain --report sets;retrain
has no (training|test) images|FOLDER nowhere;FOLDER sets/notest
not a readable image|FOLDER sets/corrupt
has 16 bits a channel|FOLDER sets/deep
(square and .* not 9 x 8|pixels: b c)|FOLDER sets/wide;FOLDER sets/names
pixels: 8 9|FOLDER sets/sizes
10 images, .* but the network was trained on|DENSE --data-dir OTHER
"""


def test_bad_input_is_one_line_and_changes_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train, "shapes", lambda count, seed, few=train.shapes: few(50, seed))
    shutil.copytree(study(), "run")
    shutil.copy("run/weights.pt", "run/filters-random-0.5-s5.pt")
    Path("x.pt").write_bytes(Path("run/dense.pt").read_bytes()[:999])
    for name, split in itertools.product(("corrupt", "deep", "wide", "names"), ("train", "test")):
        pictures(Path("sets", name, split), a=2, b=2)
    pictures(Path("sets/notest/train"), a=2)
    pictures(Path("sets/sizes/train"), a=2)
    pictures(Path("sets/sizes/test"), shape=(9, 9), a=2)
    os.rename("sets/names/test/b", "sets/names/test/c")
    Path("sets/corrupt/train/b/1.png").write_bytes(b"\x89PNG")
    Path("sets/deep/train/b/1.png").write_bytes(b"\x89PNG" + bytes(20) + b"\x10" + bytes(9))
    pictures(Path("sets/wide/train"), shape=(8, 9), a=1)
    before = listing(tmp_path)
    for said, line in (row.rsplit("|", 1) for row in BAD.strip().splitlines()):
        for text in line.split(";"):
            argv = re.sub("[A-Z]{5,}", lambda found: SHORT[found[0]], text)
            status, _, err = call(*argv.split())
            assert status == 2 and re.search(said, err.splitlines()[-1]), (text, err)
            assert ": error: " in err and "Traceback" not in err and listing(tmp_path) == before


def four_runs(folder, jobs):
    command(folder, "slr")
    return ["retrain", folder / "run/filters.pt", folder / "run/weights.pt", "--seed", 1,
            "--schedule", "one_cycle", "finetune", "--epochs", 6, "--jobs", jobs]


def train_and_retrain(folder):                               # batches of 4, 4 and 2 images
    return (command(folder / "new", "dense", None, "--batch-size", 4, "--lr", 0.01),
            command(folder, "lr_rewind", "weights", "--rounds", 2))


def one_of_two(rank, folder):
    """What torchrun starts twice, here without importing everything again."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2",
                   "MASTER_ADDR": "localhost", "MASTER_PORT": str(20_000 + os.getppid() % 9_999)}
    sys.stdout = open(folder / f"{rank}.txt", "w")
    nn.BatchNorm2d.train = lambda self, mode=True: nn.Module.train(self, False)
    dense, retrained = ([*map(str, argv[1:])] for argv in train_and_retrain(folder))
    train.command(lambda: (train.main(dense), retrain.main(retrained)))


def killed(folder, written):
    """A parent of two workers, all of whom hold `written`, that dies when there is a state."""
    def end():
        while not list(folder.glob("run/*-t6-*.pt")):
            time.sleep(0.01)
        os.kill(os.getpid(), KILL)
    os.dup2(written, 2)
    os.close(written)
    os.environ["OMP_NUM_THREADS"] = "1"
    threading.Thread(target=end, daemon=True).start()
    retrain.main([*map(str, four_runs(folder, 2)[1:])])


@pytest.fixture(scope="module", autouse=True)
def others(tmp_path_factory):
    """Processes that work on the second core from the beginning on, and their folder."""
    folder = tmp_path_factory.mktemp("others")
    (folder / "dry").mkdir()
    train_and_retrain(folder)
    four_runs(folder / "killed", 2)
    said, written = os.pipe()
    dies, dry, *two = [FORK.Process(target=killed, args=[folder / "killed", written]),
                       FORK.Process(target=dry_runs, args=[folder / "dry"]), *(
        FORK.Process(target=one_of_two, args=[rank, folder]) for rank in range(2))]
    for process in (dies, dry, *two):
        process.start()
        if process is dies:
            os.close(written)
    yield types.SimpleNamespace(folder=folder, said=said, killed=dies, dry=dry, two=two)
    for process in (dies, dry, *two):
        process.kill()


def test_two_workers_and_a_killed_parent_end_with_the_rows_of_one_process(others, monkeypatch):
    process, folder = others.killed, others.folder
    with open(others.said) as said:
        said.read()                             # to its end: when all who can write have ended
    process.join()
    states = [models.read(path)["kind"] for path in folder.glob("killed/run/*-t6-*.pt")]
    assert process.exitcode == -KILL and "state" in states
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr(multiprocessing, "get_context", lambda kind: FORK)     # needs no imports
    for process in (others.dry, *others.two):
        process.join()

    def interrupted(real, *what):                    # Ctrl-C, which workers leave to their parent
        for child in multiprocessing.active_children():
            os.kill(child.pid, STOP)
        real(*what)
    with nth(retrain, "write_rows", 0, interrupted):
        out = ok(*four_runs(folder / "killed", 2))
    assert re.findall(r" (\d) runs left", out)[-2:] == ["1", "0"]
    assert content(folder / "killed/run") == undisturbed(four_runs, 1)
    monkeypatch.delenv("OMP_NUM_THREADS")                   # then each worker takes its share
    monkeypatch.setattr(retrain, "cores", lambda: 4)
    monkeypatch.setattr(torch, "set_num_threads", lambda n: os.environ.update(threads=f"{n}"))
    monkeypatch.setattr(train, "the_machine", lambda args: os.environ.update(    # and its GPU
        device=os.environ["LOCAL_RANK"]) if "threads" in os.environ else CPU)
    monkeypatch.setattr(train, "provenance", lambda _: {
        k: int(os.environ[k]) for k in ("threads", "device")} | {"torch": "", "commit": ""})
    ok(*four_runs(folder / "killed", 2), "--epochs", 1)
    rows = [*read_rows(folder / "killed/run").values()][4:]
    assert all(r["threads"] == 2 and r["device"] for r in rows) and len(rows) == 4
    with nth(retrain, "write_rows", 0, fails):              # ends the workers and what is to come
        assert "No space" in call(*four_runs(folder / "killed", 2), "--epochs", 7)[2]
    assert len([*folder.glob("killed/run/*-t7-*.pt")]) < 4


def test_processes_add_their_losses_and_share_the_first_ones_statistics(tmp_path, monkeypatch):
    network, sent, added = models.build("resnet8", 10), [], []
    monkeypatch.setattr(nn.parallel, "DistributedDataParallel", lambda network: network)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda v: added.append(v) or v.mul_(2))
    monkeypatch.setattr(torch.distributed, "broadcast", lambda *what: sent.append(what))
    point, = fitted(network, tiny_data(), lambda _: (0.01, 0.9), 1, tmp_path,
                    machine=CPU._replace(world=2))
    assert [[*v.shape] for v in added] == [[5], [5], []]            # losses, hits; right answers
    assert [point[k] for k in ("train_loss", "train_accuracy", "test_accuracy")] == pytest.approx(
        [added[0].sum().item() / 40, added[1].sum().item() / 0.4, added[2].item() / 0.4])
    assert all(one is two for (one, _), two in zip(sent, network.buffers(), strict=True))
    monkeypatch.setattr(retrain, "retrain", fails)
    with pytest.raises(OSError):        # a process that goes on alone would make the others wait
        retrain.attempt(retrain.Run("", "slr", 1, 0), None, CPU._replace(world=2))
    monkeypatch.setenv("RANK", "1")
    assert "environment: RANK=1 of WORLD_SIZE=1: start with torchrun or unset" in call("train")[2]


@pytest.fixture
def dry(others):
    others.dry.join()
    assert others.dry.exitcode == 0
    return others.folder / "dry/runs/shapes-resnet8-s0-dry"


def test_the_scripts_chain_and_rows_say_all(dry, monkeypatch):
    rows, dense = read_rows(dry), models.read(dry / "dense.pt", "dense")
    assert [(r["method"], r["schedule"]) for r in rows.values()] == [
        *itertools.product(["magnitude", "random"], retrain.EVERY)]
    sources = {m: models.read(dry / f"filters-{m}-0.5.pt") for m in ("magnitude", "random")}
    assert dense["settings"]["precision"] == "fp32"
    for name, row in rows.items():
        saved, pruned = models.read(dry / f"{name}.pt", "retrained"), sources[row["method"]]
        assert row["seconds"] == round(row["seconds"], 1) and saved["row"] == row
        assert name.startswith(f"filters-{row['method']}-0.5-{row['schedule']}-t1-s0-")
        assert len(row["curve"]) == row["epochs"]
        assert row["test_accuracy"] == saved["test_accuracy"] == row["curve"][-1]["test_accuracy"]
        assert row | {k: pruned[k] for k in ("distance", "removed", "arch", "recipe")} | {
            **dict.fromkeys(("plan", "lr", "end_lr")), "run": name, "dataset": "shapes", "seed": 0,
            "scope": "layer", "sparsity": 0.5, "round": 1, "pruning_seed": 0, "budget": 1,
            "epochs": 3 if row["schedule"] in ("scratch_e", "scratch_b") else 1, "subset": 16,
            "cycle_momentum": True if row["schedule"] == "one_cycle" else None, "batch_size": 8,
            "weight_decay": 5e-4, "precision": "fp32", "dense": models.digest(dense["model"]),
            "dense_test_accuracy": dense["test_accuracy"], "dense_params": 75290, "params": 38314,
            "dense_macs": 6884992, "macs": 3567232, "pruned": models.digest(pruned["model"]),
            "nonzero": 38314, "pruned_test_accuracy": pruned["test_accuracy"]} == row
    before = listing(dry)
    monkeypatch.chdir(dry.parent.parent)
    with nth(train, "train_step", 0, signal.SIGINT):
        assert "dense.pt: done already, test " in ok("train", "--dry-run")
        assert ok("retrain", "--dry-run", "--seed", 0).count("done already") == 10
        assert retrain.report([*rows.values()]) in ok("retrain", "--report", dry)
    assert listing(dry) == before
    assert f"test {row['test_accuracy']:.2f} %, 38,314 parameters, 3,567,232 MACs" in ok(
        "train", "--evaluate", dry / f"{name}.pt")
    assert not models.load(dry / f"{name}.pt").training


@pytest.mark.speed
def test_speed():
    """Ten steps of 64 images, by this loop and by the plain loop `by_torch`."""
    data, dense, times = tiny_data(640, 32), models.build("resnet20", 10), {}
    data, half = data._replace(test=tiny_data(8, 32).test), prune.shrunk(dense)
    torch.set_num_threads(retrain.cores())
    for _, network, loop in itertools.product(range(7), (dense, half), (fitted, by_torch)):
        copied, folder = copy.deepcopy(network), tempfile.mkdtemp(dir=HOME)
        began = time.perf_counter()
        loop(copied, data, lambda _: (0.1, 0.9), 1, folder, 64)
        times.setdefault((network, loop), []).append(time.perf_counter() - began)
    torch.set_num_threads(1)
    print(f"\n{retrain.cores()} threads: images/s, times dense, times the plain loop")
    for name, network in (("dense", dense), ("half of the filters", half)):
        taken, others = times[network, fitted], (times[dense, fitted], times[network, by_torch])
        print(f"{name:20} {640 / np.median(taken):5.0f}", *(
            f"{np.median(np.divide(other, taken)):.2f}" for other in others))


def test_readme_schedules_alone_drive_any_loop(tmp_path, monkeypatch):
    snippet, in_memory = (code for _, code in BLOCKS if "optimizer." in code or "shrunk" in code)
    shutil.copy(HERE / "schedules.py", tmp_path)
    with monkeypatch.context() as alone:
        alone.syspath_prepend(tmp_path)
        for name in ("schedules", "models", "train", "prune", "retrain"):
            alone.setitem(sys.modules, name, None)
        del sys.modules["schedules"]
        exec(snippet, names := {})
        assert names["schedules"].__file__ == str(tmp_path / "schedules.py")
    assert (names["step"], names["schedule"](99)[0]) == (99, pytest.approx(1e-5))
    names, out = {}, io.StringIO()
    with contextlib.redirect_stdout(out):
        exec(in_memory, names)
    assert f"prints `{out.getvalue().strip()}`" in README
    loop = snippet.replace("torch.nn.Linear(8, 2)", "small.train()").replace(
        "torch.randn(4, 8)", "torch.randn(4, 3, 32, 32)").replace("range(20)", "range(2)")
    exec(loop.replace("epochs = 5", "epochs = 1"), names)
    assert all(p.isfinite().all() for p in names["small"].parameters())


def test_readme_holds_the_numbers_of_the_rows():
    paths = sorted(HERE.glob(".results/*/results.jsonl"))
    rows = [row for path in paths for row in read_rows(path.parent).values()]
    text, section = retrain.report(rows), README.split("## Results")[1].split("\n## ")[0]
    assert {*re.findall(r"\d+\.\d\d", section)} <= {*re.findall(r"\d+\.\d\d", text)}
    parts = re.findall(r"^\| (?:.+\n)+|^random, t=11: .*\n(?:  .+\n)+", text, re.M)
    assert len(parts) == 11 and all(part in section for part in parts[:3] + parts[5::3])
    for what, said in ((b"".join(path.read_bytes() for path in paths), "rows"),
                       (text.encode(), "report")):           # every digit of both, shown or not
        assert f"{hashlib.sha256(what).hexdigest()[:8]} the {said}" in section
    assert all(row["test_accuracy"] == row["curve"][-1]["test_accuracy"] for row in rows)


def test_the_report_names_what_the_study_has_not():
    row = next(r for r in read_rows(HERE / ".results/resnet20-s0").values()
               if (r["schedule"], r["method"], r["budget"]) == ("one_cycle", "magnitude", 11))
    other = {"lr": .2, "end_lr": 0., "cycle_momentum": False, "test_accuracy": 80.0}
    text = retrain.report([row, row | other, row | {"schedule": "scratch"}, row | {
        "plan": "B", "sparsity": None}, row | {"sparsity": [.1, .2]}, row | {
        "structure": "weights", "scope": "layer", "include_linear": True, "round": 2}, row | {
        "run": "first--filters-x", "budget": 6}, row | {"round": 2, "schedule": "finetune"}])
    assert "filters 0.5 round 2 | magnitude, t=11 |" in text       # had eleven epochs before: its
    assert "round 2 | magnitude, t=6" not in text                  # first six are no run of six
    for line in (
            "| `one_cycle/lr=0.2/end=0/flat-momentum` | 80.00 (-4.79, n=1) |",
            "| `one_cycle/lr=0.2/end=0/flat-momentum > one_cycle` | not decided -4.51, n=1 |",
            "| `scratch` | 84.51 (-0.28, n=1) |", *(
                f"| resnet20 on folder, pruned: {what} | magnitude, t=11 |" for what in (
                    "filters planB", "filters 0.1_0.2", "weights 0.5-layer-linear round 2")),
            "| resnet20 on folder, pruned: filters 0.5 of first | magnitude, t=6 |"):
        assert line in text.split("\n"), (line, text)
    assert "  one_cycle/lr" in text and "  scratch" not in text          # from so low that it hides
    made = {("one_cycle", .5): (80, 81, 85), ("finetune", .5): (78, 80, 81),     # by hand: paired,
            ("one_cycle", 0): (90, 90, 90), ("finetune", 0): (89, 90, 88)}       # in any order
    text = retrain.report([row | {
        "schedule": schedule, "sparsity": p, "removed": p, "dense": k % 3, "seed": k % 3,
        "dense_test_accuracy": 84, "test_accuracy": values[k % 3]}
        for i, ((schedule, p), values) in enumerate(made.items()) for k in range(i, i + 3)])
    for line in ("| `one_cycle` | 82.00 ± 2.65 (-2.00, n=3) |",
                 "| `one_cycle > finetune` | not decided +2.33 [-1.46, +6.13], n=3 |",
                 "| `one_cycle - finetune > one_cycle/unpruned - finetune/unpruned` | "
                 "not decided +1.33 [-0.10, +2.77], n=3 |"):
        assert line in text.split("\n"), (line, text)


def test_readme_networks_are_of_use_elsewhere(dry, monkeypatch):
    monkeypatch.chdir(dry.parent.parent)
    ok("prune", "--dry-run", "--structure", "weights", "--sparsity", 0.9)
    snippet = next(code for _, code in BLOCKS if "torch.export" in code).replace("-s0/", "-s0-dry/")
    names, out = {}, io.StringIO()
    with contextlib.redirect_stdout(out), warnings.catch_warnings(action="ignore"):
        exec(snippet, names)
        x = torch.randn(1, 3, 32, 32)
        again = torch.export.load("small.pt2").module()(x)
    assert out.getvalue().strip() in " ".join(README.split()).replace("` `", "")
    torch.testing.assert_close(again, names["network"](x))
    assert torch_prune.is_pruned(names["masked"])


def test_readme_commands_are_command_lines(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train, "the_machine", fails)
    lines = [line for python, code in BLOCKS if not python for line in code.splitlines()]
    commands = [c for line in lines for c in re.findall(r"(\w+)\.py\b([^;&#]*)", line)]
    assert len(commands) > 12 and {c for c, _ in commands} == {"train", "prune", "retrain"}
    for script, rest in commands:
        rest = rest.replace("$s", "0")                                # $ALL are files
        err = call(script, *rest.split())[2]
        assert re.search("No space|no such checkpoint|no pruned", err)
    assert "pip install -r requirements.txt pytest && python -m pytest -q" in lines[:4]


def test_two_processes_compute_what_one_computes(others, tmp_path, monkeypatch):
    monkeypatch.setattr(nn.BatchNorm2d, "train", lambda self, mode=1: nn.Module.train(self, False))
    for argv in train_and_retrain(tmp_path):
        ok(*argv)
    for process in others.two:
        process.join(300)
    assert [process.exitcode for process in others.two] == [0, 0]
    out = (others.folder / "0.txt").read_text()                         # only the first one speaks
    assert (out.count("Wrote"), out.count("- Pictures")) == (1, 1)
    assert (others.folder / "1.txt").read_text() == ""
    curves = ([*models.read(f / "new/run/dense.pt")["curve"], *(
        p for r in read_rows(f / "run").values() for p in r["curve"])]
        for f in (tmp_path, others.folder))
    for one, two in zip(*curves, strict=True):
        assert one == {**two, "train_loss": pytest.approx(two["train_loss"], abs=1e-4)}
