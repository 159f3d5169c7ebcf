"""Progress of long work: a moving line with rate and ETA on a terminal, nothing elsewhere."""

import sys
import time
from collections.abc import Callable


class Progress:
    """Shows `label done/total, rate, ETA`, and a note, on standard error if it is a terminal."""

    def __init__(self, label: str, total: int, done: int = 0, unit: str = "episodes"):
        self.label, self.total, self.first, self.unit = label, total, done, unit
        self.begin = time.monotonic()
        self.live = bool(label) and sys.stderr.isatty()

    def at(self, done: int, note: str = "") -> str:
        """Moves to `done` and returns the line, without the label."""
        elapsed = max(time.monotonic() - self.begin, 1e-9)
        rate = (done - self.first) / elapsed
        left = (self.total - done) / rate if rate else 0
        line = f"{done}/{self.total} {self.unit}, {rate:.1f}/s, ETA {clock(left)}  {note}".rstrip()
        if self.live:
            sys.stderr.write(f"\r\x1b[K{self.label}: {line}")
            sys.stderr.flush()
        return line

    def close(self) -> None:
        if self.live:
            sys.stderr.write("\r\x1b[K")
            sys.stderr.flush()


class Watch:
    """What `mgaug_jax.data` tells: lines by `say`, amounts as `Progress`."""

    def __init__(self, say: Callable[[str], None]):
        self.say = say

    def __call__(self, text: str, done: int = 0, total: int = 0, /) -> None:
        if not done:
            self.say(text)
            self.shown = Progress(text, total, unit="images")
        elif done < total:
            self.shown.total = total
            self.shown.at(done)
        else:
            self.shown.close()


def clock(seconds: float) -> str:
    """`h:mm:ss` or `m:ss`."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
