"""The ``ckptx`` and ``ckptx-convert`` commands, also as ``python -m ckptx``.

A process that a conversion starts imports the script that started the command, and with it this
module: it imports the command line only where it runs.
"""


def main() -> None:
    """Run ``ckptx``."""
    from ckptx.cli.main import main as run

    run(early=True)


def convert() -> None:
    """Run a conversion with the options of Megatron's ``convert.py``."""
    from ckptx.cli.main import convert as run

    run(early=True)


if __name__ == "__main__":
    main()
