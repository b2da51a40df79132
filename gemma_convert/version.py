"""The version of this package."""

__version__ = "1.0.0rc1"

CONVERTER = "gemma_convert"
"""Under this key a checkpoint's own metadata has the version of the package that converted it."""
