"""experiments.sweep as a user meets it, and the designs it takes."""

import csv
import dataclasses
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from entry import Entries

from experiments import design, loading, members, runs, scoring, spec, store
from experiments.cli import BadInput
from mgaug_jax import loops
from mgaug_jax.evaluation import evaluate

ROOT = Path(__file__).parents[1]
SPEC = "maml(lr=LR,steps=1)|noise(STD)"
FLAGS = ("--data=sinusoid", "--net=mlp((6,))", "--shot=4", "--queries=4", "--tasks=2")
FLAGS += ("--seeds=2", "--episodes=10")
ENTRIES = Entries()


def command(out, *more, steps=6, values="LR=0.01,1e30; STD=0,0.5; outer_lr=0.01"):
    return [
        *(sys.executable, "-m", "experiments.sweep", *FLAGS, f"--method={SPEC}"),
        *(f"--values={values}", f"--steps={steps}", f"--out={out}", *more),
    ]


def run(*arguments, **options):
    return ENTRIES.run("sweep", *command(*arguments, **options)[3:])


@pytest.fixture(scope="module", autouse=True)
def processes():
    yield
    ENTRIES.close()


# --- designs --------------------------------------------------------------------------------


def test_a_grid_is_every_combination_in_order():
    axes = design.parse("a=1,2; b=log(0.01,1,3);c=linear(0,1,2)")
    points = design.points(axes, "grid", 0, 0)
    assert len(points) == 12
    assert points[0] == {"a": 1.0, "b": pytest.approx(0.01), "c": 0.0}
    assert [point["b"] for point in points[:6:2]] == pytest.approx([0.01, 0.1, 1.0])
    assert points[-1] == pytest.approx({"a": 2.0, "b": 1.0, "c": 1.0})


@pytest.mark.parametrize("kind", ["random", "sobol"])
def test_points_fill_their_ranges_evenly_on_their_scale(kind):
    axes = design.parse("lr=log(0.001,1); std=linear(-2,2)")
    points = design.points(axes, kind, 512, 3)
    assert len(points) == 512
    unit = np.array([[np.log10(p["lr"]) / 3 + 1, (p["std"] + 2) / 4] for p in points])
    assert (unit >= 0).all()
    assert (unit <= 1).all()
    tolerance = 0.06 if kind == "random" else 0.003  # 4.6 standard errors; Sobol is far closer
    np.testing.assert_allclose(unit.mean(0), 0.5, atol=tolerance)
    np.testing.assert_allclose((unit**2).mean(0), 1 / 3, atol=tolerance)
    assert design.points(axes, kind, 512, 3) == points
    assert design.points(axes, kind, 512, 4) != points


def test_only_names_of_arguments_count():
    assert spec.names("maml(lr=LR,steps=1)|noise(STD)") == {"LR", "STD"}
    assert spec.names("maml(lr=0.1)|noise(0.1)") == set()
    assert spec.names("maml(lr=") == set()


BAD = {
    "": "--values is missing",
    "LR": "is not name=values",
    "0=1": "is not name=values",
    "LR=a,b": "is not a list of numbers",
    "LR=1,nan": "all must be finite",
    "LR=log(0,1,3)": "the range is empty",
    "LR=log(1,0.1,3)": "the range is empty",
    "LR=linear(0,1,1)": "two values or more",
    "LR=log(0.1,1,x)": "is not a list of numbers",
    "LR=1;LR=2": "gives LR twice",
}


@pytest.mark.parametrize("text", BAD)
def test_a_value_that_cannot_be_read_is_refused(text):
    with pytest.raises(BadInput, match=BAD[text]):
        design.parse(text)


def test_designs_say_what_they_lack():
    ranges, lists = design.parse("a=log(1,2)"), design.parse("a=1")
    with pytest.raises(BadInput, match="grid needs the number of values of a"):
        design.points(ranges, "grid", 0, 0)
    with pytest.raises(BadInput, match="sobol design needs a range of a"):
        design.points(lists, "sobol", 4, 0)
    with pytest.raises(BadInput, match="none of grid, random, sobol"):
        design.points(lists, "hyperband", 4, 0)
    with pytest.raises(BadInput, match="must be 1 or more"):
        design.points(ranges, "random", 0, 0)


# --- the entry point ------------------------------------------------------------------------


def test_a_sweep_is_its_single_runs_and_goes_on_where_it_was(tmp_path):
    done = run(tmp_path)
    assert done.returncode == 0, done.stderr
    assert "best of 2 settings by validation: LR=0.01," in done.stdout
    assert "4 of 8 members became not finite" in done.stdout
    with (tmp_path / "sweep.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 8
    made = loading.setup(runs.Config(**config(tmp_path)))
    for row in rows:
        if float(row["LR"]) > 1:
            assert int(row["stopped"]) < 6
            continue
        assert row["stopped"] == ""
        point = {"LR": float(row["LR"]), "STD": float(row["STD"]), "outer_lr": 0.01}
        single = runs.with_numbers(made, SPEC, point)
        k_init, k_train = runs.keys(int(row["seed"]))
        state = jax.jit(single.trainer.init)(k_init)
        state, _ = jax.jit(lambda k, s, m=single: loops.run(m.trainer, m.sample, k, s, None, 6))(
            k_train, state
        )
        key, score = scoring.episode_key(scoring.TEST_SEED), scoring.score_of(made.metric)
        judged = evaluate(single.tested, key, state.params, made.episode, None, 10, score)
        assert float(row["test"]) == pytest.approx(float(judged.adapted.mean()), rel=1e-4)
    assert (tmp_path / "sweep.png").stat().st_size > 5000

    before = (tmp_path / "sweep.csv").read_bytes()
    again = run(tmp_path)
    assert again.returncode == 0, again.stderr
    assert "judging" not in again.stdout
    assert (tmp_path / "sweep.csv").read_bytes() == before
    table = json.loads((tmp_path / "sweep.json").read_text())
    assert {row["LR"] for row in table["rows"]} == {0.01, 1e30}
    other = run(tmp_path, steps=7)
    assert other.returncode == 2
    assert "holds a sweep with other flags" in other.stderr


def config(out):
    table = json.loads((out / "sweep.json").read_text())
    found = table["identity"]["config"] | {"eval_every": 1}
    return {field.name: found[field.name] for field in dataclasses.fields(runs.Config)}


@pytest.mark.slow
def test_an_interrupted_sweep_goes_on(tmp_path):
    values = "LR=0.01,0.02; STD=0,0.5"
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert run(whole, steps=4000, values=values).returncode == 0
    fast = os.environ | {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    line = command(parts, steps=4000, values=values)
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(line, cwd=ROOT, env=fast, **pipes)
    while "at once" not in process.stdout.readline():
        assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 75, said
    assert "the same command goes on" in said
    done = run(parts, steps=4000, values=values)
    assert done.returncode == 0, done.stderr
    assert "resumed at step" in done.stdout
    rows = [json.loads((out / "sweep.json").read_text())["rows"] for out in (whole, parts)]
    for a, b in zip(*rows, strict=True):
        assert a["test"] == pytest.approx(b["test"], rel=1e-5)


def test_names_must_match_and_values_be_possible(tmp_path):
    one = run(tmp_path, values="LR=0.01; STD=1; K=2")
    assert one.returncode == 2
    assert "gives K, which no argument of" in one.stderr
    column = run(tmp_path, values="LR=0.01; STD=1; seed=2")
    assert column.returncode == 2
    negative = run(tmp_path, values="LR=0.01; STD=-1,1")
    assert negative.returncode == 2
    assert "STD=-1" in negative.stderr
    assert not list(tmp_path.iterdir()) or {p.name for p in tmp_path.iterdir()} == {store.LOCK}


def test_numbers_of_a_spec_may_be_traced():
    made = loading.setup(runs.Config(**plain()))

    @jax.jit
    def rate(lr):
        return runs.with_numbers(made, "maml(lr=LR,steps=1)", {"LR": lr}).trainer.init(
            jax.random.key(0)
        )

    assert jax.tree.all(jax.tree.map(lambda x: jnp.isfinite(x).all(), rate(0.1)))
    with pytest.raises(BadInput, match="not a literal"):
        runs.with_numbers(made, "maml(lr=LR,steps=1)", {"STD": 1.0})


def plain():
    return {
        "method": "fomaml",
        "net": "mlp((6,))",
        "data": "sinusoid",
        "data_dir": None,
        "labels": "exclusive",
        "way": 5,
        "shot": 4,
        "queries": 4,
        "tasks": 2,
        "steps": 6,
        "outer_lr": 0.01,
        "eval_every": 6,
        "seed": 0,
    }


def test_groups_fill_one_size_and_go_on_where_they_were():
    """A stand-in for a program that takes 1 GB per setting and has two devices."""
    points = [{"LR": float(i)} for i in range(7)]
    program = members.Program(
        steps=1,
        least=2,
        begin=lambda values: values,
        advance=None,
        memory=lambda values, started: (
            int(1e9) * len(started["LR"]),
            int(1e6) * len(started["LR"]),
        ),
        batched=True,
        judge=None,
    )
    found = list(members.groups(program, points, 0, 4.3))
    assert [[point["LR"] for point in group] for group, _ in found] == [[0, 1, 2, 3], [4, 5, 6]]
    assert found[1][1]["LR"].tolist() == [4, 5, 6, 4]
    assert [len(group) for group, _ in members.groups(program, points, 4, 4.3)] == [3]
    assert [len(group) for group, _ in members.groups(program, points, 0, 0.1)] == [2, 2, 2, 1]
    assert [len(group) for group, _ in members.groups(program, points, 0, 100)] == [7]

    def sizes(program, count, cache):  # 1 MB of temporaries per setting and device
        return [len(g) for g, _ in members.groups(program, points[:count], 0, 100, cache)]

    assert sizes(program, 7, 10) == [4, 3]
    assert sizes(program, 7, 1) == [2, 2, 2, 1]
    alone = program._replace(least=1)
    assert sizes(alone, 6, 5) == [3, 3]  # no larger than they need be
    assert sizes(program._replace(batched=False), 7, 1) == [7]
