"""The report of a study, in HTML and in Markdown."""

import base64
import html
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from unimoe_model.evaluation.files import write_whole
from unimoe_model.study import verdicts
from unimoe_model.study.plan import Study
from unimoe_model.study.plots import save_loss_curves, save_routing_map
from unimoe_model.study.record import Record
from unimoe_model.study.tables import Rows, arms_table, claims_table
from unimoe_model.study.verdicts import Results, findings

_STYLE = """\
body { font: 16px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem }
table { border-collapse: collapse; display: block; overflow-x: auto; font-size: 14px }
th, td { border: 1px solid #ccc; padding: .3rem .6rem; text-align: left; vertical-align: top }
th { background: #f3f4f6 }
img { max-width: 100%; height: auto }
"""


@dataclass(frozen=True)
class Part:
    """A section of the report.

    Attributes:
        heading: heading; empty for none.
        text: Markdown paragraphs.
        rows: a table, or None.
        picture: a PNG file and its description, or None.
    """

    heading: str = ""
    text: str = ""
    rows: Rows | None = None
    picture: tuple[Path, str] | None = None


def write_report(study: Study, results: Results, output: Path) -> list[Path]:
    """Writes `report.html` with its plots, and the page of the study if it has one.

    Args:
        study: the study.
        results: complete runs.
        output: folder of the report.

    Returns:
        Paths of the report and the page.

    Raises:
        ValueError: If no run is complete.
        ModuleNotFoundError: If matplotlib is not installed.
    """
    if not results:
        raise ValueError(f"study ({study.path}) has no finished runs to report")
    output.mkdir(parents=True, exist_ok=True)
    parts = list(_parts(study, results, output))
    files = [output / "report.html"]
    write_whole(files[0], _html(study.title, parts))
    if study.page is not None:
        pictures = study.page.parent / "images"
        pictures.mkdir(parents=True, exist_ok=True)
        for part in parts:
            if part.picture:
                target = pictures / f"study-{part.picture[0].name}"
                target.write_bytes(part.picture[0].read_bytes())
        write_whole(study.page, _markdown(study.title, parts))
        files.append(study.page)
    return files


def page_of(study: Study, results: Results, pictures: Path) -> str:
    """Returns the page of a study in Markdown.

    Args:
        study: the study.
        results: complete runs.
        pictures: folder for the plots.
    """
    return _markdown(study.title, list(_parts(study, results, pictures)))


def _parts(study: Study, results: Results, output: Path) -> Iterator[Part]:
    yield Part(text=study.introduction)
    found = findings(study, results)
    counts = [
        f"{sum(own.verdict == name for own in found)} {name}"
        for name in (verdicts.SUPPORTED, verdicts.NOT_SUPPORTED, verdicts.NOT_DECIDED)
    ]
    yield Part(
        "Claims",
        f"{len(found)} claims: {', '.join(counts)}.\n\n{_rule(study)}",
        claims_table(study, found),
    )
    curves = {
        study.arms[arm].label: [record.losses for record in results[arm].values()]
        for arm in study.curves
        if arm in results
    }
    if curves:
        path = output / "loss.png"
        save_loss_curves(path, curves)
        text = "Training loss, moving average; bands are one standard deviation over seeds."
        yield Part("Loss", text, picture=(path, "Training loss of each arm"))
    for table in study.tables:
        yield Part(table.title, table.text, arms_table(study, table, results))
    for arm in study.maps:
        if arm in results:
            path = output / f"routing-{arm}.png"
            save_routing_map(path, list(results[arm].values()))
            label = study.arms[arm].label
            text = "Share of each modality's routed rows that an expert takes, all seeds together."
            yield Part(f"Routing: {label}", text, picture=(path, f"Routing of {label}"))
    yield Part("Limits", study.limits)
    yield Part("Runs", _runs(study, results))


def _rule(study: Study) -> str:
    return f"""\
A claim is *supported* if p, adjusted by Holm's method for all {len(study.claims)} claims, is at
most {study.alpha:g} and the mean difference is at least as large as the study requires in the
claimed direction; *not supported* if the confidence interval excludes a difference of that size;
otherwise *not decided*. p is one-sided, of the exact paired permutation test over seeds."""


def _runs(study: Study, results: Results) -> str:
    records = [record for own in results.values() for record in own.values()]
    trained: dict[tuple[int, str, str], float] = {}
    for record in records:
        for stage, seconds in record.seconds.items():
            own = record.hash if stage == record.stage else ""
            trained[record.seed, stage, own] = seconds
    hours = sum(trained.values()) / 3600
    machines = sorted({f"{r.machine}, {r.precision}, {_code(r)}" for r in records})
    done = f"{len(records)} of {len(study.runs())} runs are done: {hours:.1f} hours of training."
    return "\n".join([done, "", *(f"- {machine}" for machine in machines)])


def _code(record: Record) -> str:
    return f"unimoe {record.version}{record.commit and f' at {record.commit}'}"


def _markdown(title: str, parts: Sequence[Part]) -> str:
    lines = [f"# {title}", ""]
    for part in parts:
        if part.heading:
            lines += [f"## {part.heading}", ""]
        if part.text:
            lines += [part.text.strip(), ""]
        if part.rows:
            lines += [_row(part.rows.head), _row(["---"] * len(part.rows.head))]
            lines += [*map(_row, part.rows.body), ""]
        if part.picture:
            path, alt = part.picture
            lines += [f"![{alt}](images/study-{path.name})", ""]
    return "\n".join(lines).rstrip() + "\n"


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def _html(title: str, parts: Sequence[Part]) -> str:
    body = [f"<h1>{html.escape(title)}</h1>"]
    for part in parts:
        if part.heading:
            body.append(f"<h2>{html.escape(part.heading)}</h2>")
        body += [_paragraph(text) for text in part.text.strip().split("\n\n") if text]
        if part.rows:
            body.append(_html_table(part.rows))
        if part.picture:
            path, alt = part.picture
            data = base64.b64encode(path.read_bytes()).decode()
            body.append(f'<img alt="{html.escape(alt)}" src="data:image/png;base64,{data}">')
    head = f'<meta charset="utf-8"><title>{html.escape(title)}</title><style>{_STYLE}</style>'
    return (
        f'<!doctype html><html lang="en"><head>{head}</head><body>{"".join(body)}</body></html>\n'
    )


def _paragraph(text: str) -> str:
    lines = text.splitlines()
    if all(line.startswith("- ") for line in lines):
        return f"<ul>{''.join(f'<li>{_inline(line[2:])}</li>' for line in lines)}</ul>"
    return f"<p>{_inline(' '.join(lines))}</p>"


def _inline(text: str) -> str:
    """Escapes text and converts emphasis."""
    pieces = html.escape(text).split("*")
    if len(pieces) % 2 == 0:
        return "*".join(pieces)
    return "".join(f"<em>{one}</em>" if i % 2 else one for i, one in enumerate(pieces))


def _html_table(rows: Rows) -> str:
    head = "".join(f"<th>{html.escape(cell)}</th>" for cell in rows.head)
    body = "".join(
        f"<tr>{''.join(f'<td>{html.escape(cell)}</td>' for cell in row)}</tr>" for row in rows.body
    )
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
