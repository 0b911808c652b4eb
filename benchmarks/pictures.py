"""Pictures for docs: a real search, one real step of it, one of its iterations by blocks, and the layers of the code.

    python benchmarks/pictures.py [--out docs] [--threads 1]

The shipped model answers one prompt with the shipped reward; two minutes on two cores.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from aisp_local import Aligner, Controls, Result, controllers, svg
from aisp_local.engine import LlamaEngine
from aisp_local.files import write_output
from aisp_local.rewards.base import call_prefixes
from aisp_local.seeds import RowSeeds
from aisp_local.types import FloatArray, Message

PROMPT: list[Message] = [{"role": "user", "content": "Tell me a story about a fox."}]
BUDGET, ROWS, MAX_TOKENS, SEED = 384, 32, 160, 0

LAYERS = [
    ("cli   |   server", "what people and clients type and send"),
    ("api", "Aligner: load once, then generate and chat"),
    ("loop", "one search: budget, iterations, limits, the best so far"),
    ("controllers   |   engine   |   rewards", "propose and learn   |   decode   |   judge"),
    ("native", "the patched llama.cpp, the binding, the callback for others"),
    ("types, errors", "the values that cross the seams"),
]


def searched(found: Result, sampled: Result) -> str:
    """Rewards of all rollouts by iteration, and the best so far beside that of best-of-n."""
    rewards = [c.reward for c in found.candidates]
    others = [s.best_so_far for s in sampled.iterations]
    axes = svg.Axes(
        "Rewards of one search",
        (0.5, len(found.iterations) + 0.5, f"iteration of {ROWS} rollouts"),
        (min(rewards + others) - 1, max(rewards + others), "reward"),
    )
    for one in found.candidates:
        axes.dot(one.iteration + (one.row - (ROWS + 1) / 2) / (2.5 * ROWS), one.reward, 2, 0.45)
    axes.curve([(s.iteration, s.best_so_far) for s in found.iterations], 0)
    axes.curve([(s.iteration, s.mean) for s in found.iterations], 1)
    axes.curve([(s.iteration, s.best_so_far) for s in sampled.iterations], 2)
    axes.legend(["best so far", "mean", "best so far of best-of-n"])
    return axes.svg()


def selected(aligner: Aligner) -> str:
    """The rollouts of one iteration as they grow: the score of each at every pause, and which of them went on."""
    engine = aligner.engine
    controller = controllers.create("score", d=engine.d, max_tokens=MAX_TOKENS, seed=SEED, head=lambda: engine.head)
    paths: list[tuple[tuple[float, float], tuple[float, float], bytes]] = []  # from, to, what it is there
    ends: dict[bytes, tuple[float, float]] = {}
    went_on: set[bytes] = set()
    n = ROWS
    while n:
        controls = controller.ask(n)
        rollouts = engine.rollout(PROMPT, controls, max_tokens=MAX_TOKENS, seeds=RowSeeds(SEED))
        scores = call_prefixes(aligner.reward, PROMPT, rollouts.texts)
        controller.tell(rollouts, scores)
        begun = [prefix.tobytes() for prefix in controls.prefixes or ()]
        went_on.update(begun)
        keys = [tokens.tobytes() for tokens in rollouts.tokens]
        grown = [(float(len(tokens)), float(score)) for tokens, score in zip(rollouts.tokens, scores, strict=True)]
        paths += zip([ends[key] for key in begun] or grown, grown, keys, strict=True)
        ends = dict(zip(keys, grown, strict=True))
        n = rollouts.finish_reasons.count("paused")
    values = [end[1] for _, end, _ in paths]
    axes = svg.Axes(
        f"One iteration of {ROWS} rollouts, block by block",
        (0.0, float(MAX_TOKENS), "tokens"),
        (min(values), max(values), "reward of what there is"),
    )
    last = max(end[0] for _, end, _ in paths)
    for begin, end, key in sorted(paths, key=lambda path: path[2] in went_on):
        kept = key in went_on or end[0] == last
        axes.curve([begin, end], 0 if kept else 1)
        axes.dot(*end, 2, 0.8 if kept else 0.3)
    axes.legend(["gone on with", "ended here"])
    return axes.svg()


def stepped(engine: LlamaEngine, u: FloatArray) -> tuple[str, str]:
    """A step of the unaligned answer that the control u [d] changes: its plane, and its likeliest tokens."""
    head = engine.head
    out = engine.rollout(PROMPT, Controls(n=1), max_tokens=40, seeds=RowSeeds(0), want=frozenset({"prelogits"}))
    assert out.prelogits is not None
    z = out.prelogits[0]
    base, moved = head.law(z, 1.0), head.law(z + u, 1.0)
    # Much is moved, and several tokens are likely.
    step = int(np.argmax(np.abs(moved - base).sum(axis=1) * -(base * np.log(base)).sum(axis=1)))
    before, after = base[step], moved[step]
    text = " ".join(engine.text(out.tokens[0][:step]).split()[-6:])
    likely = {*np.argsort(-before)[:5].tolist(), *np.argsort(-after)[:5].tolist()}
    shown = sorted((t for t in likely if max(before[t], after[t]) > 0.01), key=lambda t: -before[t])
    names = {t: f"“{engine.text(np.array([t], np.int32)).strip()}”" for t in shown}

    # z, u and z + u lie in one plane, so that a logit is the inner product with what a row of W has in it, exactly.
    across = u / np.linalg.norm(u)
    rest = z[step] - (z[step] @ across) * across
    plane = np.stack([across, rest / np.linalg.norm(rest)])
    points = {t: plane @ head.take(np.array([t]))[0] for t in shown}
    arrows = np.stack([plane @ z[step], plane @ (z[step] + u)])
    arrows *= max(float(np.abs(p).max()) for p in points.values()) / float(np.abs(arrows).max())
    ends = np.concatenate([np.stack(list(points.values())), arrows, np.zeros((1, 2))])
    low, high = ends.min(axis=0), ends.max(axis=0)
    room = 0.12 * (high - low)
    axes = svg.Axes(
        f"One step: … {text} …",
        (float(low[0] - room[0]), float(high[0] + room[0]), "along the control"),
        (float(low[1] - room[1]), float(high[1] + room[1]), "along the rest of the pre-logit"),
    )
    for i, (arrow, name) in enumerate(zip(arrows, ("z", "z + v"), strict=True)):
        axes.curve([(0.0, 0.0), (float(arrow[0]), float(arrow[1]))], i)
        x, y = axes.at(float(arrow[0]), float(arrow[1]))
        # Beside each other, on whichever side of the other arrow this one lies.
        anchor = "end" if arrow[0] < arrows[1 - i][0] else "start"
        axes.parts.append(svg.draw_text(x, y - 6, name, anchor=anchor, size=13))
    for t, (px, py) in points.items():
        axes.dot(float(px), float(py), 2 + 14 * float(np.sqrt(after[t])), 0.5)
        x, y = axes.at(float(px), float(py))
        # Away from the arrows.
        left = px < 0
        axes.parts.append(svg.draw_text(x + (-8 if left else 8), y + 4, names[t], anchor="end" if left else "start"))

    bars = [svg.draw_title(f"The next word: … {text} …")]
    widest = max(float(before[shown].max()), float(after[shown].max()))
    for i, t in enumerate(shown):
        y = 50 + 30 * i
        bars.append(svg.draw_text(100, y + 12, names[t], anchor="end", size=13))
        for j, p in enumerate((before[t], after[t])):
            width = 300 * float(p) / widest
            bars.append(f'<rect class="bar-{j}" x="110" y="{y - 2 + 11 * j}" width="{width:.1f}" height="9"/>')
            bars.append(svg.draw_text(116 + width, y + 6 + 11 * j, f"{100 * p:.1f}%", anchor="start", size=9))
    bottom = 50 + 30 * len(shown)
    for j, name in enumerate(("the model", "under the control")):
        bars.append(f'<rect class="bar-{j}" x="{110 + 130 * j}" y="{bottom + 2}" width="10" height="10"/>')
        bars.append(svg.draw_text(126 + 130 * j, bottom + 11, name, anchor="start"))
    style = "<style>.bar-0 { fill: #718096 } .bar-1 { fill: #2b6cb0 }</style>"
    return axes.svg(), svg.document(bottom + 28, [style, *bars])


def layered() -> str:
    """Boxes, upper ones on lower ones."""
    parts = [svg.draw_title("Who may import whom: downwards only")]
    for i, (name, what) in enumerate(LAYERS):
        y = 40 + 58 * i
        parts.append(f'<rect class="frame" x="20" y="{y}" width="440" height="44" rx="4"/>')
        parts.append(svg.draw_text(240, y + 18, name, anchor="middle", size=14))
        parts.append(svg.draw_text(240, y + 35, what, anchor="middle"))
        if i:
            parts.append(svg.draw_text(240, y - 3, "↓", anchor="middle", size=12))
    return svg.document(40 + 58 * len(LAYERS), parts)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("docs"))
    parser.add_argument("--threads", type=int)
    asked = parser.parse_args(arguments)
    with Aligner.load(threads=asked.threads) as aligner:
        common = {"budget": BUDGET, "n": ROWS, "max_tokens": MAX_TOKENS, "seed": SEED}
        found = aligner.generate(PROMPT, **common)
        sampled = aligner.generate(PROMPT, method="best-of-n", **common)
        # A strong control, so that it can be seen, and no selection beside it.
        steered = aligner.generate(PROMPT, strength=0.8, selection=0.0, **common)
        assert steered.control is not None and isinstance(aligner.engine, LlamaEngine)
        plane, bars = stepped(aligner.engine, steered.control)
        blocks = selected(aligner)
    for name, picture in (
        ("how-search", searched(found, sampled)),
        ("how-plane", plane),
        ("how-step", bars),
        ("methods-blocks", blocks),
        ("inside-layers", layered()),
    ):
        write_output(asked.out / f"{name}.svg", picture)


if __name__ == "__main__":
    main()
