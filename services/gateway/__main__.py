"""Run the gateway: ``python -m chiasm.gateway``."""

from __future__ import annotations

from chiasm.common.launch import launch

if __name__ == "__main__":
    launch("chiasm.gateway.service")
