"""Data sets as TFDS prepares them, read without TensorFlow."""

import hashlib
import io
import itertools
import json
import shutil
import sys
from collections.abc import Mapping
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mgaug_jax.data import DATASETS, SPLITS, cifar, cub, describe, load, omniglot, pixels
from mgaug_jax.data.files import shipped

tfds = pytest.importorskip("tensorflow_datasets", reason="tensorflow-datasets is not installed")
pytest.importorskip("array_record", reason="array_record is not installed")

BIRDS = tuple(shipped("cub")["classes"][:8])
SMALL = {
    "cifar100": cifar.cifar_fs(2),
    "omniglot": omniglot.dataset({"Kin": 2, "Far_(Near)": 1}, {"New": 2}, ("Far_(Near)",), 2),
    "caltech_birds2011": cub.dataset(BIRDS),
}


def prepare(folder: Path, name: str, labels: Mapping[str, list[str]], records: list[dict]) -> Path:
    """A data set with TFDS's own features of that name (but these labels), as it writes it; half of
    the records are its training split.
    """
    stock = tfds.builder(name, data_dir=folder, file_format="array_record").info
    own = {key: tfds.features.ClassLabel(names=names) for key, names in labels.items()}
    features = tfds.features.FeaturesDict({**stock.features, **own})

    class Own(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = stock.version

        def _info(self):
            return tfds.core.DatasetInfo(builder=self, features=features)

        def _split_generators(self, dl_manager):
            return {
                "train": self._generate_examples(records[::2]),
                "test": self._generate_examples(records[1::2]),
            }

        def _generate_examples(self, part):
            yield from enumerate(part)

    Own.name = name
    tfds.disable_progress_bar()
    with redirect_stdout(io.StringIO()):
        Own(data_dir=folder, file_format="array_record").download_and_prepare()
    return folder / name / str(stock.version)


def records_of(name: str) -> tuple[dict[str, list[str]], list[tuple[str, dict]]]:
    """Labels of the features, and (class as we name it, record), two or three of each class."""
    draw = np.random.default_rng(0)
    splits = SMALL[name].parameters["splits"]
    classes = sorted(each for split in SPLITS for each in splits[split])
    found: list[tuple[str, dict[str, Any]]] = []
    if name == "cifar100":
        coarse = sorted({each.split("/")[0] for each in classes})
        fine = sorted(each.split("/")[1] for each in classes)
        for n, each in itertools.product(range(2), classes):
            image = pixels.encode(draw.integers(0, 256, (32, 32, 3), np.uint8))
            above, own = each.split("/")
            found += [(each, {"id": str(n), "image": image, "label": own, "coarse_label": above})]
        return {"coarse_label": coarse, "label": fine}, found
    if name == "omniglot":
        for each in classes * 2:
            strokes, image = io.BytesIO(), Image.fromarray(draw.random((105, 105)) < 0.9)
            assert image.mode == "1"
            image.save(strokes, "PNG")
            alphabet, number = each.split("/character")
            about = {"alphabet": alphabet, "alphabet_char_id": int(number) - 1}
            label = f"{alphabet}_{int(number) - 1}"
            found += [(each, {"image": strokes.getvalue(), "label": label, **about})]
        alphabets = sorted({each.split("/")[0] for each in classes})
        return {"alphabet": alphabets, "label": sorted({r["label"] for _, r in found})}, found
    mask = io.BytesIO()
    Image.new("L", (9, 7)).save(mask, "PNG")
    for each in classes * 2 + classes[:3]:
        photo = io.BytesIO()
        Image.fromarray(draw.integers(0, 256, (7, 9, 3), np.uint8)).save(photo, "JPEG")
        record = {
            "image": photo.getvalue(),
            "image/filename": f"{each}/x.jpg",
            "label": BIRDS.index(each),
            "label_name": each[4:].lower(),
            "bbox": tfds.features.BBox(0.0, 0.0, 1.0, 1.0),
            "segmentation_mask": mask.getvalue(),
        }
        found += [(each, record)]
    return {}, found


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> dict[str, tuple[Path, list[tuple[str, bytes]]]]:
    """Name -> version folder, and the images with their classes."""
    made = {}
    for name in SMALL:
        labels, found = records_of(name)
        images = [(label, record["image"]) for label, record in found]
        folder = prepare(tmp_path_factory.mktemp(name), name, labels, [r for _, r in found])
        made[name] = folder, images
    return made


@pytest.fixture(autouse=True)
def small(monkeypatch) -> None:
    for name, dataset in SMALL.items():
        monkeypatch.setitem(DATASETS, f"small_{name}", dataset)


@pytest.mark.parametrize("name", list(SMALL))
def test_images_are_those_that_tfds_was_given(tmp_path, sources, name):
    place, given = sources[name]
    decode = SMALL[name].decode
    assert decode is not None
    for split, classes in SMALL[name].parameters["splits"].items():
        where = {"data_dir": place.parents[1], "cache_dir": tmp_path / "cache"}
        about = describe(f"small_{name}", split, **where)
        assert about.classes == tuple(sorted(classes))
        images = load(f"small_{name}", split, **where)
        for c, label in enumerate(about.classes):
            own = sorted(
                (data for each, data in given if each == label),
                key=lambda data: hashlib.sha256(data).digest(),
            )
            assert about.counts[c] == len(own) >= 2
            for m, data in enumerate(own):
                np.testing.assert_array_equal(images.pixels[c, m], decode(data))
        inside = describe(f"small_{name}", split, data_dir=place, cache_dir=tmp_path / "other")
        assert inside == about  # the version's own folder will do
    assert "tensorflow" not in sys.modules


def test_two_equal_images_are_two(tmp_path):
    labels, found = records_of("omniglot")
    label, record = found[0]
    twin = next(r for each, r in found[1:] if each == label)
    twin["image"] = record["image"]
    place = prepare(tmp_path, "omniglot", labels, [r for _, r in found])
    assert (label,) == SMALL["omniglot"].parameters["splits"]["val"]
    images = load("small_omniglot", "val", data_dir=place, cache_dir=tmp_path / "cache")
    np.testing.assert_array_equal(images.pixels[0, 0], images.pixels[0, 1])


def test_an_incomplete_one_needs_splits_of_its_own(tmp_path):
    labels, found = records_of("cifar100")
    lacking = found[0][0]
    rest = [record for label, record in found if label != lacking]
    prepare(tmp_path, "cifar100", labels, rest)
    (split,) = (
        s for s, names in SMALL["cifar100"].parameters["splits"].items() if lacking in names
    )
    options = {"data_dir": tmp_path, "cache_dir": tmp_path / "cache"}
    with pytest.raises(ValueError, match=f"classes have no images: {lacking}"):
        load("small_cifar100", split, **options)
    own = {"train": [found[1][0]], "test": [found[2][0], found[3][0]]}
    assert load("small_cifar100", "test", splits=own, **options).counts.tolist() == [2, 2]


def test_all_images_must_be_there(tmp_path, sources):
    place, _ = sources["cifar100"]
    with pytest.raises(ValueError, match="has 2 images instead of 600"):
        load("fc100", "train", data_dir=place, cache_dir=tmp_path)
    place, given = sources["caltech_birds2011"]
    with pytest.raises(ValueError, match=f"has {len(given)} images instead of 11788"):
        load("cub", "train", data_dir=place, cache_dir=tmp_path)


def shard(place: Path) -> Path:
    return next(place.glob("*-train.array_record-*"))


def cut(place: Path) -> None:
    data = shard(place).read_bytes()
    shard(place).write_bytes(data[: len(data) // 2])


def flip(place: Path) -> None:
    data = bytearray(shard(place).read_bytes())
    data[len(data) // 2] ^= 1
    shard(place).write_bytes(bytes(data))


def information(place: Path, **changes) -> None:
    path = place / "dataset_info.json"
    about = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in about.items() if value is not None}))


DAMAGED = "cifar100/3.0.2 is damaged, incomplete or another one ("


@pytest.mark.parametrize(
    ("spoil", "why"),
    [
        (lambda p: information(p, fileFormat="tfrecord"), 'file_format="array_record"'),
        (lambda p: information(p, fileFormat=None), "as tfrecord, which TensorFlow alone reads"),
        (lambda p: information(p, name="cifar10"), "is not that of cifar100"),
        (lambda p: (p / "dataset_info.json").write_text("{"), "is damaged or unreadable"),
        (lambda p: shutil.copytree(p, p.with_name("3.0.1")), "several versions of cifar100 (3.0.1"),
        (lambda p: (p / "features.json").unlink(), DAMAGED),
        (lambda p: (p / "label.labels.txt").write_text("x\n" * 100), "/x/"),
        (lambda p: shard(p).unlink(), DAMAGED),
        (lambda p: shard(p).write_bytes(b""), DAMAGED),
        (cut, DAMAGED),
        (flip, DAMAGED),
    ],
)
def test_others_are_refused_in_a_sentence(tmp_path, sources, spoil, why):
    place = tmp_path / "cifar100" / "3.0.2"
    shutil.copytree(sources["cifar100"][0], place)
    spoil(place)
    with pytest.raises(ValueError) as error:
        load("small_cifar100", "train", data_dir=tmp_path, cache_dir=tmp_path / "cache")
    said = str(error.value).splitlines()[0]
    assert why in said
    assert said.endswith("; give a data_dir that looks like this:")
    assert not list((tmp_path / "cache").glob("*"))
