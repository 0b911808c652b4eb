"""How close exported rewards are to their models in PyTorch: by architecture and precision, in values and in order.

    python benchmarks/export_parity.py [--only Llama] [--json FILE]

Makes a small model with random weights and a tokenizer of its own for each architecture, exports it in each
precision, loads the folder with OnnxReward and compares it with transformers, each text alone and without padding.
Random weights are the worst case for few bits. The last model has trained weights: those of the shipped reward, as
a BertForSequenceClassification (which pools at its first token where the shipped one takes the mean, so its scores
are not the shipped reward's). Needs: pip install 'aisp-local[export]'.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

import hf_models  # noqa: E402

from aisp_local import shipped  # noqa: E402
from aisp_local.files import check_output, write_output  # noqa: E402
from aisp_local.reward_kit.export import PRECISIONS, export_reward  # noqa: E402
from aisp_local.reward_kit.export.parity import LIMITS  # noqa: E402
from aisp_local.reward_kit.export.quiet import quiet  # noqa: E402
from aisp_local.reward_kit.export.source import need  # noqa: E402
from aisp_local.rewards import OnnxReward  # noqa: E402

SHIPPED = "Bert (shipped weights)"


def shipped_weights() -> dict[str, np.ndarray[Any, Any]]:
    """float32 arrays of the shipped ONNX file, by name; matrices of layers [in, out]."""
    import onnx
    from onnx import numpy_helper

    stored = {t.name: numpy_helper.to_array(t) for t in onnx.load(shipped.reward() / "model.onnx").graph.initializer}
    whole = {}
    for name, values in stored.items():
        if name.endswith(".int8"):
            scale = stored[f"{name.removesuffix('.int8')}.scale"]
            whole[name.removesuffix(".int8")] = values.astype(np.float32) * scale
        elif not name.endswith(".scale"):
            whole[name] = values
    return whole


def write_shipped(folder: Path) -> Path:
    """The shipped reward's weights as a Hugging Face folder."""
    with quiet():
        import torch
        from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

        weights = shipped_weights()
        positions = len(weights["positions"])
        model = BertForSequenceClassification(
            BertConfig(
                vocab_size=30522,
                hidden_size=384,
                num_hidden_layers=6,
                num_attention_heads=12,
                intermediate_size=1536,
                max_position_embeddings=positions,
                num_labels=1,
            )
        )
        names = {
            "attention_out": "attention.output.dense",
            "attention_norm": "attention.output.LayerNorm",
            "up": "intermediate.dense",
            "down": "output.dense",
            "norm": "output.LayerNorm",
            "q": "attention.self.query",
            "k": "attention.self.key",
            "v": "attention.self.value",
        }
        state = {
            "bert.embeddings.word_embeddings.weight": weights["words"],
            "bert.embeddings.position_embeddings.weight": weights["positions"],
            "bert.embeddings.token_type_embeddings.weight": weights["types"],
        }
        for part in ("weight", "bias"):
            state[f"bert.embeddings.LayerNorm.{part}"] = weights[f"norm.{part}"]
            state[f"bert.pooler.dense.{part}"] = weights[f"dense.{part}"].T
            state[f"classifier.{part}"] = weights[f"score.{part}"].T
            for i in range(6):
                for ours, theirs in names.items():
                    state[f"bert.encoder.layer.{i}.{theirs}.{part}"] = weights[f"layers.{i}.{ours}.{part}"].T
        tensors = {name: torch.from_numpy(np.ascontiguousarray(values)) for name, values in state.items()}
        missing, unexpected = model.load_state_dict(tensors, strict=False)
        assert not unexpected and set(missing) <= {"bert.embeddings.position_ids"}, (missing, unexpected)
        model.save_pretrained(folder)
        PreTrainedTokenizerFast(
            tokenizer_file=str(shipped.reward() / "tokenizer.json"),
            model_max_length=256,
            pad_token="[PAD]",
            cls_token="[CLS]",
            sep_token="[SEP]",
            unk_token="[UNK]",
        ).save_pretrained(folder)
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description="Parity of exported rewards, by architecture and precision.")
    parser.add_argument("--only", action="append", choices=[*hf_models.FAMILIES, SHIPPED], help="these alone")
    parser.add_argument("--json", type=Path, help="write the numbers to this file too")
    options = parser.parse_args()
    if options.json is not None:
        check_output(options.json)
    need()
    print("| architecture | input | precision | MB | export | max | mean | Kendall's tau | same order | by default |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    results = []
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        for family in options.only or [*hf_models.FAMILIES, SHIPPED]:
            source = root / family
            if family == SHIPPED:
                write_shipped(source)
            else:
                hf_models.write(source, family)
            for precision in PRECISIONS:
                started = time.monotonic()
                # The order has a limit that no option lifts; here the numbers count, whatever they are.
                most, least = LIMITS[precision]
                LIMITS[precision] = (np.inf, 0.0)
                done = export_reward(source, root / "out", precision=precision, force=True)
                LIMITS[precision] = (most, least)
                seconds = time.monotonic() - started
                OnnxReward.load(root / "out")
                parity = done.parity
                worst, mean = parity.max_abs / parity.spread, parity.mean_abs / parity.spread
                verdict = "written" if worst <= most and parity.agreement >= least else "refused"
                numbers = f"{worst:.2g} | {mean:.2g} | {parity.kendall_tau:.3f} | {parity.agreement:.1%}"
                size = f"{done.n_bytes / 1e6:.2f} | {seconds:.1f} s"
                print(f"| {family} | {done.kind} | {precision} | {size} | {numbers} | {verdict} |", flush=True)
                results.append({"architecture": family, "seconds": seconds, "bytes": done.n_bytes, **asdict(parity)})
    if options.json is not None:
        write_output(options.json, json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
