"""The layers import downward only, and importing the package needs no compiled part, no transformers, no triton."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import isdaa_kernels

ROOT = Path(isdaa_kernels.__file__).parent
FILES = sorted(path.relative_to(ROOT) for path in ROOT.rglob("*.py"))
INTEGRATIONS = [path for path in FILES if path.parts[0] == "integrations"]
MODULES = [path for path in FILES if path not in INTEGRATIONS]

# What each module of the package may import of the package; a folder stands for all in it.
BASE = {"lm_head", "workspace", "targets", "stats", "routing", "pair_loss", "divergence"}
ALLOWED = {
    "lm_head": set(),
    "workspace": set(),
    "stats": set(),
    "arguments": set(),
    "targets": set(),
    "routing": set(),
    "pair_loss": set(),
    "divergence": {"lm_head"},
    "vocab_order": set(),
    "dispatch": {"backends", "divergence", "routing"},  # backends by name, inside a function
    "backends": BASE | {"dispatch"},
    "ops": {"dispatch", "divergence", "lm_head", "pair_loss", "routing", "stats", "targets"},
    "objectives": set(),
    "linear_logprob": {"ops", "arguments", "lm_head", "routing", "stats", "targets", "vocab_order", "workspace"},
    "linear_kl": {"ops", "arguments", "divergence", "lm_head", "targets", "workspace"},
    "logprob_from_logits": {"ops", "arguments", "lm_head", "stats", "targets"},
    "sequence_logprob": {"objectives", "ops"},
    "preference_terms": {"objectives", "ops", "pair_loss"},
    "preference_loss": {"objectives", "ops", "preference_terms"},
    "packed_batch": {"linear_kl", "linear_logprob", "lm_head", "sequence_logprob", "stats"},
    "policy_loss": {"objectives", "ops", "preference_terms", "sequence_logprob", "stats"},
    "linear_policy_loss": {
        "divergence",
        "lm_head",
        "objectives",
        "packed_batch",
        "policy_loss",
        "routing",
        "vocab_order",
    },
    "linear_preference_loss": {
        "lm_head",
        "objectives",
        "packed_batch",
        "preference_loss",
        "preference_terms",
        "sequence_logprob",
        "routing",
        "vocab_order",
    },
    "monitors": {"objectives", "stats"},
    "explain": {"dispatch", "divergence", "routing", "workspace"},
    "testing": {"backends", "lm_head", "ops", "stats"},  # whose products it counts
}


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found |= {
                f"{node.module}.{alias.name}" if node.module == "isdaa_kernels" else node.module for alias in node.names
            }
    return found


@pytest.mark.parametrize("module", [m for m in MODULES if str(m) != "__init__.py"], ids=str)
def test_layers(module):
    layer = module.parts[0].removesuffix(".py")
    for name in imports(ROOT / module):
        if name.split(".")[0] != "isdaa_kernels" or name == "isdaa_kernels":
            continue
        target = name.split(".")[1]
        if layer in ("backends", "objectives", "ops") and target == layer:
            # A backend imports itself, never another; `gpu` is no backend, and imports none.
            shared = {"gpu"} if module.parts[1] in ("triton", "cuda") else set()
            assert layer != "backends" or name.split(".")[2] in shared | {module.parts[1]}, f"{module} imports {name}"
            continue
        own = {"_cpu": "cpu", "_cuda": "cuda"}.get(target)  # the compiled modules
        assert target in ALLOWED[layer] or (own and module.parts[:2] == ("backends", own)), f"{module} imports {name}"


@pytest.mark.parametrize("module", [m for m in MODULES if m.parts[0] != "backends" or m.parts[1] == "gpu"], ids=str)
def test_only_torch_and_the_standard_library(module):
    outside = {name.split(".")[0] for name in imports(ROOT / module)} - set(sys.stdlib_module_names)
    assert outside <= {"torch", "isdaa_kernels"}


def test_the_trainer_uses_public_names_only():
    folder = Path(__file__).parents[1] / "python" / "isdaa_trainer"
    files = list(folder.rglob("*.py"))
    assert files
    for path in files:
        check_public_names(path)


# What an integration imports of others, beside torch; each is imported only where somebody asks for it.
LIBRARIES = {
    "axolotl": {"axolotl", "pydantic", "trl"},
    "llama_factory": {"llamafactory"},
    "transformers": {"transformers"},
    "trl": {"trl"},
    "trl_trainer": {"datasets", "transformers", "trl"},
}


@pytest.mark.parametrize("module", INTEGRATIONS, ids=str)
def test_integrations_use_public_names_and_their_library(module):
    check_public_names(ROOT / module, "isdaa_kernels.integrations.")
    outside = {name.split(".")[0] for name in imports(ROOT / module)} - set(sys.stdlib_module_names)
    assert outside <= {"torch", "isdaa_kernels"} | LIBRARIES.get(module.stem, set())
    assert outside == set() or module.stem != "__init__"


def check_public_names(path: Path, and_below: str = "isdaa_kernels.no") -> None:
    for node in ast.walk(ast.parse(path.read_text())):
        module = node.module or "" if isinstance(node, ast.ImportFrom) else ""
        if module.split(".")[0] == "isdaa_kernels" and not module.startswith(and_below):
            assert module == "isdaa_kernels", f"{path.name} imports {module}"
            assert {alias.name for alias in node.names} <= set(isdaa_kernels.__all__)


def test_import_needs_nothing_but_torch():
    code = (
        "import sys\n"
        "for name in ('triton', 'transformers', 'numpy', 'isdaa_kernels._cpu'): sys.modules[name] = None\n"
        "import isdaa_kernels\n"
        "from isdaa_kernels.backends.gpu import backward_pass, forward_pass, logits_pass, plan\n"
        "print(isdaa_kernels.explain_backends())\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT.parent, check=False)
    assert done.returncode == 0, done.stderr
    assert "cpu: not built" in done.stdout


def test_csrc_holds_no_torch_header():
    sources = [p for p in (ROOT.parent / "csrc").rglob("*") if p.suffix in {".h", ".cpp", ".cu", ".cuh"}]
    assert sources
    for path in sources:
        assert not any(word in path.read_text() for word in ("<torch/", "<ATen/", "<c10/")), path
