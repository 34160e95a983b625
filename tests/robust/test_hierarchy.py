"""Distances against trees small enough to count by hand, and what an evaluation makes of them."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from robustcompress.errors import InputError, ResultError
from robustcompress.robust import (
    AttackResult,
    AttackSpec,
    AutoAttackConfig,
    RobustReport,
    Severity,
    ThreatModel,
    evaluate,
    hierarchy_from,
)
from robustcompress.robust.hierarchy import SHIPPED

TREE = {
    "name": "small",
    "classes": ["cat", "truck", "dog", "frog"],
    "tree": {"animal": {"mammal": ["cat", "dog"], "frog": None}, "truck": None},
}
THREAT = ThreatModel("linf", 8 / 255)


def test_distances_are_heights_of_common_ancestors():
    found = hierarchy_from(TREE)
    by_name = {
        frozenset({"cat", "dog"}): 1,  # mammals
        frozenset({"cat", "frog"}): 2,  # animals
        frozenset({"dog", "frog"}): 2,
        frozenset({"cat", "truck"}): 3,  # the whole tree
        frozenset({"dog", "truck"}): 3,
        frozenset({"frog", "truck"}): 3,
    }
    for i, a in enumerate(found.classes):
        for j, b in enumerate(found.classes):
            assert found.distances[i, j] == (0 if i == j else by_name[frozenset({a, b})])
    assert found.chance == pytest.approx((1 + 2 + 2 + 3 + 3 + 3) / 6)


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_trees_are_ultrametric(name):
    found = hierarchy_from(name)
    d = found.distances
    assert found.name == name and len(found.classes) == 10 and torch.equal(d, d.T)
    assert bool(((d == 0) == torch.eye(10, dtype=torch.bool)).all())
    for k in range(10):
        assert bool((d <= torch.maximum(d[:, k, None], d[None, k])).all()), "of three classes, two are equally far"
    assert hierarchy_from(json.loads(json.dumps(found.to_json()))) == found


def test_what_is_shipped_fits_its_data():
    assert hierarchy_from("cifar10").classes[3] == "cat" and hierarchy_from("digits").classes[7] == "7"
    cifar = hierarchy_from("cifar10")
    names = {name: i for i, name in enumerate(cifar.classes)}
    d = cifar.distances
    assert d[names["cat"], names["dog"]] < d[names["cat"], names["horse"]] < d[names["cat"], names["truck"]]


paths = st.lists(st.lists(st.sampled_from("xyz"), max_size=3), min_size=2, max_size=8)


@given(paths)
@settings(deadline=None, max_examples=40)
def test_json_round_trip(groups):
    classes = [f"class {i}" for i in range(len(groups))]
    tree: dict = {}
    for name, groups_of in zip(classes, groups, strict=True):
        node = tree
        for group in groups_of:
            node = node.setdefault(group, {})
        node[name] = None
    found = hierarchy_from({"classes": classes, "tree": tree})
    assert hierarchy_from(json.loads(json.dumps(found.to_json()))) == found
    assert found.paths == tuple(map(tuple, groups))


def test_labels_may_come_in_another_order():
    found = hierarchy_from(TREE).ordered(["dog", "cat", "frog", "truck"])
    assert found.distances[0, 1] == 1 and found.distances[0, 3] == 3 and found.classes[0] == "dog"
    unnamed = hierarchy_from(TREE)
    assert unnamed.ordered(["0", "1", "2", "3"]) is unnamed
    with pytest.raises(InputError, match=r"does not know 'cow'.*\n.*the data do not, 'truck'"):
        unnamed.ordered(["dog", "cat", "frog", "cow"])


def _deep(levels):
    return {"a": None, "g": ["b"]} if not levels else {"g": _deep(levels - 1)}


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("cifar", "cannot be read .*did you mean 'cifar10'"),
        ({"tree": {}}, "'classes' must be a list"),
        ({"classes": ["a", "b"]}, "'tree' must be a mapping"),
        ({"classes": ["a", "b"], "tree": {"a": None}}, "class 'b' is not in the tree"),
        ({"classes": ["a", "b"], "tree": {"a": None, "g": ["a", "b"]}}, "'a' is in the tree twice"),
        ({"classes": ["apple", "b"], "tree": {"appel": None, "b": None}}, "did you mean 'apple'"),
        ({"classes": ["a", "b"], "tree": {"g": ["a", 3], "b": None}}, "a list holds names"),
        ({"classes": ["a", "b"], "tree": {"g": 3}}, "give a mapping, a list of classes, or null"),
        ({"classes": ["a"], "tree": {"a": None}}, "give two or more"),
        ({"classes": ["a", "a"], "tree": {"a": None}}, "'a' is there twice"),
        ({"classes": ["a", "b"], "tree": _deep(60)}, "more than 50 levels"),
        (3, "'tree' must be a mapping"),
    ],
)
def test_bad_hierarchies(source, message):
    with pytest.raises(InputError, match=message):
        hierarchy_from(source)


def test_files(tmp_path):
    path = tmp_path / "pets.json"
    path.write_text(json.dumps({key: TREE[key] for key in ("classes", "tree")}))
    assert hierarchy_from(path).name == hierarchy_from(str(path)).name == "pets"
    path.write_text("{")
    with pytest.raises(InputError, match="is no JSON"):
        hierarchy_from(path)


def test_severity_counts_mistakes():
    d = hierarchy_from(TREE).distances
    y = torch.tensor([0, 0, 0, 1, 2, 3])
    found = Severity.of(d, y, torch.tensor([0, 2, 1, 1, 0, 0]))  # right, mammal, whole, right, mammal, animal
    assert found.counts == ((1.0, 2), (2.0, 1), (3.0, 1)) and found.errors == 4
    values = torch.tensor([1.0, 3.0, 1.0, 2.0])
    assert found.mean == pytest.approx(float(values.mean()))
    assert found.error == pytest.approx(float(values.std() / 2))
    both = found + Severity(((1.0, 1), (2.5, 2)))
    assert both.counts == ((1.0, 3), (2.0, 1), (2.5, 2), (3.0, 1))
    assert Severity.from_json(json.loads(json.dumps(both.to_json()))) == both
    assert not Severity().errors and Severity().mean != Severity().mean
    for bad in ([[1]], [["x", 1]], [[0, 1]], [[1, 0]], 3):
        with pytest.raises(ResultError, match="no distances of mistakes"):
            Severity.from_json(bad)


@pytest.fixture
def judged(mlp, images):
    model = mlp(4, gain=3.0)
    with torch.no_grad():
        predicted = model(images).argmax(1)
    labels = predicted.clone()
    labels[:6] = (predicted[:6] + 1) % 4  # six mistakes without any attack
    return model, images, labels


def test_an_evaluation_says_how_far_off_mistakes_are(judged):
    model, images, labels = judged
    tree = hierarchy_from(TREE)
    report = evaluate(model, (images, labels), THREAT, attacks=("fgsm", "pgd-5"), hierarchy=TREE, batch_size=7)
    plain = evaluate(model, (images, labels), THREAT, attacks=("fgsm", "pgd-5"), batch_size=7)
    order = report.indices
    with torch.no_grad():
        predicted = model(images[order]).argmax(1)
    assert report.result("clean").severity == Severity.of(tree.distances, labels[order], predicted)
    for name in ("fgsm", "pgd-5"):
        ours, theirs = report.result(name), plain.result(name)
        assert torch.equal(ours.correct, theirs.correct) and theirs.severity is None
        assert ours.severity.errors == int((~ours.correct).sum()) > 6
    x_adv = AttackSpec(kind="fgsm").perturb(model, images[order], labels[order], THREAT, generator=None)
    right = predicted == labels[order]
    with torch.no_grad():
        attacked = torch.where(right, model(x_adv).argmax(1), predicted)
    assert report.result("fgsm").severity == Severity.of(tree.distances, labels[order], attacked)
    assert RobustReport.from_json(json.loads(json.dumps(report.to_json()))) == report
    assert "mean distance of mistakes in 'small' (a class at random: 2.33): clean" in str(report)
    fgsm = report.result("fgsm").to_json()
    assert fgsm["mean_distance"] == report.result("fgsm").severity.mean
    with pytest.raises(ResultError, match="not as many distances as mistakes"):
        AttackResult.from_json(fgsm | {"mistakes": fgsm["mistakes"][1:]})
    assert "mistakes" not in json.dumps(plain.to_json()) and "distance" not in str(plain)


def test_autoattack_keeps_distances_with_its_chunks(judged, tmp_path):
    model, images, labels = judged
    settings = {
        "attacks": ("autoattack",),
        "autoattack_config": AutoAttackConfig(apgd_iterations=3, fab_iterations=2, square_queries=10, chunk_size=8),
        "autoattack_images": 16,
    }
    without = evaluate(model, (images, labels), THREAT, resume_dir=tmp_path, **settings)
    first = evaluate(model, (images, labels), THREAT, resume_dir=tmp_path, hierarchy=TREE, **settings)
    again = evaluate(model, (images, labels), THREAT, resume_dir=tmp_path, hierarchy=TREE, **settings)
    found = first.result("autoattack")
    assert found.severity is not None and found.severity.errors == int((~found.correct).sum()) > 0
    assert torch.equal(found.correct, without.result("autoattack").correct)
    assert again.result("autoattack") == found, "the chunks were found again, with their distances"
    assert without.result("autoattack").severity is None


def test_bad_trees_are_told_with_all_else(judged):
    model, images, labels = judged
    with pytest.raises(InputError, match=r"attack 'pgdd' is unknown(.|\n)*hierarchy 'nowhere.json' cannot be read"):
        evaluate(model, (images, labels), THREAT, attacks=("pgdd",), hierarchy="nowhere.json")
    with pytest.raises(InputError, match="hierarchy 'digits' has 10 classes, the model 4 logits"):
        evaluate(model, (images, labels), THREAT, hierarchy="digits")


def test_a_report_names_no_files(judged, tmp_path):
    """What a report says of its hierarchy is read as data: a name in its place must not open a file."""
    model, images, labels = judged
    report = evaluate(model, (images, labels), THREAT, attacks=(), hierarchy=TREE).to_json()
    (tmp_path / "tree.json").write_text(json.dumps(TREE))
    with pytest.raises(ResultError, match="not a robust report"):
        RobustReport.from_json(report | {"hierarchy": str(tmp_path / "tree.json")})
