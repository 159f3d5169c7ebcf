"""Times a FoMAML meta-gradient with its tasks one after another and batched, side by side.

    python -m experiments.lowering
    python -m experiments.lowering --image=84 --channels=3 --width=64

Prints the median of interleaved repeats and their ratio; only the ratio means something on a shared
machine. What it found is what `mgaug_jax.nets.lowering.map_tasks` does on a CPU.
"""

import statistics
import time
from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
from absl import flags

from experiments import cli
from mgaug_jax import fomaml, meta, nets, sampler
from mgaug_jax.episodes import Images

FLAGS = flags.FLAGS
flags.DEFINE_integer("image", 28, "Side of the images, in pixels.")
flags.DEFINE_integer("channels", 1, "Channels of the images.")
flags.DEFINE_integer("width", 32, "Channels of Conv-4.")
flags.DEFINE_integer("queries", 15, "Queries per class.")
flags.DEFINE_integer("repeats", 5, "Repeats of each.")


def main(arguments: Sequence[str]) -> int:
    del arguments
    shape = (FLAGS.image, FLAGS.image, FLAGS.channels)
    try:
        method = fomaml(nets.conv4(5, width=FLAGS.width, image=shape), lr=0.1)
        sample = sampler(5, 1, FLAGS.queries, 4)
    except ValueError as error:
        raise cli.BadInput(str(error)) from error
    k_pixels, k_init, key = jax.random.split(jax.random.key(0), 3)
    pixels = jax.random.randint(k_pixels, (5, FLAGS.queries + 1, *shape), 0, 256, jnp.uint8)
    counts = jnp.full(5, FLAGS.queries + 1)
    tasks = sample(key, Images(pixels, counts, jnp.zeros(1), jnp.ones(1)))
    params = method.algorithm(method.net, method.inner).init(k_init)
    ways = {"one after another": 1, "batched": 4}
    steps, times = {}, {name: [] for name in ways}
    for name, at_once in ways.items():
        step = jax.jit(partial(meta.meta_gradient, method._replace(at_once=at_once)))
        steps[name] = step.lower(key, params, tasks).compile()
        jax.block_until_ready(steps[name](key, params, tasks))
    for _ in range(FLAGS.repeats):
        for name, step in steps.items():
            begin = time.perf_counter()
            jax.block_until_ready(step(key, params, tasks))
            times[name].append(time.perf_counter() - begin)
    for name, seconds in times.items():
        low, high = min(seconds), max(seconds)
        print(f"{name:<18} {statistics.median(seconds):8.3f} s  ({low:.3f} to {high:.3f})")
    one, batched = (statistics.median(seconds) for seconds in times.values())
    print(f"batched / one after another: {batched / one:.2f}")
    return 0


if __name__ == "__main__":
    cli.start(main, __doc__)
