"""Tensors come out of files as libraries wrote them; nothing else does, and nothing is run."""

from __future__ import annotations

import io
import json
import struct
import zipfile
from typing import TYPE_CHECKING

import pytest
import torch
from safetensors.torch import save as save_safetensors

from chiasm.encoder.tensor_file import read_tensor_file
from chiasm.encoder.torch_objects import TensorFileError, read_torch_objects

if TYPE_CHECKING:
    from collections.abc import Mapping

    from chiasm.encoder.tensor_file import StoredTensor

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32]
GRID = torch.tensor([[1, 2, 6]])


def torch_file(value: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def as_torch(tensor: StoredTensor) -> torch.Tensor:
    dtype = getattr(torch, tensor.element_type.value)
    return torch.frombuffer(bytearray(b"".join(tensor.rows())), dtype=dtype).view(tensor.shape)


def read_one(data: bytes) -> torch.Tensor:
    (tensor,) = read_tensor_file(data).values()
    return as_torch(tensor)


BASE = torch.arange(24).reshape(4, 6)
VIEWS = {
    "dense": BASE,
    "transposed": BASE.T,
    "slice": BASE[1:3, 2:5],
    "every second column": BASE[:, ::2],
    "every second row": BASE[::2],
    "permuted": BASE.view(2, 3, 4).permute(2, 0, 1),
    "one row": BASE[2],
    "side of 1": BASE.view(1, 4, 6)[:, 1:2],
    "last element": BASE[3:, 5:],
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", list(VIEWS))
def test_a_view_that_torch_saved_is_read_as_torch_reads_it(name: str, dtype: torch.dtype) -> None:
    storage = BASE.to(dtype)
    view = VIEWS[name]
    tensor = storage.as_strided(view.shape, view.stride(), view.storage_offset())

    assert torch.equal(read_one(torch_file(tensor)), tensor)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_safetensors_are_read(dtype: torch.dtype) -> None:
    tensors = {"image_embeds": BASE.to(dtype), "image_grid_thw": GRID}

    read = read_tensor_file(save_safetensors(tensors, metadata={"format": "pt"}))

    assert torch.equal(as_torch(read["image_embeds"]), tensors["image_embeds"])
    assert torch.equal(as_torch(read["image_grid_thw"]), GRID)


def test_tensors_by_name_and_parameters_are_read() -> None:
    saved = {"image_embeds": torch.nn.Parameter(torch.ones(2, 3)), "image_grid_thw": GRID}

    read = read_tensor_file(torch_file(saved))

    assert torch.equal(as_torch(read["image_embeds"]), torch.ones(2, 3))
    assert torch.equal(as_torch(read["image_grid_thw"]), GRID)


FOREIGN = {
    "sparse": torch.eye(3).to_sparse(),
    "doubles": torch.ones(2, dtype=torch.float64),
    "complex": torch.ones(2, dtype=torch.complex64),
    "expanded": torch.ones(1).expand(1000),
    "expanded rows": torch.ones(1, 4).expand(4, 4),
    "overlapping": torch.ones(4).as_strided((3, 2), (1, 1)),
    "no elements": torch.ones(0, 4),
    "no sides": torch.tensor(1.0),
    "five sides": torch.ones(1, 1, 1, 1, 2),
    "a list": [torch.ones(2)],
    "an empty dictionary": {},
    "a number": {"image_embeds": 5},
    "numbered tensors": {1: torch.ones(2)},
    "a module": torch.nn.Linear(2, 2),
    "a size": torch.Size([2]),
    "text": "x",
}


@pytest.mark.parametrize("name", list(FOREIGN))
def test_whatever_else_torch_saves_is_refused(name: str) -> None:
    with pytest.raises(TensorFileError):
        read_tensor_file(torch_file(FOREIGN[name]))


def test_the_old_form_of_torch_save_is_refused() -> None:
    buffer = io.BytesIO()
    torch.save(torch.ones(2), buffer, _use_new_zipfile_serialization=False)
    with pytest.raises(TensorFileError, match="neither a file of torch"):
        read_tensor_file(buffer.getvalue())


HOSTILE = {
    "a command": b"\x80\x02cposix\nsystem\nX\x02\x00\x00\x00id\x85R.",
    "eval": b"\x80\x02cbuiltins\neval\nX\x01\x00\x00\x001\x85R.",
    "a function of torch": b"\x80\x02ctorch.hub\nload\n)R.",
    "an instance": b"\x80\x02(cos\nPathLike\no.",
    "a build": b"\x80\x02}}b.",
    "no stop": b"\x80\x02N",
    "nothing on the stack": b"\x80\x02R.",
    "a mark as argument": b"\x80\x02(R.",
    "an unknown memo": b"\x80\x02h\x07.",
    "a memo of nothing": b"\x80\x02q\x00.",
    "a text of four gigabytes": b"\x80\x02X\xff\xff\xff\xffx.",
    "a number of 255 bytes": b"\x80\x02\x8a\xff" + b"\xff" * 255 + b".",
    "another protocol": b"\x80\x05N.",
    "a tensor of nothing": b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n)R.",
    "a name without end": b"\x80\x02c" + b"x" * 1000,
    "empty": b"",
}


@pytest.mark.parametrize("name", list(HOSTILE))
def test_a_hostile_description_is_refused(name: str) -> None:
    with pytest.raises(TensorFileError):
        read_torch_objects(HOSTILE[name])


def test_nested_descriptions_take_no_more_time_than_their_length() -> None:
    doubled = b"".join(
        b"h" + bytes([i]) + b"h" + bytes([i]) + b"\x86q" + bytes([i + 1]) for i in range(200)
    )
    with pytest.raises(TensorFileError):
        read_torch_objects(b"\x80\x02K\x01q\x00" + doubled + b".")
    key = b"\x80\x02K\x01q\x00" + doubled + b"}h\xc8Ns."
    with pytest.raises(TensorFileError, match="strings as names"):
        read_torch_objects(key)


def archive(entries: Mapping[str, bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as file:
        for name, content in entries.items():
            file.writestr(name, content)
    return buffer.getvalue()


def saved_entries() -> dict[str, bytes]:
    with zipfile.ZipFile(io.BytesIO(torch_file(torch.ones(4, 2)))) as file:
        return {name: file.read(name) for name in file.namelist()}


def test_an_archive_of_the_same_entries_is_read() -> None:
    assert torch.equal(read_one(archive(saved_entries())), torch.ones(4, 2))


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"archive/data/0": b"x" * 28}, "another size"),
        ({"archive/data/0": b"x" * 36}, "another size"),
        ({"archive/byteorder": b"big"}, "not little-endian"),
        ({"archive/data.pkl": b"N" * 70_000}, "too many objects"),
        ({"other/data.pkl": b""}, "not one that torch.save wrote"),
    ],
    ids=["short", "long", "byteorder", "large", "two"],
)
def test_an_archive_that_torch_would_not_write_is_refused(
    change: dict[str, bytes], text: str
) -> None:
    with pytest.raises(TensorFileError, match=text):
        read_tensor_file(archive(saved_entries() | change))


def test_a_compressed_archive_is_refused_unread() -> None:
    bomb = saved_entries() | {"archive/data/0": bytes(50_000_000)}
    with pytest.raises(TensorFileError, match="entries that torch"):
        read_tensor_file(archive(bomb, zipfile.ZIP_DEFLATED))


def test_an_archive_of_very_many_entries_is_refused_unread() -> None:
    many = {f"archive/{index}": b"" for index in range(4000)}
    with pytest.raises(TensorFileError, match="the archive is broken"):
        read_tensor_file(archive(saved_entries() | many))


def test_every_cut_of_a_file_is_refused() -> None:
    for data in (torch_file(torch.ones(3, 2)), save_safetensors({"x": torch.ones(3, 2)})):
        for end in range(len(data)):
            with pytest.raises(TensorFileError):
                read_tensor_file(data[:end])


def test_a_changed_byte_never_does_more_than_raise_or_change_the_tensor() -> None:
    whole = torch_file({"image_embeds": torch.ones(3, 2), "image_grid_thw": GRID})
    num_refused = 0
    for index in range(len(whole)):
        data = bytearray(whole)
        data[index] ^= 0xFF
        try:
            tensors = read_tensor_file(bytes(data))
        except TensorFileError:
            num_refused += 1
        else:
            assert all(len(b"".join(tensor.rows())) <= len(whole) for tensor in tensors.values())
    assert num_refused > len(whole) // 4


def safetensors_file(header: object, elements: bytes = bytes(8)) -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + elements


WRONG_HEADERS = [
    {"x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 9]}},
    {"x": {"dtype": "F32", "shape": [2], "data_offsets": [-8, 0]}},
    {"x": {"dtype": "F32", "shape": [2], "data_offsets": [8, 0]}},
    {"x": {"dtype": "F32", "shape": [2], "data_offsets": [4, 8]}},
    {"x": {"dtype": "F32", "shape": [2**32, 2**32], "data_offsets": [0, 8]}},
    {"x": {"dtype": "F32", "shape": [-1, 8], "data_offsets": [0, 8]}},
    {"x": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}},
    {"x": {"dtype": "F32", "shape": [], "data_offsets": [0, 4]}},
    {"x": {"dtype": "F32", "shape": [1] * 9, "data_offsets": [0, 4]}},
    {"x": {"dtype": "F64", "shape": [1], "data_offsets": [0, 8]}},
    {"x": {"dtype": "F32", "shape": [2.0], "data_offsets": [0, 8]}},
    {"x": {"dtype": "F32", "shape": [2]}},
    {"x": 5},
    [1],
    5,
]


@pytest.mark.parametrize("header", WRONG_HEADERS, ids=lambda value: str(value)[:60])
def test_a_wrong_safetensors_header_is_refused(header: object) -> None:
    good = {"x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}
    assert read_one(safetensors_file(good)).shape == (2,)
    with pytest.raises(TensorFileError):
        read_tensor_file(safetensors_file(header))


@pytest.mark.parametrize(
    "data",
    [b"", b"x", bytes(8), b"\xff" * 100, struct.pack("<Q", 60000) + b"[" * 60000],
    ids=["empty", "short", "no header", "huge header", "deep header"],
)
def test_anything_else_is_refused(data: bytes) -> None:
    with pytest.raises(TensorFileError):
        read_tensor_file(data)
