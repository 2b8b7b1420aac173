"""Only regular files below the open folder are read, whatever a URL looks like."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

from chiasm.common.errors import InvalidRequestError, MediaFetchError
from chiasm.encoder.local_files import LocalFiles, is_file_url

if TYPE_CHECKING:
    from pathlib import Path

OUTSIDE = "must be a subpath of `--allowed-local-media-path`"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "media"
    folder.mkdir()
    (folder / "a.png").write_bytes(b"picture")
    (tmp_path / "secret").write_bytes(b"secret")
    (tmp_path / "media-2").mkdir()
    (tmp_path / "media-2" / "b.png").write_bytes(b"secret")
    return folder


async def read(folder: Path | None, url: str) -> bytes:
    charged: list[int] = []
    data = await LocalFiles(folder).read(url, 100, charged.append)
    assert charged == [len(data)]
    return bytes(data)


async def test_a_file_below_the_folder_is_read(folder: Path) -> None:
    assert await read(folder, f"file://{folder}/a.png") == b"picture"
    assert await read(folder, f"FILE://localhost{folder}/./x/../a.png") == b"picture"


async def test_links_within_the_folder_are_followed(folder: Path) -> None:
    (folder / "link.png").symlink_to(folder / "a.png")
    opened = folder.parent / "opened"
    opened.symlink_to(folder)

    assert await read(folder, f"file://{folder}/link.png") == b"picture"
    assert await read(opened, f"file://{opened}/a.png") == b"picture"


async def test_without_a_folder_nothing_is_read(folder: Path) -> None:
    with pytest.raises(InvalidRequestError, match="without `--allowed-local-media-path`"):
        await read(None, f"file://{folder}/a.png")


@pytest.mark.parametrize(
    "path",
    [
        *("secret", "media/../secret", "media/%2e%2e/secret", "media/link", "media/dir/secret"),
        *("media-2/b.png", "does-not-exist", "media/../../../../../../etc/passwd"),
    ],
)
async def test_a_file_outside_is_refused_whether_or_not_it_exists(folder: Path, path: str) -> None:
    (folder / "link").symlink_to(folder.parent / "secret")
    (folder / "dir").symlink_to(folder.parent)

    with pytest.raises(InvalidRequestError, match=OUTSIDE) as caught:
        await read(folder, f"file://{folder.parent}/{path}")
    assert str(folder.parent) not in caught.value.message


async def test_what_is_no_regular_file_is_not_read(folder: Path) -> None:
    os.mkfifo(folder / "pipe")
    for name in ("pipe", "", "missing", "a.png/x"):
        with pytest.raises(MediaFetchError, match="cannot be read"):
            await read(folder, f"file://{folder}/{name}")


@pytest.mark.parametrize(
    "url", ["file:", "file:a.png", "file://host/a.png", "file:///a%00b", "file://[x/a"]
)
async def test_a_malformed_url_is_refused(folder: Path, url: str) -> None:
    assert is_file_url(url)
    with pytest.raises(InvalidRequestError, match="file URL"):
        await read(folder, url)


async def test_a_folder_that_becomes_a_link_while_it_is_looked_at_leads_nowhere(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "dir").symlink_to(folder.parent)
    # As if the path had been checked before the link was there.
    monkeypatch.setattr(os.path, "realpath", str)
    with pytest.raises(InvalidRequestError, match=OUTSIDE):
        await read(folder, f"file://{folder}/dir/secret")
