from __future__ import annotations

import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from robustcompress.errors import InputError, ResultError
from robustcompress.robust import AttackResult, RobustReport, ThreatModel, wilson

flags = st.lists(st.booleans(), min_size=1, max_size=40).map(lambda x: torch.tensor(x, dtype=torch.bool))


def result(name, correct, **more):
    return AttackResult(name=name, correct=torch.as_tensor(correct, dtype=torch.bool), seconds=1.5, **more)


def report(*results, **more):
    n = results[0].n
    return RobustReport(
        threat=ThreatModel(),
        n=n,
        seed=3,
        attacks=results,
        images_sha256="ab" * 32,
        indices=torch.arange(n).flip(0),
        **more,
    )


@pytest.fixture
def full():
    return report(
        result("clean", [1, 1, 1, 0]),
        result("pgd-20", [1, 0, 1, 0], max_perturbation=8 / 255),
        result("autoattack", [0, 1], suite="standard", broken_by={"apgd-ce": 1, "square": 0}),
        warnings=("gradients <mislead>",),
    )


@given(flags, flags)
@settings(deadline=None, max_examples=30)
def test_json_round_trip(a, b):
    before = report(result("clean", a), result("autoattack", b[: len(a)], suite="standard", broken_by={"square": 2}))
    after = RobustReport.from_json(json.loads(json.dumps(before.to_json())))
    assert after == before
    for old, new in zip(before.attacks, after.attacks, strict=True):
        assert torch.equal(old.correct, new.correct)
    assert torch.equal(before.indices, after.indices)


def test_numbers_follow_from_the_flags(full):
    pgd = full.result("pgd-20")
    assert (pgd.n, pgd.accuracy) == (4, 0.5)
    assert (pgd.low, pgd.high) == wilson(2, 4)
    assert full.clean_accuracy == 0.75
    assert full.robust_accuracy == 0.5


def test_worst_case_is_over_what_all_judged(full):
    assert full.worst_case.correct.tolist() == [
        False,
        False,
    ]  # each image is broken by one attack or the other
    assert full.worst_case.max_perturbation == 8 / 255
    assert full.result("worst case") == full.worst_case


def test_no_other_attack_stands_in_for_autoattack(full):
    weaker = report(result("clean", [1, 1]), result("pgd-20", [1, 0]))
    assert weaker.robust_accuracy is None
    assert "AutoAttack was not run" in str(weaker)
    assert "AutoAttack was not run" not in str(full)
    assert "AutoAttack judged 2 of 4 images" in str(full)


def test_text_is_a_table(full):
    lines = str(full).splitlines()
    assert lines[0] == "robustness under linf 8/255, 4 images, seed 3"
    assert lines[1].split("  ")[0] == "attack"
    table = lines[1:6]
    assert len({len(line) for line in table}) == 1
    assert [line.split()[0] for line in table] == ["attack", "clean", "pgd-20", "autoattack", "worst"]
    assert "50.00" in table[2] and "15.0 to 85.0" in table[2]
    assert lines[-1] == "warning: gradients <mislead>"


def test_html_escapes_and_says_the_same(full):
    page = full._repr_html_()
    assert page.count("<tr>") == 5
    assert "gradients &lt;mislead&gt;" in page
    assert "<mislead>" not in page


def test_unknown_attack_offers_the_nearest(full):
    with pytest.raises(InputError, match="did you mean 'pgd-20'"):
        full.result("pgd20")


def test_equality_looks_at_every_flag(full):
    assert report(result("clean", [1, 0])) == report(result("clean", [1, 0]))
    assert report(result("clean", [1, 0])) != report(result("clean", [0, 1]))
    assert full != "report"


def test_an_attack_that_judged_nothing_has_no_accuracy():
    empty = result("autoattack", [])
    assert math.isnan(empty.accuracy)
    assert (empty.low, empty.high) == (0.0, 1.0)
    assert AttackResult.from_json(json.loads(json.dumps(empty.to_json()))) == empty


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("format",), 2, "format 2"),
        (("attacks", 1, "correct"), "1111", "do not give the stated accuracy"),
        (("attacks", 1, "correct"), "101", "do not give the stated accuracy"),
        (("attacks", 1, "correct"), "1012", "string of 0 and 1"),
        (("attacks", 1, "accuracy"), 0.9, "do not give the stated accuracy"),
        (("attacks", 1, "broken_by"), None, "not the result of an attack"),
        (("attacks",), [], "incomplete"),
        (("indices",), [0], "incomplete"),
        (("threat", "eps"), 8, "not a robust report"),
        (("n",), None, "not a robust report"),
    ],
)
def test_damaged_json_is_refused(full, path, value, message):
    data = full.to_json()
    place = data
    for step in path[:-1]:
        place = place[step]
    place[path[-1]] = value
    with pytest.raises(ResultError, match=message):
        RobustReport.from_json(data)
