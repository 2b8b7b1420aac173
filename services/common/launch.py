"""Start a service, and keep the garbage collector away from what lives as long as it does.

torch and transformers bring 400,000 objects. A full collection looks at each of them while no other
thread runs: 0.2 s in which no stream gets a token. While modules are imported it finds nothing.
"""

from __future__ import annotations

import gc
import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence


def launch(module: str, argv: Sequence[str] | None = None) -> None:
    """Import ``module`` and call its ``main``.

    Args:
        module: Full name of the module.
        argv: Flags, without the program's name; the process's own if ``None``.
    """
    gc.disable()
    try:
        main = importlib.import_module(module).main
        gc.freeze()
    finally:
        gc.enable()
    main(argv)


def keep_loaded() -> None:
    """Let go of what loading has left behind; what is still there is never looked at again.

    Call it once, when all is loaded.
    """
    gc.collect()
    gc.freeze()
