"""An export from beginning to end."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from aisp_local.errors import ExportError, InputError
from aisp_local.files import check_output_folder, output_folder
from aisp_local.reward_kit.export import feed as feeds
from aisp_local.reward_kit.export import parity as parities
from aisp_local.reward_kit.export import source as sources
from aisp_local.reward_kit.export.feed import Feed
from aisp_local.reward_kit.export.network import Network
from aisp_local.reward_kit.export.quantise import PRECISIONS, Precision, rewrite
from aisp_local.reward_kit.export.source import Source
from aisp_local.reward_kit.export.texts import GOLDEN, PAIRS
from aisp_local.reward_kit.export.write import LARGEST_FILE, TOKENIZER, write_configs, write_manifest, write_model
from aisp_local.rewards import OnnxReward
from aisp_local.rewards.manifest import MANIFEST, Kind, Parity

# Of the spread of scores: how far other processors may be from the scores measured here.
_GOLDEN_TOLERANCE = 0.02


@dataclass(frozen=True)
class Exported:
    """What was written."""

    folder: Path
    architecture: str
    kind: Kind
    max_length: int
    n_bytes: int  # of all files
    parity: Parity


def export_reward(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    precision: Precision = "fp32",
    input: Kind | None = None,  # noqa: A002  # the option's name
    max_length: int | None = None,
    index: int | None = None,
    sign: int = 1,
    name: str | None = None,
    description: str | None = None,
    licence: str | None = None,
    tolerance: float | None = None,
    force: bool = False,
    say: Callable[[str], None] = lambda text: None,
    largest_file: int = LARGEST_FILE,
) -> Exported:
    """Turn a Hugging Face folder (or a name on the hub) of a sequence-classification model into a reward folder.

    ``input``: None is the tokenizer's chat template, for encoders without one a pair. ``index`` is the output to use,
    needed when there are several. ``tolerance``: greatest difference allowed between exported and original scores, as
    a part of their spread; None: by precision. ``force`` replaces an existing reward folder. ``say`` gets a line
    before each step that takes long, a download above all. Weights of more than ``largest_file`` bytes lie beside
    the model. No code that comes with a model is run.

    Raises InputError for what cannot be exported and ExportError when the result is too far from the model; ``out``
    is then as it was.
    """
    if precision not in PRECISIONS:
        raise InputError(f"precision {precision!r} is unknown; use one of {', '.join(PRECISIONS)}")
    if sign not in (-1, 1):
        raise InputError(f"sign {sign} is neither 1 nor -1")
    if tolerance is not None and not tolerance >= 0:
        raise InputError(f"the tolerance {tolerance} must be at least 0")
    target = Path(out)
    check_output_folder(target, MANIFEST, force)
    found = sources.find(os.fspath(source), say)
    if found.folder.resolve().is_relative_to(target.resolve()):
        raise InputError(f"{target} holds the model itself; choose another folder for the reward")
    sources.need()
    feed = feeds.read(found, input, max_length)
    say(f"reading {found.architecture}")
    network = Network(found)
    column = _column(network, index)
    with output_folder(target, MANIFEST, force) as folder:
        say("exporting")
        model = network.graph(feed.types)
        rewrite(model, precision)
        write_model(folder, model, largest_file)
        del model
        (folder / TOKENIZER).write_text(feed.plain_tokenizer().to_str(), encoding="utf-8")
        write_configs(folder, network.config(), feed.tokenizer_config())

        def describe(
            golden: list[tuple[str, str, float]] | None = None, tolerance: float = 0.01, parity: Parity | None = None
        ) -> OnnxReward:
            write_manifest(
                folder,
                feed,
                name=name or found.name,
                description=description or f"{found.architecture} {found.name}, {precision}",
                licence=licence or found.licence,
                pooling=_pooling(found),
                index=column,
                sign=sign,
                golden=golden or (),
                tolerance=tolerance,
                parity=parity,
            )
            return OnnxReward.load(folder, providers=["CPUExecutionProvider"])

        reward = describe()
        say("comparing with the model")
        parity = compare(reward, network, feed, precision)
        parities.check(parity, precision, tolerance)
        golden = [(prompt, response, float(reward.score(prompt, [response])[0])) for prompt, response in GOLDEN]
        del reward  # its file may be open, and a folder of open files cannot be renamed everywhere
        describe(golden, float(f"{_GOLDEN_TOLERANCE * parity.spread:.2g}"), parity)
        size = sum(file.stat().st_size for file in folder.iterdir())
    return Exported(target, found.architecture, feed.kind, feed.max_length, size, parity)


def compare(reward: OnnxReward, network: Network, feed: Feed, precision: Precision) -> Parity:
    """Parity of the whole way from text to score. Raises ExportError when already the tokens differ."""
    manifest = reward.manifest
    rows = []
    for prompt, response in PAIRS:
        ((ids, types),) = reward.tokens(prompt, [response])
        expected, kinds = feed.ids(prompt, response)
        if len(expected) <= feed.max_length and (ids != expected or (feed.types and types != kinds)):
            at = next((i for i, (a, b) in enumerate(zip(ids, expected, strict=False)) if a != b), len(expected))
            raise ExportError(
                f"the tokens of {response[:30]!r} are not those of transformers from place {at + 1} on (of "
                f"{len(expected)}): this tokenizer or chat template needs something that a reward folder cannot "
                "express; nothing was written: try another --input"
            )
        rows.append((ids, types))
    expected_scores = manifest.sign * network.scores(rows, feed.types)[:, manifest.index]
    found = np.array([float(reward.score(prompt, [response])[0]) for prompt, response in PAIRS])
    return parities.measure(precision, expected_scores, found)


def _column(network: Network, index: int | None) -> int:
    if index is None and network.columns > 1:
        names = ", ".join(f"{i} ({label})" for i, label in enumerate(network.labels))
        raise InputError(f"the model has {network.columns} outputs; choose the one to raise with --index: {names}")
    if not 0 <= (index or 0) < network.columns:
        raise InputError(f"--index {index} is not an output of the model; it has {network.columns}, counted from 0")
    return index or 0


def _pooling(source: Source) -> str:
    if source.decoder:
        return "last"
    return str(source.config.get("classifier_pooling", "cls")) if source.family == "ModernBert" else "cls"
