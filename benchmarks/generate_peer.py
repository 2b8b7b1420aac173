"""Serve ``transformers`` ``generate`` on a checkpoint from a process of its own.

Reads one JSON object per line, ``{"prompts": [[id, ...], ...], "num_tokens": n, "is_batch": b}``,
and answers each with the seconds that it took, as a JSON number::

    python -m benchmarks.generate_peer MODEL THREADS
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from typing import TYPE_CHECKING, Any

from chiasm.cli.thread_env import THREAD_ENV
from chiasm.common import torchvision_shim

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path


class GeneratePeer:
    """The process, with as many threads as the generator that it is compared with."""

    def __init__(self, model: Path, num_threads: int) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.generate_peer", str(model), str(num_threads)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": str(num_threads), **THREAD_ENV},
        )

    def generate(self, prompts: Sequence[Sequence[int]], num_tokens: int, *, batch: bool) -> float:
        """Return the seconds to generate ``num_tokens`` for each prompt.

        Args:
            prompts: Token ids.
            num_tokens: Tokens to generate for each.
            batch: Whether they are computed as one padded batch; otherwise one after the other.
        """
        assert self._process.stdin is not None, "stdin is a pipe"
        assert self._process.stdout is not None, "stdout is a pipe"
        job = {"prompts": prompts, "num_tokens": num_tokens, "is_batch": batch}
        self._process.stdin.write(json.dumps(job) + "\n")
        self._process.stdin.flush()
        return float(self._process.stdout.readline())

    def stop(self) -> None:
        """End the process."""
        self._process.communicate(timeout=60.0)


def main() -> None:
    """Answer the lines of standard input until it ends."""
    # Here, because the parent needs no torch.
    import torch  # noqa: PLC0415

    torchvision_shim.install()
    import transformers  # noqa: PLC0415 - the shim must run before

    torch.set_num_threads(int(sys.argv[2]))
    model: Any = transformers.AutoModelForImageTextToText.from_pretrained(sys.argv[1])
    model.eval()
    for line in sys.stdin:
        job = json.loads(line)
        prompts = job["prompts"]
        groups = [prompts] if job["is_batch"] else [[prompt] for prompt in prompts]
        start = time.perf_counter()
        for group in groups:
            _generate(model, group, job["num_tokens"])
        sys.stdout.write(f"{time.perf_counter() - start}\n")
        sys.stdout.flush()


def _generate(model: Any, prompts: list[list[int]], num_tokens: int) -> None:
    import torch  # noqa: PLC0415 - as above

    width = max(len(prompt) for prompt in prompts)
    padding = [[0] * (width - len(prompt)) for prompt in prompts]
    token_ids = [[*pad, *prompt] for pad, prompt in zip(padding, prompts, strict=True)]
    mask = [[*pad, *(1 for _ in prompt)] for pad, prompt in zip(padding, prompts, strict=True)]
    output = model.generate(
        input_ids=torch.tensor(token_ids),
        attention_mask=torch.tensor(mask),
        max_new_tokens=num_tokens,
        min_new_tokens=num_tokens,
        do_sample=False,
    )
    assert output.shape == (len(prompts), width + num_tokens)


if __name__ == "__main__":
    main()
