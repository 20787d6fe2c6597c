"""Hugging Face model directories: safetensors or ``pytorch_model*.bin``, sharded or not."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from ckptx.containers import dcp_safetensors, safetensors, torch_zip
from ckptx.conversion.options import option, switch
from ckptx.errors import PlanError, SchemaError
from ckptx.hf_models import float8
from ckptx.hf_models.directory import (
    base_sidecars,
    hf_messages,
    masters_beside,
    sidecars,
    training_state,
)
from ckptx.hf_models.extra_files import split_off
from ckptx.hf_models.lora.config import ADAPTER_CONFIG
from ckptx.hf_models.lora.extract import adapter_options
from ckptx.hf_models.weights import INDEXES, SINGLES, fill_from_base, read_weights
from ckptx.hf_models.wrappers import INSIDE, file_names, name_options
from ckptx.model.layout import in_module_order
from ckptx.protocol.context import UNTOLD, Context, Options
from ckptx.protocol.contracts import SavePlan
from ckptx.protocol.from_names import inventory, main_dtype
from ckptx.protocol.messages import Begin, Messages
from ckptx.protocol.model import Model, collect, fill_unused
from ckptx.protocol.sidecars import CONFIG, dump_config, read_config
from ckptx.registry.families import (
    TASK_HEAD_CLASSES,
    config_from_parts,
    family_named,
    family_of,
    hf_tensors,
)
from ckptx.schemas.conventions import transformers_memory
from ckptx.storage.file_plan import FilePlan, literal_files
from ckptx.storage.location import Location
from ckptx.tensors.dtypes import ITEMSIZE
from ckptx.tensors.lazy import LazyTensor
from ckptx.text.sizes import parse_size


class HfLoader:
    """Reads a model directory as transformers writes it, or one safetensors file."""

    name = "hf"

    def options(self) -> list[click.Option]:
        """Return ``--strip-prefix`` and the options for adapters; all else is in the directory."""
        return [*name_options(), *adapter_options()]

    def detect(self, source: Location) -> bool:
        """Return whether there are weights under Hugging Face's file names."""
        if source.is_file():
            return source.suffix == ".safetensors"
        if any((source / name).exists() for name in (*INDEXES, *SINGLES)):
            return True
        if (source / ADAPTER_CONFIG).exists():
            return False  # its weights are an adapter's
        if dcp_safetensors.shards(source):
            return False
        # Mistral's own file may lie beside a config, too; it has other names.
        others = [p for p in source.glob("*.safetensors") if not p.name.startswith("consolidated")]
        others += source.glob("*-of-*.bin")
        return (source / "config.json").exists() and bool(others)

    def load(self, source: Location, options: Options, context: Context = UNTOLD) -> Messages:
        """Yield the model; tensors of an unknown architecture pass through by name."""
        directory = source if source.is_dir() else source.parent
        weights = read_weights(source)
        stored = dict(weights.tensors)
        plain, remarks = file_names(stored, options, source, INSIDE)
        weights.tensors = dict(plain)
        filled = fill_from_base(weights, context)
        stored |= {name: one for name, one in weights.tensors.items() if name not in plain}
        begin = Begin(
            format="hf",
            files=tuple(map(str, weights.paths)),
            sources=inventory(stored),
            root=str(directory),
            sidecars={**sidecars(directory), **base_sidecars(context)},
        )
        yield from hf_messages(
            begin,
            weights.tensors,
            (*remarks, *filled, *(masters_beside(source) if source.is_dir() else ())),
            training_state(directory) if source.is_dir() else (),
            options,
            context,
            transformers_memory.renamer,
        )


class HfSaver:
    """Writes a model directory that transformers loads."""

    name = "hf"

    def options(self) -> list[click.Option]:
        """Return the options for the weight files."""
        size = (
            "Largest weight file, e.g. 5GB (10^9 bytes) or 5GiB (2^30); one tensor is never "
            "divided."
        )
        kind = "Kind of weight files; bin: pytorch_model.bin, or shards of it with an index."
        return [
            option("--max-shard-size", str, size, "5GB"),
            option("--weight-files", click.Choice(["safetensors", "bin"]), kind, "safetensors"),
            switch("--no-config", "Write weights that transformers cannot load, without a config."),
        ]

    def plan(self, messages: Messages, options: Options, context: Context = UNTOLD) -> SavePlan:
        """Return the plan of a model directory."""
        model = collect(messages)
        known = model.passthrough is None and bool(model.begin.parts)
        filled: tuple[str, ...] = fill_unused(model, family_named(model.family)) if known else ()
        tensors, dropped = hf_tensors(model)
        apart: list[FilePlan] = []
        if model.passthrough is None:
            # It decides where a shard ends.
            tensors = {name: tensors[name] for name in in_module_order(tensors)}
        else:
            config = read_config(model.begin.sidecars, model.begin.root) or {}
            iteration = model.begin.training.get("iteration", "release")
            tensors, apart, filled = split_off(config, tensors, iteration)
        files, notes = _sidecars(model, context.dtype or main_dtype(tensors))
        if not options.get("no_config"):
            _check_loadable(files, model.begin.root)
        plans = [*literal_files(files), *apart, *weight_files(tensors, options)]
        hint = _load_hint(model, read_config(files, model.begin.root) or {})
        if CONFIG not in files:
            read = {".safetensors": "safetensors.torch.load_file", ".bin": "torch.load"}
            first = next(plan.path for plan in plans if plan.path.endswith(tuple(read)))
            hint = f'{read[Path(first).suffix]}("{{target}}/{first}")'
            notes = (*notes, f"no {CONFIG}: transformers cannot load it")
        return SavePlan(
            plans,
            dropped=dropped,
            notes=(*filled, *notes),
            load_hint=hint,
            details={"tensors": len(tensors), "dtype": main_dtype(tensors)},
        )


def _load_hint(model: Model, config: Mapping[str, Any]) -> str:
    """Return the code that loads a model as its class, not as another one without its head."""
    named = config.get("architectures")
    first = str(named[0]) if isinstance(named, list) and named else ""
    own = config.get("auto_map")
    for auto, home in own.items() if isinstance(own, dict) else ():
        if auto.startswith("AutoModel") and first and str(home).endswith(f".{first}"):
            return f'transformers.{auto}.from_pretrained("{{target}}", trust_remote_code=True)'
    kind = first
    if "vision" in model.begin.parts:
        kind = "AutoModelForImageTextToText"
    elif not first.isidentifier() or first.endswith(("ForCausalLM", "LMHeadModel")):
        kind = "AutoModelForCausalLM"
    elif head := next((one for one in TASK_HEAD_CLASSES if first.endswith(one)), None):
        kind = f"AutoModel{head}"
    return f'transformers.{kind}.from_pretrained("{{target}}")'


def _shard_size(text: str) -> int:
    """Return the largest size of a weight file, in bytes."""
    try:
        size = parse_size(text)
    except ValueError as error:
        raise PlanError(f"--max-shard-size: {error}") from error
    if not size:
        raise PlanError(f"--max-shard-size {text}: a file of no bytes holds nothing")
    return size


def _sidecars(model: Model, dtype: str) -> tuple[dict[str, bytes], tuple[str, ...]]:
    """Return the files beside the weights; the source's dimensions win over a config's."""
    begin, files = model.begin, dict(model.begin.sidecars)
    config = read_config(files, begin.root)
    notes: list[str] = []
    if model.passthrough is not None:
        # Codes of quantised weights are of no dtype that a model computes in.
        if config is not None and float8.KEY not in config and _set_dtype(config, dtype):
            files[CONFIG] = dump_config(config)
        return files, ()
    spec = replace(model.spec, dtype=dtype)
    family = family_named(model.family)
    composed = family.composition
    if config is None:
        if spec.vocab_size is None:
            rows = model.messages["embeddings"]["word embeddings"].shape[0]
            spec = replace(spec, vocab_size=rows)
            notes.append(
                f"the true vocabulary is unknown, so all {rows} rows are kept, padding included; "
                "--true-vocab-size cuts it"
            )
        parts = {part: replace(one, dtype=dtype) for part, one in model.parts.items()}
        made = config_from_parts(family, {**parts, "language": spec})
        files[CONFIG] = dump_config(made)
        if composed is not None and "image_token_index" not in made:
            notes.append(
                f"nothing says which token stands for an image: set image_token_index in {CONFIG}"
            )
        tokenizer = ", ".join(name for name in sorted(files) if name.startswith("tokenizer"))
        came = f"of the tokenizer came {tokenizer}" if tokenizer else "there is no tokenizer"
        notes.append(f"{CONFIG} was made from the checkpoint's own arguments; {came}")
        return files, tuple(notes)
    other = family_of(config)
    if other is not family:
        raise SchemaError(
            f"{CONFIG} is of {', '.join(config.get('architectures') or ['no architecture'])}, the "
            f"weights are of family {family.name}; give the --hf-base of this model"
        )
    # The dtype of the config is made to fit what is written; it contradicts nothing.
    named = config.get("dtype") or config.get("torch_dtype") or dtype
    if composed is not None:
        differing = composed.differences(config, model.parts)
    else:
        differing = family.config.differences(config, replace(spec, dtype=named))
    if differing and composed is not None:
        config = composed.merge_config(config, model.parts)
    elif differing:
        config = family.config.merge_config(config, spec)
    if differing:
        notes += [f"{CONFIG}, the source wins: {line}" for line in differing]
    changed = _set_dtype(config, dtype)
    if not config.get("model_type"):  # transformers goes by it alone
        changed, config["model_type"] = True, family.model_types[0]
    for part in (p for p in ("text_config", "vision_config") if isinstance(config.get(p), dict)):
        if composed is not None and {"dtype", "torch_dtype"} & config[part].keys():
            changed |= _set_dtype(config[part], dtype)
    if changed or differing:
        files[CONFIG] = dump_config(config)
    return files, tuple(notes)


def _check_loadable(files: Mapping[str, bytes], root: str) -> None:
    """Raise unless there is a config that says what transformers would build.

    Raises:
        PlanError: there is none, or it does not say.

    Source: huggingface/transformers src/transformers/models/auto/configuration_auto.py
    (AutoConfig.from_pretrained) @ v5.23.0.
    """
    if (config := read_config(files, root)) is None:
        raise PlanError(
            f"no {CONFIG}, beside the weights or given: transformers could not load the result; "
            "--hf-base takes config and tokenizer from the model that was trained, --no-config "
            "writes the weights alone"
        )
    if not config.get("model_type") and "AutoConfig" not in (config.get("auto_map") or {}):
        raise PlanError(
            f"{root}/{CONFIG} names no model_type, by which transformers loads a model: write it "
            "into the config, or insist with --no-config"
        )


def _set_dtype(config: dict[str, Any], dtype: str) -> bool:
    """Make a config say what was written; return whether it said something else."""
    keys = [key for key in ("dtype", "torch_dtype") if key in config] or ["torch_dtype"]
    said = [config.get(key) for key in keys]
    config.update(dict.fromkeys(keys, dtype))
    return said != [dtype] * len(keys)


def weight_files(tensors: Mapping[str, LazyTensor], options: Options) -> Iterator[FilePlan]:
    """Yield the weight files of a model, as the options of the saver want them, and their index.

    Source of the names: huggingface/transformers src/transformers/utils/__init__.py (WEIGHTS_NAME,
    SAFE_WEIGHTS_NAME) @ v4.57.1.
    """
    shards = list(_shards(tensors, _shard_size(options.get("max_shard_size") or "5GB")))
    as_bin = options.get("weight_files") == "bin"
    stem, suffix = ("pytorch_model", ".bin") if as_bin else ("model", ".safetensors")
    count = len(shards)
    paths = [f"{stem}-{number:05d}-of-{count:05d}{suffix}" for number in range(1, count + 1)]
    if count == 1:
        paths = [f"{stem}{suffix}"]
    for path, shard in zip(paths, shards, strict=True):
        if as_bin:
            yield torch_zip.plan_file(path, shard)
        else:
            yield safetensors.plan_file(path, in_library_order(shard))
    if count > 1:  # the index: where every tensor is, and the size of all
        homes = {key: path for path, shard in zip(paths, shards, strict=True) for key in shard}
        totals = {
            "total_parameters": sum(tensor.numel for tensor in tensors.values()),
            "total_size": sum(tensor.nbytes for tensor in tensors.values()),
        }
        index = {"metadata": totals, "weight_map": dict(sorted(homes.items()))}
        content = (json.dumps(index, indent=2, sort_keys=True) + "\n").encode()
        yield from literal_files({f"{stem}{suffix}.index.json": content})


def _shards(tensors: Mapping[str, LazyTensor], limit: int) -> Iterator[dict[str, LazyTensor]]:
    """Yield the tensors in their order, as many at once as ``limit`` bytes hold, at least one."""
    shard: dict[str, LazyTensor] = {}
    size = 0
    for name, tensor in tensors.items():
        if shard and size + tensor.nbytes > limit:
            yield shard
            shard, size = {}, 0
        shard[name] = tensor
        size += tensor.nbytes
    yield shard


def in_library_order(tensors: Mapping[str, LazyTensor]) -> dict[str, LazyTensor]:
    """Return the tensors as the safetensors library orders them in a file.

    With it, the file is byte for byte the one that transformers writes.

    Source: safetensors:safetensors/src/tensor.rs@v0.6.2, prepare: falling alignment, then name.
    """
    order = sorted(tensors, key=lambda name: (-ITEMSIZE[tensors[name].dtype], name))
    return {name: tensors[name] for name in order}
