"""Run the modules of Megatron's own converter, unmodified, as loaders and savers.

Such a module is ``loader_X.py`` (or ``saver_X.py``, or plain ``X.py``) on the Python path, with

    add_arguments(parser)          its options, for argparse
    load_checkpoint(queue, args)   puts a metadata namespace, dictionaries of tensors, "done"
    save_checkpoint(queue, args)   gets the same, in the same order

The modules expect one queue with tensors on it; they are given an object that looks like one. A
loader's tensors go to the spool as they come. A saver's are read one message at a time, and what it
writes goes to the staging directory. ``args`` holds what Megatron's converter gives: its own
options, and those of both plugins.

Source of the contract: NVIDIA/Megatron-LM:tools/checkpoint/convert.py@core_v0.12.3.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, NoReturn

from ckptx.errors import ConversionError, PlanError, PluginError
from ckptx.protocol.context import UNTOLD, Context, Options
from ckptx.registry import registry
from ckptx.registry.registry import Role
from ckptx.storage.location import Location

if TYPE_CHECKING:
    import click

    from ckptx.conversion.proof import Proof
    from ckptx.conversion.request import ConversionRequest
    from ckptx.protocol.contracts import SavePlan
    from ckptx.protocol.messages import Messages

_FUNCTIONS = {"loader": "load_checkpoint", "saver": "save_checkpoint"}


def install() -> None:
    """Let the registry find Megatron-style modules where no plugin has the name."""
    if module_named not in registry.fallbacks:
        registry.fallbacks.append(module_named)


def is_module(role: Role, name: str, megatron_path: str | None) -> bool:
    """Return whether a Megatron-style module, and no plugin, plays ``role`` under ``name``."""
    plugins = registry.names(role)
    if name in plugins or registry.canonical(name) in plugins:
        return False
    return _module_name(role, name, megatron_path) is not None


def module_named(role: Role, name: str, megatron_path: str | None) -> Module | None:
    """Return the Megatron-style module that plays ``role`` under ``name``, None if there is none.

    Raises:
        PluginError: it cannot be imported, or lacks the two functions.
    """
    found = _module_name(role, name, megatron_path)
    if found is None:
        return None
    return (ModuleLoader if role == "loader" else ModuleSaver)(name, found, megatron_path)


def _module_name(role: Role, name: str, megatron_path: str | None) -> str | None:
    """Return the module of a name, which is not imported.

    ``megatron_path`` is a Megatron-LM checkout, searched as well, with its ``tools/checkpoint``.
    """
    # A module called just ``name`` counts, too, unless that is a format of which we know.
    plain = [] if registry.canonical(name) in registry.RECOGNISED else [name]
    with _megatron(megatron_path):
        for module in (f"{role}_{name}", *plain):
            # A package is no plugin of Megatron's converter, and "json" is not one either.
            if module.isidentifier() and module not in sys.stdlib_module_names:
                spec = importlib.util.find_spec(module)
                if spec is not None and spec.origin and spec.submodule_search_locations is None:
                    return module
    return None


def _has_torch() -> bool:
    try:
        return importlib.util.find_spec("torch") is not None
    except ValueError:  # a name that stands for nothing
        return False


class Module:
    """A module of Megatron's converter."""

    role: Role

    def __init__(self, name: str, module: str, megatron_path: str | None) -> None:
        self.name = name
        self.megatron_path = megatron_path
        self.capabilities: Mapping[str, Any] = {"module": module, "style": "megatron"}
        if not _has_torch():
            raise PluginError(
                f"{self.role} {name!r} is a module of Megatron's converter, which passes "
                "tensors of torch; it is not installed: pip install 'ckptx[run]'"
            )
        with _foreign(f"{self.role} module {module}", megatron_path):
            self.module: ModuleType = importlib.import_module(module)
        for function in ("add_arguments", _FUNCTIONS[self.role]):
            if not callable(getattr(self.module, function, None)):
                raise PluginError(
                    f"{self.role} {name!r}: module {module} ({self.module.__file__}) has no "
                    f"function {function}(), so it is no {self.role}"
                )

    def options(self) -> list[click.Option]:
        """Return no options: the module's own are argparse's, see `parse`."""
        return []

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Let the module declare its options."""
        with _foreign(f"{self.role} module {self.module.__name__}", self.megatron_path):
            self.module.add_arguments(parser)

    def run(self, queue: object, args: argparse.Namespace) -> None:
        """Run the module's main function; its path, but no change of ``sys.argv``, stays."""
        with _foreign(
            f"{self.role} module {self.module.__name__}", self.megatron_path, plugin_errors=False
        ):
            getattr(self.module, _FUNCTIONS[self.role])(queue, args)


class ModuleLoader(Module):
    """A Megatron-style module as a loader."""

    role = "loader"

    def detect(self, source: Location) -> bool:
        """Return False: such a module is only used when it is named."""
        return False

    def load(self, source: Location, options: Options, context: Context = UNTOLD) -> Messages:
        """Run the module to its end, its tensors going to the spool; then yield the messages."""
        from ckptx.conversion.megatron_queue import ReceiveQueue

        assert context.spool is not None  # every conversion has one
        queue = ReceiveQueue(self.name, context.spool, context.checking)
        self.run(queue, namespace(options, load_dir=str(source)))
        yield from queue.messages(str(source))


class ModuleSaver(Module):
    """A Megatron-style module as a saver, which writes files itself."""

    role = "saver"

    def plan(self, messages: Messages, options: Options, context: Context = UNTOLD) -> SavePlan:
        """Refuse: nothing is known before the module has run."""
        raise PlanError(f"saver {self.name!r} is a Megatron-style module, which cannot be planned")

    def outline(self, job: ConversionRequest) -> SavePlan:
        """Return a plan of the right size: about that of the source."""
        from ckptx.protocol.contracts import SavePlan
        from ckptx.storage.file_plan import FilePlan

        paths = [job.source] if job.source.is_file() else job.source.rglob("*")
        size = sum(path.stat().st_size for path in paths if path.is_file())
        return SavePlan([FilePlan("(written by the module)", size, ())])

    def write_directly(
        self,
        messages: Messages,
        job: ConversionRequest,
        staging: Path,
        advance: Callable[[int], None],
    ) -> Proof:
        """Run the module on the messages; what it writes lands in ``staging``."""
        from ckptx.conversion.megatron_queue import SendQueue

        queue = SendQueue(self.name, messages, job.model_type, advance)
        self.run(queue, namespace(job.saver_options, save_dir=str(staging)))
        return queue.proof(staging)


def namespace(options: Options, **more: Any) -> argparse.Namespace:
    """Return the ``args`` of a Megatron-style module, from a plugin's options."""
    values = dict(options.get("arguments") or {})
    values.update({key: value for key, value in more.items() if value is not None})
    return argparse.Namespace(
        **{key: str(v) if isinstance(v, Path) else v for key, v in values.items()}
    )


def parse(
    modules: Sequence[Module], arguments: Sequence[str], ours: frozenset[str]
) -> tuple[dict[str, Any], list[str]]:
    """Return the values of the modules' own options, and the arguments that remain.

    As in Megatron's converter, a loader and a saver may declare the same option. An option that is
    in ``ours`` too is taken by both sides.

    Raises:
        click.UsageError: the modules' options are wrong or missing.
    """
    parser, leaver = (_parser(modules) for _ in range(2))
    values = vars(parser.parse_known_args(arguments)[0])
    for action in leaver._actions:
        action.required = False
    for option in ours & leaver._option_string_actions.keys():
        del leaver._option_string_actions[option]  # argparse has no public way to forget one
    return values, leaver.parse_known_args(arguments)[1]


def option_help(modules: Sequence[Module]) -> str:
    """Return argparse's description of the modules' options."""
    text = _parser(modules).format_help()
    return text.partition("\n\n")[2].rstrip()  # without the usage line


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        import click

        raise click.UsageError(message)


def _parser(modules: Sequence[Module]) -> argparse.ArgumentParser:
    # Two unmodified modules declare --megatron-path, --true-vocab-size and others, each for itself.
    parser = _Parser(prog="ckptx", allow_abbrev=False, conflict_handler="resolve", add_help=False)
    for module in modules:
        module.add_arguments(parser)
    return parser


@contextlib.contextmanager
def _megatron(path: str | None) -> Iterator[None]:
    before = list(sys.path)
    if path:
        sys.path[:0] = [path, str(Path(path, "tools", "checkpoint"))]
        importlib.invalidate_caches()
    try:
        yield
    finally:
        sys.path[:] = before


@contextlib.contextmanager
def _foreign(who: str, megatron_path: str | None, *, plugin_errors: bool = True) -> Iterator[None]:
    """Shield ckptx from code that prints, exits, and rewrites ``sys.argv``."""
    kind = PluginError if plugin_errors else ConversionError
    before = list(sys.argv)
    try:
        with _megatron(megatron_path), contextlib.redirect_stdout(sys.stderr):
            yield
    except SystemExit as error:
        raise kind(f"{who} called exit({'' if error.code is None else error.code!r})") from error
    except (PluginError, ConversionError):
        raise
    except Exception as error:
        raise kind(f"{who} failed: {type(error).__name__}: {error}") from error
    finally:
        sys.argv[:] = before
