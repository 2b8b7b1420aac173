"""What kernels can do that compute a layer between its matrix products, besides attention."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol, runtime_checkable

if TYPE_CHECKING:
    import torch


@runtime_checkable
class LayerKernels(Protocol):
    """Kernels that take tensors alone; all tensors lie on one device."""

    def add_rms_norm(
        self,
        hidden: torch.Tensor,
        addend: torch.Tensor | None,
        weight: torch.Tensor,
        epsilon: float,
        scale: float,
    ) -> torch.Tensor:
        """Add ``scale`` times ``addend`` to ``hidden``, in place, and return the normed sum.

        Args:
            hidden: [num_rows, width], contiguous.
            addend: As ``hidden``, or ``None``.
            weight: [width], dtype of ``hidden`` or float32.
            epsilon: Added to the mean square.
            scale: Factor of the addend.
        """
        ...

    def can_gate(self, activation: str) -> bool:
        """Return whether ``gate`` knows a function, named as transformers names it."""
        ...

    def gate(self, gate_up: torch.Tensor, activation: str) -> torch.Tensor:
        """Multiply the second half of rows by a function of the first.

        Args:
            gate_up: [num_rows, 2 * width], contiguous.
            activation: The function.

        Returns:
            [num_rows, width], contiguous.
        """
        ...

    def rope_store(
        self,
        qkv: torch.Tensor,
        tables: tuple[torch.Tensor, torch.Tensor],
        slots: torch.Tensor,
        cached: tuple[torch.Tensor, torch.Tensor],
        norm: tuple[torch.Tensor, float] | None,
    ) -> torch.Tensor:
        """Norm and turn queries and keys, and write keys and values to the cache.

        Args:
            qkv: Heads of queries, keys and values.
                [num_tokens, (num_q_heads + 2 * num_kv_heads) * head_dim], contiguous.
            tables: Cosines, and sines with the first half negated. [num_tokens, ..., rotary_dim].
            slots: Slot of every token, each once; what has a negative one is not kept.
                [num_tokens], int64.
            cached: Keys and values. [num_slots, num_kv_heads, head_dim], contiguous.
            norm: Weight, [num_q_heads + num_kv_heads, head_dim], and epsilon, or ``None``.

        Returns:
            Queries and keys. [num_tokens, num_q_heads + num_kv_heads, head_dim].
        """
        ...
