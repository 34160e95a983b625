"""What reads files, what is done to the files, and what is then done with what was read."""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import torch

import robustcompress as rc
from benchmarks import fuzz_formats as formats
from benchmarks import fuzz_mutations as spoil
from benchmarks.fuzz_seeds import network
from benchmarks.grid import read_grid
from robustcompress import cli
from robustcompress.artefact import jury
from robustcompress.artefact.describe import describe_onnx
from robustcompress.artefact.doubts import flag_stored
from robustcompress.artefact.file import open_onnx
from robustcompress.certify.ledger import Ledger
from robustcompress.certify.report import CertificateReport
from robustcompress.checkpoint import Journal
from robustcompress.checkpoint import read as read_checkpoint
from robustcompress.commands.arguments import load_weights
from robustcompress.commands.run import setting
from robustcompress.data.extra import read_extra
from robustcompress.latency_table import read_latency_table
from robustcompress.pareto import read_front
from robustcompress.publish.artefacts import artefacts
from robustcompress.publish.page import build_page
from robustcompress.recipe import RunRecipe, merged
from robustcompress.robust import chunks, hierarchy_from
from robustcompress.robust.kept import Kept
from robustcompress.search.policy import Policy
from robustcompress.untrusted import read_json


@dataclass(frozen=True, slots=True)
class Reader:
    """One way in.

    Attributes:
        share: How many cases of a hundred or so are its.
        seed: Which valid files it begins with (see `fuzz_seeds.MAKERS`).
        damage: Spoils the files in a folder, and says how.
        read: Reads them, and does with what it read what users do.
    """

    share: int
    seed: str
    damage: Callable[[Random, Path], str]
    read: Callable[[Path], object]


def json_of(*names: str) -> Callable[[Random, Path], str]:
    """Damage to one of some JSON files."""
    return lambda rng, folder: spoil.json_file(rng, folder / rng.choice(names))


# Saved results.

STRANGE_MODELS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("planted:make", {}),
    ("os:system", {"command": "touch owned"}),
    ("robustcompress:resnet8", {"width": 1e6}),
    ("robustcompress:resnet8", {"num_classes": 2**40}),
    ("robustcompress:vit_tiny", {"depth": 10**7}),
    ("robustcompress:vit_tiny", {"image_size": 100_000}),
    ("robustcompress:wrn_28_10", {"width": 40.0}),
    ("robustcompress:nothing", {}),
    ("torchvision:resnet18", {"width_per_group": 10**6}),
    ("torchvision:resnet18", {"weights": "IMAGENET1K_V1"}),
    ("torchvision:vit_b_16", {"image_size": 80_000}),
    ("torchvision:efficientnet_b0", {"num_classes": 10**9}),
    ("torchvision:resnet18", {"norm_layer": "os.system"}),
    ("timm:resnet18", {"pretrained": True}),
    ("timm:resnet18", {"checkpoint_path": "/etc/passwd"}),
    ("timm:hf-hub:a/b", {}),
    ("timm:local-dir", {}),
    ("timm:vit_tiny_patch16_224", {"embed_dim": 3 * 10**6}),
    ("timm:vit_tiny_patch16_224", {"depth": 10**6}),
    ("timm:resnet18", {"block": "os.system"}),
    ("..", {}),
    ("a:b:c", {}),
)


def strange_edits(rng: Random) -> list[Any]:
    """Edits that ask for more than there is, or for memory without end."""
    group = rng.choice(("conv1", "layers.0.0.conv1", "layers.1.0.conv1", "layers.2.0.conv1", "fc", "nothing"))
    sources = rng.choice(([[-1, 1 << 20]], [[-1, 1 << 14]], [[0, 3]] * 3000, [[-1, 10**15]], [-7], [], [[3, 0]], "all"))
    edit = {"group": group, "sources": sources, "init": rng.choice(("pair", "clone", None, "x")), "share": True}
    insert = {"insert": rng.choice(("layers.0.0", "layers.1.0")), "kind": rng.choice(("se", "rir")), "width": 1 << 20}
    return rng.choice(([edit], [edit] * 50, [insert], [insert, edit], [{"bypass": "layers.0.0"}] * 3, [{}], [None]))


def spoil_result(rng: Random, folder: Path) -> str:
    """Damage to one of a result's files; the hash of the weights is made to fit, mostly."""
    place = folder / "result"
    record, weights = place / "result.json", place / "model.safetensors"
    kind = rng.randrange(10)
    if kind < 4:
        return spoil.json_file(rng, record)
    if kind == 4:
        path = place / "history.jsonl"
        return spoil.json_file(rng, path) if len(path.read_text().splitlines()) == 1 else _lines(rng, path)
    value = json.loads(record.read_text())
    if kind in (5, 6):
        said = spoil.tensors_file(rng, weights)
        if rng.random() < 0.9:
            value["weights_sha256"] = spoil.sha256(weights)
    elif kind == 7:
        name, options = rng.choice(STRANGE_MODELS)
        value["model"], said = {"name": name, "kwargs": options}, f"model {name}"
        if rng.random() < 0.3:
            value["edits"] = []
    elif kind == 8:
        value["edits"], said = strange_edits(rng), "edits"
    else:
        sizes = ([3, 4096, 4096], [3, 2**20, 2**20], [2**40, 1, 1], [1, 8, 8], [3, 1, 1], [3, 2048, 1024], [3, 0, 8])
        value["data"]["image_shape"], said = rng.choice(sizes), "image shape"
    record.write_text(json.dumps(value))
    return said


def _lines(rng: Random, path: Path) -> str:
    lines = path.read_text().splitlines()
    at = rng.randrange(len(lines))
    lines[at] = spoil.dumps(spoil.tree(rng, json.loads(lines[at])))
    path.write_bytes("\n".join(lines).encode("utf-8", "surrogatepass"))
    return f"a line of {path.name}"


def use_result(folder: Path) -> None:
    """What `load` promises: all of it works."""
    result = rc.load(folder / "result")
    assert str(result) and result._repr_html_() and result.rows() and result.meets_budget in (True, False)
    json.dumps(result.to_json(), allow_nan=False).encode()
    assert result.export_metadata() and len(result.classes) >= 0
    assert result.model(torch.zeros(1, *result.image_shape)).dim() == 2


def use_page(folder: Path) -> None:
    """The page about a stranger's result, and what lies beside it."""
    place = folder / "result"
    build_page(rc.load(place), None, directory=place, title="", count=0).encode()


def use_beside(folder: Path) -> None:
    """What lies beside a result that is our own."""
    result = rc.load(folder / "result")
    str(artefacts(result, folder / "result", None)).encode()


# Checkpoints.


def spoil_checkpoint(rng: Random, folder: Path) -> str:
    """Damage to the index or to the tensors, of which the hashes are made to fit."""
    place = folder / rng.choice(("whole", "small"))
    index = place / "checkpoint.json"
    kind = rng.randrange(4)
    if kind < 2:
        return spoil.json_file(rng, index)
    path = rng.choice(sorted(place.glob("*.safetensors")))
    value = json.loads(index.read_text())
    if kind == 2:
        said = spoil.tensors_file(rng, path)
    else:
        name = rng.choice(sorted(value["tensors"]))
        entry, said = value["tensors"][name], "layout of a tensor"
        huge = ([2**40], [0], [2**31, 2**31], [-1], [6, 4, 3, 4], [1] * 70)
        entry[rng.choice(("shape", "stride"))] = rng.choice(huge)
        if value["forms"] and rng.random() < 0.5:
            form = value["forms"][rng.choice(sorted(value["forms"]))]
            form[rng.choice(("shape", "stride", "dtype", "base", "kind"))] = rng.choice(
                (*huge, "torch.load", "x", None)
            )
    if rng.random() < 0.9:
        for item in value["files"]:
            item["sha256"] = spoil.sha256(place / item["name"])
    index.write_text(json.dumps(value))
    return said


def use_checkpoint(folder: Path) -> None:
    """Read it as a resumed run does."""
    for name in ("whole", "small"):
        read_checkpoint(folder / name)
        Journal(folder / name, lambda held: {"seed": 0}, versions={"torch": "2"})


# All others.


def spoil_setting(rng: Random, folder: Path) -> str:
    """A `--set` of the command line."""
    import yaml

    places = [p for p in spoil.paths(yaml.safe_load((folder / "recipe.yaml").read_text())) if all(map(str, p))]
    path = ".".join(str(part) for part in rng.choice(places))
    hostile = rng.choice(spoil.HOSTILE_YAML)().partition(": ")[2]
    value = rng.choice((hostile, spoil.dumps(spoil.anything(rng)), "1e-3", "[", "{a: 1}", "8/0"))
    (folder / "setting").write_bytes(f"{path}={value}".encode("utf-8", "surrogatepass"))
    return f"--set {path}"


def use_setting(folder: Path) -> None:
    """Read a setting, and lay it over a recipe."""
    import argparse

    from robustcompress.commands.run import _nested
    from robustcompress.recipe import read_yaml

    try:
        path, value = setting((folder / "setting").read_text(encoding="utf-8", errors="surrogateescape"))
    except argparse.ArgumentTypeError as error:
        raise rc.InputError(str(error)) from error
    RunRecipe.from_mapping(merged(read_yaml(folder / "recipe.yaml"), _nested(path, value)))


def use_onnx(folder: Path) -> None:
    """Look into a graph, and run it."""
    path = folder / "model.onnx"
    describe_onnx(path).to_json()
    file = open_onnx(path)
    report = rc.evaluate(network(), rc.load_data("digits", test_limit=20).test, attacks=("clean",), max_images=2)
    flag_stored(file.metadata, report.attacks[0])
    if max(file.image_shape) <= 64 and (file.batch or 1) <= 64:
        file.scores(torch.zeros(2, *file.image_shape))


def use_kept(folder: Path) -> None:
    """What long evaluations keep of themselves: what cannot be relied on is made again."""
    kept = Kept(folder)
    chunks.as_chunk(kept.read(folder / "chunk.json"), 20, "fgsm")
    for counted in (False, True):
        jury.as_kept(kept.read(folder / "jury.json"), 20, counted=counted)
    with contextlib.suppress(rc.ResultError):
        try:
            value = read_json(folder / "certificate.json")
        except ValueError:
            return
        str(CertificateReport.from_json(value))
    ledger = Ledger(folder / "resume", {"method": "smoothing"})
    path = ledger._path
    assert path is not None
    path.write_bytes((folder / "ledger.jsonl").read_bytes())
    Ledger(folder / "resume", {"method": "smoothing"}).get(0)


def spoil_kept(rng: Random, folder: Path) -> str:
    """Damage to one of them."""
    name = rng.choice(("chunk.json", "jury.json", "certificate.json", "ledger.jsonl"))
    return _lines_or_bytes(rng, folder / name) if name == "ledger.jsonl" else spoil.json_file(rng, folder / name)


def _lines_or_bytes(rng: Random, path: Path) -> str:
    text = spoil.dumps(spoil.tree(rng, [0, 1, 0.5, 0.1])).encode("utf-8", "surrogatepass")
    path.write_bytes(rng.choice((text, text + b"\n" + path.read_bytes(), spoil.some_bytes(rng, path.read_bytes()))))
    return "a ledger"


def spoil_named(rng: Random, folder: Path) -> str:
    """Damage to a file of a named data set."""
    path = rng.choice(sorted((folder / "MNIST" / "raw").iterdir()))
    content = path.read_bytes()
    sizes = rng.choice((2**31, 2**20, 0, 21)).to_bytes(4, "big")
    path.write_bytes(rng.choice((content[:4] + sizes + content[8:], spoil.some_bytes(rng, content))))
    return f"bytes of {path.name}"


def spoil_pictures(rng: Random, folder: Path) -> str:
    """Damage to one image of a directory."""
    return formats.picture_file(rng, rng.choice(sorted((folder / "photos").rglob("*.png"))))


def use_pictures(folder: Path) -> None:
    """Load a directory of images, scaled and not."""
    for size in (None, 8):
        data = rc.load_data(str(folder / "photos"), image_size=size, val_fraction=0.34)
        data.test.as_float()


# The command line.

COMMANDS: tuple[tuple[str, list[str]], ...] = (
    ("result", ["inspect", "result"]),
    ("result", ["report", "result", "-o", "page.html", "--examples", "0"]),
    ("result", ["card", "result", "-o", "card.md"]),
    ("recipe", ["run", "recipe.yaml", "--check"]),
    ("onnx", ["inspect", "model.onnx"]),
    ("onnx", ["bench", "model.onnx", "--seconds", "0.01"]),
)

PLACES = ("result", "page.html", "card.md", "recipe.yaml", "model.onnx")


def command(kind: str, arguments: list[str], damage: Callable[[Random, Path], str], share: int) -> Reader:
    """A command on a damaged file: it ends well, or with one line and the code for bad input."""

    def call(folder: Path) -> None:
        said = io.StringIO()
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
            code = cli.main([str(folder / a) if a in PLACES else a for a in arguments])
        if code != cli.OK:
            message = said.getvalue()
            assert code == cli.BAD_INPUT and "Traceback" not in message and "error: " in message, (code, message[:500])
            raise rc.InputError(message)

    return Reader(share, kind, damage, call)


RECIPE_DAMAGE: Callable[[Random, Path], str] = lambda rng, folder: spoil.yaml_file(rng, folder / "recipe.yaml")  # noqa: E731
GRID_DAMAGE: Callable[[Random, Path], str] = lambda rng, folder: spoil.yaml_file(rng, folder / "grid.yaml")  # noqa: E731
GRAPH_DAMAGE: Callable[[Random, Path], str] = lambda rng, folder: formats.graph_file(rng, folder / "model.onnx")  # noqa: E731

READERS: dict[str, Reader] = {
    "load": Reader(24, "result", spoil_result, use_result),
    "page": Reader(4, "result", spoil_result, use_page),
    "beside a result": Reader(
        6,
        "page",
        lambda rng, f: rng.choice(
            (
                json_of("result/model.onnx.bench.json", "result/model.onnx.verify.json"),
                lambda rng, f: formats.graph_file(rng, f / "result" / "model.onnx"),
            )
        )(rng, f),
        use_beside,
    ),
    "checkpoint": Reader(12, "checkpoint", spoil_checkpoint, use_checkpoint),
    "recipe": Reader(12, "recipe", RECIPE_DAMAGE, lambda f: RunRecipe.read(f / "recipe.yaml").to_json()),
    "settings": Reader(5, "recipe", spoil_setting, use_setting),
    "grid": Reader(1, "recipe", GRID_DAMAGE, lambda f: read_grid(f / "grid.yaml")),
    "onnx": Reader(10, "onnx", GRAPH_DAMAGE, use_onnx),
    "latency table": Reader(5, "latency", json_of("times.json"), lambda f: read_latency_table(f / "times.json").told()),
    "extra images": Reader(
        6,
        "extra",
        lambda rng, f: formats.npz_file(rng, f / "extra.npz"),
        lambda f: read_extra(f / "extra.npz", ratio=0.5, classes=10, image_size=(8, 8)).take(torch.tensor([0, 3])),
    ),
    "image directory": Reader(4, "images", spoil_pictures, use_pictures),
    "named data": Reader(2, "named data", spoil_named, lambda f: rc.load_data("mnist", root=f, val_fraction=0.5)),
    "policy": Reader(
        5,
        "policy",
        lambda rng, f: spoil.tensors_file(rng, f / "policy.safetensors"),
        lambda f: Policy.load(f / "policy.safetensors"),
    ),
    "weights": Reader(
        4,
        "weights",
        lambda rng, f: spoil.tensors_file(rng, f / "weights.safetensors"),
        lambda f: load_weights(network(), f / "weights.safetensors"),
    ),
    "hierarchy": Reader(
        4, "hierarchy", json_of("tree.json"), lambda f: hierarchy_from(f / "tree.json").distances.sum()
    ),
    "front": Reader(4, "front", json_of("pareto.json"), lambda f: read_front(f).rows()),
    "kept chunks": Reader(6, "kept", spoil_kept, use_kept),
    **{
        f"robustcompress {arguments[0]} ({kind})": command(kind, arguments, damage, 1)
        for (kind, arguments), damage in zip(
            COMMANDS, (*[spoil_result] * 3, RECIPE_DAMAGE, GRAPH_DAMAGE, GRAPH_DAMAGE), strict=True
        )
    },
}
