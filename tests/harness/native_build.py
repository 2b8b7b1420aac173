"""Compile the kernels for CPUs, with the flags of the package's install."""

from __future__ import annotations

import shutil
import subprocess
import tomllib
from pathlib import Path

_ROOT = Path(__file__).parents[2]


def find_compiler() -> str | None:
    """Return the path of a C++ compiler, or ``None``."""
    return shutil.which("g++")


def compile_kernels(folder: Path, *flags: str) -> Path:
    """Return a shared library of the kernels in ``folder``, compiled with ``flags`` besides."""
    project = tomllib.loads((_ROOT / "pyproject.toml").read_text("utf-8"))
    (extension,) = project["tool"]["setuptools"]["ext-modules"]
    library = folder / "kernels.so"
    sources = [str(_ROOT / source) for source in extension["sources"]]
    compiled = [str(folder / f"{index}.o") for index in range(len(sources))]
    compiler = find_compiler()
    assert compiler is not None, "asked for without a compiler"
    arguments = [*extension["extra-compile-args"], "-fPIC", "-Wall", "-Wextra", "-Wno-psabi"]
    for source, target in zip(sources, compiled, strict=True):
        subprocess.run([compiler, *arguments, *flags, "-c", source, "-o", target], check=True)
    # Without -fopenmp, as the install links: see the head of native.cpp.
    subprocess.run([compiler, "-shared", *compiled, *flags, "-o", str(library)], check=True)
    return library
