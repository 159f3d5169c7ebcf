"""MGAug's Fig. 2: the distribution of MMCA in one layer, and the threshold of catfish pruning.

    python -m experiments.figures.mmca --out=DIR
    python -m experiments.figures.mmca --run=runs/NAME --layer=conv0/kernel --rates=0.02 --out=DIR

The histogram is of |MMCA| (in nats, the unit of the loss) over the weights of --layer for one task;
what lies right of the line is pruned at the rate --rates. Pruning that is to keep accuracy removes
the left end. Without --run a network is trained with --method
(fomaml(lr=0.1,steps=5)|cp(keep=0.98)). Seed, task and scores are the first of each.

mmca.csv: layer, weight, mmca_nats, kept, threshold_nats.
"""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import jax
import numpy as np
from absl import flags

from experiments import cli
from experiments.figures import figure, networks
from experiments.figures.figure import Rows
from mgaug_jax import behaviour

BINS = 60

FLAGS = flags.FLAGS
flags.adopt_module_key_flags(networks)
flags.DEFINE_string("layer", "last", "Name of a layer, as conv3/kernel; last: the last prunable.")


def main(arguments: Sequence[str]) -> int:
    del arguments
    defaults = {"net": "conv4(width=16)", "steps": 200, "seeds": 1, "count": 1, "rates": ["0.2"]}
    return figure.make("mmca", measure, draw, tell, **defaults, method=networks.METHOD)


def measure(folder: Path) -> Rows:
    net = networks.trained(folder, FLAGS.run)[0]
    task = jax.tree.map(lambda leaf: leaf[0], networks.tasks(net.made))
    compiled = jax.jit(partial(behaviour.mmca, net.made.tested))
    layers = compiled(jax.random.key(0), net.params, task, 1 - networks.rates()[0])
    names = sorted(layers)
    name = names[-1] if FLAGS.layer == "last" else FLAGS.layer
    if name not in layers:
        raise cli.BadInput(f"--layer={name} is none of {', '.join(names)}.")
    layer = jax.device_get(layers[name])
    return [
        {
            "layer": name,
            "weight": weight,
            "mmca_nats": float(score),
            "kept": int(kept),
            "threshold_nats": float(layer.threshold),
        }
        for weight, (score, kept) in enumerate(zip(layer.scores, layer.kept, strict=True))
    ]


def draw(rows: Rows):
    scores = np.array([row["mmca_nats"] for row in rows])
    kept = np.array([row["kept"] for row in rows]) > 0
    some = scores > 0
    low, high = np.log10([max(scores[some].min(), 1e-6 * scores.max()), scores.max()])
    bins = np.logspace(low, high, BINS)
    drawn, ((ax,),) = figure.axes()
    shown = {
        "kept": (kept, figure.SKY, ""),
        "pruned": (~kept, figure.RED, "//////"),
    }
    for label, (chosen, color, hatch) in shown.items():
        label = f"{label}: {chosen.sum()} weights"
        ax.hist(scores[chosen], bins, color=color, hatch=hatch, ec="white", lw=0, label=label)
    ax.axvline(rows[0]["threshold_nats"], color="black", ls="--", label="threshold")
    ax.set_xscale("log")
    ax.set(xlabel="|MMCA| (nats)", ylabel=f"weights of {rows[0]['layer']}")
    ax.legend(loc="upper left")
    return drawn


def tell(rows: Rows) -> list[str]:
    """How many weights go, and how much of the layer's score they hold."""
    scores = np.array([row["mmca_nats"] for row in rows])
    pruned = np.array([row["kept"] for row in rows]) == 0
    share = scores[pruned].sum() / max(scores.sum(), 1e-30)
    return [
        f"{rows[0]['layer']}: {pruned.sum()} of {len(rows)} weights pruned, above "
        f"{rows[0]['threshold_nats']:.3g} nats; they hold {100 * share:.1f} % of the summed score",
        f"median {np.median(scores):.3g}, largest {scores.max():.3g} nats; "
        f"{(scores == 0).sum()} weights score 0",
    ]


if __name__ == "__main__":
    cli.start(main, __doc__)
