"""Triton's turning of heads, and what it writes to the cache, against torch's operators."""

from __future__ import annotations

import pytest
import torch

from chiasm.common.rms_norm import RMSNorm
from chiasm.generator.model.fused.rotary import make_rotation, rotate
from tests.fakes.rounding import DTYPE_PAIRS, assert_close, random_rows

NUM_TOKENS = 5
SLOTS = (3, 0, 8, 1, 5)


@pytest.mark.parametrize("dtypes", DTYPE_PAIRS, ids=str)
@pytest.mark.parametrize(
    ("heads", "rotary_dim"),
    [((1, 1, 2), 2), ((3, 1, 34), 12), ((4, 2, 16), 16), ((7, 1, 80), 80), ((6, 3, 64), 32)],
    ids=str,
)
@pytest.mark.parametrize("has_norm", [False, True])
def test_heads_are_placed_as_torch_places_them(
    triton_device: str,
    dtypes: tuple[torch.dtype, torch.dtype],
    heads: tuple[int, int, int],
    rotary_dim: int,
    has_norm: bool,
) -> None:
    from chiasm.kernels.rope_store_kv import rope_store_kv

    num_q_heads, num_kv_heads, head_dim = heads
    num_turned = num_q_heads + num_kv_heads
    qkv = random_rows(1, NUM_TOKENS, (num_turned + num_kv_heads) * head_dim, dtype=dtypes[0])
    angles = random_rows(2, 1, NUM_TOKENS, rotary_dim // 2, dtype=torch.float32).repeat(1, 1, 2)
    rotation = make_rotation(angles.cos().to(dtypes[0]), angles.sin().to(dtypes[0]))
    weight = random_rows(3, num_turned, head_dim, dtype=dtypes[1])
    split = qkv.view(NUM_TOKENS, -1, head_dim)
    turned = split[:, :num_turned]
    expected = rotate(RMSNorm(weight, 1e-6)(turned) if has_norm else turned, rotation)
    keys = torch.full((9, num_kv_heads, head_dim), float("nan"), dtype=dtypes[0])
    cached = (keys.to(triton_device), keys.clone().to(triton_device))
    slots = torch.tensor(SLOTS, device=triton_device)
    tables = (rotation.cos.to(triton_device), rotation.sin.to(triton_device))
    norm = (weight.to(triton_device), 1e-6) if has_norm else None

    placed = rope_store_kv(qkv.to(triton_device), tables, slots, cached, norm)

    assert_close(placed, expected, float(expected.abs().max()))
    assert torch.equal(cached[0][slots], placed[:, num_q_heads:])
    assert torch.equal(cached[1][slots].cpu(), split[:, num_turned:])
    others = [slot for slot in range(len(keys)) if slot not in SLOTS]
    assert cached[0][others].isnan().all()
    assert cached[1][others].isnan().all()


def test_heads_without_a_slot_are_turned_and_not_kept(triton_device: str) -> None:
    from chiasm.kernels.rope_store_kv import rope_store_kv

    qkv = random_rows(1, 3, 6 * 16, dtype=torch.float32).to(triton_device)
    angles = random_rows(2, 3, 1, 16, dtype=torch.float32).to(triton_device)
    tables = (angles.cos(), angles.sin())
    placed = []
    caches = []
    for slots in ([2, 4, 0], [2, -1, 0]):
        cached = (torch.zeros(5, 1, 16, device=triton_device),) * 2
        caches.append([one.clone() for one in cached])
        slot = torch.tensor(slots, device=triton_device)
        placed.append(rope_store_kv(qkv, tables, slot, (caches[-1][0], caches[-1][1])))

    assert torch.equal(*placed)
    for kept, without in zip(*caches, strict=True):
        assert kept[4].all()
        assert not without[4].any()
        assert torch.equal(kept[:4], without[:4])


def test_tensors_that_do_not_fit_are_refused(triton_device: str) -> None:
    from chiasm.kernels.rope_store_kv import rope_store_kv

    qkv, tables, slots = torch.zeros(2, 16), (torch.zeros(2, 4),) * 2, torch.arange(2)
    cached = (torch.zeros(8, 1, 4), torch.zeros(8, 1, 4))

    with pytest.raises(ValueError, match="are not heads"):
        rope_store_kv(qkv[:, :8].contiguous(), tables, slots, cached)
    with pytest.raises(ValueError, match="float16"):
        rope_store_kv(qkv.half(), tables, slots, cached)
    with pytest.raises(ValueError, match="angles"):
        rope_store_kv(qkv, tables, slots[:1], cached)
    with pytest.raises(ValueError, match="one behind the other"):
        rope_store_kv(torch.zeros(16, 2).T, tables, slots, cached)
