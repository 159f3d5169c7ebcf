"""How a convolution and a pooling are computed: the one place that knows.

XLA lowers a convolution that is vmapped over its kernels to a grouped convolution, and the
gradient of `reduce_window` to select-and-scatter; both are slow on CPU and on GPU. Here a
convolution is a product of image patches with the kernel matrix or, 3x3 with enough channels,
Winograd's sixteen smaller products; a 2x2 max pool takes four strided slices and comes before the
norm (`nets.block` joins the three). All is products and slices under `vmap`, `scan` and any number
of reverse-mode derivatives. On a CPU a convolution goes through a few images at a time, so that
what it makes on the way stays in the caches. Forward-mode (`jax.jvp`, `jax.jacfwd`) is refused by
`jax.custom_vjp`, where it is used.

Which of these is fastest depends on the machine: a `Lowering` says it, measured by
`experiments.lowering`, chosen by backend, or given to a network's constructor. It is an argument of
all that is traced, so that programs of different ones never meet in a cache.

Maps in bfloat16 stay so: kernels, given in float32, are rounded for the products, whose terms are
added in float32 (on a GPU, and where they are `widened`) and the sums rounded. All statistics are
float32, and so are the gradients of kernels of stride 1; those of stride 2, and all with XLA's own
convolutions, are float32 numbers that were rounded.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from mgaug_jax.nets import winograd
from mgaug_jax.types import Array, Net


class Lowering(NamedTuple):
    """What is chosen by measurement; only rounding depends on it.

    Attributes:
      pixels: About so many positions of its images a convolution takes at a time; None: all.
      winograd: From so many channels on, in and out, a 3x3 convolution is Winograd's, with fewer a
        product of patches; None: always patches.
      thin: A block of Conv-4 of fewer channels than this in, and more out, never writes its map
        (`nets.block`).
      at_once: Tasks of a convolutional network that are computed together; None: all.
      native: Convolutions are XLA's own in place of all these; ResNets then allow forward mode.
      widened: Products of bfloat16 are made in float32, for a backend that has none.
    """

    pixels: int | None = None
    winograd: int | None = 8
    thin: int = 8
    at_once: int | None = None
    native: bool = False
    widened: bool = False


BACKENDS = {"cpu": Lowering(pixels=1024, at_once=1, widened=True)}
"""What was measured to be fastest."""
OTHERS = Lowering()
"""That of a GPU or TPU, on which nothing was measured."""


def chosen(how: Lowering | None = None) -> Lowering:
    """The lowering that is asked for, or else that of the default backend. To change one choice of
    a backend's, take `chosen()._replace(native=True)`.
    """
    return BACKENDS.get(jax.default_backend(), OTHERS) if how is None else how


def conv(
    x: Array, kernel: Array, stride: int = 1, padding: int = 1, how: Lowering | None = None
) -> Array:
    """Cross-correlation, as `lax.conv_general_dilated` in NHWC x HWIO.

    Args:
      x: Images `[n, h, w, in]`.
      kernel: `[kh, kw, in, out]`.
      stride: Step in both directions.
      padding: Zeros added on every side.
      how: It is computed; None: as is fastest on the backend.

    Returns:
      `[n, h', w', out]` with `h' = (h + 2 padding - kh) // stride + 1`.
    """
    how = chosen(how)
    kh, kw = kernel.shape[:2]
    if how.native:
        return _native(x, kernel, stride, padding)
    if stride == 1 and kh == kw == 2 * padding + 1:
        return _same(x, kernel, how)
    return _strided(x, kernel, stride, padding, how)


def _native(x: Array, kernel: Array, stride: int, padding: int) -> Array:
    kernel = rounded(kernel, x)
    dtype, around = jnp.result_type(x, kernel), [(padding, padding)] * 2
    axes = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(
        x.astype(dtype), kernel.astype(dtype), (stride, stride), around, dimension_numbers=axes
    )


def summed(x: Array) -> Any:
    """The type in which entries of `x` are added up."""
    return jnp.promote_types(x.dtype, jnp.float32)


def rounded(y: Array, x: Array) -> Array:
    """`y` in bfloat16 if `x` is, else as it is."""
    return y.astype(x.dtype) if x.dtype == jnp.bfloat16 else y


def fast(x: Array, kernel: tuple[int, ...], how: Lowering) -> bool:
    """Whether Winograd's algorithm is to be used with a kernel of such a shape; its sums and
    differences would lose too much of bfloat16.
    """
    if how.winograd is None or x.dtype == jnp.bfloat16:
        return False
    return kernel[0] == 3 and min(kernel[2:]) >= how.winograd


EPSILON = 1e-5
"""Added to a variance, as in PyTorch."""


def moments(x: Array, first: int | None = None) -> tuple[Array, Array]:
    """Mean and variance `[c]` of the first `first` examples `[n, ..., c]`, of all if None."""
    axes = tuple(range(x.ndim - 1))
    x = x.astype(summed(x))
    mean = jnp.mean(x[:first], axes)
    return mean, jnp.mean(jnp.square(x[:first] - mean), axes)


def norm_relu_pool(y: Array, scale: Array, bias: Array, first: int | None = None) -> Array:
    """Batch norm, ReLU and the largest of every 2x2 window, stride 2: `[n, h, w, c] -> [n, h // 2,
    w // 2, c]`. An odd last row or column is in the statistics alone.

    The first of equal entries (in reading order) gets the whole gradient, as in PyTorch.

    Args:
      y: A map.
      scale: `[c]`.
      bias: `[c]`.
      first: The statistics are those of so many examples, of all if None.

    Raises:
      ValueError: The map has fewer than 2 rows or columns.
    """
    check_halves(y)
    return _norm_relu_pool(y, scale, bias, first)


def check_halves(x: Array) -> None:
    """Raises ValueError if a map `[n, h, w, c]` has fewer than 2 rows or columns."""
    if min(x.shape[1:3]) < 2:
        raise ValueError(
            f"A map of {x.shape[1]}x{x.shape[2]} cannot be halved; the images are too small for "
            "this network. Use larger ones."
        )


# A norm is monotone in every channel, so the pool may come first: of every window the largest entry
# where the channel's scale is positive, the smallest where it is negative. What follows it works on
# a quarter of the map. The rule backwards makes the map's gradient in one pass; with autodiff's
# four pads, one for each entry of a window, a block takes about a quarter longer.


def _windows(y: Array) -> list[Array]:
    return taps(y[:, : y.shape[1] // 2 * 2, : y.shape[2] // 2 * 2], 2, 2, 2)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _norm_relu_pool(y: Array, scale: Array, bias: Array, first: int | None) -> Array:
    return _norm_relu_pool_fwd(y, scale, bias, first)[0]


def _norm_relu_pool_fwd(y, scale, bias, first):
    mean, var = moments(y, first)
    rate = jax.lax.rsqrt(var + EPSILON)
    sign = jnp.sign(scale)
    best = functools.reduce(lambda a, b: jnp.where(sign * b > sign * a, b, a), _windows(y))
    z = rounded(jax.nn.relu((best - mean) * (scale * rate) + bias), y)
    return z, (y, best, z, mean, rate, scale)


def _norm_relu_pool_bwd(first, residuals, dz):
    y, best, z, mean, rate, scale = residuals
    n, height, width, _ = y.shape
    d = jnp.where(z > 0, dz, 0).astype(summed(y))
    dbias = jnp.sum(d, (0, 1, 2))
    dscale = jnp.sum(d * (best - mean), (0, 1, 2)) * rate
    # The number of the entry that was chosen, in reading order. `best` is a copy of it, so nothing
    # rounds. The barrier has it made once, not for every entry of the window.
    found = [entry == best for entry in _windows(y)]
    chosen = jnp.where(found[0], 0, jnp.where(found[1], 1, jnp.where(found[2], 2, 3)))
    chosen = jax.lax.optimization_barrier(chosen.astype(jnp.int8))
    here = jnp.arange(2, dtype=jnp.int8)[:, None, None] * 2 + jnp.arange(2, dtype=jnp.int8)[:, None]
    inside = jnp.where(
        chosen[:, :, None, :, None] == here[:, None], (d * (scale * rate))[:, :, None, :, None], 0
    )
    inside = inside.reshape(n, height // 2 * 2, width // 2 * 2, -1)
    inside = _grown(inside, height, width)
    # through the statistics
    count = len(y[:first]) * height * width
    slope = -scale * jnp.square(rate) * dscale / count
    through = y * slope - (mean * slope + scale * rate * dbias / count)
    if first is not None:
        through = jnp.where((jnp.arange(n) < first)[:, None, None, None], through, 0)
    return rounded(inside + through, y), dscale, dbias


def _grown(x: Array, height: int, width: int) -> Array:
    """Zeros below and to the right, up to a size."""
    edges = ((0, 0, 0), (0, height - x.shape[1], 0), (0, width - x.shape[2], 0), (0, 0, 0))
    return jax.lax.pad(x, jnp.zeros((), x.dtype), edges)


_norm_relu_pool.defvjp(_norm_relu_pool_fwd, _norm_relu_pool_bwd)


def max_pool_3x3(x: Array) -> Array:
    """Largest of every 3x3 window, stride 2, padding 1 (the stem of a ResNet)."""
    x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=-jnp.inf)
    return functools.reduce(_larger, taps(x, 3, 3, 2))


def _larger(x: Array, y: Array) -> Array:
    """The larger of two, the first of equals, with the choice made once: without the barrier XLA
    computes it again for the gradient, rounds otherwise, and a tie sends its gradient to both or
    to neither (seen: 2 % of the logits after one inner step, from flat image regions).
    """
    choose = jax.lax.optimization_barrier(y > x)
    return jnp.where(choose, y, x)


def map_size(net: Net) -> int | None:
    """How many tasks of a network are batched where nobody says; None: all of them."""
    convolves = any(role.prunable and role.width == 3 for role in jax.tree.leaves(net.roles))
    return chosen(net.lowering).at_once if convolves else None


def map_tasks(net: Net, f: Callable, *batches, at_once: int | None = None):
    """`f` of every task along the leading axis T of `batches`, stacked; `at_once` of them batched.

    Unless told, a network that convolves has its lowering's number: where the kernels differ from
    task to task, a CPU is faster taking one after another (its caches hold one).
    """
    at_once = map_size(net) if at_once is None else at_once
    if at_once is None:
        return jax.vmap(f)(*batches)
    batch_size = at_once if at_once > 1 else None
    return jax.lax.map(lambda args: f(*args), batches, batch_size=batch_size)


def taps(x: Array, kh: int, kw: int, stride: int) -> list[Array]:
    """The `kh kw` shifted, strided slices `[n, h', w', in]` of a padded `x`."""
    rows = stride * ((x.shape[1] - kh) // stride) + 1
    columns = stride * ((x.shape[2] - kw) // stride) + 1
    return [
        x[:, i : i + rows : stride, j : j + columns : stride] for i in range(kh) for j in range(kw)
    ]


def padded(x: Array, padding: int) -> Array:
    """Zeros on every side of images `[n, h, w, c]`."""
    # lax.pad: jnp.pad is a jit of its own, and jax 0.10 mixes up a scan's residuals when the
    # body's custom_vjp rules hold one and are differentiated twice.
    none, pad = (0, 0, 0), (padding, padding, 0)
    return jax.lax.pad(x, jnp.zeros((), x.dtype), (none, pad, pad, none))


def patches(x: Array, kh: int, kw: int, stride: int, padding: int) -> Array:
    """`[n, h', w', kh kw in]`, the taps in the order of a flattened HWI kernel."""
    return jnp.concatenate(taps(padded(x, padding), kh, kw, stride), axis=-1)


def _einsum(axes: str, a: Array, b: Array, dtype: Any, how: Lowering) -> Array:
    """`jnp.einsum` in some type, sums in float32 or better."""
    if a.dtype == jnp.bfloat16 and how.widened:
        return jnp.einsum(axes, a.astype(jnp.float32), b.astype(jnp.float32)).astype(dtype)
    return jnp.einsum(axes, a, b, preferred_element_type=dtype)


def _product(x: Array, kernel: Array, stride: int, padding: int, how: Lowering) -> Array:
    kh, kw, _, out = kernel.shape
    taken, kernel = patches(x, kh, kw, stride, padding), rounded(kernel.reshape(-1, out), x)
    return _einsum("nhwk,ko->nhwo", taken, kernel, jnp.result_type(taken, kernel), how)


@functools.partial(jax.checkpoint, static_argnums=(2, 3, 4))
def _strided(x: Array, kernel: Array, stride: int, padding: int, how: Lowering) -> Array:
    return _product(x, kernel, stride, padding, how)  # patches are made again, not kept, backwards


# The stride-1 convolution and its kernel gradient are bilinear, and each one's derivatives are
# again one of the two: the rules below are closed under differentiation to any order.


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _same(x: Array, kernel: Array, how: Lowering) -> Array:
    if fast(x, kernel.shape, how):
        taps = winograd.kernel(kernel)
        return some_at_a_time(how, lambda x: winograd.convolve(x, taps), x)
    return some_at_a_time(how, lambda x: _product(x, kernel, 1, len(kernel) // 2, how), x)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _correlate(x: Array, y: Array, size: int, how: Lowering) -> Array:
    """Gradient of `sum(y * _same(x, kernel))` by the kernel, `[size, size, in, out]`."""
    shape = size, size, x.shape[-1], y.shape[-1]
    if fast(x, shape, how):
        return winograd.kernel_transpose(sum_of_some(how, winograd.correlate, x, y))

    def flat(x: Array, y: Array) -> Array:
        # the kernel's transpose, since XLA multiplies `y^T x` faster than `x^T y` on a CPU
        taken = patches(x, size, size, 1, size // 2)
        return _einsum("nhwo,nhwk->ok", y, taken, jnp.result_type(y, taken, jnp.float32), how)

    return sum_of_some(how, flat, x, y).T.reshape(shape)


def _chunk(how: Lowering, x: Array) -> int:
    """How many images are computed at a time, a divisor of their number: on a CPU as many as its
    caches hold with all that is made of them on the way.
    """
    n, height, width = x.shape[:3]
    most = n if how.pixels is None else max(1, how.pixels // (height * width))
    return max(count for count in range(1, n + 1) if n % count == 0 and count <= most)


def some_at_a_time(how: Lowering, f: Callable[[Array], Any], x: Array) -> Any:
    """`f(x)`, arrays with a row per image, image by image or some at a time."""
    count = _chunk(how, x)
    if count == len(x):
        return f(x)
    made = jax.lax.map(f, x.reshape(-1, count, *x.shape[1:]))
    return jax.tree.map(lambda a: a.reshape(len(x), *a.shape[2:]), made)


def sum_of_some(how: Lowering, f: Callable[..., Any], *args: Array) -> Any:
    """`f(*args)`, sums over images, image by image or some at a time (the first argument's)."""
    count = _chunk(how, args[0])
    if count == len(args[0]):
        return f(*args)
    args = tuple(a.reshape(-1, count, *a.shape[1:]) for a in args)
    add = lambda total, some: (jax.tree.map(jnp.add, total, f(*some)), None)
    head, tail = (jax.tree.map(lambda a, part=part: a[part], args) for part in (0, slice(1, None)))
    return jax.lax.scan(add, f(*head), tail)[0]


def _adjoint(kernel: Array) -> Array:
    return jnp.flip(kernel, (0, 1)).swapaxes(2, 3)


def _same_bwd(how, residuals, y):
    x, kernel = residuals
    return _same(y, _adjoint(kernel), how), _correlate(x, y, kernel.shape[0], how)


def _correlate_bwd(size, how, residuals, kernel):
    del size
    x, y = residuals
    return _same(y, _adjoint(kernel), how), _same(x, kernel, how)


_same.defvjp(lambda x, kernel, how: (_same(x, kernel, how), (x, kernel)), _same_bwd)
_correlate.defvjp(lambda x, y, size, how: (_correlate(x, y, size, how), (x, y)), _correlate_bwd)
