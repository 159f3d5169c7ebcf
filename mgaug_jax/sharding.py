"""Tasks spread over devices, of one host or of many: one mesh, one `shard_map`, nothing else.

Meta-parameters and data lie on every device; each samples, adapts and differentiates its share of
the tasks. What crosses devices in a meta-step is one sum of the meta-gradient, and one number per
task and network.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from mgaug_jax.checks import check_kind
from mgaug_jax.nets.lowering import map_tasks
from mgaug_jax.types import Method, Modifier

AXIS = "tasks"


def mesh(devices: Sequence[Any] | None = None) -> Mesh:
    """The devices in a row; all of all hosts when it is None."""
    return Mesh(jax.devices() if devices is None else list(devices), (AXIS,))


def sharded(mesh: Mesh) -> Modifier:
    """Spreads the tasks of a meta-step, and those tasks' sub-networks, over the devices of `mesh`.

    What is computed stays the same but for the order of sums. T should be a multiple of the number
    of devices: for any other, tasks are repeated to fill them, and images move between devices. Put
    state and data on the mesh by `replicate`, and compile with `out_shardings=replicated(mesh)`.

    Raises:
      ValueError: The mesh is none or has explicit axes, or the method is spread over one already.
    """
    check_kind("mesh", mesh, Mesh, "sharding.mesh()")
    if any(kind != AxisType.Auto for kind in mesh.axis_types):
        raise ValueError(
            "sharded was given a mesh with explicit axes, in which every operation must name its "
            "sharding; make it by sharding.mesh() or with axis_types of AxisType.Auto."
        )

    def modifier(method: Method) -> Method:
        if method.mesh is not None:
            raise ValueError("The tasks are spread over a mesh already; use sharded once.")
        return method._replace(mesh=mesh)

    return modifier


def over_tasks(method: Method, f: Callable, params: Any, *batches: Any) -> Any:
    """`f(params, ...)` of every task along the leading axis T of `batches`, stacked: on the devices
    of the method's mesh if it has one, each mapping its share as `lowering.map_tasks` does.

    Every array that `f` reads must be in `params` or `batches`, not closed over: it would keep the
    sharding that it has outside.
    """

    def one_device(params: Any, *batches: Any):
        return map_tasks(method.net, partial(f, params), *batches, at_once=method.at_once)

    if method.mesh is None:
        return one_device(params, *batches)
    return spread(one_device, method.mesh, params, *batches)


def spread(f: Callable, mesh: Mesh, params: Any, *batches: Any) -> Any:
    """`f(params, *batches)` for an `f` that maps along the leading axis of `batches`: every device
    of `mesh` has all of `params` and its share of the rows, repeated until all have as many.
    """
    rows = len(jax.tree.leaves(batches)[0])
    missing = -rows % mesh.size

    def filled(leaf):
        return leaf[jnp.arange(rows + missing) % rows] if missing else leaf

    whole, along = PartitionSpec(), PartitionSpec(mesh.axis_names)
    # Without the check, loops inside may begin with what all devices share and end with what is
    # each one's own, which is what adapting from shared weights is.
    each = jax.shard_map(
        f, mesh=mesh, in_specs=(whole, *[along] * len(batches)), out_specs=along, check_vma=False
    )
    return jax.tree.map(lambda leaf: leaf[:rows], each(params, *jax.tree.map(filled, batches)))


def along(mesh: Mesh, tasks: int) -> NamedSharding:
    """Of arrays `[S, T, ...]` with so many tasks T: over the devices, if they share them evenly, as
    `spread` does; else all on every device.
    """
    if tasks % mesh.size:
        return replicated(mesh)
    return NamedSharding(mesh, PartitionSpec(None, mesh.axis_names))


def replicated(mesh: Mesh) -> NamedSharding:
    """All of an array on every device."""
    return NamedSharding(mesh, PartitionSpec())


def replicate(tree: Any, mesh: Mesh) -> Any:
    """`tree`, the same on every host, as arrays that lie on every device of `mesh`."""

    def put(leaf):
        if isinstance(leaf, jax.Array) and leaf.sharding == replicated(mesh):
            return leaf
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            data = put(jax.random.key_data(leaf))
            return jax.random.wrap_key_data(data, impl=jax.random.key_impl(leaf))
        leaf = jax.device_get(leaf)
        return jax.make_array_from_callback(leaf.shape, replicated(mesh), lambda part: leaf[part])

    return jax.tree.map(put, tree)
