"""Keep threads that compute now and then out of the way of the one thread that computes always.

libgomp gives every thread that computes in parallel helpers of its own, and keeps them as long as
that thread lives. When all helpers of a process are more than its cores, it lets them spin a
hundredth as long before they sleep, and a decode step of a small model then waits for wake-ups
(measured on two cores: 28 to 31 ms instead of 19 to 26).
"""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, ParamSpec, TypeVar

import torch

if TYPE_CHECKING:
    from collections.abc import Callable

P = ParamSpec("P")
T = TypeVar("T")

_MAX_POOL_THREADS = 8


async def run_in_own_thread(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Return what ``function`` returns in a thread that ends with it, and with it its helpers."""
    executor = ThreadPoolExecutor(1, thread_name_prefix="once")
    future = executor.submit(function, *args, **kwargs)
    executor.shutdown(wait=False)  # the thread ends when the function has returned
    return await asyncio.wrap_future(future)


def compute_alone_in_pool() -> None:
    """Let ``asyncio.to_thread`` of the running loop use threads that compute without helpers."""
    executor = ThreadPoolExecutor(
        _MAX_POOL_THREADS, "pool", initializer=torch.set_num_threads, initargs=(1,)
    )
    asyncio.get_running_loop().set_default_executor(executor)
