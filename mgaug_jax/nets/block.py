"""A block of Conv-4: convolution, batch norm, ReLU and the largest of every 2x2 window.

With few channels in and more out, as in the first block, the map is cheap to compute and large: it
costs the memory that it is written to. There it is never written. Its mean and variance follow from
those of the image patches, the norm goes into the kernel, and a few images at a time only the
chosen entry of every window is kept, and its number for the way back.
"""

import functools

import jax
import jax.numpy as jnp

from mgaug_jax.nets import lowering
from mgaug_jax.nets.lowering import Lowering
from mgaug_jax.types import Array


def block(
    x: Array,
    kernel: Array,
    scale: Array,
    bias: Array,
    first: int | None = None,
    how: Lowering | None = None,
) -> Array:
    """`lowering.norm_relu_pool(lowering.conv(x, kernel), scale, bias, first)`.

    Args:
      x: Images `[n, h, w, in]`.
      kernel: `[k, k, in, out]`, k odd; zeros around the images keep their size.
      scale: `[out]`, of the norm.
      bias: `[out]`, of the norm.
      first: The statistics are those of so many examples, of all if None.
      how: It is computed; None: as is fastest on the backend.

    Returns:
      `[n, h // 2, w // 2, out]`.

    Raises:
      ValueError: The images have fewer than 2 rows or columns.
    """
    how = lowering.chosen(how)
    if not how.native and kernel.shape[2] < min(how.thin, kernel.shape[3]):
        lowering.check_halves(x)
        return _thin(x, kernel, scale, bias, first, how)
    return _composed(first, how, x, kernel, scale, bias)


def _composed(
    first: int | None, how: Lowering, x: Array, kernel: Array, scale: Array, bias: Array
) -> Array:
    y = lowering.conv(x, kernel, padding=len(kernel) // 2, how=how)
    return lowering.norm_relu_pool(y, scale, bias, first)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _thin(
    x: Array, kernel: Array, scale: Array, bias: Array, first: int | None, how: Lowering
) -> Array:
    return _thin_fwd(x, kernel, scale, bias, first, how)[0]


def _thin_fwd(x, kernel, scale, bias, first, how):
    statistics = _moments(x[:first], len(kernel), how)
    weights, offset = _folded(kernel, scale, bias, *statistics)

    def some(x: Array) -> tuple[Array, Array]:
        entries = [jax.lax.optimization_barrier(p @ weights) for p in _windows(x, len(kernel))]
        best = functools.reduce(jnp.maximum, entries)
        z = jax.nn.relu(best + offset)
        found = [entry == best for entry in entries]
        which = jnp.where(found[0], 0, jnp.where(found[1], 1, jnp.where(found[2], 2, 3)))
        return z, jnp.where(z > 0, which, 4).astype(jnp.int8)

    z, chosen = lowering.some_at_a_time(how, some, x)
    return z, (x, kernel, scale, bias, statistics, chosen)


def _thin_bwd(first, how, residuals, dz):
    return _gradient(*residuals, dz, first, how)


_thin.defvjp(_thin_fwd, _thin_bwd)


# Differentiated again, the gradient is that of the composition.


@functools.partial(jax.custom_vjp, nondiff_argnums=(7, 8))
def _gradient(x, kernel, scale, bias, statistics, chosen, dz, first, how):
    def some(x: Array, chosen: Array, dz: Array) -> tuple[Array, Array]:
        parts = [jnp.where(chosen == i, dz, 0) for i in range(4)]
        pairs = zip(_windows(x, len(kernel)), jax.lax.optimization_barrier(parts), strict=True)
        dweights = [jnp.einsum("nhwk,nhwo->ko", p, d) for p, d in pairs]
        return functools.reduce(jnp.add, dweights), jnp.sum(jnp.where(chosen < 4, dz, 0), (0, 1, 2))

    found = lowering.sum_of_some(how, some, x, chosen, dz)
    _, transpose = jax.vjp(lambda *args: _folded(*args, *statistics), kernel, scale, bias)
    # The images' gradient is seldom asked for, and XLA leaves out what nobody uses.
    dx = _composed_gradient(first, how, dz, x, kernel, scale, bias)[0]
    return dx, *transpose(found)


def _composed_gradient(
    first: int | None, how: Lowering, dz: Array, *inputs: Array
) -> tuple[Array, ...]:
    return jax.vjp(functools.partial(_composed, first, how), *inputs)[1](dz)


def _gradient_fwd(*args):
    return _gradient(*args), args[:-2]


def _gradient_bwd(first, how, residuals, cotangents):
    *inputs, _, _, dz = residuals
    gradient = functools.partial(_composed_gradient, first, how)
    ddz, *found = jax.vjp(gradient, dz, *inputs)[1](cotangents)
    return *found, None, None, ddz


_gradient.defvjp(_gradient_fwd, _gradient_bwd)


def _windows(x: Array, size: int) -> list[Array]:
    """The patches of the entries of every 2x2 window, in reading order: 4 times `[n, h // 2,
    w // 2, size^2 in]`. An odd last row or column is in no window.
    """
    height, width = (length // 2 * 2 + size - 2 for length in x.shape[1:3])
    x = lowering.padded(x, size // 2)
    corners = [x[:, i : i + height, j : j + width] for i in range(2) for j in range(2)]
    patches = [jnp.concatenate(lowering.taps(corner, size, size, 2), -1) for corner in corners]
    return jax.lax.optimization_barrier(patches)


def _moments(x: Array, size: int, how: Lowering) -> tuple[Array, Array]:
    """Mean `[k]` and covariance `[k, k]` of all patches, about the images' mean: less cancels."""
    centre = jnp.tile(jnp.mean(x, (0, 1, 2)), size**2)

    def some(x: Array) -> tuple[Array, Array]:
        patches = lowering.patches(x, size, size, 1, size // 2) - centre
        return jnp.sum(patches, (0, 1, 2)), jnp.einsum("nhwi,nhwj->ij", patches, patches)

    count = x.size // x.shape[-1]
    mean, second = jax.tree.map(lambda a: a / count, lowering.sum_of_some(how, some, x))
    return mean + centre, second - jnp.outer(mean, mean)


def _folded(kernel: Array, scale: Array, bias: Array, mean: Array, covariance: Array):
    """Kernel `[k, out]` and bias `[out]` of the convolution with the norm in it."""
    kernel = kernel.reshape(-1, kernel.shape[-1])
    var = jnp.maximum(jnp.sum(kernel * (covariance @ kernel), 0), 0)
    rate = scale * jax.lax.rsqrt(var + lowering.EPSILON)
    return kernel * rate, bias - mean @ kernel * rate
