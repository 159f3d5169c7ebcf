"""Training that is judged on its way, for the figures that show it."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from experiments import cli, runs, scoring
from experiments.figures.figure import Rows
from experiments.seeds import train
from mgaug_jax import evaluate, losses
from mgaug_jax.types import Array, Task

FLAGS = flags.FLAGS
flags.DEFINE_integer("points", 8, "Points of training at which is looked.")
flags.DEFINE_integer("episodes", 100, "Tasks of every kind that a score is the mean of.")


def history(made: runs.Setup, label: str, split: str) -> Rows:
    """Seed, step, and loss and accuracy on training tasks and on those of `split`.

    Raises:
      BadInput: The problem has no classes, or a number makes no sense.
    """
    if made.metric != "accuracy":
        raise cli.BadInput("--data=sinusoid has no accuracy; take a data set with classes.")
    if FLAGS.episodes < 1 or not 1 <= FLAGS.points <= FLAGS.steps:
        raise cli.BadInput("--episodes must be 1 or more, and --points from 1 to --steps.")

    change = made.method(jnp.zeros((), jnp.int32)).augment

    def seen(key: Array, data: Any) -> Task:
        """A task as training sees it, in a batch of one."""
        k_sample, k_change = jax.random.split(key)
        task = jax.tree.map(lambda leaf: leaf[:1], made.sample(k_sample, data))
        return task if change is None else jax.vmap(change)(k_change[None], task)

    def both(outputs: Array, y: Array) -> Array:
        return jnp.stack([losses.cross_entropy(outputs, y), losses.accuracy(outputs, y)])

    judges = [
        jax.jit(partial(evaluate, made.tested, sample=sample, episodes=FLAGS.episodes, score=both))
        for sample in (seen, made.episode)
    ]
    data = [made.splits["train"], made.splits[split]]
    names = [f"{part}_{what}" for part in ("train", split) for what in ("loss_nats", "accuracy")]
    rows: Rows = []

    def look(values, params, done: int):
        for seed in range(FLAGS.seeds):
            mine = jax.tree.map(lambda leaf, s=seed: leaf[s], params)
            key = scoring.episode_key(scoring.VALIDATION_SEED)
            found = [
                np.asarray(judge(key, mine, data=part).adapted).mean(0)
                for judge, part in zip(judges, data, strict=True)
            ]
            values_of = dict(zip(names, np.ravel(found).tolist(), strict=True))
            rows.append({"seed": seed, "step": done, **values_of})
        return values

    states, _ = train(made, FLAGS.seeds, label, adjust=look, every=-(-FLAGS.steps // FLAGS.points))
    look(None, states.params, FLAGS.steps)
    return rows
