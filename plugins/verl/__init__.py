"""What verl's workers save besides the shares of FSDP: Megatron's forms, and states of training."""
