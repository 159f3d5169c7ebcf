r"""Trains a method with many settings and seeds as one program, and shows which setting is best.

    python -m experiments.sweep --data=sinusoid --method='maml(lr=LR,steps=1)|noise(STD)' \
        --values='LR=log(0.001,0.1,5); STD=0,0.1,1; outer_lr=0.001,0.003' --seeds=3 --out=DIR

Names in the spec stand for numbers that --values gives as lists, or as log(low,high,count) or
linear(low,high,count); outer_lr is that of Adam in the outer loop. --design=random or sobol takes
--points of the ranges log(low,high) instead of every combination. Any real number of a method can
be varied; what changes its structure (steps, subnets, another method) cannot: methods separated by
semicolons, with {a,b} for alternatives, are swept one after another.

Settings times seeds are members of one program, as many at once as --memory_gb holds, spread over
the devices of --mesh; on a CPU, of a network without convolutions, as many as keep their
temporaries below --cache_mb, since more would be slower. Each is what a run of its own would be
(but for the resolutions of sub-networks, cp(sizes=...), which all members share); one that becomes
not finite stops where it was and disturbs no other. Seeds share tasks and initial networks across
settings.

Every member is judged on the same validation and test episodes with its last parameters. The best
setting is that with the best validation mean over seeds. Writes sweep.csv (one row per member),
sweep.json and sweep.png into --out. Interrupted, it saves and exits with 75; the same command goes
on.
"""

import dataclasses
import json
import math
import shutil
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
from absl import flags

from experiments import (
    cli,
    design,
    devices,
    loading,
    members,
    plots,
    problem,
    runs,
    scoring,
    seeds,
    spec,
    store,
)

SCORES = ("validation", "test", "test_half_width", "test_step0", "loss")
COLUMNS = ("method", "seed", *SCORES, "stopped")
CACHE_MB = 30.0
"""Measured on one machine, where 30 was fast and 40 slow."""

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
flags.DEFINE_float(
    "cache_mb",
    None,
    "What the temporaries of batched members may take of the caches, of all devices together; 0: "
    f"anything. Default: {CACHE_MB:.0f} on a CPU, 0 on others.",
    lower_bound=0,
)
flags.DEFINE_string("out", None, "Folder to write to.")


def main(arguments: Sequence[str]) -> int:
    del arguments
    devices.divide(FLAGS.mesh)
    problem.adopt_protocol()
    if FLAGS.method is None:
        raise cli.BadInput("--method is missing; --help shows an example.")
    for name in ("seeds", "episodes", "memory_gb"):
        if getattr(FLAGS, name) <= 0:
            raise cli.BadInput(f"--{name} must be above 0.")
    if FLAGS.design == "grid" and FLAGS["points"].present:
        raise cli.BadInput("--points is for a random or sobol design; a grid takes all values.")
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
    try:
        table = json.loads((folder / "sweep.json").read_text())
    except ValueError as error:
        raise cli.BadInput(f"{folder}/sweep.json is damaged ({error}); remove it.") from error
    if table.get("identity") != json.loads(json.dumps(identity)):
        raise cli.BadInput(f"{folder} holds a sweep with other flags; choose another --out.")
    for row in table["rows"]:  # JSON has no NaN
        row |= {name: float("nan") for name in SCORES if row[name] is None}
    return table


def sweep(made, text: str, number: int, points, folder: Path, table, stop) -> None:
    """Trains and judges the members of a method, group by group, and adds their rows."""
    done = sum(row["method"] == text for row in table["rows"]) // FLAGS.seeds
    if done == len(points):
        return
    program = members.program(made, text, points[0], FLAGS.seeds, FLAGS.episodes)
    limits = FLAGS.memory_gb, cache_mb()
    for group, values in members.groups(program, points, done, *limits):
        size = len(next(iter(values.values())))
        place = folder / "checkpoints" / f"{number}-{done}-{size}"
        label = f"{text}, settings {done + 1} to {done + len(group)} of {len(points)}"
        trained, losses = members.train(program, values, label, place, stop)
        print(f"judging {len(group)} settings x {FLAGS.seeds} seeds", flush=True)
        judged = partial(program.judge, values, trained.params)
        validation = judged("val", scoring.VALIDATION_SEED)
        test = judged("test", scoring.TEST_SEED)
        for k, point in enumerate(group):
            for s in range(FLAGS.seeds):
                stopped = int(trained.stopped[k, s])
                found = scoring.summary(test.adapted[k, s])
                scores = (
                    float(validation.adapted[k, s].mean()),
                    found["mean"],
                    found["half_width"],
                    float(test.initial[k, s].mean()),
                    float(losses[k, s]),
                )
                row = {"method": text, **point, "seed": s, **dict(zip(SCORES, scores, strict=True))}
                table["rows"].append(row | {"stopped": stopped if stopped >= 0 else None})
        done += len(group)
        store.write_json(folder / "sweep.json", table)
        store.write_csv(folder / "sweep.csv", table["rows"])
        shutil.rmtree(place, ignore_errors=True)


def cache_mb() -> float:
    """What temporaries may take."""
    found = FLAGS.cache_mb
    if found is None:
        found = CACHE_MB if jax.default_backend() == "cpu" else 0
    return found or math.inf


def by_setting(rows: list[dict[str, Any]], names: list[str]) -> list[dict[str, Any]]:
    """Rows of means over seeds, those of a setting of which a member stopped being NaN."""
    groups: dict[tuple, list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["method"], *(row[name] for name in names)), []).append(row)
    found = []
    for (method, *point), own in groups.items():
        finite = all(row["stopped"] is None for row in own)
        entry = {"method": method, **dict(zip(names, point, strict=True))}
        for name in ("validation", "test", "test_step0"):
            values = [row[name] if finite else float("nan") for row in own]
            entry[name], entry[f"{name}_half_width"] = seeds.over_seeds(values)
        found.append(entry)
    return found


def print_best(rows: list[dict[str, Any]], axes: list[design.Axis], metric: str) -> None:
    """The best setting of every method, by validation."""
    names, sign = [axis.name for axis in axes], 1 if metric == "accuracy" else -1
    settings = by_setting(rows, names)
    for method in dict.fromkeys(row["method"] for row in rows):
        own = [setting for setting in settings if setting["method"] == method]
        finite = [setting for setting in own if math.isfinite(setting["validation"])]
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
