"""Downloads, from a server on this machine: whole, resumed, cut off, changed."""

import hashlib
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from conftest import start

from experiments import data as entry
from experiments import download
from mgaug_jax.data import DATASETS

CONTENT = np.random.default_rng(0).bytes(3 * download.BLOCK + 5)


class Handler(BaseHTTPRequestHandler):
    """Serves `/ranges` with ranges, `/whole` without, `/short` cut off, `/endless` too long."""

    def do_GET(self):
        self.server.asked.append(self.headers.get("Range"))
        begin = 0
        if self.path not in ("/ranges", "/whole", "/short", "/endless"):
            self.send_error(404)
            return
        if self.path == "/ranges" and self.headers.get("Range"):
            begin = int(self.headers["Range"].removeprefix("bytes=").removesuffix("-"))
        body = CONTENT[begin:]
        length = len(body)
        if self.path == "/short":
            body = body[: download.BLOCK]
        if self.path == "/endless":
            body, length = body + b"more" * 1000, length + 4000
        self.send_response(206 if begin else 200)
        self.send_header("Content-Length", str(length))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args):
        pass


@pytest.fixture(scope="module")
def server():
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as made:
        made.asked = []
        thread = threading.Thread(target=made.serve_forever, daemon=True)
        thread.start()
        yield made
        made.shutdown()
        thread.join()


@pytest.fixture
def bring(server, tmp_path, monkeypatch, capsys):
    """`(path on the server, digest) -> (exit code, output, ranges asked for)`."""

    def bring(path: str, digest: str = hashlib.sha256(CONTENT).hexdigest()):
        server.asked.clear()
        url = f"http://127.0.0.1:{server.server_port}/{path}"
        remote = download.Remote("it.zip", url, len(CONTENT), digest)
        monkeypatch.setitem(download.REMOTES, "cub", (remote,))
        code = start(monkeypatch, entry, "download", "cub", f"--data_dir={tmp_path / 'new'}")
        said = capsys.readouterr()
        assert len(said.err.splitlines()) == (code != 0)
        return code, said.out + said.err, list(server.asked)

    return bring


def left(tmp_path: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (tmp_path / "new").iterdir()}


def test_a_file_is_brought_once(bring, tmp_path):
    code, said, asked = bring("ranges")
    assert (code, asked) == (0, [None])
    assert f"SHA-256 {hashlib.sha256(CONTENT).hexdigest()} as published" in said
    assert left(tmp_path) == {"it.zip": CONTENT}
    code, said, asked = bring("ranges")
    assert (code, asked) == (0, [])
    assert "is there, SHA-256" in said


@pytest.mark.parametrize("path", ["ranges", "whole"])
@pytest.mark.parametrize("have", [1, download.BLOCK, len(CONTENT) - 1])
def test_what_was_cut_off_is_gone_on_with(bring, tmp_path, path, have):
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "it.zip.part").write_bytes(CONTENT[:have])
    code, _, asked = bring(path)
    assert (code, asked) == (0, [f"bytes={have}-"])
    assert left(tmp_path) == {"it.zip": CONTENT}


@pytest.mark.parametrize("extra", [b"", b"x"])
def test_a_part_that_is_long_enough(bring, tmp_path, extra):
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "it.zip.part").write_bytes(CONTENT + extra)
    code, _, asked = bring("ranges")
    assert (code, asked) == (0, [None] * len(extra))  # one that is too long is begun anew
    assert left(tmp_path) == {"it.zip": CONTENT}


def test_a_connection_that_ends_early_can_be_gone_on_with(bring, tmp_path):
    code, said, _ = bring("short")
    assert code == 1
    assert f"of {len(CONTENT)} bytes" in said or " stopped (" in said
    assert "the same command goes on from there" in said
    assert left(tmp_path) == {"it.zip.part": CONTENT[: download.BLOCK]}
    assert bring("ranges")[2] == [f"bytes={download.BLOCK}-"]
    assert left(tmp_path) == {"it.zip": CONTENT}


@pytest.mark.parametrize(("path", "digest"), [("whole", "0" * 64), ("endless", None)])
def test_another_file_is_refused_and_not_kept(bring, tmp_path, path, digest):
    code, said, _ = bring(path, *([digest] if digest else []))
    assert code == 1
    assert "nothing of it was kept" in said
    assert left(tmp_path) == {}


def test_a_damaged_part_is_refused_and_not_kept(bring, tmp_path):
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "it.zip.part").write_bytes(b"x" * 9)
    assert bring("ranges")[0] == 1
    assert left(tmp_path) == {}


def test_another_file_of_that_name_stays(bring, tmp_path):
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "it.zip").write_bytes(b"mine")
    code, said, asked = bring("ranges")
    assert (code, asked) == (2, [])
    assert f"has the SHA-256 {hashlib.sha256(b'mine').hexdigest()} instead of" in said
    assert left(tmp_path) == {"it.zip": b"mine"}


def test_what_is_not_there_is_said(bring):
    code, said, _ = bring("nowhere")
    assert code == 1
    assert "HTTP Error 404" in said


def test_files_that_can_be_downloaded_are_those_that_the_readers_look_for():
    for name, remotes in download.REMOTES.items():
        for remote in remotes:
            stem = remote.name.split(".")[0]
            assert f"{stem}/" in DATASETS[name].tree
            assert len(bytes.fromhex(remote.sha256)) == 32
