"""Take norms of transformers' towers."""

from __future__ import annotations

import torch
from torch.nn.functional import layer_norm

from chiasm.common.rms_norm import RMSNorm
from chiasm.encoder.fused.description import UnsupportedTowerError
from chiasm.encoder.fused.linear import take_parameter


class LayerNorm:
    """A layer norm over the last dimension."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor, epsilon: float) -> None:
        """Keep ``weight`` and ``bias``, [width]; ``epsilon`` is added to the variance."""
        self._weight = weight
        self._bias = bias
        self._epsilon = epsilon

    @property
    def num_bytes(self) -> int:
        """Bytes of weight and bias."""
        return self._weight.nbytes + self._bias.nbytes

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        """Return the normed rows, [..., width], in the dtype of ``rows``, in new memory."""
        return layer_norm(rows, self._weight.shape, self._weight, self._bias, self._epsilon)


Norm = LayerNorm | RMSNorm


def check_norm(module: torch.nn.Module) -> None:
    """Check that ``take_norm`` knows ``module``.

    Raises:
        UnsupportedTowerError: It does not.
    """
    if type(module) is torch.nn.LayerNorm and module.bias is not None:
        return
    if not hasattr(module, "variance_epsilon"):
        raise UnsupportedTowerError(f"{type(module).__name__} is no norm with a known formula")


def take_norm(module: torch.nn.Module) -> Norm:
    """Move the parameters of a norm that ``check_norm`` has accepted into ours."""
    if isinstance(module, torch.nn.LayerNorm):
        return LayerNorm(
            take_parameter(module, "weight"), take_parameter(module, "bias"), module.eps
        )
    epsilon = module.variance_epsilon
    assert isinstance(epsilon, float), "an epsilon is a number"
    return RMSNorm(take_parameter(module, "weight"), epsilon)
