"""A conversation in the terminal, run by `unimoe chat`."""

import re
import shlex
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from unimoe_model.chat.attachments import Attachment, attach
from unimoe_model.chat.conversation import ContextFullError, Conversation
from unimoe_model.configuration import MEDIA_KINDS
from unimoe_model.user_errors import USER_ERRORS

HELP = """\
/image FILE, /video FILE, /speech FILE, /audio FILE
          attach a file to the next message, as often as needed;
          an empty line sends what is attached without words
/reset    forget the conversation and what is attached
/help     show this
/quit     end, as Ctrl-D does; Ctrl-C stops a reply"""
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


class Chat:
    """Passes a user's lines to a conversation and prints the replies.

    Replies go to stdout and everything else to stderr, so that scripts read replies alone.

    Args:
        conversation: the conversation to continue.
        frame_seed: seed for drawing the frames of videos at random; None spaces them evenly.
    """

    def __init__(self, conversation: Conversation, frame_seed: int | None = None):
        self.conversation = conversation
        self._frame_seed = frame_seed
        self._attached: list[Attachment] = []
        self._is_interactive = sys.stdin.isatty()

    def run(self) -> None:
        """Processes lines until the end of the input or `/quit`."""
        if self._is_interactive:
            _edit_lines()
            _note("/help lists the commands, Ctrl-D ends")
        while (line := self._line()) is not None and line != "/quit":
            try:
                self._take(line)
            except ContextFullError as error:
                _note(f"{error}; /reset forgets the conversation")
            except USER_ERRORS as error:
                _note(" ".join(str(error).split()))
            except KeyboardInterrupt:
                if not self._is_interactive:
                    raise
                _note("")

    def _line(self) -> str | None:
        if not self._is_interactive:
            line = sys.stdin.readline()
            return line.strip() if line else None
        while True:
            try:
                return input("> ").strip()
            except KeyboardInterrupt:
                _note("")
            except EOFError:
                _note("")
                return None

    def _take(self, line: str) -> None:
        command, _, argument = line.partition(" ")
        if not command.startswith("/"):
            if line or self._attached:
                self._reply(line)
        elif command[1:] in MEDIA_KINDS:
            self._attach(command[1:], argument.strip())
        elif line == "/reset":
            self.conversation.reset()
            self._attached = []
            _note("the conversation is forgotten")
        elif line == "/help":
            _note(HELP)
        else:
            raise ValueError(f"unknown command {line}; /help lists them")

    def _attach(self, kind: str, name: str) -> None:
        if not name:
            raise ValueError(f"/{kind} requires a file: /{kind} FILE")
        path = _path(name)
        found = attach(self.conversation.processor, kind, path, self._frame_seed)
        self._attached.append(found)
        _note(found.description)

    def _reply(self, text: str) -> None:
        names = {"images": "image", "videos": "video", "speech": "speech", "audio": "audio"}
        media = {
            name: [item.media for item in self._attached if item.kind == kind]
            for name, kind in names.items()
        }
        conversation, has_words = self.conversation, False
        try:
            with self._interrupts(conversation.stop):
                for piece in conversation.reply(text, **media):
                    has_words = True
                    self._show(piece)
        finally:
            if has_words:
                self._show("\n")
        if has_words:
            self._attached = []
        ending = conversation.ending
        if ending == "length":
            _note(f"[cut off after {conversation.max_new_tokens} tokens]")
        elif ending == "context":
            _note(f"[cut off: the context of {conversation.context} tokens is full; /reset]")
        elif ending == "stopped":
            _note("[stopped]")
        if not has_words:
            _note("[no words; the message is forgotten, what is attached stays so]")

    @contextmanager
    def _interrupts(self, stop: Callable[[], None]) -> Iterator[None]:
        """In a terminal Ctrl-C stops only the reply; in a script it ends the chat."""
        if not self._is_interactive:
            yield
            return
        before = signal.signal(signal.SIGINT, lambda *_: stop())
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)

    def _show(self, text: str) -> None:
        # Control characters in generated text must not reach the terminal.
        text = _CONTROL.sub("\N{REPLACEMENT CHARACTER}", text) if sys.stdout.isatty() else text
        print(text, end="", flush=True)


def _note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _path(name: str) -> Path:
    """The path as typed, or as pasted by a terminal: quoted or with escaped spaces."""
    if not Path(name).exists():
        with suppress(ValueError):
            name = " ".join(shlex.split(name))
    return Path(name).expanduser()


def _edit_lines() -> None:
    """Enables line editing, the history of this session, and completion of file names."""
    with suppress(ImportError):
        import readline

        readline.set_completer_delims(" \t\n")
        readline.parse_and_bind("tab: complete")
