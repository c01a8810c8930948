"""The architecture as a test: which part of the package may import which, and what no file of the repository may do."""

import ast
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "hiervl"
MODULES = sorted(PACKAGE.rglob("*.py"))
MAX_LINES = 400

# Parts of the package -> parts that they must not import. A part is a folder or a module directly under hiervl/.
FORBIDDEN = {
    "losses": {"modeling", "semi", "evaluation", "data", "predictor"},
    "data": {"modeling", "losses", "semi", "predictor"},
    "evaluation": {"modeling", "losses", "semi", "predictor"},
    "modeling": {"semi", "evaluation", "predictor"},
    "semi": {"predictor"},
}
# Parts of the package -> the only other parts that they may import.
ALLOWED = {
    "ops": {"errors", "utils"},
    "utils": {"errors"},
    "errors": set(),
    "config": {"errors"},
    "checkpoint": {"download", "errors", "pickled_arrays", "utils"},
    "download": {"errors"},
    "launch": {"config", "errors", "rendezvous", "utils"},
    "rendezvous": {"errors"},
    "paths": set(),
    "pickled_arrays": {"errors"},
    "ownership": {"errors"},
    "version": set(),
}
OUTSIDE = {"tools", "tests", "datasets", "train_net"}  # users of the package, which it must not import

FILE_SUFFIXES = (".yaml", ".txt", ".npz", ".pth", ".pt", ".pkl", ".json", ".safetensors")


def imported_modules(source: str, module: str, is_package: bool) -> set[str]:
    """Absolute dotted names of everything that a source imports, also inside functions.

    Args:
        module: dotted name of the source itself, which relative imports start from.
        is_package: the source is an __init__.py.
    """
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            start = []
            if node.level:
                parts = module.split(".")
                start = parts[: len(parts) - node.level + is_package]
            base = [*start, *([node.module] if node.module else [])]
            names |= {".".join([*base, alias.name]) for alias in node.names}
    return names


def part_of(module: str) -> str | None:
    """The part that a dotted name is in: losses of hiervl.losses.matcher.Matcher; None outside the package."""
    first, *rest = module.split(".")
    return (rest[0] if rest else "") if first == "hiervl" else None


def parts_imported_by(path: Path) -> set[str]:
    """Other parts of the package that a module imports. A name that hiervl/__init__.py re-exports counts as itself."""
    return {part_of(name) for name in imports_of(path)} - {None, own_part(path)}


def imports_of(path: Path) -> set[str]:
    module = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    return imported_modules(path.read_text(encoding="utf-8"), module, path.name == "__init__.py")


def own_part(path: Path) -> str:
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@pytest.mark.parametrize(
    "source, is_package, expected",
    [
        ("import torch.nn", False, {"torch.nn"}),
        ("from .b import c", False, {"hiervl.a.b.c"}),
        ("from . import b", False, {"hiervl.a.b"}),
        ("from ..losses import points", False, {"hiervl.losses.points"}),
        ("from .b import c", True, {"hiervl.a.module.b.c"}),
        ("def f():\n    from hiervl.semi import ema", False, {"hiervl.semi.ema"}),
    ],
)
def test_imports_are_resolved(source, is_package, expected):
    assert imported_modules(source, "hiervl.a.module", is_package) == expected


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_imports_point_from_training_to_leaves(path):
    part, imported = own_part(path), parts_imported_by(path)
    # A name re-exported by the package itself would reach every part behind it.
    allowed = ALLOWED.get(part, {p.stem for p in PACKAGE.iterdir()} - FORBIDDEN.get(part, set()))
    assert imported <= allowed, f"{name_of(path)} must not import {', '.join(sorted(imported - allowed))}"


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_the_package_imports_none_of_its_users(path):
    assert not {name.split(".")[0] for name in imports_of(path)} & OUTSIDE


def test_every_part_with_a_rule_exists():
    parts = {own_part(path) for path in MODULES}
    named = set(FORBIDDEN) | set(ALLOWED) | set().union(*FORBIDDEN.values(), *ALLOWED.values())
    assert named <= parts


def tracked_python_files() -> list[Path]:
    """Python files that git tracks; without git or a repository, those of the source folders."""
    if shutil.which("git"):
        listed = subprocess.run(["git", "ls-files", "*.py"], cwd=ROOT, capture_output=True, text=True)
        if listed.returncode == 0 and listed.stdout:
            return [path for name in listed.stdout.splitlines() if (path := ROOT / name).is_file()]
    # Not recursive in datasets/, where users may keep whole datasets.
    patterns = ("*.py", "datasets/*.py", "hiervl/**/*.py", "tools/**/*.py", "tests/**/*.py")
    return sorted(path for pattern in patterns for path in ROOT.glob(pattern))


SOURCES = [path for path in tracked_python_files() if path.relative_to(ROOT).parts[0] != "tests"]


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_no_file_changes_sys_path(path):
    assert not changes_of_sys_path(path.read_text(encoding="utf-8")), f"{name_of(path)}: import the installed package"


def changes_of_sys_path(source: str) -> list[int]:
    """Lines that assign to sys.path or call one of its methods that changes it."""
    lines = []
    for node in ast.walk(ast.parse(source)):
        targets = []
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            targets = [node.func.value] if node.func.attr in ("insert", "append", "extend", "remove") else []
        elif isinstance(node, (ast.Assign, ast.AugAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            targets = [target.value if isinstance(target, ast.Subscript) else target for target in targets]
        lines += [node.lineno for target in targets if ast.unparse(target) == "sys.path"]
    return lines


def test_changes_of_sys_path_are_noticed():
    changes = ["sys.path.insert(0, 'x')", "sys.path.append('x')", "sys.path[:0] = ['x']", "sys.path += ['x']"]
    assert all(changes_of_sys_path(source) == [1] for source in changes)
    assert not changes_of_sys_path("print(sys.path)\npaths.append(1)")


def test_no_file_outside_the_tests_is_too_long():
    lengths = {name_of(path): len(path.read_text(encoding="utf-8").splitlines()) for path in SOURCES}
    assert len(lengths) > 50
    assert not {name: length for name, length in lengths.items() if length > MAX_LINES}


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_configs_name_files_of_the_repository_or_urls(path):
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    bases = content.pop("_BASE_", [])
    for base in bases if isinstance(bases, list) else [bases]:
        assert (path.parent / base).is_file(), f"{name_of(path)}: _BASE_ {base}"
    for name in file_names(content):
        if "://" not in name:
            assert (ROOT / name).is_file(), f"{name_of(path)}: {name}"


def file_names(value) -> list[str]:
    """Every file named in a nested config. YAML reads a tuple such as ("a.npz", "b.npz") as one string."""
    if isinstance(value, dict):
        return [name for nested in value.values() for name in file_names(nested)]
    if isinstance(value, (list, tuple)):
        return [name for nested in value for name in file_names(nested)]
    if not isinstance(value, str):
        return []
    if value.startswith("("):
        return file_names(ast.literal_eval(value))
    return [value] if value.endswith(FILE_SUFFIXES) or value.startswith("../") else []


def test_files_are_found_in_nested_values():
    assert file_names({"A": {"B": "x.npz", "C": 3}, "D": '("y.txt", "a photo of a {}")'}) == ["x.npz", "y.txt"]
