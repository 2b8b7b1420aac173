"""Who gets which flag of ``chiasm up``."""

from __future__ import annotations

from typing import ClassVar

import pytest
from pydantic import Field

from chiasm.cli.flag_routing import FlagRouter
from chiasm.common.config import ConfigError, ServiceSettings


class Own(ServiceSettings):
    """Own."""

    model: str = Field("", description="Model")
    port: int = Field(1, description="Port")


class Left(ServiceSettings):
    """Left."""

    flag_aliases: ClassVar = {"kind": "dtype"}
    refused_flags: ClassVar = {"remote": "never"}

    dtype: str = Field("", description="Type")
    limits: dict[str, int] = Field({}, description="Limits")
    port: int = Field(2, description="Port")


class Right(ServiceSettings):
    """Right."""

    dtype: str = Field("", description="Type")
    is_fast: bool = Field(False, description="Fast")


@pytest.fixture
def router() -> FlagRouter:
    return FlagRouter(Own, {"left": Left, "right": Right})


@pytest.mark.parametrize(
    ("argv", "own", "left", "right"),
    [
        (["m"], ["--model", "m"], [], []),
        (["m", "--port", "3"], ["--model", "m", "--port", "3"], [], []),
        (["--dtype", "x"], [], ["--dtype", "x"], ["--dtype", "x"]),
        (["--dtype=x"], [], ["--dtype=x"], ["--dtype=x"]),
        (["--left.dtype", "x"], [], ["--dtype", "x"], []),
        (["--left.port=5"], [], ["--port=5"], []),
        (["--kind", "x"], [], ["--kind", "x"], []),
        (["--limits.image", "2"], [], ["--limits.image", "2"], []),
        (["--left.limits.image", "2"], [], ["--limits.image", "2"], []),
        (["--is-fast", "--port", "3"], ["--port", "3"], [], ["--is-fast"]),
        (["--no-is-fast"], [], [], ["--no-is-fast"]),
        (["--remote"], [], ["--remote"], []),
        (["--config", "f"], ["--config", "f"], [], []),
        (["-h"], ["--help"], [], []),
        (["--dtype", "-1"], [], ["--dtype", "-1"], ["--dtype", "-1"]),
    ],
)
def test_flag_goes_to_everyone_who_knows_it(
    router: FlagRouter, argv: list[str], own: list[str], left: list[str], right: list[str]
) -> None:
    routed = router.route(argv)

    assert list(routed.own) == own
    assert {name: list(flags) for name, flags in routed.services.items()} == {
        "left": left,
        "right": right,
    }


def test_unknown_flag_stops_with_the_nearest_known_one(router: FlagRouter) -> None:
    with pytest.raises(ConfigError, match="unknown flag --dtpe; did you mean --dtype"):
        router.route(["m", "--dtpe", "x"])


@pytest.mark.parametrize("argv", [["m", "stray"], ["--port", "1", "stray"], ["-x"]])
def test_argument_that_is_no_flags_value_is_refused(router: FlagRouter, argv: list[str]) -> None:
    with pytest.raises(ConfigError, match="unexpected argument"):
        router.route(argv)
