"""The output head on the host: rows of the output matrix, and logits from pre-logits."""

from __future__ import annotations

import hashlib
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
from gguf import GGUFReader
from gguf.quants import dequantize

from aisp_local.engine.law import HeadLaw
from aisp_local.errors import ModelError
from aisp_local.types import FloatArray

ArrayOrTensor = TypeVar("ArrayOrTensor")
Read = Callable[[int, int], FloatArray | None]

_SHARD = re.compile(r"(.*)-\d{5}-of-(\d{5})\.gguf")
_SAMPLES, _SAMPLE_BYTES = 64, 65_536
_NAMES = ("output.weight", "token_embd.weight", "output.bias", "output.scale")


class OutputHead(HeadLaw):
    """``logits = softcap(scale (s W z + b))``: what llama.cpp does with the input z of its output matrix.

    Rows of W [V, d] come from the engine where ``read(start, stop)`` has them (it gives None where it has not), else
    from the file, memory-mapped; they are dequantised exactly as llama.cpp does it, to the same bits. A model in
    several files is followed from its first one. The engine itself rounds activations to the matrix' own precision, so
    quantised models agree to within that.
    """

    def __init__(self, path: Path, read: Read | None = None) -> None:
        self._read = read
        self._tensors: dict[str, Any] = {}
        readers = [GGUFReader(shard) for shard in shards(path)]
        for reader in readers:
            self._tensors |= {tensor.name: tensor for tensor in reader.tensors if tensor.name in _NAMES}
        name = "output.weight" if "output.weight" in self._tensors else "token_embd.weight"
        if name not in self._tensors:
            raise ModelError(f"{path} has no output matrix in this file; logits cannot be computed from pre-logits")
        self._matrix = self._tensors[name]
        self.d, self.n_vocab = (int(size) for size in self._matrix.shape)
        self._weights: dict[str, Any] = {}
        self._taken: tuple[FloatArray, npt.NDArray[np.bool_]] | None = None  # rows, and which of them are known
        fields = readers[0].fields
        architecture = str(fields["general.architecture"].contents())

        def number(key: str, default: float) -> float:
            field = fields.get(f"{architecture}.{key}")
            return float(field.contents()) if field else default

        # Defaults, and who divides, are as in llama.cpp's model files.
        caps = {"gemma2": 30.0, "gemma3n": 30.0, "gemma4": 30.0, "muse-glimmer": 30.0}
        scales = {"grok": 3**-0.5, "minicpm": 256 / self.d}
        self.softcap = number("final_logit_softcapping", caps.get(architecture, 0.0))
        if architecture == "gemma3n":
            self.softcap = 30.0  # it does not read the key
        scale = number("logit_scale", scales.get(architecture, 0.0)) or 1.0
        self.scale = 1 / scale if architecture.startswith("granite") or architecture == "minicpm" else scale
        self.matrix_scale = float(self._values("output.scale")[0]) if "output.scale" in self._tensors else 1.0
        self.gain = self.scale * self.matrix_scale
        biased = "output.bias" in self._tensors and architecture != "qwen2vl"  # llama.cpp reads it and leaves it out
        self.bias = self._values("output.bias") if biased else None

    def _values(self, name: str) -> FloatArray:
        tensor = self._tensors[name]
        return np.asarray(dequantize(tensor.data, tensor.tensor_type), np.float32)

    def rows(self, start: int = 0, stop: int | None = None) -> FloatArray:
        """Rows ``start`` to ``stop`` (default: to the end) of W as float32, [stop - start, d]."""
        start, stop, _ = slice(start, stop).indices(self.n_vocab)
        if start >= stop:
            return np.zeros((0, self.d), np.float32)
        found = self._read(start, stop) if self._read else None
        if found is not None:
            return found
        part = np.asarray(self._matrix.data[start:stop])
        return np.asarray(dequantize(part, self._matrix.tensor_type), np.float32)

    def take(self, tokens: npt.NDArray[np.integer[Any]]) -> FloatArray:
        """Rows of W as float32 [k, d]: only these are dequantised, and kept for the next time."""
        if "numpy" in self._weights:
            return np.asarray(self.weight[tokens])
        if self._taken is None:
            # Memory that is never touched is never taken.
            self._taken = np.empty((self.n_vocab, self.d), np.float32), np.zeros(self.n_vocab, np.bool_)
        rows, known = self._taken
        new = np.unique(tokens[~known[tokens]])
        if len(new):
            rows[new] = dequantize(np.asarray(self._matrix.data[new]), self._matrix.tensor_type)
            known[new] = True
        return np.asarray(rows[tokens])

    @property
    def weight(self) -> FloatArray:
        """W [V, d] as float32, dequantised at first use (V * d * 4 bytes)."""
        if "numpy" not in self._weights:
            self._weights["numpy"] = self.rows()
        return self._weights["numpy"]  # type: ignore[no-any-return]

    def project(self, prelogits: ArrayOrTensor) -> ArrayOrTensor:
        """Base logits [..., V] of pre-logits [..., d], float32.

        A torch tensor gives a torch tensor on its own device; gradients flow through it.
        """
        z: Any = prelogits
        torch = sys.modules.get("torch")
        if torch is not None and isinstance(z, torch.Tensor):
            return self._logits(torch, z, *self._on(torch, z.device))  # type: ignore[no-any-return]
        return self._logits(np, z, self.weight, self.bias)  # type: ignore[no-any-return]

    def logits(self, prelogits: FloatArray) -> FloatArray:
        """``project`` for numpy alone."""
        return self.project(prelogits)

    def project_first(self, prelogits: FloatArray, m: int = 256) -> FloatArray:
        """The first ``m`` logits [..., m] of pre-logits [..., d], without the rest of W."""
        bias = None if self.bias is None else self.bias[:m]
        return np.asarray(self._logits(np, prelogits, self.rows(0, m), bias), np.float32)

    def _logits(self, library: Any, z: Any, weight: Any, bias: Any) -> Any:
        logits = z @ weight.T
        if self.matrix_scale != 1.0:
            logits = logits * self.matrix_scale
        if bias is not None:
            logits = logits + bias
        if self.scale != 1.0:
            logits = logits * self.scale
        if self.softcap:
            logits = library.tanh(logits / self.softcap) * self.softcap
        return logits

    def _on(self, torch: Any, device: Any) -> tuple[Any, Any]:
        """W and b as tensors on the device, kept for the next call."""
        key = str(device)
        if key not in self._weights:

            def tensor(values: FloatArray) -> Any:  # torch takes no memory that may not be written: a mapped F32 file
                return torch.from_numpy(np.require(values, requirements="W")).to(device)

            bias = None if self.bias is None else tensor(self.bias)
            self._weights[key] = tensor(self.weight), bias
        return self._weights[key]  # type: ignore[no-any-return]


def has_tensor(path: Path, name: str) -> bool:
    """Whether a model's files hold a tensor of that name."""
    return any(tensor.name == name for shard in shards(path) for tensor in GGUFReader(shard).tensors)


def shards(path: Path) -> list[Path]:
    """The files of a model of which this is the first, in order. Raises ModelError when one is missing."""
    match = _SHARD.fullmatch(path.name)
    if not match:
        return [path]
    stem, count = match[1], int(match[2])
    files = [path.with_name(f"{stem}-{i:05d}-of-{count:05d}.gguf") for i in range(1, count + 1)]
    for file in files:
        if not file.is_file():
            raise ModelError(f"{path} is one of {count} files and {file} is missing; put them all into one folder")
    return files


def adapts_head(model: Path, adapter: Path) -> bool:
    """Whether a LoRA adapter changes the output matrix of a model, which may be its embedding matrix."""
    names = {"output.weight.lora_a"}
    if not has_tensor(model, "output.weight"):
        names.add("token_embd.weight.lora_a")
    return any(has_tensor(adapter, name) for name in names)


def fingerprint(path: Path, adapters: Sequence[tuple[Path, float]] = ()) -> str:
    """A hash of a model's files, all its shards: of their sizes and samples from all over them; and of its adapters.

    Reading all of a large model would take longer than a search.
    """
    digest = hashlib.sha256()
    for shard in shards(path):
        size = shard.stat().st_size
        digest.update(size.to_bytes(8, "little"))
        with shard.open("rb") as file:
            for i in range(_SAMPLES):
                file.seek(max(0, size - _SAMPLE_BYTES) * i // (_SAMPLES - 1))
                digest.update(file.read(_SAMPLE_BYTES))
    for adapter, scale in adapters:
        digest.update(f"{fingerprint(adapter)} {scale!r}".encode())
    return digest.hexdigest()
