"""What a meta-step would cost on a GPU, on paper: nothing here is measured.

    python -m experiments.estimate
    python -m experiments.estimate --only=fomaml-mgaug-84-1shot --lowering=native

Traces the step of a workload of `experiments.benchmark` as a GPU would have it (maps in bfloat16,
the `nets.Lowering` of backends that nothing was measured on, or XLA's convolutions, tasks together)
and counts, loops multiplied:

launches: products, convolutions, reductions, sorts, gathers, joins and barriers, each a kernel;
    entry by entry operations count as fused into what reads or writes them;
bytes: what those kernels read and write;
FLOPs: of those products and, beside them, of the direct convolutions (the useful ones).

XLA's own `cost_analysis` counts a loop's body once and no fusion, hence this. Three floors follow:
useful FLOPs over the card's bfloat16 peak, bytes over its bandwidth, and the launches at
--launch_us each; a step takes the largest at least. The defaults are an H200's. Last, how long the
307,200 episodes of the released code's training would take.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import flags
from jax.extend.core import jaxprs_in_params
from jax.interpreters.partial_eval import dce_jaxpr

from experiments import cli
from experiments.bench import ours
from experiments.bench.workloads import PROBLEMS, Problem, flops
from mgaug_jax.nets import lowering

FLAGS = flags.FLAGS
ESTIMATED = ["fomaml-84-1shot", "fomaml-mgaug-84-1shot", "protonet-mgaug-84-1shot"]
ESTIMATED += ["resnet10-224-mgaug"]
flags.DEFINE_list("only", [], f"Workloads. Default: {', '.join(ESTIMATED)}.", allow_override=True)
flags.DEFINE_enum("lowering", "patches", ["patches", "native"], "How convolutions are made.")
flags.DEFINE_float("tflops", 790.0, "Peak of bfloat16, TFLOP/s.")
flags.DEFINE_float("bandwidth", 4.3, "Of memory, TB/s.")
flags.DEFINE_float("launch_us", 2.0, "Of one kernel in a program, microseconds.")

EPISODES = 307_200
LOWERINGS = {
    "patches": lowering.OTHERS,  # Winograd's sums are not for bfloat16
    "native": lowering.OTHERS._replace(native=True),
}
KERNELS = {
    *("dot_general", "conv_general_dilated", "concatenate", "optimization_barrier", "sort"),
    *("gather", "scatter", "scatter-add", "scatter_add", "cumsum", "argmax", "argmin"),
    *("reduce_sum", "reduce_max", "reduce_min", "reduce_and", "reduce_or", "reduce_window_max"),
}


class Counts(NamedTuple):
    """Of a program, or a part of it."""

    launches: int = 0
    bytes: int = 0
    flops: int = 0

    def plus(self, other: "Counts", times: int = 1) -> "Counts":
        return Counts(*(a + times * b for a, b in zip(self, other, strict=True)))


def counts(jaxpr: Any) -> Counts:
    """Of all operations of a program, a loop's as often as it runs, the dearest branch of a choice.
    A loop whose length is not known counts once.
    """
    total = Counts()
    for equation in jaxpr.eqns:
        name = equation.primitive.name
        if name in KERNELS:
            total = total.plus(Counts(1, _bytes(equation), _flops(equation)))
            continue
        inner = [counts(jaxpr) for jaxpr in jaxprs_in_params(equation.params)]
        if name == "cond":
            inner = [max(inner, key=lambda found: found.bytes)]
        for found in inner:
            total = total.plus(found, equation.params["length"] if name == "scan" else 1)
    return total


def _bytes(equation: Any) -> int:
    avals = [variable.aval for variable in (*equation.invars, *equation.outvars)]
    return sum(aval.size * aval.dtype.itemsize for aval in avals)


def _flops(equation: Any) -> int:
    """Multiplications and additions of a product."""
    out = equation.outvars[0].aval
    if equation.primitive.name == "dot_general":
        (contracted, _), _ = equation.params["dimension_numbers"]
        shape = equation.invars[0].aval.shape
        return 2 * out.size * int(np.prod([shape[axis] for axis in contracted]))
    if equation.primitive.name == "conv_general_dilated":
        kernel, spec = equation.invars[1].aval, equation.params["dimension_numbers"].rhs_spec
        return 2 * out.size * kernel.size // kernel.shape[spec[0]]
    return 0


def of_problem(problem: Problem, how: lowering.Lowering) -> Counts:
    """Of a meta-step with Adam, maps in bfloat16."""
    step, args = ours.step(problem._replace(dtype="bfloat16"), how)
    traced = jax.make_jaxpr(step)(*args).jaxpr
    return counts(dce_jaxpr(traced, [True] * len(traced.outvars))[0])  # as XLA will


def main(arguments: Sequence[str]) -> int:
    del arguments
    for name in FLAGS.only or ESTIMATED:
        if name not in PROBLEMS or PROBLEMS[name].image is None:
            images = [name for name, problem in PROBLEMS.items() if problem.image is not None]
            raise cli.BadInput(f"{name!r} is no workload of images; known: {', '.join(images)}.")
    print(f"{FLAGS.tflops} TFLOP/s, {FLAGS.bandwidth} TB/s, {FLAGS.launch_us} us per launch;")
    print(f"lowering {FLAGS.lowering}; an estimate on paper, not measured\n")
    print(
        f"{'a meta-step of':<26} {'useful TF':>9} {'TF':>7} {'GB':>7} {'launches':>8} "
        f"{'compute':>8} {'memory':>8} {'launch':>8} ms  {'cell':>6} min"
    )
    for name in FLAGS.only or ESTIMATED:
        problem = PROBLEMS[name]
        found, useful = of_problem(problem, LOWERINGS[FLAGS.lowering]), flops(problem) or 0.0
        floors = (
            1e3 * useful / (FLAGS.tflops * 1e12),
            1e3 * found.bytes / (FLAGS.bandwidth * 1e12),
            1e-3 * found.launches * FLAGS.launch_us,
        )
        minutes = max(floors) * 1e-3 * EPISODES / problem.tasks / 60
        print(
            f"{name:<26} {useful / 1e12:9.3f} {found.flops / 1e12:7.3f} {found.bytes / 1e9:7.1f} "
            f"{found.launches:8d} "
            + " ".join(f"{floor:8.2f}" for floor in floors)
            + f"     {minutes:6.1f}",
            flush=True,
        )
    return 0


if __name__ == "__main__":
    cli.start(main, __doc__)
