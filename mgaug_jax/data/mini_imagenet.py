"""mini-ImageNet in the split of Ravi and Larochelle (2017): 64 / 16 / 20 classes of ImageNet, 600
images of each.

Read from any of the forms it is found in, see `TREE`. The pickles hold images of 84 x 84; the other
forms give larger images too.
"""

import re
from typing import Any

from mgaug_jax.data import pickles, pixels
from mgaug_jax.data.files import (
    Files,
    Found,
    class_folders,
    from_files,
    may_be_image,
    shipped,
)
from mgaug_jax.data.record import SPLITS, Dataset
from mgaug_jax.data.trees import Tree

TREE = """\
data_dir/              (or a zip or tar of it)
  images/
    n0153282900000005.jpg ...            60,000 images, named as in the authors' lists
or
data_dir/
  train/               likewise val/ and test/
    n01532829/
      any_name.jpg ... 600 images
    ...                64 classes
or
data_dir/
  mini-imagenet-cache-train.pkl          likewise val and test
or
data_dir/
  miniImageNet_category_split_train_phase_train.pickle
  miniImageNet_category_split_val.pickle    likewise test
or ImageNet's training images,
data_dir/
  n01532829/
    n01532829_7.JPEG ...                 all images of the class
  ...                  100 classes or more"""
SYNSET = re.compile(r"n\d{8}")
PICKLE = "mini-imagenet-cache-{}.pkl"
BY_LABEL = {
    split: f"miniImageNet_category_split_{part}.pickle"
    for split, part in (("train", "train_phase_train"), ("val", "val"), ("test", "test"))
}


def _find(files: Files, tree: Tree, split: str) -> Found:
    """Takes the first form there is."""
    if PICKLE.format(split) in tree.marks:
        return _from_pickle(files, tree, PICKLE.format(split))
    if BY_LABEL[split] in tree.marks:
        return _from_pickle(files, tree, BY_LABEL[split], split)
    if "images" in tree.folders:
        return Found(_from_names(files, tree), tree.read)
    if split in tree.folders:
        return Found(class_folders(tree, split), tree.read)
    if any(SYNSET.fullmatch(path) for path in tree.folders):
        return Found(_from_imagenet(files, tree), tree.read)
    raise ValueError(
        f"there is neither images/, {split}/, {PICKLE.format(split)}, {BY_LABEL[split]} "
        "nor n01532829/"
    )


def _members() -> dict[str, list[int]]:
    """Numbers, from 1, of the images of each class."""
    masks = {name: int(mask, 16) for split in SPLITS for name, mask in LISTS[split].items()}
    return {
        name: [i + 1 for i in range(mask.bit_length()) if mask >> i & 1]
        for name, mask in masks.items()
    }


def _from_names(files: Files, tree: Tree) -> dict[str, list[str]]:
    images: dict[str, list[str]] = {}
    for path in tree.marks:
        if path.startswith("images/") and may_be_image(path):
            name = path.removeprefix("images/")[:9]
            if not SYNSET.fullmatch(name) or path.count("/") > 1:
                raise ValueError(f"{path} does not belong there: its name begins with no class")
            images.setdefault(name, []).append(path)
    if files.official:
        there = {path for paths in images.values() for path in paths}
        listed = {f"images/{name}{i:08}.jpg" for name, every in _members().items() for i in every}
        for path in sorted(there ^ listed):
            raise ValueError(
                f"{path} is listed by the authors, but not there"
                if path in listed
                else f"{path} does not belong there: the authors do not list it"
            )
    return images


def _from_imagenet(files: Files, tree: Tree) -> dict[str, list[str]]:
    """The authors' number of an image is its position among those of its class, sorted by the
    number in their names.
    """
    members, found = _members(), class_folders(tree)
    images = {}
    for name, paths in found.items():
        if name not in members:
            continue
        if not files.official:
            images[name] = paths
            continue
        if len(paths) < members[name][-1]:
            raise ValueError(
                f"{name} has {len(paths)} images, but the authors chose the {members[name][-1]}th: "
                "all of ImageNet's training images of the class must be there"
            )
        paths = sorted(paths, key=_number)
        images[name] = [paths[i - 1] for i in members[name]]
    return images


def _number(path: str) -> tuple[int, str]:
    digits = re.search(r"_(\d+)\.", path)
    return int(digits[1]) if digits else 0, path


def _by_label(content: dict[str, Any], split: str) -> dict[str, list[int]]:
    """Class -> rows, of a pickle that has a number for every image. `catname2label` names them;
    without it they are taken to follow the classes' names.
    """
    labels = [int(label) for label in content["labels"]]
    names = content.get("catname2label")
    if names is None:
        names = dict(zip(sorted(LISTS[split]), sorted(set(labels)), strict=True))
    rows: dict[int, list[int]] = {label: [] for label in names.values()}
    for row, label in enumerate(labels):
        rows[label].append(row)
    return {name: rows[label] for name, label in names.items()}


def _from_pickle(files: Files, tree: Tree, path: str, split: str | None = None) -> Found:
    """The images of a pickle; with `split` those of one that has labels."""
    content = pickles.load(path, tree.read(path))
    try:
        data = content["image_data" if split is None else "data"]
        classes = content["class_dict"] if split is None else _by_label(content, split)
        images = {name: [f"{name}/{i:05}" for i in rows] for name, rows in classes.items()}
        rows = {f"{name}/{i:05}": i for name, each in classes.items() for i in each}
        if data.dtype != "uint8" or data.ndim != 4 or data.shape[-1] != 3:
            raise TypeError(f"images are {data.dtype} {list(data.shape)}")
        if not all(0 <= row < len(data) for row in rows.values()):
            raise IndexError("an image of a class is not there")
        if len(rows) != sum(map(len, images.values())):
            raise ValueError("an image is named twice")
    except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{path} is not as expected ({error!r})") from error
    if files.size > max(data.shape[1:3]):
        raise ValueError(
            f"images of size {files.size} are wanted, and {path} has {data.shape[1]} x "
            f"{data.shape[2]}: read another form, or ask for that size"
        )
    return Found(images, lambda key: pixels.encode(data[rows[key]]))


def _keep(name: str) -> bool:
    """ImageNet has ten times as many classes, which are not even listed."""
    known = not SYNSET.fullmatch(name) or any(name in LISTS[split] for split in SPLITS)
    return known and not name.endswith(".csv")


LISTS = shipped("mini_imagenet")


def dataset(images: int = 600) -> Dataset:
    """The data set, with so many images per class."""
    return from_files(
        Files(
            name="mini_imagenet",
            tree=TREE,
            find=_find,
            splits={split: tuple(LISTS[split]) for split in SPLITS},
            roots=dict.fromkeys(SPLITS, ("",)),
            count=images,
            size=84,
            keep=_keep,
            source="Vinyals et al. 2016, split of Ravi and Larochelle 2017; images of https://image-net.org",
        )
    )
