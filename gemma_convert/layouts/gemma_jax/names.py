"""The array by which the gemma library's tree is known, whatever stands above it."""

EMBEDDING = "embedder/input_embedding"
