"""The benchmark: both sides compute one thing; turns, medians and the table say what was timed."""

import csv
import importlib.util
import json
import subprocess

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import flagsaver
from conftest import refused, start

from experiments import benchmark, estimate, lowering
from experiments.bench import ours, scaling, turns, workloads
from experiments.bench.turns import Turn
from mgaug_jax import nets

HAS_TORCH = importlib.util.find_spec("torch") is not None
needs_torch = pytest.mark.skipif(not HAS_TORCH, reason="PyTorch (the extra bench) is not installed")
TINY = {"tasks": 2, "queries": 2, "width": 4, "image": (16, 16, 1), "way": 3}
CASES = {
    "fomaml+mgaug": workloads.FOMAML._replace(**TINY, steps=2, keeps=(0.9, 0.5)),
    "protonet+mgaug": workloads.PROTONET._replace(**TINY, shot=2, keeps=(0.5,)),
    "sinusoid": workloads.SINUSOID._replace(tasks=3, steps=2),
    "resnet+mgaug": workloads.FOMAML._replace(
        **TINY | {"image": (40, 40, 1), "tasks": 1}, steps=1, keeps=(0.5,), blocks=1
    ),
}
pytestmark = pytest.mark.usefixtures("quick_compile")


# --- the problem ----------------------------------------------------------------------------


@needs_torch
@pytest.mark.parametrize("case", CASES)
def test_both_sides_have_the_same_meta_gradient_in_float64(case):
    from experiments.bench import peers

    problem = CASES[case]
    mine = ours.gradient(problem)
    for name in [name for name in peers.PEERS if peers.PEERS[name].takes(problem)]:
        if name in peers.missing():
            continue
        theirs = peers.gradient(name, problem)
        assert jax.tree.structure(mine) == jax.tree.structure(theirs)
        scale = max(np.abs(leaf).max() for leaf in jax.tree.leaves(mine))
        close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-11 * scale)
        jax.tree.map(close, mine, theirs)


def test_weights_have_the_shapes_of_the_networks():
    deep = workloads.PROTONET._replace(**TINY, blocks=2)
    for problem in (*CASES.values(), deep):
        made = workloads.weights(problem)
        want = jax.eval_shape(ours.method(problem).net.init, jax.random.key(0))
        assert jax.tree.map(np.shape, made) == jax.tree.map(np.shape, want)


def test_flops_of_the_published_setting():
    """Conv-4 at 84 pixels: 194 million per image forwards, 559 with the gradient."""
    found = workloads.flops(workloads.FOMAML)
    images = 4 * (5 * 5 + 75)
    np.testing.assert_allclose(found / images, 559e6, rtol=1e-3)
    assert workloads.flops(workloads.FOMAML._replace(keeps=(0.9,) * 3)) == 4 * found
    resnet = workloads.FOMAML._replace(image=(224, 224, 3), blocks=1)
    forward = [118.0e6, 2 * 115.6e6, 57.8e6, 115.6e6, 6.4e6] + 2 * [57.8e6, 115.6e6, 6.4e6]
    sums = 2 * (sum(forward) + 512 * 5)  # multiplications and additions of one image
    np.testing.assert_allclose(
        workloads.flops(resnet) / images, 3 * sums - 2 * forward[0], rtol=1e-3
    )
    one = workloads.Problem("protonet", (16, 16, 1), 1, 1, 0, 1, 0, width=1)
    forward = [2 * 9 * side**2 for side in (16, 8, 4, 2)]
    assert workloads.flops(one) == 3 * sum(forward) - forward[0]


# --- turns ----------------------------------------------------------------------------------


def test_noisy_turns_are_left_out_where_enough_others_remain():
    noisy = [Turn(9.0, 3.0, 0.5)] * 4
    calm = [Turn(1.0, 1.0, 0.0), Turn(2.0, 1.5, 0.01), Turn(4.0, 2.5, 0.08)]
    found = turns.summary(noisy + calm, 0.08)
    assert (found["seconds"], found["low"], found["high"]) == (2.0, 1.0, 4.0)
    assert (found["cpu_seconds"], found["foreign"]) == (1.5, 0.01)
    assert (found["turns"], found["left_out"], found["quiet"]) == (3, 4, True)


def test_all_turns_are_kept_where_too_few_are_quiet():
    found = turns.summary([Turn(9.0, 3.0, 0.5)] * 3 + [Turn(1.0, 1.0, 0.0)] * 2, 0.08)
    assert (found["seconds"], found["turns"], found["left_out"]) == (9.0, 5, 0)
    assert not found["quiet"]


def test_turns_count_where_nobody_knows_what_others_took():
    found = turns.summary([Turn(float(i), 1.0, None) for i in range(3)], 0.08)
    assert (found["seconds"], found["foreign"], found["quiet"]) == (1.0, None, True)


def test_contenders_take_turns_until_all_had_quiet_ones(monkeypatch):
    order = []
    foreign = iter([0.0, 0.0, 0.9] + [0.0] * 20)  # two to learn how long a call takes

    def turn(call, calls):
        call()
        return Turn(0.1, 0.1, next(foreign))

    monkeypatch.setattr(turns, "turn", turn)
    calls = {name: lambda name=name: order.append(name) for name in "ab"}
    taken = turns.take_turns(calls, 2, 0.08)
    assert "".join(order) == "ab" + "ab" + "ba" + "ab"
    assert [len(found) for found in taken.values()] == [3, 3]
    assert len(turns.quiet(taken["a"], 0.08)) == 2


def test_a_turn_measures_the_time_of_one_call():
    count = []
    found = turns.turn(lambda: count.append(sum(range(20_000))), 7)
    assert len(count) == 7
    assert 0 < found.cpu <= found.seconds * len(turns.processors()) * 7
    assert found.foreign is None or found.foreign >= 0


def test_turns_of_several_steps_are_shared():
    assert turns.shared([Turn(6.0, 3.0, 0.1)], 3) == [Turn(2.0, 1.0, 0.1)]


# --- the program ----------------------------------------------------------------------------


def test_ratios_are_to_the_first_side():
    sides = {
        "ours": {"seconds": 2.0, "cpu_seconds": 4.0},
        "loop": {"seconds": 3.0, "cpu_seconds": 2.0},
    }
    assert benchmark.ratios(sides) == {"loop": {"seconds": 1.5, "cpu_seconds": 0.5}}


def test_the_table_shows_what_was_measured():
    quiet = turns.summary([Turn(2.0, 2.0, 0.0)] * 3 + [Turn(8.0, 2.0, 0.5)], 0.08)
    noisy = turns.summary([Turn(3.0, 3.0, 0.5)] * 3, 0.08)
    sides = {
        "ours": {**quiet, "share_of_peak": 0.25, "compile": 7.0},
        "loop": {**noisy, "share_of_peak": None},
    }
    row = {
        "errors": {"loop": 3e-15},
        "memory": {"ours": {"peak": 1_234_000_000, "cached": 567_000_000}, "loop": None},
        "sides": sides,
        "ratios": benchmark.ratios(sides),
    }
    text = benchmark.lines("name", row)
    assert "3e-15" in text[1]
    assert text[3].split() == "ours 2.0000 2.0000 2.0000 2.0000 25.0% 1234 567 7.0 0% 3/4".split()
    assert text[4].split() == "loop 3.0000 3.0000 3.0000 3.0000 1.50 1.50 50% 3/3 !".split()
    assert "quiet" in text[5]


def test_the_program_times_this_library_alone(monkeypatch, tmp_path, capsys):
    small = {"maml-sinusoid": CASES["sinusoid"], "sweep-sinusoid": CASES["sinusoid"]}
    small["sweep-sinusoid"] = CASES["sinusoid"]._replace(configurations=2)
    monkeypatch.setattr(benchmark, "QUICK", small)
    monkeypatch.setattr(ours, "matmul_rate", lambda: 1e9)
    monkeypatch.setattr(turns, "turn", lambda call, calls: Turn(1.0, 1.0, 0.0))
    arguments = ("--quick", "--peers=", f"--out={tmp_path}")
    assert start(monkeypatch, benchmark, *arguments) == 0
    assert "sweep-sinusoid" in capsys.readouterr().out
    assert (tmp_path / "benchmark.json").exists()


@pytest.mark.parametrize(("error", "code"), [(1e-15, 0), (1e-3, 1), (float("nan"), 1)])
def test_only_a_meta_gradient_that_agrees_passes(monkeypatch, error, code):
    monkeypatch.setattr(benchmark, "QUICK", {"maml-sinusoid": CASES["sinusoid"]})
    monkeypatch.setattr(benchmark, "measured", lambda *_: {"errors": {"loop": error}})
    monkeypatch.setattr(benchmark, "lines", lambda *_: [])
    monkeypatch.setattr(ours, "matmul_rate", lambda: 1e9)
    assert start(monkeypatch, benchmark, "--quick", "--peers=") == code


def test_a_chunk_takes_its_steps_and_draws_its_tasks(monkeypatch):
    def noisy(method):  # photographs' own transforms take minutes to compile
        move = lambda key, x: x + jax.random.normal(key, x.shape)
        change = lambda key, task: task._replace(
            query=task.query._replace(x=move(key, task.query.x))
        )
        return method._replace(augment=change)

    monkeypatch.setattr(ours.photo, "photo_augment", lambda mean, std: noisy)
    problem = workloads.FOMAML._replace(**TINY | {"image": (16, 16, 3)}, steps=1, chunk=2)
    made = {side: make() for side, make in ours.sides(problem).items()}
    assert list(made) == ["ours", "ours, each step", "ours, drawing", "ours, augmenting"]
    state, info, filled = made["ours"].step()
    assert (int(state.step), int(filled), info["loss"].shape) == (2, 2, (2,))
    assert jnp.isfinite(info["loss"]).all()
    drawn, augmented = (float(made[side].step()) for side in list(made)[2:])
    assert drawn != augmented
    assert made["ours, each step"].step() is None


def test_a_chunk_is_compared_to_no_peer():
    assert benchmark.chosen(CASES["sinusoid"]._replace(chunk=2), None) == []
    assert benchmark.chosen(CASES["sinusoid"]._replace(configurations=2), None) == []


def test_memory_is_measured_with_compiling_and_without(monkeypatch):
    given = []

    def started(command, env, **_):
        given.append((command[-2], env["JAX_COMPILATION_CACHE_DIR"]))
        said = json.dumps({"peak": 9 - len(given), "before": 1})
        return subprocess.CompletedProcess(command, 0, stdout=f"noise\n{said}\n")

    monkeypatch.setattr(subprocess, "run", started)
    with flagsaver.flagsaver():
        benchmark.FLAGS(["benchmark"])
        found = benchmark.peak_memory("ours", "maml-sinusoid")
        assert found == {"peak": 8, "before": 1, "cached": 7}
        assert given[0] == given[1]
        assert benchmark.peak_memory("loop", "maml-sinusoid") == {"peak": 6, "before": 1}
    assert len(given) == 3


def test_memory_of_a_gpu_is_the_devices():
    sides = {"ours": {**turns.summary([Turn(2.0, 2.0, 0.0)] * 3, 0.08), "share_of_peak": None}}
    memory = {"ours": {"peak": 9_000_000, "device": 3_000_000}}
    row = {"errors": {}, "memory": memory, "sides": sides, "ratios": {}}
    assert benchmark.lines("name", row)[2].split()[5] == "3"


def read(path):
    with path.open() as file:
        return list(csv.DictReader(file))


def test_scaling_writes_a_row_and_a_curve_for_every_size(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(scaling, "BASE", CASES["sinusoid"]._replace(devices=1))
    small = {"tasks": ("tasks T", (1, 2)), "configurations": ("perceptrons K", (1, 3))}
    monkeypatch.setattr(scaling, "AXES", small)
    monkeypatch.setattr(scaling, "SWEPT", {"configurations": CASES["sinusoid"]})
    monkeypatch.setattr(turns, "turn", lambda call, calls: Turn(0.5, 0.5, 0.0))
    arguments = ("--scaling", "--repeats=1", f"--out={tmp_path}")
    assert start(monkeypatch, benchmark, *arguments) == 0
    rows = read(tmp_path / "scaling.csv")
    assert [(row["axis"], row["value"]) for row in rows] == [
        ("tasks", "1"),
        ("tasks", "2"),
        ("configurations", "1"),
        ("configurations", "3"),
    ]
    assert [row["gain"] for row in rows] == ["", "", "1.0", "3.0"]
    assert int(rows[1]["temporary"]) > int(rows[0]["temporary"]) > 0
    assert (tmp_path / "scaling.png").stat().st_size > 10_000
    assert "3.00 of one after another" in capsys.readouterr().out


def test_scaling_varies_one_size_at_a_time():
    for axis, (_, values) in scaling.AXES.items():
        for value in values:
            made = scaling.at(axis, value)
            base = scaling.SWEPT.get(axis, scaling.BASE)
            changed = [name for name in base._fields if getattr(made, name) != getattr(base, name)]
            assert len(changed) <= 1
            assert made.configurations == (value if axis in scaling.SWEPT else 0)


def test_every_choice_of_lowering_is_timed(monkeypatch, tmp_path, capsys):
    tiny = {"tiny, thin": (2, 6, 1, 9), "tiny": (2, 4, 8, 8)}
    monkeypatch.setattr(lowering, "BLOCKS", tiny)
    monkeypatch.setattr(lowering, "CONVS", {"tiny": tiny["tiny"]})
    monkeypatch.setattr(lowering, "NETS", {"tiny": (nets.conv4, 16, 1, 1)})
    monkeypatch.setattr(lowering, "PIXELS", (16, None))
    monkeypatch.setattr(turns, "turn", lambda call, calls: Turn(1.0, 1.0, 0.0))
    assert start(monkeypatch, lowering, "--repeats=1", f"--out={tmp_path}") == 0
    rows = read(tmp_path / "lowering.csv")
    ways = {}
    for row in rows:
        ways.setdefault((row["choice"], row["pass"]), []).append(row["way"])
    for direction in ("forward", "both"):
        assert ways["kind", direction] == ["winograd", "patches", "native"]
        assert ways["pixels", direction] == ["16", "None"]
        assert ways["thin", direction] == ["not written", "written"]
        assert ways["pool", direction] == ["pool first", "norm first, XLA's pool"] * 2
    assert ways["at_once", "whole"] == ["one", "all"]
    assert "CPU r." in capsys.readouterr().out


@pytest.mark.parametrize("choice", ["kind", "pixels", "thin", "pool"])
def test_the_ways_of_a_row_compute_the_same(x64, monkeypatch, choice):
    tiny = {"tiny, thin": (3, 6, 1, 9), "tiny": (3, 4, 8, 8)}
    monkeypatch.setattr(lowering, "BLOCKS", tiny)
    monkeypatch.setattr(lowering, "CONVS", {"tiny": tiny["tiny"]})
    for row in lowering.CHOICES[choice]():
        first, *others = (jax.jit(lowering.with_gradient(f))(*row.args) for f in row.ways.values())
        for other in others:
            close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-9)
            jax.tree.map(close, first, other)


def test_an_unknown_choice_of_lowering_is_refused(monkeypatch, capsys):
    assert "no choice" in refused(capsys, monkeypatch, lowering, "--only=speed")


@pytest.mark.parametrize(
    ("argument", "said"),
    [("--only=cnn", "no workload"), ("--repeats=0", "--repeats"), ("--threads=4096", "cannot")],
)
def test_bad_input_is_refused(monkeypatch, capsys, argument, said):
    assert said in refused(capsys, monkeypatch, benchmark, argument)


def test_without_torch_a_sentence_says_what_to_install(monkeypatch, capsys):
    found = importlib.util.find_spec
    absent = lambda name, *rest: None if name == "torch" else found(name, *rest)
    monkeypatch.setattr(importlib.util, "find_spec", absent)
    assert "extra bench" in refused(capsys, monkeypatch, benchmark, "--quick")


# --- on paper -------------------------------------------------------------------------------


def test_launches_bytes_and_flops_are_counted_loops_multiplied():
    def f(x, kernels):
        def body(x, kernel):
            return jnp.tanh(x @ kernel), None

        y = jax.lax.scan(body, x, kernels)[0]
        return jax.lax.cond(y[0, 0] > 0, lambda y: jnp.sum(y @ y.T), lambda y: y[0, 0], y)

    found = estimate.counts(jax.make_jaxpr(f)(jnp.ones((3, 5)), jnp.ones((4, 5, 5))).jaxpr)
    loop = estimate.Counts(4, 4 * 4 * (15 + 25 + 15), 4 * 2 * 3 * 5 * 5)
    product = estimate.Counts(1, 4 * (15 + 15 + 9), 2 * 3 * 5 * 3)
    total = estimate.Counts(1, 4 * (9 + 1), 0)
    assert found == loop.plus(product).plus(total)


@pytest.mark.parametrize("groups", [1, 2])
def test_flops_of_a_convolution(groups):
    x, kernel = jnp.ones((2, 6, 7, 4)), jnp.ones((3, 3, 4 // groups, 8))
    conv = lambda x, k: jax.lax.conv_general_dilated(
        x, k, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count=groups
    )
    found = estimate.counts(jax.make_jaxpr(conv)(x, kernel).jaxpr)
    assert (found.launches, found.flops) == (1, 2 * (2 * 6 * 7 * 8) * 9 * 4 // groups)


def test_an_estimate_has_the_useful_flops_of_native_convolutions():
    """By direct convolution, both gradients: norms and heads have next to none."""
    problem = workloads.FOMAML._replace(tasks=2, queries=2, image=(32, 32, 3), way=3, steps=2)
    found = estimate.of_problem(problem, estimate.LOWERINGS["native"])
    assert found.flops == pytest.approx(workloads.flops(problem), rel=0.02)
    more = estimate.of_problem(problem, estimate.LOWERINGS["patches"])
    assert more.bytes > found.bytes > 0


def test_the_estimate_is_printed_and_says_what_it_is(monkeypatch, capsys):
    monkeypatch.setattr(estimate, "PROBLEMS", {"small": CASES["fomaml+mgaug"]})
    assert start(monkeypatch, estimate, "--only=small", "--launch_us=1000000") == 0
    out = capsys.readouterr().out
    assert "not measured" in out
    *_, launches, _, _, floor, minutes = out.splitlines()[-1].split()
    assert float(floor) == 1e3 * int(launches)
    assert float(minutes) == pytest.approx(int(launches) * 307_200 / 2 / 60)
    assert "no workload of images" in refused(capsys, monkeypatch, estimate, "--only=maml-sinusoid")
