"""The entry points for data sets, as a user meets them."""

import hashlib
import json
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import refused, start
from PIL import Image

from experiments import data as entry
from experiments import plots
from experiments.progress import Watch
from mgaug_jax.data import DATASETS, SPLITS, describe, pixels

OWN = {"train": ("cat", "$dög_1$", "horse"), "val": ("cow",), "test": ("猫",)}


@pytest.fixture
def own(tmp_path, monkeypatch) -> Path:
    """Three splits of own images, one colour for each class; the current folder is another."""
    rng, folder = np.random.default_rng(0), tmp_path / "own"
    for split, names in OWN.items():
        for name in names:
            (folder / split / name).mkdir(parents=True)
            colour = rng.integers(0, 256, 3)
            for i in range(3 if name == "cat" else 2):
                image = np.full((9, 9, 3), colour, np.uint8)
                (folder / split / name / f"{i}.png").write_bytes(pixels.encode(image))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("MGAUG_JAX_CACHE", str(tmp_path / "cache"))
    return folder


def test_check_says_what_is_there_and_draws_it(own, monkeypatch, capsys):
    (own / "train/horse/bad.jpg").write_bytes(b"no image")
    arguments = ("check", "folder", f"--data_dir={own}", "--image_size=8", "--skip_bad_images=1")
    assert start(monkeypatch, entry, *arguments) == 0
    said = capsys.readouterr().out
    assert "train  3 classes of 2 to 3 images, 7 in all" in said
    assert "test   1 classes of 2 images, 2 in all" in said
    assert "left out: train/horse/bad.jpg" in said
    for split in SPLITS:
        about = describe("folder", split, data_dir=own, size=8, skip_bad_images=1)
        assert about.digest in said
    assert [path.name for path in Path().iterdir()] == ["folder-contact.png"]
    with Image.open("folder-contact.png") as image:
        shown = np.asarray(image.convert("RGB")).reshape(-1, 3)
    for split in ("train", "test"):  # the colours of the classes are on the sheet
        for name in OWN[split]:
            with Image.open(own / split / name / "0.png") as image:
                colour = np.asarray(image)[0, 0]
            assert (shown == colour).all(axis=1).sum() > 100


def test_check_shows_the_hash_of_an_archive(own, tmp_path, monkeypatch, capsys):
    path = Path(shutil.make_archive(str(tmp_path / "any"), "zip", own))
    assert start(monkeypatch, entry, "check", "folder", f"--data_dir={path}") == 0
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert f"{path} has the SHA-256 {digest}" in capsys.readouterr().out
    assert start(monkeypatch, entry, "check", "folder", f"--data_dir={own}") == 0
    assert "SHA-256" not in capsys.readouterr().out


def test_glyphs_need_no_folder(tmp_path, monkeypatch, capsys, glyph_cache):
    monkeypatch.setenv("MGAUG_JAX_CACHE", str(glyph_cache))
    out = tmp_path / "sheet"
    assert start(monkeypatch, entry, "check", "glyphs", f"--out={out}") == 0
    assert describe("glyphs", "val").digest in capsys.readouterr().out
    with Image.open(out) as image:
        assert image.format == "PNG"


def test_prepare_builds_what_runs_read(own, monkeypatch, capsys):
    assert start(monkeypatch, entry, "prepare", "folder", f"--data_dir={own}") == 0
    said = capsys.readouterr().out
    assert "folder: writing 7 images as a TFDS data set" in said
    assert "folder: decoding 7 images of 3 classes" in said
    assert not list(Path().iterdir())
    assert start(monkeypatch, entry, "prepare", "folder") == 0  # the cache alone
    assert "decoding" not in capsys.readouterr().out


def test_what_is_missing_is_said_of_every_split_with_the_layout(own, monkeypatch, capsys):
    (own / "test" / "hen").mkdir()
    (own / "val").rename(own / "validation")
    assert start(monkeypatch, entry, "check", "folder", f"--data_dir={own}") == 2
    said = capsys.readouterr()
    assert "train  3 classes" in said.out
    assert "val    missing: folder was asked for from" in said.out
    assert "there is no folder val." in said.out
    assert "1 of the 2 test classes have no images: hen" in said.out
    assert said.out.count(DATASETS["folder"].tree) == 1
    assert said.err.startswith("error: val and test of folder cannot be read: ")
    assert len(said.err.splitlines()) == 1
    assert not list(Path().iterdir())


def test_list_names_every_data_set_with_its_layout(monkeypatch, capsys):
    assert start(monkeypatch, entry, "list") == 0
    said = capsys.readouterr().out
    assert "cifar_fs: 64 / 16 / 20 classes to train / validate / test; Krizhevsky 2009" in said
    assert "glyphs: classes as found; drawn" in said
    for name, dataset in DATASETS.items():
        assert f"{name}: " in said
        assert all(line in said for line in dataset.tree.splitlines())
        assert dataset.source


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        ((), "nothing was given; give list, check NAME, prepare NAME or download NAME"),
        (("look",), "'look' is no command"),
        (("check",), "'check' is no command"),
        (("list", "glyphs"), "'list glyphs' is no command"),
        (("check", "imagenet"), "'imagenet' is no data set; known: glyphs, omniglot"),
        (("check", "omniglot", "--data_dir=none"), "train and val and test of omniglot cannot"),
        (("check", "glyphs", "--image_size=9"), "glyphs was asked for with other splits"),
        (("check", "folder", "--splits=none.json"), "splits=none.json was asked for, but"),
        (("check", "glyphs", "--out=no/folder.png"), "cannot write no/folder.png"),
        (("download", "glyphs", "--data_dir=x"), "glyphs has no files that can be downloaded"),
        (("download", "cub"), "download needs --data_dir"),
        (("check", "glyphs", "--no_such_flag=1"), "no_such_flag"),
    ],
)
def test_bad_input_is_one_sentence(arguments, why, own, monkeypatch, capsys, glyph_cache):
    if "glyphs" in arguments:
        monkeypatch.setenv("MGAUG_JAX_CACHE", str(glyph_cache))
    assert why in refused(capsys, monkeypatch, entry, *arguments)
    assert not list(Path().iterdir())


def test_a_sheet_that_cannot_be_finished_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(Path, "replace", lambda *args: (_ for _ in ()).throw(OSError("full")))
    rows = {"train": [("cat", np.zeros((2, 4, 4, 1), np.uint8))]}
    with pytest.raises(OSError, match="full"):
        plots.contact(rows, tmp_path / "sheet.png")
    assert not list(tmp_path.iterdir())


def test_progress_of_a_build_has_rate_and_eta_on_a_terminal(monkeypatch, capsys):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    said = []
    watch = Watch(said.append)
    watch("decoding")
    time.sleep(0.5)
    watch("decoding", 50, 200)
    watch("decoding", 200, 200)
    assert said == ["decoding"]
    shown = capsys.readouterr().err
    rate = float(shown.split("decoding: 50/200 images, ")[1].split("/s, ETA 0:0")[0])
    assert 10 < rate <= 100  # counted from when the work was announced
    assert shown.endswith("\r\x1b[K")


def test_amounts_are_told_while_images_are_written_and_decoded(tmp_path):
    (tmp_path / "own" / "cat").mkdir(parents=True)
    for i in range(60):
        (tmp_path / "own" / "cat" / f"{i}.png").write_bytes(
            pixels.encode(np.zeros((4, 4, 3), np.uint8))
        )
    splits, told = tmp_path / "splits.json", []
    splits.write_text(json.dumps({"train": ["cat"]}))
    where = {"data_dir": tmp_path / "own", "cache_dir": tmp_path / "cache", "size": 4}
    describe("folder", "train", splits=splits, progress=lambda *all: told.append(all), **where)
    amounts = [tuple(each[1:]) for each in told if len(each) > 1]
    assert amounts == [(50, 60), (60, 60), (50, 60), (60, 60)]
