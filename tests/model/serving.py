"""Servers of tiny models: in a thread of this process, and in a process of their own."""

import asyncio
import base64
import json
import os
import queue
import re
import subprocess
import sys
import threading
from pathlib import Path

import httpx
import uvicorn
from conversing import PATIENCE, keep_to_words

import unimoe_model
from unimoe_model.generation import Answerer
from unimoe_model.processing import UniMoEProcessor
from unimoe_model.serve.app import build_app
from unimoe_model.serve.limits import Limits
from unimoe_model.serve.replies import Replies
from unimoe_model.serve.server import listen

ENCODERS = "vision: fakes:FakeVision\nspeech: fakes:FakeSpeech\naudio: fakes:FakeAudio\n"


def save_talker(tiny_model, tokenizer, folder, context=4096):
    """Saves a model that says whole words without an end, and the file that names its encoders."""
    model = keep_to_words(tiny_model(text_config={"max_position_embeddings": context}), tokenizer)
    model.save_pretrained(folder / "model")
    UniMoEProcessor.from_config(model.config, tokenizer).save_pretrained(folder / "model")
    (folder / "encoders.yaml").write_text(ENCODERS)
    return folder / "model"


class Live:
    """A server in a thread of this process, whose model can be looked at and held."""

    def __init__(self, folder, limits=None, token=None, **options):
        self.answerer = Answerer.from_pretrained(folder)
        options = {"max_new_tokens": 6} | options
        self.replies = Replies(self.answerer, limits or Limits(), **options)
        self.app = build_app(self.replies, folder.name, token=token)
        socket = listen("127.0.0.1", 0)
        self.port = socket.getsockname()[1]
        self.address = f"http://127.0.0.1:{self.port}"
        config = uvicorn.Config(self.app, log_level="warning", ws="none")
        self._server = uvicorn.Server(config)
        started = threading.Event()
        startup = self._server.startup

        async def announced(sockets=None):
            await startup(sockets)
            started.set()

        self._server.startup = announced
        self._thread = threading.Thread(
            target=lambda: asyncio.run(self._server.serve([socket])), daemon=True
        )
        self._thread.start()
        assert started.wait(PATIENCE)
        self.client = httpx.Client(base_url=self.address, timeout=PATIENCE)

    def close(self):
        self.client.close()
        self._server.should_exit = True
        self._thread.join(PATIENCE)

    def ask(self, content, **fields):
        return self.client.post("/v1/chat/completions", json=request(content, **fields))


def request(content, **fields):
    """A request about the one message, or the messages where it is a list of them."""
    messages = content
    if not (isinstance(content, list) and content and "role" in content[0]):
        messages = [{"role": "user", "content": content}]
    return {"model": "model", "messages": messages} | fields


def data_uri(content, kind="image/png"):
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def picture(content):
    return {"type": "image_url", "image_url": {"url": data_uri(content)}}


def spoken(content, **fields):
    data = base64.b64encode(content).decode()
    return {"type": "input_audio", "input_audio": {"data": data, "format": "wav"} | fields}


def chunks_of(response):
    """The objects of a streamed response, without its comments."""
    lines = [line for line in response.iter_lines() if line.startswith("data: ")]
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line[6:]) for line in lines[:-1]]


def text_of(chunks):
    deltas = [choice["delta"] for chunk in chunks for choice in chunk["choices"]]
    return "".join(delta.get("content") or "" for delta in deltas)


class Process:
    """`unimoe serve` in a process of its own.

    Args:
        folder: holds the model and the file with its encoders.
        options: of the command.
        launcher: what starts it, such as torchrun, as arguments of Python.
        program: the command as arguments of Python, or of the launcher.
        environment: more variables.
        tells: whether it tells its address, which is waited for.
    """

    def __init__(
        self,
        folder,
        *options,
        launcher=(),
        program=("-m", "unimoe_model.cli"),
        environment=None,
        tells=True,
    ):
        paths = [Path(unimoe_model.__file__).parents[1], Path(__file__).parent]
        own = {"PYTHONPATH": ":".join(map(str, paths)), "PYTHONUNBUFFERED": "1"}
        own |= {"OMP_NUM_THREADS": "1"} | (environment or {})
        command = [sys.executable, *launcher, *map(str, program), "serve", "--model", "model"]
        command += ["--encoders", "encoders.yaml", "--port", "0", *options]
        self._process = subprocess.Popen(
            command,
            cwd=folder,
            env=os.environ | own,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self.lines, said = [], queue.Queue()

        def read():
            for line in self._process.stdout:
                self.lines.append(line)
                said.put(line)
            said.put("")

        threading.Thread(target=read, daemon=True).start()
        self.client = None
        found = None
        while found is None and tells:
            line = said.get(timeout=2 * PATIENCE)
            assert line, f"the server ended: {self.lines}"
            found = re.search(r"http://127\.0\.0\.1:(\d+)/", line)
        if found is None:
            return
        self.port = int(found[1])
        self.address = f"http://127.0.0.1:{self.port}"
        self.client = httpx.Client(base_url=self.address, timeout=PATIENCE)

    def memory(self):
        """Most bytes that the process has held."""
        status = Path(f"/proc/{self._process.pid}/status").read_text()
        return 1024 * int(re.search(r"VmHWM:\s+(\d+) kB", status)[1])

    def is_up(self):
        return self._process.poll() is None and self.client.get("/health").status_code == 200

    @property
    def pid(self):
        return self._process.pid

    def children(self):
        """Numbers of the processes that it started, such as ranks."""
        return Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text().split()

    def send(self, number):
        """Sends a signal."""
        self._process.send_signal(number)

    def wait(self):
        """The exit code; it must end by itself."""
        return self._process.wait(PATIENCE)

    def close(self):
        """Ends it; gives the exit code."""
        if self.client is not None:
            self.client.close()
        self._process.terminate()
        try:
            return self.wait()
        finally:
            self._process.kill()
