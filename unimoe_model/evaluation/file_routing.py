"""Routing statistics by modality, run by `unimoe routing`."""

import json
from pathlib import Path

from unimoe_model.evaluation.files import write_whole
from unimoe_model.evaluation.routing import RoutingCounts
from unimoe_model.evaluation.samples import line_named, media_arguments, read_samples
from unimoe_model.evaluation.specialisation import mutual_information, top_experts
from unimoe_model.extras import needed_by
from unimoe_model.generation import Answerer
from unimoe_model.training.progress import BarReporter, ProgressReporter


def route_file(
    model: Path, data: Path, output: Path, reporter: ProgressReporter | None = None
) -> RoutingCounts:
    """Routes the prompts of a data file, one by one, and writes `routing.json` and `routing.png`.

    Args:
        model: folder of an MoE model.
        data: data file in the format of `read_samples`; answers and options are ignored.
        output: folder to write.
        reporter: shows progress; a progress bar by default.

    Returns:
        The counts per layer, expert and modality.

    Raises:
        ModuleNotFoundError: If matplotlib is not installed.
        ValueError: If the data file is invalid, media cannot be read (the message names the line),
            or the model is dense; nothing is written.
    """
    with needed_by("routing", "eval"):
        from unimoe_model.evaluation.plots import save_routing_plot
    samples = read_samples(data)
    answerer = Answerer.from_pretrained(model)
    counts = RoutingCounts(answerer.model)
    reporter = reporter or BarReporter()
    reporter.start("routing", len(samples), 0)
    try:
        for sample in samples:
            with line_named(data, sample):
                media = media_arguments(sample.media)
                counts.add(answerer.processor.ask(sample.question, **media))
            reporter.advance(1)
    finally:
        reporter.finish()

    shares = counts.shares()
    output.mkdir(parents=True, exist_ok=True)
    figures = {
        "model": str(model),
        "data": str(data),
        "items": len(samples),
        "layers": counts.layers,
        "expert_origins": answerer.model.config.expert_origins,
        "tokens": {modality: counts.tokens[modality] for modality in shares},
        "mutual_information": mutual_information(counts.taken()).tolist(),
        "top_experts": top_experts(counts.taken()),
        "shares": {modality: share.tolist() for modality, share in shares.items()},
    }
    write_whole(output / "routing.json", json.dumps(figures, indent=1) + "\n")
    config = answerer.model.config
    experts = config.expert_origins or [str(expert) for expert in range(config.num_experts)]
    save_routing_plot(
        output / "routing.png",
        shares,
        experts,
        counts.layers,
        top_k=config.num_experts_per_tok,
        tokens=counts.tokens,
    )
    return counts
