"""What long evaluations keep of themselves."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from robustcompress.errors import InputError
from robustcompress.robust.kept import Kept


def test_what_was_written_is_read_and_named_after_what_decides_it(tmp_path: Path) -> None:
    kept = Kept(tmp_path / "new" / "place")
    one, other = kept.path({"a": 1, "b": [2.5, None]}), kept.path({"a": 2, "b": [2.5, None]})
    assert one is not None and one != other and one == kept.path({"b": [2.5, None], "a": 1})
    assert kept.read(one) is None
    kept.write(one, {"found": [1, 2]})
    assert kept.read(one) == {"found": [1, 2]} and kept.read(other) is None
    assert [path.name for path in one.parent.iterdir()] == [one.name]
    one.write_text('{"found": [1,')
    assert kept.read(one) is None
    named = kept.path({}, "attack-{}.jsonl")
    assert named is not None and named.name.startswith("attack-") and named.suffix == ".jsonl"
    assert str(kept) == f"; what it has found so far is kept in {tmp_path / 'new' / 'place'}"


def test_nowhere(tmp_path: Path) -> None:
    kept = Kept()
    assert kept.path({"a": 1}) is None and kept.read(None) is None and str(kept) == ""
    kept.write(None, 1)


def test_where_nothing_can_be_written_it_goes_on_and_says_so_once(tmp_path: Path) -> None:
    said: list[str] = []
    kept = Kept(tmp_path / "gone", said.append)
    shutil.rmtree(tmp_path / "gone")
    path = kept.path({"a": 1})
    for _ in range(2):
        kept.write(path, 1)
    assert said == [f"what is finished could not be kept in {tmp_path / 'gone'} (No such file or directory)"]


def test_a_directory_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"keep='.*file' cannot be made .* name another"):
        Kept(tmp_path / "file", option="keep")
