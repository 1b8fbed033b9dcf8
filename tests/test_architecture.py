"""The house's law: who imports whom, where heavy packages are imported, and names that must not hide a dependency."""

import ast
import importlib.metadata
import sys
from collections import defaultdict
from pathlib import Path

PACKAGE = Path(__file__).parent.parent / "hf_vla"
FILES = sorted(PACKAGE.rglob("*.py"))

# What each part may import of ours; `train` and `cli` may import all, and nobody imports them.
ALLOWED = {
    "sample": set(),
    "recipe": set(),
    "report": set(),
    "console": set(),
    "model": set(),
    "weights": {"model"},
    "lora": set(),
    "fingerprint": set(),
    "workers": set(),
    "data": {"sample"},
    "convert": {"data", "sample", "workers"},
    "inspection": {"data", "sample", "convert"},
    "run": {"recipe"},
    "assemble": {"recipe", "lora", "model", "weights"},
    "caching": {"recipe", "sample", "data", "model", "weights", "assemble", "fingerprint", "memory"},
    "checkpoint": {"recipe", "lora", "model", "assemble", "weights"},
    "policy": {"sample", "model", "checkpoint"},
    "merge": {"recipe", "lora", "model", "assemble", "checkpoint", "weights", "policy"},
    "saving": {"run"},
    "progress": {"data", "run"},
    "resumable": {"data", "progress", "saving"},
    "trainer": {"recipe", "model", "checkpoint", "memory", "assemble", "lora", "run", "resumable"},
    "arguments": {"recipe"},
    "stopping": {"memory"},
    "rollout": {"console", "sample", "data", "workers"},
    "memory": {
        "console",
        "caching",
        "recipe",
        "lora",
        "model",
        "assemble",
        "weights",
        "data",
        "sample",
        "run",
        "checkpoint",
        "workers",
    },
    "geometry": {"sample", "model", "weights", "run"},
    "evaluation": {"console", "recipe", "sample", "data", "policy", "rollout", "run", "geometry"},
    "hub": {"recipe", "checkpoint", "merge", "run", "report", "weights"},
    "planning": {"recipe", "memory", "caching"},
    "curves": set(),
    "prepare": {
        "curves",
        "arguments",
        "recipe",
        "data",
        "model",
        "sample",
        "assemble",
        "caching",
        "trainer",
        "planning",
    },
    "train": None,
    "probe": None,
    "cli": None,
}
# Of the package itself, for anyone.
PUBLIC = {"__version__", "register_auto_classes"}
# Each heavy optional package is imported in exactly one file.
HEAVY = {"metaworld", "mujoco", "matplotlib", "pynvml", "av", "h5py", "torchcodec"}


def part_of(path: Path) -> str:
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def imports(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
    return names


def test_imports_follow_the_order():
    wrong = []
    for path in FILES:
        part = part_of(path)
        if part == "__init__" or ALLOWED[part] is None:
            continue
        ours = {name.split(".")[1] for name in imports(path) if name.startswith("hf_vla.")} - {part, *PUBLIC}
        wrong += [f"{path.name} imports {other}" for other in ours if other not in ALLOWED[part]]
    assert not wrong


def test_the_model_imports_siblings_only():
    assert not [path.name for path in (PACKAGE / "model").glob("*.py") if any("hf_vla" in n for n in imports(path))]


def test_each_heavy_package_is_imported_in_one_file():
    where = defaultdict(set)
    for path in FILES:
        for name in imports(path):
            if name.split(".")[0] in HEAVY:
                where[name.split(".")[0]].add(path.name)
    assert not {package: files for package, files in where.items() if len(files) > 1}


def test_no_name_hides_a_dependency():
    # `accelerate launch hf_vla/train.py` puts hf_vla/ first on sys.path.
    ours = {path.stem for path in PACKAGE.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}
    installed = set(importlib.metadata.packages_distributions())
    assert not ours & (installed | set(sys.stdlib_module_names))


def test_the_package_never_prints():
    prints = [
        path.name
        for path in FILES
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
    ]
    assert not prints
