"""Generation of answers to questions about media, run by `unimoe generate`."""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch.distributed.device_mesh import DeviceMesh

from unimoe_kernels import load_quantized, quantize_experts
from unimoe_model.auto import register_auto_classes
from unimoe_model.configuration import UniMoEConfig
from unimoe_model.data.encoded_media import Row
from unimoe_model.modeling import UniMoEForConditionalGeneration
from unimoe_model.parallel_generation import generate_in_parallel, load_in_parallel
from unimoe_model.precision import PRECISIONS, resolve_dtype
from unimoe_model.processing import UniMoEProcessor

_FORMATS = ("int8", "int4")
_UNFIT = {
    "missing_keys": "are missing",
    "unexpected_keys": "are of no use",
    "mismatched_keys": "are of another shape",
}


class Answerer:
    """A model with its processor, for answering questions.

    Args:
        model: model in eval mode.
        processor: the model's processor.
        is_parallel: whether the experts are split over ranks. While one rank calls `answer`, the
            others must call `take_part`.
    """

    def __init__(
        self,
        model: UniMoEForConditionalGeneration,
        processor: UniMoEProcessor,
        is_parallel: bool = False,
    ):
        self.model = model
        self.processor = processor
        self._is_parallel = is_parallel

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        mesh: DeviceMesh | None = None,
        precision: str = "auto",
        quantize: str | None = None,
    ) -> "Answerer":
        """Loads model and processor, on a GPU if there is one.

        Args:
            folder: model folder written by `unimoe train`, `convert` or `assemble`.
            mesh: mesh of ranks that share the experts, all of which must call; None for a single
                process.
            precision: `"auto"`, `"bf16"` or `"fp32"`; see `resolve_dtype`.
            quantize: format to round the experts of a float model to, `"int8"` or `"int4"`, with
                the defaults of `unimoe quantize`; None leaves them unchanged.

        Raises:
            ValueError: If `precision` or `quantize` is invalid, the folder is not that of a
                Uni-MoE, its files are damaged or do not match its configuration, its experts cannot
                be quantised, or `mesh` is given for quantised experts.
        """
        if precision not in PRECISIONS:
            raise ValueError(f"precision ({precision!r}) must be one of {', '.join(PRECISIONS)}")
        if quantize is not None and quantize not in _FORMATS:
            raise ValueError(f"quantize ({quantize!r}) must be one of {', '.join(_FORMATS)}")
        folder = Path(folder)
        _check_model_type(folder)
        quantized = _is_quantized(folder)
        if quantize is not None:
            _check_quantizable(folder, quantize, quantized, mesh)
        register_auto_classes()  # transformers warns about model types that it does not know
        with _reading(folder):
            processor = UniMoEProcessor.from_pretrained(folder)
        if mesh is not None:
            if quantized:
                raise ValueError(
                    f"model ({folder}) has quantised experts, which are not supported with several"
                    " processes"
                )
            model = load_in_parallel(folder, mesh)
            dtype = resolve_dtype(precision, model.dtype, model.device)
            return cls(model.to(dtype), processor, is_parallel=True)
        with _reading(folder):
            model = load_quantized(folder) if quantized else _load_whole(folder)
        if quantize is not None:
            quantize_experts(model, quantize)
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        dtype = resolve_dtype(precision, model.dtype, device)
        return cls(model.eval().to(device, dtype), processor)

    def take_part(self) -> None:
        """Computes this rank's experts while another rank calls `answer`."""
        generate_in_parallel(self.model, None)

    @torch.inference_mode()
    def answer(
        self,
        question: str = "",
        max_new_tokens: int = 32,
        frame_seed: int | None = None,
        **media,
    ) -> str:
        """Answers one question with greedy decoding.

        Args:
            question: the question; may be empty if it is spoken. Placeholders such as `<image>`
                mark where media are inserted; without them media come first.
            max_new_tokens: maximum tokens to generate; the model's context also limits it.
            frame_seed: seed for drawing the frames of videos at random; None spaces them evenly.
            **media: lists `images`, `videos`, `speech`, `audio` of files or arrays; see
                `UniMoEProcessor`.

        Returns:
            The answer, stripped of white space.

        Raises:
            ValueError: If there is neither a question nor media, `max_new_tokens` is less than 1,
                a file cannot be read, or the prompt exceeds the model's context.
        """
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens ({max_new_tokens}) must be at least 1")
        row = self.row(question, frame_seed=frame_seed, **media)
        return self.answer_rows([row], max_new_tokens)[0]

    def row(self, question: str = "", **options) -> Row:
        """Builds the row of one question for `answer_rows`.

        Args:
            question: the question; see `answer`.
            **options: `frame_seed` and lists of media; see `answer`.

        Raises:
            ValueError: If there is neither a question nor media, a file cannot be read, or the
                prompt exceeds the model's context.
        """
        row = self.processor.question_row(question, **options)
        length, most = len(row.text.ids), self._context
        if length >= most:
            raise ValueError(
                f"question and media ({length} tokens) must be shorter than the model's context"
                f" ({most})"
            )
        return row

    @property
    def _context(self) -> int:
        return self.model.config.text_config.max_position_embeddings

    @torch.inference_mode()
    def answer_rows(self, rows: Sequence[Row], max_new_tokens: int = 32) -> list[str]:
        """Answers a batch of questions with greedy decoding.

        Args:
            rows: rows built by `row`.
            max_new_tokens: maximum tokens to generate; also limited by the context that the
                longest question leaves.

        Returns:
            The answers, stripped of white space.

        Raises:
            ValueError: If `max_new_tokens` is less than 1.
        """
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens ({max_new_tokens}) must be at least 1")
        inputs = self.processor.collate(rows, "left")
        del inputs["labels"]
        inputs = inputs.to(self.model.device)
        length = inputs["input_ids"].shape[1]
        tokenizer = self.processor.tokenizer
        produced = self._generate(
            inputs,
            do_sample=False,
            max_new_tokens=min(max_new_tokens, self._context - length),
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=self.processor.stop_token_ids,
        )
        return self.processor.decode_answers(produced, length)

    def _generate(self, inputs: Mapping[str, torch.Tensor], **options) -> torch.Tensor:
        if self._is_parallel:
            return generate_in_parallel(self.model, inputs, **options)
        return self.model.generate(**inputs, **options)


@contextmanager
def _reading(folder: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, SafetensorError, RuntimeError, ValueError) as error:
        raise ValueError(f"model ({folder}) cannot be read: {error}") from error
    # Other errors of a config.json with wrong values, such as KeyError, need their type.
    except Exception as error:
        raise ValueError(f"model ({folder}) cannot be read: {error!r}") from error


def _load_whole(folder: Path) -> UniMoEForConditionalGeneration:
    model, found = UniMoEForConditionalGeneration.from_pretrained(
        folder, output_loading_info=True, ignore_mismatched_sizes=True
    )
    unfit = [
        f"{len(found[kind])} {what}, such as {min(found[kind])}"
        for kind, what in _UNFIT.items()
        if found[kind]
    ]
    if unfit:
        raise ValueError(
            f"model ({folder}) must hold the weights of its config: {'; '.join(unfit)}"
        )
    return model


def _is_quantized(folder: Path) -> bool:
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return "quantization_config" in config


def _check_quantizable(
    folder: Path, format: str, is_quantized: bool, mesh: DeviceMesh | None
) -> None:
    if is_quantized:
        raise ValueError(
            f"quantize ({format!r}) is not supported with model ({folder}), which is quantised"
        )
    if mesh is not None:
        raise ValueError(f"quantize ({format!r}) is not supported with several processes")


def _check_model_type(folder: Path) -> None:
    """Raises ValueError for other models, which would be built with random weights."""
    path = folder / "config.json"
    if not path.is_file():
        raise ValueError(f"model ({folder}) must be a folder with a config.json")
    try:
        found = json.loads(path.read_text(encoding="utf-8")).get("model_type")
    except (ValueError, AttributeError) as error:
        raise ValueError(f"model ({folder}) cannot be read: {path} is no JSON object") from error
    if found != UniMoEConfig.model_type:
        raise ValueError(
            f"model_type ({found!r}) in {path} must be {UniMoEConfig.model_type!r}; unimoe convert"
            " reads published checkpoints"
        )
