"""Meta-MaxUp (Ni et al. 2021): of several augmented copies of a task the worst one counts.

A pool holds `key, task -> task` changes of support, query or classes. Labels are class
probabilities, so that a mixed image has a mixed label.
"""

from collections.abc import Callable, Sequence
from functools import partial

import jax
import jax.numpy as jnp

from mgaug_jax.augmentations import check_images, turn_classes
from mgaug_jax.checks import check_count, check_function
from mgaug_jax.judging import with_judge
from mgaug_jax.losses import squared_error
from mgaug_jax.meta import adapted_loss
from mgaug_jax.types import Array, Examples, Make, MetaParams, Modifier, Net, Task

Change = Callable[[Array, Task], Task]
Level = Callable[[Array], Array]
"""`losses [m, n] of m copies and n queries -> scalar`."""


def by_task(losses: Array) -> Array:
    """`max_j mean_q l_jq`: the worst copy of the task, as Meta-MaxUp is usually stated."""
    return jnp.max(jnp.mean(losses, axis=1))


def by_query(losses: Array) -> Array:
    """`mean_q max_j l_jq`: the worst copy of every query, as released."""
    return jnp.mean(jnp.max(losses, axis=0))


def maxup(
    *, pool: Sequence[Change] | None = None, copies: int = 4, level: Level = by_task
) -> Modifier:
    """The outer loss is the worst over `copies` of the task, each changed by a draw from the pool.

    Draws are per task and network, where the released code draws the change once per batch. What a
    step reports as accuracy is that of the first copy. How many copies of which pool MGAug's row
    has is not known; the defaults, the source's, are our reading.

    Args:
      pool: Changes; the released six unless given, which take classes: query CutMix, query erase,
        support erase, large rotation, and the first two with large rotation.
      copies: m; with 1 this is plain augmentation.
      level: `by_task` or `by_query`.

    Raises:
      ValueError: `copies` is not a positive integer, the pool is empty, or the released one for a
        regression, the outer loss was replaced already, or (at the first step) the pool's changes
        differ in shape or find no images.
    """
    check_count("copies", copies)
    check_function("level", level, "copies.by_task")
    released = pool is None
    pool = default_pool() if pool is None else pool
    if not isinstance(pool, tuple | list):
        raise ValueError(f"pool={pool!r} must be a tuple of changes, as copies.default_pool().")
    for change in pool:
        check_function("a change", change, "copies.large_rotation")
    if not pool:
        raise ValueError("maxup was given an empty pool; give it a change, or leave it out.")

    def judge(key: Array, net: Net, make: Make, params: MetaParams, task: Task):
        loss = make(net).loss

        def copy(i: Array):
            k_which, k_how, k_adapt = jax.random.split(jax.random.fold_in(key, i), 3)
            changed = _one_of(pool, k_which, k_how, task)
            _, outputs = adapted_loss(k_adapt, net, make, params, changed)
            one = lambda output, y: loss(output[None], y[None])
            return jax.vmap(one)(outputs, changed.query.y), outputs

        losses, outputs = jax.lax.map(copy, jnp.arange(copies))
        return level(losses), outputs[0]

    return with_judge(
        judge,
        lambda net, learner: not (released and learner.loss is squared_error),
        "maxup's own pool turns classes, but this is a regression; give it another pool.",
    )


def _one_of(pool: Sequence[Change], k_which: Array, k_how: Array, task: Task) -> Task:
    """The task, changed by a draw from the pool."""
    shapes = [jax.tree.map(jnp.shape, jax.eval_shape(change, k_how, task)) for change in pool]
    if any(shape != shapes[0] for shape in shapes):
        raise ValueError(
            "maxup draws one change of its pool, but they give tasks of different shapes; put what "
            "adds examples (more_shots) into all of them, with in_turn."
        )
    impl = jax.random.key_impl(k_how)
    # as plain numbers: a batched switch runs every branch, each of which may use the key
    branches = [
        lambda data, task, change=change: change(jax.random.wrap_key_data(data, impl=impl), task)
        for change in pool
    ]
    which = jax.random.randint(k_which, (), 0, len(pool))
    return jax.lax.switch(which, branches, jax.random.key_data(k_how), task)


# --- the pool -------------------------------------------------------------------------------


def default_pool() -> tuple[Change, ...]:
    """The released pool: `qcm, qre, sre, tlr, qcm+tlr, qre+tlr`, classes turned before they mix."""
    return (
        on_query(cutmix),
        on_query(erase),
        on_support(erase),
        large_rotation,
        in_turn(large_rotation, on_query(cutmix)),
        in_turn(large_rotation, on_query(erase)),
    )


def on_query(change: Callable[[Array, Examples], Examples]) -> Change:
    """`change` of the query alone."""
    return lambda key, task: task._replace(query=change(key, task.query))


def on_support(change: Callable[[Array, Examples], Examples]) -> Change:
    """`change` of the support alone."""
    return lambda key, task: task._replace(support=change(key, task.support))


def in_turn(*changes: Change) -> Change:
    """One change after the other, each with a key of its own."""

    def change(key: Array, task: Task) -> Task:
        for one, k in zip(changes, jax.random.split(key, len(changes)), strict=True):
            task = one(k, task)
        return task

    return change


def large_rotation(key: Array, task: Task) -> Task:
    """Every class turned by k quarters, k drawn from {0, 0, 0, 1, 2, 3}."""
    return turn_classes(key, task, 0.5)


def cutmix(key: Array, examples: Examples) -> Examples:
    """CutMix: a box of another image, and its label for the box's share of the pixels.

    lambda ~ Beta(2, 2); the box has sides `sqrt(1 - lambda)` of the image's, a uniform centre and
    is cut at the border, after which lambda is the share that is left. One box for all examples;
    partners by a permutation.
    """
    check_images(examples.x, "Mixed images")
    if examples.y.shape[-1] < 2:
        raise ValueError("Images were to be mixed, but their targets are no classes; use erase.")
    k_lam, k_centre, k_pairs = jax.random.split(key, 3)
    side = jnp.sqrt(1 - jax.random.beta(k_lam, 2.0, 2.0))
    inside = _box(k_centre, examples.x.shape[1:3], jnp.stack([side, side]))
    other = jax.random.permutation(k_pairs, len(examples.x))
    lam = 1 - jnp.mean(inside, dtype=examples.y.dtype)
    x = jnp.where(inside[..., None], examples.x[other], examples.x)
    return Examples(x, lam * examples.y + (1 - lam) * examples.y[other])


def erase(key: Array, examples: Examples) -> Examples:
    """Random erase: of every image, with probability 1/2, a box of 2 to 40 % of the area and aspect
    .3 to 3.33 becomes 0, the mean of the normalised images (the fill is our reading).
    """
    check_images(examples.x, "Erased images")

    def one(key: Array, x: Array) -> Array:
        k_do, k_area, k_aspect, k_centre = jax.random.split(key, 4)
        area = jax.random.uniform(k_area, (), minval=0.02, maxval=0.4)
        ratio = jnp.exp(
            jax.random.uniform(k_aspect, (), minval=jnp.log(0.3), maxval=jnp.log(10 / 3))
        )
        sides = jnp.minimum(jnp.sqrt(jnp.stack([area * ratio, area / ratio])), 1)
        inside = _box(k_centre, x.shape[:2], sides, whole=True)
        return jnp.where(jax.random.bernoulli(k_do) & inside[..., None], 0, x)

    return examples._replace(x=jax.vmap(one)(jax.random.split(key, len(examples.x)), examples.x))


def self_mix(key: Array, examples: Examples) -> Examples:
    """Self-mix: a patch of half the side, turned by a random quarter, is pasted elsewhere in the
    same image; the label stays. Every image has its own patch; the source has one box for all.
    """
    check_images(examples.x, "Images mixed with themselves")

    def one(key: Array, x: Array) -> Array:
        k_from, k_to, k_turn = jax.random.split(key, 3)
        half = min(x.shape[:2]) // 2
        room = jnp.array(x.shape[:2]) - half + 1
        row, column = jax.random.randint(k_from, (2,), 0, room)
        patch = jax.lax.dynamic_slice(x, (row, column, 0), (half, half, x.shape[2]))
        turns = [partial(jnp.rot90, k=k) for k in range(4)]
        patch = jax.lax.switch(jax.random.randint(k_turn, (), 0, 4), turns, patch)
        row, column = jax.random.randint(k_to, (2,), 0, room)
        return jax.lax.dynamic_update_slice(x, patch, (row, column, 0))

    return examples._replace(x=jax.vmap(one)(jax.random.split(key, len(examples.x)), examples.x))


def more_shots(key: Array, task: Task) -> Task:
    """Shot augmentation: every support example once more, its image moved by up to a tenth of its
    height and width, zeros following, and flipped left to right. The source says flipped and
    cropped; how far is ours.
    """
    x, y = task.support
    check_images(x, "Supports shown once more")
    h, w = (max(1, side // 10) for side in x.shape[1:3])
    padded = jnp.pad(x[:, :, ::-1], ((0, 0), (h, h), (w, w), (0, 0)))
    start = jax.random.randint(key, (len(x), 2), 0, jnp.array([2 * h + 1, 2 * w + 1]))
    crop = lambda x, start, size: jax.lax.dynamic_slice(x, (*start, 0), size)
    moved = jax.vmap(partial(crop, size=x.shape[1:]))(padded, start)
    support = Examples(jnp.concatenate([x, moved]), jnp.concatenate([y, y]))
    return task._replace(support=support)


def _box(key: Array, shape: tuple[int, ...], sides: Array, whole: bool = False) -> Array:
    """`bool [h, w]`, the pixels of a box with `sides [2]` relative to the image's. Its centre is
    uniform over the image, or, for a `whole` box, over where none of it is cut off.
    """
    size = jnp.array(shape)
    length = jnp.round(sides * size)
    place = jax.random.uniform(key, (2,))
    start = jnp.floor(place * (size - length + 1) if whole else place * size - length / 2 + 0.5)
    rows, columns = (
        (jnp.arange(n) >= start[i]) & (jnp.arange(n) < start[i] + length[i])
        for i, n in enumerate(shape)
    )
    return rows[:, None] & columns
