"""Name everything that decides what an embedding is, except the source and the client's wishes."""

from __future__ import annotations

import importlib.metadata
import json
from typing import TYPE_CHECKING

from blake3 import blake3

if TYPE_CHECKING:
    from collections.abc import Mapping

    from chiasm.common.media import Modality
    from chiasm.encoder.preprocess import Preprocessor
    from chiasm.encoder.tower import Tower

_PROTOCOL_VERSION = 3
_LIBRARIES = ("torch", "torchvision", "pillow", "av", "soundfile", "soxr", "transformers")
_NOT_OF_THE_TOWER = frozenset(
    {"text_config", "_name_or_path", "transformers_version", "architectures", "dtype"}
)


def compute_fingerprint(
    tower: Tower,
    preprocessors: Mapping[Modality, Preprocessor],
    token_ids: Mapping[str, int],
) -> bytes:
    """Return 32 bytes that differ whenever the same source could give another embedding.

    Covers the weights of towers and projectors, their dtype and configuration, who computes them
    (implementations round differently), the preprocessors' settings, the versions of the libraries
    that change decoded media, the tokens that stand between rows (``token_ids``, which the
    tower's configuration does not have), and the version of this format. The language model's
    weights are no part of it, nor is where the checkpoint lies, nor the processor's instruction
    set: hosts of one stack may differ in it.
    """
    hasher = blake3(derive_key_context="chiasm encoder fingerprint")
    config = {key: value for key, value in tower.config.items() if key not in _NOT_OF_THE_TOWER}
    description = {
        "protocol_version": _PROTOCOL_VERSION,
        "dtype": tower.data_type.value,
        "tower": tower.kind,
        "device": tower.device.type,
        "config": {**config, **token_ids},
        "preprocessors": {
            modality.value: dict(preprocessor.settings)
            for modality, preprocessor in preprocessors.items()
        },
        "libraries": {name: _version(name) for name in _LIBRARIES},
    }
    hasher.update(json.dumps(description, sort_keys=True, default=str).encode())
    hasher.update(tower.weights_digest)
    return hasher.digest()


def _version(library: str) -> str:
    try:
        return importlib.metadata.version(library)
    except importlib.metadata.PackageNotFoundError:
        return ""
