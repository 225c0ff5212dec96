import matplotlib.image
import pytest
from isdaa_trainer import curves
from isdaa_trainer.curves import OPTIONAL_PANELS, PANELS, draw_curves
from matplotlib.figure import Figure


def make_lines(steps, value, panels=PANELS):
    names = [*(name for name, _ in panels), "accuracy/tied_frac"]
    return [{"step": step, **{name: value(step) for name in names}} for step in steps]


def test_the_picture_shows_what_was_measured(tmp_path):
    steps, evaluations = (
        make_lines(range(1, 9), lambda step: step / 8),
        make_lines((0, 4, 8), lambda step: 1 - step / 8),
    )
    pictures = {}
    for name, args in {
        "both": (steps, evaluations),
        "again": (steps, evaluations),
        "alone": (steps, []),
        "none": ([], []),
    }.items():
        draw_curves(*args, tmp_path / f"{name}.png")
        pictures[name] = matplotlib.image.imread(tmp_path / f"{name}.png")
    assert pictures["both"].shape[:2] == (715, 1760)
    assert (pictures["both"] == pictures["again"]).all()
    for a, b in (("both", "alone"), ("alone", "none")):
        assert (pictures[a] != pictures[b]).any()


def test_each_panel_has_its_numbers(tmp_path, monkeypatch):
    """Those of what was asked for too; accuracy over the distance, training by its own share, held-out with ties as a half."""
    figures = []
    monkeypatch.setattr(curves, "Figure", lambda **options: figures.append(Figure(**options)) or figures[-1])
    steps = make_lines((1, 2, 3), lambda step: step / 8, (*PANELS, *OPTIONAL_PANELS))
    evaluations = make_lines((0, 3), lambda step: 1 - step / 8)
    for line, tied in zip(evaluations, (0.5, 0.75), strict=True):
        line["accuracy/tied_frac"] = tied
    draw_curves(steps, evaluations, tmp_path / "curves.png")
    drawn = {axes.get_title(): axes for axes in figures[0].axes if axes.axison}
    assert len(drawn) == len(PANELS) + len(OPTIONAL_PANELS) + 1
    for name, title in (*PANELS, *OPTIONAL_PANELS):
        training, *held_out = drawn[title].lines
        assert training.get_xydata().tolist() == [[step, step / 8] for step in (1, 2, 3)]
        assert len(held_out) == (name != "weight/ess" and (name, title) in PANELS)
    training, held_out = drawn["accuracy over √KL"].lines
    assert training.get_xydata().tolist() == [[x / 8, x / 8] for x in (1, 2, 3)]
    assert held_out.get_xydata().tolist() == [[1, 0.5], [5 / 8, 0.75]]


def test_a_picture_that_fails_leaves_the_last_one(tmp_path):
    target = tmp_path / "curves.png"
    target.write_bytes(b"last")
    with pytest.raises(KeyError, match="kl/sqrt"):
        draw_curves([{"step": 1} | {name: 0 for name, _ in PANELS[:-1]}], [], target)
    assert target.read_bytes() == b"last"
    assert list(tmp_path.iterdir()) == [target]
