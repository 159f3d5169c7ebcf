"""TAML against its equations, identities and limits."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from grid import mlp
from small import assert_close, batch, gradient, params_of, row, zero

from mgaug_jax import (
    maml,
    meta_gradient,
    nets,
    pp,
    shuffle_labels,
    taml,
)
from mgaug_jax.losses import cross_entropy, squared_error
from mgaug_jax.types import Examples, Task

pytestmark = pytest.mark.usefixtures("quick_compile")


def python_indices(losses):
    n, mean = len(losses), sum(losses) / len(losses)
    share = [x / mean for x in losses]
    log = [np.log(s) for s in share]
    geometric = np.exp(sum(np.log(losses)) / n)
    return {
        "theil": sum(s * np.log(s) for s in share) / n,
        "ge0": -sum(log) / n,
        "ge2": sum(s**2 - 1 for s in share) / (2 * n),
        "ge-1": sum(1 / s - 1 for s in share) / (2 * n),
        "atkinson.5": 1 - (sum(x**0.5 for x in losses) / n) ** 2 / mean,
        "atkinson2": 1 - 1 / (sum(1 / x for x in losses) / n) / mean,
        "atkinson1": 1 - geometric / mean,
        "gini": sum(abs(x - y) for x in losses for y in losses) / (2 * n * sum(losses)),
        "log_variance": sum((np.log(x) - np.log(geometric)) ** 2 for x in losses) / n,
    }


INDICES = {
    "theil": taml.theil,
    "ge0": taml.generalised_entropy(0),
    "ge2": taml.generalised_entropy(2),
    "ge-1": taml.generalised_entropy(-1),
    "atkinson.5": taml.atkinson(0.5),
    "atkinson2": taml.atkinson(2),
    "atkinson1": taml.atkinson(1),
    "gini": taml.gini,
    "log_variance": taml.log_variance,
}


@pytest.mark.parametrize("name", INDICES)
def test_an_inequality_index_is_its_formula_scale_free_and_zero_for_equals(x64, name):
    index = jax.jit(INDICES[name])
    for seed in range(10):
        losses = np.random.default_rng(seed).lognormal(size=5)
        got = float(index(losses))
        assert got == pytest.approx(python_indices(losses)[name], rel=1e-9)
        assert got > 0
        assert float(index(7.3 * losses)) == pytest.approx(got, rel=1e-9)
        assert float(index(losses[::-1])) == pytest.approx(got, rel=1e-9)
    assert float(index(np.full(5, 1.7))) == pytest.approx(0, abs=1e-14)


@pytest.mark.parametrize(("near", "limit"), [(1 + 1e-6, 1), (1e-6, 0)])
def test_generalised_entropy_and_atkinson_reach_their_limits(x64, near, limit):
    losses = np.random.default_rng(0).lognormal(size=5)
    close = partial(pytest.approx, rel=1e-4)
    assert float(taml.generalised_entropy(near)(losses)) == close(
        float(taml.generalised_entropy(limit)(losses))
    )
    if limit == 1:
        assert float(taml.atkinson(near)(losses)) == close(float(taml.atkinson(1)(losses)))


def objective_of(method, tasks, extra):
    """`params -> mean adapted loss + extra`, task by task, differentiated as a whole."""
    learner = method.algorithm(method.net, method.inner)

    def objective(params):
        each = [row(tasks, t) for t in range(len(tasks.query.y))]
        fasts = [learner.adapt(zero(), params, task.support) for task in each]
        starts = [learner.start(params, task.support) for task in each]
        out = lambda fast, task: learner.predict(fast, task.query.x)
        adapted = [out(f, t) for f, t in zip(fasts, each, strict=True)]
        initial = [out(f, t) for f, t in zip(starts, each, strict=True)]
        loss = lambda outs: [cross_entropy(o, t.query.y) for o, t in zip(outs, each, strict=True)]
        return sum(loss(adapted)) / len(each) + extra(adapted, initial, loss)

    return objective


def entropies(outputs):
    probabilities = [jax.nn.softmax(o) for o in outputs]
    return sum(-jnp.mean(jnp.sum(p * jnp.log(p), axis=-1)) for p in probabilities) / len(outputs)


@pytest.mark.parametrize("form", ["inequality", "gini", "entropy"])
def test_taml_is_the_gradient_of_its_objective(x64, form):
    method = maml(mlp(), lr=0.5, steps=2)
    change, extra = {
        "inequality": (
            taml.inequality(0.7),
            lambda adapted, initial, loss: 0.7 * taml.theil(jnp.stack(loss(initial))),
        ),
        "gini": (
            taml.inequality(0.7, index=taml.gini),
            lambda adapted, initial, loss: 0.7 * taml.gini(jnp.stack(loss(initial))),
        ),
        "entropy": (
            taml.entropy(0.7),
            lambda adapted, initial, loss: 0.7 * (entropies(adapted) - entropies(initial)),
        ),
    }[form]
    tasks, params = batch(3), params_of(method)
    want, grads = jax.jit(jax.value_and_grad(objective_of(method, tasks, extra)))(params)
    got, info = gradient(change(method), params, tasks)
    assert float(info["loss"]) == pytest.approx(float(want), rel=1e-10)
    assert_close(got, grads)


def test_taml_of_weight_zero_is_the_plain_method_and_two_terms_add(x64):
    method = maml(mlp(), lr=0.5, steps=1)
    assert taml.inequality(0.0)(method) is method
    assert taml.entropy(0)(method) is method
    tasks, params = batch(3), params_of(method)
    plain, one, two, both = (
        gradient(m, params, tasks)[0]
        for m in (
            method,
            taml.inequality(0.3)(method),
            taml.entropy(0.3)(method),
            taml.entropy(0.3)(taml.inequality(0.3)(method)),
        )
    )
    assert_close(both, jax.tree.map(lambda p, a, b: a + b - p, plain, one, two))


def test_taml_leaves_the_sub_networks_as_they_are(x64):
    """The same masks with and without: what is added is the term's gradient of the full network."""
    method = maml(mlp(), lr=0.5, steps=1)
    views = pp(keep=1.0, cap=1.0, subnets=2)  # whole, so that no draw matters
    tasks, params = batch(3), params_of(method)
    change = taml.inequality(0.3)
    added = [
        jax.tree.map(
            jnp.subtract, gradient(change(m), params, tasks)[0], gradient(m, params, tasks)[0]
        )
        for m in (method, views(method))
    ]
    assert_close(*added)


def test_entropy_needs_classes(x64):
    net = nets.mlp((4,), inputs=2)
    with pytest.raises(ValueError, match="use the inequality form"):
        taml.entropy(0.1)(maml(net, loss=squared_error))
    with pytest.raises(ValueError, match="use shift_targets"):
        shuffle_labels()(maml(net, loss=squared_error))
    method = taml.entropy(0.1)(maml(net, loss=lambda outputs, y: jnp.mean((outputs - y) ** 2)))
    part = Examples(jnp.ones((2, 3, 2)), jnp.ones((2, 3, 1)))
    with pytest.raises(ValueError, match="use the inequality form"):
        meta_gradient(method, zero(), params_of(method), Task(part, part))


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: taml.inequality(float("nan")), "weight="),
        (lambda: taml.entropy(-1), "weight="),
    ],
)
def test_numbers_that_make_no_sense_are_refused(make, says):
    with pytest.raises(ValueError, match=says):
        make()
