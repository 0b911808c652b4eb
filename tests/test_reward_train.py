"""`aisp-local reward train`: reading examples, the loop, what is written, what is refused."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result
from hypothesis import given
from hypothesis import strategies as st
from onnx_files import write_reward

from aisp_local import shipped
from aisp_local.cli.main import main
from aisp_local.errors import InputError, RewardError
from aisp_local.reward_kit.pairs import Pair
from aisp_local.reward_kit.statistics import auc
from aisp_local.reward_kit.train import Plan
from aisp_local.reward_kit.train.examples import Columns, Examples, Graded, read_examples
from aisp_local.reward_kit.train.work import CHECKPOINT, MARKER, WorkFolder
from aisp_local.rewards import OnnxReward

LACKING = [name for name in ("torch", "transformers", "onnxscript", "safetensors") if find_spec(name) is None]
needs_torch = pytest.mark.skipif(bool(LACKING), reason=f"no {', '.join(LACKING)}: pip install 'aisp-local[export]'")
KIND = ("thank you", "how lovely", "well done", "of course, gladly", "that is kind of you", "what a good idea")
RUDE = ("go away", "how stupid", "you are wrong", "no, never", "that is none of your business", "what a bad idea")


def pairs(n: int) -> list[dict[str, Any]]:
    """Kind over rude answers, told apart by their words."""
    return [
        {
            "prompt": f"I met person number {i} today.",
            "chosen": f"{KIND[i % 6]}, and {KIND[(i // 6) % 6]}",
            "rejected": f"{RUDE[(i * 5) % 6]}, and {RUDE[(i // 6) % 6]}",
            "source": "kind" if i % 3 else "rude",
        }
        for i in range(n)
    ]


def write_rows(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["reward", "train", *map(str, arguments)])


# Reading


def test_pairs_and_texts_come_from_jsonl_and_csv(tmp_path: Path) -> None:
    rows = pairs(4)
    found = read_examples(write_rows(tmp_path / "pairs.jsonl", rows))
    assert found.pairs == [Pair(r["prompt"], r["chosen"], r["rejected"], r["source"]) for r in rows]
    packed = tmp_path / "pairs.csv.gz"
    packed.write_bytes(gzip.compress(b'\xef\xbb\xbfprompt,chosen,rejected\nHi,"good, and\nbetter",bad\n'))
    assert read_examples(packed).pairs == [Pair("Hi", "good, and\nbetter", "bad")]

    table = tmp_path / "comments.csv"
    table.write_text(
        'comment,verdict,asked\n"Thanks, friend",polite,Hi\nGo away,rude,Hi\nFine,polite,\n', encoding="utf-8"
    )
    graded = read_examples(table, Columns(text="comment", label="verdict", prompt="asked", good=["polite"])).graded
    assert graded == [Graded("Hi", "Thanks, friend", 1.0), Graded("Hi", "Go away", 0.0), Graded("", "Fine", 1.0)]
    numbers = write_rows(tmp_path / "n.jsonl", [{"text": "a", "score": 1}, {"text": "b", "score": "2.5"}])
    assert [row.grade for row in read_examples(numbers).graded] == [1.0, 2.5]
    swapped = read_examples(numbers, Columns(good=["1"])).graded
    assert [row.grade for row in swapped] == [1.0, 0.0], "a label named good is better than a greater number"


WORDS = '{"text": "a", "label": "ok"}\n{"text": "b", "label": "bad"}'
ONE = '{"text": "a", "score": 1}'


@pytest.mark.parametrize(
    ("name", "text", "columns", "said"),
    [
        ("a.jsonl", WORDS, Columns(), "say with --good"),
        ("a.jsonl", WORDS, Columns(good=["fine"]), "no label 'fine'"),
        ("a.jsonl", f'{ONE}\n{{"text": "b", "score": 1}}', Columns(), "the same grade"),
        ("a.jsonl", f'{ONE}\n{{"text": "b", "score": "x"}}', Columns(), "line 2: its 'score' is not a number"),
        ("a.jsonl", f'{{"text": "b", "score": NaN}}\n{ONE}', Columns(), "line 1: its 'score' is not a number"),
        ("a.jsonl", f'{{"text": "b", "score": 1{"0" * 400}}}\n{ONE}', Columns(), "line 1: its 'score' is not a number"),
        ("a.jsonl", f'{{"text": 3, "score": 1}}\n{ONE}', Columns(), "line 1: its 'text' is not a text"),
        ("a.jsonl", '{"body": "a", "score": 1}', Columns(), "has no column of texts (it has body, score)"),
        ("a.jsonl", ONE, Columns(label="stars"), "no column 'stars'"),
        ("a.jsonl", '{"chosen": "a", "rejected": "b"}', Columns(), "line 1: it lacks 'prompt'"),
        (
            "a.jsonl",
            '{"prompt": "a", "chosen": "a", "rejected": "b"}\n[1]',
            Columns(),
            "line 2: it is not a JSON object",
        ),
        ("a.jsonl", "", Columns(), "holds no rows"),
        ("a.csv", "text,score\na,1\nb\n", Columns(), "line 3: it has not the 2 columns"),
        ("a.csv", "text,score\na,1\nb,2,3\n", Columns(), "line 3: it has not the 2 columns"),
    ],
)
def test_bad_rows_are_named(tmp_path: Path, name: str, text: str, columns: Columns, said: str) -> None:
    (tmp_path / name).write_text(text, encoding="utf-8")
    with pytest.raises(InputError) as caught:
        read_examples(tmp_path / name, columns)
    assert said in str(caught.value) and name in str(caught.value)


rows_of = st.lists(
    st.builds(
        Graded, st.sampled_from(["", "a", "b", "c"]), st.text(min_size=1, max_size=30), st.integers(0, 3).map(float)
    ),
    min_size=2,
    max_size=40,
)


@given(rows_of, st.integers(0, 9))
def test_comparisons_of_graded_texts_have_the_better_one_first(rows: list[Graded], seed: int) -> None:
    grades = {(row.prompt, row.response, row.grade) for row in rows}
    drawn = Examples(graded=rows).draw(seed)
    assert drawn == Examples(graded=rows).draw(seed)
    for one in drawn:
        better = [g for p, r, g in grades if (p, r) == one.better]
        worse = [g for p, r, g in grades if (p, r) == one.worse]
        assert max(better) > min(worse)
    for prompt in {"a", "b", "c"}:
        if len({row.grade for row in rows if row.prompt == prompt}) > 1:
            assert any(one.better[0] == one.worse[0] == prompt for one in drawn)


@given(rows_of, st.randoms())
def test_split_keeps_the_responses_to_a_prompt_together_in_any_order(rows: list[Graded], random: Any) -> None:
    train, rest = Examples(graded=rows).split(0.5)
    assert len(train) + len(rest) == len(rows)
    prompts = [{row.prompt for row in part.graded if row.prompt} for part in (train, rest)]
    assert not prompts[0] & prompts[1]
    mixed = list(rows)
    random.shuffle(mixed)
    again = Examples(graded=mixed).split(0.5)
    assert sorted(map(repr, again[1].graded)) == sorted(map(repr, rest.graded))


def test_partners_are_about_as_long(tmp_path: Path) -> None:
    rows = [Graded("", "word " * (i + 1), float(i % 2)) for i in range(200)]
    drawn = Examples(graded=rows).draw(0)
    lengths = np.array([[len(one.better[1]), len(one.worse[1])] for one in drawn])
    alone = np.abs(lengths[:, 0] - np.roll(lengths[:, 1], 7)).mean()
    assert np.abs(lengths[:, 0] - lengths[:, 1]).mean() < alone / 3


@pytest.mark.parametrize(
    "wrong", [{"epochs": 0}, {"batch": 0}, {"rate": 0.0}, {"head_rate": 2.0}, {"minutes": 0.0}, {"frozen_layers": -1}]
)
def test_plans_that_cannot_be_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=next(iter(wrong))):
        Plan(**wrong)


def test_rate_goes_up_and_then_down() -> None:
    rates = [Plan(warm_up=0.1).relative_rate(done) for done in np.linspace(0, 1, 101)]
    assert rates[0] < 0.1 and max(rates) == rates[int(np.argmax(rates))] > 0.85 and rates[-1] == 0
    top = int(np.argmax(rates))
    assert rates[: top + 1] == sorted(rates[: top + 1]) and rates[top:] == sorted(rates[top:], reverse=True)


def test_the_command_says_what_is_wrong(tmp_path: Path) -> None:
    done = run(tmp_path / "none.jsonl", tmp_path / "out")
    assert done.exit_code == 2 and "none.jsonl cannot be read" in done.stderr and done.stdout == ""
    data = write_rows(tmp_path / "data.jsonl", pairs(30))
    done = run(data, tmp_path / "out", "--epochs", 0)
    assert done.exit_code == 2 and "epochs 0 must be at least 1" in done.stderr
    for seed in (-1, 10**20):
        done = run(data, tmp_path / "out", "--seed", seed)
        assert done.exit_code == 2 and f"seed {seed} must be at least 0 and below 4294967296" in done.stderr
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "letter.txt").write_text("mine")
    done = run(data, tmp_path / "full", "--force")
    assert done.exit_code == 2 and "holds no reward.json" in done.stderr
    assert (tmp_path / "full" / "letter.txt").read_text() == "mine"


# The folder of a training


def write_network(model: Path) -> None:
    model.mkdir(exist_ok=True)
    (model / "config.json").write_text("{}")


def interrupted_training(folder: WorkFolder, checkpoint: bool = True) -> None:
    """What a run that Ctrl-C ended leaves."""
    with pytest.raises(KeyboardInterrupt), folder.held(resume=False):
        folder.save(write_network)
        if checkpoint:
            (folder.path / CHECKPOINT).write_bytes(b"weights")
        raise KeyboardInterrupt


@pytest.mark.parametrize("options", [(), ("--restart",), ("--resume",)])
def test_files_that_no_training_wrote_are_left_alone(tmp_path: Path, options: Sequence[str]) -> None:
    data = write_rows(tmp_path / "data.jsonl", pairs(60))
    for folder, work in ((tmp_path / "precious", ["--work", tmp_path / "precious"]), (tmp_path / "out.training", [])):
        (folder / "model").mkdir(parents=True)
        mine = {folder / name: name for name in ("thesis.txt", CHECKPOINT, "model/config.json")}
        for path, text in mine.items():
            path.write_text(text)
        done = run(data, tmp_path / "out", *work, *options)
        assert done.exit_code == 2 and f"{folder} holds files" in done.stderr and "--work" in done.stderr
        assert {path: path.read_text() for path in mine} == mine and len(list(folder.rglob("*"))) == 4


def test_a_training_deletes_only_what_it_wrote(tmp_path: Path) -> None:
    folder = WorkFolder(tmp_path / "out", None)
    interrupted_training(folder)
    mine = [folder.path / "notes.txt", folder.model / "notes.txt"]
    for path in mine:
        path.write_text("mine")
    with folder.held(resume=True):
        folder.save(write_network)
    assert sorted(path for path in folder.path.rglob("*") if path.is_file()) == sorted(mine)

    (tmp_path / "given").mkdir()
    for made in (WorkFolder(tmp_path / "out2", None), WorkFolder(tmp_path / "out2", tmp_path / "given")):
        with made.held(resume=False):
            made.save(write_network)
    assert not (tmp_path / "out2.training").exists() and list((tmp_path / "given").iterdir()) == []


@pytest.mark.parametrize("name", ["../thesis.txt", "model/../../thesis.txt", "thesis.txt"])
def test_a_marker_cannot_name_files_elsewhere(tmp_path: Path, name: str) -> None:
    folder = WorkFolder(tmp_path / "out", None)
    folder.path.mkdir()
    (folder.path / MARKER).write_text(json.dumps({"made": True, "files": [name]}))
    thesis = [tmp_path / "thesis.txt", folder.path / "thesis.txt"]
    for path in thesis:
        path.write_text("mine")
    with pytest.raises(InputError, match="--work"):
        folder.check(resume=False, restart=True)
    folder.clear()
    assert all(path.exists() for path in thesis)


def test_a_checkpoint_is_not_discarded_unasked(tmp_path: Path) -> None:
    data = write_rows(tmp_path / "data.jsonl", pairs(60))
    folder = WorkFolder(tmp_path / "out", None)
    interrupted_training(folder)
    done = run(data, tmp_path / "out")
    assert done.exit_code == 2 and "--resume" in done.stderr and "--restart" in done.stderr
    assert (folder.path / CHECKPOINT).read_bytes() == b"weights"
    done = run(data, tmp_path / "out", "--resume", "--restart")
    assert done.exit_code == 2 and "give one of them" in done.stderr
    folder.check(resume=False, restart=True)
    with folder.held(resume=False):
        assert not folder.has_checkpoint and folder.path.is_dir()

    interrupted_training(folder, checkpoint=False)
    assert not folder.path.exists(), "there was nothing to go on from"
    done = run(data, tmp_path / "out", "--resume")
    assert done.exit_code == 2 and "begin without --resume" in done.stderr


@pytest.mark.skipif(not LACKING, reason="everything is installed")
def test_without_pytorch_it_says_what_to_install(tmp_path: Path) -> None:
    done = run(write_rows(tmp_path / "data.jsonl", pairs(60)), tmp_path / "out")
    assert done.exit_code == 1 and "pip install 'aisp-local[export]'" in done.stderr
    assert not (tmp_path / "out").exists()


# Training


def backbone(folder: Path, family: str, **changes: Any) -> Path:
    import hf_models

    still = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0} | changes
    return hf_models.write(folder, family, **still)


FAST = ("--rate", "2e-3", "--head-rate", "5e-3", "--batch", 8, "--max-length", 64)


@needs_torch
@pytest.mark.parametrize("family", ["Bert", "Roberta", "DebertaV2", "ModernBert", "Llama"])
def test_every_kind_of_backbone_learns(tmp_path: Path, family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from aisp_local.reward_kit.train import loop

    monkeypatch.setattr(loop, "_has_bfloat16", lambda: False)  # worse on so little data
    data = write_rows(tmp_path / "data.jsonl", pairs(160))
    source = backbone(tmp_path / "backbone", family)
    done = run(data, tmp_path / "out", "--backbone", source, "--epochs", 8, *FAST, "--precision", "fp32")
    assert done.exit_code == 0, done.output
    reward = OnnxReward.load(tmp_path / "out")
    kind, rude = (reward.score("I met somebody.", [f"{a}, and {b}" for a in t for b in t]) for t in (KIND, RUDE))
    assert auc(kind.astype(float), rude.astype(float)) > 0.95
    assert "ranked right" in done.stdout and "held out: loss" in done.stderr
    assert not (tmp_path / "out.training").exists(), "nothing is left of the work"
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert "160" not in card and "| held out |" in card and "Log loss" in card and str(tmp_path) not in card


@needs_torch
@pytest.mark.parametrize("dropout", [0, 0.2])
def test_the_seed_alone_decides_whatever_ran_before(tmp_path: Path, dropout: float) -> None:
    """To the bit: other random numbers, threads and trainings came before, in the same process and in another one."""
    import torch

    data = write_rows(tmp_path / "data.jsonl", pairs(60))
    source = backbone(tmp_path / "backbone", "Bert")
    options = ["--backbone", source, "--epochs", 1, "--dropout", dropout, *FAST, "--precision", "fp32"]
    names = ("first", "second", "other seed")
    threads = torch.get_num_threads()
    try:
        for name, more in zip(names, ([], [], ["--seed", 1]), strict=True):
            done = run(data, tmp_path / name, *options, *more)
            assert done.exit_code == 0, done.output
            torch.manual_seed(99)
            torch.rand(7)
            torch.set_num_threads(1)
    finally:
        torch.set_num_threads(threads)
    command = ["-m", "aisp_local", "reward", "train", data, tmp_path / "process", *options]
    done_there = subprocess.run([sys.executable, *map(str, command)], capture_output=True, text=True)
    assert done_there.returncode == 0, done_there.stderr
    scores = {name: OnnxReward.load(tmp_path / name).score("Hi", KIND).tolist() for name in (*names, "process")}
    assert scores["first"] == scores["second"] == scores["process"] != scores["other seed"]


@needs_torch
def test_a_spreadsheet_of_labels_is_enough(tmp_path: Path) -> None:
    verdicts = [(text, verdict) for verdict, texts in (("ok", KIND), ("bad", RUDE)) for text in texts]
    rows = [f'"{text}, friend {i}",{verdict}' for i in range(20) for text, verdict in verdicts]
    (tmp_path / "comments.csv").write_text("comment,verdict\n" + "\n".join(rows) + "\n", encoding="utf-8")
    source = backbone(tmp_path / "backbone", "Bert")
    command = [tmp_path / "comments.csv", tmp_path / "out", "--backbone", source, *FAST, "--input", "text"]
    done = run(*command, "--text", "comment", "--label", "verdict", "--good", "ok")
    assert done.exit_code == 0, done.output
    assert "score and grade: Spearman 0.8" in done.stdout  # of two grades; 0.87 is the most that there can be
    reward = OnnxReward.load(tmp_path / "out")
    assert reward.manifest.kind == "text"
    assert reward.score("", ["how lovely, friend 3"])[0] > reward.score("", ["how stupid, friend 3"])[0]


@needs_torch
@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_a_reward_folder_is_a_backbone_too(tmp_path: Path, precision: str) -> None:
    import torch

    from aisp_local.reward_kit.export import export_reward
    from aisp_local.reward_kit.train import backbone as backbones

    source = backbone(tmp_path / "backbone", "Bert")
    export_reward(source, tmp_path / "reward", precision=precision)  # type: ignore[arg-type]
    first, second = backbones.load(source), backbones.load(tmp_path / "reward")
    ids = torch.arange(5, 30)[None]
    with torch.no_grad():
        a, b = (found.body.eval()(input_ids=ids).last_hidden_state for found in (first, second))
    spread = float(a.std())
    assert float((a - b).abs().max()) < (1e-5 if precision == "fp32" else 0.1) * spread
    assert second.tokenizer("How lovely!")["input_ids"] == first.tokenizer("How lovely!")["input_ids"]
    text = (tmp_path / "reward" / "config.json").read_text() + (
        tmp_path / "reward" / "tokenizer_config.json"
    ).read_text()
    assert str(tmp_path) not in text


@needs_torch
def test_a_gguf_file_is_a_backbone_too() -> None:
    import torch
    from transformers import AutoModelForCausalLM

    from aisp_local.reward_kit.train import backbone as backbones

    found = backbones.load(shipped.model())
    assert found.decoder and len(found.layers()) == 6 and len(found.head()) == 1
    whole = AutoModelForCausalLM.from_pretrained(shipped.model().parent, gguf_file=shipped.model().name)
    ids = torch.tensor([found.tokenizer("Once upon a time")["input_ids"]])
    with torch.no_grad():
        a, b = found.body.eval()(ids).last_hidden_state, whole.model.eval()(ids).last_hidden_state
    assert torch.allclose(a, b, atol=1e-5)


@needs_torch
def test_an_interrupted_training_goes_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from aisp_local.reward_kit.train import loop

    monkeypatch.setattr(loop, "_has_bfloat16", lambda: False)
    data = write_rows(tmp_path / "data.jsonl", pairs(80))
    source = backbone(tmp_path / "backbone", "Bert")
    options = ["--backbone", source, "--epochs", 2, *FAST, "--precision", "fp32"]
    assert run(data, tmp_path / "whole", *options).exit_code == 0

    step = loop.Trainer._step
    calls = []

    def interrupted(self: loop.Trainer, *arguments: Any) -> tuple[float, int]:
        calls.append(1)
        if len(calls) == 7:
            raise KeyboardInterrupt
        return step(self, *arguments)

    monkeypatch.setattr(loop.Trainer, "_step", interrupted)
    done = run(data, tmp_path / "halves", *options)
    assert done.exit_code == 130 and "--resume" in done.stderr
    assert not (tmp_path / "halves").exists() and (tmp_path / "halves.training" / "checkpoint.pt").is_file()
    monkeypatch.setattr(loop.Trainer, "_step", step)

    done = run(data, tmp_path / "halves", *options)
    assert done.exit_code == 2 and "--resume" in done.stderr and "--restart" in done.stderr
    other = write_rows(tmp_path / "other.jsonl", pairs(81))
    done = run(other, tmp_path / "halves", *options, "--resume")
    assert done.exit_code == 2 and "belongs to another training" in done.stderr
    done = run(data, tmp_path / "halves", *options, "--resume")
    assert done.exit_code == 0 and "from step 6" in done.stderr, done.output
    texts = [*KIND, *RUDE]
    a, b = (OnnxReward.load(tmp_path / name).score("Hi", texts) for name in ("whole", "halves"))
    np.testing.assert_allclose(a, b, atol=1e-4 * float(np.std(a)))


def interrupt_at(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, when: Any) -> None:
    """Ctrl-C the first time that a call of ``owner.name`` is one that ``when`` means; the rest goes through."""
    real, struck = getattr(owner, name), []

    def call(*arguments: Any) -> Any:
        if not struck and when(*arguments):
            struck.append(1)
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(owner, name, call)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Any], list[float]]:
    """The arguments of a training that nothing interrupts, and the scores of its reward."""
    from aisp_local.reward_kit.train import loop

    folder = tmp_path_factory.mktemp("whole")
    data = write_rows(folder / "data.jsonl", pairs(80))
    options = ["--backbone", backbone(folder / "backbone", "Bert"), "--epochs", 1, *FAST, "--precision", "fp32"]
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(loop, "_has_bfloat16", lambda: False)
        done = run(data, folder / "out", *options)
    assert done.exit_code == 0, done.output
    assert done.stderr.count("(best)") > 2, "several evaluations write weights"
    return [data, *options], OnnxReward.load(folder / "out").score("Hi", [*KIND, *RUDE]).tolist()


@needs_torch
@pytest.mark.parametrize("where", ["best", "last best", "evaluation", "after", "optimiser"])
def test_an_interrupt_anywhere_resumes_to_the_same_reward(
    where: str, whole: tuple[list[Any], list[float]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import signal

    import torch

    from aisp_local.reward_kit.train import loop

    monkeypatch.setattr(loop, "_has_bfloat16", lambda: False)
    (data, *options), scores = whole
    with monkeypatch.context() as patched:
        if where in ("best", "last best"):
            last = "best-9.pt" if where == "last best" else ""
            interrupt_at(patched, loop, "_write", lambda path, state: path.name == (last or path.name))
        elif where == "evaluation":
            interrupt_at(patched, loop.Trainer, "_evaluate", lambda self, pool: self.state.step == 4)
        elif where == "after":
            interrupt_at(patched, loop.Trainer, "_clear_weights", lambda self: self.state.step == 4)
        else:  # when the weights have moved and the step is not yet counted
            step, pressed = torch.optim.AdamW.step, []

            def press(self: Any) -> None:
                step(self)
                pressed.append(1)
                if len(pressed) == 5:
                    signal.raise_signal(signal.SIGINT)

            patched.setattr(torch.optim.AdamW, "step", press)
        before = signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            done = run(data, tmp_path / "out", *options)
        finally:
            signal.signal(signal.SIGINT, before)
    assert done.exit_code == 130 and "--resume" in done.stderr, done.output
    done = run(data, tmp_path / "out", *options, "--resume")
    assert done.exit_code == 0, done.output
    found = OnnxReward.load(tmp_path / "out").score("Hi", [*KIND, *RUDE])
    np.testing.assert_allclose(found, scores, atol=1e-4 * float(np.std(scores)))
    assert not (tmp_path / "out.training").exists()


@needs_torch
def test_an_unusable_checkpoint_is_named_with_what_to_do(
    whole: tuple[list[Any], list[float]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import pickle

    import torch

    from aisp_local.reward_kit.train import loop

    monkeypatch.setattr(loop, "_has_bfloat16", lambda: False)
    (data, *options), _ = whole
    with monkeypatch.context() as patched:
        interrupt_at(patched, loop.Trainer, "_step", lambda self, *rest: self.state.step == 5)
        assert run(data, tmp_path / "out", *options).exit_code == 130
    work = tmp_path / "out.training"
    (best,) = work.glob("best-*.pt")
    whole_checkpoint, whole_best = (work / CHECKPOINT).read_bytes(), best.read_bytes()
    kept = torch.load(work / CHECKPOINT, weights_only=True)

    def saved(value: Any) -> bytes:
        torch.save(value, tmp_path / "made.pt")
        return (tmp_path / "made.pt").read_bytes()

    bad: dict[str, tuple[Path, bytes | None]] = {
        "text": (work / CHECKPOINT, b"not a checkpoint"),
        "empty": (work / CHECKPOINT, b""),
        "pickle": (work / CHECKPOINT, pickle.dumps({"a": 1})),
        "half": (work / CHECKPOINT, whole_checkpoint[: len(whole_checkpoint) // 2]),
        "list": (work / CHECKPOINT, saved([1, 2])),
        "no step": (work / CHECKPOINT, saved({key: kept[key] for key in kept if key != "step"})),
        "odd evaluations": (work / CHECKPOINT, saved(kept | {"held": [[1, "x"]]})),
        "odd optimiser": (work / CHECKPOINT, saved(kept | {"optimiser": 3})),
        "best lost": (best, None),
        "best text": (best, b"rubbish"),
        "best of another": (best, saved({"a": torch.zeros(2)})),
    }
    for what, (path, content) in bad.items():
        (work / CHECKPOINT).write_bytes(whole_checkpoint)
        best.write_bytes(whole_best)
        path.unlink()
        if content is not None:
            path.write_bytes(content)
        done = run(data, tmp_path / "out", *options, "--resume")
        assert done.exit_code == 2, (what, done.output, done.exception)
        assert path.name in done.stderr and "--restart" in done.stderr, (what, done.stderr)
        assert (work / CHECKPOINT).exists(), "it is the user's to delete"


@needs_torch
def test_a_refused_export_does_not_cost_the_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from aisp_local.reward_kit.export import parity

    data = write_rows(tmp_path / "data.jsonl", pairs(60))
    options = ["--backbone", backbone(tmp_path / "backbone", "Bert"), "--epochs", 1, *FAST]
    monkeypatch.setitem(parity.LIMITS, "int8", (0.0, 1.0))
    done = run(data, tmp_path / "out", *options)
    assert done.exit_code == 1 and "the int8 export is too far" in done.stderr
    assert "--resume and a higher --precision" in done.stderr and not (tmp_path / "out").exists()
    done = run(data, tmp_path / "out", *options, "--resume", "--precision", "fp32")
    assert done.exit_code == 0, done.output
    assert ", from step 7" in done.stderr and "\nstep" not in done.stderr, "there is nothing left to train"
    assert OnnxReward.load(tmp_path / "out").manifest.parity and not (tmp_path / "out.training").exists()


@needs_torch
def test_a_run_that_ends_early_promises_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from aisp_local.reward_kit.train import backbone as backbones
    from aisp_local.reward_kit.train import loop

    data = write_rows(tmp_path / "data.jsonl", pairs(60))
    source = backbone(tmp_path / "backbone", "Bert")
    done = run(write_rows(tmp_path / "few.jsonl", pairs(1)), tmp_path / "out", "--backbone", source)
    assert done.exit_code == 2 and "too few rows" in done.stderr
    assert not (tmp_path / "out.training").exists()

    def interrupt(*arguments: Any, **options: Any) -> Any:
        raise KeyboardInterrupt

    for owner, name in ((backbones, "load"), (loop.Trainer, "__init__")):
        with monkeypatch.context() as patched:
            patched.setattr(owner, name, interrupt)
            done = run(data, tmp_path / "out", "--backbone", source)
        assert done.exit_code == 130 and "--resume" not in done.stderr and "begins anew" in done.stderr
        assert not (tmp_path / "out.training").exists()


@needs_torch
def test_training_ends_when_it_no_longer_helps(tmp_path: Path) -> None:
    """Labels by chance: the best weights are early ones, and the passes are not all taken."""
    rows = [r | ({"chosen": r["rejected"], "rejected": r["chosen"]} if i % 2 else {}) for i, r in enumerate(pairs(120))]
    data = write_rows(tmp_path / "data.jsonl", rows)
    source = backbone(tmp_path / "backbone", "Bert")
    done = run(data, tmp_path / "out", "--backbone", source, "--epochs", 40, *FAST, "--patience", 4)
    assert done.exit_code == 0, done.output
    last = [line for line in done.stderr.splitlines() if line.startswith("step")][-1]
    step, steps = map(int, last.split(",")[0].removeprefix("step ").split("/"))
    assert step < steps / 2


@needs_torch
def test_backbones_that_cannot_be_are_refused(tmp_path: Path) -> None:
    from aisp_local.reward_kit.train import backbone as backbones

    with pytest.raises(RewardError, match="does not exist"):
        backbones.load(tmp_path / "none")
    with pytest.raises(RewardError, match="cannot be trained further"):
        backbones.load(write_reward(tmp_path / "tiny"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(RewardError, match="config.json"):
        backbones.load(tmp_path / "empty")
    (tmp_path / "junk.gguf").write_bytes(b"GGUF but no more")
    with pytest.raises(RewardError, match=r"junk\.gguf cannot be read"):
        backbones.load(tmp_path / "junk.gguf")
    gpt = tmp_path / "gpt"
    source = backbone(gpt, "Bert")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"model_type": "gpt_bigcode", "architectures": ["X"]}))
    with pytest.raises(RewardError):
        backbones.load(gpt)


@needs_torch
@pytest.mark.slow
def test_the_installed_command_trains_from_the_shipped_backbone(tmp_path: Path) -> None:
    data = write_rows(tmp_path / "data.jsonl", pairs(60))
    command = [
        sys.executable,
        "-m",
        "aisp_local",
        "reward",
        "train",
        str(data),
        str(tmp_path / "mine"),
        "--epochs",
        "1",
    ]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert "reading the backbone story-reward" in done.stderr
    scores = OnnxReward.load(tmp_path / "mine").score("I met somebody.", [KIND[0], RUDE[0]])
    assert scores[0] > scores[1]
