"""The regularisers of the comparison tables against their equations, identities and moments."""

import itertools
from collections import Counter
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import make_tasks
from grid import mlp

from mgaug_jax import (
    anil,
    augment,
    copies,
    fomaml,
    freeze,
    fresh_optimizer,
    l2,
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
    outer,
    perturb,
    pp,
    protonet,
    reptile,
    rotate_classes,
    shift_targets,
    shuffle_labels,
    taml,
    trainer,
    weight_decay,
)
from mgaug_jax.augmentations import turn
from mgaug_jax.bottleneck import divergence
from mgaug_jax.judging import beta_law, donors, in_group
from mgaug_jax.learners import inductive
from mgaug_jax.losses import cross_entropy, squared_error
from mgaug_jax.meta import subnet, task_keys, view
from mgaug_jax.nets.adapters import net_of
from mgaug_jax.nets.backbones import ConvNet, conv_roles
from mgaug_jax.types import Examples, MetaParams, Task

pytestmark = pytest.mark.usefixtures("quick_compile")


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


# --- blocks ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["conv4", "resnet10", "mlp"])
def test_blocks_in_a_row_are_the_network(name):
    net, x = {
        "conv4": lambda: (nets.conv4(3, width=4, image=(16, 16, 1)), jnp.ones((2, 16, 16, 1))),
        "resnet10": lambda: (nets.resnet10(3, image=(32, 32, 1)), jnp.ones((2, 32, 32, 1))),
        "mlp": lambda: (nets.mlp((6, 5, 4), inputs=3), jnp.ones((2, 3))),
    }[name]()
    x = x + jax.random.normal(jax.random.key(1), x.shape)
    params = net.init(zero())
    whole = net.apply(params, x)
    for cut in range(1, net.depth):
        h = net.part(params, net.part(params, x, 0, cut), cut, net.depth)
        np.testing.assert_allclose(h, whole, rtol=1e-5, atol=1e-6)
    blocks = {role.block for role in jax.tree.leaves(net.roles)}
    assert blocks == set(range(net.depth))
    heads = [role.block for role in jax.tree.leaves(net.roles) if role.head]
    assert set(heads) == {net.depth - 1}


def test_a_block_uses_the_weights_that_its_role_says():
    net = conv()
    params = net.init(zero())
    x = jax.random.normal(jax.random.key(1), (3, 8, 8, 1))
    for block in range(2):
        h = net.part(params, x, 0, block)
        grads = jax.grad(lambda p, h=h, b=block: jnp.sum(net.part(p, h, b, b + 1) ** 2))(params)
        used = jax.tree.map(lambda g: bool((g != 0).any()), grads)
        for role, u in zip(*map(jax.tree.leaves, (net.roles, used)), strict=True):
            assert u == (role.block == block) or (not role.prunable and not u)  # a norm's biases


def test_a_sub_network_masks_its_blocks(x64):
    net = mlp()
    params = floats(net.init(zero()))
    mask = jax.tree.map(lambda w: (jnp.abs(w) > 0.05).astype(float), params)
    x = batch().query.x[0]
    small = subnet(net, mask)
    assert_close(
        small.part(params, x, 0, 2), net.apply(jax.tree.map(jnp.multiply, params, mask), x)
    )


# --- weights between steps ------------------------------------------------------------------


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
        (lambda: taml.inequality(float("nan")), "weight="),
        (lambda: taml.entropy(-1), "weight="),
        (lambda: multi_step_loss(1.5), "last=1.5"),
        (lambda: shift_targets(0), "width=0"),
        (lambda: rotate_classes(1.5), "rate=1.5"),
        (lambda: mr_weights(-1.0), "beta="),
        (lambda: mr_weights(1.0, blocks=0), "blocks=0"),
        (lambda: mr_weights(1.0, start=-90.0), r"start=-90\.0 was asked for"),
        (lambda: mr_weights(1.0, start="low"), "start='low' was asked for"),
        (lambda: mr_activations(-1.0), "beta="),
        (lambda: mr_activations(1.0, blocks=0), "blocks=0"),
        (lambda: mr_activations(1.0, start=-90.0), r"start=-90\.0 was asked for"),
        (lambda: metamix(shuffle=1.5), "shuffle=1.5"),
    ],
)
def test_numbers_that_make_no_sense_are_refused(make, says):
    with pytest.raises(ValueError, match=says):
        make()


# --- TAML -----------------------------------------------------------------------------------


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


# --- MetaMix and the multi-step loss ---------------------------------------------------------


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
    for seed in range(8):
        _, info = mixed(jax.random.key(seed), params, tasks)
        task_key = task_keys(jax.random.split(jax.random.key(seed), 3)[0], tasks)[0]
        k_adapt, k_law, k_layer, k_pairs = jax.random.split(task_key, 4)
        lam = float(jax.random.beta(k_law, 2.0, 2.0))
        layer = int(jax.random.randint(k_layer, (), 0, method.net.depth))
        n = len(task.query.x)
        pairs = np.asarray(
            jax.random.permutation(k_pairs, 3)
            if n == 3
            else jax.random.randint(k_pairs, (n,), 0, 3)
        )
        theta = learner.adapt(k_adapt, params, task.support).params
        h = method.net.part(theta, task.query.x, 0, layer)
        s = method.net.part(theta, task.support.x, 0, layer)
        h = np.stack([lam * h[i] + (1 - lam) * s[pairs[i]] for i in range(n)])
        logits = np.asarray(method.net.part(theta, jnp.asarray(h), layer, method.net.depth))
        log_p = logits - np.log(np.exp(logits).sum(1, keepdims=True))
        own = -(np.asarray(task.query.y) * log_p).sum(1)
        other = -(np.asarray(task.support.y)[pairs] * log_p).sum(1)
        want = np.mean(lam * own + (1 - lam) * other)
        assert float(info["loss"]) == pytest.approx(want, rel=1e-9)
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
    once = jax.jit(lambda key: view(metamix(shuffle=1.0)(method), key, params, task, mask).loss)
    for seed in range(6):
        found = float(once(jax.random.key(seed)))
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

        theta = params.net
        for _ in range(2):
            theta = jax.tree.map(lambda t, g: t - 0.5 * g, theta, jax.grad(fit)(theta))
        h, s = (
            exchange(net.part(theta, part.x, 0, layer), part.y)
            for part in (task.query, task.support)
        )
        logits = net.part(theta, lam * h + (1 - lam) * s[pairs], layer, 3)
        y = lam * task.query.y + (1 - lam) * task.support.y[pairs]
        assert found == pytest.approx(float(cross_entropy(logits, y)), rel=1e-9)
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


def test_channel_shuffle_refuses_what_has_no_classes_or_no_hidden_layer():
    regression = maml(nets.mlp((4, 4), inputs=2), loss=squared_error)
    for method in (regression, maml(mlp(hidden=(6,)))):
        metamix()(method)
        with pytest.raises(ValueError, match="classes and more than one block"):
            metamix(shuffle=0.5)(method)


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
    got, info = gradient(learned, params, tasks)
    assert_close(got.net, want.net)
    for leaf in jax.tree.leaves(got.extra["lr"]):
        assert leaf.shape == (3,)
        assert (leaf != 0).all()
    bump = jnp.zeros(3).at[1].set(1e-5)
    rates = params.extra["lr"]
    moved = {**rates, "head": {**rates["head"], "kernel": rates["head"]["kernel"] + bump}}
    _, after = gradient(learned, params._replace(extra={"lr": moved}), tasks)
    slope = (after["loss"] - info["loss"]) / 1e-5
    np.testing.assert_allclose(slope, got.extra["lr"]["head"]["kernel"][1], rtol=1e-3)


# --- MR-MAML --------------------------------------------------------------------------------


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


def test_mr_weights_of_beta_zero_and_no_scale_is_maml_with_a_frozen_encoder(x64):
    tasks = batch()
    base = maml(mlp(), lr=0.5, steps=2)
    method = mr_weights(0.0, start=-80.0)(base)
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


def test_mr_activations_of_beta_zero_and_no_scale_is_maml_with_a_frozen_encoder(x64):
    tasks, base = batch(), maml(mlp(), lr=0.5, steps=2)
    method = mr_activations(0.0, start=-80.0)(base)
    params = params_of(method)
    frozen = freeze(lambda role: role.block < 1)(base)
    want, _ = gradient(frozen, MetaParams(params.net, {}), tasks)
    got, _ = gradient(method, params, tasks)
    assert_close(got.net, want.net)
    # a test is at the mean whatever the scale
    learners = [m.algorithm(m.net, m.inner) for m in (mr_activations(1.0)(base), frozen)]
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
    layers, losses = (code["mean"], code["scale"]), []
    k_inner = jax.random.split(zero(), 5)[0]
    for key, i in zip(task_keys(k_inner, tasks), range(2), strict=True):
        task, codes, cost = row(tasks, i), [], None
        _, *keys = jax.random.split(key, 3)
        for k, part in zip(keys, task, strict=True):
            h = np.asarray(net.part(params.net, part.x, 0, 1))
            mu, raw = (h @ np.asarray(w["kernel"]) + np.asarray(w["bias"]) for w in layers)
            s = np.log1p(np.exp(raw))
            codes.append(mu + s * np.asarray(jax.random.normal(k, h.shape, float)))
            cost = np.mean(-np.log(s) + (s**2 + mu**2 - 1) / 2)  # the query's in the end
        z_support, z_query = map(jnp.asarray, codes)
        theta = params.net

        def fit(theta, z=z_support, task=task):
            return cross_entropy(net.part(theta, z, 1, 2), task.support.y)

        for _ in range(2):
            theta = jax.tree.map(lambda t, g: t - 0.5 * g, theta, jax.grad(fit)(theta))
        loss = cross_entropy(net.part(theta, z_query, 1, 2), task.query.y)
        losses.append(float(loss) + beta * cost)
    _, info = gradient(method, params, tasks)
    assert float(info["loss"]) == pytest.approx(np.mean(losses), rel=1e-9)


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


# --- augmentation ---------------------------------------------------------------------------


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


# --- Meta-MaxUp and Reptile ------------------------------------------------------------------


def shifted(by):
    """A change that moves the query images."""
    return lambda key, task: task._replace(query=task.query._replace(x=task.query.x + by))


def test_one_copy_of_maxup_is_plain_augmentation(x64):
    method = maml(mlp(), lr=0.5, steps=2)
    tasks, params = batch(3), params_of(method)
    change = shifted(0.7)
    want = gradient(augment(change)(method), params, tasks)
    got = gradient(maxup(pool=[change], copies=1)(method), params, tasks)
    assert_close(got, want)


@pytest.mark.parametrize("level", ["by_task", "by_query"])
@pytest.mark.parametrize("algorithm", ["maml", "protonet"])
def test_maxup_is_the_worst_of_its_copies(x64, algorithm, level):
    """Two changes, eight copies: all but surely both are among them, and the worst is known."""
    method = {"maml": maml(mlp(), lr=0.5, steps=2), "protonet": protonet(mlp())}[algorithm]
    tasks, params = batch(3), params_of(method)
    changes = [shifted(0.9), shifted(-1.5)]
    learner = method.algorithm(method.net, method.inner)

    def losses(params, task):
        of = []
        for change in changes:
            now = change(zero(), task)
            out = learner.predict(learner.adapt(zero(), params, now.support), now.query.x)
            of.append(-jnp.sum(now.query.y * jax.nn.log_softmax(out), axis=-1))
        return jnp.stack(of)

    def objective(params):
        each = [losses(params, row(tasks, t)) for t in range(3)]
        if level == "by_task":
            return sum(jnp.max(jnp.mean(x, axis=1)) for x in each) / 3
        return sum(jnp.mean(jnp.max(x, axis=0)) for x in each) / 3

    want, grads = jax.jit(jax.value_and_grad(objective))(params)
    rule = maxup(pool=changes, copies=8, level=getattr(copies, level))
    got, info = gradient(rule(method), params, tasks, jax.random.key(3))
    assert float(info["loss"]) == pytest.approx(float(want), rel=1e-10)
    assert_close(got, grads)


def images(n=6, side=12, seed=0):
    x = jax.random.uniform(jax.random.key(seed), (n, side, side, 2), minval=0.1)
    return Examples(x, jnp.eye(n))


def test_cutmix_pastes_a_box_and_mixes_labels_by_its_share():
    before, shares = images(), []
    for seed in range(60):
        after = jax.jit(copies.cutmix)(jax.random.key(seed), before)
        x, y = np.asarray(after.x), np.asarray(after.y)
        share = []
        for i in range(6):
            other = [j for j in range(6) if j != i and y[i, j] > 0]
            changed = (x[i] != np.asarray(before.x[i])).all(-1)
            if not other:  # its own partner, or no box
                assert not changed.any()
                continue
            np.testing.assert_array_equal(x[i][changed], before.x[other[0]][changed])
            rows, columns = np.where(changed)
            assert changed.sum() == (np.ptp(rows) + 1) * (np.ptp(columns) + 1)
            assert y[i, other[0]] == pytest.approx(changed.mean(), abs=1e-6)
            assert y[i].sum() == pytest.approx(1, abs=1e-6)
            share.append(changed.mean())
        assert len(set(share)) <= 1
        shares += share[:1]
    assert 0.2 < np.mean(shares) < 0.5  # E (1 - lambda) = 1/2, less what the border cuts off


def test_the_share_that_cutmix_pastes_follows_beta_2_2():
    """Mean, variance and deciles, against boxes that numpy draws, cuts off and counts."""
    side, n = 24, 6000
    pair = Examples(jnp.stack([jnp.zeros((side, side, 1)), jnp.ones((side, side, 1))]), jnp.eye(2))
    after = jax.jit(jax.vmap(lambda key: copies.cutmix(key, pair)))(jax.random.split(zero(), n))
    share = np.asarray(after.x[:, 0].mean((1, 2, 3)))
    assert bool((after.x[:, 0] + after.x[:, 1] == 1).all())  # one box for both
    np.testing.assert_allclose(after.y[:, 0, 1], share, atol=1e-6)
    rng, want = np.random.default_rng(0), []
    for _ in range(60_000):
        length = round(np.sqrt(1 - rng.beta(2, 2)) * side)
        starts = np.floor(rng.uniform(0, side, 2) - length / 2 + 0.5)
        inside = np.minimum(starts + length, side) - np.maximum(starts, 0)
        want.append(np.prod(inside) / side**2)
    want = np.array(want)
    share = share[share > 0]  # half of the permutations of two exchange nothing
    assert abs(len(share) - n / 2) < 4.5 * n**0.5 / 2
    assert abs(share.mean() - want.mean()) < 4.5 * want.std() / len(share) ** 0.5
    assert abs(share.var() / want.var() - 1) < 0.12
    tenths = np.linspace(0.1, 0.9, 9)
    np.testing.assert_allclose(np.quantile(share, tenths), np.quantile(want, tenths), atol=0.02)


def test_erase_blanks_a_box_of_half_of_the_images():
    before = images(400, 16)
    after = np.asarray(jax.jit(copies.erase)(zero(), before).x)
    blank = (after == 0).all(-1)
    np.testing.assert_array_equal(after[~blank], np.asarray(before.x)[~blank])
    areas = []
    for one in blank[blank.any((1, 2))]:
        rows, columns = np.where(one)
        sides = np.ptp(rows) + 1, np.ptp(columns) + 1
        assert one.sum() == sides[0] * sides[1]
        areas.append(one.mean())
    assert abs(len(areas) - 200) < 4.5 * 10
    # a pixel of a side of 16 is what rounding can add
    assert min(areas) > 0.02 - 2 / 16 * 0.25
    assert max(areas) < 0.4 + 2 / 16
    assert np.mean(areas) == pytest.approx(0.21, abs=0.03)


def test_the_aspect_of_an_erased_box_is_log_uniform_whatever_its_area():
    """Deciles of aspect and area, against the law drawn and rounded in numpy."""
    side, n = 64, 3000
    before = Examples(jnp.ones((n, side, side, 1)), jnp.ones((n, 1)))
    blank = np.asarray(jax.jit(copies.erase)(zero(), before).x[..., 0] == 0)
    blank = blank[blank.any((1, 2))]
    mine = np.stack([blank.any(axis).sum(1) for axis in (2, 1)], axis=1)
    rng = np.random.default_rng(0)
    area = rng.uniform(0.02, 0.4, 60_000)
    aspect = np.exp(rng.uniform(np.log(0.3), np.log(10 / 3), len(area)))
    theirs = np.minimum(np.sqrt(np.stack([area * aspect, area / aspect], axis=1)), 1)
    theirs = np.round(theirs * side)
    tenths = np.linspace(0.1, 0.9, 9)
    for law in (lambda hw: np.log(hw[:, 0] / hw[:, 1]), lambda hw: hw.prod(1) / side**2):
        got, want = np.quantile(law(mine), tenths), np.quantile(law(theirs), tenths)
        np.testing.assert_allclose(got, want, atol=0.05 * np.ptp(want))
    small = mine.prod(1) < 0.2 * side**2
    assert abs(np.log(mine[small, 0] / mine[small, 1]).mean()) < 4 * 0.7 / small.sum() ** 0.5


def test_self_mix_moves_a_turned_patch_within_the_image():
    before = images(50, 8)
    after = np.asarray(jax.jit(copies.self_mix)(zero(), before).x)
    moved = 0
    for x, y in zip(np.asarray(before.x), after, strict=True):
        changed = (x != y).any(-1)
        assert changed.sum() <= 16
        values = {tuple(v) for v in x.reshape(-1, 2)}
        assert {tuple(v) for v in y.reshape(-1, 2)} <= values
        moved += changed.any()
    assert moved > 40
    np.testing.assert_array_equal(jax.jit(copies.self_mix)(zero(), before).y, before.y)


def test_the_patch_of_self_mix_is_half_as_wide_and_turned_by_every_quarter_alike():
    """Pixels say where they came from: under a turn by k quarters one pair of sums is constant."""
    side, n, turns = 16, 800, Counter()
    x = jnp.broadcast_to(
        jnp.arange(side**2, dtype=float).reshape(side, side, 1), (n, side, side, 1)
    )
    after = jax.jit(copies.self_mix)(zero(), Examples(x, jnp.ones((n, 1)))).x
    i, j = np.indices((side, side))
    for image in np.asarray(after[..., 0], int):
        row, column = np.divmod(image, side)
        # np.rot90 takes [i, j] from [j, m - i], and so on
        pairs = [
            (row - i, column - j),
            (row - j, column + i),
            (row + i, column + j),
            (row + j, column - i),
        ]
        moved = (row != i) | (column != j)
        if not moved.any():  # not turned, and pasted where it was
            turns[0] += 1
            continue
        fits = [k for k, pair in enumerate(pairs) if all(np.ptp(a[moved]) == 0 for a in pair)]
        assert len(fits) == 1
        turns[fits[0]] += 1
        assert max(np.ptp(i[moved]), np.ptp(j[moved])) < side // 2
        assert moved.sum() >= (side // 2) ** 2 - 1  # one pixel may be turned into its own place
    for k in range(4):
        assert abs(turns[k] - n / 4) < 4.5 * (n * 3 / 16) ** 0.5


def test_large_rotation_leaves_half_of_the_classes():
    tasks = make_tasks(zero(), 300, way=5, queries=1, shape=(4, 4, 1))
    after = jax.vmap(copies.large_rotation)(task_keys(zero(), tasks), tasks)
    same = np.asarray((after.support.x == tasks.support.x).all((2, 3, 4)))
    assert abs(same.mean() - 0.5) < 4.5 * 0.5 / 1500**0.5


def test_more_shots_doubles_the_support():
    task = row(batch(shape=(20, 12, 2)), 0)
    moves = set()
    for seed in range(20):
        after = copies.more_shots(jax.random.key(seed), task)
        np.testing.assert_array_equal(after.support.x[:3], task.support.x)
        np.testing.assert_array_equal(after.support.y, np.tile(task.support.y, (2, 1)))
        for before, copy in zip(task.support.x, np.asarray(after.support.x[3:]), strict=True):
            flipped = np.pad(np.asarray(before)[:, ::-1], ((2, 2), (1, 1), (0, 0)))
            crops = {(i, j): flipped[i : i + 20, j : j + 12] for i in range(5) for j in range(3)}
            moves |= {move for move, crop in crops.items() if (crop == copy).all()}
    assert len(moves) == 15
    method = maxup(pool=[copies.more_shots], copies=2)(protonet(mlp()))
    meta_gradient(method, zero(), method.algorithm(method.net, method.inner).init(zero()), batch())


def test_the_released_pool_has_its_six_changes():
    """What each does to support, to query and to the query's labels, and where it blanks."""
    task = Task(images(4), images(6, seed=1)._replace(y=jnp.eye(4)[jnp.arange(6) % 4]))
    found = []
    for change in copies.default_pool():
        after = jax.jit(jax.vmap(lambda key, change=change: change(key, task)))(
            jax.random.split(zero(), 30)
        )
        changed = lambda new, old: bool((new != old).any())
        found.append(
            (
                changed(after.support.x, task.support.x),
                changed(after.query.x, task.query.x),
                changed(after.query.y, task.query.y),
                bool((after.support.x == 0).any()),
                bool((after.query.x == 0).any()),
            )
        )
        assert not changed(after.support.y, task.support.y)
    assert found == [
        (False, True, True, False, False),  # query CutMix
        (False, True, False, False, True),  # query erase
        (True, False, False, True, False),  # support erase
        (True, True, False, False, False),  # large rotation
        (True, True, True, False, False),
        (True, True, False, False, True),
    ]


def test_copies_draw_from_the_pool_uniformly_and_apart():
    """All 36 pairs of two copies are as frequent; the loss says which change a copy has had."""
    to = lambda i: (
        lambda key, task: task._replace(query=task.query._replace(x=jnp.full_like(task.query.x, i)))
    )
    net = nets.from_functions(lambda key: {"w": jnp.ones((1, 1))}, lambda p, x: x @ p["w"])
    plain = maml(net, lr=0.0, steps=1, loss=lambda outputs, y: jnp.mean(outputs))
    which = lambda losses: 6 * losses[0, 0] + losses[1, 0]
    method = maxup(pool=[to(i) for i in range(6)], copies=2, level=which)(plain)
    part, params = Examples(jnp.zeros((1, 1)), jnp.zeros((1, 1))), params_of(plain)
    n = 7200
    loss = jax.jit(jax.vmap(lambda key: view(method, key, params, Task(part, part)).loss))
    counts = Counter(np.asarray(loss(jax.random.split(zero(), n))).round().astype(int).tolist())
    assert set(counts) == set(range(36))
    assert all(abs(c - n / 36) < 4.5 * (n / 36) ** 0.5 for c in counts.values())


def test_changes_in_turn_have_keys_of_their_own():
    seen = []

    def spy(key, task):
        seen.append(jax.random.key_data(key).tolist())
        return task

    copies.in_turn(spy, spy)(zero(), row(batch(), 0))
    assert seen[0] != seen[1]


@pytest.mark.parametrize(
    ("make", "says"),
    [(lambda: maxup(copies=0), "copies=0"), (lambda: maxup(pool=()), "empty pool")],
)
def test_maxup_refuses(make, says):
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


@pytest.mark.parametrize("change", [copies.large_rotation, copies.on_query(copies.cutmix)])
def test_copies_that_take_classes_refuse_a_regression(change):
    method = maxup(pool=(change,), copies=2)(maml(mlp(1), lr=0.1, loss=squared_error))
    tasks = Task(*(part._replace(y=part.y[..., :1]) for part in batch(2)))
    with pytest.raises(ValueError, match=r"targets are (none|no classes)"):
        gradient(method, params_of(method), tasks)


def test_maxup_refuses_what_is_no_image_and_changes_of_other_shapes():
    vectors = make_tasks(zero(), 2, shape=(64,))
    for change in (copies.cutmix, copies.erase, copies.self_mix):
        with pytest.raises(ValueError, match="are not images"):
            change(zero(), row(vectors, 0).query)
    with pytest.raises(ValueError, match="are not images"):
        copies.more_shots(zero(), row(vectors, 0))
    method = maxup(pool=[copies.more_shots, copies.large_rotation])(protonet(mlp()))
    params = method.algorithm(method.net, method.inner).init(zero())
    with pytest.raises(ValueError, match="tasks of different shapes"):
        meta_gradient(method, zero(), params, batch())
