"""DeepSeek V3, and what shares its classes (R1, Moonlight, Kimi K2), in their own names.

Files hold the layers for multi-token prediction after the last decoder layer, each with copies of
the embedding and of the output layer; transformers loads and saves V3 without them.

Source: huggingface/transformers src/transformers/models/deepseek_v3/*.py @ v5.23.0;
deepseek-ai/DeepSeek-V3 README_WEIGHTS.md, config.json and model.safetensors.index.json @ main.
"""

from ckptx.model.layout import Layout
from ckptx.schemas.config.traits import ConfigTable, llama_defaults
from ckptx.schemas.decoder import decoder_family
from ckptx.schemas.families.experts import deepseek_v2

_COPIES = (
    ("embeddings", "word embeddings", f"{deepseek_v2.LAYER}embed_tokens.weight"),
    ("output layer", "weight", f"{deepseek_v2.LAYER}shared_head.head.weight"),
)
_DEFAULTS = llama_defaults(
    vocab=129280, hidden=7168, ffn=18432, layers=61, heads=128, groups=128, positions=4096
) | {**deepseek_v2.LATENT, "num_nextn_predict_layers": 1}

FAMILY = decoder_family(
    "deepseek_v3",
    ConfigTable(
        "DeepseekV3ForCausalLM",
        _DEFAULTS,
        ("attention_bias",),
        qk_layernorm=True,
        names={"head_dim": "v_head_dim"},
        passthrough_keys={"rope_interleave": True},
        megatron_lacks={
            "rope_interleave": "Megatron's latent attention rotates neighbouring channels"
        },
        latent=True,
        fields=(*deepseek_v2.FIELDS, ("num_nextn_predict_layers", "mtp_num_layers")),
        experts=deepseek_v2.DeepSeekMixture(
            {
                "n_routed_experts": 256,
                "n_shared_experts": 1,
                "num_experts_per_tok": 8,
                "moe_intermediate_size": 2048,
                "first_k_dense_replace": 3,
                "routed_scaling_factor": 2.5,
                "topk_method": "noaux_tc",
                "n_group": 8,
                "topk_group": 4,
            },
            count="n_routed_experts",
            only={
                "scoring_func": "sigmoid",
                "norm_topk_prob": True,
                "moe_layer_freq": 1,
                "topk_method": "noaux_tc",
            },
            biased=True,
        ),
    ),
    Layout("hf/deepseek_v3", deepseek_v2.SECTIONS, deepseek_v2.IGNORED, _COPIES),
    refused=deepseek_v2.REFUSED,
    model_types=("kimi_k2",),
    recognition=40,
)
