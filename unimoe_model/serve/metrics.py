"""Metrics of a server in Prometheus' text format."""

import threading
from collections import Counter
from collections.abc import Callable, Sequence

_SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_RATES = (1, 2, 5, 10, 20, 50, 100, 200, 500)


class Histogram:
    """A cumulative histogram.

    Args:
        bounds: upper bounds of the buckets, in ascending order.
    """

    def __init__(self, bounds: Sequence[float]):
        self._bounds = bounds
        self._counts = [0] * len(bounds)
        self._sum, self._count = 0.0, 0

    def observe(self, value: float) -> None:
        """Adds a value."""
        self._sum += value
        self._count += 1
        for index, bound in enumerate(self._bounds):
            self._counts[index] += value <= bound

    def lines(self, name: str) -> list[str]:
        """Returns its lines in the text format, for a metric of the given name."""
        buckets = [
            f'{name}_bucket{{le="{bound:g}"}} {count}'
            for bound, count in zip(self._bounds, self._counts, strict=True)
        ]
        total = f'{name}_bucket{{le="+Inf"}} {self._count}'
        return [*buckets, total, f"{name}_sum {self._sum:g}", f"{name}_count {self._count}"]


class Metrics:
    """The metrics that `/metrics` returns.

    Args:
        waiting: returns the number of requests that wait for their reply to begin.
        admitted: returns the number of all admitted requests.
    """

    def __init__(self, waiting: Callable[[], int], admitted: Callable[[], int]):
        self._waiting, self._admitted = waiting, admitted
        self._lock = threading.Lock()
        self._endings: Counter[str] = Counter()
        self._tokens: Counter[str] = Counter()
        self._first_token = Histogram(_SECONDS)
        self._rate = Histogram(_RATES)

    def ended(self, how: str) -> None:
        """Counts an ended request by outcome: `"end"`, `"length"`, `"stopped"`, `"refused"`, ..."""
        with self._lock:
            self._endings[how] += 1

    def replied(
        self, prompt: int, generated: int, first_token: float | None, seconds: float
    ) -> None:
        """Counts the tokens of a reply and records its latency and rate.

        Args:
            prompt: tokens of the prompt.
            generated: tokens of the reply.
            first_token: seconds from the request to the first piece of text, including the queue.
            seconds: seconds from the first piece to the end.
        """
        with self._lock:
            self._tokens["prompt"] += prompt
            self._tokens["generated"] += generated
            if first_token is not None:
                self._first_token.observe(first_token)
            if generated > 1 and seconds > 0:
                self._rate.observe((generated - 1) / seconds)

    def text(self) -> str:
        """Returns all metrics in Prometheus' text format."""
        with self._lock:
            families = [
                ("queue_waiting", "gauge", "Requests that wait for their turn.", None),
                ("queue_admitted", "gauge", "Requests that wait or are replied to.", None),
                ("requests_total", "counter", "Requests by how they ended.", None),
                ("tokens_total", "counter", "Tokens of prompts and replies.", None),
                (
                    "time_to_first_token_seconds",
                    "histogram",
                    "From the request to the first text, the queue included.",
                    self._first_token,
                ),
                (
                    "tokens_per_second",
                    "histogram",
                    "Tokens a second of a reply, after the first.",
                    self._rate,
                ),
            ]
            samples = {
                "queue_waiting": [f"unimoe_queue_waiting {self._waiting()}"],
                "queue_admitted": [f"unimoe_queue_admitted {self._admitted()}"],
                "requests_total": [
                    f'unimoe_requests_total{{ending="{how}"}} {count}'
                    for how, count in sorted(self._endings.items())
                ],
                "tokens_total": [
                    f'unimoe_tokens_total{{of="{of}"}} {self._tokens[of]}'
                    for of in ("prompt", "generated")
                ],
            }
            lines = []
            for name, kind, text, histogram in families:
                full = f"unimoe_{name}"
                lines += [f"# HELP {full} {text}", f"# TYPE {full} {kind}"]
                lines += histogram.lines(full) if histogram else samples[name]
        return "\n".join(lines) + "\n"
