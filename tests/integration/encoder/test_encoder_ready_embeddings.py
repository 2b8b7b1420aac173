"""Ready-made embeddings: stored as the tower's own are, and whatever does not fit is refused."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from safetensors.torch import save as save_safetensors

from chiasm.common.errors import (
    ChiasmError,
    ConflictError,
    InvalidRequestError,
    TooLargeError,
)
from chiasm.common.limits import Limits
from chiasm.v1 import encoder_pb2, media_pb2

if TYPE_CHECKING:
    from pathlib import Path

    from tests.harness.encoder import Answer, EncoderClient

pytestmark = [pytest.mark.integration, pytest.mark.asyncio(loop_scope="package")]

HIT, MISS = media_pb2.CACHE_STATUS_HIT, media_pb2.CACHE_STATUS_MISS
NUM_ROWS = 6
LIMITS = Limits()


@pytest.fixture
def grid(model: Path) -> media_pb2.PatchGrid | None:
    """Return the grid of ``NUM_ROWS`` rows; ``None`` for a family without grids."""
    return None if "llava" in str(model) else media_pb2.PatchGrid(t=1, h=4, w=6)


async def make_rows(client: EncoderClient, num_rows: int = NUM_ROWS) -> torch.Tensor:
    info = await client.info()
    generator = torch.Generator().manual_seed(1)
    return torch.randn(num_rows, info.hidden_size, generator=generator)


def torch_file(value: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def raw(rows: torch.Tensor) -> bytes:
    return rows.contiguous().view(torch.uint8).numpy().tobytes()


async def send_file(
    client: EncoderClient,
    data: bytes,
    tenant: str,
    grid: media_pb2.PatchGrid | None = None,
    **header: Any,
) -> Answer:
    source = encoder_pb2.TensorFileSource(num_bytes=len(data), grid=grid)
    return await client.encode(data, tenant=tenant, tensor_file=source, **header)


async def send_tensor(
    client: EncoderClient,
    rows: torch.Tensor,
    tenant: str,
    grid: media_pb2.PatchGrid | None,
    dtype: media_pb2.DataType.ValueType = media_pb2.DATA_TYPE_FLOAT32,
    **header: Any,
) -> Answer:
    spec = media_pb2.TensorSpec(
        role=media_pb2.TENSOR_ROLE_SPLICE, dtype=dtype, shape=list(rows.shape)
    )
    source = encoder_pb2.TensorSource(spec=spec, grid=grid)
    return await client.encode(raw(rows), tenant=tenant, tensor=source, **header)


async def test_rows_come_back_as_they_were_sent(
    client: EncoderClient, tenant: str, grid: media_pb2.PatchGrid | None
) -> None:
    rows = await make_rows(client)
    before = (await client.info()).num_encoded_items

    answer = await send_tensor(client, rows, tenant, grid, inline=True)

    assert np.array_equal(answer.rows(), rows.numpy())
    assert answer.layout is not None
    assert [(run.count, run.is_embedding) for run in answer.layout.runs] == [(NUM_ROWS, True)]
    assert answer.layout.HasField("grid") == (grid is not None)
    assert (await client.info()).num_encoded_items == before


async def test_every_form_of_one_tensor_is_one_embedding(
    client: EncoderClient, tenant: str, grid: media_pb2.PatchGrid | None
) -> None:
    rows = await make_rows(client)
    named: dict[str, torch.Tensor] = {"image_embeds": rows}
    if grid is not None:
        named["image_grid_thw"] = torch.tensor([[grid.t, grid.h, grid.w]])

    answers = [
        await send_tensor(client, rows, tenant, grid),
        await send_file(client, torch_file(rows), tenant, grid),
        await send_file(client, torch_file(rows.T.contiguous().T), tenant, grid),
        await send_file(client, torch_file(named), tenant),
        await send_file(client, save_safetensors(named), tenant),
    ]

    assert [answer.status for answer in answers] == [MISS, HIT, HIT, HIT, HIT]
    assert len({answer.ref.embedding_id for answer in answers}) == 1


async def test_a_grid_may_be_a_file_of_its_own(
    client: EncoderClient, tenant: str, grid: media_pb2.PatchGrid | None
) -> None:
    rows = torch_file(await make_rows(client))
    grid_file = torch_file(torch.tensor([1, 4, 6]))
    source = encoder_pb2.TensorFileSource(num_bytes=len(rows), num_grid_bytes=len(grid_file))
    if grid is None:
        with pytest.raises(InvalidRequestError, match="has no patch grid"):
            await client.encode(rows + grid_file, tenant=tenant, tensor_file=source)
        return

    answer = await client.encode(rows + grid_file, tenant=tenant, tensor_file=source)

    assert answer.layout is not None
    assert (answer.layout.grid.h, answer.layout.grid.w) == (4, 6)


async def test_other_types_and_leading_sides_of_one_are_taken(
    client: EncoderClient, tenant: str, grid: media_pb2.PatchGrid | None
) -> None:
    rows = (await make_rows(client)).bfloat16()

    answer = await send_tensor(
        client, rows[None], tenant, grid, media_pb2.DATA_TYPE_BFLOAT16, inline=True
    )

    assert np.array_equal(answer.rows(), rows.float().numpy())


async def test_a_uuid_is_bound_to_the_tensor(
    client: EncoderClient, tenant: str, grid: media_pb2.PatchGrid | None
) -> None:
    rows = await make_rows(client)
    await send_tensor(client, rows, tenant, grid, uuid="rows")

    assert (await client.encode(tenant=tenant, uuid="rows")).status == HIT
    with pytest.raises(ConflictError):
        await send_tensor(client, rows + 1, tenant, grid, uuid="rows")


async def test_values_that_are_not_finite_are_refused_and_bind_nothing(
    client: EncoderClient, tenant: str, grid: media_pb2.PatchGrid | None
) -> None:
    rows = await make_rows(client)
    for value in (float("nan"), float("inf")):
        bad = rows.clone()
        bad[3, 1] = value
        with pytest.raises(InvalidRequestError, match="not finite"):
            await send_file(client, torch_file(bad), tenant, grid, uuid="bad")
    assert (await send_tensor(client, rows, tenant, grid, uuid="bad")).status == MISS


WRONG_SHAPES = [(NUM_ROWS, 1), (NUM_ROWS,), (2, 3, -1), (1, 1, NUM_ROWS, 1)]


@pytest.mark.parametrize("shape", WRONG_SHAPES, ids=str)
async def test_a_tensor_of_another_shape_is_refused(
    client: EncoderClient, tenant: str, grid: media_pb2.PatchGrid | None, shape: tuple[int, ...]
) -> None:
    width = (await client.info()).hidden_size
    rows = torch.ones([width if side == -1 else side for side in shape])

    with pytest.raises(InvalidRequestError, match=r"must be 2D|dimension mismatch") as caught:
        await send_tensor(client, rows, tenant, grid)
    assert caught.value.reason == "INVALID_EMBEDDING"
    with pytest.raises(InvalidRequestError, match=r"must be 2D|dimension mismatch"):
        await send_file(client, torch_file(rows), tenant, grid)


async def test_grid_and_rows_must_agree(
    client: EncoderClient, tenant: str, grid: media_pb2.PatchGrid | None
) -> None:
    rows = await make_rows(client)
    if grid is None:
        with pytest.raises(InvalidRequestError, match="has no patch grid"):
            await send_tensor(client, rows, tenant, media_pb2.PatchGrid(t=1, h=4, w=6))
        return
    for t, h, w, text in (
        (1, 4, 8, "makes 8 embeddings, but there are 6 rows"),
        (1, 3, 8, "must be multiples of 2"),
        (2, 2, 6, "has one temporal patch"),
        (2**32 - 1, 2, 2, "has one temporal patch"),
    ):
        with pytest.raises(InvalidRequestError, match=text):
            await send_tensor(client, rows, tenant, media_pb2.PatchGrid(t=t, h=h, w=w))
    with pytest.raises(InvalidRequestError, match="should contain the fields"):
        await send_tensor(client, rows, tenant, None)


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b"junk", "neither a file of torch"),
        (torch_file({"pixels": torch.ones(2), "labels": torch.ones(2)}), "is named image_embeds"),
        (torch_file(torch.ones(2, 2, dtype=torch.int64)), "must be float32"),
        (torch_file(torch.eye(3).to_sparse()), "something else than dense"),
        (torch_file({"image_embeds": torch.ones(2, 2), "image_grid_thw": torch.ones(3)}), "grid"),
        (b"", "has no bytes"),
    ],
    ids=["junk", "names", "integers", "sparse", "float grid", "empty"],
)
async def test_a_file_of_something_else_is_refused(
    client: EncoderClient, tenant: str, data: bytes, text: str
) -> None:
    with pytest.raises(InvalidRequestError, match=text):
        await send_file(client, data, tenant)


async def test_announced_sizes_are_checked_before_anything_is_read(
    client: EncoderClient, tenant: str
) -> None:
    width = (await client.info()).hidden_size
    num_rows = LIMITS.max_tensor_bytes // (4 * width) + 1
    spec = media_pb2.TensorSpec(
        role=media_pb2.TENSOR_ROLE_SPLICE,
        dtype=media_pb2.DATA_TYPE_FLOAT32,
        shape=[num_rows, width],
    )
    sources: list[dict[str, Any]] = [
        {"tensor": encoder_pb2.TensorSource(spec=spec)},
        {"tensor_file": {"num_bytes": LIMITS.max_tensor_bytes + 1}},
        {"tensor_file": {"num_bytes": 1, "num_grid_bytes": LIMITS.max_grid_file_bytes + 1}},
    ]
    for source in sources:
        with pytest.raises(TooLargeError):
            await client.encode(tenant=tenant, **source)


@pytest.mark.parametrize("num_bytes", [-1, 1])
async def test_another_length_than_the_shape_says_is_refused(
    client: EncoderClient, tenant: str, grid: media_pb2.PatchGrid | None, num_bytes: int
) -> None:
    rows = await make_rows(client)
    spec = media_pb2.TensorSpec(
        role=media_pb2.TENSOR_ROLE_SPLICE,
        dtype=media_pb2.DATA_TYPE_FLOAT32,
        shape=list(rows.shape),
    )
    data = (raw(rows) + b"x")[: rows.nbytes + num_bytes]

    with pytest.raises(ChiasmError, match="bytes were announced"):
        await client.encode(
            data, tenant=tenant, tensor=encoder_pb2.TensorSource(spec=spec, grid=grid)
        )
