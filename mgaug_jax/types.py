"""The records everything else is made of. No logic lives here.

Axis letters: T tasks, U sub-networks, W way, K shot, Q queries per class, n examples.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import optax
from jax.sharding import Mesh

Array = jax.Array
Params = Any
"""A pytree of arrays."""
Loss = Callable[[Array, Array], Array]
"""`(outputs [n, d], y [n, d]) -> scalar`."""
Transform = optax.GradientTransformationExtraArgs
"""An optax transform whose `update` is handed `key=`."""
Wrap = Callable[[Transform], Transform]
"""What is done around an optimiser: it is handed the rule and gives back a rule."""
Perturb = Callable[[Array, Params, Params], Params]
"""`(key, gradients or updates, weights) -> perturbed`, all three in one tree."""


def identity(rule: Transform) -> Transform:
    """The optimiser as it is."""
    return rule


class Examples(NamedTuple):
    """`x [n, ...]` and `y [n, d]`: class probabilities (one-hot or soft) or regression targets."""

    x: Array
    y: Array


class Task(NamedTuple):
    """One episode: `support` (n = W K) to adapt on, `query` (n = W Q) to be judged on."""

    support: Examples
    query: Examples


@dataclasses.dataclass(frozen=True)
class Role:
    """What one parameter array is to the network that holds it."""

    prunable: bool = False
    """Entries may be masked by parameter pruning (PP, CP)."""
    width: int | None = None
    """Axis that holds the output channels of a hidden layer, which width pruning (WP) narrows."""
    head: bool = False
    """Belongs to the last layer."""
    block: int | None = None
    """Which of the network's blocks holds it, the head in the last; None: the net names none."""
    fixed: bool = False
    """The inner loop leaves it where it is."""


class Net(NamedTuple):
    """A network as two pure functions and a description of its parameters.

    Attributes:
      init: `key -> params`.
      apply: `(params, x [n, ...]) -> outputs [n, d]`.
      roles: A `Role` for every leaf of `params`, in the same tree.
      apply_by_first: `(params, x, m) -> outputs [n, d]`, batch norm taking its statistics from the
        first `m` examples alone; None for a network that cannot.
      mask: Of a sub-network: 0 for every weight it lacks, which no inner loop moves; None: whole.
      depth: Number of blocks; 0 for a network that names none.
      part: `(params, h, first, last) -> h`, the blocks from `first` up to, not including, `last`,
        one at least: `part(params, x, 0, depth)` is `apply`; None for a network that names none.
      lowering: How it computes (`nets.Lowering`); None: as is fastest on the backend.
    """

    init: Callable[[Array], Params]
    apply: Callable[[Params, Array], Array]
    roles: Any
    apply_by_first: Callable[[Params, Array, int], Array] | None = None
    mask: Params | None = None
    depth: int = 0
    part: Callable[[Params, Array, int, int], Array] | None = None
    lowering: Any = None


class MetaParams(NamedTuple):
    """What the outer loop learns: the initial weights and whatever else an algorithm learns."""

    net: Params
    extra: dict[str, Params]


Forward = Callable[[Net, Params, Examples, Array], Array]
"""`(net, params, support, x) -> outputs`: how the adapted network meets its queries."""


class Learner(NamedTuple):
    """An inner loop.

    Attributes:
      init: `key -> MetaParams`.
      start: `(params, support) -> fast`, the learner before its first inner step.
      adapt: `(key, params, support) -> fast`, the learner after its last.
      predict: `(fast, x [n, ...]) -> outputs [n, d]`.
      loss: Compares outputs with `y`, in the inner and the outer loop.
      path: As `adapt`, but the learner after every inner step, leading axis `steps`; None without
        inner steps.
      weights: `fast -> params` of the adapted network, where predictions are its outputs.
      forward: How the adapted network meets its queries.
      whole: Whether the inner loop moves every weight.
    """

    init: Callable[[Array], MetaParams]
    start: Callable[[MetaParams, Examples], Any]
    adapt: Callable[[Array, MetaParams, Examples], Any]
    predict: Callable[[Any, Array], Array]
    loss: Loss
    path: Callable[[Array, MetaParams, Examples], Any] | None = None
    weights: Callable[[Any], Params] | None = None
    forward: Forward | None = None
    whole: bool = False


Algorithm = Callable[[Net, Wrap], Learner]
"""Makes a learner of a (sub-)network and of what is done around its inner optimiser."""


class Probe(NamedTuple):
    """What a pruner may look at, for one task.

    Attributes:
      grads: Gradient of the full network's outer loss (the query loss after adaptation, unless the
        method has another `judge`) with respect to the initial weights (MAML: through the inner
        loop; FoMAML: at the adapted weights).
      query_loss: `params -> scalar`, query loss of the network before any inner step.
    """

    grads: Params
    query_loss: Callable[[Params], Array]


Pruner = Callable[[Array, Net, Params, Probe, Array], Params]
"""`(key, net, params, probe, keep) -> mask`: 0/1 arrays in the tree of `params` (1 = kept)."""


class Views(NamedTuple):
    """The pruned sub-networks ("views") whose meta-gradients augment the full network's.

    Attributes:
      count: U, how many.
      masks: `(key, net, params, probe) -> masks [U, ...]`, for one task.
      sizes: Resolutions, one of which every view draws per meta-step; empty: the task's own.
      reduce: `losses [1 + U] -> scalar`, full network first.
      active: False leaves the views out of the step (may be traced).
    """

    count: int
    masks: Callable[[Array, Net, Params, Probe], Params]
    sizes: tuple[int, ...]
    reduce: Callable[[Array], Array]
    active: bool | Array


Make = Callable[[Net], Learner]
"""The learner of a network: an algorithm, the inner optimiser's surroundings being settled."""
Judge = Callable[[Array, Net, Make, MetaParams, Task], tuple[Array, Array]]
"""`(key, net, make, params, task) -> (outer loss, query outputs [n, d])`; it adapts itself, with
the learner of `net` or of what it makes of it."""


class Term(NamedTuple):
    """A term of the objective that is made of one number per task, of the full network alone.

    Attributes:
      measure: `(key, learner, params, task) -> scalar`.
      combine: `values [T] -> scalar`, what is added to the objective.
    """

    measure: Callable[[Array, Learner, MetaParams, Task], Array]
    combine: Callable[[Array], Array]


class Method(NamedTuple):
    """A meta-learning method: a network, an inner loop, and what modifies its gradients.

    Attributes:
      net: The network.
      algorithm: Makes the learner of `net` or of a sub-network of it.
      inner: Around the inner optimiser in training.
      views: Sub-networks, or None for the plain method.
      reduce: `task losses [T] -> scalar`.
      outer: Around the outer optimiser.
      test: Around the inner optimiser at meta-test.
      weigh: `task gradients [T, ...] -> weights [T]` in the meta-gradient, of which they are the
        addends (1/T included); None: equal.
      augment: `(key, task) -> task`, what is done to a training task before it is used.
      judge: Makes the outer loss of a task, for the full network and every view; None: the loss of
        the query after the last inner step.
      terms: What else the objective is made of.
      project: `(weights before, weights after a meta-step) -> weights`, the last word on it.
      mesh: Devices over which tasks are spread; None: the default one.
      at_once: How many tasks a device computes at once; None: what is fastest.
    """

    net: Net
    algorithm: Algorithm
    inner: Wrap
    views: Views | None
    reduce: Callable[[Array], Array]
    outer: Wrap = identity
    test: Wrap = identity
    weigh: Callable[[MetaParams], Array] | None = None
    augment: Callable[[Array, Task], Task] | None = None
    judge: Judge | None = None
    terms: tuple[Term, ...] = ()
    project: Callable[[Params, Params], Params] | None = None
    mesh: Mesh | None = None
    at_once: int | None = None


Modifier = Callable[[Method], Method]
