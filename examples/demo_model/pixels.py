"""Bring a picture to the pixels and patches that the vision tower takes.

This is the image processor of Qwen2-VL for single pictures, on a uint8 tensor: the same resize
(bicubic with antialiasing), the same normalisation, the same order of patches.
"""

import io

import numpy as np
import torch
from PIL import Image
from torch.nn.functional import interpolate
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

PATCH = 14
MERGE = 2
TEMPORAL = 2
MIN_PIXELS = 112 * 112
MAX_PIXELS = 148 * 148
CELL = PATCH * MERGE
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
PATCH_WIDTH = 3 * TEMPORAL * PATCH * PATCH


def decode_picture(data: bytes) -> torch.Tensor:
    """Decode a picture file to RGB. [3, height, width], uint8."""
    pixels = np.array(Image.open(io.BytesIO(data)).convert("RGB"))
    return torch.from_numpy(pixels).permute(2, 0, 1)


def resize_picture(picture: torch.Tensor) -> torch.Tensor:
    """Resize to whole cells within the limits of pixels. [3, height, width], uint8."""
    height, width = smart_resize(
        picture.shape[1], picture.shape[2], CELL, min_pixels=MIN_PIXELS, max_pixels=MAX_PIXELS
    )
    if picture.shape[1:] == (height, width):
        return picture
    return interpolate(picture[None], (height, width), mode="bicubic", antialias=True)[0]


def patchify(picture: torch.Tensor) -> torch.Tensor:
    """Normalise and cut a resized picture into patches, four of a merged cell together.

    Args:
        picture: Resized pixels. [3, height, width], uint8.

    Returns:
        One row per patch, both time slices alike. [num_patches, PATCH_WIDTH], float32.
    """
    mean = torch.tensor(MEAN).view(3, 1, 1) * 255
    std = torch.tensor(STD).view(3, 1, 1) * 255
    pixels = (picture.float() - mean) / std
    rows, columns = pixels.shape[1] // CELL, pixels.shape[2] // CELL
    patches = pixels.reshape(3, rows, MERGE, PATCH, columns, MERGE, PATCH)
    patches = patches.permute(1, 4, 2, 5, 0, 3, 6).unsqueeze(5)
    patches = patches.expand(-1, -1, -1, -1, -1, TEMPORAL, -1, -1)
    return patches.reshape(rows * columns * MERGE**2, PATCH_WIDTH)
