"""Gradio's inputs for files, of which the server is told the path and nothing is opened."""

from abc import ABCMeta

from unimoe_model.extras import needed_by
from unimoe_model.serve.uploads import Uploads

with needed_by("serving", "serve"):
    import gradio as gr


def only_paths(base: type[gr.components.Component], uploads: Uploads) -> type:
    """A kind of input that passes on where its file lies, and does nothing with it.

    By itself Gradio opens pictures, converts sound and video, and downloads what a client gives as
    an address, all in the process of the server. It makes inputs anew from their class as the page
    changes them, so that methods of one object would not last.

    Args:
        base: `gr.Image`, `gr.Audio` or `gr.Video`.
        uploads: where files must lie.
    """

    def preprocess(self, payload):
        return None if payload is None else payload.path

    def postprocess(self, value):
        return None if value is None else self.data_model(path=str(value))

    async def keep(self, path):
        return None if path is None else str(uploads.own(str(path)))

    methods = {
        "preprocess": preprocess,
        "postprocess": postprocess,
        "async_move_resource_to_block_cache": keep,
        "__module__": __name__,
    }
    # Gradio's own metaclass writes an interface file beside this one. The name is that of the base,
    # by which the browser knows the component.
    return ABCMeta.__new__(type(base), base.__name__, (base,), methods)
