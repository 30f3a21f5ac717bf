"""The device a run uses: what was asked for, or an error."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import torch

from vae_runtime.errors import DeviceError, InputError, MissingExtraError

if TYPE_CHECKING:
    from accelerate import Accelerator


def make_accelerator(device: str, mixed_precision: str) -> Accelerator:
    """An `Accelerator` on "cpu", "cuda", "cuda:1" or "mps"; with "auto" on the first accelerator, else the CPU.

    Under `torchrun` each process takes the device of its local rank.

    Raises:
        InputError: the device is unknown. DeviceError: it is not there, or cannot do the mixed precision.
        MissingExtraError: accelerate is not installed.
    """
    try:
        from accelerate import Accelerator
        from accelerate.state import AcceleratorState
    except ImportError:
        raise MissingExtraError("accelerate", "train", "training") from None
    _require(device)
    if mixed_precision == "fp16" and device == "cpu":
        raise DeviceError("mixed_precision is 'fp16', which device 'cpu' cannot do; bf16 needs no scaling of the loss")
    # accelerate keeps the first device of a process for good; a second run in the same process may ask for another.
    if not torch.distributed.is_initialized():
        AcceleratorState._reset_state(reset_partial_state=True)
    if device.startswith("cuda:"):
        torch.cuda.set_device(device)
    try:
        accelerator = Accelerator(cpu=device == "cpu", mixed_precision=mixed_precision)
    except (ValueError, RuntimeError) as error:
        raise DeviceError(
            f"mixed_precision is {mixed_precision!r}, which device {device!r} cannot do: {error}"
        ) from None
    if mixed_precision == "fp16" and accelerator.device.type == "cpu":  # accelerate would leave it out unsaid
        raise DeviceError("mixed_precision is 'fp16', which no GPU is there for; bf16 runs on the CPU too")
    if device != "auto" and accelerator.device.type != device.split(":")[0]:
        raise DeviceError(f"device is {device!r}, but {accelerator.device} is what accelerate took")
    return accelerator


def _require(device: str) -> None:
    if not isinstance(device, str) or not re.fullmatch(r"auto|cpu|mps|cuda(:\d+)?", device):
        raise InputError(f"device is {device!r}; expected auto, cpu, cuda, cuda:N or mps")
    if device.startswith("cuda"):
        there = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if int(device.partition(":")[2] or 0) >= there:
            raise DeviceError(f"device is {device!r}, but torch {torch.__version__} sees {there} CUDA devices here")
    if device == "mps" and not torch.backends.mps.is_available():
        raise DeviceError("device is 'mps', but torch sees no Apple GPU here")
