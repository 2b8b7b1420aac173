"""Our own vision towers: packed weights, batched windows, fused elementwise operations."""

from chiasm.common import torchvision_shim

# Modules below import parts of transformers that import torchvision.
torchvision_shim.install()
