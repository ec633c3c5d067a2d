"""`unimoe serve`: loads a model and listens."""

import os
import secrets
import socket
from collections.abc import Callable, Sequence
from contextlib import closing, nullcontext, suppress
from functools import partial
from pathlib import Path

from unimoe_model.chat.sampling import Sampling
from unimoe_model.extras import needed_by
from unimoe_model.generation import Answerer
from unimoe_model.serve.app import build_app
from unimoe_model.serve.limits import Limits
from unimoe_model.serve.ranks import Ranks
from unimoe_model.serve.replies import Replies
from unimoe_model.serve.security import is_loopback
from unimoe_model.training.stopping import StopRequest

with needed_by("serving", "serve"):
    import uvicorn


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens.

    Raises:
        ValueError: If the port is taken, or the host is no address of this machine.
    """
    listening = None
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        listening = socket.socket(family, socket.SOCK_STREAM)
        # Not for a port where something listens: that is refused all the same.
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind((host, port))
        listening.listen(256)
    except (OSError, OverflowError) as error:
        if listening is not None:
            listening.close()
        if isinstance(error, OverflowError):
            raise ValueError(f"port ({port}) must be from 0 to 65535") from error
        raise ValueError(f"host and port ({host}:{port}) must be free: {error.strerror}") from error
    return listening


def serve(
    model: Path,
    *,
    host: str = "127.0.0.1",
    port: int = 7860,
    token: str | None = None,
    hosts: Sequence[str] = (),
    limits: Limits | None = None,
    precision: str = "auto",
    quantize: str | None = None,
    system: str | None = None,
    max_new_tokens: int = 512,
    sampling: Sampling | None = None,
    frame_seed: int | None = None,
    on_ready: Callable[[str], None] = print,
) -> None:
    """Serves a model until SIGINT or SIGTERM, which end it as they should.

    Args:
        model: checkpoint folder.
        host: address that is listened on.
        port: there; 0 takes a free one.
        token: that requests must give; beyond loopback one is made up unless given.
        hosts: names beside `localhost` that requests may come for.
        limits: of requests.
        precision: as in `Answerer.from_pretrained`.
        quantize: likewise.
        system: what stands before the first turn; None is the model's.
        max_new_tokens: longest reply.
        sampling: unless a request says otherwise.
        frame_seed: None chooses the frames of videos evenly, a number at random.
        on_ready: is given the line that tells the address.

    Raises:
        ValueError: If the port is taken, an option is out of range, or the folder is no checkpoint.
    """
    from unimoe_kernels.distributed import attributed, finish_parallel
    from unimoe_model.training.start import share_experts

    is_first = int(os.environ.get("RANK", "0")) == 0
    if token is None and not is_loopback(host):
        token = secrets.token_urlsafe(24)
    with closing(listen(host, port)) if is_first else nullcontext() as listening:
        mesh = share_experts()
        with attributed("serving"):
            answerer = Answerer.from_pretrained(model, mesh, precision, quantize)
            ranks = Ranks(answerer.model) if mesh is not None else None
            if not is_first:
                ranks.take_part()
                finish_parallel()
                return
            try:
                replies = Replies(
                    answerer,
                    limits or Limits(),
                    system=system,
                    max_new_tokens=max_new_tokens,
                    sampling=sampling,
                    frame_seed=frame_seed,
                    generate=None if ranks is None else ranks.generate,
                )
                name = model.resolve().name
                app = build_app(replies, name, [host, socket.gethostname(), *hosts], token)
                try:
                    _run(app, listening, host, token, name, on_ready, ranks)
                finally:
                    replies.close()
                if ranks is not None and ranks.failure is not None:
                    raise ranks.failure
            finally:
                if ranks is not None:
                    ranks.end()
            finish_parallel()


def _run(
    app,
    listening: socket.socket,
    host: str,
    token: str | None,
    name: str,
    on_ready: Callable[[str], None],
    ranks: Ranks | None,
) -> None:
    """Serves until SIGINT or SIGTERM, or until the ranks are out of step."""
    shown = f"[{host}]" if ":" in host else host
    query = f"?token={token}" if token else ""
    address = f"http://{shown}:{listening.getsockname()[1]}/{query}"

    class Server(uvicorn.Server):
        async def startup(self, sockets=None):
            await super().startup(sockets)
            if not self.should_exit:
                on_ready(f"{name} at {address}; Ctrl-C ends")

    config = uvicorn.Config(
        app,
        log_level="warning",
        access_log=False,  # its lines would hold the token
        server_header=False,
        timeout_keep_alive=5,
        timeout_graceful_shutdown=5,
        ws="none",
    )
    server = Server(config)
    if ranks is not None:
        ranks.on_failure = partial(setattr, server, "should_exit", True)
    # uvicorn raises the signals that it took once more when it has ended.
    with StopRequest(), suppress(KeyboardInterrupt):
        server.run(sockets=[listening])
