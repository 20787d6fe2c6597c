"""Independent oracles: real megatron-core on CPU and real transformers, neither knowing ckptx."""
