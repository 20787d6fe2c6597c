"""What a script is to ckptx: its flags, and the words of ckptx's command that each becomes."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from ckptx.errors import FormatError

SOURCE, TARGET = "SOURCE", "TARGET"
"""What a flag becomes that names a place: the first or the second argument of ckptx."""
SAME = "SAME"
"""What a flag becomes that ckptx has by the same name, with dashes for underscores."""
ROUNDED = ("--ignore-dtype", "--rtol", "0.004", "--atol", "1e-6")
"""For ``verify``: equal but for rounding to bfloat16, which changes a value by 2^-8 of it."""

Values: TypeAlias = Mapping[str, Any]
"""What was given, by the names of the flags without dashes."""
Words: TypeAlias = Callable[[Values], Iterable[str]]


@dataclass(frozen=True, slots=True)
class Flag:
    """One flag of a script.

    Attributes:
        spellings: as the script has them; one without dashes is a positional argument.
        help: what the script does with it.
        becomes: an option of ckptx that takes the value (or none, of a switch), `SOURCE`, `TARGET`,
            or the words for each value that it may have (True, of a switch).
        switch: whether it takes no value.
        many: whether it may be given several times.
        variable: of the environment, which the script takes in its place.
        needless: why ckptx has no use for it: it is accepted, and that is said.
        refused: why it is not accepted, and what to do.
    """

    spellings: tuple[str, ...]
    help: str
    becomes: str | Mapping[Any, tuple[str, ...]] = ""
    switch: bool = False
    many: bool = False
    required: bool = False
    default: str | None = None
    variable: str | None = None
    needless: str = ""
    refused: str = ""

    @property
    def key(self) -> str:
        """The name of its value: of the longest spelling, without dashes."""
        return max(self.spellings, key=len).lstrip("-").replace("-", "_").lower()

    @property
    def positional(self) -> bool:
        """Whether it is given by its place."""
        return not self.spellings[0].startswith("-")

    def words(self, value: Any) -> Iterator[str]:
        """Yield the options that a value becomes."""
        if isinstance(self.becomes, Mapping):
            yield from self.becomes[value]
        elif self.becomes and self.becomes not in (SOURCE, TARGET):
            yield from (self.becomes,) if self.switch else (self.becomes, str(value))


def flag(
    names: str, help: str, becomes: str | Mapping[Any, tuple[str, ...]] = "", **more: Any
) -> Flag:
    """Return a flag of these names, separated by blanks; a place must be given."""
    spellings = tuple(names.split())
    if becomes == SAME:
        becomes = max(spellings, key=len).replace("_", "-")
    required = becomes in (SOURCE, TARGET) and "default" not in more
    return Flag(spellings, help, becomes, **{"required": required, **more})


def switch(
    names: str, help: str, becomes: str | Mapping[bool, tuple[str, ...]] = "", **more: Any
) -> Flag:
    """Return a flag without value."""
    return flag(names, help, becomes, switch=True, **more)


def nothing(values: Values) -> tuple[str, ...]:
    """Return no words."""
    return ()


@dataclass(frozen=True, slots=True)
class Script:
    """A script, or one of its sub-commands.

    Attributes:
        name: as users type it.
        origin: the project, the file and its revision.
        flags: all that it knows.
        command: the command of ckptx.
        always: words of ckptx that every call of the script means.
        places: source and target, where no flag has them as they are.
        further: words that depend on more than one flag, or on files.
        then: a second command, to be run when the first has succeeded.
        aliases: other names of it.
        parts: its sub-commands, by name; it has no flags of its own then.
        unnamed: the sub-command that is meant where none is named.
        refused: why there is no equivalent, and what to do.
        differs: what is not as the script does it, said when it runs.
    """

    name: str
    origin: str
    flags: tuple[Flag, ...] = ()
    command: str = "convert"
    always: tuple[str, ...] = ()
    places: Words | None = None
    further: Words = nothing
    then: Words = nothing
    aliases: tuple[str, ...] = ()
    parts: tuple[Script, ...] = ()
    unnamed: str = ""
    refused: str = ""
    differs: Words = nothing

    @property
    def spellings(self) -> tuple[str, ...]:
        """All names, in lower case with underscores."""
        return tuple(name.replace("-", "_") for name in (self.name, *self.aliases))

    def lines(self, values: Values) -> Iterator[list[str]]:
        """Yield the commands of ckptx that a call of the script means, without ``ckptx``."""
        places = self.places(values) if self.places else self._said(values)
        options = [word for one in self.flags for word in _given(one, values)]
        yield [self.command, *places, *self.always, *options, *self.further(values)]
        if second := list(self.then(values)):
            yield second

    def _said(self, values: Values) -> Iterator[str]:
        for place in (SOURCE, TARGET):
            yield from (str(values[one.key]) for one in self.flags if one.becomes == place)

    def remarks(self, values: Values) -> Iterator[str]:
        """Yield what the user should know about this call."""
        for one in self.flags:
            if one.needless and values[one.key]:
                yield f"{one.spellings[0]} is not needed: {one.needless}"
        yield from self.differs(values)


def _given(one: Flag, values: Values) -> Iterator[str]:
    value = values[one.key]
    for item in value if one.many else [value]:
        if item is not None and item is not False:
            yield from one.words(item)


def dtype_of(base: str) -> Sequence[str]:
    """Return the option that writes the dtype which the config of a base model names, if it does.

    Raises:
        FormatError: there is no config, or it is damaged.
    """
    config = Path(base) / "config.json"
    try:
        said = json.loads(config.read_bytes())
        inner = said.get("text_config") or {}
        keys = ("dtype", "torch_dtype")
        dtype = next((one[key] for one in (said, inner) for key in keys if one.get(key)), None)
    except FileNotFoundError:
        raise FormatError(f"{config}: no such file; give a Hugging Face model directory") from None
    except (OSError, ValueError, AttributeError, TypeError, RecursionError) as error:
        raise FormatError(f"{config}: not a config of a model: {error}") from error
    return ("--dtype", str(dtype)) if dtype else ()
