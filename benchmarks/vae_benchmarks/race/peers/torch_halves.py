"""One torch module as calls on a device, and from host memory and back. Imports torch.

From host memory there are these ways:

    pageable         torch copies the caller's array, and each output to a new one
    pinned           through memory that is pinned once, in both directions; the outputs are copied out of it
    pinned results   the same, but each output is handed out in newly pinned memory, which torch keeps in a pool
    copies captured  (graph only) as "pinned", with the copies to and from the device inside the CUDA graph
"""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from vae_runtime.preprocess import Float32

from ..competitors import TORCH_MODES
from .choice import Half, fastest
from .torch_compile import compile_module

_WARMUP_CALLS = 3  # before a capture, as torch's documentation asks for

Outputs = tuple[Tensor, ...]
Arrays = tuple[Float32, ...]


class Run(NamedTuple):
    """A forward pass. is_fresh: its outputs are not written to by the next one. copies: it takes its input from host
    memory too, and copies it to the device."""

    call: Callable[[Tensor], Outputs]
    is_fresh: bool = True
    copies: bool = False


def open_half(
    module: nn.Module,
    example: Float32,
    is_right: Callable[[Arrays], bool],
    device: str,
    precision: str,
    variant: str,
) -> Half:
    """The module in the ways that are fastest for `example`. variant: see `torch_device.open_entrant`."""
    dtype = torch.float16 if precision == "fp16" else torch.float32
    given = to_device(example, device)
    runs = dict(_runs(module, given, dtype, variant, is_right))

    def on_device(run: Run) -> Callable[[Tensor], Outputs]:
        return finished(run, _synchronize(device))

    word, resident = fastest(
        {layout: partial(on_device, run) for layout, run in runs.items()},
        given,
        lambda outputs: is_right(to_arrays(outputs)),
    )
    ways: dict[str, Callable[[], Callable[[Float32], Arrays]]] = {}
    for layout, run in runs.items():
        ways[f"{layout}, pageable"] = partial(Pageable, run, device)
        ways[f"{layout}, pinned"] = partial(Pinned, run, example, device, hands_out=False)
        ways[f"{layout}, pinned results"] = partial(Pinned, run, example, device, hands_out=True)
        if isinstance(run.call, CapturedGraph):
            ways[f"{layout}, copies captured"] = partial(GraphWithCopies, run.call.module, example, device)
    host_word, from_host = fastest(ways, example, is_right)
    return Half(from_host, resident, f"{word} on the device; {host_word} from the host")


def start(device: str, variant: str) -> None:
    """What the first use of the device, and of the compiler, does once per process and not for one module alone."""
    given = torch.zeros(1, 2, device=device)
    if variant in TORCH_MODES:
        with torch.no_grad():
            _compile(_Smallest().eval().to(device), given, TORCH_MODES[variant], lambda outputs: True)


class _Smallest(nn.Module):
    """Code of its own, so that what is compiled for it is not looked through in the calls of others."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        return torch.sigmoid(self.inner(x))


def finished(run: Run, synchronize: Callable[[], None]) -> Callable[[Tensor], Outputs]:
    """The forward pass with outputs that belong to the caller and are there when it returns."""
    call, is_fresh = run.call, run.is_fresh

    def on_device(x: Tensor) -> Outputs:
        outputs = call(x)
        if not is_fresh:
            outputs = tuple(one.clone() for one in outputs)
        synchronize()
        return outputs

    return on_device


class Boundary(nn.Module):
    """float32 in and out of a module that computes in `dtype`. turns: its input into channels_last."""

    def __init__(self, inner: nn.Module, dtype: torch.dtype, turns: bool) -> None:
        super().__init__()
        self.inner, self.dtype, self.turns = inner, dtype, turns

    def forward(self, x: Tensor) -> Any:
        x = x.to(self.dtype, memory_format=torch.channels_last) if self.turns else x.to(self.dtype)
        out = self.inner(x)
        return tuple(one.float() for one in out) if isinstance(out, tuple) else out.float()


def at_boundary(module: nn.Module, given: Tensor, dtype: torch.dtype, channels_last: bool) -> nn.Module:
    """A copy of the module, on the device of `given`; itself at the boundary where nothing is to be converted."""
    inner = copy.deepcopy(module).to(device=given.device, dtype=dtype)
    if channels_last:
        inner = inner.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    turns = channels_last and given.ndim == 4
    return Boundary(inner, dtype, turns) if turns or dtype is not torch.float32 else inner


def _runs(
    module: nn.Module, given: Tensor, dtype: torch.dtype, variant: str, is_right: Callable[[Arrays], bool]
) -> dict[str, Run]:
    if variant in TORCH_MODES:
        word, run = _compile(at_boundary(module, given, dtype, False), given, TORCH_MODES[variant], is_right)
        return {word: run}
    layouts = {"contiguous": False}
    if any(part.ndim == 4 for part in module.parameters()):
        layouts["channels_last"] = True
    placed = {name: at_boundary(module, given, dtype, turned) for name, turned in layouts.items()}
    if variant == "graph":
        return {name: Run(CapturedGraph(one, given), is_fresh=False, copies=True) for name, one in placed.items()}
    return {name: Run(_eager(one)) for name, one in placed.items()}


def _eager(module: Callable[[Tensor], Any]) -> Callable[[Tensor], Outputs]:
    def call(x: Tensor) -> Outputs:
        out = module(x)
        return out if isinstance(out, tuple) else (out,)

    return call


def _compile(module: nn.Module, given: Tensor, mode: str | None, is_right: Callable[[Arrays], bool]) -> tuple[str, Run]:
    def is_right_when_warm(run: Run) -> bool:
        for _ in range(_WARMUP_CALLS):  # the first compiles, the second records a CUDA graph, the third replays it
            found = to_arrays(run.call(given))
        return is_right(found)

    return compile_module(
        module, mode, lambda compiled: Run(_eager(compiled), is_fresh=mode is None), is_right_when_warm
    )


class CapturedGraph:
    """A module's kernels, captured once and launched together. Its outputs are overwritten by the next call."""

    def __init__(self, module: nn.Module, given: Tensor) -> None:
        self.module = module
        self._x = given.clone()
        self._graph, self._outputs = _capture(lambda: _eager(module)(self._x))

    def __call__(self, x: Tensor) -> Outputs:
        self._x.copy_(x, non_blocking=True)
        self._graph.replay()
        return self._outputs


class GraphWithCopies:
    """The same with the copies from pinned memory and back to it captured too: one launch for all."""

    def __init__(self, module: nn.Module, example: Float32, device: str) -> None:
        self._x = _host_memory(example.shape, device).copy_(torch.from_numpy(example))
        shapes = [one.shape for one in _eager(module)(self._x.to(device))]
        self._hosts = [_host_memory(shape, device) for shape in shapes]
        self._graph, _ = _capture(lambda: self._all(module, device))
        self._synchronize = _synchronize(device)

    def _all(self, module: nn.Module, device: str) -> Outputs:
        outputs = _eager(module)(self._x.to(device, non_blocking=True))
        for host, output in zip(self._hosts, outputs, strict=True):
            host.copy_(output, non_blocking=True)
        return outputs

    def __call__(self, array: Float32) -> Arrays:
        self._x.copy_(torch.from_numpy(array))
        self._graph.replay()
        self._synchronize()
        return tuple(host.numpy().copy() for host in self._hosts)


def _capture(work: Callable[[], Outputs]) -> tuple[Any, Outputs]:
    """A CUDA graph of `work`, which is done a few times on a stream of its own first."""
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        for _ in range(_WARMUP_CALLS):
            work()
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = work()
    return graph, outputs


class Pageable:
    """Ordinary host memory in both directions; each copy waits for the device."""

    def __init__(self, run: Run, device: str) -> None:
        self._run, self._device = run, device

    def __call__(self, array: Float32) -> Arrays:
        x = torch.from_numpy(array)
        outputs = self._run.call(x if self._run.copies else x.to(self._device))
        return tuple(one.contiguous().cpu().numpy() for one in outputs)


class Pinned:
    """Host memory that the GPU reaches by itself, in both directions; one wait for all copies. hands_out: the caller
    gets newly pinned memory, instead of a copy of what is pinned once."""

    def __init__(self, run: Run, example: Float32, device: str, hands_out: bool) -> None:
        self._run, self._device, self._hands_out = run, device, hands_out
        self._synchronize = _synchronize(device)
        self._x = _host_memory(example.shape, device)
        self._hosts = [_host_memory(one.shape, device) for one in run.call(to_device(example, device))]

    def __call__(self, array: Float32) -> Arrays:
        self._x.copy_(torch.from_numpy(array))
        outputs = self._run.call(self._x if self._run.copies else self._x.to(self._device, non_blocking=True))
        hosts = [_host_memory(one.shape, self._device) for one in outputs] if self._hands_out else self._hosts
        for host, output in zip(hosts, outputs, strict=True):
            host.copy_(output, non_blocking=True)
        self._synchronize()
        return tuple(host.numpy() if self._hands_out else host.numpy().copy() for host in hosts)


def to_device(array: Float32, device: str) -> Tensor:
    """A copy there."""
    return torch.from_numpy(array.copy()).to(device)


def to_arrays(outputs: Sequence[Tensor]) -> Arrays:
    """On the host; of a tensor that is there already, its own memory."""
    return tuple(np.ascontiguousarray(one.cpu().numpy()) for one in outputs)


def release_memory() -> None:
    """What the ways that were not chosen took of the GPU's, for the other competitors."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _host_memory(shape: Sequence[int], device: str) -> Tensor:
    return torch.empty(tuple(shape), pin_memory=device == "cuda")


def _synchronize(device: str) -> Callable[[], None]:
    """Wait for the stream on which all of it runs."""
    return torch.cuda.current_stream().synchronize if device == "cuda" else lambda: None
