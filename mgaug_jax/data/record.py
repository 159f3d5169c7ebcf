"""What a data set is: a description that can be built and cached."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

SPLITS = ("train", "val", "test")


class Progress(Protocol):
    """Is told what is being done, in one line, and then how much of how much is done."""

    def __call__(self, text: str, done: int = 0, total: int = 0, /) -> None: ...


class Decoded(NamedTuple):
    """A split on the host: `pixels uint8 [C, M, h, w, c]`, `counts int32 [C]`, C class names, and
    the files that were skipped since they could not be read.
    """

    pixels: np.ndarray
    counts: np.ndarray
    classes: tuple[str, ...]
    skipped: tuple[str, ...] = ()


class Options(NamedTuple):
    """What the user of a data set may ask for.

    Attributes:
      splits: For each split its classes, in place of the official ones; None: the official ones.
      size: Height and width of the images; None: the data set's own.
      skip_bad_images: So many images of a split may be unreadable; they are left out.
      like: A data set whose size, colours and normalisation the images get; None: their own.
    """

    splits: Mapping[str, tuple[str, ...]] | None = None
    size: int | None = None
    skip_bad_images: int = 0
    like: "Dataset | None" = None


class Dataset(NamedTuple):
    """Description of a data set.

    Attributes:
      parameters: JSON; everything but the source that the result depends on.
      fingerprint: `(split, data_dir) -> JSON`, which source it is, found out cheaply.
      build: `(split, data_dir, scratch, progress) -> Decoded`; `scratch` is an empty folder.
        Refuses a source that is not what the data set expects.
      tree: What `data_dir` must look like, for messages; empty if no data folder is needed.
      mean, std: `[c]`, of pixels scaled to [0, 1].
      adapt: The same data set with other options; None if it has none.
      decode: Pixels `uint8 [h, w, c]` of the content of an image file that looks like those of the
        data set; None if there is no telling.
      source: Whose it is and where it can be had.
      roots: Folders below `data_dir` that it is read from, or archives of them; "" is all of it.
    """

    parameters: dict[str, Any]
    fingerprint: Callable[[str, Path | None], Any]
    build: Callable[[str, Path | None, Path, Progress], Decoded]
    tree: str = ""
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)
    adapt: Callable[[Options], "Dataset"] | None = None
    decode: Callable[[bytes], np.ndarray] | None = None
    source: str = ""
    roots: tuple[str, ...] = ()
