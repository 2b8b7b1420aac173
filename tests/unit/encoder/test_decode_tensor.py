"""Files with tensors are read in decode workers, within their bounds."""

from __future__ import annotations

import io
import zipfile
from typing import TYPE_CHECKING

import pytest
import torch

from chiasm.common.errors import InvalidRequestError, TooLargeError
from chiasm.common.media import Modality
from chiasm.encoder.decode_wire import WireError
from chiasm.encoder.memory_file import MemoryFile
from chiasm.encoder.wire_tensor import ElementType, TensorHeader, TensorTask

if TYPE_CHECKING:
    from chiasm.encoder.decode_pool import DecodePool

pytestmark = pytest.mark.asyncio(loop_scope="package")

ROWS = torch.arange(24, dtype=torch.float32).view(6, 4)
GRID = torch.tensor([[1, 4, 6]])
MAX_BYTES = ROWS.nbytes


def torch_file(value: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


async def read(
    decoder: DecodePool, file: bytes, grid_file: bytes = b"", max_bytes: int = MAX_BYTES
) -> tuple[TensorHeader, bytes]:
    source = MemoryFile.of_bytes(file + grid_file)
    task = TensorTask(max_bytes, len(file), len(grid_file), "image").pack()
    header = TensorHeader.unpack(await decoder.probe_tensor(Modality.IMAGE, source, task))
    content = bytes(await decoder.decode_tensor(Modality.IMAGE, source, task, header.num_bytes))
    return header, content


async def test_header_and_elements_come_out_of_one_file(decoder: DecodePool) -> None:
    header, content = await read(
        decoder, torch_file({"image_embeds": ROWS, "image_grid_thw": GRID})
    )

    assert header == TensorHeader(ElementType.FLOAT32, (6, 4), (1, 4, 6))
    assert content == ROWS.numpy().tobytes()


async def test_the_grid_comes_out_of_a_second_file(decoder: DecodePool) -> None:
    header, content = await read(decoder, torch_file(ROWS.T), torch_file(GRID[0].int()))

    assert header == TensorHeader(ElementType.FLOAT32, (4, 6), (1, 4, 6))
    assert content == ROWS.T.contiguous().numpy().tobytes()


async def test_a_tensor_of_the_largest_size_passes_and_one_byte_less_does_not(
    decoder: DecodePool,
) -> None:
    await read(decoder, torch_file(ROWS), max_bytes=MAX_BYTES)
    with pytest.raises(TooLargeError, match="96 bytes of a tensor is over the limit of 95"):
        await read(decoder, torch_file(ROWS), max_bytes=MAX_BYTES - 1)


@pytest.mark.parametrize(
    ("grid", "text"),
    [
        (torch.tensor([1, 0, 6]), "sides of the grid must be at least 1"),
        (torch.tensor([1, -4, 6]), "sides of the grid must be at least 1"),
        (torch.tensor([1, 2**32, 6]), "sides of the grid must be at least 1"),
        (torch.tensor([1, 4]), "one row of 3 integers"),
        (torch.tensor([[1, 4, 6], [1, 4, 6]]), "one row of 3 integers"),
        (torch.tensor([1.0, 4.0, 6.0]), "one row of 3 integers"),
    ],
)
async def test_a_wrong_grid_is_refused(decoder: DecodePool, grid: torch.Tensor, text: str) -> None:
    with pytest.raises(InvalidRequestError, match=text):
        await read(decoder, torch_file(ROWS), torch_file(grid))


async def test_a_bomb_is_refused_and_the_worker_lives(decoder: DecodePool) -> None:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("archive/data.pkl", bytes(500_000_000))

    with pytest.raises(InvalidRequestError, match="entries that torch"):
        await read(decoder, buffer.getvalue())
    assert (await read(decoder, torch_file(ROWS)))[1] == ROWS.numpy().tobytes()


async def test_messages_keep_their_values() -> None:
    task = TensorTask(1 << 40, 3, 4, "audio")
    header = TensorHeader(ElementType.BFLOAT16, (1, 2, 3, 1 << 33), None)

    assert TensorTask.unpack(task.pack()) == task
    assert TensorHeader.unpack(header.pack()) == header


@pytest.mark.parametrize("index", [0, 1, 4])
async def test_a_message_that_is_none_is_refused(index: int) -> None:
    packed = bytearray(TensorHeader(ElementType.FLOAT32, (3,), (1, 2, 3)).pack())
    packed[index] = 0 if index == 4 else 99
    with pytest.raises(WireError):
        TensorHeader.unpack(bytes(packed))
    with pytest.raises(WireError):
        TensorTask.unpack(bytes(packed[:-1]))
