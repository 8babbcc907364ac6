"""Causeway's command line: ``python launch.py VERB ...``; see README.md."""

from __future__ import annotations

import sys

from cluster.cli import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
