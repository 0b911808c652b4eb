"""Measure the finished GGUF file on the validation split and fill in its model card.

Example: python models/training/evaluate.py --model models/storyteller/storyteller.gguf \
    --data DIR --card models/storyteller/README.md
"""

from __future__ import annotations

import argparse
import math
import random
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
if find_spec("torch") is None:
    raise SystemExit("this needs torch, which is not installed: pip install '.[train]'")

import torch  # noqa: E402
from llama_cpp import Llama  # noqa: E402
from tokenizers import Tokenizer  # noqa: E402

from training.batches import encode  # noqa: E402
from training.corpus import read_chat, read_rows  # noqa: E402
from training.export import read_gguf  # noqa: E402
from training.loop import validation_loss  # noqa: E402
from training.network import Network  # noqa: E402
from training.tokenizer import TURN_END, render_prompt  # noqa: E402

BEGIN, END = "<!-- begin figures -->", "<!-- end figures -->"
CLOSE = 0.5  # logits: llama.cpp rounds activations to eight bits, too


@dataclass(frozen=True)
class Story:
    """An answer sampled through llama.cpp; `ended` says that it ended by itself."""

    prompt: str
    text: str
    tokens: int
    ended: bool


def kind_of(prompt: str) -> str:
    """Which of the corpus' three kinds of prompt this is."""
    if prompt.startswith("Finish"):
        return "finish"
    return "words" if "uses the words" in prompt else "about"


def sample_stories(model: Llama, prompts: Sequence[str], temperature: float, max_tokens: int, seed: int) -> list[Story]:
    """Plain sampling, nothing but the temperature; prompt i has the seed `seed` + i."""
    stories = []
    for index, prompt in enumerate(prompts):
        answer = model.create_chat_completion(
            [{"role": "user", "content": prompt}],
            max_tokens=max_tokens,
            temperature=temperature,
            top_k=0,
            top_p=1.0,
            min_p=0.0,
            repeat_penalty=1.0,
            seed=seed + index,
        )
        choice = answer["choices"][0]
        stories.append(
            Story(
                prompt,
                choice["message"]["content"],
                answer["usage"]["completion_tokens"],
                choice["finish_reason"] == "stop",
            )
        )
    return stories


def words_used(stories: Sequence[Story]) -> tuple[float, float]:
    """Share of requested words that occur as whole words, and of answers that have them all."""
    found = []
    for story in stories:
        if kind_of(story.prompt) == "words":
            wanted = re.findall(r"[a-z']+", story.prompt.split("the words")[1].replace(" and ", " "))
            text = set(re.findall(r"[a-z']+", story.text.lower()))
            found.append([word in text for word in wanted])
    return sum(map(sum, found)) / sum(map(len, found)), sum(map(all, found)) / len(found)


def name_used(stories: Sequence[Story]) -> float:
    """Share of the names asked for ("a girl named Lily") that the story has."""
    found = []
    for story in stories:
        if kind_of(story.prompt) == "about":
            for name in re.findall(r"(?:named|called) ([A-Z][a-z]+)", story.prompt):
                found.append(name in story.text)
    return sum(found) / len(found)


def same_tokens(model: Llama, tokenizer: Tokenizer, texts: Sequence[str]) -> int:
    """How many texts llama.cpp and `tokenizers` cut alike."""
    return sum(
        model.tokenize(text.encode(), add_bos=False, special=True) == tokenizer.encode(text).ids for text in texts
    )


@torch.no_grad()
def largest_difference(model: Llama, network: Network, tokenizer: Tokenizer, texts: Sequence[str]) -> float:
    """Largest difference of a logit between llama.cpp and this package's network."""
    worst = 0.0
    for text in texts:
        tokens = tokenizer.encode(text).ids[:256]
        model.reset()
        model.eval(tokens)
        theirs = torch.from_numpy(model.scores[: len(tokens)].copy())
        worst = max(worst, float((theirs - network(torch.tensor([tokens]))[0]).abs().max()))
    return worst


def quote(story: Story) -> str:
    """One sample as Markdown."""
    lines = [f"> {line}" if line else ">" for line in story.text.splitlines()]
    note = "" if story.ended else " (cut at the token limit)"
    return f"**{story.prompt}**{note}\n\n" + "\n".join(lines)


def fill_card(path: Path, figures: str) -> None:
    """Replace what stands between the card's two marks."""
    card = path.read_text(encoding="utf-8")
    if BEGIN not in card or END not in card:
        raise SystemExit(f"error: {path} lacks the marks {BEGIN} and {END}.")
    head, tail = card.split(BEGIN)[0], card.split(END)[1]
    path.write_text(f"{head}{BEGIN}\n{figures}\n{END}{tail}", encoding="utf-8")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True, help="GGUF file")
    parser.add_argument("--data", type=Path, required=True, help="folder that holds lm/ and prompts/")
    parser.add_argument("--prompts", type=int, default=150)
    parser.add_argument("--temperature", type=float, default=0.6)
    parser.add_argument("--max-tokens", type=int, default=400)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--card", type=Path, help="model card whose figures are replaced")
    return parser.parse_args()


def main() -> None:
    options = parse_arguments()
    network, tokenizer = read_gguf(options.model)
    model = Llama(str(options.model), n_ctx=512, n_threads=options.threads, logits_all=True, verbose=False)
    chat = read_chat(options.data, "valid")
    documents = encode(tokenizer, chat, network.shape.context)
    kept = [d for d in documents if d.tokens[-1] == TURN_END]
    loss, count = validation_loss(network, kept)
    answers = [tokenizer.decode(d.tokens[d.prompt :]) for d in kept]
    bits = loss * count / math.log(2) / sum(len(answer.encode()) for answer in answers)

    texts = [render_prompt(e.prompt) + e.answer for e in chat[:200]]
    alike = same_tokens(model, tokenizer, texts)
    difference = largest_difference(model, network, tokenizer, texts[:10])
    if alike < len(texts) or difference > CLOSE:
        raise SystemExit(
            f"error: llama.cpp cuts {alike} of {len(texts)} texts alike and its logits differ by "
            f"up to {difference:.3g}: the file does not hold the network that was trained."
        )

    rows = read_rows(options.data / "prompts" / "story_valid.jsonl")
    prompts = [row["prompt"][0]["content"] for row in rows]
    prompts = random.Random(options.seed).sample(prompts, min(options.prompts, len(prompts)))
    stories = sample_stories(model, prompts, options.temperature, options.max_tokens, options.seed)
    each, every = words_used(stories)
    kinds = [kind_of(prompt) for prompt in prompts]
    mean = sum(story.tokens for story in stories) / len(stories)
    figures = f"""\
| figure | value |
|---|---|
| parameters | {network.parameter_count():,} |
| validation loss, nats a token ({count:,} tokens of {len(kept)} answers) | {loss:.3f} |
| the same in bits a byte of answer | {bits:.3f} |
| answers that end by themselves within {options.max_tokens} tokens | \
{sum(s.ended for s in stories) / len(stories):.0%} of {len(stories)} |
| mean length of an answer, tokens | {mean:.0f} |
| requested words that occur ({kinds.count("words")} "use the words" prompts) | {each:.0%} |
| answers that have all three words | {every:.0%} |
| requested names that occur ("about" prompts that give a name) | {name_used(stories):.0%} |
| texts that llama.cpp and the `tokenizers` library cut alike | {alike} of {len(texts)} |
| largest difference of a logit, llama.cpp against PyTorch | {difference:.4f} |

The first two figures are over the answers of `story_chat.valid` and their end of turn, given the
prompt; answers that do not fit into {network.shape.context} tokens are left out. The samples come \
from {len(prompts)} prompts of
`story_valid` ({kinds.count("about")} about, {kinds.count("words")} words, \
{kinds.count("finish")} finish), drawn with seed {options.seed}, through llama.cpp at temperature
{options.temperature} with no other sampler.

## Samples

The first ten of these answers, unselected.

""" + "\n\n".join(quote(story) for story in stories[:10])
    print(figures)
    if options.card:
        fill_card(options.card, figures)


if __name__ == "__main__":
    main()
