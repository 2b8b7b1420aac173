"""Outputs of random logits belong to their grammar, whatever else is asked for."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from jsonschema import validate  # type: ignore[import-untyped]  # no stubs in the lock
from tokenizers import Tokenizer

from chiasm.common.errors import InvalidRequestError
from chiasm.common.sampling import Guide, GuideKind
from chiasm.generator.engine.grammar import Grammar, GrammarCompiler
from chiasm.generator.engine.sampler import SampledRow, Sampler
from chiasm.generator.engine.sampling_params import SamplingParams
from chiasm.generator.engine.sampling_state import SamplingState

TOKENIZER_PATH = Path("models/demo/tokenizer.json")
VOCAB_SIZE = 960
EOS_TOKEN_ID = 893
SCHEMA = {
    "type": "object",
    "properties": {
        "colour": {"enum": ["red", "blue"]},
        "count": {"type": "integer", "minimum": 0, "maximum": 99},
        "names": {"type": "array", "items": {"type": "string", "maxLength": 3}, "maxItems": 2},
    },
    "required": ["colour", "count", "names"],
    "additionalProperties": False,
}
# Together as many as one object may have, and some: those would take long to compile.
MANY_PROPERTIES = {
    "anyOf": [
        {"properties": {f"{part}_{index}": {"type": "integer"} for index in range(40)}}
        for part in range(200)
    ]
}
GRAMMAR = 'start: "(" start ")" | "x" | "y"'


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(TOKENIZER_PATH))


@pytest.fixture(scope="module")
def compiler() -> GrammarCompiler:
    return GrammarCompiler(TOKENIZER_PATH.read_text(), VOCAB_SIZE, [EOS_TOKEN_ID])


def _generate(grammars: list[Grammar], num_tokens: int = 200, **params: float) -> list[list[int]]:
    """Return what random logits generate, all grammars in one batch, end tokens left out."""
    generator = torch.Generator().manual_seed(0)
    sampling = [
        SamplingParams(num_tokens, seed=index, grammar=grammar, **params)  # type: ignore[arg-type]  # floats
        for index, grammar in enumerate(grammars)
    ]
    states = [SamplingState(one, []) for one in sampling]
    outputs: list[list[int]] = [[] for _ in grammars]
    for position in range(num_tokens):
        logits = torch.randn(len(grammars), VOCAB_SIZE, generator=generator) * 3
        # Rare enough that strings end some time.
        logits[:, EOS_TOKEN_ID] += 3
        rows = [
            SampledRow(one, position, state) for one, state in zip(sampling, states, strict=True)
        ]
        for output, token in zip(outputs, Sampler().sample(logits, rows), strict=True):
            assert token is not None
            output.append(token.token_id)
    assert not any(state.failure for state in states)
    return [
        output[: output.index(EOS_TOKEN_ID)] if EOS_TOKEN_ID in output else output
        for output in outputs
    ]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_outputs_of_one_batch_belong_to_their_grammars(
    compiler: GrammarCompiler, tokenizer: Tokenizer, temperature: float
) -> None:
    guides = [
        Guide(GuideKind.JSON_SCHEMA, json.dumps(SCHEMA)),
        Guide(GuideKind.REGEX, r"[a-c]{2,5}-[0-9]{1,3}!"),
        Guide(GuideKind.CHOICES, '["a red star", "a blue heart"]'),
        Guide(GuideKind.GRAMMAR, GRAMMAR),
    ]

    outputs = _generate([compiler.compile(guide) for guide in guides], temperature=temperature)

    schema, regex, choice, nested = (tokenizer.decode(output) for output in outputs)
    validate(json.loads(schema), SCHEMA)
    assert re.fullmatch(r"[a-c]{2,5}-[0-9]{1,3}!", regex)
    assert choice in ("a red star", "a blue heart")
    depth = nested.count("(")
    assert re.match(r"\(*[xy]?\)*$", nested)
    assert nested.count(")") <= depth


def test_end_token_comes_as_soon_as_nothing_else_may(compiler: GrammarCompiler) -> None:
    (output,) = _generate([compiler.compile(Guide(GuideKind.CHOICES, '["red"]'))], num_tokens=9)

    assert len(output) < 9


def test_grammar_is_shared_and_each_sequence_follows_it_for_itself(
    compiler: GrammarCompiler, tokenizer: Tokenizer
) -> None:
    grammar = compiler.compile(Guide(GuideKind.CHOICES, '["red", "blue", "green"]'))

    outputs = [tokenizer.decode(output) for output in _generate([grammar] * 24, num_tokens=9)]

    assert set(outputs) == {"red", "blue", "green"}


def test_minimum_length_gives_way_to_the_grammar(compiler: GrammarCompiler) -> None:
    grammar = compiler.compile(Guide(GuideKind.CHOICES, '["red"]'))
    params = SamplingParams(
        9, temperature=0.0, min_tokens=9, stop_token_ids=frozenset({EOS_TOKEN_ID}), grammar=grammar
    )
    state = SamplingState(params, [])

    tokens = []
    for position in range(4):
        (token,) = Sampler().sample(
            torch.zeros(1, VOCAB_SIZE), [SampledRow(params, position, state)]
        )
        assert token is not None
        tokens.append(token.token_id)

    assert EOS_TOKEN_ID in tokens


def test_json_may_be_indented_but_not_filled_with_spaces(
    compiler: GrammarCompiler, tokenizer: Tokenizer
) -> None:
    grammar = compiler.compile(Guide(GuideKind.JSON_SCHEMA, json.dumps(SCHEMA)))

    def follows(text: str) -> bool:
        state = grammar.start()
        for token in tokenizer.encode(text, add_special_tokens=False).ids:
            allowed = state.find_allowed(VOCAB_SIZE)
            if allowed is None or not allowed[token]:
                return False
            state.advance(token)
        return True

    answer = {"colour": "red", "count": 3, "names": ["ab"]}
    assert follows(json.dumps(answer))
    assert follows(json.dumps(answer, separators=(",", ":")))
    assert follows(json.dumps(answer, indent=4))
    assert not follows("{" + 30 * " ")


def test_guides_made_to_explode_do_not(compiler: GrammarCompiler) -> None:
    bombs = ["((a{1,1000}){1,1000}){1,1000}", ".*a.{25}", "(a|aa)*b", "(.?){900}"]

    outputs = _generate(
        [compiler.compile(Guide(GuideKind.REGEX, bomb)) for bomb in bombs], num_tokens=40
    )

    assert all(outputs)


@pytest.mark.parametrize(
    "guide",
    [
        Guide(GuideKind.REGEX, "(("),
        Guide(GuideKind.JSON_SCHEMA, "{"),
        Guide(GuideKind.JSON_SCHEMA, '{"type": "colour"}'),
        Guide(GuideKind.GRAMMAR, "start: nowhere"),
        Guide(GuideKind.JSON_SCHEMA, json.dumps(MANY_PROPERTIES)),
    ],
    ids=["regex", "json", "schema", "grammar", "properties"],
)
def test_guide_that_is_wrong_or_too_large_is_refused(
    compiler: GrammarCompiler, guide: Guide
) -> None:
    with pytest.raises(InvalidRequestError, match="The guide of the output is not valid") as caught:
        compiler.compile(guide)

    assert caught.value.reason == "INVALID_GRAMMAR"
    assert len(caught.value.message) < 400
