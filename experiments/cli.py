"""How every entry point starts and ends: flags, one-sentence refusals, exit codes.

Exit codes: 0 done, 1 failed, 2 bad input, 3 a value that is not finite.
"""

import sys
from collections.abc import Callable, Sequence

from absl import flags

EXIT_BAD_INPUT, EXIT_NOT_FINITE = 2, 3
HELP = ("help", "h", "?", "helpfull", "helpshort")


class BadInput(ValueError):
    """Something the user asked for that cannot be; the text says what to do."""


class NotFinite(ArithmeticError):
    """Training met a value that is not finite; the text says where and what to do."""


def start(main: Callable[[Sequence[str]], int | None], usage: str, positional: str = "") -> None:
    """Parses the flags, runs `main(positional arguments)` and exits.

    `--help` prints `usage` and the flags of the calling module and exits 0. A flag that does not
    parse, an unknown flag, an argument where none belongs and every `BadInput` print one sentence
    and exit 2, where absl would exit 1 or carry on; `NotFinite` exits 3.

    Args:
      main: Returns an exit code, None for 0.
      usage: What `--help` says first.
      positional: What the positional arguments are, if any are taken ("FILE").
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
            raise BadInput(f"nothing to read; give one {positional} or more.")
        return main(arguments) or 0
    except (flags.Error, BadInput, NotFinite) as error:
        print(f"error: {str(error).strip()}", file=sys.stderr)
        return EXIT_NOT_FINITE if isinstance(error, NotFinite) else EXIT_BAD_INPUT
