"""What is refused before any work, with which sentence."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from chiasm.common.errors import ChiasmError, InvalidRequestError, NotFoundError
from chiasm.common.limits import Limits
from chiasm.common.media import (
    DataType,
    EmbeddingRef,
    MediaLayout,
    MediaSpan,
    Modality,
    RequestContext,
    TensorRole,
    TensorSpec,
    TokenRun,
)
from chiasm.common.sampling import SamplingWishes
from chiasm.generator.admission import Admission, GenerationRequest
from tests.fakes.generator_engine import BYTE_SPEC, EOS_TOKEN_ID

MAX_MODEL_LEN = 32
CONTEXT = RequestContext("request", "attempt", "tenant")
ADMISSION = Admission(BYTE_SPEC, "tiny", MAX_MODEL_LEN, Limits(max_media_items=2))


def _request(
    token_ids: tuple[int, ...] = (1, 2, 3),
    spans: tuple[MediaSpan, ...] = (),
    context: RequestContext = CONTEXT,
    **wishes: object,
) -> GenerationRequest:
    return GenerationRequest(context, token_ids, spans, SamplingWishes(**wishes))  # type: ignore[arg-type]  # tests pass wrong ones too


def _span(
    offset: int, num_rows: int = 2, width: int = 1, role: TensorRole = TensorRole.SPLICE
) -> MediaSpan:
    """Return a span whose expansion is 50, then 51 for each row."""
    spec = TensorSpec(role, DataType.FLOAT32, (num_rows, width))
    ref = EmbeddingRef(b"e" * 32, b"f" * 32, Modality.IMAGE, (spec,))
    return MediaSpan(
        offset, ref, MediaLayout((TokenRun(50, 1, False), TokenRun(51, num_rows, True))), True
    )


def _refusal(request: GenerationRequest) -> ChiasmError:
    with pytest.raises(ChiasmError) as refused:
        ADMISSION.check(request)
    return refused.value


def test_defaults_are_filled_in() -> None:
    prompt, sampling = ADMISSION.check(_request())

    assert prompt.token_ids == (1, 2, 3)
    assert sampling.max_tokens == MAX_MODEL_LEN - 3
    assert (sampling.temperature, sampling.top_k, sampling.top_p) == (1.0, 0, 1.0)
    assert sampling.stop_token_ids == {EOS_TOKEN_ID}


def test_requests_without_seed_get_different_ones() -> None:
    seeds = {ADMISSION.check(_request())[1].seed for _ in range(8)}

    assert len(seeds) == 8


def test_wishes_are_kept() -> None:
    _, sampling = ADMISSION.check(
        _request(
            max_tokens=4,
            temperature=0.5,
            top_p=0.25,
            top_k=7,
            seed=9,
            stop_token_ids=(4, 5),
            ignore_eos=True,
        )
    )

    assert (sampling.max_tokens, sampling.temperature) == (4, 0.5)
    assert (sampling.top_p, sampling.top_k, sampling.seed) == (0.25, 7, 9)
    assert sampling.stop_token_ids == {4, 5}


@pytest.mark.parametrize(
    ("group_tokens", "both_ways", "message"),
    [
        (0, True, "see only what is before them; the layout differs"),
        (2, False, "attend to one another both ways; the layout differs"),
        (3, True, "A media item of this model has 3 rows"),
        (2, True, ""),
        (0, False, ""),
    ],
)
def test_rows_must_attend_as_the_model_was_trained_to(
    group_tokens: int, both_ways: bool, message: str
) -> None:
    spec = replace(BYTE_SPEC, group_tokens=group_tokens)
    admission = Admission(spec, "tiny", MAX_MODEL_LEN, Limits())
    span = _span(1)
    span = replace(span, layout=replace(span.layout, attends_both_ways=both_ways))
    request = _request((1, 50, 51, 51, 2), (span,))

    if not message:
        assert admission.check(request)[0].spans == (span,)
        return
    with pytest.raises(InvalidRequestError, match=message) as refused:
        admission.check(request)
    assert (refused.value.reason, refused.value.param) == ("LAYOUT_MISMATCH", "spans[0]")


def test_prompt_logprobs_are_bounded_together() -> None:
    admission = Admission(BYTE_SPEC, "tiny", MAX_MODEL_LEN, Limits(max_prompt_logprobs=9))

    _, sampling = admission.check(_request((1,) * 3, num_prompt_logprobs=2))
    with pytest.raises(ChiasmError, match="prompt log probabilities") as refused:
        admission.check(_request((1,) * 4, num_prompt_logprobs=2))

    assert sampling.num_prompt_logprobs == 2
    assert refused.value.param == "prompt_logprobs"


def test_output_is_bounded_by_what_the_context_leaves() -> None:
    _, sampling = ADMISSION.check(_request((1,) * 30, max_tokens=20))

    assert sampling.max_tokens == 2


def test_prompt_over_the_context_is_refused_in_the_words_of_vllm() -> None:
    error = _refusal(_request((1,) * 33))

    assert error.message == (
        "This model's maximum context length is 32 tokens. However, your prompt contains 33 input"
        " tokens, which exceeds this limit even without any output tokens. Please reduce the"
        " length of the input prompt."
    )
    assert (error.reason, error.param) == ("PROMPT_TOO_LONG", "input_tokens")


def test_prompt_that_leaves_no_room_for_output_is_refused() -> None:
    error = _refusal(_request((1,) * 32))

    assert error.reason == "PROMPT_TOO_LONG"
    assert "plus the number of requested output tokens (at least 1)" in error.message


def test_empty_prompt_is_refused() -> None:
    assert _refusal(_request(())).message == "The decoder prompt cannot be empty."


def test_token_beyond_the_vocabulary_is_refused() -> None:
    assert _refusal(_request((1, 256))).message == "Token id 256 is out of vocabulary."


@pytest.mark.parametrize(
    ("wishes", "message"),
    [
        ({"max_tokens": 0}, "max_tokens must be at least 1, got 0."),
        (
            {"max_tokens": 33},
            "max_tokens=33 cannot be greater than max_model_len=32. Please request fewer output"
            " tokens.",
        ),
        ({"temperature": -1.0}, "temperature must be non-negative, got -1."),
        (
            {"stop_token_ids": (256,)},
            "stop_token_ids must be below the vocabulary size 256, got 256.",
        ),
    ],
)
def test_bad_sampling_values_are_refused_by_name(wishes: dict[str, Any], message: str) -> None:
    error = _refusal(_request(**wishes))

    assert isinstance(error, InvalidRequestError)
    assert error.message == message
    assert error.param in wishes


def test_other_model_is_not_found() -> None:
    error = _refusal(_request(context=replace(CONTEXT, model="other")))

    assert isinstance(error, NotFoundError)
    assert error.message == "The model `other` does not exist. Valid aliases: tiny."
    ADMISSION.check(_request(context=replace(CONTEXT, model="tiny")))


def test_adapter_is_not_found() -> None:
    assert isinstance(_refusal(_request(context=replace(CONTEXT, adapter="lora"))), NotFoundError)


def test_spans_at_their_expansions_are_admitted() -> None:
    prompt, _ = ADMISSION.check(_request((9, 50, 51, 51, 50, 51, 51, 9), (_span(1), _span(4))))

    assert len(prompt.spans) == 2


@pytest.mark.parametrize(
    ("token_ids", "spans"),
    [
        pytest.param((9, 50, 51, 9), (_span(1),), id="another_token_in_the_expansion"),
        pytest.param((9, 50, 51), (_span(1),), id="beyond_the_prompt"),
        pytest.param((50, 51, 51, 51), (_span(0), _span(1)), id="overlapping"),
        pytest.param((50, 51, 51, 50, 51, 51), (_span(3), _span(0)), id="not_in_order"),
        pytest.param((50, 51, 51), (_span(0, width=2),), id="another_width"),
        pytest.param((50, 51, 51), (_span(0, role=TensorRole.DEEPSTACK),), id="another_role"),
    ],
)
def test_spans_that_do_not_fit_the_prompt_are_refused(
    token_ids: tuple[int, ...], spans: tuple[MediaSpan, ...]
) -> None:
    error = _refusal(_request(token_ids, spans))

    assert error.reason == "LAYOUT_MISMATCH"
    assert error.param.startswith("spans[")


def test_too_many_media_items_are_refused() -> None:
    error = _refusal(_request((50, 51, 51) * 3, (_span(0), _span(3), _span(6))))

    assert error.message == "At most 2 media items may be provided in one prompt."


def _deepstack_span(*tensors: TensorSpec) -> MediaSpan:
    span = _span(1)
    return replace(span, ref=replace(span.ref, tensors=(*span.ref.tensors, *tensors)))


def _level(level: int, num_rows: int = 2) -> TensorSpec:
    return TensorSpec(TensorRole.DEEPSTACK, DataType.FLOAT32, (num_rows, 1), level)


def test_deepstack_tensors_are_taken_by_models_that_add_them() -> None:
    admission = Admission(
        replace(BYTE_SPEC, num_deepstack_levels=2), "tiny", MAX_MODEL_LEN, Limits()
    )
    span = _deepstack_span(_level(0), _level(1))

    prompt, _ = admission.check(_request((1, 50, 51, 51), (span,)))

    assert prompt.spans == (span,)


@pytest.mark.parametrize(
    ("num_levels", "tensors"),
    [
        (0, (_level(0),)),
        (2, ()),
        (2, (_level(0),)),
        (2, (_level(1), _level(0))),
        (2, (_level(0), _level(1), _level(2))),
        (2, (_level(0), _level(1, num_rows=3))),
    ],
)
def test_other_deepstack_tensors_are_refused(
    num_levels: int, tensors: tuple[TensorSpec, ...]
) -> None:
    spec = replace(BYTE_SPEC, num_deepstack_levels=num_levels)
    admission = Admission(spec, "tiny", MAX_MODEL_LEN, Limits())

    with pytest.raises(InvalidRequestError) as refused:
        admission.check(_request((1, 50, 51, 51), (_deepstack_span(*tensors),)))

    assert refused.value.reason == "LAYOUT_MISMATCH"


def test_spans_of_one_embedding_have_equal_tensors() -> None:
    same = _request((50, 51, 51, 50, 51, 51), (_span(0), _span(3)))
    other = _request((50, 51, 51, 50, 51), (_span(0), _span(3, num_rows=1)))

    ADMISSION.check(same)

    error = _refusal(other)
    assert error.reason == "LAYOUT_MISMATCH"
    assert "equal tensors" in error.message
