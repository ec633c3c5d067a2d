"""The ASGI application: API routes, the page, and the middleware that protects them."""

from collections.abc import AsyncIterator, Collection
from contextlib import asynccontextmanager

from unimoe_model.extras import needed_by
from unimoe_model.serve.body_limit import BodyLimit
from unimoe_model.serve.openai_api import ChatApi
from unimoe_model.serve.page import mount_page
from unimoe_model.serve.replies import Replies
from unimoe_model.serve.security import Gate

with needed_by("serving", "serve"):
    from fastapi import FastAPI


def build_app(
    replies: Replies, name: str, hosts: Collection[str] = (), token: str | None = None
) -> Gate:
    """Builds the application for an ASGI server.

    Args:
        replies: generates the replies.
        name: name of the model.
        hosts: accepted host names besides `localhost`.
        token: token that requests must have; None if none is required.
    """

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        replies.start()
        try:
            yield
        finally:
            replies.close()
            uploads.close()

    app = FastAPI(lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)
    app.router.routes.extend(ChatApi(replies, name).routes())
    uploads = mount_page(app, replies, name)
    return Gate(BodyLimit(uploads.limited(app, replies.limits), replies.limits), hosts, token)
