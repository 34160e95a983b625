"""What the file says about itself: string pairs under one prefix, and nothing about the machine that wrote it."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence

import torch

from robustcompress.export.ends import Ends
from robustcompress.robust import ThreatModel

PREFIX = "robustcompress."

FACTS = frozenset(
    (
        *("version", "classes", "image_shape", "input_range", "input_type", "layout", "normalisation", "threat"),
        *("output", "resize", "precision", "torch", "onnx"),
    )
)
"""Keys that the export itself writes; whatever a result says under them is replaced by what is true of this file."""

_LOCAL_PATH = re.compile(r"""(?<![\w:/.~-])(?:~|[A-Za-z]:)?(?:[/\\]+[^/\\\s"',;]+){2,}[/\\]*""")
_WHOLLY_PATH = re.compile(r"(?:~|[A-Za-z]:)?[/\\].*")


def file_metadata(
    *,
    image_shape: tuple[int, int, int],
    classes: Sequence[str] | None,
    threat: ThreatModel | None,
    told: Mapping[str, str],
    ends: Ends | None = None,
) -> dict[str, str]:
    """Put together every key and value of one file, in a fixed order.

    Args:
        image_shape: (C, H, W).
        classes: Class names in the order of the logits, or None.
        threat: What the model was made to withstand, or None.
        told: What the caller and the result add; keys get the prefix when they lack it. Paths of this machine are cut
            down to their last part.
        ends: What stands around the network; nothing where None.

    Returns:
        Keys `robustcompress.*`, sorted. Lists and objects are JSON.
    """
    import onnx

    import robustcompress  # not above: the package itself imports this module first

    facts = {
        "version": robustcompress.__version__,
        "image_shape": json.dumps(list(image_shape)),
        **(ends or Ends()).facts(),
        "precision": "float32",
        "normalisation": "inside the graph",
        "torch": torch.__version__,
        "onnx": onnx.__version__,
    }
    if classes is not None:
        facts["classes"] = json.dumps(list(classes), ensure_ascii=False)
    if threat is not None:
        facts["threat"] = json.dumps({"label": threat.label(), **threat.to_json()})
    pairs = {key.removeprefix(PREFIX): without_paths(value) for key, value in told.items()} | facts
    return {PREFIX + key: pairs[key] for key in sorted(pairs)}


def without_paths(text: str) -> str:
    """Cut absolute paths, which may hold a user's name, down to their last part."""
    if _WHOLLY_PATH.fullmatch(text):  # directories may have spaces
        return _last_part(text)
    return _LOCAL_PATH.sub(lambda match: _last_part(match[0]), text)


def _last_part(path: str) -> str:
    return re.split(r"[/\\]", path.rstrip("/\\"))[-1]
