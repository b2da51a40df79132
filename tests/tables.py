"""The shipped mapping tables as data, to be changed by one thing and read again."""

import copy
import tomllib
from functools import cache

from gemma_convert.mapping.table import (
    load_inventory,
    mappings_folder,
    parse_inventory,
    parse_table,
)

LAYER_ROWS = "params/params/decoder/layers_{layer}/"


@cache
def _shipped(name):
    return tomllib.loads((mappings_folder() / f"{name}.toml").read_text(encoding="utf-8"))


def maxtext_data():
    """maxtext.toml as a dictionary, a fresh copy."""
    return copy.deepcopy(_shipped("maxtext"))


def huggingface_data():
    """huggingface.toml as a dictionary, a fresh copy."""
    return copy.deepcopy(_shipped("huggingface"))


def read_maxtext(data, inventory=None):
    return parse_table(data, "maxtext.toml", inventory or load_inventory())


def read_huggingface(data):
    return parse_inventory(data, "huggingface.toml")


def maxtext_row(data, hf, place=0):
    """The row of a parsed maxtext.toml whose `hf` is that, or the one after it."""
    rows = [row for section in data["section"] for row in section["rows"] if row["hf"] == hf]
    return rows[place]


def huggingface_row(data, name):
    """The row of a parsed huggingface.toml whose name starts so."""
    return next(
        row
        for section in data["section"]
        for row in section["rows"]
        if row["name"].startswith(name)
    )
