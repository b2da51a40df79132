"""Convert Gemma 4 checkpoints between Hugging Face and native layouts."""
