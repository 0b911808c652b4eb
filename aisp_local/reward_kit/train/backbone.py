"""The network that training begins with: a Hugging Face folder, a GGUF file, or the weights of a reward folder."""

from __future__ import annotations

import contextlib
import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from aisp_local.errors import InputError, RewardError
from aisp_local.reward_kit.export.network import TURNED
from aisp_local.reward_kit.export.quiet import quiet
from aisp_local.reward_kit.export.source import DECODERS, ENCODERS, SUFFIX
from aisp_local.reward_kit.export.write import CONFIGS
from aisp_local.rewards.manifest import MANIFEST, check_files, inside, read_manifest

_INITIAL = 0.02  # standard deviation of a new head's weights


@dataclass(frozen=True)
class Backbone:
    """A model of transformers with one output, and its tokenizer."""

    model: Any
    tokenizer: Any
    name: str
    licence: str

    @property
    def body(self) -> Any:
        """All but what turns the last layer into a score."""
        return getattr(self.model, self.model.base_model_prefix)

    @property
    def decoder(self) -> bool:
        """Whether the score is read at the last token."""
        return type(self.model).__name__.removesuffix(SUFFIX) in DECODERS

    def head(self) -> list[Any]:
        """Parameters of what comes after the last layer."""
        pooler = getattr(self.body, "pooler", None)
        pooling = {id(p) for p in pooler.parameters()} if pooler is not None else set()
        below = {id(p) for p in self.body.parameters()} - pooling
        return [p for p in self.model.parameters() if id(p) not in below]

    def layers(self) -> Any:
        """The layers, lowest first."""
        import torch

        lists = [module for module in self.body.modules() if isinstance(module, torch.nn.ModuleList)]
        return max(lists, key=len, default=[])


def load(path: Path, *, new_head: bool = True, random_weights: bool = False, seed: int = 0) -> Backbone:
    """Read a backbone. ``new_head``: its last matrix is drawn anew; ``random_weights``: all are. Raises RewardError.

    Only weights in safetensors, GGUF or ONNX are read, and no code that comes with a model is run.
    """
    if not path.exists():
        raise RewardError(
            f"the backbone {path} does not exist; give a Hugging Face folder, a GGUF file or a reward folder"
        )
    with quiet():
        import torch

        torch.manual_seed(seed)
        try:
            if path.is_file():
                found = _gguf(path)
            elif (path / MANIFEST).is_file():
                found = _reward(path)
            else:
                found = _folder(path)
        except InputError:
            raise
        except Exception as error:  # transformers', safetensors' and torch's kinds
            reason = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
            raise RewardError(f"the backbone {path} cannot be read ({reason}); restore it, or give another") from error
        name = type(found.model).__name__
        if name.removesuffix(SUFFIX) not in ENCODERS + DECODERS:
            raise RewardError(
                f"the backbone {path} is a {name}; one of {', '.join(ENCODERS + DECODERS)} can become a reward"
            )
        if random_weights:
            found = Backbone(type(found.model)(found.model.config), found.tokenizer, found.name, found.licence)
        elif new_head:
            for parameter in _outputs(found.model).parameters():
                torch.nn.init.normal_(parameter, std=_INITIAL if parameter.ndim > 1 else 0.0)
    if getattr(found.tokenizer, "backend_tokenizer", None) is None:
        raise RewardError(f"the tokenizer of {path} has no tokenizer.json and cannot be made into one")
    return found


def _outputs(model: Any) -> Any:
    """The last matrix: what a task trains from nothing."""
    head = getattr(model, "classifier", None) or model.score
    return getattr(head, "out_proj", head)


def _folder(path: Path) -> Backbone:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    from aisp_local.reward_kit.export.source import licence_of

    if not (path / CONFIGS[0]).is_file():
        raise RewardError(f"{path} holds no {CONFIGS[0]}; give a folder as save_pretrained of transformers writes it")
    model = AutoModelForSequenceClassification.from_pretrained(
        path, num_labels=1, ignore_mismatched_sizes=True, local_files_only=True, use_safetensors=True, dtype="float32"
    )
    tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
    return Backbone(model, tokenizer, path.resolve().name, licence_of(path))


def _gguf(path: Path) -> Backbone:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    where = {"gguf_file": path.name, "local_files_only": True}
    with contextlib.redirect_stderr(io.StringIO()):  # a progress bar
        read = AutoModelForSequenceClassification.from_pretrained(path.parent, num_labels=1, dtype="float32", **where)
    config = read.config
    del config.quantization_config  # its numbers are whole now, but it would not be written as a whole model
    model = type(read)(config)
    model.load_state_dict(read.state_dict())
    tokenizer = AutoTokenizer.from_pretrained(path.parent, **where)
    return Backbone(model, tokenizer, path.stem, "unknown")


def _reward(path: Path) -> Backbone:
    """The network that a reward folder was exported from, by the names and the numbers in its ONNX file."""
    import torch
    from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

    manifest = read_manifest(path)
    check_files(path, manifest)
    if not set(CONFIGS) <= set(manifest.files):
        raise RewardError(
            f"the reward {path} holds no {' and '.join(CONFIGS)}, so it cannot be trained further; give another "
            "backbone"
        )
    config = AutoConfig.from_pretrained(path, local_files_only=True)
    model = AutoModelForSequenceClassification.from_config(config, dtype=torch.float32)
    stored, state = _weights(inside(path, manifest.model)), model.state_dict()
    lacking = [name for name, t in state.items() if name not in stored or stored[name].shape != tuple(t.shape)]
    if lacking:
        raise RewardError(
            f"{path}: {manifest.model} lacks {lacking[0]}; give a reward that was exported in fp32 or int8, or another "
            "backbone"
        )
    model.load_state_dict({name: torch.from_numpy(np.array(stored[name])) for name in state})
    tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
    if manifest.template is not None:
        tokenizer.chat_template = manifest.template
    return Backbone(model, tokenizer, manifest.name, manifest.licence)


def _weights(path: Path) -> dict[str, Any]:
    """float32 arrays of an ONNX file that was exported in fp32 or int8, by the names and in the shapes of PyTorch."""
    import onnx
    from onnx import numpy_helper

    stored = {t.name.removeprefix("model."): numpy_helper.to_array(t) for t in onnx.load(path).graph.initializer}
    whole: dict[str, Any] = {}
    for name, values in stored.items():
        if name.endswith(".int8.0"):
            # A matrix lies [in, out] beside scales [1, out], a table [rows, width] beside [rows, 1].
            scales = stored[name[:-1] + "1"]
            product = values.astype(np.float32) * scales
            name = name.removesuffix(".int8.0").removesuffix(TURNED)
            whole[name] = product if scales.shape[1] == 1 else product.T
        elif values.dtype == np.float32:
            turned = name.endswith(TURNED)
            whole[name.removesuffix(TURNED)] = values.T if turned else values
    return whole
