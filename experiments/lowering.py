"""Times the choices of `nets.Lowering` against each other, on the backend at hand.

    python -m experiments.lowering
    python -m experiments.lowering --only=kind,pixels --repeats=5 --out=DIR

kind: a convolution by Winograd's algorithm, by patches, by XLA; pixels: how much of it at a time;
thin: the first block with and without its map written; pool: before or after the norm; at_once: the
tasks of a FoMAML meta-gradient one after another and together. Sizes are those of Conv-4 at 84 and
28 pixels and of ResNet-10 at 224 (at_once: at 64, with few queries). Where the backend's lowering
computes tasks together, so are convolutions here: four, each with a kernel of its own.

The ways of a row take turns, and only ratios within a row mean something; on a shared CPU that of
processor times is the steadier one. A table by these numbers is `lowering.BACKENDS` in
`mgaug_jax.nets`. --out=DIR writes lowering.csv.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from absl import flags
from flax import linen as nn

from experiments import cli, store
from experiments.bench import turns
from mgaug_jax import fomaml, meta, nets, sampler
from mgaug_jax.episodes import Images
from mgaug_jax.nets import block, lowering
from mgaug_jax.types import Array, MetaParams, Task

FLAGS = flags.FLAGS
flags.DEFINE_list("only", [], "Choices to time. Default: all.", allow_override=True)
flags.DEFINE_integer("repeats", 5, "Turns of each way.", allow_override=True)
flags.DEFINE_string("out", None, "Folder to write to.", allow_override=True)

BLOCKS = {
    "Conv-4, 84, block 1": (25, 84, 3, 64),
    "Conv-4, 84, block 2": (25, 42, 64, 64),
    "Conv-4, 84, block 3": (25, 21, 64, 64),
    "Conv-4, 84, block 4": (25, 10, 64, 64),
    "Conv-4, 28, block 1": (100, 28, 1, 64),
    "Conv-4, 28, block 2": (100, 14, 64, 64),
}
CONVS = {name: size for name, size in BLOCKS.items() if size[2] > 3} | {
    "ResNet-10, 224, stage 1": (5, 56, 64, 64),
    "ResNet-10, 224, stage 2": (5, 28, 128, 128),
    "ResNet-10, 224, stage 3": (5, 14, 256, 256),
    "ResNet-10, 224, stage 4": (5, 7, 512, 512),
}
"""Images, their side, channels in and out."""
NETS = {
    "Conv-4, 84": (nets.conv4, 84, 3, 5),
    "Conv-4, 28": (nets.conv4, 28, 1, 15),
    "ResNet-10, 64": (nets.resnet10, 64, 3, 2),
}
"""Network, side and channels of the images, queries per class."""
PIXELS = (256, 1024, 4096, None)


class Row(NamedTuple):
    """Ways to compute one thing: the same function of the same arguments, of which the first
    `fixed` are not differentiated by.
    """

    size: str
    ways: dict[str, Callable[..., Any]]
    args: tuple[Any, ...]
    fixed: int = 0


def convolutions(ways: dict[str, lowering.Lowering]) -> Iterator[Row]:
    """3x3 convolutions, of several tasks where the backend takes them together."""
    count = 1 if lowering.chosen().at_once == 1 else 4
    for name, (n, side, inputs, out) in CONVS.items():
        args = normal((count, n, side, side, inputs), (count, 3, 3, inputs, out))
        conv = lambda how: lambda x, k: jax.vmap(partial(lowering.conv, how=how))(x, k)
        yield Row(name, {way: conv(how) for way, how in ways.items()}, args)


def kinds() -> Iterator[Row]:
    how = lowering.chosen()
    winograd, patches = how._replace(winograd=0), how._replace(winograd=None)
    native = how._replace(native=True)
    return convolutions({"winograd": winograd, "patches": patches, "native": native})


def pixels() -> Iterator[Row]:
    return convolutions({str(n): lowering.chosen()._replace(pixels=n) for n in PIXELS})


def thin() -> Iterator[Row]:
    how = lowering.chosen()
    for name, (n, side, inputs, out) in BLOCKS.items():
        if inputs <= 3:
            args = normal((n, side, side, inputs), (3, 3, inputs, out), (out,), (out,))
            choices = {"not written": how._replace(thin=8), "written": how._replace(thin=0)}
            ways = {way: partial(block.block, how=how) for way, how in choices.items()}
            yield Row(name, ways, args, fixed=1)  # nobody asks for the gradient of images


def pools() -> Iterator[Row]:
    ways = {"pool first": lowering.norm_relu_pool, "norm first, XLA's pool": norm_first}
    for name, (n, side, _, out) in BLOCKS.items():
        yield Row(name, ways, normal((n, side, side, out), (out,), (out,)))


def norm_first(y: Array, scale: Array, bias: Array) -> Array:
    """`lowering.norm_relu_pool` as it is usually written, with XLA's `reduce_window`."""
    mean, var = lowering.moments(y)
    z = (y - mean) * (scale * jax.lax.rsqrt(var + lowering.EPSILON)) + bias
    return nn.max_pool(nn.relu(z), (2, 2), (2, 2))


def at_once() -> Iterator[Row]:
    for name, (make, side, channels, queries) in NETS.items():
        method = fomaml(make(5, image=(side, side, channels)), lr=0.1, steps=1)
        params, tasks = problem(method, side, channels, queries)

        def gradient(number: int, params: MetaParams, tasks: Task, method=method) -> MetaParams:
            made = method._replace(at_once=number)
            return meta.meta_gradient(made, jax.random.key(1), params, tasks)[0]

        ways = {"one": partial(gradient, 1), "all": partial(gradient, 4)}
        yield Row(name, ways, (params, tasks))


def problem(method, side: int, channels: int, queries: int) -> tuple[MetaParams, Task]:
    """Parameters, and four random tasks."""
    k_pixels, k_init, k_tasks = jax.random.split(jax.random.key(0), 3)
    shape = (5, queries + 1, side, side, channels)
    images = jax.random.randint(k_pixels, shape, 0, 256, jnp.uint8)
    data = Images(images, jnp.full(5, queries + 1), jnp.zeros(1), jnp.ones(1))
    params = method.algorithm(method.net, method.inner).init(k_init)
    return params, sampler(5, 1, queries, 4)(k_tasks, data)


CHOICES = {"kind": kinds, "pixels": pixels, "thin": thin, "pool": pools, "at_once": at_once}


def main(arguments: Sequence[str]) -> int:
    del arguments
    for name in FLAGS.only:
        if name not in CHOICES:
            raise cli.BadInput(f"{name!r} is no choice; known: {', '.join(CHOICES)}.")
    if FLAGS.repeats < 1:
        raise cli.BadInput("--repeats must be 1 or more.")
    folder = None if FLAGS.out is None else store.output(FLAGS.out)
    print(f"{jax.default_backend()}: {lowering.chosen()}")
    print(f"{'':<9} {'':<24} {'':<9} {'':<12} {'ms':>9} {'CPU ms':>9} {'ratio':>6} {'CPU r.':>6}")
    rows = []
    for choice in FLAGS.only or CHOICES:
        for row in CHOICES[choice]():
            both = {way: with_gradient(f, row.fixed) for way, f in row.ways.items()}
            passes = {"forward": row.ways, "both": both}
            for direction, ways in ({"whole": row.ways} if choice == "at_once" else passes).items():
                found = timed(ways, row.args)
                rows += shown(choice, row.size, direction, found)
                if folder is not None:
                    store.write_csv(folder / "lowering.csv", rows)
    return 0


def normal(*shapes: tuple[int, ...]) -> tuple[Array, ...]:
    keys = jax.random.split(jax.random.key(0), len(shapes))
    return tuple(jax.random.normal(key, s) for key, s in zip(keys, shapes, strict=True))


def with_gradient(f: Callable[..., Array], fixed: int = 0) -> Callable[..., Any]:
    """Gradients by all arguments but the first `fixed`."""

    def both(*args: Array):
        total = lambda *args: jnp.sum(jnp.square(f(*args)))
        return jax.grad(total, tuple(range(fixed, len(args))))(*args)

    return both


def timed(ways: dict[str, Callable[..., Any]], args: tuple[Any, ...]) -> dict[str, dict[str, Any]]:
    """Medians of turns of each way, compiled."""
    steps = {}
    for way, f in ways.items():
        program = jax.jit(f).lower(*args).compile()
        steps[way] = lambda program=program: jax.block_until_ready(program(*args))
        steps[way]()
    limit = 0.08
    taken = turns.take_turns(steps, FLAGS.repeats, limit, most=FLAGS.repeats, least=0.2)
    return {way: turns.summary(found, limit) for way, found in taken.items()}


def shown(choice: str, size: str, direction: str, found: dict[str, dict[str, Any]]) -> list[dict]:
    """Prints and returns the rows of what was timed; ratios are to the first way."""
    base, rows = next(iter(found.values())), []
    for way, row in found.items():
        ratio, cpu_ratio = (row[name] / base[name] for name in ("seconds", "cpu_seconds"))
        print(
            f"{choice:<9} {size:<24} {direction:<9} {way:<12} {1e3 * row['seconds']:9.2f} "
            f"{1e3 * row['cpu_seconds']:9.2f} {ratio:6.2f} {cpu_ratio:6.2f}",
            flush=True,
        )
        rows.append({"choice": choice, "size": size, "pass": direction, "way": way, **row})
    return rows


if __name__ == "__main__":
    cli.start(main, __doc__)
