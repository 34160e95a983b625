"""Two processes compute what one computes; here the quick part, all of it in one start of two processes."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from robustcompress.distributed import ALONE
from tests.distributed.jobs import Case, compressed, judged, quick_checks, troubled
from tests.distributed.spawned import together
from tests.strategies.nets import build

CASES = {
    "grown": Case("grape"),
    "pruned, dropout, AWP, clipping": Case("magnitude", "imported", recipe={"awp": 0.005, "clip_norm": 1.0}),
    "learnt masks under an ascent": Case("s2ap", epochs=1.0),
    "searched": Case("rcnas", epochs=1.0),
    "attention, SWA, SAM": Case("uniform", "transformer", recipe={"averaging": "swa", "sam": 0.05}),
    "auxiliary heads, Free-AT": Case("none", "auxiliary", free=True),
}


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    directory = tmp_path_factory.mktemp("chunks")
    return together(2, quick_checks, list(CASES.values()), str(directory))


def assert_equal(mine: dict[str, Any], whole: dict[str, Any]) -> None:
    assert mine["edits"] == whole["edits"]
    assert mine["weights"].keys() == whole["weights"].keys()
    for name, values in whole["weights"].items():
        assert np.array_equal(mine["weights"][name], values), name
    assert mine["answers"] == whole["answers"]
    assert len(mine["history"]) == len(whole["history"])
    for ours, theirs in zip(mine["history"], whole["history"], strict=True):
        assert ours.keys() == theirs.keys()
        for key, value in theirs.items():
            # Means of a record are sums over processes, in double precision.
            expected = pytest.approx(value, rel=1e-5, abs=1e-6) if isinstance(value, float) else value
            assert ours[key] == expected, key


@pytest.mark.parametrize("what", CASES)
def test_a_batch_in_two_parts_gives_the_same_bits_by_one_process_and_by_two(
    pair: list[dict[str, Any]], what: str
) -> None:
    number, whole = list(CASES).index(what), compressed(CASES[what], parts=2)
    for mine in pair:
        assert_equal(mine["compressed"][number], whole)


def test_where_memory_runs_out_in_one_process_all_make_the_step_again_in_smaller_pieces(
    pair: list[dict[str, Any]],
) -> None:
    # One process computes part 0 in its first pass of a step, and part 1 in its second.
    whole = troubled(ALONE, 2, ["", "", "", "", "", "memory"])
    for mine in pair:
        found = mine["memory"]
        assert [r["accumulate"] for r in found["history"] if r.get("event") == "out of memory"] == [4]
        for name, values in whole["weights"].items():
            np.testing.assert_allclose(found["weights"][name], values, rtol=1e-4, atol=1e-5)
        assert [r.get("event") for r in found["history"]] == [r.get("event") for r in whole["history"]]


def test_a_step_that_is_not_finite_in_one_process_is_left_out_in_all(pair: list[dict[str, Any]]) -> None:
    whole = troubled(ALONE, 2, ["", "", "", "nan"], nonfinite="skip")
    for mine in pair:
        found = mine["not finite"]
        assert sum(record.get("left_out", 0) for record in found["history"]) == 1
        for name, values in whole["weights"].items():
            assert np.array_equal(found["weights"][name], values), name


def test_evaluation_dealt_over_processes_is_that_of_one(pair: list[dict[str, Any]], tmp_path: Path) -> None:
    whole = judged(ALONE, str(tmp_path))
    files = len(list(tmp_path.iterdir()))
    assert files >= 6, "20 images in chunks of 3, and what is left of them"
    in_time = judged(ALONE, time_limit_s=1000)
    assert whole[-1] != in_time[-1], "survivors stay in their chunks"
    late = pair[0]["judged too late"]
    assert late["n"] == 6 and late["correct"] == in_time[-1]["correct"][:6], "the first chunk of each"
    assert [len(attack["correct"]) for attack in whole] == [40, 40, 40, 40, 20]
    assert whole[0]["accuracy"] > 0 and whole[0]["mistakes"]
    for mine in pair:
        assert mine["judged"] == whole and mine["judged in time"] == in_time
        assert mine["judged too late"] == late
        assert re.fullmatch(r"stopped in AutoAttack's apgd-ce after 6 of \d+ images", mine["stopped"])
        assert mine["judged again"] == [whole, whole] and mine["files"] == files, "each chunk is kept once"


def test_processes_tell_each_other(pair: list[dict[str, Any]]) -> None:
    for rank, mine in enumerate(pair):
        found = mine["agreement"]
        assert found["told"] == [[1, 2.5, None, "text"], [[0, 1, 2], [3, 4, 5]], 0]
        assert found["everyone"] == [[0, [0, 2], 0.0], [1, [1, 2], 2.0]]
        assert found["totals"] == [2.0, 1.0] and found["most"] == 10 and found["any"] == [True, False]
        assert found["first"] == {"from": 0}
        assert found["share"] == [[0, 2, 4], [1, 3]][rank]
        assert found["only_first"] == ("process 0: too much" if rank else "too much")
        assert found["together"] == "process 1: too much"


def test_processes_that_went_different_ways_are_told_so(pair: list[dict[str, Any]]) -> None:
    before = float(build().get_parameter("conv1.weight").detach().sum())
    for mine in pair:
        found = mine["astray"]
        assert found["same"] == found["rounding"] == ""
        assert float(found["mended"]) == before, "the first process's"
        assert "before phase 'p' process 1 has other edits of the network than process 0" in found["edits"]
        assert "values of model/conv1.weight" in found["weights"]
        assert "random generators" in found["generators"]
        assert "session.decide()" in found["generators"]


def test_the_directory_of_chunks_is_made(pair: list[dict[str, Any]], tmp_path: Path) -> None:
    whole = judged(ALONE, str(tmp_path / "new"))
    assert whole == pair[0]["judged"]
