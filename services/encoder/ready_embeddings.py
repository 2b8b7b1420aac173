"""Take embeddings that clients made themselves: check them, lay them out, make them the tower's."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from chiasm.common.errors import InvalidRequestError
from chiasm.common.identity import tensor_digest
from chiasm.common.limits import check_size
from chiasm.common.media import DataType, PatchGrid
from chiasm.encoder.commands import BytesSource, TensorSource
from chiasm.encoder.memory_file import MemoryFile
from chiasm.encoder.wire_tensor import TensorHeader, TensorTask

if TYPE_CHECKING:
    from chiasm.common.families.rows import RowPlanner
    from chiasm.common.limits import Limits
    from chiasm.common.media import MediaLayout, Modality
    from chiasm.encoder.admission import AdmissionTicket
    from chiasm.encoder.commands import EncodeCommand, EncoderDescription, TensorFileSource
    from chiasm.encoder.decode_pool import DecodePool
    from chiasm.encoder.source_reader import SourceReader

INVALID_EMBEDDING = "INVALID_EMBEDDING"
_TORCH_DTYPES = {
    DataType.FLOAT32: torch.float32,
    DataType.FLOAT16: torch.float16,
    DataType.BFLOAT16: torch.bfloat16,
}


@dataclass(frozen=True, slots=True)
class ReadyTensor:
    """A dense tensor as it came.

    Attributes:
        dtype: Type of the elements.
        shape: Dimensions; each at least 1.
        grid: Patches that the rows were made from; ``None``: the client does not say.
        data: The elements, little-endian, in row-major order.
        digest: What the tensor is called, by all of the above.
    """

    dtype: DataType
    shape: tuple[int, ...]
    grid: PatchGrid | None
    data: bytearray | memoryview
    digest: bytes

    @property
    def num_bytes(self) -> int:
        """Bytes of the elements."""
        return len(self.data)


@dataclass(frozen=True, slots=True)
class ReadyItem:
    """A ready-made embedding that fits the model.

    Attributes:
        layout: How it stands in the prompt.
        rows: The rows. [num_rows, hidden_size], the tower's dtype, contiguous, finite, on the CPU.
    """

    layout: MediaLayout
    rows: torch.Tensor

    @property
    def num_pixels(self) -> int:
        """Pixels that have to be decoded: none."""
        return 0

    @property
    def num_tower_pixels(self) -> int:
        """Pixels that the tower sees: none."""
        return 0


class ReadyEmbeddings:
    """Reads ready-made embeddings; files are taken apart in decode workers."""

    def __init__(
        self,
        reader: SourceReader,
        decoder: DecodePool,
        planner: RowPlanner,
        description: EncoderDescription,
        limits: Limits,
    ) -> None:
        self._reader = reader
        self._decoder = decoder
        self._planner = planner
        self._description = description
        self._limits = limits

    async def read(
        self, source: TensorSource | TensorFileSource, modality: Modality, ticket: AdmissionTicket
    ) -> ReadyTensor:
        """Return the tensor of ``source``, charged to ``ticket``; its values are not looked at.

        Raises:
            InvalidRequestError: It has not the shape of an embedding of this model, the stream has
                another length than announced, or a file holds something else than dense tensors.
            TooLargeError: It has too many bytes.
            OverloadedError: The sources in work take too many bytes together, or no decoder was
                free in time.
        """
        if isinstance(source, TensorSource):
            return await self._read_tensor(source, modality, ticket)
        return await self._read_file(source, modality, ticket)

    async def plan(
        self, tensor: ReadyTensor, command: EncodeCommand, ticket: AdmissionTicket
    ) -> ReadyItem:
        """Return the rows of ``tensor`` in the tower's dtype and their layout.

        Args:
            tensor: What ``read`` returned.
            command: What it is for: kind of the item, and frames per second of a video.
            ticket: Charged with the rows.

        Raises:
            InvalidRequestError: The grid does not fit the rows, or a value is not finite.
            OverloadedError: The sources in work take too many bytes together.
        """
        modality, fps = command.modality, command.options.fps
        num_rows, width = self._rows_and_width(tensor.shape, modality)
        layout = self._planner.plan(modality, num_rows, tensor.grid, fps)
        dtype = self._description.data_type
        ticket.charge_source(num_rows * width * dtype.num_bytes)
        rows = await asyncio.to_thread(_convert, tensor, (num_rows, width), _TORCH_DTYPES[dtype])
        return ReadyItem(layout, rows)

    async def _read_tensor(
        self, source: TensorSource, modality: Modality, ticket: AdmissionTicket
    ) -> ReadyTensor:
        num_rows, width = self._rows_and_width(source.shape, modality)
        num_bytes = num_rows * width * source.dtype.num_bytes
        check_size(num_bytes, self._limits.max_tensor_bytes, "bytes of a tensor", "tensor.spec")
        data = await self._reader.collect(BytesSource(num_bytes, source.chunks), ticket)
        return await self._named(source.dtype, source.shape, source.grid, data)

    async def _read_file(
        self, source: TensorFileSource, modality: Modality, ticket: AdmissionTicket
    ) -> ReadyTensor:
        max_bytes = self._limits.max_tensor_bytes
        check_size(source.num_bytes, max_bytes, "bytes of a tensor", "tensor_file.num_bytes")
        max_grid_bytes = self._limits.max_grid_file_bytes
        check_size(
            source.num_grid_bytes, max_grid_bytes, "bytes of a grid", "tensor_file.num_grid_bytes"
        )
        if not source.num_bytes:
            raise InvalidRequestError("The embedding has no bytes.", param="tensor_file")
        num_bytes = source.num_bytes + source.num_grid_bytes
        content = await self._reader.collect(BytesSource(num_bytes, source.chunks), ticket)
        file = await asyncio.to_thread(MemoryFile.of_bytes, content)
        task = TensorTask(max_bytes, source.num_bytes, source.num_grid_bytes, modality.value).pack()
        header = TensorHeader.unpack(await self._decoder.probe_tensor(modality, file, task))
        self._rows_and_width(header.shape, modality)
        check_size(header.num_bytes, max_bytes, "bytes of a tensor", "tensor_file")
        ticket.charge_source(header.num_bytes)
        data = await self._decoder.decode_tensor(modality, file, task, header.num_bytes)
        grid = PatchGrid(*header.grid) if header.grid else source.grid
        if source.grid not in (None, grid):
            raise InvalidRequestError(
                "The file has another grid than the request.", reason=INVALID_EMBEDDING
            )
        return await self._named(DataType(header.element_type.value), header.shape, grid, data)

    async def _named(
        self,
        dtype: DataType,
        shape: tuple[int, ...],
        grid: PatchGrid | None,
        data: bytearray | memoryview,
    ) -> ReadyTensor:
        digest = await asyncio.to_thread(tensor_digest, dtype, shape, memoryview(data), grid)
        return ReadyTensor(dtype, shape, grid, data, digest)

    def _rows_and_width(self, shape: tuple[int, ...], modality: Modality) -> tuple[int, int]:
        """Return the two sides of an embedding; leading sides of 1 are dropped."""
        sides = list(shape)
        while len(sides) > 2 and sides[0] == 1:
            del sides[0]
        name = modality.value.capitalize()
        if len(sides) != 2:
            raise InvalidRequestError(
                f"{name} embedding must be 2D (seq_len, hidden_size) or 3D"
                f" (1, seq_len, hidden_size), got {len(shape)}D tensor with shape {shape}",
                reason=INVALID_EMBEDDING,
            )
        num_rows, width = sides
        if width != self._description.hidden_size:
            raise InvalidRequestError(
                f"{name} embedding hidden dimension mismatch: got {width}, but model expects"
                f" {self._description.hidden_size}. Embedding shape: {shape}",
                reason=INVALID_EMBEDDING,
            )
        return num_rows, width


def _convert(tensor: ReadyTensor, shape: tuple[int, int], dtype: torch.dtype) -> torch.Tensor:
    given = torch.frombuffer(tensor.data, dtype=_TORCH_DTYPES[tensor.dtype])
    # Of our own: the worker that wrote the elements could still change them.
    rows = given.view(shape).to(dtype, copy=True)
    # After the conversion: a large float32 becomes an infinite float16.
    if not bool(rows.isfinite().all()):
        raise InvalidRequestError(
            "The embedding has values that are not finite.", reason=INVALID_EMBEDDING
        )
    return rows
