"""What every figure shares: what is measured goes to a CSV file, and the picture is drawn from it.

Pictures are as wide as a column (3.3 inches), in type of 7 points and more, in colours that the
colour-blind tell apart (Okabe and Ito), and no line differs from another by its colour alone.
"""

import csv
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags

from experiments import cli, plots, problem, store
from experiments.seeds import over_seeds

WIDTH = 3.3
BLACK, ORANGE, SKY, GREEN, YELLOW, BLUE, RED, PINK = (
    "#000000 #e69f00 #56b4e9 #009e73 #f0e442 #0072b2 #d55e00 #cc79a7".split()
)
STYLES = [
    (BLACK, "-", "o"),
    (BLUE, "--", "s"),
    (RED, "-.", "^"),
    (GREEN, ":", "D"),
    (PINK, "-", "v"),
]
STYLE = {
    "font.size": 7,
    "axes.titlesize": 7,
    "axes.labelsize": 7,
    "legend.fontsize": 7,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "axes.linewidth": 0.6,
    "lines.linewidth": 1.1,
    "lines.markersize": 3,
    "savefig.dpi": 300,
}

Rows = list[dict[str, Any]]
"""The lines of a CSV file. Columns with a unit other than 1 say it in their names."""

FLAGS = flags.FLAGS
flags.adopt_module_key_flags(problem)
flags.DEFINE_string("out", None, "Folder to write the picture and its numbers to.")
flags.DEFINE_bool("redraw", False, "Draws from the CSV file in --out; nothing is computed.")
flags.DEFINE_string("method", None, "Spec of the method. Default: the figure's, as its text says.")
flags.DEFINE_integer("seeds", 3, "Seeds 0, 1, ... of the networks that are trained.")


def make(
    name: str,
    measure: Callable[[Path], Rows],
    draw: Callable[[Rows], Any],
    tell: Callable[[Rows], list[str]],
    **defaults: Any,
) -> int:
    """Writes NAME.csv and NAME.png into `--out`, and prints what is to be seen in them.

    Args:
      name: Of the files.
      measure: `folder -> rows`.
      draw: `rows -> matplotlib figure`.
      tell: `rows -> lines`, numbers for the terminal.
      **defaults: Values of flags that neither the command line nor a protocol sets.

    Raises:
      BadInput: What is asked for cannot be.
    """
    plt = plots.pyplot()
    for flag, value in defaults.items():
        if not FLAGS[flag].present:
            FLAGS.set_default(flag, value)
    problem.adopt_protocol()
    if FLAGS.seeds < 1:
        raise cli.BadInput(f"--seeds={FLAGS.seeds} must be 1 or more.")
    folder = store.output(FLAGS.out)
    table, picture = folder / f"{name}.csv", folder / f"{name}.png"
    if not FLAGS.redraw:
        try:
            rows = measure(folder)
        except ValueError as error:  # what the library refuses
            raise cli.BadInput(str(error)) from error
        store.write_csv(table, rows)
        made = {"arguments": sys.argv[1:], "versions": store.versions()}
        store.write_json(folder / f"{name}.json", made)
    rows = read(table)
    with plt.rc_context(STYLE):
        drawn = draw(rows)
        with store.replaced(picture) as temporary:
            drawn.savefig(temporary, format="png")
        plt.close(drawn)
    print("\n".join([*tell(rows), f"wrote {table} and {picture}"]))
    return 0


def read(path: Path) -> Rows:
    """The rows of a table, numbers as float.

    Raises:
      BadInput: It is not there, or empty.
    """

    def value(text: str) -> Any:
        try:
            return float(text)
        except ValueError:
            return text

    try:
        with path.open(newline="") as file:
            rows = [{k: value(v) for k, v in row.items()} for row in csv.DictReader(file)]
    except OSError as error:
        raise cli.BadInput(f"{path} cannot be read; leave --redraw out to make it.") from error
    if not rows:
        raise cli.BadInput(f"{path} is empty; leave --redraw out to make it.")
    return rows


# --- rows -----------------------------------------------------------------------------------


def where(rows: Rows, **values: Any) -> Rows:
    """The rows with these values."""
    return [row for row in rows if all(row[name] == value for name, value in values.items())]


def distinct(rows: Rows, name: str) -> list[Any]:
    """The values of a column, each once, in their order."""
    return list(dict.fromkeys(row[name] for row in rows))


def by_seed(rows: Rows, name: str) -> list[float]:
    """A column of rows that differ by their seed alone, in the order of seeds."""
    seeds = [row["seed"] for row in rows]
    if len(set(seeds)) != len(seeds):
        raise ValueError(f"{name}: rows of one seed occur twice.")
    return [row[name] for row in sorted(rows, key=lambda row: row["seed"])]


def curve(rows: Rows, x: str, y: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Values of x, and mean and half width of the 95 % interval of y over seeds at each."""
    at = distinct(rows, x)
    found = [over_seeds(by_seed(where(rows, **{x: value}), y)) for value in at]
    mean, half = np.array(found).T
    return np.array(at), mean, half


def text(values: Sequence[float], digits: int = 3) -> str:
    """`mean ± half width of the 95 % interval over seeds`."""
    mean, half = over_seeds(values)
    return f"{mean:.{digits}f} ± {half:.{digits}f}" if len(values) > 1 else f"{mean:.{digits}f}"


# --- pictures -------------------------------------------------------------------------------


def axes(rows: int = 1, columns: int = 1, height: float = 2.3, **options: Any) -> tuple[Any, Any]:
    """A figure as wide as a column, and its axes."""
    from matplotlib import pyplot as plt

    return plt.subplots(
        rows, columns, figsize=(WIDTH, height), layout="constrained", squeeze=False, **options
    )


def line(ax, rows: Rows, x: str, y: str, style: int, label: str) -> None:
    """A curve with its interval over seeds as a band."""
    color, dashes, marker = STYLES[style % len(STYLES)]
    at, mean, half = curve(rows, x, y)
    ax.plot(at, mean, color=color, ls=dashes, marker=marker, label=label)
    ax.fill_between(at, mean - half, mean + half, color=color, alpha=0.15, lw=0)
