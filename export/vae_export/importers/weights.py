"""Files of weights: read as plain tensors, so that nothing in them is ever run, and put into the network they fit."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vae_runtime.errors import CheckpointError

from ..reason import reason, some
from .options import needs_extra


def read_safetensors(path: Path, extra: str) -> dict[str, Tensor]:
    """The tensors of a safetensors file, by name. extra: the one of ours that brings the library.

    Raises:
        CheckpointError: the file is missing or damaged. MissingExtraError: safetensors is not installed.
    """
    return _read(path, extra, lambda file: file.keys())


def read_some_safetensors(path: Path, names: Iterable[str], extra: str) -> dict[str, Tensor]:
    """Those of the tensors with these names; of a file that has much more, nothing else is read. Raises: the same."""
    return _read(path, extra, lambda file: names)


def _read(path: Path, extra: str, choose: Callable[[Any], Iterable[str]]) -> dict[str, Tensor]:
    with needs_extra(extra, "reading .safetensors"):
        from safetensors import safe_open
    require_file(path)
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in choose(file)}
    except Exception as error:  # a SafetensorError, or what torch says of a type that it has not
        raise CheckpointError(f"{path} is damaged or no safetensors file ({reason(error)})") from None


def assign(network: nn.Module, weights: Mapping[str, Any], source: Path) -> None:
    """Put weights, as float32, into the network's own tensors, or in their place where these are on the device "meta".
    Of several names for one tensor, one is enough.

    weights: by name; torch's note of the versions of its modules, `_metadata` of a state_dict, is heeded.

    Raises:
        CheckpointError: some are missing, unknown, of another shape, or no plain tensors; the message has their names.
    """
    is_meta = any(value.is_meta for value in (*network.parameters(), *network.buffers()))
    if not is_meta:
        network.float()
    expected = {name: value for name, value in network.state_dict().items() if isinstance(value, Tensor)}
    wrong = {
        name: f"{name} ({_describe(value)}{f', expected {_shape(expected[name])}' if name in expected else ''})"
        for name, value in weights.items()
        if not _fits(value, expected.get(name))
    }
    fitting = OrderedDict((str(name), value) for name, value in weights.items() if name not in wrong)
    fitting._metadata = getattr(weights, "_metadata", None)  # type: ignore[attr-defined]
    rule = f"{source} does not fit its {type(network).__name__}:"
    try:  # which knows older names too, as weight_g, and what older files had not
        # In place, as authors do: whatever else the network keeps of a tensor, a view or in a list, follows.
        left = network.load_state_dict(fitting, strict=False, assign=is_meta)
    except RuntimeError as error:
        lines = [line.strip() for line in str(error).splitlines()]
        raise CheckpointError(f"{rule} {' '.join(lines[1:] or lines)}") from None
    filled = {_memory(value) for name, value in expected.items() if name in fitting and not is_meta}
    problems = [
        f"{what} {some(names)}"
        for what, names in (
            (
                "lacks",
                [name for name in left.missing_keys if name not in wrong and _memory(expected[name]) not in filled],
            ),
            ("has the unknown", left.unexpected_keys),
            ("has the wrong shape or type in", list(wrong.values())),
        )
        if names
    ]
    if problems:
        raise CheckpointError(f"{rule} it {'; it '.join(problems)}")
    if is_meta:
        network.float()


def require_file(path: Path) -> None:
    """Raises: CheckpointError: there is no such file."""
    if path.is_dir():
        raise CheckpointError(f"{path} is a folder; pass the file in it")
    if not path.is_file():
        raise CheckpointError(f"{path} is missing")


def _memory(value: Tensor) -> tuple[Any, ...]:
    """Where a tensor is, and how it lies there."""
    return value.data_ptr(), value.shape, value.stride()


def _fits(value: Any, expected: Tensor | None) -> bool:
    """expected: None where the network has no such name, and torch perhaps knows it as an older one."""
    if not isinstance(value, Tensor):
        return expected is None
    if value.layout != torch.strided or value.is_quantized or value.is_complex() or value.is_meta:
        return False
    if expected is None:
        return True
    return value.shape == expected.shape and value.is_floating_point() == expected.is_floating_point()


def _describe(value: Any) -> str:
    return f"{_shape(value)} {str(value.dtype).removeprefix('torch.')}" if isinstance(value, Tensor) else repr(value)


def _shape(value: Tensor) -> str:
    return "×".join(map(str, value.shape)) or "one number"
