"""Which integers a processor multiplies fastest: what to write for it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

Precision = Literal["int8", "float16"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """How int8 files are written for one kind of processor; after onnxruntime's own recommendations.

    Attributes:
        words: What it is, for a person.
        activations: Type of the activations. Weights are int8 and symmetric everywhere, one scale a channel.
        symmetric: Whether the activations' zero is 0 (or, for uint8, wherever their range has it).
        reduce_range: Whether weights take 7 bits only: without VNNI, x86 adds up pairs of products in 16 bits, which
            8-bit weights overflow.
        int32_bias: Whether biases become integers as well.
    """

    words: str
    activations: Literal["uint8", "int8"]
    symmetric: bool = False
    reduce_range: bool = False
    int32_bias: bool = True


TARGETS: Mapping[str, Target] = {
    "x86": Target(words="any x86 processor: 7-bit weights", activations="uint8", reduce_range=True),
    "x86-vnni": Target(words="x86 with VNNI (Intel from Cascade Lake, AMD from Zen 4)", activations="uint8"),
    "arm": Target(words="ARM: all symmetric", activations="int8", symmetric=True),
    "gpu": Target(
        words="CUDA and TensorRT: all symmetric, float biases", activations="int8", symmetric=True, int32_bias=False
    ),
}

DEFAULT_TARGET: Mapping[Precision, str] = {"int8": "x86", "float16": "gpu"}
"""What is written for where nothing is said: int8 that is right on every x86 processor, float16 where it is a gain."""
