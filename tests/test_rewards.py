"""ONNX rewards on real ONNX Runtime, and everything that can be wrong with a folder."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from jinja2.sandbox import ImmutableSandboxedEnvironment
from onnx import TensorProto
from onnx_files import WORDS, model, tokenizer, write_reward
from tokenizers import Tokenizer, models, pre_tokenizers

from aisp_local.errors import CapacityError, InputError, RewardError, ScoreError
from aisp_local.rewards import CallableReward, OnnxReward, Reward, load_reward
from aisp_local.rewards.external_data import external_locations
from aisp_local.rewards.text import prompt_text
from aisp_local.types import Prompt

RESPONSES = ["the good fox", "bad", "", "a story the fox a good story", "good good good", "unknown words here"]


@pytest.fixture
def reward(tmp_path: Path) -> OnnxReward:
    return OnnxReward.load(write_reward(tmp_path))


def test_scores_do_not_depend_on_batch_mates_or_order(reward: OnnxReward) -> None:
    together = reward.score("tell a story", RESPONSES)
    alone = [reward.score("tell a story", [r])[0] for r in RESPONSES]
    assert together.dtype == np.float32
    np.testing.assert_allclose(together, alone, atol=1e-5)
    np.testing.assert_allclose(reward.score("tell a story", RESPONSES[::-1]), together[::-1], atol=1e-5)
    assert len(set(np.round(together, 4))) == len(RESPONSES)


def test_many_responses_pass_in_batches(reward: OnnxReward) -> None:
    scores = reward.score("tell", ["good fox", "bad"] * 500)
    np.testing.assert_allclose(scores[::2], scores[0], atol=1e-5)
    assert reward.score("tell", []).shape == (0,)


def test_the_prompt_matters_and_pairs_are_encoded_as_the_tokenizer_does(reward: OnnxReward) -> None:
    expected = tokenizer()
    expected.no_padding()
    expected.no_truncation()
    for prompt, response in (("tell a story", "the fox"), ("", "good"), ("tell", "")):
        encoded = expected.encode(prompt, response)
        assert reward._encode(prompt, [response]) == [(encoded.ids, encoded.type_ids)]
    assert reward.score("good", ["fox"])[0] != reward.score("bad", ["fox"])[0]


@pytest.mark.parametrize(
    ("truncation", "prompt", "response"),
    [
        ("prompt-left", "tell " * 50 + "story", "the fox"),
        ("prompt-left", "tell", "the " * 50 + "fox"),
        ("right", "tell " * 50 + "story", "the fox"),
    ],
)
def test_truncation(tmp_path: Path, truncation: str, prompt: str, response: str) -> None:
    reward = OnnxReward.load(write_reward(tmp_path, input_truncation=truncation))
    ((ids, types),) = reward._encode(prompt, [response])
    assert len(ids) == len(types) == 32
    text = [WORDS[i] for i in ids]
    if truncation == "right":
        assert text == ["[CLS]", *["tell"] * 29, "[SEP]", "[SEP]"]
    elif response == "the fox":
        assert text[-4:] == ["[SEP]", "the", "fox", "[SEP]"] and text[-5] == "story"
    else:
        assert text == ["[CLS]", "[SEP]", *["the"] * 29, "[SEP]"]


def test_truncation_of_texts_that_are_cut_before_tokenising(tmp_path: Path) -> None:
    def words(truncation: str, prompt: str, response: str) -> list[str]:
        reward = OnnxReward.load(write_reward(tmp_path, input_truncation=truncation))
        return [WORDS[i] for i in reward._encode(prompt, [response])[0][0]]

    assert words("right", "fox " + "tell " * 10_000, "good")[1:3] == ["fox", "tell"]
    assert words("left", "tell", "bad " * 10_000 + "fox")[-2:] == ["fox", "[SEP]"]
    assert words("prompt-left", "tell", " " * 100_000 + "good") == ["[CLS]", "tell", "[SEP]", "good", "[SEP]"]


def test_chat_templates_know_the_special_tokens(tmp_path: Path) -> None:
    template = "{{ bos_token }}{{ messages[-1].content }}{{ eos_token }}"
    tok = tokenizer()
    tok.add_special_tokens(["[CLS]", "[SEP]"])
    tok.no_truncation()
    tok.no_padding()
    for bos in ("none", "tokenizer"):
        reward = OnnxReward.load(write_reward(tmp_path, input_kind="chat", input_template=template, input_bos=bos))
        reward._tokenizer = tok
        text = [WORDS[i] for i in reward._encode("tell", ["good"])[0][0]]
        assert text[:3] == ["[CLS]", "good", "[SEP]"]


def test_a_template_that_fails(tmp_path: Path) -> None:
    with pytest.raises(ScoreError, match="chat template of the reward 'tiny' failed"):
        OnnxReward.load(write_reward(tmp_path, input_kind="chat", input_template="{{ 1 // 0 }}"))


def test_chat_inputs_have_one_bos(tmp_path: Path) -> None:
    template = "[CLS] {% for m in messages %}{{ m.role }} : {{ m.content }} {% endfor %}"
    made = write_reward(tmp_path, input_kind="chat", input_template=template)
    reward = OnnxReward.load(made)
    # "[CLS]" in the text is the special token only if the tokenizer knows it as one.
    tok = tokenizer()
    tok.add_special_tokens(["[CLS]", "[SEP]"])
    reward._tokenizer = tok
    tok.no_padding()
    tok.no_truncation()
    ((ids, _),) = reward._encode([{"role": "user", "content": "tell"}], ["good"])
    text = [WORDS[i] for i in ids]
    assert text == ["[CLS]", "user", ":", "tell", "assistant", ":", "good", "[SEP]"]


LINES = "{% for m in messages %}{{ m.role }} : {{ m.content }} {% endfor %}good"


def chat_words(reward: OnnxReward, prompt: Prompt, response: str) -> list[str]:
    return [WORDS[i] for i in reward._encode(prompt, [response])[0][0]]


def test_a_long_chat_loses_text_never_the_template(tmp_path: Path) -> None:
    """``prompt-left``: the prompt from its beginning, oldest turn first, then the response from its end."""
    reward = OnnxReward.load(write_reward(tmp_path, input_kind="chat", input_template=LINES))
    opening, closing = ["[CLS]", "user", ":"], ["good", "[SEP]"]
    words = chat_words(reward, "fox " + "tell " * 50 + "story", "the fox")
    assert words == [*opening, *["tell"] * 22, "story", "assistant", ":", "the", "fox", *closing]
    words = chat_words(reward, "tell a story", "bad " + "the " * 50)
    assert words == [*opening, "assistant", ":", "bad", *["the"] * 24, *closing]
    turns: Prompt = [
        {"role": "user", "content": "tell " * 30},
        {"role": "assistant", "content": "fox a a a a a a a"},
        {"role": "user", "content": "story the fox"},
    ]
    words = chat_words(reward, turns, "the fox " * 6)
    middle = ["assistant", ":", *["a"] * 6, "user", ":", "story", "the", "fox", "assistant", ":", *["the", "fox"] * 6]
    assert words == [*opening, *middle, *closing]
    whole = chat_words(reward, turns[1:], "fox")
    assert len(whole) < 32 and whole.count("a") == 7


@pytest.mark.parametrize(("truncation", "kept"), [("left", slice(-32, None)), ("right", slice(32))])
def test_other_truncations_cut_the_rendered_chat(tmp_path: Path, truncation: str, kept: slice) -> None:
    made = write_reward(tmp_path, input_kind="chat", input_template=LINES, input_truncation=truncation)
    whole = ["[CLS]", "user", ":", *["tell"] * 40, "assistant", ":", "fox", "good", "[SEP]"]
    assert chat_words(OnnxReward.load(made), "tell " * 40, "fox") == whole[kept]


def test_a_template_that_leaves_no_room(tmp_path: Path) -> None:
    folder = write_reward(tmp_path, input_kind="chat", input_template="the fox " * 20 + LINES)
    with pytest.raises(CapacityError, match="takes 47 tokens for 2 turns without their text, and max_length is 32"):
        OnnxReward.load(folder)


@given(st.text(), st.integers(1, 12), st.booleans())
def test_texts_of_many_tokens_a_character_get_shorter(text: str, tokens: int, left: bool) -> None:
    alphabet = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    by_bytes = Tokenizer(models.BPE(vocab=alphabet, merges=[]))
    by_bytes.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    reward = OnnxReward.__new__(OnnxReward)
    reward._tokenizer = by_bytes
    assume(text)
    shorter = reward._shorter(text, tokens, left=left)
    assert len(shorter) < len(text)
    assert text.endswith(shorter) if left else text.startswith(shorter)
    assert len(text.encode()) - len(shorter.encode()) <= tokens + 3 or not shorter


def test_a_template_is_compiled_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[str] = []
    parse = ImmutableSandboxedEnvironment.parse

    def counted(self: Any, source: str, *rest: Any) -> Any:
        compiled.append(source)
        return parse(self, source, *rest)

    monkeypatch.setattr(ImmutableSandboxedEnvironment, "parse", counted)
    reward = OnnxReward.load(write_reward(tmp_path, input_kind="chat", input_template=LINES))
    reward.score("tell", RESPONSES)
    reward.score("tell", RESPONSES)
    assert compiled == [LINES]


def test_hard_texts(reward: OnnxReward) -> None:
    scores = reward.score("tell \ud800", ["good " * 200_000, "\udfff fox", "\x00", "🦊"])
    assert np.isfinite(scores).all()
    cut = reward.score("tell \ud800", ["good " * 200])
    np.testing.assert_allclose(scores[0], cut[0], atol=1e-5)


def test_threads_share_a_session(reward: OnnxReward) -> None:
    expected = reward.score("tell", RESPONSES)
    with ThreadPoolExecutor(4) as pool:
        for scores in pool.map(lambda _: reward.score("tell", RESPONSES), range(20)):
            np.testing.assert_allclose(scores, expected, atol=1e-5)


def test_sign_scale_and_index(tmp_path: Path) -> None:
    plain = OnnxReward.load(write_reward(tmp_path / "a")).score("tell", RESPONSES)
    turned = OnnxReward.load(write_reward(tmp_path / "b", graph_sign=-1, graph_scale=2.0)).score("tell", RESPONSES)
    np.testing.assert_allclose(turned, -2 * plain, rtol=1e-6)


def test_golden_scores_are_checked(tmp_path: Path) -> None:
    score = float(OnnxReward.load(write_reward(tmp_path)).score("tell", ["good"])[0])
    golden = [{"prompt": "tell", "response": "good", "score": score}]
    OnnxReward.load(write_reward(tmp_path, golden=golden))
    golden[0]["score"] = score + 0.1
    with pytest.raises(RewardError, match="golden response 'good'"):
        OnnxReward.load(write_reward(tmp_path, golden=golden))


def change(folder: Path, **keys: Any) -> None:
    path = folder / "reward.json"
    data = json.loads(path.read_text())
    data.update(keys)
    path.write_text(json.dumps(data))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda f: (f / "reward.json").unlink(), "holds no reward.json"),
        (lambda f: (f / "reward.json").write_text("{"), "not valid JSON"),
        (lambda f: change(f, format=2), "format 2 is not known"),
        (lambda f: change(f, name=None), "lacks 'name'"),
        (lambda f: change(f, name=3), "'name' has the wrong type"),
        (lambda f: change(f, input={"kind": "triple", "max_length": 32}), "'kind' is 'triple'"),
        (lambda f: change(f, files={}), "no sha256 of 'model.onnx'"),
        (lambda f: (f / "tokenizer.json").unlink(), "lacks tokenizer.json"),
        (lambda f: (f / "tokenizer.json").write_text("{}"), "does not match its sha256"),
        (lambda f: (f / "model.onnx").write_bytes((f / "model.onnx").read_bytes()[:-9]), "does not match its sha256"),
        (lambda f: change(f, model="../model.onnx", files={"../model.onnx": "0", "tokenizer.json": "0"}), "leaves"),
        (lambda f: change(f, model="/model.onnx", files={"/model.onnx": "0", "tokenizer.json": "0"}), "leaves"),
    ],
)
def test_broken_folders(tmp_path: Path, spoil: Any, message: str) -> None:
    spoil(write_reward(tmp_path))
    with pytest.raises(RewardError, match=message):
        OnnxReward.load(tmp_path)


PARITY = {"precision": "fp32", "pairs": 1, "max_abs": 0, "mean_abs": 0, "spread": 1, "kendall_tau": 1, "agreement": 1}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"graph_inputs": {"input_ids": "ids", "attention_mask": "attention_mask"}}, "no input 'ids'; its inputs are"),
        ({"graph_inputs": {n: n for n in ("input_ids", "attention_mask")}}, "'token_type_ids' .*not in the manifest"),
        ({"graph_output": "logits"}, "no output 'logits'; its outputs are score"),
        ({"graph_sign": 3}, "'sign' is 3"),
        ({"graph_index": 7}, "'index' is 7, but the output 'score' has 1 columns"),
        ({"tolerance": float("inf")}, "must be finite"),
        ({"golden": [{"prompt": [{"role": "user"}], "response": "a", "score": 1}]}, "message 1 lacks 'content'"),
        ({"golden": [{"prompt": "a", "response": "a", "score": 10**400}]}, "golden: 'score' is too large"),
        ({"graph_scale": 10**400}, "graph: 'scale' is too large"),
        ({"tolerance": 10**400}, "'tolerance' is too large"),
        ({"parity": PARITY | {"spread": 10**400}}, "parity: 'spread' is too large"),
        ({"input_max_length": 1}, "max_length 1 is not between"),
        ({"input_kind": "chat"}, "needs a 'template'"),
        ({"license": "MIT"}, "reward.json: the key 'license' is unknown; did you mean 'licence'"),
        ({"input_max_lenght": 64}, "input: the key 'max_lenght' is unknown; did you mean 'max_length'"),
        ({"graph_zzz": 1}, "graph: the key 'zzz' is unknown; its keys are inputs, output, index, sign, scale"),
        ({"golden": [{"prompt": "a", "response": "a", "scores": 1}]}, "golden: the key 'scores' is unknown"),
        ({"golden": [{"prompt": [{"role": "user", "text": "a"}], "response": "a", "score": 1}]}, "key 'text' is unk"),
    ],
)
def test_manifests_that_do_not_fit(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(RewardError, match=message):
        OnnxReward.load(write_reward(tmp_path, **changes))


def test_a_truncated_model_with_its_own_hash(tmp_path: Path) -> None:
    from onnx_files import sha256

    folder = write_reward(tmp_path)
    path = folder / "model.onnx"
    path.write_bytes(path.read_bytes()[:-20])
    change(folder, files={n: sha256(folder / n) for n in ("model.onnx", "tokenizer.json")})
    with pytest.raises(RewardError, match="not a complete ONNX file"):
        OnnxReward.load(folder)


@pytest.mark.parametrize("location", ["../outside.bin", "/etc/passwd", "sub/../../outside.bin"])
def test_external_data_must_stay_inside(tmp_path: Path, location: str) -> None:
    proto = model()
    tensor = proto.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    entry = tensor.external_data.add()
    entry.key, entry.value = "location", location
    folder = tmp_path / "reward"
    folder.mkdir()
    (folder / "model.onnx").write_bytes(proto.SerializeToString())
    assert external_locations(folder / "model.onnx") == [location]
    from onnx_files import sha256

    write_reward(folder)
    (folder / "model.onnx").write_bytes(proto.SerializeToString())
    change(folder, files={n: sha256(folder / n) for n in ("model.onnx", "tokenizer.json")})
    with pytest.raises(RewardError, match="leaves the reward folder"):
        OnnxReward.load(folder)


@pytest.mark.parametrize("location", ["*/_ORT_MEM_ADDR_/*", "*/_ORT_NATIVE_ENDIAN_MEM_ADDR_/*"])
def test_external_data_is_no_address_in_memory(tmp_path: Path, location: str) -> None:
    """Refused by name: a file of that very path, with its sha256 in the manifest, must not let it through."""
    from onnx_files import sha256

    proto = model()
    tensor = proto.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in (("location", location), ("offset", "4096"), ("length", "448")):
        entry = tensor.external_data.add()
        entry.key, entry.value = key, value
    folder = write_reward(tmp_path)
    (folder / "model.onnx").write_bytes(proto.SerializeToString())
    (folder / location).parent.mkdir(parents=True)
    (folder / location).write_bytes(bytes(8192))
    change(folder, files={n: sha256(folder / n) for n in ("model.onnx", "tokenizer.json", location)})
    with pytest.raises(RewardError, match="address in memory"):
        OnnxReward.load(folder)


def test_links_out_of_the_folder_are_refused(tmp_path: Path) -> None:
    folder = write_reward(tmp_path / "reward")
    (folder / "tokenizer.json").rename(tmp_path / "tokenizer.json")
    (folder / "tokenizer.json").symlink_to(tmp_path / "tokenizer.json")
    with pytest.raises(RewardError, match="links out"):
        OnnxReward.load(folder)


def test_external_data_inside_works(tmp_path: Path) -> None:
    from onnx_files import sha256

    plain = OnnxReward.load(write_reward(tmp_path / "plain")).score("tell", RESPONSES)
    folder = write_reward(tmp_path / "external")
    onnx.save_model(
        model(), str(folder / "model.onnx"), save_as_external_data=True, location="weights.bin", size_threshold=64
    )
    change(folder, files={n: sha256(folder / n) for n in ("model.onnx", "tokenizer.json")})
    with pytest.raises(RewardError, match=r"'weights.bin', which has no sha256"):
        OnnxReward.load(folder)
    change(folder, files={n: sha256(folder / n) for n in ("model.onnx", "tokenizer.json", "weights.bin")})
    np.testing.assert_allclose(OnnxReward.load(folder).score("tell", RESPONSES), plain, atol=1e-6)


def test_external_data_of_a_model_in_a_subfolder_lies_beside_the_model(tmp_path: Path) -> None:
    """Where ONNX Runtime reads it: a file of that name in the reward folder itself stands for nothing."""
    from onnx_files import sha256

    plain = OnnxReward.load(write_reward(tmp_path / "plain")).score("tell", RESPONSES)
    folder = write_reward(tmp_path / "external")
    (folder / "sub").mkdir()
    inner, weights = folder / "sub" / "model.onnx", folder / "sub" / "weights.bin"
    onnx.save_model(model(), str(inner), save_as_external_data=True, location="weights.bin", size_threshold=64)
    (folder / "weights.bin").write_bytes(weights.read_bytes())

    def listed(*names: str) -> Path:
        change(folder, model="sub/model.onnx", files={name: sha256(folder / name) for name in names})
        return folder

    ours = ("sub/model.onnx", "tokenizer.json")
    with pytest.raises(RewardError, match=r"uses 'sub/weights.bin', which has no sha256"):
        OnnxReward.load(listed(*ours, "weights.bin"))
    listed(*ours, "sub/weights.bin")
    (folder / "weights.bin").unlink()
    np.testing.assert_allclose(OnnxReward.load(folder).score("tell", RESPONSES), plain, atol=1e-6)
    whole = weights.read_bytes()
    weights.write_bytes(bytes(len(whole)))
    with pytest.raises(RewardError, match="does not match its sha256"):
        OnnxReward.load(folder)
    (tmp_path / "outside.bin").write_bytes(whole)
    weights.unlink()
    weights.symlink_to(tmp_path / "outside.bin")
    with pytest.raises(RewardError, match="links out of the reward folder"):
        OnnxReward.load(folder)
    weights.unlink()
    weights.write_bytes(whole)
    inner.rename(folder / "sub" / "real.onnx")
    inner.symlink_to("real.onnx")
    with pytest.raises(RewardError, match="is a link and keeps tensors in 'sub/weights.bin'"):
        OnnxReward.load(folder)


def test_prompt_text() -> None:
    assert prompt_text("as it is") == "as it is"
    assert prompt_text([{"role": "user", "content": "hi"}]) == "hi"
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
    assert prompt_text(turns) == "user: hi\nassistant: ho"  # type: ignore[arg-type]


def test_functions_are_rewards() -> None:
    def length(prompt: Any, responses: Any) -> list[int]:
        return [len(r) for r in responses]

    reward = load_reward(length)
    assert isinstance(reward, Reward) and reward.name == "length"
    np.testing.assert_array_equal(reward.score("p", ["a", "bb"]), np.array([1, 2], np.float32))
    assert load_reward(reward) is reward
    with pytest.raises(ScoreError, match="'length'.*one number each"):
        CallableReward(lambda p, r: [1.0], name="length").score("p", ["a", "b"])
    with pytest.raises(InputError, match="not a reward"):
        load_reward(3)  # type: ignore[arg-type]


class Boom(Exception):
    pass


class Lazy:
    """What a tensor with a gradient does when numpy asks for its values."""

    def __array__(self, *_: Any, **__: Any) -> Any:
        raise RuntimeError("detach me first")


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (Boom("no such word"), r"'picky' failed \(Boom: no such word\)"),
        (KeyError("fox"), r"'picky' failed \(KeyError: 'fox'\)"),
        (ZeroDivisionError(), r"'picky' failed \(ZeroDivisionError\)$"),
    ],
)
def test_whatever_a_function_raises_names_it(error: Exception, message: str) -> None:
    def picky(prompt: Any, responses: Any) -> list[float]:
        raise error

    with pytest.raises(ScoreError, match=message) as caught:
        load_reward(picky).score("p", ["a"])
    assert caught.value.__cause__ is error


@pytest.mark.parametrize("error", [KeyboardInterrupt(), CapacityError("ours"), ScoreError("ours")])
def test_interrupts_and_our_own_errors_pass(error: BaseException) -> None:
    def picky(prompt: Any, responses: Any) -> list[float]:
        raise error

    with pytest.raises(type(error)) as caught:
        load_reward(picky).score("p", ["a"])
    assert caught.value is error


def test_scores_that_numpy_cannot_have() -> None:
    with pytest.raises(ScoreError, match=r"'lazy' gave something that is not numbers \(RuntimeError: detach"):
        CallableReward(lambda p, r: Lazy(), name="lazy").score("p", ["a"])
    assert CallableReward(lambda p, r: [1e300]).score("p", ["a"]) == [np.inf]
