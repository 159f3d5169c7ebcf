"""Noise, DropGrad and L2 against their equations, moments and identities."""

import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import make_tasks
from grid import ALGORITHMS, mlp, small

from mgaug_jax import (
    anil,
    cp,
    drop_grad,
    evaluate,
    first_order,
    fomaml,
    l2,
    maml,
    meta_gradient,
    nets,
    noise,
    perturb,
    pp,
    protonet,
    trainer,
    view,
)
from mgaug_jax.losses import squared_error
from mgaug_jax.meta import subnet
from mgaug_jax.nets.adapters import net_of
from mgaug_jax.nets.backbones import ConvNet, conv_roles
from mgaug_jax.types import Examples, MetaParams, Task

pytestmark = pytest.mark.usefixtures("quick_compile")
LR, STEPS = 0.3, 3
SITES = {
    "inner": perturb.inner,
    "inner_update": perturb.inner_update,
    "outer": perturb.outer,
    "outer_update": perturb.outer_update,
}
DISTRIBUTIONS = {
    "gaussian": (perturb.gaussian, 3.0),
    "laplace": (perturb.laplace, 6.0),
    "uniform": (perturb.uniform, 9 / 5),
    "student_t": (perturb.student_t, 9.0),
}
"""Name -> the sampler and its fourth moment at variance 1."""


def linear():
    """`y = x w`: a net whose inner loop numpy can write out."""
    init = lambda key: {"w": jnp.ones((3, 1)), "b": jnp.zeros(1)}
    apply = lambda params, x: x @ params["w"] + params["b"]
    return nets.from_functions(init, apply)


def regression(seed=0) -> tuple[Task, MetaParams]:
    rng = np.random.default_rng(seed)
    part = lambda n: Examples(*(jnp.asarray(rng.normal(size=(n, d))) for d in (3, 1)))
    weights = {"w": jnp.asarray(rng.normal(size=(3, 1))), "b": jnp.asarray(rng.normal(size=1))}
    return Task(part(5), part(6)), MetaParams(weights, {})


def adapted(method, key, params, task):
    learner = method.algorithm(method.net, method.inner)
    return jax.jit(learner.adapt)(key, params, task.support).params


def tiny(way=3):
    return net_of(ConvNet(way, 4, 1), (8, 8, 1), conv_roles)


def floats(tree):
    """Leaves in the default float: float64 where a test enables it."""
    return jax.tree.map(lambda leaf: leaf.astype(float), tree)


def state_after(method, steps=2, seed=0, optimizer=None):
    """Parameters after meta-steps on random images, in float32 or whatever is the default."""
    learner = trainer(method, optimizer or optax.adam(1e-2))
    step = jax.jit(learner.step)
    tasks = floats(make_tasks(jax.random.key(1), 2, queries=3, shape=(8, 8, 1)))
    state = learner.init(jax.random.key(2))
    state = state._replace(params=floats(state.params))
    for i in range(steps):
        state, info = step(jax.random.fold_in(jax.random.key(seed), i), state, tasks)
    return state.params, info


def assert_equal(got, want):
    jax.tree.map(np.testing.assert_array_equal, got, want)


def assert_close(got, want, rtol=1e-10, atol=1e-13):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=atol), got, want)


def differ(a, b) -> bool:
    return any((x != y).any() for x, y in zip(*map(jax.tree.leaves, (a, b)), strict=True))


# --- the inner loop, written out in numpy ---------------------------------------------------


def loop(params, task, change, around="grad"):
    """`change(step, leaf, array)` applied to the gradient or to the update of every inner step."""
    w, b = (np.asarray(params.net[name]) for name in "wb")
    x, y = map(np.asarray, task.support)
    for i in range(STEPS):
        error = 2 * (x @ w + b - y) / len(x)
        steps = {"w": x.T @ error, "b": error.sum(0)}
        if around == "grad":
            steps = {name: -LR * change(i, name, g) for name, g in steps.items()}
        else:
            steps = {name: change(i, name, -LR * g) for name, g in steps.items()}
        w, b = w + steps["w"], b + steps["b"]
    return {"w": w, "b": b}


@pytest.mark.parametrize(("site", "around"), [("inner", "grad"), ("inner_update", "update")])
def test_a_perturbation_equals_the_loop_written_out(x64, site, around):
    task, params = regression()
    plain = maml(linear(), lr=LR, steps=STEPS, loss=squared_error)
    factor = {"w": 0.7, "b": 1.9}
    scale = lambda key, grads, weights: {
        name: factor[name] * g + 0.1 * weights[name] for name, g in grads.items()
    }
    got = adapted(SITES[site](plain, scale), jax.random.key(0), params, task)
    w, b = (np.asarray(params.net[name]) for name in "wb")
    x, y = map(np.asarray, task.support)
    for _ in range(STEPS):
        error = 2 * (x @ w + b - y) / len(x)
        grads, now = {"w": x.T @ error, "b": error.sum(0)}, {"w": w, "b": b}
        if around == "grad":
            moved = {n: now[n] - LR * (factor[n] * grads[n] + 0.1 * now[n]) for n in now}
        else:
            moved = {n: now[n] + factor[n] * -LR * grads[n] + 0.1 * now[n] for n in now}
        w, b = moved["w"], moved["b"]
    assert_close(got, {"w": w, "b": b})


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_noise_is_the_gradient_plus_sigma_draws(x64, name):
    distribution, _ = DISTRIBUTIONS[name]
    task, params = regression()
    plain = maml(linear(), lr=LR, steps=STEPS, loss=squared_error)
    method = noise(0.4, distribution=distribution)(plain)
    key = jax.random.key(3)
    drawn = []
    for i in range(STEPS):
        here, _ = jax.random.split(jax.random.fold_in(key, i))
        keys = dict(zip("bw", jax.random.split(here, 2), strict=True))
        shapes = {name: leaf.shape for name, leaf in params.net.items()}
        drawn.append({n: np.asarray(distribution(keys[n], shapes[n], float)) for n in "wb"})
    got = adapted(method, key, params, task)
    assert_close(got, loop(params, task, lambda i, n, g: g + 0.4 * drawn[i][n]))


def test_noise_on_updates_is_noise_on_gradients_at_lr_sigma(x64):
    task, params = regression()
    plain = maml(linear(), lr=LR, steps=STEPS, loss=squared_error)
    flipped = lambda key, shape, dtype: -perturb.gaussian(key, shape, dtype)
    on_gradient = noise(0.4, distribution=flipped)(plain)
    on_update = noise(LR * 0.4, site=perturb.inner_update)(plain)
    for seed in range(3):
        key = jax.random.key(seed)
        a, b = (adapted(m, key, params, task) for m in (on_gradient, on_update))
        # the two sites split the same key the same way, so only the sign of the draws differs
        assert_close(a, b)


@pytest.mark.parametrize(
    ("relative_to", "unit"),
    [
        ("unit", lambda g, w: {"w": 1.0, "b": 1.0}),
        ("gradient_rms", lambda g, w: dict.fromkeys("wb", rms(g["w"], g["b"]))),
        ("leaf_rms", lambda g, w: {name: rms(g[name]) for name in "wb"}),
        ("weight_rms", lambda g, w: dict.fromkeys("wb", rms(w["w"], w["b"]))),
    ],
)
def test_sigma_is_in_the_unit_it_is_given_in(x64, relative_to, unit):
    rng = np.random.default_rng(0)
    draw = lambda: {"w": rng.normal(size=(3, 1)), "b": rng.normal(size=1)}
    grads, weights = draw(), draw()
    scales = getattr(perturb, relative_to)(grads, weights)
    assert_close(scales, unit(grads, weights))
    ones = lambda key, shape, dtype: jnp.ones(shape, dtype)
    spied = {}

    def site(method, change):
        spied["change"] = change
        return method

    noise(0.5, site=site, distribution=ones, relative_to=getattr(perturb, relative_to))(None)
    got = spied["change"](jax.random.key(0), grads, weights)
    assert_close(got, {n: grads[n] + 0.5 * unit(grads, weights)[n] for n in "wb"})


def rms(*arrays):
    flat = np.concatenate([np.ravel(a) for a in arrays])
    return np.sqrt(np.mean(flat**2))


@pytest.mark.parametrize("relative_to", [perturb.gradient_rms, perturb.leaf_rms])
def test_the_unit_of_sigma_is_a_constant_to_second_order_maml(x64, relative_to):
    grads = {"w": jnp.ones((2, 1)), "b": jnp.ones(1)}
    total = lambda g: sum(map(jnp.sum, jax.tree.leaves(relative_to(g, g))))
    assert all((leaf == 0).all() for leaf in jax.tree.leaves(jax.grad(total)(grads)))


# --- moments and independence ---------------------------------------------------------------


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_distributions_have_mean_zero_and_variance_one(name):
    distribution, fourth = DISTRIBUTIONS[name]
    n = 400_000
    draws = np.asarray(distribution(jax.random.key(0), (n,), jnp.float32), np.float64)
    assert abs(draws.mean()) < 4 / n**0.5
    # the variance of the sample variance is (fourth moment - 1) / n
    assert abs(draws.var() - 1) < 4 * ((fourth - 1) / n) ** 0.5
    other = max(abs(f - fourth) for _, f in DISTRIBUTIONS.values())
    if name != "student_t":  # whose fourth moment converges too slowly to tell
        assert abs((draws**4).mean() - fourth) < 0.1 * other


@pytest.mark.parametrize("factors", [perturb.gaussian_factors, perturb.bernoulli_factors])
@pytest.mark.parametrize(("rate", "ramp"), [(0.1, 1.0), (0.5, 1.0), (0.5, 0.4)])
def test_drop_factors_have_mean_one_and_the_stated_variance(factors, rate, ramp):
    n = 400_000
    draws = factors(jax.random.key(1), (n,), jnp.float32, jnp.float32(rate), jnp.float32(ramp))
    draws = np.asarray(draws, np.float64)
    p = rate if factors is perturb.gaussian_factors else rate * ramp
    variance = p / (1 - p) * (ramp**2 if factors is perturb.gaussian_factors else 1)
    assert abs(draws.mean() - 1) < 4 * (variance / n) ** 0.5
    assert abs(draws.var() / variance - 1) < 0.03
    if factors is perturb.bernoulli_factors:
        assert abs((draws == 0).mean() - p) < 4 * (p * (1 - p) / n) ** 0.5
        assert len(np.unique(draws)) == 2


@pytest.mark.parametrize("modifier", [noise(1.0), drop_grad(0.5)], ids=["noise", "drop_grad"])
def test_draws_differ_by_task_step_and_leaf(x64, modifier):
    """One inner gradient of ones everywhere; what is added to it must never be the same twice."""
    init = lambda key: {"a": jnp.zeros((4, 1)), "b": jnp.zeros((4, 1))}
    net = nets.from_functions(init, lambda params, x: x @ params["a"] + x @ params["b"])
    total = lambda outputs, y: jnp.sum(outputs)
    method = modifier(maml(net, lr=1.0, steps=1, loss=total))
    longer = modifier(maml(net, lr=1.0, steps=2, loss=total))
    support = Examples(jnp.ones((1, 4)), jnp.zeros((1, 1)))
    params = MetaParams(init(None), {})
    draws = {}
    for task in range(3):
        key = jax.random.fold_in(jax.random.key(0), task)
        first = method.algorithm(net, method.inner).adapt(key, params, support).params
        both = longer.algorithm(net, longer.inner).adapt(key, params, support).params
        for leaf in "ab":
            draws[task, 0, leaf] = np.asarray(-first[leaf] - 1)
            draws[task, 1, leaf] = np.asarray(-(both[leaf] - first[leaf]) - 1)
    for one, other in itertools.combinations(draws, 2):
        assert (draws[one] != draws[other]).all(), (one, other)


def test_noise_is_unbiased_and_uncorrelated_between_tasks_steps_and_leaves():
    """Over many keys: covariances of the added noise, entry by entry."""
    net = nets.from_functions(
        lambda key: {"a": jnp.zeros(1), "b": jnp.zeros(1)}, lambda p, x: x * p["a"] + x * p["b"]
    )
    total = lambda outputs, y: jnp.sum(outputs)
    method = noise(1.0)(maml(net, lr=1.0, steps=2, loss=total))
    short = noise(1.0)(maml(net, lr=1.0, steps=1, loss=total))
    support = Examples(jnp.ones((1, 1)), jnp.zeros((1, 1)))
    params = MetaParams({"a": jnp.zeros(1), "b": jnp.zeros(1)}, {})

    def draws(key):
        adapt = lambda m: m.algorithm(net, m.inner).adapt(key, params, support).params
        one, two = adapt(short), adapt(method)
        first = jnp.concatenate([-one[leaf] - 1 for leaf in "ab"])
        return jnp.concatenate([first, *(one[leaf] - two[leaf] - 1 for leaf in "ab")])

    n = 20_000
    keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(0), jnp.arange(n))
    got = np.asarray(jax.jit(jax.vmap(draws))(keys), np.float64)
    assert np.abs(got.mean(0)).max() < 4.5 / n**0.5
    covariance = np.cov(got.T)
    assert np.abs(covariance - np.eye(4)).max() < 4.5 * (2 / n) ** 0.5


def test_outer_noise_is_added_once_to_the_meta_gradient(x64):
    method = fomaml(mlp(), lr=0.1, steps=1)
    sgd = optax.sgd(1.0)
    (plain, _), (noisy, _) = (
        state_after(m, 1, optimizer=sgd) for m in (method, noise(0.3, site=perturb.outer)(method))
    )
    added = jax.tree.map(lambda a, b: (a - b) / 0.3, plain, noisy)
    flat = np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(added)])
    assert abs(flat.mean()) < 4 / flat.size**0.5
    assert abs(flat.std() - 1) < 4 / (2 * flat.size) ** 0.5
    (other, _) = state_after(noise(0.3, site=perturb.outer)(method), 1, seed=9, optimizer=sgd)
    assert differ(noisy, other)


def test_an_outer_update_is_perturbed_behind_the_optimiser(x64):
    ones = lambda key, shape, dtype: jnp.ones(shape, dtype)
    method = fomaml(mlp(), lr=0.1, steps=1)
    after = noise(0.25, site=perturb.outer_update, distribution=ones)(method)
    (plain, _), (moved, _) = state_after(method, 1), state_after(after, 1)
    assert_close(jax.tree.map(jnp.subtract, moved, plain), jax.tree.map(lambda w: 0.25, plain))


@pytest.mark.parametrize("site", ["inner", "inner_update"])
def test_through_a_meta_step_no_task_step_leaf_or_sub_network_shares_a_draw(site):
    """Every inner loop of a meta-step records what was drawn, leaf by leaf."""
    seen = []

    def spy(key, grads, weights):
        drawn = optax.tree.random_like(key, grads, jax.random.normal)
        jax.debug.callback(
            lambda *leaves: seen.extend(np.ravel(leaf) for leaf in leaves),
            *jax.tree.leaves(drawn),
        )
        return jax.tree.map(jnp.add, grads, drawn)

    steps, subnets, count = 2, 3, 4
    method = SITES[site](pp(keep=0.5, subnets=subnets)(fomaml(mlp(), lr=0.1, steps=steps)), spy)
    tasks = make_tasks(jax.random.key(1), count, shape=(8, 8, 1))
    params = method.algorithm(method.net, method.inner).init(jax.random.key(0))
    jax.block_until_ready(jax.jit(partial(meta_gradient, method))(jax.random.key(0), params, tasks))
    jax.effects_barrier()
    leaves = jax.tree.leaves(params.net)
    assert len(seen) == (1 + subnets) * count * steps * len(leaves)
    # whatever their sizes, the first three entries of two draws are equal only if the draws are
    starts = np.sort(np.stack([draw[:3] for draw in seen]), axis=0)
    assert (np.diff(starts, axis=0) == 0).sum() < 5  # of 23 bits, a few coincide by chance
    assert len({draw[:3].tobytes() for draw in seen}) == len(seen)


# --- choosing sigma ------------------------------------------------------------------------------


@pytest.mark.parametrize("mean", [-0.3, 0.0, 0.1, 0.3, 0.5, 2.0])
def test_sigma_moves_by_how_far_memory_is_told_from_none(x64, mean):
    gains = np.random.default_rng(0).normal(mean, 1.0, 40)
    mean = sum(gains) / 40
    error = (sum((g - mean) ** 2 for g in gains) / 39 / 40) ** 0.5
    want = 0.7 * 1.5 ** min(max(mean / error / 2 - 1, -1), 1)
    assert float(jax.jit(perturb.by_memory)(0.7, gains, 1.5)) == pytest.approx(want, rel=1e-12)


@pytest.mark.parametrize(("gain", "want"), [(0.0, 0.7), (0.1, 0.7 * 1.5), (-0.1, 0.7 / 1.5)])
def test_sigma_of_gains_that_are_all_equal(x64, gain, want):
    got = perturb.by_memory(0.7, jnp.full(10, gain), 1.5)
    assert float(got) == pytest.approx(want, rel=1e-12)


def test_sigma_settles_where_memory_ends(x64):
    """Memory that falls as sigma grows, and is gone above 5."""
    rng, std = np.random.default_rng(0), jnp.asarray(0.1)
    path = []
    for _ in range(150):
        gains = jnp.asarray(rng.normal(max(0, 5 - std), 0.1, 50))
        std = perturb.by_memory(std, gains, 1.05)
        path.append(float(std))
    assert 4.4 < min(path[100:])
    assert max(path[100:]) < 5.6


# --- identities -----------------------------------------------------------------------------

ZEROS = {
    **{f"noise-{site}": lambda zero, site=site: noise(zero, site=SITES[site]) for site in SITES},
    "noise-rms": lambda zero: noise(zero, relative_to=perturb.gradient_rms),
    "gaussian-drop": drop_grad,
    "bernoulli-drop": lambda zero: drop_grad(zero, factors=perturb.bernoulli_factors),
    "ramped-drop": lambda zero: drop_grad(0.5, ramp=zero),
    "outer-drop": lambda zero: drop_grad(zero, site=perturb.outer),
    "l2": l2,
}


def has_site(algorithm, change):
    return algorithm != "protonet" or "outer" in change or change == "l2"


@pytest.mark.parametrize("change", ZEROS)
def test_zero_changes_no_bit(change):
    for algorithm in filter(lambda name: has_site(name, change), ALGORITHMS):
        method = cp(keep=0.7, subnets=2)(small(algorithm))
        for zero in (0, 0.0, jnp.zeros(())):
            assert ZEROS[change](zero)(method) is method  # hence the same program


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize("relative_to", ["unit", "gradient_rms", "leaf_rms", "weight_rms"])
def test_a_traced_sigma_of_zero_adds_no_bit(distribution, relative_to):
    grads = {"w": jax.random.normal(jax.random.key(0), (5, 3)), "b": jnp.zeros(3)}
    spied = {}

    def site(method, change):
        spied["change"] = change

    @jax.jit
    def perturbed(zero):
        chosen = DISTRIBUTIONS[distribution][0], getattr(perturb, relative_to)
        noise(zero, site=site, distribution=chosen[0], relative_to=chosen[1])(None)
        return spied["change"](jax.random.key(1), grads, grads)

    assert_equal(perturbed(0.0), grads)
    assert differ(perturbed(0.1), grads)


@pytest.mark.parametrize("change", ZEROS)
def test_a_traced_zero_is_the_plain_method(x64, change):
    method = cp(keep=0.7, subnets=1)(small("maml"))
    tasks = floats(make_tasks(jax.random.key(1), 2, queries=3, shape=(8, 8, 1)))
    state = trainer(method, optax.sgd(1e-2)).init(jax.random.key(2))
    state = state._replace(params=floats(state.params))

    @jax.jit
    def step(rate):
        changed = trainer(ZEROS[change](rate)(method), optax.sgd(1e-2))
        return changed.step(jax.random.key(0), state, tasks)[0].params

    plain = jax.jit(trainer(method, optax.sgd(1e-2)).step)(jax.random.key(0), state, tasks)
    # XLA may contract a multiply-add here and not there: the last digits of 64 bits
    assert_close(step(0.0), plain[0].params, rtol=1e-13, atol=1e-15)
    assert differ(step(0.5), plain[0].params)


@pytest.mark.parametrize("name", ["noise", "drop_grad", "l2", "outer"])
def test_what_is_not_zero_changes_something(name):
    change = {
        "noise": noise(0.1),
        "drop_grad": drop_grad(0.1),
        "l2": l2(0.1),
        "outer": noise(0.1, site=perturb.outer),
    }[name]
    method = fomaml(mlp(), lr=0.1, steps=2)
    assert differ(state_after(change(method))[0], state_after(method)[0])


def test_meta_test_is_not_perturbed_unless_asked():
    task = jax.tree.map(lambda leaf: leaf[:1], make_tasks(jax.random.key(0), 1, shape=(8, 8, 1)))
    method = fomaml(mlp(), lr=0.1, steps=2)
    params = method.algorithm(method.net, method.inner).init(jax.random.key(1))
    judge = lambda outputs, y: jnp.sum(outputs)

    def score(m):
        return evaluate(m, jax.random.key(0), params, lambda key, data: data, task, 3, judge)

    plain = score(method)
    assert_equal(score(noise(5.0)(method)), plain)
    asked = score(noise(0.5, site=perturb.test)(method))
    assert differ(asked.adapted, plain.adapted)
    assert len(set(np.asarray(asked.adapted).tolist())) == 3  # every episode draws anew
    assert_equal(asked.initial, plain.initial)
    assert_equal(state_after(noise(0.5, site=perturb.test)(method)), state_after(method))


# --- sub-networks ---------------------------------------------------------------------------


@pytest.mark.parametrize("site", ["inner", "inner_update"])
@pytest.mark.parametrize("change", [partial(noise, 0.5), partial(drop_grad, 0.3)])
def test_a_pruned_weight_of_a_sub_network_is_never_moved(x64, site, change):
    net = tiny()
    task = jax.tree.map(
        lambda leaf: leaf[0].astype(float), make_tasks(jax.random.key(0), 1, shape=(8, 8, 1))
    )
    params = MetaParams(
        jax.tree.map(lambda w: w.astype(float) + 0.1, net.init(jax.random.key(1))), {}
    )
    rng = np.random.default_rng(0)
    mask = jax.tree.map(lambda w: jnp.asarray(rng.integers(0, 2, w.shape), float), params.net)
    method = change(site=SITES[site])(maml(net, lr=0.1, steps=3))
    learner = method.algorithm(subnet(net, mask), method.inner)
    fast = learner.adapt(jax.random.key(2), params, task.support).params
    grads = view(method, jax.random.key(2), params, task, mask).grads.net
    moved = pruned = 0
    for w, f, g, m in zip(*map(jax.tree.leaves, (params.net, fast, grads, mask)), strict=True):
        assert_equal(f[m == 0], w[m == 0])
        assert (g[m == 0] == 0).all()
        moved += int((f[m == 1] != w[m == 1]).sum())
        pruned += int((m == 0).sum())
    assert moved > 40
    assert pruned > 40


def test_noise_on_updates_does_not_move_the_body_of_anil(x64):
    task, _ = regression()
    net = nets.mlp((4,), inputs=3)
    params = MetaParams(net.init(jax.random.key(0)), {})
    method = anil(net, lr=0.1, steps=2, loss=squared_error)
    method = noise(0.5, site=perturb.inner_update)(method)
    fast = adapted(method, jax.random.key(1), params, task)
    assert_equal(fast["dense0"], params.net["dense0"])
    assert differ(fast["head"], params.net["head"])


# --- L2 -------------------------------------------------------------------------------------


def test_l2_adds_the_weights_to_the_meta_gradient(x64):
    method = fomaml(mlp(), lr=0.1, steps=1)
    sgd = optax.sgd(1.0)
    start = floats(trainer(method, sgd).init(jax.random.key(2)).params.net)
    kernels = l2(0.2, leaves=lambda role: role.prunable)
    plain, everything, some = (
        state_after(m, 1, optimizer=sgd)[0].net for m in (method, l2(0.2)(method), kernels(method))
    )
    pulled = jax.tree.map(lambda w, p: p - 0.2 * w, start, plain)
    assert_close(everything, pulled)
    assert_close(some["dense0"]["kernel"], pulled["dense0"]["kernel"])
    assert_equal(some["head"], plain["head"])


# --- composition ----------------------------------------------------------------------------


@pytest.mark.parametrize(("site", "around"), [("inner", "grad"), ("inner_update", "update")])
def test_the_order_of_modifiers_is_the_order_of_perturbation(x64, site, around):
    task, params = regression()
    plain = maml(linear(), lr=LR, steps=STEPS, loss=squared_error)
    double = lambda key, g, w: jax.tree.map(lambda x: 2 * x, g)
    shift = lambda key, g, w: jax.tree.map(lambda x: x + 1, g)
    method = SITES[site](SITES[site](plain, double), shift)
    got = adapted(method, jax.random.key(0), params, task)
    assert_close(got, loop(params, task, lambda i, n, g: 2 * g + 1, around))


def test_two_perturbations_of_one_site_draw_apart(x64):
    task, params = regression()
    plain = maml(linear(), lr=LR, steps=1, loss=squared_error)
    key = jax.random.key(0)
    none, once, twice = (
        adapted(m, key, params, task)
        for m in (plain, noise(0.1)(plain), noise(0.1)(noise(0.1)(plain)))
    )
    first = jax.tree.map(jnp.subtract, once, none)
    second = jax.tree.map(jnp.subtract, twice, once)
    assert all((a != b).all() for a, b in zip(*map(jax.tree.leaves, (first, second)), strict=True))


def test_sigma_follows_a_schedule_without_tracing_again():
    traces = []
    plain = fomaml(mlp(), lr=0.1, steps=1)
    schedule = optax.linear_schedule(0.5, 0.0, 2)

    def at(step):
        traces.append(step)
        return noise(schedule(step), site=perturb.outer)(plain)

    tasks = make_tasks(jax.random.key(1), 2, shape=(8, 8, 1))
    quiet, loud = trainer(plain, optax.sgd(0.1)), trainer(at, optax.sgd(0.1))
    step, plain_step = jax.jit(loud.step), jax.jit(quiet.step)
    state = loud.init(jax.random.key(0))
    traces.clear()
    for i in range(4):
        without, _ = plain_step(jax.random.key(i), state, tasks)
        state, _ = step(jax.random.key(i), state, tasks)
        assert differ(state.params, without.params) == (i < 2)
    assert len(traces) == 1


def test_first_order_maml_is_fomaml(x64):
    tasks = make_tasks(jax.random.key(1), 2, shape=(8, 8, 1))
    tasks = jax.tree.map(lambda leaf: leaf.astype(float), tasks)
    second = maml(mlp(), lr=0.3, steps=2)
    params = second.algorithm(second.net, second.inner).init(jax.random.key(0))
    got = {
        name: jax.jit(partial(meta_gradient, m))(jax.random.key(0), params, tasks)[0]
        for name, m in {
            "maml": second,
            "first": first_order(second),
            "fomaml": fomaml(mlp(), lr=0.3, steps=2),
        }.items()
    }
    assert_equal(got["first"], got["fomaml"])
    assert differ(got["first"], got["maml"])


# --- refusals -------------------------------------------------------------------------------


@pytest.mark.parametrize("std", [-1.0, float("nan"), float("inf"), "loud", None])
def test_a_sigma_that_is_none_is_refused(std):
    with pytest.raises(ValueError, match=r"std=.* was asked for; take a number of 0 or more"):
        noise(std)


@pytest.mark.parametrize("freedom", [2.0, 0.5, -1.0, float("nan")])
def test_a_student_t_without_variance_is_refused(freedom):
    with pytest.raises(ValueError, match=r"freedom=.* was asked for.*more than 2"):
        perturb.student_t(jax.random.key(0), (3,), jnp.float32, freedom)


@pytest.mark.parametrize("rate", [-0.1, 1.0, 2, float("nan"), "often"])
def test_a_rate_that_is_no_probability_is_refused(rate):
    with pytest.raises(ValueError, match=r"rate=.* was asked for; take a number in \[0, 1\)"):
        drop_grad(rate)


def test_a_ramp_above_one_is_refused():
    with pytest.raises(ValueError, match=r"ramp=1.5 was asked for; take a number in \[0, 1\]"):
        drop_grad(0.1, ramp=1.5)


@pytest.mark.parametrize("weight", [-1e-3, float("nan")])
def test_a_weight_that_is_no_rate_is_refused(weight):
    with pytest.raises(ValueError, match="weight="):
        l2(weight)


@pytest.mark.parametrize("site", [perturb.inner, perturb.inner_update, perturb.test])
def test_sites_of_an_inner_loop_refuse_protonet(site):
    with pytest.raises(ValueError, match="protonet has no inner loop"):
        noise(0.1, site=site)(protonet(mlp()))
