"""Forks ranks from a process that has imported torch, so that no rank waits for imports.

Reads requests from standard input, one JSON object per line, and writes one reply per line when all
ranks of a request have ended: their exit codes (negative for a signal, None for those that were
killed after the limit). Each rank writes its output to a file of its own.
"""

import importlib
import json
import os
import runpy
import signal
import sys
import time
import traceback
from pathlib import Path

PRELOADED = (
    "torch.distributed.checkpoint",
    "torch.distributed.fsdp",
    "torch.distributed.tensor",
    "transformers.models.llama.modeling_llama",
    "transformers.models.mixtral.modeling_mixtral",
    "unimoe_kernels.distributed",
)
POLL_SECONDS = 0.01


def serve() -> None:
    for name in PRELOADED:
        importlib.import_module(name)
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    for line in sys.stdin:
        request = json.loads(line)
        inputs = zip(request["arguments"], request["outputs"], strict=True)
        ranks = [_fork(request, *rank) for rank in inputs]
        replies.write(json.dumps(_wait(ranks, request["limit"])) + "\n")
        replies.flush()


def _fork(request: dict, arguments: list[str], output: str) -> int:
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        _redirect(output)
        os.environ.clear()
        os.environ.update(request["environment"])
        script = request["script"]
        sys.argv = [script, *arguments]
        sys.path[0] = str(Path(script).parent)
        runpy.run_path(script, run_name="__main__")
        code = 0
    except SystemExit as ended:
        code = _exit_code(ended)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _exit_code(ended: SystemExit) -> int:
    if ended.code is None or isinstance(ended.code, int):
        return ended.code or 0
    print(ended.code, file=sys.stderr)
    return 1


def _redirect(output: str) -> None:
    nothing, file = os.open(os.devnull, os.O_RDONLY), os.open(output, os.O_WRONLY | os.O_CREAT)
    for source, target in ((nothing, 0), (file, 1), (file, 2)):
        os.dup2(source, target)


def _wait(ranks: list[int], limit: float) -> list[int | None]:
    """All are killed once the limit has passed: a rank that hangs fails its test."""
    codes: dict[int, int | None] = {}
    until = time.monotonic() + limit
    while len(codes) < len(ranks):
        late = time.monotonic() > until
        for pid in ranks:
            if pid in codes:
                continue
            if late:
                os.kill(pid, signal.SIGKILL)
            ended, status = os.waitpid(pid, 0 if late else os.WNOHANG)
            if ended:
                codes[pid] = None if late else os.waitstatus_to_exitcode(status)
        time.sleep(POLL_SECONDS)
    return [codes[pid] for pid in ranks]


if __name__ == "__main__":
    serve()
