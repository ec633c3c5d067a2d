"""The command `unimoe`: demo, train, generate."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

DEFAULT_CONFIG = Path("configs/tiny.yaml")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command and returns its exit code; errors of the user are one line on stderr."""
    options = _parser().parse_args(arguments)
    try:
        options.run(options)
    except (ValueError, RuntimeError, OSError, ModuleNotFoundError) as error:
        line = " ".join(str(error).split())
        print(f"unimoe {options.command}: {line}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nStopped; the same command goes on from here.", file=sys.stderr)
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="unimoe", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)

    demo = commands.add_parser("demo", help="train a small Uni-MoE and let it answer")
    demo.add_argument("--output", type=Path, default=Path("runs/demo"))
    demo.add_argument("--config", type=Path, default=DEFAULT_CONFIG)
    demo.add_argument("--seed", type=int, help="instead of the one in the config")
    demo.add_argument("--features", type=Path, help="cache of features; default OUTPUT/features")
    demo.set_defaults(run=_demo)

    train = commands.add_parser("train", help="take one model through all stages")
    train.add_argument("config", type=Path, help="for example configs/tiny.yaml")
    train.add_argument("--output", type=Path, default=Path("runs/train"))
    train.add_argument("--arm", choices=("moe", "dense"), default="moe")
    train.add_argument("--seed", type=int, help="instead of the one in the config")
    train.add_argument("--features", type=Path, help="cache of features; default OUTPUT/features")
    train.set_defaults(run=_train)

    generate = commands.add_parser("generate", help="ask a trained model a question")
    generate.add_argument("checkpoint", type=Path, help="for example runs/demo/moe/model")
    generate.add_argument("--question", default="")
    generate.add_argument("--image", type=Path, action="append", default=[])
    generate.add_argument("--video", type=Path, action="append", default=[], help="GIF or folder")
    generate.add_argument("--speech", type=Path, action="append", default=[], help="wav")
    generate.add_argument("--audio", type=Path, action="append", default=[], help="wav")
    generate.add_argument("--max-new-tokens", type=int, default=32)
    generate.set_defaults(run=_generate)
    return parser


def _settings(options: argparse.Namespace):
    from unimoe_model.training.settings import load_settings

    overrides = {} if options.seed is None else {"seed": options.seed}
    return load_settings(options.config, **overrides)


def _demo(options: argparse.Namespace) -> None:
    from unimoe_model.demo import run_demo

    run_demo(_settings(options), options.output, options.features)


def _train(options: argparse.Namespace) -> None:
    from unimoe_kernels.distributed import attributed
    from unimoe_model.training.arm import train_arm
    from unimoe_model.training.progress import BarReporter, SilentReporter
    from unimoe_model.training.start import own_device, start_ranks

    settings, device = _settings(options), own_device()
    mesh = start_ranks(settings, device)
    with attributed(f"training of {options.output}"):
        result = train_arm(
            settings,
            options.arm,
            options.output / options.arm,
            options.features or options.output / "features",
            BarReporter() if mesh is None or mesh.get_rank() == 0 else SilentReporter(),
            device,
            mesh,
        )
    if mesh is not None and result is None:
        return
    for task, value in result["accuracy"].items():
        print(f"{task:<18}{100 * value:6.1f} %")


def _generate(options: argparse.Namespace) -> None:
    from unimoe_model.data.audio_io import load_wav
    from unimoe_model.data.media_io import load_image, load_video
    from unimoe_model.generation import Answerer

    answerer = Answerer.from_pretrained(options.checkpoint)
    rate = answerer.processor.sample_rate
    answer = answerer.answer(
        options.question,
        max_new_tokens=options.max_new_tokens,
        images=[load_image(path) for path in options.image],
        videos=[load_video(path) for path in options.video],
        speech=[load_wav(path, rate("speech")) for path in options.speech],
        audio=[load_wav(path, rate("audio")) for path in options.audio],
    )
    print(answer)


if __name__ == "__main__":
    sys.exit(main())
