"""Run the encoder: ``python -m chiasm.encoder``."""

from __future__ import annotations

from chiasm.common.launch import launch

if __name__ == "__main__":
    launch("chiasm.encoder.service")
