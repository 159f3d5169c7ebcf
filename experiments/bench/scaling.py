"""How the time and memory of a meta-step grow with its problem; part of `experiments.benchmark`."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from experiments import plots, store
from experiments.bench import ours, turns
from experiments.bench.workloads import SINUSOID, Problem
from experiments.progress import Progress

BASE = Problem(
    "fomaml", (42, 42, 3), queries=5, tasks=4, width=32, steps=5, keeps=(0.9,) * 3, devices=1
)
AXES: dict[str, tuple[str, Sequence[int]]] = {
    "tasks": ("tasks T", (1, 2, 4, 8)),
    "keeps": ("sub-networks U", (0, 1, 3, 7)),
    "steps": ("inner steps", (1, 2, 5, 10)),
    "image": ("image side", (21, 42, 84)),
    "width": ("channels", (16, 32, 64)),
    "configurations": ("perceptrons K, T = 25", (1, 2, 4, 8, 16, 32)),
    "small": ("perceptrons K, T = 4", (1, 4, 8, 16, 32, 64)),
    "networks": ("Conv-4s K", (1, 2, 4)),
}
"""What is varied. The last three are configurations of one program, of sinusoids and of images,
which are compared to one after another."""
SWEPT = {
    "configurations": SINUSOID,
    "small": SINUSOID._replace(tasks=4),
    "networks": BASE._replace(image=(28, 28, 1), keeps=()),
}


def axes() -> dict[str, tuple[str, Sequence[int]]]:
    """What is varied; of several devices also over how many the tasks are spread, evenly."""
    counts = [n for n in range(1, jax.device_count() + 1) if BASE.tasks % n == 0]
    return AXES | ({"devices": ("devices", counts)} if len(counts) > 1 else {})


def at(axis: str, value: int) -> Problem:
    """The base problem with one of its sizes changed."""
    if axis in SWEPT:
        return SWEPT[axis]._replace(configurations=value)
    if axis == "image":
        return BASE._replace(image=(value, value, 3))
    return BASE._replace(**{axis: (0.9,) * value if axis == "keeps" else value})


def run(folder: Path | None, repeats: int, limit: float) -> int:
    """Measures, prints, and writes scaling.csv and scaling.png where there is a folder."""
    rows: list[dict[str, Any]] = []
    sizes = axes()
    total = sum(len(values) for _, values in sizes.values())
    progress = Progress("scaling", total, unit="sizes")
    print(f"base: {BASE._asdict()}")
    for axis, (label, values) in sizes.items():
        made = {}
        for value in values:
            progress.at(len(rows) + len(made), f"{label} {value}")
            make = ours.together if axis in SWEPT else ours.contender
            made[value] = make(at(axis, value))
            made[value].step()
        steps = {str(value): contender.step for value, contender in made.items()}
        if axis in SWEPT:
            steps["alone"] = ours.in_turn(at(axis, 1)).step
            steps["alone"]()
        taken = turns.take_turns(steps, repeats, limit)
        found = {side: turns.summary(taken[side], limit) for side in steps}
        progress.close()
        for value, contender in made.items():
            row = {"axis": axis, "value": value, **found[str(value)]}
            row |= {"temporary": contender.temporary, "compile": contender.compile}
            gain = value * found["alone"]["seconds"] / row["seconds"] if axis in SWEPT else None
            rows.append({**row, "gain": gain})
            memory = (contender.temporary or 0) / 1e6
            print(
                f"{label:<21} {value:4d}  {row['seconds']:8.4f} s  {row['cpu_seconds']:8.4f} CPU s"
                f"  {memory:7.1f} MB  compiled in {contender.compile:.1f} s"
                + ("" if gain is None else f"  {gain:.2f} of one after another"),
                flush=True,
            )
    if folder is not None:
        labels = {axis: label for axis, (label, _) in sizes.items()}
        plots.scaling(rows, labels, folder / "scaling.png")
        store.write_csv(folder / "scaling.csv", rows)
    return 0
