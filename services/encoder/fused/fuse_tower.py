"""Choose who computes a vision tower: our fused one, or transformers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import structlog

from chiasm.encoder.fused.description import PICTURE_TOWERS, UnsupportedTowerError
from chiasm.encoder.fused.grid_tower import GridTower
from chiasm.encoder.fused.picture_tower import FusedProjector, PictureTower, check_projector
from chiasm.kernels.cpu.native import DTYPES, find_kernels

if TYPE_CHECKING:
    import transformers

    from chiasm.kernels.cpu.native import CpuKernels, KernelChoice

FUSED_TOWERS = (GridTower, PictureTower)
TowerChoice = Literal["auto", "fused", "transformers"]
# Ours with compiled kernels or with torch alone.
TowerKind = Literal["fused_kernels", "fused_torch", "transformers"]

# Model types of checkpoints whose parity with transformers is tested.
_GRID_MODELS = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
_PICTURE_MODELS = ("llava", "llava_onevision")

log = structlog.get_logger("chiasm.encoder")


def fuse_tower(
    choice: TowerChoice, model: transformers.PreTrainedModel, kernels: KernelChoice = "auto"
) -> TowerKind:
    """Put a fused tower into ``model`` where one can be, log which tower computes it, and why.

    Args:
        choice: ``auto`` takes the fused tower for models of a kind whose parity with transformers
            is tested, and transformers for all others.
        model: Encoder half of a checkpoint, on its device; its features calls stay usable.
        kernels: Which compiled kernels a fused tower takes on a CPU; see ``find_kernels``.

    Returns:
        Which one computes it.

    Raises:
        UnsupportedTowerError: ``choice`` is ``fused``, but the model is of another kind.
        KernelsUnavailableError: The kernels that ``kernels`` names cannot be had.
    """
    model_type = model.config.model_type
    kind: TowerKind = "transformers"
    reason = "asked for"
    if choice != "transformers":
        try:
            kind = "fused_torch" if _install(model, kernels) is None else "fused_kernels"
        except UnsupportedTowerError as error:
            if choice == "fused":
                raise
            reason = str(error)
        else:
            reason = "asked for" if choice == "fused" else "parity is tested for this model type"
    tower = "transformers" if kind == "transformers" else "fused"
    log.info("tower_chosen", tower=tower, model_type=model_type, reason=reason)
    return kind


def count_packed_bytes(model: transformers.PreTrainedModel) -> int:
    """Return the bytes of fused weights in ``model``, which are no parameters of it."""
    fused = (GridTower, PictureTower, FusedProjector)
    return sum(module.num_packed_bytes for module in model.modules() if isinstance(module, fused))


def _install(model: transformers.PreTrainedModel, choice: KernelChoice) -> CpuKernels | None:
    model_type = model.config.model_type
    if model_type not in (*_GRID_MODELS, *_PICTURE_MODELS):
        raise UnsupportedTowerError(
            f"models of type {model_type!r} are not among those whose parity is tested:"
            f" {', '.join((*_GRID_MODELS, *_PICTURE_MODELS))}"
        )
    kernels = None
    if model.device.type == "cpu" and model.dtype in DTYPES:
        kernels = find_kernels(choice)
    if model_type in _GRID_MODELS:
        model.model.visual = GridTower(model.model.visual, kernels)
    else:
        _install_picture_tower(model, kernels)
    return kernels


def _install_picture_tower(model: transformers.PreTrainedModel, kernels: CpuKernels | None) -> None:
    config, inner = model.config, model.model
    tower_type = inner.vision_tower.config.model_type
    if tower_type not in PICTURE_TOWERS:
        raise UnsupportedTowerError(f"towers of type {tower_type!r} are not fused")
    check_projector(inner.multi_modal_projector)
    layers = config.vision_feature_layer
    inner.vision_tower = PictureTower(
        inner.vision_tower, [layers] if isinstance(layers, int) else layers, kernels
    )
    inner.multi_modal_projector = FusedProjector(
        inner.multi_modal_projector, config.projector_hidden_act
    )
