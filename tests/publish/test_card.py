"""The card's front matter is read by the hub's own reader, and nothing of a record becomes markup."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest
import yaml

import robustcompress as rc
from robustcompress.publish.card import code, md
from tests.publish.conftest import HOSTILE, hostile


def split(card: str) -> tuple[dict[str, Any], str]:
    _, matter, body = card.split("---\n", 2)
    return yaml.safe_load(matter), body


def test_the_hub_reads_its_numbers(result: rc.CompressResult) -> None:
    from huggingface_hub import ModelCard

    text = rc.model_card(result, repo="me/robust", license="apache-2.0", files=("model.onnx", "report.html"))
    data = ModelCard(text).data
    assert (data.library_name, data.license, data.pipeline_tag) == (
        "robustcompress",
        "apache-2.0",
        "image-classification",
    )
    assert {"pruning", "onnx", "adversarial-robustness"} <= set(data.tags) and data.datasets == ["digits"]
    found = {entry.metric_name: entry for entry in data.eval_results}
    assert result.report is not None and len(found) == len(result.report.attacks)
    assert found["Clean accuracy"].metric_value == pytest.approx(result.report.clean_accuracy, abs=1e-6)
    pgd = found["Accuracy under PGD-2, linf 0.1"]
    attack = result.report.result("pgd-2")
    assert pgd.metric_value == pytest.approx(attack.accuracy, abs=1e-6) and pgd.metric_type == "accuracy"
    assert pgd.metric_args["eps"] == 0.1 and pgd.metric_args["n"] == attack.n
    assert pgd.metric_args["interval_95"] == [round(attack.low, 4), round(attack.high, 4)]
    assert not any("Robust accuracy" in name for name in found)  # AutoAttack was not run


def test_only_autoattack_is_called_robust_accuracy(result: rc.CompressResult) -> None:
    assert result.report is not None
    clean, _, pgd = result.report.attacks
    report = replace(result.report, attacks=(clean, replace(pgd, name="autoattack", suite="standard")))
    matter, body = split(rc.model_card(replace(result, report=report)))
    metrics = matter["model-index"][0]["results"][0]["metrics"]
    assert [metric["name"] for metric in metrics] == ["Clean accuracy", "Robust accuracy under AutoAttack, linf 0.1"]
    assert metrics[1]["args"]["suite"] == "standard" and "AutoAttack was not run" not in body


def test_the_body_says_what_it_is_for_and_what_not(result: rc.CompressResult) -> None:
    matter, body = split(rc.model_card(result, repo="me/robust", files=("model.onnx",)))
    assert "license" not in matter and "stated no license" in body
    assert result.report is not None
    for attack in result.report.attacks:
        assert f"{100 * attack.accuracy:.1f} %" in body and f"{100 * attack.low:.1f} to" in body
    for said in (
        *("upper bound on robustness, never a certificate", "rc.load('hf://me/robust')", "InferenceSession"),
        *("linf 0.1", "Intended use, and limits", str(result.data["sha256"]), "AutoAttack was not run"),
    ):
        assert said in body
    for block in re.findall(r"```python\n(.*?)```", body, re.DOTALL):
        compile(block, "card", "exec")


def test_a_card_of_a_result_without_a_report(result: rc.CompressResult) -> None:
    matter, body = split(rc.model_card(replace(result, report=None, spec=None, settings={}, history=())))
    assert "model-index" not in matter and "Nothing was evaluated" in body and "model=your_factory" in body


def test_known_data_sets_have_their_names_on_the_hub(result: rc.CompressResult) -> None:
    matter, _ = split(rc.model_card(replace(result, data={**result.data, "name": "cifar10"})))
    assert matter["datasets"] == ["uoft-cs/cifar10"]


def test_nothing_of_a_strangers_record_becomes_markup(result: rc.CompressResult) -> None:
    from markdown_it import MarkdownIt

    stranger = hostile(result)
    matter, body = split(rc.model_card(stranger, repo="me/x"))
    assert matter["datasets"][0].startswith("<script>") and "license" not in matter
    tokens = MarkdownIt("gfm-like", {"linkify": False}).parse(body)
    flat = [child for token in tokens for child in (token, *(token.children or ()))]
    kinds = {token.type for token in flat}
    assert not kinds & {"html_block", "html_inline", "link_open", "image"}, kinds
    headings = [tokens[i + 1].content for i, token in enumerate(tokens) if token.type == "heading_open"]
    assert len(headings) == 7 and headings[1:] == [
        *("What it withstands", "Costs", "Intended use, and limits", "How to load it", "Provenance", "License"),
    ]
    rows = [token for token in tokens if token.type == "tr_open"]
    assert stranger.report is not None
    assert len(rows) == 2 + len(stranger.report.attacks) + len(stranger.rows())
    for i, token in enumerate(tokens):
        if token.type == "tr_open":
            cells = [t.type for t in tokens[i + 1 : [t.type for t in tokens].index("tr_close", i)]]
            assert cells.count("td_open") + cells.count("th_open") in (4, 5)


@pytest.mark.parametrize("text", [HOSTILE, "a`b``c", "`", "|", "x\ny", "", "https://evil.example", "*a* _b_ <b>"])
def test_text_is_shown_as_it_is(text: str) -> None:
    from markdown_it import MarkdownIt

    for write in (md, code):
        tokens = MarkdownIt("commonmark").parseInline(f"a {write(text)} b")[0].children or []
        assert {token.type for token in tokens} <= {"text", "code_inline", "text_special"}
        assert "\n" not in write(text)
    plain = "".join(
        token.content for token in MarkdownIt("commonmark").parseInline(f"a {md('*a* _b_ <b>')}")[0].children
    )
    assert plain == "a *a* _b_ <b>"


@pytest.mark.parametrize("license", ["Apache 2.0", "", "x: y", "a\nb"])
def test_a_license_is_an_identifier(license: str, result: rc.CompressResult) -> None:
    with pytest.raises(rc.InputError, match=r"apache-2\.0"):
        rc.model_card(result, license=license)
