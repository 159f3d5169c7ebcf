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

ROOT = Path(__file__).parents[1]
DRIVER = """
import json, sys
from importlib import import_module
from pathlib import Path
from absl.testing import flagsaver
from experiments import cli
from experiments.figures import figure

from matplotlib import pyplot as plt

out, said = Path(sys.argv[1]), {}
for name, arguments in json.loads(sys.stdin.read()):
    module = import_module("experiments.figures." + name)
    sys.argv = [name, *arguments, f"--out={out}"]
    with flagsaver.flagsaver():
        code = cli._start(module.main, module.__doc__, "")
    if code:
        sys.exit(code)
    with plt.rc_context(figure.STYLE):
        drawn = module.draw(figure.read(out / f"{name}.csv"))
        drawn.canvas.draw()
    texts = [t for t in drawn.findobj(lambda a: hasattr(a, "get_fontsize")) if t.get_text().strip()]
    said[name] = {
        "labels": [text for ax in drawn.axes for text in (ax.get_xlabel(), ax.get_ylabel())],
        "smallest": min(text.get_fontsize() for text in texts),
        "width": drawn.get_figwidth(),
    }
(out / "said.json").write_text(json.dumps(said))
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
GLYPHS = (
    "--net=conv4(width=4)",
    "--image_size=16",
    "--way=2",
    "--queries=2",
    "--tasks=1",
    "--steps=2",
)
NETS = (*GLYPHS, "--method=fomaml(lr=0.1,steps=1)|pp(keep=0.9,subnets=1)")
CHEAP = [
    ("sigma", (*SINES, "--episodes=4")),
    ("drift", (*SINES, "--points=3", "--probes=4")),
    ("mmca", (*NETS, "--rates=0.1", "--layer=conv2/kernel")),
    ("fine_tuning", (*NETS, "--seeds=1", "--rates=0.3", "--count=2", "--inner_steps=2")),
]
DEAR = [
    ("hat", (*NETS, "--seeds=2", "--rates=0.1,0.5", "--count=2")),
    ("grad_cam", (*NETS, "--rates=0.1,0.4", "--count=3", "--block=1")),
    ("curves", (*GLYPHS, "--seeds=2", "--points=2", "--episodes=2")),
    (
        "switching",
        (*GLYPHS, "--shot=2", "--seeds=1", "--points=2", "--episodes=2", "--starts=0,0.5"),
    ),
]


def drive(folder, figures) -> subprocess.CompletedProcess:
    """Figures made one after another in one process of their own."""
    return subprocess.run(
        [sys.executable, "-c", DRIVER, str(folder)],
        input=json.dumps(figures),
        cwd=ROOT,
        env={**os.environ, "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"},
        capture_output=True,
        text=True,
    )


@pytest.fixture(scope="module")
def cheap(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cheap")
    finished = drive(folder, CHEAP)
    assert finished.returncode == 0, finished.stderr
    return folder, finished.stdout


@pytest.fixture(scope="module")
def dear(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dear")
    finished = drive(folder, DEAR)
    assert finished.returncode == 0, finished.stderr
    return folder, finished.stdout


def table(folder, name):
    with (folder / f"{name}.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def column(rows, name):
    return np.array([float(row[name]) for row in rows])


def check_pictures(folder, figures):
    """Pictures are not blank, are as wide as a column, and every axis says what it is."""
    said = json.loads((folder / "said.json").read_text())
    for name, _ in figures:
        pixels = np.asarray(Image.open(folder / f"{name}.png").convert("L"), float)
        assert pixels.std() > 20, name
        assert pixels.shape[1] == round(3.3 * 300), name
        assert said[name]["width"] == 3.3
        assert said[name]["smallest"] >= 7, name
        assert len({label for label in said[name]["labels"] if label}) >= 2, name


def test_pictures_are_readable(cheap):
    check_pictures(cheap[0], CHEAP)
    said = json.loads((cheap[0] / "said.json").read_text())
    assert "|MMCA| (nats)" in said["mmca"]["labels"]
    assert "turn of the\ngradient (°)" in said["drift"]["labels"]
    assert any("rms of gradient" in label for label in said["sigma"]["labels"])


def test_what_lies_above_the_threshold_is_what_is_pruned(cheap):
    folder, shown = cheap
    rows = table(folder, "mmca")
    scores, kept = column(rows, "mmca_nats"), column(rows, "kept")
    above = scores > column(rows, "threshold_nats")
    np.testing.assert_array_equal(above, kept == 0)
    assert len(rows) == 3 * 3 * 4 * 4
    assert 0 < above.sum() <= int(0.1 * len(rows)) - 1  # the released rule, ties kept
    assert {row["layer"] for row in rows} == {"conv2/kernel"}
    assert f"{above.sum()} of 144 weights pruned" in shown


def test_noise_of_zero_is_the_method_and_memory_is_measured_twice(cheap):
    rows = table(cheap[0], "sigma")
    assert sorted({float(row["sigma"]) for row in rows}) == [0, 0.5, 5]
    for name in ("test", "train", "permuted", "train_step0", "test_step0"):
        values = column(rows, name)
        assert np.isfinite(values).all()
        assert len(set(values.tolist())) == 6, name  # of every sigma and seed
    assert {(row["metric"], row["unit"]) for row in rows} == {("mse", "rms of gradient")}


def test_drift_is_in_degrees_and_starts_from_one_network(cheap):
    rows = table(cheap[0], "drift")
    assert sorted({float(row["step"]) for row in rows}) == [8, 12]
    for name in ("turn_degrees", "descent_degrees"):
        values = column(rows, name)
        assert ((values >= 0) & (values <= 180)).all()
    noisy = [row for row in rows if float(row["sigma"]) == 5]
    plain = [row for row in rows if float(row["sigma"]) == 0]
    assert column(noisy, "descent_degrees").mean() > column(plain, "descent_degrees").mean()


def test_fine_tuning_starts_at_step_0_with_every_curve(cheap):
    rows = table(cheap[0], "fine_tuning")
    curves = {row["curve"] for row in rows}
    assert curves == {"trained, whole", "CP, 30 %", "untrained"}
    assert sorted({float(row["step"]) for row in rows}) == [0, 1, 2]
    accuracy = column(rows, "accuracy")
    assert ((accuracy >= 0) & (accuracy <= 1)).all()


def test_a_picture_is_drawn_again_from_its_table(cheap):
    """From changed numbers another picture, from the same ones the same, without computing."""
    folder, _ = cheap
    path, before = folder / "mmca.csv", (folder / "mmca.png").read_bytes()
    finished = drive(folder, [("mmca", ["--redraw", "--method=nonsense"])])
    assert finished.returncode == 0, finished.stderr
    assert (folder / "mmca.png").read_bytes() == before
    text = path.read_text()
    path.write_text("\n".join(text.splitlines()[: len(text.splitlines()) // 2]) + "\n")
    assert drive(folder, [("mmca", ["--redraw"])]).returncode == 0
    assert (folder / "mmca.png").read_bytes() != before
    path.write_text(text)


@pytest.mark.parametrize(
    ("name", "arguments", "says"),
    [
        ("hat", ("--redraw",), "leave --redraw out to make it"),
        ("mmca", (*NETS, "--rates=2"), "must lie between 0 and 1"),
        ("sigma", (*SINES, "--noise=noise(1)"), "has no {} where the std goes"),
        ("curves", SINES[:-2], "has no accuracy"),
    ],
)
def test_what_cannot_be_is_refused_with_a_sentence(tmp_path, name, arguments, says):
    finished = drive(tmp_path, [(name, list(arguments))])
    assert finished.returncode == 2, finished.stderr
    assert says in finished.stderr


# --- those that compile for longer ------------------------------------------------------------


@pytest.mark.slow
def test_dear_pictures_are_readable(dear):
    check_pictures(dear[0], DEAR)


@pytest.mark.slow
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
def test_curves_are_of_three_methods(dear):
    rows = table(dear[0], "curves")
    assert len(rows) == 3 * 2 * 2  # methods, seeds, points
    for name in ("train_loss_nats", "val_loss_nats"):
        assert (column(rows, name) > 0).all()
