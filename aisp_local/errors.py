"""The exceptions that aisp-local raises.

AispError                     anything that goes wrong in aisp-local
├── InputError                what was asked for cannot be done: the message says what, where and what to do
│   ├── ModelError            a model file is missing, broken or of the wrong kind
│   ├── RewardError           a reward folder is missing, broken or does not match its manifest
│   └── CapacityError         a prompt or a number of rollouts does not fit
├── BindingError              llama-cpp-python is missing, too old, or lacks what was asked of it
├── DecodeError               llama.cpp failed while decoding
├── ExportError               an exported reward is not the model that it was made from
└── ScoreError                a reward failed, or gave no usable score
"""

from __future__ import annotations


class AispError(Exception):
    """Base class of every error of aisp-local."""


class InputError(AispError, ValueError):
    """What the caller asked for cannot be done."""


class ModelError(InputError):
    """A model file is missing, broken or of the wrong kind."""


class RewardError(InputError):
    """A reward folder is missing, broken or does not match its manifest."""


class CapacityError(InputError):
    """A prompt or a number of rollouts does not fit into the context or the memory."""


class BindingError(AispError):
    """llama-cpp-python is missing, too old, or lacks what was asked of it."""


class DecodeError(AispError):
    """llama.cpp failed while decoding."""


class ExportError(AispError):
    """An exported reward is not the model that it was made from."""


class ScoreError(AispError):
    """A reward failed, or gave no usable score."""
