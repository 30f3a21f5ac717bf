"""Memory on GPUs that others hold through DLPack: what they let go of is kept until their work on it is done.

A consumer lets go of an array when it has begun its last work on it. Were the memory free then, a call of another
thread could be given it, between its own wait for the consumer's work and its taking of memory. So the deleter in a
capsule (`DLManagedTensor` of dlpack.h) is ours: it notes the array, and onnxruntime's own runs after the next wait.
"""

from __future__ import annotations

import atexit
import ctypes
from typing import Any

_Deleter = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
# A prototype of our own: what `ctypes.pythonapi.PyCapsule_GetPointer` takes and gives is the whole process's.
_pointer_in = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.py_object, ctypes.c_char_p)(
    ("PyCapsule_GetPointer", ctypes.pythonapi)
)
_lent: dict[int, tuple[int, Any]] = {}  # address of a DLManagedTensor -> the GPU, onnxruntime's deleter
_returned: list[int] = []  # those that were let go of; a list's appending and popping is safe between threads


class Tensor(ctypes.Structure):
    """DLTensor of dlpack.h."""

    _fields_ = [
        ("data", ctypes.c_uint64), ("device", ctypes.c_int32 * 2), ("ndim", ctypes.c_int32), ("dtype", ctypes.c_uint32),
        ("shape", ctypes.c_void_p), ("strides", ctypes.c_void_p), ("byte_offset", ctypes.c_uint64),
    ]  # fmt: skip


class _Managed(ctypes.Structure):
    """DLManagedTensor of dlpack.h."""

    _fields_ = [("tensor", Tensor), ("context", ctypes.c_void_p), ("deleter", ctypes.c_void_p)]


def address_of(capsule: Any) -> int:
    """Of the DLManagedTensor in a capsule, which begins with its DLTensor."""
    return int(_pointer_in(capsule, b"dltensor"))


def lend(capsule: Any, index: int) -> None:
    """Keep the memory of this capsule of onnxruntime's, on GPU `index`, until `take_back` after it is let go of."""
    address = address_of(capsule)
    managed = _Managed.from_address(address)
    _lent[address] = index, _Deleter(managed.deleter)
    managed.deleter = ctypes.cast(_note, ctypes.c_void_p).value


def returned(index: int) -> list[int]:
    """What has been let go of on GPU `index`: free it by `take_back` when the work on it is done."""
    if not _returned:
        return []
    lent = ((address, _lent.get(address)) for address in list(_returned))  # None: another thread has freed it by now
    return [address for address, entry in lent if entry is not None and entry[0] == index]


def take_back(addresses: list[int]) -> None:
    """Free what `returned` gave, unless another thread has."""
    for address in addresses:
        try:
            _returned.remove(address)
        except ValueError:
            continue
        _, delete = _lent.pop(address)
        delete(address)


_note = _Deleter(_returned.append)


@atexit.register
def _undo() -> None:
    """Who lets go of an array after the interpreter's end finds onnxruntime's deleter."""
    for address, (_, delete) in list(_lent.items()):
        if address not in _returned:
            _Managed.from_address(address).deleter = ctypes.cast(delete, ctypes.c_void_p).value
