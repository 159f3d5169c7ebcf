"""Images that stay on disk: tasks are gathered on the host, ahead of the device that trains.

Which images a task has is decided by the very sampler that draws from images on the device: it is
run on images whose pixels are their own places. So a task depends on the key and its number alone,
a streamed run sees what the other one sees, and nothing need be remembered to go on from any step.

    images = on_disk("folder", "train", data_dir=DIR, size=224)
    with feed(sample, images, key, steps, 25) as at:
        tasks, end = at(step)  # for the steps up to `end`
        state, info, _ = advance(trainer, either(sample), key, state, tasks, end - step, ...)
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from mgaug_jax import sharding
from mgaug_jax.episodes import Images, normalise, with_rotations
from mgaug_jax.types import Array, Examples, Task

T = TypeVar("T")
Sample = Callable[[Array, Any], Task]
BLOCK = 2**27
"""Bytes of pixels that are gathered at once, where a single task is not larger."""
AHEAD = 2
"""Blocks that are gathered before they are asked for."""


@dataclasses.dataclass(frozen=True)
class Stored:
    """`Images` on disk. It is no pytree, so that no `jit` takes it for an argument and copies it.

    Attributes:
      pixels: `uint8 [C / turns, M, h, w, c]`, mapped.
      counts: `int32 [C]`.
      mean, std: `[c]`, of pixels scaled to [0, 1].
      turns: 4 if every class is also there turned by 90, 180 and 270 degrees, see
        `episodes.with_rotations`; else 1.
    """

    pixels: np.ndarray
    counts: Array
    mean: Array
    std: Array
    turns: int = 1


class Gathered(NamedTuple):
    """Tasks of S numbers, with a copy of their pixels.

    Attributes:
      keys: `uint32 [S, ...]`, data of the keys that they were drawn with.
      tasks: Leading axes S and T; images are uint8.
      mean, std: As of `Stored`.
    """

    keys: Array
    tasks: Task
    mean: Array
    std: Array


def nbytes(stored: Stored) -> int:
    """What the images take on a device."""
    return stored.turns * stored.pixels.nbytes


def turned(stored: Stored) -> Stored:
    """As `episodes.with_rotations`.

    Raises:
      ValueError: The images are not square.
    """
    if stored.pixels.shape[2] != stored.pixels.shape[3]:
        raise ValueError("Turned classes were asked for, but the images are not square.")
    return dataclasses.replace(stored, counts=jnp.tile(stored.counts, 4), turns=4)


def on_device(stored: Stored) -> Images:
    """All of the images, on the default device."""
    # A copy: an array that shared the mapped file's memory would change with the file.
    pixels = jnp.array(stored.pixels)
    counts = stored.counts[: len(pixels)]
    images = Images(pixels, counts, stored.mean, stored.std)
    return images if stored.turns == 1 else with_rotations(images)


def take(stored: Stored, classes: np.ndarray, images: np.ndarray) -> np.ndarray:
    """Pixels `uint8 [..., h, w, c]` of images `[...]` of classes `[...]`."""
    turns, classes = np.divmod(classes, len(stored.pixels))
    found = np.asarray(stored.pixels[classes, images])
    for n in range(1, stored.turns):
        found[turns == n] = np.rot90(found[turns == n], n, axes=(1, 2))
    return found


def places(stored: Stored) -> Images:
    """Images of one pixel and two channels, the class and the number in it. Normalised they come
    back as floats, exact to the nearest integer below 2 million.
    """
    numbers = np.indices((len(stored.counts), stored.pixels.shape[1]))
    pixels = jnp.asarray(np.moveaxis(numbers, 0, -1)[:, :, None, None])
    return Images(pixels, stored.counts, jnp.zeros(2), jnp.full(2, 1 / 255))


def shapes(stored: Stored) -> Images:
    """Shapes and types of what `on_device` gives."""
    shape = len(stored.counts), *stored.pixels.shape[1:]
    return jax.eval_shape(
        lambda: Images(jnp.zeros(shape, jnp.uint8), stored.counts, stored.mean, stored.std)
    )


@functools.lru_cache(16)
def _drawer(sample: Sample):
    """Compiled once for a sampler, though every validation gathers anew."""

    @jax.jit
    def draw(key: Array, numbers: Array, images: Images) -> tuple[Array, Task]:
        keys = jax.vmap(lambda n: jax.random.split(jax.random.fold_in(key, n))[0])(numbers)
        return jax.random.key_data(keys), jax.vmap(sample, (0, None))(keys, images)

    return draw


def gatherer(
    sample: Sample, stored: Stored, mesh: Mesh | None = None
) -> Callable[[Array, np.ndarray], Gathered]:
    """`(key, numbers [S]) -> tasks`, those that `sample` draws at the meta-steps of `loops.run`, or
    the episodes of `evaluate`, of these numbers.

    Args:
      sample: `(key, images) -> tasks`, as for images on the device.
      stored: The images.
      mesh: Devices that the tasks of a number are spread over. A host reads those of its own
        devices alone, unless they are no multiple of the devices: then all.
    """
    try:  # where a GPU trains, a draw on it would wait for the steps that it is to be ahead of
        device = jax.local_devices(backend="cpu")[0]
    except RuntimeError:
        device = jax.local_devices()[0]

    draw, images = _drawer(sample), jax.device_put(places(stored), device)

    def gather(key: Array, numbers: np.ndarray) -> Gathered:
        with jax.default_device(device):
            drawn = draw(jax.device_put(key, device), numbers, images)
        keys, tasks = jax.device_get(drawn)

        def put(shape: tuple[int, ...], part: Callable[[Any], Any]) -> Array:
            if mesh is None:
                return jax.device_put(part(...))
            place = sharding.along(mesh, shape[1])
            return jax.make_array_from_callback(shape, place, lambda at: part((at or ())[:2]))

        def read(examples: Examples) -> Examples:
            where = np.rint(examples.x[..., 0, 0, :]).astype(np.int64)
            x = lambda part: take(stored, *np.moveaxis(where[part], -1, 0))
            shape = (*where.shape[:-1], *stored.pixels.shape[2:])
            return Examples(
                put(shape, x), put(examples.y.shape, lambda part: np.asarray(examples.y)[part])
            )

        whole = (keys, stored.mean, stored.std)
        whole = jax.device_put(whole) if mesh is None else sharding.replicate(whole, mesh)
        return Gathered(whole[0], Task(read(tasks.support), read(tasks.query)), *whole[1:])

    return gather


def look_up(key: Array, gathered: Gathered) -> Task:
    """The tasks that a key draws, their images normalised; NaN if they were not gathered."""
    same = jnp.all(gathered.keys == jax.random.key_data(key), axis=-1)
    tasks = jax.tree.map(lambda leaf: leaf[jnp.argmax(same)], gathered.tasks)
    mean = jnp.where(jnp.any(same), gathered.mean, jnp.nan)
    return Task(*(part._replace(x=normalise(part.x, mean, gathered.std)) for part in tasks))


def either(sample: Sample) -> Sample:
    """`sample` for whatever data: tasks that were gathered for it are looked up."""
    return lambda key, data: (look_up if isinstance(data, Gathered) else sample)(key, data)


def rows(sample: Sample, stored: Stored, most: int) -> int:
    """For how many numbers, at least one and at most so many, tasks make a block."""
    tasks = jax.eval_shape(sample, jax.random.key(0), shapes(stored))
    return max(1, min(most, BLOCK // sum(math.prod(part.x.shape) for part in tasks)))


@contextmanager
def ahead(make: Callable[[int], T], stop: int, depth: int = AHEAD) -> Iterator[Callable[[int], T]]:
    """`get(n) -> make(n)`, for n in rising order, while the next up to `stop` are being made in
    another thread. What `make` raises, `get` raises; on leaving the thread ends with what it is at.
    """
    made: dict[int, Future[T]] = {}
    pool = ThreadPoolExecutor(1, thread_name_prefix="gather")

    def get(n: int) -> T:
        for old in [number for number in made if number < n]:
            del made[old]
        for number in (n, *range(n + 1, min(n + 1 + depth, stop))):
            if number not in made:
                made[number] = pool.submit(make, number)
        return made[n].result()

    try:
        yield get
    finally:
        pool.shutdown(cancel_futures=True)


@contextmanager
def feed(
    sample: Sample, data: Any, key: Array, total: int, most: int, mesh: Mesh | None = None
) -> Iterator[Callable[[int], tuple[Any, float]]]:
    """`at(number) -> (data, end)`: what `either(sample)` draws the tasks from of the numbers up to,
    not including, `end`. Images on disk are gathered block by block, other data are for all.

    Args:
      sample: `(key, data) -> tasks`.
      data: `Stored`, or anything else that `sample` takes.
      key: Of the numbers' keys, see `gatherer`.
      total: The last number, and one.
      most: Of numbers in a block.
      mesh: See `gatherer`.
    """
    if not isinstance(data, Stored):
        yield lambda number: (data, math.inf)
        return
    size, gather = rows(sample, data, most), gatherer(sample, data, mesh)
    make = lambda n: gather(key, np.arange(n * size, (n + 1) * size))
    with ahead(make, math.ceil(total / size)) as block:
        yield lambda number: (block(number // size), (number // size + 1) * size)
