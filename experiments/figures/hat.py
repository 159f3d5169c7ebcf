"""MGAug's Fig. 4: what pruning takes from a base learner before and after every inner step.

    python -m experiments.figures.hat --out=DIR
    python -m experiments.figures.hat --run=A,B,C --run_nme=D,E,F --out=DIR

The dashed line is the full network's query accuracy at inner steps 0, 1, ...; a bar reaches from it
to that of a sub-network. Panels: mutually exclusive tasks (ME) with sub-networks of WP, PP and CP,
and tasks that are not (NME) with CP. All sub-networks of ME are those of one network, trained with
--method (fomaml(lr=0.1,steps=5)|cp(keep=0.98)), so that the panels differ by their pruning alone.

Without --run and --run_nme, --seeds networks of each kind are trained. Tasks are those of training
(--split=test: of unseen classes, of which nothing can be remembered).

hat.csv: panel, seed, rate (0: the full network), step, accuracy (mean over --count tasks).
"""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from experiments import cli
from experiments.figures import figure, networks
from experiments.figures.figure import Rows, by_seed, text, where
from mgaug_jax import behaviour, pruning

PANELS = {
    "ME, WP": pruning.width,
    "ME, PP": pruning.random_parameters(),
    "ME, CP": pruning.catfish(),
    "NME, CP": pruning.catfish(),
}

FLAGS = flags.FLAGS
flags.adopt_module_key_flags(networks)
flags.DEFINE_list("run_nme", [], "Folders of runs, one a seed, for NME; those of --run are for ME.")


def main(arguments: Sequence[str]) -> int:
    del arguments
    defaults = {"net": "conv4(width=16)", "steps": 200, "method": networks.METHOD}
    return figure.make("hat", measure, draw, tell, **defaults)


def measure(folder: Path) -> Rows:
    rates = networks.rates()
    rows = []
    kinds = {"ME": (FLAGS.run, "exclusive"), "NME": (FLAGS.run_nme, "fixed_labels")}
    for kind, (homes, labels) in kinds.items():
        nets = networks.trained(folder, homes, labels)
        made = nets[0].made
        drawn = networks.tasks(made)
        for panel, pruner in PANELS.items():
            if panel.split(", ")[0] == kind:
                compiled = jax.jit(partial(networks.mean_hat, made.tested, pruner))
                for net in nets:
                    found = compiled(net.params, drawn, 1 - jnp.asarray(rates))
                    rows += rows_of(panel, net.seed, rates, found)
                print(f"measured {panel}", flush=True)
    return rows


def rows_of(panel: str, seed: int, rates: list[float], found: behaviour.Hat) -> Rows:
    """The rows of one network and panel."""
    curves = np.concatenate([found.full[None], found.pruned]).tolist()
    return [
        {"panel": panel, "seed": seed, "rate": rate, "step": step, "accuracy": value}
        for rate, row in zip([0.0, *rates], curves, strict=True)
        for step, value in enumerate(row)
    ]


def draw(rows: Rows):
    panels = figure.distinct(rows, "panel")
    drawn, grid = figure.axes(2, 2, height=3.3, sharex=True, sharey=True)
    rates = [rate for rate in figure.distinct(rows, "rate") if rate]
    for ax, panel, letter in zip(grid.flat, panels, "abcd", strict=False):
        at, full, _ = figure.curve(where(rows, panel=panel, rate=0.0), "step", "accuracy")
        width = 0.8 / len(rates)
        for i, rate in enumerate(rates):
            _, mean, _ = figure.curve(where(rows, panel=panel, rate=rate), "step", "accuracy")
            place = at + (i - (len(rates) - 1) / 2) * width
            color = (figure.SKY, figure.ORANGE, figure.GREEN, figure.RED, figure.PINK)[i % 5]
            hatch = ("", "////", "", "xxxx", "....")[i % 5]
            bars = {"color": color, "hatch": hatch, "ec": "white", "lw": 0}
            ax.bar(place, mean - full, width, bottom=full, label=f"{100 * rate:g} %", **bars)
        ax.plot(at, full, "*--", color="black", ms=4, lw=0.8, label="full")
        ax.set_title(f"({letter}) {panel}", pad=3)
        ax.set_xticks(at)
    for ax in grid.flat:
        ax.use_sticky_edges = False
        ax.autoscale_view()
    for ax in grid[-1]:
        ax.set_xlabel("inner step")
    for ax in grid[:, 0]:
        ax.set_ylabel("query accuracy")
    handles, labels = grid[0, 0].get_legend_handles_labels()
    drawn.legend(handles, labels, loc="outside lower center", ncols=5, columnspacing=0.8)
    return drawn


def tell(rows: Rows) -> list[str]:
    """Step 0, the first step, and how pruners differ at it, over seeds."""
    value = lambda panel, rate, step: np.array(
        by_seed(where(rows, panel=panel, rate=rate, step=float(step)), "accuracy")
    )
    rates = [rate for rate in figure.distinct(rows, "rate") if rate]
    last = max(row["step"] for row in rows)
    lines = []
    for panel in figure.distinct(rows, "panel"):
        full = [value(panel, 0.0, step) for step in (0, 1, last)]
        steps = ", ".join(map(text, full))
        lines.append(f"{panel}: full network at steps 0, 1, {last:g}: {steps}")
        for rate in rates:
            pruned = [value(panel, rate, step) for step in (0, 1, last)]
            lost = ", ".join(text(f - p) for f, p in zip(full, pruned, strict=True))
            later = text(pruned[2] - pruned[1])
            lines.append(f"  {100 * rate:g} % pruned, loses {lost}; gains after step 1: {later}")
        lines.append(f"  the full network gains after step 1: {text(full[2] - full[1])}")
    lost = lambda panel, rate: value(panel, 0.0, 1) - value(panel, rate, 1)
    for rate in rates:
        for more, less in (("ME, CP", "ME, PP"), ("ME, PP", "ME, WP")):
            difference = text(lost(more, rate) - lost(less, rate))
            lines.append(f"step 1, {100 * rate:g} %: loss of {more} minus {less}: {difference}")
    return lines


if __name__ == "__main__":
    cli.start(main, __doc__)
