"""Strict JAX settings and the small problems every test file uses."""

import os
import sys
import tempfile

os.environ.setdefault("JAX_PLATFORMS", "cpu")
XLA_CACHE = os.path.join(tempfile.gettempdir(), "mgaug_jax_xla")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", XLA_CACHE)
# Modules forget their programs (below), and workers share none but those on disk.
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")

import jax
import jax.numpy as jnp
import pytest
from absl.testing import flagsaver

from mgaug_jax import nets
from mgaug_jax.types import Examples, Task

jax.config.update("jax_debug_key_reuse", True)
# For processes that tests start, since this one has read its environment.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
jax.config.update("jax_default_matmul_precision", "highest")


@pytest.fixture(scope="module", autouse=True)
def forget():
    """Compiled programs of a module, which would add up to gigabytes."""
    yield
    jax.clear_caches()


@pytest.fixture
def x64():
    """Float64 for one test."""
    with jax.enable_x64(True):
        yield


@pytest.fixture(scope="module")
def quick_compile():
    """Halves the time XLA takes to compile, for modules whose tests run everything once."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="session")
def glyph_cache(tmp_path_factory):
    """A cache folder that holds the rendered glyphs."""
    from mgaug_jax.data import SPLITS, load

    folder = tmp_path_factory.mktemp("glyphs")
    for split in SPLITS:
        load("glyphs", split, cache_dir=folder)
    return folder


@pytest.fixture
def key():
    return jax.random.key(0)


def make_tasks(key, tasks=2, way=3, shot=1, queries=2, shape=(16, 16, 1)) -> Task:
    """A meta-batch of random images, every class with a mean of its own."""

    def one(key) -> Task:
        k_means, k_support, k_query = jax.random.split(key, 3)
        means = jax.random.normal(k_means, (way, *shape))

        def part(key, n: int) -> Examples:
            x = jnp.repeat(means, n, axis=0)
            x = x + 0.5 * jax.random.normal(key, x.shape)
            return Examples(x, jnp.repeat(jnp.eye(way), n, axis=0))

        return Task(part(k_support, shot), part(k_query, queries))

    return jax.vmap(one)(jax.random.split(key, tasks))


def small_conv(way=3, width=4):
    return nets.conv4(way, width=width, image=(16, 16, 1))


def few_episodes(monkeypatch, test=20, validation=10, memory=10) -> None:
    """Entry points test on so many."""
    from experiments import scoring

    for name, value in (("TEST", test), ("VALIDATION", validation), ("MEMORY", memory)):
        monkeypatch.setattr(scoring, f"{name}_EPISODES", value)


def start(monkeypatch, module, *arguments: str) -> int:
    """The exit code of an entry point, run in this process."""
    # It defines flags when it is first imported, which the saver would take away again.
    import array_record.python.array_record_data_source  # noqa: F401

    from experiments import cli

    monkeypatch.setattr(sys, "argv", [module.__name__, *arguments])
    with flagsaver.flagsaver():
        code = cli._start(module.main, module.__doc__, getattr(module, "POSITIONAL", ""))
    return code


def refused(capsys, monkeypatch, module, *arguments: str) -> str:
    """The one sentence an entry point exits 2 with."""
    assert start(monkeypatch, module, *arguments) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert len(lines) == 1
    return lines[0]
