"""How the threads of services wait, by what the libraries read when they are loaded."""

from __future__ import annotations

import os

# A waiting thread of libgomp spins this many rounds before it sleeps: long enough to bridge the gap
# between two operators, short enough to leave the core to a busy peer.
THREAD_ENV = {"GOMP_SPINCOUNT": "10000", "TOKENIZERS_PARALLELISM": "false"}


def set_thread_defaults() -> None:
    """Set what the user has not set, for libraries that this process has yet to load."""
    for key, value in THREAD_ENV.items():
        os.environ.setdefault(key, value)
