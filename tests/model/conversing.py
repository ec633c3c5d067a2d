"""Conversations with tiny models: controlled replies, recorded inputs, and a reference."""

import threading
from contextlib import contextmanager

import torch

from unimoe_model.chat.conversation import Conversation
from unimoe_model.processing import UniMoEProcessor
from unimoe_model.prompt import PLACEHOLDERS

WORDS = (" red", " circle", " shape", " word", " yes", " no", " a", " is", " it")
PATIENCE = 60
"""Seconds that a test waits for another thread before it fails."""


def keep_to_words(model, tokenizer):
    """Restricts a model to whole words, whose text is always tokenized to the same ids."""
    allowed = {tokenizer.encode(word, add_special_tokens=False)[0] for word in WORDS}
    everything = range(model.config.text_config.vocab_size)
    model.generation_config.suppress_tokens = [i for i in everything if i not in allowed]
    return model


class Seen:
    """Records the number of positions of each forward of the LLM."""

    def __init__(self, model, on_forward=lambda count: None):
        self.lengths = []

        def before(module, args, kwargs):
            self.lengths.append(kwargs["inputs_embeds"].shape[1])
            on_forward(len(self.lengths))

        self._handle = model.model.language_model.register_forward_pre_hook(
            before, with_kwargs=True
        )

    def remove(self):
        self._handle.remove()


@contextmanager
def says(model, tokens):
    """Makes a model generate these ids."""
    remaining, settings = list(tokens), model.generation_config
    suppressed = settings.suppress_tokens

    def after(module, args, logits):
        forced = torch.full_like(logits, -100.0)
        forced[..., remaining.pop(0)] = 100.0
        return forced

    settings.suppress_tokens = sorted(model.config.media_token_ids.values())
    handle = model.lm_head.register_forward_hook(after)
    yield
    handle.remove()
    settings.suppress_tokens = suppressed


@torch.no_grad()
def anew(model, processor, turns, media, max_new_tokens, system=None):
    """The reply to a whole conversation by one pass of `generate`, and the prompt's length."""
    row = processor.rows([processor.tokenize(turns, system)], media)[0]
    inputs = processor.collate([row], "left")
    del inputs["labels"]
    length = inputs["input_ids"].shape[1]
    produced = model.generate(
        **inputs,
        do_sample=False,
        max_new_tokens=max_new_tokens,
        pad_token_id=processor.tokenizer.pad_token_id,
        eos_token_id=processor.stop_token_ids,
    )
    return processor.decode_answers(produced, length)[0], length


class Checked:
    """A conversation whose replies are compared with those of an uncached pass over all of it."""

    def __init__(self, model, processor, max_new_tokens=6, **options):
        self.model, self.processor = model, processor
        self.conversation = Conversation(model, processor, max_new_tokens=max_new_tokens, **options)
        self.media = {kind: [] for kind in PLACEHOLDERS}
        self.prefilled, self.whole = 0, 0

    def reply(self, text="", **media):
        """Sends a message; sets `prefilled` (length of the first forward) and `whole` (of all)."""
        names = {"images": "image", "videos": "video", "speech": "speech", "audio": "audio"}
        for name, items in media.items():
            self.media[names[name]] += items
        user = self.processor.question_turn(text, **media)
        turns = [*self.conversation.turns, (user, None)]
        seen = Seen(self.model)
        reply = "".join(self.conversation.reply(text, **media))
        seen.remove()
        self.prefilled = seen.lengths[0]
        assert seen.lengths[1:] == [1] * (len(seen.lengths) - 1)
        expected, self.whole = anew(
            self.model, self.processor, turns, self.media, self.conversation.max_new_tokens
        )
        assert reply == expected
        assert self.conversation.turns == (*turns[:-1], (user, reply))
        return reply


def processor_of(model, tokenizer, **options):
    return UniMoEProcessor.from_config(model.config, tokenizer, **options)


def wait(event: threading.Event):
    assert event.wait(PATIENCE), "nothing came from the other thread"
