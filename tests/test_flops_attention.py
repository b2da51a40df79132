"""Pairs of queries and keys against brute force over masks, and the customary formulas."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gemma_convert.flops.attention import Reach, image_pair_flops, pair_flops
from gemma_convert.flops.count import count
from gemma_convert.flops.model import DecoderLayer, Dense, GatedDelta, GroupedQuery, Model
from gemma_convert.flops.workload import prefill

LENGTHS = st.integers(1, 70)
REACHES = [
    Reach(),
    *(Reach(kind, size) for kind in ("sliding", "chunked") for size in range(1, 80)),
]


def mask(reach: Reach, queries: int, cached: int) -> np.ndarray:
    """Which keys [keys] each query [queries] sees, straight from the words of `Reach`."""
    query, key = np.arange(cached, cached + queries)[:, None], np.arange(cached + queries)[None]
    seen = key <= query
    if reach.kind == "sliding":
        seen &= query - key < reach.size
    if reach.kind == "chunked":
        seen &= query // reach.size == key // reach.size
    return seen


@given(st.sampled_from(REACHES), LENGTHS, st.integers(0, 70))
def test_exact_pairs_are_those_of_the_mask(reach, queries, cached):
    assert pair_flops(reach, queries, cached, "exact") == 2 * mask(reach, queries, cached).sum()


@pytest.mark.parametrize("window", [5, 11, 12, 13, 90])
@pytest.mark.parametrize("cached", [0, 7, 30])
def test_windows_shorter_equal_and_longer_than_the_sequence(window, cached):
    reach = Reach("sliding", window)
    found = mask(reach, 12, cached).sum()
    assert pair_flops(reach, 12, cached, "exact") == 2 * found
    steps = [pair_flops(reach, 1, cached + step, "exact") for step in range(12)]
    assert sum(steps) == 2 * found


@pytest.mark.parametrize("kind", ["sliding", "chunked"])
@pytest.mark.parametrize(("length", "size"), [(30, 7), (30, 30), (30, 31), (30, 1), (30, 10)])
def test_the_masks_are_transformers_own(kind, length, size):
    import torch
    from transformers.masking_utils import (
        chunked_causal_mask_function,
        sliding_window_causal_mask_function,
    )

    theirs = (
        sliding_window_causal_mask_function(size)
        if kind == "sliding"
        else chunked_causal_mask_function(size, torch.zeros(1, dtype=torch.long))
    )
    places = torch.arange(length)
    seen = theirs(0, 0, places[:, None], places[None])
    assert (seen.numpy() == mask(Reach(kind, size), length, 0)).all()


@given(st.integers(1, 40), st.integers(1, 20), st.lists(st.integers(1, 12), max_size=3))
def test_images_both_ways_add_every_later_token_whatever_the_window(window, text, images):
    """The mask of transformers: the window on the past, and causal or of the same image."""
    import torch
    from transformers.masking_utils import (
        and_masks,
        blockwise_overlay,
        causal_mask_function,
        or_masks,
        sliding_window_overlay,
    )

    blocks = [-1] * text
    for number, tokens in enumerate(images):
        blocks += [number] * tokens + [-1]
    same = blockwise_overlay(torch.tensor([blocks]))
    seen = and_masks(sliding_window_overlay(window), or_masks(causal_mask_function, same))
    places = torch.arange(len(blocks))
    pairs = int(seen(torch.tensor(0), torch.tensor(0), places[:, None], places[None]).sum())
    found = pair_flops(Reach("sliding", window), len(blocks), 0, "exact")
    assert found + sum(image_pair_flops(tokens) for tokens in images) == 2 * pairs


@given(LENGTHS, st.integers(1, 80))
def test_the_customary_formulas_miss_half_the_diagonal(length, size):
    window = min(size, length)
    full, sliding = Reach(), Reach("sliding", size)
    assert pair_flops(full, length, 0, "customary") == length**2
    customary = pair_flops(sliding, length, 0, "customary")
    assert customary == 2 * (length * window) - window**2
    assert pair_flops(full, length, 0, "exact") - length**2 == length
    assert pair_flops(sliding, length, 0, "exact") - customary == window


@given(LENGTHS, st.integers(1, 80))
def test_customary_chunks_are_half_squares(length, size):
    rest = length % size
    squares = (length // size) * size**2 + rest**2
    assert pair_flops(Reach("chunked", size), length, 0, "customary") == squares


def test_the_customary_rule_knows_no_cache():
    reach = Reach("sliding", 9)
    assert pair_flops(reach, 1, 20, "customary") == pair_flops(reach, 1, 20, "exact") == 2 * 9


@pytest.mark.parametrize(
    ("reach", "cached", "keys"),
    [
        (Reach(), 0, 5),
        (Reach(), 30, 35),
        (Reach("sliding", 9), 0, 5),
        (Reach("sliding", 9), 30, 13),
        (Reach("chunked", 9), 4, 9),
    ],
)
def test_dense_counts_all_that_is_computed(reach, cached, keys):
    assert pair_flops(reach, 5, cached, "dense") == 2 * 5 * keys


@pytest.mark.parametrize("tokens", [1, 7, 8, 9, 16, 19])
def test_the_delta_rule_by_brute_force(tokens):
    """Each product of the chunked algorithm with its triangle, chunk by chunk."""
    chunk, k_dim, v_dim, heads = 8, 3, 5, 4
    mixer = GatedDelta(k_heads=2, v_heads=heads, k_dim=k_dim, v_dim=v_dim, kernel=4, chunk=chunk)
    model = Model("", 11, 7, (DecoderLayer(mixer, (Dense(13),)),))
    flops = 0
    for start in range(0, tokens, chunk):
        for place in range(min(chunk, tokens - start)):
            before, seen = place, place + 1
            flops += 2 * before * k_dim  # keys with earlier keys
            flops += 2 * seen * k_dim  # the query with keys
            flops += 2 * before * (k_dim + v_dim)  # substitution, right sides values and keys
            flops += 2 * seen * v_dim  # the chunk's new values
            flops += 3 * 2 * k_dim * v_dim  # read for correction, read for output, update
    found = count(model, prefill(2, tokens))
    assert found.components["text", "delta rule"] == 2 * heads * flops


def test_images_count_both_ways_on_sliding_layers_alone():
    layers = tuple(
        DecoderLayer(GroupedQuery(6, 3, 5, reach), (Dense(13),))
        for reach in (Reach(), Reach("sliding", 4), Reach("chunked", 4))
    )
    model = Model("", 11, 7, layers, vision=None)
    work = replace(prefill(2, 40), image_tokens=9)
    both = replace(work, bidirectional_images=True)
    from gemma_convert.flops.layers import decoder

    def pairs(step):
        return [one.flops for one in decoder(model, step) if one.component == "attention scores"]

    one_way = pairs(replace(work, images=3))
    assert pairs(replace(both, images=3))[::2] == one_way[::2]
    assert pairs(replace(both, images=3))[1] - one_way[1] == 2 * 3 * (9 * 8) * 6 * 5
    dense = replace(both, images=3, rule="dense")
    assert pairs(dense) == pairs(replace(dense, bidirectional_images=False))
