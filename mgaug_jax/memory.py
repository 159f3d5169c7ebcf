"""What a program takes of memory, and how it takes less."""

import jax

from mgaug_jax.checks import check_count
from mgaug_jax.types import Modifier


def tasks_at_once(number: int) -> Modifier:
    """A device computes so many tasks (or pairs of task and sub-network) together, then the next.

    Raises:
      ValueError: `number` is not a positive integer.
    """
    check_count("number", number)
    return lambda method: method._replace(at_once=number)


def taken(compiled: jax.stages.Compiled) -> int:
    """Bytes per device of a compiled program's arguments, results and temporaries; 0 where the
    backend does not say.
    """
    found = compiled.memory_analysis()
    if found is None:
        return 0
    own = found.argument_size_in_bytes + found.output_size_in_bytes - found.alias_size_in_bytes
    return own + found.temp_size_in_bytes


def temporaries(compiled: jax.stages.Compiled) -> int:
    """Bytes per device of a compiled program's temporaries; 0 where the backend does not say."""
    found = compiled.memory_analysis()
    return 0 if found is None else found.temp_size_in_bytes
