"""`aisp-local doctor`: what is installed, what this machine can do, and what is wrong."""

from __future__ import annotations

import os
import platform
import shutil
import sys
import textwrap
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from aisp_local.cli import settings
from aisp_local.cli.help import ExamplesFirst
from aisp_local.cli.options import load, model_options
from aisp_local.cli.output import duration, one_line, print_answer, print_json, size_text
from aisp_local.errors import AispError

if TYPE_CHECKING:
    from aisp_local.api import Aligner
    from aisp_local.doctor import Speed
    from aisp_local.engine import LlamaEngine

T = TypeVar("T")
_WIDTH = 15  # of the labels


@click.command(cls=ExamplesFirst)
@click.option("--no-speed", is_flag=True, help="Do not measure: no model is loaded.")
@click.option("--json", "json_", is_flag=True, help="Print a JSON object.")
@model_options
@click.pass_context
def doctor(
    context: click.Context,
    no_speed: bool,
    json_: bool,
    model: Path | None,
    lora: tuple[Path, ...],
    lora_scaled: tuple[tuple[Path, float], ...],
    reward: Path | None,
    judge: Path | None,
    n_gpu_layers: int | None,
    threads: int | None,
) -> None:
    """Say what is installed and in effect, how fast a model and a reward are here, and what search that affords.

    It measures for about ten seconds, longer where the machine is busy. Exits with 1, and says what to do, if something
    is broken.

    \b
    Examples:
      aisp-local doctor
      aisp-local doctor -m model.gguf -r my_reward
      aisp-local doctor --no-speed --json
    """
    report = Report(shown=not json_)
    _installed(report)
    _machine(report)
    _settings(report, context)
    if not no_speed and not report.problems:
        arguments = (model, lora, lora_scaled, reward, judge, n_gpu_layers, threads)
        report.tried(lambda: _speed(report, load(*arguments)))
    if json_:
        print_json({**report.data, "problems": report.problems})
    for problem in report.problems or ["nothing"]:
        report.add("broken", problem)
    if report.problems:
        sys.exit(1)


class Report:
    """What was found: lines for people, shown as they come, an object for programs, and what is broken."""

    def __init__(self, shown: bool) -> None:
        self.shown = shown
        self.data: dict[str, Any] = {}
        self.problems: list[str] = []

    def add(self, label: str, text: str) -> None:
        if self.shown:
            line = one_line(f"{label:{_WIDTH}}{text}")
            if sys.stdout.isatty():
                width = shutil.get_terminal_size().columns
                line = textwrap.fill(line, width, subsequent_indent=" " * _WIDTH, break_on_hyphens=False)
            print_answer(line)

    def tried(self, find: Callable[[], T]) -> T | None:
        """What is found; what it raises is a problem."""
        try:
            return find()
        except (AispError, OSError) as error:
            self.problems.append(str(error))
            return None


def _installed(report: Report) -> None:
    import aisp_local
    from aisp_local.cli.version import patch_series
    from aisp_local.native import describe_build
    from aisp_local.rewards.runtime import describe_runtime

    report.data["version"] = aisp_local.__version__
    report.add("aisp-local", f"{aisp_local.__version__}, python {platform.python_version()} on {sys.platform}")
    build = report.tried(describe_build)
    report.data["binding"] = None if build is None else asdict(build) | {"patch_series": patch_series()}
    if build is not None:
        series = patch_series()
        kind = "patched" + (f" (this checkout's series: {series})" if series else "")
        stock = "not patched: controls go through a callback, which is slower (pip install ./patches)"
        report.add("binding", f"llama-cpp-python {build.version}, {kind if build.patched else stock}")
        if build.patched:
            report.add("", "with " + ", ".join(build.features))
        for device in build.devices:
            memory = f", {size_text(device.free)} of {size_text(device.total)} free" if device.total else ""
            report.add("device", f"{device.name} ({device.kind}): {device.description}{memory}")
        if not build.gpu:
            report.add("", "no GPU: the binding was built without one (see docs/gpu.md)")
        report.add("compiled for", build.system.replace(" = 1", "").replace(" | ", " "))
    runtime = report.tried(describe_runtime)
    report.data["onnxruntime"] = None if runtime is None else asdict(runtime)
    if runtime is not None:
        why = f": not on CUDA, since {runtime.why}" if runtime.why else ""
        report.add("onnxruntime", f"{runtime.version}, rewards run on the {runtime.used}{why}")


def _machine(report: Report) -> None:
    from aisp_local import shipped
    from aisp_local.host import available_cores, available_memory, processors
    from aisp_local.models import all_models, store

    memory, cores = available_memory(), available_cores()
    report.data["memory_available"] = memory
    report.data["cores"], report.data["processors"] = cores, len(processors())
    report.add(
        "memory", "not known" if memory is None else f"{size_text(memory)} available, within a container's limit"
    )
    report.add("threads", f"{cores}, one a core of {len(processors())} processors that may be used")
    load_ = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    report.data["load"] = load_
    if load_ > cores / 2:
        report.add(
            "", f"other programs are using them (load {load_:.1f}): all is slower, and --threads 1 may be faster"
        )
    found = all_models()
    report.data["models_folder"], report.data["models"] = str(store.folder()), [model.name for model in found]
    report.add("models", f"{len(found)} found; pulled ones lie in {store.folder()}")
    for part in (shipped.model, shipped.reward):
        report.tried(part)


def _settings(report: Report, context: click.Context) -> None:
    main = context.find_root().command
    assert isinstance(main, click.Group)
    found = report.tried(lambda: settings.read(main, context.find_root().params.get("config")))
    if found is None:
        return
    rows = [row for row in settings.effective(main, found) if row.origin]
    report.data["settings"] = {"file": str(found.path), "set": [vars(row) for row in rows]}
    keys = ", ".join(dict.fromkeys(f"{row.key} ({row.origin})" for row in rows))
    report.add("settings", f"{found.path}{'' if found.path.exists() else ' (does not exist)'}: {keys or 'nothing set'}")


def _speed(report: Report, aligner: Aligner) -> None:
    from aisp_local.doctor import measure

    shown = sys.stderr.isatty()

    def say(text: str) -> None:
        if shown:
            click.echo(f"\r\x1b[2K{text}", err=True, nl=False)

    engine: LlamaEngine = aligner.engine  # type: ignore[assignment]
    try:
        speed = measure(aligner, engine, say)
    finally:
        say("")
        aligner.close()
    report.data["speed"] = {"model": aligner.model_name, "reward": aligner.reward.name, **asdict(speed)}
    threads = engine.settings["threads"]
    on = f"{threads} thread{'s' if threads > 1 else ''}"
    report.add("speed of", f"{Path(aligner.model_name).name} with {aligner.reward.name}, on {on}")
    _add_speed(report, speed)


def _add_speed(report: Report, speed: Speed) -> None:
    from aisp_local.defaults import DEFAULT_MAX_TOKENS
    from aisp_local.native import MAX_SEQUENCES

    for n, rate in speed.tokens_per_s.items():
        report.add("", f"{rate:.4g} tokens/s with {n} rollout{'s' if n > 1 else ''} at once")
    report.add("", f"{speed.scores_per_s:.4g} rewards/s, of which a search takes {speed.n_scored} for each rollout")
    if speed.most_at_once is not None:
        why = "all that llama.cpp decodes at once" if speed.most_at_once == MAX_SEQUENCES - 1 else "by memory"
        report.add("affords", f"n = {speed.most_at_once} rollouts of {DEFAULT_MAX_TOKENS} tokens at once, {why}")
    for number, search in enumerate(speed.searches):
        label = "affords" if number == 0 and speed.most_at_once is None else ""
        cache = f"{size_text(search.cache_bytes)} of KV cache" + (
            "" if search.fits else ", which is more than there is"
        )
        report.add(
            label,
            f"effort {search.effort}: {search.rollouts} rollouts of {DEFAULT_MAX_TOKENS} tokens take about "
            f"{_rounded(search.seconds)} and {cache}",
        )


def _rounded(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds < 9.95 else duration(seconds)
