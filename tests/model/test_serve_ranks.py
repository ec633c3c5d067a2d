"""`unimoe serve` with experts over two processes: the replies of one, and ends without a hang."""

import signal
import socket
from contextlib import closing
from pathlib import Path

import pytest

pytest.importorskip("gradio", reason="gradio is not installed: pip install .[serve]")
pytest.importorskip("scipy", reason="scipy is not installed: pip install .[media]")
pytest.importorskip("soundfile", reason="soundfile is not installed: pip install .[media]")
pytest.importorskip("PIL", reason="pillow is not installed: pip install .[media]")
from serving import Live, Process, chunks_of, picture, request, save_talker, spoken, text_of
from test_serve_decoding import png, wav

PICTURE = [{"type": "text", "text": "what is it?"}, picture(png())]
SPOKEN = [spoken(wav())]
FAULTS = Path(__file__).with_name("serve_faults.py")
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")


@pytest.fixture
def folder(tiny_model, tokenizer, tmp_path, encoders):
    save_talker(tiny_model, tokenizer, tmp_path)
    return tmp_path


def ask(server, content, **fields):
    return server.client.post("/v1/chat/completions", json=request(content, **fields))


def replies(server):
    """Text and routing of a whole reply about a picture, and of a streamed spoken one."""
    whole = ask(server, PICTURE, max_tokens=6)
    assert whole.status_code == 200, whole.text
    found = whole.json()
    fields = request(SPOKEN, stream=True, max_tokens=6)
    with server.client.stream("POST", "/v1/chat/completions", json=fields) as response:
        chunks = chunks_of(response)
    assert len([chunk for chunk in chunks if chunk["choices"]]) >= 4
    return [
        (found["choices"][0]["message"]["content"], found["unimoe"]),
        (text_of(chunks), chunks[-1]["unimoe"]),
    ]


@pytest.mark.slow
def test_replies_are_those_of_one_process_and_errors_leave_the_ranks_alive(folder):
    with closing(Live(folder / "model")) as alone:
        expected = replies(alone)
    assert len({text for text, _ in expected} - {""}) == 2
    server = Process(folder, launcher=TORCHRUN)
    try:
        assert replies(server) == expected
        for content, message in (
            ([picture(b"no picture")], "image must be a picture such as PNG or JPEG"),
            ("what? " * 5000, "must be shorter than the model's context"),
            ("", "question is empty"),
        ):
            refused = ask(server, content)
            assert refused.status_code == 400
            assert message in refused.json()["error"]["message"]
        assert ask(server, "what?", temperature=1e-300).status_code == 400
        assert replies(server) == expected
        number, children = server.pid, server.children()
        assert len(children) >= 2
    finally:
        server.close()
    assert [child for child in [number, *children] if Path(f"/proc/{child}").exists()] == []


class TwoRanks:
    """Two processes as torchrun starts them, without it: their exit codes are seen."""

    def __init__(self, folder, **options):
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        first, second = (shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in (0, 1))
        self.other = Process(folder, environment=second, tells=False, **options)
        try:
            self.server = Process(folder, environment=first, **options)
        except BaseException:
            self.other.close()
            raise

    def end(self, *signals):
        """Sends signals, each with the number of its rank; gives the exit codes."""
        both = [self.server, self.other]
        for number, rank in signals:
            both[rank].send(number)
        return [rank.wait() for rank in both]

    def close(self):
        self.server.close()
        self.other.close()


@pytest.fixture
def ranks(folder):
    started = []

    def start(**options):
        started.append(TwoRanks(folder, **options))
        return started[-1]

    yield start
    for both in started:
        both.close()


@pytest.mark.slow
@pytest.mark.parametrize(
    "signals",
    [
        [(signal.SIGINT, 0), (signal.SIGINT, 1)],
        [(signal.SIGTERM, 1), (signal.SIGTERM, 0)],
        [(signal.SIGTERM, 0)],
    ],
    ids=["interrupt both", "terminate both", "terminate the first"],
)
def test_signals_end_both_ranks(ranks, signals):
    both = ranks()
    assert ask(both.server, "what?", max_tokens=2).status_code == 200
    assert both.end(*signals) == [0, 0]
    assert "Traceback" not in "".join(both.server.lines + both.other.lines)


@pytest.mark.slow
def test_signals_during_a_reply_end_both_ranks(ranks):
    both = ranks()
    fields = request("what?", stream=True, max_tokens=3000)
    with both.server.client.stream("POST", "/v1/chat/completions", json=fields) as response:
        text = ""
        for line in response.iter_lines():
            text += line
            if text.count('"content": " ') > 2:
                break
        codes = both.end((signal.SIGINT, 0), (signal.SIGINT, 1))
    assert codes == [0, 0]
    assert "Traceback" not in "".join(both.server.lines + both.other.lines)


@pytest.mark.slow
def test_an_error_between_forwards_leaves_the_ranks_in_step(ranks):
    both = ranks(program=(FAULTS,))
    expected = replies(both.server)
    for _ in range(2):
        failed = ask(both.server, "what?", temperature=1.0, seed=13)
        assert failed.status_code == 500
        assert failed.json()["error"]["message"] == "there is no draw"
        assert replies(both.server) == expected
    assert both.end((signal.SIGTERM, 0)) == [0, 0]


@pytest.mark.slow
def test_a_rank_that_dies_ends_the_server(ranks):
    both = ranks()
    assert ask(both.server, "what?", max_tokens=2).status_code == 200
    both.other.send(signal.SIGKILL)
    both.other.wait()
    assert ask(both.server, "what?", max_tokens=2).status_code == 500
    assert both.server.wait() == 1
    (line,) = [line for line in both.server.lines if line.startswith("unimoe serve:")]
    assert "rank 1" in line
