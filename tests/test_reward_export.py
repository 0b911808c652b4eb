"""Exported rewards against the models that they were made from, and everything that an export refuses.

What needs PyTorch and transformers is skipped without them: pip install 'aisp-local[export]'.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import hf_models
import numpy as np
import onnx
import onnxruntime
import pytest
from click.testing import CliRunner, Result
from onnx import TensorProto, helper, numpy_helper
from onnx_files import write_reward

from aisp_local.cli.main import main
from aisp_local.errors import AispError, ExportError, InputError, RewardError
from aisp_local.files import output_folder
from aisp_local.reward_kit.export import Precision, export_reward, parity, source
from aisp_local.reward_kit.export.quantise import int4_blocks, int8_rows, rewrite
from aisp_local.rewards import OnnxReward
from aisp_local.rewards.external_data import external_locations
from aisp_local.rewards.manifest import Kind, read_manifest

LACKING = [name for name in ("torch", "transformers", "onnxscript", "safetensors") if find_spec(name) is None]
needs_torch = pytest.mark.skipif(bool(LACKING), reason=f"no {', '.join(LACKING)}: pip install 'aisp-local[export]'")
TEXTS = ["A fox ran home.", "", "sky", "Take the pan off the heat a little early: they go on cooking. " * 3]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The Hugging Face folder of a family, made once."""
    root = tmp_path_factory.mktemp("models")

    def get(family: str) -> Path:
        return root / family if (root / family).exists() else hf_models.write(root / family, family)

    return get


@pytest.fixture(scope="module")
def exports(models: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """The reward folder of a family in a precision, made once."""
    root = tmp_path_factory.mktemp("rewards")

    def get(family: str, precision: Precision = "fp32") -> Path:
        out = root / f"{family}-{precision}"
        if not out.exists():
            export_reward(models(family), out, precision=precision, tolerance=2 if precision == "int4" else None)
        return out

    return get


def run(folder: Path, rows: list[list[int]], length: int, side: str, padding: int) -> Any:
    """Scores [n] of the ONNX file itself, each row padded to that length with that id."""
    session = onnxruntime.InferenceSession(str(folder / "model.onnx"), providers=["CPUExecutionProvider"])
    ids = np.full((len(rows), length), padding, np.int64)
    mask = np.zeros_like(ids)
    for i, row in enumerate(rows):
        start = {"right": 0, "left": length - len(row), "both": (length - len(row)) // 2}[side]
        ids[i, start : start + len(row)] = row
        mask[i, start : start + len(row)] = 1
    feed = {"input_ids": ids, "attention_mask": mask, "token_type_ids": np.zeros_like(ids)}
    names = {i.name for i in session.get_inputs()}
    return session.run(None, {name: feed[name] for name in names})[0][:, 0]


@needs_torch
@pytest.mark.parametrize("family", hf_models.FAMILIES)
def test_every_architecture_scores_as_in_torch_under_any_padding(
    family: str, models: Callable[[str], Path], exports: Callable[..., Path]
) -> None:
    from aisp_local.reward_kit.export.network import Network

    out = exports(family)
    network = Network(source.check(models(family), "x"))
    vocabulary = network.model.config.vocab_size
    # The last one is longer than the sliding windows; special tokens, padding among them, stand anywhere.
    rows = hf_models.rows(1, [1, 5, 17, 40], vocabulary)
    rows[2][3] = rows[2][-1] = rows[3][0] = (
        json.loads((models(family) / "config.json").read_text())["pad_token_id"] or 0
    )
    expected = network.scores([(row, [0] * len(row)) for row in rows], types=family == "Bert")[:, 0]
    assert np.ptp(expected) > 0.05
    for side in ("right", "left", "both"):
        for padding in (0, 1, 7):
            np.testing.assert_allclose(run(out, rows, 47, side, padding), expected, atol=2e-5, err_msg=side)
    for row, score in zip(rows, expected, strict=True):  # one row, no padding: sizes that the exporter never saw
        np.testing.assert_allclose(run(out, [row], len(row), "right", 0), [score], atol=2e-5)


@needs_torch
@pytest.mark.parametrize("family", hf_models.FAMILIES)
def test_the_folder_says_how_the_model_is_fed(family: str, exports: Callable[..., Path]) -> None:
    manifest = read_manifest(exports(family))
    decoder = family in source.DECODERS
    assert manifest.kind == ("chat" if decoder else "pair")
    assert manifest.adds_special is not decoder  # the template holds them
    assert ("token_type_ids" in manifest.inputs) is (family == "Bert")
    assert manifest.max_length == 512
    assert manifest.parity is not None and manifest.parity.precision == "fp32"
    assert manifest.parity.max_abs < 1e-4 * manifest.parity.spread and manifest.parity.agreement == 1
    assert len(manifest.golden) == 5 and 0 < manifest.tolerance < manifest.parity.spread / 20
    reward = OnnxReward.load(exports(family))
    together = reward.score("How are you?", TEXTS)
    alone = [float(reward.score("How are you?", [text])[0]) for text in TEXTS]
    np.testing.assert_allclose(together, alone, atol=1e-5)
    assert len(set(np.round(alone, 4))) == len(TEXTS)


@needs_torch
@pytest.mark.parametrize("family", ["Llama", "Mistral", "Gemma2"])
def test_a_chat_has_one_bos(family: str, exports: Callable[..., Path]) -> None:
    reward = OnnxReward.load(exports(family))
    ((ids, _),) = reward.tokens("How are you?", ["Fine."])
    bos = {"Llama": "<|begin_of_text|>", "Mistral": "<s>", "Gemma2": "<bos>"}[family]
    number = json.loads((exports(family) / "tokenizer.json").read_text())["model"]["vocab"][bos]
    assert ids.count(number) == 1 and ids[0] == number


@needs_torch
def test_the_padding_token_in_a_text_does_not_move_the_pooling(
    models: Callable[[str], Path], exports: Callable[..., Path]
) -> None:
    """Llama's padding is its end of turn, with which every conversation ends: transformers drops it, we must not."""
    import torch

    from aisp_local.reward_kit.export.network import Network

    network = Network(source.check(models("Llama"), "x"))
    reward = OnnxReward.load(exports("Llama"))
    texts = ["The end.<|eot_id|> And on.", "The end.<|eot_id|><|eot_id|>"]
    rows = reward.tokens("How are you?", texts)
    pad = json.loads((models("Llama") / "config.json").read_text())["pad_token_id"]
    assert all(ids.count(pad) > 2 for ids, _ in rows)
    expected = network.scores(rows, types=False)[:, 0]
    np.testing.assert_allclose(reward.score("How are you?", texts), expected, atol=2e-5)
    network.model.config.pad_token_id = pad
    with torch.no_grad():
        trap = network.model(input_ids=torch.tensor([rows[1][0]])).logits[0, 0].item()
    assert abs(trap - expected[1]) > 0.01


@needs_torch
@pytest.mark.parametrize(
    ("family", "precision"), [("Bert", "int8"), ("DebertaV2", "int4"), ("Llama", "int4"), ("Qwen3", "fp16")]
)
def test_fewer_bits(family: str, precision: Precision, exports: Callable[..., Path]) -> None:
    whole, out = exports(family), exports(family, precision)
    manifest = read_manifest(out)
    assert manifest.parity is not None and 0 < manifest.parity.max_abs / manifest.parity.spread < 2
    proto = onnx.load(out / "model.onnx")
    kinds = {tensor.data_type for tensor in proto.graph.initializer}
    expected = {"int8": TensorProto.INT8, "int4": TensorProto.UINT8, "fp16": TensorProto.FLOAT16}[precision]
    assert expected in kinds
    assert any(node.op_type == "MatMulNBits" for node in proto.graph.node) is (precision == "int4")
    big = [t for t in proto.graph.initializer if t.data_type == TensorProto.FLOAT and np.prod(t.dims) > 64 * 64]
    assert not [t.name for t in big if "position" not in t.name]
    assert (out / "model.onnx").stat().st_size < (whole / "model.onnx").stat().st_size
    reward = OnnxReward.load(out)
    alone = [float(reward.score("How are you?", [text])[0]) for text in TEXTS]
    np.testing.assert_allclose(reward.score("How are you?", TEXTS), alone, atol=1e-5)


@needs_torch
def test_large_weights_lie_beside_the_model(
    models: Callable[[str], Path], exports: Callable[..., Path], tmp_path: Path
) -> None:
    export_reward(models("Qwen2"), tmp_path / "out", largest_file=100_000)
    assert external_locations(tmp_path / "out" / "model.onnx") == ["model.onnx.data"]
    assert "model.onnx.data" in read_manifest(tmp_path / "out").files
    graph = (tmp_path / "out" / "model.onnx").read_bytes()
    assert len(graph) < 100_000 and b"site-packages" not in graph  # no weights, and nothing of this machine
    scores = OnnxReward.load(tmp_path / "out").score("How are you?", TEXTS)
    np.testing.assert_array_equal(scores, OnnxReward.load(exports("Qwen2")).score("How are you?", TEXTS))
    (tmp_path / "out" / "model.onnx.data").write_bytes(b"x")
    with pytest.raises(RewardError, match="sha256"):
        OnnxReward.load(tmp_path / "out")


@needs_torch
def test_index_and_sign(tmp_path: Path) -> None:
    from aisp_local.reward_kit.export.network import Network

    folder = hf_models.write(tmp_path / "in", "Bert", labels=3)
    with pytest.raises(InputError, match=r"3 outputs; .* --index: 0 \(LABEL_0\), 1 \(LABEL_1\)"):
        export_reward(folder, tmp_path / "out")
    with pytest.raises(InputError, match="--index 3 is not an output of the model; it has 3"):
        export_reward(folder, tmp_path / "out", index=3)
    export_reward(folder, tmp_path / "out", index=1, sign=-1, name="kind", licence="MIT", max_length=48)
    reward = OnnxReward.load(tmp_path / "out")
    rows = reward.tokens("How are you?", TEXTS)
    expected = -Network(source.check(folder, "x")).scores(rows, types=True)[:, 1]
    np.testing.assert_allclose(reward.score("How are you?", TEXTS), expected, atol=2e-5)
    assert max(len(ids) for ids, _ in rows) == 48
    assert (reward.name, reward.manifest.licence) == ("kind", "MIT")


@needs_torch
def test_an_export_needs_no_network(
    models: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*arguments: Any, **_: Any) -> None:
        raise AssertionError(f"the network was asked for {arguments}")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    folder = models("ModernBert")
    (folder / "README.md").write_text("---\nlanguage: en\nlicense: apache-2.0\n---\n# A model\n")
    export_reward(folder, tmp_path / "out", input="text")
    assert read_manifest(tmp_path / "out").licence == "apache-2.0"
    assert read_manifest(tmp_path / "out").kind == "text"


def command(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, ["reward", "export", *map(str, arguments)])


@needs_torch
def test_the_command(models: Callable[[str], Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = command(models("Roberta"), out)
    assert done.exit_code == 0, done.output
    assert (
        "RobertaForSequenceClassification, fp32" in done.stdout and "100.0% of pairs in the same order" in done.stdout
    )
    assert OnnxReward.load(out).name == "Roberta"
    again = command(models("Roberta"), out)
    assert again.exit_code == 2 and f"{out} exists; give another folder, or --force" in again.stderr
    assert command(models("Roberta"), out, "--force", "--name", "other").exit_code == 0
    assert OnnxReward.load(out).name == "other"
    refused = command(models("Roberta"), out, "--force", "--precision", "int8", "--tolerance", "0.0001")
    assert refused.exit_code == 1
    assert "of their spread, and 0.0001 is allowed" in refused.stderr and "Kendall's tau" in refused.stderr
    assert OnnxReward.load(out).name == "other"  # what was there stays
    refused = command(models("Roberta"), tmp_path / "new", "--precision", "int8", "--tolerance", "0.0001")
    assert refused.exit_code == 1
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@needs_torch
@pytest.mark.parametrize(
    ("family", "options", "sentence"),
    [
        ("Bert", {"input": "chat"}, "has no chat template; use --input pair"),
        ("Bert", {"max_length": 1000}, "--max-length 1000 is more than the 512 positions"),
        ("Roberta", {"max_length": 513}, "more than the 512 positions"),
        ("Bert", {"max_length": 2}, "--max-length 2 is not between 8 and 131072"),
    ],
)
def test_options_that_do_not_fit(
    family: str, options: dict[str, Any], sentence: str, models: Callable[[str], Path], tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=sentence):
        export_reward(models(family), tmp_path / "out", **options)
    assert list(tmp_path.iterdir()) == []


@needs_torch
def test_a_decoder_without_a_template_and_weights_without_a_head(tmp_path: Path) -> None:
    import safetensors.torch

    folder = hf_models.write(tmp_path / "in", "Qwen2")
    (folder / "chat_template.jinja").unlink()
    with pytest.raises(InputError, match="no chat template, so how .* --input pair or --input text"):
        export_reward(folder, tmp_path / "out")
    kinds: tuple[Kind, ...] = ("pair", "text")
    for kind in kinds:
        export_reward(folder, tmp_path / kind, input=kind)
        assert OnnxReward.load(tmp_path / kind).manifest.kind == kind
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    del tensors["score.weight"]
    safetensors.torch.save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(RewardError, match="lack score.weight of Qwen2ForSequenceClassification, which would be random"):
        export_reward(folder, tmp_path / "out", input="pair")
    (folder / "model.safetensors").write_bytes(b"garbage")
    with pytest.raises(RewardError, match="the weights cannot be read"):
        export_reward(folder, tmp_path / "out", input="pair")
    assert not (tmp_path / "out").exists()


@needs_torch
@pytest.mark.parametrize(
    ("family", "file", "change", "sentence"),
    [
        ("Bert", "tokenizer_config.json", {"model_max_length": "x"}, "'model_max_length' .* is 'x', not a number"),
        ("Bert", "tokenizer_config.json", {"chat_template": 5}, "chat template is no text, but 5; repair"),
        ("Bert", "tokenizer_config.json", {"chat_template": {"a": "b"}}, "templates 'a' and none called 'default'"),
        ("Roberta", "config.json", {"pad_token_id": None}, "'pad_token_id' is null, .* restore it"),
    ],
)
def test_tokenizers_that_are_refused(
    family: str, file: str, change: dict[str, Any], sentence: str, models: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = shutil.copytree(models(family), tmp_path / "in")
    path = folder / file
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(RewardError, match=sentence):
        export_reward(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@needs_torch
def test_of_several_chat_templates_the_default_one_is_taken(models: Callable[[str], Path], tmp_path: Path) -> None:
    folder = shutil.copytree(models("Bert"), tmp_path / "in")
    path = folder / "tokenizer_config.json"
    text = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": {"default": text, "other": "x"}}))
    export_reward(folder, tmp_path / "out")
    assert read_manifest(tmp_path / "out").template == text


def hugging_face(folder: Path, *, weights: str = "model.safetensors", **config: Any) -> Path:
    """The outside of a folder: enough for what is refused before anything is read."""
    folder.mkdir()
    known = {"architectures": ["BertForSequenceClassification"], "model_type": "bert"}
    (folder / "config.json").write_text(json.dumps(known | config))
    (folder / weights).write_bytes(b"")
    return folder


@pytest.mark.parametrize(
    ("parts", "sentence"),
    [
        ({"weights": "pytorch_model.bin"}, "pytorch_model.bin only, a format that can run code .* save_pretrained"),
        ({"weights": "model.pt"}, "model.pt only"),
        ({"weights": "notes"}, r"holds no weights \(\*.safetensors\)"),
        ({"architectures": ["LlamaForCausalLM"]}, "LlamaForCausalLM cannot be exported; one of Bert, Roberta"),
        ({"architectures": ["T5ForSequenceClassification"]}, "T5ForSequenceClassification cannot be exported"),
        ({"architectures": None}, "the architecture none cannot be exported"),
        ({"architectures": ["OwnModel"], "auto_map": {"AutoModel": "own.py"}}, "code that comes with a model is never"),
        ({"quantization_config": {"bits": 4}}, "holds quantised weights; give the original"),
    ],
)
def test_folders_that_are_refused(parts: dict[str, Any], sentence: str, tmp_path: Path) -> None:
    folder = hugging_face(tmp_path / "in", **parts)
    with pytest.raises(RewardError, match=sentence):
        export_reward(folder, tmp_path / "out")
    assert command(folder, tmp_path / "out").exit_code == 2
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_sources_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(RewardError, match="holds no config.json"):
        export_reward(tmp_path, tmp_path / "out")
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(RewardError, match="adapter without its model; merge them"):
        export_reward(tmp_path, tmp_path / "out")
    for text in ("{", "[" * 500_000, '{"a":' * 100_000):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(RewardError, match="not valid JSON"):
            export_reward(tmp_path, tmp_path / "out")
    with pytest.raises(RewardError, match="is a file; give the Hugging Face folder"):
        export_reward(tmp_path / "config.json", tmp_path / "out")
    with pytest.raises(RewardError, match="no-such-folder does not exist; give .* name on the hub"):
        export_reward("no-such-folder", tmp_path / "out")


@needs_torch
def test_the_hub_is_announced_and_may_be_out_of_reach(tmp_path: Path) -> None:
    environment = os.environ | {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path / "cache")}
    done = subprocess.run(
        [sys.executable, "-c", "from aisp_local.cli.main import main; main()", "reward", "export", "owner/name", "out"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=environment,
        timeout=120,
        check=False,
    )
    assert done.returncode == 1 and done.stdout == ""
    announced, failed = [line for line in done.stderr.splitlines() if line.startswith("aisp-local: ")]
    assert announced == "aisp-local: owner/name is no folder here; downloading it from the Hugging Face hub"
    assert "owner/name cannot be downloaded from the Hugging Face hub" in failed and "check the name" in failed
    assert not (tmp_path / "out").exists()


def test_without_torch_one_sentence_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source, "find_spec", lambda name: None)
    for given in (str(hugging_face(tmp_path / "in")), "owner/name"):  # before anything is downloaded
        with pytest.raises(AispError, match=r"needs torch, .* pip install 'aisp-local\[export\]'"):
            export_reward(given, tmp_path / "out")


def test_out_is_checked_first_and_replaced_only_when_it_is_a_reward(tmp_path: Path) -> None:
    folder = hugging_face(tmp_path / "in", architectures=["Nothing"])
    (tmp_path / "file").write_text("")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("")
    cases = [("file", "is not a folder"), ("no/such", "does not exist; create it"), ("full", "exists; give another")]
    for name, sentence in cases:
        with pytest.raises(InputError, match=sentence):
            export_reward(folder, tmp_path / name)
    with pytest.raises(InputError, match="holds no reward.json, so it is not replaced"):
        export_reward(folder, tmp_path / "full", force=True)
    write_reward(tmp_path / "around")
    inner = hugging_face(tmp_path / "around" / "model")
    with pytest.raises(InputError, match="holds the model itself"):
        export_reward(inner, tmp_path / "around", force=True)


def test_a_folder_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(ZeroDivisionError), output_folder(out, "reward.json", False) as folder:
        (folder / "reward.json").write_text("1")
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []
    for text in ("1", "2"):
        with output_folder(out, "reward.json", True) as folder:
            (folder / "reward.json").write_text(text)
    assert (out / "reward.json").read_text() == "2"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_training_from_int8_is_not_rounded_away() -> None:
    """Weights that moved by less than half a step from int8 values may go either way; together they keep the move."""
    rng = np.random.default_rng(0)
    codes, scales = int8_rows(rng.normal(size=(1000, 2000)).astype(np.float32))
    old = codes * scales
    np.testing.assert_array_equal(int8_rows(old)[0], codes)  # untrained, nothing moves
    for size in (0.02, 0.1, 0.3):
        move = (size * rng.normal(size=old.shape) * scales).astype(np.float32)
        again, wider = int8_rows(old + move)
        kept = float(((again * wider - old) * move).sum() / (move**2).sum())
        assert kept == pytest.approx(1, abs=0.1)
        assert float(np.abs(again * wider - old - move).max() / wider.max()) <= 1
        np.testing.assert_array_equal(int8_rows(old + move)[0], again)


def test_weights_that_were_never_in_int8_go_to_the_nearest_value() -> None:
    weights = np.random.default_rng(1).normal(size=(100, 300)).astype(np.float32)
    codes, scales = int8_rows(weights)
    np.testing.assert_array_equal(codes, np.rint(weights / scales))


def test_int8_and_int4_are_what_onnx_runtime_multiplies() -> None:
    rng = np.random.default_rng(0)
    weights = rng.standard_normal((24, 70)).astype(np.float32)  # [out, in]; the last block of 32 is not full
    weights[3] = 0
    values, scales = int8_rows(weights)
    assert values.dtype == np.int8 and np.abs(values * scales - weights).max() <= scales.max() / 2 + 1e-6
    packed, scales = int4_blocks(weights)
    assert packed.shape == (24, 3, 16) and packed.dtype == np.uint8 and scales.shape == (24, 3)
    nibbles = np.stack([packed & 15, packed >> 4], -1).reshape(24, 3, 32).astype(np.float32) - 8
    back = (nibbles * scales[..., None]).reshape(24, 96)[:, :70]
    assert np.sqrt(np.mean((back - weights) ** 2)) < 0.12
    node = helper.make_node(
        "MatMulNBits", ["x", "w", "s"], ["y"], domain="com.microsoft", K=70, N=24, bits=4, block_size=32
    )
    graph = helper.make_graph(
        [node],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 70])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 24])],
        [numpy_helper.from_array(packed, "w"), numpy_helper.from_array(scales, "s")],
    )
    sets = [helper.make_opsetid("", 18), helper.make_opsetid("com.microsoft", 1)]
    session = onnxruntime.InferenceSession(
        helper.make_model(graph, opset_imports=sets, ir_version=9).SerializeToString(),
        providers=["CPUExecutionProvider"],
    )
    x = rng.standard_normal((5, 70)).astype(np.float32)
    np.testing.assert_allclose(session.run(None, {"x": x})[0], x @ back.T, atol=1e-4)


@needs_torch
@pytest.mark.parametrize(("precision", "near"), [("fp16", 0.01), ("int8", 0.2), ("int4", 2.0)])
def test_matrices_that_the_exporter_left_transposed_lose_their_bits_too(precision: Precision, near: float) -> None:
    """It folds no constants of more than a million elements: those of the models that need it most."""
    import onnx_ir

    rng = np.random.default_rng(0)
    weights = {name: rng.standard_normal((48, 32)).astype(np.float32) for name in ("table", "turned")}
    nodes = [
        helper.make_node("Gather", ["table", "ids"], ["x"]),
        helper.make_node("Transpose", ["turned"], ["w"], perm=[1, 0]),
        helper.make_node("MatMul", ["x", "w"], ["score"]),
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("ids", TensorProto.INT64, ["n", "L"])],
        [helper.make_tensor_value_info("score", TensorProto.FLOAT, ["n", "L", 48])],
        [numpy_helper.from_array(values, name) for name, values in weights.items()],
    )
    model = onnx_ir.from_proto(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10))
    rewrite(model, precision)
    proto = onnx_ir.to_proto(model)
    assert all(t.data_type != TensorProto.FLOAT or np.prod(t.dims) <= 96 for t in proto.graph.initializer)
    session = onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    ids = rng.integers(0, 48, (3, 5))
    expected = weights["table"][ids] @ weights["turned"].T
    worst = np.abs(session.run(None, {"ids": ids})[0] - expected).max()
    assert 0 < worst < near


def test_parity_is_of_values_and_of_order() -> None:
    expected = np.array([0.0, 1.0, 2.0, 3.0])
    found = np.array([0.0, 1.0, 3.0, 2.5])
    measured = parity.measure("int8", expected, found)
    assert (measured.pairs, measured.max_abs, measured.mean_abs) == (4, 1.0, 0.375)
    assert measured.spread == pytest.approx(np.sqrt(1.25))
    assert measured.kendall_tau == pytest.approx(4 / 6) and measured.agreement == pytest.approx(5 / 6)
    with pytest.raises(ExportError, match=r"up to 0.89 of their spread, and 0.15 is allowed .*; 83.3% of the pairs"):
        parity.check(measured, "int8", None)
    with pytest.raises(ExportError, match="83.3% of the pairs of texts are in the same order, and 95% must be"):
        parity.check(measured, "int8", 10.0)  # the order counts whatever the tolerance
    parity.check(measured, "int4", 1.0)
    for precision in parity.LIMITS:
        parity.check(parity.measure(precision, expected, expected), precision, 0.0)
    with pytest.raises(ExportError, match="every text the same score"):
        parity.measure("fp32", np.ones(4), np.ones(4))
    with pytest.raises(ExportError, match="the exported reward gives scores that are not finite"):
        parity.measure("fp32", expected, np.array([0, 1, np.nan, 2]))


def test_parity_in_the_manifest(tmp_path: Path) -> None:
    numbers = {"max_abs": 0.1, "mean_abs": 0.01, "spread": 1, "kendall_tau": 0.9, "agreement": 0.95}
    good = {"precision": "int8", "pairs": 32, **numbers}
    read = read_manifest(write_reward(tmp_path / "a", parity=good)).parity
    assert read is not None and (read.pairs, read.spread, read.precision) == (32, 1.0, "int8")
    assert read_manifest(write_reward(tmp_path / "b")).parity is None
    for change, sentence in (
        ({"spread": "x"}, "'spread' has the wrong type"),
        ({"agrement": 1}, "the key 'agrement' is unknown; did you mean 'agreement'"),
        ({"max_abs": float("nan")}, "'max_abs' must be finite"),
    ):
        with pytest.raises(RewardError, match=f"parity: {sentence}"):
            read_manifest(write_reward(tmp_path / "c", parity=good | change))


@needs_torch
def test_a_folder_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    """transformers would make up an empty one, to which every text is the same."""
    folder = hf_models.write(tmp_path / "source", "Bert")
    for path in folder.glob("tok*"):
        path.unlink()
    with pytest.raises(RewardError, match="holds no tokenizer"):
        export_reward(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()
