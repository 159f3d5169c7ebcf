"""Runs of two processes on this machine, as they would be on two hosts."""

import os
import signal
import socket
import subprocess
import sys
import time
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from experiments import cli, devices, loading, metrics, runs, store
from mgaug_jax import checkpoint

HEARTBEAT = 10
RUN = ["--data=sinusoid", "--method=maml(lr=0.01,steps=1)|noise(0.1)", "--tasks=4", "--shot=3"]
RUN += ["--queries=4", "--eval_every=5", "--seed=3"]


def launch(out, number, steps, *flags, devices=1, port=None, **environment):
    """A process of a run; `number` of two, or the only one if `port` is None."""
    force = f"--xla_force_host_platform_device_count={devices}"
    environment |= {"XLA_FLAGS": force, "JAX_ENABLE_X64": "1"}
    environment |= {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}  # compiles in half the time
    if port:
        environment |= {"JAX_COORDINATOR_ADDRESS": f"localhost:{port}", "JAX_NUM_PROCESSES": "2"}
        environment |= {"JAX_PROCESS_ID": str(number)}
        flags += ("--distributed", f"--heartbeat={HEARTBEAT}")
    command = [sys.executable, "-m", "experiments.train", *RUN, f"--out={out}", f"--steps={steps}"]
    with open(f"{out}.log{number}", "w") as log:
        return subprocess.Popen(
            [*command, *flags], env=os.environ | environment, stdout=log, stderr=log
        )


def two(out, steps, *flags, **options):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    return [launch(out, i, steps, *flags, port=port, **options) for i in (0, 1)]


def said(out, number):
    with open(f"{out}.log{number}") as log:
        return log.read()


def end(processes, seconds=300):
    return [process.wait(seconds) for process in processes]


def saved(out):
    made = loading.setup(store.read_config(out))
    with jax.enable_x64(True):
        return checkpoint.restore(
            out / "checkpoints", jax.eval_shape(lambda: runs.begin(made))
        ).tree


def wait_for(out, text, seconds=200):
    deadline = time.monotonic() + seconds
    while text not in said(out, 0):
        assert time.monotonic() < deadline, said(out, 0)
        time.sleep(0.1)


def assert_close(got, want):
    def compare(a, b):
        np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-12)

    jax.tree.map(compare, got.state.params, want.state.params)


def test_two_processes_train_as_one_does(tmp_path):
    both, alone = tmp_path / "both", tmp_path / "alone"
    codes = end([*two(both, 10, "--mesh=2", devices=2), launch(alone, 0, 10)])
    assert codes == [0, 0, 0], said(both, 0) + said(both, 1) + said(alone, 0)
    assert_close(saved(both), saved(alone))
    keys = ("step", "loss", "val_mse")
    for a, b in zip(metrics.read(both), metrics.read(alone), strict=True):
        for key in a.keys() & set(keys):
            np.testing.assert_allclose(a[key], b[key], rtol=1e-6)
    assert len(metrics.read(both)) == 12  # of one process
    assert "after adaptation" in said(both, 0)
    assert "after adaptation" not in said(both, 1)


def test_a_process_of_several_uses_all_of_its_devices(monkeypatch):
    monkeypatch.setattr(jax, "devices", lambda: [None] * 4)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(jax, "local_device_count", lambda: 2)
    monkeypatch.setattr(devices, "FLAGS", SimpleNamespace(mesh="4"))
    with pytest.raises(cli.BadInput, match="all of its devices, 2"):
        devices.mesh()


@pytest.mark.slow
def test_eight_devices_of_one_process_train_as_one_does(tmp_path):
    spread, alone = tmp_path / "spread", tmp_path / "alone"
    tasks = "--tasks=8"
    pair = [launch(spread, 0, 10, tasks, "--mesh=8", devices=8), launch(alone, 0, 10, tasks)]
    assert end(pair) == [0, 0], said(spread, 0) + said(alone, 0)
    assert_close(saved(spread), saved(alone))


def test_both_are_told_what_the_first_refuses(tmp_path):
    (tmp_path / "held").mkdir()
    (tmp_path / "held" / "thesis.tex").write_text("x")
    assert end(two(tmp_path / "held", 10)) == [2, 2]
    assert "is not empty" in said(tmp_path / "held", 1)


def test_processes_that_would_not_compute_the_same_are_refused(tmp_path):
    out = tmp_path / "run"
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    pair = [launch(out, i, 10, f"--shot={2 + i}", port=port) for i in (0, 1)]
    assert end(pair) == [2, 2]
    for number in (0, 1):
        assert "process 1 has another flags than the first" in said(out, number)
    pair = [launch(out, i, 10 * i, port=port) for i in (0, 1)]
    assert end(pair) == [2, 2]
    assert "process 0: --steps=0 must be 1 or more" in said(out, 1)


@pytest.mark.slow
def test_two_hosts_stream_their_own_images(tmp_path):
    images = ["--data=glyphs", "--net=conv4(width=2)", "--method=protonet()", "--way=3", "--shot=1"]
    images += ["--queries=2", "--test_queries=2", "--labels=exclusive", "--tasks=2"]
    alone, hosts = tmp_path / "one", tmp_path / "hosts"
    runs = [launch(alone, 0, 2, *images), *two(hosts, 2, *images, "--stream=yes")]
    assert end(runs) == [0] * 3, said(alone, 0) + said(hosts, 0) + said(hosts, 1)
    taken = said(alone, 0).split("the program takes ")[1].split(" GB, data and state included")[0]
    assert 417 * 20 * 28 * 28 < float(taken) * 1e9 < 1e9  # all training images, and more
    assert_close(saved(hosts), saved(alone))


@pytest.mark.slow
def test_a_signal_while_testing_ends_both(tmp_path):
    out = tmp_path / "run"
    processes = two(out, 10)
    wait_for(out, "testing")
    processes[1].send_signal(signal.SIGTERM)
    codes = end(processes, 60)
    assert set(codes) <= {0, 75}  # it may have been done before


@pytest.mark.slow
@pytest.mark.parametrize("who", [0, 1])
def test_a_signal_to_one_stops_both_at_one_step(tmp_path, who):
    out = tmp_path / "run"
    processes = two(out, 100_000)
    wait_for(out, "validation")
    processes[who].send_signal(signal.SIGTERM)
    assert end(processes) == [75, 75]
    last = [said(out, i).split("saved at step ")[1].split(";")[0] for i in (0, 1)]
    assert last[0] == last[1] == str(checkpoint.steps(out / "checkpoints")[-1])
    more = int(last[0]) + 5
    assert end(two(out, more, "--resume")) == [0, 0]
    assert int(saved(out).state.step) == more


@pytest.mark.slow
@pytest.mark.parametrize(("devices", "killed"), [(1, 1), (2, 0), (4, 1)])
def test_a_killed_peer_ends_the_other_plainly_and_the_run_goes_on(tmp_path, devices, killed):
    out, alone = tmp_path / "run", tmp_path / "alone"
    processes = two(out, 100_000)
    wait_for(out, "validation")
    while not checkpoint.steps(out / "checkpoints"):
        time.sleep(0.05)
    processes[killed].kill()
    before = time.monotonic()
    assert processes[1 - killed].wait(60) == 75, said(out, 1 - killed)
    assert time.monotonic() - before < HEARTBEAT + 2  # to end and to be seen
    processes[killed].wait()
    assert "another process of the run is gone" in said(out, 1 - killed)
    assert "stack trace" not in said(out, 1 - killed)
    steps = checkpoint.steps(out / "checkpoints")[-1] + 5
    again = launch(out, 0, steps, "--resume", "--mesh=all", devices=devices)
    assert end([again, launch(alone, 0, steps)]) == [0, 0], said(out, 0)
    assert_close(saved(out), saved(alone))
