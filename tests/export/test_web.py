"""The page of export/web: its attack in node against what is known of it, and all of it in a headless browser."""

from __future__ import annotations

import functools
import http.server
import json
import os
import runpy
import shutil
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import robustcompress as rc
from robustcompress.export import load_session

pytestmark = pytest.mark.xdist_group("web")

PAGE = Path(__file__).parents[2] / "export" / "web"
NODE = shutil.which("node")
needs_node = pytest.mark.skipif(NODE is None, reason="there is no node")

# Attacks a linear model of three classes and tells every step.
_DRIVER = """
import { attack, sideAt, uniform } from "./attack.js";
const task = JSON.parse(process.argv[1]);
let calls = 0;
const scores = async (image) => {
  calls++;
  return task.weights.map((row) => row.reduce((sum, weight, i) => sum + weight * image[i], 0));
};
const image = Float32Array.from(task.image);
const steps = [];
for await (const step of attack({ ...task, image, scores, random: uniform(task.seed) })) {
  steps.push({ ...step, image: Array.from(step.image), scores: Array.from(step.scores) });
}
const sides = [1, 500, 1000, 10000].map((step) => sideAt(step, 10000, 1024));
console.log(JSON.stringify({ steps, calls, unchanged: Array.from(image), sides }));
"""


def attacked(weights: np.ndarray, image: np.ndarray, *, eps: float, budget: int, seed: int = 0) -> dict[str, Any]:
    assert NODE is not None
    task = {
        "weights": weights.reshape(len(weights), -1).tolist(),
        "image": image.ravel().tolist(),
        "shape": list(image.shape),
        "label": 0,
        "eps": eps,
        "budget": budget,
        "seed": seed,
    }
    command = [NODE, "--input-type=module", "-e", _DRIVER, json.dumps(task)]
    done = subprocess.run(command, cwd=PAGE, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.fixture(scope="module")
def linear() -> tuple[np.ndarray, np.ndarray]:
    """Weights of three classes, and an image in the middle of the range that is of class 0."""
    generator = np.random.default_rng(0)
    # Weights that are alike within a block: squares, which change a whole region at once, can follow them.
    weights = generator.normal(size=(3, 3, 2, 2)).repeat(4, 2).repeat(4, 3)
    image = np.float32(generator.uniform(0.4, 0.6, size=(3, 8, 8)))
    scores = np.einsum("kchw,chw->k", weights, image)
    weights[0] += (scores.max() - scores[0] + 3) / image.sum()
    return weights, image


@needs_node
def test_the_attack_stays_within_eps_and_counts_every_query(linear: tuple[np.ndarray, np.ndarray]) -> None:
    weights, image = linear
    eps = 0.004
    said = attacked(weights, image, eps=eps, budget=150)
    assert said["calls"] == len(said["steps"]) == 150
    assert [step["queries"] for step in said["steps"]] == list(range(1, 151))
    assert said["unchanged"] == image.ravel().tolist()
    for step in said["steps"]:
        found = np.array(step["image"]).reshape(image.shape)
        assert np.abs(found - image).max() <= eps + 1e-6
        scores = np.einsum("kchw,chw->k", weights, found)
        np.testing.assert_allclose(step["margin"], scores[0] - scores[1:].max(), atol=1e-4)
        assert step["found"] == (step["margin"] < 0)
    margins = [step["margin"] for step in said["steps"]]
    assert margins == sorted(margins, reverse=True)
    assert said == attacked(weights, image, eps=eps, budget=150)
    assert said["steps"][-1]["image"] != attacked(weights, image, eps=eps, budget=150, seed=1)["steps"][-1]["image"]


@needs_node
def test_the_attack_comes_near_the_known_optimum_and_never_below_it(linear: tuple[np.ndarray, np.ndarray]) -> None:
    """Against one other class a linear margin falls by at most eps times the absolute weights: x - eps sign(w)."""
    weights, image = linear
    apart = weights[0] - weights[1]
    clean, reach = float((apart * image).sum()), float(np.abs(apart).sum())
    eps = 0.5 * clean / reach  # half of what is needed
    said = attacked(weights[:2], image, eps=eps, budget=1000)
    last = said["steps"][-1]
    assert not last["found"]
    assert clean - eps * reach - 1e-4 <= last["margin"] <= clean - 0.8 * eps * reach
    needed = 1.5 * clean / reach
    said = attacked(weights[:2], image, eps=needed, budget=1000)
    assert said["steps"][-1]["found"] and len(said["steps"]) < 1000
    assert not any(step["found"] for step in said["steps"][:-1]), "it goes on after success"
    assert needed < 0.4, "the range [0, 1] would be felt"


@needs_node
def test_images_stay_in_range_and_squares_shrink(linear: tuple[np.ndarray, np.ndarray]) -> None:
    weights, image = linear
    said = attacked(weights, np.round(image), eps=0.3, budget=30)
    values = np.array([step["image"] for step in said["steps"]])
    assert values.min() >= 0 and values.max() <= 1
    assert said["sides"] == sorted(said["sides"], reverse=True)
    assert said["sides"][0] == round((0.8 * 1024) ** 0.5) and said["sides"][-1] == 2


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, format: str, *values: Any) -> None:
        pass


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    """The page with two models beside it, served: its address and its directory."""
    folder = tmp_path_factory.mktemp("page")
    model, _ = rc.build_model("resnet8", num_classes=10, width=0.25)
    for name, strategy in (("large", "none"), ("small", "uniform")):
        options = {} if strategy == "none" else {"budget": rc.Budget(macs=0.5)}
        rc.compress(model, strategy=strategy, data="digits", epochs=0.1, **options).save(folder / name)
    for path in PAGE.iterdir():
        if path.name != "demo":
            (folder / path.name).symlink_to(path)
    main = runpy.run_path(str(PAGE / "prepare.py"))["main"]
    assert main([str(folder / "large"), str(folder / "small"), "--out", str(folder / "demo")]) == 0
    handler = functools.partial(_Quiet, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}/", folder
        server.shutdown()
        thread.join()


@needs_node
@pytest.mark.slow
@pytest.mark.skipif(
    not (PAGE / "node_modules" / "@sparticuz" / "chromium").is_dir(),
    reason="npm install has not been run in export/web",
)
def test_the_page_in_a_browser(page: tuple[str, Path], tmp_path: Path) -> None:
    url, folder = page
    assert NODE is not None
    shot = tmp_path / "page.png"
    done = subprocess.run(
        [NODE, str(PAGE / "check_page.mjs"), url, str(shot)],
        env={**os.environ, "TMPDIR": str(tmp_path)},  # the browser unpacks itself there
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout)
    assert seen["errors"] == [] and seen["foreign"] == [], "the page asks others"
    demo = json.loads((folder / "demo" / "demo.json").read_text())
    session = load_session(folder / "demo" / demo["models"][0]["file"])
    assert len(seen["samples"]) == len(demo["samples"]) == 10
    for sample, shown in zip(demo["samples"], seen["samples"], strict=True):
        pixels = np.asarray(Image.open(folder / "demo" / sample["file"])).transpose(2, 0, 1)[None]
        logits = session.run(None, {"images": pixels.astype(np.float32) / 255})[0][0]
        shares = np.exp(logits) / np.exp(logits).sum()
        assert shown["label"] == f"sample: {sample['label']}"
        assert shown["top"] == [[str(k), f"{100 * shares[k]:.1f} %"] for k in np.argsort(-shares)[:3]]
    assert {attack["model"] for attack in seen["attacks"]} == {"0", "1"}
    for attack in seen["attacks"]:
        assert attack["change"] <= attack["eps"]
        assert (attack["change"] == 0) == (attack["eps"] == 0)
        queries = int(attack["said"].split(" after ")[1].split()[0])
        if attack["said"].startswith("Still"):
            assert queries == 200
        else:
            name = attack["said"].split()[2]
            assert attack["after"][0][0] == name and queries <= 200 and attack["eps"] > 0
    assert seen["stopped"].startswith("Still") and int(seen["stopped"].split(" after ")[1].split()[0]) < 5000
    assert seen["left"] == seen["later"], "an attack that was left wrote over the next picture"
    assert seen["reloaded"], "a picture that was chosen while a model was loading lost the model"
    with Image.open(shot) as picture:
        assert picture.width == 1000


@pytest.mark.slow
def test_prepare_replaces_only_what_it_wrote(page: tuple[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    folder = page[1]
    main = runpy.run_path(str(PAGE / "prepare.py"))["main"]
    assert main([str(folder / "large"), "--out", str(folder / "demo")]) == 1
    assert "pass --overwrite" in capsys.readouterr().out
    assert main([str(folder / "large"), "--out", str(folder / "small"), "--overwrite"]) == 1
    assert "not what this script wrote" in capsys.readouterr().out
    assert (folder / "small" / "result.json").is_file()
    assert not list(folder.glob(".demo-*"))
