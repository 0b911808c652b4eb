"""AISP's rollouts in Hugging Face transformers and PyTorch: what benchmarks/torch_aisp.py compares with."""

from __future__ import annotations

import copy
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

VARIANTS = {
    "float32": (torch.float32, True),
    "bfloat16": (torch.bfloat16, True),
    "packed": (torch.float32, False),
}
"""Type, and whether the weights are unpacked into dense matrices."""

_NAMES = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}


def dense_llama(path: Path, dtype: torch.dtype, device: str) -> Any:
    """A llama in transformers' class, filled tensor by tensor: one of 8B never lies on the host in float32."""
    from gguf import GGUFReader
    from gguf.quants import dequantize
    from transformers import LlamaConfig, LlamaForCausalLM

    reader = GGUFReader(path)
    tensors = {tensor.name: tensor for tensor in reader.tensors}

    def value(name: str) -> Any:
        return reader.fields[f"llama.{name}"].contents()

    heads, kv_heads = value("attention.head_count"), value("attention.head_count_kv")
    config = LlamaConfig(
        vocab_size=int(tensors["token_embd.weight"].shape[1]),
        hidden_size=value("embedding_length"),
        intermediate_size=value("feed_forward_length"),
        num_hidden_layers=value("block_count"),
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=value("context_length"),
        rms_norm_eps=value("attention.layer_norm_rms_epsilon"),
        rope_theta=value("rope.freq_base"),
        tie_word_embeddings="output.weight" not in tensors,
        attn_implementation="sdpa",
    )
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            model = LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(before)
    parameters = dict(model.named_parameters())

    def fill(name: str) -> None:
        parts = name.split(".")
        target = {"token_embd": "model.embed_tokens", "output": "lm_head", "output_norm": "model.norm"}.get(parts[0])
        if target is None:
            target = f"model.layers.{parts[1]}.{_NAMES[parts[2]]}"
        data = dequantize(tensors[name].data, tensors[name].tensor_type)
        if parts[-2] in ("attn_q", "attn_k"):  # llama.cpp has what is rotated together side by side
            n = heads if parts[-2] == "attn_q" else kv_heads
            data = data.reshape(n, data.shape[0] // n // 2, 2, -1).swapaxes(1, 2).reshape(data.shape)
        parameters[f"{target}.weight"].data.copy_(torch.from_numpy(np.array(data)))

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(fill, tensors))
    return model


class TorchEngine:
    """Rollouts of one prompt under controls, in transformers."""

    def __init__(self, model: Any, dtype: torch.dtype, ends: frozenset[int]) -> None:
        self.model = model.eval()
        self.device = model.device
        self.dtype, self.ends = dtype, torch.tensor(sorted(ends), device=self.device)
        self.cache: Any = None
        self.rows: Any = None

    @classmethod
    def load(cls, path: Path, dtype: torch.dtype, dense: bool, ends: frozenset[int]) -> TorchEngine:
        from transformers import AutoModelForCausalLM, GgufConfig

        model = AutoModelForCausalLM.from_pretrained(
            str(path.parent),
            gguf_file=path.name,
            dtype=dtype,
            attn_implementation="sdpa",
            quantization_config=GgufConfig(dequantize=dense),
        )
        return cls(model, dtype, ends)

    @torch.inference_mode()
    def prefill(self, prompt: np.ndarray) -> None:
        ids = torch.from_numpy(prompt[:-1].astype(np.int64))[None].to(self.device)
        self.cache = self.model.model(input_ids=ids, use_cache=True).past_key_values
        self.last = int(prompt[-1])

    @torch.inference_mode()
    def rollout(self, v: np.ndarray, steps: int) -> list[np.ndarray]:
        n = len(v)
        self.begin(n, steps)
        controls = torch.from_numpy(v).to(self.device, self.dtype)
        token = torch.full((n,), self.last, dtype=torch.int64, device=self.device)
        out = torch.zeros((n, steps), dtype=torch.int64, device=self.device)
        lengths = torch.full((n,), steps, device=self.device)
        running = torch.ones(n, dtype=torch.bool, device=self.device)
        for t in range(steps):
            token = self.step(token, controls[:, t])
            out[:, t] = token
            ended = torch.isin(token, self.ends) & running
            lengths[ended] = t + 1
            running &= ~ended
            if not running.any():
                break
        rows = out.cpu().numpy().astype(np.int32)
        return [row[:length] for row, length in zip(rows, lengths.tolist(), strict=True)]

    def begin(self, n: int, steps: int) -> None:
        """Expand the prompt's cache to n rows."""
        self.rows = copy.deepcopy(self.cache)
        self.rows.batch_repeat_interleave(n)

    def step(self, token: torch.Tensor, control: torch.Tensor) -> torch.Tensor:
        """The next tokens [n] after the tokens [n], under the control [n, d]."""
        out = self.model.model(input_ids=token[:, None], past_key_values=self.rows, use_cache=True)
        best: torch.Tensor = self.model.lm_head(out.last_hidden_state[:, -1] + control).argmax(dim=-1)
        return best


class StaticEngine(TorchEngine):
    """A step of a llama in plain torch over a cache of fixed size: CUDA replays all its kernels as one graph."""

    graph: Any = None
    size = (0, 0)  # rows and cells

    def begin(self, n: int, steps: int) -> None:
        config, past = self.model.config, self.cache.get_seq_length()
        if self.size != (n, past + steps):
            self.size, self.graph = (n, past + steps), None
            shape = (n, config.num_key_value_heads, past + steps, config.hidden_size // config.num_attention_heads)
            new: Any = {"dtype": self.dtype, "device": self.device}
            self.keys = [torch.zeros(shape, **new) for _ in self.cache.layers]
            self.values = [torch.zeros(shape, **new) for _ in self.cache.layers]
            self.token = torch.zeros(n, dtype=torch.int64, device=self.device)
            self.position = torch.zeros(1, dtype=torch.int64, device=self.device)
            self.control = torch.zeros((n, config.hidden_size), **new)
        for i, layer in enumerate(self.cache.layers):
            self.keys[i][:, :, :past] = layer.keys
            self.values[i][:, :, :past] = layer.values
        self.position.fill_(past)

    def step(self, token: torch.Tensor, control: torch.Tensor) -> torch.Tensor:
        self.token.copy_(token)
        self.control.copy_(control)
        if self.device.type == "cuda":
            if self.graph is None:
                self._capture()
            self.graph.replay()
            best = self.out.clone()
        else:
            best = self._best()
        self.position += 1
        return best

    def _capture(self) -> None:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self._best()  # what libraries set up at the first call cannot be captured
        torch.cuda.current_stream().wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.out = self._best()

    def _best(self) -> torch.Tensor:
        model, config = self.model.model, self.model.config
        n, heads, kv_heads = len(self.token), config.num_attention_heads, config.num_key_value_heads
        x = model.embed_tokens(self.token)
        cos, sin = (part[:, None] for part in model.rotary_emb(x, self.position[None]))  # [1, 1, 1, head]
        mask = (torch.arange(self.size[1], device=self.device) <= self.position)[None, None, None]

        def rotated(y: torch.Tensor) -> torch.Tensor:
            first, second = y.chunk(2, dim=-1)
            return y * cos + torch.cat((-second, first), dim=-1) * sin

        for keys, values, layer in zip(self.keys, self.values, model.layers, strict=True):
            attention, h = layer.self_attn, layer.input_layernorm(x)
            q = rotated(attention.q_proj(h).view(n, heads, 1, -1))
            keys.index_copy_(2, self.position, rotated(attention.k_proj(h).view(n, kv_heads, 1, -1)))
            values.index_copy_(2, self.position, attention.v_proj(h).view(n, kv_heads, 1, -1))
            seen = torch.nn.functional.scaled_dot_product_attention(
                q, keys, values, attn_mask=mask, enable_gqa=heads != kv_heads
            )
            x = x + attention.o_proj(seen.reshape(n, -1))
            x = x + layer.mlp(layer.post_attention_layernorm(x))
        best: torch.Tensor = self.model.lm_head(model.norm(x) + self.control).argmax(dim=-1)
        return best


@cache
def load(path: Path, device: str, static: bool, ends: frozenset[int]) -> dict[str, TorchEngine]:
    """What ours is compared to."""
    if not static:
        return {name: TorchEngine.load(path, *variant, ends) for name, variant in VARIANTS.items()}
    model = dense_llama(path, torch.bfloat16, device)
    engines = {"bfloat16": TorchEngine, "static": StaticEngine}
    return {name: engine(model, torch.bfloat16, ends) for name, engine in engines.items()}
