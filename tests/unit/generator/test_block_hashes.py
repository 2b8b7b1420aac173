"""Blocks have one hash exactly if their keys and values are the same."""

from __future__ import annotations

import dataclasses

import pytest

from chiasm.common.media import MediaLayout, MediaSpan, PatchGrid
from chiasm.generator.engine.block_hashes import extend_block_hashes
from chiasm.generator.engine.sampling_params import SamplingParams
from chiasm.generator.engine.sequence import NO_ORIGIN, Origin, Sequence
from tests.fakes.embeddings import make_layout, make_ref
from tests.fakes.generator_engine import make_prompt

TOKENS = tuple(range(1, 17))


def _hashes(
    tokens: tuple[int, ...] = TOKENS,
    spans: tuple[MediaSpan, ...] = (),
    origin: Origin = NO_ORIGIN,
) -> list[bytes]:
    sequence = Sequence(1, make_prompt(tokens, spans), SamplingParams(4), origin)
    return extend_block_hashes(sequence, 4, len(tokens) // 4)


def _span(offset: int, seed: int = 0, layout: MediaLayout | None = None) -> MediaSpan:
    ref = make_ref(num_rows=3, seed=seed)
    return MediaSpan(offset, ref, layout or make_layout(ref), is_ready=True)


def test_equal_prompts_have_equal_hashes() -> None:
    assert _hashes() == _hashes()
    assert len(set(_hashes())) == 4


def test_another_token_changes_its_block_and_all_behind_it() -> None:
    changed = _hashes((*TOKENS[:5], 99, *TOKENS[6:]))

    assert [one == other for one, other in zip(_hashes(), changed, strict=True)] == [
        True, False, False, False,
    ]  # fmt: skip


@pytest.mark.parametrize(
    "origin", [Origin(tenant="x"), Origin(cache_salt="x"), Origin(adapter="x")], ids=repr
)
def test_nothing_is_shared_across_tenants_salts_and_adapters(origin: Origin) -> None:
    assert not set(_hashes(origin=origin)) & set(_hashes())


def test_parts_of_the_origin_do_not_run_into_each_other() -> None:
    assert _hashes(origin=Origin("ab", "c")) != _hashes(origin=Origin("a", "bc"))


def test_another_picture_behind_the_same_placeholders_changes_its_blocks() -> None:
    one, other = _hashes(spans=(_span(5, seed=1),)), _hashes(spans=(_span(5, seed=2),))

    assert one[0] == other[0]
    assert not set(one[1:]) & set(other[1:])


def test_another_grid_or_place_of_the_same_picture_changes_its_blocks() -> None:
    ref = make_ref(num_rows=3)
    layout = make_layout(ref)
    wider = dataclasses.replace(layout, grid=PatchGrid(1, 4, 3))
    base = _hashes(spans=(_span(5),))

    assert base[1] != _hashes(spans=(_span(5, layout=wider),))[1]
    assert base[1] != _hashes(spans=(_span(6),))[1]


def test_hashes_grow_with_the_output() -> None:
    sequence = Sequence(1, make_prompt(TOKENS[:6]), SamplingParams(20))
    first = list(extend_block_hashes(sequence, 4, 1))
    sequence.token_ids.extend(TOKENS[6:])

    assert extend_block_hashes(sequence, 4, 4) == _hashes()
    assert first == _hashes()[:1]
