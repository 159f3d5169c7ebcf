"""Feedback weights against loops in numpy, their limits, and what the stored gradients look at."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import make_tasks

from mgaug_jax import (
    anil,
    cp,
    feedback,
    fomaml,
    maml,
    meta_gradient,
    meta_sgd,
    nets,
    noise,
    probe_gradients,
    protonet,
    view,
)
from mgaug_jax.types import MetaParams
from mgaug_jax.weighting import cosine, on_query, on_support, rectified_weights, softmax_weights

pytestmark = pytest.mark.usefixtures("quick_compile")
T, P = 4, 2


def mlp(outputs=3):
    inner = nets.mlp((6,), inputs=64, outputs=outputs)
    return inner._replace(apply=lambda params, x: inner.apply(params, x.reshape(len(x), -1)))


def floats(tree):
    return jax.tree.map(lambda leaf: leaf.astype(float), tree)


def problem(method, seed=0):
    params = floats(method.algorithm(method.net, method.inner).init(jax.random.key(seed)))
    batch = lambda seed, n: floats(make_tasks(jax.random.key(seed), n, 3, shape=(8, 8, 1)))
    return params, batch(1, T), batch(2, P)


def gradient(method, params, tasks, seed=0):
    return jax.jit(partial(meta_gradient, method))(jax.random.key(seed), params, tasks)[0]


def stored_of(method, params, tests, judge=on_support):
    return jax.jit(partial(probe_gradients, method, judge=judge))(jax.random.key(5), params, tests)


def flat(tree):
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])


def row(tree, i):
    return jax.tree.map(lambda leaf: leaf[i], tree)


def assert_close(got, want, rtol=1e-9):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=1e-12), got, want)


# --- the equation ---------------------------------------------------------------------------


@pytest.mark.parametrize("rule", ["softmax", "rectified"])
@pytest.mark.parametrize("subnets", [False, True])
def test_feedback_is_the_weighted_mean_of_task_gradients(x64, rule, subnets):
    method = fomaml(mlp(), lr=0.2, steps=2)
    # a mask that does not depend on the task's key, so that one task alone has the same gradient
    method = cp(keep=0.6, high=0.6, subnets=1)(method) if subnets else method
    params, tasks, tests = problem(method)
    stored = stored_of(method, params, tests)
    weights = {"softmax": softmax_weights(0.3), "rectified": rectified_weights}[rule]
    got = gradient(feedback(stored, weights=weights)(method), params, tasks)

    one = lambda t: jax.tree.map(lambda x: x[t : t + 1], tasks)
    alone = [gradient(method, params, one(t)) for t in range(T)]
    vectors = np.stack([flat(g) for g in alone])
    w = np.zeros(T)
    for p in range(P):
        s = flat(row(stored, p))
        c = np.array([v @ s / np.sqrt((v @ v) * (s @ s)) for v in vectors])
        if rule == "softmax":
            w += T * np.exp(c / 0.3) / np.exp(c / 0.3).sum() / P
        else:
            positive = np.maximum(c, 0)
            w += positive / positive.mean() / P
    assert w.std() > 0.01
    np.testing.assert_allclose(w.mean(), 1, rtol=1e-12)
    np.testing.assert_allclose(flat(got), (w[:, None] * vectors).mean(0), rtol=1e-9, atol=1e-12)


def test_equal_similarities_give_the_plain_mean(x64):
    method = fomaml(mlp(), lr=0.2, steps=2)
    params, tasks, tests = problem(method)
    stored = stored_of(method, params, tests)
    same = lambda g, test_gradient: jnp.asarray(0.4)
    for weights in (softmax_weights(0.01), rectified_weights):
        got = gradient(feedback(stored, weights=weights, similarity=same)(method), params, tasks)
        assert_close(got, gradient(method, params, tasks))


def test_a_high_temperature_gives_the_plain_mean(x64):
    method = fomaml(mlp(), lr=0.2, steps=2)
    params, tasks, tests = problem(method)
    got = gradient(
        feedback(stored_of(method, params, tests), weights=softmax_weights(1e9))(method),
        params,
        tasks,
    )
    assert_close(got, gradient(method, params, tasks), rtol=1e-6)


@pytest.mark.parametrize("chosen", range(T))
def test_a_low_temperature_picks_the_most_similar_task(x64, chosen):
    method = fomaml(mlp(), lr=0.2, steps=2)
    params, tasks, _ = problem(method)
    twin = jax.tree.map(lambda x: x[chosen : chosen + 1], tasks)
    # the very task, judged on its query, is the most similar one
    stored = stored_of(method, params, twin, on_query)
    got = gradient(feedback(stored, weights=softmax_weights(1e-6))(method), params, tasks)
    assert_close(got, gradient(method, params, twin))


def test_no_similar_task_means_equal_weights():
    np.testing.assert_array_equal(rectified_weights(jnp.array([-0.5, -0.1, 0.0])), np.ones(3))
    np.testing.assert_allclose(rectified_weights(jnp.array([-0.5, 0.1, 0.3])), [0, 0.75, 2.25])


def test_cosine_of_trees(x64):
    rng = np.random.default_rng(0)
    tree = lambda: {"a": rng.normal(size=(2, 3)), "b": rng.normal(size=4)}
    a, b = tree(), tree()
    u, v = flat(a), flat(b)
    np.testing.assert_allclose(cosine(a, b), u @ v / np.linalg.norm(u) / np.linalg.norm(v))
    np.testing.assert_allclose(cosine(a, jax.tree.map(lambda x: -2 * x, a)), -1)
    assert cosine(a, jax.tree.map(np.zeros_like, a)) == 0


# --- stored gradients -----------------------------------------------------------------------


def test_a_stored_gradient_is_that_of_the_adapted_network_on_the_support(x64):
    method = fomaml(mlp(), lr=0.2, steps=2)
    params, _, tests = problem(method)
    stored = stored_of(method, params, tests)
    for p in range(P):
        task = row(tests, p)
        learner = method.algorithm(method.net, method.inner)
        theta = learner.adapt(jax.random.key(0), params, task.support).params
        loss = lambda w, part=task.support: learner.loss(method.net.apply(w, part.x), part.y)
        assert_close(row(stored, p).net, jax.grad(loss)(theta))


@pytest.mark.parametrize("make", [maml, fomaml, anil, meta_sgd])
def test_on_support_never_looks_at_the_query(make):
    method = make(mlp(), lr=0.1)
    params, _, tests = problem(method)
    shuffled = tests._replace(query=jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), tests.query))
    a, b = (stored_of(method, params, t) for t in (tests, shuffled))
    assert np.isfinite(flat(a)).all()
    np.testing.assert_array_equal(flat(a), flat(b))
    leak = stored_of(method, params, shuffled, on_query)
    assert np.isnan(flat(leak)).any()


def test_training_perturbations_and_sub_networks_take_no_part(x64):
    method = fomaml(mlp(), lr=0.1, steps=2)
    params, _, tests = problem(method)
    trained = cp(keep=0.5)(noise(1.0)(method))
    np.testing.assert_array_equal(
        flat(stored_of(trained, params, tests)), flat(stored_of(method, params, tests))
    )


def test_feedback_of_a_meta_sgd_compares_rates_too(x64):
    method = meta_sgd(mlp(), lr=0.1)
    params, tasks, tests = problem(method)
    stored = stored_of(method, params, tests)
    assert set(stored.extra) == {"lr"}
    got = gradient(feedback(stored)(method), params, tasks)
    assert np.isfinite(flat(got)).all()


def test_feedback_works_for_protonet(x64):
    method = protonet(mlp())
    params, tasks, tests = problem(method)
    stored = stored_of(method, params, tests)
    got = flat(gradient(feedback(stored, weights=softmax_weights(0.1))(method), params, tasks))
    assert np.isfinite(got).all()
    assert np.abs(got - flat(gradient(method, params, tasks))).max() > 1e-6


def test_refreshing_compiles_nothing_again():
    method = fomaml(mlp(), lr=0.1, steps=1)
    params, tasks, tests = problem(method)
    traces = []

    @jax.jit
    def step(stored, temperature):
        traces.append(1)
        change = feedback(stored, weights=softmax_weights(temperature))
        return meta_gradient(change(method), jax.random.key(0), params, tasks)[0]

    one = step(stored_of(method, params, tests), 0.1)
    other = step(stored_of(method, params, jax.tree.map(lambda x: -x, tests)), 0.2)
    assert len(traces) == 1
    assert (flat(one) != flat(other)).any()


def test_the_order_of_tasks_does_not_matter(x64):
    method = fomaml(mlp(), lr=0.1, steps=1)
    params, tasks, tests = problem(method)
    method = feedback(stored_of(method, params, tests))(method)
    turned = jax.tree.map(lambda x: x[::-1], tasks)
    assert_close(gradient(method, params, tasks), gradient(method, params, turned))


def test_a_single_task_has_weight_one(x64):
    method = fomaml(mlp(), lr=0.1, steps=1)
    params, tasks, tests = problem(method)
    one = jax.tree.map(lambda x: x[:1], tasks)
    got = gradient(feedback(stored_of(method, params, tests))(method), params, one)
    assert_close(got, gradient(method, params, one))


# --- refusals -------------------------------------------------------------------------------


def test_feedback_twice_is_refused():
    method = fomaml(mlp())
    change = feedback(MetaParams({}, {}))
    with pytest.raises(ValueError, match="asked for twice"):
        change(change(method))


def test_stored_gradients_of_other_parameters_are_refused():
    method, other = maml(mlp(), steps=1), meta_sgd(mlp())
    params, tasks, tests = problem(method)
    with pytest.raises(ValueError, match="of other parameters than the method has"):
        gradient(feedback(stored_of(method, params, tests))(other), problem(other)[0], tasks)


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("nan"), "warm"])
def test_a_temperature_that_is_none_is_refused(temperature):
    with pytest.raises(ValueError, match="temperature="):
        softmax_weights(temperature)


def test_judges():
    task = make_tasks(jax.random.key(0), 1)
    assert on_query(task) is task
    seen = on_support(task)
    assert seen.query is task.support
    assert seen.support is task.support


def test_view_of_a_judged_task_is_the_stored_gradient(x64):
    method = maml(mlp(), lr=0.1, steps=2)
    params, _, tests = problem(method)
    stored = stored_of(method, params, tests, on_query)
    key = jax.random.fold_in(jax.random.key(5), 1)
    want = jax.jit(partial(view, method))(key, params, row(tests, 1)).grads
    assert_close(row(stored, 1), want)
