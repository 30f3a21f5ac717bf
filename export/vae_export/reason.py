"""Errors of other libraries, and of the code of models from elsewhere, for a sentence of ours."""

from __future__ import annotations


def reason(error: BaseException) -> str:
    """Its type and message in one line; TorchScript has the cause in the last one."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    text = lines[-1] if "TorchScript interpreter" in lines[0] else lines[0]
    return text if text.startswith(type(error).__name__) else f"{type(error).__name__}: {text}"


def innermost_reason(error: BaseException) -> str:
    """That of what the error was raised from in the first place: torch wraps it in pages of advice."""
    while error.__cause__ is not None:
        error = error.__cause__
    return reason(error)
