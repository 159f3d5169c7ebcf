"""Entry points that answer many times from one process each, as they define flags of one name."""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
SERVER = """
import contextlib, io, json, os, sys
from importlib import import_module
from absl.testing import flagsaver
from experiments import cli

module, answers = import_module("experiments." + sys.argv[1]), os.fdopen(os.dup(1), "w")
for line in sys.stdin:
    sys.argv = [module.__name__, *json.loads(line)]
    told, refused = io.StringIO(), io.StringIO()
    with flagsaver.flagsaver(), contextlib.redirect_stdout(told):
        with contextlib.redirect_stderr(refused):
            code = cli._start(module.main, module.__doc__, "")
    print(json.dumps([code, told.getvalue(), refused.getvalue()]), file=answers, flush=True)
"""


class Entries:
    """One process for every entry point that was asked for; to be closed."""

    def __init__(self):
        self.processes: dict[str, subprocess.Popen] = {}

    def run(self, module: str, *arguments: str) -> subprocess.CompletedProcess:
        """What `python -m experiments.module` ends with, says and complains of."""
        if module not in self.processes:
            command = [sys.executable, "-c", SERVER, module]
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
            self.processes[module] = subprocess.Popen(command, cwd=ROOT, **pipes)
        process = self.processes[module]
        print(json.dumps(arguments), file=process.stdin, flush=True)
        line = process.stdout.readline()
        assert line, f"experiments.{module} {arguments} ended with {process.wait()}"
        return subprocess.CompletedProcess(arguments, *json.loads(line))

    def close(self) -> None:
        for process in self.processes.values():
            process.communicate()
        self.processes.clear()
