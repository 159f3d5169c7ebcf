"""Divergences by enumeration and quadrature, the bounds by hand, and by how often they hold."""

import itertools
import json
import math
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.scipy.stats import norm
from scipy.stats import binomtest

from mgaug_jax import bounds, divergences, nets, pruning
from mgaug_jax.losses import cross_entropy
from mgaug_jax.types import Examples, Net, Probe, Role

pytestmark = pytest.mark.usefixtures("x64")
REFERENCE = Path(__file__).parents[2] / "shared" / "reference"


def small_net():
    """A hidden kernel of 6 prunable weights, its bias of 3 channels, and a head."""
    net = nets.mlp((3,), inputs=2, outputs=2)
    return net, jax.tree.map(lambda w: w.astype(float), net.init(jax.random.key(0)))


def quadrature(difference, std, prior_std):
    """KL of two Gaussians in one dimension, by the trapezoid rule."""
    x = difference + std * np.linspace(-12, 12, 20_001)
    log = lambda x, mean, s: -((x - mean) ** 2) / (2 * s**2) - np.log(s * np.sqrt(2 * np.pi))
    p = log(x, difference, std)
    return np.trapezoid(np.exp(p) * (p - log(x, 0, prior_std)), x)


# --- divergences ----------------------------------------------------------------------------


@pytest.mark.parametrize(("std", "prior_std"), [(1.0, 1.0), (0.3, 1.0), (0.5, 0.2), (2.0, 1.5)])
def test_gaussian_kl_is_the_integral(std, prior_std):
    means = np.array([0.0, 0.7, -1.9])
    parts = [quadrature(mean, std, prior_std) for mean in means]
    for mean, part in zip(means, parts, strict=True):
        got = divergences.gaussian_kl(mean**2, 1, std, prior_std)
        np.testing.assert_allclose(got, part, rtol=1e-8, atol=1e-10)
    got = divergences.gaussian_kl(float(means @ means), 3, std, prior_std)
    np.testing.assert_allclose(got, sum(parts), rtol=1e-8)
    tree = {"a": jnp.asarray(means[:1]), "b": jnp.asarray(means[1:])}
    np.testing.assert_allclose(divergences.gaussian_hyper_kl(tree, std, prior_std), got)


def test_gaussian_kl_is_the_mean_log_ratio():
    mean, std, prior_std = np.array([0.4, -1.0, 0.2, 2.0]), 0.6, 1.3
    x = mean + std * np.random.default_rng(0).normal(size=(200_000, 4))
    log = lambda x, s: -(x**2).sum(1) / (2 * s**2) - x.shape[1] * np.log(s)
    ratios = log(x - mean, std) - log(x, prior_std)
    got = divergences.gaussian_hyper_kl({"w": jnp.asarray(mean)}, std, prior_std)
    assert abs(got - ratios.mean()) < 4 * ratios.std() / len(ratios) ** 0.5


def test_the_released_formula_counts_one_dimension():
    tree = {"w": jnp.array([1.0, 2.0, -1.0])}
    exact, released, none = (
        f(tree, 1e-3, 100.0)
        for f in (
            divergences.gaussian_hyper_kl,
            divergences.released_hyper_kl,
            divergences.no_hyper_kl,
        )
    )
    per_weight = math.log(1e5) - 0.5
    np.testing.assert_allclose(released, (6 + 1e-6) / 2e4 + per_weight, rtol=1e-12)
    np.testing.assert_allclose(exact - released, 2 * (per_weight + 1e-6 / 2e4), rtol=1e-12)
    assert none == 0


def masks_of_six(law):
    """`(probability, mask of the hidden kernel)` for every mask of 6 weights under a law."""
    for bits in itertools.product([0.0, 1.0], repeat=6):
        yield law(bits), np.array(bits).reshape(2, 3)


def test_pruned_weights_diverge_as_enumerated():
    """The joint divergence is the mean over masks of the divergence of what each mask keeps."""
    net, params = small_net()
    std, prior_std, keep = 0.4, 0.7, 0.6
    each = jax.tree.map(
        lambda w: np.vectorize(lambda x: quadrature(x, std, prior_std))(np.asarray(w)), params
    )
    kernel, rest = each["dense0"]["kernel"], sum(np.sum(x) for x in jax.tree.leaves(each))
    rest -= np.sum(kernel)
    gone = int(pruning.exact.count(6, jnp.asarray(keep)))
    assert gone == 2
    laws = {
        divergences.bernoulli_keep: lambda bits: keep ** sum(bits) * (1 - keep) ** (6 - sum(bits)),
        divergences.subset_keep: lambda bits: (sum(bits) == 6 - gone) / math.comb(6, gone),
    }
    for keep_of, law in laws.items():
        total = sum(p for p, _ in masks_of_six(law))
        expected = sum(p * np.sum(mask * kernel) for p, mask in masks_of_six(law))
        np.testing.assert_allclose(total, 1)
        probabilities = keep_of(net, params, keep)
        got = divergences.weight_kl(params, probabilities, std, prior_std)
        np.testing.assert_allclose(got, expected + rest, rtol=1e-7)
        alone = divergences.only_masked(probabilities)
        got = divergences.weight_kl(params, alone, std, prior_std)
        np.testing.assert_allclose(got, expected, rtol=1e-7)


def test_unit_noise_gives_the_papers_term():
    net, params = small_net()
    keep = divergences.only_masked(divergences.bernoulli_keep(net, params, 0.7))
    square = np.sum(np.square(params["dense0"]["kernel"]))
    np.testing.assert_allclose(divergences.weight_kl(params, keep), 0.7 / 2 * square, rtol=1e-12)
    half = divergences.weight_kl(params, keep, 0.5, 0.5)
    np.testing.assert_allclose(half, 0.7 / 2 * square / 0.25, rtol=1e-12)


def test_widths_diverge_as_enumerated():
    net, params = small_net()
    keeps = jnp.array([0.2, 0.4, 0.7, 1.0])  # of 3 channels: 1, 1, 2, 3
    probabilities = divergences.width_keep(net, params, keeps)
    np.testing.assert_allclose(probabilities["dense0"]["bias"].ravel(), [1, 0.5, 0.25])
    expected = 0.0
    for channels in (1, 1, 2, 3):
        kept = jax.tree.map(jnp.square, params)
        for name in ("kernel", "bias"):
            kept["dense0"][name] = kept["dense0"][name][..., :channels]
        expected += sum(np.sum(leaf) for leaf in jax.tree.leaves(kept)) / 8
    np.testing.assert_allclose(divergences.weight_kl(params, probabilities), expected, rtol=1e-12)


def test_probabilities_are_those_of_the_pruners():
    net, params = small_net()
    probe = Probe(params, lambda params: jnp.zeros(()))
    draws, keep = 4000, 0.6
    for pruner, keep_of in (
        (pruning.bernoulli_parameters, divergences.bernoulli_keep),
        (pruning.random_parameters(), divergences.subset_keep),
        (
            pruning.random_parameters(pruning.released_by_rank),
            partial(divergences.subset_keep, select=pruning.released_by_rank),
        ),
    ):
        one = lambda key, prune=pruner: prune(key, net, params, probe, jnp.asarray(keep))
        masks = jax.jit(jax.vmap(one))(jax.random.split(jax.random.key(1), draws))
        expected = keep_of(net, params, keep)
        for mask, p in zip(jax.tree.leaves(masks), jax.tree.leaves(expected), strict=True):
            assert np.max(np.abs(np.mean(mask, 0) - p)) < 5 * (0.25 / draws) ** 0.5


def test_the_centred_variant_is_the_mean_over_priors():
    net, params = small_net()
    adapted = jax.tree.map(lambda w: 1.1 * w + 0.2, params)
    keep = divergences.bernoulli_keep(net, params, 0.8)
    spread, std = 0.3, 0.5

    def one(key):
        noise = optax.tree.random_like(key, params, jax.random.normal)
        moved = jax.tree.map(lambda a, w, e: a - w - spread * e, adapted, params, noise)
        return divergences.weight_kl(moved, keep, std, std)

    drawn = jax.jit(jax.vmap(one))(jax.random.split(jax.random.key(2), 2000))
    got = divergences.centred_kl(adapted, params, keep, std, std, spread)
    assert abs(got - jnp.mean(drawn)) < 4 * jnp.std(drawn) / 2000**0.5
    assert got > 1.5 * divergences.centred_kl(adapted, params, keep, std, std)
    np.testing.assert_allclose(divergences.centred_kl(params, params, keep, std, std), 0)


def test_masks_are_paid_for_as_by_a_code():
    """exp(-price) over all masks of a law sums to 1: any less, and the law would give more."""
    masks = [np.array(bits) for bits in itertools.product([0.0, 1.0], repeat=9)]
    tree = lambda bits: {"a": jnp.asarray(bits[:4]), "b": jnp.asarray(bits[4:]), "c": jnp.ones(())}
    price = jax.jit(divergences.mask_kl, static_argnums=1)
    free = [float(price(tree(mask), True)) for mask in masks]
    np.testing.assert_allclose(np.sum(np.exp(np.negative(free))), 1, rtol=1e-10)
    counted = [
        float(price(tree(mask), False))
        for mask in masks
        if (mask[:4].sum(), mask[4:].sum()) == (3, 2)
    ]
    np.testing.assert_allclose(counted, math.log(4 * 10), rtol=1e-10)
    assert len(counted) == 40


def conv4_masks(rate):
    """Masks of the released Conv-4's kernels, as many gone as the released rule prunes."""
    gone = [int(pruning.released.count(n, jnp.asarray(1 - rate))) for n in (1728, *[36864] * 3)]
    sizes = (1728, 36864, 36864, 36864)
    return [jnp.arange(n) >= k for n, k in zip(sizes, gone, strict=True)]


@pytest.mark.parametrize(
    ("rate", "nats"), [(0.001, 828), (0.02, 10_975), (0.03, 15_092), (0.2, 56_176)]
)
def test_price_of_the_masks_of_conv4(rate, nats):
    assert round(float(divergences.mask_kl(conv4_masks(rate)))) == nats


def test_catfish_pays_for_mask_and_weights():
    _, params = small_net()
    mask = jax.tree.map(lambda w: jnp.ones(()), params)
    mask["dense0"]["kernel"] = jnp.array([[0.0, 1.0, 1.0], [1.0, 0.0, 1.0]])
    kept = jax.tree.map(jnp.multiply, mask, params)
    half = sum(np.sum(np.square(leaf)) for leaf in jax.tree.leaves(kept)) / 2
    np.testing.assert_allclose(divergences.literal_catfish_kl(params, mask), half, rtol=1e-12)
    got = divergences.catfish_kl(params, mask)
    np.testing.assert_allclose(got, half + math.log(15), rtol=1e-12)


# --- bounds by hand -------------------------------------------------------------------------


def test_the_terms_are_those_of_equation_8():
    rng = np.random.default_rng(0)
    empirical, kl, samples = (
        rng.uniform(0, 0.4, 5),
        rng.uniform(0, 9, 5),
        np.array([5, 9, 30, 7, 12]),
    )
    hyper, delta = 2.5, 0.05
    got = jax.jit(bounds.meta_bound)(empirical, hyper, kl, samples, 5, delta)
    tasks = [
        math.sqrt((hyper + math.log(2 * 5 * m / delta) + k) / (2 * (m - 1)))
        for k, m in zip(kl, samples, strict=True)
    ]
    environment = math.sqrt((hyper + math.log(2 * 5 / delta)) / (2 * 4))
    expected = (np.mean(empirical), environment, np.mean(tasks))
    np.testing.assert_allclose(got, expected, rtol=1e-12)
    np.testing.assert_allclose(got.total, sum(expected), rtol=1e-12)


def test_single_task_bound_and_mr_mamls():
    expected = 0.1 + math.sqrt((3 + math.log(50 / 0.05)) / 98)
    np.testing.assert_allclose(bounds.mcallester(0.1, 3.0, 50, 0.05), expected, rtol=1e-12)
    rates = math.sqrt(1 / 18) + math.sqrt(1 / 198)
    expected = 0.2 + rates * math.sqrt(7 + math.log(100 * 11 / 0.05))
    got = bounds.mr_maml_bound(jnp.array([0.1, 0.3]), 7.0, 10, 100, 0.05)
    np.testing.assert_allclose(got, expected, rtol=1e-12)


def test_monotonicity():
    """Under vmap, in every number of the bound."""
    net, params = small_net()

    def total(rho=0.2, scale=1.0, samples=50.0, tasks=100.0, delta=0.1):
        weights = jax.tree.map(lambda w: scale * w, params)
        kl = divergences.weight_kl(weights, divergences.bernoulli_keep(net, weights, 1 - rho))
        hyper = divergences.gaussian_hyper_kl(weights, 1.0, 1.0)
        return bounds.meta_bound(jnp.full(3, 0.1), hyper, kl, samples, tasks, delta)

    def steps(name, values):
        found = jax.jit(jax.vmap(lambda value: total(**{name: value})))(jnp.asarray(values))
        return found, np.diff(found.total)

    assert np.all(steps("rho", [0.0, 0.1, 0.5, 0.9])[1] < 0)
    assert np.all(steps("scale", [0.1, 1.0, 3.0, 10.0])[1] > 0)
    assert np.all(steps("samples", [2.0, 5.0, 50.0, 500.0])[1] < 0)
    assert np.all(steps("delta", [0.001, 0.01, 0.1, 1.0])[1] < 0)
    found, differences = steps("tasks", [2.0, 10.0, 100.0, 1000.0])
    assert np.all(differences < 0)
    assert np.all(np.diff(found.task) > 0)  # log T: more tasks that may each fail
    assert np.all(np.diff(found.environment) < 0)


def test_a_grid_pays_for_its_points():
    params = {"w": jnp.array([0.5, -1.0, 2.0])}
    grid = {"std": jnp.array([0.05, 0.5, 1.0, 4.0]), "prior": jnp.array([4.0, 2.0, 1.0, 0.5])}

    def bound(point, delta):
        hyper = divergences.gaussian_hyper_kl(params, point["std"], point["prior"])
        return bounds.meta_bound(jnp.full(3, 0.1), hyper, 1.0, 50, 30, delta)

    rows = [jax.tree.map(lambda leaf, i=i: leaf[i], grid) for i in range(4)]
    totals = [float(bound(row, 0.1 / 4).total) for row in rows]
    best, point = jax.jit(lambda: bounds.over_grid(bound, grid, 0.1))()
    np.testing.assert_allclose(best.total, min(totals), rtol=1e-12)
    assert point == rows[int(np.argmin(totals))]
    assert best.total > bound(point, 0.1).total
    single, _ = bounds.over_grid(bound, jax.tree.map(lambda leaf: leaf[1:2], grid), 0.1)
    np.testing.assert_allclose(single.total, bound(rows[1], 0.1).total, rtol=1e-12)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: bounds.meta_bound(jnp.ones(2), 0, 0, 5, 1), "samples=1"),
        (lambda: bounds.meta_bound(jnp.ones(2), 0, 0, jnp.array([5, 1]), 9), "divides by one less"),
        (lambda: bounds.mcallester(0.1, 0, 5, 0.0), "delta=0.0"),
        (lambda: bounds.mr_maml_bound(jnp.ones(2), 0, 5, 1), "tasks=1"),
        (lambda: bounds.monte_carlo(jnp.ones(2), 2), "delta=2"),
        (lambda: divergences.gaussian_kl(1, 1, 0.0, 1.0), "std=0.0"),
        (lambda: divergences.gaussian_kl(1, 1, 1.0, -1.0), "prior_std=-1.0"),
        (lambda: divergences.bernoulli_keep(*small_net(), 0.0), "keep=0.0"),
        (lambda: divergences.subset_keep(*small_net(), 1.5), "keep=1.5"),
        (lambda: divergences.weight_kl({}, {}, spread=-1.0), "spread=-1.0"),
    ],
)
def test_what_makes_no_sense_is_refused(call, says):
    with pytest.raises(ValueError, match=says):
        call()


# --- the released checkpoints ---------------------------------------------------------------

FILES = {
    "fomaml_conv4_5w1s.npz": (0.0, 11.2, 3.59, 3.58, 91.9),
    "fomaml_cp_conv4_5w1s.npz": (0.02, 11.4, 4.96, 4.95, 92.0),
    "protonet_cp_resize_conv4_5w1s.npz": (0.03, 12.1, 8.03, 8.02, 89.1),
}


def released(name):
    """Parameters of a released checkpoint, names and layouts as they are."""
    if not (REFERENCE / name).exists():
        pytest.skip(f"no {name} in {REFERENCE}; it is not part of the repository")
    with np.load(REFERENCE / name) as stored:
        return {k: jnp.asarray(stored[k], float) for k in stored if k.startswith("param/")}


@pytest.mark.parametrize("name", FILES)
def test_terms_of_the_released_checkpoints(name):
    """80 samples, 600 tasks, delta 0.1, the norm over all weights: vacuous, every one."""
    rho, hyper_1d, *expected = FILES[name]
    params = released(name)
    kl = divergences.weight_kl(params, jax.tree.map(lambda w: jnp.asarray(1 - rho), params))
    kinds = (
        divergences.released_hyper_kl,
        divergences.no_hyper_kl,
        divergences.gaussian_hyper_kl,
    )
    hypers = [kind(params, 1e-3, 100.0) for kind in kinds]
    assert round(float(hypers[0]), 1) == hyper_1d
    found = [bounds.meta_bound(jnp.zeros(600), hyper, kl, 80, 600) for hyper in hypers]
    for bound, task, digits in zip(found, expected, (2, 2, 1), strict=True):
        assert round(float(bound.task), digits) == task
    if hyper_1d < 12:  # the table's 0.131 for D of 11.2 to 11.4 is cut off, not rounded
        assert math.floor(1000 * found[0].environment) == 131
    assert round(float(found[1].environment), 4) == 0.0885


def test_catfish_term_of_the_released_checkpoint():
    """With the price of the mask; beside it the whole norm of the kernels, or 98 % of it."""
    params = released("fomaml_cp_conv4_5w1s.npz")
    kernels = [w for name, w in params.items() if name.endswith("conv.weight")]
    masks = [m.reshape(w.shape) for m, w in zip(conv4_masks(0.02), kernels, strict=True)]
    term = lambda kl: float(bounds.task_term(0, divergences.mask_kl(masks) + kl, 80, 600))
    share = lambda p: divergences.weight_kl(kernels, [jnp.asarray(p)] * 4)
    assert round(term(share(1.0)), 2) == 9.61
    assert round(term(share(0.98)), 2) == 9.58
    realised = bounds.task_term(0, divergences.catfish_kl(kernels, masks), 80, 600)
    assert term(share(0.0)) < realised < term(share(1.0))


# --- the empirical error --------------------------------------------------------------------


def cell_net(feature, bias=0.0):
    """Class 1 of cell x if `feature(w[x]) > bias`, class 0 otherwise: a net one can see through."""

    def apply(params, x):
        logit = feature(params["w"][x]) - bias
        return jnp.stack([jnp.zeros_like(logit), logit], axis=-1)

    return Net(lambda key: {"w": jnp.zeros(4)}, apply, {"w": Role(prunable=True)})


def test_pruned_errors_have_the_error_in_closed_form_as_mean():
    net = cell_net(lambda w: w)
    params = {"w": jnp.array([0.5, -1.0, 2.0, 0.0])}
    x, y = jnp.array([0, 0, 1, 2, 3]), jnp.array([1, 0, 0, 1, 0])
    examples = Examples(x, jax.nn.one_hot(y.astype(int), 2))
    std, keep, draws = 0.8, 0.7, 20_000
    masks = lambda key: {"w": jax.random.bernoulli(key, keep, (4,)).astype(float)}
    errors = jax.jit(
        lambda key: bounds.pruned_errors(key, net, params, masks, examples, std, draws)
    )(jax.random.key(0))
    one = keep * norm.cdf(params["w"][x] / std)  # a pruned weight says class 0
    expected = jnp.mean(jnp.where(y == 1, 1 - one, one))
    assert errors.shape == (draws,)
    assert abs(jnp.mean(errors) - expected) < 4 * jnp.std(errors) / draws**0.5
    whole = lambda key: {"w": jnp.ones(())}
    still = bounds.pruned_errors(jax.random.key(1), net, params, whole, examples, 0.0, 3)
    np.testing.assert_allclose(still, 0.2)


def test_monte_carlo_covers():
    errors = jax.random.bernoulli(jax.random.key(3), 0.3, (5000, 20, 5)).astype(float)
    found = jax.vmap(lambda e: bounds.monte_carlo(e, 0.05))(errors)
    np.testing.assert_allclose(found.high - found.mean, math.sqrt(math.log(40) / 200))
    np.testing.assert_allclose(found.mean, np.mean(errors, (1, 2)))
    inside = (found.low <= 0.3) & (found.high >= 0.3)
    assert accepted(inside, 0.05)
    assert not accepted((found.mean <= 0.3) & (found.high >= 0.3), 0.05)
    edge = bounds.monte_carlo(jnp.zeros(5))
    assert (edge.mean, edge.low) == (0, 0)


# --- coverage -------------------------------------------------------------------------------

DRAWS, DELTA = 1000, 0.1


def accepted(held, delta=DELTA):
    """Whether so many of the draws held that their probability may be 1 - delta."""
    test = binomtest(int(np.sum(held)), len(held), 1 - delta, alternative="less")
    return test.pvalue > 1e-3


def over_draws(one):
    keys = jax.random.split(jax.random.key(7), DRAWS)
    return jax.jit(lambda keys: jax.lax.map(one, keys))(keys)


def coins(key, tasks, samples, cells):
    """Tasks of random cells with a coin for every label: any learner's error is 1/2 exactly."""
    k_x, k_y = jax.random.split(key)
    x = jax.random.randint(k_x, (tasks, samples), 0, cells)
    return x, jax.random.bernoulli(k_y, 0.5, (tasks, samples))


def errors_of(p, x, y):
    """Expected 0-1 error on each task's samples if cell j is called 1 with probability p_j."""
    p = jnp.take_along_axis(p, x, axis=1)
    return jnp.mean(jnp.where(y, 1 - p, p), axis=1)


def test_pp_holds_and_without_a_term_does_not():
    """Weights remember the labels of the cells they saw, or nothing; one in 20 is pruned.

    The first learner fools a bound without the divergence, the second, whose divergence is small,
    one without the logarithm.
    """
    tasks, samples, cells, keep = 100, 200, 1000, 0.95

    def one(key):
        x, y = coins(key, tasks, samples, cells)
        votes = jax.vmap(lambda x, y: jnp.zeros(cells).at[x].add(2.0 * y - 1))(x, y)
        weights = 3 * jnp.sign(votes)
        blind = jnp.full_like(weights, 1e-4)
        told, chance = (errors_of(keep * norm.cdf(w), x, y) for w in (weights, blind))
        cost = jax.vmap(lambda w: divergences.weight_kl({"w": w}, {"w": jnp.asarray(keep)}))
        kl, small = cost(weights), cost(blind)
        without_log = jnp.mean(chance + jnp.sqrt(small / (2 * (samples - 1))))
        total = lambda errors, kl: bounds.meta_bound(errors, 0.0, kl, samples, tasks, DELTA).total
        return jnp.stack([total(told, kl), total(told, 0.0), total(chance, small), without_log])

    held = (np.asarray(over_draws(one)) >= 0.5).T
    print("PP held: {}, without KL {}; blind {}, without log {}".format(*held.mean(axis=1)))
    whole, without_kl, blind, without_log = held
    assert accepted(whole)
    assert not accepted(without_kl)
    assert accepted(blind)
    assert not accepted(without_log)


def test_a_hyper_posterior_that_remembers_has_to_pay():
    """Tasks come in 8000 types, each with its label; the prior's mean remembers the types seen.

    The error on a new task is a sum over all types. Without D(Q || P), and with the formula of Amit
    and Meir's code for it, the bound fails.
    """
    tasks, samples, types, keep, flip, size = 400, 400, 8000, 0.95, 0.05, 2.0
    kinds = {
        "exact, equal stds": (divergences.gaussian_hyper_kl, 1.0, 1.0),
        "exact, released stds": (divergences.gaussian_hyper_kl, 1e-3, 100.0),
        "released formula": (divergences.released_hyper_kl, 1e-3, 100.0),
        "none": (divergences.no_hyper_kl, 1e-3, 100.0),
    }

    def one(key):
        k_label, k_type, k_flip = jax.random.split(key, 3)
        label = jax.random.bernoulli(k_label, 0.5, (types,))
        seen = jax.random.randint(k_type, (tasks,), 0, types)
        flips = jnp.mean(jax.random.bernoulli(k_flip, flip, (tasks, samples)), axis=1)
        ones = jnp.where(label[seen], 1 - flips, flips)
        theta = size * jnp.sign(jnp.zeros(types).at[seen].add(ones - 0.5))
        totals = []
        for kind, std, prior_std in kinds.values():
            p = keep * norm.cdf(theta / jnp.sqrt(1 + std**2))  # over priors and their noise
            empirical = ones * (1 - p[seen]) + (1 - ones) * p[seen]
            wrong = jnp.mean(jnp.where(label, 1 - p, p))
            error = flip + (1 - 2 * flip) * wrong
            hyper = kind({"w": theta}, std, prior_std)
            bound = bounds.meta_bound(empirical, hyper, 0.0, samples, tasks, DELTA)
            totals.append(bound.total - error)
        return jnp.stack(totals)

    held = dict(zip(kinds, np.asarray(over_draws(one)).T >= 0, strict=True))
    print({name: float(np.mean(row)) for name, row in held.items()})
    assert accepted(held["exact, equal stds"])
    assert accepted(held["exact, released stds"])
    assert not accepted(held["none"])
    assert not accepted(held["released formula"])


def test_catfish_holds_once_its_mask_is_paid_for():
    """Every weight is alike, so that only the mask can remember; noise says 1 of a cell that is
    kept, and a cell that is pruned says 0. CP prunes what score highest, the zeros.

    Read literally, Eq. 8 takes the mask for free and fails; a random mask of the same size holds.
    """
    tasks, samples, cells, keep, start = 100, 200, 800, 0.8825, 0.1
    net = cell_net(lambda w: 100 * jnp.abs(w), 2.0)
    params = {"w": jnp.full(cells, start)}
    prune = pruning.catfish(pruning.initial, select=pruning.exact)
    random = pruning.random_parameters(pruning.exact)
    edge = 2.0 / 100
    kept_says_one = 1 - (norm.cdf(edge - start) - norm.cdf(-edge - start))

    def one(key):
        k_data, k_random, k_prune = jax.random.split(key, 3)
        x, y = coins(k_data, tasks, samples, cells)

        def mask(key, x, y):
            loss = lambda p: cross_entropy(net.apply(p, x), jax.nn.one_hot(y.astype(int), 2))
            return prune(key, net, params, Probe(params, loss), jnp.asarray(keep))["w"]

        masks = jax.vmap(mask)(jax.random.split(k_prune, tasks), x, y)
        empirical = errors_of(masks * kept_says_one, x, y)
        total = lambda errors, kl: bounds.meta_bound(errors, 0.0, kl, samples, tasks, DELTA).total
        of_mask = lambda f: jax.vmap(lambda m: f(params, {"w": m}))(masks)
        law = divergences.weight_kl(params, divergences.subset_keep(net, params, keep))
        nothing = Probe(params, lambda p: jnp.zeros(()))
        blind = random(k_random, net, params, nothing, jnp.asarray(keep))["w"]
        chance = errors_of(jnp.broadcast_to(blind * kept_says_one, masks.shape), x, y)
        return jnp.stack(
            [
                total(empirical, of_mask(divergences.catfish_kl)),
                total(empirical, of_mask(divergences.literal_catfish_kl)),
                total(empirical, law),
                total(chance, law),
                jnp.mean(empirical),
            ]
        )

    paid, literal, with_rho, blind, empirical = np.asarray(over_draws(one)).T
    for name, row in {"paid": paid, "literal": literal, "rho": with_rho, "PP": blind}.items():
        print(f"{name}: held {np.mean(row >= 0.5):.3f}, mean {np.mean(row):.3f}")
    assert np.mean(empirical) < 0.15  # the masks do remember
    assert accepted(paid >= 0.5)
    assert accepted(blind >= 0.5)
    assert not accepted(literal >= 0.5)
    assert not accepted(with_rho >= 0.5)


# --- the entry point ------------------------------------------------------------------------


def entry_point(*arguments):
    """`experiments.bound` in a process of its own, which compiles fast rather than well."""
    command = [sys.executable, "-m", "experiments.bound", *arguments]
    fast = {**os.environ, "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    root = Path(__file__).parents[1]
    return subprocess.run(command, cwd=root, env=fast, capture_output=True, text=True)


def test_bound_writes_every_term(tmp_path):
    sizes = ("--rho=0.2", "--rhos=0.2,0.6", "--tasks=30", "--task_counts=30", "--samples=60")
    small = ("--sample_counts=60", "--dim=3", "--steps=20", "--draws=60")
    finished = entry_point(*sizes, *small, f"--out={tmp_path}")
    assert finished.returncode == 0, finished.stderr
    rows = json.loads((tmp_path / "bound.json").read_text())["rows"]
    assert [len(rows[name]) for name in ("rho", "tasks", "samples")] == [2, 1, 1]
    first, pruned_more = rows["rho"]
    assert rows["tasks"] == rows["samples"] == [first]
    assert first["error"] < pruned_more["error"]
    for row in rows["rho"]:
        assert row["total"] == pytest.approx(row["empirical"] + row["environment"] + row["task"])
        environment = bounds.environment_term(0, 30, 0.09 / 16)  # 16 points share 9/10 of delta
        assert row["environment"] == pytest.approx(float(environment), rel=1e-5)
        assert row["error"] < row["total"]
        assert row["all_tasks"] > 0
    assert (tmp_path / "bound.png").stat().st_size > 5_000


def test_bound_refuses_what_makes_no_sense():
    finished = entry_point("--rhos=0,1")
    assert finished.returncode == 2
    assert "rho=1.0 must be in [0, 1)" in finished.stderr
