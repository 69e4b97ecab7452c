"""File formats of checkpoints: Hugging Face and PEFT folders."""
