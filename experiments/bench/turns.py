"""Timing by turns on a machine that others use too.

Only what is timed in the same minutes can be compared, so the contenders take turns. Each turn
records how much of the processors other processes took; turns of too much are left out where enough
others remain.
"""

import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

LEAST = 3
"""So many quiet turns are enough for the others to be left out."""

KINDS = ("user", "nice", "system", "irq", "softirq", "steal")
"""Of the times that a processor spends, those it is not free in."""


class Turn(NamedTuple):
    """One turn, per call.

    Attributes:
      seconds: By the clock.
      cpu: Processor time of this process. With one thread it is hardly moved by what others do.
      foreign: Share of this process's processors that others took; None: not known.
    """

    seconds: float
    cpu: float
    foreign: float | None


def processors() -> set[int]:
    """Those that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return os.sched_getaffinity(0)
    return set(range(os.cpu_count() or 1))


def busy() -> float | None:
    """Seconds that the processors of this process have worked, for whomever; None: not known."""
    mine = processors()
    try:
        import psutil

        rows = [row for i, row in enumerate(psutil.cpu_times(percpu=True)) if i in mine]
        return sum(getattr(row, kind, 0.0) for row in rows for kind in KINDS)
    except ImportError:
        pass
    try:
        with open("/proc/stat") as file:
            rows = [line.split() for line in file if line.startswith("cpu")]
    except OSError:
        return None
    ticks = [list(map(int, row[1:9])) for row in rows if row[0] in {f"cpu{i}" for i in mine}]
    return sum(sum(row[:3]) + sum(row[5:]) for row in ticks) / os.sysconf("SC_CLK_TCK")


def turn(call: Callable[[], Any], calls: int) -> Turn:
    """Times `calls` calls in a row."""
    begin, own, all_before = time.perf_counter(), time.process_time(), busy()
    for _ in range(calls):
        call()
    seconds, cpu, all_after = time.perf_counter() - begin, time.process_time() - own, busy()
    foreign = None
    if all_before is not None and all_after is not None:
        foreign = max(0.0, (all_after - all_before - cpu) / (seconds * len(processors())))
    return Turn(seconds / calls, cpu / calls, foreign)


def take_turns(
    contenders: Mapping[str, Callable[[], Any]],
    repeats: int,
    limit: float,
    most: int | None = None,
    least: float = 0.3,
) -> dict[str, list[Turn]]:
    """Turns of at least about `least` seconds, until every contender has had `repeats` quiet ones
    or `most` in all, three times as many unless said. All have been called once before.
    """
    calls = {}
    for name, call in contenders.items():
        calls[name] = max(1, round(least / turn(call, 1).seconds))
    turns: dict[str, list[Turn]] = {name: [] for name in contenders}
    for i in range(most or 3 * repeats):
        # every other round backwards, so that nobody always follows the same contender
        for name in list(contenders)[:: 1 - 2 * (i % 2)]:
            turns[name].append(turn(contenders[name], calls[name]))
        if all(len(quiet(taken, limit)) >= repeats for taken in turns.values()):
            break
    return turns


def shared(turns: Sequence[Turn], steps: int) -> list[Turn]:
    """Turns per step where a call was so many."""
    return [turn._replace(seconds=turn.seconds / steps, cpu=turn.cpu / steps) for turn in turns]


def quiet(turns: Sequence[Turn], limit: float) -> list[Turn]:
    """Those in which others took at most `limit`, or nobody knows what they took."""
    return [turn for turn in turns if turn.foreign is None or turn.foreign <= limit]


def summary(turns: Sequence[Turn], limit: float) -> dict[str, Any]:
    """Medians over the quiet turns where there are `LEAST`, over all of them otherwise."""
    chosen = quiet(turns, limit)
    used = chosen if len(chosen) >= LEAST else list(turns)
    seconds = [turn.seconds for turn in used]
    foreign = [turn.foreign for turn in used if turn.foreign is not None]
    return {
        "seconds": statistics.median(seconds),
        "low": min(seconds),
        "high": max(seconds),
        "cpu_seconds": statistics.median(turn.cpu for turn in used),
        "foreign": statistics.median(foreign) if foreign else None,
        "turns": len(used),
        "left_out": len(turns) - len(used),
        "quiet": len(chosen) >= LEAST,
    }
