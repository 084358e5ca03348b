"""The house rules: import direction, sizes, honest README, one schema, nothing left lying about."""

from __future__ import annotations

import ast
import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("posmlp_kernels", "posmlp")
OPERATORS = ("pos_gate", "gqpe_table")


def tracked(*suffixes):
    """Files under version control, or all files of an unpacked source archive."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode == 0 and listed.stdout:
        files = [ROOT / name for name in listed.stdout.split("\0") if name]
    else:
        skipped = {".venv", ".git", "build", "dist"}
        files = [p for p in ROOT.rglob("*") if not skipped & set(p.relative_to(ROOT).parts)]
    return [p for p in files if p.is_file() and (not suffixes or p.suffix in suffixes)]


def name_of(path):
    return str(path.relative_to(ROOT))


def parsed(path):
    return ast.parse(path.read_text(), str(path))


def python_files(*folders):
    files = [p for p in tracked(".py") if not folders or p.relative_to(ROOT).parts[0] in folders]
    assert files, folders
    return files


def imported(tree):
    """The absolute names of all modules that a file imports, also inside functions."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield node.module


# ---- direction ----


@pytest.mark.parametrize(
    "low, high",
    [
        ("posmlp_kernels", {"posmlp", "benchmarks", "tests", "timm", "torchvision", "matplotlib", "numpy"}),
        ("posmlp", {"tests"}),
        ("benchmarks", {"tests"}),
    ],
)
def test_imports_point_one_way(low, high):
    """kernel <- op <- layer <- model <- command line: a low layer knows nothing of a high one."""
    for path in python_files(low):
        wrong = {name for name in imported(parsed(path)) if name.split(".")[0] in high}
        assert not wrong, f"{name_of(path)} imports {sorted(wrong)}"


def test_back_ends_do_not_import_upwards():
    """A back end knows the ops and the problem, not what chooses between back ends."""
    for path in python_files("posmlp_kernels"):
        if path.parent.name not in OPERATORS:
            continue
        relative = [
            n.module or "" for n in ast.walk(parsed(path)) if isinstance(n, ast.ImportFrom) and n.level
        ]
        above = {"dispatch", "operator", "layers", "cache", "testing"} & {m.split(".")[0] for m in relative}
        assert not above, f"{name_of(path)} imports {sorted(above)}"


# ---- sizes ----


def test_python_files_are_small():
    lengths = {name_of(p): len(p.read_text().splitlines()) for p in python_files()}
    assert not {n: k for n, k in lengths.items() if k > 400}


def test_compiled_sources_are_small():
    lengths = {name_of(p): len(p.read_text().splitlines()) for p in tracked(".cpp", ".cu", ".h", ".cuh")}
    assert not {n: k for n, k in lengths.items() if k > 450}


def test_setup_is_boring():
    assert len((ROOT / "setup.py").read_text().splitlines()) <= 90


def test_functions_are_small():
    long = {}
    for path in python_files():
        for node in ast.walk(parsed(path)):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                lines = node.end_lineno - node.lineno + 1
                if lines > 80:
                    long[f"{name_of(path)}:{node.name}"] = lines
    assert not long


def test_no_large_files():
    large = {name_of(p): p.stat().st_size for p in tracked() if p.stat().st_size > 1_000_000}
    assert not large


# ---- interfaces ----


def test_no_swallowed_keyword_arguments():
    """A `**kwargs` is handed on, never dropped: a misspelt option must be an error somewhere."""
    for path in python_files(*PACKAGES):
        for node in ast.walk(parsed(path)):
            if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) or node.args.kwarg is None:
                continue
            name = node.args.kwarg.arg
            uses = [n for n in ast.walk(node) if isinstance(n, ast.Name) and n.id == name]
            assert uses, f"{name_of(path)}:{node.name} drops **{name}"


@pytest.mark.parametrize("operator", OPERATORS)
def test_the_compiled_schema_is_the_one_schema(operator):
    """The text in C++ is what Python registers fakes and gradients for."""
    ops = importlib.import_module(f"posmlp_kernels.{operator}.ops")

    def squeezed(text):
        return re.sub(r"\s+", "", text)

    source = "\n".join(p.read_text() for p in tracked(".cpp", ".h", ".cu") if "csrc" in p.parts)
    source = squeezed(re.sub(r'"\s*"', "", source))  # adjacent literals are one
    for name, schema in ((operator, ops.FORWARD_SCHEMA), (f"{operator}_backward", ops.BACKWARD_SCHEMA)):
        for backend in ("cpu", "cuda"):
            whole = f"{name}.{backend}{schema}"
            assert squeezed(whole) in source, f"csrc does not define {whole}"


# ---- README ----


def readme():
    return (ROOT / "README.md").read_text()


def commands():
    """The lines of the README's code blocks, and its inline code, without prompts."""
    text = readme()
    blocks = "\n".join(re.findall(r"^```\w*\n(.*?)^```", text, re.S | re.M))
    inline = re.findall(r"(?<!`)`([^`\n]+)`(?!`)", re.sub(r"^```.*?^```", "", text, flags=re.S | re.M))
    return [line.strip().removeprefix("$ ") for line in [*blocks.splitlines(), *inline]]


def test_readme_make_targets_exist():
    makefile = (ROOT / "Makefile").read_text()
    targets = {t for line in re.findall(r"^([\w .-]+):(?!=)", makefile, re.M) for t in line.split()}
    wanted = {t for c in commands() for t in re.findall(r"^make((?: [a-z][\w-]*)+)", c) for t in t.split()}
    assert {"demo", "test", "bench", "lint"} <= targets
    assert "demo" in wanted, "the README must say how to run the demo"
    assert wanted <= targets, f"the README promises make {sorted(wanted - targets)}"


def test_readme_subcommands_exist():
    wanted = {c.split()[1] for c in commands() if re.match(r"posmlp [a-z]", c)}
    assert "demo" in wanted
    run = [sys.executable, "-c", "from posmlp.cli import main; main()", "--help"]
    result = subprocess.run(run, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    missing = {name for name in wanted if not re.search(rf"\b{re.escape(name)}\b", result.stdout)}
    assert not missing, f"the README promises posmlp {sorted(missing)}"


def test_readme_python_names_exist():
    blocks = re.findall(r"^```(?:python|py)\n(.*?)^```", readme(), re.S | re.M)
    assert blocks, "the README must show some Python"
    checked = 0
    for block in blocks:
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and node.module.split(".")[0] in PACKAGES:
                module = importlib.import_module(node.module)
                for alias in node.names:
                    assert hasattr(module, alias.name), f"{node.module} has no {alias.name}"
                    checked += 1
            elif isinstance(node, ast.Import):
                for alias in node.names:
                    if alias.name.split(".")[0] in PACKAGES:
                        importlib.import_module(alias.name)
                        checked += 1
    assert checked


def test_readme_links_and_pictures_exist():
    targets = re.findall(r"\]\(([^)#\s]+)[^)]*\)", readme()) + re.findall(r'src="([^"]+)"', readme())
    local = [t for t in targets if not re.match(r"\w+:", t)]
    missing = [t for t in local if not (ROOT / t).exists()]
    assert not missing


# ---- leftovers ----

MARKS = "|".join(("TO" + "DO", "FIX" + "ME", "XX" + "X", "HA" + "CK"))


@pytest.mark.parametrize(
    "what, pattern",
    [
        ("a note to oneself", rf"\b(?:{MARKS})\b"),
        ("a path of somebody's machine", r"(?<![\w.])/(?:work|root|home|Users|tmp)/\w"),
        ("a forgotten breakpoint", r"^\s*(?:breakpoint\(|import pdb|pdb\.set)"),
        ("an unresolved merge", r"^(?:<{7} |>{7} )"),
    ],
)
def test_no_leftovers(what, pattern):
    text_files = (".py", ".cpp", ".cu", ".h", ".cuh", ".md", ".toml", ".txt", ".cfg", ".yml", "")
    for path in tracked(*text_files):
        if path == Path(__file__):
            continue
        found = re.search(pattern, path.read_text(errors="replace"), re.M)
        assert not found, f"{name_of(path)} holds {what}: {found.group()!r}"


def test_every_package_folder_is_installed():
    """A folder of Python files that setuptools is not told about would be missing from the wheel."""
    declared = (ROOT / "pyproject.toml").read_text()
    for folder in {p.parent for p in python_files(*PACKAGES)}:
        package = ".".join(folder.relative_to(ROOT).parts)
        assert f'"{package}"' in declared, f"{package} is not in pyproject.toml's packages"
