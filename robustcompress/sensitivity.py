"""How much robust accuracy hangs on each channel group and block, before any training."""

from __future__ import annotations

import copy
import time
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import nn

from robustcompress.budget import CostModel
from robustcompress.cuts import Cut, Sensitivity
from robustcompress.data import Batches, DataSplits, Images, load_data
from robustcompress.errors import InputError, Problems, nearest
from robustcompress.result import CompressResult
from robustcompress.robust import (
    AttackSpec,
    PairedTest,
    RobustReport,
    ThreatModel,
    attack_by_name,
    evaluate,
    paired_test,
    wilson,
)
from robustcompress.structure import StructuralEditor
from robustcompress.structure.gates import top_channels
from robustcompress.structure.magnitudes import group_norms
from robustcompress.train import Progress, estimate_statistics, resolve_device

BATCH = 128
Split = Literal["val", "test"]


def sensitivity(
    model: nn.Module | CompressResult,
    data: Any = None,
    threat: ThreatModel | float | None = None,
    *,
    shares: Sequence[float] = (0.75, 0.5, 0.25),
    attack: str = "pgd-10",
    images: int | None = 300,
    split: Split = "val",
    groups: Sequence[str] | None = None,
    depth: bool = True,
    recalibrate: bool = False,
    seed: int = 0,
    device: str | torch.device = "auto",
    progress: bool = True,
) -> Sensitivity:
    """Measure what is lost under attack when one channel group alone is pruned, or one block alone leaves.

    Each time a copy is cut, by magnitude (Li et al. 2017, over coupled channels, as strategy "magnitude"), and attacked
    anew: attacks are not carried over from the whole network. Nothing is trained, so this tells what training has to
    repair, not what it cannot. The idea is the sensitivity scan of Han et al. 2015 and Li et al. 2017, with robust
    accuracy in the place of accuracy.

    Args:
        model: A trained network that maps images in [0, 1] to logits, or a result; never touched.
        data: None for the embedded handwritten digits, else what `load_data` takes.
        threat: What the attack may do; a number is an linf radius. By default what a result was trained for, else linf
            8/255.
        shares: Shares of a group's channels that are kept.
        attack: "fgsm" takes a tenth of the time of "pgd-10"; any name of `attack_by_name`.
        images: How many images at most; None for all. They are the same for all networks.
        split: Whose images: "val", to choose by; or "test", for a network that was trained on the validation images.
        groups: Names of the channel groups to look at; all that can be edited by default.
        depth: Also look at the blocks that can leave, which is proven first.
        recalibrate: Estimate batch-norm statistics anew after each cut, on training images, in the whole network too.
        seed: Of the attack.
        device: "auto", "cpu", "cuda", ...
        progress: Show progress, and say beforehand about how long it takes.

    Returns:
        What each cut costs, with 95 % intervals of the loss (Newcombe's, for paired images).

    Raises:
        InputError: Something cannot work; all that was noticed is listed.
        UnsupportedModelError: The network holds layers that cannot be edited.
    """
    network = model.model if isinstance(model, CompressResult) else model
    known = model.threat if isinstance(model, CompressResult) else ThreatModel("linf", 8 / 255)
    problems = Problems("sensitivity() cannot start")
    if not isinstance(network, nn.Module):
        problems.add(f"model={model!r}: give a trained nn.Module, or a result")
    adversary = problems.attempt(lambda: known if threat is None else _threat(threat))
    spec = problems.attempt(lambda: attack_by_name(attack))
    if spec is not None and spec.kind in ("clean", "autoattack"):
        problems.add(f"attack={attack!r}: give 'fgsm' or 'pgd-10', which many networks can be attacked with")
    kept = _shares(problems, shares)
    if images is not None and (isinstance(images, bool) or not isinstance(images, int) or images < 1):
        problems.add(f"images={images!r}: must be a positive whole number, or None for all")
    if split not in ("val", "test"):
        problems.add(f"split={split!r} does not exist (one of: val, test)")
    target = problems.attempt(lambda: resolve_device(device))
    splits = problems.attempt(lambda: _data(model, data))
    if splits is not None and split in ("val", "test") and len(getattr(splits, split)) == 0:
        problems.add(f"split={split!r}: the data have no such images; take the other, or give more")
    if splits is not None and recalibrate and len(splits.train) == 0:
        problems.add("recalibrate=True: the data have no training images")
    problems.raise_if_any()
    shown = Progress(progress, title="sensitivity")
    with torch.random.fork_rng():  # proofs and forwards may draw from the global generator, which is the caller's
        torch.manual_seed(seed)
        model = copy.deepcopy(network).to(target)
        return _Scan(model, splits, split, adversary, spec, images, recalibrate, seed, shown).run(kept, groups, depth)


def _data(model: object, data: Any) -> DataSplits:
    """The images; those of a result must be of its own classes and size."""
    if not isinstance(model, CompressResult):
        return load_data(data)
    if data is None and model.data["name"] != "digits":
        raise InputError(f"the result was trained on {model.data['name']!r}: give data, such as load_data(...)")
    splits = load_data(data)
    if splits.classes != model.classes or splits.image_shape != model.image_shape:
        raise InputError(f"{splits.name} has other classes or another image size than what the result was trained on")
    return splits


def _threat(threat: object) -> ThreatModel:
    if isinstance(threat, ThreatModel):
        return threat
    if isinstance(threat, int | float) and not isinstance(threat, bool):
        return ThreatModel(eps=threat)
    raise InputError(f"threat={threat!r}: give a ThreatModel, such as ThreatModel('linf', 8/255), or an linf radius")


def _shares(problems: Problems, shares: object) -> list[float]:
    listed = list(shares) if isinstance(shares, list | tuple) else [shares]
    if not listed:
        problems.add("shares is empty: give some, such as (0.75, 0.5, 0.25)")
    for share in listed:
        if isinstance(share, bool) or not isinstance(share, int | float) or not 0 < share < 1:
            problems.add(f"shares: {share!r} must lie between 0 and 1")
            return []
    return sorted({float(share) for share in listed}, reverse=True)  # type: ignore[arg-type]


class _Scan:
    def __init__(
        self,
        model: nn.Module,
        data: DataSplits,
        split: str,
        threat: ThreatModel,
        spec: AttackSpec,
        images: int | None,
        recalibrate: bool,
        seed: int,
        progress: Progress,
    ) -> None:
        self._data, self._split, self._threat, self._spec = data, split, threat, spec
        self._images, self._recalibrate, self._seed, self._progress = images, recalibrate, seed, progress
        self._device = next(model.parameters()).device
        self._judged: Images = getattr(data, split)
        example = torch.zeros(2, *data.image_shape, device=self._device)
        self._editor = StructuralEditor(model.eval(), example, seed=seed)
        self._costs = CostModel(self._editor, example)

    def run(self, shares: Sequence[float], groups: Sequence[str] | None, depth: bool) -> Sensitivity:
        plan = self._plan(shares, self._names(groups))
        blocks = self._editor.bypassable if depth else ()
        start = time.perf_counter()
        whole = self._judge(self._editor.fork())
        seconds = time.perf_counter() - start
        count = len({(group, width) for group, _, width in plan}) + len(blocks)
        self._progress.say(
            f"{count} networks, each attacked by {self._spec.name} on {whole.n} images: "
            f"about {_duration(count * seconds)}"
        )
        warnings = [*whole.warnings, *self._doubts(whole)]
        for warning in warnings:
            self._progress.say(f"warning: {warning}")
        norms, found = group_norms(self._editor), dict[tuple[str, int], RobustReport]()
        cuts: list[Cut] = []
        with self._progress.phase("groups and blocks", count) as bar:
            for group, share, width in plan:
                if (group, width) not in found:
                    fork = self._editor.fork()
                    fork.prune(group, top_channels(norms[group], width).tolist())
                    found[group, width] = self._judge(fork)
                    bar.advance(self._shown(found[group, width]))
                macs = self._saved({group: width}, ())
                cuts.append(self._cut(whole, found[group, width], group, share, width, macs))
            for block in blocks:
                fork = self._editor.fork()
                fork.bypass(block)
                report = self._judge(fork)
                bar.advance(self._shown(report))
                cuts.append(self._cut(whole, report, block, None, 0, self._saved({}, (block,))))
        robust = whole.result(self._spec.name)
        return Sensitivity(
            cuts=tuple(cuts),
            clean=whole.clean_accuracy,
            robust=robust.accuracy,
            low=robust.low,
            high=robust.high,
            n=whole.n,
            attack=self._spec.name,
            threat=self._threat,
            data=self._data.name.rpartition("/")[2],
            split=self._split,
            recalibrated=self._recalibrate,
            warnings=tuple(warnings),
        )

    def _names(self, groups: Sequence[str] | None) -> list[str]:
        known = self._editor.groups
        if groups is None:
            return [group.name for group in self._editor.editable]
        problems = Problems("sensitivity() cannot start")
        for name in groups:
            if name not in known:
                problems.add(f"there is no channel group {name!r}{nearest(name, known)}")
            elif known[name].reason:
                problems.add(f"group {name!r} cannot be edited: {known[name].reason}")
        problems.raise_if_any()
        return [name for name in known if name in groups]

    def _plan(self, shares: Sequence[float], names: Sequence[str]) -> list[tuple[str, float, int]]:
        """Group, share, and how many channels that leaves: fewer than there are, and as many as it needs."""
        plan = []
        for name in names:
            group = self._editor.groups[name]
            for share in shares:
                width = max(group.min_width, 1, min(round(share * group.width), group.width - 1))
                if width < group.width:
                    plan.append((name, share, width))
        return plan

    def _judge(self, editor: StructuralEditor) -> RobustReport:
        if self._recalibrate:
            generator = torch.Generator().manual_seed(self._seed)  # the same images for all
            size = min(BATCH, len(self._data.train))
            estimate_statistics(editor.model, Batches(self._data.train, size, device=self._device, generator=generator))
        return evaluate(
            editor.model,
            self._judged,
            self._threat,
            attacks=("clean", self._spec),
            device=self._device,
            seed=self._seed,
            max_images=self._images,
        )

    def _shown(self, report: RobustReport) -> Mapping[str, float]:
        return {"clean": report.clean_accuracy, "robust": report.result(self._spec.name).accuracy}

    def _saved(self, widths: Mapping[str, int], without: Sequence[str]) -> float:
        whole, left = self._costs.predict({})[0], self._costs.predict(widths, without=without)[0]
        return (whole - left) / max(1.0, whole)

    def _cut(
        self, whole: RobustReport, report: RobustReport, part: str, share: float | None, kept: int, macs: float
    ) -> Cut:
        robust, clean = self._spec.name, "clean"
        tests: list[PairedTest] = [
            paired_test(whole.result(name).correct, report.result(name).correct) for name in (robust, clean)
        ]
        return Cut(
            part=part,
            share=share,
            kept=kept,
            width=self._editor.widths[part] if share is not None else 0,
            macs=macs,
            clean=report.clean_accuracy,
            robust=report.result(robust).accuracy,
            loss=tests[0].difference,
            low=tests[0].low,
            high=tests[0].high,
            clean_loss=tests[1].difference,
        )

    def _doubts(self, whole: RobustReport) -> list[str]:
        clean, robust = whole.result("clean"), whole.result(self._spec.name)
        chance = 1 / self._data.num_classes
        if wilson(int(clean.correct.sum()), clean.n)[0] <= chance:
            return [
                f"clean accuracy is {100 * clean.accuracy:.1f} %, not above chance ({100 * chance:.3g} %): give a "
                "trained network; what follows means nothing"
            ]
        if robust.low <= chance / 2:
            return [
                f"{self._spec.name} accuracy is {100 * robust.accuracy:.1f} %: there is hardly anything to lose; "
                "was it trained to withstand this?"
            ]
        return []


def _duration(seconds: float) -> str:
    return (
        f"{seconds:.0f} s"
        if seconds < 90
        else f"{seconds / 60:.0f} min"
        if seconds < 5400
        else f"{seconds / 3600:.1f} h"
    )
