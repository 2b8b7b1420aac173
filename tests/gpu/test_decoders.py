"""Both decoders on a GPU against the whole model: tokens, chunks, prefixes, preemption, logits.

The tests are those of the CPU; the reference computes there.
"""

from __future__ import annotations

import pytest

from tests.unit.generator.test_decoders import (
    gold,
    make_split,
    prompts,
    test_cancel_storm_beside_them_changes_no_token,
    test_chunks_and_blocks_of_any_size_change_no_token,
    test_contexts_gathered_in_parts_change_no_token,
    test_deterministic_logits_do_not_depend_on_the_company,
    test_each_alone_equals_the_whole_model,
    test_eight_at_once_equal_the_whole_model,
    test_embeddings_in_reverse_order_change_no_token,
    test_preemption_changes_no_token,
    test_prefill_logits_equal_the_whole_model,
    test_prefix_hits_change_no_token,
    test_prompt_logprobs_are_those_of_the_whole_model_also_behind_cached_prefixes,
)

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(120)]

__all__ = [
    "gold",
    "make_split",
    "prompts",
    "test_cancel_storm_beside_them_changes_no_token",
    "test_chunks_and_blocks_of_any_size_change_no_token",
    "test_contexts_gathered_in_parts_change_no_token",
    "test_deterministic_logits_do_not_depend_on_the_company",
    "test_each_alone_equals_the_whole_model",
    "test_eight_at_once_equal_the_whole_model",
    "test_embeddings_in_reverse_order_change_no_token",
    "test_preemption_changes_no_token",
    "test_prefill_logits_equal_the_whole_model",
    "test_prefix_hits_change_no_token",
    "test_prompt_logprobs_are_those_of_the_whole_model_also_behind_cached_prefixes",
]
