"""evaluate(): run attacks on a model, judge what they return, and report it for every image."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from robustcompress.allocator import kept_memory
from robustcompress.distributed import ALONE, World
from robustcompress.errors import InputError, Problems
from robustcompress.robust import sanity
from robustcompress.robust.attacks import AttackSpec, attack_by_name, eval_mode
from robustcompress.robust.autoattack import AutoAttackConfig, check_autoattack
from robustcompress.robust.chunks import autoattack_in_chunks, chunk_size
from robustcompress.robust.hierarchy import Hierarchy, hierarchy_from
from robustcompress.robust.judge import EvaluationProgress, Judge, Progress, as_float, hash_of
from robustcompress.robust.memory import is_out_of_memory, release
from robustcompress.robust.report import AttackResult, RobustReport
from robustcompress.robust.threat import ThreatModel

if TYPE_CHECKING:
    from robustcompress.data import Images

_DEFAULT_THREAT = ThreatModel()
_PROBED = 64  # images that the sanity flags look at


def evaluate(
    model: nn.Module,
    data: Images | tuple[Tensor, Tensor],
    threat: ThreatModel = _DEFAULT_THREAT,
    *,
    attacks: Sequence[str | AttackSpec] = ("clean", "fgsm", "pgd-20"),
    batch_size: int = 256,
    device: str | torch.device = "auto",
    seed: int = 0,
    max_images: int | None = None,
    autoattack_images: int | None = None,
    time_limit_s: float | None = None,
    progress: Progress | None = None,
    resume_dir: str | Path | None = None,
    autoattack_config: AutoAttackConfig | None = None,
    hierarchy: Hierarchy | str | Path | None = None,
    world: World = ALONE,
) -> RobustReport:
    """Measure how often the model is right, without and with an adversary.

    Each attack runs on its own, on the images that the clean model gets right; the others count as wrong
    under it. What it returns is never believed: it is brought back into the ball, measured, and judged
    again by the model. The images are taken in a fixed shuffled order, so that the first n of a sorted data
    set are a fair sample, and are the same images for every model.

    The model is evaluated in eval mode. Its mode, its weights, its `.grad` and torch's global generators
    are as they were afterwards; if it lies on another device, a copy is evaluated.

    Args:
        model: Maps images in [0, 1] to logits [N, K], in single precision, normalisation inside.
        data: `Images`, or a pair of images (uint8, or float in [0, 1], [N, 3, H, W]) and labels (integers,
            [N]).
        threat: What the adversary may do.
        attacks: Names as `attack_by_name` reads them, or specs. "clean" is always measured first.
        batch_size: Images a batch. The random starts depend on it.
        device: "auto" (CUDA where available), or a device.
        seed: Seed of all randomness of the attacks.
        max_images: Judge so many images only; None means all.
        autoattack_images: Judge so many of those with AutoAttack, the costly one; None means all.
        time_limit_s: Start no chunk of AutoAttack that would not end within so many seconds, going by the
            slowest so far; the first always runs. The report then says how many images were judged. Without a limit
            each of its attacks goes over all images before the next, in full chunks of what is left, which is faster.
        progress: Called after every batch and chunk.
        resume_dir: Where the chunks of AutoAttack are kept, made if missing; a second run with the same
            model, images, threat, seed and settings takes them from there.
        autoattack_config: Changes to the standard AutoAttack; the report then calls it "custom".
        hierarchy: Of the classes, as `hierarchy_from` reads it: the report then says how far from the truth mistakes
            are. An adversary who aims at distant classes finds worse ones than these attacks, which aim at any.
        world: The processes that share the work (`robustcompress.distributed.current()`): all of them call this, with
            the same arguments, and all get the whole report, which is that of one process.

    Returns:
        Flags for every image and attack, the numbers and intervals they give, and what to doubt.

    Raises:
        InputError: Anything about the model, images, labels, threat, attacks or numbers cannot work; all of
            it is listed, before any attack starts.
    """
    pixels, labels = _pixels_and_labels(data)
    problems = Problems("evaluate() cannot start")
    specs = _specs(attacks, problems)
    _check_numbers(problems, batch_size=batch_size, max_images=max_images, autoattack_images=autoattack_images)
    with_autoattack = any(spec.kind == "autoattack" for spec in specs)
    if autoattack_images is not None and not with_autoattack:
        problems.add(f"autoattack_images={autoattack_images}, but 'autoattack' is not among the attacks: add it")
    if time_limit_s is not None and not time_limit_s > 0:
        problems.add(f"time_limit_s={time_limit_s!r}: must be positive; None means no limit")
    tree: Hierarchy | None = None if hierarchy is None else problems.attempt(lambda: hierarchy_from(hierarchy))
    target = _device(device, problems)
    sanity.check_images(pixels, labels, threat, problems)
    if with_autoattack and pixels.dim() == 4:
        for item in check_autoattack(threat, tuple(pixels.shape[-2:])).items:
            problems.add(item)
    images_ok = pixels.dim() == 4 and len(pixels) > 0 and labels.dim() == 1
    if not images_ok or target is None:
        problems.raise_if_any()
    assert target is not None

    was_training = model.training
    with (
        torch.inference_mode(False),
        _on_device(model, target) as model,
        eval_mode(model),
        _frozen(model),
        kept_memory(target.type) as look_at_memory,
    ):
        num_classes = sanity.check_model(model, as_float(pixels[:2], target), labels, problems)
        if tree is not None and num_classes not in (None, len(tree.classes)):
            problems.add(
                f"hierarchy {tree.name!r} has {len(tree.classes)} classes, the model {num_classes} logits: give the "
                "hierarchy of these data"
            )
        problems.raise_if_any()
        assert num_classes is not None
        indices = chosen_images(len(pixels), max_images)
        judge = Judge(
            model=model,
            pixels=pixels[indices.to(pixels.device)],
            labels=labels[indices.to(labels.device)].long(),
            threat=threat,
            batch_size=batch_size,
            device=target,
            seed=seed,
            progress=_looking(look_at_memory, progress),
            hierarchy=tree,
            world=world,
        )
        warnings = ["the model was in training mode: it was evaluated in eval mode"] if was_training else []
        warnings += _flags(judge)

        def judged(judge: Judge, spec: AttackSpec) -> AttackResult:
            if spec.kind == "clean":
                return judge.clean()
            if spec.kind != "autoattack":
                return judge.attack(spec, results[0].correct)
            return autoattack_in_chunks(
                judge,
                results[0].correct[:autoattack_images],
                num_classes=num_classes,
                config=config,
                time_limit_s=time_limit_s,
                resume_dir=None if resume_dir is None else Path(resume_dir),
                warn=warnings.append,
            )

        config = autoattack_config or AutoAttackConfig()
        at_once = partial(chunk_size, config=config, timed=time_limit_s is not None)
        results: list[AttackResult] = []
        for spec in specs:
            results.append(_in_memory(judge, spec, judged, at_once, warnings))
        warnings += sanity.flag_order(results, specs)
    return RobustReport(
        threat=threat,
        n=len(indices),
        seed=seed,
        attacks=tuple(results),
        images_sha256=hash_of(judge.pixels, judge.labels),
        indices=indices,
        warnings=tuple(warnings),
        hierarchy=tree,
    )


def _looking(look: Callable[[], None], progress: Progress | None) -> Progress:
    """Call `look` once attacks have shown what they take, and `progress`."""

    def tell(now: EvaluationProgress) -> None:
        if now.attack != "clean":
            look()
        if progress is not None:
            progress(now)

    return tell


def _flags(judge: Judge) -> list[str]:
    """What to doubt about the model, as the first images tell: as many as memory has room for."""
    size = _PROBED
    while True:
        try:
            return sanity.flag_model(judge.model, *judge.batch(slice(0, size)))
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error) or size == 1:
                raise
        size //= 2
        release()


def _in_memory(
    judge: Judge,
    spec: AttackSpec,
    judged: Callable[[Judge, AttackSpec], AttackResult],
    chunk: Callable[[Judge], int],
    warnings: list[str],
) -> AttackResult:
    """Judge one attack; where memory runs out, once more from the beginning in batches of half as many images.

    Args:
        judge: The evaluation.
        spec: The attack.
        judged: Judges it.
        chunk: How many images AutoAttack takes at once, which may be fewer than a batch.
        warnings: Told how small the batches had to be.
    """
    began = judge.batch_size
    while True:
        try:
            result = judged(judge, spec)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error) or judge.batch_size == 1:
                raise
        else:
            if judge.batch_size < began:
                warnings.append(f"memory ran out: {spec.name} was judged in batches of {judge.batch_size} images")
            return result
        size = chunk(judge) if spec.kind == "autoattack" else judge.batch_size
        judge = replace(judge, batch_size=max(1, size // 2))
        release()


def chosen_images(total: int, max_images: int | None) -> Tensor:
    """Return which of `total` images are judged, in order: int64 [n]. A function of the two numbers alone."""
    order = torch.randperm(total, generator=torch.Generator().manual_seed(0))
    return order[:max_images]


def _pixels_and_labels(data: object) -> tuple[Tensor, Tensor]:
    pair = data if isinstance(data, tuple) else (getattr(data, "pixels", None), getattr(data, "labels", None))
    if len(pair) == 2 and isinstance(pair[0], Tensor) and isinstance(pair[1], Tensor):
        return pair[0], pair[1]
    raise InputError(
        f"evaluate() cannot start: data is {type(data).__name__}: give Images (such as load_data().test), or "
        "a pair of tensors, images [N, 3, H, W] and labels [N]"
    )


def _specs(attacks: Sequence[str | AttackSpec], problems: Problems) -> list[AttackSpec]:
    """Read the attacks; clean is first, and nothing is there twice."""
    specs = [AttackSpec(kind="clean")]
    for attack in [attacks] if isinstance(attacks, str | AttackSpec) else attacks:
        try:
            spec = attack if isinstance(attack, AttackSpec) else attack_by_name(attack)
        except InputError as error:
            problems.add(str(error))
            continue
        if spec not in specs:
            specs.append(spec)
    return specs


def _check_numbers(problems: Problems, **counts: int | None) -> None:
    for key, value in counts.items():
        if value is None and key != "batch_size":
            continue
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            problems.add(f"{key}={value!r}: give a whole number, at least 1")


def _device(device: str | torch.device, problems: Problems) -> torch.device | None:
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        wanted = torch.device(device)
    except RuntimeError:
        problems.add(f"device={device!r} is unknown: give 'auto', 'cpu' or 'cuda'")
        return None
    if wanted.type == "cuda" and not torch.cuda.is_available():
        problems.add(f"device={str(device)!r}: this torch sees no CUDA device: use 'auto'")
        return None
    if wanted.type == "cuda" and wanted.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return wanted


@contextmanager
def _on_device(model: nn.Module, device: torch.device) -> Iterator[nn.Module]:
    """Give the model itself if it is there already, else a copy: the caller's optimizer may hold its tensors."""
    tensor = next(chain(model.parameters(), model.buffers()), None)
    yield model if tensor is None or tensor.device == device else copy.deepcopy(model).to(device)


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """Keep gradients away from the weights, and give each its own flag back."""
    wanted = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in wanted:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in wanted:
            parameter.requires_grad_(True)
