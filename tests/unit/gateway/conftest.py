"""Fixtures of the gateway's unit tests."""

from __future__ import annotations

import pytest

from chiasm.gateway.tokenizer import Tokenizer
from tests.fakes.tokenizers import make_tokenizer


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return Tokenizer(make_tokenizer())
