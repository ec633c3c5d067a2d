import pytest
import torch

from unimoe_kernels.testing import relative_error

NEW = {"do_sample": False, "max_new_tokens": 8, "eos_token_id": None}


def left_padded(model, rows):
    width = max(row.shape[1] for row in rows)
    pad = model.config.text_config.pad_token_id
    ids = [torch.nn.functional.pad(r, (width - r.shape[1], 0), value=pad) for r in rows]
    mask = [torch.nn.functional.pad(torch.ones_like(r), (width - r.shape[1], 0)) for r in rows]
    return {"input_ids": torch.cat(ids), "attention_mask": torch.cat(mask)}


def new_tokens(model, inputs, **options):
    with torch.no_grad():
        produced = model.generate(
            **inputs, **(NEW | options), pad_token_id=model.config.text_config.pad_token_id
        )
    return produced[:, inputs["input_ids"].shape[1] :]


@pytest.fixture
def prompts(media_prompt, features):
    """Rows with different media, as single rows and what a batch of all of them takes."""
    rows = [
        media_prompt("image", "image", "speech"),
        media_prompt(question="yes or no?"),
        media_prompt("speech", "image", question=""),
        media_prompt("video", "audio"),
    ]
    images, speech = features("image", 3, seed=1), features("speech", 2, seed=2)
    video, audio = features("video", seed=3), features("audio", seed=4)
    singles = [
        {"input_ids": rows[0], "image_features": images[:2], "speech_features": speech[:1]},
        {"input_ids": rows[1]},
        {"input_ids": rows[2], "image_features": images[2:], "speech_features": speech[1:]},
        {"input_ids": rows[3], "video_features": video, "audio_features": audio},
    ]
    together = {
        "image_features": images,
        "speech_features": speech,
        "video_features": video,
        "audio_features": audio,
    }
    return rows, singles, together


def test_cache_changes_nothing(tiny_model, prompts):
    model = tiny_model()
    rows, _, media = prompts
    inputs = left_padded(model, rows) | media
    cached = new_tokens(model, inputs)
    assert torch.equal(cached, new_tokens(model, inputs, use_cache=False))
    assert len({tuple(row) for row in cached.tolist()}) == 4, "the rows must differ"


@pytest.mark.parametrize("moe_layers", ["all", "even", "first_half", "second_half", [1, 2]])
@pytest.mark.parametrize("batched", [True, False])
def test_cached_generation_is_full_recomputation(tiny_model, prompts, moe_layers, batched):
    """Rows of all media and lengths, float64: every token is the largest logit of a whole pass."""
    text = {"num_hidden_layers": 4}
    model = tiny_model(text_config=text, moe_layers=moe_layers).double()
    suppressed = list(model.config.media_token_ids.values())
    rows, singles, media = prompts
    if batched:
        inputs = left_padded(model, rows) | media
        cached = new_tokens(model, inputs, max_new_tokens=12)
    else:
        cached = torch.cat([new_tokens(model, single, max_new_tokens=12) for single in singles])
    smallest_gap = torch.inf
    for row, single in enumerate(singles):
        whole = dict(single)
        for token in cached[row]:
            with torch.no_grad():
                logits = model(**whole, use_cache=False).logits[0, -1]
            logits[suppressed] = -torch.inf
            best, second = logits.topk(2).values
            smallest_gap = min(smallest_gap, float(best - second))
            assert int(logits.argmax()) == int(token)
            whole["input_ids"] = torch.cat([whole["input_ids"], token.reshape(1, 1)], 1)
    assert smallest_gap > 1e-5
    assert len({tuple(tokens) for tokens in cached.tolist()}) == len(rows)


def test_greedy_answers_are_the_largest_logits(tiny_model, prompts):
    model = tiny_model()
    _, singles, _ = prompts
    inputs = dict(singles[0])
    produced = new_tokens(model, inputs)
    suppressed = list(model.config.media_token_ids.values())
    for token in produced[0]:
        logits = model(**inputs).logits[0, -1]
        logits[suppressed] = -torch.inf
        assert int(logits.argmax()) == int(token)
        inputs["input_ids"] = torch.cat([inputs["input_ids"], token.reshape(1, 1)], 1)


def test_batch_gives_what_single_rows_give(tiny_model, prompts):
    model = tiny_model()
    rows, singles, media = prompts
    together = new_tokens(model, left_padded(model, rows) | media)
    alone = torch.cat([new_tokens(model, single) for single in singles])
    assert torch.equal(together, alone)


def test_answers_depend_on_the_media(tiny_model, media_prompt, features):
    model = tiny_model()
    ids = media_prompt("image")
    answers = {
        tuple(
            new_tokens(model, {"input_ids": ids, "image_features": features("image", seed=s)})[
                0
            ].tolist()
        )
        for s in range(4)
    }
    assert len(answers) > 1


@pytest.mark.parametrize("beams", [2, 3])
def test_beams_keep_rows_and_media_together(tiny_model, prompts, beams):
    """Rows hold two images, none, one and none, so repeating the items one by one mixes rows."""
    model = tiny_model()
    rows, singles, media = prompts
    together = new_tokens(model, left_padded(model, rows) | media, num_beams=beams)
    alone = torch.cat([new_tokens(model, single, num_beams=beams) for single in singles])
    assert torch.equal(together, alone)


def test_media_of_beams_are_repeated_by_row(tiny_model, prompts):
    model = tiny_model()
    rows, _, media = prompts
    inputs = left_padded(model, rows)
    ids, expanded = model._expand_inputs_for_generation(
        expand_size=2, input_ids=inputs["input_ids"], **media
    )
    images = media["image_features"]
    assert torch.equal(ids[0], ids[1])
    assert torch.equal(expanded["image_features"], images[[0, 1, 0, 1, 2, 2]])


def test_beams_with_media_that_do_not_fit(tiny_model, media_prompt, features):
    inputs = {"input_ids": media_prompt("image"), "image_features": features("image", 2)}
    with pytest.raises(ValueError, match=r"placeholders of 1 image items.*holds 2"):
        new_tokens(tiny_model(), inputs, num_beams=2)


def test_placeholders_are_never_generated(tiny_model, media_prompt):
    model = tiny_model()
    image = model.config.media_token_ids["image"]
    ids = media_prompt()
    with torch.no_grad():
        hidden = model.hidden_states(input_ids=ids)[0, -1]
        model.lm_head.weight[image] = 100 * hidden
    assert int(model(input_ids=ids).logits[0, -1].argmax()) == image
    assert image not in new_tokens(model, {"input_ids": ids})


def test_logits_of_the_cached_steps(tiny_model, prompts):
    """Step by step over a cache gives the logits of one pass over everything."""
    model = tiny_model()
    _, singles, _ = prompts
    ids, media = singles[0]["input_ids"], {k: v for k, v in singles[0].items() if "_f" in k}
    extra = torch.tensor([[20, 30, 40]])
    with torch.no_grad():
        whole = model(input_ids=torch.cat([ids, extra], 1), **media).logits[:, -4:]
        output = model(input_ids=ids, use_cache=True, **media)
        steps = [output.logits[:, -1:]]
        for i in range(3):
            output = model(
                input_ids=extra[:, i : i + 1],
                past_key_values=output.past_key_values,
                use_cache=True,
            )
            steps.append(output.logits)
    assert relative_error(torch.cat(steps, 1), whole) < 1e-5
