"""On which devices an entry point computes."""

import os

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
    "most one per core, which makes training faster.",
)


def divide() -> None:
    """Makes as many devices of the CPU as `--mesh` names; before anything else of JAX. Where
    XLA_FLAGS says how many there are, or JAX has begun, they stay as they are.
    """
    given = "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", "")
    if FLAGS.mesh is None or not FLAGS.mesh.isdecimal() or int(FLAGS.mesh) < 2 or given:
        return
    try:
        jax.config.update("jax_num_cpu_devices", min(int(FLAGS.mesh), len(processors())))
    except RuntimeError:
        return


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
        if jax.process_count() > 1 and int(asked) != len(devices):
            raise BadInput(f"--mesh={asked}: several processes use all devices; leave it out.")
        devices = devices[: int(asked)]
    return sharding.mesh(devices)
