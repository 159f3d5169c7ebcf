"""Decoded splits on disk: a folder with `pixels.npy` and `manifest.json` for each.

An entry appears by one rename, so it is whole or absent, and its array is checked against the
manifest's SHA-256 on every use; whatever is wrong with it, it is built again.
"""

import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mgaug_jax.data.record import Dataset, Decoded, Progress
from mgaug_jax.data.trees import sha256

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

FORMAT = 3
"""Version of the entries; raise it when they, or what the readers make of a source, change."""
BUILDING, ABANDONED = ".building-", 3600
"""What a folder that is being built begins with, and seconds after which it may be swept away."""


class Entry(NamedTuple):
    """A checked entry: the path of its array `uint8 [C, M, h, w, c]`, and its manifest."""

    pixels: Path
    manifest: dict[str, Any]


def default_folder() -> Path:
    """`$MGAUG_JAX_CACHE`, else `$XDG_CACHE_HOME/mgaug_jax`, else `~/.cache/mgaug_jax`."""
    if own := os.environ.get("MGAUG_JAX_CACHE"):
        return Path(own)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "mgaug_jax"


def cached(
    dataset: Dataset,
    name: str,
    split: str,
    data_dir: Path | None,
    cache_dir: Path | None,
    progress: Progress,
) -> Entry:
    """The entry of a split, built if it is missing, damaged or of another format.

    Raises:
      ValueError: The data set cannot be read from `data_dir`, or, without one, the cache does not
        have it, or it cannot be written. Nothing half-built is left then.
    """
    folder = cache_dir or default_folder()
    stem = f"{name}-{split}-{_key(dataset.parameters)}-"
    if data_dir is None and dataset.tree:
        read = [_read(place) for place in folder.glob(f"{stem}*")]
        found = [entry for entry, _ in read if entry]
        contents = {entry.manifest["digest"] for entry in found}
        if len(contents) != 1:
            useless = "".join(f" ({wrong})" for entry, wrong in read if not entry)
            raise ValueError(
                f"{name} was asked for without a data folder, but the cache {folder} has "
                f"{len(contents)} different copies of its {split} split{useless}; give a data_dir "
                f"that looks like this:\n{dataset.tree}"
            )
        return found[0]
    source = dataset.fingerprint(split, data_dir)
    place = folder / (stem + _key(source))
    entry, wrong = _read(place)
    if entry is not None:
        return entry
    progress(f"{name}: building the cache of {split} in {folder} ({wrong})")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _sweep(folder)
        with _building(folder) as temporary:
            scratch, new = temporary / "scratch", temporary / "new"
            scratch.mkdir()
            decoded = dataset.build(split, data_dir, scratch, progress)
            _write(new, decoded, {"name": name, "split": split, "source": source})
            _publish(new, place, temporary / "old")
        entry, wrong = _read(place)
        if entry is None:
            raise OSError(wrong)
    except OSError as error:  # of the source nothing but ValueError comes
        raise ValueError(
            f"{name} was asked for, but its {split} split cannot be kept in the cache {folder} "
            f"({error}); make room there, or name another folder by cache_dir or $MGAUG_JAX_CACHE."
        ) from error
    return entry


def _key(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:12]


@contextmanager
def _building(folder: Path) -> Iterator[Path]:
    """A folder to build in, locked, beside its final place, for a rename cannot cross file systems;
    it is gone in the end.
    """
    with tempfile.TemporaryDirectory(prefix=BUILDING, dir=folder) as name:
        with (Path(name) / "lock").open("w") as lock:
            with suppress(OSError):  # where nothing can be locked nothing is swept away either
                _lock(lock)
            yield Path(name)


def _lock(file) -> None:
    if fcntl is None:
        raise OSError("there are no locks")
    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _sweep(folder: Path) -> None:
    """Removes what killed builders have left: nobody has it locked, and it is old enough not to be
    a builder's that is about to lock it.
    """
    for left in folder.glob(f"{BUILDING}*"):
        with suppress(OSError):
            if time.time() - left.stat().st_mtime < ABANDONED:
                continue
            with (left / "lock").open("a") as lock:
                _lock(lock)
                shutil.rmtree(left)


def _read(place: Path) -> tuple[Entry | None, str]:
    """The entry if it can be used; else why not."""
    try:
        if not place.exists():
            return None, "not there yet"
        manifest = json.loads((place / "manifest.json").read_bytes())
        if manifest["format"] != FORMAT:
            return None, f"the old one has format {manifest['format']}, not {FORMAT}"
        if sha256(place / "pixels.npy") != manifest["sha256"]:
            return None, "the old one is damaged: pixels.npy does not match its SHA-256"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return None, f"the old one is damaged: {error!r}"
    return Entry(place / "pixels.npy", manifest), ""


def _write(place: Path, decoded: Decoded, about: dict[str, Any]) -> None:
    place.mkdir()
    pixels = np.ascontiguousarray(decoded.pixels)
    np.save(place / "pixels.npy", pixels)
    content = {"classes": list(decoded.classes), "counts": decoded.counts.tolist()}
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode())
    digest.update(repr(pixels.shape).encode())
    digest.update(pixels.data)
    manifest = {
        "format": FORMAT,
        **about,
        **content,
        "skipped": list(decoded.skipped),
        "shape": pixels.shape,
        "digest": digest.hexdigest(),
        "sha256": sha256(place / "pixels.npy"),
    }
    (place / "manifest.json").write_text(json.dumps(manifest, indent=1))


def _publish(new: Path, place: Path, old: Path) -> None:
    """Moves the entry into its place. One that another process built meanwhile stays: someone may
    be about to read it. What else was there goes to `old`.
    """
    if _read(place)[0] is not None:
        return
    with suppress(FileNotFoundError):
        place.rename(old)
    try:
        new.rename(place)
    except OSError:
        if not place.exists():
            raise
        # Built by another process between these lines; it is checked like any other.
