"""Omniglot (Lake et al., 2015) in its official layout: 1623 characters of 50 alphabets, 20 times
each, as 28 x 28 images with ink 255 on 0.

Test is the evaluation set. Of the background set's 30 alphabets, five of 17 to 48 characters (15 %
of all), none a kin of one that stays, are the validation split.
"""

import io
from collections.abc import Mapping

import numpy as np

from mgaug_jax.data.files import Files, from_files
from mgaug_jax.data.record import Dataset

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
    ...                20 alphabets, 659 characters, 20 images each"""


def decode(data: bytes, size: int = 28) -> np.ndarray:
    """uint8 `[size, size, 1]`, inverted. A 1-bit image must be made grey before it is resized, or
    Pillow silently takes nearest neighbours.
    """
    from PIL import Image

    with Image.open(io.BytesIO(data)) as image:
        grey = image.convert("L").resize((size, size), Image.Resampling.LANCZOS)
    return 255 - np.asarray(grey)[..., None]


def dataset(
    background: Mapping[str, int] = BACKGROUND,
    evaluation: Mapping[str, int] = EVALUATION,
    held_out: tuple[str, ...] = HELD_OUT,
    drawers: int = 20,
) -> Dataset:
    """The data set of these alphabets (name: number of characters), drawn by so many people."""

    def characters(alphabets: Mapping[str, int]) -> tuple[str, ...]:
        return tuple(
            f"{name}/character{n:02}" for name in alphabets for n in range(1, alphabets[name] + 1)
        )

    learnt = {name: count for name, count in background.items() if name not in held_out}
    kept = {name: background[name] for name in held_out}
    return from_files(
        Files(
            name="omniglot",
            tree=TREE,
            expected={
                "images_background": dict.fromkeys(characters(background), drawers),
                "images_evaluation": dict.fromkeys(characters(evaluation), drawers),
            },
            splits={
                "train": ("images_background", characters(learnt)),
                "val": ("images_background", characters(kept)),
                "test": ("images_evaluation", characters(evaluation)),
            },
            decode=decode,
            parameters={"size": 28, "resize": "LANCZOS from L"},
        )
    )
