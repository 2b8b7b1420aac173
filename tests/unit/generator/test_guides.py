"""Guides are compiled off the loop, once, and never more than a few at a time."""

from __future__ import annotations

import asyncio
import threading
from typing import TYPE_CHECKING, cast

import pytest

from chiasm.common.errors import InvalidRequestError, OverloadedError
from chiasm.common.sampling import Guide, GuideKind
from chiasm.generator import compile_turns, guides
from chiasm.generator.guides import Guides

if TYPE_CHECKING:
    from chiasm.generator.engine.grammar import Grammar, GrammarCompiler


class _Compiler:
    """Compiles when it is let; remembers what and where."""

    def __init__(self) -> None:
        self.may_go_on = threading.Event()
        self.may_go_on.set()
        self.seen: list[str] = []
        self.errors: dict[str, Exception] = {}
        self.threads: set[str] = set()

    def compile(self, guide: Guide) -> Grammar:
        assert self.may_go_on.wait(10)
        self.seen.append(guide.text)
        self.threads.add(threading.current_thread().name)
        if guide.text in self.errors:
            raise self.errors[guide.text]
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


async def test_guide_that_is_asked_for_many_times_at_once_is_compiled_once() -> None:
    compiler = _Compiler()
    subject = _guides(compiler)

    grammars = await asyncio.gather(*(subject.compile(_guide("a"), "a") for _ in range(9)))

    assert [str(grammar) for grammar in grammars] == ["grammar of a"] * 9
    assert compiler.seen == ["a"]
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


async def test_time_before_its_turn_does_not_count_against_a_guide(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(guides, "COMPILE_TIMEOUT_S", 0.05)
    compiler = _Compiler()
    compiler.may_go_on.clear()
    subject = _guides(compiler)
    slow = asyncio.create_task(subject.compile(_guide("slow"), "a"))
    behind = asyncio.create_task(subject.compile(_guide("behind"), "a"))

    with pytest.raises(InvalidRequestError):
        await slow
    compiler.may_go_on.set()

    assert str(await behind) == "grammar of behind"
    subject.close()


async def test_guide_whose_turn_does_not_come_is_not_called_wrong(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(compile_turns, "MAX_WAIT_S", 0.01)
    compiler = _Compiler()
    compiler.may_go_on.clear()
    subject = _guides(compiler)
    slow = asyncio.create_task(subject.compile(_guide("slow"), "a"))
    await asyncio.sleep(0)

    with pytest.raises(OverloadedError):
        await subject.compile(_guide("behind"), "a")
    compiler.may_go_on.set()
    await slow
    subject.close()


async def test_flood_of_one_tenant_is_no_queue_for_another() -> None:
    compiler = _Compiler()
    compiler.may_go_on.clear()
    subject = _guides(compiler)
    flood = [asyncio.create_task(subject.compile(_guide(f"a{i}"), "a")) for i in range(9)]
    await asyncio.sleep(0)
    other = asyncio.create_task(subject.compile(_guide("b"), "b"))
    await asyncio.sleep(0)

    compiler.may_go_on.set()
    await asyncio.gather(*flood, other)

    assert compiler.seen[:3] == ["a0", "b", "a1"]
    subject.close()


@pytest.mark.parametrize("ending", ["cancelled", "refused"])
async def test_turn_ends_with_the_compilation_and_not_with_who_asked(
    monkeypatch: pytest.MonkeyPatch, ending: str
) -> None:
    monkeypatch.setattr(guides, "COMPILE_TIMEOUT_S", 0.01)
    compiler = _Compiler()
    compiler.may_go_on.clear()
    subject = _guides(compiler)
    slow = asyncio.create_task(subject.compile(_guide("slow"), "a"))
    await asyncio.sleep(0)
    if ending == "cancelled":
        slow.cancel()
    await asyncio.wait([slow])

    behind = asyncio.create_task(subject.compile(_guide("behind"), "b"))
    await asyncio.sleep(0)
    compiler.may_go_on.set()

    assert str(await behind) == "grammar of behind"
    assert compiler.seen == ["slow", "behind"]
    subject.close()


async def test_guide_that_is_wrong_ends_its_turn() -> None:
    compiler = _Compiler()
    subject = _guides(compiler)
    wrong = InvalidRequestError("wrong", param="response_format")
    compiler.errors["wrong"] = wrong

    results = await asyncio.gather(
        subject.compile(_guide("wrong"), "a"),
        subject.compile(_guide("right"), "a"),
        return_exceptions=True,
    )

    assert [str(result) for result in results] == [str(wrong), "grammar of right"]
    subject.close()


async def test_model_without_tokenizer_says_so() -> None:
    with pytest.raises(InvalidRequestError, match=r"no tokenizer\.json"):
        await Guides(None).compile(_guide("a"), "a")
