"""What a run is made of: its configuration, its data and its method.

All entry points share this; it holds no flags.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from experiments import spec, vocabulary
from experiments.cli import BadInput
from mgaug_jax import meta, sharding
from mgaug_jax.data import streaming
from mgaug_jax.modifiers import compose
from mgaug_jax.types import Array, MetaParams, Method, Modifier, Task

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
    test_rotations: bool = False

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


def with_method(made: Setup, text: str) -> Setup:
    """The same problem and data with the method of another spec.

    Raises:
      BadInput: As `setup`.
    """
    try:
        return traced(with_numbers(made, text, {}))
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
    return made._replace(config=config, **of_spec(config, made.problem, numbers))


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


def traced(made: Setup) -> Setup:
    """The setup, after one abstract step, which finds what only shows when the parts meet."""
    state = jax.eval_shape(made.trainer.init, jax.random.key(0))
    train = made.splits["train"]
    data = streaming.shapes(train) if isinstance(train, streaming.Stored) else train
    tasks = jax.eval_shape(made.sample, jax.random.key(0), data)
    jax.eval_shape(made.trainer.step, jax.random.key(0), state, tasks)
    return made


def of_spec(
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
