r"""Trains a method with many settings and seeds as one program, and shows which setting is best.

    python -m experiments.sweep --data=sinusoid --method='maml(lr=LR,steps=1)|noise(STD)' \
        --values='LR=log(0.001,0.1,5); STD=0,0.1,1; outer_lr=0.001,0.003' --seeds=3 --out=DIR

Names in the spec stand for numbers that --values gives as lists, or as log(low,high,count) or
linear(low,high,count); outer_lr is that of Adam in the outer loop. --design=random or sobol takes
--points of the ranges log(low,high) instead of every combination. Any real number of a method can
be varied; what changes its structure (steps, subnets, another method) cannot: methods separated by
semicolons, with {a,b} for alternatives, are swept one after another.

Settings times seeds are members of one program, as many at once as --memory_gb holds, spread over
the devices of --mesh. Each is what a run of its own would be; one that becomes not finite stops
where it was and disturbs no other. Seeds share tasks and initial networks across settings.

Every member is judged on the same validation and test episodes with its last parameters. The best
setting is that with the best validation mean over seeds. Writes sweep.csv (one row per member),
sweep.json and sweep.png into --out. Interrupted, it saves and exits with 75; the same command goes
on.
"""

import dataclasses
import json
import shutil
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from experiments import (
    cli,
    design,
    devices,
    loading,
    plots,
    problem,
    runs,
    scoring,
    seeds,
    spec,
    store,
)
from experiments.progress import Progress
from mgaug_jax import checkpoint, sharding, sweeps
from mgaug_jax.evaluation import evaluate
from mgaug_jax.memory import taken
from mgaug_jax.types import Array

SECONDS, SAVE_SECONDS = 2.0, 120.0
SCORES = ("validation", "test", "test_half_width", "test_step0", "loss")
COLUMNS = ("method", "seed", *SCORES, "stopped")
SHARED = 0
"""Seed of what all members of a sweep have in common."""

FLAGS = flags.FLAGS
flags.adopt_module_key_flags(problem)
flags.adopt_module_key_flags(devices)
flags.DEFINE_string("method", None, "Specs with names for numbers; semicolons and {a,b} as above.")
flags.DEFINE_string("values", None, "What the names stand for: LR=log(0.001,0.1,5); STD=0,1.")
flags.DEFINE_string("design", "grid", f"How settings are chosen: {', '.join(design.DESIGNS)}.")
flags.DEFINE_integer("points", 16, "Settings of a random or sobol design.")
flags.DEFINE_integer("design_seed", 0, "Seed of a random or sobol design.")
flags.DEFINE_integer("seeds", 3, "How many seeds, 0, 1, ..., every setting is trained with.")
flags.DEFINE_integer("episodes", 200, "Validation and test episodes per member.")
flags.DEFINE_float("memory_gb", 4.0, "What members trained at once may take, per device.")
flags.DEFINE_string("out", None, "Folder to write to.")


def main(arguments: Sequence[str]) -> int:
    del arguments
    problem.adopt_protocol()
    if FLAGS.method is None:
        raise cli.BadInput("--method is missing; --help shows an example.")
    for name in ("seeds", "episodes", "memory_gb"):
        if getattr(FLAGS, name) <= 0:
            raise cli.BadInput(f"--{name} must be above 0.")
    axes = design.parse(FLAGS.values or "")
    points = design.points(axes, FLAGS.design, FLAGS.points, FLAGS.design_seed)
    methods = seeds.expand(FLAGS.method)
    folder = store.output(FLAGS.out)
    plain = problem.config("fomaml", 0, FLAGS.steps)
    made = runs.on_devices(loading.setup(plain, say=print), devices.mesh())
    for text in methods:
        check(made, text, points)
    with store.locked(folder), cli.Interruption() as stop:
        table = open_table(folder, made, axes, methods, points)
        for number, text in enumerate(methods):
            sweep(made, text, number, points, folder, table, stop)
    print_best(table["rows"], axes, made.metric)
    plots.sweep(table["rows"], axes, made.metric, folder / "sweep.png")
    print(f"wrote {folder / 'sweep.csv'}, sweep.json and sweep.png")
    if all(row["stopped"] is not None for row in table["rows"]):
        raise cli.NotFinite("no member stayed finite. Lower the learning rates.")
    return 0


def check(made: runs.Setup, text: str, points: list[dict[str, float]]) -> None:
    """Refuses settings that the method does.

    Raises:
      BadInput: It does, or a name stands for nothing.
    """
    for name in points[0].keys() - spec.names(text) - {"outer_lr"}:
        raise cli.BadInput(
            f"--values gives {name}, which no argument of {text!r} is; write argument={name} there."
        )
    if taken_names := points[0].keys() & set(COLUMNS):
        raise cli.BadInput(f"{min(taken_names)} is a column of the table; call it otherwise.")
    for point in points:
        if point.get("outer_lr", 1) <= 0:
            raise cli.BadInput(f"outer_lr={point['outer_lr']} must be a positive number.")
        try:
            runs.with_numbers(made, text, point)
        except cli.BadInput as error:
            raise cli.BadInput(f"{error} ({_words(point)})") from error


def open_table(folder: Path, made: runs.Setup, axes, methods, points) -> dict[str, Any]:
    """The table in `folder`, or an empty one.

    Raises:
      BadInput: The folder holds a table of another sweep.
    """
    identity = {
        "config": dataclasses.asdict(made.config) | {"eval_every": None},
        "methods": methods,
        "points": points,
        "seeds": FLAGS.seeds,
        "episodes": FLAGS.episodes,
        "digests": made.digests,
    }
    empty = {"identity": identity, "metric": made.metric, "axes": [a.name for a in axes]}
    if not (folder / "sweep.json").exists():
        if any(path.name != store.LOCK for path in folder.iterdir()):
            raise cli.BadInput(f"{folder} is not empty and holds no sweep; choose another --out.")
        store.write_json(folder / "sweep.json", {**empty, "rows": []})
    table = json.loads((folder / "sweep.json").read_text())
    if table.get("identity") != json.loads(json.dumps(identity)):
        raise cli.BadInput(f"{folder} holds a sweep with other flags; choose another --out.")
    for row in table["rows"]:  # JSON has no NaN
        row |= {name: float("nan") for name in SCORES if row[name] is None}
    return table


def sweep(made, text: str, number: int, points, folder: Path, table, stop) -> None:
    """Trains and judges the members of a method, group by group, and adds their rows."""
    program = Program(made, text)
    keys = [jnp.stack(pair) for pair in zip(*map(runs.keys, range(FLAGS.seeds)), strict=True)]
    done = sum(row["method"] == text for row in table["rows"]) // FLAGS.seeds
    if done == len(points):
        return
    size = program.fitting(points, keys, FLAGS.memory_gb)
    for first in range(done, len(points), size):
        group = points[first : first + size]
        filled = [group[i % len(group)] for i in range(size)]  # so that all groups are one program
        values = {name: jnp.array([point[name] for point in filled]) for name in filled[0]}
        place = folder / "checkpoints" / f"{number}-{first}-{size}"
        members, losses = train(program, values, keys, f"{text} {first + 1}", place, stop)
        print(f"judging {len(group)} settings x {FLAGS.seeds} seeds", flush=True)
        scores = {
            name: program.judge(values, members, name, seed)
            for name, seed in (("val", scoring.VALIDATION_SEED), ("test", scoring.TEST_SEED))
        }
        stopped = np.asarray(members.stopped)
        for k, point in enumerate(group):
            for s in range(FLAGS.seeds):
                test = scoring.summary(scores["test"].adapted[k, s])
                row = {"method": text, **point, "seed": s}
                row["validation"] = float(scores["val"].adapted[k, s].mean())
                row |= {"test": test["mean"], "test_half_width": test["half_width"]}
                row["test_step0"] = float(scores["test"].initial[k, s].mean())
                row["loss"] = float(losses[k, s])
                row["stopped"] = int(stopped[k, s]) if stopped[k, s] >= 0 else None
                table["rows"].append(row)
        store.write_json(folder / "sweep.json", table)
        store.write_csv(folder / "sweep.csv", table["rows"])
        shutil.rmtree(place, ignore_errors=True)


def train(program, values, keys, label: str, place: Path, stop) -> tuple[sweeps.Members, Any]:
    """The members of a group after the last step, and their mean losses in the last tenth.

    Raises:
      Interrupted: `stop` was requested; they are saved in `place`.
    """
    steps = program.made.config.steps
    late = steps - max(1, steps // 10)
    members = program.begin(values, keys[0])
    losses = jnp.zeros(members.stopped.shape)
    step = 0
    if checkpoint.steps(place):
        try:
            found = checkpoint.restore(place, (members, losses))
        except checkpoint.CheckpointError as error:
            raise cli.BadInput(f"{error}; remove {place} to begin its members anew.") from error
        (members, losses), step = found.tree, found.step
        print(f"resumed at step {step}")
    members = jax.tree.map(jnp.array, members)
    progress, size, saved = Progress(label, steps, step, "steps"), 1, time.monotonic()
    while step < steps:
        count = min(size, (late if step < late else steps) - step)
        before = time.monotonic()
        members, loss = program.advance(values, keys[1], members, step, count)
        jax.block_until_ready(members)
        size = max(1, int(SECONDS / max(time.monotonic() - before, 1e-9) * count))
        step += count
        if step > late:
            losses = losses + loss * count / (steps - late)
        alive = int((members.stopped < 0).sum())
        line = progress.at(step, f"{alive} of {members.stopped.size} finite")
        if stop.requested or time.monotonic() - saved > SAVE_SECONDS:
            checkpoint.save(place, step, (members, losses), keep=1)
            saved = time.monotonic()
            print(f"{label}: {line}", flush=True)
        if stop.requested:
            progress.close()
            raise cli.Interrupted(f"saved at step {step}; the same command goes on.")
    progress.close()
    return members, losses


class Program:
    """A method's members, compiled: settings are arrays by name, keys those of the seeds."""

    def __init__(self, made: runs.Setup, text: str):
        self.made, self.text = made, text
        alone = made._replace(mesh=None)
        self.at = lambda value: runs.with_numbers(alone, text, value)
        self.make = lambda value: self.at(value).trainer
        self.compiled: dict[str, Any] = {}

    def _compiled(self, name: str, f, **options):
        """`f(whole, values, members)` of every member under jit, on the devices of the mesh."""
        if name not in self.compiled:
            over = f if self.made.mesh is None else partial(sharding.spread, f, self.made.mesh)
            self.compiled[name] = jax.jit(over, **options)
        return self.compiled[name]

    def _advance(self, values):
        return self._compiled("advance", partial(self._chunk, self._net(values)), donate_argnums=2)

    def _chunk(self, net, whole, values, members):
        keys, data, step, count, shared = whole
        sample = self.made.sample
        return sweeps.advance(
            self.make, net, sample, values, keys, members, data, step, count, shared
        )

    def _net(self, values):
        first = {name: float(value[0]) for name, value in values.items()}
        return self.at(first).method(jnp.zeros((), jnp.int32)).net

    def begin(self, values, keys: Array) -> sweeps.Members:
        start = lambda values, keys: sweeps.begin(self.make, self._net(first), values, keys)
        first = {name: np.asarray(value) for name, value in values.items()}
        if "begin" not in self.compiled:
            self.compiled["begin"] = jax.jit(lambda values, keys: runs.wide(start(values, keys)))
        return self.compiled["begin"](values, keys)

    def _given(self, values, keys: Array, step: int, count: int):
        numbers = (np.int32(step), np.int32(count), jax.random.key(SHARED))
        return runs.put(self.made, ((keys, self.made.splits["train"], *numbers), values))

    def advance(self, values, keys: Array, members: sweeps.Members, step: int, count: int):
        return self._advance(values)(*self._given(values, keys, step, count), members)

    def fitting(self, points, keys, gigabytes: float) -> int:
        """How many settings are trained at once, by what the compiled program says it needs."""
        least = 1 if self.made.mesh is None else self.made.mesh.size
        size = -(-len(points) // least) * least
        while True:
            some = [points[i % len(points)] for i in range(size)]
            values = {name: jnp.array([point[name] for point in some]) for name in points[0]}
            members = self.begin(values, keys[0])
            given = self._given(values, keys[1], 0, 1)
            needed = taken(self._advance(values).lower(*given, members).compile()) / 1e9
            seeds = f"{size} settings x {len(keys[0])} seeds at once"
            print(f"{seeds}: {needed:.3f} GB per device", flush=True)
            if needed > gigabytes and size <= least:
                print(f"note: fewer cannot be, though --memory_gb={gigabytes} is less", flush=True)
            if needed <= gigabytes or size <= least:
                return size
            size = max(1, int(size * gigabytes / needed / 1.05) // least) * least

    def judge(self, values, members: sweeps.Members, split: str, seed: int):
        """Scores `[K, S, episodes]` on a split, in NumPy."""
        made = self.made

        def judged(whole, values, params):
            key, data = whole

            def one(value, params):
                tested = self.at(value).tested
                score = scoring.score_of(made.metric)
                numbers = jnp.arange(FLAGS.episodes)
                return evaluate(tested, key, params, made.episode, data, numbers, score)

            of_value = lambda both: jax.lax.map(partial(one, both[0]), both[1])
            return jax.lax.map(of_value, (values, params))

        whole, values = runs.put(made, ((scoring.episode_key(seed), made.splits[split]), values))
        return jax.device_get(self._compiled(split, judged)(whole, values, members.params))


def by_setting(rows: list[dict[str, Any]], names: list[str]) -> list[dict[str, Any]]:
    """Rows of means over seeds, those of a setting of which a member stopped being NaN."""
    groups: dict[tuple, list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["method"], *(row[name] for name in names)), []).append(row)
    found = []
    for (method, *point), members in groups.items():
        finite = all(row["stopped"] is None for row in members)
        entry = {"method": method, **dict(zip(names, point, strict=True))}
        for name in ("validation", "test", "test_step0"):
            values = [row[name] if finite else float("nan") for row in members]
            entry[name], entry[f"{name}_half_width"] = seeds.over_seeds(values)
        found.append(entry)
    return found


def print_best(rows: list[dict[str, Any]], axes: list[design.Axis], metric: str) -> None:
    """The best setting of every method, by validation."""
    names, sign = [axis.name for axis in axes], 1 if metric == "accuracy" else -1
    settings = by_setting(rows, names)
    for method in dict.fromkeys(row["method"] for row in rows):
        finite = [
            s for s in settings if s["method"] == method and s["validation"] == s["validation"]
        ]
        if not finite:
            print(f"{method}: no setting stayed finite")
            continue
        best = max(finite, key=lambda setting: sign * setting["validation"])
        print(
            f"{method}: best of {len(finite)} settings by validation: "
            f"{_words({name: best[name] for name in names})}, validation {best['validation']:.4f}, "
            f"test {metric} {best['test']:.4f} ± {best['test_half_width']:.4f} over seeds"
        )
    if stopped := sum(row["stopped"] is not None for row in rows):
        print(f"note: {stopped} of {len(rows)} members became not finite and stopped there")


def _words(point: dict[str, float]) -> str:
    return ", ".join(f"{name}={value:.4g}" for name, value in point.items())


if __name__ == "__main__":
    cli.start(main, __doc__)
