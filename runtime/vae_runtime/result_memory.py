"""Host memory for large results, which the GPU writes by itself and which is used again once the caller lets go of it.

PyTorch hands out pinned memory in this way; here it is ordinary memory that is registered with the driver (NVIDIA's
CUDA Driver API, "Memory Management"), so that a forked child can read it.

A copy that the caller begins from such memory to any GPU, as torch's `to("cuda", non_blocking=True)` does, is under way
when the result is let go of, where from other memory the driver would have taken all of it before. So memory is used
again when no GPU has anything to do any more.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import weakref
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from .cuda import await_everyone
from .preprocess import Float32

if TYPE_CHECKING:
    from .cuda_stream import Stream

_PAGE = mmap.PAGESIZE  # bytes; whole pages, as what lies beside is not for the GPU
_MOST = 3  # pieces: whoever keeps more results has the others in ordinary memory
_forks = [0]  # of this process so far


class ResultMemory:
    """Pieces of `values` numbers each. For one call at a time."""

    def __init__(self, stream: Stream, values: int) -> None:
        self._stream, self._values = stream, values
        self._idle: list[NDArray[np.uint8]] = []
        self._made: list[weakref.ref[NDArray[np.uint8]]] = []
        self._most, self._forks = _MOST, _forks[0]

    def take(self) -> Float32 | None:
        """float32 (values,), the caller's until the last view of it is gone; None where there is none."""
        if self._forks != _forks[0]:
            self._idle, self._made, self._forks = [], [], _forks[0]
        piece = self._take_idle() if self._idle else self._make()
        if piece is None:
            return None
        shown = (ctypes.c_float * self._values).from_address(piece.ctypes.data)
        weakref.finalize(shown, _give_back, weakref.ref(self), piece, self._forks).atexit = False
        return np.ctypeslib.as_array(shown)

    def _take_idle(self) -> NDArray[np.uint8] | None:
        piece = self._idle.pop()
        if await_everyone():
            return piece
        self._idle.append(piece)
        return None

    def _make(self) -> NDArray[np.uint8] | None:
        self._made = [one for one in self._made if one() is not None]  # an interrupt may have cost one
        if len(self._made) >= self._most:
            return None
        size = -(-4 * self._values // _PAGE) * _PAGE
        raw = np.empty(size + _PAGE, np.uint8)
        piece = raw[-raw.ctypes.data % _PAGE :][:size]
        if not self._stream.register(piece):
            self._most = 0  # nor the next time
            return None
        self._made.append(weakref.ref(piece))
        return piece


def _give_back(owner: weakref.ref[ResultMemory], piece: NDArray[np.uint8], forks: int) -> None:
    memory = owner()
    if memory is not None and memory._forks == forks:
        memory._idle.append(piece)


def _count_fork() -> None:
    _forks[0] += 1


# After a fork, parent and child have the same pages until one of them writes: an older kernel may leave the parent with
# a copy, while the GPU goes on to write the original. So what there was is not given to the GPU again, where Python
# knows of the fork.
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_parent=_count_fork, after_in_child=_count_fork)
