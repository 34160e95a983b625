"""One process at a time: others are refused at once, a killed one leaves nothing that lasts."""

from __future__ import annotations

import errno
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

import robustcompress as rc
from robustcompress import lock
from robustcompress.lock import held
from tests.strategies.nets import QUICK_RECIPE, build, small_data

HOLDER = """
import sys, time
from pathlib import Path
from robustcompress.lock import held
with held(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds `tmp_path / "c"`."""
    command = [sys.executable, "-c", HOLDER, str(tmp_path / "c")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "held\n"
        try:
            yield process
        finally:
            process.kill()


def test_another_process_is_refused_and_told_who_holds_it_until_that_is_killed(
    holder: subprocess.Popen[str], tmp_path: Path
) -> None:
    said = rf"c is being written to by process {holder.pid} on {socket.gethostname()}, since \d{{4}}-.*: wait"
    with pytest.raises(rc.InputError, match=said), held(tmp_path / "other", tmp_path / "c"):
        raise AssertionError
    with held(tmp_path / "other"):  # which the refusal has let go
        pass
    with pytest.raises(rc.InputError, match=said):
        rc.compress(
            build("chain"), "none", data=small_data(), recipe=QUICK_RECIPE, progress=False, checkpoint=tmp_path / "c"
        )
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    assert (tmp_path / ".c.lock").is_file()  # stale
    with held(tmp_path / "c"):
        assert json.loads((tmp_path / ".c.lock").read_text())["pid"] == os.getpid()
    assert not list(tmp_path.iterdir())


def test_the_same_thread_may_take_it_again_and_another_may_not(tmp_path: Path) -> None:
    place, said = tmp_path / "c", []

    def work() -> None:
        try:
            with held(place):
                said.append("held")
        except rc.InputError as error:
            said.append(str(error))

    with held(place), held(tmp_path / "x" / ".." / "c"):
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
        assert (tmp_path / ".c.lock").is_file()
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert "another thread of this process" in said[0] and said[1:] == ["held"]


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")  # of later Pythons
def test_a_forked_child_does_not_inherit_it(tmp_path: Path) -> None:
    with held(tmp_path / "c"):
        child = os.fork()
        if child == 0:
            code = 1
            try:
                with held(tmp_path / "c"):
                    code = 2
            except rc.InputError:
                code = 0
            finally:
                os._exit(code)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert (tmp_path / ".c.lock").is_file()


def test_without_locks_of_the_file_system_the_file_is_believed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import fcntl

    def none(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", none)
    path = tmp_path / ".c.lock"
    for told, refused in (
        ({"host": socket.gethostname(), "pid": os.getppid()}, True),
        ({"host": socket.gethostname(), "pid": 2**22 + 1}, False),
        ({"host": "elsewhere", "pid": 1, "since": "yesterday"}, True),
        ({}, False),
    ):
        path.write_text(json.dumps(told))
        if refused:
            with (
                pytest.raises(rc.InputError, match=r"if that process is gone, remove .*\.c\.lock"),
                held(tmp_path / "c"),
            ):
                raise AssertionError
        else:
            with held(tmp_path / "c"):
                assert json.loads(path.read_text())["pid"] == os.getpid()


def test_where_no_file_can_be_made_nothing_is_locked(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with held(tmp_path / "file" / "below"), held(None):
        assert not lock._held
    (tmp_path / "c").mkdir()
    assert lock._file_of(tmp_path / "c") == tmp_path / ".c.lock"


def test_directories_on_the_way_are_made_and_stay_only_where_something_was_written(tmp_path: Path) -> None:
    with held(tmp_path / "a" / "b" / "c"):
        with held(tmp_path / "a" / "b" / "c"):
            assert (tmp_path / "a" / "b").is_dir()
        assert lock._held, "the outer one still holds"
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "mine").mkdir()
    with held(tmp_path / "mine" / "c"), held(tmp_path / "d" / "e" / "f"):
        (tmp_path / "d" / "result").write_text("")
    assert sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")) == ["d", "d/result", "mine"]


def test_a_way_that_somebody_removes_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, tries = lock.make_way, []

    def removed_once(path: Path) -> list[Path]:
        made = real(path)
        tries.append(path)
        if len(tries) == 1:
            path.parent.rmdir()
        return made

    monkeypatch.setattr(lock, "make_way", removed_once)
    with held(tmp_path / "runs" / "a"):
        assert len(tries) == 2 and (tmp_path / "runs" / ".a.lock").is_file()
    assert list(tmp_path.iterdir()) == []


def test_a_command_is_refused_at_once(holder: subprocess.Popen[str], tmp_path: Path) -> None:
    from robustcompress.cli import main

    assert main(["compress", "resnet8", "--checkpoint", str(tmp_path / "c"), "--quiet"]) == 2
    assert main(["pareto", "resnet8", "--out", str(tmp_path / "c"), "--quiet"]) == 2
