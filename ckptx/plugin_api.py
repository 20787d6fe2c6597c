"""Everything that an author of a plugin needs: ``from ckptx.plugin_api import ...``.

A name is imported from where it lives when it is first asked for, so that a module that declares
formats and no more imports nothing but `Format`.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ckptx.containers.zip_archive import ArchiveWriter as ArchiveWriter
    from ckptx.containers.zip_archive import NewMember as NewMember
    from ckptx.containers.zip_archive import read_members as read_members
    from ckptx.conversion.options import option as option
    from ckptx.conversion.options import switch as switch
    from ckptx.errors import CkptxError as CkptxError
    from ckptx.errors import FormatError as FormatError
    from ckptx.errors import PlanError as PlanError
    from ckptx.errors import PluginError as PluginError
    from ckptx.errors import SchemaError as SchemaError
    from ckptx.errors import listing as listing
    from ckptx.hf_models.directory import base_sidecars as base_sidecars
    from ckptx.hf_models.directory import hf_messages as hf_messages
    from ckptx.hf_models.directory import sidecars as sidecars
    from ckptx.hf_models.weights import fill_from_base as fill_from_base
    from ckptx.model.family import Family as Family
    from ckptx.model.layout import Layout as Layout
    from ckptx.model.spec import ModelSpec as ModelSpec
    from ckptx.protocol.context import ADAPTERS as ADAPTERS
    from ckptx.protocol.context import UNTOLD as UNTOLD
    from ckptx.protocol.context import Context as Context
    from ckptx.protocol.context import Options as Options
    from ckptx.protocol.contracts import Loader as Loader
    from ckptx.protocol.contracts import SavePlan as SavePlan
    from ckptx.protocol.contracts import Saver as Saver
    from ckptx.protocol.declarations import Format as Format
    from ckptx.protocol.from_names import inventory as inventory
    from ckptx.protocol.from_names import main_dtype as main_dtype
    from ckptx.protocol.from_names import named_messages as named_messages
    from ckptx.protocol.from_names import passthrough as passthrough
    from ckptx.protocol.hookspecs import hookimpl as hookimpl
    from ckptx.protocol.messages import TRAINING_STATE as TRAINING_STATE
    from ckptx.protocol.messages import Begin as Begin
    from ckptx.protocol.messages import Dropped as Dropped
    from ckptx.protocol.messages import End as End
    from ckptx.protocol.messages import Message as Message
    from ckptx.protocol.messages import Messages as Messages
    from ckptx.protocol.messages import SourceTensor as SourceTensor
    from ckptx.protocol.messages import Tensors as Tensors
    from ckptx.protocol.model import Model as Model
    from ckptx.protocol.model import collect as collect
    from ckptx.protocol.model import named_tensors as named_tensors
    from ckptx.protocol.sidecars import dump_config as dump_config
    from ckptx.protocol.sidecars import read_config as read_config
    from ckptx.registry.families import config_of as config_of
    from ckptx.registry.families import family_named as family_named
    from ckptx.registry.families import family_of as family_of
    from ckptx.registry.families import hf_tensors as hf_tensors
    from ckptx.registry.families import parts_from_config as parts_from_config
    from ckptx.storage.file_plan import FilePlan as FilePlan
    from ckptx.storage.file_plan import Region as Region
    from ckptx.storage.file_plan import literal_files as literal_files
    from ckptx.storage.location import Location as Location
    from ckptx.storage.source_file import SourceFile as SourceFile
    from ckptx.storage.source_file import read_json as read_json
    from ckptx.tensors.dtypes import ITEMSIZE as ITEMSIZE
    from ckptx.tensors.joins import concat as concat
    from ckptx.tensors.lazy import LazyTensor as LazyTensor
    from ckptx.tensors.lazy import Stored as Stored
    from ckptx.tensors.lazy import stored as stored

_HOMES = {
    "errors": "CkptxError FormatError PlanError PluginError SchemaError listing",
    "protocol.declarations": "Format",
    "protocol.hookspecs": "hookimpl",
    "protocol.contracts": "Loader SavePlan Saver",
    "protocol.context": "ADAPTERS UNTOLD Context Options",
    "protocol.messages": "TRAINING_STATE Begin Dropped End Message Messages SourceTensor Tensors",
    "protocol.model": "Model collect named_tensors",
    "protocol.from_names": "inventory main_dtype named_messages passthrough",
    "protocol.sidecars": "dump_config read_config",
    "registry.families": "config_of family_named family_of hf_tensors parts_from_config",
    "hf_models.directory": "base_sidecars hf_messages sidecars",
    "hf_models.weights": "fill_from_base",
    "model.family": "Family",
    "model.layout": "Layout",
    "model.spec": "ModelSpec",
    "storage.location": "Location",
    "storage.file_plan": "FilePlan Region literal_files",
    "storage.source_file": "SourceFile read_json",
    "conversion.options": "option switch",
    "containers.zip_archive": "ArchiveWriter NewMember read_members",
    "tensors.dtypes": "ITEMSIZE",
    "tensors.joins": "concat",
    "tensors.lazy": "LazyTensor Stored stored",
}
"""Names by the module below ``ckptx`` where they live."""

__all__ = [name for names in _HOMES.values() for name in names.split()]


def __getattr__(name: str) -> object:
    for home, names in _HOMES.items():
        if name in names.split():
            found: object = getattr(import_module(f"ckptx.{home}"), name)
            globals()[name] = found
            return found
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
