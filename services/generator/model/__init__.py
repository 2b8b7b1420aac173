"""The model: half-loaded decoder, attention over the paged KV cache, and the runner."""

from chiasm.common import torchvision_shim

# Modules below import parts of transformers that import torchvision.
torchvision_shim.install()
