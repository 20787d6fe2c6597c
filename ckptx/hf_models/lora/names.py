"""The names of an adapter's tensors, in its own files and in a live model's state dict.

    live    base_model.model.<path>.lora_A.<adapter>.weight      <path>.base_layer.weight
            <path>.modules_to_save.<adapter>.weight              <path>.original_module.weight
            <path>.token_adapter.trainable_tokens_delta.<adapter>
    file    base_model.model.<path>.lora_A.weight                <path>.weight (saved modules)

Source: huggingface/peft src/peft/utils/save_and_load.py, get_peft_model_state_dict;
src/peft/tuners/lora/model.py, _get_adapter_state_dict; src/peft/utils/other.py,
ModulesToSaveWrapper, TrainableTokensWrapper @ v0.21.2.
"""

from __future__ import annotations

from dataclasses import dataclass

from ckptx.errors import FormatError

PREFIX = "base_model.model."
"""What peft puts before the names of the model that it wraps."""
MATRICES = ("lora_A", "lora_B")
VECTORS = ("lora_embedding_A", "lora_embedding_B", "lora_magnitude_vector")
TOKENS = "trainable_tokens_delta"
_SAVED, _ORIGINAL = "modules_to_save", "original_module"
_AROUND = ("base_layer", "token_adapter")


@dataclass(frozen=True, slots=True)
class Name:
    """What a name says. ``kind`` is empty for whole tensors: of the base, or saved modules."""

    path: str
    """The module, with ``.base_layer`` for every wrapper below the outermost; or the whole name."""
    kind: str = ""
    """``"lora_A.weight"``, ``"lora_B.bias"``, ``"lora_embedding_A"``, ..., ``"saved"``."""
    adapter: str = ""

    @property
    def module(self) -> str:
        """The module without wrappers."""
        return plain(self.path)

    @property
    def file_key(self) -> str:
        """The name that it has in an adapter's own file, without the prefix."""
        if self.kind in ("", "saved"):
            return self.path
        middle = ".token_adapter" if self.kind == TOKENS else ""
        return f"{self.path}{middle}.{self.kind}"


def plain(path: str) -> str:
    """Return a path without the wrappers that peft puts around a module."""
    return ".".join(word for word in path.split(".") if word not in _AROUND)


def speaks_peft(name: str) -> bool:
    """Return whether a name is one that only a model wrapped by peft has."""
    words = name.split(".")
    return name.startswith(PREFIX) or any(
        word.startswith("lora_") or word in (TOKENS, _SAVED) for word in words
    )


def is_lora(name: str) -> bool:
    """Return whether a name in a live model is that of an adapter's tensor, and not of its base.

    Raises:
        FormatError: it is of an adapter, and not one that is known.
    """
    return speaks_peft(name) and bool(parse(name).kind)


def parse(name: str) -> Name:
    """Return what a name says.

    Raises:
        FormatError: it is of an adapter, and not one that is known.
    """
    words = name.removeprefix(PREFIX).split(".")
    for place, word in enumerate(words):
        before, after = words[:place], words[place + 1 :]
        if word in MATRICES and after[-1:] in (["weight"], ["bias"]) and len(after) <= 2:
            return Name(".".join(before), f"{word}.{after[-1]}", "".join(after[:-1]))
        if word in (*VECTORS, TOKENS):
            rest = after[:-1] if after[-1:] == ["weight"] else after
            path = ".".join(before).removesuffix(".token_adapter")
            if len(rest) <= 1:
                return Name(path, word, "".join(rest))
        if word == _SAVED and len(after) > 1:
            return Name(".".join([*before, *after[1:]]), "saved", after[0])
        if word == _ORIGINAL:
            return Name(plain(".".join([*before, *after])))
        if word.startswith(("lora_", "trainable_tokens_")):
            raise FormatError(
                f"{name!r}: {word} is not a part of LoRA that is known; merge the adapter with peft"
            )
    return Name(plain(".".join(words)))
