"""How the gradient's direction drifts and how fast training converges, with and without noise.

    python -m experiments.figures.drift --out=DIR
    python -m experiments.figures.drift --data=sinusoid --labels=fixed_labels --shot=10 \
        --queries=10 --net=mlp --steps=3000 --method='maml(lr=0.01,steps=1)' --stds=1,10 \
        --out=DIR

--method (fomaml(lr=0.1,steps=3)) is trained with --noise at every one of --stds and without, from
the same seeds and on the same tasks. At --points points of training the meta-gradient of the same
--probes training tasks is taken without noise. Shown, from above:

  turn      angle between this gradient and that at the point before;
  descent   angle between the way from one point to the next and minus the gradient at its start:
            0 is straight downhill, 90 as good as chance;
  loss      of training, running mean, with a mark where it has settled (within 10 % of its end).

drift.csv: sigma (in `unit`), seed, step, turn_degrees, descent_degrees, loss (nats, or squared
error), settled_step, instability (of the loss), unit.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from experiments import cli, scoring
from experiments.figures import figure, sigma
from experiments.figures.figure import Rows, by_seed, text, where
from experiments.seeds import train
from mgaug_jax import analysis, meta

KEY = 70

FLAGS = flags.FLAGS
flags.adopt_module_key_flags(sigma)
flags.DEFINE_integer("probes", 16, "Training tasks whose gradient it is.")


def main(arguments: Sequence[str]) -> int:
    del arguments
    if not 2 <= FLAGS.points <= FLAGS.steps or FLAGS.probes < 1:
        raise cli.BadInput("--points must be from 2 to --steps, and --probes 1 or more.")
    return figure.make("drift", measure, draw, tell, **sigma.DEFAULTS)


def measure(folder: Path) -> Rows:
    del folder
    made = sigma.setups()
    plain = made[0.0]
    every = -(-FLAGS.steps // FLAGS.points)
    method = plain.method(jnp.zeros((), jnp.int32))
    numbers = jnp.arange(FLAGS.probes)
    keys = jax.vmap(jax.random.fold_in, (None, 0))(scoring.episode_key(KEY), numbers)
    probes = scoring.drawn(plain.sample, keys, plain.splits["train"])
    key = jax.random.key(0)
    gradient = jax.jit(lambda params, tasks: meta.meta_gradient(method, key, params, tasks)[0])
    rows: Rows = []
    for std, setup in made.items():
        visited: list[Any] = []

        def visit(values, params, done, visited=visited):
            del done
            visited.append(jax.tree.map(np.asarray, params))
            return values

        states, losses = train(setup, FLAGS.seeds, f"std {std:g}", adjust=visit, every=every)
        visited.append(states.params)
        for seed in range(FLAGS.seeds):
            points = [jax.tree.map(lambda x, s=seed: jnp.asarray(x[s]), p) for p in visited]
            rows += of_run(
                std, seed, points, [gradient(p, probes) for p in points], losses[seed], every
            )
        print(f"std {std:g} done", flush=True)
    return rows


def of_run(std: float, seed: int, points, gradients, losses: np.ndarray, every: int) -> Rows:
    """The rows of one run: its last `every` steps' loss, and angles, at every point but the first,
    which has no point before it.
    """
    stack = lambda trees: jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)
    angles = [
        np.degrees(np.arccos(np.clip(c, -1, 1))) for c in drifts(stack(gradients), stack(points))
    ]
    window = max(min(5, len(losses)), len(losses) // 50)
    settled, shake = analysis.settling(jnp.asarray(losses), window)
    return [
        {
            "sigma": std,
            "seed": seed,
            "step": min((i + 2) * every, len(losses)),
            "turn_degrees": float(turn),
            "descent_degrees": float(descent),
            "loss": float(losses[(i + 1) * every : (i + 2) * every].mean()),
            "settled_step": int(settled),
            "instability": float(shake),
            "unit": sigma.unit(),
        }
        for i, (turn, descent) in enumerate(zip(*angles, strict=True))
    ]


drifts = jax.jit(analysis.drift)


def draw(rows: Rows):
    drawn, grid = figure.axes(3, height=4.2, sharex=True)
    labels = {
        "turn_degrees": "turn of the\ngradient (°)",
        "descent_degrees": "way from\ndownhill (°)",
        "loss": "training loss",
    }
    for ax, (name, label) in zip(grid[:, 0], labels.items(), strict=True):
        for i, std in enumerate(figure.distinct(rows, "sigma")):
            found = where(rows, sigma=std)
            figure.line(
                ax, found, "step", name, i, "no noise" if not std else rf"$\sigma$ = {std:g}"
            )
            if name == "loss":
                settled = np.mean([row["settled_step"] for row in found])
                ax.axvline(
                    settled, color=figure.STYLES[i % 5][0], ls=figure.STYLES[i % 5][1], lw=0.7
                )
        ax.set_ylabel(label)
    grid[-1, 0].set_xlabel("meta-step (vertical: loss settled)")
    grid[0, 0].set_ylim(bottom=0)
    title = rf"$\sigma$ in {rows[0]['unit']}"
    handles = grid[0, 0].get_legend_handles_labels()
    drawn.legend(*handles, loc="outside upper center", ncols=4, title=title)
    return drawn


def tell(rows: Rows) -> list[str]:
    """Means over training, and convergence, over seeds."""
    lines = []
    for std in figure.distinct(rows, "sigma"):
        found = where(rows, sigma=std)
        seeds = [where(found, seed=seed) for seed in figure.distinct(found, "seed")]
        names = ("turn_degrees", "descent_degrees", "settled_step", "instability")
        means = {n: [float(np.mean([row[n] for row in one])) for one in seeds] for n in names}
        end = by_seed(where(found, step=max(row["step"] for row in found)), "loss")
        cells = "  ".join(
            f"{n} {text(v, 1 if n != 'instability' else 3)}" for n, v in means.items()
        )
        lines.append(f"sigma {std:g}: {cells}  last loss {text(end)}")
    return lines


if __name__ == "__main__":
    cli.start(main, __doc__)
