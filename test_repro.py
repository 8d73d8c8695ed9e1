"""Everything against oracles: torch's own schedulers and pruning, numpy, slow references, numbers worked
out by hand or published. No network, no data set, under a minute on two cores.

    python -m pytest -q
"""
import contextlib
import copy
import json
import math
import os
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.nn.utils import prune as torch_prune

import models
import prune
import retrain
import schedules
import train

HERE = os.path.dirname(os.path.abspath(__file__))
CIFAR = {"schedule": "step", "epochs": 160, "lr": 0.1, "milestones": [80, 120], "momentum": 0.9}
CPU = train.Machine(torch.device("cpu"), False, "off", 0)


def run(script, *argv):
    """Run a script's main in this process as the shell would; the exit status."""
    try:
        schedules.command(lambda: script.main([str(a) for a in argv]))
    except SystemExit as stop:
        return stop.code
    return 0


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
    images = torch.randint(0, 256, (count, 3, side + 8, side + 8), generator=draw, dtype=torch.uint8)
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
                **CIFAR, "dataset": "shapes", "arch": arch, "seed": seed, "pretrained": False, "subset": None,
                "val_size": 0, "batch_size": 8, "weight_decay": 5e-4, "dry_run": False, **recipe},
            "settings": {}, "data_dir": "data", "test_accuracy": 50.0, "dense_test_accuracy": 50.0,
            "dense_params": params, "dense_macs": macs, "model": dict(network.state_dict())}


def how(method="magnitude", structure="filters", sparsity=(0.5,), **more):
    return {"method": method, "structure": structure, "sparsity": list(sparsity), "plan": None,
            "scope": "layer" if structure == "filters" else "global", "seed": 0, "include_linear": False,
            "calibration_images": 40, "dry_run": False, **more}


# ---- schedules -----------------------------------------------------------------------------------

GOLDEN = """
e   0    1           3           7           8           20          32          36          40          54          60           71
lr_rewind .01 .01 .01 .01 .01 .01 .001 .001 .001 .001 .001 .001
slr .001 .005902041 .039485214 .1 .1 .1 .1 .1 .01 .01 .001 .001
one_cycle .001 .0056393861 .037699576 .099813971 .099962281 .090676733 .068009194 .058683488 .049032431 .017866459 .0082330837 6.8593579e-5
linear 0 .0046852657 .037063539 .099810679 .098764652 .08024628 .061727908 .055555117 .049382326 .027777559 .018518372 .0015431977
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
    golden = {0: (.001, .95), 1: (.003985215271, .94698463), 5: (.05909558479, .89131759), 9: (.1, .85),
              10: (.0999695444, .85003046), 50: (.05696295918, .89304134), 98: (4.045560318e-5, .94996954),
              99: (1e-5, .95)}
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
    """Published implementations divide by zero for short runs (SLR: t < 10; OneCycleLR: 10 steps)."""
    recipe = {**CIFAR, "schedule": kind}
    for name in retrain.EVERY:
        for epochs, steps in ((1, 1), (1, 10), (2, 5), (9, 1), (10, 1), (19, 2), (160, 1), (200, 1)):
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
    for distance, removed, t, peak in ((0.05, 0.5, 16, 0.01), (0.5, 0.25, 16, 0.1), (0.3, 0.36, 16, 0.05),
                                       (0.0, 0.0, 160, 0.1)):
        assert max(lrs("adaptive_linear", t, 50, distance=distance, removed=removed)) == pytest.approx(
            peak, rel=1e-3)


def test_published_options_of_one_cycle_can_be_switched():
    at = schedules.retrain("one_cycle", 10, 10, CIFAR, lr=0.2, end_lr=0.001, cycle_momentum=False)
    assert at(99) == (pytest.approx(0.001), 0.9) and at(9)[0] == 0.2


def test_schedules_prints_a_table(capsys):
    assert run(schedules) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
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
    return models.from_state(arch, classes, models.shrink(network.state_dict(), models.prunable(network), keep))


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
            params, macs, width = params + weights + 2 * (inner + out), macs + weights * side ** 2, out
    return params + 650, macs + 640


@pytest.mark.parametrize("arch", ["resnet56", "resnet110"])
def test_counts_of_plans_a_and_b_by_hand(arch):
    for plan in "AB":
        assert models.count(planned(arch, plan), 32) == by_hand(arch, plan)


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
    """Published for ResNet-34 A and B (Li 2017); ResNet-50 by hand: both inner convs of a bottleneck."""
    params, macs = models.count(planned("resnet34", sparsity=[0.0], classes=1000), 224)
    for plan, left, drop in (("A", 20.152e6, 15.38), ("B", 19.469e6, 24.06)):
        p, m = models.count(planned("resnet34", plan, classes=1000), 224)
        assert p == pytest.approx(left, abs=500) and 100 * (1 - m / macs) == pytest.approx(drop, abs=0.005)
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
    assert y.shape == (2, 32, 4, 4) and torch.equal(y[:, :16], x[:, :, ::2, ::2]) and not y[:, 16:].any()
    y.sum().backward()
    assert torch.equal(x.grad[:, :, ::2, ::2], torch.ones(2, 16, 4, 4))


# ---- pruning -------------------------------------------------------------------------------------

@pytest.mark.parametrize("arch, side", [("resnet8", 32), ("resnet20", 32), ("vgg16", 32), ("resnet18", 48),
                                        ("resnet34", 48), ("resnet50", 48)])
def test_a_shrunk_network_computes_what_the_zeroed_one_computes(arch, side):
    """Removed filters, and their batch norms, zeroed in a copy of the original: same outputs, float64."""
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
        assert gone.sum() == len(gone) - int(len(gone) * 0.7) and norms[gone].max() <= norms[~gone].min()
        bn = network.get_submodule(unit.bn)
        with torch.no_grad():
            for value in (network.get_parameter(unit.conv + ".weight"), bn.weight, bn.bias, bn.running_mean):
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
    one, same, other = (prune.prune(checkpoint, how("random", "weights", [0.6], seed=s)) for s in (1, 1, 2))
    assert models.digest(one["model"]) == models.digest(same["model"]) != models.digest(other["model"])
    names = models.weight_names(models.restore(checkpoint))
    left = np.array([(one["model"][n] != 0).double().mean() for n in names if one["model"][n].numel() > 2000])
    assert abs(left - 0.4).max() < 0.05                                    # uniform, not by layer size


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
    scores = {"a": torch.tensor([100., 300., 200.]), "b": torch.tensor([.1, .9]), "c": torch.tensor([1e-9])}
    keep = prune.keep_filters(scores, {"a": 1, "b": 1, "c": 1}, "global")
    assert {c: k.tolist() for c, k in keep.items()} == {"a": [1], "b": [1], "c": [0]}
    keep = prune.keep_filters(scores, {"a": 2, "b": 2, "c": 0}, "global")      # 200/374 beats 0.1/0.906
    assert {c: k.tolist() for c, k in keep.items()} == {"a": [1, 2], "b": [1], "c": [0]}


def test_kept_filters_refer_to_the_dense_network_however_often_pruned():
    checkpoint = dense_checkpoint("resnet8")
    twice = prune.prune(prune.prune(checkpoint, how("magnitude")), how("random", sparsity=[0.25]))
    for conv, kept in twice["kept"].items():
        assert torch.equal(twice["model"][conv + ".weight"].sum((2, 3)).shape[0] * torch.ones(1).long(),
                           torch.tensor([len(kept)]))
    stem = "layer1.0.conv1"
    assert torch.equal(twice["model"][stem + ".weight"], checkpoint["model"][stem + ".weight"][twice["kept"][stem]])


def test_distance_and_removed_are_zimmers():
    checkpoint = dense_checkpoint("resnet8")
    pruned = prune.prune(checkpoint, how(structure="weights", sparsity=[0.7]))
    names = models.weight_names(models.restore(checkpoint))
    before = np.concatenate([checkpoint["model"][n].double().flatten() for n in names])
    after = np.concatenate([pruned["model"][n].double().flatten() for n in names])
    assert pruned["distance"] == pytest.approx(np.linalg.norm(before - after) / np.linalg.norm(before))
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
    if method == "taylor":                          # 24 images are one mini-batch: its mean gradient
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
    halves = [prune.saliency(network, "taylor", "filters", [name], calibration=(x[k::2], y[k::2]))[name]
              for k in (0, 1)]
    order = torch.cat([torch.arange(0, 128, 2), torch.arange(1, 128, 2)])
    whole = prune.saliency(network, "taylor", "filters", [name], calibration=(x[order], y[order]))[name]
    torch.testing.assert_close(whole, (halves[0] + halves[1]) / 2, rtol=1e-4, atol=1e-9)


def test_hrank_against_numpy():
    network, x, y = small_network_and_images(6)
    network.double()
    x, unit = x.double(), models.prunable(network)[2]
    with torch.no_grad():
        stream = network.layer2(network.layer1(F.relu(network.bn1(network.conv1(x)))))
        maps = F.relu(network.layer3[0].bn1(network.layer3[0].conv1(stream))).numpy()
    reference = [np.mean([np.linalg.matrix_rank(maps[i, c]) for i in range(6)]) for c in range(64)]
    scores = prune.saliency(network, "hrank", "filters", [unit.conv + ".weight"], calibration=(x, y))
    np.testing.assert_allclose(scores[unit.conv + ".weight"], reference)


def test_no_criterion_ranks_as_magnitude_does():
    network, x, y = small_network_and_images()
    for structure in ("filters", "weights"):
        names = [u.conv + ".weight" for u in models.prunable(network)]
        keep = {}
        for method in prune.METHODS[:5 if structure == "filters" else 4]:
            scores = prune.saliency(network, method, structure, names, 0, (x, y))
            keep[method] = [s.flatten().argsort(descending=True)[:8].tolist() for s in scores.values()]
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
    assert all(torch.equal(a, b) for a, b in zip(train.epoch_draws(5, 7, 99), train.epoch_draws(5, 7, 99)))
    assert not torch.equal(train.epoch_draws(5, 7, 99)[0], train.epoch_draws(5, 8, 99)[0])
    assert not torch.equal(train.epoch_draws(5, 7, 99)[0], train.epoch_draws(6, 7, 99)[0])


def test_normalisation_is_torchvisions():
    from torchvision.transforms import v2
    data = tiny_data(16)
    reference = v2.Compose([v2.ToDtype(torch.float32, scale=True), v2.Normalize(data.mean, data.std)])
    found = train.normalise(data.test[0], data)
    torch.testing.assert_close(found, reference(data.test[0]), rtol=1e-5, atol=1e-6)
    assert found.is_contiguous(memory_format=torch.channels_last)


def test_an_epoch_shows_every_image_once_and_keeps_the_short_last_batch():
    data = tiny_data(50)
    sizes, seen = [], []
    images = data.train[0].clone()
    images[:] = torch.arange(50, dtype=torch.uint8).view(-1, 1, 1, 1)          # each image is its number
    data = data._replace(train=(images, data.train[1]), mean=[0.0] * 3, std=[1 / 255] * 3)
    for x, y, counted, weight in train.train_batches(data, 0, 0, 16, CPU):
        sizes.append(counted)
        seen += x[:, 0, 16, 16].round().int().tolist()
        assert weight == 1 and torch.equal(y, torch.tensor(seen[-len(y):]) % 10)
    assert sizes == [16, 16, 16, 2] and sorted(seen) == list(range(50))


def test_two_processes_share_each_batch():
    """What the ranks see is together what one process sees; the counts add up, the weights average."""
    data = tiny_data(33)
    whole = [(x, y) for x, y, _, _ in train.train_batches(data, 0, 2, 8, CPU)]
    ranks = [list(train.train_batches(data, 0, 2, 8, CPU._replace(rank=r, world=2))) for r in (0, 1)]
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
    """A folder data set of random PNG files."""
    from PIL import Image
    draw = np.random.default_rng(0)
    for split in ("train", "val"):
        for c in range(classes):
            os.makedirs(root / split / f"class{c}")
            for i in range(count):
                Image.fromarray(draw.integers(0, 255, (side, side, 3), np.uint8)).save(
                    root / split / f"class{c}" / f"{i}.png")
    return root


def test_folder_in_memory_is_what_torchvision_reads(tmp_path):
    from torchvision.datasets import ImageFolder
    root = image_folder(tmp_path)
    recipe = {"dataset": "folder", "subset": None, "val_size": 3, "batch_size": 4}
    data = train.load_data(recipe, str(root), torch.device("cpu"))
    files = ImageFolder(str(root / "val"))
    assert data.classes == 3 and data.side == 32 and len(data.train[1]) == 15 and len(data.val[1]) == 3
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
    later = list(train.train_batches(data, 0, 1, 8, CPU, start=1))             # resumed in the middle
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
            optimizer.param_groups[0]["lr"], optimizer.param_groups[0]["momentum"] = at(3 * epoch + step)
            loss = F.cross_entropy(reference(x.contiguous()), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.item() * len(y)
        assert curve[epoch]["train_loss"] == pytest.approx(total / 20, rel=1e-4)
    for one, other in zip(network.state_dict().values(), reference.state_dict().values()):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)
    right = sum((network(train.normalise(data.test[0][i:i + 1], data)).argmax() == data.test[1][i]).item()
                for i in range(20))
    assert curve[-1]["test_accuracy"] == 100 * right / 20


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
        assert not weight[layer.weight_mask == 0].any() and (weight != 0).sum() == layer.weight_mask.sum()
        torch.testing.assert_close(weight, layer.weight_orig * layer.weight_mask, rtol=1e-3, atol=1e-5)


def test_weight_rewinding_takes_the_dense_runs_state(tmp_path):
    """Weights, BN buffers and momentum at epoch T - t; filters or masks of the final weights."""
    data, recipe = tiny_data(40), {**CIFAR, "epochs": 4, "milestones": [2, 3]}
    network = models.build("resnet8", 10)
    at, state = schedules.dense(recipe, 5), str(tmp_path / "dense.state.pt")
    train.fit(network, data, at, settings(4), CPU, state, snapshots=range(4))
    half = models.build("resnet8", 10)
    train.fit(half, data, at, settings(2), CPU, str(tmp_path / "half.pt"))      # the first two epochs
    momentum = models.read(tmp_path / "half.pt")["momentum"]
    checkpoint = {**dense_checkpoint("resnet8", epochs=4, milestones=[2, 3]), "settings": settings(4),
                  "model": dict(network.state_dict())}
    pruned = prune.prune(checkpoint, how())
    rewound, held, masks = retrain.start("weight_rewind", 2, pruned, str(tmp_path), 0)
    kept = pruned["kept"]["layer2.0.conv1"]
    assert not masks
    for name, rows, columns in (("layer2.0.conv1.weight", kept, slice(None)), ("layer2.0.bn1.running_var", kept, None),
                                ("layer2.0.conv2.weight", slice(None), kept)):
        for found, reference in ((rewound.state_dict(), half.state_dict()), (held, momentum)):
            if name in reference:
                want = reference[name][rows] if columns is None else reference[name][rows][:, columns]
                assert torch.equal(found[name], want)
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
        train.fit(rewound, shifted, tail, settings(2), CPU, str(tmp_path / "t.pt"), momentum=held, masks=masks)
    finally:
        train.epoch_draws = draws
    assert models.digest(dict(rewound.state_dict())) == models.digest(dict(network.state_dict())) or all(
        torch.equal(a, b) for (n, a), (_, b) in zip(rewound.state_dict().items(), network.state_dict().items()))


def test_evaluation_counts_each_image_once_however_it_is_shared():
    """Two ranks' counts, added up as all_reduce adds them, are one process's count."""
    data, network = tiny_data(23), noisy("resnet8").float()
    whole = train.evaluate(network, data, CPU)
    right = (network(train.normalise(data.test[0], data)).argmax(1) == data.test[1]).sum().item()
    assert whole == 100 * right / 23


# ---- retraining as a whole -------------------------------------------------------------------------

@pytest.fixture(scope="module")
def dry(tmp_path_factory):
    """The three scripts in a row, dry, with every schedule."""
    with inside(tmp_path_factory.mktemp("dry")) as folder:
        assert run(train, "--dry-run", "--precision", "fp32") == 0
        assert run(prune, "--dry-run") == 0
        assert run(retrain, "--dry-run", "--precision", "fp32", "--schedule", *retrain.EVERY) == 0
    return folder


def test_the_scripts_chain_without_arguments(dry):
    folder = dry / "runs" / "shapes-resnet8-s0"
    rows = [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]
    assert {(r["method"], r["schedule"]) for r in rows} == {
        (m, s) for m in ("magnitude", "random") for s in retrain.EVERY} and len(rows) == 20
    wanted = set("method structure sparsity schedule epochs seed test_accuracy dense_test_accuracy params "
                 "macs curve seconds device torch".split())
    for row in rows:
        assert wanted <= row.keys() and len(row["curve"]) == row["epochs"] and row["dry_run"]
        assert row["test_accuracy"] == row["curve"][-1]["test_accuracy"] and row["sparsity"] == 0.5
        network = models.load(folder / row["checkpoint"])
        assert not network.training and models.count(network, 32) == (row["params"], row["macs"])
    assert "| filters 0.5 | magnitude |" in (folder / "report.md").read_text()
    for path in folder.glob("*.pt"):
        assert torch.load(path)["format"] == models.FORMAT               # torch's default is the safe one
    assert not list(folder.glob("*.state.pt")) and not list(folder.glob("*.tmp"))


def test_a_run_that_is_there_is_not_repeated(dry, capsys):
    folder = dry / "runs" / "shapes-resnet8-s0"
    before = (folder / "results.jsonl").read_bytes()
    with inside(dry):
        assert run(retrain, "--dry-run", "--precision", "fp32", "--schedule", "slr") == 0
    assert (folder / "results.jsonl").read_bytes() == before
    assert capsys.readouterr().out.count("done already") == 2


def test_resuming_at_an_epoch_boundary_changes_nothing(tmp_path):
    """Dense, and every schedule, with masks: stopped after epoch 1 of 2 and resumed, bitwise."""
    data = tiny_data(24)
    pruned = prune.prune(dense_checkpoint("resnet8"), how(structure="weights", sparsity=[0.5]))
    for name in ("dense", *schedules.RETRAIN):
        at = schedules.dense(CIFAR, 3) if name == "dense" else schedules.retrain(name, 2, 3, CIFAR)
        found = []
        for stop in (False, True):
            network, _, masks = retrain.start("finetune", 2, pruned, "", 0)
            path = str(tmp_path / f"{name}-{stop}.pt")

            def watched(step):
                if stop and step == 3:
                    raise KeyboardInterrupt                              # before the second epoch's first step
                return at(step)
            if stop:
                with pytest.raises(KeyboardInterrupt):
                    train.fit(network, data, watched, settings(), CPU, path, masks=masks)
                network = models.build("resnet8", 10, seed=99)           # nothing survives but the file
            curve, _ = train.fit(network, data, at, settings(), CPU, path, masks=masks, resume=stop)
            found.append((curve, models.digest(dict(network.state_dict()))))
        assert found[0] == found[1], name


def test_rounds_prune_and_retrain_in_one_call(tmp_path):
    with inside(tmp_path):
        assert run(train, "--dry-run", "--out", "a") == 0
        assert run(prune, "a/dense.pt", "--dry-run", "--structure", "weights", "--sparsity", 0.3,
                   "--method", "magnitude") == 0
        assert run(retrain, "a/weights-magnitude-0.3.pt", "--dry-run", "--rounds", 3,
                   "--schedule", "slr", "weight_rewind") == 0
        rows = [json.loads(line) for line in open("a/results.jsonl")]
        assert [r["round"] for r in rows if r["schedule"] == "slr"] == [1, 2, 3]
        for row in rows:
            state = torch.load("a/" + row["checkpoint"])["model"]
            weights = [state[n] for n in models.weight_names(models.build("resnet8", 10))]
            zero = sum((w == 0).sum().item() for w in weights) / sum(w.numel() for w in weights)
            assert zero == pytest.approx(1 - 0.7 ** row["round"], abs=1e-4)
            assert row["sparsity"] == pytest.approx(1 - 0.7 ** row["round"])


def test_finetune_at_several_budgets_is_one_run(tmp_path):
    """Its longest run contains the shorter ones: the first epochs of the same curve."""
    data = tiny_data(16)
    pruned = {**prune.prune(dense_checkpoint("resnet8"), how()), "test_accuracy": 10.0}
    args = type("Args", (), {"dry_run": False, "lr": None, "end_lr": None, "cycle_momentum": True,
                             "resume": False, "save_every": 0})
    long, short = (retrain.Run(str(tmp_path / "p.pt"), pruned, "finetune", t, 0, args, CPU) for t in (3, 2))
    long(args, CPU, data, [1, 2, 3])
    rows = {r["budget"]: r for r in retrain.read_rows(tmp_path / "results.jsonl")}
    assert sorted(rows) == [1, 2, 3] and rows[2]["run"] == short.id
    curve, _ = train.fit(retrain.start("finetune", 2, pruned, "", 0)[0], data, short.schedule(2),
                         short.settings, CPU, str(tmp_path / "s.pt"))
    assert rows[2]["curve"] == curve == rows[3]["curve"][:2] and rows[2]["epochs"] == 2


def test_torchrun_computes_what_one_process_computes(tmp_path, monkeypatch):
    """Two processes, gloo: losses of five one-step epochs, test counts, and one set of files.

    Batch norm uses its running statistics here (a patch in the driver), because each process would see
    only its own half of the batch: so the statistics are the same in both runs, as the claim wants."""
    def frozen(self, x):
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias)
    driver = tmp_path / "driver.py"
    driver.write_text(
        f"import sys; sys.path.insert(0, {HERE!r})\n"
        "import schedules, torch, train\n"
        "torch.nn.BatchNorm2d.forward = lambda self, x: torch.nn.functional.batch_norm(\n"
        "    x, self.running_mean, self.running_var, self.weight, self.bias)\n"
        "schedules.command(lambda: train.main(sys.argv[1:]))\n")
    image_folder(tmp_path / "data", count=14)
    argv = ["--dataset", "folder", "--batch-size", "42", "--epochs", "5", "--precision", "fp32",
            "--lr", "0.01", "--data-dir", str(tmp_path / "data")]
    with monkeypatch.context() as patch:
        patch.setattr(torch.nn.BatchNorm2d, "forward", frozen)
        assert run(train, *argv, "--out", tmp_path / "one") == 0
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "29531",
         str(driver), *argv, "--out", str(tmp_path / "two")],
        capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Wrote") == 1
    curves = [torch.load(tmp_path / name / "dense.pt")["curve"] for name in ("one", "two")]
    for one, two in zip(*curves):
        assert one["train_loss"] == pytest.approx(two["train_loss"], abs=1e-4)
        assert one["test_accuracy"] == two["test_accuracy"]
    assert len({p["train_loss"] for p in curves[0]}) == 5                      # each step changed it
    assert sorted(os.listdir(tmp_path / "one")) == sorted(os.listdir(tmp_path / "two"))


# ---- verdicts ------------------------------------------------------------------------------------

def test_students_t_quantiles():
    for freedom, value in ((1, 12.7062), (2, 4.30265), (4, 2.77645), (9, 2.26216), (30, 2.04227), (1000, 1.96234)):
        assert retrain.t_quantile(freedom) == pytest.approx(value, rel=1e-4)


def made_up(method, schedule, accuracies, budget=40, dense=93.0):
    return [{"run": f"{method}{schedule}{budget}{seed}", "dataset": "cifar10", "arch": "resnet56", "plan": "B",
             "method": method, "structure": "filters", "scope": "layer", "sparsity": None, "round": 1,
             "include_linear": False, "schedule": schedule, "budget": budget, "epochs": budget, "seed": seed,
             "lr": None, "end_lr": None, "cycle_momentum": None, "dense": "d", "pruning_seed": 0,
             "test_accuracy": a, "dense_test_accuracy": dense, "recipe": CIFAR} for seed, a in enumerate(accuracies)]


def lines_of(rows, claim):
    return [line for line in retrain.claims(rows).splitlines() if line.startswith(f"| {claim}")]


def test_verdicts_on_made_up_rows():
    rows = (made_up("magnitude", "finetune", [92.5, 92.6, 92.4]) + made_up("magnitude", "one_cycle", [93.1, 93.2, 93.0])
            + made_up("magnitude", "slr", [92.4, 92.7, 92.4]) + made_up("random", "one_cycle", [92.9])
            + made_up("random", "finetune", [92.0]))
    assert "**yes** +0.60 [+0.60, +0.60], n = 3" in lines_of(rows, "C2 CLR > FT (magnitude)")[0]     # a clear win
    tie = lines_of(rows, "C1 SLR > FT (magnitude)")[0]
    assert "not decided +0.00 [-0.25, +0.25], n = 3" in tie                   # sd 0.1, t = 4.303
    assert "n = 1 (+0.40)" in lines_of(rows, "C6 random + CLR > magnitude")[0] and "not decided" in lines_of(rows, "C6")[0]
    assert "an arm is missing" in lines_of(rows, "C1 LRW > FT (magnitude)")[0]
    worse = made_up("magnitude", "finetune", [93, 93, 93]) + made_up("magnitude", "one_cycle", [92, 92.1, 91.9])
    assert "**no, reversed** -1.00" in lines_of(worse, "C2 CLR > FT")[0]
    flat = made_up("magnitude", "finetune", [93, 92, 93.5]) + made_up("magnitude", "finetune", [93, 92.1, 93.4], 152)
    assert "**consistent**" in lines_of(flat, "C3")[0]


def test_pairs_are_of_one_seed_and_one_dense_network():
    rows = made_up("magnitude", "one_cycle", [1, 2, 3]) + made_up("magnitude", "finetune", [0, 0])
    assert retrain.paired(rows, ("magnitude", "one_cycle"), ("magnitude", "finetune")) == [1, 2]


def test_charts_name_what_they_draw():
    text = retrain.chart("Title", "epoch", [0, 1], "y", {"finetune": [1, 2], "one_cycle": [3, 1]})
    assert "blue finetune, red one_cycle" in text and re.search(r"line \[1, 2\]\n +line \[3, 1\]", text)
