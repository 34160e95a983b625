"""One module a command.

Each has NAME, SUMMARY, DESCRIPTION, EXAMPLES, `add_arguments(parser)` and `run(arguments) -> Output`: it answers with a
value, and the frame in `cli.py` prints it.
"""

from __future__ import annotations

from robustcompress.commands import bench, catalogue, compress, evaluate, export, inspect, latency, quickstart, run

COMMANDS = (quickstart, compress, run, evaluate, export, bench, latency, inspect, catalogue)

__all__ = ["COMMANDS"]
