"""The bundle format, version 1: what `manifest.json` says and how it is written.

The reader owns the format: export fills these records in, and `Manifest.to_json` is the one place that turns them
into bytes (UTF-8, keys sorted, indent 2, final newline, no NaN). Unknown keys and precisions are ignored, so that the
format can grow; a `format_version` above `FORMAT_VERSION` is refused.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

from .calibration import Calibration
from .errors import BundleError
from .json_fields import MAX_ELEMENTS as MAX_ELEMENTS  # these two are the format's, for whoever writes it
from .json_fields import Shape as Shape
from .json_fields import count, holds, is_count, is_number, mapping, number, one_of, shape_of, text
from .strict_json import is_unaltered, parse_json, to_signed_json

_SMALLEST_SCALE, _LARGEST_SCALE = 2.0**-126, 2.0**127  # of a density: float32's normal numbers

FORMAT = "vae-bundle"
FORMAT_VERSION = 1
MANIFEST_FILE = "manifest.json"
_DIGEST = "manifest_sha256"  # the key of its own digest
GOLDEN_FILE = "golden.npz"
PRIOR_FILE = "prior.npz"

# The names of the tensors at the graphs' boundary, the same in every bundle.
INPUT, MEAN, LOGVAR = "x", "mean", "logvar"
LATENT, RECONSTRUCTION = "z", "reconstruction"
# And of the sides that the graphs leave free: the first, and the last two of images and of latents.
BATCH, IMAGE_SIDES, LATENT_SIDES = "batch", ("height", "width"), ("latent_height", "latent_width")

KINDS = ("vae", "autoencoder")
HALF_NAMES = ("encoder", "decoder")  # in this order everywhere
PRECISIONS = ("fp32", "tf32", "fp16", "int8")  # those that a bundle may state; tf32 runs without that too
RESIZE_MODES = ("exact", "stretch", "crop")
COLOURS = {"grey": 1, "rgb": 3}  # and how many channels each has
COLOUR_OF = {channels: colour for colour, channels in COLOURS.items()}
MAX_MANIFEST_BYTES = 16 * 2**20
BINARIZE_MODES = ("none", "dynamic", "threshold")
FITTED_PRIORS = ("gaussian", "mixture")

_NONE: Mapping[str, Any] = MappingProxyType({})

# Named tuples and not dataclasses: a frozen dataclass takes over a millisecond to make, at every start of a process.


class InputSpec(NamedTuple):
    """What the encoder takes and the decoder gives, for one example.

    type: "image", float32 (C, H, W) in [0, 1], or "vector", float32 (D,) in the data's own units.
    shape: without the batch: (C, H, W) or (D,); (C, None, None) where height and width are free.
    colour: "grey" (C = 1) or "rgb" (C = 3) where picture files can be read; None for vectors and other channel counts.
    resize: how a picture file of another size becomes an input: "exact" refuses it, "stretch" ignores the aspect
        ratio, "crop" scales the shorter side and keeps the centre. None for vectors.
    multiple_of: where height and width are free, each is a multiple of this many pixels, one side of the latent's grid.
    default_size: where they are free, the (H, W) of the golden inputs, and of samples unless another is asked for.
    """

    type: str
    shape: Shape
    colour: str | None = None
    resize: str | None = None
    multiple_of: int = 1
    default_size: tuple[int, int] | None = None

    @property
    def is_image(self) -> bool:
        return self.type == "image"

    @property
    def is_free(self) -> bool:
        """Whether height and width are free."""
        return None in self.shape

    @property
    def example_shape(self) -> tuple[int, ...]:
        """A shape without free sides: the one there is, or that of `default_size`."""
        free = iter(self.default_size or ())
        return tuple(next(free) if side is None else side for side in self.shape)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> InputSpec:
        kind = one_of(data, "input.type", ("image", "vector"))
        shape = shape_of(data, "input.shape", 3 if kind == "image" else 1)
        if kind == "vector":
            return cls(kind, shape)
        multiple, size = _free_sides(data) if None in shape else (1, None)
        resize = one_of(data, "input.resize", RESIZE_MODES) if "resize" in data else "exact"
        if None in shape and resize != "exact":
            raise BundleError(f"input.resize is {resize!r}; pictures keep their size where input.shape leaves it free")
        colour = one_of(data, "input.colour", tuple(COLOURS)) if data.get("colour") is not None else None
        if colour is not None and COLOURS[colour] != shape[0]:
            raise BundleError(
                f"input.colour is {colour!r}, which has {COLOURS[colour]} channels, but input.shape is {list(shape)}"
            )
        return cls(kind, shape, colour, resize, multiple, size)

    def to_dict(self) -> dict[str, Any]:
        data: dict[str, Any] = {"type": self.type, "shape": list(self.shape)}
        if self.default_size is not None:
            data |= {"multiple_of": self.multiple_of, "default_size": list(self.default_size)}
        if self.colour is not None:
            data["colour"] = self.colour
        if self.resize is not None:
            data["resize"] = self.resize
        return data


class ActiveUnits(NamedTuple):
    """How much of the latent space the encoder uses (Burda et al., 2016, arXiv:1509.00519, appendix C).

    variances: of the posterior's mean over the examples, of each unit: the latent's elements, flattened; of a latent
        (C, h, w) its channels, over all positions too.
    threshold: a unit is active where its variance is above. examples: how many it was measured on.
    """

    variances: tuple[float, ...]
    threshold: float
    examples: int

    @property
    def active(self) -> int:
        """How many are active."""
        return sum(variance > self.threshold for variance in self.variances)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> ActiveUnits:
        path = "latent.active_units"
        variances = data.get("variances")
        if not isinstance(variances, list) or not variances or not all(is_number(v) and v >= 0 for v in variances):
            raise BundleError(f"{path}.variances is {variances!r}; expected a list of finite numbers from 0")
        examples = count(data, f"{path}.examples")
        return cls(tuple(map(float, variances)), number(data, f"{path}.threshold"), examples)

    def to_dict(self) -> dict[str, Any]:
        data = {"count": self.active, "examples": self.examples, "threshold": self.threshold}
        return {**data, "variances": list(self.variances)}


class FittedPrior(NamedTuple):
    """A density over latents fitted after training (ex-post density estimation: Ghosh et al., 2020, arXiv:1903.12436).

    type: "gaussian", or "mixture" of so many `components`, each with its full covariance.
    file: an .npz of plain float64 numbers, see `vae_runtime.prior`. examples: how many it was fitted to.
    """

    type: str
    components: int
    file: str
    examples: int

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> FittedPrior:
        path = "latent.fitted_prior"
        kind = one_of(data, f"{path}.type", FITTED_PRIORS)
        components, examples = count(data, f"{path}.components"), count(data, f"{path}.examples")
        return cls(kind, components, _file_name(data, f"{path}.file"), examples)

    def to_dict(self) -> dict[str, Any]:
        return dict(self._asdict())


class LatentSpec(NamedTuple):
    """shape: of one latent, without the batch; (C, None, None) where the input's height and width are free, and the
    latent's are these divided by its `multiple_of`. prior: None for a plain autoencoder, which has no distribution.
    active_units: None where it was not measured. fitted_prior: what `VAE.sample(prior="fitted")` draws from; None where
    there is none."""

    shape: Shape
    prior: Mapping[str, Any] | None
    active_units: ActiveUnits | None = None
    fitted_prior: FittedPrior | None = None

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], kind: str) -> LatentSpec:
        shape = shape_of(data, "latent.shape", None)
        prior = data.get("prior")
        if kind == "vae" and (not isinstance(prior, Mapping) or prior.get("type") != "standard_normal"):
            raise BundleError(f"latent.prior is {prior!r}; a vae has {{'type': 'standard_normal'}}")
        if kind == "autoencoder" and prior is not None:
            raise BundleError(f"latent.prior is {prior!r}; an autoencoder has null")
        units, fitted = (
            mapping(data, f"latent.{key}") if key in data else None for key in ("active_units", "fitted_prior")
        )
        if fitted is not None and None in shape:
            raise BundleError(f"latent.fitted_prior is there with latent.shape {list(shape)}; it is of one shape only")
        return cls(
            shape,
            dict(prior) if prior is not None else None,
            ActiveUnits.from_dict(units) if units is not None else None,
            FittedPrior.from_dict(fitted) if fitted is not None else None,
        )

    def to_dict(self) -> dict[str, Any]:
        data: dict[str, Any] = {
            "shape": list(self.shape),
            "prior": dict(self.prior) if self.prior is not None else None,
        }
        if self.active_units is not None:
            data["active_units"] = self.active_units.to_dict()
        if self.fitted_prior is not None:
            data["fitted_prior"] = self.fitted_prior.to_dict()
        return data


class Likelihood(NamedTuple):
    """p(x|z), whose mean the decoder gives.

    type: "bernoulli", "gaussian" or "laplace".
    scale: the Gaussian's one standard deviation, or the Laplace density's b, in the data's units.
    binarize: how the Bernoulli's data became binary in training: "none" (grey values taken as probabilities),
        "dynamic" (drawn anew each time), or "threshold" (x >= 0.5, done inside the encoder graph).
    """

    type: str
    scale: float | None = None
    binarize: str | None = None

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Likelihood:
        kind = one_of(data, "likelihood.type", ("bernoulli", "gaussian", "laplace"))
        if kind == "bernoulli":
            return cls(
                kind, binarize=one_of(data, "likelihood.binarize", BINARIZE_MODES) if "binarize" in data else "none"
            )
        scale = number(data, "likelihood.scale")
        if not _SMALLEST_SCALE <= scale <= _LARGEST_SCALE:
            raise BundleError(f"likelihood.scale is {scale}; the scale of a density is above 0 and within float32")
        return cls(kind, scale=scale)

    def to_dict(self) -> dict[str, Any]:
        if self.type == "bernoulli":
            return {"type": self.type, "binarize": self.binarize or "none"}
        return {"type": self.type, "scale": self.scale}


class Precision(NamedTuple):
    """The two graphs of one precision and what was measured of them when the bundle was made.

    encoder, decoder: file names; fp32's where a half gained nothing from this precision.
    fidelity: how far the outputs were from the reference.
    quality: what the precision costs on real examples against fp32, see runtime/FORMAT.md; empty for fp32 itself.
    """

    encoder: str
    decoder: str
    fidelity: Mapping[str, Any] = _NONE
    quality: Mapping[str, Any] = _NONE

    @property
    def within_budget(self) -> bool:
        """False only where the loss was measured and is above the bundle's budget."""
        return bool(self.quality.get("within_budget", True))

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], name: str) -> Precision:
        fidelity = mapping(data, f"precisions.{name}.fidelity") if "fidelity" in data else {}
        quality = _quality(data, f"precisions.{name}.quality")
        if name == "fp32" and not quality.get("within_budget", True):
            raise BundleError("precisions.fp32.quality.within_budget is false; fp32 is the reference of the budget")
        encoder, decoder = (_file_name(data, f"precisions.{name}.{half}") for half in HALF_NAMES)
        return cls(encoder, decoder, dict(fidelity), quality)

    def to_dict(self) -> dict[str, Any]:
        data: dict[str, Any] = {"encoder": self.encoder, "decoder": self.decoder, "fidelity": dict(self.fidelity)}
        if self.quality:
            data["quality"] = dict(self.quality)
        return data


class FileEntry(NamedTuple):
    """Size in bytes and SHA-256, in hexadecimal, of one file of the bundle."""

    bytes: int
    sha256: str

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], name: str) -> FileEntry:
        size, digest = data.get("bytes"), data.get("sha256")
        if not is_count(size):
            raise BundleError(f"files.{name}.bytes is {size!r}; expected a whole number")
        if not isinstance(digest, str) or len(digest) != 64 or set(digest) - set("0123456789abcdef"):
            raise BundleError(f"files.{name}.sha256 is {digest!r}; expected 64 hexadecimal digits")
        return cls(size, digest)

    def to_dict(self) -> dict[str, Any]:
        return {"bytes": self.bytes, "sha256": self.sha256}


class Golden(NamedTuple):
    """Inputs with the reference's outputs, for `VAE.selftest`.

    source: "held-out" (real inputs the model was not trained on), "examples" or "synthetic".
    tolerance: per precision, relative to the data's range for reconstructions, to max|reference| for mean and logvar.
    """

    file: str
    source: str
    tolerance: Mapping[str, float]

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Golden:
        given = mapping(data, "golden.tolerance")
        tolerance = {key: number(given, f"golden.tolerance.{key}", key) for key in given}
        for key, value in tolerance.items():
            if not value > 0:
                raise BundleError(f"golden.tolerance.{key} is {value}; a tolerance is above 0")
        source = text(data, "golden.source")
        return cls(_file_name(data, "golden.file"), source, tolerance)

    def to_dict(self) -> dict[str, Any]:
        return {"file": self.file, "source": self.source, "tolerance": dict(self.tolerance)}


class HalfTiling(NamedTuple):
    """How far one half looks, and so how a large image can be computed window by window (`vae_runtime.tiling`).

    receptive_field: positions of that half's input (pixels to encode, cells of the latent grid to decode) that one
        output position depends on, along the longer side; None: all.
    context: cells of the latent grid, for both halves, that a window has around what is taken from it, so that the
        result is exact; None: windows are blended, and the result is an approximation.
    max_error: max|Δ| between tiled and untiled that the export measured, relative to max|reference| for latents, to
        [0, 1] for images. tile: the side of its windows, in pixels.
    reason: why there is no context; mostly the operator that looks at all positions.
    """

    receptive_field: int | None
    context: int | None
    max_error: float
    tile: int
    reason: str | None = None

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], half: str) -> HalfTiling:
        counts: dict[str, int | None] = {}
        for key in ("receptive_field", "context"):
            value = counts[key] = data.get(key)
            if value is not None and (not is_count(value) or value >= MAX_ELEMENTS):
                raise BundleError(f"tiling.{half}.{key} is {value!r}; expected a whole number or null")
        error, reason = number(data, f"tiling.{half}.max_error"), data.get("reason")
        if error < 0:
            raise BundleError(f"tiling.{half}.max_error is {error}; an error is 0 or more")
        tile = count(data, f"tiling.{half}.tile")
        if reason is not None and not isinstance(reason, str):
            raise BundleError(f"tiling.{half}.reason is {reason!r}; expected a string")
        return cls(counts["receptive_field"], counts["context"], error, tile, reason)

    def to_dict(self) -> dict[str, Any]:
        data: dict[str, Any] = {"receptive_field": self.receptive_field, "context": self.context}
        data |= {"max_error": self.max_error, "tile": self.tile}
        if self.reason is not None:
            data["reason"] = self.reason
        return data


class Tiling(NamedTuple):
    """Both halves of a bundle with free height and width."""

    encoder: HalfTiling
    decoder: HalfTiling

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Tiling:
        encoder, decoder = (HalfTiling.from_dict(mapping(data, f"tiling.{half}"), half) for half in HALF_NAMES)
        return cls(encoder, decoder)

    def to_dict(self) -> dict[str, Any]:
        return {"encoder": self.encoder.to_dict(), "decoder": self.decoder.to_dict()}


class Manifest(NamedTuple):
    """Everything `manifest.json` says about a bundle; the fields carry the format's own names.

    budget: how much worse than fp32 a precision may be on real examples: `psnr_db` of the reconstruction, and
        `nats_per_dimension`, -ELBO per input dimension. None where the bundle states none.
    refused: precisions that were asked for at export and are not there, by name: the `reason`, and the `quality` that
        was measured, as in `Precision`.
    origin: of a model from elsewhere, what it was: `library`, its `version`, `class`, ...
    tiling: where height and width are free, how large images are computed in parts; None where that is not stated.
    latent_codecs: by codec, what it costs: `bits_per_pixel`, and the reconstruction's `psnr_db` and `psnr_lost_db` on
        so many `examples`.
    calibration: how high anomaly scores are on data as they should be; None where they were not calibrated.
    on_cuda: files of graphs, and those that onnxruntime's CUDA provider runs in their place: the same computation in
        operators that are faster there.
    """

    kind: str
    name: str
    input: InputSpec
    latent: LatentSpec
    precisions: Mapping[str, Precision]
    files: Mapping[str, FileEntry]
    golden: Golden
    likelihood: Likelihood | None = None
    training: Mapping[str, Any] = _NONE
    producer: Mapping[str, str] = _NONE
    format_version: int = FORMAT_VERSION
    budget: Mapping[str, float] | None = None
    refused: Mapping[str, Mapping[str, Any]] = _NONE
    origin: Mapping[str, Any] = _NONE
    tiling: Tiling | None = None
    latent_codecs: Mapping[str, Mapping[str, float]] = _NONE
    calibration: Calibration | None = None
    on_cuda: Mapping[str, str] = _NONE

    def latent_shape(self, input_shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of the latent of one input, both without the batch."""
        sides = iter(side // self.input.multiple_of for side in input_shape[1:])
        return tuple(next(sides) if side is None else side for side in self.latent.shape)

    @classmethod
    def from_json(cls, text: bytes) -> Manifest:
        """Parse and check the bytes of `manifest.json`.

        Raises:
            BundleError: names the key, its value and the rule.
        """
        if len(text) > MAX_MANIFEST_BYTES:
            raise BundleError(f"{MANIFEST_FILE} has over {MAX_MANIFEST_BYTES} bytes, more than any manifest")
        try:
            data = parse_json(text)
        except (ValueError, RecursionError) as error:
            raise BundleError(f"{MANIFEST_FILE} is not valid JSON: {error}") from None
        if not isinstance(data, dict) or data.get("format") != FORMAT:
            found = data.get("format") if isinstance(data, dict) else data
            raise BundleError(f"{MANIFEST_FILE} has format {found!r}; expected {FORMAT!r}")
        version = data.get("format_version")
        if not isinstance(version, int) or isinstance(version, bool) or version < 1:
            raise BundleError(f"{MANIFEST_FILE} has format_version {version!r}; expected a whole number from 1")
        if version > FORMAT_VERSION:
            rule = f"this reader knows versions up to {FORMAT_VERSION}: update vae-edge"
            raise BundleError(f"{MANIFEST_FILE} has format_version {version}; {rule}")
        if not is_unaltered(text, _DIGEST, data.get(_DIGEST)):
            raise BundleError(
                f"{MANIFEST_FILE} was altered after it was written: its {_DIGEST} does not match its contents"
            )
        return cls._from_dict(data, version)

    @classmethod
    def _from_dict(cls, data: Mapping[str, Any], version: int) -> Manifest:
        kind = one_of(data, "kind", KINDS)
        name = data.get("name")
        if not isinstance(name, str) or not name:
            raise BundleError(f"name is {name!r}; expected a string that is not empty")
        precisions = mapping(data, "precisions")
        files = mapping(data, "files")
        refused = mapping(data, "refused") if "refused" in data else {}
        codecs = mapping(data, "latent_codecs") if "latent_codecs" in data else {}
        manifest = cls(
            kind=kind,
            name=name,
            input=InputSpec.from_dict(mapping(data, "input")),
            latent=LatentSpec.from_dict(mapping(data, "latent"), kind),
            precisions={
                key: Precision.from_dict(mapping(precisions, f"precisions.{key}", key), key)
                for key in precisions
                if key in PRECISIONS
            },
            files={key: FileEntry.from_dict(mapping(files, f"files.{key}", key), key) for key in files},
            golden=Golden.from_dict(mapping(data, "golden")),
            likelihood=Likelihood.from_dict(mapping(data, "likelihood"))
            if data.get("likelihood") is not None
            else None,
            training=dict(mapping(data, "training")) if "training" in data else {},
            producer=dict(mapping(data, "producer")) if "producer" in data else {},
            format_version=version,
            budget=_budget(mapping(data, "budget")) if "budget" in data else None,
            refused={key: _refusal(mapping(refused, f"refused.{key}", key), key) for key in refused},
            origin=dict(mapping(data, "origin")) if "origin" in data else {},
            tiling=Tiling.from_dict(mapping(data, "tiling")) if "tiling" in data else None,
            latent_codecs={key: _codec_cost(mapping(codecs, f"latent_codecs.{key}", key), key) for key in codecs},
            calibration=Calibration.from_dict(mapping(data, "calibration")) if "calibration" in data else None,
            on_cuda=_on_cuda(mapping(data, "on_cuda")) if "on_cuda" in data else {},
        )
        manifest._check_references()
        if manifest.input.is_free != (None in manifest.latent.shape):
            raise BundleError(
                f"latent.shape is {list(manifest.latent.shape)} with input.shape {list(manifest.input.shape)};"
                " height and width are free in both or in neither"
            )
        return manifest

    def _check_references(self) -> None:
        """Every file that is named is listed, and the fp32 reference is there."""
        if "fp32" not in self.precisions:
            raise BundleError(f"precisions has {sorted(self.precisions)}; 'fp32', the reference, must be among them")
        named = {self.golden.file: "golden.file"}
        if self.latent.fitted_prior is not None:
            named[self.latent.fitted_prior.file] = "latent.fitted_prior.file"
        for key, precision in self.precisions.items():
            named[precision.encoder] = f"precisions.{key}.encoder"
            named[precision.decoder] = f"precisions.{key}.decoder"
        for file, other in self.on_cuda.items():
            named.setdefault(file, "a key of on_cuda")
            named.setdefault(other, f"on_cuda.{file}")
        for file, place in named.items():
            if file not in self.files:
                raise BundleError(f"{place} is {file!r}, which files does not list")
        for file in self.files:
            if not _is_plain_name(file):
                raise BundleError(f"files has {file!r}; a bundle's files lie in its folder and have plain names")

    def to_dict(self) -> dict[str, Any]:
        """The keys of `manifest.json`, without its digest; those that may be absent are left out where empty."""
        data: dict[str, Any] = {
            "format": FORMAT,
            "format_version": self.format_version,
            "kind": self.kind,
            "name": self.name,
            "input": self.input.to_dict(),
            "latent": self.latent.to_dict(),
            "likelihood": self.likelihood.to_dict() if self.likelihood is not None else None,
            "precisions": {key: precision.to_dict() for key, precision in self.precisions.items()},
            "files": {key: entry.to_dict() for key, entry in self.files.items()},
            "golden": self.golden.to_dict(),
            "training": dict(self.training),
            "producer": dict(self.producer),
        }
        if self.budget is not None:
            data["budget"] = dict(self.budget)
        if self.refused:
            data["refused"] = {key: dict(refusal) for key, refusal in self.refused.items()}
        if self.origin:
            data["origin"] = dict(self.origin)
        if self.tiling is not None:
            data["tiling"] = self.tiling.to_dict()
        if self.latent_codecs:
            data["latent_codecs"] = {key: dict(cost) for key, cost in self.latent_codecs.items()}
        if self.calibration is not None:
            data["calibration"] = self.calibration.to_dict()
        if self.on_cuda:
            data["on_cuda"] = dict(self.on_cuda)
        return data

    def to_json(self) -> bytes:
        """The exact bytes of `manifest.json`, with its own digest in them, see `strict_json`."""
        return to_signed_json(self.to_dict(), _DIGEST)


def _budget(data: Mapping[str, Any]) -> dict[str, float]:
    budget = {key: number(data, f"budget.{key}") for key in ("psnr_db", "nats_per_dimension")}
    for key, value in budget.items():
        if value < 0:
            raise BundleError(f"budget.{key} is {value}; a budget is 0 or more")
    return budget


def _refusal(data: Mapping[str, Any], name: str) -> dict[str, Any]:
    return {"reason": text(data, f"refused.{name}.reason"), "quality": _quality(data, f"refused.{name}.quality")}


def _on_cuda(data: Mapping[str, Any]) -> dict[str, str]:
    for file, other in data.items():
        if not isinstance(other, str):
            raise BundleError(f"on_cuda.{file} is {other!r}; expected the name of a file")
    return dict(data)


def _codec_cost(data: Mapping[str, Any], name: str) -> dict[str, float]:
    keys = ("bits_per_pixel", "examples", "psnr_db", "psnr_lost_db")
    return {key: number(data, f"latent_codecs.{name}.{key}", key) for key in keys}


_FIGURES = (
    "psnr_db", "fp32_psnr_db", "psnr_lost_db", "mean_relative_error", "logvar_relative_error",
    "negative_elbo_per_dimension", "fp32_negative_elbo_per_dimension", "nats_lost_per_dimension",
)  # fmt: skip
# Each may be absent. A figure is null where it is not defined, and where a refused precision's was not finite.
_QUALITY: Mapping[str, tuple[Callable[[Any], bool], str]] = {
    "within_budget": (lambda value: isinstance(value, bool), "true or false"),
    **dict.fromkeys(("examples", "calibration_examples"), (is_count, "a whole number")),
    **dict.fromkeys(_FIGURES, (lambda value: value is None or is_number(value), "a finite number or null")),
    "calibration": (lambda value: holds(value, str), "an object of strings"),
    "kept_fp32": (lambda value: holds(value, list), "an object of lists"),
}


def _quality(data: Mapping[str, Any], path: str) -> dict[str, Any]:
    quality = dict(mapping(data, path)) if "quality" in data else {}
    for key, (fits, rule) in _QUALITY.items():
        if key in quality and not fits(quality[key]):
            raise BundleError(f"{path}.{key} is {quality[key]!r}; expected {rule}")
    return quality


def _free_sides(data: Mapping[str, Any]) -> tuple[int, tuple[int, int]]:
    multiple, size = data.get("multiple_of"), data.get("default_size")
    if not is_count(multiple) or multiple < 1:
        raise BundleError(f"input.multiple_of is {multiple!r}; where height and width are free, a whole number from 1")
    if (
        not isinstance(size, list)
        or len(size) != 2
        or not all(is_count(n) and n > 0 and n % multiple == 0 for n in size)
    ):
        raise BundleError(f"input.default_size is {size!r}; expected [height, width], multiples of {multiple}")
    if math.prod(size) >= MAX_ELEMENTS:
        raise BundleError(f"input.default_size is {size!r}; at most {MAX_ELEMENTS - 1} pixels are allowed")
    return multiple, (size[0], size[1])


def _is_plain_name(name: str) -> bool:
    return bool(name) and name not in (".", "..", MANIFEST_FILE) and not set(name) & set("/\\:\0")


def _file_name(data: Mapping[str, Any], path: str) -> str:
    value = data.get(path.rsplit(".", 1)[-1])
    if not isinstance(value, str) or not _is_plain_name(value):
        raise BundleError(f"{path} is {value!r}; expected the plain name of a file in the bundle's folder")
    return value
