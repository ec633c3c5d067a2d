"""A conversation with a model whose replies are streamed."""

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
    """Raised when a conversation and the next message exceed the model's context."""


class Conversation:
    """A conversation between a user and a model.

    Each prompt is the whole conversation as the processor formats it; keys and values of the
    prefix that was already computed are reused. One reply is generated at a time, in its own
    thread.

    Args:
        model: model in eval mode.
        processor: the model's processor.
        system: system prompt before the first turn; None uses the processor's `system_prompt`.
        max_new_tokens: maximum tokens per reply; the model's context also limits it.
        sampling: how the next token is selected; greedy by default.
        generate: called instead of `model.generate`, with the same arguments.

    Raises:
        ValueError: If `max_new_tokens` is less than 1, `system` does not fit into the context, or
            the chat template rejects it.

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
        """Pairs of the user's message, with media placeholders, and the model's reply."""
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

        Once the iterator is exhausted, message and reply are part of the conversation, even if the
        reply was stopped or reached its limit; `ending` is the reason why it ended. If the reply
        has no text, the message is dropped.

        Args:
            text: the message; may be empty if the question is spoken. Placeholders such as
                `<image>` mark where media are inserted; without them media come first.
            images: images, in any form that `UniMoEProcessor` accepts.
            videos: videos, in any form that `UniMoEProcessor` accepts.
            speech: speech recordings, in any form that `UniMoEProcessor` accepts.
            audio: other recordings, in any form that `UniMoEProcessor` accepts.
            frame_seed: seed for drawing the frames of videos at random; None spaces them evenly.

        Returns:
            An iterator over pieces of the reply, yielded as they are generated. Concatenated, they
            are the reply without surrounding white space. Closing the iterator stops the reply.

        Raises:
            ContextFullError: If the conversation with this message fills the context.
            ValueError: If the message is empty, or media cannot be read or do not match the
                placeholders; from the iterator, if the reply cannot be part of a prompt.
            RuntimeError: If the previous reply is still being generated.
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

        `"end"` (the model generated an end token), `"stopped"` (`stop` was called), `"length"`
        (`max_new_tokens` was reached), `"context"` (the context is full), or None while the reply
        is being generated or if it failed.
        """
        return self._ending

    @property
    def num_tokens(self) -> tuple[int, int]:
        """Number of tokens of the last prompt, soft tokens included, and of its reply."""
        return self._num_tokens

    @property
    def context(self) -> int:
        """Maximum number of positions of prompt and reply together."""
        return self.model.config.text_config.max_position_embeddings

    def stop(self) -> None:
        """Stops the current reply after its next token; may be called from any thread."""
        self._stopped.set()

    def reset(self) -> None:
        """Clears the conversation, after stopping a reply that is being generated."""
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
        """Replaces the conversation by an earlier one.

        Args:
            turns: turns in the form of the property `turns`.
            items: kind and features of each media item, in the order of the placeholders.

        Raises:
            ValueError: If items do not match the placeholders, or a turn cannot be part of a
                prompt; the conversation is then unchanged.
        """
        if turns:
            self._prompt(turns, items)
        self.reset()
        self._turns, self._items = list(turns), list(items)

    def free_cache(self) -> None:
        """Frees cached keys and values; the next reply recomputes the whole conversation.

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
            # Not in `generate`'s end of stream: the turn must be recorded before the stream ends.
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
    """Streams a reply without special tokens and surrounding white space; `text` is all of it."""

    def __init__(self, tokenizer):
        # Clean-up would change text that has already been yielded.
        super().__init__(
            tokenizer,
            skip_prompt=True,
            skip_special_tokens=True,
            clean_up_tokenization_spaces=False,
        )
        self.text = ""
        self._space = ""

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Receives text from `generate`; trailing white space is held back until text follows."""
        text = self._space + text
        if not self.text:
            text = text.lstrip()
        piece = text.rstrip()
        self._space = text[len(piece) :]
        self.text += piece
        if piece:
            self.text_queue.put(piece)
