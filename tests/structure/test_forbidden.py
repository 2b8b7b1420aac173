"""What must not stand in the tree: code made from data, tests that assert nothing, emojis."""

from __future__ import annotations

import ast
import re
import subprocess

import pytest

from tests.structure.tree import ROOT, SourceFile, source_files

FORBIDDEN_MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve", "joblib"}
FORBIDDEN_CALLS = {"eval", "exec", "compile", "torch.load", "numpy.load", "np.load", "__import__"}
SETTINGS_MODULES = {
    "services/common/config.py",
    "chiasm/cli/child.py",  # hands the environment on to the services
    "chiasm/cli/thread_env.py",  # sets what libraries read
    "chiasm/cli/up_settings.py",  # XDG_STATE_HOME decides a default
}
EMOJI = re.compile("[\U0001f300-\U0001faff\u2600-\u27bf\u2b50\u2b55\ufe0f]")
ASSERTING_CALLS = (
    *("pytest.raises", "pytest.warns", "pytest.fail"),
    *("asyncio.timeout", "asyncio.wait_for"),  # that something happens in time is an assertion
)

PRODUCT = ("services", "chiasm/cli", "kernels", "examples", "benchmarks")


def called_names(file: SourceFile) -> set[str]:
    return {
        ast.unparse(node.func)
        for node in ast.walk(file.tree)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name | ast.Attribute)
    }


@pytest.mark.parametrize("file", source_files(), ids=str)
def test_nothing_turns_data_into_code(file: SourceFile) -> None:
    roots = {name.partition(".")[0] for name in file.imports}

    assert roots & FORBIDDEN_MODULES == set()
    assert called_names(file) & FORBIDDEN_CALLS == set()


@pytest.mark.parametrize("file", source_files("services", "chiasm/cli", "kernels"), ids=str)
def test_environment_is_read_by_settings_alone(file: SourceFile) -> None:
    names = {ast.unparse(node) for node in ast.walk(file.tree) if isinstance(node, ast.Attribute)}
    reads = names & {"os.environ", "os.getenv", "os.environb", "os.putenv"}

    assert not reads or str(file) in SETTINGS_MODULES


@pytest.mark.parametrize("file", source_files(*PRODUCT), ids=str)
def test_nothing_is_printed_but_by_programs_for_people(file: SourceFile) -> None:
    is_program = str(file).startswith(("examples/", "benchmarks/"))

    assert is_program or "print" not in called_names(file)


@pytest.mark.parametrize("file", source_files(*PRODUCT), ids=str)
def test_no_file_is_named_after_everything(file: SourceFile) -> None:
    assert file.path.stem not in {"utils", "util", "helpers", "helper", "misc", "manager"}


def has_assertion(test: ast.FunctionDef | ast.AsyncFunctionDef, helpers: set[str]) -> bool:
    """Return whether a test asserts, itself or through a function of its file that does."""
    for node in ast.walk(test):
        if isinstance(node, ast.Assert):
            return True
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            if name in ASSERTING_CALLS or name.rpartition(".")[2] in helpers:
                return True
    return False


def asserting_helpers(file: SourceFile) -> set[str]:
    """Return the functions of a file, and those it imports, whose names or bodies assert."""
    local = {
        node.name
        for node in ast.walk(file.tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and any(
            isinstance(inner, ast.Assert | ast.Raise)
            or (isinstance(inner, ast.Call) and ast.unparse(inner.func) in ASSERTING_CALLS)
            for inner in ast.walk(node)
        )
    }
    spoken = {
        name.rpartition(".")[2]
        for name in called_names(file)
        if re.match(r"(assert|check|verify|expect|wait_until|until)_", name.rpartition(".")[2])
    }
    return local | spoken | {"check_invariants", "check_size", "assert_close", "assert_equal"}


@pytest.mark.parametrize("file", source_files("tests"), ids=str)
def test_every_test_asserts_something(file: SourceFile) -> None:
    helpers = asserting_helpers(file)
    silent = [
        node.name
        for node in ast.walk(file.tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and node.name.startswith("test_")
        and not has_assertion(node, helpers)
    ]

    assert silent == []


def tracked_files() -> list[str]:
    """Return every text file of the repository, whether committed yet or not."""
    done = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    return [name for name in done.stdout.splitlines() if not name.startswith("models/")]


def test_no_emojis_stand_outside_the_data_of_tests() -> None:
    found = []
    for name in tracked_files():
        if name.startswith("tests/"):
            continue
        path = ROOT / name
        if path.is_symlink() or not path.is_file():
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        if EMOJI.search(text):
            found.append(name)

    assert found == []


def test_no_large_file_but_the_demo_checkpoint_is_in_the_tree() -> None:
    paths = [ROOT / name for name in tracked_files()]
    large = [
        path.relative_to(ROOT).as_posix()
        for path in paths
        if path.is_file() and not path.is_symlink() and path.stat().st_size > 512 * 1024
    ]

    assert large == []
