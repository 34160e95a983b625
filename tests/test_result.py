"""What is saved is whole or absent; what is loaded is what was saved, or one clear error."""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

import robustcompress as rc
from robustcompress.errors import DiskError
from robustcompress.models import ModelSpec, identify, resnet8
from robustcompress.result import HISTORY, RESULT, WEIGHTS, check_target
from robustcompress.strategies import make_strategy
from tests.strategies.nets import SIZE, build, same, small_data, state

EXAMPLE = torch.zeros(2, 3, SIZE, SIZE)


def make(model: torch.nn.Module | None = None, **changes: Any) -> rc.CompressResult:
    """A result without the training."""
    torch.manual_seed(0)
    model = model or resnet8(width=0.25)
    spec, before = identify(model), rc.measure(model, EXAMPLE, latency=True)
    editor = rc.StructuralEditor(model, EXAMPLE)
    first = editor.editable[0]
    editor.prune(first.name, range(1, first.width))
    editor.grow(editor.editable[1].name, 2)
    data = small_data()
    settings = {
        "model": model.eval(),
        "spec": spec,
        "strategy": make_strategy("grape").to_json(),
        "edits": editor.edits,
        "before": before,
        "after": rc.measure(model, EXAMPLE, latency=True),
        "budget": {"macs": 0.5},
        "history": ({"phase": "tail", "epoch": 1, "loss": 2.0},),
        "report": rc.evaluate(model, data.test, rc.ThreatModel(), attacks=("fgsm",), max_images=10),
        "threat": rc.ThreatModel(),
        "data": {"name": "digits", "sha256": "0", "classes": list(data.classes), "image_shape": [3, SIZE, SIZE]},
        "settings": {"epochs": 1},
        "seed": 3,
    }
    return rc.CompressResult(**(settings | changes))  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def result() -> rc.CompressResult:
    return make()


@pytest.fixture(scope="module")
def saved(result: rc.CompressResult, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return result.save(tmp_path_factory.mktemp("results") / "good")


@pytest.fixture
def copy(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "copy"))


def change(directory: Path, edit: Any) -> None:
    record = json.loads((directory / RESULT).read_text())
    edit(record)
    (directory / RESULT).write_text(json.dumps(record))


# Saving.


def test_what_is_loaded_is_what_was_saved(result: rc.CompressResult, saved: Path) -> None:
    again = rc.load(saved)
    assert same(state(again.model), state(result.model))
    x = small_data().test.as_float()
    assert torch.equal(again.model(x), result.model(x)) and not again.model.training
    assert again.to_json() == json.loads(json.dumps(result.to_json()))
    assert (again.spec, again.edits, again.threat) == (result.spec, result.edits, result.threat)
    assert (again.before, again.after, again.history) == (result.before, result.after, result.history)
    assert again.report == result.report and again.seed == 3
    assert again.classes == tuple("0123456789") and again.image_shape == (3, SIZE, SIZE)
    assert str(again) == str(result) and again._repr_html_() == result._repr_html_()


def test_three_files_are_written_and_none_is_a_pickle(saved: Path) -> None:
    assert sorted(p.name for p in saved.iterdir()) == sorted([RESULT, WEIGHTS, HISTORY])
    assert not any(p.read_bytes()[:2] == b"\x80\x04" or p.read_bytes()[:2] == b"PK" for p in saved.iterdir())
    assert all(p.stat().st_mode & 0o444 == 0o444 for p in saved.iterdir())
    assert "rebuilt" not in json.loads((saved / RESULT).read_text())


def test_loading_leaves_the_random_state_alone(saved: Path) -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    rc.load(saved)
    assert torch.equal(torch.rand(3), expected)


def test_a_saved_result_can_be_saved_again(saved: Path, tmp_path: Path) -> None:
    rc.load(saved).save(tmp_path / "again")
    for name in (RESULT, WEIGHTS, HISTORY):
        assert (tmp_path / "again" / name).read_bytes() == (saved / name).read_bytes()


@pytest.mark.parametrize("kind", ["result", "empty", "file"])
def test_what_exists_is_never_replaced_unasked(kind: str, result: rc.CompressResult, copy: Path) -> None:
    target = copy
    if kind == "empty":
        target = copy.parent / "empty"
        target.mkdir()
    elif kind == "file":
        target = copy.parent / "file"
        target.write_text("mine")
    with pytest.raises(rc.InputError, match=r"exists; choose another directory, or remove it"):
        result.save(target)
    assert target.exists()


def test_overwrite_replaces_results_only(result: rc.CompressResult, copy: Path, tmp_path: Path) -> None:
    changed = dataclasses.replace(result, seed=77)
    changed.save(copy, overwrite=True)
    assert rc.load(copy).seed == 77
    other = tmp_path / "thesis"
    other.mkdir()
    (other / "chapter1.tex").write_text("years of work")
    with pytest.raises(rc.InputError, match="exists"):
        result.save(other, overwrite=True)
    assert (other / "chapter1.tex").read_text() == "years of work"


def test_directories_on_the_way_are_made(result: rc.CompressResult, tmp_path: Path) -> None:
    out = tmp_path / "absent" / "deeper" / "out"
    check_target(out)
    assert not (tmp_path / "absent").exists(), "looking makes nothing"
    result.save(out)
    assert rc.load(out).seed == result.seed and [p.name for p in out.parent.iterdir()] == ["out"]


def test_a_result_that_cannot_be_written_leaves_no_directories(
    result: rc.CompressResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> str:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("robustcompress.result.save_tensors", full)
    with pytest.raises(DiskError, match="No space left"):
        result.save(tmp_path / "absent" / "deeper" / "out")
    assert list(tmp_path.iterdir()) == []


def test_the_root_of_the_file_system_is_refused() -> None:
    with pytest.raises(rc.InputError, match="exists"):
        check_target(Path("/"))


@pytest.mark.parametrize("path", ["file/out", "file/deeper/out", "nowhere/out"])
def test_a_place_that_cannot_be_written_is_refused_in_one_line(
    path: str, result: rc.CompressResult, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "nowhere").symlink_to(tmp_path / "gone")
    with pytest.raises(rc.InputError, match="is no directory; choose another place"):
        result.save(tmp_path / path)
    with pytest.raises(rc.InputError, match="is no directory; choose another place"):
        check_target(tmp_path / path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "nowhere"]


def test_no_permission_is_refused_in_one_line(
    result: rc.CompressResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("tempfile.mkdtemp", refuse)
    with pytest.raises(rc.InputError, match=r"cannot be written to \(Permission denied\)"):
        result.save(tmp_path / "out")


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
@pytest.mark.parametrize("exists", [False, True])
def test_an_interrupted_save_leaves_nothing_new(
    error: type[BaseException], exists: bool, result: rc.CompressResult, copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = rc.CompressResult._write

    def half(self: rc.CompressResult, directory: Path) -> None:
        write(self, directory)
        (directory / RESULT).unlink()
        raise error

    monkeypatch.setattr(rc.CompressResult, "_write", half)
    target = copy if exists else copy.parent / "new"
    with pytest.raises(rc.InputError if error is OSError else error):
        result.save(target, overwrite=exists)
    assert [p.name for p in copy.parent.iterdir()] == ["copy"]
    assert rc.load(copy).seed == 3


def test_notes_beside_a_result_survive_an_overwrite(result: rc.CompressResult, copy: Path) -> None:
    """Only a result may be replaced; an exported model or notes in the same directory are not part of it."""
    (copy / "notes.txt").write_text("mine")
    try:
        result.save(copy, overwrite=True)
    except rc.InputError as error:
        assert "notes.txt" in str(error)  # refusing is as good
    assert (copy / "notes.txt").read_text() == "mine"


# Loading what is damaged.


@pytest.mark.parametrize("kind", ["absent", "empty", "file", "no weights", "no json"])
def test_where_there_is_no_result_it_is_said(kind: str, copy: Path) -> None:
    target = copy
    if kind == "absent":
        target = copy.parent / "nothing"
    elif kind == "empty":
        target = copy.parent / "empty"
        target.mkdir()
    elif kind == "file":
        target = copy / RESULT
    else:
        (copy / (WEIGHTS if kind == "no weights" else RESULT)).unlink()
    with pytest.raises(rc.ResultError, match=r"holds no (result|model\.safetensors)"):
        rc.load(target)


@pytest.mark.parametrize("honest", [False, True], ids=["hash kept", "hash renewed"])
@pytest.mark.parametrize("damage", ["truncated", "empty", "flipped", "header", "garbage", "appended"])
def test_damaged_weights_are_found_out(damage: str, honest: bool, copy: Path) -> None:
    path = copy / WEIGHTS
    data = bytearray(path.read_bytes())
    if damage == "truncated":
        data = data[: len(data) // 2]
    elif damage == "empty":
        data = bytearray()
    elif damage == "garbage":
        data = bytearray(b"\x80\x04" * 100)
    elif damage == "appended":
        data += b"\0"
    else:
        data[len(data) // 2 if damage == "flipped" else 12] ^= 0x40
    path.write_bytes(data)
    if honest:
        if damage == "flipped":
            return  # other weights with their own hash are simply other weights
        change(copy, lambda r: r.update(weights_sha256=hashlib.sha256(data).hexdigest()))
    with pytest.raises(rc.ResultError, match=WEIGHTS.replace(".", r"\.")):
        rc.load(copy)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "3", '"x"', "{}", '{"format": "1"}', '{"format": null}'])
def test_a_file_that_is_no_record_is_refused(text: str, copy: Path) -> None:
    (copy / RESULT).write_text(text)
    with pytest.raises(rc.ResultError, match=r"result\.json"):
        rc.load(copy)


@pytest.mark.parametrize("data", [b"\xff\xfe\x00", b"[" * 200_000, b'{"format": ' + b"1" * 5000 + b"}"])
def test_bytes_that_no_parser_likes_are_refused(data: bytes, copy: Path) -> None:
    (copy / RESULT).write_bytes(data)
    with pytest.raises(rc.ResultError):
        rc.load(copy)


@pytest.mark.parametrize("text", ["{", "\x00", "[1]\n", "3\n", '{"phase": 1}\n{"epo'])
def test_a_damaged_history_is_named(text: str, copy: Path) -> None:
    (copy / HISTORY).write_text(text)
    with pytest.raises(rc.ResultError, match=r"history\.jsonl"):
        rc.load(copy)


def test_a_newer_format_says_upgrade(copy: Path) -> None:
    change(copy, lambda r: r.update(format=5))
    with pytest.raises(rc.ResultError, match=r"format 5; this version reads up to 4: upgrade"):
        rc.load(copy)


KEYS = sorted(json.loads(json.dumps(make().to_json()))) + ["weights_sha256"]


@pytest.mark.parametrize("key", KEYS)
def test_each_missing_key_is_a_clear_error(key: str, copy: Path) -> None:
    change(copy, lambda r: r.pop(key))
    with pytest.raises(rc.ResultError) as caught:
        rc.load(copy)
    said = str(caught.value)
    assert str(copy) in said and (key in said or key in ("format", "weights_sha256")), said


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("value", [7, "x", [], {}, [[]], True, 1.5], ids=repr)
def test_each_key_of_another_type_is_a_clear_error_or_harmless(key: str, value: Any, copy: Path) -> None:
    change(copy, lambda r: r.update({key: value}))
    load_or_refuse(copy)


@pytest.mark.parametrize("value", ["x", -1, None], ids=repr)
@pytest.mark.parametrize("where", ["before", "after"])
@pytest.mark.parametrize("field", ["macs", "params"])
def test_costs_that_are_no_counts_are_refused(where: str, field: str, value: Any, copy: Path) -> None:
    change(copy, lambda r: r[where].update({field: value}))
    with pytest.raises(rc.ResultError):
        rc.load(copy)


EDITS = {
    "a channel that does not exist": [{"group": "conv1", "sources": [0, 99], "init": None, "share": False}],
    "a group that does not exist": [{"group": "conv9", "sources": [0], "init": None, "share": False}],
    "a negative channel": [{"group": "conv1", "sources": [-7], "init": None, "share": False}],
    "no channel": [{"group": "conv1", "sources": [], "init": None, "share": False}],
    "fractions": [{"group": "conv1", "sources": [0.5], "init": None, "share": False}],
    "words": [{"group": "conv1", "sources": "all", "init": None, "share": False}],
    "a range of too many": [{"group": "conv1", "sources": [[0, 10**15]], "init": None, "share": False}],
    "too many new ones": [{"group": "conv1", "sources": [[-1, 10**15]], "init": "pair", "share": False}],
    "a bypass of no block": [{"bypass": "conv1"}],
    "a bypass of a block that cannot leave": [{"bypass": "layers.1.0"}],
    "a bypass of nothing": [{"bypass": "layers.9"}],
    "a bypass without a name": [{"bypass": ""}],
    "a bypass of a number": [{"bypass": 3}],
    "a bypass of more": [{"bypass": "layers.0.0", "sources": [0]}],
    "a backward range": [{"group": "conv1", "sources": [[3, 0]], "init": None, "share": False}],
    "a triple": [{"group": "conv1", "sources": [[0, 1, 2]], "init": None, "share": False}],
    "an output that reads what is not there": [{"group": "fc", "sources": [500], "init": None, "share": False}],
    "an output of too many": [{"group": "fc", "sources": [[-1, 10**12]], "init": "kaiming", "share": False}],
    "no edit": [3],
}


@pytest.mark.parametrize("kind", EDITS)
def test_impossible_edits_are_refused(kind: str, copy: Path) -> None:
    change(copy, lambda r: r.update(edits=EDITS[kind]))
    with pytest.raises(rc.ResultError, match=r"result\.json|model\.safetensors"):
        rc.load(copy)


def paths(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    if path:
        yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield from paths(item, (*path, key))


VALUES = [None, True, -1, 0, 3, 2.5, 10**15, float("inf"), float("nan"), "", "x", [], {}, [1, 2], {"a": 1}, ["x"]]


@settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    derandomize=True,
    report_multiple_bugs=False,
    phases=[Phase.generate],  # every example loads a model: shrinking would take minutes
)
@given(data=st.data())
def test_any_change_of_any_value_is_refused_or_harmless(
    data: st.DataObject, saved: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    record = json.loads((saved / RESULT).read_text())
    path = data.draw(st.sampled_from(list(paths(record))), label="path")
    owner = record
    for key in path[:-1]:
        owner = owner[key]
    if data.draw(st.booleans(), label="delete"):
        del owner[path[-1]]
    else:
        owner[path[-1]] = data.draw(st.sampled_from(VALUES), label="value")
    directory = tmp_path_factory.mktemp("mutated")
    shutil.copytree(saved, directory, dirs_exist_ok=True)
    (directory / RESULT).write_text(json.dumps(record))
    load_or_refuse(directory)


def load_or_refuse(directory: Path) -> None:
    """Either the one documented error, or a result of which everything works."""
    try:
        loaded = rc.load(directory)
    except rc.ResultError as error:
        assert str(directory) in str(error)
        return
    except rc.InputError as error:
        assert "needs its reference model" in str(error)
        return
    assert str(loaded) and loaded._repr_html_() and loaded.rows()
    assert loaded.meets_budget in (True, False)
    assert all(isinstance(name, str) for name in loaded.classes) and len(loaded.image_shape) == 3
    assert json.dumps(loaded.to_json()) and loaded.export_metadata()
    assert loaded.model(torch.zeros(1, *loaded.image_shape)).shape == (1, 10)


# Whose code builds the reference.

FACTORY = """
from pathlib import Path
Path({marker!r}).write_text("imported")
from robustcompress.models import resnet8
def make():
    return resnet8(width=0.25)
"""


@pytest.fixture
def planted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    known = set(sys.modules)

    def plant(module: str) -> Path:
        marker = tmp_path / "marker"
        (tmp_path / f"{module}.py").write_text(FACTORY.format(marker=str(marker)))
        return marker

    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.chdir(tmp_path)
    yield plant
    for name in set(sys.modules) - known:
        del sys.modules[name]


def test_a_factory_is_not_imported_on_the_files_word(copy: Path, planted: Any) -> None:
    marker = planted("planted_factory")
    change(copy, lambda r: r.update(model={"name": "planted_factory:make", "kwargs": {}}))
    with pytest.raises(rc.InputError, match=r"would import code.*load\(\.\.\., model='planted_factory:make'\)"):
        rc.load(copy)
    assert not marker.exists() and "planted_factory" not in sys.modules
    assert rc.load(copy, model="planted_factory:make").seed == 3
    assert marker.exists()


@pytest.mark.parametrize("module", ["torchvision:planted", "robustcompress:planted", "timm:planted"])
def test_no_spelling_of_a_name_imports_what_is_foreign(module: str, copy: Path, planted: Any) -> None:
    marker = planted(module)
    change(copy, lambda r: r.update(model={"name": f"{module}:make", "kwargs": {}}))
    with pytest.raises((rc.InputError, rc.ResultError)):
        rc.load(copy)
    assert not marker.exists()


@pytest.mark.parametrize(
    "name", [":make", "planted_factory:", "torchvision:", "robustcompress:", "timm:", "", "a:b:c", "no"]
)
def test_names_of_no_model_are_refused(name: str, copy: Path) -> None:
    change(copy, lambda r: r.update(model={"name": name, "kwargs": {}}))
    with pytest.raises((rc.InputError, rc.ResultError)):
        rc.load(copy)


def test_a_result_of_an_unknown_model_needs_it(tmp_path: Path) -> None:
    result = make(build("residual"))
    assert result.spec is None
    result.save(tmp_path / "out")
    with pytest.raises(rc.InputError, match=r"needs its reference model: pass load\(\.\.\., model="):
        rc.load(tmp_path / "out")
    instance = build("residual", seed=9)
    before = state(instance)
    for model in (instance, lambda: build("residual", seed=8), "tests.strategies.nets:Residual"):
        assert same(state(rc.load(tmp_path / "out", model=model).model), state(result.model))
    assert same(state(instance), before), "the model that is passed is not touched"
    spec = ModelSpec("tests.strategies.nets:Residual")
    assert same(state(rc.load(tmp_path / "out", model=spec).model), state(result.model))


def test_another_model_does_not_fit(tmp_path: Path) -> None:
    make(build("residual")).save(tmp_path / "out")
    with pytest.raises(rc.ResultError):
        rc.load(tmp_path / "out", model=build("chain"))


# Showing.


def test_the_summary_shows_costs_ratios_and_accuracies(result: rc.CompressResult) -> None:
    text, page = str(result), result._repr_html_()
    for word in ("MACs", "parameters", "size", "latency", "grape", "digits", "seed 3", "fgsm"):
        assert word in text
        assert word in page or word in ("seed 3",)
    assert f"{result.after.macs / result.before.macs:.3f}" in text
    assert repr(result) == text


def test_the_page_escapes_what_it_shows(result: rc.CompressResult) -> None:
    data = dict(result.data) | {"name": "<script>alert(1)</script>"}
    assert "<script>" not in dataclasses.replace(result, data=data)._repr_html_()


@pytest.mark.parametrize(
    ("strategy", "budget", "meets"),
    [
        ("grape", {"macs": 0.5}, False),
        ("grape", {"macs": 2.0}, True),
        ("grape", {"max_macs": 1}, False),
        ("grape", {"params": 0.01}, False),
        ("grape", {"params": 4, "max_params": 10}, False),
        ("none", {"macs": 0.01}, True),
    ],
)
def test_whether_the_budget_is_met(
    strategy: str, budget: dict[str, float], meets: bool, result: rc.CompressResult
) -> None:
    changed = dataclasses.replace(result, strategy={"name": strategy}, budget=budget)
    assert changed.meets_budget is meets


def test_a_failing_rename_leaves_the_old_result(
    result: rc.CompressResult, copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    replace = Path.replace

    def refuse(path: Path, target: Path) -> Path:
        if path.name.startswith(f".{copy.name}-") and target == copy:
            raise OSError(28, "No space left on device")
        return replace(path, target)

    before = rc.load(copy).seed
    monkeypatch.setattr(Path, "replace", refuse)
    with pytest.raises(rc.InputError, match="No space left"):
        dataclasses.replace(result, seed=before + 1).save(copy, overwrite=True)
    monkeypatch.undo()
    assert rc.load(copy).seed == before
    assert [path.name for path in copy.parent.iterdir()] == [copy.name]
