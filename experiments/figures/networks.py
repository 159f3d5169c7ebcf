"""The networks that a figure looks into, and the tasks it shows them."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
from absl import flags

from experiments import cli, loading, problem, runs, scoring, store
from experiments.figures import figure
from experiments.seeds import train
from mgaug_jax import behaviour
from mgaug_jax.nets.lowering import map_tasks
from mgaug_jax.types import MetaParams, Task

METHOD = "fomaml(lr=0.1,steps=5)|cp(keep=0.98)"
TASK_KEY = 60

FLAGS = flags.FLAGS
flags.adopt_module_key_flags(figure)
flags.DEFINE_list("run", [], "Folders of runs, one a seed. Default: trains networks of its own.")
flags.DEFINE_list("rates", ["0.001", "0.02", "0.1", "0.3"], "Pruning rates, in ascending order.")
flags.DEFINE_integer("count", 100, "Tasks that are looked at.")
flags.DEFINE_string("split", "train", "Split that they are drawn from: train, val or test.")


class Trained(NamedTuple):
    """A trained network: the seed, the setup and the meta-parameters."""

    seed: int
    made: runs.Setup
    params: MetaParams


def trained(folder: Path, homes: Sequence[str], labels: str | None = None) -> list[Trained]:
    """The networks of the run folders `homes`; without any, `--seeds` of our own, which are run
    folders below `folder`, and used again by a repeated command and by other figures.

    Raises:
      BadInput: A folder holds no run, or that of another configuration, or tasks have no classes.
    """
    if homes:
        return _given(homes)
    labels = labels or FLAGS.labels
    config = dataclasses.replace(problem.config(FLAGS.method, 0, FLAGS.steps), labels=labels)
    made = _of_classes(config)
    seeds = range(FLAGS.seeds)
    configs = [dataclasses.replace(config, seed=seed) for seed in seeds]
    own = [folder / f"network-{labels}-seed{seed}" for seed in seeds]
    for home, expected in zip(own, configs, strict=True):
        if (home / "config.json").exists() and store.read_config(home) != expected:
            raise cli.BadInput(f"{home} holds a network of other flags; choose another --out.")
        if (home / "config.json").exists():
            store.check_digests(home, made)
    if not all((home / "config.json").exists() for home in own):
        states, _ = train(made, FLAGS.seeds, f"networks, {labels}")
        for seed, home in enumerate(own):
            home.mkdir(exist_ok=True)
            state = jax.tree.map(lambda leaf, s=seed: leaf[s], states)
            nan = jnp.full((), jnp.nan)
            last = runs.Saved(state, state.params, state.step, nan, jnp.zeros((), jnp.int32))
            mine = made._replace(config=configs[seed])
            store.save(mine, home, last)
            store.write_config(home, mine)  # last: it says that the rest is there
    return [
        Trained(seed, made, store.restore(made, home).best)
        for seed, home in zip(seeds, own, strict=True)
    ]


def _of_classes(config: runs.Config) -> runs.Setup:
    made = loading.setup(config, say=print)
    if made.metric != "accuracy":
        raise cli.BadInput("this figure is of classes; take another --data than sinusoid.")
    return made


def _given(homes: Sequence[str]) -> list[Trained]:
    """The best networks, on validation, of run folders."""
    configs = [store.read_config(Path(home)) for home in homes]
    for home, config in zip(homes, configs, strict=True):
        if dataclasses.replace(config, seed=configs[0].seed) != configs[0]:
            raise cli.BadInput(f"{home} differs from {homes[0]} by more than its seed.")
    if len({config.seed for config in configs}) < len(configs):
        raise cli.BadInput(f"{', '.join(homes)} must be runs of different seeds.")
    made = _of_classes(configs[0])
    found = []
    for home, config in zip(homes, configs, strict=True):
        store.check_digests(Path(home), made)
        found.append(Trained(config.seed, made, store.restore(made, Path(home)).best))
    return found


def tasks(made: runs.Setup) -> Task:
    """The same tasks for every network: of the training split as in training, else as in tests.

    Raises:
      BadInput: There is no such split.
    """
    if FLAGS.count < 1:
        raise cli.BadInput(f"--count={FLAGS.count} must be 1 or more.")
    split = FLAGS.split
    if split not in made.splits:
        raise cli.BadInput(f"--split={split} is none of {', '.join(made.splits)}.")
    numbered = jax.vmap(jax.random.fold_in, (None, 0))
    keys = numbered(scoring.episode_key(TASK_KEY), jnp.arange(FLAGS.count))
    sample = made.sample if split == "train" else made.episode
    return scoring.drawn(sample, keys, made.splits[split])


def rates() -> list[float]:
    """The pruning rates of `--rates`.

    Raises:
      BadInput: One is no number above 0 and below 1.
    """
    try:
        found = [float(text) for text in FLAGS.rates]
    except ValueError as error:
        raise cli.BadInput(f"--rates={','.join(FLAGS.rates)} must be numbers.") from error
    if not found or not all(0 < rate < 1 for rate in found):
        raise cli.BadInput(f"--rates={','.join(FLAGS.rates)} must lie between 0 and 1.")
    return found


def mean_hat(method, pruner, params, tasks, keeps) -> behaviour.Hat:
    """The mean hat graph of tasks."""

    def one(i, task):
        return behaviour.hat(method, pruner, jax.random.key(i), params, task, keeps)

    found = map_tasks(method.net, one, jnp.arange(len(tasks.query.y)), tasks)
    return jax.tree.map(lambda leaf: jnp.mean(leaf, axis=0), found)
