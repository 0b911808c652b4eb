"""Rules: 0 is the best score, each violated unit takes 1 away, and no text breaks or hangs one."""

from __future__ import annotations

import json
import time
import unicodedata
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper
from onnx_files import model, write_reward

from aisp_local.errors import RewardError
from aisp_local.rewards import OnnxReward
from aisp_local.rewards.rules import (
    Classifier,
    Forbidden,
    JsonSchema,
    Language,
    Length,
    Readability,
    Repetition,
    Required,
    Rule,
    Similarity,
    reading_ease,
)

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"name": {"type": "string", "pattern": "^(a+)+$"}, "age": {"type": "integer"}},
    "required": ["name", "age"],
}


def rules() -> list[Rule]:
    return [
        Length(words=[3, 5]),
        Length(characters=[10, 20]),
        Length(sentences=[1, 2]),
        Required(words=["fox"], patterns=[r"sto(ry|ries)"]),
        Forbidden(words=["bad"], patterns=[r"(a|aa)+b", r"a.*z|a"]),
        Readability(ease=[60, 100]),
        JsonSchema(schema=SCHEMA, fenced=True),
        Language(language="en", among=["en", "fr", "de"]),
        Repetition(),
        Similarity(reference="The fox went home."),
        Similarity(reference="The fox went home.", on="words"),
    ]


def one(rule: Rule, text: str) -> float:
    return float(rule.score("a prompt", [text])[0])


@settings(max_examples=50)
@given(st.lists(st.text(st.characters(codec=None, exclude_categories=())), max_size=4))
def test_any_text_gets_a_score_of_at_most_0_that_is_its_own(texts: list[str]) -> None:
    for rule in rules():
        scores = rule.score("p", texts)
        assert scores.dtype == np.float32 and scores.shape == (len(texts),)
        assert np.isfinite(scores).all() and (scores <= 1e-6).all()
        assert [one(rule, text) for text in texts] == scores.tolist()
        np.testing.assert_array_equal(rule.score("another", texts[::-1]), scores[::-1])


@pytest.mark.parametrize(
    "text",
    [
        "a" * 1_000_000,
        "." * 999_999 + "x",
        "ab " * 333_333,
        "[" * 1_000_000,
        "\ud800" * 1_000_000,
        "'-" * 500_000,
        "9" * 10**6,
        "a" + "\u0301\u0316" * 500_000,
    ],
    ids=["letters", "stops", "words", "brackets", "surrogates", "marks", "digits", "accents"],
)
def test_a_million_characters_do_not_hang(text: str) -> None:
    for rule in rules():
        began = time.process_time()
        assert np.isfinite(one(rule, text))
        assert time.process_time() - began < 20, rule.name


def test_length() -> None:
    rule = Length(words=[20, 60])
    assert one(rule, "word " * 20) == one(rule, "word " * 60) == 0
    assert one(rule, "word " * 65) == one(rule, "word " * 15) == -0.5
    assert one(rule, "") == -2
    assert one(Length(words=[0, 3], unit=1), "it's a well-known fact, isn't it") == -3
    assert one(Length(characters=[10, float("inf")]), "  12345  ") == pytest.approx(-0.1)
    assert one(Length(words=[3, 3], unit=1), "हिन्दी में कहानी") == 0, "vowel signs part no words"
    stops = Length(sentences=[2, 2])
    assert one(stops, 'He paid 3.50 dollars... "Why?"') == 0
    assert one(stops, "One. Two! Three? Four") == -2
    assert one(stops, "") == -2


@given(st.integers(0, 200), st.integers(0, 200))
def test_length_falls_with_the_distance(a: int, b: int) -> None:
    rule = Length(words=[20, 60], unit=7)
    away = [max(0, 20 - n, n - 60) for n in (a, b)]
    scores = rule.score("", ["w " * a, "w " * b])
    np.testing.assert_allclose(scores, -np.array(away) / 7, rtol=1e-6)
    assert (away[0] < away[1]) == (scores[0] > scores[1])


def test_words_are_whole_and_patterns_are_not() -> None:
    assert one(Required(words=["cat", "ball", "ice cream"]), "A Cat with a ball.") == -1
    assert one(Required(words=["cat"]), "concatenate cats") == -1
    assert one(Required(words=["cat"], ignore_case=False), "Cat") == -1
    assert one(Required(words=["café", "C++"]), "un café, C++.") == 0
    assert one(Required(words=["a", "b", "c"], at_least=2), "only a here") == -1
    assert one(Required(patterns=[r"\d+ foxes"]), "12 FOXES") == 0
    assert one(Forbidden(words=["bad", "very bad"]), "Bad, bad, very bad; badly") == -4
    assert one(Forbidden(patterns=["b.d"]), "bad badly bid") == -3
    assert one(Forbidden(patterns=["B.d"], ignore_case=False), "bad Bed") == -1
    assert one(Forbidden(words=["bad"]), "bad " * 500) == -100


@given(st.integers(0, 30), st.integers(0, 30))
def test_forbidden_counts_and_required_misses(n: int, m: int) -> None:
    assert one(Forbidden(words=["bad", "worse"]), "bad good " * n + "worse " * m) == -(n + m)
    names = [f"word{i}" for i in range(30)]
    assert one(Required(words=names), " ".join(names[:n])) == n - 30


# Letters that have composed and decomposed forms, apostrophes, cases of unequal length, and what is none of it.
WRITTEN = st.text(
    "aeE\u00e9\u00c5\u212b\u0301\u0327\u1e69\u0323ßSſİıΣσς'’ʼ`´ﬁｆ２²\u2011- .,\u00a0\u00adक\u093f\uac00", max_size=12
)


@settings(max_examples=60)
@given(WRITTEN, WRITTEN)
@example("E\u0301´E", "")
def test_it_does_not_matter_how_unicode_writes_a_text(word: str, text: str) -> None:
    forms = [unicodedata.normalize(form, text) for form in ("NFC", "NFD")]
    for rule in rules():
        if not isinstance(rule, JsonSchema):
            assert one(rule, forms[0]) == one(rule, forms[1]), rule.name
    seen = unicodedata.normalize("NFKC", word.replace("\u00ad", "")).strip()
    if not seen:
        return
    for ignore_case in (True, False):
        rule = Forbidden(words=[word], ignore_case=ignore_case)
        sentence = f"x, {word}, {text}"
        assert one(rule, sentence) <= -1, "a word is found in itself"
        written = {unicodedata.normalize(form, sentence) for form in ("NFC", "NFD", "NFKC")}
        written |= {sentence.replace("'", "’"), sentence.replace(" ", "\n"), sentence.replace("e", "e\u00ad")}
        if ignore_case:
            written |= {sentence.casefold()}
        if not {"`", "´"} & set(sentence):  # apostrophes between letters only, which NFKC may bring
            assert {one(rule, other) for other in written} == {one(rule, sentence)}
        assert one(Required(words=[word], ignore_case=ignore_case), sentence) == 0


def test_words_are_found_however_they_are_written() -> None:
    for word, texts in {
        "don't": ("Don’t go", "DON'T!", "donʼt", "don´t", "don`t"),
        "don’t": ("I don't",),
        "café": ("Un CAFE\u0301.", "café’s"),
        "Straße": ("STRASSE", "straße"),
        "ΟΔΟΣ": ("οδος", "οδοσ"),
        "final": ("a ﬁnal word", "ｆｉｎａｌ", "fi\u00adnal"),
        "ice  cream": ("Ice\u00a0cream", "ice\n cream"),
        "well-known": ("well\u2011known",),
        "fox": ("the fox's den", "FOX’S", "the fox’ll come"),
    }.items():
        for text in texts:
            assert one(Forbidden(words=[word]), text) == -1, (word, text)
    for word, texts in {
        "won": ("He won't go.", "He won’t go.", "WON'T"),
        "can": ("can’t", "cannot"),
        "cafe": ("cafe\u0301", "café"),
        "कम": ("कमी",),
        "2": ("m²",),
        "'": ("a `word`",),
    }.items():
        for text in texts:
            assert one(Forbidden(words=[word]), text) == 0, (word, text)
    assert one(Forbidden(words=["`"]), "don't") == 0
    assert one(Forbidden(words=["Straße"], ignore_case=False), "STRASSE straße Straße") == -1
    with pytest.raises(RewardError, match="without any visible character"):
        Forbidden(words=["\u00ad"])
    # Patterns see the text as it is, but for composed letters.
    assert one(Forbidden(patterns=["cafe\u0301", "don't"]), "café cafe\u0301 don’t ﬁ") == -2
    assert one(Forbidden(patterns=["’", "ﬁ", r"\xa0"]), "don’t ﬁ\u00a0x") == -3


def test_a_pathological_pattern_takes_linear_time() -> None:
    rule = Forbidden(patterns=[r"(a+)+$", r"(.*a){12}x", r"(a|aa)+b"])
    began = time.process_time()
    assert one(rule, "a" * 200_000 + "!") == 0
    assert one(Required(patterns=[r"(x+x+)+y"]), "x" * 200_000) == -1
    assert time.process_time() - began < 10


@pytest.mark.parametrize("pattern", ["(?=a)b", r"(a)\1", "(", "a*", "^", "(?<!a)b"])
def test_patterns_that_are_refused(pattern: str) -> None:
    with pytest.raises(RewardError, match="'patterns'"):
        Forbidden(patterns=[pattern])


def test_readability() -> None:
    easy = "The cat sat. The dog ran. We had fun."
    hard = "Institutional accountability necessitates comprehensive organizational transparency and deliberation."
    assert reading_ease(easy) > 100 and reading_ease(hard) < 0
    # 9 words, 3 sentences, 9 syllables
    assert reading_ease(easy) == pytest.approx(206.835 - 1.015 * 3 - 84.6)
    assert one(Readability(ease=[90, 121.22]), easy) == 0
    assert one(Readability(ease=[90, 121.22], unit=5), hard) < one(Readability(ease=[90, 121.22]), hard) < -5
    assert one(Readability(ease=[0, 100]), "") == -10


def test_json() -> None:
    rule = JsonSchema(schema=SCHEMA)
    found = {
        '{"name": "aaa", "age": 3}': 0,
        '{"name": "aaa"}': -1,
        '{"name": "b"}': -1.5,
        "[1, 2]": -2,
        '"text"': -2,
        "Sure! {}": -3,
        "": -3,
        "NaN": -3,
        '{"name": "\\ud800", "age": 3}': -3,
        '```json\n{"name": "a", "age": 3}\n```': -3,
    }
    assert {text: one(rule, text) for text in found} == found
    fenced = JsonSchema(schema=SCHEMA, fenced=True)
    for text in ('```\n{"name": "a", "age": 3}```', ' \n```JSON \t\n\n {"name": "a", "age": 3} \n \t``` \n'):
        assert one(fenced, text) == 0
    for text in ("```\n```", "```", "```json", "``` \n``", "x ```\n{}\n```", "```\n{}\n``` x", "```a\n{}\n```"):
        assert one(fenced, text) == -3
    assert one(fenced, '```json\n{"name": "a", "age": 3}\n```') == 0
    began = time.process_time()
    assert one(rule, json.dumps({"name": "a" * 100_000 + "b", "age": 1})) == -1
    assert time.process_time() - began < 5


def test_a_fence_and_a_million_blanks_take_no_time() -> None:
    rule = JsonSchema(schema=SCHEMA, fenced=True)
    blanks = " " * 1_000_000
    for text in ("```\n" + blanks, "```" + blanks, "```json\n{}\n```" + blanks + "x", "```\n" + "\n" * 1_000_000):
        began = time.process_time()
        assert rule.one(text) == -3
        assert time.process_time() - began < 1


def test_schemas_that_are_refused(tmp_path: Path) -> None:
    for schema in ({"type": "objekt"}, {"pattern": "(?=a)b"}, {"$ref": "http://127.0.0.1:9/x.json"}, {"pattern": "("}):
        with pytest.raises(RewardError, match="'schema' is not a valid JSON schema"):
            JsonSchema(schema=schema)
    with pytest.raises(RewardError, match="'file'.*cannot be read"):
        JsonSchema(file=tmp_path / "none.json")
    (tmp_path / "half.json").write_text("{")
    with pytest.raises(RewardError, match="'file'.*not valid JSON"):
        JsonSchema(file=tmp_path / "half.json")
    with pytest.raises(RewardError, match="one of them"):
        JsonSchema()


def test_language() -> None:
    texts = {
        "en": "Once upon a time there was a little fox who lived in the woods.",
        "fr": "Il était une fois un petit renard qui vivait dans la forêt.",
        "de": "Es war einmal ein kleiner Fuchs, der im Wald lebte.",
        "es": "Había una vez un pequeño zorro que vivía en el bosque.",
    }
    for code in texts:
        scores = Language(language=code).score("", list(texts.values()))
        assert list(texts)[int(scores.argmax())] == code and scores.max() > -0.2
        assert sorted(scores)[-2] < -0.8
    assert one(Language(language="en"), "123 ...") == -1
    with pytest.raises(RewardError, match="'english' is unknown"):
        Language(language="english")
    with pytest.raises(RewardError, match="must hold 'en'"):
        Language(language="en", among=["fr", "de"])
    with pytest.raises(RewardError, match="'among' is .*name each language once"):
        Language(language="en", among=["en", "en"])


def test_repetition() -> None:
    assert one(Repetition(), "a b c d e") == 0
    assert one(Repetition(), "a b") == 0
    assert one(Repetition(n=1), "A a b b") == -0.5
    assert one(Repetition(n=2), "a b a b a") == -0.5  # ab ba ab ba
    assert -1 < one(Repetition(), "so " * 1000) < -0.99


@given(st.lists(st.sampled_from("abc"), max_size=30), st.integers(1, 4))
def test_repetition_is_the_share_of_ngrams_seen_before(words: list[str], n: int) -> None:
    grams = [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
    expected = len(set(grams)) / len(grams) - 1 if grams else 0
    assert one(Repetition(n=n), " ".join(words)) == pytest.approx(expected)


def chrf(reference: str, response: str) -> float:
    found = []
    for n in range(1, min(6, len(reference)) + 1):
        mine = [reference[i : i + n] for i in range(len(reference) - n + 1)]
        theirs = [response[i : i + n] for i in range(len(response) - n + 1)]
        common = sum(min(mine.count(g), theirs.count(g)) for g in set(mine))
        precision, recall = common / len(theirs) if theirs else 0.0, common / len(mine)
        found.append(5 * precision * recall / (4 * precision + recall) if common else 0.0)
    return sum(found) / len(found)


@given(st.text("abcd", min_size=1, max_size=12), st.text("abcd", max_size=12))
def test_similarity_is_chrf(reference: str, response: str) -> None:
    rule = Similarity(reference=reference)
    assert one(rule, response) == pytest.approx(chrf(reference, response) - 1, abs=1e-6)
    assert one(rule, f" {reference.upper()} ") == 0
    assert one(rule, "xyz") == one(rule, "") == -1


def test_similarity_of_words() -> None:
    rule = Similarity(reference="the red fox", on="words")
    assert one(rule, "Fox, the red!") == 0
    assert one(rule, "the fox") == pytest.approx(0.8 - 1)
    with pytest.raises(RewardError, match="'reference'"):
        Similarity(reference=" ")


def classifier(folder: Path) -> Path:
    """Two columns: the score of the tiny reward and its negative."""
    proto = model(output="one_column")
    graph = proto.graph
    axis = onnx.numpy_helper.from_array(np.array([1]), "axis_last")
    graph.initializer.append(axis)
    graph.node.append(helper.make_node("Unsqueeze", ["one_column", "axis_last"], ["column_0"]))
    graph.node.append(helper.make_node("Neg", ["column_0"], ["column_1"]))
    graph.node.append(helper.make_node("Concat", ["column_0", "column_1"], ["score"], axis=1))
    del graph.output[:]
    graph.output.append(helper.make_tensor_value_info("score", TensorProto.FLOAT, ["n", 2]))
    return write_reward(folder, proto=proto)


def test_a_class_of_a_classifier(tmp_path: Path) -> None:
    folder = classifier(tmp_path)
    reward = OnnxReward.load(folder)
    texts = ["good fox", "bad", "", "the story"]
    logits = reward.outputs("tell", texts).astype(np.float64)
    assert logits.shape == (4, 2)
    np.testing.assert_array_equal(reward.score("tell", texts), logits[:, 0].astype(np.float32))
    p = 1 / (1 + np.exp(-2 * logits[:, 0]))
    np.testing.assert_allclose(Classifier(folder=folder, columns=[0]).score("tell", texts), p - 1, atol=1e-6)
    np.testing.assert_allclose(Classifier(folder=reward, columns=[0], wanted=False).score("tell", texts), -p, atol=1e-6)
    either = Classifier(folder=reward, columns=[0, 1], through="sigmoid").score("tell", texts)
    np.testing.assert_allclose(either, 1 / (1 + np.exp(-np.abs(logits[:, 0]))) - 1, atol=1e-6)
    with pytest.raises(RewardError, match="'columns' is 2; it must be a whole number from 0 to 1"):
        Classifier(folder=reward, columns=[2])
    with pytest.raises(RewardError, match="their softmax is always 1"):
        Classifier(folder=reward, columns=[0, 1])


@pytest.mark.parametrize(
    ("make", "key"),
    [
        (lambda: Length(words=[60, 20]), "'words'"),
        (lambda: Length(words=[1, 2], characters=[1, 2]), "exactly one"),
        (lambda: Length(words=[1, float("nan")]), "'words'"),
        (lambda: Length(words=[1, 2], unit=0), "'unit'"),
        (lambda: Required(), "give 'words'"),
        (lambda: Required(words=["a"], at_least=2), "'at_least'"),
        (lambda: Required(words="fox"), "'words'"),
        (lambda: Forbidden(words=[""]), "'words'"),
        (lambda: Repetition(n=0), "'n'"),
        (lambda: Similarity(reference="a", on="lines"), "'on'"),
        (lambda: Readability(ease=[10]), "'ease'"),
    ],
)
def test_arguments_that_are_refused(make: Any, key: str) -> None:
    with pytest.raises(RewardError, match=key):
        make()
