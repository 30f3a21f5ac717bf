"""Errors of other libraries, and of the code of models from elsewhere, and lists of names, for a sentence of ours."""

from __future__ import annotations

import re
import traceback
from collections.abc import Sequence
from pathlib import Path

_SHOWN = 3  # names
_CUDA = re.compile(
    r"not compiled with CUDA|torch\.cuda\.\w+ not available|no NVIDIA driver|No CUDA GPUs|initialize CUDA"
)
_SIZE = re.compile(r"\.size\(\)\[(\d)\]")
_SIDES = {0: "the batch size", 2: "the height", 3: "the width"}


def reason(error: BaseException) -> str:
    """Its type and message in one line; TorchScript has the cause in the last one."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    text = lines[-1] if "TorchScript interpreter" in lines[0] else lines[0]
    if _CUDA.search(str(error)):
        return "its code asks for CUDA, and is run on the CPU here; let it take the device of its weights or its inputs"
    return text if text.startswith(type(error).__name__) else f"{type(error).__name__}: {text}"


def some(names: Sequence[str]) -> str:
    """The first of the names, and how many there are beside them."""
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more


def innermost(error: BaseException) -> BaseException:
    """What the error was raised from in the first place: torch wraps it in pages of advice."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def innermost_reason(error: BaseException) -> str:
    """`reason` of the `innermost` one."""
    return reason(innermost(error))


def tracing_reason(error: BaseException) -> str:
    """The same where torch cannot trace a network: in terms of its code, not of the tracer, where that is known."""
    first = innermost(error)
    text = str(first)
    if any(frame.name == "_detect_is_causal_mask" for frame in traceback.extract_tb(first.__traceback__)):
        return (
            "torch looks into a mask to see whether it is causal, which no graph can; say so with is_causal=True, or of"
            " a decoder with tgt_is_causal=True"
        )
    if "data-dependent" in text.lower():
        return (
            f"its code decides by the values of a tensor{_place(first)}, in an if, a loop or a check, which no graph"
            " can; take that out for the export"
        )
    if "Constraints violated" in text and (sizes := _SIZE.findall(text.splitlines()[0])):
        names = " and ".join(_SIDES.get(int(side), "a size") for side in dict.fromkeys(sizes))
        return (
            f"its code makes a plain number of {names}, as a loop over rows or a function that takes only numbers does;"
            " compute with x.shape as it is"
        )
    return reason(first)


def _place(error: BaseException) -> str:
    """Where in the network's own code, the innermost of its lines: torch's are none of it, nor are ours."""
    places = [(Path(frame.filename), frame.lineno) for frame in traceback.extract_tb(error.__traceback__)]
    own = [place for place in places if not {"torch", Path(__file__).parent.name} & set(place[0].parts)]
    return f" ({own[-1][0].name}, line {own[-1][1]})" if own else ""
