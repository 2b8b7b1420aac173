"""Read the header and the elements of a ready-made tensor; runs in a decode worker."""

from __future__ import annotations

from typing import TYPE_CHECKING

from chiasm.encoder.decode_errors import MediaTooLargeError
from chiasm.encoder.tensor_file import read_tensor_file
from chiasm.encoder.torch_objects import TensorFileError
from chiasm.encoder.wire_tensor import TensorHeader, TensorTask

if TYPE_CHECKING:
    import mmap
    from collections.abc import Mapping

    from chiasm.encoder.media_writer import MediaWriter
    from chiasm.encoder.tensor_file import StoredTensor

_MAX_GRID_SIDE = (1 << 32) - 1


def probe(body: bytes, source: mmap.mmap) -> bytes:
    """Return the packed ``TensorHeader`` of the files in ``source``."""
    task = TensorTask.unpack(body)
    tensors = read_tensor_file(source[: task.num_file_bytes])
    embedding = _embedding(tensors, task)
    grid = _grid(tensors, source, task)
    header = TensorHeader(embedding.element_type, embedding.shape, grid)
    if header.num_bytes > task.max_bytes:
        raise MediaTooLargeError(
            f"{header.num_bytes} bytes of a tensor is over the limit of {task.max_bytes}."
        )
    return header.pack()


def decode(body: bytes, source: mmap.mmap, media: MediaWriter) -> None:
    """Write the elements of the tensor in ``source`` to ``media``, densely."""
    task = TensorTask.unpack(body)
    embedding = _embedding(read_tensor_file(source[: task.num_file_bytes]), task)
    for row in embedding.rows():
        media.write(row)
    if media.num_left:
        raise TensorFileError("the tensor does not have the size of its header")


def _embedding(tensors: Mapping[str, StoredTensor], task: TensorTask) -> StoredTensor:
    name = f"{task.modality}_embeds"
    tensor = tensors.get(name)
    if tensor is None and len(tensors) == 1:
        tensor = next(iter(tensors.values()))
    if tensor is None:
        raise TensorFileError(f"none of its tensors is named {name}")
    if not tensor.element_type.is_float:
        raise TensorFileError("the embedding must be float32, float16 or bfloat16")
    return tensor


def _grid(
    tensors: Mapping[str, StoredTensor], source: mmap.mmap, task: TensorTask
) -> tuple[int, int, int] | None:
    name = f"{task.modality}_grid_thw"
    if task.num_grid_bytes:
        start = task.num_file_bytes
        tensors = read_tensor_file(source[start : start + task.num_grid_bytes])
        tensor = tensors.get(name)
        if tensor is None and len(tensors) == 1:
            tensor = next(iter(tensors.values()))
    else:
        tensor = tensors.get(name)
    if tensor is None and not task.num_grid_bytes:
        return None
    if tensor is None or tensor.element_type.is_float or tensor.shape not in ((3,), (1, 3)):
        raise TensorFileError("the grid must be one row of 3 integers: t, h and w")
    size = tensor.element_type.num_bytes
    content = b"".join(tensor.rows())
    t, h, w = (
        int.from_bytes(content[start : start + size], "little", signed=True)
        for start in range(0, 3 * size, size)
    )
    if not all(1 <= side <= _MAX_GRID_SIDE for side in (t, h, w)):
        raise TensorFileError("the sides of the grid must be at least 1")
    return t, h, w
