"""``chiasm media``: media objects of a running server, from the command line."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from collections.abc import Callable

    from chiasm.cli.media_client import MediaClient

media_app = typer.Typer(
    name="media",
    help="Keep media on a running server.",
    no_args_is_help=True,
    rich_markup_mode=None,
)

Modality = Annotated[
    str, typer.Option("--modality", help="image, video or audio; default: what the file is.")
]
Salt = Annotated[str, typer.Option("--cache-salt", help="Salt that keeps names apart.")]
Source = Annotated[str, typer.Argument(help="File, http(s) URL or data URL.")]
Uuid = Annotated[str, typer.Argument(help="Name of the media object.")]


@dataclass(frozen=True, slots=True)
class Connection:
    """Whom to talk to: URL of the server, key to show, seconds without progress to wait."""

    server: str
    api_key: str
    timeout_s: float


@media_app.callback()
def media(
    context: typer.Context,
    server: Annotated[
        str, typer.Option(envvar="CHIASM_SERVER", help="URL of the server, without /v1.")
    ] = "http://127.0.0.1:8000",
    api_key: Annotated[
        str, typer.Option(envvar="CHIASM_API_KEY", help="Key to show to the server.")
    ] = "",
    timeout_s: Annotated[
        float, typer.Option(min=0.1, help="Seconds without progress before giving up.")
    ] = 120.0,
) -> None:
    """Keep media on a running server: send once, name ever after."""
    context.obj = Connection(server, api_key, timeout_s)


@media_app.command()
def put(
    context: typer.Context,
    source: Source,
    uuid: Annotated[str, typer.Option("--uuid", help="Name; default: the server makes one.")] = "",
    ttl_s: Annotated[
        int, typer.Option("--ttl-s", help="Seconds to keep it after each use; 0: the server's own.")
    ] = 0,
    modality: Modality = "",
    cache_salt: Salt = "",
) -> None:
    """Have SOURCE encoded now and kept under a name."""
    fields = _given(uuid=uuid, ttl_s=ttl_s, modality=modality, cache_salt=cache_salt)
    _show(context, lambda client: client.put(source, fields))


@media_app.command()
def get(context: typer.Context, uuid: Uuid, modality: Modality = "", cache_salt: Salt = "") -> None:
    """Describe the media object UUID."""
    query = _given(modality=modality, cache_salt=cache_salt)
    _show(context, lambda client: client.get(uuid, query))


@media_app.command()
def ls(context: typer.Context, cache_salt: Salt = "") -> None:
    """List the media objects: seconds left, kind, tokens, bytes, name."""
    query = _given(cache_salt=cache_salt)

    def work(client: MediaClient) -> None:
        for item in client.items(query):
            typer.echo(_line(item))

    _run(context, work)


@media_app.command()
def rm(context: typer.Context, uuid: Uuid, modality: Modality = "", cache_salt: Salt = "") -> None:
    """Forget the media object UUID and its embedding."""
    query = _given(modality=modality, cache_salt=cache_salt)
    _show(context, lambda client: client.delete(uuid, query))


@media_app.command()
def forget(
    context: typer.Context,
    everything: Annotated[
        bool, typer.Option("--all", help="Say that everything is meant; needed.")
    ] = False,
) -> None:
    """Forget every media object and embedding of the key's tenant."""
    if not everything:
        raise typer.BadParameter("say that everything is meant", param_hint="--all")
    _show(context, lambda client: client.forget())


@media_app.command()
def estimate(context: typer.Context, source: Source, modality: Modality = "") -> None:
    """Tell what SOURCE would cost: tokens, pixels, weight in the queue."""
    fields = _given(modality=modality)
    _show(context, lambda client: client.estimate(source, fields))


def _given(**values: str | int) -> dict[str, str | int]:
    return {name: value for name, value in values.items() if value}


def _line(item: dict[str, Any]) -> str:
    seconds_left = max(0, int(item["expires_at"] - time.time()))
    num_bytes = "-" if item["bytes"] is None else item["bytes"]
    numbers = f"{item['tokens']:>7} {num_bytes:>10}"
    return f"{seconds_left:>8} {item['modality']:<6} {numbers} {item['uuid']}"


def _show(context: typer.Context, call: Callable[[MediaClient], dict[str, Any]]) -> None:
    _run(
        context,
        lambda client: typer.echo(json.dumps(call(client), indent=2, ensure_ascii=False)),
    )


def _run(context: typer.Context, work: Callable[[MediaClient], None]) -> None:
    """Do ``work``; end with status 1 and a sentence if it fails."""
    from chiasm.cli.media_client import (  # noqa: PLC0415 - other commands start faster without
        MediaClient,
        MediaClientError,
    )

    connection: Connection = context.obj
    try:
        work(MediaClient(connection.server, connection.api_key, connection.timeout_s))
    except MediaClientError as error:
        typer.echo(f"chiasm media: {error}", err=True)
        raise typer.Exit(1) from None
