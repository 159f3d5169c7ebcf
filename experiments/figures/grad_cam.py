"""MGAug's Fig. 7: where the full network and its sub-networks look, by Grad-CAM.

    python -m experiments.figures.grad_cam --out=DIR
    python -m experiments.figures.grad_cam --run=runs/NAME --rates=0.05,0.2 --block=3 --out=DIR

Query images of --count tasks are explained by the logit of their class, for the adapted full
network and for sub-networks of CP at --rates, adapted likewise. Shown are the image whose map
changes least and the one whose map changes most between the full network and that of the highest
rate, so that nothing is picked by eye. The map is the one in front of --block (by default the last
of 5x5 or more). Without --run a network is trained with --method
(fomaml(lr=0.1,steps=5)|cp(keep=0.98)).

grad_cam.csv: sample, panel (image, or a network), row, column, value.
attention.csv: task, query, rate, correlation (of its map with the full network's), probability (of
the class, full network).
"""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from experiments import cli, store
from experiments.figures import figure, networks
from experiments.figures.figure import Rows, where
from mgaug_jax import behaviour, pruning
from mgaug_jax.meta import subnet
from mgaug_jax.nets.lowering import map_tasks
from mgaug_jax.types import Array, Task

SMALLEST = 5

FLAGS = flags.FLAGS
flags.adopt_module_key_flags(networks)
flags.DEFINE_integer("block", None, "Block in front of which the map lies, from 1.")


def main(arguments: Sequence[str]) -> int:
    del arguments
    defaults = {"net": "conv4(width=16)", "steps": 200, "seeds": 1, "count": 20}
    rates = {"rates": ["0.02", "0.1", "0.3"], "method": networks.METHOD}
    return figure.make("grad_cam", measure, draw, tell, **defaults, **rates)


def measure(folder: Path) -> Rows:
    rates = networks.rates()
    net = networks.trained(folder, FLAGS.run)[0]
    method, drawn = net.made.tested, networks.tasks(net.made)
    block = FLAGS.block or deepest(method.net, net.params.net, drawn.query.x[0])
    go = jax.jit(partial(explained, method, block))
    cams, probabilities = jax.device_get(go(net.params, drawn, 1 - jnp.asarray(rates)))
    similar = correlations(cams)
    store.write_csv(
        folder / "attention.csv",
        [
            {
                "task": t,
                "query": q,
                "rate": rate,
                "correlation": float(similar[t, i, q]),
                "probability": float(probabilities[t, q]),
            }
            for t in range(similar.shape[0])
            for i, rate in enumerate(rates)
            for q in range(similar.shape[2])
        ],
    )
    train = net.made.splits["train"]
    names = ["full", *(f"{100 * rate:g} %" for rate in rates)]
    rows: Rows = []
    ordered = np.argsort(similar[:, -1], axis=None)
    ordered = ordered[np.isfinite(similar[:, -1].ravel()[ordered])]
    if not len(ordered):
        raise cli.BadInput("no image has a map under every network; use lower --rates.")
    for sample, index in (("least", ordered[-1]), ("most", ordered[0])):
        t, q = np.unravel_index(index, similar[:, -1].shape)
        image = np.asarray(drawn.query.x[t, q] * train.std + train.mean).mean(-1)
        maps = dict(zip(names, cams[t, :, q], strict=True))
        for name, values in {"image": image, **maps}.items():
            rows += [
                {"sample": sample, "panel": name, "row": i, "column": j, "value": float(value)}
                for (i, j), value in np.ndenumerate(values)
            ]
    return rows


def deepest(net, params, x: Array) -> int:
    """The last block in front of which maps have `SMALLEST` rows and columns; the first else."""
    found = 1
    for block in range(1, net.depth):
        shape = jax.eval_shape(lambda p, x, block=block: net.part(p, x, 0, block), params, x).shape
        found = block if len(shape) == 4 and min(shape[1:3]) >= SMALLEST else found
    return found


def explained(method, block: int, params, tasks: Task, keeps: Array) -> tuple[Array, Array]:
    """Maps `[T, 1 + R, n, h, w]`, the full network's first, and its probabilities `[T, n]`."""

    def one(i: Array, task: Task) -> tuple[Array, Array]:
        key = jax.random.key(i)
        seen = behaviour.shown(method, key, params, task)

        def maps(net) -> tuple[Array, Array]:
            learner = method.algorithm(net, method.test)
            if learner.weights is None:
                raise ValueError("Grad-CAM needs logits of classes; use fomaml or maml.")
            fast = learner.adapt(key, params, task.support)
            logits = learner.predict(fast, task.query.x)
            found = behaviour.grad_cam(net, learner.weights(fast), *task.query, block)
            return found, jnp.sum(jax.nn.softmax(logits) * task.query.y, axis=-1)

        def pruned(keep: Array) -> Array:
            mask = pruning.catfish()(key, method.net, params.net, seen, keep)
            return maps(subnet(method.net, mask))[0]

        full, probability = maps(method.net)
        return jnp.concatenate([full[None], map_tasks(method.net, pruned, keeps)]), probability

    return map_tasks(method.net, one, jnp.arange(len(tasks.query.y)), tasks)


def correlations(cams: np.ndarray) -> np.ndarray:
    """Of maps `[T, 1 + R, n, h, w]` with the first network's, `[T, R, n]`; NaN for a flat map."""
    flat = cams.reshape(*cams.shape[:3], -1)
    flat = flat - flat.mean(-1, keepdims=True)
    norm = np.linalg.norm(flat, axis=-1)
    dot = (flat[:, :1] * flat[:, 1:]).sum(-1)
    length = norm[:, :1] * norm[:, 1:]
    return np.divide(dot, length, out=np.full_like(dot, np.nan), where=length > 1e-12)


def draw(rows: Rows):
    samples, panels = figure.distinct(rows, "sample"), figure.distinct(rows, "panel")
    height = 0.25 + 0.65 * len(samples)
    drawn, grid = figure.axes(len(samples), len(panels), height=height)
    for axes, sample in zip(grid, samples, strict=True):
        image = grid_of(where(rows, sample=sample, panel="image"))
        for ax, panel in zip(axes, panels, strict=True):
            ax.imshow(image, cmap="gray_r" if image.mean() < 0.5 else "gray")
            if panel != "image":
                box = (-0.5, image.shape[1] - 0.5, image.shape[0] - 0.5, -0.5)
                heat = grid_of(where(rows, sample=sample, panel=panel))
                shown = {"cmap": "cividis", "alpha": 0.6, "vmin": 0, "vmax": 1, "extent": box}
                picture = ax.imshow(heat, interpolation="bilinear", **shown)
            ax.set(xticks=[], yticks=[])
        axes[0].set_ylabel(f"changes {sample}")
    for ax, panel in zip(grid[0], panels, strict=True):
        ax.set_title(panel, pad=2)
    drawn.colorbar(picture, ax=grid, ticks=[0, 1], aspect=30, label="Grad-CAM")
    return drawn


def grid_of(rows: Rows) -> np.ndarray:
    """The values of one panel as a picture."""
    shape = [int(max(row[name] for row in rows)) + 1 for name in ("row", "column")]
    return np.array([row["value"] for row in rows]).reshape(shape)


def tell(rows: Rows) -> list[str]:
    """How much of the attention stays, by rate, and whether it stays where the network is sure."""
    from scipy.stats import spearmanr

    del rows
    lines = []
    table = figure.read(Path(FLAGS.out) / "attention.csv")
    for rate in figure.distinct(table, "rate"):
        found = [row for row in where(table, rate=rate) if np.isfinite(row["correlation"])]
        columns: Any = [[row[n] for row in found] for n in ("correlation", "probability")]
        if len(found) > 2:
            rank = spearmanr(*columns).statistic
            lines.append(
                f"{100 * rate:g} % pruned: correlation with the full network's map, mean "
                f"{np.mean(columns[0]):.3f} of {len(found)} images; rank correlation with the "
                f"probability of the class {rank:+.2f} (images of a task are not independent)"
            )
    return lines


if __name__ == "__main__":
    cli.start(main, __doc__)
