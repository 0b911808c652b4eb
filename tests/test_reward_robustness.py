"""Rewards that lie, break or are asked for too much."""

from __future__ import annotations

import ctypes
import json
import os
import random
import subprocess
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx_files import model, sha256, tokenizer, write_reward

from aisp_local import shipped
from aisp_local.errors import AispError, RewardError, ScoreError
from aisp_local.rewards import OnnxReward, runtime
from aisp_local.rewards.graph_file import read_graph
from aisp_local.rewards.manifest import read_manifest
from aisp_local.rewards.onnx import _batches


def rehash(folder: Path) -> None:
    path = folder / "reward.json"
    data = json.loads(path.read_text())
    data["files"] = {name: sha256(folder / name) for name in data["files"]}
    path.write_text(json.dumps(data))


def test_any_damage_to_a_model_is_an_error_of_ours(tmp_path: Path) -> None:
    """With its own hash: bytes changed, cut and appended at random never crash, nor raise anything foreign."""
    folder = write_reward(tmp_path)
    whole = (folder / "model.onnx").read_bytes()
    rng = random.Random(0)
    refused = 0
    for _ in range(60):
        data = bytearray(whole)
        for _ in range(rng.randint(1, 20)):
            data[rng.randrange(len(data))] = rng.randrange(256)
        if rng.random() < 0.5:
            data = data[: rng.randrange(len(data))]
        (folder / "model.onnx").write_bytes(data)
        rehash(folder)
        try:
            OnnxReward.load(folder).score("tell", ["good"])
        except AispError as error:
            refused += 1
            assert "\n" not in str(error)[:40]
    assert refused > 30


@pytest.mark.parametrize("text", ["[" * 500_000, '{"a":' * 100_000, "\xff\xfe", '{"format": ' + "9" * 5000 + "}"])
def test_manifests_made_to_break_a_parser(tmp_path: Path, text: str) -> None:
    (tmp_path / "reward.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(RewardError, match="not valid JSON"):
        read_manifest(tmp_path)


@pytest.mark.parametrize("name", ["..\\model.onnx", "a/../../model.onnx", "/etc/passwd", "sub/../../x"])
@pytest.mark.parametrize("key", ["model", "tokenizer", "files"])
def test_paths_of_a_manifest_stay_inside(tmp_path: Path, name: str, key: str) -> None:
    folder = write_reward(tmp_path / "reward")
    path = folder / "reward.json"
    data = json.loads(path.read_text())
    if key != "files":
        data[key] = name
    data["files"][name] = "0" * 64
    path.write_text(json.dumps(data))
    with pytest.raises(RewardError, match="leaves the reward folder"):
        OnnxReward.load(folder)


@pytest.mark.parametrize("name", ["mod\0el.onnx", "mod\ud800el.onnx"])
def test_a_name_that_no_file_can_have_is_refused(tmp_path: Path, name: str) -> None:
    folder = write_reward(tmp_path)
    path = folder / "reward.json"
    data = json.loads(path.read_text())
    data["files"][name] = "0" * 64
    path.write_text(json.dumps(data))
    with pytest.raises(RewardError, match="no name that a file can have"):
        OnnxReward.load(folder)


def one_tensor(dims: list[int], **fields: Any) -> onnx.ModelProto:
    proto = model()
    tensor = proto.graph.initializer.add()
    tensor.name, tensor.data_type = "huge", TensorProto.FLOAT
    tensor.dims.extend(dims)
    for key, value in fields.items():
        setattr(tensor, key, value)
    return proto


@pytest.mark.parametrize("dims", [[1 << 40], [1 << 31, 1 << 31], [3, 1 << 62], [-1], [1 << 28]])
def test_a_huge_tensor_in_a_small_file_is_refused_before_it_is_allocated(tmp_path: Path, dims: list[int]) -> None:
    folder = write_reward(tmp_path, proto=one_tensor(dims, raw_data=b"1234"))
    with pytest.raises(RewardError, match="declares a tensor 'huge' of .* elements and holds 4 bytes of it"):
        OnnxReward.load(folder)


def test_a_huge_tensor_outside_the_file_is_refused_too(tmp_path: Path) -> None:
    proto = one_tensor([1 << 30], data_location=TensorProto.EXTERNAL)
    entry = proto.graph.initializer[-1].external_data.add()
    entry.key, entry.value = "location", "weights.bin"
    folder = write_reward(tmp_path, proto=proto)
    (folder / "weights.bin").write_bytes(bytes(64))
    data = json.loads((folder / "reward.json").read_text())
    data["files"]["weights.bin"] = ""
    (folder / "reward.json").write_text(json.dumps(data))
    rehash(folder)
    with pytest.raises(RewardError, match="of 1073741824 elements and holds 64 bytes"):
        OnnxReward.load(folder)


def inner_graph(tensor: TensorProto) -> onnx.NodeProto:
    """A node with a graph of its own that stores a tensor."""
    graph = helper.make_graph(
        [helper.make_node("Identity", [tensor.name], ["copy"])],
        "inner",
        [],
        [helper.make_tensor_value_info("copy", TensorProto.FLOAT, None)],
        [tensor],
    )
    return helper.make_node("If", ["condition"], ["chosen"], then_branch=graph, else_branch=graph)


@pytest.mark.parametrize("where", ["constant", "inner graph"])
def test_a_huge_constant_is_refused_too(tmp_path: Path, where: str) -> None:
    proto = model()
    tensor = TensorProto(name="huge", data_type=TensorProto.FLOAT, dims=[1 << 40], raw_data=b"1234")
    constant = helper.make_node("Constant", [], ["huge"], value=tensor)
    proto.graph.node.append(constant if where == "constant" else inner_graph(tensor))
    with pytest.raises(RewardError, match="declares a tensor 'huge' of 1099511627776 elements and holds 4 bytes"):
        OnnxReward.load(write_reward(tmp_path, proto=proto))


@pytest.mark.parametrize("where", ["initialiser", "constant"])
def test_a_sparse_tensor_is_refused_before_it_is_made_dense(tmp_path: Path, where: str) -> None:
    proto = model()
    value = helper.make_tensor("sparse", TensorProto.FLOAT, [1], [1.0])
    at = helper.make_tensor("sparse_at", TensorProto.INT64, [1], [0])
    sparse = helper.make_sparse_tensor(value, at, [400_000_000])
    if where == "initialiser":
        proto.graph.sparse_initializer.append(sparse)
    else:
        proto.graph.node.append(helper.make_node("Constant", [], ["sparse"], sparse_value=sparse))
    with pytest.raises(RewardError, match=r"model\.onnx stores a sparse tensor.*export the model densely"):
        OnnxReward.load(write_reward(tmp_path, proto=proto))


def test_a_tensor_of_very_many_dimensions_is_refused_at_once(tmp_path: Path) -> None:
    folder = write_reward(tmp_path, proto=one_tensor([1 << 62] * 40_000, raw_data=b"1234"))
    began = time.process_time()
    with pytest.raises(RewardError, match="a tensor 'huge' of more than 16 dimensions") as caught:
        OnnxReward.load(folder)
    assert len(str(caught.value)) < 400 + len(str(folder)) and time.process_time() - began < 2


def test_tensors_as_files_keep_them(tmp_path: Path) -> None:
    """In raw bytes, typed and packed, in four bits, and none at all."""
    proto = model()
    proto.graph.initializer.extend(
        [
            helper.make_tensor("floats", TensorProto.FLOAT, [3], [1.0, 2.0, 3.0]),
            helper.make_tensor("small", TensorProto.INT8, [2, 2], [1, 2, 3, 4]),
            helper.make_tensor("half", TensorProto.FLOAT16, [2], [1.0, 2.0]),
            helper.make_tensor("nibbles", TensorProto.INT4, [3, 3], list(range(-4, 5))),
            helper.make_tensor("empty", TensorProto.FLOAT, [0], []),
            numpy_helper.from_array(np.float32(3), "scalar"),
        ]
    )
    onnx.save(proto, str(tmp_path / "m.onnx"))
    tensors = read_graph(tmp_path / "m.onnx").tensors
    found = {name: (tensors[name].shape, tensors[name].precision) for name in ("small", "half", "nibbles", "empty")}
    assert found == {
        "small": ((2, 2), "int8"),
        "half": ((2,), "float16"),
        "nibbles": ((3, 3), "int4"),
        "empty": ((0,), "float32"),
    }
    assert tensors["scalar"].shape == () and tensors["scalar"].size == 1
    assert read_graph(tmp_path / "m.onnx").rows_of("input_ids") == 14
    assert read_graph(tmp_path / "m.onnx").rows_of("attention_mask") is None
    proto.graph.node[0].input[1] = "whole_ids"
    proto.graph.node.insert(0, helper.make_node("Cast", ["input_ids"], ["whole_ids"], to=TensorProto.INT64))
    onnx.save(proto, str(tmp_path / "cast.onnx"))
    assert read_graph(tmp_path / "cast.onnx").rows_of("input_ids") == 14


def with_output(*nodes: tuple[str, list[str], dict[str, Any]], **tensors: Any) -> onnx.ModelProto:
    """The tiny model, its score passed through more nodes; the last makes the output."""
    proto = model(output="plain")
    last = "plain"
    for i, (kind, inputs, attributes) in enumerate(nodes):
        made = "score" if i == len(nodes) - 1 else f"made_{i}"
        proto.graph.node.append(helper.make_node(kind, [last, *inputs], [made], **attributes))
        last = made
    proto.graph.initializer.extend(numpy_helper.from_array(np.asarray(a), n) for n, a in tensors.items())
    kind = proto.graph.output[0].type.tensor_type.elem_type
    del proto.graph.output[:]
    proto.graph.output.append(helper.make_tensor_value_info("score", kind, None))
    return proto


@pytest.mark.parametrize(
    ("proto", "shape"),
    [
        (with_output(("ReduceMean", [], {"keepdims": 0})), r"\(\) for 1"),
        (with_output(("ReduceMean", [], {}), ("Expand", ["three"], {}), three=[3]), r"\(3,\) for 1"),
        (with_output(("Unsqueeze", ["axes"], {}), axes=[1, 2]), r"\(1, 1, 1\) for 1"),
    ],
)
def test_outputs_of_another_shape(tmp_path: Path, proto: onnx.ModelProto, shape: str) -> None:
    with pytest.raises(RewardError, match=f"output 'score' has the shape {shape} responses; it must be"):
        OnnxReward.load(write_reward(tmp_path, proto=proto))


def test_an_output_turned_on_its_side(tmp_path: Path) -> None:
    """[1, n]: as many numbers as responses, and right for a single one."""
    reward = OnnxReward.load(write_reward(tmp_path, proto=with_output(("Unsqueeze", ["axes"], {}), axes=[0])))
    assert reward.score("tell", ["good"]).shape == (1,)
    with pytest.raises(RewardError, match=r"has the shape \(1, 2\) for 2 responses"):
        reward.score("tell", ["good", "bad"])


def test_scores_that_are_not_finite_pass_and_golden_ones_do_not(tmp_path: Path) -> None:
    proto = with_output(("Mul", ["nothing"], {}), ("Div", ["nothing"], {}), nothing=np.zeros(1, np.float32))
    folder = write_reward(tmp_path, proto=proto)
    assert np.isnan(OnnxReward.load(folder).score("tell", ["good", "bad"])).all()
    write_reward(tmp_path, proto=proto, golden=[{"prompt": "tell", "response": "good", "score": 0}])
    with pytest.raises(RewardError, match="scores its golden response 'good' nan instead of 0"):
        OnnxReward.load(folder)


def test_a_model_that_fails_while_it_runs(tmp_path: Path) -> None:
    """A token beyond the embedding: what a tokenizer of another model does."""
    folder = write_reward(tmp_path)
    made = tokenizer()
    made.add_tokens(["wolf"])
    made.save(str(folder / "tokenizer.json"))
    rehash(folder)
    reward = OnnxReward.load(folder)
    with pytest.raises(ScoreError, match="the reward 'tiny' failed: .*indices"):
        reward.score("tell", ["wolf"])
    assert np.isfinite(reward.score("tell", ["good"])).all(), "the session is still of use"


LONG = ["", "x" * 1_000_000, " " * 1_000_000, "good fox " * 111_111, "\ud800" * 1_000_000, "🦊" * 1_000_000, "\x00" * 9]


@pytest.mark.parametrize("truncation", ["prompt-left", "left", "right"])
@pytest.mark.parametrize("kind", ["pair", "text", "chat"])
def test_texts_of_no_and_of_a_million_characters(tmp_path: Path, kind: str, truncation: str) -> None:
    template = "{% for m in messages %}{{ m.role }} : {{ m.content }} {% endfor %}"
    folder = write_reward(tmp_path, input_kind=kind, input_template=template, input_truncation=truncation)
    reward = OnnxReward.load(folder)
    texts = [LONG[0], LONG[3]] if kind == "chat" else LONG  # a template is written and cut several times
    for prompt in ("\udfff", "tell " * 200_000):
        scored = texts if prompt == "\udfff" else texts[:1]
        assert np.isfinite(reward.score(prompt, scored)).all()
    assert max(reward.lengths("tell", [texts[0], LONG[3]])) <= 32


def test_ten_thousand_responses_are_not_all_tokenised_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reward = OnnxReward.load(write_reward(tmp_path))
    held = most = 0
    encode, run = reward._encode, reward._run

    def encoding(prompt: Any, responses: Any) -> Any:
        nonlocal held, most
        held += len(responses)
        most = max(most, held)
        return encode(prompt, responses)

    def running(rows: Any) -> Any:
        nonlocal held
        held -= len(rows)
        return run(rows)

    monkeypatch.setattr(reward, "_encode", encoding)
    monkeypatch.setattr(reward, "_run", running)
    texts = ["good fox", "bad", "the story a fox", ""] * 2500
    scores = reward.score("tell", texts)
    assert most <= 512 and held == 0
    np.testing.assert_allclose(scores.reshape(-1, 4), np.tile(scores[:4], (2500, 1)), atol=1e-5)


MEMORY = """
import sys
from aisp_local.rewards import OnnxReward
def peak():
    return next(int(l.split()[1]) for l in open("/proc/self/status") if l.startswith("VmHWM:")) / 1024
reward = OnnxReward.load(sys.argv[1])
reward.score("tell", ["good fox the story " * 64] * 600)
before = peak()
assert len(reward.score("tell", ["good fox the story " * 64] * 10_000)) == 10_000
print(peak() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
def test_the_memory_of_ten_thousand_responses(tmp_path: Path) -> None:
    folder = write_reward(tmp_path, input_max_length=256)
    done = subprocess.run([sys.executable, "-c", MEMORY, str(folder)], capture_output=True, text=True, check=True)
    assert float(done.stdout) < 16, "MiB; as lists, the tokens of 10,000 such responses take 40"


RESTRICTED = """
import os, sys
from aisp_local.rewards import OnnxReward
allowed = {min(os.sched_getaffinity(0))}
os.sched_setaffinity(0, allowed)
before = len(os.listdir("/proc/self/task"))
reward = OnnxReward.load(sys.argv[1])
reward.score("tell", ["good"] * 40)
tasks = os.listdir("/proc/self/task")
print(all(os.sched_getaffinity(int(task)) == allowed for task in tasks), len(tasks) - before)
"""


@pytest.mark.skipif(
    not hasattr(os, "sched_getaffinity") or len(os.sched_getaffinity(0)) < 2, reason="needs Linux and two processors"
)
def test_no_thread_leaves_the_cores_that_the_process_has(tmp_path: Path) -> None:
    """ONNX Runtime's own default starts one on each core of the machine, bound to it."""
    folder = write_reward(tmp_path / "r")
    done = subprocess.run([sys.executable, "-c", RESTRICTED, str(folder)], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True", "0"], done.stderr


def test_many_threads_get_the_bits_that_one_gets() -> None:
    reward = OnnxReward.load(shipped.reward())
    prompts = [f"Tell me a story about number {i}." for i in range(24)]  # more than are remembered
    texts = ["Once upon a time.", "The end of a much longer story about a fox. " * 4, ""]
    expected = [reward.score(prompt, texts) for prompt in prompts]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda i: reward.score(prompts[i % 24], texts), range(96)))
    for i, scores in enumerate(found):
        np.testing.assert_array_equal(scores, expected[i % 24])


class Counting:
    """A tokenizer that counts the texts it is given."""

    def __init__(self, inner: Any) -> None:
        self.inner, self.texts = inner, Counter[str]()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def encode(self, text: str, *rest: Any, **options: Any) -> Any:
        self.texts[text] += 1
        return self.inner.encode(text, *rest, **options)


def test_a_prompt_is_tokenised_once_in_a_run(tmp_path: Path) -> None:
    reward = OnnxReward.load(write_reward(tmp_path))
    reward._tokenizer = counting = Counting(reward._tokenizer)
    turns: Any = [{"role": "user", "content": "tell a story"}, {"role": "assistant", "content": "fox"}]
    first = reward.score(turns, ["good", "bad"])
    for _ in range(3):
        np.testing.assert_array_equal(reward.score(turns, ["good", "bad"]), first)
    assert counting.texts["user: tell a story\nassistant: fox"] == 1 and counting.texts["good"] == 4
    turns[0]["content"] = "tell the fox"  # the same list, another prompt
    assert (reward.score(turns, ["good", "bad"]) != first).all()


CHAT = "{% for m in messages %}[CLS] {{ m.role }} : {{ m.content }} [SEP] {% endfor %}"


@pytest.mark.parametrize("bos", ["tokenizer", "none"])
def test_the_opening_of_a_chat_is_tokenised_once(tmp_path: Path, bos: str) -> None:
    tok = tokenizer()
    tok.add_special_tokens(["[CLS]", "[SEP]"])
    folder = write_reward(tmp_path, input_kind="chat", input_template=CHAT, input_bos=bos)
    tok.save(str(folder / "tokenizer.json"))
    rehash(folder)
    reward, plain = OnnxReward.load(folder), OnnxReward.load(folder)
    reward._tokenizer = counting = Counting(reward._tokenizer)
    plain._opening = lambda turns: ("", [])  # type: ignore[method-assign]
    turns: Any = [{"role": "user", "content": "tell a story"}, {"role": "user", "content": "the fox [SEP]"}]
    responses = ["good", "", "bad [CLS] fox", "[SEP]", "a story " * 40]
    for _ in range(2):
        assert reward._encode(turns, responses) == plain._encode(turns, responses)
    opening = "[CLS] user : tell a story [SEP] [CLS] user : the fox [SEP] [SEP] "
    assert counting.texts[opening] == 1
    whole = [text for text in counting.texts if text.startswith(opening) and text != opening]
    assert not [text for text in whole if text.endswith(("good [SEP] ", "bad [CLS] fox [SEP] "))]


def test_prompts_that_were_not_asked_for_lately_are_forgotten(tmp_path: Path) -> None:
    reward = OnnxReward.load(write_reward(tmp_path))
    for i in range(100):
        reward.score(f"tell {i}", ["good"])
    assert len(reward._prompts) <= 16


def test_batches_are_full_and_pad_little() -> None:
    rng = np.random.default_rng(0)
    lengths = rng.integers(3, 257, 512).tolist()
    batches = _batches(lengths, 1024, 64)
    assert sorted(i for batch in batches for i in batch) == list(range(512))
    for batch in batches:
        longest = max(lengths[i] for i in batch)
        assert len(batch) * longest <= 1024 or len(batch) == 1
        assert longest - min(lengths[i] for i in batch) <= 64
    padded = sum(len(b) * max(lengths[i] for i in b) for b in batches)
    assert padded < 1.05 * sum(lengths)
    assert _batches([5000, 5000, 3], 1024, 64) == [[0], [1], [2]]
    assert _batches([], 1024, 64) == []


def test_io_binding_gives_the_same_scores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The way of GPUs, run on the CPU."""
    reward = OnnxReward.load(write_reward(tmp_path))
    texts = ["good fox", "bad", ""]
    expected = reward.score("tell", texts)
    monkeypatch.setattr(OnnxReward, "provider", "CUDAExecutionProvider")
    bound: list[int] = []
    inner = OnnxReward._bound

    def counted(self: OnnxReward, feed: Any) -> Any:
        bound.append(1)
        return inner(self, feed)

    monkeypatch.setattr(OnnxReward, "_bound", counted)
    np.testing.assert_allclose(reward.score("tell", texts), expected, atol=1e-6)
    assert bound == [1], "one batch: on a GPU padding is cheap"


def test_a_driver_without_cuda_libraries_is_said_and_the_cpu_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    import onnxruntime

    if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        pytest.skip("this ONNX Runtime is built without CUDA")
    monkeypatch.setattr(runtime, "_has_gpu", lambda: True)
    real = ctypes.CDLL

    def lacking(name: str, *rest: Any, **options: Any) -> Any:
        if "providers_cuda" in str(name):
            raise OSError("libcublasLt.so.13: cannot open shared object file")
        return real(name, *rest, **options)

    monkeypatch.setattr(ctypes, "CDLL", lacking)
    with pytest.warns(UserWarning, match=r"lacks the CUDA libraries \(libcublasLt.so.13: .*onnxruntime-gpu\[cuda"):
        reward = OnnxReward.load(write_reward(tmp_path))
    assert reward.provider == "CPUExecutionProvider"
    assert np.isfinite(reward.score("tell", ["good"])).all()
    assert capfd.readouterr() == ("", "")


def test_without_a_driver_nothing_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime, "_has_gpu", lambda: False)
    assert OnnxReward.load(write_reward(tmp_path)).provider == "CPUExecutionProvider"


@pytest.mark.parametrize(("version", "spins"), [("1.20.1", False), ("1.31.0", True), ("2.0.0.dev1", True)])
def test_threads_spin_only_where_the_time_can_be_bounded(version: str, spins: bool) -> None:
    assert (runtime._version(version) >= runtime._SHORT_SPIN) is spins
