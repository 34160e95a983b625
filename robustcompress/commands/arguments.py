"""Arguments that several commands share, and how their values are read."""

from __future__ import annotations

import argparse
import ast
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from torch import nn

from robustcompress.data import DataSplits, load_data
from robustcompress.errors import InputError, Problems, nearest
from robustcompress.result import CompressResult, load
from robustcompress.robust import Objective
from robustcompress.robust.objectives import OBJECTIVES, objective_from_name
from robustcompress.train import Recipe
from robustcompress.untrusted import load_state, read_tensors


def fraction(text: str) -> float:
    """Read "8/255", "0.03" or "1e-2".

    Raises:
        argparse.ArgumentTypeError: It is none of these.
    """
    above, slash, below = text.partition("/")
    try:
        return float(above) / float(below) if slash else float(above)
    except (ValueError, ZeroDivisionError):
        raise argparse.ArgumentTypeError(f"{text!r} is no number; write 8/255 or 0.03") from None


def names(text: str) -> tuple[str, ...]:
    """Read a list of names with commas in between."""
    return tuple(name.strip() for name in text.split(",") if name.strip())


def count_or_all(text: str) -> int | None:
    """Read a number of images; "all" is None.

    Raises:
        argparse.ArgumentTypeError: It is neither.
    """
    if text == "all":
        return None
    try:
        count = int(text)
    except ValueError:
        count = 0
    if count < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: give a positive number of images, or 'all'")
    return count


def assignment(text: str) -> tuple[str, Any]:
    """Read `name=value`; the value is a Python literal, or true or false, where it is one, else text.

    Raises:
        argparse.ArgumentTypeError: There is no `=`.
    """
    name, equals, value = text.partition("=")
    if not equals or not name.isidentifier():
        raise argparse.ArgumentTypeError(f"{text!r}: write name=value, such as width=0.5")
    if value in ("true", "false"):  # as in YAML
        return name, value == "true"
    try:
        return name, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return name, value


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what names a reference, and its weights."""
    parser.add_argument("model", metavar="MODEL", help="the reference model")
    parser.add_argument(
        "--model-arg", type=assignment, action="append", default=[], metavar="K=V", help="an argument of its factory"
    )
    parser.add_argument(
        "--pretrained-weights",
        type=Path,
        metavar="FILE",
        help="safetensors with the reference's robust weights: pruning strategies skip their pretraining",
    )


def add_run_arguments(parser: argparse.ArgumentParser) -> None:
    """Add seed, device, and whether progress is shown."""
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="seeds everything (default: %(default)s)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, ... (default: %(default)s)")
    parser.add_argument("--quiet", action="store_true", help="show no progress")


def add_training_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what a network must withstand, and how it is trained."""
    threat = parser.add_argument_group("threat")
    threat.add_argument("--eps", type=fraction, default=8 / 255, help="radius, such as 8/255 or 0.1 (default: 8/255)")
    threat.add_argument("--norm", default="linf", help="linf or l2 (default: %(default)s)")
    training = parser.add_argument_group("training")
    training.add_argument(
        "--objective", default="pgd-at", help="`robustcompress list objectives` (default: %(default)s)"
    )
    training.add_argument(
        "--objective-option",
        type=assignment,
        action="append",
        default=[],
        metavar="K=V",
        help="an option of the objective, such as beta=3",
    )
    training.add_argument("--attack-steps", type=int, metavar="K", help="steps of the objective's attack")
    training.add_argument(
        "--epochs", type=float, metavar="F", help="passes over the training images (default: 10 or 30)"
    )
    training.add_argument("--lr", type=float, default=Recipe().lr, metavar="F", help="peak (default: %(default)s)")
    training.add_argument(
        "--batch-size", type=int, default=Recipe().batch_size, metavar="N", help="images a step (default: %(default)s)"
    )
    training.add_argument(
        "--training-option",
        type=assignment,
        action="append",
        default=[],
        metavar="K=V",
        help="any other setting of a recipe's `training`, such as weight_decay=1e-4",
    )
    training.add_argument(
        "--awp",
        type=float,
        default=Recipe().awp,
        metavar="GAMMA",
        help="radius of adversarial weight perturbation, such as 0.005; 0 is off (default: %(default)g)",
    )
    training.add_argument(
        "--awp-warmup",
        type=float,
        default=Recipe().awp_warmup,
        metavar="F",
        help="share of the epochs before it begins (default: %(default)g)",
    )


def add_teaching_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the loss of the fine-tuning, and who teaches."""
    teaching = parser.add_argument_group("fine-tuning and distillation")
    teaching.add_argument(
        "--finetune",
        metavar="NAME",
        help="loss of the fine-tuning after a cut, such as rslad, which learns from the reference as it was before the "
        "cut or from --teacher (default: the objective)",
    )
    teaching.add_argument(
        "--finetune-option", type=assignment, action="append", default=[], metavar="K=V", help="an option of that loss"
    )
    teaching.add_argument(
        "--teacher",
        metavar="DIR|MODEL",
        help="a robust teacher for rslad, adaad, ard, iad and ltd: a saved result, or a model with --teacher-weights",
    )
    teaching.add_argument(
        "--teacher-weights", type=Path, metavar="FILE", help="safetensors with the weights of the model --teacher"
    )


def finetune_from(arguments: argparse.Namespace) -> Objective | None:
    """The loss of the fine-tuning that the arguments name; its attack takes as many steps as the objective's.

    Raises:
        InputError: No such loss or option, or options without a loss.
    """
    if arguments.finetune is None:
        if arguments.finetune_option:
            raise InputError("--finetune-option goes with --finetune: give it too")
        return None
    kind = OBJECTIVES.get(arguments.finetune)
    steps = kind is not None and "steps" in {field.name for field in fields(kind)}  # type: ignore[arg-type]
    options = {"steps": arguments.attack_steps} if steps else {}
    return objective_from_name(arguments.finetune, **(options | dict(arguments.finetune_option)))


def teacher_from(arguments: argparse.Namespace) -> str | tuple[str, Path] | None:
    """Whom the arguments name as the teacher; it is read later, with the data at hand.

    Raises:
        InputError: There are weights for no model.
    """
    if arguments.teacher_weights is None:
        return arguments.teacher  # type: ignore[no-any-return]
    if arguments.teacher is None:
        raise InputError("--teacher-weights goes with --teacher MODEL: give it too")
    return arguments.teacher, arguments.teacher_weights


def recipe_from(arguments: argparse.Namespace) -> Recipe:
    """The training settings that the arguments say.

    Raises:
        InputError: A setting that does not exist, or a value that makes no sense.
    """
    named = {"lr": arguments.lr, "batch_size": arguments.batch_size}
    named |= {"awp": arguments.awp, "awp_warmup": arguments.awp_warmup}
    others, known = dict(arguments.training_option), [field.name for field in fields(Recipe)]
    for key in others:
        if key not in known:
            raise InputError(f"--training-option {key}: there is no such setting{nearest(key, known)}")
    return Recipe(**(named | others))


def objective_from(arguments: argparse.Namespace) -> Objective:
    """The objective that the arguments name, with its options.

    Raises:
        InputError: No such objective or option, or a value that makes no sense.
    """
    return objective_from_name(
        arguments.objective, **({"steps": arguments.attack_steps} | dict(arguments.objective_option))
    )


def load_weights(model: nn.Module, path: Path, *, option: str = "--pretrained-weights") -> None:
    """Put the weights of a safetensors file into a model.

    Raises:
        InputError: They are of another model, or cannot be read.
    """
    try:
        load_state(model, read_tensors(path))
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:300]
        raise InputError(
            f"{option} {path} cannot be used ({reason}); it must be a safetensors file of this very model"
        ) from error


def check_output(path: Path) -> None:
    """Raise InputError where a file cannot be written to `path`."""
    if path.is_dir() or not path.parent.is_dir():
        raise InputError(f"{path} cannot be written: name a file in a directory that exists")


def add_data_arguments(parser: argparse.ArgumentParser, *, default: str) -> None:
    """Add what says where the images come from; `default` says in words what is used when nothing is named."""
    group = parser.add_argument_group("data")
    group.add_argument(
        "--data",
        metavar="NAME|DIR",
        help=f"a data set's name (`robustcompress list data`) or a directory of images (default: {default})",
    )
    group.add_argument("--root", type=Path, metavar="DIR", help="where a named data set's files are (default: data)")
    group.add_argument("--download", action="store_true", help="fetch a named data set that is not there")
    group.add_argument("--image-size", type=int, metavar="N", help="scale the images to N x N pixels")
    group.add_argument("--train-limit", type=int, metavar="N", help="use N training images, stratified")
    group.add_argument("--test-limit", type=int, metavar="N", help="use N test images, stratified")
    group.add_argument(
        "--stream",
        choices=("auto", "yes", "no"),
        default="auto",
        help="leave training images on the disk and decode them while training; auto: those that would take more than "
        "a sixteenth of the memory (default: %(default)s)",
    )
    group.add_argument("--data-workers", type=int, metavar="N", help="threads that decode them (default: up to 8)")


def add_extra_arguments(parser: argparse.ArgumentParser) -> None:
    """Add a second source of training images."""
    group = parser.add_argument_group("extra training images")
    group.add_argument(
        "--extra",
        type=Path,
        metavar="FILE.npz",
        help="more images for training: `image`, uint8 [N, H, W, 3], and perhaps `label`, integers [N]",
    )
    group.add_argument(
        "--extra-ratio", type=float, metavar="F", help="their share of each training batch (default: 0.7)"
    )
    group.add_argument(
        "--pseudo-label",
        metavar="teacher|DIR",
        help="who labels them in place of the file: --teacher, or the saved result DIR",
    )


def data_from(arguments: argparse.Namespace, *, name: str | None, seed: int = 0) -> DataSplits:
    """Load what the data arguments say; `name` stands for `--data`, None for the embedded digits."""
    return load_data(
        name,
        root=arguments.root,
        download=arguments.download,
        image_size=arguments.image_size,
        train_limit=arguments.train_limit,
        test_limit=arguments.test_limit,
        seed=seed,
        stream={"yes": True, "no": False}.get(arguments.stream, "auto"),
        workers=arguments.data_workers,
        extra=getattr(arguments, "extra", None),  # of commands that train
        extra_ratio=getattr(arguments, "extra_ratio", None),
        pseudo_label=getattr(arguments, "pseudo_label", None),
    )


def data_of(result: CompressResult, arguments: argparse.Namespace) -> DataSplits | None:
    """Load the images that a result is to be judged on: those named, else the embedded digits if it is about them.

    Returns:
        The splits; None where nothing was named and the result's own data cannot be had without a path.

    Raises:
        InputError: The images do not fit the result: other classes or another size.
    """
    name = arguments.data
    if name is None:
        if result.data["name"] != "digits":
            return None
        name = "digits"
    data = data_from(arguments, name=name, seed=result.seed)  # the same limits then choose the same images
    problems = Problems(f"{data.name} does not fit this result")
    if data.classes != result.classes:
        problems.add(
            f"the model tells {_few(result.classes)} apart, the images are of {_few(data.classes)}; "
            "name the data that it was trained on"
        )
    if data.image_shape != result.image_shape:
        height, width = result.image_shape[1:]
        problems.add(
            f"the images are {data.image_shape[1]}x{data.image_shape[2]}, the model was trained on {height}x{width}; "
            f"pass --image-size {height}"
        )
    problems.raise_if_any()
    return data


def _few(classes: Sequence[str]) -> str:
    return f"{len(classes)} classes ({', '.join(classes[:3])}{', ...' if len(classes) > 3 else ''})"


def add_result_argument(parser: argparse.ArgumentParser, *, or_file: bool = False) -> None:
    """Add the directory of a saved result, and how to name a factory of one's own that it began with.

    Args:
        parser: Of the command.
        or_file: Whether the command also takes an ONNX file in its place.
    """
    parser.add_argument(
        "directory",
        type=Path,
        metavar="DIR|FILE.onnx" if or_file else "DIR",
        help="a result that `robustcompress compress --out` left" + (", or an ONNX file" if or_file else ""),
    )
    parser.add_argument(
        "--model",
        metavar="MODULE:FACTORY",
        help="the factory of the reference, for results of your own models: code is imported only when named here",
    )


def result_from(arguments: argparse.Namespace) -> CompressResult:
    """Load the result that the arguments name.

    Raises:
        InputError: It began with a factory of the user's own, and `--model` does not name it.
        ResultError: There is none, or it is damaged.
    """
    place = str(arguments.directory)
    if place.startswith("hf:"):
        raise InputError(f"{place}: fetch it first, with `robustcompress pull hf://owner/name DIR`, then name DIR")
    try:
        return load(arguments.directory, model=arguments.model)
    except InputError as error:
        if arguments.model is None and "needs its reference model" in str(error):
            raise InputError(f"{arguments.directory}: pass --model MODULE:FACTORY, if you trust its code") from error
        raise
