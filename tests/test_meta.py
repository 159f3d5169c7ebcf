"""The meta-gradient against the objective written out, and the outer loop around it."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import make_tasks

from mgaug_jax import (
    cp,
    evaluate,
    fomaml,
    interval,
    maml,
    meta_gradient,
    mgaug,
    nets,
    pp,
    protonet,
    pruning,
    run,
    trainer,
    view,
    wp,
)
from mgaug_jax.losses import cross_entropy
from mgaug_jax.modifiers import compose, full_and_worst, total, worst
from mgaug_jax.nets.adapters import net_of
from mgaug_jax.nets.backbones import ConvNet, conv_roles
from mgaug_jax.resize import resize, resize_task
from mgaug_jax.types import MetaParams, Probe, Views

pytestmark = pytest.mark.usefixtures("quick_compile")
REDUCES = {"total": total, "worst": worst, "full_and_worst": full_and_worst}
MODIFIERS = {"wp": wp, "pp": pp, "cp": cp}


def mlp_of_images(outputs=3):
    """8x8 images to logits; a dense net, so that tasks are batched."""
    inner = nets.mlp((6,), inputs=64, outputs=outputs)
    return inner._replace(apply=lambda params, x: inner.apply(params, x.reshape(len(x), -1)))


def tiny_conv(way=3, image=8):
    return net_of(ConvNet(way, 4, 1), (image, image, 1), conv_roles)


def problem(net, tasks=2, image=8, seed=1):
    rng = np.random.default_rng(0)

    def draw(path, leaf):
        mean = path[-1].key == "scale"  # no channel dies
        return jnp.asarray(rng.normal(mean, 0.3, leaf.shape))

    shapes = jax.eval_shape(net.init, jax.random.key(0))
    params = MetaParams(jax.tree_util.tree_map_with_path(draw, shapes), {})
    batch = make_tasks(jax.random.key(seed), tasks, queries=3, shape=(image, image, 1))
    return params, jax.tree.map(lambda leaf: leaf.astype(float), batch)


def gradient(method, params, tasks, seed=0):
    return jax.jit(partial(meta_gradient, method))(jax.random.key(seed), params, tasks)


def assert_close(got, want, rtol=1e-9, atol=1e-12):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=atol), got, want)


def assert_equal(got, want):
    jax.tree.map(np.testing.assert_array_equal, got, want)


# --- the objective, written out -------------------------------------------------------------

KEEPS = (0.9, 0.6)
LR, STEPS = 0.2, 2


def catfish_views(reduce):
    """Two CP sub-networks at fixed rates."""
    prune = pruning.catfish(select=pruning.exact)

    def masks(key, net, params, probe):
        both = [prune(key, net, params, probe, keep) for keep in KEEPS]
        return jax.tree.map(lambda *leaves: jnp.stack(leaves), *both)

    return Views(2, masks, (), reduce, True)


def textbook_loss(name, net, params, mask, task):
    masked = lambda theta: jax.tree.map(lambda w, m: w * m, theta, mask)
    if name == "protonet":
        z, c = (net.apply(masked(params), part.x) for part in (task.query, task.support))
        means = jnp.stack([c[np.asarray(task.support.y)[:, n] == 1].mean(0) for n in range(3)])
        logits = jnp.stack([-((z - mean) ** 2).sum(1) for mean in means], 1)
        return cross_entropy(logits, task.query.y)
    loss = lambda theta, part: cross_entropy(net.apply(masked(theta), part.x), part.y)
    theta = params
    for _ in range(STEPS):
        grads = jax.grad(loss)(theta, task.support)
        grads = jax.lax.stop_gradient(grads) if name == "fomaml" else grads
        theta = jax.tree.map(lambda w, g: w - LR * g, theta, grads)
    return loss(theta, task.query)


def textbook(name, net, reduce, params, tasks):
    """Value and gradient of `mean_t reduce(losses of the views)`, every mask a constant."""
    split = [jax.tree.map(lambda leaf: leaf[t], tasks) for t in range(len(tasks.query.y))]
    ones = jax.tree.map(lambda w: np.ones(w.shape), params)
    every = []
    for task in split:
        grads = jax.jit(jax.grad(lambda p: textbook_loss(name, net, p, ones, task)))(params)
        masks = [ones]
        for keep in KEEPS:

            def mask(role, w, g):
                if not role.prunable:
                    return np.ones(w.shape)
                order = np.argsort(np.abs(np.asarray(w * g)).ravel())
                kept = np.ones(w.size)
                k = int(np.floor(w.size * (1 - keep) + 1e-9 + 0.5))
                kept[order[len(order) - k :]] = 0
                return kept.reshape(w.shape)

            masks.append(jax.tree.map(mask, net.roles, params, grads))
        every.append(masks)

    def objective(params):
        losses = [
            jnp.stack([textbook_loss(name, net, params, mask, task) for mask in masks])
            for task, masks in zip(split, every, strict=True)
        ]
        return sum(map(reduce, losses)) / len(losses)

    return jax.jit(jax.value_and_grad(objective))(params)


@pytest.mark.parametrize("reduce", REDUCES)
@pytest.mark.parametrize("name", ["maml", "fomaml", "protonet"])
def test_meta_gradient_is_that_of_the_joint_objective(x64, name, reduce):
    net = mlp_of_images()
    params, tasks = problem(net)
    by_name = {
        "maml": lambda: maml(net, lr=LR, steps=STEPS),
        "fomaml": lambda: fomaml(net, lr=LR, steps=STEPS),
        "protonet": lambda: protonet(net),
    }
    method = by_name[name]()._replace(views=catfish_views(REDUCES[reduce]))
    grads, info = gradient(method, params, tasks)
    loss, want = textbook(name, net, REDUCES[reduce], params.net, tasks)
    assert_close((info["loss"], grads.net), (loss, want))


def test_meta_gradient_of_a_conv_net_is_that_of_the_joint_objective(x64):
    net = tiny_conv()
    params, tasks = problem(net, tasks=1)
    method = fomaml(net, lr=LR, steps=STEPS)._replace(views=catfish_views(total))
    grads, info = gradient(method, params, tasks)
    loss, want = textbook("fomaml", net, total, params.net, tasks)
    assert_close((info["loss"], grads.net), (loss, want))


def test_info_is_of_the_full_networks(x64):
    net = mlp_of_images()
    params, tasks = problem(net)
    method = fomaml(net, lr=LR)
    _, info = gradient(cp(keep=0.5)(method), params, tasks)
    _, plain = gradient(method, params, tasks)
    assert info["query_loss"] == pytest.approx(float(plain["loss"]), rel=1e-12)
    assert info["accuracy"] == plain["accuracy"]
    assert info["loss"] > 2 * info["query_loss"]


# --- identities -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODIFIERS)
def test_views_that_keep_everything_repeat_the_full_gradient(x64, name):
    net = mlp_of_images()
    params, tasks = problem(net)
    method = maml(net, lr=LR, steps=1)
    grads, info = gradient(MODIFIERS[name](keep=1.0, cap=1.0, subnets=3)(method), params, tasks)
    want, plain = gradient(method, params, tasks)
    assert_close(grads, jax.tree.map(lambda g: 4 * g, want))
    assert_close(info["loss"], 4 * plain["loss"])


@pytest.mark.parametrize("net", [mlp_of_images(), tiny_conv()], ids=["mlp", "conv"])
def test_inactive_views_are_no_views(x64, net):
    params, tasks = problem(net)
    method = fomaml(net, lr=LR, steps=1)
    got = gradient(cp(keep=0.5, active=False)(method), params, tasks)
    assert_close(got, gradient(method, params, tasks), rtol=1e-13, atol=1e-16)


def test_active_switches_at_its_step_without_tracing_again(x64):
    net = mlp_of_images()
    params, tasks = problem(net)
    traces = []

    def at(step):
        traces.append(step)
        return cp(keep=0.5, active=step >= 2)(fomaml(net, lr=LR, steps=1))

    late = trainer(at, optax.sgd(0.1))
    step = jax.jit(late.step)
    state = late.init(jax.random.key(0))._replace(params=params)
    traces.clear()
    always = jax.jit(trainer(cp(keep=0.5)(fomaml(net, lr=LR, steps=1)), optax.sgd(0.1)).step)
    never = jax.jit(trainer(fomaml(net, lr=LR, steps=1), optax.sgd(0.1)).step)
    for i in range(4):
        with_views, _ = always(jax.random.key(i), state, tasks)
        without, _ = never(jax.random.key(i), state, tasks)
        state, _ = step(jax.random.key(i), state, tasks)
        expected, other = (with_views, without) if i >= 2 else (without, with_views)
        assert_close(state.params, expected.params, rtol=1e-12)
        head = lambda s: s.params.net["head"]["kernel"]
        assert jnp.abs(head(state) - head(other)).max() > 1e-5
    assert len(traces) == 1
    assert state.step == 4


@pytest.mark.parametrize("name", ["wp", "pp", "cp"])
def test_a_view_has_no_gradient_where_it_is_pruned_yet_the_weight_learns_on(x64, name):
    pruner = {
        "wp": pruning.width,
        "pp": pruning.random_parameters(),
        "cp": pruning.catfish(),
    }[name]
    net = tiny_conv()
    params, tasks = problem(net, tasks=1)
    task = jax.tree.map(lambda leaf: leaf[0], tasks)
    method = maml(net, lr=LR, steps=2)

    @jax.jit
    def views(params):
        full = view(method, jax.random.key(0), params, task)
        probe = Probe(full.grads.net, None)
        mask = pruner(jax.random.key(3), net, params.net, probe, jnp.float32(0.5))
        return full.grads.net, view(method, jax.random.key(0), params, task, mask).grads.net, mask

    full, part, mask = views(params)
    checked = 0
    for role, f, p, m in zip(*map(jax.tree.leaves, (net.roles, full, part, mask)), strict=True):
        gone = np.broadcast_to(m, f.shape) == 0
        checked += gone.sum()
        assert (p[gone] == 0).all()
        if role.prunable:
            assert gone.any()
            assert jnp.abs(p[~gone]).max() > 0
            assert jnp.abs(f[gone]).max() > 0
    assert checked > 15


def test_pruned_weights_survive_the_update(x64):
    net = mlp_of_images()
    params, tasks = problem(net, tasks=1)
    method = fomaml(net, lr=LR, steps=1)
    prune = lambda key, net, p, probe, keep: jax.tree.map(
        lambda role, w: jnp.zeros_like(w) if role.prunable else jnp.ones(()), net.roles, p
    )
    train = trainer(mgaug(prune, keep=0.5, subnets=2)(method), optax.sgd(0.1))
    state = train.init(jax.random.key(0))._replace(params=params)
    new, _ = jax.jit(train.step)(jax.random.key(0), state, tasks)
    full, _ = gradient(method, params, tasks)
    hidden = lambda p: p.net["dense0"]["kernel"]
    want = hidden(params) - 0.1 * hidden(full)
    np.testing.assert_allclose(hidden(new.params), want, rtol=1e-10, atol=1e-14)


def test_the_order_of_tasks_does_not_matter(x64):
    net = mlp_of_images()
    params, tasks = problem(net, tasks=3)
    method = cp(keep=0.7, high=0.7, subnets=2)(maml(net, lr=LR, steps=2))
    order = np.array([2, 0, 1])
    got = gradient(method, params, jax.tree.map(lambda leaf: leaf[order], tasks))
    assert_close(got, gradient(method, params, tasks), rtol=1e-10)


def test_task_gradients_are_averaged(x64):
    net = mlp_of_images()
    params, tasks = problem(net, tasks=2)
    method = cp(keep=0.7, high=0.7, subnets=1)(fomaml(net, lr=LR, steps=1))
    one = lambda t: gradient(method, params, jax.tree.map(lambda leaf: leaf[t : t + 1], tasks))[0]
    mean = jax.tree.map(lambda a, b: (a + b) / 2, one(0), one(1))
    assert_close(gradient(method, params, tasks)[0], mean)


# --- resolutions ----------------------------------------------------------------------------


def test_the_images_own_size_is_no_resize(x64):
    net = tiny_conv()
    params, tasks = problem(net)
    with_sizes, without = (
        gradient(cp(keep=0.6, sizes=sizes)(fomaml(net, lr=LR, steps=1)), params, tasks)
        for sizes in ((8,), ())
    )
    assert_close(with_sizes, without, rtol=1e-12)


def test_every_step_takes_one_of_the_sizes_in_one_trace(x64):
    net = tiny_conv(image=16)
    params, tasks = problem(net, image=16)
    traces = []

    def make(sizes):
        return cp(keep=0.6, high=0.6, subnets=1, sizes=sizes)(fomaml(net, lr=LR, steps=1))

    @jax.jit
    def step(key, params, tasks):
        traces.append(key)
        return meta_gradient(make((16, 8)), key, params, tasks)

    text = str(
        jax.make_jaxpr(partial(meta_gradient, make((16, 8))))(jax.random.key(0), params, tasks)
    )
    assert "cond[" in text
    assert text.count("cond[") == 1  # one switch, in the scan over views
    single = [gradient(make((size,)), params, tasks)[1]["loss"] for size in (16, 8)]
    assert abs(single[0] - single[1]) > 1e-3
    taken = []
    for seed in range(12):
        loss = step(jax.random.key(seed), params, tasks)[1]["loss"]
        near = [bool(abs(loss - s) < 1e-10) for s in single]
        assert sum(near) == 1
        taken.append(near.index(True))
    assert set(taken) == {0, 1}
    assert len(traces) == 1


def test_rates_are_traced(x64):
    net = mlp_of_images()
    params, tasks = problem(net)
    traces = []
    make = lambda keep: cp(keep=keep, high=keep, subnets=1)(fomaml(net, lr=LR, steps=1))

    @jax.jit
    def loss(keep):
        traces.append(keep)
        return meta_gradient(make(keep), jax.random.key(0), params, tasks)[1]["loss"]

    losses = [float(loss(keep)) for keep in (0.3, 0.6, 0.9)]
    assert len(traces) == 1
    assert len(set(losses)) == 3
    np.testing.assert_allclose(losses[1], gradient(make(0.6), params, tasks)[1]["loss"], rtol=1e-10)


# --- runs and evaluation --------------------------------------------------------------------


def sample(key, data):
    return jax.tree.map(lambda leaf: leaf * data, make_tasks(key, 2, shape=(8, 8, 1)))


@pytest.mark.parametrize("net", [mlp_of_images(), tiny_conv()], ids=["mlp", "conv"])
def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(net):
    method = cp(keep=0.5)(fomaml(net, lr=0.1, steps=2))
    train = trainer(method, optax.adam(1e-2))
    go = jax.jit(partial(run, train, sample), static_argnames="steps")
    data = jnp.ones(())
    start = jax.jit(train.init)(jax.random.key(0))
    whole, info = go(jax.random.key(1), start, data, steps=4)
    half, first = go(jax.random.key(1), start, data, steps=2)
    again, second = go(jax.random.key(1), half, data, steps=2)
    assert_equal(again, whole)
    assert_equal(jax.tree.map(lambda a, b: jnp.concatenate([a, b]), first, second), info)
    assert whole.step == 4
    assert (np.diff(info["loss"]) != 0).all()


def test_run_is_its_steps_one_by_one():
    train = trainer(fomaml(mlp_of_images(), lr=0.1, steps=2), optax.adam(1e-2))
    key, data = jax.random.key(1), jnp.ones(())
    state = start = jax.jit(train.init)(jax.random.key(0))
    step = jax.jit(train.step)
    for i in range(3):
        k_sample, k_step = jax.random.split(jax.random.fold_in(jax.random.key(1), i))
        state, _ = step(k_step, state, sample(k_sample, data))
    got, _ = jax.jit(partial(run, train, sample, steps=3))(key, start, data)
    assert_close(got.params, state.params, rtol=1e-5, atol=1e-7)


def test_training_lowers_the_loss():
    net = mlp_of_images()
    train = trainer(cp(keep=0.8)(fomaml(net, lr=0.1, steps=2)), optax.adam(1e-2))
    fixed = make_tasks(jax.random.key(5), 2, shape=(8, 8, 1))
    state = jax.jit(train.init)(jax.random.key(0))
    go = partial(run, train, lambda key, data: data, steps=30)
    _, info = jax.jit(go)(jax.random.key(1), state, fixed)
    assert info["loss"][-5:].mean() < 0.5 * info["loss"][:5].mean()


def scores_of(method, episodes=200, seed=0):
    params = jax.jit(method.algorithm(method.net, method.inner).init)(jax.random.key(7))
    go = partial(evaluate, method, sample=sample, episodes=episodes)
    return jax.jit(lambda key, params: go(key, params, data=jnp.ones(())))(
        jax.random.key(seed), params
    )


def test_accuracy_of_an_untrained_net_is_chance():
    scores = scores_of(fomaml(mlp_of_images(), lr=0.1, steps=2), 400)
    mean, error = scores.initial.mean(), scores.initial.std() / 400**0.5
    assert 0 < error < 0.02
    assert abs(mean - 1 / 3) < 4 * error
    assert scores.adapted.mean() > mean + 4 * error


def test_evaluation_takes_the_full_network():
    method = fomaml(mlp_of_images(), lr=0.1, steps=2)
    plain = scores_of(method)
    assert_equal(scores_of(pp(keep=0.1)(method)), plain)
    assert plain.adapted.shape == (200,)
    assert plain.adapted.std() > 0


def test_the_same_key_gives_two_methods_the_same_episodes():
    net = mlp_of_images()
    methods = fomaml(net, lr=0.1, steps=1), fomaml(net, lr=0.3, steps=3)
    a, b = map(scores_of, methods)
    assert_equal(a.initial, b.initial)  # not adapted yet, so equal on equal tasks
    assert (a.adapted != b.adapted).any()
    assert (scores_of(methods[0], seed=1).initial != a.initial).any()


def test_evaluation_ignores_inner_transforms():
    method = fomaml(mlp_of_images(), lr=0.1, steps=1)
    silent = lambda rule: optax.with_extra_args_support(optax.set_to_zero())
    assert_equal(scores_of(method._replace(inner=silent)), scores_of(method))
    heard = scores_of(method._replace(test=silent))
    assert_equal(heard.adapted, heard.initial)


def test_interval_is_the_released_formula():
    scores = np.random.default_rng(0).uniform(size=37).astype(np.float32)
    got = interval(jnp.asarray(scores))
    std = np.sqrt(((scores - scores.mean()) ** 2).sum() / 37)
    want = (scores.mean(), 1.96 * std / np.sqrt(37), std)
    np.testing.assert_allclose(got[:3], want, rtol=1e-5)
    assert got.episodes == 37
    np.testing.assert_allclose(
        interval(jnp.asarray(scores), 1.0).half_width, std / 37**0.5, rtol=1e-5
    )
    got = interval(jnp.array([0.0, 1.0, 1.0, 2.0, 2.0, 3.0]), 1.0, group=2)  # means .5, 1.5, 2.5
    np.testing.assert_allclose(got[:3], (1.5, (2 / 9) ** 0.5, (2 / 3) ** 0.5), rtol=1e-6)
    assert got.episodes == 6
    with pytest.raises(ValueError, match="37 episodes make no groups of 2"):
        interval(jnp.asarray(scores), group=2)


# --- resize ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("h", "w", "size"), [(7, 7, 5), (5, 6, 9), (8, 8, 1), (1, 1, 4), (9, 4, 4)]
)
def test_resize_equals_a_loop_with_aligned_corners(x64, h, w, size):
    x = np.random.default_rng(0).normal(size=(2, h, w, 3))
    want = np.zeros((2, size, size, 3))

    def source(i, n):
        s = i * (n - 1) / (size - 1) if size > 1 else 0.0
        low = min(int(np.floor(s + 1e-12)), n - 1)
        return low, min(low + 1, n - 1), s - low

    for i in range(size):
        for j in range(size):
            r0, r1, a = source(i, h)
            c0, c1, b = source(j, w)
            top = (1 - b) * x[:, r0, c0] + b * x[:, r0, c1]
            bottom = (1 - b) * x[:, r1, c0] + b * x[:, r1, c1]
            want[:, i, j] = (1 - a) * top + a * bottom
    np.testing.assert_allclose(resize(jnp.asarray(x), size), want, rtol=1e-10, atol=1e-12)


def test_resize_to_the_same_size_is_the_identity():
    x = jax.random.normal(jax.random.key(0), (2, 6, 6, 1))
    assert resize(x, 6) is x


@pytest.mark.parametrize("size", [3, 10, 17])
def test_a_ramp_stays_a_ramp_between_the_same_corners(x64, size):
    ramp = jnp.linspace(-2.0, 5.0, 8)
    x = (ramp[:, None] + 3 * ramp)[None, :, :, None]
    want = np.linspace(-2.0, 5.0, size)
    got = resize(x, size)[0, :, :, 0]
    np.testing.assert_allclose(got, want[:, None] + 3 * want, rtol=1e-10, atol=1e-10)


def test_resize_task_keeps_labels_and_resizes_both_parts():
    task = jax.tree.map(lambda leaf: leaf[0], make_tasks(jax.random.key(0), 1, shape=(8, 8, 1)))
    got = resize_task(task, 5)
    assert (got.support.x.shape, got.query.x.shape) == ((3, 5, 5, 1), (6, 5, 5, 1))
    assert_equal((got.support.y, got.query.y), (task.support.y, task.query.y))
    assert resize_task(task, None) is task


# --- refusals -------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [wp, pp, cp])
@pytest.mark.parametrize("value", [0, 0.0, -0.1, 1.1, float("nan"), "most"])
@pytest.mark.parametrize("name", ["keep", "high", "cap"])
def test_fractions_outside_0_1_are_refused(make, name, value):
    with pytest.raises(ValueError, match=f"{name}={value!r} was asked for"):
        make(**{"keep": 0.5, name: value})


def test_a_zero_fraction_as_an_array_is_refused():
    with pytest.raises(ValueError, match="keep="):
        cp(keep=jnp.zeros(()))


@pytest.mark.parametrize("subnets", [0, -1, 2.0])
def test_no_subnets_are_refused(subnets):
    with pytest.raises(ValueError, match=f"subnets={subnets} was asked for"):
        cp(keep=0.5, subnets=subnets)


@pytest.mark.parametrize("sizes", [(0,), (84, -1), (84.0,)])
def test_sizes_that_are_no_pixels_are_refused(sizes):
    with pytest.raises(ValueError, match="a size in sizes="):
        cp(keep=0.5, sizes=sizes)


def test_two_pruners_are_refused():
    with pytest.raises(ValueError, match="twice"):
        compose(wp(keep=0.5), cp(keep=0.5))(fomaml(tiny_conv()))


def test_compose_applies_the_last_first():
    add = lambda n: lambda method: (*method, n)
    assert compose(add(1), add(2))(()) == (2, 1)
    assert compose()("method") == "method"
