"""Run the generator: ``python -m chiasm.generator``."""

from __future__ import annotations

from chiasm.common.launch import launch

if __name__ == "__main__":
    launch("chiasm.generator.service")
