r"""Write the lock files from what is installed in the running environment.

``python requirements/lock.py`` writes ``cpu.lock`` and ``gateway.lock``. With ``--cuda REPORT`` it
writes ``cuda.lock`` and ``triton.lock`` too, from the report of a resolution that installs
nothing::

    pip install --dry-run --ignore-installed --only-binary :all: --report REPORT \
        torch==2.13.0 torchvision==0.28.0
"""

from __future__ import annotations

import argparse
import json
from importlib.metadata import distribution
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

_FOLDER = Path(__file__).parent
_PROJECT = "chiasm"
_HEAD = """\
# Pinned versions for Python 3.11 on Linux; made by requirements/lock.py, do not edit.
# Source: requirements/{name}.in. Install with: pip install --no-deps -r requirements/{name}.lock
"""
_CPU_HEAD = """\
# torchvision's wheel declares a CUDA torch, hence --no-deps; torch may be any build of its version.
"""
_CUDA_HEAD = """\
# Made without a GPU: the pins of cpu.lock, and for torch, triton and the CUDA libraries what pip
# resolves for torch's default build. Nothing here was installed by those who wrote the file.
"""
_TRITON_HEAD = """\
# For the tests, beside cpu.lock.
"""


def main() -> None:
    """Write the lock files."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--cuda", type=Path, help="pip's report of a resolution of torch")
    arguments = parser.parse_args()
    cpu = _pins("cpu")
    _write("cpu", _CPU_HEAD, cpu)
    _write("gateway", "", _pins("gateway"))
    if arguments.cuda:
        cuda = {**_reported(arguments.cuda), **cpu}
        _write("cuda", _CUDA_HEAD, cuda)
        _write("triton", _TRITON_HEAD, {"triton": cuda["triton"]})


def _pins(name: str) -> dict[str, str]:
    """Return the version of every distribution that ``<name>.in`` needs, directly or not."""
    lines = (_FOLDER / f"{name}.in").read_text(encoding="utf-8").splitlines()
    pending = [Requirement(line) for line in lines if line and not line.startswith("#")]
    pending.append(Requirement("setuptools"))
    pins: dict[str, str] = {}
    seen: set[tuple[str, frozenset[str]]] = set()
    while pending:
        requirement = pending.pop()
        key = (canonicalize_name(requirement.name), frozenset(requirement.extras))
        if key in seen:
            continue
        seen.add(key)
        installed = distribution(requirement.name)
        if key[0] != _PROJECT:
            pins[key[0]] = Version(installed.version).public
        pending += _needed(installed.requires or [], requirement.extras)
    return pins


def _needed(lines: list[str], extras: set[str]) -> list[Requirement]:
    """Return the requirements that hold here for a distribution with ``extras``."""
    requirements = [Requirement(line) for line in lines]
    return [
        requirement
        for requirement in requirements
        if requirement.marker is None
        or any(requirement.marker.evaluate({"extra": extra}) for extra in {"", *extras})
    ]


def _reported(report: Path) -> dict[str, str]:
    found = json.loads(report.read_text(encoding="utf-8"))["install"]
    return {
        canonicalize_name(item["metadata"]["name"]): item["metadata"]["version"] for item in found
    }


def _write(name: str, head: str, pins: dict[str, str]) -> None:
    lines = [f"{project}=={version}\n" for project, version in sorted(pins.items())]
    (_FOLDER / f"{name}.lock").write_text(
        _HEAD.format(name=name) + head + "".join(lines), encoding="utf-8"
    )


if __name__ == "__main__":
    main()
