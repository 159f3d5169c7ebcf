"""What noise does, beside what its paper says it does: lines, diversity, convergence, similarity.

    python -m experiments.mechanism --data=sinusoid --labels=fixed_labels --shot=10 --queries=10 \
        --steps=3000 --method='maml(lr=0.01,steps=1)' --stds=0.3,1,3 --out=DIR \
        --noise='noise({},site="outer",relative_to="gradient_rms")'

Trains --method plain and with --noise at every standard deviation of --stds, from the same seeds
and on the same tasks, and reports, over seeds:

  barrier      how far the training loss on the straight line between the plain and the noisy
               solution rises above both (several optima?), and, as "rise", how much higher the
               noisy end is than the plain one;
  spread, cosine, entropy
               of task gradients and query predictions, at each solution and under its inner noise
               (more diverse tasks, less confidence?);
  settled, instability
               the meta-step from which the loss curve stays within 10 % of its end, and how much
               the last half shakes (in the unit of the loss);
  correlation  of a training task's gradient similarity to a test task's stored gradient with what
               one step along it gains on that test task, at the plain solution (does feedback's
               supposition hold?).

Writes mechanism.json and mechanism.png into --out.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from experiments import cli, loading, plots, problem, runs, store
from experiments.scoring import drawn
from experiments.seeds import over_seeds, train
from mgaug_jax import analysis, weighting

LINE = np.linspace(-0.25, 1.25, 31)
TASKS, TESTS, KEY = 64, 8, 50

FLAGS = flags.FLAGS
flags.adopt_module_key_flags(problem)
flags.DEFINE_string("method", "fomaml(lr=0.1,steps=5)", "Spec of the method without noise.")
flags.DEFINE_string("noise", "noise({},site='outer')", "Spec of the noise, {} for its std.")
flags.DEFINE_list("stds", ["0.3", "1", "3"], "Standard deviations, separated by commas.")
flags.DEFINE_integer("seeds", 3, "Seeds 0, 1, ...")
flags.DEFINE_float("rate", 0.1, "Length of the step whose gain is measured.")
flags.DEFINE_string("out", None, "Folder to write to.")


def main(arguments: Sequence[str]) -> int:
    del arguments
    problem.adopt_protocol()
    if FLAGS.seeds < 1:
        raise cli.BadInput(f"--seeds={FLAGS.seeds} must be 1 or more.")
    if not 0 < FLAGS.rate < float("inf"):
        raise cli.BadInput(f"--rate={FLAGS.rate} must be a positive number.")
    if "{}" not in FLAGS.noise:
        raise cli.BadInput(f"--noise={FLAGS.noise} has no {{}} where the std goes.")
    specs = {"0": FLAGS.method}
    specs |= {std: f"{FLAGS.method}|{FLAGS.noise.replace('{}', std)}" for std in FLAGS.stds}
    folder = store.output(FLAGS.out)
    plain = loading.setup(problem.config(FLAGS.method, 0, FLAGS.steps))
    made = {std: runs.with_method(plain, text) for std, text in specs.items()}
    rows: dict[str, dict[str, Any]] = {}
    base = None
    for std, setup in made.items():
        states, losses = train(setup, FLAGS.seeds, f"std {std}")
        base = states.params if base is None else base
        rows[std] = measure(setup, plain, base, states.params, losses)
        print(line(std, rows[std]), flush=True)
    similarity = correlations(plain, base)
    mean, half = over_seeds(similarity["correlation"])
    print(f"similarity and gain: correlation {mean:+.3f} +- {half:.3f} over seeds")
    report = {"method": FLAGS.method, "noise": FLAGS.noise, "rows": rows, "similarity": similarity}
    versions = {"problem": plain.config.__dict__, "versions": store.versions()}
    store.write_json(folder / "mechanism.json", report | versions)
    plots.mechanism(rows, LINE, similarity, folder / "mechanism.png")
    return 0


NUMBERS = ("barrier", "rise", "spread", "cosine", "entropy", "settled", "instability")


def measure(noisy: runs.Setup, plain: runs.Setup, base, params, losses) -> dict[str, Any]:
    """Lists over seeds of `NUMBERS`, and the mean loss along the line."""
    step = jnp.asarray(FLAGS.steps - 1)
    k_line, k_diverse, k_sample = jax.random.split(jax.random.key(KEY), 3)
    keys = jax.vmap(jax.random.fold_in, (None, 0))(k_sample, jnp.arange(TASKS))
    tasks = drawn(plain.sample, keys, plain.splits["train"])
    on_line = jax.jit(partial(analysis.line_losses, plain.method(step), k_line))
    diverse = jax.jit(partial(analysis.diversity, noisy.method(step), k_diverse))
    found: dict[str, Any] = {name: [] for name in NUMBERS}
    lines = []
    for s in range(FLAGS.seeds):
        a, b = (jax.tree.map(lambda leaf, s=s: leaf[s], tree) for tree in (base, params))
        along = np.asarray(on_line(a, b, tasks, jnp.asarray(LINE)))
        lines.append(along)
        inside = along[(LINE >= -1e-9) & (LINE <= 1 + 1e-9)]
        spread, cosine, entropy = map(float, diverse(b, tasks))
        settled, shake = analysis.settling(
            jnp.asarray(losses[s]), max(min(5, len(losses[s])), len(losses[s]) // 50)
        )
        values = (
            float(analysis.barrier(jnp.asarray(inside))),
            float(inside[-1] - inside[0]),
            spread,
            cosine,
            entropy,
            int(settled),
            float(shake),
        )
        for name, value in zip(NUMBERS, values, strict=True):
            found[name].append(value)
    return {**found, "line": np.mean(lines, axis=0).tolist()}


def correlations(made: runs.Setup, base) -> dict[str, list]:
    """Per seed: correlation over training tasks of similarity and gain, mean over test tasks."""
    method = made.method(jnp.zeros((), jnp.int32))
    k_tests, k_tasks, k_probe, k_gain = jax.random.split(jax.random.key(KEY + 1), 4)
    numbered = lambda key, n: jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(n))
    tests = drawn(made.episode, numbered(k_tests, TESTS), made.splits["test"])
    tasks = drawn(made.sample, numbered(k_tasks, TASKS), made.splits["train"])
    probe = jax.jit(partial(weighting.probe_gradients, method, k_probe))
    gain = jax.jit(partial(analysis.similarity_and_gain, method, k_gain))
    found: dict[str, list] = {"correlation": [], "similarity": [], "gain": []}
    for s in range(FLAGS.seeds):
        params = jax.tree.map(lambda leaf, s=s: leaf[s], base)
        stored = probe(params, tests)
        each = []
        for p in range(TESTS):
            row = lambda tree, p=p: jax.tree.map(lambda leaf: leaf[p], tree)
            similar, gained = gain(params, tasks, row(stored), row(tests), FLAGS.rate)
            each.append(float(np.corrcoef(similar, gained)[0, 1]))
            found["similarity"] += np.asarray(similar).tolist()
            found["gain"] += np.asarray(gained).tolist()
        found["correlation"].append(float(np.mean(each)))
    return found


def line(std: str, found: dict[str, Any]) -> str:
    """One row for the terminal."""
    cells = ["{} {:.4g} ± {:.2g}".format(name, *over_seeds(found[name])) for name in NUMBERS]
    return f"std {std}: " + "  ".join(cells)


if __name__ == "__main__":
    cli.start(main, __doc__)
