"""Fetch the pictures that Pillow tests itself with, out of its own source distribution."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import PIL

if TYPE_CHECKING:
    from collections.abc import Iterator

_FOLDER = "/Tests/images/"
_DOWNLOAD_TIMEOUT_S = 300.0


class CorpusError(Exception):
    """The corpus cannot be had; the text says why."""


def fetch_corpus() -> Path:
    """Return the source distribution of the installed Pillow, from a cache or the package index.

    Raises:
        CorpusError: It cannot be downloaded.
    """
    root = os.environ.get("XDG_CACHE_HOME")
    cache = (Path(root) if root else Path.home() / ".cache") / "chiasm-tests"
    archive = cache / f"pillow-{PIL.__version__}.tar.gz"
    if not archive.exists():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as folder:
            _download(Path(folder))
            (Path(folder) / archive.name).replace(archive)
    return archive


def read_corpus(archive: Path) -> Iterator[tuple[str, bytes]]:
    """Yield name and content of every file below ``Tests/images``, in the order of the archive."""
    with tarfile.open(archive) as source:
        for member in source:
            file = source.extractfile(member) if _FOLDER in member.name else None
            if file is not None:
                with file:
                    yield member.name.partition(_FOLDER)[2], file.read()


def _download(folder: Path) -> None:
    # Metadata are built by the way, in an environment of their own; nothing is installed here.
    command = [
        *(sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"),
        *("--no-binary", "pillow", f"pillow=={PIL.__version__}", "--dest", str(folder)),
    ]
    try:
        subprocess.run(
            command, check=True, capture_output=True, text=True, timeout=_DOWNLOAD_TIMEOUT_S
        )
    except subprocess.TimeoutExpired:
        raise CorpusError("The download of Pillow's source distribution took too long.") from None
    except subprocess.CalledProcessError as error:
        raise CorpusError(
            f"Pillow's source distribution could not be downloaded: {error.stderr[-500:]}"
        ) from error
