"""Measure a model during training, in one forward pass per group of questions.

Under teacher forcing the best token at every place of the answer equals the answer exactly when
greedy decoding writes that answer, so nothing needs to be generated.
"""

from collections.abc import Sequence

import torch
from tokenizers import Tokenizer
from transformers import Qwen2VLForConditionalGeneration

from .conversation import IGNORED, ConversationWriter
from .dataset import Batch, Sample, collate
from .held_out import KINDS, HeldOutQuestion, make_questions
from .pixels import CELL, PATCH, decode_picture, patchify, resize_picture

GROUP = 40
BLOCKED = -1e9


def validate(
    model: Qwen2VLForConditionalGeneration, tokenizer: Tokenizer, num_per_kind: int, seed: int
) -> dict[str, float]:
    """Return the part of right answers for every kind of held-out question."""
    model.train(False)
    accuracy = {}
    for kind in KINDS:
        questions = make_questions(kind, num_per_kind, seed)
        groups = [questions[at : at + GROUP] for at in range(0, len(questions), GROUP)]
        right = sum(_count_right(model, tokenizer, group) for group in groups)
        accuracy[kind] = right / num_per_kind
    return accuracy


@torch.no_grad()
def _count_right(
    model: Qwen2VLForConditionalGeneration,
    tokenizer: Tokenizer,
    questions: Sequence[HeldOutQuestion],
) -> int:
    batch = collate([_to_sample(question, tokenizer) for question in questions])
    hidden, _ = forward_text(model, batch, forward_tower(model, batch))
    guesses = model.lm_head(hidden).argmax(dim=-1)
    is_right = (guesses == batch.targets) | (batch.targets == IGNORED)
    return int(is_right.all(dim=1).sum())


def forward_tower(model: Qwen2VLForConditionalGeneration, batch: Batch) -> torch.Tensor | None:
    """Run the vision tower over a batch's pictures, if any. [num_cells, width]."""
    if not batch.pictures:
        return None
    sides = [(picture.shape[1] // PATCH, picture.shape[2] // PATCH) for picture in batch.pictures]
    grids = torch.tensor([[1, rows, columns] for rows, columns in sides])
    patches = torch.cat([patchify(picture) for picture in batch.pictures])
    cells: torch.Tensor = model.model.visual(patches, grid_thw=grids).pooler_output
    return cells


def forward_text(
    model: Qwen2VLForConditionalGeneration, batch: Batch, cells: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Run the language model with the tower's outputs in their places.

    Returns:
        The last hidden states and those after half of the layers. Each [batch, length, width].
    """
    language_model = model.model.language_model
    embeds = language_model.embed_tokens(batch.token_ids)
    if cells is not None:
        is_picture = (batch.token_ids == model.config.image_token_id)[..., None]
        embeds = embeds.masked_scatter(is_picture, cells.to(embeds.dtype))
    mask = torch.zeros(batch.mask.shape).masked_fill(~batch.mask, BLOCKED)
    if torch.is_autocast_enabled("cpu"):
        mask = mask.bfloat16()
    output = language_model(
        inputs_embeds=embeds,
        position_ids=batch.positions,
        attention_mask=mask,
        use_cache=False,
        output_hidden_states=True,
    )
    return output.last_hidden_state, output.hidden_states[len(language_model.layers) // 2]


def _to_sample(question: HeldOutQuestion, tokenizer: Tokenizer) -> Sample:
    pictures = [resize_picture(decode_picture(data)) for data, _ in question.files()]
    grids = [(picture.shape[1] // CELL, picture.shape[2] // CELL) for picture in pictures]
    writer = ConversationWriter(tokenizer)
    writer.open_user()
    if question.text_is_first:
        writer.add_question(question.turn.question)
        writer.add_pictures(grids)
    else:
        writer.add_pictures(grids)
        writer.add_question(question.turn.question)
    writer.add_answer(question.turn.answer)
    return Sample(pictures, [], writer.sequence)
