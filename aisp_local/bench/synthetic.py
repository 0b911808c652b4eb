"""Models of random weights in the sizes that a measurement needs: they say nothing, at the speed of one that does."""

from __future__ import annotations

import hashlib
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter
from gguf.quants import quantize

_END = 256  # the token that ends a response; those before it are the bytes


@dataclass(frozen=True)
class Shape:
    """Sizes of a llama. The default has 134 million parameters, 140 MB in Q8_0."""

    vocabulary: int = 32_000
    width: int = 768
    layers: int = 12
    heads: int = 12
    hidden: int = 2048
    context: int = 4096


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
    """A llama in Q8_0 with a tokenizer of bytes."""
    rng = np.random.default_rng(seed)
    writer = GGUFWriter(str(path), "llama")
    writer.add_vocab_size(shape.vocabulary)
    writer.add_context_length(shape.context)
    writer.add_embedding_length(shape.width)
    writer.add_block_count(shape.layers)
    writer.add_feed_forward_length(shape.hidden)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.heads)
    writer.add_rope_dimension_count(shape.width // shape.heads)
    writer.add_rope_freq_base(10_000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_string("aisp.shape", repr(asdict(shape)))
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    spare = iter(range(256, 512))
    tokens = [chr(b) if b in printable else chr(next(spare)) for b in range(256)]
    tokens += ["<|end|>", "th", *(f" word{i}" for i in range(shape.vocabulary - 258))]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types([1] * _END + [3] + [1] * (shape.vocabulary - 257))
    writer.add_token_merges(["t h"])
    writer.add_eos_token_id(_END)
    writer.add_bos_token_id(_END)
    writer.add_add_bos_token(False)

    def matrix(name: str, rows: int, columns: int) -> None:
        data = rng.standard_normal((rows, columns), np.float32) * np.float32(columns**-0.5)
        q8 = GGMLQuantizationType.Q8_0
        writer.add_tensor(f"{name}.weight", quantize(data, q8), raw_dtype=q8)

    def norm(name: str) -> None:
        writer.add_tensor(f"{name}.weight", np.ones(shape.width, np.float32))

    matrix("token_embd", shape.vocabulary, shape.width)
    matrix("output", shape.vocabulary, shape.width)
    norm("output_norm")
    for i in range(shape.layers):
        norm(f"blk.{i}.attn_norm")
        norm(f"blk.{i}.ffn_norm")
        for part in ("attn_q", "attn_k", "attn_v", "attn_output"):
            matrix(f"blk.{i}.{part}", shape.width, shape.width)
        matrix(f"blk.{i}.ffn_gate", shape.hidden, shape.width)
        matrix(f"blk.{i}.ffn_up", shape.hidden, shape.width)
        matrix(f"blk.{i}.ffn_down", shape.width, shape.hidden)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
