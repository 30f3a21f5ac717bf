"""Arrays in a device's memory, exchanged without a copy through DLPack (torch, cupy, jax and others speak it).

The protocol: https://data-apis.org/array-api/latest/design_topics/data_interchange.html
"""

from __future__ import annotations

import functools
from typing import Any

from .bound import to_host
from .boundary import Boundary
from .cuda import made_current, synchronize, synchronize_default_stream
from .devices import Device
from .engine import first_line, import_engine, is_raw_engine_error, ort_value_from_dlpack
from .errors import DeviceError, InputError, VAEError
from .lending import Loan, Managed, address_of, lend, returned, take_back
from .preprocess import Float32

_DLPACK_TYPES = {1: "cpu", 2: "cuda"}  # DLDeviceType of dlpack.h, for what onnxruntime calls by these names
_LEGACY_STREAM = 1  # CUDA's default stream, in the protocol's numbering
_ALIGNMENT = 16  # bytes that kernels load at once; CUDA's own allocations begin at multiples of 256

_on_other_streams: set[int] = set()  # GPUs whose arrays were handed out for other streams than the default one


class DeviceArray:
    """float32, in the memory of a `VAE`'s device. Belongs to the caller; torch and others take it without a copy, as in
    `torch.from_dlpack(array)`. Once they let go of it, the memory is free for the next call, which waits for what they
    have begun with it until then.

    shape: with the batch first. device: onnxruntime's name for the memory and its number, ("cuda", 0) or ("cpu", 0).
    """

    def __init__(self, value: Any, device: tuple[str, int]) -> None:
        self._value = value
        self.device = device
        self._is_shared = False  # others may have it, and work on it that is under way

    @functools.cached_property
    def shape(self) -> tuple[int, ...]:
        return tuple(self._value.shape())

    def __len__(self) -> int:
        return self.shape[0]

    def numpy(self) -> Float32:
        """A copy in host memory.

        Raises:
            DeviceError: the device failed, also in work of others on the array.
        """
        if self._is_shared and self.device[0] == "cuda":
            _synchronize(self.device[1])
        try:
            with made_current(self.device):
                return to_host(self._value)
        except Exception as error:
            if not is_raw_engine_error(error):
                raise
            raise DeviceError(f"{self!r} cannot be copied: {first_line(error)}") from error

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Any:
        """The same, for `numpy.asarray`."""
        if copy is False:
            raise InputError(f"{self!r} becomes an array of numpy by a copy, and copy is False")
        return self.numpy() if dtype is None else self.numpy().astype(dtype, copy=False)

    def __dlpack__(
        self, *, stream: Any = None, copy: bool | None = None, dl_device: tuple[int, int] | None = None, **_: Any
    ) -> Any:
        """The protocol's capsule. What is in the array was finished before it was handed out, on every stream.

        stream: where it will be used, in the protocol's numbering.

        Raises:
            BufferError: a copy is asked for, or memory of another device.
        """
        if copy or dl_device not in (None, self.__dlpack_device__()):
            raise BufferError(f"{self!r} hands out its own memory alone; copy what it gives")
        self._is_shared = True
        kind, index = self.device
        capsule = self._value._ortvalue.to_dlpack()
        if kind == "cuda":
            if stream not in (None, _LEGACY_STREAM):
                _on_other_streams.add(index)
            lend(capsule, index)
        return capsule

    def __dlpack_device__(self) -> tuple[int, int]:
        kind, index = self.device
        return next(number for number, name in _DLPACK_TYPES.items() if name == kind), index

    def __repr__(self) -> str:
        return f"DeviceArray(shape={self.shape}, device={':'.join(map(str, self.device))})"


def await_others(memory: tuple[str, int]) -> None:
    """Wait for work of others on arrays that they have let go of, whose memory is free afterwards: nothing orders that
    work with what is done there next."""
    kind, index = memory
    if kind == "cuda" and (loans := returned(index)):
        _wait_and_free(memory, loans)


def _wait_and_free(memory: tuple[str, int], loans: list[Loan]) -> None:
    """loans: let go of before the wait, so that it is for the work on them too."""
    _synchronize(memory[1])
    if loans:
        with made_current(memory):
            take_back(loans)


def _synchronize(index: int) -> None:
    (synchronize if index in _on_other_streams else synchronize_default_stream)(index)


def copy_to_device(array: Float32, device: Device) -> DeviceArray:
    """A host array, copied into the device's memory."""
    await_others(device.memory)
    kind, index = device.memory
    value = import_engine().OrtValue.ortvalue_from_numpy(array.copy() if kind == "cpu" else array, kind, index)
    return DeviceArray(value, device.memory)


def from_dlpack(array: Any, boundary: Boundary, device: Device, name: str) -> DeviceArray:
    """An array of another library, in the device's memory, shared and not copied, once it is finished. Its values are
    not looked at.

    boundary: of the graph that it is for.

    Raises:
        InputError: no DLPack, another device, dtype or shape, or memory that is not contiguous.
    """
    is_ours = isinstance(array, DeviceArray) and not array._is_shared and array.device == device.memory
    if is_ours and boundary.accepts(array.shape[1:]):
        found: DeviceArray = array  # finished when it was made, and nobody else has it
        await_others(device.memory)
        return found
    rule = f"expected float32 {boundary.rule()}, contiguous, on {':'.join(map(str, device.memory))}"
    if not hasattr(array, "__dlpack__") or not hasattr(array, "__dlpack_device__"):
        raise InputError(f"{name} is a {type(array).__name__}, which has no __dlpack__; {rule}")
    try:
        kind, index = map(int, array.__dlpack_device__())
    except Exception as error:
        raise InputError(f"{name} cannot be taken through DLPack: {first_line(error)}; {rule}") from None
    place = _DLPACK_TYPES.get(kind, f"DLPack device {kind}"), index
    if place != device.memory:
        raise InputError(f"{name} is on {place[0]}:{place[1]}; {rule}")
    try:
        with made_current(device.memory):  # torch hands out what is on its current GPU only
            capsule = array.__dlpack__(stream=_LEGACY_STREAM) if device.is_gpu else array.__dlpack__()
        managed = Managed.from_address(address_of(capsule))
        tensor = managed.tensor
        if not managed.deleter:  # without which onnxruntime would end the process
            raise InputError(f"{name} cannot be taken through DLPack: its capsule has no deleter; {rule}")
        if tuple(tensor.device) != (kind, index):
            raise InputError(f"{name} has a capsule of memory elsewhere than it says itself; {rule}")
        tensor.data += tensor.byte_offset  # which onnxruntime before 1.32 does not look at
        tensor.byte_offset = 0
        value = ort_value_from_dlpack(capsule)
    except VAEError:
        raise
    except Exception as error:
        reason = "its memory is not contiguous" if "contiguous" in str(error) else first_line(error)
        raise InputError(f"{name} cannot be taken through DLPack: {reason}; {rule}") from None
    if value.data_type() != "tensor(float)" or not boundary.accepts(tuple(value.shape()[1:])) or value.shape()[0] < 1:
        raise InputError(f"{name} is a {value.data_type()} of shape {tuple(value.shape())}; {rule}")
    if device.is_gpu:
        if value.data_ptr() % _ALIGNMENT:
            raise InputError(
                f"{name} begins at an address that is no multiple of {_ALIGNMENT}, as a part of a larger array may;"
                " pass a copy of it"
            )
        # The producer's work is ordered before the default stream, and onnxruntime runs on another one.
        _wait_and_free(device.memory, returned(device.memory[1]))
    return DeviceArray(value, device.memory)
