"""What SOURCE seems to be is said, and how to state it, where it is none that is understood."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from onnx import parser, save
from torch import nn

from vae_export.cli import main
from vae_export.importers.hints import refuse_misstated, refuse_weights


@pytest.fixture
def zoo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("zoo").mkdir()
    Path("zoo/models.py").write_text("raise RuntimeError('it is not imported')")
    network = nn.Linear(2, 2)
    torch.save(network, "whole.pt")
    torch.save(network.state_dict(), "state.pth")
    torch.save({"epoch": 1, "model": network.state_dict()}, "checkpoint.ckpt")
    torch.save({"lr": 1.0}, "other.pt")
    torch.save({"gen": network}, "gen.pt")
    torch.save([torch.zeros(1)], "list.pt")
    torch.save(torch.zeros(1), "tensor.pt")
    torch.save(torch.tanh, "function.pt")
    torch.jit.save(torch.jit.trace(network, torch.rand(1, 2)), "script.pt")
    Path("kl").mkdir()
    Path("kl/config.json").write_text('{"_class_name": "AutoencoderKL"}')
    torch.save(network.state_dict(), "kl/diffusion_pytorch_model.bin")
    save(parser.parse_model('<ir_version: 8, opset_import: ["" : 17]> g (float[N] x) => (float[N] y) { y = Tanh(x) }'),
         "model.onnx")  # fmt: skip
    return tmp_path


pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")
TWO = "a bundle is made of two, the encoder's and the decoder's: pass ENCODER,DECODER, or a folder with both"
WEIGHTS = "holds weights alone, without the network that they are of; pass what returns that as package.module:factory"


@pytest.mark.parametrize("options", [[], ["--input", "3x32x32", "--input-range", "signed"]])
@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("whole.pt", f"whole.pt {WEIGHTS}, and --weights whole.pt"),
        ("state.pth", f"state.pth {WEIGHTS}, and --weights state.pth"),
        ("checkpoint.ckpt", f"checkpoint.ckpt {WEIGHTS}, and --weights checkpoint.ckpt"),
        ("gen.pt", f"gen.pt {WEIGHTS}, and --weights gen.pt"),
        ("list.pt", "list.pt holds a list, which is no model; pass what returns a network as package.module:factory"),
        ("tensor.pt", "tensor.pt holds a Tensor, which is no model; pass what returns"),
        ("function.pt", "function.pt holds a pickled object, which is no model; pass what returns"),
        (
            "state.pth,gen.pt",
            "state.pth,gen.pt is two files that are no programs .* save a dict of both under the names",
        ),
        ("model.onnx", f"model.onnx is one ONNX file; {TWO}"),
        ("script.pt", f"script.pt is one TorchScript program; {TWO}"),
        ("zoo/models.py", "zoo/models.py is a Python file; pass its module .*, as in zoo.models:factory"),
        ("zoo/models.py:f", "zoo/models.py:f is no package.module:factory; .* with dots, as in zoo.models:f"),
        ("zoo/models:f", "zoo/models:f is no package.module:factory; .* with dots, as in zoo.models:f"),
        ("zoo.models.f", "zoo.models.f is no file; .* with a colon, as in zoo.models:f"),
        ("kl/config.json", "kl/config.json is one file of a model whose folder is the source; pass kl\n"),
        ("kl/diffusion_pytorch_model.bin", "bin is one file of a model whose folder is the source; pass kl\n"),
        ("absent.pt", "absent.pt cannot be read: No such file or directory"),
        ("other.pt", "other.pt: format is None; expected 'vae-checkpoint'"),
    ],
)
def test_the_answer_says_how_to_state_the_source(zoo: Path, source: str, said: str, options: list[str]) -> None:
    result = CliRunner().invoke(main, [source, *options, "--output", "a.vae"])
    assert result.exit_code == 1
    assert "states it itself" not in result.stderr
    assert result.stderr.count("\n") == 1
    assert re.search(said, result.stderr), result.stderr
    assert "zoo" not in sys.modules


def test_a_model_of_ours_still_says_all_itself(model_file: Path, zoo: Path) -> None:
    refuse_misstated(str(model_file))
    refuse_weights(str(model_file))
    result = CliRunner().invoke(main, [str(model_file), "--input-range", "unit"])
    assert "--input-range is for models from elsewhere" in result.stderr
    for other in ("", "\0", "a:b:c", "models/v1.5", "no.such.module"):
        refuse_misstated(other)
