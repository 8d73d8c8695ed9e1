"""Everything against oracles: torch's own schedulers and pruning, numpy, slow references, numbers
worked out by hand or published. No network, no data set, under a minute on two cores.

    python -m pytest -q           # the quick suite
    python -m pytest -q -m slow   # what takes minutes: every step interrupted, 200 kills, processes
"""
import atexit
import contextlib
import copy
import functools
import io
import itertools
import json
import math
import os
import pickle
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch.nn.utils import prune as torch_prune

import models
import prune
import retrain
import schedules
import train

HERE = Path(__file__).parent
torch.set_num_threads(1)        # networks this small only make two threads wait for each other
train.shapes = functools.cache(train.shapes)       # a second of work, wanted by many command lines

CIFAR = {"schedule": "step", "epochs": 160, "lr": 0.1, "milestones": [80, 120], "momentum": 0.9}
CPU = train.Machine(torch.device("cpu"), False, "off", 0)


MAINS = {"schedules": schedules.main, "train": train.main, "prune": prune.main,
         "retrain": retrain.main}
with warnings.catch_warnings():             # registers the marker without a configuration file
    warnings.simplefilter("ignore")
    SLOW = pytest.mark.slow


def slow(test):
    """Marks a test that only `python -m pytest -m slow` runs."""
    skip = pytest.mark.skipif(not any("slow" in a for a in sys.argv), reason="long: -m slow")
    return SLOW(skip(test))


# ---- helpers -------------------------------------------------------------------------------------

def call(main, *argv):
    """(status, stdout, stderr) of a command line, in this process; a warning is an error."""
    out, err = (io.TextIOWrapper(io.BytesIO(), "utf-8", errors, write_through=True)
                for errors in ("strict", "backslashreplace"))           # as Python opens them
    status = 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), \
            warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.simplefilter("ignore", DeprecationWarning)
        try:
            schedules.command(lambda: MAINS[main]([str(a) for a in argv]))
        except SystemExit as stop:
            status = stop.code or 0
    return status, *(s.buffer.getvalue().decode() for s in (out, err))


def pictures(folder, counts, side=8, seed=0):
    """A folder of `counts` = {class: n} random images."""
    draw = np.random.default_rng(seed)
    for label, count in counts.items():
        (folder / label).mkdir(parents=True)
        for i in range(count):
            pixels = draw.integers(0, 256, (side, side, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / label / f"{i}.png")
    return folder.parent


@functools.cache
def study():
    """A folder made once: `data`, ten tiny images in five steps an epoch; `run`, a dense network of
    two epochs with its snapshots, pruned both ways. Tests work on copies of `run`."""
    folder = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    pictures(folder / "data" / "train", {"a": 5, "b": 5})
    pictures(folder / "data" / "test", {"a": 3, "b": 3}, seed=1)
    assert call("train", *dense_flags(folder / "run"))[::2] == (0, "")
    for structure in ("filters", "weights"):
        assert call("prune", folder / "run" / "dense.pt", "--structure", structure, "--method",
                    "magnitude", "--precision", "fp32", "--out",
                    folder / "run" / f"{structure}.pt")[::2] == (0, "")
    return folder


def dense_flags(out):
    """The dense run of `study`, into the folder `out`."""
    return ["--dataset", "folder", "--data-dir", out.parent / "data", "--epochs", 2,
            "--batch-size", 2, "--milestones", 1, "--snapshot-every", 1, "--precision", "fp32",
            "--out", out]


def arm_of(folder, name, pruned):
    """The command line (main, flag, …) of an arm: "dense", or a schedule and what to retrain."""
    folder.mkdir(exist_ok=True)
    if name == "dense":
        (folder / "data").is_symlink() or (folder / "data").symlink_to(study() / "data")
        return ["train", *dense_flags(folder / "run")]
    if not (folder / "run").exists():
        shutil.copytree(study() / "run", folder / "run")
    return ["retrain", folder / "run" / f"{pruned}.pt", "--schedule", name, "--epochs", 2,
            "--precision", "fp32"]


def content(folder):
    """Everything a run left in `folder`, but how long it took: {file and name: tensor or value}."""
    found = {}
    for path in sorted(folder.glob("*.pt")):
        checkpoint = models.read(path)
        for key, value in checkpoint.items():
            if isinstance(value, dict):
                found.update({(path.name, key, name): v for name, v in value.items()})
            elif key not in ("seconds", "data_dir"):
                found[path.name, key] = value
    for row in retrain.read_rows(folder / "results.jsonl"):
        found["row", row["run"]] = {k: v for k, v in row.items() if k != "seconds"}
    return found


def differing(one, other):
    """The names of what is not bitwise the same in two `content`s."""
    def same(a, b):
        if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
            return a.dtype == b.dtype and a.numpy().tobytes() == b.numpy().tobytes()
        return type(a) is type(b) and a == b
    return [k for k in {**one, **other} if k not in one or k not in other
            or not same(one[k], other[k])]


@contextlib.contextmanager
def signal_at(step, number=signal.SIGTERM):
    """Inside, a process that asks for the learning rate of `step` gets a signal, once."""
    real, sent = train.fit, []

    def fit(network, data, schedule, *rest, **named):
        def at(asked):
            if asked == step and not sent:
                sent.append(step)
                os.kill(os.getpid(), number)
            return schedule(asked)
        return real(network, data, at, *rest, **named)
    train.fit = fit
    try:
        yield
    finally:
        train.fit = real


def listing(folder):
    """Every file and folder below `folder`, with its time of change, size and inode."""
    stats = {p: p.lstat() for p in sorted(folder.rglob("*"))}
    return {str(p): (s.st_mtime_ns, p.is_file() and (s.st_size, s.st_ino))
            for p, s in stats.items()}


def start(script, *argv, **named):
    """A real process of one of the scripts."""
    return subprocess.Popen([sys.executable, HERE / f"{script}.py", *map(str, argv)], text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            env={**os.environ, "OMP_NUM_THREADS": "1"}, **named)


def fork(work):
    """The process id of a copy of this process that does `work()`; status 0 unless it raises."""
    child = os.fork()
    if child:
        return child
    try:
        work()
        os._exit(0)
    except BaseException:
        os._exit(1)


@contextlib.contextmanager
def inside(folder):
    before = os.getcwd()
    os.chdir(folder)
    try:
        yield folder
    finally:
        os.chdir(before)


def noisy(arch, classes=10, seed=0):
    """A network in float64 whose batch norms have learned something, so that nothing cancels."""
    network = models.build(arch, classes, seed)
    torch.manual_seed(seed)
    for name, value in network.state_dict().items():
        if "running_var" in name or name.endswith("weight") and value.dim() == 1:
            value.uniform_(0.5, 1.5)
        elif "running_mean" in name or name.endswith("bias"):
            value.normal_(0, 0.3)
    return network.double().eval()


def tiny_data(count=40, side=32, classes=10, seed=0):
    """Random images in memory as a `train.Data`."""
    draw = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (count, 3, side + 8, side + 8), generator=draw,
                           dtype=torch.uint8)
    labels = torch.arange(count) % classes
    small = images[:, :, 4:-4, 4:-4].contiguous()
    return train.Data((images, labels), (small, labels), (None, labels[:0]), side, classes,
                      [0.5] * 3, [0.25] * 3)


def settings(epochs=2, batch_size=8, seed=0):
    return {"epochs": epochs, "batch_size": batch_size, "weight_decay": 5e-4, "seed": seed}


def dense_checkpoint(arch, seed=0, classes=10, side=32, **recipe):
    network = models.build(arch, classes, seed)
    params, macs = models.count(network, side)
    return {"kind": "dense", "arch": arch, "classes": classes, "side": side, "mean": [0.5] * 3,
            "std": [0.25] * 3, "recipe": {
                **CIFAR, "dataset": "shapes", "arch": arch, "seed": seed, "pretrained": False,
                "subset": None, "val_size": 0, "batch_size": 8, "weight_decay": 5e-4,
                "dry_run": False, **recipe},
            "settings": {}, "data_dir": "data", "test_accuracy": 50.0, "dense_test_accuracy": 50.0,
            "dense_params": params, "dense_macs": macs, "model": dict(network.state_dict())}


def how(method="magnitude", structure="filters", sparsity=(0.5,), **more):
    return {"method": method, "structure": structure, "sparsity": list(sparsity), "plan": None,
            "scope": "layer" if structure == "filters" else "global", "seed": 0,
            "include_linear": False, "calibration_images": 40, "dry_run": False, **more}


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


def lrs(name, epochs, steps=1, recipe=CIFAR, **more):
    at = schedules.retrain(name, epochs, steps, recipe, **more)
    return [at(s)[0] for s in range(epochs * steps)]


@pytest.mark.parametrize("line", GOLDEN.strip().splitlines()[1:])
def test_golden_values_of_the_72_epoch_budget(line):
    """All eight published digits."""
    name, *values = line.split()
    at = schedules.retrain(name, 72, 782, CIFAR)
    for epoch, value in zip(GOLDEN.split("\n")[1].split()[1:], map(float, values)):
        assert float(f"{at(int(epoch) * 782)[0]:.8g}") == value


def test_golden_values_of_one_cycle_over_100_steps():
    at = schedules.retrain("one_cycle", 100, 1, CIFAR)
    golden = {0: (.001, .95), 1: (.003985215271, .94698463), 5: (.05909558479, .89131759),
              9: (.1, .85), 10: (.0999695444, .85003046), 50: (.05696295918, .89304134),
              98: (4.045560318e-5, .94996954), 99: (1e-5, .95)}
    for step, (lr, momentum) in golden.items():
        assert at(step)[0] == pytest.approx(lr, rel=1e-9)
        assert at(step)[1] == pytest.approx(momentum, abs=1e-8)


def torch_lrs(scheduler, optimizer, steps):
    found = []
    for _ in range(steps):
        group = optimizer.param_groups[0]
        found.append((group["lr"], group["momentum"]))
        optimizer.step()
        scheduler.step()
    return found


@pytest.mark.parametrize("steps", [2, 3, 9, 11, 37, 100, 800])
def test_one_cycle_is_torchs(steps):
    optimizer = torch.optim.SGD([torch.zeros(1)], 0.1, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, 0.1, total_steps=steps, div_factor=100, final_div_factor=100, pct_start=0.1)
    at = schedules.retrain("one_cycle", steps, 1, CIFAR)
    np.testing.assert_allclose([at(s) for s in range(steps)],
                               torch_lrs(scheduler, optimizer, steps), rtol=1e-9)


def test_dense_step_and_cosine_are_torchs():
    for kind, make in (("step", lambda o: torch.optim.lr_scheduler.MultiStepLR(o, [80, 120])),
                       ("cosine", lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 160))):
        optimizer = torch.optim.SGD([torch.zeros(1)], 0.1, momentum=0.9)
        at = schedules.dense({**CIFAR, "schedule": kind}, 7)
        np.testing.assert_allclose([at(7 * e + e % 7) for e in range(160)],
                                   torch_lrs(make(optimizer), optimizer, 160), rtol=1e-9)


@pytest.mark.parametrize("kind", schedules.DENSE)
def test_every_budget_works_from_one_step_upwards(kind):
    """Published implementations divide by zero for short runs (SLR: t < 10; OneCycleLR: 10 steps).
    """
    recipe = {**CIFAR, "schedule": kind}
    for name in retrain.EVERY:
        for epochs, steps in ((1, 1), (1, 10), (2, 5), (9, 1), (10, 1), (19, 2), (160, 1),
                              (200, 1)):
            values = lrs(name, epochs, steps, recipe, distance=0.3, removed=0.5)
            assert all(0 <= v <= 0.1 + 1e-12 for v in values), (name, epochs, steps)
            assert kind != "step" or name == "linear" or max(values) > 0


def test_lr_rewind_is_the_tail_of_the_dense_run():
    dense = [schedules.dense(CIFAR, 1)(e)[0] for e in range(160)]
    for t in range(1, 161):
        assert lrs("lr_rewind", t) == dense[160 - t:] == lrs("weight_rewind", t)
    assert lrs("lr_rewind", 200) == [0.1] * 40 + dense
    assert lrs("lr_rewind", 40) == lrs("finetune", 40)               # claim C5, by construction
    at_88 = lrs("lr_rewind", 88)
    assert [e for e in range(1, 88) if at_88[e] != at_88[e - 1]] == [8, 48] and at_88[0] == 0.1


def test_slr_drops_where_the_authors_drop():
    """int(0.45 t), int(0.675 t) after the warm-up; ImageNet int(0.297 t), int(0.594 t)."""
    imagenet = {**CIFAR, "epochs": 90, "milestones": [30, 60]}
    for recipe, shares in ((CIFAR, (0.45, 0.675)), (imagenet, (0.297, 0.594))):
        for t in (40, 45, 56, 72, 88, 104, 120, 136, 152):
            values, warmup = lrs("slr", t, recipe=recipe), int(0.1 * t)
            drops = [e for e in range(warmup + 1, t) if values[e] < values[e - 1] / 2]
            assert drops == [warmup + int(share * t) for share in shares]
            assert values[0] == pytest.approx(0.001) and max(values) == 0.1


def test_scratch_is_the_dense_schedule_stretched_and_finetune_is_its_end():
    values = lrs("scratch", 80)
    assert [e for e in range(1, 80) if values[e] != values[e - 1]] == [40, 60]
    assert set(lrs("finetune", 72)) == {schedules.dense(CIFAR, 1)(159)[0]}
    assert set(lrs("finetune", 5, end_lr=0.02)) == {0.02}


def test_adaptive_linear_starts_between_its_bounds():
    for distance, removed, t, peak in ((0.05, 0.5, 16, 0.01), (0.5, 0.25, 16, 0.1),
                                       (0.3, 0.36, 16, 0.05), (0.0, 0.0, 160, 0.1)):
        values = lrs("adaptive_linear", t, 50, distance=distance, removed=removed)
        assert max(values) == pytest.approx(peak, rel=1e-3)


def test_published_options_of_one_cycle_can_be_switched():
    at = schedules.retrain("one_cycle", 10, 10, CIFAR, lr=0.2, end_lr=0.001, cycle_momentum=False)
    assert at(99) == (pytest.approx(0.001), 0.9) and at(9)[0] == 0.2


def test_schedules_prints_a_table():
    lines = [line.split() for line in call("schedules")[1].splitlines()]
    assert lines[0] == ["epoch", *schedules.RETRAIN] and len(lines) == 73
    assert float(lines[2][5]) == pytest.approx(0.0056393861, rel=1e-8)


# ---- networks ------------------------------------------------------------------------------------

@pytest.mark.parametrize("arch, params, macs", [
    ("resnet20", 269_722, 40_551_040), ("resnet32", 464_154, 68_862_592),
    ("resnet56", 853_018, 125_485_696), ("resnet110", 1_727_962, 252_887_680),
    ("vgg16", 14_987_722, 313_463_808)])
def test_counts_of_dense_networks(arch, params, macs):
    assert models.count(models.build(arch, 10), 32) == (params, macs)


def planned(arch, plan=None, sparsity=(), classes=10):
    """The meta-sized network after a plan: counts need shapes, not values."""
    with torch.device("meta"):
        network = models.build(arch, classes)
    counts = prune.filters_to_keep(network, arch, sparsity, plan)
    keep = {conv: torch.arange(k) for conv, k in counts.items()}
    small = models.shrink(network.state_dict(), models.prunable(network), keep)
    return models.from_state(arch, classes, small)


@pytest.mark.parametrize("arch, plan, params, macs", [
    ("resnet56", "B", 735_712, 90_907_264), ("resnet110", "B", 1_168_424, 155_124_352),
    ("vgg16", "A", 5_397_034, 206_279_680)])
def test_counts_of_the_papers_plans(arch, plan, params, macs):
    assert models.count(planned(arch, plan), 32) == (params, macs)


def by_hand(arch, plan):
    """Parameters and MACs of a pruned CIFAR ResNet, layer by layer, from the plan alone."""
    shares, skipped = prune.PLANS[arch][plan]
    blocks = (int(arch[6:]) - 2) // 6
    params, macs, width = 3 * 16 * 9 + 32, 3 * 16 * 9 * 32 * 32, 16
    for stage, (out, side) in enumerate(((16, 32), (32, 16), (64, 8))):
        for block in range(blocks):
            conv_id = 2 + 2 * (stage * blocks + block)
            inner = out if conv_id in skipped else int(round(out * (1 - shares[stage]), 6))
            weights = 9 * (width * inner + inner * out)
            params, macs = params + weights + 2 * (inner + out), macs + weights * side ** 2
            width = out
    return params + 650, macs + 640


@pytest.mark.parametrize("arch", ["resnet56", "resnet110"])
def test_counts_of_plan_a_by_hand(arch):
    assert models.count(planned(arch, "A"), 32) == by_hand(arch, "A")


def test_counts_of_plan_i_over_eight_rounds():
    """Each round prunes what the last one left."""
    network, found = models.build("resnet56", 10), []
    for _ in range(8):
        counts = prune.filters_to_keep(network, "resnet56", (), "I")
        keep = {conv: torch.arange(k) for conv, k in counts.items()}
        state = models.shrink(network.state_dict(), models.prunable(network), keep)
        network = models.from_state("resnet56", 10, state)
        found.append(sum(p.numel() for p in network.parameters()))
    assert found == [691_234, 549_646, 443_410, 354_940, 286_666, 233_548, 180_430, 137_410]


def test_counts_of_imagenet_networks():
    """Published for ResNet-34 A and B (Li 2017); ResNet-50 by hand: both inner convs of a
    bottleneck."""
    params, macs = models.count(planned("resnet34", sparsity=[0.0], classes=1000), 224)
    for plan, left, drop in (("A", 20.152e6, 15.38), ("B", 19.469e6, 24.06)):
        p, m = models.count(planned("resnet34", plan, classes=1000), 224)
        assert p == pytest.approx(left, abs=500)
        assert 100 * (1 - m / macs) == pytest.approx(drop, abs=0.005)
    assert (params, models.count(planned("resnet50", sparsity=[0.0], classes=1000), 224)) == (
        21_797_672, (25_557_032, 4_089_184_256))
    for sparsity, left, drop in (([.7, .7, .75, .75], 7_961_423, 73.34), ([.3], 16_945_246, 36.38)):
        p, m = models.count(planned("resnet50", sparsity=sparsity, classes=1000), 224)
        assert p == left and 100 * (1 - m / 4_089_184_256) == pytest.approx(drop, abs=0.005)


def test_initialisation_is_hes_and_a_function_of_the_seed():
    one, same, other = (models.build("resnet20", 10, seed).state_dict() for seed in (3, 3, 4))
    assert all(torch.equal(one[n], same[n]) for n in one)
    assert not torch.equal(one["conv1.weight"], other["conv1.weight"])
    weight = one["layer3.2.conv2.weight"]
    assert weight.std().item() == pytest.approx(math.sqrt(2 / (9 * 64)), rel=0.02)


def test_the_shortcut_passes_the_gradient():
    """Detached in the published code: then the stem learns nothing through it."""
    shortcut, x = models.Shortcut(16), torch.randn(2, 16, 8, 8, requires_grad=True)
    y = shortcut(x)
    assert y.shape == (2, 32, 4, 4)
    assert torch.equal(y[:, :16], x[:, :, ::2, ::2]) and not y[:, 16:].any()
    y.sum().backward()
    assert torch.equal(x.grad[:, :, ::2, ::2], torch.ones(2, 16, 4, 4))


# ---- pruning -------------------------------------------------------------------------------------

@pytest.mark.parametrize("arch, side", [("resnet8", 32), ("resnet20", 32), ("vgg16", 32),
                                        ("resnet18", 32), ("resnet34", 32), ("resnet50", 32)])
def test_a_shrunk_network_computes_what_the_zeroed_one_computes(arch, side):
    """Removed filters, and their batch norms, zeroed in a copy of the original: same outputs,
    float64."""
    network = noisy(arch)
    units = models.prunable(network)
    counts = prune.filters_to_keep(network, arch, [0.3], None)
    scores = prune.saliency(network, "magnitude", "filters", [u.conv + ".weight" for u in units])
    keep = prune.keep_filters({u.conv: scores[u.conv + ".weight"] for u in units}, counts)
    small = models.from_state(arch, 10, models.shrink(network.state_dict(), units, keep))
    for unit in units:
        gone = torch.ones(len(scores[unit.conv + ".weight"]), dtype=torch.bool)
        gone[keep[unit.conv]] = False
        norms = network.get_parameter(unit.conv + ".weight").abs().sum((1, 2, 3))
        assert gone.sum() == len(gone) - int(len(gone) * 0.7)
        assert norms[gone].max() <= norms[~gone].min()
        bn = network.get_submodule(unit.bn)
        with torch.no_grad():
            for value in (network.get_parameter(unit.conv + ".weight"), bn.weight, bn.bias,
                          bn.running_mean):
                value[gone] = 0
    assert small.conv1.out_channels == 64 if arch in models.IMAGENET else True
    x = torch.randn(2, 3, side, side, dtype=torch.float64)
    assert models.count(small, side)[0] < models.count(network, side)[0]
    with torch.no_grad():
        torch.testing.assert_close(small(x), network(x), rtol=1e-5, atol=1e-5)


def test_weight_pruning_is_torchs_global_unstructured():
    for include_linear in (False, True):
        checkpoint = dense_checkpoint("resnet8")
        network = models.restore(checkpoint)
        pruned = prune.prune(checkpoint, how(structure="weights", sparsity=[0.8],
                                             include_linear=include_linear))
        kinds = (torch.nn.Conv2d, torch.nn.Linear) if include_linear else torch.nn.Conv2d
        parameters = [(m, "weight") for m in network.modules() if isinstance(m, kinds)]
        torch_prune.global_unstructured(parameters, torch_prune.L1Unstructured, amount=0.8)
        masks = {n[:-len("_mask")]: b for n, b in network.named_buffers() if n.endswith("_mask")}
        assert masks.keys() == {n for n in models.weight_names(network, include_linear)}
        for name, mask in masks.items():
            assert torch.equal(pruned["model"][name] != 0, mask.bool())


def test_layerwise_and_random_weight_pruning():
    checkpoint = dense_checkpoint("resnet8")
    layer = prune.prune(checkpoint, how(structure="weights", sparsity=[0.6], scope="layer"))
    for name in models.weight_names(models.restore(checkpoint)):
        weight = checkpoint["model"][name]
        layer_module = torch.nn.Conv2d(1, 1, 1)
        layer_module.weight = torch.nn.Parameter(weight.clone())
        torch_prune.l1_unstructured(layer_module, "weight", amount=0.6)
        assert torch.equal(layer["model"][name] != 0, layer_module.weight_mask.bool())
    one, same, other = (prune.prune(checkpoint, how("random", "weights", [0.6], seed=s))["model"]
                        for s in (1, 1, 2))
    assert models.digest(one) == models.digest(same) != models.digest(other)
    names = models.weight_names(models.restore(checkpoint))
    left = np.array([(one[n] != 0).double().mean() for n in names if one[n].numel() > 2000])
    assert abs(left - 0.4).max() < 0.05                                # uniform, not by layer size


def test_weight_sparsity_is_cumulative_and_what_is_pruned_stays_pruned():
    checkpoint = dense_checkpoint("resnet8")
    names = models.weight_names(models.restore(checkpoint))
    for method in ("magnitude", "random"):
        first = prune.prune(checkpoint, how(method, "weights", [0.3]))
        second = prune.prune(first, how(method, "weights", [0.51], seed=5))
        total = sum(first["model"][n].numel() for n in names)
        assert sum((second["model"][n] == 0).sum().item() for n in names) == round(0.51 * total)
        assert not any(second["model"][n][first["model"][n] == 0].any() for n in names)
        assert second["removed"] == pytest.approx(0.3, abs=1e-3)
    with pytest.raises(schedules.Refused, match="cumulative"):
        prune.prune(second, how("magnitude", "weights", [0.4]))


def test_global_filter_ranking_normalises_and_never_empties_a_layer():
    scores = {"a": torch.tensor([100., 300., 200.]), "b": torch.tensor([.1, .9]),
              "c": torch.tensor([1e-9])}
    keep = prune.keep_filters(scores, {"a": 1, "b": 1, "c": 1}, "global")
    assert {c: k.tolist() for c, k in keep.items()} == {"a": [1], "b": [1], "c": [0]}
    keep = prune.keep_filters(scores, {"a": 2, "b": 2, "c": 0}, "global")  # 200/374 beats 0.1/0.906
    assert {c: k.tolist() for c, k in keep.items()} == {"a": [1, 2], "b": [1], "c": [0]}


def test_kept_filters_refer_to_the_dense_network_however_often_pruned():
    checkpoint = dense_checkpoint("resnet8")
    twice = prune.prune(prune.prune(checkpoint, how("magnitude")), how("random", sparsity=[0.25]))
    for conv, kept in twice["kept"].items():
        left = twice["model"][conv + ".weight"].sum((2, 3)).shape[0]
        assert torch.equal(left * torch.ones(1).long(), torch.tensor([len(kept)]))
    stem = "layer1.0.conv1"
    assert torch.equal(twice["model"][stem + ".weight"],
                       checkpoint["model"][stem + ".weight"][twice["kept"][stem]])


def test_distance_and_removed_are_zimmers():
    checkpoint = dense_checkpoint("resnet8")
    pruned = prune.prune(checkpoint, how(structure="weights", sparsity=[0.7]))
    names = models.weight_names(models.restore(checkpoint))
    before = np.concatenate([checkpoint["model"][n].double().flatten() for n in names])
    after = np.concatenate([pruned["model"][n].double().flatten() for n in names])
    distance = np.linalg.norm(before - after) / np.linalg.norm(before)
    assert pruned["distance"] == pytest.approx(distance)
    assert pruned["removed"] == pytest.approx(0.7, abs=1e-4)


def small_network_and_images(count=24):
    network = noisy("resnet8").float()
    torch.manual_seed(1)
    return network, torch.randn(count, 3, 32, 32), torch.arange(count) % 10


def slow_gradients(network, x, y, name):
    """Gradient of each single sample's loss, one at a time."""
    found = []
    for i in range(len(x)):
        network.zero_grad()
        F.cross_entropy(network(x[i:i + 1]), y[i:i + 1]).backward()
        found.append(network.get_parameter(name).grad.clone())
    return torch.stack(found)


@pytest.mark.parametrize("method", ["taylor", "obd"])
def test_gradient_criteria_against_single_sample_gradients(method):
    network, x, y = small_network_and_images()
    network.double()
    x, name = x.double(), "layer2.0.conv1.weight"
    gradients, weight = slow_gradients(network, x, y, name), network.get_parameter(name).detach()
    if method == "taylor":                         # 24 images are one mini-batch: its mean gradient
        weights = (gradients.mean(0) * weight) ** 2
        filters = (gradients.mean(0) * weight).sum((1, 2, 3)) ** 2
    else:
        weights = 0.5 * (gradients ** 2).mean(0) * weight ** 2
        filters = weights.sum((1, 2, 3))
    for structure, reference in (("weights", weights), ("filters", filters)):
        scores = prune.saliency(network, method, structure, [name], calibration=(x, y))[name]
        torch.testing.assert_close(scores, reference, rtol=1e-7, atol=1e-14)


def test_taylor_averages_over_mini_batches_of_64():
    network, x, y = small_network_and_images(128)
    name = "layer1.0.conv1.weight"
    halves = [prune.saliency(network, "taylor", "filters", [name],
                             calibration=(x[k::2], y[k::2]))[name] for k in (0, 1)]
    order = torch.cat([torch.arange(0, 128, 2), torch.arange(1, 128, 2)])
    whole = prune.saliency(network, "taylor", "filters", [name],
                           calibration=(x[order], y[order]))[name]
    torch.testing.assert_close(whole, (halves[0] + halves[1]) / 2, rtol=1e-4, atol=1e-9)


def test_hrank_against_numpy():
    network, x, y = small_network_and_images(6)
    network.double()
    x, unit = x.double(), models.prunable(network)[2]
    with torch.no_grad():
        stream = network.layer2(network.layer1(F.relu(network.bn1(network.conv1(x)))))
        maps = F.relu(network.layer3[0].bn1(network.layer3[0].conv1(stream))).numpy()
    reference = [np.mean([np.linalg.matrix_rank(maps[i, c]) for i in range(6)]) for c in range(64)]
    scores = prune.saliency(network, "hrank", "filters", [unit.conv + ".weight"],
                            calibration=(x, y))
    np.testing.assert_allclose(scores[unit.conv + ".weight"], reference)


def test_no_criterion_ranks_as_magnitude_does():
    network, x, y = small_network_and_images()
    for structure in ("filters", "weights"):
        names = [u.conv + ".weight" for u in models.prunable(network)]
        keep = {}
        for method in prune.METHODS[:5 if structure == "filters" else 4]:
            scores = prune.saliency(network, method, structure, names, 0, (x, y))
            keep[method] = [s.flatten().argsort(descending=True)[:8].tolist()
                            for s in scores.values()]
        assert all(keep[m] != keep["magnitude"] for m in keep if m != "magnitude")


# ---- data ----------------------------------------------------------------------------------------

def test_shapes_are_deterministic_and_all_different():
    images, labels = train.shapes(200, 0)
    assert images.shape == (200, 3, 32, 32) and images.dtype == torch.uint8
    assert labels.bincount().tolist() == [20] * 10
    assert torch.equal(images, train.shapes(200, 0)[0])
    assert not torch.equal(images[:100], train.shapes(200, 1)[0][:100])
    assert len(torch.unique(images.flatten(1), dim=0)) == 200


def test_augmentation_against_a_slow_reference():
    """Pad with black, crop, flip, sample by sample, in numpy."""
    data = tiny_data(50)
    images = data.train[0].clone()
    images[:, :, :4], images[:, :, -4:], images[..., :4], images[..., -4:] = 0, 0, 0, 0
    order, crop, flip = train.epoch_draws(0, 3, 50)
    found = train.augment(images, order, crop, flip)
    for i in range(50):
        small = images[order[i], :, 4:-4, 4:-4].numpy()
        padded = np.pad(small, ((0, 0), (4, 4), (4, 4)))
        dy, dx = crop[i].tolist()
        reference = padded[:, dy:dy + 32, dx:dx + 32]
        assert np.array_equal(found[i], reference[:, :, ::-1] if flip[i] else reference)


def test_crops_and_flips_are_uniform_and_order_is_a_permutation():
    """Chi-square over the 81 offsets within six standard deviations of what uniform draws give."""
    order, crop, flip = train.epoch_draws(0, 0, 50_000)
    assert torch.equal(order.sort().values, torch.arange(50_000))
    counts = torch.bincount(crop[:, 0] * 9 + crop[:, 1], minlength=81).double()
    assert len(counts) == 81
    chi2 = ((counts - 50_000 / 81) ** 2 / (50_000 / 81)).sum().item()
    assert abs(chi2 - 80) < 6 * math.sqrt(160)
    assert abs(flip.double().mean().item() - 0.5) < 6 * 0.5 / math.sqrt(50_000)
    assert all(torch.equal(a, b) for a, b in zip(train.epoch_draws(5, 7, 99),
                                                 train.epoch_draws(5, 7, 99)))
    assert not torch.equal(train.epoch_draws(5, 7, 99)[0], train.epoch_draws(5, 8, 99)[0])
    assert not torch.equal(train.epoch_draws(5, 7, 99)[0], train.epoch_draws(6, 7, 99)[0])


def test_normalisation_is_torchvisions():
    from torchvision.transforms import v2
    data = tiny_data(16)
    reference = v2.Compose([v2.ToDtype(torch.float32, scale=True),
                            v2.Normalize(data.mean, data.std)])
    found = train.normalise(data.test[0], data)
    torch.testing.assert_close(found, reference(data.test[0]), rtol=1e-5, atol=1e-6)
    assert found.is_contiguous(memory_format=torch.channels_last)


def test_an_epoch_shows_every_image_once_and_keeps_the_short_last_batch():
    data = tiny_data(50)
    sizes, seen = [], []
    images = data.train[0].clone()
    images[:] = torch.arange(50, dtype=torch.uint8).view(-1, 1, 1, 1)     # each image is its number
    data = data._replace(train=(images, data.train[1]), mean=[0.0] * 3, std=[1 / 255] * 3)
    for x, y, counted, weight in train.train_batches(data, 0, 0, 16, CPU):
        sizes.append(counted)
        seen += x[:, 0, 16, 16].round().int().tolist()
        assert weight == 1 and torch.equal(y, torch.tensor(seen[-len(y):]) % 10)
    assert sizes == [16, 16, 16, 2] and sorted(seen) == list(range(50))


def test_two_processes_share_each_batch():
    """What the ranks see is together what one process sees; the counts add up, the weights average.
    """
    data = tiny_data(33)
    whole = [(x, y) for x, y, _, _ in train.train_batches(data, 0, 2, 8, CPU)]
    ranks = [list(train.train_batches(data, 0, 2, 8, CPU._replace(rank=r, world=2)))
             for r in (0, 1)]
    for (x, y), zero, one in zip(whole[:-1], *ranks):
        assert torch.equal(x[0::2], zero[0]) and torch.equal(x[1::2], one[0])
        assert zero[2] + one[2] == len(y) and (zero[3] + one[3]) / 2 == 1
    assert [len(r[-1][1]) for r in ranks] == [1, 1] and [r[-1][2] for r in ranks] == [1, 0]


def test_subset_is_balanced_fixed_and_refused_where_impossible():
    labels = np.repeat(np.arange(10), 100)
    chosen = train.balanced(labels, 205, "--subset")
    assert len(set(chosen)) == 205 and sorted(np.bincount(labels[chosen])) == [20] * 5 + [21] * 5
    assert np.array_equal(chosen, train.balanced(labels, 205, "--subset"))
    with pytest.raises(schedules.Refused, match="--subset"):
        train.balanced(labels, 1001, "--subset")


def image_folder(root, side=32, count=6, classes=3):
    """A folder data set of random PNG files, `count` of each class in train and in val."""
    for split in ("train", "val"):
        pictures(root / split, {f"class{c}": count for c in range(classes)}, side)
    return root


def test_folder_in_memory_is_what_torchvision_reads(tmp_path):
    from torchvision.datasets import ImageFolder
    root = image_folder(tmp_path)
    recipe = {"dataset": "folder", "subset": None, "val_size": 3, "batch_size": 4}
    data = train.load_data(recipe, str(root), torch.device("cpu"))
    files = ImageFolder(str(root / "val"))
    assert data.classes == 3 and data.side == 32
    assert len(data.train[1]) == 15 and len(data.val[1]) == 3
    for i, (image, label) in enumerate(files):
        assert np.array_equal(data.test[0][i].permute(1, 2, 0), np.asarray(image))
        assert data.test[1][i] == label
    raw = data.train[0][:, :, 4:-4, 4:-4].double() / 255
    np.testing.assert_allclose(data.mean, raw.mean((0, 2, 3)), rtol=1e-6)
    np.testing.assert_allclose(data.std, raw.std((0, 2, 3), correction=0), rtol=1e-6)
    assert not data.train[0][:, :, :4].any() and not data.train[0][..., -4:].any()


def test_large_images_do_not_depend_on_the_number_of_workers(tmp_path):
    root = image_folder(tmp_path, side=96)
    recipe = {"dataset": "folder", "subset": None, "val_size": 0, "batch_size": 8}
    data = train.load_data(recipe, str(root), torch.device("cpu"))
    assert data.side == 224 and isinstance(data.train[0], list)
    runs = [list(train.train_batches(data, 0, 1, 8, CPU._replace(workers=w))) for w in (0, 2)]
    for (x, y, *_), (x2, y2, *_) in zip(*runs):
        assert x.shape[1:] == (3, 224, 224) and torch.equal(x, x2) and torch.equal(y, y2)
    later = list(train.train_batches(data, 0, 1, 8, CPU, start=1))           # resumed in the middle
    assert torch.equal(later[0][0], runs[0][1][0])
    again = list(train.train_batches(data, 0, 2, 8, CPU))
    assert not torch.equal(again[0][0], runs[0][0][0])


# ---- the loop ------------------------------------------------------------------------------------

def test_the_loop_is_plain_sgd(tmp_path):
    """Against a loop written with torch.optim.SGD, float32, contiguous tensors and .item()."""
    data, network = tiny_data(20), models.build("resnet8", 10)
    reference = copy.deepcopy(network)
    at = schedules.retrain("one_cycle", 2, 3, CIFAR)
    curve, _ = train.fit(network, data, at, settings(), CPU, str(tmp_path / "s.pt"))
    optimizer = torch.optim.SGD(reference.parameters(), 0.1, momentum=0.9, weight_decay=5e-4)
    reference.train()
    for epoch in range(2):
        total = 0
        for step, (x, y, _, _) in enumerate(train.train_batches(data, 0, epoch, 8, CPU)):
            group = optimizer.param_groups[0]
            group["lr"], group["momentum"] = at(3 * epoch + step)
            loss = F.cross_entropy(reference(x.contiguous()), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.item() * len(y)
        assert curve[epoch]["train_loss"] == pytest.approx(total / 20, rel=1e-4)
    for one, other in zip(network.state_dict().values(), reference.state_dict().values()):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)
    right = sum((network(train.normalise(data.test[0][i:i + 1], data)).argmax()
                 == data.test[1][i]).item() for i in range(20))
    assert curve[-1]["test_accuracy"] == 100 * right / 20


def test_no_step_waits_for_the_device(tmp_path, monkeypatch):
    """Values that leave a tensor are as many in an epoch of two steps as in one of eight."""
    counts = []
    for name in ("item", "tolist", "numpy", "cpu", "__bool__", "__float__", "__int__"):
        plain = getattr(torch.Tensor, name)
        monkeypatch.setattr(torch.Tensor, name,
                            lambda self, *a, plain=plain: counts.append(1) or plain(self, *a))
    seen = []
    for batch_size in (16, 4):
        counts.clear()
        train.fit(models.build("resnet8", 10), tiny_data(32), lambda step: (0.1, 0.9),
                  settings(1, batch_size), CPU, str(tmp_path / "s.pt"))
        seen.append(len(counts))
    assert seen[0] == seen[1] > 0


def test_bf16_leaves_weights_statistics_and_loss_in_float32():
    """Autocast computes the convolutions in bfloat16 and little else, and the step is the same
    within its 8 bits."""
    data, losses, kinds = tiny_data(32), [], []
    x, y, *_ = next(train.train_batches(data, 0, 0, 32, CPU))
    for bf16 in (False, True):
        network = models.build("resnet8", 10, seed=0)
        network.layer1[0].conv1.register_forward_hook(lambda m, i, out: kinds.append(out.dtype))
        optimizer = train.optimizer_of(network, 1e-4)
        optimizer.param_groups[0]["lr"] = 0.01
        loss = [train.train_step(network, optimizer, x, y, CPU._replace(bf16=bf16))[0]
                for _ in range(3)]
        losses.append(torch.stack(loss))
    tensors = [*network.state_dict().values(), *(s["momentum_buffer"] for s in
                                                 optimizer.state.values()), *loss]
    assert {t.dtype for t in tensors if t.is_floating_point()} == {torch.float32}
    assert kinds == 3 * [torch.float32] + 3 * [torch.bfloat16]
    torch.testing.assert_close(losses[1], losses[0], rtol=0.02, atol=0.02)
    assert not torch.equal(losses[1], losses[0])


@slow
def test_every_network_of_a_long_list_is_compiled(monkeypatch):
    """torch gives up on a forward after eight shapes; the same shape again costs nothing."""
    compiled, real = [], torch.compile

    def backend(graph, _):
        compiled.append(graph)
        return graph
    monkeypatch.setattr(torch, "compile", lambda network, mode: real(network, backend=backend))
    x = torch.empty(2, 3, 32, 32, device="meta")
    for width in [*range(4, 14), 13]:
        network = planned("resnet8", sparsity=[1 - width / 16])
        train.fastest(network, CPU._replace(compile="on"), 1)(x)
    assert len(compiled) == 10


def test_the_benchmark_prints_a_table(monkeypatch):
    monkeypatch.setattr(train.benchmark, "__defaults__", (1, 2))        # one round of two steps
    status, out, err = call("train", "--benchmark", "--batch-size", 8, "--device", "cpu",
                            "--precision", "fp32")
    assert (status, err) == (0, "")
    rows = [line.split("|")[1:-1] for line in out.splitlines() if line[:1] == "|"]
    assert {len(row) for row in rows} == {10}
    assert [row[0].strip() for row in rows[2:]] == ["dense", "masked", "half the filters"]
    for _, speed, to_dense, bound, to_bound, plain, to_plain, step, share, memory in rows[2:]:
        assert float(step) == pytest.approx(8000 / float(speed), rel=0.05)
        assert float(to_dense) == pytest.approx(float(speed) / float(rows[2][1]), rel=0.05)
        assert float(to_bound) == pytest.approx(float(speed) / float(bound), rel=0.05)
        assert float(to_plain) == pytest.approx(float(speed) / float(plain), rel=0.05)
        assert 0 < float(share.strip().rstrip("%")) < 100 and float(memory) > 0


@pytest.mark.parametrize("schedule", ["finetune", "one_cycle"])
def test_pruned_weights_stay_exactly_zero(tmp_path, schedule):
    """With momentum and weight decay; torch's masks as the oracle, in training too."""
    checkpoint = dense_checkpoint("resnet8")
    pruned = prune.prune(checkpoint, how(structure="weights", sparsity=[0.8]))
    network, momentum, masks = retrain.start(schedule, 1, pruned, "", 0)
    reference = models.restore(checkpoint).train()
    torch_prune.global_unstructured(
        [(m, "weight") for m in reference.modules() if isinstance(m, torch.nn.Conv2d)],
        torch_prune.L1Unstructured, amount=0.8)
    data, at = tiny_data(40), schedules.retrain(schedule, 1, 5, CIFAR)
    train.fit(network, data, at, settings(1), CPU, str(tmp_path / "s.pt"), masks=masks)
    optimizer = torch.optim.SGD(reference.parameters(), 0.1, momentum=0.9, weight_decay=5e-4)
    for step, (x, y, _, _) in enumerate(train.train_batches(data, 0, 0, 8, CPU)):
        optimizer.param_groups[0]["lr"], optimizer.param_groups[0]["momentum"] = at(step)
        optimizer.zero_grad()
        F.cross_entropy(reference(x), y).backward()
        optimizer.step()
    masked = dict(reference.named_modules())
    for name in models.weight_names(network):
        layer = masked[name[:-7]]
        weight = network.get_parameter(name)
        assert not weight[layer.weight_mask == 0].any()
        assert (weight != 0).sum() == layer.weight_mask.sum()
        torch.testing.assert_close(weight, layer.weight_orig * layer.weight_mask,
                                   rtol=1e-3, atol=1e-5)


def test_weight_rewinding_takes_the_dense_runs_state(tmp_path):
    """Weights, BN buffers and momentum at epoch T - t; filters or masks of the final weights."""
    data, recipe = tiny_data(40, side=8), {**CIFAR, "epochs": 4, "milestones": [2, 3]}
    network = models.build("resnet8", 10)
    at, state = schedules.dense(recipe, 5), str(tmp_path / "dense.state.pt")
    train.fit(network, data, at, settings(4), CPU, state, snapshots=range(4))
    half = models.build("resnet8", 10)
    train.fit(half, data, at, settings(2), CPU, str(tmp_path / "half.pt"))    # the first two epochs
    momentum = models.read(tmp_path / "half.pt")["momentum"]
    checkpoint = {**dense_checkpoint("resnet8", epochs=4, milestones=[2, 3]),
                  "settings": settings(4), "model": dict(network.state_dict())}
    pruned = prune.prune(checkpoint, how())
    rewound, held, masks = retrain.start("weight_rewind", 2, pruned, str(tmp_path), 0)
    kept = pruned["kept"]["layer2.0.conv1"]
    assert not masks
    for name, rows, columns in (("layer2.0.conv1.weight", kept, slice(None)),
                                ("layer2.0.bn1.running_var", kept, None),
                                ("layer2.0.conv2.weight", slice(None), kept)):
        for found, reference in ((rewound.state_dict(), half.state_dict()), (held, momentum)):
            if name in reference:
                want = reference[name][rows]
                assert torch.equal(found[name], want if columns is None else want[:, columns])
    pruned = prune.prune(checkpoint, how(structure="weights", sparsity=[0.9]))
    rewound, _, masks = retrain.start("weight_rewind", 2, pruned, str(tmp_path), 0)
    for name, mask in masks.items():
        assert torch.equal(rewound.get_parameter(name), half.get_parameter(name) * mask)
    # Unpruned, the rewound run is the dense run's second half, to the bit: momentum included.
    whole = prune.prune(checkpoint, how(structure="weights", sparsity=[0.0]))
    rewound, held, masks = retrain.start("weight_rewind", 2, whole, str(tmp_path), 0)
    tail = schedules.retrain("weight_rewind", 2, 5, recipe)
    shifted = data
    draws = train.epoch_draws
    train.epoch_draws = lambda seed, epoch, count: draws(seed, epoch + 2, count)
    try:
        train.fit(rewound, shifted, tail, settings(2), CPU, str(tmp_path / "t.pt"), momentum=held,
                  masks=masks)
    finally:
        train.epoch_draws = draws
    a, b = dict(rewound.state_dict()), dict(network.state_dict())
    assert models.digest(a) == models.digest(b) or all(
        torch.equal(x, y) for x, y in zip(a.values(), b.values()))


def test_evaluation_counts_each_image_once_however_it_is_shared():
    """Two ranks' counts, added up as all_reduce adds them, are one process's count."""
    data, network = tiny_data(23), noisy("resnet8").float()
    whole = train.evaluate(network, data, CPU)
    right = (network(train.normalise(data.test[0], data)).argmax(1) == data.test[1]).sum().item()
    assert whole == 100 * right / 23


# ---- retraining as a whole -----------------------------------------------------------------------

@pytest.fixture(scope="module")
def dry(tmp_path_factory):
    """The three scripts in a row, dry, without arguments; then every schedule."""
    with inside(tmp_path_factory.mktemp("dry")) as folder:
        assert call("train", "--dry-run", "--precision", "fp32")[0] == 0
        assert call("prune", "--dry-run")[0] == 0
        assert call("retrain", "--dry-run", "--precision", "fp32")[0] == 0
        assert call("retrain", "runs/shapes-resnet8-s0/filters-magnitude-0.5.pt", "--dry-run",
                    "--precision", "fp32", "--schedule", *retrain.EVERY)[0] == 0
    return folder


def test_the_scripts_chain_without_arguments(dry):
    folder = dry / "runs" / "shapes-resnet8-s0"
    rows = [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]
    assert sorted((r["method"], r["schedule"]) for r in rows) == sorted([
        *itertools.product(["magnitude"], retrain.EVERY),
        *itertools.product(["random"], retrain.DEFAULT)])
    wanted = set("method structure sparsity schedule epochs seed test_accuracy dense_test_accuracy "
                 "params macs curve seconds device torch".split())
    for row in rows:
        assert wanted <= row.keys() and len(row["curve"]) == row["epochs"] and row["dry_run"]
        assert row["test_accuracy"] == row["curve"][-1]["test_accuracy"] and row["sparsity"] == 0.5
    for row in rows[::5]:
        network = models.load(folder / row["checkpoint"])
        assert not network.training and models.count(network, 32) == (row["params"], row["macs"])
    assert "| filters 0.5 | magnitude |" in (folder / "report.md").read_text()
    for path in folder.glob("*.pt"):
        assert torch.load(path)["format"] == models.FORMAT         # torch's default is the safe one
    assert not list(folder.glob("*.state.pt")) and not list(folder.glob("*.tmp"))


def test_a_run_that_is_there_is_not_repeated(dry):
    folder = dry / "runs" / "shapes-resnet8-s0"
    before = (folder / "results.jsonl").read_bytes()
    with inside(dry):
        out = call("retrain", "--dry-run", "--precision", "fp32", "--schedule", "slr")[1]
    assert (folder / "results.jsonl").read_bytes() == before
    assert out.count("done already") == 2


def test_resuming_at_an_epoch_boundary_changes_nothing(tmp_path):
    """Dense, and every schedule, with masks: stopped after epoch 1 of 2 and resumed, bitwise."""
    data = tiny_data(24, side=4)
    pruned = prune.prune(dense_checkpoint("resnet8"), how(structure="weights", sparsity=[0.5]))
    for name in ("dense", *schedules.RETRAIN):
        at = schedules.dense(CIFAR, 3) if name == "dense" else schedules.retrain(name, 2, 3, CIFAR)
        found = []
        for stop in (False, True):
            network, _, masks = retrain.start("finetune", 2, pruned, "", 0)
            path = str(tmp_path / f"{name}-{stop}.pt")

            def watched(step):
                if stop and step == 3:
                    raise KeyboardInterrupt              # before the second epoch's first step
                return at(step)
            if stop:
                with pytest.raises(KeyboardInterrupt):
                    train.fit(network, data, watched, settings(), CPU, path, masks=masks)
                network = models.build("resnet8", 10, seed=99)     # nothing survives but the file
            curve, _ = train.fit(network, data, at, settings(), CPU, path, masks=masks, resume=stop)
            found.append((curve, models.digest(dict(network.state_dict()))))
        assert found[0] == found[1], name


def test_rounds_prune_and_retrain_in_one_call(tmp_path):
    with inside(tmp_path):
        image_folder(tmp_path / "data", side=8)
        assert call("train", "--dry-run", "--out", "a", "--dataset", "folder")[0] == 0
        assert call("prune", "a/dense.pt", "--dry-run", "--structure", "weights", "--sparsity", 0.3,
                   "--method", "magnitude")[0] == 0
        assert call("retrain", "a/weights-magnitude-0.3.pt", "--dry-run", "--rounds", 3,
                   "--schedule", "weight_rewind")[0] == 0
        rows = [json.loads(line) for line in open("a/results.jsonl")]
        assert [r["round"] for r in rows] == [1, 2, 3]
        for row in rows:
            state = torch.load("a/" + row["checkpoint"])["model"]
            weights = [state[n] for n in models.weight_names(models.build("resnet8", 10))]
            zero = sum((w == 0).sum().item() for w in weights) / sum(w.numel() for w in weights)
            assert zero == pytest.approx(1 - 0.7 ** row["round"], abs=1e-4)
            assert row["sparsity"] == pytest.approx(1 - 0.7 ** row["round"])


def test_pretrained_weights_come_with_the_recipe_that_made_them(tmp_path, monkeypatch):
    """--epochs 0 trains nothing, but rewinding needs the T that the weights were trained for."""
    network = models.build("resnet8", 3, seed=5)
    monkeypatch.setattr(train, "pretrained", lambda arch, classes: network)
    image_folder(tmp_path / "data", side=8)
    with inside(tmp_path):
        assert call("train", "--dataset", "folder", "--pretrained", "--epochs", 0,
                    "--out", "a")[0] == 0
        dense = models.read("a/dense.pt", "dense")
        assert dense["recipe"]["epochs"] == 160 and dense["curve"] == []
        built = models.build("resnet8", 3, 5)
        assert models.digest(dense["model"]) == models.digest(built.state_dict())
        assert call("prune", "a/dense.pt", "--method", "taylor", "--calibration-images", 18)[0] == 0
        assert call("retrain", "a/filters-taylor-0.5.pt", "--epochs", 1,
                    "--schedule", "lr_rewind")[0] == 0
        assert retrain.read_rows("a/results.jsonl")[0]["curve"][0]["lr"] == pytest.approx(0.001)


def test_finetune_at_several_budgets_is_one_run(tmp_path):
    """Its longest run contains the shorter ones: the first epochs of the same curve."""
    data = tiny_data(16)
    pruned = {**prune.prune(dense_checkpoint("resnet8"), how()), "test_accuracy": 10.0}
    args = type("Args", (), {"dry_run": False, "lr": None, "end_lr": None, "cycle_momentum": True,
                             "resume": False, "save_every": 0})
    long, short = (retrain.Run(str(tmp_path / "p.pt"), pruned, "finetune", t, 0, args, CPU)
                   for t in (3, 2))
    long(args, CPU, data, [1, 2, 3])
    rows = {r["budget"]: r for r in retrain.read_rows(tmp_path / "results.jsonl")}
    assert sorted(rows) == [1, 2, 3] and rows[2]["run"] == short.id
    curve, _ = train.fit(retrain.start("finetune", 2, pruned, "", 0)[0], data, short.schedule(2),
                         short.settings, CPU, str(tmp_path / "s.pt"))
    assert rows[2]["curve"] == curve == rows[3]["curve"][:2] and rows[2]["epochs"] == 2


def frozen(self, x):
    """Batch norm by its running statistics, in training too."""
    return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias)


@pytest.fixture(scope="module", autouse=True)
def two_processes(request, tmp_path_factory):
    """(folder, flags, process) of a torchrun started before the first test: it mostly imports,
    and it runs beside the other tests, on the second core."""
    name = "test_torchrun_computes_what_one_process_computes"
    if name not in (item.name for item in request.session.items):
        yield None
        return
    folder = tmp_path_factory.mktemp("torchrun")
    image_folder(folder / "data", count=14)
    driver = folder / "driver.py"
    driver.write_text(
        f"import sys; sys.path.insert(0, {str(HERE)!r})\n"
        "import schedules, test_repro, torch, train\n"
        "torch.nn.BatchNorm2d.forward = test_repro.frozen\n"
        "schedules.command(lambda: train.main(sys.argv[1:]))\n")
    argv = ["--dataset", "folder", "--batch-size", "42", "--epochs", "5", "--precision", "fp32",
            "--lr", "0.01", "--data-dir", str(folder / "data")]
    process = subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
         str(driver), *argv, "--out", str(folder / "two")], text=True, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, env={**os.environ, "OMP_NUM_THREADS": "1"})
    yield folder, argv, process
    process.kill()


def test_torchrun_computes_what_one_process_computes(two_processes, monkeypatch):
    """Two processes, gloo: losses of five one-step epochs, test counts, and one set of files.

    Batch norm uses its running statistics here (`frozen`), because each process would see only its
    own half of the batch: so the statistics are the same in both runs, as the claim wants."""
    folder, argv, process = two_processes
    with monkeypatch.context() as patch:
        patch.setattr(torch.nn.BatchNorm2d, "forward", frozen)
        assert call("train", *argv, "--out", folder / "one")[0] == 0
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert out.count("Wrote") == 1
    curves = [torch.load(folder / name / "dense.pt")["curve"] for name in ("one", "two")]
    for one, two in zip(*curves):
        assert one["train_loss"] == pytest.approx(two["train_loss"], abs=1e-4)
        assert one["test_accuracy"] == two["test_accuracy"]
    assert len({p["train_loss"] for p in curves[0]}) == 5                     # each step changed it
    assert sorted(os.listdir(folder / "one")) == sorted(os.listdir(folder / "two"))


# ---- verdicts ------------------------------------------------------------------------------------

def test_students_t_quantiles():
    for freedom, value in ((1, 12.7062), (2, 4.30265), (4, 2.77645), (9, 2.26216), (30, 2.04227),
                           (1000, 1.96234)):
        assert retrain.t_quantile(freedom) == pytest.approx(value, rel=1e-4)


def made_up(method, schedule, accuracies, budget=40, dense=93.0):
    return [{"run": f"{method}{schedule}{budget}{seed}", "dataset": "cifar10", "arch": "resnet56",
             "plan": "B", "method": method, "structure": "filters", "scope": "layer",
             "sparsity": None, "round": 1, "include_linear": False, "schedule": schedule,
             "budget": budget, "epochs": budget, "seed": seed, "lr": None, "end_lr": None,
             "cycle_momentum": None, "dense": "d", "pruning_seed": 0, "test_accuracy": a,
             "dense_test_accuracy": dense, "recipe": CIFAR} for seed, a in enumerate(accuracies)]


def lines_of(rows, claim):
    return [line for line in retrain.claims(rows).splitlines() if line.startswith(f"| {claim}")]


def test_verdicts_on_made_up_rows():
    rows = (made_up("magnitude", "finetune", [92.5, 92.6, 92.4])
            + made_up("magnitude", "one_cycle", [93.1, 93.2, 93.0])
            + made_up("magnitude", "slr", [92.4, 92.7, 92.4])
            + made_up("random", "one_cycle", [92.9]) + made_up("random", "finetune", [92.0]))
    win = lines_of(rows, "C2 CLR > FT (magnitude)")[0]
    assert "**yes** +0.60 [+0.60, +0.60], n = 3" in win                       # a clear win
    tie = lines_of(rows, "C1 SLR > FT (magnitude)")[0]
    assert "not decided +0.00 [-0.25, +0.25], n = 3" in tie                   # sd 0.1, t = 4.303
    assert "n = 1 (+0.40)" in lines_of(rows, "C6 random + CLR > magnitude")[0]
    assert "not decided" in lines_of(rows, "C6")[0]
    assert "an arm is missing" in lines_of(rows, "C1 LRW > FT (magnitude)")[0]
    worse = (made_up("magnitude", "finetune", [93, 93, 93])
             + made_up("magnitude", "one_cycle", [92, 92.1, 91.9]))
    assert "**no, reversed** -1.00" in lines_of(worse, "C2 CLR > FT")[0]
    flat = (made_up("magnitude", "finetune", [93, 92, 93.5])
            + made_up("magnitude", "finetune", [93, 92.1, 93.4], 152))
    assert "**yes, within 1** +0.00 [-0.25, +0.25]" in lines_of(flat, "C3")[0]
    wide = (made_up("magnitude", "finetune", [93, 92, 93.5])
            + made_up("magnitude", "finetune", [93, 93, 92.5], 152))
    assert "not decided +0.00 [-2.48, +2.48]" in lines_of(wide, "C3")[0]       # says nothing
    whole = (rows[:6] + made_up("magnitude", "finetune", [94] * 3, 80)      # the only arm at 80
             + made_up("random", "one_cycle", [93, 93, 92.9])
             + made_up("random", "finetune", [92, 92.1, 91.9]))
    assert "t=40 | **yes** +0.37 [+0.22, +0.51], n = 3" in lines_of(whole, "C7 the gap")[0]
    control = [{**r, "end_lr": 0.001, "cycle_momentum": False}
               for r in made_up("magnitude", "one_cycle", [92.9, 93.0, 92.7])]
    changed = "control: one_cycle end=0.001 flat-momentum > "
    assert "**no, reversed** -0.23" in lines_of(rows + control, changed + "one_cycle")[0]
    assert "**yes** +0.37 [+0.08, +0.65]" in lines_of(rows + control, changed + "slr")[0]
    assert not lines_of(rows, "control")


def test_pairs_are_of_one_seed_and_one_dense_network():
    rows = made_up("magnitude", "one_cycle", [1, 2, 3]) + made_up("magnitude", "finetune", [0, 0])
    assert retrain.paired(rows, ("magnitude", "one_cycle"), ("magnitude", "finetune")) == [1, 2]


def test_the_table_of_a_report():
    """Mean, sample standard deviation, n, distance to dense, what is left, seconds; to the digit.
    """
    kept = {"params": 25, "dense_params": 100, "macs": 10, "dense_macs": 40, "nonzero": 20}
    rows = [{**r, **kept, "seconds": 10.0 + r["seed"]} for r in (
        made_up("magnitude", "finetune", [92, 93, 94.5]) + made_up("random", "slr", [93.5]))]
    text = retrain.table(rows)
    assert "| t | finetune | slr |" in text and "dense 93.00 (n=1);" in text
    assert "| filters plan B | magnitude | 25% / 25% | 40 | " in text
    assert "| 40 | 93.17 ± 1.26 (n=3)<br>+0.17, 11 s | – |" in text
    assert "| random | 25% / 25% | 40 | – | 93.50 (n=1)<br>+0.50, 10 s |" in text
    masked = [{**r, "structure": "weights", "macs": 40} for r in rows]
    assert "| 20% / 100% | 40 | 93.17 ±" in retrain.table(masked)


def test_charts_name_what_they_draw():
    text = retrain.chart("Title", "epoch", [0, 1], "y", {"finetune": [1, 2], "one_cycle": [3, 1]})
    assert "blue finetune, red one_cycle" in text
    assert re.search(r"line \[1, 2\]\n +line \[3, 1\]", text)
    small = retrain.chart("", "epoch", "0 --> 4", "y", {"finetune": [1e-5, 0.1], "slr": [0, 1]})
    assert "line [0.00001, 0.1]\n" in small and 'x-axis "epoch" 0 --> 4\n' in small


def test_pictures_show_the_budget_with_the_most_arms_without_scratch_and_variants():
    rows = [{**r, "distance": 0.1, "removed": 0.5, "sparsity": 0.5,
             "curve": [{"test_accuracy": r["test_accuracy"] + e} for e in range(r["epochs"])]}
            for name, t in (("finetune", 4), ("slr", 4), ("scratch", 4), ("finetune", 8))
            for r in made_up("magnitude", name, [90.0, 92.0], t)]
    rows += [{**r, "lr": 0.5} for r in rows if r["schedule"] == "slr"]
    titles = [line for line in retrain.charts(rows).splitlines() if line.endswith(".")]
    assert [title.partition(", resnet56")[0] for title in titles] == [
        "Learning rate", "Test accuracy after each epoch", "Test accuracy by budget"]
    assert all("t = 4: blue finetune, red slr." in title for title in titles[:2])
    assert titles[2].endswith("magnitude: blue finetune.")          # the only one at 4 and at 8
    assert "line [91, 92, 93, 94]" in retrain.charts(rows)


def test_a_picture_by_budget_draws_as_many_points_as_it_can():
    """finetune at 4, 8 and 16, two others at 4 and 8: three lines of two points, not one of three.
    """
    rows = [r for name, budgets in (("slr", (4, 8)), ("finetune", (4, 8, 16)), ("scratch", (8,)),
                                    ("one_cycle", (8, 4)))
            for t in budgets for r in made_up("magnitude", name, [t, t + 2.0], t)]
    text, = retrain.means_chart(rows, "budget", "", "epochs")
    assert ": blue finetune, red slr, green one_cycle." in text and '["4", "8"]' in text
    assert text.count("line [5, 9]") == 3
    alone, = retrain.means_chart([r for r in rows if r["schedule"] == "finetune"], "budget", "", "")
    assert '["4", "8", "16"]' in alone and "line [5, 9, 17]" in alone
    assert retrain.means_chart(rows[-2:], "budget", "", "") == []


# ---- 1: resuming ---------------------------------------------------------------------------------

ARMS = [("dense", None), *itertools.product(schedules.RETRAIN, ("filters", "weights"))]


@functools.cache
def uninterrupted(name, pruned):
    """What an arm leaves behind when nothing disturbs it."""
    folder = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    status, _, err = call(*arm_of(folder, name, pruned))
    assert (status, err) == (0, "")
    return content(folder / "run")


def interrupt_and_resume(folder, name, pruned, step, number=signal.SIGTERM):
    """Run an arm with a signal at `step` (from 0), resume it, and say what differs."""
    argv = arm_of(folder, name, pruned)
    with signal_at(step, number):
        status, out, err = call(*argv)
    assert (status, err) == (128 + number, "") and "--resume" in out
    assert call(*argv)[0] == 2                       # not started anew without being told
    status, out, err = call(*argv, "--resume")
    assert (status, err) == (0, "") and "resuming" in out
    assert not list(folder.glob("run/*.state.pt")) and not list(folder.glob("run/*.tmp"))
    return differing(uninterrupted(name, pruned), content(folder / "run"))


@pytest.mark.parametrize("name, pruned, step, number", [
    ("dense", None, 2, signal.SIGTERM), ("dense", None, 9, signal.SIGINT),
    ("one_cycle", "weights", 6, signal.SIGINT), ("weight_rewind", "filters", 0, signal.SIGTERM)])
def test_an_interrupted_run_ends_like_an_uninterrupted_one(tmp_path, name, pruned, step, number):
    """Weights, momentum, curve and result row are bitwise those of a run that was left alone."""
    assert interrupt_and_resume(tmp_path, name, pruned, step, number) == []


@slow
@pytest.mark.parametrize("name, pruned", ARMS)
def test_interrupted_at_every_step(tmp_path, name, pruned):
    """As above: every arm, with and without masks, at each of its ten steps."""
    for step in range(10):
        assert interrupt_and_resume(tmp_path / str(step), name, pruned, step) == [], step


def test_the_comparison_sees_a_batch_trained_twice(tmp_path, monkeypatch):
    """Negative control: without the skip of the batches already seen, the end is another one."""
    real = train.train_batches

    def from_the_start(data, seed, epoch, batch_size, machine, start=0):
        return itertools.islice(real(data, seed, epoch, batch_size, machine), 5 - start)
    monkeypatch.setattr(train, "train_batches", from_the_start)
    differ = interrupt_and_resume(tmp_path, "dense", None, 2)
    assert {("dense.pt", "model", "conv1.weight"), ("dense.pt", "curve")} <= set(differ)


def test_saving_often_changes_nothing(tmp_path):
    """--save-every writes more, but the run is the same one; the last save is of the last step."""
    assert call(*arm_of(tmp_path, "dense", None), "--save-every", 1)[0] == 0
    assert differing(uninterrupted("dense", None), content(tmp_path / "run")) == []


@pytest.mark.parametrize("name, pruned", [("dense", None), ("slr", "filters")])
def test_resuming_a_finished_run_prints_its_result(tmp_path, name, pruned):
    """A scheduler that restarts everything must not be punished, and nothing is trained again."""
    argv = arm_of(tmp_path, name, pruned)
    assert call(*argv)[0] == 0
    before = {k: v for k, v in listing(tmp_path).items() if v[1] and not k.endswith("report.md")}
    status, out, err = call(*argv, "--resume")
    assert (status, err) == (0, "") and re.search(r"test +\d+\.\d\d %", out)
    after = listing(tmp_path)
    assert {k: after[k] for k in before} == before


@functools.cache
def interrupted():
    """A folder with a dense run interrupted in its second epoch, and `other` images of the form."""
    folder = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    pictures(folder / "other" / "train", {"a": 5, "b": 5}, seed=5)
    pictures(folder / "other" / "test", {"a": 3, "b": 3}, seed=6)
    argv = arm_of(folder, "dense", None)        # may make `study` first, undisturbed
    with signal_at(6):
        assert call(*argv)[0] == 143
    return folder


ANOTHER = [
    (["--lr", 0.2], "lr"), (["--epochs", 3], "epochs"), (["--batch-size", 5], "batch_size"),
    (["--seed", 1], "seed"), (["--schedule", "cosine"], "schedule"), (["--subset", 8], "subset"),
    (["--weight-decay", 0.1], "weight_decay"), (["--momentum", 0.5], "momentum"),
    (["--val-size", 2], "val_size"), (["--precision", "bf16"], "precision"),
    (["--arch", "resnet14"], "arch"), (["--data-dir", "other"], "data")]


def refuse_another(monkeypatch, change, named):
    """Resume the interrupted run with a changed setting: refused by its name, nothing touched."""
    folder = interrupted()
    monkeypatch.chdir(folder)
    argv = arm_of(folder, "dense", None)
    if "--schedule" in change:                       # milestones belong to the step schedule
        at = argv.index("--milestones")
        argv[at:at + 2] = []
    before = listing(folder)
    status, _, err = call(*argv, *change, "--resume")
    assert status == 2 and err.count("\n") == 1 and re.search(rf"[ ,]{named} \(here ", err)
    assert listing(folder) == before


@pytest.mark.parametrize("change, named", ANOTHER[::4])
def test_resuming_with_another_setting_is_refused_by_name(monkeypatch, change, named):
    """Half a run at one learning rate and half at another is worth nothing and looks like a run."""
    refuse_another(monkeypatch, change, named)


@slow
@pytest.mark.parametrize("change, named", ANOTHER)
def test_resuming_with_any_other_setting_is_refused_by_name(monkeypatch, change, named):
    """As above, every setting."""
    refuse_another(monkeypatch, change, named)


def test_a_second_signal_exits_at_once():
    """Whoever presses Ctrl-C twice does not want to wait for the step or the disk."""
    def work():
        with train.interruptible() as seen:
            os.kill(os.getpid(), signal.SIGTERM)
            assert seen == [signal.SIGTERM]
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(5)
    child = fork(work)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 130


# ---- 2, 3: files ---------------------------------------------------------------------------------

def test_a_file_is_on_disk_before_its_name(tmp_path, monkeypatch):
    """Flushed and fsynced before it is renamed: a power cut leaves the old file or the new one."""
    path, calls, rename = tmp_path / "x", [], os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: calls.append(os.fstat(fd).st_size))
    monkeypatch.setattr(os, "replace", lambda *names: (calls.append(names[1]), rename(*names)))
    models.write(path, b"new")
    assert calls == [3, str(path)] and path.read_bytes() == b"new"


def kill_writers(folder, kills):
    """Kill a process that writes checkpoints at a random moment, `kills` times; the file on disk
    must always be a whole one, and one that was begun. Returns how many different ones were seen.
    """
    path, draw, seen = folder / "state.pt", random.Random(0), set()
    whole = models.read(study() / "run" / "dense.pt")

    def work():
        for n in itertools.count(1):
            models.save(path, {**whole, "classes": n,
                               "model": {"w": torch.full((20_000,), float(n))}})
    for _ in range(kills):
        child = fork(work)
        while not path.exists():
            time.sleep(0.001)
        time.sleep(draw.uniform(0, 0.02))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        found = models.read(path)
        assert (found["model"]["w"] == found["classes"]).all()
        seen.add(found["classes"])
    return len(seen)


def test_a_killed_writer_leaves_a_whole_file(tmp_path):
    """The previous checkpoint survives until the new one is complete, here 20 times."""
    assert kill_writers(tmp_path, 20) > 2


@slow
def test_200_killed_writers_leave_whole_files(tmp_path):
    """As above, 200 times."""
    assert kill_writers(tmp_path, 200) > 5


def damage_checkpoint(tmp_path, flips, cuts):
    """Flip one byte in so many places, cut in so many: one kind of error, or the same tensors."""
    path, draw, refused = tmp_path / "x.pt", random.Random(0), 0
    whole = (study() / "run" / "weights.pt").read_bytes()
    path.write_bytes(whole)
    right = content(tmp_path)
    damaged = [(n, 1 << draw.randrange(8)) for n in draw.sample(range(len(whole)), flips * 4 // 5)]
    index = range(len(whole) - 6000, len(whole))
    damaged += [(n, 255) for n in draw.sample(index, 100)]
    cuts = [0, 1, len(whole) - 1] + draw.sample(range(len(whole)), cuts - 3)
    for data in itertools.chain((whole[:n] + bytes([whole[n] ^ bit]) + whole[n + 1:]
                                 for n, bit in damaged), (whole[:n] for n in cuts)):
        path.write_bytes(data)
        try:
            assert differing(right, content(tmp_path)) == []
        except schedules.Refused as problem:
            assert str(path) in str(problem)
            refused += 1
    assert refused > flips // 2


def test_a_damaged_checkpoint_is_refused_or_the_same(tmp_path):
    """100 flipped bytes and 20 cuts."""
    damage_checkpoint(tmp_path, 100, 20)


@slow
def test_a_much_damaged_checkpoint_is_refused_or_the_same(tmp_path):
    """500 flipped bytes and 100 cuts."""
    damage_checkpoint(tmp_path, 500, 100)


class Hostile:
    """A pickle that runs a command when it is loaded."""
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("form", ["torch", "old torch", "pickle"])
def test_a_hostile_checkpoint_runs_nothing(tmp_path, form):
    """Files come from colleagues and the internet: loading one must not run what it says."""
    path, sign = tmp_path / "x.pt", tmp_path / "it-ran"
    bad = {**torch.load(study() / "run" / "dense.pt"), "settings": Hostile(sign)}
    if form == "pickle":
        path.write_bytes(pickle.dumps({"format": 1, "kind": "dense", "settings": Hostile(sign)}))
    else:
        torch.save(bad, path, _use_new_zipfile_serialization=form == "torch")
    with pytest.raises(schedules.Refused, match="x.pt: not a checkpoint"):
        models.read(path)
    assert not sign.exists()
    torch.load(path, weights_only=False) if form != "pickle" else pickle.loads(path.read_bytes())
    assert sign.exists()                                                    # it was a loaded one


def test_plain_torch_load_opens_every_file(tmp_path):
    """Checkpoints are of use without this code: default arguments, plain types, no classes."""
    argv = arm_of(tmp_path, "one_cycle", "weights")
    with signal_at(3):
        call(*argv)
    states = list(tmp_path.glob("run/*.state.pt"))
    files = [torch.load(p) for p in tmp_path.glob("run/*.pt")]
    assert call(*argv, "--resume")[0] == 0 and len(states) == 1
    files += [torch.load(p) for p in tmp_path.glob("run/*.pt")]
    assert {f["kind"] for f in files} == {"dense", "pruned", "retrained", "state"}
    assert all(type(f) is dict and f["format"] == models.FORMAT for f in files)


# ---- the disk, the loss --------------------------------------------------------------------------

def test_a_full_disk_leaves_the_last_state(tmp_path):
    """A write that does not fit (here: a limit on the size of a file) is one line, and the state
    that was there before is there still, so that the run can go on when there is room again."""
    argv = arm_of(tmp_path, "dense", None)
    with signal_at(2):
        call(*argv)
    state = tmp_path / "run" / "dense.state.pt"
    before = listing(tmp_path / "run")
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, unlimited[1]))
    try:
        status, _, err = call(*argv, "--resume")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
    assert status == 2 and err.count("\n") == 1 and "too large" in err
    after = listing(tmp_path / "run")
    assert after == before and models.read(state)["step"] == 3
    assert call(*argv, "--resume")[0] == 0
    assert differing(uninterrupted("dense", None), content(tmp_path / "run")) == []


def test_results_are_whole_lines_on_a_full_disk(tmp_path):
    """A row of which only a part fits is taken back."""
    path = tmp_path / "results.jsonl"
    row = finished_row()
    retrain.append(str(path), [row])
    before = path.read_bytes()
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 100, unlimited[1]))
    try:
        with pytest.raises(OSError, match="full"):
            retrain.append(str(path), [{**row, "run": "another"}])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
    assert path.read_bytes() == before


def test_a_folder_that_vanishes_is_one_line(tmp_path):
    """An unmounted disk in the middle of a run: no traceback, and the folder is not made again."""
    real = train.evaluate

    def evaluate(*args, **named):
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
        return real(*args, **named)
    for name, pruned in (("dense", None), ("slr", "filters")):
        argv, train.evaluate = arm_of(tmp_path, name, pruned), evaluate
        try:
            status, _, err = call(*argv)
        finally:
            train.evaluate = real
        assert status == 2 and err.count("\n") == 1 and "No such file" in err
        assert not (tmp_path / "run").exists()


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full here")
def test_a_full_disk_under_the_output_is_one_line():
    """`> log` on a full disk: one line and status 2, also from what is only written at exit."""
    for script, argv in (("schedules", []), ("schedules", ["--epochs", 2000])):
        with open("/dev/full", "w") as full:
            done = subprocess.run([sys.executable, HERE / f"{script}.py", *map(str, argv)],
                                  stdout=full, stderr=subprocess.PIPE, text=True)
        assert done.returncode == 2 and done.stderr.count("\n") == 1


@pytest.mark.parametrize("what, step", [("loss", 8), ("weights", 9)])
def test_a_run_that_diverges_stops_with_its_last_good_state(tmp_path, what, step):
    """Non-finite numbers are never saved: neither behind a bad loss, nor when the very last step,
    whose loss was still good, broke the weights."""
    argv, real, seen = arm_of(tmp_path, "dense", None), train.train_step, []

    def train_step(forward, optimizer, x, y, *rest):
        seen.append(len(seen))
        factor = float("nan") if what == "loss" and seen[-1] == step else 1
        out = real(forward, optimizer, x * factor, y, *rest)
        if what == "weights" and seen[-1] == step:
            optimizer.param_groups[0]["params"][0].data.fill_(float("inf"))
        return out
    train.train_step = train_step
    try:
        status, _, err = call(*argv)
    finally:
        train.train_step = real
    assert status == 2 and err.count("\n") == 1
    assert f"the {what}" in err and f"at epoch 2, step {step - 4}" in err
    assert "dense.state.pt" in err
    assert models.read(tmp_path / "run" / "dense.state.pt")["epoch"] == 1   # finite: read checks it
    assert not (tmp_path / "run" / "dense.pt").exists()
    assert call(*argv, "--resume")[0] == 0
    assert differing(uninterrupted("dense", None), content(tmp_path / "run")) == []


# ---- 4, 5: processes -----------------------------------------------------------------------------

@slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_real_process_stops_and_resumes(tmp_path, number):
    """What a cluster does: SIGTERM, and two seconds later it must be over."""
    argv = [*arm_of(tmp_path, "dense", None)[1:], "--epochs", 60]
    process = start("train", *argv)
    while not process.stdout.readline().startswith("   3/60"):
        pass
    began = time.monotonic()
    process.send_signal(number)
    _, err = process.communicate(timeout=30)
    assert time.monotonic() - began < 2.5 and process.returncode == 128 + number and err == ""
    process = start("train", *argv, "--resume")
    process.communicate(timeout=120)
    assert process.returncode == 0
    (tmp_path / "b").mkdir()
    alone = arm_of(tmp_path / "b", "dense", None)
    assert call(*alone, "--epochs", 60)[0] == 0
    assert differing(content(tmp_path / "b" / "run"), content(tmp_path / "run")) == []


@functools.cache
def finished_row():
    """A row as retrain.py writes it."""
    return uninterrupted_rows("one_cycle", "filters")[0]


def uninterrupted_rows(name, pruned):
    return [{**v, "seconds": 1.0} for k, v in uninterrupted(name, pruned).items() if k[0] == "row"]


def append_from_many(path, processes, rows):
    """So many processes append so many rows each, and as many that all of them have."""
    row = finished_row()

    def work(me):
        for i in range(rows):
            retrain.append(str(path), [{**row, "run": f"{me}-{i}"}, {**row, "run": f"all-{i}"}])
    children = [fork(functools.partial(work, me)) for me in range(processes)]
    assert [os.waitpid(child, 0)[1] for child in children] == [0] * processes
    runs = [json.loads(line)["run"] for line in path.read_text().splitlines()]
    assert sorted(runs) == sorted(f"{me}-{i}" for me in [*range(processes), "all"]
                                  for i in range(rows))


def test_rows_of_several_processes_are_whole(tmp_path):
    """No row is lost, torn or there twice, here with 4 processes and 6 rows of each."""
    append_from_many(tmp_path / "results.jsonl", 4, 6)


@slow
def test_rows_of_many_processes_are_whole(tmp_path):
    """As above, 8 processes and 25 rows of each."""
    append_from_many(tmp_path / "results.jsonl", 8, 25)


def test_a_missing_last_line_end_does_not_glue_rows(tmp_path):
    """Editors leave it out; the next row must not become a part of the last one."""
    path, row = tmp_path / "results.jsonl", finished_row()
    path.write_text(json.dumps(row))
    retrain.append(str(path), [{**row, "run": "next"}])
    assert [r["run"] for r in retrain.read_rows(path)] == [row["run"], "next"]


@slow
def test_two_processes_share_a_list_of_runs(tmp_path):
    """Started on overlapping lists: every run is there once, and none was trained by both."""
    argv = arm_of(tmp_path, "finetune", "filters")[1:]
    lists = (["finetune", "slr", "one_cycle", "linear"], ["linear", "one_cycle", "slr", "scratch"])
    processes = []
    for names in lists:
        at = argv.index("--schedule")
        processes.append(start("retrain", *argv[:at], "--schedule", *names, *argv[at + 2:],
                               "--epochs", 60))
    outs = [p.communicate(timeout=300) for p in processes]
    assert [p.returncode for p in processes] == [0, 0] and [err for _, err in outs] == ["", ""]
    rows = retrain.read_rows(tmp_path / "run" / "results.jsonl")
    assert sorted(r["schedule"] for r in rows) == sorted({*lists[0], *lists[1]})
    assert sum(out.count(" 60/60") for out, _ in outs) == len(rows)


# ---- 6: bad input --------------------------------------------------------------------------------

def changed(checkpoint, **how):
    """A checkpoint with other entries; None removes one."""
    return {k: v for k, v in {**checkpoint, **how}.items() if v is not None}


@functools.cache
def bad_things():
    """A folder, made once, with every kind of bad file and data set, and `run`, which is good."""
    folder = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    run = shutil.copytree(study() / "run", folder / "run")
    (folder / "data").symlink_to(study() / "data")
    dense, pruned = (torch.load(run / f"{n}.pt") for n in ("dense", "filters"))
    model = dense["model"]

    def other(**tensors):
        named = {k.replace("_", "."): v for k, v in tensors.items()}
        return changed(dense, model={**model, **named})
    files = {
        "list": [1, 2], "foreign": {"a": 1}, "format": changed(dense, format=2),
        "odd": changed(dense, format=torch.ones(2)), "nokind": changed(dense, kind=None),
        "kind": changed(dense, kind="cat"), "kinds": changed(dense, kind=["dense"]),
        "nomodel": changed(dense, model=None), "norecipe": changed(dense, recipe=None),
        "recipe": changed(dense, recipe={"dataset": "folder"}), "mean": changed(dense, mean="abc"),
        "dataset": changed(dense, recipe={**dense["recipe"], "dataset": "mnist"}),
        "arch": changed(dense, arch="resnet20"), "noarch": changed(dense, arch="alexnet"),
        "classes": changed(dense, classes=-3), "side": changed(dense, side="8"),
        "shape": other(conv1_weight=torch.ones(15, 3, 3, 3)),
        "nan": other(fc_bias=torch.full((2,), np.nan)),
        "double": other(conv1_weight=torch.ones(16, 3, 3, 3, dtype=torch.float64)),
        "missing": changed(dense, model={k: v for k, v in model.items() if k != "fc.weight"}),
        "sparse": other(fc_weight=torch.ones(2, 64).to_sparse()),
        "scalar": other(fc_weight=torch.ones(())),
        "text-tensor": other(fc_weight="hello"), "distance": changed(pruned, distance=float("nan")),
        "kept": changed(pruned, kept=None),
        "pruning": changed(pruned, pruning={"method": "magnitude"}),
        "dense-ten": changed(dense, classes=10, model={**model, "fc.weight": torch.ones(10, 64),
                                                       "fc.bias": torch.ones(10)}),
        "imagenet": changed(dense, arch="resnet18")}
    for name, checkpoint in files.items():
        torch.save(checkpoint, folder / f"{name}.pt")
    torch.save({**dense, "settings": Hostile(folder / "it-ran")}, folder / "hostile.pt")
    whole = (run / "dense.pt").read_bytes()
    (folder / "cut.pt").write_bytes(whole[:len(whole) // 2])
    (folder / "text.pt").write_text("hello")
    (folder / "empty.pt").write_text("")
    with zipfile.ZipFile(folder / "zip.pt", "w") as archive:
        archive.writestr("a.txt", "hello")
    (folder / "full").mkdir()
    (folder / "full" / "dense.pt").write_text("something of somebody")

    (folder / "nothing").mkdir()
    sets = {name: pictures(folder / name / "train", {"a": 2, "b": 2}).parent / name for name in
            ("corrupt", "wide", "sizes", "classes3", "names", "emptyclass", "notest", "textfile",
             "tiny", "bigcorrupt", "testsize")}
    for name in set(sets) - {"notest", "classes3", "names", "testsize"}:
        pictures(folder / name / "test", {"a": 2, "b": 2})
    pictures(folder / "classes3" / "test", {"a": 1, "b": 1, "c": 1})
    pictures(folder / "names" / "test", {"b": 1, "c": 1})
    pictures(folder / "testsize" / "test", {"a": 1, "b": 1}, side=9)
    good = (folder / "corrupt/train/b/0.png").read_bytes()
    (folder / "corrupt/train/b/1.png").write_bytes(good[:99])
    (folder / "textfile/train/a/notes.png").write_text("not an image")
    Image.new("RGB", (9, 8)).save(folder / "wide/train/a/1.png")
    Image.new("RGB", (9, 9)).save(folder / "sizes/train/a/1.png")
    (folder / "emptyclass/train/c").mkdir()
    for path in (folder / "bigcorrupt").rglob("*.png"):
        Image.new("RGB", (70, 80)).save(path)
    (folder / "bigcorrupt/test/b/1.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    for name, text in {"torn": '{"run": "1"\n', "keys": '{"run": "1", "schedule": "slr"}\n',
                       "bytes": b"\xff\xfe\x00\n", "deep": "[" * 100_000 + "\n", "blank": "\n",
                       "type": json.dumps({**finished_row(), "test_accuracy": "high"}) + "\n",
                       "nan-row": json.dumps({**finished_row(), "test_accuracy": float("nan")})
                       + "\n"}.items():
        (folder / "results" / name).mkdir(parents=True)
        (folder / "results" / name / ".lock").touch()
        (folder / "results" / name / "results.jsonl").write_bytes(
            text if isinstance(text, bytes) else text.encode())
    return folder


FOLDER = "train --dataset folder --epochs 1 --batch-size 2 --milestones --out new --data-dir "
BAD = [line.split("|") for line in f"""
train --dataset mnist|invalid choice
train --arch alexnet|unknown network
train --arch resnet9|unknown network
train --arch resnet2|unknown network
train --arch|expected one argument
train --colour red|unrecognized arguments
train file.pt|unrecognized arguments
train --epochs 0|--pretrained
train --epochs -1|whole number
train --epochs 1.5|whole number
train --epochs {"9" * 400}|whole number
train --epochs ten|whole number
train --batch-size 1|whole number
train --batch-size 1e3|whole number
train --lr nan|a number
train --lr inf|a number
train --lr -0.1|a number
train --lr 0|a number
train --momentum 1|below 1
train --weight-decay -1|a number
train --schedule zigzag|invalid choice
train --milestones 5 3|ascending
train --milestones 99|not within
train --milestones 1 --schedule cosine|belongs to --schedule step
train --milestones x|whole number
train --seed -1|whole number
train --seed {"9" * 30}|whole number
train --subset 0|whole number
train --subset 5000|class 0
train --val-size 4000|no image
train --val-size 4000 --subset 10|no image
train --val-size 5000|class 0
train --snapshot-every 0|whole number
train --save-every -1|whole number
train --workers 9999|whole number
train --device tpu|not supported
train --device hpu|not supported
train --device cuda:99|not here
train --precision fp16|invalid choice
train --compile maybe|invalid choice
train --pretrained|1000 classes
train --out run/dense.pt|exists
train --out full|full/dense.pt: not a checkpoint
train --out=|must not be empty
train --data-dir=|must not be empty
train --evaluate=|must not be empty
train --evaluate nothing|no such checkpoint
train --evaluate nowhere.pt|no such checkpoint
train --evaluate run/epoch-000.pt|state checkpoint
train --out /proc/nowhere --dry-run|/proc/nowhere
{FOLDER}nowhere|no folder train
{FOLDER}nothing|no folder train
{FOLDER}run/dense.pt|no folder train
{FOLDER}notest|no folder test
{FOLDER}corrupt|b/1.png: not a readable image
{FOLDER}textfile|notes.png: not a readable image
{FOLDER}wide|1.png: is 9 x 8 pixels
{FOLDER}sizes|pixels
{FOLDER}testsize|test images 9
{FOLDER}emptyclass|classes? c
{FOLDER}classes3|'c'
{FOLDER}names|'a'
{FOLDER}data --arch vgg16|8 x 8 pixels
{FOLDER}data --subset 3 --arch resnet18|last batch of one
prune nowhere.pt|no such checkpoint
prune|no such checkpoint
prune nothing|no such checkpoint
prune=|must not be empty
prune run/dense.pt nowhere.pt|no such checkpoint
prune run/epoch-000.pt|state checkpoint
prune run/dense.pt --method best|invalid choice
prune run/dense.pt --method magnitude hrank --structure weights|hrank ranks filters
prune run/dense.pt --method magnitude taylor --calibration-images 11|11
prune run/dense.pt --calibration-images 0|whole number
prune run/dense.pt --sparsity 1|below 1
prune run/dense.pt --sparsity nan|below 1
prune run/dense.pt --sparsity .1 .2|2 values
prune run/dense.pt --sparsity .1 .2 .3 --structure weights|one value
prune run/dense.pt --plan B|no plan B
prune run/dense.pt --plan B --sparsity .5|leave out
prune run/dense.pt --plan B --structure weights|for filters
prune run/dense.pt --include-linear|--structure weights
prune run/dense.pt --out one.pt|several
prune run/dense.pt --method random --out run/weights.pt|something else
prune run/dense.pt --method random --out run|no such checkpoint
prune run/dense.pt --method random --out nowhere/x.pt|No such file
prune run/weights.pt --structure filters|weights are pruned
prune run/filters.pt --structure weights|filters are pruned
prune run/weights.pt --structure weights --sparsity .1|zero already
prune run/dense.pt --data-dir nothing|no folder train
prune run/dense.pt --data-dir bigcorrupt|classes
prune dense-ten.pt|10 classes
retrain nowhere.pt|no such checkpoint
retrain|no pruned checkpoint
retrain run/dense.pt|dense checkpoint, not pruned
retrain run/epoch-000.pt|state checkpoint, not pruned
retrain run/filters.pt --schedule best|invalid choice
retrain run/filters.pt --schedule finetune --lr 1|would ignore it
retrain run/filters.pt --schedule slr --end-lr 1|would ignore it
retrain run/filters.pt --schedule slr --no-cycle-momentum|would ignore it
retrain run/filters.pt --schedule weight_rewind --epochs 2 --dry-run --epochs 0|whole number
retrain run/filters.pt --schedule weight_rewind --epochs {10 ** 12}|whole number
retrain run/filters.pt --epochs|expected at least one
retrain run/filters.pt --rounds 0|whole number
retrain run/filters.pt --seed x|whole number
retrain run/filters.pt --data-dir nothing|no folder train
retrain run/filters.pt --data-dir names --schedule slr|'a'
retrain --report nothing|no results
retrain --report nowhere|no results
retrain --report run/dense.pt|no results
retrain distance.pt|lacks parts
retrain kept.pt|lacks parts
retrain pruning.pt|lacks parts
schedules --epochs 0|whole number
schedules --lr x|a number
schedules --dense-schedule none|invalid choice
schedules --momentum 2|below 1
schedules --steps-per-epoch {"9" * 400}|whole number
schedules x|unrecognized
""".strip().splitlines()]
BAD += [[f"prune {name}.pt", rf"{name}\.pt: "] for name in
    ("list", "foreign", "format", "odd", "nokind", "kind", "kinds", "nomodel", "norecipe", "recipe",
     "mean", "dataset", "arch", "noarch", "classes", "side", "shape", "nan", "double", "missing",
     "sparse", "scalar", "text-tensor", "imagenet", "hostile", "cut", "text", "empty", "zip")]
BAD += [[f"retrain --report results/{name}", "line 1 is not a result row"]
        for name in ("torn", "keys", "bytes", "deep", "blank", "type", "nan-row")]


def refuse_bad(monkeypatch, line, reason):
    """Status 2, one line that says what is wrong, no traceback, no file changed or created."""
    monkeypatch.chdir(bad_things())
    script, *argv = line.replace("prune=", "prune =").replace(" =", " ").split(" ")
    before = listing(bad_things())
    status, _, err = call(script, *argv)
    assert status == 2 and err.count("\n") == 1 and ": error: " in err, (status, err)
    assert re.search(reason, err) and "Traceback" not in err, err
    assert listing(bad_things()) == before


@pytest.mark.parametrize("line, reason", BAD[::2], ids=[line[:60] for line, _ in BAD[::2]])
def test_bad_input_is_one_line_and_changes_nothing(monkeypatch, line, reason):
    """Every second line of the table."""
    refuse_bad(monkeypatch, line, reason)


@slow
@pytest.mark.parametrize("line, reason", BAD[1::2], ids=[line[:60] for line, _ in BAD[1::2]])
def test_more_bad_input_is_one_line_and_changes_nothing(monkeypatch, line, reason):
    """The other lines."""
    refuse_bad(monkeypatch, line, reason)


def test_a_corrupt_large_image_is_named_by_a_loading_process(monkeypatch, tmp_path):
    """Decoding happens in other processes; their traceback must not become the message."""
    monkeypatch.chdir(bad_things())
    status, _, err = call("train", "--dataset", "folder", "--data-dir", "bigcorrupt", "--epochs", 1,
                          "--milestones", "--batch-size", 2, "--workers", 1, "--out", tmp_path)
    assert status == 2 and err.count("\n") == 1 and "Traceback" not in err
    assert "error: bigcorrupt/test/b/1.png: not a readable image" in err


# ---- 7: numbers ----------------------------------------------------------------------------------

def ten_losses(name):
    """The losses of ten fp32 steps on generated images: of a dense schedule or a retraining."""
    images, labels = train.shapes(80, 3)
    images = torch.nn.functional.interpolate(images.float(), size=16).to(torch.uint8)
    data = train.Data((torch.nn.functional.pad(images, (4,) * 4), labels),
                      (images[:2], labels[:2]), (images[:0], labels[:0]), 16, 10,
                      [0.5] * 3, [0.25] * 3)
    recipe = {"schedule": name, "epochs": 4, "lr": 0.01, "milestones": [2, 3], "momentum": 0.9}
    if name in schedules.DENSE and name != "one_cycle" and name != "linear":
        at = schedules.dense({**recipe, "epochs": 2, "milestones": [1]}, 5)
    else:
        at = schedules.retrain(name, 2, 5, {**recipe, "schedule": "step"}, distance=0.6,
                               removed=0.5)
    losses, real = [], train.train_step

    def train_step(*args, **named):
        done = real(*args, **named)
        losses.append(done[0].item())
        return done
    machine = train.Machine(torch.device("cpu"), False, "off", 0)
    settings = {"epochs": 2, "batch_size": 16, "weight_decay": 5e-4, "seed": 1}
    train.train_step = train_step
    try:
        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
            train.fit(models.build("resnet8", 10, 1), data, at, settings, machine,
                      os.path.join(folder, "state.pt"))
    finally:
        train.train_step = real
    return losses


GOLDEN_LOSSES = {
    "finetune": [2.566558, 2.280459, 2.345151, 2.31413, 2.464314, 2.45041,
        2.325593, 2.335677, 2.161609, 2.55492],
    "lr_rewind": [2.566558, 2.280945, 2.344103, 2.313843, 2.461072, 2.440887,
        2.324092, 2.329496, 2.160779, 2.540869],
    "weight_rewind": [2.566558, 2.280945, 2.344103, 2.313843, 2.461072, 2.440887,
        2.324092, 2.329496, 2.160779, 2.540869],
    "slr": [2.566558, 2.286553, 2.33627, 2.316523, 2.439901, 2.369971,
        2.324874, 2.291354, 2.168901, 2.42402],
    "one_cycle": [2.566558, 2.286553, 2.336493, 2.315643, 2.442331, 2.388041,
        2.320327, 2.295202, 2.173083, 2.43951],
    "linear": [2.566558, 2.280406, 2.338886, 2.317596, 2.439583, 2.38627,
        2.314306, 2.296687, 2.183192, 2.436865],
    "adaptive_linear": [2.566558, 2.280406, 2.339767, 2.31683, 2.442759, 2.394391,
        2.313901, 2.300081, 2.177863, 2.451196],
    "scratch": [2.566558, 2.286553, 2.33627, 2.316523, 2.439901, 2.369971,
        2.324041, 2.291021, 2.172785, 2.42028],
    "step": [2.566558, 2.286553, 2.33627, 2.316523, 2.439901, 2.369971,
        2.324041, 2.291021, 2.172785, 2.42028],
    "cosine": [2.566558, 2.286553, 2.33627, 2.316523, 2.439901, 2.369971,
        2.320761, 2.291126, 2.192427, 2.408462]}


def check_golden(name):
    """The numbers of ten steps do not change unnoticed; the same twice, to the last bit."""
    losses = ten_losses(name)
    assert losses == pytest.approx(GOLDEN_LOSSES[name], rel=1e-4)
    assert losses == ten_losses(name)


def test_golden_losses_of_one_cycle():
    """The schedule with most in it: learning rate and momentum change at every step."""
    check_golden("one_cycle")


@slow
@pytest.mark.parametrize("name", GOLDEN_LOSSES)
def test_golden_losses(name):
    """Every schedule, of retraining and of the dense run."""
    check_golden(name)
