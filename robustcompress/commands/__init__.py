"""One module a command.

Each has NAME, SUMMARY, DESCRIPTION, EXAMPLES, `add_arguments(parser)` and `run(arguments) -> Output`: it answers with a
value, and the frame in `cli.py` prints it.
"""

from __future__ import annotations

from robustcompress.commands import (
    bench,
    card,
    catalogue,
    certify,
    compress,
    evaluate,
    export,
    inspect,
    latency,
    pareto,
    pull,
    push,
    quantize,
    quickstart,
    report,
    run,
    sensitivity,
)

COMMANDS = (
    *(quickstart, compress, run, pareto, evaluate, certify),
    *(export, quantize, bench, latency),
    *(report, card, push, pull),
    *(inspect, sensitivity, catalogue),
)

__all__ = ["COMMANDS"]
