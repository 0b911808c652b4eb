"""`aisp-local models`: language models on this machine, and how they get there."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from aisp_local.cli.help import Group
from aisp_local.cli.live import StatusLine
from aisp_local.cli.names import complete_model
from aisp_local.cli.output import duration, one_line, print_answer, print_json, size_text
from aisp_local.errors import AispError, InputError, ModelError

if TYPE_CHECKING:
    from aisp_local.models import Found
    from aisp_local.models.describe import Described


@click.group(cls=Group)
def models() -> None:
    """Pull, list, describe and delete language models (GGUF). Their names work wherever a model's path does.

    \b
    Examples:
      aisp-local models pull bartowski/Llama-3.2-1B-Instruct-GGUF:Q4_K_M
      aisp-local models list
      aisp-local chat -m bartowski/Llama-3.2-1B-Instruct-GGUF
    """


@models.command()
@click.argument("repository", metavar="REPOSITORY[:TAG]")
@click.option("--file", "pattern", help="Pattern of the file's name instead of a tag, such as '*Q4_K_M.gguf'.")
@click.option("--revision", default="main", help="Branch, tag or commit of the repository.")
def pull(repository: str, pattern: str | None, revision: str) -> None:
    """Download a GGUF model from the Hugging Face hub, all of its parts if it is split, and check its hash.

    TAG is a quantisation, or any part of the file's name; without one the only model of the repository is taken, else
    Q4_K_M. What was interrupted goes on where it was. HF_TOKEN is for repositories that ask for one, HF_ENDPOINT for
    another hub; models lie in the folder that AISP_MODELS names (default ~/.local/share/aisp-local/models).

    \b
    Examples:
      aisp-local models pull bartowski/Llama-3.2-1B-Instruct-GGUF
      aisp-local models pull hf.co/Qwen/Qwen2.5-0.5B-Instruct-GGUF:Q8_0
      aisp-local models pull TheBloke/Mistral-7B-GGUF --file '*Q5_K_M.gguf' --revision v1
    """
    from aisp_local.models.hub import Hub, choose, parse

    name, tag = parse(repository)
    if tag and pattern:
        raise InputError("both a tag and --file were given; give one of them")
    line = TransferLine()
    try:
        hub = Hub()
        hub.notice = line.notice
        listing = hub.list_files(name, revision)
        files = choose(listing, tag, pattern or "")
        total = sum(listing.files[file].size for file in files)
        click.echo(f"{name} at {listing.commit[:12]}: {', '.join(files)} ({size_text(total)})", err=True)
        pulled = hub.pull(listing, files, line)
    except KeyboardInterrupt:
        line.clear()
        click.echo("the same command goes on from here", err=True)
        raise
    finally:
        line.clear()
    print_answer(pulled.name)


@models.command("list")
@click.option("--json", "json_", is_flag=True, help="Print a JSON list.")
def list_(json_: bool) -> None:
    """List models: pulled ones, and those that LM Studio, Ollama, llama.cpp and Hugging Face keep on this machine.

    \b
    Examples:
      aisp-local models list
      aisp-local models list --json
    """
    from aisp_local.models import all_models, store
    from aisp_local.models.describe import files_of
    from aisp_local.native import read_header

    rows: list[dict[str, Any]] = []
    for model in all_models():
        row: dict[str, Any] = {"name": model.name, "source": model.source, "path": str(model.path), "error": None}
        try:
            header = read_header(model.path)
            row["bytes"] = sum(file.stat().st_size for file in files_of(model.path))
            row |= {"architecture": header.architecture, "quantisation": header.quantisation or None}
        except (AispError, OSError) as error:
            row["error"] = str(error)
            header = None
        if header is None or header.kind == "model":  # no projector, no adapter
            rows.append(row)
    begun = {name: sum(path.stat().st_size for path in paths) for name, paths in store.unfinished().items()}
    if json_:
        print_json(rows)
        return
    if not rows:
        print_answer(f"no models in {store.folder()}; get one with: aisp-local models pull OWNER/NAME")
    width = max((len(row["name"]) for row in rows), default=0)
    for row in rows:
        about = f"broken: {row['error']}"
        if row["error"] is None:
            about = f"{size_text(row['bytes']):>9}  {row['quantisation'] or '?':8}  {row['architecture']:10}"
        print_answer(one_line(f"{row['name']:{width}}  {about}  {row['source']}"))
    for name, size in begun.items():
        print_answer(f"{name}: {size_text(size)} of a download that was broken off; pull it again, or rm it")


@models.command()
@click.argument("name", shell_complete=complete_model)
@click.option("--json", "json_", is_flag=True, help="Print a JSON object.")
def show(name: str, json_: bool) -> None:
    """Say what a model is, and whether it can be aligned; NAME is a name of `models list` or a file.

    \b
    Examples:
      aisp-local models show bartowski/Llama-3.2-1B-Instruct-GGUF
      aisp-local models show model.gguf --json
    """
    from aisp_local.models import Found, all_models, find_model
    from aisp_local.models.describe import describe, sha256

    path = find_model(name)
    found = next((model for model in all_models() if model.path == path), Found(name, path, "file"))
    about = describe(path)
    if sys.stderr.isatty() and not found.sha256 and about.size > 1e9:
        click.echo("reading the file for its hash", err=True)
    digest = sha256(found)
    if json_:
        print_json(_as_json(found, about, digest))
    else:
        print_answer("\n".join(one_line(line) for line in _lines(found, about, digest)))


def _as_json(found: Found, about: Described, digest: str) -> dict[str, Any]:
    return {
        "name": found.name,
        "source": found.source,
        "files": [str(file) for file in about.files],
        "bytes": about.size,
        "sha256": digest,
        "title": about.title or None,
        "architecture": about.architecture,
        "quantisation": about.quantisation or None,
        "parameters": about.parameters,
        "context": about.context,
        "vocabulary": about.vocabulary,
        "width": about.width,
        "chat_template": about.chat_template,
        "kv_bytes_per_token": about.kv_bytes_per_token,
        "can_be_aligned": not about.refused,
        "refused": about.refused or None,
    }


def _lines(found: Found, about: Described, digest: str) -> list[str]:
    """What a person reads."""
    rows = [("name", found.name), ("source", found.source), ("file", str(about.files[0]))]
    rows += [("", str(file)) for file in about.files[1:]]
    rows += [("size", size_text(about.size)), ("sha256", digest)]
    if about.title:
        rows.append(("title", about.title))
    rows.append(("architecture", about.architecture or "not said"))
    rows.append(("quantisation", about.quantisation or "not said"))
    if not about.refused:
        kv, context = about.kv_bytes_per_token or 0, about.context or 0
        rows += [
            ("parameters", f"{(about.parameters or 0) / 1e6:.4g} million"),
            ("context", f"{context} tokens"),
            ("vocabulary", f"{about.vocabulary} tokens"),
            (
                "chat template",
                "yes" if about.chat_template else "no: generate --raw goes on with text, chat cannot",
            ),
            ("KV cache", f"{kv} bytes a token, {size_text(32 * 256 * kv)} for 32 rollouts of 256 tokens"),
        ]
    rows.append(("can be aligned", f"no: {about.refused}" if about.refused else "yes"))
    return [f"{label:15}{text}" for label, text in rows]


@models.command()
@click.argument("name", shell_complete=complete_model)
@click.option("--yes", is_flag=True, help="Do not ask.")
def rm(name: str, yes: bool) -> None:
    """Delete a model that `models pull` downloaded; those of other programs are theirs to delete.

    \b
    Examples:
      aisp-local models rm bartowski/Llama-3.2-1B-Instruct-GGUF:Q4_K_M
    """
    from aisp_local.models import find_model, store
    from aisp_local.models.names import plain

    parts = store.unfinished().get(plain(name).partition(":")[0], [])
    try:
        path = find_model(name)
    except ModelError:
        if not parts:
            raise
        _delete(f"what was begun of {plain(name)}", parts, yes)
        return
    pulled = next((one for one in store.all_pulled() if one.paths()[0] == path), None)
    if pulled is None:
        raise InputError(f"{path} was not pulled by aisp-local and is not deleted; use the program that put it there")
    _delete(pulled.name, [*pulled.paths(), pulled.record], yes)


def _delete(what: str, paths: list[Path], yes: bool) -> None:
    from aisp_local.models import store

    size = size_text(sum(path.stat().st_size for path in paths))
    if yes or click.confirm(f"Delete {what} ({size})?", err=True):
        store.remove(paths)
        print_answer(f"{what} is deleted, {size} are free")
    else:
        click.echo("nothing was deleted", err=True)
        sys.exit(1)


class TransferLine(StatusLine):
    """Of a download."""

    def __init__(self) -> None:
        super().__init__()
        self._name = ""
        self._began, self._from = 0.0, 0

    def __call__(self, name: str, done: int, total: int) -> None:
        now = time.monotonic()
        if name != self._name:
            self._name, self._began, self._from = name, now, done
        if done == total:
            self._shown = 0.0
        if not self._due():
            return
        line = f"{Path(name).name}  {size_text(done)} of {size_text(total)}"
        if done == total:
            line += "  checking its hash"
        elif now - self._began > 0.5 and done > self._from:
            rate = (done - self._from) / (now - self._began)
            line += f"  {size_text(int(rate))}/s  {duration((total - done) / rate)} left"
        self._show(line, "(Ctrl-C: goes on from here later)")

    def notice(self, text: str) -> None:
        """A sentence on a line of its own."""
        self.clear()
        click.echo(f"aisp-local: {text}", err=True)
