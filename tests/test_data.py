"""Data sets, their cache and the episodes' difficulty."""

import hashlib
import io
import json
import subprocess
import sys
import zipfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image, ImageFont

from mgaug_jax import evaluate, nets, protonet, sampler
from mgaug_jax.data import DATASETS, SPLITS, describe, glyphs, ingest, load, omniglot, sinusoid

REAL = Path(__file__).parents[1].parent / "shared" / "data" / "omniglot"
real = pytest.mark.skipif(not REAL.is_dir(), reason="real Omniglot is not in ../shared/data")


def raw_pixel_accuracy(images, way, shot, episodes=300) -> float:
    """Nearest class mean on pixels in [0, 1]."""
    method = protonet(nets.from_functions(lambda key: {}, lambda p, x: x.reshape(len(x), -1)))
    params = method.algorithm(method.net, method.inner).init(jax.random.key(0))
    sample = sampler(way, shot, 15, 1)
    run = jax.jit(lambda key, images: evaluate(method, key, params, sample, images, episodes))
    return float(jnp.mean(run(jax.random.key(1), images).adapted))


@pytest.fixture
def glyph_splits(glyph_cache):
    return {split: load("glyphs", split, cache_dir=glyph_cache) for split in SPLITS}


def classes_of(name, split, **where):
    return describe(name, split, **where).classes


# Glyphs.


def test_glyphs_are_whole_splits_of_uint8_images(glyph_splits):
    least = {"train": 300, "val": 60, "test": 150}
    for split, images in glyph_splits.items():
        assert len(images.counts) >= least[split]
        assert images.pixels.shape == (len(images.counts), 20, 28, 28, 1)
        assert images.pixels.dtype == jnp.uint8
        assert images.counts.dtype == jnp.int32
        assert (images.counts == 20).all()
        assert images.mean.shape == images.std.shape == (1,)


def test_glyph_splits_share_no_letter_and_no_script(glyph_cache):
    names = [set(classes_of("glyphs", split, cache_dir=glyph_cache)) for split in SPLITS]
    assert len(set.union(*names)) == sum(map(len, names))
    scripts = [{name.split()[0] for name in split} for split in names]
    assert len(set.union(*scripts)) == sum(map(len, scripts))


def test_no_two_glyphs_look_alike():
    """Compared by whole drawings without blur, unlike the removal itself."""
    faces = glyphs._faces()
    letters, removed = glyphs._letters(glyphs.Glyphs(), faces)
    assert removed > 500
    for twins in (
        "A\u0391\u0410",
        "o\u03bf\u043e",
        "c\u03f2\u0441",
        "Ss",
    ):  # Latin, Greek, Cyrillic
        assert sum(letter in letters for letter in twins) <= 1
    font = ImageFont.truetype(str(faces["Sans"][0]), 64)
    drawn = np.stack([glyphs._draw(letter, font, 28, 0.72, fill=True) for letter in letters])
    flat = drawn.reshape(len(drawn), -1)
    flat = (flat - flat.mean(axis=1, keepdims=True)) / flat.std(axis=1, keepdims=True)
    assert np.triu(flat @ flat.T / flat.shape[1], 1).max() < 0.93


def test_every_glyph_has_ink_and_stays_in_its_frame(glyph_splits):
    pixels = np.concatenate([images.pixels for images in glyph_splits.values()]) / 255.0
    ink = pixels.sum(axis=(2, 3, 4))
    border = ink - pixels[:, :, 1:-1, 1:-1].sum(axis=(2, 3, 4))
    assert ink.min() > 5
    assert (border / ink).max() < 0.2
    assert np.mean(border > 0.05 * ink) < 0.01


@pytest.mark.parametrize(("way", "shot", "target"), [(5, 1, 0.47), (5, 5, 0.67), (20, 1, 0.28)])
def test_glyphs_are_as_hard_as_omniglot(glyph_splits, way, shot, target):
    assert abs(raw_pixel_accuracy(glyph_splits["test"], way, shot) - target) < 0.05


def test_two_builds_of_glyphs_are_equal(glyph_cache, tmp_path):
    first = describe("glyphs", "val", cache_dir=glyph_cache)
    second = describe("glyphs", "val", cache_dir=tmp_path)
    assert first == second


def test_glyphs_depend_on_their_parameters(monkeypatch, glyph_cache, tmp_path):
    monkeypatch.setitem(DATASETS, "other", glyphs.dataset(glyphs.Glyphs(seed=1)))
    first = describe("glyphs", "val", cache_dir=glyph_cache)
    second = describe("other", "val", cache_dir=tmp_path)
    assert first.classes == second.classes
    assert first.digest != second.digest


# The cache.


def only_entry(folder: Path) -> Path:
    (entry,) = folder.iterdir()  # so nothing temporary is left either
    return entry


def damage_array(entry: Path) -> None:
    data = bytearray((entry / "pixels.npy").read_bytes())
    data[-1] ^= 1
    (entry / "pixels.npy").write_bytes(data)


def age_manifest(entry: Path) -> None:
    manifest = json.loads((entry / "manifest.json").read_text())
    (entry / "manifest.json").write_text(json.dumps({**manifest, "format": 0}))


@pytest.mark.parametrize(
    ("spoil", "why"),
    [
        (damage_array, "SHA-256"),
        (age_manifest, "format 0"),
        (lambda entry: (entry / "manifest.json").write_text('{"fo'), "damaged"),
        (lambda entry: (entry / "manifest.json").write_text("[]"), "damaged"),
        (lambda entry: (entry / "pixels.npy").unlink(), "damaged"),
    ],
)
def test_a_spoiled_entry_is_built_again(tmp_path, tiny, spoil, why):
    cache, said = tmp_path / "cache", []
    where = {"data_dir": tiny, "cache_dir": cache}
    before = describe("tiny", "val", **where)
    spoil(only_entry(cache))
    assert describe("tiny", "val", progress=lambda text, *_: said.append(text), **where) == before
    assert why in said[0]
    said.clear()
    assert describe("tiny", "val", progress=lambda text, *_: said.append(text), **where) == before
    assert not said
    only_entry(cache)


def test_a_failed_build_leaves_nothing(tmp_path, tiny):
    (tiny / "images_background" / "Long" / "character01" / "0_01.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"cannot be read: .*Long/character01/0_01\.png"):
        load("tiny", "train", data_dir=tiny, cache_dir=tmp_path / "cache")
    assert not list((tmp_path / "cache").iterdir())


def test_the_cache_folder_comes_from_the_environment(monkeypatch, tmp_path, tiny):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.delenv("MGAUG_JAX_CACHE", raising=False)
    load("tiny", "val", data_dir=tiny)
    only_entry(tmp_path / "xdg" / "mgaug_jax")
    monkeypatch.setenv("MGAUG_JAX_CACHE", str(tmp_path / "own"))
    load("tiny", "val", data_dir=tiny)
    only_entry(tmp_path / "own")


def test_a_cached_split_needs_no_data_folder(tmp_path, tiny):
    with pytest.raises(ValueError, match="without a data folder"):
        load("tiny", "test", cache_dir=tmp_path / "cache")
    first = describe("tiny", "test", data_dir=tiny, cache_dir=tmp_path / "cache")
    assert describe("tiny", "test", cache_dir=tmp_path / "cache") == first
    # Copies of the same content are one, others are not.
    path = tiny / "images_evaluation" / "New" / "character01" / "0_01.png"
    path.touch()
    describe("tiny", "test", data_dir=tiny, cache_dir=tmp_path / "cache")
    assert len(list((tmp_path / "cache").iterdir())) == 2
    assert describe("tiny", "test", cache_dir=tmp_path / "cache") == first
    draw(path, seed=99)
    describe("tiny", "test", data_dir=tiny, cache_dir=tmp_path / "cache")
    with pytest.raises(ValueError, match="has 2 different copies"):
        load("tiny", "test", cache_dir=tmp_path / "cache")


def test_other_files_are_another_entry(tmp_path, tiny):
    where = {"data_dir": tiny, "cache_dir": tmp_path / "cache"}
    before = describe("tiny", "test", **where)
    path = tiny / "images_evaluation" / "New" / "character01" / "0_01.png"
    draw(path, seed=99)
    assert describe("tiny", "test", **where).digest != before.digest


@pytest.mark.parametrize(
    ("name", "split", "known"), [("mnist", "train", "omniglot"), ("glyphs", "dev", "val")]
)
def test_unknown_names_are_refused_with_the_known(tmp_path, name, split, known):
    with pytest.raises(ValueError, match=f"not known; take one of .*{known}"):
        load(name, split, cache_dir=tmp_path)


# Omniglot's layout, on a small tree.

BACKGROUND, EVALUATION, DRAWERS = {"Long": 3, "Short": 2}, {"New": 2}, 4


def draw(path: Path, seed: int) -> None:
    """A 1-bit PNG like Omniglot's: ink is 0."""
    bits = np.random.default_rng(seed).random((105, 105)) < 0.8
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.uint8(255 * bits)).convert("1").save(path)


@pytest.fixture
def tiny(tmp_path, monkeypatch) -> Path:
    """Data folder of the data set "tiny"."""
    monkeypatch.setitem(
        DATASETS, "tiny", omniglot.dataset(BACKGROUND, EVALUATION, ("Short",), DRAWERS)
    )
    folder, seed = tmp_path / "data", 0
    for root, alphabets in (("images_background", BACKGROUND), ("images_evaluation", EVALUATION)):
        for alphabet, count in alphabets.items():
            for character in range(1, count + 1):
                for drawer in range(1, DRAWERS + 1):
                    name = f"0_{drawer:02}.png"
                    draw(folder / root / alphabet / f"character{character:02}" / name, seed)
                    seed += 1
    return folder


def zipped(folder: Path, target: Path) -> Path:
    target.mkdir()
    for root in ("images_background", "images_evaluation"):
        with zipfile.ZipFile(target / f"{root}.zip", "w") as archive:
            archive.writestr(f"__MACOSX/{root}/._Long.png", b"junk")
            archive.writestr("../outside.png", b"never written")
            for path in sorted(folder.glob(f"{root}/**/*.png")):
                archive.write(path, path.relative_to(folder))
    return target


def test_the_tree_is_read_in_order_from_folders_and_zips(tmp_path, tiny):
    (tiny / "images_background" / ".DS_Store").write_bytes(b"junk")
    sources = {"folder": tiny, "zip": zipped(tiny, tmp_path / "zips")}
    found = {}
    for kind, folder in sources.items():
        where = {"data_dir": folder, "cache_dir": tmp_path / f"cache-{kind}"}
        found[kind] = [describe("tiny", split, **where) for split in SPLITS]
        images = load("tiny", "train", **where)
        kept = sorted(file.name for file in where["cache_dir"].glob("*/*"))
        assert kept == ["manifest.json"] * 3 + ["pixels.npy"] * 3
    assert found["folder"] == found["zip"]
    assert not (tmp_path / "outside.png").exists()
    train, val, test = found["zip"]
    assert train.classes == ("Long/character01", "Long/character02", "Long/character03")
    assert val.classes == ("Short/character01", "Short/character02")
    assert test.classes == ("New/character01", "New/character02")
    assert train.counts == (DRAWERS,) * 3
    # Every image is where its class and drawer say, resized from grey and inverted.
    assert images.pixels.shape == (3, DRAWERS, 28, 28, 1)
    for c, name in enumerate(train.classes):
        for drawer in range(DRAWERS):
            path = tiny / "images_background" / name / f"0_{drawer + 1:02}.png"
            with Image.open(path) as image:
                assert image.mode == "1"
                grey = image.convert("L").resize((28, 28), Image.Resampling.LANCZOS)
            assert np.array_equal(images.pixels[c, drawer, ..., 0], 255 - np.asarray(grey))


def flatten(folder: Path) -> None:
    draw(folder / "images_background" / "0001_01.png", 0)


@pytest.mark.parametrize(
    ("spoil", "why"),
    [
        (lambda f: (f / "images_background").rename(f / "background"), "it has neither"),
        (flatten, "images_background/0001_01.png does not belong there"),
        (
            lambda f: (f / "images_background/Long/character02/0_03.png").unlink(),
            "Long/character02 has 3 images instead of 4",
        ),
        (
            lambda f: (f / "images_background/Long").rename(f / "Long"),
            "3 of the 3 train classes have no images: Long/character01",
        ),
        (lambda f: f.rename(f.with_name("moved")), "there is no such folder"),
        (
            lambda f: [
                (f / "images_background").rename(f / "b"),
                (f / "images_background.zip").write_bytes(b"PK"),
            ],
            "images_background.zip is damaged",
        ),
    ],
)
def test_a_wrong_folder_is_refused_with_the_expected_tree(tmp_path, tiny, spoil, why):
    spoil(tiny)
    with pytest.raises(ValueError) as error:
        load("tiny", "train", data_dir=tiny, cache_dir=tmp_path / "cache")
    assert why in str(error.value)
    assert omniglot.TREE in str(error.value)


def test_other_splits_may_mix_the_official_sets(tmp_path, tiny):
    splits = {"train": ["New/character02", "Short/character01"], "test": ["Long/character03"]}
    where = {"data_dir": tiny, "cache_dir": tmp_path / "cache", "splits": splits}
    official = {**where, "splits": None}
    for split, source in (("train", "test"), ("test", "train")):
        images, before = load("tiny", split, **where), load("tiny", source, **official)
        assert classes_of("tiny", split, **where) == tuple(splits[split])
        position = classes_of("tiny", source, **official).index(splits[split][0])
        assert np.array_equal(images.pixels[0], before.pixels[position])
    with pytest.raises(ValueError, match="the splits that were given have no val"):
        load("tiny", "val", **where)


def test_a_damaged_zip_member_is_refused(tmp_path, tiny):
    folder = zipped(tiny, tmp_path / "zips")
    path = folder / "images_background.zip"
    data = bytearray(path.read_bytes())
    data[data.index(b"IDAT") + 10] ^= 255
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"images_background\.zip is damaged"):
        load("tiny", "train", data_dir=folder, cache_dir=tmp_path / "cache")


def test_ingest_refuses_what_was_not_read_back(monkeypatch, tmp_path):
    png = io.BytesIO()
    Image.new("1", (105, 105), 1).save(png, "png")
    examples = [ingest.Example(str(i), "a", png.getvalue()) for i in range(3)]
    decode = lambda data: omniglot.decode(data, 28)
    say = lambda text, done=0, total=0: None
    run = lambda: ingest.ingest("x", examples, {"a": "012"}, decode, tmp_path, say)
    record = {"key": b"0", "label": b"a", "image": png.getvalue()}
    for source, why in (
        ([record] * 2, "2 were"),
        ([record] * 3, "1 images of a were read back instead of 3"),
        ([dict.fromkeys(record)] * 3, "record 0 was not read back"),
    ):
        monkeypatch.setattr(ingest, "_write", lambda *args, source=source: source)
        with pytest.raises(ValueError, match=why):
            run()


def test_omniglot_lists_every_alphabet_once():
    assert sum(omniglot.BACKGROUND.values()) == 964
    assert sum(omniglot.EVALUATION.values()) == 659
    assert len(omniglot.BACKGROUND) == 30
    assert len(omniglot.EVALUATION) == 20
    assert sum(omniglot.BACKGROUND[name] for name in omniglot.HELD_OUT) == 146


@real
def test_real_omniglot_equals_the_reference(tmp_path):
    with np.load(REAL / "omniglot_28.npz") as file:
        names = [f"{a}/{c}" for a, c in zip(file["alphabet"], file["character"], strict=True)]
        reference = dict(zip(names, file["images"], strict=True))
    seen = []
    for split, count in (("train", 818), ("val", 146), ("test", 659)):
        where = {"data_dir": REAL, "cache_dir": tmp_path}
        images, about = load("omniglot", split, **where), describe("omniglot", split, **where)
        assert len(about.classes) == count
        expected = np.stack([reference[name] for name in about.classes])[..., None]
        assert np.array_equal(images.pixels, expected)
        seen += about.classes
    assert sorted(seen) == sorted(reference)


# Sinusoids.


def test_sinusoid_targets_are_one_sine_per_task(key):
    tasks = jax.jit(sinusoid.sampler(10, 15, 200))(key, None)
    assert tasks.support.x.shape == tasks.support.y.shape == (200, 10, 1)
    assert tasks.query.x.shape == tasks.query.y.shape == (200, 15, 1)
    x = np.concatenate([tasks.support.x, tasks.query.x], axis=1)[..., 0]
    y = np.concatenate([tasks.support.y, tasks.query.y], axis=1)[..., 0]
    assert -5 <= x.min() < -4.9
    assert 4.9 < x.max() < 5
    # A sin(x - p) = a sin x + b cos x, solved from the support and checked on everything.
    basis = np.stack([np.sin(x), np.cos(x)], axis=-1).astype(np.float64)
    for features, targets in zip(basis, y, strict=True):
        (a, b), *_ = np.linalg.lstsq(features[:10], targets[:10])
        assert np.allclose(features @ (a, b), targets, atol=1e-3)
        assert 0.099 < np.hypot(a, b) < 5.001
        assert -1e-3 <= np.arctan2(-b, a) <= np.pi


def test_sinusoid_tasks_do_not_depend_on_their_number(key):
    few, many = (sinusoid.sampler(5, 5, tasks)(key, None) for tasks in (2, 4))
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b[:2]), few, many)


def test_sinusoid_sizes_are_checked():
    with pytest.raises(ValueError, match="shot=0"):
        sinusoid.sampler(0, 1, 1)


# Imports.


def test_importing_the_data_module_imports_no_reader():
    heavy = ("tensorflow", "tensorflow_datasets", "matplotlib", "PIL", "orbax")
    code = (
        "import sys, mgaug_jax, mgaug_jax.data; "
        f"print([name for name in {heavy} if name in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


def test_the_digest_is_of_classes_counts_and_pixels(tmp_path, tiny):
    where = {"data_dir": tiny, "cache_dir": tmp_path / "cache"}
    images, about = load("tiny", "val", **where), describe("tiny", "val", **where)
    pixels = np.asarray(images.pixels)
    content = {"classes": list(about.classes), "counts": list(about.counts)}
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode())
    digest.update(repr(pixels.shape).encode() + pixels.tobytes())
    assert digest.hexdigest() == about.digest


def test_one_hot_tasks_are_noisy_sines_of_the_amplitude_their_index_names(key):
    tasks = jax.jit(sinusoid.one_hot_sampler(10, 15, 300))(key, None)
    x = np.concatenate([tasks.support.x, tasks.query.x], axis=1)
    y = np.concatenate([tasks.support.y, tasks.query.y], axis=1)
    assert x.shape == (300, 25, 21)
    index = x[..., 1:].argmax(-1)
    np.testing.assert_array_equal(x[..., 1:], np.eye(20)[index])
    assert (index == index[:, :1]).all()
    assert set(index[:, 0]) == set(range(20))
    rest = y - np.linspace(0.1, 4, 20)[index][..., None] * np.sin(x[..., :1])
    assert abs(rest.std() - 0.1) < 0.004
    assert abs(rest.mean()) < 0.005
    assert len(np.unique(x[..., 0])) > 0.99 * x[..., 0].size  # a few of 2^23 values coincide


def test_one_hot_tests_are_off_the_grid_with_an_index_that_says_nothing(key):
    tasks = jax.jit(sinusoid.one_hot_test_sampler(5, 400))(key, None)
    assert tasks.query.x.shape == (400, 200, 21)
    np.testing.assert_allclose(tasks.query.x[7, :, 0], np.linspace(-4.5, 4.5, 200), atol=1e-6)
    shape = np.sin(np.asarray(tasks.query.x[..., :1]))
    amplitude = np.asarray((tasks.query.y * shape).sum((1, 2)) / (shape**2).sum((1, 2)))
    np.testing.assert_allclose(tasks.query.y, amplitude[:, None, None] * shape, atol=1e-5)
    assert 0.1 <= amplitude.min() < 0.3
    assert 3.8 < amplitude.max() <= 4
    index = np.asarray(tasks.support.x[:, 0, 1:].argmax(-1))
    assert abs(np.corrcoef(index, amplitude)[0, 1]) < 4 / 400**0.5
    rest = tasks.support.y - amplitude[:, None, None] * np.sin(tasks.support.x[..., :1])
    assert abs(float(rest.std()) - 0.1) < 0.01


def test_a_permuted_index_is_another_one(key):
    task = jax.tree.map(lambda leaf: leaf[0], sinusoid.one_hot_sampler(3, 4, 1)(key, None))
    shifts = set()
    for k in jax.random.split(jax.random.key(1), 60):
        other = sinusoid.permute_index(k, task)
        before, after = (int(t.support.x[0, 1:].argmax()) for t in (task, other))
        assert before != after
        shifts.add((after - before) % 20)
        np.testing.assert_array_equal(other.query.x[:, 1:].argmax(-1), after)
        np.testing.assert_array_equal(other.query.x[:, 0], task.query.x[:, 0])
        np.testing.assert_array_equal(other.query.y, task.query.y)
    assert len(shifts) > 10


# --- sinusoids on intervals -------------------------------------------------------------------


def test_interval_tasks_are_the_functions_of_their_split_on_their_intervals(key):
    amplitudes, phases = map(np.asarray, sinusoid.interval_functions())
    assert ((amplitudes >= 0.1) & (amplitudes < 5) & (phases >= 0) & (phases < np.pi)).all()
    assert len(set(amplitudes)) == len(set(phases)) == 10
    assert sorted(sum(sinusoid.INTERVALS.values(), ())) == list(range(10))
    sample = jax.jit(sinusoid.interval_sampler(5, 7, 400))
    for split, numbers in sinusoid.INTERVALS.items():
        tasks = sample(jax.random.fold_in(key, len(split)), jnp.array(numbers))
        x, y = (np.concatenate(parts, 1)[..., 0] for parts in zip(*tasks, strict=True))
        found = []
        for inputs, targets in zip(x, y, strict=True):
            within = [(inputs >= s).all() and (inputs < s + 0.5).all() for s in sinusoid.STARTS]
            (i,) = np.flatnonzero(within)
            want = amplitudes[i] * np.sin(inputs - phases[i])
            np.testing.assert_allclose(targets, want, atol=1e-5)
            found.append(i)
        counts = np.bincount(found, minlength=10)
        share = 400 / len(numbers)
        assert set(np.flatnonzero(counts)) == set(numbers)
        assert (abs(counts[list(numbers)] - share) < 4.5 * share**0.5).all()
    offsets = (x - np.floor(2 * x) / 2).ravel()
    assert abs(offsets.mean() - 0.25) < 4.5 * 0.5 / (12 * len(offsets)) ** 0.5


def test_moved_targets_are_one_away_in_support_and_query(key):
    tasks = sinusoid.interval_sampler(3, 4, 100)(key, jnp.arange(6))
    moved = jax.vmap(sinusoid.move_targets)(jax.random.split(jax.random.key(9), 100), tasks)
    by = [np.asarray(b.y - a.y)[..., 0] for a, b in zip(tasks, moved, strict=True)]
    steps = np.round(by[0][:, :1])
    for part in by:
        np.testing.assert_allclose(part, np.broadcast_to(steps, part.shape), atol=1e-5)
    assert 25 < (steps == 1).sum() < 75
    assert set(steps.ravel()) == {-1.0, 1.0}
