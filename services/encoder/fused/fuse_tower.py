"""Choose who computes a vision tower: our fused one, or transformers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import structlog

from chiasm.common.graph_recorder import GraphRecorder
from chiasm.encoder.fused.axial_tower import AxialTower
from chiasm.encoder.fused.description import AXIAL_TOWER, PICTURE_TOWERS, UnsupportedTowerError
from chiasm.encoder.fused.grid_tower import GridTower
from chiasm.encoder.fused.picture_tower import PictureTower
from chiasm.encoder.fused.projector import (
    FusedProjector,
    MergingProjector,
    check_merging_projector,
    check_projector,
)
from chiasm.kernels.cpu.native import DTYPES, find_kernels
from chiasm.kernels.find_triton_kernels import find_triton_kernels

if TYPE_CHECKING:
    import transformers

    from chiasm.kernels.cpu.native import CpuKernels, KernelChoice
    from chiasm.kernels.triton_kernels import TritonKernels

FUSED_TOWERS = (GridTower, PictureTower, AxialTower)
TowerChoice = Literal["auto", "fused", "transformers"]
# Ours with compiled kernels or with torch alone.
TowerKind = Literal["fused_kernels", "fused_torch", "transformers"]

# Model types of checkpoints whose parity with transformers is tested.
_GRID_MODELS = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
_PICTURE_MODELS = ("llava", "llava_onevision")
_MERGING_MODEL = "mistral3"

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
    fused = (*FUSED_TOWERS, FusedProjector, MergingProjector)
    return sum(module.num_packed_bytes for module in model.modules() if isinstance(module, fused))


def _install(
    model: transformers.PreTrainedModel, choice: KernelChoice
) -> CpuKernels | TritonKernels | None:
    model_type = model.config.model_type
    known = (*_GRID_MODELS, *_PICTURE_MODELS, _MERGING_MODEL)
    if model_type not in known:
        raise UnsupportedTowerError(
            f"models of type {model_type!r} are not among those whose parity is tested:"
            f" {', '.join(known)}"
        )
    if model_type in _GRID_MODELS:
        return _install_grid_tower(model, choice)
    kernels = _find_cpu_kernels(model, choice)
    if model_type == _MERGING_MODEL:
        _install_merging_tower(model, kernels)
    else:
        _install_picture_tower(model, kernels)
    return kernels


def _find_cpu_kernels(
    model: transformers.PreTrainedModel, choice: KernelChoice
) -> CpuKernels | None:
    is_known = model.device.type == "cpu" and model.dtype in DTYPES
    return find_kernels(choice) if is_known else None


def _install_grid_tower(
    model: transformers.PreTrainedModel, choice: KernelChoice
) -> CpuKernels | TritonKernels | None:
    """Put in the only tower that is replayed: Python takes longer to launch Triton than torch."""
    kernels: CpuKernels | TritonKernels | None
    if model.device.type == "cuda":
        kernels = find_triton_kernels(model.device, "chiasm.encoder")
        record = GraphRecorder(model.device)
        model.model.visual = GridTower(model.model.visual, kernels, record)
    else:
        kernels = _find_cpu_kernels(model, choice)
        model.model.visual = GridTower(model.model.visual, kernels)
    return kernels


def _install_picture_tower(model: transformers.PreTrainedModel, kernels: CpuKernels | None) -> None:
    config, inner = model.config, model.model
    has_bias = getattr(config, "multimodal_projector_bias", True)
    check_projector(inner.multi_modal_projector, has_bias=has_bias)
    inner.vision_tower = _fuse_picture_tower(model, kernels)
    inner.multi_modal_projector = FusedProjector(
        inner.multi_modal_projector, config.projector_hidden_act
    )


def _install_merging_tower(model: transformers.PreTrainedModel, kernels: CpuKernels | None) -> None:
    config, inner = model.config, model.model
    check_merging_projector(inner.multi_modal_projector, has_bias=config.multimodal_projector_bias)
    inner.vision_tower = _fuse_picture_tower(model, kernels)
    inner.multi_modal_projector = MergingProjector(inner.multi_modal_projector, config)


def _fuse_picture_tower(
    model: transformers.PreTrainedModel, kernels: CpuKernels | None
) -> AxialTower | PictureTower:
    """Return our tower in the place of that of ``model``, which has a layer or a list of them."""
    tower, layers = model.model.vision_tower, model.config.vision_feature_layer
    layers = [layers] if isinstance(layers, int) else layers
    tower_type = tower.config.model_type
    if tower_type == AXIAL_TOWER:
        return AxialTower(tower, layers, kernels)
    if tower_type in PICTURE_TOWERS:
        return PictureTower(tower, layers, kernels)
    raise UnsupportedTowerError(f"towers of type {tower_type!r} are not fused")
