"""Guides are compiled off the loop, once, and never more than a few at a time."""

from __future__ import annotations

import asyncio
import threading
from typing import TYPE_CHECKING, cast

import pytest

from chiasm.common.errors import InvalidRequestError, OverloadedError
from chiasm.common.sampling import Guide, GuideKind
from chiasm.generator import guides
from chiasm.generator.guides import Guides

if TYPE_CHECKING:
    from chiasm.generator.engine.grammar import Grammar, GrammarCompiler


class _Compiler:
    """Compiles when it is let; remembers what and where."""

    def __init__(self) -> None:
        self.may_go_on = threading.Event()
        self.may_go_on.set()
        self.seen: list[str] = []
        self.threads: set[str] = set()

    def compile(self, guide: Guide) -> Grammar:
        assert self.may_go_on.wait(10)
        self.seen.append(guide.text)
        self.threads.add(threading.current_thread().name)
        return cast("Grammar", f"grammar of {guide.text}")


def _guide(text: str) -> Guide:
    return Guide(GuideKind.REGEX, text)


def _guides(compiler: _Compiler) -> Guides:
    return Guides(cast("GrammarCompiler", compiler))


async def test_guide_is_compiled_once_in_a_thread_of_its_own() -> None:
    compiler = _Compiler()
    subject = _guides(compiler)

    first, second = await subject.compile(_guide("a"), "a"), await subject.compile(_guide("a"), "a")

    assert str(first) == str(second) == "grammar of a"
    assert compiler.seen == ["a"]
    assert threading.current_thread().name not in compiler.threads
    subject.close()


async def test_only_the_last_used_grammars_are_kept() -> None:
    compiler = _Compiler()
    subject = _guides(compiler)
    for number in range(guides.MAX_GRAMMARS):
        await subject.compile(_guide(str(number)), "a")
    await subject.compile(_guide("0"), "a")
    await subject.compile(_guide("new"), "a")

    await subject.compile(_guide("0"), "a")
    await subject.compile(_guide("1"), "a")

    assert compiler.seen[guides.MAX_GRAMMARS :] == ["new", "1"]
    subject.close()


async def test_guide_of_another_tenant_is_compiled_again() -> None:
    compiler = _Compiler()
    subject = _guides(compiler)

    for tenant in ("a", "b", "a", "b"):
        await subject.compile(_guide("a"), tenant)

    assert compiler.seen == ["a", "a"]
    subject.close()


async def test_flood_of_one_tenant_leaves_the_grammars_of_another() -> None:
    compiler = _Compiler()
    subject = _guides(compiler)
    half = guides.MAX_GRAMMARS // 2
    for number in range(half):
        await subject.compile(_guide(f"b{number}"), "b")
    for number in range(3 * guides.MAX_GRAMMARS):
        await subject.compile(_guide(f"a{number}"), "a")
    num_compiled = len(compiler.seen)

    for number in range(half):
        await subject.compile(_guide(f"b{number}"), "b")

    assert len(compiler.seen) == num_compiled
    subject.close()


@pytest.mark.parametrize(("asks", "other"), ["ab", "ba"])
async def test_tenant_that_asks_makes_room_itself_where_it_has_as_much_as_another(
    monkeypatch: pytest.MonkeyPatch, asks: str, other: str
) -> None:
    monkeypatch.setattr(guides, "MAX_GRAMMARS", 5)
    compiler = _Compiler()
    subject = _guides(compiler)
    for tenant, text in ((asks, "1"), (other, "1"), (asks, "2"), (other, "2"), (other, "3")):
        await subject.compile(_guide(text), tenant)
    await subject.compile(_guide("3"), asks)
    compiler.seen.clear()

    for text in "123":
        await subject.compile(_guide(text), other)
    assert compiler.seen == []
    await subject.compile(_guide("1"), asks)
    assert compiler.seen == ["1"]
    subject.close()


async def test_guide_that_is_compiled_many_times_at_once_takes_one_place() -> None:
    compiler = _Compiler()
    subject = _guides(compiler)
    own = [_guide(f"a{number}") for number in range(4)]
    for guide in own:
        compiling = [subject.compile(guide, "a") for _ in range(guides.MAX_TENANT_COMPILATIONS)]
        await asyncio.gather(*compiling)
    for number in range(guides.MAX_GRAMMARS):
        await subject.compile(_guide(f"b{number}"), "b")
    num_compiled = len(compiler.seen)

    for guide in own:
        await subject.compile(guide, "a")

    assert len(compiler.seen) == num_compiled
    subject.close()


async def test_guide_that_takes_too_long_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guides, "COMPILE_TIMEOUT_S", 0.01)
    compiler = _Compiler()
    compiler.may_go_on.clear()
    subject = _guides(compiler)

    with pytest.raises(InvalidRequestError, match=r"not compiled within 0\.01 seconds"):
        await subject.compile(_guide("a"), "a")
    compiler.may_go_on.set()
    subject.close()


async def test_guide_whose_turn_does_not_come_is_not_called_wrong(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(guides, "COMPILE_TIMEOUT_S", 0.05)
    compiler = _Compiler()
    compiler.may_go_on.clear()
    subject = _guides(compiler)

    results = await asyncio.gather(
        subject.compile(_guide("slow"), "a"),
        subject.compile(_guide("behind"), "a"),
        return_exceptions=True,
    )

    assert [type(result) for result in results] == [InvalidRequestError, OverloadedError]
    compiler.may_go_on.set()
    subject.close()


async def test_waiting_guides_are_bounded_for_all_and_for_each_tenant() -> None:
    compiler = _Compiler()
    compiler.may_go_on.clear()
    subject = _guides(compiler)
    half = guides.MAX_TENANT_COMPILATIONS
    assert 2 * half == guides.MAX_COMPILATIONS
    waiting = [
        asyncio.create_task(subject.compile(_guide(f"{tenant}{number}"), tenant))
        for tenant in "ab"
        for number in range(half - (tenant == "b"))
    ]
    await asyncio.sleep(0)

    with pytest.raises(OverloadedError):
        await subject.compile(_guide("one more"), "a")
    waiting.append(asyncio.create_task(subject.compile(_guide("the last place"), "b")))
    await asyncio.sleep(0)
    with pytest.raises(OverloadedError):
        await subject.compile(_guide("one more"), "c")
    compiler.may_go_on.set()
    await asyncio.gather(*waiting)

    for tenant in "abc":
        assert str(await subject.compile(_guide("one more"), tenant)) == "grammar of one more"
    subject.close()


async def test_model_without_tokenizer_says_so() -> None:
    with pytest.raises(InvalidRequestError, match=r"no tokenizer\.json"):
        await Guides(None).compile(_guide("a"), "a")
