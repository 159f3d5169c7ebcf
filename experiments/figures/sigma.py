"""The score against the std of noise, and what is memorised, before and after adaptation.

    python -m experiments.figures.sigma --out=DIR
    python -m experiments.figures.sigma --data=sinusoid --labels=fixed_labels --shot=10 \
        --queries=10 --net=mlp --steps=3000 --method='maml(lr=0.01,steps=1)' --stds=1,10,30 \
        --out=DIR

--method (fomaml(lr=0.1,steps=3)) is trained with --noise at every one of --stds and without, on
tasks that are not mutually exclusive, from the same seeds and on the same tasks. Above: test score
after adaptation. Below: training tasks after adaptation and before (step 0), and with permuted
labels; what lies between own and permuted labels is label memory. Bands are 95 % intervals over
seeds.

sigma.csv: sigma (in `unit`), seed, test, test_step0, train, train_step0, permuted (accuracy, or
squared error), metric, unit.
"""

import re
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
from absl import flags

from experiments import cli, loading, problem, runs, scoring
from experiments.figures import figure, judged
from experiments.figures.figure import Rows, by_seed, text, where
from experiments.seeds import train

FLAGS = flags.FLAGS
flags.adopt_module_key_flags(figure)
flags.DEFINE_string(
    "noise", "noise({},site='outer',relative_to='gradient_rms')", "Spec, {} for the std."
)
flags.DEFINE_list("stds", ["0.3", "1", "3"], "Standard deviations, in ascending order.")
flags.adopt_module_key_flags(judged)

DEFAULTS = {
    "net": "conv4(width=16)",
    "labels": "fixed_labels",
    "queries": 3,
    "method": "fomaml(lr=0.1,steps=3)",
}


def main(arguments: Sequence[str]) -> int:
    del arguments
    return figure.make("sigma", measure, draw, tell, **DEFAULTS)


def setups() -> dict[float, runs.Setup]:
    """The method without noise (0) and at every standard deviation.

    Raises:
      BadInput: The noise has no place for its std, or a std is no number above 0.
    """
    if "{}" not in FLAGS.noise:
        raise cli.BadInput(f"--noise={FLAGS.noise} has no {{}} where the std goes.")
    try:
        stds = [float(std) for std in FLAGS.stds]
    except ValueError as error:
        raise cli.BadInput(f"--stds={','.join(FLAGS.stds)} must be numbers.") from error
    if not all(0 < std < float("inf") for std in stds):
        raise cli.BadInput(f"--stds={','.join(FLAGS.stds)} must be numbers above 0.")
    plain = loading.setup(problem.config(FLAGS.method, 0, FLAGS.steps), say=print)
    noisy = lambda std: f"{FLAGS.method}|{FLAGS.noise.replace('{}', repr(std))}"
    return {0.0: plain} | {std: runs.with_method(plain, noisy(std)) for std in stds}


def unit() -> str:
    """What sigma is a multiple of."""
    found = re.search(r"relative_to=.(\w+)", FLAGS.noise)
    names = {"gradient_rms": "rms of gradient", "weight_rms": "rms of weights"}
    names |= {"leaf_rms": "rms of leaf's gradient"}
    return names.get(found[1], found[1]) if found else "gradient's unit"


def measure(folder: Path) -> Rows:
    del folder
    if FLAGS.episodes < 1:
        raise cli.BadInput(f"--episodes={FLAGS.episodes} must be 1 or more.")
    rows: Rows = []
    for sigma, made in setups().items():
        if made.permuted is None:
            raise cli.BadInput("there is nothing to be memorised here; take --labels=fixed_labels.")
        states, _ = train(made, FLAGS.seeds, f"std {sigma:g}")
        judge, memory = scoring.evaluator(made), scoring.on_training(made)
        for seed in range(FLAGS.seeds):
            params = jax.tree.map(lambda leaf, s=seed: leaf[s], states.params)
            test = judge(params, made.splits["test"], scoring.TEST_SEED, FLAGS.episodes)
            own, gain = memory(params, count=FLAGS.episodes)
            sign = 1 if made.metric == "accuracy" else -1
            values = {
                "test": test.adapted,
                "test_step0": test.initial,
                "train": own.adapted,
                "train_step0": own.initial,
                "permuted": own.adapted - sign * gain,
            }
            means = {name: float(np.mean(value)) for name, value in values.items()}
            what = {"metric": made.metric, "unit": unit()}
            rows.append({"sigma": sigma, "seed": seed, **means, **what})
        print(f"std {sigma:g}: test {text(by_seed(where(rows, sigma=sigma), 'test'))}", flush=True)
    return rows


def draw(rows: Rows):
    drawn, ((top,), (bottom,)) = figure.axes(2, height=3.4, sharex=True)
    figure.line(top, rows, "sigma", "test", 0, "test tasks, adapted")
    shown = {
        "train": "training tasks, adapted",
        "permuted": "labels permuted, adapted",
        "train_step0": "training tasks, step 0",
    }
    for i, (name, label) in enumerate(shown.items(), 1):
        figure.line(bottom, rows, "sigma", name, i, label)
    least = min(row["sigma"] for row in rows if row["sigma"])
    score = "accuracy" if rows[0]["metric"] == "accuracy" else "squared error"
    bottom.set_xscale("symlog", linthresh=least, linscale=0.5)
    bottom.set_xticks(sigmas := figure.distinct(rows, "sigma"), [f"{s:g}" for s in sigmas])
    bottom.set_xticks([], minor=True)
    bottom.set_xlabel(rf"$\sigma$ of the noise ({rows[0]['unit']})")
    for ax in (top, bottom):
        ax.set_ylabel(score)
        ax.legend()
    return drawn


def tell(rows: Rows) -> list[str]:
    """Every sigma's scores, and the paired difference of the test to no noise."""
    lines = []
    base = np.array(by_seed(where(rows, sigma=0.0), "test"))
    for sigma in figure.distinct(rows, "sigma"):
        found = where(rows, sigma=sigma)
        names = ("test", "test_step0", "train", "train_step0", "permuted")
        cells = "  ".join(f"{name} {text(by_seed(found, name))}" for name in names)
        sign = 1 if found[0]["metric"] == "accuracy" else -1
        memory = sign * np.subtract(by_seed(found, "train"), by_seed(found, "permuted"))
        change = np.array(by_seed(found, "test")) - base
        lines.append(f"sigma {sigma:g}: {cells}")
        lines.append(f"  label memory {text(memory)}; test minus no noise {text(change)}")
    return lines


if __name__ == "__main__":
    cli.start(main, __doc__)
