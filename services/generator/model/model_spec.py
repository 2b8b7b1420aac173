"""Read from a checkpoint's configuration what the engine must know about its language model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from chiasm.common.families import UnsupportedModelError, family_of

if TYPE_CHECKING:
    import transformers

    from chiasm.common.families import PositionScheme

_SLIDING = "sliding_attention"
_SERVED_KINDS = ("full_attention", _SLIDING)


@dataclass(frozen=True, slots=True)
class LogitsRule:
    """What is done to the output of the head: ``cap * tanh(logits * scale / cap)``.

    Attributes:
        scale: Factor of the logits.
        softcap: Bound of the logits; 0 is none.
    """

    scale: float = 1.0
    softcap: float = 0.0


@dataclass(frozen=True, slots=True)
class CacheGroup:
    """Layers whose keys and values are kept for the same positions.

    Attributes:
        layers: Indices of the layers.
        window: Positions that a token sees; 0 is all before it.
    """

    layers: tuple[int, ...]
    window: int = 0


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """Facts about a language model.

    Attributes:
        num_layers: Decoder layers.
        num_kv_heads: Key heads of every layer.
        head_dim: Width of a head.
        hidden_size: Width of a hidden state and of an embedding row.
        vocab_size: Rows of the token embedding; token ids are below it.
        max_positions: Longest context in which the angles of a position are the same whatever is
            computed beside it; at most what it was trained for.
        eos_token_ids: Tokens that end a sequence.
        positions: How positions are numbered.
        positions_per_s: Time positions that a second of video takes; ``None`` if every temporal
            patch takes one.
        num_deepstack_levels: Tensors of an embedding that are added to the hidden states behind
            the first layers, one each.
        logits: What is done to the logits.
        group_tokens: Rows of every image, if they attend to one another both ways; 0 if every
            token sees only those before it.
        layer_windows: Positions that a token sees in each layer, itself included; 0 is all before
            it. Empty: all layers see everything.
        positions_bound: Why ``max_positions`` is less than what it was trained for; empty if it is
            not.
    """

    num_layers: int
    num_kv_heads: int
    head_dim: int
    hidden_size: int
    vocab_size: int
    max_positions: int
    eos_token_ids: frozenset[int]
    positions: PositionScheme
    positions_per_s: float | None = None
    num_deepstack_levels: int = 0
    logits: LogitsRule = LogitsRule()
    group_tokens: int = 0
    layer_windows: tuple[int, ...] = ()
    positions_bound: str = ""

    @property
    def cache_groups(self) -> tuple[CacheGroup, ...]:
        """Layers that keep the same positions, those that keep everything first."""
        windows = self.layer_windows or (0,) * self.num_layers
        return tuple(
            CacheGroup(tuple(i for i, other in enumerate(windows) if other == window), window)
            for window in sorted(set(windows))
        )


def read_model_spec(model: transformers.PreTrainedModel) -> ModelSpec:
    """Return the facts about the language model of a loaded checkpoint.

    Raises:
        UnsupportedModelError: No family of ours has this model type, or its layers look back
            otherwise than by attention to all or to the last positions.
    """
    text_config = model.config.get_text_config()
    _check_layer_kinds(model, text_config)
    config = model.config.to_dict()
    family = family_of(config)
    num_q_heads: int = text_config.num_attention_heads
    max_positions, positions_bound = _read_max_positions(text_config)
    return ModelSpec(
        num_layers=text_config.num_hidden_layers,
        num_kv_heads=getattr(text_config, "num_key_value_heads", None) or num_q_heads,
        head_dim=getattr(text_config, "head_dim", None) or text_config.hidden_size // num_q_heads,
        hidden_size=text_config.hidden_size,
        vocab_size=text_config.vocab_size,
        max_positions=max_positions,
        eos_token_ids=_read_eos_token_ids(model),
        positions=family.positions,
        positions_per_s=family.read_positions_per_s(config),
        num_deepstack_levels=family.count_deepstack_levels(config),
        group_tokens=family.count_group_tokens(config),
        logits=_read_logits_rule(text_config),
        layer_windows=_read_layer_windows(text_config),
        positions_bound=positions_bound,
    )


def _check_layer_kinds(
    model: transformers.PreTrainedModel, text_config: transformers.PreTrainedConfig
) -> None:
    kinds = set(getattr(text_config, "layer_types", None) or ()).difference(_SERVED_KINDS)
    if kinds:
        raise UnsupportedModelError(
            f"The text model {text_config.model_type!r} has layers of the kind"
            f" {' and '.join(sorted(kinds))}; only {' and '.join(_SERVED_KINDS)} are served."
        )
    # Recurrent models do not all list the kinds of their layers, or call them attention.
    if model.get_decoder()._is_stateful:  # type: ignore[no-untyped-call]  # transformers' own
        raise UnsupportedModelError(
            f"The text model {text_config.model_type!r} carries a state from token to token; only"
            " models that look back by attention alone are served."
        )


def _read_max_positions(text_config: transformers.PreTrainedConfig) -> tuple[int, str]:
    """Return the longest context with angles of its own, and why it is not the trained one.

    A forward holds many sequences, and parts of them. Angles of the type longrope are others for
    all of it once one position is behind the original context; dynamic ones are the same up to
    ``max_position_embeddings``.
    """
    trained: int = text_config.max_position_embeddings
    parameters = getattr(text_config, "rope_parameters", None) or {}
    by_layer = [value for value in parameters.values() if isinstance(value, dict)]
    originals = (
        rope.get("original_max_position_embeddings", trained)
        for rope in by_layer or [parameters]
        if rope.get("rope_type") == "longrope"
    )
    most = min(originals, default=trained)
    if most >= trained:
        return trained, ""
    return most, (
        f"it was trained for {trained}, but with its longrope factors one sequence of more than"
        f" {most} would change the positions of all that are computed with it"
    )


def _read_layer_windows(text_config: transformers.PreTrainedConfig) -> tuple[int, ...]:
    window = getattr(text_config, "sliding_window", None) or 0
    if window >= text_config.max_position_embeddings:
        window = 0
    # Without a list every layer has the window, as in Mistral and Phi-3.
    kinds = getattr(text_config, "layer_types", None)
    kinds = kinds or [_SLIDING] * text_config.num_hidden_layers
    return tuple(window if kind == _SLIDING else 0 for kind in kinds)


def _read_eos_token_ids(model: transformers.PreTrainedModel) -> frozenset[int]:
    """Return the end tokens; ``generation_config.json`` outranks ``config.json``."""
    generation_config = getattr(model, "generation_config", None)
    for config in (generation_config, model.config.get_text_config()):
        token_ids = getattr(config, "eos_token_id", None)
        if token_ids is not None:
            return frozenset([token_ids] if isinstance(token_ids, int) else token_ids)
    return frozenset()


def _read_logits_rule(text_config: transformers.PreTrainedConfig) -> LogitsRule:
    divisor = getattr(text_config, "logits_scaling", None) or 1.0
    factor = getattr(text_config, "logit_scale", None) or 1.0
    softcap = getattr(text_config, "final_logit_softcapping", None) or 0.0
    return LogitsRule(scale=factor / divisor, softcap=softcap)
