"""Ready-made embeddings that lie, names that are none, and texts that spell special tokens."""

from __future__ import annotations

import io
import struct

import numpy as np
import torch

from tests.fakes import bombs
from tests.harness.attack import (
    ANSWERED,
    Attack,
    attack,
    named,
    tensor,
    tensor_file,
)
from tests.harness.attack_target import GOOD_PICTURE

INVALID_REQUEST, INVALID_EMBEDDING = "invalid_request", "invalid_embedding"
INVALID_MEDIA, INVALID_UUID = "invalid_media", "invalid_uuid"
WIDTH = 64
HUGE = (1 << 32) - 1
ROWS_OF_ONE = np.ones((6, WIDTH), np.float32)
DATA = ROWS_OF_ONE.tobytes()

# `os.system` on loading, as text: protocol 0.
PICKLE = b"cos\nsystem\n(S'touch /tmp/pwned'\ntR."
REDUCE = b"\x80\x02cbuiltins\neval\nX\x04\x00\x00\x001+11\x85R."
SHAPES = {
    "2^32 x 2^32": (1 << 32, 1 << 32),
    "-1 x 8": (-1, 8),
    "0": (0,),
    "rank 0": (),
    "rank 9": (1, 1, 1, 1, 1, 1, 1, 6, WIDTH),
    "a row more": (7, WIDTH),
    "2^63 rows": ((1 << 63) - 1, WIDTH),
}


def torch_file(value: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def with_value(value: float) -> bytes:
    rows = ROWS_OF_ONE.copy()
    rows[3, 1] = value
    return rows.tobytes()


def nan_file() -> bytes:
    return bombs.safetensor_of((6, WIDTH), with_value(float("nan")))


def sparse_file() -> bytes:
    """Return a sparse tensor whose indices lie outside of it."""
    indices = torch.tensor([[1 << 40], [1 << 40]])
    matrix = torch.sparse_coo_tensor(indices, torch.ones(1), (6, WIDTH), check_invariants=False)
    return torch_file(matrix)


def shape_rows(name: str, shape: tuple[int, ...]) -> list[Attack]:
    lying = bombs.safetensor_of(shape, DATA)
    return [
        attack(f"a tensor of shape {name}", tensor(shape, DATA), INVALID_REQUEST),
        attack(f"a file of shape {name}", tensor_file(lying), INVALID_MEDIA),
    ]


def uuid_rows(name: str, uuid: str) -> list[Attack]:
    return [
        attack(f"uuid: {name}", named(uuid, GOOD_PICTURE), INVALID_UUID),
        attack(f"uuid without data: {name}", named(uuid), INVALID_UUID),
    ]


def harmless_uuid_rows(name: str, uuid: str) -> list[Attack]:
    return [
        attack(f"unknown uuid: {name}", named(uuid), "media_not_found"),
        attack(f"harmless uuid: {name}", named(uuid, GOOD_PICTURE), ANSWERED),
    ]


# What arrives whole and is no embedding of this model; the first ones show that others would be.
TENSORS = {
    "a good tensor": (tensor((6, WIDTH), DATA), ANSWERED),
    "a good file": (tensor_file(bombs.safetensor_of((6, WIDTH), DATA)), ANSWERED),
    "a good file of torch": (tensor_file(torch_file(torch.ones(6, WIDTH))), ANSWERED),
    "another width": (tensor((6 * WIDTH, 1), DATA), INVALID_EMBEDDING),
    "a byte too few": (tensor((6, WIDTH), DATA[:-1]), INVALID_REQUEST),
    "a byte too many": (tensor((6, WIDTH), DATA + b"x"), INVALID_REQUEST),
    "NaN": (tensor((6, WIDTH), with_value(float("nan"))), INVALID_EMBEDDING),
    "infinity": (tensor((6, WIDTH), with_value(float("inf"))), INVALID_EMBEDDING),
    "a type that does not exist": (tensor((6, WIDTH), DATA, "complex"), INVALID_REQUEST),
    "a grid of 2^32 - 1": (tensor((6, WIDTH), DATA, grid=(HUGE,) * 3), INVALID_EMBEDDING),
    "a grid of 0": (tensor((6, WIDTH), DATA, grid=(0, 4, 6)), INVALID_REQUEST),
    "a grid of more rows": (tensor((6, WIDTH), DATA, grid=(1, 8, 8)), INVALID_EMBEDDING),
    "no grid": (tensor_file(bombs.safetensor_of((6, WIDTH), DATA), None), INVALID_EMBEDDING),
    "NaN in a file": (tensor_file(nan_file()), INVALID_EMBEDDING),
}
FILES = {
    "a pickle": PICKLE,
    "a pickle that calls eval": REDUCE,
    "a list saved by torch": torch_file([torch.ones(6, WIDTH)] * 2),
    "a model saved by torch": torch_file({"weight": {"a": torch.ones(2)}}),
    "whole numbers": torch_file(torch.ones(6, WIDTH, dtype=torch.int64)),
    "a sparse matrix": torch_file(torch.eye(6).to_sparse()),
    "a sparse matrix with indices outside": sparse_file(),
    "a zip of nothing": b"PK\x05\x06" + bytes(18),
    "a header of 2^63 bytes": struct.pack("<Q", 1 << 63) + b"{}",
    "a header of 4 GB": struct.pack("<Q", 1 << 32) + b"{}",
    "a header nested deeply": struct.pack("<Q", 40000) + b"[" * 40000,
    "elements outside": bombs.safetensor_of((6, WIDTH), DATA, offsets=(0, 1 << 40)),
    "elements from behind": bombs.safetensor_of((6, WIDTH), DATA, offsets=(-1536, 0)),
}
UUIDS = {
    "4 MB": "u" * (4 << 20),
    "513 characters": "u" * 513,
    "a NUL": "a\0b",
    "a line break": "a\r\nb",
    "a space": "a b",
    "an emoji": "\N{GRINNING FACE}",
    "from right to left": "\u202eabc",
    "a quote": 'a"b',
    "a backslash": "..\\..\\x",
}
HARMLESS_UUIDS = {
    "a path": "../../../../etc/passwd",
    "an absolute path": "/etc/passwd",
    "an encoded path": "%2e%2e%2fescaped",
    "a lone percent": "a%b",
    "a pattern": "*",
    "a key of the store": "chiasm:default:0:m",
    "512 characters": "u" * 512,
}

ROWS = [
    *(row for name, shape in SHAPES.items() for row in shape_rows(name, shape)),
    *(attack(f"an embedding: {name}", part, code) for name, (part, code) in TENSORS.items()),
    *(attack(f"a file: {name}", tensor_file(data), INVALID_MEDIA) for name, data in FILES.items()),
    *(
        attack(f"uuid: {name}", named(uuid, GOOD_PICTURE), INVALID_UUID)
        for name, uuid in UUIDS.items()
    ),
    *(
        attack(f"uuid without data: {name}", named(uuid), INVALID_UUID)
        for name, uuid in UUIDS.items()
    ),
    *(
        attack(f"harmless uuid: {name}", named(uuid, GOOD_PICTURE), ANSWERED)
        for name, uuid in HARMLESS_UUIDS.items()
    ),
    *(
        attack(f"unknown uuid: {name}", named(uuid + "-"), "media_not_found", INVALID_UUID)
        for name, uuid in HARMLESS_UUIDS.items()
    ),
]
