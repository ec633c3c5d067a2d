"""The command `unimoe study`: trains the runs of a study and writes its report."""

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
    """Trains the runs of a study that are not complete, and writes the report on those that are.

    Args:
        path: YAML file of the study.
        output: folder of runs and report.
        seeds: train only these seeds; None for all.
        check: only list the runs and whether they are complete.
        report_only: only write the report; reads no data and no models.

    Raises:
        ValueError: If the study, its recipe, data or metrics are invalid, before any training.
        StoppedError: If a signal stopped the study after a checkpoint; the same call resumes it.
    """
    study = load_study(path)
    if seeds is not None:
        known = {seed for seed, _ in study.runs()}
        unknown = sorted(set(seeds) - known)
        if unknown:
            raise ValueError(f"seeds ({unknown[0]}) must be among {min(known)} to {max(known)}")
    folder = study.metrics or output / "metrics"
    is_current = None
    if not report_only:
        disable_progress_bar()  # of transformers, for what takes a moment
        grid = Grid(study, output, study_reporter())
        if check:
            for seed, arm in study.runs():
                done = "done" if grid.is_done(seed, arm) else "to be trained"
                print(f"seed {seed} {arm}: {done} ({record_path(folder, arm, seed)})")
            return
        grid.run(seeds)
        is_current = grid.is_done
    results, outdated = read_results(study, folder, is_current)
    for path in outdated:
        print(f"left out: {path} is of other settings, models or data than {study.path}")
    files = write_report(study, results, output)
    _print_findings(study, results)
    print("report in " + ", ".join(map(str, files)))


def _print_findings(study: Study, results) -> None:
    for finding in findings(study, results):
        missing = f", {finding.missing} pairs are missing" if finding.missing else ""
        print(f"{finding.verdict}: {finding.claim.claim} (p {finding.adjusted:.4f}{missing})")
