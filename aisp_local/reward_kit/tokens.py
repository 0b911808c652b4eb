"""Whether a tokenizer and a model belong together, as far as the files can tell."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from aisp_local.errors import AispError
from aisp_local.reward_kit.good_bad import PAIRS
from aisp_local.rewards.graph_file import read_graph
from aisp_local.rewards.onnx import OnnxReward

# What chat templates write and a tokenizer must know as one token.
_MARK = re.compile(r"<\|[^|<>\s{}]{1,40}\|>|<(?:start|end)_of_turn>")
_UNKNOWN = 0.1  # of plain English


def problems(reward: OnnxReward, folder: Path) -> list[str]:
    """Sentences, none if they seem to belong together."""
    tokenizer, manifest = reward.tokenizer, reward.manifest
    rows = read_graph(folder / manifest.model).rows_of(manifest.inputs["input_ids"])
    ids = tokenizer.get_vocab(with_added_tokens=True)
    found = []
    greatest = max(ids.values(), default=-1)
    if rows is not None and greatest >= rows:
        beyond = sorted((i, token) for token, i in ids.items() if i >= rows)
        found.append(
            f"the tokenizer has {len(beyond)} tokens beyond the model's {rows} embeddings (first {beyond[0][1]!r}, "
            f"{beyond[0][0]})"
        )
    elif rows is None:  # the graph does not show it: try
        try:
            reward.run_ids([greatest])
        except AispError as error:
            found.append(f"the model refuses the tokenizer's last id {greatest} ({str(error)[:120]})")
    found += [
        f"the chat template writes {mark!r}, which is no token of the tokenizer" for mark in _unknown_marks(reward)
    ]
    encoded = [list(reward.token_ids(pair.prompt, pair.chosen)) for pair in PAIRS]
    flat = [i for row in encoded for i in row]
    if manifest.adds_special and any(row[:1] == row[1:2] for row in encoded):
        found.append(f"inputs begin with {tokenizer.id_to_token(encoded[0][0])!r} twice")
    unknown = _unknown_id(reward)
    if unknown is not None and flat.count(unknown) > _UNKNOWN * len(flat):
        found.append(f"{flat.count(unknown) / len(flat):.0%} of plain English are unknown tokens")
    return found


def _unknown_marks(reward: OnnxReward) -> Sequence[str]:
    marks = sorted(set(_MARK.findall(reward.manifest.template or "")))
    return [mark for mark in marks if reward.tokenizer.token_to_id(mark) is None]


def _unknown_id(reward: OnnxReward) -> int | None:
    """The id of unknown words, where the tokenizer's model has one."""
    name = getattr(reward.tokenizer.model, "unk_token", None)
    return reward.tokenizer.token_to_id(name) if isinstance(name, str) else None
