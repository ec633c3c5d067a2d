"""Replies to clients: one at a time, cancelled on disconnect; another process decodes media."""

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from unimoe_model.chat.attachments import attach_read
from unimoe_model.chat.conversation import Conversation
from unimoe_model.chat.sampling import Sampling
from unimoe_model.data.encoded_media import EncodedMedia
from unimoe_model.generation import Answerer
from unimoe_model.serve.decoding import MediaDecoder
from unimoe_model.serve.limits import Limits
from unimoe_model.serve.metrics import Metrics
from unimoe_model.serve.reply_queue import Place, ReplyQueue, Ticket
from unimoe_model.serve.routing_map import RoutingMap, routing_recorded

ARGUMENTS = {"image": "images", "video": "videos", "speech": "speech", "audio": "audio"}
"""Argument of `Conversation.reply` for each media kind."""


@dataclass(frozen=True)
class MediaFile:
    """A client's file before decoding, as bytes or a path."""

    kind: str
    content: bytes | Path


@dataclass(frozen=True)
class Message:
    """A message of the user."""

    text: str
    files: tuple[MediaFile, ...] = ()


@dataclass(frozen=True)
class Attached:
    """Event: a media item was decoded, to `read`, and encoded."""

    kind: str
    description: str
    read: np.ndarray


@dataclass(frozen=True)
class Piece:
    """Event: a piece of the reply's text."""

    text: str


@dataclass(frozen=True)
class Ended:
    """Event: the reply has ended.

    Attributes:
        how: see `Conversation.ending`, or `"time"` if the time limit was reached.
        prompt_tokens: tokens of the whole prompt, including soft tokens.
        reply_tokens: tokens of the reply.
        routing: the experts chosen for the computed tokens; None for a dense model.
    """

    how: str
    prompt_tokens: int
    reply_tokens: int
    routing: RoutingMap | None


Event = Place | Attached | Piece | Ended


class Replies:
    """A model, its decoder and its queue.

    Args:
        answerer: model and processor.
        limits: limits of requests.
        system: system message; None for the processor's.
        max_new_tokens: maximum length of a reply.
        sampling: default sampling options, which a request can override.
        frame_seed: seed of random video frames; None for evenly spaced frames.
        generate: see `Conversation`.

    Raises:
        ValueError: If an option is out of range.
    """

    def __init__(
        self,
        answerer: Answerer,
        limits: Limits,
        *,
        system: str | None = None,
        max_new_tokens: int = 512,
        sampling: Sampling | None = None,
        frame_seed: int | None = None,
        generate: Callable | None = None,
    ):
        self.model, self.processor = answerer.model, answerer.processor
        self.limits = limits
        self.max_new_tokens = max_new_tokens
        self.sampling = sampling or Sampling()
        self.queue = ReplyQueue(limits.queue)
        self.metrics = Metrics(lambda: self.queue.waiting, lambda: len(self.queue))
        self._system = system
        self._generate = generate
        self._decoder = MediaDecoder(self.processor, limits, frame_seed)
        self._executor = ThreadPoolExecutor(1, "reply")
        self._job: _Job | None = None
        self.conversation()  # raises for options that are out of range

    def start(self) -> None:
        """Starts the decoding process."""
        self._decoder.start()

    def close(self) -> None:
        """Stops the current reply, waits for its end, and ends the decoding process.

        May be called more than once.
        """
        job = self._job
        if job is not None:
            job.stop()
        self._decoder.close()
        self._executor.shutdown(wait=True, cancel_futures=True)

    def conversation(
        self,
        system: str | None = None,
        max_new_tokens: int | None = None,
        sampling: Sampling | None = None,
    ) -> Conversation:
        """Returns a new conversation; options that are None are the server's."""
        return Conversation(
            self.model,
            self.processor,
            system=self._system if system is None else system,
            max_new_tokens=min(max_new_tokens or self.max_new_tokens, self.max_new_tokens),
            sampling=sampling or self.sampling,
            generate=self._generate,
        )

    async def reply(
        self,
        ticket: Ticket,
        conversation: Conversation,
        message: Message,
        earlier: Sequence[tuple[Message, str]] = (),
        stopped: threading.Event | None = None,
    ) -> AsyncIterator[Event]:
        """Waits for the ticket's turn and replies; closing the iterator stops the reply.

        Args:
            ticket: ticket of the queue, which it leaves at the end.
            conversation: conversation that generates the reply.
            message: message of the user.
            earlier: previous turns, from which the conversation is restored if given.
            stopped: prevents the reply if set before it begins. While the reply is generated,
                `Conversation.stop` ends it.

        Yields:
            Places in the queue, then the events of the reply.

        Raises:
            ContextFullError: If the conversation does not fit in the context.
            ValueError: If a file cannot be decoded, or messages are empty or too long.
        """
        admitted = time.monotonic()
        job = None
        try:
            texts = [text for said, replied in earlier for text in (said.text, replied)]
            self.require_length([*texts, message.text])
            async for place in ticket.turn():
                yield place
            stopped = stopped or threading.Event()
            job = _Job(self, conversation, message, earlier, asyncio.get_running_loop(), stopped)
            running = asyncio.get_running_loop().run_in_executor(self._executor, job.run)
            self._job = job
            first = None
            while (event := await job.events.get()) is not None:
                now = time.monotonic()
                if isinstance(event, Piece) and first is None:
                    first = now
                if isinstance(event, Ended):
                    self.metrics.ended(event.how)
                    self.metrics.replied(
                        event.prompt_tokens,
                        event.reply_tokens,
                        None if first is None else first - admitted,
                        0.0 if first is None else now - first,
                    )
                yield event
            await running
        except Exception:
            self.metrics.ended("refused")
            raise
        except BaseException:  # the client has disconnected
            self.metrics.ended("gone")
            raise
        finally:
            try:
                if job is not None:
                    job.stop()
                    with suppress(Exception):
                        await asyncio.shield(running)
            finally:  # also if the wait is cancelled again
                if self._job is job:
                    self._job = None  # which holds keys and values
                ticket.leave()

    def require_length(self, texts: Sequence[str]) -> None:
        """Raises ValueError if texts together have more characters than the limit."""
        length = sum(map(len, texts))
        if length > self.limits.characters:
            raise ValueError(
                f"messages ({length:,} characters) must have at most {self.limits.characters:,}"
            )


class _Job:
    """One reply in the generating thread."""

    def __init__(
        self,
        replies: Replies,
        conversation: Conversation,
        message: Message,
        earlier: Sequence[tuple[Message, str]],
        loop: asyncio.AbstractEventLoop,
        stopped: threading.Event,
    ):
        self.events: asyncio.Queue[Event | None] = asyncio.Queue()
        self._replies = replies
        self._conversation = conversation
        self._message = message
        self._earlier = earlier
        self._loop = loop
        self._stopped = stopped
        self._is_late = False

    def stop(self) -> None:
        """Ends the reply after its current token; callable from any thread."""
        self._stopped.set()
        self._conversation.stop()

    def run(self) -> None:
        """Decodes and encodes the media, and generates the reply."""
        clock = threading.Timer(self._replies.limits.reply_seconds, self._run_out)
        clock.daemon = True
        clock.start()
        try:
            self._reply()
        finally:
            clock.cancel()
            self._give(None)

    def _run_out(self) -> None:
        self._is_late = True
        self.stop()

    def _give(self, event: Event | None) -> None:
        with suppress(RuntimeError):  # the loop is closed when the server ends
            self._loop.call_soon_threadsafe(self.events.put_nowait, event)

    def _reply(self) -> None:
        processor, conversation = self._replies.processor, self._conversation
        if self._earlier:
            turns, items = [], []
            for said, replied in self._earlier:
                media = self._encoded(said.files)
                turns.append((processor.question_turn(said.text, **media), replied))
                items += processor.question_row(said.text, **media).media
            conversation.resume(turns, items)
        media = self._encoded(self._message.files)
        if self._stopped.is_set():
            self._give(Ended("time" if self._is_late else "stopped", 0, 0, None))
            return
        with routing_recorded(self._replies.model) as record:
            for piece in self._listened(conversation.reply(self._message.text, **media)):
                self._give(Piece(piece))
        ending = conversation.ending or "end"
        if ending == "stopped" and self._is_late:
            ending = "time"
        self._give(Ended(ending, *conversation.num_tokens, record.map()))

    def _listened(self, pieces):
        # `reply` resets a stop that was requested before it.
        if self._stopped.is_set():
            self._conversation.stop()
        yield from pieces

    def _encoded(self, files: Sequence[MediaFile]) -> dict[str, list[EncodedMedia]]:
        media = {name: [] for name in ARGUMENTS.values()}
        for file in files:
            if self._stopped.is_set():
                break
            read = self._replies._decoder.read(file.kind, file.content)
            found = attach_read(self._replies.processor, file.kind, read)
            media[ARGUMENTS[file.kind]].append(found.media)
            self._give(Attached(file.kind, found.description, read))
        return media
