"""How a GGUF file is called: ``owner/name:TAG``, as Ollama and llama.cpp write it."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import PurePath

_PART = re.compile(r"-(\d{5})-of-(\d{5})$")
_QUANTISATION = re.compile(
    r"(?:^|[-._])((?:UD-)?(?:I?Q\d\w*|TQ\d_\d|MXFP4\w*|NVFP4\w*|BF16|FP?16|FP?32))$", re.IGNORECASE
)
_HOSTS = re.compile(r"^(?:https?:/{1,2})?(?:www\.)?(?:hf\.co|huggingface\.co)/", re.IGNORECASE)


def is_model(name: str) -> bool:
    """Whether a file is a language model by its name, or the first part of one: no projector, no imatrix."""
    path = PurePath(name)
    part = _PART.search(path.stem)
    beside = path.name.lower().startswith(("mmproj", "imatrix", "."))
    return path.suffix.lower() == ".gguf" and not beside and (part is None or int(part[1]) == 1)


def tag_of(name: str) -> str:
    """The quantisation that a file's name ends with, in capitals; without one the name itself."""
    stem = _PART.sub("", PurePath(name).stem)
    found = _QUANTISATION.search(stem)
    return found[1].upper() if found else stem


def parts_of(first: str, names: Iterable[str]) -> list[str]:
    """The files of a model in their order, by its first one."""
    stem, suffix = PurePath(first).stem, PurePath(first).suffix
    part = _PART.search(stem)
    if part is None:
        return [first]
    begin = first[: -len(stem + suffix)] + _PART.sub("", stem)
    wanted = {f"{begin}-{i:05d}-of-{part[2]}{suffix}" for i in range(1, int(part[2]) + 1)}
    return sorted(wanted & set(names))


def n_parts(first: str) -> int:
    """How many files the model has that begins with this one."""
    part = _PART.search(PurePath(first).stem)
    return int(part[2]) if part else 1


def plain(name: str) -> str:
    """The name without the hub's address."""
    return _HOSTS.sub("", name.strip())
