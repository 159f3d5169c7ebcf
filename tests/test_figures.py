"""The figures, as a user makes them: numbers in their tables, pictures drawn from these."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

pytestmark = pytest.mark.usefixtures("quick_compile")
ROOT = Path(__file__).parents[1]
DRIVER = """
import contextlib, io, json, sys
from importlib import import_module
from pathlib import Path
from absl.testing import flagsaver
from experiments import cli
from experiments.figures import figure

from matplotlib import pyplot as plt

said = []
for name, arguments, out in json.loads(sys.stdin.read()):
    module = import_module("experiments.figures." + name)
    sys.argv = [name, *arguments, f"--out={out}"]
    told, refused = io.StringIO(), io.StringIO()
    with flagsaver.flagsaver(), contextlib.redirect_stdout(told):
        with contextlib.redirect_stderr(refused):
            code = cli._start(module.main, module.__doc__, "")
    said.append({"code": code, "stdout": told.getvalue(), "stderr": refused.getvalue()})
    if code:
        continue
    with plt.rc_context(figure.STYLE):
        drawn = module.draw(figure.read(Path(out) / f"{name}.csv"))
        drawn.canvas.draw()
    texts = [t for t in drawn.findobj(lambda a: hasattr(a, "get_fontsize")) if t.get_text().strip()]
    said[-1] |= {
        "labels": [text for ax in drawn.axes for text in (ax.get_xlabel(), ax.get_ylabel())],
        "smallest": min(text.get_fontsize() for text in texts),
        "width": drawn.get_figwidth(),
    }
print(json.dumps(said))
"""
SINES = (
    "--data=sinusoid",
    "--labels=fixed_labels",
    "--net=mlp((8,))",
    "--shot=4",
    "--queries=4",
    "--tasks=2",
    "--steps=12",
    "--seeds=2",
    "--method=maml(lr=0.01,steps=1)",
    "--stds=0.5,5",
)
GLYPHS = ("--net=conv4(width=4)", "--way=2", "--queries=2", "--tasks=1", "--steps=2")
PLAIN = (*GLYPHS, "--method=fomaml(lr=0.1,steps=1)")
PRUNED = (*GLYPHS, "--method=fomaml(lr=0.1,steps=1)|pp(keep=0.9,subnets=1)")
CHEAP = {
    "sigma": (*SINES, "--episodes=4"),
    "mmca": (*PLAIN, "--rates=0.1", "--layer=conv2/kernel"),
}
REFUSED = [
    ("hat", ("--redraw",), "leave --redraw out to make it"),
    ("mmca", (*PLAIN, "--rates=2"), "must lie between 0 and 1"),
    ("sigma", (*SINES, "--noise=noise(1)"), "has no {} where the std goes"),
    ("drift", (*SINES, "--points=1"), "--points must be from 2 to --steps"),
    ("curves", (*SINES[:-2], "--methods=maml"), "has no accuracy"),
    ("hat", (*SINES[:-1], "--count=1"), "this figure is of classes"),
    ("switching", (*GLYPHS, "--starts=1"), "must be from 0 to below 1"),
    ("fine_tuning", ("--inner_steps=0",), "--inner_steps=0 must be 1 or more"),
]
DEAR = {
    "drift": (*SINES, "--points=3", "--probes=4"),
    "fine_tuning": (*PLAIN, "--seeds=1", "--rates=0.3", "--count=2", "--inner_steps=2"),
    "hat": (*PLAIN, "--seeds=2", "--rates=0.1,0.5", "--count=2"),
    "grad_cam": (*PLAIN, "--rates=0.1,0.4", "--count=3", "--block=1"),
    "curves": (*GLYPHS, "--seeds=2", "--points=2", "--episodes=2"),
    "switching": (
        *(*GLYPHS, "--shot=2", "--seeds=1", "--points=2", "--episodes=2", "--starts=0,0.5"),
        "--mgaug=cp(keep=0.5,subnets=1)",
    ),
}
SCORES = "layer,weight,mmca_nats,kept,threshold_nats\n" + "".join(
    f"conv,{i},{0.01 * (i + 1)},{int(i < 8)},0.08\n" for i in range(10)
)


def drive(figures) -> list[dict]:
    """What figures, made one after another in one process of their own, said of themselves."""
    finished = subprocess.run(
        [sys.executable, "-c", DRIVER],
        input=json.dumps([(name, list(arguments), str(out)) for name, arguments, out in figures]),
        cwd=ROOT,
        env={**os.environ, "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"},
        capture_output=True,
        text=True,
    )
    assert finished.returncode == 0, finished.stderr
    return json.loads(finished.stdout)


@pytest.fixture(scope="module")
def cheap(tmp_path_factory):
    """The folder, and what was said by figure; of refusals by number, of redrawing by folder."""
    folder = tmp_path_factory.mktemp("cheap")
    redrawn = {"same": SCORES, "again": SCORES, "other": SCORES.replace(",0.08", ",0.05")}
    figures = [(name, arguments, folder) for name, arguments in CHEAP.items()]
    figures += [(name, arguments, folder / "refused") for name, arguments, _ in REFUSED]
    for name, text in redrawn.items():
        (folder / name).mkdir()
        (folder / name / "mmca.csv").write_text(text)
        figures.append(("mmca", ["--redraw", "--method=nonsense"], folder / name))
    names = [*CHEAP, *range(len(REFUSED)), *redrawn]
    return folder, dict(zip(names, drive(figures), strict=True))


@pytest.fixture(scope="module")
def dear(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dear")
    figures = [(name, arguments, folder) for name, arguments in DEAR.items()]
    return folder, dict(zip(DEAR, drive(figures), strict=True))


def table(folder, name):
    with (folder / f"{name}.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def column(rows, name):
    return np.array([float(row[name]) for row in rows])


def check_pictures(made, figures):
    """Pictures are not blank, are as wide as a column, and every axis says what it is."""
    folder, said = made
    for name in figures:
        assert said[name]["code"] == 0, said[name]["stderr"]
        pixels = np.asarray(Image.open(folder / f"{name}.png").convert("L"), float)
        assert pixels.std() > 20, name
        assert pixels.shape[1] == round(3.3 * 300), name
        assert said[name]["width"] == 3.3
        assert said[name]["smallest"] >= 7, name
        assert len({label for label in said[name]["labels"] if label}) >= 2, name


def test_pictures_are_readable(cheap):
    check_pictures(cheap, CHEAP)
    assert "|MMCA| (nats)" in cheap[1]["mmca"]["labels"]
    assert any("rms of gradient" in label for label in cheap[1]["sigma"]["labels"])


def test_what_lies_above_the_threshold_is_what_is_pruned(cheap):
    folder, said = cheap
    rows = table(folder, "mmca")
    scores, kept = column(rows, "mmca_nats"), column(rows, "kept")
    above = scores > column(rows, "threshold_nats")
    np.testing.assert_array_equal(above, kept == 0)
    assert len(rows) == 3 * 3 * 4 * 4
    assert 0 < above.sum() <= int(0.1 * len(rows)) - 1  # the released rule, ties kept
    assert {row["layer"] for row in rows} == {"conv2/kernel"}
    assert f"{above.sum()} of 144 weights pruned" in said["mmca"]["stdout"]


def test_noise_of_zero_is_the_method_and_memory_is_measured_twice(cheap):
    rows = table(cheap[0], "sigma")
    assert sorted({float(row["sigma"]) for row in rows}) == [0, 0.5, 5]
    for name in ("test", "train", "permuted", "train_step0", "test_step0"):
        values = column(rows, name)
        assert np.isfinite(values).all()
        assert len(set(values.tolist())) == 6, name  # of every sigma and seed
    assert {(row["metric"], row["unit"]) for row in rows} == {("mse", "rms of gradient")}


def test_a_picture_is_drawn_from_its_table_alone(cheap):
    folder, said = cheap
    assert [said[name]["code"] for name in ("same", "again", "other")] == [0, 0, 0]
    drawn = [(folder / name / "mmca.png").read_bytes() for name in ("same", "again", "other")]
    assert drawn[0] == drawn[1] != drawn[2]
    assert "2 of 10 weights pruned, above 0.08 nats" in said["same"]["stdout"]


@pytest.mark.parametrize("case", range(len(REFUSED)))
def test_what_cannot_be_is_refused_with_a_sentence(cheap, case):
    found = cheap[1][case]
    assert found["code"] == 2, found
    assert REFUSED[case][2] in found["stderr"]
    assert found["stderr"].count("\n") == 1


# --- those that compile for longer ------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_dear_pictures_are_readable(dear):
    check_pictures(dear, DEAR)
    assert "turn of the\ngradient (°)" in dear[1]["drift"]["labels"]


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_hats_have_a_full_network_in_common(dear):
    rows = table(dear[0], "hat")
    full = {
        panel: [
            row["accuracy"] for row in rows if row["panel"] == panel and float(row["rate"]) == 0
        ]
        for panel in ("ME, WP", "ME, PP", "ME, CP", "NME, CP")
    }
    assert full["ME, WP"] == full["ME, PP"] == full["ME, CP"]
    assert len(rows) == 4 * 2 * 3 * 2  # panels, seeds, rates, steps
    assert (dear[0] / "network-fixed_labels-seed1" / "config.json").exists()


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_attention_is_compared_with_the_full_network(dear):
    rows = table(dear[0], "attention")
    correlation = column(rows, "correlation")
    assert (np.isnan(correlation) | (np.abs(correlation) <= 1 + 1e-6)).all()
    maps = table(dear[0], "grad_cam")
    assert {row["panel"] for row in maps} == {"image", "full", "10 %", "40 %"}
    values = column([row for row in maps if row["panel"] != "image"], "value")
    assert values.min() == 0
    assert 0.9 < values.max() <= 1


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_late_mgaug_is_no_mgaug_before_it_starts(dear):
    rows = table(dear[0], "switching")
    at = lambda start, step: [
        row["train_loss_nats"]
        for row in rows
        if row["start"] == start and float(row["step"]) == step
    ]
    assert at("never", 1) == at("0.5", 1) != at("0", 1)
    assert len({*at("never", 2), *at("0.5", 2), *at("0", 2)}) == 3


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_curves_are_of_three_methods(dear):
    rows = table(dear[0], "curves")
    assert len(rows) == 3 * 2 * 2  # methods, seeds, points
    losses = [column(rows, name) for name in ("train_loss_nats", "val_loss_nats")]
    assert len(set(np.concatenate(losses).tolist())) == 2 * len(rows)  # each of its own tasks
    for name, queries in (("train_accuracy", 8), ("val_accuracy", 60)):  # of two tasks
        hits = column(rows, name) * queries
        np.testing.assert_allclose(hits, hits.round(), atol=1e-3)


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_drift_is_in_degrees_and_starts_from_one_network(dear):
    rows = table(dear[0], "drift")
    assert sorted({float(row["step"]) for row in rows}) == [8, 12]
    for name in ("turn_degrees", "descent_degrees"):
        assert np.isfinite(column(rows, name)).all()
    assert column(rows, "descent_degrees").max() > 3.2  # no radians
    noisy = [row for row in rows if float(row["sigma"]) == 5]
    plain = [row for row in rows if float(row["sigma"]) == 0]
    assert column(noisy, "descent_degrees").mean() > column(plain, "descent_degrees").mean()


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_fine_tuning_starts_at_step_0_with_every_curve(dear):
    rows = table(dear[0], "fine_tuning")
    curves = {row["curve"] for row in rows}
    assert curves == {"trained, whole", "CP, 30 %", "untrained"}
    assert sorted({float(row["step"]) for row in rows}) == [0, 1, 2]
    # means of two tasks with two queries of two classes
    hits = column(rows, "accuracy") * 8
    np.testing.assert_allclose(hits, hits.round(), atol=1e-3)
