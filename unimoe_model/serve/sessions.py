"""Conversations of the page, one per open page, and replies to their messages."""

import threading
import time
from collections import OrderedDict
from collections.abc import AsyncIterator
from contextlib import aclosing
from dataclasses import dataclass, field

from unimoe_model.chat.conversation import Conversation
from unimoe_model.serve import page_html
from unimoe_model.serve.replies import Attached, Ended, Event, Message, Piece, Replies
from unimoe_model.serve.reply_queue import Place
from unimoe_model.user_errors import USER_ERRORS

_SHOWN_EVERY = 0.05
"""Seconds between two views of a reply: browsers cannot keep up with one view per word."""


@dataclass
class Session:
    """A conversation and the state of its page."""

    conversation: Conversation
    shown: list[str] = field(default_factory=list)
    events: AsyncIterator[Event] | None = None
    stopped: threading.Event = field(default_factory=threading.Event)

    def stop(self) -> None:
        """Ends the reply, or removes the message from the queue."""
        self.stopped.set()
        self.conversation.stop()


@dataclass(frozen=True)
class View:
    """An update of the page; parts that are None are not changed.

    Attributes:
        past: HTML of the messages before the current one.
        live: HTML of the current message and its reply.
        routing: HTML of the routing.
        refused: text of a message that is returned to the input field.
    """

    past: str | None = None
    live: str | None = None
    routing: str | None = None
    refused: str | None = None


class Sessions:
    """The conversations that are kept.

    Keys and values, which use by far the most memory, are kept only for the most recent one.

    Args:
        replies: generates the replies.
    """

    def __init__(self, replies: Replies):
        self._replies = replies
        self._sessions: OrderedDict[str, Session] = OrderedDict()
        self._latest: Session | None = None

    def __len__(self) -> int:
        """Number of conversations that are kept."""
        return len(self._sessions)

    def get(self, key: str) -> Session:
        """Returns the session of a page; a new one if there is none."""
        if key not in self._sessions:
            idle = [known for known, session in self._sessions.items() if not session.events]
            while idle and len(self._sessions) >= self._replies.limits.conversations:
                self.forget(idle.pop(0))
            self._sessions[key] = Session(self._replies.conversation())
        self._sessions.move_to_end(key)
        return self._sessions[key]

    def forget(self, key: str) -> None:
        """Ends a session, such as that of a page that was closed."""
        session = self._sessions.pop(key, None)
        if session is not None:
            session.stop()
            if self._latest is session:
                self._latest = None

    async def send(self, key: str, message: Message) -> AsyncIterator[View]:
        """Replies to a message of a page; closing the iterator stops the reply.

        Args:
            key: key of the session.
            message: message of the user.

        Yields:
            Updates of the page.
        """
        session = self.get(key)
        if session.events is not None:
            yield View(refused=message.text)
            return
        try:
            ticket = self._replies.queue.admit()
        except RuntimeError as error:
            self._replies.metrics.ended("full")
            yield View(live=page_html.failed(str(error)), refused=message.text)
            return
        session.stopped = threading.Event()
        events = self._replies.reply(ticket, session.conversation, message, stopped=session.stopped)
        session.events = events
        try:
            async with aclosing(events):
                async for view in self._views(session, message, events):
                    yield view
        except USER_ERRORS as error:
            text = " ".join(str(error).split())
            yield View(
                past="".join(session.shown), live=page_html.failed(text), refused=message.text
            )
        finally:
            session.events = None
            ticket.leave()

    async def _views(
        self, session: Session, message: Message, events: AsyncIterator[Event]
    ) -> AsyncIterator[View]:
        items, text, shown = [], "", 0.0
        said = page_html.said(message.text)
        yield View(live=said + page_html.waiting(Place(0, 0)))
        async for event in events:
            if isinstance(event, Place):
                if session.stopped.is_set():
                    yield View(live="", refused=message.text)
                    return
                yield View(live=said + page_html.waiting(event))
            elif isinstance(event, Attached):
                self._free_others(session)
                items.append(event)
                said = page_html.said(message.text, items)
                yield View(live=said + page_html.waiting(Place(0, 0)))
            elif isinstance(event, Piece):
                self._free_others(session)
                text += event.text
                now = time.monotonic()
                if now - shown < _SHOWN_EVERY:
                    continue
                shown = now
                yield View(live=said + page_html.replying(text))
            elif isinstance(event, Ended):
                session.shown.append(said + page_html.replied(text, event.how))
                routing = page_html.routing(event.routing) if event.reply_tokens else None
                yield View("".join(session.shown), "", routing)

    def _free_others(self, session: Session) -> None:
        if self._latest is not None and self._latest is not session:
            self._latest.conversation.free_cache()
        self._latest = session

    def restart(self, key: str) -> None:
        """Ends the session of a page, unless a reply is being generated."""
        session = self._sessions.get(key)
        if session is not None and session.events is None:
            self.forget(key)
