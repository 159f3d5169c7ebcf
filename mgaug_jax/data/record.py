"""What a data set is: a description that can be built and cached."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

Progress = Callable[[str], None]
"""Is told, in one line, what is being done."""
SPLITS = ("train", "val", "test")


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
    """

    splits: Mapping[str, tuple[str, ...]] | None = None
    size: int | None = None
    skip_bad_images: int = 0


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
    """

    parameters: dict[str, Any]
    fingerprint: Callable[[str, Path | None], Any]
    build: Callable[[str, Path | None, Path, Progress], Decoded]
    tree: str = ""
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)
    adapt: Callable[[Options], "Dataset"] | None = None
