"""Progress of long work: a bar on a terminal, lines elsewhere."""

from unimoe_model.training.progress import BarReporter, LineReporter


def test_bar_shows_stage_and_figures(capsys):
    bar = BarReporter(prefix="moe ")
    bar.start("align", 4, 1)
    bar.advance(3, loss="0.500")
    bar.finish()
    shown = capsys.readouterr().err
    assert "moe align" in shown
    assert "4/4" in shown
    assert "loss=0.500" in shown


def test_lines_stand_for_bars_without_a_terminal(capsys):
    reporter = LineReporter(seconds=1e9)
    reporter.start("align", 3, 1)
    reporter.advance(1, loss="0.700")
    reporter.advance(1, loss="0.500")
    reporter.finish()
    assert capsys.readouterr().err.splitlines() == ["align 1/3", "align 3/3 loss 0.500"]
