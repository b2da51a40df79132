"""The modules of MaxText's model: names by which its tree is known, whatever stands above them."""

MODULES = ("token_embedder", "decoder", "vision_encoder")
