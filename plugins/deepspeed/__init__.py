"""What the loader of DeepSpeed's checkpoints is made of."""
