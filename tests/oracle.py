"""An independent numpy implementation in float64: nothing here comes from aisp_local or llama.cpp.

The output head of any architecture in ``synthetic``, and the whole llama architecture.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from gguf import GGUFReader
from gguf.quants import dequantize

Array = npt.NDArray[np.float64]

# Which architectures read these keys for their logits, and how.
CAPPED = {"gemma2", "gemma3", "gemma4", "grok", "muse-glimmer"}
SCALED = {"command-r", "cohere2", "cohere2moe", "grok", "talkie", "muse-glimmer"}
DIVIDED = {"granite", "granitemoe", "granitehybrid", "granite_swa", "graniteswitch", "minicpm"}


def _field(reader: GGUFReader, name: str, default: Any = None) -> Any:
    arch = reader.fields["general.architecture"].contents()
    field = reader.fields.get(f"{arch}.{name}")
    return default if field is None else field.contents()


def _tensors(reader: GGUFReader) -> dict[str, Array]:
    return {t.name: dequantize(t.data, t.tensor_type).astype(np.float64) for t in reader.tensors}


class Head:
    """``softcap(scale (W x + b))`` with W dequantised from the file."""

    def __init__(self, path: Path) -> None:
        reader = GGUFReader(path)
        arch = reader.fields["general.architecture"].contents()
        by_name = {t.name: t for t in reader.tensors if t.name.startswith(("output", "token_embd"))}
        tensor = by_name.get("output.weight", by_name["token_embd.weight"])
        self.weight: Array = dequantize(tensor.data, tensor.tensor_type).astype(np.float64)
        if "output.scale" in by_name:
            self.weight *= by_name["output.scale"].data[0]
        self.rounds = tensor.tensor_type.name != "F32"  # llama.cpp may round the input too, by processor
        bias = None if arch == "qwen2vl" else by_name.get("output.bias")  # read, but not used
        self.bias = 0.0 if bias is None else dequantize(bias.data, bias.tensor_type).astype(np.float64)
        default = None if arch in ("gemma3", "grok") else 30.0
        self.cap = _field(reader, "final_logit_softcapping", default) if arch in CAPPED else None
        self.cap = 30.0 if arch == "gemma3n" else self.cap
        scale = _field(reader, "logit_scale") or 1.0
        self.scale = scale if arch in SCALED else 1 / scale if arch in DIVIDED else 1.0

    def __call__(self, x: npt.ArrayLike) -> Array:
        logits = (np.asarray(x, np.float64) @ self.weight.T + self.bias) * self.scale
        return self.cap * np.tanh(logits / self.cap) if self.cap else logits


class Llama:
    """The llama architecture with an incremental cache; one sequence.

    ``half``: round what llama.cpp's CPU backend rounds with F16 weights and its default F16 cache (the
    activations before each product, keys and values).
    """

    def __init__(self, path: Path, *, half: bool = False) -> None:
        reader = GGUFReader(path)
        self.w = _tensors(reader)
        self.half = half
        self.layers = int(_field(reader, "block_count"))
        self.heads = int(_field(reader, "attention.head_count"))
        self.kv_heads = int(_field(reader, "attention.head_count_kv", self.heads))
        self.eps = float(_field(reader, "attention.layer_norm_rms_epsilon"))
        self.d = int(_field(reader, "embedding_length"))
        self.hd = self.d // self.heads
        base = float(_field(reader, "rope.freq_base", 10000.0))
        self.frequencies = base ** (-np.arange(0, self.hd, 2) / self.hd)
        self.reset()

    def reset(self) -> None:
        self.cache: list[tuple[list[Array], list[Array]]] = [([], []) for _ in range(self.layers)]

    def copy(self) -> Llama:
        """The same weights with a cache of its own that starts as this one's."""
        twin = object.__new__(Llama)
        twin.__dict__.update(self.__dict__)
        twin.cache = [(list(k), list(v)) for k, v in self.cache]
        return twin

    def _round(self, x: Array) -> Array:
        return x.astype(np.float16).astype(np.float64) if self.half else x

    def _product(self, name: str, x: Array) -> Array:
        return self.w[name] @ self._round(x)

    def _norm(self, name: str, x: Array) -> Array:
        return np.asarray(x / np.sqrt(np.mean(x * x) + self.eps) * self.w[name])

    def _rope(self, x: Array, position: int) -> Array:
        """Rotate the pairs (2i, 2i + 1) of every head."""
        even, odd = x[:, 0::2], x[:, 1::2]
        cos, sin = np.cos(position * self.frequencies), np.sin(position * self.frequencies)
        return np.stack([even * cos - odd * sin, even * sin + odd * cos], axis=-1).reshape(x.shape)

    def step(self, token: int) -> Array:
        """Append a token; its pre-logits z [d]."""
        x = self.w["token_embd.weight"][token]
        position = len(self.cache[0][0])
        for i, (keys, values) in enumerate(self.cache):
            b = f"blk.{i}."
            h = self._norm(b + "attn_norm.weight", x)
            q = self._rope(self._product(b + "attn_q.weight", h).reshape(self.heads, self.hd), position)
            k = self._rope(self._product(b + "attn_k.weight", h).reshape(self.kv_heads, self.hd), position)
            keys.append(self._round(k))
            values.append(self._round(self._product(b + "attn_v.weight", h).reshape(self.kv_heads, self.hd)))
            group = self.heads // self.kv_heads
            k_all, v_all = np.stack(keys), np.stack(values)  # [t, kv, hd]
            q = self._round(q).reshape(self.kv_heads, group, self.hd)
            scores = np.einsum("kgh,tkh->kgt", q, k_all) / np.sqrt(self.hd)
            p = np.exp(scores - scores.max(axis=-1, keepdims=True))
            p /= p.sum(axis=-1, keepdims=True)
            x = x + self._product(b + "attn_output.weight", np.einsum("kgt,tkh->kgh", p, v_all).reshape(-1))
            h = self._norm(b + "ffn_norm.weight", x)
            gate = self._product(b + "ffn_gate.weight", h)
            h = gate / (1 + np.exp(-gate)) * self._product(b + "ffn_up.weight", h)
            x = x + self._product(b + "ffn_down.weight", h)
        return self._norm("output_norm.weight", x)

    def head(self, z: Array) -> Array:
        """Logits [V] of (controlled) pre-logits."""
        name = "output.weight" if "output.weight" in self.w else "token_embd.weight"
        return self._product(name, z)


def end_tokens(path: Path) -> set[int]:
    """The tokens that end a response: end of sequence, end of turn, end of text."""
    fields = GGUFReader(path).fields
    ends = {int(fields[f"tokenizer.ggml.{k}_token_id"].contents()) for k in ("eos", "eot")}
    texts = fields["tokenizer.ggml.tokens"].contents()
    return ends | {i for i, text in enumerate(texts) if text in ("<|endoftext|>", "<|im_end|>")}


class NearTie(Exception):
    """Two tokens were so close that rounding could decide between them."""


class Rollout:
    """One greedy response under the trajectory v [T, d]: tokens, logits of every step, smallest margin.

    Raises NearTie where the best token leads the second by less than ``least``.
    """

    def __init__(self, prefilled: Llama, last: int, v: Array, ends: set[int], least: float) -> None:
        model, token = prefilled.copy(), last
        self.tokens: list[int] = []
        self.margin = np.inf
        logits = []
        for control in v:
            logits.append(model.head(model.step(token) + control))
            second, first = np.partition(logits[-1], -2)[-2:]
            self.margin = min(self.margin, float(first - second))
            if self.margin < least:
                raise NearTie
            token = int(np.argmax(logits[-1]))
            self.tokens.append(token)
            if token in ends:
                break
        self.logits = np.array(logits)  # [len(tokens), V]


class AispRun:
    """A whole run of AISP (arXiv 2510.26219, Eq. 13 and 14) on a llama, in float64.

    ``rewards[k][i]``: of iteration k and row i. Noise: Philox of SeedSequence([seed, 0, k + 1, i, 0]), float32
    standard normals [T, d]. Steps after the end of a response enter neither the prior term nor the mean; the
    prior term is log N(v; u, sigma^2) - log N(v; alpha u, sigma^2) over the steps before it.
    """

    def __init__(
        self,
        prefilled: Llama,
        last: int,
        ends: set[int],
        rewards: list[list[float]],
        *,
        steps: int,
        seed: int,
        sigma: float,
        lambda_: float,
        alpha: float,
        least: float = 0.0,
    ) -> None:
        self.seed = seed
        u = np.zeros((steps, prefilled.d))
        self.rollouts: list[list[Rollout]] = []
        self.controls: list[Array] = []  # of each iteration: [n, T, d]
        self.ess: list[float] = []
        for k, r in enumerate(rewards):
            generators = [
                np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, 0, k + 1, i, 0])))
                for i in range(len(r))
            ]
            v = np.stack([u + sigma * g.standard_normal((steps, prefilled.d), dtype=np.float32) for g in generators])
            rollouts = [Rollout(prefilled, last, row, ends, least) for row in v]
            exponents = []
            for reward, row, rollout in zip(r, v, rollouts, strict=True):
                length = len(rollout.tokens)
                proposal = sum(float(np.sum((row[t] - u[t]) ** 2)) for t in range(length))
                prior = sum(float(np.sum((row[t] - alpha * u[t]) ** 2)) for t in range(length))
                exponents.append(reward / lambda_ + (proposal - prior) / (2 * sigma**2))
            w = np.exp(np.array(exponents) - max(exponents))
            w /= w.sum()
            self.ess.append(float(1 / np.sum(w * w)))
            new = u.copy()
            for t in range(steps):
                alive = [i for i, rollout in enumerate(rollouts) if t < len(rollout.tokens)]
                if alive:
                    new[t] = sum(w[i] * v[i, t] for i in alive) / w[alive].sum()
            u = new
            self.rollouts.append(rollouts)
            self.controls.append(v)
        self.mean = u
        self.margin = min(rollout.margin for rollouts in self.rollouts for rollout in rollouts)
