"""Pickles of plain values and numpy arrays, read without running anything they name.

Data sets of the Python 2 years are pickles, and a pickle may name any function to be called. Here
the few names that such files need stand for small functions of our own, and all others are refused.
"""

import builtins
import io
import pickle
from typing import Any

import numpy as np

PLAIN = (
    "bool bytearray bytes complex dict float frozenset int list long set slice str tuple unicode"
)
KINDS = "biufSU"


class _Dtype:
    """A dtype without fields or objects."""

    def __init__(self, code: Any, align: Any = False, copy: Any = False):
        del align, copy
        self.value = np.dtype(str(code))
        if self.value.kind not in KINDS or self.value.subdtype is not None:
            raise pickle.UnpicklingError(f"it has values of type {code}")

    def __setstate__(self, state: tuple) -> None:
        order, inside = state[1], state[2:5]
        if order not in ("<", ">", "|", "=") or any(part is not None for part in inside):
            raise pickle.UnpicklingError("it has records")
        if order in ("<", ">"):
            self.value = self.value.newbyteorder(order)


class _Array:
    """What numpy pickles an array as: made empty, then told what it is."""

    value: np.ndarray

    def __setstate__(self, state: tuple) -> None:
        _, shape, dtype, fortran, raw = state
        self.value = _from_buffer(_raw(raw), dtype, shape, "F" if fortran else "C").value


def _from_buffer(raw: Any, dtype: _Dtype, shape: tuple, order: str) -> _Array:
    array = _Array()
    values = np.frombuffer(raw, dtype.value)
    array.value = values.reshape(shape[::-1]).T if order == "F" else values.reshape(shape)
    return array


def _scalar(dtype: _Dtype, raw: Any) -> Any:
    return np.frombuffer(_raw(raw), dtype.value)[0].item()


def _raw(text: Any) -> bytes:
    """Python 2 strings arrive as text of the code points 0 to 255."""
    return text.encode("latin1") if isinstance(text, str) else bytes(text)


def _encode(text: str, encoding: str = "latin1") -> bytes:
    if encoding not in ("latin1", "latin-1"):
        raise pickle.UnpicklingError(f"it has text encoded as {encoding}")
    return text.encode("latin1")


ADMITTED: dict[tuple[str, str], Any] = {
    ("_codecs", "encode"): _encode,
    ("numpy", "ndarray"): _Array,
    ("numpy", "dtype"): _Dtype,
}
for _core in ("numpy.core", "numpy._core"):
    ADMITTED[f"{_core}.multiarray", "_reconstruct"] = lambda *args: _Array()
    ADMITTED[f"{_core}.multiarray", "scalar"] = _scalar
    ADMITTED[f"{_core}.numeric", "_frombuffer"] = _from_buffer
for _name in PLAIN.split():
    _value = getattr(builtins, {"long": "int", "unicode": "str"}.get(_name, _name))
    ADMITTED["builtins", _name] = ADMITTED["__builtin__", _name] = _value


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        try:
            return ADMITTED[module, name]
        except KeyError:
            raise pickle.UnpicklingError(
                f"it names {module}.{name}, which is no plain value or numpy array"
            ) from None


def load(path: str, data: bytes) -> dict[str, Any]:
    """The dictionary in a pickle, of plain values and arrays; keys and strings are text.

    Args:
      path: Of the file, for messages.
      data: Its content.

    Raises:
      ValueError: It is damaged, not a dictionary, or names anything else.
    """
    try:
        content = _Unpickler(io.BytesIO(data), encoding="latin1").load()
        if not isinstance(content, dict):
            raise pickle.UnpicklingError("it holds no dictionary")
    # A damaged pickle may fail in any of these ways.
    except (
        pickle.UnpicklingError,
        ArithmeticError,
        AttributeError,
        EOFError,
        ImportError,
        LookupError,
        MemoryError,
        TypeError,
        ValueError,
    ) as error:
        raise ValueError(
            f"{path} was refused as a pickle of plain values and numpy arrays ({error})"
        ) from error
    return {_text(key): _plain(value) for key, value in content.items()}


def _text(value: Any) -> Any:
    return value.decode("latin1") if isinstance(value, bytes) else value


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {_text(key): _plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    return value.value if isinstance(value, _Array) else _text(value)
