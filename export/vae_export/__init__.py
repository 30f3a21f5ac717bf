"""From a PyTorch model to a verified bundle of two ONNX graphs.

from vae_export import Budget, export_bundle

export_bundle(encoder, decoder, "my.vae", examples=x)
export_bundle(encoder, decoder, "my.vae", examples=x, precisions=["fp32", "int8"], budget=Budget(psnr_db=0.2))
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vae_runtime.errors import MissingExtraError
from vae_runtime.version import __version__

from .quality import Budget, ExportWarning, FewExamplesWarning

if TYPE_CHECKING:
    from .export import export_bundle, export_checkpoint

__all__ = ["Budget", "ExportWarning", "FewExamplesWarning", "__version__", "export_bundle", "export_checkpoint"]


def __getattr__(name: str) -> Any:
    # Late, so that importing the package and its help needs neither torch nor onnx.
    if name not in ("export_bundle", "export_checkpoint"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        from . import export
    except ModuleNotFoundError as error:
        raise MissingExtraError(error.name or "a package", "export", "exporting") from None
    return getattr(export, name)


def __dir__() -> list[str]:
    return sorted(__all__)
