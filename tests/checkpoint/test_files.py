"""A checkpoint on the disk: whole or absent, bit for bit, and never believed blindly."""

from __future__ import annotations

import errno
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from robustcompress.checkpoint import NotWrittenError, check_directory, files, read, remove, shrink, write
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
    kept = [files.BEFORE, files.INDEX, "state-1-0.safetensors", "state-3-0.safetensors"]
    assert sorted(path.name for path in tmp_path.iterdir()) == kept, "nothing is left of the others"


def change(path: Path, **changes: Any) -> None:
    """As if the index had been written so."""
    index = json.loads(path.read_text()) | changes
    del index["sha256"]
    path.write_text(files._sealed(index))


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
    with pytest.raises(CheckpointError, match="has format 99; this version reads up to 2: upgrade"):
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
    for place, said in (("file/below", "is no directory"), ("file", "is a file"), ("full", r"also holds thesis\.tex")):
        with pytest.raises(InputError, match=said):
            check_directory(tmp_path / place)
    check_directory(tmp_path / "new")
    check_directory(tmp_path / "no" / "parent")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "full"], "looking makes nothing"
    write(tmp_path / "no" / "parent", {"n": 1}, {"x": torch.ones(3)})
    assert read(tmp_path / "no" / "parent") is not None


def test_what_the_writer_of_tensors_leaves_when_it_is_killed_is_no_stranger(tmp_path: Path) -> None:
    write(tmp_path / "c", {"n": 1}, {"x": torch.ones(3)})
    (tmp_path / "c" / ".tmpzlSj1b").write_bytes(b"half")
    check_directory(tmp_path / "c")
    write(tmp_path / "c", {"n": 2}, {"x": torch.ones(3)})
    assert not (tmp_path / "c" / ".tmpzlSj1b").exists()


# Two are kept.


def two(directory: Path) -> tuple[Path, list[Path]]:
    """Two checkpoints: the newest index, and its tensors."""
    for number in (1, 2):
        write(directory, {"n": number}, {"x": torch.full((30,), float(number))})
    newest = json.loads((directory / files.INDEX).read_text())["files"]
    return directory / files.INDEX, [directory / item["name"] for item in newest]


def test_a_damaged_newest_one_is_noticed_and_the_one_before_is_used(tmp_path: Path) -> None:
    for number, damage in enumerate(["cut", "flip", "gone", "index cut", "index flip", "index gone", "index empty"]):
        index, states = two(tmp_path / str(number))
        path = index if damage.startswith("index") else states[0]
        data = bytearray(path.read_bytes())
        if damage.endswith("gone"):
            path.unlink()
        else:
            data[len(data) // 2] ^= 1
            cut = {"cut": data[:-5], "flip": data, "empty": b""}
            path.write_bytes(cut[damage.split()[-1]] if not damage.endswith("cut") else path.read_bytes()[:-5])
        found = read(tmp_path / str(number))
        assert found is not None and found.record == {"n": 1} and float(found.tensors["x"][0]) == 1, damage
        assert found.note.startswith("the newest checkpoint cannot be used (") and "to begin anew" not in found.note
        files.settle(tmp_path / str(number))
        write(tmp_path / str(number), {"n": 3}, {"x": torch.zeros(1)})
        (tmp_path / str(number) / files.INDEX).write_text("")
        found = read(tmp_path / str(number))
        assert found is not None and found.record == {"n": 1}, "the whole one was not pushed out by the damaged one"


def test_both_damaged_is_an_error(tmp_path: Path) -> None:
    two(tmp_path / "c")
    for state in (tmp_path / "c").glob("state-*"):
        state.write_bytes(b"")
    with pytest.raises(CheckpointError, match="to begin anew"):
        read(tmp_path / "c")


def test_every_byte_of_the_index_counts(tmp_path: Path) -> None:
    index, _ = two(tmp_path / "c")
    (tmp_path / "c" / files.BEFORE).unlink()
    whole = index.read_bytes()
    for at in range(0, len(whole), 7):
        index.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        with pytest.raises(CheckpointError):
            read(tmp_path / "c")
    index.write_bytes(whole)
    assert read(tmp_path / "c") is not None


def test_a_checkpoint_of_format_1_is_read(tmp_path: Path) -> None:
    index, _ = two(tmp_path / "c")
    old = json.loads(index.read_text()) | {"format": 1}
    del old["sha256"]
    index.write_text(json.dumps(old))
    (tmp_path / "c" / files.BEFORE).unlink()
    found = read(tmp_path / "c")
    assert found is not None and found.record == {"n": 2} and not found.note


# A disk that does not take it.


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EIO])
def test_wherever_the_disk_gives_up_the_last_one_stands(
    code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = [0]
    refuse_at = [0]

    def counted(plain: Any) -> Any:
        def call(*args: Any, **settings: Any) -> Any:
            calls[0] += 1
            if calls[0] == refuse_at[0] or (code != errno.ENOSPC and calls[0] > refuse_at[0]):
                raise OSError(code, "no")
            return plain(*args, **settings)

        return call

    two(tmp_path / "c")
    monkeypatch.setattr(files, "save_tensors", counted(files.save_tensors))
    monkeypatch.setattr(files, "write_text", counted(files.write_text))
    for at in (1, 2, 3):  # the tensors, the old index, the new one
        calls[0], refuse_at[0] = 0, at
        if code == errno.ENOSPC:  # once: without the oldest there is room
            write(tmp_path / "c", {"n": 10 + at}, {"x": torch.zeros(3)})
            found = read(tmp_path / "c")
            assert found is not None and found.record == {"n": 10 + at}
            refuse_at[0] = 0
            write(tmp_path / "c", {"n": 20 + at}, {"x": torch.zeros(3)})
        else:
            with pytest.raises(NotWrittenError, match="no checkpoint could be written to"):
                write(tmp_path / "c", {"n": 10 + at}, {"x": torch.zeros(3)})
            found = read(tmp_path / "c")
            assert found is not None and found.record == {"n": 2} and not found.note
        assert not list((tmp_path / "c").glob("*.part"))


def test_a_file_that_may_not_grow_so_far_leaves_the_last_one(tmp_path: Path) -> None:
    """In a process of its own: the limit is the process's, and the real writer meets it at every size."""
    script = f"""
import resource, torch
from robustcompress.checkpoint import NotWrittenError, read, write
write({str(tmp_path / "c")!r}, {{"n": 1}}, {{"x": torch.ones(500)}})
hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
refused = 0
for size in (0, 1, 100, 1000, 2050, 2100, 2120, 2150, 2200, 2300):
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        write({str(tmp_path / "c")!r}, {{"n": 2, "long": "x" * 2050}}, {{"x": torch.zeros(500)}})
    except NotWrittenError as error:
        assert "too large" in str(error).lower(), error
        refused += 1
        assert read({str(tmp_path / "c")!r}).record == {{"n": 1}}
print(refused)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) >= 9
