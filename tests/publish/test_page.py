"""The page holds what the record holds, needs nothing, and does nothing, whatever a record says."""

from __future__ import annotations

import base64
import io
import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import robustcompress as rc
from robustcompress.publish.examples import attack_examples
from robustcompress.publish.page import POLICY
from robustcompress.publish.provenance import recipe_of
from robustcompress.robust.evaluate import chosen_images
from tests.publish.conftest import HOSTILE, THREAT, hostile, spoil

TAGS = {
    *("html", "head", "meta", "title", "style", "body", "header", "nav", "a", "main", "footer", "section", "div", "p"),
    *("h1", "h2", "h3", "h4", "ul", "li", "b", "span", "strong", "code", "pre", "dl", "dt", "dd", "details", "summary"),
    *("table", "caption", "thead", "tbody", "tr", "th", "td", "figure", "figcaption", "img"),
    *("svg", "g", "line", "text", "rect", "circle", "polyline"),
}
ATTRIBUTES = {
    *(
        "lang",
        "charset",
        "http-equiv",
        "content",
        "name",
        "id",
        "class",
        "aria-label",
        "aria-labelledby",
        "href",
        "src",
    ),
    *("alt", "scope", "tabindex", "role", "viewbox", "x", "y", "x1", "x2", "y1", "y2", "cx", "cy", "r", "width"),
    *("height", "points", "text-anchor", "transform"),
}


class Page(HTMLParser):
    """What a page consists of."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())

    def all(self, name: str) -> list[dict[str, str | None]]:
        return [attributes for tag, attributes in self.elements if tag == name]


def written(result: rc.CompressResult, path: Path, *args: Any, **options: Any) -> Page:
    text = rc.write_report(result, path, *args, **options).read_text()
    page = Page(text)
    check_harmless(page, text)
    return page


def check_harmless(page: Page, text: str) -> None:
    """Every element is closed and known; nothing is loaded, run, or led to outside."""
    assert not page.open
    assert {tag for tag, _ in page.elements} <= TAGS
    for tag, attributes in page.elements:
        assert set(attributes) <= ATTRIBUTES, (tag, attributes)
    assert all(str(link["href"]).startswith("#") for link in page.all("a"))
    assert all(str(image["src"]).startswith("data:image/png;base64,") for image in page.all("img"))
    style = re.findall(r"<style>(.*?)</style>", text, re.DOTALL)
    assert len(style) == 1 and "url(" not in style[0] and "@import" not in style[0] and "http" not in style[0]
    policy = [meta["content"] for meta in page.all("meta") if meta.get("http-equiv") == "Content-Security-Policy"]
    assert policy == [POLICY] and "script" not in POLICY and "default-src 'none'" in POLICY
    anchors = {attributes["id"] for _, attributes in page.elements if "id" in attributes}
    assert {str(link["href"])[1:] for link in page.all("a")} <= anchors
    assert all(attributes.get("scope") in ("col", "row") for attributes in page.all("th"))
    assert '<th scope="col"></th>' not in text and all("tabindex" in pre for pre in page.all("pre"))
    pictures = [*page.all("img"), *({"alt": svg.get("aria-label")} for svg in page.all("svg"))]
    assert pictures and all(len(str(picture["alt"] or "")) > 10 for picture in pictures)
    assert len(text.encode()) < 1_000_000


def test_everything_of_the_result_is_in_it(result: rc.CompressResult, digits: rc.DataSplits, tmp_path: Path) -> None:
    page = written(result, tmp_path / "a.html", digits, curve=(0.05, 0.2), curve_images=20)
    assert result.report is not None
    for attack in result.report.attacks:
        assert f"{100 * attack.accuracy:.1f} %" in page.text
        assert f"{100 * attack.low:.1f} to {100 * attack.high:.1f} %" in page.text
    for row in result.rows():
        assert all(cell in page.text for cell in row)
    for said in (
        *(digits.sha256, result.report.images_sha256, torch.__version__, "hydra", "resnet8", "linf 0.1"),
        *("AutoAttack was not run", "upper bound on robustness, never a certificate", "a progress meter, not a result"),
        *("Security curve", "The best 2 of 2 by reward", "robustcompress run recipe.yaml", "end of pretrain"),
    ):
        assert said in page.text, said
    widths = {
        group.name: group.width for group in rc.StructuralEditor(result.model, torch.zeros(2, 3, 32, 32)).editable
    }
    assert all(name in page.text and str(width) in page.text for name, width in widths.items())
    assert page.text.count("certificate") == page.text.count("never a certificate")


def test_the_curve_is_what_evaluate_measures(result: rc.CompressResult, digits: rc.DataSplits, tmp_path: Path) -> None:
    page = written(result, tmp_path / "a.html", digits, examples=0, curve=(0.02, 0.3), curve_images=25)
    for eps in (0.02, 0.3):
        report = rc.evaluate(result.model, digits.test, rc.ThreatModel("linf", eps), attacks=("pgd-20",), max_images=25)
        found = report.result("pgd-20")
        row = f"{eps:g} {100 * found.accuracy:.1f} % {100 * found.low:.1f} to {100 * found.high:.1f} % 25"
        assert row in page.text


def test_a_recorded_curve_is_shown_and_a_nonsensical_one_is_not(result: rc.CompressResult, tmp_path: Path) -> None:
    curve = [{"eps": 0.1, "n": 40, "accuracy": 0.25}]
    recorded = replace(result, settings={**result.settings, "curve": curve})
    assert "0.1 25.0 % 14.2 to 40.2 % 40" in written(recorded, tmp_path / "a.html").text
    for nonsense in (5, "x", [3], [{"eps": "a"}], [{"eps": 0.1, "n": 0, "accuracy": 2}], [{"eps": 1e999, "n": 1}]):
        broken = replace(result, settings={**result.settings, "curve": nonsense})
        assert "Security curve" not in written(broken, tmp_path / "b.html", overwrite=True).text


def test_a_page_without_anything(result: rc.CompressResult, tmp_path: Path) -> None:
    data = {key: result.data[key] for key in ("name", "sha256", "classes", "image_shape")}
    bare = replace(result, report=None, history=(), settings={}, spec=None, data=data)
    page = written(bare, tmp_path / "bare.html")
    assert "Nothing was evaluated" in page.text and "a network of the author's own" in page.text
    assert "Training" not in page.text and not page.all("img")


def test_attacked_images_are_within_the_threat_and_said_as_the_network_says(
    result: rc.CompressResult, digits: rc.DataSplits, tmp_path: Path
) -> None:
    from PIL import Image

    found = attack_examples(result, digits.test, 4)
    judged = digits.test.subset(chosen_images(len(digits.test), None))
    right = [
        i for i in range(len(judged)) if int(result.model(judged.as_float()[i : i + 1]).argmax()) == judged.labels[i]
    ]
    assert 1 <= len(found) <= 4 and len(found) == min(4, len(right))
    for place, example in zip(right, found, strict=False):
        assert torch.equal(example.clean, judged.as_float()[place]) and example.label == int(judged.labels[place])
        assert float((example.attacked - example.clean).abs().max()) <= THREAT.limit
        assert example.after[0] == int(result.model(example.attacked[None]).argmax())
        assert example.before[0] == example.label
    page = written(result, tmp_path / "a.html", digits, examples=4)
    images = page.all("img")
    assert len(images) == 3 * len(found)
    for place, pixels in ((0, found[0].clean), (2, found[0].attacked)):
        png = base64.b64decode(str(images[place]["src"]).partition(",")[2])
        shown = torch.tensor(list(Image.open(io.BytesIO(png)).convert("RGB").tobytes())).view(32, 32, 3)
        assert (shown.permute(2, 0, 1) - pixels * 255).abs().max() <= 0.51
    assert "5 times" in page.text and "not chosen for effect" in page.text


def test_large_images_keep_the_page_small(result: rc.CompressResult, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (24, 3, 256, 256), dtype=torch.uint8, generator=generator)
    with torch.no_grad():
        labels = result.model(pixels.float() / 255).argmax(1)  # all classified right
    large = replace(result, data={**result.data, "image_shape": [3, 256, 256]})
    page = written(large, tmp_path / "a.html", rc.Images(pixels, labels), examples=24)
    assert len(page.all("img")) == 72 and re.search(r"Shown at (64|48|32) of 256 pixels", page.text)


@pytest.mark.filterwarnings("ignore")
def test_nothing_of_a_strangers_record_becomes_markup(
    result: rc.CompressResult, digits: rc.DataSplits, tmp_path: Path
) -> None:
    directory = tmp_path / "result"
    directory.mkdir()
    named = "<img src=x onerror=alert(4)>"
    (directory / f"{named}.bench.json").write_text(json.dumps(spoil({"a": "b", "rows": [{"x": "y"}], "c": {"d": "e"}})))
    rc.export_onnx(result, directory / f"{named}.onnx", metadata={"note": HOSTILE}, verify=False)
    (directory / "broken.onnx").write_text(HOSTILE)
    (directory / "broken.verify.json").write_text(HOSTILE)
    stranger = hostile(result)
    page = written(stranger, tmp_path / "a.html", digits.test, directory=directory, title=HOSTILE)
    assert page.text.count("<script>alert(1)</script>") > 20  # as text
    assert named in page.text and "\u202e" not in page.text
    assert stranger.report is not None and f"{100 * stranger.report.clean_accuracy:.1f} %" in page.text


@pytest.mark.parametrize(
    "record",
    [
        {"phase": 3, "epoch": "x", "steps": "y", "loss": [], "robust": {}, "val_robust": "1"},
        {"phase": "a", "steps": 10**400, "loss": 1e308, "robust": 10**400, "hamming": 1e999, "epoch": 1},
        {"event": "candidate", "val_robust": 0.1, "reward": 1e308, "config": "x", "bypassed": 5, "macs": "z"},
        {"event": {"a": [1]}, "phase": None},
        {"event": "x" * 100_000, "y": "z" * 1_000_000},
    ],
)
def test_odd_records_do_not_stop_it(record: dict[str, Any], result: rc.CompressResult, tmp_path: Path) -> None:
    written(replace(result, history=(record, *result.history, record)), tmp_path / "a.html")


def test_a_number_that_nothing_can_have_is_refused(result: rc.CompressResult, tmp_path: Path) -> None:
    vast = replace(result, after=replace(result.after, macs=10**400))
    with pytest.raises(rc.ResultError, match="too large"):
        rc.write_report(vast, tmp_path / "a.html")
    assert list(tmp_path.iterdir()) == []


def test_files_beside_it_are_shown(result: rc.CompressResult, saved: Path, digits: rc.DataSplits) -> None:
    rc.export_onnx(result, saved / "model.onnx")
    bench = {
        "file": "/home/somebody/model.onnx",
        "batch": {"1": {"p50_ms": 0.123}},
        "runs": [{"threads": 1, "p50_ms": 0.5}, {"threads": 2, "p50_ms": 0.4}],
    }
    (saved / "model.bench.json").write_text(json.dumps(bench))
    (saved / "other.json").write_text('["of mine alone"]')
    page = written(result, saved / "report.html", digits, directory=saved, examples=0)
    size = (saved / "model.onnx").stat().st_size
    for said in (f"{size / 1e3:.1f} kB", "images: float [batch, 3, 32, 32]", "Latency of model", "0.123", "100 %"):
        assert said in page.text, said
    assert "of mine alone" not in page.text and "somebody" not in page.text
    weights = json.loads((saved / "result.json").read_text())["weights_sha256"]
    assert weights in page.text


def test_what_was_measured_of_a_file_is_readable(result: rc.CompressResult, saved: Path, digits: rc.DataSplits) -> None:
    path = saved / "model.onnx"
    rc.export_onnx(result, path)
    measured = rc.verify_artefact(
        path, digits, result.threat, twin=result.model, attacks=["pgd-2", "square-3"], max_images=12
    )
    timed = rc.bench_onnx([path], seconds=0.05)
    (saved / "model.verify.json").write_text(json.dumps(measured.to_json()))
    (saved / "model.bench.json").write_text(json.dumps(timed.to_json()))
    page = written(result, saved / "report.html", directory=saved, examples=0)
    worst = measured.to_json()["worst_case"]
    for said in (
        "square-3",
        f"{100 * worst['accuracy']:.1f} %",
        "median ms",
        "All of the record",
        "never a certificate",
    ):
        assert said in page.text, said
    assert page.text.count("All of the record") == 2


def test_a_file_of_another_network_is_noticed(result: rc.CompressResult, saved: Path) -> None:
    torch.manual_seed(1)
    other, _ = rc.build_model("resnet8", num_classes=10, width=0.25, stem_stride=4)
    rc.export_onnx(other, saved / "model.onnx", image_shape=(3, 32, 32), classes=[f"c{i}" for i in range(10)])
    page = written(result, saved / "report.html", directory=saved)
    assert "does not compute what the model computes" in page.text and "other classes" in page.text


def test_the_recipe_makes_the_same_run(result: rc.CompressResult, digits: rc.DataSplits) -> None:
    recipe = rc.RunRecipe.from_mapping(yaml.safe_load(recipe_of(result)))
    assert result.spec is not None and recipe.model.to_json() == result.spec.to_json()
    assert recipe.strategy.to_json() == result.strategy
    assert recipe.budget.to_json() == result.budget and recipe.threat == result.threat and recipe.seed == 0
    assert recipe.load_data().sha256 == digits.sha256 == result.data["sha256"]
    assert recipe.evaluate.attacks == ("clean", "fgsm", "pgd-2") and recipe.evaluate.images == 30


def test_a_recorded_recipe_is_preferred_and_loses_its_paths(result: rc.CompressResult) -> None:
    run = {"model": "resnet8", "data": {"source": "/home/somebody/photos"}, "about": "x"}
    said = yaml.safe_load(recipe_of(replace(result, settings={"run": run})))
    assert said == {"model": "resnet8", "data": {"source": "photos"}, "about": "x"}


def test_other_images_are_noticed(result: rc.CompressResult, digits: rc.DataSplits, tmp_path: Path) -> None:
    said = "not those that this result was judged on"
    other = rc.load_data("digits", train_limit=200, test_limit=41, seed=5)
    assert said in written(result, tmp_path / "a.html", other, examples=1).text
    fewer = rc.load_data("digits", train_limit=100, test_limit=40)  # other training images, the same test images
    assert fewer.sha256 != digits.sha256
    assert said not in written(result, tmp_path / "b.html", fewer, examples=1).text


def test_refuses_all_at_once_and_before_any_work(
    result: rc.CompressResult, digits: rc.DataSplits, tmp_path: Path
) -> None:
    with pytest.raises(rc.InputError) as caught:
        rc.write_report(result, tmp_path / "no" / "a.txt", directory=tmp_path / "none", examples=99, curve=(0.1, -1))
    for said in ("create it first", "must end in .html", "does not exist", "examples=99", "eps=-1", "pass data"):
        assert said in str(caught.value)
    wrong = rc.Images(digits.test.pixels[:, :, :16, :16], digits.test.labels)
    with pytest.raises(rc.InputError, match="the images are"):
        rc.write_report(result, tmp_path / "a.html", wrong)
    (tmp_path / "a.html").write_text("mine")
    with pytest.raises(rc.InputError, match="exists"):
        rc.write_report(result, tmp_path / "a.html")
    assert [path.name for path in tmp_path.iterdir()] == ["a.html"] and (tmp_path / "a.html").read_text() == "mine"


def test_what_fails_leaves_nothing(result: rc.CompressResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: Path, target: Path) -> Path:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(rc.InputError, match="No space left"):
        rc.write_report(result, tmp_path / "a.html")
    assert list(tmp_path.iterdir()) == []
