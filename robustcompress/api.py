"""`compress()`: resolve, refuse early, copy, run the strategy, close the result."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from robustcompress.budget import Budget, Cost, measure
from robustcompress.calibration import final_latency, limit_latency
from robustcompress.checkpoint import Journal, remove
from robustcompress.data import TEACHER, DataSplits
from robustcompress.distributed import World, start
from robustcompress.errors import DiskError, InputError
from robustcompress.export.timing import Stopwatch
from robustcompress.identity import check_alike, identity_of, parts_for, take_weights, with_parts
from robustcompress.lock import held
from robustcompress.models import ModelSpec
from robustcompress.outcome import check_outcome, closed, describe_data, report_on, save_beside, settings_of, versions
from robustcompress.reach import check_budget, default_rounding
from robustcompress.reproduce import recipe_of_request
from robustcompress.resolve import Request, epochs_for, resolve
from robustcompress.result import CompressResult
from robustcompress.robust import ThreatModel, attack_by_name
from robustcompress.robust.attacks import eval_mode
from robustcompress.robust.objectives import Objective
from robustcompress.series import AUTOATTACK, REQUEST, digest_of
from robustcompress.session import Goal, Session
from robustcompress.smallest import find_smallest, workplace
from robustcompress.strategies import Strategy
from robustcompress.structure import StructuralEditor
from robustcompress.teacher import REFERENCE, Teacher, frozen_copy, introduce, with_labels
from robustcompress.teacher_source import TeacherLike
from robustcompress.train import Progress, Recipe, set_memory_format


def compress(
    model: nn.Module | ModelSpec | str,
    strategy: str | Strategy = "grape",
    *,
    data: Any = None,
    budget: Budget | float = Budget(macs=0.5),
    threat: ThreatModel | float = ThreatModel("linf", 8 / 255),
    objective: Objective | str | None = None,
    epochs: float | None = None,
    pretrained: bool = False,
    recipe: Recipe | None = None,
    round_to: int | None = None,
    attacks: Sequence[str] = ("clean", "fgsm", "pgd-20"),
    test_images: int | None = 1000,
    seed: int = 0,
    device: str | torch.device = "auto",
    out: str | Path | None = None,
    progress: bool = True,
    checkpoint: str | Path | None = None,
    checkpoint_every_s: float = 60.0,
    deadline: float | None = None,
    latency_table: str | Path | None = None,
    finetune: Objective | str | None = None,
    teacher: TeacherLike | None = None,
) -> CompressResult:
    """Make a compact network that withstands attacks.

    Growing and pruning strategies take the same inputs, keep the same budget and return the same result.

    Args:
        model: The reference: any network the editor supports, which maps images in [0, 1] to logits; it is copied and
            never touched. Or a name: a built-in ("resnet18"), "torchvision:resnet18", "timm:resnet26",
            "package.module:factory"; or a `ModelSpec`, a name with arguments. A classifier whose size differs from the
            data's classes is replaced.
        strategy: "grape", "hydra", "s2ap", "harp", "awt", "rcnas", "magnitude", "taylor", "none", a control
            ("uniform", "scaling", "fixed", "random"), or a strategy with options, such as
            `Hydra(granularity="weight")`.
        data: None for the embedded handwritten digits; a name ("cifar10"), a directory of images, tensors, a Dataset,
            a DataLoader, or what `load_data` returns.
        budget: What it may cost; a number is a fraction of the reference's multiply-adds. A limit on latency has about
            20 networks measured first. `Budget(min_robust=0.45)` names no size: it is looked for, which takes several
            compressions (see `MinRobust`).
        threat: What it must withstand; a number is an linf radius.
        objective: Loss of every phase; PGD-10 adversarial training by default.
        epochs: Passes over the training images, all phases together; by default 10 for fewer than 10,000 training
            images, else 30.
        pretrained: The reference's weights are robust already: pruning strategies skip their pretraining.
        recipe: Training settings; the same for every strategy unless you change them.
        round_to: Widths become multiples of this (attention heads go one by one); by default the largest of 8, 4, 2, 1
            that is at most an eighth of the narrowest group.
        attacks: What the report measures on the test images; add "autoattack" for robust accuracy proper.
        test_images: How many test images are attacked at most; None for all.
        seed: Seeds everything.
        device: "auto", "cpu", "cuda", ...
        out: Directory to save the result to; must not exist.
        progress: Show progress.
        checkpoint: Directory to keep a checkpoint in, made if it does not exist. A run that was killed goes on from
            there when it is called again with the same arguments; on the CPU the result is bit for bit that of a run
            that was never interrupted. Removed at the end.
        checkpoint_every_s: Least seconds between two checkpoints within a phase, after any step; 0 for every step. The
            end of a phase always writes one.
        deadline: Seconds from this call after which it should have stopped: before the first epoch that would end
            later, as the one before it suggests, the run stops with `OutOfTime`. At least one epoch is trained first.
            Needs `checkpoint`. Evaluation at the end is not counted.
        latency_table: Times that another device measured (see `export_latency`): a limit on latency is about that
            device then, and the network is not timed again at the end.
        finetune: Loss of the fine-tuning after a cut; the objective by default. "rslad" distils: without a `teacher`
            the reference as it was before the cut teaches.
        teacher: Whom a distillation ("rslad", "adaad", ...) learns from: a network, the directory of a saved result,
            or (model, safetensors file). Its PGD-10 accuracy on validation images is measured first: one that is no
            better than guessing is refused, one that is hardly robust is warned of. It stays on the device.

    Returns:
        The result, whose `.model` is a plain module in eval mode on the CPU.

    Raises:
        InputError: Something cannot work; all that was noticed is listed, before any training.
        UnsupportedModelError: The network holds layers that cannot be edited.
        BudgetError: No widths meet the budget, or the model already does; or accuracy was demanded that the reference
            does not have, or that no smaller network was found to keep.
        CheckpointError: The checkpoint is damaged.
        OutOfTime: The deadline was reached; call again to go on.
    """
    started = time.monotonic()
    world = start()
    request = world.together(
        lambda: resolve(
            model=model,
            strategy=strategy,
            data=data,
            budget=budget,
            threat=threat,
            objective=objective,
            epochs=epochs,
            recipe=recipe,
            round_to=round_to,
            attacks=attacks,
            test_images=test_images,
            seed=seed,
            device=device,
            out=out,
            pretrained=pretrained,
            checkpoint=checkpoint,
            checkpoint_every_s=checkpoint_every_s,
            deadline=deadline,
            latency_table=latency_table,
            finetune=finetune,
            teacher=teacher,
        )
    )
    return carry_out(request, progress=progress, started=started)


def carry_out(
    request: Request,
    *,
    progress: bool = True,
    started: float | None = None,
    on_saved: Callable[[Path], None] | None = None,
    keep: bool = False,
) -> CompressResult:
    """Do what `compress()` does, for arguments that are resolved.

    Args:
        request: What to do.
        progress: Show progress.
        started: When the call came, on the clock of `time.monotonic`; now where None.
        on_saved: Told where the result was saved, if it was: beside `out` if that place was taken meanwhile.
        keep: Leave the checkpoint: the result is not safe yet, and the caller removes it.
    """
    started = time.monotonic() if started is None else started
    world = start()
    with held(request.checkpoint, request.out, world=world):
        return _carried_out(request, progress and world.first, started, on_saved, keep)


def _carried_out(
    request: Request, progress: bool, started: float, on_saved: Callable[[Path], None] | None, keep: bool
) -> CompressResult:
    if request.budget.demand is not None:
        return _carry_out_smallest(request, Progress(progress), started, on_saved, keep)
    splits, chosen, seed = request.data, request.strategy, request.seed
    digest, recipe = digest_of(request), recipe_of_request(request)  # now: the model is edited in place
    shown = Progress(progress, title=chosen.name)
    session, untouched, journal = open_session(request, shown, started)
    editor, goal, before = session.editor, session.goal, session.goal.reference
    example = torch.zeros(2, *splits.image_shape, device=request.device)
    stopwatch = Stopwatch(editor, splits.image_shape) if request.budget.limits_latency else None
    if stopwatch is not None:
        limit_latency(session, chosen, stopwatch, example, request.latency_table)
    with torch.random.fork_rng():  # dropout and the like draw from the global generator, which is the caller's
        torch.manual_seed(seed)
        chosen.run(session)
    if journal is not None:
        journal.finish()
    session.settle()
    world = session.world
    compact = closed(session.model)
    check_outcome(chosen, compact, example, request.budget, before)
    times = final_latency(session, stopwatch, compact, request.latency_table)
    chunks = None if request.checkpoint is None else request.checkpoint / AUTOATTACK
    report = report_on(compact, request, shown, resume_dir=chunks)
    cpu_example = torch.zeros(1, *splits.image_shape)
    sparse = request.budget.density is not None  # only zeros compress, and compressing takes its time
    result = CompressResult(
        model=compact.cpu(),
        spec=request.spec,
        strategy=chosen.to_json(),
        edits=editor.edits,
        before=replace(_measured(world, untouched, cpu_example, compressed=sparse), onnx_ms=times[0]),
        after=replace(_measured(world, compact, cpu_example, compressed=sparse), onnx_ms=times[1]),
        budget=request.budget.to_json(),
        history=tuple(session.history),
        report=report,
        threat=request.threat,
        data=describe_data(goal.data),
        settings=settings_of(goal, request.device, session.history)
        | {REQUEST: digest, "run": recipe}
        | ({} if request.latency_table is None else {"latency": request.latency_table.told()}),
        seed=seed,
    )
    if request.out is not None:
        saved = Path(world.only_first(lambda: str(_saved(result, request, shown))))
        if on_saved is not None:
            on_saved(saved)
    if journal is not None and world.first and not keep:
        try:
            remove(journal.directory)
        except OSError as error:  # the result is safe; a disk that became read-only is no reason to end in an error
            shown.say(f"{journal.directory} could not be removed ({error.strerror}): remove it by hand")
    return result


def _measured(world: World, model: nn.Module, example: torch.Tensor, *, compressed: bool) -> Cost:
    """What a network costs, its latency too; of several processes one measures, while the others are still."""
    return Cost(**world.only_first(lambda: asdict(measure(model, example, latency=True, compressed=compressed))))


def open_session(request: Request, shown: Progress, started: float) -> tuple[Session, nn.Module, Journal | None]:
    """What a strategy is given, once the budget is known to be one for it.

    Args:
        request: What to do.
        shown: Where progress is shown.
        started: When the call came, on the clock of `time.monotonic`.

    Returns:
        The session, a copy of the untouched reference on the CPU, and where the run is recorded (None for nowhere).
    """
    splits, chosen, reference, world = request.data, request.strategy, request.model, start()
    for note in splits.notes:
        shown.say(note)
    set_memory_format(reference, torch.contiguous_format)
    take_weights(world, reference)
    example = torch.zeros(2, *splits.image_shape, device=request.device)
    editor = StructuralEditor(reference, example, seed=request.seed)
    _fit_classifier(editor, reference, example, splits, request.pretrained, shown)
    step = request.round_to or default_rounding(editor)
    before = measure(reference, example)
    if before.note:
        shown.say(before.note)
    check_budget(chosen, editor, example, request.budget, before, step, shown)

    teacher = _teacher(request, reference)
    splits = with_labels(splits, request.labeller or teacher, shown)
    objective, finetune = request.objective, request.finetune
    if teacher is not None:
        objective = objective.taught_by(teacher.model)
        finetune = None if finetune is None else finetune.taught_by(teacher.model)
    goal = Goal(
        data=splits,
        threat=request.threat,
        objective=objective,
        budget=request.budget,
        reference=before,
        epochs=request.epochs or epochs_for(splits),
        recipe=request.recipe,
        seed=request.seed,
        pretrained=request.pretrained,
        round_to=step,
        finetune=finetune,
    )
    untouched = copy.deepcopy(reference).cpu()
    # It hashes all images and weights: for a checkpoint, and for processes to compare.
    identity = identity_of(request, goal, untouched) if request.checkpoint is not None or world.size > 1 else {}
    check_alike(world, identity)
    journal = _journal(request, identity, world, shown, started)
    parts = parts_for(request.recipe.accumulate, world, {} if journal is None else journal.identity)
    if world.size > 1:
        shown.say(str(parts))
    session = Session(reference, editor, example, goal, progress=shown, journal=journal, parts=parts)
    if teacher is not None:
        introduce(session, teacher)
    return session, untouched, journal


def _teacher(request: Request, reference: nn.Module) -> Teacher | None:
    """Who teaches from the start: whom the caller gave, or the reference where it is robust already and asked for."""
    asked = any(loss is not None and loss.needs_teacher for loss in (request.objective, request.finetune))
    extra = request.data.extra
    asked |= extra is not None and extra.labelled_by == TEACHER
    if request.teacher is not None or not (asked and request.pretrained):
        return request.teacher
    return Teacher(model=frozen_copy(reference), told={"source": REFERENCE})


def _carry_out_smallest(
    request: Request, shown: Progress, started: float, on_saved: Callable[[Path], None] | None, keep: bool
) -> CompressResult:
    """Look for the smallest network that meets the demand; then, and only then, look at the test images."""
    demand = request.budget.demand
    assert demand is not None
    if start().size > 1:
        raise InputError(
            "min_robust compresses several networks one after the other, in one process: start it without torchrun, or "
            "give a size, such as Budget(macs=0.5)"
        )
    digest, recipe = digest_of(request), recipe_of_request(request)
    for note in request.data.notes:
        shown.say(note)
    with workplace(request.checkpoint, keep=keep) as place:
        found = find_smallest(request, place, carry_out, shown, started)
        attacks = tuple(dict.fromkeys((*request.attacks, attack_by_name(demand.attack))))
        report = report_on(found.model, replace(request, attacks=attacks), shown, resume_dir=place / AUTOATTACK)
        settings = {**found.settings, REQUEST: digest, "run": recipe}
        result = replace(found, budget=request.budget.to_json(), report=report, settings=settings)
        if not demand.holds(report) and report is not None:
            final = report.result(demand.attack)
            shown.say(
                f"warning: on the test images {demand.attack} accuracy is {100 * final.accuracy:.1f} % "
                f"({100 * final.low:.1f} to {100 * final.high:.1f}, n={final.n}), which does not show {demand}"
            )
        if request.out is not None:
            saved = _saved(result, request, shown)
            if on_saved is not None:
                on_saved(saved)
    return result


def _saved(result: CompressResult, request: Request, shown: Progress) -> Path:
    """Save; where the disk does not take it, say that the checkpoint is kept, from which the work is not done again."""
    assert request.out is not None
    try:
        return save_beside(result, request.out, shown)
    except DiskError as error:
        if request.checkpoint is None:
            raise
        raise DiskError(
            f"{error}; the checkpoint in {request.checkpoint} is kept: the same call then has little left to do"
        ) from error


def _journal(
    request: Request, identity: Mapping[str, Any], world: World, progress: Progress, started: float
) -> Journal | None:
    """Where the run is recorded; None where nobody asked for it."""
    if request.checkpoint is None:
        return None

    def identify(recorded: Mapping[str, Any]) -> dict[str, Any]:
        return with_parts(identity, parts_for(request.recipe.accumulate, world, recorded))

    return Journal(
        request.checkpoint,
        identify,
        versions=versions(),
        every_s=request.checkpoint_every_s,
        deadline=None if request.deadline is None else started + request.deadline,
        say=progress.say,
        world=world,
    )


def _fit_classifier(
    editor: StructuralEditor,
    model: nn.Module,
    example: torch.Tensor,
    data: DataSplits,
    pretrained: bool,
    progress: Progress,
) -> None:
    with eval_mode(model), torch.no_grad():
        outputs = model(example).shape[1]
    if outputs == data.num_classes:
        return
    if pretrained:
        raise InputError(
            f"the pretrained model has {outputs} classes and {data.name} has {data.num_classes}: fine-tune its "
            "classifier first, or leave pretrained out"
        )
    editor.resize_output(data.num_classes)
    progress.say(f"classifier replaced: the model has {outputs} outputs, {data.name} has {data.num_classes} classes")
