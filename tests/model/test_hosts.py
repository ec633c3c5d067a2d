"""Use of the model by transformers: `Trainer`, outputs, assisted decoding."""

import copy

import pytest
import torch
import transformers
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache, StaticCache

from unimoe_kernels.testing import relative_error
from unimoe_model.media_generation import CACHE

NEW = {"do_sample": False, "max_new_tokens": 6, "eos_token_id": None, "pad_token_id": 0}


@pytest.fixture
def llama(tiny_config):
    torch.manual_seed(3)
    return transformers.LlamaForCausalLM(tiny_config().text_config).eval()


@pytest.fixture
def seeing(tiny_model, media_prompt, features):
    """A model, and the inputs of a prompt with two pictures and a recording."""
    inputs = {
        "input_ids": media_prompt("image", "speech", "image"),
        "image_features": features("image", 2),
        "speech_features": features("speech"),
    }
    return tiny_model(), inputs


def rows_of_text(model, count=8):
    """Rows of 12 tokens, of which the first rows have few labels and the last ones many."""
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(20, 250, (count, 12), generator=generator)
    labels = ids.clone()
    for row in range(count):
        labels[row, : 10 - row] = -100
    return [{"input_ids": i, "labels": one} for i, one in zip(ids, labels, strict=True)]


def update_by_trainer(model, rows, batch, accumulated, folder):
    """Change of all weights in one SGD step of transformers' `Trainer`, as one vector."""
    model = copy.deepcopy(model)
    before = torch.cat([p.detach().flatten().clone() for p in model.parameters()])
    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=accumulated,
        max_steps=1,
        learning_rate=1.0,
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        optim="sgd",
        report_to=[],
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
        dataloader_pin_memory=False,
    )
    # In the order that they have, so that both runs see the same rows.
    trainer = transformers.Trainer(model=model, args=arguments, train_dataset=rows)
    trainer._get_train_sampler = lambda *_: torch.utils.data.SequentialSampler(rows)
    trainer.train()
    return torch.cat([p.detach().flatten() for p in model.parameters()]) - before


@pytest.mark.parametrize("kind", ["Uni-MoE", "LLaMA"])
def test_accumulated_gradients_are_those_of_one_batch(tiny_model, llama, tmp_path, kind):
    model = tiny_model() if kind == "Uni-MoE" else llama
    rows = rows_of_text(model, 4)
    whole = update_by_trainer(model, rows, 4, 1, tmp_path)
    assert whole.norm() > 1e-3
    assert relative_error(update_by_trainer(model, rows, 1, 4, tmp_path), whole) < 1e-5


def test_a_trainer_evaluates_the_loss(tiny_model, tmp_path):
    """Its names of labels are read from the model's `forward`; a batch has to have all of them."""
    model = tiny_model()
    rows = rows_of_text(model, 4)
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path), report_to="none", use_cpu=True, dataloader_pin_memory=False
    )
    trainer = transformers.Trainer(model=model, args=arguments, eval_dataset=rows)
    with torch.no_grad():
        expected = model(**{key: torch.stack([row[key] for row in rows]) for key in rows[0]}).loss
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected.item(), rel=1e-6)


def test_loss_over_the_labels_of_several_batches(tiny_model, llama):
    for model in (tiny_model(), llama):
        rows = rows_of_text(model)
        batch = {key: torch.stack([row[key] for row in rows]) for key in rows[0]}
        labelled = (batch["labels"][:, 1:] >= 0).sum()
        mean = model(**batch).loss
        assert relative_error(model(**batch, num_items_in_batch=labelled).loss, mean) < 1e-6
        of_hundred = model(**batch, num_items_in_batch=100).loss
        assert relative_error(of_hundred * 100, mean * labelled) < 1e-6
        shifted = torch.nn.functional.pad(batch["labels"], (0, 1), value=-100)[:, 1:].contiguous()
        loss = model(batch["input_ids"], labels=batch["labels"], shift_labels=shifted).loss
        assert relative_error(loss, mean) < 1e-6


def test_loss_of_bfloat16_logits_is_float32(tiny_model, llama):
    for model in (tiny_model().bfloat16(), llama.bfloat16()):
        rows = rows_of_text(model)
        output = model(**{key: torch.stack([row[key] for row in rows]) for key in rows[0]})
        assert output.logits.dtype == torch.bfloat16
        assert output.loss.dtype == torch.float32


def test_hidden_states_and_attentions(tiny_model, llama, media_prompt):
    ids = media_prompt()
    for model in (tiny_model(), llama):
        model.set_attn_implementation("eager")
        output = model(ids, output_hidden_states=True, output_attentions=True)
        assert len(output.hidden_states) == 3
        assert len(output.attentions) == 2
        assert output.attentions[0].shape == (1, 2, ids.shape[1], ids.shape[1])
        assert torch.equal(output.hidden_states[0], model.get_input_embeddings()(ids))
        assert torch.equal(model.lm_head(output.hidden_states[-1]), output.logits)
        assert model(ids).hidden_states is None
        produced = model.generate(
            ids, **NEW, return_dict_in_generate=True, output_hidden_states=True
        )
        assert [len(step) for step in produced.hidden_states] == [3] * 6


def test_outputs_as_a_tuple(tiny_model, llama, media_prompt):
    ids = media_prompt()
    for model in (tiny_model(), llama):
        loss, logits, *rest = model(ids, labels=ids, return_dict=False)
        output = model(ids, labels=ids)
        assert torch.equal(loss, output.loss)
        assert torch.equal(logits, output.logits)
        assert len(rest) == 1


def test_logits_of_chosen_positions(tiny_model, llama, media_prompt):
    ids = media_prompt()
    chosen = torch.tensor([0, 3, 5])
    for model in (tiny_model(), llama):
        whole = model(ids).logits
        kept = model(ids, logits_to_keep=chosen).logits
        assert relative_error(kept, whole[:, chosen]) < 1e-6
        last = model(ids, labels=ids[:, -3:], logits_to_keep=3)
        expected = torch.nn.functional.cross_entropy(whole[0, -3:-1], ids[0, -2:])
        assert relative_error(last.loss, expected) < 1e-6
        with pytest.raises(ValueError, match=r"labels|batch_size"):
            model(ids, labels=ids, logits_to_keep=3)


def test_decoding_goes_on_from_a_cache_that_is_given(tiny_model, llama, media_prompt):
    ids = media_prompt()
    # Ours takes both names that transformers has for it.
    for model, names in ((tiny_model(), ("cache", "past_key_values")), (llama, (CACHE,))):
        expected = model.generate(ids, **NEW)
        for name in names:
            assert torch.equal(model.generate(ids, **NEW, **{name: DynamicCache()}), expected)
            cache = DynamicCache()
            with torch.no_grad():
                model(ids[:, :4], **{name: cache}, use_cache=True)
            assert torch.equal(model.generate(ids, **NEW, **{name: cache}), expected)
    both = {"cache": DynamicCache(), "past_key_values": DynamicCache()}
    with pytest.raises(ValueError, match="give cache or past_key_values, not both"):
        tiny_model().generate(ids, **NEW, **both)


@pytest.mark.parametrize("given", ["all", "rest"])
def test_a_conversation_goes_on_with_another_picture(seeing, given):
    """The cache holds a picture and the recording; media are those of all or of the rest."""
    model, inputs = seeing
    ids, images = inputs["input_ids"], inputs["image_features"]
    expected = model.generate(**inputs, **NEW)
    other = dict(inputs, image_features=images.flip(0))
    assert not torch.equal(model(**inputs).logits, model(**other).logits)
    is_image = ids[0] == model.config.media_token_ids["image"]
    cut = int(is_image.nonzero()[3])
    cache = DynamicCache()
    with torch.no_grad():
        first = {"image_features": images[:1], "speech_features": inputs["speech_features"]}
        model(ids[:, :cut], past_key_values=cache, use_cache=True, **first)
    media = {"image_features": images[1:]}
    if given == "all":
        media = {key: inputs[key] for key in ("image_features", "speech_features")}
    assert torch.equal(model.generate(ids, **NEW, past_key_values=cache, **media), expected)


@pytest.mark.parametrize("media", [True, False])
def test_a_model_assists_itself(seeing, llama, media_prompt, media):
    model, inputs = seeing
    if not media:
        inputs = {"input_ids": media_prompt()}
        expected = llama.generate(**inputs, **NEW)
        assert torch.equal(llama.generate(**inputs, **NEW, assistant_model=llama), expected)
    expected = model.generate(**inputs, **NEW)
    assert torch.equal(model.generate(**inputs, **NEW, assistant_model=model), expected)
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.lm_head.weight.normal_()
    assert torch.equal(model.generate(**inputs, **NEW, assistant_model=other), expected)


def test_chunks_of_a_prompt(seeing, media_prompt):
    model, inputs = seeing
    text = {"input_ids": media_prompt()}
    expected = model.generate(**text, **NEW)
    assert torch.equal(model.generate(**text, **NEW, prefill_chunk_size=4), expected)
    with pytest.raises(ValueError, match=r"prefill_chunk_size \(4\) must be None with media \(ima"):
        model.generate(**inputs, **NEW, prefill_chunk_size=4)
    model.generation_config.prefill_chunk_size = 4
    with pytest.raises(ValueError, match=r"prefill_chunk_size \(4\) must be None with media \(ima"):
        model.generate(**inputs, **NEW)


def test_generation_from_embeddings(seeing, llama, media_prompt):
    """Embeddings work like ids, except with media, for which there are no placeholders."""
    model, inputs = seeing
    ids = media_prompt()
    for one in (model, llama):
        expected = one.generate(ids, **NEW)[:, ids.shape[1] :]
        embedded = one.get_input_embeddings()(ids)
        assert torch.equal(one.generate(inputs_embeds=embedded, **NEW), expected)
    embeddings = model.get_input_embeddings()(inputs.pop("input_ids").clamp(max=200))
    with pytest.raises(ValueError, match="media requires input_ids"):
        model.generate(inputs_embeds=embeddings, **inputs, **NEW)


class Waits(TorchDispatchMode):
    """Counts reads of tensor values, which would synchronise a GPU."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        reading = ("_local_scalar_dense", "nonzero", "is_nonzero", "equal", "masked_select")
        self.count += function.overloadpacket.__name__ in reading
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("cache", [DynamicCache, StaticCache])
def test_a_step_without_media_waits_for_nothing(seeing, monkeypatch, cache):
    """A placeholder without media in such a step gives NaN, not an ordinary output."""
    model, inputs = seeing
    options = {"max_cache_len": 40} if cache is StaticCache else {}
    past = cache(config=model.config.text_config, **options)
    listed = []
    tolist = torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda t: listed.append(t) or tolist(t))
    step = {"past_key_values": past, "use_cache": True}
    with torch.no_grad():
        model(**inputs, **step)
        assert len(listed) == 1
        with Waits() as waits:
            logits = model(torch.tensor([[20]]), **step).logits
        assert logits.isfinite().all()
        assert (len(listed), waits.count) == (1, 0)
        image = torch.tensor([[model.config.media_token_ids["image"]]])
        assert model(image, **step).logits.isnan().all()
