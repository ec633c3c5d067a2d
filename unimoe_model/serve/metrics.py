"""Counters of a server in Prometheus' text format."""

import threading
from collections import Counter
from collections.abc import Callable, Sequence

_SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_RATES = (1, 2, 5, 10, 20, 50, 100, 200, 500)


class Histogram:
    """Numbers by upper bounds.

    Args:
        bounds: in ascending order.
    """

    def __init__(self, bounds: Sequence[float]):
        self._bounds = bounds
        self._counts = [0] * len(bounds)
        self._sum, self._count = 0.0, 0

    def observe(self, value: float) -> None:
        """Counts a number."""
        self._sum += value
        self._count += 1
        for index, bound in enumerate(self._bounds):
            self._counts[index] += value <= bound

    def lines(self, name: str) -> list[str]:
        """Its samples."""
        buckets = [
            f'{name}_bucket{{le="{bound:g}"}} {count}'
            for bound, count in zip(self._bounds, self._counts, strict=True)
        ]
        total = f'{name}_bucket{{le="+Inf"}} {self._count}'
        return [*buckets, total, f"{name}_sum {self._sum:g}", f"{name}_count {self._count}"]


class Metrics:
    """What `/metrics` tells.

    Args:
        waiting: gives the number of requests in line behind the one that is replied to.
        admitted: gives the number of all that are here.
    """

    def __init__(self, waiting: Callable[[], int], admitted: Callable[[], int]):
        self._waiting, self._admitted = waiting, admitted
        self._lock = threading.Lock()
        self._endings: Counter[str] = Counter()
        self._tokens: Counter[str] = Counter()
        self._first_token = Histogram(_SECONDS)
        self._rate = Histogram(_RATES)

    def ended(self, how: str) -> None:
        """Counts a request: `"end"`, `"length"`, `"stopped"`, `"refused"`, `"full"` and so on."""
        with self._lock:
            self._endings[how] += 1

    def replied(
        self, prompt: int, generated: int, first_token: float | None, seconds: float
    ) -> None:
        """Counts tokens of a reply.

        Args:
            prompt: tokens of the prompt.
            generated: tokens of the reply.
            first_token: seconds from the request to the first piece of text, the queue included.
            seconds: from the first piece to the end.
        """
        with self._lock:
            self._tokens["prompt"] += prompt
            self._tokens["generated"] += generated
            if first_token is not None:
                self._first_token.observe(first_token)
            if generated > 1 and seconds > 0:
                self._rate.observe((generated - 1) / seconds)

    def text(self) -> str:
        """All of it, as Prometheus reads it."""
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
