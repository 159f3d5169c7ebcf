"""Whatever a user writes either works or is refused with a sentence: specs, and constructors."""

import traceback
from pathlib import Path

import jax.numpy as jnp
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import mgaug_jax
from experiments import cli, spec, vocabulary
from mgaug_jax import losses, nets

ROOT = Path(__file__).parents[1]
PLACES = {ROOT / "experiments", ROOT / "mgaug_jax", ROOT / "mgaug_jax" / "nets"}
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
SUBNETS = ("keep", "high", "cap", "subnets", "sizes")
CONSTRUCTORS = {
    "maml": (lambda **numbers: mgaug_jax.maml(METHOD.net, **numbers), ("lr", "steps")),
    "fomaml": (lambda **numbers: mgaug_jax.fomaml(METHOD.net, **numbers), ("lr", "steps")),
    "anil": (lambda **numbers: mgaug_jax.anil(METHOD.net, **numbers), ("lr", "steps")),
    "meta_sgd": (lambda **numbers: mgaug_jax.meta_sgd(METHOD.net, **numbers), ("lr", "steps")),
    "lslr": (lambda **numbers: mgaug_jax.lslr(METHOD.net, **numbers), ("lr", "steps")),
    "wp": (lambda keep=0.9, **numbers: mgaug_jax.wp(keep=keep, **numbers)(METHOD), SUBNETS),
    "pp": (lambda keep=0.9, **numbers: mgaug_jax.pp(keep=keep, **numbers)(METHOD), SUBNETS),
    "cp": (lambda keep=0.9, **numbers: mgaug_jax.cp(keep=keep, **numbers)(METHOD), SUBNETS),
    "noise": (lambda std=1: mgaug_jax.noise(std)(METHOD), ("std",)),
    "drop_grad": (lambda rate=0, **n: mgaug_jax.drop_grad(rate, **n)(METHOD), ("rate", "ramp")),
    "l2": (lambda weight=1: mgaug_jax.l2(weight)(METHOD), ("weight",)),
    "weight_decay": (lambda rate=1: mgaug_jax.weight_decay(rate)(METHOD), ("rate",)),
    "inequality": (lambda weight=1: mgaug_jax.taml.inequality(weight)(METHOD), ("weight",)),
    "entropy": (lambda weight=1: mgaug_jax.taml.entropy(weight)(METHOD), ("weight",)),
    "metamix": (lambda **numbers: mgaug_jax.metamix(**numbers)(METHOD), ("shuffle",)),
    "multi_step_loss": (lambda last=0: mgaug_jax.multi_step_loss(last)(METHOD), ("last",)),
    "maxup": (lambda **numbers: mgaug_jax.maxup(**numbers)(METHOD), ("copies",)),
    "mr_weights": (
        lambda beta=1, **numbers: mgaug_jax.mr_weights(beta, **numbers)(METHOD),
        ("beta", "blocks", "start"),
    ),
    "mr_activations": (
        lambda beta=1, **numbers: mgaug_jax.mr_activations(beta, **numbers)(METHOD),
        ("beta", "blocks", "start"),
    ),
    "rotate_classes": (lambda rate=0: mgaug_jax.rotate_classes(rate)(METHOD), ("rate",)),
    "shift_targets": (lambda width=1: mgaug_jax.shift_targets(width)(METHOD), ("width",)),
    "conv4": (
        lambda way=5, width=4: nets.conv4(way, width=width, image=(16, 16, 1)),
        ("way", "width"),
    ),
    "mlp": (lambda hidden=(4,): nets.mlp(hidden), ("hidden",)),
    "episodes.sampler": (
        lambda way=5, shot=1, queries=1, tasks=1: mgaug_jax.sampler(way, shot, queries, tasks),
        ("way", "shot", "queries", "tasks"),
    ),
}


@pytest.mark.parametrize("name", CONSTRUCTORS)
@settings(SETTINGS, max_examples=60)
@given(data=st.data())
def test_constructors_work_or_raise_a_value_error_with_a_sentence(name, data):
    make, numbers = CONSTRUCTORS[name]
    chosen = data.draw(st.dictionaries(st.sampled_from(numbers), VALUES))
    refusal = None
    try:
        assert make(**chosen) is not None
    except ValueError as error:
        refusal = error
    assert is_ours(refusal)
