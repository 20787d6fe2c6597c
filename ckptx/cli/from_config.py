"""``from-config``: convert as a configuration file of RLinf's converter says.

    convertor:
      ckpt_path: .../actor/model_state_dict/full_weights.pt
      save_path: /models/out
      merge_lora_weighs: true         # RLinf's spelling
      torch_dtype: bf16
    model:
      model_path: /models/base
      is_lora: true
      lora_rank: 32                   # and lora_alpha, unless lora_path names an adapter

The command line that means the same is printed first. RLinf builds the model that ``model``
describes and loads the weights into it; ckptx builds none, so most of ``model`` is not needed, and
is named.

Source: RLinf/RLinf rlinf/utils/ckpt_convertor/fsdp_convertor/{convert_pt_to_hf,utils}.py and its
config/*.yaml @ a3816b5; of the adapters, rlinf/models/__init__.py get_model @ 00db686.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from ckptx.cli import equivalent
from ckptx.errors import FormatError, listing
from ckptx.hf_models.lora.config import ADAPTER_CONFIG
from ckptx.storage.source_file import read_json, read_small
from ckptx.storage.yaml_text import yaml_value
from ckptx.tensors.dtypes import SPELLINGS

_MERGE = ("merge_lora_weighs", "merge_lora_weights")
"""RLinf's spelling, and what a user would take for it."""
_CONVERTOR = {
    *_MERGE,
    *("ckpt_path", "save_path", "torch_dtype"),
    *("strict_load", "train_config_path", "auto_find_train_config", "model_overrides"),
}
_MODEL, _ADAPTER = {"model_path", "is_lora"}, {"lora_rank", "lora_path"}
_ADAPTER_FOLDER = "lora_adapter"
"""Where RLinf puts an adapter that is not merged, below ``save_path``."""
_SETTING = re.compile(r"((?:convertor|model|actor)\.[\w.]+)=(.*)", re.DOTALL)
_TRAINING = ("config.yaml", "tensorboard/config.yaml")
_PARENTS = 10
_LARGEST = 4 << 20  # bytes


def from_config_command() -> click.Command:
    """Return the command that reads RLinf's configuration."""

    def run(file: Path, arguments: tuple[str, ...], print_only: bool) -> None:
        further = [arg for arg in arguments if not _SETTING.fullmatch(arg)]
        line, remarks = command_line(file, [arg for arg in arguments if arg not in further])
        line += further
        quiet = bool({"--quiet", "-q"} & {*further})
        equivalent.remark(() if quiet else remarks)
        if print_only or not (quiet or "--json" in further):
            equivalent.show(line)
        if not print_only:
            equivalent.run(line)

    return click.Command(
        "from-config",
        callback=run,
        params=[
            click.Argument(["file"], type=click.Path(exists=True, dir_okay=False, path_type=Path)),
            click.Argument(["arguments"], nargs=-1, type=click.UNPROCESSED),
            equivalent.PRINT_ONLY,
        ],
        context_settings={"ignore_unknown_options": True},
        help="Convert as a configuration file of RLinf's converter says. ARGUMENTS are settings as "
        "convertor.torch_dtype=bf16, which go before the file's, and options of 'ckptx convert'.",
        short_help="Convert as a configuration file of RLinf says.",
    )


def command_line(file: Path, settings: Sequence[str] = ()) -> tuple[list[str], list[str]]:
    """Return the arguments of ``ckptx`` that mean what a file and settings say, and remarks.

    Raises:
        FormatError: the file is no such configuration, lacks a path, or asks for something that
            ckptx does not do.
    """
    config = _loaded(file)
    for setting in settings:
        _set(config, setting)
    convertor = _section(config, "convertor", file)
    if unknown := sorted(set(map(str, convertor)) - _CONVERTOR):
        raise FormatError(
            f"{file}: convertor.{unknown[0]} is no setting of RLinf's converter; known: "
            f"{', '.join(sorted(_CONVERTOR))}"
        )
    source = _path(convertor, "ckpt_path", file)
    target = _path(convertor, "save_path", file)
    model, origin = _model(config, convertor, source, file)
    saver, lora = _adapters(convertor, model, origin)
    if saver == "peft":
        target = str(Path(target) / _ADAPTER_FOLDER)
    line = ["convert", source, target, "--to", saver]
    if model.get("model_path"):
        line += ["--hf-base", _text(model["model_path"], "model.model_path", origin)]
    line += _dtype(convertor.get("torch_dtype"), file)
    line += lora
    remarks = [f"model was read from {origin}"] if origin != file else []
    remarks += _remarks(config, convertor, model)
    return line, remarks


def _loaded(file: Path) -> dict[str, Any]:
    if file.stat().st_size > _LARGEST:
        raise FormatError(f"{file}: is larger than {_LARGEST} bytes; no configuration")
    config = yaml_value(read_small(file, _LARGEST), f"{file}: not valid YAML")
    if not isinstance(config, dict):
        raise FormatError(f"{file}: expected a mapping with 'convertor'")
    return config


def _set(config: dict[str, Any], setting: str) -> None:
    """Put a setting given on the command line into the configuration."""
    name, _, value = setting.partition("=")
    *path, last = name.split(".")
    for key in path:
        inner = config.setdefault(key, {})
        if not isinstance(inner, dict):
            raise FormatError(f"{setting}: {key} is no section")
        config = inner
    config[last] = yaml_value(value, f"{setting}: the value is not valid YAML")


def _section(config: Mapping[str, Any], name: str, file: Path) -> dict[str, Any]:
    section = config.get(name)
    if not isinstance(section, dict):
        raise FormatError(f"{file}: expected a section '{name}', found {listing(map(str, config))}")
    return section


def _path(convertor: Mapping[str, Any], key: str, file: Path) -> str:
    if not convertor.get(key):
        raise FormatError(f"{file}: convertor.{key} is not set; give convertor.{key}=PATH")
    return _text(convertor[key], f"convertor.{key}", file)


def _text(value: Any, key: str, file: Path) -> str:
    if not isinstance(value, str) or "${" in value:
        raise FormatError(
            f"{file}: {key} is {value!r:.80}, expected a path without references; give {key}=PATH"
        )
    return value


def _model(
    config: Mapping[str, Any], convertor: Mapping[str, Any], source: str, file: Path
) -> tuple[dict[str, Any], Path]:
    """Return the section that describes the model, and the file that holds it, as RLinf finds it.

    A training configuration that is named comes first, then sections of the file itself, then a
    configuration near the checkpoint.
    """
    if named := convertor.get("train_config_path"):
        origin = Path(_text(named, "convertor.train_config_path", file))
        if not origin.is_file():
            raise FormatError(f"{file}: convertor.train_config_path {origin}: no such file")
    elif "actor" in config or "model" in config:
        outer = _section(config, "actor", file) if "actor" in config else config
        return _section(outer, "model", file), file
    else:
        found = _near(Path(source)) if convertor.get("auto_find_train_config", True) else None
        if found is None:
            return {}, file
        origin = found
    model = _section(_section(_loaded(origin), "actor", origin), "model", origin)
    overrides = convertor.get("model_overrides") or {}
    if not isinstance(overrides, dict):
        raise FormatError(f"{file}: convertor.model_overrides is no section")
    return {**model, **overrides}, origin


def _near(source: Path) -> Path | None:
    """Return the training configuration in a folder of the checkpoint or above it."""
    folders = list(source.absolute().parents)[:_PARENTS]
    for place in (folder / name for folder in folders for name in _TRAINING):
        actor = _loaded(place).get("actor") if place.is_file() else None
        if isinstance(actor, dict) and "model" in actor:
            return place
    return None


def _dtype(value: Any, file: Path) -> list[str]:
    if value is None or str(value).lower() in ("null", "none", ""):
        return []
    if str(value).lower() not in SPELLINGS:
        raise FormatError(
            f"{file}: convertor.torch_dtype is {value!r:.40}, expected one of "
            f"{', '.join(SPELLINGS)}"
        )
    return ["--dtype", str(value).lower()]


def _adapters(
    convertor: Mapping[str, Any], model: Mapping[str, Any], origin: Path
) -> tuple[str, list[str]]:
    """Return the saver, and the options for adapters in the checkpoint.

    RLinf makes its adapters with an alpha that equals their rank, or goes on training one.
    """
    flags = {f"convertor.{key}": convertor.get(key) for key in (*_MERGE, "strict_load")}
    flags["model.is_lora"] = model.get("is_lora")
    for key, value in flags.items():
        if value is not None and not isinstance(value, bool):
            raise FormatError(f"{origin}: {key} is {value!r:.40}, expected true or false")
    if not model.get("is_lora"):
        return "hf", []
    alpha, key = model.get("lora_rank"), "model.lora_rank"
    if model.get("lora_path") is not None:
        folder = Path(_text(model["lora_path"], "model.lora_path", origin))
        origin, key = folder / ADAPTER_CONFIG, "lora_alpha"
        alpha = read_json(origin, _LARGEST).get(key)
    if isinstance(alpha, bool) or not isinstance(alpha, int | float):
        raise FormatError(
            f"{origin}: model.is_lora is true and {key} is {alpha!r:.40}, expected a number; if "
            "the checkpoint holds no adapter, give model.is_lora=false"
        )
    merged = all(convertor.get(key, True) is not False for key in _MERGE)
    return "hf" if merged else "peft", ["--lora-alpha", str(alpha)]


def _remarks(
    config: Mapping[str, Any], convertor: Mapping[str, Any], model: Mapping[str, Any]
) -> Iterator[str]:
    unused = [str(key) for key in config if key not in ("convertor", "model", "actor")]
    used = _MODEL | _ADAPTER if model.get("is_lora") else _MODEL
    unused += [f"model.{key}" for key in model if key not in used]
    if unused:
        yield f"not needed, since no model is built: {', '.join(unused)}"
    if convertor.get("strict_load") is False:
        yield (
            "convertor.strict_load: tensors of an unknown model keep their names; of a known one "
            "none may be missing, --fill-from-base takes them from model.model_path"
        )
