"""A report as one HTML page that needs nothing else: no network, no script, no font."""

from __future__ import annotations

from datetime import datetime
from html import escape

from gemma_convert.logits.html_page import page, plain, scrolling, sentence, table
from gemma_convert.logits.html_parts import part_rows, parts_legend, parts_pictures
from gemma_convert.logits.html_plots import drift_plot, kl_plot
from gemma_convert.logits.html_tokens import legend, prediction, strip
from gemma_convert.logits.report import LogitReport
from gemma_convert.logits.report_lines import (
    arithmetic_line,
    compared_line,
    native_line,
    noise_line,
    not_run_line,
    parts_line,
)
from gemma_convert.logits.scale import LogRange, figure, log_range
from gemma_convert.logits.tokens import CheckedSequence
from gemma_convert.logits.visible import visible


def html_report(report: LogitReport, written: datetime) -> str:
    """The page: verdict, figures, drift by layer, worst tokens, every token, and how it was run."""
    body = "".join(
        (
            _head(report),
            "<main>",
            _figures(report),
            _parts(report),
            _drift(report),
            _worst(report),
            _tokens(report),
            _run(report),
            "</main>",
            f"<footer><p>Written {written:%Y-%m-%d %H:%M} UTC by gemma-convert "
            f"{plain(report.versions.get('gemma-convert', ''))}.</p></footer>",
        )
    )
    return page(f"{report.verdict}: {report.layout}", body)


def _outcome(report: LogitReport) -> tuple[str, str]:
    """The class and the words of the badge above the verdict."""
    if not report.passed:
        return "fail", "Failed"
    return ("pass", "Passed") if report.proof else ("hint", "Passed: an indication, not proof")


def _head(report: LogitReport) -> str:
    kind, word = _outcome(report)
    sign = {"pass": "✓", "hint": "≈", "fail": "✗"}[kind]
    worst = report.divergence.worst
    token = f"id {worst.token}"
    if worst.text is not None:
        token = f'<bdi class="token">{escape(visible(worst.text))}</bdi> ({token})'
    warnings = "".join(f"<li>{plain(one)}</li>" for one in report.warnings)
    return (
        f'<header class="{kind}"><p class="kicker">gemma-convert logit-check</p>'
        f'<p class="badge"><span aria-hidden="true">{sign}</span> {word}</p>'
        f'<h1 id="verdict">{escape(report.verdict)}</h1>'
        f'<p class="lead">The worst token has a KL of <b>{figure(worst.kl)}</b> nats; the limit is '
        f"<b>{report.limit:.0e}</b> ({plain(report.limit_reason)}). It is {token} at position "
        f"{worst.position} of {plain(worst.sequence)}.</p>"
        + (f'<ul class="warnings">{warnings}</ul>' if warnings else "")
        + "</header>"
    )


def _figures(report: LogitReport) -> str:
    found = report.divergence
    entries = (
        ("largest KL", figure(found.kl_max)),
        ("99th percentile of the KL", figure(found.kl_p99)),
        ("mean KL", figure(found.kl_mean)),
        ("top-1 agreement", f"{found.top1_agreement:.2%}"),
        ("top-10 agreement", f"{found.topk_overlap:.2%}"),
        ("largest logit difference", figure(found.max_logit_difference)),
        ("tokens compared", f"{found.tokens:,}"),
    )
    items = "".join(f"<div><dt>{name}</dt><dd>{value}</dd></div>" for name, value in entries)
    return (
        f'<section aria-labelledby="figures"><h2 id="figures">Figures</h2><dl class="tiles">{items}'
        '</dl><p class="note">KL is the divergence KL(original ‖ converted) of the distributions '
        "of the next token, in nats.</p></section>"
    )


def _parts(report: LogitReport) -> str:
    local, title = report.local, '<h2 id="parts">Each part by itself</h2>'
    if local is None:
        said = plain(sentence(parts_line(report)))
        return f'<section aria-labelledby="parts">{title}<p>{said}.</p></section>'
    head = ("part", "probable cause", "error", "rounding error", "ratio")
    floor = ""
    if report.noise_floor is not None:
        floor = f"<p>{plain(sentence(noise_line(report)))}.</p>"
    pictures = "".join(
        scrolling(picture, f"Picture of the parts of each {kind}")
        for kind, picture in parts_pictures(local).items()
    )
    return (
        f'<section aria-labelledby="parts">{title}<p>{plain(sentence(parts_line(report)))}. '
        "Each part runs on the states that the original computes before it, so that errors of "
        "earlier parts do not count. An error is the distance from what the original computes, "
        "relative to its length, for the token where that is largest.</p>"
        f"{floor}{pictures}{parts_legend() if pictures else ''}"
        f"{scrolling(table(head, part_rows(local), 'parts'), 'Table of the parts')}</section>"
    )


def _drift(report: LogitReport) -> str:
    drift = report.drift
    if drift is None:
        return ""
    if drift.tolerance is None:
        verdict = "Values are rounded, so there is no tolerance for the layers."
    elif drift.first is None:
        verdict = f"Every layer is within the tolerance of {drift.tolerance:.0e}."
    else:
        verdict = (
            f"The first beyond the tolerance of {drift.tolerance:.0e} is "
            f"<b>{escape(drift.first)}</b>."
        )
    return (
        '<section aria-labelledby="drift"><h2 id="drift">Drift by layer</h2>'
        f"<p>{verdict} Drift is the distance between the hidden states of the two models behind a "
        "layer, relative to their length, for the token where that is largest. Before the output "
        f"head it is <b>{figure(drift.final_norm)}</b>.</p>"
        f"{scrolling(drift_plot(drift), 'Plot of the drift by layer')}</section>"
    )


def _worst(report: LogitReport) -> str:
    if not report.worst:
        return ""
    by_name = {one.name: one for one in report.checked}
    names = f"original, {report.reference}\nconverted, {report.layout}"
    tables = "".join(
        prediction(one, number, by_name.get(one.behind.sequence), names)
        for number, one in enumerate(report.worst, 1)
    )
    return (
        '<section aria-labelledby="worst"><h2 id="worst">Worst tokens</h2>'
        "<p>The tokens that each model predicts with the highest probabilities after the marked "
        "one.</p>"
        f'<div class="predictions">{tables}</div></section>'
    )


def _tokens(report: LogitReport) -> str:
    if not report.checked:
        return ""
    span = log_range([kl for one in report.checked for kl in one.compared], report.limit)
    rows = "".join(_sequence_row(number, one) for number, one in enumerate(report.checked))
    table = (
        '<table><thead><tr><th scope="col">sequence</th><th scope="col" class="number">tokens</th>'
        '<th scope="col" class="number">largest KL</th><th scope="col" class="number">position</th>'
        f'<th scope="col" class="number">mean KL</th></tr></thead><tbody>{rows}</tbody></table>'
    )
    texts = "".join(
        _sequence(number, one, span, report.limit) for number, one in enumerate(report.checked)
    )
    return (
        '<section aria-labelledby="tokens"><h2 id="tokens">Every token</h2>'
        f"{scrolling(table, 'Table of the sequences')}{legend(report.limit)}{texts}</section>"
    )


def _sequence_row(number: int, one: CheckedSequence) -> str:
    at = "" if one.worst is None else str(one.worst)
    return (
        f'<tr><th scope="row"><a href="#sequence-{number}">{plain(one.name)}</a></th>'
        f'<td class="number">{len(one.ids):,}</td><td class="number">{figure(one.kl_max)}</td>'
        f'<td class="number">{at}</td><td class="number">{figure(one.kl_mean)}</td></tr>'
    )


def _sequence(number: int, one: CheckedSequence, span: LogRange, limit: float) -> str:
    plot = scrolling(kl_plot(one, span, limit), f"Plot of the KL of sequence {number + 1}")
    return (
        f'<article class="sequence"><h3 id="sequence-{number}">{plain(one.name)}</h3>'
        f"{plot}{strip(one, limit)}</article>"
    )


def _run(report: LogitReport) -> str:
    how = (
        "both models loaded completely"
        if report.whole_model
        else "layer by layer, both models at the same time"
    )
    entries = (
        ("original", report.original),
        ("converted", report.checkpoint),
        ("reference", f"{report.reference}, float32, {report.reference_device}"),
        ("native", native_line(report)),
        ("native devices", str(report.native_devices)),
        ("processes", str(report.processes)),
        ("run", how),
        ("limit", f"{report.limit:.0e} nats for the worst token: {report.limit_reason}"),
        ("compared", compared_line(report)),
        *([("not run", not_run_line(report))] if report.towers_not_run else []),
        ("arithmetic", arithmetic_line(report)),
        ("time", f"{report.seconds:.1f} s"),
        ("memory", f"{report.peak_memory_bytes / 1e9:.1f} GB at most"),
        *(("rounded", row) for row in report.lossy_rows),
    )
    settings = "".join(
        f"<div><dt>{name}</dt><dd>{plain(value)}</dd></div>" for name, value in entries
    )
    versions = table(("package", "version"), report.versions.items())
    prints = table(
        ("model", "file", "what is hashed", "sha256"),
        ((one.side, one.file, one.what, one.sha256) for one in report.fingerprints),
    )
    return (
        '<section aria-labelledby="run"><h2 id="run">How it was run</h2>'
        f'<dl class="settings">{settings}</dl><h3>Versions</h3>{scrolling(versions, "Versions")}'
        f'<h3>Files</h3>{scrolling(prints, "Checksums of files")}<p class="note">Of a file of '
        "weights its header is hashed, and samples: 64 pieces spread evenly over the file.</p>"
        "</section>"
    )
