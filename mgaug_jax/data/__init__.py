"""Data sets, decoded once into a checked cache and put on the device whole.

    images = load("glyphs", "train")
    images = load("omniglot", "test", data_dir="/data/omniglot")

`on_disk` leaves them in the cache, for `mgaug_jax.data.streaming`.

A data set is a `Dataset` in `DATASETS`: `glyphs` is drawn, the others are read from the official
files in `data_dir`, which may be an archive, and `folder` is of your own images. Regression tasks
need no data: see `mgaug_jax.data.sinusoid`.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from mgaug_jax.checks import check_count
from mgaug_jax.data import cifar, cub, dclaw, files, glyphs, mini_imagenet, omniglot, sinusoid
from mgaug_jax.data.cache import Entry, cached
from mgaug_jax.data.record import SPLITS, Dataset, Decoded, Options, Progress
from mgaug_jax.data.streaming import Stored, on_device
from mgaug_jax.episodes import Images

DATASETS: dict[str, Dataset] = {
    "glyphs": glyphs.dataset(glyphs.Glyphs()),
    "omniglot": omniglot.dataset(),
    "omniglot_vinyals": omniglot.vinyals(),
    "omniglot_finn": omniglot.shuffled(1100, 100),
    "omniglot_mr": omniglot.shuffled(1200, 100),
    "mini_imagenet": mini_imagenet.dataset(),
    "cub": cub.dataset(),
    "cifar_fs": cifar.cifar_fs(),
    "fc100": cifar.fc100(),
    **{f"dclaw{permutation}": dclaw.dataset(permutation) for permutation in dclaw.OBJECTS},
    "folder": files.dataset(),
}
"""The known data sets by name; add your own."""


LARGEST = 2048
"""Height and width of the largest images."""


class Manifest(NamedTuple):
    """What a split holds.

    Attributes:
      name, split: As asked for.
      classes: C names.
      counts: C numbers of images.
      digest: SHA-256, in hex, of the class names, counts and pixels: the split's identity.
      skipped: Images that were left out since they could not be read.
    """

    name: str
    split: str
    classes: tuple[str, ...]
    counts: tuple[int, ...]
    digest: str
    skipped: tuple[str, ...] = ()


def _silent(text: str, done: int = 0, total: int = 0, /) -> None:
    del text, done, total


Splits = str | Path | Mapping[str, Sequence[str]]
"""Classes by split, `{"train": [...], "val": [...], "test": [...]}`, or a JSON file of them."""


def load(
    name: str,
    split: str,
    *,
    data_dir: str | Path | None = None,
    cache_dir: str | Path | None = None,
    splits: Splits | None = None,
    size: int | None = None,
    skip_bad_images: int = 0,
    progress: Progress = _silent,
) -> Images:
    """The images of a split, on the default device.

    Args:
      name: One of `DATASETS`.
      split: "train", "val" or "test"; no class is in two of them.
      data_dir: Folder of the official files, or an archive of it. None for `glyphs`, or to take
        what the cache has.
      cache_dir: Where decoded splits are kept; default `$MGAUG_JAX_CACHE`, else
        `$XDG_CACHE_HOME/mgaug_jax`, else `~/.cache/mgaug_jax`.
      splits: Classes by split, or a JSON file of them, in place of the official ones. Then the
        official number of images does not bind either.
      size: Height and width, in place of the data set's own (28, 32 or 84).
      skip_bad_images: So many images of the split may be unreadable; they are left out and listed.
      progress: Is told in one line what takes time, and how much of it is done.

    Raises:
      ValueError: Unknown name or split, an option that the data set has not, a source that does
        not hold the data set, or a cache that cannot be written.
    """
    return on_device(
        on_disk(
            name,
            split,
            data_dir=data_dir,
            cache_dir=cache_dir,
            splits=splits,
            size=size,
            skip_bad_images=skip_bad_images,
            progress=progress,
        )
    )


def opened(
    name: str,
    split: str,
    *,
    data_dir: str | Path | None = None,
    cache_dir: str | Path | None = None,
    splits: Splits | None = None,
    size: int | None = None,
    skip_bad_images: int = 0,
    like: str | None = None,
    progress: Progress = _silent,
) -> tuple[Stored, Manifest]:
    """The images of a split, mapped from the cache, which is built if need be, and what they are;
    see `load`.

    With `like` they are decoded and normalised as those of that data set (at `size`), so that what
    was trained on it can be tested on them.
    """
    options = _options(splits, size, skip_bad_images, like)
    entry, dataset = _entry(name, split, data_dir, cache_dir, options, progress)
    about = entry.manifest
    stored = Stored(
        np.load(entry.pixels, mmap_mode="r"),
        jnp.array(about["counts"], jnp.int32),
        jnp.array(dataset.mean, jnp.float32),
        jnp.array(dataset.std, jnp.float32),
    )
    return stored, Manifest(
        name,
        split,
        tuple(about["classes"]),
        tuple(about["counts"]),
        about["digest"],
        tuple(about["skipped"]),
    )


def on_disk(name: str, split: str, **options: Any) -> Stored:
    """The images of a split, for `mgaug_jax.data.streaming`; options as `opened`."""
    return opened(name, split, **options)[0]


def describe(name: str, split: str, **options: Any) -> Manifest:
    """Classes and identity of a split; options as `opened`."""
    return opened(name, split, **options)[1]


def _options(
    splits: Splits | None, size: int | None, skip_bad_images: int, like: str | None = None
) -> Options:
    if size is not None:
        check_count("size", size)
        if size > LARGEST:
            raise ValueError(f"size={size} was asked for; take {LARGEST} or less.")
    check_count("skip_bad_images", skip_bad_images, 0)
    splits = None if splits is None else files.read_splits(splits)
    if like is None:
        return Options(splits, size, skip_bad_images)
    other = _known(like)
    if size is not None and other.adapt is not None:
        other = other.adapt(Options(size=size))
    return Options(splits, None, skip_bad_images, other)


def _known(name: str) -> Dataset:
    if name not in DATASETS:
        raise ValueError(
            f"The data set {name!r} was asked for, but is not known; take one of "
            f"{', '.join(DATASETS)}."
        )
    return DATASETS[name]


def _entry(name, split, data_dir, cache_dir, options, progress) -> tuple[Entry, Dataset]:
    dataset = _known(name)
    if split not in SPLITS:
        raise ValueError(
            f"The split {split!r} was asked for, but is not known; take one of {', '.join(SPLITS)}."
        )
    if dataset.adapt is None and (like := options.like) is not None:
        look = lambda data: (data.parameters["size"], data.mean, data.std)
        if look(dataset) != look(like):
            raise ValueError(
                f"{name} was asked for as images of {like.parameters['size']} pixels and "
                f"{len(like.mean)} channels, but its own are of {dataset.parameters['size']} and "
                f"{len(dataset.mean)}, and it is not read from files; take another data set."
            )
        options = options._replace(like=None)
    if options != Options():
        if dataset.adapt is None:
            raise ValueError(
                f"{name} was asked for with other splits, another size or bad images to skip, but "
                "it has no such options; leave them out."
            )
        dataset = dataset.adapt(options)
    data_dir = None if data_dir is None else Path(data_dir)
    cache_dir = None if cache_dir is None else Path(cache_dir)
    return cached(dataset, name, split, data_dir, cache_dir, progress), dataset


__all__ = [
    "DATASETS",
    "SPLITS",
    "Dataset",
    "Decoded",
    "Manifest",
    "Options",
    "describe",
    "load",
    "on_disk",
    "opened",
    "sinusoid",
]
