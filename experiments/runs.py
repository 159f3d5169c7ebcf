"""What a run is made of: its configuration, its data, its method and its test.

All entry points share this; it holds no flags.
"""

import dataclasses
import hashlib
import math
import zlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments import spec, vocabulary
from experiments.cli import BadInput
from experiments.progress import Progress, Watch
from mgaug_jax import data, episodes, losses, meta, methods, nets
from mgaug_jax.data import sinusoid
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
TEST_LABELS = {
    "exclusive": episodes.mutually_exclusive,
    "shuffled_groups": episodes.shuffled_groups,
}
SCHEDULES = {
    "constant": lambda rate, steps: rate,
    "cosine": lambda rate, steps: optax.cosine_decay_schedule(rate, steps),
}
SINUSOID = "sinusoid"


@dataclasses.dataclass(frozen=True)
class Config:
    """Everything that decides what a run computes; written to `config.json`."""

    method: str
    net: str | None
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
    schedule: str = "constant"
    rotations: bool = False
    splits: str | None = None
    image_size: int | None = None
    skip_bad_images: int = 0
    test_shot: int | None = None
    test_queries: int | None = None
    test_steps: int | None = None
    test_labels: str = "exclusive"

    @property
    def task(self) -> str:
        """The problem in words."""
        if self.data == SINUSOID:
            return f"{self.data} {self.shot}-shot"
        return f"{self.data} {self.way}-way {self.shot}-shot"


class Setup(NamedTuple):
    """A configuration brought to life.

    Attributes:
      config: It.
      method: `step -> Method`.
      tested: The method as tests have it, with their number of inner steps.
      trainer: Its trainer.
      sample: `(key, train) -> tasks`, the meta-batches of training.
      episode: `(key, split) -> task` in a batch of one, as validation and test draw it.
      splits: "train", "val", "test" -> data.
      problem: What the data ask of a method.
      digests: Split -> hash of its classes and pixels.
      metric: "accuracy", or "mse" for regression.
      permuted: `(key, training task) -> task` whose labels (or whatever names the task) are
        permuted, for the label-memory diagnostic; None where nothing can be memorised by name.
    """

    config: Config
    method: Callable[[Array], Method]
    tested: Method
    trainer: meta.Trainer
    sample: Callable[[Array, Any], Task]
    episode: Callable[[Array, Any], Task]
    splits: dict[str, Any]
    problem: vocabulary.Problem
    digests: dict[str, str]
    metric: str
    permuted: Callable[[Array, Task], Task] | None


def setup(config: Config, say: Callable[[str], None] = lambda text: None) -> Setup:
    """Loads the data and builds the method, refusing what cannot work before anything compiles.

    Raises:
      BadInput: Any value that makes no sense, alone or together.
    """
    for name in ("steps", "tasks", "eval_every"):
        if getattr(config, name) < 1:
            raise BadInput(f"--{name}={getattr(config, name)} must be 1 or more.")
    for name in ("test_shot", "test_queries", "test_steps"):
        value = getattr(config, name)
        if value is not None and value < 1:
            raise BadInput(f"--{name}={value} must be 1 or more.")
    check_seed("seed", config.seed)
    if not 0 < config.outer_lr < math.inf:
        raise BadInput(f"--outer_lr={config.outer_lr} must be a positive number.")
    choices = (("labels", LABELS), ("test_labels", TEST_LABELS), ("schedule", SCHEDULES))
    for name, known in choices:
        if getattr(config, name) not in known:
            raise BadInput(f"--{name}={getattr(config, name)} is none of {', '.join(known)}.")
    try:
        build = _regression if config.data == SINUSOID else _classification
        return _traced(build(config, say))
    except BadInput:
        raise
    except (ValueError, TypeError, ArithmeticError, OSError) as error:
        raise BadInput(str(error)) from error


def with_method(made: Setup, text: str) -> Setup:
    """The same problem and data with the method of another spec.

    Raises:
      BadInput: As `setup`.
    """
    config = dataclasses.replace(made.config, method=text)
    other = made._replace(config=config, **_method(config, made.problem))
    try:
        return _traced(other)
    except (ValueError, TypeError, ArithmeticError) as error:
        raise BadInput(f"{text}: {error}") from error


def _traced(made: Setup) -> Setup:
    """The setup, after one abstract step, which finds what only shows when the parts meet."""
    state = jax.eval_shape(made.trainer.init, jax.random.key(0))
    tasks = jax.eval_shape(made.sample, jax.random.key(0), made.splits["train"])
    jax.eval_shape(made.trainer.step, jax.random.key(0), state, tasks)
    return made


def _classification(config: Config, say) -> Setup:
    names = ("train", "val", "test")
    sample = episodes.sampler(
        config.way, config.shot, config.queries, config.tasks, LABELS[config.labels]
    )
    options = {
        "data_dir": config.data_dir,
        "splits": config.splits,
        "size": config.image_size,
        "skip_bad_images": config.skip_bad_images,
    }
    splits = {name: data.load(config.data, name, progress=Watch(say), **options) for name in names}
    if config.rotations:
        splits["train"] = episodes.with_rotations(splits["train"])
    shot = config.test_shot or config.shot
    episodes.check(splits["train"], config.way, config.shot, config.queries, "the train split")
    for name in ("val", "test"):
        episodes.check(
            splits[name], config.way, shot, config.test_queries or 1, f"the {name} split"
        )
    digests = {name: data.describe(config.data, name, **options).digest for name in names}
    fewest = min(int(splits[name].counts.min()) for name in ("val", "test"))
    queries = config.test_queries or min(TEST_QUERIES, fewest - shot)
    episode = episodes.sampler(config.way, shot, queries, 1, TEST_LABELS[config.test_labels])
    train = splits["train"]
    made = for_images(config, train.pixels.shape[2:], train.mean, train.std)
    return made._replace(sample=sample, episode=episode, splits=splits, digests=digests)


def for_images(config: Config, shape: tuple[int, ...], mean: Array, std: Array) -> Setup:
    """The method of a configuration for images of one shape, without data to draw tasks from.

    Raises:
      BadInput: A spec makes no sense.
    """
    net = spec.net(config.net or "conv4(width=32)", image=shape)
    problem = vocabulary.Problem(net, config.way, losses.cross_entropy, config.steps, (mean, std))

    def nothing(key: Array, split: Any) -> Task:
        raise ValueError("There are no data to draw a task from.")

    return Setup(
        config=config,
        **_method(config, problem),
        sample=nothing,
        episode=nothing,
        splits={},
        problem=problem,
        digests={},
        metric="accuracy",
        permuted=episodes.permute_labels,
    )


def _regression(config: Config, say) -> Setup:
    del say
    splits: dict[str, Any] = {"train": None, "val": None, "test": None}
    shot, queries = config.test_shot or config.shot, config.test_queries or 100
    if config.test_labels != "exclusive":
        raise BadInput(f"--test_labels={config.test_labels} is for classes; leave it out.")
    if config.labels == "exclusive":
        sample = sinusoid.sampler(config.shot, config.queries, config.tasks)
        episode, inputs, permuted = sinusoid.sampler(shot, queries, 1), 1, None
    elif config.labels == "fixed_labels":
        sample = sinusoid.one_hot_sampler(config.shot, config.queries, config.tasks)
        episode = sinusoid.one_hot_test_sampler(shot, 1)
        inputs, permuted = 1 + sinusoid.AMPLITUDES, sinusoid.permute_index
    else:
        sample = sinusoid.interval_sampler(config.shot, config.queries, config.tasks)
        episode, inputs = sinusoid.interval_sampler(shot, queries, 1), 1
        permuted = sinusoid.move_targets
        splits = {name: jnp.array(numbers) for name, numbers in sinusoid.INTERVALS.items()}
    net = spec.net(config.net or "mlp", inputs=inputs)
    problem = vocabulary.Problem(net, None, losses.squared_error, config.steps)
    return Setup(
        config=config,
        **_method(config, problem),
        sample=sample,
        episode=episode,
        splits=splits,
        problem=problem,
        digests={},
        metric="mse",
        permuted=permuted,
    )


def _method(config: Config, problem: vocabulary.Problem) -> dict[str, Any]:
    method = spec.method(config.method, problem)
    if config.schedule != "constant" and spec.uses(config.method, "fresh_optimizer"):
        raise BadInput(
            f"--schedule={config.schedule} was asked for, but fresh_optimizer begins it anew at "
            "every step; leave one of them out."
        )
    tested = spec.method(config.method, problem, steps=config.test_steps)
    return {
        "method": method,
        "tested": tested(jnp.zeros((), jnp.int32)),
        "trainer": trainer(config, method),
    }


def trainer(config: Config, method: Callable[[Array], Method]) -> meta.Trainer:
    """The trainer of a method with the outer optimiser of the configuration."""
    rate = SCHEDULES[config.schedule](config.outer_lr, config.steps)
    return meta.trainer(method, optax.adam(rate))


# --- randomness -----------------------------------------------------------------------------


def check_seed(name: str, seed: int) -> None:
    """Refuses seeds that JAX would fold onto others."""
    if not 0 <= seed < 2**32:
        raise BadInput(f"--{name}={seed} must be from 0 to {2**32 - 1}.")


def keys(seed: int) -> tuple[Array, Array]:
    """Keys of the initial parameters and of training."""
    k_init, k_train = jax.random.split(jax.random.key(seed))
    return k_init, k_train


def episode_key(seed: int) -> Array:
    """Key of evaluation episodes, apart from those of training whatever the seeds."""
    return jax.random.fold_in(jax.random.key(seed), zlib.crc32(b"episodes"))


# --- evaluation -----------------------------------------------------------------------------


def score_of(metric: str) -> Callable[[Array, Array], Array]:
    return losses.accuracy if metric == "accuracy" else losses.squared_error


def evaluator(made: Setup, method: Method | None = None, sample=None):
    """A compiled `(params, split data, seed, number of episodes, label) -> Scores` in NumPy."""
    method = method or made.tested

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
            parts.append(jax.device_get(compiled(episode_key(seed), params, split, numbers)))
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


def measure(made: Setup, judge, params: MetaParams, count: int, seed: int):
    """The test of a trained run: `(what was measured, per-episode scores by name)`.

    On the same episodes: after adaptation, before it (step 0), the untrained network, and, for
    images, the nearest class mean of raw pixels. On training tasks: after and before adaptation,
    and label memory. `judge` is an `evaluator` of `made`.
    """
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
    if made.permuted is not None:
        own, gain = on_training(made)(params)
        found["train"], found["train_step0"] = summary(own.adapted), summary(own.initial)
        found["label_memory"] = summary(gain)
    return found, scores


def label_memory(made: Setup) -> Callable[..., np.ndarray]:
    """The gain of `on_training` alone."""
    measure = on_training(made)
    return lambda *arguments, **options: measure(*arguments, **options)[1]


def on_training(made: Setup) -> Callable[..., tuple[Scores, np.ndarray]]:
    """A compiled `(params, seed, count) -> (scores, gain per episode)` on training tasks. The gain,
    label memory, is accuracy after adaptation with their labels minus with permuted ones; for
    regression, squared error with permuted minus own.

    The same tasks twice. Where classes keep their labels (NME) the difference is what the network
    answers from memory; where labels are drawn anew (ME) there is none to find.
    """

    def permuted(key: Array, split: Any) -> Task:
        k_sample, k_labels = jax.random.split(key)
        tasks = made.sample(k_sample, split)
        number = len(tasks.query.y)
        return jax.vmap(made.permuted)(jax.random.split(k_labels, number), tasks)

    def own(key: Array, split: Any) -> Task:
        return made.sample(jax.random.split(key)[0], split)

    judges = [evaluator(made, sample=draw) for draw in (own, permuted)]

    def both(
        params: MetaParams, seed: int = MEMORY_SEED, count: int = MEMORY_EPISODES
    ) -> tuple[Scores, np.ndarray]:
        own, permuted = (
            judge(params, made.splits["train"], seed, count, "label memory") for judge in judges
        )
        difference = own.adapted - permuted.adapted
        return own, difference if made.metric == "accuracy" else -difference

    return both


def episode_identity(made: Setup, count: int, seed: int) -> dict[str, Any]:
    """What must be equal for two runs to have been tested on the same episodes."""
    config = made.config
    first = jax.random.fold_in(episode_key(seed), 0)
    drawn = jax.jit(made.episode)(jax.random.split(first)[0], made.splits["test"])
    return {
        "data": config.data,
        "split": made.digests.get("test"),
        "way": config.way if made.metric == "accuracy" else None,
        "shot": config.shot,
        "episodes": count,
        "seed": seed,
        "metric": made.metric,
        "first": hashlib.sha256(np.asarray(drawn.query.x).tobytes()).hexdigest(),
    }


def print_results(results: dict[str, Any]) -> None:
    """The table a run ends with."""
    labels = {
        "adapted": "after adaptation",
        "step0": "before adaptation (step 0)",
        "untrained": "untrained network, adapted",
        "pixels": "nearest class mean of raw pixels",
        "train": "training tasks, after adaptation",
        "train_step0": "training tasks, before adaptation",
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


# --- what a run is resumed from ---------------------------------------------------------------


class Saved(NamedTuple):
    """What a checkpoint holds: the state, and the best of validation so far.

    Attributes:
      state: Of the trainer.
      best: Meta-parameters.
      best_step: Their step.
      best_score: Their validation score; NaN before any was finite.
      skipped: Updates that were not finite and left out.
    """

    state: meta.State
    best: MetaParams
    best_step: Array
    best_score: Array
    skipped: Array


def begin(made: Setup) -> Saved:
    """What a run starts from."""
    state = jax.jit(made.trainer.init)(keys(made.config.seed)[0])
    zero = jnp.zeros((), jnp.int32)
    return Saved(state, state.params, zero, jnp.full((), jnp.nan), zero)
