"""MetaMix, Channel Shuffle, the multi-step loss and Reptile, against loops that write them out."""

from collections import Counter
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import make_tasks
from grid import mlp
from small import assert_close, batch, conv, differ, gradient, params_of, row, zero

from mgaug_jax import (
    anil,
    freeze,
    lslr,
    maml,
    maxup,
    meta_gradient,
    meta_sgd,
    metamix,
    mr_activations,
    mr_weights,
    multi_step_loss,
    nets,
    noise,
    pp,
    protonet,
    reptile,
)
from mgaug_jax.judging import beta_law, donors, in_group
from mgaug_jax.learners import inductive
from mgaug_jax.losses import cross_entropy, squared_error
from mgaug_jax.meta import subnet, task_keys, view
from mgaug_jax.types import Examples, MetaParams, Task

pytestmark = pytest.mark.usefixtures("quick_compile")


@pytest.mark.parametrize(("net", "pruner"), [(mlp, "none"), (mlp, "pp"), (conv, "none")])
def test_lambda_one_is_the_plain_query_loss(x64, net, pruner):
    views = {"none": lambda m: m, "pp": pp(keep=1.0, cap=1.0, subnets=1)}[pruner]
    method = views(maml(net(), lr=0.5, steps=2))
    tasks, params = batch(), params_of(method)
    mixed = metamix(law=lambda key: jnp.ones(()))(method)
    assert_close(gradient(mixed, params, tasks), gradient(method, params, tasks))


@pytest.mark.parametrize("alpha", [2.0, 0.5])
def test_lambda_has_the_moments_of_its_beta_law(alpha):
    n = 100_000
    keys = jax.random.split(zero(), n)
    lam = np.asarray(jax.jit(jax.vmap(beta_law(alpha)))(keys), np.float64)
    # E lambda^i (1 - lambda)^i = prod_j<i (alpha + j)^2 / prod_j<2i (2 alpha + j)
    moment = lambda i: np.prod((alpha + np.arange(i)) ** 2) / np.prod(2 * alpha + np.arange(2 * i))
    assert abs(lam.mean() - 0.5) < 4 * (0.25 / (2 * alpha + 1) / n) ** 0.5
    for i in (1, 2):
        error = (moment(2 * i) - moment(i) ** 2) ** 0.5 / n**0.5
        assert abs(((lam * (1 - lam)) ** i).mean() - moment(i)) < 4 * error


@pytest.mark.parametrize(("net", "queries"), [("mlp", 1), ("mlp", 3), ("conv", 2)])
def test_metamix_equals_its_equation_at_every_layer(x64, net, queries):
    method = maml({"mlp": mlp, "conv": conv}[net](), lr=0.5, steps=2)
    tasks, params = batch(1, queries), params_of(method)
    task, layers = row(tasks, 0), set()
    learner = method.algorithm(method.net, method.inner)
    mixed = jax.jit(partial(meta_gradient, metamix()(method)))

    def meta_loss(params, key, lam, pairs, layer):
        theta = learner.adapt(key, params, task.support).params
        h = method.net.part(theta, task.query.x, 0, layer)
        s = method.net.part(theta, task.support.x, 0, layer)
        h = jnp.stack([lam * h[i] + (1 - lam) * s[pairs[i]] for i in range(len(h))])
        logits = method.net.part(theta, h, layer, method.net.depth)
        log_p = logits - jnp.log(jnp.exp(logits).sum(1, keepdims=True))
        own = -(task.query.y * log_p).sum(1)
        other = -(task.support.y[pairs] * log_p).sum(1)
        return jnp.mean(lam * own + (1 - lam) * other)

    slopes = jax.jit(jax.value_and_grad(meta_loss), static_argnums=4)
    for seed in range(8):
        grads, info = mixed(jax.random.key(seed), params, tasks)
        task_key = task_keys(jax.random.split(jax.random.key(seed), 3)[0], tasks)[0]
        k_adapt, k_law, k_layer, k_pairs = jax.random.split(task_key, 4)
        lam = float(jax.random.beta(k_law, 2.0, 2.0))
        layer = int(jax.random.randint(k_layer, (), 0, method.net.depth))
        pairs = _pairing(k_pairs, len(task.query.x), 3)
        want, slope = slopes(params, k_adapt, lam, pairs, layer)
        assert float(info["loss"]) == pytest.approx(float(want), rel=1e-9)
        assert_close(grads, slope)
        layers.add(layer)
    assert layers == set(range(method.net.depth))


def test_metamix_mixes_the_targets_of_a_regression(x64):
    net = nets.mlp((4,), inputs=2)
    method = maml(net, lr=0.1, steps=1, loss=squared_error)
    rng = np.random.default_rng(0)
    part = Examples(*(jnp.asarray(rng.normal(size=(1, 3, d))) for d in (2, 1)))
    tasks, params = Task(part, part), params_of(method)
    half = metamix(law=lambda key: jnp.asarray(0.25))(method)
    task_key = task_keys(jax.random.split(zero(), 3)[0], tasks)[0]
    k_adapt, _, _, k_pairs = jax.random.split(task_key, 4)
    pairs = jax.random.permutation(k_pairs, 3)
    theta = method.algorithm(net, method.inner).adapt(k_adapt, params, row(part, 0)).params
    mix = lambda a: 0.25 * a[0] + 0.75 * a[0][pairs]
    want = jnp.mean((net.apply(theta, mix(part.x)) - mix(part.y)) ** 2)
    _, info = gradient(half, params, tasks)
    assert float(info["loss"]) == pytest.approx(float(want), rel=1e-9)


@pytest.mark.parametrize(
    ("channels", "sizes"),
    [(32, [6, 5, 5, 6, 5, 5]), (64, [12, 10, 10, 12, 10, 10]), (7, [1, 1, 1, 2, 1, 1])],
)
def test_channel_groups_are_the_released_ones_and_cover_every_channel_once(channels, sizes):
    groups = np.stack([in_group(channels, jnp.asarray(g)) for g in range(6)])
    assert groups.sum(1).tolist() == sizes
    assert (groups.sum(0) == 1).all()
    assert all(np.diff(np.flatnonzero(group)).max(initial=1) == 1 for group in groups)


def test_a_class_is_given_channels_by_the_one_after_it_in_the_cycle():
    for seed in range(20):
        rng = np.random.default_rng(seed)
        labels, order = rng.permutation(np.repeat(np.arange(4), 3)), rng.permutation(4).tolist()
        found = np.asarray(donors(jnp.eye(4)[labels], jnp.asarray(order)))
        for i, label in enumerate(labels):
            giver = order[(order.index(label) + 1) % 4]
            place = (labels[:i] == label).sum()
            assert found[i] == np.flatnonzero(labels == giver)[place]
    with pytest.raises(ValueError, match="equally many examples"):
        donors(jnp.eye(3)[jnp.array([0, 1, 2, 0])], jnp.arange(3))


@pytest.mark.parametrize("pruner", ["none", "wp"])
def test_channel_shuffle_equals_its_equation_in_both_loops(x64, pruner):
    """The whole meta-loss, by a loop that writes out every exchange."""
    base = mlp(hidden=(8, 7, 6))
    tasks = batch(1, 3, seed=4)
    task, layers = row(tasks, 0), set()
    method = maml(base, lr=0.5, steps=2)
    params = params_of(method)
    mask = None
    net = base
    if pruner == "wp":
        mask = jax.tree.map(lambda leaf: jnp.ones(()), params.net)
        mask["dense0"] = {"kernel": jnp.arange(8) < 6, "bias": jnp.arange(8) < 6}
        net = subnet(base, mask)
    once = jax.jit(lambda key: view(metamix(shuffle=1.0)(method), key, params, task, mask))
    for seed in range(6):
        found = once(jax.random.key(seed))
        keys = jax.random.split(jax.random.key(seed), 5)
        lam = float(jax.random.beta(keys[1], 2.0, 2.0))
        _, k_layer, k_order, k_group = jax.random.split(keys[4], 4)
        layer = int(jax.random.randint(k_layer, (), 1, 3))
        order = np.asarray(jax.random.permutation(k_order, 3)).tolist()
        group = int(jax.random.randint(k_group, (), 0, 6))
        pairs = _pairing(keys[3], len(task.query.x), len(task.support.x))

        def exchange(h, y, layer=layer, order=order, group=group):
            width = (8, 7, 6)[layer - 1]
            sizes = {8: [2, 1, 1, 2, 1, 1], 7: [1, 1, 1, 2, 1, 1], 6: [1] * 6}[width]
            first = sum(sizes[:group])
            labels = np.asarray(y).argmax(1)
            rows = []
            for i, label in enumerate(labels):
                giver = np.flatnonzero(labels == order[(order.index(label) + 1) % 3])
                other = h[giver[(labels[:i] == label).sum()]]
                rows.append(
                    h[i].at[first : first + sizes[group]].set(other[first : first + sizes[group]])
                )
            return jnp.stack(rows)

        def fit(theta, layer=layer, exchange=exchange):
            h = exchange(net.part(theta, task.support.x, 0, layer), task.support.y)
            return cross_entropy(net.part(theta, h, layer, 3), task.support.y)

        def meta_loss(theta, fit=fit, exchange=exchange, layer=layer, lam=lam, pairs=pairs):
            for _ in range(2):
                theta = jax.tree.map(lambda t, g: t - 0.5 * g, theta, jax.grad(fit)(theta))
            h, s = (
                exchange(net.part(theta, part.x, 0, layer), part.y)
                for part in (task.query, task.support)
            )
            logits = net.part(theta, lam * h + (1 - lam) * s[pairs], layer, 3)
            y = lam * task.query.y + (1 - lam) * task.support.y[pairs]
            return cross_entropy(logits, y)

        want, slope = jax.jit(jax.value_and_grad(meta_loss))(params.net)
        assert float(found.loss) == pytest.approx(float(want), rel=1e-9)
        assert_close(found.grads.net, slope)
        layers.add(layer)
    assert layers == {1, 2}


def _pairing(key, queries, supports):
    if queries == supports:
        return np.asarray(jax.random.permutation(key, supports))
    return np.asarray(jax.random.randint(key, (queries,), 0, supports))


def test_a_channel_shuffle_that_never_happens_is_metamix(x64):
    method, tasks = maml(mlp(), lr=0.5, steps=2), batch()
    params = params_of(method)
    want, _ = gradient(metamix()(method), params, tasks)
    traced = jax.jit(
        lambda rate: meta_gradient(metamix(shuffle=rate)(method), zero(), params, tasks)[0]
    )
    assert_close(traced(0.0), want)
    assert differ(traced(1.0).net, want.net)


def test_channel_shuffle_is_as_frequent_as_said_and_uniform_over_layers_groups_and_cycles():
    """Blocks that only move channels on by one: where a group ends up tells where it was."""
    n, way, rate = 7000, 12, 0.3
    net = nets.from_functions(lambda key: {"w": jnp.ones(())}, lambda p, x: p["w"] * x)
    on = lambda p, h, first, last: jnp.roll(p["w"] * h, last - first, axis=1)
    net = net._replace(part=on, depth=3)
    method = metamix(shuffle=rate, law=lambda key: jnp.ones(()))(maml(net, lr=0.0, steps=1))
    part = Examples(jnp.arange(way * way, dtype=float).reshape(way, way), jnp.eye(way))
    params = params_of(method)
    once = lambda key: view(method, key, params, Task(part, part)).logits
    plain = np.roll(part.x, 3, axis=1)
    places, givers = Counter(), Counter()
    for logits in np.asarray(jax.jit(jax.vmap(once))(jax.random.split(zero(), n))):
        moved = set(np.flatnonzero((logits != plain).any(0)).tolist())
        if moved:
            (start,) = (c for c in moved if (c - 1) % way not in moved)
            assert len(moved) == 2
            layer = 1 if start % 2 == 0 else 2  # followed by two blocks, or by one
            places[layer, (start - 3 + layer) % way // 2] += 1
            givers[int(logits[0, start]) // way] += 1
    total = places.total()
    assert abs(total - rate * n) < 4.5 * (n * rate * (1 - rate)) ** 0.5
    assert len(places) == 2 * 6
    assert set(givers) == set(range(1, way))
    for counts in (places, givers):
        share = total / len(counts)
        assert all(abs(count - share) < 4.5 * share**0.5 for count in counts.values())


def test_channel_shuffle_refuses_what_has_no_classes_or_no_hidden_layer():
    regression = maml(nets.mlp((4, 4), inputs=2), loss=squared_error)
    for method in (regression, maml(mlp(hidden=(6,)))):
        metamix()(method)
        with pytest.raises(ValueError, match="classes and more than one block"):
            metamix(shuffle=0.5)(method)
    own = lambda outputs, y: 2 * cross_entropy(outputs, y)
    tasks, method = batch(), metamix(shuffle=0.5)(maml(mlp(), loss=own))
    assert jnp.isfinite(gradient(method, params_of(method), tasks)[1]["loss"])
    with pytest.raises(ValueError, match="targets are no classes; leave shuffle out"):
        donors(tasks.query.y[0, :, :1], jnp.arange(1))


def test_multi_step_loss_is_the_mean_over_shorter_loops(x64):
    make = lambda steps: maml(mlp(), lr=0.5, steps=steps)
    tasks, params = batch(), params_of(make(1))
    each = [gradient(make(steps), params, tasks) for steps in (1, 2, 3)]
    for last in (0.0, 0.4, 1.0):
        got, info = gradient(multi_step_loss(last)(make(3)), params, tasks)
        weights = [(1 - last) / 3, (1 - last) / 3, (1 - last) / 3 + last]
        mean = lambda *g, weights=weights: sum(w * x for w, x in zip(weights, g, strict=True))
        assert_close(got, jax.tree.map(mean, *(g for g, _ in each)))
        assert float(info["loss"]) == pytest.approx(
            float(mean(*(i["loss"] for _, i in each))), rel=1e-9
        )


def noisy(key, task):
    """A change that is never the same."""
    x = task.query.x + jax.random.normal(key, task.query.x.shape)
    return task._replace(query=task.query._replace(x=x))


@pytest.mark.parametrize(
    "change",
    [
        metamix(),
        metamix(shuffle=1.0),
        maxup(pool=[noisy], copies=2),
        mr_activations(1e-3),
        mr_weights(1e-3, start=-1.0),
        noise(0.1),
    ],
    ids=["metamix", "channel_shuffle", "maxup", "mr_activations", "mr_weights", "noise"],
)
def test_every_task_and_network_has_draws_of_its_own(change):
    """One task three times and whole sub-networks: nothing but draws can tell losses apart."""
    seen = []

    def spy(losses):
        jax.debug.callback(lambda losses: seen.extend(losses.tolist()), losses)
        return jnp.sum(losses)

    method = pp(keep=1.0, cap=1.0, subnets=2, reduce=spy)(change(maml(mlp(), lr=0.1, steps=1)))
    tasks = jax.tree.map(
        lambda leaf: jnp.repeat(leaf, 3, axis=0), make_tasks(zero(), 1, shape=(8, 8, 1))
    )
    jax.block_until_ready(gradient(method, params_of(method), tasks))
    jax.effects_barrier()
    assert len(set(seen)) == 3 * 3


def test_outer_losses_refuse_each_other_and_what_they_cannot_do():
    method = maml(mlp())
    with pytest.raises(ValueError, match="Two outer losses"):
        metamix()(multi_step_loss()(method))
    with pytest.raises(ValueError, match="names its blocks"):
        metamix()(protonet(mlp()))
    with pytest.raises(ValueError, match="transductive batch norm"):
        metamix()(maml(nets.conv4(3, width=4, image=(16, 16, 1)), forward=inductive))
    with pytest.raises(ValueError, match="protonet has no inner steps"):
        multi_step_loss()(protonet(mlp()))
    own = nets.from_functions(lambda key: {"w": jnp.ones((3, 1))}, lambda p, x: x @ p["w"])
    with pytest.raises(ValueError, match="names its blocks"):
        metamix()(maml(own))


def test_lslr_with_equal_rates_is_maml_and_learns_a_rate_per_step(x64):
    tasks = batch()
    plain, learned = maml(mlp(), lr=0.25, steps=3), lslr(mlp(), lr=0.25, steps=3)
    params = params_of(learned)
    want, _ = gradient(plain, MetaParams(params.net, {}), tasks)
    got, _ = gradient(learned, params, tasks)
    assert_close(got.net, want.net)
    for leaf in jax.tree.leaves(got.extra["lr"]):
        assert leaf.shape == (3,)
        assert (leaf != 0).all()


def test_lslr_descends_by_the_rate_of_every_leaf_and_step(x64):
    tasks, learned = batch(), lslr(mlp(), lr=0.25, steps=3)
    params = params_of(learned)
    rng = np.random.default_rng(0)
    rates = jax.tree.map(lambda r: r * rng.uniform(0.2, 3.0, r.shape), params.extra["lr"])
    params = params._replace(extra={"lr": rates})

    def meta_loss(params):
        losses = []
        for t in range(2):
            task, theta = row(tasks, t), params.net
            fit = lambda theta, part: cross_entropy(learned.net.apply(theta, part.x), part.y)
            for i in range(3):
                slopes = jax.grad(fit)(theta, task.support)
                step = lambda w, g, rate, i=i: w - rate[i] * g
                theta = jax.tree.map(step, theta, slopes, params.extra["lr"])
            losses.append(fit(theta, task.query))
        return sum(losses) / 2

    want, slope = jax.jit(jax.value_and_grad(meta_loss))(params)
    got, info = gradient(learned, params, tasks)
    assert float(info["loss"]) == pytest.approx(float(want), rel=1e-10)
    assert_close(got, slope)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: multi_step_loss(1.5), "last=1.5"),
        (lambda: metamix(shuffle=1.5), "shuffle=1.5"),
    ],
)
def test_numbers_that_make_no_sense_are_refused(make, says):
    with pytest.raises(ValueError, match=says):
        make()


@pytest.mark.parametrize("steps", [1, 3])
def test_reptile_steps_from_the_initial_to_the_mean_adapted_weights(x64, steps):
    method = reptile()(maml(mlp(), lr=0.5, steps=steps))
    tasks, params = batch(3), params_of(method)
    learner = method.algorithm(method.net, method.inner)
    adapted = []
    for t in range(3):
        task = row(tasks, t)
        both = jax.tree.map(lambda s, q: jnp.concatenate([s, q]), task.support, task.query)
        adapted.append(learner.adapt(zero(), params, both).params)
    mean = jax.tree.map(lambda *w: sum(w) / 3, *adapted)
    got, info = gradient(method, params, tasks)
    assert_close(got.net, jax.tree.map(jnp.subtract, params.net, mean))
    outputs = [
        learner.predict(learner.start(MetaParams(w, {}), None), tasks.query.x[t])
        for t, w in enumerate(adapted)
    ]
    losses = [cross_entropy(o, tasks.query.y[t]) for t, o in enumerate(outputs)]
    assert float(info["loss"]) == pytest.approx(float(sum(losses) / 3), rel=1e-9)


@pytest.mark.parametrize("make", [protonet, anil, lambda net: mr_weights(1e-3)(maml(net))])
def test_reptile_needs_an_inner_loop_that_moves_every_weight(make):
    with pytest.raises(ValueError, match="must move every weight"):
        reptile()(make(mlp()))
    with pytest.raises(ValueError, match="must move every weight"):
        freeze(lambda role: role.head)(reptile()(maml(mlp())))


@pytest.mark.parametrize("make", [meta_sgd, lslr])
def test_reptile_has_no_gradient_for_rates(make):
    with pytest.raises(ValueError, match="all that is learned; use maml"):
        reptile()(make(mlp()))
