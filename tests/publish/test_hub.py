"""What is sent is what is fetched; nothing else is fetched; each thing that can be missing is said in one sentence."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import robustcompress as rc
from robustcompress.cli import main
from robustcompress.hub import Address
from robustcompress.result import HISTORY, RECIPE, RESULT, WEIGHTS
from tests.publish.stand_in import TOKEN, Repo, StandIn, stand_in


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[StandIn]:
    """A stand-in for the hub, a token for it, and a cache of its own."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    with stand_in() as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        # Some versions read these once, when they are imported.
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", server.url)
        template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
        yield server


def files_of(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def same_network(a: rc.CompressResult, b: rc.CompressResult) -> bool:
    ours, theirs = a.model.state_dict(), b.model.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_what_was_sent_is_loaded(hub: StandIn, saved: Path, result: rc.CompressResult, tmp_path: Path) -> None:
    before = files_of(saved)
    pushed = rc.push(saved, "me/robust", license="apache-2.0")
    assert files_of(saved) == before  # nothing is written beside the result
    assert hub.repos["me/robust"].private and pushed.sent.private
    assert set(pushed.made) == {"README.md", "report.html"}
    there = hub.repos["me/robust"].commits[-1][1]
    assert {name: there[name] for name in before} == before and set(there) == {*before, *pushed.made}
    assert len(hub.repos["me/robust"].commits) == 2  # one commit
    assert b"rc.load('hf://me/robust')" in there["README.md"] and b"license: apache-2.0" in there["README.md"]
    again = rc.load("hf://me/robust")
    assert same_network(again, result) and again.to_json() == json.loads(json.dumps(result.to_json()))
    assert again.history == result.history
    pinned = rc.load(str(pushed.sent.address))
    assert pushed.sent.address.revision and same_network(pinned, result)


def test_a_revision_is_that_revision(hub: StandIn, saved: Path, result: rc.CompressResult, tmp_path: Path) -> None:
    first = rc.push(saved, "me/robust").sent.address
    other = replace(result, seed=77).save(tmp_path / "other")
    rc.push(other, "hf://me/robust")
    assert rc.load("hf://me/robust").seed == 77 and rc.load(str(first)).seed == result.seed


def test_what_lies_beside_goes_along_and_nothing_else(
    hub: StandIn, saved: Path, result: rc.CompressResult, tmp_path: Path
) -> None:
    (saved / "model.onnx").write_bytes(b"any bytes: they are sent and not run")
    (saved / "model.verify.json").write_text('{"ok": true}')
    (saved / RECIPE).write_text("model: resnet8\n")
    (saved / "README.md").write_text("# mine\n")
    for private in ("notes.txt", ".env", "secrets.json", "weights.pkl"):
        (saved / private).write_text('{"password": "of-mine"}')
    pushed = rc.push(saved, "me/robust", private=False)
    there = hub.repos["me/robust"].commits[-1][1]
    own = {RESULT, WEIGHTS, HISTORY, RECIPE}
    assert set(there) == own | {"model.onnx", "model.verify.json", "README.md", "report.html"}
    assert there["README.md"] == b"# mine\n" and pushed.made == ("report.html",) and not pushed.sent.private
    assert b"model.onnx" in there["report.html"] and b"of-mine" not in there["report.html"]
    fetched = rc.pull("hf://me/robust", tmp_path / "fetched")
    assert set(files_of(fetched)) == set(there) - {"report.html"}  # a stranger's page may hold scripts
    assert all(files_of(fetched)[name] == there[name] for name in files_of(fetched))


def test_what_is_public_is_meant_to_be(hub: StandIn, saved: Path) -> None:
    hub.repos["me/open"] = Repo(private=False)
    with pytest.raises(rc.InputError, match="exists and is public"):
        rc.push(saved, "me/open")
    assert len(hub.repos["me/open"].commits) == 1
    assert not rc.push(saved, "me/open", private=False).sent.private and len(hub.repos["me/open"].commits) == 2


def test_only_our_files_are_fetched(hub: StandIn, saved: Path, tmp_path: Path) -> None:
    rc.push(saved, "me/robust")
    strange = (
        "pytorch_model.bin",
        "weights.pkl",
        "setup.py",
        "config.json",
        "sub/model.onnx",
        "%2fx.onnx",
        ".x.onnx",
    )
    hub.commit("me/robust", dict.fromkeys(strange, b"\x80\x04"))
    hub.asked.clear()
    rc.load("hf://me/robust")
    assert {place.rpartition("/")[2] for place in hub.read("/resolve/")} == {RESULT, WEIGHTS, HISTORY}
    hub.asked.clear()
    fetched = rc.pull("hf://me/robust", tmp_path / "fetched")
    assert set(files_of(fetched)) == {RESULT, WEIGHTS, HISTORY, "README.md"}
    assert not any(name in place for place in hub.read("/resolve/") for name in strange)


@pytest.mark.parametrize("fetch", ["load", "pull"])
@pytest.mark.parametrize("damage", ["weights", "edits", "missing", "no result", "large", "negative"])
def test_what_is_damaged_is_refused_and_leaves_nothing(
    damage: str, fetch: str, hub: StandIn, saved: Path, tmp_path: Path
) -> None:
    rc.push(saved, "me/robust")
    there = hub.repos["me/robust"].commits[-1][1]
    if damage == "weights":
        hub.commit("me/robust", {WEIGHTS: there[WEIGHTS][:-1] + b"\x01"})
    elif damage == "edits":
        record = json.loads(there[RESULT]) | {"edits": [{"group": "x", "sources": [0], "init": None, "share": False}]}
        hub.commit("me/robust", {RESULT: json.dumps(record).encode()})
    elif damage in ("missing", "no result"):
        del there[WEIGHTS]
        if damage == "no result":
            there.clear()
    else:
        hub.said_sizes[WEIGHTS] = 10**12 if damage == "large" else -1
    before = sorted(path.name for path in tmp_path.iterdir())
    with pytest.raises(rc.ResultError) as caught:
        rc.load("hf://me/robust") if fetch == "load" else rc.pull("hf://me/robust", tmp_path / "fetched")
    assert "Traceback" not in str(caught.value) and len(str(caught.value)) < 700
    assert set(path.name for path in tmp_path.iterdir()) - {"cache"} == set(before) - {"cache"}
    if damage in ("large", "negative", "missing"):
        assert not hub.read("/resolve/")  # found out before anything is fetched


def test_a_result_of_a_network_of_ones_own_is_fetched_and_not_built(
    hub: StandIn, result: rc.CompressResult, tmp_path: Path
) -> None:
    own = replace(result, spec=rc.ModelSpec("my_models:net")).save(tmp_path / "own")
    with pytest.raises(rc.InputError, match="would import code"):
        rc.push(own, "me/own")
    assert not hub.asked
    rc.push(own, "me/own", model=result.spec)
    with pytest.raises(rc.InputError, match="would import code"):
        rc.load("hf://me/own")
    fetched = rc.pull("hf://me/own", tmp_path / "fetched")
    assert result.spec is not None and same_network(rc.load(fetched, model=result.spec), result)


# What can be missing.


@pytest.mark.parametrize(
    "name", ["robust", "me/", "/x", "me/a/b", "me/..", "../x", "me/x@", "me/x@../y", "me/x y", "hf://", "me/x.git"]
)
def test_an_address_that_is_none(name: str, saved: Path, hub: StandIn) -> None:
    for call in (lambda: rc.push(saved, name), lambda: rc.load("hf://" + name.removeprefix("hf://"))):
        with pytest.raises(rc.InputError, match="names no repository; write hf://owner/name"):
            call()
    assert not hub.asked


def test_addresses() -> None:
    assert Address.read("hf://me/x@v1.0/a") == Address("me/x", "v1.0/a") and Address.read("me/x") == Address("me/x")
    assert str(Address("me/x", "abc")) == "hf://me/x@abc" and str(Address("me/x")) == "hf://me/x"


def test_no_such_repository_or_revision(hub: StandIn, saved: Path, tmp_path: Path) -> None:
    for call in (lambda: rc.load("hf://me/nothing"), lambda: rc.pull("hf://me/nothing", tmp_path / "a")):
        with pytest.raises(rc.InputError, match=r"there is no hf://me/nothing on http.*or it is private"):
            call()
    rc.push(saved, "me/robust")
    with pytest.raises(rc.InputError, match="has no revision 'v9'"):
        rc.load("hf://me/robust@v9")


def test_no_token(hub: StandIn, saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(rc.InputError, match="there is no token; log in with `hf auth login`, or set HF_TOKEN"):
        rc.push(saved, "me/robust")
    assert not hub.asked


def test_a_token_without_the_right(hub: StandIn, saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_other")
    with pytest.raises(rc.InputError, match=r"refuses your token \(HTTP 401\)"):
        rc.push(saved, "me/robust")


def test_no_network(saved: Path, hub: StandIn, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # nobody listens there
    fetches = (lambda: rc.load("hf://me/x"), lambda: rc.pull("hf://me/x", tmp_path / "a"))
    for call in (lambda: rc.push(saved, "me/x"), *fetches):
        with pytest.raises(rc.HubError, match=r"http://127\.0\.0\.1:9 cannot be reached"):
            call()


def test_a_hub_that_fails(saved: Path, hub: StandIn) -> None:
    hub.fail_with = 500
    for call in (lambda: rc.push(saved, "me/x"), lambda: rc.load("hf://me/x")):
        with pytest.raises(rc.HubError, match="answered with HTTP 500"):
            call()
    hub.fail_with, hub.nonsense = 0, True
    with pytest.raises(rc.HubError, match="does not answer as a hub does"):
        rc.load("hf://me/x")


def test_without_huggingface_hub(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    for call in (lambda: rc.push(saved, "me/x"), lambda: rc.load("hf://me/x")):
        with pytest.raises(rc.InputError, match=r"pip install 'robustcompress\[hub\]'"):
            call()


def test_places_that_are_taken(hub: StandIn, saved: Path, tmp_path: Path) -> None:
    rc.push(saved, "me/robust")
    hub.asked.clear()
    for place, said in ((saved, "exists"), (saved / "result.json" / "x", "is no directory")):
        with pytest.raises(rc.InputError, match=said):
            rc.pull("hf://me/robust", place)
    assert not hub.asked
    (saved / "README.md").write_text("mine")
    with pytest.raises(rc.InputError, match="sent as it is"):
        rc.push(saved, "me/robust", license="mit")


# The command line.


def call(capsys: pytest.CaptureFixture[str], *argv: object) -> tuple[int, Any, str]:
    capsys.readouterr()
    code = main([str(word) for word in argv])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_commands(hub: StandIn, saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = call(capsys, "report", saved, "--curve", "0.05,0.1", "--curve-images", "10", "--examples", "1")
    assert code == 0 and "report.html" in out and (saved / "report.html").read_text().startswith("<!doctype html>")
    code, _, err = call(capsys, "report", saved)
    assert code == 2 and "--overwrite" in err
    code, _, err = call(capsys, "report", saved, "-o", tmp_path / "no" / "a.html")
    assert code == 2 and "create it first" in err
    code, out, _ = call(capsys, "card", saved, "--license", "mit", "--repo", "me/robust", "--json")
    assert code == 0 and json.loads(out) == {"card": str(saved / "README.md"), "license": "mit"}
    code, out, _ = call(capsys, "push", saved, "me/robust", "--json")
    assert code == 0 and json.loads(out)["made"] == [] and json.loads(out)["private"] is True
    code, out, _ = call(capsys, "pull", "hf://me/robust", tmp_path / "fetched")
    assert code == 0 and "model.safetensors" in out
    code, _, err = call(capsys, "evaluate", "hf://me/robust")
    assert code == 2 and "robustcompress pull" in err
    shutil.rmtree(tmp_path / "fetched")
    hub.fail_with = 503
    code, _, err = call(capsys, "pull", "hf://me/robust", tmp_path / "fetched")
    assert code == 1 and "HTTP 503" in err and not (tmp_path / "fetched").exists()
