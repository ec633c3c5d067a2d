"""`unimoe study`: a grid of runs, and the report on its claims."""

from collections.abc import Collection
from pathlib import Path

from transformers.utils.logging import disable_progress_bar

from unimoe_model.study.plan import Study
from unimoe_model.study.progress import study_reporter
from unimoe_model.study.reading import load_study
from unimoe_model.study.record import record_path
from unimoe_model.study.report import write_report
from unimoe_model.study.runs import Grid, read_results
from unimoe_model.study.verdicts import findings


def run_study(
    path: Path,
    output: Path,
    seeds: Collection[int] | None = None,
    check: bool = False,
    report_only: bool = False,
) -> None:
    """Runs what is not done of a study, and writes the report on all that is.

    Args:
        path: the study.
        output: folder of runs and report.
        seeds: train these alone; None is all.
        check: only list the runs and whether they are done.
        report_only: train nothing, and read no data.

    Raises:
        ValueError: For a bad study, recipe, data or metrics, before anything is trained.
        StoppedError: If a signal ended it after a checkpoint; the same call goes on.
    """
    study = load_study(path)
    if seeds is not None:
        known = {seed for seed, _ in study.runs()}
        unknown = sorted(set(seeds) - known)
        if unknown:
            raise ValueError(f"seeds ({unknown[0]}) must be among {min(known)} to {max(known)}")
    folder = study.metrics or output / "metrics"
    if not report_only:
        disable_progress_bar()  # of transformers, for what takes a moment
        grid = Grid(study, output, study_reporter())
        if check:
            for seed, arm in study.runs():
                done = "done" if grid.is_done(seed, arm) else "to be trained"
                print(f"seed {seed} {arm}: {done} ({record_path(folder, arm, seed)})")
            return
        grid.run(seeds)
    results, outdated = read_results(study, folder)
    for path in outdated:
        print(f"left out: {path} is of other settings than {study.path}")
    files = write_report(study, results, output)
    _print_findings(study, results)
    print("report in " + ", ".join(map(str, files)))


def _print_findings(study: Study, results) -> None:
    for finding in findings(study, results):
        missing = f", {finding.missing} pairs are missing" if finding.missing else ""
        print(f"{finding.verdict}: {finding.claim.claim} (p {finding.adjusted:.4f}{missing})")
