"""What is done to the weights between meta-steps, against loops."""

import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from grid import mlp
from small import assert_close, batch, differ, gradient, params_of, steps, zero

from mgaug_jax import (
    fomaml,
    freeze,
    fresh_optimizer,
    l2,
    maml,
    nets,
    noise,
    outer,
    perturb,
    weight_decay,
)
from mgaug_jax.types import MetaParams

pytestmark = pytest.mark.usefixtures("quick_compile")


def test_weight_decay_shrinks_beside_the_update(x64):
    method = fomaml(mlp(), lr=0.1, steps=1)
    tasks, params = batch(), params_of(method)
    plain = steps(method, optax.adam(1e-2), 1, tasks, params)[0]
    decayed = steps(weight_decay(0.2)(method), optax.adam(1e-2), 1, tasks, params)[0]
    assert_close(decayed, jax.tree.map(lambda p, w: p - 0.2 * w, plain, params.net))
    kernels = weight_decay(0.2, leaves=lambda role: role.prunable)(method)
    some = steps(kernels, optax.adam(1e-2), 1, tasks, params)[0]
    assert_close(some["dense0"]["kernel"], decayed["dense0"]["kernel"])
    assert_close(some["head"], plain["head"])
    assert weight_decay(0.0)(method) is method


def test_a_fresh_adam_steps_by_the_sign(x64):
    method = fomaml(mlp(), lr=0.1, steps=1)
    tasks, params = batch(), params_of(method)
    path = steps(fresh_optimizer(method), optax.adam(1e-2, eps=0.0), 3, tasks, params)
    for before, after in itertools.pairwise([params.net, *path]):
        k_grad, _ = jax.random.split(zero())
        grads, _ = gradient(method, MetaParams(before, {}), tasks, k_grad)
        moved = jax.tree.map(lambda w, g: w - 1e-2 * jnp.sign(g), before, grads.net)
        # where a gradient is zero Adam without eps has 0 / 0; ReLUs that are off are such places
        check = lambda a, m, g: np.testing.assert_allclose(
            np.where(g == 0, m, a), m, rtol=1e-9, atol=1e-12
        )
        jax.tree.map(check, after, moved, grads.net)


@pytest.mark.parametrize("make", [partial(l2, 0.1), partial(weight_decay, 0.1), freeze])
def test_a_choice_of_leaves_that_chooses_none_is_refused(make):
    net = nets.from_functions(lambda key: {"w": jnp.ones((3, 1))}, lambda p, x: x @ p["w"])
    with pytest.raises(
        ValueError, match=r"chooses none of this network's parameters.*leave it out"
    ):
        make(leaves=lambda role: role.head)(maml(net))
    make(leaves=lambda role: role.head)(maml(mlp()))


def largest(w, keep):
    """All but the largest `keep` share of entries at 0, in plain Python."""
    flat = np.array(w).ravel()
    order = sorted(range(flat.size), key=lambda i: -abs(flat[i]))
    for i in order[round(keep * flat.size) :]:
        flat[i] = 0
    return flat.reshape(w.shape)


def test_iterative_hard_thresholding_equals_a_loop(x64):
    method = fomaml(mlp(), lr=0.1, steps=1)
    tasks, params = batch(), params_of(method)
    at = lambda step: outer.iterative_hard_thresholding(0.3, step, every=2)(method)
    path = steps(at, optax.sgd(0.5), 4, tasks, params)
    net = params.net
    for i, got in enumerate(path):
        plain = steps(method, optax.sgd(0.5), 1, tasks, MetaParams(net, {}))[0]
        want = dict(plain)
        if i % 2 == 1:
            for layer in ("dense0", "dense1"):
                want[layer] = {**plain[layer], "kernel": largest(plain[layer]["kernel"], 0.3)}
        else:
            assert not differ(got, plain)
        assert_close(got, want)
        net = got


def test_dense_sparse_dense_goes_through_its_phases(x64):
    method = fomaml(mlp(), lr=0.1, steps=1)
    tasks, params = batch(), params_of(method)
    at = lambda step: outer.dense_sparse_dense(0.4, step, start=2, stop=5)(method)
    path = steps(at, optax.sgd(0.5), 7, tasks, params)
    plain = steps(method, optax.sgd(0.5), 7, tasks, params)
    zeros = [np.asarray(net["dense0"]["kernel"] == 0) for net in path]
    assert not differ(path[0], plain[0])  # dense: the plain method, bit for bit
    want = largest(plain[1]["dense0"]["kernel"], 0.4) == 0
    assert want.sum() == 384 - round(0.4 * 384)
    for net in zeros[1:5]:  # what the steps 2 to 5 start from
        np.testing.assert_array_equal(net, want)
    free = gradient(method, MetaParams(path[3], {}), tasks)[0].net["dense0"]["kernel"] != 0
    assert not (zeros[6] & np.asarray(free)).any()  # dense again


@pytest.mark.parametrize("order", ["before", "after"])
@pytest.mark.parametrize(
    "other", [weight_decay(1e-2), noise(1e-2, site=perturb.outer_update)], ids=["decay", "noise"]
)
def test_thresholding_has_the_last_word_wherever_it_is_put(x64, order, other):
    method = fomaml(mlp(), lr=0.1, steps=1)
    tasks, params = batch(), params_of(method)

    def at(step):
        prune = outer.dense_sparse_dense(0.4, step, start=1, stop=4)
        return other(prune(method)) if order == "before" else prune(other(method))

    path = steps(at, optax.adam(1e-2), 4, tasks, params)
    zeros = [np.asarray(net["dense0"]["kernel"] == 0) for net in path]
    assert zeros[0].sum() == 384 - round(0.4 * 384)
    for later in zeros[1:]:
        np.testing.assert_array_equal(later, zeros[0])
    assert not any((net["head"]["kernel"] == 0).any() for net in path)


def test_thresholding_needs_something_to_prune():
    net = nets.from_functions(lambda key: {"w": jnp.ones((3, 1))}, lambda p, x: x @ p["w"])
    with pytest.raises(ValueError, match="has none to prune"):
        outer.iterative_hard_thresholding(0.5, jnp.zeros(()))(maml(net))


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: weight_decay(-1.0), "rate="),
        (lambda: outer.iterative_hard_thresholding(0.0, 0), "keep="),
        (lambda: outer.iterative_hard_thresholding(0.5, 0, every=0), "every="),
        (lambda: outer.dense_sparse_dense(0.5, 0, start=4, stop=4), "stop=4"),
    ],
)
def test_numbers_that_make_no_sense_are_refused(make, says):
    with pytest.raises(ValueError, match=says):
        make()
