"""The processor: tokenizer and frozen encoders, which build model inputs from text and media."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from transformers import BatchFeature
from transformers.processing_utils import ProcessorMixin

from unimoe_model.chat_template import end_of_turn_id
from unimoe_model.configuration import MEDIA_KINDS, UniMoEConfig
from unimoe_model.data.encoded_media import (
    ASPECT_RATIOS,
    SENSES,
    EncodedMedia,
    MediaOptions,
    Row,
    encode_media,
    read_media,
    stack_media,
)
from unimoe_model.data.packing import restarting_positions
from unimoe_model.data.padding import padded
from unimoe_model.encoders import FrozenEncoder, build_encoder
from unimoe_model.prompt import PLACEHOLDERS, PROMPT_FORMATS, user_turn
from unimoe_model.tokenization import (
    TokenizedText,
    tokenize_chat,
    tokenize_conversation,
    tokenize_rendered,
    tokenize_text,
    truncated,
)

_MEDIA_ARGUMENTS = {"images": "image", "videos": "video", "speech": "speech", "audio": "audio"}
_FILES = (("processor_config.json",), ("tokenizer.json", "tokenizer.model"))


class UniMoEProcessor(ProcessorMixin):
    """Builds the inputs of `UniMoEForConditionalGeneration` from text and media.

    The frozen encoders belong to the processor and not to the model, so that checkpoints hold no
    copies of them; each is built on first use.

    Media are files (paths, bytes, open files) or their content. Pictures may also be Pillow images
    or uint8 `[H, W, 3]`; videos may be lists of pictures or uint8 `[frames, H, W, 3]`, of which
    `video_num_frames` are sampled; recordings may be `[samples]` at the encoder's rate
    (`sample_rate`), pairs of `[samples]` and their rate, or the `{"array", "sampling_rate"}` of
    Hugging Face datasets. Recordings of any length are split into pieces of the encoder's length,
    each of which becomes the same number of soft tokens. Precomputed features are passed as
    `EncodedMedia`. See `data/media_items.py` for the details.

    Args:
        tokenizer: tokenizer with the media placeholders.
        vision_encoder: name of the encoder of pictures and frames; see `build_encoder`.
        speech_encoder: name of the speech encoder.
        audio_encoder: name of the audio encoder.
        num_soft_tokens: number of soft tokens per image, per video, and per piece of speech or
            audio, by media kind.
        video_num_frames: frames sampled from a video.
        speech_max_frames: maximum number of feature frames per piece of speech.
        system_prompt: system prompt of `ask` and of conversations.
        prompt_format: `"vicuna"` for the published prompt, `"chat"` for the tokenizer's own chat
            template.
        image_aspect_ratio: `"square"` crops the centre of a picture, `"pad"` pads it to a square;
            only CLIP supports `"pad"`.

    Raises:
        ValueError: If a placeholder is not a token of the tokenizer, the tokenizer has no padding
            token, a media kind has no number of soft tokens, `image_aspect_ratio` or
            `prompt_format` is unknown, or there is no chat template for `"chat"`.
    """

    def __init__(
        self,
        tokenizer=None,
        vision_encoder: str = "",
        speech_encoder: str = "",
        audio_encoder: str = "",
        num_soft_tokens: dict[str, int] | None = None,
        video_num_frames: int = 8,
        speech_max_frames: int = 1500,
        system_prompt: str = "",
        prompt_format: str = "vicuna",
        image_aspect_ratio: str = "square",
        **kwargs,
    ):
        super().__init__(tokenizer, **kwargs)
        self.vision_encoder = vision_encoder
        self.speech_encoder = speech_encoder
        self.audio_encoder = audio_encoder
        self.num_soft_tokens = num_soft_tokens or {}
        missing = [kind for kind in MEDIA_KINDS if kind not in self.num_soft_tokens]
        if missing:
            raise ValueError(f"num_soft_tokens must have all of {MEDIA_KINDS}, missing {missing}")
        if image_aspect_ratio not in ASPECT_RATIOS:
            raise ValueError(
                f"image_aspect_ratio ({image_aspect_ratio!r}) must be one of {ASPECT_RATIOS}"
            )
        self.video_num_frames = video_num_frames
        self.speech_max_frames = speech_max_frames
        self.system_prompt = system_prompt
        if prompt_format not in PROMPT_FORMATS:
            raise ValueError(f"prompt_format ({prompt_format!r}) must be one of {PROMPT_FORMATS}")
        if prompt_format == "chat" and not tokenizer.chat_template:
            raise ValueError("prompt_format ('chat') requires a tokenizer with a chat template")
        self.prompt_format = prompt_format
        self.image_aspect_ratio = image_aspect_ratio
        if tokenizer.pad_token_id is None:
            raise ValueError(
                "tokenizer must have a pad_token; there is none (tokenizer_config.json names it)"
            )
        unknown = tokenizer.unk_token_id
        for placeholder in PLACEHOLDERS.values():
            if tokenizer.convert_tokens_to_ids(placeholder) in (None, unknown):
                raise ValueError(f"tokenizer has no token {placeholder}")

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, **options) -> "UniMoEProcessor":
        """Loads a processor from a folder or a repository of the Hugging Face hub.

        Raises:
            ValueError: If a file of the folder is missing.
        """
        folder = Path(pretrained_model_name_or_path, options.get("subfolder") or "")
        for names in _FILES if folder.is_dir() else ():
            if not any((folder / name).is_file() for name in names):
                raise ValueError(f"folder ({folder}) must hold {' or '.join(names)}")
        return super().from_pretrained(pretrained_model_name_or_path, **options)

    @classmethod
    def from_config(cls, config: UniMoEConfig, tokenizer, **options) -> "UniMoEProcessor":
        """Builds the processor of a model's configuration; `options` are those of the class."""
        return cls(
            tokenizer,
            vision_encoder=config.vision_encoder,
            speech_encoder=config.speech_encoder,
            audio_encoder=config.audio_encoder,
            num_soft_tokens={kind: config.num_soft_tokens(kind) for kind in MEDIA_KINDS},
            video_num_frames=config.video_num_frames,
            speech_max_frames=config.speech_max_frames,
            **options,
        )

    def __call__(
        self,
        text: str | Sequence[str],
        images: Sequence = (),
        videos: Sequence = (),
        speech: Sequence = (),
        audio: Sequence = (),
        *,
        max_length: int | None = None,
        padding_side: str = "left",
        frame_seed: int | None = None,
    ) -> BatchFeature:
        """Tokenizes prompts and encodes their media.

        Args:
            text: complete prompts, with one placeholder per item, in any order and number, as
                written by `build_prompt` or a chat template.
            images: pictures, in the order of their placeholders, prompt by prompt.
            videos: videos, in the order of their placeholders.
            speech: speech recordings, in the order of their placeholders.
            audio: other recordings, in the order of their placeholders.
            max_length: maximum tokens per row, soft tokens included. Longer rows are truncated; an
                item that does not fit is removed with its placeholder and everything after it.
            padding_side: `"left"` for generation, `"right"` for training; outputs are the same.
            frame_seed: seed for drawing the frames of videos at random; None spaces them evenly.

        Returns:
            `input_ids` and `attention_mask` `[B, S]` int64, and for each kind of media given
            `<kind>_features` float32; also `audio_features_mask` if pieces differ in length.

        Raises:
            ValueError: If placeholders and media do not match in number, or an item is empty,
                unreadable or has a wrong shape.
        """
        prompts = [text] if isinstance(text, str) else list(text)
        if not prompts:
            raise ValueError("text must hold at least one prompt")
        if self.prompt_format == "chat":
            texts = [tokenize_rendered(prompt, self.tokenizer) for prompt in prompts]
        else:
            ids = self._media_token_ids()
            texts = [tokenize_text(prompt, self.tokenizer, ids) for prompt in prompts]
        media = dict(zip(MEDIA_KINDS, (images, videos, speech, audio), strict=True))
        batch = self.collate(self.rows(texts, media, max_length, frame_seed), padding_side)
        del batch["labels"]
        return batch

    def training_inputs(
        self,
        conversations: Sequence[Sequence[tuple[str, str]]],
        images: Sequence = (),
        videos: Sequence = (),
        speech: Sequence = (),
        audio: Sequence = (),
        *,
        max_length: int | None = None,
        padding_side: str = "right",
        frame_seed: int | None = None,
    ) -> BatchFeature:
        """Builds inputs and labels from conversations.

        Args:
            conversations: the turns of each conversation: the user's message, with a placeholder
                for each item, and the answer, which is labelled together with its end-of-turn
                token.
            images: a list with a file, a Pillow image or uint8 `[H, W, 3]` for each `<image>`.
            videos: a list with a file, a folder of pictures, or frames for each `<video>`.
            speech: a list with a file, samples, or samples and their rate for each `<speech>`.
            audio: a list with a file, samples, or samples and their rate for each `<audio>`.
            max_length: maximum tokens per row, soft tokens included; longer rows are truncated.
            padding_side: `"right"` or `"left"`.
            frame_seed: seed for drawing the frames of videos at random; None spaces them evenly.

        Returns:
            The outputs of `__call__`, and `labels` `[B, S]` int64, -100 at positions without loss.
        """
        texts = [self.tokenize(turns) for turns in conversations]
        media = dict(zip(MEDIA_KINDS, (images, videos, speech, audio), strict=True))
        return self.collate(self.rows(texts, media, max_length, frame_seed), padding_side)

    def ask(self, question: str = "", *, frame_seed: int | None = None, **media) -> BatchFeature:
        """Builds the prompt and inputs of one question.

        Args:
            question: the question; may be empty if it is spoken. Placeholders mark where media are
                inserted; without them media come first.
            frame_seed: seed for drawing the frames of videos at random; None spaces them evenly.
            **media: lists `images`, `videos`, `speech`, `audio` as in `__call__`.

        Returns:
            The outputs of `__call__`, with one row.
        """
        row = self.question_row(question, frame_seed=frame_seed, **media)
        batch = self.collate([row], "left")
        del batch["labels"]
        return batch

    def question_row(self, question: str = "", *, frame_seed: int | None = None, **media) -> Row:
        """Builds the row of one question, for `collate`; the arguments are those of `ask`."""
        text = self.tokenize([(self.question_turn(question, **media), None)])
        items = {kind: media.get(name, ()) for name, kind in _MEDIA_ARGUMENTS.items()}
        return self.rows([text], items, frame_seed=frame_seed)[0]

    def question_turn(self, question: str = "", **media) -> str:
        """The user's message of one question, with placeholders; arguments as in `ask`."""
        if unknown := media.keys() - _MEDIA_ARGUMENTS.keys():
            raise TypeError(
                f"media ({sorted(unknown)}) must be among {', '.join(_MEDIA_ARGUMENTS)}"
            )
        if any(placeholder in question for placeholder in PLACEHOLDERS.values()):
            return user_turn(question)
        kinds = [kind for name, kind in _MEDIA_ARGUMENTS.items() for _ in media.get(name, ())]
        return user_turn(question, kinds)

    def sample_rate(self, kind: str) -> int:
        """Sampling rate in Hz of the encoder of `kind`, `"speech"` or `"audio"`."""
        return self.encoder(kind).sample_rate

    def decode_answers(self, sequences: torch.Tensor, prompt_length: int) -> list[str]:
        """Decodes the answers in sequences `[B, S]` after a prompt of `prompt_length` tokens."""
        texts = self.tokenizer.batch_decode(sequences[:, prompt_length:], skip_special_tokens=True)
        return [text.strip() for text in texts]

    def _media_token_ids(self) -> dict[str, int]:
        return {
            kind: self.tokenizer.convert_tokens_to_ids(placeholder)
            for kind, placeholder in PLACEHOLDERS.items()
        }

    def rows(
        self,
        texts: Sequence[TokenizedText],
        media: Mapping[str, Sequence],
        max_length: int | None = None,
        frame_seed: int | None = None,
    ) -> list[Row]:
        """Builds rows with expanded placeholders and the features of their media.

        Args:
            texts: one text per row.
            media: items by kind, in the order of their placeholders, row by row; precomputed
                features are passed as `EncodedMedia`.
            max_length: maximum tokens per row; see `__call__`.
            frame_seed: seed for drawing the frames of videos at random; None spaces them evenly.

        Raises:
            ValueError: If placeholders and media do not match in number.
        """
        token_ids = self._media_token_ids()
        held = [text.items(token_ids) for text in texts]
        for kind, items in media.items():
            expected = sum(kinds.count(kind) for kinds in held)
            if expected != len(items):
                raise ValueError(
                    f"text holds {expected} {PLACEHOLDERS[kind]} but {len(items)} {kind} items were"
                    " given; each item needs one placeholder and each placeholder one item"
                )
        encoded = {
            kind: iter([self.encode(kind, item, frame_seed) for item in items])
            for kind, items in media.items()
        }
        found = []
        for text, kinds in zip(texts, held, strict=True):
            items = [(kind, next(encoded[kind])) for kind in kinds]
            soft = [len(item.pieces) * self.num_soft_tokens[kind] for kind, item in items]
            if max_length is not None:
                text, fitting = truncated(text, token_ids, soft, max_length)
                items, soft = items[:fitting], soft[:fitting]
            found.append(Row(text.expanded(token_ids, soft), tuple(items)))
        return found

    def collate(
        self, rows: Sequence[Row], padding_side: str = "right", min_length: int = 1
    ) -> BatchFeature:
        """Pads rows to the longest and collates inputs and labels; see `training_inputs`.

        For packed rows, `attention_mask` is replaced by `token_mask` `[B, S]` bool, False on
        padding, and `position_ids` `[B, S]` int64, which keep their conversations separate.

        Args:
            rows: rows of the batch.
            padding_side: `"right"` or `"left"`.
            min_length: minimum number of tokens per row, padding included.
        """
        batch = padded(
            [row.text for row in rows], self.tokenizer.pad_token_id, padding_side, min_length
        )
        if rows[0].lengths:
            lengths, width = [row.lengths for row in rows], batch["input_ids"].shape[1]
            batch["token_mask"] = batch.pop("attention_mask").bool()
            batch["position_ids"] = restarting_positions(lengths, width, padding_side)
        for kind in MEDIA_KINDS:
            items = [item for row in rows for held, item in row.media if held == kind]
            batch |= stack_media(kind, items)
        return BatchFeature(batch)

    def tokenize(
        self, turns: Sequence[tuple[str, str | None]], system: str | None = None
    ) -> TokenizedText:
        """Token ids and labels of a conversation, without expanding placeholders.

        Args:
            turns: pairs of the user's message and the answer; a last answer of None ends the text
                with the generation prompt.
            system: system prompt; None for `system_prompt`.
        """
        system = self.system_prompt if system is None else system
        if self.prompt_format == "chat":
            return tokenize_chat(turns, self.tokenizer, system)
        return tokenize_conversation(turns, self.tokenizer, self._media_token_ids(), system)

    @property
    def stop_token_ids(self) -> list[int]:
        """Ids that end an answer: the end-of-sequence token and the chat template's end of turn."""
        ids = [self.tokenizer.eos_token_id]
        if self.prompt_format == "chat":
            ids.append(end_of_turn_id(self.tokenizer))
        return list(dict.fromkeys(ids))

    def encode(self, kind: str, item, frame_seed: int | None = None) -> EncodedMedia:
        """Encodes one media item; returns `EncodedMedia` unchanged."""
        if isinstance(item, EncodedMedia):
            return item
        encoder = self.encoder(SENSES[kind])
        read = read_media(kind, item, encoder, self.media_options, frame_seed)
        (pieces,) = encode_media(kind, [read], encoder, self.media_options)
        return EncodedMedia(tuple(piece.float() for piece in pieces))

    @property
    def media_options(self) -> MediaOptions:
        """Settings, other than the encoders, that affect the features of media."""
        return MediaOptions(self.video_num_frames, self.speech_max_frames, self.image_aspect_ratio)

    def encoder(self, sense: str) -> FrozenEncoder:
        """Returns an encoder, which is built at the first use in a process.

        Args:
            sense: `"vision"`, `"speech"` or `"audio"`.

        Raises:
            ValueError: As `build_encoder`.
            OSError: As `build_encoder`.
        """
        name = getattr(self, f"{sense}_encoder")
        if (sense, name) not in _BUILT:
            _BUILT[sense, name] = build_encoder(name, sense)
        return _BUILT[sense, name]


_BUILT: dict[tuple[str, str], FrozenEncoder] = {}
