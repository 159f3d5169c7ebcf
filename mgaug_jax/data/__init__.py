"""Data sets, decoded once into a checked cache and put on the device whole.

    images = load("glyphs", "train")
    images = load("omniglot", "test", data_dir="/data/omniglot")

A data set is a `Dataset` in `DATASETS`: `glyphs` is drawn, the others are read from the official
files in `data_dir`. Regression tasks need no data: see `mgaug_jax.data.sinusoid`.
"""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from mgaug_jax.data import glyphs, omniglot, sinusoid
from mgaug_jax.data.cache import Entry, cached
from mgaug_jax.data.record import SPLITS, Dataset, Decoded
from mgaug_jax.episodes import Images

DATASETS: dict[str, Dataset] = {
    "glyphs": glyphs.dataset(glyphs.Glyphs()),
    "omniglot": omniglot.dataset(),
}
"""The known data sets by name; add your own."""


class Manifest(NamedTuple):
    """What a split holds.

    Attributes:
      name, split: As asked for.
      classes: C names.
      counts: C numbers of images.
      digest: SHA-256, in hex, of the class names, counts and pixels: the split's identity.
    """

    name: str
    split: str
    classes: tuple[str, ...]
    counts: tuple[int, ...]
    digest: str


def load(
    name: str,
    split: str,
    *,
    data_dir: str | Path | None = None,
    cache_dir: str | Path | None = None,
    progress: Callable[[str], None] = lambda text: None,
) -> Images:
    """The images of a split, on the default device.

    Args:
      name: One of `DATASETS`.
      split: "train", "val" or "test"; no class is in two of them.
      data_dir: Folder of the official files. None for `glyphs`, or to take what the cache has.
      cache_dir: Where decoded splits are kept; default `$MGAUG_JAX_CACHE`, else
        `$XDG_CACHE_HOME/mgaug_jax`, else `~/.cache/mgaug_jax`.
      progress: Is told in one line what takes time.

    Raises:
      ValueError: Unknown name or split, or a folder that does not hold the data set.
    """
    entry = _entry(name, split, data_dir, cache_dir, progress)
    return Images(
        # A copy: an array that shared the mapped file's memory would change with the file.
        jnp.array(np.load(entry.pixels, mmap_mode="r")),
        jnp.array(entry.manifest["counts"], jnp.int32),
        jnp.array(DATASETS[name].mean, jnp.float32),
        jnp.array(DATASETS[name].std, jnp.float32),
    )


def describe(
    name: str,
    split: str,
    *,
    data_dir: str | Path | None = None,
    cache_dir: str | Path | None = None,
    progress: Callable[[str], None] = lambda text: None,
) -> Manifest:
    """Classes and identity of a split, from the cache, which is built if need be; see `load`."""
    manifest = _entry(name, split, data_dir, cache_dir, progress).manifest
    return Manifest(
        name, split, tuple(manifest["classes"]), tuple(manifest["counts"]), manifest["digest"]
    )


def _entry(name, split, data_dir, cache_dir, progress) -> Entry:
    for what, value, known in (("data set", name, DATASETS), ("split", split, SPLITS)):
        if value not in known:
            raise ValueError(
                f"The {what} {value!r} was asked for, but is not known; take one of "
                f"{', '.join(known)}."
            )
    data_dir = None if data_dir is None else Path(data_dir)
    cache_dir = None if cache_dir is None else Path(cache_dir)
    return cached(DATASETS[name], name, split, data_dir, cache_dir, progress)


__all__ = ["DATASETS", "SPLITS", "Dataset", "Decoded", "Manifest", "describe", "load", "sinusoid"]
