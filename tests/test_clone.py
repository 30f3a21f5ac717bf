"""What git does to files whose bytes count, in a clone on any system."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=60, check=True)
    return done.stdout


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="no git checkout")
def test_no_line_ending_of_a_bundle_is_converted() -> None:
    files = git("ls-files", "-z", "--", "*.vae/*", "tests/runtime/literal/*").split("\0")[:-1]
    assert {"tests/data/tiny.vae/manifest.json", "tests/runtime/literal/manifest.json"} <= {*files}
    told = git("check-attr", "-z", "text", "--", *files).split("\0")
    assert dict(zip(told[::3], told[2::3], strict=False)) == dict.fromkeys(files, "unset")
