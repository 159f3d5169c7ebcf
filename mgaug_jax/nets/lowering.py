"""How a convolution and a pooling are computed: the one place that knows.

XLA lowers a convolution that is vmapped over its kernels to a grouped convolution, and the
gradient of `reduce_window` to select-and-scatter; both are slow on CPU and on GPU. Here a
convolution is a product of image patches with the kernel matrix, and a 2x2 max pool a maximum of
four strided slices: plain products and slices under `vmap`, `scan` and any number of
reverse-mode derivatives. Forward-mode (`jax.jvp`, `jax.jacfwd`) is refused by `jax.custom_vjp`.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from mgaug_jax.types import Array, Net


def conv(x: Array, kernel: Array, stride: int = 1, padding: int = 1) -> Array:
    """Cross-correlation, as `lax.conv_general_dilated` in NHWC x HWIO.

    Args:
      x: Images `[n, h, w, in]`.
      kernel: `[kh, kw, in, out]`.
      stride: Step in both directions.
      padding: Zeros added on every side.

    Returns:
      `[n, h', w', out]` with `h' = (h + 2 padding - kh) // stride + 1`.
    """
    kh, kw = kernel.shape[:2]
    if stride == 1 and kh == kw == 2 * padding + 1:
        return _same(x, kernel)
    return _strided(x, kernel, stride, padding)


def max_pool(x: Array) -> Array:
    """Largest of every 2x2 window, stride 2; an odd last row or column is dropped.

    The first of equal entries (in reading order) gets the whole gradient, as in PyTorch.

    Raises:
      ValueError: The map has fewer than 2 rows or columns.
    """
    if min(x.shape[1:3]) < 2:
        raise ValueError(
            f"A map of {x.shape[1]}x{x.shape[2]} cannot be halved; the images are too small for "
            "this network. Use larger ones."
        )
    x = x[:, : x.shape[1] // 2 * 2, : x.shape[2] // 2 * 2]
    return functools.reduce(_larger, _taps(x, 2, 2, 2))


def max_pool_3x3(x: Array) -> Array:
    """Largest of every 3x3 window, stride 2, padding 1 (the stem of a ResNet)."""
    x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=-jnp.inf)
    return functools.reduce(_larger, _taps(x, 3, 3, 2))


def _larger(x: Array, y: Array) -> Array:
    """The larger of two, the first of equals, with the choice made once: without the barrier XLA
    computes it again for the gradient, rounds otherwise, and a tie sends its gradient to both or
    to neither (seen: 2 % of the logits after one inner step, from flat image regions).
    """
    choose = jax.lax.optimization_barrier(y > x)
    return jnp.where(choose, y, x)


def map_tasks(net: Net, f: Callable, *batches, at_once: int | None = None):
    """`f` of every task along the leading axis T of `batches`, stacked; `at_once` of them batched.

    Unless told: where the kernels differ from task to task, a CPU is faster taking one task after
    another (its caches hold one), if the network convolves; everything else is batched.
    """
    convolves = any(role.prunable and role.width == 3 for role in jax.tree.leaves(net.roles))
    if at_once is None and convolves and jax.default_backend() == "cpu":
        at_once = 1
    if at_once is None:
        return jax.vmap(f)(*batches)
    batch_size = at_once if at_once > 1 else None
    return jax.lax.map(lambda args: f(*args), batches, batch_size=batch_size)


def _taps(x: Array, kh: int, kw: int, stride: int) -> list[Array]:
    """The `kh kw` shifted, strided slices `[n, h', w', in]` of a padded `x`."""
    rows = stride * ((x.shape[1] - kh) // stride) + 1
    columns = stride * ((x.shape[2] - kw) // stride) + 1
    return [
        x[:, i : i + rows : stride, j : j + columns : stride] for i in range(kh) for j in range(kw)
    ]


def _patches(x: Array, kh: int, kw: int, stride: int, padding: int) -> Array:
    """`[n, h', w', kh kw in]`, the taps in the order of a flattened HWI kernel."""
    # lax.pad: jnp.pad is a jit of its own, and jax 0.10 mixes up a scan's residuals when the
    # body's custom_vjp rules hold one and are differentiated twice.
    none, pad = (0, 0, 0), (padding, padding, 0)
    x = jax.lax.pad(x, jnp.zeros((), x.dtype), (none, pad, pad, none))
    return jnp.concatenate(_taps(x, kh, kw, stride), axis=-1)


def _product(x: Array, kernel: Array, stride: int, padding: int) -> Array:
    kh, kw, _, out = kernel.shape
    return _patches(x, kh, kw, stride, padding) @ kernel.reshape(-1, out)


@functools.partial(jax.checkpoint, static_argnums=(2, 3))
def _strided(x: Array, kernel: Array, stride: int, padding: int) -> Array:
    return _product(x, kernel, stride, padding)  # patches are made again, not kept, backwards


# The stride-1 convolution and its kernel gradient are bilinear, and each one's derivatives are
# again one of the two: the rules below are closed under differentiation to any order.


@jax.custom_vjp
def _same(x: Array, kernel: Array) -> Array:
    return _product(x, kernel, 1, kernel.shape[0] // 2)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _correlate(x: Array, y: Array, size: int) -> Array:
    """Gradient of `sum(y * _same(x, kernel))` by the kernel, `[size, size, in, out]`."""
    patches = _patches(x, size, size, 1, size // 2)
    flat = jnp.einsum("nhwk,nhwo->ko", patches, y)
    return flat.reshape(size, size, x.shape[-1], y.shape[-1])


def _adjoint(kernel: Array) -> Array:
    return jnp.flip(kernel, (0, 1)).swapaxes(2, 3)


def _same_bwd(residuals, y):
    x, kernel = residuals
    return _same(y, _adjoint(kernel)), _correlate(x, y, kernel.shape[0])


def _correlate_bwd(size, residuals, kernel):
    del size
    x, y = residuals
    return _same(y, _adjoint(kernel)), _same(x, kernel)


_same.defvjp(lambda x, kernel: (_same(x, kernel), (x, kernel)), _same_bwd)
_correlate.defvjp(lambda x, y, size: (_correlate(x, y, size), (x, y)), _correlate_bwd)
