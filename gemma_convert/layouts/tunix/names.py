"""Names of Tunix' own tree that tell it from others."""

EMBEDDING = "embedder/input_embedding"
