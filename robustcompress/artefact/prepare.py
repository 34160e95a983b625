"""What `verify_artefact` was asked for: opened, completed and checked as a whole before any attack."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from robustcompress.artefact.file import OnnxFile, open_onnx
from robustcompress.artefact.rounding import check_visible, seen
from robustcompress.artefact.square import QUERIES
from robustcompress.data import DataSplits, Images
from robustcompress.errors import InputError, Problems, first_line, nearest
from robustcompress.result import CompressResult
from robustcompress.robust import AttackSpec, ThreatModel, attack_by_name, sanity
from robustcompress.robust.autoattack import check_autoattack
from robustcompress.robust.evaluate import chosen_images
from robustcompress.robust.judge import as_float
from robustcompress.robust.kept import Kept

Twin = nn.Module | CompressResult
_NAMES = ("clean", "fgsm", "pgd-20", "apgd-fast", "autoattack", "square", "square-5000")


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """A checked request.

    Attributes:
        file: Open.
        images: As the file sees them, in the order judged: float32 [N, C, H, W].
        labels: int64 [N].
        indices: Their places in the data: int64 [N].
        data: The data's name, where known.
        threat: What the adversary may do.
        num_classes: Number of scores.
        twin: A private copy on the CPU, in eval mode and without gradients to its weights; or None.
        replayed: Attacks on the twin.
        budgets: Queries of each Square.
        sources: Other models by name, prepared as the twin is; or open files.
        attack_images: How many images the costly attacks judge.
        kept: Where finished chunks are kept.
    """

    file: OnnxFile
    images: Tensor
    labels: Tensor
    indices: Tensor
    data: str | None
    threat: ThreatModel
    num_classes: int
    twin: nn.Module | None
    replayed: tuple[AttackSpec, ...]
    budgets: tuple[int, ...]
    sources: Mapping[str, nn.Module | OnnxFile]
    attack_images: int
    kept: Kept


def prepare(
    path: str | Path,
    data: DataSplits | Images | tuple[Tensor, Tensor],
    threat: ThreatModel | None,
    *,
    twin: Twin | None,
    attacks: Sequence[str] | None,
    transfer_from: Mapping[str, Twin | OnnxFile],
    max_images: int | None,
    attack_images: int | None,
    threads: int | None,
    keep: str | Path | None,
    warn: Callable[[str], None],
) -> Plan:
    """Check everything at once. The arguments are those of `verify_artefact`; `warn` is told what goes wrong later.

    Raises:
        InputError: Naming everything that cannot work, each with its remedy.
    """
    problems = Problems(f"{path} cannot be verified")
    file = open_onnx(path, threads=threads)
    pixels, labels, name = _images(data, file, problems)
    if threat is None and file.threat is None:
        problems.add(
            "the file does not say what it should withstand: give a threat, such as ThreatModel('linf', 8/255)"
        )
    threat = threat or file.threat or ThreatModel()
    for key, value in (("max_images", max_images), ("attack_images", attack_images)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            problems.add(f"{key}={value!r}: give a whole number, at least 1, or None for all")
    replayed, budgets = _attacks(attacks, twin is not None, problems)
    sanity.check_images(pixels, labels, threat, problems)
    problems.attempt(lambda: check_visible(threat, file.input_type))
    if any(spec.kind == "autoattack" for spec in replayed):
        for item in check_autoattack(threat, tuple(file.image_shape[1:])).items:
            problems.add(item)
    if pixels.dim() == 4 and tuple(pixels.shape[1:]) != file.image_shape:
        problems.add(
            f"the images are {_size(pixels.shape[1:])}, the file is for {_size(file.image_shape)}: load "
            f"them with image_size={file.image_shape[1]} (--image-size {file.image_shape[1]})"
        )
    problems.raise_if_any()

    indices = chosen_images(len(pixels), max_images)
    images = seen(as_float(pixels.cpu()[indices], torch.device("cpu")), file.input_type)
    labels = labels.cpu()[indices].long()
    num_classes = _classes(file, images[:2], labels, problems)
    private = None if twin is None else _network(twin, "the twin", images[:2], labels, num_classes, problems)
    sources = {
        name: _other(source, name, file, problems)
        if isinstance(source, OnnxFile)
        else _network(source, name, images[:2], labels, num_classes, problems)
        for name, source in transfer_from.items()
    }
    kept = Kept()
    if not problems.items:  # nothing is left behind by a call that cannot work
        kept = problems.attempt(lambda: Kept(keep, warn, option="keep")) or kept
    problems.raise_if_any()
    return Plan(
        file=file,
        images=images,
        labels=labels,
        indices=indices,
        data=name,
        threat=threat,
        num_classes=num_classes,
        twin=private,
        replayed=replayed,
        budgets=budgets,
        sources={key: source for key, source in sources.items() if source is not None},
        attack_images=len(labels) if attack_images is None else min(attack_images, len(labels)),
        kept=kept,
    )


def square_queries(name: str) -> int | None:
    """The budget that a name like "square" or "square-5000" says; None for other names."""
    match = re.fullmatch(r"square(?:-([1-9]\d*))?", name.strip().lower())
    return None if match is None else int(match[1] or QUERIES)


def _attacks(
    attacks: Sequence[str] | None, with_twin: bool, problems: Problems
) -> tuple[tuple[AttackSpec, ...], tuple[int, ...]]:
    if attacks is None:
        attacks = ("pgd-20", "square") if with_twin else ("square",)
    replayed: list[AttackSpec] = []
    budgets: list[int] = []
    for name in [attacks] if isinstance(attacks, str) else attacks:
        queries = square_queries(str(name))
        if queries is not None:
            budgets += [queries] if queries not in budgets else []
            continue
        try:
            spec = attack_by_name(name)
        except InputError:
            problems.add(f"attack {name!r} is unknown{nearest(str(name), _NAMES)}")
            continue
        if spec.kind == "clean" or spec in replayed:
            continue
        replayed.append(spec)
        if not with_twin:
            problems.add(f"{name} needs gradients, which a file does not have: give its torch twin, or leave it out")
    if not replayed and not budgets:
        problems.add("no attack is named: take 'square', or 'pgd-20' with the torch twin")
    return tuple(replayed), tuple(budgets)


def _images(data: object, file: OnnxFile, problems: Problems) -> tuple[Tensor, Tensor, str | None]:
    name = None
    if isinstance(data, DataSplits):
        if file.classes is not None and tuple(data.classes) != file.classes:
            problems.add(
                f"the file tells {len(file.classes)} classes apart ({', '.join(file.classes[:3])}, ...), "
                f"{data.name} has {data.num_classes} ({', '.join(data.classes[:3])}, ...): name the data "
                "that it was trained on"
            )
        name, data = Path(data.name).name, data.test
    pair = data if isinstance(data, tuple) else (getattr(data, "pixels", None), getattr(data, "labels", None))
    if len(pair) == 2 and isinstance(pair[0], Tensor) and isinstance(pair[1], Tensor):
        return pair[0], pair[1], name
    problems.add(f"data is {type(data).__name__}: give load_data(...), its test images, or a pair of tensors")
    problems.raise_if_any()
    raise AssertionError("unreachable")


def _classes(file: OnnxFile, images: Tensor, labels: Tensor, problems: Problems) -> int:
    try:
        count = file.scores(images).shape[1]
    except Exception as error:  # onnxruntime's exceptions share no base of their own
        problems.add(f"the file does not run on images of {_size(images.shape[1:])}: {first_line(error)}")
        problems.raise_if_any()
        raise
    if int(labels.max()) >= count:
        problems.add(f"label {int(labels.max())} but the file has {count} scores: it was made for other classes")
    return count


def _network(
    given: Twin, what: str, images: Tensor, labels: Tensor, num_classes: int, problems: Problems
) -> nn.Module | None:
    """A private copy that can be attacked, or None and the reason noted."""
    model = given.model if isinstance(given, CompressResult) else given
    if not isinstance(model, nn.Module):
        problems.add(f"{what} is {type(model).__name__}: give an nn.Module or a CompressResult")
        return None
    model = copy.deepcopy(model).cpu().eval().requires_grad_(False)
    own = Problems(what)
    count = sanity.check_model(model, images, labels[:0], own)
    for item in own.items:
        problems.add(f"{what}: {item}")
    if count is not None and count != num_classes:
        problems.add(f"{what} has {count} logits, the file {num_classes} scores: they tell other classes apart")
    return model


def _other(source: OnnxFile, what: str, file: OnnxFile, problems: Problems) -> OnnxFile:
    if source.image_shape != file.image_shape:
        problems.add(f"{what} is for images of {_size(source.image_shape)}, the file for {_size(file.image_shape)}")
    elif source.classes is not None and file.classes is not None and source.classes != file.classes:
        problems.add(f"{what} tells other classes apart than the file")
    return source


def _size(shape: Sequence[int]) -> str:
    return "x".join(str(side) for side in shape)
