"""Answers to questions about media, from a checkpoint folder: what `unimoe generate` runs."""

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
    """A model with its processor.

    Args:
        model: in eval mode.
        processor: made for the model.
        is_parallel: whether other ranks share the experts; they call `take_part` meanwhile.
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
        """Loads model and processor.

        Args:
            folder: as training, `convert` and `assemble` leave it.
            mesh: of the ranks that share the experts, all of which call; None for one process.
            precision: of the model; `"auto"`, `"bf16"` or `"fp32"`, see `resolve_dtype`.
            quantize: format that the experts of a float model are rounded to, `"int8"` or
                `"int4"`, as `unimoe quantize` does by default; None leaves them as they are.

        Raises:
            ValueError: If `precision` or `quantize` is another value, the folder is no checkpoint
                of a Uni-MoE, its files are cut short or do not fit, its experts cannot be
                quantised, or ranks are to share quantised experts.
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
        register_auto_classes()  # transformers warns of model types that it does not know
        with _reading(folder):
            processor = UniMoEProcessor.from_pretrained(folder)
        if mesh is not None:
            if quantized:
                raise ValueError(f"model ({folder}) has quantised experts: ranks cannot share them")
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
        """Answers rows of a rank that calls `answer`."""
        generate_in_parallel(self.model, None)

    @torch.inference_mode()
    def answer(
        self,
        question: str = "",
        max_new_tokens: int = 32,
        frame_seed: int | None = None,
        **media,
    ) -> str:
        """Answers one question, greedily.

        Args:
            question: may be empty when speech asks. Where it holds placeholders, such as
                `<image>`, they say where the media go; else the media come first.
            max_new_tokens: longest answer, in tokens; the model's context bounds it as well.
            frame_seed: None chooses the frames of videos evenly, a number at random.
            **media: lists `images`, `videos`, `speech`, `audio` of files or arrays; see
                `UniMoEProcessor`.

        Returns:
            The answer, stripped of white space.

        Raises:
            ValueError: If there is nothing to ask, max_new_tokens is less than 1, a file cannot be
                read, or the prompt is longer than the model's context.
        """
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens ({max_new_tokens}) must be at least 1")
        row = self.row(question, frame_seed=frame_seed, **media)
        return self.answer_rows([row], max_new_tokens)[0]

    def row(self, question: str = "", **options) -> Row:
        """What `answer_rows` takes of one question; arguments as in `answer`.

        Raises:
            ValueError: If there is nothing to ask, a file cannot be read, or the prompt is longer
                than the model's context.
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
        """Answers several questions at once, greedily.

        Args:
            rows: what `row` makes of each question.
            max_new_tokens: as in `answer`; the context bounds it for the longest question.

        Raises:
            ValueError: If max_new_tokens is less than 1.
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
    # What else a config.json with wrong values gives, such as KeyError, says little by itself.
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
            f"quantize ({format!r}) must not be given: model ({folder}) is quantised already"
        )
    if mesh is not None:
        raise ValueError(
            f"quantize ({format!r}) must not be given with several processes: ranks cannot share"
            " quantised experts"
        )


def _check_model_type(folder: Path) -> None:
    """Refuses another model: it would be built at full size, with random weights for ours."""
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
