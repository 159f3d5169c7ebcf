"""MR-MAML on weights and on activations: equations, identities, draws."""

from collections import Counter
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import make_tasks
from grid import mlp
from small import assert_close, batch, conv, differ, gradient, params_of, row, zero

from mgaug_jax import (
    anil,
    freeze,
    maml,
    meta_gradient,
    metamix,
    mr_activations,
    mr_weights,
    nets,
    pp,
    protonet,
    trainer,
)
from mgaug_jax.bottleneck import divergence
from mgaug_jax.learners import inductive
from mgaug_jax.losses import cross_entropy
from mgaug_jax.meta import task_keys, view
from mgaug_jax.types import MetaParams

pytestmark = pytest.mark.usefixtures("quick_compile")


def test_the_divergence_is_the_integral(x64):
    for mean, scale in ((0.3, 0.5), (-1.0, 2.0), (0.0, 1.0)):
        x = np.linspace(-30, 30, 400_001)
        log_q = -0.5 * ((x - mean) / scale) ** 2 - np.log(scale)
        q = np.exp(log_q) / np.sqrt(2 * np.pi)
        want = np.trapezoid(q * (log_q + 0.5 * x**2), x)
        assert float(divergence(jnp.asarray(mean), jnp.asarray(scale))) == pytest.approx(
            want, abs=1e-9
        )


def test_freezing_all_but_the_head_is_anil(x64):
    tasks = batch()
    body = freeze(lambda role: not role.head)(maml(mlp(), lr=0.5, steps=2))
    method = anil(mlp(), lr=0.5, steps=2)
    params = params_of(method)
    assert_close(gradient(body, params, tasks), gradient(method, params, tasks))


@pytest.mark.parametrize("make", [mr_weights, mr_activations])
def test_beta_zero_and_no_scale_is_maml_with_a_frozen_encoder(x64, make):
    tasks, base = batch(), maml(mlp(), lr=0.5, steps=2)
    method = make(0.0, start=-80.0)(base)
    params = params_of(method)
    frozen = freeze(lambda role: role.block < 1)(base)
    want, _ = gradient(frozen, MetaParams(params.net, {}), tasks)
    got, _ = gradient(method, params, tasks)
    assert_close(got.net, want.net)


def test_mr_weights_adds_the_divergence_of_the_encoder(x64):
    tasks = batch()
    base = maml(mlp(), lr=0.5, steps=2)
    params = params_of(mr_weights(0.0, start=-2.0)(base))
    after = [
        steps_with_extra(mr_weights(beta, start=-2.0)(base), tasks, params) for beta in (0.0, 0.1)
    ]
    added = jax.tree.map(lambda a, b: a - b, *after)  # by SGD at rate 1
    mu, rho = (np.asarray(t["dense0"]["kernel"]) for t in (params.net, params.extra["scale"]))
    s, slope = np.log1p(np.exp(rho)), 1 / (1 + np.exp(-rho))
    assert_close(added.net["dense0"]["kernel"], 0.1 * mu, rtol=1e-7)
    assert_close(added.extra["scale"]["dense0"]["kernel"], 0.1 * (s - 1 / s) * slope, rtol=1e-7)
    for layer in ("dense1", "head"):
        assert not any((leaf != 0).any() for leaf in jax.tree.leaves(added.net[layer]))
    assert not (added.net["dense0"]["bias"] != 0).any()


def test_mr_weights_equals_its_equation(x64):
    """Weights are drawn as mean plus scale times noise, through which the gradient goes."""
    net = mlp()
    method = mr_weights(0.0, start=-1.0)(maml(net, lr=0.5, steps=2))
    tasks, params = batch(), params_of(method)
    rng = np.random.default_rng(0)
    kernel = lambda tree: tree["dense0"]["kernel"]
    scale = params.extra["scale"]
    rho = kernel(scale) + rng.normal(size=kernel(scale).shape)
    scale = {**scale, "dense0": {**scale["dense0"], "kernel": rho}}
    params = params._replace(extra={"scale": scale})
    keys = list(task_keys(jax.random.split(zero(), 5)[0], tasks))
    places = [jax.tree_util.keystr(path) for path, _ in jax.tree.leaves_with_path(params.net)]
    drawn = places.index("['dense0']['kernel']")

    def meta_loss(params):
        losses = []
        for t, key in enumerate(keys):
            k_draw = jax.random.split(jax.random.split(key)[1], len(places))[drawn]
            noise = jax.random.normal(k_draw, rho.shape, float)
            spread = jnp.log1p(jnp.exp(kernel(params.extra["scale"])))
            encoder = {**params.net["dense0"], "kernel": kernel(params.net) + spread * noise}
            task, rest = row(tasks, t), {k: params.net[k] for k in ("dense1", "head")}
            outputs = lambda rest, part, encoder=encoder: net.apply(
                {"dense0": encoder, **rest}, part.x
            )
            fit = lambda rest, part, outputs=outputs: cross_entropy(outputs(rest, part), part.y)
            for _ in range(2):
                slopes = jax.grad(fit)(rest, task.support)
                rest = jax.tree.map(lambda w, g: w - 0.5 * g, rest, slopes)
            losses.append(fit(rest, task.query))
        return sum(losses) / 2

    want, slope = jax.jit(jax.value_and_grad(meta_loss))(params)
    got, info = gradient(method, params, tasks)
    assert float(info["loss"]) == pytest.approx(float(want), rel=1e-10)
    assert_close(got.net, slope.net)
    assert_close(kernel(got.extra["scale"]), kernel(slope.extra["scale"]))


def steps_with_extra(method, tasks, params):
    learner = trainer(method, optax.sgd(1.0))
    state = learner.init(zero())._replace(params=params)
    return jax.jit(learner.step)(zero(), state, tasks)[0].params


def test_the_encoder_is_drawn_around_its_mean_once_per_task_and_not_adapted(x64):
    net = mlp()
    method = mr_weights(0.0, start=-1.0)(maml(net, lr=0.5, steps=3))
    params, tasks = params_of(method), batch()
    learner = method.algorithm(method.net, method.inner)
    support = row(tasks, 0).support
    adapt = jax.jit(lambda key: learner.adapt(key, params, support).params)
    mean = params.net["dense0"]["kernel"]
    first = lambda: jax.random.key(0)
    drawn = [adapt(jax.random.key(i))["dense0"]["kernel"] - mean for i in range(100)]
    drawn = np.stack(drawn)
    s = np.log1p(np.exp(-1.0))
    n = drawn.size
    assert abs(drawn.mean()) < 4 * s / n**0.5
    assert abs(drawn.std() / s - 1) < 4 / (2 * n) ** 0.5
    one = adapt(first())
    assert not differ(one["dense0"]["bias"], params.net["dense0"]["bias"])
    assert differ(one["dense1"], params.net["dense1"])
    path = learner.path(first(), params, support).params["dense0"]["kernel"]
    assert (path == path[0]).all()  # the same draw at every step
    assert_close(path[0], one["dense0"]["kernel"])


def test_mr_weights_refuses_networks_without_an_encoder():
    with pytest.raises(ValueError, match=r"names 1\. Use"):
        mr_weights(1e-3)(maml(mlp(hidden=(6,))))
    twice = mr_weights(1e-3)(maml(mlp()))
    for method in (protonet(mlp()), anil(mlp()), twice):
        with pytest.raises(ValueError, match="takes one that moves every weight"):
            mr_weights(1e-3)(method)


def test_a_test_of_mr_activations_is_at_the_mean_whatever_the_scale(x64):
    tasks, base = batch(), maml(mlp(), lr=0.5, steps=2)
    method = mr_activations(1.0)(base)
    params = params_of(method)
    frozen = freeze(lambda role: role.block < 1)(base)
    learners = [m.algorithm(m.net, m.inner) for m in (method, frozen)]
    support = row(tasks, 0).support
    key = lambda: jax.random.key(1)
    x = tasks.query.x[0]
    found = [learner.predict(learner.adapt(key(), params, support), x) for learner in learners]
    assert_close(*found)
    path = learners[0].path(key(), params, support)
    along = jax.vmap(lambda fast: learners[0].predict(fast, x))(path)
    assert along.shape[0] == 2
    assert_close(along[-1], found[1])


@pytest.mark.parametrize("net", [mlp, conv])
def test_mr_activations_equals_its_equation(x64, net):
    net, beta = net(), 0.3
    method = mr_activations(beta, start=-1.0)(maml(net, lr=0.5, steps=2))
    tasks, params = batch(2, 3), params_of(method)
    code = jax.tree.map(
        lambda leaf: leaf + np.random.default_rng(0).normal(size=leaf.shape) / 4,
        params.extra["code"],
    )
    params = params._replace(extra={"code": code})
    keys = list(task_keys(jax.random.split(zero(), 5)[0], tasks))

    def one(params, task, keys):
        codes, cost = [], None
        for k, part in zip(keys, task, strict=True):
            h = net.part(params.net, part.x, 0, 1)
            layers = params.extra["code"]
            mu, raw = (h @ layers[n]["kernel"] + layers[n]["bias"] for n in ("mean", "scale"))
            s = jnp.log1p(jnp.exp(raw))
            codes.append(mu + s * jax.random.normal(k, h.shape, float))
            cost = jnp.mean(-jnp.log(s) + (s**2 + mu**2 - 1) / 2)  # the query's in the end
        encoder = {name for name in params.net if name.endswith("0")}
        theta = params.net

        def fit(theta):
            return cross_entropy(net.part(theta, codes[0], 1, 2), task.support.y)

        for _ in range(2):
            step = lambda t, g: t - 0.5 * g
            grads = jax.grad(fit)(theta)
            theta = {
                name: leaves if name in encoder else jax.tree.map(step, leaves, grads[name])
                for name, leaves in theta.items()
            }
        return cross_entropy(net.part(theta, codes[1], 1, 2), task.query.y) + beta * cost

    def meta_loss(params):
        draws = [jax.random.split(key, 3)[1:] for key in keys]
        return sum(one(params, row(tasks, i), draws[i]) for i in range(2)) / 2

    want, slope = jax.jit(jax.value_and_grad(meta_loss))(params)
    grads, info = gradient(method, params, tasks)
    assert float(info["loss"]) == pytest.approx(float(want), rel=1e-9)
    assert_close(grads, slope)


def test_the_divergence_of_codes_reaches_the_encoder_alone(x64):
    tasks, base = batch(), maml(mlp(), lr=0.5, steps=2)
    params = params_of(mr_activations(0.0)(base))
    with_cost, without = (
        gradient(mr_activations(beta)(base), params, tasks)[0] for beta in (1.0, 0.0)
    )
    # both have a term, so that their draws are the same
    added = jax.tree.map(lambda a, b: a - b, with_cost, without)
    assert float(jnp.abs(added.net["dense0"]["kernel"]).max()) > 1e-3
    for layer in added.extra["code"].values():
        assert float(jnp.abs(layer["bias"]).max()) > 1e-3
    for layer in ("dense1", "head"):
        assert all((jnp.abs(leaf) < 1e-14).all() for leaf in jax.tree.leaves(added.net[layer]))


def test_codes_of_a_sub_network_have_no_noise_on_channels_it_lacks(x64):
    method = mr_activations(1.0, start=1.0)(maml(mlp(), lr=0.5, steps=2))
    params, task = params_of(method), row(batch(), 0)
    kept = jnp.arange(6) < 4
    mask = jax.tree.map(lambda leaf: jnp.ones(()), params.net)
    mask["dense0"] = {"kernel": kept, "bias": kept}
    seen = jax.jit(partial(view, method))(zero(), params, task, mask)
    rows = np.abs(np.asarray(seen.grads.net["dense1"]["kernel"])).max(1)
    assert (rows[4:] == 0).all()
    assert rows[:4].max() > 0


def test_mr_activations_refuses_what_leaves_no_encoder_or_has_an_outer_loss():
    with pytest.raises(ValueError, match=r"names 1\. Use"):
        mr_activations(1e-3)(maml(mlp(hidden=(6,))))
    for method in (protonet(mlp()), anil(mlp()), mr_weights(1e-3)(maml(mlp()))):
        with pytest.raises(ValueError, match="takes one that moves every weight"):
            mr_activations(1e-3)(method)
    with pytest.raises(ValueError, match="Two outer losses"):
        mr_activations(1e-3)(metamix()(maml(mlp())))
    net = nets.conv4(3, width=4, image=(16, 16, 1))
    with pytest.raises(ValueError, match="transductive batch norm"):
        mr_activations(1e-3)(maml(net, forward=inductive))


def test_every_task_and_sub_network_meets_a_draw_of_its_own():
    """Through a whole meta-step: the kernels that the forward passes are handed."""
    plain, seen = mlp(), []

    def spy(params, x):
        jax.debug.callback(lambda w: seen.append(w.tobytes()), params["dense0"]["kernel"][:2])
        return plain.apply(params, x)

    tasks, subnets, steps = 3, 2, 2
    base = maml(plain._replace(apply=spy), lr=0.1, steps=steps)
    method = pp(keep=1.0, cap=1.0, subnets=subnets)(mr_weights(1e-3, start=-1.0)(base))
    params = method.algorithm(method.net, method.inner).init(zero())
    step = jax.jit(partial(meta_gradient, method))
    jax.block_until_ready(step(zero(), params, make_tasks(zero(), tasks, shape=(8, 8, 1))))
    jax.effects_barrier()
    mean = np.asarray(params.net["dense0"]["kernel"][:2]).tobytes()
    drawn = [kernel for kernel in seen if kernel != mean]  # the pruner looks at the mean
    counts = Counter(drawn)
    assert len(counts) == tasks * (1 + subnets)  # and the inner steps and the query share it
    assert min(counts.values()) >= steps + 1


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: mr_weights(-1.0), "beta="),
        (lambda: mr_weights(1.0, blocks=0), "blocks=0"),
        (lambda: mr_weights(1.0, start=-90.0), r"start=-90\.0 was asked for"),
        (lambda: mr_weights(1.0, start="low"), "start='low' was asked for"),
        (lambda: mr_activations(-1.0), "beta="),
        (lambda: mr_activations(1.0, blocks=0), "blocks=0"),
        (lambda: mr_activations(1.0, start=-90.0), r"start=-90\.0 was asked for"),
    ],
)
def test_numbers_that_make_no_sense_are_refused(make, says):
    with pytest.raises(ValueError, match=says):
        make()
