"""The paired difference of two runs on the same test episodes.

    python -m experiments.compare --run_a=runs/NAME --run_b=runs/OTHER

Episodes differ more than methods do; the interval of the per-episode difference is what tells two
runs apart. It speaks for these two trained networks: the spread over training seeds comes on top.
"""

import json
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags

from experiments import cli, scoring

FLAGS = flags.FLAGS
flags.DEFINE_string("run_a", None, "Folder of a run, or of its evaluation.")
flags.DEFINE_string("run_b", None, "Folder of the run it is compared with.")


def read(folder: str | None, flag: str) -> tuple[np.ndarray, dict[str, Any]]:
    """Scores per episode and what decides which episodes they are of."""
    if folder is None:
        raise cli.BadInput(f"--{flag} is missing; give the folder of a run.")
    path = Path(folder) / "episodes.npz"
    try:
        with np.load(path) as stored:
            return stored["adapted"], json.loads(str(stored["identity"]))
    except (OSError, ValueError, KeyError, EOFError, TypeError, zipfile.BadZipFile) as error:
        raise cli.BadInput(f"{path} cannot be read ({error}); is the run finished?") from error


def main(arguments: Sequence[str]) -> int:
    del arguments
    a, identity_a = read(FLAGS.run_a, "run_a")
    b, identity_b = read(FLAGS.run_b, "run_b")
    differing = [
        f"{name} {identity_a.get(name)} and {identity_b.get(name)}"
        for name in sorted(identity_a | identity_b)
        if identity_a.get(name) != identity_b.get(name)
    ]
    if differing:
        raise cli.BadInput(
            f"the runs were tested on different episodes ({'; '.join(differing)}); repeat one test "
            "with experiments.evaluate."
        )
    rows = {"a": a, "b": b, "a - b": a - b}
    print(f"{identity_a['metric']} on the same {len(a)} episodes, mean and 95 % interval")
    for name, values in rows.items():
        found = scoring.summary(values)
        print(f"  {name:<6} {found['mean']:+.4f} +- {found['half_width']:.4f}")
    return 0


if __name__ == "__main__":
    cli.start(main, __doc__)
