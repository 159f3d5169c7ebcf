"""Checkpoints: Orbax writes and reads the bytes, a digest of ours says whether they are the same.

Orbax makes a checkpoint appear whole or not at all, but does not notice a byte that has changed.
"""

import hashlib
import shutil
import warnings
from pathlib import Path
from typing import Any

import jax
import numpy as np


class CheckpointError(ValueError):
    """No checkpoint can be read; the text says which and why."""


def save(folder: str | Path, step: int, tree: Any, keep: int = 2) -> None:
    """Writes `tree` (a pytree of arrays) as `folder/<step>`.

    Of the steps up to this one the newest `keep` stay; later ones, of a run that was resumed before
    them, go.
    """
    import orbax.checkpoint as ocp

    path = Path(folder).absolute() / str(step)
    if path.exists():
        shutil.rmtree(path)  # left by a run that saved this step and was resumed before it
    leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(tree)]
    payload = {"leaves": dict(zip(_names(leaves), leaves, strict=True)), "digest": _digest(leaves)}
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path, payload)
    earlier = [old for old in steps(folder) if old <= step]
    for old in set(steps(folder)) - set(earlier[-keep:]):
        shutil.rmtree(Path(folder) / str(old))


def steps(folder: str | Path) -> list[int]:
    """Steps saved in `folder`, oldest first; unfinished ones are not among them."""
    folder = Path(folder)
    if not folder.is_dir():
        return []
    return sorted(int(path.name) for path in folder.iterdir() if path.name.isdigit())


def restore(folder: str | Path, like: Any) -> tuple[int, Any]:
    """The newest step of `folder` that is whole, and its tree.

    Args:
      folder: Where `save` wrote.
      like: A pytree of the same structure: arrays, or `jax.eval_shape` of what made them.

    Returns:
      The step and the tree. A step that cannot be read is passed over with a warning that says why.

    Raises:
      CheckpointError: No step can be read.
    """
    reasons = []
    for step in reversed(steps(folder)):
        path = Path(folder).absolute() / str(step)
        try:
            return step, _read(path, like)
        except Exception as error:  # Orbax raises whatever its storage raises
            reasons.append(f"{path}: {' '.join(str(error).split())[:200]}")
            warnings.warn(
                f"Passing over a checkpoint that cannot be read: {reasons[-1]}", stacklevel=2
            )
    raise CheckpointError(
        "; ".join(reasons) or f"{folder} holds no checkpoint; nothing was saved there yet."
    )


def _read(path: Path, like: Any) -> Any:
    import orbax.checkpoint as ocp

    shapes, tree = jax.tree.flatten(like)
    template = {
        "leaves": {
            name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
            for name, leaf in zip(_names(shapes), shapes, strict=True)
        },
        "digest": jax.ShapeDtypeStruct((32,), np.uint8),
    }
    with ocp.StandardCheckpointer() as checkpointer:
        payload = checkpointer.restore(path, template)
    leaves = [payload["leaves"][name] for name in _names(shapes)]
    if not np.array_equal(_digest([np.asarray(leaf) for leaf in leaves]), payload["digest"]):
        raise CheckpointError("its contents are not what was saved (the digest differs)")
    return tree.unflatten(leaves)


def _names(leaves: list) -> list[str]:
    return [f"{i:05d}" for i in range(len(leaves))]


def _digest(leaves: list[np.ndarray]) -> np.ndarray:
    """SHA-256 over shapes, types and bytes, as `uint8 [32]`."""
    digest = hashlib.sha256()
    for leaf in leaves:
        digest.update(f"{leaf.shape}{leaf.dtype}".encode())
        digest.update(np.ascontiguousarray(leaf).tobytes())
    return np.frombuffer(digest.digest(), np.uint8)
