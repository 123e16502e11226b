"""The house: who may import whom, and what importing the package does not do."""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "specdec_lab"
HEAVY = {
    "torch", "transformers", "optuna", "plotly", "ipywidgets", "anywidget", "numpy", "scipy", "pynvml", "triton", "jsonschema"
}  # fmt: skip
PURE = {"records"}
# room -> (own rooms it may import, heavy libraries it may import)
RULES: dict[str, tuple[set[str], set[str]]] = {
    "records": (set(), set()),
    "stream": (PURE, set()),
    "trace": (PURE | {"stream"}, set()),
    "summary": (PURE | {"trees"}, {"numpy"}),
    "costs": (PURE, {"numpy"}),
    "trees": (PURE, {"numpy", "torch"}),  # torch in files.py only, while a `.pt` file is read (test_trees_import holds that)
    "policy": (PURE, set()),
    "machine": (PURE, set()),
    "export": (PURE | {"policy"}, set()),
    "sensors": (PURE, {"pynvml"}),
    "workload": (PURE, {"torch"}),
    "engine": (PURE | {"stream", "summary", "workload", "costs", "machine", "sensors"}, {"torch", "transformers", "numpy"}),
    "tune": (PURE | {"stream", "summary", "policy", "costs", "trees", "machine"}, {"optuna", "numpy", "scipy"}),
    "view": (PURE | {"stream", "summary", "costs", "trace", "policy"}, {"plotly", "ipywidgets", "anywidget", "numpy"}),
}


def imports(path):
    """(own rooms, libraries) that a file imports, wherever in the file."""
    depth = len(path.relative_to(PACKAGE).parts) - 1
    rooms, libraries = set(), set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            libraries |= {a.name.split(".")[0] for a in node.names}
        elif isinstance(node, ast.ImportFrom):
            if node.level == 0:
                name = (node.module or "").split(".")
                if name[0] == "specdec_lab":
                    rooms |= {name[1]} if len(name) > 1 else {a.name for a in node.names}
                else:
                    libraries.add(name[0])
            elif node.level == depth + 1:
                rooms |= {node.module.split(".")[0]} if node.module else {a.name for a in node.names}
    return rooms, libraries


def files_of(room):
    single = PACKAGE / f"{room}.py"
    return [single] if single.exists() else sorted((PACKAGE / room).rglob("*.py"))


@pytest.mark.parametrize("room", RULES)
def test_a_room_imports_only_what_it_may_know(room):
    own, heavy = RULES[room]
    for path in files_of(room):
        rooms, libraries = imports(path)
        assert rooms - own - {room, "__version__"} == set(), f"{path.relative_to(ROOT)} imports against the arrows"
        assert libraries & HEAVY - heavy == set(), f"{path.relative_to(ROOT)} imports a library its room must not know"


def test_nobody_imports_the_front_doors():
    for path in PACKAGE.rglob("*.py"):
        rooms, _ = imports(path)
        doors = {"cli", "magics", "commands"}
        if path.relative_to(PACKAGE).parts[0].removesuffix(".py") not in doors | {"__init__", "__main__"}:
            assert not rooms & doors, path


def test_kernels_is_a_source_root_and_knows_nothing_of_the_package():
    assert not (ROOT / "kernels" / "__init__.py").exists(), (
        "a package named `kernels` shadows Hugging Face's `kernels`, which transformers imports: `from transformers import "
        "LlamaForCausalLM` would fail from the repository root"
    )
    for path in (ROOT / "kernels").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else [getattr(node, "module", None) or ""]
            assert not any(name.startswith("specdec_lab") for name in names), path


def test_importing_the_package_loads_no_heavy_library():
    code = f"import sys, specdec_lab; print(sorted({HEAVY!r} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_policy_can_be_embedded_without_heavy_libraries():
    code = f"import sys; from specdec_lab.policy import Policy; print(sorted({HEAVY!r} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_flash_attn_is_in_its_own_extra_only():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert not any("flash-attn" in d for d in project["dependencies"])
    holders = [name for name, deps in project["optional-dependencies"].items() if any("flash-attn" in d for d in deps)]
    assert holders == ["flash"]


def test_files_are_not_grab_bags():
    for name in ("utils.py", "common.py", "helpers.py"):
        assert not list(PACKAGE.rglob(name))


def test_no_broad_except_and_no_star_import():
    carries = {"view/live.py"}  # hands whatever ended the worker thread to the thread that waits
    for path in PACKAGE.rglob("*.py"):
        if path.relative_to(PACKAGE).as_posix() in carries:
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ExceptHandler) and not isinstance(node.body[-1], ast.Raise):
                caught = [node.type] if not isinstance(node.type, ast.Tuple) else node.type.elts
                assert all(c is not None and getattr(c, "id", "") not in ("Exception", "BaseException") for c in caught), path
            if isinstance(node, ast.ImportFrom):
                assert all(a.name != "*" for a in node.names), path
