"""Warnings name the line of whoever called the library."""

from __future__ import annotations

from types import ModuleType
from typing import Any

from vae_runtime.warning_level import level_outside


def module(name: str, source: str, **names: Any) -> ModuleType:
    made = ModuleType(name)
    made.__dict__.update(names)
    exec(source, made.__dict__)
    return made


def test_frames_of_the_packages_are_passed_over() -> None:
    inner = module("lent.inner", "def ask(*packages): return level(*packages)", level=level_outside)
    outer = module("library.outer", "def call(*packages): return ask(*packages)", ask=inner.ask)
    assert inner.ask("lent") == 2
    assert outer.call("lent") == 2  # the library is a caller like any other
    assert outer.call("lent", "library") == 3
    assert outer.call("library") == 1  # who asks is outside
    assert outer.call("len") == 1  # a package's name, not its beginning


def test_the_outermost_frame_is_taken_where_there_is_no_other(python: Any) -> None:
    code = "from vae_runtime.warning_level import level_outside\nprint(level_outside('__main__'))"
    assert python(code).stdout == "1\n"
