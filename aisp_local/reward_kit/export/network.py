"""The PyTorch side: weights into transformers' own model, its scores as the reference, and its graph.

transformers pools a decoder at the last token that is not the padding id, which is the wrong one when that id stands
in the text or is the end-of-text id; and its encoders pool at the first column, which is padding when that is on the
left. The exported graph goes by the attention mask alone: rows are shifted to begin at their first token, so that
positions, causal and sliding masks and pooling are those of the row alone, whichever side it was padded on.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from aisp_local.errors import RewardError
from aisp_local.reward_kit.export.quiet import quiet
from aisp_local.reward_kit.export.source import Source

OUTPUT = "score"
# LayerNormalization needs 17 and Gelu 20, which ONNX Runtime fuses with the bias before it; it has known 20 since 1.17.
OPSET = 20
TURNED = ".T"
"""Ends the name of a weight that lies transposed in the graph."""


class Network:
    """A reward model in float32, in transformers."""

    def __init__(self, source: Source) -> None:
        """Raises RewardError when the folder's weights are not those of its architecture."""
        with quiet():
            import torch
            import transformers

            try:
                self.model, said = getattr(transformers, source.architecture).from_pretrained(
                    source.folder,
                    dtype=torch.float32,
                    local_files_only=True,
                    use_safetensors=True,
                    attn_implementation="eager",
                    output_loading_info=True,
                )
            except Exception as error:  # safetensors', transformers' and torch's kinds
                reason = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
                raise RewardError(f"{source.folder}: the weights cannot be read ({reason}); restore it") from error
        lacking = sorted(said["missing_keys"]) + sorted(str(entry[0]) for entry in said["mismatched_keys"])
        if lacking:
            raise RewardError(
                f"{source.folder}: its weights lack {lacking[0]} of {source.architecture}, which would be random; "
                "give a trained reward model"
            )
        self.model.eval()
        self.decoder = source.decoder
        if self.decoder:  # then transformers takes the last token of a single row, whatever its id
            self.model.config.pad_token_id = None

    @property
    def columns(self) -> int:
        """Outputs a row."""
        return int(self.model.config.num_labels)

    @property
    def labels(self) -> list[str]:
        """What the columns are called."""
        names = self.model.config.id2label
        return [str(names.get(i, i)) for i in range(self.columns)]

    def config(self) -> dict[str, Any]:
        """config.json of the architecture, without what is of this machine."""
        kept = self.model.config.to_diff_dict() | {"architectures": [type(self.model).__name__]}
        of_here = ("_name_or_path", "dtype", "transformers_version")
        return {key: value for key, value in kept.items() if key not in of_here}

    def scores(self, rows: Sequence[tuple[list[int], list[int]]], types: bool) -> npt.NDArray[np.float64]:
        """The model's own outputs [n, columns], each row alone and without padding."""
        import torch

        out = []
        with quiet(), torch.no_grad():
            for ids, kinds in rows:
                feed = {"input_ids": torch.tensor([ids]), "attention_mask": torch.ones((1, len(ids)), dtype=torch.long)}
                if types:
                    feed["token_type_ids"] = torch.tensor([kinds])
                out.append(self.model(**feed).logits[0].double().numpy())
        return np.stack(out)

    def graph(self, types: bool) -> Any:
        """The model as an onnx_ir graph: int64 inputs [n, L] to float32 ``score`` [n, columns], both axes free."""
        import torch

        names = ["input_ids", "attention_mask", *(["token_type_ids"] if types else [])]
        # Sizes that differ from each other and from 0 and 1, which the exporter would take for constants.
        # A tensor each: one given twice would be taken for one input.
        example = tuple(torch.ones((3, 11), dtype=torch.long) for _ in names)
        axes = {0: torch.export.Dim("n"), 1: torch.export.Dim("L")}
        with quiet(), torch.no_grad():
            program = torch.onnx.export(
                scorer(self.model, self.decoder).eval(),
                example,
                dynamo=True,
                dynamic_shapes=tuple(axes for _ in names),
                input_names=names,
                output_names=[OUTPUT],
                opset_version=OPSET,
                verbose=False,
            )
        assert program is not None
        _forget_origin(program.model)
        _name_weights(program.model, self.model)
        return program.model


def _forget_origin(model: Any) -> None:
    """Take out the notes of the exporter: stack traces of each node, with the paths of this machine."""
    model.metadata_props.clear()
    model.graph.metadata_props.clear()
    values = [*model.graph.inputs, *model.graph.initializers.values()]
    for node in model.graph:
        node.metadata_props.clear()
        node.doc_string = None
        values += node.outputs
    for value in values:
        value.metadata_props.clear()
        value.doc_string = None


def _name_weights(graph: Any, model: Any) -> None:
    """Give the weights that the exporter turned over, and named by number, the names that they have in PyTorch.

    A reward can then be trained further from its folder.
    """
    names = {}
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2:
            names[_digest(parameter.detach().numpy().T)] = f"model.{name}{TURNED}"
    for value in list(graph.graph.initializers.values()):
        tensor = value.const_value
        if tensor is not None and len(tensor.shape) == 2 and not value.name.startswith("model."):
            name = names.get(_digest(tensor.numpy()))
            if name is not None and name not in graph.graph.initializers:
                value.name = name


def _digest(array: Any) -> tuple[tuple[int, ...], bytes]:
    return array.shape, hashlib.sha256(np.ascontiguousarray(array).data).digest()


def scorer(model: Any, decoder: bool) -> Any:
    """The model as a module (input_ids, attention_mask[, token_type_ids]) -> scores [n, columns]."""
    import torch

    class Scorer(torch.nn.Module):  # type: ignore[misc, unused-ignore]
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, input_ids: Any, attention_mask: Any, token_type_ids: Any = None) -> Any:
            steps = torch.arange(input_ids.shape[1], device=input_ids.device)
            start = (attention_mask.cumsum(1) == 0).sum(1, keepdim=True)
            count = attention_mask.sum(1, keepdim=True)
            at = torch.minimum(steps[None] + start, steps[-1:])
            mask = (steps[None] < count).to(torch.long)
            feed = {"input_ids": input_ids.gather(1, at), "attention_mask": mask}
            if token_type_ids is not None:
                feed["token_type_ids"] = token_type_ids.gather(1, at)
            if not decoder:
                return self.model(**feed).logits
            body = getattr(self.model, self.model.base_model_prefix)
            hidden = body(**feed, use_cache=False).last_hidden_state
            last = (count - 1).clamp(min=0)[:, :, None].expand(-1, -1, hidden.shape[2])
            return self.model.score(hidden.gather(1, last)[:, 0])

    return Scorer()
