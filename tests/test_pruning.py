"""Which weights are pruned: by hand, by counts, by identities and against brute force."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import make_tasks, small_conv

from mgaug_jax import meta, nets, protonet, pruning
from mgaug_jax.losses import squared_error
from mgaug_jax.modifiers import keep_rates
from mgaug_jax.types import Probe, Role

pytestmark = pytest.mark.usefixtures("quick_compile")
RULES = {"released": pruning.released, "exact": pruning.exact}
SIZES = (1728, 36864)
# the released code: k = int(n (1 - keep)) of the two layer sizes of Conv-4
COUNTS = {
    0.999: (1, 36),
    0.99: (17, 368),
    0.98: (34, 737),
    0.97: (51, 1105),
    0.9: (172, 3686),
    0.8: (345, 7372),
}
TOY = {"a": np.zeros((3, 3, 2, 5)), "b": np.zeros(5), "c": np.zeros((3, 3, 5, 7))}


def toy(params=TOY):
    """A net of two prunable arrays and a vector."""
    roles = jax.tree.map(lambda leaf: Role(leaf.ndim > 1, leaf.ndim - 1), params)
    return nets.from_functions(lambda key: params, lambda p, x: x)._replace(roles=roles)


def normal(params, seed=0):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape)), params)


def masks_of(pruner, keep, params=None, grads=None, seed=0, net=None):
    params = normal(TOY, 1) if params is None else params
    grads = normal(TOY, 2) if grads is None else grads
    probe = Probe(grads, lambda p: jnp.zeros(()))
    return pruner(jax.random.key(seed), net or toy(), params, probe, keep)


def pruned(mask):
    return int((mask == 0).sum())


# --- rules ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rule", "scores", "keep", "kept"),
    [
        ("released", [4, 1, 3, 2], 0.5, [0, 1, 1, 1]),  # k = 2: all up to the second largest
        ("released", [4, 1, 3, 2], 0.25, [0, 1, 0, 1]),
        ("released", [4, 1, 3, 2], 0.75, [1, 1, 1, 1]),  # k = 1
        ("released", [4, 1, 3, 2], 1.0, [1, 1, 1, 1]),  # k = 0
        ("released", [4, 4, 4, 2], 0.5, [1, 1, 1, 1]),  # ties at the threshold stay
        ("released", [5, 4, 4, 2], 0.25, [0, 1, 1, 1]),
        ("released", [0, 0, 0, 0], 0.25, [1, 1, 1, 1]),
        ("released", [8, 1, 7, 2, 6, 3, 5, 4], 0.5, [0, 1, 0, 1, 0, 1, 1, 1]),
        ("released", [8, 1, 7, 2, 6, 3, 5, 4], 0.45, [0, 1, 0, 1, 0, 1, 1, 1]),  # 4.4 floors
        ("exact", [4, 1, 3, 2], 0.5, [0, 1, 0, 1]),
        ("exact", [4, 1, 3, 2], 0.25, [0, 1, 0, 0]),
        ("exact", [4, 1, 3, 2], 1.0, [1, 1, 1, 1]),
        ("exact", [4, 4, 4, 2], 0.5, [0, 0, 1, 1]),  # of equals the earlier goes
        ("exact", [0, 0, 0, 0], 0.25, [0, 0, 0, 1]),
        ("exact", [4, 1, 3, 2], 0.625, [0, 1, 0, 1]),  # 1.5 rounds up
        ("exact", [4, 1, 3, 2], 0.7, [0, 1, 1, 1]),  # 1.2 rounds down
        ("exact", [8, 1, 7, 2, 6, 3, 5, 4], 0.5, [0, 1, 0, 1, 0, 1, 0, 1]),
    ],
)
def test_rules_by_hand(rule, scores, keep, kept):
    got = jax.jit(RULES[rule])(jnp.array(scores, jnp.float32), keep)
    np.testing.assert_array_equal(got, np.array(kept, bool))


@pytest.mark.parametrize("size", [*SIZES, 8000])
def test_counts_of_the_released_rule_in_float32(size):
    scores = jnp.asarray(np.random.default_rng(0).permutation(size), jnp.float32)
    count = jax.jit(lambda rule_keep: jnp.sum(~pruning.released(scores, rule_keep)))
    if size == 8000:
        assert int(count(jnp.float32(0.99))) == 80 - 1
        return
    for keep, ks in COUNTS.items():
        assert int(count(jnp.float32(keep))) == ks[SIZES.index(size)] - 1, keep


@pytest.mark.parametrize("size", [*SIZES, 8000])
def test_counts_of_the_exact_rule_in_float32(size):
    scores = jnp.asarray(np.random.default_rng(0).permutation(size), jnp.float32)
    count = jax.jit(lambda keep: jnp.sum(~pruning.exact(scores, keep)))
    for keep in COUNTS:
        want = (size * round(1000 * (1 - keep)) + 500) // 1000  # half up, in integers
        assert int(count(jnp.float32(keep))) == want, keep


# --- catfish --------------------------------------------------------------------------------


def test_cp_prunes_the_largest_products_of_each_layer(x64):
    params, grads = normal(TOY, 1), normal(TOY, 2)
    mask = masks_of(pruning.catfish(select=pruning.exact), 0.7, params, grads)
    for name, k in (("a", 27), ("c", 95)):  # round(90 * .3), round(315 * .3) half up
        scores = np.abs(np.asarray(params[name]) * np.asarray(grads[name])).ravel()
        largest = np.argsort(scores)[-k:]
        want = np.ones(scores.size)
        want[largest] = 0
        np.testing.assert_array_equal(mask[name].ravel(), want)
    assert mask["b"].shape == ()
    assert mask["b"] == 1


@pytest.mark.parametrize("rule", RULES)
def test_cp_masks_are_nested_in_keep(x64, rule):
    pruner = pruning.catfish(select=RULES[rule])
    keeps = jnp.linspace(0.05, 1, 40)
    masks = jax.vmap(lambda keep: masks_of(pruner, keep))(keeps)
    for mask in (masks["a"], masks["c"]):
        assert (jnp.diff(mask, axis=0) >= 0).all()
        assert 0 < mask[0].sum() < mask[-1].sum() == mask[-1].size


@pytest.mark.parametrize("scale", [1e-6, 3.0, 1e5])
def test_cp_does_not_see_the_scale_of_a_layer(x64, scale):
    grads = normal(TOY, 2)
    pruner = pruning.catfish()
    scaled = {**grads, "a": scale * grads["a"]}
    want, got = masks_of(pruner, 0.6), masks_of(pruner, 0.6, grads=scaled)
    assert pruned(want["a"]) == 35
    jax.tree.map(np.testing.assert_array_equal, got, want)


def test_cp_with_all_zero_scores_prunes_nothing():
    mask = masks_of(pruning.catfish(), 0.5, grads=jax.tree.map(jnp.zeros_like, normal(TOY)))
    assert all((leaf == 1).all() for leaf in jax.tree.leaves(mask))


@pytest.mark.parametrize(
    ("rule", "n", "keep", "number"),
    [
        ("released", 8000, 0.99, 80 - 1),
        ("released", 2_359_296, 0.98, 47_185 - 1),
        ("released", 2_359_296, 0.99, 23_592 - 1),
        ("exact", 1_179_648, 0.97, 35_389),
        ("released", 11_157_504, 0.8, 2_231_500 - 1),
        ("exact", 11_157_504, 0.8, 2_231_501),
        ("released", 1728, 1.0, 0),
        ("exact", 2_359_296, 0.0001, 2_359_060),
    ],
)
def test_counts_are_exact_in_float32_for_large_layers(rule, n, keep, number):
    assert RULES[rule].count(n, jnp.float32(keep)) == number


def test_lowest_prunes_as_many_where_dead_channels_tie():
    scores = jnp.arange(1000.0).at[:600].set(0)
    count = lambda select, s: int(jnp.sum(~select(s, jnp.float32(0.9))))
    assert count(pruning.released, scores) == count(pruning.released_by_rank, -scores) == 99
    assert count(pruning.released, -scores) == 0


@pytest.mark.parametrize("rule", RULES)
def test_globally_prunes_as_many_overall(x64, rule):
    grads = normal(TOY, 2)
    grads = {**grads, "a": 10 * grads["a"]}  # so that layers differ
    make = lambda ranking: pruning.catfish(ranking=ranking, select=RULES[rule])
    mask = masks_of(make(pruning.globally), 0.8, grads=grads)
    layers = masks_of(make(pruning.per_layer), 0.8, grads=grads)
    assert pruned(mask["a"]) + pruned(mask["c"]) == pruned(layers["a"]) + pruned(layers["c"])
    assert pruned(mask["a"]) > pruned(layers["a"])
    assert pruned(mask["a"]) > 18 > pruned(mask["c"]) / 4
    assert mask["b"].shape == ()
    scores = jax.tree.map(lambda w, g: np.abs(w * g), normal(TOY, 1), grads)
    of = lambda kept: [np.asarray(scores[n])[np.asarray(mask[n]) == kept] for n in ("a", "c")]
    assert np.concatenate(of(1)).max() < np.concatenate(of(0)).min()


def test_globally_of_one_layer_is_per_layer(x64):
    params, grads = ({"a": normal(TOY, s)["a"]} for s in (1, 2))
    net = toy({"a": TOY["a"]})
    per, glob = (
        masks_of(pruning.catfish(ranking=r), 0.6, params, grads, net=net)
        for r in (pruning.per_layer, pruning.globally)
    )
    np.testing.assert_array_equal(per["a"], glob["a"])


@pytest.mark.parametrize("rule", RULES)
def test_lowest_prunes_as_many_of_the_other_end(x64, rule):
    high = masks_of(pruning.catfish(select=RULES[rule]), 0.7)
    low = masks_of(pruning.catfish(pruning.lowest(), select=RULES[rule]), 0.7)
    params, grads = normal(TOY, 1), normal(TOY, 2)
    for name in ("a", "c"):
        assert pruned(high[name]) == pruned(low[name]) > 0
        scores, kept = np.abs(params[name] * grads[name]), np.asarray(low[name])
        assert scores[kept == 0].max() < scores[kept == 1].min()


# --- scores ---------------------------------------------------------------------------------


def mlp_problem():
    net = nets.mlp((8, 8), inputs=3, outputs=2)
    params = normal(jax.eval_shape(net.init, jax.random.key(0)), 4)
    x, y = (np.random.default_rng(s).normal(size=(20, n)) for s, n in ((5, 3), (6, 2)))
    return params, lambda p: squared_error(net.apply(p, x), y)


def test_initial_scores_are_weight_times_gradient(x64):
    params, loss = mlp_problem()
    got = jax.jit(lambda p: pruning.initial(p, Probe(None, loss)))(params)
    grads = jax.jit(jax.grad(loss))(params)
    jax.tree.map(
        lambda s, w, g: np.testing.assert_allclose(s, np.abs(w * g), rtol=1e-10), got, params, grads
    )


def test_leave_one_out_equals_a_loop(x64):
    params, loss = mlp_problem()
    got = jax.jit(lambda p: pruning.leave_one_out(p, Probe(None, loss)))(params)
    loss = jax.jit(loss)
    leaves, tree = jax.tree.flatten(params)
    for i, leaf in enumerate(leaves):
        for j in range(leaf.size):
            without = np.array(leaf)
            without.flat[j] = 0
            change = abs(
                loss(params) - loss(tree.unflatten([*leaves[:i], without, *leaves[i + 1 :]]))
            )
            np.testing.assert_allclose(
                jax.tree.leaves(got)[i].ravel()[j], change, rtol=1e-9, atol=1e-12
            )


def test_first_order_scores_tend_to_leave_one_out_as_weights_leave_gradually(x64):
    # gates: L((1 - s e_j) w) - L(w) = s MMCA + O(s^2)
    params, loss = mlp_problem()
    first = pruning.initial(params, Probe(None, loss))["dense1"]["kernel"]
    for s, tolerance in ((1e-5, 1e-3), (1e-6, 1e-4)):
        for j in range(5):
            kernel = params["dense1"]["kernel"]
            moved = {**params, "dense1": {**params["dense1"], "kernel": kernel.at[j, j].mul(1 - s)}}
            change = abs(loss(moved) - loss(params)) / s
            np.testing.assert_allclose(change, first[j, j], rtol=tolerance, atol=tolerance)


def test_first_order_scores_correlate_with_leave_one_out_and_more_so_for_small_weights(x64):
    params, loss = mlp_problem()
    probe = Probe(None, loss)
    both = jax.jit(lambda p: (pruning.initial(p, probe), pruning.leave_one_out(p, probe)))
    ranks = lambda s: np.argsort(np.argsort(s))
    spearman, pearson = [], []
    for scale in (1, 0.3, 0.1):
        a, b = (
            np.concatenate([scores[n]["kernel"].ravel() for n in ("dense0", "dense1")])
            for scores in both(jax.tree.map(lambda leaf: scale * leaf, params))
        )
        spearman.append(np.corrcoef(ranks(a), ranks(b))[0, 1])
        pearson.append(np.corrcoef(a, b)[0, 1])
    for correlations in (spearman, pearson):
        assert correlations == sorted(correlations)
        assert correlations[0] > 0.8
        assert correlations[-1] > 0.9


def test_adapted_scores_of_protonet_are_the_initial_ones(x64):
    net = nets.conv4(None, width=2, image=(16, 16, 1))
    params = meta.MetaParams(normal(jax.eval_shape(net.init, jax.random.key(0)), 1), {})
    task = jax.tree.map(lambda leaf: leaf[0].astype(float), make_tasks(jax.random.key(1), 1))

    def scores(params):
        grads = meta.view(protonet(net), jax.random.key(0), params, task).grads
        probe = meta.probe(protonet(net), params, task, grads)
        return pruning.adapted(params.net, probe), pruning.initial(params.net, probe)

    adapted, initial = jax.jit(scores)(params)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-8, atol=1e-12), adapted, initial
    )
    assert initial["conv0"]["kernel"].max() > 1e-4


# --- random parameters ----------------------------------------------------------------------


@pytest.mark.parametrize("keep", [0.3, 0.55, 0.9])
def test_pp_prunes_an_exact_number_for_every_key(keep):
    pruner = pruning.random_parameters()

    def check(key):
        mask = pruner(key, toy(), normal(TOY), None, jnp.float32(keep))
        counts = jnp.stack([jnp.sum(mask[name] == 0) for name in ("a", "c")])
        sizes = np.array([TOY["a"].size, TOY["c"].size])
        return (counts == np.floor(sizes * (1 - keep) + 0.5 + 1e-9)).all(), mask["a"]

    right, masks = jax.jit(jax.vmap(check))(jax.random.split(jax.random.key(0), 256))
    assert right.all()
    # every weight is kept about as often: four standard errors of 256 draws, 90 weights
    assert jnp.abs(masks.mean(0) - keep).max() < 4.5 * (keep * (1 - keep) / 256) ** 0.5
    assert len({np.asarray(m).tobytes() for m in masks}) == 256


def test_bernoulli_keeps_each_weight_with_probability_keep():
    draw = lambda key: pruning.bernoulli_parameters(key, toy(), normal(TOY), None, 0.8)
    masks = jax.jit(jax.vmap(draw))(jax.random.split(jax.random.key(0), 256))
    counts = masks["a"].sum((1, 2, 3, 4))
    error = (0.8 * 0.2 / (256 * 90)) ** 0.5
    assert abs(masks["a"].mean() - 0.8) < 4 * error
    assert len(set(counts.tolist())) > 5  # no fixed number
    np.testing.assert_allclose(jnp.var(counts), 90 * 0.16, rtol=0.4)  # independent
    assert (masks["b"] == 1).all()


# --- width ----------------------------------------------------------------------------------


@pytest.mark.parametrize("keep", [0.25, 0.5, 0.75])
def test_wp_by_masking_equals_slicing(x64, keep):
    width, kept = 8, int(8 * keep)
    net = nets.conv4(3, width=width, image=(32, 32, 1))
    params = normal(jax.eval_shape(net.init, jax.random.key(0)), 1)
    mask = pruning.width(jax.random.key(0), net, params, None, jnp.asarray(keep))
    x = jax.random.normal(jax.random.key(1), (3, 32, 32, 1))
    got = jax.jit(meta.subnet(net, mask).apply)(params, x)
    sliced = {"head": {**params["head"], "kernel": params["head"]["kernel"][: kept * 4]}}
    for i in range(4):
        kernel = params[f"conv{i}"]["kernel"][:, :, : kept if i else 1, :kept]
        sliced[f"conv{i}"] = {"kernel": kernel, "bias": params[f"conv{i}"]["bias"][:kept]}
        sliced[f"norm{i}"] = jax.tree.map(lambda leaf: leaf[:kept], params[f"norm{i}"])
    narrow = nets.conv4(3, width=kept, image=(32, 32, 1))
    shape = lambda leaf: leaf.shape
    assert jax.tree.map(shape, sliced) == jax.tree.map(
        shape, jax.eval_shape(narrow.init, jax.random.key(0))
    )
    np.testing.assert_allclose(got, jax.jit(narrow.apply)(sliced, x), rtol=1e-9)
    full = jax.jit(net.apply)(params, x)
    assert jnp.abs(got - full).max() > 1e-2


@pytest.mark.parametrize(
    ("keep", "kept"), [(1e-6, 1), (0.1, 1), (0.25, 1), (0.375, 2), (0.5, 2), (0.625, 3), (1, 4)]
)
def test_wp_rounds_channels_half_up_and_keeps_at_least_one(keep, kept):
    net = small_conv(width=4)
    params = jax.eval_shape(net.init, jax.random.key(0))
    mask = pruning.width(jax.random.key(0), net, params, None, jnp.float32(keep))
    for i in range(4):
        for leaf in (*mask[f"conv{i}"].values(), *mask[f"norm{i}"].values()):
            np.testing.assert_array_equal(leaf.ravel(), np.arange(4) < kept)


# --- masks and rates ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "pruner",
    [
        pruning.catfish(),
        pruning.catfish(ranking=pruning.globally),
        pruning.random_parameters(),
        pruning.bernoulli_parameters,
        pruning.width,
    ],
    ids=["cp", "cp globally", "pp", "bernoulli", "wp"],
)
def test_masks_are_the_scalar_one_where_nothing_is_pruned(pruner):
    net = small_conv()
    params = normal(jax.eval_shape(net.init, jax.random.key(0)))
    mask = pruner(jax.random.key(0), net, params, Probe(params, None), jnp.float32(0.5))
    for role, leaf, m in zip(*map(jax.tree.leaves, (net.roles, params, mask)), strict=True):
        assert m.dtype == leaf.dtype
        by_width = pruner is pruning.width
        if role.prunable or (by_width and role.width is not None):
            assert set(np.unique(m)) == {0, 1}
            assert np.broadcast_shapes(m.shape, leaf.shape) == leaf.shape
        else:
            assert m.shape == ()
            assert m == 1


@pytest.mark.parametrize(("low", "high", "cap"), [(0.8, 1.0, 0.9), (0.98, 1.0, 0.999)])
@pytest.mark.parametrize("subnets", [1, 3, 5])
def test_rates_descend_from_the_cap_to_low(low, high, cap, subnets):
    rates = jax.jit(jax.vmap(lambda key: keep_rates(key, subnets, low, high, cap)))(
        jax.random.split(jax.random.key(0), 256)
    )
    assert rates.shape == (256, subnets)
    assert (rates[:, -1] == np.float32(low)).all()
    assert (jnp.diff(rates, axis=1) <= 0).all()
    assert (rates >= np.float32(low)).all()
    assert (rates <= np.float32(cap)).all()
    if subnets > 1:
        free = rates[:, 0]
        assert (free == np.float32(cap)).any()  # some are capped
        assert free.std() > 0


def test_rates_are_uniform_between_low_and_high():
    draw = jax.vmap(lambda key: keep_rates(key, 2, 0.4, 0.8, 1.0)[0])
    drawn = draw(jax.random.split(jax.random.key(0), 4096))
    np.testing.assert_allclose(np.quantile(drawn, [0.25, 0.5, 0.75]), [0.5, 0.6, 0.7], atol=0.012)


def test_low_above_the_cap_is_capped():
    np.testing.assert_array_equal(
        keep_rates(jax.random.key(0), 3, 1.0, 1.0, 0.9), [np.float32(0.9)] * 3
    )


def test_more_subnets_do_not_change_the_rates_of_fewer():
    few, many = (
        jax.vmap(lambda key: keep_rates(key, subnets, 0.5, 1.0, 1.0))(
            jax.random.split(jax.random.key(0), 64)
        )
        for subnets in (3, 5)
    )
    for a, b in zip(np.asarray(few), np.asarray(many), strict=True):
        assert set(a) < set(b)
