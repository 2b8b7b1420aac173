"""How the threads of services wait, by what the libraries read when they are loaded."""

from __future__ import annotations

import os

# A waiting thread of libgomp spins this many rounds before it sleeps: long enough to bridge the gap
# between two operators, short enough to leave the core to a busy peer. "active" does not mean
# endless beside it: it means 1,000 rounds, not 100, where a process has more threads than cores.
THREAD_ENV = {
    "GOMP_SPINCOUNT": "10000",
    "OMP_WAIT_POLICY": "active",
    "TOKENIZERS_PARALLELISM": "false",
}


def set_thread_defaults() -> None:
    """Set what the user has not set, for libraries that this process has yet to load."""
    for key, value in THREAD_ENV.items():
        os.environ.setdefault(key, value)
