"""The conversions of the record: sources, what they become, and what that becomes in turn."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from .sources import KIT, made

DENSE = ("llama", "llama-biases", "llama-twelve-layers", "mistral-one-group", "qwen2-tied", "qwen3")
MIXTURES = ("mixtral", "qwen2_moe", "qwen3_moe", "qwen3_moe-dense-first")
PLAIN = {  # options of saver core for any model
    "dist": "",
    "dist-tp2-pp2": "--tp 2 --pp 2",
    "torch": "--ckpt-format torch",
    "torch-tp2": "--ckpt-format torch --tp 2 --saver-transformer-impl local --iteration 5",
    "torch-tp2-pp2-vpp2": "--ckpt-format torch --tp 2 --pp 2 --vpp 2",
}
FEW = {name: PLAIN[name] for name in ("dist-tp2-pp2", "torch", "torch-tp2")}
MORE = {  # for a dense model of four layers
    "tp4": "--ckpt-format torch --tp 4",
    "pp4": "--pp 4 --make-vocab-size-divisible-by 8",
    "pp2-first": "--ckpt-format torch --pp 2 --decoder-first-pipeline-num-layers 1",
    "pp2-last": "--pp 2 --decoder-last-pipeline-num-layers 1 --iteration 12",
    "layout": "--ckpt-format torch --pp 2 --vpp 2 --pipeline-model-parallel-layout Et|t|tt|L",
    "embedding": (
        "--ckpt-format torch --pp 3 --account-for-embedding-in-pipeline-split "
        "--account-for-loss-in-pipeline-split"
    ),
    "flat": "--no-iteration-directory --tp 2",
    "vocab": "--true-vocab-size 35 --make-vocab-size-divisible-by 4 --tp 2",
    "fp32": "--dtype float32 --digest sha256",
    "fp16-torch": "--dtype fp16 --ckpt-format torch",
    "tokenizer": "--tokenizer-model some/where --ckpt-format torch",
    "four-threads": "--threads 4 --tp 2",
    "one-thread": "--threads 1 --tp 2 --check-replicas all",
}
EXPERTS = {
    "ep2": "--ep 2",
    "ep2-tp2": "--ep 2 --tp 2 --etp 1 --ckpt-format torch",
    "ep4-etp2": "--ep 4 --etp 2 --tp 2 --ckpt-format torch --moe-grouped-gemm",
    "ep2-pp2": "--ep 2 --pp 2 --moe-grouped-gemm",
}
LEGACY = {
    "legacy": "",
    "legacy-tp2-pp2": "--tp 2 --pp 2",
    "legacy-te": "--tp 2 --saver-transformer-impl transformer_engine --iteration 3",
}
META = {"meta": "", "meta-2": "--tp 2", "meta-width": "--target-shards 2 --embedding-split width"}
DCP = {
    "dcp": "",
    "dcp-container": "--target-container app.model --shards 2",
    "dcp-files": "--target-names files",
    "dcp-titan": "--target-names torchtitan",
    "dcp-titan-0.2": "--target-names torchtitan-0.2 --shards 3",
}
HF = {
    "hf": "",
    "hf-shards": "--max-shard-size 20KB",
    "hf-bin": "--weight-files bin",
    "hf-bin-shards": "--weight-files bin --max-shard-size 20KB",
    "hf-fp32": "--dtype float32",
    "hf-bf16": "--dtype bfloat16",
}
TORCH = {"pt": "", "pt-core": "--target-layout core", "pt-legacy": "--target-layout legacy"}
LANGUAGES = (
    *("llama", "llama3-rope", "mistral", "qwen2-tied", "qwen3", "gpt2", "gpt-neox", "phi3"),
    *("gemma", "gemma2", "starcoder2", "glm", "glm4", "granite", "olmo2", "headed", "quantised"),
)
SPARSE = (
    *("mixtral", "qwen2-moe", "qwen3-moe", "olmoe", "deepseek-v2", "deepseek-v3"),
    *("deepseek-v3-mtp", "qwen3-moe-bf16", "deepseek-v3-bf16"),
)


@dataclass(frozen=True)
class Case:
    """One command: its source is another case's target, or a source by name.

    Words of the form ``{name}`` in the options stand for the place of a source or case.
    """

    name: str
    source: str
    saver: str
    options: str = ""
    command: str = "convert"

    def needs(self) -> Iterator[str]:
        """Yield the sources and cases that must be there before."""
        yield self.source
        for word in self.options.split():
            if word.startswith("{"):
                yield word[1:-1]


def _grid(source: str, saver: str, options: dict[str, str]) -> Iterator[Case]:
    for name, words in options.items():
        yield Case(f"{source} > {name}", source, saver, words)


def _onward(case: Case) -> Iterator[Case]:
    """Yield what becomes of a result: Hugging Face's again."""
    base = f"--hf-base {{{case.source}}}" if case.saver == "pytorch" else ""
    yield Case(f"{case.name} > hf", case.name, "hf", base)


def _llamas() -> Iterator[Case]:
    for model in DENSE:
        source = f"kit/{model}"
        first = [*_grid(source, "core", PLAIN), *_grid(source, "legacy", LEGACY)]
        first += [*_grid(source, "dcp", DCP), *_grid(source, "pytorch", TORCH)]
        if model in ("llama", "qwen2-tied"):
            first += [*_grid(source, "core", MORE), *_grid(source, "hf", HF)]
        for case in first:
            yield case
            yield from _onward(case)
    for model in KIT:
        if model.startswith("meta-"):
            for case in _grid(f"kit/{model}", "meta", META):
                yield case
                yield from _onward(case)
        elif model not in (*DENSE, *MIXTURES):
            source = f"kit/{model}"
            for case in (
                Case(f"{source} > core", source, "core", "--ckpt-format torch --tp 2"),
                Case(f"{source} > dcp", source, "dcp"),
                Case(f"{source} > hf", source, "hf"),
            ):
                yield case
                yield from _onward(case)
    for model in ("llama-fp32", "llama-fp16-3-shards"):
        source = f"kit/{model}"
        yield from _grid(source, "hf", HF)
        yield from _grid(source, "core", PLAIN)


def _mixtures() -> Iterator[Case]:
    for model in MIXTURES:
        source = f"kit/{model}"
        for case in (
            *_grid(source, "core", PLAIN | EXPERTS),
            *_grid(source, "dcp", DCP),
            Case(f"{source} > pt", source, "pytorch"),
            Case(f"{source} > pt-core", source, "pytorch", "--target-layout core"),
        ):
            yield case
            yield from _onward(case)


def _chains() -> Iterator[Case]:
    """Yield chains through the formats, so that each saver follows each loader."""
    begin = "kit/meta-llama > start"
    yield Case(begin, "kit/meta-llama", "core", PLAIN["torch-tp2-pp2-vpp2"])
    formats = {
        "core": "--tp 4",
        "torch": "--ckpt-format torch --pp 2",
        "legacy": "--tp 2",
        "meta": "--tp 2",
        "dcp": "",
        "pytorch": "",
        "hf": "",
    }
    for first, options in formats.items():
        saver = "core" if first == "torch" else first
        one = Case(f"chain {first}", begin, saver, options)
        yield one
        for second, more in formats.items():
            two = "core" if second == "torch" else second
            base = " --hf-base {kit/meta-llama}" if first == "pytorch" else ""
            yield Case(f"{one.name} > {second}", one.name, two, more + base)


def _families() -> Iterator[Case]:
    for model in (*LANGUAGES, *SPARSE):
        source = f"family/{model}"
        first = [
            *_grid(source, "core", FEW if model in LANGUAGES else FEW | EXPERTS),
            Case(f"{source} > dcp", source, "dcp"),
            Case(f"{source} > dcp-files", source, "dcp", "--target-names files"),
            Case(f"{source} > hf", source, "hf", "--max-shard-size 100KB"),
            Case(f"{source} > hf-bf16", source, "hf", "--dtype bf16"),
            Case(f"{source} > pt", source, "pytorch"),
        ]
        for case in first:
            yield case
            yield from _onward(case)
    for model in ("bert", "bert-masked"):
        source = f"family/{model}"
        for case in (
            Case(f"{source} > core", source, "core", "--model-type BERT --tp 2"),
            Case(f"{source} > torch", source, "core", "--ckpt-format torch --pp 2"),
            Case(f"{source} > legacy", source, "legacy", "--model-type BERT --tp 2"),
            Case(f"{source} > hf", source, "hf"),
        ):
            yield case
            yield from _onward(case)
    for model in ("llava-clip", "llava-siglip"):
        source = f"family/{model}"
        for case in (
            Case(f"{source} > llava", source, "llava", "--tp 2"),
            Case(f"{source} > torch", source, "llava", "--ckpt-format torch --tp 2"),
            Case(f"{source} > torch-pp2", source, "llava", "--ckpt-format torch --pp 2"),
            Case(f"{source} > hf_llava", source, "hf_llava", "--max-shard-size 200KB"),
            Case(f"{source} > dcp", source, "dcp"),
        ):
            yield case
            if case.saver == "llava":
                yield Case(f"{case.name} > llava", case.name, "llava", "--tp 2 --pp 2")
            yield Case(f"{case.name} > hf", case.name, "hf")


def _internvit() -> Iterator[Case]:
    source = "made/megatron/internvit"
    yield Case("internvit > hf_llava", source, "hf_llava", "--max-shard-size 200KB")
    yield Case("internvit > llava", source, "llava", "--tp 2 --pp 2 --ckpt-format torch")
    yield Case("internvit > dist", source, "llava", "--tp 4")
    words = "--from hf_llava --ckpt-format torch"
    yield Case("internvit > hf_llava > llava", "internvit > hf_llava", "llava", words)


def _adapters() -> Iterator[Case]:
    base, one, two = (f"made/trained/{name}" for name in ("model", "adapter", "adapter-2"))
    both = f"--adapter {{{one}}} --adapter {{{two}}}"
    for name, options in (("one", f"--adapter {{{one}}}"), ("two", both)):
        yield Case(f"merge-{name} > hf", base, "hf", options)
        yield Case(f"merge-{name} > core", base, "core", f"{options} --tp 2 --ckpt-format torch")
        yield Case(f"merge-{name} > bf16", base, "hf", f"{options} --dtype bf16")
    inside = "made/trained/lora-inside"
    yield Case("lora-inside > hf", inside, "hf", "--lora-alpha 8")
    yield Case("lora-inside > peft", inside, "peft", "--lora-alpha 8")
    yield Case("lora-inside > dcp", inside, "dcp", "--lora-alpha 8")
    yield Case("adapter > peft", one, "peft", f"--hf-base {{{base}}}")
    yield Case("adapter > hf", one, "hf", f"--hf-base {{{base}}}")


def _made() -> Iterator[Case]:
    base = "--hf-base {made/trained/model}"
    for name in made():
        source = f"made/{name}"
        if name.rpartition("/")[2].startswith(("adapter", "lora", "model", "internvit")):
            continue
        options = base if "/dcp-" in name else ""
        if name in ("megatron/torch", "megatron/torch_dist"):
            options = "--hf-base {made/megatron/llama}"
        yield from (
            Case(f"{source} > hf", source, "hf", options),
            Case(f"{source} > legacy", source, "legacy", options),
            Case(f"{source} > core", source, "core", f"{options} --tp 2 --ckpt-format torch"),
            Case(f"{source} > bf16", source, "dcp", f"{options} --dtype bf16"),
        )
    yield Case(
        "verl-extra-state > hf", "made/trained/verl-fsdp", "hf", "--extra-state --dtype bf16"
    )
    for tag in ("master", "module"):
        yield Case(f"zero2-{tag} > hf", "made/trained/zero2", "hf", f"--weights {tag}")


def _golden(names: list[str]) -> Iterator[Case]:
    for name in names:
        source = f"golden/{name}"
        base = "--hf-base {golden/model}"
        yield Case(f"{source} > hf", source, "hf", base)
        yield Case(f"{source} > hf-alone", source, "hf", "--no-config")
        yield Case(f"{source} > module", source, "hf", f"{base} --weights module --dtype fp32")
        yield Case(f"{source} > dcp", source, "dcp")
        yield Case(f"{source} > core", source, "core", f"{base} --ckpt-format torch")


def _aliases() -> Iterator[Case]:
    meta = "kit/meta-llama > meta-2"
    words = "--from llama_mistral --checkpoint-type meta --model-size llama3 --bf16"
    yield Case("llama_mistral-meta > core", meta, "core", f"{words} --tp 2 --ckpt-format torch")
    words = "--from llama_mistral --checkpoint-type hf --model-size llama3"
    yield Case("llama_mistral-hf > core", "kit/llama", "core", f"{words} --pp 2")
    yield Case("mixtral_hf > core", "kit/mixtral", "core", "--from mixtral_hf --tp 2 --ep 2")


def _modified() -> Iterator[Case]:
    edits = "--remove lm_head.weight --cast *.mlp.* fp16 --rename model.norm.weight final"
    for source in (
        *("kit/llama", "kit/llama-fp16-3-shards", "kit/llama > dcp-container", "kit/llama > pt"),
        *("kit/qwen3_moe", "family/granite"),
    ):
        yield Case(f"modify {source}", source, "", edits, "modify")
    cast = "--cast *norm* fp32"
    for source in ("kit/llama > torch-tp2", "kit/llama > dist-tp2-pp2", "kit/meta-llama > meta-2"):
        yield Case(f"modify {source}", source, "", cast, "modify")


def _refused() -> Iterator[Case]:
    """Yield what is refused: the error and the exit code are what is held."""
    for name, saver, options in (
        ("tp3", "core", "--tp 3"),
        ("pp3", "core", "--pp 3"),
        ("ep", "core", "--ep 2"),
        ("unknown", "nothing", ""),
        ("option", "core", "--shards 2"),
        ("dtype", "hf", "--dtype int3"),
        ("peft", "peft", ""),
        ("llava", "llava", ""),
        ("hf_llava", "hf_llava", ""),
        ("layout", "core", "--pp 2 --pipeline-model-parallel-layout Et|tL"),
        ("meta", "meta", "--tp 3"),
        ("base", "hf", "--hf-base nowhere"),
    ):
        yield Case(f"refused {name}", "kit/llama", saver, options)
    yield Case("refused meta moe", "kit/mixtral", "meta")
    yield Case("refused legacy moe", "kit/mixtral", "legacy", "--ep 2")
    yield Case("refused modify", "kit/llama", "", "", "modify")
    yield Case("refused remove", "kit/llama", "", "--remove nothing.*", "modify")


def cases(golden: list[str]) -> dict[str, Case]:
    """Return every case by name, none before what it needs."""
    found: dict[str, Case] = {}
    for part in (
        *(_llamas(), _mixtures(), _chains(), _families(), _internvit(), _adapters()),
        *(_made(), _golden(golden), _aliases(), _modified(), _refused()),
    ):
        for case in part:
            assert case.name not in found, case.name
            found[case.name] = case
    return found
