"""What a run is made of: its configuration, its data and its method.

All entry points share this; it holds no flags.
"""

import dataclasses
import math
import os
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from experiments import spec, vocabulary
from experiments.cli import BadInput
from experiments.progress import Watch
from mgaug_jax import data, episodes, losses, meta, sharding
from mgaug_jax.data import sinusoid, streaming
from mgaug_jax.modifiers import compose
from mgaug_jax.types import Array, MetaParams, Method, Modifier, Task

TEST_QUERIES = 15
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
SHARE = 0.25
"""Of the device's memory, which images may take before they stay on disk."""


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
      splits: "train", "val", "test" -> data; images on the device, or `streaming.Stored`.
      problem: What the data ask of a method.
      digests: Split -> hash of its classes and pixels.
      metric: "accuracy", or "mse" for regression.
      permuted: `(key, training task) -> task` whose labels (or whatever names the task) are
        permuted, for the label-memory diagnostic; None where nothing can be memorised by name.
      mesh: Devices that the tasks are spread over.
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
    mesh: Mesh | None = None


def setup(
    config: Config, say: Callable[[str], None] = lambda text: None, stream: str = "no"
) -> Setup:
    """Loads the data and builds the method, refusing what cannot work before anything compiles.

    With `stream` "yes" images stay on disk, with "auto" if they are larger than `SHARE` of the
    memory; what is computed is the same.

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
        if config.data == SINUSOID:
            return _traced(_regression(config))
        return _traced(_classification(config, say, stream))
    except BadInput:
        raise
    except (ValueError, TypeError, ArithmeticError, OSError) as error:
        raise BadInput(str(error)) from error


def with_method(made: Setup, text: str) -> Setup:
    """The same problem and data with the method of another spec.

    Raises:
      BadInput: As `setup`.
    """
    try:
        return _traced(with_numbers(made, text, {}))
    except (ValueError, TypeError, ArithmeticError) as error:
        raise BadInput(f"{text}: {error}") from error


def with_numbers(made: Setup, text: str, numbers: dict[str, Any]) -> Setup:
    """The same with the method of a spec in which names stand for `numbers`, which may be traced;
    that of `outer_lr` is the outer learning rate. Not checked by a step.

    Raises:
      BadInput: The spec makes no sense.
    """
    rate = numbers.get("outer_lr", made.config.outer_lr)
    config = dataclasses.replace(made.config, method=text, outer_lr=rate)
    return made._replace(config=config, **_method(config, made.problem, numbers))


def on_devices(made: Setup, mesh: Mesh | None, *how: Modifier) -> Setup:
    """The same with its tasks spread over `mesh`, and the modifiers that say how it is computed."""

    def spread(method: Method) -> Method:
        return compose(*how)(method if mesh is None else sharding.sharded(mesh)(method))

    at, tested = lambda step: spread(made.method(step)), spread(made.tested)
    other = made._replace(method=at, tested=tested, trainer=trainer(made.config, at), mesh=mesh)
    placed = {
        name: split if isinstance(split, streaming.Stored) else put(other, split)
        for name, split in made.splits.items()
    }
    return other._replace(splits=placed)


def wide(tree: Any) -> Any:
    """Floats as float64 where JAX_ENABLE_X64 says so."""
    floating = lambda leaf: jnp.issubdtype(leaf.dtype, jnp.floating)
    return jax.tree.map(lambda leaf: leaf.astype(float) if floating(leaf) else leaf, tree)


def put(made: Setup, tree: Any) -> Any:
    """Arrays where the setup computes."""
    return tree if made.mesh is None else sharding.replicate(tree, made.mesh)


def compiled(made: Setup, f: Callable, **options: Any) -> Callable:
    """`f` under jit, its results on all devices of the setup."""
    if made.mesh is None:
        return jax.jit(f, **options)
    return jax.jit(f, out_shardings=sharding.replicated(made.mesh), **options)


def _traced(made: Setup) -> Setup:
    """The setup, after one abstract step, which finds what only shows when the parts meet."""
    state = jax.eval_shape(made.trainer.init, jax.random.key(0))
    train = made.splits["train"]
    data = streaming.shapes(train) if isinstance(train, streaming.Stored) else train
    tasks = jax.eval_shape(made.sample, jax.random.key(0), data)
    jax.eval_shape(made.trainer.step, jax.random.key(0), state, tasks)
    return made


def _classification(config: Config, say, stream: str) -> Setup:
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
    stored = {
        name: data.on_disk(config.data, name, progress=Watch(say), **options) for name in names
    }
    if config.rotations:
        stored["train"] = streaming.turned(stored["train"])
    splits = placed(stored, stream, say)
    episodes.check(splits["train"], config.way, config.shot, config.queries, "the train split")
    episode = _episode(config, {name: splits[name] for name in ("val", "test")})
    digests = {name: data.describe(config.data, name, **options).digest for name in names}
    train = splits["train"]
    made = for_images(config, train.pixels.shape[2:], train.mean, train.std)
    return made._replace(sample=sample, episode=episode, splits=splits, digests=digests)


def _episode(config: Config, splits: dict[str, Any]) -> Callable[[Array, Any], Task]:
    """The sampler of tests, which these splits must be able to serve."""
    shot = config.test_shot or config.shot
    for name, images in splits.items():
        episodes.check(images, config.way, shot, config.test_queries or 1, f"the {name} split")
    fewest = min(int(images.counts.min()) for images in splits.values())
    queries = config.test_queries or min(TEST_QUERIES, fewest - shot)
    return episodes.sampler(config.way, shot, queries, 1, TEST_LABELS[config.test_labels])


def on_other(config: Config, name: str, options: dict[str, Any], say, stream: str) -> Setup:
    """The method of a run with the test split of another data set, its images resized, coloured and
    normalised as the run's own, of which none are read.

    Args:
      config: Of the run.
      name: Of the other data set.
      options: Of `data.on_disk`, but `size`, which is the run's.
      say: Is told what is done.
      stream: As in `setup`.

    Raises:
      BadInput: It cannot be.
    """
    if SINUSOID in (config.data, name):
        raise BadInput(f"a run on {config.data} cannot be tested on {name}: one has no images.")
    options = options | {"size": config.image_size, "like": config.data}
    try:
        stored = data.on_disk(name, "test", progress=Watch(say), **options)
        episode = _episode(config, {"test": stored})
        digest = data.describe(name, "test", **options).digest
        made = for_images(config, stored.pixels.shape[2:], stored.mean, stored.std)
    except (ValueError, OSError) as error:
        raise BadInput(str(error)) from error
    return made._replace(
        config=dataclasses.replace(config, data=name),
        episode=episode,
        splits=placed({"test": stored}, stream, say),
        digests={"test": digest},
        permuted=None,
    )


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


def placed(stored: dict[str, streaming.Stored], stream: str, say) -> dict[str, Any]:
    """The splits on the device, or as they are, on disk; see `setup`."""
    size, memory = sum(map(streaming.nbytes, stored.values())), device_memory()
    if stream == "yes" or (stream == "auto" and memory and size > SHARE * memory):
        say(f"the images, {size / 1e9:.2g} GB, stay on disk")
        return dict(stored)
    return {name: streaming.on_device(images) for name, images in stored.items()}


def device_memory() -> int | None:
    """Bytes of the device's memory, for a CPU the machine's; None if it does not say."""
    stats = jax.local_devices()[0].memory_stats() or {}
    if "bytes_limit" in stats:
        return stats["bytes_limit"]
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):  # Windows
        return None


def _regression(config: Config) -> Setup:
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


def _method(
    config: Config, problem: vocabulary.Problem, numbers: dict[str, Any] | None = None
) -> dict[str, Any]:
    method = spec.method(config.method, problem, numbers=numbers)
    if config.schedule != "constant" and spec.uses(config.method, "fresh_optimizer"):
        raise BadInput(
            f"--schedule={config.schedule} was asked for, but fresh_optimizer begins it anew at "
            "every step; leave one of them out."
        )
    tested = spec.method(config.method, problem, config.test_steps, numbers)
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
    init = lambda key: wide(made.trainer.init(key))
    state = compiled(made, init)(put(made, keys(made.config.seed)[0]))
    zero, none = put(made, (jnp.zeros((), jnp.int32), jnp.full((), jnp.nan)))
    return Saved(state, state.params, zero, none, zero)
