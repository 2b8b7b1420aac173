"""A random Qwen2.5-VL of the 3B class on a GPU, for transformers, our decoders and our engine."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import transformers

from chiasm.common.families import PositionScheme
from chiasm.common.graph_recorder import GraphRecorder
from chiasm.generator.engine.block_group import GroupSize
from chiasm.generator.engine.block_manager import BlockManager
from chiasm.generator.engine.chunking import Chunking
from chiasm.generator.engine.engine import Engine
from chiasm.generator.engine.sampler import Sampler
from chiasm.generator.engine.sampling_params import SamplingParams
from chiasm.generator.engine.scheduler import Scheduler, SchedulerLimits
from chiasm.generator.engine.sequence import Prompt, Sequence
from chiasm.generator.model.find_cache_kernels import find_cache_kernels
from chiasm.generator.model.fused.fused_decoder import FusedDecoder
from chiasm.generator.model.graph_inputs import GraphLimits
from chiasm.generator.model.graphed_decoder import GraphedDecoder
from chiasm.generator.model.kv_cache import KVCache, KVCacheLayout
from chiasm.generator.model.make_decoder import make_decoder
from chiasm.generator.model.model_spec import read_model_spec
from chiasm.generator.model.positions import compute_positions
from chiasm.generator.model.runner import ModelRunner

if TYPE_CHECKING:
    from chiasm.generator.engine.outputs import EngineState, StepStatistics
    from chiasm.generator.model.decoder import Decoder
    from chiasm.generator.model.make_decoder import DecoderChoice

CUDA = torch.device("cuda")
DTYPE = torch.bfloat16
BLOCK_SIZE = 16
STEP_TOKENS = 2048
MAX_SEQUENCES = 64
# How wide the block tables of recorded steps are.
MAX_CONTEXT = 32_768
TEXT: dict[str, Any] = {
    "vocab_size": 151_936,
    "hidden_size": 2048,
    "intermediate_size": 11_008,
    "num_hidden_layers": 36,
    "num_attention_heads": 16,
    "num_key_value_heads": 2,
    "max_position_embeddings": MAX_CONTEXT,
    "tie_word_embeddings": True,
    "initializer_range": 0.02,
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 1e6,
        "mrope_section": [16, 24, 24],
    },
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": 0,
}
# The tower is measured on its own.
_NO_TOWER = {"depth": 1, "hidden_size": 64, "num_heads": 4, "intermediate_size": 64}


def make_model(sizes: dict[str, Any]) -> Any:
    """Return a model whose text model has ``sizes``, with random weights in bfloat16."""
    config = transformers.Qwen2_5_VLConfig(
        text_config=sizes,
        vision_config={**_NO_TOWER, "out_hidden_size": sizes["hidden_size"]},
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    with CUDA:
        auto_class: Any = transformers.AutoModelForImageTextToText
        model = auto_class.from_config(config, dtype=DTYPE)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model.eval()


def make_decoders(sizes: dict[str, Any], num_tokens: int) -> dict[str, Decoder]:
    """Return our decoders, each on a filled cache of its own for ``num_tokens``.

    The third replays the steps of the second from CUDA graphs, on the same cache.
    """
    decoders: dict[str, Decoder] = {}
    choices: tuple[DecoderChoice, ...] = ("transformers", "fused")
    for choice in choices:
        model = make_model(sizes).requires_grad_(False)
        layout = KVCacheLayout((GroupSize(-(-num_tokens // BLOCK_SIZE)),), BLOCK_SIZE)
        kernels = find_cache_kernels(CUDA, DTYPE, "auto")
        cache = KVCache(read_model_spec(model), layout, DTYPE, CUDA, kernels)
        for tensor in (*cache.keys, *cache.values):
            tensor.normal_()
        decoders[choice] = make_decoder(choice, model, cache)
    limits = GraphLimits(MAX_SEQUENCES, MAX_CONTEXT)
    fused = decoders["fused"]
    assert isinstance(fused, FusedDecoder)
    decoders["replayed"] = GraphedDecoder(fused, limits, GraphRecorder(CUDA))
    return decoders


def count_weight_bytes(sizes: dict[str, Any]) -> int:
    """Return the bytes of the weights that every step reads: layers and head."""
    width, inner = sizes["hidden_size"], sizes["intermediate_size"]
    kv_width = width // sizes["num_attention_heads"] * sizes["num_key_value_heads"]
    layer = 2 * width * width + 2 * width * kv_width + 3 * width * inner
    values: int = sizes["num_hidden_layers"] * layer + width * sizes["vocab_size"]
    return values * DTYPE.itemsize


def count_context_bytes(sizes: dict[str, Any]) -> int:
    """Return the bytes of keys and values of one token in all layers."""
    head_dim = sizes["hidden_size"] // sizes["num_attention_heads"]
    values: int = 2 * sizes["num_hidden_layers"] * sizes["num_key_value_heads"] * head_dim
    return values * DTYPE.itemsize


class StepClock:
    """Runs an engine on a decoder and keeps the seconds of its steps."""

    def __init__(self, decoder: Decoder, num_tokens: int) -> None:
        """Build the engine for at most ``num_tokens`` tokens of all sequences."""
        sizes = (GroupSize(-(-num_tokens // BLOCK_SIZE)),)
        scheduler = Scheduler(
            BlockManager(sizes, BLOCK_SIZE),
            SchedulerLimits(STEP_TOKENS, MAX_SEQUENCES, Chunking()),
        )
        runner = ModelRunner(decoder, Sampler(), max_step_tokens=STEP_TOKENS)
        self._engine = Engine(scheduler, runner, [self])
        self._next_id = 0
        self._vocab_size = decoder.spec.vocab_size
        self._steps: list[StepStatistics] = []

    def observe(self, statistics: StepStatistics) -> None:
        """Keep the figures of a step."""
        self._steps.append(statistics)

    def observe_state(self, state: EngineState) -> None:
        """Only steps are of interest."""

    def decode(self, batch: int, context: int, num_steps: int) -> list[StepStatistics]:
        """Return the steps in which ``batch`` sequences of ``context`` tokens do nothing else."""
        self._steps.clear()
        generator = torch.Generator().manual_seed(self._next_id)
        for _ in range(batch):
            token_ids = torch.randint(self._vocab_size, (context,), generator=generator).tolist()
            positions = compute_positions(PositionScheme.MROPE, context, ())
            # Those that come first decode while the others' prompts are computed.
            num_tokens = num_steps + 2 + batch * context // STEP_TOKENS * 9 // 8
            params = SamplingParams(num_tokens, temperature=0.0)
            self._engine.add(
                Sequence(self._next_id, Prompt(tuple(token_ids), (), positions), params)
            )
            self._next_id += 1
        while self._engine.has_work:
            self._engine.step()
        return [
            step
            for step in self._steps
            if not step.num_prefill_tokens and step.num_sequences == batch
        ][:num_steps]

    def close(self) -> None:
        """End the engine's thread."""
        self._engine.close()
