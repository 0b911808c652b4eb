"""What the kit says of good and of spoilt rewards, its statistics, and the formats that it reads."""

from __future__ import annotations

import gzip
import json
import xml.etree.ElementTree as ET
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from onnx_files import WORDS, model, tokenizer, write_reward

from aisp_local import shipped
from aisp_local.errors import InputError, RewardError, ScoreError
from aisp_local.reward_kit import Check, Pair, describe, evaluate, find_rewards, plots, read_pairs, verify
from aisp_local.reward_kit.good_bad import PAIRS
from aisp_local.reward_kit.pairs import parse_pairs
from aisp_local.reward_kit.rows import read_rows, score_rows
from aisp_local.reward_kit.statistics import auc, bradley_terry, pearson, ranks, share_right, spearman, wilson
from aisp_local.rewards import CallableReward, OnnxReward
from aisp_local.svg import _number, _ticks

ASK = [{"role": "user", "content": "hi"}]


def said(text: str, who: str = "assistant") -> dict[str, str]:
    return {"role": who, "content": text}


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"prompt": "hi", "chosen": "a", "rejected": "b"}, Pair("hi", "a", "b")),
        ({"prompt": ASK, "chosen": "a", "rejected": "b", "source": "s"}, Pair(ASK, "a", "b", "s")),
        ({"prompt": "hi", "chosen": "a", "rejected": "b", "subset": "chat", "id": 3}, Pair("hi", "a", "b", "chat")),
        ({"prompt": ASK, "chosen": [said("a")], "rejected": [said("b")]}, Pair(ASK, "a", "b")),
        # UltraFeedback: whole conversations, and the question again
        ({"prompt": "hi", "chosen": [*ASK, said("a")], "rejected": [*ASK, said("b")]}, Pair(ASK, "a", "b")),
        ({"prompt": ASK, "chosen": [*ASK, said("a")], "rejected": [*ASK, said("b")]}, Pair(ASK, "a", "b")),
        ({"chosen": [*ASK, said("a")], "rejected": [*ASK, said("b")]}, Pair(ASK, "a", "b")),
        # HH-RLHF: dialogues
        (
            {"chosen": "\n\nHuman: hi\n\nAssistant: a", "rejected": "\n\nHuman: hi\n\nAssistant: b: c"},
            Pair(ASK, "a", "b: c"),
        ),
        (
            {
                "chosen": "\n\nHuman: hi\n\nAssistant: ho\n\nHuman: well?\n\nAssistant: a\n\nb",
                "rejected": "\n\nHuman: hi\n\nAssistant: ho\n\nHuman: well?\n\nAssistant:",
            },
            Pair([*ASK, said("ho"), said("well?", "user")], "a\n\nb", ""),
        ),
    ],
)
def test_pair_formats(row: dict[str, Any], expected: Pair) -> None:
    assert parse_pairs(["\n", json.dumps(row)], "rows") == [expected]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "rows, line 2: it is not valid JSON"),
        ("[" * 100_000, "rows, line 2: it is not valid JSON"),
        ("3", "rows, line 2: it is not a JSON object"),
        ('{"prompt": "a", "chosen": "b"}', "rows, line 2: it lacks 'rejected'; its keys are prompt, chosen"),
        ('{"chosen": "b", "rejected": "c"}', "it lacks 'prompt', and 'chosen' is no dialogue"),
        ('{"prompt": 3, "chosen": "b", "rejected": "c"}', "'prompt' must be a string or a list of messages"),
        ('{"prompt": "a", "chosen": 3, "rejected": "c"}', "'chosen' must be a string or a list of messages"),
        ('{"prompt": "a", "chosen": [], "rejected": "c"}', "'chosen' must end with a message of the assistant"),
        ('{"prompt": [{"role": "user"}], "chosen": "b", "rejected": "c"}', "'prompt': message 1 must be an object"),
        ('{"prompt": [{"role": "me", "content": ""}], "chosen": "b", "rejected": "c"}', "has the role 'me'"),
        ('{"chosen": "\\n\\nHuman: a", "rejected": "c", "prompt": "a"}', "'chosen' must end with a message"),
        (
            '{"chosen": "\\n\\nHuman: a\\n\\nAssistant: b", "rejected": "\\n\\nHuman: c\\n\\nAssistant: d"}',
            "the prompts within 'chosen' and 'rejected' differ",
        ),
    ],
)
def test_bad_rows_are_named(line: str, message: str) -> None:
    good = '{"prompt": "a", "chosen": "b", "rejected": "c"}'
    with pytest.raises(InputError) as caught:
        parse_pairs([good, line, good], "rows")
    assert message in str(caught.value)


def test_files_of_pairs(tmp_path: Path) -> None:
    row = json.dumps({"prompt": "é", "chosen": "b", "rejected": "c"}) + "\n"
    (tmp_path / "a.jsonl").write_text(row * 3, encoding="utf-8")
    with gzip.open(tmp_path / "a.jsonl.gz", "wt", encoding="utf-8") as file:
        file.write(row * 3)
    assert read_pairs(tmp_path / "a.jsonl") == read_pairs(tmp_path / "a.jsonl.gz") == [Pair("é", "b", "c")] * 3
    broken = tmp_path / "cut.jsonl.gz"
    broken.write_bytes((tmp_path / "a.jsonl.gz").read_bytes()[:-12])
    damaged = tmp_path / "damaged.jsonl.gz"
    packed = bytearray((tmp_path / "a.jsonl.gz").read_bytes())
    packed[-20:-10] = b"\xff" * 10  # of the compressed bytes, before the checksum
    damaged.write_bytes(packed)
    latin = tmp_path / "latin.jsonl"
    latin.write_bytes("é".encode("latin-1"))
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "plain.gz").write_text(row)
    for path, message in (
        (broken, "not a complete gzip file"),
        (damaged, "not a complete gzip file"),
        (tmp_path / "plain.gz", "not a complete gzip file"),
        (latin, "not valid UTF-8"),
        (tmp_path / "empty.jsonl", "holds no pairs"),
        (tmp_path / "missing", "cannot be read"),
        (tmp_path, "cannot be read"),
    ):
        with pytest.raises(InputError, match=message):
            read_pairs(path)
    with pytest.raises(InputError, match="and 4 more bad rows"):
        parse_pairs(["{}"] * 9, "rows")


def test_statistics_against_values_known_otherwise() -> None:
    low, high = wilson(8, 10)
    assert (round(low, 4), round(high, 4)) == (0.4902, 0.9433)
    assert wilson(0, 5)[0] == pytest.approx(0, abs=1e-12) and wilson(5, 5)[1] == pytest.approx(1)
    np.testing.assert_array_equal(ranks(np.array([3.0, 1, 3, 2])), [3.5, 1, 3.5, 2])
    assert share_right(np.array([[1.0, 0], [0, 1], [2, 2], [3, 1]])) == 0.625
    assert auc([2.0, 3.0], [1.0, 2.0]) == 0.875
    np.testing.assert_allclose(bradley_terry(np.array([0.0, np.log(3), -1000, 1000])), [0.5, 0.75, 0, 1])
    assert np.isnan(pearson(np.ones(3), np.arange(3.0)))


@given(st.lists(st.integers(-50, 50), min_size=3, max_size=30, unique=True), st.integers(1, 5))
def test_correlations_know_lines_and_orders(values: list[int], factor: int) -> None:
    a = np.array(values, np.float64)
    assert pearson(a, 3 - factor * a) == pytest.approx(-1)
    assert spearman(a, np.exp(a / 10)) == pytest.approx(1)


def by_length(prompt: Any, responses: Sequence[str]) -> list[float]:
    return [len(text) / 10 for text in responses]


def test_evaluation_of_a_reward_that_likes_length() -> None:
    pairs = [Pair("p", "x" * 40, "x" * 20, "a")] * 30 + [Pair("p", "x" * 10, "x" * 30, "b")] * 10
    pairs += [Pair("p", "x" * 20, "x" * 20, "b")] * 4
    found = evaluate(CallableReward(by_length), pairs)
    assert found.overall.n == 44 and found.overall.share == 32 / 44
    assert {g.name: (g.n, g.share) for g in found.by_source} == {"a": (30, 1.0), "b": (14, 2 / 14)}
    assert {g.name: (g.n, g.share) for g in found.by_length} == {
        "chosen longer": (30, 1.0),
        "chosen shorter": (10, 0.0),
        "alike": (4, 0.5),
    }
    assert found.longer_wins == found.overall.share
    assert [found.pearson, found.spearman, found.margin_spearman] == pytest.approx([1, 1, 1])
    right = np.log1p(np.exp(-2.0)) * 30 + np.log1p(np.exp(2.0)) * 10 + np.log(2) * 4
    assert found.log_loss == pytest.approx(right / 44)
    assert sum(b.n for b in found.calibration) == 44
    assert found.calibration[0].predicted < found.calibration[-1].predicted
    drawn = {name: draw(found) for name, draw in plots.PLOTS.items()}
    for svg in drawn.values():
        assert ET.fromstring(svg).tag.endswith("svg")
    assert drawn["length.svg"].count("<circle") == 88
    assert drawn["accuracy.svg"].count("<circle") == 6


def test_long_names_stay_inside_the_plot() -> None:
    names = ["organisation/" + "name-" * 20 + "subset", "W" * 60, "\u6587" * 60, "<&\x07>", "x"]
    pairs = [Pair("p", "a" * (i + 1), "b", name) for i, name in enumerate(names)]
    found = evaluate(CallableReward(lambda p, r: [len(x) for x in r], "reward" * 20), pairs)
    drawn = ET.fromstring(plots.accuracy(found))
    texts = list(drawn.iter("{http://www.w3.org/2000/svg}text"))
    for text in texts:
        shown = (text.text or "") + "".join(child.tail or "" for child in text)
        width = float(text.get("font-size", "")) * sum(1.0 if c in "W\u6587" else 0.5 for c in shown)
        start = float(text.get("x", "")) - width * {"end": 1.0, "middle": 0.5}[text.get("text-anchor", "")]
        assert start >= 0 and start + width <= 480, shown
    whole = {child.text for text in texts for child in text}
    assert {f"{names[0]} (1)", f"{'W' * 60} (1)"} <= whole
    labels = ["".join(text.itertext()) for text in texts]
    assert any("organisation/" in label and label.endswith("subset (1)") and "\u2026" in label for label in labels)


@given(st.floats(-1e6, 1e6), st.floats(1e-3, 1e6))
def test_the_ends_of_an_axis_are_round(low: float, span: float) -> None:
    ticks = _ticks(low, low + span)
    step = ticks[1] - ticks[0]
    assert 3 <= len(ticks) <= 9
    assert ticks[0] <= low + step * 1e-6 and ticks[-1] >= low + span - step * 1e-6
    assert ticks[1] > low and ticks[-2] < low + span
    assert len({_number(tick, ticks) for tick in ticks}) == len(ticks)
    assert f"{step:.1e}"[:3] in ("1.0", "2.0", "2.5", "5.0")


def test_a_calibrated_reward_follows_the_diagonal() -> None:
    rng = np.random.default_rng(0)
    margins = rng.normal(0, 2, 4000)
    right = rng.random(4000) < bradley_terry(margins)
    scores = {f"{i}": m for i, m in enumerate(margins)}
    pairs = [Pair("p", f"{i}", "none") if won else Pair("p", "none", f"{i}") for i, won in enumerate(right)]
    found = evaluate(CallableReward(lambda p, rs: [scores.get(r, 0.0) for r in rs]), pairs)
    assert found.calibration_error < 0.03
    assert sum(b.low <= b.predicted <= b.high for b in found.calibration) >= 8
    blind = evaluate(CallableReward(lambda p, rs: [5 * scores.get(r, 0.0) for r in rs]), pairs)
    assert blind.calibration_error > 0.1 and blind.log_loss > found.log_loss


def test_scores_that_are_not_finite_are_left_out_and_said() -> None:
    pairs = [Pair("p", "good", "bad"), Pair("p", "nan", "bad")]
    reward = CallableReward(lambda p, rs: [float("nan") if r == "nan" else float(len(r)) for r in rs])
    found = evaluate(reward, pairs)
    assert (found.not_finite, found.overall.n, found.overall.share, list(found.by_source)) == (1, 1, 1.0, [])
    with pytest.raises(ScoreError, match="no pair two finite scores"):
        evaluate(reward, pairs[1:])


def test_prompts_of_all_kinds_in_one_batch_score_as_alone(tmp_path: Path) -> None:
    reward = OnnxReward.load(write_reward(tmp_path))
    pairs = [Pair("tell", "good fox", "bad"), Pair(ASK, "the story", ""), Pair("a " * 60, "fox", "good " * 60)]
    found = evaluate(reward, pairs * 40).scores
    for i, pair in enumerate(pairs):
        alone = reward.score(pair.prompt, [pair.chosen, pair.rejected])
        np.testing.assert_allclose(found[i :: len(pairs)], np.tile(alone, (40, 1)), atol=1e-5)


def test_rows_to_score() -> None:
    lines = [
        '{"prompt": "q", "response": "a"}\n',
        "\n",
        json.dumps({"prompt": ASK, "responses": ["b", "c"]}),
        '{"response": "d"}',
    ]
    rows = list(read_rows(lines, "in", "given", json_lines=None))
    assert [(r.line, r.index, r.prompt, r.response) for r in rows] == [
        (1, 1, "q", "a"),
        (3, 1, ASK, "b"),
        (3, 2, ASK, "c"),
        (4, 1, "given", "d"),
    ]
    plain = list(read_rows(["one\r\n", "{two\n"], "in", "p", json_lines=None))
    assert [r.response for r in plain] == ["one", "{two"]
    for line, message in (("{}", "needs 'response'"), ('{"responses": [1]}', "needs 'response'"), ("{", "valid JSON")):
        with pytest.raises(InputError, match=f"in, line 1: .*{message}"):
            list(read_rows([line], "in", "p", json_lines=True))


def test_scores_come_before_the_next_row_is_read() -> None:
    read: list[int] = []

    def lines() -> Any:
        for i in range(4):
            read.append(i)
            yield "x" * i + "y\n"

    reward = CallableReward(by_length)
    stream = score_rows(reward, read_rows(lines(), "in", "p", json_lines=None), 1)
    assert next(stream)[1] == pytest.approx(0.1) and read == [0]
    assert [round(score, 3) for _, score in stream] == [0.2, 0.3, 0.4]


def checks(folder: Path, pairs: Sequence[Pair] | None = None) -> dict[str, Check]:
    found = verify(folder, pairs)
    return {check.name: check for check in found}


def test_the_shipped_reward_passes_every_check() -> None:
    seen: list[Check] = []
    given_pairs = [Pair("p", pair.rejected, pair.chosen) for pair in PAIRS]
    found = verify(shipped.reward(), given_pairs, seen.append)
    assert seen == found
    names = ["files", "provider", "golden", "finite", "batch", "padding", "tokens", "determinism", "speed", "ranking"]
    assert [check.name for check in found] == [*names, "given pairs"]
    assert [check.name for check in found if not check.passed] == ["given pairs"]
    assert found[-1].advice
    sizes = next(check for check in found if check.name == "speed").figures["sizes"]
    assert [(s["asked"], s["tokens"]) for s in sizes] == [(128, 128), (512, 256), (2048, 256)]
    assert all(s["scores_per_s"] > 0 for s in sizes)
    assert all(s["peak_bytes"] is None or s["peak_bytes"] > 20_000_000 for s in sizes)


def spoilt_model(change: Callable[[onnx.GraphProto], None]) -> onnx.ModelProto:
    proto = model()
    change(proto.graph)
    return proto


def reads_padding(graph: onnx.GraphProto) -> None:
    """The mask is taken for ones: padding is attended to and counted."""
    for node in graph.node:
        if node.op_type == "Cast":
            node.input[0] = "ones"
    graph.node.insert(0, helper.make_node("Shape", ["attention_mask"], ["size"]))
    one = numpy_helper.from_array(np.array([1], np.int64))
    graph.node.insert(1, helper.make_node("ConstantOfShape", ["size"], ["ones"], value=one))


def scaled_by_batch(graph: onnx.GraphProto) -> None:
    """As dynamic quantisation: what is largest in the batch moves every score."""
    last = graph.node[-1]
    last.output[0] = "plain"
    graph.node.append(helper.make_node("ReduceMax", ["x"], ["largest"], keepdims=0))
    graph.node.append(helper.make_node("Mul", ["plain", "largest"], ["score"]))


def at_random(graph: onnx.GraphProto) -> None:
    last = graph.node[-1]
    last.output[0] = "plain"
    graph.node.append(helper.make_node("RandomNormalLike", ["plain"], ["noise"], dtype=TensorProto.FLOAT))
    graph.node.append(helper.make_node("Add", ["plain", "noise"], ["score"]))


def divided_by_zero(graph: onnx.GraphProto) -> None:
    last = graph.node[-1]
    last.output[0] = "plain"
    graph.node.append(helper.make_node("Sub", ["plain", "plain"], ["nothing"]))
    graph.node.append(helper.make_node("Div", ["plain", "nothing"], ["score"]))


@pytest.mark.parametrize(
    ("change", "name", "says"),
    [
        (reads_padding, "padding", "a long neighbour moves a score by"),
        (scaled_by_batch, "batch", "company in a batch moves a score by"),
        (at_random, "determinism", "scores of the same responses differ by"),
        (divided_by_zero, "finite", "of them not finite"),
    ],
)
def test_spoilt_models_fail_the_check_that_is_meant_for_them(
    tmp_path: Path, change: Callable[[onnx.GraphProto], None], name: str, says: str
) -> None:
    found = checks(write_reward(tmp_path, proto=spoilt_model(change)))
    assert not found[name].passed and says in found[name].says and found[name].advice
    assert name != "finite" or not (found.keys() & {"batch", "padding"} or found["ranking"].passed)
    sound = checks(write_reward(tmp_path / "sound"))
    assert sound[name].passed


def test_folders_that_do_not_load_say_so(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").touch()
    for spoil, message in (
        (lambda: None, "holds no reward.json"),
        (lambda: (write_reward(tmp_path) / "model.onnx").write_bytes(b"x"), "does not match its sha256"),
    ):
        spoil()
        (check,) = verify(tmp_path)
        assert check.name == "load" and not check.passed and message in check.says and check.advice


def test_golden_scores_are_a_check_of_their_own(tmp_path: Path) -> None:
    golden = [{"prompt": "tell", "response": "good", "score": 100}]
    found = checks(write_reward(tmp_path, golden=golden))
    assert not found["golden"].passed and "1 golden scores, the furthest off by" in found["golden"].says
    assert "another model would go unnoticed" in checks(write_reward(tmp_path))["golden"].says


def test_tokenizers_of_another_model(tmp_path: Path) -> None:
    folder = write_reward(tmp_path)
    larger = tokenizer()
    larger.add_tokens(["wolf", "hen"])
    rewrite_tokenizer(folder, larger)
    found = checks(folder)["tokens"]
    assert not found.passed and "2 tokens beyond the model's 14 embeddings (first 'wolf', 14)" in found.says
    template = "<|user|> {{ messages[-1].content }}"
    other = write_reward(tmp_path / "chat", input_kind="chat", input_template=template)
    assert "the chat template writes '<|user|>', which is no token" in checks(other)["tokens"].says
    assert "of plain English are unknown tokens" in checks(other)["tokens"].says


def rewrite_tokenizer(folder: Path, made: Any) -> None:
    from onnx_files import sha256

    made.save(str(folder / "tokenizer.json"))
    path = folder / "reward.json"
    data = json.loads(path.read_text())
    data["files"]["tokenizer.json"] = sha256(folder / "tokenizer.json")
    path.write_text(json.dumps(data))


def test_built_in_pairs_are_equally_long_and_all_different() -> None:
    assert len({pair.prompt for pair in PAIRS}) == len(PAIRS) == 18
    for pair in PAIRS:
        assert abs(len(pair.chosen) - len(pair.rejected)) <= 0.2 * len(pair.chosen), pair.prompt


def test_describing_folders(tmp_path: Path) -> None:
    write_reward(tmp_path / "one")
    write_reward(tmp_path / "two")
    (tmp_path / "three").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "one")
    names = [path.name for path in find_rewards([tmp_path, tmp_path / "two", tmp_path / "missing"])]
    assert sorted(names) == ["link", "two"]
    about = describe(tmp_path / "one")
    assert about.parameters == {"float32": len(WORDS) * 8 + 2 * 8 + 8 + 2}
    assert about.size == sum((tmp_path / "one" / n).stat().st_size for n in ("model.onnx", "tokenizer.json"))
    with pytest.raises(RewardError, match="holds no reward.json"):
        describe(tmp_path / "three")
