"""A sweep is its members' runs."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import mgaug_jax as mg
from mgaug_jax import nets, sweeps, taml
from mgaug_jax.data import sinusoid
from mgaug_jax.loops import run
from mgaug_jax.meta import State

SHARED = 7
VALUES = {"lr": [0.01, 0.1], "outer": [1e-3, 1e-2]}


def doubled(tree):
    wide = lambda leaf: leaf.astype(float) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf
    return jax.tree.map(wide, tree)


def small():
    return nets.mlp((5, 5))


def dense():
    inner = nets.mlp((5, 5), inputs=64, outputs=3)
    flat = lambda x: jnp.pad(x.reshape(len(x), -1), ((0, 0), (0, 64 - x[0].size)))
    return inner._replace(apply=lambda params, x: inner.apply(params, flat(x)))


def sines():
    return sinusoid.sampler(3, 3, 2), None


def images():
    pixels = jax.random.randint(jax.random.key(9), (4, 6, 8, 8, 1), 0, 256, jnp.uint8)
    data = mg.Images(pixels, jnp.full(4, 6, jnp.int32), jnp.zeros(1, float), jnp.ones(1, float))
    return mg.sampler(3, 1, 2, 2), data


def squared(outputs, y):
    return jnp.mean((outputs - y) ** 2)


CASES = {
    "maml": (small, sines, lambda net, lr: mg.maml(net, lr=lr, steps=1, loss=squared)),
    "noise": (
        small,
        sines,
        lambda net, lr: mg.noise(lr)(mg.fomaml(net, lr=lr, steps=1, loss=squared)),
    ),
    "taml": (
        small,
        sines,
        lambda net, lr: taml.inequality(lr)(mg.fomaml(net, lr=lr, steps=1, loss=squared)),
    ),
    "keep": (dense, images, lambda net, lr: mg.cp(keep=1 - lr)(mg.fomaml(net, lr=lr, steps=1))),
    "sizes": (
        dense,
        images,
        lambda net, lr: mg.cp(keep=0.8, sizes=(8, 6))(mg.fomaml(net, lr=lr, steps=1)),
    ),
}
OTHERS = sorted(CASES.keys() - {"taml", "sizes"})


def problem(name):
    make_net, problem, method = CASES[name]
    net, (sample, data) = make_net(), problem()

    def make(value):
        learner = mg.trainer(method(net, value["lr"]), optax.adam(value["outer"]))
        return learner._replace(init=lambda key: doubled(learner.init(key)))

    return net, make, sample, data


def keys(first, seeds=2):
    return jax.vmap(jax.random.key)(jnp.arange(first, first + seeds))


def swept(name, steps, values=VALUES, poison=None):
    net, make, sample, data = problem(name)
    values = {key: jnp.array(value) for key, value in values.items()}
    members = jax.jit(partial(sweeps.begin, make, net))(values, keys(0))
    if poison is not None:
        broken = jax.tree.map(lambda leaf: leaf.at[poison].set(jnp.nan), members.params)
        members = members._replace(params=broken)
    advance = jax.jit(partial(sweeps.advance, make, net, sample))
    done = 0
    for count in steps:
        shared = jax.random.key(SHARED)
        members, losses = advance(values, keys(100), members, data, done, count, shared)
        done += count
    return members, losses


@pytest.mark.parametrize(
    "name", ["taml", "sizes", *(pytest.param(n, marks=pytest.mark.slow) for n in OTHERS)]
)
def test_members_are_their_own_runs(x64, name):
    _, make, sample, data = problem(name)
    members, losses = swept(name, (3, 4))
    assert (members.stopped == -1).all()

    @jax.jit
    def single(value, k_init, key):
        learner = make(value)
        state, found = learner.init(k_init), []
        for i in range(7):  # as loops.run, with the key that a sweep shares
            k_sample, k_step = jax.random.split(jax.random.fold_in(key, i))
            shared = jax.random.fold_in(jax.random.key(SHARED), i)
            state, info = learner.step(k_step, state, sample(k_sample, data), shared)
            found.append(info["query_loss"])
        return state, jnp.stack(found)

    for k in range(2):
        for s in range(2):
            value = {key: jnp.array(value[k]) for key, value in VALUES.items()}
            state, found = single(value, jax.random.key(s), jax.random.key(100 + s))
            assert isinstance(state, State)
            for got, want in ((members.params, state.params), (members.opt, state.opt)):
                jax.tree.map(
                    lambda a, b, k=k, s=s: np.testing.assert_allclose(a[k, s], b, 1e-10, 1e-12),
                    got,
                    want,
                )
            np.testing.assert_allclose(losses[k, s], found[3:].mean(), rtol=1e-10)


def test_a_member_is_what_run_makes_of_it(x64):
    _, make, sample, data = problem("maml")
    members, _ = swept("maml", (7,))
    value = {key: jnp.array(value[1]) for key, value in VALUES.items()}
    learner = make(value)
    state = learner.init(jax.random.key(1))
    single = jax.jit(partial(run, learner, sample, steps=7))
    state, _ = single(jax.random.key(101), state, data)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a[1, 1], b, 1e-10, 1e-12),
        members.params,
        state.params,
    )


@pytest.mark.parametrize("name", ["maml", "sizes"])
def test_a_member_that_is_not_finite_stays_alone(name):
    whole, _ = swept(name, (3, 2))
    part, _ = swept(name, (3, 2), poison=(1, 0))
    sick = np.zeros((2, 2), bool)
    sick[1, 0] = True
    np.testing.assert_array_equal(part.stopped, np.where(sick, 0, -1))
    jax.tree.map(
        lambda a, b: np.testing.assert_array_equal(a[~sick], b[~sick]), part.params, whole.params
    )


def test_one_stops_at_the_step_that_fails_and_stays_there():
    values = {"lr": [0.01, 1e30], "outer": [1e-3, 1e30]}
    early, _ = swept("maml", (1,), values)
    later, _ = swept("maml", (1, 3, 3), values)
    assert (later.stopped[0] == -1).all()
    assert (later.stopped[1] >= 0).all()
    frozen = later.stopped[1] == early.stopped[1]
    assert frozen.any()
    jax.tree.map(
        lambda a, b: np.testing.assert_array_equal(a[1][frozen], b[1][frozen]),
        early.params,
        later.params,
    )


def test_only_the_chosen_resolution_is_computed():
    net, make, sample, data = problem("sizes")
    values = {key: jnp.array(value) for key, value in VALUES.items()}
    members = jax.eval_shape(partial(sweeps.begin, make, net), values, keys(0))
    text = str(
        jax.make_jaxpr(partial(sweeps.advance, make, net, sample))(
            values, keys(100), members, data, 0, 2, jax.random.key(SHARED)
        )
    )
    assert " cond[" in text


def test_other_numbers_and_resolutions_compile_nothing_again():
    net, (sample, data) = dense(), images()
    compiled = []

    @jax.jit
    def step(numbers, key, state, tasks):
        compiled.append(numbers)
        method = mg.fomaml(net, lr=numbers["lr"], steps=1)
        for change in (
            mg.noise(numbers["sigma"]),
            mg.drop_grad(numbers["drop"]),
            mg.l2(numbers["l2"]),
            mg.cp(keep=numbers["keep"], subnets=2, sizes=(8, 6)),
        ):
            method = change(method)
        return mg.trainer(method, optax.adam(numbers["outer"])).step(key, state, tasks)

    state = mg.trainer(mg.fomaml(net, lr=0.1), optax.adam(1e-3)).init(jax.random.key(0))
    finals = []
    for i in range(3):
        numbers = dict.fromkeys(("lr", "sigma", "drop", "l2", "outer"), 0.01 * (i + 1))
        numbers["keep"] = 0.9 - 0.1 * i
        k_tasks, k_step = jax.random.split(jax.random.key(i))
        state, info = step(numbers, k_step, state, sample(k_tasks, data))
        finals.append(float(info["loss"]))
    assert len(compiled) == 1
    assert len(set(finals)) == 3
