"""How networks are trained here: the settings every strategy shares, so that strategies can be compared."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from robustcompress.data import Augment
from robustcompress.errors import Problems, nearest

Optimizer = Literal["sgd", "adamw"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """Training settings. The defaults are the field's for 32x32 images (Rice et al. 2020; Pang et al. 2021).

    Attributes:
        optimizer: "sgd" (Nesterov momentum) or "adamw".
        lr: Peak learning rate.
        momentum: SGD momentum, or AdamW's first beta.
        weight_decay: Applied to weights of more than one dimension only, not to batch norms and biases.
        batch_size: Images a step.
        clip_norm: Gradients are scaled down to this Euclidean norm; None leaves them.
        ema: Largest decay of the averaged weights, which are what every strategy returns; 0 switches averaging off.
            The decay warms up as (1 + n) / (10 + n), so that short runs are averaged over their own length.
        augment: "auto" is "crop" for digits, letters and signs that change meaning in a mirror, else "crop-flip".
        bf16: Autocast to bfloat16; "auto" does so on GPUs that can.
        val_images: How many validation images are attacked to choose the best epoch.
    """

    optimizer: Optimizer = "sgd"
    lr: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 5e-4
    batch_size: int = 128
    clip_norm: float | None = None
    ema: float = 0.999
    augment: Literal["auto"] | Augment = "auto"
    bf16: bool | Literal["auto"] = "auto"
    val_images: int = 500

    def __post_init__(self) -> None:
        problems = Problems("the training recipe makes no sense")
        if self.optimizer not in get_args(Optimizer):
            problems.add(
                f"optimizer={self.optimizer!r} does not exist{nearest(str(self.optimizer), get_args(Optimizer))}"
            )
        augments = ("auto", *get_args(Augment))
        if self.augment not in augments:
            problems.add(f"augment={self.augment!r} does not exist{nearest(str(self.augment), augments)}")
        for name, low, high in (
            ("lr", 0, 10),
            ("momentum", -1e-9, 1),
            ("weight_decay", -1e-9, 1),
            ("batch_size", 1, 1e6),
            ("ema", -1e-9, 1),
            ("val_images", 0, 1e9),
        ):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not low < value < high:
                problems.add(f"{name}={value!r}: must be a number above {max(low, 0):g} and below {high:g}")
        if self.clip_norm is not None and not self.clip_norm > 0:
            problems.add(f"clip_norm={self.clip_norm!r}: must be positive, or None")
        problems.raise_if_any()

    def to_json(self) -> dict[str, Any]:
        """The settings as plain JSON."""
        return asdict(self)


MIRROR_CHANGES_MEANING = ("digits", "mnist", "svhn")


def augmentation(recipe: Recipe, data_name: str) -> Augment:
    """Resolve "auto" for a data set."""
    if recipe.augment != "auto":
        return recipe.augment
    return "crop" if Path(data_name).name.lower() in MIRROR_CHANGES_MEANING else "crop-flip"
