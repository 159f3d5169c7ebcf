"""The readers: data sets in their official formats, own folders, and what they refuse."""

import csv
import errno
import hashlib
import io
import itertools
import json
import os
import pickle
import struct
import tarfile
import zipfile
import zlib
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from mgaug_jax.data import (
    DATASETS,
    SPLITS,
    cache,
    cifar,
    cub,
    dclaw,
    describe,
    load,
    mini_imagenet,
    omniglot,
    pickles,
    pixels,
)
from mgaug_jax.data.files import shipped

SHARED = Path(__file__).parents[1].parent / "shared" / "data"
real = pytest.mark.skipif(not SHARED.is_dir(), reason="the real files are not in ../shared/data")


def splits_of(name: str) -> dict:
    return DATASETS[name].parameters["splits"]


def picture(seed: int, size=(9, 7)) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (*size, 3), np.uint8)


def png(seed: int) -> bytes:
    return pixels.encode(picture(seed))


def write(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


def archive(folder: Path, target: Path) -> Path:
    """A zip or tar of what a folder holds."""
    target.parent.mkdir(parents=True, exist_ok=True)
    paths = sorted(folder.rglob("*"))
    if target.suffix == ".zip":
        with zipfile.ZipFile(target, "w") as file:
            for path in paths:
                file.write(path, path.relative_to(folder))
    else:
        with tarfile.open(target, "w:gz") as file:
            for path in reversed(paths):
                file.add(path, str(path.relative_to(folder)), recursive=False)
    return target


def refusal(name="folder", split="train", **where) -> str:
    """What is said when it is refused; one line before the expected layout."""
    with pytest.raises(ValueError) as error:
        load(name, split, **where)
    return str(error.value)


# Published splits.


@pytest.mark.parametrize(
    ("name", "counts"),
    [
        ("omniglot", (818, 146, 659)),
        ("omniglot_vinyals", (1028, 172, 423)),
        ("omniglot_finn", (1100, 100, 423)),
        ("omniglot_mr", (1200, 100, 323)),
        ("mini_imagenet", (64, 16, 20)),
        ("cub", (100, 50, 50)),
        ("cifar_fs", (64, 16, 20)),
        ("fc100", (60, 20, 20)),
        ("dclaw1", (2 * 6, 2 * 2, 2 * 2)),
        ("dclaw2", (2 * 6, 2 * 2, 2 * 2)),
        ("dclaw3", (2 * 6, 2 * 2, 2 * 2)),
    ],
)
def test_splits_have_the_published_sizes_and_share_no_class(name, counts):
    splits = splits_of(name)
    assert tuple(len(splits[split]) for split in SPLITS) == counts
    assert len(set().union(*splits.values())) == sum(counts)


def test_every_omniglot_split_is_of_all_characters():
    every = set(omniglot.characters({**omniglot.BACKGROUND, **omniglot.EVALUATION}))
    for name in ("omniglot", "omniglot_vinyals", "omniglot_finn", "omniglot_mr"):
        assert set().union(*splits_of(name).values()) == every


def test_the_shuffle_of_seed_1_is_the_same_everywhere():
    finn, mr = splits_of("omniglot_finn"), splits_of("omniglot_mr")
    assert finn["train"][:2] == ("Gurmukhi/character23", "Malayalam/character36")
    assert mr["test"][-1] == "Avesta/character22"
    assert finn["train"] + finn["val"] == mr["train"]
    assert finn["test"] == mr["val"] + mr["test"]


def test_lists_follow_their_rules():
    for split, part in splits_of("cub").items():
        rest = {int(name[:3]) - 1 for name in part}
        assert {i % 2 for i in rest} == {0 if split == "train" else 1}
        assert split == "train" or {i % 4 for i in rest} == {1 if split == "val" else 3}
    superclasses = [{name.split("/")[0] for name in splits_of("fc100")[s]} for s in SPLITS]
    assert [len(names) for names in superclasses] == [12, 4, 4]
    assert len(set().union(*superclasses)) == 20
    members = mini_imagenet._members()
    assert len(members) == 100
    assert {len(numbers) for numbers in members.values()} == {600}
    assert min(min(numbers) for numbers in members.values()) == 1
    assert max(max(numbers) for numbers in members.values()) == 1300
    for permutation in (1, 2, 3):
        for part in splits_of(f"dclaw{permutation}").values():
            names = sorted(part)
            for neg, pos in zip(names[0::2], names[1::2], strict=True):
                assert neg.removesuffix("neg") == pos.removesuffix("pos") != neg


@pytest.mark.parametrize("name", ["omniglot_vinyals", "mini_imagenet", "cub", "cifar", "downloads"])
def test_lists_name_their_source(name):
    assert len(shipped(name)["source"]) > 20


@real
def test_shipped_lists_are_the_originals():
    for split in SPLITS:
        with (SHARED / "mini_imagenet" / f"{split}.csv").open() as file:
            rows = {(row["label"], row["filename"]) for row in csv.DictReader(file)}
        members = mini_imagenet._members()
        assert rows == {
            (name, f"{name}{i:08}.jpg")
            for name in splits_of("mini_imagenet")[split]
            for i in members[name]
        }
        read = lambda path: json.loads((SHARED / path).read_text())
        tree = read(f"omniglot/splits/vinyals_{split}.json")
        names = {f"{a}/{c}" for part in tree.values() for a in part for c in part[a]}
        assert set(splits_of("omniglot_vinyals")[split]) == names
        assert set(splits_of("cub")[split]) == set(read(f"cub/splits/{split}.json"))
        pairs = read(f"cifar_splits/cifar-fs_{split}.json")
        assert set(splits_of("cifar_fs")[split]) == {"/".join(pair) for pair in pairs}
        above = {name.split("/")[0] for name in splits_of("fc100")[split]}
        assert above == set(read(f"cifar_splits/fc100_{split}.json"))


# Own folders.

OWN = {"train": ("cat", "dög 2", "horse"), "val": ("cow",), "test": ("猫",)}


@pytest.fixture
def own(tmp_path) -> Path:
    """Three splits of own images, with spaces and other letters in their paths."""
    folder, seed = tmp_path / "my dätä", 0
    for split, names in OWN.items():
        for name in names:
            for i in range(3 if name == "cat" else 2):
                write(folder / split / name / f"Bild {i} é.PNG", png(seed))
                seed += 1
    (folder / "train" / "cat" / "notes.txt").write_text("not an image")
    (folder / "train" / ".DS_Store").write_bytes(b"junk")
    return folder


def test_own_folders_are_read_from_folders_zips_and_tars(tmp_path, own):
    linked = tmp_path / "linked"
    for split in OWN:
        (linked / split).mkdir(parents=True)
        for folder in (own / split).glob("[!.]*"):
            (linked / split / folder.name).symlink_to(folder)
    sources = [
        own,
        linked,
        archive(own, tmp_path / "a b.zip"),
        archive(own, tmp_path / "ä.tar.gz"),
    ]
    with zipfile.ZipFile(tmp_path / "wrapped.zip", "w") as file:
        for path in own.rglob("*"):
            file.write(path, Path("in one folder") / path.relative_to(own))
    sources.append(tmp_path / "wrapped.zip")
    found = []
    for i, source in enumerate(sources):
        where = {"data_dir": source, "cache_dir": tmp_path / f"cache ü{i}", "size": 12}
        images = load("folder", "train", **where)
        assert images.pixels.shape == (3, 3, 12, 12, 3)
        found.append([describe("folder", split, **where) for split in SPLITS])
    assert all(each == found[0] for each in found)
    assert [about.classes for about in found[0]] == [tuple(sorted(OWN[s])) for s in SPLITS]
    assert found[0][0].counts == (3, 2, 2)
    np.testing.assert_allclose(images.mean, (0.485, 0.456, 0.406))
    np.testing.assert_allclose(images.std, (0.229, 0.224, 0.225))
    # The first image of a class is the first by name, resized; what a class lacks is zero.
    expected = Image.fromarray(picture(0)).resize((12, 12), Image.Resampling.LANCZOS)
    np.testing.assert_array_equal(images.pixels[0, 0], expected)
    assert not np.any(images.pixels[1, 2])


def test_one_folder_of_classes_is_split_by_a_file(tmp_path, own):
    one = tmp_path / "one"
    for part in OWN:
        for name in OWN[part]:
            one.mkdir(exist_ok=True)
            (own / part / name).rename(one / name)
    splits = {"train": ["horse", "猫"], "val": ["cow"], "test": ["cat"]}
    path = tmp_path / "splits.json"
    path.write_text(json.dumps(splits), "utf-8")
    for given in (path, str(path), splits):
        where = {"data_dir": one, "cache_dir": tmp_path / "cache", "splits": given}
        for split in SPLITS:
            assert describe("folder", split, **where).classes == tuple(sorted(splits[split]))
    assert len(list((tmp_path / "cache").iterdir())) == 3
    assert load("folder", "val", **where).pixels.shape == (1, 2, 84, 84, 3)


@pytest.mark.parametrize(
    ("content", "why"),
    [
        ('{"train": ["a"], "val": ["a"]}', "the class a is in train and in val"),
        ('{"train": ["a", "a"]}', "the class a is in train and in train"),
        ('{"train": []}', "train is empty"),
        ('{"train": "cat"}', "train is not a list of names"),
        ('{"train": [1]}', "train is not a list of names"),
        ('{"training": ["a"]}', "other parts than train, val and test"),
        ('["a"]', "other parts than train, val and test"),
        ('{"train": 3}', "not iterable"),
        ('{"tra', "Unterminated"),
        (None, "No such file"),
    ],
)
def test_wrong_split_files_are_refused(tmp_path, own, content, why):
    path = tmp_path / "splits.json"
    if content is not None:
        path.write_text(content)
    said = refusal(data_dir=own, cache_dir=tmp_path / "cache", splits=path)
    assert str(path) in said
    assert why in said
    assert '{"train": ["cat", "dog"]' in said
    assert not (tmp_path / "cache").exists()


def empty(folder: Path) -> None:
    folder.mkdir()


@pytest.mark.parametrize(
    ("spoil", "options", "why"),
    [
        (lambda f: write(f / "train/a.jpg", png(0)), {}, "train/a.jpg does not belong there"),
        (
            lambda f: [(f / s).rename(f.parent / s) for s in OWN] and write(f / "a.png", png(0)),
            {},
            "there is no folder train",
        ),
        (lambda f: (f / "train").rename(f / "training"), {}, "there is no folder train"),
        (
            lambda f: write(f / "train/more/bird/a.jpg", png(0)),
            {},
            "train/more/bird/a.jpg does not belong there: images lie in class folders 1 level",
        ),
        (lambda f: empty(f / "train/bird"), {}, "1 of the 4 train classes have no images: bird"),
        (
            lambda f: write(f / "test/cat/a.jpg", png(0)),
            {},
            "the class cat is in train and in test",
        ),
        (lambda f: f.rename(f.parent / "other"), {}, "there is no such folder"),
        (
            lambda f: [(f / s).rename(f.parent / s) for s in OWN],
            {"splits": {"train": ["cat"]}},
            "1 of the 1 train classes have no images: cat",
        ),
        (
            lambda f: [(f / s).rename(f.parent / s) for s in OWN],
            {"splits": {"test": ["cat"]}},
            "the splits that were given have no train",
        ),
    ],
)
def test_wrong_folders_are_refused(tmp_path, own, spoil, options, why):
    spoil(own)
    cache = tmp_path / "cache"
    said = refusal(data_dir=own, cache_dir=cache, **options)
    assert f"folder was asked for from {own}, but " in said
    assert why in said
    assert "give a data_dir that looks like this:\ndata_dir/" in said
    assert not cache.exists() or not list(cache.iterdir())


def test_options_are_checked(tmp_path, own):
    where = {"data_dir": own, "cache_dir": tmp_path / "cache"}
    assert "size=0" in refusal(size=0, **where)
    assert "take 2048 or less" in refusal(size=10**6, **where)
    assert "skip_bad_images=-1" in refusal(skip_bad_images=-1, **where)
    assert "has no such options" in refusal("glyphs", size=32, cache_dir=tmp_path)


# Archives.


def test_hostile_archives_have_no_effect(tmp_path, own):
    """Members outside, links, and absolute paths are neither read nor written."""
    secret = tmp_path / "secret.png"
    secret.write_bytes(png(99))
    link = zipfile.ZipInfo("train/cat/link.png")
    link.create_system, link.external_attr = 3, 0o120777 << 16
    target = archive(own, tmp_path / "own.zip")
    with zipfile.ZipFile(target, "a") as file:
        file.writestr(link, str(secret))
        file.writestr("../outside.png", png(1))
        file.writestr("train/../../outside.png", png(1))
        file.writestr("/train/cat/absolute.png", png(1))
        file.writestr("__MACOSX/train/cat/._a.png", b"junk")
    with tarfile.open(tmp_path / "own.tar.gz", "w:gz") as file:
        file.add(own, ".")
        for kind, name in ((tarfile.SYMTYPE, "train/cat/s.png"), (tarfile.LNKTYPE, "train/h.png")):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, str(secret)
            file.addfile(member)
        member = tarfile.TarInfo("../outside.png")
        member.size = len(png(1))
        file.addfile(member, io.BytesIO(png(1)))
    before = sorted(tmp_path.rglob("*"))
    clean = describe("folder", "train", data_dir=own, cache_dir=tmp_path / "cache")
    for source in (target, tmp_path / "own.tar.gz"):
        where = {"data_dir": source, "cache_dir": tmp_path / "cache"}
        assert describe("folder", "train", **where) == clean
    after = [path for path in tmp_path.rglob("*") if tmp_path / "cache" not in path.parents]
    assert sorted(after) == sorted([*before, tmp_path / "cache"])
    assert not (tmp_path.parent / "outside.png").exists()


@pytest.mark.parametrize("name", ["x.zip", "x.tar.gz", "x.tgz"])
def test_a_wrong_archive_is_refused_with_its_sha256(tmp_path, name):
    path = tmp_path / name
    path.write_bytes(b"<html>Sign in to download</html>")
    said = refusal(data_dir=path, cache_dir=tmp_path / "cache")
    assert f"{name} is damaged or unreadable" in said
    assert f"{name} has the SHA-256 {hashlib.sha256(path.read_bytes()).hexdigest()}" in said


@pytest.mark.parametrize("name", ["folder", "cub", "mini_imagenet"])
def test_a_file_that_is_no_archive_is_refused(tmp_path, name):
    path = tmp_path / "images.rar"
    path.write_bytes(b"Rar!")
    said = refusal(name, data_dir=path, cache_dir=tmp_path / "cache")
    assert "it is neither a folder nor an archive" in said


def test_a_truncated_tar_is_refused(tmp_path, own):
    path = archive(own, tmp_path / "own.tar.gz")
    path.write_bytes(path.read_bytes()[:-200])
    assert "own.tar.gz is damaged" in refusal(data_dir=path, cache_dir=tmp_path / "cache")


# Images.


def encoded(image: Image.Image, kind="PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


GREY = np.arange(64, dtype=np.uint8).reshape(8, 8) * 4
COLOURS = picture(3, (8, 8))


def with_alpha(alpha: int) -> Image.Image:
    return Image.fromarray(np.dstack([COLOURS, np.full((8, 8), alpha, np.uint8)]))


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (encoded(Image.fromarray(COLOURS)), COLOURS),
        (encoded(Image.fromarray(GREY)), np.dstack([GREY] * 3)),
        (encoded(Image.fromarray(GREY.astype(np.uint16) * 257)), np.dstack([GREY] * 3)),
        (encoded(Image.fromarray(GREY).convert("LA")), np.dstack([GREY] * 3)),
        (
            encoded(Image.fromarray(np.uint8(GREY > 99) * 255).convert("1")),
            np.dstack([np.uint8(GREY > 99) * 255] * 3),
        ),
        (encoded(with_alpha(255)), COLOURS),
        (encoded(with_alpha(0)), np.full_like(COLOURS, 255)),
        (
            encoded(Image.fromarray(COLOURS).quantize(64)),
            np.asarray(Image.fromarray(COLOURS).quantize(64).convert("RGB")),
        ),
    ],
)
def test_modes_are_converted(data, expected):
    np.testing.assert_array_equal(pixels.decode(data, 8), expected)


def test_cmyk_is_converted():
    flat = Image.new("RGB", (8, 8), (200, 60, 90)).convert("CMYK")
    got = pixels.decode(encoded(flat, "JPEG", quality=98), 8)
    assert abs(got.astype(int) - (200, 60, 90)).max() < 8


def test_half_transparent_pixels_lie_on_white():
    got = pixels.decode(encoded(with_alpha(128)), 8).astype(int)
    assert abs(got - (COLOURS * (128 / 255) + 127)).max() <= 1


def test_own_photographs_stand_upright(tmp_path, own):
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held on its side: turn it clockwise
    for path in (own / "val").glob("*/*"):
        path.write_bytes(encoded(Image.fromarray(COLOURS), exif=exif))
    images = load("folder", "val", size=8, data_dir=own, cache_dir=tmp_path / "cache")
    np.testing.assert_array_equal(images.pixels[0, 0], np.rot90(COLOURS, -1))
    np.testing.assert_array_equal(
        pixels.decode(encoded(Image.fromarray(COLOURS), exif=exif), 8), COLOURS
    )


def deep_png(kind: int, channels: int) -> bytes:
    """A PNG of 2 x 2 pixels with 16 bits per channel, which Pillow cannot write."""

    def chunk(name: bytes, content: bytes) -> bytes:
        checked = name + content
        return struct.pack(">I", len(content)) + checked + struct.pack(">I", zlib.crc32(checked))

    rows = zlib.compress(2 * (b"\0" + bytes(2 * 2 * channels)))
    header = struct.pack(">IIBBBBB", 2, 2, 16, kind, 0, 0, 0)
    parts = chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + parts


def broken_png() -> bytes:
    data = bytearray(png(0))
    data[data.index(b"IDAT") + 20] ^= 255
    return bytes(data)


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"", "it is empty"),
        (png(0)[:-60], "truncated"),
        (broken_png(), ""),
        (encoded(Image.fromarray(COLOURS), "GIF"), "neither PNG nor JPEG"),
        (deep_png(2, 3), "it has 16 bits per channel"),
        (deep_png(6, 4), "it has 16 bits per channel"),
        (deep_png(4, 2), "it has 16 bits per channel"),
        (encoded(Image.fromarray(COLOURS), "EPS"), "neither PNG nor JPEG"),
        (encoded(Image.fromarray(GREY.astype(np.float32)), "TIFF"), "neither PNG nor JPEG"),
        (b"\x89PNG\r\n\x1a\n", ""),
        (b"text", "neither PNG nor JPEG"),
    ],
)
def test_bad_images_are_refused_by_name_or_skipped_and_listed(tmp_path, own, data, why):
    write(own / "train/horse/bad.jpg", data)
    where = {"data_dir": own, "cache_dir": tmp_path / "cache"}
    said = refusal(**where)
    assert "train/horse/bad.jpg" in said
    assert why in said
    assert "skip_bad_images" in said
    assert not list((tmp_path / "cache").iterdir())
    lines = []
    about = describe(
        "folder", "train", skip_bad_images=1, progress=lambda text, *_: lines.append(text), **where
    )
    assert about.skipped == ("train/horse/bad.jpg",)
    assert dict(zip(about.classes, about.counts, strict=True))["horse"] == 2
    assert any("left out 1 of 8 images: train/horse/bad.jpg" in line for line in lines)
    images = load("folder", "train", skip_bad_images=1, **where)
    (own / "train/horse/bad.jpg").unlink()
    clean = load("folder", "train", **where)
    assert jnp.array_equal(images.pixels[:, :3], clean.pixels)
    assert jnp.array_equal(images.counts, clean.counts)


def test_nothing_in_a_class_folder_is_left_out_silently(tmp_path, own):
    """What decodes is an image whatever its name; what does not is refused, but for usual notes."""
    horse = own / "train/horse"
    for name in ("Thumbs.db", "notes.TXT", "a.xml", ".hidden.png"):
        write(horse / name, b"")
    write(horse / "no suffix", png(7))
    write(horse / "a.jpe", png(8))
    where = {"data_dir": own, "cache_dir": tmp_path / "cache"}
    about = describe("folder", "train", **where)
    assert dict(zip(about.classes, about.counts, strict=True))["horse"] == 4
    for name in ("a.webp", "b.bmp"):
        write(horse / name, encoded(Image.fromarray(COLOURS), name[2:]))
    said = refusal(**where)
    assert "train/horse/a.webp (its content is neither PNG nor JPEG)" in said
    assert "2 images cannot be read" in refusal(skip_bad_images=1, **where)
    about = describe("folder", "train", skip_bad_images=2, **where)
    assert about.skipped == ("train/horse/a.webp", "train/horse/b.bmp")
    write(own / "train/c.webp", b"")
    assert "train/c.webp does not belong there" in refusal(**where)


def test_no_more_images_are_skipped_than_asked(tmp_path, own):
    for name in ("Bild 0 é.PNG", "Bild 1 é.PNG"):
        write(own / "train/horse" / name, b"")
    where = {"data_dir": own, "cache_dir": tmp_path / "cache"}
    assert "2 images cannot be read" in refusal(skip_bad_images=1, **where)
    assert "no image of horse can be read" in refusal(skip_bad_images=2, **where)
    assert not list((tmp_path / "cache").iterdir())


@pytest.mark.parametrize("limit", [60, 25])  # Pillow warns of the first and refuses the second
def test_decompression_bombs_are_refused(tmp_path, own, monkeypatch, limit):
    write(own / "train/horse/bomb.png", pixels.encode(picture(0, (9, 8))))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    for path in (own / "train").glob("*/Bild*"):
        path.write_bytes(pixels.encode(picture(1, (3, 3))))
    said = refusal(data_dir=own, cache_dir=tmp_path / "cache")
    assert "train/horse/bomb.png (too large to be trusted" in said


# The cache.


def test_a_cache_that_cannot_be_written_is_refused(tmp_path, own, monkeypatch):
    (tmp_path / "file").write_text("not a folder")
    said = refusal(data_dir=own, cache_dir=tmp_path / "file" / "cache")
    assert "cannot be kept in the cache" in said
    assert "another folder by cache_dir or $MGAUG_JAX_CACHE" in said

    def refuse(*args, **kwargs):
        raise PermissionError(errno.EACCES, "Permission denied", str(tmp_path / "cache"))

    monkeypatch.setattr("tempfile.TemporaryDirectory", refuse)
    said = refusal(data_dir=own, cache_dir=tmp_path / "cache")
    assert "cannot be kept in the cache" in said
    assert "Permission denied" in said
    # nor may one be read that lies in a locked folder; root, as which tests may run, always may
    monkeypatch.setattr(Path, "exists", lambda path: "folder-" in path.name and refuse())
    with pytest.raises(ValueError, match="cannot be kept in the cache"):
        cache.cached(
            DATASETS["folder"]._replace(fingerprint=lambda *place: ""),
            *("folder", "train", own, tmp_path / "cache", lambda *told: None),
        )


def test_what_killed_builders_left_is_swept_away_and_no_other(tmp_path, own):
    left = {name: tmp_path / "cache" / f".building-{name}" for name in ("killed", "new", "live")}
    for path in left.values():
        write(path / "scratch/half", b"half")
    for name in ("killed", "live"):
        os.utime(left[name], (0, 0))
    with (left["live"] / "lock").open("w") as lock:
        os.utime(left["live"], (0, 0))
        cache._lock(lock)
        describe("folder", "train", data_dir=own, cache_dir=tmp_path / "cache")
    assert {name for name in left if left[name].exists()} == {"new", "live"}
    assert (left["live"] / "scratch/half").exists()


@pytest.mark.parametrize(
    ("step", "error"),
    [
        ("numpy.save", OSError(errno.ENOSPC, "No space left on device")),
        ("mgaug_jax.data.ingest._zeros", OSError(errno.ENOSPC, "No space left on device")),
        (
            "tensorflow_datasets.core.GeneratorBasedBuilder.download_and_prepare",
            RuntimeError("Failed to finalize writing: write() failed: No space left on device"),
        ),
    ],
)
def test_a_full_disk_leaves_no_half_cache(tmp_path, own, monkeypatch, step, error):
    where = {"data_dir": own, "cache_dir": tmp_path / "cache"}

    def full(*args, **kwargs):
        (building,) = (tmp_path / "cache").iterdir()
        (building / "half").write_bytes(b"half")
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(step, full)
        said = refusal(**where)
    assert "No space left on device" in said
    assert "make room there" in said
    assert not list((tmp_path / "cache").iterdir())
    assert describe("folder", "train", **where).counts == (3, 2, 2)


def test_two_processes_may_prepare_the_same_cache(tmp_path, own, monkeypatch):
    """The second begins and ends while the first is building."""
    where = {"data_dir": own, "cache_dir": tmp_path / "cache", "size": 8}
    real_adapt = DATASETS["folder"].adapt
    others = []

    def adapt(options):
        made = real_adapt(options)

        def build(*args):
            decoded = made.build(*args)
            with monkeypatch.context() as patch:
                patch.setitem(DATASETS, "folder", DATASETS["folder"]._replace(adapt=real_adapt))
                others.append(describe("folder", "train", **where))
            others.append(next((tmp_path / "cache").glob("folder-*")).stat().st_ino)
            return decoded

        return made._replace(build=build)

    monkeypatch.setitem(DATASETS, "folder", DATASETS["folder"]._replace(adapt=adapt))
    assert describe("folder", "train", **where) == others[0]
    (entry,) = (tmp_path / "cache").iterdir()
    assert entry.stat().st_ino == others[1]  # what others may be reading stays


def test_an_older_cache_is_not_used(tmp_path, own):
    where = {"cache_dir": tmp_path / "cache"}
    describe("folder", "train", data_dir=own, **where)
    (entry,) = (tmp_path / "cache").iterdir()
    manifest = json.loads((entry / "manifest.json").read_text())
    (entry / "manifest.json").write_text(json.dumps({**manifest, "format": 1}))
    assert "the old one has format 1" in refusal(**where)
    describe("folder", "train", data_dir=own, **where)
    assert describe("folder", "train", **where).counts == (3, 2, 2)


# mini-ImageNet.

SYNSETS = {"train": ("n00000001", "n00000002"), "val": ("n00000003",), "test": ("n00000004",)}
CHOSEN = (2, 3, 5)


@pytest.fixture
def synsets(tmp_path, monkeypatch) -> Path:
    """ImageNet's layout: five images per class, numbered so that text sorts them otherwise, of
    which mini-ImageNet has three; and a class that it has not.
    """
    mask = f"{sum(1 << i - 1 for i in CHOSEN):x}"
    lists = {split: dict.fromkeys(names, mask) for split, names in SYNSETS.items()}
    monkeypatch.setattr(mini_imagenet, "LISTS", lists)
    monkeypatch.setitem(DATASETS, "mini", mini_imagenet.dataset(len(CHOSEN)))
    for c, name in enumerate((*itertools.chain(*SYNSETS.values()), "n00000009")):
        for i, number in enumerate((4, 10, 9, 101, 33)):
            write(tmp_path / "imagenet" / name / f"{name}_{number}.JPEG", png(10 * c + i))
    return tmp_path / "imagenet"


def test_mini_imagenet_is_the_same_from_every_form(tmp_path, synsets):
    rank = {i + 1: n for i, n in enumerate(sorted((4, 10, 9, 101, 33)))}
    forms = [synsets]
    for kind in ("names", "classes", "pickles", "labels", "named labels"):
        forms.append(tmp_path / kind)
    for split, names in SYNSETS.items():
        rows, classes = [], {}
        for name in names:
            for i in CHOSEN:
                data = (synsets / name / f"{name}_{rank[i]}.JPEG").read_bytes()
                write(forms[1] / "images" / f"{name}{i:08}.jpg", data)
                write(forms[2] / split / name / f"{i}.jpg", data)
                classes.setdefault(name, []).append(len(rows))
                rows.append(pixels.decode(data, 84))
        content = {"image_data": np.stack(rows), "class_dict": classes}
        path = forms[3] / f"mini-imagenet-cache-{split}.pkl"
        write(path, pickle.dumps(content, protocol=2 if split == "train" else 5))
        part = "train_phase_train" if split == "train" else split
        numbers = {name: 64 + c for c, name in enumerate(names)}
        labels = [numbers[name] for name in names for _ in CHOSEN]
        content = {b"data": np.stack(rows), b"labels": labels}
        named = {"data": np.stack(rows[::-1]), "labels": labels, "catname2label": {}}
        for name, number in zip(names, sorted(numbers.values(), reverse=True), strict=True):
            named["catname2label"][name] = number
        for form, each in ((forms[4], content), (forms[5], named)):
            path = form / f"miniImageNet_category_split_{part}.pickle"
            write(path, pickle.dumps(each, protocol=2))
    (forms[1] / "train.csv").write_text("filename,label\n")
    forms.append(archive(forms[1], tmp_path / "any.zip"))
    for split in SPLITS:
        found = []
        for form in forms:
            where = {"data_dir": form, "cache_dir": tmp_path / "cache"}
            about, images = describe("mini", split, **where), load("mini", split, **where)
            assert about.classes == SYNSETS[split]
            assert about.counts == (3,) * len(SYNSETS[split])
            found.append([sorted(map(bytes, map(np.asarray, c))) for c in images.pixels])
        assert all(each == found[0] for each in found)
    larger = load("mini", "val", size=100, data_dir=forms[1], cache_dir=tmp_path / "cache")
    assert larger.pixels.shape == (1, 3, 100, 100, 3)
    said = refusal("mini", "val", size=100, data_dir=forms[3], cache_dir=tmp_path / "cache")
    assert "has 84 x 84" in said


def test_other_mini_imagenets_are_refused_but_for_a_subset(tmp_path, synsets):
    where = {"data_dir": synsets, "cache_dir": tmp_path / "cache"}
    (synsets / "n00000001" / "n00000001_101.JPEG").unlink()
    assert "n00000001 has 4 images, but the authors chose the 5th" in refusal("mini", **where)
    subset = {"train": ["n00000001"], "val": ["n00000003"], "test": ["n00000004"]}
    assert describe("mini", "train", splits=subset, **where).counts == (4,)
    names = tmp_path / "names"
    for i in (2, 3, 4):
        write(names / "images" / f"n00000001{i:08}.jpg", png(i))
    where["data_dir"] = names
    assert "images/n0000000100000004.jpg does not belong there" in refusal("mini", **where)
    (names / "images" / "n0000000100000004.jpg").unlink()
    said = refusal("mini", **where)
    assert "images/n0000000100000005.jpg is listed by the authors, but not there" in said
    assert describe("mini", "train", splits=subset, **where).counts == (2,)
    write(names / "images" / "cat.jpg", png(1))
    assert "its name begins with no class" in refusal("mini", splits=subset, **where)
    (tmp_path / "empty").mkdir()
    where["data_dir"] = tmp_path / "empty"
    assert "there is neither images/, train/" in refusal("mini", **where)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda c: c.pop("image_data"), "KeyError('image_data')"),
        (lambda c: c.update(image_data=c["image_data"].astype(float)), "images are float64"),
        (lambda c: c.update(image_data=c["image_data"][:, 0]), "images are uint8 [3, 84, 3]"),
        (lambda c: c["class_dict"].update(n00000003=[0, 1, 3]), "is not there"),
        (lambda c: c["class_dict"].update(n00000003=[0, 1, 1]), "is named twice"),
        (lambda c: c["class_dict"].update(n00000003=[0, 1]), "has 2 images instead of 3"),
        (lambda c: c["class_dict"].update(n00000005=[0]), "n00000005/00000 does not belong"),
        (lambda c: c.update(class_dict=[1]), "AttributeError"),
    ],
)
def test_other_pickles_of_mini_imagenet_are_refused(tmp_path, synsets, change, why):
    content = {
        "image_data": np.zeros((3, 84, 84, 3), np.uint8),
        "class_dict": {"n00000003": [0, 1, 2]},
    }
    where = {"data_dir": tmp_path / "pickles", "cache_dir": tmp_path / "cache"}
    path = where["data_dir"] / "mini-imagenet-cache-val.pkl"
    write(path, pickle.dumps(content))
    assert describe("mini", "val", **where).counts == (3,)
    change(content)
    write(path, pickle.dumps(content))
    assert why in refusal("mini", "val", **where)


# CUB and D'Claw.

BIRDS = tuple(f"{i:03}.Bird_{i}" for i in range(1, 9))


@pytest.fixture
def birds(tmp_path, monkeypatch) -> Path:
    monkeypatch.setitem(DATASETS, "birds", cub.dataset(BIRDS))
    lines = []
    for c, name in enumerate(BIRDS):
        for i in range(1 + c % 3):
            lines.append(f"{len(lines) + 1} {name}/{name[4:]}_{i}.jpg")
            write(tmp_path / "CUB_200_2011/images" / name / f"{name[4:]}_{i}.jpg", png(c))
    (tmp_path / "CUB_200_2011/images.txt").write_text("\n".join(lines) + "\n")
    write(tmp_path / "CUB_200_2011/parts/parts.txt", b"")
    return tmp_path


def test_cub_is_split_by_position(tmp_path, birds):
    tgz = tmp_path / "elsewhere" / "CUB_200_2011.tgz"
    tgz.parent.mkdir()
    with tarfile.open(tgz, "w:gz") as file:
        file.add(birds / "CUB_200_2011", "CUB_200_2011")
    expected = {"train": (0, 2, 4, 6), "val": (1, 5), "test": (3, 7)}
    for split, members in expected.items():
        for source in (birds, tgz.parent, tgz):
            about = describe("birds", split, data_dir=source, cache_dir=tmp_path / "cache")
            assert about.classes == tuple(BIRDS[i] for i in members)
            assert about.counts == tuple(1 + i % 3 for i in members)


@pytest.mark.parametrize(
    ("spoil", "why"),
    [
        (lambda f: (f / BIRDS[2] / "Bird_3_1.jpg").unlink(), "listed in images.txt, but not there"),
        (lambda f: write(f / BIRDS[2] / "more.jpg", png(0)), "more.jpg is not in images.txt"),
        (lambda f: (f.parent / "images.txt").unlink(), "there is no images.txt"),
    ],
)
def test_cub_is_held_to_its_own_list(tmp_path, birds, spoil, why):
    spoil(birds / "CUB_200_2011/images")
    where = {"data_dir": birds, "cache_dir": tmp_path / "cache"}
    assert why in refusal("birds", **where)
    subset = {"train": list(BIRDS[:3])}
    assert len(describe("birds", "train", splits=subset, **where).classes) == 3


def test_one_missing_class_of_many_is_refused(tmp_path, birds):
    listing = birds / "CUB_200_2011/images.txt"
    kept = [line for line in listing.read_text().splitlines() if BIRDS[4] not in line]
    listing.write_text("\n".join(kept))
    for path in (birds / "CUB_200_2011/images" / BIRDS[4]).iterdir():
        path.unlink()
    said = refusal("birds", data_dir=birds, cache_dir=tmp_path / "cache")
    assert f"1 of the 4 train classes have no images: {BIRDS[4]}" in said
    assert "splits can name fewer" in said


@pytest.mark.parametrize("permutation", [1, 2, 3])
def test_dclaw_has_two_neighbours_per_object(tmp_path, monkeypatch, permutation):
    monkeypatch.setitem(DATASETS, "claw", dclaw.dataset(permutation, 2))
    for number, objects in dclaw.OBJECTS.items():
        for split, members in objects.items():
            for n, side, i in itertools.product(members, ("neg", "pos"), range(2)):
                folder = tmp_path / "all" / f"dclaw/{split}{number}/obj{n}_{side}"
                write(folder / f"IMG_{i}.jpg", png(2 * n + (side == "pos")))
    zipped = archive(tmp_path / "all", tmp_path / "zipped" / "dclaw.zip")
    for split, members in dclaw.OBJECTS[permutation].items():
        where = {"data_dir": zipped.parent, "cache_dir": tmp_path / "cache"}
        about = describe("claw", split, **where)
        assert len(about.classes) == 2 * len(members)
        for neg, pos in zip(about.classes[0::2], about.classes[1::2], strict=True):
            assert neg.removesuffix("_neg") == pos.removesuffix("_pos")
        assert about == describe("claw", split, **{**where, "data_dir": tmp_path / "all"})
    extra = tmp_path / "all" / f"dclaw/train{permutation}/obj11_neg/a.jpg"
    write(extra, png(0))
    where["data_dir"] = tmp_path / "all"
    said = refusal("claw", **where)
    assert f"dclaw/train{permutation}/obj11_neg/a.jpg does not belong there" in said


# CIFAR-100 and pickles.


def python2(value) -> bytes:
    """A value as Python 2's cPickle wrote it, protocol 2; strings are bytes, arrays of uint8."""
    if isinstance(value, dict):
        items = b"".join(python2(key) + python2(each) for key, each in value.items())
        return b"}(" + items + b"u"
    if isinstance(value, list):
        return b"](" + b"".join(map(python2, value)) + b"e"
    if isinstance(value, int):
        return b"J" + struct.pack("<i", value)
    if isinstance(value, str):
        return b"T" + struct.pack("<i", len(value)) + value.encode("latin1")
    made = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R"
    dtype = (
        b"cnumpy\ndtype\nU\x02u1K\x00K\x01\x87R(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xff"
    )
    shape = b"(" + b"".join(map(python2, value.shape)) + b"t"
    raw = value.tobytes().decode("latin1")
    return made + b"(K\x01" + shape + dtype + b"K\x00tb\x89" + python2(raw) + b"tb"


@pytest.fixture(scope="module")
def cifar_files() -> dict[str, dict]:
    """CIFAR-100 as it is, but with three training images and one test image per class."""
    lists = shipped("cifar")
    names = sorted(name for split in SPLITS for name in lists[f"cifar_fs_{split}"])
    coarse = sorted({name.split("/")[0] for name in names})
    fine = sorted(name.split("/")[1] for name in names)
    files = {"meta": {"fine_label_names": fine, "coarse_label_names": coarse}}
    draw = np.random.default_rng(0)
    for part, count in (("train", 3), ("test", 1)):
        chosen = [names[i] for i in draw.permutation(np.repeat(np.arange(100), count))]
        files[part] = {
            "filenames": [f"{part}_{i}.png" for i in range(len(chosen))],
            "batch_label": f"{part}ing batch 1 of 1",
            "fine_labels": [fine.index(name.split("/")[1]) for name in chosen],
            "coarse_labels": [coarse.index(name.split("/")[0]) for name in chosen],
            "data": draw.integers(0, 256, (len(chosen), 3072), np.uint8),
        }
    return files


@pytest.fixture
def small_cifar(monkeypatch) -> None:
    monkeypatch.setitem(DATASETS, "fs", cifar.cifar_fs(4))
    monkeypatch.setitem(DATASETS, "fc", cifar.fc100(4))


@pytest.fixture
def cifar_dir(tmp_path, cifar_files, small_cifar) -> Path:
    for name, content in cifar_files.items():
        write(tmp_path / "cifar-100-python" / name, b"\x80\x02" + python2(content) + b".")
    return tmp_path


@pytest.mark.parametrize("name", ["fs", "fc"])
def test_cifar_is_read_from_the_archive_and_the_folder(tmp_path, cifar_dir, cifar_files, name):
    path = tmp_path / "archive" / "cifar-100-python.tar.gz"
    path.parent.mkdir()
    with tarfile.open(path, "w:gz") as file:
        file.add(cifar_dir / "cifar-100-python", "cifar-100-python")
    names = DATASETS[name].parameters["splits"]
    where = {"cache_dir": tmp_path / "cache"}
    about = describe(name, "val", data_dir=cifar_dir, **where)
    assert about == describe(name, "val", data_dir=path.parent, **where)
    assert about.classes == tuple(sorted(names["val"]))
    assert set(about.counts) == {4}
    images = load(name, "val", data_dir=cifar_dir, **where)
    assert images.pixels.shape == (len(names["val"]), 4, 32, 32, 3)
    # Test images come first, then training images, in file order; planes are red, green, blue.
    for c, label in enumerate(about.classes):
        rows = []
        for part in ("test", "train"):
            content = cifar_files[part]
            fine = cifar_files["meta"]["fine_label_names"].index(label.split("/")[1])
            rows += [
                row
                for row, i in zip(content["data"], content["fine_labels"], strict=True)
                if i == fine
            ]
        expected = np.stack([row.reshape(3, 32, 32).transpose(1, 2, 0) for row in rows])
        np.testing.assert_array_equal(images.pixels[c], expected)


@pytest.mark.parametrize(
    ("part", "change", "why"),
    [
        ("train", lambda c: c.pop("data"), "KeyError('data')"),
        ("train", lambda c: c["fine_labels"].__setitem__(0, 100), "IndexError"),
        ("test", lambda c: c["fine_labels"].pop(), "cannot reshape array"),
        ("meta", lambda c: c.pop("fine_label_names"), "KeyError('fine_label_names')"),
        ("meta", lambda c: c["fine_label_names"].__setitem__(0, "apples"), "does not belong"),
        ("train", lambda c: c["coarse_labels"].__setitem__(0, 0), "instead of 4|does not belong"),
    ],
)
def test_other_cifars_are_refused(tmp_path, cifar_dir, cifar_files, part, change, why):
    content = {
        key: list(value) if isinstance(value, list) else value
        for key, value in cifar_files[part].items()
    }
    change(content)
    path = cifar_dir / "cifar-100-python" / part
    path.write_bytes(pickle.dumps(content, protocol=2))
    said = refusal("fs", data_dir=cifar_dir, cache_dir=tmp_path / "cache")
    assert any(each in said for each in why.split("|"))
    path.unlink()
    said = refusal("fs", data_dir=cifar_dir, cache_dir=tmp_path / "cache")
    assert f"there is no cifar-100-python/{part}" in said


class Hostile:
    """Pickles as a call."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (pickle.dumps({"data": Hostile(eval, "open('owned', 'w')")}, 2), "builtin__.eval"),
        (pickle.dumps(Hostile(Path.touch, Path("owned")), 5), "pathlib"),
        (b"cos\nsystem\n(S'touch owned'\ntR.", "os.system"),
        (b"c__builtin__\ngetattr\n.", "getattr"),
        (b"cnumpy\nload\n.", "numpy.load"),
        (b"cnumpy.f2py\ncrackfortran\n.", "crackfortran"),
        (b"\x80\x04\x8c\x08builtins\x8c\x11list.__init__.fgh\x93.", "list.__init__"),
        (pickle.dumps({"data": np.array([{}, []], object)}, 2), "values of type O8"),
        (pickle.dumps({"data": np.zeros(2, "i4, f8")}, 2), "V12"),
        (b"c_codecs\nencode\n(S'x'\nS'zip'\ntR.", "encoded as zip"),
        (b"Pid\n.", ""),  # a persistent id
        (pickle.dumps([1]), "no dictionary"),
        (pickle.dumps({"data": np.zeros(9)})[:-20], ""),
        (b"", ""),
        (b"\xff\xfe<html>", ""),
    ],
)
def test_pickles_that_name_anything_else_are_refused(tmp_path, monkeypatch, cifar_dir, data, why):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="refused as a pickle of plain values") as error:
        pickles.load("x.pkl", data)
    assert why in str(error.value)
    (cifar_dir / "cifar-100-python" / "train").write_bytes(data)
    said = refusal("fs", data_dir=cifar_dir, cache_dir=tmp_path / "cache")
    assert "cifar-100-python/train was refused as a pickle" in said
    assert not (tmp_path / "owned").exists()
    assert not list((tmp_path / "cache").iterdir())


@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4, 5])
@pytest.mark.parametrize("order", ["C", "F"])
def test_plain_pickles_are_read_whatever_their_protocol(protocol, order):
    values = np.asarray(np.arange(24).reshape(2, 3, 4), order=order)
    content = {
        "small": values.astype(np.uint8, order=order),
        "big endian": values.astype(">i4", order=order),
        "floats": values.astype(np.float64, order=order),
        "one": np.int64(7),
        "text": "é",
        "raw": b"bytes",
        "more": {"a": [1, 2.5, None, True], "b": (np.arange(3), {1})},
    }
    got = pickles.load("x", pickle.dumps(content, protocol))
    for name in ("small", "big endian", "floats"):
        np.testing.assert_array_equal(got[name], content[name])
        assert got[name].dtype == content[name].dtype
    assert (got["one"], got["text"], got["raw"]) == (7, "é", "bytes")
    assert got["more"]["a"] == [1, 2.5, None, True]
    np.testing.assert_array_equal(got["more"]["b"][0], np.arange(3))
    assert got["more"]["b"][1] == {1}


# The real files.


@real
@pytest.mark.parametrize("permutation", [1, 2, 3])
def test_real_dclaw(tmp_path, permutation):
    where = {"data_dir": SHARED / "dclaw", "cache_dir": tmp_path}
    about = {split: describe(f"dclaw{permutation}", split, **where) for split in SPLITS}
    assert [len(about[split].classes) for split in SPLITS] == [12, 4, 4]
    assert {count for each in about.values() for count in each.counts} == {35}
    images = load(f"dclaw{permutation}", "val", **where)
    assert images.pixels.shape == (4, 35, 84, 84, 3)
    assert 60 < images.pixels.mean() < 190


@real
def test_real_cub_is_admitted_as_the_subset_it_is(tmp_path):
    source = SHARED / "cub" / "CUB_200_2011_subset100_84px.zip"
    where = {"data_dir": source, "cache_dir": tmp_path}
    assert "of the 50 test classes have no images" in refusal("cub", "test", **where)
    read = lambda split: json.loads((SHARED / f"cub/splits/{split}_subset100.json").read_text())
    splits = {split: read(split) for split in SPLITS}
    about = describe("cub", "test", splits=splits, **where)
    assert [len(splits[split]) for split in SPLITS] == [44, 28, 28]
    assert about.classes == tuple(sorted(splits["test"]))
    assert sum(about.counts) == 1663
    assert 45 <= min(about.counts) <= max(about.counts) == 60


@real
def test_real_images_in_the_layout_of_mini_imagenet(tmp_path):
    source = SHARED / "mini_imagenet" / "mini_imagenet_layout_from_tiny_25x550.zip"
    where = {"data_dir": source, "cache_dir": tmp_path}
    assert "is listed by the authors, but not there" in refusal("mini_imagenet", **where)
    splits = {"train": ["n01910747", "n02074367"], "val": ["n01855672"], "test": ["n02099601"]}
    for split in SPLITS:
        assert set(splits[split]) <= set(splits_of("mini_imagenet")[split])
        about = describe("mini_imagenet", split, splits=splits, **where)
        assert about.classes == tuple(splits[split])
        assert set(about.counts) == {550}


@real
def test_real_omniglot_in_the_split_of_vinyals(tmp_path):
    where = {"data_dir": SHARED / "omniglot", "cache_dir": tmp_path}
    about = describe("omniglot_vinyals", "val", **where)
    assert len(about.classes) == 172
    with np.load(SHARED / "omniglot" / "omniglot_28.npz") as file:
        names = [f"{a}/{c}" for a, c in zip(file["alphabet"], file["character"], strict=True)]
        reference = dict(zip(names, file["images"], strict=True))
    images = load("omniglot_vinyals", "val", **where)
    expected = np.stack([reference[name] for name in about.classes])[..., None]
    np.testing.assert_array_equal(images.pixels, expected)
