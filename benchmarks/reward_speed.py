"""The shipped reward here against the same network in transformers and PyTorch, float32, scores a second on a CPU.

    pip install torch transformers onnx        (nothing else in the project needs transformers)
    python benchmarks/reward_speed.py [--only shipped float32 mixed] [--repeats 5]

Both sides go from texts to scores: the PyTorch side is what a competent user would write (fast tokenizer, one padded
batch, BertModel with its default attention, inference mode), with the weights of the shipped ONNX file. "shipped" is
the file as it is, int8 weights that are computed in float32; "float32" is the same file with its weights stored as
float32; "mixed" gives responses of 32 to 256 tokens to both. Sides run in turn, after a pause in which the threads of
the other fall asleep; a ratio is the median of those of the pairs. "others" is how many processors other processes kept
busy meanwhile: a row where that is above 0.1 is measured again, twice at most, since PyTorch's threads wait for one
another. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402

from aisp_local.rewards import OnnxReward  # noqa: E402

FOLDER = ROOT / "reward_models" / "story-reward"
PROMPT = "Tell me a story about a fox and a bear who look for honey in the forest."
WORDS = ("the", "fox", "ran", "to", "river", "and", "saw", "old", "trees", "where", "friends", "lived", "all", "day")
PAUSE = 0.3  # seconds; OpenMP's threads spin for 0.2 after their work
QUIET, TRIES = 0.1, 3  # processors that others may keep busy, or the row is measured again
AT_LEAST = 32  # responses a measurement: small batches are scored several times in a row
PARTS = {
    "q": "attention.self.query",
    "k": "attention.self.key",
    "v": "attention.self.value",
    "attention_out": "attention.output.dense",
    "up": "intermediate.dense",
    "down": "output.dense",
}


def weights(path: Path) -> dict[str, np.ndarray]:
    """The float32 weights of the shipped file, by name; matrices [in, out]."""
    import onnx
    from onnx import numpy_helper

    stored = {t.name: numpy_helper.to_array(t) for t in onnx.load(path).graph.initializer}
    found = {name: array for name, array in stored.items() if not name.endswith((".int8", ".scale"))}
    for name, array in stored.items():
        if name.endswith(".int8"):
            whole = name.removesuffix(".int8")
            found[whole] = array.astype(np.float32) * stored[f"{whole}.scale"]
    return found


class TorchReward:
    """The reward in transformers: BertModel, mean over the tokens, the head."""

    def __init__(self, w: dict[str, np.ndarray], tokenizer: Path, max_length: int) -> None:
        import torch
        import transformers

        layers = sum(name.endswith(".up.weight") for name in w)
        config = transformers.BertConfig(
            vocab_size=len(w["words"]),
            hidden_size=w["words"].shape[1],
            num_hidden_layers=layers,
            num_attention_heads=12,
            intermediate_size=w["layers.0.up.bias"].shape[0],
            max_position_embeddings=len(w["positions"]),
        )
        state = {
            "embeddings.word_embeddings.weight": w["words"],
            "embeddings.position_embeddings.weight": w["positions"],
            "embeddings.token_type_embeddings.weight": w["types"],
        }
        for part in ("weight", "bias"):
            state[f"embeddings.LayerNorm.{part}"] = w[f"norm.{part}"]
            for i in range(layers):
                ours, theirs = f"layers.{i}", f"encoder.layer.{i}"
                for a, b in PARTS.items():
                    state[f"{theirs}.{b}.{part}"] = w[f"{ours}.{a}.{part}"].T
                state[f"{theirs}.attention.output.LayerNorm.{part}"] = w[f"{ours}.attention_norm.{part}"]
                state[f"{theirs}.output.LayerNorm.{part}"] = w[f"{ours}.norm.{part}"]
        self.model = transformers.BertModel(config, add_pooling_layer=False)
        self.model.load_state_dict({k: torch.from_numpy(np.array(v)) for k, v in state.items()})
        self.model.eval()
        self.dense = [torch.from_numpy(np.array(w[f"dense.{part}"])) for part in ("weight", "bias")]
        self.last = [torch.from_numpy(np.array(w[f"score.{part}"])) for part in ("weight", "bias")]
        self.tokenizer = transformers.PreTrainedTokenizerFast(
            tokenizer_file=str(tokenizer), pad_token="[PAD]", model_input_names=list(INPUTS)
        )
        self.max_length = max_length

    def score(self, prompt: str, responses: Sequence[str]) -> np.ndarray:
        import torch

        batch = self.tokenizer(
            [prompt] * len(responses),
            list(responses),
            padding=True,
            truncation="only_second",
            max_length=self.max_length,
            return_tensors="pt",
        )
        with torch.inference_mode():
            hidden = self.model(**batch).last_hidden_state
            mask = batch["attention_mask"][:, :, None].float()
            pooled = (hidden * mask).sum(1) / mask.sum(1)
            return (torch.tanh(pooled @ self.dense[0] + self.dense[1]) @ self.last[0] + self.last[1])[:, 0].numpy()


INPUTS = ("input_ids", "attention_mask", "token_type_ids")


def float32_folder(into: Path) -> Path:
    """The shipped reward with its weights stored as float32: the same graph without the steps that widen them."""
    import onnx
    from onnx import numpy_helper

    model = onnx.load(FOLDER / "model.onnx")
    stored = {t.name: t for t in model.graph.initializer}
    kept = [t for t in model.graph.initializer if not t.name.endswith((".int8", ".scale"))]
    kept += [numpy_helper.from_array(a, n) for n, a in weights(FOLDER / "model.onnx").items() if f"{n}.int8" in stored]
    new: dict[str, str] = {}  # value -> the float32 tensor that it is, or what it is gathered from
    nodes = []
    for node in model.graph.node:
        source = node.input[0]
        if node.op_type == "Cast" and source.endswith(".int8"):
            new[node.output[0]] = source.removesuffix(".int8")
        elif node.op_type == "Gather" and source.endswith(".int8"):
            name = source.removesuffix(".int8")
            nodes.append(onnx.helper.make_node("Gather", [name, node.input[1]], [node.output[0] + "_wide"], axis=0))
            new[node.output[0]] = node.output[0] + "_wide"
        elif (node.op_type == "Gather" and source.endswith(".scale")) or (node.op_type == "Cast" and source in new):
            new[node.output[0]] = new.get(source, "")
        elif node.op_type == "Mul" and source in new:
            new[node.output[0]] = new[source]
        else:
            for i, name in enumerate(node.input):
                node.input[i] = new.get(name, name)
            nodes.append(node)
    del model.graph.node[:], model.graph.initializer[:]
    model.graph.node.extend(nodes)
    model.graph.initializer.extend(kept)
    onnx.checker.check_model(model)
    onnx.save(model, str(into / "model.onnx"))
    (into / "tokenizer.json").write_bytes((FOLDER / "tokenizer.json").read_bytes())
    manifest = json.loads((FOLDER / "reward.json").read_text(encoding="utf-8"))
    manifest["files"]["model.onnx"] = hashlib.sha256((into / "model.onnx").read_bytes()).hexdigest()
    (into / "reward.json").write_text(json.dumps(manifest), encoding="utf-8")
    return into


def responses(reward: OnnxReward, lengths: Sequence[int]) -> list[str]:
    """Texts that with the prompt are so many tokens."""
    rng = random.Random(0)
    found = []
    empty = reward.lengths(PROMPT, [""])[0]
    for length in lengths:
        text = " ".join(rng.choice(WORDS) for _ in range(length - empty))  # every word is one token
        assert reward.lengths(PROMPT, [text]) == [length]
        found.append(text)
    return found


def paired(sides: Sequence[Callable[[], Any]], repeats: int) -> np.ndarray:
    """Seconds [repeats, 2] of two sides, in turned order; the first round is not counted."""
    seconds = np.zeros((repeats + 1, 2))
    for i in range(repeats + 1):
        for side in (0, 1) if i % 2 else (1, 0):
            time.sleep(PAUSE)
            began = time.perf_counter()
            sides[side]()
            seconds[i, side] = time.perf_counter() - began
    return seconds[1:]


def others(since: tuple[float, float, float] | None = None) -> tuple[float, float, float]:
    """Seconds of all processors that are busy, of this process, and of the clock, since then (Linux; else zeros)."""
    try:
        ticks = [int(n) for n in Path("/proc/stat").read_text(encoding="ascii").split("\n", 1)[0].split()[1:9]]
    except OSError:
        return 0.0, 0.0, 1.0
    busy = (sum(ticks) - ticks[3] - ticks[4]) / os.sysconf("SC_CLK_TCK")  # all but idle and waiting for a disk
    now = (busy, time.process_time(), time.perf_counter())
    return now if since is None else (now[0] - since[0], now[1] - since[1], now[2] - since[2])


def compare(title: str, ours: OnnxReward, theirs: TorchReward, texts: Sequence[str], repeats: int) -> dict[str, Any]:
    """One line of the table."""
    apart = float(np.abs(ours.score(PROMPT, texts) - theirs.score(PROMPT, texts)).max())
    if apart > 1e-3:
        raise SystemExit(f"error: the sides do not compute the same: scores differ by {apart:.2g}")
    calls = max(1, AT_LEAST // len(texts))

    def run(reward: OnnxReward | TorchReward) -> None:
        for _ in range(calls):
            reward.score(PROMPT, texts)

    for _ in range(TRIES):
        since = others()
        seconds = paired([lambda: run(ours), lambda: run(theirs)], repeats)
        busy, own, passed = others(since)
        load = max(0.0, (busy - own) / passed)
        if load <= QUIET:
            break
    ratios = seconds[:, 1] / seconds[:, 0]
    ours_rate, theirs_rate = calls * len(texts) / np.median(seconds, axis=0)
    ratio, low, high = float(np.median(ratios)), float(ratios.min()), float(ratios.max())
    spread = f"{ratio:.2f} ({low:.2f} to {high:.2f})"
    print(f"| {title} | {ours_rate:.1f} | {theirs_rate:.1f} | {spread} | {load:.2f} |", flush=True)
    rates = {"ours": ours_rate, "torch": theirs_rate, "ratio": ratio, "low": low, "high": high}
    return {"case": title, **rates, "others": load}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=["shipped", "float32", "mixed"])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4, 16, 64])
    parser.add_argument("--lengths", type=int, nargs="+", default=[32, 64, 128, 256])
    options = parser.parse_args()
    try:
        import torch
        import transformers
    except ImportError as error:
        parser.error(f"{error}; install it with: pip install torch transformers onnx")
    chosen = options.only or ["shipped", "float32", "mixed"]
    shipped = OnnxReward.load(FOLDER, providers=["CPUExecutionProvider"])
    theirs = TorchReward(weights(FOLDER / "model.onnx"), FOLDER / "tokenizer.json", shipped.manifest.max_length)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, transformers {transformers.__version__}")
    print("\n| case | scores/s here | scores/s torch | ratio (least to most) | others |\n|---|---|---|---|---|")
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for kind in (kind for kind in ("shipped", "float32") if kind in chosen):
            path = FOLDER if kind == "shipped" else float32_folder(Path(folder))
            ours = OnnxReward.load(path, providers=["CPUExecutionProvider"])
            for length in options.lengths:
                for n in options.batches:
                    texts = responses(ours, [length] * n)
                    title = f"{kind}, {n} x {length} tokens"
                    rows.append(compare(title, ours, theirs, texts, options.repeats))
    if "mixed" in chosen:
        rng = random.Random(1)
        for n in options.batches[1:]:
            texts = responses(shipped, [rng.randint(32, 256) for _ in range(n)])
            rows.append(compare(f"shipped, {n} of 32 to 256 tokens", shipped, theirs, texts, options.repeats))
    print(json.dumps({"processors": os.cpu_count(), "rows": rows}))


if __name__ == "__main__":
    main()
