"""Data sets that are read from files: what they have in common, and the folder of one's own."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from importlib import resources
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np

from mgaug_jax.data import pixels, prepared, trees
from mgaug_jax.data.ingest import Example, Unreadable, ingest
from mgaug_jax.data.record import SPLITS, Dataset, Decoded, Options, Progress
from mgaug_jax.data.trees import Tree

NO_IMAGES = (".txt", ".csv", ".json", ".xml", ".md", ".pdf", ".db", ".ini")
"""Suffixes of what may lie beside images; any other file in a class folder must be one."""
IMAGES = (".png", ".jpg", ".jpeg", ".jpe", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".heic")
"""Suffixes of what must not lie outside of class folders. Only PNG and JPEG can be read."""


class Found(NamedTuple):
    """Images of a source: class -> keys, and `key -> content of an image file`."""

    images: Mapping[str, Sequence[str]]
    read: Callable[[str], bytes]


class Files(NamedTuple):
    """Description of a data set on disk.

    Attributes:
      name: Of the data set.
      tree: What the data folder looks like, for messages.
      find: `(self, tree, split) -> Found`; refuses files that do not belong there.
      splits: Split -> classes; None if the folders say.
      roots: Split -> folders, or archives that hold such a folder, to be looked at.
      count: Images of every class; None if the data set says itself.
      size: Height and width of the images.
      decode: `(file content, size) -> uint8 [size, size, c]`.
      parameters: JSON; what `decode` depends on.
      mean, std: `[c]`, of pixels scaled to [0, 1].
      keep: Says of the first name below a root whether it matters.
      official: Whether these are the official splits: then every class must be there, with all its
        images, and no other.
      skip: So many images of a split may be unreadable.
      tfds: The same as a data set of TFDS, which `data_dir` may hold instead.
      source: Whose it is and where it can be had.
    """

    name: str
    tree: str
    find: Callable[["Files", Tree, str], Found]
    splits: Mapping[str, tuple[str, ...]] | None
    roots: Mapping[str, tuple[str, ...]]
    count: int | None
    size: int
    decode: Callable[[bytes, int], np.ndarray] = pixels.decode
    parameters: Mapping[str, Any] = {"resize": "LANCZOS"}
    mean: tuple[float, ...] = pixels.IMAGENET_MEAN
    std: tuple[float, ...] = pixels.IMAGENET_STD
    keep: Callable[[str], bool] = lambda name: True
    official: bool = True
    skip: int = 0
    tfds: prepared.Prepared | None = None
    source: str = ""


def from_files(files: Files) -> Dataset:
    """The data set of a description; a build checks the source against it."""

    def fingerprint(split: str, data_dir: Path | None) -> dict[str, Any]:
        with _refusals(files, split, data_dir) as (at, places):
            return {root: trees.fingerprint(place, root, at.keep) for root, place in places.items()}

    def build(split: str, data_dir: Path | None, scratch: Path, progress: Progress) -> Decoded:
        with (
            _refusals(files, split, data_dir) as (at, places),
            trees.opened(places, at.keep) as tree,
        ):
            found = at.find(at, tree, split)
            chosen = _chosen(files, found.images, split)
            order = {path: i for i, path in enumerate(tree.marks)}  # a tar is slow in any other
            pairs = [(key, name) for name, keys in chosen.items() for key in keys]
            pairs.sort(key=lambda pair: order.get(pair[0], 0))
            examples = (Example(key, name, found.read(key)) for key, name in pairs)
            decode = lambda data: files.decode(data, files.size)
            return ingest(files.name, examples, chosen, decode, scratch, progress, files.skip)

    def adapt(options: Options) -> Dataset:
        other = files._replace(size=options.size or files.size, skip=options.skip_bad_images)
        if options.splits is not None:  # which may take classes from anywhere
            anywhere = dict.fromkeys(SPLITS, roots)
            other = other._replace(splits=options.splits, official=False, roots=anywhere)
        if (like := options.like) is not None:
            assert like.decode is not None  # of every data set that is read from files, or drawn
            decode = like.decode
            other = other._replace(
                size=like.parameters["size"],
                decode=lambda data, size: decode(data),
                parameters={"like": like.parameters},
                mean=like.mean,
                std=like.std,
            )
        return from_files(other)

    roots = tuple(dict.fromkeys(root for part in files.roots.values() for root in part))
    said = ("splits", "count", "size", "official", "skip")
    parameters = {**files.parameters, **{name: getattr(files, name) for name in said}}
    return Dataset(
        parameters,
        fingerprint,
        build,
        files.tree,
        files.mean,
        files.std,
        adapt,
        decode=lambda data: files.decode(data, files.size),
        source=files.source,
        roots=roots,
    )


@contextmanager
def _refusals(
    files: Files, split: str, data_dir: Path | None
) -> Iterator[tuple[Files, dict[str, Path]]]:
    """The description for what lies there, and root -> place; what is wrong with them becomes a
    refusal that shows the expected tree, and the SHA-256 of archives.
    """
    places = {}
    try:
        if data_dir is None or not data_dir.exists():
            raise ValueError("there is no such folder")
        files = _as_prepared(files, data_dir)
        for root in files.roots[split]:
            if (place := trees.locate(data_dir, root)) is None:
                kinds = ", ".join(f"{root}{suffix}" for suffix in trees.ARCHIVES)
                raise ValueError(
                    f"it has neither {root}/ nor {kinds}"
                    if data_dir.is_dir()
                    else f"it is neither a folder nor an archive (known are {kinds})"
                )
            places[root] = place
        yield files, places
    except Unreadable:
        raise
    except ValueError as error:
        why = str(error)
        for place in places.values():
            if place.is_file():
                why += f" ({place.name} has the SHA-256 {trees.sha256(place)})"
        raise ValueError(
            f"{files.name} was asked for from {data_dir}, but {why}; give a data_dir that looks "
            f"like this:\n{files.tree}"
        ) from error


def _as_prepared(files: Files, data_dir: Path) -> Files:
    """The description for TFDS's form of the data set, if that lies there."""
    if (by_tfds := files.tfds) is None or not data_dir.is_dir():
        return files
    if (root := prepared.locate(by_tfds, data_dir)) is None:
        return files

    def find(files: Files, tree: Tree, split: str) -> Found:
        return Found(*prepared.read(by_tfds, data_dir / root, files.official))

    return files._replace(find=find, roots=dict.fromkeys(SPLITS, (root,)), keep=lambda name: True)


def _chosen(
    files: Files, images: Mapping[str, Sequence[str]], split: str
) -> dict[str, Sequence[str]]:
    """The classes of a split with their images; refuses a source that has others."""
    if files.splits is None:
        names = tuple(images)
    elif split in files.splits:
        names = files.splits[split]
    else:
        raise ValueError(f"the splits that were given have no {split}")
    if files.official and files.splits is not None:
        for name in sorted(
            images.keys() - {name for each in files.splits.values() for name in each}
        ):
            raise ValueError(f"{(*images[name], name)[0]} does not belong there")
    missing = [name for name in names if not images.get(name)]
    if missing:
        raise ValueError(
            f"{len(missing)} of the {len(names)} {split} classes have no images: "
            f"{', '.join(missing[:3])}{' ...' * (len(missing) > 3)} (splits can name fewer classes)"
        )
    if not names:
        raise ValueError(f"there is no class of images for {split}")
    if files.official and files.count is not None:
        for name in names:
            if len(images[name]) != files.count:
                raise ValueError(f"{name} has {len(images[name])} images instead of {files.count}")
    return {name: images[name] for name in names}


def class_folders(tree: Tree, prefix: str = "", depth: int = 1) -> dict[str, list[str]]:
    """Images by class: a class is a folder so many levels below a prefix, its name the path below
    the prefix. What a class folder holds is taken for an image, unless its name says otherwise.

    Raises:
      ValueError: An image lies in no class, or deeper than its class.
    """
    found: dict[str, list[str]] = {}
    start = f"{prefix}/" if prefix else ""
    for path in (*sorted(tree.folders), *tree.marks):
        if not path.startswith(start):
            continue
        parts = path.removeprefix(start).split("/")
        if path in tree.folders:
            if len(parts) == depth:
                found[path.removeprefix(start)] = []
        elif may_be_image(path) if len(parts) > depth else path.lower().endswith(IMAGES):
            if len(parts) != depth + 1:
                raise ValueError(
                    f"{path} does not belong there: images lie in class folders {depth} "
                    f"{'level' if depth == 1 else 'levels'} below {prefix or 'the data folder'}, "
                    "and nowhere else"
                )
            found["/".join(parts[:-1])].append(path)
    return found


def may_be_image(path: str) -> bool:
    """Whether the name of a file in a folder of images does not say that it is none."""
    return not path.lower().endswith(NO_IMAGES)


def disjoint(splits: Mapping[str, Sequence[str]]) -> None:
    """Refuses splits that share a class.

    Raises:
      ValueError: They do.
    """
    seen: dict[str, str] = {}
    for split, names in splits.items():
        for name in names:
            if name in seen:
                raise ValueError(f"the class {name} is in {seen[name]} and in {split}")
            seen[name] = split


def read_splits(source: str | Path | Mapping[str, Sequence[str]]) -> dict[str, tuple[str, ...]]:
    """Split -> classes, from a mapping or from a JSON file that holds one.

    Raises:
      ValueError: It is not `{"train": [class, ...], "val": [...], "test": [...]}` (one or two may
        be absent), a list is empty, or a class is named twice.
    """
    what = "splits" if isinstance(source, Mapping) else f"splits={source}"
    try:
        content = source
        if not isinstance(source, Mapping):
            content = json.loads(Path(source).read_text("utf-8"))
        if not isinstance(content, Mapping) or not content or content.keys() - set(SPLITS):
            raise ValueError("it has other parts than train, val and test")
        for split, names in content.items():
            if isinstance(names, str) or not all(isinstance(name, str) for name in names):
                raise ValueError(f"{split} is not a list of names")
            if not names:
                raise ValueError(f"{split} is empty")
        disjoint(content)
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(
            f"{what} was asked for, but {error}; give a JSON file such as "
            '{"train": ["cat", "dog"], "val": ["cow"], "test": ["hen"]}.'
        ) from error
    return {split: tuple(names) for split, names in content.items()}


def shipped(name: str) -> dict[str, Any]:
    """A list that comes with this package; its "source" says from where."""
    place = resources.files("mgaug_jax.data") / "lists" / f"{name}.json"
    return json.loads(place.read_text("utf-8"))


# --- own images -----------------------------------------------------------------------------

TREE = """\
data_dir/              (or a zip or tar of it)
  train/
    cat/
      any_name.jpg ... (PNG or JPEG)
    ...                any number of classes
  val/
    ...                other classes
  test/
    ...                yet other classes
or, with splits=FILE, a JSON file {"train": ["cat", ...], "val": [...], "test": [...]},
data_dir/
  cat/
    any_name.jpg ...
  ..."""


def _find(files: Files, tree: Tree, split: str) -> Found:
    if files.splits is not None:
        return Found(class_folders(tree), tree.read)
    tops = {PurePosixPath(path).parts[0] for path in tree.folders}
    if split not in tops:
        raise ValueError(f"there is no folder {split}")
    found = {name: class_folders(tree, name) for name in SPLITS if name in tops}
    disjoint({name: list(images) for name, images in found.items()})
    return Found(found[split], tree.read)


def dataset(size: int = 84) -> Dataset:
    """Your own images: classes are folders, in a folder for each split or named by a file."""
    return from_files(
        Files(
            name="folder",
            tree=TREE,
            find=_find,
            splits=None,
            roots=dict.fromkeys(SPLITS, ("",)),
            count=None,
            size=size,
            decode=partial(pixels.decode, upright=True),
            parameters={"resize": "LANCZOS", "upright": True},
            source="your own images",
        )
    )
