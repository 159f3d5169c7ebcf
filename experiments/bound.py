"""How tight MGAug's Theorem 1 gets where it says something: many small tasks, a linear learner.

    python -m experiments.bound --out=DIR [--rho=0.1 --tasks=1000 --samples=400 --pruner=cp]

A task labels Gaussian points by a hyperplane near one that all tasks share, and flips a few labels.
A linear classifier is meta-trained (MAML with one sub-network) on one half of the tasks. Its
weights are the centre of the prior, and the bound is evaluated on the other half, of --tasks tasks:
the posterior of a task is what adaptation makes of all its samples, plus noise, pruned.
So D(Q || P) is 0 and only what adaptation moves is paid for. The standard deviations of noise and
prior are chosen on a grid, which costs a union bound; the empirical term is the upper end of a
Monte-Carlo interval, which costs a tenth of --delta. Every number holds with 1 - delta.

--pruner says which weights go:

  bernoulli  each with probability rho, independently (PP)
  pp         round(rho n) of n, at random
  wp         the last round(rho n), always the same (every weight counts as a channel)
  cp         round(rho n) with the highest meta-memorisation score on the task's own samples; the
             choice costs log C(n, k) more, without which the bound can fail

rho, T and m are varied one at a time around --rho, --tasks and --samples. Beside the bound:

  error      on new tasks, measured on fresh ones (it must lie below)
  all tasks  the same without a half set aside, on 2 T tasks: hyper-posterior N(omega, kappa^2 I),
             learners that start from its draws, D(Q || P) paid in both terms. The mean divergence
             is a Monte-Carlo mean without an interval.
  MR-MAML    its Theorem 1: adapts on half of every task's samples, is judged on the others, without
             noise or pruning; the shared weights, learned on other tasks, cost nothing
  alone      McAllester's bound of tasks that learn alone, from weights of 0: mean over tasks of
             numbers of which each holds for its own task, and says nothing about new ones

Every number is a mean over --seeds; intervals are 95 % intervals over seeds (Student's t). Writes
bound.json, bound.csv and bound.png into --out.
"""

from collections.abc import Sequence
from typing import Any

from absl import flags

from experiments import cli, linear, plots, store
from experiments.progress import Progress
from mgaug_jax.divergences import LAWS

USUAL = linear.Problem()
RESERVATIONS = (
    "The learner adapts, then prunes and adds noise; MGAug prunes, then adapts, without noise.",
    "One sub-network at one rate; MGAug trains three at random rates.",
    "T counts independent tasks, seen once, and m independent samples.",
    "CP pays log C(n, k) for its mask; the theorem as printed does not, and then can fail.",
)
"""What every number must be read with."""

FLAGS = flags.FLAGS
flags.DEFINE_float("rho", 0.1, "Pruning rate, where it is not varied.")
flags.DEFINE_integer("tasks", 1000, "Observed tasks T, where not varied; as many train the prior.")
flags.DEFINE_integer("samples", 400, "Samples per task m, where not varied.")
flags.DEFINE_list("rhos", ["0", "0.1", "0.25", "0.5"], "Values of rho.")
flags.DEFINE_list("task_counts", ["30", "100", "300", "1000", "3000"], "Values of T.")
flags.DEFINE_list("sample_counts", ["50", "100", "200", "400", "800"], "Values of m.")
flags.DEFINE_string("pruner", USUAL.pruner, f"Which weights go: {', '.join(LAWS)}.")
flags.DEFINE_integer("dim", USUAL.dim, "Weights of the classifier.")
flags.DEFINE_float(
    "spread", USUAL.spread, "How far the tasks' hyperplanes lie apart; 0: all are one."
)
flags.DEFINE_float(
    "flip", USUAL.flip, "Share of labels that are flipped: no learner's error is less."
)
flags.DEFINE_integer("steps", USUAL.steps, "Meta-steps that learn the prior.")
flags.DEFINE_integer(
    "draws", USUAL.draws, "Networks drawn for an empirical error, of all tasks together."
)
flags.DEFINE_float("delta", USUAL.delta, "The bounds hold with probability 1 - delta.")
flags.DEFINE_integer("seed", 0, "First seed.")
flags.DEFINE_integer("seeds", 1, "Number of seeds.")
flags.DEFINE_string("out", None, "Folder to write to.")


def main(arguments: Sequence[str]) -> int:
    del arguments
    sweeps = {
        "rho": numbers("rhos", FLAGS.rhos, float),
        "tasks": numbers("task_counts", FLAGS.task_counts, int),
        "samples": numbers("sample_counts", FLAGS.sample_counts, int),
    }
    base = {"rho": FLAGS.rho, "tasks": FLAGS.tasks, "samples": FLAGS.samples}
    settings = {name: [{**base, name: v} for v in values] for name, values in sweeps.items()}
    for setting in (base, *(one for varied in settings.values() for one in varied)):
        if not 0 <= setting["rho"] < 1:
            raise cli.BadInput(f"rho={setting['rho']} must be in [0, 1).")
        if min(setting["tasks"], setting["samples"]) < 4:
            raise cli.BadInput("tasks and samples must be 4 or more.")
    for name in ("dim", "steps", "draws", "seeds"):
        if FLAGS[name].value < 1:
            raise cli.BadInput(f"--{name}={FLAGS[name].value} must be 1 or more.")
    if not 0 < FLAGS.delta < 1 or not 0 <= FLAGS.flip <= 0.5:
        raise cli.BadInput("--delta must lie between 0 and 1, --flip between 0 and 0.5.")
    if FLAGS.pruner not in LAWS:
        raise cli.BadInput(f"--pruner={FLAGS.pruner} is none of {', '.join(LAWS)}.")
    problem = linear.Problem(*(FLAGS[name].value for name in linear.Problem._fields))
    folder = store.output(FLAGS.out)
    print("\n".join(RESERVATIONS))
    done = {}
    different = {tuple(one.values()): one for varied in settings.values() for one in varied}
    seeds = range(FLAGS.seed, FLAGS.seed + FLAGS.seeds)
    progress = Progress("bound", len(different), unit="settings")
    for key, setting in different.items():
        done[key] = linear.measured(problem, seeds, **setting)
        progress.at(len(done))
        progress.close()
        print(line(done[key]), flush=True)
    rows = {
        name: [done[tuple(one.values())] for one in varied] for name, varied in settings.items()
    }
    report = {"base": base, **problem._asdict(), "seed": FLAGS.seed, "seeds": FLAGS.seeds}
    report |= {"reservations": RESERVATIONS, "rows": rows, "versions": store.versions()}
    store.write_json(folder / "bound.json", report)
    store.write_csv(folder / "bound.csv", [flat(row) for row in done.values()])
    plots.bound(rows, folder / "bound.png")
    return 0


def numbers(name: str, texts: Sequence[str], kind: type) -> list:
    """The numbers of a list flag."""
    try:
        return [kind(text) for text in texts]
    except ValueError as error:
        raise cli.BadInput(f"--{name}={','.join(texts)} must be numbers.") from error


def flat(row: dict[str, Any]) -> dict[str, float]:
    """One row of the table of numbers."""
    halves = {f"{name}_interval": row["intervals"][name] for name in ("total", "error", "kl")}
    return {name: value for name, value in row.items() if name != "intervals"} | halves


def line(row: dict[str, Any]) -> str:
    """One row for the terminal."""
    return (
        "rho {rho:g} T {tasks} m {samples}: bound {total:.3f} ± {spread:.3f} = {empirical:.3f} "
        "empirical + {environment:.3f} environment + {task:.3f} task (KL {kl:.2f}, std {std:.2g}); "
        "error {error:.3f} ± {half_width:.3f}; all tasks {all_tasks:.3f}, "
        "MR-MAML {mr_maml:.3f}, alone {alone:.3f}"
    ).format(spread=row["intervals"]["total"], **row)


if __name__ == "__main__":
    cli.start(main, __doc__)
