"""The rate-distortion curve of a run with a capacity, as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vae_runtime.atomic import atomic_file
from vae_runtime.errors import MissingExtraError

CURVE_FILE = "rate-distortion.png"


def require_matplotlib() -> None:
    """Raise `MissingExtraError` now rather than when the training is over."""
    try:
        import matplotlib.backends.backend_agg  # noqa: F401
    except ImportError:
        raise MissingExtraError("matplotlib", "plots", "the rate-distortion curve of a capacity") from None


def draw_curve(history: Sequence[dict[str, Any]], path: Path) -> None:
    """One point for each evaluation of `history`: KL across and reconstruction up, both of the validation part.

    A point is of a model on its way, so that the curve lies above the best that the network could do at that rate. The
    dashed line joins all points with the lowest -ELBO, the sum of both.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rate, distortion = ([entry[f"validation_{name}_nats"] for entry in history] for name in ("kl", "reconstruction"))
    sums = [sum(pair) for pair in zip(rate, distortion, strict=True)]
    best = sums.index(min(sums))
    figure = Figure(figsize=(7, 5), layout="constrained", dpi=130)
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.plot(rate, distortion, "o-", color="#0072B2", markersize=5, linewidth=1.2, label="each evaluation")
    axes.plot(
        rate[-1:], distortion[-1:], "D", color="#D55E00", markersize=8, label=_label("the weights kept", sums[-1])
    )
    limits = axes.get_xlim(), axes.get_ylim()
    axes.axline(
        (rate[best], distortion[best]), slope=-1, color="#555555", linestyle="--", linewidth=1,
        label=_label(f"the lowest, epoch {history[best]['epoch']}", sums[best]),
    )  # fmt: skip
    axes.set(xlim=limits[0], ylim=limits[1])
    axes.set_xlabel("rate: KL(q(z|x) ‖ p(z)), nats per example of the validation part")
    axes.set_ylabel("distortion: -log p(x|z), nats per example")
    axes.grid(color="#E0E0E0", linewidth=0.7)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.legend(frameon=False)
    with atomic_file(path) as stream:
        figure.savefig(stream, format="png")


def _label(what: str, negative_elbo: float) -> str:
    return f"{what}: -ELBO {negative_elbo:.2f} nats"
