"""Small random-weight GGUFs, deterministic by seed: every kind of output head that the native patch meets.

``vocab="none"`` writes a model that only takes token ids; ``vocab="bpe"`` adds a real byte-level tokenizer
and a chat template, so that text goes in and comes out.
"""

from __future__ import annotations

import hashlib
import tempfile
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType as Q
from gguf import GGUFWriter
from gguf.quants import quantize

Tensor = npt.NDArray[np.float32]
Vocab = Literal["none", "bpe"]

CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

_D, _FF, _HEADS, _KV_HEADS, _LAYERS, _V = 128, 192, 8, 4, 2, 320


class _Weights:
    def __init__(self, seed: int) -> None:
        self._rng = np.random.default_rng(seed)

    def matrix(self, *shape: int, scale: float | None = None) -> Tensor:
        scale = shape[-1] ** -0.5 if scale is None else scale
        return self._rng.standard_normal(shape, np.float32) * np.float32(scale)

    def norm(self, size: int) -> Tensor:
        return 1 + np.float32(0.1) * self._rng.standard_normal(size, np.float32)

    def q4_k(self, shape: tuple[int, ...]) -> npt.NDArray[np.uint8]:
        """Valid Q4_K blocks with random scales, minima and quants; the values have a standard deviation
        near ``1 / sqrt(columns)`` and a mean near 0 (7.5 is the mean quant)."""
        blocks = int(np.prod(shape)) // 256
        data = self._rng.integers(0, 256, (blocks, 144), np.uint8)
        d = np.float16(shape[-1] ** -0.5 / 255)
        data[:, :4] = np.array([d, np.float16(7.5 * float(d))], np.float16).view(np.uint8)
        return data.reshape(*shape[:-1], -1)


def _byte_tokens() -> list[str]:
    """GPT-2's printable stand-ins for the 256 bytes, in the order of the bytes."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    spare = iter(range(256, 512))
    return [chr(b) if b in printable else chr(next(spare)) for b in range(256)]


def _write_vocab(writer: GGUFWriter, vocab: Vocab, size: int) -> None:
    if vocab == "none":
        writer.add_tokenizer_model("no_vocab")
        return
    tokens, types = _byte_tokens(), [1] * 256
    merges = [("t", "h"), ("th", "e"), ("i", "n"), ("a", "n"), ("Ġ", "t"), ("Ġt", "he"), ("Ġ", "a")]
    tokens += ["".join(pair) for pair in merges]
    types += [1] * len(merges)
    special = len(tokens)
    tokens += ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    types += [3, 3, 3]
    tokens += [f"<|unused_{i}|>" for i in range(size - len(tokens))]
    types += [5] * (size - len(types))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges([" ".join(pair) for pair in merges])
    writer.add_bos_token_id(special)
    writer.add_eos_token_id(special + 2)
    writer.add_eot_token_id(special + 2)
    writer.add_add_bos_token(False)
    writer.add_chat_template(CHAT_TEMPLATE)


def _write(
    path: Path,
    arch: str,
    tensors: dict[str, Any],
    settings: dict[str, int | float],
    *,
    vocab: Vocab,
    kind: Q,
    size: int = _V,
) -> Path:
    writer = GGUFWriter(str(path), arch)
    for key, value in settings.items():
        add = writer.add_uint32 if isinstance(value, int) else writer.add_float32
        add(f"{arch}.{key}", value)
    writer.add_uint32(f"{arch}.vocab_size", size)
    _write_vocab(writer, vocab, size)
    for name, data in tensors.items():
        if data.dtype == np.uint8:
            writer.add_tensor(name, data, raw_dtype=Q.Q4_K)
        elif data.ndim < 2 or kind == Q.F32 or "ffn_gate_inp" in name:
            writer.add_tensor(name, data)
        elif kind == Q.F16:
            writer.add_tensor(name, data.astype(np.float16))
        else:
            writer.add_tensor(name, quantize(data, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _settings(d: int = _D, ff: int = _FF, layers: int = _LAYERS, heads: int = _HEADS, kv: int = _KV_HEADS) -> Any:
    return {
        "context_length": 512,
        "embedding_length": d,
        "block_count": layers,
        "feed_forward_length": ff,
        "attention.head_count": heads,
        "attention.head_count_kv": kv,
        "attention.layer_norm_rms_epsilon": 1e-5,
    }


def _transformer(
    w: _Weights,
    *,
    tied: bool,
    d: int = _D,
    ff: int = _FF,
    layers: int = _LAYERS,
    heads: int = _HEADS,
    kv: int = _KV_HEADS,
    size: int = _V,
    qk_norm: bool = False,
    post_norm: bool = False,
    experts: int = 0,
    make: Callable[..., Any] | None = None,
) -> dict[str, Any]:
    matrix = w.matrix if make is None else make
    hd = d // heads
    tensors: dict[str, Any] = {"token_embd.weight": matrix(size, d), "output_norm.weight": w.norm(d)}
    if not tied:
        tensors["output.weight"] = matrix(size, d)
    for i in range(layers):
        b = f"blk.{i}."
        tensors |= {b + "attn_norm.weight": w.norm(d), b + "ffn_norm.weight": w.norm(d)}
        tensors |= {b + "attn_q.weight": matrix(d, d), b + "attn_output.weight": matrix(d, d)}
        tensors |= {b + "attn_k.weight": matrix(kv * hd, d), b + "attn_v.weight": matrix(kv * hd, d)}
        if qk_norm:
            tensors |= {b + "attn_q_norm.weight": w.norm(hd), b + "attn_k_norm.weight": w.norm(hd)}
        if post_norm:
            tensors |= {b + "post_attention_norm.weight": w.norm(d), b + "post_ffw_norm.weight": w.norm(d)}
        lead: tuple[int, ...] = (experts,) if experts else ()
        suffix = "_exps.weight" if experts else ".weight"
        if experts:
            tensors[b + "ffn_gate_inp.weight"] = w.matrix(experts, d)
        tensors |= {b + f"ffn_{name}{suffix}": matrix(*lead, ff, d) for name in ("gate", "up")}
        tensors[b + "ffn_down" + suffix] = matrix(*lead, d, ff)
    return tensors


def write_llama(
    path: Path, *, tied: bool = False, kind: Q = Q.F32, vocab: Vocab = "none", seed: int = 0, layers: int = _LAYERS
) -> Path:
    """A llama with the matrices in F32, F16, Q8_0 or Q4_K (the last is 256 wide, as its blocks are)."""
    w = _Weights(seed)
    if kind == Q.Q4_K:
        tensors = _transformer(w, tied=tied, d=256, ff=256, layers=layers, make=lambda *shape: w.q4_k(shape))
        settings = _settings(256, 256, layers)
    else:
        tensors, settings = _transformer(w, tied=tied, layers=layers), _settings(layers=layers)
    settings["rope.dimension_count"] = settings["embedding_length"] // _HEADS
    return _write(path, "llama", tensors, settings, vocab=vocab, kind=kind)


def write_qwen3(path: Path, *, vocab: Vocab = "none", seed: int = 0) -> Path:
    """qwen3, tied, with query and key norms."""
    hd = _D // _HEADS
    settings = _settings() | {"attention.key_length": hd, "attention.value_length": hd}
    return _write(
        path, "qwen3", _transformer(_Weights(seed), tied=True, qk_norm=True), settings, vocab=vocab, kind=Q.F32
    )


def write_gemma2(path: Path, *, vocab: Vocab = "none", seed: int = 0) -> Path:
    """gemma2: tied, sliding window, soft-caps on the attention and (at 3) on the logits."""
    hd = _D // _HEADS
    settings = _settings() | {
        "attention.key_length": hd,
        "attention.value_length": hd,
        "attention.sliding_window": 64,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 3.0,
    }
    return _write(
        path, "gemma2", _transformer(_Weights(seed), tied=True, post_norm=True), settings, vocab=vocab, kind=Q.F32
    )


def write_qwen3moe(path: Path, *, vocab: Vocab = "none", seed: int = 0) -> Path:
    """qwen3moe: 8 experts, 2 of them used."""
    hd = _D // _HEADS
    settings = _settings() | {
        "attention.key_length": hd,
        "attention.value_length": hd,
        "expert_count": 8,
        "expert_used_count": 2,
        "expert_feed_forward_length": _FF,
    }
    tensors = _transformer(_Weights(seed), tied=False, qk_norm=True, experts=8)
    return _write(path, "qwen3moe", tensors, settings, vocab=vocab, kind=Q.F32)


def write_deepseek2(path: Path, *, vocab: Vocab = "none", seed: int = 0) -> Path:
    """deepseek2, dense, with its latent attention."""
    w = _Weights(seed)
    kv_rank, rope, nope, v_dim, q_rank = 64, 16, 32, 32, 64
    tensors: dict[str, Any] = {
        "token_embd.weight": w.matrix(_V, _D),
        "output_norm.weight": w.norm(_D),
        "output.weight": w.matrix(_V, _D),
    }
    for i in range(_LAYERS):
        b = f"blk.{i}."
        tensors |= {
            b + "attn_norm.weight": w.norm(_D),
            b + "attn_q_a.weight": w.matrix(q_rank, _D),
            b + "attn_q_a_norm.weight": w.norm(q_rank),
            b + "attn_q_b.weight": w.matrix(_HEADS * (nope + rope), q_rank),
            b + "attn_kv_a_mqa.weight": w.matrix(kv_rank + rope, _D),
            b + "attn_kv_a_norm.weight": w.norm(kv_rank),
            b + "attn_k_b.weight": w.matrix(_HEADS, kv_rank, nope),
            b + "attn_v_b.weight": w.matrix(_HEADS, v_dim, kv_rank),
            b + "attn_output.weight": w.matrix(_D, _HEADS * v_dim),
            b + "ffn_norm.weight": w.norm(_D),
            b + "ffn_gate.weight": w.matrix(_FF, _D),
            b + "ffn_up.weight": w.matrix(_FF, _D),
            b + "ffn_down.weight": w.matrix(_D, _FF),
        }
    settings = _settings(kv=1) | {
        "leading_dense_block_count": _LAYERS,
        "attention.q_lora_rank": q_rank,
        "attention.kv_lora_rank": kv_rank,
        "attention.key_length": kv_rank + rope,
        "attention.value_length": kv_rank,
        "attention.key_length_mla": nope + rope,
        "attention.value_length_mla": v_dim,
        "rope.dimension_count": rope,
        "expert_count": 2,
        "expert_used_count": 1,
        "expert_feed_forward_length": _FF,
        "expert_shared_count": 1,
        "expert_weights_scale": 1.0,
    }
    return _write(path, "deepseek2", tensors, settings, vocab=vocab, kind=Q.F32)


def write_eurobert(path: Path, *, vocab: Vocab = "none", seed: int = 0) -> Path:
    """An encoder: its graph has no output matrix, so control is refused."""
    return _write(path, "eurobert", _transformer(_Weights(seed), tied=True), _settings(), vocab=vocab, kind=Q.F32)


def write_vocab_only(path: Path) -> Path:
    """A tokenizer and a chat template without a single weight."""
    return _write(path, "llama", {}, _settings(), vocab="bpe", kind=Q.F32)


def write_large(path: Path, seed: int = 0) -> Path:
    """A llama of 134 million parameters in Q8_0, about 140 MB: for timing only."""
    d, ff, layers, heads, size = 768, 2048, 12, 12, 32_000
    tensors = _transformer(_Weights(seed), tied=False, d=d, ff=ff, layers=layers, heads=heads, kv=heads, size=size)
    settings = _settings(d, ff, layers, heads, heads) | {"context_length": 2048, "rope.dimension_count": 64}
    return _write(path, "llama", tensors, settings, vocab="none", kind=Q.Q8_0, size=size)


MODELS: dict[str, Callable[..., Path]] = {
    "llama-f32": lambda path, **o: write_llama(path, **o),
    "llama-tied-f32": lambda path, **o: write_llama(path, tied=True, **o),
    "llama-f16": lambda path, **o: write_llama(path, kind=Q.F16, **o),
    "llama-q8_0": lambda path, **o: write_llama(path, kind=Q.Q8_0, **o),
    "llama-tied-q8_0": lambda path, **o: write_llama(path, tied=True, kind=Q.Q8_0, **o),
    "llama-q4_k": lambda path, **o: write_llama(path, kind=Q.Q4_K, **o),
    "qwen3-tied": write_qwen3,
    "gemma2-softcap": write_gemma2,
    "qwen3moe": write_qwen3moe,
    "deepseek2": write_deepseek2,
}
"""The models that take a control, by name: each a function of a path (and ``vocab``, ``seed``)."""


def write_models(folder: Path, names: Sequence[str] = tuple(MODELS)) -> dict[str, Path]:
    """Write the named models into ``folder``; the seed of each follows from its name."""
    return {name: MODELS[name](folder / f"{name}.gguf", seed=zlib.crc32(name.encode())) for name in names}


def cached_large() -> Path:
    """``write_large`` in the cache: written once for each version of this file."""
    digest = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:16]
    path = cache_dir() / f"large-{digest}.gguf"
    if not path.exists():
        part = path.with_suffix(".part")
        write_large(part).rename(path)
    return path


def cache_dir() -> Path:
    """Where benchmarks keep what is slow to make."""
    path = Path(tempfile.gettempdir()) / "aisp-local-benchmarks"
    path.mkdir(exist_ok=True)
    return path
