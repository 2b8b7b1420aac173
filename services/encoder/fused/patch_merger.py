"""Join neighbouring patches into one row of the language model's width."""

from __future__ import annotations

from typing import TYPE_CHECKING

from chiasm.encoder.fused.linear import check_linears, take_linears, take_weights
from chiasm.encoder.fused.norm import check_norm, take_norm

if TYPE_CHECKING:
    import torch

    from chiasm.encoder.fused.block_operators import BlockOperators

_LAYOUTS = {
    "qwen2_vl_vision": ("ln_q", "mlp.0", "mlp.2"),
    "qwen2_5_vl_vision": ("ln_q", "mlp.0", "mlp.2"),
    "qwen3_vl_vision": ("norm", "linear_fc1", "linear_fc2"),
}


class PatchMerger:
    """A norm and two linear layers with a GELU between them."""

    def __init__(self, module: torch.nn.Module, model_type: str, operators: BlockOperators) -> None:
        """Take the weights of ``module``, which ``check_merger`` has accepted."""
        norm, first, second = _LAYOUTS[model_type]
        self._is_norm_last = bool(getattr(module, "use_postshuffle_norm", False))
        self._norm = take_norm(module.get_submodule(norm))
        self._norm_rows = operators.norm(self._norm)
        self._first = take_linears(module, (first,))
        self._second = operators.linear(*take_weights(module, (second,)))

    @property
    def num_bytes(self) -> int:
        """Bytes of all weights."""
        return self._norm.num_bytes + self._first.num_bytes + self._second.num_bytes

    def __call__(self, patches: torch.Tensor) -> torch.Tensor:
        """Return one row for every block of patches.

        Args:
            patches: Patches of a block one after another. [num_patches, hidden_size].

        Returns:
            [num_patches / patches of a block, width of the language model].
        """
        width = self._first.num_inputs
        if self._is_norm_last:
            rows = self._norm_rows(patches.view(-1, width))
        else:
            rows = self._norm_rows(patches).view(-1, width)
        return self._second(self._first.activate(rows, "gelu"))


def check_merger(module: torch.nn.Module, model_type: str) -> None:
    """Check that a ``PatchMerger`` knows the modules of ``module``; nothing is changed.

    Raises:
        UnsupportedTowerError: It does not.
    """
    norm, first, second = _LAYOUTS[model_type]
    check_linears(module, (first, second))
    check_norm(module.get_submodule(norm))
