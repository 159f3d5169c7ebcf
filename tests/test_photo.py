"""The photographic transforms against Pillow, and the laws of what they draw."""

from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import small_conv

from mgaug_jax import augment, maml, photo
from mgaug_jax.episodes import normalise
from mgaug_jax.types import Examples, Task

MEAN, STD = jnp.array([0.485, 0.456, 0.406]), jnp.array([0.229, 0.224, 0.225])


def images(seed, n, shape):
    """Noise, ramps with noise, and nearly flat images: `uint8 [n, *shape]`."""
    rng = np.random.default_rng(seed)
    noise = rng.integers(0, 256, (n, *shape))
    ramp = np.linspace(0, 255, shape[1])[:, None] * rng.uniform(size=(n, 1, 1, shape[2]))
    flat = rng.integers(0, 256, (n, 1, 1, shape[2]))
    near = lambda base: np.clip(base + rng.integers(-9, 10, (n, *shape)), 0, 255)
    kind = rng.integers(0, 3, n)
    return np.choose(kind[:, None, None, None], [noise, near(ramp), near(flat)]).astype(np.uint8)


def floats(x):
    return jnp.asarray(x, jnp.float32)


def pil(image):
    """A Pillow image of `uint8 [h, w, c]`."""
    Image = pytest.importorskip("PIL.Image")
    return Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)


def array(image):
    x = np.asarray(image)
    return x if x.ndim == 3 else x[..., None]


def random_boxes(seed, n, height, width):
    """`[n, 4]`, sides from one pixel to all, the first the whole image."""
    rng = np.random.default_rng(seed)
    sides = rng.integers(1, [height + 1, width + 1], (n, 2))
    sides[0] = height, width
    corners = rng.integers(0, np.array([height, width]) - sides + 1)
    return np.concatenate([corners, sides], axis=1)


# --- against Pillow -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "size"),
    [
        ((32, 32, 3), 32),
        ((84, 84, 3), 84),
        ((40, 57, 3), 12),
        ((57, 40, 1), 61),
        ((90, 90, 1), 6),
        ((1350, 3, 1), 7),
    ],
)
def test_crop_is_pillows_in_every_pixel(shape, size):
    Image = pytest.importorskip("PIL.Image")
    x = images(0, 60, shape)
    boxes = random_boxes(1, len(x), *shape[:2])
    got = jax.jit(jax.vmap(lambda x, box: photo.crop(x, box, size)))(floats(x), jnp.array(boxes))
    assert got.shape == (60, size, size, shape[2])
    for image, box, mine in zip(x, boxes, got, strict=True):
        top, left, height, width = map(int, box)
        part = pil(image).crop((left, top, left + width, top + height))
        resized = lambda x, *sides: x.resize(sides, Image.Resampling.BILINEAR)
        both = array(resized(part, size, size))
        # Pillow 13 begins with the vertical pass where the height shrinks far more than the width.
        np.testing.assert_allclose(mine, both, atol=1 if height > size else 0)
        np.testing.assert_array_equal(mine, array(resized(resized(part, size, height), size, size)))


FACTORS = {"the paper's": (0.6, 1.4), "interpolating": (0.0, 1.0), "any": (-2.0, 4.0)}


@pytest.mark.parametrize("low_high", FACTORS.values(), ids=FACTORS)
@pytest.mark.parametrize("channels", [1, 3])
def test_jitter_is_pillows_in_every_pixel(channels, low_high):
    ImageEnhance = pytest.importorskip("PIL.ImageEnhance")
    x = images(2, 300, (11, 13, channels))
    factors = np.random.default_rng(3).uniform(*low_high, (len(x), 3)).astype(np.float32)
    # Short fractions are where sums are whole numbers or next to them.
    factors[::3] = np.round(factors[::3] * 20) / 20
    got = jax.jit(jax.vmap(lambda x, f: photo.enhance(x, *f)))(floats(x), jnp.array(factors))
    for image, three, mine in zip(x, factors, got, strict=True):
        want = pil(image)
        steps = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)
        for step, factor in zip(steps, three, strict=True):
            want = step(want).enhance(float(factor))
        np.testing.assert_array_equal(mine, array(want))


def test_blend_is_pillows_for_every_byte():
    """At many factors, also those whose products are next to whole numbers."""
    ImageEnhance = pytest.importorskip("PIL.ImageEnhance")
    ramp = np.arange(256, dtype=np.uint8).reshape(16, 16, 1)
    wholes = np.arange(1, 256) / np.arange(255, 0, -1)
    factors = np.concatenate([wholes, np.linspace(0.6, 1.4, 500)]).astype(np.float32)
    got = jax.jit(jax.vmap(lambda f: photo.enhance(floats(ramp), f, 1.0, 1.0)))(factors)
    darker = ImageEnhance.Brightness(pil(ramp))
    want = [array(darker.enhance(float(factor))) for factor in factors]
    np.testing.assert_array_equal(got, np.stack(want))


def test_grey_is_pillows():
    x = images(4, 1, (64, 64, 3))[0]
    np.testing.assert_array_equal(photo.grey(floats(x)), array(pil(x).convert("L")))


def test_x64_changes_nothing(x64):
    x = images(5, 1, (20, 24, 3))[0]
    box = jnp.array([3, 2, 15, 17])
    both = jax.jit(lambda x: (photo.crop(x, box, 9), photo.enhance(x, 1.3, 0.7, 1.1)))
    single, double = both(jnp.asarray(x, jnp.float32)), both(jnp.asarray(x, jnp.float64))
    for one, two in zip(single, double, strict=True):
        assert (one.dtype, two.dtype) == (jnp.float32, jnp.float64)
        np.testing.assert_array_equal(one, two)


# --- identities -----------------------------------------------------------------------------


def test_the_whole_image_at_its_size_is_itself():
    x = floats(images(6, 1, (30, 30, 3))[0])
    np.testing.assert_array_equal(photo.crop(x, jnp.array([0, 0, 30, 30]), 30), x)


def test_factors_of_one_and_zero():
    x = floats(images(7, 1, (9, 8, 3))[0])
    np.testing.assert_array_equal(photo.enhance(x, 1.0, 1.0, 1.0), x)
    np.testing.assert_array_equal(photo.enhance(x, 0.0, 1.0, 1.0), jnp.zeros_like(x))
    np.testing.assert_array_equal(
        photo.enhance(x, 1.0, 1.0, 0.0), jnp.broadcast_to(photo.grey(x), x.shape)
    )
    mean = int(np.mean(photo.grey(x)) + 0.5)
    np.testing.assert_array_equal(photo.enhance(x, 1.0, 0.0, 1.0), jnp.full_like(x, mean))


@pytest.mark.parametrize(
    "transform",
    [photo.random_resized_crop, photo.jitter, photo.flip, photo.baseline],
    ids=lambda transform: transform.__name__,
)
def test_jit_is_eager(transform):
    x = floats(images(8, 4, (16, 16, 3)))
    made = lambda: jax.random.split(jax.random.key(9), len(x))
    eager = jnp.stack([transform(key, image) for key, image in zip(made(), x, strict=True)])
    np.testing.assert_array_equal(jax.jit(jax.vmap(transform))(made(), x), eager)
    assert eager.dtype == x.dtype
    assert eager.min() >= 0
    assert eager.max() <= 255
    np.testing.assert_array_equal(eager, jnp.round(eager))


# --- laws -----------------------------------------------------------------------------------


def boxes_of(n, height, width):
    keys = jax.random.split(jax.random.key(10), n)
    boxes = jax.jit(jax.vmap(lambda key: photo.crop_box(key, height, width)))(keys)
    return np.asarray(boxes).T


@pytest.mark.usefixtures("quick_compile")
@pytest.mark.parametrize(("height", "width"), [(84, 84), (100, 150)])
def test_boxes_lie_inside_and_keep_area_and_aspect(height, width):
    top, left, h, w = boxes_of(20_000, height, width)
    assert min(top.min(), left.min(), (height - top - h).min(), (width - left - w).min()) == 0
    # A rounded side is within half a pixel of the drawn one.
    area = height * width
    assert np.all((h + 0.5) * (w + 0.5) >= 0.08 * area)
    assert np.all((w + 0.5) / (h - 0.5) >= 3 / 4)
    assert np.all((w - 0.5) / (h + 0.5) <= 4 / 3)
    assert h.min() < 0.31 * height
    assert h.max() == height


@pytest.mark.usefixtures("quick_compile")
def test_sides_and_places_follow_torchvisions_law():
    """Against its loop in NumPy, by mean and deciles; corners uniform over the room there is."""
    rng = np.random.default_rng(11)
    n, side = 20_000, 1000
    want = []
    while len(want) < n:
        area = rng.uniform(0.08, 1) * side * side
        aspect = np.exp(rng.uniform(np.log(3 / 4), np.log(4 / 3)))
        h, w = round(np.sqrt(area / aspect)), round(np.sqrt(area * aspect))
        if h <= side and w <= side:
            want.append((h, w))
    top, left, h, w = boxes_of(n, side, side)
    share = np.linspace(0.1, 0.9, 9)
    for mine, theirs in zip((h, w), np.transpose(want), strict=True):
        np.testing.assert_allclose(np.quantile(mine, share), np.quantile(theirs, share), atol=12)
    # Wide boxes are as many as tall ones.
    assert abs(np.mean(w > h) - 0.5) < 0.02
    for corner, room in ((top, side - h), (left, side - w)):
        place = ((corner + 0.5) / (room + 1))[room > 99]
        np.testing.assert_allclose(np.quantile(place, share), share, atol=0.02)
    assert abs(np.corrcoef(top / (side - h + 1), left / (side - w + 1))[0, 1]) < 0.03


@pytest.mark.usefixtures("quick_compile")
@pytest.mark.parametrize(
    ("height", "width", "box"), [(4, 200, (0, 97, 4, 5)), (200, 4, (97, 0, 5, 4))]
)
def test_the_centre_is_taken_where_nothing_fits(height, width, box):
    boxes = boxes_of(50, height, width)
    np.testing.assert_array_equal(boxes.T, np.broadcast_to(box, (50, 4)))


@pytest.mark.usefixtures("quick_compile")
def test_the_first_box_that_fits_counts():
    sides, found = photo.box_sides(jnp.array([1.0, 0.5, 0.1]), jnp.array([4 / 3, 1.0, 1.0]), 20, 20)
    assert found
    assert sides.tolist() == [14, 14]
    sides, found = photo.box_sides(jnp.array([1.0, 1.0]), jnp.array([4 / 3, 3 / 4]), 20, 20)
    assert not found
    assert sides.tolist() == [20, 20]


@pytest.mark.usefixtures("quick_compile")
def test_half_of_the_images_are_flipped():
    x = jnp.arange(12.0).reshape(2, 3, 2)
    keys = jax.random.split(jax.random.key(12), 4000)
    out = np.asarray(jax.jit(jax.vmap(lambda key: photo.flip(key, x)))(keys))
    flipped = np.all(out == np.asarray(x)[:, ::-1], axis=(1, 2, 3))
    assert np.all(out[~flipped] == np.asarray(x))
    assert abs(flipped.mean() - 0.5) < 4 * 0.5 / np.sqrt(4000)


@pytest.mark.usefixtures("quick_compile")
def test_jitter_draws_three_independent_factors(monkeypatch):
    monkeypatch.setattr(photo, "enhance", lambda image, *factors: jnp.stack(factors))
    keys = jax.random.split(jax.random.key(13), 4000)
    factors = np.asarray(jax.vmap(lambda key: photo.jitter(key, jnp.zeros((2, 2, 3))))(keys))
    assert factors.min() >= 0.6 - 1e-6
    assert factors.max() <= 1.4 + 1e-6
    share = np.linspace(0, 1, 11)
    for factor in factors.T:
        np.testing.assert_allclose(np.quantile(factor, share), 0.6 + 0.8 * share, atol=0.03)
    np.testing.assert_allclose(np.corrcoef(factors.T), np.eye(3), atol=0.06)


@pytest.mark.usefixtures("quick_compile")
def test_baseline_crops_then_jitters_then_flips_as_pillow_does():
    """Baseline++'s order, each with its own part of the key."""
    Image, ImageEnhance = (pytest.importorskip(f"PIL.{name}") for name in ("Image", "ImageEnhance"))
    x, side, flipped = images(20, 40, (24, 24, 3)), 24, 0
    keys = lambda: jax.random.split(jax.random.key(21), len(x))
    got = jax.jit(jax.vmap(photo.baseline))(keys(), floats(x))
    for key, image, mine in zip(keys(), x, got, strict=True):
        k_crop, k_jitter, k_flip = jax.random.split(key, 3)
        top, left, height, width = map(int, photo.crop_box(k_crop, side, side))
        want = pil(image).crop((left, top, left + width, top + height))
        want = want.resize((side, height), Image.Resampling.BILINEAR)  # as `crop`, side by side
        want = want.resize((side, side), Image.Resampling.BILINEAR)
        factors = 0.6 + 0.8 * np.asarray(jax.random.uniform(k_jitter, (3,), jnp.float32))
        steps = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)
        for step, factor in zip(steps, factors, strict=True):
            want = step(want).enhance(float(factor))
        if jax.random.bernoulli(k_flip):
            want, flipped = want.transpose(Image.Transpose.FLIP_LEFT_RIGHT), flipped + 1
        # a factor rounded otherwise in its last bit is worth one grey level
        np.testing.assert_allclose(mine, array(want), atol=1)
        assert (np.asarray(mine) == array(want)).mean() > 0.99
    assert 5 < flipped < 35


# --- tasks ----------------------------------------------------------------------------------


def task_of(support, query, mean=MEAN, std=STD):
    """A task of normalised images `uint8 [n, h, w, c]`, all of label 0 of 2."""
    part = lambda x: Examples(
        normalise(jnp.asarray(x), mean, std), jnp.eye(2)[jnp.zeros(len(x), int)]
    )
    return Task(part(support), part(query))


def photographed(task, *options):
    method = photo.photo_augment(MEAN, STD, *options)(maml(small_conv(), lr=0.1, steps=1))
    assert method.augment is not None
    return jax.jit(method.augment)(jax.random.key(14), task)


def levels(x):
    return (np.asarray(x) * np.asarray(STD) + np.asarray(MEAN)) * 255


def test_a_methods_tasks_are_normalised_whole_numbers():
    task = task_of(images(15, 3, (16, 16, 3)), images(16, 5, (16, 16, 3)))
    after = photographed(task)
    for old, new in zip(task, after, strict=True):
        assert new.x.shape == old.x.shape
        assert new.x.dtype == old.x.dtype
        np.testing.assert_array_equal(new.y, old.y)
        pixels = levels(new.x)
        np.testing.assert_allclose(pixels, np.round(pixels), atol=1e-3)
        assert pixels.min() > -0.01
        assert pixels.max() < 255.01
        assert not np.allclose(new.x, old.x)


def test_a_transform_gets_the_very_pixels():
    x = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1).repeat(3, axis=-1)
    task = task_of(x, x)
    after = photographed(task, lambda key, image: image)
    for old, new in zip(task, after, strict=True):
        np.testing.assert_allclose(new.x, old.x, atol=1e-6)
        np.testing.assert_array_equal(np.round(levels(new.x)), x)


def test_every_image_of_a_task_has_a_key_of_its_own():
    x = np.zeros((40, 2, 2, 3), np.uint8)
    random = lambda key, image: jax.random.randint(key, image.shape, 0, 256).astype(image.dtype)
    after = photographed(task_of(x, x), random)
    values = np.concatenate([np.round(levels(part.x)) for part in after]).reshape(80, -1)
    assert max(Counter(map(tuple, values)).values()) == 1
    between = np.corrcoef(values[:40].ravel(), values[40:].ravel())[0, 1]
    assert abs(between) < 4 / np.sqrt(40 * 12)


def test_it_follows_what_changes_tasks_already():
    x = np.full((2, 4, 4, 3), 100, np.uint8)

    def darken(key, task):
        return Task(
            *(part._replace(x=normalise(levels_of(part.x) / 2, MEAN, STD)) for part in task)
        )

    levels_of = lambda x: jnp.round((x * STD + MEAN) * 255)
    method = augment(darken)(maml(small_conv(), lr=0.1, steps=1))
    method = photo.photo_augment(MEAN, STD, lambda key, image: image + 3)(method)
    assert method.augment is not None
    after = method.augment(jax.random.key(17), task_of(x, x))
    np.testing.assert_allclose(levels(after.query.x), 53, atol=1e-3)


# --- refusals -------------------------------------------------------------------------------


def test_refusals_name_what_was_asked():
    flat = Examples(jnp.zeros((4, 7)), jnp.eye(2)[jnp.array([0, 0, 1, 1])])
    with pytest.raises(ValueError, match=r"Photographic transforms.*shape \(7,\) are not images"):
        photographed(Task(flat, flat))
    with pytest.raises(ValueError, match="images with 4 channels was asked for, but only 1"):
        photo.baseline(jax.random.key(18), jnp.zeros((8, 8, 4)))
    with pytest.raises(ValueError, match="strength=-1 was asked for"):
        photo.jitter(jax.random.key(19), jnp.zeros((8, 8, 3)), -1)
    with pytest.raises(ValueError, match="size=0 was asked for"):
        photo.random_resized_crop(jax.random.key(20), jnp.zeros((8, 8, 3)), 0)
