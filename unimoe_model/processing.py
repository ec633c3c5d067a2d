"""From text, pictures, videos and sound to model inputs: tokenizer and frozen encoders in one."""

from collections.abc import Sequence

import numpy as np
import torch
from einops import rearrange
from transformers import BatchFeature
from transformers.processing_utils import ProcessorMixin

from unimoe_model.configuration import MEDIA_KINDS, UniMoEConfig
from unimoe_model.encoders import FrozenEncoder, build_encoder
from unimoe_model.prompt import PLACEHOLDERS, build_prompt


class UniMoEProcessor(ProcessorMixin):
    """Makes the inputs of `UniMoEForConditionalGeneration`.

    The frozen encoders live here and not in the model, so that a checkpoint holds no copy of them;
    each is built when it is first needed.

    Args:
        tokenizer: tokenizer with the media placeholders.
        vision_encoder: name of the encoder of pictures and frames.
        speech_encoder: name of the speech encoder.
        audio_encoder: name of the audio encoder.
        num_soft_tokens: soft tokens of an item of each media kind.
        video_num_frames: frames of a video.
        speech_max_frames: feature rows of a speech clip.

    Raises:
        ValueError: if a placeholder is not one token of the tokenizer, or a media kind has no
            number of soft tokens.
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
        self.video_num_frames = video_num_frames
        self.speech_max_frames = speech_max_frames
        unknown = tokenizer.unk_token_id
        for placeholder in PLACEHOLDERS.values():
            if tokenizer.convert_tokens_to_ids(placeholder) in (None, unknown):
                raise ValueError(f"tokenizer has no token {placeholder}")

    @classmethod
    def from_config(cls, config: UniMoEConfig, tokenizer) -> "UniMoEProcessor":
        """Makes the processor that fits a model's configuration."""
        return cls(
            tokenizer,
            vision_encoder=config.vision_encoder,
            speech_encoder=config.speech_encoder,
            audio_encoder=config.audio_encoder,
            num_soft_tokens={kind: config.num_soft_tokens(kind) for kind in MEDIA_KINDS},
            video_num_frames=config.video_num_frames,
            speech_max_frames=config.speech_max_frames,
        )

    def __call__(
        self,
        text: str | Sequence[str],
        images: Sequence[torch.Tensor] = (),
        videos: Sequence[torch.Tensor] = (),
        speech: Sequence[np.ndarray] = (),
        audio: Sequence[np.ndarray] = (),
    ) -> BatchFeature:
        """Tokenizes prompts, padded on the left, and encodes the media at their placeholders.

        Args:
            text: prompts (`build_prompt` writes them), with one placeholder for each item.
            images: uint8 `[H, W, 3]` each, in the order of the placeholders.
            videos: uint8 `[frames, H, W, 3]` each, `video_num_frames` frames.
            speech: float32 `[samples]` each, mono, at 16 kHz.
            audio: float32 `[samples]` each, mono, at the audio encoder's rate (44.1 kHz for aiSFX).

        Returns:
            `input_ids` and `attention_mask` `[B, S]`, and `<kind>_features` of the media given.

        Raises:
            ValueError: if placeholders and media do not match in number, or an item is empty or has
                a wrong shape.
        """
        prompts = [text] if isinstance(text, str) else list(text)
        if not prompts:
            raise ValueError("text must hold at least one prompt")
        media = dict(zip(MEDIA_KINDS, (images, videos, speech, audio), strict=True))
        for kind, items in media.items():
            held = sum(prompt.count(PLACEHOLDERS[kind]) for prompt in prompts)
            if held != len(items):
                raise ValueError(
                    f"text holds {held} {PLACEHOLDERS[kind]} but {len(items)} {kind} items were"
                    " given; each item needs one placeholder and each placeholder one item"
                )
        features = {
            f"{kind}_features": self._encode(kind, items) for kind, items in media.items() if items
        }
        expanded = [self._expand(prompt) for prompt in prompts]
        tokens = self.tokenizer(
            expanded,
            padding=True,
            padding_side="left",
            add_special_tokens=False,
            return_tensors="pt",
        )
        return BatchFeature(
            {
                "input_ids": tokens["input_ids"],
                "attention_mask": tokens["attention_mask"],
                **features,
            }
        )

    def ask(self, question: str = "", **media) -> BatchFeature:
        """Inputs of one question: writes the prompt itself.

        Args:
            question: may be empty when speech asks.
            **media: lists `images`, `videos`, `speech`, `audio` as in `__call__`.
        """
        names = {"images": "image", "videos": "video", "speech": "speech", "audio": "audio"}
        kinds = [names[name] for name in names for _ in media.get(name, ())]
        return self(build_prompt(question, kinds), **media)

    def sample_rate(self, kind: str) -> int:
        """Samples a second that clips of `kind`, `"speech"` or `"audio"`, are expected at."""
        return self._encoder(kind).sample_rate

    def decode_answers(self, sequences: torch.Tensor, prompt_length: int) -> list[str]:
        """Answers in generated sequences `[B, S]` whose prompt took `prompt_length` tokens."""
        texts = self.tokenizer.batch_decode(sequences[:, prompt_length:], skip_special_tokens=True)
        return [text.strip() for text in texts]

    def _expand(self, prompt: str) -> str:
        for kind, placeholder in PLACEHOLDERS.items():
            prompt = prompt.replace(placeholder, placeholder * self.num_soft_tokens[kind])
        return self.tokenizer.bos_token + prompt

    def _encode(self, kind: str, items: Sequence) -> torch.Tensor:
        if kind == "image":
            return self._vision(self._pixels(items, "images", ndim=3))
        if kind == "video":
            return self._videos(items)
        encoder = self._encoder(kind)
        clips = [np.asarray(item, dtype=np.float32) for item in items]
        for clip in clips:
            if clip.ndim != 1 or clip.size == 0 or not np.isfinite(clip).all():
                raise ValueError(
                    f"{kind} clip (shape {list(clip.shape)}) must be finite samples [n], n > 0"
                )
        if kind == "audio":
            return torch.cat([encoder(torch.from_numpy(clip)[None]).float() for clip in clips])
        features, lengths = encoder.encode_clips(clips)
        if int(lengths.max()) > self.speech_max_frames:
            raise ValueError(
                f"speech clip ({int(lengths.max())} rows of features) must be at most"
                f" speech_max_frames ({self.speech_max_frames}) long"
            )
        padding = self.speech_max_frames - features.shape[1]
        return torch.nn.functional.pad(features.float(), (0, 0, 0, padding))

    def _videos(self, videos: Sequence[torch.Tensor]) -> torch.Tensor:
        clips = self._pixels(videos, "videos", ndim=4)
        for clip in clips:
            if clip.shape[0] != self.video_num_frames:
                raise ValueError(
                    f"videos hold {clip.shape[0]} frames, expected {self.video_num_frames}"
                )
        frames = self._vision([frame for clip in clips for frame in clip])
        return rearrange(frames, "(b f) n c -> b f n c", f=self.video_num_frames)

    def _vision(self, pictures: Sequence[torch.Tensor]) -> torch.Tensor:
        from unimoe_model.data.media_io import resize_square

        batch = torch.cat([resize_square(picture[None], IMAGE_SIZE) for picture in pictures])
        return self._encoder("vision")(batch).float()

    @staticmethod
    def _pixels(items: Sequence, name: str, ndim: int) -> list[torch.Tensor]:
        tensors = [torch.as_tensor(item) for item in items]
        for tensor in tensors:
            if tensor.dtype != torch.uint8 or tensor.dim() != ndim or tensor.shape[-1] != 3:
                raise ValueError(
                    f"{name} ({tensor.dtype}, shape {list(tensor.shape)}) must be uint8 with"
                    f" {ndim} dimensions, the last of size 3"
                )
        return tensors

    def _encoder(self, kind: str) -> FrozenEncoder:
        name = getattr(self, f"{kind}_encoder")
        if name not in _BUILT:
            _BUILT[name] = build_encoder(name)
        return _BUILT[name]


IMAGE_SIZE = 96
_BUILT: dict[str, FrozenEncoder] = {}
