"""What to tell of a path that no loader recognises: what is there, and what to give instead."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from itertools import chain

from ckptx.storage.location import Location
from ckptx.storage.partial import PARTIAL, is_held

_ITERATION = re.compile(r"iter_\d{7}|release")
_HUB = re.compile(r"[\w.-]+/[\w.-]+")
"""How the Hub calls a model: by who made it, and a name."""
_STEP = re.compile(r"(iter_|global_step_?|checkpoint-|step-)\d+|release")
_STEPS = 5  # that are named, the latest
_LOOKED_AT = 20  # directories below the one that was given
_NAMED = 3  # of those that are checkpoints

_FOREIGN = {
    r".+\.gguf": "a file of llama.cpp (GGUF), mostly quantised; transformers reads it: "
    "AutoModelForCausalLM.from_pretrained(DIR, gguf_file=NAME).save_pretrained(NEW)",
    r".+\.nemo": "an archive of NeMo 1, which its scripts/checkpoint_converters/"
    "convert_*_nemo_to_hf.py read",
    r"iter_\d{7}_\d+_local\.pt": "a rank's part of a local checkpoint of NVIDIA's resiliency "
    "extension (--non-persistent-ckpt-type local), which only the same ranks of Megatron can load; "
    "have them save a global one",
}
"""Formats that are not read here, by the names of files: what they are, and what reads them.

Sources: ggml-org/ggml docs/gguf.md, NVIDIA/NeMo scripts/checkpoint_converters @ v2.0.0,
NVIDIA/nvidia-resiliency-ext src/nvidia_resiliency_ext/checkpointing/local/ckpt_managers."""
Recognised = Callable[[Location], bool]


def why_absent(path: Location) -> str:
    """Return why nothing is at ``path``, as far as is known."""
    partial = path.parent / f"{path.name}{PARTIAL}" if path.name else path
    if not partial.is_dir():
        return f"no such file or directory{_instead_of(path)}"
    return f"is not there yet: the conversion to it {_unfinished(partial)}"


def _instead_of(path: Location) -> str:
    """Return what may have been meant by a path that is not there."""
    text = os.fspath(path)
    if _HUB.fullmatch(text) and not path.parent.exists():
        return (
            f"; a model of the Hugging Face Hub is fetched with 'hf download {text} --local-dir "
            f"{path.name}', then give {path.name}"
        )
    if not _STEP.fullmatch(path.name) or not path.parent.is_dir():
        return ""
    steps = [one.name for one in path.parent.iterdir() if _STEP.fullmatch(one.name)]
    steps.sort(key=lambda name: (len(name), name))
    rest = f"{len(steps) - _STEPS} more and " * (len(steps) > _STEPS)
    return f"; {path.parent} holds {rest}{', '.join(steps[-_STEPS:])}" if steps else ""


def _unfinished(partial: Location) -> str:
    """Return what has become of a conversion by what it has left, and what to do."""
    if is_held(partial):
        return f"is still running ({partial}); wait for it"
    return (
        f"was interrupted; run the same command again to continue, or remove {partial}, which is "
        "all that it has left"
    )


def why_unrecognised(source: Location, recognised: Recognised) -> str:
    """Return why ``source`` may be no checkpoint and what to do; empty if nothing is known.

    Args:
        source: exists, and no loader recognises it.
        recognised: whether a loader recognises another path.
    """
    if reason := foreign(source):
        return reason
    if not source.is_dir():
        return "it is empty" if source.is_file() and not source.stat().st_size else ""
    names = sorted(path.name for path in source.iterdir())
    if not names:
        return "the directory is empty"
    finished = [name for name in names if not name.endswith(PARTIAL)]
    above = source.absolute().parent
    if source.name.startswith("mp_rank_") and recognised(above):
        return f"it is the directory of one rank: give {above}"
    below = checkpoints_below(source, recognised) or _incomplete(finished)
    if below or len(finished) == len(names):
        return below
    partial = next(source / name for name in names if name.endswith(PARTIAL))
    return f"a conversion into it {_unfinished(partial)}"


def foreign(source: Location) -> str:
    """Return what another program's format is, and which tool reads it; empty of any other."""
    inside = sorted(source.iterdir()) if source.is_dir() else [source]
    ranks = (sorted(path.iterdir()) for path in inside if path.name.isdigit() and path.is_dir())
    for name in (path.name for path in (*inside, *chain.from_iterable(ranks))):
        reason = next((why for pattern, why in _FOREIGN.items() if re.fullmatch(pattern, name)), "")
        if reason:
            return f"{name} is {reason}"
    return ""


def checkpoints_below(source: Location, recognised: Recognised) -> str:
    """Return which checkpoints lie below a directory that is none itself; empty if there are none.

    The conversions that go on there do not count.
    """
    names = [path.name for path in source.iterdir() if not path.name.endswith(PARTIAL)]
    names.sort(key=lambda name: (len(name), name))  # numbers in order: the last one is the latest
    found = [path for path in list(_below(source, names))[-_LOOKED_AT:] if recognised(path)]
    if not found:
        return ""
    given = ", ".join(str(path) for path in found[-_NAMED:])
    rest = f" and {len(found) - _NAMED} more" if len(found) > _NAMED else ""
    what = "a checkpoint lies" if len(found) == 1 else "checkpoints lie"
    why = ""
    if all(_ITERATION.fullmatch(path.name) for path in found):
        why = "no latest_checkpointed_iteration.txt says which iteration is meant; "
    return f"{why}{what} below it: give {given}{rest}"


def _below(source: Location, names: list[str]) -> Iterator[Location]:
    """Yield directories that may have been meant: the next ones, and those of the Hub's cache.

    The cache keeps models as ``models--ORGANISATION--NAME/snapshots/COMMIT``
    (huggingface/huggingface_hub src/huggingface_hub/file_download.py @ v1.0).
    """
    for name in names:
        if name == "snapshots" and (source / name).is_dir():
            yield from sorted((source / name).iterdir())
        elif (source / name).is_dir():
            yield source / name
            if re.fullmatch(r"global_step_\d+", name):
                yield from sorted(path for path in (source / name).iterdir() if path.is_dir())


def _incomplete(names: list[str]) -> str:
    if "config.json" in names:
        return (
            "config.json is there, but no weights (model.safetensors, pytorch_model.bin or an "
            "index) lie beside it; copy them, or finish the download"
        )
    return ""
