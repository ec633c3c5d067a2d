"""A conversation with a model: replies as pieces of text while they are generated."""

from collections.abc import Callable, Iterator, Sequence
from threading import Event, Thread

import torch
from transformers import StoppingCriteria, TextIteratorStreamer

from unimoe_model.chat.prefix_cache import PrefixCache
from unimoe_model.chat.sampling import Sampling
from unimoe_model.data.encoded_media import EncodedMedia, Row
from unimoe_model.modeling import UniMoEForConditionalGeneration
from unimoe_model.processing import UniMoEProcessor
from unimoe_model.prompt import PLACEHOLDERS


class ContextFullError(ValueError):
    """A conversation does not fit in the model's context together with the next message."""


class Conversation:
    """Turns of a user and a model, without any terminal or page around them.

    Each prompt is the whole conversation as the processor writes it, and the cache of keys and
    values is kept for as much of it as was computed before: the replies are those to the whole
    conversation. One reply is generated at a time, in a thread of its own.

    Args:
        model: in eval mode.
        processor: made for the model.
        system: what stands before the first turn; None is the processor's `system_prompt`.
        max_new_tokens: longest reply, in tokens; the model's context bounds it as well.
        sampling: how tokens are chosen; greedy unless given.
        generate: what generates, with the arguments of `model.generate`, which is the default.

    Raises:
        ValueError: If `max_new_tokens` is less than 1, or `system` does not fit in the context or
            is refused by the chat template.

    Example:
        >>> from unimoe_model import Answerer
        >>> answerer = Answerer.from_pretrained("runs/mine/model")
        >>> conversation = Conversation(answerer.model, answerer.processor)
        >>> for piece in conversation.reply("what shape is it?", images=["circle.png"]):
        ...     print(piece, end="")
    """

    def __init__(
        self,
        model: UniMoEForConditionalGeneration,
        processor: UniMoEProcessor,
        *,
        system: str | None = None,
        max_new_tokens: int = 512,
        sampling: Sampling | None = None,
        generate: Callable[..., torch.Tensor] | None = None,
    ):
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens ({max_new_tokens}) must be at least 1")
        self.model = model
        self.processor = processor
        self.max_new_tokens = max_new_tokens
        self._system = system
        self._sampling = sampling or Sampling()
        self._generate_tokens = generate or model.generate
        self._prefix = PrefixCache(model.config)
        self._stopped = Event()
        self._thread: Thread | None = None
        self.reset()
        self._prompt([("?", None)], [])

    @property
    def turns(self) -> tuple[tuple[str, str], ...]:
        """What the user said, with placeholders of media, and what the model replied."""
        return tuple(self._turns)

    def reply(
        self,
        text: str = "",
        *,
        images: Sequence = (),
        videos: Sequence = (),
        speech: Sequence = (),
        audio: Sequence = (),
        frame_seed: int | None = None,
    ) -> Iterator[str]:
        """Generates the reply to a message.

        When the pieces are through, message and reply belong to the conversation, also where the
        reply was stopped or reached its limit; `ending` tells why it ended. A message whose reply
        has no words is forgotten.

        Args:
            text: may be empty when speech asks. Where it holds placeholders, such as `<image>`,
                they say where the media go; else the media come first.
            images: pictures, as in `UniMoEProcessor`.
            videos: videos, likewise.
            speech: recordings of speech, likewise.
            audio: other recordings, likewise.
            frame_seed: None chooses the frames of videos evenly, a number at random.

        Returns:
            Pieces of the reply, as soon as they are known; together they are the reply, without
            white space around it. Closing the iterator stops the reply.

        Raises:
            ContextFullError: If the conversation with this message leaves no room in the context.
            ValueError: If there is nothing to reply to, media cannot be read or do not match the
                placeholders; from the iterator, if a reply cannot be part of a prompt.
            RuntimeError: If the reply before this one is still being generated.
        """
        self._wait_for_stopped_reply()
        self._stopped = Event()
        media = {"images": images, "videos": videos, "speech": speech, "audio": audio}
        user = self.processor.question_turn(text, **media)
        items = self.processor.question_row(text, frame_seed=frame_seed, **media).media
        prompt = self._prompt([*self._turns, (user, None)], [*self._items, *items])
        self._ending, self._error = None, None
        self._num_tokens = (len(prompt.text.ids), 0)
        pieces = _Pieces(self.processor.tokenizer)
        self._thread = Thread(target=self._generate, args=(prompt, user, items, pieces))
        self._thread.start()
        return self._pieces(pieces, self._thread, self._stopped)

    @property
    def ending(self) -> str | None:
        """Why the last reply ended.

        `"end"` where the model ended it, `"stopped"`, `"length"` at `max_new_tokens`, `"context"`
        where the context is full, and None while it is generated, or if it failed.
        """
        return self._ending

    @property
    def num_tokens(self) -> tuple[int, int]:
        """Tokens of the last prompt, soft ones included, and of the reply to it."""
        return self._num_tokens

    @property
    def context(self) -> int:
        """Most positions of prompt and reply together."""
        return self.model.config.text_config.max_position_embeddings

    def stop(self) -> None:
        """Ends the reply that is being generated after its current token; from any thread."""
        self._stopped.set()

    def reset(self) -> None:
        """Forgets the conversation; stops a reply that is being generated."""
        self.stop()
        self._wait_for_stopped_reply()
        self._turns: list[tuple[str, str]] = []
        self._items: list[tuple[str, EncodedMedia]] = []
        self._ending, self._error = None, None
        self._num_tokens = (0, 0)
        self._prefix.clear()

    def resume(
        self, turns: Sequence[tuple[str, str]], items: Sequence[tuple[str, EncodedMedia]] = ()
    ) -> None:
        """Takes over a conversation that was held before, instead of this one.

        Args:
            turns: as `turns` gives them.
            items: kind and features of each item of media, in the order of the placeholders.

        Raises:
            ValueError: If items do not match the placeholders, or a turn cannot be part of a
                prompt; nothing has changed then.
        """
        if turns:
            self._prompt(turns, items)
        self.reset()
        self._turns, self._items = list(turns), list(items)

    def free_cache(self) -> None:
        """Frees keys and values; the next reply computes the whole conversation anew.

        Raises:
            RuntimeError: If a reply is being generated.
        """
        self._wait_for_stopped_reply()
        self._prefix.clear()

    def _wait_for_stopped_reply(self) -> None:
        thread = self._thread
        if thread is None:
            return
        if thread.is_alive() and not self._stopped.is_set():
            raise RuntimeError("a reply is being generated; it must end or be stopped first")
        thread.join()

    def _prompt(
        self, turns: Sequence[tuple[str, str | None]], items: Sequence[tuple[str, EncodedMedia]]
    ) -> Row:
        media = {kind: [item for of, item in items if of == kind] for kind in PLACEHOLDERS}
        prompt = self.processor.rows([self.processor.tokenize(turns, self._system)], media)[0]
        if turns[-1][1] is None and len(prompt.text.ids) >= self.context:
            raise ContextFullError(
                f"the conversation with this message ({len(prompt.text.ids)} tokens) must be"
                f" shorter than the model's context ({self.context})"
            )
        return prompt

    def _pieces(self, pieces: "_Pieces", thread: Thread, stopped: Event) -> Iterator[str]:
        try:
            yield from pieces
        except BaseException:  # closed early, or interrupted
            stopped.set()
            raise
        finally:
            thread.join()
        if self._error is not None:
            raise self._error

    def _generate(
        self, prompt: Row, user: str, items: tuple[tuple[str, EncodedMedia], ...], pieces: "_Pieces"
    ) -> None:
        try:
            generated = self._continue(prompt, pieces)
            self._num_tokens = (len(prompt.text.ids), len(generated))
            ending = self._reason(generated, self.context - len(prompt.text.ids))
            if pieces.text:
                self._remember(user, pieces.text, items)
            self._ending = ending
        except Exception as error:  # the caller's thread raises it
            self._error = error
        finally:
            # Not where `generate` ends its stream: the reply must be remembered by then.
            pieces.text_queue.put(pieces.stop_signal)

    @torch.inference_mode()
    def _continue(self, prompt: Row, pieces: "_Pieces") -> list[int]:
        inputs = self.processor.collate([prompt], "left")
        del inputs["labels"]
        length = inputs["input_ids"].shape[1]
        device = self.model.device
        cache = self._prefix.begin(prompt)
        produced = self._generate_tokens(
            **inputs.to(device),
            cache=cache,
            do_sample=False,
            num_beams=1,
            logits_processor=self._sampling.processors(device, len(self._turns)),
            max_new_tokens=min(self.max_new_tokens, self.context - length),
            pad_token_id=self.processor.tokenizer.pad_token_id,
            eos_token_id=self.processor.stop_token_ids,
            stopping_criteria=[_Stop(self._stopped)],
            streamer=pieces,
        )
        generated = produced[0, length:].tolist()
        self._prefix.end(generated)
        return generated

    def _reason(self, generated: Sequence[int], room: int) -> str:
        if generated[-1] in self.processor.stop_token_ids:
            return "end"
        if self._stopped.is_set():
            return "stopped"
        return "context" if len(generated) == room else "length"

    def _remember(self, user: str, reply: str, items: Sequence[tuple[str, EncodedMedia]]) -> None:
        turns, held = [*self._turns, (user, reply)], [*self._items, *items]
        try:
            self._prompt(turns, held)
        except ValueError as error:
            raise ValueError(f"this reply cannot stay in the conversation: {error}") from error
        self._turns, self._items = turns, held


class _Stop(StoppingCriteria):
    def __init__(self, stopped: Event):
        self._stopped = stopped

    def __call__(self, input_ids: torch.Tensor, scores, **kwargs) -> torch.Tensor:
        """Whether each row ends here."""
        return torch.full(
            (len(input_ids),), self._stopped.is_set(), dtype=torch.bool, device=input_ids.device
        )


class _Pieces(TextIteratorStreamer):
    """Text of a reply without special tokens and white space around it; `text` is all of it."""

    def __init__(self, tokenizer):
        # Cleaning up would change text that was given out before.
        super().__init__(
            tokenizer,
            skip_prompt=True,
            skip_special_tokens=True,
            clean_up_tokenization_spaces=False,
        )
        self.text = ""
        self._space = ""

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Takes text from `generate`; white space waits for what comes after it."""
        text = self._space + text
        if not self.text:
            text = text.lstrip()
        piece = text.rstrip()
        self._space = text[len(piece) :]
        self.text += piece
        if piece:
            self.text_queue.put(piece)
