"""Data sets that are image files in class folders, in a folder or in a zip of the same name.

Zips are read in memory, file by file: nothing is ever extracted.
"""

import hashlib
import json
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np

from mgaug_jax.data.ingest import Example, ingest
from mgaug_jax.data.record import Dataset, Decoded, Progress

SUFFIXES = (".png", ".jpg", ".jpeg")


class Files(NamedTuple):
    """Description of a data set on disk.

    Attributes:
      name: Of the data set.
      tree: What the data folder looks like, for messages.
      expected: For every root (a folder, or a zip that holds such a folder) the number of images
        of each of its classes.
      splits: For every split its root and its classes.
      decode: `file content -> uint8 [h, w, c]`, the same shape for all.
      parameters: JSON; what `decode` depends on.
      label: `path below the root -> class`.
      mean, std: `[c]`, of pixels scaled to [0, 1].
    """

    name: str
    tree: str
    expected: Mapping[str, Mapping[str, int]]
    splits: Mapping[str, tuple[str, tuple[str, ...]]]
    decode: Callable[[bytes], np.ndarray]
    parameters: dict[str, Any]
    label: Callable[[str], str] = lambda path: str(PurePosixPath(path).parent)
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)


def from_files(files: Files) -> Dataset:
    """The data set of a description; every use checks the data folder against it."""

    def fingerprint(split: str, data_dir: Path | None) -> dict[str, Any]:
        root, _ = files.splits[split]
        with _open(files, root, data_dir) as (stamps, _):
            _check(files, root, data_dir, stamps)
        digest = hashlib.sha256(json.dumps(sorted(stamps.items())).encode()).hexdigest()
        return {"root": root, "files": len(stamps), "sha256": digest}

    def build(split: str, data_dir: Path | None, scratch: Path, progress: Progress) -> Decoded:
        root, classes = files.splits[split]
        expected = {name: files.expected[root][name] for name in classes}
        with _open(files, root, data_dir) as (stamps, read):
            examples = (
                Example(path, files.label(path), read(path))
                for path in sorted(stamps)
                if files.label(path) in expected
            )
            return ingest(files.name, examples, expected, files.decode, scratch, progress)

    parameters = {**files.parameters, "splits": files.splits, "expected": files.expected}
    return Dataset(parameters, fingerprint, build, files.tree, files.mean, files.std)


def _wrong(files: Files, data_dir: Path | None, why: str) -> ValueError:
    return ValueError(
        f"{files.name} was asked for from {data_dir}, but {why}; give a data_dir that looks like "
        f"this:\n{files.tree}"
    )


def _is_image(path: str) -> bool:
    """Leaves out what operating systems strew about (`.DS_Store`, `__MACOSX/._x.png`)."""
    hidden = any(part.startswith((".", "__")) for part in PurePosixPath(path).parts)
    return path.lower().endswith(SUFFIXES) and not hidden


@contextmanager
def _open(
    files: Files, root: str, data_dir: Path | None
) -> Iterator[tuple[dict[str, tuple[int, int]], Callable[[str], bytes]]]:
    """`stamps, read` of the images below a root: for each path its size and a mark that changes
    with its content (CRC in a zip, else time of change), and a function from path to bytes.
    """
    if data_dir is None or not data_dir.is_dir():
        raise _wrong(files, data_dir, "there is no such folder")
    folder, archive = data_dir / root, data_dir / f"{root}.zip"
    if folder.is_dir():
        found = ((path.relative_to(folder).as_posix(), path) for path in folder.rglob("*.*"))
        stats = {name: path.stat() for name, path in found if _is_image(name)}
        stamps = {name: (stat.st_size, stat.st_mtime_ns) for name, stat in stats.items()}
        yield stamps, lambda path: (folder / path).read_bytes()
    elif archive.is_file():
        prefix = f"{root}/"
        try:
            with zipfile.ZipFile(archive) as file:
                stamps = {
                    info.filename.removeprefix(prefix): (info.file_size, info.CRC)
                    for info in file.infolist()
                    if info.filename.startswith(prefix) and _is_image(info.filename)
                }
                yield stamps, lambda path: file.read(prefix + path)
        except (zipfile.BadZipFile, EOFError) as error:
            raise _wrong(files, data_dir, f"{archive.name} is damaged ({error})") from error
    else:
        raise _wrong(files, data_dir, f"it has neither {root}/ nor {archive.name}")


def _check(files: Files, root: str, data_dir: Path | None, stamps: dict) -> None:
    """Refuses a root that has not exactly the classes and images it should have."""
    expected = files.expected[root]
    for path in sorted(stamps):
        if files.label(path) not in expected:
            raise _wrong(files, data_dir, f"{root}/{path} does not belong there")
    found = Counter(map(files.label, stamps))
    for name in sorted(expected):
        if found[name] != expected[name]:
            why = f"{root}/{name} has {found[name]} images instead of {expected[name]}"
            raise _wrong(files, data_dir, why)
