"""docs/objectives.md is what the generator prints, and names every objective and every published system once."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from isdaa_kernels.objectives import FAMILIES, OBJECTIVES
from isdaa_kernels.objectives.table import BY_AN_ARGUMENT, COLUMNS, NOT_HERE, SUMS, elsewhere, page

ROOT = Path(__file__).parent.parent

# Systems that published preference losses, from two lists of them: each has an objective, or the page says why not.
SYSTEMS = (
    "DNO", "SimPO", "APO (accelerated)", "D3PO", "ASFT", "Diffusion-DRO", "Curry-DPO", "More is Less", "Survey of DPO", "ADPO",
    "SmPO-Diffusion", "Insights into Alignment", "MNPO", "OFS-DPO", "LD-DPO", "DAPO (direct advantage)", "Nash-MP", "TGDPO", "Egida",
    "MADPO", "From r to Q*", "RankDPO", "INPO", "DSO", "3D-Properties", "DDO", "Scaling laws for over-optimisation", "OREO", "TPO", "f-DPO",
    "EGPO", "AWM", "Multi-objective GRPO", "PDPPO", "DenseDPO", "RTO", "CPO (condition)", "MODPO", "Likelihood over-optimisation",
    "MCTS-DPO", "SPPO", "BRAIn", "TDPO", "EXO", "MPO", "MinorDPO", "RSO", "Ada-DPO", "RPO", "OptiDICE", "OPPO",
)  # fmt: skip


def rows() -> list[list[str]]:
    """The cells of the rows of all tables."""
    lines = [line for line in page().splitlines() if line.startswith("| `")]
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]


def test_the_page_is_what_the_generator_prints():
    """If this fails: python -m isdaa_kernels.objectives > docs/objectives.md"""
    assert (ROOT / "docs" / "objectives.md").read_text() == page()


def test_the_module_prints_the_page():
    command = [sys.executable, "-m", "isdaa_kernels.objectives"]
    assert subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout == page()


def test_every_objective_has_one_full_row():
    bases = [objective.name for family in FAMILIES for objective in family.OBJECTIVES]
    assert [row[0] for row in rows()] == [f"`{name}`" for name in bases]
    assert set(OBJECTIVES) - set(bases) == {f"is_{name}" for name in bases} & set(OBJECTIVES)
    for row in rows():
        assert len(row) == len(COLUMNS)
        name, formula, needs, options, _, source, _ = row
        assert all((name, formula, needs, options, source)), name
        assert re.search(r"; \[[PSGN]\]$", formula), name


ELSEWHERE = {
    "dpo_mean": ["TRL `sigmoid_norm` (from 1.4)"],
    "aot_unpaired": ["TRL `aot_pair` (to 0.27)", "TRL `aot_unpaired` (from 0.28)"],
    "ipo_mean": ["TRL `ipo`", "LLaMA-Factory `ipo`"],
    "bco": ["TRL `bco_pair` (to 0.28: with its state)", "LLaMA-Factory `pref_bco_weight` (from 0.9.4)"],
    "orpo": [
        "TRL `orpo` (`beta` is `odds_weight`, with `sft` for its own term)",
        "LLaMA-Factory `orpo` (`pref_beta` is `odds_weight`)",
    ],
    "dpop": [],
}


@pytest.mark.parametrize("name", ELSEWHERE)
def test_names_elsewhere(name):
    assert elsewhere(OBJECTIVES[name]) == ELSEWHERE[name]


def test_every_system_is_accounted_for():
    declared = {system for objective in OBJECTIVES.values() for system in objective.systems}
    told = declared | set(BY_AN_ARGUMENT) | set(NOT_HERE)
    assert set(SYSTEMS) <= told, set(SYSTEMS) - told
    assert not declared & (set(BY_AN_ARGUMENT) | set(NOT_HERE))
    assert not set(BY_AN_ARGUMENT) & set(NOT_HERE)


def test_objectives_named_in_the_lists_exist():
    text = " ".join([*BY_AN_ARGUMENT.values(), *NOT_HERE.values()])
    others = {"token_weight", "label_smoothing", "linear_logprob_stats"}
    assert set(re.findall(r"`(\w+)`", text)) - others <= set(OBJECTIVES)
    assert set(SUMS) <= set(OBJECTIVES)


def test_the_readme_counts_them():
    count = sum(not name.startswith("is_") for name in OBJECTIVES)
    for name in ("README.md", "CHANGELOG.md"):
        assert re.search(rf"\b{count}(, each a pure function| objectives)", (ROOT / name).read_text()), name
