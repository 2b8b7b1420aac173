"""Triton kernels compile for devices that are not here, and fit their registers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import TypedDict

import pytest

ROOT = Path(__file__).parents[3]
# Registers of a thread: with more than these, fewer programs than intended share a processor.
MAX_REGISTERS = {
    "_paged_decode_kernel": 168,
    "_join_splits_kernel": 64,
    "_paged_prefill_kernel": 255,
    "_add_rms_norm_kernel": 128,
    "_gated_activation_kernel": 64,
    "_rope_store_kv_kernel": 128,
    "_turn_pairs_kernel": 64,
}
# Bytes that a program may have: of the smallest device of each generation.
MAX_SHARED = {80: 99 << 10, 90: 227 << 10, 100: 227 << 10}
# ptxas keeps a few bytes there for some shapes, with registers to spare.
MAX_STACK = 16
TYPICAL = ("decode,bfloat16,128,4,0,0", "prefill,bfloat16,128,4,0,0", "layer,bfloat16,128,4,0,0")
AWKWARD = (
    *("decode,float16,80,1,1024,0", "decode,float32,128,4,0,0", "decode,bfloat16,256,2,4096,50"),
    *("decode,bfloat16,64,16,0,0", "decode,float32,256,4,0,0", "decode,bfloat16,64,71,0,0"),
    *("prefill,float16,80,7,0,0", "prefill,float32,128,4,0,0", "prefill,bfloat16,256,2,0,50"),
    *("layer,float32,256,16,0,0", "layer,float16,80,1,0,0", "layer,bfloat16,128,32,0,0"),
    *("prefill,bfloat16,64,8,0,0", "prefill,float32,256,4,0,0", "prefill,bfloat16,64,71,0,0"),
)


class Usage(TypedDict):
    """What one kernel takes; see ``tests.harness.triton_compile``."""

    name: str
    case: str
    architecture: int
    shared: int
    reg: int
    stack: int
    local: int


def compile_kernels(cases: tuple[str, ...], cache: Path) -> list[Usage]:
    """Compile what the cases launch in a process without the interpreter; none may spill."""
    pytest.importorskip("triton")
    env = {**os.environ, "TRITON_CACHE_DIR": str(cache)}
    env.pop("TRITON_INTERPRET", None)
    done = subprocess.run(
        [sys.executable, "-m", "tests.harness.triton_compile", *cases],
        cwd=ROOT,
        env=env,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found: list[Usage] = [json.loads(line) for line in done.stdout.splitlines()]
    assert {(one["case"], one["architecture"]) for one in found} == {
        (case, architecture) for case in cases for architecture in MAX_SHARED
    }
    for kernel in found:
        assert kernel["stack"] <= MAX_STACK, f"spills: {kernel}"
        assert kernel["local"] == 0, kernel
        assert kernel["shared"] <= MAX_SHARED[kernel["architecture"]], kernel
    return found


def test_kernels_compile_for_every_architecture_without_spills(tmp_path: Path) -> None:
    for kernel in compile_kernels(TYPICAL, tmp_path):
        assert kernel["reg"] <= MAX_REGISTERS[kernel["name"]], kernel
        assert kernel["stack"] == 0, kernel


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_kernels_of_any_shape_compile_without_spills(tmp_path: Path) -> None:
    assert compile_kernels(AWKWARD, tmp_path)
