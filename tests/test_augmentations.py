"""Augmentation of tasks: laws of what is drawn, order, identities."""

from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import make_tasks
from grid import mlp
from small import assert_close, batch, differ, gradient, params_of, row, zero

from mgaug_jax import (
    augment,
    maml,
    noise,
    pp,
    rotate_classes,
    shift_targets,
    shuffle_labels,
    taml,
)
from mgaug_jax.augmentations import turn
from mgaug_jax.losses import cross_entropy, squared_error
from mgaug_jax.meta import task_keys
from mgaug_jax.types import Examples, Task

pytestmark = pytest.mark.usefixtures("quick_compile")


def changed(modifier, tasks, seed=0):
    classes = tasks.support.y.shape[-1] > 1
    method = modifier(maml(mlp(), loss=cross_entropy if classes else squared_error))
    keys = task_keys(jax.random.key(seed), tasks)
    return jax.jit(jax.vmap(method.augment))(keys, tasks)


def test_labels_are_shuffled_alike_in_support_and_query_and_uniformly():
    tasks = make_tasks(zero(), 1800, queries=2, shape=(2,))
    after = changed(shuffle_labels(), tasks)
    order = np.argmax(
        np.asarray(after.support.y), axis=-1
    )  # class-major: the new label of every class
    np.testing.assert_array_equal(np.argmax(after.query.y, axis=-1), np.repeat(order, 2, axis=1))
    np.testing.assert_array_equal(after.query.x, tasks.query.x)
    counts = Counter(map(tuple, order))
    assert len(counts) == 6
    assert all(abs(c - 300) < 4.5 * (300 * 5 / 6) ** 0.5 for c in counts.values())


def test_targets_are_shifted_by_one_uniform_draw_per_task():
    part = Examples(jnp.zeros((4000, 3, 1)), jnp.zeros((4000, 3, 1)))
    after = changed(shift_targets(2.0), Task(part, part))
    shift = np.asarray(after.support.y[:, 0, 0])
    assert (after.support.y == shift[:, None, None]).all()
    assert (after.query.y == shift[:, None, None]).all()
    assert np.abs(shift).max() <= 2
    assert abs(shift.mean()) < 4 * 2 / (3 * 4000) ** 0.5
    assert abs(shift.var() - 4 / 3) < 4 * (4 / 3) * (0.8 / 4000) ** 0.5
    assert abs(np.corrcoef(shift[:-1], shift[1:])[0, 1]) < 4 / 4000**0.5


@pytest.mark.parametrize("rate", [0.3, 1.0])
def test_classes_are_turned_whole_and_as_often_as_said(rate):
    tasks = make_tasks(zero(), 200, way=5, queries=2, shape=(4, 4, 1))
    after = changed(rotate_classes(rate), tasks)
    counts = Counter()
    tasks, after = jax.device_get((tasks, after))
    for t in range(200):
        found = []
        for part, moved in ((tasks.support, after.support), (tasks.query, after.query)):
            for i in range(len(part.x[t])):
                turned = [np.rot90(part.x[t, i], k) for k in range(4)]
                match = [k for k in range(4) if (turned[k] == moved.x[t, i]).all()]
                assert len(match) == 1
                found.append((int(np.argmax(part.y[t, i])), match[0]))
        assert len(set(found)) == 5  # one angle for all images of a class
        counts.update(k for _, k in set(found))
    new = 1000 - counts[0]
    assert abs(new - 1000 * rate) <= 4.5 * (1000 * rate * (1 - rate)) ** 0.5
    for k in (1, 2, 3):
        assert abs(counts[k] - new / 3) <= 4.5 * (new * 2 / 9) ** 0.5


def test_labels_and_targets_are_not_mistaken_for_each_other():
    with pytest.raises(ValueError, match="use shuffle_labels"):
        shift_targets()(maml(mlp()))
    part = Examples(jnp.zeros((2, 3, 1)), jnp.zeros((2, 3, 1)))
    for change in (shuffle_labels(), rotate_classes(0.5)):
        with pytest.raises(ValueError, match="no classes; use shift_targets"):
            changed(change, Task(part, part))


def test_turning_needs_square_images():
    with pytest.raises(ValueError, match="not square images"):
        turn(jnp.zeros((2, 4, 5, 1)), jnp.zeros(2, jnp.int32))


def test_augmentations_apply_in_their_order_with_keys_of_their_own():
    part = Examples(jnp.zeros((1, 3, 1)), jnp.zeros((1, 3, 1)))
    seen = []

    def spy(name, factor):
        def change(key, task):
            seen.append((name, key))
            return Task(*(p._replace(y=factor * p.y + 1) for p in task))

        return augment(change)

    method = spy("b", 3.0)(spy("a", 2.0)(maml(mlp())))
    after = method.augment(zero(), row(Task(part, part), 0))
    assert [name for name, _ in seen] == ["a", "b"]
    assert (after.query.y == 3 * 1 + 1).all()
    data = [jax.random.key_data(key).tolist() for _, key in seen]
    assert data[0] != data[1]


@pytest.mark.parametrize("reduce", ["full", "views"])
def test_every_network_sees_the_same_augmented_tasks(x64, reduce):
    method = maml(mlp(), lr=0.5, steps=1)
    if reduce == "views":
        method = pp(keep=1.0, cap=1.0, subnets=2)(method)
    tasks, params = batch(3), params_of(method)
    keys = task_keys(jax.random.split(zero(), 5)[3], tasks)
    ready = jax.vmap(shuffle_labels()(method).augment)(keys, tasks)
    got = gradient(shuffle_labels()(method), params, tasks)
    assert_close(got, gradient(method, params, ready))
    assert differ(got[0], gradient(method, params, tasks)[0])


@pytest.mark.parametrize("change", [rotate_classes, taml.inequality, taml.entropy])
def test_a_change_of_no_strength_leaves_all_draws_as_they_are(x64, change):
    """Also those of masks, and also where the strength is traced, as in a sweep."""
    method = noise(0.1)(pp(keep=0.5, subnets=2)(maml(mlp(), lr=0.5, steps=1)))
    tasks, params = batch(3), params_of(method)
    found = jax.jit(lambda rate: gradient(change(rate)(method), params, tasks)[0])(jnp.zeros(()))
    assert_close(found, gradient(method, params, tasks)[0])
    assert change(0.0)(method) is method


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: shift_targets(0), "width=0"),
        (lambda: rotate_classes(1.5), "rate=1.5"),
    ],
)
def test_numbers_that_make_no_sense_are_refused(make, says):
    with pytest.raises(ValueError, match=says):
        make()
