"""Read the flags of ``chiasm bench`` and run it."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from chiasm.cli.bench import BenchPlan, as_json, make_endpoints, markdown, plan_cells, run_rounds
from chiasm.cli.bench_load import WORKLOADS, Sizes


def run_bench(argv: list[str]) -> str:
    """Run the benchmark that ``argv`` asks for and return its table."""
    parser = _parser()
    given = parser.parse_args(argv)
    tokens = (given.requests, given.input_tokens, given.output_tokens)
    sizes = Sizes(*tokens, given.image_size, not given.no_ignore_eos, given.timeout_s)
    try:
        pids = {name: int(pid) for name, _, pid in (item.partition("=") for item in given.pid)}
        endpoints = make_endpoints(given.urls, given.model, given.api_key)
        plan = BenchPlan(endpoints, plan_cells(given.workload, given.concurrency), pids)
    except ValueError as error:
        parser.error(str(error))
    table = run_rounds(plan, given.rounds, sizes, given.seed)
    if given.json:
        Path(given.json).write_text(json.dumps(as_json(table)), encoding="utf-8")
    return markdown(table)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="chiasm bench",
        description="Measure OpenAI-compatible servers side by side, in interleaved rounds.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("urls", nargs="+", metavar="URL", help="URL or NAME=URL of a server, without /v1")
    add("--model", required=True, help="model to ask for, or NAME=MODEL,... by server")
    add("--api-key", default="", help="key that is sent to all servers")
    add("--workload", action="append", default=[], help=f"one of {', '.join(WORKLOADS)}; all")
    add("--concurrency", default="1,4,16", help="requests at one time, one cell for each number")
    add("--rounds", type=_positive, default=3, help="rounds over all cells and servers")
    add("--requests", type=_positive, default=4, help="least requests of a cell")
    add("--input-tokens", type=_positive, default=128, help="words of a prompt")
    add("--output-tokens", type=_positive, default=64, help="tokens of an answer")
    add("--image-size", type=_positive, default=448, help="side of a picture, in pixels")
    add("--seed", type=int, default=1, help="seed of words and pictures; new ones with another")
    add("--timeout-s", type=_positive, default=300, help="seconds that a request may take")
    add("--pid", action="append", default=[], help="NAME=PID of a server, to tell its memory")
    add("--json", default="", help="file for every round")
    add("--no-ignore-eos", action="store_true", help="for servers that refuse unknown fields")
    return parser


def _positive(text: str) -> int:
    number = int(text) if text.isascii() and text.isdigit() else 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number of at least 1")
    return number
