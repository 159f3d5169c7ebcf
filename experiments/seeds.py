"""Specs with alternatives, one method trained from several seeds, and intervals over seeds."""

import itertools
import re
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments import runs, scoring
from experiments.cli import BadInput, NotFinite
from experiments.progress import Progress
from mgaug_jax import loops, meta
from mgaug_jax.nets.lowering import map_tasks
from mgaug_jax.types import Array, MetaParams, Modifier

CHUNK, POINTS = 50, 200
COLUMNS = ("adapted", "step0", "label_memory", "train_loss")


def train(
    made: runs.Setup,
    seeds: int,
    label: str,
    *,
    values: Any = None,
    change: Callable[[Any], Modifier] = lambda value: lambda method: method,
    adjust: Callable[[Any, MetaParams, int], Any] = lambda values, params, done: values,
    every: int = CHUNK,
) -> tuple[meta.State, np.ndarray]:
    """States after `config.steps` and losses, leading axis `seeds`; one program for all seeds.

    Args:
      made: The setup.
      seeds: How many: 0, 1, ...
      label: What the progress line says.
      values: A number, or a tree of them, for every seed, leading axis `seeds`.
      change: What the number of a seed makes of the method; it is traced.
      adjust: `(values, meta-parameters, steps done) -> values`, after every `every` steps.
      every: See `adjust`.

    Raises:
      NotFinite: A loss is not.
    """
    steps = made.config.steps
    states, keys = begin(made, seeds)
    method = made.method(jnp.zeros((), jnp.int32))

    @partial(jax.jit, static_argnames="count", donate_argnames="states")
    def chunk(keys: Array, states: meta.State, values: Any, data: Any, count: int):
        def one(key: Array, state: meta.State, value: Any):
            trainer = runs.trainer(made.config, lambda step: change(value)(made.method(step)))
            return loops.run(trainer, made.sample, key, state, data, count)

        return map_tasks(method.net, one, keys, states, values)

    progress = Progress(label, steps, unit="steps")
    losses = []
    for done in range(0, steps, every):
        if done:
            values = adjust(values, states.params, done)
        count = min(every, steps - done)
        states, info = chunk(keys, states, values, made.splits["train"], count)
        losses.append(jax.device_get(info["query_loss"]))
        check_finite(made, losses[-1], done)
        progress.at(done + count, f"loss {losses[-1].mean():.3f}")
    progress.close()
    return states, np.concatenate(losses, axis=1)


def check_finite(made: runs.Setup, losses: np.ndarray, first: int) -> None:
    """Refuses losses `[seeds, steps]` that are not finite, those of the steps from `first` on.

    Raises:
      NotFinite: Some are not.
    """
    bad = np.argwhere(~np.isfinite(losses.T))
    if bad.size:
        step, seed = bad[0]
        raise NotFinite(
            f"{made.config.method}: the loss of step {first + step} with seed {seed} is not "
            "finite. Lower a learning rate, or the noise."
        )


def measured(
    made: runs.Setup, states: meta.State, losses: np.ndarray, episodes: int
) -> dict[str, list[float]]:
    """What a table shows of trained seeds: a list over seeds for each of `COLUMNS`, and `curve`.

    Raises:
      NotFinite: A score is not.
    """
    judge, memory = scoring.evaluator(made), scoring.label_memory(made)
    found: dict[str, list[float]] = {name: [] for name in COLUMNS}
    for seed in range(len(losses)):
        params = jax.tree.map(lambda leaf, s=seed: leaf[s], states.params)
        scores = judge(params, made.splits["test"], scoring.TEST_SEED, episodes)
        found["adapted"].append(float(scores.adapted.mean()))
        found["step0"].append(float(scores.initial.mean()))
        if made.permuted is not None:
            found["label_memory"].append(float(memory(params).mean()))
    found["train_loss"] = losses[:, -len(losses[0]) // 10 :].mean(1).tolist()
    if not all(np.isfinite(values).all() for values in found.values()):
        raise NotFinite(
            f"{made.config.method}: after {made.config.steps} steps the test is not finite. Lower "
            "a learning rate, or the noise."
        )
    parts = np.array_split(losses.mean(0), min(POINTS, losses.shape[1]))
    return {**found, "curve": [float(part.mean()) for part in parts]}


def begin(made: runs.Setup, seeds: int) -> tuple[meta.State, Array]:
    """Initial states and training keys of the seeds, as `experiments.train` has them."""
    pairs = [runs.keys(seed) for seed in range(seeds)]
    inits, trains = (jnp.stack(keys) for keys in zip(*pairs, strict=True))
    return jax.jit(jax.vmap(made.trainer.init))(inits), trains


def over_seeds(values: Sequence[float]) -> tuple[float, float]:
    """Mean and half width of its 95 % interval (Student's t); NaN for one seed."""
    from scipy.stats import t

    n = len(values)
    if n < 2:
        return float(np.mean(values)), float("nan")
    half = t.ppf(0.975, n - 1) * np.std(values, ddof=1) / n**0.5
    return float(np.mean(values)), float(half)


def expand(text: str) -> list[str]:
    """The specs of `a; b|noise({1,2})`, in order and without repeats.

    Raises:
      BadInput: There is none.
    """
    specs: dict[str, None] = {}
    for one in filter(None, (part.strip() for part in text.split(";"))):
        parts = re.split(r"\{([^{}]*)\}", one)
        choices = [part.split(",") if i % 2 else [part] for i, part in enumerate(parts)]
        specs |= dict.fromkeys("".join(choice).strip() for choice in itertools.product(*choices))
    if not specs:
        raise BadInput("--methods names no method.")
    return list(specs)
