import json
from html.parser import HTMLParser

import pytest
import torch

pytest.importorskip("matplotlib", reason="matplotlib is not installed: pip install .[demo]")
pytest.importorskip("PIL", reason="pillow is not installed: pip install .[demo]")
pytest.importorskip("scipy", reason="scipy is not installed: pip install .[demo]")
pytest.importorskip("soundfile", reason="soundfile is not installed: pip install .[demo]")

from unimoe_model.data.collate import Collator
from unimoe_model.data.examples import EVALUATED_TASKS, Example, MediaBank, MediaRef
from unimoe_model.evaluation.accuracy import (
    accuracy,
    blind_answers,
    generate_answers,
)
from unimoe_model.evaluation.report import TASK_NAMES, Results, print_results, write_report
from unimoe_model.evaluation.routing import RoutingCounts, recorded_routing, routing_shares
from unimoe_model.evaluation.showcase import WorkedExample
from unimoe_model.evaluation.throughput import layer_throughput


def example(answer, key="", question="what?"):
    return Example("task", question, answer, blind_key=key)


def test_accuracy_is_the_share_of_exact_answers():
    examples = [example("red"), example("a red circle"), example("no"), example("yes")]
    assert accuracy(["red", "a red  circle", "No", "yes"], examples) == 0.5


def test_accuracy_needs_an_answer_an_example():
    with pytest.raises(ValueError, match=r"answers \(0\) must be as many as examples \(0\)"):
        accuracy([], [])
    with pytest.raises(ValueError, match=r"answers \(1\) must be as many as examples \(2\)"):
        accuracy(["a"], [example("a"), example("b")])


def test_blind_answers_are_the_most_frequent_of_a_key():
    train = [
        *[example("yes", "k1")] * 2,
        example("no", "k1"),
        example("b", "k2"),
        example("a", "k2"),
        *[example("zebra", "k3")] * 4,
    ]
    asked = [example("?", key) for key in ("k1", "k2", "k3", "unknown")]
    assert blind_answers(train, asked) == ["yes", "a", "zebra", "zebra"]


@pytest.fixture
def asked(tokenizer, tiny_config, features):
    """A collator and examples of several lengths and media."""
    bank = MediaBank()
    bank.add("pictures", "image", features("image", 3))
    bank.add("clips", "speech", features("speech", 2))
    picture = [(MediaRef("image", "pictures", i),) for i in range(3)]
    clip = [(MediaRef("speech", "clips", i),) for i in range(2)]
    examples = [
        Example("a", "what shape is it? a red circle", "circle", picture[0]),
        Example("b", "yes?", "no"),
        Example("c", "", "yes", (*picture[2], *clip[1])),
        Example("d", "which word?", "yes", clip[0]),
        Example("e", "what?", "red", picture[1]),
    ]
    return Collator(tokenizer, tiny_config(), bank), examples


def test_answers_come_in_the_order_of_the_questions(asked, tiny_model, tokenizer):
    collator, examples = asked
    model, done = tiny_model(), []
    answers = generate_answers(
        model, tokenizer, collator, examples, batch_size=2, on_batch=done.append
    )
    alone = [generate_answers(model, tokenizer, collator, [e])[0] for e in examples]
    assert answers == alone
    assert len(set(answers)) > 1
    assert done == [2, 2, 1]


def test_routing_shares_count_tokens_by_modality(asked, tiny_model):
    collator, examples = asked
    model = tiny_model()
    shares = routing_shares(model, collator, examples, batch_size=2)
    assert set(shares) == {"text", "image", "speech"}
    for share in shares.values():
        assert share.shape == (2, 4)
        assert share.dtype == torch.float64
        assert torch.allclose(share.sum(1), torch.ones(2).double())
    batch = collator.training(examples)
    inputs = {k: v for k, v in batch.items() if k != "labels"}
    with recorded_routing(model) as chosen, torch.no_grad():
        model.hidden_states(**inputs)
    is_image = (batch["input_ids"] == model.config.media_token_ids["image"]).flatten()
    counts = torch.bincount(chosen[1][0][is_image].flatten().long(), minlength=4).double()
    assert torch.allclose(shares["image"][1], counts / counts.sum(), atol=1e-6)


def test_hooks_are_gone_after_recording(asked, tiny_model):
    model = tiny_model(moe_layers="even")
    with recorded_routing(model) as chosen:
        model.hidden_states(input_ids=torch.tensor([[20, 30]]))
    assert {layer: len(ids) for layer, ids in chosen.items()} == {0: 1}
    model.hidden_states(input_ids=torch.tensor([[20, 30]]))
    assert len(chosen[0]) == 1


def test_choices_that_no_expert_answers_are_left_out(tiny_model, media_prompt, features):
    """Ids past the experts stand for null experts and choices given up."""
    model = tiny_model()
    ids = media_prompt("image")
    _, moe = next(model.moe_layers())
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    inputs["image_features"] = features("image")

    def give_up_second_choices(module, arguments, routed):
        return routed._replace(ids=torch.cat([routed.ids[:, :1], 4 + 0 * routed.ids[:, 1:]], 1))

    hook = moe.router.register_forward_hook(give_up_second_choices)
    counts = RoutingCounts(model)
    counts.add(inputs)
    hook.remove()
    with recorded_routing(model) as chosen, torch.no_grad():
        model.hidden_states(**inputs)
    is_image = ids[0] == model.config.media_token_ids["image"]
    first = torch.bincount(chosen[0][0][is_image][:, 0], minlength=4).double()
    assert torch.equal(counts.shares()["image"][0], first / 3)
    assert counts.tokens["image"] == 3


def test_throughput_times_three_layers():
    figures = layer_throughput(16, 24, 4, 2, 32, torch.device("cpu"), torch.float32, rounds=1)
    assert set(figures) == {"moe", "looped", "dense"}
    for layer in figures.values():
        assert set(layer) == {"forward_ms", "step_ms", "tokens_per_s"}
        assert all(value > 0 for value in layer.values())


@pytest.fixture
def results():
    values = {task: 0.5 + 0.05 * i for i, task in enumerate(EVALUATED_TASKS)}
    speed = {"forward_ms": 1.0, "step_ms": 3.0, "tokens_per_s": 99.0}
    return Results(
        machine={"precision": "fp32", "threads": 1},
        forecast={"features": 12.5},
        accuracy=values,
        blind=dict.fromkeys(EVALUATED_TASKS, 0.25),
        dense={task: value - 0.1 for task, value in values.items()},
        items=dict.fromkeys(EVALUATED_TASKS, 500),
        seconds={"features": 1.5, "moe/tune": 20.0},
        throughput=dict.fromkeys(("moe", "looped", "dense"), speed),
        throughput_layer={
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_experts": 4,
            "top_k": 2,
            "tokens": 32,
        },
        losses={
            "moe": {"align": [2.0, 1.0], "experts/image": [1.0]},
            "dense": {"align": [2.0, 1.5]},
        },
        routing={"text": torch.full((2, 4), 0.25), "image": torch.eye(4)[:2]},
        experts=["image", "video", "speech", "audio"],
        seed=3,
    )


EXAMPLES = [
    WorkedExample("A picture", ("examples/p.png",), "is 1 < 2 & 3?", "yes", "<b>no</b>"),
    WorkedExample("A sound", ("examples/s.wav",), "which?", "piano", "piano"),
]


class Page(HTMLParser):
    """Collects text, and the src of everything the page shows, of a well-formed page."""

    def __init__(self, text):
        super().__init__()
        self.open, self.sources, self.text = [], [], ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.sources += [value for name, value in attrs if name == "src"]
        if tag not in ("img", "meta", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def test_report_is_one_page_with_pictures_and_metrics(results, tmp_path):
    write_report(results, EXAMPLES, tmp_path)
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    for name in ("accuracy", "blind", "dense"):
        assert list(metrics[name]) == list(EVALUATED_TASKS)
        assert metrics[name] == getattr(results, name)
    assert metrics["seconds"] == {"features": 1.5, "moe/tune": 20.0}
    assert metrics["mean"]["moe"] == pytest.approx(0.625)
    page = Page((tmp_path / "report.html").read_text())
    assert page.open == []
    assert page.sources == [
        "accuracy.png",
        "examples/p.png",
        "examples/s.wav",
        "loss.png",
        "routing.png",
    ]
    for name in ("accuracy.png", "loss.png", "routing.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    for shown in (*TASK_NAMES.values(), "<b>no</b>", "is 1 < 2 & 3?", "62.5", "stands in for CLIP"):
        assert shown in page.text
    assert not list(tmp_path.glob(".*"))


def test_table_and_examples_are_printed(results, tmp_path, capsys):
    print_results(results, EXAMPLES, tmp_path)
    shown = capsys.readouterr().out
    rows = {
        line.strip().rsplit(maxsplit=4)[0]: line.split()[-4:]
        for line in shown.splitlines()
        if line.endswith("     500")
    }
    assert list(rows) == list(TASK_NAMES.values())
    assert rows["spoken word"] == ["55.0", "45.0", "25.0", "500"]
    assert "answered: piano    (right: piano)" in shown
    assert str(tmp_path / "report.html") in shown


def test_every_evaluated_task_has_a_name():
    assert tuple(TASK_NAMES) == EVALUATED_TASKS
