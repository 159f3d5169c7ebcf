"""What a data set is: a description that can be built and cached."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

Progress = Callable[[str], None]
"""Is told, in one line, what is being done."""
SPLITS = ("train", "val", "test")


class Decoded(NamedTuple):
    """A split on the host: `pixels uint8 [C, M, h, w, c]`, `counts int32 [C]`, C class names."""

    pixels: np.ndarray
    counts: np.ndarray
    classes: tuple[str, ...]


class Dataset(NamedTuple):
    """Description of a data set.

    Attributes:
      parameters: JSON; everything but the source that the result depends on.
      fingerprint: `(split, data_dir) -> JSON`, which source it is, found out cheaply; refuses a
        data folder that is not what the data set expects.
      build: `(split, data_dir, scratch, progress) -> Decoded`; `scratch` is an empty folder.
      tree: What `data_dir` must look like, for messages; empty if no data folder is needed.
      mean, std: `[c]`, of pixels scaled to [0, 1].
    """

    parameters: dict[str, Any]
    fingerprint: Callable[[str, Path | None], Any]
    build: Callable[[str, Path | None, Path, Progress], Decoded]
    tree: str = ""
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)
