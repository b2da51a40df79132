"""The models and forms that tests go through."""

from gemma_convert.mapping.declared import layout_names

LAYOUTS = layout_names()
"""Every layout that is installed."""

FAMILIES = ("e2b", "e4b", "26b-a4b", "31b")
CASES = (
    ("e2b", False),
    ("e4b", False),
    ("26b-a4b", False),
    ("26b-a4b", True),
    ("31b", False),
    ("31b", True),
)
"""Every (model, scanned) that MaxText has, but for 12B: its text is like 31B's."""

LAYOUTS_OF_12B = (
    ("maxtext", False),
    ("maxtext", True),
    ("gemma-jax", False),
    ("fast-llm", False),
    ("tunix", False),
)
"""(layout, scanned) of 12B, which goes through end-to-end tests alone (test_unified.py)."""

SHALLOW = {"e2b": 10, "e4b": 12, "12b": 6, "26b-a4b": 6, "31b": 6}
"""Family → the fewest layers that have every kind: sliding, full, and those that share."""
