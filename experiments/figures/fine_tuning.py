"""MGAug's Fig. 5: fine-tuning of a trained network, with and without CP, and from scratch.

    python -m experiments.figures.fine_tuning --out=DIR
    python -m experiments.figures.fine_tuning --run=A,B,C --inner_steps=20 --out=DIR

Query accuracy over --inner_steps inner steps on the same tasks: the full network, its sub-networks
of CP at --rates, and the network it was before meta-training. Without --run networks are trained
with --method (fomaml(lr=0.1,steps=5)|cp(keep=0.98)).

fine_tuning.csv: curve, seed, step, accuracy (mean over --count tasks).
"""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from experiments import cli, runs, spec
from experiments.figures import figure, networks
from experiments.figures.figure import Rows, by_seed, text, where
from mgaug_jax import pruning

FULL, RANDOM = "trained, whole", "untrained"

FLAGS = flags.FLAGS
flags.adopt_module_key_flags(networks)
flags.DEFINE_integer("inner_steps", 10, "Inner steps of the curves.")


def main(arguments: Sequence[str]) -> int:
    del arguments
    if FLAGS.inner_steps < 1:
        raise cli.BadInput(f"--inner_steps={FLAGS.inner_steps} must be 1 or more.")
    defaults = {"net": "conv4(width=16)", "steps": 200, "rates": ["0.02", "0.3"]}
    return figure.make("fine_tuning", measure, draw, tell, **defaults, method=networks.METHOD)


def measure(folder: Path) -> Rows:
    rates = networks.rates()
    nets = networks.trained(folder, FLAGS.run)
    made = nets[0].made
    method = spec.method(made.config.method, made.problem, FLAGS.inner_steps)(
        jnp.zeros((), jnp.int32)
    )
    drawn = networks.tasks(made)
    go = jax.jit(partial(networks.mean_hat, method, pruning.catfish()))
    rows = []
    for net in nets:
        blank = made.trainer.init(runs.keys(net.seed)[0]).params
        keeps = 1 - jnp.asarray(rates)
        trained, untrained = go(net.params, drawn, keeps), go(blank, drawn, keeps)
        curves = {FULL: trained.full}
        curves |= {
            f"CP, {100 * rate:g} %": accuracies
            for rate, accuracies in zip(rates, trained.pruned, strict=True)
        }
        rows += [
            {"curve": name, "seed": net.seed, "step": step, "accuracy": float(value)}
            for name, values in {**curves, RANDOM: untrained.full}.items()
            for step, value in enumerate(values)
        ]
    return rows


def draw(rows: Rows):
    drawn, ((ax,),) = figure.axes()
    for i, name in enumerate(figure.distinct(rows, "curve")):
        figure.line(ax, where(rows, curve=name), "step", "accuracy", i, name)
    ax.set(xlabel="inner step", ylabel="query accuracy")
    ax.legend(loc="lower right")
    return drawn


def tell(rows: Rows) -> list[str]:
    """Every curve's accuracy at the first steps and the last."""
    last = max(row["step"] for row in rows)
    lines = []
    for name in figure.distinct(rows, "curve"):
        at = [where(rows, curve=name, step=step) for step in (0.0, 1.0, 2.0, last)]
        values = [np.array(by_seed(found, "accuracy")) for found in at]
        shown = ", ".join(map(text, values))
        share = text((values[1] - values[0]) / np.maximum(values[3] - values[0], 1e-9), 2)
        lines.append(f"{name}: steps 0, 1, 2, {last:g}: {shown}; step 1 brings {share} of the gain")
    return lines


if __name__ == "__main__":
    cli.start(main, __doc__)
