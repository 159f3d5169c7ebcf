"""Examples per second from the device and from disk, beside the time of a meta-step.

    python -m experiments.throughput --data=cub --data_dir=DIR --image_size=224
    python -m experiments.throughput --tasks=4 --queries=15 --method='fomaml(lr=0.01,steps=5)'

Takes the flags of experiments.train that say what is trained on. Draws meta-batches from images on
the device, gathers the same ones from the cache on disk, and trains with both, in turns; prints the
median of --repeats and their range. Loading is no bottleneck if it gives more examples per second
than a step uses. Files that were read before come from the system's memory, not from the disk.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from experiments import cli, loading, problem, runs
from mgaug_jax import loops
from mgaug_jax.data import streaming

FLAGS = flags.FLAGS
flags.adopt_module_key_flags(problem)
flags.DEFINE_string("method", "fomaml(lr=0.01,steps=5)", "Spec.", allow_override=True)
flags.DEFINE_integer("repeats", 5, "Repeats of each.", allow_override=True)
flags.DEFINE_integer("block", 10, "Meta-steps in a repeat.")


def main(arguments: Sequence[str]) -> int:
    del arguments
    problem.adopt_protocol()
    for name in ("repeats", "block"):
        if FLAGS[name].value < 1:
            raise cli.BadInput(f"--{name}={FLAGS[name].value} must be 1 or more.")
    config = problem.config(FLAGS.method, 0, 1)
    if config.data == runs.SINUSOID:
        raise cli.BadInput("sinusoids are computed, not loaded; give --data of images.")
    made = loading.setup(config, say=print, stream="yes")
    stored = made.splits["train"]
    used = config.tasks * config.way * (config.shot + config.queries)
    shape = " x ".join(map(str, stored.pixels.shape[2:]))
    print(f"{config.task}, {config.method}, images of {shape}, {used} examples in a meta-step")
    for name, seconds in measured(made, stored).items():
        steps = sorted(each / FLAGS.block for each in seconds)
        step = statistics.median(steps)
        print(
            f"{name:<27} {1000 * step:8.1f} ms per meta-step ({1000 * steps[0]:.1f} to "
            f"{1000 * steps[-1]:.1f}), {used / step:9.0f} examples/s"
        )
    return 0


def measured(made: runs.Setup, stored: streaming.Stored) -> dict[str, list[float]]:
    """Seconds of every repeat."""
    images, total = streaming.on_device(stored), FLAGS.block * (FLAGS.repeats + 1)
    key, state = runs.keys(0)[1], runs.begin(made).state
    gather = streaming.gatherer(made.sample, stored)
    sample = streaming.either(made.sample)
    step = jax.jit(partial(loops.advance, made.trainer, sample, capacity=FLAGS.block))

    @jax.jit
    def draw(key, first, images):
        """Sums, so that every pixel is made and none is kept."""
        keys = jax.vmap(partial(jax.random.fold_in, key))(first + jnp.arange(FLAGS.block))
        return jax.lax.map(lambda key: sum(jnp.sum(part.x) for part in sample(key, images)), keys)

    def trained(at: Callable[[int], tuple[Any, float]], first: int):
        done, end = 0, first + FLAGS.block
        while first + done < end:
            data, stop = at(first + done)
            count = int(min(end, stop)) - first - done
            now = state._replace(step=jnp.int32(first + done))
            jax.block_until_ready(step(key, now, data, count))
            done += count

    feed = partial(streaming.feed, made.sample, key=key, total=total, most=FLAGS.block)
    with feed(images) as on_device, feed(stored) as on_disk:
        ways = {
            "drawn on the device": lambda n: jax.block_until_ready(draw(key, n, images)),
            "gathered from disk": lambda n: jax.block_until_ready(
                gather(key, np.arange(n, n + FLAGS.block))
            ),
            "training, images on device": lambda n: trained(on_device, n),
            "training, images on disk": lambda n: trained(on_disk, n),
        }
        times: dict[str, list[float]] = {name: [] for name in ways}
        for n in range(0, total, FLAGS.block):  # the first turn compiles
            for name, way in ways.items():
                begin = time.perf_counter()
                way(n)
                times[name].append(time.perf_counter() - begin)
    return {name: seconds[1:] for name, seconds in times.items()}


if __name__ == "__main__":
    cli.start(main, __doc__)
