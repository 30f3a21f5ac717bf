"""Everything that is to be known about the bundles on this machine's GPU, with one command, from the source tree.

    python benchmarks/gpu/run.py --case cases/mlp --case cases/conv28 --output benchmarks/results/gpu/NAME

It installs nothing and needs no network: numpy, click and onnxruntime-gpu have to be there, and torch for the exchange
of arrays and the race. It runs for --minutes; the same command with --resume goes on, until all is done:

    environment   the machine, the GPU, the versions; again in every part
    golden        the bundle's golden values in fp32, tf32 and fp16, as far as it has them
    fidelity      every precision against fp32 on the CPU
    calls         every operation, 1 to 32 examples, cold and warm, host and device arrays, exchange with torch
    concurrency   16 threads on one VAE: bit for bit what one thread gets, also while others are loaded and closed
    memory        too many examples are refused, and the next call works
    ways          what VAE.warmup tried and took, and the memory of both halves
    overhead      VAE beside bare onnxruntime with IO binding
    kernels       which kernels calls run on the GPU and for how long, and those of torch, by torch's profiler
    variations    what other options of onnxruntime, and other operators, would make of the graphs; with onnx
    bench-fp32 bench-tf32 bench-fp16   vae-bench, with the parts of each call
    race          vae-bench race on the device

Each step on each case has a process of its own: what crashes is recorded with its reason, and the run goes on. Written
after every step: OUTPUT.json, and OUTPUT.md for people. Exit codes: 0 all of this part passed; 3 a check failed or
a step crashed; 1 it could not begin; 2 wrong usage.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import sys
import threading
import time
from pathlib import Path
from typing import Any

# The packages of this source tree, whatever is installed.
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "runtime"))
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

from child import Children
from report_text import render

from vae_benchmarks.children import at_once
from vae_benchmarks.document import load_document
from vae_benchmarks.race import Case
from vae_runtime.atomic import atomic_file, write_json
from vae_runtime.console import NEGATIVE_VERDICT
from vae_runtime.errors import InputError, OutputError, VAEError

FORMAT, FORMAT_VERSION = "vae-gpu-run", 1
ENVIRONMENT = "environment"
STEPS = (
    *("golden", "fidelity", "calls", "concurrency", "memory", "ways", "overhead"),
    *("kernels", "variations"),
    *("bench-fp32", "bench-tf32", "bench-fp16", "race"),
)
TIMELESS = frozenset({"golden", "fidelity", "calls", "concurrency"})  # nothing is measured in them
SECONDS = {
    **{"golden": 15, "fidelity": 60, "calls": 50, "concurrency": 95, "memory": 15, "ways": 40, "overhead": 30},
    **{"kernels": 60, "variations": 90},
}


def main() -> int:
    arguments = parse()
    try:
        return run(arguments)
    except VAEError as error:
        print(f"Error: {error}", file=sys.stderr)
        return 1


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", type=Path, action="append", required=True, help="a case or a bundle; repeat it")
    parser.add_argument("--output", type=Path, required=True, help="OUTPUT.json and OUTPUT.md are written")
    parser.add_argument("--device", default="cuda", help="cuda, cuda:N, or cpu, which tries the steps themselves")
    parser.add_argument("--steps", default=",".join(STEPS), help="NAME,... of those above")
    parser.add_argument("--minutes", type=float, default=7.5, help="for this part; no step begins that may not end")
    parser.add_argument("--jobs", type=int, default=1, help=f"of {', '.join(sorted(TIMELESS))}: so many at once")
    parser.add_argument("--rounds", type=int, default=6, help="of vae-bench; fewer are quicker and know less")
    parser.add_argument("--budget", type=float, default=60, help="seconds of the race for each case")
    parser.add_argument("--preload-torch", action="store_true", help="let every process load torch, whose CUDA is used")
    parser.add_argument("--quick", action="store_true", help="few repetitions: it tries the steps, not the device")
    parser.add_argument("--resume", action="store_true", help="keep what is in OUTPUT.json; crashed steps run again")
    parser.add_argument("--retry", action="store_true", help="with --resume: failed steps run again too")
    parser.add_argument("--force", action="store_true", help="begin anew over what run.py wrote to OUTPUT.json")
    arguments = parser.parse_args()
    arguments.steps = [name.strip() for name in arguments.steps.split(",")]
    for name in arguments.steps:
        if name not in STEPS:
            parser.error(f"--steps has {name!r}; expected some of {', '.join(STEPS)}")
    if arguments.jobs < 1:
        parser.error(f"--jobs is {arguments.jobs}; expected at least 1")
    if arguments.resume and arguments.force:
        parser.error("--resume and --force exclude each other")
    return arguments


def run(arguments: argparse.Namespace) -> int:
    deadline = time.monotonic() + 60 * arguments.minutes
    cases = open_cases(arguments.case)
    document = begin(arguments, list(cases))
    kept = {"passed", "skipped"} if arguments.retry else {"passed", "skipped", "failed"}
    done = {(unit["step"], unit["case"]) for unit in document["units"] if unit["status"] in kept}
    wanted = [(step, case) for step in STEPS if step in arguments.steps for case in cases]
    left = [unit for unit in wanted if unit not in done]
    document["parts"] += 1
    ran: list[dict[str, Any]] = []
    started = time.monotonic()
    with Children(arguments.preload_torch) as children:
        request = {name: getattr(arguments, name) for name in ("device", "quick", "rounds", "budget")}
        request["preload"] = arguments.preload_torch

        lock = threading.Lock()

        def run_step(named: tuple[str, str]) -> None:
            step, case = named
            remaining = deadline - time.monotonic()
            if len(ran) > 1 and not arguments.quick and remaining < seconds_of(step, arguments):
                return  # a shorter one may still have its turn
            found = children.run({**request, "step": step, "case": str(cases.get(case, ""))}, max(remaining, 1.0))
            unit = {"step": step, "case": case, **found}
            with lock:
                ran.append(unit)
                store(document, unit)
                write(arguments.output, document)
                print(line_of(unit), flush=True)

        todo = [(ENVIRONMENT, f"part {document['parts']}"), *left]
        for is_timeless, group in itertools.groupby(todo, lambda unit: unit[0] in TIMELESS):
            at_once(run_step, list(group), arguments.jobs if is_timeless else 1, children.stop)
    open_units = [unit for unit in wanted if unit not in {(one["step"], one["case"]) for one in document["units"]}]
    print(f"{len(ran)} steps in {time.monotonic() - started:.0f} s; {arguments.output}.json, .md written")
    if open_units:
        print(f"{len(open_units)} steps are left: the same command with --resume goes on")
    return NEGATIVE_VERDICT if any(unit["status"] in ("failed", "crashed") for unit in ran) else 0


def seconds_of(step: str, arguments: argparse.Namespace) -> float:
    """How much time has to be left for a step to begin; on an H100 nearly all took less. For kernels, variations
    and the race it is estimated."""
    if step == "race":
        return float(arguments.budget) + 200  # to compile for everybody and to start them, for every point
    return 10.0 * (arguments.rounds + 1) if step.startswith("bench") else SECONDS[step]


def open_cases(paths: list[Path]) -> dict[str, Path]:
    """By name; raises `VAEError` before anything runs."""
    cases: dict[str, Path] = {}
    for path in paths:
        name = Case.open(path).name
        if name in cases:
            raise InputError(f"--case has two of the name {name!r}; their results could not be told apart")
        cases[name] = path.resolve()
    return cases


def begin(arguments: argparse.Namespace, cases: list[str]) -> dict[str, Any]:
    """The document to go on with."""
    path, text = json_file(arguments.output), text_file(arguments.output)
    if not path.exists() and text.exists():
        raise OutputError(f"{text} exists without {path.name}; choose a name that is not taken")
    if path.exists():
        if not (arguments.force or arguments.resume):
            raise OutputError(f"{path} exists; go on with --resume, or begin anew with --force")
        document = load_document(path, "a report of run.py")
        found = document if isinstance(document, dict) else {}
        if arguments.force and found.get("format") != FORMAT:
            raise OutputError(f"{path} is not a report of run.py; --force replaces nothing else")
        if arguments.resume:
            if (found.get("format"), found.get("format_version")) != (FORMAT, FORMAT_VERSION):
                raise OutputError(f"{path} was not written by run.py of this version; it is not continued")
            if found["device"] != arguments.device:
                raise InputError(f"--device is {arguments.device!r}; {path} was begun on {found['device']!r}")
            found["cases"] = list(dict.fromkeys([*found["cases"], *cases]))
            return found
    path.parent.mkdir(parents=True, exist_ok=True)
    created = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    return {
        **{"format": FORMAT, "format_version": FORMAT_VERSION, "created": created, "device": arguments.device},
        **{"torch_loaded_first": arguments.preload_torch, "quick": arguments.quick},
        **{"cases": cases, "parts": 0, "units": []},
    }


def store(document: dict[str, Any], unit: dict[str, Any]) -> None:
    """In place of the same step on the same case."""
    units = [one for one in document["units"] if (one["step"], one["case"]) != (unit["step"], unit["case"])]
    order = [ENVIRONMENT, *STEPS]
    cases = {case: index for index, case in enumerate(document["cases"])}
    document["units"] = sorted(
        [*units, unit], key=lambda one: (order.index(one["step"]), cases.get(one["case"], len(cases)))
    )


def write(output: Path, document: dict[str, Any]) -> None:
    write_json(json_file(output), document)
    with atomic_file(text_file(output)) as stream:
        stream.write(render(document, output.name).encode())


def json_file(output: Path) -> Path:
    return output.with_name(f"{output.name}.json")


def text_file(output: Path) -> Path:
    return output.with_name(f"{output.name}.md")


def line_of(unit: dict[str, Any]) -> str:
    failed = [check for check in unit["checks"] if not check["passed"]]
    lines = [f"{unit['step']} {unit['case']}: {unit['status']}, {len(unit['checks'])} checks, {unit['seconds']:.1f} s"]
    lines += [f"    FAILED {check['check']}: {check['text'] or check['found']}" for check in failed]
    lines += [f"    {unit['reason']}"] if unit["reason"] else []
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
