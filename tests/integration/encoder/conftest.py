"""Fixtures of the encoder's integration tests: one process per family."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any

import pytest
import pytest_asyncio

from tests.fakes.checkpoints import load_whole, make_llava, make_qwen2_5_vl, make_qwen2_vl
from tests.harness.encoder import EncoderClient, EncoderProcess

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path


MAKERS = {"qwen2_vl": make_qwen2_vl, "qwen2_5_vl": make_qwen2_5_vl, "llava": make_llava}


@pytest.fixture(scope="package", params=list(MAKERS))
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return MAKERS[request.param](tmp_path_factory.mktemp(request.param))


@pytest_asyncio.fixture(scope="package", loop_scope="package")
async def process(
    model: Path, redis_url: str, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[EncoderProcess]:
    flags = ["--allow-private-media", "127.0.0.1/32", "--max-image-pixels", "1000000"]
    process = EncoderProcess(model, redis_url, tmp_path_factory.mktemp("state"), flags)
    await process.start()
    yield process
    assert await process.stop() == 0


@pytest_asyncio.fixture(scope="package", loop_scope="package")
async def client(process: EncoderProcess) -> AsyncIterator[EncoderClient]:
    client = process.client()
    yield client
    await client.close()


@pytest.fixture
def tenant(request: pytest.FixtureRequest) -> str:
    """Return a tenant of this test's own."""
    return hashlib.sha256(request.node.nodeid.encode()).hexdigest()[:32]


@pytest.fixture(scope="package")
def whole(model: Path) -> tuple[Any, Any]:
    return load_whole(model)
