"""Trained on one data set, tested on another."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import refused, start
from PIL import Image

from experiments import compare, evaluate, loading, runs, scoring, store
from mgaug_jax.data import DATASETS, describe, load, on_disk, pixels

pytestmark = pytest.mark.usefixtures("quick_compile")

CONFIG = runs.Config(
    method="protonet()",
    net="conv4(width=2)",
    data="glyphs",
    data_dir=None,
    labels="exclusive",
    way=2,
    shot=1,
    queries=2,
    tasks=2,
    steps=2,
    outer_lr=1e-3,
    eval_every=2,
    seed=0,
)


@pytest.fixture
def run(tmp_path, monkeypatch, glyph_cache):
    """A run on glyphs, as it begins."""
    monkeypatch.setenv("MGAUG_JAX_CACHE", str(glyph_cache))
    folder = tmp_path / "run"
    folder.mkdir()
    made = loading.for_images(CONFIG, (28, 28, 1), jnp.zeros(1), jnp.ones(1))
    store.write_config(folder, made)
    store.save(made, folder, runs.begin(made))
    return folder


@pytest.fixture
def own(tmp_path):
    """Colour images of 40 x 40 in three classes, in a folder for the test alone."""
    rng = np.random.default_rng(0)
    for name in ("cat", "dog", "hen"):
        (tmp_path / "own/test" / name).mkdir(parents=True)
        for i in range(4):
            image = rng.integers(0, 256, (40, 40, 3), np.uint8)
            (tmp_path / "own/test" / name / f"{i}.png").write_bytes(pixels.encode(image))
    return tmp_path / "own"


@pytest.mark.parametrize("stream", ["no", "yes"])
def test_a_run_on_glyphs_is_tested_on_own_images(stream, run, own, monkeypatch, capsys):
    arguments = (f"--run={run}", "--data=folder", f"--data_dir={own}", "--episodes=7")
    assert start(monkeypatch, evaluate, *arguments, f"--stream={stream}") == 0
    assert "trained on glyphs, tested on folder" in capsys.readouterr().out
    found = json.loads((run / "evaluation-folder/evaluation.json").read_text())
    assert (found["trained_on"], found["tested_on"]) == ("glyphs", "folder")
    assert "label_memory" not in found
    like = {"data_dir": own, "like": "glyphs"}
    assert found["digest"] == describe("folder", "test", **like).digest
    # the same scores from an independent evaluation of grey, inverted, small images
    images = []
    for path in sorted((own / "test").glob("*/*.png")):
        with Image.open(path) as image:
            grey = image.convert("L").resize((28, 28), Image.Resampling.LANCZOS)
            images.append(255 - np.asarray(grey))
    expected = np.reshape(images, (3, 4, 28, 28, 1))
    np.testing.assert_array_equal(on_disk("folder", "test", **like).pixels, expected)
    made = loading.for_images(CONFIG, (28, 28, 1), jnp.zeros(1), jnp.ones(1))
    params = store.restore(made, run).best
    learner = made.tested.algorithm(made.tested.net, made.tested.test)
    k_sample, k_adapt = jax.random.split(jax.random.fold_in(scoring.episode_key(20), 4))
    drawn = loading._episode(CONFIG, {"test": on_disk("folder", "test", **like)})
    pixel_images = load("glyphs", "test")._replace(
        pixels=jnp.asarray(expected), counts=jnp.full(3, 4)
    )
    task = jax.tree.map(lambda leaf: leaf[0], drawn(k_sample, pixel_images))
    outputs = learner.predict(learner.adapt(k_adapt, params, task.support), task.query.x)
    with np.load(run / "evaluation-folder/episodes.npz") as stored:
        want = np.mean(np.argmax(outputs, 1) == np.argmax(task.query.y, 1))
        np.testing.assert_allclose(stored["adapted"][4], want, atol=1e-6)
        assert json.loads(str(stored["identity"]))["data"] == "folder"
    again = ("--run_a", str(run / "evaluation-folder"), "--run_b", str(run / "evaluation-folder"))
    assert start(monkeypatch, compare, *again) == 0


def test_like_gives_size_colours_and_normalisation(own, tmp_path):
    where = {"data_dir": own, "cache_dir": tmp_path / "cache"}
    grey = on_disk("folder", "test", like="omniglot", **where)
    colour = on_disk("folder", "test", like="mini_imagenet", size=20, **where)
    plain = on_disk("folder", "test", size=20, **where)
    assert grey.pixels.shape == (3, 4, 28, 28, 1)
    assert (float(grey.mean[0]), float(grey.std[0])) == (0, 1)
    np.testing.assert_array_equal(colour.pixels, plain.pixels)
    np.testing.assert_array_equal(colour.mean, plain.mean)
    assert DATASETS["folder"].mean == DATASETS["mini_imagenet"].mean


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (("--data=sinusoid",), "a run on glyphs cannot be tested on sinusoid: one has no images"),
        (("--data=imagenet",), "'imagenet' was asked for, but is not known"),
        (("--data=folder", "--image_size=9"), "--image_size is the run's"),
        (("--data=folder", "--data_dir=none"), "none, but there is no such folder"),
        (("--data=folder", "--data_dir=OWN", "--splits=none.json"), "splits=none.json was asked"),
    ],
)
def test_what_cannot_be_is_said(arguments, why, run, own, monkeypatch, capsys):
    arguments = [text.replace("OWN", str(own)) for text in arguments]
    assert why in refused(capsys, monkeypatch, evaluate, f"--run={run}", *arguments)


def test_more_ways_than_the_other_set_has_classes(run, own, monkeypatch, capsys):
    record = json.loads((run / "config.json").read_text())
    record["config"]["way"] = 4
    (run / "config.json").write_text(json.dumps(record))
    arguments = (f"--run={run}", "--data=folder", f"--data_dir={own}")
    assert "the test split has 3 classes" in refused(capsys, monkeypatch, evaluate, *arguments)


def test_drawn_images_serve_only_those_trained_on_their_like():
    with pytest.raises(ValueError, match=r"84 pixels and 3 channels, but its own are of 28 and 1"):
        on_disk("glyphs", "test", like="mini_imagenet")
