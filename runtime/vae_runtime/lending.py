"""Memory on GPUs that others hold through DLPack: what they let go of is kept until their work on it is done.

A consumer lets go of an array when it has begun its last work on it. Were the memory free then, a call of another
thread could be given it, between its own wait for the consumer's work and its taking of memory. So the deleter in a
capsule (`DLManagedTensor` of dlpack.h) only marks the array, and onnxruntime's own runs after the next wait.
"""

from __future__ import annotations

import ctypes
import functools
import sys
from typing import Any

_Deleter = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
# A prototype of our own: what `ctypes.pythonapi.PyCapsule_GetPointer` takes and gives is the whole process's.
_pointer_in = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.py_object, ctypes.c_char_p)(
    ("PyCapsule_GetPointer", ctypes.pythonapi)
)


class Tensor(ctypes.Structure):
    """DLTensor of dlpack.h."""

    _fields_ = [
        ("data", ctypes.c_uint64), ("device", ctypes.c_int32 * 2), ("ndim", ctypes.c_int32), ("dtype", ctypes.c_uint32),
        ("shape", ctypes.c_void_p), ("strides", ctypes.c_void_p), ("byte_offset", ctypes.c_uint64),
    ]  # fmt: skip


class Managed(ctypes.Structure):
    """DLManagedTensor of dlpack.h."""

    _fields_ = [("tensor", Tensor), ("context", ctypes.c_void_p), ("deleter", ctypes.c_void_p)]


class Loan:
    """One capsule's memory, on GPU `index`. Told apart by the object: the address of a freed one comes again."""

    def __init__(self, index: int, managed: Managed) -> None:
        self.index = index
        self._managed, self._data = managed, managed.tensor.data
        self._delete = _Deleter(managed.deleter)
        self._first = ctypes.c_uint64.from_address(ctypes.addressof(managed))

    def is_back(self) -> bool:
        return bool(self._first.value != self._data)

    def free(self) -> None:
        self._delete(ctypes.addressof(self._managed))


_lent: set[Loan] = set()  # adding, removing and copying are safe between threads


def address_of(capsule: Any) -> int:
    """Of the DLManagedTensor in a capsule, which begins with its DLTensor."""
    return int(_pointer_in(capsule, b"dltensor"))


def lend(capsule: Any, index: int) -> None:
    """Keep the memory of this capsule of onnxruntime's, on GPU `index`, until `take_back` after it is let go of."""
    managed = Managed.from_address(address_of(capsule))
    _lent.add(Loan(index, managed))
    managed.deleter = _mark()


def returned(index: int) -> list[Loan]:
    """What has been let go of on GPU `index`: free it by `take_back` when the work on it is done."""
    if not _lent:
        return []
    return [loan for loan in _lent.copy() if loan.index == index and loan.is_back()]


def take_back(loans: list[Loan]) -> None:
    """Free what `returned` gave, unless another thread has."""
    for loan in loans:
        try:
            _lent.remove(loan)
        except KeyError:
            continue
        loan.free()


@functools.cache
def _mark() -> int | None:
    """The address of C's own `time`, which writes over the first eight bytes of what it is given: here those of `data`.

    Consumers call the deleter wherever they are, amid an exception, without the interpreter's lock, after its end,
    where nothing in Python may run.
    """
    library = ctypes.CDLL("ucrtbase.dll" if sys.platform == "win32" else None)
    return ctypes.cast(library._time64 if sys.platform == "win32" else library.time, ctypes.c_void_p).value
