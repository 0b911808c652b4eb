"""A training from beginning to end: data, backbone, loop, export, evaluation, card."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from aisp_local import shipped
from aisp_local.errors import ExportError, InputError
from aisp_local.files import check_output_folder
from aisp_local.reward_kit.evaluate import Evaluation, evaluate
from aisp_local.reward_kit.export import feed as feeds
from aisp_local.reward_kit.export import source as sources
from aisp_local.reward_kit.export.quantise import Precision
from aisp_local.reward_kit.export.quiet import quiet
from aisp_local.reward_kit.export.run import Exported, export_reward
from aisp_local.reward_kit.statistics import Array, share_right, spearman, wilson
from aisp_local.reward_kit.train import backbone as backbones
from aisp_local.reward_kit.train.card import write_card
from aisp_local.reward_kit.train.examples import Columns, Comparison, Examples, read_examples
from aisp_local.reward_kit.train.loop import Encoded, Progress, State, Trainer
from aisp_local.reward_kit.train.plan import Plan
from aisp_local.reward_kit.train.work import WorkFolder
from aisp_local.rewards import OnnxReward
from aisp_local.rewards.manifest import MANIFEST, Kind

_HELD_OUT = 0.1
_LOOKED_AT = 600  # held-out comparisons, for early stopping: all of them are evaluated at the end
_LONGEST = 512  # tokens, unless asked otherwise: training grows with them


@dataclass(frozen=True)
class Outcome:
    """How the exported reward ranks held-out comparisons: share right (ties count half), 95% Wilson interval."""

    n: int
    share: float
    low: float
    high: float
    spearman: float | None  # of score and grade, for graded texts


@dataclass(frozen=True)
class Trained:
    """What came of a training."""

    folder: Path
    backbone: str
    n_train: int
    n_held_out: int
    state: State
    steps: int
    exported: Exported
    outcome: Outcome
    evaluation: Evaluation | None  # of preference pairs


def train_reward(
    data: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    backbone: str | os.PathLike[str] | None = None,
    held_out: str | os.PathLike[str] | None = None,
    columns: Columns | None = None,
    plan: Plan | None = None,
    random_weights: bool = False,
    input: Kind | None = None,  # noqa: A002  # the option's name
    max_length: int | None = None,
    precision: Precision = "int8",
    name: str | None = None,
    description: str | None = None,
    licence: str | None = None,
    work: str | os.PathLike[str] | None = None,
    resume: bool = False,
    restart: bool = False,
    device: str | None = None,
    force: bool = False,
    say: Callable[[str], None] = lambda text: None,
    on_progress: Callable[[Progress], None] = lambda progress: None,
) -> Trained:
    """Fine-tune an encoder (or a decoder) on comparisons, export it as a reward folder and evaluate it.

    ``data``: preference pairs or graded texts (``read_examples``); ``held_out``: more of the same, else a tenth of the
    data by its prompts. ``backbone``: a Hugging Face folder, a GGUF file or a reward folder; None: the shipped reward's
    network with a new head.
    ``work``: where the checkpoint lies while it runs, by default ``out`` with ".training" behind its name; ``resume``
    goes on from one, ``restart`` deletes it. ``device``: "cpu" or "cuda", by default the GPU where there is one.

    Raises InputError for data or options that cannot be used and ExportError when the exported reward is too far from
    the trained network, which is then kept in ``work``.
    """
    plan = plan or Plan()
    target = Path(out)
    check_output_folder(target, MANIFEST, force)
    folder = WorkFolder(target, work)
    folder.check(resume, restart)
    train, rest = _data(Path(data), Path(held_out) if held_out is not None else None, columns)
    sources.need()
    start = Path(backbone) if backbone is not None else shipped.reward()
    say(f"reading the backbone {start.name}")
    further = backbone is not None and (start / MANIFEST).is_file()
    network = backbones.load(start, new_head=not further, random_weights=random_weights, seed=plan.seed)
    with folder.held(resume):
        folder.save(lambda path: _save(network, path))
        source = sources.check(folder.model, network.name)
        kind = input if input is not None or not source.decoder else _decoder_input(network)
        feed = feeds.read(source, kind, max_length)
        if max_length is None and feed.max_length > _LONGEST:
            feed = feeds.read(source, feed.kind, _LONGEST)
        reader = OnnxReward(feed.manifest(), None, feed.plain_tokenizer())
        known: dict[tuple[str, str], tuple[list[int], list[int]]] = {}

        def encode(comparisons: Sequence[Comparison]) -> list[Encoded]:
            def tokens(side: tuple[object, str]) -> tuple[list[int], list[int]]:
                key = (json.dumps(side[0]), side[1])
                if key not in known:
                    known[key] = reader.tokens(side[0], [side[1]])[0]  # type: ignore[arg-type]
                return known[key]

            return [Encoded(tokens(c.better), tokens(c.worse)) for c in comparisons]

        later = rest.draw(plan.seed)
        if not later or not train.draw(plan.seed):
            raise InputError(
                f"{data} has too few rows: {len(train)} to train on and {len(rest)} held out make none on one side; "
                "give more, or a file of held-out rows"
            )
        chosen = torch_device(device)
        trainer = Trainer(
            network,
            plan,
            folder.path,
            fingerprint=_fingerprint(start, train, rest, plan, feed.kind, feed.max_length),
            device=chosen,
            types=feed.types,
            draw=lambda epoch: encode(train.draw(plan.seed * 1_000_003 + epoch)),
            held_out=encode(later[:_LOOKED_AT]),
            on_progress=on_progress,
        )
        if resume and not trainer.resume():
            raise InputError(f"{folder.path} holds no checkpoint to resume; begin without --resume")
        say(
            f"training on {len(train)} rows, {len(rest)} held out: {trainer.steps} steps of {plan.batch} comparisons "
            f"on {chosen}" + (f", from step {trainer.state.step}" if trainer.state.step else "")
        )
        state = trainer.run()
        network.model.to("cpu")
        folder.save(lambda path: _save(network, path))
        try:
            exported = export_reward(
                folder.model,
                target,
                precision=precision,
                input=feed.kind,
                max_length=feed.max_length,
                name=name or target.resolve().name,
                description=description,
                licence=licence or network.licence.replace("see README.md", f"see the card of {network.name}"),
                force=force,
                say=say,
            )
        except ExportError as error:
            better = " and a higher --precision" if precision != "fp32" else ""
            raise ExportError(
                f"{error}. The training is kept in {folder.path}: the same command with --resume{better} goes on to "
                "the export"
            ) from error
        say("evaluating")
        reward = OnnxReward.load(target, providers=["CPUExecutionProvider"])
        outcome, evaluation = _evaluate(reward, rest, later)
        done = Trained(target, network.name, len(train), len(rest), state, trainer.steps, exported, outcome, evaluation)
        write_card(done, reward.manifest, plan, Path(data), Path(held_out) if held_out is not None else None)
    return done


def torch_device(asked: str | None) -> str:
    """Raises InputError for a GPU that is not there."""
    import torch

    has = bool(torch.cuda.is_available())
    if asked == "cuda" and not has:
        raise InputError("PyTorch sees no GPU here; use --device cpu")
    return asked or ("cuda" if has else "cpu")


def _data(data: Path, held_out: Path | None, columns: Columns | None) -> tuple[Examples, Examples]:
    examples = read_examples(data, columns)
    if held_out is None:
        return examples.split(_HELD_OUT)
    rest = read_examples(held_out, columns)
    if bool(rest.pairs) != bool(examples.pairs):
        raise InputError(f"{data} and {held_out} are of two kinds; both must be pairs, or both graded texts")
    return examples, rest


def _decoder_input(network: backbones.Backbone) -> Kind:
    """A chat where the tokenizer has a template, else prompt and response as they follow each other."""
    return "chat" if network.tokenizer.chat_template else "pair"


def _save(network: backbones.Backbone, folder: Path) -> None:
    with quiet():
        network.model.save_pretrained(folder)
        network.tokenizer.save_pretrained(folder)


def _fingerprint(backbone: Path, train: Examples, rest: Examples, plan: Plan, kind: str, max_length: int) -> str:
    """Of all that a checkpoint depends on."""
    digest = hashlib.sha256(json.dumps([str(backbone), asdict(plan), kind, max_length], sort_keys=True).encode())
    for part in (train, rest):
        rows = [asdict(pair) for pair in part.pairs] + [asdict(graded) for graded in part.graded]
        digest.update(json.dumps(rows).encode())
    return digest.hexdigest()


def _evaluate(
    reward: OnnxReward, rest: Examples, comparisons: Sequence[Comparison]
) -> tuple[Outcome, Evaluation | None]:
    if rest.pairs:
        found = evaluate(reward, rest.pairs)
        overall = found.overall
        return Outcome(overall.n, overall.share, overall.low, overall.high, None), found
    sides = [side for c in comparisons for side in (c.better, c.worse)]
    scores: Array = reward.score_many([p for p, _ in sides], [r for _, r in sides]).astype(np.float64).reshape(-1, 2)
    share = share_right(scores)
    n = len(scores)
    rows = rest.graded
    alone = reward.score_many([row.prompt for row in rows], [row.response for row in rows]).astype(np.float64)
    correlation = spearman(alone, np.array([row.grade for row in rows]))
    return Outcome(n, share, *wilson(share * n, n), correlation), None
