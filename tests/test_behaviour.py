"""MMCA distributions, hat graphs and Grad-CAM: against formulas and loops written out."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import make_tasks, small_conv

from mgaug_jax import behaviour, fomaml, nets, protonet, pruning
from mgaug_jax.losses import accuracy, cross_entropy
from mgaug_jax.meta import subnet, view
from mgaug_jax.types import MetaParams

pytestmark = pytest.mark.usefixtures("quick_compile")
LR, STEPS = 0.3, 3


def floats(tree):
    return jax.tree.map(lambda leaf: leaf.astype(float), tree)


def perceptron():
    inner = nets.mlp((12,), inputs=64, outputs=3)
    return inner._replace(apply=lambda params, x: inner.apply(params, x.reshape(len(x), -1)))


@pytest.fixture
def problem(x64):
    """A method, meta-parameters and a task, in float64."""
    method = fomaml(perceptron(), lr=LR, steps=STEPS)
    params = MetaParams(floats(method.net.init(jax.random.key(0))), {})
    tasks = floats(make_tasks(jax.random.key(1), 1, 3, queries=6, shape=(8, 8, 1)))
    return method, params, jax.tree.map(lambda leaf: leaf[0], tasks)


def by_hand(net, params, task, mask):
    """Accuracies at every inner step of the network cut by `mask`, its weights cut beforehand."""
    theta = jax.tree.map(jnp.multiply, params, mask)
    loss = lambda theta: cross_entropy(net.apply(theta, task.support.x), task.support.y)
    found = []
    for _ in range(STEPS + 1):
        found.append(accuracy(net.apply(theta, task.query.x), task.query.y))
        grads = jax.grad(loss)(theta)
        theta = jax.tree.map(lambda w, g, m: w - LR * g * m, theta, grads, mask)
    return np.array(found)


@pytest.mark.parametrize("keep", [0.8, 0.98, 1.0])
def test_the_threshold_is_that_of_what_is_pruned(problem, keep):
    method, params, task = problem
    layers = behaviour.mmca(method, jax.random.key(2), params, task, keep)
    grads = view(method, jax.random.key(2), params, task).grads.net
    probe = behaviour.shown(method, jax.random.key(2), params, task)
    mask = pruning.catfish()(jax.random.key(3), method.net, params.net, probe, jnp.asarray(keep))
    (name,) = layers
    layer, (first, second) = layers[name], name.split("/")
    scores = np.abs(grads[first][second] * params.net[first][second]).ravel()
    np.testing.assert_allclose(layer.scores, scores, rtol=1e-12)
    np.testing.assert_array_equal(layer.kept, np.ravel(mask[first][second]) == 1)
    k = int(np.floor(len(scores) * (1 - keep) + 1e-9))
    above = layer.scores > layer.threshold
    np.testing.assert_array_equal(above, ~layer.kept)
    assert above.sum() <= max(k - 1, 0)  # fewer where scores are equal
    assert layer.threshold == np.sort(scores)[::-1][max(k - 1, 0)]


def test_every_prunable_layer_is_named(problem):
    method = fomaml(small_conv(), lr=0.1, steps=1)
    params = MetaParams(method.net.init(jax.random.key(0)), {})
    task = jax.tree.map(lambda leaf: leaf[0], make_tasks(jax.random.key(1)))
    got = jax.eval_shape(partial(behaviour.mmca, method), jax.random.key(0), params, task, 0.9)
    assert list(got) == [f"conv{i}/kernel" for i in range(4)]


def test_fine_tuning_equals_a_loop(problem):
    method, params, task = problem
    whole = jax.tree.map(lambda leaf: jnp.ones(()), params.net)
    got = behaviour.fine_tuning(method, jax.random.key(0), params, task)
    np.testing.assert_allclose(got, by_hand(method.net, params.net, task, whole), rtol=1e-12)
    assert got[-1] > got[0]


@pytest.mark.parametrize("pruner", [pruning.catfish(), pruning.random_parameters(), pruning.width])
def test_a_hat_is_fine_tuning_of_the_networks_that_are_left(problem, pruner):
    method, params, task = problem
    fixed = lambda key, *rest: pruner(jax.random.key(9), *rest)
    keeps = jnp.array([1.0, 0.7, 0.4])
    got = behaviour.hat(method, fixed, jax.random.key(4), params, task, keeps)
    np.testing.assert_array_equal(got.pruned[0], got.full)
    probe = behaviour.shown(method, jax.random.key(5), params, task)
    for keep, row in zip(keeps, got.pruned, strict=True):
        mask = fixed(None, method.net, params.net, probe, keep)
        assert (min(float(jnp.mean(leaf)) for leaf in jax.tree.leaves(mask)) < 1) == (keep < 1)
        np.testing.assert_allclose(row, by_hand(method.net, params.net, task, mask), rtol=1e-12)


def test_a_method_without_inner_steps_is_refused(problem):
    _, params, task = problem
    with pytest.raises(ValueError, match="this method has none"):
        behaviour.fine_tuning(protonet(perceptron()), jax.random.key(0), params, task)


# --- Grad-CAM -------------------------------------------------------------------------------


def staged(head):
    """Block 0: K maps `tanh(a_k x)` of an image; block 1: `head`."""

    def part(params, h, first, last):
        if first == 0:
            h = jnp.tanh(h * params["a"])
        return head(params, h) if last == 2 else h

    made = nets.from_functions(lambda key: {}, lambda params, x: part(params, x, 0, 2))
    return made._replace(part=part, depth=2)


def test_grad_cam_equals_numpy(x64):
    """Logits `sum_hwk v_hwkc A_hwk^2`, whose gradient is 2 v A."""
    rng = np.random.default_rng(0)
    n, h, w, k, c = 4, 3, 5, 2, 3
    params = {"a": rng.normal(size=k), "v": rng.normal(size=(h, w, k, c))}
    x, classes = rng.normal(size=(n, h, w, 1)), np.eye(c)[[0, 2, 1, 2]]
    net = staged(lambda params, maps: jnp.einsum("nhwk,hwkc->nc", maps**2, params["v"]))
    got = behaviour.grad_cam(net, params, jnp.asarray(x), jnp.asarray(classes), 1)
    for i in range(n):
        maps = np.tanh(x[i] * params["a"])
        slope = 2 * maps * params["v"][..., classes[i].argmax()]
        want = np.maximum((slope.mean((0, 1)) * maps).sum(-1), 0)
        want -= want.min()
        np.testing.assert_allclose(got[i], want / (want.max() + 1e-7), rtol=1e-9, atol=1e-12)
    assert got.max() > 0.99


def test_grad_cam_of_a_mean_is_the_class_activation_map(x64):
    """With a linear head on the mean over positions it is the map weighted by the head (CAM)."""
    rng = np.random.default_rng(1)
    params = {"a": rng.normal(size=3), "v": rng.normal(size=(3, 2))}
    x = rng.normal(size=(2, 4, 4, 1))
    net = staged(lambda params, maps: maps.mean((1, 2)) @ params["v"])
    got = behaviour.grad_cam(net, params, jnp.asarray(x), jnp.eye(2), 1)
    for i in range(2):
        cam = np.maximum(np.tanh(x[i] * params["a"]) @ params["v"][:, i] / 16, 0)
        cam -= cam.min()
        np.testing.assert_allclose(got[i], cam / (cam.max() + 1e-7), rtol=1e-9, atol=1e-12)


def test_grad_cam_of_a_sub_network_is_that_of_the_cut_weights(x64):
    net = small_conv()
    params = floats(net.init(jax.random.key(0)))
    x, classes = jax.random.normal(jax.random.key(1), (6, 16, 16, 1)), jnp.eye(3)[jnp.arange(6) % 3]
    mask = jax.tree.map(
        lambda leaf: (jax.random.uniform(jax.random.key(2), leaf.shape) < 0.7).astype(float), params
    )
    go = lambda net, params: behaviour.grad_cam(net, params, x, classes, 1)
    cut = go(net, jax.tree.map(jnp.multiply, params, mask))
    np.testing.assert_allclose(go(subnet(net, mask), params), cut, rtol=1e-9, atol=1e-12)
    assert cut.shape == (6, 8, 8)
    assert np.abs(cut - go(net, params)).max() > 0.1


def test_grad_cam_refuses_what_has_no_maps():
    x, classes = jnp.zeros((2, 64)), jnp.eye(2)
    bare = nets.from_functions(lambda key: {}, lambda params, x: x)
    with pytest.raises(ValueError, match="names none"):
        behaviour.grad_cam(bare, {}, x, classes, 1)
    dense = nets.mlp((4, 4), inputs=64, outputs=2)
    params = dense.init(jax.random.key(0))
    with pytest.raises(ValueError, match=r"block=3 must be from 1 to"):
        behaviour.grad_cam(dense, params, x, classes, 3)
    with pytest.raises(ValueError, match="there are vectors"):
        behaviour.grad_cam(dense, params, x, classes, 1)
