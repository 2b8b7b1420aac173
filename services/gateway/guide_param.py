"""Have refusals of a guide name the field that the client wrote it in."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

from chiasm.common.errors import InvalidRequestError
from chiasm.common.sampling import GUIDE_PARAM

if TYPE_CHECKING:
    from collections.abc import Iterator


@contextmanager
def naming_guide(param: str) -> Iterator[None]:
    """Have errors about the guide name ``param``, whoever of gateway and generator raised them.

    Args:
        param: Field of the request that the guide came from, such as ``"response_format"``.
    """
    try:
        yield
    except InvalidRequestError as error:
        if error.param == GUIDE_PARAM:
            error.param = param
        raise
