"""The encoder beside what is wanted of it: one run, medians and spread, one Markdown table.

Measures decoding by one worker and by two, the stages around the tower, how late the event loop is
while large pictures arrive, what a second encoder brings, and what a known picture saves. Towers
sleep where only what is around them counts (``benchmarks/sleeping_encoder.py``); checkpoints are
random ones made at run time::

    python -m benchmarks.encoder
"""

from __future__ import annotations

import asyncio
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks import encoder_cells, encoder_report, encoder_requests
from benchmarks.photos import photo
from chiasm.common.logging import configure_logging
from tests.fakes.checkpoints import TextSizes, TowerSizes, make_bfloat16_qwen2_vl

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from benchmarks.encoder_report import Row

# Embeddings of up to 1280 rows of 1024, as a model of the 2B class has; the tower is not used.
TEXT = TextSizes(1, 1024, 256, 2, 1000)
TOWER = TowerSizes(max_pixels=1280 * 28 * 28)


def main() -> None:
    """Run all cells and print each line of the table as soon as it is known."""
    configure_logging("benchmark", "error")
    with tempfile.TemporaryDirectory() as directory:
        asyncio.run(_measure(make_bfloat16_qwen2_vl(Path(directory) / "model", TEXT, tower=TOWER)))


async def _measure(model: Path) -> None:
    width, height = encoder_cells.LARGE_WIDTH, encoder_cells.LARGE_HEIGHT
    large, medium = photo(width, height, 90), photo(width, height, 75)
    pictures = [
        ("448x448 JPEG", photo(448, 448, 90), 25.0, 30),
        (f"{width}x{height} JPEG", medium, 60.0, 15),
        (f"{width}x{height} JPEG", large, 60.0, 15),
    ]
    cells: list[Callable[[], Awaitable[list[Row]]]] = [
        lambda: encoder_cells.measure_decoding(large),
        lambda: encoder_cells.measure_stages(model, pictures),
        lambda: encoder_cells.measure_two_encoders(model),
        lambda: encoder_requests.measure_fan_out(model),
        encoder_requests.measure_hits,
    ]
    _print(encoder_report.head_lines())
    for cell in cells:
        _print([encoder_report.line(row) for row in await cell()])
    _print(["", f"At the end: {encoder_report.load_text()}."])


def _print(lines: list[str]) -> None:
    sys.stdout.write("\n".join(lines) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
