"""Machines that come and go under torchrun's elastic agents; two agents on loopback stand in for two machines."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import robustcompress as rc
from robustcompress.cli import main

pytestmark = pytest.mark.slow

COMMAND = ["compress", "resnet8", "--model-arg", "stem_stride=4", "--strategy", "grape", "--data", "digits"]
COMMAND += ["--epochs", "40", "--training-option", "accumulate=2", "--attacks", "clean"]
# torch's agents share one store by default, and then no machine can come later than the first meeting.
ENVIRONMENT = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1", "OMP_NUM_THREADS": "1"}


class Machine:
    """An agent with one process; its output goes to a file."""

    def __init__(self, place: Path, name: str, port: int) -> None:
        self.log = place / f"{name}.log"
        elastic = ["--nnodes", "1:2", "--nproc-per-node", "1", "--max-restarts", "5", "--rdzv-id", "elastic"]
        elastic += ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"localhost:{port}"]
        command = [sys.executable, "-m", "torch.distributed.run", *elastic, "-m", "robustcompress", *COMMAND]
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [*command, "--out", str(place / "out")],
                stdout=log,
                stderr=log,
                env=os.environ | ENVIRONMENT,
                start_new_session=True,
            )

    def wait_for(self, said: str, times: int = 1, limit_s: float = 180) -> None:
        """Wait until its output holds a text so many times."""
        until = time.monotonic() + limit_s
        while self.log.read_text().count(said) < times:
            assert time.monotonic() < until and self.process.poll() is None, self.log.read_text()[-3000:]
            time.sleep(0.2)

    def die(self) -> None:
        """As when its power is lost."""
        children = subprocess.run(["pgrep", "-P", str(self.process.pid)], capture_output=True, text=True, check=False)
        for pid in (self.process.pid, *map(int, children.stdout.split())):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait()


def listens(port: int) -> bool:
    """Whether somebody serves it."""
    with socket.socket() as probe:
        return probe.connect_ex(("localhost", port)) == 0


@pytest.mark.skipif(shutil.which("pgrep") is None, reason="needs pgrep")
def test_a_machine_dies_and_another_joins_and_the_result_is_that_of_one_process(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    machines = [Machine(tmp_path, "first", port)]
    try:
        until = time.monotonic() + 60
        while not listens(port):  # whoever serves the meeting has to stay alive
            assert time.monotonic() < until
            time.sleep(0.1)
        machines.append(Machine(tmp_path, "second", port))
        first, second = machines
        first.wait_for("grow 1/4")
        second.die()
        first.wait_for("resumed from")
        machines.append(Machine(tmp_path, "third", port))
        first.wait_for("2 processes share", 2)
        assert first.process.wait(timeout=300) == 0, first.log.read_text()[-3000:]
        assert machines[2].process.wait(timeout=60) == 0, machines[2].log.read_text()[-3000:]
        said = first.log.read_text()
    finally:
        for machine in machines:
            if machine.process.poll() is None:
                machine.die()
    assert "SIGTERM: stopping after this step" in said, "the survivor was asked to make room for the newcomer"
    assert main([*COMMAND, "--out", str(tmp_path / "alone"), "--quiet"]) == 0
    together, alone = rc.load(tmp_path / "out"), rc.load(tmp_path / "alone")
    assert [edit.to_json() for edit in together.edits] == [edit.to_json() for edit in alone.edits]
    state = alone.model.state_dict()
    for name, tensor in together.model.state_dict().items():
        assert torch.equal(tensor, state[name]), name
