"""The same numbers on eight devices as on one. The file runs itself once more with eight."""

import os
import re
import subprocess
import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import make_tasks
from jax.sharding import AxisType

import mgaug_jax as mg
from experiments.bench import ours, workloads
from mgaug_jax import nets, perturb, sharding, sweeps, taml
from mgaug_jax.data import sinusoid, streaming
from mgaug_jax.loops import run
from mgaug_jax.meta import all_finite, meta_gradient

DEVICES = 8
many = pytest.mark.skipif(jax.device_count() < DEVICES, reason="runs in the eight-device process")
pytestmark = pytest.mark.usefixtures("quick_compile", "x64")


@pytest.mark.skipif(jax.device_count() > 1, reason="is the eight-device process")
@pytest.mark.parametrize("part", ["not slow", pytest.param("slow", marks=pytest.mark.slow)])
def test_on_eight_devices(part):
    # and no other flag, since a test there reads the program that is compiled without any
    flag = f"--xla_force_host_platform_device_count={DEVICES}"
    command = [sys.executable, "-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider", __file__]
    command += ["-m", part]
    ended = subprocess.run(
        command, env=os.environ | {"XLA_FLAGS": flag}, capture_output=True, text=True
    )
    assert ended.returncode == 0, ended.stdout[-6000:]
    assert re.search(r"\d+ passed, \d skipped", ended.stdout), ended.stdout[-500:]


def dense():
    inner = nets.mlp((6,), inputs=64, outputs=3)
    flat = lambda x: jnp.pad(x.reshape(len(x), -1), ((0, 0), (0, 64 - x[0].size)))
    part = lambda params, h, i, j: inner.part(params, h if i else flat(h), i, j)
    return inner._replace(apply=lambda params, x: inner.apply(params, flat(x)), part=part)


def tiny_conv():
    return nets.conv4(3, width=4, image=(16, 16, 1))


def batch(tasks, image, seed=1):
    made = make_tasks(jax.random.key(seed), tasks, queries=3, shape=(image, image, 1))
    return jax.tree.map(lambda leaf: leaf.astype(float), made)


def doubled(tree):
    return jax.tree.map(lambda leaf: leaf.astype(float), tree)


def both(method, f):
    """`f` of the method as it is, and spread over eight devices."""
    mesh = sharding.mesh()
    spread = jax.jit(partial(f, mg.sharded(mesh)(method)), out_shardings=sharding.replicated(mesh))
    return jax.jit(partial(f, method)), lambda *args: spread(*sharding.replicate(args, mesh))


def assert_close(got, want):
    def compare(a, b):
        rtol = 1e-10 if b.dtype == float else 1e-6  # accuracies are float32
        np.testing.assert_allclose(a, b, rtol, atol=1e-12)

    jax.tree.map(compare, jax.device_get(got), jax.device_get(want))


METHODS = {
    "plain": lambda net: mg.maml(net, lr=0.1, steps=2),
    "wp": lambda net: mg.wp(keep=0.5)(mg.fomaml(net, lr=0.1, steps=2)),
    "pp": lambda net: mg.pp(keep=0.5)(mg.fomaml(net, lr=0.1, steps=1)),
    "cp": lambda net: mg.cp(keep=0.8)(mg.fomaml(net, lr=0.1, steps=2)),
    "noise": lambda net: mg.noise(0.1)(mg.cp(keep=0.8)(mg.fomaml(net, lr=0.1, steps=1))),
    "outer": lambda net: mg.noise(0.1, site=perturb.outer)(mg.anil(net, lr=0.1, steps=1)),
    "taml": lambda net: taml.inequality(0.5)(mg.fomaml(net, lr=0.1, steps=1)),
    "metamix": lambda net: mg.metamix()(mg.wp(keep=0.5)(mg.fomaml(net, lr=0.1, steps=1))),
    "augment": lambda net: mg.rotate_classes(0.5)(mg.meta_sgd(net, lr=0.1, steps=1)),
}


SLOW = METHODS.keys() - {"noise", "taml"}
CASES = [("cp", 3), ("noise", 8), ("taml", 8)]
CASES += [pytest.param(name, 8, marks=pytest.mark.slow) for name in sorted(SLOW)]


@many
@pytest.mark.parametrize(("name", "tasks"), CASES)
def test_a_meta_gradient_is_the_same_on_eight_devices(name, tasks):
    method = METHODS[name](dense())
    params = doubled(method.algorithm(method.net, method.inner).init(jax.random.key(0)))
    one, eight = both(method, meta_gradient)
    arguments = jax.random.key(2), params, batch(tasks, 8)
    assert_close(eight(*arguments), one(*arguments))


@many
def test_so_are_resolutions_and_feedback():
    method = mg.cp(keep=0.8, sizes=(8, 6))(mg.fomaml(dense(), lr=0.1, steps=1))
    params = doubled(method.algorithm(method.net, method.inner).init(jax.random.key(0)))
    tasks = batch(8, 8)
    stored = jax.jit(partial(mg.probe_gradients, method))(jax.random.key(3), params, batch(2, 8, 5))
    one, eight = both(mg.feedback(stored)(method), meta_gradient)
    arguments = jax.random.key(2), params, tasks
    assert_close(eight(*arguments), one(*arguments))


@many
@pytest.mark.parametrize("episodes", [16, 5])
def test_so_is_an_evaluation(episodes):
    method = mg.fomaml(dense(), lr=0.1, steps=2)
    params = doubled(method.algorithm(method.net, method.inner).init(jax.random.key(0)))

    def scores(method, key, params, data):
        moved = lambda key, x: x + 0.1 * jax.random.normal(key, x.shape)
        query = lambda key, part: part._replace(x=moved(key, part.x))
        sample = lambda key, data: data._replace(query=query(key, data.query))
        return mg.evaluate(method, key, params, sample, data, episodes)

    one, eight = both(method, scores)
    arguments = jax.random.key(2), params, batch(1, 8)
    assert_close(eight(*arguments), one(*arguments))


def images():
    pixels = jax.random.randint(jax.random.key(9), (4, 6, 16, 16, 1), 0, 256, jnp.uint8)
    return mg.Images(pixels, jnp.full(4, 6, jnp.int32), jnp.zeros(1), jnp.ones(1))


@many
def test_images_are_drawn_where_they_are_evaluated():
    method = mg.fomaml(dense(), lr=0.1, steps=1)
    params = doubled(method.algorithm(method.net, method.inner).init(jax.random.key(0)))
    pixels = images().pixels[:, :, :8, :8]
    data = images()._replace(pixels=pixels, mean=jnp.zeros(1, float), std=jnp.ones(1, float))

    def scores(method, key, params, data):
        return mg.evaluate(method, key, params, mg.sampler(3, 1, 2, 1), data, 16)

    one, eight = both(method, scores)
    arguments = jax.random.key(2), params, data
    assert_close(eight(*arguments), one(*arguments))


def training(method, key, state, data):
    learner = mg.trainer(method, optax.adam(1e-3))
    return run(learner, mg.sampler(3, 1, 2, 8), key, state, data, 5)


@many
def test_a_run_is_the_same_and_each_device_draws_its_own_tasks():
    method = mg.cp(keep=0.8)(mg.fomaml(tiny_conv(), lr=0.1, steps=1))
    state = doubled(mg.trainer(method, optax.adam(1e-3)).init(jax.random.key(0)))
    state = state._replace(step=state.step.astype(jnp.int32))
    data = images()._replace(mean=jnp.zeros(1, float), std=jnp.ones(1, float))
    one, eight = both(method, training)
    arguments = jax.random.key(2), state, data
    got, want = eight(*arguments), one(*arguments)
    compare = partial(np.testing.assert_allclose, rtol=1e-7, atol=1e-10)  # Adam divides by |g|
    jax.tree.map(compare, jax.device_get(got), jax.device_get(want))

    mesh = sharding.mesh()
    step = partial(training, mg.sharded(mesh)(method))
    compiled = jax.jit(step, out_shardings=sharding.replicated(mesh))
    text = compiled.lower(*sharding.replicate(arguments, mesh)).compile().as_text()
    kinds = re.findall(r" = (.*) (all-reduce|all-gather|all-to-all|collective-permute)\(", text)
    moved = {kind for shape, kind in kinds if "f64[" in shape and "," in shape}
    assert moved == {"all-reduce"}  # gradients and losses, summed
    assert not any("16,16,1]" in shape for shape, _ in kinds)  # no images
    drawn = re.findall(r"u8\[([\d,]+)\][^\n]* gather\(", text)
    per_device = 3 * (1 + 2)  # of one task
    assert {int(shape.split(",")[0]) for shape in drawn} == {per_device}


@many
def test_streamed_tasks_lie_on_the_devices_that_train_on_them(monkeypatch):
    method = mg.fomaml(dense(), lr=0.1, steps=1)
    state = doubled(mg.trainer(method, optax.adam(1e-3)).init(jax.random.key(0)))
    state = state._replace(step=state.step.astype(jnp.int32))
    pixels, mesh = images().pixels[:, :, :8, :8], sharding.mesh()
    data = images()._replace(pixels=pixels, mean=jnp.zeros(1, float), std=jnp.ones(1, float))
    stored = streaming.Stored(np.asarray(pixels), *data[1:])
    sample, key = mg.sampler(3, 1, 2, 8), jax.random.key(2)

    def training(method, key, state, data):
        learner = mg.trainer(method, optax.adam(1e-3))
        return run(learner, streaming.either(sample), key, state, data, 4)

    read, take = [], streaming.take
    count = lambda stored, classes, images: (
        read.append(classes.size) or take(stored, classes, images)
    )
    monkeypatch.setattr(streaming, "take", count)
    gathered = streaming.gatherer(sample, stored, mesh)(key, np.arange(4))
    assert read == [4 * 3] * 8 + [4 * 6] * 8  # every device's own task, support and query
    x = gathered.tasks.query.x
    assert {shard.data.shape for shard in x.addressable_shards} == {(4, 1, 6, 8, 8, 1)}
    spread = jax.jit(partial(training, mg.sharded(mesh)(method)))
    given = *sharding.replicate((key, state), mesh), gathered
    assert_close(spread(*given), jax.jit(partial(training, method))(key, state, data))
    moved = re.findall(
        r" = (.*) (?:all-gather|all-to-all|collective-permute)\(",
        spread.lower(*given).compile().as_text(),
    )
    assert not any("8,8,1]" in shape or "u8[" in shape for shape in moved), moved

    seven = streaming.gatherer(mg.sampler(3, 1, 2, 7), stored, mesh)(key, np.arange(2))
    assert seven.tasks.query.x.is_fully_replicated


@many
def test_a_failing_task_is_named_wherever_it_lies():
    method = mg.fomaml(dense(), lr=0.1, steps=1)
    params = doubled(method.algorithm(method.net, method.inner).init(jax.random.key(0)))
    tasks = batch(8, 8)
    bad = tasks.query._replace(x=tasks.query.x.at[5, 0].set(jnp.nan))
    _, eight = both(method, meta_gradient)
    grads, info = eight(jax.random.key(2), params, tasks._replace(query=bad))
    np.testing.assert_array_equal(info["finite"]["loss"], np.arange(8) != 5)
    assert not all_finite(grads)


@many
def test_part_of_the_devices_will_do():
    method = mg.fomaml(dense(), lr=0.1, steps=1)
    params = doubled(method.algorithm(method.net, method.inner).init(jax.random.key(0)))
    mesh = sharding.mesh(jax.devices()[:2])
    arguments = jax.random.key(2), params, batch(4, 8)
    two = jax.jit(partial(meta_gradient, mg.sharded(mesh)(method)))
    got = two(*sharding.replicate(arguments, mesh))
    one = jax.jit(partial(meta_gradient, method))
    assert_close(got, one(*arguments))


def test_tasks_are_spread_once_and_over_plain_meshes():
    method = mg.fomaml(dense(), lr=0.1, steps=1)
    spread = mg.sharded(sharding.mesh())
    with pytest.raises(ValueError, match="use sharded once"):
        spread(spread(method))
    explicit = jax.make_mesh((1,), ("tasks",), axis_types=(AxisType.Explicit,))
    with pytest.raises(ValueError, match="explicit axes"):
        mg.sharded(explicit)


@pytest.mark.parametrize("at_once", [1, 3])
def test_tasks_at_once_change_nothing(at_once):
    method = METHODS["cp"](dense())
    params = doubled(method.algorithm(method.net, method.inner).init(jax.random.key(0)))
    arguments = jax.random.key(2), params, batch(4, 8)
    parts = jax.jit(partial(meta_gradient, method._replace(at_once=at_once)))
    whole = jax.jit(partial(meta_gradient, method))
    assert_close(parts(*arguments), whole(jax.random.key(2), *arguments[1:]))


@many
def test_a_workload_of_the_benchmark_is_the_same():
    problem = workloads.PROTONET._replace(image=(16, 16, 1), width=4, tasks=8, queries=2)
    steps = [ours.contender(problem._replace(devices=n)).step() for n in (1, 4, 0)]
    assert [len(state.step.sharding.device_set) for state, _ in steps] == [1, 4, 8]
    for state, _ in steps[1:]:
        assert_close(state.params, steps[0][0].params)


@many
def test_members_of_a_sweep_are_the_same_on_eight_devices():
    net = nets.mlp((5,))
    sample = sinusoid.sampler(3, 3, 2)

    def make(rate):
        return mg.trainer(mg.maml(net, lr=rate, loss=mg.losses.squared_error), optax.adam(1e-2))

    rates, seeds = jnp.linspace(0.01, 0.1, 8), jax.vmap(jax.random.key)(jnp.arange(2))
    members = doubled(sweeps.begin(make, net, rates, seeds))
    members = members._replace(stopped=members.stopped.astype(jnp.int32))

    def advance(whole, rates, members):
        keys, shared = whole
        return sweeps.advance(make, net, sample, rates, keys, members, None, 0, 4, shared)

    def given():
        keys = jax.vmap(jax.random.key)(jnp.arange(10, 12))
        return (keys, jax.random.key(7)), rates, members

    mesh = sharding.mesh()
    spread = jax.jit(partial(sharding.spread, advance, mesh))
    got = spread(*sharding.replicate(given()[:2], mesh), members)
    assert len(got[1].sharding.device_set) == 8
    assert not got[1].sharding.is_fully_replicated
    assert_close(got, jax.jit(advance)(*given()))
