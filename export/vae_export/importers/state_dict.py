"""A factory's file of weights: finds its dict of tensors, and undoes what wrappers did to their names."""

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from vae_runtime.errors import CheckpointError

from ..quality import ExportWarning, warn
from ..reason import some
from .pickled import describe, read_pickled, weights_of_network
from .safetensors_header import is_safetensors
from .torch_program import sort_of
from .weights import assign, read_safetensors

HOLDERS = ("state_dict", "model_state_dict", "model", "net", "network", "weights", "params", "module", "vae")
COMPILED = "_orig_mod."  # what torch.compile puts before the names of a module's weights
# How the names begin of what training has beside the model, as latent-diffusion's and taming-transformers' has.
FOR_TRAINING = (
    "loss",
    "loss_fn",
    "criterion",
    "perceptual_loss",
    "lpips",
    "discriminator",
    "model_ema",
    "ema_model",
    "ema",
)
AVERAGED = "n_averaged"  # what torch.optim.swa_utils.AveragedModel counts beside the weights
_EXPECTED = "expected weights by name, or the network that has them"


class LeftOutWeightsWarning(ExportWarning):
    """A file has other weights beside those that were loaded, which the message names."""


def load_weights(module: nn.Module, path: Path) -> None:
    """Fill `module` with the weights in a file: .safetensors, or what torch.save wrote of a state_dict, of a checkpoint
    with one, or of a network. Nothing that is pickled in it is run.

    Warns of a `LeftOutWeightsWarning` where it has others beside all that `module` takes.

    Raises:
        CheckpointError: it cannot be read or does not fit; what is wrong is named.
        MissingExtraError: it is a safetensors file and safetensors is not installed.
    """
    try:
        content = read_safetensors(path, "safetensors") if is_safetensors(path) else _read(path)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from None
    names = {name.replace(COMPILED, ""): name for name in module.state_dict()}
    left_out: list[str] = []
    found = _find_tensors(content, names, path, left_out)
    if left_out := [name for name in left_out if name != AVERAGED]:
        warn(
            f"of {path}, {some(left_out)} are left out, for which the network has no place, or other weights; if they"
            " are the model's, save them alone, or load them in the factory",
            LeftOutWeightsWarning,
        )
    assign(module, _renamed(found, lambda name: names.get(name, name)), path)


def holds_tensors(content: Any) -> bool:
    """Whether what was read is a dict of tensors, or has some in it, and is no checkpoint of ours; or is a network."""
    if not isinstance(content, Mapping):
        return weights_of_network(content) is not None
    return "format" not in content and (_state_dict(content) is not None or bool(_holders(content)))


def _read(path: Path) -> Any:
    if (sort := sort_of(path)) is not None:
        raise CheckpointError(f"{path} is a {sort} program; {_EXPECTED}")
    return read_pickled(path)


def _find_tensors(content: Any, wanted: Collection[str], path: Path, left_out: list[str]) -> OrderedDict[str, Tensor]:
    """The tensors in what was read, by the names that the network has: those of itself; or of the network's parts, each
    under its name; or those under a usual key, or the only one. left_out: gets the names of others beside them."""
    if (own := _state_dict(content)) is not None:
        return _without_prefix(own, wanted, left_out)
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{path} holds {describe(content)}; {_EXPECTED}")
    found = _holders(content)
    usual = [key for key in found if key in HOLDERS]
    parts = {name.partition(".")[0] for name in wanted}
    if wanted and parts <= found.keys() and parts.issuperset(usual):
        left_out += [key for key in found if key not in parts]
        return _joined((part, _of_part(part, found[part], wanted, left_out)) for part in sorted(parts))
    chosen = usual or list(found)
    if len(chosen) == 1:
        left_out += [key for key in found if key != chosen[0]]
        return _without_prefix(found[chosen[0]], wanted, left_out)
    if chosen:
        raise CheckpointError(
            f"{path} holds weights under {', '.join(chosen)}; save the network's in a file of its own, or those of its"
            f" parts under {some(sorted(parts))}"
        )
    others = [str(key) for key, value in content.items() if not isinstance(value, Tensor)]
    if 0 < len(others) < len(content):
        raise CheckpointError(f"{path} holds {some(others)} beside tensors; save these alone, as by state_dict()")
    keys = f"its keys are {some(others)}" if others else "it is empty"
    raise CheckpointError(f"{path} holds no tensors under {', '.join(HOLDERS)}; {keys}")


def _of_part(
    part: str, weights: OrderedDict[str, Tensor], wanted: Collection[str], left_out: list[str]
) -> OrderedDict[str, Tensor]:
    """Those of one of the network's parts, which may have had a wrapper of its own."""
    own = [name.removeprefix(f"{part}.") for name in wanted if name.startswith(f"{part}.")]
    return _without_prefix(weights, own, left_out)


def _holders(content: Mapping[Any, Any]) -> dict[str, OrderedDict[str, Tensor]]:
    names = {key: key if key in HOLDERS else key.removesuffix("_state_dict") for key in content if isinstance(key, str)}
    found = {names[key]: _state_dict(content[key]) for key in names}
    return {key: value for key, value in found.items() if value is not None}


def _state_dict(content: Any) -> OrderedDict[str, Tensor] | None:
    """A dict of tensors by name, or that of a network, without what torch.compile did to the names."""
    weights = content if isinstance(content, Mapping) else weights_of_network(content)
    if not weights or not all(isinstance(key, str) and isinstance(value, Tensor) for key, value in weights.items()):
        return None
    return _renamed(weights, lambda name: name.replace(COMPILED, ""))


def _without_prefix(
    weights: OrderedDict[str, Tensor], wanted: Collection[str], left_out: list[str]
) -> OrderedDict[str, Tensor]:
    """The names without what a wrapper put before them, such as "module." of DataParallel and "model." of a
    LightningModule, and with what the network itself, as a wrapper, has before all of its own: those under which all
    are that are wanted, whatever else there is beside them; else, what all have in common and what makes the most of
    them known. What is only for training, as a loss with its own networks, is left out in any case."""
    mine = {name.partition(".")[0] for name in wanted}
    for own in _common_prefixes(wanted):
        names = [name.removeprefix(own) for name in wanted]
        named = not own or all("." in name for name in names)  # of one layer alone, any other has all names
        if named and (prefix := _prefix_of_all(weights, names)) is not None:
            break
    else:
        own = ""
        prefix = max(
            _common_prefixes(weights), key=lambda one: sum(name.removeprefix(one) in wanted for name in weights)
        )

    def rename(name: str) -> str | None:
        stripped = name.removeprefix(prefix)
        part = stripped.partition(".")[0]
        return f"{own}{stripped}" if name.startswith(prefix) and (part in mine or part not in FOR_TRAINING) else None

    left_out += [name for name in weights if rename(name) is None]
    return _renamed(weights, rename)


def _common_prefixes(names: Collection[str]) -> list[str]:
    """What is before all names, of no, one, two, ... parts."""
    columns = zip(*(name.split(".")[:-1] for name in names), strict=False)
    parts = [column[0] for column in itertools.takewhile(lambda column: len(set(column)) == 1, columns)]
    return ["".join(f"{part}." for part in parts[:count]) for count in range(len(parts) + 1)]


def _prefix_of_all(weights: Collection[str], wanted: Collection[str]) -> str | None:
    """The only prefix under which all wanted names are; None where there is none, or are several."""
    first = next(iter(wanted), "")
    prefixes = [name.removesuffix(first) for name in weights if f".{name}".endswith(f".{first}")]
    complete = [prefix for prefix in prefixes if all(prefix + name in weights for name in wanted)]
    if len(complete) > 1:  # beside the model's, those of an average
        complete = [prefix for prefix in complete if prefix.partition(".")[0] not in FOR_TRAINING]
    return complete[0] if len(complete) == 1 else None


def _joined(parts: Iterable[tuple[str, OrderedDict[str, Tensor]]]) -> OrderedDict[str, Tensor]:
    """The weights of several parts of a network, which have the names of these parts before their own."""
    joined: OrderedDict[str, Tensor] = OrderedDict()
    versions: dict[str, Any] = {}
    for part, weights in parts:
        named = _renamed(weights, lambda name, part=part: f"{part}.{name}")  # type: ignore[misc]
        joined |= named
        versions |= getattr(named, "_metadata", None) or {}
    joined._metadata = versions  # type: ignore[attr-defined]
    return joined


def _renamed(weights: Mapping[str, Tensor], rename: Callable[[str], str | None]) -> OrderedDict[str, Tensor]:
    """Weights, and the versions of modules that torch notes beside them, under other names. rename: gets the name of a
    weight, or of a module with a dot behind it; None: it is left out."""
    named = ((rename(name), value) for name, value in weights.items())
    renamed = OrderedDict((name, value) for name, value in named if name is not None)
    versions = getattr(weights, "_metadata", None)
    if isinstance(versions, Mapping):
        modules = ((rename(f"{name}." if name else ""), value) for name, value in versions.items())
        renamed._metadata = {  # type: ignore[attr-defined]
            name.removesuffix("."): value for name, value in modules if name is not None
        }
    return renamed
