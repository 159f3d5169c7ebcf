"""What is done to training tasks before they are used: new classes, new labels, new targets.

`key, task -> task` functions that see one task; every task has its own key. They apply from left to
right and reach the full network and every sub-network alike. Tests are never augmented.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from mgaug_jax.checks import check_function, check_positive, check_probability, known
from mgaug_jax.losses import cross_entropy, squared_error
from mgaug_jax.types import Array, Method, Modifier, Task


def augment(change: Callable[[Array, Task], Task]) -> Modifier:
    """Training tasks become `change(key, task)`, after whatever changes them already.

    Raises:
      ValueError: `change` is no function.
    """
    check_function("change", change, "lambda key, task: task")

    def modify(method: Method) -> Method:
        before = method.augment
        if before is None:
            return method._replace(augment=change)

        def both(key: Array, task: Task) -> Task:
            k_before, k_change = jax.random.split(key)
            return change(k_change, before(k_before, task))

        return method._replace(augment=both)

    return modify


def shuffle_labels() -> Modifier:
    """The labels of every task in random order, the same in support and query: meta-augmentation's
    "intrashuffle" on fixed groups (Rajendran et al. 2020), mutual exclusion on fixed labels.

    Raises:
      ValueError: The method's loss is the squared error, or (at the first step) the targets are no
        classes.
    """

    def change(key: Array, task: Task) -> Task:
        order = jax.random.permutation(key, task.support.y.shape[-1])
        return Task(*(part._replace(y=part.y[:, order]) for part in task))

    return _on_classes(
        change, "Labels were to be shuffled, but these targets are no classes; use shift_targets."
    )


def _on_classes(change: Callable[[Array, Task], Task], refusal: str) -> Modifier:
    """`augment(change)`, refused where there are no classes."""

    def checked(key: Array, task: Task) -> Task:
        if task.support.y.shape[-1] < 2:
            raise ValueError(refusal)
        return change(key, task)

    def modify(method: Method) -> Method:
        if method.algorithm(method.net, method.inner).loss is squared_error:
            raise ValueError(refusal)
        return augment(checked)(method)

    return modify


def shift_targets(width: float | Array = 1.0) -> Modifier:
    """Regression targets of every task plus one draw of U(-width, width), one for each dimension:
    meta-augmentation's "uniform noise".

    Raises:
      ValueError: `width` is not a number above 0, or the method learns classes.
    """
    check_positive("width", width)

    def change(key: Array, task: Task) -> Task:
        d = task.support.y.shape[-1]
        shift = jax.random.uniform(key, (d,), task.support.y.dtype, -width, width)
        return Task(*(part._replace(y=part.y + shift) for part in task))

    def modify(method: Method) -> Method:
        if method.algorithm(method.net, method.inner).loss is cross_entropy:
            raise ValueError(
                "Targets were to be shifted, but this method learns classes; use shuffle_labels."
            )
        return augment(change)(method)

    return modify


def rotate_classes(rate: float | Array) -> Modifier:
    """TaskAug (Liu et al. 2020): a class turned by 90, 180 or 270 degrees is a new class.

    Every class of a task is a turned one with probability `rate`, all its images by the same angle,
    so that the number of new classes is Binomial(W, rate) as in the source. There a class may be
    in a task twice, plain and turned, which here it is not. Whether MGAug's row kept the source's
    photographic transforms and ramp is not known; that it did is our reading (the catalogue's).

    Args:
      rate: .25 for mini-ImageNet, .5 for CIFAR-FS; 3/4 makes all four angles alike. 0 leaves the
        method as it is. May be traced, so that it can grow from 0 as in the source (over 80,000
        steps).

    Raises:
      ValueError: `rate` is outside [0, 1], the method's loss is the squared error, or (at the first
        step) the targets are no classes or the images not square.
    """
    check_probability("rate", rate, below_one=False)
    if known(rate) == 0:
        return lambda method: method
    return _on_classes(
        lambda key, task: turn_classes(key, task, rate),
        "Classes were to be turned, but these targets are no classes; use shift_targets.",
    )


def turn_classes(key: Array, task: Task, rate: float | Array) -> Task:
    """The task with every class turned by 1, 2 or 3 quarters with probability `rate`; a mixed image
    is turned as the class that it has most of.

    Raises:
      ValueError: The targets are no classes, or the images not square.
    """
    k_new, k_turns = jax.random.split(key)
    way = task.support.y.shape[-1]
    if way < 2:
        raise ValueError("Classes were to be turned, but these targets are none; leave it out.")
    new = jax.random.bernoulli(k_new, rate, (way,))
    turns = jnp.where(new, jax.random.randint(k_turns, (way,), 1, 4), 0)
    turned = lambda part: part._replace(x=turn(part.x, turns[jnp.argmax(part.y, axis=-1)]))
    return Task(*(turned(part) for part in task))


def check_images(x: Array, what: str) -> None:
    """Refuses a batch of examples that are not images.

    Raises:
      ValueError: They are not.
    """
    if x.ndim != 4:
        raise ValueError(
            f"{what} were asked for, but examples of shape {x.shape[1:]} are not images [h, w, c]; "
            "leave them out."
        )


def turn(x: Array, turns: Array) -> Array:
    """Images `[n, h, h, c]`, each turned by `turns [n]` times 90 degrees.

    Raises:
      ValueError: They are not square images.
    """
    check_images(x, "Turned classes")
    if x.shape[1] != x.shape[2]:
        raise ValueError(
            f"Classes were to be turned, but examples of shape {x.shape[1:]} are not square "
            "images; resize them, or leave it out."
        )
    each = jnp.stack([jnp.rot90(x, k, axes=(1, 2)) for k in range(4)])
    return each[turns, jnp.arange(len(x))]
