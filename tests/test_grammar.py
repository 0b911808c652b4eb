"""Grammars: what is read, what schemas become, and the law that is sampled from under one."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema_rs
import numpy as np
import pytest
from click.testing import CliRunner

from aisp_local import Aligner, Grammar, InputError, Sampling, shipped
from aisp_local.cli.generate import generate
from aisp_local.cli.options import read_grammar
from aisp_local.controllers import METHODS
from aisp_local.engine import LlamaEngine
from aisp_local.engine.constraint import Constraint, constrained_law
from aisp_local.engine.sampling import log_law
from aisp_local.native import Matcher, Model
from aisp_local.rewards.function import CallableReward
from aisp_local.seeds import RowSeeds
from aisp_local.testing import needed
from aisp_local.types import Controls, Message

CHAT: list[Message] = [{"role": "user", "content": "Tell me of a fox."}]
PERSON: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "animal": {"enum": ["fox", "cat"]},
        "age": {"type": "integer", "minimum": 1, "maximum": 20},
    },
    "required": ["name", "animal", "age"],
    "additionalProperties": False,
}

WRONG = [
    ("", "no rule root"),
    ('x ::= "a"', "no rule root"),
    ('root ::= "a', "line 1, column 10: this text is never closed"),
    ('root ::= "a"\nb ::= [a-z', "line 2, column 7: this set is never closed"),
    ('root ::= "\\q"', "line 1, column 10"),
    ('root ::= ("a"', "column 10: this parenthesis is never closed"),
    ('root ::= "a")', "column 13: this parenthesis was never opened"),
    ("root ::= *", "nothing before * that could be repeated"),
    ("root ::= foo", "column 10: there is no rule foo"),
    ('root ::= "a"\n  | "b"', "line 2, column 3: a rule must begin here"),
    ('root = "a"', "'=' means nothing here"),
    ('root\n::= "a"', "::= must follow the name root"),
    ("root", "::= must follow the name root"),
    ('root ::= "a" b ::= "c"', "::= stands within a rule"),
    ("root ::= a_b", "names have letters, digits and -"),
    ('root ::= "a"{3,2}', "ends below where it begins"),
    ('root ::= "a"{9999}', "too many repetitions"),
    ('root ::= "' + "a" * 99 + '"{2000}', "too many repetitions"),
    ('root ::= ("a" ("b" | "c")?){0,1000}', "too many repetitions"),
    ("root ::= " + "(" * 50_000, "nested more than 100 deep"),
    ("root ::= " + "a" * 100_000, "at most 100000"),
    ('root ::= "a\0"', "a zero byte"),
]

SCHEMAS: dict[str, Any] = {
    "person": PERSON,
    "empty object": {"type": "object", "properties": {}, "additionalProperties": False},
    "any object": {"type": "object"},
    "optional": {"properties": {name: {"type": "boolean"} for name in "abcd"}, "required": ["c"]},
    "all optional": {"type": "object", "properties": {name: {"type": "null"} for name in "abc"}},
    "undeclared": {"type": "object", "required": ["x"], "additionalProperties": {"type": "integer"}},
    "map": {"type": "object", "additionalProperties": {"type": "boolean"}},
    "array": {"type": "array", "items": {"type": "integer"}, "minItems": 2, "maxItems": 3},
    "one item": {"type": "array", "items": {"const": 'x\n"\\é'}, "minItems": 1},
    "tuple": {"type": "array", "prefixItems": [{"type": "null"}, {"type": "boolean"}], "items": False},
    "texts": {"type": "string", "minLength": 2, "maxLength": 4},
    "types": {"type": ["string", "null"], "maxLength": 2},
    "enum": {"enum": ["a\\b", 1, 1.5, None, True, {"k": [1]}]},
    "typed enum": {"type": ["number"], "enum": ["a", 2, 2.5]},
    "low": {"type": "integer", "minimum": -12, "maximum": 7},
    "high": {"type": "integer", "exclusiveMinimum": 99, "exclusiveMaximum": 1234},
    "negative": {"type": "integer", "maximum": -3},
    "at least": {"type": "integer", "minimum": 17},
    "share": {"type": "number", "minimum": 0, "maximum": 1},
    "positive": {"type": "number", "exclusiveMinimum": 0},
    "between": {"type": "number", "exclusiveMinimum": -3, "exclusiveMaximum": 12},
    "below": {"type": "number", "exclusiveMaximum": 0, "minimum": -2},
    "number": {"type": "number"},
    "tree": {
        "$ref": "#/$defs/node",
        "$defs": {"node": {"anyOf": [{"type": "null"}, {"type": "array", "items": {"$ref": "#/$defs/node"}}]}},
    },
    "same names": {
        "type": "object",
        "properties": {"a": {"$ref": "#/$defs/x/a"}, "b": {"$ref": "#/$defs/y/a"}, "space": {"$ref": "#/$defs/z~1"}},
        "required": ["a", "b", "space"],
        "$defs": {"x": {"a": {"const": 1}}, "y": {"a": {"const": 2}}, "z/": {"type": "null"}},
    },
    "oneOf": {
        "oneOf": [
            {"type": "object", "properties": {"kind": {"const": kind}, "x": {"type": "null"}}, "required": ["kind"]}
            for kind in ("cat", "dog")
        ]
    },
    "date": {"type": "string", "format": "date"},
    "time": {"type": "string", "format": "date-time"},
    "uuid": {"type": "string", "format": "uuid"},
    "allOf": {"allOf": [{"type": "boolean"}]},
}

REFUSED: list[tuple[Any, str]] = [
    ({"type": "strin"}, "not a valid JSON schema"),
    ({"$ref": "https://example.org/x"}, "nothing is fetched"),
    ({"$schema": "https://example.org/x"}, "not a valid JSON schema"),
    ({"type": "string", "pattern": "^a$"}, "at #: a grammar cannot hold a response to 'pattern'"),
    ({"properties": {"a": {"uniqueItems": True}}}, "at #/properties/a: a grammar cannot hold a response to 'uniqueIt"),
    ({"type": "string", "format": "email"}, "the format 'email' is not known; use date"),
    ({"type": "number", "minimum": 0.5}, "only whole bounds"),
    ({"type": "integer", "minimum": 5, "maximum": 4}, "no whole number"),
    ({"type": "number", "exclusiveMinimum": 0, "maximum": 0}, "no number is within"),
    ({"anyOf": [{"type": "null"}], "minLength": 3}, "'anyOf' beside 'minLength'"),
    ({"anyOf": [{"type": "null"}], "type": "string"}, "not all of its parts"),
    ({"allOf": [{"type": "string"}, {"maxLength": 3}]}, "'allOf' with several parts"),
    ({"oneOf": [{"type": "integer"}, {"type": "number"}]}, "'oneOf' may overlap"),
    ({"type": "object", "required": ["a"], "additionalProperties": False}, "required and not allowed"),
    ({"type": "string", "enum": [1]}, "no value is left"),
    ({"const": True, "enum": [1, "a"]}, "no value is left"),
    ({"enum": [float("inf")]}, "a value is no JSON"),
    ({"enum": [f"value {i}" for i in range(30_000)]}, "at most 100000 are taken"),  # without comparing all pairs
    ({"oneOf": [{"const": i} for i in range(101)]}, "'oneOf' has 101 parts"),
    ({"not": {}}, "'not'"),
]


@pytest.fixture(scope="module")
def engine() -> Iterator[LlamaEngine]:
    with LlamaEngine(shipped.model(), threads=1) as made:
        yield made


@pytest.fixture(scope="module")
def aligner(engine: LlamaEngine) -> Aligner:
    """A reward that wants long answers, which a limit of tokens cuts."""
    return Aligner(engine, CallableReward(lambda prompt, texts: [float(len(text)) for text in texts]))


@pytest.mark.parametrize(("text", "message"), WRONG)
def test_what_is_no_grammar_is_refused_with_where(text: str, message: str) -> None:
    with pytest.raises(InputError) as caught:
        Grammar(text)
    assert message in str(caught.value)


@pytest.mark.native
def test_llama_reads_what_passes_and_says_nothing(engine: LlamaEngine, capfd: pytest.CaptureFixture[str]) -> None:
    text = """# a comment
root ::= (greeting |
  "bye" # another
)+ [^a-c\\]\\x41-\\u0042]{2} .? ("x"{0,3} y){2,} !<[5]>* <[6]>?
greeting ::= "hello\\n\\"" {2}
y ::= | "" "y"
"""
    engine.check_grammar(Grammar(text))
    assert capfd.readouterr().err == ""
    engine.check_grammar(Grammar('root ::= ("a"?)*'))
    with pytest.raises(InputError, match="a rule begins with itself"):
        engine.check_grammar(Grammar('root ::= x? root "a" | "b"\nx ::= "x"'))


@pytest.mark.parametrize(("schema", "message"), REFUSED)
def test_what_no_grammar_can_hold_to_is_refused(schema: Any, message: str) -> None:
    with pytest.raises(InputError) as caught:
        Grammar.of(schema)
    assert message in str(caught.value)


def walk(model: Model, matcher: Matcher, rng: np.random.Generator) -> str | None:
    """A text of the grammar, drawn without a model; None if it became too long."""
    everything, data = np.arange(model.n_vocab), b""
    for _ in range(150):
        tokens = everything[matcher.allowed(everything)]
        ends = [t for t in tokens if model.eog[t] or model.piece(int(t)) in (b'"', b"]", b"}", b" }", b" ]")]
        token = int(rng.choice(ends if ends and rng.random() < 0.4 else tokens))
        matcher.accept(token)
        if model.eog[token]:
            return data.decode()
        data += model.piece(token)
    return None


@pytest.mark.native
@pytest.mark.parametrize("name", SCHEMAS)
def test_every_text_of_a_schemas_grammar_is_valid(engine: LlamaEngine, name: str) -> None:
    schema, rng = SCHEMAS[name], np.random.default_rng(1)
    root = Matcher(engine.model, Grammar.of(schema))
    validator = jsonschema_rs.validator_for(schema, validate_formats=True)
    texts = [text for _ in range(8) if (text := walk(engine.model, root.clone(), rng)) is not None]
    assert len(texts) >= 3
    for text in texts:
        assert validator.is_valid(json.loads(text)), text


def at(model: Model, gbnf: str, text: str = "") -> Constraint:
    constraint = Constraint(Matcher(model, Grammar(gbnf)), np.random.default_rng(2).random(4096))
    constraint.follow(model.tokenize(text, add_special=False, parse_special=False))
    return constraint


SAMPLINGS = [Sampling(1.0), Sampling(0.7, min_p=0.05), Sampling(1.3, top_p=0.8), Sampling(1.0, top_k=20, min_p=0.01)]


@pytest.mark.native
@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize("gbnf", ["root ::= [a-m ] [a-z ]*", 'root ::= "q" | "zz"'], ids=["some", "unlikely"])
def test_tokens_are_drawn_from_the_cut_law_of_which_the_allowed_remain(
    engine: LlamaEngine, sampling: Sampling, gbnf: str
) -> None:
    model, n = engine.model, 1500
    logits = (np.random.default_rng(3).standard_normal(model.n_vocab) * 2.5).astype(np.float32)
    constraint = at(model, gbnf)
    allowed = constraint.allowed(np.arange(model.n_vocab))
    x = logits.astype(np.float64)
    cut = np.exp(log_law(logits[None], sampling)[0])
    law = np.where(allowed, cut, 0.0)
    if not law.any():
        law = np.exp(log_law(np.where(allowed, logits, -np.inf).astype(np.float32)[None], sampling)[0])
    law /= law.sum()
    uniforms = (np.arange(n) + 0.5) / n
    cumulative = cut.cumsum() / cut.sum()
    counts = np.zeros(len(x))
    for step, u in enumerate(uniforms):
        token = constraint.choose(logits, sampling, int((cumulative > u).argmax()), step)
        assert token is not None
        counts[token] += 1
    assert not counts[law == 0].any()
    likely = law > 0.01
    np.testing.assert_allclose(counts[likely] / n, law[likely], atol=4 * np.sqrt(0.25 / n))
    row = constraint.law(logits, sampling)
    assert row is not None
    weights = np.exp((row.astype(np.float64) - row.max()) / sampling.temperature)
    np.testing.assert_allclose(weights / weights.sum(), law, atol=1e-6)


@pytest.mark.native
def test_laws_that_are_told_are_of_the_allowed_tokens(engine: LlamaEngine) -> None:
    model, sampling = engine.model, Sampling(0.8, min_p=0.05)
    rng = np.random.default_rng(4)
    logits = (rng.standard_normal((2, model.n_vocab)) * 3).astype(np.float32)
    shift = rng.standard_normal(model.n_vocab).astype(np.float32)
    both = [at(model, "root ::= [a-m ]+"), at(model, 'root ::= "q" | "zz"')]
    rows, tokens, p, base = constrained_law(logits, both, sampling, shift)
    for i, constraint in enumerate(both):
        mine = rows == i
        row = constraint.law(logits[i], sampling)
        assert row is not None and constraint.allowed(tokens[mine]).all()
        expected = np.exp((row[tokens[mine]].astype(np.float64) - row.max()) / 0.8)
        np.testing.assert_allclose(p[mine], expected / expected.sum(), rtol=1e-4, atol=1e-7)
        expected = np.exp((logits[i] - shift)[tokens[mine]].astype(np.float64) / 0.8)
        np.testing.assert_allclose(base[mine], expected / expected.sum(), rtol=1e-4)


@pytest.mark.native
def test_a_grammar_that_forbids_nothing_changes_nothing(engine: LlamaEngine) -> None:
    options: dict[str, Any] = {"max_tokens": 12, "seeds": RowSeeds(0), "want": frozenset({"kl", "laws"})}
    controls = Controls(3, np.ones((3, 1, engine.d), np.float32), held=True, sampling=Sampling(0.8, min_p=0.02))
    free = engine.rollout(CHAT, controls, **options)
    held = engine.rollout(CHAT, controls, grammar=Grammar("root ::= [^\\x00]*"), **options)
    assert [t.tolist() for t in free.tokens] == [t.tolist() for t in held.tokens]
    assert free.kl is not None and held.kl is not None and free.laws is not None and held.laws is not None
    np.testing.assert_allclose(free.kl, held.kl, rtol=1e-4)
    np.testing.assert_allclose(free.laws.probability, held.laws.probability, rtol=1e-4, atol=1e-7)


@pytest.mark.native
def test_what_a_grammar_rules_out_is_counted_in_nats(engine: LlamaEngine) -> None:
    """One token of two: KL(law || base) by hand."""
    rollouts = engine.rollout(
        CHAT,
        Controls(1, sampling=Sampling(1.0)),
        max_tokens=1,
        seeds=RowSeeds(0),
        want=frozenset({"kl", "prelogits"}),
        grammar=Grammar('root ::= "q" | "z"'),
    )
    assert rollouts.kl is not None and rollouts.prelogits is not None
    logits = engine.head.logits(rollouts.prelogits[0])[0].astype(np.float64)
    logits -= logits.max()
    logits -= np.log(np.exp(logits).sum())
    two = [int(engine.model.tokenize(text, add_special=False, parse_special=False)[-1]) for text in "qz"]
    mass = np.exp(logits[two]).sum()
    assert rollouts.kl[0] == pytest.approx(-np.log(mass), rel=1e-3)


@pytest.mark.native
@pytest.mark.parametrize("method", sorted(set(METHODS) - {"args"}))
def test_every_method_gives_a_valid_answer(aligner: Aligner, method: str) -> None:
    options = needed(method, aligner.engine.d)
    result = aligner.generate(CHAT, method=method, budget=12, n=6, max_tokens=48, grammar=PERSON, kl=True, **options)
    assert result.status == "complete"
    validator = jsonschema_rs.validator_for(PERSON)
    assert validator.is_valid(json.loads(result.answer))
    for candidate in result.candidates:
        valid = candidate.finish_reason in ("stop", "length")
        assert valid or candidate.finish_reason == "incomplete"
        if valid:
            assert validator.is_valid(json.loads(candidate.text))


@pytest.mark.native
def test_without_the_patch_the_same_answer(engine: LlamaEngine) -> None:
    options: dict[str, Any] = {"max_tokens": 40, "seeds": RowSeeds(0), "grammar": Grammar.of(PERSON)}
    controls = Controls(2, np.ones((2, 1, engine.d), np.float32), held=True, sampling=Sampling(1.0, min_p=0.02))
    with LlamaEngine(shipped.model(), control="callback", threads=1) as other:
        assert list(other.rollout(CHAT, controls, **options).texts) == list(
            engine.rollout(CHAT, controls, **options).texts
        )


@pytest.mark.native
def test_args_asks_about_what_is_allowed_only(aligner: Aligner) -> None:
    result = aligner.generate(CHAT, method="args", budget=2, n=2, max_tokens=40, grammar='root ::= ("a" | "bc")+ "."?')
    assert set(result.answer.replace("bc", "a").rstrip(".")) == {"a"}


@pytest.mark.native
def test_a_schema_a_hundred_runs_a_hundred_valid(aligner: Aligner) -> None:
    age = {"type": "integer", "minimum": 1, "maximum": 99}
    schema = {"type": "object", "properties": {"age": age}, "required": ["age"]}
    prompts = [f"Tell me of fox number {i}." for i in range(100)]
    results = aligner.generate_many(prompts, method="score", budget=4, n=4, max_tokens=14, grammar=schema)
    validator = jsonschema_rs.validator_for(schema)
    valid = [validator.is_valid(json.loads(r.answer)) for r in results if not isinstance(r, BaseException)]
    assert len(valid) == 100 and all(valid)


@pytest.mark.native
@pytest.mark.slow
def test_a_large_schema_a_hundred_runs_a_hundred_valid() -> None:
    schema = PERSON | {
        "properties": PERSON["properties"]
        | {
            "born": {"type": "string", "format": "date"},
            "friends": {"type": "array", "items": {"$ref": "#/$defs/friend"}, "maxItems": 2},
        },
        "required": ["name", "born", "friends"],
        "$defs": {"friend": {"type": "object", "properties": {"name": {"type": "string", "maxLength": 9}}}},
    }
    validator = jsonschema_rs.validator_for(schema, validate_formats=True)
    with Aligner.load() as aligner:
        for seed in range(100):
            method = ("score", "smc", "best-of-n", "aisp", "misvo")[seed % 5]
            result = aligner.generate(CHAT, method=method, budget=8, n=8, max_tokens=200, seed=seed, grammar=schema)
            assert result.status == "complete" and validator.is_valid(json.loads(result.answer)), result.answer


@pytest.mark.native
def test_what_breaks_off_wins_only_where_nothing_else_is_there(aligner: Aligner) -> None:
    """The reward wants long answers, and none of more than four words ends within the limit."""
    grammar = 'root ::= "yes." | ("no" " no"{30} ".")'
    result = aligner.generate(
        "Say:", method="best-of-n", budget=24, n=24, max_tokens=8, temperature=3.0, grammar=grammar
    )
    reasons = {candidate.finish_reason for candidate in result.candidates}
    assert reasons == {"stop", "incomplete"}
    assert result.answer == "yes." and result.status == "complete"
    assert result.reward < max(candidate.reward for candidate in result.candidates)
    (stats,) = result.iterations
    assert stats.best == 4.0 and stats.n_nonfinite == sum(c.finish_reason == "incomplete" for c in result.candidates)
    result = aligner.generate("Say:", budget=4, n=4, max_tokens=4, grammar='root ::= "no"{30}', target_reward=1.0)
    assert result.status == "incomplete" and result.answer.startswith("no")


@pytest.mark.native
def test_a_text_that_could_end_at_the_limit_is_one(aligner: Aligner) -> None:
    result = aligner.generate("Say:", budget=2, n=2, max_tokens=5, grammar="root ::= [a-z ]+", method="best-of-n")
    assert {candidate.finish_reason for candidate in result.candidates} == {"length"} and result.status == "complete"


@pytest.mark.native
def test_a_stop_string_breaks_an_answer_off(aligner: Aligner) -> None:
    options: dict[str, Any] = {"budget": 2, "n": 2, "max_tokens": 20, "method": "best-of-n"}
    result = aligner.generate("Say:", grammar='root ::= "one two three"', stop_strings=[" three"], **options)
    assert result.status == "incomplete" and result.answer == "one two"


@pytest.mark.native
def test_where_nothing_is_allowed_a_rollout_ends(engine: LlamaEngine) -> None:
    """A token that the grammar names and that the answer's text cannot have."""
    rollouts = engine.rollout(
        CHAT,
        Controls(2, sampling=Sampling(1.0, min_p=0.02)),
        max_tokens=9,
        seeds=RowSeeds(0),
        want=frozenset({"kl", "laws", "logprobs"}),
        grammar=Grammar(f'root ::= "a" <[{engine.model.n_vocab + 5}]>'),
    )
    assert list(rollouts.texts) == ["a", "a"] and list(rollouts.finish_reasons) == ["incomplete"] * 2
    assert rollouts.base_logprobs is not None and [len(row) for row in rollouts.base_logprobs] == [1, 1]


@pytest.mark.native
def test_control_tokens_say_nothing_and_are_not_drawn(engine: LlamaEngine) -> None:
    model = engine.model
    matcher = Matcher(model, Grammar("root ::= [^\\x00]*"))
    assert model.silent.any() and not matcher.allowed(np.flatnonzero(model.silent)).any()
    named = Matcher(model, Grammar(f"root ::= <[{int(np.flatnonzero(model.silent)[0])}]>"))
    assert named.allowed(np.flatnonzero(model.silent)[:1]).all()


@pytest.mark.native
@pytest.mark.parametrize("want", [frozenset(), frozenset({"logprobs"})], ids=["read at once", "step by step"])
def test_rollouts_go_on_within_their_grammar(engine: LlamaEngine, want: Any) -> None:
    prefix = engine.model.tokenize("one two", add_special=False, parse_special=False)
    options: dict[str, Any] = {"max_tokens": 12, "seeds": RowSeeds(0), "want": want}
    controls = Controls(1, sampling=Sampling(1.0), prefixes=[prefix])
    rollouts = engine.rollout(CHAT, controls, grammar=Grammar('root ::= "one two three" | "one"'), **options)
    assert rollouts.texts[0] == "one two three" and rollouts.finish_reasons[0] == "stop"
    with pytest.raises(InputError, match="its grammar does not allow"):
        engine.rollout(CHAT, controls, grammar=Grammar('root ::= "one three"'), **options)
    assert engine.rollout(CHAT, controls, **options).texts[0].startswith("one two")  # and the engine goes on


@pytest.mark.native
def test_logprobs_are_the_base_models(engine: LlamaEngine, aligner: Aligner) -> None:
    """Against a log-softmax of the pre-logits' product with the output matrix."""
    result = aligner.generate(CHAT, budget=4, n=4, max_tokens=12, stop_strings=["zzz"], grammar="root ::= [a-z ]+")
    candidate = result.candidates[0]
    told = aligner.token_logprobs(CHAT, candidate, top=4)
    assert b"".join(one.piece for one in told).decode() == candidate.text
    controls = Controls(1, prefixes=[candidate.tokens])
    rollouts = engine.rollout(
        CHAT, controls, max_tokens=len(candidate.tokens), seeds=RowSeeds(0), want=frozenset({"prelogits"})
    )
    assert rollouts.prelogits is not None
    z = rollouts.prelogits[0].astype(np.float64)
    logits = z @ engine.head.weight.astype(np.float64).T * engine.head.gain
    logits -= logits.max(axis=1, keepdims=True)
    logits -= np.log(np.exp(logits).sum(axis=1, keepdims=True))
    for step, one in enumerate(told):
        assert one.logprob == pytest.approx(logits[step, candidate.tokens[step]], abs=4e-2)
        best = np.sort(logits[step])[::-1][:4]
        np.testing.assert_allclose([logprob for _, logprob in one.top], best, atol=4e-2)


@pytest.mark.native
def test_logprobs_leave_out_what_ended_the_answer(aligner: Aligner) -> None:
    result = aligner.generate("Say:", budget=2, n=2, max_tokens=9, grammar='root ::= "one two"', method="best-of-n")
    assert aligner.engine.piece(int(result.candidates[0].tokens[-1])) == b""  # the end
    told = aligner.token_logprobs("Say:", result.candidates[0])
    assert b"".join(one.piece for one in told) == b"one two" and all(one.logprob < 0 and not one.top for one in told)


def test_what_commands_refuse(tmp_path: Path) -> None:
    (tmp_path / "broken.json").write_text('{"type": ')
    (tmp_path / "list.json").write_text("[]")
    (tmp_path / "bytes.gbnf").write_bytes(b"\xff")
    (tmp_path / "good.gbnf").write_text('root ::= "a"')
    for grammar_file, schema, message in (
        ("good.gbnf", "{}", "give one of them"),
        ("missing.gbnf", None, "missing.gbnf cannot be read (No such file"),
        ("bytes.gbnf", None, "bytes.gbnf is not valid UTF-8"),
        (None, "{", "--json-schema is not valid JSON"),
        (None, "broken.json", "broken.json is not valid JSON"),
        (None, "missing.json", "missing.json cannot be read"),
        (None, "list.json", "holds no JSON object"),
        (None, '{"not": {}}', "the schema at #"),
    ):
        where = None if schema is None or schema.startswith("{") else str(tmp_path / schema)
        with pytest.raises(InputError) as caught:
            read_grammar(None if grammar_file is None else tmp_path / grammar_file, where or schema)
        assert message in str(caught.value)
    assert read_grammar(tmp_path / "good.gbnf", None) == Grammar('root ::= "a"')
    assert read_grammar(None, json.dumps(PERSON)) == Grammar.of(PERSON) and read_grammar(None, None) is None


@pytest.mark.native
@pytest.mark.parametrize("tokens", [60, 2])
def test_the_command_gives_a_valid_answer_or_says_that_it_could_not(tokens: int) -> None:
    options = ["--budget", "4", "--threads", "1", "--max-tokens", str(tokens), "--json-schema", json.dumps(PERSON)]
    done = CliRunner().invoke(generate, ["Is it?", *options])
    said = "no answer was complete under the grammar; allow more with --max-tokens\n" if tokens == 2 else ""
    assert (done.exit_code, done.stderr) == (0, said)
    assert jsonschema_rs.is_valid(PERSON, json.loads(done.stdout)) if not said else done.stdout.startswith("{")
