"""Several sequences are read as one stream; each keeps its own order and end."""

from __future__ import annotations

import pytest

from chiasm.generator.engine.group_stream import GroupStream
from chiasm.generator.engine.logprobs import TokenLogprobs
from chiasm.generator.engine.outputs import (
    Failed,
    Finished,
    FinishReason,
    NeedEmbedding,
    PromptLogprobs,
    SequenceOutput,
    TokenDelta,
)
from chiasm.generator.engine.sequence_stream import MAX_SCORED_TOKENS, SequenceStream


def _group(size: int) -> tuple[GroupStream, list[SequenceStream]]:
    streams = [SequenceStream(10 + index) for index in range(size)]
    return GroupStream(tuple(streams)), streams


def _end(index: int = 0) -> Finished:
    return Finished(FinishReason.STOP, None, 3, 1, index=index)


def test_tokens_and_ends_carry_the_index_of_their_sequence() -> None:
    group, streams = _group(2)
    streams[1].push(SequenceOutput(11, (7,), _end()))
    streams[0].push(SequenceOutput(10, (5, 6)))

    events = [group.take() for _ in range(4)]

    assert events == [TokenDelta((5, 6)), TokenDelta((7,), index=1), _end(1), None]
    assert not group.is_over


def test_prompt_is_told_of_in_pieces_before_the_tokens_and_without_leave_for_any() -> None:
    group, streams = _group(2)
    told = tuple(TokenLogprobs(-float(index), 1) for index in range(MAX_SCORED_TOKENS + 3))
    streams[0].push(SequenceOutput(10, (5,), None, (), PromptLogprobs(1, told)))

    events = [group.take(0) for _ in range(3)]

    assert events == [
        PromptLogprobs(1, told[:MAX_SCORED_TOKENS]),
        PromptLogprobs(1 + MAX_SCORED_TOKENS, told[MAX_SCORED_TOKENS:]),
        None,
    ]
    assert group.take() == TokenDelta((5,))


def test_every_delta_says_how_much_of_the_prompt_was_cached() -> None:
    group, streams = _group(1)
    streams[0].push(SequenceOutput(10, (5, 6), num_cached_tokens=4))
    scored = PromptLogprobs(1, (TokenLogprobs(-1.0, 1),))
    streams[0].push(SequenceOutput(10, prompt_logprobs=scored))

    deltas = [event for _ in range(3) if isinstance(event := group.take(1), TokenDelta)]

    assert deltas == [TokenDelta((token,), num_cached_tokens=4) for token in (5, 6)]


def test_group_is_over_when_every_end_was_read() -> None:
    group, streams = _group(2)
    for stream in streams:
        stream.push(SequenceOutput(stream.seq_id, (), _end()))

    assert group.take() == _end(0)
    assert not group.is_over
    assert group.take() == _end(1)
    assert group.is_over
    assert group.take() is None


def test_error_of_one_sequence_is_raised() -> None:
    group, streams = _group(2)
    streams[1].push(SequenceOutput(11, (), Failed(ValueError("no"))))

    with pytest.raises(ValueError, match="no"):
        group.take()


def test_failure_and_needs_concern_the_whole_group() -> None:
    group, streams = _group(2)
    group.need(b"picture")
    assert group.take() == NeedEmbedding(b"picture")

    group.fail(ValueError("all"))

    assert all(stream.has_ended for stream in streams)
    assert (group.seq_id, group.seq_ids) == (10, (10, 11))


async def test_reader_is_woken_by_any_sequence() -> None:
    group, streams = _group(2)
    streams[1].push(SequenceOutput(11, (9,)))

    assert await group.read() == TokenDelta((9,), index=1)


def test_listener_hears_of_every_sequence() -> None:
    group, streams = _group(3)
    heard: list[int] = []
    group.listen(lambda: heard.append(1))

    for stream in streams:
        stream.push(SequenceOutput(stream.seq_id, (1,)))

    assert len(heard) == 3
