"""What a compression leaves behind: a plain network, what it cost and gained, and how it came about."""

from __future__ import annotations

import hashlib
import html
import json
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from robustcompress.bounded import build_bounded, replay_bounded
from robustcompress.budget import Budget, Cost, human
from robustcompress.checkpoint.disk import reason, save_tensors, sync_directory, write_text
from robustcompress.durable import draft_of, ground
from robustcompress.errors import DiskError, InputError, ResultError
from robustcompress.hub import fetch, is_address
from robustcompress.min_robust import lines_of, trials_of
from robustcompress.models import ModelSpec
from robustcompress.recipe_text import recipe_text
from robustcompress.records import checked_cost, checked_data, checked_strategy
from robustcompress.robust import RobustReport, ThreatModel
from robustcompress.structure import AnyEdit, edit_from_json
from robustcompress.untrusted import load_state, parse_json, read_json, read_tensors, read_text

FORMAT = 4
"""The newest that is read. What is written has the oldest that can hold its edits, and its demand for accuracy."""
DAMAGE = (
    *(KeyError, TypeError, ValueError, AttributeError, IndexError, RuntimeError, ArithmeticError, MemoryError),
    AssertionError,
)
"""What a record that nobody wrote can provoke; RecursionError is a RuntimeError."""

RESULT, WEIGHTS, HISTORY, RECIPE = "result.json", "model.safetensors", "history.jsonl", "recipe.yaml"


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
        settings: Objective, training recipe, epochs, versions and hardware; what `robustcompress run` ran and measured.
        seed: The seed.
    """

    model: nn.Module
    spec: ModelSpec | None
    strategy: Mapping[str, Any]
    edits: tuple[AnyEdit, ...]
    before: Cost
    after: Cost
    budget: Mapping[str, Any]
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
        """Whether every limit is kept, on accuracy under attack by the report; strategy "none" has no other."""
        budget = Budget(**self.budget)
        small = self.strategy["name"] == "none" or budget.allows(self.after, self.before)
        return small and (budget.demand is None or budget.demand.holds(self.report))

    def save(self, directory: str | Path, *, overwrite: bool = False) -> Path:
        """Write the result to a directory: JSON, safetensors, no pickle.

        Everything is written beside the directory first and moved there at the end, so that it is whole or absent.

        Args:
            directory: Must not exist, unless `overwrite`; directories above it are made.
            overwrite: Replace a result that is there. A directory that holds anything else is never replaced.

        Returns:
            The directory.

        Raises:
            InputError: The directory exists, or cannot be made.
            DiskError: It cannot be written.
        """
        directory = Path(directory)
        check_target(directory, overwrite=overwrite)
        try:
            with draft_of(directory) as draft:
                self._write(draft)
                _put_in_place(draft, directory)
                sync_directory(directory.parent)
        except OSError as error:
            raise _unwritten(directory, error) from error
        return directory

    def _write(self, directory: Path) -> None:
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in self.model.state_dict().items()}
        digest = save_tensors(directory / WEIGHTS, tensors, {"format": "pt"})
        (directory / WEIGHTS).chmod(0o644)
        record = self.to_json() | {"weights_sha256": digest}
        write_text(directory / RESULT, json.dumps(record, indent=1, allow_nan=False) + "\n")
        if isinstance(recipe := self.settings.get("run"), Mapping):
            write_text(directory / RECIPE, recipe_text(recipe))
        lines = (json.dumps(record) + "\n" for record in self.history)
        write_text(directory / HISTORY, "".join(lines))
        sync_directory(directory)

    def to_json(self) -> dict[str, Any]:
        """Everything but the weights and the history, as plain JSON."""
        formats = [edit.result_format for edit in self.edits] + [3 if "min_robust" in self.budget else 1]
        return {
            "format": max(formats),
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
        if before.nonzeros and after.nonzeros and after.density < 0.999:  # a weight may be zero by chance
            ratio = f"{after.nonzeros / before.nonzeros:.3f}"
            rows.append(("weights not zero", human(before.nonzeros), human(after.nonzeros), ratio))
            if before.compressed and after.compressed:
                ratio = f"{after.compressed / before.compressed:.3f}"
                rows.append(("size, compressed", f"{human(before.compressed)}B", f"{human(after.compressed)}B", ratio))
        where = "predicted" if "latency" in self.settings else "onnxruntime"
        for what, key, digits in (("latency (torch, CPU)", "latency_ms", 2), (f"latency ({where})", "onnx_ms", 3)):
            old, new = getattr(before, key), getattr(after, key)
            if old and new:
                rows.append((what, f"{old:.{digits}f} ms", f"{new:.{digits}f} ms", f"{new / old:.3f}"))
        return rows

    def __str__(self) -> str:
        """Costs and accuracies, readable in a terminal."""
        name = self.spec.name if self.spec else type(self.model).__name__
        lines = [f"{name} compressed by {self.strategy['name']} on {self.data['name']} (seed {self.seed})", ""]
        lines.append(f"{'':22}{'before':>12}{'after':>12}{'ratio':>8}")
        lines += [f"{what:<22}{before:>12}{after:>12}{ratio:>8}" for what, before, after, ratio in self.rows()]
        if tried := trials_of(self.history):
            lines += ["", "networks tried, judged on validation images:", *lines_of(tried)]
        if not self.meets_budget:
            lines += ["", f"misses its budget: {Budget(**self.budget)}"]
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


def _unwritten(directory: Path, error: OSError) -> DiskError:
    return DiskError(f"{directory} could not be written ({reason(error)}): make room, or choose another directory")


def _put_in_place(new: Path, directory: Path) -> None:
    """Rename `new` to `directory`; a result that is there is set aside first, and deleted only when its heir stands."""
    if not directory.exists():
        new.replace(directory)
        return
    aside = Path(tempfile.mkdtemp(prefix=f".{directory.name}-old-", dir=directory.parent)) / directory.name
    directory.replace(aside)
    try:
        new.replace(directory)
    except OSError:
        aside.replace(directory)
        raise
    finally:
        shutil.rmtree(aside.parent, ignore_errors=True)


def check_target(directory: Path, *, overwrite: bool = False) -> None:
    """Raise one InputError when a result cannot be written to `directory`."""
    parent = ground(directory)
    if not parent.is_dir():
        raise InputError(f"{directory}: {parent} is no directory; choose another place")
    if directory.exists() and not (overwrite and (directory / RESULT).is_file()):
        raise InputError(f"{directory} exists; choose another directory, or remove it first")
    if directory.exists():
        others = sorted({path.name for path in directory.iterdir()} - {RESULT, WEIGHTS, HISTORY, RECIPE})
        if others:
            raise InputError(
                f"{directory} also holds {', '.join(others[:5])}: move that away, or choose another directory"
            )
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
        directory: What `CompressResult.save` wrote; or "hf://owner/name", perhaps "@revision": what `push` sent there.
        model: The reference, or its factory, for a result whose reference is no built-in model and none of
            torchvision's or timm's. A factory named in the file is never imported on the file's word alone. With it
            there is no limit to how far edits make the network grow.

    Returns:
        The result; `.model` computes the same logits, bit for bit, as the one that was saved.

    Raises:
        ResultError: There is no result, or it is truncated, tampered with, or of a newer format.
    """
    directory = Path(fetch(directory, (RESULT, WEIGHTS), optional=[HISTORY]) if is_address(directory) else directory)
    record = _read(directory)
    history = _history(directory)
    try:
        spec = ModelSpec.from_json(record["model"]) if record["model"] is not None else None
        edits = tuple(edit_from_json(edit) for edit in record["edits"])
        parts: dict[str, Any] = {
            "spec": spec,
            "strategy": checked_strategy(record["strategy"]),
            "edits": edits,
            "before": checked_cost(record["before"]),
            "after": checked_cost(record["after"]),
            "budget": Budget(**record["budget"]).to_json(),
            "report": RobustReport.from_json(record["report"]) if record["report"] is not None else None,
            "threat": ThreatModel.from_json(record["threat"]),
            "data": checked_data(record["data"]),
            "settings": dict(record["settings"]),
            "seed": int(record["seed"]),
        }
    except (*DAMAGE, ResultError) as error:
        raise ResultError(f"{directory / RESULT} is damaged or was changed by hand: {error}") from error
    tensors = _tensors(directory)
    shape, kept = parts["data"]["image_shape"], sum(tensor.numel() for tensor in tensors.values())
    fresh = _reference(directory, spec, model, shape, kept)
    try:
        replay_bounded(fresh, shape, edits, kept if model is None else None)  # else the caller stands for it
    except (*DAMAGE, ResultError) as error:
        raise ResultError(f"the edits in {directory / RESULT} do not fit the reference model: {error}") from error
    try:
        load_state(fresh, tensors, exact=True)
    except ValueError as error:
        raise ResultError(f"{directory / WEIGHTS} does not fit the structure in {RESULT}: {error}") from error
    return CompressResult(model=fresh.eval(), history=tuple(history), **parts)


def _read(directory: Path) -> dict[str, Any]:
    path = directory / RESULT
    if not path.is_file():
        raise ResultError(f"{directory} holds no result: there is no {RESULT}; was it written by `compress --out`?")
    try:
        record = read_json(path)
    except (OSError, ValueError) as error:
        raise ResultError(f"{path} cannot be read: {error}") from error
    if not isinstance(record, dict) or type(record.get("format")) is not int:
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
    directory: Path,
    spec: ModelSpec | None,
    model: nn.Module | Callable[[], nn.Module] | ModelSpec | str | None,
    image_shape: Sequence[int],
    kept: int,
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
        try:
            return build_bounded(spec, image_shape, kept).cpu()
        except (*DAMAGE, ResultError) as error:
            raise ResultError(f"the reference model in {directory / RESULT} cannot be built: {error}") from error


def _tensors(directory: Path) -> dict[str, torch.Tensor]:
    try:
        return read_tensors(directory / WEIGHTS)
    except (OSError, ValueError) as error:
        raise ResultError(f"{directory / WEIGHTS} is damaged: {error}") from error


def _history(directory: Path) -> list[dict[str, Any]]:
    path = directory / HISTORY
    if not path.is_file():
        return []
    try:
        records = [parse_json(line, nan=True) for line in read_text(path).splitlines() if line.strip()]
    except (OSError, ValueError) as error:
        raise ResultError(f"{path} is damaged: {error}; without that file the result still loads") from error
    if not all(isinstance(record, dict) for record in records):
        raise ResultError(f"{path} is damaged: a line is no JSON object; without that file the result still loads")
    return records


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
