"""Small problems in float64, and what several test files do with them."""

from functools import partial

import jax
import numpy as np
from conftest import make_tasks

from mgaug_jax import meta_gradient, trainer
from mgaug_jax.nets.adapters import net_of
from mgaug_jax.nets.backbones import ConvNet, conv_roles


def zero():
    """A key that was not used yet."""
    return jax.random.key(0)


def conv(way=3):
    return net_of(ConvNet(way, 4, 2), (8, 8, 1), conv_roles, depth=2)


def floats(tree):
    return jax.tree.map(lambda leaf: leaf.astype(float), tree)


def batch(tasks=2, queries=2, seed=1, shape=(8, 8, 1)):
    return floats(make_tasks(jax.random.key(seed), tasks, queries=queries, shape=shape))


def params_of(method, seed=0):
    return floats(method.algorithm(method.net, method.inner).init(jax.random.key(seed)))


def gradient(method, params, tasks, key=None):
    key = zero() if key is None else key
    return jax.jit(partial(meta_gradient, method))(key, params, tasks)


def row(tree, i):
    return jax.tree.map(lambda leaf: leaf[i], tree)


def assert_close(got, want, rtol=1e-9, atol=1e-12):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=atol), got, want)


def differ(a, b) -> bool:
    return any((x != y).any() for x, y in zip(*map(jax.tree.leaves, (a, b)), strict=True))


def steps(method, optimizer, count, tasks, params):
    """Network parameters after every one of `count` meta-steps on the same tasks."""
    learner = trainer(method, optimizer)
    state = learner.init(zero())
    state = state._replace(params=params)
    go, path = jax.jit(learner.step), []
    for _ in range(count):
        state, _ = go(zero(), state, tasks)
        path.append(state.params.net)
    return path
