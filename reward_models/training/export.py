"""The reward folder: model.onnx, tokenizer.json and reward.json, from the trained network.

The graph is written by hand with standard operators (opset 17), in the form that ONNX Runtime's
optimiser fuses (attention, bias + GELU, skip + layer norm). As shipped, matrices are int8 with one
scale per output channel, followed by Cast and Mul, which ONNX Runtime folds into float32 weights when
it loads the file; the embedding table stays int8 in memory and its rows are scaled after the Gather.
Activations are never quantised, so a score cannot depend on the other rows of its batch.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper
from tokenizers import Tokenizer
from torch import Tensor

from reward_models.training.encoder import MAX_LENGTH, RewardNetwork

Array = npt.NDArray[Any]
INPUTS = ("input_ids", "attention_mask", "token_type_ids")
OPSET = 17
LICENCE = "Apache-2.0 (weights); trained on data under CC-BY-4.0, CDLA-Sharing-1.0, MIT and Apache-2.0, see README.md"
DESCRIPTION = "Prefers kind, coherent children's stories that answer their prompt."


def quantise(rows: Array) -> tuple[Array, Array]:
    """int8 values and float32 scales [n, 1] of a matrix [n, m], symmetric, one scale per row."""
    scales = np.maximum(np.abs(rows).max(axis=1, keepdims=True), 1e-12) / 127.0
    return np.rint(rows / scales).astype(np.int8), scales.astype(np.float32)


class Graph:
    """Collects nodes and initialisers; every method returns the name of its result."""

    def __init__(self, quantised: bool) -> None:
        self.quantised = quantised
        self.nodes: list[onnx.NodeProto] = []
        self.initialisers: list[onnx.TensorProto] = []
        self.count = 0

    def constant(self, values: Array, name: str = "") -> str:
        if not name:
            self.count += 1
            name = f"constant_{self.count}"
        self.initialisers.append(numpy_helper.from_array(np.ascontiguousarray(values), name))
        return name

    def op(self, kind: str, *inputs: str, **attributes: Any) -> str:
        self.count += 1
        name = f"{kind}_{self.count}"
        self.nodes.append(helper.make_node(kind, inputs, [name], name=name, **attributes))
        return name

    def weights(self, values: Array, name: str) -> str:
        """A matrix [in, out] for MatMul, quantised per output channel."""
        if not self.quantised:
            return self.constant(values, name)
        stored, scales = quantise(values.T)
        whole = self.op("Cast", self.constant(stored.T, f"{name}.int8"), to=TensorProto.FLOAT)
        return self.op("Mul", whole, self.constant(scales.T, f"{name}.scale"))

    def linear(self, x: str, weight: Array, bias: Array, name: str) -> str:
        """x W^T + b with W [out, in] as PyTorch keeps it."""
        product = self.op("MatMul", x, self.weights(weight.T, f"{name}.weight"))
        return self.op("Add", self.constant(bias, f"{name}.bias"), product)

    def embedding(self, ids: str, table: Array, name: str) -> str:
        if not self.quantised:
            return self.op("Gather", self.constant(table, name), ids, axis=0)
        stored, scales = quantise(table)
        rows = self.op("Gather", self.constant(stored, f"{name}.int8"), ids, axis=0)
        scale = self.op("Gather", self.constant(scales, f"{name}.scale"), ids, axis=0)
        return self.op("Mul", self.op("Cast", rows, to=TensorProto.FLOAT), scale)

    def layer_norm(self, x: str, weight: Array, bias: Array, epsilon: float, name: str) -> str:
        scale, shift = self.constant(weight, f"{name}.weight"), self.constant(bias, f"{name}.bias")
        return self.op("LayerNormalization", x, scale, shift, axis=-1, epsilon=epsilon)

    def gelu(self, x: str) -> str:
        erf = self.op("Erf", self.op("Div", x, self.constant(np.array(2.0**0.5, np.float32))))
        product = self.op("Mul", x, self.op("Add", erf, self.constant(np.array(1.0, np.float32))))
        return self.op("Mul", product, self.constant(np.array(0.5, np.float32)))


def build_model(network: RewardNetwork, quantised: bool) -> onnx.ModelProto:
    """The network as an ONNX model: three int64 inputs [n, L], output ``score`` float32 [n]."""
    shape = network.shape
    state = {k: v.detach().float().cpu().numpy() for k, v in network.state_dict().items()}
    g = Graph(quantised)
    head = shape.width // shape.heads

    def norm(x: str, name: str) -> str:
        return g.layer_norm(x, state[f"{name}.weight"], state[f"{name}.bias"], shape.epsilon, name)

    def linear(x: str, name: str) -> str:
        return g.linear(x, state[f"{name}.weight"], state[f"{name}.bias"], name)

    split = g.constant(np.array([0, 0, shape.heads, head], np.int64))
    joined = g.constant(np.array([0, 0, shape.width], np.int64))

    def attention(x: str, bias: str, layer: str) -> str:
        parts = []
        weight = np.split(state[f"{layer}.qkv.weight"], 3)
        shift = np.split(state[f"{layer}.qkv.bias"], 3)
        for i, axes in enumerate(((0, 2, 1, 3), (0, 2, 3, 1), (0, 2, 1, 3))):  # q, k, v
            rows = g.linear(x, weight[i], shift[i], f"{layer}.{'qkv'[i]}")
            parts.append(g.op("Transpose", g.op("Reshape", rows, split), perm=axes))
        logits = g.op("MatMul", parts[0], parts[1])
        logits = g.op("Div", logits, g.constant(np.array(head**0.5, np.float32)))
        weights = g.op("Softmax", g.op("Add", logits, bias), axis=-1)
        mixed = g.op("Transpose", g.op("MatMul", weights, parts[2]), perm=(0, 2, 1, 3))
        return g.op("Reshape", mixed, joined)

    length = g.op("Gather", g.op("Shape", "input_ids"), g.constant(np.array([1], np.int64)), axis=0)
    positions = g.op(
        "Slice",
        g.constant(state["positions.weight"][: 2 * MAX_LENGTH], "positions"),
        g.constant(np.array([0], np.int64)),
        length,
        g.constant(np.array([0], np.int64)),
    )
    x = g.embedding("input_ids", state["words.weight"], "words")
    types = g.op("Gather", g.constant(state["types.weight"], "types"), "token_type_ids", axis=0)
    x = norm(g.op("Add", g.op("Add", x, types), positions), "norm")

    mask = g.op("Cast", "attention_mask", to=TensorProto.FLOAT)
    wide = g.op(
        "Cast",
        g.op("Unsqueeze", "attention_mask", g.constant(np.array([1, 2], np.int64))),
        to=TensorProto.FLOAT,
    )
    bias = g.op(
        "Mul",
        g.op("Sub", g.constant(np.array(1.0, np.float32)), wide),
        g.constant(np.array(-10000.0, np.float32)),
    )
    for i in range(shape.layers):
        layer = f"layers.{i}"
        mixed = linear(attention(x, bias, layer), f"{layer}.attention_out")
        x = norm(g.op("Add", mixed, x), f"{layer}.attention_norm")
        hidden = g.gelu(linear(x, f"{layer}.up"))
        x = norm(g.op("Add", linear(hidden, f"{layer}.down"), x), f"{layer}.norm")

    axis = g.constant(np.array([1], np.int64))
    weight = g.op("Unsqueeze", mask, g.constant(np.array([2], np.int64)))
    total = g.op("ReduceSum", g.op("Mul", x, weight), axis, keepdims=0)
    pooled = g.op("Div", total, g.op("ReduceSum", weight, axis, keepdims=0))
    score = linear(g.op("Tanh", linear(pooled, "dense")), "score")
    g.nodes.append(helper.make_node("Squeeze", [score, axis], ["score"], name="score"))

    graph = helper.make_graph(
        g.nodes,
        "reward",
        [helper.make_tensor_value_info(name, TensorProto.INT64, ["n", "L"]) for name in INPUTS],
        [helper.make_tensor_value_info("score", TensorProto.FLOAT, ["n"])],
        g.initialisers,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], producer_name="aisp-local")
    model.ir_version = 8
    onnx.checker.check_model(model)
    return model


def write_folder(
    folder: Path,
    network: RewardNetwork,
    tokenizer: Tokenizer,
    golden: Sequence[tuple[str, str]],
    *,
    quantised: bool = True,
) -> None:
    """Write model.onnx, tokenizer.json and reward.json; ``golden`` are (prompt, response)."""
    # Loading checks the golden scores, so they are filled in by scoring without them first.
    from aisp_local.rewards import OnnxReward

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "model.onnx").write_bytes(build_model(network, quantised).SerializeToString())
    tokenizer.save(str(folder / "tokenizer.json"), pretty=False)
    files = {
        name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in ("model.onnx", "tokenizer.json")
    }
    manifest: dict[str, Any] = {
        "format": 1,
        "name": folder.resolve().name,
        "description": DESCRIPTION,
        "model": "model.onnx",
        "tokenizer": "tokenizer.json",
        "input": {
            "kind": "pair",
            "template": None,
            "max_length": MAX_LENGTH,
            "truncation": "prompt-left",
            "bos": "tokenizer",
        },
        "graph": {
            "inputs": {name: name for name in INPUTS},
            "output": "score",
            "index": 0,
            "sign": 1,
            "scale": 1.0,
        },
        "pooling": "mean",
        "licence": LICENCE,
        "files": files,
        "golden": [],
        "tolerance": 0.01,
    }
    path = folder / "reward.json"
    path.write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
    reward = OnnxReward.load(folder, providers=["CPUExecutionProvider"])
    manifest["golden"] = [
        {
            "prompt": prompt,
            "response": response,
            "score": round(float(reward.score(prompt, [response])[0]), 4),
        }
        for prompt, response in golden
    ]
    path.write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")


def run_graph(model: bytes, batches: Sequence[tuple[Tensor, Tensor, Tensor]]) -> tuple[Array, float]:
    """Scores of all batches by ONNX Runtime on one core, and the seconds they took."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    feeds = [{name: part.numpy() for name, part in zip(INPUTS, batch, strict=True)} for batch in batches]
    session.run(["score"], feeds[0])  # the first run allocates
    started = time.monotonic()
    scores = [session.run(["score"], feed)[0] for feed in feeds]
    return np.concatenate(scores), time.monotonic() - started
