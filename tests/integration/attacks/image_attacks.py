"""Pictures: bombs, tiny sizes, broken Exif, exotic formats, files whose errors tell addresses."""

from __future__ import annotations

from functools import partial
from itertools import product
from typing import TYPE_CHECKING

from PIL import Image

from tests.fakes import bombs
from tests.fakes.pictures import encode, noise, png_header
from tests.harness.attack import ANSWERED, DEFAULT_BUDGET_BYTES, Attack, Part, Site, attack, file

if TYPE_CHECKING:
    from collections.abc import Callable

INVALID_MEDIA, TOO_LARGE = "invalid_media", "too_large"
MIB = 1 << 20
# What the largest picture that is accepted may take, one of 17 MP, and twenty of the largest.
LARGEST, LARGE, MANY = 1000 * MIB, 500 * MIB, 1600 * MIB

MODES = ("L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16", "1")
SIDES = (1, 2, 3, 4, 13, 14, 15, 27, 28, 29)
EXIFS = {
    "empty": b"Exif\0\0",
    "offset beyond the end": b"Exif\0\0MM\0*\xff\xff\xff\xff",
    "junk": b"junk" * 9,
    "a loop of directories": b"Exif\0\0II*\0\x08\0\0\0\0\0\x08\0\0\0",
    "orientation 99": b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0\x63\0\0\0\0\0\0\0",
    "orientation as text": b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x02\0\x04\0\0\0abc\0\0\0\0\0",
    "2^32 values": b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x04\0\xff\xff\xff\xff\x08\0\0\0\0\0\0\0",
}
EXOTIC = ("DDS", "EPS", "JPEG2000", "ICNS", "ICO", "PCX", "PPM", "SGI", "TGA", "MSP", "PDF", "AVIF")
JUNK = {
    "no picture": b"not a picture" * 20,
    "empty": b"",
    "a NUL": b"\0",
    "FITS": bombs.fits_picture(),
    "a gzipped FITS": b"\x1f\x8b\x08" + bytes(99),
    "SVG": b"<svg xmlns='http://www.w3.org/2000/svg'><image href='file:///etc/passwd'/></svg>",
    "a header only": png_header(64, 64),
    "a truncated PNG": encode(noise(64, 64), "PNG")[:3000],
    "a truncated JPEG": encode(noise(64, 64), "JPEG")[:500],
    "a truncated WebP": encode(noise(64, 64), "WEBP")[:900],
    "a GIF without a frame": b"GIF89a\x10\0\x10\0\0\0\0;",
    "JPEG 2000 code": b"\xff\x4f\xff\x51\0\x2f" + bytes(99),
    "an FPX": b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + bytes(600),
    "an old Photoshop file": b"8BPS\0\x01" + bytes(99),
}


def picture_of(width: int, height: int, mode: str) -> bytes:
    if mode == "CMYK":
        return encode(noise(width, height, mode), "TIFF")
    if mode == "I;16":
        return encode(noise(width, height, "L").convert("I;16"), "PNG")
    return encode(noise(width, height, mode, seed=width * 31 + height), "PNG")


def large_picture(mode: str) -> bytes:
    blocks = noise(16, 16).convert("L" if mode == "I;16" else mode)
    picture = blocks.resize((4096, 4096), Image.Resampling.NEAREST)
    if mode == "I;16":
        picture = picture.convert(mode)
    return bombs.saved(picture, "JPEG" if mode == "CMYK" else "PNG")


def small_pictures(mode: str) -> list[Part]:
    sizes = list(product(SIDES[:5], SIDES[5:])) + [(side, side) for side in SIDES]
    return [file(picture_of(width, height, mode)) for width, height in sizes]


def row(name: str, make: Callable[[], bytes], *codes: str, budget: int = 0) -> Attack:
    budget_bytes = budget or DEFAULT_BUDGET_BYTES
    return attack(name, lambda _: file(make()), *codes, budget_bytes=budget_bytes)


def small_row(mode: str) -> Attack:
    return attack(f"tiny pictures in mode {mode}", lambda _: small_pictures(mode), ANSWERED)


def exif_row(name: str, exif: bytes) -> Attack:
    return row(f"Exif: {name}", partial(bombs.jpeg_with_exif, noise(30, 20), exif), ANSWERED)


def exotic_row(kind: str) -> Attack:
    picture = noise(64, 64, "1" if kind == "MSP" else "RGB")
    return row(f"format {kind}", partial(bombs.saved, picture, kind), INVALID_MEDIA)


def junk_row(name: str, data: bytes) -> Attack:
    codes = (INVALID_MEDIA,) if data else ("invalid_media_url", "invalid_request")
    return row(f"no picture: {name}", lambda: data, *codes)


def many_bombs(_: Site) -> list[Part]:
    return [file(bombs.solid_webp(8190, 4000 + index)) for index in range(20)]


ROWS = [
    *(small_row(mode) for mode in MODES),
    *(exif_row(name, exif) for name, exif in EXIFS.items()),
    *(exotic_row(kind) for kind in EXOTIC),
    *(junk_row(name, data) for name, data in JUNK.items()),
    row("a WebP of 164 MP in 44 bytes", partial(bombs.solid_webp, 16383, 10000), TOO_LARGE),
    row("a 1-bit PNG of 144 MP", partial(bombs.bilevel_png, 12000), TOO_LARGE),
    row("a header of 2^31 x 2^31", partial(png_header, 2**31 - 1, 2**31 - 1), TOO_LARGE),
    row("a side of 40000", partial(png_header, 40000, 1), TOO_LARGE),
    row("no side at all", partial(png_header, 0, 0), INVALID_MEDIA),
    row("1 x 10000", lambda: encode(Image.new("L", (1, 10000)), "PNG"), INVALID_MEDIA),
    row("a text of 200 MB in a PNG", partial(bombs.png_with_text_bomb, 200 * MIB), INVALID_MEDIA),
]
SLOW_ROWS = [
    row("a JPEG of 81 MP", partial(bombs.large_jpeg, 9000), TOO_LARGE),
    row("a WebP of 32.8 MP", partial(bombs.solid_webp, 8190, 4000), ANSWERED, budget=LARGEST),
    row("a 1-bit PNG of 32.5 MP", partial(bombs.bilevel_png, 5700), ANSWERED, budget=LARGEST),
    row("a JPEG of 32.5 MP", partial(bombs.large_jpeg, 5700), ANSWERED, budget=LARGEST),
    attack("20 WebP of 33 MP each", many_bombs, ANSWERED, budget_bytes=MANY),
    *(
        row(f"4096 x 4096 in mode {mode}", partial(large_picture, mode), ANSWERED, budget=LARGE)
        for mode in MODES
    ),
]
