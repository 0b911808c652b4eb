"""A tiny but real reward folder: embeddings, self-attention over the mask, a score."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from tokenizers import Tokenizer, models, pre_tokenizers, processors

WORDS = [
    "[PAD]",
    "[CLS]",
    "[SEP]",
    "[UNK]",
    "good",
    "bad",
    "fox",
    "story",
    "the",
    "a",
    "user",
    "assistant",
    ":",
    "tell",
]
WIDTH = 8


def tokenizer() -> Tokenizer:
    made = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    made.enable_padding(length=64)  # a reward must not be confused by what the file says
    made.enable_truncation(4)
    return made


def model(*, output: str = "score") -> onnx.ModelProto:
    """Scores [n]: attention over the masked tokens, mean over them, a linear head."""
    rng = np.random.default_rng(0)
    arrays = {
        "table": rng.standard_normal((len(WORDS), WIDTH)),
        "types": rng.standard_normal((2, WIDTH)),
        "head": rng.standard_normal((WIDTH, 1)),
        "one": np.ones(1),
        "big": np.full(1, 1e4),
    }
    constants = [numpy_helper.from_array(a.astype(np.float32), n) for n, a in arrays.items()]
    constants += [numpy_helper.from_array(np.array([a]), n) for n, a in (("axis1", 1), ("axis2", 2))]
    node = helper.make_node
    nodes = [
        node("Gather", ["table", "input_ids"], ["words"]),
        node("Gather", ["types", "token_type_ids"], ["segments"]),
        node("Add", ["words", "segments"], ["x"]),
        node("Cast", ["attention_mask"], ["mask"], to=TensorProto.FLOAT),
        node("Unsqueeze", ["mask", "axis1"], ["mask_row"]),
        node("Sub", ["mask_row", "one"], ["hidden"]),
        node("Mul", ["hidden", "big"], ["bias"]),
        node("Transpose", ["x"], ["xt"], perm=[0, 2, 1]),
        node("MatMul", ["x", "xt"], ["dots"]),
        node("Add", ["dots", "bias"], ["masked"]),
        node("Softmax", ["masked"], ["attention"], axis=-1),
        node("MatMul", ["attention", "x"], ["mixed"]),
        node("Unsqueeze", ["mask", "axis2"], ["mask_column"]),
        node("Mul", ["mixed", "mask_column"], ["kept"]),
        node("ReduceSum", ["kept", "axis1"], ["sum"], keepdims=0),
        node("ReduceSum", ["mask", "axis1"], ["count"], keepdims=1),
        node("Div", ["sum", "count"], ["mean"]),
        node("MatMul", ["mean", "head"], ["column"]),
        node("Squeeze", ["column", "axis1"], [output]),
    ]
    names = ("input_ids", "attention_mask", "token_type_ids")
    graph = helper.make_graph(
        nodes,
        "reward",
        [helper.make_tensor_value_info(n, TensorProto.INT64, ["n", "L"]) for n in names],
        [helper.make_tensor_value_info(output, TensorProto.FLOAT, ["n"])],
        constants,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def write_reward(folder: Path, *, proto: onnx.ModelProto | None = None, **changes: Any) -> Path:
    """A complete reward folder. ``changes`` replace keys of the manifest; ``input_`` and ``graph_`` go inside."""
    folder.mkdir(parents=True, exist_ok=True)
    onnx.save(proto or model(), str(folder / "model.onnx"))
    tokenizer().save(str(folder / "tokenizer.json"))
    manifest: dict[str, Any] = {
        "format": 1,
        "name": "tiny",
        "model": "model.onnx",
        "tokenizer": "tokenizer.json",
        "input": {"kind": "pair", "template": None, "max_length": 32, "truncation": "prompt-left", "bos": "tokenizer"},
        "graph": {
            "inputs": {n: n for n in ("input_ids", "attention_mask", "token_type_ids")},
            "output": "score",
        },
        "files": {name: sha256(folder / name) for name in ("model.onnx", "tokenizer.json")},
        "golden": [],
        "tolerance": 0.001,
    }
    for key, value in changes.items():
        section, _, inner = key.partition("_")
        if section in ("input", "graph") and inner:
            manifest[section][inner] = value
        else:
            manifest[key] = value
    (folder / "reward.json").write_text(json.dumps(manifest))
    return folder
