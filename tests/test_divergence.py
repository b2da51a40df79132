"""Divergence against plain formulas; NaN and infinities must never pass."""

import math

import numpy as np
import pytest

from gemma_convert.logits.divergence import Accumulator, compare


def plain_kl(reference, native):
    """Σ p log(p / q), one token at a time, in python's own floats."""
    results = []
    for p_row, q_row in zip(reference.tolist(), native.tolist(), strict=True):
        p_total = math.fsum(map(math.exp, p_row))
        q_total = math.fsum(map(math.exp, q_row))
        terms = [
            math.exp(p) / p_total * (p - q - math.log(p_total) + math.log(q_total))
            for p, q in zip(p_row, q_row, strict=True)
        ]
        results.append(math.fsum(terms))
    return np.array(results)


def logits(rows, vocab, seed):
    return np.random.default_rng(seed).normal(0, 3, (rows, vocab)).astype(np.float32)


def accumulate(reference, native, slices=(3, 2, 100)):
    total, start = Accumulator(), 0
    for length in slices:
        end = min(start + length, len(reference))
        ids = [100 + position for position in range(start, end)]
        total.add(reference[start:end], native[start:end], sequence="one", start=start, ids=ids)
        start = end
    return total.result()


def test_kl_equals_the_plain_sum_and_is_not_symmetric():
    reference, native = logits(7, 13, 0), logits(7, 13, 1)
    found = compare(reference, native)
    np.testing.assert_allclose(found.kl, plain_kl(reference, native), rtol=1e-12)
    assert not np.allclose(found.kl, compare(native, reference).kl, rtol=0.05)


def test_kl_of_two_tokens_by_hand():
    p, q = np.log([[0.75, 0.25]]), np.log([[0.5, 0.5]])
    expected = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    assert compare(p, q).kl[0] == pytest.approx(expected, rel=1e-12)


def test_a_shift_of_all_logits_is_no_divergence():
    reference = logits(4, 9, 2).astype(np.float64)
    found = compare(reference, reference + 5.0)
    assert (found.kl < 1e-12).all() and (found.kl >= 0).all()
    np.testing.assert_allclose(found.difference, 5.0)
    assert found.top1.all() and (found.overlap == 1).all()


def test_tiny_kl_keeps_its_digits():
    reference = logits(5, 50, 3)
    native = reference.copy()
    native[:, 7] += np.float32(1e-4)
    np.testing.assert_allclose(
        compare(reference, native).kl, plain_kl(reference, native), rtol=1e-3, atol=1e-15
    )


def test_top1_and_overlap_are_counted():
    reference = np.tile(np.arange(20.0), (2, 1))
    native = reference.copy()
    native[0, 19], native[0, 0] = -1.0, 30.0  # the first token loses its best, gains a foreign one
    found = compare(reference, native)
    assert found.top1.tolist() == [False, True]
    assert found.overlap.tolist() == [0.9, 1.0]


def test_likeliest_tokens_in_order_and_their_probabilities():
    reference, native = logits(6, 40, 20), logits(6, 40, 21)
    found = compare(reference, native)
    for side, values in ((found.reference, reference), (found.native, native)):
        p = np.exp(values.astype(np.float64))
        p /= p.sum(axis=1, keepdims=True)
        assert side.ids.tolist() == np.argsort(-p, axis=1)[:, :10].tolist()
        np.testing.assert_allclose(side.probabilities, -np.sort(-p, axis=1)[:, :10], rtol=1e-12)


def test_of_equally_likely_tokens_the_lower_id_comes_first():
    values = np.zeros((2, 4))
    values[1, 2] = 1
    assert compare(values, values).reference.ids.tolist() == [[0, 1, 2, 3], [2, 0, 1, 3]]


def test_tokens_come_in_the_order_in_which_they_were_added():
    reference, native, total = logits(5, 30, 22), logits(5, 30, 23), Accumulator()
    kept = np.array([True, False, True, True, True])
    for rows in (slice(0, 2), slice(2, 2), slice(2, 5)):
        ids = list(range(5))[rows]
        given = {"sequence": "a", "start": rows.start, "ids": ids, "compared": kept[rows]}
        total.add(reference[rows], native[rows], **given)
    found, whole = total.tokens(), compare(reference[kept], native[kept])
    assert found.kl.tolist() == whole.kl.tolist()
    assert found.native.ids.tolist() == whole.native.ids.tolist()
    assert Accumulator().tokens().kl.tolist() == []


def test_vocabulary_smaller_than_the_overlap():
    assert compare(np.ones((1, 3)), np.ones((1, 3))).overlap.tolist() == [1.0]


def test_slices_add_up_to_the_whole():
    reference, native = logits(8, 11, 4), logits(8, 11, 5)
    whole, sliced = accumulate(reference, native, (8,)), accumulate(reference, native)
    assert whole == sliced
    kl = plain_kl(reference, native)
    assert whole.tokens == 8
    assert whole.kl_mean == pytest.approx(kl.mean())
    assert whole.kl_p99 == pytest.approx(np.percentile(kl, 99))
    assert whole.kl_max == pytest.approx(kl.max())
    assert whole.worst.position == kl.argmax() and whole.worst.token == 100 + kl.argmax()
    assert whole.max_logit_difference == pytest.approx(np.abs(reference - native).max())
    assert whole.top1_agreement == (reference.argmax(1) == native.argmax(1)).mean()


def test_worst_token_names_sequence_position_and_text():
    total = Accumulator()
    reference = logits(2, 6, 6)
    total.add(reference, reference, sequence="a", start=0, ids=[4, 5], pieces=["x", "y"])
    changed = reference.copy()
    changed[1] = changed[1][::-1]
    total.add(reference, changed, sequence="b", start=10, ids=[6, 7], pieces=["z", "w"])
    worst = total.result().worst
    assert (worst.sequence, worst.position, worst.token, worst.text) == ("b", 11, 7, "w")


def test_rows_that_are_not_compared_are_left_out():
    reference, native = logits(6, 9, 10), logits(6, 9, 11)
    native[2] = reference[2][::-1] * 100  # far off, and left out
    native[5] = np.nan
    compared = np.array([True, False, False, True, True, False])
    total = Accumulator()
    words = ["a", "b", "c", "d", "e", "f"]
    total.add(
        reference[:4],
        native[:4],
        sequence="one",
        start=20,
        ids=[1, 2, 3, 4],
        pieces=words[:4],
        compared=compared[:4],
    )
    total.add(
        reference[4:], native[4:], sequence="one", start=24, ids=[5, 6], compared=compared[4:]
    )
    found, kept = total.result(), [0, 3, 4]
    kl = plain_kl(reference[kept], native[kept])
    assert found.tokens == 3
    assert found.kl_mean == pytest.approx(kl.mean()) and found.kl_max == pytest.approx(kl.max())
    worst = kept[int(kl.argmax())]
    assert found.worst.position == 20 + worst and found.worst.token == 1 + worst
    assert found.worst.text == (words[worst] if worst < 4 else None)
    assert found.max_logit_difference == pytest.approx(np.abs(reference[kept] - native[kept]).max())


def test_each_place_that_is_compared_keeps_its_own_word():
    for row in range(4):
        native = logits(4, 9, 12)
        native[row] = native[row][::-1]
        total = Accumulator()
        total.add(
            logits(4, 9, 12),
            native,
            sequence="one",
            start=0,
            ids=[5, 6, 7, 8],
            pieces=["w", "x", "y", "z"],
            compared=np.arange(4) >= row,
        )
        worst = total.result().worst
        assert (worst.position, worst.token, worst.text) == (row, 5 + row, "wxyz"[row])


def test_a_slice_without_a_compared_row_adds_nothing():
    reference, total = logits(3, 9, 13), Accumulator()
    nothing = np.zeros(3, bool)
    total.add(reference, -reference, sequence="one", start=0, ids=[1, 2, 3], compared=nothing)
    with pytest.raises(ValueError, match="no tokens"):
        total.result()
    total.add(reference, reference, sequence="one", start=3, ids=[4, 5, 6])
    found = total.result()
    assert found.tokens == 3 and found.kl_max == 0 and found.worst.position == 3


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("side", ["reference", "native", "both"])
def test_values_that_are_not_finite_never_pass(value, side):
    reference, native = logits(6, 9, 7), logits(6, 9, 7)
    if side != "native":
        reference[4, 2] = value
    if side != "reference":
        native[4, 2] = value
    found = accumulate(reference, native)
    assert math.isnan(found.kl_max) and math.isnan(found.kl_mean) and math.isnan(found.kl_p99)
    assert not found.within(math.inf)
    assert found.worst.position == 4 and math.isnan(found.worst.kl)
    assert found.top1_agreement == pytest.approx(5 / 6)
    assert found.topk_overlap == pytest.approx(5 / 6)


def test_limit_is_inclusive_and_for_the_worst_token():
    reference, native = logits(5, 9, 8), logits(5, 9, 8)
    native[3, 1] += 0.5
    found = accumulate(reference, native)
    assert found.within(found.kl_max) and not found.within(found.kl_max * 0.999)
    assert found.kl_mean < found.kl_max / 2


def test_wrong_shapes_and_nothing_at_all_are_refused():
    with pytest.raises(ValueError, match="shapes"):
        compare(np.ones((2, 3)), np.ones((2, 4)))
    with pytest.raises(ValueError, match="no tokens"):
        Accumulator().result()
    with pytest.raises(ValueError, match="3 tokens for 2 rows"):
        Accumulator().add(np.ones((2, 3)), np.ones((2, 3)), sequence="", start=0, ids=[1, 2, 3])


def test_large_vocabulary_goes_block_by_block():
    reference = logits(3, 1_200_000, 9)
    native = reference.copy()
    native[1, 5] += 1
    found = compare(reference, native)
    assert found.kl[0] == 0 and found.kl[2] == 0 and found.kl[1] > 0
