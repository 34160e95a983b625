"""`python -m robustcompress` is the command line."""

from __future__ import annotations

from robustcompress.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
