"""Decode pictures with Pillow, upright and flattened; runs in a decode worker."""

from __future__ import annotations

import io
import warnings
from functools import partial
from typing import TYPE_CHECKING

from PIL import Image, ImageChops, _imaging
from PIL.TiffImagePlugin import TiffImageFile

from chiasm.encoder.decode_errors import MediaTooLargeError
from chiasm.encoder.wire_image import MAX_SIDE, ImageHeader, ImageTask

if TYPE_CHECKING:
    import mmap

    from chiasm.encoder.media_writer import MediaWriter

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")

_ORIENTATION_TAG = 0x0112
_TRANSPOSE = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_MODES_WITH_ALPHA = ("RGBA", "LA", "PA", "La", "RGBa")
_STRIP_ROWS = 32
_NUM_WIDE_GREYS = 1 << 16
# Bits of a sample and kind of colour, in the first chunk of a PNG.
_PNG_DEPTH_AT, _PNG_COLOUR_AT = 24, 25
_PNG_GREY, _PNG_RGB = 0, 2
_TIFF_PHOTOMETRIC_TAG = 262
_TIFF_WHITE_IS_ZERO = 0
_PNG_SIGNATURE_BYTES = 8
_PNG_CHUNK_OVERHEAD_BYTES = 12


def probe(body: bytes, source: mmap.mmap) -> bytes:
    """Return the ``ImageHeader`` of a picture, for an ``ImageTask``; see ``read_header``."""
    return read_header(source, ImageTask.unpack(body).max_pixels).pack()


def decode(body: bytes, source: mmap.mmap, media: MediaWriter) -> None:
    """Fill ``media`` with the pixels of a picture, for an ``ImageTask``; see ``fill_pixels``."""
    fill_pixels(source, ImageTask.unpack(body), media.memory())


def read_header(source: mmap.mmap | bytes, max_pixels: int) -> ImageHeader:
    """Return the header of a picture.

    Raises:
        MediaTooLargeError: It has more than ``max_pixels`` pixels, or too long a side.
        Exception: Pillow cannot read it; of any class.
    """
    width, height, _, _ = _open(source, max_pixels)
    return ImageHeader(width, height)


def fill_pixels(source: mmap.mmap, task: ImageTask, memory: mmap.mmap) -> None:
    """Fill memory with the pixels of a picture of the size that ``task`` tells.

    Args:
        source: The file.
        task: What the probe told.
        memory: Where they go, every byte of every pixel. [height, width, PIXEL_BYTES], uint8.

    Raises:
        MediaTooLargeError: It has too many pixels or too long a side.
        ValueError: It does not have that size, or ``memory`` has no room for it.
        Exception: Pillow cannot decode it; of any class.
    """
    orientation, image = _open_expected(source, task)
    # Pillow checks that the memory has room.
    frame = _imaging.map_buffer(memory, (task.width, task.height), "raw", 0, ("RGB", 0, 1))
    if image.format == "JPEG" and image.mode == "RGB" and orientation not in _TRANSPOSE:
        # The decoder writes whole rows, and all of them or none: a file that ends early raises.
        image.im = frame
        image.load()
        if image.im is not frame:
            raise ValueError("the picture was decoded into other memory")
        return
    upright = _make_upright(image, orientation, task)
    frame.paste(upright.im, (0, 0, task.width, task.height))


def write_pixels(source: mmap.mmap | bytes, task: ImageTask, media: MediaWriter) -> None:
    """Write the pixels of a picture of the size that ``task`` tells.

    Args:
        source: The file.
        task: What the probe told.
        media: Takes the pixels. [height, width, 3], uint8.

    Raises:
        MediaTooLargeError: It has too many pixels or too long a side.
        ValueError: It does not have that size.
        Exception: Pillow cannot decode it; of any class.
    """
    orientation, image = _open_expected(source, task)
    upright = _make_upright(image, orientation, task)
    # In strips that stay in the processor's cache between packing and writing.
    for top in range(0, task.height, _STRIP_ROWS):
        strip = upright.crop((0, top, task.width, min(top + _STRIP_ROWS, task.height)))
        media.write(strip.tobytes())


def _open_expected(source: mmap.mmap | bytes, task: ImageTask) -> tuple[int, Image.Image]:
    """Return orientation and the image, not yet decoded, if it has the size that was probed."""
    width, height, orientation, image = _open(source, task.max_pixels)
    if (width, height) != (task.width, task.height):
        raise ValueError("the size of the picture has changed")
    return orientation, image


def _open(source: mmap.mmap | bytes, max_pixels: int) -> tuple[int, int, int, Image.Image]:
    """Return upright width, upright height, orientation and the image, not yet decoded."""
    # A wrong size in a header is our own check's business; this is the net behind it.
    Image.MAX_IMAGE_PIXELS = MAX_SIDE * MAX_SIDE
    warnings.simplefilter("ignore")
    try:
        image = Image.open(io.BytesIO(source), formats=FORMATS)
    except Image.DecompressionBombError:
        raise MediaTooLargeError(
            f"Image dimensions exceed the maximum of {max_pixels} pixels."
        ) from None
    width, height = image.size
    if max(width, height) > MAX_SIDE:
        raise MediaTooLargeError(
            f"Image dimensions {width}x{height} exceed the maximum of {MAX_SIDE} pixels a side."
        )
    if width * height > max_pixels:
        raise MediaTooLargeError(
            f"Image dimensions {width}x{height} ({width * height} pixels) exceed the maximum of"
            f" {max_pixels} pixels."
        )
    if image.format == "PNG" and "transparency" in image.info:
        _scale_transparent_colour(image, source[_PNG_DEPTH_AT], source[_PNG_COLOUR_AT])
    orientation = _read_orientation(image, source)
    if orientation >= 5:
        width, height = height, width
    return width, height, orientation, image


def _scale_transparent_colour(image: Image.Image, depth: int, colour: int) -> None:
    """Bring the transparent colour of a PNG to the 8 bits that its samples are decoded to.

    NOTE: of 16-bit colours Pillow keeps the upper halves, so neighbours of the transparent one in
    the 65536 values of a channel are as transparent as it is.
    """
    key = image.info["transparency"]
    if colour == _PNG_GREY and depth in (2, 4):
        most = (1 << depth) - 1
        image.info["transparency"] = (key & most) * 255 // most
    elif colour == _PNG_RGB and depth == 16:
        image.info["transparency"] = tuple(value >> 8 for value in key)


def _read_orientation(image: Image.Image, source: mmap.mmap | bytes) -> int:
    if image.format == "TIFF":
        return 1  # Pillow turns TIFF pictures itself, and their size is the upright one already
    # The PNG plugin's own method decodes all pixels to look for Exif behind them.
    read_exif = image.getexif
    if image.format == "PNG" and _has_chunks_behind_pixels(source):
        # NOTE: Pillow tells of broken pixels once; told while Exif is read, they would pass.
        image.load()
    elif image.format == "PNG":
        read_exif = partial(Image.Image.getexif, image)
    try:
        exif = read_exif()
        orientation = exif.get(_ORIENTATION_TAG, 1)
    except Exception:
        # Broken Exif raises anything and must not be fatal.
        return 1
    return orientation if orientation in _TRANSPOSE else 1


def _has_chunks_behind_pixels(source: mmap.mmap | bytes) -> bool:
    offset, has_seen_pixels = _PNG_SIGNATURE_BYTES, False
    while offset + _PNG_CHUNK_OVERHEAD_BYTES <= len(source):
        num_bytes = int.from_bytes(source[offset : offset + 4], "big")
        kind = source[offset + 4 : offset + 8]
        if has_seen_pixels and kind not in (b"IDAT", b"IEND"):
            return True
        has_seen_pixels = has_seen_pixels or kind == b"IDAT"
        offset += num_bytes + _PNG_CHUNK_OVERHEAD_BYTES
    return False


def _make_upright(image: Image.Image, orientation: int, task: ImageTask) -> Image.Image:
    """Return the picture as a person sees it, as 8-bit RGB, of the size that ``task`` tells."""
    upright = _flatten(image, task.background_rgb)
    if orientation in _TRANSPOSE:
        upright = upright.transpose(_TRANSPOSE[orientation])
    if upright.size != (task.width, task.height):
        raise ValueError("the picture does not have the size of its header")
    return upright


def _flatten(image: Image.Image, background_rgb: int) -> Image.Image:
    """Return the picture as 8-bit RGB, transparent pixels composited on the background."""
    if image.mode.startswith("I;16"):
        image = _narrow(image)
    if image.mode == "La":
        image = image.convert("LA")  # to others it has no way
    if image.mode in _MODES_WITH_ALPHA or "transparency" in image.info:
        picture = image.convert("RGBA")
        red, green, blue = background_rgb.to_bytes(3, "big")
        flat = Image.new("RGB", picture.size, (red, green, blue))
        flat.paste(picture, mask=picture.getchannel("A"))
        return flat
    image.load()
    return image if image.mode == "RGB" else image.convert("RGB")


def _narrow(image: Image.Image) -> Image.Image:
    """Return 16-bit greys as 8-bit ones, with an alpha channel if one grey is transparent."""
    wide = image.convert("I")
    grey = wide.point(lambda value: value * (1 / 256)).convert("L")
    tags = image.tag_v2 if isinstance(image, TiffImageFile) else {}
    if tags.get(_TIFF_PHOTOMETRIC_TAG) == _TIFF_WHITE_IS_ZERO:
        grey = ImageChops.invert(grey)  # Pillow does this itself to greys of 8 bits alone
    # NOTE: the key is one of 65536 greys; its neighbours become the same 8-bit grey and are opaque.
    key = image.info.get("transparency")
    grey.info.pop("transparency", None)
    if key is not None:
        opacity = [255] * _NUM_WIDE_GREYS
        opacity[key] = 0
        grey.putalpha(wide.point(opacity, "L"))
    return grey
