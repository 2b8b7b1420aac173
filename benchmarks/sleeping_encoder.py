"""The encoder with a tower that only sleeps: ``python -m benchmarks.sleeping_encoder SECONDS ...``.

What stands behind the seconds are the encoder's own flags. Every item takes that long in the tower
and becomes zeros, so that what is around the tower can be measured by itself.
"""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING

import torch

from chiasm.encoder import service
from chiasm.encoder.tower import Tower

if TYPE_CHECKING:
    from collections.abc import Sequence

    from chiasm.encoder.preprocess import TowerInputs


def main() -> None:
    """Run the encoder until it is told to stop."""
    seconds = float(sys.argv[1])

    def sleep(self: Tower, items: Sequence[TowerInputs]) -> list[torch.Tensor]:
        time.sleep(seconds * len(items))
        width = self.hidden_size * (1 + self.num_deepstack_levels)
        return [torch.zeros(item.num_rows, width) for item in items]

    Tower.encode = sleep  # type: ignore[method-assign]  # what this program is for
    service.main(sys.argv[2:])


if __name__ == "__main__":
    main()
