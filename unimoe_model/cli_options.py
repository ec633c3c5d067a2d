"""What may be typed after `unimoe`: commands and their options."""

import argparse
from importlib.metadata import version
from pathlib import Path

DESCRIPTION = "The command `unimoe`: trains, runs, scores and converts models."
# The names of evaluation.metrics.METRICS, which would load transformers for a --help.
METRIC_NAMES = ("vqa", "exact", "choice", "wer", "cider")


def command_parser() -> argparse.ArgumentParser:
    """Returns the parser; `command` of what it parses names what to run."""
    parser = argparse.ArgumentParser(prog="unimoe", description=DESCRIPTION)
    parser.add_argument("--version", action="version", version=f"unimoe {version('unimoe')}")
    commands = parser.add_subparsers(dest="command", required=True)

    train = commands.add_parser("train", help="train a model as a recipe says, stage by stage")
    train.add_argument("recipe", type=Path, help="YAML, see docs/training.md")
    train.add_argument("--output", type=Path, help="folder of the run; default runs/RECIPE")
    which = train.add_mutually_exclusive_group()
    which.add_argument("--stage", help="train this stage alone; those before it must be done")
    which.add_argument("--from-stage", help="train this stage and those after it")
    train.add_argument("--check", action="store_true", help="list what would be done, and stop")
    train.add_argument(
        "--devices", type=_numbers, default=(), metavar="N,...", help="--check says what fits"
    )
    train.add_argument("--device-memory", type=float, help="GiB of one of them; default 80")
    train.add_argument("--tokens-per-second", type=float, help="for the hours that --check gives")
    train.add_argument("--seed", type=int, help="instead of the one in the recipe")
    train.add_argument("--features", type=Path, help="cache of features; default OUTPUT/features")

    generate = commands.add_parser("generate", help="ask a trained model a question")
    generate.add_argument("question", nargs="?", default="", help="none when speech asks")
    generate.add_argument("--model", type=Path, required=True, help="for example runs/mine/model")
    generate.add_argument(
        "--image", type=Path, action="append", default=[], help="PNG, JPEG; each as often as needed"
    )
    generate.add_argument(
        "--video", type=Path, action="append", default=[], help="MP4 and the like, GIF or folder"
    )
    generate.add_argument("--speech", type=Path, action="append", default=[], help="wav, flac, mp3")
    generate.add_argument("--audio", type=Path, action="append", default=[], help="wav, flac, mp3")
    generate.add_argument("--frame-seed", type=int, help="draw a video's frames at random")
    generate.add_argument("--precision", choices=("auto", "bf16", "fp32"), default="auto")
    generate.add_argument("--max-new-tokens", type=int, default=32, help="default 32")
    _add_encoders(generate)

    chat = commands.add_parser("chat", help="talk with a trained model, turn by turn")
    _add_conversation(chat)

    _add_serve(commands.add_parser("serve", help="a page to talk to a model, and an HTTP API"))

    convert = commands.add_parser("convert", help="published checkpoints to ours, and back")
    convert.add_argument(
        "--from", dest="source", type=Path, required=True, metavar="DIR", help="what is read"
    )
    convert.add_argument(
        "--to", dest="target", type=Path, required=True, metavar="DIR", help="what is written"
    )
    convert.add_argument("--base", type=Path, help="the model that an adapter belongs to")
    convert.add_argument("--tokenizer", type=Path, help="folder with it, unless DIR or base has it")
    convert.add_argument("--connector", type=Path, help="published half that hears the other kind")
    convert.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="FIELD=VALUE",
        help="a field of the configuration that the source leaves open",
    )
    convert.add_argument(
        "--layout", choices=("unimoe", "published"), default="unimoe", help="of what is written"
    )

    quantize = commands.add_parser("quantize", help="round the weights of experts to few bits")
    quantize.add_argument("--model", type=Path, required=True, help="Uni-MoE or of transformers")
    quantize.add_argument(
        "--to", dest="target", type=Path, required=True, metavar="DIR", help="what is written"
    )
    quantize.add_argument("--format", choices=("int8", "int4"), default="int4")
    quantize.add_argument(
        "--group-size", type=int, help="32, 64 or 128; default one a row (int8), 64 (int4)"
    )
    quantize.add_argument("--zero-points", action="store_true", help="of int4, for skewed weights")
    quantize.add_argument(
        "--calibrate", type=Path, metavar="FILE", help="JSON lines of text or of training data"
    )
    _add_encoders(quantize)

    assemble = commands.add_parser("assemble", help="an MoE out of dense models, for stage 3")
    assemble.add_argument("--base", type=Path, required=True, help="dense; all but the experts")
    assemble.add_argument(
        "--expert", action="append", required=True, metavar="NAME=DIR", help="dense, in order"
    )
    assemble.add_argument(
        "--to", dest="target", type=Path, required=True, metavar="DIR", help="what is written"
    )
    assemble.add_argument("--top-k", type=int, default=2, help="experts a token; default 2")
    assemble.add_argument(
        "--moe-layers", default="all", help="all, even, first_half, second_half or [0, 2, ...]"
    )
    assemble.add_argument("--seed", type=int, default=0, help="of the routers; default 0")

    evaluate = commands.add_parser("eval", help="score a trained model on questions of your own")
    evaluate.add_argument("--model", type=Path, required=True, help="checkpoint folder")
    evaluate.add_argument(
        "--data", type=Path, required=True, help="JSON lines (docs/command_line.md)"
    )
    evaluate.add_argument(
        "--metric", choices=METRIC_NAMES, required=True, help="docs/command_line.md"
    )
    evaluate.add_argument("--output", type=Path, help="default runs/eval/DATA-METRIC")
    evaluate.add_argument("--max-new-tokens", type=int, default=512, help="default 512")
    evaluate.add_argument("--limit", type=int, help="only the first so many questions")
    _add_encoders(evaluate)

    routing = commands.add_parser("routing", help="show which expert takes which modality")
    routing.add_argument("--model", type=Path, required=True, help="checkpoint folder")
    routing.add_argument(
        "--data", type=Path, required=True, help="JSON lines (docs/command_line.md)"
    )
    routing.add_argument("--output", type=Path, required=True, help="folder of what is written")
    _add_encoders(routing)
    return parser


def _add_serve(serve: argparse.ArgumentParser) -> None:
    serve.add_argument("--host", default="127.0.0.1", help="address; default 127.0.0.1")
    serve.add_argument("--port", type=int, default=7860, help="default 7860; 0 takes a free one")
    serve.add_argument("--token", help="that clients must give; default UNIMOE_TOKEN")
    serve.add_argument(
        "--allow-host",
        action="append",
        default=[],
        metavar="NAME",
        help="name that browsers reach the server by, as often as needed",
    )
    serve.add_argument("--queue", type=int, default=16, help="requests at a time; default 16")
    serve.add_argument("--reply-seconds", type=float, default=120, help="of a reply; default 120")
    _add_conversation(serve)


def _add_conversation(command: argparse.ArgumentParser) -> None:
    command.add_argument("--model", type=Path, required=True, help="for example runs/mine/model")
    command.add_argument("--system", metavar="TEXT", help="instead of the model's system prompt")
    command.add_argument("--temperature", type=float, metavar="T", help="default greedy")
    command.add_argument("--top-p", type=float, default=1.0, metavar="P", help="with a temperature")
    command.add_argument("--seed", type=int, help="the same draws every time")
    command.add_argument("--frame-seed", type=int, help="draw a video's frames at random")
    command.add_argument("--precision", choices=("auto", "bf16", "fp32"), default="auto")
    command.add_argument("--max-new-tokens", type=int, default=512, help="of a reply; default 512")
    _add_encoders(command)


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(number) for number in text.split(","))


def _add_encoders(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--encoders",
        type=Path,
        metavar="FILE",
        help="YAML that names encoders, such as vision: module:Class, and permits their code",
    )
