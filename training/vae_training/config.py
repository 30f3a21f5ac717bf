"""Everything that determines the result of a training run, but for rounding: the same settings and data give the same
weights on a CPU with the same number of threads, and sums of another number are rounded otherwise."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from vae_runtime.arguments import check_choice
from vae_runtime.errors import InputError
from vae_runtime.manifest import BINARIZE_MODES, COLOURS, KINDS, RESIZE_MODES, InputSpec

from . import strict
from .split import ORDERS

if TYPE_CHECKING:
    from .models import ModelConfig

# torch is imported by what needs it, so that `vae-train --help` does not.
FAMILIES = ("mlp", "conv", "resnet")
NORMS = ("batch", "group")
ACTIVATIONS = ("relu", "silu")
LIKELIHOODS = ("bernoulli", "gaussian", "laplace")
_RESNET_WIDTHS: tuple[int, ...] = (32, 64)
MAX_WIDTH, MAX_SIDE = 65536, 8192
_SIDES = f"expected height and width, from 1 to {MAX_SIDE}"
MIXED_PRECISIONS = ("no", "bf16", "fp16")
NLL_SAMPLES = 100
GAMMA, CAPACITY_RISE = 10.0, 0.8
MIN_EPOCHS, MIN_STEPS = 20, 800  # of the default number of epochs


@dataclass(frozen=True)
class TrainConfig:
    """The settings of a run. None means "as fits the data": `resolve` fills it in.

    data, size, resize, colour: see `data.load_dataset`; data may be an os.PathLike too.
    split, order: see `split.split_indices`; None: "0.8,0.1,0.1" and "seeded". Where neither is given, data with a test
        part of their own, IDX files "train" and "t10k", keep it (see `split.split_before`), and both stay None; of few
        photographs, which are cut into strips, the order does.
    exclude_label: labels whose examples are left out of all parts, after dividing: see `split.leave_out`.
    crop: (H, W) of the crops that a folder of photographs of any sizes is trained on, see `photographs.py`; None: 64×64
        for the resnet family, where neither size nor resize is given, and no crops for the others.
    flip: half of the crops are mirrored left to right; None: yes.
    binarize: how images become binary, in inputs and targets alike: "none", "dynamic" or "threshold".
    shift: each training image is moved by up to this many pixels, zeros moving in; 0: not at all.
    family, kind, latent, widths, depth, norm, activation, attention: see `models.ModelConfig`; latent: its latent_dim.
    likelihood: "bernoulli" (the default for grey images, unless of the resnet family), "gaussian" (for all else) or
        "laplace".
    beta: weight of the KL (Higgins et al., 2017: β-VAE); None: 1, and 1e-5 for the resnet family. Spatial latents are
        mostly made for a second model that learns their distribution, and their KL is then kept from growing without
        end and no more: Rombach et al., 2022, arXiv:2112.10752, give it the weight 1e-6 against absolute errors in
        [-1, 1]; against a Laplace density of scale b in [0, 1], in nats, that is 1e-6 / 2b: 1e-5 at b = 0.05. Samples
        from the prior mean something only with a β near 1. An autoencoder has no KL and takes none of these three.
    free_bits: nats per latent dimension.
    gradient_weight: of the differences of neighbouring pixels, see `losses.Objective`; 0: not in the loss.
    kl_warmup: the part of all steps over which the KL's weight rises from 0 to beta.
    capacity: nats; above 0, the loss has gamma · |KL - C| in place of the KL, C rising linearly from 0 to it over the
        first `CAPACITY_RISE` of all steps and then staying (Burgess et al., 2018, arXiv:1804.03599; the distance is
        rounded off near 0, see `losses.capacity_gap`). The run passes through models of all lower rates, which its
        rate-distortion curve shows, and its last weights are kept. It takes the place of beta, free_bits and kl_warmup,
        and goes without patience. 0: none.
    gamma: how strongly. Where it is less than the nats of reconstruction that one nat of KL is worth, the KL exceeds C;
        the higher it is, the less is learned of the reconstruction in as many steps. None: 10; theirs is 1000, over
        half a million steps.
    batch_size: examples per step, over all processes together; an epoch divides evenly into batches of at least this.
    learning_rate: the highest; it rises over `lr_warmup` of all steps and falls to 0 on a cosine.
    clip: largest norm of the gradient. ema: decay of the moving average of the weights.
    patience: stop after this many epochs without a better validation figure; 0: never.
    nll_samples: importance samples per example of the test part's likelihood, see `likelihood.measure_nll`; 0: it is
        not measured; None: 100, and 0 for the resnet family, whose latents are large, and for autoencoders.
    """

    data: str
    split: str | None = None
    order: str | None = None
    exclude_label: tuple[int, ...] = ()
    size: tuple[int, ...] | None = None
    resize: str | None = None
    colour: str | None = None
    binarize: str = "none"
    shift: int = 0
    crop: tuple[int, ...] | None = None
    flip: bool | None = None
    family: str = "conv"
    kind: str = "vae"
    latent: int | None = None
    widths: tuple[int, ...] | None = None
    depth: int | None = None
    norm: str | None = None
    activation: str | None = None
    attention: bool = False
    likelihood: str | None = None
    beta: float | None = None
    free_bits: float = 0.0
    gradient_weight: float = 0.0
    kl_warmup: float = 0.1
    capacity: float = 0.0
    gamma: float | None = None
    epochs: int | None = None
    batch_size: int = 128
    learning_rate: float = 4e-3
    lr_warmup: float = 0.05
    weight_decay: float = 0.01
    clip: float = 100.0
    ema: float = 0.995
    patience: int = 0
    nll_samples: int | None = None
    mixed_precision: str = "no"
    seed: int = 0

    def __post_init__(self) -> None:
        if isinstance(self.data, os.PathLike):
            object.__setattr__(self, "data", os.fspath(self.data))
        for name in ("size", "crop"):
            if not isinstance(sides := getattr(self, name), (list, tuple, type(None))):
                raise InputError(f"{name} is {sides!r}; {_SIDES}")
        strict.settle(self)
        for name, allowed in _CHOICES.items():
            if getattr(self, name) is not None:
                check_choice(getattr(self, name), name, allowed)
        for name, (low, high) in _RANGES.items():
            strict.within(getattr(self, name), low, high, name)
        for name in ("size", "crop"):
            sides = getattr(self, name)
            if sides is not None and (len(sides) != 2 or not all(1 <= side <= MAX_SIDE for side in sides)):
                raise InputError(f"{name} is {list(sides)}; {_SIDES}")

    @property
    def crop_multiple(self) -> int:
        """What the sides of a crop have to be multiples of for the model."""
        return multiple_of(self.family, self.widths or _RESNET_WIDTHS)

    def resolve(self, spec: InputSpec, train_examples: int, crops: bool = False) -> TrainConfig:
        """The same with every None that depends on the data filled in.

        spec: of one example. train_examples: in an epoch. crops: the examples are crops of photographs.

        Raises:
            InputError: settings that do not go with the data.
        """
        self._check_against(spec, train_examples, crops)
        self._check_capacity()
        spatial = self.family == "resnet"
        beta = 1e-5 if spatial and not self.capacity else 1.0
        likelihood = self.likelihood or (
            "bernoulli" if spec.is_image and spec.example_shape[0] == 1 and not spatial else "gaussian"
        )
        if self.binarize != "none" and likelihood != "bernoulli":
            raise InputError(
                f"binarize is {self.binarize!r}, but likelihood is {likelihood!r}; binary data are Bernoulli's"
            )
        latent = self.latent or (4 if spatial else min(20, math.prod(spec.example_shape)))
        widths, depth = default_layers(self.family, spec.example_shape)
        return replace(
            self,
            crop=spec.example_shape[1:] if crops else None,
            flip=self.flip is not False if crops else None,
            latent=latent,
            likelihood=likelihood,
            beta=beta if self.beta is None and self.kind == "vae" else self.beta,
            kl_warmup=0.0 if self.capacity or self.kind != "vae" else self.kl_warmup,
            gamma=(GAMMA if self.gamma is None else self.gamma) if self.capacity else None,
            widths=self.widths or widths,
            depth=depth if self.depth is None else self.depth,
            norm=self.norm or "batch",
            activation=self.activation or "relu",
            nll_samples=(0 if spatial or self.kind != "vae" else NLL_SAMPLES)
            if self.nll_samples is None
            else self.nll_samples,
            epochs=self.epochs
            or max(MIN_EPOCHS, math.ceil(MIN_STEPS / steps_per_epoch(train_examples, self.batch_size))),
        )

    def _check_against(self, spec: InputSpec, train_examples: int, crops: bool) -> None:
        """Raise `InputError` for settings that do not go with the data."""
        if not spec.is_image and (self.family != "mlp" or self.likelihood == "bernoulli"):
            wrong = f"family is {self.family!r}" if self.family != "mlp" else "likelihood is 'bernoulli'"
            raise InputError(
                f"{wrong}, but {self.data} holds vectors; they take family 'mlp' and likelihood 'gaussian' or 'laplace'"
            )
        if self.gradient_weight and not spec.is_image:
            raise InputError(f"gradient_weight is {self.gradient_weight:g}, but {self.data} holds vectors, not images")
        if self.flip and not crops:
            raise InputError(f"flip is for crops of photographs; {self.data} is trained without crops")
        if self.shift and (not spec.is_image or self.shift >= min(spec.example_shape[1:])):
            raise InputError(f"shift is {self.shift}; {self.data} has examples of shape {list(spec.example_shape)}")
        if self.shift and crops:
            raise InputError(f"shift is {self.shift}; crops of photographs lie anywhere and are not shifted")
        if self.nll_samples and self.kind != "vae":
            raise InputError(f"nll_samples is {self.nll_samples}, but kind is {self.kind!r}; a vae has a likelihood")
        for name, unused in _OF_THE_KL.items():
            if self.kind != "vae" and getattr(self, name) not in unused:
                raise InputError(f"{name} is {getattr(self, name):g}, but kind is {self.kind!r}; a vae has a KL")
        if train_examples < 2:
            raise InputError(f"the train part has {train_examples} example; expected at least 2")

    def _check_capacity(self) -> None:
        """Raise `InputError` for settings that do not go with a capacity, or without."""
        if not self.capacity:
            if self.gamma is not None:
                raise InputError(f"gamma is {self.gamma:g}, but capacity is 0; it weighs the distance from a capacity")
            return
        if self.kind != "vae":
            raise InputError(f"capacity is {self.capacity:g}, but kind is {self.kind!r}; a vae has a KL")
        for name, unused in _NOT_WITH_CAPACITY.items():
            if getattr(self, name) not in unused:
                raise InputError(
                    f"{name} is {getattr(self, name):g} and capacity {self.capacity:g}; a capacity takes the place of "
                    "beta, free_bits, kl_warmup and patience: pass one or the other"
                )

    def model_config(self, spec: InputSpec) -> ModelConfig:
        """The model of a resolved configuration."""
        from .models import ModelConfig

        assert self.latent is not None, "resolve first"
        assert self.widths is not None
        assert self.depth is not None
        assert self.norm is not None
        assert self.activation is not None
        return ModelConfig(
            self.family, self.kind, spec.example_shape, self.latent, self.widths, self.depth, self.norm,
            self.activation, self.attention,
        )  # fmt: skip

    def to_dict(self) -> dict[str, Any]:
        return strict.to_dict(self)

    @classmethod
    def from_dict(cls, data: Any) -> TrainConfig:
        """The inverse of `to_dict`; raises `InputError` naming the key, the value and the rule."""
        return strict.from_dict(cls, data, "config")


def default_layers(family: str, input_shape: tuple[int, ...]) -> tuple[tuple[int, ...], int]:
    """The widths and depth that `vae-train` uses, see `models.ModelConfig`.

    The lowest resolution of the conv family is at most 8×8; the resnet family's is a quarter of the image's.
    """
    if family == "resnet":
        return _RESNET_WIDTHS, 1
    if family == "mlp" or len(input_shape) != 3:
        return (400,), 0
    halvings = max(1, math.ceil(math.log2(max(input_shape[1:]) / 8)))
    narrow = tuple(min(16 * 2**level, 128) for level in range(halvings))  # where the resolution makes width expensive
    return (*narrow[:-1], max(64, narrow[-1])), 2


def multiple_of(family: str, widths: tuple[int, ...]) -> int:
    """f, by which the height and width of a latent are smaller than the image's; 1 where a latent has none."""
    return 2 ** len(widths) if family == "resnet" else 1


def steps_per_epoch(train_examples: int, batch_size: int) -> int:
    """Batches are never smaller than `batch_size` where there is enough: a batch of one has no BatchNorm."""
    return max(1, train_examples // batch_size)


_CHOICES = {
    "order": ORDERS,
    "resize": RESIZE_MODES,
    "colour": tuple(COLOURS),
    "binarize": BINARIZE_MODES,
    "family": FAMILIES,
    "kind": KINDS,
    "likelihood": LIKELIHOODS,
    "norm": NORMS,
    "activation": ACTIVATIONS,
    "mixed_precision": MIXED_PRECISIONS,
}
_NOT_WITH_CAPACITY: dict[str, tuple[Any, ...]] = {
    "beta": (None, 1.0),
    "free_bits": (0.0,),
    "kl_warmup": (TrainConfig.kl_warmup, 0.0),
    "patience": (0,),
}
_OF_THE_KL: dict[str, tuple[Any, ...]] = {  # and what they are where there is none
    "beta": (None,),
    "free_bits": (0.0,),
    "kl_warmup": (TrainConfig.kl_warmup, 0.0),
}
_RANGES = {
    "shift": (0, 64),
    "latent": (1, MAX_WIDTH),
    "beta": (0, 1e6),
    "free_bits": (0, 1e3),
    "gradient_weight": (0, 1e3),
    "kl_warmup": (0, 1),
    "capacity": (0, 1e6),
    "gamma": (1e-6, 1e9),
    "epochs": (1, 1_000_000),
    "batch_size": (2, 1_000_000),
    "learning_rate": (1e-9, 10),
    "lr_warmup": (0, 1),
    "weight_decay": (0, 10),
    "clip": (1e-6, 1e9),
    "ema": (0, 0.999999),
    "patience": (0, 1_000_000),
    "nll_samples": (0, 1_000_000),
    "seed": (0, 2**63 - 1),
}
