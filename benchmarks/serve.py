"""Ours beside peers on one random checkpoint, in interleaved rounds.

All servers stand side by side; those that are not measured are stopped by a signal, so that none
takes time from another. Peers run from virtual environments of their own::

    python -m benchmarks.serve --vllm VENV --transformers VENV --workload text --concurrency 1,16
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

from benchmarks.bench_model import make_bench_model
from chiasm.cli.bench import BenchPlan, make_endpoints, markdown, plan_cells, run_rounds
from chiasm.cli.bench_load import WORKLOADS, Sizes

READY_S = 600.0
PORTS = {"chiasm": 8100, "vllm": 8101, "transformers": 8103}
VLLM_FLAGS = (
    *("--dtype", "bfloat16", "--max-model-len", "4096", "--max-num-seqs", "32"),
    *("--limit-mm-per-prompt", '{"image":4,"video":0}', "--skip-mm-profiling"),
)


def main() -> None:
    """Start the servers, measure them and stop them."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model-dir", type=Path, default=Path("build/bench-model"))
    parser.add_argument("--vllm", type=Path, help="virtual environment")
    parser.add_argument("--transformers", type=Path, help="virtual environment")
    parser.add_argument("--workload", action="append", choices=WORKLOADS)
    parser.add_argument("--concurrency", default="1,4,16")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--requests", type=int, default=4)
    parser.add_argument("--ours", nargs="*", default=[], help="further flags of ours")
    given = parser.parse_args()
    model = str(make_bench_model(given.model_dir))
    commands = _commands(model, given.vllm, given.transformers)
    commands["chiasm"] = (*commands["chiasm"], *given.ours)
    urls = [f"{name}=http://127.0.0.1:{PORTS[name]}" for name in commands]
    processes: dict[str, subprocess.Popen[bytes]] = {}
    try:
        for name, command in commands.items():
            processes[name] = _start(command, given.vllm if name == "vllm" else None)
        for name, process in processes.items():
            _wait(process, name)
        pids = {name: process.pid for name, process in processes.items()}
        cells = plan_cells(given.workload or [], given.concurrency)
        endpoints = make_endpoints(urls, model, "")
        plan = BenchPlan(endpoints, cells, pids, lambda name: _select(processes, name))
        # transformers serve refuses ignore_eos, and all get the same request.
        sizes = Sizes(given.requests, ignores_eos=given.transformers is None)
        table = run_rounds(plan, given.rounds, sizes, time.time_ns())
        sys.stdout.write(markdown(table) + "\n")
    finally:
        for process in processes.values():
            _stop(process)


def _select(processes: dict[str, subprocess.Popen[bytes]], chosen: str) -> None:
    """Let one server run and stop the others."""
    for name, process in processes.items():
        os.killpg(process.pid, signal.SIGCONT if name == chosen else signal.SIGSTOP)


def _commands(
    model: str, vllm: Path | None, transformers: Path | None
) -> dict[str, tuple[str, ...]]:
    def where(name: str) -> tuple[str, ...]:
        return ("--host", "127.0.0.1", "--port", str(PORTS[name]))

    chiasm = (sys.executable, "-m", "chiasm.cli.main", "up", model)
    commands = {"chiasm": (*chiasm, "--served-model-name", model, *where("chiasm"))}
    if vllm:
        commands["vllm"] = (str(vllm / "bin/vllm"), "serve", model, *where("vllm"), *VLLM_FLAGS)
    if transformers:
        peer = (str(transformers / "bin/transformers"), "serve", model, *where("transformers"))
        commands["transformers"] = (*peer, "--device", "cpu", "--dtype", "bfloat16")
    return commands


def _start(command: tuple[str, ...], vllm: Path | None) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
    if vllm:
        environment["VLLM_CPU_KVCACHE_SPACE"] = "2"
        environment["LD_PRELOAD"] = str(vllm / "lib/libiomp5.so")
    return subprocess.Popen(command, env=environment, stdout=sys.stderr, start_new_session=True)


def _wait(process: subprocess.Popen[bytes], name: str) -> None:
    path = "ready" if name == "chiasm" else "health"
    deadline = time.monotonic() + READY_S
    while time.monotonic() < deadline and process.poll() is None:
        with contextlib.suppress(OSError):
            urllib.request.urlopen(f"http://127.0.0.1:{PORTS[name]}/{path}", timeout=5).close()
            return
        time.sleep(1)
    raise SystemExit(f"{name} did not become ready; it ended with {process.poll()}")


def _stop(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is not None:
        return
    os.killpg(process.pid, signal.SIGCONT)
    process.terminate()
    try:
        process.wait(30)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


if __name__ == "__main__":
    main()
