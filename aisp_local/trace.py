"""A search written down: what was asked, with what, and all that was found; see docs/traces.md."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any, NoReturn

from aisp_local.errors import InputError
from aisp_local.files import write_output
from aisp_local.finite import finite
from aisp_local.types import Result

FORMAT = "aisp-local-trace"
VERSION = 1
_LARGEST = 256 << 20  # bytes


def as_json(result: Result) -> dict[str, Any]:
    """The documented JSON form of a result."""
    return {
        "answer": result.answer,
        "reward": result.reward,
        "judge": result.judge,
        "baseline": None
        if result.baseline is None
        else {
            "text": result.baseline.text,
            "reward": result.baseline.reward,
            "parts": dict(result.baseline.parts),
            "judge": result.baseline.judge,
        },
        "method": result.method,
        "budget": result.budget,
        "status": result.status,
        "ended_at": result.ended_at,
        "iterations": [
            {
                "iteration": s.iteration,
                "n": s.n,
                "best": s.best,
                "mean": s.mean,
                "std": s.std,
                "best_so_far": s.best_so_far,
                "ess": s.ess,
                "lambda": s.lambda_,
                "control_norm": s.control_norm,
                "kl": s.kl,
                "n_tokens": s.n_tokens,
                "n_nonfinite": s.n_nonfinite,
                "n_scored": s.n_scored,
                "note": s.note,
                "seconds": s.seconds,
                "decode_seconds": s.decode_seconds,
                "reward_seconds": s.reward_seconds,
                "update_seconds": s.update_seconds,
            }
            for s in result.iterations
        ],
        "candidates": [
            {
                "text": c.text,
                "reward": c.reward,
                "iteration": c.iteration,
                "row": c.row,
                "n_tokens": c.n_tokens,
                "n_given": c.n_given,
                "finish_reason": c.finish_reason,
                "kl": c.kl,
                "parts": dict(c.parts),
                "judge": c.judge,
            }
            for c in result.candidates
        ],
        "seed": result.seed,
        "seconds": result.seconds,
        "n_tokens": result.n_tokens,
        "model": result.model,
        "reward_model": result.reward_model,
        "judge_model": result.judge_model or None,
        "calibration": None
        if result.calibration is None
        else {
            "rollouts": result.calibration.rollouts,
            "parts": {name: {"mean": mean, "std": std} for name, (mean, std) in result.calibration.moments.items()},
        },
        "versions": dict(result.versions),
    }


@dataclass(frozen=True)
class Trace:
    """A JSON object of the shipped trace.schema.json: ``prompt``, ``search``, ``model``, ``reward``, ``judge``,
    ``machine`` and ``result``."""

    content: Mapping[str, Any]

    def __getitem__(self, key: str) -> Any:
        return self.content[key]

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a JSON file, whole or not at all. Raises InputError where that cannot be."""
        text = json.dumps(self.content, ensure_ascii=False, indent=1, allow_nan=False)
        write_output(Path(path), text + "\n")

    @classmethod
    def of(cls, result: Result, about: Mapping[str, Any], *, paths: bool = True) -> Trace:
        """``about``: all of the content but the format and the result. ``paths`` false: no folder is named."""
        found = as_json(result) | ({} if paths else {"model": Path(result.model).name})
        return cls(finite({"format": FORMAT, "version": VERSION, **about, "result": found}))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Trace:
        """What ``save`` wrote. Raises InputError for anything else: what is wrong, and where."""
        content = _read(Path(path))
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            raise InputError(f"{path} is no trace of aisp-local; write one with: aisp-local generate --trace FILE")
        if content.get("version") != VERSION:
            raise InputError(
                f"{path} is a trace of version {content.get('version')!r}, and this aisp-local reads "
                f"version {VERSION}; use the aisp-local that wrote it"
            )
        for error in schema().iter_errors(content):
            where = "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in error.instance_path)
            raise InputError(f"{path} is a broken trace{_at(where)}: {_short(error.message)}; write it again")
        return cls(content)


@cache
def schema() -> Any:
    """The validator of traces."""
    import jsonschema_rs

    text = resources.files("aisp_local").joinpath("trace.schema.json").read_text(encoding="utf-8")
    return jsonschema_rs.validator_for(json.loads(text))


def _read(path: Path) -> Any:
    try:
        with path.open("rb") as file:
            data = file.read(_LARGEST + 1)
        if len(data) > _LARGEST:
            raise InputError(f"{path} is larger than {_LARGEST >> 20} MiB; it is no trace of aisp-local")
        content = json.loads(data.decode("utf-8"), parse_constant=_refuse, parse_float=_number)
        json.dumps(content, ensure_ascii=False).encode("utf-8")  # a lone surrogate is no text
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}); give a trace, a file") from error
    except (UnicodeError, RecursionError) as error:
        raise InputError(f"{path} is not valid JSON in UTF-8 ({error}); give a trace") from error
    except InputError:
        raise
    except ValueError as error:
        raise InputError(f"{path} is not valid JSON ({error}); give a trace") from error
    return content


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is no number that JSON has")


def _number(text: str) -> float:
    value = float(text)
    return value if finite(value) is not None else _refuse(text)


def _at(where: str) -> str:
    return f" at {where[1:]}" if where.startswith(".") else where


def _short(text: str) -> str:
    return text if len(text) <= 200 else text[:100] + " ... " + text[-95:]
