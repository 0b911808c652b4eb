"""Small random-weight GGUF files of several architectures, and the head that their logits come from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType as Q
from gguf import GGUFReader, GGUFWriter
from gguf.quants import dequantize, quantize

D, LAYERS, FF, HEADS, HEADS_KV, HEAD, VOCABULARY = 256, 2, 512, 8, 4, 32, 512


@dataclass(frozen=True)
class Model:
    """A recipe: architecture, how its output is stored, and what is special about it."""

    arch: str = "llama"
    tied: bool = False
    output: Q = Q.F32
    softcap: float = 0.0
    experts: int = 0
    qkv_bias: bool = False
    qk_norm: bool = False
    post_norm: bool = False


MODELS = {
    "llama-f32": Model(),
    "llama-tied-f32": Model(tied=True),
    "llama-f16": Model(output=Q.F16),
    "llama-q8_0": Model(output=Q.Q8_0),
    "llama-tied-q8_0": Model(tied=True, output=Q.Q8_0),
    "llama-q4_k": Model(output=Q.Q4_K),
    "qwen2-f32": Model("qwen2", qkv_bias=True),
    "qwen3-tied-q8_0": Model("qwen3", tied=True, output=Q.Q8_0, qk_norm=True),
    "gemma2-softcap": Model("gemma2", tied=True, softcap=3.0, post_norm=True),
    "qwen3moe-f32": Model("qwen3moe", experts=4, qk_norm=True),
}


def _q4_k(rng: np.random.Generator, rows: int, columns: int) -> np.ndarray:
    """Random but valid Q4_K blocks: d and dmin as float16, 12 bytes of scales, 128 of quants."""
    blocks = rows * columns // 256
    data = rng.integers(0, 256, (blocks, 144), dtype=np.uint8)
    halves = rng.uniform(1e-4, 3e-4, (blocks, 2)).astype(np.float16)
    data[:, :4] = halves.view(np.uint8)
    return data.reshape(rows, -1)


def write(path: Path, model: Model, *, context: int = 512, seed: int = 0) -> None:
    """Write one model. Matrices but the output are F32, so that errors come from the head."""
    rng = np.random.default_rng(seed)
    writer = GGUFWriter(path, model.arch)
    writer.add_context_length(context)
    writer.add_embedding_length(D)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(FF)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS_KV)
    writer.add_key_length(HEAD)
    writer.add_value_length(HEAD)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(HEAD)
    writer.add_vocab_size(VOCABULARY)
    writer.add_tokenizer_model("no_vocab")
    if model.softcap:
        writer.add_attn_logit_softcapping(50.0)
        writer.add_final_logit_softcapping(model.softcap)
        writer.add_sliding_window(64)
    if model.experts:
        writer.add_expert_count(model.experts)
        writer.add_expert_used_count(2)
        writer.add_expert_feed_forward_length(FF)

    def matrix(*shape: int, scale: float | None = None) -> np.ndarray:
        values = rng.standard_normal(shape) * (scale or shape[-1] ** -0.5)
        return values.astype(np.float32)

    def norm(size: int) -> np.ndarray:
        return (1 + 0.1 * rng.standard_normal(size)).astype(np.float32)

    def add_output(name: str, scale: float) -> None:
        values = matrix(VOCABULARY, D, scale=scale)
        if model.output == Q.F32:
            writer.add_tensor(name, values)
        elif model.output == Q.F16:
            writer.add_tensor(name, values.astype(np.float16))
        elif model.output == Q.Q4_K:
            writer.add_tensor(name, _q4_k(rng, VOCABULARY, D), raw_dtype=Q.Q4_K)
        else:
            writer.add_tensor(name, quantize(values, model.output), raw_dtype=model.output)

    if model.tied:
        add_output("token_embd.weight", 0.1)
    else:
        writer.add_tensor("token_embd.weight", matrix(VOCABULARY, D, scale=1.0))
        add_output("output.weight", D**-0.5)
    writer.add_tensor("output_norm.weight", norm(D))
    for layer in range(LAYERS):
        shapes: dict[str, Callable[[], np.ndarray]] = {
            "attn_norm.weight": lambda: norm(D),
            "attn_q.weight": lambda: matrix(HEADS * HEAD, D),
            "attn_k.weight": lambda: matrix(HEADS_KV * HEAD, D),
            "attn_v.weight": lambda: matrix(HEADS_KV * HEAD, D),
            "attn_output.weight": lambda: matrix(D, HEADS * HEAD),
            "ffn_norm.weight": lambda: norm(D),
        }
        if model.qkv_bias:
            shapes["attn_q.bias"] = lambda: norm(HEADS * HEAD)
            shapes["attn_k.bias"] = lambda: norm(HEADS_KV * HEAD)
            shapes["attn_v.bias"] = lambda: norm(HEADS_KV * HEAD)
        if model.qk_norm:
            shapes["attn_q_norm.weight"] = lambda: norm(HEAD)
            shapes["attn_k_norm.weight"] = lambda: norm(HEAD)
        if model.post_norm:
            shapes["post_attention_norm.weight"] = lambda: norm(D)
            shapes["post_ffw_norm.weight"] = lambda: norm(D)
        if model.experts:
            shapes["ffn_gate_inp.weight"] = lambda: matrix(model.experts, D)
            shapes["ffn_gate_exps.weight"] = lambda: matrix(model.experts, FF, D)
            shapes["ffn_up_exps.weight"] = lambda: matrix(model.experts, FF, D)
            shapes["ffn_down_exps.weight"] = lambda: matrix(model.experts, D, FF)
        else:
            shapes["ffn_gate.weight"] = lambda: matrix(FF, D)
            shapes["ffn_up.weight"] = lambda: matrix(FF, D)
            shapes["ffn_down.weight"] = lambda: matrix(D, FF)
        for name, make in shapes.items():
            writer.add_tensor(f"blk.{layer}.{name}", make())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_vocabulary_only(path: Path) -> None:
    """A GGUF file without a single tensor."""
    writer = GGUFWriter(path, "llama")
    writer.add_tokenizer_model("no_vocab")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()


def head(path: Path, model: Model) -> Callable[[np.ndarray], np.ndarray]:
    """The oracle: pre-logits [k, d] to logits [k, V] in float64, from the file alone."""
    tensors = {t.name: t for t in GGUFReader(path).tensors}
    output: Any = tensors.get("output.weight", tensors["token_embd.weight"])
    w = dequantize(output.data, output.tensor_type).astype(np.float64)

    def project(z: np.ndarray) -> np.ndarray:
        logits = z.astype(np.float64) @ w.T
        return np.tanh(logits / model.softcap) * model.softcap if model.softcap else logits

    return project
