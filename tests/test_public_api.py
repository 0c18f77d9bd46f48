"""The names that users rely on, what importing them costs, and the tree of errors."""

import ast
import importlib
import inspect
import os
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import pytest

import quire
from quire import errors

SOURCE = Path(quire.__file__).parent
FRAMEWORKS = ("torch", "transformers", "triton", "fastapi", "matplotlib", "ray", "redis")
MODULES = sorted(
    module.name
    for module in pkgutil.walk_packages([str(SOURCE)], "quire.")
    if not module.name.rpartition(".")[2].startswith("_")  # __main__ would run; _native is C++
)
FILES = sorted(SOURCE.rglob("*.py"))


def imported_by(statement: str) -> set[str]:
    """Top-level names of the modules that a fresh interpreter has after ``statement``."""
    code = f"{statement}\nimport sys\nprint(*{{name.split('.')[0] for name in sys.modules}})"
    env = {**os.environ, "PYTHONPATH": str(SOURCE.parent)}
    ran = subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True
    )
    return set(ran.stdout.split())


def isort_key(name: str) -> tuple[int, list[tuple[int, int, str]]]:
    """The order of ruff's RUF022: CONSTANTS, Classes, functions; numbers by value."""
    kind = 0 if len(name) > 1 and name.isupper() else 1 if name[:1].isupper() else 2
    parts = re.findall(r"\d+|\D+", name)
    return kind, [(0, int(p), "") if p.isdigit() else (1, 0, p) for p in parts]


# -- names


def test_the_public_names_are_sorted_and_can_be_imported() -> None:
    assert quire.__all__ == sorted(quire.__all__, key=isort_key)
    assert len(set(quire.__all__)) == len(quire.__all__)
    for name in quire.__all__:
        assert inspect.isclass(getattr(quire, name)), name


def test_the_public_names_are_about_a_dozen() -> None:
    wanted = {"Engine", "CacheConfig", "SamplingParams", "Completion", "KVCache", "QuireError"}
    assert wanted <= set(quire.__all__)
    assert 10 <= len(quire.__all__) <= 14


def test_a_star_import_brings_exactly_the_public_names() -> None:
    names: dict[str, object] = {}
    exec("from quire import *", names)
    assert set(names) - {"__builtins__"} == set(quire.__all__)


def test_dir_lists_the_public_names_and_an_unknown_one_is_an_attribute_error() -> None:
    assert set(quire.__all__) <= set(dir(quire))
    with pytest.raises(AttributeError, match="'Engin'"):
        quire.Engin  # noqa: B018


def test_the_version_is_a_version() -> None:
    assert re.fullmatch(r"\d+\.\d+\.\d+([a-z]+\d+)?", quire.__version__)


@pytest.mark.parametrize("name", MODULES)
def test_every_module_says_what_it_gives_and_has_it(name: str) -> None:
    try:
        module = importlib.import_module(name)
    except ImportError as error:
        extra = (error.name or "").split(".")[0] in FRAMEWORKS
        if extra or "_native" in str(error):  # an extra, or kernels that are not compiled here
            pytest.skip(str(error))
        raise
    if not hasattr(module, "__all__"):
        assert not public_definitions(Path(module.__file__ or "")), f"{name} has no __all__"
        return
    exported = module.__all__
    assert exported == sorted(exported, key=isort_key)
    assert len(set(exported)) == len(exported)
    for item in exported:
        assert hasattr(module, item), item


# -- what importing costs


def test_importing_quire_imports_nothing_heavy() -> None:
    heavy = {"numpy", "tokenizers", "safetensors", "ml_dtypes", "jinja2", "click", "rich"}
    heavy |= {"huggingface_hub", *FRAMEWORKS}
    assert not imported_by("import quire") & heavy


def test_importing_the_engine_imports_no_framework() -> None:
    found = imported_by("import quire.engine\nquire.Engine, quire.KVCache, quire.SamplingParams")
    assert "numpy" in found
    assert not found & {*FRAMEWORKS, "huggingface_hub", "click", "rich"}


def test_importing_the_cache_and_the_settings_imports_no_tokenizer() -> None:
    found = imported_by("import quire.cache, quire.config, quire.layout, quire.backends")
    assert not found & {*FRAMEWORKS, "huggingface_hub", "tokenizers", "jinja2", "click", "rich"}


# -- errors


def drawn_tree() -> dict[str, tuple[str, set[str]]]:
    """From the drawing in the docstring: each class, its parent, and other bases in brackets."""
    tree: dict[str, tuple[str, set[str]]] = {}
    above: dict[int, str] = {}
    for line in inspect.getdoc(errors).splitlines():  # type: ignore[union-attr]
        match = re.match(r"^([\s│├└─]*)([A-Z]\w+)(?: \((\w+)\))?(?:\s{2,}|$)", line)
        if match is None:
            continue
        indent, name, other = match.groups()
        above[len(indent)] = name
        parents = [at for at in above if at < len(indent)]
        parent = above[max(parents)] if parents else "Exception"
        for deeper in [at for at in above if at > len(indent)]:
            del above[deeper]
        tree[name] = (parent, {other} if other else set())
    return tree


def error_classes() -> dict[str, type[BaseException]]:
    return {
        name: value
        for name, value in vars(errors).items()
        if inspect.isclass(value) and issubclass(value, BaseException)
    }


def test_every_error_is_a_quire_error_and_exported() -> None:
    for name, error in error_classes().items():
        assert issubclass(error, errors.QuireError)
        assert name in errors.__all__


def test_the_drawing_of_the_errors_is_true() -> None:
    drawn = drawn_tree()
    assert set(drawn) == set(error_classes())
    for name, error in error_classes().items():
        parent, others = drawn[name]
        assert {base.__name__ for base in error.__bases__} == {parent, *others}


def test_no_module_raises_a_foreign_exception() -> None:
    """Errors raised on purpose are Quire's own, so that one ``except`` catches them."""
    allowed = {*error_classes(), "AttributeError", "TypeError", "TemplateError"}
    for path in FILES:
        if "cli" in path.relative_to(SOURCE).parts or path.stem == "cli":
            continue  # click's own exceptions end a command
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
                name = ast.unparse(node.exc.func).split(".")[-1]
                assert name in allowed, f"{path.name}:{node.lineno} raises {name}"


# -- docstrings


def public_definitions(path: Path) -> list[ast.ClassDef | ast.FunctionDef]:
    """Public classes and functions of a module, and the public methods of those classes."""
    found: list[ast.ClassDef | ast.FunctionDef] = []
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef) and not node.name.startswith("_"):
            found.append(node)
            members = node.body if isinstance(node, ast.ClassDef) else []
            found += [
                member
                for member in members
                if isinstance(member, ast.FunctionDef) and not member.name.startswith("_")
            ]
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_modules_and_public_definitions_have_docstrings(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert ast.get_docstring(ast.parse(text)) or not text.strip()
    bare = [node.name for node in public_definitions(path) if not ast.get_docstring(node)]
    assert not bare
