"""`aisp-local serve`: an OpenAI-compatible server of aligned answers."""

from __future__ import annotations

import errno
import ipaddress
import re
import socket
from importlib.util import find_spec
from pathlib import Path

import click

from aisp_local.cli.help import ExamplesFirst
from aisp_local.cli.options import load, model_options
from aisp_local.defaults import DEFAULT_MAX_TOKENS, DEFAULT_TOGETHER
from aisp_local.errors import InputError


@click.command(cls=ExamplesFirst)
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option("--port", type=click.IntRange(0, 65535), default=8080, show_default=True, help="0: any free one.")
@click.option("--api-key", envvar="AISP_API_KEY", show_default=False, help="What clients must send as their API key.")
@click.option("--allow-host", "hosts", multiple=True, metavar="NAME", help="A name that clients call this server by.")
@click.option("--allow-origin", "origins", multiple=True, metavar="URL", help="A web page that may call this server.")
@click.option(
    "--parallel",
    type=click.IntRange(1, 64),
    default=DEFAULT_TOGETHER,
    show_default=True,
    help="Requests that are searched for at once, in one batch.",
)
@click.option("--waiting", type=click.IntRange(1), default=64, show_default=True, help="Requests that may wait.")
@click.option("--max-tokens", type=click.IntRange(1), default=DEFAULT_MAX_TOKENS, show_default=True)
@click.option("--max-rollouts", type=click.IntRange(1), default=512, show_default=True, help="Of one request.")
@model_options
def serve(
    host: str,
    port: int,
    api_key: str | None,
    hosts: tuple[str, ...],
    origins: tuple[str, ...],
    parallel: int,
    waiting: int,
    max_tokens: int,
    max_rollouts: int,
    model: Path | None,
    lora: tuple[Path, ...],
    lora_scaled: tuple[tuple[Path, float], ...],
    reward: Path | None,
    judge: Path | None,
    n_gpu_layers: int | None,
    threads: int | None,
) -> None:
    """Serve aligned answers to clients of the OpenAI API: /v1/chat/completions, /v1/completions, /v1/models.

    Requests share one batch. What OpenAI has no field for goes under the key "aisp" (docs/server.md).
    Ctrl-C ends the searches that run with their best so far, then the server.

    \b
    Examples:
      aisp-local serve
      aisp-local serve -m model.gguf -r my_reward --port 8081 --api-key secret
      curl localhost:8080/v1/chat/completions -d '{"messages": [{"role": "user", "content": "Tell me a story."}]}'
    """
    if find_spec("starlette") is None or find_spec("uvicorn") is None:
        raise InputError("serve needs starlette and uvicorn: pip install 'aisp-local[server]'")
    if not host:  # as of a variable of the shell that is not set: it would mean every address
        raise InputError("--host is empty; give an address, such as 127.0.0.1")
    from aisp_local.server import Server, Settings, make_app

    if api_key is not None and not api_key.strip():
        raise InputError("the API key is empty; give one, or leave --api-key out")
    for origin in origins:
        if origin not in ("*", "null") and not re.fullmatch(r"https?://[^/?#@\s]+/?", origin):
            raise InputError(f"--allow-origin {origin!r} is no origin; it must look like https://example.org:3000")
    _check_free(host, port)  # before a large model is loaded

    if not _loopback(host):
        what = (
            "anybody who reaches this address can use it"
            if api_key is None
            else "answers cross the network unencrypted"
        )
        click.echo(f"aisp-local: listening on {host}, beyond this machine: {what}", err=True)
    aligner = load(model, lora, lora_scaled, reward, judge, n_gpu_layers, threads, together=parallel)
    names = (
        *Settings().hosts,
        *(name.lower() for name in hosts),
        *(() if host in ("0.0.0.0", "::") else (host.lower(),)),
    )
    settings = Settings(
        api_key=api_key,
        hosts=names,
        origins=tuple(origin.rstrip("/").lower() for origin in origins),
        parallel=parallel,
        waiting=waiting,
        max_tokens=max_tokens,
        max_rollouts=max_rollouts,
    )
    what = f"{Path(aligner.model_name).name} with {aligner.reward.name}"

    def announce(host: str, port: int) -> None:
        click.echo(f"{what} at http://{f'[{host}]' if ':' in host else host}:{port}/v1 (Ctrl-C ends it)", err=True)

    try:
        Server(make_app(aligner, settings), host=host, port=port, started_at=announce).run()
    except SystemExit as error:  # uvicorn could not listen, and has said why
        raise _taken(host, port) from error
    finally:
        aligner.close()


def _check_free(host: str, port: int) -> None:
    """Raises InputError where nothing can listen."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.create_server(address, family=family):
            pass
    except (socket.gaierror, UnicodeError) as error:
        raise InputError(f"there is no address {host!r} to listen on; choose another with --host") from error
    except OSError as error:
        if error.errno != errno.EADDRINUSE:
            raise InputError(f"cannot listen on {host} port {port}: {error.strerror}") from error
        raise _taken(host, port) from error


def _taken(host: str, port: int) -> InputError:
    return InputError(f"cannot listen on {host} port {port}; is it in use? choose another with --port")


def _loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
