from __future__ import annotations

import json
import math
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from onnx import TensorProto
from torch import Tensor, nn

import robustcompress as rc
from robustcompress.artefact import ArtefactReport, CurvePoint, open_onnx, plot_curve, verify_artefact
from robustcompress.artefact.corruptions import corrupt
from robustcompress.artefact.curve import unbounded
from robustcompress.artefact.doubts import flag_curve, flag_parity, flag_square, flag_stored
from robustcompress.artefact.jury import as_kept
from robustcompress.errors import InputError
from robustcompress.export import ParityCheck
from robustcompress.robust import AttackResult, RobustReport
from tests.artefact.nets import SIDE, Linear, Lying, linear_data, linear_file, small

EPS = 8 / 255
THREAT = rc.ThreatModel("linf", EPS)


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return linear_file(tmp_path_factory.mktemp("verify") / "linear.onnx")


@pytest.fixture(scope="module")
def data() -> tuple[Tensor, Tensor, Tensor]:
    return linear_data(60, EPS)


def verify(path: Path, data: tuple[Tensor, Tensor, Tensor], **settings: Any) -> ArtefactReport:
    return verify_artefact(path, data[:2], settings.pop("threat", THREAT), threads=1, **settings)


def flags(name: str, count: int, right: int) -> AttackResult:
    return AttackResult(name=name, correct=torch.arange(count) < right, seconds=0.0)


@pytest.mark.parametrize("kind", [TensorProto.FLOAT, TensorProto.UINT8])
def test_the_worst_case_of_a_linear_file_is_found_exactly(
    tmp_path: Path, data: tuple[Tensor, Tensor, Tensor], kind: int
) -> None:
    path = linear_file(tmp_path / "linear.onnx", kind)
    report = verify(path, data, twin=Linear(), attacks=["fgsm", "square-200"])
    order = report.robust.indices
    assert report.clean_accuracy == 1.0
    assert torch.equal(report.robust.result("fgsm on the twin").correct, data[2][order])  # FGSM is the optimum here
    square = report.robust.result("square-200").correct
    assert bool(square[data[2][order]].all())
    assert torch.equal(report.worst_case.correct, data[2][order])
    assert all(result.max_perturbation <= THREAT.limit for result in report.robust.attacks)
    assert max(check.relative_diff for check in report.parity) < 1e-5
    assert not report.warnings
    assert report.worst_case.low < report.worst_case.accuracy < report.worst_case.high


def test_a_twin_that_lies_about_its_gradient_is_caught_by_square(
    file: Path, data: tuple[Tensor, Tensor, Tensor]
) -> None:
    report = verify(file, data, twin=Lying(Linear()), attacks=["pgd-10", "square-200"], curve=True)
    assert max(check.relative_diff for check in report.parity) < 1e-5  # its scores are the very same
    assert report.robust.result("pgd-10 on the twin").accuracy == 1.0
    assert report.robust.result("square-200").accuracy < 0.7
    assert report.worst_case.accuracy < 0.7
    said = "\n".join(report.warnings)
    assert "Square, which sees no gradient" in said and "plain grey" in said


def test_another_networks_twin_is_noticed(file: Path, data: tuple[Tensor, Tensor, Tensor]) -> None:
    report = verify(file, data, twin=Linear(seed=7), attacks=["pgd-3", "square-20"])
    assert "is not what its twin computes" in "\n".join(report.warnings)


def test_without_a_twin_square_alone_judges_and_it_is_said(file: Path, data: tuple[Tensor, Tensor, Tensor]) -> None:
    report = verify(file, data, max_images=30, attack_images=10)
    assert [result.name for result in report.robust.attacks] == ["clean", "square-1000"]
    assert report.worst_case.n == 10 and report.robust.n == 30
    said = "\n".join(report.remarks())
    assert "no torch twin" in said and "judged 10 of 30" in said and "no certificate" in said
    assert len(report.queries["square-1000"]) == 10 - int(report.robust.result("square-1000").correct.sum())


def test_images_of_other_models_are_tried_too(tmp_path: Path, file: Path, data: tuple[Tensor, Tensor, Tensor]) -> None:
    class Twisted(Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * 3

    sources = {"dense": Twisted(), "other": open_onnx(linear_file(tmp_path / "other.onnx"))}
    report = verify(file, data, attacks=["square-5"], transfer_from=sources, attack_images=20)
    assert torch.equal(report.robust.result("pgd-20 on dense").correct, data[2][report.robust.indices])
    assert report.robust.result("square-1000 on other").accuracy < 0.75
    weak = verify(file, data, twin=Lying(Linear()), attacks=["fgsm", "square-200"])
    assert not weak.warnings  # one step may lose to Square with honest gradients too


def test_the_curve_falls_to_nothing_and_is_drawn(
    tmp_path: Path, file: Path, data: tuple[Tensor, Tensor, Tensor]
) -> None:
    report = verify(file, data, twin=Linear(), attacks=["fgsm"], curve=True)
    accuracies = [point.result.accuracy for point in report.curve]
    assert [round(point.eps / EPS, 3) for point in report.curve[:-1]] == [0, 0.25, 0.5, 1, 2, 4]
    assert report.curve[-1].eps == 0.5 and report.curve[-1].unbounded
    assert accuracies == sorted(accuracies, reverse=True) and accuracies[0] == 1 and accuracies[-1] == 0
    assert not report.warnings
    assert plot_curve(report, tmp_path / "curve.png").stat().st_size > 5000
    with pytest.raises(InputError, match="no security curve"):
        plot_curve(verify(file, data, attacks=["square-2"], max_images=2), tmp_path / "none.png")
    assert unbounded(rc.ThreatModel("l2", 0.5), torch.Size([3, 4, 4])) == pytest.approx(math.sqrt(48) / 2)


def test_what_is_kept_of_a_chunk_has_all_that_is_needed() -> None:
    kept = {"right": [True, False], "furthest": 0.1, "seconds": 1, "queries": [7]}
    assert as_kept(kept, 2, counted=True) == kept
    for broken in ({}, {"queries": []}, {"queries": [7.5]}, {"queries": None}, {"right": [1, 0]}, {"furthest": "x"}):
        spoilt = {key: value for key, value in kept.items() if broken or key != "queries"} | broken
        assert as_kept(spoilt, 2, counted=True) is None
    assert as_kept(kept, 3) is None and as_kept([kept], 2) is None
    assert as_kept({key: kept[key] for key in ("right", "furthest", "seconds")}, 2) is not None


def test_corruptions_stop_too(file: Path, data: tuple[Tensor, Tensor, Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    from robustcompress.artefact import verify as verifying

    asked: list[int] = []

    def signalled(*rest: Any, **options: Any) -> Any:
        if not asked:
            asked.append(1)
            signal.raise_signal(signal.SIGTERM)
        return corrupt(*rest, **options)

    monkeypatch.setattr(verifying, "corrupt", signalled)
    with rc.graceful(), pytest.raises(rc.Interrupted, match=r"before corruption .*; those before it are made anew"):
        verify(file, data, attacks=["square-2"], max_images=4, corruptions=True)


def test_a_signal_stops_it_after_its_chunk(tmp_path: Path, file: Path, data: tuple[Tensor, Tensor, Tensor]) -> None:
    seen: list[str] = []

    def ask(step: rc.robust.EvaluationProgress) -> None:
        seen.append(step.attack)
        if seen.count("square-40") == 1:
            signal.raise_signal(signal.SIGINT)

    options = {"twin": Linear(), "attacks": ["pgd-3", "square-40"], "keep": tmp_path / "kept"}
    with rc.graceful(), pytest.raises(rc.Interrupted, match=r"after 32 of .* images of square-40; .* is kept in"):
        verify(file, data, progress=ask, **options)
    assert len(list((tmp_path / "kept").iterdir())) == 3
    assert verify(file, data, **options).robust.result("square-40").n == len(data[2])


def test_a_stopped_run_goes_on_where_it_was(tmp_path: Path, file: Path, data: tuple[Tensor, Tensor, Tensor]) -> None:
    whole = verify(file, data, twin=Linear(), attacks=["pgd-3", "square-40"])
    calls = 0

    def stop(step: object) -> None:
        nonlocal calls
        calls += 1
        if calls == 4:  # clean, two chunks of PGD, one of Square
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        verify(file, data, twin=Linear(), attacks=["pgd-3", "square-40"], keep=tmp_path / "kept", progress=stop)
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "kept").iterdir()}
    assert len(kept) == 3
    again = verify(file, data, twin=Linear(), attacks=["pgd-3", "square-40"], keep=tmp_path / "kept")
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    for name in ("clean", "pgd-3 on the twin", "square-40"):
        assert torch.equal(again.robust.result(name).correct, whole.robust.result(name).correct)
    for path in kept:
        path.write_text("torn")
    third = verify(file, data, twin=Linear(), attacks=["pgd-3", "square-40"], keep=tmp_path / "kept")
    assert torch.equal(third.worst_case.correct, whole.worst_case.correct)
    other = verify(file, data, twin=Linear(), attacks=["square-40"], keep=tmp_path / "kept", seed=1)
    assert other.robust != third.robust


def test_corruptions_are_judged_by_the_file(file: Path, data: tuple[Tensor, Tensor, Tensor]) -> None:
    report = verify(file, data, attacks=["square-2"], corruptions=True, max_images=20)
    assert len(report.corruptions) == 14 and all(len(row) == 5 for row in report.corruptions.values())
    values = [value for row in report.corruptions.values() for value in row]
    assert report.corruption_accuracy == pytest.approx(sum(values) / 70) and min(values) < 1
    assert "no published mCE" in "\n".join(report.notes)


def test_the_report_is_plain_json_and_its_robust_part_is_read_back(
    file: Path, data: tuple[Tensor, Tensor, Tensor]
) -> None:
    report = verify(file, data, twin=Linear(), curve=True, max_images=12)
    document = json.loads(json.dumps(report.to_json(), allow_nan=False))
    assert RobustReport.from_json(document["robust"]) == report.robust
    assert document["file"]["sha256"] == open_onnx(file).sha256() and document["file"]["name"] == "linear.onnx"
    assert str(file.parent) not in json.dumps(document)
    assert document["worst_case"]["n"] == 12 and report.headline() in str(report)
    test = rc.compare(report.robust, verify(file, data, attacks=["square"], max_images=12).robust, attack="square-1000")
    assert test.n == 12 and test.difference == 0


def test_doubts_are_said_where_there_is_reason_and_only_there() -> None:
    points = [CurvePoint(eps=e, result=flags("curve", 100, n)) for e, n in ((0, 90), (0.1, 40), (0.2, 70))]
    assert "rises with the radius" in flag_curve(points)[0]
    assert not flag_curve([points[0], points[1]])
    assert not flag_curve([points[0], CurvePoint(eps=0.5, result=flags("curve", 100, 3), unbounded=True)])
    assert "plain grey" in flag_curve([CurvePoint(eps=0.5, result=flags("curve", 100, 40), unbounded=True)])[0]
    assert flag_square([flags("square", 100, 30)], [flags("pgd", 100, 60)])
    assert not flag_square([flags("square", 100, 58)], [flags("pgd", 100, 60)])
    assert not flag_square([flags("square", 100, 60)], [flags("pgd", 100, 30)])
    assert not flag_square([flags("square", 100, 60)], [])
    check = ParityCheck(name="clean", batch=1, images=4, max_abs_diff=0.1, scale=1, argmax_agreement=1)
    assert flag_parity([check], "float32") and not flag_parity([check], "int8")
    stored = {"accuracy": json.dumps([{"attack": "clean", "accuracy": 0.9, "low": 0.85, "high": 0.94}])}
    assert flag_stored(stored, flags("clean", 100, 40)) and not flag_stored(stored, flags("clean", 100, 88))
    assert not flag_stored({"accuracy": "]["}, flags("clean", 100, 40)) and not flag_stored({}, flags("clean", 1, 0))


class Blunt(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.zeros(len(x), 2)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"attacks": ["pgd-20"]}, "needs gradients"),
        ({"attacks": ["sqare"]}, "did you mean 'square'"),
        ({"attacks": []}, "no attack is named"),
        ({"max_images": 0, "attack_images": -1}, "max_images=0"),
        ({"twin": Blunt()}, "no gradient reaches"),
        ({"twin": small()}, "10 logits, the file 2 scores"),
        ({"transfer_from": {"dense": small()}}, "dense has 10 logits"),
        ({"threat": None}, "does not say what it should withstand"),
        ({"threat": rc.ThreatModel("l2", 200.0)}, "reaches every image"),
    ],
)
def test_what_cannot_work_is_said_before_any_attack(
    tmp_path: Path, file: Path, data: tuple[Tensor, Tensor, Tensor], settings: dict[str, Any], said: str
) -> None:
    with pytest.raises(InputError, match=said):
        verify(file, data, keep=tmp_path / "kept", **settings)
    assert not (tmp_path / "kept").exists()


def test_images_that_do_not_fit_are_said(tmp_path: Path, file: Path, data: tuple[Tensor, Tensor, Tensor]) -> None:
    pixels, labels, _ = data
    for pair, said in (
        ((pixels[:, :, :4], labels), "the file is for 3x8x8"),
        ((pixels.float(), labels), "divide by 255"),
        ((pixels, labels + 5), "made for other classes"),
        ((pixels, labels[:3]), "60 images but 3 labels"),
        (rc.load_data("digits"), "3x8x8"),
        ("digits", "data is str"),
    ):
        with pytest.raises(InputError, match=said):
            verify_artefact(file, pair, THREAT)  # type: ignore[arg-type]
    bytes_file = linear_file(tmp_path / "bytes.onnx", TensorProto.UINT8)
    with pytest.raises(InputError, match="reads bytes"):
        verify(bytes_file, data, threat=rc.ThreatModel("linf", 0.5 / 255))
    named = linear_file(tmp_path / "named.onnx", metadata={"classes": '["cat", "dog"]'})
    with pytest.raises(InputError, match="classes apart"):
        verify_artefact(named, rc.load_data("digits", image_size=SIDE), THREAT)
