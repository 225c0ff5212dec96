import matplotlib.image
import pytest
from isdaa_trainer.curves import PANELS, draw_curves


def make_lines(steps, value):
    return [{"step": step, **{name: value(step) for name, _ in PANELS}} for step in steps]


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
    assert pictures["both"].shape[:2] == (715, 1320)
    assert (pictures["both"] == pictures["again"]).all()
    for a, b in (("both", "alone"), ("alone", "none")):
        assert (pictures[a] != pictures[b]).any()


def test_a_picture_that_fails_leaves_the_last_one(tmp_path):
    target = tmp_path / "curves.png"
    target.write_bytes(b"last")
    with pytest.raises(KeyError, match="weight/ess"):
        draw_curves([{"step": 1} | {name: 0 for name, _ in PANELS[:-1]}], [], target)
    assert target.read_bytes() == b"last"
    assert list(tmp_path.iterdir()) == [target]
