"""Sampling few-shot tasks inside `jit`, from images that lie on the device.

Support and query are class-major: the K (or Q) examples of label 0 first, then those of label 1.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mgaug_jax.checks import check_count, check_function
from mgaug_jax.types import Array, Examples, Task


class Images(NamedTuple):
    """Images of one split, class-major.

    Attributes:
      pixels: `uint8 [C, M, h, w, c]`; classes with fewer than M images are padded.
      counts: `int32 [C]`, images of each class.
      mean, std: `[c]`, of pixels scaled to [0, 1].
    """

    pixels: Array
    counts: Array
    mean: Array
    std: Array


Choose = Callable[[Array, int, int], Array]
"""`(key, C, W) -> classes [W]`; the class at position n gets label n."""


def mutually_exclusive(key: Array, classes: int, way: int) -> Array:
    """ME: any W distinct classes in any order, so that a class has no label of its own."""
    return jax.random.choice(key, classes, (way,), replace=False)


def fixed_labels(key: Array, classes: int, way: int) -> Array:
    """NME-A (MR-MAML, MetaMix): classes fall into W pools of neighbours, pool n always has label n;
    a task takes one class of each. The first C mod W pools hold one class more.
    """
    sizes = np.full(way, classes // way) + (np.arange(way) < classes % way)
    starts = np.cumsum(sizes) - sizes
    return jax.random.randint(key, (way,), starts, starts + sizes)


def fixed_groups(key: Array, classes: int, way: int) -> Array:
    """NME-B (meta-augmentation): floor(C / W) groups of W neighbours, each one task with fixed
    labels; the C mod W last classes are never used.
    """
    group = jax.random.randint(key, (), 0, classes // way)
    return group * way + jnp.arange(way)


def shuffled_groups(key: Array, classes: int, way: int) -> Array:
    """One of the groups of `fixed_groups`, its classes in random order."""
    k_group, k_order = jax.random.split(key)
    return jax.random.permutation(k_order, fixed_groups(k_group, classes, way))


def normalise(pixels: Array, mean: Array, std: Array) -> Array:
    """uint8 to floats: `(pixels / 255 - mean) / std`."""
    return (pixels.astype(mean.dtype) / 255 - mean) / std


def sample_task(
    key: Array,
    images: Images,
    way: int,
    shot: int,
    queries: int,
    choose: Choose = mutually_exclusive,
) -> Task:
    """One task: `W K` support and `W Q` query images, none in both, with one-hot labels.

    Sizes are static; whether the data can serve them is for `check` to say, before tracing.
    """
    k_classes, k_images = jax.random.split(key)
    classes = choose(k_classes, len(images.counts), way)

    def draw(key: Array, count: Array) -> Array:
        """Indices of K + Q different images, the padding last."""
        order = jax.random.uniform(key, (images.pixels.shape[1],))
        order = jnp.where(jnp.arange(len(order)) < count, order, jnp.inf)
        return jnp.argsort(order)[: shot + queries]

    drawn = jax.vmap(draw)(jax.random.split(k_images, way), images.counts[classes])
    x = normalise(images.pixels[classes[:, None], drawn], images.mean, images.std)
    eye = jnp.eye(way, dtype=x.dtype)

    def part(x: Array) -> Examples:
        return Examples(x.reshape(-1, *x.shape[2:]), jnp.repeat(eye, x.shape[1], axis=0))

    return Task(part(x[:, :shot]), part(x[:, shot:]))


def sampler(
    way: int, shot: int, queries: int, tasks: int, choose: Choose = mutually_exclusive
) -> Callable[[Array, Images], Task]:
    """`sample(key, images) -> tasks`, a meta-batch with leading axis T; task t depends on t and the
    key alone.

    Raises:
      ValueError: A size is not a positive integer, way is 1, or `choose` no function.
    """
    check_function("choose", choose, "episodes.mutually_exclusive")
    check_count("way", way, 2)
    for name, value in (("shot", shot), ("queries", queries), ("tasks", tasks)):
        check_count(name, value)

    def sample(key: Array, images: Images) -> Task:
        keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(tasks))
        return jax.vmap(lambda key: sample_task(key, images, way, shot, queries, choose))(keys)

    return sample


def with_rotations(images: Images) -> Images:
    """Every class, then every class turned by 90, by 180 and by 270 degrees, as classes of their
    own: `[4 C, M, h, w, c]`, h = w. Omniglot's usual training set (Vinyals et al. 2016).

    Raises:
      ValueError: The images are not square.
    """
    if images.pixels.shape[2] != images.pixels.shape[3]:
        raise ValueError("Turned classes were asked for, but the images are not square.")
    turned = [jnp.rot90(images.pixels, turns, axes=(2, 3)) for turns in range(4)]
    return images._replace(pixels=jnp.concatenate(turned), counts=jnp.tile(images.counts, 4))


def check(images: Images, way: int, shot: int, queries: int, name: str = "this split") -> None:
    """Refuses tasks that the data cannot serve.

    Raises:
      ValueError: More ways than classes, or more images per class than the smallest class has.
    """
    classes = len(images.counts)
    if way > classes:
        raise ValueError(f"way={way} was asked for, but {name} has {classes} classes; lower --way.")
    least = int(jnp.min(images.counts))
    if shot + queries > least:
        raise ValueError(
            f"shot + queries = {shot} + {queries} images per class were asked for, but a class of "
            f"{name} has only {least}; lower --shot or --queries."
        )


def permute_labels(key: Array, task: Task) -> Task:
    """The task with its labels shifted cyclically by a random number in 1..W-1: the same in support
    and query, and no class keeps its label.
    """
    way = task.support.y.shape[-1]
    shift = jax.random.randint(key, (), 1, way)
    return Task(*(part._replace(y=jnp.roll(part.y, shift, axis=-1)) for part in task))
