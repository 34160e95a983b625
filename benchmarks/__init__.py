"""Re-runnable claims; see README.md. Run in the repository root: `python -m benchmarks.structure --help`."""
