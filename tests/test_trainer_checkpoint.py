import dataclasses
import json

import pytest
import torch
from isdaa_trainer.checkpoint import (
    append_line,
    check_output,
    check_same_run,
    checkpoints,
    read_lines,
    restore,
    save_checkpoint,
    truncate_lines,
    whole_file,
    whole_folder,
    write_run,
)
from isdaa_trainer.model import Policy
from isdaa_trainer.routing import Routing
from trainer_fixtures import make_config, make_model, make_tokenizer


class Crash(Exception):
    pass


def write_half(whole, name):
    with whole as path:
        (path / name).write_text("x")
        raise Crash


def test_a_folder_is_whole_or_absent(tmp_path):
    target = tmp_path / "checkpoints" / "step-000001"
    with pytest.raises(Crash):
        write_half(whole_folder(target), "half")
    assert list((tmp_path / "checkpoints").iterdir()) == []
    with whole_folder(target) as folder:
        (folder / "a").write_text("x")
        assert not target.exists()
    assert [path.name for path in target.iterdir()] == ["a"]
    assert list(target.parent.iterdir()) == [target]


def test_what_a_killed_process_left_is_no_checkpoint_and_is_cleared(tmp_path):
    partial = tmp_path / "checkpoints" / ".step-000001.partial"
    partial.mkdir(parents=True)
    (partial / "stale").touch()
    assert checkpoints(tmp_path) == []
    with whole_folder(tmp_path / "checkpoints" / "step-000001"):
        pass
    assert [path.name for path in checkpoints(tmp_path)] == ["step-000001"]
    assert list(checkpoints(tmp_path)[0].iterdir()) == []


def test_a_file_is_whole_or_as_before(tmp_path):
    target = tmp_path / "file"
    target.write_text("old")
    with pytest.raises(Crash):
        write_half(whole_file(target), "")
    assert target.read_text() == "old"
    with whole_file(target) as path:
        path.write_text("new")
    assert target.read_text() == "new"
    assert list(tmp_path.iterdir()) == [target]


def test_output_folders(tmp_path):
    check_output(tmp_path / "new", resume=False)
    check_output(tmp_path, resume=False)
    (tmp_path / "other").touch()
    with pytest.raises(ValueError, match="expected an empty or new folder"):
        check_output(tmp_path, resume=False)
    with pytest.raises(ValueError, match="expected an empty or new folder"):
        check_output(tmp_path / "other", resume=False)
    with pytest.raises(ValueError, match=r"nothing to resume in .*: it holds no run\.json"):
        check_output(tmp_path, resume=True)
    write_run(tmp_path, make_config(tmp_path, "m"), "digest")
    check_output(tmp_path, resume=True)
    with pytest.raises(ValueError, match="already holds a run; go on with --resume"):
        check_output(tmp_path, resume=False)


def test_resuming_needs_the_same_settings_and_data(tmp_path):
    config = make_config(tmp_path, "m")
    write_run(tmp_path, config, "digest")
    check_same_run(tmp_path, config, "digest")
    check_same_run(tmp_path, dataclasses.replace(config, save_every=3, eval_every=2, keep_checkpoints=5), "digest")
    with pytest.raises(ValueError, match=r"beta: the run in .* was started with None, got 0\.2"):
        check_same_run(tmp_path, dataclasses.replace(config, beta=0.2), "digest")
    with pytest.raises(ValueError, match="the pairs are not those"):
        check_same_run(tmp_path, config, "other")


def stepped_adam(policy):
    optimizer = torch.optim.AdamW(policy.model.parameters(), lr=0.01, fused=True)
    for parameter in policy.model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    return optimizer


def test_checkpoints_restore_everything_and_only_the_newest_stay(tmp_path):
    policy = Policy(make_model(), make_tokenizer(), torch.float32)
    optimizer, routing = stepped_adam(policy), Routing(make_config(tmp_path, "m"))
    for step in (5, 999_999, 1_000_000):
        save_checkpoint(tmp_path, step, policy, optimizer, routing, keep=2)
    torch.manual_seed(7)
    save_checkpoint(tmp_path, 2_000_000, policy, optimizer, routing, keep=2)
    drawn = torch.rand(3)
    names = [path.name for path in checkpoints(tmp_path)]
    assert names == ["step-1000000", "step-2000000"]

    fresh = torch.optim.AdamW(make_model().parameters(), lr=0.5, fused=True)
    restore(checkpoints(tmp_path)[-1], policy, fresh, routing)
    assert torch.rand(3).equal(drawn)
    assert fresh.param_groups[0]["lr"] == 0.01
    for got, expected in zip(fresh.state.values(), optimizer.state.values(), strict=True):
        assert got["exp_avg"].equal(expected["exp_avg"])
        assert got["step"].equal(expected["step"])


def test_saving_the_same_step_twice_keeps_the_first(tmp_path):
    policy = Policy(make_model(), make_tokenizer(), torch.float32)
    optimizer, routing = stepped_adam(policy), Routing(make_config(tmp_path, "m"))
    save_checkpoint(tmp_path, 5, policy, optimizer, routing, keep=1)
    before = (checkpoints(tmp_path)[0] / "trainer.pt").stat().st_mtime_ns
    save_checkpoint(tmp_path, 5, policy, optimizer, routing, keep=1)
    assert (checkpoints(tmp_path)[0] / "trainer.pt").stat().st_mtime_ns == before


def test_lines_after_the_checkpoint_and_half_lines_go(tmp_path):
    path = tmp_path / "metrics.jsonl"
    for step in (1, 2, 3, 4):
        append_line(path, {"step": step, "x": step / 3})
    with path.open("a") as file:
        file.write('{"step": 5, "x"')
    assert [line["step"] for line in read_lines(path, 10)] == [1, 2, 3, 4]
    truncate_lines(path, last_step=2)
    assert path.read_text().endswith("\n")
    assert [json.loads(line) for line in path.read_text().splitlines()] == [{"step": i, "x": i / 3} for i in (1, 2)]
    truncate_lines(tmp_path / "none.jsonl", last_step=2)
    assert read_lines(tmp_path / "none.jsonl", 10) == []
