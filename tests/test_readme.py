"""Every code block of the README, and then of the folders' own, runs, in order, in one folder, save those that a marker
names with the reason; the bundle format is the one that is written; every link between the Markdown files leads
somewhere."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
FORMAT = ROOT / "runtime" / "FORMAT.md"
FOLDERS = ("training", "export", "runtime", "benchmarks")
READMES = [README, *(ROOT / folder / "README.md" for folder in FOLDERS)]
PAGES = [README, *(page for folder in FOLDERS for page in sorted((ROOT / folder).rglob("*.md")))]
MARKER = r"(?:<!-- not run: (?P<reason>[^>]+) -->\n)?"
BLOCK = re.compile(MARKER + r"```(?P<language>bash|python)\n(?P<code>.*?)```", re.DOTALL)
OF_TORCH = re.compile(r"^(vae-(?:train|export) .*[^\\\n])$", re.MULTILINE)  # a command that imports torch
FEWEST_BLOCKS_RUN = 4
SHORTER = {  # the same commands, where they would only go on with what they have shown to work
    "vae-train --data digits --output": "vae-train --epochs 2 --data digits --output",
    "vae-train --data digits --family": "vae-train --epochs 4 --data digits --family",
    "--seconds 0.5": "--seconds 0.1 --rounds 3",
    "vae-run tune digits.vae --seconds 10": "vae-run tune digits.vae --seconds 1",
    "--crop 32 --epochs 3": "--crop 32 --epochs 1 --depth 0",
}


def blocks() -> list[tuple[str | None, str, str]]:
    found = (match for page in READMES for match in BLOCK.finditer(page.read_text("utf-8")))
    return [(match["reason"], match["language"], match["code"]) for match in found]


def shortened(code: str) -> str:
    for long, short in SHORTER.items():
        code = code.replace(long, short)
    return code


def test_every_fenced_block_has_a_language_that_this_test_knows() -> None:
    opened = [word for page in READMES for word in re.findall(r"^```(\w*)$", page.read_text("utf-8"), re.MULTILINE)]
    assert set(opened[::2]) <= {"bash", "python", "text", "json"}
    assert opened[::2].count("bash") + opened[::2].count("python") == len(blocks())


def test_the_examples_are_as_short_as_promised() -> None:
    python = [code for _, language, code in blocks() if language == "python"]
    (embedding,) = (code for code in python if "vae.encode(images)  # mean, logvar, std" in code)
    (bare,) = (code for code in python if "vae_runtime" not in code and "onnxruntime" in code)
    assert len(embedding.strip().splitlines()) < 15
    assert len([line for line in bare.strip().splitlines() if line and not line.startswith("import")]) < 10


def test_the_readme_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a user does, but what would import torch anew for seconds in this process."""
    pytest.importorskip("torch")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))  # where `vae-run tune` leaves what it found
    run = [(language, code) for reason, language, code in blocks() if reason is None]
    assert len(run) >= FEWEST_BLOCKS_RUN
    assert [sum(code.count(long) for _, code in run) for long in SHORTER] == [1] * len(SHORTER)
    for program in ("vae-train", "vae-export"):
        run_program(program, "--version")
    for language, code in run:
        code = shortened(code)
        if language == "python" and "import torch" in code:
            exec(compile(code, "README.md", "exec"), {"__name__": "__main__"})
        elif language == "python":
            run_program(sys.executable, "-c", code)
        else:
            for part in OF_TORCH.split(code):
                if OF_TORCH.fullmatch(part):
                    run_here(part)
                elif part.strip():
                    run_program("bash", "-euo", "pipefail", "-c", part)
    assert (tmp_path / "samples.png").stat().st_size > 1000


def run_program(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{command[-1]}\n{done.stdout}\n{done.stderr}"


def run_here(line: str) -> None:
    """A command of one line, as its program runs it."""
    from vae_export.cli import main as vae_export
    from vae_training.cli import main as vae_train

    program, *arguments = shlex.split(line, comments=True)
    done = CliRunner().invoke({"vae-export": vae_export, "vae-train": vae_train}[program], arguments)
    assert done.exit_code == 0, f"{line}\n{done.output}\n{done.exception!r}"


def test_the_manifest_keys_of_the_format_are_those_that_are_written() -> None:
    from vae_runtime.bundle import Bundle
    from vae_runtime.manifest import FORMAT_VERSION

    text = FORMAT.read_text("utf-8")
    assert text.startswith(f"# The bundle format, version {FORMAT_VERSION}\n")
    table = text.split("| key of the manifest | meaning |")[1].split("\n\n")[0]
    named = {name for row in table.splitlines()[2:] for name in re.findall(r"`(\w+)`", row.split("|")[1])}
    tiny = Bundle.open(ROOT / "tests" / "data" / "tiny.vae")
    # since the tiny bundle was made
    added = {"budget", "refused", "origin", "tiling", "latent_codecs", "calibration", "on_cuda"}
    assert named == {*tiny.manifest.to_dict(), *added, "manifest_sha256"}


def anchors(page: Path) -> set[str]:
    """What the headings of a page are called in a link, as GitHub has it; none of ours occurs twice on a page."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```", "", page.read_text("utf-8"), flags=re.M | re.S), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_every_link_leads_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text("utf-8")):
        path, _, anchor = link.partition("#")
        assert "://" not in link, f"{link}: only files of this repository are linked"
        target = (page.parent / path) if path else page
        assert target.is_file(), link
        assert not anchor or anchor in anchors(target), link
