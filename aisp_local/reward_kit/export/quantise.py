"""Weights of a graph in fewer bits. Activations stay float32, so that a score cannot depend on the rest of its batch.

fp16   float16 in the file; ONNX Runtime turns it back into float32 when it loads the file.
int8   one scale per output channel (per row of an embedding table); likewise, but for the tables: their rows are
       scaled after they were looked up. Weights that were in int8 before they were trained keep what they learned.
int4   blocks of 32 inputs with one scale each, multiplied as they are by MatMulNBits; embedding tables in int8.

Matrices of the layers and embedding tables are what takes the room; norms, biases and the head keep their float32.
"""

from __future__ import annotations

import zlib
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

Precision = Literal["fp32", "fp16", "int8", "int4"]
PRECISIONS: tuple[Precision, ...] = ("fp32", "fp16", "int8", "int4")
_BLOCK = 32
# Mean squared distance to the nearest int8 value, in steps: 1/12 where weights lie anywhere, less where they crowd.
_CROWDED = 0.9 / 12
_ON_IT = 1e-4
_SMALLEST = 16  # a matrix with fewer rows or columns is a head or a table of token types
Array = npt.NDArray[Any]


def int8_rows(rows: Array) -> tuple[Array, Array]:
    """int8 values and float32 scales [n, 1] of a matrix [n, m]: symmetric, one scale a row.

    Weights that were read from int8 and trained lie less than half a step from their old values, and rounding to the
    nearest would undo the training. They are rounded up or down at random, so that on average every weight stays where
    it is; the random numbers follow from the weights.
    """
    scales = np.maximum(np.abs(rows).max(axis=1, keepdims=True), 1e-12) / 127.0
    steps = np.asarray(rows / scales, np.float32)
    nearest = np.rint(steps)
    if float(np.mean((steps - nearest) ** 2)) < _CROWDED:
        rng = np.random.default_rng(zlib.crc32(np.ascontiguousarray(rows).data))
        # Short of 0 and 1: what lies on a value, but for float32's own rounding, keeps it.
        nearest = np.floor(steps + (_ON_IT + (1 - 2 * _ON_IT) * rng.random(steps.shape, np.float32)))
    return np.clip(nearest, -127, 127).astype(np.int8), scales.astype(np.float32)


def int4_blocks(rows: Array) -> tuple[Array, Array]:
    """Packed values uint8 [n, blocks, 16] and float32 scales [n, blocks] of a matrix [n, m], as MatMulNBits has them.

    A value is ``(nibble - 8) * scale``, the first of two in the low nibble; the last block is filled up with zeros.
    """
    n, m = rows.shape
    count = -(-m // _BLOCK)
    blocks = np.zeros((n, count * _BLOCK), np.float32)
    blocks[:, :m] = rows
    blocks = blocks.reshape(n, count, _BLOCK)
    peak = np.take_along_axis(blocks, np.abs(blocks).argmax(axis=2)[..., None], axis=2)
    best = np.full((n, count, 1), np.inf, np.float32)
    values, scales = np.zeros_like(blocks), np.zeros_like(peak)
    # The greatest value becomes -8; a somewhat smaller scale costs it a little and serves the others better.
    for shrink in (1.0, 0.95, 0.9, 0.85):
        scale = np.where(peak == 0, np.float32(1), peak * np.float32(shrink) / -8)
        rounded = np.clip(np.rint(blocks / scale), -8, 7)
        error = ((rounded * scale - blocks) ** 2).sum(axis=2, keepdims=True)
        better = error < best
        best = np.where(better, error, best)
        values, scales = np.where(better, rounded, values), np.where(better, scale, scales)
    nibbles = (values + 8).astype(np.uint8)
    return nibbles[..., 0::2] | (nibbles[..., 1::2] << 4), scales[..., 0]


def rewrite(model: Any, precision: Precision) -> None:
    """Give an onnx_ir model weights of that precision, in place."""
    if precision == "fp32":
        return
    graph = _Graph(model)
    for node in list(model.graph):
        if node.op_type == "MatMul" and (weight := graph.matrix(node.inputs[1])) is not None:
            graph.linear(node, weight, precision)
        elif node.op_type == "Gather" and (table := graph.table(node)) is not None:
            graph.embedding(node, table, precision)
    graph.drop_unused()


class _Graph:
    """Edits of an onnx_ir graph."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.count = 0
        self.stored: dict[
            tuple[str, str], tuple[Any, ...]
        ] = {}  # (tensor, form) -> its constants: used twice, kept once

    def matrix(self, value: Any) -> tuple[str, Any, bool] | None:
        """(name, tensor, whether it lies transposed) of a constant matrix [in, out]; None for anything else."""
        node = value.producer()
        turned = node is not None and node.op_type == "Transpose"
        if turned:
            value = node.inputs[0]
        tensor = value.const_value if value.producer() is None else None
        if tensor is None or len(tensor.shape) != 2 or min(tensor.shape) < _SMALLEST:
            return None
        return value.name, tensor, turned

    def table(self, node: Any) -> tuple[str, Any] | None:
        """(name, tensor) of an embedding table whose rows the node takes."""
        axis = node.attributes.get("axis")
        found = self.matrix(node.inputs[0]) if axis is None or axis.as_int() == 0 else None
        return None if found is None or found[2] else found[:2]

    def linear(self, node: Any, weight: tuple[str, Any, bool], precision: Precision) -> None:
        """Replace the MatMul by one whose weights are stored in that precision."""
        name, tensor, turned = weight

        def columns() -> Array:  # [out, in]
            values: Array = tensor.numpy()
            return np.asarray(values if turned else values.T, np.float32)

        if precision == "int4":
            packed, scales = self._kept(name, "int4", lambda: int4_blocks(columns()))
            shape = tensor.shape if not turned else tuple(reversed(tensor.shape))
            attributes = {"K": int(shape[0]), "N": int(shape[1]), "bits": 4, "block_size": _BLOCK, "accuracy_level": 1}
            product = self._op(
                node, "MatMulNBits", [node.inputs[0], packed, scales], attributes, domain="com.microsoft"
            )
            self._replace(node, product)
            return
        if precision == "int8":

            def form() -> tuple[Array, Array]:
                stored, scales = int8_rows(columns())
                return stored.T, scales.T

            stored, scales = self._kept(name, "int8", form)
            whole = self._op(node, "Mul", [self._float(node, stored), scales])
        else:
            (half,) = self._kept(name, "fp16", lambda: (columns().T.astype(np.float16),))
            whole = self._float(node, half)
        node.replace_input_with(1, whole)

    def embedding(self, node: Any, table: tuple[str, Any], precision: Precision) -> None:
        """Replace the Gather by one of rows in int8 (float16) that are scaled (cast) afterwards."""
        name, tensor = table
        ids = node.inputs[1]
        if precision == "fp16":
            (half,) = self._kept(name, "fp16 table", lambda: (tensor.numpy().astype(np.float16),))
            self._replace(node, self._float(node, self._op(node, "Gather", [half, ids])))
            return
        stored, scales = self._kept(name, "int8 table", lambda: int8_rows(tensor.numpy()))
        rows = self._float(node, self._op(node, "Gather", [stored, ids]))
        self._replace(node, self._op(node, "Mul", [rows, self._op(node, "Gather", [scales, ids])]))

    def drop_unused(self) -> None:
        from onnx_ir.passes.common import RemoveUnusedNodesPass

        RemoveUnusedNodesPass()(self.model)
        if any(node.domain == "com.microsoft" for node in self.model.graph):
            self.model.opset_imports["com.microsoft"] = 1

    def _kept(self, name: str, form: str, make: Any) -> tuple[Any, ...]:
        import onnx_ir as ir

        if (name, form) not in self.stored:
            values = []
            for i, array in enumerate(make()):
                constant = ir.tensor(np.ascontiguousarray(array), name=f"{name}.{form.split()[0]}.{i}")
                value = ir.Value(
                    name=constant.name, const_value=constant, shape=constant.shape, type=ir.TensorType(constant.dtype)
                )
                self.model.graph.register_initializer(value)
                values.append(value)
            self.stored[name, form] = tuple(values)
        return self.stored[name, form]

    def _op(
        self, before: Any, kind: str, inputs: list[Any], attributes: dict[str, int] | None = None, domain: str = ""
    ) -> Any:
        """The value of a new node in front of ``before``."""
        import onnx_ir as ir

        self.count += 1
        node = ir.node(kind, inputs, attributes or {}, domain=domain, name=f"aisp_{kind}_{self.count}")
        node.outputs[0].name = f"aisp_{self.count}"
        self.model.graph.insert_before(before, [node])
        return node.outputs[0]

    def _float(self, before: Any, value: Any) -> Any:
        import onnx_ir as ir

        return self._op(before, "Cast", [value], {"to": int(ir.DataType.FLOAT)})

    def _replace(self, node: Any, value: Any) -> None:
        """Let whatever read the node's result read this one."""
        import onnx_ir as ir

        old = node.outputs[0]
        ir.convenience.replace_all_uses_with(old, value, replace_graph_outputs=True)
        self.model.graph.remove(node, safe=True)
        value.name = old.name
