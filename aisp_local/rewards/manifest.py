"""reward.json: what a reward folder holds and how its model is fed. Format 1, see docs/rewards.md."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Literal, cast

from aisp_local.errors import RewardError
from aisp_local.rewards.section import Section
from aisp_local.types import Prompt

MANIFEST = "reward.json"
_MAX_BYTES = 1 << 20
# "pooling" informs people: the graph holds it.
_KEYS = ["format", "name", "description", "model", "tokenizer", "input", "graph", "pooling", "licence", "files"]
_KEYS += ["golden", "tolerance", "prefix", "parity"]

Kind = Literal["pair", "text", "chat"]
Truncation = Literal["prompt-left", "left", "right"]


@dataclass(frozen=True)
class Golden:
    """A response with the score that the model must give it."""

    prompt: Prompt
    response: str
    score: float


@dataclass(frozen=True)
class Parity:
    """How close the ONNX file is to the model that it was exported from, on ``pairs`` texts."""

    precision: str
    pairs: int
    max_abs: float  # of the differences between scores
    mean_abs: float
    spread: float  # standard deviation of the model's own scores
    kendall_tau: float
    agreement: float  # share of pairs of texts in the same order


@dataclass(frozen=True)
class Manifest:
    """The parsed reward.json. ``score = sign * scale * output[:, index]``."""

    name: str
    description: str
    model: str
    tokenizer: str
    kind: Kind
    template: str | None
    max_length: int  # tokens, special ones included
    truncation: Truncation
    adds_special: bool  # the tokenizer's special tokens; off when a chat template holds them
    inputs: Mapping[str, str]  # role -> input name in the ONNX file
    output: str
    index: int
    sign: int
    scale: float
    licence: str
    files: Mapping[str, str]  # name -> sha256
    golden: tuple[Golden, ...]
    tolerance: float
    prefix: bool = False  # it was trained to score unfinished responses too
    parity: Parity | None = None


def inside(folder: Path, name: str) -> Path:
    """The path of a file of the folder. Raises RewardError if the name leads out of it."""
    pure = PurePosixPath(name)
    path = folder / name
    if pure.is_absolute() or Path(name).is_absolute() or ".." in pure.parts or "\\" in name:
        raise RewardError(f"{folder}: the path {name!r} leaves the reward folder; put the file inside it")
    try:
        resolved = path.resolve()
    except ValueError as error:  # a NUL, a lone surrogate
        raise RewardError(f"{folder}: {name!r} is no name that a file can have; restore the manifest") from error
    except (OSError, RuntimeError) as error:  # links in a circle
        raise RewardError(f"{folder}: {name!r} cannot be followed to a file; restore the folder") from error
    if not resolved.is_relative_to(folder.resolve()):
        raise RewardError(f"{folder}: {name!r} links out of the reward folder; put the file inside it")
    return path


def read_manifest(folder: Path) -> Manifest:
    """Parse and check reward.json. Raises RewardError."""
    if not folder.exists():
        raise RewardError(f"reward folder {folder} does not exist; check the path given with -r")
    if not folder.is_dir():
        raise RewardError(f"{folder} is a file; give the folder that holds {MANIFEST}, or a TOML file")
    path = folder / MANIFEST
    if not path.is_file():
        raise RewardError(f"{folder} holds no {MANIFEST}; it is not a reward folder")
    if path.stat().st_size > _MAX_BYTES:
        raise RewardError(f"{path} is larger than 1 MiB; it is not a manifest")
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError, RecursionError) as error:
        raise RewardError(f"{path} is not valid JSON ({error}); repair it") from error
    top = Section(data, str(path))
    if top.get("format", int) != 1:
        raise RewardError(f"{path}: format {data['format']!r} is not known; this version reads format 1")
    top.only(*_KEYS)
    feed = Section(top.get("input", dict), f"{path}: input")
    feed.only("kind", "template", "max_length", "truncation", "bos")
    graph = Section(top.get("graph", dict), f"{path}: graph")
    graph.only("inputs", "output", "index", "sign", "scale")
    kind = cast(Kind, feed.choice("kind", ("pair", "text", "chat")))
    template = feed.data.get("template")
    if kind == "chat" and not isinstance(template, str):
        raise RewardError(f"{path}: input of kind 'chat' needs a 'template'")
    max_length = feed.get("max_length", int)
    if not 8 <= max_length <= 1 << 17:
        raise RewardError(f"{path}: max_length {max_length} is not between 8 and 131072")
    inputs = graph.get("inputs", dict)
    for role in ("input_ids", "attention_mask"):
        if not isinstance(inputs.get(role), str):
            raise RewardError(f"{path}: graph: 'inputs' lacks {role!r}")
    sign = graph.get("sign", int, 1)
    if sign not in (-1, 1):
        raise RewardError(f"{path}: graph: 'sign' is {sign}; use 1 or -1")
    files = top.get("files", dict)
    model, tokenizer = top.get("model", str), top.get("tokenizer", str)
    for name in (model, tokenizer):
        if name not in files:
            raise RewardError(f"{path}: 'files' has no sha256 of {name!r}; add it")
    golden = []
    for entry in top.get("golden", list, []):
        row = Section(entry, f"{path}: golden")
        row.only("prompt", "response", "score")
        prompt = row.get("prompt", (str, list))
        for i, message in enumerate(prompt if isinstance(prompt, list) else []):
            turn = Section(message, f"{path}: golden: message {i + 1}")
            turn.only("role", "content")
            turn.get("role", str), turn.get("content", str)
        golden.append(
            Golden(
                prompt,
                row.get("response", str),
                row.number("score"),
            )
        )
    scale = graph.number("scale", 1.0)
    tolerance = top.number("tolerance", 0.01)
    if not (math.isfinite(scale) and math.isfinite(tolerance) and tolerance >= 0):
        raise RewardError(f"{path}: 'scale' and 'tolerance' must be finite, 'tolerance' at least 0")
    return Manifest(
        name=top.get("name", str),
        description=top.get("description", str, ""),
        model=model,
        tokenizer=tokenizer,
        kind=kind,
        template=template,
        max_length=max_length,
        truncation=cast(Truncation, feed.choice("truncation", ("prompt-left", "left", "right"), "prompt-left")),
        adds_special=feed.choice("bos", ("tokenizer", "none"), "tokenizer") == "tokenizer",
        inputs=inputs,
        output=graph.get("output", str),
        index=graph.get("index", int, 0),
        sign=sign,
        scale=scale,
        licence=top.get("licence", str, "unknown"),
        files=files,
        golden=tuple(golden),
        tolerance=tolerance,
        prefix=top.get("prefix", bool, False),
        parity=None if top.data.get("parity") is None else _parity(Section(top.data["parity"], f"{path}: parity")),
    )


def _parity(section: Section) -> Parity:
    numbers = ("max_abs", "mean_abs", "spread", "kendall_tau", "agreement")
    section.only("precision", "pairs", *numbers)
    values = {key: section.number(key) for key in numbers}
    for key, value in values.items():
        if not math.isfinite(value):
            raise RewardError(f"{section.where}: {key!r} must be finite")
    return Parity(precision=section.get("precision", str), pairs=section.get("pairs", int), **values)


def check_files(folder: Path, manifest: Manifest) -> None:
    """Every listed file is there, inside the folder, with its sha256. Raises RewardError."""
    for name, expected in manifest.files.items():
        path = inside(folder, name)
        if not path.is_file():
            raise RewardError(f"{folder} lacks {name}, which its manifest lists; restore the folder")
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != expected:
            raise RewardError(
                f"{path} does not match its sha256 in {MANIFEST} (found {found[:12]}..., "
                f"expected {str(expected)[:12]}...); restore the file"
            )
