"""The measuring process: what it measures, how its failures arrive, and that nothing else mixes with its answer."""

from __future__ import annotations

import inspect
import json
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest

import vae_runtime.errors as errors
from vae_benchmarks import BenchmarkError, children, worker
from vae_runtime import VAE, DeviceArray, DevicePosterior, to_uint8
from vae_runtime.errors import InputError, MissingExtraError, VAEError

STARTUP = {"device": "cpu", "precision": "fp32", "threads": 1, "batch": 8}


def test_operations_are_the_public_ones_on_golden_inputs(tiny: Path) -> None:
    with VAE.load(tiny, threads=1) as vae:
        x = vae.golden()["x"]
        expected = {
            "encode": vae.encode(x[[0, 1, 2, 3, 0, 1]]).mean,
            "decode": vae.decode(vae.encode(x[[0, 1, 2, 3, 0, 1]]).mode()),
            "reconstruct": vae.reconstruct(x[[0, 1, 2, 3, 0, 1]]),
            "sample": vae.sample(6, seed=0),
            "score": vae.score(x[[0, 1, 2, 3, 0, 1]]),
        }
        for operation, value in expected.items():
            result = worker.make_call(vae, operation, 6)()
            np.testing.assert_array_equal(getattr(result, "mean", result) if operation == "encode" else result, value)


def test_images_that_no_memory_holds_are_told_in_words(free: Path) -> None:
    with (
        VAE.load(free, threads=1) as vae,
        pytest.raises(InputError, match=r"of shape \(2, 3, 1048576, 1048576\) does not"),
    ):
        worker.examples(vae, 2, [2**20, 2**20])


def test_images_of_another_size_are_cut_or_mirrored(free: Path) -> None:
    with VAE.load(free, threads=1) as vae:
        golden = vae.golden()["x"]  # (4, 3, 12, 16)
        images = worker.examples(vae, 5, [20, 8])
        np.testing.assert_array_equal(images[:, :, :12], golden[[0, 1, 2, 3, 0], ..., :8])
        np.testing.assert_array_equal(images[:4, :, 12:], golden[:, :, :3:-1, :8])
        assert worker.make_call(vae, "score", 5, [20, 8])().shape == (5,)
        for operation in ("encode", "decode", "reconstruct", "sample"):
            result = worker.make_call(vae, operation, 5, [20, 8])()
            shape = (5, 2, 10, 4) if operation == "encode" else (5, 3, 20, 8)
            assert (result.mean if operation == "encode" else result).shape == shape
        code = worker.make_parts(vae, "encode", 2, [20, 8])["device_to_host"]()[0]
        assert code.shape == (2, 2, 10, 4)


@pytest.mark.parametrize(("name", "shape", "rows"), [("tiny", (6, 8, 8), None), ("free", (6, 20, 8, 3), [20, 8])])
def test_uint8_inputs_are_images_as_files_have_them(
    request: pytest.FixtureRequest, name: str, shape: tuple[int, ...], rows: list[int] | None
) -> None:
    with VAE.load(request.getfixturevalue(name), threads=1) as vae:
        images = worker.examples(vae, 6, rows, "uint8")
        assert (images.dtype, images.shape, images.flags.c_contiguous) == (np.uint8, shape, True)
        np.testing.assert_array_equal(images, to_uint8(worker.examples(vae, 6, rows)))
        for operation, value in (
            ("encode", vae.encode(images).mean),
            ("reconstruct", vae.reconstruct(images)),
            ("score", vae.score(images)),
        ):
            call = worker.make_call(vae, operation, 6, rows, "uint8")
            assert call.args[0].dtype == np.uint8
            result = call()
            np.testing.assert_array_equal(getattr(result, "mean", result) if operation == "encode" else result, value)
        for operation in ("decode", "sample"):  # of the same latents as beside float32
            expected = worker.make_call(vae, operation, 6, rows)()
            np.testing.assert_array_equal(worker.make_call(vae, operation, 6, rows, None)(), expected)


def test_each_row_is_measured_with_its_dtype(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[object] = []
    real = worker.make_call

    def make_call(*arguments: object) -> object:
        made.append(real(*arguments).args[0].dtype)
        return real(*arguments)

    monkeypatch.setattr(worker, "make_call", make_call)
    rows = [["encode", 2, "uint8"], ["score", 1, "float32"], ["decode", 1, None]]
    engine = {name: STARTUP[name] for name in ("device", "precision", "threads")}
    worker.measure_latency(str(tiny), **engine, rows=rows, seconds=0.01, wanted=5, confidence=0.95, width=0.5)
    assert made == [np.uint8, np.float32, np.float32]


@pytest.mark.parametrize("dtype", ["float32", "uint8"])
def test_the_first_call_is_of_the_inputs_dtype(tiny: Path, monkeypatch: pytest.MonkeyPatch, dtype: str) -> None:
    given: list[tuple[str, int]] = []
    real = VAE.reconstruct

    def reconstruct(vae: VAE, inputs: np.ndarray) -> np.ndarray:
        given.append((str(inputs.dtype), len(inputs)))
        return real(vae, inputs)

    monkeypatch.setattr(VAE, "reconstruct", reconstruct)
    worker.measure_startup(str(tiny), **STARTUP, dtype=dtype)
    assert given == [(dtype, 1), (dtype, 8)]


def test_tiled_inputs_are_contiguous_and_new() -> None:
    examples = np.arange(12, dtype=np.float32).reshape(3, 4)
    tiled = worker.tile(examples, 7)
    np.testing.assert_array_equal(tiled, examples[[0, 1, 2, 0, 1, 2, 0]])
    assert tiled.flags.c_contiguous
    assert not np.shares_memory(tiled, examples)


def test_one_round_measures_every_row(tiny: Path) -> None:
    answer = children.run_worker(
        "latency",
        bundle=str(tiny),
        device="cpu",
        precision="auto",
        threads=None,
        rows=[["decode", 2, None], ["encode", 1, "float32"]],
        seconds=0.01,
        wanted=5,
        confidence=0.95,
        width=0.5,
    )
    assert (answer["device"], answer["precision"]) == ("cpu", "fp32")
    assert len(answer["rows"]) == 2
    assert all(len(row["samples_ns"]) >= 1 and min(row["samples_ns"]) > 0 for row in answer["rows"])
    assert answer["clock"]["cost_ns"] > 0
    assert answer["splits"] == [None, None]  # only on GPUs, unless it is asked for
    assert answer["gpu"] is None


def test_the_parts_of_a_call_are_those_of_the_call(tiny: Path) -> None:
    with VAE.load(tiny, threads=1) as vae:
        x = vae.golden()["x"][[0, 1, 2, 3, 0, 1]]
        z = vae.encode(x).mode()
        for operation, given, results in (
            ("encode", x, [z, vae.encode(x).logvar]),
            ("decode", z, [vae.decode(z)]),
        ):
            parts = worker.make_parts(vae, operation, 6)
            np.testing.assert_array_equal(parts["host_to_device"]().numpy(), given)
            computed = parts["compute"]()
            for found in (computed if operation == "encode" else [computed]), parts["device_to_host"]():
                arrays = [getattr(array, "numpy", lambda array=array: array)() for array in found]
                for array, expected in zip(arrays, results, strict=True):
                    np.testing.assert_allclose(array, expected, atol=1e-6)


def test_an_autoencoder_brings_only_its_code_back(autoencoder: Path) -> None:
    with VAE.load(autoencoder, threads=1) as vae:
        (code,) = worker.make_parts(vae, "encode", 3)["device_to_host"]()
        assert code.shape == (3, 2)


def test_every_part_on_a_gpu_waits_for_it(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The way of a GPU, taken on the CPU."""
    waited: list[None] = []
    monkeypatch.setattr("vae_runtime.cuda.synchronize", lambda index: waited.append(None))
    with VAE.load(tiny, threads=1) as vae:
        device = worker.target(vae, "encode", 2)
        stand_in = types.SimpleNamespace(is_gpu=True, memory=device.memory)
        monkeypatch.setattr(worker, "target", lambda *_: stand_in)
        parts = worker.make_parts(vae, "encode", 2)
        for name, count, kind in (
            ("host_to_device", 1, DeviceArray),
            ("compute", 2, DevicePosterior),
            ("device_to_host", 2, list),
        ):
            assert isinstance(parts[name](), kind)
            assert len(waited) == count


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="other systems count a new process's peak from zero")
def test_the_peak_of_the_parent_is_not_the_peak_of_the_child(tiny: Path) -> None:
    ballast = bytearray(b"x") * (200 * 2**20)
    answer = children.run_worker("startup", bundle=str(tiny), **STARTUP)
    assert len(ballast) > answer["peak_rss_bytes"] > answer["rss_after_import_bytes"]


def test_resident_memory_grows_with_what_is_held() -> None:
    """In a process of its own: of one as large as this, the system may take pages back at the same time."""
    code = (
        f"import runpy; memory = runpy.run_path({str(Path(worker.__file__))!r}, run_name='worker')['resident_bytes'];"
        "before = memory(); ballast = bytearray(b'x') * (50 * 2**20); print(*before, *memory())"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    before, _, held, peak = map(int, shown.stdout.split())
    assert 0.8 < (held - before) / (50 * 2**20) < 1.2
    assert peak >= held


def test_nothing_that_start_up_times_is_imported_before(tiny: Path) -> None:
    """The program's own imports must not make numpy or vae_runtime look free."""
    code = (
        f"import runpy, sys; runpy.run_path({str(Path(worker.__file__))!r}, run_name='worker');"
        "print(sorted({'numpy', 'vae_runtime', 'onnxruntime', 'vae_benchmarks', 'click'} & set(sys.modules)))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


ERRORS = [found for _, found in inspect.getmembers(errors, inspect.isclass) if issubclass(found, VAEError)]


@pytest.mark.parametrize("kind", ERRORS, ids=lambda kind: kind.__name__)
def test_every_error_arrives_as_itself(kind: type[VAEError]) -> None:
    error = children._revive(kind.__name__, "the sentence")
    assert type(error) is kind
    assert str(error) == "the sentence"


def test_an_unknown_error_arrives_as_the_family() -> None:
    assert type(children._revive("Other", "the sentence")) is VAEError
    assert type(children._revive("annotations", "the sentence")) is VAEError


def test_a_missing_engine_arrives_as_one_sentence(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocker = tmp_path / "sitecustomize.py"
    blocker.write_text("import sys\nsys.modules['onnxruntime'] = None\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(MissingExtraError, match=r'needs onnxruntime, .*pip install "vae-edge\[cpu\]"'):
        children.run_worker("startup", bundle=str(tiny), **STARTUP)


@pytest.mark.parametrize(
    ("program", "message"),
    [
        (
            "import os, signal; os.kill(os.getpid(), signal.SIGKILL)",
            "was ended by SIGKILL; it may have run out of memory",
        ),
        ("raise RuntimeError('planted')", "ended with exit code 1 and no answer: RuntimeError: planted"),
        ("print('no json')", "ended with exit code 0 and no answer"),
        ("", "ended with exit code 0 and no answer"),
        ("print('[]')", "ended with exit code 0 and no answer"),
    ],
)
def test_a_process_that_dies_is_reported_in_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, program: str, message: str
) -> None:
    script = tmp_path / "dies.py"
    script.write_text(program)
    monkeypatch.setattr(children, "_WORKER", script)
    with pytest.raises(BenchmarkError) as caught:
        children.run_worker("startup")
    assert str(caught.value) == f"the process that measures startup {message}"


def test_what_libraries_print_does_not_mix_with_the_answer(tmp_path: Path) -> None:
    program = (
        f"import sys; sys.path.insert(0, {str(Path(worker.__file__).parent)!r})\n"
        "import os, worker\n"
        "def noisy():\n"
        "    print('a banner', flush=True)\n"
        "    os.write(1, b'from C')\n"
        "    return {'fine': True}\n"
        "worker.TASKS['noisy'] = noisy\n"
        "worker.main()\n"
    )
    found = subprocess.run(
        [sys.executable, "-c", program], input='{"task": "noisy"}', capture_output=True, text=True, check=True
    )
    assert json.loads(found.stdout) == {"result": {"fine": True}}
    assert "a banner" in found.stderr
    assert "from C" in found.stderr


def test_modules_beside_the_program_are_not_picked_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "json.py").write_text("raise RuntimeError('shadowed')")
    (tmp_path / "program.py").write_text("import json; print(json.dumps({'result': {'fine': True}}))")
    monkeypatch.setattr(children, "_WORKER", tmp_path / "program.py")
    assert children.run_worker("startup") == {"fine": True}
