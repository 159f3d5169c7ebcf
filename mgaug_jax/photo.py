"""Photographic transforms of Baseline++ ("Aug", Chen et al. 2019): crop, colour jitter, flip.

One image `[h, w, c]` of whole numbers in [0, 255], held as floats, becomes another. The arithmetic
is that of torchvision on PIL images, whose results are 8-bit after every operation: rounding them
only at the end, or resizing without antialiasing, is another augmentation.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from mgaug_jax.augmentations import augment, check_images
from mgaug_jax.checks import check_count, check_function, check_rate
from mgaug_jax.episodes import normalise
from mgaug_jax.types import Array, Examples, Modifier, Task

AREA = (0.08, 1.0)
ASPECT = (3 / 4, 4 / 3)
TRIES = 10
HALF_BITS = 11
"""PIL's weights are multiples of 2^-22; here they are two halves of 11 bits."""


def baseline(key: Array, image: Array) -> Array:
    """Random resized crop, jitter and flip, in that order: `[h, w, c] -> [h, h, c]`.

    Raises:
      ValueError: The image has neither 1 nor 3 channels.
    """
    k_crop, k_jitter, k_flip = jax.random.split(key, 3)
    return flip(k_flip, jitter(k_jitter, random_resized_crop(k_crop, image)))


def photo_augment(
    mean: Array, std: Array, transform: Callable[[Array, Array], Array] = baseline
) -> Modifier:
    """Every image of a training task, support and query, is transformed with a key of its own.

    Args:
      mean: `[c]`, as the images were normalised with (`Images.mean`).
      std: `[c]`, likewise.
      transform: `(key, image [h, w, c]) -> image` on whole numbers in [0, 255].

    Raises:
      ValueError: `transform` is no function, or (at the first step) examples are not images
        `[h, w, c]`.
    """
    check_function("transform", transform, "photo.baseline")

    def change(key: Array, task: Task) -> Task:
        def part(key: Array, examples: Examples) -> Examples:
            x = examples.x
            check_images(x, "Photographic transforms")
            pixels = jnp.clip(jnp.round((x * std + mean) * 255), 0, 255)
            changed = jax.vmap(transform)(jax.random.split(key, len(x)), pixels)
            return examples._replace(x=normalise(changed, mean, std))

        return Task(*map(part, jax.random.split(key), task))

    return augment(change)


def random_resized_crop(key: Array, image: Array, size: int | None = None) -> Array:
    """A random box (`crop_box`) at `size` pixels: `[h, w, c] -> [size, size, c]`.

    Args:
      key: Of the box.
      image: `[h, w, c]`.
      size: Side of the result; None: h.

    Raises:
      ValueError: `size` is not a positive integer.
    """
    height, width = image.shape[:2]
    if size is None:
        size = height
    check_count("size", size)
    return crop(image, crop_box(key, height, width), size)


def jitter(key: Array, image: Array, strength: float = 0.4) -> Array:
    """`enhance` by three independent factors U(1 - strength, 1 + strength): `[h, w, c]`.

    Raises:
      ValueError: `strength` is not a number of 0 or more, or the image has neither 1 nor 3
        channels.
    """
    check_rate("strength", strength)
    factors = 1 + strength * (2 * jax.random.uniform(key, (3,), jnp.float32) - 1)
    return enhance(image, *factors)


def flip(key: Array, image: Array) -> Array:
    """Left and right exchanged with probability 1/2: `[h, w, c]`."""
    return jnp.where(jax.random.bernoulli(key), image[:, ::-1], image)


def crop_box(key: Array, height: int, width: int) -> Array:
    """A box of an image `[height, width]` as torchvision's `RandomResizedCrop` draws it.

    Its area is U(.08, 1) of the image, the logarithm of its width / height U(log 3/4, log 4/3), its
    place uniform. The first of ten draws that fits counts; if none does, the box is the centre.

    Returns:
      `int32 [4]`: top, left, height, width.
    """
    k_area, k_aspect, k_corner = jax.random.split(key, 3)
    low, high = map(math.log, ASPECT)
    fractions = jax.random.uniform(k_area, (TRIES,), jnp.float32, *AREA)
    aspects = jnp.exp(jax.random.uniform(k_aspect, (TRIES,), jnp.float32, low, high))
    sides, found = box_sides(fractions, aspects, height, width)
    room = jnp.array([height, width], jnp.int32) - sides
    corner = jax.random.randint(k_corner, (2,), 0, room + 1, jnp.int32)
    return jnp.concatenate([jnp.where(found, corner, room // 2), sides])


def box_sides(fractions: Array, aspects: Array, height: int, width: int) -> tuple[Array, Array]:
    """The first of n drawn boxes that fits in an image `[height, width]`.

    Args:
      fractions: `[n]`, areas relative to the image's.
      aspects: `[n]`, width / height.
      height: Of the image.
      width: Of the image.

    Returns:
      `int32 [2]`, height and width of the box, and whether any fits: if none does, it is the
      largest part of the image with an aspect in [3/4, 4/3].
    """
    area = fractions * (height * width)
    sides = jnp.round(jnp.sqrt(jnp.stack([area / aspects, area * aspects], axis=1)))
    fits = jnp.all((sides > 0) & (sides <= jnp.array([height, width])), axis=1)
    least, most = ASPECT
    largest = jnp.array(
        [min(height, round(width / least)), min(width, round(height * most))], jnp.int32
    )
    found = jnp.any(fits)
    return jnp.where(found, sides[jnp.argmax(fits)].astype(jnp.int32), largest), found


def crop(image: Array, box: Array, size: int) -> Array:
    """A box of an image, resized as PIL does it with `BILINEAR`: `[h, w, c] -> [size, size, c]`.

    Half-pixel centres, a triangle filter that widens when the box shrinks, and a result rounded to
    8 bits after the horizontal and again after the vertical pass. Equal to PIL's to the last bit
    while the box shrinks less than 15-fold; Pillow 13 swaps the passes for some boxes taller than
    `size`, which is a difference of one grey level.

    Args:
      image: `[h, w, c]`, whole numbers in [0, 255].
      box: `int [4]`: top, left, height, width, inside the image; may be traced.
      size: Side of the result.
    """
    top, left, height, width = box.astype(jnp.int32)
    columns = _weights(left, width, image.shape[1], size)
    rows = _weights(top, height, image.shape[0], size)
    narrow = _resample("ow,hwc->hoc", columns, image.astype(jnp.float32))
    return _resample("oh,hwc->owc", rows, narrow).astype(image.dtype)


def enhance(
    image: Array, brightness: float | Array, contrast: float | Array, colour: float | Array
) -> Array:
    """PIL's `ImageEnhance`: brightness, then contrast, then colour, each cut to 8 bits.

    A factor of 1 changes nothing; 0 gives black, the mean grey, and the greyscale image.

    Args:
      image: `[h, w, c]`, whole numbers in [0, 255]; c = 1 has no colour to change.
      brightness: Factor, any number.
      contrast: Likewise.
      colour: Likewise.

    Raises:
      ValueError: The image has neither 1 nor 3 channels.
    """
    x = _blend(jnp.zeros((), jnp.int32), image, brightness)
    luminance = grey(x)
    # int(mean + .5) in integers: quotient and remainder, since twice the sum may overflow.
    whole, rest = jnp.divmod(jnp.sum(luminance, dtype=jnp.int32), luminance.size)
    x = _blend(whole + (2 * rest >= luminance.size), x, contrast)
    return x if x.shape[-1] == 1 else _blend(grey(x), x, colour)


def grey(image: Array) -> Array:
    """PIL's "L", `[h, w, c] -> int32 [h, w, 1]`.

    Raises:
      ValueError: The image has neither 1 nor 3 channels.
    """
    channels = image.shape[-1]
    if channels not in (1, 3):
        raise ValueError(
            f"Colour jitter of images with {channels} channels was asked for, but only 1 (grey) or "
            "3 (RGB) have a luminance; give photo_augment a transform without it."
        )
    x = image.astype(jnp.int32)
    if channels == 1:
        return x
    parts = x * jnp.array([19595, 38470, 7471], jnp.int32)
    return (jnp.sum(parts, axis=-1, keepdims=True, dtype=jnp.int32) + 2**15) >> 16


def _blend(degenerate: Array, image: Array, factor: float | Array) -> Array:
    """PIL's `Image.blend`: `degenerate + factor (image - degenerate)` in float32, cut to 8 bits."""
    factor = jnp.asarray(factor, jnp.float32)
    # PIL rounds the product and then the sum, and a pixel hangs on it where the sum is next to a
    # whole number; compilers fuse the two. A product of two halves of the factor, each exact, is
    # rounded by their sum, fused or not.
    bits = jax.lax.bitcast_convert_type(factor, jnp.int32)
    upper = jax.lax.bitcast_convert_type(bits & -(2**12), jnp.float32)
    start = degenerate.astype(jnp.float32)
    step = image.astype(jnp.float32) - start
    mixed = start + (upper * step + (factor - upper) * step)
    return jnp.floor(jnp.clip(mixed, 0, 255)).astype(image.dtype)


def _weights(start: Array, length: Array, source: int, size: int) -> tuple[Array, Array]:
    """PIL's interpolation matrix from `length` pixels at `start` to `size`.

    All distances are multiples of 1 / (2 size), so that integers hold them, and a long division
    gives the very weights PIL rounds to 22 bits.

    Returns:
      Upper and lower half, each `int32 [size, source]`; the weight is `upper 2^-11 + lower 2^-22`.
    """
    pixel = jnp.arange(source, dtype=jnp.int32) - start
    centre = (2 * jnp.arange(size, dtype=jnp.int32)[:, None] + 1) * length
    weight = 2 * jnp.maximum(length, size) - jnp.abs((2 * pixel + 1) * size - centre)
    weight = jnp.where((pixel >= 0) & (pixel < length), jnp.maximum(weight, 0), 0)
    total = jnp.sum(weight, axis=1, keepdims=True, dtype=jnp.int32)
    upper, rest = jnp.divmod(weight << HALF_BITS, total)
    lower, rest = jnp.divmod(rest << HALF_BITS, total)
    return upper, lower + (2 * rest >= total)


def _resample(axes: str, weights: tuple[Array, Array], x: Array) -> Array:
    """One pass over an image of whole numbers, rounded to whole numbers.

    Either half times 8 bits, summed, is an integer that float32 holds, so a matrix product is exact
    and faster than one of integers.
    """
    upper, lower = (
        jnp.einsum(axes, half.astype(jnp.float32), x, precision="highest").astype(jnp.int32)
        for half in weights
    )
    total = (upper << HALF_BITS) + lower
    return ((total + 2 ** (2 * HALF_BITS - 1)) >> (2 * HALF_BITS)).astype(jnp.float32)
