"""Everything against oracles: torch's own schedulers and pruning, numpy, slow references, numbers
worked out by hand or published. No network, no data set.

    python -m pytest -q                 # quick: one process, half a minute
    python -m pytest -q -m slow         # interrupted, killed and several processes
    python -m pytest -q -s -m speed     # how fast this machine is
"""
import argparse
import ast
import contextlib
import copy
import functools
import glob
import hashlib
import io
import itertools
import json
import math
import multiprocessing
import os
import re
import shlex
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import time
import types
import warnings
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torch.nn.utils import prune as torch_prune
from torchvision.transforms import v2

import models
import prune
import retrain
import schedules
import train
from schedules import Refused

HERE = Path(train.__file__).parent
CPU = train.Machine(torch.device("cpu"))
CIFAR = {"schedule": "step", "epochs": 160, "lr": 0.1, "milestones": [80, 120], "momentum": 0.9}


# ---- fixtures ------------------------------------------------------------------------------------

@pytest.fixture(scope="session", autouse=True)
def one_kind_of_machine():
    """Switches off what makes tests slow or their results depend on the machine."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda file: None)                       # nobody pulls the plug
        patch.setenv("CUDA_VISIBLE_DEVICES", "")                # what a GPU computes is no oracle
        patch.setattr(torch.accelerator, "device_count", lambda: 0)
        patch.setenv("OMP_NUM_THREADS", "1")
        threads = torch.get_num_threads()
        torch.set_num_threads(1)                # networks this small make two threads only wait
        yield
        torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def nothing_of_another_test(monkeypatch):
    """`load_data` keeps the last data set, by a path that may be relative. No git is started."""
    train.load_data.cache_clear()
    monkeypatch.setattr(train, "git", lambda folder, *words: "")


def run(command, *more):
    """(status, stdout, stderr) of a command line as "prune run/dense.pt --plan B", in this process.
    A warning is an error. `more`: further words, for paths with spaces and the like."""
    script, *words = [*command.split(), *map(str, more)]
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), \
            warnings.catch_warnings(action="error"), pytest.raises(SystemExit) as end:
        train.command(lambda: sys.modules[script].main(words))
    return end.value.code, out.getvalue(), err.getvalue()


def ok(command, *more):
    """stdout of a command line that has nothing to complain about."""
    status, out, err = run(command, *more)
    assert (status, err) == (0, "")
    return out


def write_images(folder, seed=0, shape=(8, 8), **counts):
    """Random PNG files in `folder`/<class>/, so many of each class."""
    draw = np.random.default_rng(seed)
    for label, count in counts.items():
        (folder / label).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            pixels = torch.from_numpy(draw.integers(0, 256, (3, *shape), dtype=np.uint8))
            v2.functional.to_pil_image(pixels).save(folder / label / f"{i}.png")


# A dense run of three epochs of five steps on images of 8 pixels in two classes.
DENSE = ("train --dataset folder --data-dir data --epochs 3 --lr 0.05 --batch-size 2 "
         "--milestones 2 --out run")


@pytest.fixture(scope="session")
def study(tmp_path_factory):
    """A folder with data/ and other/ (5 + 5 training and 10 + 10 test images each), and run/: the
    DENSE run with its snapshots, and run/{filters,weights}-magnitude-0.5.pt. Read only."""
    folder = tmp_path_factory.mktemp("study")
    for seed, name in enumerate(("data/train", "data/test", "other/train", "other/test")):
        count = 5 + seed % 2 * 5
        write_images(folder / name, seed, a=count, b=count)
    with contextlib.chdir(folder):
        ok(DENSE)
        ok("prune run/dense.pt --method magnitude")
        ok("prune run/dense.pt --method magnitude --structure weights")
    return folder


@pytest.fixture
def workspace(study, tmp_path, monkeypatch):
    """A copy of `study` to work in, and the working directory."""
    folder = shutil.copytree(study, tmp_path / "workspace")
    monkeypatch.chdir(folder)
    return folder


def listing(folder):
    """What lies in a folder, with sizes and times: equal if nothing was touched."""
    found = {}
    for path in folder.rglob("*"):
        stat = path.stat()
        found[str(path)] = path.is_file() and (stat.st_mtime_ns, stat.st_size)
    return found


def results(folder):
    """{path below `folder`: content} of all checkpoints and rows, without what may differ from one
    time to another: seconds and the commit."""
    def plain(value):
        if isinstance(value, dict):
            return {k: plain(v) for k, v in value.items() if k not in ("seconds", "commit")}
        return models.digest({"": value}) if isinstance(value, torch.Tensor) else value
    found = {}
    for path in sorted(Path(folder).rglob("*")):
        name = str(path.relative_to(folder))
        if path.suffix == ".pt":
            found[name] = plain(models.read(path))
        elif path.suffix == ".json":
            found[name] = plain(json.loads(path.read_text()))
    return found


def spy(monkeypatch, module, name):
    """The arguments of each call of module.name from now on, a list; the calls go through."""
    calls, real = [], getattr(module, name)

    def noted(*args, **named):
        calls.append(args)
        return real(*args, **named)
    monkeypatch.setattr(module, name, noted)
    return calls


def at_call(monkeypatch, module, name, number, instead):
    """From now on call `number` (from 0) of module.name is `instead(real, *its arguments)`."""
    count, real = [0], getattr(module, name)

    def counted(*args, **named):
        count[0] += 1
        if count[0] - 1 == number:
            return instead(real, *args, **named)
        return real(*args, **named)
    monkeypatch.setattr(module, name, counted)


def forbid(monkeypatch, module, name):
    """From now on no call of module.name is allowed."""
    def called(*args, **named):
        raise AssertionError(f"{module.__name__}.{name} was called")
    monkeypatch.setattr(module, name, called)


def tiny_data(count=40, side=8, classes=10):
    """Random images in memory, the same for training and test."""
    draw = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (count, 3, side, side), dtype=torch.uint8, generator=draw)
    labels = torch.arange(count) % classes
    padded = F.pad(images, (4, 4, 4, 4))
    return train.Data(train.Split(padded, labels), train.Split(images, labels), side, classes,
                      [0.5, 0.4, 0.6], [0.25, 0.2, 0.3])


def pruned(checkpoint, structure="filters", sparsity=0.5, method="magnitude", data=None, **more):
    """A checkpoint dict, pruned."""
    wanted = {"structure": structure, "method": method, "sparsity": sparsity, "plan": None,
              "scope": prune.usual_scope(structure), "seed": 0, "include_linear": False,
              "calibration_images": 640}
    return prune.prune(checkpoint, wanted | more, data or tiny_data(), CPU)


# ---- schedules -----------------------------------------------------------------------------------

def lrs(name, epochs, steps=1, recipe=CIFAR, **options):
    """The learning rate of each step of a retraining."""
    at = schedules.retrain(name, epochs, steps, recipe, **options)
    return [at(step)[0] for step in range(epochs * steps)]


def drops(rates):
    """The steps at which the learning rate falls to a tenth."""
    found = []
    for step in range(1, len(rates)):
        if rates[step] < rates[step - 1] / 2:
            found.append(step)
    return found


def torchs(make, count):
    """[(lr, momentum)] of torch's scheduler `make(optimizer)` in so many steps."""
    optimizer = torch.optim.SGD([torch.zeros(1)], 0.1, momentum=0.9)
    scheduler = make(optimizer)
    group = optimizer.param_groups[0]
    values = []
    for _ in range(count):
        values.append((group["lr"], group["momentum"]))
        optimizer.step()
        scheduler.step()
    return values


@pytest.mark.parametrize("kind, make", [
    ("step", lambda optimizer: torch.optim.lr_scheduler.MultiStepLR(optimizer, [80, 120])),
    ("cosine", lambda optimizer: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 160)),
], ids=["step", "cosine"])
def test_dense_schedule_is_torchs_at_every_step_of_an_epoch(kind, make):
    at = schedules.dense(CIFAR | {"schedule": kind}, 3)
    for epoch, wanted in enumerate(torchs(make, 160)):
        for step in range(3 * epoch, 3 * epoch + 3):
            assert at(step) == pytest.approx(wanted, rel=1e-9)


@pytest.mark.parametrize("count", [2, 3, 9, 11, 37, 300])
def test_one_cycle_is_torchs(count):
    wanted = torchs(lambda optimizer: torch.optim.lr_scheduler.OneCycleLR(
        optimizer, 0.1, count, pct_start=0.1, div_factor=100, final_div_factor=100), count)
    as_dense = schedules.dense({"schedule": "one_cycle", "epochs": count, "lr": 0.1}, 1)
    restarted = schedules.retrain("one_cycle", count, 1, CIFAR)
    for step in range(count):
        assert as_dense(step) == restarted(step) == pytest.approx(wanted[step], rel=1e-9)


def test_one_cycle_of_ten_steps_begins_at_its_peak():
    """Where torch's OneCycleLR divides by zero."""
    assert schedules.retrain("one_cycle", 10, 1, CIFAR)(0) == pytest.approx((0.1, 0.85))


def test_dense_momentum_is_09_if_the_recipe_says_nothing():
    assert schedules.dense({"schedule": "constant", "lr": 0.3}, 5)(0) == (0.3, 0.9)


def test_dense_constant_schedule_is_constant():
    at = schedules.dense({"schedule": "constant", "lr": 0.3, "momentum": 0.8}, 5)
    assert [at(0), at(7), at(999)] == [(0.3, 0.8)] * 3


# Learning rates at the start of some epochs; t = 72, T = 160, 782 steps an epoch.
GOLDEN_EPOCHS = (0, 1, 3, 7, 8, 20, 32, 36, 40, 54, 60, 71)
GOLDEN = {
    "lr_rewind": (.01, .01, .01, .01, .01, .01, .001, .001, .001, .001, .001, .001),
    "slr": (.001, .005902041, .039485214, .1, .1, .1, .1, .1, .01, .01, .001, .001),
    "one_cycle": (.001, .0056393861, .037699576, .099813971, .099962281, .090676733, .068009194,
                  .058683488, .049032431, .017866459, .0082330837, 6.8593579e-5),
    "linear": (0, .0046852657, .037063539, .099810679, .098764652, .08024628, .061727908,
               .055555117, .049382326, .027777559, .018518372, .0015431977)}


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_values_of_the_papers_72_epochs(name):
    at = schedules.retrain(name, 72, 782, CIFAR)
    found = [at(782 * epoch)[0] for epoch in GOLDEN_EPOCHS]
    assert found == pytest.approx(GOLDEN[name], rel=1e-7)


@pytest.mark.parametrize("step, lr, momentum", [
    (0, .001, .95), (1, .003985215271, .94698463), (5, .05909558479, .89131759), (9, .1, .85),
    (10, .0999695444, .85003046), (50, .05696295918, .89304134), (98, 4.045560318e-5, .94996954),
    (99, 1e-5, .95)])
def test_golden_values_of_one_cycle_of_100_steps(step, lr, momentum):
    at = schedules.retrain("one_cycle", 10, 10, CIFAR)
    assert at(step) == pytest.approx((lr, momentum), rel=1e-8)


@pytest.mark.parametrize("kind", schedules.DENSE)
def test_lr_rewind_is_the_dense_tail_for_every_budget(kind):
    recipe = CIFAR | {"schedule": kind}
    original = schedules.dense(recipe, 3)
    whole = [original(step) for step in range(480)]
    for budget in range(1, 161):
        at = schedules.retrain("lr_rewind", budget, 3, recipe)
        tail = whole[-3 * budget:]
        assert [at(step) for step in range(3 * budget)] == tail


def test_lr_rewind_beyond_the_dense_run_starts_with_its_first_epoch():
    assert drops(lrs("lr_rewind", 88)) == [8, 48]
    assert lrs("lr_rewind", 200, recipe=CIFAR | {"schedule": "cosine"})[:41] == [0.1] * 41


def test_weight_rewind_has_the_learning_rates_of_lr_rewind():
    assert lrs("weight_rewind", 88, 3) == lrs("lr_rewind", 88, 3)


def test_finetuning_is_lr_rewind_at_the_papers_40_epochs():
    assert lrs("finetune", 40) == lrs("lr_rewind", 40)


@pytest.mark.parametrize("kind, last", [
    ("step", 0.001), ("cosine", 0.05 * (1 - math.cos(math.pi / 160))), ("constant", 0.1)])
def test_finetuning_stays_at_the_dense_runs_last_rate(kind, last):
    assert lrs("finetune", 3, 2, CIFAR | {"schedule": kind}) == pytest.approx([last] * 6)


@pytest.mark.parametrize("name, budget, epochs", [
    ("scratch", 88, [44, 66]), ("scratch_e", 216, [108, 162]), ("scratch_b", 40, [20, 30])])
def test_scratch_drops_at_half_then_three_quarters(name, budget, epochs):
    assert drops(lrs(name, budget)) == epochs


def test_scratch_is_the_dense_curve_stretched_to_every_budget():
    for budget in range(1, 241):
        for epoch, rate in enumerate(lrs("scratch", budget)):
            passed = sum(160 * epoch >= milestone * budget for milestone in (80, 120))
            assert rate == pytest.approx(0.1 ** (1 + passed))


@pytest.mark.parametrize("kind", ["linear", "one_cycle"])
def test_scratch_of_a_run_without_milestones_is_its_curve_over_the_budget(kind):
    found = lrs("scratch", 80, 3, CIFAR | {"schedule": kind})
    assert found == pytest.approx(lrs(kind, 80, 3), rel=1e-12)


def test_scratch_of_a_cosine_run_is_a_cosine_over_the_budget():
    rates = lrs("scratch", 80, 3, CIFAR | {"schedule": "cosine"})
    for step, rate in enumerate(rates):
        assert rate == pytest.approx(0.05 * (1 + math.cos(math.pi * (step // 3) / 80)))


@pytest.mark.parametrize("budget", [10, 40, 45, 56, 72, 88, 104, 120, 136, 152])
@pytest.mark.parametrize("recipe, thousandths", [
    pytest.param(CIFAR, (450, 675), id="CIFAR"),
    pytest.param(CIFAR | {"epochs": 90, "milestones": [30, 60]}, (297, 594), id="ImageNet")])
def test_slr_drops_where_the_authors_drop(recipe, thousandths, budget):
    warmup = budget // 10
    rates = lrs("slr", budget, recipe=recipe)
    wanted = [warmup + budget * share // 1000 for share in thousandths]
    assert drops(rates) == wanted


@pytest.mark.parametrize("budget", [1, 2, 9, 10, 40])
@pytest.mark.parametrize("kind", schedules.DENSE)
def test_slr_warms_up_to_the_largest_rate(kind, budget):
    rates = lrs("slr", budget, recipe=CIFAR | {"schedule": kind})
    assert rates[budget // 10] == 0.1


def test_slr_of_a_cosine_run_is_it_squeezed_behind_the_warm_up():
    rates = lrs("slr", 40, 3, CIFAR | {"schedule": "cosine"})
    for epoch in range(5, 40):
        position = (epoch - 4) * 160 // 36
        wanted = 0.05 * (1 + math.cos(math.pi * position / 160))
        assert rates[3 * epoch:3 * epoch + 3] == pytest.approx([wanted] * 3)


def test_slr_never_falls_below_the_dense_runs_last_rate():
    recipe = CIFAR | {"schedule": "cosine"}
    assert lrs("slr", 19, recipe=recipe)[-1:] == lrs("finetune", 1, recipe=recipe)


@pytest.mark.parametrize("budget, distance, removed, peak", [
    pytest.param(16, 0.3, 0.36, 0.05, id="distance over root of removed"),
    pytest.param(16, 0.05, 0.5, 0.01, id="at least t over T"),
    pytest.param(16, 0.9, 0.25, 0.1, id="at most LR_max"),
    pytest.param(16, 1.0, 0.0, 0.01, id="nothing removed"),
    pytest.param(200, 0.1, 0.5, 0.1, id="t above T")])
def test_peak_of_adaptive_linear(budget, distance, removed, peak):
    rates = lrs("adaptive_linear", budget, 50, distance=distance, removed=removed)
    assert rates == pytest.approx(lrs("linear", budget, 50, {}, lr=peak))
    assert max(rates) == pytest.approx(peak)


def test_adaptive_linear_is_linear_of_a_network_of_which_nothing_is_known():
    assert lrs("adaptive_linear", 16, 50) == lrs("linear", 16, 50)


@pytest.mark.parametrize("name, options, wanted", [
    ("one_cycle", {"lr": 0.2}, {0: 0.002, 9: 0.2, 99: 2e-5}),
    ("one_cycle", {"end_lr": 0.01}, {0: 0.001, 9: 0.1, 99: 0.01}),
    ("one_cycle", {"end_lr": 0.0}, {9: 0.1, 99: 0.0}),
    ("linear", {"lr": 0.2, "end_lr": 0.02}, {0: 0, 10: 0.2, 55: 0.11, 99: 0.022}),
    ("adaptive_linear", {"lr": 0.2, "end_lr": 0.02}, {0: 0, 10: 0.2, 55: 0.11}),
    ("slr", {"lr": 0.2}, {0: 0.001, 10: 0.2, 49: 0.2, 50: 0.02, 70: 0.002}),
    ("finetune", {"end_lr": 0.0}, {0: 0.0, 99: 0.0}),
    ("finetune", {"end_lr": 0.02}, {0: 0.02, 99: 0.02})])
def test_lr_or_end_lr_replaces_the_dense_runs(name, options, wanted):
    rates = lrs(name, 10, 10, **options)
    found = {step: rates[step] for step in wanted}
    assert found == pytest.approx(wanted)


@pytest.mark.parametrize("option, value", [
    ("lr", 0.05), ("end_lr", 0.02), ("cycle_momentum", False)])
@pytest.mark.parametrize("name", schedules.SCHEDULES)
def test_a_schedule_uses_exactly_the_options_that_it_names(name, option, value):
    plain = schedules.retrain(name, 20, 5, CIFAR)
    other = schedules.retrain(name, 20, 5, CIFAR, **{option: value})
    changed = any(plain(step) != other(step) for step in range(100))
    _, options = schedules.SCHEDULES[name]
    assert changed == (option in options)


@pytest.mark.parametrize("name", schedules.SCHEDULES)
def test_momentum_is_the_dense_runs_but_for_one_cycles(name):
    recipe = CIFAR | {"momentum": 0.8}
    wanted = 0.95 if name == "one_cycle" else 0.8
    assert schedules.retrain(name, 20, 5, recipe)(0)[1] == wanted
    assert schedules.retrain(name, 20, 5, recipe, cycle_momentum=False)(9)[1] == 0.8


@pytest.mark.parametrize("name, options, wanted", [
    ("one_cycle", {"lr": 0.1}, (1e-5, 0.95)),
    ("linear", {"lr": 0.1}, (0.1 / 90, 0.9)),
    ("finetune", {"end_lr": 0.01}, (0.01, 0.9))])
def test_needs_no_recipe(name, options, wanted):
    assert schedules.retrain(name, 10, 10, **options)(99) == pytest.approx(wanted)


@pytest.mark.parametrize("kind", schedules.DENSE)
@pytest.mark.parametrize("name", schedules.SCHEDULES)
def test_every_budget_gives_rates_from_0_to_the_largest(name, kind):
    long = CIFAR | {"schedule": kind}
    short = long | {"epochs": 1, "milestones": []}
    for epochs, steps in ((1, 1), (1, 2), (1, 9), (1, 10), (1, 11), (2, 5), (3, 3), (9, 1), (10, 1),
                          (19, 2), (160, 1), (200, 1)):
        for recipe in (long, short):
            rates = lrs(name, epochs, steps, recipe, distance=0.3, removed=0.5)
            assert min(rates) >= 0
            assert max(rates) <= 0.1 + 1e-12


@pytest.mark.parametrize("stretch", [1.0, 0.3])
@pytest.mark.parametrize("kind", schedules.DENSE)
def test_a_dense_schedule_keeps_its_last_value(kind, stretch):
    at = schedules.dense({"schedule": kind, "epochs": 10, "lr": 0.1, "milestones": [5]}, 4, stretch)
    last = round(10 * stretch) * 4 - 1
    assert at(last + 1) == at(last + 999) == at(last)


@pytest.mark.parametrize("kind", schedules.DENSE)
@pytest.mark.parametrize("name", schedules.SCHEDULES)
def test_a_retraining_schedule_keeps_its_last_value(name, kind):
    at = schedules.retrain(name, 20, 4, CIFAR | {"schedule": kind})
    assert at(80) == at(999) == at(79)


@pytest.mark.parametrize("epochs, steps, words", [
    (0, 5, "^epochs must be at least 1, not 0$"), (-1, 5, "^epochs .*not -1$"),
    (math.nan, 5, "^epochs must be at least 1, not nan$"),
    (5, 0, "^steps_per_epoch must be at least 1, not 0$")])
@pytest.mark.parametrize("name", schedules.SCHEDULES)
def test_retraining_for_less_than_an_epoch_or_step_is_refused(name, epochs, steps, words):
    with pytest.raises(Refused, match=words):
        schedules.retrain(name, epochs, steps, CIFAR)


@pytest.mark.parametrize("epochs, steps", [(0, 5), (160, 0)])
@pytest.mark.parametrize("kind", ["step", "cosine", "linear", "one_cycle"])
def test_a_dense_run_of_less_than_an_epoch_or_step_is_refused(kind, epochs, steps):
    with pytest.raises(Refused, match="must be at least 1, not 0$"):
        schedules.dense(CIFAR | {"schedule": kind, "epochs": epochs}, steps)


@pytest.mark.parametrize("name", [
    "finetune", "weight_rewind", "lr_rewind", "slr", "adaptive_linear", "scratch"])
def test_a_recipe_without_an_epoch_is_refused(name):
    with pytest.raises(Refused, match="must be at least 1, not 0$"):
        schedules.retrain(name, 5, 5, CIFAR | {"epochs": 0})


def test_an_unknown_retraining_schedule_is_refused_with_the_known_ones():
    with pytest.raises(Refused, match="unknown schedule 'clr'.* finetune, .* one_cycle, "):
        schedules.retrain("clr", 5, 5, CIFAR)


def test_an_unknown_dense_schedule_is_refused_with_the_known_ones():
    with pytest.raises(Refused, match="unknown dense schedule 'poly'.* step, cosine, "):
        schedules.dense(CIFAR | {"schedule": "poly"}, 5)


@pytest.mark.parametrize("name, lacking", [
    ("finetune", "lr"), ("finetune", "epochs"), ("finetune", "milestones"),
    ("lr_rewind", "epochs"), ("lr_rewind", "milestones"), ("slr", "epochs"), ("slr", "milestones"),
    ("one_cycle", "lr"), ("linear", "lr"), ("adaptive_linear", "lr"), ("adaptive_linear", "epochs"),
    ("scratch", "epochs")])
def test_a_recipe_that_lacks_what_the_schedule_needs_is_refused(name, lacking):
    recipe = dict(CIFAR)
    del recipe[lacking]
    with pytest.raises(Refused, match=f"needs '{lacking}' of the dense run"):
        schedules.retrain(name, 5, 5, recipe)


SHOWN = ("finetune", "weight_rewind", "lr_rewind", "slr", "one_cycle", "linear", "adaptive_linear",
         "scratch")


def test_the_command_prints_the_golden_values_as_a_table():
    head, *rows = ok("schedules").splitlines()[:73]
    assert head.split() == ["epoch", *SHOWN]
    assert [int(row.split()[0]) for row in rows] == list(range(72))
    for name, values in GOLDEN.items():
        column = 1 + SHOWN.index(name)
        printed = [float(rows[epoch].split()[column]) for epoch in GOLDEN_EPOCHS]
        assert printed == pytest.approx(values, rel=1e-5)


def test_the_command_draws_all_curves_on_one_scale():
    drawn = {}
    for line in ok("schedules").splitlines()[-8:]:
        name, blocks, largest, last = line.split()
        drawn[name] = blocks, float(largest), float(last)
    assert drawn["finetune"] == ("▁" * 60, 0.001, 0.001)
    # .01 for 32 of 72 epochs, so in the first 27 of 60 columns; of 0.1 it is the second block.
    assert drawn["lr_rewind"] == ("▂" * 27 + "▁" * 33, 0.01, 0.001)
    assert drawn["scratch"] == ("█" * 30 + "▂" * 15 + "▁" * 15, 0.1, 0.001)


def test_the_command_takes_another_dense_run():
    out = ok("schedules --epochs 4 --lr 2 --dense-epochs 8 --milestones 4 --steps-per-epoch 3")
    rows = [line.split() for line in out.splitlines()[1:5]]
    rewound, fresh = SHOWN.index("lr_rewind") + 1, SHOWN.index("scratch") + 1
    assert [row[rewound] for row in rows] == ["0.2", "0.2", "0.2", "0.2"]
    assert [row[fresh] for row in rows] == ["2", "2", "0.2", "0.2"]
    assert "\nfinetune" in ok("schedules --schedule cosine --milestones")


@pytest.mark.parametrize("values, text", [
    ([1, 1.3, 1.7, 2], "▁▁▃▃▆▆██"), ([2, 2], "████████"), ([1, 2, 1, 1, 1, 1, 1, 1], "▁█▁▁▁▁▁▁")])
def test_blocks_show_where_values_lie_between_the_lowest_and_the_highest(values, text):
    assert schedules.blocks(values, 1, 2, width=8) == text


def test_blocks_of_equal_values_are_the_lowest():
    assert schedules.blocks([3, 3], 3, 3, width=4) == "▁▁▁▁"


def test_blocks_are_escaped_for_a_pipe_that_lacks_them():
    pipe = io.TextIOWrapper(io.BytesIO(), "cp1252")
    with contextlib.redirect_stdout(pipe):
        schedules.main([])
    pipe.flush()
    assert rb"\u2588" in pipe.buffer.getvalue()


SVG = "{http://www.w3.org/2000/svg}"


def svg_curves(text):
    """{name: points} of the lines in an SVG file; the name has the colour of its line."""
    root = ElementTree.fromstring(text)
    points, curves = {}, {}
    for line in root.iter(SVG + "polyline"):
        numbers = line.get("points").replace(",", " ").split()
        points[line.get("stroke")] = np.reshape(numbers, (-1, 2)).astype(float)
    for word in root.iter(SVG + "text"):
        if word.get("fill"):
            curves[word.text] = points[word.get("fill")]
    return curves


def size(text):
    """(width, height) of an SVG file."""
    return [float(number) for number in ElementTree.fromstring(text).get("viewBox").split()[2:]]


def test_the_chart_has_a_curve_for_each_schedule(tmp_path):
    path = tmp_path / "curves.svg"
    ok("schedules --epochs 12 --steps-per-epoch 5 --chart", path)
    curves = svg_curves(path.read_text())
    assert set(curves) == set(SHOWN)
    left, top = curves["scratch"][0]                            # begins at 0.1, the highest rate
    right, _ = curves["scratch"][-1]
    _, bottom = curves["linear"][0]                             # begins at 0, the lowest
    width, height = size(path.read_text())
    assert 0 < left < right < width
    assert 0 < top < bottom < height                            # counted downwards
    for name, points in curves.items():
        rates = np.array(lrs(name, 12, 5)[::5])
        wanted = np.stack([np.linspace(left, right, 12), bottom + (top - bottom) * rates / 0.1], 1)
        np.testing.assert_allclose(points, wanted, atol=0.15, err_msg=name)


PANELS = {"one": {"slr": [1, 3]}, "two": {"linear": [2, 1], "one_cycle": [3, 3]}}


def test_panels_of_a_chart_lie_side_by_side_on_one_scale():
    text = schedules.chart(PANELS, "cm")
    curves = svg_curves(text)
    (_, low), (right, high) = curves["slr"]
    falling, flat = curves["linear"], curves["one_cycle"]
    assert right < falling[0][0] < falling[1][0] < size(text)[0]
    assert falling[:, 1].tolist() == [(low + high) / 2, low]
    assert flat[:, 1].tolist() == [high, high]


def test_a_chart_names_its_panels_beside_its_scale():
    root = ElementTree.fromstring(schedules.chart(PANELS, "cm"))
    words = [word.text for word in root.iter(SVG + "text")]
    for word in ("one", "two", "slr", "linear", "1", "2", "3", "epoch 1 to 2; cm"):
        assert word in words


def test_a_chart_of_one_value_is_drawn():
    curves = svg_curves(schedules.chart({"panel": {"flat": [3.0]}}, "%"))
    assert len(curves["flat"]) == 1
    assert np.isfinite(curves["flat"]).all()


@pytest.mark.parametrize("end", [0, 1, 2])
def test_names_in_a_chart_stand_apart_in_the_order_of_the_curves_ends(end):
    panel = {"other": [0, 3]}
    for i in range(1, 9):
        panel[f"curve {i}"] = [1, end + i / 100]
    text = schedules.chart({"panel": panel}, "%")
    words = [word for word in ElementTree.fromstring(text).iter(SVG + "text") if word.get("fill")]
    words.sort(key=lambda word: float(word.get("y")))
    heights = [float(word.get("y")) for word in words]
    by_end = sorted(panel, key=lambda name: panel[name][-1], reverse=True)
    assert [word.text for word in words] == by_end
    assert np.diff(heights).min() >= 13                         # the size of the font
    assert 0 < heights[0] < heights[-1] < size(text)[1]


def test_schedules_need_nothing_but_python():
    imported = set()
    for node in ast.walk(ast.parse((HERE / "schedules.py").read_text())):
        if isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add(node.module)
    assert imported
    assert imported <= sys.stdlib_module_names


# ---- networks ------------------------------------------------------------------------------------

def on_meta(arch, classes=10):
    """A network without memory for its weights."""
    with torch.device("meta"):
        return models.build(arch, classes, seed=None)


@functools.cache
def counted(arch, plan=None):
    """(parameters, MACs) of a network, as it is or pruned by one of the paper's plans."""
    side, classes = (224, 1000) if arch in models.TORCHVISION else (32, 10)
    network = on_meta(arch, classes)
    if plan:
        network = prune.shrunk(network, method="random", plan=prune.PLANS[arch][plan])
    return models.count(network, side)


@pytest.mark.parametrize("arch, parameters, macs", [
    ("resnet20", 269_722, 40_551_040), ("resnet32", 464_154, 68_862_592),
    ("resnet56", 853_018, 125_485_696), ("resnet110", 1_727_962, 252_887_680),
    ("vgg16", 14_987_722, 313_463_808)])
def test_counts_of_a_network(arch, parameters, macs):
    assert counted(arch) == (parameters, macs)


@pytest.mark.parametrize("arch, plan, parameters, macs", [
    ("resnet56", "B", 735_712, 90_907_264), ("resnet110", "B", 1_168_424, 155_124_352),
    ("vgg16", "A", 5_397_034, 206_279_680)])
def test_counts_of_a_pruned_network(arch, plan, parameters, macs):
    assert counted(arch, plan) == (parameters, macs)


@pytest.mark.parametrize("arch", models.TORCHVISION)
def test_counts_are_those_that_torchvision_states(arch):
    stated = torchvision.models.get_model_weights(arch).IMAGENET1K_V1.meta
    parameters, macs = counted(arch)
    assert parameters == stated["num_params"]
    assert round(macs / 1e9, 3) == stated["_ops"]


@pytest.mark.parametrize("arch, plan, parameters, macs", [
    ("resnet56", "A", 9.4, 10.4), ("resnet56", "B", 13.7, 27.6), ("resnet110", "A", 2.3, 15.9),
    ("resnet110", "B", 32.4, 38.6), ("resnet34", "A", 7.6, 15.5), ("resnet34", "B", 10.8, 24.2),
    ("vgg16", "A", 64.0, 34.2)])
def test_a_plan_saves_the_percentages_that_li_published(arch, plan, parameters, macs):
    saved = 100 - 100 * np.divide(counted(arch, plan), counted(arch))
    assert saved == pytest.approx([parameters, macs], abs=0.15)


def test_conv_weights_are_hes():
    """Normal with std sqrt(2 / (k*k*out)): one in 22 is more than two std away from 0."""
    for name, value in models.build("resnet20", 10).named_parameters():
        if value.dim() == 4 and value.numel() > 4000:
            normal = value.detach() / math.sqrt(2 / (9 * len(value)))
            far = (normal.abs() > 2).double().mean()
            assert normal.std() == pytest.approx(1, rel=0.05), name
            assert normal.mean() == pytest.approx(0, abs=0.1), name
            assert far == pytest.approx(0.0455, abs=0.01), name


def test_other_weights_are_torchs():
    network = models.build("vgg16", 10)
    weight = network[45].weight.detach() * math.sqrt(512)        # uniform from -1 to 1
    assert weight.abs().max() <= 1
    assert weight.std() == pytest.approx(math.sqrt(1 / 3), rel=0.01)
    assert network[46].weight.unique().tolist() == [1]
    assert network[46].bias.unique().tolist() == [0]


def test_fresh_weights_are_a_function_of_the_seed():
    digests = [models.digest(models.build("resnet8", 10, seed).state_dict()) for seed in (3, 3, 4)]
    assert digests[0] == digests[1]
    assert digests[0] != digests[2]


def test_initialising_again_is_building_anew():
    network = models.build("resnet8", 10, 1)
    network.bn1.running_mean += 1
    network.bn1.weight.data += 1
    again = models.initialise(network, 2).state_dict()
    assert models.digest(again) == models.digest(models.build("resnet8", 10, 2).state_dict())


def only_the_shortcut():
    """A block from 16 to 32 channels whose convs contribute nothing."""
    block = models.BasicBlock(16, 32)
    nn.init.zeros_(block.bn2.weight)
    return block


def test_the_shortcut_takes_every_second_pixel():
    x = torch.rand(2, 16, 8, 8)
    y = only_the_shortcut()(x)
    assert torch.equal(y[:, :16], x[:, :, ::2, ::2])
    assert not y[:, 16:].any()


def test_the_shortcut_passes_the_gradient():
    x = torch.rand(2, 16, 8, 8, requires_grad=True)
    only_the_shortcut()(x).sum().backward()
    assert torch.equal(x.grad[:, :, ::2, ::2], torch.ones(2, 16, 4, 4))
    assert x.grad.sum() == 2 * 16 * 4 * 4


@pytest.mark.parametrize("arch", ["resnet9", "resnet2", "resnet08", "resnet1208", "vgg11", "mlp"])
def test_an_unknown_network_is_refused_with_the_known_ones(arch):
    with pytest.raises(Refused, match=f"unknown network '{arch}'; known: .*resnet56.*vgg16"):
        models.build(arch, 10)


@pytest.mark.parametrize("arch, numbers, stages", [
    ("resnet20", range(2, 20, 2), "111222333"),
    ("resnet34", range(2, 34, 2), "1112222333333444"),
    ("resnet50", [n for n in range(2, 50) if n % 3 != 1], "11111122222222333333333333444444"),
    ("vgg16", range(1, 14), "1122333444555")], ids=["resnet20", "resnet34", "resnet50", "vgg16"])
def test_prunable_convs_have_the_papers_numbers(arch, numbers, stages):
    units = models.prunable(on_meta(arch))
    assert [unit.number for unit in units] == list(numbers)
    assert "".join(str(unit.stage) for unit in units) == stages


@pytest.mark.parametrize("arch, first, last", [
    ("resnet20", ("layer1.0.conv1", "layer1.0.bn1", "layer1.0.conv2"),
     ("layer3.2.conv1", "layer3.2.bn1", "layer3.2.conv2")),
    ("resnet50", ("layer1.0.conv1", "layer1.0.bn1", "layer1.0.conv2"),
     ("layer4.2.conv2", "layer4.2.bn2", "layer4.2.conv3")),
    ("vgg16", ("0", "1", "3"), ("40", "41", "45"))], ids=["resnet20", "resnet50", "vgg16"])
def test_a_prunable_conv_names_its_norm_beside_its_reader(arch, first, last):
    units = models.prunable(on_meta(arch))
    assert units[0][:3] == first
    assert units[-1][:3] == last


# How many filters the convs of each stage keep, and the ids of those that keep all.
@pytest.mark.parametrize("arch, plan, widths, skipped", [
    ("resnet56", "A", "14 28 57", "16 20 38 54"), ("resnet56", "B", "6 22 57", "16 18 20 34 38 54"),
    ("resnet56", "C", "6 16 38", "16 18 20 34 38 54"),
    ("resnet56", "D", "6 12 25", "16 18 20 34 38 54"), ("resnet56", "I", "14 27 51", ""),
    ("resnet110", "A", "8 32 64", "36"), ("resnet110", "B", "8 19 44", "36 38 74"),
    ("resnet110", "C", "8 16 32", "36 38 74"), ("resnet110", "D", "8 12 19", "36 38 74"),
    ("resnet34", "A", "44 89 179 512", "2 8 14 16 26 28 30 32"),
    ("resnet34", "B", "32 51 153 512", "2 8 14 16 26 28 30 32")])
def test_a_plan_keeps_the_papers_widths(arch, plan, widths, skipped):
    network = on_meta(arch)
    kept = prune.filters_to_keep(network, **prune.PLANS[arch][plan])
    for unit in models.prunable(network):
        wanted = int(widths.split()[unit.stage - 1])
        if str(unit.number) in skipped.split():
            wanted = network.get_submodule(unit.conv).out_channels
        assert kept[unit.conv] == wanted, unit.number


@pytest.mark.parametrize("plan, widths", [
    ("A", "32 64 128 128 256 256 256 256 256 256 256 256 256"),
    ("B", "32 64 128 128 196 196 196 196 196 256 256 256 256"),
    ("C", "32 64 64 128 128 128 128 196 196 196 196 196 196")])
def test_a_plan_of_vgg16_is_a_list_of_widths(plan, widths):
    kept = prune.filters_to_keep(on_meta("vgg16"), **prune.PLANS["vgg16"][plan])
    assert list(kept.values()) == [int(width) for width in widths.split()]


def data_parallel():
    return nn.DataParallel(torchvision.models.resnet18())


def one_of_ones_own():
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3))


def with_group_norm():
    return torchvision.models.resnet18(norm_layer=lambda width: nn.GroupNorm(8, width))


def with_another_stage():
    network = torchvision.models.resnet18()
    network.layer4 = nn.Sequential(network.layer4, nn.Conv2d(512, 512, 1))
    return network


class Gated(torchvision.models.resnet.BasicBlock):
    """Reads its first conv's filters at two places."""
    def forward(self, x):
        return super().forward(x) * self.bn1(self.conv1(x)).mean()


def with_another_block():
    return torchvision.models.ResNet(Gated, [2, 2, 2, 2])


def with_a_bias():
    network = torchvision.models.resnet18()
    network.layer2[1].conv1 = nn.Conv2d(128, 128, 3, padding=1)
    return network


def refuses_to_shrink(network):
    with pytest.raises(Refused, match="^[^\n]*cannot be removed[^\n]*Torch-Pruning$"):
        prune.shrunk(network)


@pytest.mark.parametrize("make", [
    torchvision.models.mobilenet_v2, torchvision.models.vgg11_bn, torchvision.models.densenet121,
    torchvision.models.resnext50_32x4d, data_parallel, one_of_ones_own, with_group_norm,
    with_another_stage, with_another_block, with_a_bias])
def test_a_network_whose_filters_have_unknown_readers_is_refused(make):
    with torch.device("meta"):
        network = make()
    refuses_to_shrink(network)


def test_a_network_whose_last_stage_was_cut_off_can_be_pruned():
    network = torchvision.models.resnet18()
    network.layer4 = nn.Identity()
    network.fc = nn.Linear(256, 10)
    found = prune.shrunk(network)(torch.zeros(1, 3, 64, 64))
    assert found.shape == (1, 10)


@pytest.mark.parametrize("layer", ["layer1.0.conv1", "layer1.0.conv2", "conv1", "fc"])
def test_a_network_masked_by_torch_is_refused(layer):
    network = torchvision.models.resnet18()
    torch_prune.l1_unstructured(network.get_submodule(layer), "weight", 0.3)
    refuses_to_shrink(network)


@pytest.mark.parametrize("layer, tensor", [("bn1", "weight"), ("bn1", "bias"), ("fc", "bias")])
def test_a_network_with_other_masked_tensors_is_refused(layer, tensor):
    network = torchvision.models.resnet18(num_classes=2)
    torch_prune.l1_unstructured(network.get_submodule(layer), tensor, amount=0.3)
    with pytest.raises(Refused, match="cannot be removed here"):
        prune.shrunk(network)


def test_an_unknown_scope_is_refused():
    with pytest.raises(Refused, match="unknown scope 'all'; known: layer, global"):
        prune.shrunk(models.build("resnet8", 10), scope="all")


@pytest.mark.parametrize("count", [1, 4])
def test_another_number_of_widths_is_refused(count):
    network = models.build("resnet8", 10)
    with pytest.raises(Refused, match=f"{count} widths for 3 convs that can be pruned"):
        prune.shrunk(network, plan={"widths": count * (4,)})


@pytest.mark.parametrize("layer", ["layer1.0.conv1", "layer1.0.conv2", "conv1", "fc"])
def test_a_parametrized_network_is_refused(layer):
    network = torchvision.models.resnet18()
    nn.utils.parametrizations.weight_norm(network.get_submodule(layer))
    refuses_to_shrink(network)


def bare(state):
    return state


def under_state_dict(state):
    return {"state_dict": state, "epoch": 3}


def under_model(state):
    return {"model": state, "args": ["x"]}


def of_data_parallel(state):
    return {f"module.{name}": value for name, value in state.items()}


def of_data_parallel_under_model(state):
    return {"model": of_data_parallel(state)}


@pytest.mark.parametrize("wrap", [
    bare, under_state_dict, under_model, of_data_parallel, of_data_parallel_under_model])
def test_a_state_dict_that_other_code_saved_is_read(tmp_path, wrap):
    state = models.build("resnet8", 10, seed=5).state_dict()
    state["bn1.running_mean"] += 1
    torch.save(wrap(state), tmp_path / "weights.pt")
    network = models.build("resnet8", 10, pretrained=tmp_path / "weights.pt")
    assert models.digest(network.state_dict()) == models.digest(state)


def test_a_state_dict_may_lack_batch_counts(tmp_path):
    network = models.build("resnet8", 10, seed=5)
    state = network.state_dict()
    for name in list(state):
        if name.endswith("num_batches_tracked"):
            del state[name]
    torch.save(state, tmp_path / "weights.pt")
    found = models.build("resnet8", 10, pretrained=tmp_path / "weights.pt")
    assert models.digest(found.state_dict()) == models.digest(network.state_dict())


def renamed(state):
    state["stem.weight"] = state.pop("conv1.weight")
    return state


def reshaped(state):
    state["fc.weight"] = state["fc.weight"][:, :8]
    return state


def emptied(state):
    return {"conv1.weight": "none"}


@pytest.mark.parametrize("spoil, words", [
    (renamed, 'Missing .*: "conv1.weight". Unexpected .*: "stem.weight".$'),
    (reshaped, r"fc.weight: .* torch.Size.\[10, 8\]. .* model is torch.Size.\[10, 64\]."),
    (emptied, r"^[^\n]{,700} \[\.\.\.\]$")], ids=["names", "shapes", "only the first few"])
def test_a_state_dict_of_another_network_is_refused(tmp_path, spoil, words):
    state = dict(models.build("resnet8", 10).state_dict())
    torch.save(spoil(state), tmp_path / "weights.pt")
    with pytest.raises(Refused, match=words):
        models.build("resnet8", 10, pretrained=tmp_path / "weights.pt")


@pytest.mark.parametrize("content", [[1, 2], torch.zeros(3), None], ids=["list", "tensor", "None"])
def test_weights_that_are_no_state_dict_are_refused(tmp_path, content):
    torch.save(content, tmp_path / "weights.pt")
    with pytest.raises(Refused, match=f"holds a {type(content).__name__}, not a state dict"):
        models.build("resnet8", 10, pretrained=tmp_path / "weights.pt")


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"text", None],
                         ids=["empty", "cut off", "text", "no file"])
def test_weights_that_torch_cannot_read_are_refused(tmp_path, content):
    if content is not None:
        (tmp_path / "weights.pt").write_bytes(content)
    with pytest.raises(Refused, match="weights.pt: not a file of weights that torch.load reads"):
        models.build("resnet8", 10, pretrained=tmp_path / "weights.pt")


class Hostile:
    """What is unpickled makes a folder."""
    def __init__(self, folder):
        self.folder = str(folder)

    def __reduce__(self):
        return os.mkdir, (self.folder,)


@pytest.mark.parametrize("zipped", [True, False])
def test_hostile_weights_are_refused_unread(tmp_path, zipped):
    torch.save({"conv1.weight": Hostile(tmp_path / "it-ran")}, tmp_path / "weights.pt",
               _use_new_zipfile_serialization=zipped)
    with pytest.raises(Refused, match="with weights_only"):
        models.build("resnet8", 10, pretrained=tmp_path / "weights.pt")
    assert not (tmp_path / "it-ran").exists()


@pytest.mark.parametrize("arch", models.TORCHVISION)
def test_torchvisions_weights_are_v1(monkeypatch, arch):
    monkeypatch.setattr(torchvision.models, "get_model", lambda name, weights: (name, weights))
    assert models.build(arch, 1000, pretrained="torchvision") == (arch, "IMAGENET1K_V1")


def test_torchvisions_weights_get_a_fresh_last_layer_for_other_classes(monkeypatch):
    trained = torchvision.models.resnet18()
    monkeypatch.setattr(torchvision.models, "get_model", lambda *_, **__: copy.deepcopy(trained))
    networks = [models.build("resnet18", 7, seed, "torchvision") for seed in (3, 3, 4)]
    for name, value in networks[0].state_dict().items():
        if not name.startswith("fc."):
            assert torch.equal(value, trained.state_dict()[name]), name
    first, same, other = [network.fc.weight for network in networks]
    assert first.shape == (7, 512)
    assert 0.04 < first.abs().max() <= 1 / math.sqrt(512)
    assert torch.equal(first, same)
    assert not torch.equal(first, other)


def test_torchvisions_weights_that_cannot_be_fetched_are_refused(monkeypatch):
    def no_network(*_, **__):
        raise OSError("no route to host")
    monkeypatch.setattr(torchvision.models, "get_model", no_network)
    with pytest.raises(Refused, match="--pretrained: cannot be fetched: no route to host"):
        models.build("resnet18", 10, pretrained="torchvision")


def test_torchvision_has_no_weights_of_a_cifar_network():
    with pytest.raises(Refused, match="weights of resnet18, resnet34, resnet50, none of resnet20"):
        models.build("resnet20", 10, pretrained="torchvision")


# ---- filter surgery ------------------------------------------------------------------------------

def noisy(arch):
    """A network with at most 24 filters in each prunable conv, random in all its tensors, in
    float64 and eval mode."""
    network = on_meta(arch)
    widths = [24] * len(models.prunable(network))
    network = prune.shrunk(network, method="random", plan={"widths": widths})
    network.to_empty(device="cpu").double()
    draw = torch.Generator().manual_seed(0)
    for name, value in network.state_dict().items():
        normal = torch.randn(value.shape, generator=draw)
        if value.dim() > 1:
            value.copy_(normal * math.sqrt(2 / value[0].numel()))
        elif name.endswith((".weight", ".running_var")):
            value.copy_(0.5 + torch.rand(value.shape, generator=draw))
        else:
            value.copy_(0.3 * normal)
    return network


def unpruned(arch="resnet8"):
    """A checkpoint dict of a fresh network with 10 classes, for images of 8 pixels."""
    model = models.build(arch, 10).state_dict()
    return {"format": models.FORMAT, "arch": arch, "classes": 10, "side": 8, "data_dir": "",
            "mean": [0.5] * 3, "std": [0.2] * 3, "model": model,
            "dense": {"digest": models.digest(model)}}


def zero_smallest(network, share):
    """Zero that share of each prunable conv's filters, those with the smallest L1 norm, and what
    its BN adds to them."""
    for unit in models.prunable(network):
        weight = network.get_parameter(f"{unit.conv}.weight").data
        count = len(weight) - int(len(weight) * (1 - share))
        smallest = weight.abs().sum((1, 2, 3)).argsort()[:count]
        bn = network.get_submodule(unit.bn)
        for tensor in (weight, bn.weight.data, bn.bias.data):
            tensor[smallest] = 0


@pytest.mark.parametrize("arch", ["resnet20", "vgg16", "resnet18", "resnet50"])
def test_a_shrunk_network_computes_what_the_zeroed_one_computes(arch):
    network = noisy(arch)
    small = prune.shrunk(network, 0.3)
    zero_smallest(network, 0.3)
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    torch.testing.assert_close(small(x), network(x), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("arch", ["resnet20", "vgg16", "resnet18"])
def test_layers_know_the_widths_that_shrinking_left(arch):
    small = prune.shrunk(on_meta(arch), 0.3, "random")
    for module in small.modules():
        if isinstance(module, nn.Conv2d):
            assert module.weight.shape[:2] == (module.out_channels, module.in_channels)
        elif isinstance(module, nn.Linear):
            assert module.weight.shape == (module.out_features, module.in_features)
        elif isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
            assert len(module.running_var) == module.num_features == len(module.bias)


@pytest.mark.parametrize("method", ["magnitude", "random", "taylor", "obd", "hrank"])
def test_shrinking_leaves_the_network_as_it_was(method):
    network = noisy("resnet8").train()
    before = models.digest(network.state_dict())
    images = torch.randn(3, 3, 8, 8, dtype=torch.float64)
    small = prune.shrunk(network, 0.5, method, calibration=(images, torch.arange(3)))
    assert models.digest(network.state_dict()) == before
    assert network.training
    assert not small.training
    assert network.layer1[0].conv1.weight.grad is None
    assert not small.layer1[0].bn1._forward_hooks


@pytest.mark.parametrize("arch", ["resnet20", "vgg16", "resnet50"])
def test_a_network_restored_from_its_tensors_computes_the_same(arch):
    small = prune.shrunk(noisy(arch), 0.3)
    checkpoint = {"arch": arch, "classes": 10, "model": small.state_dict()}
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    assert torch.equal(models.restore(checkpoint)(x), small(x))


def test_kept_names_filters_of_the_dense_network_after_two_prunings():
    dense = unpruned()
    twice = pruned(pruned(dense), sparsity=0.25, method="random")
    for conv, width in (("layer1.0.conv1", 6), ("layer2.0.conv1", 12), ("layer3.0.conv1", 24)):
        kept = twice["pruning"]["kept"][conv]
        rows = dense["model"][f"{conv}.weight"][kept]
        assert len(kept) == width
        assert torch.equal(twice["model"][f"{conv}.weight"], rows)


@pytest.mark.parametrize("method", ["taylor", "obd"])
def test_gradients_are_taken_where_they_are_switched_off(method):
    network = models.build("resnet8", 10).eval()
    images = torch.randn(4, 3, 8, 8), torch.arange(4)
    names = ["conv1.weight"]
    wanted = prune.saliency(network, method, "weights", names, calibration=images)
    with torch.no_grad():
        found = prune.saliency(network, method, "weights", names, calibration=images)
    assert torch.equal(found["conv1.weight"], wanted["conv1.weight"])


@pytest.mark.parametrize("method", ["magnitude", "taylor", "obd"])
def test_a_frozen_network_stays_frozen(method):
    network = noisy("resnet8").requires_grad_(False)
    network.fc.requires_grad_(True)
    images = torch.randn(3, 3, 8, 8, dtype=torch.float64)
    small = prune.shrunk(network, 0.5, method, calibration=(images, torch.arange(3)))
    for name, parameter in small.named_parameters():
        assert parameter.requires_grad == name.startswith("fc."), name


def test_momentum_is_cut_as_the_weights_are():
    network = models.build("resnet8", 10)
    momentum = {}
    for name, parameter in network.named_parameters():
        if name != "layer1.0.bn1.bias":                                 # a missing one is no error
            momentum[name] = torch.randn(parameter.shape)
    rows = torch.tensor([1, 5, 6])
    small = models.shrink(momentum, models.prunable(network), {"layer1.0.conv1": rows})
    cut = {"layer1.0.conv1.weight": momentum["layer1.0.conv1.weight"][rows],
           "layer1.0.bn1.weight": momentum["layer1.0.bn1.weight"][rows],
           "layer1.0.conv2.weight": momentum["layer1.0.conv2.weight"][:, rows]}
    assert models.digest(small) == models.digest(momentum | cut)
    assert momentum["layer1.0.conv1.weight"].shape == (16, 16, 3, 3)


def conv_weights(checkpoint):
    """All conv weights of a checkpoint as one float64 array."""
    parts = []
    for value in checkpoint["model"].values():
        if value.dim() == 4:
            parts.append(value.numpy().ravel().astype(np.float64))
    return np.concatenate(parts)


@pytest.mark.parametrize("structure", ["filters", "weights"])
def test_removed_is_the_share_of_the_remaining_conv_weights(structure):
    once = pruned(unpruned(), structure, 0.3)
    second = 0.3 if structure == "filters" else 0.51
    twice = pruned(once, structure, second)
    for before, after in ((unpruned(), once), (once, twice)):
        left = np.count_nonzero(conv_weights(after)) / np.count_nonzero(conv_weights(before))
        assert after["pruning"]["removed"] == pytest.approx(1 - left)
        assert after["pruning"]["removed"] == pytest.approx(0.3, abs=0.05)


@pytest.mark.parametrize("structure", ["filters", "weights"])
def test_distance_is_how_far_the_conv_weights_moved(structure):
    before = unpruned()
    after = pruned(before, structure, 0.4, "random")
    old = np.linalg.norm(conv_weights(before))
    new = np.linalg.norm(conv_weights(after))
    moved = math.sqrt(old ** 2 - new ** 2)
    assert after["pruning"]["distance"] == pytest.approx(moved / old)


# ---- criteria ------------------------------------------------------------------------------------

SCORED = "layer3.0.conv1.weight"


@pytest.fixture(scope="module")
def calibrated():
    """(network, images, labels, weight * gradient of each single image's loss, of SCORED): more
    images than a mini-batch of 64 has."""
    network = noisy("resnet8")
    draw = torch.Generator().manual_seed(1)
    images = torch.randn(70, 3, 10, 10, dtype=torch.float64, generator=draw)
    labels = torch.arange(70) % 10
    weight = network.get_parameter(SCORED)
    singles = []
    for image, label in zip(images.split(1), labels.split(1)):
        loss = F.cross_entropy(network(image), label)
        singles.append(weight.detach() * torch.autograd.grad(loss, weight)[0])
    return network, images, labels, torch.stack(singles)


def scores_of(calibrated, method, structure):
    network, images, labels, _ = calibrated
    return prune.saliency(network, method, structure, [SCORED], 0, (images, labels))[SCORED]


@pytest.mark.parametrize("structure", ["filters", "weights"])
def test_taylor_is_the_squared_first_order_change_of_a_mini_batchs_loss(calibrated, structure):
    *_, singles = calibrated
    squares = []
    for part in singles.split(64):
        mean = part.mean(0)
        if structure == "filters":
            mean = mean.sum((1, 2, 3))
        squares.append(mean ** 2)
    wanted = (squares[0] + squares[1]) / 2
    found = scores_of(calibrated, "taylor", structure)
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-14)


@pytest.mark.parametrize("structure", ["filters", "weights"])
def test_obd_is_half_the_mean_square_of_single_gradients_times_weights(calibrated, structure):
    *_, singles = calibrated
    wanted = (singles ** 2).mean(0) / 2
    if structure == "filters":
        wanted = wanted.sum((1, 2, 3))
    found = scores_of(calibrated, "obd", structure)
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-14)


def test_hrank_is_numpys_rank_of_what_the_next_conv_reads(calibrated):
    network, images, _, _ = calibrated
    with torch.no_grad():
        stream = network.layer2(network.layer1(F.relu(network.bn1(network.conv1(images)))))
        block = network.layer3[0]
        maps = F.relu(block.bn1(block.conv1(stream)))
    wanted = np.linalg.matrix_rank(maps.numpy()).mean(0)
    assert len(set(wanted)) > 10
    assert scores_of(calibrated, "hrank", "filters").tolist() == pytest.approx(wanted.tolist())


@pytest.mark.parametrize("method", ["taylor", "obd", "hrank"])
def test_a_checkpoint_is_ranked_by_its_training_images(method):
    data = tiny_data()
    images = v2.Normalize(data.mean, data.std)(data.test.images / 255)  # the training ones, too
    network = models.build("resnet8", 10).eval()
    wanted = prune.choose_filters(network, {"shares": [0.5]}, method,
                                  calibration=(images, data.test.labels))
    kept = pruned(unpruned(), method=method, data=data)["pruning"]["kept"]
    assert models.digest(kept) == models.digest(wanted)


@pytest.mark.parametrize("structure", ["filters", "weights"])
def test_magnitude_is_the_sum_of_absolute_values(calibrated, structure):
    wanted = np.abs(calibrated[0].get_parameter(SCORED).detach().numpy())
    if structure == "filters":
        wanted = wanted.sum((1, 2, 3))
    np.testing.assert_allclose(scores_of(calibrated, "magnitude", structure), wanted, rtol=1e-12)


@pytest.mark.parametrize("structure", ["filters", "weights"])
def test_random_scores_are_a_function_of_the_seed(structure):
    network = models.build("resnet8", 10)
    found = []
    for seed in (3, 3, 4):
        found.append(prune.saliency(network, "random", structure, [SCORED], seed)[SCORED])
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])
    assert found[0].unique().numel() == found[0].numel()


def test_random_scores_are_uniform():
    scores = prune.saliency(models.build("resnet8", 10), "random", "weights", [SCORED])[SCORED]
    counts = np.histogram(scores, 10, (0, 1))[0]
    assert counts.sum() == scores.numel() == 18432
    assert counts == pytest.approx(1843.2, abs=6 * math.sqrt(1843.2))


@pytest.mark.parametrize("method, structure, words", [
    ("best", "filters", "unknown method 'best'; known: magnitude, random"),
    ("taylor", "weights", "taylor ranks by images"), ("obd", "filters", "obd ranks by images"),
    ("hrank", "filters", "hrank ranks by images"),
    ("hrank", "weights", "hrank ranks filters, not weights")])
def test_a_criterion_that_cannot_rank_is_refused(method, structure, words):
    with pytest.raises(Refused, match=words):
        prune.saliency(models.build("resnet8", 10), method, structure, [SCORED])


# ---- selection -----------------------------------------------------------------------------------

def test_a_network_is_shrunk_by_a_share_for_each_stage():
    small = prune.shrunk(on_meta("resnet8"), [0.5, 0.25, 0.75], "random")
    widths = [small.get_submodule(f"layer{stage}.0.conv1").out_channels for stage in (1, 2, 3)]
    assert widths == [8, 24, 16]


@pytest.mark.parametrize("sparsity", [50, 1, -0.1, math.nan])
def test_a_sparsity_that_is_no_share_is_refused(sparsity):
    with pytest.raises(Refused, match="each must be a share, from 0 to below 1"):
        prune.shrunk(on_meta("resnet8"), sparsity, "random")


def test_shares_other_than_one_for_each_stage_are_refused():
    with pytest.raises(Refused, match="2 values; give 1 or 3, one a stage"):
        prune.filters_to_keep(on_meta("resnet8"), [0.1, 0.2])


@pytest.mark.parametrize("shares, wanted", [
    pytest.param([0.8, 0.7, 0.6], [2, 3, 4], id="10 * (1 - 0.8) is 1.9999999999999996"),
    pytest.param([0.25, 0.99, 0], [7, 1, 10], id="rounded down, to 1 at least"),
    pytest.param([0.5], [5, 5, 5], id="one share for all")])
def test_a_conv_keeps_its_width_times_what_is_left(shares, wanted):
    ten = prune.shrunk(on_meta("resnet8"), method="random", plan={"widths": [10, 10, 10]})
    assert list(prune.filters_to_keep(ten, shares).values()) == wanted


def test_each_layer_keeps_its_best_filters_in_their_order():
    scores = {"a": torch.tensor([1., 3., 2., 0.]), "b": torch.tensor([60., 100.])}
    keep = prune.keep_filters(scores, {"a": 2, "b": 1})
    assert keep["a"].tolist() == [1, 2]
    assert keep["b"].tolist() == [1]


def slowly_globally(scores, count):
    """{layer: filters} that stay when the worst of all goes, one after the other, until so many are
    left; worst by its score as a part of its layer's L2 norm; the last of a layer stays."""
    left = {}
    for layer, values in scores.items():
        norm = math.sqrt(sum(value ** 2 for value in values))
        left[layer] = {i: value / norm for i, value in enumerate(values)}
    while sum(map(len, left.values())) > count:
        candidates = []
        for layer, parts in left.items():
            if len(parts) > 1:
                i = min(parts, key=parts.get)
                candidates.append((parts[i], layer, i))
        _, layer, i = min(candidates)
        del left[layer][i]
    return {layer: sorted(parts) for layer, parts in left.items()}


@pytest.mark.parametrize("seed", range(8))
def test_the_global_ranking_is_that_of_a_slow_reference(seed):
    draw = np.random.default_rng(seed)
    scores, counts = {}, {}
    for layer, width in (("a", 3), ("b", 8), ("c", 12), ("d", 5)):
        scores[layer] = (10 ** draw.uniform(-3, 3) * draw.random(width)).tolist()
        counts[layer] = int(draw.integers(1, width + 1))
    tensors = {layer: torch.tensor(values).double() for layer, values in scores.items()}
    keep = prune.keep_filters(tensors, counts, "global")
    found = {layer: rows.tolist() for layer, rows in keep.items()}
    assert found == slowly_globally(scores, sum(counts.values()))


# Without a norm, b0 (60) would come before a2 (2); with the L1 norm, too (0.375, 0.333).
@pytest.mark.parametrize("counts, wanted", [
    pytest.param((2, 1, 1), [[1, 2], [1], [0]], id="by the L2 norm of its layer"),
    pytest.param((1, 1, 1), [[1], [1], [0]], id="no layer is emptied"),
    pytest.param((3, 2, 9), [[0, 1, 2], [0, 1], [0, 1, 2, 3, 4, 5, 6, 7, 8]], id="all")])
def test_the_global_ranking_by_hand(counts, wanted):
    scores = {"a": torch.tensor([1., 3., 2.]), "b": torch.tensor([60., 100.]),
              "c": torch.tensor([5.] + 8 * [4.])}
    keep = prune.keep_filters(scores, dict(zip("abc", counts)), "global")
    assert [keep[layer].tolist() for layer in "abc"] == wanted


def test_the_global_ranking_survives_a_layer_of_zeros():
    scores = {"a": torch.zeros(3), "b": torch.tensor([1., 2., 3.])}
    keep = prune.keep_filters(scores, {"a": 2, "b": 2}, "global")
    assert len(keep["a"]) == 1
    assert keep["b"].tolist() == [0, 1, 2]


def test_shrinking_globally_keeps_as_many_filters():
    network = models.build("resnet20", 10)
    widths = {}
    for scope in ("layer", "global"):
        small = prune.shrunk(network, 0.5, scope=scope)
        widths[scope] = [small.get_submodule(u.conv).out_channels for u in models.prunable(small)]
    assert sum(widths["global"]) == sum(widths["layer"]) == 3 * (8 + 16 + 32)
    assert widths["global"] != widths["layer"]


@pytest.mark.parametrize("include_linear", [False, True], ids=["convs", "linear too"])
@pytest.mark.parametrize("scope", ["global", "layer"])
def test_pruned_weights_are_those_that_torch_prunes(scope, include_linear):
    network = models.build("resnet8", 10)
    found = pruned(unpruned(), "weights", 0.8, scope=scope, include_linear=include_linear)
    layers = []
    for module in network.modules():
        if isinstance(module, nn.Conv2d) or include_linear and isinstance(module, nn.Linear):
            layers.append((module, "weight"))
    groups = [layers] if scope == "global" else [[layer] for layer in layers]
    for group in groups:
        torch_prune.global_unstructured(group, torch_prune.L1Unstructured, amount=0.8)
    for module, name in layers:
        torch_prune.remove(module, name)
    for name, wanted in network.state_dict().items():
        assert torch.equal(found["model"][name], wanted), name


@pytest.mark.parametrize("method", ["magnitude", "random"])
def test_weight_sparsity_is_cumulative(method):
    once = pruned(unpruned(), "weights", 0.3, method)
    twice = pruned(once, "weights", 0.51, method, seed=5)
    first = conv_weights(once) == 0
    second = conv_weights(twice) == 0
    assert first.sum() == round(0.3 * len(first))
    assert second.sum() == round(0.51 * len(first))
    assert second[first].all()


@pytest.mark.parametrize("count, left", [(3, True), (4, False)])
def test_weights_that_are_zero_already_go_first_whatever_their_score(count, left):
    weights = {"a": torch.tensor([0., 1., 2., 0.]), "b": torch.tensor([[3.], [0.]])}
    scores = {"a": torch.tensor([9., 2., 3., 9.]), "b": torch.tensor([[1.], [9.]])}
    masks = prune.weight_masks(weights, scores, count / 6)
    assert masks["a"].tolist() == [False, True, True, False]
    assert masks["b"].tolist() == [[left], [False]]


@pytest.mark.parametrize("scope", ["global", "layer"])
@pytest.mark.parametrize("sparsity, words", [
    pytest.param(0.9, "0.9 of 4 weights: .* one has to be left", id="nothing left"),
    pytest.param(0.25, "0.25 of 4 weights: 2 are zero already", id="fewer than zero already")])
def test_a_sparsity_that_weights_cannot_have_is_refused(scope, sparsity, words):
    weights = {"a": torch.tensor([0., 1., 2., 0.])}
    with pytest.raises(Refused, match=words):
        prune.weight_masks(weights, {"a": torch.ones(4)}, sparsity, scope)


def test_what_was_ever_pruned_stays_pruned():
    once = pruned(unpruned(), "weights", 0.3, include_linear=True)
    twice = pruned(once, "weights", 0.6)
    _, _, masks = retrain.start(retrain.Run("", "finetune", 1, 0), twice)
    assert torch.equal(masks["fc.weight"], once["model"]["fc.weight"] != 0)
    assert not masks["fc.weight"].all()
    assert torch.equal(masks["conv1.weight"], twice["model"]["conv1.weight"] != 0)


# ---- BN statistics -------------------------------------------------------------------------------

def seen_by(layer):
    """The inputs of a layer, or of its copies, from now on: a list."""
    inputs = []
    layer.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    return inputs


@pytest.mark.parametrize("where", ["bn1", "layer2.0.bn2"])
@pytest.mark.parametrize("count, sizes", [(1500, [1000, 500]), (1001, [1000])])
def test_reestimated_statistics_are_the_mean_of_those_of_each_batch(where, count, sizes):
    network = models.build("resnet8", 10)
    network(torch.ones(2, 3, 8, 8))                         # statistics of before, to be forgotten
    network.eval()
    inputs = seen_by(network.get_submodule(where))
    settled = prune.reestimated(network, tiny_data(count), CPU).get_submodule(where)
    assert [len(x) for x in inputs] == sizes            # a single image has no variance: left out
    mean, variance = 0, 0
    for x in inputs:
        values = x.double().transpose(0, 1).flatten(1)
        mean = mean + values.mean(1) / len(inputs)
        variance = variance + values.var(1, correction=1) / len(inputs)
    torch.testing.assert_close(settled.running_mean.double(), mean, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(settled.running_var.double(), variance, rtol=1e-4, atol=1e-6)


def test_statistics_are_reestimated_on_plain_training_images():
    network = models.build("resnet8", 10)
    data = tiny_data(30)
    plain = v2.Normalize(data.mean, data.std)(data.test.images / 255).flatten(1)
    inverted = train.Split(255 - data.test.images, data.test.labels)
    inputs = seen_by(network.conv1)
    prune.reestimated(network, data._replace(test=inverted), CPU)
    distances, nearest = torch.cdist(inputs[0].flatten(1), plain).min(1)
    assert distances.max() < 0.1                                    # from others it is about 20
    assert sorted(nearest.tolist()) == list(range(30))


def test_statistics_are_reestimated_on_no_more_images_than_the_limit(monkeypatch):
    monkeypatch.setattr(prune, "BN_IMAGES", 12)
    network = models.build("resnet8", 10)
    inputs = seen_by(network.conv1)
    prune.reestimated(network, tiny_data(30), CPU)
    assert [len(x) for x in inputs] == [12]


def test_reestimating_leaves_the_network_as_it_was():
    network = models.build("resnet8", 10).eval()
    before = models.digest(network.state_dict())
    settled = prune.reestimated(network, tiny_data(), CPU)
    assert models.digest(network.state_dict()) == before
    assert not network.training
    assert network.bn1.momentum == 0.1
    assert not settled.training
    assert torch.equal(settled.fc.weight, network.fc.weight)


# ---- data ----------------------------------------------------------------------------------------

GIT = train.git


def load(folder, subset=None, dry_run=False):
    """The `Data` of a folder of images, read now."""
    train.load_data.cache_clear()
    return train.load_data("folder", str(folder), subset, dry_run, CPU.device)


def folder_of_images(folder, side=8, **counts):
    """A data set of random images in `folder`, so many of each class for training and test."""
    for seed, part in enumerate(("train", "test")):
        write_images(folder / part, seed, (side, side), **counts)
    return folder


def batches_of(data, epoch=0, size=8, machine=CPU):
    """The training batches of an epoch: a list of (float images, labels)."""
    slices = train.batch_slices(data, {"batch_size": size}, machine)
    return list(train.train_batches(data, slices, 0, epoch, machine))


def test_augmentation_crops_the_padded_image_then_flips_it():
    data = tiny_data(50)
    order, crop, flip = train.epoch_draws(0, 3, 50)
    found = train.augment(data.train.images, order, crop, flip)
    for place in range(50):
        padded = np.pad(data.test.images[order[place]].numpy(), ((0, 0), (4, 4), (4, 4)))
        dy, dx = crop[place]
        wanted = padded[:, dy:dy + 8, dx:dx + 8]
        if flip[place]:
            wanted = wanted[:, :, ::-1]
        assert np.array_equal(found[place], wanted)


def test_every_crop_is_equally_likely():
    _, crop, _ = train.epoch_draws(0, 0, 50_000)
    counts = np.bincount(crop[:, 0] * 9 + crop[:, 1], minlength=81)
    expected = 50_000 / 81
    chi2 = ((counts - expected) ** 2 / expected).sum()
    assert len(counts) == 81
    assert abs(chi2 - 80) < 6 * np.sqrt(2 * 80)             # mean and variance with 80 degrees


def test_half_of_the_images_are_flipped():
    _, _, flip = train.epoch_draws(0, 0, 50_000)
    assert abs(flip.double().mean().item() - 0.5) < 6 * 0.5 / np.sqrt(50_000)


@pytest.mark.parametrize("seed, epoch", [(5, 8), (6, 7), (6, 6), (7, 5)])
def test_draws_are_others_than_with_seed_5_in_epoch_7(seed, epoch):
    one = train.epoch_draws(5, 7, 99)
    other = train.epoch_draws(seed, epoch, 99)
    for drawn, drawn_else in zip(one, other):
        assert not torch.equal(drawn, drawn_else)


def test_an_epoch_shows_each_image_once():
    data = tiny_data(33, classes=33)                        # a label for each image
    seen = []
    for _, labels in batches_of(data):
        seen += labels.tolist()
    assert sorted(seen) == list(range(33))


def test_batches_are_augmented_images_normalised_as_by_torchvision():
    data = tiny_data(33)
    draws = train.epoch_draws(0, 2, 33)
    images, labels = zip(*batches_of(data, epoch=2))
    plain = train.augment(data.train.images, *draws) / 255
    torch.testing.assert_close(torch.cat(images), v2.Normalize(data.mean, data.std)(plain))
    assert torch.equal(torch.cat(labels), data.train.labels[draws[0]])


@pytest.mark.parametrize("world, sizes", [(1, [8, 8, 8, 8, 1]), (2, [8, 8, 8, 8]),
                                          (3, [6, 6, 6, 6])])
def test_processes_share_each_batch(world, sizes):
    """33 images in batches of 8; what cannot be shared evenly is dropped."""
    data = tiny_data(33)
    shares = []
    for rank in range(world):
        machine = CPU._replace(rank=rank, world=world)
        shares.append(train.batch_slices(data, {"batch_size": 8}, machine))
        assert len(shares[rank]) == len(sizes)
    for number, size in enumerate(sizes):
        together = []
        for share in shares:
            places = range(33)[share[number]]
            assert len(places) == size // world
            together += places
        assert sorted(together) == list(range(8 * number, 8 * number + size))


def test_cifar_has_782_steps_an_epoch():
    data = tiny_data()._replace(train=train.Split(None, range(50_000)))
    assert len(train.batch_slices(data, {"batch_size": 64}, CPU)) == 782


def test_more_processes_than_images_in_a_batch_are_refused():
    with pytest.raises(Refused, match="--batch-size: 3 processes share batches of 2 images"):
        train.batch_slices(tiny_data(), {"batch_size": 2}, CPU._replace(world=3))


@pytest.mark.parametrize("shape, crop", [
    pytest.param((32, 32), [], id="small"),
    pytest.param((65, 90), [v2.Resize(256), v2.CenterCrop(224)], id="large")])
def test_folders_are_what_torchvision_reads(tmp_path, shape, crop):
    write_images(tmp_path / "train", 0, shape, a=1, b=1)
    write_images(tmp_path / "test", 1, shape, a=3, b=5)
    data = load(tmp_path)
    plain = v2.Compose([*crop, v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True),
                        v2.Normalize(data.mean, data.std)])
    (found, labels), = train.plain_batches(data.test, torch.arange(8), data, CPU)
    wanted = list(torchvision.datasets.ImageFolder(tmp_path / "test"))
    assert len(found) == len(wanted) == 8
    for i, (image, label) in enumerate(wanted):
        torch.testing.assert_close(found[i], plain(image))
        assert labels[i] == label


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA"])
def test_images_become_rgb_as_in_torchvision(tmp_path, mode):
    path = folder_of_images(tmp_path, a=1) / "test/a/0.png"
    torchvision.datasets.folder.Image.open(path).convert(mode).save(path)
    wanted, _ = torchvision.datasets.ImageFolder(tmp_path / "test")[0]
    assert torch.equal(load(tmp_path).test.images[0], v2.functional.pil_to_tensor(wanted))


def test_small_training_images_have_a_black_border(tmp_path):
    images = load(folder_of_images(tmp_path, a=3, b=5)).train.images
    for i, (image, _) in enumerate(torchvision.datasets.ImageFolder(tmp_path / "train")):
        assert torch.equal(images[i], v2.functional.pad(v2.functional.pil_to_tensor(image), 4))


def test_small_images_are_normalised_with_their_own_statistics(tmp_path):
    data = load(folder_of_images(tmp_path, a=3, b=5))
    pixels = data.train.images[:, :, 4:-4, 4:-4].double() / 255
    assert data.mean == pytest.approx(pixels.mean((0, 2, 3)).tolist())
    assert data.std == pytest.approx(pixels.std((0, 2, 3), correction=0).tolist())


def test_large_images_are_normalised_with_imagenets_statistics(tmp_path):
    data = load(folder_of_images(tmp_path, 65, a=1))
    weights = torchvision.models.ResNet18_Weights.IMAGENET1K_V1.transforms()
    assert (data.mean, data.std) == (weights.mean, weights.std)


def test_large_images_are_augmented_anew_each_epoch(tmp_path):
    data = load(folder_of_images(tmp_path, 65, a=1))
    (first, _), = batches_of(data, epoch=0)
    (second, _), = batches_of(data, epoch=1)
    assert first.shape == (1, 3, 224, 224)
    assert not torch.equal(first, second)


def test_large_images_have_draws_of_their_own(tmp_path):
    folder_of_images(tmp_path, 65, a=2)
    shutil.copy(tmp_path / "train/a/0.png", tmp_path / "train/a/1.png")
    (images, _), = batches_of(load(tmp_path))
    assert not torch.equal(images[0], images[1])


@pytest.mark.slow
def test_large_images_do_not_depend_on_the_number_of_workers(tmp_path):
    data = load(folder_of_images(tmp_path, 65, a=3, b=5))
    alone = batches_of(data, size=3)
    shared = batches_of(data, size=3, machine=CPU._replace(workers=2))
    assert len(alone) == len(shared) == 3
    for one, other in zip(alone, shared):
        assert torch.equal(one[0], other[0])
        assert torch.equal(one[1], other[1])


def test_a_subset_is_balanced():
    labels = np.arange(99) % 3
    chosen = train.balanced(labels, 8)
    assert np.bincount(labels[chosen]).tolist() == [3, 3, 2]
    assert len(set(chosen)) == 8


def test_a_subset_leaves_the_test_images_alone(study):
    data = load(study / "data", subset=4)
    assert data.train.labels.tolist() == [0, 0, 1, 1]
    assert len(data.test.labels) == 20


@pytest.mark.parametrize("a, b, used", [(3, 3, 6), (40, 1, 9), (40, 40, 16)])
def test_a_dry_run_takes_at_most_16_images(tmp_path, monkeypatch, a, b, used):
    """Of these two classes at most eight each; it does with fewer."""
    folder_of_images(tmp_path / "data", a=a, b=b)
    monkeypatch.chdir(tmp_path)
    out = ok("train --dataset folder --data-dir data --dry-run")
    assert f"resnet8 on folder ({used} images, 2 classes, " in out
    assert " after 2 epochs" in out
    assert os.path.exists("runs/folder-resnet8-s0-dry/dense.pt")


def test_generated_images_are_a_function_of_the_seed():
    once = torch.cat([train.shapes(99, 0)[0], train.shapes(99, 1)[0]])
    again = train.shapes(99, 0)[0]
    assert torch.equal(once[:99], again)
    assert len(once.unique(dim=0)) == 198


def test_generated_classes_are_balanced():
    images, labels = train.shapes(100, 0)
    assert (images.shape, images.dtype) == ((100, 3, 24, 24), torch.uint8)
    assert np.bincount(labels).tolist() == [10] * 10


def test_generated_images_are_those_of_earlier_results():
    pixels = train.shapes(500, 0)[0].double()
    assert pixels.mean().item() == pytest.approx(127.515, abs=0.01)
    assert pixels.std().item() == pytest.approx(51.575, abs=0.01)


def test_training_and_test_images_are_generated_from_different_seeds(monkeypatch):
    asked = []
    images = torch.zeros(10, 3, 24, 24, dtype=torch.uint8)

    def few(count, seed):
        asked.append((count, seed))
        return images, torch.arange(10)
    monkeypatch.setattr(train, "shapes", few)
    data = train.load_data("shapes", "", None, False, CPU.device)
    assert (asked, data.classes) == ([(3000, 0), (2000, 1)], 10)


@pytest.fixture(params=["cifar10", "cifar100"])
def cifar(request, monkeypatch):
    """(name, pixels) of a CIFAR that stands in for torchvision's: six images, two for test."""
    pixels = np.random.default_rng(0).integers(0, 256, (6, 32, 32, 3), dtype=np.uint8)

    def read(root, training, download):
        count = 6 if training else 2
        return types.SimpleNamespace(data=pixels[:count], targets=[0, 1, 0, 1, 0, 1][:count],
                                     classes=["cat", "dog"])
    monkeypatch.setattr(torchvision.datasets, request.param.upper(), read)
    return request.param, pixels


def test_cifar_is_torchvisions(cifar):
    name, pixels = cifar
    data = train.load_data(name, "x", None, False, CPU.device)
    assert np.array_equal(data.train.images[:, :, 4:-4, 4:-4].permute(0, 2, 3, 1), pixels)
    assert np.array_equal(data.test.images.permute(0, 2, 3, 1), pixels[:2])
    assert (data.train.labels.tolist(), data.classes) == ([0, 1, 0, 1, 0, 1], 2)


def test_cifar_is_normalised_as_the_authors_do(cifar):
    data = train.load_data(cifar[0], "x", None, False, CPU.device)
    assert data.mean == [0.4914, 0.4822, 0.4465]
    assert data.std == [0.2023, 0.1994, 0.2010]


def test_cifar_without_a_network_is_refused(monkeypatch):
    def fails(root, training, download):
        raise RuntimeError("no route to host")
    monkeypatch.setattr(torchvision.datasets, "CIFAR10", fails)
    with pytest.raises(Refused, match="cifar10 is not in here .* downloaded: no route to host"):
        train.read_split("cifar10", "here", True)


@pytest.mark.parametrize("name", [".ipynb_checkpoints/a.png", "__MACOSX/a.png", "@eaDir/a.png",
                                  "a/._1.png", "a/.thumbnails/1.png", "a/notes.txt",
                                  "a/__MACOSX/1.png", "b/@eaDir/0.png"])
def test_folders_may_hold_what_systems_leave_there(tmp_path, name):
    folder_of_images(tmp_path, a=3, b=5)
    path = tmp_path / "train" / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(b"no image")
    data = load(tmp_path)
    assert (data.classes, np.bincount(data.train.labels).tolist()) == (2, [3, 5])


@pytest.mark.parametrize("others, used", [
    pytest.param({"test/c": 2}, 3, id="test has other classes"),
    pytest.param({"test": 2}, 3, id="test has no classes"),
    pytest.param({}, 3, id="no test"),
    pytest.param({"test/a": 1, "test/b": 1}, 2, id="test is as it should be")])
def test_images_of_val_are_used_where_test_does_not_fit(tmp_path, others, used):
    write_images(tmp_path / "train", a=2, b=2)
    write_images(tmp_path / "val", a=2, b=1)
    for name, count in others.items():
        path = tmp_path / name
        write_images(path.parent, **{path.name: count})
    assert len(load(tmp_path).test.labels) == used


@pytest.mark.parametrize("kind, name", [
    pytest.param(np.uint16, "x.png", id="16-bit png"),
    pytest.param(np.uint16, "x.tif", id="16-bit tif"),
    pytest.param(np.int32, "x.tif", id="32-bit tif"),
    pytest.param(np.float32, "x.tif", id="float tif")])
def test_images_of_more_than_8_bits_are_refused(tmp_path, kind, name):
    folder_of_images(tmp_path, a=2)
    image = torchvision.datasets.folder.Image.fromarray(np.full((8, 8), 999, kind))
    image.save(tmp_path / "train/a" / name)
    with pytest.raises(Refused, match=f"train/a/{name}: has more than 8 bits a channel"):
        load(tmp_path)


def corrupt(path):
    path.write_bytes(b"\x89PNG")


def truncate(path):
    path.write_bytes(path.read_bytes()[:-40])


def dangle(path):
    path.unlink()
    path.symlink_to("nowhere")


@pytest.mark.parametrize("damage", [corrupt, truncate, dangle])
def test_damaged_images_are_refused(tmp_path, damage):
    damage(folder_of_images(tmp_path, a=3) / "train/a/1.png")
    with pytest.raises(Refused, match="train/a/1.png: not a readable image"):
        load(tmp_path)


@pytest.mark.parametrize("damage, workers", [
    (corrupt, 0), (truncate, 0), (dangle, 0), pytest.param(truncate, 2, marks=pytest.mark.slow)])
def test_damaged_large_images_are_refused(tmp_path, damage, workers):
    damage(folder_of_images(tmp_path, 65, a=3) / "train/a/1.png")
    with pytest.raises(Refused, match="^[^\n]*train/a/1.png: not a readable image[^\n]*$"):
        batches_of(load(tmp_path), machine=CPU._replace(workers=workers))


@pytest.mark.parametrize("shape", [(9, 8), (9, 9), (65, 65)])
def test_images_of_two_sizes_are_refused(tmp_path, shape):
    folder_of_images(tmp_path, a=2)
    write_images(tmp_path / "train", shape=shape, b=1)
    with pytest.raises(Refused) as refused:
        load(tmp_path)
    assert f"train/b/0.png: has {shape[1]} x {shape[0]} pixels, " in str(refused.value)
    assert "train/a/0.png 8 x 8" in str(refused.value)


def test_small_images_that_are_not_square_are_refused(tmp_path):
    write_images(tmp_path / "train", shape=(8, 9), a=2)
    with pytest.raises(Refused, match="train/a/0.png: has 9 x 8 pixels, .* must be square"):
        load(tmp_path)


def test_large_images_may_have_any_size(tmp_path):
    folder_of_images(tmp_path, 65, a=2, b=1)
    write_images(tmp_path / "train", shape=(70, 90), b=1)
    (images, _), = batches_of(load(tmp_path))
    assert images.shape == (3, 3, 224, 224)


def test_a_file_name_may_be_any_bytes(tmp_path):
    folder_of_images(tmp_path, 80, a=2)
    folder = os.fsencode(tmp_path / "train/a")
    os.rename(folder + b"/1.png", folder + b"/\xe9.png")
    (images, _), = batches_of(load(tmp_path))
    assert images.shape == (2, 3, 224, 224)


def test_shared_memory_for_testing_is_asked_for_before_training(tmp_path, monkeypatch):
    folder_of_images(tmp_path, 65, a=2)
    write_images(tmp_path / "test", shape=(65, 65), a=200)
    asked = []
    monkeypatch.setattr(train, "check_shared_memory", lambda *given: asked.append(given))
    batches_of(load(tmp_path))
    assert asked == [(0, 128)]


def test_little_shared_memory_is_refused(monkeypatch):
    """Two workers have two batches ready each, and one batch is in use."""
    free = types.SimpleNamespace(f_bavail=40, f_frsize=2 ** 20)
    monkeypatch.setattr(os.path, "isdir", lambda path: True)
    monkeypatch.setattr(os, "statvfs", lambda path: free)
    megabytes = 5 * 64 * 3 * 224 * 224 // 2 ** 20
    with pytest.raises(Refused, match=f"--workers: 2 workers need {megabytes} MB .* 40 MB .* 0"):
        train.check_shared_memory(2, 64)
    train.check_shared_memory(2, 55)
    train.check_shared_memory(0, 999)


@pytest.mark.parametrize("side", [8, 65])
def test_the_same_images_elsewhere_have_the_same_fingerprint(tmp_path, side):
    here = load(folder_of_images(tmp_path / "data", side, a=2, b=2))
    there = load(shutil.copytree(tmp_path / "data", tmp_path / "else/where"))
    assert here.fingerprint == there.fingerprint


def move_image(folder):
    """To the other class, with the same place in the order of all images."""
    (folder / "a/1.png").rename(folder / "b/-.png")


def change_image(folder):
    shutil.copy(folder / "a/0.png", folder / "a/1.png")


def grow_image(folder):
    with open(folder / "a/1.png", "ab") as file:
        file.write(b"another byte")


def rename_image(folder):
    (folder / "a/1.png").rename(folder / "a/2.png")


@pytest.mark.parametrize("side, change", [
    pytest.param(8, change_image, id="other pixels"),
    pytest.param(8, move_image, id="other labels"),
    pytest.param(65, grow_image, id="other sizes of large files"),
    pytest.param(65, rename_image, id="other names of large files")])
def test_other_images_have_another_fingerprint(tmp_path, side, change):
    before = load(folder_of_images(tmp_path, side, a=2, b=2))
    change(tmp_path / "train")
    after = load(tmp_path)
    assert after.fingerprint != before.fingerprint
    assert after.test_fingerprint == before.test_fingerprint


def test_other_test_images_have_another_fingerprint(tmp_path):
    before = load(folder_of_images(tmp_path, a=2, b=2))
    change_image(tmp_path / "test")
    after = load(tmp_path)
    assert after.fingerprint == before.fingerprint
    assert after.test_fingerprint != before.test_fingerprint


PRUNE = "prune run/dense.pt --method random"
RETRAIN = ("retrain run/filters-magnitude-0.5.pt --schedule finetune --epochs 1 --seed 0 --jobs 1 "
           "--data-dir other")


@pytest.mark.parametrize("command", [
    pytest.param(PRUNE + " --data-dir other", id="prune"), pytest.param(RETRAIN, id="retrain")])
def test_other_images_than_the_dense_runs_are_noted(workspace, command):
    dense = models.read("run/dense.pt")["dense"]
    other = load("other")
    out = ok(command)
    assert out.count("note: ") == 2
    assert (f"note: other images ({other.fingerprint}) than the dense network was trained on "
            f"({dense['data']})\n") in out
    assert (f"note: other test images ({other.test_fingerprint}) than the dense network was tested "
            f"with ({dense['test_data']})\n") in out


def test_a_dense_run_that_is_done_notes_other_test_images(workspace):
    change_image(workspace / "data/test")
    train.load_data.cache_clear()
    out = ok(DENSE)
    assert out.startswith("note: other test images (")
    assert ": done already, " in out


@pytest.mark.parametrize("command, made, key", [
    pytest.param(PRUNE + " --data-dir other", "run/filters-random-0.5.pt", "pruning", id="prune"),
    pytest.param(RETRAIN, "run/filters-magnitude-0.5/*.pt", "retraining", id="retrain")])
def test_a_checkpoint_records_the_images_it_was_made_with(workspace, command, made, key):
    ok(command)
    path, = workspace.glob(made)
    assert models.read(path)[key]["data"] == load("other").fingerprint


@pytest.mark.parametrize("make", [train.data_for, train.data_to_test])
def test_other_images_are_normalised_as_the_network_takes_them(workspace, make):
    checkpoint = models.read("run/dense.pt")
    data = make(checkpoint, types.SimpleNamespace(data_dir="other"), CPU)
    assert (data.mean, data.std) == (checkpoint["mean"], checkpoint["std"])
    assert load("other").mean != data.mean


def accuracy_on(network, folder, checkpoint):
    """Percent of the images in `folder` that a network is right about, normalised as `checkpoint`
    says."""
    normalise = v2.Normalize(checkpoint["mean"], checkpoint["std"])
    right = []
    for image, label in torchvision.datasets.ImageFolder(folder):
        x = normalise(v2.functional.to_dtype(v2.functional.pil_to_tensor(image), scale=True))
        right.append(network(x[None]).argmax().item() == label)
    return 100 * np.mean(right)


def test_evaluate_takes_other_images(workspace):
    network = models.load("run/filters-magnitude-0.5.pt")
    wanted = accuracy_on(network, "other/test", models.read("run/dense.pt"))
    out = ok("train --evaluate run/filters-magnitude-0.5.pt --data-dir other")
    assert f": test {wanted:.2f} %, " in out


@pytest.mark.parametrize("what, said", [
    pytest.param((8, {"a": 2, "b": 2, "c": 2}), "3 classes, 8 pixels", id="classes"),
    pytest.param((9, {"a": 2, "b": 2}), "2 classes, 9 pixels", id="pixels")])
@pytest.mark.parametrize("command", [
    "train --evaluate run/dense.pt", PRUNE, "retrain run/dense.pt --jobs 1 --seed 0"])
def test_images_that_do_not_fit_the_network_are_refused(workspace, command, what, said):
    side, counts = what
    folder_of_images(workspace / "unfit", side, **counts)
    status, _, err = run(command + " --data-dir unfit")
    assert status == 2
    assert f"--data-dir: {said}, but the network was trained for 2 classes, 8 pixels" in err


# ---- the loop ------------------------------------------------------------------------------------

def fitted(network, data, schedule, epochs, folder, machine=CPU, **more):
    """The curve of `train.fit` in batches of 8."""
    settings = {"epochs": epochs, "batch_size": 8, "weight_decay": 5e-4, "seed": 0}
    curve, *_ = train.fit(network, data, schedule, settings, machine, f"{folder}/net.pt", **more)
    return curve


def by_torch(network, data, schedule, epochs):
    """What `fitted` does as one writes it with torch: each epoch's (loss, accuracy)."""
    optimizer = torch.optim.SGD(network.train().parameters(), 0.1, 0.9, weight_decay=5e-4)
    group = optimizer.param_groups[0]
    count = len(data.train.labels)
    step = 0
    curve = []
    for epoch in range(epochs):
        loss_sum = right = 0
        for x, y in batches_of(data, epoch):
            group["lr"], group["momentum"] = schedule(step)
            out = network(x.contiguous())
            loss = F.cross_entropy(out, y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            step += 1
            loss_sum += loss.item() * len(y)
            right += (out.argmax(1) == y).sum().item()
        curve.append((loss_sum / count, 100 * right / count))
    return curve


def masked_by_torch(network, amount):
    """Prune a network by torch's global magnitude. Returns the masks, {weight name: bool}."""
    convs = [(m, "weight") for m in network.modules() if isinstance(m, nn.Conv2d)]
    torch_prune.global_unstructured(convs, torch_prune.L1Unstructured, amount=amount)
    masks = {}
    for name, mask in network.named_buffers():
        if name.endswith("weight_mask"):
            masks[name.removesuffix("_mask")] = mask.bool()
    return masks


def mask_weights(network, masks):
    for name, mask in masks.items():
        network.get_parameter(name).data.mul_(mask)
    return network


ONE_CYCLE = schedules.retrain("one_cycle", 3, 3, lr=0.05)       # three epochs of 20 images


@pytest.mark.parametrize("amount, schedule", [
    pytest.param(0.0, ONE_CYCLE, id="dense"), pytest.param(0.8, ONE_CYCLE, id="masked"),
    pytest.param(0.0, lambda step: (0.05, 0.0), id="without momentum")])
def test_the_loop_is_plain_sgd(tmp_path, amount, schedule):
    data = tiny_data(20)
    reference = models.build("resnet8", 10)
    masks = masked_by_torch(reference, amount)
    network = mask_weights(models.build("resnet8", 10), masks)
    curve = fitted(network, data, schedule, 3, tmp_path, masks=masks if amount else None)
    for epoch, (loss, accuracy) in enumerate(by_torch(reference, data, schedule, 3)):
        assert curve["train_loss"][epoch] == pytest.approx(loss, rel=1e-3)
        assert curve["train_accuracy"][epoch] == accuracy
    for module in reference.modules():
        if isinstance(module, nn.Conv2d):
            torch_prune.remove(module, "weight")
    for name, value in reference.state_dict().items():
        torch.testing.assert_close(network.state_dict()[name], value, rtol=1e-3, atol=1e-3)


def test_masked_weights_stay_exactly_zero(tmp_path):
    """Not even momentum from before the pruning moves them."""
    masks = masked_by_torch(models.build("resnet8", 10), 0.8)
    network = mask_weights(models.build("resnet8", 10), masks)
    momentum = {name: torch.ones_like(value) for name, value in network.named_parameters()}
    fitted(network, tiny_data(20), lambda step: (0.05, 0.9), 2, tmp_path, masks=masks,
           momentum=momentum)
    for name, mask in masks.items():
        assert torch.equal(network.get_parameter(name) != 0, mask)


def test_a_run_without_momentum_resumes(workspace):
    ok(f"{DENSE} --momentum 0 --out whole")
    os.mkdir("rest")
    shutil.copy("whole/epoch-001.pt", "rest/dense.state.pt")
    ok(f"{DENSE} --momentum 0 --out rest")
    whole = models.read("whole/dense.pt")["dense"]
    assert models.read("rest/dense.pt")["dense"]["digest"] == whole["digest"]


def test_a_curve_has_a_value_for_each_epoch(tmp_path):
    curve = fitted(models.build("resnet8", 10), tiny_data(20), ONE_CYCLE, 3, tmp_path)
    assert list(curve) == ["epoch", "lr", "train_loss", "train_accuracy", "test_accuracy"]
    assert curve["epoch"] == [1, 2, 3]
    assert curve["lr"] == [ONE_CYCLE(0)[0], ONE_CYCLE(3)[0], ONE_CYCLE(6)[0]]
    assert {len(values) for values in curve.values()} == {3}


def test_test_accuracy_counts_each_image_once(tmp_path):
    data = tiny_data(20)
    network = models.build("resnet8", 10)
    curve = fitted(network, data, lambda step: (0.05, 0.9), 2, tmp_path)
    plain = v2.Normalize(data.mean, data.std)(data.test.images / 255)
    right = (network.eval()(plain).argmax(1) == data.test.labels).sum().item()
    assert curve["test_accuracy"][-1] == 100 * right / 20


def test_the_last_batch_may_be_short(tmp_path, monkeypatch):
    steps = spy(monkeypatch, train, "train_step")
    fitted(models.build("resnet8", 10), tiny_data(20), lambda step: (0.05, 0.9), 1, tmp_path)
    assert [len(images) for _, _, images, *_ in steps] == [8, 8, 4]


def test_each_epoch_says_how_long_the_others_will_take():
    curve = {"epoch": [1, 2, 3], "lr": [0.1] * 3, "train_loss": [1.0] * 3,
             "train_accuracy": [50.0] * 3, "test_accuracy": [50.0] * 3}
    assert train.describe(curve, 90, 12).endswith(" 4.5 min left")


def test_a_dense_run_resumes_bitwise(workspace, monkeypatch):
    whole = models.read("run/dense.pt")
    os.remove("run/dense.pt")
    shutil.copy("run/epoch-002.pt", "run/dense.state.pt")
    steps = spy(monkeypatch, train, "train_step")
    ok(DENSE)
    again = models.read("run/dense.pt")
    assert len(steps) == 5
    assert again["dense"]["curve"] == whole["dense"]["curve"]
    assert again["dense"]["digest"] == models.digest(again["model"]) == whole["dense"]["digest"]
    assert not os.path.exists("run/dense.state.pt")


def test_a_run_that_changes_machines_says_so(workspace, monkeypatch):
    first = {"device": "cpu, AVX2", "threads": 1, "torch": "2.6.0", "commit": "abc1234"}
    second = {**first, "device": "cpu, AVX512", "threads": 2}
    with monkeypatch.context() as patch:
        patch.setattr(train, "provenance", lambda machine: first)
        at_call(patch, train, "train_step", 9, loss_of_nan)
        assert run(f"{DENSE} --out new")[0] == 2
    monkeypatch.setattr(train, "provenance", lambda machine: second)
    ok(f"{DENSE} --out new")
    dense = models.read("new/dense.pt")["dense"]
    assert {key: dense[key] for key in first} == {
        "device": "cpu, AVX2, then cpu, AVX512", "threads": "1, then 2", "torch": "2.6.0",
        "commit": "abc1234"}


def test_the_machines_of_many_sessions_are_listed_in_turn():
    found = {"threads": 1}
    for threads in (1, 2, 2, 12, 1):
        found = train.in_turn(found, {"threads": threads})
    assert found == {"threads": "1, then 2, then 12, then 1"}


def test_a_masked_run_resumes_bitwise(tmp_path):
    masks = masked_by_torch(models.build("resnet8", 10), 0.8)
    one = mask_weights(models.build("resnet8", 10), masks)
    curve = fitted(one, tiny_data(20), ONE_CYCLE, 3, tmp_path, masks=masks, keep=[2])
    os.replace(tmp_path / "epoch-002.pt", tmp_path / "net.state.pt")
    other = models.build("resnet8", 10, seed=9)
    assert fitted(other, tiny_data(20), ONE_CYCLE, 3, tmp_path, masks=masks) == curve
    assert models.digest(other.state_dict()) == models.digest(one.state_dict())


def test_snapshots_are_kept_after_the_epochs_asked_for(tmp_path):
    fitted(models.build("resnet8", 10), tiny_data(8), lambda step: (0.1, 0.9), 4, tmp_path,
           keep=[2, 3])
    found = {}
    for path in tmp_path.glob("epoch-*.pt"):
        found[path.name] = models.read(path)["curve"]["epoch"]
    assert found == {"epoch-002.pt": [1, 2], "epoch-003.pt": [1, 2, 3]}


@pytest.mark.parametrize("dataset, share", [("cifar10", 40 / 160), ("imagenet", 45 / 90)])
def test_the_snapshot_for_the_default_budget_is_kept(dataset, share):
    for total in range(2, 400):
        budget = max(1, int(total * share))
        assert total - budget in train.snapshot_epochs({"dataset": dataset, "epochs": total})


def test_about_eighteen_snapshots_are_kept():
    for total in range(72, 400):
        kept = train.snapshot_epochs({"dataset": "cifar10", "epochs": total})
        assert 17 <= len(kept) <= 23
        assert len(set(np.diff(list(kept)))) == 1


class Calls(torch.overrides.TorchFunctionMode):
    """Inside, notes the name of each function of torch's that is called."""
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        self.names.append(function.__name__)
        return function(*args, **(kwargs or {}))


WAITS = ("item", "tolist", "numpy", "cpu", "nonzero", "masked_select", "equal", "__bool__",
         "__float__", "__int__", "__index__")


def test_no_step_waits_for_the_device(tmp_path, monkeypatch):
    """Eight steps do so no more often than two."""
    monkeypatch.setattr(models, "save", lambda path, state: None)
    counts = []
    for count in (16, 64):
        with Calls() as calls:
            fitted(models.build("resnet8", 10), tiny_data(count), lambda step: (0.1, 0.9), 1,
                   tmp_path)
        assert calls.names.count("cross_entropy") == count // 8
        counts.append([calls.names.count(name) for name in WAITS])
    assert counts[0] == counts[1]
    assert any(counts[0])


def three_steps(precision):
    """(network, optimizer, losses, type of a conv's output) after three steps on one batch."""
    network = models.build("resnet8", 10)
    kinds = []
    network.layer1[0].conv1.register_forward_hook(lambda m, x, out: kinds.append(out.dtype))
    optimizer = train.make_optimizer(network, 1e-4)
    machine = CPU._replace(precision=precision)
    (x, y), = batches_of(tiny_data(32), size=32)
    losses = []
    for _ in range(3):
        loss, _ = train.train_step(network, optimizer, x, y, (0.01, 0.9), machine)
        losses.append(loss)
    return network, optimizer, torch.stack(losses), kinds[0]


def test_bf16_keeps_weights_and_statistics_in_float32():
    network, optimizer, losses, kind = three_steps("bf16")
    kept = [losses, *network.state_dict().values(), *train.buffers(optimizer, network).values()]
    kinds = {value.dtype for value in kept}
    assert kind == torch.bfloat16
    assert kinds == {torch.float32, torch.int64}            # BN counts its batches


def test_bf16_has_nearly_the_losses_of_fp32():
    _, _, wanted, kind = three_steps("fp32")
    _, _, found, _ = three_steps("bf16")
    assert kind == torch.float32
    torch.testing.assert_close(found, wanted, rtol=0.02, atol=0.02)
    assert not torch.equal(found, wanted)


def start(study, name, schedule="weight_rewind", budget=2, seed=7):
    """(network, momentum, masks) from which to retrain run/<name>.pt, the dense T being 3."""
    path = study / f"run/{name}.pt"
    return retrain.start(retrain.Run(str(path), schedule, budget, seed), models.read(path))


def test_rewound_filters_are_those_of_the_snapshot(study):
    snapshot = models.read(study / "run/epoch-001.pt")["model"]
    kept = models.read(study / "run/filters-magnitude-0.5.pt")["pruning"]["kept"]
    found = start(study, "filters-magnitude-0.5")[0].state_dict()
    rows = kept["layer2.0.conv1"]
    assert len(rows) == 16
    assert torch.equal(found["layer2.0.conv1.weight"], snapshot["layer2.0.conv1.weight"][rows])
    assert torch.equal(found["layer2.0.conv2.weight"], snapshot["layer2.0.conv2.weight"][:, rows])
    for vector in ("weight", "bias", "running_mean", "running_var"):
        name = f"layer2.0.bn1.{vector}"
        assert torch.equal(found[name], snapshot[name][rows])


def test_rewound_filters_have_the_snapshots_momentum(study):
    snapshot = models.read(study / "run/epoch-001.pt")["momentum"]
    kept = models.read(study / "run/filters-magnitude-0.5.pt")["pruning"]["kept"]
    network, momentum, _ = start(study, "filters-magnitude-0.5")
    assert set(momentum) == {name for name, _ in network.named_parameters()}
    name = "layer2.0.conv1.weight"
    assert torch.equal(momentum[name], snapshot[name][kept["layer2.0.conv1"]])


def test_rewound_weights_are_those_of_the_snapshot_masked_as_the_last_ones(study):
    snapshot = models.read(study / "run/epoch-001.pt")
    network, momentum, masks = start(study, "weights-magnitude-0.5")
    last = models.read(study / "run/weights-magnitude-0.5.pt")["model"]
    assert len(masks) == 7
    for name, value in network.state_dict().items():
        wanted = snapshot["model"][name]
        if name in masks:
            wanted = wanted * (last[name] != 0)
        assert torch.equal(value, wanted)
    assert models.digest(momentum) == models.digest(snapshot["momentum"])


def test_rewinding_the_whole_run_starts_from_its_initialisation(study):
    network, momentum, _ = start(study, "weights-magnitude-0.5", budget=9)
    fresh = models.build("resnet8", 2, seed=0)                      # the dense run's seed
    assert torch.equal(network.conv1.weight != 0, start(study, "weights-magnitude-0.5")[2][
        "conv1.weight"])
    assert torch.equal(network.fc.weight, fresh.fc.weight)
    assert momentum == {}


def test_a_rewound_unpruned_run_is_the_dense_runs_rest(workspace, monkeypatch):
    """To the bit, momentum included, with the data order of the dense run's epochs."""
    draws = train.epoch_draws
    monkeypatch.setattr(train, "epoch_draws", lambda seed, epoch, n: draws(seed, epoch + 1, n))
    ok("retrain run/dense.pt --schedule weight_rewind --epochs 2 --seed 0 --jobs 1")
    path, = workspace.glob("run/weight_rewind-*.pt")
    assert models.digest(models.read(path)["model"]) == models.read("run/dense.pt")["dense"][
        "digest"]


@pytest.mark.parametrize("name", ["scratch", "scratch_e", "scratch_b"])
def test_scratch_starts_from_a_fresh_network_of_the_pruned_shape(study, name):
    network, momentum, _ = start(study, "filters-magnitude-0.5", name)
    weight = network.layer3[0].conv1.weight
    assert weight.shape == (32, 32, 3, 3)
    assert weight.std().item() == pytest.approx((2 / (9 * 32)) ** 0.5, rel=0.03)    # He 2016
    assert not network.bn1.running_mean.any()
    assert momentum is None


def test_scratch_is_a_function_of_the_seed(study):
    digests = []
    for seed in (7, 7, 8):
        network, _, _ = start(study, "filters-magnitude-0.5", "scratch", seed=seed)
        digests.append(models.digest(network.state_dict()))
    assert digests[0] == digests[1] != digests[2]


def test_scratch_keeps_pruned_weights_zero(study):
    network, _, masks = start(study, "weights-magnitude-0.5", "scratch")
    for name, mask in masks.items():
        assert torch.equal(network.get_parameter(name) != 0, mask)


def test_unpruned_retraining_starts_from_the_dense_weights(study):
    network, momentum, masks = start(study, "dense", "finetune")
    dense = models.read(study / "run/dense.pt")["dense"]
    assert models.digest(network.state_dict()) == dense["digest"]
    assert (momentum, masks) == (None, {})


@pytest.fixture
def two_processes(monkeypatch):
    """(sums, broadcasts) of a `fit` that takes itself for the first of two like processes."""
    summed, sent = [], []

    def all_reduce(values):
        summed.append(values.clone())
        values.mul_(2)
    monkeypatch.setattr(nn.parallel, "DistributedDataParallel", lambda network, **_: network)
    monkeypatch.setattr(torch.distributed, "all_reduce", all_reduce)
    monkeypatch.setattr(torch.distributed, "broadcast", lambda *what: sent.append(what))
    return summed, sent


def test_processes_add_up_their_losses(tmp_path, two_processes):
    """Each has every second image of the batches of 8, 8, 8, 8 and 8."""
    curve = fitted(models.build("resnet8", 10), tiny_data(40), lambda step: (0.01, 0.9), 1,
                   tmp_path, CPU._replace(world=2))
    losses, hits, right = two_processes[0]
    assert (len(losses), len(hits)) == (5, 5)
    assert curve["train_loss"] == [pytest.approx(2 * losses.sum().item() / 40)]
    assert curve["train_accuracy"] == [pytest.approx(100 * 2 * hits.sum().item() / 40)]
    assert curve["test_accuracy"] == [pytest.approx(100 * 2 * right.item() / 40)]


def test_processes_evaluate_with_the_first_ones_statistics(tmp_path, two_processes):
    network = models.build("resnet8", 10)
    fitted(network, tiny_data(40), lambda step: (0.01, 0.9), 1, tmp_path, CPU._replace(world=2))
    for (sent, source), buffer in zip(two_processes[1], network.buffers(), strict=True):
        assert sent is buffer
        assert source == 0


def test_a_batch_of_one_image_that_batch_norm_cannot_take_is_refused():
    network = models.VGG16(10)
    optimizer = train.make_optimizer(network, 0.0)
    with pytest.raises(Refused, match="^argument --batch-size: the last batch has 1 image: "):
        train.train_step(network, optimizer, torch.zeros(1, 3, 32, 32), torch.tensor([0]),
                         (0.1, 0.9), CPU)


def loss_of_nan(real, network, optimizer, x, *more):
    return real(network, optimizer, x * float("nan"), *more)


def infinite_weights(real, network, *more):
    network.conv1.weight.data.fill_(float("inf"))
    return torch.tensor(1.0), torch.tensor(1)


@pytest.mark.parametrize("instead, message", [
    (loss_of_nan, "the loss is not finite in epoch 2; try a smaller --lr"),
    (infinite_weights, "its weights are not finite; try a smaller --lr")])
def test_what_is_not_finite_is_not_written(workspace, monkeypatch, instead, message):
    with monkeypatch.context() as patch:
        at_call(patch, train, "train_step", 9, instead)             # the last one of epoch 2
        status, _, err = run(f"{DENSE} --out new")
    assert (status, err.count("\n")) == (2, 1)
    assert message in err
    assert models.read("new/dense.state.pt")["curve"]["epoch"] == [1]
    assert sorted(os.listdir("new")) == ["dense.state.pt", "epoch-001.pt"]


@pytest.mark.parametrize("number, done", [
    pytest.param(0, 0, id="first snapshot"), pytest.param(1, 0, id="first state"),
    pytest.param(3, 1, id="second state"), pytest.param(5, 3, id="result")])
def test_a_failing_disk_costs_at_most_an_epoch(workspace, monkeypatch, number, done):
    def fails(real, *paths):
        raise OSError(28, "No space left on device")
    with monkeypatch.context() as patch:
        at_call(patch, os, "replace", number, fails)
        status, _, err = run(f"{DENSE} --out new")
    assert (status, err.count("\n")) == (2, 1)
    assert "No space left on device" in err
    steps = spy(monkeypatch, train, "train_step")
    ok(f"{DENSE} --out new")
    assert len(steps) == 5 * (3 - done)
    digests = [models.read(f"{folder}/dense.pt")["dense"]["digest"] for folder in ("run", "new")]
    assert digests[0] == digests[1]
    assert sorted(os.listdir("new")) == ["dense.pt", "epoch-001.pt", "epoch-002.pt"]


@pytest.mark.parametrize("problem", [OSError, TypeError, AttributeError])
def test_another_c_library_than_glibc_is_no_problem(monkeypatch, problem):
    def fails(name):
        raise problem
    monkeypatch.setattr(train.ctypes, "CDLL", fails)
    train.keep_memory()


# ---- the command line ----------------------------------------------------------------------------

SCRIPTS = ("schedules", "train", "prune", "retrain")


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_fits_a_screen(monkeypatch, script):
    monkeypatch.setenv("COLUMNS", "80")
    lines = ok(f"{script} --help").splitlines()
    assert 10 < len(lines) <= 45
    assert max(len(line) for line in lines) <= 80


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_works_without_docstrings(monkeypatch, script):
    monkeypatch.setattr(sys.modules[script], "__doc__", None)       # as of python -OO
    assert ok(f"{script} --help").startswith("usage: ")


def recipe_of(monkeypatch, command):
    """The recipe to which a command line of train.py leads."""
    made = []
    monkeypatch.setattr(train, "train", lambda args, machine: made.append(train.make_recipe(args)))
    ok(command)
    return made[0]


@pytest.mark.parametrize("dataset, epochs, batch, drops, decay, budget", [
    ("cifar10", 160, 64, [80, 120], 1e-4, 40),
    ("cifar100", 160, 64, [80, 120], 1e-4, 40),
    ("imagenet", 90, 256, [30, 60], 1e-4, 45),
    ("folder", 160, 64, [80, 120], 1e-4, 40),
    ("shapes", 26, 64, [13, 23], 5e-4, 4)])
def test_recipes_are_the_published_ones(monkeypatch, dataset, epochs, batch, drops, decay, budget):
    """shapes is not published: it is as the README says."""
    recipe = recipe_of(monkeypatch, f"train --dataset {dataset}")
    assert recipe == {
        "dataset": dataset, "schedule": "step", "epochs": epochs, "batch_size": batch, "lr": 0.1,
        "milestones": drops, "momentum": 0.9, "weight_decay": decay, "seed": 0, "subset": None,
        "dry_run": False, "pretrained": None}
    assert train.budget(recipe) == budget


@pytest.mark.parametrize("flags, epochs, drops", [
    ("--dataset cifar10 --epochs 80", 80, [40, 60]),
    ("--dataset cifar10 --epochs 200", 200, [100, 150]),
    ("--dataset imagenet --epochs 45", 45, [15, 30]),
    ("--epochs 1", 1, []),
    ("--epochs 2", 2, [1]),
    ("--epochs 3", 3, [1, 2]),
    ("--milestones", 26, []),
    ("--milestones 2 3 --epochs 4", 4, [2, 3]),
    ("--schedule cosine", 26, []),
    ("--epochs 0 --pretrained net.pth", 26, [13, 23]),
    ("--dry-run --epochs 100 --milestones 1 80", 2, [1]),
    ("--dry-run", 2, [1])])
def test_drops_move_with_the_epochs(monkeypatch, flags, epochs, drops):
    recipe = recipe_of(monkeypatch, f"train {flags}")
    assert (recipe["epochs"], recipe["milestones"]) == (epochs, drops)


@pytest.mark.parametrize("dataset, epochs, budget", [
    ("cifar10", 80, 20), ("cifar10", 1, 1), ("cifar10", 3, 1), ("imagenet", 30, 15)])
def test_the_default_budget_is_the_recipes_share(dataset, epochs, budget):
    assert train.budget({"dataset": dataset, "epochs": epochs}) == budget


@pytest.mark.parametrize("epochs", [1, 2, 3])
def test_few_epochs_need_no_flags(workspace, epochs):
    ok(f"train --dataset folder --data-dir data --epochs {epochs} --out new")
    ok("prune new/dense.pt --method magnitude")
    out = ok("retrain new/filters-magnitude-0.5.pt --schedule lr_rewind --seed 0 --jobs 1")
    assert (" T = 1; with as many epochs or more, " in out) == (epochs == 1)
    path, = workspace.glob("new/filters-magnitude-0.5/lr_rewind-t1-s0-*.json")
    curve = json.loads(path.read_text())["retraining"]["curve"]
    assert curve["lr"] == [pytest.approx(0.1 ** epochs)]            # of the dense run's last epoch


def bad(command, message):
    """A command line that is refused, and what the last line of stderr says."""
    return pytest.param(command, message, id=command)


@pytest.fixture(scope="session")
def unusable(study, tmp_path_factory):
    """`study` with files and folders that the cases below name. Read only."""
    folder = shutil.copytree(study, tmp_path_factory.mktemp("unusable") / "folder")
    (folder / "truncated.pt").write_bytes((folder / "run/dense.pt").read_bytes()[:999])
    (folder / "folder.pt").mkdir()
    (folder / "unfinished").mkdir()
    shutil.copy(folder / "run/epoch-001.pt", folder / "unfinished/dense.state.pt")
    shutil.copy(folder / "run/weights-magnitude-0.5.pt", folder / "run/filters-random-0.5.pt")
    torch.save(models.build("resnet8", 3).state_dict(), folder / "three.pth")
    torch.save([1, 2], folder / "list.pth")
    (folder / "empty").mkdir()
    write_images(folder / "no-test/train", a=2, b=2)
    write_images(folder / "classes/train", a=2, b=2)
    write_images(folder / "classes/test", a=2, c=2)
    write_images(folder / "sizes/train", a=2, b=2)
    write_images(folder / "sizes/test", shape=(9, 9), a=2, b=2)
    write_images(folder / "holes/train", a=2, b=2, c=0)
    with contextlib.chdir(folder):
        ok("retrain run/filters-magnitude-0.5.pt --schedule finetune --epochs 1 --seed 0 --jobs 1")
    made, = folder.glob("run/filters-magnitude-0.5/*.pt")
    shutil.copy(made, folder / "retrained.pt")
    return folder


@pytest.mark.parametrize("command, message", [
    bad("train --epochs 1.5", "invalid whole number from 0 to 1e+09 value: '1.5'"),
    bad("train --batch-size 1", "invalid whole number"),
    bad("train --workers 999", "invalid whole number from 0 to 256"),
    bad("train --seed -1", "invalid whole number"),
    bad("train --lr nan", "invalid number"),
    bad("train --lr 0", "invalid number"),
    bad("train --momentum 1", "invalid number"),
    bad("train --weight-decay inf", "invalid number"),
    bad("train --dataset mnist", "invalid choice"),
    bad("train --precision int8", "invalid choice"),
    bad("train --device tpu", "invalid choice: 'tpu'"),
    bad("train --schedule slr", "invalid choice"),
    bad("train --colour red", "unrecognized arguments"),
    bad("train dense.pt", "unrecognized arguments"),
    bad("train --epoch 3", "unrecognized arguments"),
    bad("train --resume", "unrecognized arguments"),
    bad("train --arch resnet2", "unknown network 'resnet2'; known: resnet8"),
    bad("train --arch resnet9", "unknown network"),
    bad("train --arch resnet08", "unknown network"),
    bad("train --data-dir data", "--data-dir: shapes are generated"),
    bad("train --milestones 8 26", "must ascend, below the epochs of the run (26)"),
    bad("train --milestones 8 8", "must ascend"),
    bad("train --milestones 12 8", "must ascend"),
    bad("train --milestones 1 --schedule cosine", "belongs to --schedule step"),
    bad("train --epochs 0", "0 needs --pretrained"),
    bad("train --pretrained", "none of resnet8; name a file"),
    bad("train --dataset folder --data-dir data --out new --pretrained none.pth",
        "none.pth: not a file of weights"),
    bad("train --dataset folder --data-dir data --out new --pretrained truncated.pt",
        "truncated.pt: not a file of weights"),
    bad("train --dataset folder --data-dir data --out new --pretrained list.pth",
        "list.pth: holds a list, not a state dict"),
    bad("train --dataset folder --data-dir data --out new --pretrained three.pth",
        "size mismatch for fc.weight: copying a param with shape torch.Size([3, 64])"),
    bad("train --dataset folder --out new --data-dir nowhere", "nowhere has no train/<class>/*"),
    bad("train --dataset folder --out new --data-dir empty", "empty has no train/<class>/*"),
    bad("train --dataset folder --out new --data-dir no-test",
        "has no test/<class>/* or val/<class>/* with the 2 classes of train/"),
    bad("train --dataset folder --out new --data-dir classes", "with the 2 classes of train/"),
    bad("train --dataset folder --out new --data-dir holes", "holes/train: Found no valid file"),
    bad("train --dataset folder --out new --data-dir sizes", "images have 8 pixels, test images 9"),
    bad("train --dataset folder --out new --data-dir data --subset 11", "a class has too few"),
    bad("train --dataset folder --out new --data-dir data --arch vgg16",
        "--arch: vgg16 cannot take images of 8 pixels"),
    bad("train --evaluate none.pt", "none.pt: no such checkpoint"),
    bad("train --evaluate truncated.pt", "or damaged"),
    bad("train --evaluate folder.pt", "folder.pt: no such checkpoint"),
    bad("train --evaluate run/epoch-001.pt", "has no 'dense', it is another kind"),
    bad("train --evaluate unfinished/dense.pt", "that run is not finished"),
    bad("train --evaluate run/dense.pt --lr 3", "--lr: --evaluate would ignore it"),
    bad("train --evaluate run/dense.pt --compile", "--compile: --evaluate would ignore it"),
    bad("train --evaluate run/dense.pt --out new", "--out: --evaluate would ignore it"),
    bad("train --evaluate run/dense.pt --dry-run", "--dry-run: --evaluate would ignore it")])
def test_train_refuses_in_one_line(unusable, monkeypatch, command, message):
    refuses(unusable, monkeypatch, command, message)


@pytest.mark.parametrize("command, message", [
    bad("prune --method best", "invalid choice"),
    bad("prune --sparsity 1", "invalid number"),
    bad("prune --sparsity x", "invalid number"),
    bad("prune --compile", "unrecognized arguments"),
    bad("prune", "runs/shapes-resnet8-s0/dense.pt: no such checkpoint"),
    bad("prune run/dense.pt none.pt --method obd", "none.pt: no such checkpoint"),
    bad("prune data", "data: no such checkpoint"),
    bad("prune truncated.pt", "or damaged"),
    bad("prune unfinished/dense.pt", "that run is not finished"),
    bad("prune run/dense.pt --dry-run", "name no checkpoint"),
    bad("prune run/dense.pt --sparsity 0", "0 removes nothing"),
    bad("prune run/dense.pt --sparsity 0 0 0", "0 removes nothing"),
    bad("prune run/dense.pt --sparsity .5 .5", "2 values; give 1 or 3, one a stage"),
    bad("prune run/dense.pt --plan B", "no plan B for resnet8"),
    bad("prune run/dense.pt --plan B --sparsity .5", "is for filters, in place of --sparsity"),
    bad("prune run/dense.pt --plan B --structure weights", "is for filters"),
    bad("prune run/dense.pt --include-linear", "is for --structure weights"),
    bad("prune run/dense.pt --structure weights --sparsity .5 .5", "one value with --structure"),
    bad("prune run/dense.pt --structure weights --method hrank", "hrank ranks filters"),
    bad("prune run/dense.pt --structure weights --sparsity .9999 --scope layer",
        "one has to be left"),
    bad("prune run/dense.pt --method random", "was pruned otherwise, or from another network"),
    bad("prune run/dense.pt run/dense.pt --method obd --out new", "would be written twice"),
    bad("prune run/weights-magnitude-0.5.pt", "its weights are pruned; prune on with --structure"),
    bad("prune run/filters-magnitude-0.5.pt --structure weights", "its filters are pruned"),
    bad("prune run/weights-magnitude-0.5.pt --structure weights --sparsity .1",
        "are zero already (sparsity is cumulative)")])
def test_prune_refuses_in_one_line(unusable, monkeypatch, command, message):
    refuses(unusable, monkeypatch, command, message)


@pytest.mark.parametrize("command, message", [
    bad("schedules --lr x", "invalid number"),
    bad("schedules --epochs 0", "invalid whole number"),
    bad("schedules slr", "unrecognized arguments"),
    bad("schedules --epochs 2 --chart nowhere/x.svg", "--chart: [Errno 2]"),
    bad("retrain --schedule clr", "invalid choice: 'clr'"),
    bad("retrain --rounds 0", "invalid whole number"),
    bad("retrain --epochs 0", "invalid whole number"),
    bad("retrain --share 3/3", "invalid share i/N, i from 0 to N-1, value: '3/3'"),
    bad("retrain --share 1", "invalid share i/N"),
    bad("retrain --method slr", "unrecognized arguments"),
    bad("retrain", "no pruned checkpoint is there"),
    bad("retrain none.pt", "none.pt: no such checkpoint"),
    bad("retrain truncated.pt", "or damaged"),
    bad("retrain unfinished/dense.pt", "that run is not finished"),
    bad("retrain retrained.pt", "has been retrained already; prune it again"),
    bad("retrain run/dense.pt --rounds 2", "--rounds: run/dense.pt is not pruned"),
    bad("retrain run/dense.pt --dry-run", "name no file"),
    bad("retrain --schedule finetune --lr 1", "finetune would ignore it; it is for slr"),
    bad("retrain --schedule slr --end-lr 1", "slr would ignore it; it is for finetune"),
    bad("retrain --schedule slr linear --no-cycle-momentum", "it is for one_cycle"),
    bad("retrain --report data", "no finished runs there"),
    bad("retrain --report nowhere", "--report: nowhere: no such folder"),
    bad("retrain --report run --lr 1", "--report would ignore it")])
def test_retrain_refuses_in_one_line(unusable, monkeypatch, command, message):
    refuses(unusable, monkeypatch, command, message)


def refuses(folder, monkeypatch, command, message):
    """In `folder` the command ends with that message, and has touched nothing."""
    monkeypatch.chdir(folder)
    forbid(monkeypatch, train, "train_step")
    before = listing(folder)
    status, _, err = run(command)
    assert status == 2
    assert message in err.splitlines()[-1]
    assert ": error: " in err.splitlines()[-1]
    assert "Traceback" not in err
    assert listing(folder) == before


SETTINGS = ("lr 1", "epochs 4", "subset 8", "batch-size 5", "seed 1", "weight-decay .1",
            "momentum .5", "precision bf16", "arch resnet14", "milestones 1", "data-dir other",
            "schedule cosine --milestones")


@pytest.mark.parametrize("flag", SETTINGS)
@pytest.mark.parametrize("folder, file", [("run", "dense.pt"), ("unfinished", "dense.state.pt")])
def test_a_run_refuses_another_setting(unusable, monkeypatch, folder, file, flag):
    """A finished one and an unfinished one."""
    key = flag.split()[0].replace("-", "_").removesuffix("_dir")
    message = f"{folder}/{file}: belongs to another run, with another {key} (here "
    refuses(unusable, monkeypatch, f"{DENSE} --out {folder} --{flag}", message)


def test_a_finished_run_says_so(workspace, monkeypatch):
    forbid(monkeypatch, train, "fit")
    before = listing(workspace)
    recorded = models.read("run/dense.pt")["dense"]["test_accuracy"]
    assert ok(DENSE) == f"run/dense.pt: done already, test {recorded:.2f} %\n"
    assert listing(workspace) == before


TORCHRUN = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost",
            "MASTER_PORT": "1"}


@pytest.mark.parametrize("environment, message", [
    pytest.param({"RANK": "1"}, "RANK=1 of WORLD_SIZE=1, without more processes: ", id="alone"),
    pytest.param({"RANK": "one"}, "must be numbers; start with torchrun or unset", id="no number"),
    pytest.param({"WORLD_SIZE": "2"}, "without RANK LOCAL_RANK MASTER_ADDR MASTER_PORT: start with "
                 "torchrun or unset them", id="no rank"),
    pytest.param(TORCHRUN | {"RANK": "2"}, "RANK=2 of WORLD_SIZE=2, without more", id="too large"),
    pytest.param(TORCHRUN | {"MASTER_PORT": ""}, "without MASTER_PORT: start", id="no port"),
    pytest.param(TORCHRUN | {"MASTER_PORT": "abc"}, "MASTER_ADDR, MASTER_PORT: ", id="bad port")])
def test_half_an_environment_of_torchrun_is_refused(unusable, monkeypatch, environment, message):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    refuses(unusable, monkeypatch, "train", message)


def test_more_processes_than_gpus_are_refused(monkeypatch):
    for name, value in (TORCHRUN | {"RANK": "1", "LOCAL_RANK": "1"}).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 1)
    with pytest.raises(Refused, match="more processes than the 1 GPUs of this machine"):
        train.make_machine(argparse.Namespace(device="cuda", precision="fp32", workers=0))


def test_jobs_of_several_processes_are_refused(unusable, monkeypatch):
    shared = train.Machine(torch.device("cpu"), world=2)
    monkeypatch.setattr(train, "make_machine", lambda args: shared)
    refuses(unusable, monkeypatch, "retrain run/dense.pt --jobs 2", "torchrun has started the")


@pytest.mark.parametrize("command", ["prune run/dense.pt --method obd", "retrain run/dense.pt",
                                     "train --evaluate run/dense.pt", "retrain --report run"])
def test_every_script_refuses_a_lone_rank(unusable, monkeypatch, command):
    monkeypatch.setenv("RANK", "1")
    refuses(unusable, monkeypatch, command, "RANK=1 of WORLD_SIZE=1, without more processes")


@pytest.mark.parametrize("command, made", [
    ("train --evaluate ~/run/dense.pt --data-dir ~/data", "run/dense.pt"),
    (f"{DENSE} --data-dir ~/data --out ~/new", "new/dense.pt"),
    ("prune ~/run/dense.pt --method random --out ~/new", "new/filters-random-0.5.pt"),
    ("prune run/dense.pt --method random --data-dir ~/data", "run/filters-random-0.5.pt"),
    ("schedules --epochs 2 --chart ~/curves.svg", "curves.svg")])
def test_a_tilde_is_the_home_folder(workspace, monkeypatch, command, made):
    monkeypatch.setenv("HOME", str(workspace))
    ok(command)
    assert (workspace / made).exists()


@pytest.mark.parametrize("command", [
    "train --evaluate {}/run/dense.pt", "prune {}/run/dense.pt --method random",
    "retrain {}/run/dense.pt --schedule finetune --epochs 1 --seed 0 --jobs 1"])
def test_a_relative_data_folder_works_from_elsewhere(workspace, tmp_path, monkeypatch, command):
    """--data-dir was `data` when the dense run was made."""
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert "note:" not in ok(command.format(workspace))


@pytest.mark.parametrize("command, made", [
    pytest.param(PRUNE + " --data-dir other", "run/filters-random-0.5.pt", id="prune"),
    pytest.param(RETRAIN, "run/filters-magnitude-0.5/*.pt", id="retrain")])
def test_a_checkpoint_remembers_the_data_folder_it_was_made_with(workspace, command, made):
    ok(command)
    path, = workspace.glob(made)
    assert models.read(path)["data_dir"] == str(workspace / "other")


@pytest.mark.parametrize("first, second", [("--epochs 0", "--epochs 3"),
                                           ("--epochs 3", "--epochs 0")])
def test_weights_that_are_kept_are_another_run_than_weights_that_are_trained(workspace, first,
                                                                             second):
    torch.save(models.load("run/dense.pt").state_dict(), "net.pth")
    command = DENSE.replace("--epochs 3", "{}").replace("--out run", "--out new")
    command += " --pretrained net.pth --milestones 2"
    ok(command.format(first))
    status, _, err = run(command.format(second))
    assert status == 2
    assert "trained (here" in err


def test_a_relative_file_of_weights_works_from_elsewhere(workspace, tmp_path, monkeypatch):
    """Weight rewinding to epoch 0 reads it again."""
    torch.save(models.build("resnet8", 2, seed=5).state_dict(), "theirs.pth")
    ok("train --dataset folder --data-dir data --pretrained theirs.pth --epochs 1 --out new")
    ok("prune new/dense.pt --method magnitude")
    monkeypatch.chdir(tmp_path)
    ok(f"retrain {workspace}/new/filters-magnitude-0.5.pt --schedule weight_rewind --epochs 1 "
       "--seed 0 --jobs 1")


def test_names_in_pth_keep_their_letters(workspace):
    os.rename("run/filters-magnitude-0.5.pt", "run/net.pth")
    ok("prune run/net.pth --method magnitude")
    ok("retrain run/net.pth --schedule finetune --epochs 1 --seed 0 --jobs 1")
    found = sorted(os.listdir("run/net"))
    assert found[0] == "filters-magnitude-0.5.pt"
    assert found[1].startswith("finetune-t1-s0-")


@pytest.mark.parametrize("name", ["net", "net-0.5", "my.dense.ptx"])
def test_what_is_made_from_a_file_without_pt_has_a_folder(workspace, name):
    shutil.copy("run/filters-magnitude-0.5.pt", name)
    ok(f"retrain {name} --schedule finetune --epochs 1 --seed 0 --jobs 1")
    made = sorted(os.listdir(f"{name}.d"))
    assert len(made) == 2
    assert made[0].startswith("finetune-t1-s0-")


def test_stderr_may_be_closed(workspace, monkeypatch):
    monkeypatch.setattr(sys, "stderr", None)
    with pytest.raises(SystemExit) as end:
        train.command(lambda: train.main(["--evaluate", "none.pt"]))
    assert end.value.code == 2
    assert sys.stderr.writable()


@pytest.mark.parametrize("stdout", [
    pytest.param(lambda: None, id="closed"),
    pytest.param(io.StringIO, id="without reconfigure"),
    pytest.param(lambda: io.TextIOWrapper(io.BytesIO(), "ascii"), id="ascii")])
def test_stdout_may_be(workspace, monkeypatch, stdout):
    os.rename("run/dense.pt", "run/d\udce9nse.pt")
    monkeypatch.setattr(sys, "stdout", stdout())
    with pytest.raises(SystemExit) as end:
        train.command(lambda: train.main(["--evaluate", "run/d\udce9nse.pt"]))
    assert end.value.code == 0
    assert sys.stdout.writable()                    # closed, the next file would take its place


def git_that_says(monkeypatch, top, commits):
    """Let `train.git` know of a repository at `top` whose commit is the first of `commits`."""
    def git(folder, *words):
        return str(top) if words[0] == "rev-parse" else commits[0]
    monkeypatch.setattr(train, "git", git)


@pytest.mark.parametrize("command, files, key", [
    (f"{DENSE} --out new", "new/dense.pt", "dense"),
    ("retrain run/dense.pt --schedule finetune --epochs 1 --seed 0 --jobs 1",
     "run/finetune-*.pt", "retraining")], ids=["train", "retrain"])
def test_the_commit_is_that_when_the_run_started(workspace, monkeypatch, command, files, key):
    commits = ["before", "after"]
    git_that_says(monkeypatch, HERE, commits)

    def commit_first(real, *args, **named):
        del commits[0]
        return real(*args, **named)
    at_call(monkeypatch, train, "train_step", 0, commit_first)
    ok(command)
    path, = workspace.glob(files)
    assert commits == ["after"]
    assert models.read(path)[key]["commit"] == "before"


@pytest.mark.parametrize("top, commit", [
    pytest.param(HERE, "abc-dirty", id="a clone"),
    pytest.param(HERE.parent, "", id="a copy in another repository"),
    pytest.param("", "", id="no repository")])
def test_the_commit_is_of_this_repository(monkeypatch, top, commit):
    git_that_says(monkeypatch, top, ["abc-dirty"])
    assert train.provenance(CPU)["commit"] == commit


@pytest.mark.slow
def test_the_commit_is_read_from_git(tmp_path, monkeypatch):
    def git(*words):
        subprocess.run(["git", "-C", tmp_path, "-c", "user.name=x", "-c", "user.email=x", *words],
                       check=True, capture_output=True)
    (tmp_path / "train.py").touch()
    git("init")
    git("add", ".")
    git("commit", "-m", "first")
    monkeypatch.setattr(train, "git", GIT)
    monkeypatch.setattr(train, "__file__", str(tmp_path / "train.py"))
    clean = train.provenance(CPU)["commit"]
    (tmp_path / "train.py").write_text("changed")
    assert re.fullmatch("[0-9a-f]{7,}", clean)
    assert train.provenance(CPU)["commit"] == clean + "-dirty"


@pytest.fixture
def theirs(workspace):
    """A network that other code has trained, whose weights lie in theirs.pth."""
    network = models.build("resnet8", 2, seed=5)
    by_torch(network, tiny_data(40, classes=2), lambda step: (0.05, 0.9), 1)
    state = {}
    for name, value in network.state_dict().items():
        state[f"module.{name}"] = value
    torch.save({"state_dict": state, "epoch": 90}, "theirs.pth")
    return network.eval()


THEIRS = "train --dataset folder --data-dir data --pretrained theirs.pth --epochs 0 --out theirs"


def test_weights_of_other_code_become_a_dense_checkpoint(theirs):
    assert " after 0 epochs" in ok(THEIRS)
    checkpoint = models.read("theirs/dense.pt")
    assert checkpoint["dense"]["test_accuracy"] == accuracy_on(theirs, "data/test", checkpoint)
    assert models.digest(checkpoint["model"]) == models.digest(theirs.state_dict())


@pytest.mark.parametrize("epochs", [0, 1])
def test_a_replaced_file_of_weights_is_not_done_already(theirs, epochs):
    command = f"{THEIRS} --epochs {epochs}"
    ok(command)
    torch.save(models.build("resnet8", 2, seed=7).state_dict(), "theirs.pth")
    status, _, err = run(command)
    assert status == 2
    assert "theirs/dense.pt: belongs to another run, with another weights" in err


def test_weights_of_a_replaced_file_are_not_rewound_to(theirs):
    ok(f"{THEIRS} --epochs 1")
    ok("prune theirs/dense.pt --method magnitude")
    torch.save(models.build("resnet8", 2, seed=7).state_dict(), "theirs.pth")
    command = "retrain theirs/filters-magnitude-0.5.pt --schedule weight_rewind --epochs 1"
    status, _, err = run(command)
    assert status == 2
    assert "theirs.pth: holds other weights than the dense run" in err


def test_weights_of_other_code_can_be_pruned_and_retrained(theirs, workspace):
    ok(THEIRS)
    ok("prune theirs/dense.pt --method magnitude")
    out = ok("retrain theirs/filters-magnitude-0.5.pt --epochs 1 --seed 0 --jobs 1")
    assert out.count("without weight_rewind: ") == 1
    names = []
    for path in workspace.glob("theirs/filters-magnitude-0.5/*.pt"):
        names.append(path.name.split("-")[0])
    assert sorted(names) == ["finetune", "lr_rewind", "one_cycle"]


def test_torchvisions_weights_are_trained_on_a_folder(workspace, monkeypatch):
    def get_model(name, weights, num_classes=1000):
        """A smaller one, whose weights of ImageNet are those of seed 3."""
        resnet = torchvision.models.resnet
        network = resnet.ResNet(resnet.BasicBlock, [1, 1, 1, 1], num_classes)
        if weights == "IMAGENET1K_V1":
            models.initialise(network, 3)
        return network

    def noting(real, network, *more, **named):
        started_from.append(network.layer1[0].conv1.weight.detach().clone())
        return real(network, *more, **named)
    started_from = []
    monkeypatch.setattr(torchvision.models, "get_model", get_model)
    at_call(monkeypatch, train, "fit", 0, noting)
    ok("train --dataset folder --data-dir data --arch resnet18 --pretrained --epochs 1 --out new")
    published = get_model("resnet18", "IMAGENET1K_V1").layer1[0].conv1.weight
    trained = models.read("new/dense.pt")["model"]
    assert torch.equal(started_from[0], published)
    assert not torch.equal(trained["layer1.0.conv1.weight"], published)
    assert trained["fc.weight"].shape == (2, 512)


@pytest.mark.parametrize("name", ["dense", "filters-magnitude-0.5", "weights-magnitude-0.5"])
def test_evaluate_says_the_recorded_accuracy(workspace, name):
    checkpoint = models.read(f"run/{name}.pt")
    recorded = checkpoint.get("pruning", checkpoint["dense"])["test_accuracy"]
    out = ok(f"train --evaluate run/{name}.pt")
    assert out.startswith(f"run/{name}.pt: test {recorded:.2f} %, ")


def test_evaluate_needs_no_training_images(workspace):
    shutil.rmtree("data/train")
    ok("train --evaluate run/dense.pt --data-dir data")


def test_prune_writes_where_it_is_told(workspace):
    before = listing(workspace / "run")
    ok(PRUNE + " --out else/where")
    assert os.listdir("else/where") == ["filters-random-0.5.pt"]
    assert listing(workspace / "run") == before


@pytest.mark.parametrize("command, more", [
    (DENSE, "--method random"),
    ("prune run/dense.pt --method random", "--schedule finetune --epochs 1 --seed 0 --jobs 1")],
    ids=["train", "prune"])
@pytest.mark.parametrize("folder", ["new", "my run"])
def test_the_next_command_works_as_it_stands(workspace, command, more, folder):
    out = ok(command, "--out", folder)
    python, script, *words = shlex.split(out.split("Next: ")[1])
    assert python == "python"
    ok(script.removesuffix(".py"), *words, *more.split())


# ---- results: files and rows ---------------------------------------------------------------------

@pytest.fixture(scope="session")
def dry(tmp_path_factory):
    """The folder of the dry run: trained, pruned, all retrained by every schedule. Read only."""
    home = tmp_path_factory.mktemp("dry")
    with contextlib.chdir(home):
        ok("train --dry-run")
        ok("prune --dry-run")
        ok("retrain --dry-run --jobs 1 --seed 0 --schedule", *schedules.SCHEDULES)
    return home / "runs/shapes-resnet8-s0-dry"


def row_in(folder, schedule):
    """The row of the only retraining by `schedule` in a folder."""
    path, = folder.glob(f"{schedule}-t*.json")
    return json.loads(path.read_text())


@pytest.mark.parametrize("schedule", schedules.SCHEDULES)
def test_a_row_is_its_checkpoint_without_tensors(dry, schedule):
    paths = list(dry.rglob(f"{schedule}-t*.json"))
    assert len(paths) == 3
    for path in paths:
        checkpoint = models.read(path.with_suffix(".pt"))
        del checkpoint["model"]
        checkpoint.get("pruning", {}).pop("kept", None)
        assert json.loads(path.read_text()) == checkpoint


@pytest.mark.parametrize("schedule", schedules.SCHEDULES)
def test_a_row_says_how_it_was_retrained(dry, schedule):
    pruned_one = models.read(dry / "filters-magnitude-0.5.pt")
    found = row_in(dry / "filters-magnitude-0.5", schedule)["retraining"]
    wanted = {"network": models.digest(pruned_one["model"]), "schedule": schedule, "budget": 1,
              "seed": 0, "lr": None, "end_lr": None, "batch_size": 8, "weight_decay": 5e-4,
              "precision": "fp32", "data": pruned_one["dense"]["data"]}
    for key, value in wanted.items():
        assert found[key] == value, key
    assert found["cycle_momentum"] is (True if schedule == "one_cycle" else None)
    assert found["curve"]["epoch"] == list(range(1, found["epochs"] + 1))
    assert found["test_accuracy"] == found["curve"]["test_accuracy"][-1]


@pytest.mark.parametrize("schedule, epochs", [
    pytest.param("scratch", 1, id="t"),
    pytest.param("scratch_e", 2 + 1, id="T-and-t"),
    pytest.param("scratch_b", 3, id="as-many-MACs")])          # 2 * 6,884,992 / 3,567,232 = 3.86
def test_how_long_scratch_trains(dry, schedule, epochs):
    found = row_in(dry / "filters-magnitude-0.5", schedule)
    assert (found["dense"]["macs"], found["pruning"]["macs"]) == (6_884_992, 3_567_232)
    assert found["retraining"]["epochs"] == epochs


@pytest.mark.parametrize("schedule, lr, end_lr, cycle_momentum, first_lr", [
    ("finetune", None, 0.2, None, 0.2),
    ("slr", 0.3, None, None, 0.3),
    ("one_cycle", 0.3, 0.2, False, 0.3)])
def test_a_row_has_the_options_that_its_schedule_uses(workspace, schedule, lr, end_lr,
                                                      cycle_momentum, first_lr):
    ok("retrain run/filters-magnitude-0.5.pt --seed 0 --jobs 1 --epochs 2 --lr 0.3 --end-lr 0.2 "
       "--no-cycle-momentum --schedule one_cycle", schedule)
    found = row_in(workspace / "run/filters-magnitude-0.5", schedule)["retraining"]
    assert (found["lr"], found["end_lr"]) == (lr, end_lr)
    assert found["cycle_momentum"] is cycle_momentum
    assert found["curve"]["lr"][0] == first_lr


def test_a_retrained_checkpoint_has_the_accuracy_of_its_row(dry):
    path = next(dry.glob("filters-random-0.5/one_cycle-*.pt"))
    accuracy = json.loads(path.with_suffix(".json").read_text())["retraining"]["test_accuracy"]
    assert f"test {accuracy:.2f} %, 38,314 parameters" in ok("train --evaluate", path)


@pytest.mark.parametrize("source, folder", [
    ("run/filters-magnitude-0.5.pt", "run/filters-magnitude-0.5"),
    ("run/dense.pt", "run")])
def test_where_a_result_lies(workspace, source, folder):
    before = set(listing(workspace))
    ok("retrain --schedule slr --epochs 2 --seed 7 --jobs 1", source)
    made = set(listing(workspace)) - before - {str(workspace / folder)}
    name = re.escape(str(workspace / folder)) + r"/slr-t2-s7-[0-9a-f]{8}"
    one, two = sorted(made)
    assert re.fullmatch(name + r"\.json", one)
    assert re.fullmatch(name + r"\.pt", two)


def test_the_same_command_again_changes_nothing(workspace):
    command = "retrain --schedule finetune weight_rewind --epochs 1 --seed 0 --jobs 1"
    sources = glob.glob("run/filters-*.pt")
    ok(command, *sources)
    before = listing(workspace)
    assert glob.glob("run/filters-*.pt") == sources
    assert ok(command, *sources).count(": done already, test ") == 2
    assert listing(workspace) == before


ONE_RUN = "retrain run/filters-magnitude-0.5.pt --schedule finetune --epochs 1 --seed 0 --jobs 1"


def test_what_is_pruned_already_is_left_as_it_is(workspace):
    before = listing(workspace)
    assert ": done already, test " in ok("prune run/dense.pt --method magnitude")
    assert listing(workspace) == before


def test_a_missing_row_is_written_again(workspace):
    ok(ONE_RUN)
    path, = workspace.rglob("*.json")
    text = path.read_bytes()
    path.unlink()
    ok(ONE_RUN)
    assert path.read_bytes() == text


@pytest.mark.parametrize("suffix", [
    ".state.pt", ".json.0123abcd.tmp", ".pt.0123abcd.tmp", ".state.pt.0123abcd.tmp"])
def test_leftovers_of_a_finished_run_disappear(workspace, suffix):
    ok(ONE_RUN)
    path, = workspace.rglob("*.json")
    leftover = path.with_name(path.stem + suffix)
    leftover.write_bytes(b"half a file")
    ok(ONE_RUN)
    assert not leftover.exists()


# ---- results: many runs --------------------------------------------------------------------------

@pytest.mark.parametrize("structure, twice", [("filters", 0.5), ("weights", 0.75)])
def test_rounds_make_what_is_made_by_hand(workspace, tmp_path, monkeypatch, structure, twice):
    hand = shutil.copytree(workspace, tmp_path / "hand")
    options = "--schedule lr_rewind --epochs 1 --seed 1 --jobs 1"
    ok(f"retrain run/{structure}-magnitude-0.5.pt {options} --rounds 2")
    monkeypatch.chdir(hand)
    ok(f"retrain run/{structure}-magnitude-0.5.pt {options}")
    retrained, = glob.glob(f"run/{structure}-*/*.pt")
    ok(f"prune {retrained} --structure {structure} --method magnitude --sparsity {twice}")
    again, = glob.glob(f"run/{structure}-*/*/*.pt")
    ok(f"retrain {again} {options}")
    assert results("run") == results(workspace / "run")


def test_rounds_take_the_same_share_of_the_weights_that_are_left(workspace):
    ok("retrain run/weights-magnitude-0.5.pt --schedule weight_rewind --epochs 2 --seed 0 --jobs 1 "
       "--rounds 3")
    found = {}
    for path in workspace.rglob("weight_rewind-*.pt"):
        checkpoint = models.read(path, "retraining")
        zeros = 0
        for name in models.weight_names(models.restore(checkpoint), include_linear=False):
            zeros += (checkpoint["model"][name] == 0).sum().item()
        found[checkpoint["pruning"]["round"]] = (checkpoint["pruning"]["sparsity"], zeros)
    assert found == {1: (0.5, 37_080), 2: (0.75, 55_620), 3: (0.875, 64_890)}       # of 74,160


def disk_full(real, *args, **named):
    raise OSError("No space left on device")


def test_a_run_that_fails_does_not_stop_the_others(workspace, monkeypatch):
    command = "retrain run/filters-magnitude-0.5.pt --schedule finetune slr --epochs 1 --seed 0 1"
    at_call(monkeypatch, train, "fit", 1, disk_full)
    status, out, err = run(f"{command} --jobs 1")
    failed, last = err.splitlines()
    assert status == 2
    assert failed == "run/filters-magnitude-0.5.pt slr t=1 seed=0: No space left on device"
    assert last.endswith("run the same command again to retry them")
    assert re.findall(r"(\d) of 4 runs left", out) == ["3", "2", "1", "0"]
    assert "\n3 retrainings, " in out
    again = ok(f"{command} --jobs 1")
    assert again.count("done already") == 3
    assert "\n4 retrainings, " in again


def test_a_failing_run_is_not_survived_by_one_of_several_processes(monkeypatch):
    """It would wait for ever for the others, or they for it."""
    monkeypatch.setattr(retrain, "retrain", lambda *what: disk_full(None))
    with pytest.raises(OSError):
        retrain.perform([retrain.Run("", "slr", 1, 0)], None, CPU._replace(world=2))


@pytest.fixture
def asked(monkeypatch):
    """The runs that command lines ask for, a list; none is made."""
    runs = []
    monkeypatch.setattr(retrain, "retrain", lambda run, args, machine: runs.append(run))
    return runs


@pytest.mark.parametrize("parts", [1, 2, 3, 7])
def test_shares_are_all_runs_each_once(workspace, asked, parts):
    command = "retrain run/filters-magnitude-0.5.pt run/dense.pt --seed 0 1 2 --jobs 1"
    ok(command)
    every = list(asked)
    asked.clear()
    for part in range(parts):
        assert "- Pictures" not in ok(f"{command} --share {part}/{parts}")
    assert len(every) == 3 * (4 + 1)
    assert sorted(asked) == sorted(every)


@pytest.mark.parametrize("source, names", [
    ("filters-magnitude-0.5", ["finetune", "weight_rewind", "lr_rewind", "one_cycle"]),
    ("dense", ["one_cycle"])])
def test_default_arms(workspace, asked, source, names):
    ok(f"retrain run/{source}.pt --jobs 1")
    found = [(run.schedule, run.budget, run.seed) for run in asked]
    assert sorted(found) == sorted(itertools.product(names, [1], [0, 1, 2]))


def test_what_is_pruned_again_names_the_retrained_network(workspace):
    ok("retrain run/filters-magnitude-0.5.pt --schedule slr --seed 0 --jobs 1")
    path, = workspace.glob("run/filters-magnitude-0.5/slr-*.pt")
    ok("prune", path, "--method", "magnitude")
    again = models.read(path.with_suffix("") / "filters-magnitude-0.5.pt")
    assert again["pruning"]["source"] == models.digest(models.read(path)["model"])


def test_prune_says_what_it_made(workspace):
    out = ok("prune run/dense.pt --method random")
    made = models.read("run/filters-random-0.5.pt")["pruning"]
    assert f": written, test {made['test_accuracy']:.2f} %, with BN statistics re-estimated " in out
    assert f"re-estimated {made['bn_test_accuracy']:.2f} %, dense " in out
    assert f"; {made['nonzero']:,} of " in out


def test_a_run_that_is_asked_for_twice_is_made_once(workspace, asked):
    ok("retrain run/dense.pt --schedule slr --seed 1 1 --jobs 1")
    assert len(asked) == 1


def test_default_arms_without_snapshots_do_not_rewind_weights(workspace, asked):
    for path in workspace.glob("run/epoch-*.pt"):
        path.unlink()
    out = ok("retrain run/filters-magnitude-0.5.pt --jobs 1 --seed 0")
    assert [run.schedule for run in asked] == ["finetune", "lr_rewind", "one_cycle"]
    assert "without weight_rewind: " in out


@pytest.mark.parametrize("there, said", [
    ("epoch-001.pt", "there is epoch-001.pt"),
    (None, "there is none")])
def test_weight_rewinding_without_its_snapshot_is_refused_at_once(workspace, asked, there, said):
    for path in workspace.glob("run/epoch-*.pt"):
        if path.name != there:
            path.unlink()
    status, _, err = run("retrain run/filters-magnitude-0.5.pt --jobs 1 --epochs 1 "
                         "--schedule finetune weight_rewind")
    assert (status, asked) == (2, [])
    assert "weight_rewind with 1 epochs needs epoch-002.pt of the dense run" in err
    assert err.endswith(f"{said}\n")


@pytest.mark.parametrize("cores, jobs", [(2, 2), (64, 5)])
def test_default_jobs_are_the_cores_or_the_runs_that_are_left(workspace, monkeypatch, cores, jobs):
    ok(ONE_RUN)
    started = []
    monkeypatch.setattr(retrain, "cores", lambda: cores)
    monkeypatch.setattr(retrain, "in_processes",
                        lambda jobs, argv, share, machine: started.append(jobs) or [])
    ok("retrain run/filters-magnitude-0.5.pt --schedule finetune slr --epochs 1")
    assert started == [jobs]


@pytest.mark.parametrize("device, jobs", [("cpu", 3), ("cuda", 4), ("cuda:1", 1)])
def test_default_jobs_on_a_gpu_are_the_gpus(study, monkeypatch, device, jobs):
    monkeypatch.setattr(retrain, "cores", lambda: 3)
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 4)
    args = types.SimpleNamespace(lr=None, end_lr=None, cycle_momentum=True, rounds=1)
    runs = []
    for seed in range(9):
        runs.append(retrain.Run(f"{study}/run/filters-magnitude-0.5.pt", "slr", 1, seed))
    machine = CPU._replace(device=torch.device(device))
    assert retrain.default_jobs(runs, args, machine) == jobs


@pytest.fixture
def children(monkeypatch):
    """Processes that end at once, in place of real ones: a list of those that were started. What
    `children.says` is they write to stderr, and end with status `children.status`."""
    started = types.SimpleNamespace(all=[], says=b"", status=0)

    class Child:
        def __init__(self, command, env, stderr):
            self.command = command
            self.env = env
            self.returncode = started.status
            stderr.write(started.says)
            started.all.append(self)

        def wait(self):
            return self.returncode

        poll = wait
    monkeypatch.setattr(subprocess, "Popen", Child)
    return started


def after(flag, child):
    """What stands behind the last `flag` of a process's command line."""
    place = len(child.command) - child.command[::-1].index(flag)
    return child.command[place]


@pytest.mark.parametrize("cores, given, threads", [(9, None, "4"), (1, None, "1"), (9, "3", "3")])
def test_processes_share_the_cores(children, monkeypatch, cores, given, threads):
    monkeypatch.delenv("OMP_NUM_THREADS")
    if given:
        monkeypatch.setenv("OMP_NUM_THREADS", given)
    monkeypatch.setattr(retrain, "cores", lambda: cores)
    assert retrain.in_processes(2, ["x.pt"], (0, 1), CPU) == []
    assert [child.env["OMP_NUM_THREADS"] for child in children.all] == [threads, threads]


def test_processes_take_one_gpu_after_the_other(children, monkeypatch):
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
    gpu = CPU._replace(device=torch.device("cuda"))
    retrain.in_processes(3, ["x.pt"], (0, 1), gpu)
    found = [after("--device", child) for child in children.all]
    assert found == ["cuda:0", "cuda:1", "cuda:0"]


def test_processes_divide_a_share(children):
    retrain.in_processes(2, ["x.pt", "--share", "1/3"], (1, 3), CPU)
    numbers = list(range(60))
    taken = []
    for child in children.all:
        assert after("--jobs", child) == "1"
        first, every = map(int, after("--share", child).split("/"))
        taken += numbers[first::every]
    assert sorted(taken) == numbers[1::3]


SEE_ABOVE = (b"retrain.py: error: some runs failed, see above; "
             b"run the same command again to retry them\n")


@pytest.mark.parametrize("says, status, failed, warnings", [
    pytest.param(b"", 0, [], "", id="succeeds"),
    pytest.param(b"x.pt slr: No space\n" + SEE_ABOVE, 2, 2 * ["x.pt slr: No space"], "",
                 id="fails"),
    pytest.param(b"", -9, 2 * ["a process ended with status -9"], "", id="killed"),
    pytest.param(b"a warning\n", 0, [], 2 * "a warning\n", id="warns")])
def test_what_processes_say_of_failures(children, capsys, says, status, failed, warnings):
    children.says = says
    children.status = status
    assert retrain.in_processes(2, ["x.pt"], (0, 1), CPU) == failed
    assert capsys.readouterr().err == warnings


# ---- report: rows that are read ------------------------------------------------------------------

def test_rows_are_found_in_all_folders_below(dry):
    found = retrain.read_rows([dry])
    assert len(found) == 3 * len(schedules.SCHEDULES)
    methods = [made["pruning"]["method"] for made in found if "pruning" in made]
    assert methods == 10 * ["magnitude"] + 10 * ["random"]             # in the order of the paths


def test_a_folder_named_twice_counts_once(dry):
    twice = [dry, f"{dry}/../{dry.name}", dry / "filters-random-0.5"]
    assert len(retrain.read_rows(twice)) == 3 * len(schedules.SCHEDULES)


def damaged(text, kind):
    """The text of a row, damaged."""
    made = json.loads(text)
    if kind in ("format", "dense", "retraining"):
        del made[kind]
    elif kind == "older":
        made["format"] = 2
    elif kind == "nan":
        made["retraining"]["test_accuracy"] = math.nan
    elif kind == "infinite":
        made["retraining"]["test_accuracy"] = math.inf
    return json.dumps(made).encode()


@pytest.mark.parametrize("change", [
    pytest.param(lambda text: b"", id="empty"),
    pytest.param(lambda text: text[:-20], id="truncated"),
    pytest.param(lambda text: text + text, id="twice"),
    pytest.param(lambda text: b"\xff" + text, id="not-utf-8"),
    pytest.param(lambda text: b"[" * 99_999, id="too-deep"),
    pytest.param(lambda text: damaged(text, "older"), id="older"),
    pytest.param(lambda text: damaged(text, "format"), id="without-format"),
    pytest.param(lambda text: damaged(text, "dense"), id="without-dense"),
    pytest.param(lambda text: damaged(text, "nan"), id="nan"),
    pytest.param(lambda text: damaged(text, "infinite"), id="infinite")])
def test_what_is_no_row_is_refused(dry, tmp_path, change):
    real = next(dry.glob("*.json"))
    shutil.copy(real, tmp_path)
    path = tmp_path / "below" / real.name
    path.parent.mkdir()
    path.write_bytes(change(real.read_bytes()))
    status, _, err = run("retrain --report", tmp_path)
    assert status == 2
    assert err.endswith(f": error: {path}: not a result row of format 3; remove it\n")


@pytest.mark.parametrize("text", ["[]", '{"loss": NaN}', "// settings", ""])
def test_json_of_other_programs_is_passed_over(dry, tmp_path, text):
    real = next(dry.glob("*.json"))
    shutil.copy(real, tmp_path)
    (tmp_path / "package.json").write_text(text)
    rows = retrain.read_rows([tmp_path])
    assert rows == [json.loads(real.read_text())]


def test_the_report_is_printed_again_from_the_rows(dry):
    assert ok("retrain --report", dry) == retrain.report(retrain.read_rows([dry])) + "\n"


# ---- report: claims ------------------------------------------------------------------------------

def student(degrees):
    """The 97.5 % quantile, by integration: t = sqrt(f) tan(angle) has the density cos(angle)^(f-1),
    f degrees."""
    angle = np.linspace(0, np.pi / 2, 100_001)
    mass = np.cumsum(np.cos(angle) ** (degrees - 1))
    found = np.interp(0.95, mass / mass[-1], angle)
    return math.sqrt(degrees) * math.tan(found)


def test_quantiles_are_students():
    for degrees, quantile in enumerate(retrain.STUDENT, 1):
        assert student(degrees) == pytest.approx(quantile, abs=2e-3)


# Of mean ± sd with n = 3 the interval is mean ± 4.303 sd / sqrt(3): ± 0.248 where sd is 0.1.
@pytest.mark.parametrize("mean, sd, relation, words", [
    pytest.param(0.6, 0.1, ">", "**yes** +0.60 [+0.35, +0.85], n=3", id="larger"),
    pytest.param(0.2, 0.1, ">", "not decided +0.20 [-0.05, +0.45], n=3", id="around-zero"),
    pytest.param(-0.2, 0.1, ">", "not decided -0.20 [-0.45, +0.05], n=3", id="around-zero-below"),
    pytest.param(-0.6, 0.1, ">", "**reversed** -0.60 [-0.85, -0.35], n=3", id="reversed"),
    pytest.param(0.2, 0.1, "=", "**yes** +0.20 [-0.05, +0.45], n=3", id="inside"),
    pytest.param(-0.2, 0.1, "=", "**yes** -0.20 [-0.45, +0.05], n=3", id="inside-below"),
    pytest.param(0.3, 0.1, "=", "not decided +0.30 [+0.05, +0.55], n=3", id="over-the-edge"),
    pytest.param(-0.3, 0.1, "=", "not decided -0.30 [-0.55, -0.05], n=3", id="under-the-edge"),
    pytest.param(0.0, 1.0, "=", "not decided +0.00 [-2.48, +2.48], n=3", id="all-around"),
    pytest.param(0.8, 0.1, "=", "**no** +0.80 [+0.55, +1.05], n=3", id="outside"),
    pytest.param(-0.8, 0.1, "=", "**no** -0.80 [-1.05, -0.55], n=3", id="outside-below")])
def test_verdict(mean, sd, relation, words):
    assert retrain.verdict([mean - sd, mean, mean + sd], relation) == words


@pytest.mark.parametrize("values, words", [
    ([], "–"),
    ([5.0], "not decided +5.00, n=1"),
    ([5.0, 5.0], "not decided +5.00, n=2")], ids=["none", "one", "two"])
@pytest.mark.parametrize("relation", [">", "="])
def test_fewer_than_three_decide_nothing(values, words, relation):
    assert retrain.verdict(values, relation) == words


# The interval is 0.5 ± t sd / sqrt(n), sd = 0.5 sqrt(n / (n - 1)).
@pytest.mark.parametrize("n, half", [
    (4, 3.182 * 0.5 / math.sqrt(3)),
    (10, 2.262 * 0.5 / math.sqrt(9)),
    (18, 2.262 * 0.5 / math.sqrt(17))])                             # the last quantile serves
def test_more_repetitions_narrow_the_interval(n, half):
    found = retrain.verdict(n // 2 * [0.0, 1.0], ">")
    assert found.endswith(f"+0.50 [{0.5 - half:+.2f}, {0.5 + half:+.2f}], n={n}")


# Welch's degrees of freedom, worked by hand. Between whole ones the quantiles' straight line lies a
# little above Student's curve.
@pytest.mark.parametrize("first, last, error, degrees", [
    pytest.param([4, 5, 6], [1, 2, 3], math.sqrt(2 / 3), 4, id="equal-spread-as-student"),
    pytest.param([5, 5, 5], [1, 2, 3], math.sqrt(1 / 3), 2, id="only-the-last-varies"),
    pytest.param([4, 5, 6], [0, 2, 4], math.sqrt(5 / 3), 50 / 17, id="other-spreads"),
    pytest.param([4, 5, 6], [1, 1, 3, 3], math.sqrt(2 / 3), 5 - 1 / 5, id="other-numbers")])
def test_change_between_lengths(first, last, error, degrees):
    words = retrain.changed(first, last)
    mean, low, high = map(float, re.findall(r"[+-][0-9.]+", words))
    half = student(degrees) * error
    assert mean == -3
    assert (low, high) == pytest.approx((-3 - half, -3 + half), abs=0.06)


@pytest.mark.parametrize("first, last, words", [
    ([], [1.0, 1.0, 1.0], "–"),
    ([1.0, 1.0, 1.0], [], "–"),
    ([1.0, 2.0], [1.0, 2.0, 3.0], "+0.50"),
    ([1.0, 2.0, 3.0], [5.0], "+3.00"),
    ([1.0, 1.0, 1.0], [2.0, 2.0, 2.0], "+1.00 [+1.00, +1.00]")])
def test_change_of_few_or_equal_values(first, last, words):
    assert retrain.changed(first, last) == words


def test_a_side_is_a_difference_of_differences():
    accuracies = {"a": {0: 5.0, 1: 7.0, 2: 9.0}, "b": {0: 1.0, 1: 2.0}, "c": {1: 10.0, 2: 0.0},
                  "d": {1: 4.0, 2: 0.0, 3: 0.0}}
    assert retrain.values_of(accuracies, "a") == {0: 5.0, 1: 7.0, 2: 9.0}
    assert retrain.values_of(accuracies, ("a", "b")) == {0: 4.0, 1: 5.0}
    assert retrain.values_of(accuracies, (("a", "b"), ("c", "d"))) == {1: 5.0 - 6.0}
    assert retrain.values_of(accuracies, ("a", ("b", "missing"))) == {}


# ---- report: tables ------------------------------------------------------------------------------

@pytest.fixture
def row(dry):
    """A function that makes a row, row("one_cycle", [70.0, 80.0]), of a real one: so many epochs
    with these test accuracies, the dense network's being 90. method None: retrained unpruned."""
    real = row_in(dry / "filters-magnitude-0.5", "finetune")
    real["dense"]["test_accuracy"] = 90.0
    real["pruning"]["test_accuracy"] = 20.0
    real["pruning"]["bn_test_accuracy"] = 30.0

    def make(schedule, accuracies, seed=0, method="magnitude"):
        made = copy.deepcopy(real)
        made["pruning"]["method"] = method
        if method is None:
            del made["pruning"]
        retraining = made["retraining"]
        retraining["schedule"] = schedule
        retraining["seed"] = seed
        retraining["budget"] = len(accuracies)
        retraining["epochs"] = len(accuracies)
        retraining["curve"]["test_accuracy"] = accuracies
        retraining["test_accuracy"] = accuracies[-1]
        return made
    return make


def reported(rows):
    """The lines of the report."""
    return retrain.report(rows).splitlines()


HEADING = "| resnet8 on shapes, pruned: filters 0.5 | magnitude t=1 |"


def test_a_table_gives_mean_and_standard_deviation(row):
    values = [80.0, 81.0, 85.0]
    rows = []
    for seed, value in enumerate(values):
        rows.append(row("slr", [value], seed))
    mean = statistics.mean(values)
    sd = statistics.stdev(values)
    assert f"| `slr` | {mean:.2f} ± {sd:.2f} ({mean - 90:+.2f}, n=3) |" in reported(rows)


def test_a_table_gives_the_networks_as_they_were(row):
    lines = reported([row("slr", [80.0], 0), row("slr", [80.0], 1)])
    assert "| `dense` | 90.00 (+0.00, n=1) |" in lines            # one network, retrained twice
    assert "| not retrained | 20.00 (-70.00, n=1) |" in lines
    assert "| only BN re-estimated | 30.00 (-60.00, n=1) |" in lines
    share = round(100 * 38_314 / 75_290), round(100 * 3_567_232 / 6_884_992)
    assert "| parameters, MACs left | {}%, {}% |".format(*share) in lines


def test_claims_are_paired_over_repetitions(row):
    """By hand: one_cycle - finetune is 2, 1 and 4."""
    rows = [row("one_cycle", [85.0], 2), row("finetune", [80.0], 1), row("one_cycle", [80.0], 0),
            row("finetune", [81.0], 2), row("one_cycle", [81.0], 1), row("finetune", [78.0], 0)]
    wanted = "| `one_cycle > finetune` | not decided +2.33 [-1.46, +6.13], n=3 |"
    assert wanted in reported(rows)


@pytest.mark.parametrize("key, values", [
    pytest.param(("dense", "digest"), ("a", "b", "c"), id="dense-network"),
    pytest.param(("pruning", "seed"), (0, 1, 2), id="pruning-seed"),
    pytest.param(("retraining", "seed"), (0, 1, 2), id="retraining-seed")])
def test_what_makes_a_repetition(row, key, values):
    rows = []
    for place, value in enumerate(values):
        for schedule, accuracy in (("slr", 80.0), ("finetune", 70.0)):
            made = row(schedule, [accuracy + place])
            made[key[0]][key[1]] = value
            made["retraining"]["network"] = f"{key[:2]} {value}"
            rows.append(made)
    assert "| `slr > finetune` | **yes** +10.00 [+10.00, +10.00], n=3 |" in reported(rows)


def test_main_arms_are_shown_over_the_repetitions_that_all_have(row):
    rows = []
    for schedule, seeds in (("finetune", [0, 1, 2, 3]), ("slr", [1, 2]), ("one_cycle", [0, 1, 2]),
                            ("linear", [0, 1])):
        for seed in seeds:
            rows.append(row(schedule, [80.0 + seed], seed))
    lines = reported(rows)
    for schedule in ("finetune", "slr", "one_cycle"):
        assert f"| `{schedule}` | 81.50 ± 0.71 (-8.50, n=2) |" in lines
    assert "| `linear` | 81.00 (-9.00, n=1) |" in lines


def test_other_arms_do_not_take_repetitions_away(row):
    rows = [row("slr", [80.0], 0), row("slr", [82.0], 1), row("scratch", [70.0], 2)]
    lines = reported(rows)
    assert "| `slr` | 81.00 ± 1.41 (-9.00, n=2) |" in lines
    assert "| `scratch` | 70.00 (-20.00, n=1) |" in lines


@pytest.mark.parametrize("keys, other, name", [
    (("dense", "recipe", "epochs"), 3, "epochs"),
    (("dense", "recipe", "batch_size"), 4, "batch size"),
    (("dense", "recipe", "weight_decay"), 0.1, "weight decay"),
    (("dense", "recipe", "lr"), 0.2, "lr"),
    (("dense", "recipe", "schedule"), "cosine", "schedule"),
    (("dense", "recipe", "milestones"), [], "milestones"),
    (("dense", "recipe", "subset"), 9, "subset"),
    (("dense", "recipe", "pretrained"), "x.pt", "pretrained"),
    (("dense", "data"), "other images", "dense images"),
    (("dense", "precision"), "bf16", "dense precision"),
    (("retraining", "data"), "other images", "images"),
    (("retraining", "precision"), "bf16", "precision")])
def test_rows_of_other_conditions_are_not_averaged(row, keys, other, name):
    one = row("slr", [80.0])
    two = row("slr", [70.0], seed=1)
    holder = two
    for key in keys[:-1]:
        holder = holder[key]
    usual = holder[keys[-1]]
    holder[keys[-1]] = other
    lines = reported([one, two])
    for value, accuracy in ((usual, "80.00 (-10.00, n=1)"), (other, "70.00 (-20.00, n=1)")):
        heading = f"| resnet8 on shapes, {name} {value}, pruned: filters 0.5 | magnitude t=1 |"
        table = lines[lines.index(heading):]
        assert f"| `slr` | {accuracy} |" in table[:table.index("")]


def test_networks_have_tables_of_their_own(row):
    one = row("slr", [80.0])
    two = row("slr", [70.0])
    two["arch"] = "resnet14"
    two["dense"]["recipe"]["epochs"] = 3            # of another network: no reason to name it
    lines = reported([one, two])
    assert HEADING in lines
    assert HEADING.replace("resnet8", "resnet14") in lines


def test_conditions_that_all_rows_share_are_not_named(row):
    assert HEADING in reported([row("finetune", [80.0]), row("slr", [80.0], seed=1)])


@pytest.mark.parametrize("changes, text", [
    ({"plan": "B", "sparsity": None}, "filters planB"),
    ({"sparsity": [0.1, 0.2, 0.3]}, "filters 0.1_0.2_0.3"),
    ({"scope": "global"}, "filters 0.5-global"),
    ({"structure": "weights", "scope": "layer"}, "weights 0.5-layer"),
    ({"structure": "weights", "scope": "global", "include_linear": True}, "weights 0.5-linear")])
def test_headings_name_what_was_pruned(row, changes, text):
    made = row("slr", [80.0])
    made["pruning"].update(changes)
    heading = f"| resnet8 on shapes, pruned: {text} | magnitude t=1 |"
    assert heading in reported([made])


HALF = "filters-magnitude-0.5"


@pytest.mark.parametrize("rounds, earlier, text", [
    pytest.param(2, [HALF, "slr-t1"], "round 2", id="usual"),
    pytest.param(3, [HALF, "slr-t1", HALF, "slr-t1"], "round 3", id="usual-of-three"),
    pytest.param(2, [HALF], f"round 2 after {HALF}", id="not-retrained"),
    pytest.param(2, [HALF, "slr-t9"], f"round 2 after {HALF}, slr-t9", id="longer"),
    pytest.param(2, [HALF, "finetune-t1"], f"round 2 after {HALF}, finetune-t1", id="otherwise"),
    pytest.param(2, ["filters-random-0.5", "slr-t1"],
                 "round 2 after filters-random-0.5, slr-t1", id="other-criterion"),
    pytest.param(2, ["filters-magnitude-0.1", "slr-t1"],
                 "round 2 after filters-magnitude-0.1, slr-t1", id="other-share"),
    pytest.param(1, ["slr-t1"], "after slr-t1", id="dense-network-retrained")])
def test_headings_name_what_went_before(row, rounds, earlier, text):
    made = row("slr", [80.0])
    made["pruning"].update(round=rounds, earlier=earlier)
    heading = f"| resnet8 on shapes, pruned: filters 0.5 {text} | magnitude t=1 |"
    assert heading in reported([made])


@pytest.mark.parametrize("first, text", [
    (0.5, "round 3"),
    (0.4, "round 3 after weights-magnitude-0.4, slr-t1, weights-magnitude-0.75, slr-t1")])
def test_headings_of_weights_pruned_by_as_much_again(row, first, text):
    made = row("slr", [80.0])
    earlier = [f"weights-magnitude-{first}", "slr-t1", "weights-magnitude-0.75", "slr-t1"]
    made["pruning"].update(structure="weights", scope="global", sparsity=0.875, round=3,
                           earlier=earlier)
    heading = f"| resnet8 on shapes, pruned: weights 0.875 {text} | magnitude t=1 |"
    assert heading in reported([made])


@pytest.mark.parametrize("schedule, lr, end_lr, cycle_momentum, arm", [
    ("slr", None, None, None, "slr"),
    ("slr", 0.2, None, None, "slr/lr=0.2"),
    ("finetune", None, 0.01, None, "finetune/end=0.01"),
    ("one_cycle", None, None, True, "one_cycle"),
    ("one_cycle", None, None, False, "one_cycle/flat-momentum"),
    ("one_cycle", 0.2, 0.0, False, "one_cycle/lr=0.2/end=0/flat-momentum")])
def test_arms_are_named_by_what_is_not_as_published(row, schedule, lr, end_lr, cycle_momentum, arm):
    made = row(schedule, [80.0])
    made["retraining"].update(lr=lr, end_lr=end_lr, cycle_momentum=cycle_momentum)
    assert f"| `{arm}` | 80.00 (-10.00, n=1) |" in reported([made])


def test_unpruned_arms_stand_beside_pruned_ones(row):
    lines = reported([row("finetune", [70.0]), row("one_cycle", [80.0]),
                      row("finetune", [91.0], method=None), row("one_cycle", [93.0], method=None)])
    table = lines[lines.index(HEADING):]
    assert "| `finetune/unpruned` | 91.00 (+1.00, n=1) |" in table
    assert "| `one_cycle > one_cycle/unpruned` (exploratory) | not decided -13.00, n=1 |" in table
    claim = "`one_cycle - finetune > one_cycle/unpruned - finetune/unpruned`"
    assert f"| {claim} | not decided +8.00, n=1 |" in table
    assert "pruned: nothing" not in "\n".join(lines)


def test_unpruned_arms_that_are_not_as_published_stand_there_too(row):
    arms = [row("slr", [80.0]), row("slr", [92.0], method=None)]
    for made in arms:
        made["retraining"]["lr"] = 0.2
    assert "| `slr/lr=0.2/unpruned` | 92.00 (+2.00, n=1) |" in reported(arms)


def test_unpruned_rows_alone_have_a_table(row):
    lines = reported([row("finetune", [91.0], method=None)])
    assert "| resnet8 on shapes, pruned: nothing | t=1 |" in lines
    assert "| `finetune` | 91.00 (+1.00, n=1) |" in lines


def test_arms_are_compared_with_those_pruned_at_random(row):
    lines = reported([row("finetune", [70.0]), row("one_cycle", [80.0]),
                      row("finetune", [60.0], method="random"),
                      row("one_cycle", [75.0], method="random")])
    for line in (
            "| claim | magnitude t=1 | random t=1 |",
            "| `one_cycle/random > finetune` | not decided +5.00, n=1 | – |",
            "| `one_cycle > one_cycle/random` | not decided +5.00, n=1 | – |",
            "| `finetune - finetune/random > one_cycle - one_cycle/random` | not decided +5.00, n=1"
            " | – |"):
        assert line in lines


def test_arms_are_compared_with_those_of_the_least_budget(row):
    lines = reported([row("one_cycle", [70.0]), row("one_cycle", [60.0, 80.0]),
                      row("finetune", [75.0]), row("finetune", [74.0, 76.0])])
    for line in (
            "| claim | magnitude t=1 | magnitude t=2 |",
            "| `one_cycle/first > finetune` (exploratory) | – | not decided -6.00, n=1 |",
            "| `finetune > finetune/first` | – | not decided +1.00, n=1 |"):
        assert line in lines


def test_the_start_of_a_longer_finetune_run_serves_a_shorter_budget(row):
    lines = reported([row("finetune", [75.0, 76.0, 77.0]), row("slr", [80.0, 81.0]),
                      row("slr", [80.0, 81.0, 82.0])])
    assert "| `finetune` | 76.00 (-14.00, n=1) | 77.00 (-13.00, n=1) |" in lines
    assert "| `slr > finetune` | not decided +5.00, n=1 | not decided +5.00, n=1 |" in lines


def test_budgets_of_other_networks_are_no_columns(row):
    other = row("slr", [80.0])
    other["arch"] = "resnet14"
    lines = reported([row("finetune", [75.0, 76.0]), other])
    assert HEADING.replace("t=1", "t=2") in lines


def test_results_of_networks_pruned_otherwise_are_not_averaged(row):
    other = row("slr", [80.0])
    other["retraining"]["network"] = "0123456789abcdef"
    with pytest.raises(Refused, match="two results of filters 0.5 magnitude, slr, seed 0"):
        retrain.report([row("slr", [80.0]), other])


@pytest.mark.parametrize("key, name, heading", [
    ("retraining", "test_data", "test images b"),
    ("pruning", "calibration_images", "ranked by b of c"),
    ("pruning", "data", "ranked by a of b")])
def test_other_images_have_a_table_of_their_own(row, key, name, heading):
    rows = []
    for seed, value in enumerate("ab"):
        made = row("slr", [80.0], seed)
        made["retraining"]["test_data"] = "a"
        made["pruning"].update(method="taylor", calibration_images="a", data="a")
        if name == "calibration_images":
            made["pruning"]["data"] = "c"
        made[key][name] = value
        rows.append(made)
    text = retrain.report(rows)
    assert f"| resnet8 on shapes, {heading}, pruned: filters 0.5 |" in text
    assert "n=2" not in text


def test_rows_without_a_record_of_their_test_images_stay_together(row):
    old = row("slr", [80.0], 0)
    new = row("slr", [80.0], 1)
    old["retraining"].pop("test_data", None)
    new["retraining"]["test_data"] = "a"
    assert "| `slr` | 80.00 ± 0.00 (-10.00, n=2) |" in reported([old, new])


def test_a_pruning_seed_that_changes_nothing_makes_no_repetition(row):
    again = row("slr", [80.0])
    again["pruning"]["seed"] = 1
    assert "| `slr` | 80.00 (-10.00, n=1) |" in reported([row("slr", [80.0]), again])


def test_another_pruning_seed_makes_a_repetition(row):
    other = row("slr", [82.0])
    other["pruning"]["seed"] = 1
    other["retraining"]["network"] = "0123456789abcdef"
    assert "| `slr` | 81.00 ± 1.41 (-9.00, n=2) |" in reported([row("slr", [80.0]), other])


def test_the_start_of_another_schedule_serves_no_shorter_budget(row):
    rows = [row("slr", [80.0, 81.0]), row("finetune", [75.0])]
    assert "| `slr` | – | 81.00 (-9.00, n=1) |" in reported(rows)


def test_the_start_of_a_later_round_serves_no_shorter_budget(row):
    """Before its second round it had three epochs, not two."""
    rows = [row("finetune", [75.0, 76.0, 77.0]), row("slr", [80.0, 81.0])]
    for made in rows:
        steps = [HALF, f"{made['retraining']['schedule']}-t{made['retraining']['budget']}"]
        made["pruning"].update(round=2, earlier=steps)
    text = retrain.report(rows)
    assert "| `finetune` | – | 77.00 (-13.00, n=1) |" in text
    assert "76.00" not in text


def test_claims_added_after_rows_had_been_seen_are_marked(row):
    text = retrain.report([row("one_cycle", [80.0]), row("linear", [79.0]), row("slr", [79.0])])
    assert "| `linear = one_cycle` within 0.5 (exploratory) | not decided -1.00, n=1 |" in text
    assert "| `one_cycle > slr` | not decided +1.00, n=1 |" in text


@pytest.mark.parametrize("one, two", [(2, 3), (2, 16)])
def test_dense_runs_of_other_lengths_stand_side_by_side(row, one, two):
    rows = []
    for epochs, method, gain in ((one, "magnitude", 1), (two, "magnitude", 2), (two, "random", 3)):
        for schedule, accuracy in (("finetune", 80.0), ("slr", 80.0 + gain)):
            made = row(schedule, [accuracy], method=method)
            made["dense"]["recipe"]["epochs"] = epochs
            rows.append(made)
    lines = reported(rows)
    heading = ("| resnet8 on shapes, pruned: filters 0.5, by what differs | "
               f"epochs {one}, magnitude t=1 | epochs {two}, magnitude t=1 | "
               "change, first to last |")
    assert heading in lines
    table = lines[lines.index(heading):]
    assert "| `slr > finetune` | not decided +1.00, n=1 | not decided +2.00, n=1 | +1.00 |" in table


def varied(row):
    """Rows of all that a report shows."""
    rows = [row("finetune", [91.0], method=None), row("one_cycle", [92.0, 93.0], method=None)]
    for method, schedule, budget in itertools.product(
            ("magnitude", "random"), ("finetune", "slr", "one_cycle", "scratch"), (1, 2)):
        for epochs in (2, 3):
            made = row(schedule, [80.0, 81.0][:budget], method=method)
            made["dense"]["recipe"]["epochs"] = epochs
            rows.append(made)
    again = row("slr", [70.0])
    again["pruning"].update(round=2, earlier=[HALF, "slr-t1"])
    return [*rows, again]


def test_tables_are_well_formed(row):
    tables = re.findall(r"(?:^\|.*\n)+", retrain.report(varied(row)), re.M)
    assert len(tables) > 5
    for found in tables:
        heading, ruler, *lines = found.splitlines()
        cells = heading.count("|")
        assert ruler == "| --- " * (cells - 1) + "|"
        assert lines
        for line in lines:
            assert (line.count("|"), line[:2], line[-2:]) == (cells, "| ", " |")


# ---- report: pictures ----------------------------------------------------------------------------

def test_pictures_of_a_budget_share_a_scale(row):
    rows = [row("finetune", [50.0, 60.0]), row("one_cycle", [50.0, 90.0]),
            row("slr", [90.0, 88.0])]
    lines = reported(rows)
    first = lines.index("magnitude t=2: 50.00 to 90.00")
    assert lines[first + 1:first + 4] == [
        "  finetune  " + 30 * "▁" + 30 * "▃" + " 60.00 60.00",            # 7 (60 - 50) / 40 = 1.75
        "  slr       " + 30 * "█" + 30 * "█" + " 90.00 88.00",
        "  one_cycle " + 30 * "▁" + 30 * "█" + " 90.00 90.00"]


def test_pictures_show_the_mean_curve(row):
    lines = reported([row("slr", [50.0, 70.0], 0), row("slr", [60.0, 90.0], 1)])
    assert "  slr " + 30 * "▁" + 30 * "█" + " 80.00 80.00" in lines


@pytest.mark.parametrize("schedule", ["scratch", "scratch_e", "scratch_b"])
def test_pictures_leave_scratch_out(row, schedule):
    text = retrain.report([row("slr", [50.0, 60.0]), row(schedule, [10.0, 20.0])])
    assert "magnitude t=2: 50.00 to 60.00\n" in text
    assert f"  {schedule} " not in text


def drawn(rows):
    """The chart of some rows as (titles of its panels, {name at a curve's end: its points})."""
    root = ElementTree.fromstring(retrain.chart(rows))
    texts = [part for part in root if part.tag.endswith("text")]
    titles = [part.text for part in texts if part.get("font-weight")]
    curves = {}
    for line in root:
        if line.tag.endswith("polyline"):
            names = [part.text for part in texts if part.get("fill") == line.get("stroke")]
            points = [point.split(",") for point in line.get("points").split()]
            curves[names[0]] = np.array(points, float)
    return titles, curves


def test_the_chart_shows_the_rows_accuracies(row):
    accuracies = {"finetune": [50.0, 55.0, 60.0], "one_cycle": [40.0, 90.0, 80.0]}
    rows = [row(schedule, values) for schedule, values in accuracies.items()]
    titles, curves = drawn(rows)
    assert titles == ["resnet8 on shapes: filters 0.5 magnitude, t=3"]
    assert set(curves) == set(accuracies)
    low, high = curves["one_cycle"][:2, 1]                 # where 40 and 90 are drawn
    assert low > high
    for name, values in accuracies.items():
        heights = [low + (high - low) * (value - 40) / 50 for value in values]
        np.testing.assert_allclose(curves[name][:, 1], heights, atol=0.1)
        left, middle, right = curves[name][:, 0]
        assert middle - left == pytest.approx(right - middle, abs=0.2)


def test_the_chart_shows_the_largest_budget_of_the_usual_arms(row):
    flat = row("one_cycle", [60.0, 70.0])
    flat["retraining"]["cycle_momentum"] = False
    titles, curves = drawn([row("slr", [50.0]), row("slr", [50.0, 60.0]), flat,
                            row("scratch", [10.0, 20.0])])
    assert titles == ["resnet8 on shapes: filters 0.5 magnitude, t=2"]
    assert set(curves) == {"slr"}


def test_the_chart_has_a_panel_for_each_network(row):
    other = row("slr", [70.0])
    other["arch"] = "resnet14"
    titles, _ = drawn([row("slr", [80.0]), other])
    assert titles == ["resnet14 on shapes: filters 0.5 magnitude, t=1",
                      "resnet8 on shapes: filters 0.5 magnitude, t=1"]


def test_the_chart_is_xml_whatever_a_file_is_called(row):
    other = row("slr", [70.0])
    other["dense"]["recipe"]["pretrained"] = "R&D <1>.pt"
    titles, _ = drawn([row("slr", [80.0]), other])
    assert "resnet8 on shapes, pretrained R&D <1>.pt: filters 0.5 magnitude, t=1" in titles


@pytest.mark.parametrize("arm", ["scratch", "one_cycle"])
def test_a_chart_of_no_usual_arm_is_no_error(row, arm):
    made = row(arm, [80.0])
    made["retraining"]["cycle_momentum"] = False
    assert drawn([made]) == ([], {})


def test_a_chart_is_written_where_it_is_asked_for(dry, tmp_path):
    ok("retrain --chart", tmp_path / "a.svg", "--report", dry)
    text = (tmp_path / "a.svg").read_text(encoding="utf-8")
    assert text == retrain.chart(retrain.read_rows([dry]))


# ---- files ---------------------------------------------------------------------------------------

def sealed(value, **how):
    """A file as models.save writes it, of anything that can be pickled."""
    buffer = io.BytesIO()
    torch.save(value, buffer, **how)
    return buffer.getvalue() + hashlib.sha256(buffer.getvalue()).digest()


def refused(data):
    """Is a file with this content refused, in one line?"""
    Path("x.pt").write_bytes(data)
    status, out, err = run("train --evaluate x.pt")
    said = "error: x.pt: not a checkpoint of format 3, or damaged; remove it and run the command "
    said += "that wrote it again\n"
    return (status, out) == (2, "") and err.count("\n") == 1 and err.endswith(said)


@pytest.mark.parametrize("share", [0, 0.001, 0.1, 0.5, 0.9, 0.99, 1])
def test_a_flipped_bit_is_noticed(workspace, share):
    data = bytearray(Path("run/dense.pt").read_bytes())
    data[round(share * (len(data) - 1))] ^= 4
    assert refused(bytes(data))


@pytest.mark.parametrize("lacking", [1, 31, 32, 33, 1000])
def test_a_truncated_file_is_refused(workspace, lacking):
    assert refused(Path("run/dense.pt").read_bytes()[:-lacking])


@pytest.mark.parametrize("size", [0, 1, 31, 32, 33])
def test_the_beginning_of_a_file_is_refused(workspace, size):
    assert refused(Path("run/dense.pt").read_bytes()[:size])


def test_a_file_with_a_byte_too_many_is_refused(workspace):
    assert refused(Path("run/dense.pt").read_bytes() + b"x")


@pytest.mark.parametrize("zipped", [True, False])
def test_nothing_in_a_checkpoint_is_run(workspace, zipped):
    value = {"format": 3, "dense": Hostile("it-ran")}
    assert refused(sealed(value, _use_new_zipfile_serialization=zipped))
    assert not Path("it-ran").exists()


@pytest.mark.parametrize("value", [
    pytest.param({"format": 2, "dense": {}}, id="older"),
    pytest.param({"format": 4, "dense": {}}, id="newer"),
    pytest.param({"dense": {}}, id="none"),
    pytest.param([3], id="a-list")])
def test_another_format_is_refused(workspace, value):
    assert refused(sealed(value))


@pytest.mark.parametrize("module, name", [(os, "fsync"), (os, "replace")])
def test_a_failing_write_leaves_the_old_file(tmp_path, monkeypatch, module, name):
    models.write(tmp_path / "x", b"old")
    at_call(monkeypatch, module, name, 0, disk_full)
    with pytest.raises(OSError):
        models.write(tmp_path / "x", b"new")
    assert (tmp_path / "x").read_bytes() == b"old"


def test_what_others_left_of_a_file_is_swept(tmp_path):
    for name in ("x.pt.0123abcd.tmp", "x.pt.4567abcd.tmp", "x.state.pt.0123abcd.tmp"):
        (tmp_path / name).write_bytes(b"half")
    models.write(tmp_path / "x.pt", b"whole")
    assert sorted(os.listdir(tmp_path)) == ["x.pt", "x.state.pt.0123abcd.tmp"]


def test_brackets_in_a_path_are_no_pattern(tmp_path):
    (tmp_path / "[ab]").mkdir()
    (tmp_path / "[ab]/x.0123abcd.tmp").write_bytes(b"half")
    models.write(tmp_path / "[ab]/x", b"whole")
    assert os.listdir(tmp_path / "[ab]") == ["x"]


def test_a_writer_whose_temporary_file_was_swept_tries_again(tmp_path, monkeypatch):
    def swept(real, temporary, path):
        os.unlink(temporary)
        real(temporary, path)
    at_call(monkeypatch, os, "replace", 0, swept)
    models.write(tmp_path / "x", b"whole")
    assert os.listdir(tmp_path) == ["x"]
    assert (tmp_path / "x").read_bytes() == b"whole"


def test_a_file_that_does_not_fit_the_disk_leaves_nothing(tmp_path, monkeypatch):
    (tmp_path / "x").write_bytes(b"old")
    at_call(monkeypatch, os, "fsync", 0, disk_full)
    with pytest.raises(OSError, match="No space"):
        models.write(tmp_path / "x", b"whole")
    assert os.listdir(tmp_path) == ["x"]
    assert (tmp_path / "x").read_bytes() == b"old"


def test_a_file_is_on_the_disk_before_it_takes_its_name(tmp_path, monkeypatch):
    seen = []
    real = os.replace
    monkeypatch.setattr(os, "fsync", lambda file: seen.append(os.fstat(file).st_size))
    monkeypatch.setattr(os, "replace", lambda one, two: (seen.append(two), real(one, two)))
    models.write(tmp_path / "x", b"whole")
    assert seen == [5, tmp_path / "x"]


# ---- slow: interrupted ---------------------------------------------------------------------------

FORK = multiprocessing.get_context("fork")                  # needs no imports again


def hit(number):
    """For `at_call`: this signal, to the process itself."""
    return lambda real, *args, **named: os.kill(os.getpid(), number)


CTRL_C = hit(signal.SIGINT)
TERMINATED = hit(signal.SIGTERM)
KILLED = hit(getattr(signal, "SIGKILL", 9))


def started(target, *args):
    """A process that calls target(*args), with signals as in a terminal."""
    def body():
        signal.signal(signal.SIGINT, signal.default_int_handler)        # ignored behind a shell's &
        target(*args)
    process = FORK.Process(target=body)
    process.start()
    return process


def status_of(process):
    """How a process ended, which it has to."""
    process.join(120)
    status = process.exitcode
    process.kill()
    return status


def disturbed(command, module, name, number, how):
    """In a process of its own: a command line, and `how` at a call (see `at_call`)."""
    at_call(pytest.MonkeyPatch(), module, name, number, how)
    status, out, err = run(command)
    Path("said").write_text(out + err)
    sys.exit(status)


@pytest.fixture(scope="session")
def undisturbed(study, tmp_path_factory):
    """A function: the results of a command line in a copy of the study, in one process."""
    made = {}

    def results_of(command):
        if command not in made:
            folder = tmp_path_factory.mktemp("undisturbed") / "study"
            with contextlib.chdir(shutil.copytree(study, folder)):
                ok(command)
            made[command] = results(folder)
        return made[command]
    return results_of


DENSE_AGAIN = f"{DENSE} --data-dir {{study}}/data --out again"
FILTERS = "retrain run/filters-magnitude-0.5.pt --epochs 2 --seed 0 --jobs 1 --schedule"
WEIGHTS = "retrain run/weights-magnitude-0.5.pt --epochs 2 --seed 0 --jobs 1 --schedule"
STEP = (train, "train_step")
SAVE = (models, "save")


# left: how many steps are left when the command is given again.
@pytest.mark.slow
@pytest.mark.parametrize("command, where, number, how, status, left", [
    pytest.param(DENSE_AGAIN, STEP, 12, CTRL_C, 130, 5, id="dense-ctrl-c"),
    pytest.param(DENSE_AGAIN, STEP, 7, TERMINATED, 130, 10, id="dense-terminated"),
    pytest.param(DENSE_AGAIN, STEP, 3, KILLED, -9, 15, id="dense-killed"),
    pytest.param(DENSE_AGAIN, SAVE, 1, KILLED, -9, 15, id="dense-killed-before-its-state"),
    pytest.param(DENSE_AGAIN, SAVE, 5, CTRL_C, 130, 0, id="dense-ctrl-c-at-the-end"),
    pytest.param(DENSE_AGAIN, (os, "replace"), 3, KILLED, -9, 10, id="dense-killed-in-a-save"),
    pytest.param(DENSE_AGAIN, (os, "fsync"), 2, disk_full, 2, 10, id="dense-disk-full"),
    pytest.param(f"{WEIGHTS} one_cycle", STEP, 3, CTRL_C, 130, 10, id="one_cycle-ctrl-c"),
    pytest.param(f"{WEIGHTS} scratch_e", STEP, 11, TERMINATED, 130, 15, id="scratch_e-terminated"),
    pytest.param(f"{FILTERS} weight_rewind", STEP, 5, KILLED, -9, 5, id="weight_rewind-killed"),
    pytest.param(f"{FILTERS} slr", SAVE, 2, KILLED, -9, 0, id="slr-killed-at-the-end"),
    pytest.param(f"{FILTERS} slr", (models, "write"), 3, KILLED, -9, 0, id="slr-without-row"),
    pytest.param(f"{FILTERS} slr", (os, "replace"), 2, disk_full, 2, 0, id="slr-disk-full"),
    pytest.param(f"{WEIGHTS} slr --rounds 2", STEP, 16, KILLED, -9, 5, id="rounds-killed"),
    pytest.param(f"{FILTERS} slr --rounds 2", SAVE, 3, CTRL_C, 130, 10, id="rounds-not-pruned")])
def test_what_was_interrupted_ends_bitwise_the_same(study, undisturbed, workspace, monkeypatch,
                                                    command, where, number, how, status, left):
    command = command.format(study=study)
    assert status_of(started(disturbed, command, *where, number, how)) == status
    steps = spy(monkeypatch, train, "train_step")
    ok(command)
    assert len(steps) == left
    assert results(workspace) == undisturbed(command)
    assert not list(workspace.rglob("*.tmp"))
    assert not list(workspace.rglob("*.state.pt"))


@pytest.mark.slow
@pytest.mark.parametrize("how", [CTRL_C, TERMINATED], ids=["ctrl-c", "terminated"])
def test_an_interrupted_command_says_how_to_resume(workspace, how):
    status_of(started(disturbed, f"{FILTERS} slr", *STEP, 7, how))
    last = Path("said").read_text().splitlines()[-1]
    assert last == "interrupted; run the same command again to resume"


# ---- slow: several processes ---------------------------------------------------------------------

FOUR_RUNS = ("retrain run/filters-magnitude-0.5.pt run/weights-magnitude-0.5.pt --seed 1 "
             "--schedule one_cycle finetune --epochs 12")


def commanded(command):
    """In a process of its own: a command line that has nothing to complain about."""
    ok(command)


@pytest.mark.slow
@pytest.mark.parametrize("command, more", [
    pytest.param(FOUR_RUNS, [" --share 0/3", " --share 1/3", " --share 2/3"], id="shares"),
    pytest.param(FOUR_RUNS, ["", ""], id="the-same-twice"),
    pytest.param(DENSE_AGAIN, ["", ""], id="dense-twice")])
def test_commands_at_once_make_what_one_makes(study, undisturbed, workspace, command, more):
    command = command.format(study=study)
    if command == FOUR_RUNS:
        command += " --jobs 1"
    processes = [started(commanded, command + words) for words in more]
    for process in processes:
        assert status_of(process) == 0
    assert results(workspace) == undisturbed(command)
    assert not list(workspace.rglob("*.tmp"))


@pytest.mark.slow
def test_jobs_make_what_one_process_makes(undisturbed, workspace):
    out = ok(f"{FOUR_RUNS} --jobs 2")
    assert "\n4 retrainings, " in out
    assert results(workspace) == undisturbed(f"{FOUR_RUNS} --jobs 1")


def until(condition):
    """Wait until it holds, two minutes at most. Returns whether it does."""
    for _ in range(12_000):
        if condition():
            return True
        time.sleep(0.01)
    return False


def held():
    """In a process of its own: the command of sys.argv, which waits in the second epoch of its
    first run until there is a file `go`."""
    def waiting(real, *args, **named):
        until(Path("go").exists)
        return real(*args, **named)
    at_call(pytest.MonkeyPatch(), *STEP, 7, waiting)
    train.command(retrain.main)


def parent_of_two(written):
    """In a process of its own: FOUR_RUNS in two others, which write to `written` and are `held`.
    Their process ids lie in `pids`, what is said of failures in `said`."""
    os.dup2(written, 1)
    os.close(written)
    sys.stderr = open("said", "w")
    os.environ["PYTHONPATH"] = str(HERE)
    real = subprocess.Popen

    def noted(command, **named):
        _, script, *words = command
        assert script == retrain.__file__
        code = "import test_repro; test_repro.held()"
        child = real([sys.executable, "-c", code, *words], **named)
        with open("pids", "a") as file:
            print(child.pid, file=file)
        return child
    subprocess.Popen = noted
    train.command(lambda: retrain.main(f"{FOUR_RUNS} --jobs 2".split()[1:]))


@pytest.fixture
def two_at_work(workspace):
    """A parent of two that retrain, each held in the midst of its first run; and a file that ends
    when all three have ended."""
    said, written = os.pipe()
    parent = started(parent_of_two, written)
    os.close(written)
    assert until(lambda: len(list(workspace.rglob("*.state.pt"))) == 2)
    with open(said) as file:
        yield parent, file
    parent.kill()


def made_in(folder):
    """How many retrainings are finished there."""
    return len(list(folder.rglob("*.json")))


@pytest.mark.slow
def test_when_the_parent_is_terminated_all_end(undisturbed, workspace, two_at_work):
    parent, said = two_at_work
    parent.terminate()
    said.read()                                     # to its end: none is left that could write
    assert status_of(parent) == 130
    assert made_in(workspace) == 0
    ok(f"{FOUR_RUNS} --jobs 1")
    assert results(workspace) == undisturbed(f"{FOUR_RUNS} --jobs 1")


@pytest.mark.slow
def test_when_a_child_is_killed_the_others_finish(undisturbed, workspace, two_at_work):
    parent, said = two_at_work
    first, _ = Path("pids").read_text().split()
    os.kill(int(first), signal.SIGKILL)
    Path("go").touch()
    said.read()
    assert status_of(parent) == 2
    failed, last = Path("said").read_text().splitlines()
    assert failed == "a process ended with status -9"
    assert last.endswith("run the same command again to retry them")
    assert made_in(workspace) == 2
    ok(f"{FOUR_RUNS} --jobs 1")
    assert results(workspace) == undisturbed(f"{FOUR_RUNS} --jobs 1")


# Batches of 4, 4 and 2 images, so that two processes can share them.
SHARED = [f"{DENSE} --batch-size 4 --lr 0.01 --out again",
          "retrain run/weights-magnitude-0.5.pt --schedule lr_rewind --epochs 2 --seed 0 "
          "--rounds 2 --jobs 1"]


def one_of_two(rank, port):
    """In a process of its own: what torchrun starts twice, with its environment."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2",
                      MASTER_ADDR="localhost", MASTER_PORT=str(port))
    frozen(pytest.MonkeyPatch())
    if rank > 0:
        forbid(pytest.MonkeyPatch(), os, "replace")
    sys.stdout = open(f"said-{rank}", "w")
    words = [command.split()[1:] for command in SHARED]
    train.command(lambda: (train.main(words[0]), retrain.main(words[1])))


def frozen(patch):
    """Batch norm by its running statistics: those of a batch are of each process's part of it."""
    patch.setattr(nn.BatchNorm2d, "train", lambda self, mode=True: nn.Module.train(self, False))


@pytest.fixture
def torchrun(workspace, tmp_path):
    """A folder in which two processes have done what is SHARED."""
    folder = shutil.copytree(workspace, tmp_path / "two")
    with socket.create_server(("localhost", 0)) as server:
        port = server.getsockname()[1]
    with contextlib.chdir(folder):
        processes = [started(one_of_two, rank, port) for rank in range(2)]
    for process in processes:
        assert status_of(process) == 0
    return folder


def curves_in(folder):
    """The curves of the dense run again/ and of both rounds of retraining."""
    curves = [models.read(folder / "again/dense.pt")["dense"]["curve"]]
    for found in sorted(retrain.read_rows([folder]), key=retrain.round_of):
        curves.append(found["retraining"]["curve"])
    return curves


@pytest.mark.slow
def test_two_processes_compute_what_one_computes(workspace, torchrun, monkeypatch):
    frozen(monkeypatch)
    for command in SHARED:
        ok(command)
    wanted = curves_in(workspace)
    found = curves_in(torchrun)
    assert len(found) == len(wanted) == 3
    for one, two in zip(wanted, found):
        np.testing.assert_allclose(two.pop("train_loss"), one.pop("train_loss"), atol=1e-4)
        assert two == one


@pytest.mark.slow
def test_of_two_processes_only_the_first_speaks(torchrun):
    """And writes: `one_of_two`."""
    said = (torchrun / "said-0").read_text()
    assert said.count("Wrote") == 1
    assert said.count("- Pictures") == 1
    assert (torchrun / "said-1").read_text() == ""


# As on Windows: modules and functions that it lacks, and CDLL(None), which is a TypeError there.
WINDOWS = """
import ctypes, os, sys
del os.sched_getaffinity
sys.modules.update(fcntl=None, resource=None, pwd=None, grp=None)
real = ctypes.CDLL.__init__
ctypes.CDLL.__init__ = lambda self, name, *more, **named: real(self, name + "", *more, **named)
import prune, retrain, train
train.main(["--dry-run"])
prune.main(["--dry-run", "--method", "magnitude"])
retrain.main(["--dry-run", "--seed", "0", "--jobs", "1"])
retrain.main(["--dry-run", "--seed", "0"])                          # all done: asks for the cores
"""


@pytest.mark.slow
def test_the_scripts_need_nothing_that_windows_lacks(tmp_path):
    done = subprocess.run([sys.executable, "-c", WINDOWS], cwd=tmp_path, text=True,
                          env=os.environ | {"PYTHONPATH": str(HERE)}, capture_output=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert made_in(tmp_path) == 4 + 1


# ---- speed ---------------------------------------------------------------------------------------

def plain_loop(network, data, settings, folder):
    """An epoch as everybody writes it."""
    optimizer = torch.optim.SGD(network.train().parameters(), 0.1, 0.9, weight_decay=5e-4)
    slices = train.batch_slices(data, settings, CPU)
    total = 0.0
    for x, y in train.train_batches(data, slices, settings["seed"], 0, CPU):
        loss = F.cross_entropy(network(x.contiguous()), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        total += loss.item()


def this_loop(network, data, settings, folder):
    """The same epoch by train.fit."""
    train.fit(network, data, lambda step: (0.1, 0.9), settings, CPU, f"{folder}/x.pt")


@pytest.mark.speed
def test_speed(tmp_path, monkeypatch):
    """Ten steps of 64 images, by this loop and by the plain one."""
    monkeypatch.setattr(train, "say", lambda *words: None)
    data = tiny_data(640, 32)._replace(test=tiny_data(8, 32).test)
    settings = {"epochs": 1, "batch_size": 64, "weight_decay": 5e-4, "seed": 0}
    dense = models.build("resnet20", 10)
    networks = {"dense": dense, "half of the filters": prune.shrunk(dense)}
    times = {}
    torch.set_num_threads(retrain.cores())
    for number, name, loop in itertools.product(range(7), networks, (this_loop, plain_loop)):
        network = copy.deepcopy(networks[name])
        began = time.perf_counter()
        loop(network, data, settings, tmp_path / f"{number} {name}")
        times.setdefault((name, loop), []).append(time.perf_counter() - began)
    torch.set_num_threads(1)
    print(f"\n{retrain.cores()} threads: images/s, times dense, times the plain loop")
    for name in networks:
        taken = np.array(times[name, this_loop])
        dense_ratio = np.median(times["dense", this_loop] / taken)
        plain_ratio = np.median(times[name, plain_loop] / taken)
        print(f"{name:20} {640 / np.median(taken):5.0f} {dense_ratio:.2f} {plain_ratio:.2f}")


# ---- the README ----------------------------------------------------------------------------------

README = (HERE / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^( *)```(python)?\n(.*?)^ *```", README, re.S | re.M)
# Differences that other works found, as they stand in the README, with a true minus sign: Le & Hua
# 2021, figures, twice; Wang 2023, Table 6; Renda 2020, ResNet-20 at density .1074.
PUBLISHED = """
−0.53 −0.40 −0.52 −0.05 −0.55 −0.19 −0.05
−0.52 −0.53 −0.05 −0.40 −0.19 −0.05
−0.66 −0.27 −0.04 −0.58 −2.01 −1.52 −1.51 −1.63
−3.2 −2.6 −2.7
"""


def snippet(word):
    """The README's Python block that holds `word`."""
    return next(code for _, python, code in BLOCKS if python and word in code)


def printed(code, names):
    """What a snippet prints; `names` gets its variables."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out), warnings.catch_warnings(action="ignore"):
        exec(code, names)
    return out.getvalue().strip()


def in_readme(text):
    """Does the README say that a snippet prints `text`?"""
    return f"prints `{' '.join(text.split())}`" in README


def test_readme_loop_needs_schedules_alone(tmp_path, monkeypatch):
    shutil.copy(HERE / "schedules.py", tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("models", "train", "prune", "retrain"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, "schedules")
    names = {}
    printed(snippet("schedules.retrain"), names)
    assert names["schedules"].__file__ == str(tmp_path / "schedules.py")
    assert names["step"] == 99
    group, = names["optimizer"].param_groups
    assert group["lr"] == pytest.approx(1e-5)
    assert group["momentum"] == pytest.approx(0.95)


def test_readme_loop_keeps_the_ratio_of_parameter_groups():
    code = snippet("schedules.retrain").replace("model.parameters()", "GROUPS(model)")
    names = {"GROUPS": lambda model: [{"params": [model.weight]},
                                      {"params": [model.bias], "lr": 0.02}]}
    printed(code, names)
    first, second = names["optimizer"].param_groups
    assert first["lr"] == pytest.approx(1e-5)
    assert second["lr"] == pytest.approx(2e-6)
    assert second["momentum"] == first["momentum"] == pytest.approx(0.95)


def test_readme_loop_drives_adamw():
    code = snippet("schedules.retrain").replace("SGD(", "AdamW(").replace("momentum=0.9, ", "")
    names = {}
    printed(code, names)
    group, = names["optimizer"].param_groups
    assert group["lr"] == pytest.approx(1e-5)
    assert group["betas"] == (0.9, 0.999)
    assert "momentum" not in group


def test_readme_loop_retrains_the_network_of_the_next_snippet():
    names = {}
    assert in_readme(printed(snippet("shrunk"), names))
    code = snippet("schedules.retrain").replace("torch.nn.Linear(8, 2)", "small.train()")
    code = code.replace("torch.randn(4, 8)", "torch.randn(4, 3, 32, 32)")
    printed(code.replace("range(20)", "range(2)").replace("epochs = 5", "epochs = 1"), names)
    for parameter in names["small"].parameters():
        assert parameter.isfinite().all()


def test_readme_networks_are_of_use_elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ok("train --dry-run")
    ok("prune --dry-run --method magnitude")
    ok("prune --dry-run --method magnitude --structure weights --sparsity 0.9")
    names = {}
    assert in_readme(printed(snippet("torch.export").replace("-s0/", "-s0-dry/"), names))
    x = torch.randn(1, 3, 32, 32)
    again = torch.export.load("small.pt2").module()(x)
    torch.testing.assert_close(again, names["network"](x))
    assert torch_prune.is_pruned(names["masked"])


def commands_of(text):
    """The command lines of our scripts in a text of the shell, as "train --epochs 3"."""
    found = re.findall(r"python (?:-\w+ )?(train|prune|retrain|schedules)\.py([^;&#`\n]*)", text)
    return [f"{script} {words}" for script, words in found]


@pytest.mark.parametrize("command", dict.fromkeys(commands_of(README)))
def test_readme_command_is_a_command_line(tmp_path, monkeypatch, command):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train, "make_machine", fails)
    for variable, value in (("$SLURM_ARRAY_TASK_ID", "1"), ("…", ""), ("FILE", "none.pt")):
        command = command.replace(variable, value)
    status, _, err = run(command)
    if command.split()[0] != "schedules":
        assert status == 2
        assert re.search("No space|no such checkpoint|no pruned|no finished|no such folder", err)


def fails(*_):
    raise OSError("No space left on device")


def test_the_studys_commands_are_command_lines(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train, "make_machine", fails)
    text = (HERE / ".results/study.sh").read_text()
    values = {"$images": "--dataset folder", "$s": "1", "$T": "16", "$1": "16", "$lr": "0.01",
              "$((T / 2))": "8", "$((T * 3 / 4))": "12", '"$@"': "--epochs 11", '"': ""}
    for variable, value in values.items():
        text = text.replace(variable, value)
    commands = commands_of(text)
    assert len(commands) == 9
    for command in commands:
        status, _, err = run(command)
        assert status == 2
        assert re.search("No space|no such checkpoint", err)


@pytest.fixture(scope="module")
def reports():
    """The reports of the study's and of the quick start's rows, by folder."""
    found = {}
    for folder in (".results", ".quickstart"):
        found[folder] = retrain.report(retrain.read_rows([HERE / folder]))
    return found


@pytest.mark.parametrize("folder", [".results", ".quickstart"])
def test_the_tracked_report_is_that_of_the_tracked_rows(reports, folder):
    text = (HERE / folder / "README.md").read_text(encoding="utf-8")
    assert text == reports[folder] + "\n"


def test_the_tracked_picture_is_that_of_the_tracked_rows():
    folders = []
    for method in ("magnitude", "random"):
        folders += HERE.glob(f".results/resnet20-s*/filters-{method}-0.5*")
    picture = (HERE / ".results/accuracy.svg").read_text(encoding="utf-8")
    assert picture == retrain.chart(retrain.read_rows(folders))


def test_the_tracked_picture_of_the_schedules_is_that_of_the_command(tmp_path):
    ok("schedules --chart", tmp_path / "schedules.svg")
    wanted = (tmp_path / "schedules.svg").read_text(encoding="utf-8")
    assert (HERE / ".results/schedules.svg").read_text(encoding="utf-8") == wanted


def test_a_tracked_row_ends_with_its_curve():
    for row in retrain.read_rows([HERE / ".results", HERE / ".quickstart"]):
        retraining = row["retraining"]
        assert retraining["test_accuracy"] == retraining["curve"]["test_accuracy"][-1]
        assert len(retraining["curve"]["epoch"]) == retraining["epochs"]


def test_readme_tables_of_results_stand_in_a_report(reports):
    tables = re.findall(r"^\| (?:resnet|claim \| magn).*\n(?:\|.*\n)+", README, re.M)
    lines = {line for report in reports.values() for line in report.splitlines()}
    assert len(tables) == 4
    for table in tables:
        assert set(table.splitlines()) <= lines


def test_readme_has_the_published_differences():
    assert re.findall(r"−\d\.\d+", README) == PUBLISHED.split()
    assert README.count("| +0.20 ") == 2                            # the only one above dense


def test_readme_differences_stand_in_a_report_with_their_intervals(reports):
    found = re.findall(r"[+-]\d+\.\d\d(?: \[.*?\]|, n=\d)", README)
    assert len(found) > 20
    for difference in found:
        assert any(difference in report for report in reports.values()), difference


def test_readme_numbers_are_measured_or_published(reports):
    text = re.sub(r"−\d\.\d+|Python 3.\d+", "", README)
    known = ["+0.20", "0.01", "0.95", "0.85"]       # of Le & Hua, a rate, momenta
    for report in reports.values():
        known += re.findall(r"[+-]?\d+\.\d\d\b", report)
    for row in retrain.read_rows([HERE / ".results"]):
        known.append(f"{row['dense']['test_accuracy']:.2f}")
    known += [number.lstrip("+-") for number in known]              # "ends 2.45 points above"
    for number in re.findall(r"[+-]?\d+\.\d\d\b", text):
        assert number in known, number
