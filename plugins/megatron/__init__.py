"""Checkpoints of Megatron-LM, and the formats of its converter under the names that it has."""

from ckptx.protocol.declarations import Format

_RANKS = ("latest_checkpointed_iteration.txt", "mp_rank_*")
_AXES = ("tp", "pp", "vpp", "ep")

FORMATS = (
    Format(
        "core",
        "Megatron Core at any parallel layout",
        loader="ckptx.plugins.megatron.core:CoreLoader",
        saver="ckptx.plugins.megatron.core:CoreSaver",
        aliases=("mcore", "megatron_core", "torch_dist"),
        files=("metadata.json", "latest_train_state.pt", "context", *_RANKS),
        containers=("torch_dist", "torch"),
        layouts=("mcore",),
        parallel=_AXES,
    ),
    Format(
        "legacy",
        "Megatron from before Megatron Core",
        loader="ckptx.plugins.megatron.legacy:LegacyLoader",
        saver="ckptx.plugins.megatron.legacy:LegacySaver",
        aliases=("megatron",),
        files=_RANKS,
        containers=("torch",),
        layouts=("legacy",),
        parallel=_AXES,
    ),
    Format(
        "llava",
        "core, of a LLaVA, with the options of Megatron's converter",
        loader="ckptx.plugins.megatron.upstream_names:LlavaLoader",
        saver="ckptx.plugins.megatron.upstream_names:LlavaSaver",
        containers=("torch_dist", "torch"),
        parallel=_AXES,
    ),
    Format(
        "llama_mistral",
        "meta or hf, with the options of Megatron's converter",
        loader="ckptx.plugins.megatron.upstream_names:LlamaMistralLoader",
        containers=("as loaders meta and hf",),
    ),
    Format(
        "mixtral_hf",
        "hf, of a Mixtral, with the options of Megatron's converter",
        loader="ckptx.plugins.megatron.upstream_names:MixtralHfLoader",
        containers=("as loader hf",),
    ),
)
