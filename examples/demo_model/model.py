"""The architecture of the demo model, the training-only heads, and the export to the hub layout."""

import json
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import nn
from transformers import GenerationConfig, Qwen2VLConfig, Qwen2VLForConditionalGeneration

from . import pixels
from .tokenizer import MAX_LENGTH, save_tokenizer, token_id

VISION = {"depth": 5, "embed_dim": 160, "num_heads": 5, "mlp_ratio": 4, "hidden_act": "gelu"}
TEXT_WIDTH = 192
NUM_TEXT_LAYERS = 4
TEXT = {
    "hidden_size": TEXT_WIDTH, "intermediate_size": 512, "num_hidden_layers": NUM_TEXT_LAYERS,
    "num_attention_heads": 6, "num_key_value_heads": 2, "max_position_embeddings": MAX_LENGTH,
    "rms_norm_eps": 1e-6,
}  # fmt: skip
EMPTY_WEIGHT = 0.2
ROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 6, 6]}


def build_config(tokenizer: Tokenizer) -> Qwen2VLConfig:
    """Describe the demo model for a tokenizer; the vocabulary is padded to a multiple of 64."""
    token_ids = {token: token_id(tokenizer, f"<|{token}|>") for token in (
        "endoftext", "im_end", "vision_start", "vision_end", "image_pad", "video_pad",
    )}  # fmt: skip
    vocab_size = -(-tokenizer.get_vocab_size() // 64) * 64
    vision = {
        **VISION, "hidden_size": TEXT_WIDTH, "patch_size": pixels.PATCH,
        "spatial_merge_size": pixels.MERGE, "temporal_patch_size": pixels.TEMPORAL,
        "in_channels": 3,
    }  # fmt: skip
    text = {
        **TEXT, "vocab_size": vocab_size, "rope_parameters": dict(ROPE), "bos_token_id": None,
        "eos_token_id": token_ids["im_end"], "pad_token_id": token_ids["endoftext"],
    }  # fmt: skip
    return Qwen2VLConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=token_ids["image_pad"],
        video_token_id=token_ids["video_pad"],
        vision_start_token_id=token_ids["vision_start"],
        vision_end_token_id=token_ids["vision_end"],
        tie_word_embeddings=True,
    )


def build_model(config: Qwen2VLConfig, seed: int) -> Qwen2VLForConditionalGeneration:
    """Make the model with random weights that are a function of ``seed``."""
    torch.manual_seed(seed)
    model = Qwen2VLForConditionalGeneration(config)
    model.set_attn_implementation("eager")
    return model


def load_weights(model: Qwen2VLForConditionalGeneration, folder: Path) -> None:
    """Overwrite the weights by those of an exported checkpoint of the same shape."""
    exported = Qwen2VLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    model.load_state_dict(exported.state_dict())


class CellHeads(nn.Module):
    """Linear read-outs of every merged cell, for training only.

    On the tower's outputs they name what covers the cell (shape, colour, size, place in the
    picture), whether the centre of an item lies in it, and the background; inside the language
    model they name the cell's row and column. A dense signal: without it a model this small stays
    for long at guessing.

    Args:
        num_classes: Classes of each read-out.
        width: Length of the tower's outputs.
        sparse: Read-outs whose class 0 means "nothing here" and counts for less.
    """

    def __init__(self, num_classes: tuple[int, ...], width: int, sparse: tuple[int, ...]) -> None:
        super().__init__()
        self.num_classes = num_classes
        self._sparse = sparse
        self.linear = nn.Linear(width, sum(num_classes))

    def forward(self, cells: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Return the summed cross entropy.

        Args:
            cells: What to read of each cell. [num_cells, width], float32.
            labels: One class per read-out. [num_cells, num_readouts], int64.
        """
        outputs = self.linear(cells).split(self.num_classes, dim=-1)
        losses = []
        for index, output in enumerate(outputs):
            weight = torch.ones(output.shape[1])
            weight[0] = EMPTY_WEIGHT if index in self._sparse else 1.0
            losses.append(nn.functional.cross_entropy(output.float(), labels[:, index], weight))
        return torch.stack(losses).sum()


def export_model(
    model: Qwen2VLForConditionalGeneration, tokenizer: Tokenizer, folder: Path
) -> None:
    """Write the checkpoint in the layout of the hub, weights in bfloat16.

    Args:
        model: The trained model; it is left as it is.
        tokenizer: Its tokenizer.
        folder: Where to write; files of the same names are replaced.
    """
    folder.mkdir(parents=True, exist_ok=True)
    state = {name: tensor.bfloat16() for name, tensor in model.state_dict().items()}
    config = Qwen2VLConfig.from_dict({**model.config.to_dict(), "dtype": "bfloat16"})
    copy = Qwen2VLForConditionalGeneration(config).bfloat16()
    copy.load_state_dict(state)
    end_ids = [token_id(tokenizer, token) for token in ("<|im_end|>", "<|endoftext|>")]
    copy.generation_config = GenerationConfig.from_dict(
        {"do_sample": False, "eos_token_id": end_ids, "pad_token_id": end_ids[1]}
    )
    copy.save_pretrained(str(folder))
    (folder / "model.safetensors").chmod(0o644)
    save_tokenizer(tokenizer, folder)
    _write_preprocessor_config(folder / "preprocessor_config.json")


def _write_preprocessor_config(path: Path) -> None:
    settings = {
        "image_processor_type": "Qwen2VLImageProcessor",
        "processor_class": "Qwen2VLProcessor",
        "do_resize": True, "do_rescale": True, "do_normalize": True, "do_convert_rgb": True,
        "resample": 3, "rescale_factor": 1 / 255,
        "image_mean": list(pixels.MEAN), "image_std": list(pixels.STD),
        "min_pixels": pixels.MIN_PIXELS, "max_pixels": pixels.MAX_PIXELS,
        "size": {"shortest_edge": pixels.MIN_PIXELS, "longest_edge": pixels.MAX_PIXELS},
        "patch_size": pixels.PATCH, "merge_size": pixels.MERGE,
        "temporal_patch_size": pixels.TEMPORAL,
    }  # fmt: skip
    path.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
