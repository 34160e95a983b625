"""How near cheaper attacks come to AutoAttack, and for how many passes of the network.

Small networks are trained once (benchmarks/strong_nets.py; seconds to minutes each) into --nets: robust ones on the
digits, linf and l2, one that was trained without attacks, a transformer, and two on 4,000 photos of CIFAR-10, which are
left out where --root does not exist. Of each, the same test images are attacked with AutoAttack's standard suite and
with cheaper attacks. Per attack and network:
  gap       per cent of the images that it leaves right, minus what AutoAttack leaves right
  only AA   images that AutoAttack breaks and it does not; "only it" is the reverse
  forward, backward  images that went through the network, over the images judged; counted by hooks. An image that the
            network gets wrong without an attack costs nothing.
AutoAttack's results are kept in --nets in pieces of 64 images, so that a run that was stopped goes on and one with more
--images adds to it. No times are taken: they are benchmarks/evaluation_speed.py's.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.common import (
    add_out,
    make_parser,
    out_path,
    positive,
    provenance,
    record,
    table,
    threads,
    write_json,
)
from benchmarks.strong_nets import NETS, Net, images_of, trained
from robustcompress import evaluate
from robustcompress.robust import AutoAttackConfig
from robustcompress.robust.autoattack import autoattack
from robustcompress.robust.chunks import model_sha256
from robustcompress.robust.evaluate import chosen_images
from robustcompress.robust.judge import hash_of
from robustcompress.robust.report import pack_flags, unpack_flags

MODULE = "strong_attack"
REFERENCE = "autoattack"
FAST = tuple(f"apgd-fast-{passes}" for passes in (15, 30, 60, 400))
ATTACKS = ("pgd-20", "pgd-100", "pgd-20x5-margin", *FAST, "apgd-fast")
PIECE = 64
QUICK = AutoAttackConfig(apgd_iterations=2, fab_iterations=1, square_queries=2, target_classes=1)


class Passes:
    """Counts the images that go forward and backward through a network, and the forward calls."""

    def __init__(self) -> None:
        self.forward = self.backward = self.calls = 0

    def _backward(self, grad: Tensor) -> None:
        self.backward += len(grad)

    def _forward(self, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        self.forward += len(output)
        self.calls += 1
        if output.requires_grad:
            output.register_hook(self._backward)

    @contextlib.contextmanager
    def counting(self, model: nn.Module) -> Iterator[None]:
        """Count while this is open."""
        handle = model.register_forward_hook(self._forward)
        try:
            yield
        finally:
            handle.remove()


def main(argv: Sequence[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else list(argv)
    options = _parser().parse_args(argv)
    path = out_path(options, MODULE)
    nets = [net for net in NETS[: options.networks] if not net.photos or options.root.is_dir()]
    if options.quick:
        nets, options.images, options.attacks = nets[:1], 16, ["pgd-20", "apgd-fast-15"]
    with threads(options.threads):
        # Round by round over all networks, so that a run that is stopped has something of each.
        for count in range(PIECE, options.images + PIECE, PIECE):
            for net in nets:
                reference(net, options, min(count, options.images))
        results = [compare(net, options) for net in nets]
    value = record(MODULE, options, argv, results, data={"name": "digits and a part of CIFAR-10", "sha256": None})
    write_json(path, value)
    if not options.quick:
        plot(value, path.with_suffix(".png"))
    print(markdown(value))
    return 0


def reference(net: Net, options: argparse.Namespace, images: int) -> dict[str, Any]:
    """AutoAttack on the first images, in pieces of which finished ones are read: flags and passes."""
    model, pixels, labels = _case(net, options, images)
    settings = QUICK if options.quick else AutoAttackConfig()
    flags, broken_by, counts = [], {}, Passes()
    for at in range(0, len(labels), PIECE):
        x, y = pixels[at : at + PIECE], labels[at : at + PIECE]
        key = hashlib.sha256(f"{model_sha256(model)} {hash_of(x, y)} {net.threat} {settings}".encode()).hexdigest()
        kept = options.nets / REFERENCE / f"{key[:32]}.json"
        if not kept.exists():
            with torch.no_grad():
                right = model(x).argmax(1) == y
            spent = Passes()
            with spent.counting(model):
                found = autoattack(
                    model, x[right], y[right], net.threat, num_classes=10, seed=options.seed, config=settings
                )
            right[right.clone()] = found.correct
            write_json(
                kept,
                {
                    "correct": pack_flags(right),
                    "broken_by": found.broken_by,
                    "forward": spent.forward,
                    "backward": spent.backward,
                },
            )
            print(f"{net.name}: AutoAttack left {int(right.sum())} of {len(y)}", file=sys.stderr, flush=True)
        piece = json.loads(kept.read_text())
        flags.append(unpack_flags(piece["correct"]))
        counts.forward += piece["forward"]
        counts.backward += piece["backward"]
        broken_by = {name: broken_by.get(name, 0) + count for name, count in piece["broken_by"].items()}
    return {
        "correct": torch.cat(flags),
        "broken_by": broken_by,
        "forward": counts.forward / len(labels),
        "backward": counts.backward / len(labels),
    }


def compare(net: Net, options: argparse.Namespace) -> dict[str, Any]:
    """Attack one network with everything."""
    model, pixels, labels = _case(net, options, options.images)
    truth = reference(net, options, options.images)
    strong: Tensor = truth["correct"]
    n = len(labels)
    with torch.no_grad():
        clean = int((model(pixels).argmax(1) == labels).sum())
    rows = [
        {
            "attack": REFERENCE,
            "right": int(strong.sum()),
            "gap": 0.0,
            "only_reference": 0,
            "only_attack": 0,
            "forward": round(truth["forward"], 2),
            "backward": round(truth["backward"], 2),
            "correct": pack_flags(strong),
        }
    ]
    order = chosen_images(n, None)  # the order in which evaluate() judges them
    for name in options.attacks:
        spent = Passes()
        with spent.counting(model):
            report = evaluate(model, (pixels, labels), net.threat, attacks=[name], seed=options.seed, device="cpu")
        # What evaluate() itself looks at is not the attack's: its own clean pass and its probes.
        outside = Passes()
        with outside.counting(model):
            evaluate(model, (pixels, labels), net.threat, attacks=["clean"], seed=options.seed, device="cpu")
        flags = torch.empty_like(strong)
        flags[order] = report.result(report.attacks[-1].name).correct
        rows.append(
            {
                "attack": report.attacks[-1].name,
                "right": int(flags.sum()),
                "gap": round(100 * (int(flags.sum()) - int(strong.sum())) / n, 3),
                "only_reference": int((flags & ~strong).sum()),
                "only_attack": int((~flags & strong).sum()),
                "forward": round((spent.forward - outside.forward) / n, 2),
                "backward": round((spent.backward - outside.backward) / n, 2),
                "correct": pack_flags(flags),
            }
        )
        print(f"{net.name}: {name}: gap {rows[-1]['gap']} points", file=sys.stderr, flush=True)
    return {
        "net": net.name,
        "threat": net.threat.to_json(),
        "n": n,
        "clean": clean,
        "images_sha256": hash_of(pixels, labels),
        "broken_by": truth["broken_by"],
        "attacks": rows,
    }


def _case(net: Net, options: argparse.Namespace, images: int) -> tuple[nn.Module, Tensor, Tensor]:
    data = images_of(net, options.root)
    model = trained(net, options.nets, data, seed=options.seed, epochs=1 if options.quick else None)
    model.requires_grad_(False)
    chosen = chosen_images(len(data.test.labels), images)
    return model, data.test.as_float()[chosen], data.test.labels[chosen]


def markdown(value: Mapping[str, Any]) -> str:
    """The table, and where it comes from."""
    head = ("network", "images", "attack", "right %", "gap", "only AA", "only it", "forward", "backward")
    rows = []
    for net in value["results"]:
        for index, row in enumerate(net["attacks"]):
            rows.append(
                (
                    *(("", "") if index else (net["net"], str(net["n"]))),
                    row["attack"],
                    f"{100 * row['right'] / net['n']:.1f}",
                    *(f"{row['gap']:+.1f}" if index else "", str(row["only_reference"]), str(row["only_attack"])),
                    *(f"{row['forward']:.0f}", f"{row['backward']:.0f}"),
                )
            )
    return f"{table(head, rows)}\n\n{provenance(value)}"


def plot(value: Mapping[str, Any], path: Path) -> Path:
    """The gap to AutoAttack against the passes that an attack takes, one colour a network."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5), layout="constrained")
    axes = figure.subplots()
    for number, net in enumerate(value["results"]):
        colour = f"C{number}"
        found = {row["attack"]: (row["forward"] + row["backward"], row["gap"]) for row in net["attacks"]}
        fast = sorted(point for name, point in found.items() if name.startswith("apgd-fast"))
        axes.plot(*zip(*fast, strict=True), "o-", color=colour, label=net["net"], markersize=5)
        rivals = [point for name, point in found.items() if name.startswith("pgd")]
        axes.plot(*zip(*rivals, strict=True), "s", color=colour, markersize=6, fillstyle="none")
        axes.plot(*found[REFERENCE], "*", color=colour, markersize=11)
    axes.plot([], [], "o-", color="grey", label="apgd-fast, by passes allowed")
    axes.plot([], [], "s", color="grey", fillstyle="none", label="pgd-20, pgd-100, pgd-20x5-margin")
    axes.plot([], [], "*", color="grey", markersize=11, label="AutoAttack, standard")
    axes.axhline(0, color="grey", linewidth=0.8)
    axes.set(
        xscale="log",
        xlabel="passes (forward + backward) an image",
        ylabel="points above AutoAttack's robust accuracy",
        title="How near cheaper attacks come to AutoAttack",
    )
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=130, metadata={"Software": None})
    return path


def _parser() -> argparse.ArgumentParser:
    parser = make_parser(MODULE, __doc__, example="python -m benchmarks.strong_attack --images 128")
    add_out(parser, MODULE)
    add = parser.add_argument
    add("--images", type=positive, default=128, metavar="N", help="test images of each network (default: %(default)s)")
    add("--networks", type=positive, default=len(NETS), metavar="N", help="only the first N (default: %(default)s)")
    add("--attacks", nargs="+", default=list(ATTACKS), help="cheaper attacks (default: %(default)s)")
    add("--root", type=Path, default=Path("data/cifar10"), help="CIFAR-10 as folders of images (default: %(default)s)")
    add("--nets", type=Path, default=Path(f"runs/{MODULE}"), help="where networks and AutoAttack's results are kept")
    return parser


if __name__ == "__main__":
    sys.exit(main())
