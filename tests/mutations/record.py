"""Where the report of the planted mistakes goes, and how much text is compared."""

REPORT = "GEMMA_CONVERT_MUTATIONS"
"""The environment variable that names a file to which every mistake adds one line of JSON."""

TOKENS = 40
