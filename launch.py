"""Causeway's command line: ``python launch.py VERB ...``; see README.md."""

from __future__ import annotations

import signal
import sys

from cluster.cli import main

if __name__ == "__main__":
    code = main(sys.argv[1:])
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a second Ctrl-C must not change the exit code
    sys.exit(code)
