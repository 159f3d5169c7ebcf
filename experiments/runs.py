"""What a run is made of: its configuration, its data, its method, its folder and its test.

`train`, `evaluate` and `compare` share this; it holds no flags.
"""

import dataclasses
import json
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import mgaug_jax
from experiments import spec
from experiments.cli import BadInput
from experiments.progress import Progress
from mgaug_jax import checkpoint, data, episodes, losses, meta, methods, nets
from mgaug_jax.data import sinusoid
from mgaug_jax.episodes import Images
from mgaug_jax.evaluation import Scores, evaluate, interval
from mgaug_jax.types import Array, MetaParams, Method, Task

TEST_EPISODES, TEST_QUERIES, TEST_SEED = 600, 15, 20
VALIDATION_EPISODES, VALIDATION_SEED = 100, 10
MEMORY_EPISODES, MEMORY_SEED = 200, 30
EPISODES_AT_ONCE = 50
LABELS = {
    "exclusive": episodes.mutually_exclusive,
    "fixed_labels": episodes.fixed_labels,
    "fixed_groups": episodes.fixed_groups,
}
SINUSOID = "sinusoid"


@dataclasses.dataclass(frozen=True)
class Config:
    """Everything that decides what a run computes; written to `config.json`."""

    method: str
    net: str
    data: str
    data_dir: str | None
    labels: str
    way: int
    shot: int
    queries: int
    tasks: int
    steps: int
    outer_lr: float
    eval_every: int
    seed: int


class Setup(NamedTuple):
    """A configuration brought to life.

    Attributes:
      config: It.
      method: `step -> Method`.
      trainer: Its trainer.
      sample: `(key, train) -> tasks`, the meta-batches of training.
      episode: `(key, split) -> task` in a batch of one, as validation and test draw it.
      splits: "train", "val", "test" -> data.
      digests: Split -> hash of its classes and pixels.
      metric: "accuracy", or "mse" for regression.
    """

    config: Config
    method: Callable[[Array], Method]
    trainer: meta.Trainer
    sample: Callable[[Array, Any], Task]
    episode: Callable[[Array, Any], Task]
    splits: dict[str, Any]
    digests: dict[str, str]
    metric: str


def setup(config: Config, say: Callable[[str], None] = lambda text: None) -> Setup:
    """Loads the data and builds the method, refusing what cannot work before anything compiles.

    Raises:
      BadInput: Any value that makes no sense, alone or together.
    """
    for name in ("steps", "tasks", "eval_every"):
        if getattr(config, name) < 1:
            raise BadInput(f"--{name}={getattr(config, name)} must be 1 or more.")
    if not 0 < config.outer_lr < math.inf:
        raise BadInput(f"--outer_lr={config.outer_lr} must be a positive number.")
    if config.labels not in LABELS:
        raise BadInput(f"--labels={config.labels} is none of {', '.join(LABELS)}.")
    try:
        build = _regression if config.data == SINUSOID else _classification
        made = build(config, say)
        # one abstract step finds what only shows when the parts meet
        state = jax.eval_shape(made.trainer.init, jax.random.key(0))
        tasks = jax.eval_shape(made.sample, jax.random.key(0), made.splits["train"])
        jax.eval_shape(made.trainer.step, jax.random.key(0), state, tasks)
    except BadInput:
        raise
    except (ValueError, OSError) as error:
        raise BadInput(str(error)) from error
    return made


def _classification(config: Config, say) -> Setup:
    names = ("train", "val", "test")
    sample = episodes.sampler(
        config.way, config.shot, config.queries, config.tasks, LABELS[config.labels]
    )
    load = partial(data.load, config.data, data_dir=config.data_dir, progress=say)
    splits = {name: load(name) for name in names}
    for name, images in splits.items():
        queries = config.queries if name == "train" else 1
        episodes.check(images, config.way, config.shot, queries, f"the {name} split")
    describe = partial(data.describe, config.data, data_dir=config.data_dir)
    digests = {name: describe(name).digest for name in names}
    fewest = min(int(splits[name].counts.min()) for name in ("val", "test"))
    queries = min(TEST_QUERIES, fewest - config.shot)
    episode = episodes.sampler(config.way, config.shot, queries, 1)
    net = spec.net(config.net or "conv4(width=32)", image=splits["train"].pixels.shape[2:])
    problem = spec.Problem(net, config.way, losses.cross_entropy)
    method, trainer = _method(config, problem)
    return Setup(config, method, trainer, sample, episode, splits, digests, "accuracy")


def _regression(config: Config, say) -> Setup:
    del say
    sample = sinusoid.sampler(config.shot, config.queries, config.tasks)
    episode = sinusoid.sampler(config.shot, 100, 1)
    net = spec.net(config.net or "mlp", inputs=1)
    method, trainer = _method(config, spec.Problem(net, None, losses.squared_error))
    splits = {"train": None, "val": None, "test": None}
    return Setup(config, method, trainer, sample, episode, splits, {}, "mse")


def _method(config: Config, problem: spec.Problem):
    method = spec.method(config.method, problem)
    return method, meta.trainer(method, optax.adam(config.outer_lr))


# --- randomness -----------------------------------------------------------------------------


def keys(seed: int) -> tuple[Array, Array]:
    """Keys of the initial parameters and of training; tests have seeds of their own."""
    k_init, k_train = jax.random.split(jax.random.key(seed))
    return k_init, k_train


# --- evaluation -----------------------------------------------------------------------------


def score_of(metric: str) -> Callable[[Array, Array], Array]:
    return losses.accuracy if metric == "accuracy" else losses.squared_error


def evaluator(made: Setup, method: Method | None = None, sample=None):
    """A compiled `(params, split data, seed, number of episodes, label) -> Scores` in NumPy."""
    method = method or made.method(jnp.zeros((), jnp.int32))

    @jax.jit
    def compiled(key: Array, params: MetaParams, split: Any, numbers: Array) -> Scores:
        draw = sample or made.episode
        return evaluate(method, key, params, draw, split, numbers, score_of(made.metric))

    def scores(params, split, seed: int, count: int, label: str = "") -> Scores:
        progress = Progress(label, count)
        chunk = min(count, EPISODES_AT_ONCE)
        parts = []
        for first in range(0, count, chunk):
            numbers = jnp.arange(first, first + chunk)
            parts.append(jax.device_get(compiled(jax.random.key(seed), params, split, numbers)))
            progress.at(min(first + chunk, count))
        progress.close()
        joined = jax.tree.map(lambda *leaves: np.concatenate(leaves)[:count], *parts)
        return Scores(*joined)

    return scores


def summary(scores: np.ndarray) -> dict[str, float]:
    """Mean, half width of the 95 % interval, std over episodes and their number."""
    mean, half_width, std, count = interval(jnp.asarray(scores))
    return {
        "mean": float(mean),
        "half_width": float(half_width),
        "std": float(std),
        "episodes": int(count),
    }


def measure(made: Setup, params: MetaParams, count: int, seed: int):
    """The test of a trained run: `(what was measured, per-episode scores by name)`.

    On the same episodes: after adaptation, before it (step 0), the untrained network, and, for
    images, the nearest class mean of raw pixels. On training classes: label memory.
    """
    judge = evaluator(made)
    split = made.splits["test"]
    trained = judge(params, split, seed, count, "test")
    blank = made.trainer.init(keys(made.config.seed)[0]).params
    untrained = judge(blank, split, seed, count, "test, untrained network")
    scores = {
        "adapted": trained.adapted,
        "step0": trained.initial,
        "untrained": untrained.adapted,
    }
    if made.metric == "accuracy":
        pixels = nets.from_functions(lambda key: {}, lambda params, x: x.reshape(len(x), -1))
        nearest = evaluator(made, methods.protonet(pixels))
        scores["pixels"] = nearest(MetaParams({}, {}), split, seed, count, "test, pixels").adapted
    found = {name: summary(values) for name, values in scores.items()}
    if made.metric == "accuracy":
        found["label_memory"] = label_memory(made, params)
    return found, scores


def label_memory(made: Setup, params: MetaParams) -> dict[str, float]:
    """Accuracy after adaptation on training tasks with their labels minus with permuted labels.

    The same tasks twice. Where classes keep their labels (NME) the difference is what the network
    answers from memory; where labels are drawn anew (ME) there is none to find.
    """

    def permuted(key: Array, split: Images) -> Task:
        k_sample, k_labels = jax.random.split(key)
        tasks = made.sample(k_sample, split)
        number = len(tasks.query.y)
        return jax.vmap(episodes.permute_labels)(jax.random.split(k_labels, number), tasks)

    def own(key: Array, split: Images) -> Task:
        return made.sample(jax.random.split(key)[0], split)

    own_scores, permuted_scores = (
        evaluator(made, sample=draw)(
            params, made.splits["train"], MEMORY_SEED, MEMORY_EPISODES, "label memory"
        ).adapted
        for draw in (own, permuted)
    )
    return summary(own_scores - permuted_scores)


def print_results(results: dict[str, Any]) -> None:
    """The table a run ends with."""
    labels = {
        "adapted": "after adaptation",
        "step0": "before adaptation (step 0)",
        "untrained": "untrained network, adapted",
        "pixels": "nearest class mean of raw pixels",
        "label_memory": "label memory on training classes",
    }
    episodes = results["adapted"]["episodes"]
    print(f"\ntest {results['metric']}, {episodes} episodes, mean and 95 % interval")
    for name, label in labels.items():
        if name in results:
            found = results[name]
            print(f"  {label:<34} {found['mean']:.4f} +- {found['half_width']:.4f}")
    if results["chance"]:
        print(f"  {'chance':<34} {results['chance']:.4f}")


# --- the run folder -------------------------------------------------------------------------


def read_config(folder: Path) -> Config:
    """The configuration of a run.

    Raises:
      BadInput: `folder` is not a run.
    """
    try:
        record = json.loads((folder / "config.json").read_text())
        return Config(**record["config"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BadInput(
            f"{folder} is not a run folder ({error}); give one that experiments.train wrote."
        ) from error


def write_json(path: Path, record: Any) -> None:
    """Writes a file whole or not at all."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(record, indent=2) + "\n")
    temporary.replace(path)


def versions() -> dict[str, str]:
    return {
        "mgaug_jax": mgaug_jax.__version__,
        "jax": jax.__version__,
        "backend": jax.default_backend(),
        "device": jax.devices()[0].device_kind,
    }


def save_episodes(folder: Path, scores: dict[str, np.ndarray], identity: dict[str, Any]) -> None:
    """Per-episode scores, with what decides which episodes they are of."""
    np.savez(folder / "episodes.npz", identity=np.array(json.dumps(identity)), **scores)


def episode_identity(made: Setup, count: int, seed: int) -> dict[str, Any]:
    """What must be equal for two runs to have been tested on the same episodes."""
    config = made.config
    return {
        "data": config.data,
        "split": made.digests.get("test"),
        "way": config.way if made.metric == "accuracy" else None,
        "shot": config.shot,
        "episodes": count,
        "seed": seed,
        "metric": made.metric,
    }


def best_params(made: Setup, folder: Path) -> tuple[int, MetaParams]:
    """Step and parameters of the best validation.

    Raises:
      BadInput: The run has saved none yet.
    """
    like = jax.eval_shape(made.trainer.init, jax.random.key(0)).params
    try:
        return checkpoint.restore(folder / "best", like)
    except checkpoint.CheckpointError as error:
        raise BadInput(f"{folder} has no trained parameters to test: {error}") from error
