"""Reports of checks that never ran: every shape that one can have, made by hand."""

from __future__ import annotations

import math
from dataclasses import replace

from gemma_convert.logits.divergence import Divergence, WorstToken
from gemma_convert.logits.drift import Drift
from gemma_convert.logits.fingerprint import Fingerprint
from gemma_convert.logits.part_check import LocalCheck, PartCheck
from gemma_convert.logits.report import LogitReport
from gemma_convert.logits.tokens import Candidate, CheckedSequence, Prediction

HOSTILE = (
    "</script><b>",
    "<img src=x onerror=alert(1)>",
    "\"'&amp;`",
    "\x00\x07\x1b[31m",
    "\u202eright to left\u202c",
    "مرحبا",
    "\u0301",
    "\ud800",
    "\ufffe",
    "a\nb\n",
    "\t",
    "",
    "🙂",
)

WORDS = ("<bos>", "The", " light", "house", " kept", ",", "\n", "    ", "灯台", " for", " 17", ".")


def sequence(name: str = "english", length: int = 40, scale: float = 1e-11) -> CheckedSequence:
    """A sequence whose KL goes up and down around `scale`; its largest is at position 7."""
    kl = [scale * (1.1 + math.sin(position)) for position in range(length)]
    kl[min(7, length - 1)] = scale * 3
    pieces = tuple(WORDS[position % len(WORDS)] for position in range(length))
    return CheckedSequence(name, tuple(range(100, 100 + length)), pieces, tuple(kl))


def with_image(name: str = "image-0 (cat.png)", scale: float = 1e-11) -> CheckedSequence:
    """The same with nine soft tokens from position 10 on."""
    plain = sequence(name, 30, scale)
    kl = tuple(None if 10 <= place < 19 else one for place, one in enumerate(plain.kl))
    return replace(plain, kl=kl, medium="image")


def prediction(one: CheckedSequence, swapped: bool = False) -> Prediction:
    """What could be predicted behind its worst token; the first two are `swapped` on one side."""
    place = one.worst or 0
    text = None if one.pieces is None else one.pieces[place]
    texts = ("ships", " <b>", "\n", "灯", "")
    ours = [Candidate(7 + n, text, 0.5 / 4**n) for n, text in enumerate(texts)]
    theirs = [replace(each, probability=each.probability * 0.9) for each in ours]
    if swapped:
        theirs[:2] = theirs[1::-1]
    behind = WorstToken(one.name, place, one.ids[place], text, one.kl_max)
    return Prediction(behind, tuple(ours), tuple(theirs))


def parts(error: float = 2e-7) -> LocalCheck:
    """Parts beside the layers, in two of them, and in a tower; the second's MLP has this error."""
    wrong = "gate and up are exchanged" if error > 1e-5 else None
    found = (
        PartCheck("patch embedding", None, 1e-7, 1.5e-7, tower="vision"),
        PartCheck("keys", 0, 1e-7, 1.5e-7, tower="vision"),
        PartCheck("embedding", None, 0.0, 1.5e-7),
        PartCheck("keys", 0, 1e-7, 1.5e-7),
        PartCheck("dense MLP", 0, 1e-7, 1.5e-7),
        PartCheck("keys", 1, 2e-7, 1.5e-7),
        PartCheck("dense MLP", 1, error, 1.5e-7, wrong),
        PartCheck("final norm", None, 2e-7, 1.5e-7),
        PartCheck("head", None, 1e-7, 1.5e-7),
    )
    return LocalCheck(found, "float32")


def report(*checked: CheckedSequence, **changes: object) -> LogitReport:
    """A report on these sequences, in float32 with a limit of 1e-5."""
    checked = checked or (sequence(), sequence("code", 25), with_image())
    kl = [value for one in checked for value in one.compared]
    worst = max(checked, key=lambda one: math.inf if math.isnan(one.kl_max) else one.kl_max)
    largest = worst.kl_max
    made = LogitReport(
        passed=largest <= 1e-5,
        proof=True,
        limit=1e-5,
        limit_reason="float32, nothing rounded",
        divergence=Divergence(
            tokens=len(kl),
            kl_mean=math.fsum(kl) / len(kl),
            kl_p99=largest * 0.9,
            kl_max=largest,
            worst=prediction(worst).behind,
            top1_agreement=0.9876,
            topk_overlap=0.9432,
            max_logit_difference=1.25e-3,
        ),
        drift=Drift(1e-7, (2e-7, 3e-7, 5e-7, 8e-7), 9e-7, 2e-3),
        local=parts(),
        noise_floor=3e-9,
        sequences=len(checked),
        longest_sequence=max(len(one.ids) for one in checked),
        sliding_window=512,
        images=1,
        sounds=0,
        layout="gemma-jax",
        dtype="float32",
        reference="transformers",
        reference_device="cpu",
        native_device="cuda: <H200>",
        whole_model=False,
        peak_memory_bytes=1_200_000_000,
        versions={"gemma-convert": "0.1.0", "jax": "0.9.1", "python": "3.12.1", "torch": "2.9"},
        seconds=12.5,
        flops=10**12,
        running_seconds=8.0,
        original="models/gemma & <co>",
        checkpoint="out",
        checked=tuple(checked),
        worst=tuple(prediction(one, swapped=largest > 1e-5) for one in checked[:5]),
        fingerprints=(Fingerprint("original", "config.json", "whole file", "ab" * 32),),
    )
    return replace(made, **changes)


def failed() -> LogitReport:
    """A report on another model, with a layer where it begins and a warning."""
    return report(
        sequence(scale=1e-3),
        sequence("code", 25, scale=1e-7),
        with_image(scale=1e-5),
        drift=Drift(1e-7, (2e-7, 3e-7, 5e-2, 8e-2), 9e-2, 2e-3),
        local=parts(5e-2),
        warnings=("No sequence is longer than the sliding window <512>.",),
    )


def not_a_number() -> LogitReport:
    """A report where logits were NaN from some token on, and hostile texts among the tokens."""
    plain = sequence("hostile </title><script>", len(HOSTILE), scale=1e-7)
    kl = tuple(math.nan if place >= 3 else one for place, one in enumerate(plain.kl))
    spoilt = replace(plain, pieces=HOSTILE, kl=kl)
    nothing = tuple(Candidate(n, HOSTILE[n], math.nan) for n in range(5))
    behind = WorstToken(spoilt.name, 3, 103, HOSTILE[3], math.nan)
    return report(
        spoilt,
        sequence("english", 30),
        passed=False,
        drift=Drift(1e-7, (2e-7, math.nan, math.nan), math.nan, 2e-3),
        worst=(Prediction(behind, nothing, nothing[::-1]),),
    )


def indication() -> LogitReport:
    """A pass that proves nothing: values are rounded, and ids have no texts."""
    return report(
        replace(sequence(scale=1e-4), pieces=None),
        passed=True,
        proof=False,
        limit=0.03,
        limit_reason="rounding",
        lossy_rows=("the embedding: scaled, in bfloat16",),
        drift=Drift(1e-7, (2e-3, 3e-2), 2e-2, None),
        warnings=("The checkpoint holds rounded values.",),
    )
