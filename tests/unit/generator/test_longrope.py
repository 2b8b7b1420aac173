"""Models whose angles depend on the longest sequence of a forward are served short of that."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

import pytest
from structlog.testing import capture_logs

from tests.fakes.checkpoints import make_llava_around
from tests.fakes.split_engine import SplitEngine
from tests.fakes.text_models import LONGROPE_CONFIG, LONGROPE_CONTEXT
from tests.fakes.whole_model import MediaPrompt, WholeModel

if TYPE_CHECKING:
    from chiasm.generator.model.make_decoder import DecoderChoice

MAX_TOKENS = 8


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> WholeModel:
    return WholeModel(make_llava_around(LONGROPE_CONFIG, tmp_path_factory.mktemp("longrope")))


def _split(whole: WholeModel, decoder: DecoderChoice, max_step_tokens: int = 4096) -> SplitEngine:
    return SplitEngine(
        whole, decoder=decoder, max_tokens=MAX_TOKENS, max_step_tokens=max_step_tokens
    )


def _longest_prompt(split: SplitEngine) -> MediaPrompt:
    rng = random.Random(0)
    num_tokens = split.loaded.max_model_len - MAX_TOKENS
    return MediaPrompt(tuple(rng.randrange(20, 300) for _ in range(num_tokens)), (), (), {})


@pytest.mark.parametrize("decoder", ["fused", "transformers"])
def test_longest_prompt_changes_no_token_beside_it(
    whole: WholeModel, decoder: DecoderChoice
) -> None:
    short = whole.make_prompt(0, 1, MAX_TOKENS)
    split = _split(whole, decoder)

    tokens, _ = split.generate([short, _longest_prompt(split)])

    assert split.most_in_one_forward == 2
    assert tokens == list(short.answer)


@pytest.mark.parametrize("decoder", ["fused", "transformers"])
def test_longest_prompt_has_the_same_tokens_if_it_is_cut(
    whole: WholeModel, decoder: DecoderChoice
) -> None:
    split, cut = _split(whole, decoder), _split(whole, decoder, max_step_tokens=40)
    prompt = _longest_prompt(split)

    assert cut.generate([prompt]) == split.generate([prompt])


def test_start_says_that_the_context_is_shortened(whole: WholeModel) -> None:
    with capture_logs() as logs:
        split = _split(whole, "auto")

    (line,) = (log for log in logs if log["event"] == "context_shortened")
    assert line["max_positions"] == split.loaded.max_model_len == LONGROPE_CONTEXT
    assert "trained for 2048" in line["reason"]
