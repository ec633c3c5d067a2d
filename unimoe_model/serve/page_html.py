"""HTML of conversations on the page. All text from users and models is escaped."""

import base64
import io
import math
from collections.abc import Iterable
from html import escape

import numpy as np

from unimoe_model.extras import needed_by
from unimoe_model.serve.replies import Attached
from unimoe_model.serve.reply_queue import Place
from unimoe_model.serve.routing_map import RoutingMap

with needed_by("drawing previews", "serve"):
    from PIL import Image

_PREVIEW = 160
_BARS = 48
_ENDINGS = {
    "stopped": "stopped",
    "length": "cut off: the longest reply is reached",
    "context": "cut off: the context is full; start over",
    "time": "cut off: the time for one reply is over",
}
EMPTY = """<div class="um-empty"><p>Ask anything, with a picture, speech, a sound or a video.</p>
<p>Uploaded files are deleted when the reply ends.</p></div>"""
NO_MAP = """<div class="um-map-empty">With the first reply, this shows for each layer which experts
took whose tokens.</div>"""


def said(text: str, items: Iterable[Attached] = ()) -> str:
    """Returns a message of the user, and the descriptions of its encoded files."""
    cards = "".join(map(_card, items))
    media = f'<div class="um-media">{cards}</div>' if cards else ""
    words = f'<div class="um-text">{escape(text)}</div>' if text else ""
    return f'<div class="um-turn um-user">{media}{words}</div>'


def replied(text: str, how: str = "end") -> str:
    """Returns a finished reply."""
    words = f'<div class="um-text">{escape(text)}</div>' if text else ""
    note = _ENDINGS.get(how, "")
    if not text:
        note = "no words came, and the message is forgotten" if how == "end" else note
    return f'<div class="um-turn um-model">{words}{_note(note)}</div>'


def replying(text: str) -> str:
    """Returns a reply that is being generated."""
    return (
        f'<div class="um-turn um-model"><div class="um-text">{escape(text)}'
        '<span class="um-caret"></span></div></div>'
    )


def waiting(place: Place) -> str:
    """Returns the place of a message in the queue."""
    if not place.before:
        return _status("reading")
    others = "1 request is" if place.before == 1 else f"{place.before} requests are"
    return _status(f"{others} before this one, about {math.ceil(place.seconds)} s")


def _status(text: str) -> str:
    return (
        '<div class="um-turn um-model"><div class="um-status"><span class="um-dots">'
        f"<i></i><i></i><i></i></span>{escape(text)}</div></div>"
    )


def failed(message: str) -> str:
    """Returns the error shown instead of a reply."""
    return f'<div class="um-turn um-error" role="alert">{escape(message)}</div>'


def _note(text: str) -> str:
    return f'<div class="um-note">{escape(text)}</div>' if text else ""


def _card(item: Attached) -> str:
    kind, _, rest = item.description.partition(": ")
    size, _, soft = rest.rpartition(", ")
    preview = _waveform(item.read) if item.read.ndim == 1 else _thumbnail(item.read)
    return (
        f'<figure class="um-card">{preview}<figcaption><b>{escape(kind)}</b> {escape(size)}'
        f'<span class="um-soft">{escape(soft)}</span></figcaption></figure>'
    )


def _thumbnail(read: np.ndarray) -> str:
    """Returns a picture, or the frames of a video that the model receives, side by side."""
    frames = read[None] if read.ndim == 3 else read[:: max(1, len(read) // 4)][:4]
    edge = _PREVIEW if len(frames) == 1 else _PREVIEW // 2
    images = []
    for frame in frames:
        image = Image.fromarray(frame)
        image.thumbnail((edge, edge))
        images.append(image)
    width = sum(image.width for image in images)
    sheet = Image.new("RGB", (width, images[0].height))
    x = 0
    for image in images:
        sheet.paste(image, (x, 0))
        x += image.width
    content = io.BytesIO()
    sheet.save(content, "JPEG", quality=82)
    data = base64.b64encode(content.getvalue()).decode()
    return f'<img src="data:image/jpeg;base64,{data}" alt="what the model was given">'


def _waveform(samples: np.ndarray) -> str:
    pieces = np.array_split(np.abs(samples), min(_BARS, len(samples)))
    peaks = np.array([piece.max() for piece in pieces])
    heights = np.maximum(2, 36 * peaks / max(float(peaks.max()), 1e-6))
    bars = "".join(
        f'<rect x="{3 * index}" y="{20 - height / 2:.1f}" width="2" height="{height:.1f}" rx="1"/>'
        for index, height in enumerate(heights)
    )
    return f'<svg class="um-wave" viewBox="0 0 {3 * len(peaks)} 40" aria-hidden="true">{bars}</svg>'


def routing(found: RoutingMap | None) -> str:
    """Returns a small table per layer with the share of each expert by modality."""
    if found is None:
        return (
            '<div class="um-map-empty">This model has no MoE layers of a Uni-MoE, so there is no'
            " map of its experts.</div>"
        )
    counts = "".join(
        f'<li class="um-of um-{escape(name)}"><span></span>{escape(name)} <b>{count:,}</b></li>'
        for name, count in found.tokens.items()
    )
    tables = "".join(_layer(found, index) for index in range(len(found.layers)))
    return (
        f'<ul class="um-tokens" aria-label="tokens">{counts}</ul>'
        f'<div class="um-layers">{tables}</div>'
        '<p class="um-legend">Share in percent of the rows of each kind of token that an expert'
        " took, for what this reply computed.</p>"
    )


def _layer(found: RoutingMap, index: int) -> str:
    names = "".join(f'<th scope="col">{escape(name)}</th>' for name in found.experts)
    rows = ""
    # With top-k routing, an expert receives at most 1/k of the rows.
    most = max(max(found.share(name, index)) for name in found.tokens)
    for name in found.tokens:
        cells = ""
        for share in found.share(name, index):
            strength = share / most if most else 0
            shade = "um-dark" if strength > 0.8 else ""
            cells += f'<td class="{shade}" style="--s:{strength:.3f}">{100 * share:.0f}</td>'
        label = f'<th scope="row"><span></span>{escape(name)}</th>'
        rows += f'<tr class="um-{escape(name)}">{label}{cells}</tr>'
    return (
        f'<table class="um-layer"><caption>layer {found.layers[index]}</caption>'
        f"<thead><tr><td></td>{names}</tr></thead><tbody>{rows}</tbody></table>"
    )


def header(name: str, model) -> str:
    """Returns the title, the name of the model and its architecture."""
    layers = len(list(model.moe_layers()))
    config = model.config
    experts = (
        f"{config.num_experts} experts in {layers} layers, {config.num_experts_per_tok} a token"
        if layers
        else "dense"
    )
    parts = (config.text_config.model_type, experts)
    facts = "".join(f"<span>{escape(part)}</span>" for part in parts)
    return (
        f'<header class="um-header"><h1>{escape(name)}</h1><div class="um-facts"><span>Uni-MoE'
        f"</span>{facts}</div></header>"
    )
