"""Many runs as one program: settings times seeds, batched where that is faster.

A setting is a tree of numbers, a seed a pair of keys. Members share nothing but their tasks, which
are those of their seed, so that each is what a run of its own would be.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from mgaug_jax.meta import State, Trainer
from mgaug_jax.nets.lowering import map_tasks
from mgaug_jax.types import Array, MetaParams, Net, Task

Make = Callable[[Any], Trainer]
"""The trainer of a setting, whose numbers are traced."""


class Members(NamedTuple):
    """Where the runs of a sweep are; every leaf `[K, S, ...]`, K settings and S seeds.

    Attributes:
      params: Meta-parameters.
      opt: States of the outer optimisers.
      stopped: The step whose update was not finite, -1 while there is none. It was not applied, and
        the member stays where it was.
    """

    params: MetaParams
    opt: Any
    stopped: Array


def begin(make: Make, net: Net, values: Any, keys: Array) -> Members:
    """Members before their first step.

    Args:
      make: `setting -> Trainer`.
      net: Decides how members are mapped (`lowering.map_tasks`).
      values: Settings, leaves `[K, ...]`.
      keys: Of the initial networks, `[S]`.
    """

    def one(value: Any, key: Array) -> Members:
        state = make(value).init(key)
        return Members(state.params, state.opt, jnp.full((), -1, jnp.int32))

    return map_tasks(net, lambda value: jax.vmap(partial(one, value))(keys), values)


def advance(
    make: Make,
    net: Net,
    sample: Callable[[Array, Any], Task],
    values: Any,
    keys: Array,
    members: Members,
    data: Any,
    step: int | Array,
    count: int | Array,
    shared: Array,
) -> tuple[Members, Array]:
    """`count` meta-steps of every member, as `loops.run` makes them of each.

    The loop over steps is outside, so that what depends on the step alone is not batched: a choice
    of branches (sub-networks switched on, their resolution) computes the chosen one.

    Args:
      make: `setting -> Trainer`.
      net: As in `begin`.
      sample: `(key, data) -> tasks`.
      values: Settings, leaves `[K, ...]`.
      keys: Of training, `[S]`.
      members: As `begin` or `advance` left them.
      data: What `sample` draws from.
      step: Meta-steps done; may be traced.
      count: How many to do; may be traced.
      shared: Key of what all members have in common, the resolutions (see `meta_gradient`).

    Returns:
      The members, and the mean of their query losses over the steps, `[K, S]`.
    """

    def one_step(i: Array, carry: tuple[Members, Array]) -> tuple[Members, Array]:
        members, losses = carry
        now = step + i
        k_shared = jax.random.fold_in(shared, now)

        def drawn(key: Array) -> tuple[Array, Task]:
            k_sample, k_step = jax.random.split(jax.random.fold_in(key, now))
            return k_step, sample(k_sample, data)

        k_steps, tasks = jax.vmap(drawn)(keys)

        def one(value: Any, member: Members, key: Array, tasks: Task):
            state = State(jnp.asarray(now, jnp.int32), member.params, member.opt)
            after, info = make(value).step(key, state, tasks, k_shared)
            finite = [jnp.all(leaf) for leaf in jax.tree.leaves(info["finite"])]
            ok, going = jnp.all(jnp.stack(finite)), member.stopped < 0
            stopped = jnp.where(going & ~ok, now, member.stopped)
            new = Members(after.params, after.opt, stopped)
            kept = jax.tree.map(partial(jnp.where, ok & going), new, member)
            return kept._replace(stopped=stopped), info["query_loss"]

        def of_value(value: Any, members: Members):
            each = lambda *batch: one(value, *batch)
            return map_tasks(net, each, members, k_steps, tasks)

        members, loss = map_tasks(net, of_value, values, members)
        return members, losses + loss / count

    start = members, jnp.zeros(members.stopped.shape)
    return jax.lax.fori_loop(0, count, one_step, start)
