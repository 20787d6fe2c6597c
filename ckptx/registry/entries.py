"""The declared plugins: the entry points of the group ``ckptx``, and what they lead to.

A ``formats_X`` leads to declarations (`ckptx.protocol.declarations`), which say what there is and
where. In a checkout the entry points of ckptx itself come from its ``pyproject.toml``, installed or
not, so that they are never those of another copy.

``CKPTX_PLUGINS`` pins the exact set: a comma-separated list of entry names (``loader_hf``,
``formats_megatron``) or distribution names (``ckptx-npz``); nothing else is visible. An empty value
leaves no plugin at all.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeAlias

from ckptx.errors import PluginError, listing
from ckptx.version import __version__

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

    from ckptx.protocol.declarations import Format

GROUP = "ckptx"
PIN = "CKPTX_PLUGINS"

Kind: TypeAlias = Literal["loader", "saver", "schema", "formats"]
Role: TypeAlias = Literal["loader", "saver"]
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Entry:
    """One declared plugin; nothing of it has been imported."""

    kind: Kind
    name: str
    distribution: str
    version: str
    point: EntryPoint = field(repr=False)
    rivals: tuple[str, ...] = ()
    """Other distributions that declare the same name."""
    declared: Format | None = field(default=None, repr=False, compare=False)
    """What the plugin's folder says of the format; its class is where ``point`` leads."""
    error: str = ""
    """Why the declarations cannot be read: ``kind`` is ``"formats"`` then."""

    @property
    def entry_name(self) -> str:
        """The name in the entry-point group: ``"loader_hf"``."""
        return f"{self.kind}_{self.name}"

    @property
    def own(self) -> bool:
        """Whether ckptx itself brings the plugin."""
        return _normal(self.distribution) == "ckptx"

    def refuse_rivals(self) -> None:
        """Raise a `PluginError` that names the distributions if several declare this name."""
        if self.rivals:
            raise PluginError(
                f"{self.entry_name} is declared by several distributions: {self.distribution} and "
                f"{', '.join(self.rivals)}; uninstall all but one, or set {PIN} to choose"
            )


@cache
def entries() -> Mapping[str, Entry]:
    """Return every visible plugin by its entry name, sorted; imports declarations alone."""
    pinned = _pinned()
    found: dict[str, list[Entry]] = {}
    visible: set[str] = set()
    for distribution, version, point in _entry_points():
        kind, _, name = point.name.partition("_")
        if kind not in ("loader", "saver", "schema", "formats") or not name:
            _log.warning(
                "%s: entry point %r ignored: not a formats_, loader_, saver_ or schema_ name",
                distribution,
                point.name,
            )
            continue
        whole = pinned is None or point.name in pinned or _normal(distribution) in pinned
        entry = Entry(kind, name, distribution, version, point)  # type: ignore[arg-type]  # checked above
        for one in _declared_by(entry) if kind == "formats" else (entry,):
            if whole or (pinned is not None and one.entry_name in pinned):
                found.setdefault(one.entry_name, []).append(one)
                visible |= {point.name, one.entry_name, _normal(distribution)}
    if missing := sorted((pinned or set()) - visible):
        raise PluginError(f"{PIN} names {listing(missing)}, which no distribution provides")
    return {name: _merged(found[name]) for name in sorted(found)}


def _declared_by(entry: Entry) -> Iterator[Entry]:
    """Yield the loaders and savers that an entry's declarations speak of, or what is wrong."""
    from importlib.metadata import EntryPoint

    from ckptx.protocol.declarations import Format

    try:
        with blamed(entry):
            formats = entry.point.load()
            if not all(isinstance(one, Format) for one in formats):
                raise TypeError(f"{entry.point.value} is not a tuple of Format")
    except PluginError as error:
        yield replace(entry, error=str(error))
        return
    for declared in formats:
        places: dict[Kind, str] = {"loader": declared.loader, "saver": declared.saver}
        for kind, place in places.items():
            if place:
                point = EntryPoint(f"{kind}_{declared.name}", place, GROUP)
                yield replace(entry, kind=kind, name=declared.name, point=point, declared=declared)


def _entry_points() -> Iterator[tuple[str, str, EntryPoint]]:
    from importlib.metadata import EntryPoint, entry_points

    checkout = Path(__file__).resolve().parents[2] / "pyproject.toml"
    own = _declared(checkout) if checkout.is_file() else {}
    if own:
        for name, value in own.items():
            yield "ckptx", __version__, EntryPoint(name, value, GROUP)
    for point in entry_points(group=GROUP):
        distribution = point.dist.name if point.dist else "an unnamed distribution"
        if own and _normal(distribution) == "ckptx":
            continue
        yield distribution, point.dist.version if point.dist else "", point


def _declared(pyproject: Path) -> dict[str, str]:
    import tomllib

    project = tomllib.loads(pyproject.read_text()).get("project", {})
    points = project.get("entry-points", {}).get(GROUP, {})
    return dict(points) if project.get("name") == "ckptx" else {}


def _pinned() -> set[str] | None:
    if (value := os.environ.get(PIN)) is None:
        return None
    items = {item.strip() for item in value.split(",") if item.strip()}
    return {i if re.match(r"(formats|loader|saver|schema)_", i) else _normal(i) for i in items}


def _normal(distribution: str) -> str:
    return re.sub(r"[-_.]+", "-", distribution).lower()  # the normalised form of PEP 503


def _merged(found: list[Entry]) -> Entry:
    """Return one entry of a name; a distribution's declaration stands for its older entry."""
    first, *others = sorted(found, key=lambda entry: entry.declared is None)
    rivals = (entry.distribution for entry in others if entry.distribution != first.distribution)
    return replace(first, rivals=tuple(rivals))


@contextmanager
def blamed(entry: Entry) -> Iterator[None]:
    """Report whatever a plugin raises as a fault of that plugin: it is foreign code."""
    try:
        yield
    except PluginError:
        raise
    except (Exception, SystemExit) as error:
        raise PluginError(
            f"{entry.entry_name} of {entry.distribution} {entry.version} cannot be used: "
            f"{type(error).__name__}: {error}"
        ) from error
