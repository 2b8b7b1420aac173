"""The tree that the structure tests look at."""

from __future__ import annotations

import ast
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

ROOT = Path(__file__).parents[2]
OWN_FOLDERS = (
    "services",
    "chiasm/cli",
    "kernels",
    "tests",
    "examples",
    "benchmarks",
    "requirements",
)


@dataclass(frozen=True)
class SourceFile:
    """A Python file of the repository; generated stubs are none."""

    path: Path

    def __str__(self) -> str:
        return self.path.relative_to(ROOT).as_posix()

    @cached_property
    def text(self) -> str:
        """Return the content."""
        return self.path.read_text(encoding="utf-8")

    @cached_property
    def tree(self) -> ast.Module:
        """Return the syntax tree."""
        return ast.parse(self.text, str(self.path))

    @property
    def module(self) -> str:
        """Return the name it is imported by, such as ``chiasm.common.config``."""
        parts = self.path.relative_to(ROOT).with_suffix("").parts
        if parts[0] == "services":
            parts = ("chiasm", *parts[1:])
        elif parts[0] == "kernels":
            parts = ("chiasm", *parts)
        return ".".join(parts).removesuffix(".__init__")

    @cached_property
    def imports(self) -> frozenset[str]:
        """Return the full name of every module that is imported anywhere in the file."""
        found: set[str] = set()
        package = self.module.split(".")
        if self.path.name != "__init__.py":
            package = package[:-1]
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Import):
                found.update(alias.name for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                base = package[: len(package) - node.level + 1] if node.level else []
                module = ".".join([*base, *([node.module] if node.module else [])])
                found.add(module)
                found.update(f"{module}.{alias.name}" for alias in node.names)
        return frozenset(found)


def source_files(*folders: str) -> list[SourceFile]:
    """Return the Python files below the folders; below all of our own if none is given."""
    paths = [
        path
        for folder in folders or OWN_FOLDERS
        for path in sorted((ROOT / folder).rglob("*.py"))
        if "__pycache__" not in path.parts
    ]
    if not folders:
        paths.append(ROOT / "chiasm" / "__init__.py")
    return [SourceFile(path) for path in paths]
