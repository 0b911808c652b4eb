"""Where a model and its rewards came from, and what a trace says of them, of the machine and of what was asked."""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from aisp_local import host
from aisp_local.engine import Engine
from aisp_local.errors import InputError
from aisp_local.native import build
from aisp_local.rewards import Reward
from aisp_local.rewards.identity import Origin
from aisp_local.types import Result

SHIPPED = "shipped"
"""Names the shipped model in a trace, and the shipped reward wherever a reward is named."""


@dataclass(frozen=True)
class Origins:
    """``model``: an absolute path, "shipped", or None where that is not known."""

    model: str | None = None
    reward: Origin = Origin()
    judge: Origin = Origin()
    n_gpu_layers: int | None = None


def about(
    result: Result, engine: Engine, reward: Reward, judge: Reward | None, origins: Origins, *, paths: bool
) -> dict[str, Any]:
    """A trace's content but for its format and result. ``paths`` false: no folder is named. Raises InputError."""
    if not result.asked:
        raise InputError("that result does not say what was asked; a trace is made of one that an Aligner gave")
    search = {name: value for name, value in result.asked.items() if name != "prompt"}
    options = {name: _plain(name, value) for name, value in search["options"].items()}
    prompt = result.asked["prompt"]
    model = getattr(engine, "model", None)

    def said(source: str | None) -> str | None:
        return source if source is None or paths or not Path(source).is_absolute() else None

    def scorer(one: Reward, origin: Origin) -> dict[str, Any]:
        return {"name": one.name, "source": said(origin.source), "fingerprint": origin.fingerprint}

    return {
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "prompt": prompt if isinstance(prompt, str) else list(prompt),
        "search": search | {"steering": options.pop("steering", None), "options": options},
        "model": {
            "name": Path(result.model).name,
            "source": said(origins.model),
            "fingerprint": engine.fingerprint,
            "loras": [
                {"source": str(lora.path.absolute()) if paths else lora.path.name, "scale": lora.scale}
                for lora in getattr(model, "loras", ())
            ],
        },
        "reward": scorer(reward, origins.reward),
        "judge": None if judge is None else scorer(judge, origins.judge),
        "machine": machine(engine, origins) | {"versions": dict(result.versions)},
    }


def machine(engine: Engine, origins: Origins) -> dict[str, Any]:
    """What a search's numbers depend on beside its versions: the same here, the same bits."""
    settings: dict[str, Any] = getattr(engine, "settings", {})
    together: int = getattr(engine, "together", 1)
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "processor": host.processor(),
        "threads": settings.get("threads"),
        "n_gpu_layers": origins.n_gpu_layers,
        "build": build(),
    } | ({"together": together} if together > 1 else {})


def _plain(name: str, value: Any) -> Any:
    """A method's option as JSON has it; floats of 32 bits by their shortest decimals, which give the same again."""
    if isinstance(value, np.ndarray):
        return [float(str(x)) for x in value.ravel()]
    if isinstance(value, os.PathLike):
        return str(Path(value).absolute())
    if value is None or isinstance(value, str | int | float):
        return value
    raise InputError(f"the option {name!r} is an object, which no file can name; give the method a file in its place")
