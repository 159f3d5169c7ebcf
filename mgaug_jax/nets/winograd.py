"""Winograd's 3x3 convolution F(2x2, 3x3) (Lavin and Gray 2016): 16 products where there were 36.

A tile of 2x2 results takes 4x4 entries d of a padded map: `A^T ((G g G^T) * (B^T d B)) A`, g the
kernel, `*` entry by entry. Summed over channels, the middle is 16 products of matrices, `[tiles,
in]` and `[in, out]`. The transforms are sums and differences of strided slices, axis by axis.
"""

import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array
G = ((1, 0, 0), (0.5, 0.5, 0.5), (0.5, -0.5, 0.5), (0, 0, 1))


def kernel(g: Array) -> Array:
    """`G g G^T`: `[3, 3, in, out] -> [16, in, out]`."""
    return (_squares(g.dtype) @ g.reshape(9, -1)).reshape(16, *g.shape[2:])


def kernel_transpose(taps: Array) -> Array:
    """The transpose of `kernel`: `[16, in, out] -> [3, 3, in, out]`."""
    return (_squares(taps.dtype).T @ taps.reshape(16, -1)).reshape(3, 3, *taps.shape[1:])


def _squares(dtype) -> Array:
    """`[16, 9]`: the map `g -> G g G^T` of flattened matrices, one product in place of two."""
    return jnp.asarray(np.kron(G, G), dtype)


def convolve(x: Array, taps: Array) -> Array:
    """`x [n, h, w, in]` with a kernel, transformed; stride 1, zeros around: `[n, h, w, out]`."""
    n, height, width, _ = x.shape
    rows, columns = _tiles(height), _tiles(width)
    products = jnp.einsum("tmc,tco->tmo", _inputs(x), taps)
    square = products.reshape(4, 4, n, rows, columns, -1)
    results = lambda m: (m[0] + m[1] + m[2], m[1] - m[2] - m[3])
    lines = jnp.stack(results(square), 3)  # [4, n, rows, 2, columns, out]
    y = jnp.stack(results(lines), 4)  # [n, rows, 2, columns, 2, out]
    return y.reshape(n, 2 * rows, 2 * columns, -1)[:, :height, :width]


def correlate(x: Array, y: Array) -> Array:
    """Gradient of `sum(y * convolve(x, taps))` by the taps, `[16, in, out]`."""
    return jnp.einsum("tmc,tmo->tco", _inputs(x), _gradients(y))


def _tiles(length: int) -> int:
    return -(-length // 2)


def _padded(x: Array, before: int, after: int) -> Array:
    """Zeros around, and so many more below and to the right that the tiles are whole."""
    rows, columns = ((before, after + n % 2, 0) for n in x.shape[1:3])
    return jax.lax.pad(x, jnp.zeros((), x.dtype), ((0, 0, 0), rows, columns, (0, 0, 0)))


def _inputs(x: Array) -> Array:
    """`B^T d B` of every tile: `[16, tiles, in]`."""
    rows, columns = _tiles(x.shape[1]), _tiles(x.shape[2])
    x = _padded(x, 1, 1)
    entries = lambda d0, d1, d2, d3: (d0 - d2, d1 + d2, d2 - d1, d1 - d3)
    x = jnp.stack(entries(*(x[:, i : i + 2 * rows : 2] for i in range(4))))
    x = jnp.stack(entries(*(x[:, :, :, j : j + 2 * columns : 2] for j in range(4))), 1)
    return x.reshape(16, -1, x.shape[-1])


def _gradients(y: Array) -> Array:
    """`A y A^T` of every tile, the transpose of `results` both ways: `[16, tiles, out]`."""
    y = _padded(y, 0, 0)
    entries = lambda y0, y1: (y0, y0 + y1, y0 - y1, -y1)
    y = jnp.stack(entries(y[:, ::2], y[:, 1::2]))
    y = jnp.stack(entries(y[:, :, :, ::2], y[:, :, :, 1::2]), 1)
    return y.reshape(16, -1, y.shape[-1])
