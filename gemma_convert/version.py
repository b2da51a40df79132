"""The version of this package."""

__version__ = "0.1.0"

CONVERTER = "gemma_convert"
"""Under this key a checkpoint's own metadata has the version of the package that converted it."""
