"""llama.cpp through llama-cpp-python: patched, or stock with a callback in its place."""

from aisp_local.native.binding import FallbackWarning, build, versions
from aisp_local.native.context import MAX_SEQUENCES, MAX_THREADS, Context
from aisp_local.native.control import ControlKind
from aisp_local.native.devices import Build, Device, describe_build
from aisp_local.native.grammar import Matcher
from aisp_local.native.header import Header, read_header
from aisp_local.native.lora import Lora
from aisp_local.native.model import Model, check_model_file
from aisp_local.native.sampling import can_sample_rows, sample_rows

__all__ = [
    "MAX_SEQUENCES",
    "MAX_THREADS",
    "Build",
    "Context",
    "ControlKind",
    "Device",
    "FallbackWarning",
    "Header",
    "Lora",
    "Matcher",
    "Model",
    "build",
    "can_sample_rows",
    "check_model_file",
    "describe_build",
    "read_header",
    "sample_rows",
    "versions",
]
