"""Checkpoints: Orbax writes and reads the bytes, a digest of ours says whether they are the same.

`<step>/state` is Orbax's. Beside it `about.json` says what it is: shapes and types, the digests of
the arrays and of every file, the format and whatever identity the caller gives. It is written last,
in `<step>.new`, which then takes its place. Nothing that is read is executed: arrays and JSON
alone.
"""

import hashlib
import json
import shutil
import warnings
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from mgaug_jax.checks import check_count
from mgaug_jax.data.trees import sha256

FORMAT = 3
"""Of the checkpoints written."""
ABOUT = "about.json"
NEW, OLD = ".new", ".old"
"""What is being written, and what it takes the place of."""


class CheckpointError(ValueError):
    """No checkpoint can be read; the text says which and why."""


class OtherError(CheckpointError):
    """A checkpoint is sound but not of the kind that was asked for."""


class SaveError(OSError):
    """A checkpoint cannot be written; the text says which and why. Those before it are whole."""


class Restored(NamedTuple):
    """A checkpoint: its step, its tree, and the identity that it was saved with."""

    step: int
    tree: Any
    identity: dict[str, Any]


def save(
    folder: str | Path,
    step: int,
    tree: Any,
    *,
    identity: Mapping[str, Any] | None = None,
    keep: int = 2,
) -> None:
    """Writes `tree` (a pytree of arrays) as `folder/<step>`, and waits until it is there.

    Of the steps up to this one the newest `keep` stay; later ones, of a run that was resumed before
    them, go, and so does what a kill left half written. A checkpoint of this very step stays until
    the new one is whole.

    Args:
      folder: Where to.
      step: Its name.
      tree: What to save.
      identity: JSON; what the tree is a state of.
      keep: How many steps stay.

    Raises:
      SaveError: It cannot be written: the disk is full, say, or the folder read-only.
      ValueError: `keep` is not a positive integer.
    """
    import orbax.checkpoint as ocp

    check_count("keep", keep)
    folder = Path(folder).absolute()
    new = folder / f"{step}{NEW}"
    leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(tree)]
    about = {"format": FORMAT, "leaves": _kinds(leaves), "identity": dict(identity or {})}
    about["digest"] = _digest(leaves, about)
    try:
        clean(folder)
        new.mkdir(parents=True)
        with _checkpointer() as checkpointer:
            arrays = dict(zip(_names(leaves), leaves, strict=True))
            checkpointer.save(new / "state", args=ocp.args.StandardSave(arrays))
        files = sorted(path for path in new.rglob("*") if path.is_file())
        about["files"] = {path.relative_to(new).as_posix(): sha256(path) for path in files}
        about["own_digest"] = _digest([], about)
        (new / f"{ABOUT}.tmp").write_text(json.dumps(about))
        (new / f"{ABOUT}.tmp").replace(new / ABOUT)
        _put(new)
    except Exception as error:  # Orbax raises whatever its storage raises
        with suppress(OSError):
            clean(folder)
        size = sum(leaf.nbytes for leaf in leaves)
        raise SaveError(
            f"{folder / str(step)} ({size:,} bytes) cannot be written: {_brief(error)}"
        ) from error
    earlier = [old for old in steps(folder) if old <= step]
    for old in set(steps(folder)) - set(earlier[-keep:]):
        shutil.rmtree(folder / str(old), ignore_errors=True)


def _put(new: Path) -> None:
    """Gives a whole `<step>.new` its place. A kill in between leaves it to `clean`."""
    place, old = new.with_suffix(""), new.with_suffix(OLD)
    if place.exists():
        place.rename(old)
    new.rename(place)
    shutil.rmtree(old, ignore_errors=True)


def clean(folder: str | Path) -> None:
    """Ends what a kill interrupted: what was whole takes its place, what was not goes. No other
    process may be writing.
    """
    for old in Path(folder).glob(f"*{OLD}"):
        shutil.rmtree(old)
    for new in Path(folder).glob(f"*{NEW}"):
        if (new / ABOUT).exists():
            _put(new)
        else:
            shutil.rmtree(new)


def steps(folder: str | Path) -> list[int]:
    """Steps saved in `folder`, oldest first; unfinished and damaged ones are not among them."""
    folder = Path(folder)
    if not folder.is_dir():
        return []
    return sorted(int(path.name) for path in folder.iterdir() if path.name.isdigit())


def restore(folder: str | Path, like: Any, *, quarantine: bool = False) -> Restored:
    """The newest step of `folder` that is whole.

    Args:
      folder: Where `save` wrote.
      like: A pytree of the same structure: arrays, or `jax.eval_shape` of what made them.
      quarantine: Rename what is damaged to `<step>.corrupt`, so that it is not met again.

    Returns:
      What was saved. A step that cannot be read is passed over with a warning that says why.

    Raises:
      CheckpointError: No step can be read, or the newest that can is of another format or holds
        other arrays.
    """
    reasons = []
    for step in reversed(steps(folder)):
        path = Path(folder).absolute() / str(step)
        try:
            tree, identity = _read(path, like)
            return Restored(step, tree, identity)
        except OtherError as error:
            raise CheckpointError(f"{path}: {error}") from error
        except Exception as error:  # Orbax raises whatever its storage raises
            reasons.append(f"{path}: {_brief(error)}")
            if quarantine and _is_damage(error):
                reasons[-1] += f"; it is now {_quarantine(path).name}"
            warnings.warn(
                f"Passing over a checkpoint that cannot be read: {reasons[-1]}", stacklevel=2
            )
    if aside := sorted(path.name for path in Path(folder).glob("*.corrupt*")):
        reasons.append(f"put aside as damaged: {', '.join(aside)}")
    raise CheckpointError("; ".join(reasons) or f"{folder} holds none; nothing was saved there yet")


def _checkpointer():
    """Of this process alone: what is saved is the same on all, so that the others need not wait."""
    import orbax.checkpoint as ocp

    this = jax.process_index()
    alone = ocp.options.MultiprocessingOptions(this, {this}, f"process{this}")
    handler = ocp.StandardCheckpointHandler(multiprocessing_options=alone)
    return ocp.Checkpointer(handler, multiprocessing_options=alone)


def _is_damage(error: Exception) -> bool:
    """Whether it is the checkpoint that is at fault, not the machine that reads it."""
    machine = isinstance(error, MemoryError | OSError) and not isinstance(error, FileNotFoundError)
    return not machine


def _quarantine(path: Path) -> Path:
    number, place = 1, path.with_name(f"{path.name}.corrupt")
    while place.exists():
        number += 1
        place = path.with_name(f"{path.name}.corrupt{number}")
    return path.rename(place)


def _read(path: Path, like: Any) -> tuple[Any, dict[str, Any]]:
    import orbax.checkpoint as ocp

    shapes, tree = jax.tree.flatten(like)
    about = _about(path)
    for name, digest in about.pop("files").items():
        if not (path / name).exists():
            raise CheckpointError(f"{name} is missing")
        if sha256(path / name) != digest:
            raise CheckpointError(f"{name} is not what was saved (the digest differs)")
    if about["leaves"] != _kinds(shapes):
        raise OtherError(
            f"it holds other arrays than this run has: {_difference(about['leaves'], shapes)}"
        )
    template = {
        name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
        for name, leaf in zip(_names(shapes), shapes, strict=True)
    }
    with _checkpointer() as checkpointer:
        found = checkpointer.restore(path / "state", args=ocp.args.StandardRestore(template))
    leaves = [found[name] for name in _names(shapes)]
    digest = about.pop("digest")
    if _digest([np.asarray(leaf) for leaf in leaves], about) != digest:
        raise CheckpointError("its arrays are not what was saved (the digest differs)")
    return tree.unflatten(leaves), about["identity"]


def _about(path: Path) -> dict[str, Any]:
    """The description of a checkpoint.

    Raises:
      OtherError: It is of another format.
      CheckpointError: It is missing or damaged.
    """
    if (path / "about").is_dir():
        raise OtherError(
            "it has format 2, which only development versions before 2026-11-26 wrote and read"
        )
    if not (path / ABOUT).exists():
        raise CheckpointError(f"{ABOUT} is missing")
    try:
        about = json.loads((path / ABOUT).read_bytes())
        sound = about.pop("own_digest") == _digest([], about)
    except (ValueError, KeyError, TypeError, AttributeError):  # not JSON, or something else in it
        sound = False
    if not sound:
        raise CheckpointError(f"{ABOUT} is not what was saved (the digest differs)")
    if about["format"] != FORMAT:
        raise OtherError(
            f"it has format {about['format']}, and this version of mgaug_jax reads {FORMAT}; "
            "use the version that wrote it"
        )
    return about


def _difference(saved: list, shapes: list) -> str:
    if len(saved) != len(shapes):
        return f"{len(saved)} of them instead of {len(shapes)}"
    first = next(i for i, (a, b) in enumerate(zip(saved, _kinds(shapes), strict=True)) if a != b)
    return f"number {first} is {saved[first]} instead of {_kinds(shapes)[first]}"


def _kinds(leaves: list) -> list[str]:
    return [f"{leaf.dtype}{list(leaf.shape)}" for leaf in leaves]


def _names(leaves: list) -> list[str]:
    return [f"{i:05d}" for i in range(len(leaves))]


def _brief(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


def _digest(leaves: list[np.ndarray], about: Mapping[str, Any]) -> str:
    """SHA-256 over the description and the bytes, in hex."""
    digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode())
    for leaf in leaves:
        digest.update(np.ascontiguousarray(leaf).tobytes())
    return digest.hexdigest()
