"""A checkpoint on the disk: whole or absent, bit for bit, and never believed blindly."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from robustcompress.checkpoint import check_directory, files, read, remove, shrink, write
from robustcompress.errors import CheckpointError, InputError


def tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    big = torch.randn(6, 4, 3, 3, generator=generator)
    return {
        "model/weight": big.to(memory_format=torch.channels_last),
        "model/slice": big[1:3, ::2],
        "model/tied": big,
        "model/expanded": torch.ones(1).expand(4, 2),
        "model/count": torch.tensor(7),
        "model/empty": torch.zeros(0, 3),
        "model/flags": torch.tensor([True, False]),
        "model/bf16": big[0].bfloat16(),
        "model/parameter": torch.nn.Parameter(torch.tensor([float("nan"), float("inf"), -0.0])),
        "generator/torch": torch.get_rng_state(),
    }


def assert_same_bits(a: torch.Tensor, b: torch.Tensor) -> None:
    assert a.dtype == b.dtype and a.shape == b.shape
    assert torch.equal(
        a.nan_to_num(9.5) if a.is_floating_point() else a, b.nan_to_num(9.5) if b.is_floating_point() else b
    )


def test_every_kind_of_tensor_comes_back(tmp_path: Path) -> None:
    given, record = tensors(), {"a": [1, 2.5, None, "x"], "b": {"c": 0.1 + 0.2}}
    write(tmp_path / "c", record, given)
    found = read(tmp_path / "c")
    assert found is not None and found.record == record and not found.small
    assert found.tensors.keys() == given.keys()
    for name, tensor in given.items():
        assert_same_bits(found.tensors[name], tensor.detach())
    assert found.tensors["model/weight"].stride() == given["model/weight"].stride()
    assert found.tensors["model/slice"].is_contiguous()


def test_nothing_there_is_no_checkpoint(tmp_path: Path) -> None:
    assert read(tmp_path / "none") is None
    (tmp_path / "empty").mkdir()
    assert read(tmp_path / "empty") is None
    with pytest.raises(InputError, match="holds no checkpoint"):
        shrink(tmp_path / "empty", tmp_path / "small")


@pytest.mark.parametrize("kill_at", ["state", "index"])
def test_the_one_before_survives_a_kill_while_the_next_is_written(
    kill_at: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, {"n": 1}, {"x": torch.ones(3)})
    replace = Path.replace

    def dying(self: Path, target: Path) -> Path:
        if self.name.startswith("state" if kill_at == "state" else files.INDEX):
            raise KeyboardInterrupt
        return replace(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", dying)
        with pytest.raises(KeyboardInterrupt):
            write(tmp_path, {"n": 2}, {"x": torch.zeros(3)})
    found = read(tmp_path)
    assert found is not None and found.record == {"n": 1} and torch.equal(found.tensors["x"], torch.ones(3))
    check_directory(tmp_path)  # what the kill left is no stranger
    write(tmp_path, {"n": 3}, {"x": torch.full((3,), 3.0)})
    found = read(tmp_path)
    assert found is not None and found.record == {"n": 3} and float(found.tensors["x"][0]) == 3
    assert len(list(tmp_path.iterdir())) == 2, "nothing is left of the others"


def change(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_damage_is_named_with_its_remedy(tmp_path: Path) -> None:
    def fresh() -> tuple[Path, Path]:
        remove(tmp_path / "c")
        write(tmp_path / "c", {}, {"x": torch.ones(30)})
        return tmp_path / "c" / files.INDEX, next((tmp_path / "c").glob("state-*"))

    index, state = fresh()
    state.write_bytes(state.read_bytes()[:-4])
    with pytest.raises(CheckpointError, match=r"truncated, or changed; remove .* to begin anew"):
        read(tmp_path / "c")
    index, state = fresh()
    state.unlink()
    with pytest.raises(CheckpointError, match="is missing"):
        read(tmp_path / "c")
    index, _ = fresh()
    change(index, format=99)
    with pytest.raises(CheckpointError, match="has format 99; this version reads up to 1: upgrade"):
        read(tmp_path / "c")
    damages: list[dict[str, Any]] = [
        {"tensors": {"x": 3}},
        {"record": 5},
        {"files": None},
        {"tensors": {"x": {"shape": [31], "dtype": "torch.float32", "pieces": [[0, "x@0"]]}}},
        {"tensors": {"x": {"shape": [30], "dtype": "torch.int64", "pieces": [[0, "x@0"]]}}},
        {"files": [{"name": "../../etc/passwd", "sha256": ""}]},
    ]
    for damage in damages:
        index, _ = fresh()
        change(index, **damage)
        with pytest.raises(CheckpointError, match=r"to begin anew"):
            read(tmp_path / "c")
    for text in ("", "[]", "{", "null"):
        index, _ = fresh()
        index.write_text(text)
        with pytest.raises(CheckpointError, match="damaged"):
            read(tmp_path / "c")


def test_removing_takes_no_more_than_the_checkpoint(tmp_path: Path) -> None:
    write(tmp_path / "c", {}, {"x": torch.ones(3)})
    (tmp_path / "c" / "notes.txt").write_text("mine")
    remove(tmp_path / "c")
    assert [path.name for path in (tmp_path / "c").iterdir()] == ["notes.txt"]
    remove(tmp_path / "never")
    write(tmp_path / "d", {}, {"x": torch.ones(3)})
    remove(tmp_path / "d")
    assert not (tmp_path / "d").exists()


def test_places_that_cannot_hold_a_checkpoint_are_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("")
    for place, said in (("no/parent", "create it first"), ("file", "is a file"), ("full", r"also holds thesis\.tex")):
        with pytest.raises(InputError, match=said):
            check_directory(tmp_path / place)
    check_directory(tmp_path / "new")
