"""No file, function or parameter list is longer than the style guide allows."""

from __future__ import annotations

import ast
from typing import TYPE_CHECKING

import pytest

from tests.structure.tree import SourceFile, source_files

if TYPE_CHECKING:
    from collections.abc import Iterator

MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60
MAX_KERNEL_LINES = 150
MAX_PARAMETERS = 6
DICTATED_SIGNATURES = {
    "paged_attention",  # transformers calls it as one of its attention functions
}

Function = ast.FunctionDef | ast.AsyncFunctionDef


def functions_of(file: SourceFile) -> Iterator[Function]:
    return (node for node in ast.walk(file.tree) if isinstance(node, Function))


def num_parameters(function: Function) -> int:
    """Return how many values a caller passes; ``self`` and ``cls`` do not count."""
    arguments = function.args
    names = [a.arg for a in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)]
    return len(names) - (bool(names) and names[0] in ("self", "cls"))


@pytest.mark.parametrize("file", source_files(), ids=str)
def test_file_is_short(file: SourceFile) -> None:
    assert len(file.text.splitlines()) <= MAX_FILE_LINES


@pytest.mark.parametrize("file", source_files(), ids=str)
def test_functions_are_short(file: SourceFile) -> None:
    limit = MAX_KERNEL_LINES if str(file).startswith("kernels/") else MAX_FUNCTION_LINES
    too_long = {
        function.name: length
        for function in functions_of(file)
        if (length := (function.end_lineno or 0) - function.lineno + 1) > limit
    }

    assert too_long == {}


@pytest.mark.parametrize(
    "file", source_files("services", "chiasm/cli", "examples", "benchmarks"), ids=str
)
def test_functions_take_few_parameters(file: SourceFile) -> None:
    too_many = {
        function.name: num_parameters(function)
        for function in functions_of(file)
        if num_parameters(function) > MAX_PARAMETERS and function.name not in DICTATED_SIGNATURES
    }

    assert too_many == {}
