"""MGAug's Fig. 6: what becomes of training when MGAug is switched on late.

    python -m experiments.figures.switching --out=DIR
    python -m experiments.figures.switching --protocol=NAME --data_dir=DIR --out=DIR

--method (protonet()) is trained without MGAug, and with --mgaug from each of --starts on, fractions
of the run, from the same seeds and on the same tasks. Shown is accuracy on training tasks and on
those of the test split. Bands are 95 % intervals over seeds.

switching.csv: start (a fraction; never), seed, step, train_loss_nats, train_accuracy,
test_loss_nats, test_accuracy.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from absl import flags

from experiments import cli, loading, problem, runs
from experiments.figures import figure, judged
from experiments.figures.figure import Rows, by_seed, text, where

NEVER = "never"

FLAGS = flags.FLAGS
flags.adopt_module_key_flags(figure)
flags.adopt_module_key_flags(judged)
flags.DEFINE_string("mgaug", "cp(keep=0.97,cap=0.99)", "Spec of MGAug.")
flags.DEFINE_list("starts", ["0", "0.25", "0.5", "0.75"], "Fractions of the run.")


def main(arguments: Sequence[str]) -> int:
    del arguments
    defaults = {"net": "conv4(width=16)", "shot": 5, "method": "protonet()", "steps": 400}
    return figure.make("switching", measure, draw, tell, **defaults)


def measure(folder: Path) -> Rows:
    del folder
    plain = loading.setup(problem.config(FLAGS.method, 0, FLAGS.steps), say=print)
    setups = {NEVER: plain} | {
        start: runs.with_method(plain, f"{FLAGS.method}|{late(start)}") for start in FLAGS.starts
    }
    rows = []
    for start, made in setups.items():
        rows += [{"start": start, **row} for row in judged.history(made, f"from {start}", "test")]
        print(f"trained with MGAug from {start}", flush=True)
    return rows


def late(start: str) -> str:
    """The spec of MGAug from a fraction of the run on.

    Raises:
      BadInput: It is no number from 0 to below 1.
    """
    try:
        fraction = float(start)
    except ValueError as error:
        raise cli.BadInput(f"--starts has {start!r}, which is no number.") from error
    if not 0 <= fraction < 1:
        raise cli.BadInput(f"--starts has {start}, which must be from 0 to below 1.")
    if not FLAGS.mgaug.endswith(")") or "|" in FLAGS.mgaug:
        raise cli.BadInput(f"--mgaug={FLAGS.mgaug} must be one pruner, as in cp(keep=0.97).")
    return f"{FLAGS.mgaug[:-1]},start={round(fraction * FLAGS.steps)})"


def draw(rows: Rows):
    drawn, ((top,), (bottom,)) = figure.axes(2, height=3.6, sharex=True)
    steps = max(row["step"] for row in rows)
    panels = ((top, "train_accuracy", "training"), (bottom, "test_accuracy", "test"))
    for ax, column, label in panels:
        for i, start in enumerate(figure.distinct(rows, "start")):
            name = "never" if start == NEVER else f"from step {start * steps:g}"
            figure.line(ax, where(rows, start=start), "step", column, i, name)
        ax.set_ylabel(f"{label} accuracy")
    bottom.set_xlabel("meta-step")
    handles = top.get_legend_handles_labels()
    drawn.legend(*handles, loc="outside lower center", ncols=3, title="MGAug on")
    return drawn


def tell(rows: Rows) -> list[str]:
    """The last point of every start, and the paired difference to never."""
    last = where(rows, step=max(row["step"] for row in rows))
    lines = []
    for start in figure.distinct(rows, "start"):
        cells = []
        for column in ("train_accuracy", "test_accuracy"):
            values = by_seed(where(last, start=start), column)
            change = np.subtract(values, by_seed(where(last, start=NEVER), column))
            cells.append(f"{column} {text(values)} (minus never {text(change)})")
        lines.append(f"from {start}: " + "  ".join(cells))
    return lines


if __name__ == "__main__":
    cli.start(main, __doc__)
