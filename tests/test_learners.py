"""Inner loops: closed forms, finite differences, and first order against second order."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import make_tasks

from mgaug_jax import (
    anil,
    cp,
    descend,
    first_order,
    fomaml,
    identity,
    maml,
    meta_gradient,
    meta_sgd,
    nets,
    protonet,
    pruning,
    view,
)
from mgaug_jax.losses import cross_entropy, squared_error
from mgaug_jax.meta import Probe
from mgaug_jax.nets.adapters import net_of
from mgaug_jax.nets.backbones import ConvNet, conv_roles
from mgaug_jax.types import Examples, MetaParams, Method, Task

pytestmark = pytest.mark.usefixtures("quick_compile")
LINEAR = nets.from_functions(lambda key: jnp.zeros((3, 1)), lambda theta, x: x @ theta)


def tiny_conv(way=3, depth=1, width=3):
    return net_of(ConvNet(way, width, depth), (8, 8, 1), conv_roles)


def randomised(net, scale=0.5):
    rng = np.random.default_rng(0)
    draw = lambda leaf: jnp.asarray(scale * rng.normal(size=leaf.shape))
    return jax.tree.map(draw, jax.eval_shape(net.init, jax.random.key(0)))


def tiny_task(way=3):
    tasks = make_tasks(jax.random.key(1), 1, way, queries=3, shape=(8, 8, 1))
    return jax.tree.map(lambda leaf: leaf[0].astype(float), tasks)


def learner_of(method):
    return method.algorithm(method.net, method.inner)


def query_loss(method, task):
    """`params -> L(adapt(params))`, to be differentiated by other means."""
    learner = learner_of(method)

    def loss(params):
        fast = learner.adapt(jax.random.key(0), params, task.support)
        return learner.loss(learner.predict(fast, task.query.x), task.query.y)

    return loss


def assert_close(got, want, rtol=1e-10, atol=1e-12):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=atol), got, want)


# --- a quadratic loss -----------------------------------------------------------------------


def quadratic(seed):
    """`(task, theta, H_s, b_s, H_q, b_q)`: each loss is `theta' H theta / 2 - b' theta + c`."""
    rng = np.random.default_rng(seed)
    x_s, x_q = rng.normal(size=(2, 5, 3))
    y_s, y_q = rng.normal(size=(2, 5, 1))
    hessian = lambda x: 2 * x.T @ x / len(x)
    slope = lambda x, y: 2 * x.T @ y / len(x)
    task = Task(Examples(*map(jnp.asarray, (x_s, y_s))), Examples(*map(jnp.asarray, (x_q, y_q))))
    theta = rng.normal(size=(3, 1))
    return task, theta, hessian(x_s), slope(x_s, y_s), hessian(x_q), slope(x_q, y_q)


@pytest.mark.parametrize("steps", [1, 4])
@pytest.mark.parametrize("seed", range(3))
def test_maml_on_a_quadratic_has_its_closed_form(x64, steps, seed):
    task, theta, h_s, b_s, h_q, b_q = quadratic(seed)
    lr = 0.07
    method = maml(LINEAR, lr=lr, steps=steps, loss=squared_error)
    params = MetaParams(jnp.asarray(theta), {})
    fixed = np.linalg.solve(h_s, b_s)
    power = np.linalg.matrix_power(np.eye(3) - lr * h_s, steps)
    adapted = fixed + power @ (theta - fixed)
    fast = learner_of(method).adapt(jax.random.key(0), params, task.support)
    np.testing.assert_allclose(fast.params, adapted, rtol=1e-10)
    at_query = h_q @ adapted - b_q
    second = jax.jit(partial(view, method))(jax.random.key(0), params, task)
    first = jax.jit(partial(view, fomaml(LINEAR, lr=lr, steps=steps, loss=squared_error)))
    first = first(jax.random.key(0), params, task)
    np.testing.assert_allclose(second.grads.net, power.T @ at_query, rtol=1e-10)
    np.testing.assert_allclose(first.grads.net, at_query, rtol=1e-10)
    assert np.abs(first.grads.net - second.grads.net).max() > 1e-3
    np.testing.assert_allclose(second.loss, first.loss, rtol=1e-12)
    error = np.asarray(task.query.x) @ adapted - task.query.y
    np.testing.assert_allclose(second.loss, np.mean(error**2), rtol=1e-10)


# --- convolutional networks -----------------------------------------------------------------


def central_differences(loss, params, directions, eps=1e-5):
    at = lambda d: loss(jax.tree.map(lambda p, e: p + e, params, d))
    scaled = lambda s: jax.tree.map(lambda d: s * eps * d, directions)
    ends = jax.jit(lambda ds: jax.lax.map(at, ds))
    return (ends(scaled(1.0)) - ends(scaled(-1.0))) / (2 * eps)


def test_maml_through_three_steps_equals_central_differences_in_every_layer(x64):
    net, task = (
        nets.conv4(3, width=2, image=(16, 16, 1)),
        make_tasks(jax.random.key(0), 1, queries=3),
    )
    task = jax.tree.map(lambda leaf: leaf[0].astype(float), task)
    params = MetaParams(randomised(net), {})
    method = maml(net, lr=0.1, steps=3)
    grads = jax.jit(partial(view, method))(jax.random.key(0), params, task).grads
    leaves, tree = jax.tree.flatten(grads)
    assert len(leaves) == 18
    # of every array the weight of the largest gradient, and the last
    chosen = [(i, j) for i, g in enumerate(leaves) for j in (int(jnp.abs(g).argmax()), g.size - 1)]
    rows = [np.zeros((len(chosen), *g.shape)) for g in leaves]
    for n, (i, j) in enumerate(chosen):
        rows[i][n].flat[j] = 1
    got = np.array([leaves[i].ravel()[j] for i, j in chosen])
    directions = tree.unflatten([jnp.asarray(row) for row in rows])
    want = central_differences(query_loss(method, task), params, directions)
    np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-9)


def test_fomaml_is_the_query_gradient_at_the_adapted_weights(x64):
    net, task = tiny_conv(), tiny_task()
    params = MetaParams(randomised(net), {})
    method = fomaml(net, lr=0.1, steps=3)
    at = lambda part: lambda theta: cross_entropy(net.apply(theta, part.x), part.y)
    theta = params.net
    for _ in range(3):
        grads = jax.jit(jax.grad(at(task.support)))(theta)
        theta = jax.tree.map(lambda w, g: w - 0.1 * g, theta, grads)
    got = jax.jit(partial(view, method))(jax.random.key(0), params, task)
    loss, grads = jax.jit(jax.value_and_grad(at(task.query)))(theta)
    assert_close((got.loss, got.grads.net), (loss, grads))


def test_fomaml_compiles_to_fewer_flops_than_maml():
    net, task = tiny_conv(), tiny_task()
    params = MetaParams(jax.eval_shape(net.init, jax.random.key(0)), {})

    def flops(make):
        step = jax.jit(partial(view, make(net, steps=3)))
        return step.lower(jax.random.key(0), params, task).compile().cost_analysis()["flops"]

    assert flops(fomaml) < 0.8 * flops(maml)


def test_anil_moves_the_head_alone_and_learns_the_body(x64):
    net, task = tiny_conv(), tiny_task()
    params = MetaParams(randomised(net), {})
    method = anil(net, lr=0.1, steps=3)
    fast = jax.jit(learner_of(method).adapt)(jax.random.key(0), params, task.support).params
    for layer in fast:
        moved = [bool((fast[layer][name] != params.net[layer][name]).any()) for name in fast[layer]]
        assert moved == [layer == "head"] * 2
    grads = jax.jit(partial(view, method))(jax.random.key(0), params, task).grads
    rng = np.random.default_rng(3)
    random = lambda g: jnp.asarray(rng.normal(size=(3, *g.shape)))
    for layer in grads.net:
        directions = jax.tree.map(lambda g: jnp.zeros((3, *g.shape)), grads)
        directions.net[layer] = jax.tree.map(random, grads.net[layer])
        dot = lambda d, g: jnp.sum(d * g, axis=tuple(range(1, d.ndim)))
        got = sum(jax.tree.leaves(jax.tree.map(dot, directions, grads)))
        want = central_differences(query_loss(method, task), params, directions)
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-8)
        assert np.abs(want).max() > 1e-3


def test_anil_of_detached_gradients_differs_in_the_body(x64):
    net, task = tiny_conv(), tiny_task()
    params = MetaParams(randomised(net), {})
    method = anil(net, lr=0.1, steps=3)
    both = lambda m: jax.jit(partial(view, m))(jax.random.key(0), params, task)
    second, first = both(method), both(first_order(method))
    np.testing.assert_allclose(second.loss, first.loss, rtol=1e-12)
    change = second.grads.net["conv0"]["kernel"] - first.grads.net["conv0"]["kernel"]
    assert jnp.abs(change).max() > 1e-4


# --- Meta-SGD -------------------------------------------------------------------------------


def test_meta_sgd_of_one_step_at_equal_rates_is_maml(x64):
    net, task = tiny_conv(), tiny_task()
    theta = randomised(net)
    rates = jax.tree.map(lambda leaf: jnp.full_like(leaf, 0.1), theta)
    sgd = jax.jit(partial(view, meta_sgd(net, lr=0.1)))(
        jax.random.key(0), MetaParams(theta, {"lr": rates}), task
    )
    plain = jax.jit(partial(view, maml(net, lr=0.1, steps=1)))(
        jax.random.key(0), MetaParams(theta, {}), task
    )
    assert_close((sgd.loss, sgd.logits, sgd.grads.net), (plain.loss, plain.logits, plain.grads.net))


@pytest.mark.parametrize("order", [1, 2])
def test_meta_sgd_rate_gradient_is_minus_the_product_of_gradients(x64, order):
    net, task = tiny_conv(), tiny_task()
    theta = randomised(net)
    rng = np.random.default_rng(5)
    rates = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(0.1, 0.1, leaf.shape)), theta)
    at = lambda part: jax.jit(jax.grad(lambda p: cross_entropy(net.apply(p, part.x), part.y)))
    g_s = at(task.support)(theta)
    g_q = at(task.query)(jax.tree.map(lambda w, a, g: w - a * g, theta, rates, g_s))
    method = meta_sgd(net, lr=0.1)
    method = first_order(method) if order == 1 else method
    got = jax.jit(partial(view, method))(
        jax.random.key(0), MetaParams(theta, {"lr": rates}), task
    ).grads
    assert_close(got.extra["lr"], jax.tree.map(lambda q, s: -q * s, g_q, g_s))
    assert all(jnp.abs(leaf).max() > 1e-6 for leaf in (got.extra["lr"]["conv0"]["kernel"],))
    if order == 1:
        assert_close(got.net, g_q)


def test_meta_sgd_starts_at_lr_everywhere():
    params = jax.jit(learner_of(meta_sgd(tiny_conv(), lr=0.3)).init)(jax.random.key(0))
    shape = lambda leaf: leaf.shape
    assert jax.tree.map(shape, params.extra["lr"]) == jax.tree.map(shape, params.net)
    assert all((leaf == np.float32(0.3)).all() for leaf in jax.tree.leaves(params.extra["lr"]))


# --- ProtoNet -------------------------------------------------------------------------------


def test_protonet_equals_loops_over_classes_and_queries(x64):
    net = tiny_conv(None)
    task = jax.tree.map(
        lambda leaf: leaf[0].astype(float),
        make_tasks(jax.random.key(0), 1, 3, shot=2, shape=(8, 8, 1)),
    )
    order = np.random.default_rng(0).permutation(6)  # support examples in no order
    task = task._replace(support=Examples(task.support.x[order], task.support.y[order]))
    params = MetaParams(randomised(net), {})
    learner = learner_of(protonet(net))
    got = learner.predict(learner.adapt(jax.random.key(0), params, task.support), task.query.x)
    z_s, z_q = (np.asarray(net.apply(params.net, part.x)) for part in task)
    labels = np.asarray(task.support.y).argmax(1)
    want = np.zeros((6, 3))
    for q in range(6):
        for n in range(3):
            members = [z for z, label in zip(z_s, labels, strict=True) if label == n]
            assert len(members) == 2
            want[q, n] = -sum((z_q[q] - sum(members) / 2) ** 2)
    np.testing.assert_allclose(got, want, rtol=1e-10)
    log_p = want - np.log(np.exp(want).sum(1, keepdims=True))
    loss = -np.mean(log_p[np.arange(6), np.asarray(task.query.y).argmax(1)])
    np.testing.assert_allclose(learner.loss(got, task.query.y), loss, rtol=1e-10)
    initial = learner.predict(learner.start(params, task.support), task.query.x)
    np.testing.assert_array_equal(initial, got)


def test_protonet_refuses_a_transform_of_inner_gradients():
    method = protonet(tiny_conv(None))
    with pytest.raises(ValueError, match="no inner loop"):
        learner_of(first_order(method))


# --- the rest of the contract ---------------------------------------------------------------


@pytest.mark.parametrize("make", [maml, fomaml, anil, meta_sgd])
def test_start_is_the_unadapted_network(make):
    net, task = tiny_conv(), tiny_task()
    learner = learner_of(make(net, lr=0.1))
    params = jax.jit(learner.init)(jax.random.key(0))
    start, adapted = (
        learner.start(params, task.support),
        learner.adapt(jax.random.key(0), params, task.support),
    )
    got = learner.predict(start, task.query.x)
    np.testing.assert_array_equal(got, net.apply(params.net, task.query.x))
    assert jnp.abs(got - learner.predict(adapted, task.query.x)).max() > 1e-4


def adam_maml(net, eps_root):
    rule = lambda extra: optax.adam(0.01, eps_root=eps_root)
    algorithm = partial(descend, steps=2, rule=rule)
    return Method(net, algorithm, identity, None, jnp.mean)


@pytest.mark.parametrize(("eps_root", "finite"), [(1e-8, True), (0.0, False)])
def test_inner_adam_on_a_pruned_net_needs_eps_root(x64, eps_root, finite):
    net, task = tiny_conv(), tiny_task()
    params = MetaParams(randomised(net), {})
    method = adam_maml(net, eps_root)
    probe = Probe(params.net, lambda weights: jnp.zeros(()))
    mask = pruning.width(jax.random.key(0), net, params.net, probe, jnp.asarray(0.5))
    seen = jax.jit(partial(view, method))(jax.random.key(0), params, task, mask)
    assert jnp.isfinite(seen.loss)
    assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(seen.grads)) == finite


def test_mgaug_takes_an_inner_adam(x64):
    net = tiny_conv()
    tasks = jax.tree.map(lambda leaf: leaf[None], tiny_task())
    method = cp(keep=0.7, subnets=1)(adam_maml(net, 1e-8))
    grads, info = jax.jit(partial(meta_gradient, method))(
        jax.random.key(0), MetaParams(randomised(net), {}), tasks
    )
    assert jnp.isfinite(info["loss"])
    assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(grads))
    assert jnp.abs(grads.net["conv0"]["kernel"]).max() > 1e-6


def test_inner_transform_is_handed_a_key_of_its_own_each_step(x64):
    net, task = LINEAR, quadratic(0)[0]

    def around(rule):
        def update(updates, state, params=None, *, key, **extra):
            drawn = jax.tree.map(lambda u: jnp.full_like(u, jax.random.normal(key)), updates)
            return rule.update(drawn, state, params)

        return optax.GradientTransformationExtraArgs(rule.init, update)

    learner = maml(net, lr=1.0, steps=3).algorithm(net, around)
    adapted = learner.adapt(
        jax.random.key(0), MetaParams(jnp.zeros((3, 1)), {}), task.support
    ).params
    draws = [jax.random.normal(jax.random.fold_in(jax.random.key(0), i)) for i in range(3)]
    np.testing.assert_allclose(adapted, -sum(draws) * np.ones((3, 1)), rtol=1e-12)


def test_losses_equal_numpy():
    rng = np.random.default_rng(0)
    logits, y = rng.normal(size=(4, 3)), rng.dirichlet(np.ones(3), 4)
    log_p = np.log(np.exp(logits) / np.exp(logits).sum(1, keepdims=True))
    np.testing.assert_allclose(cross_entropy(logits, y), -(y * log_p).sum(1).mean(), rtol=1e-5)
    np.testing.assert_allclose(squared_error(logits, y), ((logits - y) ** 2).mean(), rtol=1e-5)


# --- refusals -------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [maml, fomaml, anil, meta_sgd])
@pytest.mark.parametrize("lr", [-0.1, float("nan"), float("inf"), "fast"])
def test_an_lr_that_is_no_rate_is_refused(make, lr):
    with pytest.raises(ValueError, match=f"lr={lr!r} was asked for"):
        make(tiny_conv(), lr=lr)


@pytest.mark.parametrize("make", [maml, fomaml, anil, meta_sgd])
@pytest.mark.parametrize("steps", [0, -1, 1.5])
def test_steps_below_one_are_refused(make, steps):
    with pytest.raises(ValueError, match=f"steps={steps} was asked for"):
        make(tiny_conv(), steps=steps)
