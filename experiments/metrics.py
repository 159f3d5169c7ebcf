"""What a run records of its steps: `metrics.jsonl`, and TensorBoard's files beside it."""

import json
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from experiments.store import finite, replaced


class Records:
    """`metrics.jsonl`, appended to line by line, and TensorBoard's where it is installed.

    What cannot be written (the disk is full) is said once, and the run goes on. Without a folder
    nothing is.
    """

    def __init__(self, folder: Path | None, done: int = 0):
        self.failed = False
        self.log = self.board = None
        if folder is not None:
            self.log = (folder / "metrics.jsonl").open("a")
            with suppress(ImportError):
                self.board = Board(folder / "tensorboard", done)

    def add(self, *records: dict[str, Any]) -> None:
        if self.log is None:
            return
        try:
            self.log.write("".join(json.dumps(finite(record)) + "\n" for record in records))
            self.log.flush()
            if self.board is not None:
                self.board.add(*records)
        except OSError as error:
            if not self.failed:
                print(f"warning: {self.log.name} cannot be written: {error.strerror}", flush=True)
            self.failed = True

    def __enter__(self) -> "Records":
        return self

    def __exit__(self, *error) -> None:
        for file in filter(None, (self.log, self.board)):
            with suppress(OSError):
                file.close()


class Board:
    """Scalars for TensorBoard, written at once: the usual writer hands them to its own thread, and
    waits for it for ever when that has met a full disk.
    """

    def __init__(self, folder: Path, done: int):
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import Event, SessionLog

        folder.mkdir(exist_ok=True)
        self.file = EventsWriter(str(folder / "events"))
        start = SessionLog(status=SessionLog.START)  # what was recorded of later steps is void
        self.file.write_event(Event(wall_time=time.time(), step=done + 1, session_log=start))

    def add(self, *records: dict[str, Any]) -> None:
        from tensorboardX.proto.event_pb2 import Event
        from tensorboardX.summary import scalar

        for record in records:
            for name, value in record.items():
                if name != "step" and isinstance(value, float):
                    event = Event(wall_time=time.time(), step=record["step"])
                    event.summary.CopyFrom(scalar(name, value))
                    self.file.write_event(event)
        self.file.flush()

    def close(self) -> None:
        self.file.close()


def read(folder: Path) -> list[dict[str, Any]]:
    """The whole lines of `metrics.jsonl`; a kill may have cut the last one short."""
    records = []
    with suppress(FileNotFoundError):
        for line in (folder / "metrics.jsonl").read_text().splitlines():
            with suppress(json.JSONDecodeError):
                records.append(json.loads(line))
    return records


def write(folder: Path, records: list[dict[str, Any]]) -> None:
    with replaced(folder / "metrics.jsonl") as temporary:
        temporary.write_text("".join(json.dumps(record) + "\n" for record in records))
