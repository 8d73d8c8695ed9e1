"""What is promised of a run: nothing lost, nothing silently wrong, nothing let in.

The long ones are left out of `python -m pytest`; `python -m pytest -m slow` runs them.
"""
import atexit
import contextlib
import functools
import hashlib
import io
import itertools
import json
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
from PIL import Image

import models
import prune
import retrain
import schedules
import train

HERE = Path(__file__).parent
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
    return ["--dataset", "folder", "--data-dir", out.parent / "data", "--epochs", 2, "--batch-size", 2,
            "--milestones", 1, "--snapshot-every", 1, "--precision", "fp32", "--out", out]


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
    """Every file and folder below `folder`, with its content and time of change."""
    return {str(p): (p.lstat().st_mtime_ns, p.is_file() and hashlib.sha256(p.read_bytes()).digest())
            for p in sorted(folder.rglob("*"))}


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
    ("dense", None, 2, signal.SIGTERM), ("dense", None, 4, signal.SIGINT),
    ("dense", None, 9, signal.SIGTERM), ("one_cycle", "weights", 6, signal.SIGINT),
    ("weight_rewind", "filters", 0, signal.SIGTERM), ("scratch", "weights", 7, signal.SIGTERM)])
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


@pytest.mark.parametrize("change, named", [
    (["--lr", 0.2], "lr"), (["--epochs", 3], "epochs"), (["--batch-size", 5], "batch_size"),
    (["--seed", 1], "seed"), (["--schedule", "cosine"], "schedule"), (["--subset", 8], "subset"),
    (["--weight-decay", 0.1], "weight_decay"), (["--momentum", 0.5], "momentum"),
    (["--val-size", 2], "val_size"), (["--precision", "bf16"], "precision"),
    (["--arch", "resnet14"], "arch"), (["--data-dir", "other"], "data")])
def test_resuming_with_another_setting_is_refused_by_name(tmp_path, monkeypatch, change, named):
    """Half a run at one learning rate and half at another is worth nothing and looks like a run."""
    monkeypatch.chdir(tmp_path)
    pictures(tmp_path / "other" / "train", {"a": 5, "b": 5}, seed=5)
    pictures(tmp_path / "other" / "test", {"a": 3, "b": 3}, seed=6)
    argv = arm_of(tmp_path, "dense", None)
    with signal_at(6):
        call(*argv)
    if "--schedule" in change:                       # milestones belong to the step schedule
        at = argv.index("--milestones")
        argv[at:at + 2] = []
    before = listing(tmp_path)
    status, _, err = call(*argv, *change, "--resume")
    assert status == 2 and err.count("\n") == 1 and re.search(rf"[ ,]{named} \(here ", err)
    assert listing(tmp_path) == before


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

def kill_writers(folder, kills):
    """Kill a process that writes checkpoints at a random moment, `kills` times; the file on disk must
    always be a whole one, and one that was begun. Returns how many different ones were seen."""
    path, draw, seen = folder / "state.pt", random.Random(0), set()
    whole = models.read(study() / "run" / "dense.pt")

    def work():
        for n in itertools.count(1):
            models.save(path, {**whole, "classes": n, "model": {"w": torch.full((20_000,), float(n))}})
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


def test_a_damaged_checkpoint_is_refused_or_the_same(tmp_path):
    """One byte flipped anywhere, or a file cut anywhere: one kind of error, or the same tensors."""
    path, draw, refused = tmp_path / "x.pt", random.Random(0), 0
    whole = (study() / "run" / "weights.pt").read_bytes()
    path.write_bytes(whole)
    right = content(tmp_path)
    damaged = [(n, 1 << draw.randrange(8)) for n in draw.sample(range(len(whole)), 400)]
    damaged += [(n, 255) for n in draw.sample(range(len(whole) - 6000, len(whole)), 100)]  # the index
    cuts = [0, 1, len(whole) - 1] + draw.sample(range(len(whole)), 97)
    for data in itertools.chain((whole[:n] + bytes([whole[n] ^ bit]) + whole[n + 1:]
                                 for n, bit in damaged), (whole[:n] for n in cuts)):
        path.write_bytes(data)
        try:
            assert differing(right, content(tmp_path)) == []
        except schedules.Refused as problem:
            assert str(path) in str(problem)
            refused += 1
    assert refused > 300


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
    """A write that does not fit (here: a limit on the size of a file) is one line, and the state that
    was there before is there still, so that the run can go on when there is room again."""
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
    """Non-finite numbers are never saved: neither behind a bad loss, nor when the very last step, whose
    loss was still good, broke the weights."""
    argv, real, seen = arm_of(tmp_path, "dense", None), train.train_step, []

    def train_step(forward, optimizer, x, y, *rest):
        seen.append(len(seen))
        out = real(forward, optimizer, x * (float("nan") if what == "loss" and seen[-1] == step else 1),
                   y, *rest)
        if what == "weights" and seen[-1] == step:
            optimizer.param_groups[0]["params"][0].data.fill_(float("inf"))
        return out
    train.train_step = train_step
    try:
        status, _, err = call(*argv)
    finally:
        train.train_step = real
    assert status == 2 and err.count("\n") == 1
    assert f"the {what}" in err and f"at epoch 2, step {step - 4}" in err and "dense.state.pt" in err
    assert models.read(tmp_path / "run" / "dense.state.pt")["epoch"] == 1     # finite: read checks it
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
        return changed(dense, model={**model, **{k.replace("_", "."): v for k, v in tensors.items()}})
    files = {
        "list": [1, 2], "foreign": {"a": 1}, "format": changed(dense, format=2),
        "odd": changed(dense, format=torch.ones(2)), "nokind": changed(dense, kind=None),
        "kind": changed(dense, kind="cat"), "kinds": changed(dense, kind=["dense"]),
        "nomodel": changed(dense, model=None), "norecipe": changed(dense, recipe=None),
        "recipe": changed(dense, recipe={"dataset": "folder"}), "mean": changed(dense, mean="abc"),
        "dataset": changed(dense, recipe={**dense["recipe"], "dataset": "mnist"}),
        "arch": changed(dense, arch="resnet20"), "noarch": changed(dense, arch="alexnet"),
        "classes": changed(dense, classes=-3), "side": changed(dense, side="8"),
        "shape": other(conv1_weight=torch.ones(15, 3, 3, 3)), "nan": other(fc_bias=torch.full((2,), np.nan)),
        "double": other(conv1_weight=torch.ones(16, 3, 3, 3, dtype=torch.float64)),
        "missing": changed(dense, model={k: v for k, v in model.items() if k != "fc.weight"}),
        "sparse": other(fc_weight=torch.ones(2, 64).to_sparse()), "scalar": other(fc_weight=torch.ones(())),
        "text-tensor": other(fc_weight="hello"), "distance": changed(pruned, distance=float("nan")),
        "kept": changed(pruned, kept=None), "pruning": changed(pruned, pruning={"method": "magnitude"}),
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
            ("corrupt", "wide", "sizes", "classes3", "names", "emptyclass", "notest", "textfile", "tiny",
             "bigcorrupt", "testsize")}
    for name in set(sets) - {"notest", "classes3", "names", "testsize"}:
        pictures(folder / name / "test", {"a": 2, "b": 2})
    pictures(folder / "classes3" / "test", {"a": 1, "b": 1, "c": 1})
    pictures(folder / "names" / "test", {"b": 1, "c": 1})
    pictures(folder / "testsize" / "test", {"a": 1, "b": 1}, side=9)
    (folder / "corrupt/train/b/1.png").write_bytes((folder / "corrupt/train/b/0.png").read_bytes()[:99])
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
                       "nan-row": json.dumps({**finished_row(), "test_accuracy": float("nan")}) + "\n"
                       }.items():
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
BAD += [[f"{script} {name}.pt", rf"{name}\.pt: "] for script, name in itertools.product(
    ("prune", "train --evaluate"),
    ("list", "foreign", "format", "odd", "nokind", "kind", "kinds", "nomodel", "norecipe", "recipe",
     "mean", "dataset", "arch", "noarch", "classes", "side", "shape", "nan", "double", "missing",
     "sparse", "scalar", "text-tensor", "imagenet", "hostile", "cut", "text", "empty", "zip"))]
BAD += [[f"retrain --report results/{name}", "line 1 is not a result row"]
        for name in ("torn", "keys", "bytes", "deep", "blank", "type", "nan-row")]


@pytest.mark.parametrize("line, reason", BAD, ids=[line[:60] for line, _ in BAD])
def test_bad_input_is_one_line_and_changes_nothing(monkeypatch, line, reason):
    """Status 2, one line that says what is wrong, no traceback, no file changed or created."""
    monkeypatch.chdir(bad_things())
    script, *argv = line.replace("prune=", "prune =").replace(" =", " ").split(" ")
    before = listing(bad_things())
    status, _, err = call(script, *argv)
    assert status == 2 and err.count("\n") == 1 and ": error: " in err, (status, err)
    assert re.search(reason, err) and "Traceback" not in err, err
    assert listing(bad_things()) == before


def test_a_corrupt_large_image_is_named_by_a_loading_process(monkeypatch, tmp_path):
    """Decoding happens in other processes; their traceback must not become the message."""
    monkeypatch.chdir(bad_things())
    for workers in (0, 1):
        status, _, err = call("train", "--dataset", "folder", "--data-dir", "bigcorrupt", "--epochs", 1,
                              "--milestones", "--batch-size", 2, "--workers", workers,
                              "--out", tmp_path / str(workers))
        assert status == 2 and err.count("\n") == 1 and "Traceback" not in err
        assert "error: bigcorrupt/test/b/1.png: not a readable image" in err


# ---- 7: numbers ----------------------------------------------------------------------------------

def ten_losses(name):
    """The losses of ten fp32 steps on generated images: of a dense schedule or a retraining."""
    images, labels = train.shapes(80, 3)
    images = torch.nn.functional.interpolate(images.float(), size=16).to(torch.uint8)
    data = train.Data((torch.nn.functional.pad(images, (4,) * 4), labels),
                      (images[:2], labels[:2]), (images[:0], labels[:0]), 16, 10, [0.5] * 3, [0.25] * 3)
    recipe = {"schedule": name, "epochs": 4, "lr": 0.01, "milestones": [2, 3], "momentum": 0.9}
    if name in schedules.DENSE and name != "one_cycle" and name != "linear":
        at = schedules.dense({**recipe, "epochs": 2, "milestones": [1]}, 5)
    else:
        at = schedules.retrain(name, 2, 5, {**recipe, "schedule": "step"}, distance=0.6, removed=0.5)
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


GOLDEN = {
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


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_losses(name):
    """The numbers of ten steps do not change unnoticed; the same twice, to the last bit."""
    losses = ten_losses(name)
    assert losses == pytest.approx(GOLDEN[name], rel=1e-4)
    assert losses == ten_losses(name)
