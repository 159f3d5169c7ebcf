"""The words of a spec: what algorithms, modifiers, networks and named values stand for.

`experiments.spec` reads the language; this is its dictionary.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import optax

from mgaug_jax import (
    augmentations,
    bottleneck,
    copies,
    judging,
    learners,
    methods,
    nets,
    outer,
    perturb,
    photo,
    pruning,
    taml,
)
from mgaug_jax.checks import check_count, check_probability, check_rate, known
from mgaug_jax.modifiers import cp, full_and_worst, pp, total, worst, wp
from mgaug_jax.nets.lowering import chosen
from mgaug_jax.types import Array, Loss, Method, Modifier, Net


class Problem(NamedTuple):
    """What the data ask of a method.

    Attributes:
      net: `way -> Net`, None for an embedding.
      outputs: Ways, or None where the network's outputs are not classes.
      loss: Of the inner and the outer loop.
      steps: Meta-steps of the run, which schedules span.
      pixels: Mean and std `[c]` that images were normalised by; None: no images.
    """

    net: Callable[[int | None], Net]
    outputs: int | None
    loss: Loss
    steps: int
    pixels: tuple[Array, Array] | None = None


class Clock(NamedTuple):
    """The meta-step (traced), the number of them, and `Problem.pixels`."""

    step: Array
    steps: int
    pixels: tuple[Array, Array] | None = None


class Entry(NamedTuple):
    """A name of the language: what it builds and the arguments it takes, in order."""

    build: Callable[..., Any]
    arguments: tuple[str, ...]


GRADIENT = ("lr", "steps", "forward")
SUBNETS = ("keep", "subnets", "high", "cap", "sizes", "reduce", "start", "stop")


def _gradient(make: Callable[..., Method]) -> Entry:
    def build(problem: Problem, **options) -> Method:
        return make(problem.net(problem.outputs), loss=problem.loss, **options)

    return Entry(build, GRADIENT)


def _protonet(problem: Problem, **options) -> Method:
    if problem.outputs is None:
        raise ValueError("protonet needs classes, but this is a regression problem; use maml.")
    return methods.protonet(problem.net(None), **options)


def _scheduled(make: Callable[..., Modifier], *arguments: str) -> Entry:
    """A pruner whose sub-networks take part from step `start` up to, not including, `stop`."""

    def build(clock: Clock, start: int = 0, stop: int | None = None, **options) -> Modifier:
        check_count("start", start, 0)
        if stop is not None:
            check_count("stop", stop, start + 1)
        if start == 0 and stop is None:
            return make(**options)
        active = clock.step >= start
        return make(active=active if stop is None else active & (clock.step < stop), **options)

    return Entry(build, (*SUBNETS, *arguments))


CONSTANT = lambda clock: 1.0


def _noise(clock: Clock, std: float, schedule=CONSTANT, **options) -> Modifier:
    """Sigma times what the schedule says."""
    check_rate("std", std)
    _no_clock_at_test(schedule, options)
    return perturb.noise(0.0 if known(std) == 0 else std * schedule(clock), **options)


def _no_clock_at_test(schedule, options) -> None:
    if options.get("site") is perturb.test and schedule not in (CONSTANT, None):
        raise ValueError("site='test' has no meta-step that a schedule could follow; leave it out.")


def _dsd(clock: Clock, start: int | None = None, stop: int | None = None, **options) -> Modifier:
    """Thirds of the run unless told otherwise."""
    start = max(1, clock.steps // 3) if start is None else start
    stop = max(start + 1, 2 * clock.steps // 3) if stop is None else stop
    return outer.dense_sparse_dense(step=clock.step, start=start, stop=stop, **options)


def _rotate_classes(clock: Clock, rate: float, ramp=CONSTANT) -> Modifier:
    check_probability("rate", rate, below_one=False)
    return augmentations.rotate_classes(rate * ramp(clock))


def _aug(clock: Clock) -> Modifier:
    if clock.pixels is None:
        raise ValueError("aug transforms photographs, but these data are no images; leave it out.")
    return photo.photo_augment(*clock.pixels)


def _lowered(make: Callable[..., Net]) -> Callable[..., Net]:
    """The network's constructor; its `lowering` changes that of the backend."""

    @functools.wraps(make)
    def made(*args: Any, lowering: Mapping[str, Any] | None = None, **options: Any) -> Net:
        if isinstance(lowering, Mapping):
            return make(*args, lowering=chosen()._replace(**lowering), **options)
        return make(*args, lowering=lowering, **options)

    return made


def _metamix(clock: Clock, alpha: float = 2.0, shuffle: float = 0.0, start: int = 0) -> Modifier:
    """Channel Shuffle from step `start` on."""
    check_count("start", start, 0)
    check_probability("shuffle", shuffle, below_one=False)
    if start and known(shuffle) == 0:
        raise ValueError(
            "metamix's start is that of Channel Shuffle; give shuffle, or leave it out."
        )
    rate = shuffle * (clock.step >= start) if start else shuffle
    return judging.metamix(law=judging.beta_law(alpha), shuffle=rate)


def _maxup(clock: Clock, changes=None, **options) -> Modifier:
    del clock
    return copies.maxup(pool=changes, **options)


def _multi_step_loss(clock: Clock, last: float = 0.0, ramp=CONSTANT) -> Modifier:
    """`ramp='linear'` anneals to the last step's loss alone."""
    if ramp is CONSTANT:
        return judging.multi_step_loss(last)
    check_probability("last", last, below_one=False)
    return judging.multi_step_loss(last + (1 - last) * ramp(clock))


def _drop_grad(clock: Clock, rate: float, ramp=CONSTANT, **options) -> Modifier:
    _no_clock_at_test(ramp, options)
    return perturb.drop_grad(rate, ramp=ramp(clock), **options)


def _plain(make: Callable[..., Modifier], *arguments: str) -> Entry:
    """A modifier that does not look at the clock."""
    return Entry(lambda clock, **options: make(**options), arguments)


ALGORITHMS: Mapping[str, Entry] = {
    "maml": _gradient(methods.maml),
    "fomaml": _gradient(methods.fomaml),
    "anil": _gradient(methods.anil),
    "meta_sgd": _gradient(methods.meta_sgd),
    "lslr": _gradient(methods.lslr),
    "protonet": Entry(_protonet, ("forward",)),
}
MODIFIERS: Mapping[str, Entry] = {
    "wp": _scheduled(wp),
    "pp": _scheduled(pp, "pruner"),
    "cp": _scheduled(cp, "scores", "ranking", "select"),
    "noise": Entry(_noise, ("std", "site", "distribution", "relative_to", "schedule")),
    "drop_grad": Entry(_drop_grad, ("rate", "site", "factors", "ramp")),
    "first_order": Entry(lambda clock: methods.first_order, ()),
    "l2": _plain(outer.l2, "weight"),
    "weight_decay": _plain(outer.weight_decay, "rate"),
    "fresh_optimizer": Entry(lambda clock: outer.fresh_optimizer, ()),
    "iht": Entry(
        lambda clock, **options: outer.iterative_hard_thresholding(step=clock.step, **options),
        ("keep", "every"),
    ),
    "dsd": Entry(_dsd, ("keep", "start", "stop")),
    "taml_inequality": _plain(taml.inequality, "weight", "index"),
    "taml_entropy": _plain(taml.entropy, "weight"),
    "metamix": Entry(_metamix, ("alpha", "shuffle", "start")),
    "maxup": Entry(_maxup, ("copies", "changes", "level")),
    "reptile": _plain(judging.reptile),
    "multi_step_loss": Entry(_multi_step_loss, ("last", "ramp")),
    "mr_weights": _plain(bottleneck.mr_weights, "beta", "blocks", "start"),
    "mr_activations": _plain(bottleneck.mr_activations, "beta", "blocks", "start"),
    "shuffle_labels": _plain(augmentations.shuffle_labels),
    "shift_targets": _plain(augmentations.shift_targets, "width"),
    "aug": Entry(_aug, ()),
    "rotate_classes": Entry(_rotate_classes, ("rate", "ramp")),
}
REQUIRED: Mapping[str, str] = {
    "keep": "the fraction of weights kept, as in {name}(keep=0.98)",
    "std": "the standard deviation, as in {name}(std=0.1)",
    "rate": "a number, as in {name}(rate=0.1)",
    "weight": "a factor, as in {name}(weight=0.001)",
    "beta": "the weight of the divergence, as in {name}(beta=0.00001)",
}
NETS: Mapping[str, Entry] = {
    "conv4": Entry(_lowered(nets.conv4), ("width", "dtype", "lowering")),
    "resnet10": Entry(_lowered(nets.resnet10), ("pool", "dtype", "lowering")),
    "resnet18": Entry(_lowered(nets.resnet18), ("pool", "dtype", "lowering")),
    "mlp": Entry(nets.mlp, ("hidden",)),
}
WORDS: Mapping[str, Mapping[str, Any]] = {
    "forward": {"transductive": learners.transductive, "inductive": learners.inductive},
    "scores": {
        "adapted": pruning.adapted,
        "initial": pruning.initial,
        "leave_one_out": pruning.leave_one_out,
        "lowest_adapted": pruning.lowest(pruning.adapted),
        "lowest_initial": pruning.lowest(pruning.initial),
    },
    "ranking": {"per_layer": pruning.per_layer, "globally": pruning.globally},
    "select": {
        "released": pruning.released,
        "released_by_rank": pruning.released_by_rank,
        "exact": pruning.exact,
    },
    "reduce": {
        "total": total,
        "worst": worst,
        "full_and_worst": full_and_worst,
    },
    "pruner": {
        "exact": pruning.random_parameters(),
        "bernoulli": pruning.bernoulli_parameters,
    },
    "dtype": {"bfloat16": jnp.bfloat16},
    "lowering": {"native": {"native": True}, "patches": {"winograd": None}},
    "pool": {"global_mean": nets.global_mean, "top_left_mean": nets.top_left_mean},
    "site": {
        "inner": perturb.inner,
        "inner_update": perturb.inner_update,
        "outer": perturb.outer,
        "outer_update": perturb.outer_update,
        "test": perturb.test,
    },
    "distribution": {
        "gaussian": perturb.gaussian,
        "laplace": perturb.laplace,
        "uniform": perturb.uniform,
        "student_t": perturb.student_t,
    },
    "relative_to": {
        "unit": perturb.unit,
        "gradient_rms": perturb.gradient_rms,
        "leaf_rms": perturb.leaf_rms,
        "weight_rms": perturb.weight_rms,
    },
    "factors": {
        "gaussian": perturb.gaussian_factors,
        "bernoulli": perturb.bernoulli_factors,
    },
    "schedule": {
        "constant": CONSTANT,
        "linear": lambda clock: optax.linear_schedule(1.0, 0.0, clock.steps)(clock.step),
        "cosine": lambda clock: optax.cosine_decay_schedule(1.0, clock.steps)(clock.step),
    },
    "level": {"by_task": copies.by_task, "by_query": copies.by_query},
    "changes": {
        "default": copies.default_pool(),
        "large_rotation": (copies.large_rotation,),
        "query_cutmix": (copies.on_query(copies.cutmix),),
        "query_erase": (copies.on_query(copies.erase),),
        "support_erase": (copies.on_support(copies.erase),),
        "query_self_mix": (copies.on_query(copies.self_mix),),
        "more_shots": (copies.more_shots,),
    },
    "index": {
        "theil": taml.theil,
        "mean_log_deviation": taml.generalised_entropy(0),
        "generalised_entropy_2": taml.generalised_entropy(2),
        "atkinson": taml.atkinson(0.5),
        "atkinson_1": taml.atkinson(1),
        "gini": taml.gini,
        "log_variance": taml.log_variance,
    },
    "ramp": {
        "constant": CONSTANT,
        "linear": lambda clock: optax.linear_schedule(0.0, 1.0, clock.steps)(clock.step),
    },
}
