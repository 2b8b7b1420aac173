"""Turn text into token ids and back with the checkpoint's own ``tokenizer.json``."""

from __future__ import annotations

import json
import re
import secrets
from typing import TYPE_CHECKING

import tokenizers

from chiasm.common.errors import InvalidRequestError

from .checkpoint import CheckpointError
from .detokenizer import ByteLevelDetokenizer, WindowDetokenizer, bytes_of_token
from .spellings import Spellings

if TYPE_CHECKING:
    from pathlib import Path

    from .detokenizer import Detokenizer
    from .spellings import TextGuard

# How vocabularies with byte fallback spell a byte that is a part of a character.
_PARTIAL_BYTE_TOKEN = re.compile(r"<0x([89A-Fa-f][0-9A-Fa-f])>")


class Tokenizer:
    """The checkpoint's tokenizer with two ways in.

    ``encode`` is exactly what Hugging Face does. ``encode_guarded`` is the same pipeline, with the
    difference that spellings of added tokens in client text stay text: it runs on a twin whose
    added tokens have secret spellings, and only the template's own spellings are translated.
    """

    def __init__(self, tokenizer: tokenizers.Tokenizer) -> None:
        self._tokenizer = tokenizer
        added = tokenizer.get_added_tokens_decoder()
        self.spellings = Spellings(token.content for token in added.values())
        self.special_spellings = Spellings(
            token.content for token in added.values() if token.special
        )
        self._special_ids = frozenset(
            token_id for token_id, token in added.items() if token.special
        )
        stages = _decoder_stages(tokenizer)
        self._is_byte_level = stages == ["ByteLevel"]
        self._has_byte_tokens = "ByteFallback" in stages
        self._prefix_ids, self._suffix_ids = _template_ids(tokenizer)
        self._twin = _Twin(tokenizer, self.spellings)
        vocabulary = tokenizer.get_vocab(with_added_tokens=True)
        self.max_token_chars = max(map(len, vocabulary), default=1)

    @classmethod
    def load(cls, model_path: Path) -> Tokenizer:
        """Load ``tokenizer.json`` of a checkpoint.

        Raises:
            CheckpointError: There is no ``tokenizer.json``, or it is not a tokenizer.
        """
        path = model_path / "tokenizer.json"
        try:
            tokenizer = tokenizers.Tokenizer.from_str(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read: {error.strerror}.") from error
        except Exception as error:  # the binding raises bare Exception
            raise CheckpointError(f"{path} is not a tokenizer: {error}") from error
        tokenizer.no_truncation()
        tokenizer.no_padding()
        return cls(tokenizer)

    def encode(self, text: str, *, add_special_tokens: bool = False) -> list[int]:
        """Return the token ids of ``text``; spellings of added tokens become those tokens."""
        # NOTE: only the batch calls release the interpreter lock.
        ids: list[int] = self._tokenizer.encode_batch_fast(
            [text], add_special_tokens=add_special_tokens
        )[0].ids
        return ids

    def encode_guarded(
        self, rendered: str, guard: TextGuard, *, add_special_tokens: bool = False
    ) -> list[int]:
        """Return the token ids of a rendered prompt whose client texts went through ``guard``."""
        if not guard.is_used:
            return self.encode(rendered, add_special_tokens=add_special_tokens)
        text = "".join(
            piece.text if piece.is_literal else self._twin.translate(piece.text)
            for piece in guard.split(rendered)
        )
        ids = self._twin.encode(text)
        return [*self._prefix_ids, *ids, *self._suffix_ids] if add_special_tokens else ids

    def spelling_of(self, token_id: int) -> str:
        """Return the spelling of a token; raise ``InvalidRequestError`` if there is none."""
        token = self._tokenizer.id_to_token(token_id)
        if token is None:
            raise InvalidRequestError(f"Token {token_id} is not in the vocabulary.")
        return token

    def bytes_of(self, token_id: int, *, is_first: bool = False) -> bytes:
        """Return the bytes of a token; those of an answer's tokens, joined, spell the answer.

        Args:
            token_id: The token; a special one's bytes are its spelling.
            is_first: Whether it is the first of its answer, where decoders may drop a space.

        Returns:
            Bytes that may be a part of a character; empty if there is no such token.
        """
        token = self._tokenizer.id_to_token(token_id) or ""
        if self._is_byte_level:
            return bytes_of_token(token)
        if self._has_byte_tokens and (match := _PARTIAL_BYTE_TOKEN.fullmatch(token)):
            return bytes.fromhex(match[1])
        text = self._tokenizer.decode([token_id], skip_special_tokens=False)
        if not is_first:
            # Behind itself it is in the middle of a text.
            twice = self._tokenizer.decode([token_id, token_id], skip_special_tokens=False)
            text = twice[len(text) :]
        return text.encode()

    def decode(self, token_ids: list[int]) -> str:
        """Return the text of ``token_ids``, special tokens left out."""
        return self._tokenizer.decode(token_ids, skip_special_tokens=True)

    def detokenizer(self) -> Detokenizer:
        """Return a fresh incremental detokenizer that leaves out special tokens."""
        if self._is_byte_level:
            return ByteLevelDetokenizer(self._tokenizer.id_to_token, self._special_ids)
        return WindowDetokenizer(self.decode, self._special_ids)


class _Twin:
    """The same tokenizer with secret spellings for its added tokens."""

    def __init__(self, tokenizer: tokenizers.Tokenizer, spellings: Spellings) -> None:
        guarded = frozenset(spellings.contents)
        added = tokenizer.get_added_tokens_decoder()
        self._spellings = spellings
        self._secret = {
            token.content: f"\ue002{secrets.randbits(64)}.{token_id}\ue003"
            for token_id, token in added.items()
            if token.content in guarded
        }
        self._tokenizer = _without_added(tokenizer, guarded)
        self._tokenizer.add_tokens(
            [
                tokenizers.AddedToken(
                    self._secret[token.content],
                    single_word=token.single_word,
                    lstrip=token.lstrip,
                    rstrip=token.rstrip,
                    normalized=token.normalized,
                    special=False,
                )
                for token in added.values()
                if token.content in guarded
            ]
        )
        self._public_ids = {
            self._tokenizer.token_to_id(self._secret[token.content]): token_id
            for token_id, token in added.items()
            if token.content in guarded
        }
        self._guarded = {
            token_id: token.content for token_id, token in added.items() if token.content in guarded
        }

    def translate(self, text: str) -> str:
        """Return ``text`` with the secret spelling of each added token in it."""
        return self._spellings.pattern.sub(lambda match: self._secret[match[0]], text)

    def encode(self, text: str) -> list[int]:
        """Return token ids, as the original tokenizer numbers them."""
        ids: list[int] = []
        for token_id in self._raw_ids(text):
            if token_id in self._public_ids:
                ids.append(self._public_ids[token_id])
            elif token_id in self._guarded:
                # NOTE: some models know a special token as an ordinary piece of text too.
                for char in self._guarded[token_id]:
                    ids.extend(self._raw_ids(char))
            else:
                ids.append(token_id)
        return ids

    def _raw_ids(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer.encode_batch_fast([text], add_special_tokens=False)[0].ids
        return ids


def _without_added(
    tokenizer: tokenizers.Tokenizer, contents: frozenset[str]
) -> tokenizers.Tokenizer:
    description = json.loads(tokenizer.to_str())
    description["added_tokens"] = [
        token for token in description["added_tokens"] if token["content"] not in contents
    ]
    description["post_processor"] = None
    return tokenizers.Tokenizer.from_str(json.dumps(description))


def _template_ids(tokenizer: tokenizers.Tokenizer) -> tuple[list[int], list[int]]:
    """Return the ids that the post-processor puts before and after a text."""
    plain: list[int] = tokenizer.encode("a", add_special_tokens=False).ids
    full: list[int] = tokenizer.encode("a", add_special_tokens=True).ids
    for start in range(len(full) - len(plain) + 1):
        if full[start : start + len(plain)] == plain:
            return full[:start], full[start + len(plain) :]
    return [], []


def _decoder_stages(tokenizer: tokenizers.Tokenizer) -> list[str]:
    decoder = json.loads(tokenizer.to_str()).get("decoder") or {}
    stages = decoder.get("decoders", [decoder])
    return [stage.get("type", "") for stage in stages]
