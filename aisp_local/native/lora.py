"""LoRA adapters in GGUF files: loaded with a model, added to its weights in every context."""

from __future__ import annotations

import ctypes
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aisp_local.errors import InputError, ModelError
from aisp_local.interrupts import Uninterrupted
from aisp_local.native.binding import binding, clear_log, first_log


@dataclass(frozen=True)
class Lora:
    """An adapter's file, and what its products are multiplied with beyond its own ``alpha / rank``."""

    path: Path
    scale: float = 1.0

    @classmethod
    def of(cls, value: str | os.PathLike[str] | Lora) -> Lora:
        return value if isinstance(value, Lora) else cls(Path(value))

    def check(self) -> None:
        """Refuse what cannot be an adapter before llama.cpp sees it. Raises ModelError, InputError."""
        if not math.isfinite(self.scale):
            raise InputError(f"the scale of {self.path} is {self.scale}; it must be a number")
        try:
            with self.path.open("rb") as file:
                magic = file.read(4)
        except OSError as error:
            raise ModelError(
                f"LoRA adapter {self.path} cannot be read ({error.strerror}); check the path given with --lora"
            ) from error
        if magic != b"GGUF":
            raise ModelError(f"{self.path} is not a GGUF file; convert the adapter with convert_lora_to_gguf.py first")


def load(model: Any, lora: Lora) -> Any:
    """The adapter of a loaded model, which frees it. Raises ModelError."""
    llama = binding()
    clear_log()
    with Uninterrupted():
        adapter = llama.llama_adapter_lora_init(model, os.fsencode(lora.path))
    if not adapter:
        raise ModelError(
            f"{lora.path} cannot be loaded as a LoRA adapter of this model ({first_log() or 'no reason given'}); "
            "it must be made for exactly this model"
        )
    if llama.llama_adapter_get_alora_n_invocation_tokens(adapter):
        raise ModelError(f"{lora.path} works only after certain tokens (aLoRA); use an adapter without them")
    return adapter


def apply(context: Any, adapters: list[tuple[Any, float]]) -> int:
    """Add them to the weights of a context. llama.cpp's code: 0 is success."""
    llama, n = binding(), len(adapters)
    pointers = (llama.llama_adapter_lora_p_ctypes * n)(*(adapter for adapter, _ in adapters))
    scales = (ctypes.c_float * n)(*(scale for _, scale in adapters))
    return int(llama.llama_set_adapters_lora(context, pointers, n, scales))
