"""Batched sampling with a key-value cache, in float32."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn import functional as F

from training.network import Block, Network
from training.tokenizer import END_OF_TEXT, TURN_END, render_prompt


@dataclass(frozen=True)
class Answer:
    """A sampled answer; `ended` says that the model ended it before the limit."""

    text: str
    tokens: int
    ended: bool


class State:
    """Rows still being written: their cache, last positions, and which answers they are.

    keys and values are [layers, rows, kv_heads, time, head_width]; mask is [rows, time], true
    where a token is; prompts are padded on the left, so that all rows end at the same column.
    """

    def __init__(self, network: Network, tokens: Tensor, lengths: Tensor, room: int) -> None:
        shape, (rows, time) = network.shape, tokens.shape
        size = (shape.layers, rows, shape.kv_heads, time + room, shape.head_width)
        self.keys, self.values = torch.zeros(size), torch.zeros(size)
        self.mask = torch.arange(time + room)[None] >= time - lengths[:, None]
        self.lengths = lengths
        self.rows = torch.arange(rows)
        self.time = 0

    def keep(self, rows: Tensor) -> None:
        """Drop all rows but those of the index."""
        self.keys, self.values = self.keys[:, rows], self.values[:, rows]
        self.mask, self.lengths, self.rows = self.mask[rows], self.lengths[rows], self.rows[rows]


def attend(block: Block, layer: int, x: Tensor, state: State, cos: Tensor, sin: Tensor) -> Tensor:
    """One layer for new columns x [rows, time, width], against all columns so far."""
    start, stop = state.time, state.time + x.shape[1]
    q, k, v = block.project(x, cos, sin)
    state.keys[layer, :, :, start:stop] = k
    state.values[layer, :, :, start:stop] = v
    keys, values = state.keys[layer, :, :, :stop], state.values[layer, :, :, :stop]
    visible = state.mask[:, None, None, :stop]
    if stop - start > 1:
        visible = visible & torch.ones(stop, stop, dtype=torch.bool).tril()[start:]
        # A row's padding sees itself: a softmax over nothing would give not-a-number.
        visible = visible | torch.eye(stop, dtype=torch.bool)[start:]
    attended = F.scaled_dot_product_attention(
        q, keys, values, attn_mask=visible, enable_gqa=q.shape[1] != keys.shape[1]
    )
    return block.mix(x, attended)


def advance(network: Network, tokens: Tensor, state: State, padding: Tensor) -> Tensor:
    """Feed columns [rows, time]; logits [rows, vocabulary] after the last one."""
    columns = torch.arange(state.time, state.time + tokens.shape[1])
    positions = (columns[None] - padding[state.rows, None]).clamp(min=0)
    cos, sin = network.cos[positions][:, :, None], network.sin[positions][:, :, None]
    x = network.token_embd(tokens)
    for layer, block in enumerate(network.blk):
        x = attend(block, layer, x, state, cos, sin)
    state.time += tokens.shape[1]
    return network.head(network.output_norm(x[:, -1]))


@torch.no_grad()
def sample(
    network: Network,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    temperatures: Sequence[float],
    *,
    max_tokens: int,
    seed: int,
) -> list[Answer]:
    """One answer a prompt, at the prompt's temperature; 0 takes the likeliest token."""
    encoded = [e.ids for e in tokenizer.encode_batch([render_prompt(p) for p in prompts])]
    lengths = torch.tensor([len(ids) for ids in encoded])
    time = int(lengths.max())
    room = min(max_tokens, network.shape.context - time)
    tokens = torch.tensor([[END_OF_TEXT] * (time - len(ids)) + ids for ids in encoded])
    padding, heat = time - lengths, torch.tensor(temperatures)
    state = State(network, tokens, lengths, room)
    generator = torch.Generator().manual_seed(seed)
    written: list[list[int]] = [[] for _ in prompts]
    ended = [False] * len(prompts)
    logits = advance(network, tokens, state, padding)
    for _ in range(room):
        now = heat[state.rows, None]
        noise = torch.empty_like(logits).exponential_(generator=generator).log()
        chosen = torch.where(now > 0, logits / now.clamp(min=1e-6) - noise, logits).argmax(-1)
        alive = (chosen != TURN_END) & (chosen != END_OF_TEXT)
        for row, token, goes_on in zip(state.rows.tolist(), chosen.tolist(), alive.tolist(), strict=True):
            if goes_on:
                written[row].append(token)
            else:
                ended[row] = True
        if not alive.all():
            if not alive.any():
                break
            state.keep(alive.nonzero()[:, 0])
            chosen = chosen[alive]
        if state.time == time + room - 1:
            break
        logits = advance(network, chosen[:, None], state, padding)
    texts = tokenizer.decode_batch(written)
    return [Answer(text, len(w), e) for text, w, e in zip(texts, written, ended, strict=True)]
