"""Dispatch ``chiasm COMMAND``; each command imports what it needs and nothing before."""

from __future__ import annotations

from pathlib import Path

import typer

from chiasm import __version__
from chiasm.cli.media import media_app
from chiasm.cli.thread_env import set_thread_defaults
from chiasm.common.launch import launch

_FLAGS_GO_THROUGH = {
    "allow_extra_args": True,
    "ignore_unknown_options": True,
    "help_option_names": [],
}

app = typer.Typer(
    name="chiasm",
    help="Serve vision, video and audio language models.",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.add_typer(media_app)


@app.command(context_settings=_FLAGS_GO_THROUGH)
def up(context: typer.Context) -> None:
    """Start the whole stack for MODEL on this machine and keep it running."""
    from chiasm.cli.up import run_up  # noqa: PLC0415 - other commands start faster without

    raise typer.Exit(run_up(context.args))


@app.command(context_settings=_FLAGS_GO_THROUGH)
def gateway(context: typer.Context) -> None:
    """Start one gateway: REST and gRPC for clients."""
    _run_service("gateway", context.args)


@app.command(context_settings=_FLAGS_GO_THROUGH)
def encoder(context: typer.Context) -> None:
    """Start one encoder: media in, embeddings out."""
    _run_service("encoder", context.args)


@app.command(context_settings=_FLAGS_GO_THROUGH)
def generator(context: typer.Context) -> None:
    """Start one generator: tokens and embeddings in, tokens out."""
    _run_service("generator", context.args)


@app.command()
def probe(
    target: str = typer.Argument(help="grpc://HOST:PORT[/SERVICE], http://HOST:PORT/PATH"),
    timeout_s: float = typer.Option(5.0, "--timeout-s", help="Seconds to wait for the answer."),
) -> None:
    """Ask a service whether it is healthy; status 0 if it is, 1 if not."""
    from chiasm.cli.probe import run_probe  # noqa: PLC0415 - other commands start faster without

    problem = run_probe(target, timeout_s)
    if problem:
        typer.echo(problem, err=True)
    raise typer.Exit(1 if problem else 0)


@app.command(context_settings=_FLAGS_GO_THROUGH)
def bench(context: typer.Context) -> None:
    """Measure OpenAI-compatible servers side by side, in interleaved rounds."""
    from chiasm.cli.bench_command import run_bench  # noqa: PLC0415 - as above

    typer.echo(run_bench(context.args))


@app.command(name="config-docs")
def config_docs(
    form: str = typer.Argument(help="markdown, or toml for an example file."),
) -> None:
    """Write the documentation of all settings."""
    from chiasm.cli.config_docs import example_toml, markdown  # noqa: PLC0415 - as above

    forms = {"markdown": markdown, "toml": example_toml}
    if form not in forms:
        raise typer.BadParameter("must be markdown or toml")
    typer.echo(forms[form](), nl=False)


@app.command()
def init(
    state_dir: str = typer.Argument(help="Directory that the services share."),
) -> None:
    """Make the service token and the store secret in STATE_DIR, unless they are there."""
    from chiasm.cli.stack_files import StackFiles  # noqa: PLC0415 - as above

    typer.echo(f"service token and store secret in {StackFiles(Path(state_dir)).make_secrets()}")


@app.command()
def version() -> None:
    """Show the version."""
    typer.echo(__version__)


def main() -> None:
    """Run the command line."""
    app()


def _run_service(name: str, argv: list[str]) -> None:
    set_thread_defaults()
    launch(f"chiasm.{name}.service", argv)


if __name__ == "__main__":
    main()
