"""Load one half of a multimodal checkpoint: tower and projector, or the language model.

The whole module tree is described on the meta device, the children of the other half become empty
stubs, and ``from_pretrained`` does the rest: its conversion mapping renames legacy keys, and a key
without a home is never read from the files. One code path serves every family whose base model has
its decoder as one child.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, NoReturn, cast

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError

from chiasm.common import torchvision_shim

torchvision_shim.install()

import transformers  # noqa: E402 - the shim must run before anything imports torchvision

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

Side = Literal["encoder", "generator"]

# Checkpoints of several models: the section of the one that is served, and its class.
_SERVED_PARTS = {
    "qwen2_5_omni": ("thinker_config", "Qwen2_5OmniThinkerForConditionalGeneration"),
}


class CheckpointError(Exception):
    """A checkpoint cannot be loaded: no such architecture, or weights that are missing."""


class Stub(torch.nn.Module):
    """Stand in for a child of the half that this process does not hold."""

    def __init__(self, path: str) -> None:
        super().__init__()
        self._path = path

    def forward(self, *_args: object, **_kwargs: object) -> NoReturn:
        """Refuse the call; reaching a stub is a bug."""
        raise RuntimeError(f"{self._path} is not loaded in this process.")


def load_half(
    model_path: Path, side: Side, dtype: torch.dtype | None = None
) -> transformers.PreTrainedModel:
    """Load the ``side`` of the checkpoint at ``model_path``, in evaluation mode, on the CPU.

    The result has the class name and the module tree of the whole model; children of the other
    side are stubs without parameters. Weights are mapped from the safetensors files and never
    unpickled.

    Args:
        model_path: Directory of a checkpoint in the hub layout.
        side: ``"encoder"`` keeps towers and projectors, ``"generator"`` the language model with
            its head. Bare parameters of the base model stay in both.
        dtype: Element type of the parameters; ``None`` takes the checkpoint's own.

    Returns:
        The model; all its parameters hold the checkpoint's values.

    Raises:
        CheckpointError: The configuration cannot be read, the architecture is unknown or has no
            separate decoder, or a weight of this side is missing or has another shape.
    """
    model_class, config = _read_architecture(model_path)
    with torch.device("meta"):
        whole = model_class(config)
    half_class = _make_half_class(model_class, _list_dropped_paths(whole, side))
    half, report = _load_weights(half_class, model_path, dtype)
    _check_complete(half, report, model_path)
    half.eval()  # type: ignore[no-untyped-call]  # transformers' own
    half.requires_grad_(False)
    return half


def _read_architecture(
    model_path: Path,
) -> tuple[type[transformers.PreTrainedModel], transformers.PreTrainedConfig]:
    # transformers would take a missing directory for the name of a repository on the hub.
    if not (model_path / "config.json").is_file():
        raise CheckpointError(f"Cannot read the configuration: {model_path} has no config.json.")
    try:
        config = transformers.AutoConfig.from_pretrained(model_path)
    except (OSError, ValueError, StrictDataclassError) as error:
        raise CheckpointError(
            f"Cannot read the configuration of {model_path}: {_one_line(error)}"
        ) from error
    name = (config.architectures or ["none"])[0]
    if config.model_type in _SERVED_PARTS:
        section, name = _SERVED_PARTS[config.model_type]
        config = getattr(config, section)
    model_class = getattr(transformers, name, None)
    if not isinstance(model_class, type) or not issubclass(
        model_class, transformers.PreTrainedModel
    ):
        raise CheckpointError(f"{model_path} has an unknown architecture: {name}.")
    return model_class, config


def _list_dropped_paths(whole: transformers.PreTrainedModel, side: Side) -> list[str]:
    """Return the paths of the children that ``side`` does without.

    The base model holds the decoder as one child; everything else in it belongs to the encoder.
    Heads stand beside the base model and belong to the decoder.
    """
    base = whole.base_model
    prefix = f"{whole.base_model_prefix}." if base is not whole else ""
    decoder = whole.get_decoder()  # type: ignore[no-untyped-call]  # transformers' own
    decoder_paths = {f"{prefix}{name}" for name, child in base.named_children() if child is decoder}
    if not decoder_paths:
        raise CheckpointError(f"{type(whole).__name__} has no decoder apart from its towers.")
    inner = {f"{prefix}{name}" for name, _ in base.named_children()}
    outer = {name for name, child in whole.named_children() if child is not base}
    generator = decoder_paths | {name for name in outer - inner if "head" in name}
    everything = inner | outer
    return sorted(generator if side == "encoder" else everything - generator)


def _make_half_class(
    model_class: type[transformers.PreTrainedModel], dropped: list[str]
) -> type[transformers.PreTrainedModel]:
    """Return a subclass of ``model_class`` that builds stubs at the ``dropped`` paths.

    NOTE: it must keep ``__name__`` and ``__module__``: transformers looks its conversion rules up
    by class name and tells custom code by the module.
    """

    def build(self: transformers.PreTrainedModel, config: transformers.PreTrainedConfig) -> None:
        model_class.__init__(self, config)
        for path in dropped:
            self.set_submodule(path, Stub(path))
        kept = {name for name, _ in self.named_parameters(remove_duplicate=False)}
        self.all_tied_weights_keys = {
            target: source
            for target, source in (self.all_tied_weights_keys or {}).items()
            if target in kept and source in kept
        }

    members = {
        "__init__": build,
        "__module__": model_class.__module__,
        "_keys_to_ignore_on_load_unexpected": [".*"],
    }
    return type(model_class.__name__, (model_class,), members)


def _load_weights(
    half_class: type[transformers.PreTrainedModel], model_path: Path, dtype: torch.dtype | None
) -> tuple[transformers.PreTrainedModel, Mapping[str, object]]:
    try:
        loaded = half_class.from_pretrained(
            model_path, dtype=dtype or "auto", use_safetensors=True, output_loading_info=True
        )
    except (OSError, RuntimeError, ValueError, SafetensorError, StrictDataclassError) as error:
        raise CheckpointError(
            f"Cannot load the weights of {model_path}: {_one_line(error)}"
        ) from error
    # transformers does not say in its types that `output_loading_info` makes this a pair.
    return cast("tuple[transformers.PreTrainedModel, Mapping[str, object]]", loaded)


def _check_complete(
    half: transformers.PreTrainedModel, report: Mapping[str, object], model_path: Path
) -> None:
    for problem in ("missing_keys", "mismatched_keys", "error_msgs"):
        if found := report.get(problem):
            raise CheckpointError(f"{model_path} is not complete; {problem}: {found}.")
    on_meta = [name for name, tensor in half.named_parameters() if tensor.is_meta]
    on_meta += [name for name, tensor in half.named_buffers() if tensor.is_meta]
    if on_meta:
        raise CheckpointError(f"{model_path} left tensors without values: {on_meta}.")


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
