"""Omniglot (Lake et al., 2015) in its official layout: 1623 characters of 50 alphabets, 20 times
each, as 28 x 28 images with ink 255 on 0.

There are four splits of it. In the official one the test is the evaluation set; of the background
set's 30 alphabets, five of 17 to 48 characters (15 % of all), none a kin of one that stays, are the
validation split.
"""

import random
from collections.abc import Mapping
from typing import Any

import numpy as np

from mgaug_jax.data import pixels
from mgaug_jax.data.files import Files, Found, class_folders, from_files, shipped
from mgaug_jax.data.prepared import Prepared
from mgaug_jax.data.record import SPLITS, Dataset
from mgaug_jax.data.trees import Tree

ROOTS = ("images_background", "images_evaluation")

BACKGROUND = {
    "Alphabet_of_the_Magi": 20,
    "Anglo-Saxon_Futhorc": 29,
    "Arcadian": 26,
    "Armenian": 41,
    "Asomtavruli_(Georgian)": 40,
    "Balinese": 24,
    "Bengali": 46,
    "Blackfoot_(Canadian_Aboriginal_Syllabics)": 14,
    "Braille": 26,
    "Burmese_(Myanmar)": 34,
    "Cyrillic": 33,
    "Early_Aramaic": 22,
    "Futurama": 26,
    "Grantha": 43,
    "Greek": 24,
    "Gujarati": 48,
    "Hebrew": 22,
    "Inuktitut_(Canadian_Aboriginal_Syllabics)": 16,
    "Japanese_(hiragana)": 52,
    "Japanese_(katakana)": 47,
    "Korean": 40,
    "Latin": 26,
    "Malay_(Jawi_-_Arabic)": 40,
    "Mkhedruli_(Georgian)": 41,
    "N_Ko": 33,
    "Ojibwe_(Canadian_Aboriginal_Syllabics)": 14,
    "Sanskrit": 42,
    "Syriac_(Estrangelo)": 23,
    "Tagalog": 17,
    "Tifinagh": 55,
}
EVALUATION = {
    "Angelic": 20,
    "Atemayar_Qelisayer": 26,
    "Atlantean": 26,
    "Aurek-Besh": 26,
    "Avesta": 26,
    "Ge_ez": 26,
    "Glagolitic": 45,
    "Gurmukhi": 45,
    "Kannada": 41,
    "Keble": 26,
    "Malayalam": 47,
    "Manipuri": 40,
    "Mongolian": 30,
    "Old_Church_Slavonic_(Cyrillic)": 45,
    "Oriya": 46,
    "Sylheti": 28,
    "Syriac_(Serto)": 23,
    "Tengwar": 25,
    "Tibetan": 42,
    "ULOG": 26,
}
HELD_OUT = ("Futurama", "Gujarati", "Hebrew", "N_Ko", "Tagalog")

TREE = """\
data_dir/
  images_background/   (or images_background.zip)
    Alphabet_of_the_Magi/
      character01/
        0709_01.png ... 0709_20.png
      ...
    ...                30 alphabets, 964 characters, 20 images each
  images_evaluation/   (or images_evaluation.zip)
    ...                20 alphabets, 659 characters, 20 images each
or, prepared by TFDS with file_format="array_record",
data_dir/
  omniglot/3.0.0/      (or data_dir is this folder)"""


def decode(data: bytes, size: int) -> np.ndarray:
    """uint8 `[size, size, 1]`, inverted: ink is 255."""
    return 255 - pixels.decode(data, size, "L")


def characters(alphabets: Mapping[str, int]) -> tuple[str, ...]:
    """Names of the characters of alphabets (name: number of characters)."""
    return tuple(
        f"{name}/character{n:02}" for name in alphabets for n in range(1, alphabets[name] + 1)
    )


def dataset(
    background: Mapping[str, int] = BACKGROUND,
    evaluation: Mapping[str, int] = EVALUATION,
    held_out: tuple[str, ...] = HELD_OUT,
    drawers: int = 20,
) -> Dataset:
    """The official split of these alphabets (name: number of characters), drawn by so many people;
    some of the background alphabets are held out for validation.
    """
    learnt = {name: count for name, count in background.items() if name not in held_out}
    kept = {name: background[name] for name in held_out}
    splits = {"train": learnt, "val": kept, "test": evaluation}
    places = {"train": ROOTS[:1], "val": ROOTS[:1], "test": ROOTS[1:]}
    return _dataset({split: characters(of) for split, of in splits.items()}, places, drawers)


def vinyals() -> Dataset:
    """The split of Vinyals et al. (2016): 1028 / 172 / 423 characters."""
    lists = shipped("omniglot_vinyals")
    return _dataset(
        {
            split: tuple(
                f"{name}/character{n:02}"
                for name, (first, last) in lists[split].items()
                for n in range(first, last + 1)
            )
            for split in SPLITS
        }
    )


def shuffled(train: int, val: int) -> Dataset:
    """A split of all characters, sorted by name and shuffled by Python's generator of seed 1: so
    many for training, so many for validation, the rest for the test.

    Finn et al. (2017) and meta-augmentation take 1100 / 100 / 423, shuffled by that seed from the
    order in which a file system listed them: their characters cannot be had again. MR-MAML takes
    1200 for training and the rest, 423, for the test. It validates on nothing; we take 100 of those
    423, for its 20 pools of 60 need all of the 1200.
    """
    names = sorted(characters({**BACKGROUND, **EVALUATION}))
    random.Random(1).shuffle(names)
    parts = names[:train], names[train : train + val], names[train + val :]
    return _dataset(dict(zip(SPLITS, map(tuple, parts), strict=True)))


def _find(files: Files, tree: Tree, split: str) -> Found:
    del files, split
    found = [class_folders(tree, root, depth=2) for root in ROOTS]
    return Found({**found[0], **found[1]}, tree.read)


def _label(features: Any, record: Mapping[str, Any]) -> str:
    """The character of a record of TFDS."""
    alphabet = features["alphabet"].int2str(record["alphabet"])
    return f"{alphabet}/character{record['alphabet_char_id'] + 1:02}"


def _dataset(
    splits: Mapping[str, tuple[str, ...]],
    roots: Mapping[str, tuple[str, ...]] = dict.fromkeys(SPLITS, ROOTS),
    drawers: int = 20,
) -> Dataset:
    return from_files(
        Files(
            name="omniglot",
            tree=TREE,
            find=_find,
            splits=splits,
            roots=roots,
            count=drawers,
            size=28,
            decode=decode,
            parameters={"resize": "LANCZOS from L, inverted"},
            mean=(0.0,),
            std=(1.0,),
            tfds=Prepared("omniglot", _label),
            source="Lake et al. 2015, https://github.com/brendenlake/omniglot",
        )
    )
