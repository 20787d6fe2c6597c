"""``python -m ckptx``: the same as the ``ckptx`` command."""

from ckptx.cli.main import main

if __name__ == "__main__":
    main()
