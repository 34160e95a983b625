"""What `evaluate FILE.onnx` and `bench` measured of a file, as a person wants to read it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from robustcompress.publish.markup import Html, Part, join, note, plain, table, tag
from robustcompress.publish.reading import short

MOST_ROWS = 60


def verified(record: Mapping[str, Any]) -> Html:
    """Accuracies of a file under the attacks that were made on it.

    Args:
        record: As `ArtefactReport.to_json` writes it; strangers may have written another.

    Raises:
        KeyError: Something is missing; TypeError and ValueError where it is of another kind.
    """
    worst, attacks = record["worst_case"], record["robust"]["attacks"][:MOST_ROWS]
    rows = [_accuracy(row["name"], row) for row in attacks] + [_accuracy("worst case", worst)]
    said = f"Judged by the file's own answers in onnxruntime, on {_whole(record['robust']['n'])} images. "
    said += "An upper bound on robustness, never a certificate: an attack that was not run may find more."
    columns = ("attack", "accuracy", "95 % interval", "images")
    parts: list[Part] = [table(columns, rows), tag("p", said)]
    parts += [note(plain(warning), warning=True) for warning in record["warnings"][:MOST_ROWS]]
    parts += [tag("p", plain(remark)) for remark in record["notes"][:MOST_ROWS]]
    same = [
        f"{plain(check['name'], 40)} images: {100 * float(check['argmax_agreement']):.1f} %"
        for check in record["parity"][:MOST_ROWS]
    ]
    if same:
        parts.append(tag("p", f"The same class as the network in torch: {', '.join(dict.fromkeys(same))}."))
    return join(parts)


def timed(record: Mapping[str, Any]) -> Html:
    """Times of files that took turns.

    Args:
        record: As `BenchReport.to_json` writes it; strangers may have written another.

    Raises:
        KeyError: Something is missing; TypeError and ValueError where it is of another kind.
    """
    rows = [
        (
            plain(row["file"], 60),
            str(_whole(row["threads"])),
            str(_whole(row["batch"])),
            f"{float(row['p50_ms']):.3f}",
            f"{float(row['p95_ms']):.3f}",
            f"{float(row['images_per_s']):.0f}",
            f"{float(row['ratio']):.2f} ({float(row['ratio_low']):.2f} to {float(row['ratio_high']):.2f})",
            f"{_whole(record['files'][row['file']]['bytes']) / 1e6:.2f}",
        )
        for row in record["rows"][:MOST_ROWS]
    ]
    columns = ("file", "threads", "batch", "median ms", "95 % ms", "images/s", "time of the first (quartiles)", "MB")
    return join([table(columns, rows), tag("p", f"onnxruntime, {short(record['provider'])}, in turns.")])


def _accuracy(name: object, row: Mapping[str, Any]) -> tuple[str, ...]:
    accuracy, low, high = (100 * float(row[key]) for key in ("accuracy", "low", "high"))
    return plain(name, 60), f"{accuracy:.1f} %", f"{low:.1f} to {high:.1f} %", str(_whole(row["n"]))


def _whole(value: object) -> int:
    if type(value) is not int:
        raise TypeError(f"{plain(value, 40)} is no whole number")
    return value
