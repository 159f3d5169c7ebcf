"""The numbers of the released PyTorch implementation; needs its reference files."""

import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

from experiments import cli, parity

REFERENCE = Path(__file__).parents[2] / "shared" / "reference"
FAST = ["fomaml_conv4_5w1s.npz", "protonet_cp_resize_conv4_5w1s.npz"]
FILES = sorted(path.name for path in REFERENCE.glob("*.npz"))

pytestmark = pytest.mark.skipif(
    not FILES, reason=f"no reference files in {REFERENCE}; they are not part of the repository"
)


def run(monkeypatch, *paths: Path) -> int:
    monkeypatch.setattr(sys, "argv", ["parity", *map(str, paths)])
    with pytest.MonkeyPatch.context():
        import jax

        try:
            return cli._start(parity.main, parity.__doc__, "FILE")
        finally:
            jax.config.update("jax_enable_x64", False)


def changed(tmp_path: Path, name: str, change) -> Path:
    """A copy of a file in which `change(arrays)` moved something."""
    with np.load(REFERENCE / name) as stored:
        arrays = dict(stored)
    change(arrays)
    np.savez(tmp_path / name, **arrays)
    return tmp_path / name


@pytest.mark.parametrize("name", FAST)
def test_reference_file_passes(name, monkeypatch):
    assert run(monkeypatch, REFERENCE / name) == 0


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(set(FILES) - set(FAST)))
def test_every_reference_file_passes(name, monkeypatch):
    assert run(monkeypatch, REFERENCE / name) == 0


def test_one_flipped_mask_bit_fails(tmp_path, monkeypatch, capsys):
    def flip(arrays):
        arrays["task1/mask2/layer3"][7] ^= 1

    assert run(monkeypatch, changed(tmp_path, FAST[1], flip)) == 1
    failed = [line for line in capsys.readouterr().out.splitlines() if "FAIL" in line]
    assert len(failed) == 1
    assert "mask 2, layer 3" in failed[0]


def test_one_moved_gradient_entry_fails(tmp_path, monkeypatch, capsys):
    name = "meta_grad_sum/encoder.2.conv.weight"

    def move(arrays):
        arrays[name][1, 2, 0, 1] += 1e-6 * np.linalg.norm(arrays[name])

    assert run(monkeypatch, changed(tmp_path, FAST[0], move)) == 1
    failed = [line for line in capsys.readouterr().out.splitlines() if "FAIL" in line]
    assert len(failed) == 1
    assert "meta-gradient conv2/kernel" in failed[0]


def test_a_file_of_something_else_is_refused(tmp_path, monkeypatch, capsys):
    path = tmp_path / "fomaml_nothing.npz"
    np.savez(path, a=np.zeros(3))
    assert run(monkeypatch, path) == 2
    other = shutil.copy(path, tmp_path / "reptile.npz")
    assert run(monkeypatch, Path(other)) == 2
    assert run(monkeypatch, tmp_path / "maml_missing.npz") == 2
    text = capsys.readouterr().err
    assert "is not a file of reference numbers" in text
    assert "'reptile.npz' is none of" in text or "is none of fomaml, maml, protonet" in text
