"""Files from strangers: loaded, or refused with one clear error, before memory is taken or anything is run."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch import nn

import robustcompress as rc
from benchmarks import endurance_fuzz, fuzz_formats, fuzz_mutations, fuzz_seeds
from benchmarks.fuzz_readers import READERS, strange_edits
from robustcompress import cli
from robustcompress.errors import LONGEST, InputError, ResultError, RobustCompressError
from robustcompress.recipe import read_yaml
from robustcompress.untrusted import load_state, parse_json, read_text, shown

ODD = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.just(10**30),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
RECORDS = {
    "latency table": "times.json",
    "hierarchy": "tree.json",
    "front": "pareto.json",
    "checkpoint": "whole/checkpoint.json",
    "kept chunks": "certificate.json",
    "load": "result/result.json",
}


@pytest.fixture(scope="module")
def seeds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("seeds")
    for name in {READERS[reader].seed for reader in RECORDS} | {"onnx", "recipe"}:
        (folder / name).mkdir()
        fuzz_seeds.MAKERS[name](folder / name)
    return folder


@pytest.mark.parametrize("reader", RECORDS)
@settings(
    max_examples=25,
    deadline=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
    phases=[Phase.generate],
)
@given(data=st.data())
def test_any_value_anywhere_is_harmless(reader: str, seeds: Path, data: st.DataObject) -> None:
    folder = seeds / READERS[reader].seed
    path = folder / RECORDS[reader]
    whole = path.read_text()
    record = json.loads(whole)
    place = data.draw(st.sampled_from(fuzz_mutations.paths(record)), label="place")
    owner = record
    for key in place[:-1]:
        owner = owner[key]
    owner[place[-1]] = data.draw(ODD, label="value")
    try:
        path.write_text(json.dumps(record))
        try:
            READERS[reader].read(folder)
        except RobustCompressError as error:
            assert str(error) and len(str(error)) < LONGEST + 100
    finally:
        path.write_text(whole)


@given(value=ODD)
@settings(max_examples=50, deadline=None, derandomize=True)
def test_what_is_read_can_be_shown_and_written(value: Any) -> None:
    try:
        found = parse_json(json.dumps(value))
    except ValueError as error:
        assert str(error)
        return
    assert found == value and json.dumps(found, allow_nan=False, ensure_ascii=False).encode()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[" * 100_000 + "]" * 100_000, "nested"),
        ("[" * 300 + "]" * 300, "nested"),
        ('{"a": NaN}', "no number"),
        ("[1e999]", "no number"),
        ("9" * 10_000, "digits"),
        ("9" * 30, "64 bits"),
        (r'"\ud800"', "cannot be shown"),
        (r'"\u001b[2J"', "cannot be shown"),
        ("{", "Expecting"),
    ],
)
def test_json_that_is_refused(text: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        parse_json(text)


def test_a_file_without_end_is_read_no_further_than_its_limit(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"x" * 101)
    with pytest.raises(ValueError, match="more than 100 bytes"):
        read_text(tmp_path / "a", 100)
    with pytest.raises(ValueError, match="more than 1000 bytes"):
        read_text(Path("/dev/zero"), 1000)


def test_errors_are_short_and_steer_no_terminal() -> None:
    error = InputError("\x1b[2J" + "A" * 100_000 + "\u202e")
    assert "\x1b" not in str(error) and len(str(error)) < LONGEST + 100 and "100005 characters" in str(error)
    assert shown("plain\ntext", 100) == "plain\ntext"


@pytest.mark.parametrize("hostile", fuzz_mutations.HOSTILE_YAML, ids=lambda make: make()[:30].split("\n")[0])
def test_hostile_yaml_is_refused_at_once(hostile: Callable[[], str], tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipe.yaml").write_text(hostile())
    began = time.perf_counter()
    with pytest.raises(InputError) as caught:
        rc.RunRecipe.read("recipe.yaml")
    assert time.perf_counter() - began < 5 and len(str(caught.value)) < LONGEST + 100
    assert [path.name for path in tmp_path.iterdir()] == ["recipe.yaml"]


def test_aliases_and_merges_within_reason_are_read(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("base: &b {lr: 0.1}\nother: *b\nmore: {<<: *b, ema: 0.9}\n")
    assert read_yaml(tmp_path / "a.yaml")["more"] == {"lr": 0.1, "ema": 0.9}


# Networks.


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("robustcompress:resnet8", {"width": 1e6}),
        ("robustcompress:resnet8", {"num_classes": 2**40}),
        ("robustcompress:vit_tiny", {"depth": 10**7}),
        ("robustcompress:vit_tiny", {"image_size": 100_000}),
        ("torchvision:resnet18", {"width_per_group": 10**6}),
        ("torchvision:vit_b_16", {"image_size": 80_000}),
    ],
)
def test_networks_that_do_not_fit_are_not_built(
    name: str, options: dict[str, Any], seeds: Path, tmp_path: Path
) -> None:
    place = copy(seeds, tmp_path, model={"name": name, "kwargs": options})
    began = time.perf_counter()
    with pytest.raises(ResultError, match="reference model"):
        rc.load(place)
    assert time.perf_counter() - began < 20
    value = {"model": {"name": name, **options}, "strategy": "none"}
    with pytest.raises(InputError, match="model"):
        rc.RunRecipe.from_mapping(value)


@pytest.mark.parametrize("number", range(12))
def test_edits_without_end_are_refused(number: int, seeds: Path, tmp_path: Path) -> None:
    import random

    place = copy(seeds, tmp_path, edits=strange_edits(random.Random(number)))
    with pytest.raises(ResultError):
        rc.load(place)


@pytest.mark.parametrize("shape", [[3, 4096, 4096], [3, 2**20, 2**20], [2**40, 1, 1], [3, 0, 8]])
def test_images_without_end_are_refused(shape: list[int], seeds: Path, tmp_path: Path) -> None:
    record = json.loads((seeds / "result" / "result" / "result.json").read_text())
    place = copy(seeds, tmp_path, data=record["data"] | {"image_shape": shape})
    with pytest.raises(ResultError):
        rc.load(place)


def copy(seeds: Path, tmp_path: Path, **changes: Any) -> Path:
    import shutil

    place = Path(shutil.copytree(seeds / "result" / "result", tmp_path / "result"))
    record = json.loads((place / "result.json").read_text())
    (place / "result.json").write_text(json.dumps(record | changes))
    return place


def test_other_types_are_other_weights() -> None:
    model = nn.Linear(2, 2, bias=False)
    load_state(model, {"weight": torch.ones(2, 2, dtype=torch.float16)})
    for wrong in (torch.int64, torch.complex64, torch.bool):
        with pytest.raises(ValueError, match="of type"):
            load_state(model, {"weight": torch.ones(2, 2).to(wrong)})
    with pytest.raises(ValueError, match="of type"):
        load_state(model, {"weight": torch.ones(2, 2, dtype=torch.float16)}, exact=True)


# Images.


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (fuzz_formats.png(2**31 - 1, 2**31 - 1, b""), "pixels"),
        (fuzz_formats.png(12_000, 12_000, b""), "pixels"),
        (fuzz_formats.png(1, 1_000_000, bytes(4_000_000)), "pixels"),
        (fuzz_formats.png(1, 50_000, bytes(200_000)), "narrow"),
        (fuzz_formats.POSTSCRIPT, "not an image"),
    ],
    ids=["huge", "large", "long", "narrow", "PostScript"],
)
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::RuntimeWarning")
def test_images_that_unpack_to_gigabytes_or_run_programs(content: bytes, said: str, tmp_path: Path) -> None:
    fuzz_seeds.MAKERS["images"](tmp_path)
    (tmp_path / "photos" / "train" / "cat" / "1.png").write_bytes(content)
    with pytest.raises(InputError, match=said):
        rc.load_data(str(tmp_path / "photos"), image_size=224, val_fraction=0.34)


# Graphs.


@pytest.mark.parametrize("location", ["../secret.bin", "{here}/secret.bin", "link.bin", "sub/../../secret.bin"])
def test_weights_are_read_from_beside_the_graph_alone(location: str, seeds: Path, tmp_path: Path) -> None:
    import onnx

    from robustcompress.artefact.describe import describe_onnx
    from robustcompress.export.reading import open_onnx

    proto = onnx.load(str(seeds / "onnx" / "model.onnx"))
    weight = proto.graph.initializer[0]
    (tmp_path / "secret.bin").write_bytes(weight.raw_data)
    folder = tmp_path / "sub"
    folder.mkdir()
    (folder / "link.bin").symlink_to(tmp_path / "secret.bin")
    weight.ClearField("raw_data")
    weight.data_location = onnx.TensorProto.EXTERNAL
    entry = weight.external_data.add()
    entry.key, entry.value = "location", location.format(here=tmp_path)
    (folder / "model.onnx").write_bytes(proto.SerializeToString())
    for read in (describe_onnx, open_onnx):
        with pytest.raises(InputError):
            read(folder / "model.onnx")


# Code.


@pytest.mark.parametrize("command", ["inspect", "report", "card", "export --onnx", "evaluate"])
def test_no_command_imports_what_a_result_names(
    command: str, seeds: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    place = copy(seeds, tmp_path, model={"name": "planted:make", "kwargs": {}})
    (tmp_path / "planted.py").write_text(fuzz_seeds.PLANTED)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    assert cli.main([*command.split(), str(place)]) == cli.BAD_INPUT
    said = capsys.readouterr().err
    assert "needs its reference model" in said or "--model" in said
    assert not (tmp_path / fuzz_seeds.OWNED).exists() and "planted" not in sys.modules


# The harness itself.


def test_a_case_is_its_seed_and_number(seeds: Path) -> None:
    first, second = (endurance_fuzz.run_case(seeds, "hierarchy", 3, 0) for _ in range(2))
    assert {**first, "seconds": 0, "grew": 0, "message": ""} == {**second, "seconds": 0, "grew": 0, "message": ""}
    assert len({endurance_fuzz.run_case(seeds, "hierarchy", n, 0)["damage"] for n in range(20)}) > 1


def test_what_fails_is_told_from_what_is_refused(seeds: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from dataclasses import replace

    def verdict(read: Callable[[Path], object]) -> str:
        monkeypatch.setitem(READERS, "hierarchy", replace(READERS["hierarchy"], read=read))
        return str(endurance_fuzz.run_case(seeds, "hierarchy", 0, 0)["verdict"])

    def refuse(folder: Path) -> None:
        raise InputError("no")

    def crash(folder: Path) -> None:
        raise KeyError("x")

    def own(folder: Path) -> None:
        (folder / fuzz_seeds.OWNED).write_text("")

    assert verdict(lambda folder: None) == "loaded" and verdict(refuse) == "refused"
    assert verdict(crash) == "failed" and verdict(own) == "failed"


def test_every_reader_has_cases() -> None:
    counted = [name for name, _ in endurance_fuzz.plan(endurance_fuzz.QUICK_CASES)]
    assert set(counted) == set(READERS) and len(counted) >= 500
    assert len(endurance_fuzz.plan(endurance_fuzz.CASES)) >= 10_000


@pytest.mark.slow
def test_nothing_fails(tmp_path: Path) -> None:
    found = endurance_fuzz.run(quick=True, seed=11)
    assert found["failed"] == 0 and found["cases"] >= 500, found["failures"]
