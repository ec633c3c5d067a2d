"""The command `unimoe`: trains, runs, scores and converts models."""

import argparse
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from unimoe_model.cli_options import command_parser
from unimoe_model.user_errors import USER_ERRORS


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command and returns its exit code; user errors are printed as one line on stderr."""
    options = command_parser().parse_args(arguments)
    try:
        _check_folders(options)
        if getattr(options, "encoders", None) is not None:
            from unimoe_model.encoders.outside import choose_encoders

            choose_encoders(options.encoders)
        _COMMANDS[options.command](options)
    except USER_ERRORS as error:
        line = " ".join(str(error).split())
        print(f"unimoe {options.command}: {line}", file=sys.stderr)
        return 1
    except KeyboardInterrupt as stopped:
        where = f"{stopped}; " if str(stopped) else ""
        print(f"\n{where}run the same command to resume", file=sys.stderr)
        return 128 + getattr(stopped, "signal", 2)
    return 0


def _check_folders(options: argparse.Namespace) -> None:
    """Raises ValueError if a file is in the place of an output folder, before any work is done."""
    for name, field in (("output", "output"), ("features", "features"), ("to", "target")):
        folder = getattr(options, field, None)
        for part in (folder, *folder.parents) if folder else ():
            if part.exists() and not part.is_dir():
                raise ValueError(f"{name} ({folder}) must be a folder; {part} is a file")


def _train(options: argparse.Namespace) -> None:
    from unimoe_model.training.command import train_recipe
    from unimoe_model.training.freed_memory import keep_freed_memory

    keep_freed_memory()
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
    answerer = Answerer.from_pretrained(
        options.model, precision=options.precision, quantize=options.quantize
    )
    conversation = Conversation(
        answerer.model,
        answerer.processor,
        system=options.system,
        max_new_tokens=options.max_new_tokens,
        sampling=sampling,
    )
    with _ends_by_interrupt():
        Chat(conversation, options.frame_seed).run()


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

    with _ends_by_interrupt():
        serve(
            options.model,
            host=options.host,
            port=options.port,
            token=options.token or os.environ.get("UNIMOE_TOKEN"),
            hosts=options.allow_host,
            limits=Limits(queue=options.queue, reply_seconds=options.reply_seconds),
            precision=options.precision,
            quantize=options.quantize,
            system=options.system,
            max_new_tokens=options.max_new_tokens,
            sampling=Sampling(options.temperature, options.top_p, options.seed),
            frame_seed=options.frame_seed,
        )


@contextmanager
def _ends_by_interrupt() -> Iterator[None]:
    """Exits on Ctrl-C, which ends these commands, without the message about resuming."""
    try:
        yield
    except KeyboardInterrupt:
        sys.exit(130)


def _convert(options: argparse.Namespace) -> None:
    from unimoe_model.checkpoints.convert import convert_from_published, convert_to_published

    if options.layout == "published":
        given = [n for n in ("base", "tokenizer", "connector", "set") if getattr(options, n)]
        if given:
            raise ValueError(f"{given[0]} is not supported with layout published")
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
        raise ValueError(f"expert ({options.expert}) must have unique names")
    layers = _value(options.moe_layers)
    with _bytes_bar("assemble") as show:
        assemble(options.base, experts, options.target, options.top_k, layers, options.seed, show)
    print(f"{len(experts)} experts: {', '.join(experts)}")


def _quantize(options: argparse.Namespace) -> None:
    from unimoe_model.quantizing import quantize_folder

    before, after = quantize_folder(
        options.model,
        options.target,
        options.format,
        options.group_size,
        options.zero_points,
        options.calibrate,
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
    """The value of a JSON text, or the text itself if it is not JSON."""
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


def _study(options: argparse.Namespace) -> None:
    from unimoe_model.study.command import run_study
    from unimoe_model.training.freed_memory import keep_freed_memory

    keep_freed_memory()
    output = options.output or Path("runs", options.study.stem)
    run_study(options.study, output, options.seeds, options.check, options.report)


_COMMANDS = {
    "train": _train,
    "study": _study,
    "generate": _generate,
    "chat": _chat,
    "serve": _serve,
    "convert": _convert,
    "quantize": _quantize,
    "assemble": _assemble,
    "eval": _evaluate,
    "routing": _routing,
}

if __name__ == "__main__":
    sys.exit(main())
