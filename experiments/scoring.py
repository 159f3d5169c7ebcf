"""What a trained run is measured by: validation, test, label memory.

All entry points share this; it holds no flags.
"""

import hashlib
import zlib
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments import runs
from experiments.progress import Progress
from experiments.runs import Setup
from mgaug_jax import losses, methods, nets
from mgaug_jax.data import streaming
from mgaug_jax.evaluation import Scores, evaluate, interval
from mgaug_jax.types import Array, MetaParams, Method, Task

TEST_EPISODES, TEST_SEED = 600, 20
VALIDATION_EPISODES, VALIDATION_SEED = 100, 10
MEMORY_EPISODES, MEMORY_SEED = 200, 30
EPISODES_AT_ONCE = 50


def episode_key(seed: int) -> Array:
    """Key of evaluation episodes, apart from those of training whatever the seeds."""
    return jax.random.fold_in(jax.random.key(seed), zlib.crc32(b"episodes"))


def score_of(metric: str) -> Callable[[Array, Array], Array]:
    return losses.accuracy if metric == "accuracy" else losses.squared_error


@partial(jax.jit, static_argnums=0)
def drawn(sample, keys: Array, data: Any) -> Task:
    """One task for every key, leading axis of all."""
    return jax.lax.map(lambda key: jax.tree.map(lambda x: x[0], sample(key, data)), keys)


def evaluator(made: Setup, method: Method | None = None, sample=None):
    """A compiled `(params, split data, seed, number of episodes, label) -> Scores` in NumPy."""
    method, draw = method or made.tested, sample or made.episode

    def score(key: Array, params: MetaParams, data: Any, numbers: Array) -> Scores:
        drawn = streaming.either(draw)
        return evaluate(method, key, params, drawn, data, numbers, score_of(made.metric))

    compiled = runs.compiled(made, score)

    def scores(params, split, seed: int, count: int, label: str = "") -> Scores:
        progress, key = Progress(label, count), episode_key(seed)
        chunk, first, parts = min(count, EPISODES_AT_ONCE), 0, []
        with streaming.feed(draw, split, key, count, chunk) as at:
            while first < count:
                data, end = at(first)
                numbers = np.arange(first, min(first + chunk, end))
                given = runs.put(made, (key, data, numbers))
                parts.append(jax.device_get(compiled(given[0], params, *given[1:])))
                first += len(numbers)
                progress.at(min(first, count))
        progress.close()
        joined = jax.tree.map(lambda *leaves: np.concatenate(leaves)[:count], *parts)
        return Scores(*joined)

    return scores


class Judges(NamedTuple):
    """What a run is judged by.

    Attributes:
      test: An `evaluator` of the tests' tasks.
      training: `on_training`; None without training tasks, on another data set.
    """

    test: Callable[..., Scores]
    training: Callable[..., tuple[Scores, np.ndarray | None]] | None


def judges(made: Setup) -> Judges:
    """Those of a run; each compiles when it is first used."""
    return Judges(evaluator(made), on_training(made) if "train" in made.splits else None)


def validation(made: Setup, judges: Judges, params: MetaParams) -> dict[str, float]:
    """What is recorded of a state while it is trained: score and its interval on validation tasks,
    before adaptation too; on a few training tasks the same, and label memory where there is any.
    """
    scores = judges.test(params, made.splits["val"], VALIDATION_SEED, VALIDATION_EPISODES)
    of_all = summary(scores.adapted)
    found = {
        f"val_{made.metric}": of_all["mean"],
        "val_half_width": of_all["half_width"],
        "val_step0": float(scores.initial.mean()),
    }
    if judges.training is not None:
        own, gain = judges.training(params, MEMORY_SEED, min(MEMORY_EPISODES, EPISODES_AT_ONCE))
        found |= {
            f"train_{made.metric}": float(own.adapted.mean()),
            "train_step0": float(own.initial.mean()),
        }
        if gain is not None:
            found["label_memory"] = float(gain.mean())
    return found


def summary(scores: np.ndarray, z: float = 1.96, group: int = 1) -> dict[str, float]:
    """Mean, half width of the interval, std over episodes and their number, and with groups also
    that of their means; `interval` says what `z` and `group` are.
    """
    mean, half_width, std, count = interval(jnp.asarray(scores), z, group)
    found = {
        "mean": float(mean),
        "half_width": float(half_width),
        "std": float(jnp.std(jnp.asarray(scores))),
        "episodes": int(count),
    }
    return found if group == 1 else found | {"group_std": float(std)}


def measure(
    made: Setup,
    judges: Judges,
    params: MetaParams,
    count: int,
    seed: int,
    z: float = 1.96,
    group: int = 1,
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """The test of a trained run: `(what was measured, per-episode scores by name)`.

    On the same episodes: after adaptation, before it (step 0), the untrained network, and, for
    images, the nearest class mean of raw pixels. On training tasks: after and before adaptation,
    and label memory. `z` and `group` are those of `summary`.
    """
    judge = judges.test
    split = made.splits["test"]
    trained = judge(params, split, seed, count, "test")
    blank = runs.begin(made).best
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
    rows = dict(scores)
    if judges.training is not None:
        own, gain = judges.training(params)
        rows |= {"train": own.adapted, "train_step0": own.initial}
        if gain is not None:
            rows["label_memory"] = gain
    return {name: summary(values, z, group) for name, values in rows.items()}, scores


def label_memory(made: Setup) -> Callable[..., np.ndarray]:
    """The gain of `on_training` alone, of a setup that has one."""
    measure = on_training(made)

    def gain(*arguments: Any, **options: Any) -> np.ndarray:
        found = measure(*arguments, **options)[1]
        assert found is not None
        return found

    return gain


def on_training(made: Setup) -> Callable[..., tuple[Scores, np.ndarray | None]]:
    """A compiled `(params, seed, count) -> (scores, gain per episode)` on training tasks. The gain,
    label memory, is accuracy after adaptation with their labels minus with permuted ones; for
    regression, squared error with permuted minus own; None where nothing names a task (sinusoids
    of any amplitude and phase).

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

    draws = (own,) if made.permuted is None else (own, permuted)
    judges = [evaluator(made, sample=draw) for draw in draws]

    def both(
        params: MetaParams, seed: int = MEMORY_SEED, count: int = MEMORY_EPISODES
    ) -> tuple[Scores, np.ndarray | None]:
        own, *others = (
            judge(params, made.splits["train"], seed, count, "training tasks") for judge in judges
        )
        if not others:
            return own, None
        difference = own.adapted - others[0].adapted
        return own, difference if made.metric == "accuracy" else -difference

    return both


def episode_identity(made: Setup, count: int, seed: int) -> dict[str, Any]:
    """What must be equal for two runs to have been tested on the same episodes."""
    config, key = made.config, episode_key(seed)
    with streaming.feed(made.episode, made.splits["test"], key, 1, 1) as at:
        k_first = jax.random.split(jax.random.fold_in(key, 0))[0]
        draw = runs.compiled(made, streaming.either(made.episode))
        drawn = draw(*runs.put(made, (k_first, at(0)[0])))
    return {
        "data": config.data,
        "split": made.digests.get("test"),
        "way": config.way if made.metric == "accuracy" else None,
        "shot": config.test_shot or config.shot,
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
    spread = results.get("interval", "95 % interval")
    print(f"\ntest {results['metric']}, {episodes} episodes, mean and {spread}")
    for name, label in labels.items():
        if name in results:
            found = results[name]
            group = f", of means {found['group_std']:.4f}" if "group_std" in found else ""
            interval = f"{found['mean']:.4f} +- {found['half_width']:.4f}"
            print(f"  {label:<34} {interval}  (std {found['std']:.4f}{group})")
    if results["chance"]:
        print(f"  {'chance':<34} {results['chance']:.4f}")
