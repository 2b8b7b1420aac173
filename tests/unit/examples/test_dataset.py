"""Training data of the demo model: determinism, resuming, and what a token may see."""

from itertools import islice
from random import Random

import torch
from tokenizers import Tokenizer

from examples.demo_model.conversation import IGNORED, ConversationWriter
from examples.demo_model.dataset import NUM_CLASSES, DemoDataset, Sample, collate, make_sample
from examples.demo_model.tokenizer import token_id


def test_a_sample_is_a_function_of_its_seed(tokenizer: Tokenizer) -> None:
    one, other = (make_sample(tokenizer, Random("a")) for _ in range(2))
    assert one.tokens == other.tokens
    assert all(map(torch.equal, one.pictures, other.pictures))


def test_every_picture_has_as_many_placeholders_as_labelled_cells(tokenizer: Tokenizer) -> None:
    image_id = token_id(tokenizer, "<|image_pad|>")
    for seed in range(8):
        sample = make_sample(tokenizer, Random(seed))
        num_cells = sum(len(labels) for labels in sample.cell_labels)
        assert sample.tokens.token_ids.count(image_id) == num_cells
        for labels in sample.cell_labels:
            assert (labels[:, : len(NUM_CLASSES)] < torch.tensor(NUM_CLASSES)).all()


def test_only_answers_are_learned_and_each_ends_its_turn(tokenizer: Tokenizer) -> None:
    writer = ConversationWriter(tokenizer)
    writer.open_user()
    writer.add_pictures([(2, 3)])
    writer.add_question("What is this?")
    writer.add_answer("It is a red star.")
    learned = [token for token in writer.sequence.targets if token != IGNORED]
    assert tokenizer.decode(learned, skip_special_tokens=False) == "It is a red star.<|im_end|>"


def test_segments_see_the_prefix_and_not_each_other(tokenizer: Tokenizer) -> None:
    writer = ConversationWriter(tokenizer)
    writer.open_user()
    for question in ("One?", "Two?"):
        writer.start_segment()
        writer.add_question(question)
        writer.add_answer("Yes.")
    batch = collate([Sample([], [], writer.sequence)])
    segments = torch.tensor(writer.sequence.segments)
    mask = batch.mask[0, 0]
    last = len(segments) - 1
    assert mask[last, segments == 0].all()
    assert not mask[last, segments == 1].any()
    assert mask.tril().equal(mask)
    starts = [writer.sequence.segments.index(segment) for segment in (1, 2)]
    assert batch.positions[0, 0, starts[0]] == batch.positions[0, 0, starts[1]]


def test_a_resumed_run_sees_the_batches_that_were_left(tokenizer: Tokenizer) -> None:
    whole = DemoDataset(tokenizer.to_str(), seed=3, batch_size=1)
    rest = DemoDataset(tokenizer.to_str(), seed=3, batch_size=1, first=5)
    expected = next(islice(iter(whole), 5, None))
    resumed = next(iter(rest))
    assert resumed.token_ids.equal(expected.token_ids)
    assert resumed.cell_labels.equal(expected.cell_labels)
