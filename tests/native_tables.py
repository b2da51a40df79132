"""The tables of every native layout as data, to be changed by one thing and read again."""

import copy
import tomllib
from functools import cache

from gemma_convert.mapping.table import load_inventory, parse_table, table_file


@cache
def _shipped(layout):
    return tomllib.loads(table_file(layout).read_text(encoding="utf-8"))


def native_data(layout):
    """The table of a layout as a dictionary, a fresh copy."""
    return copy.deepcopy(_shipped(layout))


def read_native(data, layout):
    return parse_table(data, table_file(layout).name, load_inventory())


def native_row(data, hf, place=0):
    """(its place in the file, a row of a parsed table whose `hf` is that, or the one after it)."""
    rows = [
        (f"section {number}, row {position}", row)
        for number, section in enumerate(data["section"], 1)
        for position, row in enumerate(section["rows"], 1)
        if row["hf"] == hf
    ]
    return rows[place]
