"""Many meta-steps as one program: a scan, and a loop that stops at what is not finite."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from mgaug_jax.meta import Info, State, Trainer
from mgaug_jax.types import Array


def run(
    trainer: Trainer, sample, key: Array, state: State, data: Any, steps: int
) -> tuple[State, Info]:
    """`steps` meta-updates as one scan, info stacked `[steps]`.

    Step i draws from `fold_in(key, i)`, so a run that is stopped and resumed sees what an
    uninterrupted one sees. `data` is an argument of `sample(key, data) -> tasks`, never a closure,
    which would copy it into the program.
    """
    body = lambda state, _: _next(trainer, sample, key, state, data)
    return jax.lax.scan(body, state, length=steps)


def _next(trainer: Trainer, sample, key: Array, state: State, data: Any) -> tuple[State, Info]:
    k_sample, k_step = jax.random.split(jax.random.fold_in(key, state.step))
    return trainer.step(k_step, state, sample(k_sample, data))


def advance(
    trainer: Trainer,
    sample,
    key: Array,
    state: State,
    data: Any,
    count: int | Array,
    *,
    capacity: int,
    skip: int | Array = 0,
) -> tuple[State, Info, Array]:
    """As `run`, but never into what is not finite: such an update is left out.

    Args:
      trainer: Of the method.
      sample: As in `run`.
      key: As in `run`.
      state: Where to start from.
      data: As in `run`.
      count: How many steps, at most `capacity`; may be traced, so that any number of them is one
        program.
      capacity: Rows of the info; static.
      skip: So many updates may be left out, the next step's tasks following; the next such update
        ends it. May be traced.

    Returns:
      The state, info `[capacity]` and the number of its rows that were filled, of which the last
      is that of the update at which it stopped, if it did.
    """
    shapes = jax.eval_shape(partial(_next, trainer, sample), key, state, data)[1]
    empty = jax.tree.map(lambda leaf: jnp.zeros((capacity, *leaf.shape), leaf.dtype), shapes)

    def going(carry):
        done, left, *_ = carry
        return (done < count) & (left >= 0)

    def body(carry):
        done, left, state, info = carry
        after, one = _next(trainer, sample, key, state, data)
        ok = jnp.all(jnp.stack([jnp.all(leaf) for leaf in jax.tree.leaves(one["finite"])]))
        before = state._replace(step=jnp.where(left > 0, after.step, state.step))
        kept = jax.tree.map(partial(jnp.where, ok), after, before)
        info = jax.tree.map(lambda rows, row: rows.at[done].set(row), info, one)
        return done + 1, left - ~ok, kept, info

    start = jnp.zeros((), jnp.int32), jnp.asarray(skip, jnp.int32), state, empty
    done, _, state, info = jax.lax.while_loop(going, body, start)
    return state, info, done
