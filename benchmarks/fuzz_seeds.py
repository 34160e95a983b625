"""Small valid files of every kind that the package reads, made without training."""

from __future__ import annotations

import functools
import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

import robustcompress as rc
from benchmarks import common
from benchmarks.fuzz_formats import SIDE
from robustcompress.checkpoint import write
from robustcompress.front import Front, Point, accuracies_of
from robustcompress.models import identify
from robustcompress.result import CompressResult
from robustcompress.robust import hierarchy_from
from robustcompress.search.policy import Policy
from robustcompress.strategies import make_strategy

OWNED = "owned"
"""A file that is there once code of a file was run."""

PLANTED = f"""
from pathlib import Path
Path("{OWNED}").write_text("imported")
from robustcompress.models import resnet8
def make(**kwargs):
    return resnet8(width=0.25)
"""

RECIPE = """\
about: small
model: {name: resnet8, width: 0.25, stem_stride: 4}
data: {source: digits, train_limit: 50, test_limit: 20}
strategy: {name: hydra, search: 0.3}
budget: {macs: 0.5}
threat: {norm: linf, eps: 8/255}
objective: {name: pgd-at, steps: 1}
training: {batch_size: 32, lr: 0.05}
evaluate: {attacks: [clean, pgd-2], images: 10, curve: [0.1]}
epochs: 1
round_to: 2
seed: 3
"""


def network() -> torch.nn.Module:
    """A network that loads in a few milliseconds, with weights of its own."""
    torch.manual_seed(0)
    return rc.build_model("resnet8", width=0.25, stem_stride=2)[0].eval()


@functools.cache
def compressed() -> CompressResult:
    """A result of pruning and growing, without the training."""
    model, data = network(), rc.load_data("digits", train_limit=50, test_limit=20, seed=0)
    example = torch.zeros(2, *data.image_shape)
    spec, before = identify(model), rc.measure(model, example, latency=True)
    editor = rc.StructuralEditor(model, example)
    first = editor.editable[0]
    editor.prune(first.name, range(1, first.width))
    editor.grow(editor.editable[1].name, 2)
    hierarchy = hierarchy_from("digits")
    report = rc.evaluate(model, data.test, rc.ThreatModel(), attacks=("clean", "fgsm"), hierarchy=hierarchy)
    return CompressResult(
        model=model.eval(),
        spec=spec,
        strategy=make_strategy("grape").to_json(),
        edits=editor.edits,
        before=before,
        after=rc.measure(model, example, latency=True),
        budget={"macs": 0.9},
        history=({"phase": "tail", "epoch": 1, "loss": 2.0}, {"event": "grown", "group": first.name, "to": 9}),
        report=report,
        threat=rc.ThreatModel(),
        data={
            "name": data.name,
            "sha256": data.sha256,
            "classes": list(data.classes),
            "image_shape": list(data.image_shape),
            "train": 40,
            "val": 10,
            "test": 20,
        },
        settings={"epochs": 1, "round_to": 1, "pretrained": False, "objective": {"name": "pgd-at"}},
        seed=3,
    )


def _result(folder: Path) -> None:
    result = compressed()
    result.save(folder / "result")
    (folder / "planted.py").write_text(PLANTED)


def _checkpoint(folder: Path) -> None:
    phase = {"name": "tail", "steps": 3, "began": 0, "ended": 1}
    generator = torch.get_rng_state()
    record = {
        "identity": {"seed": 0},
        "versions": {"torch": "2"},
        "phases": [phase],
        "phase": phase | {"done": 1},
        "decisions": [{"name": "d", "value": [1, 2.5], "drawn": None}],
        "history": [{"phase": "tail", "epoch": 1}],
        "state": {"epoch": 1, "device": "cpu", "values": {}, "kept": {}, "edits": []},
    }
    weight = torch.randn(6, 4, 3, 3, generator=torch.Generator().manual_seed(0))
    tensors = {"model/weight": weight.to(memory_format=torch.channels_last), "optimizer/0.exp_avg": weight}
    write(folder / "whole", record, tensors | {"generator/torch": generator})
    write(folder / "small", record, tensors | {"generator/torch": generator}, half=True)


def _recipe(folder: Path) -> None:
    (folder / "recipe.yaml").write_text(RECIPE)
    (folder / "setting").write_text("training.lr=1e-3")
    shutil.copyfile(common.ROOT / "benchmarks" / "grids" / "digits-objectives.yaml", folder / "grid.yaml")


def _graph(folder: Path) -> None:
    import onnx
    from onnx import TensorProto, helper

    weight = np.random.default_rng(0).normal(size=(2, 3, 3, 3)).astype(np.float32)
    nodes = [
        helper.make_node("Conv", ["images", "weight"], ["features"], pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["features"], ["positive"]),
        helper.make_node("GlobalAveragePool", ["positive"], ["mean"]),
        helper.make_node("Flatten", ["mean"], ["logits"]),
    ]
    graph = helper.make_graph(
        nodes,
        "small",
        [helper.make_tensor_value_info("images", TensorProto.FLOAT, ["n", 3, SIDE, SIDE])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["n", 2])],
        [onnx.numpy_helper.from_array(weight, "weight")],
    )
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)])
    proto.ir_version = 9
    said = {"classes": ["a", "b"], "threat": rc.ThreatModel().to_json(), "image_shape": [3, SIDE, SIDE]}
    said |= {"accuracy": [{"attack": "clean", "accuracy": 0.5, "low": 0.4, "high": 0.6}], "data": {"name": "digits"}}
    helper.set_model_props(proto, {f"robustcompress.{key}": json.dumps(value) for key, value in said.items()})
    onnx.save(proto, str(folder / "model.onnx"))


def _latency(folder: Path) -> None:
    widths = [{"stem": 8 + n, "tail": 16 + 2 * n} for n in range(8)]
    networks = {"format": 1, "name": "resnet8", "image_shape": [3, 32, 32], "layers": "0" * 64, "macs": 1000}
    record = {"format": 1, "networks": networks | {"widths": widths}, "ms": [1.0 + n for n in range(8)]}
    (folder / "times.json").write_text(json.dumps(record | {"device": {"cpu": "x", "threads": 1}}))


def _extra(folder: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (4, SIDE, SIDE, 3), np.uint8)
    np.savez(folder / "extra.npz", image=pixels, label=np.arange(4))


def _images(folder: Path) -> None:
    from PIL import Image

    for split in ("train", "test"):
        for number, name in enumerate(("cat", "dog")):
            (folder / "photos" / split / name).mkdir(parents=True)
            for image in range(3):
                picture = Image.new("RGB", (SIDE, SIDE), (90 * number, 40 * image, 7))
                picture.save(folder / "photos" / split / name / f"{image}.png")


def _named_data(folder: Path) -> None:
    raw = folder / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for name, count in (("train", 20), ("t10k", 10)):
        pixels = np.random.default_rng(count).integers(0, 256, count * 28 * 28, np.uint8).tobytes()
        head = struct.pack(">IIII", 0x803, count, 28, 28)
        (raw / f"{name}-images-idx3-ubyte").write_bytes(head + pixels)
        labels = bytes(n % 10 for n in range(count))
        (raw / f"{name}-labels-idx1-ubyte").write_bytes(struct.pack(">II", 0x801, count) + labels)


def _policy(folder: Path) -> None:
    Policy(hidden=8).save(folder / "policy.safetensors")


def _weights(folder: Path) -> None:
    from safetensors.torch import save_file

    save_file(network().state_dict(), folder / "weights.safetensors")


def _hierarchy(folder: Path) -> None:
    (folder / "tree.json").write_text(json.dumps(hierarchy_from("digits").to_json()))


def _front(folder: Path) -> None:
    report = compressed().report
    assert report is not None
    point = Point(
        name="a",
        label="grape",
        strategy=make_strategy("grape").to_json(),
        budget={"macs": 0.5},
        macs=10,
        params=10,
        size=40,
        accuracies=accuracies_of(report),
    )
    front = Front(points=(point,), attack="fgsm", threat=rc.ThreatModel(), data="digits", seed=0)
    (folder / "pareto.json").write_text(json.dumps(front.to_json() | {"identity": {}}))


def _kept(folder: Path) -> None:
    report = compressed().report
    assert report is not None
    (folder / "chunk.json").write_text(json.dumps(report.result("fgsm").to_json()))
    (folder / "jury.json").write_text(json.dumps({"right": [True] * 20, "furthest": 0.1, "seconds": 0.2}))
    (folder / "ledger.jsonl").write_text("[0, 1, 0.5, 0.1]\n\n[1, 2, 0.25, 0.1]\n")
    radii = {"method": "smoothing", "norm": "l2", "settings": {"sigma": 0.25, "n0": 10, "n": 100, "alpha": 0.001}}
    lists = {"predictions": [1, 2], "labels": [1, 1], "radii": [0.5, 0.0], "indices": [0, 1]}
    said = {"format": 1, "images_sha256": "0", "seed": 0, "seconds": 1.0, "certified": [{"radius": 0, "accuracy": 0.5}]}
    (folder / "certificate.json").write_text(json.dumps(radii | lists | said))


def _records(folder: Path) -> None:
    _result(folder)
    _graph(folder / "result")
    bench = {"files": [{"name": "model.onnx", "batches": [{"batch": 1, "median_ms": 0.5, "p99_ms": 0.7}]}]}
    (folder / "result" / "model.onnx.bench.json").write_text(json.dumps(bench | {"runtime": "1.0", "threads": 1}))
    verify = {"file": "model.onnx", "attacks": [{"attack": "clean", "accuracy": 0.5, "low": 0.4, "high": 0.6, "n": 9}]}
    (folder / "result" / "model.onnx.verify.json").write_text(json.dumps(verify | {"warnings": ["none"]}))


MAKERS: dict[str, Callable[[Path], None]] = {
    "result": _result,
    "checkpoint": _checkpoint,
    "recipe": _recipe,
    "onnx": _graph,
    "latency": _latency,
    "extra": _extra,
    "images": _images,
    "named data": _named_data,
    "policy": _policy,
    "weights": _weights,
    "hierarchy": _hierarchy,
    "front": _front,
    "kept": _kept,
    "page": _records,
}


def make_seeds(folder: Path) -> None:
    """Write one valid set of files of each kind to `folder/KIND`."""
    for name, make in MAKERS.items():
        (folder / name).mkdir(parents=True)
        make(folder / name)
