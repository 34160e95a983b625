"""What a run's training cost, in multiply-adds: the common coin for strategies whose networks change size on the way.

A forward pass costs the network's MACs at that moment; the gradient to the images costs as much again, and so does the
gradient to the weights. With K attack steps an image of a training step therefore costs

    pgd-at, semantic-at, ard, ltd, adaad   2 K + 3     fgsm-rs   2 + 3     trades   1 + 2 K + 6
    mart, rslad, iad   2 K + 6     natural, free-at, smoothing   3     ibp   9

times the MACs. An interval is passed as its two ends beside the clean images; the linear bound that crown-ibp begins
with adds three times as many passes as there are classes, over its ramp. Regularisers add 6 for separability (two
passes and their gradients), 3 for boundary, and for jacobian 3 and another 3 a projection (a gradient, and the
gradients of that); an epoch under AWP, SAM or S2AP adds the passes of the loss once more (3, or 6 where clean images
are passed too), and the clean look every tenth step adds 1/10 (also where long epochs make it rarer). A search for
scores is counted like training, though it computes no gradients of weights; re-estimating batch-norm statistics is not
counted. PGD-10 on the validation split, where the best epoch is chosen, and on the images that grape scores is counted
too. So is what rcnas spends on candidates: their steps of recovery, at the candidate's own MACs (5, and 1 of the
teacher's where it is asked), and PGD on the validation split. A teacher is asked for clean answers, for attacked ones,
or for both once a step, and by adaad for an answer and a gradient at each step of the attack, at the reference's MACs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from robustcompress.train.loop import CLEAN_EVERY

PROBE_STEPS = 10
"""PGD steps that `Session.validate` and `Session.attacked` take."""
ASCENTS = ("awp", "sam", "gamma")
"""Keys of a record that say that each of its steps climbed in parameter space first."""


DISTILLED = ("distil", "ard", "iad", "rslad", "adaad", "ltd")


def passes(objective: Mapping[str, Any], *, classes: int = 10) -> float:
    """Passes that one image of a training step costs, each as much as a forward pass.

    Args:
        objective: What `Objective.to_json` wrote.
        classes: How many there are; bounds backwards from the logits cost by the class.
    """
    steps = int(objective.get("steps", 0))
    name, *added = objective["name"].split("+")
    extra = {"separability": 6, "boundary": 3, "jacobian": 3 + 3 * int(objective.get("jacobian_projections", 0))}
    attack = {"fgsm-rs": 2, "trades": 1 + 2 * steps, "natural": 0, "free-at": 0, "smoothing": 0, "ibp": 0}
    alone = attack.get(name, 2 * steps) + _descent(objective)
    if name in ("ibp", "crown-ibp"):
        crowned = (objective["warm_up"] + objective["ramp"]) / 2 if name == "crown-ibp" else 0.0
        alone = 9.0 + 3 * classes * crowned
    return alone + sum(extra[regulariser] for regulariser in added)


def _descent(objective: Mapping[str, Any]) -> float:
    """Passes and gradients of the loss once images are attacked, and the look at clean ones where it has none."""
    name = objective["name"].partition("+")[0]
    if name == "natural":
        return 3.0
    clean = name in ("trades", "mart")
    if name in DISTILLED:
        clean = objective["natural"] > 0 or objective["labels"] > 0 or objective["trust"] is not None
    return 6.0 if clean else 3 + 1 / CLEAN_EVERY


def teacher_passes(objective: Mapping[str, Any]) -> float:
    """Passes through the teacher that one image of a training step costs; 0 where there is no teacher."""
    if objective["name"].partition("+")[0] not in DISTILLED:
        return 0.0
    by_answers = bool(objective["adversarial"])
    clean = objective["inner"] == "kl-clean" or objective["natural"] > 0
    clean |= by_answers and objective["target"] == "clean"
    attacked = objective["trust"] is not None or (by_answers and objective["target"] == "attacked")
    climbing = 2 * int(objective["steps"]) if objective["inner"] == "kl-attacked" else 0
    return climbing + float(clean) + float(attacked)


def training_cost(
    history: Sequence[Mapping[str, Any]],
    *,
    batch: int,
    objective: Mapping[str, Any],
    probes: int,
    scored: int,
    finetune: Mapping[str, Any] | None = None,
    teacher_macs: float = 0.0,
) -> dict[str, Any]:
    """Images trained on, how many a second (attacks included, validation not), and multiply-adds of the whole run.

    Args:
        history: The run's records.
        batch: Images a training step.
        objective: What `Objective.to_json` wrote.
        probes: Validation images that a selecting epoch attacks with PGD-10, at two forward passes more.
        scored: Training images that a scoring growth event attacks with PGD-10, at one forward and one gradient more.
        finetune: The same of the fine-tuning, where it has a loss of its own.
        teacher_macs: What a pass through the teacher costs, where there is one.
    """
    images = seconds = total = macs = 0.0
    steps_of = {id(entry): steps for entry, steps in epochs_of(history)}
    for entry in history:
        if id(entry) in steps_of:
            trained = steps_of[id(entry)] * batch
            images += trained
            seconds += trained / entry["images_per_s"]
            macs = entry["macs"]
            tuned = finetune is not None and entry["phase"] == "finetune"
            loss = finetune if finetune is not None and tuned else objective
            again = round(_descent(loss)) if any(entry.get(key) for key in ASCENTS) else 0
            total += trained * macs * (passes(loss) + again) + trained * teacher_macs * teacher_passes(loss)
        total += _recovered(entry, macs, batch=batch)
        # Scores are made before the network grows, so at the MACs of the epoch before.
        # What a mask is judged by comes after the cut.
        total += _looked(entry, _macs_of(entry, macs), probes=probes, scored=scored)
    return {"images": int(images), "images_per_s": round(images / seconds, 2), "macs": round(total)}


def matched_epochs(
    mine: Mapping[str, Any],
    theirs: Mapping[str, Any],
) -> float:
    """Epochs at which a run would cost as many multiply-adds as another did.

    Training grows with the epochs; looking at the validation split and scoring do not, as they are done a few times.

    Args:
        mine: Record of the cell that is to be made longer or shorter.
        theirs: Record of the cell whose cost it shall have.
    """
    settings, history = mine["settings"], mine["results"]["history"]
    probes = min(settings["training"]["val_images"], settings["data"]["val"])
    scored = settings["strategy"].get("score_batches", 0) * settings["training"]["batch_size"]
    fixed = 0.0
    macs = 0.0
    for entry in history:
        macs = entry["macs"] if "steps" in entry else macs
        fixed += _looked(entry, _macs_of(entry, macs), probes=probes, scored=scored)
    whole, wanted = mine["results"]["training"]["macs"], theirs["results"]["training"]["macs"]
    # Where what does not shrink costs more than is allowed, a twentieth is left; the table shows what that cost.
    return float(settings["epochs"]) * max(0.05, (wanted - fixed) / (whole - fixed))


def _macs_of(entry: Mapping[str, Any], before: float) -> float:
    return float(entry["macs"]) if entry.get("event") in ("mask", "candidate", "finalist") else before


def _looked(entry: Mapping[str, Any], macs: float, *, probes: int, scored: int) -> float:
    """Multiply-adds of what a record says beside training: PGD-10 on validation or scored images."""
    images = (probes if "val_robust" in entry else 0) + (scored if entry.get("scores") else 0)
    return images * macs * (2 * entry.get("attack_steps", PROBE_STEPS) + 2)


def _recovered(entry: Mapping[str, Any], teacher: float, *, batch: int) -> float:
    """Multiply-adds of the training of a candidate, with FGSM-RS; `teacher` is what the network cost before."""
    asked = teacher if entry.get("recovery") == "distill" else 0.0
    return entry.get("recovery_steps", 0) * batch * (float(entry.get("macs", 0.0)) * 5 + asked)


def epochs_of(history: Sequence[Mapping[str, Any]]) -> list[tuple[Mapping[str, Any], int]]:
    """The records of epochs with the steps of each; the history counts them from the start of a phase."""
    found, phase, before = [], None, 0
    for entry in history:
        if "steps" in entry:
            before = before if entry["phase"] == phase else 0
            found.append((entry, entry["steps"] - before))
            phase, before = entry["phase"], entry["steps"]
    return found
