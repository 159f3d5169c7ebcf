"""This library's side of `experiments.benchmark`."""

import math
import time
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.bench.workloads import HIDDEN, LR, OUTER_LR, Problem, tasks, weights
from mgaug_jax import (
    fomaml,
    loops,
    maml,
    meta,
    modifiers,
    nets,
    photo,
    protonet,
    pruning,
    sampler,
    sharding,
    trainer,
)
from mgaug_jax.episodes import Images
from mgaug_jax.losses import cross_entropy, squared_error
from mgaug_jax.memory import temporaries
from mgaug_jax.meta import State
from mgaug_jax.nets.lowering import chosen, map_tasks
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


def method(problem: Problem, lr: float | Array = LR, how: nets.Lowering | None = None) -> Method:
    """The method of a problem; its sub-networks keep what the problem says, no random share."""
    if problem.image is None:
        net = nets.mlp(HIDDEN)
    else:
        way = None if problem.algorithm == "protonet" else problem.way
        dtype = jnp.dtype(problem.dtype) if problem.dtype else None
        how = chosen()._replace(native=True) if problem.native else how
        options = {"image": problem.image, "dtype": dtype, "lowering": how}
        make = {0: partial(nets.conv4, width=problem.width), 1: nets.resnet10, 2: nets.resnet18}
        net = make[problem.blocks](way, **options)
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


def gradient(problem: Problem) -> dict[str, Any]:
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
    step = lambda: jax.block_until_ready(program(*args))
    return Contender(step, seconds, temporaries(program))


def step(problem: Problem, how: nets.Lowering | None = None) -> tuple[Callable, tuple]:
    """A meta-step with Adam, in float32 or what the problem says, and its arguments."""
    params, batch = arrays(problem)
    made, place = method(problem, how=how), lambda tree: tree
    count = problem.devices or math.gcd(problem.tasks, jax.device_count())
    if count > 1:
        mesh = sharding.mesh(jax.devices()[:count])
        made, place = sharding.sharded(mesh)(made), partial(sharding.replicate, mesh=mesh)
    state = begin(problem, params)
    return trainer(made, optax.adam(OUTER_LR)).step, place((jax.random.key(1), state, batch))


def contender(problem: Problem) -> Contender:
    """A meta-step, compiled."""
    f, args = step(problem)
    return compiled(f, *args)


def begin(problem: Problem, params: MetaParams) -> State:
    """The trainer's state with given parameters."""
    start = jax.jit(trainer(method(problem), optax.adam(OUTER_LR)).init)(jax.random.key(0))
    return start._replace(params=params)


def one_of(problem: Problem, batch: Task, key: Array, state: State, rate: Array):
    """A meta-step of the configuration of an inner rate."""
    return trainer(method(problem, rate), optax.adam(OUTER_LR)).step(key, state, batch)


def together(problem: Problem) -> Contender:
    """A meta-step of every configuration in one program, as a sweep maps them."""
    params, batch = arrays(problem)
    count = problem.configurations
    rates = LR * (1 + jnp.arange(count) / count)
    keys = jax.random.split(jax.random.key(1), count)
    states = jax.tree.map(lambda leaf: jnp.stack([leaf] * count), begin(problem, params))
    step = lambda *args: map_tasks(method(problem).net, partial(one_of, problem, batch), *args)
    return compiled(step, keys, states, rates)


def in_turn(problem: Problem) -> Contender:
    """A meta-step of every configuration, one after another."""
    params, batch = arrays(problem)
    args = jax.random.key(1), begin(problem, params), jnp.full((), LR)
    return repeated(compiled(partial(one_of, problem, batch), *args), problem.configurations)


def repeated(one: Contender, count: int) -> Contender:
    def step() -> None:
        for _ in range(count):
            one.step()

    return one._replace(step=step)


def chunks(problem: Problem) -> dict[str, Callable[[], Contender]]:
    """`problem.chunk` meta-steps on tasks that are drawn and augmented: as one program, as training
    has them; as a program each, waited for; and what of it is drawing, with augmenting and without.
    """
    assert problem.image is not None
    params, _ = arrays(problem)
    state, count = begin(problem, params), problem.chunk
    mean, std = jnp.full(problem.image[-1], 0.5), jnp.full(problem.image[-1], 0.25)
    each = problem.shot + problem.queries
    pixels = np.random.default_rng(2).integers(
        0, 256, (4 * problem.way, each, *problem.image), np.uint8
    )
    data = Images(jnp.asarray(pixels), jnp.full(len(pixels), each), mean, std)
    sample = sampler(problem.way, problem.shot, problem.queries, problem.tasks)
    made = photo.photo_augment(mean, std)(method(problem))
    assert made.augment is not None
    augment = jax.vmap(made.augment)
    advance = partial(loops.advance, trainer(made, optax.adam(OUTER_LR)), sample)
    args = jax.random.key(1), state, data

    def draw(change: Callable[[Array, Task], Task], key: Array, data: Images) -> Array:
        def body(total: Array, i: Array):
            k_sample, k_change = jax.random.split(jax.random.fold_in(key, i))
            tasks = change(k_change, sample(k_sample, data))
            return total + tasks.support.x.sum() + tasks.query.x.sum(), None

        return jax.lax.scan(body, jnp.zeros(()), jnp.arange(count))[0]

    both = lambda key, tasks: augment(meta.task_keys(key, tasks), tasks)
    neither = lambda key, tasks: tasks
    one = lambda: compiled(partial(advance, capacity=1), *args, 1)
    return {
        "ours": lambda: compiled(partial(advance, capacity=count), *args, count),
        "ours, each step": lambda: repeated(one(), count),
        "ours, drawing": lambda: compiled(partial(draw, neither), args[0], data),
        "ours, augmenting": lambda: compiled(partial(draw, both), args[0], data),
    }


def sides(problem: Problem) -> dict[str, Callable[[], Contender]]:
    """What makes all that is timed of this library in a workload, first what the others are
    compared to.
    """
    if problem.configurations:
        return {"ours": partial(together, problem), "ours, one by one": partial(in_turn, problem)}
    if problem.chunk:
        return chunks(problem)
    made = {"ours": partial(contender, problem)}
    if problem.dtype is not None:
        made["ours, float32"] = partial(contender, problem._replace(dtype=None))
    return made


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
