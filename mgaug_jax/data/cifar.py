"""CIFAR-FS and FC100: two ways of splitting the 100 classes of CIFAR-100 (Krizhevsky, 2009), 600
images of 32 x 32 each.

CIFAR-FS (Bertinetto et al., 2019) splits classes at random, 64 / 16 / 20; FC100 (Oreshkin et al.,
2018) splits the 20 superclasses of five classes, 12 / 4 / 4. Training and test images of CIFAR-100
are taken together. A class is named `superclass/class`.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from mgaug_jax.data import pickles, pixels
from mgaug_jax.data.files import Files, Found, from_files, shipped
from mgaug_jax.data.prepared import Prepared
from mgaug_jax.data.record import SPLITS, Dataset
from mgaug_jax.data.trees import Tree

ROOT, PARTS = "cifar-100-python", ("train", "test")
TREE = """\
data_dir/
  cifar-100-python/    (or cifar-100-python.tar.gz, or data_dir is the archive)
    meta               names of classes and superclasses
    train              50,000 images
    test               10,000 images
or, prepared by TFDS with file_format="array_record",
data_dir/
  cifar100/3.0.2/      (or data_dir is this folder)"""


def _find(files: Files, tree: Tree, split: str) -> Found:
    del files, split
    meta, *parts = (_content(tree, name) for name in ("meta", *PARTS))
    images: dict[str, list[str]] = {}
    rows: dict[str, np.ndarray] = {}
    for part, content in zip(PARTS, parts, strict=True):
        try:
            coarse = [str(meta["coarse_label_names"][i]) for i in content["coarse_labels"]]
            fine = [str(meta["fine_label_names"][i]) for i in content["fine_labels"]]
            data = content["data"].reshape(len(fine), 3, 32, 32).transpose(0, 2, 3, 1)
            if data.dtype != np.uint8:
                raise TypeError(f"pixels are {data.dtype}")
        except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(
                f"{ROOT}/{part} or {ROOT}/meta is not as in CIFAR-100 ({error!r})"
            ) from error
        for i, (above, name, row) in enumerate(zip(coarse, fine, data, strict=True)):
            key = f"{above}/{name}/{part}_{i:05}"
            images.setdefault(f"{above}/{name}", []).append(key)
            rows[key] = row
    return Found(images, lambda key: pixels.encode(rows[key]))


def _content(tree: Tree, name: str) -> dict:
    path = f"{ROOT}/{name}"
    if path not in tree.marks:
        raise ValueError(f"there is no {path}")
    return pickles.load(path, tree.read(path))


def _label(features: Any, record: Mapping[str, Any]) -> str:
    """The class of a record of TFDS."""
    above, fine = (features[name].int2str(record[name]) for name in ("coarse_label", "label"))
    return f"{above}/{fine}"


def _dataset(name: str, splits: dict[str, tuple[str, ...]], count: int) -> Dataset:
    return from_files(
        Files(
            name=name,
            tree=TREE,
            find=_find,
            splits=splits,
            roots=dict.fromkeys(SPLITS, (ROOT,)),
            count=count,
            size=32,
            tfds=Prepared("cifar100", _label),
            source="Krizhevsky 2009, https://www.cs.toronto.edu/~kriz/cifar.html",
        )
    )


def cifar_fs(images: int = 600) -> Dataset:
    """CIFAR-FS: 64 / 16 / 20 classes of so many images."""
    lists = shipped("cifar")
    splits = {split: tuple(lists[f"cifar_fs_{split}"]) for split in SPLITS}
    return _dataset("cifar_fs", splits, images)


def fc100(images: int = 600) -> Dataset:
    """FC100: 60 / 20 / 20 classes of so many images; no superclass is in two splits."""
    lists = shipped("cifar")
    classes = sorted(name for split in SPLITS for name in lists[f"cifar_fs_{split}"])
    return _dataset(
        "fc100",
        {
            split: tuple(name for name in classes if name.split("/")[0] in lists[f"fc100_{split}"])
            for split in SPLITS
        },
        images,
    )
