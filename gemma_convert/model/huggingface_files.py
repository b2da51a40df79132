"""The names that transformers gives to the files of a checkpoint."""

CONFIG = "config.json"
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
