"""This library's side of `experiments.benchmark`."""

import math
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.bench.workloads import HIDDEN, LR, OUTER_LR, Problem, tasks, weights
from mgaug_jax import fomaml, maml, meta, modifiers, nets, protonet, pruning, sharding, trainer
from mgaug_jax.losses import cross_entropy, squared_error
from mgaug_jax.meta import State
from mgaug_jax.types import Array, Examples, MetaParams, Method, Task, Views


class Contender(NamedTuple):
    """One side of a comparison, compiled where it compiles.

    Attributes:
      step: One meta-step, waited for.
      compile: Seconds from the arrays to a program; None: nothing is compiled.
      temporary: Bytes that the program needs beside its arguments and results; None: not known.
    """

    step: Callable[[], Any]
    compile: float | None = None
    temporary: int | None = None


def method(problem: Problem, lr: float | Array = LR) -> Method:
    """The method of a problem; its sub-networks keep what the problem says, no random share."""
    if problem.image is None:
        net = nets.mlp(HIDDEN)
    else:
        way = None if problem.algorithm == "protonet" else problem.way
        dtype = jnp.dtype(problem.dtype) if problem.dtype else None
        net = nets.conv4(way, width=problem.width, image=problem.image, dtype=dtype)
    if problem.algorithm == "protonet":
        made = protonet(net)
    else:
        make = {"fomaml": fomaml, "maml": maml}[problem.algorithm]
        loss = squared_error if problem.image is None else cross_entropy
        made = make(net, lr=lr, steps=problem.steps, loss=loss)
    if not problem.keeps:
        return made
    prune = pruning.catfish()

    def masks(key, net, params, probe):
        keeps = jnp.array(problem.keeps)
        return jax.vmap(lambda keep: prune(key, net, params, probe, keep))(keeps)

    return made._replace(views=Views(len(problem.keeps), masks, (), modifiers.total, True))


def arrays(problem: Problem) -> tuple[MetaParams, Task]:
    """Parameters and tasks on the device, in the widest float there is."""
    put = partial(jax.tree.map, jnp.asarray)
    support, query = (Examples(*part) for part in tasks(problem))
    return MetaParams(put(weights(problem)), {}), put(Task(support, query))


def gradient(problem: Problem) -> dict[str, dict[str, np.ndarray]]:
    """The meta-gradient in float64, for comparison."""
    with jax.enable_x64(True):
        step = jax.jit(partial(meta.meta_gradient, method(problem._replace(dtype=None))))
        grads, _ = step(jax.random.key(0), *arrays(problem))
        return jax.tree.map(np.asarray, grads.net)


def compiled(f: Callable[..., Any], *args: Any) -> Contender:
    """`f(*args)` as a contender."""
    begin = time.perf_counter()
    program = jax.jit(f).lower(*args).compile()
    seconds = time.perf_counter() - begin
    memory = program.memory_analysis()
    size = None if memory is None else memory.temp_size_in_bytes
    return Contender(lambda: jax.block_until_ready(program(*args)), seconds, size)


def contender(problem: Problem) -> Contender:
    """A meta-step with Adam, in float32 or what the problem says."""
    params, batch = arrays(problem)
    made, place = method(problem), lambda tree: tree
    count = problem.devices or math.gcd(problem.tasks, jax.device_count())
    if count > 1:
        mesh = sharding.mesh(jax.devices()[:count])
        made, place = sharding.sharded(mesh)(made), partial(sharding.replicate, mesh=mesh)
    train = trainer(made, optax.adam(OUTER_LR))
    state = jax.jit(train.init)(jax.random.key(0))._replace(params=params)
    return compiled(train.step, *place((jax.random.key(1), state, batch)))


def sweep(problem: Problem) -> Mapping[str, Contender]:
    """A meta-step of every configuration, batched and one after another."""
    params, batch = arrays(problem)
    rates = LR * (1 + jnp.arange(problem.configurations) / problem.configurations)
    keys = jax.random.split(jax.random.key(1), problem.configurations)
    start = jax.jit(trainer(method(problem), optax.adam(OUTER_LR)).init)(jax.random.key(0))
    start = start._replace(params=params)

    def step(key: Array, state: State, rate: Array):
        return trainer(method(problem, rate), optax.adam(OUTER_LR)).step(key, state, batch)

    states = jax.tree.map(lambda leaf: jnp.stack([leaf] * problem.configurations), start)
    together = compiled(jax.vmap(step), keys, states, rates)
    one = compiled(step, keys[0], start, rates[0])

    def in_turn():
        for _ in rates:
            one.step()

    return {"ours": together, "ours, one by one": one._replace(step=in_turn)}


def matmul_rate(size: int = 2048, repeats: int = 5) -> float:
    """Operations per second of a float32 product of square matrices, the best of some."""
    x = jnp.ones((size, size))
    product = compiled(jnp.matmul, x, x).step
    product()
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        product()
        times.append(time.perf_counter() - begin)
    return 2 * size**3 / min(times)
