"""What an export wrote and how closely it was checked: plain data, a table, JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class ParityCheck:
    """onnxruntime against torch on the same images.

    Attributes:
        name: Which images: "clean", "adversarial", or "random" where the caller gave none.
        batch: Images in each call of the file.
        images: How many different images were compared.
        max_abs_diff: Largest difference between two logits.
        scale: Largest absolute logit of the torch model: what the difference is measured against.
        argmax_agreement: Share of images that get the same class, in [0, 1]. Classes whose torch logits lie within
            rounding of each other count as the same.
    """

    name: str
    batch: int
    images: int
    max_abs_diff: float
    scale: float
    argmax_agreement: float

    @property
    def relative_diff(self) -> float:
        """`max_abs_diff` as a share of `scale`."""
        return self.max_abs_diff / self.scale

    def to_json(self) -> dict[str, Any]:
        """The check as plain JSON."""
        return {**asdict(self), "relative_diff": self.relative_diff}


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportReport:
    """One ONNX file, written and verified.

    Attributes:
        path: The file.
        data: The second file, which holds its weights, where it has one.
        bytes: Its size; of both files together.
        compressed_bytes: Its size after zlib, as a download or an archive of it would be.
        zeros: Share of zeros among the entries of its weight matrices and kernels.
        opset: The operator set that it really has, as read back.
        batch: "dynamic", or the one batch size that it accepts.
        parity: What was compared; empty when verification was switched off.
        metadata: Every key and value stored in the file.
    """

    path: Path
    bytes: int
    compressed_bytes: int
    zeros: float
    opset: int
    batch: str
    parity: tuple[ParityCheck, ...]
    metadata: Mapping[str, str]
    data: tuple[Path, ...] = ()

    def __str__(self) -> str:
        head = f"{self.path}  {_size(self.bytes)}, opset {self.opset}, batch {self.batch}"
        if self.signature:
            head += f"\n{self.signature}"
        if self.data:
            head += f"\nits weights are in {', '.join(file.name for file in self.data)}: keep both files together"
        if self.zeros > 0.01:
            head += (
                f"\n{100 * self.zeros:.1f} % of the weights are zeros: {_size(self.compressed_bytes)} compressed; "
                "onnxruntime computes with zeros as with any number, so they save no time"
            )
        if not self.parity:
            return f"{head}\nnot verified against torch (verify=False)"
        width = max(12, *(len(check.name) for check in self.parity))
        lines = [
            head,
            f"{'images':<{width}} {'batch':>5} {'n':>4} {'max |difference|':>17} {'relative':>9} {'same class':>11}",
        ]
        lines += [
            f"{c.name:<{width}} {c.batch:>5} {c.images:>4} {c.max_abs_diff:>17.2e} {c.relative_diff:>9.1e} "
            f"{100 * c.argmax_agreement:>9.2f} %"
            for c in self.parity
        ]
        return "\n".join(lines)

    @property
    def signature(self) -> str:
        """What goes in and what comes out, in one line; empty where the metadata do not say."""
        said = {key.rpartition(".")[2]: value for key, value in self.metadata.items()}
        if "image_shape" not in said:
            return ""
        channels, height, width = json.loads(said["image_shape"])
        resizes = said["resize"] != "none"
        sides = "H, W" if resizes else f"{height}, {width}"
        shape = f"{channels}, {sides}" if said["layout"] == "NCHW" else f"{sides}, {channels}"
        line = f"images: {said['input_type']} [batch, {shape}] in {said['input_range']} -> {said['output']}"
        return f"{line}; any size, resized to {height}x{width} inside ({said['resize']})" if resizes else line

    def to_json(self) -> dict[str, Any]:
        """The report as plain JSON; the path as a string."""
        return {
            "path": str(self.path),
            "data": [str(file) for file in self.data],
            "bytes": self.bytes,
            "compressed_bytes": self.compressed_bytes,
            "zeros": self.zeros,
            "opset": self.opset,
            "batch": self.batch,
            "parity": [check.to_json() for check in self.parity],
            "metadata": dict(self.metadata),
        }


def _size(count: int) -> str:
    return f"{count / 1e6:.2f} MB" if count >= 1e6 else f"{count / 1e3:.1f} kB"
