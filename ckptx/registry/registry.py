"""Find plugins by name; import only those that are asked for.

A format that is declared (`ckptx.registry.entries`) is listed and detected without its loader. A
``loader_X`` or ``saver_X`` that nobody declares is imported to be asked, after the declared ones.
"""

from __future__ import annotations

import fnmatch
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

from ckptx.errors import FormatError, PluginError, listing
from ckptx.registry.detection import remembering
from ckptx.registry.entries import PIN as PIN
from ckptx.registry.entries import Entry as Entry
from ckptx.registry.entries import Kind as Kind
from ckptx.registry.entries import Role as Role
from ckptx.registry.entries import blamed
from ckptx.registry.entries import entries as entries

if TYPE_CHECKING:
    from ckptx.model.family import Family
    from ckptx.protocol.contracts import Loader, Saver, SideFile
    from ckptx.storage.location import Location
    from ckptx.tensors.lazy import LazyTensor

RECOGNISED = {
    "fsdp_dtensor": "Megatron FSDP checkpoints",
    "nemo": "NeMo 1 archives",
    "gguf": "GGUF files",
}
"""Formats that ckptx knows of and has no plugin for yet."""

fallbacks: list[Callable[[Role, str, str | None], Any]] = []
"""Asked in order for a loader or a saver (role, name, Megatron's path) that no plugin declares."""
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Status:
    """A plugin after an attempt to import it."""

    entry: Entry
    capabilities: Mapping[str, Any]
    error: str = ""


def names(kind: Kind) -> list[str]:
    """Return the names of all plugins of a kind."""
    return [entry.name for entry in entries().values() if entry.kind == kind]


def canonical(name: str) -> str:
    """Return the first name behind an alias; other names come back as they are."""
    return _behind(name)[0]


def _behind(alias: str) -> tuple[str, ...]:
    """Return the formats that a name stands for, by name: itself, where it is no alias.

    Case does not matter, nor does ``-`` for ``_``.
    """
    meant = _plain(alias)
    found = dict.fromkeys(
        entry.name
        for entry in entries().values()
        if entry.declared is not None
        and meant in map(_plain, (entry.name, *entry.declared.aliases))
    )
    return tuple(found) or (alias,)


def _plain(name: str) -> str:
    return name.lower().replace("-", "_")


def loader(name: str, megatron_path: str | None = None, source: Location | None = None) -> Loader:
    """Return the loader called ``name``, or the Megatron-style module ``loader_<name>``.

    Of several formats that ``name`` is an alias of, ``source`` says which is meant; without it the
    first is.

    Raises:
        PluginError: there is none, several distributions declare it, or it fails to import.
        FormatError: ``source`` is of none of the formats, or of several.
    """
    behind = [one for one in _behind(name) if f"loader_{one}" in entries()]
    if len(behind) > 1 and source is not None:
        found = [one for one in _recognising(source) if one in behind]
        if len(found) != 1:
            are = f"is {' and '.join(found)}" if found else f"is neither {' nor '.join(behind)}"
            raise FormatError(f"{source}: {are}, what {name!r} stands for; name the loader")
        name = found[0]
    plugin: Loader = _plugin("loader", name, megatron_path)
    return plugin


def capabilities(kind: Role, plugin: Loader | Saver) -> Mapping[str, Any]:
    """Return what a plugin says that it can do, in its declaration or its class."""
    own: Mapping[str, Any] | None = getattr(plugin, "capabilities", None)
    entry = entries().get(f"{kind}_{plugin.name}")
    if own is None and entry is not None and entry.declared is not None:
        return entry.declared.capabilities(kind)
    return own or {}


def saver(name: str, megatron_path: str | None = None) -> Saver:
    """Return the saver called ``name``, or the Megatron-style module ``saver_<name>``.

    Raises:
        PluginError: there is none, several distributions declare it, or it fails to import.
    """
    found: Saver = _plugin("saver", name, megatron_path)
    return found


@cache
def families() -> Mapping[str, Family]:
    """Return the families of all schema plugins by name; a broken schema is only warned about.

    Raises:
        PluginError: two plugins declare one family or one entry name.
    """
    return {name: family for name, (family, _) in _owned_families().items()}


def family_owner(name: str) -> Entry:
    """Return the plugin that registers a family."""
    return _owned_families()[name][1]


@cache
def _owned_families() -> Mapping[str, tuple[Family, Entry]]:
    found: dict[str, tuple[Family, Entry]] = {}
    for entry in entries().values():
        if entry.kind != "schema":
            continue
        entry.refuse_rivals()
        try:
            registered = _registered(entry)
        except PluginError as error:
            _log.warning("%s", error)
            continue
        for family in registered:
            if family.name in found:
                owner = found[family.name][1]
                raise PluginError(
                    f"family {family.name!r} is registered by {owner.entry_name} of "
                    f"{owner.distribution} and by {entry.entry_name} of {entry.distribution}"
                )
            found[family.name] = (family, entry)
    return found


def side_files(
    config: Mapping[str, Any], names: Sequence[str], iteration: int | str
) -> list[SideFile]:
    """Return the files that schema plugins want beside the weights of a model.

    Raises:
        PluginError: a plugin fails.
    """
    found: list[SideFile] = []
    for entry, hooks in _schemas():
        with blamed(entry):
            for files in hooks.side_files(config=config, names=names, iteration=iteration):
                found += files
    return found


def in_files(
    tensors: Mapping[str, LazyTensor], config: Mapping[str, Any]
) -> Mapping[str, LazyTensor]:
    """Return the tensors of a model under the names that its files have.

    Raises:
        PluginError: a plugin fails.
        SchemaError: two tensors have one name then.
    """
    for entry, hooks in _schemas():
        with blamed(entry):
            tensors = next(iter(hooks.in_files(tensors=tensors, config=config)), tensors)
    return tensors


def _schemas() -> Iterator[tuple[Entry, Any]]:
    """Yield the schema plugins that can be used, with their hooks."""
    families()  # warns about plugins that cannot be used
    for entry in entries().values():
        if entry.kind == "schema":
            with suppress(PluginError):
                yield entry, _hooks(entry)


def detect(source: Location) -> str:
    """Return the name of the one loader that recognises ``source``.

    Raises:
        PluginError: ``source`` is missing, or not exactly one loader recognises it.
    """
    from ckptx.registry import explain

    if not source.exists():
        raise PluginError(f"{source}: {explain.why_absent(source)}")
    # A file of torch.save may be a part of something that is not whole by itself.
    if source.is_file() and (reason := explain.foreign(source)):
        raise PluginError(f"{source}: not a checkpoint that any loader recognises: {reason}")
    matches = _recognising(source)
    if len(matches) == 1:
        return matches[0]
    if matches:
        raise PluginError(
            f"{source}: looks like {' and '.join(matches)}; say which with "
            f"{' or '.join(f'--from {name}' for name in matches)} (with convert.py: --loader)"
        )
    known = f"; known loaders: {', '.join(names('loader')) or 'none'}"
    try:
        why = explain.why_unrecognised(source, lambda path: bool(_recognising(path)))
    except OSError as error:
        why = f"it cannot be read: {error.strerror}"
    raise PluginError(
        f"{source}: not a checkpoint that any loader recognises{f': {why}' if why else known}"
    )


@remembering()
def _recognising(source: Location) -> list[str]:
    """Return the loaders that recognise ``source``; a plugin that is broken is logged.

    Those are asked whose declared files are there; then those that nobody declares.
    """
    found = []
    loaders = [entry for entry in entries().values() if entry.kind == "loader"]
    try:
        held = [path.name for path in source.iterdir()] if source.is_dir() else [source.name]
        for entry in sorted(loaders, key=lambda entry: entry.declared is None):
            if entry.declared is not None and not _holds(source, held, entry.declared.files):
                continue
            try:
                if loader(entry.name).detect(source):
                    found.append(entry.name)
            except PluginError as error:
                _log.warning("%s", error)
    except OSError as error:
        raise PluginError(f"{source}: cannot be read: {error.strerror}") from error
    declared = (entry.declared for entry in loaders if entry.name in found)
    below = {name for one in declared if one is not None for name in one.above}
    return [name for name in found if name not in below]


def _holds(source: Location, names: Sequence[str], patterns: Sequence[str]) -> bool:
    """Return whether a pattern is that of a name, or of a file in a folder of ``source``."""
    return any(
        next(source.glob(pattern), None) if "/" in pattern else fnmatch.filter(names, pattern)
        for pattern in patterns
    )


def statuses() -> Iterator[Status]:
    """Yield how each plugin is; one that nobody declares is imported. No error breaks another."""
    for entry in entries().values():
        try:
            entry.refuse_rivals()
            if entry.kind == "schema":
                registered = _registered(entry)
                yield Status(entry, {"families": sorted(family.name for family in registered)})
            elif entry.kind == "formats":
                yield Status(entry, {}, entry.error)
            elif entry.declared is not None:
                _check_place(entry)
                yield Status(entry, entry.declared.capabilities(entry.kind))
            else:
                plugin = _named(entry, _registered(entry))
                yield Status(entry, dict(capabilities(entry.kind, plugin)))
        except PluginError as error:
            yield Status(entry, {}, str(error))


def _check_place(entry: Entry) -> None:
    """Raise where there is no module of the name that a declaration gives."""
    from importlib.util import find_spec

    with blamed(entry):
        if find_spec(entry.point.module) is None:
            raise ModuleNotFoundError(f"no module named {entry.point.module!r}")


def versions(*chosen: tuple[Kind, str]) -> dict[str, str]:
    """Return the versions of the distributions behind the chosen plugins, for the manifest."""
    found = {}
    for kind, name in chosen:
        if (entry := entries().get(f"{kind}_{canonical(name)}")) is not None:
            found[entry.distribution] = entry.version
    return found


def _plugin(kind: Role, name: str, megatron_path: str | None) -> Any:
    for known in (name, *_behind(name)):
        if (entry := entries().get(f"{kind}_{known}")) is not None:
            entry.refuse_rivals()
            return _named(entry, _registered(entry))
    for fallback in fallbacks:
        if (plugin := fallback(kind, name, megatron_path)) is not None:
            return plugin
    known = ", ".join(names(kind)) or "none"
    if (what := RECOGNISED.get(canonical(name))) is not None:
        raise PluginError(
            f"{kind} {name!r}: ckptx knows of this format ({what}), but has no {kind} for it yet; "
            f"known {kind}s: {known}"
        )
    other: Role = "saver" if kind == "loader" else "loader"
    if canonical(name) in names(other):
        does = "reads" if other == "loader" else "writes"
        raise PluginError(
            f"{kind} {name!r}: ckptx {does} this format, and has no {kind} for it; known {kind}s: "
            f"{known}"
        )
    raise PluginError(f"unknown {kind} {name!r}{_meant(kind, name)}; known {kind}s: {known}")


def _meant(kind: Kind, name: str) -> str:
    from difflib import get_close_matches

    close = get_close_matches(canonical(name), names(kind), 1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def _named(entry: Entry, registered: list[Any]) -> Any:
    for plugin in registered:
        if plugin.name == entry.name:
            return plugin
    raise PluginError(
        f"{entry.entry_name} of {entry.distribution}: {entry.point.value} registers "
        f"{listing(plugin.name for plugin in registered) or 'nothing'}, expected {entry.name!r}"
    )


@cache
def _registered(entry: Entry) -> list[Any]:
    """Import a plugin and return what it registers for its kind, or the one that it declares."""
    found: list[Any] = []
    hook = {"loader": "register_loaders", "saver": "register_savers", "schema": "register_families"}
    with blamed(entry):
        if entry.declared is not None:
            return [entry.point.load()()]
        getattr(_hooks(entry), hook[entry.kind])(register=found.append)
    return found


@cache
def _hooks(entry: Entry) -> Any:
    """Import a plugin and return pluggy's relay of its hooks."""
    import pluggy

    from ckptx.protocol import hookspecs

    manager = pluggy.PluginManager(hookspecs.PROJECT)
    manager.add_hookspecs(hookspecs)
    with blamed(entry):
        manager.register(_module(entry.point.load()), entry.entry_name)
        manager.check_pending()
    return manager.hook


def _module(loaded: Any) -> Any:
    """Return what has hooks: an entry point may also name one `Family` by itself."""
    from types import SimpleNamespace

    from ckptx.model.family import Family
    from ckptx.protocol.hookspecs import hookimpl

    if not isinstance(loaded, Family):
        return loaded

    @hookimpl
    def register_families(register: Callable[[Family], None]) -> None:
        register(loaded)

    return SimpleNamespace(register_families=register_families)
