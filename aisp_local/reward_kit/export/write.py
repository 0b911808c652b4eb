"""The files of an exported reward: the model with its weights inside or beside it, the tokenizer and reward.json."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from aisp_local.reward_kit.export.feed import Feed
from aisp_local.reward_kit.export.network import OUTPUT
from aisp_local.rewards.manifest import MANIFEST, Parity

MODEL, WEIGHTS, TOKENIZER = "model.onnx", "model.onnx.data", "tokenizer.json"
CONFIGS = ("config.json", "tokenizer_config.json")
# A protobuf file ends at 2 GiB; what is not weights needs a little of that.
LARGEST_FILE = 2_000_000_000


def write_model(folder: Path, model: Any, largest_file: int) -> None:
    """Write an onnx_ir model: one file, or, with more bytes of weights than that, its larger tensors in a second."""
    import onnx_ir as ir

    weights = sum(value.const_value.nbytes for value in model.graph.initializers.values() if value.const_value)
    beside = weights > largest_file
    ir.save(model, folder / MODEL, external_data=WEIGHTS if beside else None, size_threshold_bytes=1024)


def write_configs(folder: Path, *configs: dict[str, Any]) -> None:
    """Write config.json and tokenizer_config.json: with them the folder can be trained further."""
    for name, config in zip(CONFIGS, configs, strict=True):
        (folder / name).write_text(json.dumps(config, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def write_manifest(
    folder: Path,
    feed: Feed,
    *,
    name: str,
    description: str,
    licence: str,
    pooling: str,
    index: int,
    sign: int,
    golden: Sequence[tuple[str, str, float]] = (),
    tolerance: float = 0.01,
    parity: Parity | None = None,
) -> None:
    """Write reward.json for the files that lie in the folder."""
    roles = ["input_ids", "attention_mask", *(["token_type_ids"] if feed.types else [])]
    manifest: dict[str, Any] = {
        "format": 1,
        "name": name,
        "description": description,
        "model": MODEL,
        "tokenizer": TOKENIZER,
        "input": {
            "kind": feed.kind,
            "template": feed.template,
            "max_length": feed.max_length,
            "truncation": "prompt-left",
            "bos": feed.bos,
        },
        "graph": {"inputs": {role: role for role in roles}, "output": OUTPUT, "index": index, "sign": sign, "scale": 1},
        "pooling": pooling,
        "licence": licence,
        "files": {
            file: _sha256(folder / file) for file in (MODEL, WEIGHTS, TOKENIZER, *CONFIGS) if (folder / file).exists()
        },
        "golden": [{"prompt": prompt, "response": response, "score": score} for prompt, response, score in golden],
        "tolerance": tolerance,
    }
    if parity is not None:
        manifest["parity"] = asdict(parity)
    text = json.dumps(manifest, indent=1, ensure_ascii=False)
    (folder / MANIFEST).write_text(text + "\n", encoding="utf-8")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
