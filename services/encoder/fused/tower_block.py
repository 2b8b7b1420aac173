"""Compute one block of a fused tower."""

from __future__ import annotations

from typing import TYPE_CHECKING

from chiasm.encoder.fused.description import UnsupportedTowerError
from chiasm.encoder.fused.feed_forward import FeedForward
from chiasm.encoder.fused.linear import check_linears, take_weights
from chiasm.encoder.fused.norm import check_norm, take_norm
from chiasm.encoder.fused.rotary import pair_order

if TYPE_CHECKING:
    import torch

    from chiasm.encoder.fused.block_operators import BlockOperators
    from chiasm.encoder.fused.description import BlockDescription
    from chiasm.encoder.fused.segments import Segments


class TowerBlock:
    """An attention block and a feed-forward block, each added to what it reads."""

    def __init__(
        self, module: torch.nn.Module, description: BlockDescription, operators: BlockOperators
    ) -> None:
        """Take the weights of ``module``, which ``check_block`` has accepted."""
        self._operators = operators
        self._num_heads = description.num_heads
        attention_norm, mlp_norm = (module.get_submodule(name) for name in description.norms)
        self._norms = [take_norm(attention_norm), take_norm(mlp_norm)]
        self._norm_attention, self._norm_mlp = map(operators.norm, self._norms)
        self._output = operators.linear(*take_weights(module, (description.output,)))
        order = None
        if description.has_rotary:
            order = pair_order(self._num_heads, description.head_dim)
        self._qkv = operators.linear(*take_weights(module, description.qkv, order))
        self._feed_forward = FeedForward(module, description, operators)

    @property
    def num_bytes(self) -> int:
        """Bytes of all weights."""
        parts = [*self._norms, self._qkv, self._output, self._feed_forward]
        return sum(part.num_bytes for part in parts)

    def forward(
        self, hidden: torch.Tensor, segments: Segments, rotation: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Compute the block.

        Args:
            hidden: [num_rows, hidden_size], dtype of the tower.
            segments: Which rows see each other.
            rotation: See ``make_rotation``; ``None`` for towers without.

        Returns:
            The hidden states behind the block, as ``hidden``.
        """
        qkv = self._qkv(self._norm_attention(hidden))
        heads = qkv.view(len(hidden), 3, self._num_heads, -1)
        if rotation is not None:
            self._operators.rotate(heads, rotation)
        hidden = self._output.add(self._operators.attend(heads, segments), hidden)
        return self._feed_forward.add(self._norm_mlp(hidden), hidden)


def check_block(module: torch.nn.Module, description: BlockDescription) -> None:
    """Check that a ``TowerBlock`` of ``module`` would find and use every weight.

    Raises:
        UnsupportedTowerError: A module is missing, or of a kind that it does not compute, or there
            is one more than the description knows. Nothing was changed.
    """
    linears = (*description.qkv, description.output, *description.inner, description.down)
    check_linears(module, linears, has_bias=description.has_bias)
    owners = {name.rpartition(".")[0] for name, _ in module.named_parameters()}
    if unknown := owners.symmetric_difference((*linears, *description.norms)):
        raise UnsupportedTowerError(
            f"blocks do not have the expected weights; differing: {', '.join(sorted(unknown))}"
        )
    for name in description.norms:
        check_norm(module.get_submodule(name))
