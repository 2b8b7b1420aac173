"""Ours beside peers on one random checkpoint, in interleaved rounds.

All servers stand side by side; those that are not measured are stopped by a signal, so that none
takes time from another. Peers run from virtual environments of their own::

    python -m benchmarks.serve --vllm VENV --transformers VENV --workload text --concurrency 1,16

``--w8a8`` measures ours a second time, with weights of 8-bit integers. ``--llama`` takes a folder
with llama.cpp's ``llama-server`` and what ``convert_hf_to_gguf.py`` makes of the checkpoint:
``model.gguf``, and ``mmproj.gguf`` with ``--mmproj``.
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
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.bench_model import make_bench_model
from chiasm.cli.bench import BenchPlan, make_endpoints, markdown, plan_cells, run_rounds
from chiasm.cli.bench_load import WORKLOADS, Sizes
from chiasm.cli.bench_machine import process_tree

if TYPE_CHECKING:
    from chiasm.cli.bench_client import Endpoint

READY_S = 600.0
# Ours takes some ports behind its own.
PORTS = {
    "chiasm": 8100,
    "chiasm-w8a8": 8150,
    "vllm-1t": 8201,
    "vllm-2t": 8202,
    "transformers": 8203,
    "llama": 8204,
}
# Answers at one time, which share this context.
LLAMA_FLAGS = ("--threads", "2", "--parallel", "16", "--ctx-size", "32768")
# ``transformers serve`` answers one request at a time: more would measure its queue.
TRANSFORMERS_CONCURRENCY = 1
VLLM_FLAGS = (
    *("--dtype", "bfloat16", "--max-model-len", "4096", "--max-num-seqs", "32"),
    *("--limit-mm-per-prompt", '{"image":4,"video":0}', "--skip-mm-profiling"),
)


@dataclass(frozen=True, slots=True)
class Server:
    """How a server is started, and what it needs in its environment."""

    command: tuple[str, ...]
    environment: dict[str, str] = field(default_factory=dict)


def main() -> None:
    """Start the servers, measure them and stop them."""
    given = _read_arguments()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # servers are stopped then, too
    model = str(make_bench_model(given.model_dir))
    servers = _servers(model, given)
    processes: dict[str, subprocess.Popen[bytes]] = {}
    try:
        for name, server in servers.items():
            processes[name] = _start(server)
            _wait(processes[name], name)
        pids = {name: process.pid for name, process in processes.items()}
        cells = plan_cells(given.workload or [], given.concurrency)
        plan = BenchPlan(
            _endpoints(servers, model),
            cells,
            pids,
            lambda name: _select(processes, name),
            lambda series: print(series, file=sys.stderr, flush=True),
        )
        # transformers serve refuses ignore_eos, and all get the same request.
        sizes = Sizes(given.requests, ignores_eos=given.transformers is None)
        table = run_rounds(plan, given.rounds, sizes, time.time_ns())
        sys.stdout.write(markdown(table) + "\n")
    finally:
        for process in processes.values():
            _stop(process)


def _read_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model-dir", type=Path, default=Path("build/bench-model"))
    parser.add_argument("--vllm", type=Path, help="virtual environment")
    parser.add_argument("--transformers", type=Path, help="virtual environment")
    parser.add_argument("--llama", type=Path, help="folder of llama-server and the checkpoint")
    parser.add_argument("--vllm-threads", default="1,2", help="of its worker: 1, 2 or both")
    parser.add_argument("--w8a8", action="store_true", help="ours with 8-bit integers, too")
    parser.add_argument("--workload", action="append", choices=WORKLOADS)
    parser.add_argument("--concurrency", default="1,4,16")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--requests", type=int, default=4)
    parser.add_argument("--ours", nargs="*", default=[], help="flags of ours: cores=1 ...")
    return parser.parse_args()


def _endpoints(servers: dict[str, Server], model: str) -> list[Endpoint]:
    endpoints = make_endpoints(
        [f"{name}=http://127.0.0.1:{PORTS[name]}" for name in servers], model, ""
    )
    return [
        replace(endpoint, max_concurrency=TRANSFORMERS_CONCURRENCY)
        if endpoint.name == "transformers"
        else endpoint
        for endpoint in endpoints
    ]


def _select(processes: dict[str, subprocess.Popen[bytes]], chosen: str) -> None:
    """Let one server run and stop the others, with all their processes."""
    for name, process in processes.items():
        _signal_tree(process.pid, signal.SIGCONT if name == chosen else signal.SIGSTOP)


def _servers(model: str, given: argparse.Namespace) -> dict[str, Server]:
    def where(name: str) -> tuple[str, ...]:
        return ("--host", "127.0.0.1", "--port", str(PORTS[name]))

    chiasm = (sys.executable, "-m", "chiasm.cli.main", "up", model, "--served-model-name", model)
    ours = tuple(f"--{flag}" for flag in given.ours)
    servers = {"chiasm": Server((*chiasm, *where("chiasm"), *ours))}
    if given.w8a8:
        state = ("--state-dir", str(given.model_dir.with_name("bench-w8a8").resolve()))
        name = "chiasm-w8a8"
        flags = (*ours, "--quantization", "w8a8", "--tower-quantization", "w8a8", *state)
        servers[name] = Server((*chiasm, *where(name), *flags))
    if given.vllm:
        program = (str(given.vllm / "bin/vllm"), "serve", model, *VLLM_FLAGS)
        environment = {
            "VLLM_NO_USAGE_STATS": "1",
            "VLLM_CPU_KVCACHE_SPACE": "2",
            "LD_PRELOAD": str(given.vllm / "lib/libiomp5.so"),
        }
        # One thread and a free core is what its "auto" picks on two cores.
        cores = {"1": "0", "2": "0-1"}
        for num_threads in given.vllm_threads.split(","):
            name = f"vllm-{num_threads}t"
            layout = {**environment, "VLLM_CPU_OMP_THREADS_BIND": cores[num_threads]}
            servers[name] = Server((*program, *where(name)), layout)
    if given.transformers:
        peer = (str(given.transformers / "bin/transformers"), "serve", model)
        servers["transformers"] = Server(
            (*peer, *where("transformers"), "--device", "cpu", "--dtype", "bfloat16")
        )
    if given.llama:
        servers["llama"] = _llama(given.llama, model, where("llama"))
    return servers


def _llama(folder: Path, model: str, where: tuple[str, ...]) -> Server:
    weights = ("--model", str(folder / "model.gguf"), "--mmproj", str(folder / "mmproj.gguf"))
    program = (str(folder / "llama-server"), *weights, "--alias", model)
    return Server((*program, *where, *LLAMA_FLAGS))


def _start(server: Server) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", **server.environment}
    return subprocess.Popen(
        server.command, env=environment, stdout=sys.stderr, start_new_session=True
    )


def _wait(process: subprocess.Popen[bytes], name: str) -> None:
    path = "ready" if name.startswith("chiasm") else "health"
    deadline = time.monotonic() + READY_S
    while time.monotonic() < deadline and process.poll() is None:
        with contextlib.suppress(OSError):
            urllib.request.urlopen(f"http://127.0.0.1:{PORTS[name]}/{path}", timeout=5).close()
            return
        time.sleep(1)
    raise SystemExit(f"{name} did not become ready; it ended with {process.poll()}")


def _signal_tree(root: int, number: signal.Signals) -> None:
    # Not by process groups: the services of ours have groups of their own.
    for pid in process_tree(root):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


def _stop(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is not None:
        return
    _signal_tree(process.pid, signal.SIGCONT)
    process.terminate()
    try:
        process.wait(30)
    except subprocess.TimeoutExpired:
        _signal_tree(process.pid, signal.SIGKILL)
        process.wait()


if __name__ == "__main__":
    main()
