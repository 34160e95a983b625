"""Being asked to stop: once to finish the step, twice to stop at once, and never where nobody listens."""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path

import pytest

import robustcompress as rc
from robustcompress.checkpoint import Journal, read
from robustcompress.interrupt import asked, graceful, stop_if_asked
from robustcompress.session import Session
from tests.strategies.nets import QUICK_RECIPE, build, same, small_data, state


def compress(**settings: object) -> rc.CompressResult:
    given = {"data": small_data(), "epochs": 2.0, "recipe": QUICK_RECIPE, "attacks": (), "progress": False}
    return rc.compress(build("chain"), "magnitude", **(given | settings))  # type: ignore[arg-type]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_asks_and_the_second_stops(number: signal.Signals, capfd: pytest.CaptureFixture[str]) -> None:
    before = signal.getsignal(number)
    with graceful():
        stop_if_asked("not yet")
        signal.raise_signal(number)
        assert asked() is number
        with pytest.raises(rc.Interrupted, match="after a while") as caught:
            stop_if_asked("after a while")
        assert caught.value.signal == number and isinstance(caught.value, rc.OutOfTime)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(number)
    assert asked() is None and signal.getsignal(number) is before
    assert f"{number.name}: stopping after this step" in capfd.readouterr().err


def test_what_is_ignored_stays_ignored_and_other_threads_change_nothing() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with graceful():
            signal.raise_signal(signal.SIGINT)
            assert asked() is None
    finally:
        signal.signal(signal.SIGINT, before)
    seen = []

    def work() -> None:
        with graceful():
            seen.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [signal.getsignal(signal.SIGTERM)]


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")  # of later Pythons
def test_a_forked_child_dies_of_its_signal() -> None:
    with graceful():
        child = os.fork()
        if child == 0:
            signal.raise_signal(signal.SIGTERM)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGTERM
        assert asked() is None


def test_a_run_stops_after_the_step_and_goes_on_from_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = compress()
    step_done = Journal.step_done

    def signalled(self: Journal, done: int, *rest: object) -> None:
        if done == 2:
            signal.raise_signal(signal.SIGTERM)
        step_done(self, done, *rest)  # type: ignore[arg-type]

    with monkeypatch.context() as patch, graceful():
        patch.setattr(Journal, "step_done", signalled)
        with pytest.raises(rc.Interrupted, match=r"after 2 of 3 steps; the same call with checkpoint="):
            compress(checkpoint=tmp_path / "c")
    found = read(tmp_path / "c")
    assert found is not None and found.record["phase"]["done"] == 2
    resumed = compress(checkpoint=tmp_path / "c")
    assert same(state(resumed.model), state(whole.model))


def test_without_a_checkpoint_it_stops_too_and_says_that_nothing_is_kept() -> None:
    with graceful():
        signal.raise_signal(signal.SIGINT)
        with pytest.raises(rc.Interrupted, match="nothing is kept of this run, which had no checkpoint"):
            compress()


def test_a_search_finishes_its_round(tmp_path: Path) -> None:
    model = rc.build_model("wrn_16_4", num_classes=10, width=0.125)[0]
    strategy = rc.RCNAS(evaluations=4, batch=2, finalists=1, recovery_steps=0, searcher="random", alpha=1.0)
    rounds: list[int] = []
    repeat = Session.repeat

    def spy(self: Session, phase: str, times: int, act: object) -> None:
        def counted(number: int) -> object:
            rounds.append(number)
            signal.raise_signal(signal.SIGTERM)
            return act(number)  # type: ignore[operator]

        repeat(self, phase, times, counted)  # type: ignore[arg-type]

    with pytest.MonkeyPatch.context() as patch, graceful():
        patch.setattr(Session, "repeat", spy)
        with pytest.raises(rc.Interrupted, match="phase 'candidates' after 1 of 2 steps"):
            rc.compress(
                model,
                strategy,
                data=small_data(),
                epochs=1.0,
                pretrained=True,
                recipe=QUICK_RECIPE,
                attacks=(),
                progress=False,
                checkpoint=tmp_path / "c",
            )
    found = read(tmp_path / "c")
    assert rounds == [0] and found is not None and found.record["phase"]["done"] == 1
