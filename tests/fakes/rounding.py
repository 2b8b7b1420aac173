"""How far a Triton kernel may be from torch's operators between the products of a layer."""

from __future__ import annotations

import torch

# Three roundings: the interpreter truncates to bfloat16, and torch rounds to it twice or thrice.
TOLERANCES = {torch.float32: 5e-6, torch.float16: 3 * 2**-10, torch.bfloat16: 3 * 2**-7}
DTYPES = tuple(TOLERANCES)
# Of rows and of weights; families that round once have float32 weights.
DTYPE_PAIRS = (*zip(DTYPES, DTYPES, strict=True), (torch.bfloat16, torch.float32))


def random_rows(seed: int, *shape: int, dtype: torch.dtype) -> torch.Tensor:
    """Return numbers around zero; the same for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    return (3.0 * torch.randn(shape, generator=generator)).to(dtype)


def assert_close(output: torch.Tensor, expected: torch.Tensor, size: float = 1.0) -> None:
    """Check dtype, shape and values.

    Args:
        output: On any device.
        expected: On any device.
        size: Of the values whose difference a result may be.
    """
    rtol = TOLERANCES[expected.dtype]
    torch.testing.assert_close(output.cpu(), expected.cpu(), rtol=rtol, atol=rtol * size)
