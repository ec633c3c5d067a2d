"""The page, in Gradio, with analytics, sharing, API and URL downloads disabled."""

import os
from collections.abc import AsyncIterator
from contextlib import aclosing
from pathlib import Path

from unimoe_model.extras import needed_by
from unimoe_model.serve import page_html
from unimoe_model.serve.examples import EXAMPLES, make_example
from unimoe_model.serve.file_inputs import only_paths
from unimoe_model.serve.replies import MediaFile, Message, Replies
from unimoe_model.serve.sessions import Sessions, View
from unimoe_model.serve.uploads import UNSENT_SECONDS, Uploads

# Gradio reads both when it is imported or components are created.
os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
with needed_by("serving", "serve"):
    import gradio as gr
    from fastapi import FastAPI

_TABS = {"image": "Picture", "speech": "Speech", "audio": "Sound", "video": "Video"}


def mount_page(app: FastAPI, replies: Replies, name: str) -> Uploads:
    """Mounts the page at `/`.

    Args:
        app: application that already has the other routes.
        replies: generates the replies.
        name: name of the model.

    Returns:
        The folder of uploaded files, which is deleted when the application ends.
    """
    uploads = Uploads()
    uploads.make_default()
    blocks = Page(replies, name, uploads).blocks()
    blocks.queue(max_size=4 * replies.limits.queue, api_open=False, default_concurrency_limit=None)
    gr.mount_gradio_app(
        app,
        blocks,
        path="/",
        footer_links=[],
        run_history=False,
        show_error=True,
        max_file_size=replies.limits.body_bytes,
        ssr_mode=False,
        enable_monitoring=False,
        pwa=False,
        mcp_server=False,
        theme=_theme(),
        css_paths=Path(__file__).with_name("page.css"),
        head='<meta name="viewport" content="width=device-width, initial-scale=1">',
    )
    return uploads


def _theme() -> gr.themes.Base:
    fonts = ["system-ui", "-apple-system", "Segoe UI", "Roboto", "sans-serif"]
    return gr.themes.Base(
        primary_hue="indigo",
        neutral_hue="slate",
        radius_size="lg",
        font=fonts,
        font_mono=["ui-monospace", "monospace"],
    )


class Page:
    """The components of the page and their event handlers.

    Args:
        replies: generates the replies.
        name: name of the model.
        uploads: folder of uploaded files.
    """

    def __init__(self, replies: Replies, name: str, uploads: Uploads):
        self._replies = replies
        self._name = name
        self._uploads = uploads
        self._sessions = Sessions(replies)

    def blocks(self) -> gr.Blocks:
        """Creates the layout of the page."""
        with gr.Blocks(
            title=f"{self._name} · Uni-MoE", analytics_enabled=False, fill_width=True
        ) as blocks:
            gr.HTML(page_html.header(self._name, self._replies.model), padding=False)
            with gr.Row(elem_id="um-body"):
                with gr.Column(scale=3, min_width=320, elem_id="um-talk"):
                    with gr.Column(elem_id="um-transcript"), gr.Column(elem_id="um-turns"):
                        self._past = gr.HTML(page_html.EMPTY, padding=False)
                        self._live = gr.HTML("", padding=False, elem_id="um-live")
                    self._compose()
                with gr.Column(scale=2, min_width=320, elem_id="um-side"):
                    gr.HTML("<h2>Which experts took whose tokens</h2>", padding=False)
                    self._routing = gr.HTML(page_html.NO_MAP, padding=False)
            self._connect(blocks)
        return blocks

    def _compose(self) -> None:
        with gr.Group(elem_id="um-compose"):
            self._text = gr.Textbox(
                placeholder="Ask about a picture, a sound, a video, or anything",
                show_label=False,
                label="Message",
                lines=1,
                max_lines=6,
                max_length=20_000,
                container=False,
                autofocus=True,
                elem_id="um-text",
            )
            with gr.Tabs(elem_id="um-media"):
                with gr.Tab(_TABS["image"]):
                    image = only_paths(gr.Image, self._uploads)(
                        sources=["upload", "webcam", "clipboard"],
                        type="filepath",
                        buttons=[],
                        height=140,
                        show_label=False,
                        label="Picture",
                        elem_id="um-image",
                    )
                sounds = {}
                for kind, first in (("speech", "microphone"), ("audio", "upload")):
                    other = "upload" if first == "microphone" else "microphone"
                    with gr.Tab(_TABS[kind]):
                        sounds[kind] = only_paths(gr.Audio, self._uploads)(
                            sources=[first, other],
                            type="filepath",
                            editable=False,
                            buttons=[],
                            show_label=False,
                            label=_TABS[kind],
                            elem_id=f"um-{kind}",
                        )
                with gr.Tab(_TABS["video"]):
                    video = only_paths(gr.Video, self._uploads)(
                        sources=["upload", "webcam"],
                        buttons=[],
                        height=140,
                        show_label=False,
                        label="Video",
                        elem_id="um-video",
                    )
            self._media = {"image": image, **sounds, "video": video}
            with gr.Row(elem_id="um-buttons"):
                self._new = gr.Button("Start over", size="sm", elem_id="um-new")
                self._stop = gr.Button("Stop", size="sm", interactive=False, elem_id="um-stop")
                self._send = gr.Button("Send", variant="primary", size="sm", elem_id="um-send")
        with gr.Row(elem_id="um-examples"):
            gr.HTML("<span>Try</span>", padding=False)
            self._examples = {
                kind: gr.Button(f"{title}: {question}", size="sm", elem_id=f"um-try-{kind}")
                for kind, (title, question) in EXAMPLES.items()
            }

    def _connect(self, blocks: gr.Blocks) -> None:
        hidden = {"show_progress": "hidden", "api_visibility": "private", "queue": True}
        media = list(self._media.values())
        outputs = [self._past, self._live, self._routing, self._text, *media]
        outputs += [self._send, self._stop, self._new]
        for trigger in (self._send.click, self._text.submit):
            trigger(
                self._reply,
                [self._text, *media],
                outputs,
                concurrency_limit=None,
                **hidden,
            )
        self._stop.click(self._end, **hidden)
        self._new.click(
            self._restart, outputs=[self._past, self._live, self._routing, self._text], **hidden
        )
        for kind, button in self._examples.items():
            button.click(self._example(kind), outputs=[self._text, *media], **hidden)
        blocks.unload(self._leave)

    async def _reply(self, request: gr.Request, text: str, *paths: str | None) -> AsyncIterator:
        given, files = [], []
        try:
            text = (text or "").strip()
            named = zip(self._media, paths, strict=True)
            given = [(kind, self._uploads.own(path)) for kind, path in named if path]
            files = [MediaFile(kind, path) for kind, path in given]
            if not text and not files:
                yield {self._live: gr.skip()}
                return
            yield self._busy(True) | {self._text: ""} | dict.fromkeys(self._media.values())
            views = self._sessions.send(request.session_hash, Message(text, tuple(files)))
            async with aclosing(views):
                async for view in views:
                    yield self._changes(view)
            yield self._busy(False)
        finally:
            self._uploads.delete([path for _, path in given])
            self._uploads.expire(UNSENT_SECONDS)

    def _busy(self, is_busy: bool) -> dict:
        return {
            self._send: gr.Button(interactive=not is_busy),
            self._new: gr.Button(interactive=not is_busy),
            self._stop: gr.Button(interactive=is_busy),
        }

    def _changes(self, view: View) -> dict:
        shown = {
            self._past: view.past,
            self._live: view.live,
            self._routing: view.routing,
            self._text: view.refused,
        }
        return {component: value for component, value in shown.items() if value is not None}

    async def _end(self, request: gr.Request) -> None:
        self._sessions.get(request.session_hash).stop()

    async def _restart(self, request: gr.Request) -> tuple:
        self._sessions.restart(request.session_hash)
        return page_html.EMPTY, "", page_html.NO_MAP, ""

    async def _leave(self, request: gr.Request) -> None:
        self._sessions.forget(request.session_hash)

    def _example(self, kind: str):
        async def fill() -> list:
            path = make_example(kind, self._uploads.place())
            return [EXAMPLES[kind][1], *(path if kind == of else None for of in self._media)]

        return fill
