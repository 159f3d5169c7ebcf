"""Images on disk give the tasks, and runs the numbers, that images on the device give."""

import dataclasses
import json
import threading
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import start

from experiments import evaluate, loading, metrics, runs, scoring, store, train
from mgaug_jax import episodes, loops, nets, protonet, sampler, trainer
from mgaug_jax.data import load, on_disk, streaming

pytestmark = pytest.mark.usefixtures("quick_compile")

COUNTS = (5, 8, 6, 9, 7, 5)
LAWS = {
    "exclusive": episodes.mutually_exclusive,
    "fixed labels": episodes.fixed_labels,
    "fixed groups": episodes.fixed_groups,
    "shuffled groups": episodes.shuffled_groups,
}


@pytest.fixture
def stored(tmp_path) -> streaming.Stored:
    """Random images of six classes on disk."""
    shape = (len(COUNTS), max(COUNTS), 6, 6, 3)
    np.save(tmp_path / "x.npy", np.random.default_rng(0).integers(0, 256, shape, np.uint8))
    pixels = np.load(tmp_path / "x.npy", mmap_mode="r")
    return streaming.Stored(pixels, jnp.array(COUNTS), jnp.full(3, 0.4), jnp.full(3, 0.3))


def equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.parametrize("turns", [1, 4])
@pytest.mark.parametrize("law", LAWS)
def test_tasks_from_disk_are_those_from_the_device(law, turns, stored):
    """For many numbers, and whatever the block in which they were gathered."""
    stored = stored if turns == 1 else streaming.turned(stored)
    sample, key, numbers = sampler(3, 2, 2, 4, LAWS[law]), jax.random.key(7), np.arange(40, 72)
    gathered = streaming.gatherer(sample, stored)(key, numbers)
    images = streaming.on_device(stored)
    keys = [jax.random.split(jax.random.fold_in(key, n))[0] for n in numbers]
    from_disk, from_device = jax.jit(streaming.look_up), jax.jit(sample)
    for each in keys:
        equal(from_disk(each, gathered), from_device(each, images))
    other = streaming.gatherer(sample, stored)(key, numbers[5:7])
    equal(from_disk(keys[6], gathered), from_disk(keys[6], other))
    assert gathered.tasks.support.x.dtype == jnp.uint8


def test_turned_classes_are_those_of_episodes(stored):
    turned = streaming.turned(stored)
    images = streaming.on_device(turned)
    classes, numbers = np.indices(images.pixels.shape[:2])
    np.testing.assert_array_equal(streaming.take(turned, classes, numbers), images.pixels)
    equal(images, episodes.with_rotations(streaming.on_device(stored)))
    plain = [np.rot90(stored.pixels, turns, axes=(2, 3)) for turns in range(4)]
    np.testing.assert_array_equal(images.pixels, np.concatenate(plain))
    with pytest.raises(ValueError, match="not square"):
        streaming.turned(streaming.Stored(np.zeros((2, 3, 4, 5, 1), "u1"), *stored_numbers()))


def stored_numbers():
    return jnp.array([3, 3]), jnp.zeros(1), jnp.ones(1)


def test_a_number_that_was_not_gathered_gives_nan_not_another_task(stored):
    sample, key = sampler(3, 2, 2, 4), jax.random.key(7)
    gathered = streaming.gatherer(sample, stored)(key, np.arange(4))
    for number, known in ((3, True), (4, False)):
        k_sample = jax.random.split(jax.random.fold_in(key, number))[0]
        task = streaming.look_up(k_sample, gathered)
        assert np.isfinite(task.query.x).all() == known
        assert np.isnan(task.query.x).all() != known


def test_places_are_exact_up_to_the_largest_sets():
    """Every number below 2^20 comes back from floats, by the arithmetic of `normalise`."""
    numbers = jnp.arange(2**20)[:, None]
    back = episodes.normalise(numbers, jnp.zeros(1), jnp.full(1, 1 / 255))
    assert (np.rint(back).astype(int) == numbers).all()


def test_images_on_disk_are_no_argument_of_a_compiled_function(stored):
    with pytest.raises(TypeError, match="Stored"):
        jax.jit(lambda stored: 0)(stored)


def test_blocks_have_a_bound(stored, monkeypatch):
    sample = sampler(3, 2, 2, 4)  # 48 images of 108 bytes
    assert streaming.rows(sample, stored, 25) == 25
    monkeypatch.setattr(streaming, "BLOCK", 3 * 48 * 108)
    assert streaming.rows(sample, stored, 25) == 3
    monkeypatch.setattr(streaming, "BLOCK", 1)
    assert streaming.rows(sample, stored, 25) == 1


def test_load_is_what_is_on_disk(glyph_cache):
    images, stored = (read("glyphs", "val", cache_dir=glyph_cache) for read in (load, on_disk))
    equal(images, streaming.on_device(stored))
    assert isinstance(stored.pixels, np.memmap)
    assert streaming.nbytes(stored) == images.pixels.nbytes
    assert jax.tree.map(jnp.shape, images) == jax.tree.map(jnp.shape, streaming.shapes(stored))


# --- ahead ----------------------------------------------------------------------------------


def test_the_next_are_made_while_one_is_used_and_none_beyond_the_last():
    made, second = [], threading.Event()

    def make(n):
        made.append(n)
        if n == 6:
            second.set()
        return 10 * n

    with streaming.ahead(make, 8, depth=1) as get:
        assert get(5) == 50
        assert second.wait(30)  # nobody has asked for 6
        assert [get(n) for n in (5, 6, 6, 7)] == [50, 60, 60, 70]
    assert made == [5, 6, 7]


def test_what_the_reader_raises_reaches_the_one_who_asks_and_the_thread_ends():
    def make(n):
        if n == 1:
            raise OSError("the disk is gone")
        return n

    threads = threading.active_count()
    with streaming.ahead(make, 5) as get:
        assert get(0) == 0
        with pytest.raises(OSError, match="the disk is gone"):
            get(1)
    assert threading.active_count() == threads


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_an_interruption_ends_the_thread_and_drops_what_waits(error):
    made, entered, go = [], threading.Event(), threading.Event()

    def make(n):
        made.append(n)
        if n == 1:
            entered.set()
            go.wait(30)

    def interrupted():
        with streaming.ahead(make, 100, depth=50) as get:
            get(0)
            entered.wait(30)
            threading.Timer(0.1, go.set).start()
            raise error

    threads = threading.active_count()
    with pytest.raises(error):
        interrupted()
    assert made == [0, 1]  # what it was at was finished, the other 49 were not begun
    assert threading.active_count() <= threads + 1  # the timer


# --- runs -----------------------------------------------------------------------------------


@pytest.fixture
def linear(stored) -> runs.Setup:
    """A prototypical network of one linear layer on the stored images."""
    net = nets.from_functions(
        lambda key: {"w": jax.random.normal(key, (108, 5)) / 10},
        lambda params, x: x.reshape(len(x), -1) @ params["w"],
    )
    method = protonet(net)
    return runs.Setup(
        config=None,
        method=lambda step: method,
        tested=method,
        trainer=trainer(method, optax.adam(1e-2)),
        sample=sampler(3, 2, 2, 4, episodes.fixed_labels),
        episode=sampler(3, 1, 4, 1),
        splits={"train": streaming.turned(stored), "test": stored},
        problem=None,
        digests={},
        metric="accuracy",
        permuted=episodes.permute_labels,
    )


def test_training_and_every_score_are_the_same(linear, monkeypatch):
    """`==`, for parameters after steps in blocks of three, for tests in blocks of two episodes, and
    for tasks whose labels are permuted.
    """
    monkeypatch.setattr(streaming, "BLOCK", 3 * 48 * 108)
    monkeypatch.setattr(scoring, "EPISODES_AT_ONCE", 7)
    key, found = jax.random.key(3), []
    for place in (streaming.on_device, lambda stored: stored):
        made = linear._replace(splits={name: place(s) for name, s in linear.splits.items()})
        sample = streaming.either(made.sample)
        advance = jax.jit(partial(loops.advance, made.trainer, sample, capacity=8))
        state, infos, done = made.trainer.init(jax.random.key(0)), [], 2
        state = state._replace(step=jnp.int32(done))
        with streaming.feed(made.sample, made.splits["train"], key, 12, 25) as at:
            while done < 12:
                data, end = at(done)
                state, info, filled = advance(key, state, data, min(5, end - done, 12 - done))
                infos += [jax.tree.map(lambda leaf, i=i: leaf[i], info) for i in range(int(filled))]
                done += int(filled)
        judge = scoring.evaluator(made)
        test = judge(state.params, made.splits["test"], 20, 15)
        found.append((state, infos, test, scoring.on_training(made)(state.params, 30, 9)))
    equal(*found)
    assert len(found[0][1]) == 10
    assert np.isfinite(found[0][2].adapted).all()


@pytest.fixture
def small(monkeypatch, glyph_cache):
    """Few episodes, and blocks of two meta-steps, so that they end between validations."""
    monkeypatch.setenv("MGAUG_JAX_CACHE", str(glyph_cache))
    monkeypatch.setattr(scoring, "TEST_EPISODES", 12)
    monkeypatch.setattr(scoring, "VALIDATION_EPISODES", 10)
    monkeypatch.setattr(scoring, "MEMORY_EPISODES", 10)
    monkeypatch.setattr(scoring, "EPISODES_AT_ONCE", 5)
    monkeypatch.setattr(streaming, "BLOCK", 2 * 2 * 9 * 28 * 28)


FLAGS = [
    *("--net=conv4(width=4)", "--way=3", "--queries=2", "--tasks=2", "--eval_every=3"),
    *("--method=fomaml(lr=0.1,steps=1)", "--rotations", "--labels=fixed_labels"),
]


def everything(folder):
    results = json.loads((folder / "results.json").read_text())
    del results["session_seconds"]
    with np.load(folder / "episodes.npz") as episodes:
        scores = {name: episodes[name].tolist() for name in episodes.files}
    state = store.restore(loading.setup(store.read_config(folder)), folder)
    leaves = [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(state)]
    return results, scores, metrics.read(folder), leaves


@pytest.mark.parametrize("turned", [(), ("train",), ("val", "test")])
def test_the_splits_that_are_asked_for_are_turned(turned, small, quick_compile):
    config = runs.Config(
        *("protonet()", "conv4(width=2)", "glyphs", None, "exclusive", 3, 1, 2, 1, 2, 1e-3, 2, 0)
    )
    plain = loading.setup(config).splits
    asked = {"rotations": "train" in turned, "test_rotations": "test" in turned}
    splits = loading.setup(dataclasses.replace(config, **asked)).splits
    for name in ("train", "val", "test"):
        times = 4 if name in turned else 1
        assert len(splits[name].counts) == times * len(plain[name].counts)


@pytest.mark.slow
def test_a_streamed_run_is_the_same_run(small, tmp_path, monkeypatch, capsys):
    """Parameters, optimiser, best, every record, every score: `==`. It goes on from images on the
    device, in the middle of a block.
    """
    device, disk = tmp_path / "device", tmp_path / "disk"
    assert start(monkeypatch, train, *FLAGS, "--steps=5", f"--out={device}") == 0
    assert start(monkeypatch, train, *FLAGS, "--steps=3", f"--out={disk}") == 0
    assert "stay on disk" not in capsys.readouterr().out
    streamed = ("--steps=5", f"--out={disk}", "--resume", "--stream=yes")
    assert start(monkeypatch, train, *FLAGS, *streamed) == 0
    assert "stay on disk" in capsys.readouterr().out
    for streamed, plain in zip(everything(disk), everything(device), strict=True):
        assert streamed == plain
    out = tmp_path / "test"
    again = (f"--run={device}", "--episodes=12", f"--output={out}", "--stream=yes")
    assert start(monkeypatch, evaluate, *again) == 0
    with np.load(out / "episodes.npz") as episodes:
        assert {name: episodes[name].tolist() for name in episodes.files} == everything(device)[1]


def test_a_reader_that_fails_ends_the_run_in_a_sentence(small, tmp_path, monkeypatch, capsys):
    def broken(stored, classes, images):
        raise OSError("Input/output error")

    monkeypatch.setattr(streaming, "take", broken)
    arguments = [*FLAGS, "--steps=5", "--stream=yes", f"--out={tmp_path / 'run'}"]
    assert start(monkeypatch, train, *arguments) == 1
    assert capsys.readouterr().err == "error: Input/output error\n"
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("gather")]


def test_auto_streams_what_is_larger_than_a_share_of_the_memory(small, monkeypatch):
    stored = {"train": on_disk("glyphs", "val"), "val": on_disk("glyphs", "val")}
    size = 2 * streaming.nbytes(stored["val"])
    for memory, streams in ((4 * size, False), (4 * size - 8, True), (None, False)):
        monkeypatch.setattr(loading, "device_memory", lambda memory=memory: memory)
        placed = loading.placed(stored, "auto", lambda text: None)
        assert all(isinstance(each, streaming.Stored) == streams for each in placed.values())
    monkeypatch.undo()
    assert (loading.device_memory() or 2**40) > 2**28
