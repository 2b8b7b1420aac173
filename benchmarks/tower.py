"""One picture through the tower: transformers, our fused tower, and its bare matrix products.

The fused tower runs twice: as it is, and with torch in place of the compiled kernels.

Runs a random Qwen2.5-VL tower of the 3B model's sizes in bfloat16 on one picture of 448 x 448
pixels, in this process. The variants take turns within every round, so that a disturbance of the
machine meets all of them. The limit is the best rate at which any matrix product of the tower's
shapes ran::

    python -m benchmarks.tower
    python -m benchmarks.tower --quick
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import transformers

from chiasm.common.graph_recorder import GraphRecorder
from chiasm.common.packed_linear import PackedLinear
from chiasm.encoder.fused.grid_tower import GridTower
from chiasm.kernels.cpu.native import find_kernels
from chiasm.kernels.find_triton_kernels import find_triton_kernels

if TYPE_CHECKING:
    from collections.abc import Callable

SIDE = 448
PATCH = 14
GRID = SIDE // PATCH
NUM_PATCHES = GRID * GRID
SIZES: dict[str, Any] = {
    "depth": 32,
    "hidden_size": 1280,
    "num_heads": 16,
    "intermediate_size": 3420,
    "patch_size": PATCH,
    "window_size": 112,
    "fullatt_block_indexes": [7, 15, 23, 31],
    "out_hidden_size": 2048,
}
QUICK_SIZES = {**SIZES, "depth": 8, "fullatt_block_indexes": [7]}


class BareProducts:
    """The matrix products of one forward and nothing else, on packed weights of their own."""

    def __init__(self, sizes: dict[str, Any]) -> None:
        width, inner, out = (
            sizes[name] for name in ("hidden_size", "intermediate_size", "out_hidden_size")
        )
        self._depth: int = sizes["depth"]
        # The weights of all blocks, so that none stays in a cache.
        shapes = [(3 * width, width), (width, width), *[(inner, width)] * 2, (width, inner)]
        self._blocks = [[_random_linear(shape) for shape in shapes] for _ in range(self._depth)]
        self._ends = [
            (_random_linear((width, 3 * 2 * PATCH * PATCH)), NUM_PATCHES),
            (_random_linear((4 * width, 4 * width)), NUM_PATCHES // 4),
            (_random_linear((out, 4 * width)), NUM_PATCHES // 4),
        ]
        self.num_operations = count_operations(sizes)
        self.best_rate = 0.0

    def run(self) -> None:
        """Multiply once, and remember the best rate of a product of a block."""
        inputs = {
            layer.num_inputs: torch.ones(NUM_PATCHES, layer.num_inputs, dtype=torch.bfloat16)
            for layer in (*self._blocks[0], *(layer for layer, _ in self._ends))
        }
        for block in self._blocks:
            for layer in block:
                started = time.perf_counter()
                outputs = layer(inputs[layer.num_inputs])
                seconds = time.perf_counter() - started
                operations = 2 * NUM_PATCHES * layer.num_inputs * outputs.shape[1]
                self.best_rate = max(self.best_rate, operations / seconds)
        for layer, num_rows in self._ends:
            layer(inputs[layer.num_inputs][:num_rows])


def count_operations(sizes: dict[str, Any]) -> int:
    """Return the operations of all matrix products of one forward, those of scores left out."""
    width, inner, out = (
        sizes[name] for name in ("hidden_size", "intermediate_size", "out_hidden_size")
    )
    block = NUM_PATCHES * (4 * width * width + 3 * width * inner)
    embedding = NUM_PATCHES * width * 3 * 2 * PATCH * PATCH
    merger = NUM_PATCHES // 4 * (4 * width * 4 * width + out * 4 * width)
    return int(2 * (sizes["depth"] * block + embedding + merger))


def main() -> None:
    """Measure with one and two threads and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="eight blocks instead of 32")
    parser.add_argument("--rounds", type=int, default=9, help="rounds of every variant")
    arguments = parser.parse_args()
    sizes = QUICK_SIZES if arguments.quick else SIZES
    towers = make_towers(sizes, torch.device("cpu"))
    patches = torch.randn(NUM_PATCHES, 3 * 2 * PATCH * PATCH, dtype=torch.bfloat16)
    grid = torch.tensor([[1, GRID, GRID]])
    _print(
        [
            "| threads | transformers | fused without kernels | fused | bare products | ratio"
            " | products of fused | least time's rate | best rate of a product | share |",
            "|---|---|---|---|---|---|---|---|---|---|",
        ]
    )
    for num_threads in (1, 2):
        torch.set_num_threads(num_threads)
        products = BareProducts(sizes)
        runs: dict[str, Callable[[], object]] = {
            name: partial(tower, patches, grid_thw=grid) for name, tower in towers.items()
        }
        seconds = _measure({**runs, "products": products.run}, arguments.rounds)
        _print([_line(num_threads, seconds, products)])


def make_towers(sizes: dict[str, Any], device: torch.device) -> dict[str, torch.nn.Module]:
    """Return transformers' tower and the fused ones of equal sizes, on ``device``.

    On a CPU there are two of ours: without our compiled kernels and with them. On a GPU, one is
    launched kernel by kernel, and one replayed.
    """
    text = {
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "vocab_size": 8,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    config = transformers.Qwen2_5_VLConfig(vision_config=sizes, text_config=text)
    with device:
        plain, taken, other = (
            transformers.Qwen2_5_VLModel(config).visual.eval().to(torch.bfloat16) for _ in range(3)
        )
    if device.type != "cpu":
        kernels = find_triton_kernels(device, "benchmarks")
        replayed = GridTower(other, kernels, GraphRecorder(torch.device("cuda")))
        return {"transformers": plain, "fused": GridTower(taken), "replayed": replayed}
    fused = GridTower(other, find_kernels("auto"))
    return {"transformers": plain, "without kernels": GridTower(taken), "fused": fused}


@torch.inference_mode()
def _measure(runs: dict[str, Callable[[], object]], num_rounds: int) -> dict[str, list[float]]:
    """Return the seconds of each run by name, the first round left out."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(num_rounds + 1):
        for name, run in runs.items():
            started = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - started)
    return {name: values[1:] for name, values in seconds.items()}


def _random_linear(shape: tuple[int, int]) -> PackedLinear:
    return PackedLinear(torch.randn(shape, dtype=torch.bfloat16))


def _line(num_threads: int, seconds: dict[str, list[float]], products: BareProducts) -> str:
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    # The best against the best: a median would count the disturbances of one side only.
    rate = products.num_operations / min(seconds["fused"])
    cells = [
        str(num_threads),
        *(_spread(values) for values in seconds.values()),
        f"{medians['transformers'] / medians['fused']:.2f}",
        f"{100 * medians['products'] / medians['fused']:.0f} %",
        f"{rate / 1e12:.2f} TFLOP/s",
        f"{products.best_rate / 1e12:.2f} TFLOP/s",
        f"{100 * rate / products.best_rate:.0f} %",
    ]
    return f"| {' | '.join(cells)} |"


def _spread(seconds: list[float]) -> str:
    least, median, most = (
        1e3 * value for value in (min(seconds), statistics.median(seconds), max(seconds))
    )
    return f"{median:.0f} ms ({least:.0f} to {most:.0f})"


def _print(lines: list[str]) -> None:
    sys.stdout.write("\n".join(lines) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
