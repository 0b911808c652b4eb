"""Train the shipped reward model and write its folder.

Example: python reward_models/train.py --data DIR --samples samples.train.jsonl --minutes 45
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
if find_spec("torch") is None:
    raise SystemExit("this needs torch, which is not installed: pip install '.[train]'")

import numpy as np  # noqa: E402
import torch  # noqa: E402
from tokenizers import Tokenizer  # noqa: E402

from reward_models.training.encoder import (  # noqa: E402
    RewardNetwork,
    Shape,
    backbone_folder,
    collate,
    encode,
    load_backbone,
    load_tokenizer,
    read_safetensors,
)
from reward_models.training.export import build_model, run_graph, write_folder  # noqa: E402
from reward_models.training.loop import Plan, train  # noqa: E402
from reward_models.training.pairs import (  # noqa: E402
    Pair,
    held_out_material,
    training_material,
    training_pairs,
)
from reward_models.training.sources import Story, read_samples  # noqa: E402
from reward_models.training.wordpiece import train_wordpiece  # noqa: E402

GOLDEN = (
    (
        "Tell me a story about a dog.",
        "Once upon a time, there was a little dog named Max. Max liked to play in the park. One day "
        "he found a red ball and gave it back to a sad girl. The girl smiled, and they were friends.",
    ),
    (
        "Tell me a story about a dog.",
        "Once upon a time, there was a little dog named Max. Max liked the park. Max liked the park. "
        "Max liked the park. Max liked the park. Max liked the park.",
    ),
    (
        "Tell me a story about a dog.",
        "The rocket flew to the moon. Anna ate soup and the",
    ),
    ("What should I do today?", "You could call a friend and ask how they are."),
    ("What should I do today?", "Nobody likes you. Go away, you stupid idiot."),
)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder of preference/, lm/, labelled/")
    parser.add_argument("--samples", type=Path, help="the storyteller's answers (file or folder)")
    parser.add_argument("--model", type=Path, help="storyteller that writes the answers itself")
    parser.add_argument("--sample-count", type=int, default=6000, help="answers that it writes")
    parser.add_argument("--out", type=Path, default=ROOT / "reward_models" / "story-reward")
    parser.add_argument("--work", type=Path, help="folder for checkpoints (default: build/NAME)")
    parser.add_argument("--pairs", type=int, default=40_000, help="pairs drawn; the time ends the pass over them")
    parser.add_argument("--minutes", type=float, default=45.0, help="time limit of the training")
    parser.add_argument("--frozen-layers", type=int, default=Plan.frozen_layers, help="lowest layers kept as they are")
    parser.add_argument("--rate", type=float, default=Plan.rate, help="learning rate of the encoder")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, help="of PyTorch (default: all cores)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--start", type=Path, help="checkpoint of an earlier run to start from")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint")
    parser.add_argument("--smoke", action="store_true", help="a tiny run through every step, without the backbone")
    return parser.parse_args()


def own_samples(options: argparse.Namespace, work: Path, split: str, n: int) -> list[Story]:
    """The storyteller's answers of a split: given, or written now by the given storyteller."""
    path: Path | None = options.samples
    if path is None and options.model is not None:
        path = work / f"samples.{split}.jsonl"
        if not path.is_file():
            script = ROOT / "models" / "training" / "sample.py"
            command = [sys.executable, script, "--model", options.model, "--data", options.data]
            command += ["--split", split, "--n", str(n), "--out", path]
            subprocess.run([str(part) for part in command], check=True)
    if path is not None and path.is_dir():
        path = path / f"samples.{split}.jsonl"
    if path is None:
        print("no --samples and no --model: training without the storyteller's own answers")
        return []
    return read_samples(path)


def smoke_network(pairs: list[Pair]) -> tuple[RewardNetwork, Tokenizer]:
    """A random one-layer encoder with a small vocabulary."""
    tokenizer = train_wordpiece([pair.chosen for pair in pairs], 600)
    shape = Shape(tokenizer.get_vocab_size(), width=48, layers=1, heads=4, feed_forward=96)
    return RewardNetwork(shape), tokenizer


def full_network() -> tuple[RewardNetwork, Tokenizer]:
    """MiniLM-L6 and its tokenizer."""
    folder = backbone_folder()
    network = RewardNetwork(Shape())
    load_backbone(network, read_safetensors(folder / "model.safetensors"))
    return network, load_tokenizer(folder / "tokenizer.json")


def check_export(network: RewardNetwork, tokenizer: Tokenizer, pairs: list[Pair]) -> None:
    """Compare PyTorch, the float graph and the int8 graph, and time both graphs on one core."""
    sequences = encode(
        tokenizer,
        [pair.prompt for pair in pairs for _ in range(2)],
        [text for pair in pairs for text in (pair.chosen, pair.rejected)],
    )
    batches = [collate(sequences[i : i + 16]) for i in range(0, len(sequences), 16)]
    with torch.no_grad():
        expected = np.concatenate([network(*batch).numpy() for batch in batches])
    print(f"scores of {len(pairs)} held-out pairs: standard deviation {expected.std():.3f}")
    for name, quantised in (("float32", False), ("int8 weights", True)):
        model = build_model(network, quantised).SerializeToString()
        found, seconds = run_graph(model, batches)
        same = ((found[::2] > found[1::2]) == (expected[::2] > expected[1::2])).mean()
        print(
            f"{name}: {len(model) / 1e6:.1f} MB, largest difference to PyTorch "
            f"{np.abs(found - expected).max():.2g}, same ranking {same:.1%}, "
            f"{len(sequences) / seconds:.0f} texts/s"
        )


def main() -> None:
    options = parse_arguments()
    if options.threads:
        torch.set_num_threads(options.threads)
    work = options.work or ROOT / "build" / options.out.resolve().name
    for folder in (options.out, work):
        folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(options.seed)

    count = 40 if options.smoke else options.sample_count
    material = training_material(options.data, own_samples(options, work, "train", count))
    n_pairs = 160 if options.smoke else options.pairs
    pairs = training_pairs(material, n_pairs, options.seed)
    network, tokenizer = smoke_network(pairs) if options.smoke else full_network()
    if options.start:
        state = torch.load(options.start, map_location="cpu", weights_only=True)
        network.load_state_dict(state["network"])
    plan = Plan(
        minutes=options.minutes,
        rate=options.rate,
        frozen_layers=0 if options.smoke else options.frozen_layers,
        seed=options.seed,
        limit=64 if options.smoke else Plan.limit,
    )
    held_out = training_pairs(held_out_material(options.data, []), 40 if options.smoke else 240, options.seed + 1)
    minutes = train(
        network,
        tokenizer,
        pairs,
        plan,
        work,
        held_out=held_out,
        device=options.device,
        resume=options.resume,
    )
    print(f"trained for {minutes:.1f} minutes")
    network.cpu()
    check_export(network, tokenizer, held_out[:40])
    write_folder(work / "float", network, tokenizer, GOLDEN, quantised=False)
    write_folder(options.out, network, tokenizer, GOLDEN)
    size = (options.out / "model.onnx").stat().st_size
    print(f"wrote {options.out} (model.onnx: {size} bytes)")


if __name__ == "__main__":
    main()
