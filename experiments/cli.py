"""How every entry point starts and ends: flags, one-sentence refusals, exit codes.

Exit codes: 0 done, 1 failed, 2 bad input, 3 a value that is not finite, 75 interrupted and can be
continued.
"""

import os
import signal
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from types import FrameType

from absl import flags

EXIT_FAILED, EXIT_BAD_INPUT, EXIT_NOT_FINITE, EXIT_INTERRUPTED = 1, 2, 3, 75
SIGNALS = [
    getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGHUP") if hasattr(signal, name)
]
HELP = ("help", "h", "?", "helpfull", "helpshort")


class BadInput(ValueError):
    """Something the user asked for that cannot be; the text says what to do."""


class NotFinite(ArithmeticError):
    """Training met a value that is not finite; the text says where and what to do."""


class Failed(RuntimeError):
    """The machine does not let the work go on; the text says what was in its way."""


class Interrupted(BaseException):
    """A signal ended the work; the text says what is kept and how to go on."""


class Interruption:
    """While it is entered, the first SIGTERM, SIGINT or SIGHUP sets `requested`, and the second
    ends the process as it would without it.

    With a text in `at_once` the first signal raises `Interrupted` with that text instead, which is
    for work that has nothing to save.
    """

    def __init__(self, at_once: str = ""):
        self.requested = False
        self.at_once = at_once

    def __enter__(self) -> "Interruption":
        self.before = {s: signal.signal(s, self._heed) for s in SIGNALS}
        return self

    def __exit__(self, *error) -> None:
        self._restore()

    def _restore(self) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _heed(self, number: int, frame: FrameType | None) -> None:
        del frame
        self.requested = True
        self._restore()
        if self.at_once:
            raise Interrupted(self.at_once)
        name = signal.Signals(number).name
        # not through print, which may be what the signal interrupts, and whose terminal may be gone
        with suppress(OSError):
            os.write(
                2, f"{name}: ending after the steps in hand; once more ends at once\n".encode()
            )


def start(main: Callable[[Sequence[str]], int | None], usage: str, positional: str = "") -> None:
    """Parses the flags, runs `main(positional arguments)` and exits.

    `--help` prints `usage` and the flags of the calling module and exits 0. A flag that does not
    parse, an unknown flag, an argument where none belongs and every `BadInput` print one sentence
    and exit 2, where absl would exit 1 or carry on; `NotFinite` exits 3, `Interrupted` 75, and
    what the operating system refuses 1.

    Args:
      main: Returns an exit code, None for 0.
      usage: What `--help` says first.
      positional: What the positional arguments are, if any are taken ("one FILE or more").
    """
    sys.exit(_start(main, usage, positional))


def _start(main, usage: str, positional: str) -> int:
    if any(argument.split("=")[0].lstrip("-") in HELP for argument in sys.argv[1:]):
        module = sys.modules["__main__"]
        own = flags.FLAGS.get_key_flags_for_module(module)
        print(usage.strip(), "\n\nFlags:")
        for flag in own:
            default = "" if flag.default is None else f" (default {flag.default})"
            print(f"  --{flag.name}{default}\n      {flag.help}")
        return 0
    try:
        arguments = flags.FLAGS(sys.argv)[1:]
        if arguments and not positional:
            raise BadInput(f"{arguments[0]!r} is not a flag; flags are written --name=value.")
        if positional and not arguments:
            raise BadInput(f"nothing was given; give {positional}.")
        return main(arguments) or 0
    except (flags.Error, BadInput, NotFinite, Failed, OSError, Interrupted) as error:
        what = "interrupted" if isinstance(error, Interrupted) else "error"
        print(f"{what}: {str(error).strip()}", file=sys.stderr)
        return next(code for kind, code in EXITS.items() if isinstance(error, kind))


EXITS: dict[type[BaseException], int] = {
    flags.Error: EXIT_BAD_INPUT,
    BadInput: EXIT_BAD_INPUT,
    NotFinite: EXIT_NOT_FINITE,
    Interrupted: EXIT_INTERRUPTED,
    Failed: EXIT_FAILED,
    OSError: EXIT_FAILED,
}
