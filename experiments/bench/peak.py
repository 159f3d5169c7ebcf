"""Peak memory of one side of one workload of `experiments.benchmark`, in a process of its own.

    python -m experiments.bench.peak ours fomaml-84-1shot

Builds it, takes one meta-step, and prints as JSON the process's largest resident size and that
before anything was built, in bytes; on a GPU also the most that the device's arrays took.
"""

import json
import sys
from collections.abc import Sequence

from experiments import cli
from experiments.bench.workloads import PROBLEMS, QUICK


def resident() -> int:
    """Largest resident size of this process so far, in bytes.

    `getrusage` counts the process that started this one, too, as long as it shared its memory.
    """
    try:
        with open("/proc/self/status") as file:
            return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        import resource

        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def main(arguments: Sequence[str]) -> int:
    if len(arguments) not in (2, 3) or arguments[1] not in PROBLEMS:
        raise cli.BadInput(f"give a side and a workload, one of {', '.join(PROBLEMS)}.")
    side, name = arguments[:2]
    problem = QUICK[name] if arguments[2:] == ["quick"] else PROBLEMS[name]
    found = {}
    if side.startswith("ours"):
        import jax

        from experiments.bench import ours

        before = resident()
        ours.sides(problem)[side]().step()
        memory = jax.devices()[0].memory_stats()
        if memory and "peak_bytes_in_use" in memory:
            found["device"] = memory["peak_bytes_in_use"]
    else:
        from experiments.bench import peers

        before = resident()
        peers.step(side, problem, peers.device())()
        if (peak := peers.peak()) is not None:
            found["device"] = peak
    print(json.dumps({"peak": resident(), "before": before, **found}))
    return 0


if __name__ == "__main__":
    cli.start(main, __doc__, positional="a side and a workload")
