"""Progress of worker processes, sent through a queue."""

from unimoe_model.training.progress import ProgressReporter


class QueueReporter:
    """Sends every call as a message, for `replay` in the main process."""

    def __init__(self, name: str, queue):
        self._name = name
        self._queue = queue

    def start(self, stage: str, total: int, done: int) -> None:
        """Sends the start of a stage."""
        self._queue.put((self._name, "start", (stage, total, done), {}))

    def advance(self, steps: int, **figures: str) -> None:
        """Sends steps."""
        self._queue.put((self._name, "advance", (steps,), figures))

    def finish(self) -> None:
        """Sends the end of a stage."""
        self._queue.put((self._name, "finish", (), {}))

    def say(self, text: str) -> None:
        """Sends a line."""
        self._queue.put((self._name, "say", (text,), {}))


def replay(message: tuple, reporters: dict[str, ProgressReporter]) -> None:
    """Passes a message of a `QueueReporter` to the reporter of its arm."""
    name, call, arguments, figures = message
    getattr(reporters[name], call)(*arguments, **figures)
