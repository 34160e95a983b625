"""What the command line does where torchrun has started it."""

from __future__ import annotations

import json

import pytest

from robustcompress.cli import BAD_INPUT, main


def pretend(monkeypatch: pytest.MonkeyPatch, rank: int, size: int) -> None:
    told = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 1}
    for name, value in told.items():
        monkeypatch.setenv(name, str(value))


def test_a_command_for_one_process_refuses_several(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pretend(monkeypatch, 0, 2)
    assert main(["list", "strategies", "--json"]) == BAD_INPUT
    out, err = capsys.readouterr()
    assert "list is carried out by one process: leave torchrun out (compress, run, evaluate take several)" in err
    assert json.loads(out)["exit_code"] == BAD_INPUT


@pytest.mark.parametrize("arguments", [["list", "strategies"], ["compress", "--nothing"], ["--help"]])
def test_the_first_process_speaks_for_the_others(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    pretend(monkeypatch, 1, 2)
    assert main(arguments) == (0 if arguments == ["--help"] else BAD_INPUT)
    assert capfd.readouterr() == ("", "")


def test_one_process_of_torchrun_is_one_process(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pretend(monkeypatch, 0, 1)
    assert main(["list", "strategies", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)
