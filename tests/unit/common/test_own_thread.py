"""Work that is done once leaves no thread, and threads of the pool compute alone."""

from __future__ import annotations

import asyncio
import threading
from typing import TYPE_CHECKING

import pytest
import torch

from chiasm.common.own_thread import compute_alone_in_pool, run_in_own_thread

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture(autouse=True)
def _restored_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


async def test_the_thread_ends_with_its_function() -> None:
    thread = await run_in_own_thread(threading.current_thread)

    await asyncio.to_thread(thread.join, 10)
    assert thread is not threading.current_thread()
    assert not thread.is_alive()


async def test_an_error_is_the_caller_s() -> None:
    with pytest.raises(ZeroDivisionError):
        await run_in_own_thread(divmod, 1, 0)


async def test_threads_of_the_pool_compute_alone() -> None:
    torch.set_num_threads(2)
    compute_alone_in_pool()

    assert await asyncio.to_thread(torch.get_num_threads) == 1
