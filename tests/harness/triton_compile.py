"""Compile Triton kernels ahead of time for devices that are not here, and read what they take.

A program of its own, because it must run without the interpreter: ``python -m
tests.harness.triton_compile CASE...`` prints one line of JSON for each kernel that a case launches
and each architecture. A case is ``kernel,dtype,head_dim,group,window,softcap``.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import triton
import triton.backends.nvidia
from triton.backends.compiler import GPUTarget

from chiasm.kernels.cache_kernels import DecodeRule, PrefillRule
from chiasm.kernels.gated_activation import gated_activation
from chiasm.kernels.paged_decode_attention import paged_decode_attention
from chiasm.kernels.paged_prefill_attention import paged_prefill_attention
from chiasm.kernels.rms_norm import add_rms_norm
from chiasm.kernels.rope_store_kv import rope_store_kv
from chiasm.kernels.turn_pairs import turn_pairs

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

ARCHITECTURES = (80, 90, 100)
_BLOCK_SIZE = 16
_NUM_KV_HEADS = 2
_NUM_BLOCKS = 64
_TOOLS = Path(triton.backends.nvidia.__file__).parent / "bin"


class _AbsentDriver:
    """Stands for the driver of a device that is not here; the device's number is its target."""

    def __init__(self) -> None:
        self.architecture = ARCHITECTURES[0]

    def get_current_target(self) -> Any:
        return GPUTarget("cuda", self.architecture, 32)

    def get_current_device(self) -> int:
        return self.architecture

    def get_current_stream(self, device: int) -> int:
        return 0


def main(cases: list[str]) -> None:
    """Compile what each case launches and print what it takes."""
    driver = _AbsentDriver()
    triton.runtime.driver.set_active(driver)
    compiled: list[Any] = []

    def launch(kernel: Any, grid: object) -> Callable[..., None]:
        return lambda *values, **named: compiled.append(kernel.warmup(*values, grid=grid, **named))

    triton.JITFunction.__getitem__ = launch
    for architecture in ARCHITECTURES:
        driver.architecture = architecture
        for case in cases:
            compiled.clear()
            _launch(*case.split(","))
            for kernel in compiled:
                usage = _read_usage(kernel.asm["cubin"])
                found = {"name": kernel.metadata.name, "shared": kernel.metadata.shared}
                found["case"], found["architecture"] = case, architecture
                print(json.dumps(found | usage), flush=True)


def _launch(name: str, *values: str) -> None:
    """Call a launcher with tensors like those of a step."""
    dtype = getattr(torch, values[0])
    head_dim, group, window = map(int, values[1:4])
    softcap = float(values[4])
    query = torch.zeros(64, group * _NUM_KV_HEADS, head_dim, dtype=dtype)
    keys, values_ = (
        torch.zeros(_NUM_BLOCKS * _BLOCK_SIZE, _NUM_KV_HEADS, head_dim, dtype=dtype)
        for _ in range(2)
    )
    if name == "layer":
        _launch_layer(query)
        return
    if name == "decode":
        contexts = (torch.zeros(64, 64, dtype=torch.int64), torch.ones(64, dtype=torch.int64))
        decode_rule = DecodeRule(_BLOCK_SIZE, 0.1, window, softcap)
        for num_splits in (1, 3):
            paged_decode_attention(query, (keys, values_), contexts, decode_rule, num_splits)
        return
    chunks, tables = torch.tensor([[0, 64]]), torch.zeros(1, 64, dtype=torch.int64)
    seen = torch.zeros(64, 2, dtype=torch.int64)
    rule = PrefillRule(_BLOCK_SIZE, 0.1, softcap)
    output = torch.empty_like(query)
    paged_prefill_attention(query, (keys, values_), (chunks, tables, seen), rule, output)


def _launch_layer(query: torch.Tensor) -> None:
    """Call what lies between the matrix products; rows are as wide as all queries of a token."""
    num_tokens, num_q_heads, head_dim = query.shape
    rows = query.flatten(1)
    add_rms_norm(rows, rows, rows[0], 1e-6)
    gated_activation(rows, "silu")
    gated_activation(rows, "gelu_pytorch_tanh")
    heads = torch.zeros(num_tokens, num_q_heads + 2, head_dim, dtype=query.dtype)
    cached = (heads[:, :1].contiguous(),) * 2
    tables = (torch.zeros(num_tokens, head_dim, dtype=query.dtype),) * 2
    slots = torch.arange(num_tokens)
    norm = (heads[0, 1:], 1e-6)
    rope_store_kv(heads.flatten(1), tables, slots, cached, norm)
    turn_pairs(heads, num_q_heads, torch.zeros(num_tokens, head_dim // 2, dtype=torch.complex64))


def _read_usage(cubin: bytes) -> dict[str, int]:
    """Return registers of a thread, and bytes of its stack and of local memory."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(_TOOLS / "cuobjdump"), "-res-usage", file.name]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    (line,) = (line for line in done.stdout.splitlines() if "REG:" in line)
    found = dict(re.findall(r"(\w+):(\d+)", line))
    return {name.lower(): int(found[name]) for name in ("REG", "STACK", "LOCAL")}


if __name__ == "__main__":
    main(sys.argv[1:])
