"""The models on this machine by their names: pulled ones first, then those of other programs."""

from __future__ import annotations

import difflib
import json
import os
import re
import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from aisp_local import shipped
from aisp_local.errors import InputError, ModelError
from aisp_local.models import store
from aisp_local.models.names import is_model, plain, tag_of

_OLLAMA_MODEL = "application/vnd.ollama.image.model"
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
_MAX_BYTES = 1 << 20  # of a manifest


@dataclass(frozen=True)
class Found:
    """A model: how it is called, its first file, whose it is, and its hash where that is known without reading it."""

    name: str
    path: Path
    source: str
    sha256: str = ""


def find_model(name: str | os.PathLike[str]) -> Path:
    """The GGUF file at a path; where none lies there, that of a model by its name.

    ``owner/name:TAG`` as Ollama and llama.cpp write it, ``owner/name`` where there is one of it, or a file's name.
    Raises ModelError for an unknown name, and for one that several models have.
    """
    path = Path(name).expanduser()
    if path.exists():
        return path
    models = all_models()
    found = _match(plain(os.fspath(name)).lower(), models)
    if found is not None:
        return found.path
    known = [model.name for model in models]
    near = difflib.get_close_matches(os.fspath(name), known, 3, 0.6)
    hint = f"; did you mean {' or '.join(near)}?" if near else ""
    if path.suffix.lower() == ".gguf" or path.is_absolute() or os.fspath(name).startswith((".", "~")):
        raise ModelError(f"model file {path} does not exist; check the path given with -m{hint}")
    advice = "" if near else "; aisp-local models list shows all, models pull downloads one"
    raise ModelError(f"there is no file {path} and no model of that name{hint}{advice}")


def all_models() -> list[Found]:
    """Every model that is found, pulled ones first; of those with the same file or name the first alone."""
    found: dict[str, Found] = {}
    paths = set()
    for models in (_pulled(), _lm_studio(), _ollama(), _llama_cpp(), _hugging_face(), _shipped()):
        with suppress(OSError):  # a folder that may not be read has none
            for model in models:
                real = model.path.resolve()
                if real not in paths:
                    paths.add(real)
                    found.setdefault(model.name.lower(), model)
    return list(found.values())


def _match(name: str, models: list[Found]) -> Found | None:
    by_name = {model.name.lower(): model for model in models}
    for exact in (name, f"{name}:latest"):
        if exact in by_name:
            return by_name[exact]
    for source in dict.fromkeys(model.source for model in models):
        same = [m for m in models if m.source == source and m.name.lower().rpartition(":")[0] == name]
        same = same or [m for m in models if m.source == source and name in (m.path.name.lower(), m.path.stem.lower())]
        if len(same) > 1:
            raise ModelError(f"several models are called {name}; say which: {', '.join(m.name for m in same)}")
        if same:
            return same[0]
    return None


def _pulled() -> Iterator[Found]:
    for pulled in store.all_pulled():
        digest = pulled.files[pulled.first].removeprefix("sha256:") if len(pulled.files) == 1 else ""
        yield Found(pulled.name, pulled.paths()[0], "pulled", "" if ":" in digest else digest)


def _lm_studio() -> Iterator[Found]:
    for root in (Path.home() / ".lmstudio" / "models", Path.home() / ".cache" / "lm-studio" / "models"):
        for path in sorted(root.glob("*/*/*.gguf")):
            if is_model(path.name):
                yield Found(f"{path.parts[-3]}/{path.parts[-2]}:{tag_of(path.name)}", path, "LM Studio")


def _ollama() -> Iterator[Found]:
    own = os.environ.get("OLLAMA_MODELS")
    service = Path("/usr/share/ollama/.ollama/models")  # of Linux' system service
    for root in [Path(own)] if own else [Path.home() / ".ollama" / "models", service]:
        with suppress(OSError):
            for manifest in sorted(root.glob("manifests/*/*/*/*")):
                digest = _ollama_digest(manifest)
                blob = root / "blobs" / digest.replace(":", "-")
                if digest and blob.is_file():
                    host, owner, model, tag = manifest.parts[-4:]
                    begin = "" if host == "registry.ollama.ai" else f"{host}/"
                    begin = plain(begin) if owner == "library" and not begin else plain(f"{begin}{owner}/")
                    yield Found(f"{begin}{model}:{tag}", blob, "Ollama", digest.removeprefix("sha256:"))


def _ollama_digest(manifest: Path) -> str:
    """Of the weights; empty where the manifest names none."""
    try:
        if not manifest.is_file() or manifest.stat().st_size > _MAX_BYTES:
            return ""
        layers = json.loads(manifest.read_text(encoding="utf-8"))["layers"]
        digests = [str(layer["digest"]) for layer in layers if layer["mediaType"] == _OLLAMA_MODEL]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return ""
    return digests[0] if digests and _DIGEST.fullmatch(digests[0]) else ""


def _shipped() -> Iterator[Found]:
    with suppress(InputError):  # an installation without models
        for path in (shipped.model(), shipped.talker()):
            yield Found(path.stem, path, "shipped")


def _cache() -> Path:
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")


def _llama_cpp() -> Iterator[Found]:
    for path in sorted(Path(os.environ.get("LLAMA_CACHE") or _cache() / "llama.cpp").glob("*.gguf")):
        if is_model(path.name):
            yield Found(path.stem, path, "llama.cpp")


def hugging_face_home() -> Path:
    """Where Hugging Face's libraries keep a user's token and files."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(os.environ.get("HF_HOME") or cache / "huggingface")


def _hugging_face() -> Iterator[Found]:
    root = Path(os.environ.get("HF_HUB_CACHE") or hugging_face_home() / "hub")
    for repository in sorted(root.glob("models--*--*")):
        name = repository.name.removeprefix("models--").replace("--", "/")
        snapshots = sorted(repository.glob("snapshots/*"), key=lambda path: path.stat().st_mtime, reverse=True)
        for snapshot in snapshots:  # the newest first
            for path in sorted(snapshot.rglob("*.gguf")):
                if is_model(path.name) and path.exists():
                    digest = path.resolve().name
                    known = digest if re.fullmatch("[0-9a-f]{64}", digest) else ""
                    yield Found(f"{name}:{tag_of(path.name)}", path, "Hugging Face", known)
