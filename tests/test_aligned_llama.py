"""``AlignedLlama`` beside ``llama_cpp.Llama``: the same arguments, shapes and, without a search, answers."""

from __future__ import annotations

import copy
import inspect
import json
import time
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import llama_cpp
import numpy as np
import pytest
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from aisp_local import AlignedLlama, InputError, ModelError, Result, shipped

pytestmark = pytest.mark.native

STORY: Any = [{"role": "user", "content": "Tell me a story about a fox."}]
ONCE = "Once upon a time there was a little"
QUICK: dict[str, Any] = {"budget": 4, "max_tokens": 24, "seed": 1}
GREEDY: dict[str, Any] = {"temperature": 0.0, "max_tokens": 20}


def vowels(prompt: Any, responses: Sequence[str]) -> list[float]:
    return [sum(c in "aeiou" for c in text) / (1 + len(text)) for text in responses]


@pytest.fixture(scope="module")
def ours() -> Iterator[AlignedLlama]:
    with AlignedLlama(shipped.model(), reward=vowels, n_threads=1, method="best-of-n") as made:
        yield made


@pytest.fixture(scope="module")
def stock() -> Iterator[Any]:
    # With the attention kernel that the engine has: without it logits differ by hundredths.
    model = llama_cpp.Llama(str(shipped.model()), n_threads=1, logits_all=True, flash_attn=True, verbose=False)
    yield model
    model.close()


def shape(value: Any) -> Any:
    """Keys and kinds of values; numbers are all of one kind."""
    if isinstance(value, dict):
        return {key: shape(each) for key, each in value.items()}
    if isinstance(value, list):
        return [shape(value[0])] if value else []
    return "number" if isinstance(value, int | float | np.number) else type(value).__name__


def text(response: Any) -> str:
    choice = response["choices"][0]
    return str(choice["text"] if "text" in choice else choice["message"]["content"])


def without_ids(response: Any) -> Any:
    """The choice, without what is new in each response, and without the figures of log-probabilities."""
    choice = copy.deepcopy(response["choices"][0])
    choice["logprobs"] = shape(choice["logprobs"])
    for call in choice.get("message", choice.get("delta")).get("tool_calls") or []:
        call["id"] = None
    return choice


def test_an_effort_of_a_call_goes_before_a_budget_given_at_loading() -> None:
    with AlignedLlama(shipped.model(), reward="short-and-plain", budget=4, n=4, verbose=False) as llm:
        for align, rollouts in (({}, 4), ({"effort": "low"}, 32), ({"effort": "low", "budget": 2}, 2)):
            llm("Once upon a time", max_tokens=2, **align)
            assert llm.result is not None and llm.result.rollouts == rollouts
        with pytest.raises(InputError, match="effort 'huge' is unknown"):
            llm("Once upon a time", max_tokens=2, effort="huge", budget=2)


def test_every_argument_of_llama_is_there() -> None:
    completions = ("create_completion", "__call__", "create_chat_completion")
    for name in (*completions, "tokenize", "detokenize", "from_pretrained"):
        theirs = inspect.signature(getattr(llama_cpp.Llama, name)).parameters
        mine = inspect.signature(getattr(AlignedLlama, name)).parameters
        assert list(mine)[: len(theirs)] == list(theirs), name
        assert [p.kind for p in mine.values()][: len(theirs)] == [p.kind for p in theirs.values()], name
    given = {name: p.default for name, p in inspect.signature(llama_cpp.Llama).parameters.items()}
    del given["model_path"], given["kwargs"]
    with AlignedLlama(shipped.model(), budget=1, **given) as llm:  # every default is accepted
        assert llm.n_ctx() == 512


def test_the_model_alone_answers_as_llama_does(ours: AlignedLlama, stock: Any) -> None:
    a, b = (m.create_completion(ONCE, **GREEDY, logprobs=3, **o) for m, o in ((ours, {"budget": 1}), (stock, {})))
    assert shape(a) == shape(b)
    mine, theirs = a["choices"][0], b["choices"][0]
    assert (mine["text"], mine["finish_reason"], a["usage"]) == (theirs["text"], theirs["finish_reason"], b["usage"])
    mine, theirs = mine["logprobs"], theirs["logprobs"]
    assert mine["tokens"] == theirs["tokens"] and mine["text_offset"] == theirs["text_offset"]
    np.testing.assert_allclose(mine["token_logprobs"], theirs["token_logprobs"], atol=1e-3)
    assert [set(top) for top in mine["top_logprobs"]] == [set(top) for top in theirs["top_logprobs"]]
    assert ours.result is None


@pytest.mark.parametrize(
    "options",
    {
        "stop": {"stop": ["big", "old", "."]},
        "echo": {"echo": True},
        "bias": {"logit_bias": {300: 20.0, 5: 3.0}},
        "repeat": {"repeat_penalty": 1.5},
        "presence": {"presence_penalty": 1.0, "frequency_penalty": 0.5},
        "processor": {"logits_processor": [lambda ids, scores: scores * (1 + len(ids) % 2)]},
        "minimum": {"logits_processor": [llama_cpp.llama.MinTokensLogitsProcessor(30, 2)], "max_tokens": 40},
        "criteria": {"stopping_criteria": llama_cpp.StoppingCriteriaList([lambda ids, scores: len(ids) > 14])},
        "unlimited": {"max_tokens": -1, "stop": "old old"},
        "model": {"model": "mine"},
    }.values(),
)  # fmt: skip
def test_options_do_what_they_do_in_llama(ours: AlignedLlama, stock: Any, options: dict[str, Any]) -> None:
    a, b = (m.create_completion(ONCE, **{**GREEDY, **options, **o}) for m, o in ((ours, {"budget": 1}), (stock, {})))
    assert a["choices"] == b["choices"] and a["usage"] == b["usage"]
    assert a["model"] == options.get("model", ours.model_path)


def test_tokens_are_those_of_llama(ours: AlignedLlama, stock: Any) -> None:
    for data in (b"Tell me a story.", "Ein Übermaß <s> \U0001f98a".encode(), b"", b" "):
        for options in ({}, {"add_bos": False}, {"special": True}):
            tokens = ours.tokenize(data, **options)
            assert tokens == stock.tokenize(data, **options)
            for special in (False, True):
                assert ours.detokenize(tokens, special=special) == stock.detokenize(tokens, special=special)
    assert ours.tokenizer().encode("A fox.") == stock.tokenizer().encode("A fox.")
    assert ours.metadata == stock.metadata and ours.chat_format == stock.chat_format
    for name in ("n_ctx", "n_embd", "n_vocab", "token_bos", "token_eos", "token_nl"):
        assert getattr(ours, name)() == getattr(stock, name)(), name
    tokens = ours.tokenize(ONCE.encode())
    assert text(ours(tokens, **GREEDY, budget=1)) == text(stock(tokens, **GREEDY))


SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 6}, "legs": {"enum": [2, 4]}},
    "required": ["name", "legs"],
}
LOOK: Any = {"type": "function", "function": {"name": "look", "parameters": SCHEMA}}
CALL: Any = {"tools": [LOOK], "tool_choice": {"type": "function", "function": {"name": "look"}}, "max_tokens": 60}
JSON: Any = {"response_format": {"type": "json_object", "schema": SCHEMA}, "max_tokens": 60}
YES: Any = {"grammar": llama_cpp.LlamaGrammar.from_string('root ::= "yes" | "no"')}


@pytest.mark.parametrize("options", [{}, {"stop": ["fox"]}, {"logprobs": True, "top_logprobs": 2}, CALL, JSON, YES])
def test_chats_have_the_shapes_of_llama(ours: AlignedLlama, stock: Any, options: dict[str, Any]) -> None:
    options = GREEDY | options
    mine = ours.create_chat_completion(STORY, budget=1, **options)
    theirs = stock.create_chat_completion(STORY, **options)
    assert shape(mine) == shape(theirs) and without_ids(mine) == without_ids(theirs)
    assert mine["usage"] == theirs["usage"]
    chunks = list(ours.create_chat_completion(STORY, budget=1, stream=True, **options))
    expected = list(stock.create_chat_completion(STORY, stream=True, **options))
    assert [shape(c) for c in chunks[:3]] == [shape(c) for c in expected[:3]]
    assert [without_ids(c)["delta"] for c in chunks] == [without_ids(c)["delta"] for c in expected]
    assert chunks[-1]["choices"] == expected[-1]["choices"]


def test_a_search_has_log_probabilities(ours: AlignedLlama, stock: Any) -> None:
    wanted: dict[str, Any] = {"logprobs": True, "top_logprobs": 2}
    mine = ours.create_chat_completion(STORY, **QUICK, **wanted)
    theirs = stock.create_chat_completion(STORY, **GREEDY, **wanted)
    assert shape(mine) == shape(theirs)
    found = mine["choices"][0]["logprobs"]["content"]
    assert "".join(entry["token"] for entry in found) == text(mine)
    assert all(entry["logprob"] <= max(top["logprob"] for top in entry["top_logprobs"]) <= 0 for entry in found)
    streamed = ours(ONCE, stream=True, logprobs=1, **QUICK | {"method": "score"})
    entries = [chunk["choices"][0]["logprobs"] for chunk in streamed]
    answer = ours.result.answer if ours.result else ""
    assert "".join(token for each in entries if each for token in each["tokens"]) == answer != ""


def test_a_search_is_held_to_a_schema(ours: AlignedLlama) -> None:
    answer = ours.create_chat_completion(STORY, **QUICK | JSON)
    assert set(json.loads(text(answer))) == {"name", "legs"} and answer["choices"][0]["finish_reason"] == "stop"
    few = {"type": "object", "properties": {"n": {"type": "integer", "minimum": 7, "maximum": 9}}, "required": ["n"]}
    bounded: Any = {"response_format": {"type": "json_object", "schema": few | {"additionalProperties": False}}}
    assert 7 <= json.loads(text(ours.create_chat_completion(STORY, **QUICK | bounded)))["n"] <= 9
    called = ours.create_chat_completion(STORY, **QUICK | CALL)["choices"][0]
    assert called["finish_reason"] == "tool_calls"
    assert json.loads(called["message"]["tool_calls"][0]["function"]["arguments"])["legs"] in (2, 4)
    with pytest.raises(ValueError, match="rule"):
        ours(ONCE, grammar=llama_cpp.LlamaGrammar.from_string("root ::= nothing"), **QUICK)


def test_a_search_has_the_shapes_of_llama(ours: AlignedLlama, stock: Any) -> None:
    mine = ours.create_chat_completion(STORY, **QUICK)
    assert shape(mine) == shape(stock.create_chat_completion(STORY, max_tokens=4))
    result = ours.result
    assert isinstance(result, Result) and result.rollouts == 4 and result.answer == text(mine)
    assert result.reward == max(c.reward for c in result.candidates)
    assert ours.aligner.generate(STORY, method="best-of-n", **QUICK).answer == text(mine)
    assert ours.create_chat_completion(STORY, **QUICK) | {"id": 0, "created": 0} == mine | {"id": 0, "created": 0}
    assert isinstance(ours.create_chat_completion_openai_v1(STORY, **QUICK), ChatCompletion)


@pytest.mark.parametrize("method", ["score", "best-of-n"])
def test_a_search_streams(ours: AlignedLlama, method: str) -> None:
    options = {**QUICK, "method": method, "stream": True}
    chunks = list(ours.create_completion(ONCE, echo=True, **options))
    assert {c["object"] for c in chunks} == {"text_completion"} and len({c["id"] for c in chunks}) == 1
    assert ours.result is not None and ONCE + ours.result.answer == "".join(text(c) for c in chunks)
    assert [c["choices"][0]["finish_reason"] is None for c in chunks] == [True] * (len(chunks) - 1) + [False]
    assert (len(chunks) > 4) == (method == "score"), "one chooses block by block"
    typed = list(ours.create_chat_completion_openai_v1(STORY, **options))
    assert all(isinstance(chunk, ChatCompletionChunk) for chunk in typed)


@pytest.mark.parametrize("budget", [1, 64])
def test_a_stream_that_is_left_stops(ours: AlignedLlama, budget: int) -> None:
    stream = ours(ONCE, stream=True, budget=budget, method="score", max_tokens=400, seed=1)
    assert text(next(stream))
    began = time.monotonic()
    stream.close()
    assert time.monotonic() - began < 5
    assert text(ours(ONCE, max_tokens=2, budget=1))


def test_the_reward_reads_the_conversation() -> None:
    seen: list[Any] = []

    def reward(prompt: Any, responses: Sequence[str]) -> list[float]:
        seen.append(prompt)
        return [float(len(text)) for text in responses]

    tool = {"type": "function", "function": {"name": "look", "arguments": "{}"}, "id": "1"}
    messages: Any = [
        {"role": "user", "content": [{"type": "text", "text": "Look "}, {"type": "text", "text": "here."}]},
        {"role": "assistant", "content": None, "tool_calls": [tool]},
        {"role": "tool", "content": "A fox.", "tool_call_id": "1"},
    ]
    template = "{% for m in messages %}{{ m.role }}{% endfor %}{{ tools | tojson }}"
    formatter = llama_cpp.llama_chat_format.Jinja2ChatFormatter(template=template, eos_token="</s>", bos_token="")
    with AlignedLlama(
        shipped.model(), reward=reward, chat_handler=formatter.to_chat_handler(), method="best-of-n", n_threads=1
    ) as llm:
        one = llm.create_chat_completion(messages, **QUICK)
        two = llm.create_chat_completion(messages, tools=[{"type": "function", "function": {"name": "look"}}], **QUICK)
        llm("A fox", **QUICK)
        llm(llm.tokenize(b"A dog"), **QUICK)
    conversation, *_ = seen
    assert [m["role"] for m in conversation] == ["user", "assistant", "tool"]
    assert [m["content"] for m in conversation][::2] == ["Look here.", "A fox."]
    assert '"name": "look"' in conversation[1]["content"]
    assert two["usage"]["prompt_tokens"] > one["usage"]["prompt_tokens"], "the template was given the tools"
    assert [prompt for prompt in seen if isinstance(prompt, str)][:1] == ["A fox"] and "A dog" in seen


def test_seeds_follow_each_other_as_in_llama(ours: AlignedLlama) -> None:
    options: dict[str, Any] = {"max_tokens": 12, "temperature": 1.5, "budget": 1}
    ours.set_seed(7)
    first = [text(ours(ONCE, **options)) for _ in range(3)]
    ours.set_seed(7)
    assert [text(ours(ONCE, **options)) for _ in range(3)] == first and len(set(first)) == 3
    assert text(ours(ONCE, seed=5, **options)) == text(ours(ONCE, seed=5, **options))


@pytest.mark.parametrize("seed", [-1, 2**32 - 1])
def test_a_seed_of_minus_one_is_another_each_time(ours: AlignedLlama, seed: int) -> None:
    options: dict[str, Any] = {"max_tokens": 12, "temperature": 1.5, "budget": 1, "seed": seed}
    assert len({text(ours(ONCE, **options)) for _ in range(4)}) > 1


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"top_p": 0.9}, "top_p"),
        ({"top_p": 0.9, "repeat_penalty": 1.1, "top_k": 20}, "penalties, top_k, top_p"),
        ({"temperature": 0.0}, None),
        ({"temperature": -1.0, "top_p": 0.95, "top_k": 40}, None),  # llama-cpp-python's defaults
    ],
)
def test_what_programs_ask_of_the_model_alone_does_not_end_them(
    ours: AlignedLlama, given: dict[str, Any], said: str | None
) -> None:
    options = {**QUICK, "method": "score", "seed": 3}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = text(ours(ONCE, **options, **given))
    assert found == text(ours(ONCE, **options))
    assert [str(w.message).partition(";")[0] for w in caught] == (
        [] if said is None else [f"the method 'score' goes without {said}"]
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"suffix": "end"}, "suffix"),
        ({"mirostat_mode": 2}, "mirostat_mode is 2; it is not supported, so leave it at 0"),
        ({"typical_p": 0.5}, "typical_p is 0.5"),
        ({"echo": True, "logprobs": 1}, "leave out echo or logprobs"),
        ({"logit_bias": {1: 2.0}}, "logit_bias works with the model alone; leave it out, or use budget=1"),
        ({"efort": "low"}, "has no option 'efort'"),
        ({"stop_strings": ["."]}, "stop_strings is not an option of alignment here; give stop with each completion"),
        ({"effort": "huge", "budget": None}, "effort 'huge' is unknown"),
        ({"prompt": "word " * 600}, r"Requested tokens \(\d+\) exceed context window of 512"),
        ({"prompt": []}, "the prompt has no tokens"),
        ({"prompt": [10**6]}, "tokens that are not among the model's"),
    ],
)
def test_what_cannot_be_honoured_is_refused(ours: AlignedLlama, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ours(**{"prompt": ONCE, **QUICK, **options})


def test_what_a_model_cannot_be_loaded_with() -> None:
    for options, message in (
        ({"embedding": True}, "AlignedLlama has no embedding; leave it out, or use llama_cpp.Llama"),
        ({"type_k": 8}, "has no type_k"),
        ({"max_tokens": 8}, "give max_tokens with each completion"),
        ({"efort": "low"}, "has no option 'efort'"),
        ({"effort": "huge"}, "effort 'huge' is unknown"),
    ):
        with pytest.raises(InputError, match=message):
            AlignedLlama(shipped.model(), **options)
    with pytest.raises(ModelError, match="does not exist"):
        AlignedLlama("nowhere.gguf")
    with pytest.warns(UserWarning, match="AlignedLlama goes without n_batch, use_mlock"):
        AlignedLlama(shipped.model(), budget=1, n_batch=64, use_mlock=True, use_mmap=True).close()


def test_the_low_level_interface_is_llamas(ours: AlignedLlama) -> None:
    with pytest.raises(AttributeError, match="has no eval: that is llama_cpp.Llama's low-level interface"):
        ours.eval([1])
    assert not hasattr(ours, "scores") and not hasattr(ours, "nothing")


def test_a_pretrained_model_is_the_classs_own(monkeypatch: pytest.MonkeyPatch) -> None:
    hub = pytest.importorskip("huggingface_hub")
    asked: list[Any] = []

    class Hub:
        def ls(self, repo: str, recursive: bool) -> list[str]:
            return [f"{repo}/storyteller.gguf"]

    def download(**options: Any) -> str:
        asked.append(options["filename"])
        return str(shipped.model())

    monkeypatch.setattr(hub, "HfFileSystem", Hub)
    monkeypatch.setattr(hub, "hf_hub_download", download)
    with AlignedLlama.from_pretrained("some/repo", "*.gguf", budget=1, n_ctx=64) as llm:
        assert isinstance(llm, AlignedLlama) and llm.n_ctx() == 64 and asked == ["storyteller.gguf"] * 2
