"""Models run by the frameworks that own them: transformers, megatron-core, DeepSpeed.

This is the one package that imports frameworks, and only in modules that run as processes of their
own (``python -m ckptx.verification.frameworks.transformers_side job.json answer.json``): their
memory, patches and output stay there, and the cause of their death is reported in one line.
"""
