"""The whole way on images that come with the package: train, compress, attack, export, serve, and say what came out."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import shutil
import statistics
import tempfile
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from robustcompress.api import compress
from robustcompress.budget import Budget, human
from robustcompress.data import DataSplits, load_data
from robustcompress.durable import draft_of, ground
from robustcompress.errors import InputError, ParityError
from robustcompress.export import ExportReport, export_onnx, load_session
from robustcompress.export.ends import INPUT, LOGITS
from robustcompress.machine import hardware, versions
from robustcompress.models import resnet8
from robustcompress.plots import plot_results
from robustcompress.result import CompressResult, load
from robustcompress.robust import AutoAttackConfig, PairedTest, RobustReport, ThreatModel, compare, evaluate
from robustcompress.robust.objectives import PGDAT
from robustcompress.terminal import Output, say, table
from robustcompress.train.progress import console

STRATEGIES = ("none", "hydra", "grape")
ATTACKS = ("clean", "fgsm", "pgd-20", "autoattack")
THREAT = ThreatModel("linf", 0.1)
BUDGET = Budget(macs=0.5)
STEM_STRIDE = 4
"""Each pixel of a digit is a block of 4x4 equal ones: more positions would cost AutoAttack's time and see no more."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """How much the quickstart does.

    Attributes:
        epochs: Passes over the training images, for each network.
        attack_steps: PGD steps while training.
        autoattack_images: Test images that AutoAttack judges in one round; the same for every network.
        total_s: Another round for all networks is begun as long as it should end within so many seconds from the start.
        autoattack: How much AutoAttack does.
        served: Single images that are timed.
    """

    epochs: float
    attack_steps: int
    autoattack_images: int
    total_s: float
    autoattack: AutoAttackConfig
    served: int


FULL = Plan(
    epochs=12,
    attack_steps=3,
    autoattack_images=32,
    total_s=115,
    # One chunk a round: AutoAttack's iterations cost nearly the same for few images as for many.
    autoattack=AutoAttackConfig(chunk_size=32),
    served=200,
)
FAST = Plan(
    epochs=0.5,
    attack_steps=1,
    autoattack_images=8,
    total_s=0,
    autoattack=AutoAttackConfig(
        apgd_iterations=10, fab_iterations=5, square_queries=50, target_classes=3, chunk_size=8
    ),
    served=20,
)
"""A smoke run of every step; AutoAttack is cut short, and the report calls it custom."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Served:
    """What onnxruntime made of an exported file.

    Attributes:
        accuracy: On the test images as they are, in [0, 1].
        ms_per_image: Median time of a single image on one thread, in milliseconds.
    """

    accuracy: float
    ms_per_image: float


def quickstart(out: str | Path, plan: Plan = FULL, *, seed: int = 0) -> Output:
    """Train, compress, attack, export and serve; leave everything in a directory.

    The directory holds one saved result a network, ONNX files, `quickstart.json` with every number, and
    `quickstart.png`. It is put in place at the end, whole or not at all.

    Args:
        out: The directory; must not exist.
        plan: How much to do.
        seed: Seeds everything.

    Returns:
        The table and what to make of it.

    Raises:
        InputError: The directory exists or cannot be made.
        ParityError: onnxruntime and torch disagree.
    """
    began = time.perf_counter()
    out = Path(out)
    with _draft(out) as draft, _one_thread():
        data = load_data("digits")
        say(f"data: {'; '.join(data.notes)}")
        say(f"threat: {THREAT.label()}, since ink on paper hardly feels the 8/255 that is usual for photos")
        data = replace(data, notes=())
        results: dict[str, CompressResult] = {}
        seconds: dict[str, float] = {}
        with _Judges(draft, plan, seed) as judges:
            for name in STRATEGIES:
                at = time.perf_counter()
                results[name] = _train(name, data, plan, seed)
                seconds[name] = time.perf_counter() - at
                results[name].save(draft / name)
                judges.begin(name)  # a trained network is attacked while the next one trains
            reports = judges.reports(began, len(data.test))
        results = {name: replace(result, report=reports[name]) for name, result in results.items()}
        exports = {}
        for name, result in results.items():
            result.save(draft / name, overwrite=True)
            exports[name] = export_onnx(
                result, draft / f"{name}.onnx", sample=data.test.first(14).as_float(), threat=THREAT
            )
        served = _serve(draft, results, data, plan)
        plot_results(results, draft / "quickstart.png")
        tests = {
            f"{name} - none, {attack}": compare(reports[name], reports["none"], attack=attack)
            for name in STRATEGIES[1:]
            for attack in ("clean", "pgd-20", "autoattack")
        }
        document: dict[str, Any] = {
            "format": 1,
            "out": str(out),
            "seed": seed,
            "plan": asdict(plan),
            "data": dict(results["none"].data),
            "threat": THREAT.to_json(),
            "budget": BUDGET.to_json(),
            "networks": {
                name: _numbers(results[name], seconds[name], served[name], exports[name]) for name in STRATEGIES
            },
            "differences": {name: asdict(test) for name, test in tests.items()},
            "versions": versions(),
            "hardware": hardware() | {"torch_threads": 1},
            "seconds": time.perf_counter() - began,
        }
        (draft / "quickstart.json").write_text(json.dumps(document, indent=1, allow_nan=False) + "\n")
        draft.replace(out)
    return Output(document=document, parts=(_table(document), *_lines(out, document, tests, plan)))


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    # Batches are too small for more to pay, and beside other programs threads spin for each other a hundred times as
    # long. It also makes the numbers the same whatever the number of cores.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@contextlib.contextmanager
def _draft(out: Path) -> Iterator[Path]:
    """The directory in which everything is first put together, beside `out`."""
    if out.exists():
        raise InputError(f"{out} exists; choose another directory with --out, or remove it first")
    if not ground(out).is_dir():
        raise InputError(f"{out}: {ground(out)} is no directory; choose another place with --out")
    with contextlib.ExitStack() as stack:
        try:
            draft = stack.enter_context(draft_of(out, prefix=f"{out.name}-unfinished-"))
        except OSError as error:
            said = f"{out.parent} cannot be written to ({error.strerror})"
            raise InputError(f"{said}; choose another directory with --out") from error
        yield draft


def _reference(data: DataSplits, seed: int) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # the same first weights for all strategies
        return resnet8(num_classes=data.num_classes, stem_stride=STEM_STRIDE)


def _train(strategy: str, data: DataSplits, plan: Plan, seed: int) -> CompressResult:
    return compress(
        _reference(data, seed),
        strategy,
        data=data,
        budget=BUDGET,
        threat=THREAT,
        objective=PGDAT(steps=plan.attack_steps),
        epochs=plan.epochs,
        attacks=(),
        seed=seed,
        device="cpu",
    )


class _Judges:
    """Attacks the networks in two processes beside the training: AutoAttack on a few images keeps one core busy.

    All networks are judged on the same images, as many as the time allows, a round at a time.
    """

    def __init__(self, directory: Path, plan: Plan, seed: int) -> None:
        self._directory, self._plan, self._seed = directory, plan, seed
        self._kept = tempfile.mkdtemp()  # chunks of earlier rounds are taken from here
        self._pool = ProcessPoolExecutor(max_workers=2, mp_context=multiprocessing.get_context("spawn"))
        self._running: dict[str, Future[dict[str, Any]]] = {}

    def __enter__(self) -> _Judges:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)
        shutil.rmtree(self._kept, ignore_errors=True)

    def begin(self, name: str, *, images: int | None = None, attacks: tuple[str, ...] = ATTACKS) -> None:
        """Attack a saved network, as soon as a process is free."""
        images = images or self._plan.autoattack_images
        self._running[name] = self._pool.submit(
            _judge, str(self._directory / name), attacks, images, self._plan.autoattack, self._seed, self._kept
        )

    def reports(self, began: float, most: int) -> dict[str, RobustReport]:
        """Wait for all networks; begin further rounds while one more should end in time."""
        found = self._collect()
        images, at = self._plan.autoattack_images, time.perf_counter()
        spent = max(report.result("autoattack").seconds for report in found.values()) * len(found) / 2
        while images < most and at - began + spent < self._plan.total_s:
            images += self._plan.autoattack_images
            for name in found:
                self.begin(name, images=images, attacks=("clean", "autoattack"))
            for name, report in self._collect().items():
                others = tuple(attack for attack in found[name].attacks if attack.name != "autoattack")
                found[name] = replace(found[name], attacks=(*others, report.result("autoattack")))
            now = time.perf_counter()
            spent, at = now - at, now
        return found

    def _collect(self) -> dict[str, RobustReport]:
        found = {}
        with console().status("AutoAttack, in two processes ..."):
            for name, running in self._running.items():
                found[name] = RobustReport.from_json(running.result())
                robust = found[name].result("autoattack")
                left = f"{100 * robust.accuracy:.1f} % of {robust.n} images"
                say(f"{name}: AutoAttack left {left}, {robust.seconds:.0f} s")
        return found


def _judge(
    directory: str, attacks: tuple[str, ...], images: int, config: AutoAttackConfig, seed: int, kept: str
) -> dict[str, Any]:
    """What a judging process does: load the network, attack it, and give the report as plain JSON."""
    torch.set_num_threads(1)
    report = evaluate(
        load(directory).model,
        load_data("digits").test,
        THREAT,
        attacks=attacks,
        autoattack_images=images,
        autoattack_config=config,
        device="cpu",
        seed=seed,
        # Never reached; under a limit a chunk's survivors stay in it, so that the next round finds them again.
        time_limit_s=86400,
        resume_dir=Path(kept),
    )
    return report.to_json()


def _serve(directory: Path, results: Mapping[str, CompressResult], data: DataSplits, plan: Plan) -> dict[str, Served]:
    """Classify all test images with onnxruntime alone, then time single images, the networks by turns."""
    images, labels = data.test.as_float(), data.test.labels
    # One thread: onnxruntime's and torch's own threads would fight for the same cores.
    sessions = {name: load_session(directory / f"{name}.onnx", threads=1) for name in results}
    accuracies: dict[str, float] = {}
    for name, session in sessions.items():
        accuracies[name] = accuracy = _right(session, images, labels) / len(labels)
        report = results[name].report
        assert report is not None
        if accuracy != report.clean_accuracy:
            raise ParityError(
                f"{name}.onnx is right on {100 * accuracy:.2f} % of the test images in onnxruntime, "
                f"the model in torch on {100 * report.clean_accuracy:.2f} %"
            )
    times: dict[str, list[float]] = {name: [] for name in sessions}
    for index in range(plan.served):
        single = images[index % len(images)][None].numpy()
        for name, session in sessions.items():
            at = time.perf_counter()
            session.run([LOGITS], {INPUT: single})
            times[name].append(1000 * (time.perf_counter() - at))
    return {name: Served(accuracy=accuracies[name], ms_per_image=statistics.median(times[name])) for name in sessions}


def _right(session: Any, images: Tensor, labels: Tensor) -> int:
    calls = [session.run([LOGITS], {INPUT: chunk.numpy()})[0] for chunk in torch.split(images, 64)]
    logits = torch.cat([torch.from_numpy(call) for call in calls])
    return int((logits.argmax(1) == labels).sum())


def _numbers(result: CompressResult, seconds: float, served: Served, export: ExportReport) -> dict[str, Any]:
    assert result.report is not None
    return {
        "before": result.before.to_json(),
        "after": result.after.to_json(),
        "accuracies": {
            attack.name: {
                "accuracy": attack.accuracy,
                "low": attack.low,
                "high": attack.high,
                "n": attack.n,
                "seconds": attack.seconds,
                "suite": attack.suite,
            }
            for attack in result.report.attacks
        },
        "warnings": list(result.report.warnings),
        "onnxruntime": asdict(served),
        "onnx": {"bytes": export.bytes, "opset": export.opset, "parity": [check.to_json() for check in export.parity]},
        "train_seconds": seconds,
        "settings": dict(result.settings),
    }


def _table(document: Mapping[str, Any]) -> Any:
    networks = document["networks"]
    n = networks["none"]["accuracies"]["autoattack"]["n"]
    columns = (
        "",
        "MACs",
        "params",
        "clean\n%",
        "PGD-20\n%",
        f"AutoAttack %\n(95 %, n={n})",
        "onnxrun-\ntime %",
        "ms per\nimage",
        "train\ns",
    )
    rows = []
    for name, numbers in networks.items():
        accuracies = numbers["accuracies"]
        robust = accuracies["autoattack"]
        rows.append(
            (
                name,
                human(numbers["after"]["macs"]),
                human(numbers["after"]["params"]),
                f"{100 * accuracies['clean']['accuracy']:.1f}",
                f"{100 * accuracies['pgd-20']['accuracy']:.1f}",
                f"{100 * robust['accuracy']:.1f} ({100 * robust['low']:.0f} to {100 * robust['high']:.0f})",
                f"{100 * numbers['onnxruntime']['accuracy']:.1f}",
                f"{numbers['onnxruntime']['ms_per_image']:.2f}",
                f"{numbers['train_seconds']:.0f}",
            )
        )
    test = document["data"]["test"]
    title = f"handwritten digits, {test} test images, {THREAT.label()}, seed {document['seed']}"
    return table(title, columns, rows, left=("",))


def _lines(out: Path, document: Mapping[str, Any], tests: Mapping[str, PairedTest], plan: Plan) -> list[str]:
    suite = document["networks"]["none"]["accuracies"]["autoattack"]["suite"]
    lines = [
        f"grape - none under PGD-20:     {tests['grape - none, pgd-20']}",
        f"grape - none under AutoAttack: {tests['grape - none, autoattack']}",
        "Small data, one seed: a difference whose interval holds 0 means nothing, any other needs more seeds.",
        f"AutoAttack: {suite}. onnxruntime gave torch's accuracy; ms per image on one thread.",
        f"Left in {out}: results, ONNX files, quickstart.json and quickstart.png; {document['seconds']:.0f} s in all.",
        f"Next: robustcompress evaluate {out / 'grape'} --compare {out / 'none'}",
        "      robustcompress compress resnet20 --data DIRECTORY_OF_IMAGES --image-size 32 --out my-model",
    ]
    if plan == FAST:
        lines.insert(0, "A smoke run: the networks are hardly trained, and the numbers mean nothing.")
    return lines
