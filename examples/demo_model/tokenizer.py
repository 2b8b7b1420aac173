"""Train the byte-level tokenizer of the demo model and lay out its chat template.

The pre-tokenizer is Qwen2's, so that the tokenizer class of that family rebuilds the same one from
``tokenizer.json``. Bytes are the base alphabet: any UTF-8 text can be encoded.
"""

from collections.abc import Iterable
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers
from tokenizers import pre_tokenizers as pre
from tokenizers.processors import ByteLevel
from tokenizers.trainers import BpeTrainer
from transformers import Qwen2Tokenizer

from .scenes import COLOURS, SHAPES

VOCAB_LIMIT = 1024
SPECIAL_TOKENS = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>",
    "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>",
)  # fmt: skip
MAX_LENGTH = 4096
QWEN2_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CHAT_TEMPLATE = """\
{%- for message in messages -%}
{{- '<|im_start|>' + message['role'] + '\\n' -}}
{%- if message['content'] is string -%}
{{- message['content'] -}}
{%- else -%}
{%- for part in message['content'] -%}
{%- if part['type'] == 'image' or part['type'] == 'image_url' or 'image' in part -%}
{{- '<|vision_start|><|image_pad|><|vision_end|>' -}}
{%- elif part['type'] == 'video' or 'video' in part -%}
{{- '<|vision_start|><|video_pad|><|vision_end|>' -}}
{%- elif 'text' in part -%}
{{- part['text'] -}}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
{{- '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|im_start|>assistant\\n' -}}
{%- endif -%}
"""


def train_tokenizer(texts: Iterable[str]) -> Tokenizer:
    """Learn a byte-level BPE vocabulary of at most ``VOCAB_LIMIT`` tokens from ``texts``."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    split = pre.Split(Regex(QWEN2_SPLIT), behavior="isolated", invert=False)
    byte_level = pre.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre.Sequence([split, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = ByteLevel(trim_offsets=False)
    trainer = BpeTrainer(
        vocab_size=VOCAB_LIMIT - len(SPECIAL_TOKENS),
        initial_alphabet=pre.ByteLevel.alphabet(),
        min_frequency=3,
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS]
    )
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Write ``tokenizer.json``, ``tokenizer_config.json`` and ``chat_template.jinja``."""
    wrapped = Qwen2Tokenizer(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        unk_token="<|endoftext|>",
        bos_token=None,
        model_max_length=MAX_LENGTH,
        additional_special_tokens=list(SPECIAL_TOKENS),
        clean_up_tokenization_spaces=False,
    )
    wrapped.chat_template = CHAT_TEMPLATE
    wrapped.save_pretrained(str(folder))
    tokenizer.save(str(folder / "tokenizer.json"))


def token_id(tokenizer: Tokenizer, token: str) -> int:
    """Return the id of a token that must exist."""
    found: int | None = tokenizer.token_to_id(token)
    if found is None:
        raise ValueError(f"the tokenizer lacks {token}")
    return found


def name_ids(tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """Return the tokens of the shapes' and of the colours' names, as they stand in a sentence.

    A name of several tokens is represented by its last.
    """
    shapes, colours = (
        [tokenizer.encode(f" {name}", add_special_tokens=False).ids[-1] for name in names]
        for names in (SHAPES, COLOURS)
    )
    return shapes, colours


def load_tokenizer(folder: Path) -> Tokenizer:
    """Read ``tokenizer.json`` of a checkpoint folder."""
    return Tokenizer.from_file(str(folder / "tokenizer.json"))
