"""``llama_cpp.Llama``'s interface, with aligned answers."""

from aisp_local.llama.aligned import AlignedLlama

__all__ = ["AlignedLlama"]
