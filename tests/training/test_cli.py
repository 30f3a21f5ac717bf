import json
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from vae_training.checkpoint import load_checkpoint
from vae_training.cli import main
from vae_training.loop import Run

from .conftest import Parent

FAST = (
    "--data",
    "digits",
    "--split",
    "200,50,50",
    "--family",
    "mlp",
    "--widths",
    "16",
    "--latent",
    "3",
    "--device",
    "cpu",
)


def vae_train(*args: object) -> int:
    """Run the command in this process and return its exit code."""
    try:
        main([str(arg) for arg in args], prog_name="vae-train")
    except SystemExit as error:
        return int(error.code or 0)
    return 0


def test_end_to_end_on_digits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "digits"
    arguments = ("--data", "digits", "--output", out, "--epochs", 2, "--widths", "8,16", "--depth", 1, "--seed", 3)
    assert vae_train(*arguments, "--threads", 1) == 0
    captured = capsys.readouterr()
    assert "test part, 180 examples: -ELBO" in captured.out
    assert "test part, -log p(x) by 100 importance samples for each example: " in captured.out
    assert "step/s" in captured.err
    assert {path.name for path in out.iterdir()} == {
        "model.pt", "metrics.json", "run.json", "reconstructions.png", "samples.png",
    }  # fmt: skip
    checkpoint = load_checkpoint(out / "model.pt")
    assert (checkpoint.config.widths, checkpoint.config.latent_dim) == ((8, 16), 20)
    assert json.loads((out / "metrics.json").read_text())["config"]["seed"] == 3


def test_json_is_one_document_and_nothing_else(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert vae_train(*FAST, "--output", tmp_path / "run", "--epochs", 1, "--json") == 0
    captured = capfd.readouterr()
    metrics = json.loads(captured.out)
    assert list(metrics) == sorted(metrics)  # as every command prints JSON
    assert metrics == json.loads((tmp_path / "run/metrics.json").read_text())
    assert metrics["test"]["examples"] == 50


def test_an_autoencoder_reports_psnr(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert vae_train(*FAST, "--kind", "autoencoder", "--output", tmp_path / "run", "--epochs", 1) == 0
    out = capsys.readouterr().out
    assert "PSNR" in out
    assert "ELBO" not in out
    assert "log p(x)" not in out


def test_a_folder_of_pictures_with_its_options(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from PIL import Image

    rng = np.random.default_rng(0)
    (tmp_path / "in").mkdir()
    for index in range(12):
        Image.fromarray(rng.integers(0, 256, (20, 30, 3), dtype=np.uint8)).save(tmp_path / f"in/{index}.png")
    options = ("--size", "9x12", "--resize", "crop", "--colour", "rgb", "--epochs", 1, "--widths", "4", "--depth", 1)
    assert vae_train("--data", tmp_path / "in", "--output", tmp_path / "run", *options) == 0
    checkpoint = load_checkpoint(tmp_path / "run/model.pt")
    assert checkpoint.input.to_dict() == {"type": "image", "shape": [3, 9, 12], "colour": "rgb", "resize": "crop"}
    assert checkpoint.likelihood.type == "gaussian"
    said = capsys.readouterr().out
    assert "; the weights of epoch 1, the best on the validation part\n" in said
    assert re.search(r"test part, 1 example: -ELBO -?[\d.]+ nats = ", said)  # one tells no standard error


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--data", "nowhere.npy"), "nowhere.npy does not exist; expected 'digits', a folder, or an .npy or .npz file"),
        (("--data", "digits", "--split", "0.5,0.5"), "split is '0.5,0.5'; expected three counts"),
        (("--data", "digits", "--beta", "-1"), "beta is -1.0; expected from 0 to"),
        (("--data", "digits", "--latent", "0"), "latent is 0; expected from 1 to 65536"),
        (("--data", "digits", "--device", "tpu"), "device is 'tpu'; expected auto, cpu, cuda, cuda:N or mps"),
        (
            ("--data", "digits", "--exclude-label", "3", "--exclude-label", "11"),
            "exclude_label is 11; the labels are 0,",
        ),
        (("--data", "digits", "--size", "8x8"), "size and colour are for folders of pictures"),
    ],
)
def test_expected_failures_are_one_sentence_and_exit_1(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], message: str
) -> None:
    assert vae_train(*arguments, "--output", tmp_path / "run") == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith(f"Error: {message}")
    assert captured.err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "arguments",
    [
        ("--output", "run"),
        ("--data", "digits"),
        ("--data", "digits", "--output", "run", "--epochs", "many"),
        ("--data", "digits", "--output", "run", "--size", "big"),
        ("--data", "digits", "--output", "run", "--family", "transformer"),
        ("--data", "digits", "--output", "run", "--frobnicate"),
        ("--data", "digits", "--output", "run", "--resume", "--force"),
    ],
)
def test_wrong_usage_exits_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert vae_train(*arguments) == 2
    assert "Usage: vae-train" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_an_output_that_exists_needs_resume_or_force(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    assert vae_train(*FAST, "--output", run, "--epochs", 1) == 0
    before = (run / "metrics.json").read_text()
    assert vae_train(*FAST, "--output", run, "--epochs", 1) == 1
    assert "has a training run in it; pass --resume to continue it or --force to begin anew" in capsys.readouterr().err
    # --resume takes the settings that the run was begun with, and refuses others.
    assert vae_train("--output", run, "--resume") == 0
    assert (run / "metrics.json").read_text() == before
    assert vae_train("--output", run, "--resume", "--epochs", 5) == 1
    assert "was begun with epochs 1, not 5" in capsys.readouterr().err
    assert vae_train(*FAST, "--output", run, "--epochs", 2, "--force") == 0
    assert json.loads((run / "metrics.json").read_text())["training"]["epochs"] == 2


# Nothing of what is named first can be imported; the help is shown; then each is there again once it has been missed.
WITHOUT = """
import sys
missing = sys.argv.pop(1).split(",")
sys.modules.update(dict.fromkeys(missing))
from vae_training.cli import main

def code(*arguments):
    try:
        main(list(arguments))
    except SystemExit as error:
        return error.code or 0
    return 0

assert code("--help") == 0
for module in missing:
    assert code(*sys.argv[1:]) == 1, module
    del sys.modules[module]
"""


@pytest.mark.parametrize(
    ("modules", "names"),
    [("torch", ["torch"]), ("accelerate,tqdm,sklearn", ["accelerate", "tqdm", "scikit-learn"])],
)
def test_help_needs_no_extra_and_training_names_it(tmp_path: Path, modules: str, names: list[str]) -> None:
    run = ["--data", "digits", "--output", str(tmp_path / "run"), "--epochs", "1"]
    command = [sys.executable, "-c", WITHOUT, modules, *run]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "--learning-rate" in done.stdout
    for name, line in zip(names, done.stderr.splitlines(), strict=True):
        assert f'needs {name}, which is not installed; run: pip install "vae-edge[train]"' in line
    assert not (tmp_path / "run").exists()


def test_importing_the_package_is_cheap_and_says_what_is_missing() -> None:
    script = (
        "import sys, vae_training\n"
        "heavy = {'torch', 'accelerate', 'sklearn', 'PIL', 'click', 'tqdm', 'onnx', 'onnxruntime'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "sys.modules['torch'] = None\n"
        "try: vae_training.train\n"
        "except ImportError as error: print(type(error).__name__, error)"
    )
    shown = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert shown.stdout.startswith("MissingExtraError vae_training.train needs torch, which is not installed; run: pip")


COMMAND = "from vae_training.cli import main; main()"


@pytest.mark.parametrize(
    ("number", "code", "message"),
    [
        (signal.SIGINT, 130, "Interrupted; continue with the same command and --resume."),
        (signal.SIGTERM, 143, ""),
    ],
)
def test_an_ended_command_returns_promptly_and_the_run_continues(
    parent: Parent, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals, code: int, message: str
) -> None:
    run = tmp_path / "run"
    arguments = [*FAST, "--output", run, "--epochs", 3000]
    child = parent.start(COMMAND, *arguments, "--checkpoint-seconds", 0.05)
    child.wait_for((run / "state").exists)
    os.kill(child.pid, number)
    assert child.wait(20) == code, child.stderr
    assert child.stderr.rstrip().endswith(message)
    assert ("Interrupted" in child.stderr) == bool(message)
    assert "Traceback" not in child.stderr
    assert {path.name for path in run.iterdir()} == {"run.json", "state"}  # no model, and nothing half written
    kept = torch.load(run / "state/progress.pt", weights_only=True)["step"]
    steps = []

    def train_step(run: Run) -> None:
        steps.append(run.state.step)
        raise KeyboardInterrupt

    monkeypatch.setattr(Run, "train_step", train_step)
    assert vae_train(*arguments, "--resume") == 130
    assert steps == [kept]
    assert kept > 0


def test_two_processes_train_one_model_and_speak_once(parent: Parent, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    arguments = [*FAST, "--output", tmp_path / "run", "--epochs", 2, "--checkpoint-seconds", 0, "--json"]
    torchrun = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    ranks = [parent.start(COMMAND, *arguments, **torchrun, RANK=rank, LOCAL_RANK=rank) for rank in ("0", "1")]
    for child in ranks:
        assert child.wait() == 0, child.stderr
    assert json.loads(ranks[0].stdout)["training"]["processes"] == 2
    assert ranks[1].stdout == ""
    assert load_checkpoint(tmp_path / "run/model.pt").dataset["train"] == 200


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--widths", "0"), "widths is [0]; expected 1 to 16 numbers"),
        (
            ("--family", "mlp", "--latent", 65536, "--widths", "65536,65536"),
            "the model would have 21,483,618,368 parameters",
        ),
        (("--data", ""), "data is empty; expected 'digits'"),
    ],
)
def test_a_refused_run_leaves_no_folder(
    tmp_path: Path, arguments: tuple[object, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert vae_train("--data", "digits", "--output", tmp_path / "run", *arguments) == 1
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
