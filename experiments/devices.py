"""On which devices an entry point computes."""

import os
from contextlib import suppress

import jax
from absl import flags
from jax.sharding import Mesh

from experiments.bench.turns import processors
from experiments.cli import BadInput
from mgaug_jax import sharding

FLAGS = flags.FLAGS
flags.DEFINE_string(
    "mesh",
    None,
    "Spread the work over devices: a number of them, or all. A CPU is divided into that many, at "
    "most one per core, which makes training faster. In --distributed training: of each process.",
)


def divide(asked: str | None) -> None:
    """Makes so many devices of the CPU, at most one per core, if `asked` is a number; before
    anything else of JAX. Where XLA_FLAGS says how many there are, they stay as they are.
    """
    given = "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", "")
    if asked is None or not asked.isdecimal() or given:
        return
    with suppress(RuntimeError):  # JAX has begun
        jax.config.update("jax_num_cpu_devices", max(1, min(int(asked), len(processors()))))


def mesh(default: str | None = None) -> Mesh | None:
    """The devices that `--mesh` names, or else `default`; None for the usual one.

    Raises:
      BadInput: There are fewer.
    """
    asked = default if FLAGS.mesh is None else FLAGS.mesh
    devices = jax.devices()
    if asked is None:
        return None
    if asked != "all":
        if not asked.isdecimal() or not 0 < int(asked) <= len(devices):
            raise BadInput(
                f"--mesh={asked} was asked for, but there are {len(devices)} devices; give a "
                "number up to that, or all."
            )
        if jax.process_count() == 1:
            devices = devices[: int(asked)]
        elif int(asked) != (own := jax.local_device_count()):
            raise BadInput(
                f"--mesh={asked}: of several processes each uses all of its devices, {own} here; "
                "give that number, or leave it out."
            )
    return sharding.mesh(devices)
