"""The command `unimoe`: trains, runs, scores and converts models."""

import argparse
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

from unimoe_model.user_errors import USER_ERRORS

# The names of evaluation.metrics.METRICS, which would load transformers for a --help.
METRIC_NAMES = ("vqa", "exact", "choice", "wer", "cider")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command and returns its exit code; errors of the user are one line on stderr."""
    options = _parser().parse_args(arguments)
    try:
        _check_folders(options)
        if getattr(options, "encoders", None) is not None:
            from unimoe_model.encoders.outside import choose_encoders

            choose_encoders(options.encoders)
        options.run(options)
    except USER_ERRORS as error:
        line = " ".join(str(error).split())
        print(f"unimoe {options.command}: {line}", file=sys.stderr)
        return 1
    except KeyboardInterrupt as stopped:
        where = f"{stopped}; " if str(stopped) else ""
        print(f"\n{where}the same command goes on from here", file=sys.stderr)
        return 128 + getattr(stopped, "signal", 2)
    return 0


def _check_folders(options: argparse.Namespace) -> None:
    """Refuses a file where a folder is to be written, before any work is done."""
    for name, field in (("output", "output"), ("features", "features"), ("to", "target")):
        folder = getattr(options, field, None)
        for part in (folder, *folder.parents) if folder else ():
            if part.exists() and not part.is_dir():
                raise ValueError(f"{name} ({folder}) must be a folder; {part} is a file")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="unimoe", description=__doc__)
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
    train.set_defaults(run=_train)

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
    generate.set_defaults(run=_generate)

    chat = commands.add_parser("chat", help="talk with a trained model, turn by turn")
    chat.add_argument("--model", type=Path, required=True, help="for example runs/mine/model")
    chat.add_argument("--system", metavar="TEXT", help="instead of the model's system prompt")
    chat.add_argument("--temperature", type=float, metavar="T", help="draw words; default greedy")
    chat.add_argument("--top-p", type=float, default=1.0, metavar="P", help="with a temperature")
    chat.add_argument("--seed", type=int, help="the same draws every time")
    chat.add_argument("--frame-seed", type=int, help="draw a video's frames at random")
    chat.add_argument("--precision", choices=("auto", "bf16", "fp32"), default="auto")
    chat.add_argument("--max-new-tokens", type=int, default=512, help="of a reply; default 512")
    _add_encoders(chat)
    chat.set_defaults(run=_chat)

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
    convert.set_defaults(run=_convert)

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
    quantize.set_defaults(run=_quantize)

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
    assemble.set_defaults(run=_assemble)

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
    evaluate.set_defaults(run=_evaluate)

    routing = commands.add_parser("routing", help="show which expert takes which modality")
    routing.add_argument("--model", type=Path, required=True, help="checkpoint folder")
    routing.add_argument(
        "--data", type=Path, required=True, help="JSON lines (docs/command_line.md)"
    )
    routing.add_argument("--output", type=Path, required=True, help="folder of what is written")
    _add_encoders(routing)
    routing.set_defaults(run=_routing)
    return parser


def _add_serve(serve: argparse.ArgumentParser) -> None:
    serve.add_argument("--model", type=Path, required=True, help="for example runs/mine/model")
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
    serve.add_argument("--system", metavar="TEXT", help="instead of the model's system prompt")
    serve.add_argument("--temperature", type=float, metavar="T", help="draw words; default greedy")
    serve.add_argument("--top-p", type=float, default=1.0, metavar="P", help="with a temperature")
    serve.add_argument("--seed", type=int, help="the same draws every time")
    serve.add_argument("--frame-seed", type=int, help="draw a video's frames at random")
    serve.add_argument("--precision", choices=("auto", "bf16", "fp32"), default="auto")
    serve.add_argument("--max-new-tokens", type=int, default=512, help="of a reply; default 512")
    _add_encoders(serve)
    serve.set_defaults(run=_serve)


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(number) for number in text.split(","))


def _add_encoders(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--encoders",
        type=Path,
        metavar="FILE",
        help="YAML that names encoders, such as vision: module:Class, and permits their code",
    )


def _train(options: argparse.Namespace) -> None:
    from unimoe_model.training.command import train_recipe

    overrides = {} if options.seed is None else {"seed": options.seed}
    train_recipe(
        options.recipe,
        options.output or Path("runs", options.recipe.stem),
        options.features,
        stage=options.stage,
        from_stage=options.from_stage,
        check=options.check,
        devices=options.devices,
        device_memory=options.device_memory,
        tokens_per_second=options.tokens_per_second,
        **overrides,
    )


def _generate(options: argparse.Namespace) -> None:
    for kind in ("image", "video", "speech", "audio"):
        for path in getattr(options, kind):
            if not path.exists():
                raise ValueError(f"{kind} ({path}) must be a file; there is no such file")
    if options.max_new_tokens < 1:
        raise ValueError(f"max_new_tokens ({options.max_new_tokens}) must be at least 1")
    from unimoe_kernels.distributed import attributed, finish_parallel
    from unimoe_model.generation import Answerer
    from unimoe_model.training.start import share_experts

    mesh = share_experts()
    with attributed("generation"):
        answerer = Answerer.from_pretrained(options.model, mesh, options.precision)
        if mesh is None or mesh.get_rank() == 0:
            answer = answerer.answer(
                options.question,
                max_new_tokens=options.max_new_tokens,
                frame_seed=options.frame_seed,
                images=options.image,
                videos=options.video,
                speech=options.speech,
                audio=options.audio,
            )
            print(answer)
        else:
            answerer.take_part()
        finish_parallel()


def _chat(options: argparse.Namespace) -> None:
    if options.max_new_tokens < 1:
        raise ValueError(f"max_new_tokens ({options.max_new_tokens}) must be at least 1")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError(f"WORLD_SIZE ({os.environ['WORLD_SIZE']}) must be 1: chat is one process")
    from unimoe_model.chat.conversation import Conversation
    from unimoe_model.chat.sampling import Sampling
    from unimoe_model.chat.terminal import Chat
    from unimoe_model.generation import Answerer

    sampling = Sampling(options.temperature, options.top_p, options.seed)
    answerer = Answerer.from_pretrained(options.model, precision=options.precision)
    conversation = Conversation(
        answerer.model,
        answerer.processor,
        system=options.system,
        max_new_tokens=options.max_new_tokens,
        sampling=sampling,
    )
    try:
        Chat(conversation, options.frame_seed).run()
    except KeyboardInterrupt:
        sys.exit(130)


def _serve(options: argparse.Namespace) -> None:
    for name, least in (("max_new_tokens", 1), ("queue", 1), ("port", 0)):
        value = getattr(options, name)
        if value < least:
            raise ValueError(f"{name} ({value}) must be at least {least}")
    if not options.reply_seconds > 0:
        raise ValueError(f"reply_seconds ({options.reply_seconds}) must be positive")
    from unimoe_model.chat.sampling import Sampling
    from unimoe_model.serve.limits import Limits
    from unimoe_model.serve.server import serve

    serve(
        options.model,
        host=options.host,
        port=options.port,
        token=options.token or os.environ.get("UNIMOE_TOKEN"),
        hosts=options.allow_host,
        limits=Limits(queue=options.queue, reply_seconds=options.reply_seconds),
        precision=options.precision,
        system=options.system,
        max_new_tokens=options.max_new_tokens,
        sampling=Sampling(options.temperature, options.top_p, options.seed),
        frame_seed=options.frame_seed,
    )


def _convert(options: argparse.Namespace) -> None:
    from unimoe_model.checkpoints.convert import convert_from_published, convert_to_published

    if options.layout == "published":
        given = [n for n in ("base", "tokenizer", "connector", "set") if getattr(options, n)]
        if given:
            raise ValueError(f"layout published takes no {given[0]}")
        with _bytes_bar("convert") as show:
            made = convert_to_published(options.source, options.target, show)
    else:
        with _bytes_bar("convert") as show:
            made = convert_from_published(
                options.source,
                options.target,
                options.base,
                options.tokenizer,
                options.connector,
                _overrides(options.set),
                show,
            )
    print(made.summary())


def _assemble(options: argparse.Namespace) -> None:
    from unimoe_model.checkpoints.assemble import assemble

    named = [_assignment("expert", text) for text in options.expert]
    experts = {name: Path(folder) for name, folder in named}
    if len(experts) != len(options.expert):
        raise ValueError(f"expert ({options.expert}) must have a name of its own each")
    layers = _value(options.moe_layers)
    with _bytes_bar("assemble") as show:
        assemble(options.base, experts, options.target, options.top_k, layers, options.seed, show)
    print(f"{len(experts)} experts: {', '.join(experts)}")


def _quantize(options: argparse.Namespace) -> None:
    from unimoe_model.quantizing import quantize_folder

    before, after = quantize_folder(
        options.model, options.target, options.format, options.group_size, options.zero_points
    )
    print(f"{before / 1e6:.1f} MB of weights became {after / 1e6:.1f} MB in {options.target}")


@contextmanager
def _bytes_bar(title: str) -> Iterator[Callable[[int, int], None]]:
    from tqdm.auto import tqdm

    with tqdm(unit="B", unit_scale=True, desc=title) as bar:

        def show(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield show


def _assignment(option: str, text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals or not name or not value:
        raise ValueError(f"{option} ({text}) must be NAME=VALUE")
    return name, value


def _overrides(assignments: Sequence[str]) -> dict:
    named = [_assignment("set", text) for text in assignments]
    return {name: _value(text) for name, text in named}


def _value(text: str):
    """What JSON makes of a text, or else the text."""
    import json

    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def _evaluate(options: argparse.Namespace) -> None:
    from unimoe_model.evaluation.metrics import METRICS
    from unimoe_model.evaluation.scoring import evaluate_file

    output = options.output or Path("runs/eval", f"{options.data.stem}-{options.metric}")
    score = evaluate_file(
        options.model, options.data, options.metric, output, options.max_new_tokens, options.limit
    )
    metric = METRICS[options.metric]
    figure = f"{metric.title} {100 * score.value:.2f}{metric.unit}"
    print(f"{figure} on {len(score.per_item)} items; {output / 'score.json'}")


def _routing(options: argparse.Namespace) -> None:
    from unimoe_model.evaluation.file_routing import route_file

    counts = route_file(options.model, options.data, options.output)
    seen = ", ".join(f"{number} {kind}" for kind, number in counts.tokens.items() if number)
    print(f"routed {seen} tokens; {options.output / 'routing.json'} and routing.png")


if __name__ == "__main__":
    sys.exit(main())
