"""Data and a configuration to what a run is made of: loads, checks, refuses before it compiles.

All entry points share this; it holds no flags.
"""

import dataclasses
import math
import os
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from experiments import runs, spec, vocabulary
from experiments.cli import BadInput
from experiments.progress import Watch
from experiments.runs import Config, Setup
from mgaug_jax import data, episodes, losses
from mgaug_jax.data import sinusoid, streaming
from mgaug_jax.types import Array, Task

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
SHARE = 0.25
"""Of the device's memory, which images may take before they stay on disk."""


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
    runs.check_seed("seed", config.seed)
    if not 0 < config.outer_lr < math.inf:
        raise BadInput(f"--outer_lr={config.outer_lr} must be a positive number.")
    choices = (("labels", LABELS), ("test_labels", TEST_LABELS), ("schedule", runs.SCHEDULES))
    for name, known in choices:
        if getattr(config, name) not in known:
            raise BadInput(f"--{name}={getattr(config, name)} is none of {', '.join(known)}.")
    try:
        if config.data == runs.SINUSOID:
            return runs.traced(_regression(config))
        return runs.traced(_classification(config, say, stream))
    except BadInput:
        raise
    except (ValueError, TypeError, ArithmeticError, OSError) as error:
        raise BadInput(str(error)) from error


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
    if runs.SINUSOID in (config.data, name):
        raise BadInput(f"a run on {config.data} cannot be tested on {name}: one has no images.")
    options = options | {"size": config.image_size, "like": config.data}
    try:
        stored, about = data.opened(name, "test", progress=Watch(say), **options)
        stored = streaming.turned(stored) if config.test_rotations else stored
        episode = _episode(config, {"test": stored})
        made = for_images(config, stored.pixels.shape[2:], stored.mean, stored.std)
    except (ValueError, OSError) as error:
        raise BadInput(str(error)) from error
    return made._replace(
        config=dataclasses.replace(config, data=name),
        episode=episode,
        splits=placed({"test": stored}, stream, say),
        digests={"test": about.digest},
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
        **runs.of_spec(config, problem),
        sample=nothing,
        episode=nothing,
        splits={},
        problem=problem,
        digests={},
        metric="accuracy",
        permuted=episodes.permute_labels,
    )


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
    opened = {
        name: data.opened(config.data, name, progress=Watch(say), **options) for name in names
    }
    stored = {name: images for name, (images, _) in opened.items()}
    for name in names:
        if config.rotations if name == "train" else config.test_rotations:
            stored[name] = streaming.turned(stored[name])
    splits = placed(stored, stream, say)
    episodes.check(splits["train"], config.way, config.shot, config.queries, "the train split")
    episode = _episode(config, {name: splits[name] for name in ("val", "test")})
    digests = {name: about.digest for name, (_, about) in opened.items()}
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
        **runs.of_spec(config, problem),
        sample=sample,
        episode=episode,
        splits=splits,
        problem=problem,
        digests={},
        metric="mse",
        permuted=permuted,
    )
