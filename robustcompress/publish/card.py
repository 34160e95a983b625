"""`model_card`: the README of a repository, in Markdown under the front matter that the Hugging Face Hub reads."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from robustcompress.publish.markup import plain
from robustcompress.publish.reading import (
    BOUND,
    attack_kind,
    attack_name,
    data_name,
    doubts,
    hardest,
    interval,
    model_name,
    pathless,
    percent,
    short,
    strategy_name,
)
from robustcompress.result import CompressResult
from robustcompress.robust import AttackResult
from robustcompress.strategies import STRATEGIES

DATASETS = {
    "cifar10": "uoft-cs/cifar10",
    "cifar100": "uoft-cs/cifar100",
    "svhn": "ufldl-stanford/svhn",
    "mnist": "ylecun/mnist",
    "fashion_mnist": "zalando-datasets/fashion_mnist",
}
"""What data sets are called on the hub; it links those."""

LICENSE = re.compile(r"[a-z0-9][a-z0-9.+-]{0,60}")


def model_card(
    result: CompressResult,
    *,
    repo: str = "",
    license: str | None = None,
    files: Sequence[str] = (),
) -> str:
    """Describe a result for those who may use it: what it is for, what it withstands, what not, how it is loaded.

    Args:
        result: What `compress` returned or `load` read.
        repo: "owner/name" of the repository, for the lines that load it; a directory is named where empty.
        license: Identifier of the network's license, such as "apache-2.0"; None says that there is none yet.
        files: Names of files that lie beside the card, such as "model.onnx".

    Returns:
        Markdown that begins with YAML between two lines of hyphens.

    Raises:
        InputError: The license is no identifier.
    """
    import yaml

    from robustcompress.errors import InputError

    if license is not None and not LICENSE.fullmatch(license):
        raise InputError(f"license={license!r}: give an identifier in small letters, such as apache-2.0 or cc-by-4.0")
    matter = yaml.safe_dump(front_matter(result, license, files), sort_keys=False, width=100, allow_unicode=True)
    parts = [
        f"# {md(_title(result))}",
        _summary(result),
        "## What it withstands",
        _accuracies(result),
        "## Costs",
        _table(("cost", "before", "after", "ratio"), result.rows()),
        "## Intended use, and limits",
        _use(result),
        "## How to load it",
        _loading(result, repo, files),
        "## Provenance",
        _provenance(result),
        "## License",
        f"`{license}`." if license else "The author has stated no license yet: ask before you use it.",
    ]
    return f"---\n{matter}---\n\n" + "\n\n".join(part for part in parts if part) + "\n"


def front_matter(result: CompressResult, license: str | None, files: Sequence[str]) -> dict[str, Any]:
    """The card's metadata, as plain data."""
    kind = STRATEGIES.get(str(result.strategy["name"]))
    direction = {"grow": "growing", "prune": "pruning", "search": "architecture-search"}.get(
        str(getattr(kind, "direction", ""))
    )
    onnx = any(name.endswith(".onnx") for name in files)
    tags = ["image-classification", "adversarial-robustness", "model-compression", direction, "onnx" if onnx else None]
    name = data_name(result)
    found: dict[str, Any] = {
        "library_name": "robustcompress",
        "pipeline_tag": "image-classification",
        "tags": [tag for tag in tags if tag],
        "datasets": [DATASETS.get(name, name)],
        "metrics": ["accuracy"],
    }
    if license:
        found["license"] = license
    if result.report is not None and any(attack.n for attack in result.report.attacks):
        found["model-index"] = [
            {
                "name": _title(result),
                "results": [
                    {
                        "task": {"type": "image-classification", "name": "Image classification"},
                        "dataset": {"type": DATASETS.get(name, name), "name": name, "split": "test"},
                        "metrics": [_metric(result, attack) for attack in result.report.attacks if attack.n],
                    }
                ],
            }
        ]
    return found


def _metric(result: CompressResult, attack: AttackResult) -> dict[str, Any]:
    """One accuracy, as a share, with what is needed to read it."""
    assert result.report is not None
    if attack.name == "clean":
        name = "Clean accuracy"
    else:
        kind = "Robust accuracy" if attack.name == "autoattack" else "Accuracy"
        name = f"{kind} under {attack_name(attack.name)}, {result.report.threat.label()}"
    args: dict[str, Any] = {"n": attack.n, "interval_95": [round(attack.low, 4), round(attack.high, 4)]}
    if attack.name != "clean":
        args |= {"attack": plain(attack.name, 40), **result.report.threat.to_json()}
    if attack.suite:
        args["suite"] = plain(attack.suite, 80)
    return {"type": "accuracy", "name": name, "value": round(attack.accuracy, 6), "args": args}


def _title(result: CompressResult) -> str:
    return f"{model_name(result)} compressed by {strategy_name(result)}, {data_name(result)}"


def _summary(result: CompressResult) -> str:
    before, after, report = result.before, result.after, result.report
    said = (
        f"An image classifier with {percent(after.macs / before.macs)} of the multiply-adds and "
        f"{percent(after.params / before.params)} of the parameters of its reference, trained to withstand attacks "
        f"within {result.threat.label()}. Made with robustcompress by the strategy {code(strategy_name(result))}."
    )
    if report is None:
        return said
    clean, attack = report.result("clean"), hardest(report)
    said += f" Clean accuracy {percent(clean.accuracy)} ({interval(clean)}, n={clean.n})"
    if attack is not None:
        said += (
            f", accuracy under {md(attack_name(attack.name))} {percent(attack.accuracy)} ({interval(attack)}, "
            f"n={attack.n})"
        )
    return said + "."


def _accuracies(result: CompressResult) -> str:
    report = result.report
    if report is None:
        return " ".join(doubts(None))
    rows = [
        (
            md(attack_name(attack.name)),
            percent(attack.accuracy),
            f"{100 * attack.low:.1f} to {100 * attack.high:.1f} %",
            str(attack.n),
            md(attack_kind(attack)),
        )
        for attack in report.attacks
    ]
    columns = ("attack", "accuracy", "95 % interval", "images", "what it can be taken for")
    threat = (
        f"Threat model: {report.threat.label()}, pixels from {report.threat.bounds[0]:g} to "
        f"{report.threat.bounds[1]:g}; the attacker knows the network and its weights. Test images of "
        f"{code(data_name(result))}."
    )
    warnings = [f"Warning: {md(warning)}" for warning in report.warnings]
    return "\n\n".join([threat, _table(columns, rows), BOUND, *doubts(report), *warnings])


def _use(result: CompressResult) -> str:
    channels, height, width = result.image_shape
    names = ", ".join(code(plain(name, 60)) for name in result.classes[:20])
    more = f", and {len(result.classes) - 20} more" if len(result.classes) > 20 else ""
    return "\n".join(
        [
            f"- For images of {channels} x {height} x {width} values in [0, 1], as it was trained on; any "
            f"normalisation is inside the network. It tells {len(result.classes)} classes apart: {names}{more}.",
            "- Images of another kind than its training data get an answer too, and a worthless one.",
            f"- What is stated holds for {result.threat.label()} alone: not for other norms or larger radii, not for "
            "patches, rotations, corruptions or poisoned training data.",
            "- A stronger attack than those above may leave less. Nothing here is a guarantee, or evidence enough for "
            "use where a wrong answer does harm.",
        ]
    )


def _loading(result: CompressResult, repo: str, files: Sequence[str]) -> str:
    place = f"hf://{repo}" if repo else "DIR"
    model = ""
    if result.spec is None or result.spec.imports_code:
        model = ", model=your_factory"
    parts = [
        f"```python\nimport robustcompress as rc\n\nresult = rc.load({place!r}{model})  # JSON and safetensors\n"
        "logits = result.model(images)  # float images [N, C, H, W] in [0, 1]\n```"
    ]
    if "model.onnx" in files:
        parts.append(
            "`model.onnx` needs onnxruntime alone:\n\n```python\nimport onnxruntime\n\n"
            'session = onnxruntime.InferenceSession("model.onnx")\n'
            "outputs = session.run(None, {session.get_inputs()[0].name: images})\n```"
        )
    if "recipe.yaml" in files:
        parts.append(
            "`recipe.yaml` says how it was made: `robustcompress run recipe.yaml --out again` does it once more."
        )
    if "report.html" in files:
        parts.append("`report.html` shows everything that was measured.")
    return "\n\n".join(parts)


def _provenance(result: CompressResult) -> str:
    settings, data = result.settings, result.data
    said: Mapping[str, object] = {
        "reference": f"{result.spec.name} ({short(result.spec.kwargs)})"
        if result.spec
        else "a network of the author's own",
        "strategy": short(pathless(result.strategy)),
        "budget": short(result.budget),
        "objective": short(settings.get("objective")),
        "fine-tuned by": short(settings.get("finetune")),
        "teacher": short(settings.get("teacher")),
        "training": short(settings.get("recipe")),
        "epochs": short(settings.get("epochs")),
        "seed": str(result.seed),
        "data": plain(data["name"], 120),
        "data, SHA-256": plain(data["sha256"], 64),
        "extra training images": short(data.get("extra")),
        "versions": short(settings.get("versions")),
        "device": short(settings.get("device")),
    }
    return "\n".join(f"- {name}: {code(value)}" for name, value in said.items() if value not in ("", "-"))


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(row) + " |" for row in (columns, ["---"] * len(columns), *rows)]
    return "\n".join(lines)


def md(text: object) -> str:
    """Text as Markdown that shows it as it is: no markup, no links, one line."""
    flat = " ".join(plain(text).split())
    safe = flat.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    safe = re.sub(r"([\\`*_{}\[\]#|~!$])", r"\\\1", safe)
    return re.sub(r"(?i)(https?|ftp|mailto|www)([:.])", r"\1&#8203;\2", safe)  # addresses become links by themselves


def code(text: object) -> str:
    """Text as a span of code, where nothing is markup; a bar would still end the cell of a table."""
    flat = " ".join(plain(text).split()).replace("|", "¦") or "-"
    longest = max((len(run) for run in re.findall(r"`+", flat)), default=0)
    fence = "`" * (longest + 1)
    room = " " if longest else ""
    return f"{fence}{room}{flat}{room}{fence}"
