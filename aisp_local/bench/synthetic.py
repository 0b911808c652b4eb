"""Models of random weights in the sizes that a measurement needs: they say nothing, at the speed of one that does."""

from __future__ import annotations

import hashlib
import itertools
import json
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType, GGUFWriter
from gguf.quants import quant_shape_to_byte_shape, quantize

from aisp_local import shipped

_END = 256  # the token that ends a response; those before it are the bytes
_TYPES = GGMLQuantizationType
Bytes = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Shape:
    """Sizes of a llama. The default has 134 million parameters, 140 MB in Q8_0.

    ``kv_heads``: as many as heads unless given. ``kind``: Q4_K_M has the mixture of Q4_K and Q6_K that llama.cpp gives
    a llama under this name; its widths are multiples of 256.
    """

    vocabulary: int = 32_000
    width: int = 768
    layers: int = 12
    heads: int = 12
    hidden: int = 2048
    context: int = 4096
    kv_heads: int | None = None
    kind: Literal["Q8_0", "Q4_K_M"] = "Q8_0"


LLAMA_8B = Shape(128_256, 4096, 32, 32, 14_336, 8192, kv_heads=8, kind="Q4_K_M")
"""The sizes of Llama 3.1 8B: 8.0 billion parameters, 4.9 GB."""


def cached(shape: Shape) -> Path:
    """A model of this shape in the system's folder for temporary files, written at the first call."""
    digest = hashlib.sha256(repr(shape).encode() + Path(__file__).read_bytes()).hexdigest()[:16]
    folder = Path(tempfile.gettempdir()) / "aisp-local-benchmarks"
    folder.mkdir(exist_ok=True)
    path = folder / f"llama-{digest}.gguf"
    if not path.exists():
        part = path.with_suffix(".part")
        write(part, shape)
        part.rename(path)
    return path


def write(path: Path, shape: Shape, seed: int = 0) -> Path:
    """A llama with a tokenizer of bytes. One matrix at a time is in memory."""
    rng = np.random.default_rng(seed)
    kv_heads = shape.kv_heads or shape.heads
    writer = GGUFWriter(str(path), "llama")
    writer.add_vocab_size(shape.vocabulary)
    writer.add_context_length(shape.context)
    writer.add_embedding_length(shape.width)
    writer.add_block_count(shape.layers)
    writer.add_feed_forward_length(shape.hidden)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_rope_dimension_count(shape.width // shape.heads)
    writer.add_rope_freq_base(10_000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_string("aisp.shape", repr(asdict(shape)))
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    spare = iter(range(256, 512))
    tokens = [chr(b) if b in printable else chr(next(spare)) for b in range(256)]
    tokens += ["<|end|>", "th", *_words(shape.vocabulary - 258)]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types([1] * _END + [3] + [1] * (shape.vocabulary - 257))
    writer.add_token_merges(["t h"])
    writer.add_eos_token_id(_END)
    writer.add_bos_token_id(_END)
    writer.add_add_bos_token(False)

    matrices: dict[str, tuple[int, int, GGMLQuantizationType]] = {}
    norms: list[str] = []

    def matrix(name: str, rows: int, columns: int, more: bool = False) -> None:
        kind = _TYPES.Q8_0 if shape.kind == "Q8_0" else _TYPES.Q6_K if more else _TYPES.Q4_K
        matrices[f"{name}.weight"] = rows, columns, kind

    matrix("token_embd", shape.vocabulary, shape.width)
    matrix("output", shape.vocabulary, shape.width, more=True)
    norms.append("output_norm.weight")
    kv_width = shape.width // shape.heads * kv_heads
    for i in range(shape.layers):
        norms += [f"blk.{i}.attn_norm.weight", f"blk.{i}.ffn_norm.weight"]
        eighth = shape.layers // 8
        more = i < eighth or i >= 7 * shape.layers // 8 or (i - eighth) % 3 == 2
        matrix(f"blk.{i}.attn_q", shape.width, shape.width)
        matrix(f"blk.{i}.attn_k", kv_width, shape.width)
        matrix(f"blk.{i}.attn_v", kv_width, shape.width, more)
        matrix(f"blk.{i}.attn_output", shape.width, shape.width)
        matrix(f"blk.{i}.ffn_gate", shape.hidden, shape.width)
        matrix(f"blk.{i}.ffn_up", shape.hidden, shape.width)
        matrix(f"blk.{i}.ffn_down", shape.width, shape.hidden, more)
    for name, (rows, columns, kind) in matrices.items():
        size = quant_shape_to_byte_shape((rows, columns), kind)
        writer.add_tensor_info(name, size, np.dtype(np.uint8), int(np.prod(size)), raw_dtype=kind)
    for name in norms:
        writer.add_tensor_info(name, (shape.width,), np.dtype(np.float32), 4 * shape.width)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for rows, columns, kind in matrices.values():
        writer.write_tensor_data(_random(rng, rows, columns, kind))
    for name in norms:
        # Logits as peaked as a real model's: tens of tokens within a fiftieth of the likeliest one, not thousands.
        gain = 4.0 if name == "output_norm.weight" else 1.0
        writer.write_tensor_data(np.full(shape.width, gain, np.float32))
    writer.close()
    return path


def _words(count: int) -> list[str]:
    """Different words, one token each for the shipped reward as far as it has so many, as those of text are."""
    vocabulary = json.loads((shipped.reward() / "tokenizer.json").read_text(encoding="utf-8"))["model"]["vocab"]
    words = [word for word in vocabulary if word.isascii() and word.isalpha() and len(word) > 1]
    found = dict.fromkeys(words)
    for first, second in itertools.product(words, words):
        if len(found) >= count:
            break
        found[first + second] = None
    return [f" {word}" for word in itertools.islice(found, count)]


def _random(rng: np.random.Generator, rows: int, columns: int, kind: GGMLQuantizationType) -> npt.NDArray[Any]:
    """A random matrix that keeps the length of what passes through it, quantised.

    In Q4_K and Q6_K the quanta are random bytes as they are, gigabytes a second, and all blocks have one scale.
    """
    if kind is _TYPES.Q8_0:
        data = rng.standard_normal((rows, columns), np.float32) * np.float32(columns**-0.5)
        return np.asarray(quantize(data, kind))
    size = rows * quant_shape_to_byte_shape((columns,), kind)[0]
    blocks: Bytes = rng.bit_generator.random_raw(-(-size // 8)).view(np.uint8)[:size].reshape(rows * columns // 256, -1)
    if kind is _TYPES.Q4_K:  # d (33 q - 33 * 7.5), q in 0 to 15
        scale = np.float16(columns**-0.5 / (33 * 21.25**0.5))
        blocks[:, :4] = np.array([scale, np.float16(7.5) * scale], np.float16).view(np.uint8)
        blocks[:, 4:16] = [161] * 8 + [17] * 4  # eight scales and eight minima of 33, six bits each
    else:  # d (+-8) (q - 32), q in 0 to 63
        blocks[:, 192:208] = np.tile(np.array([8, -8], np.int8), 8).view(np.uint8)
        blocks[:, 208:] = np.array([columns**-0.5 / (8 * 341.25**0.5)], np.float16).view(np.uint8)
    return blocks.reshape(rows, -1)
