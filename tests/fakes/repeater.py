"""Stands for a recorder of CUDA graphs where there is no GPU: the work is done again."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Callable

    from chiasm.common.graph_recorder import Result


class Repeater:
    """Repeats work, its results in the same memory, and counts how often that of each size is.

    Attributes:
        num_repeats: Repetitions by the rows of the first result.
    """

    def __init__(self) -> None:
        self.num_repeats: Counter[int] = Counter()

    def __call__(self, work: Callable[[], Result]) -> Callable[[], Result]:
        """See ``Recorder``."""
        result = work()
        places = _tensors_of(result)

        @torch.inference_mode()
        def repeat() -> Result:
            self.num_repeats[len(places[0])] += 1
            for place, value in zip(places, _tensors_of(work()), strict=True):
                place.copy_(value)
            return result

        return repeat


def _tensors_of(result: object) -> list[torch.Tensor]:
    results = result if isinstance(result, list) else [result]
    return [one for one in results if isinstance(one, torch.Tensor)]
