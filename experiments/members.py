"""The members of a sweep, settings times seeds: how many fit, their training, their judgement.

All entry points share this; it holds no flags.
"""

import math
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments import cli, runs, scoring
from experiments.progress import Progress
from mgaug_jax import checkpoint, sharding, sweeps
from mgaug_jax.evaluation import Scores, evaluate
from mgaug_jax.memory import taken, temporaries
from mgaug_jax.nets.lowering import map_size
from mgaug_jax.types import Array

SECONDS, SAVE_SECONDS = 2.0, 120.0
SHARED = 0
"""Seed of what all members of a sweep have in common."""
Point = dict[str, float]


class Program(NamedTuple):
    """A method's members, compiled; settings are arrays `[K]` by name.

    Attributes:
      steps: Of the run.
      least: So many settings, or a multiple, use every device.
      begin: `values -> members`.
      advance: `(values, members, step, count) -> (members, losses [K, S])`; the members given are
        used up.
      memory: `(values, members) -> (bytes, bytes of temporaries)` per device of `advance`.
      batched: Whether all members are computed together, and not one after another.
      judge: `(values, params, split, seed of episodes) -> scores [K, S, episodes]`, in NumPy.
    """

    steps: int
    least: int
    begin: Callable[[Any], sweeps.Members]
    advance: Callable[..., tuple[sweeps.Members, Array]]
    memory: Callable[[Any, sweeps.Members], tuple[int, int]]
    batched: bool
    judge: Callable[..., Scores]


def program(made: runs.Setup, text: str, point: Point, seeds: int, episodes: int) -> Program:
    """The program of a spec whose names stand for the numbers of a setting, of which `point` is
    one; over the devices of `made`.
    """
    alone = made._replace(mesh=None)
    at = lambda value: runs.with_numbers(alone, text, value)
    make = lambda value: at(value).trainer
    net = at(point).method(jnp.zeros((), jnp.int32)).net
    k_inits, k_trains = (jnp.stack(k) for k in zip(*map(runs.keys, range(seeds)), strict=True))

    def over_devices(f: Callable) -> Callable:
        return f if made.mesh is None else partial(sharding.spread, f, made.mesh)

    def chunk(whole, values, members):
        keys, data, step, count, shared = whole
        return sweeps.advance(
            make, net, made.sample, values, keys, members, data, step, count, shared
        )

    def judged(whole, values, params):
        key, data = whole

        def one(value, params):
            score = scoring.score_of(made.metric)
            numbers = jnp.arange(episodes)
            return evaluate(at(value).tested, key, params, made.episode, data, numbers, score)

        of_value = lambda both: jax.lax.map(partial(one, both[0]), both[1])
        return jax.lax.map(of_value, (values, params))

    begin = jax.jit(lambda values: runs.wide(sweeps.begin(make, net, values, k_inits)))
    advance = jax.jit(over_devices(chunk), donate_argnums=2)
    scores = jax.jit(over_devices(judged))

    def given(values, step: int, count: int):
        shared = jax.random.key(SHARED)
        whole = (k_trains, made.splits["train"], np.int32(step), np.int32(count), shared)
        return runs.put(made, (whole, values))

    def judge(values, params, split: str, seed: int) -> Scores:
        whole = scoring.episode_key(seed), made.splits[split]
        return jax.device_get(scores(*runs.put(made, (whole, values)), params))

    def memory(values, members) -> tuple[int, int]:
        compiled = advance.lower(*given(values, 0, 1), members).compile()
        return taken(compiled), temporaries(compiled)

    return Program(
        steps=made.config.steps,
        least=1 if made.mesh is None else made.mesh.size,
        begin=begin,
        advance=lambda values, members, step, count: advance(*given(values, step, count), members),
        memory=memory,
        batched=map_size(net) is None,
        judge=judge,
    )


def stacked(points: list[Point], size: int) -> dict[str, Array]:
    """`size` settings as arrays by name, the given ones over and over."""
    filled = [points[i % len(points)] for i in range(size)]
    return {name: jnp.array([point[name] for point in filled]) for name in filled[0]}


def groups(
    program: Program, points: list[Point], done: int, gigabytes: float, cache: float = math.inf
) -> Iterator[tuple[list[Point], dict[str, Array]]]:
    """The settings behind the first `done` in groups that fit the memory, by what the compiled
    program says it needs, each also as arrays of one size, so that all are one program.

    Args:
      program: Of the settings.
      points: All settings.
      done: How many to leave out.
      gigabytes: What a group may take per device.
      cache: Megabytes that the temporaries of batched members may take, of all devices together.
    """
    size = math.ceil(len(points) / program.least) * program.least
    while True:
        values = stacked(points, size)
        total, temporary = program.memory(values, program.begin(values))
        mega = f"{temporary / 1e6:.1f} MB of it temporaries"
        print(f"{size} settings at once: {total / 1e9:.3f} GB per device, {mega}", flush=True)
        held = 1e-6 * temporary * program.least / cache if program.batched else 0
        over = max(1e-9 * total / gigabytes, held)
        if over <= 1:
            break
        if size == program.least:
            if total > 1e9 * gigabytes:
                print(f"note: fewer cannot be, though --memory_gb={gigabytes} is less", flush=True)
            break
        fits = max(1, int(size / over / 1.05) // program.least) * program.least
        # as large as each other, since the last is filled
        count = math.ceil(len(points) / fits)
        size = math.ceil(len(points) / (count * program.least)) * program.least
    for first in range(done, len(points), size):
        group = points[first : first + size]
        yield group, stacked(group, size)


def train(
    program: Program, values: dict[str, Array], label: str, place: Path, stop: cli.Interruption
) -> tuple[sweeps.Members, Array]:
    """The members of a group after the last step, and their mean losses in the last tenth.

    Raises:
      Interrupted: `stop` was requested; they are saved in `place`.
      BadInput: What is saved there cannot be read.
    """
    steps = program.steps
    late = steps - max(1, steps // 10)
    members = program.begin(values)
    losses, step = jnp.zeros(members.stopped.shape), 0
    if checkpoint.steps(place):
        try:
            found = checkpoint.restore(place, (members, losses))
        except checkpoint.CheckpointError as error:
            raise cli.BadInput(f"{error}; remove {place} to begin its members anew.") from error
        (members, losses), step = found.tree, found.step
        members = jax.tree.map(jnp.array, members)
        print(f"resumed at step {step}")
    progress, size, saved = Progress(label, steps, step, "steps"), 1, time.monotonic()
    while step < steps:
        count = min(size, (late if step < late else steps) - step)
        before = time.monotonic()
        members, loss = program.advance(values, members, step, count)
        going = int((members.stopped < 0).sum())
        size = max(1, int(SECONDS / max(time.monotonic() - before, 1e-9) * count))
        step += count
        if step > late:
            losses = losses + loss * count / (steps - late)
        line = progress.at(step, f"{going} of {members.stopped.size} finite")
        if stop.requested or time.monotonic() - saved > SAVE_SECONDS:
            checkpoint.save(place, step, (members, losses), keep=1)
            saved = time.monotonic()
            print(f"{label}: {line}", flush=True)
        if stop.requested:
            progress.close()
            raise cli.Interrupted(f"saved at step {step}; the same command goes on.")
    progress.close()
    return members, losses
