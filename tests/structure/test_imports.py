"""The arrows of dependency, the trap of the ``kernels`` package, and what the gateway loads."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.structure.tree import ROOT, SourceFile, source_files

SERVICES = ("gateway", "encoder", "generator")
LIBRARY = ("chiasm.common", "chiasm.v1")
ALLOWED = {
    "chiasm.common": LIBRARY,
    "chiasm.gateway": ("chiasm.gateway", *LIBRARY),
    "chiasm.encoder": ("chiasm.encoder", "chiasm.kernels", *LIBRARY),
    "chiasm.generator": ("chiasm.generator", "chiasm.kernels", *LIBRARY),
    "chiasm.kernels": ("chiasm.kernels",),
}
NETWORK_MODULES = ("aiohttp", "httpx", "requests", "urllib3", "urllib.request", "http", "ftplib")
FETCHER = "services/encoder/fetch.py"
TREE_FOLDERS = {"services", "kernels", "protos"}


def is_below(module: str, packages: tuple[str, ...]) -> bool:
    return any(module == package or module.startswith(f"{package}.") for package in packages)


@pytest.mark.parametrize("file", source_files("services", "kernels"), ids=str)
def test_imports_follow_the_arrows(file: SourceFile) -> None:
    package = ".".join(file.module.split(".")[:2])
    ours = {name for name in file.imports if name.startswith("chiasm.")}

    assert {name for name in ours if not is_below(name, ALLOWED[package])} == set()


@pytest.mark.parametrize("file", source_files(), ids=str)
def test_folders_are_imported_through_chiasm_alone(file: SourceFile) -> None:
    assert {name.partition(".")[0] for name in file.imports}.isdisjoint(TREE_FOLDERS)


@pytest.mark.parametrize(
    "file", source_files("services/gateway", "services/encoder", "services/generator"), ids=str
)
def test_relative_imports_stay_inside_their_service(file: SourceFile) -> None:
    service = file.module.split(".")[1]
    others = tuple(f"chiasm.{other}" for other in SERVICES if other != service)

    assert not any(is_below(name, others) for name in file.imports)


@pytest.mark.parametrize("file", source_files("services"), ids=str)
def test_one_module_alone_fetches(file: SourceFile) -> None:
    fetches = any(is_below(name, NETWORK_MODULES) for name in file.imports)

    assert fetches == (str(file) == FETCHER)


def test_kernels_is_no_package_of_its_own() -> None:
    assert not (ROOT / "kernels" / "__init__.py").exists()
    assert not (ROOT / "tests" / "__init__.py").exists()


def test_links_lead_into_the_tree() -> None:
    targets = {
        "common": "services/common",
        "gateway": "services/gateway",
        "encoder": "services/encoder",
        "generator": "services/generator",
        "kernels": "kernels",
        "v1": "protos/gen/chiasm/v1",
    }

    for name, target in targets.items():
        link = ROOT / "chiasm" / name
        assert link.is_symlink()
        assert link.resolve() == ROOT / target


def run(program: str) -> str:
    """Run a program in a fresh interpreter at the repository's root; return what it wrote."""
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.integration
def test_tiny_llama_is_built_from_the_repository_root() -> None:
    program = """
from chiasm.common import torchvision_shim
torchvision_shim.install()
from transformers import LlamaConfig, LlamaForCausalLM
config = LlamaConfig(
    vocab_size=16, hidden_size=8, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
)
print(LlamaForCausalLM(config).config.model_type)
"""
    assert run(program) == "llama"


@pytest.mark.integration
@pytest.mark.parametrize(
    "module",
    ["chiasm.gateway.service", "chiasm.cli.up", "chiasm.cli.main", "chiasm.common.config"],
)
def test_module_loads_neither_torch_nor_transformers(module: str) -> None:
    program = f"""
import sys, {module}
heavy = ("torch", "transformers", "torchvision", "numpy", "PIL")
print([name for name in heavy if name in sys.modules])
"""
    assert run(program) == "[]"


@pytest.mark.integration
def test_command_line_loads_nothing_heavy_for_its_help() -> None:
    program = """
import sys, chiasm.cli.main
print([name for name in ("grpc", "pydantic", "redis", "asyncio", "torch") if name in sys.modules])
"""
    assert run(program) == "[]"
