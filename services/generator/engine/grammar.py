"""Compile what an output must look like, and follow it token by token."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import llguidance
import numpy as np

from chiasm.common.errors import InvalidRequestError
from chiasm.common.sampling import GUIDE_PARAM, GuideKind

if TYPE_CHECKING:
    from collections.abc import Iterable

    from llguidance._lib import JsonCompileOptions

    from chiasm.common.sampling import Guide

_REASON = "INVALID_GRAMMAR"
_MAX_ERROR_CHARS = 300
_Format = Literal["regex", "choice", "grammar"]
_FORMATS: dict[GuideKind, _Format] = {
    GuideKind.REGEX: "regex",
    GuideKind.CHOICES: "choice",
    GuideKind.GRAMMAR: "grammar",
}
# A weak model would fill its answer with spaces; this is enough for any indentation in use.
_JSON_OPTIONS: JsonCompileOptions = {"whitespace_pattern": r"[ \n\r\t]{1,20}"}
# Below the library's own. An object is compiled in a time by the square of its properties: at the
# most that this size allows, in less than `guides.py` waits.
_MAX_GRAMMAR_SIZE = 50_000
_MAX_LEXER_STATES = 50_000


class GrammarError(InvalidRequestError):
    """A grammar that was compiled could not be followed: it costs too much at some place."""

    def __init__(self, failure: str) -> None:
        super().__init__(
            f"The guide of the output could not be followed: {failure}",
            reason=_REASON,
            param=GUIDE_PARAM,
        )


class GrammarState:
    """Where one sequence stands in its grammar; used by the forward thread only.

    Attributes:
        failure: Why the grammar can be followed no longer; empty while it can.
    """

    def __init__(self, matcher: llguidance.LLMatcher, end_token_ids: frozenset[int]) -> None:
        self._matcher = matcher
        self._end_token_ids = end_token_ids
        self._has_ended = False
        self.failure = ""

    def find_allowed(self, vocab_size: int) -> np.ndarray | None:
        """Return which tokens may follow, ``None`` for any. [vocab_size], bool."""
        if self.failure or self._has_ended:
            return None
        bits = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        self._note_error()
        return np.unpackbits(bits, count=vocab_size, bitorder="little").astype(bool)

    def advance(self, token: int) -> None:
        """Take note of the next token."""
        self._has_ended |= token in self._end_token_ids
        if not self.failure and not self._has_ended:
            self._matcher.consume_token(token)
            self._note_error()

    def _note_error(self) -> None:
        if self._matcher.is_error():
            self.failure = self._matcher.get_error()[:_MAX_ERROR_CHARS]


class Grammar:
    """A compiled grammar that many sequences may follow."""

    def __init__(self, matcher: llguidance.LLMatcher, end_token_ids: frozenset[int]) -> None:
        self._matcher = matcher
        self._end_token_ids = end_token_ids

    def start(self) -> GrammarState:
        """Return the state of a new sequence."""
        return GrammarState(self._matcher.deep_copy(), self._end_token_ids)


class GrammarCompiler:
    """Compiles guides for one tokenizer; thread-safe, slow: call it in a thread."""

    def __init__(self, tokenizer_json: str, vocab_size: int, eos_token_ids: Iterable[int]) -> None:
        """Read the tokenizer.

        Args:
            tokenizer_json: Content of the checkpoint's ``tokenizer.json``.
            vocab_size: Columns of the model's logits.
            eos_token_ids: Tokens that may end an output.
        """
        self._end_token_ids = frozenset(eos_token_ids)
        self._tokenizer = llguidance.LLTokenizer(
            tokenizer_json, n_vocab=vocab_size, eos_token=sorted(self._end_token_ids)
        )
        self._limits = llguidance.LLParserLimits(
            max_grammar_size=_MAX_GRAMMAR_SIZE,
            max_lexer_states=_MAX_LEXER_STATES,
            verbose_errors=False,
        )

    def compile(self, guide: Guide) -> Grammar:
        """Return the grammar of ``guide``.

        Raises:
            InvalidRequestError: It is not valid, or over what one grammar may cost.
        """
        try:
            text = _to_library(guide)
        except ValueError as error:
            raise _refusal(str(error)) from error
        matcher = llguidance.LLMatcher(self._tokenizer, text, log_level=0, limits=self._limits)
        if matcher.is_error():
            raise _refusal(matcher.get_error())
        return Grammar(matcher, self._end_token_ids)


def _to_library(guide: Guide) -> str:
    """Return the guide in the library's own notation; ``ValueError`` if it is not JSON."""
    if guide.kind is GuideKind.JSON_SCHEMA:
        return llguidance.LLMatcher.grammar_from_json_schema(guide.text, defaults=_JSON_OPTIONS)
    return llguidance.grammar_from(_FORMATS[guide.kind], guide.text)


def _refusal(text: str) -> InvalidRequestError:
    return InvalidRequestError(
        f"The guide of the output is not valid: {text[:_MAX_ERROR_CHARS]}",
        reason=_REASON,
        param=GUIDE_PARAM,
    )
