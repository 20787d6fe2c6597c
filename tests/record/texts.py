"""What the commands print besides the reports of conversions."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

from .files import Workshop, short
from .program import Done, names, place, run, run_megatrons

COMMANDS = (
    *("convert", "plan", "from-config", "from-script", "inspect", "print-tensor", "verify"),
    *("generate", "modify", "plugins"),
)
INSPECTED = (
    *("kit/llama", "kit/llama-fp16-3-shards", "kit/qwen2-tied", "kit/qwen3_moe", "kit/mixtral"),
    *("kit/llama > dist-tp2-pp2", "kit/llama > torch-tp2-pp2-vpp2", "kit/llama > legacy-tp2-pp2"),
    *("kit/meta-llama > meta-2", "kit/llama > dcp-container", "kit/llama > pt"),
    *("kit/llama > hf-bin-shards", "kit/mixtral > ep2-tp2", "kit/qwen3_moe > ep4-etp2"),
    *("family/gpt2", "family/deepseek-v3-mtp", "family/quantised", "family/headed", "family/bert"),
    *("family/granite", "family/llava-clip", "family/llava-clip > torch"),
    *("made/trained/adapter", "made/trained/lora-inside", "made/trained/verl-fsdp-x-tp"),
    *("made/trained/rlinf-dcp", "made/trained/dcp-container", "made/trained/zero3"),
    *("made/megatron/torch", "made/megatron/torch_dist", "made/megatron/legacy-1.0"),
    *("golden/zero3_bf16", "golden/universal2", "golden/pipeline_zero1", "golden/experts_zero2"),
)
PLANNED = (
    ("kit/llama", "core", "--tp 2 --pp 2"),
    ("kit/llama", "core", "--ckpt-format torch --tp 2 --dtype fp16"),
    ("kit/llama", "legacy", "--tp 2"),
    ("kit/meta-llama", "meta", "--tp 2"),
    ("kit/llama", "dcp", "--shards 2"),
    ("kit/llama", "hf", "--max-shard-size 20KB"),
    ("kit/llama", "pytorch", ""),
    ("kit/llama > torch-tp2-pp2-vpp2", "core", "--tp 4"),
    ("kit/llama > dist-tp2-pp2", "hf", ""),
    ("kit/qwen3_moe", "core", "--tp 2 --ep 2 --etp 1 --ckpt-format torch"),
    ("family/deepseek-v3-mtp", "core", "--tp 2"),
    ("family/quantised", "hf", "--dtype fp32"),
    ("family/llava-clip", "llava", "--tp 2"),
    ("family/bert", "core", "--ckpt-format torch"),
    ("made/trained/verl-fsdp", "hf", ""),
    ("made/trained/lora-inside", "hf", "--lora-alpha 8"),
    ("made/trained/rlinf-dcp", "hf", ""),
    ("made/megatron/ranks", "hf", ""),
    ("golden/zero3_bf16", "hf", "--no-config"),
    ("golden/universal2", "dcp", ""),
)
COMPARED = (
    ("kit/llama", "kit/llama > dist-tp2-pp2", ""),
    ("kit/llama", "kit/llama > legacy-tp2-pp2", ""),
    ("kit/llama", "kit/llama > pt", ""),
    ("kit/meta-llama", "kit/meta-llama > meta-2", ""),
    ("kit/llama", "kit/llama > fp32", ""),
    ("kit/llama", "kit/llama > fp32", "--ignore-dtype"),
    ("kit/llama", "kit/llama > hf-fp32", "--rtol 0.01"),
    ("kit/llama", "wrong/gate-for-up", ""),
    ("kit/llama", "wrong/layers", ""),
    ("kit/llama", "wrong/key-for-value", ""),
    ("kit/llama", "wrong/key-for-value", "--no-diagnosis"),
    ("kit/llama", "kit/qwen3", ""),
    ("kit/qwen3_moe", "kit/qwen3_moe > ep4-etp2", ""),
    ("made/trained/model", "merge-one > hf", ""),
    ("made/trained/model", "made/trained/verl-columns", ""),
    ("golden/zero3_bf16", "golden/zero2_bf16_groups", ""),
)
PRINTED = (
    ("kit/llama", "model.norm.weight", ""),
    ("kit/llama", "model.norm.weight", "--full"),
    ("kit/llama > dist-tp2-pp2", "*.2.mlp.down_proj.weight", "--slice 0,:8"),
    ("kit/llama > torch-tp2-pp2-vpp2", "model.embed_tokens.weight", "--slice ::9,3"),
    ("kit/llama", "nothing", ""),
    ("kit/llama", "model.*", ""),
    ("family/quantised", "model.layers.0.mlp.up_proj.weight", ""),
)
SCRIPTS = (
    "--list",
    "zero_to_fp32 A B -t C -d --print-only",
    "model_merger merge --backend fsdp --local_dir A --target_dir B --print-only",
    "model_merger merge --backend megatron --local_dir A --target_dir B --print-only",
    "converter_hf_to_mcore --hf_model_path A --output_path B --print-only",
    "convert_checkpoint_simple A B --actor-dir critic --print-only",
    "fsdp2hf A B --print-only",
    "hf2fsdp A B --print-only",
    "convert_dcp_to_pt --dcp_path A --output_path B --print-only",
    "mg2hf A B --print-only",
    "merge-weights A B --print-only",
    "dcp_to_torch_save A B --print-only",
    "torch_save_to_dcp A B --print-only",
    "convert_mg_to_middle_file",
    "nothing",
)
CONFIG = """convertor:
  save_path: target
  merge_lora_weighs: true
  ckpt_path: source
  torch_dtype: bf16
model:
  model_type: openvla_oft
  model_path: base
  is_lora: false
"""


class Texts:
    """Runs commands in a workshop and collects what is wanted of them."""

    def __init__(self, shop: Workshop, is_wanted: Callable[[str], bool]) -> None:
        self.shop, self.is_wanted = shop, is_wanted
        self.found: dict[str, str] = {}

    def add(self, name: str, command: str, *words: str, entry: Callable[..., Done] = run) -> None:
        """Run a command; ``{name}`` stands for the place of a source or case."""
        if not self.is_wanted(name):
            return
        given = [str(self.shop.have(w[1:-1])) if w.startswith("{") else w for w in words]
        done = entry(*([command] if command else []), *given)
        text = self.shop.where.told(done.text())
        if done.code == 0 and "--json" in words:
            said = json.dumps(json.loads(text), sort_keys=True)
            text = f"{short(said)} {len(said)}"
        self.found[name] = text


def _inspect(texts: Texts) -> None:
    for source in INSPECTED:
        for options in ("", "--json", "--tree", "--stats --json"):
            label = f"inspect {source} {options}".rstrip()
            texts.add(label, "inspect", f"{{{source}}}", *options.split())
    for source in INSPECTED[:12]:
        for options in (
            "--tree --names stored",
            "--filter *norm* --stats",
            "--layers 0,2-3 --tree",
            "--names stored --json",
        ):
            texts.add(f"inspect {source} {options}", "inspect", f"{{{source}}}", *options.split())


def _plan(texts: Texts) -> None:
    for source, saver, options in PLANNED:
        words = (f"{{{source}}}", str(texts.shop.path("planned")), "--to", saver)
        label = f"plan {source} {saver} {options}".rstrip()
        texts.add(label, "plan", *words, *options.split())
        texts.add(f"{label} --json", "plan", *words, *options.split(), "--json")
        target = str(texts.shop.path(f"json {label}"))
        json_words = (f"{{{source}}}", target, "--to", saver, *options.split(), "--json")
        texts.add(f"convert {label.removeprefix('plan ')} --json", "convert", *json_words)


def _compare(texts: Texts) -> None:
    for one, other, options in COMPARED:
        label = f"verify {one} {other} {options}".rstrip()
        words = (f"{{{one}}}", f"{{{other}}}", *options.split())
        texts.add(label, "verify", *words)
        texts.add(f"{label} --json", "verify", *words, "--json")
    for case in ("kit/llama > hf-shards", "kit/llama > torch-tp2"):
        if texts.is_wanted(f"verify against {case}"):
            (manifest,) = texts.shop.have(case).rglob("ckptx-manifest.json")
            words = (f"{{{case}}}", "--against-manifest", str(manifest))
            texts.add(f"verify against {case}", "verify", *words)


def _others(texts: Texts) -> None:
    for source, name, options in PRINTED:
        words = (f"{{{source}}}", name, *options.split())
        texts.add(f"print-tensor {source} {name} {options}".rstrip(), "print-tensor", *words)
        texts.add(
            f"print-tensor {source} {name} {options} --json", "print-tensor", *words, "--json"
        )
    texts.add("plugins", "plugins")
    texts.add("plugins --names", "plugins", "--names")
    texts.add("plugins --json", "plugins", "--json")
    for words in SCRIPTS:
        texts.add(f"from-script {words}", "from-script", *words.split())
    file = Path(texts.shop.where.root, "convertor.yaml")
    file.write_text(CONFIG)
    texts.add("from-config", "from-config", str(file), "--print-only")
    dry = ("--remove", "*.1.*", "--dry-run")
    texts.add("modify --dry-run", "modify", "{kit/llama}", str(texts.shop.path("dry")), *dry)
    for words in ("", "convert", "convert A", "inspect nowhere", "nothing", "--version", "plan -x"):
        texts.add(f"wrong use: {words}", "", *words.split())


def _megatrons(texts: Texts) -> None:
    """Run ``convert.py`` with Megatron's own options."""
    for name, words in (
        ("core", "--loader hf --saver core --target-tensor-parallel-size 2"),
        ("meta", "--loader llama_mistral --checkpoint-type hf --model-size llama3 --saver core"),
        ("model type", "--model-type GPT --loader hf --saver legacy"),
        ("refused", "--loader hf --saver core --target-tensor-parallel-size 3"),
        ("no saver", "--loader hf"),
    ):
        target = str(texts.shop.path(f"convert.py {name}"))
        given = ("--load-dir", "{kit/llama}", "--save-dir", target, *words.split())
        texts.add(f"convert.py {name}", "", *given, entry=run_megatrons)


def entries(is_wanted: Callable[[str], bool]) -> dict[str, str]:
    """Return what commands print; of JSON its hash and length."""
    with place() as where:
        texts = Texts(Workshop(where), is_wanted)
        for part in (_inspect, _plan, _compare, _others, _megatrons):
            part(texts)
    return texts.found


def _helps() -> Iterator[tuple[str, tuple[str, ...], Callable[..., Done]]]:
    yield "ckptx", ("--help",), run
    for command in COMMANDS:
        yield command, (command, "--help"), run
    for loader in names("loader"):
        yield f"convert --from {loader}", ("convert", "--from", loader, "--help"), run
    for saver in names("saver"):
        yield f"convert --to {saver}", ("convert", "--to", saver, "--help"), run
        yield f"plan --to {saver}", ("plan", "--to", saver, "--help"), run
        for loader in names("loader"):
            pair = ("--from", loader, "--to", saver)
            yield " ".join(["convert", *pair]), ("convert", *pair, "--help"), run
            long = ("--loader", loader, "--saver", saver)
            yield " ".join(["convert.py", *long]), (*long, "--help"), run_megatrons
    yield "convert.py", ("--help",), run_megatrons


def help_entries(is_wanted: Callable[[str], bool]) -> dict[str, str]:
    """Return every help: as text of commands and single plugins, else its hash."""
    found = {}
    with place() as where:
        for name, words, entry in _helps():
            if is_wanted(name):
                text = where.told(entry(*words).text())
                pair = ("--from" in name and "--to" in name) or name.startswith(
                    ("convert.py -", "plan ")
                )
                found[name] = short(text) if pair else text
    return found
