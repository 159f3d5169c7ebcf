"""A user's own model as a `Net`: from Linen, from NNX, or from plain functions."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from mgaug_jax.checks import check_count, check_function, check_kind
from mgaug_jax.types import Array, Net, Params, Role


def from_functions(
    init: Callable[[Array], Params],
    apply: Callable[[Params, Array], Array],
    *,
    head: str | None = None,
) -> Net:
    """A `Net` of `init(key) -> params` and `apply(params, x [n, ...]) -> outputs [n, d]`.

    Args:
      init: Makes the parameters, any pytree of arrays.
      apply: The network, without state.
      head: Key of the last layer in `params` ("Dense_1", "head", an index of a list as "2").

    Raises:
      ValueError: No parameter lies under `head`, or no function is given where one belongs.
    """
    check_function("init", init, "lambda key: {'w': jax.random.normal(key, (2, 3))}")
    check_function("apply", apply, "lambda params, x: x @ params['w']")
    shapes = jax.eval_shape(init, jax.random.key(0))
    return Net(init, apply, guess_roles(shapes, head))


def from_linen(module: nn.Module, shape: tuple[int, ...], *, head: str | None = None) -> Net:
    """A `Net` of a Linen module called as `module(x)`.

    Collections other than "params" (batch statistics, say) stay at their initial values, so batch
    norm must be told to normalise by the batch (`use_running_average=False`).

    Args:
      module: The module.
      shape: Of one example, without the batch axis.
      head: Name of the last layer in the parameters ("Dense_1").

    Raises:
      ValueError: No parameter lies under `head`, or `module` or `shape` is none.
    """
    check_kind("module", module, nn.Module, "linen.Dense(5)")
    check_shape("shape", shape)
    return net_of(module, shape, lambda params: guess_roles(params, head))


def from_nnx(make: Callable[[Any], Any], *, head: str | None = None) -> Net:
    """A `Net` of an NNX module made by `make(rngs)` and called as `module(x)`.

    `nnx.Param` variables are the parameters; other variables stay at their initial values.

    Args:
      make: `rngs -> module`, for instance `lambda rngs: MyModel(rngs=rngs)`.
      head: Attribute of the last layer ("linear2").

    Raises:
      ValueError: No parameter lies under `head`, or `make` is no function.
    """
    from flax import nnx

    check_function("make", make, "lambda rngs: MyModel(rngs=rngs)")

    def split(key: Array):
        return nnx.split(make(nnx.Rngs(key)), nnx.Param, ...)

    graph, _, rest = split(jax.random.key(0))

    def init(key: Array) -> Params:
        return nnx.to_pure_dict(split(key)[1])

    def apply(params: Params, x: Array) -> Array:
        state = nnx.State(params)
        return nnx.merge(graph, state, rest, copy=True)(x)

    return from_functions(init, apply, head=head)


def net_of(
    module: nn.Module,
    shape: tuple[int, ...],
    roles: Callable[[Params], Any],
    by_first: Callable[[int], nn.Module] | None = None,
    depth: int = 0,
) -> Net:
    """A `Net` of a Linen module with the roles `roles(shapes of params)`.

    `by_first(m)` is the same module taking its batch statistics from the first `m` examples. A
    module of `depth` blocks is called as `module(h, first, last)` for some of them.
    """
    start = lambda key: module.init(key, jnp.zeros((2, *shape)))
    shapes = jax.eval_shape(start, jax.random.key(0))
    rest = {}
    if set(shapes) != {"params"}:
        made = jax.jit(start)(jax.random.key(0))
        rest = {name: made[name] for name in made if name != "params"}

    def call(module: nn.Module, params: Params, x: Array, *blocks: int) -> Any:
        if not rest:
            return module.apply({"params": params}, x, *blocks)
        outputs, _ = module.apply({"params": params, **rest}, x, *blocks, mutable=list(rest))
        return outputs

    return Net(
        # compiled, since the forward pass that Linen makes to learn the shapes is then left out
        init=jax.jit(lambda key: start(key)["params"]),
        apply=lambda params, x: call(module, params, x),
        roles=roles(shapes["params"]),
        apply_by_first=by_first and (lambda params, x, m: call(by_first(m), params, x)),
        depth=depth,
        part=partial(call, module) if depth else None,
    )


def check_shape(name: str, shape: Any, axes: int | None = None) -> None:
    """Refuses what is not a tuple of sizes, of so many axes if they are given.

    Raises:
      ValueError: It is not.
    """
    if not isinstance(shape, tuple | list) or len(shape) != (axes or len(shape)):
        raise ValueError(f"{name}={shape!r} must be a tuple of sizes, as in (84, 84, 3).")
    for size in shape:
        check_count(f"a size in {name}", size)


def guess_roles(params: Params, head: str | None) -> Any:
    """Roles by shape: convolution kernels are prunable, in a net without any the hidden dense ones.

    Output features are taken to lie on the last axis of a kernel, and the vectors beside it and of
    norms to belong to them, as in flax. Without `head` no dense kernel can be told to be hidden.
    """
    leaves = jax.tree_util.tree_leaves_with_path(params)
    in_head = [head is not None and head in _names(path) for path, _ in leaves]
    if head is not None and not any(in_head):
        known = sorted({_names(path)[0] for path, _ in leaves if path})
        raise ValueError(f"The network has no layer {head!r} to be its head. It has {known}.")
    convolutional = any(leaf.ndim > 2 for _, leaf in leaves)

    dense = {path[:-1] for path, leaf in leaves if leaf.ndim == 2 and len(path) > 1}

    def role(path, leaf, is_head: bool) -> Role:
        if is_head:
            return Role(head=True)
        prunable = leaf.ndim > 2 if convolutional else leaf.ndim == 2 and head is not None
        # the bias of a layer that stays whole stays whole too
        vector = leaf.ndim == 1 and (path[:-1] not in dense if convolutional else head is not None)
        return Role(prunable, leaf.ndim - 1 if prunable or vector else None)

    roles = [role(*leaf, is_head) for leaf, is_head in zip(leaves, in_head, strict=True)]
    return jax.tree.unflatten(jax.tree.structure(params), roles)


def _names(path) -> list[str]:
    return [jax.tree_util.keystr((part,), simple=True) for part in path]
