"""A trained run on a user's own images."""

import csv

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import few_episodes, refused, start
from PIL import Image

from experiments import loading, predict, store, train
from mgaug_jax.episodes import normalise
from mgaug_jax.types import Examples

pytestmark = pytest.mark.usefixtures("quick_compile")

TINY = (
    "--net=conv4(width=4)",
    "--way=3",
    "--queries=2",
    "--tasks=2",
    "--steps=2",
    "--eval_every=2",
)


@pytest.fixture(autouse=True)
def small_tests(monkeypatch, glyph_cache, tmp_path):
    monkeypatch.setenv("MGAUG_JAX_CACHE", str(glyph_cache))
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def trained(tmp_path_factory, glyph_cache):
    """Runs of two steps: of a network with a head, and of prototypes."""
    folder = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MGAUG_JAX_CACHE", str(glyph_cache))
        few_episodes(patch, 6, 6, 6)
        for name, method in (("head", "fomaml(lr=0.1,steps=2)"), ("prototypes", "protonet()")):
            out = f"--out={folder / name}"
            assert start(patch, train, *TINY, f"--method={method}", out) == 0
    return folder


def draw(path, seed: int, ink: int = 0) -> np.ndarray:
    """A dark stroke on light paper."""
    rng = np.random.default_rng(seed)
    pixels = np.full((40, 40), 255, np.uint8)
    row, column = rng.integers(5, 25, 2)
    pixels[row : row + 8, column : column + 12] = ink
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
    return pixels


def folders(place, classes=("a ü", "b", "c"), shots=(1, 2, 3)):
    for c, (name, shot) in enumerate(zip(classes, shots, strict=True)):
        for i in range(shot):
            draw(place / "support" / name / f"{i}.png", 10 * c + i)
    for i in range(4):
        draw(place / "query" / ("sub" if i % 2 else ".") / f"{i}.png", 100 + i)
    return f"--support_dir={place / 'support'}", f"--query_dir={place / 'query'}"


@pytest.mark.parametrize("run", ["head", "prototypes"])
def test_probabilities_are_those_of_the_adapted_learner(
    run, trained, tmp_path, monkeypatch, capsys
):
    given = folders(tmp_path)
    assert start(monkeypatch, predict, f"--run={trained / run}", *given, "--out=out.csv") == 0
    with open("out.csv", encoding="utf-8", newline="") as file:
        header, *rows = csv.reader(file)
    assert header == ["file", "prediction", "a ü", "b", "c"]
    assert [row[0].rsplit("/", 1)[1] for row in rows] == ["0.png", "2.png", "1.png", "3.png"]
    assert "0.png: " in capsys.readouterr().out

    config = store.read_config(trained / run)
    made = loading.setup(config)

    def pixels(path):
        image = Image.open(path).resize((28, 28), Image.Resampling.LANCZOS)
        return 255 - np.asarray(image)[..., None]

    def x(paths):
        images = jnp.array(np.stack([pixels(path) for path in paths]))
        return normalise(images, *made.problem.pixels)

    shots = zip(header[2:], (1, 2, 3), strict=True)
    folder = tmp_path / "support"
    paths = [folder / name / f"{i}.png" for name, shot in shots for i in range(shot)]
    y = jnp.eye(3)[jnp.array([0, 1, 1, 2, 2, 2])]
    learner = made.tested.algorithm(made.tested.net, made.tested.test)
    params = store.restore(made, trained / run).best
    fast = learner.adapt(jax.random.key(0), params, Examples(x(paths), y))
    want = np.asarray(jax.nn.softmax(learner.predict(fast, x([row[0] for row in rows]))))
    found = np.array([[float(p) for p in row[2:]] for row in rows])
    np.testing.assert_allclose(found, want, atol=2e-5)
    np.testing.assert_allclose(found.sum(1), 1, atol=1e-5)
    assert [row[1] for row in rows] == [header[2:][i] for i in found.argmax(1)]


def test_prototypes_take_another_number_of_classes_and_a_head_does_not(
    trained, tmp_path, monkeypatch, capsys
):
    given = folders(tmp_path, ("a", "b"), (2, 2))
    assert start(monkeypatch, predict, f"--run={trained / 'prototypes'}", *given) == 0
    assert (tmp_path / "predictions.csv").exists()
    text = refused(
        capsys, monkeypatch, predict, f"--run={trained / 'head'}", *given, "--out=other.csv"
    )
    assert "2 classes were given, but the run's network tells 3 apart" in text
    assert not (tmp_path / "other.csv").exists()


def test_what_cannot_be_used_is_refused(trained, tmp_path, monkeypatch, capsys):
    run = f"--run={trained / 'head'}"
    support, query = folders(tmp_path)
    empty = tmp_path / "empty"
    (empty / "only" / "one").mkdir(parents=True)
    bad = tmp_path / "bad"
    bad.mkdir()
    (bad / "x.png").write_text("not an image")
    cases = {
        (run, support): "--query_dir is missing",
        (f"--run={empty}", support, query): "is not a run folder",
        (run, f"--support_dir={empty}", query): "has 1 sub-folders",
        (run, f"--support_dir={tmp_path / 'nowhere'}", query): "has 0 sub-folders",
        (run, support, f"--query_dir={empty}"): "holds no image",
        (run, support, f"--query_dir={bad}"): "x.png cannot be read",
        (run, support, query, "--out=/proc/nowhere/x.csv"): "cannot write /proc/nowhere/x.csv",
    }
    for arguments, says in cases.items():
        assert says in refused(capsys, monkeypatch, predict, *arguments)
    assert not list(tmp_path.glob("*.csv*"))
