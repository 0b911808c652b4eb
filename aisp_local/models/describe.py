"""What a model is, read without loading its weights."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from aisp_local.errors import ModelError
from aisp_local.models.find import Found
from aisp_local.models.names import parts_of
from aisp_local.native import Model, read_header


@dataclass(frozen=True)
class Described:
    """``refused``: why it cannot be aligned, empty if it can; what is asked of a loaded model is None then."""

    architecture: str
    quantisation: str  # empty if the file does not say
    files: tuple[Path, ...]
    size: int  # bytes
    title: str = ""
    refused: str = ""
    parameters: int | None = None
    context: int | None = None  # tokens that it was trained on
    vocabulary: int | None = None
    width: int | None = None  # of the pre-logits
    chat_template: bool | None = None
    kv_bytes_per_token: int | None = None


def describe(path: Path) -> Described:
    """Raises ModelError for what is no GGUF file, or a broken one."""
    header = read_header(path)
    files = files_of(path)
    known = Described(header.architecture, header.quantisation, files, sum(file.stat().st_size for file in files))
    if header.kind != "model":
        return _refused(known, f"it holds {'an' if header.kind[:1] in 'aeiou' else 'a'} {header.kind}, not a model")
    try:
        model = Model(path, described=True)
    except ModelError as error:
        return _refused(known, str(error).removeprefix(f"{path} "))
    try:
        return Described(
            known.architecture,
            known.quantisation,
            files,
            known.size,
            title=model.meta("general.name") or "",
            parameters=model.n_parameters,
            context=model.n_ctx_train,
            vocabulary=model.n_vocab,
            width=model.d,
            chat_template=model.chat_template() is not None,
            kv_bytes_per_token=model.kv_bytes_per_token,
        )
    finally:
        model.close()


def files_of(path: Path) -> tuple[Path, ...]:
    """The files of a model that are here, by its first one."""
    return tuple(path.with_name(name) for name in parts_of(path.name, [file.name for file in path.parent.iterdir()]))


def sha256(model: Found) -> str:
    """The hash of a model's first file, as far as possible without reading it."""
    if model.sha256:
        return model.sha256
    with model.path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _refused(known: Described, why: str) -> Described:
    return Described(known.architecture, known.quantisation, known.files, known.size, refused=why)
