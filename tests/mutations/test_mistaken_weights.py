"""A mistake in a written checkpoint: `verify` finds every one, and `logit-check` says where it is.

An ordinary run plants every seventh in Fast-LLM's and checks the logits, which need no compilation,
and every seventeenth in the others'; where GEMMA_CONVERT_MUTATIONS asks for the report
(scripts/mutations.sh) all are planted and checked, and the KL is noted.
"""

from __future__ import annotations

import os
import re
import shutil

import pytest
from names import WORDS, mistaken_parts
from record import REPORT, TOKENS
from trees import read_safetensors
from weights import bounds, common, mixture, per_layer, vision

from gemma_convert import logit_check, to_native, verify
from gemma_convert.logits.limit import PROOF_LIMIT
from gemma_convert.stores.safetensors.header import write_safetensors
from gemma_convert.tiny.sizes import SIZES

MOE, DENSE, SMALL = SIZES["26b-a4b"], SIZES["31b"], SIZES["e2b"]
OF_MOE = dict([*common(MOE.heads, MOE.kv_heads, MOE.embed), *mixture(MOE.experts), *vision(7)])
OF_DENSE = dict(common(DENSE.heads, DENSE.kv_heads, DENSE.embed))
OF_SMALL = dict([*per_layer(10), *bounds()])
TOWERS = ("vision", "audio")

CASES = [
    *[("maxtext", {}, "26b-a4b", name, plant) for name, plant in OF_MOE.items()],
    *[("maxtext", {"scan_layers": True}, "31b", name, plant) for name, plant in OF_DENSE.items()],
    *[("gemma-jax", {}, "26b-a4b", name, plant) for name, plant in OF_MOE.items()],
    *[("gemma-jax", {}, "e2b", name, plant) for name, plant in OF_SMALL.items()],
    *[
        ("maxtext", {}, "e2b", name, plant)
        for name, plant in OF_SMALL.items()
        if not name.startswith(TOWERS)
    ],
    *[
        ("tunix", {}, family, name, plant)
        for family, mistakes in (("26b-a4b", OF_MOE), ("e2b", OF_SMALL))
        for name, plant in mistakes.items()
        if not name.startswith(TOWERS)
    ],
    *[
        ("fast-llm", {}, "26b-a4b", name, plant)
        for name, plant in OF_MOE.items()
        if not name.startswith(TOWERS)
    ],
]


ALL, NAMES = len(CASES), {name for *_, name, _ in CASES}
if not os.environ.get(REPORT):
    CASES = [
        case
        for layout in ("maxtext", "gemma-jax", "fast-llm", "tunix")
        for case in [one for one in CASES if one[0] == layout][:: 7 if layout == "fast-llm" else 17]
    ]


@pytest.mark.parametrize(
    ("layout", "options", "family", "mistake", "plant"),
    CASES,
    ids=[
        f"{layout}{'-scanned' if options else ''}-{family}-{name}"
        for layout, options, family, name, _ in CASES
    ],
)
def test_verify_finds_it(tiny, caught, tmp_path, layout, options, family, mistake, plant):
    source = tiny(family, layers=10) if family == "e2b" else tiny(family, layers=6)
    planted = tmp_path / "planted"
    planted.mkdir()
    for file in source.iterdir():
        if file.suffix != ".safetensors":
            shutil.copy(file, planted)
    tensors = read_safetensors(source)
    plant(tensors)
    write_safetensors(planted / "model.safetensors", tensors)
    to_native(planted, tmp_path / "out", layout=layout, **options)
    report = verify(tmp_path / "out", against=source)
    assert not report.passed
    kl = None
    if (os.environ.get(REPORT) or layout == "fast-llm") and not mistake.startswith(TOWERS):
        checked = logit_check(source, tmp_path / "out", tokens=TOKENS, max_kl=PROOF_LIMIT)
        kl = checked.divergence.kl_max
        expected = mistaken_parts(read_safetensors(source), tensors)
        assert {(one.layer, one.part) for one in checked.local.failed} == expected
        said = [one.mistake for one in checked.local.failed if one.mistake is not None]
        words = WORDS[mistake]
        assert bool(said) == (words is not None) and not checked.passed
        assert all(re.search(words, one) for one in said), said
    caught("written", layout, mistake, "verify", kl)


def test_enough_is_planted_and_compared():
    assert ALL > 160
    assert len(NAMES) > 40
    assert max(MOE.window, DENSE.window, SMALL.window) < TOKENS
