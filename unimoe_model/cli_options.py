"""Argument parser of the command `unimoe`."""

import argparse
from importlib.metadata import version
from pathlib import Path

DESCRIPTION = "The command `unimoe`: trains, runs, scores and converts models."
# The names in evaluation.metrics.METRICS, which is not imported because it loads transformers.
METRIC_NAMES = ("vqa", "exact", "choice", "wer", "cider")


def command_parser() -> argparse.ArgumentParser:
    """Returns the argument parser; `command` of the parsed namespace is the subcommand."""
    parser = argparse.ArgumentParser(prog="unimoe", description=DESCRIPTION)
    parser.add_argument("--version", action="version", version=f"unimoe {version('unimoe')}")
    commands = parser.add_subparsers(dest="command", required=True)

    train = commands.add_parser("train", help="train a model, as described by a recipe")
    train.add_argument("recipe", type=Path, help="YAML, see docs/training.md")
    train.add_argument("--output", type=Path, help="folder of the run; default runs/RECIPE")
    which = train.add_mutually_exclusive_group()
    which.add_argument("--stage", help="train only this stage; earlier ones must be done")
    which.add_argument("--from-stage", help="train this stage and all later ones")
    train.add_argument(
        "--check", action="store_true", help="check the recipe, list its stages, train nothing"
    )
    train.add_argument(
        "--devices",
        type=integers,
        default=(),
        metavar="N,...",
        help="with --check: numbers of GPUs to forecast memory for",
    )
    train.add_argument(
        "--device-memory", type=float, help="with --check: GiB per device; default 80"
    )
    train.add_argument(
        "--tokens-per-second", type=float, help="with --check: speed to forecast time with"
    )
    train.add_argument("--seed", type=int, help="overrides the seed of the recipe")
    train.add_argument("--features", type=Path, help="feature cache; default OUTPUT/features")

    study = commands.add_parser("study", help="train variants of a recipe, and test claims")
    study.add_argument("study", type=Path, help="YAML, see docs/studies.md")
    study.add_argument("--output", type=Path, help="folder of runs and report; default runs/STUDY")
    study.add_argument(
        "--seeds", type=integers, metavar="N,...", help="train these alone, for several processes"
    )
    what = study.add_mutually_exclusive_group()
    what.add_argument("--check", action="store_true", help="list the runs, and stop")
    what.add_argument("--report", action="store_true", help="report what is done, train nothing")

    generate = commands.add_parser("generate", help="ask a trained model a question")
    generate.add_argument("question", nargs="?", default="", help="may be omitted with --speech")
    generate.add_argument(
        "--model", type=Path, required=True, help="model folder, such as runs/mine/model"
    )
    generate.add_argument(
        "--image", type=Path, action="append", default=[], help="PNG, JPEG; may be repeated"
    )
    generate.add_argument(
        "--video", type=Path, action="append", default=[], help="MP4, GIF, folder of pictures"
    )
    generate.add_argument("--speech", type=Path, action="append", default=[], help="wav, flac, mp3")
    generate.add_argument("--audio", type=Path, action="append", default=[], help="wav, flac, mp3")
    generate.add_argument("--frame-seed", type=int, help="draw the frames of videos at random")
    generate.add_argument("--precision", choices=("auto", "bf16", "fp32"), default="auto")
    generate.add_argument("--max-new-tokens", type=int, default=32, help="default 32")
    _add_encoders(generate)

    chat = commands.add_parser("chat", help="chat with a trained model in the terminal")
    _add_conversation(chat)

    _add_serve(commands.add_parser("serve", help="serve a chat page and an HTTP API"))

    convert = commands.add_parser("convert", help="convert published checkpoints, and back")
    convert.add_argument(
        "--from", dest="source", type=Path, required=True, metavar="DIR", help="folder to read"
    )
    convert.add_argument(
        "--to", dest="target", type=Path, required=True, metavar="DIR", help="folder to write"
    )
    convert.add_argument("--base", type=Path, help="base model of an adapter")
    convert.add_argument(
        "--tokenizer", type=Path, help="folder of the tokenizer, if neither DIR nor base has one"
    )
    convert.add_argument(
        "--connector", type=Path, help="published checkpoint for the other kind of sound"
    )
    convert.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="FIELD=VALUE",
        help="overrides a field of the configuration; may be repeated",
    )
    convert.add_argument(
        "--layout", choices=("unimoe", "published"), default="unimoe", help="layout of the output"
    )

    quantize = commands.add_parser("quantize", help="quantise the experts of a model")
    quantize.add_argument(
        "--model", type=Path, required=True, help="folder of a Uni-MoE or transformers model"
    )
    quantize.add_argument(
        "--to", dest="target", type=Path, required=True, metavar="DIR", help="folder to write"
    )
    quantize.add_argument("--format", choices=("int8", "int4"), default="int4")
    quantize.add_argument(
        "--group-size", type=int, help="32, 64 or 128; default one group per row (int8), 64 (int4)"
    )
    quantize.add_argument(
        "--zero-points", action="store_true", help="int4 only: asymmetric, for skewed weights"
    )
    quantize.add_argument(
        "--calibrate", type=Path, metavar="FILE", help="JSON lines of text or of training data"
    )
    _add_encoders(quantize)

    assemble = commands.add_parser("assemble", help="build an MoE model from dense models")
    assemble.add_argument(
        "--base", type=Path, required=True, help="dense model for all other weights"
    )
    assemble.add_argument(
        "--expert",
        action="append",
        required=True,
        metavar="NAME=DIR",
        help="dense model for one expert; repeat in expert order",
    )
    assemble.add_argument(
        "--to", dest="target", type=Path, required=True, metavar="DIR", help="folder to write"
    )
    assemble.add_argument("--top-k", type=int, default=2, help="experts per token; default 2")
    assemble.add_argument(
        "--moe-layers", default="all", help="all, even, first_half, second_half or [0, 2, ...]"
    )
    assemble.add_argument("--seed", type=int, default=0, help="seed of the routers; default 0")

    evaluate = commands.add_parser("eval", help="score a trained model on your own questions")
    evaluate.add_argument("--model", type=Path, required=True, help="model folder")
    evaluate.add_argument(
        "--data", type=Path, required=True, help="JSON lines (docs/command_line.md)"
    )
    evaluate.add_argument(
        "--metric", choices=METRIC_NAMES, required=True, help="docs/command_line.md"
    )
    evaluate.add_argument("--output", type=Path, help="default runs/eval/DATA-METRIC")
    evaluate.add_argument("--max-new-tokens", type=int, default=512, help="default 512")
    evaluate.add_argument("--limit", type=int, help="maximum number of questions")
    _add_encoders(evaluate)

    routing = commands.add_parser("routing", help="count tokens per expert and modality")
    routing.add_argument("--model", type=Path, required=True, help="model folder")
    routing.add_argument(
        "--data", type=Path, required=True, help="JSON lines (docs/command_line.md)"
    )
    routing.add_argument("--output", type=Path, required=True, help="folder to write")
    _add_encoders(routing)
    return parser


def _add_serve(serve: argparse.ArgumentParser) -> None:
    serve.add_argument("--host", default="127.0.0.1", help="address; default 127.0.0.1")
    serve.add_argument("--port", type=int, default=7860, help="default 7860; 0 selects a free one")
    serve.add_argument("--token", help="access token for clients; default UNIMOE_TOKEN")
    serve.add_argument(
        "--allow-host",
        action="append",
        default=[],
        metavar="NAME",
        help="host name that browsers may use; may be repeated",
    )
    serve.add_argument("--queue", type=int, default=16, help="maximum open requests; default 16")
    serve.add_argument(
        "--reply-seconds", type=float, default=120, help="maximum seconds per reply; default 120"
    )
    _add_conversation(serve)


def _add_conversation(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--model", type=Path, required=True, help="model folder, such as runs/mine/model"
    )
    command.add_argument("--system", metavar="TEXT", help="overrides the model's system prompt")
    command.add_argument("--temperature", type=float, metavar="T", help="sample; default greedy")
    command.add_argument(
        "--top-p", type=float, default=1.0, metavar="P", help="nucleus sampling; default 1"
    )
    command.add_argument("--seed", type=int, help="makes sampling reproducible")
    command.add_argument("--frame-seed", type=int, help="draw the frames of videos at random")
    command.add_argument("--precision", choices=("auto", "bf16", "fp32"), default="auto")
    command.add_argument(
        "--max-new-tokens", type=int, default=512, help="maximum tokens per reply; default 512"
    )
    command.add_argument(
        "--quantize", choices=("int8", "int4"), help="quantise the experts of a float model"
    )
    _add_encoders(command)


def integers(text: str) -> tuple[int, ...]:
    """Reads integers separated by commas.

    Raises:
        argparse.ArgumentTypeError: If the text is something else.
    """
    try:
        return tuple(int(number) for number in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} must be integers separated by commas") from None


def _add_encoders(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--encoders",
        type=Path,
        metavar="FILE",
        help="YAML file of encoders to load, such as vision: module:Class; permits their code",
    )
