"""A network that lost blocks, in everything around the editor: costs, latency, training, results, commands."""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from torch import nn

import robustcompress as rc
from robustcompress.budget import CostModel
from robustcompress.cli import main
from robustcompress.export.timing import Stopwatch
from robustcompress.latency import LatencyLimit, Timing, fit, layers_of, sample_widths
from robustcompress.result import RESULT, WEIGHTS
from robustcompress.session import Session
from robustcompress.strategies.base import Direction
from robustcompress.structure import Bypass, Edit
from tests.strategies.nets import QUICK_OBJECTIVE, QUICK_RECIPE, same, small_data, state
from tests.strategies.test_resume import until_finished

SPEC = rc.ModelSpec("resnet20", {"width": 0.5, "stem_stride": 2})
EXAMPLE = torch.zeros(2, 3, 16, 16)
BLOCKS = ("layers.0.1", "layers.1.2")


@pytest.fixture(scope="module")
def traced() -> rc.StructuralEditor:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return rc.StructuralEditor(SPEC.build().eval(), EXAMPLE)


@pytest.fixture
def editor(traced: rc.StructuralEditor) -> rc.StructuralEditor:
    return copy.deepcopy(traced)


@dataclass(frozen=True, slots=True, kw_only=True)
class Shorter(rc.Strategy):
    """Blocks leave, one after the other, between phases of training."""

    name: ClassVar[str] = "shorter"
    direction: ClassVar[Direction] = "prune"

    def run(self, session: Session) -> None:
        session.train("pretrain", share=0.5)
        for module in session.decide("blocks that leave", lambda: list(BLOCKS)):
            session.editor.bypass(module)
        session.editor.prune("conv1", range(4))
        session.train("finetune", share=0.5, select=True)


def compress(strategy: rc.Strategy | None = None, **changes: Any) -> rc.CompressResult:
    options: dict[str, Any] = {
        "data": small_data(),
        "epochs": 4.0,
        "objective": QUICK_OBJECTIVE,
        "recipe": QUICK_RECIPE,
        "attacks": (),
        "progress": False,
        "budget": rc.Budget(macs=0.75),
        "round_to": 1,
    }
    return rc.compress(SPEC, strategy or Shorter(), **(options | changes))


@pytest.fixture(scope="module")
def result() -> rc.CompressResult:
    return compress()


@pytest.fixture(scope="module")
def saved(result: rc.CompressResult, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return result.save(tmp_path_factory.mktemp("depth") / "short")


@pytest.fixture(scope="module")
def plain(result: rc.CompressResult) -> rc.CompressResult:
    """The same without any edit."""
    return dataclasses.replace(result, model=SPEC.build().eval(), edits=())


def test_a_saved_result_comes_back_without_its_blocks(result: rc.CompressResult, saved: Path) -> None:
    with safe_open(saved / WEIGHTS, "pt") as file:
        keys = set(file.keys())
    assert keys == set(result.model.state_dict()) and not [k for k in keys if k.startswith(BLOCKS)]
    loaded = rc.load(saved)
    assert loaded.edits == result.edits and [e.module for e in loaded.edits if isinstance(e, Bypass)] == [*BLOCKS]
    x = small_data().test.pixels[:8]
    assert torch.equal(loaded.model(x), result.model(x))
    assert rc.measure(loaded.model, EXAMPLE[:1]).macs == result.after.macs < 0.75 * result.before.macs


def test_results_without_edits_of_the_depth_are_written_as_before(plain: rc.CompressResult, saved: Path) -> None:
    assert plain.to_json()["format"] == 1
    assert json.loads((saved / RESULT).read_text())["format"] == 2


def test_a_run_that_was_stopped_goes_on_without_the_blocks(result: rc.CompressResult, tmp_path: Path) -> None:
    kept: dict[str, Any] = {"checkpoint": tmp_path / "c", "checkpoint_every_s": 0, "deadline": 0}
    resumed, stops = until_finished(lambda: compress(**kept), rc.OutOfTime)
    assert stops >= 3, "also behind the edits"
    assert resumed.edits == result.edits and same(state(resumed.model), state(result.model))


def test_inspect_shows_the_blocks(saved: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(saved), "--json"]) == 0
    document = json.loads(capfd.readouterr().out)
    assert document["bypassed"] == [*BLOCKS]
    assert document["bypassable"] == ["layers.0.0", "layers.0.2", "layers.1.1", "layers.2.1", "layers.2.2"]
    assert not [g for g in document["groups"] if g["name"].startswith(BLOCKS)]
    assert main(["inspect", str(saved)]) == 0
    assert "blocks that have left: layers.0.1, layers.1.2" in capfd.readouterr().out


def test_the_onnx_file_of_a_result_has_no_such_blocks(result: rc.CompressResult, tmp_path: Path) -> None:
    import onnx

    rc.export_onnx(result, tmp_path / "short.onnx")
    convolutions = sum(node.op_type == "Conv" for node in onnx.load(tmp_path / "short.onnx").graph.node)
    assert convolutions == sum(isinstance(m, nn.Conv2d) for m in result.model.modules()) == 21 - 2 * len(BLOCKS)


def test_masks_count_the_channels_of_lost_blocks_as_gone(
    result: rc.CompressResult, plain: rc.CompressResult, traced: rc.StructuralEditor
) -> None:
    widths = {group.name: group.width for group in traced.editable}
    gone = sum(widths[f"{block}.conv1"] for block in BLOCKS) + widths["conv1"] - 4
    assert rc.hamming(result, plain) == pytest.approx(gone / sum(widths.values()))
    assert rc.hamming(result, result) == 0


def test_the_shape_of_a_shortened_result_is_retrained(result: rc.CompressResult) -> None:
    found = rc.Fixed.of(result)
    assert found.bypassed == BLOCKS and found.widths["conv1"] == 4
    again = compress(found, epochs=0.2)
    assert {n: p.shape for n, p in again.model.named_parameters()} == {
        n: p.shape for n, p in result.model.named_parameters()
    }
    with pytest.raises(rc.InputError, match=r"(?s)layers\.1\.0.*cannot be bypassed.*'conv9'"):
        compress(rc.Fixed(bypassed=("layers.1.0",), widths={"conv9": 3}), epochs=0.2)
    with pytest.raises(rc.InputError, match=r"bypassed='layers\.0\.1': give a list"):
        rc.Fixed(bypassed="layers.0.1")  # type: ignore[arg-type]


@settings(max_examples=10, deadline=None)
@given(data=st.data())
def test_predicted_costs_are_measured_costs(data: st.DataObject, traced: rc.StructuralEditor) -> None:
    editor = copy.deepcopy(traced)
    early = data.draw(st.sampled_from([None, *traced.bypassable]))
    if early:
        editor.bypass(early)
    costs = CostModel(editor, EXAMPLE)
    gone = data.draw(st.lists(st.sampled_from(editor.bypassable), unique=True, max_size=4))
    wanted = {g.name: data.draw(st.integers(g.width // 2, g.width)) for g in editor.editable}
    asked = costs.predict(wanted, without=gone)
    for block in gone:
        editor.bypass(block)
    for group in editor.editable:
        editor.prune(group.name, range(wanted[group.name]))
    cost = rc.measure(editor.model, EXAMPLE)
    assert costs.predict(editor.widths) == pytest.approx(asked)
    assert asked[1] == cost.params
    assert asked[0] == pytest.approx(cost.macs, rel=0.005)


@pytest.fixture
def limit(editor: rc.StructuralEditor) -> Iterator[LatencyLimit]:
    """Of a machine on which multiply-adds cost and nothing else does."""
    reference = rc.measure(editor.model, EXAMPLE).macs
    stopwatch = Stopwatch(editor, (3, 16, 16))

    def ms(model: nn.Module) -> float:
        return rc.measure(model, EXAMPLE).macs / reference

    full = editor.widths
    widths = sample_widths(full, dict.fromkeys(full, 1) | {"fc": 10}, full, steps={}, count=40)
    model = fit(layers_of(editor, EXAMPLE), widths, [ms(stopwatch.resized(w)) for w in widths])
    yield LatencyLimit(
        type(model).from_json(json.loads(json.dumps(model.to_json()))),
        0.5,
        lambda w: Timing(ms(stopwatch.resized(w, without=editor.bypassed)), 1.0),
        without=lambda: editor.bypassed,
    )


def test_a_limit_on_latency_knows_that_blocks_have_left(limit: LatencyLimit, editor: rc.StructuralEditor) -> None:
    reference, before = rc.measure(editor.model, EXAMPLE).macs, limit.predict(editor.widths)
    for block in editor.bypassable[:4]:
        editor.bypass(block)
    share = rc.measure(editor.model, EXAMPLE).macs / reference
    assert before == pytest.approx(1.0, abs=0.02) and limit.predict(editor.widths) == pytest.approx(share, rel=0.05)
    now = editor.widths
    chosen = limit.settle("w", lambda: dict(now), decide=lambda _, compute: compute(), say=lambda _: None)
    assert chosen == now
    measured = limit.measured
    editor.bypass(editor.bypassable[-1])
    limit.settle("w", lambda: dict(now), decide=lambda _, compute: compute(), say=lambda _: None)
    assert measured is not None and limit.measured is not None and limit.measured < measured, "measured anew"


def test_a_stopwatch_times_the_network_without_the_blocks(editor: rc.StructuralEditor) -> None:
    stopwatch = Stopwatch(editor, (3, 16, 16))
    for block in BLOCKS:
        editor.bypass(block)
    editor.prune("conv1", range(3))
    made = stopwatch.resized(editor.widths, without=editor.bypassed)
    assert {n: p.shape for n, p in made.named_parameters()} == {n: p.shape for n, p in editor.model.named_parameters()}


def test_gates_and_the_same_edits_go_on_after_a_bypass(editor: rc.StructuralEditor) -> None:
    editor.bypass("layers.0.1")
    x = torch.rand(3, 3, 16, 16)
    with pytest.raises(rc.InputError, match=r"no channel group 'layers\.0\.1\.conv1'"):
        editor.gates({"layers.0.1.conv1": torch.ones(8)})
    kept = {"conv1": [0, 2, 5], "layers.0.2.conv1": [1, 3]}
    gates = {n: torch.zeros(editor.widths[n]).index_fill(0, torch.tensor(keep), 1.0) for n, keep in kept.items()}
    with editor.gates(gates):
        gated = editor.model(x)
    for name, keep in kept.items():
        assert editor.prune(name, keep) == Edit(name, tuple(keep))
    assert torch.allclose(editor.model(x), gated, atol=1e-5)
