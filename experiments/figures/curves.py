"""MGAug's Fig. 3: loss and accuracy of FoMAML, with Aug and with MGAug, in training and validation.

    python -m experiments.figures.curves --out=DIR
    python -m experiments.figures.curves --data=cub --data_dir=DIR --steps=20000 --out=DIR

At --points points of training every method is judged, after adaptation, on --episodes training
tasks, transformed as in training where the method does so (Aug), and on as many validation tasks.
--methods are specs separated by semicolons: FoMAML, the same with aug(), and with aug() and cp.
Bands are 95 % intervals over seeds.

curves.csv: method, seed, step, train_loss_nats, train_accuracy, val_loss_nats, val_accuracy.
"""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from experiments import cli, problem, runs, scoring
from experiments.figures import figure
from experiments.figures.figure import Rows, by_seed, text, where
from experiments.seeds import expand, train
from mgaug_jax import evaluate, losses
from mgaug_jax.types import Array, Task

FOMAML = "fomaml(lr=0.1,steps=5)"
METHODS = f"{FOMAML}; {FOMAML}|aug(); {FOMAML}|aug()|cp(keep=0.98)"
NAMES = ["FoMAML", "+ Aug", "+ Aug + MGAug"]
COLUMNS = ("train_loss_nats", "train_accuracy", "val_loss_nats", "val_accuracy")

FLAGS = flags.FLAGS
flags.adopt_module_key_flags(figure)
flags.DEFINE_integer("points", 6, "Points of training at which methods are judged.")
flags.DEFINE_integer("episodes", 50, "Tasks of either split that they are judged on.")
flags.DEFINE_string("methods", None, "Specs, separated by semicolons. Default: the figure's.")


def main(arguments: Sequence[str]) -> int:
    del arguments
    return figure.make("curves", measure, draw, tell, net="conv4(width=16)", methods=METHODS)


def measure(folder: Path) -> Rows:
    del folder
    specs = expand(FLAGS.methods)
    names = NAMES if specs == expand(METHODS) else specs
    first = runs.setup(problem.config(specs[0], 0, FLAGS.steps), say=print)
    setups = [runs.with_method(first, text) for text in specs]
    rows = []
    for name, made in zip(names, setups, strict=True):
        rows += [{"method": name, **row} for row in history(made, name, "val")]
        print(f"trained {name}", flush=True)
    return rows


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


def draw(rows: Rows):
    drawn, grid = figure.axes(2, 2, height=3.0, sharex=True)
    labels = {"loss_nats": "loss (nats)", "accuracy": "accuracy"}
    for ax, column in zip(grid.T.flat, COLUMNS, strict=True):
        part, what = column.split("_", 1)
        for i, name in enumerate(figure.distinct(rows, "method")):
            figure.line(ax, where(rows, method=name), "step", column, i, name)
        ax.set_ylabel(labels[what])
        if what == "loss_nats":
            ax.set_title({"train": "training tasks", "val": "validation"}[part])
    for ax in grid[-1]:
        ax.set_xlabel("meta-step")
    drawn.legend(*grid[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return drawn


def tell(rows: Rows) -> list[str]:
    """The last point of every method, and the paired differences to the first."""
    last = where(rows, step=max(row["step"] for row in rows))
    names = figure.distinct(rows, "method")
    lines = []
    for name in names:
        found = where(last, method=name)
        cells = "  ".join(f"{column} {text(by_seed(found, column))}" for column in COLUMNS)
        lines.append(f"{name}: {cells}")
        if name != names[0]:
            base = where(last, method=names[0])
            change = [np.subtract(by_seed(found, c), by_seed(base, c)) for c in COLUMNS]
            lines.append(f"  minus {names[0]}: " + "  ".join(map(text, change)))
    return lines


if __name__ == "__main__":
    cli.start(main, __doc__)
