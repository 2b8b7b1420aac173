"""Train, export and measure the small demo checkpoint under ``models/demo``."""

from chiasm.common import torchvision_shim

# NOTE: before the first import of transformers, which imports torchvision.
torchvision_shim.install()
