"""Arrays that stay in the device's memory, here in that of the CPU, exchanged through DLPack."""

from __future__ import annotations

import contextlib
import ctypes
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import vae_runtime.device_array as device_array
from vae_runtime import VAE, ClosedError, InputError, OutOfMemoryError, lending
from vae_runtime.device_array import DeviceArray, await_others, copy_to_device, from_dlpack
from vae_runtime.devices import Device
from vae_runtime.engine import import_engine

GPU = ("cuda", 1)


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Which waits for work on a GPU there were."""
    found: list[Any] = []
    monkeypatch.setattr(device_array, "_on_other_streams", set())
    monkeypatch.setattr(device_array, "made_current", lambda memory: contextlib.nullcontext())
    monkeypatch.setattr(device_array, "synchronize", lambda index: found.append(("all", index)))
    monkeypatch.setattr(device_array, "synchronize_default_stream", lambda index: found.append(("default", index)))
    return found


def test_results_on_the_device_are_those_of_the_host(tiny: VAE, images: np.ndarray) -> None:
    x = np.ascontiguousarray(images[:5])
    posterior, expected = tiny.encode_to_device(x), tiny.encode(x)
    assert posterior.mean.shape == expected.mean.shape
    assert posterior.mean.device == ("cpu", 0)
    assert posterior.logvar is not None
    np.testing.assert_allclose(posterior.mean.numpy(), expected.mean, atol=1e-6)
    np.testing.assert_allclose(posterior.logvar.numpy(), expected.logvar, atol=1e-6)
    np.testing.assert_allclose(tiny.decode_to_device(posterior.mean).numpy(), tiny.decode(expected.mean), atol=1e-6)
    assert repr(posterior.mean) == f"DeviceArray(shape={expected.mean.shape}, device=cpu:0)"


def test_numpy_takes_them_as_arrays(tiny: VAE, images: np.ndarray) -> None:
    found = tiny.encode_to_device(images).mean
    for array in (np.asarray(found), np.array(found), np.concatenate([found])):
        assert array.dtype == np.float32
        np.testing.assert_array_equal(array, found.numpy())
    assert np.asarray(found, np.float64).dtype == np.float64
    np.asarray(found)[:] = 0  # a copy
    assert found.numpy().any()
    if np.lib.NumpyVersion(np.__version__) >= "2.0.0":
        with pytest.raises(
            ValueError, match=r"DeviceArray\(.*\) becomes an array of numpy by a copy, and copy is False"
        ):
            np.asarray(found, copy=False)


class _Later:
    """The rows of an array after the first `skipped`, as a producer shows them that leaves `data` at the first."""

    def __init__(self, array: np.ndarray, skipped: int) -> None:
        self._array, self._rows, self._skipped = array, array[skipped:], skipped

    def __dlpack_device__(self) -> tuple[int, int]:
        return self._array.__dlpack_device__()

    def __dlpack__(self) -> Any:
        capsule = self._rows.__dlpack__()
        tensor = lending.Tensor.from_address(lending.address_of(capsule))
        tensor.byte_offset = self._skipped * self._array.strides[0]
        tensor.data -= tensor.byte_offset
        return capsule


def test_an_offset_that_the_producer_states_is_heeded(tiny: VAE, images: np.ndarray) -> None:
    x = np.ascontiguousarray(images[:5])
    found = tiny.encode_to_device(_Later(x, 2)).mean.numpy()
    np.testing.assert_allclose(found, tiny.encode(x[2:]).mean, atol=1e-6)


def test_autoencoders_have_no_logvar(vectors: VAE) -> None:
    posterior = vectors.encode_to_device(vectors.golden()["x"])
    assert posterior.logvar is None


def test_arrays_are_shared_with_torch_both_ways(tiny: VAE, images: np.ndarray) -> None:
    torch = pytest.importorskip("torch")
    x = torch.from_numpy(images[:4].copy())
    mean = tiny.encode_to_device(x).mean
    np.testing.assert_allclose(mean.numpy(), tiny.encode(images[:4]).mean, atol=1e-6)
    shared = torch.from_dlpack(mean)
    before = shared.clone()
    assert tuple(shared.shape) == mean.shape
    shared += 1  # the same memory
    np.testing.assert_allclose(mean.numpy(), (before + 1).numpy(), atol=1e-6)
    for asked in ({"copy": True}, {"dl_device": (2, 0)}):
        with pytest.raises(BufferError, match="hands out its own memory alone; copy what it gives"):
            mean.__dlpack__(**asked)
    image = tiny.decode_to_device(before)
    np.testing.assert_allclose(torch.from_dlpack(image).numpy(), tiny.decode(before.numpy()), atol=1e-6)


def test_memory_is_taken_and_arrays_are_read_after_the_others(
    tiny: VAE, images: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits: list[Any] = []
    monkeypatch.setattr(device_array, "await_others", waits.append)
    operation = tiny._open_operations()[0]
    array = copy_to_device(images[:2], operation.routes[0].any_batch.device)
    assert waits == [("cpu", 0)]
    assert from_dlpack(array, operation._boundary, operation.routes[0].any_batch.device, "images") is array
    assert waits == [("cpu", 0)] * 2


@pytest.mark.parametrize(
    ("streams", "expected"),
    [([], []), ([None], ["default"]), ([1], ["default"]), ([-1], ["all"]), ([1, 77, 1], ["all"]), ([2], ["all"])],
)
def test_work_of_those_who_were_handed_an_array_is_waited_for(
    tiny: VAE, images: np.ndarray, waits: list[Any], streams: list[int | None], expected: list[str]
) -> None:
    """They may be at work on its memory when it is free for the next call. Streams are numbered as by the protocol."""
    array = DeviceArray(tiny.encode_to_device(images[:2]).mean._value, GPU)
    for stream in streams:
        array.__dlpack__(stream=stream)
    assert waits == []
    for memory in (("cuda", 0), ("cpu", 1), GPU):
        await_others(memory)
    assert waits == [(which, 1) for which in expected]
    waits.clear()
    array.numpy()
    assert waits == [(which, 1) for which in expected]


def test_memory_that_was_lent_is_kept_until_work_on_it_is_waited_for(
    tiny: VAE, images: np.ndarray, waits: list[Any]
) -> None:
    """What they let go of while a wait is under way, in another thread, only the next one frees."""
    torch = pytest.importorskip("torch")
    array = tiny.encode_to_device(images[:2]).mean
    capsules = [array._value._ortvalue.to_dlpack() for _ in range(2)]
    for capsule in capsules:
        lending.lend(capsule, 1)
    del capsule
    assert lending.returned(1) == []
    there = [torch.from_dlpack(capsule) for capsule in capsules]
    capsules.clear()
    assert lending.returned(1) == []
    del there[0]
    (loan,) = lending.returned(1)
    assert lending.returned(0) == []
    await_others(("cuda", 0))
    assert (waits, lending.returned(1)) == ([], [loan])
    await_others(GPU)
    assert (waits, lending.returned(1)) == ([("default", 1)], [])
    lending.take_back([loan])  # as another thread that saw it too
    there.clear()
    assert len(lending.returned(1)) == 1
    await_others(GPU)
    await_others(GPU)
    assert waits == [("default", 1)] * 2
    assert array.numpy().shape == (2, 4)


def test_an_address_that_comes_again_is_another_loan() -> None:
    """Freed by one thread while another waits, memory may hold the next array's capsule, which nobody waited for."""
    freed: list[int] = []
    delete = lending._Deleter(freed.append)
    managed = lending.Managed(deleter=ctypes.cast(delete, ctypes.c_void_p).value)
    new = ctypes.PYFUNCTYPE(ctypes.py_object, ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)(
        ("PyCapsule_New", ctypes.pythonapi)
    )
    capsule = new(ctypes.addressof(managed), b"dltensor", None)

    def lend_and_let_go() -> list[lending.Loan]:
        managed.tensor.data, managed.deleter = 0x7F0000000000, ctypes.cast(delete, ctypes.c_void_p).value
        lending.lend(capsule, 7)
        assert lending.returned(7) == []
        ctypes.CFUNCTYPE(None, ctypes.c_void_p)(managed.deleter)(ctypes.addressof(managed))
        return lending.returned(7)

    first = lend_and_let_go()
    lending.take_back(first)
    second = lend_and_let_go()
    lending.take_back(first)
    assert (len(freed), lending.returned(7)) == (1, second)
    lending.take_back(second)
    assert (len(freed), lending.returned(7)) == (2, [])


def test_an_exception_under_way_survives_the_letting_go(
    tiny: VAE, images: np.ndarray, capfd: pytest.CaptureFixture[str]
) -> None:
    """A consumer's temporary is freed amid the error that it caused, where nothing of Python may be called."""
    torch = pytest.importorskip("torch")

    def lent() -> Any:
        capsule = tiny.encode_to_device(images[:2]).mean._value._ortvalue.to_dlpack()
        lending.lend(capsule, 1)
        return torch.from_dlpack(capsule)

    with pytest.raises(RuntimeError, match="shape '\\[17\\]' is invalid"):
        lent().view(17)
    with pytest.raises(AttributeError, match="nonsense"):
        lent().nonsense  # noqa: B018
    loans = lending.returned(1)
    assert len(loans) == 2
    lending.take_back(loans)
    assert capfd.readouterr().err == ""


def test_arrays_may_be_let_go_of_after_the_interpreters_end(tiny_path: Path) -> None:
    code = f"""
import atexit
kept = []
atexit.register(lambda: (kept.clear(), print(len(lending.returned(0)))))  # the first registered is the last to run
import numpy as np
import torch
from vae_runtime import VAE, lending
capsule = VAE.load({str(tiny_path)!r}).encode_to_device(np.zeros((2, 8, 8), np.uint8)).mean._value._ortvalue.to_dlpack()
lending.lend(capsule, 0)
kept.append(torch.from_dlpack(capsule))
"""
    pytest.importorskip("torch")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr, done.returncode) == ("1\n", "", 0)


def test_arrays_on_a_gpu_are_finished_and_aligned(
    tiny: VAE, images: np.ndarray, waits: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Kernels load 16 bytes at once; a part of another library's array may begin anywhere."""
    torch = pytest.importorskip("torch")

    class OnGpu:
        def __init__(self, tensor: Any) -> None:
            self._tensor, self.__dlpack_device__ = tensor, tensor.__dlpack_device__

        def __dlpack__(self, stream: int) -> Any:
            assert stream == 1
            return self._tensor.__dlpack__()

    made_current: list[Any] = []
    monkeypatch.setattr(
        device_array, "made_current", lambda memory: (made_current.append(memory), contextlib.nullcontext())[1]
    )
    monkeypatch.setattr(Device, "is_gpu", True)
    monkeypatch.setattr(Device, "memory", ("cpu", 0))
    operation = tiny._open_operations()[0]
    flat = torch.zeros(2 * 64 + 4)
    boundary, device = operation._boundary, operation.routes[0].any_batch.device
    assert from_dlpack(OnGpu(flat[4:].view(2, 1, 8, 8)), boundary, device, "images").shape == (2, 1, 8, 8)
    assert waits == [("default", 0)]
    assert made_current == [("cpu", 0)]
    taken: list[Any] = []
    monkeypatch.setattr(device_array, "returned", lambda index: ["let go of before the wait"] if not waits[2:] else [])
    monkeypatch.setattr(device_array, "take_back", lambda loans: taken.append((*loans, len(waits))))
    from_dlpack(OnGpu(flat[4:].view(2, 1, 8, 8)), boundary, device, "images")
    assert taken == [("let go of before the wait", 2)]
    with pytest.raises(InputError, match=r"images begins at an address that is no multiple of 16, .*; pass a copy"):
        from_dlpack(OnGpu(flat[3:-1].view(2, 1, 8, 8)), boundary, device, "images")


def test_without_memory_for_them_the_hint_is_one_that_can_be_followed(
    tiny: VAE, images: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The calls have no batch_size."""
    fail = import_engine().capi.onnxruntime_pybind11_state.Fail

    def without_memory(*_: Any) -> Any:
        raise fail("Failed to allocate memory for requested buffer of size 4096")

    monkeypatch.setattr("vae_runtime.session.ResidentCall", lambda session: without_memory)
    for session in (half.routes[0].any_batch for half in tiny._open_operations()):
        monkeypatch.setattr(session, "_of_thread", threading.local())
    with pytest.raises(OutOfMemoryError, match=r"at batch size 3; pass fewer examples at a time$"):
        tiny.encode_to_device(images[:3])
    monkeypatch.setattr("vae_runtime.session.copy_to_device", without_memory)
    with pytest.raises(OutOfMemoryError, match=r"at batch size 3; pass fewer examples at a time$"):
        tiny.decode_to_device(np.zeros((3, 4), np.float32))


def test_they_outlive_the_bundle(tiny_path: Path, images: np.ndarray) -> None:
    vae = VAE.load(tiny_path)
    mean = vae.encode_to_device(images[:4]).mean
    expected = vae.encode(images[:4]).mean
    vae.close()
    np.testing.assert_allclose(mean.numpy(), expected, atol=1e-6)
    with pytest.raises(ClosedError):
        vae.encode_to_device(images[:4])
    with pytest.raises(ClosedError):
        vae.decode_to_device(mean)


def test_results_do_not_share_memory_with_later_ones(tiny: VAE, images: np.ndarray) -> None:
    first = tiny.encode_to_device(images[:4]).mean
    kept = first.numpy()
    for _ in range(5):
        tiny.encode_to_device(images[4:8])
    np.testing.assert_array_equal(first.numpy(), kept)


def test_what_is_on_the_host_is_checked_as_ever(tiny: VAE, images: np.ndarray) -> None:
    wrong = images[:2].copy()
    wrong[0, 0, 0, 0] = 2
    with pytest.raises(InputError, match="images lie in"):
        tiny.encode_to_device(wrong)
    with pytest.raises(InputError, match="latents has shape"):
        tiny.decode_to_device(np.zeros((2, 99), np.float32))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda torch, x: x.double(), r"inputs is a tensor\(double\) of shape .*; expected float32 \(N, 1, 8, 8\)"),
        (
            lambda torch, x: x[:, :, :4],
            "inputs cannot be taken through DLPack: its memory is not contiguous",
        ),
        (lambda torch, x: x.permute(0, 1, 3, 2), "inputs cannot be taken through DLPack: its memory is not contiguous"),
        (lambda torch, x: x[:0], r"inputs is a tensor\(float\) of shape \(0, 1, 8, 8\)"),
        (lambda torch, x: x.requires_grad_(), "inputs cannot be taken through DLPack: .*grad"),
        (lambda torch, x: [1.0], "inputs is a list, which has no __dlpack__; expected float32"),
        (lambda torch, x: x.reshape(-1), r"inputs is a tensor\(float\) of shape \(\d+,\); expected"),
    ],
)
def test_other_arrays_are_refused_in_words(tiny: VAE, images: np.ndarray, make: Any, message: str) -> None:
    torch = pytest.importorskip("torch")
    x = torch.from_numpy(images[:4].copy())
    with pytest.raises(InputError, match=message):
        tiny.encode_to_device(make(torch, x))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda managed: setattr(managed, "deleter", None),
            "inputs cannot be taken through DLPack: its capsule has no deleter; expected float32",
        ),
        (
            lambda managed: managed.tensor.device.__setitem__(0, 2),
            "inputs has a capsule of memory elsewhere than it says itself; expected float32",
        ),
    ],
)
def test_capsules_that_onnxruntime_cannot_take_are_refused(
    tiny: VAE, images: np.ndarray, change: Callable[[lending.Managed], None], message: str
) -> None:
    """Of either, it would end the process or read what is not there."""
    whole = tiny.encode_to_device(images[:2]).mean

    class Array:
        shape = (2, 1, 8, 8)

        def __dlpack_device__(self) -> tuple[int, int]:
            return 1, 0

        def __dlpack__(self) -> Any:
            capsule = whole.__dlpack__()
            managed = lending.Managed.from_address(lending.address_of(capsule))
            kept.append((capsule, managed.deleter))
            change(managed)
            return capsule

    kept: list[Any] = []
    with pytest.raises(InputError, match=message):
        tiny.encode_to_device(Array())
    ((capsule, deleter),) = kept
    lending.Managed.from_address(lending.address_of(capsule)).deleter = deleter  # onnxruntime's own frees it


def test_an_array_whose_shape_raises_is_taken_by_its_capsule(tiny: VAE, images: np.ndarray) -> None:
    array = copy_to_device(images[:2], tiny._open_operations()[0].routes[0].any_batch.device)

    class Odd:
        __dlpack__, __dlpack_device__ = array.__dlpack__, array.__dlpack_device__

        @property
        def shape(self) -> Any:
            raise RuntimeError("not now")

    np.testing.assert_array_equal(tiny.encode_to_device(Odd()).mean.numpy(), tiny.encode(images[:2]).mean)


def test_arrays_on_a_device_are_sent_to_the_calls_for_them(tiny: VAE, images: np.ndarray) -> None:
    mean = tiny.encode_to_device(images[:2]).mean
    with pytest.raises(
        InputError, match=r"is a DeviceArray; expected a numpy array; .* for encode_to_device and decode"
    ):
        tiny.decode(mean)


def test_arrays_on_another_device_are_refused(tiny: VAE) -> None:
    class Elsewhere:
        def __dlpack__(self, **_: Any) -> Any:
            raise AssertionError("not asked for")

        def __dlpack_device__(self) -> tuple[int, int]:
            return 2, 1

    with pytest.raises(InputError, match=r"inputs is on cuda:1; expected float32 .* on cpu:0"):
        tiny.encode_to_device(Elsewhere())
