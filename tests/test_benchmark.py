"""The benchmark: both sides compute one thing; turns, medians and the table say what was timed."""

import importlib.util

import jax
import numpy as np
import pytest
from conftest import refused, start

from experiments import benchmark
from experiments.bench import ours, turns, workloads
from experiments.bench.turns import Turn

HAS_TORCH = importlib.util.find_spec("torch") is not None
needs_torch = pytest.mark.skipif(not HAS_TORCH, reason="PyTorch (the extra bench) is not installed")
TINY = {"tasks": 2, "queries": 2, "width": 4, "image": (16, 16, 1), "way": 3}
CASES = {
    "fomaml+mgaug": workloads.FOMAML._replace(**TINY, steps=2, keeps=(0.9, 0.5)),
    "protonet+mgaug": workloads.PROTONET._replace(**TINY, shot=2, keeps=(0.5,)),
    "sinusoid": workloads.SINUSOID._replace(tasks=3, steps=2),
}
pytestmark = pytest.mark.usefixtures("quick_compile")


# --- the problem ----------------------------------------------------------------------------


@needs_torch
@pytest.mark.parametrize("case", CASES)
def test_both_sides_have_the_same_meta_gradient_in_float64(case):
    from experiments.bench import peers

    problem = CASES[case]
    mine = ours.gradient(problem)
    for name in [name for name in ("loop", "torch.func") if peers.PEERS[name].takes(problem)]:
        theirs = peers.gradient(name, problem)
        assert jax.tree.structure(mine) == jax.tree.structure(theirs)
        scale = max(np.abs(leaf).max() for leaf in jax.tree.leaves(mine))
        close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-11 * scale)
        jax.tree.map(close, mine, theirs)


def test_weights_have_the_shapes_of_the_networks():
    for problem in CASES.values():
        made = workloads.weights(problem)
        want = jax.eval_shape(ours.method(problem).net.init, jax.random.key(0))
        assert jax.tree.map(np.shape, made) == jax.tree.map(np.shape, want)


def test_flops_of_the_published_setting():
    """Conv-4 at 84 pixels: 194 million per image forwards, 559 with the gradient."""
    found = workloads.flops(workloads.FOMAML)
    images = 4 * (5 * 5 + 75)
    np.testing.assert_allclose(found / images, 559e6, rtol=1e-3)
    assert workloads.flops(workloads.FOMAML._replace(keeps=(0.9,) * 3)) == 4 * found
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
        "memory": {"ours": {"peak": 1_234_000_000}, "loop": None},
        "sides": sides,
        "ratios": benchmark.ratios(sides),
    }
    text = benchmark.lines("name", row)
    assert "3e-15" in text[1]
    assert text[3].split() == "ours 2.0000 2.0000 2.0000 2.0000 25.0% 1234 7.0 0% 3/4".split()
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
