"""Read the flags of ``chiasm bench`` and run it."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from chiasm.cli.bench import BenchPlan, as_json, make_endpoints, markdown, plan_cells, run_rounds
from chiasm.cli.bench_load import Sizes


def run_bench(argv: list[str]) -> str:
    """Run the benchmark that ``argv`` asks for and return its table."""
    parser = argparse.ArgumentParser(prog="chiasm bench")
    parser.add_argument("urls", nargs="+", help="URL or NAME=URL, without /v1")
    parser.add_argument("--model", required=True, help="or NAME=MODEL,...")
    for flag in ("--workload", "--pid"):
        parser.add_argument(flag, action="append", default=[])
    for flag, text in (("--concurrency", "1,4,16"), ("--api-key", ""), ("--json", "")):
        parser.add_argument(flag, default=text)
    numbers = {"rounds": 3, "requests": 4, "input-tokens": 128, "output-tokens": 64}
    for flag, number in {**numbers, "image-size": 448, "seed": 1, "timeout-s": 300}.items():
        parser.add_argument(f"--{flag}", type=int, default=number)
    parser.add_argument("--no-ignore-eos", action="store_true")
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
