"""The gateway runs without torch, transformers and everything that brings them."""

from __future__ import annotations

import subprocess
import sys

FORBIDDEN = ("torch", "transformers", "torchvision", "triton", "safetensors", "PIL", "aiohttp")
PROGRAM = (
    "import sys, chiasm.gateway.service;"
    f"print([name for name in {FORBIDDEN!r} if name in sys.modules])"
)


def test_the_gateway_imports_no_model_library() -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True, timeout=30
    )
    assert done.stdout.strip() == "[]"
