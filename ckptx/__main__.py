"""The ``ckptx`` and ``ckptx-convert`` commands, also as ``python -m ckptx``.

A process that a conversion starts anew imports the script that started the command, and with it
this module: it imports the command line only where it runs.
"""

import os


def main() -> None:
    """Run ``ckptx``."""
    _start_no_pool()
    from ckptx.cli.main import main as run

    run()


def convert() -> None:
    """Run a conversion with the options of Megatron's ``convert.py``."""
    _start_no_pool()
    from ckptx.cli.main import convert as run

    run()


def _start_no_pool() -> None:
    """Keep numpy's threads for products of matrices away: a process that has one can be copied."""
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")


if __name__ == "__main__":
    main()
