"""Times a meta-step of this library beside PyTorch's, in turns, on workloads of the field.

    python -m experiments.benchmark --quick
    python -m experiments.benchmark --only=fomaml-84-1shot,maml-sinusoid --threads=2 --out=DIR
    python -m experiments.benchmark --peers= --only=protonet-84-1shot
    python -m experiments.benchmark --scaling --out=DIR

A meta-step is a meta-gradient and Adam's update, in float32, on random images of the right shape;
reading data is not in it. Before a workload is timed, both sides compute its meta-gradient in
float64 from the same weights, and the relative difference is printed: above 1e-8 the program ends
with code 1. Then they take turns. How much of the processors others took is recorded for every
turn, and turns of more than --foreign are left out where three others remain. Only ratios within
one run mean something, and on a busy machine that of the processor times with --threads=1 is the
steadiest.

Peers: `loop` (plain eager PyTorch, channels last, one task after another), `torch.func` (vmap over
tasks; sinusoids and small images alone), `higher` and `torchopt` (FoMAML and MAML), `jax-meta`
(sinusoids) where they are installed. learn2learn and parallel-metalearn have no adapter and are not
compared, as the output says. PyTorch comes with `pip install -e '.[bench]'`; --peers= times this
library alone. The sweep has no peer: it is a batch of configurations beside the same one after
another. What the methods of the catalogue cost beside FoMAML is measured by
`experiments.catalogue`, the choices of `nets.Lowering` by `experiments.lowering`, and a GPU's step
is estimated by `experiments.estimate`.

Workloads in bfloat16 have this library's maps and products in it, beside its own and the peers'
float32; the one with XLA's own convolutions, which only a GPU may be fast at, has to be asked for.
That of a chunk has meta-steps that draw their tasks and augment them: as one program,
which is how `experiments.train` runs them, beside a program each, waited for; the ratios of drawing
and augmenting to it are their shares of a step.

Memory is the largest resident size of a process that compiles one meta-step and takes it (for this
library mostly the compiler's), and `cached` that of one which finds its program in JAX's
compilation cache. On a GPU, JAX's and PyTorch's, everything is timed there, and memory is the
device's (not tried).

--devices=2 divides a CPU into two, over which the tasks of a meta-step are spread if they share
them evenly, as `experiments.train --mesh=2` does.

Writes benchmark.json into --out; --scaling writes scaling.csv and scaling.png: time and memory over
tasks, sub-networks, inner steps, image size and width, over configurations that are trained at once
(of a perceptron, and of Conv-4), and devices where there are several.
"""

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from absl import flags

from experiments import cli
from experiments.bench import turns
from experiments.bench.workloads import PROBLEMS, QUICK, Problem, flops
from experiments.progress import Progress

LIMIT = 1e-8
"""Relative difference of two meta-gradients in float64 that passes."""
FLAGS = flags.FLAGS
flags.DEFINE_list("only", [], f"Workloads. Default: all of {', '.join(PROBLEMS)}.")
flags.DEFINE_list("peers", None, "Peers to compare with, none if empty. Default: all there are.")
flags.DEFINE_bool("quick", False, "One task in place of four, few workloads and turns, no memory.")
flags.DEFINE_bool("scaling", False, "This library alone, over sizes of the problem.")
flags.DEFINE_bool("memory", True, "Measures peak memory, each side in a process of its own.")
flags.DEFINE_bool("check", True, "Compares the meta-gradients in float64 first.")
flags.DEFINE_integer("devices", 1, "Devices that a CPU is divided into.", lower_bound=1)
flags.DEFINE_integer("threads", 0, "Processors to use. Default: all that the process may use.")
flags.DEFINE_integer("repeats", 5, "Quiet turns of each side.")
flags.DEFINE_float("foreign", 0.08, "Largest share of the processors that others take in a turn.")
flags.DEFINE_float("peak_f32", None, "TFLOP/s of float32 to compare with. Default: measured.")
flags.DEFINE_float("peak_bf16", None, "TFLOP/s of bfloat16 to compare with as well.")
flags.DEFINE_string("out", None, "Folder to write to.", allow_override=True)


def main(arguments: Sequence[str]) -> int:
    del arguments
    if FLAGS.repeats < 1 or FLAGS.threads < 0:
        raise cli.BadInput("--repeats must be 1 or more and --threads 0 or more.")
    known = QUICK if FLAGS.quick else PROBLEMS
    for name in FLAGS.only:
        if name not in known:
            raise cli.BadInput(f"{name!r} is no workload here; known: {', '.join(known)}.")
    limit_processors(FLAGS.threads)  # before XLA and OpenMP count them
    from experiments import devices

    devices.divide(str(FLAGS.devices))
    peers = None if FLAGS.scaling else load_peers(FLAGS.peers)
    from experiments import store
    from experiments.bench import scaling

    folder = None if FLAGS.out is None else store.output(FLAGS.out)
    if FLAGS.scaling:
        return scaling.run(folder, 3 if FLAGS.quick else FLAGS.repeats, FLAGS.foreign)
    rates = matmul_rates(peers)
    import jax

    table: dict[str, Any] = {
        "devices": jax.device_count(),
        "versions": {**store.versions(), **(peers.versions() if peers else {})},
        "threads": len(turns.processors()),
        "matmul": rates,
        "missing": peers.missing() if peers else [],
        "without_adapter": list(peers.WITHOUT_ADAPTER) if peers else [],
        "workloads": {},
    }
    print(f"float32 product of 2048x2048 matrices, GFLOP/s: {shown(rates, 1e9)}")
    print(f"peers that are not installed: {', '.join(table['missing']) or 'none'}")
    print(
        f"peers without an adapter here: {', '.join(table['without_adapter']) or 'none'}",
        flush=True,
    )
    peak = FLAGS.peak_f32 * 1e12 if FLAGS.peak_f32 else max(rates.values())
    failed = 0
    names = FLAGS.only or [name for name, problem in known.items() if not problem.native]
    progress = Progress("workloads", len(names), unit="workloads")
    for i, name in enumerate(names):
        progress.at(i, name)
        row = measured(name, known[name], peers, peak)
        progress.close()
        failed += sum(not error <= LIMIT for error in row["errors"].values())  # NaN is no agreement
        table["workloads"][name] = row
        print("\n" + "\n".join(lines(name, row)), flush=True)
        if folder is not None:
            store.write_json(folder / "benchmark.json", table)
    return 1 if failed else 0


def limit_processors(count: int) -> None:
    """Keeps this process and its children on the first `count` processors that it may use.

    Raises:
      BadInput: There are fewer, or the system knows no affinity.
    """
    mine = sorted(turns.processors())
    if not count or count == len(mine):
        return
    if count > len(mine) or not hasattr(os, "sched_setaffinity"):
        raise cli.BadInput(f"--threads={count} of {len(mine)} processors cannot be had here.")
    os.sched_setaffinity(0, mine[:count])


def load_peers(names: Sequence[str] | None):
    """`experiments.bench.peers` with the peers that were asked for, None if none were.

    Raises:
      BadInput: A peer is unknown or not installed, or PyTorch is not.
    """
    if names is not None and not list(names):
        return None
    if importlib.util.find_spec("torch") is None:
        raise cli.BadInput(
            "PyTorch is not installed. Install this package with the extra bench, or give --peers= "
            "to time it alone."
        )
    from experiments.bench import peers

    absent = peers.missing()
    for name in names or []:
        if name not in peers.PEERS or name in absent:
            there = [peer for peer in peers.PEERS if peer not in absent]
            raise cli.BadInput(f"{name!r} is no peer that is installed; {', '.join(there)} are.")
    peers.use_threads(len(turns.processors()))
    return peers


def matmul_rates(peers) -> dict[str, float]:
    from experiments.bench import ours

    rates = {"jax": ours.matmul_rate()}
    return {**rates, "torch": peers.matmul_rate(peers.device())} if peers else rates


# --- one workload ---------------------------------------------------------------------------


def measured(name: str, problem: Problem, peers, peak: float) -> dict[str, Any]:
    """What was found of a workload: `errors` and `memory` by side, and `sides` with their times."""
    from experiments.bench import ours

    made = {side: make() for side, make in ours.sides(problem).items()}
    others = chosen(problem, peers) if peers else []
    memory = {}
    if FLAGS.memory and not FLAGS.quick:
        memory = {side: peak_memory(side, name) for side in (*made, *others)}
    errors = differences(problem, others, peers) if FLAGS.check else {}
    steps: dict[str, Callable[[], Any]] = {side: found.step for side, found in made.items()}
    for peer in others:
        steps[peer] = peers.step(peer, problem, peers.device())
    for step in steps.values():
        step()
    rounds = {"repeats": 3, "most": 3} if FLAGS.quick else {"repeats": FLAGS.repeats}
    taken = turns.take_turns(steps, limit=FLAGS.foreign, **rounds)
    taken = {side: turns.shared(found, problem.chunk or 1) for side, found in taken.items()}
    sides = {side: turns.summary(found, FLAGS.foreign) for side, found in taken.items()}
    work = flops(problem)
    for side, row in sides.items():
        row["share_of_peak"] = None if work is None else work / row["seconds"] / peak
        if FLAGS.peak_bf16 and work is not None:
            row["share_of_peak_bf16"] = work / row["seconds"] / (FLAGS.peak_bf16 * 1e12)
        if side in made:
            row |= {"compile": made[side].compile, "temporary": made[side].temporary}
    return {
        "problem": problem._asdict(),
        "flops": work,
        "errors": errors,
        "memory": memory,
        "sides": sides,
        "ratios": ratios(sides),
    }


def chosen(problem: Problem, peers) -> list[str]:
    """The peers that are asked for, installed, and able to do the problem: steps on given tasks."""
    if problem.configurations or problem.chunk:
        return []
    there = [name for name in peers.PEERS if name not in peers.missing()]
    return [name for name in FLAGS.peers or there if peers.PEERS[name].takes(problem)]


def differences(problem: Problem, others: Sequence[str], peers) -> dict[str, float]:
    """`|ours - theirs| / |theirs|` of the whole meta-gradient in float64, two tasks of it."""
    import jax

    from experiments.bench import ours

    if not others:
        return {}
    few = problem._replace(tasks=min(problem.tasks, 2))
    mine = jax.tree.leaves(ours.gradient(few))
    found = {}
    for peer in others:
        theirs = jax.tree.leaves(peers.gradient(peer, few))
        error = sum(np.sum((a - b) ** 2) for a, b in zip(mine, theirs, strict=True))
        found[peer] = float((error / sum(np.sum(b**2) for b in theirs)) ** 0.5)
    return found


def peak_memory(side: str, name: str) -> dict[str, int] | None:
    """By `experiments.bench.peak`, and of our sides once more as `cached`, by a process that finds
    its program in JAX's compilation cache; None if one died, for want of memory perhaps.
    """
    command = [sys.executable, "-m", "experiments.bench.peak", side, name]
    found = []
    with tempfile.TemporaryDirectory() as cache:
        caching = {"JAX_NUM_CPU_DEVICES": str(FLAGS.devices), "JAX_COMPILATION_CACHE_DIR": cache}
        for _ in range(2 if side.startswith("ours") else 1):
            done = subprocess.run(command, env=os.environ | caching, capture_output=True, text=True)
            if done.returncode:
                return None
            found.append(json.loads(done.stdout.splitlines()[-1]))
    first, last = found[0], found[-1]
    return first if len(found) == 1 else first | {"cached": last["peak"]}


def ratios(sides: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """Every other side's times over the first's: above 1 the first is faster."""
    (_, base), *rest = sides.items()
    times = ("seconds", "cpu_seconds")
    return {side: {time: row[time] / base[time] for time in times} for side, row in rest}


# --- the table ------------------------------------------------------------------------------


def shown(rates: Mapping[str, float], unit: float) -> str:
    return ", ".join(f"{side} {rate / unit:.0f}" for side, rate in rates.items())


def lines(name: str, row: Mapping[str, Any]) -> list[str]:
    """A workload's part of the table."""
    made = [f"{name}"]
    if row["errors"]:
        found = ", ".join(f"{peer} {error:.0e}" for peer, error in row["errors"].items())
        made.append(f"  meta-gradients in float64 differ by (relative): {found}")
    made.append(
        f"  {'':<17} {'s / step':>9} {'from':>9} {'to':>9} {'CPU s':>9} {'ratio':>6} {'CPU r.':>6}"
        f" {'of peak':>7} {'MB':>6} {'cached':>6} {'compile':>7} {'others':>6} {'turns':>6}"
    )
    show = lambda value, form: "" if value is None else format(value, form)
    size = lambda taken: show(taken and taken / 1e6, "6.0f")
    for side, found in row["sides"].items():
        ratio = row["ratios"].get(side, {"seconds": None, "cpu_seconds": None})
        taken = row["memory"].get(side) or {}
        memory = taken.get("device", taken.get("peak"))
        kept = f"{found['turns']}/{found['turns'] + found['left_out']}"
        made.append(
            f"  {side:<17} {found['seconds']:9.4f} {found['low']:9.4f} {found['high']:9.4f} "
            f"{found['cpu_seconds']:9.4f} {show(ratio['seconds'], '6.2f'):>6} "
            f"{show(ratio['cpu_seconds'], '6.2f'):>6} {show(found['share_of_peak'], '7.1%'):>7} "
            f"{size(memory):>6} {size(taken.get('cached')):>6} "
            f"{show(found.get('compile'), '7.1f'):>7} {show(found['foreign'], '6.0%'):>6} "
            f"{kept + ('' if found['quiet'] else ' !'):>6}"
        )
    if not all(found["quiet"] for found in row["sides"].values()):
        made.append("  ! fewer than three quiet turns: all were kept, and times by the clock vary")
    return made


if __name__ == "__main__":
    cli.start(main, __doc__)
