"""Parsing of requests in the OpenAI chat format; unsupported fields are refused by name."""

import base64
import binascii
import json
from dataclasses import dataclass
from typing import Any

from unimoe_model.chat.sampling import Sampling
from unimoe_model.serve.replies import MediaFile, Message

# Fields that have no effect here; other unsupported fields are refused.
_IGNORED = {
    "user",
    "metadata",
    "store",
    "service_tier",
    "prompt_cache_key",
    "prompt_cache_retention",
    "safety_identifier",
    "parallel_tool_calls",
    "reasoning_effort",
    "verbosity",
}
_SERVED = {
    "model",
    "messages",
    "stream",
    "stream_options",
    "max_tokens",
    "max_completion_tokens",
    "temperature",
    "top_p",
    "seed",
}
# Defaults of the format, which some clients send explicitly.
_NEUTRAL = {
    "n": 1,
    "presence_penalty": 0,
    "frequency_penalty": 0,
    "logprobs": False,
    "response_format": {"type": "text"},
    "modalities": ["text"],
    "tools": [],
    "tool_choice": "none",
    "logit_bias": {},
    "stop": [],
}
_URL_PARTS = {"image_url": "image", "video_url": "video"}
_SOUNDS = ("speech", "audio")


class RequestError(ValueError):
    """Raised for a request that is refused.

    Attributes:
        param: the field that caused the error.
    """

    def __init__(self, message: str, param: str | None = None):
        super().__init__(message)
        self.param = param


@dataclass(frozen=True)
class ChatRequest:
    """A valid request.

    Attributes:
        model: name of the model.
        message: last message of the user.
        earlier: turns before it.
        system: system message; None for the server's.
        max_new_tokens: maximum length of the reply; None for the server's.
        sampling: sampling options; None for the server's.
        stream: whether pieces are sent as they are generated.
        include_usage: whether a stream ends with the token counts.
    """

    model: str
    message: Message
    earlier: tuple[tuple[Message, str], ...]
    system: str | None
    max_new_tokens: int | None
    sampling: Sampling | None
    stream: bool
    include_usage: bool


def parse_request(body: bytes, most_items: int, default: Sampling) -> ChatRequest:
    """Parses a request.

    Args:
        body: JSON.
        most_items: maximum number of media items.
        default: sampling options of the server, which a request may override individually.

    Raises:
        RequestError: If the request is malformed, or uses an unsupported feature.
    """
    try:
        request = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise RequestError(f"body must be JSON: {error}") from error
    if not isinstance(request, dict):
        raise RequestError(f"body must be a JSON object, got {_shown(request)}")
    request = {name: value for name, value in request.items() if value is not None}
    for name, value in request.items():
        if name in _IGNORED | _SERVED or (name in _NEUTRAL and value == _NEUTRAL[name]):
            continue
        allowed = f"; only {json.dumps(_NEUTRAL[name])} is" if name in _NEUTRAL else ""
        raise RequestError(f"{name} ({_shown(value)}) is not served{allowed}", name)
    system, turns = _messages(request.get("messages"))
    count = sum(len(message.files) for message, _ in turns)
    if count > most_items:
        raise RequestError(
            f"messages hold {count} media; at most {most_items} are taken", "messages"
        )
    options = request.get("stream_options", {})
    if not isinstance(options, dict):
        raise RequestError(
            f"stream_options ({_shown(options)}) must be an object", "stream_options"
        )
    *earlier, (message, _) = turns
    return ChatRequest(
        model=_field(request, "model", str, ""),
        message=message,
        earlier=tuple(earlier),
        system=system,
        max_new_tokens=_most_tokens(request),
        sampling=_sampling(request, default),
        stream=_field(request, "stream", bool, False),
        include_usage=options.get("include_usage") is True,
    )


def _field(fields: dict, name: str, kind: type, default: Any = None) -> Any:
    value = fields.get(name, default)
    if value is default:
        return default
    wrong_bool = isinstance(value, bool) and kind is not bool
    if not isinstance(value, (int, float) if kind is float else kind) or wrong_bool:
        names = {str: "a string", bool: "true or false", int: "an integer", float: "a number"}
        raise RequestError(f"{name} ({_shown(value)}) must be {names[kind]}", name)
    return value


def _most_tokens(request: dict) -> int | None:
    name = "max_completion_tokens" if "max_completion_tokens" in request else "max_tokens"
    value = _field(request, name, int)
    if value is not None and value < 1:
        raise RequestError(f"{name} ({value}) must be at least 1", name)
    return value


def _sampling(request: dict, default: Sampling) -> Sampling | None:
    temperature = _field(request, "temperature", float, default.temperature)
    top_p = _field(request, "top_p", float, default.top_p)
    seed = _field(request, "seed", int, default.seed)
    if temperature == 0 or temperature is None:
        return Sampling()
    try:
        return Sampling(float(temperature), float(top_p), seed)
    except ValueError as error:
        raise RequestError(str(error), str(error).split(" ", 1)[0]) from error


def _messages(messages: Any) -> tuple[str | None, list[tuple[Message, str]]]:
    if not isinstance(messages, list) or not messages:
        raise RequestError(f"messages ({_shown(messages)}) must be a list of messages", "messages")
    system, turns, said = [], [], None
    for number, message in enumerate(messages):
        where = f"messages[{number}]"
        if not isinstance(message, dict):
            raise RequestError(f"{where} ({_shown(message)}) must be an object", where)
        role = message.get("role")
        if role in ("system", "developer") and number == len(system):
            system.append(_text(message.get("content"), where))
        elif role == "user" and said is None:
            said = _content(message.get("content"), where)
        elif role == "assistant" and said is not None:
            turns.append((said, _text(message.get("content"), where)))
            said = None
        else:
            raise RequestError(
                f"role ({_shown(role)}) of {where} is out of order: system first, then user and"
                " assistant in turn",
                where,
            )
    if said is None:
        raise RequestError("messages must end with one of the role user", "messages")
    return ("\n".join(system) if system else None), [*turns, (said, "")]


def _text(content: Any, where: str) -> str:
    message = _content(content, where)
    if message.files:
        raise RequestError(f"{where} holds media; only messages of the role user may", where)
    return message.text


def _content(content: Any, where: str) -> Message:
    if isinstance(content, str):
        return Message(content)
    if not isinstance(content, list):
        raise RequestError(f"content ({_shown(content)}) of {where} must be text or a list", where)
    texts, files = [], []
    for number, part in enumerate(content):
        place = f"{where}.content[{number}]"
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "text" and isinstance(part.get("text"), str):
            texts.append(part["text"])
        elif kind in _URL_PARTS and isinstance(part.get(kind), dict):
            files.append(MediaFile(_URL_PARTS[kind], _data_uri(part[kind].get("url"), place)))
        elif kind == "input_audio" and isinstance(part.get(kind), dict):
            files.append(_sound(part[kind], place))
        else:
            raise RequestError(
                f"{place} ({_shown(part)}) must be text, image_url, input_audio or video_url",
                place,
            )
    return Message("\n".join(texts), tuple(files))


def _sound(part: dict, place: str) -> MediaFile:
    kind = part.get("kind", "speech")
    if kind not in _SOUNDS:
        raise RequestError(f"kind ({_shown(kind)}) of {place} must be speech or audio", place)
    data = part.get("data")
    if isinstance(data, str) and ":" in data[:64]:
        return MediaFile(kind, _data_uri(data, place))
    return MediaFile(kind, _base64(data, place))


def _data_uri(url: Any, place: str) -> bytes:
    if not isinstance(url, str) or not url[:5].lower() == "data:":
        raise RequestError(
            f"url ({_shown(url)}) of {place} must be a data URI, data:image/png;base64,...: this"
            " server fetches nothing",
            place,
        )
    head, comma, data = url.partition(",")
    if not comma or not head.lower().endswith(";base64"):
        raise RequestError(f"url ({_shown(url)}) of {place} must be a data URI in base64", place)
    return _base64(data, place)


def _base64(data: Any, place: str) -> bytes:
    try:
        if not isinstance(data, str) or not data:
            raise ValueError("there is none")
        return base64.b64decode(data, validate=True)
    except (ValueError, binascii.Error) as error:
        raise RequestError(f"data of {place} must be base64: {error}", place) from error


def _shown(value: Any) -> str:
    """Formats a value for errors; long ones are shortened."""
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
