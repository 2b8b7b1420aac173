"""Generated documents, locks and the Makefile agree with what they are made from."""

from __future__ import annotations

import re
import tomllib

import pytest

from chiasm.cli.config_docs import example_toml, markdown
from chiasm.cli.up_settings import SERVICES
from tests.structure.tree import ROOT

TARGETS = (
    *("help", "serve", "test", "test-slow", "test-gpu", "bench", "check", "protos"),
    *("fmt", "lint", "types", "up", "down", "clean", "demo-train", "demo-eval"),
)
HOST = re.compile(r"https?://[^\s\"'>)]*(simple|whl|pypi|index)[^\s\"'>)]*|--(extra-)?index-url")


def pins(name: str) -> dict[str, str]:
    lines = (ROOT / "requirements" / f"{name}.lock").read_text().splitlines()
    return dict(line.split("==") for line in lines if line and not line.startswith("#"))


def test_configuration_page_is_fresh() -> None:
    assert (ROOT / "docs" / "configuration.md").read_text() == markdown(), "run make docs"


def test_example_file_is_fresh_and_valid() -> None:
    text = (ROOT / "config.example.toml").read_text()

    assert text == example_toml(), "run make docs"
    assert set(tomllib.loads(text)) == {"up", *SERVICES}


def test_example_file_stays_valid_with_every_default_written_out() -> None:
    lines = example_toml().splitlines()
    pairs = [line.removeprefix("# ") if re.match(r"# \w+ = [^r]", line) else line for line in lines]

    assert tomllib.loads("\n".join(pairs))["gateway"]["listen"]


@pytest.mark.parametrize("name", ["cpu", "cuda"])
def test_lock_pins_torch_and_its_companion(name: str) -> None:
    assert pins(name)["torch"] == "2.13.0"
    assert pins(name)["torchvision"] == "0.28.0"


def test_locks_agree_on_what_they_share() -> None:
    cpu, cuda, gateway = pins("cpu"), pins("cuda"), pins("gateway")

    assert cpu.items() <= cuda.items()
    assert gateway.items() <= cpu.items()
    assert pins("triton").items() <= cuda.items()


def test_locks_hold_every_direct_dependency() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    named = {
        re.match(r"[A-Za-z0-9_.-]+", line)
        for lines in (project["dependencies"], *extras.values())
        for line in lines
    }
    direct = {match[0].lower().replace("_", "-") for match in named if match} - {"chiasm"}

    assert direct <= set(pins("cpu"))


def test_security_page_names_tests_that_exist() -> None:
    page = (ROOT / "docs" / "security.md").read_text()
    files = {path.relative_to(ROOT).as_posix() for path in (ROOT / "tests").rglob("*.py")}
    sources = "".join((ROOT / file).read_text() for file in files)

    named = set(re.findall(r"`([\w/]+\.py)`", page))
    assert len(named) >= 20
    assert {name for name in named if not any(file.endswith(f"/{name}") for file in files)} == set()
    functions = set(re.findall(r"`(test_\w+)`", page))
    assert {name for name in functions if f"def {name}(" not in sources} == set()


def test_tests_have_triton_and_servers_on_a_cpu_do_not() -> None:
    makefile = (ROOT / "Makefile").read_text()

    for target in ("test", "test-slow", "test-gpu"):
        assert re.search(rf"^{target}: \$\(TEST_STAMP\)", makefile, re.MULTILINE)
    assert re.search(r"^serve: \$\(STAMP\)", makefile, re.MULTILINE)
    assert "triton" in pins("triton")
    assert "triton" not in pins("cpu")


@pytest.mark.parametrize("target", TARGETS)
def test_target_exists_and_says_what_it_does(target: str) -> None:
    makefile = (ROOT / "Makefile").read_text()

    assert re.search(rf"^{target}:.* ## \S", makefile, re.MULTILINE)


def test_ci_runs_the_check_and_may_be_executed() -> None:
    script = ROOT / ".ci" / "run"

    assert "make check" in script.read_text()
    assert script.stat().st_mode & 0o111


@pytest.mark.parametrize(
    "name",
    [
        "Makefile",
        "docker-compose.yml",
        *(f"services/{service}/Dockerfile" for service in SERVICES),
        *(f"requirements/{name}.lock" for name in ("cpu", "cuda", "gateway", "triton")),
    ],
)
def test_no_package_index_is_named(name: str) -> None:
    assert not HOST.search((ROOT / name).read_text())
