"""How networks are trained here: the settings every strategy shares, so that strategies can be compared."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from robustcompress.data import Augment
from robustcompress.errors import Problems, nearest
from robustcompress.train.engine import COMPRESSIONS, Compression
from robustcompress.train.large_batch import TRUST

Optimizer = Literal["sgd", "adamw", "lars", "lamb"]
Averaging = Literal["ema", "swa"]
NonFinite = Literal["stop", "skip"]

HOW = ("compile", "nonfinite", "gradient_compression")
"""Settings that say how a run is carried out, and not what is run: a checkpoint does not bind them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """Training settings. The defaults are the field's for 32x32 images (Rice et al. 2020; Pang et al. 2021).

    Attributes:
        optimizer: "sgd" (Nesterov momentum) or "adamw"; for large batches "lars" (`Lars`; each step moves a matrix by
            about `lr` times `trust` of its norm) or "lamb" (`Lamb`; by about `lr` of it).
        lr: Peak learning rate.
        momentum: SGD's and LARS's momentum, or the first beta of AdamW and LAMB.
        weight_decay: Applied to weights of more than one dimension only, not to batch norms and biases; nor are these
            scaled by "lars" and "lamb".
        trust: The coefficient of "lars" (eta).
        warmup: Share of the run's epochs over which the learning rate rises linearly to the phases' schedules: until
            then it is the smaller of both. "one-cycle" has a rise of its own, over 15 % of its phase.
        batch_size: Images a step, those of all processes together.
        clip_norm: Gradients are scaled down to this Euclidean norm; None leaves them.
        ema: Largest decay of the averaged weights, which are what every strategy returns; 0 switches averaging off.
            The decay warms up as (1 + n) / (10 + n), so that short runs are averaged over their own length.
        averaging: "ema", as above; or "swa", stochastic weight averaging (Izmailov et al., UAI 2018): the equal mean of
            the weights at the ends of the last epochs, with batch-norm statistics estimated anew; `ema` is not used.
        swa_start: Share of the run's epochs after which "swa" begins; before, the weights themselves are returned. The
            phases' learning rates stay as they are, where the paper's is constant or cyclical meanwhile.
        augment: "auto" is "crop" for digits, letters and signs that change meaning in a mirror, else "crop-flip".
        bf16: Autocast to bfloat16; "auto" does so on GPUs that can.
        val_images: How many validation images are attacked to choose the best epoch.
        awp: Radius of adversarial weight perturbation (Wu et al., NeurIPS 2020), relative to each weight tensor's norm,
            in every phase that trains weights; the paper's is 0.005 to 0.01, and 0 switches it off. Costs one more
            forward and backward pass a step.
        awp_warmup: Share of the run's epochs before the perturbation begins.
        sam: Radius of sharpness-aware minimisation (Foret et al., ICLR 2021), a Euclidean ball around all weights
            together, in every phase that trains weights; the paper's is 0.05, and 0 switches it off. Costs what `awp`
            costs, and excludes it.
        sam_adaptive: The form whose ball is scaled by the weights (ASAM, Kwon et al., ICML 2021); its `sam` is about
            ten times as large.
        guard: How many training images are attacked after every epoch, by one step and by PGD-10, where the objective's
            own attack is a single step ("fgsm-rs", "free-at"), no more than a 32nd of them, or 64: after catastrophic
            overfitting the epoch is undone, and training goes on with PGD-2 (see `Guard`). 0 switches it off.
        compile: Compile the passes of phases that train weights (`torch.compile`). Every new shape, and so every edit,
            costs some tens of seconds: it pays in long phases on a GPU.
        accumulate: Attack and pass each batch in so many parts, whose gradients are summed: the memory of a part, and
            the step of the whole batch, but that batch norms see the statistics of a part. Several processes (torchrun)
            share the parts; at 1 there are then as many as processes.
        checkpointing: Keep the inputs of blocks alone and compute their activations again on the way back: less memory
            for one more forward pass with each backward one. Numbers stay the same.
        gradient_compression: How gradients travel between processes: "none"; "fp16" or "bf16", rounded to half the
            bytes; "powersgd", by low-rank factors (Vogels et al., NeurIPS 2019), with a memory of what was left out
            that begins anew with every phase. One process sends none, and nothing changes there.
        nonfinite: What to do where a step's loss or gradient is infinite or NaN: "stop", with a checkpoint of the last
            good state; or "skip" the step, and go on at a lower learning rate for a while (see `Care`). A run that
            stopped goes on from its checkpoint with "skip".
    """

    optimizer: Optimizer = "sgd"
    lr: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 5e-4
    trust: float = TRUST
    warmup: float = 0.0
    batch_size: int = 128
    clip_norm: float | None = None
    ema: float = 0.999
    averaging: Averaging = "ema"
    swa_start: float = 0.75
    augment: Literal["auto"] | Augment = "auto"
    bf16: bool | Literal["auto"] = "auto"
    val_images: int = 500
    awp: float = 0.0
    awp_warmup: float = 0.0
    sam: float = 0.0
    sam_adaptive: bool = False
    guard: int = 128
    compile: bool = False
    accumulate: int = 1
    checkpointing: bool = False
    gradient_compression: Compression = "none"
    nonfinite: NonFinite = "stop"

    def __post_init__(self) -> None:
        problems = Problems("the training recipe makes no sense")
        for name, choices in (
            ("optimizer", get_args(Optimizer)),
            ("averaging", get_args(Averaging)),
            ("augment", ("auto", *get_args(Augment))),
            ("gradient_compression", COMPRESSIONS),
            ("nonfinite", get_args(NonFinite)),
        ):
            if getattr(self, name) not in choices:
                chosen = getattr(self, name)
                problems.add(f"{name}={chosen!r} does not exist{nearest(str(chosen), choices)}")
        for name, whole, low, high in (
            ("lr", False, 1e-9, 50),
            ("momentum", False, 0, 0.9999),
            ("weight_decay", False, 0, 1),
            ("trust", False, 1e-9, 1),
            ("warmup", False, 0, 1),
            ("batch_size", True, 1, 1_000_000),
            ("accumulate", True, 1, 1_000_000),
            ("ema", False, 0, 0.999999),
            ("swa_start", False, 0, 0.999),
            ("val_images", True, 0, 1_000_000_000),
            ("awp", False, 0, 1),
            ("awp_warmup", False, 0, 1),
            ("sam", False, 0, 10),
            ("guard", True, 0, 1_000_000_000),
        ):
            value = getattr(self, name)
            number = isinstance(value, int if whole else int | float) and not isinstance(value, bool)
            if not number or not low <= value <= high:
                kind = "whole number" if whole else "number"
                problems.add(f"{name}={value!r}: must be a {kind} from {low:g} to {high:g}")
        if self.clip_norm is not None and not (isinstance(self.clip_norm, int | float) and self.clip_norm > 0):
            problems.add(f"clip_norm={self.clip_norm!r}: must be a positive number, or None")
        for name in ("compile", "sam_adaptive", "checkpointing"):
            if not isinstance(getattr(self, name), bool):
                problems.add(f"{name}={getattr(self, name)!r}: must be True or False")
        if self.awp and self.sam:
            problems.add(f"awp={self.awp!r} and sam={self.sam!r} would each move the weights: choose one of them")
        if self.checkpointing is True and self.compile is True:
            problems.add("checkpointing with compile: a compiled network has no blocks to compute again; leave one out")
        if _whole(self.accumulate) and _whole(self.batch_size) and self.accumulate > self.batch_size >= 1:
            problems.add(f"accumulate={self.accumulate}: a batch of {self.batch_size} has no so many images")
        if self.bf16 not in (True, False, "auto"):
            problems.add(f"bf16={self.bf16!r}: must be True, False or 'auto'")
        problems.raise_if_any()

    def to_json(self) -> dict[str, Any]:
        """The settings as plain JSON."""
        return asdict(self)


def _whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


MIRROR_CHANGES_MEANING = ("digits", "mnist", "svhn")


def augmentation(recipe: Recipe, data_name: str) -> Augment:
    """Resolve "auto" for a data set."""
    if recipe.augment != "auto":
        return recipe.augment
    return "crop" if Path(data_name).name.lower() in MIRROR_CHANGES_MEANING else "crop-flip"
