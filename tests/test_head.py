"""The output head on the host against the engine's own logits."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import synthetic
from gguf import GGUFReader, GGUFValueType, GGUFWriter
from raw import Raw, Schedule, follow

from aisp_local import shipped
from aisp_local.engine.head import OutputHead
from aisp_local.errors import ModelError
from aisp_local.native import Model

pytestmark = pytest.mark.native

ROUNDED = {name for name in synthetic.MODELS if re.search(r"b?f16|q\d_", name)}


@pytest.mark.parametrize("name", synthetic.EVERYTHING)
def test_project_gives_the_logits_of_the_model(name: str, tmp_path: Path) -> None:
    path = synthetic.write_architecture(tmp_path, name)
    with Raw(path, n_seq=3) as raw:
        trace = follow(raw, Schedule.make(raw.size, n=3, steps=4), z=1)
    assert trace.z is not None
    decoded = ~np.isnan(trace.logits[..., 0])
    projected = OutputHead(path).project(trace.z[decoded])
    # Activations are rounded to the matrix' own precision in the engine, on the host they are not.
    tolerance = 0.1 if name in ROUNDED else 2e-5
    np.testing.assert_allclose(projected, trace.logits[decoded], rtol=0, atol=tolerance)
    agreement = np.corrcoef(projected.ravel(), trace.logits[decoded].ravel())[0, 1]
    assert agreement > 0.999


@pytest.mark.parametrize("name", sorted(synthetic.MODELS))
def test_rows_are_those_that_the_engine_multiplies_by(name: str, tmp_path: Path) -> None:
    """Dequantised by llama.cpp itself, to F32, they are the same numbers."""
    path = synthetic.write_architecture(tmp_path, name)
    plain = synthetic.quantize(path, tmp_path / "plain.gguf", "F32")
    np.testing.assert_array_equal(OutputHead(path).rows(3, 40), OutputHead(plain).rows(3, 40))


@pytest.mark.parametrize("name", sorted(synthetic.MODELS))
def test_rows_from_the_engine_are_those_of_the_file(name: str, tmp_path: Path) -> None:
    """A matrix that the backend has repacked for its processor cannot be read back; then the file serves."""
    path = synthetic.MODELS[name](tmp_path / "model.gguf", vocab="bpe")
    model, head = Model(path), OutputHead(path)
    for start, stop in ((0, 1), (3, 40), (head.n_vocab - 2, head.n_vocab), (0, head.n_vocab), (5, 5)):
        found = model.output_rows(start, stop)
        if found is None:
            assert name in ROUNDED
            break
        assert found.tobytes() == head.rows(start, stop).tobytes()
    for start, stop in ((-1, 1), (0, head.n_vocab + 1), (head.n_vocab, head.n_vocab + 1)):
        assert model.output_rows(start, stop) is None
    both = OutputHead(path, model.output_rows)
    for part in (slice(None), slice(3, 9), slice(-2, None), slice(9, 3)):
        assert both.rows(part.start or 0, part.stop).tobytes() == head.weight[part].tobytes()
    model.close()
    assert both.rows(3, 9).tobytes() == head.weight[3:9].tobytes()


def test_rows_are_parts_of_the_whole_matrix() -> None:
    head = OutputHead(shipped.model())
    whole = head.rows()
    assert whole.shape == (head.n_vocab, head.d) and whole.dtype == np.float32
    np.testing.assert_array_equal(head.rows(5, 9), whole[5:9])
    np.testing.assert_array_equal(head.rows(head.n_vocab - 2), whole[-2:])


@pytest.mark.parametrize("name", sorted(synthetic.MODELS))
def test_a_torch_tensor_gives_the_same_logits_and_a_gradient(name: str, tmp_path: Path) -> None:
    """Every kind of head: scales, soft-caps and biases too. Needs torch: pip install '.[train]'."""
    torch = pytest.importorskip("torch")
    head = OutputHead(synthetic.write_architecture(tmp_path, name))
    for device in ("cpu", *(["cuda"] if torch.cuda.is_available() else [])):
        z = np.random.default_rng(0).standard_normal((3, head.d), np.float32)
        tensor = torch.from_numpy(z).to(device).requires_grad_()
        logits = head.project(tensor)
        assert logits.device == tensor.device
        np.testing.assert_allclose(logits.detach().cpu().numpy(), head.project(z), rtol=0, atol=1e-4)
        (gradient,) = torch.autograd.grad(logits[0, 7], tensor)
        step = np.zeros_like(z)
        step[0] = 1e-2 * head.weight[7] / np.abs(head.weight[7]).max()
        wanted = (head.project(z + step) - head.project(z - step))[0, 7] / 2
        assert float((gradient.cpu().numpy() * step).sum()) == pytest.approx(float(wanted), rel=2e-2, abs=1e-5)


def test_numpy_alone_does_not_import_torch() -> None:
    code = """if True:
        import sys, numpy, aisp_local.shipped, aisp_local.engine.head
        head = aisp_local.engine.head.OutputHead(aisp_local.shipped.model())
        head.project(numpy.zeros(head.d, numpy.float32))
        assert "torch" not in sys.modules
    """
    subprocess.run([sys.executable, "-c", code], check=True)


def split(path: Path, folder: Path) -> Path:
    """The model in two files, the output matrix in the second; returns the first."""
    reader = GGUFReader(path)
    files = [folder / f"model-{i:05d}-of-00002.gguf" for i in (1, 2)]
    for number, file in enumerate(files):
        writer = GGUFWriter(file, "llama")
        if number == 0:
            numbers = (GGUFValueType.UINT32, GGUFValueType.FLOAT32)
            for field in reader.fields.values():
                if field.types[0] in numbers and not field.name.startswith("GGUF."):
                    writer.add_key_value(field.name, field.contents(), field.types[0])
        writer.add_uint16("split.no", number)
        writer.add_uint16("split.count", 2)
        writer.add_int32("split.tensors.count", len(reader.tensors))
        for tensor in reader.tensors:
            if (tensor.name == "output.weight") == (number == 1):
                writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    return files[0]


def test_a_model_in_several_files(tmp_path: Path) -> None:
    path = synthetic.write_models(tmp_path, ["llama-q8_0"])["llama-q8_0"]
    first = split(path, tmp_path)
    np.testing.assert_array_equal(OutputHead(first).weight, OutputHead(path).weight)
    (tmp_path / "model-00002-of-00002.gguf").unlink()
    with pytest.raises(ModelError, match="is one of 2 files and .*00002-of-00002.gguf is missing"):
        OutputHead(first)


def test_a_file_without_an_output_matrix(tmp_path: Path) -> None:
    path = synthetic.write_vocab_only(tmp_path / "vocab.gguf")
    with pytest.raises(ModelError, match="no output matrix"):
        OutputHead(path)
