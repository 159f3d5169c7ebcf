"""Whatever a user writes either works or is refused with a sentence: specs, and constructors."""

import inspect
import traceback
from pathlib import Path

import jax
import jax.numpy as jnp
import optax
import pytest
from flax import linen, nnx
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import mgaug_jax
from experiments import cli, spec, vocabulary
from mgaug_jax import bounds, divergences, losses, nets, outer, pruning, taml
from mgaug_jax.data import sinusoid

ROOT = Path(__file__).parents[1]
PLACES = {ROOT / "experiments", *(ROOT / "mgaug_jax" / name for name in ("", "data", "nets"))}
SETTINGS = settings(deadline=None, max_examples=200, suppress_health_check=list(HealthCheck))
PROBLEM = vocabulary.Problem(
    lambda way: nets.mlp((4, 4), inputs=3, outputs=way or 2),
    2,
    losses.cross_entropy,
    100,
    (jnp.full(1, 0.5), jnp.full(1, 0.25)),
)
SIMPLE = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-5, 5),
    st.integers(),
    st.floats(),
    st.floats(0, 1),
    st.text(max_size=6),
    st.lists(st.integers(-3, 90), max_size=3),
)
LITERALS = st.one_of(
    SIMPLE,
    st.sampled_from([name for words in vocabulary.WORDS.values() for name in words]),
    st.lists(st.integers(-3, 90), max_size=3).map(tuple),
    st.dictionaries(st.text(max_size=2), st.integers(), max_size=2),
    st.sampled_from([complex(1, 2), b"x", ..., float("nan"), float("inf"), 10**400, "__import__"]),
)
NAMES = [*vocabulary.ALGORITHMS, *vocabulary.MODIFIERS]
ARGUMENTS = sorted(
    {
        name
        for entries in (vocabulary.ALGORITHMS, vocabulary.MODIFIERS)
        for entry in entries.values()
        for name in entry.arguments
    }
)


def written(value) -> str:
    return repr(value).replace("nan", "1e999").replace("inf", "1e999")


@st.composite
def calls(draw) -> str:
    """A call of a known name with arguments it may or may not have."""
    name = draw(st.sampled_from(NAMES))
    entry = vocabulary.ALGORITHMS.get(name) or vocabulary.MODIFIERS[name]
    known = st.sampled_from([*entry.arguments, draw(st.sampled_from(ARGUMENTS))])
    given = draw(st.dictionaries(known, LITERALS, max_size=3))
    positional = draw(st.lists(LITERALS, max_size=2))
    texts = [*map(written, positional), *(f"{k}={written(v)}" for k, v in given.items())]
    return f"{name}({','.join(texts)})"


def is_ours(refusal: BaseException | None) -> bool:
    """Whether a refusal, if there was one, is a sentence of this project's."""
    if refusal is None:
        return True
    where = traceback.extract_tb(refusal.__traceback__)[-1].filename
    return Path(where).parent in PLACES and len(str(refusal)) > 20


def works_or_is_refused(text: str) -> None:
    refusal = None
    try:
        assert spec.method(text, PROBLEM)(jnp.zeros((), jnp.int32)).net is not None
    except cli.BadInput as error:
        refusal = error
    # what the library refused is quoted; a word of the parser's is replaced by a sentence
    quoted = refusal is not None and refusal.__cause__ and str(refusal.__cause__) in str(refusal)
    assert is_ours(refusal.__cause__ if quoted else refusal)


@SETTINGS
@given(st.lists(calls(), min_size=1, max_size=3).map("|".join))
def test_specs_of_known_words_work_or_are_refused(text):
    works_or_is_refused(text)


@SETTINGS
@given(st.text(alphabet="maml(lr=0.1,)|cp'\"[]{}: \n#\\*+-_é\x00", max_size=40))
@example("(" * 5000)
@example("-" * 5000 + "1")
@example("maml(lr=" + "-" * 3000 + "1)")
@example("maml(lr=9**9**9)")
@example("maml(steps='" + "9" * 10000 + "')")
@example("maml(steps=" + "9" * 10000 + ")")
@example("maml|" * 2000 + "maml")
@example("maml(lr=[" * 200)
@example("maml(*[1])")
@example("maml(**{'lr': 1})")
@example("maml(lr=__import__('os').system('true'))")
@example("maml(lr:=1)")
@example("maml(lr=f'{1}')")
@example("lambda: maml()")
@example("")
def test_any_text_works_or_is_refused(text):
    works_or_is_refused(text)


METHOD = mgaug_jax.maml(nets.mlp((4, 4), inputs=3, outputs=2))
VALUES = st.one_of(
    SIMPLE,
    st.sampled_from([10**400, complex(1, 1), b"1", (16, 20), jnp.float32(0.5), jnp.ones(2)]),
)
NET = METHOD.net
PARAMS = NET.init(jax.random.key(0))
INNER = ("lr", "steps", "loss", "forward")
SUBNETS = ("keep", "high", "cap", "subnets", "sizes", "reduce", "active")
SIZES = ("way", "shot", "queries", "tasks", "choose")
BOUND = ("samples", "tasks", "delta")


def with_method(make, /, **given):
    """A call of `make`, and of the modifier that it gives."""
    return lambda **numbers: make(**given | numbers)(METHOD)


def called(make, /, **given):
    return lambda **numbers: make(**given | numbers)


CONSTRUCTORS = {
    **{
        name: (called(getattr(mgaug_jax, name), net=NET), (*INNER, "net"))
        for name in ("maml", "fomaml", "anil", "meta_sgd", "lslr")
    },
    "protonet": (called(mgaug_jax.protonet, net=NET), ("net", "forward")),
    "descend": (
        called(mgaug_jax.descend, net=NET, inner=mgaug_jax.identity, rule=optax.sgd, steps=1),
        ("net", "inner", "steps", "rule", "extra", "loss", "forward"),
    ),
    "prototypes": (
        called(mgaug_jax.prototypes, net=NET, inner=mgaug_jax.identity),
        ("net", "inner", "forward"),
    ),
    "freeze": (with_method(mgaug_jax.freeze, leaves=lambda role: role.head), ("leaves",)),
    "mgaug": (with_method(mgaug_jax.mgaug, pruner=pruning.width, keep=0.9), ("pruner", *SUBNETS)),
    "wp": (with_method(mgaug_jax.wp, keep=0.9), SUBNETS),
    "pp": (with_method(mgaug_jax.pp, keep=0.9), ("pruner", *SUBNETS)),
    "cp": (with_method(mgaug_jax.cp, keep=0.9), ("scores", "ranking", "select", *SUBNETS)),
    "compose": (lambda a=len, b=len: mgaug_jax.compose(a, b), ("a", "b")),
    "noise": (
        with_method(mgaug_jax.noise, std=1),
        ("std", "site", "distribution", "relative_to"),
    ),
    "drop_grad": (with_method(mgaug_jax.drop_grad, rate=0), ("rate", "ramp", "site", "factors")),
    "l2": (with_method(mgaug_jax.l2, weight=1), ("weight", "leaves")),
    "weight_decay": (with_method(mgaug_jax.weight_decay, rate=1), ("rate", "leaves")),
    "outer.iterative_hard_thresholding": (
        with_method(outer.iterative_hard_thresholding, keep=0.5, step=jnp.int32(0)),
        ("keep", "every"),
    ),
    "outer.dense_sparse_dense": (
        with_method(outer.dense_sparse_dense, keep=0.5, step=jnp.int32(0), start=1, stop=2),
        ("keep", "start", "stop"),
    ),
    "taml.inequality": (with_method(taml.inequality, weight=1), ("weight", "index")),
    "taml.entropy": (with_method(taml.entropy, weight=1), ("weight",)),
    "taml.atkinson": (called(taml.atkinson, aversion=0.5), ("aversion",)),
    "taml.generalised_entropy": (called(taml.generalised_entropy, a=0.5), ("a",)),
    "metamix": (with_method(mgaug_jax.metamix), ("shuffle", "law")),
    "multi_step_loss": (with_method(mgaug_jax.multi_step_loss), ("last",)),
    "maxup": (with_method(mgaug_jax.maxup), ("copies", "pool", "level")),
    "mr_weights": (with_method(mgaug_jax.mr_weights, beta=1), ("beta", "blocks", "start")),
    "mr_activations": (
        with_method(mgaug_jax.mr_activations, beta=1),
        ("beta", "blocks", "start"),
    ),
    "rotate_classes": (with_method(mgaug_jax.rotate_classes, rate=0), ("rate",)),
    "shift_targets": (
        lambda width=1: mgaug_jax.shift_targets(width)(
            mgaug_jax.maml(NET, loss=losses.squared_error)
        ),
        ("width",),
    ),
    "augment": (with_method(mgaug_jax.augment, change=lambda key, task: task), ("change",)),
    "photo_augment": (
        with_method(mgaug_jax.photo_augment, mean=jnp.ones(1), std=jnp.ones(1)),
        ("transform",),
    ),
    "feedback": (with_method(mgaug_jax.feedback, stored=PARAMS), ("weights", "similarity")),
    "sharded": (with_method(mgaug_jax.sharded, mesh=mgaug_jax.sharding.mesh()), ("mesh",)),
    "tasks_at_once": (with_method(mgaug_jax.tasks_at_once, number=1), ("number",)),
    "trainer": (
        called(mgaug_jax.trainer, method=METHOD, optimizer=optax.sgd(1.0)),
        ("method", "optimizer"),
    ),
    "interval": (called(mgaug_jax.interval, scores=jnp.ones(6)), ("group",)),
    "sampler": (called(mgaug_jax.sampler, way=5, shot=1, queries=1, tasks=1), SIZES),
    "sinusoid.sampler": (called(sinusoid.sampler, shot=1, queries=1, tasks=1), SIZES[1:4]),
    "sinusoid.one_hot_sampler": (
        called(sinusoid.one_hot_sampler, shot=1, queries=1, tasks=1),
        SIZES[1:4],
    ),
    "sinusoid.interval_sampler": (
        called(sinusoid.interval_sampler, shot=1, queries=1, tasks=1),
        SIZES[1:4],
    ),
    "nets.conv4": (
        called(nets.conv4, width=4, image=(16, 16, 1)),
        ("way", "width", "image", "dtype", "lowering"),
    ),
    "nets.mlp": (called(nets.mlp, hidden=(4,)), ("hidden", "inputs", "outputs")),
    "nets.resnet10": (called(nets.resnet10), ("image", "pool", "dtype", "lowering")),
    "nets.from_functions": (
        called(nets.from_functions, init=NET.init, apply=NET.apply),
        ("init", "apply", "head"),
    ),
    "nets.from_linen": (
        called(nets.from_linen, module=linen.Dense(2), shape=(3,)),
        ("module", "shape", "head"),
    ),
    "nets.from_nnx": (
        called(nets.from_nnx, make=lambda rngs: nnx.Linear(2, 3, rngs=rngs)),
        ("make", "head"),
    ),
    "bounds.meta_bound": (
        called(bounds.meta_bound, empirical=0.1, hyper_kl=1.0, kl=1.0, samples=9, tasks=9),
        BOUND,
    ),
    "bounds.mr_maml_bound": (
        called(bounds.mr_maml_bound, empirical=0.1, kl=1.0, samples=9, tasks=9),
        BOUND,
    ),
    "bounds.monte_carlo": (called(bounds.monte_carlo, errors=jnp.ones(3)), ("delta",)),
    "divergences.subset_keep": (
        called(divergences.subset_keep, net=NET, params=PARAMS, keep=0.5),
        ("keep",),
    ),
}
EXEMPT = {
    **dict.fromkeys(("first_order", "fresh_optimizer", "identity"), "takes a method alone"),
    **dict.fromkeys(("reptile", "shuffle_labels"), "takes nothing"),
    **dict.fromkeys(
        ("inductive", "transductive", "nets.global_mean", "nets.top_left_mean"), "is one"
    ),
    **dict.fromkeys(
        ("evaluate", "meta_gradient", "probe_gradients", "run", "sample_task", "subnet", "view"),
        "computes with what constructors made",
    ),
    "nets.resnet18": "is resnet10 with more blocks",
}
"""Public functions that are not fuzzed, and why."""


def test_every_public_constructor_is_fuzzed_or_exempt():
    public = {name: getattr(mgaug_jax, name) for name in mgaug_jax.__all__}
    public |= {f"nets.{name}": getattr(nets, name) for name in nets.__all__}
    functions = {name for name, value in public.items() if inspect.isfunction(value)}
    assert functions == functions & (CONSTRUCTORS.keys() | EXEMPT)
    assert not CONSTRUCTORS.keys() & EXEMPT


@pytest.mark.parametrize("name", CONSTRUCTORS)
@settings(SETTINGS, max_examples=60)
@given(data=st.data())
def test_constructors_work_or_raise_a_value_error_with_a_sentence(name, data):
    make, numbers = CONSTRUCTORS[name]
    chosen = data.draw(st.dictionaries(st.sampled_from(numbers), VALUES, min_size=1, max_size=2))
    refusal = None
    try:
        assert make(**chosen) is not None
    except ValueError as error:
        refusal = error
    assert is_ours(refusal)


@pytest.mark.parametrize("name", CONSTRUCTORS)
def test_constructors_work_and_refuse_a_word_for_each_argument(name):
    """Where a function, a number, a network or anything else belongs."""
    make, arguments = CONSTRUCTORS[name]
    assert make() is not None
    for argument in arguments:
        with pytest.raises(ValueError):
            make(**{argument: "x"})
