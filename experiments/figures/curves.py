"""MGAug's Fig. 3: loss and accuracy of FoMAML, with Aug and with MGAug, in training and validation.

    python -m experiments.figures.curves --out=DIR
    python -m experiments.figures.curves --data=cub --data_dir=DIR --steps=20000 --out=DIR

At --points points of training every method is judged, after adaptation, on --episodes training
tasks, transformed as in training where the method does so (Aug), and on as many validation tasks.
--methods are specs separated by semicolons: FoMAML, the same with aug(), and with aug() and cp.
Bands are 95 % intervals over seeds.

curves.csv: method, seed, step, train_loss_nats, train_accuracy, val_loss_nats, val_accuracy.
"""

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from absl import flags

from experiments import cli, loading, problem, runs
from experiments.figures import figure, judged
from experiments.figures.figure import Rows, by_seed, text, where
from experiments.seeds import expand

FOMAML = "fomaml(lr=0.1,steps=5)"
METHODS = f"{FOMAML}; {FOMAML}|aug(); {FOMAML}|aug()|cp(keep=0.98)"
COLUMNS = ("train_loss_nats", "train_accuracy", "val_loss_nats", "val_accuracy")

FLAGS = flags.FLAGS
flags.adopt_module_key_flags(figure)
flags.adopt_module_key_flags(judged)
flags.DEFINE_string("methods", None, "Specs, separated by semicolons. Default: the figure's.")


def main(arguments: Sequence[str]) -> int:
    del arguments
    return figure.make("curves", measure, draw, tell, net="conv4(width=16)", methods=METHODS)


def measure(folder: Path) -> Rows:
    del folder
    specs = expand(FLAGS.methods)
    first = loading.setup(problem.config(specs[0], 0, FLAGS.steps), say=print)
    setups = {text: runs.with_method(first, text) for text in specs}
    rows = []
    for name, made in setups.items():
        rows += [{"method": name, **row} for row in judged.history(made, name, "val")]
        print(f"trained {name}", flush=True)
    return rows


def short(spec: str) -> str:
    """The words of a spec without their arguments: `fomaml + aug + cp`."""
    while (bare := re.sub(r"\([^()]*\)", "", spec)) != spec:
        spec = bare
    return spec.replace("|", " + ")


def draw(rows: Rows):
    drawn, grid = figure.axes(2, 2, height=3.0, sharex=True)
    labels = {"loss_nats": "loss (nats)", "accuracy": "accuracy"}
    for ax, column in zip(grid.T.flat, COLUMNS, strict=True):
        part, what = column.split("_", 1)
        for i, name in enumerate(figure.distinct(rows, "method")):
            figure.line(ax, where(rows, method=name), "step", column, i, short(name))
        ax.set_ylabel(labels[what])
        if what == "loss_nats":
            ax.set_title({"train": "training tasks", "val": "validation"}[part])
    for ax in grid[-1]:
        ax.set_xlabel("meta-step")
    drawn.legend(*grid[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
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
