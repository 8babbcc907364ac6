"""One module per verb of ``launch.py``: ``add_arguments(parser)`` and ``run(args) -> exit code``."""
