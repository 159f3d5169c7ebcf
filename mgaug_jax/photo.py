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
BITS = 22
"""PIL's weights are multiples of 2^-22."""


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
    while `height^2` and `width^2` are below `2^18 size`; Pillow 13 swaps the passes for some boxes
    taller than `size`, which is a difference of one grey level.

    Args:
      image: `[h, w, c]`, whole numbers in [0, 255].
      box: `int [4]`: top, left, height, width, inside the image; may be traced.
      size: Side of the result.
    """
    top, left, height, width = box.astype(jnp.int32)
    narrow = _resample(image.astype(jnp.int32), left, width, size, axis=1)
    return _resample(narrow, top, height, size, axis=0).astype(image.dtype)


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


def _resample(image: Array, start: Array, length: Array, size: int, axis: int) -> Array:
    """PIL's pass along an axis of `int32 [h, w, c]`: `length` pixels at `start` become `size`."""

    def add(total: Array, tap: tuple[Array, Array]):
        at, weight = tap
        part = jnp.take(image, at, axis, mode="clip")
        return total + part * weight.reshape(-1, *(1,) * (2 - axis)), None

    taps = _taps(start, length, image.shape[axis], size)
    shape = (*image.shape[:axis], size, *image.shape[axis + 1 :])
    half = jnp.full(shape, 2 ** (BITS - 1), jnp.int32)
    # Not as one sum, which XLA would make again for every use of a pixel, of which jitter has many.
    return jax.lax.scan(add, half, taps)[0] >> BITS


def _taps(start: Array, length: Array, source: int, size: int) -> tuple[Array, Array]:
    """Which pixels of `source` make each of `size`, and PIL's weights of them: `int32 [k, size]`,
    k as many as the longest box takes.

    All distances are multiples of 1 / (2 size), so that integers hold them, and a long division
    gives the very weights that PIL rounds to 22 bits.
    """
    centre = (2 * jnp.arange(size, dtype=jnp.int32) + 1) * length
    reach = 2 * jnp.maximum(length, size)
    first = (centre - reach + size) // (2 * size)  # the first that is nearer than `reach`
    count = -(-2 * max(source, size) // size)
    pixel = first + jnp.arange(count, dtype=jnp.int32)[:, None]
    weight = jnp.maximum(reach - jnp.abs((2 * pixel + 1) * size - centre), 0)
    weight = jnp.where((pixel >= 0) & (pixel < length), weight, 0)
    total = jnp.sum(weight, axis=0, dtype=jnp.int32)
    upper, rest = jnp.divmod(weight << BITS // 2, total)
    lower, rest = jnp.divmod(rest << BITS // 2, total)
    weight = (upper << BITS // 2) + lower + (2 * rest >= total)
    return start + jnp.clip(pixel, 0, length - 1), weight
