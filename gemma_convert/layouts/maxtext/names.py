"""The modules of MaxText's model: names by which its tree is known, whatever stands above them."""

MODULES = ("token_embedder", "decoder", "vision_encoder")

STEP_METADATA = "_CHECKPOINT_METADATA"
"""The file in which Orbax keeps what a trainer says of a step."""
