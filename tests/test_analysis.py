"""Line losses, diversity, similarity and gain, settling: against loops in numpy."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import make_tasks

from mgaug_jax import analysis, fomaml, maml, nets, noise, probe_gradients, view
from mgaug_jax.losses import squared_error
from mgaug_jax.types import Examples, MetaParams, Task

pytestmark = pytest.mark.usefixtures("quick_compile")


def mlp(outputs=3):
    inner = nets.mlp((6,), inputs=64, outputs=outputs)
    return inner._replace(apply=lambda params, x: inner.apply(params, x.reshape(len(x), -1)))


def floats(tree):
    return jax.tree.map(lambda leaf: leaf.astype(float), tree)


def row(tree, i):
    return jax.tree.map(lambda leaf: leaf[i], tree)


def flat(tree):
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])


def problem(method, tasks=3):
    params = floats(method.algorithm(method.net, method.inner).init(jax.random.key(0)))
    return params, floats(make_tasks(jax.random.key(1), tasks, 3, shape=(8, 8, 1)))


def test_line_losses_are_losses_after_unperturbed_adaptation(x64):
    method = fomaml(mlp(), lr=0.2, steps=2)
    a, tasks = problem(method)
    b = jax.tree.map(lambda w: -w, a)
    at = jnp.array([-0.5, 0.0, 0.3, 1.0])
    go = partial(analysis.line_losses, noise(3.0)(method), jax.random.key(0))
    got = jax.jit(go)(a, b, tasks, at)
    for i, where in enumerate(np.asarray(at)):
        params = jax.tree.map(lambda x, y, s=where: (1 - s) * x + s * y, a, b)
        losses = [view(method, jax.random.key(9), params, row(tasks, t)).loss for t in range(3)]
        np.testing.assert_allclose(got[i], np.mean(losses), rtol=1e-9)


def test_a_barrier_is_what_rises_above_both_ends(x64):
    x = jnp.linspace(0, 1, 101)
    np.testing.assert_allclose(analysis.barrier(3 * x + 2), 0, atol=1e-12)
    hill = 8 * x * (1 - x)  # 2 in the middle, and the slope moves its top
    np.testing.assert_allclose(analysis.barrier(hill), 2, rtol=1e-12)
    np.testing.assert_allclose(analysis.barrier(x + hill), 81 / 32 - 1, rtol=1e-4)
    assert analysis.barrier(x**2) <= 1e-12


def test_two_optima_of_a_double_well_have_a_barrier(x64):
    """Outputs w^2, target 1: w = 1 and w = -1 are both optimal, and 0 between them is not."""
    net = nets.from_functions(
        lambda key: {"w": jnp.ones(1)}, lambda params, x: params["w"] ** 2 * jnp.ones((len(x), 1))
    )
    method = maml(net, lr=0.0, steps=1, loss=squared_error)
    part = Examples(jnp.ones((1, 2, 1)), jnp.ones((1, 2, 1)))
    ends = [MetaParams({"w": jnp.full(1, w)}, {}) for w in (-1.0, 1.0)]
    at = jnp.linspace(0, 1, 21)
    losses = analysis.line_losses(method, jax.random.key(0), *ends, Task(part, part), at)
    np.testing.assert_allclose(losses, (1 - (2 * at - 1) ** 2) ** 2, atol=1e-12)
    np.testing.assert_allclose(analysis.barrier(losses), 1)


def test_diversity_equals_numpy(x64):
    method = fomaml(mlp(), lr=0.2, steps=2)
    params, tasks = problem(method)
    got = jax.jit(partial(analysis.diversity, method))(jax.random.key(0), params, tasks)
    seen = [view(method, jax.random.key(5), params, row(tasks, t)) for t in range(3)]
    g = np.stack([flat(v.grads) for v in seen])
    shared = np.mean([g[i] @ g[j] for i in range(3) for j in range(3) if i != j])
    np.testing.assert_allclose(got.spread, 1 - shared / (g * g).sum(1).mean(), rtol=1e-9)
    unit = g / np.linalg.norm(g, axis=1, keepdims=True)
    pairs = [unit[i] @ unit[j] for i in range(3) for j in range(3) if i != j]
    np.testing.assert_allclose(got.cosine, np.mean(pairs), rtol=1e-9)
    p = np.stack([jax.nn.softmax(v.logits) for v in seen])
    np.testing.assert_allclose(got.entropy, -(p * np.log(p)).sum(-1).mean(), rtol=1e-9)


def test_noise_spreads_the_gradients_of_one_task_repeated(x64):
    method = fomaml(mlp(), lr=0.2, steps=2)
    params, tasks = problem(method)
    same = jax.tree.map(lambda x: jnp.repeat(x[:1], 8, axis=0), tasks)
    go = lambda m: analysis.diversity(m, jax.random.key(0), params, same)
    assert abs(go(method).spread) < 1e-12
    spreads = [float(go(noise(std)(method)).spread) for std in (0.01, 0.1, 1.0)]
    assert 1e-8 < spreads[0] < spreads[1] < spreads[2] < 1.2


@pytest.mark.parametrize("tasks", [4, 64])
def test_gradients_without_a_common_part_have_spread_one(x64, tasks):
    """Outputs `x w`, inputs of mean 0: the gradient at w = 0 is `-2 x y`."""
    net = nets.from_functions(lambda key: {"w": jnp.zeros((50, 1))}, lambda p, x: x @ p["w"])
    method = maml(net, lr=0.0, steps=1, loss=squared_error)
    rng = np.random.default_rng(0)
    part = Examples(jnp.asarray(rng.normal(size=(tasks, 1, 50))), jnp.ones((tasks, 1, 1)))
    params = MetaParams({"w": jnp.zeros((50, 1))}, {})
    got = analysis.diversity(method, jax.random.key(0), params, Task(part, part))
    assert abs(got.spread - 1) < 4 * (2 / 50 / tasks / (tasks - 1)) ** 0.5


def test_a_slope_is_no_barrier():
    assert analysis.barrier(jnp.sqrt(jnp.linspace(0, 1, 20))) == 0


def test_regression_has_no_entropy(x64):
    net = nets.mlp((4,), inputs=2)
    method = maml(net, lr=0.1, steps=1, loss=squared_error)
    rng = np.random.default_rng(0)
    part = Examples(*(jnp.asarray(rng.normal(size=(3, 4, d))) for d in (2, 1)))
    params = MetaParams(floats(net.init(jax.random.key(0))), {})
    got = analysis.diversity(method, jax.random.key(0), params, Task(part, part))
    assert jnp.isnan(got.entropy)
    assert jnp.isfinite(got.spread)


def test_similarity_and_gain_equal_a_step_written_out(x64):
    method = fomaml(mlp(), lr=0.2, steps=2)
    params, tasks = problem(method)
    test = row(floats(make_tasks(jax.random.key(7), 1, 3, shape=(8, 8, 1))), 0)
    batch = jax.tree.map(lambda x: x[None], test)
    stored = row(probe_gradients(method, jax.random.key(0), params, batch), 0)
    go = partial(analysis.similarity_and_gain, noise(9.0)(method), jax.random.key(0))
    cosines, gains = jax.jit(go)(params, tasks, stored, test, 0.05)
    loss = lambda params: view(method, jax.random.key(3), params, test).loss
    s = flat(stored)
    for t in range(3):
        grads = view(method, jax.random.key(3), params, row(tasks, t)).grads
        v = flat(grads)
        norm = np.linalg.norm(v)
        np.testing.assert_allclose(cosines[t], v @ s / norm / np.linalg.norm(s), rtol=1e-9)
        moved = jax.tree.map(lambda w, g, n=norm: w - 0.05 * g / n, params, grads)
        np.testing.assert_allclose(gains[t], loss(params) - loss(moved), rtol=1e-7, atol=1e-11)


def test_the_test_tasks_own_gradient_gains_most(x64):
    """To first order the gain is the inner product with the query gradient."""
    method = fomaml(mlp(), lr=0.2, steps=2)
    params, tasks = problem(method)
    stored = row(probe_gradients(method, jax.random.key(0), params, tasks), 0)
    go = partial(analysis.similarity_and_gain, method, jax.random.key(0))
    _, gains = jax.jit(go)(params, tasks, stored, row(tasks, 0), 1e-3)
    assert gains.argmax() == 0
    assert gains[0] > 0


def test_settling_of_an_exponential_and_of_a_shaken_one(x64):
    steps = np.arange(1000)
    curve = 2 * np.exp(-steps / 50) + 1
    first, shake = analysis.settling(jnp.asarray(curve), 1)
    assert abs(int(first) - 50 * np.log(10)) < 2
    assert shake < 1e-6
    rough = curve + 0.3 * np.random.default_rng(0).normal(size=1000)
    _, shaken = analysis.settling(jnp.asarray(rough), 50)
    assert abs(float(shaken) - 0.3) < 0.04
    slow, _ = analysis.settling(jnp.asarray(2 * np.exp(-steps / 100) + 1), 1)
    assert slow > first


def test_settled_is_settled_for_good(x64):
    curve = np.concatenate([np.linspace(2, 0, 10), np.full(10, 2.0), np.zeros(20)])
    first, _ = analysis.settling(jnp.asarray(curve), 1)
    assert first == 20


def test_drift_of_a_circle_and_of_a_straight_descent(x64):
    """Gradients that turn by 30 degrees a point; one move downhill, one across, one uphill."""
    turns = np.radians([0, 30, 60, 90])
    gradients = MetaParams({"w": jnp.asarray(np.stack([np.cos(turns), np.sin(turns)], 1) * 3)}, {})
    g = np.asarray(gradients.net["w"])
    moves = [-2 * g[0], 0.5 * np.array([-g[1][1], g[1][0]]), g[2]]
    points = MetaParams({"w": jnp.asarray(np.cumsum([np.ones(2), *moves], axis=0))}, {})
    turned, downhill = analysis.drift(gradients, points)
    np.testing.assert_allclose(turned, np.full(3, np.cos(np.pi / 6)), rtol=1e-12)
    np.testing.assert_allclose(downhill, [1, 0, -1], atol=1e-12)


def test_drift_counts_every_parameter(x64):
    rng = np.random.default_rng(0)
    tree = lambda: MetaParams(
        {"a": jnp.asarray(rng.normal(size=(3, 2, 2))), "b": jnp.asarray(rng.normal(size=(3, 5)))},
        {"lr": jnp.asarray(rng.normal(size=(3, 4)))},
    )
    gradients, points = tree(), tree()
    turned, downhill = analysis.drift(gradients, points)
    g, p = (np.stack([flat(row(t, i)) for i in range(3)]) for t in (gradients, points))
    cos = lambda a, b: a @ b / np.linalg.norm(a) / np.linalg.norm(b)
    np.testing.assert_allclose(turned, [cos(g[i + 1], g[i]) for i in range(2)], rtol=1e-12)
    np.testing.assert_allclose(downhill, [cos(p[i] - p[i + 1], g[i]) for i in range(2)], rtol=1e-12)
