"""What a compression leaves behind: a plain network, what it cost and gained, and how it came about."""

from __future__ import annotations

import contextlib
import hashlib
import html
import json
import math
import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from robustcompress.budget import Cost, human
from robustcompress.errors import InputError, ResultError
from robustcompress.models import ModelSpec
from robustcompress.robust import RobustReport, ThreatModel
from robustcompress.structure import Edit, StructuralEditor

FORMAT = 1
MAX_SIDE = 1 << 14
RESULT, WEIGHTS, HISTORY = "result.json", "model.safetensors", "history.jsonl"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class CompressResult:
    """A finished compression.

    Attributes:
        model: The compact network: a plain `nn.Module` in eval mode, on the CPU, images in [0, 1] to logits.
        spec: The factory of the reference; None when it is not known by name, and then `load` needs it.
        strategy: Name and options of the strategy.
        edits: What leads from the reference to the compact structure.
        before: What the reference costs.
        after: What the compact network costs.
        budget: The limits, as given.
        history: One record an epoch or an event.
        report: Accuracy, clean and under attack, on the test images; None when nothing was evaluated.
        threat: What it was trained to withstand.
        data: Name, hash, classes and sizes of the data.
        settings: Objective, training recipe, epochs, versions and hardware.
        seed: The seed.
    """

    model: nn.Module
    spec: ModelSpec | None
    strategy: Mapping[str, Any]
    edits: tuple[Edit, ...]
    before: Cost
    after: Cost
    budget: Mapping[str, float]
    history: tuple[Mapping[str, Any], ...]
    report: RobustReport | None
    threat: ThreatModel
    data: Mapping[str, Any]
    settings: Mapping[str, Any]
    seed: int

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names; logit `i` stands for `classes[i]`."""
        return tuple(self.data["classes"])

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of the images it was trained on."""
        channels, height, width = self.data["image_shape"]
        return int(channels), int(height), int(width)

    @property
    def meets_budget(self) -> bool:
        """Whether every limit is kept; always true for strategy "none", to which no budget applies."""
        limits = {
            "macs": self.before.macs * self.budget.get("macs", math.inf),
            "params": self.before.params * self.budget.get("params", math.inf),
            "max_macs": self.budget.get("max_macs", math.inf),
            "max_params": self.budget.get("max_params", math.inf),
        }
        return self.strategy["name"] == "none" or (
            self.after.macs <= min(limits["macs"], limits["max_macs"])
            and self.after.params <= min(limits["params"], limits["max_params"])
        )

    def save(self, directory: str | Path, *, overwrite: bool = False) -> Path:
        """Write the result to a directory: JSON, safetensors, no pickle.

        Everything is written beside the directory first and moved there at the end, so that it is whole or absent.

        Args:
            directory: Must not exist, unless `overwrite`; its parent must.
            overwrite: Replace a result that is there. Anything else is never replaced.

        Returns:
            The directory.

        Raises:
            InputError: The directory exists, its parent does not, or it cannot be written.
        """
        directory = Path(directory)
        check_target(directory, overwrite=overwrite)
        temporary = Path(tempfile.mkdtemp(prefix=f".{directory.name}-", dir=directory.parent))
        try:
            temporary.chmod(0o755)
            self._write(temporary)
            if directory.exists():
                shutil.rmtree(directory)
            temporary.replace(directory)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        return directory

    def _write(self, directory: Path) -> None:
        from safetensors.torch import save_file

        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in self.model.state_dict().items()}
        save_file(tensors, directory / WEIGHTS, metadata={"format": "pt"})
        (directory / WEIGHTS).chmod(0o644)
        record = self.to_json() | {"weights_sha256": _sha256(directory / WEIGHTS)}
        (directory / RESULT).write_text(json.dumps(record, indent=1, allow_nan=False) + "\n")
        lines = (json.dumps(record) + "\n" for record in self.history)
        (directory / HISTORY).write_text("".join(lines))

    def to_json(self) -> dict[str, Any]:
        """Everything but the weights and the history, as plain JSON."""
        return {
            "format": FORMAT,
            "model": self.spec.to_json() if self.spec else None,
            "strategy": dict(self.strategy),
            "budget": dict(self.budget),
            "before": self.before.to_json(),
            "after": self.after.to_json(),
            "threat": self.threat.to_json(),
            "report": self.report.to_json() if self.report else None,
            "data": dict(self.data),
            "settings": dict(self.settings),
            "seed": self.seed,
            "edits": [edit.to_json() for edit in self.edits],
        }

    def export_metadata(self) -> dict[str, str]:
        """What an exported file should say about itself, as string pairs."""
        metadata = {
            "classes": json.dumps(self.classes),
            "strategy": json.dumps(dict(self.strategy)),
            "threat": json.dumps(self.threat.to_json()),
            "cost_before": json.dumps(self.before.to_json()),
            "cost_after": json.dumps(self.after.to_json()),
            "data": json.dumps({k: self.data[k] for k in ("name", "sha256")}),
            "seed": str(self.seed),
        }
        if self.report is not None:
            rows = [
                {"attack": r.name, "accuracy": r.accuracy, "low": r.low, "high": r.high, "n": r.n, "suite": r.suite}
                for r in self.report.attacks
            ]
            metadata["accuracy"] = json.dumps(rows)
        return metadata

    def rows(self) -> list[tuple[str, str, str, str]]:
        """The costs as table rows: what, before, after, ratio."""
        before, after = self.before, self.after
        rows = [
            ("MACs", human(before.macs), human(after.macs), f"{after.macs / before.macs:.3f}"),
            ("parameters", human(before.params), human(after.params), f"{after.params / before.params:.3f}"),
            ("size", f"{human(before.size)}B", f"{human(after.size)}B", f"{after.size / before.size:.3f}"),
        ]
        if before.latency_ms and after.latency_ms:
            ratio = after.latency_ms / before.latency_ms
            rows.append(
                ("latency (torch, CPU)", f"{before.latency_ms:.2f} ms", f"{after.latency_ms:.2f} ms", f"{ratio:.3f}")
            )
        return rows

    def __str__(self) -> str:
        """Costs and accuracies, readable in a terminal."""
        name = self.spec.name if self.spec else type(self.model).__name__
        lines = [f"{name} compressed by {self.strategy['name']} on {self.data['name']} (seed {self.seed})", ""]
        lines.append(f"{'':22}{'before':>12}{'after':>12}{'ratio':>8}")
        lines += [f"{what:<22}{before:>12}{after:>12}{ratio:>8}" for what, before, after, ratio in self.rows()]
        if self.report is not None:
            lines += ["", str(self.report)]
        return "\n".join(lines)

    def __repr__(self) -> str:
        return str(self)

    def _repr_html_(self) -> str:
        head = "<tr><th></th><th>before</th><th>after</th><th>ratio</th></tr>"
        body = "".join(
            "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in self.rows()
        )
        title = html.escape(f"{self.strategy['name']} on {self.data['name']}")
        report = self.report._repr_html_() if self.report is not None else ""
        return f"<h4>{title}</h4><table>{head}{body}</table>{report}"


def check_target(directory: Path, *, overwrite: bool = False) -> None:
    """Raise one InputError when a result cannot be written to `directory`."""
    parent = directory.parent
    if not parent.is_dir():
        raise InputError(f"{directory}: there is no directory {parent}; create it first")
    if directory.exists() and not (overwrite and (directory / RESULT).is_file()):
        raise InputError(f"{directory} exists; choose another directory, or remove it first")
    try:
        with tempfile.TemporaryDirectory(dir=parent):
            pass
    except OSError as error:
        raise InputError(f"{parent} cannot be written to ({error.strerror}); choose another directory") from error


def load(
    directory: str | Path, *, model: nn.Module | Callable[[], nn.Module] | ModelSpec | str | None = None
) -> CompressResult:
    """Read a result back: the reference's factory, the edits, then the weights. No pickle is involved.

    Args:
        directory: What `CompressResult.save` wrote.
        model: The reference, or its factory, for a result whose reference is not a built-in or torchvision model.
            A factory named in the file is never imported on the file's word alone.

    Returns:
        The result; `.model` computes the same logits, bit for bit, as the one that was saved.

    Raises:
        ResultError: There is no result, or it is truncated, tampered with, or of a newer format.
    """
    directory = Path(directory)
    record = _read(directory)
    try:
        spec = ModelSpec.from_json(record["model"]) if record["model"] is not None else None
        fresh = _reference(directory, spec, model)
        shape = [int(size) for size in record["data"]["image_shape"]]
        if len(shape) != 3 or not all(1 <= size <= MAX_SIDE for size in shape):
            raise ValueError(f"image_shape {shape} is not [channels, height, width]")
        edits = tuple(Edit.from_json(edit) for edit in record["edits"])
        example = torch.zeros(2, *shape)
        with torch.random.fork_rng(devices=[]):
            StructuralEditor.replay(fresh, example, edits)
        _load_weights(directory, fresh)
        report = RobustReport.from_json(record["report"]) if record["report"] is not None else None
        return CompressResult(
            model=fresh.eval(),
            spec=spec,
            strategy=dict(record["strategy"]),
            edits=edits,
            before=Cost(**record["before"]),
            after=Cost(**record["after"]),
            budget=dict(record["budget"]),
            history=tuple(_history(directory)),
            report=report,
            threat=ThreatModel.from_json(record["threat"]),
            data=dict(record["data"]),
            settings=dict(record["settings"]),
            seed=int(record["seed"]),
        )
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, RuntimeError, ArithmeticError) as error:
        if isinstance(error, InputError) and "needs its reference model" in str(error):
            raise
        raise ResultError(f"{directory / RESULT} is damaged or was changed by hand: {error}") from error


def _read(directory: Path) -> dict[str, Any]:
    path = directory / RESULT
    if not path.is_file():
        raise ResultError(f"{directory} holds no result: there is no {RESULT}; was it written by `compress --out`?")
    try:
        record = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ResultError(f"{path} cannot be read: {error}") from error
    if not isinstance(record, dict) or not isinstance(record.get("format"), int):
        raise ResultError(f"{path} is not a robustcompress result")
    if record["format"] > FORMAT:
        raise ResultError(f"{path} has format {record['format']}; this version reads up to {FORMAT}: upgrade")
    weights = directory / WEIGHTS
    if not weights.is_file():
        raise ResultError(f"{directory} holds no {WEIGHTS}")
    if _sha256(weights) != record.get("weights_sha256"):
        raise ResultError(f"{weights} does not match {RESULT}: truncated, or not the file that was saved with it")
    return record


def _reference(
    directory: Path, spec: ModelSpec | None, model: nn.Module | Callable[[], nn.Module] | ModelSpec | str | None
) -> nn.Module:
    if isinstance(model, str):
        model = ModelSpec(model, spec.kwargs if spec is not None and spec.name == model else {})
    if isinstance(model, nn.Module):
        import copy

        return copy.deepcopy(model).cpu()
    with torch.random.fork_rng(devices=[]):
        if isinstance(model, ModelSpec):
            return model.build().cpu()
        if model is not None:
            return model().cpu()
        if spec is None:
            raise InputError(
                f"{directory} needs its reference model: pass load(..., model=...) the factory it began with"
            )
        if spec.imports_code:
            raise InputError(
                f"{directory} needs its reference model {spec.name!r}, which would import code: if you trust it, "
                f"pass load(..., model={spec.name!r})"
            )
        return spec.build().cpu()


def _load_weights(directory: Path, model: nn.Module) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        model.load_state_dict(load_file(directory / WEIGHTS), strict=True)
    except (RuntimeError, SafetensorError, OSError) as error:
        reason = str(error).splitlines()
        raise ResultError(
            f"{directory / WEIGHTS} does not fit the structure in {RESULT}: {' '.join(reason[:2])[:300]}"
        ) from error


def _history(directory: Path) -> list[dict[str, Any]]:
    with contextlib.suppress(FileNotFoundError):
        return [json.loads(line) for line in (directory / HISTORY).read_text().splitlines() if line.strip()]
    return []


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
