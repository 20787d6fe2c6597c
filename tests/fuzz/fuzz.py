"""Fuzz one target with atheris.

python -m tests.fuzz.fuzz TARGET [SECONDS]

New inputs go to a directory below the system's temporary one; a crash is written to the working
directory, from where it goes into ``tests/fuzz/corpus/TARGET`` once it is mended.
"""

from __future__ import annotations

import sys
import tempfile

import atheris  # type: ignore[import-not-found]

with atheris.instrument_imports(include=["ckptx", "plugins", "schemas"]):
    from ckptx.registry import registry
    from tests.fuzz import targets

    registry.statuses()  # imports every plugin
    registry.families()


def main() -> None:
    """Fuzz for some seconds."""
    name, seconds = sys.argv[1], sys.argv[2] if len(sys.argv) > 2 else "60"
    found = tempfile.mkdtemp(prefix=f"ckptx-fuzz-{name}-")
    options = [f"-max_total_time={seconds}", "-rss_limit_mb=2048", "-timeout=10", "-max_len=8192"]
    arguments = [sys.argv[0], *options, "-print_final_stats=1", found, str(targets.CORPUS / name)]
    atheris.Setup(arguments, lambda data: targets.run(name, data))
    atheris.Fuzz()


if __name__ == "__main__":
    main()
