"""The Hugging Face folder that an export reads: where it comes from, whether it can be exported. No PyTorch here."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from aisp_local.errors import AispError, RewardError

ENCODERS = ("Bert", "Roberta", "DebertaV2", "ModernBert")
DECODERS = ("Llama", "Qwen2", "Qwen3", "Gemma2", "Mistral")
SUFFIX = "ForSequenceClassification"
# What a download takes: never code, never pickled weights.
_WANTED = ["*.json", "*.safetensors", "*.jinja", "*.txt", "*.model", "README.md"]
_PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.h5", "*.msgpack")


@dataclass(frozen=True)
class Source:
    """A folder that passed the checks."""

    folder: Path
    family: str  # of ENCODERS or DECODERS
    config: dict[str, Any]  # config.json as it stands
    name: str
    licence: str

    @property
    def decoder(self) -> bool:
        """Whether the score is read at the last token."""
        return self.family in DECODERS

    @property
    def architecture(self) -> str:
        """The class of transformers."""
        return self.family + SUFFIX


def find(source: str, say: Callable[[str], None]) -> Source:
    """The source as a checked folder; a name that is no folder here is downloaded from the hub, which ``say`` tells.

    Raises RewardError, or AispError when the hub cannot be reached.
    """
    folder = Path(source)
    if folder.is_dir():
        return check(folder, folder.resolve().name)
    if folder.exists():
        raise RewardError(f"{source} is a file; give the Hugging Face folder that holds config.json")
    if not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", source):
        raise RewardError(f"{source} does not exist; give a Hugging Face folder or a name on the hub (owner/name)")
    need()
    say(f"{source} is no folder here; downloading it from the Hugging Face hub")
    return check(_download(source), source.split("/")[1])


def check(folder: Path, name: str) -> Source:
    """A local folder, if its model is one that can be exported. Raises RewardError."""
    path = folder / "config.json"
    if not path.is_file():
        if (folder / "adapter_config.json").is_file():
            raise RewardError(
                f"{folder} holds an adapter without its model; merge them first "
                "(model.merge_and_unload().save_pretrained(...) in peft)"
            )
        raise RewardError(f"{folder} holds no config.json; give a folder as save_pretrained of transformers writes it")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise RewardError(f"{path} is not valid JSON ({error}); repair it") from error
    if not isinstance(config, dict):
        raise RewardError(f"{path} must be an object; restore it")
    if config.get("quantization_config"):
        raise RewardError(f"{folder} holds quantised weights; give the original model and use --precision")
    found = config.get("architectures")
    architecture = str(found[0]) if isinstance(found, list) and found else "none"
    family = architecture.removesuffix(SUFFIX)
    if family == architecture or family not in ENCODERS + DECODERS:
        known = ", ".join(ENCODERS + DECODERS)
        code = "; code that comes with a model is never run" if "auto_map" in config else ""
        raise RewardError(
            f"{path}: the architecture {architecture} cannot be exported; one of {known}, each {SUFFIX}, can{code}"
        )
    if not any(folder.glob("*.safetensors")):
        pickled = sorted(file.name for pattern in _PICKLED for file in folder.glob(pattern))
        if pickled:
            raise RewardError(
                f"{folder} has its weights in {pickled[0]} only, a format that can run code when it is read; convert "
                "it where you trust it (from_pretrained, then save_pretrained, of transformers writes safetensors)"
            )
        raise RewardError(f"{folder} holds no weights (*.safetensors); restore the folder")
    return Source(folder, family, config, name, licence_of(folder))


def licence_of(folder: Path) -> str:
    """What the model card's front matter says, else "unknown"."""
    try:
        text = (folder / "README.md").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return "unknown"
    card = re.match(r"---\s*\n(.*?)\n---", text, re.DOTALL)
    said = re.search(r"^license:[ \t]*[\"']?([^\s\"'\[\]]+)", card[1], re.MULTILINE) if card else None
    return said[1] if said else "unknown"


def need() -> None:
    """Raises AispError when a library that only exporting needs is not installed."""
    lacking = [name for name in ("torch", "transformers", "onnxscript", "safetensors") if find_spec(name) is None]
    if lacking:
        raise AispError(
            f"exporting a reward needs {', '.join(lacking)}; install what it needs with: "
            "pip install 'aisp-local[export]'"
        )


def _download(name: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=_WANTED))
    except Exception as error:  # its own kinds, httpx's and the system's
        reason = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
        raise AispError(
            f"{name} cannot be downloaded from the Hugging Face hub ({reason}); check the name and the connection, "
            "or give a folder"
        ) from error
