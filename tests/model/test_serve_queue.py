"""One reply at a time: order, bounds, places and what is told to Prometheus."""

import asyncio
import re

import pytest

from unimoe_model.serve.metrics import Metrics
from unimoe_model.serve.reply_queue import QueueFullError, ReplyQueue


async def until_called(ticket):
    return [place async for place in ticket.turn(every=0.001)]


def test_turns_come_in_the_order_of_the_line():
    async def run():
        queue, order = ReplyQueue(4), []
        tickets = [queue.admit() for _ in range(4)]

        async def take(index):
            await until_called(tickets[index])
            order.append(index)
            assert queue._line[0] is tickets[index]
            tickets[index].leave()

        await asyncio.gather(*map(take, (2, 0, 3, 1)))
        assert order == [2, 0, 3, 1]
        assert len(queue) == queue.waiting == 0

    asyncio.run(run())


def test_a_full_queue_refuses_until_one_leaves():
    async def run():
        queue = ReplyQueue(2, guess=7.2)
        first, _ = queue.admit(), queue.admit()
        with pytest.raises(QueueFullError, match=r"the queue \(2 requests\) is full") as refused:
            queue.admit()
        assert refused.value.retry_after == 8
        first.leave()
        first.leave()
        assert len(queue) == 1
        queue.admit()
        with pytest.raises(QueueFullError):
            queue.admit()

    asyncio.run(run())


def test_places_tell_who_is_before_and_for_how_long():
    async def run():
        queue = ReplyQueue(3, guess=10)
        tickets = [queue.admit() for _ in range(3)]
        assert await until_called(tickets[0]) == []
        second, third = tickets[1].turn(), tickets[2].turn()
        place, last = await anext(second), await anext(third)
        assert (place.before, last.before) == (1, 2)
        assert 0 < place.seconds <= 10 < last.seconds <= 20
        assert queue.waiting == 2
        tickets[1].leave()
        assert tickets[2].place().before == 1
        await second.aclose()
        await third.aclose()

    asyncio.run(run())


def test_one_that_leaves_the_line_calls_nobody_before_the_first_is_through():
    async def run():
        queue = ReplyQueue(3)
        first, second, third = (queue.admit() for _ in range(3))
        await until_called(first)
        waiting, last = second.turn(), third.turn()
        await anext(waiting), await anext(last)
        second.leave()
        assert not third.called.is_set()
        first.leave()
        assert third.called.is_set()
        await waiting.aclose()
        await last.aclose()

    asyncio.run(run())


def test_metrics_are_in_the_text_format():
    metrics = Metrics(lambda: 2, lambda: 3)
    metrics.ended("end")
    metrics.ended("full")
    metrics.ended("full")
    metrics.replied(prompt=10, generated=5, first_token=0.2, seconds=0.5)
    metrics.replied(prompt=1, generated=1, first_token=None, seconds=0)
    text = metrics.text()
    sample = r'unimoe_\w+(\{\w+="[^"]*"\})? [\d.e+-]+'
    for line in text.splitlines():
        assert re.fullmatch(sample, line) or line.startswith(("# HELP unimoe_", "# TYPE unimoe_"))
    found = dict(line.rsplit(" ", 1) for line in text.splitlines() if line[0] != "#")
    assert found["unimoe_queue_waiting"] == "2"
    assert found["unimoe_queue_admitted"] == "3"
    assert found['unimoe_requests_total{ending="full"}'] == "2"
    assert found['unimoe_tokens_total{of="prompt"}'] == "11"
    assert found['unimoe_tokens_total{of="generated"}'] == "6"
    first = "unimoe_time_to_first_token_seconds"
    assert found[f'{first}_bucket{{le="0.1"}}'] == "0"
    assert found[f'{first}_bucket{{le="0.25"}}'] == found[f'{first}_bucket{{le="+Inf"}}'] == "1"
    assert (found[f"{first}_sum"], found[f"{first}_count"]) == ("0.2", "1")
    rate = "unimoe_tokens_per_second"  # four tokens in half a second
    assert (found[f"{rate}_sum"], found[f'{rate}_bucket{{le="5"}}']) == ("8", "0")
