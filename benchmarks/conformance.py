"""Whether one network can be traced, cut, grown, trained, replayed and exported, each step checked.

The weights are random. Every step that fails is written down in words and the next one is tried; what a step took is
written down in seconds. `examine` is what the sweep over all networks (`any_model.py`) and the tests call.
"""

from __future__ import annotations

import copy
import itertools
import resource
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.common import write_json
from benchmarks.model_names import build_named
from robustcompress import StructuralEditor, measure
from robustcompress.budget import CostModel
from robustcompress.errors import UnsupportedModelError
from robustcompress.export import export_onnx
from robustcompress.models import image_size
from robustcompress.structure.auxiliary import expose, tensors_of
from robustcompress.structure.kinds import kind_of
from robustcompress.structure.verify import silence_readers

TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-8}
"""Relative difference of logits allowed; what float32 doubts, float64 decides."""
EFFECT = 1e-3
"""A cut must change the logits by so much, or its comparison with silent readers could not fail."""
SHARE = 0.5
"""Multiply-adds to be left."""
GAIN = 4
"""Every group grows by one channel for each so many that it has."""
SMALL = 96
"""Image size for networks that take any."""
COST_ERROR = 0.01
"""A prediction may be so much below what is counted, as a share."""

Row = dict[str, Any]
Save = Callable[[Row], None]


class _StoppedError(Exception):
    """A step failed without which the next ones mean nothing."""


def examine(
    build: Callable[[], nn.Module],
    size: tuple[int, int] | None = None,
    *,
    seed: int = 0,
    export: bool = True,
    save: Save = lambda row: None,
) -> Row:
    """Take one network through every step.

    Args:
        build: Makes the network, with fresh weights.
        size: Height and width of the images. By default 96 where the network takes any, else what it was made for.
        seed: Of weights, images, and which channels go.
        export: Whether to write and compare an ONNX file.
        save: Called with the row so far before each step, so that a killed run says where it was.

    Returns:
        Plain JSON. "failures" lists what went wrong, in words; "refused" says why the network cannot be edited at all.
    """
    torch.manual_seed(seed)
    row: Row = {"failures": [], "seconds": {}}
    with suppress(_StoppedError):
        _Examination(build, size, seed, row, save).run(export)
    row.pop("step", None)
    return row


class _Examination:
    def __init__(
        self, build: Callable[[], nn.Module], size: tuple[int, int] | None, seed: int, row: Row, save: Save
    ) -> None:
        self.row, self.save, self.seed, self.build = row, save, seed, build
        with self.step("build", needed=True):
            self.model = build().eval()
            height, width = size or choose_size(self.model)
            row |= {"image": [height, width], "params": sum(p.numel() for p in self.model.parameters())}
            generator = torch.Generator().manual_seed(seed)
            self.images = torch.rand(4, 3, height, width, generator=generator)
            shake(self.model, self.images, generator)
            self.generator = generator

    @contextmanager
    def step(self, name: str, *, needed: bool = False) -> Iterator[None]:
        """Time a step; note its failure, and go on unless it is needed."""
        self.row["step"] = name
        self.save(self.row)
        start = time.perf_counter()
        try:
            yield
        except Exception as error:
            if isinstance(error, UnsupportedModelError) and name == "trace":
                self.row["refused"] = str(error)
                if "does not run" in str(error) and "forward_ms" in self.row:
                    self.fail(name, f"it does run, and is refused: {_first_lines(error)}")
            else:
                self.fail(name, f"{type(error).__name__}: {_first_lines(error)}")
            if needed:
                raise _StoppedError from error
        finally:
            self.row["seconds"][name] = round(time.perf_counter() - start, 3)

    def fail(self, name: str, what: str) -> None:
        self.row["failures"].append(f"{name}: {what}")

    def run(self, export: bool) -> None:
        row = self.row
        with self.step("forward"):
            row["forward_ms"] = round(1e3 * forward_seconds(self.model, self.images[:1]), 3)
        with self.step("trace", needed=True):
            self.editor = StructuralEditor(self.model, self.images[:2], seed=self.seed)
            groups = self.editor.groups.values()
            row |= {"groups": len(groups), "editable": len(self.editor.editable)}
            row["kinds"] = dict(Counter(g.kind for g in groups if g.editable))
            row["reasons"] = dict(Counter(g.reason for g in groups if not g.editable))
            if self.editor.layout.auxiliary:
                row["auxiliary"] = len(self.editor.layout.auxiliary)
        self.edits: list[float] = []
        if self.editor.editable:
            self.cut()
            self.grow()
        with self.step("replay"):
            self.replay()
        if export:
            with self.step("export"):
                self.export()

    def cut(self) -> None:
        """Prune to half the multiply-adds, and check the first law."""
        editor, row = self.editor, self.row
        full = copy.deepcopy(self.model)
        with self.step("prune", needed=True):
            widths, keeps = editor.widths, {}
            wanted, predicted, ratio = self.half()
            for group in editor.editable:
                order = torch.randperm(group.width, generator=self.generator)
                keeps[group.name] = sorted(order[: wanted[group.name]].tolist())
            for name, keep in keeps.items():
                if len(keep) < widths[name]:
                    self.timed(partial(editor.prune, name, keep))
            before, after = measure(full, self.images[:1]), measure(self.model, self.images[:1])
            row |= {"ratio": round(ratio, 4), "macs": round(after.macs / before.macs, 4)}
            row |= {"params_left": round(after.params / before.params, 4), "half": after.macs <= SHARE * before.macs}
            if after.macs > predicted[0] * (1 + COST_ERROR) or after.params != round(predicted[1]):
                found = f"{after.macs} multiply-adds and {after.params} parameters"
                self.fail("cost", f"{found} where {predicted[0]:.0f} and {predicted[1]:.0f} were predicted")
        with self.step("law 1"):
            silent = copy.deepcopy(full)
            for name, keep in keeps.items():
                silence_readers(silent, editor.layout, name, keep, widths)
            row["law1"] = self.same("law 1", self.model, silent, "the cut is not the network whose readers are silent")
            row["cut_effect"], _ = difference(self.model, full, self.images)
            if not row["cut_effect"] > EFFECT:
                self.fail("law 1", f"shows nothing: the cut changes the output by {row['cut_effect']:.1e} alone")

    def half(self) -> tuple[dict[str, int], tuple[float, float], float]:
        """The widest uniform widths that keep half the multiply-adds, or the narrowest there are; cost; ratio."""
        costs, groups = CostModel(self.editor, self.images[:1]), self.editor.editable
        limit = SHARE * costs.predict({})[0]

        def widths_at(ratio: float) -> dict[str, int]:
            return {g.name: min(g.width, max(g.min_width, round(ratio * g.width))) for g in groups}

        low, high = 0.0, 1.0
        for _ in range(12):
            middle = (low + high) / 2
            low, high = (middle, high) if costs.predict(widths_at(middle))[0] <= limit else (low, middle)
        widths = widths_at(low)
        return widths, costs.predict(widths), low

    def grow(self) -> None:
        """Grow every group, train one step, and take the growth back."""
        editor, row = self.editor, self.row
        widths, before = {g.name: g.width for g in editor.editable}, copy.deepcopy(self.model)
        inexact = [name for name in widths if self.under_norm(name)]
        with self.step("grow", needed=True):
            self.widen({name: width for name, width in widths.items() if name not in inexact})
        with self.step("law 2"):
            row["growth_break"] = self.same("law 2", self.model, before, "growth changes the output")
        if inexact:
            with self.step("grow under norms", needed=True):
                self.widen({name: widths[name] for name in inexact})
                row["norm_break"], _ = difference(self.model, before, self.images)
        row["edit_ms"] = round(1e3 * statistics.median(self.edits), 3)
        with self.step("training"):
            self.train(copy.deepcopy(self.model))
        with self.step("undo", needed=True):
            for name, width in widths.items():
                editor.resize(name, range(width))
            old, new = before.state_dict(), self.model.state_dict()
            wrong = [key for key in {**old, **new} if not _identical(old.get(key), new.get(key))]
            if wrong:
                self.fail("undo", f"{len(wrong)} tensors are not what they were before growth, first {wrong[0]}")

    def widen(self, widths: Mapping[str, int]) -> None:
        for name, width in widths.items():
            self.timed(partial(self.editor.grow, name, -(-width // GAIN)))

    def under_norm(self, group: str) -> bool:
        """Whether a layer takes its statistics over the group's channels, so that new ones must be heard."""
        for axis in self.editor.groups[group].passers:
            if axis.side == "both":
                module = self.model.get_submodule(axis.module)
                kind = kind_of(module)
                if kind is not None and kind.mixes(module):
                    return True
        return False

    def train(self, model: nn.Module) -> None:
        """One step of SGD on four random labels."""
        model.train()
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
        outputs = tensors_of(model(self.images))  # those of auxiliary classifiers, too
        labels = torch.arange(len(self.images)) % outputs[0].shape[1]
        loss = torch.stack([F.cross_entropy(logits, labels) for logits in outputs]).sum()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        loss = loss.detach()
        self.row["loss"] = round(float(loss), 4) if bool(loss.isfinite()) else str(float(loss))
        self.row["no_gradient"] = [name for name, p in model.named_parameters() if p.grad is None]
        torn = [name for name, p in model.named_parameters() if not bool(p.isfinite().all())]
        if not bool(loss.isfinite()) or torn:
            self.fail("training", f"the loss is {float(loss)}; {len(torn)} parameters are not finite")

    def replay(self) -> None:
        """Carry the edits out on a fresh network, load the weights strictly, and compare bit by bit."""
        twin = self.build().eval()
        StructuralEditor.replay(twin, self.images[:2], self.editor.edits)
        twin.load_state_dict(self.model.state_dict(), strict=True)
        with torch.no_grad():
            auxiliary = self.editor.layout.auxiliary
            pairs = zip(*(outputs_of(net, self.images, auxiliary) for net in (twin, self.model)), strict=True)
            if not all(_identical(a, b) for a, b in pairs):
                self.fail("replay", "other logits than the network that was edited")

    def export(self) -> None:
        """Write an ONNX file and compare it in onnxruntime."""
        with tempfile.TemporaryDirectory() as folder:
            shape = (3, *self.row["image"])
            report = export_onnx(self.model, Path(folder) / "model.onnx", image_shape=shape)
        self.row["parity"] = max(check.relative_diff for check in report.parity)
        self.row["file_mb"] = round(report.bytes / 1e6, 3)

    def timed(self, edit: Callable[[], object]) -> None:
        start = time.perf_counter()
        edit()
        self.edits.append(time.perf_counter() - start)

    def same(self, name: str, found: nn.Module, wanted: nn.Module, otherwise: str) -> float:
        """The relative difference of two networks' logits in float32; a failure where float64 does not clear it."""
        auxiliary = self.editor.layout.auxiliary
        value, largest = difference(found, wanted, self.images, auxiliary)
        if not value <= TOLERANCE[torch.float32]:
            precise, _ = difference(_doubled(found), _doubled(wanted), self.images.double(), auxiliary)
            self.row[f"{name}, float64"] = precise
            if not precise <= TOLERANCE[torch.float64]:
                self.fail(name, f"{otherwise}: logits differ by {value:.1e} of {largest:.1e}, {precise:.1e} in float64")
        return value


@torch.no_grad()
def difference(
    found: nn.Module, wanted: nn.Module, images: torch.Tensor, auxiliary: Sequence[str] = ()
) -> tuple[float, float]:
    """Largest difference of two networks' logits as a share of the largest of `wanted`, and the latter.

    Args:
        found: One network.
        wanted: The other.
        images: Of which the first two are looked at.
        auxiliary: Layers that only training calls; then what comes of them is compared as well.
    """
    worst, scale = 0.0, 0.0
    for ours, theirs in zip(*(outputs_of(model, images[:2], auxiliary) for model in (found, wanted)), strict=True):
        largest = float(theirs.abs().max())
        worst, scale = max((worst, scale), (float((ours - theirs).abs().max()) / (largest + 1e-30), largest))
    return worst, scale


@torch.no_grad()
def outputs_of(model: nn.Module, images: torch.Tensor, auxiliary: Sequence[str] = ()) -> list[torch.Tensor]:
    """The logits in evaluation mode; and those that training has as well."""
    outputs = [model.eval()(images)]
    if auxiliary:
        outputs.extend(tensors_of(expose(model, auxiliary)(images)))
        model.eval()
    return outputs


@torch.no_grad()
def shake(model: nn.Module, images: torch.Tensor, generator: torch.Generator) -> None:
    """Make random what begins constant, and the statistics of batch norms random around those of some images.

    A zero-initialised layer or a layer scale of 1e-6 hides what an edit does wrong; random statistics without regard to
    the images let activations grow until float32 shows nothing else.
    """
    for parameter in model.parameters():
        if parameter.numel() > 1 and not bool((parameter == parameter.flatten()[0]).all()):
            continue
        like = torch.rand(parameter.shape, generator=generator)
        if parameter.dim() > 1 and not bool(parameter.any()):
            bound = (3 / max(1, parameter[0].numel())) ** 0.5
            parameter.copy_(bound * (2 * like - 1))
        else:
            parameter.copy_(like + 0.5 if bool(parameter.any()) else 0.4 * (like - 0.5))
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats]
    momentum = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 1.0
        norm.train()
    with torch.random.fork_rng(devices=[]):
        model(images)
    for norm, before in zip(norms, momentum, strict=True):
        norm.momentum = before
        norm.eval()
        assert norm.running_mean is not None and norm.running_var is not None
        width = norm.running_var.shape
        norm.running_mean += norm.running_var.sqrt() * (torch.rand(width, generator=generator) - 0.5)
        norm.running_var *= torch.rand(width, generator=generator) + 0.5


def choose_size(model: nn.Module) -> tuple[int, int]:
    """96 where the network is not built for one size and takes it, else what it was made for."""
    made_for = image_size(model)
    if made_for.argument or max(made_for.height, made_for.width) <= SMALL:
        return made_for.height, made_for.width
    try:
        with torch.no_grad():
            logits = tensors_of(copy.deepcopy(model).train()(torch.rand(2, 3, SMALL, SMALL)))[0]
    except Exception:  # whatever a network raises that was made for another size
        return made_for.height, made_for.width
    return (SMALL, SMALL) if logits.dim() == 2 else (made_for.height, made_for.width)


@torch.no_grad()
def forward_seconds(model: nn.Module, image: torch.Tensor, runs: int = 5) -> float:
    """Median of a few forward passes."""
    seconds = []
    for _ in range(runs + 1):
        start = time.perf_counter()
        model(image)
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[1:])


def _doubled(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model).double()


def _identical(a: torch.Tensor | None, b: torch.Tensor | None) -> bool:
    return a is not None and b is not None and a.shape == b.shape and bool(torch.equal(a, b))


def _first_lines(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(itertools.islice(lines, 3))[:300]


def peak_mb() -> int:
    """The most memory that this process ever held, in MB."""
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most // (1 << 20) if sys.platform == "darwin" else most // 1024


def main(argv: Sequence[str] | None = None) -> int:
    """Examine one network by name, in this process: `python -m benchmarks.conformance NAME FILE SEED THREADS`."""
    name, file, seed, threads = sys.argv[1:] if argv is None else argv
    torch.set_num_threads(int(threads))
    path = Path(file)

    def save(row: Mapping[str, Any]) -> None:
        write_json(path, _plain(row) | {"peak_mb": peak_mb()})

    # What the first trace of a process imports is no part of tracing this network.
    StructuralEditor(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(144, 2)), torch.zeros(2, 3, 8, 8))
    row = examine(lambda: build_named(name), seed=int(seed), save=save)
    save(row)
    return 0


def _plain(row: Mapping[str, Any]) -> Row:
    """JSON has no infinities: they become words."""
    return {k: v if not isinstance(v, float) or abs(v) < float("inf") else str(v) for k, v in row.items()}


if __name__ == "__main__":
    sys.exit(main())
