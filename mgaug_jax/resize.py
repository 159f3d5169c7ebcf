"""Bilinear resizing with aligned corners, as the released code resizes its sub-networks' images."""

import jax.numpy as jnp
import numpy as np

from mgaug_jax.types import Array, Task


def resize(x: Array, size: int) -> Array:
    """`[n, h, w, c] -> [n, size, size, c]`, corners mapped onto corners, no antialiasing.

    Output i reads source `i (h - 1) / (size - 1)` by linear interpolation. `jax.image.resize` uses
    half-pixel centres and is a different map.

    >>> resize(jnp.array([0.0, 1.0]).reshape(1, 1, 2, 1), 3)[0, 0, :, 0].tolist()
    [0.0, 0.5, 1.0]

    Raises:
      ValueError: `x` is no batch of images.
    """
    if x.ndim != 4:
        raise ValueError(
            f"Examples of shape {x.shape[1:]} were to be resized, but only images [h, w, c] can "
            "be; leave sizes out."
        )
    if x.shape[1:3] == (size, size):
        return x
    rows, columns = (jnp.asarray(_weights(n, size), x.dtype) for n in x.shape[1:3])
    return jnp.einsum("ih,nhwc,jw->nijc", rows, x, columns)


def resize_task(task: Task, size: int | None) -> Task:
    """Support and query images at `size` pixels; None leaves them as they are."""
    if size is None:
        return task
    return Task(*(part._replace(x=resize(part.x, size)) for part in task))


def _weights(source: int, size: int) -> np.ndarray:
    """Interpolation matrix `[size, source]`."""
    position = np.arange(size) * ((source - 1) / max(size - 1, 1))
    distance = np.abs(position[:, None] - np.arange(source))
    return np.maximum(1 - distance, 0)
