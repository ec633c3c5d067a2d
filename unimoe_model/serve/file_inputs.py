"""Gradio file inputs that pass on the path of a file without opening it."""

from abc import ABCMeta

from unimoe_model.extras import needed_by
from unimoe_model.serve.uploads import Uploads

with needed_by("serving", "serve"):
    import gradio as gr


def only_paths(base: type[gr.components.Component], uploads: Uploads) -> type:
    """Returns a subclass of an input that passes on the path of its file without processing it.

    By default, Gradio opens pictures, converts sound and video, and downloads URLs given by a
    client, all in the server process. Gradio creates inputs anew from their class when the page
    changes them, so overriding methods of an instance would not last.

    Args:
        base: `gr.Image`, `gr.Audio` or `gr.Video`.
        uploads: the folder that files must be in.
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
    # Gradio's own metaclass would write an interface file next to this one. The name is that of the
    # base, by which the browser identifies the component.
    return ABCMeta.__new__(type(base), base.__name__, (base,), methods)
