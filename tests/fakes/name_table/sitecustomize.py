"""Answer look-ups of host names out of a table, in every process that finds this on its path.

Python imports the module by its name when it starts. ``TEST_NAME_TABLE`` holds JSON: for each name
the answers to its look-ups in turn, from the first again after the last. Other names are looked up
as ever.
"""

from __future__ import annotations

import itertools
import json
import os
import socket
from typing import Any

import uvloop

_answers = {
    name: itertools.cycle(answers)
    for name, answers in json.loads(os.environ.get("TEST_NAME_TABLE", "{}")).items()
}
# Any: a class of another package is not meant to be changed.
_loop_class: Any = uvloop.Loop
_look_up = _loop_class.getaddrinfo


async def _getaddrinfo(loop: uvloop.Loop, host: Any, port: Any, **kwargs: Any) -> Any:
    if host not in _answers:
        return await _look_up(loop, host, port, **kwargs)
    return [
        (
            socket.AF_INET6 if ":" in address else socket.AF_INET,
            socket.SOCK_STREAM,
            socket.IPPROTO_TCP,
            "",
            (address, port or 0),
        )
        for address in next(_answers[host])
    ]


_loop_class.getaddrinfo = _getaddrinfo
