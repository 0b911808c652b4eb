"""A search that was written down, as a page for a person: what was found, how, with what, and in which time."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Sequence
from html import escape
from typing import Any

from aisp_local.report_plots import plots
from aisp_local.trace import Trace
from aisp_local.types import RESULT_STATUS
from aisp_local.webpage import html_document, html_table

_SHOWN = 20  # candidates with their texts
_OPEN = 3  # of them
_WORDS = 2000  # of a text, that are compared with another's


def report(trace: Trace) -> str:
    """HTML. Texts of models and of the file are text, never markup."""
    found = trace["result"]
    summary = (
        f"{_scores(found).capitalize()}, by {found['method']} with {len(found['candidates'])} of "
        f"{found['budget']} rollouts in {found['seconds']:.1f} s. {RESULT_STATUS[found['status']]}"
    )
    figures = [f"<figure>{svg}<figcaption>{escape(said)}</figcaption></figure>" for said, svg in plots(found)]
    return html_document(
        "A search, explained",
        [
            f"<p>{escape(summary)}</p>",
            "<h2>Prompt</h2>",
            *_prompt(trace["prompt"]),
            *_answers(found),
            "<h2>The search</h2>",
            f'<div class="beside">{"".join(figures)}</div>',
            *_candidates(found),
            "<h2>Iterations</h2>",
            _iterations(found["iterations"]),
            "<h2>What it was made with</h2>",
            html_table([], _settings(trace)),
        ],
    )


def _prompt(prompt: str | list[dict[str, str]]) -> list[str]:
    if isinstance(prompt, str):
        return [f"<blockquote>{escape(prompt)}</blockquote>"]
    return [f"<p>{escape(m['role'])}</p><blockquote>{escape(m['content'])}</blockquote>" for m in prompt]


def _answers(found: dict[str, Any]) -> list[str]:
    base, answer = found["baseline"], found["answer"]
    if base is None:
        return ["<h2>Answer</h2>", f"<blockquote>{escape(answer)}</blockquote>"]
    return [
        "<h2>Answer, and without alignment</h2>",
        '<div class="beside">',
        f"<div><p>aligned: {_scores(found)}</p><blockquote>{marked(answer, base['text'])}</blockquote></div>",
        f"<div><p>unaligned: {_scores(base)}</p><blockquote>{marked(base['text'], answer)}</blockquote></div>",
        "</div>",
    ]


def _candidates(found: dict[str, Any]) -> list[str]:
    """The best ones; words that the unaligned answer (else the aligned one) does not have are marked."""
    other = found["answer"] if found["baseline"] is None else found["baseline"]["text"]
    than = "the answer's" if found["baseline"] is None else "those of the unaligned answer"
    parts = [f"<h2>Candidates, best first</h2><p>Marked: words other than {than}.</p><ol>"]
    for i, c in enumerate(found["candidates"][:_SHOWN]):
        said = [_scores(c), f"iteration {c['iteration']}", f"{c['n_tokens']} tokens", c["finish_reason"]]
        said += [f"KL {_number(c['kl'])} nats"] if c["kl"] is not None else []
        said += [f"{name} {_number(score)}" for name, score in c["parts"].items()]
        text = f'<div class="text">{marked(c["text"], other)}</div>'
        fold = "<details open>" if i < _OPEN else "<details>"
        parts.append(f"<li>{fold}<summary>{escape(', '.join(said))}</summary>{text}</details></li>")
    left = len(found["candidates"]) - _SHOWN
    return [*parts, "</ol>", *([f"<p>{left} more are in the trace.</p>"] if left > 0 else [])]


def marked(text: str, other: str) -> str:
    """HTML of a text; words that another text does not have in that order are marked."""
    words, others = re.findall(r"\s+|\S+", text), re.findall(r"\s+|\S+", other)
    rest = "".join(words[_WORDS:])
    words = words[:_WORDS]
    kept = set[int]()
    for block in difflib.SequenceMatcher(None, words, others[:_WORDS], autojunk=False).get_matching_blocks():
        kept.update(range(block.a, block.a + block.size))
    shown = [
        escape(word) if i in kept or word.isspace() else f"<mark>{escape(word)}</mark>" for i, word in enumerate(words)
    ]
    return "".join(shown) + escape(rest)


def _iterations(iterations: Sequence[dict[str, Any]]) -> str:
    names = ["iteration", "n", "best", "mean", "std", "kl", "ess", "control_norm", "lambda", "n_tokens", "n_scored"]
    names += ["seconds", "decode_seconds", "reward_seconds", "update_seconds", "note"]
    heads = {"n": "rollouts", "kl": "KL", "ess": "ESS", "n_tokens": "tokens", "n_scored": "texts scored"}
    columns = [heads.get(name, name.replace("_", " ")) for name in names]
    return html_table(columns, [[_number(i[name]) for name in names] for i in iterations])


def _settings(trace: Trace) -> list[tuple[str, str]]:
    search, machine = dict(trace["search"]), dict(trace["machine"])
    options, steering = search.pop("options"), search.pop("steering")
    rows = [(name.replace("_", " "), _plain(value)) for name, value in search.items()]
    rows += [(f"option {name}", _plain(value)) for name, value in options.items()]
    rows.append(("steering", "-" if steering is None else f"{len(steering)} numbers"))
    for what in ("model", "reward", "judge"):
        if trace[what] is not None:
            rows += [(what, trace[what]["name"]), (f"{what}'s fingerprint", _plain(trace[what]["fingerprint"]))]
    rows += [("LoRA adapter", f"{lora['source']} x {lora['scale']:g}") for lora in trace["model"]["loras"]]
    calibration = trace["result"]["calibration"]
    if calibration is not None:
        rows += [
            (f"part {name}, on the base model", f"mean {part['mean']:.3f}, deviation {part['std']:.3f}")
            for name, part in calibration["parts"].items()
        ]
    versions = machine.pop("versions")
    rows += [(name.replace("_", " "), _plain(value)) for name, value in machine.items()]
    rows += [(name, version) for name, version in versions.items()]
    return [*rows, ("written", trace["created"])]


def _scores(of: dict[str, Any]) -> str:
    judge = "" if of["judge"] is None else f", judge {_number(of['judge'])}"
    return f"reward {_number(of['reward'])}{judge}"


def _number(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.2f}" if abs(value) < 1e6 else f"{value:.3g}"
    return "-" if value is None else str(value)


def _plain(value: Any) -> str:
    return "-" if value is None else value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
