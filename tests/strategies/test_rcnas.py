"""RC-NAS from the teacher to the network that wins."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest
import torch
from torch import nn

import robustcompress as rc
from robustcompress.cli import main
from robustcompress.data import DataSplits
from robustcompress.search.hunt import Hunt
from robustcompress.search.policy import Policy
from robustcompress.structure import Bypass, Insert
from tests.strategies.nets import build, make_session, small_data, state

FEW: dict[str, Any] = {"evaluations": 6, "batch": 3, "finalists": 2, "recovery_steps": 1}


def wide() -> nn.Module:
    torch.manual_seed(0)
    return rc.build_model("wrn_16_4", num_classes=10, width=0.125)[0]


def ran(model: nn.Module, *, epochs: float = 4.0, pretrained: bool = False, **options: Any) -> Any:
    session = make_session(model, epochs=epochs, pretrained=pretrained)
    rc.RCNAS(**(FEW | options)).run(session)
    return session


def of(session: Any, event: str) -> list[dict[str, Any]]:
    return [record for record in session.history if record.get("event") == event]


def test_teacher_and_winner_share_the_epochs_and_candidates_recover() -> None:
    session = ran(build("residual"), teacher=0.25, recovery_steps=3, epochs=8.0)
    steps: dict[str, int] = {}
    for record in session.history:
        if "epoch" in record:
            steps[record["phase"]] = record["steps"]
    assert steps == {"teacher": 6, "finetune": 18}
    assert [r["recovery_steps"] for r in of(session, "candidate")] == [3] * 6
    assert [r["recovery_steps"] for r in of(session, "finalist")] == [12] * 2


def test_the_winner_is_what_is_cut_and_trained() -> None:
    session = ran(wide())
    (winner,) = of(session, "winner")
    finalists = of(session, "finalist")
    best = max(finalists, key=lambda record: record["reward"])
    assert winner["config"] == best["config"] and winner["bypassed"] == best["bypassed"]
    assert {n: w for n, w in session.editor.widths.items() if n in best["widths"]} == best["widths"]
    assert list(session.editor.bypassed) == best["bypassed"]
    assert session.cost().macs <= session.limits[0]


@pytest.mark.parametrize("round_to", [1, 2])
def test_what_was_looked_at_is_what_is_built_also_where_groups_grow(
    round_to: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked: list[dict[str, int]] = []

    def narrow_then_wide(self: Hunt, count: int) -> tuple[int, ...]:
        looked.append(dict(self._space.project((1, 0, 1, 0, 1, 8)).widths))
        return (1, 0, 1, 0, 1, 8)

    monkeypatch.setattr(Hunt, "settle", narrow_then_wide)
    session = make_session(wide(), budget=rc.Budget(macs=0.9), round_to=round_to)
    full = session.editor.widths
    rc.RCNAS(**(FEW | {"cap": 2.0, "searcher": "random"})).run(session)
    built = {name: session.editor.widths[name] for name in looked[0]}
    assert built == looked[0]
    assert any(width > full[name] for name, width in built.items())
    assert all(width % round_to == 0 or width == full[name] for name, width in built.items())
    assert session.cost().macs <= session.limits[0]


def test_only_a_teacher_that_may_grow_meets_its_budget_already() -> None:
    settings: dict[str, Any] = {"data": small_data(), "budget": 1.0, "epochs": 0.2, "attacks": (), "progress": False}
    with pytest.raises(rc.BudgetError, match="already meets"):
        rc.compress(wide(), rc.RCNAS(**FEW), **settings)
    rc.compress(wide(), rc.RCNAS(**(FEW | {"cap": 1.5})), recipe=rc.Recipe(batch_size=32, val_images=20), **settings)


def test_a_policys_path_may_be_one_and_its_content_counts(tmp_path: Any) -> None:
    path = Policy(seed=1).save(tmp_path / "p.safetensors")
    strategy = rc.RCNAS(**FEW, policy=path)
    assert json.loads(json.dumps(strategy.to_json()))["policy"] == str(path)
    first = strategy.identity()
    Policy(seed=2).save(path)
    assert (
        strategy.identity()
        != first
        == rc.RCNAS(**FEW, policy=str(path), workers=2).identity() | {"policy": first["policy"]}
    )
    session = make_session(wide(), epochs=0.2)
    strategy.run(session)
    assert of(session, "winner")


def test_finalists_of_penalised_candidates_are_different_networks() -> None:
    keys = [
        str(record["widths"]) + str(record["bypassed"])
        for record in of(ran(wide(), feasibility="penalty", evaluations=12, finalists=4), "finalist")
    ]
    assert len(keys) == len(set(keys)) > 1


def test_a_huge_seed_is_a_seed() -> None:
    session = make_session(build("residual"), epochs=0.2, seed=1_900_000_000_000)
    rc.RCNAS(**FEW).run(session)


def test_uniform_and_the_rule_are_always_looked_at() -> None:
    session = ran(wide())
    first, second = of(session, "candidate")[:2]
    assert first["bypassed"] == second["bypassed"] == []
    scaled = make_session(wide(), epochs=0.1)
    rc.Scaling().run(scaled)
    assert second["widths"] == {group.name: group.width for group in scaled.editor.editable}
    uniform = make_session(wide(), epochs=0.1)
    rc.Uniform().run(uniform)
    assert first["widths"] == {group.name: group.width for group in uniform.editor.editable}


@pytest.mark.parametrize("batch", [1, 2, 6])
def test_whatever_the_batch_the_first_two_are_first(batch: int) -> None:
    looked = of(ran(wide(), batch=batch), "candidate")
    assert [record["config"] for record in looked[:2]] == [[1, 8, 1, 8, 1, 8], [1, 8, 1, 8, 1, 2]]


def test_depth_is_searched_unless_it_may_not_be() -> None:
    looked = of(ran(wide(), evaluations=12), "candidate")
    assert any(record["bypassed"] for record in looked) and not all(record["bypassed"] for record in looked)
    assert not any(record["bypassed"] for record in of(ran(wide(), depth=False), "candidate"))


def test_a_shorter_network_is_saved_and_loaded(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def shortest(self: Hunt, count: int) -> tuple[int, ...]:
        return tuple(0 if c.kind == "depth" else len(c.options) - 1 for c in self._space.domain.coordinates)

    monkeypatch.setattr(Hunt, "settle", shortest)
    result = rc.compress(
        wide(),
        rc.RCNAS(**FEW),
        data=small_data(),
        epochs=1.0,
        recipe=rc.Recipe(batch_size=32, val_images=20),
        attacks=(),
        progress=False,
    )
    assert sum(isinstance(edit, Bypass) for edit in result.edits) == 2
    result.save(tmp_path / "out")
    again = rc.load(tmp_path / "out", model=wide)
    images = small_data().test.as_float()
    assert torch.equal(again.model(images), result.model(images))
    assert result.meets_budget


def test_a_robust_reference_is_its_own_teacher() -> None:
    session = ran(build("residual"), pretrained=True, epochs=8.0)
    phases = {record["phase"] for record in session.history if "epoch" in record}
    assert phases == {"finetune"}
    assert session.history[-1]["steps"] == 24, "the epochs that the teacher would have had go to the winner"


def test_penalised_candidates_may_be_over_the_budget_and_the_winner_is_not() -> None:
    session = ran(wide(), feasibility="penalty", evaluations=12)
    looked = of(session, "candidate")
    over = [record for record in looked if record["macs"] > session.limits[0]]
    assert over and looked[0] in over, "the whole network is over any budget"
    assert all(record["reward"] < 0.01 for record in over if record is looked[-1])
    assert session.cost().macs <= session.limits[0]


def test_several_workers_find_what_one_finds() -> None:
    one, three = ran(wide()), ran(wide(), workers=3)
    assert of(one, "candidate") == of(three, "candidate")
    assert of(one, "winner") == of(three, "winner")
    assert all(torch.equal(a, b) for a, b in zip(state(one.model).values(), state(three.model).values(), strict=True))


def test_a_network_without_anything_to_choose_is_scaled() -> None:
    class One(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.fc = nn.Conv2d(3, 16, 3, padding=1), nn.Linear(16, 10)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.fc(torch.relu(self.conv(x)).mean((2, 3)))

    session = ran(One())
    assert not of(session, "candidate") and session.cost().macs <= session.limits[0]


@pytest.mark.parametrize("trained", [False, True])
def test_a_teacher_that_only_guesses_is_warned_of(trained: bool, capfd: pytest.CaptureFixture[str]) -> None:
    rc.compress(
        build("chain"),
        rc.RCNAS(**FEW),
        data=small_data(),
        epochs=25 if trained else 0.2,
        recipe=rc.Recipe(batch_size=32, val_images=20),
        attacks=(),
    )
    said = capfd.readouterr().err
    robust = float(said.partition(" % clean and ")[2].partition(" %")[0])
    assert ("no more robust than guessing" in said) == (robust <= 10)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"searcher": "reinforced"}, r"searcher='reinforced' does not exist; did you mean 'reinforce'"),
        ({"evaluations": 0}, "evaluations=0: must be a whole number"),
        ({"teacher": 1.0}, "teacher=1.0: must be a number in"),
        ({"recovery": "none"}, "recovery='none' does not exist"),
        ({"feasibility": "hope"}, "feasibility='hope' does not exist"),
        ({"alpha": 1.5}, r"alpha=1.5: must be a number in \[0, 1\]"),
        ({"depth": 1}, "depth=1: must be true or false"),
        ({"policy": "p", "searcher": "random"}, "only searcher='reinforce'"),
        ({"policy": 3}, "policy=3: must be the path"),
        ({"policy": "nowhere.safetensors"}, "nowhere.safetensors"),
        ({"workers": 0, "finalists": True}, r"finalists=True.*\n.*workers=0"),
    ],
    ids=str,
)
def test_bad_options_are_named(wrong: dict[str, Any], said: str) -> None:
    with pytest.raises(rc.InputError, match=said):
        rc.RCNAS(**wrong)


def test_without_validation_images_there_is_nothing_to_search_by() -> None:
    data = small_data()
    empty = dataclasses.replace(data, val=data.val.first(0)) if isinstance(data, DataSplits) else data
    with pytest.raises(rc.InputError, match="validation split, which is empty"):
        rc.RCNAS(**FEW).run(make_session(build("chain"), data=empty))


def test_types_of_blocks_are_searched_and_the_winners_are_built(monkeypatch: pytest.MonkeyPatch) -> None:
    looked: list[Any] = []

    def typed(self: Hunt, count: int) -> tuple[int, ...]:
        config = tuple(
            {"depth": 0, "width": 8, "block": (1, 0, 2)[c.stage]}[c.kind] for c in self._space.domain.coordinates
        )
        looked.append(self._space.project(config))
        return config

    monkeypatch.setattr(Hunt, "settle", typed)
    session = make_session(wide(), budget=rc.Budget(macs=0.6))
    rc.RCNAS(**(FEW | {"evaluations": 12}), blocks=["plain", "se", "rir"]).run(session)
    candidates = of(session, "candidate")
    assert "inserted" not in candidates[0] and "inserted" not in candidates[1], "uniform, and the rule, are plain"
    kinds = {kind for record in candidates for _, kind in record.get("inserted", ())}
    assert kinds == {"se", "rir"}
    assert all(record["macs"] <= session.limits[0] for record in candidates)
    (winner,) = of(session, "winner")
    (architecture,) = looked
    assert winner["inserted"] == [list(pick) for pick in architecture.inserted]
    assert [(e.module, e.kind) for e in session.editor.inserted] == [*architecture.inserted]
    assert {kind for _, kind in architecture.inserted} == {"se", "rir"}
    assert {group.name: group.width for group in session.editor.editable} == architecture.widths
    assert session.cost().macs <= session.limits[0]
    trained = {n: p for n, p in session.model.named_parameters() if ".se." in n or ".rir." in n}
    assert trained and all(float(p.detach().abs().max()) > 0 for n, p in trained.items() if n.endswith("weight"))


def test_plain_blocks_alone_are_the_search_as_it_was() -> None:
    first, again = ran(wide()), ran(wide(), blocks=("plain",))
    assert of(first, "candidate") == of(again, "candidate") and "inserted" not in of(first, "winner")[0]
    assert all(torch.equal(a, b) for a, b in zip(state(first.model).values(), state(again.model).values(), strict=True))
    assert "blocks" not in rc.RCNAS().identity() and rc.RCNAS(blocks=("plain", "se")).identity()["blocks"]


def test_types_that_cannot_be_are_refused() -> None:
    with pytest.raises(rc.InputError, match=r"blocks names 'sse', which does not exist; did you mean 'se'"):
        rc.RCNAS(blocks=("plain", "sse"))
    with pytest.raises(rc.InputError, match="name each type once, and 'plain' among them"):
        rc.RCNAS(blocks=("se",))
    with pytest.raises(rc.InputError, match="give a list of types"):
        rc.RCNAS(blocks="se")  # type: ignore[arg-type]
    settings: dict[str, Any] = {"data": small_data(), "budget": rc.Budget(latency=0.5), "progress": False}
    for strategy in (rc.RCNAS(**FEW, blocks=("plain", "se")), rc.Fixed(inserted=(("layers.0.0", "se"),))):
        with pytest.raises(rc.InputError, match=f"{strategy.name} cannot run: .*is not predicted"):
            rc.compress(wide(), strategy, **settings)
    with pytest.raises(rc.InputError, match="no residual branch over images"):
        rc.RCNAS(**FEW, blocks=("plain", "se")).run(make_session(build("chain")))


def test_a_typed_result_is_saved_loaded_and_retrained(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def typed(self: Hunt, count: int) -> tuple[int, ...]:
        return tuple(1 if c.kind == "block" else len(c.options) - 1 for c in self._space.domain.coordinates)

    monkeypatch.setattr(Hunt, "settle", typed)
    settings: dict[str, Any] = {"data": small_data(), "attacks": (), "progress": False, "round_to": 1}
    settings |= {"recipe": rc.Recipe(batch_size=32, val_images=20), "epochs": 1.0}
    spec = rc.ModelSpec("resnet8", {"stem_stride": 4, "width": 0.5})
    result = rc.compress(spec, rc.RCNAS(**FEW, blocks=("plain", "se", "rir")), **settings)
    assert [e.kind for e in result.edits if isinstance(e, Insert)] == ["se"] * 3
    assert result.to_json()["format"] == 3 and dataclasses.replace(result, edits=()).to_json()["format"] == 1
    loaded = rc.load(result.save(tmp_path / "typed"))
    x = small_data().test.pixels[:8]
    assert loaded.edits == result.edits and torch.equal(loaded.model(x), result.model(x))
    fixed = rc.Fixed.of(loaded)
    assert fixed == dataclasses.replace(
        fixed, inserted=[["layers.0.0", "se"], ["layers.1.0", "se"], ["layers.2.0", "se"]]
    )
    again = rc.compress(spec, fixed, **settings)
    assert again.after.macs == result.after.macs and again.after.params == result.after.params
    assert [e for e in again.edits if isinstance(e, Insert)] == [e for e in result.edits if isinstance(e, Insert)]
    assert rc.hamming(result, result) == 0 < rc.hamming(result, again), "from scratch the first channels stay"
    assert main(["inspect", str(tmp_path / "typed"), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["inserted"] == [["layers.0.0", "se"], ["layers.1.0", "se"], ["layers.2.0", "se"]]
    assert main(["inspect", str(tmp_path / "typed")]) == 0
    said = capsys.readouterr().out
    assert "parts that were inserted: se: layers.0.0, layers.1.0, layers.2.0" in said and "block types" in said
    path = tmp_path / "typed" / "result.json"
    path.write_text(path.read_text().replace('"kind": "se"', '"kind": "sse"'))
    with pytest.raises(rc.ResultError, match=r"the edits in .* do not fit the reference model: .*'sse' does not exist"):
        rc.load(tmp_path / "typed")
