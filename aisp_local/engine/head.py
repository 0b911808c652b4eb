"""The output head on the host: base logits from pre-logits, for what needs a second output product."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from gguf import GGUFReader
from gguf.quants import dequantize

from aisp_local.errors import ModelError
from aisp_local.types import FloatArray


class OutputHead:
    """``logits = softcap(scale * (z W^T) + b)`` with W [V, d] dequantised from the GGUF as float32."""

    def __init__(self, path: Path) -> None:
        reader = GGUFReader(path)
        tensors = {tensor.name: tensor for tensor in reader.tensors}
        matrix = tensors.get("output.weight", tensors.get("token_embd.weight"))
        if matrix is None:
            raise ModelError(f"{path} has no output matrix in this file; KL cannot be computed")
        self.weight: FloatArray = dequantize(matrix.data, matrix.tensor_type).astype(np.float32, copy=False)
        bias = tensors.get("output.bias")
        self.bias = None if bias is None else dequantize(bias.data, bias.tensor_type)
        architecture = str(reader.fields["general.architecture"].contents())

        def number(key: str) -> float:
            field = reader.fields.get(f"{architecture}.{key}")
            return float(field.contents()) if field else 0.0

        self.softcap = number("final_logit_softcapping")
        scale = number("logit_scale")
        # Granite divides by its logit scale; the other architectures multiply.
        self.scale = (1 / scale if architecture.startswith("granite") else scale) if scale else 1.0

    def project(self, prelogits: FloatArray) -> FloatArray:
        """Base logits [k, V] of pre-logits [k, d]."""
        logits = prelogits @ self.weight.T
        if self.scale != 1.0:
            logits *= self.scale
        if self.bias is not None:
            logits += self.bias
        if self.softcap:
            logits = np.tanh(logits / self.softcap) * self.softcap
        return np.asarray(logits, np.float32)
