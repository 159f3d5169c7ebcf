"""The other processes of a run: how they are joined, agree and end.

Every process of a run computes the same program; the first one alone writes and speaks.
"""

import contextlib
import hashlib
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterator
from typing import Any, TypeVar, cast

import jax
import numpy as np
from absl import flags
from jax.experimental import multihost_utils

from experiments.cli import (
    EXIT_FAILED,
    EXIT_INTERRUPTED,
    BadInput,
    Failed,
    Interrupted,
    NotFinite,
)

T = TypeVar("T")
TEXT = 2000
"""Bytes of a refusal that the first process tells the others."""
GONE = re.compile("[Gg]loo|NCCL|UNAVAILABLE:|DEADLINE_EXCEEDED:|coordination service")
"""What XLA says of a collective that failed."""
GO_ON = "go on with the same flags and --resume in all processes."

FLAGS = flags.FLAGS
flags.DEFINE_bool(
    "distributed",
    False,
    "Join the run's other processes: as JAX_COORDINATOR_ADDRESS (host:port of the first), "
    "JAX_NUM_PROCESSES and JAX_PROCESS_ID say, or Slurm, Open MPI or a TPU pod. Takes all devices.",
)
flags.DEFINE_integer("heartbeat", 100, "Seconds after which a silent process counts as dead.")


def join() -> None:
    """Joins the other processes if `--distributed` asks for it; before anything else of JAX.

    Raises:
      BadInput: They cannot be joined.
    """
    if not FLAGS.distributed:
        return
    number = lambda name: int(os.environ[name]) if name in os.environ else None
    try:
        jax.distributed.initialize(
            os.environ.get("JAX_COORDINATOR_ADDRESS"),
            number("JAX_NUM_PROCESSES"),
            number("JAX_PROCESS_ID"),
            heartbeat_timeout_seconds=FLAGS.heartbeat,
        )
    except (ValueError, RuntimeError, TypeError) as error:
        raise BadInput(
            f"the run's other processes cannot be joined ({str(error).splitlines()[0]}); set "
            "JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID for each of them."
        ) from error
    multihost_utils.process_allgather(np.zeros(1))  # connected while none of them is late


def together(f: Callable[[], T]) -> T:
    """`f()`, of every process; what one refuses, all do.

    Raises:
      BadInput: One of them did.
    """
    if jax.process_count() == 1:
        return f()
    found, refusal = None, ""
    try:
        found = f()
    except BadInput as error:
        refusal = str(error)
    for number, text in enumerate(_texts(refusal)):
        if text:
            raise BadInput(text if number == jax.process_index() else f"process {number}: {text}")
    return cast(T, found)


def alike(what: dict[str, Any]) -> None:
    """Refuses processes that would not compute the same.

    Raises:
      BadInput: One is given something else than the first.
    """
    if jax.process_count() == 1:
        return
    digests = [hashlib.sha256(repr(value).encode()).hexdigest()[:16] for value in what.values()]
    told = [text.split() for text in _texts(" ".join(digests))]
    for number, other in enumerate(told):
        differ = [name for name, a, b in zip(what, told[0], other, strict=True) if a != b]
        if differ:
            raise BadInput(
                f"process {number} has another {' and '.join(differ)} than the first; give every "
                "process the same."
            )


def _texts(text: str) -> list[str]:
    """The texts of all processes."""
    own = np.frombuffer(text.encode()[:TEXT].ljust(TEXT), np.uint8)
    told = np.asarray(multihost_utils.process_allgather(own)).reshape(-1, TEXT)
    return [row.tobytes().decode(errors="ignore").strip() for row in told]


def first() -> bool:
    """Whether this process is the one that writes."""
    return jax.process_index() == 0


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Nothing is printed but by the first process."""
    if first():
        yield
    else:
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
            yield


def on_first(f: Callable[[], T], otherwise: T) -> T:
    """`f()` on the first process, `otherwise` on the others, once the first has it.

    Raises:
      BadInput: The first did.
    """
    return together(f if first() else lambda: otherwise)


def on_first_arrays(f: Callable[[], T], like: T) -> T:
    """`f()` of the first process, on all: arrays in the tree and the shapes of `like`.

    Raises:
      BadInput: The first did.
    """
    found = on_first(f, like)
    if jax.process_count() == 1:
        return found
    return multihost_utils.broadcast_one_to_all(jax.device_get(found))


def text_of_first(text: str) -> str:
    """The first process's text."""
    return text if jax.process_count() == 1 else _texts(text)[0]


def agree(stop: bool, steps: int) -> tuple[bool, int]:
    """Whether any process is to stop, and the number of steps of the one that wants the fewest."""
    if jax.process_count() == 1:
        return stop, steps
    told = multihost_utils.process_allgather(np.array([not stop, steps]))
    go, steps = np.asarray(told).reshape(-1, 2).min(0)
    return not go, int(steps)


@contextlib.contextmanager
def peers() -> Iterator[None]:
    """Ends this process, and says why, when another one is gone or this one alone must end.

    At once, not by an exception: on the way out JAX would wait for the others, then abort.
    """
    try:
        yield
    except (Exception, Interrupted) as error:
        if jax.process_count() == 1 or isinstance(error, BadInput | NotFinite):
            raise  # all end by it
        if isinstance(error, Interrupted):
            _leave(str(error), EXIT_INTERRUPTED)
        if isinstance(error, Failed | OSError):
            _leave(str(error), EXIT_FAILED)
        if GONE.search(str(error)):
            why = str(error).splitlines()[0][:200]
            _leave(f"another process of the run is gone ({why}); {GO_ON}", EXIT_INTERRUPTED)
        _leave(traceback.format_exc(), EXIT_FAILED)


def _leave(why: str, code: int) -> None:
    sys.stdout.flush()
    what = "interrupted" if code == EXIT_INTERRUPTED else "error"
    print(f"{what}: {why}", file=sys.stderr, flush=True)
    os._exit(code)
