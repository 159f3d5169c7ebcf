"""What happens to a run in a week: kills, full disks, damaged files, numbers that are not finite.

pytest -m slow tests/test_faults.py    # twenty kills, and 20,000 steps watched from outside
"""

import hashlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
import warnings
from contextlib import nullcontext, suppress
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import few_episodes, make_tasks, refused, start

from experiments import (
    cli,
    evaluate,
    loading,
    metrics,
    plots,
    runs,
    scoring,
    store,
    train,
    training,
)
from mgaug_jax import checkpoint, loops, maml, meta, nets, tasks_at_once, trainer
from mgaug_jax.loops import advance
from mgaug_jax.losses import squared_error
from mgaug_jax.meta import meta_gradient
from mgaug_jax.types import Examples, Task

ROOT = Path(__file__).parents[1]
# the storage library leaves a rejected future behind
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
SINES = (
    "--data=sinusoid",
    "--shot=5",
    "--queries=5",
    "--tasks=2",
    "--net=mlp((8,))",
    "--method=maml(lr=0.01,steps=1)|noise(0.1,site='outer')",
)


# --- checkpoints ----------------------------------------------------------------------------


def tree(value: float):
    return {"w": jnp.full((20, 30), value), "b": jnp.full(7, value), "n": jnp.int32(value)}


def saved(folder, steps=(1, 2)):
    for step in steps:
        checkpoint.save(folder, step, tree(step), identity={"spec": "maml"})
    return sorted(p.relative_to(folder / "2") for p in (folder / "2").rglob("*") if p.is_file())


def test_a_checkpoint_comes_back_with_what_it_is(tmp_path):
    saved(tmp_path)
    found = checkpoint.restore(tmp_path, tree(0))
    assert found.step == 2
    assert found.identity == {"spec": "maml"}
    jax.tree.map(np.testing.assert_array_equal, found.tree, tree(2))


def test_a_best_of_a_discarded_future_goes(tmp_path):
    for step in (100, 400, 250):
        checkpoint.save(tmp_path, step, jnp.zeros(1), keep=2)
    assert checkpoint.steps(tmp_path) == [100, 250]


DAMAGES = {
    "half": lambda data: data[: len(data) // 2],
    "empty": lambda data: b"",
    "first byte": lambda data: bytes([data[0] ^ 1]) + data[1:],
    "middle byte": lambda data: (
        data[: len(data) // 2] + bytes([data[len(data) // 2] ^ 16]) + data[len(data) // 2 + 1 :]
    ),
    "last byte": lambda data: data[:-1] + bytes([data[-1] ^ 128]),
    "missing": None,
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_named_and_the_step_before_is_taken(damage, tmp_path):
    """Every file of a checkpoint in turn; the bad one is put aside."""
    whole = tmp_path / "whole"
    files, change = saved(whole), DAMAGES[damage]
    assert len(files) > 5
    for i, name in enumerate(files):
        folder = tmp_path / str(i)
        shutil.copytree(whole, folder)
        path = folder / "2" / name
        if change is None:
            path.unlink()
        elif data := path.read_bytes():
            path.write_bytes(change(data))
        else:
            continue
        with pytest.warns(UserWarning, match="Passing over") as caught:
            found = checkpoint.restore(folder, tree(0), quarantine=True)
        assert found.step == 1
        jax.tree.map(np.testing.assert_array_equal, found.tree, tree(1))
        (text,) = [str(w.message) for w in caught if "Passing over" in str(w.message)]
        reason = "is missing" if change is None else "is not what was saved"
        assert f"{folder / '2'}: {name.as_posix()} {reason}" in text
        assert (folder / "2.corrupt").is_dir()
        assert checkpoint.steps(folder) == [1]


def test_no_whole_checkpoint_is_an_error_that_says_why_for_each(tmp_path):
    saved(tmp_path)
    for step in (1, 2):
        (tmp_path / str(step) / checkpoint.ABOUT).unlink()
    with (
        pytest.warns(UserWarning, match="cannot be read"),
        pytest.raises(checkpoint.CheckpointError, match=r"/2: .*/1: "),
    ):
        checkpoint.restore(tmp_path, tree(0), quarantine=True)
    with pytest.raises(checkpoint.CheckpointError, match=r"put aside as damaged: 1\.corrupt, 2\."):
        checkpoint.restore(tmp_path, tree(0))


@pytest.mark.parametrize("error", [OSError(5, "Input/output error"), MemoryError()])
def test_what_the_machine_cannot_read_is_not_put_aside(error, tmp_path, monkeypatch):
    saved(tmp_path)

    def fail(path, like):
        raise error

    monkeypatch.setattr(checkpoint, "_read", fail)
    with (
        pytest.warns(UserWarning, match="cannot be read"),
        pytest.raises(checkpoint.CheckpointError),
    ):
        checkpoint.restore(tmp_path, tree(0), quarantine=True)
    monkeypatch.undo()
    assert checkpoint.restore(tmp_path, tree(0)).step == 2


def test_keep_is_checked(tmp_path):
    with pytest.raises(ValueError, match="keep=0 was asked for"):
        checkpoint.save(tmp_path, 1, tree(0), keep=0)


def test_the_digest_notices_what_was_not_saved(tmp_path, monkeypatch):
    real = checkpoint._digest
    monkeypatch.setattr(
        checkpoint, "_digest", lambda leaves, about: "0" * 64 if leaves else real(leaves, about)
    )
    checkpoint.save(tmp_path, 1, jnp.ones(3))
    monkeypatch.undo()
    with (
        pytest.warns(UserWarning, match="digest"),
        pytest.raises(checkpoint.CheckpointError, match="digest"),
    ):
        checkpoint.restore(tmp_path, jnp.ones(3))


@pytest.mark.parametrize(
    ("like", "says"),
    [
        (jnp.ones(4), r"number 0 is float32\[3\] instead of float32\[4\]"),
        ((jnp.ones(3), jnp.ones(3)), "1 of them instead of 2"),
        (jnp.ones(3, jnp.int32), r"float32\[3\] instead of int32\[3\]"),
    ],
)
def test_other_arrays_are_named_and_stay(like, says, tmp_path):
    checkpoint.save(tmp_path, 1, jnp.ones(3))
    with pytest.raises(checkpoint.CheckpointError, match=says):
        checkpoint.restore(tmp_path, like, quarantine=True)
    assert (checkpoint.restore(tmp_path, jnp.zeros(3)).tree == 1).all()


def test_a_checkpoint_of_this_format_stays_readable(whole, tmp_path):
    """If what is read or what runs save changes, so must `FORMAT`, and this file and hash."""
    shutil.unpack_archive(ROOT / "tests" / f"checkpoint_{checkpoint.FORMAT}.tar.gz", tmp_path)
    like = {"w": jnp.zeros((2, 3)), "n": jnp.int32(0)}
    found = checkpoint.restore(tmp_path, like)
    jax.tree.map(
        np.testing.assert_array_equal, found.tree, {"w": np.arange(6.0).reshape(2, 3), "n": 7}
    )
    assert found.identity == {"spec": "maml"}
    leaves = jax.tree_util.tree_leaves_with_path(state_of(whole))
    paths = "\n".join(jax.tree_util.keystr(path) for path, _ in leaves)
    assert hashlib.sha256(paths.encode()).hexdigest()[:12] == "f85acd781c3c", paths


def test_other_formats_are_named_and_stay(tmp_path, monkeypatch):
    old, new = tmp_path / "old", tmp_path / "new"
    (old / "1" / "about").mkdir(parents=True)  # as format 2 had it
    monkeypatch.setattr(checkpoint, "FORMAT", 99)
    checkpoint.save(new, 1, jnp.ones(3))
    monkeypatch.undo()
    for folder, says in ((old, "format 2"), (new, r"format 99.*use the version that wrote it")):
        with pytest.raises(checkpoint.CheckpointError, match=says):
            checkpoint.restore(folder, jnp.ones(3), quarantine=True)
        assert checkpoint.steps(folder) == [1]


def test_what_a_kill_left_half_written_is_not_met_and_goes(tmp_path):
    saved(tmp_path)
    half = tmp_path / "3.new"
    shutil.copytree(tmp_path / "2" / "state", half / "state.orbax-checkpoint-tmp")
    assert checkpoint.restore(tmp_path, tree(0)).step == 2
    checkpoint.save(tmp_path, 3, tree(3))
    assert not half.exists()
    assert checkpoint.restore(tmp_path, tree(0)).step == 3


class Killed(BaseException):
    pass


@pytest.mark.parametrize("done", range(4))
def test_a_step_saved_again_is_never_without_a_whole_one(done, tmp_path, monkeypatch):
    """Killed while Orbax writes, before the old step is moved, before the new one is, or never."""
    checkpoint.save(tmp_path, 1, tree(1))
    real, renames = Path.rename, []

    def rename(path, target):
        if path.parent == tmp_path:
            renames.append(path)
            if len(renames) == done:
                raise Killed
        return real(path, target)

    monkeypatch.setattr(Path, "rename", rename)
    if not done:
        monkeypatch.setattr(checkpoint, "_checkpointer", lambda: (_ for _ in ()).throw(Killed))
    with pytest.raises(Killed) if done < 3 else nullcontext():
        checkpoint.save(tmp_path, 1, tree(7))
    monkeypatch.undo()
    checkpoint.clean(tmp_path)
    found = checkpoint.restore(tmp_path, tree(0))
    jax.tree.map(np.testing.assert_array_equal, found.tree, tree(7 if done else 1))
    assert [path.name for path in tmp_path.iterdir()] == ["1"]


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 400 kB, where one may be mounted."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", str(place)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("needs the right to mount a small file system")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def test_a_full_disk_is_said_and_leaves_what_was_there(small_disk):
    saved(small_disk)
    with pytest.raises(checkpoint.SaveError, match=r"/3 \(8,000,000 bytes\) cannot be written"):
        checkpoint.save(small_disk, 3, jnp.asarray(np.random.default_rng(0).random(2_000_000)))
    assert sorted(path.name for path in small_disk.iterdir()) == ["1", "2"]
    assert checkpoint.restore(small_disk, tree(0)).step == 2


# --- numbers that are not finite ------------------------------------------------------------


def poisoned(bad_step: int, task: int | None):
    """A learner on random tasks, in one of which a target is infinite at one step."""
    method = maml(nets.mlp((4,), inputs=2), lr=0.01, steps=1, loss=squared_error)
    learner = trainer(method, optax.adam(1e-2))
    tasks = make_tasks(jax.random.key(1), 3, way=2, queries=3, shape=(2,))
    tasks = Task(*(Examples(part.x, part.y[..., :1]) for part in tasks))

    def step(key, state, tasks):
        poison = jnp.where(state.step == bad_step, jnp.inf, 0.0)
        where = jnp.zeros(3) if task is None else jax.nn.one_hot(task, 3)
        y = tasks.query.y + jnp.where(where > 0, poison, 0.0)[:, None, None]
        return learner.step(key, state, tasks._replace(query=tasks.query._replace(y=y)))

    return meta.Trainer(learner.init, step), lambda key, data: data, tasks


@pytest.mark.parametrize("skip", [False, True])
def test_an_update_that_is_not_finite_is_left_out_and_its_task_named(skip):
    made, sample, tasks = poisoned(bad_step=3, task=1)
    go = jax.jit(partial(advance, made, sample, capacity=8, skip=int(skip)))
    state = made.init(jax.random.key(0))
    before, *_ = go(jax.random.key(5), state, tasks, 3)
    after, info, filled = go(jax.random.key(5), state, tasks, 4)
    assert filled == 4
    jax.tree.map(np.testing.assert_array_equal, after.params, before.params)
    jax.tree.map(np.testing.assert_array_equal, after.opt, before.opt)
    assert after.step == (4 if skip else 3)
    last = jax.tree.map(lambda rows: np.asarray(rows[3]), info["finite"])
    assert last["loss"].tolist() == [True, False, True]
    assert training.not_finite(last) == "loss of task 1"
    assert training.not_finite(jax.tree.map(lambda rows: rows[2], info["finite"])) == ""
    end, info, filled = go(jax.random.key(5), state, tasks, 8)
    assert filled == (8 if skip else 4)
    assert meta.all_finite(end.params)
    assert (end.step, bool(jnp.isfinite(info["loss"][5]))) == ((8, True) if skip else (3, True))


def test_advance_is_run_whatever_the_number_of_steps_and_compiles_once():
    made, sample, tasks = poisoned(bad_step=-1, task=None)
    traced = []

    def counted(key, state, tasks, count):
        traced.append(count)
        return advance(made, sample, key, state, tasks, count, capacity=6)

    go = jax.jit(counted)
    state = made.init(jax.random.key(0))
    for count in range(1, 7):
        want, rows = jax.jit(partial(loops.run, made, sample, steps=count))(
            jax.random.key(5), state, tasks
        )
        got, info, filled = go(jax.random.key(5), state, tasks, count)
        assert filled == count
        close = partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-7)
        jax.tree.map(close, got, want)
        jax.tree.map(lambda a, b, n=count: close(a[:n], b), info, rows)
        by_ones = state
        for _ in range(count):
            by_ones, *_ = go(jax.random.key(5), by_ones, tasks, 1)
        jax.tree.map(np.testing.assert_array_equal, by_ones, got)
    assert len(traced) == 1


def test_a_gradient_and_a_parameter_that_are_not_finite_are_told_apart():
    def judge(key, net, make, params, task):
        zero = 0 * jnp.sum(params.net["head"]["bias"])
        return jnp.sqrt(zero), net.apply(params.net, task.query.x)  # 0, with a slope of 0 / 0

    method = maml(nets.mlp((4,), inputs=2, outputs=2))._replace(judge=judge)
    tasks = make_tasks(jax.random.key(1), 2, way=2, queries=3, shape=(2,))
    params = method.algorithm(method.net, method.inner).init(jax.random.key(0))
    _, info = meta_gradient(method, jax.random.key(1), params, tasks)
    finite = jax.tree.map(np.asarray, info["finite"])
    assert finite["loss"].all()
    assert training.not_finite(finite | {"parameters": np.False_}) == "gradient of task 0, 1"
    fine = {name: np.ones(2, bool) for name in ("loss", "gradient")}
    assert "optimiser state" in training.not_finite(fine | {"parameters": np.False_})


# --- one run, in this process ---------------------------------------------------------------


@pytest.fixture(autouse=True)
def small_tests(monkeypatch):
    few_episodes(monkeypatch)


def state_of(folder: Path):
    made = loading.setup(store.read_config(folder))
    like = jax.eval_shape(lambda: runs.begin(made))
    return checkpoint.restore(folder / "checkpoints", like).tree


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run of twelve steps that nothing disturbed."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    with pytest.MonkeyPatch.context() as patch:
        few_episodes(patch)
        code = start(patch, train, *SINES, "--steps=12", "--eval_every=4", f"--out={folder}")
    assert code == 0
    return folder


def assert_same_run(one: Path, other: Path) -> None:
    jax.tree.map(np.testing.assert_array_equal, state_of(one), state_of(other))
    assert metrics.read(one) == metrics.read(other)


class StopAfter(cli.Interruption):
    """A signal that comes during the n-th chunk."""

    def __init__(self, looks: int):
        super().__init__()
        self.looks = looks

    @property
    def requested(self) -> bool:
        self.looks -= 1
        return self.looks < 0

    @requested.setter
    def requested(self, value: bool) -> None:
        pass


@pytest.mark.parametrize("size", [1, 3])
def test_interrupted_anywhere_and_resumed_is_uninterrupted(
    size, whole, tmp_path, monkeypatch, capsys
):
    (tmp_path / "really here").mkdir()
    folder = tmp_path / "link ü"
    folder.symlink_to(tmp_path / "really here")
    monkeypatch.setattr(training, "chunk_size", lambda seconds: size)
    arguments = (*SINES, "--steps=12", "--eval_every=4", f"--out={folder}")
    codes, stops = [], iter([3, 2, 4, 5, 3, 2])
    for _ in range(30):
        looks = next(stops, 10**6)
        monkeypatch.setattr(cli, "Interruption", lambda at_once="", n=looks: StopAfter(n))
        codes.append(start(monkeypatch, train, *arguments, "--requeue"))
        if codes[-1] == 0:
            break
        step = int(re.search(r"saved at step (\d+)", capsys.readouterr().err)[1])
        assert checkpoint.steps(folder / "checkpoints")[-1] == step
    assert codes[:-1]
    assert set(codes[:-1]) == {75}
    assert_same_run(folder, whole)


def test_a_signal_before_the_first_step_says_that_nothing_was_done(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(cli, "Interruption", lambda at_once="": StopAfter(0))
    arguments = (*SINES, "--steps=12", f"--out={tmp_path / 'run'}")
    assert start(monkeypatch, train, *arguments) == 75
    assert "nothing was done yet" in capsys.readouterr().err


@pytest.mark.parametrize("chunk", [1, 5])
def test_cadences_do_not_change_the_run(chunk, whole, tmp_path, monkeypatch):
    monkeypatch.setattr(training, "chunk_size", lambda seconds: chunk)
    monkeypatch.setattr(metrics.Records, "add", lambda self, *records: None)
    monkeypatch.setattr(plots, "curves", lambda *arguments: None)
    folder = tmp_path / "run"
    assert start(monkeypatch, train, *SINES, "--steps=12", "--eval_every=6", f"--out={folder}") == 0
    one, other = state_of(folder).state, state_of(whole).state
    jax.tree.map(np.testing.assert_array_equal, one, other)


def test_a_run_with_damaged_checkpoints_alone_is_not_begun_anew(
    whole, tmp_path, monkeypatch, capsys
):
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    for path in (folder / "checkpoints").glob("*/about.json"):
        path.write_text("{}")
    arguments = (*SINES, "--steps=12", "--eval_every=4", f"--out={folder}", "--resume")
    for _ in range(2):  # the second time they are put aside already
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            text = refused(capsys, monkeypatch, train, *arguments)
        assert "no checkpoint" in text
    assert len(list((folder / "checkpoints").glob("*.corrupt"))) == 2
    shutil.rmtree(folder / "checkpoints")
    assert "checkpoints are gone" in refused(capsys, monkeypatch, train, *arguments)
    assert len(metrics.read(folder)) == len(metrics.read(whole))


def test_a_run_killed_before_its_first_checkpoint_says_that_it_begins_anew(
    whole, tmp_path, monkeypatch, capsys
):
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    shutil.rmtree(folder / "checkpoints")
    (folder / "results.json").unlink()
    arguments = (*SINES, "--steps=12", "--eval_every=4", f"--out={folder}", "--resume")
    assert start(monkeypatch, train, *arguments) == 0
    assert "beginning at step 0" in capsys.readouterr().out
    assert_same_run(folder, whole)
    assert (folder / "metrics.jsonl.old").exists()


def test_another_cadence_of_validation_may_be_resumed_and_is_said(
    whole, tmp_path, monkeypatch, capsys
):
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    arguments = (*SINES, "--steps=14", "--eval_every=7", f"--out={folder}", "--resume")
    assert start(monkeypatch, train, *arguments) == 0
    printed = capsys.readouterr().out
    assert "note: --eval_every is 7 but was 4" in printed
    assert "note: --steps is 14 but was 12" in printed


def test_checkpoints_of_another_run_are_refused(whole, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "run"
    arguments = (*SINES, "--steps=12", "--eval_every=4", "--seed=1", f"--out={folder}")
    assert start(monkeypatch, train, *arguments) == 0
    shutil.rmtree(folder / "checkpoints")
    shutil.copytree(whole / "checkpoints", folder / "checkpoints")
    text = refused(capsys, monkeypatch, train, *arguments, "--resume")
    assert "--seed is 1 but was 0" in text


def test_what_is_not_bit_exact_is_said(whole, monkeypatch, capsys):
    made = loading.setup(store.read_config(whole))
    store.restore(made, whole, resume=True)
    assert "not bit-exact" not in capsys.readouterr().out
    now = store.versions()
    monkeypatch.setattr(store, "versions", lambda: now | {"jaxlib": "99"})
    store.restore(runs.on_devices(made, None, tasks_at_once(1)), whole, resume=True)
    said = (
        f"not bit-exact to what came before: jaxlib {now['jaxlib']} -> 99, tasks_at_once None -> 1"
    )
    assert said in capsys.readouterr().out


def test_other_data_are_refused_by_the_folder_and_by_the_checkpoint(whole):
    made = loading.setup(store.read_config(whole))._replace(digests={"train": "ab", "test": "cd"})
    says = "the train and test data are not those that"
    with pytest.raises(cli.BadInput, match=says):
        store.check_digests(whole, made)
    with pytest.raises(cli.BadInput, match=says):
        store.restore(made, whole, resume=True)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"steps": "6"}, "steps='6' is no int"),
        ({"method": 3}, "method=3 is no str"),
        ({"net": 5}, "net=5 is no str | None"),
        ({"outer_lr": "x"}, "outer_lr='x' is no float"),
        ({"outer_lr": None}, "outer_lr=None is no float"),
        ({"labels": ["a"]}, "labels=['a'] is no str"),
        ({"seed": 1.5}, "seed=1.5 is no int"),
        ({"seed": True}, "seed=True is no int"),
        ({"steps": 6.5, "rotations": 1}, "steps=6.5 is no int; rotations=1 is no bool"),
        ({"sigma": 1}, "sigma is no setting"),
        (("way", "seed"), "way is missing; seed is missing"),
        ("{", "Expecting property name"),
        ("[]", "it says nothing of a configuration"),
        ("[" * 10**5, "is not a run folder"),
        ({"steps": 0}, "--steps=0 must be 1 or more"),
        ({"method": "mamal()"}, "mamal"),
    ],
)
def test_an_edited_configuration_is_refused_in_a_sentence(
    change, says, whole, tmp_path, monkeypatch, capsys
):
    record = json.loads((whole / "config.json").read_text())
    if isinstance(change, dict):
        record["config"] |= change
    elif isinstance(change, tuple):
        record["config"] = {k: v for k, v in record["config"].items() if k not in change}
    text = change if isinstance(change, str) else json.dumps(record)
    (tmp_path / "config.json").write_text(text)
    assert says in refused(capsys, monkeypatch, evaluate, f"--run={tmp_path}")


def test_a_folder_that_cannot_be_written_is_refused(tmp_path, monkeypatch, capsys):
    (tmp_path / "file").touch()
    (tmp_path / "sealed").mkdir(mode=0o500)
    places = [tmp_path / "file" / "run"]
    if os.geteuid():  # root may write everywhere
        places.append(tmp_path / "sealed" / "run")
    for place in places:
        text = refused(capsys, monkeypatch, train, *SINES, "--steps=1", f"--out={place}")
        assert f"cannot write to {place}" in text


def test_a_folder_in_use_is_refused_and_a_freed_one_taken(whole, monkeypatch, capsys):
    arguments = (*SINES, "--steps=12", "--eval_every=4", f"--out={whole}", "--resume")
    with store.locked(whole):
        text = refused(capsys, monkeypatch, train, *arguments)
    assert f"in use by process {os.getpid()}" in text
    assert start(monkeypatch, train, *arguments) == 0


@pytest.mark.parametrize("failures", [1, 2, 3])
def test_a_save_that_fails_is_said_and_tried_again(failures, whole, tmp_path, monkeypatch, capsys):
    """Of checkpoints at 4, 8 and 12 some cannot be written; the third in a row ends the run."""
    real, tries = checkpoint.save, []

    def save(*arguments, **options):
        tries.append(1)
        if len(tries) <= failures:
            raise checkpoint.SaveError("x/4 (100 bytes) cannot be written: no space left")
        real(*arguments, **options)

    monkeypatch.setattr(checkpoint, "save", save)
    folder = tmp_path / "run"
    arguments = (*SINES, "--steps=12", "--eval_every=4", f"--out={folder}")
    code = start(monkeypatch, train, *arguments)
    printed = capsys.readouterr()
    assert printed.out.count("warning: x/4 (100 bytes) cannot be written") == failures
    assert code == (1 if failures == 3 else 0)
    if failures == 3:
        assert "Make room, then go on with" in printed.err
        return
    assert_same_run(folder, whole)


def test_skipped_updates_are_counted_and_end_the_run_when_they_are_too_many(
    tmp_path, monkeypatch, capsys
):
    real = meta.trainer

    def poisoned(method, optimizer):
        made = real(method, optimizer)

        def step(key, state, tasks):
            bad = jnp.where((state.step == 2) | (state.step == 5), jnp.nan, 0.0)
            y = tasks.query.y.at[1].add(bad)
            return made.step(key, state, tasks._replace(query=tasks.query._replace(y=y)))

        return meta.Trainer(made.init, step)

    monkeypatch.setattr(meta, "trainer", poisoned)
    arguments = [*SINES, "--steps=8", "--eval_every=4"]
    codes = [
        start(monkeypatch, train, *arguments, f"--out={tmp_path / str(n)}", f"--skip_nonfinite={n}")
        for n in (0, 1, 2)
    ]
    assert codes == [3, 3, 0]
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    assert "loss of task 1 of step 3 is not finite; the state of step 2 is saved" in errors[0]
    assert "of step 6 is not finite, after 1 that were left out; the state of step" in errors[1]
    results = json.loads((tmp_path / "2" / "results.json").read_text())
    assert state_of(tmp_path / "2").skipped == results["skipped"] == 2
    records = metrics.read(tmp_path / "2")
    assert [r["step"] for r in records if "skipped" in r] == [3, 6]
    # the state is on disk already: nothing is written, nor can writing fail
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save", None)
        again = (*arguments, f"--out={tmp_path / '0'}", "--resume")
        assert start(monkeypatch, train, *again) == 3
    # nothing is lost by having met them with too small a number
    for n in (0, 1):
        folder = tmp_path / str(n)
        go_on = (*arguments, f"--out={folder}", "--resume", "--skip_nonfinite=2")
        assert start(monkeypatch, train, *go_on) == 0
        assert_same_run(folder, tmp_path / "2")
    # nor is the number needed again, once they are behind
    longer = (*SINES, "--steps=10", "--eval_every=4", f"--out={tmp_path / '2'}", "--resume")
    assert start(monkeypatch, train, *longer) == 0


def test_a_validation_that_is_not_finite_is_recorded_and_never_the_best(tmp_path, monkeypatch):
    real, folder = scoring.summary, tmp_path / "run"
    monkeypatch.setattr(scoring, "TEST_EPISODES", 30)

    def summary(scores, *how):
        found = real(scores, *how)
        return found | {"mean": float("nan")} if found["episodes"] == 10 else found

    monkeypatch.setattr(scoring, "summary", summary)
    assert start(monkeypatch, train, *SINES, "--steps=4", "--eval_every=2", f"--out={folder}") == 0
    records = [r for r in metrics.read(folder) if "val_mse" in r]
    assert [r["val_mse"] for r in records] == [None, None]
    assert state_of(folder).best_step == 0
    assert checkpoint.steps(folder / "checkpoints") == [2, 4]


def test_an_optimiser_state_that_is_not_finite_is_not_taken():
    """Adam squares a finite gradient of 1e22 to infinity, and never moves again."""
    tasks = make_tasks(jax.random.key(1), 2, way=2, queries=3, shape=(2,))
    tasks = Task(*(Examples(part.x, part.y[..., :1]) for part in tasks))
    tasks = tasks._replace(query=tasks.query._replace(y=tasks.query.y * 1e22))
    made = trainer(
        maml(nets.mlp((4,), inputs=2), loss=lambda o, y: jnp.mean(o * y)), optax.adam(1e-2)
    )
    _, info = jax.jit(made.step)(jax.random.key(0), made.init(jax.random.key(2)), tasks)
    finite = jax.tree.map(np.asarray, info["finite"])
    assert finite["loss"].all()
    assert finite["gradient"].all()
    assert "optimiser state" in training.not_finite(finite)


# --- processes and signals ------------------------------------------------------------------


LAUNCHED: list[subprocess.Popen] = []


@pytest.fixture(autouse=True)
def no_process_outlives_its_test():
    yield
    for process in LAUNCHED:
        process.kill()
        process.communicate()
    LAUNCHED.clear()


def launch(folder, *arguments, **options) -> subprocess.Popen:
    command = [sys.executable, "-m", "experiments.train", *SINES, f"--out={folder}", *arguments]
    if (folder / "config.json").exists():
        command.append("--resume")
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options
    )
    LAUNCHED.append(process)
    return process


def finish(process: subprocess.Popen, code: int = 0) -> tuple[str, str]:
    """What it printed, having ended as it should."""
    out, err = process.communicate()
    assert process.returncode == code, (out, err)
    return out, err


def wait_for(condition, process: subprocess.Popen, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.01)


def has_checkpoint(folder):
    return bool(checkpoint.steps(folder / "checkpoints"))


LONG = ("--steps=100000", "--eval_every=20")


@pytest.mark.parametrize("number", cli.SIGNALS)
def test_the_second_signal_is_the_process_s_own(number):
    heard = []
    before = signal.signal(number, lambda *arguments: heard.append(number))
    try:
        with cli.Interruption() as stop:
            os.kill(os.getpid(), number)
            assert stop.requested
            assert heard == []
            os.kill(os.getpid(), number)
            assert heard == [number]
        with (
            pytest.raises(cli.Interrupted, match="nothing to save"),
            cli.Interruption(at_once="nothing to save"),
        ):
            os.kill(os.getpid(), number)
        os.kill(os.getpid(), number)
        assert heard == [number, number]
    finally:
        signal.signal(number, before)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_ends_with_75(number, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "run"
    process = launch(folder, *LONG)
    wait_for(lambda: has_checkpoint(folder), process)
    text = refused(capsys, monkeypatch, train, *SINES, *LONG, f"--out={folder}", "--resume")
    assert f"in use by process {process.pid}" in text
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 75, (out, err)
    step = int(re.search(r"interrupted: saved at step (\d+); go on with", err)[1])
    assert checkpoint.steps(folder / "checkpoints")[-1] == step
    assert len([r for r in metrics.read(folder) if "loss" in r]) == step
    assert state_of(folder).state.step == step


def test_other_devices_go_on_and_say_so(whole, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    longer, alone = ("--steps=16", "--eval_every=4"), tmp_path / "alone"
    out, _ = finish(launch(folder, *longer, "--mesh=2"))  # divides the CPU
    assert "not bit-exact to what came before: devices 1 -> 2\n" in out
    shutil.copytree(whole, alone)
    finish(launch(alone, *longer))
    one, other = state_of(folder).state, state_of(alone).state
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), one, other)


def test_a_full_disk_ends_a_run_with_what_to_do_and_loses_no_checkpoint(small_disk):
    folder = small_disk / "run"
    process = launch(folder, *LONG)
    wait_for(lambda: has_checkpoint(folder), process)
    with suppress(OSError), (small_disk / "filler").open("wb", buffering=0) as file:
        while True:
            file.write(b"0" * 4096)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 1, (out, err)
    assert "Make room, then go on with" in err
    assert "bytes) cannot be written" in out
    (small_disk / "filler").unlink()
    kept = checkpoint.steps(folder / "checkpoints")
    assert state_of(folder).state.step == kept[-1] > 0


def kill(process: subprocess.Popen) -> None:
    process.kill()


def signal_twice(process: subprocess.Popen) -> None:
    process.terminate()
    next(line for line in process.stderr if "once more ends at once" in line)
    process.terminate()


def end_by_force(tmp_path, seed: int, *trials) -> None:
    """Ends a run by force again and again, lets it end and compares it with one left alone.

    Every trial is `(checkpoints to wait for, line to wait for, most seconds after both, how)`.
    """
    rng, last = random.Random(seed), 400
    arguments = (f"--steps={last}", "--eval_every=5")
    alone, folder = tmp_path / "alone", tmp_path / "killed"
    finish(launch(alone, *arguments))

    def step() -> int:
        return max(checkpoint.steps(folder / "checkpoints"), default=0)

    for wait, line, seconds, how in trials:
        until = min(step() + 5 * wait, last)
        process = launch(folder, *arguments)
        wait_for(lambda until=until: step() >= until, process)
        if line:
            next(text for text in process.stdout if text.startswith(line))
        time.sleep(rng.random() * seconds)
        how(process)
        process.communicate()
        assert process.returncode in (-signal.SIGKILL, -signal.SIGTERM)
        assert step() >= until  # nothing is lost
    finish(launch(folder, *arguments))
    assert all(path.name.isdigit() for path in (folder / "checkpoints").iterdir())
    assert_same_run(folder, alone)


def test_a_run_ended_by_force_goes_on_as_if_it_had_not_been(tmp_path):
    end_by_force(tmp_path, 0, (1, "", 0.3, kill), (0, "compiling", 0, signal_twice))


@pytest.mark.slow
def test_twenty_kills(tmp_path):
    start, saving, report = (0, "", 6, kill), (2, "", 0.3, kill), (80, "testing", 1, kill)
    end_by_force(tmp_path, 1, *[start] * 4, *[saving, saving, start] * 4, *[report] * 4)


def usage(pid: int) -> tuple[int, int]:
    """Resident memory in kB and open files of a process."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(re.search(r"VmRSS:\s+(\d+)", status)[1]), len(os.listdir(f"/proc/{pid}/fd"))


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
@pytest.mark.timeout(3600)
def test_memory_and_files_stay_flat_over_a_long_run(tmp_path):
    """20,000 steps with 200 validations and saves, and a restart in the middle."""
    folder, arguments = tmp_path / "run", ("--steps=20000", "--eval_every=100")
    for until in (10_000, 20_000):
        process, seen = launch(folder, *arguments), []

        def step(folder=folder):
            return max(checkpoint.steps(folder / "checkpoints"), default=0)

        first = step()
        while process.poll() is None and step() < until:
            if step() >= first + 2000:
                seen.append(usage(process.pid))
            time.sleep(0.02)
        process.send_signal(signal.SIGTERM)
        process.communicate()
        memory, files = np.array(seen).T
        early, late = np.array_split(memory, 4)[0], np.array_split(memory, 4)[-1]
        idle = [int(part.min()) for part in np.array_split(files, 2)]  # a save has some open
        print(f"to {until}: {len(seen)} looks, {early.mean():.0f} -> {late.mean():.0f} kB, {idle}")
        assert late.mean() < 1.02 * early.mean()
        assert idle[0] == idle[1]
    finish(launch(folder, *arguments))
    steps = [r["step"] for r in metrics.read(folder) if "loss" in r]
    assert steps == list(range(1, 20_001))
