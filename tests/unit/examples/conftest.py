"""A tokenizer, small and quick to train, for the tests of the demo model."""

from collections.abc import Iterator

import pytest
import torch
from tokenizers import Tokenizer

from examples.demo_model.tokenizer import train_tokenizer
from examples.demo_model.train import sample_texts


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return train_tokenizer(sample_texts(seed=1, number=20))


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Keep tiny models on one thread; more would wait for each other on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
