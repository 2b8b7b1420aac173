"""Choose who computes a vision tower: our fused one, or transformers."""

from __future__ import annotations

from dataclasses import dataclass
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
from chiasm.kernels.cpu.quantized_layer import can_quantize
from chiasm.kernels.find_triton_kernels import find_triton_kernels

if TYPE_CHECKING:
    import transformers

    from chiasm.kernels.cpu.native import CpuKernels, KernelChoice
    from chiasm.kernels.cpu.quantized_layer import Quantization
    from chiasm.kernels.triton_kernels import TritonKernels

FUSED_TOWERS = (GridTower, PictureTower, AxialTower)
TowerChoice = Literal["auto", "fused", "transformers"]
# Ours, with weights as they are or of 8-bit integers, with compiled kernels or with torch alone.
TowerKind = Literal[
    "fused_kernels", "fused_torch", "quantized_kernels", "quantized_torch", "transformers"
]

# Model types of checkpoints whose parity with transformers is tested.
_GRID_MODELS = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
_PICTURE_MODELS = ("llava", "llava_onevision")
_MERGING_MODEL = "mistral3"

log = structlog.get_logger("chiasm.encoder")


@dataclass(frozen=True, slots=True)
class TowerRequest:
    """Who shall compute a tower.

    Attributes:
        choice: ``auto`` takes the fused tower for models of a kind whose parity with transformers
            is tested, and transformers for all others.
        kernels: Which compiled kernels a fused tower takes on a CPU; see ``find_kernels``.
        quantization: How the weights of blocks are held; all but ``none`` needs the fused tower.
    """

    choice: TowerChoice = "auto"
    kernels: KernelChoice = "auto"
    quantization: Quantization = "none"

    @property
    def is_quantized(self) -> bool:
        """Whether products are of 8-bit integers."""
        return self.quantization != "none"


DEFAULT_REQUEST = TowerRequest()


def fuse_tower(request: TowerRequest, model: transformers.PreTrainedModel) -> TowerKind:
    """Put a fused tower into ``model`` where one can be, log which tower computes it, and why.

    Args:
        request: Who shall compute it.
        model: Encoder half of a checkpoint, on its device; its features calls stay usable.

    Returns:
        Which one computes it.

    Raises:
        UnsupportedTowerError: The request needs the fused tower, but the model is of another kind,
            or its device has no products of 8-bit integers.
        KernelsUnavailableError: The kernels that the request names cannot be had.
    """
    model_type = model.config.model_type
    kind: TowerKind = "transformers"
    reason = "asked for"
    if request.choice == "transformers" and request.is_quantized:
        raise UnsupportedTowerError(
            f"--tower-quantization {request.quantization} needs the fused tower: leave out --tower"
        )
    if request.choice != "transformers":
        try:
            kind = _kind_of(_install(model, request), request)
        except UnsupportedTowerError as error:
            if request.choice == "fused" or request.is_quantized:
                raise
            reason = str(error)
        else:
            is_choice = request.choice == "fused"
            reason = "asked for" if is_choice else "parity is tested for this model type"
    log.info(
        "tower_chosen",
        tower="transformers" if kind == "transformers" else "fused",
        model_type=model_type,
        reason=reason,
        quantization=request.quantization,
    )
    return kind


def count_packed_bytes(model: transformers.PreTrainedModel) -> int:
    """Return the bytes of fused weights in ``model``, which are no parameters of it."""
    fused = (*FUSED_TOWERS, FusedProjector, MergingProjector)
    return sum(module.num_packed_bytes for module in model.modules() if isinstance(module, fused))


def _kind_of(kernels: CpuKernels | TritonKernels | None, request: TowerRequest) -> TowerKind:
    if request.is_quantized:
        return "quantized_torch" if kernels is None else "quantized_kernels"
    return "fused_torch" if kernels is None else "fused_kernels"


def _install(
    model: transformers.PreTrainedModel, request: TowerRequest
) -> CpuKernels | TritonKernels | None:
    model_type = model.config.model_type
    known = (*_GRID_MODELS, *_PICTURE_MODELS, _MERGING_MODEL)
    if model_type not in known:
        raise UnsupportedTowerError(
            f"models of type {model_type!r} are not among those whose parity is tested:"
            f" {', '.join(known)}"
        )
    kernels = _find_cpu_kernels(model, request.kernels)
    if request.is_quantized and not can_quantize(model.device, kernels):
        raise UnsupportedTowerError(
            f"--tower-quantization {request.quantization} needs a CPU, and our kernels or oneDNN"
        )
    if model_type in _GRID_MODELS:
        return _install_grid_tower(model, kernels, request.quantization)
    if model_type == _MERGING_MODEL:
        _install_merging_tower(model, kernels, request.quantization)
    else:
        _install_picture_tower(model, kernels, request.quantization)
    return kernels


def _find_cpu_kernels(
    model: transformers.PreTrainedModel, choice: KernelChoice
) -> CpuKernels | None:
    is_known = model.device.type == "cpu" and model.dtype in DTYPES
    return find_kernels(choice) if is_known else None


def _install_grid_tower(
    model: transformers.PreTrainedModel, kernels: CpuKernels | None, quantization: Quantization
) -> CpuKernels | TritonKernels | None:
    """Put in the only tower that is replayed: Python takes longer to launch Triton than torch."""
    tower = model.model.visual
    if model.device.type != "cuda":
        model.model.visual = GridTower(tower, kernels, quantization=quantization)
        return kernels
    triton_kernels = find_triton_kernels(model.device, "chiasm.encoder")
    model.model.visual = GridTower(tower, triton_kernels, GraphRecorder(model.device))
    return triton_kernels


def _install_picture_tower(
    model: transformers.PreTrainedModel, kernels: CpuKernels | None, quantization: Quantization
) -> None:
    config, inner = model.config, model.model
    has_bias = getattr(config, "multimodal_projector_bias", True)
    check_projector(inner.multi_modal_projector, has_bias=has_bias)
    inner.vision_tower = _fuse_picture_tower(model, kernels, quantization)
    inner.multi_modal_projector = FusedProjector(
        inner.multi_modal_projector, config.projector_hidden_act
    )


def _install_merging_tower(
    model: transformers.PreTrainedModel, kernels: CpuKernels | None, quantization: Quantization
) -> None:
    config, inner = model.config, model.model
    check_merging_projector(inner.multi_modal_projector, has_bias=config.multimodal_projector_bias)
    inner.vision_tower = _fuse_picture_tower(model, kernels, quantization)
    inner.multi_modal_projector = MergingProjector(inner.multi_modal_projector, config)


def _fuse_picture_tower(
    model: transformers.PreTrainedModel, kernels: CpuKernels | None, quantization: Quantization
) -> AxialTower | PictureTower:
    """Return our tower in the place of that of ``model``, which has a layer or a list of them."""
    tower, layers = model.model.vision_tower, model.config.vision_feature_layer
    layers = [layers] if isinstance(layers, int) else layers
    tower_type = tower.config.model_type
    if tower_type == AXIAL_TOWER:
        return AxialTower(tower, layers, kernels, quantization)
    if tower_type in PICTURE_TOWERS:
        return PictureTower(tower, layers, kernels, quantization)
    raise UnsupportedTowerError(f"towers of type {tower_type!r} are not fused")
