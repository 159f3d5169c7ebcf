"""Trains many methods over several seeds and tabulates them beside the first.

    python -m experiments.grid --data=sinusoid --labels=fixed_labels --shot=10 --queries=10 \
        --steps=5000 --methods='maml(lr=0.01,steps=1); maml(lr=0.01,steps=1)|noise({0.3,1,3})'

Methods are specs separated by semicolons; `{a,b,c}` stands for one row each. The seeds of a method
are trained by one compiled program, from the same initial networks and on the same tasks as those
of every other method, and tested on the same episodes with the parameters of the last step. Shown
are means and 95 % intervals over seeds (Student's t), and the paired difference to the first row.

Writes grid.json (a row is added when it is done, and a repeated command skips rows that are there)
and grid.png into --out. A row whose loss is not finite is left out, and the exit code is then 3.
"""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags

from experiments import cli, loading, plots, problem, runs, store
from experiments.seeds import COLUMNS, expand, measured, over_seeds, train

FLAGS = flags.FLAGS
flags.adopt_module_key_flags(problem)
flags.DEFINE_string("methods", None, "Specs, separated by semicolons; {a,b} gives a row each.")
flags.DEFINE_integer("seeds", 5, "Seeds 0, 1, ... that every method is trained with.")
flags.DEFINE_integer("episodes", 200, "Test episodes per seed.")
flags.DEFINE_string("out", None, "Folder to write to.")


def main(arguments: Sequence[str]) -> int:
    del arguments
    problem.adopt_protocol()
    if FLAGS.methods is None:
        raise cli.BadInput("--methods is missing; --help shows an example.")
    if FLAGS.seeds < 1 or FLAGS.episodes < 1:
        raise cli.BadInput("--seeds and --episodes must be 1 or more.")
    methods = expand(FLAGS.methods)
    folder = store.output(FLAGS.out)
    first = loading.setup(problem.config(methods[0], 0, FLAGS.steps), say=print)
    made = {text: runs.with_method(first, text) for text in methods}  # refuses before it trains
    table = open_table(folder, first)
    shown: dict[str, dict[str, Any]] = {}
    diverged = []
    for text in methods:
        if text not in table["rows"]:
            try:
                trained = train(made[text], FLAGS.seeds, text)
                table["rows"][text] = measured(made[text], *trained, FLAGS.episodes)
            except cli.NotFinite as error:
                diverged.append(str(error))
                print(error, flush=True)
                continue
            store.write_json(folder / "grid.json", table)
        shown[text] = table["rows"][text]
        print(line(text, shown[text], shown.get(methods[0])), flush=True)
    if shown:
        print("\n" + "\n".join(markdown(shown, shown.get(methods[0]), first.metric)))
        plots.rows(shown, first.metric, folder / "grid.png")
    if diverged:
        raise cli.NotFinite(f"{len(diverged)} of {len(methods)} rows are left out. {diverged[0]}")
    return 0


def open_table(folder: Path, made: runs.Setup) -> dict[str, Any]:
    """The table in `folder`, or an empty one.

    Raises:
      BadInput: The folder holds a table of another problem.
    """
    identity = {
        **dataclasses.asdict(made.config),
        "seeds": FLAGS.seeds,
        "episodes": FLAGS.episodes,
        "digests": made.digests,
    }
    for name in ("method", "seed", "eval_every", "data_dir", "splits"):
        del identity[name]
    table = {"problem": identity, "metric": made.metric, "versions": store.versions(), "rows": {}}
    try:
        if not (folder / "grid.json").exists():
            return table
        before = json.loads((folder / "grid.json").read_text())
    except (OSError, ValueError) as error:
        raise cli.BadInput(f"cannot use {folder}: {error}.") from error
    if not isinstance(before, dict) or not {"problem", "rows"} <= before.keys():
        raise cli.BadInput(
            f"{folder / 'grid.json'} is no table of this program; choose another --out."
        )
    if before["problem"] != identity:
        changed = [name for name in identity if before["problem"].get(name) != identity[name]]
        raise cli.BadInput(
            f"{folder} holds a table of another problem ({', '.join(changed)} differ); choose "
            "another --out."
        )
    return before


# --- the table ------------------------------------------------------------------------------


def _cells(found: dict[str, Any], base: dict[str, Any] | None) -> list[str]:
    cells = []
    for name in COLUMNS:
        cells.append("{:.4f} ± {:.4f}".format(*over_seeds(found[name])) if found[name] else "")
    if base is None or found is base:
        return [*cells, ""]
    difference = np.subtract(found["adapted"], base["adapted"])
    return [*cells, "{:+.4f} ± {:.4f}".format(*over_seeds(difference))]


def line(text: str, found: dict[str, Any], base: dict[str, Any] | None) -> str:
    """One row for the terminal."""
    return f"{text}: " + "  ".join(
        f"{name} {cell}"
        for name, cell in zip((*COLUMNS, "difference"), _cells(found, base), strict=True)
        if cell
    )


def markdown(
    rows: dict[str, dict[str, Any]], base: dict[str, Any] | None, metric: str
) -> list[str]:
    """The table, as it can be pasted into a report, with differences to `base`."""
    head = ["method", f"test {metric}", "step 0", "label memory", "train loss", "difference"]
    lines = [head, ["---"] * len(head)]
    for text, found in rows.items():
        lines.append([f"`{text}`".replace("|", "\\|"), *_cells(found, base)])
    return [f"| {' | '.join(cells)} |" for cells in lines]


if __name__ == "__main__":
    cli.start(main, __doc__)
