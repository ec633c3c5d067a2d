"""Tables of the committed metrics, in `docs/smol.md` between two comments.

python -m examples.smol.page runs/smol/moe-0/results.json  # adds a run, and writes the page
"""

import argparse
import json
import sys
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from examples.demo.exit_code import exit_code_of
from unimoe_kernels import atomic_write

HERE = Path(__file__).parent
METRICS = HERE / "metrics"
PAGE = HERE.parents[1] / "docs" / "smol.md"
START, END = "<!-- tables of examples/smol/metrics -->", "<!-- end of tables -->"

Runs = Mapping[str, Sequence[dict[str, Any]]]


def read_metrics(folder: Path = METRICS) -> dict[str, list[dict[str, Any]]]:
    """Reads the results of committed runs, by arm, ordered by seed."""
    found = [json.loads(path.read_text(encoding="utf-8")) for path in folder.glob("*.json")]
    runs: dict[str, list[dict[str, Any]]] = {}
    for run in sorted(found, key=lambda run: (run["arm"] != "moe", run["arm"], run["seed"])):
        runs.setdefault(run["arm"], []).append(run)
    return runs


def add_run(results: Path, folder: Path = METRICS) -> Path:
    """Copies the results of a run to the committed ones; returns the new file."""
    run = json.loads(results.read_text(encoding="utf-8"))
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / f"{run['arm']}-{run['seed']}.json"
    text = json.dumps(run, ensure_ascii=False, separators=(",", ":"))
    with atomic_write(target) as partial:
        partial.write_text(f"{text}\n", encoding="utf-8")
    return target


def tables(runs: Runs) -> str:
    """Returns the tables of accuracy, perplexity, replies and time as Markdown."""
    parts = [
        "Exact match on held-out items, %; mean and standard deviation over seeds.",
        _markdown(*_accuracy(runs)),
        "The right name among the five likeliest of all names, %.",
        _markdown(*_ranks(runs)),
        "Perplexity of held-out text, and its change from that of SmolLM2.",
        _markdown(*_perplexity(runs)),
        "Routed experts of a token, without null and shared ones, and the share of each, %.",
        _markdown(*_routing(runs)),
        "Replies to questions about pictures, and training.",
        _markdown(*_times(runs)),
    ]
    return "\n\n".join(parts)


def chats(run: Mapping[str, Any]) -> str:
    """Returns the chat prompts of a run with the replies before and after as a block of text."""
    parts = []
    for own in run["text"]["chat"]:
        lines = [own["prompt"]]
        for name, reply in (("  SmolLM2: ", own["before"]), ("  model:   ", own["after"])):
            lines += textwrap.wrap(name + reply, 96, subsequent_indent=" " * len(name))
        parts.append("\n".join(lines))
    return "```text\n" + "\n\n".join(parts) + "\n```"


def with_tables(page: str, runs: Runs) -> str:
    """Returns a page with its tables replaced.

    Raises:
        ValueError: If the page does not have the two comments, in order.
    """
    before, start, rest = page.partition(START)
    _, end, after = rest.partition(END)
    if not start or not end:
        raise ValueError(f"the page must have {START} and, after it, {END}")
    own = tables(runs)
    if "moe" in runs:
        first = runs["moe"][0]
        own += f"\n\nReplies to ten held-out prompts, seed {first['seed']}:\n\n{chats(first)}"
    return f"{before}{START}\n\n{own}\n\n{END}{after}"


def _accuracy(runs: Runs) -> tuple[list[str], list[list[str]]]:
    first = next(iter(runs.values()))[0]
    head = ["task", "items", *(_arm(arm, own) for arm, own in runs.items()), "start", "blind"]
    body = []
    for task, one in first["tasks"].items():
        row = [task, str(one["items"])]
        row += [_spread([r["tasks"][task]["accuracy"] for r in own], 100) for own in runs.values()]
        row += [_percent(one.get(key)) for key in ("start", "blind", "probe")]
        body.append(row)
    return [*head, "probe"], body


def _ranks(runs: Runs) -> tuple[list[str], list[list[str]]]:
    first = next(iter(runs.values()))[0]
    head = ["task", *(_arm(arm, own) for arm, own in runs.items()), "probe"]
    body = []
    for task, one in first["tasks"].items():
        if "top5" in one:
            row = [_spread([r["tasks"][task]["top5"] for r in own], 100) for own in runs.values()]
            body.append([task, *row, _percent(one.get("probe_top5"))])
    return head, body


def _perplexity(runs: Runs) -> tuple[list[str], list[list[str]]]:
    first = next(iter(runs.values()))[0]["text"]["perplexity"]
    head = ["text", "SmolLM2", *(_arm(arm, own) for arm, own in runs.items())]
    body = []
    for kind, one in first.items():
        row = [kind, f"{one['before']:.2f}"]
        for own in runs.values():
            found = [run["text"]["perplexity"][kind] for run in own]
            changes = ", ".join(f"{100 * (p['after'] / p['before'] - 1):+.1f} %" for p in found)
            row.append(f"{mean(p['after'] for p in found):.2f} ({changes})")
        body.append(row)
    return head, body


def _routing(runs: Runs) -> tuple[list[str], list[list[str]]]:
    routed = {arm: own for arm, own in runs.items() if "routing" in own[0]}
    experts = next(iter(routed.values()))[0]["experts"] if routed else []
    body = []
    for arm, own in routed.items():
        for modality in own[0]["routing"]:
            found = [run["routing"][modality] for run in own if modality in run["routing"]]
            row = [f"{_arm(arm, own)}: {modality}", _spread([f["per_token"] for f in found], 1, 2)]
            columns = zip(*(f["shares"] for f in found), strict=True)
            body.append([*row, *(f"{100 * mean(shares):.0f}" for shares in columns)])
    return ["tokens", "experts", *experts], body


def _times(runs: Runs) -> tuple[list[str], list[list[str]]]:
    head = ["run", "first word, s", "words per second", "training, minutes", "tokens", "machine"]
    body = []
    for arm, own in runs.items():
        for run in own:
            stages = run["stages"].values()
            speed = run.get("reply", {})
            row = [f"{arm}, seed {run['seed']}"]
            for key, digits in (("first_word", 2), ("words_per_second", 1)):
                row.append(f"{speed[key]:.{digits}f}" if key in speed else "")
            row.append(f"{sum(stage['seconds'] for stage in stages) / 60:.0f}")
            row += [f"{sum(stage['tokens'] for stage in stages):,}", run["machine"]]
            body.append(row)
    return head, body


def _arm(arm: str, runs: Sequence[Any]) -> str:
    return f"{arm}, {len(runs)} seed{'s' * (len(runs) != 1)}"


def _spread(values: Sequence[float], factor: float, digits: int = 1) -> str:
    own = [factor * value for value in values]
    spread = f" ± {stdev(own):.{digits}f}" if len(own) > 1 else ""
    return f"{mean(own):.{digits}f}{spread}"


def _percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.1f}"


def _markdown(head: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    rows = [head, ["---"] * len(head), *body]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def main() -> int:
    """Adds the runs given on the command line, and writes the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", type=Path, nargs="*", help="results.json of finished runs")
    options = parser.parse_args()

    def write() -> None:
        for results in options.results:
            print(add_run(results))
        page = with_tables(PAGE.read_text(encoding="utf-8"), read_metrics())
        with atomic_write(PAGE) as partial:
            partial.write_text(page, encoding="utf-8")

    return exit_code_of("page", write)


if __name__ == "__main__":
    sys.exit(main())
