"""What a factory returned, as two networks."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from vae_runtime.errors import ExportError


class Network:
    """The two halves of what a factory returned, and the module that its weights belong to."""

    def __init__(self, product: Any) -> None:
        if isinstance(product, (tuple, list)) and len(product) == 2:
            product = _Pair(*product)
        names = next((names for names in (("encode", "decode"), ("encoder", "decoder")) if _has(product, names)), None)
        if names is None:
            raise ExportError(
                f"the factory returns {type(product).__name__}; expected an object with encode and decode, or with"
                " encoder and decoder, or a pair (encoder, decoder)"
            )
        self.whole = product if isinstance(product, nn.Module) else _Parts(product)
        self.encoder, self.decoder = (_Half(self.whole, getattr(product, name)) for name in names)


class _Pair(nn.Module):
    def __init__(self, encoder: Any, decoder: Any) -> None:
        super().__init__()
        self.encoder, self.decoder = encoder, decoder


class _Parts(nn.Module):
    """The networks among an object's attributes, under their names there."""

    def __init__(self, owner: Any) -> None:
        super().__init__()
        for name, value in getattr(owner, "__dict__", {}).items():
            if isinstance(value, nn.Module):
                setattr(self, name, value)


class _Half(nn.Module):
    """One network, or one method of a model with all the model's weights."""

    def __init__(self, whole: nn.Module, call: Any) -> None:
        super().__init__()
        self.call = call
        if not isinstance(call, nn.Module):
            self.whole = whole

    def forward(self, x: Tensor) -> Any:
        return self.call(x)


def _has(product: Any, names: tuple[str, ...]) -> bool:
    return all(callable(getattr(product, name, None)) for name in names)
