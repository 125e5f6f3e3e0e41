"""The shape of the code: who imports whom, how large things are, what is documented, who may print."""

import ast
import functools
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "llmjax"

# Each line may import from the lines above it; within a line only what SIDEWAYS says.
LAYERS = [
    {"config", "typing", "errors", "files", "runtime", "units", "results"},
    {"sharding"},
    {"kernels"},
    {"data", "models"},
    {"tasks", "generation", "interop"},
    {"objectives"},
    {"training", "evals", "report"},
    {"rl"},
    {"stages"},
    {"runs"},
    {"commands"},
    {"__main__"},
]
SIDEWAYS: set[tuple[str, str]] = set()
WITHOUT_JAX = {"config", "errors", "files", "runtime", "units", "results", "data", "tasks", "report", "commands", "__main__"}
MAY_PRINT = ("commands/", "runs/", "stages/base.py", "training/progress.py")
MAX_FILE_LINES, MAX_FUNCTION_LINES = 600, 80


def modules(root: Path = PACKAGE) -> list[Path]:
    return sorted(p for p in root.rglob("*.py") if "__pycache__" not in p.parts)


@functools.cache
def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def part_of(path: Path) -> str:
    """The layer entry of a module: its top-level package or module below llmjax; "" for llmjax/__init__.py."""
    first = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    return "" if first == "__init__" else first


def imports(path: Path, module_level_only: bool = False) -> list[tuple[int, str]]:
    """(line, dotted name) of every import; `from a import b` gives a.b. Those for type checkers alone are left out."""
    found = []

    def visit(node):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            return
        if module_level_only and isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            return
        if isinstance(node, ast.Import):
            found.extend((node.lineno, alias.name) for alias in node.names)
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: a relative import"
            found.extend((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(parse(path))
    return found


def layer_of(part: str) -> int:
    levels = [level for level, parts in enumerate(LAYERS) if part in parts]
    assert levels, f"llmjax/{part} is in no layer of tests/style/test_style.py: say where it belongs"
    return levels[0]


each_module = pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(PACKAGE)))


def complaints(found) -> str:
    return "\n" + "\n".join(found)


@each_module
def test_imports_go_one_way(path):
    part, wrong = part_of(path), []
    for line, name in imports(path):
        root, _, rest = name.partition(".")
        if root in ("experiments", "launch", "tests", "benchmarks"):
            wrong.append(f"{path}:{line}: {name} is outside the library")
        if root != "llmjax" or not part:
            continue
        other = rest.split(".")[0]
        if other in ("", "__version__", part) or (part, other) in SIDEWAYS:
            continue
        same_ground = layer_of(part) == layer_of(other) == 0
        if not same_ground and layer_of(other) >= layer_of(part):
            wrong.append(f"{path}:{line}: {part} may not import {other}")
        if part == "report" and layer_of(other) > 0:
            wrong.append(f"{path}:{line}: report reads files and imports nothing but the ground floor")
        if other == "world" or (rest.startswith("tasks.world") and part != "tasks"):
            wrong.append(f"{path}:{line}: the built-in world is one task among others; only experiments name it")
    assert not wrong, complaints(wrong)


def test_no_import_cycle_between_modules():
    names = {".".join(p.relative_to(ROOT).with_suffix("").parts): p for p in modules()}
    graph = {}
    for name, path in names.items():
        targets = [target for _, target in imports(path, module_level_only=True)]
        graph[name] = {t if t in names else t.rpartition(".")[0] for t in targets} & set(names) - {name}
    done, stack = set(), []

    def walk(name):
        assert name not in stack, f"import cycle: {' -> '.join(stack[stack.index(name) :] + [name])}"
        if name in done:
            return
        stack.append(name)
        for other in sorted(graph[name]):
            walk(other)
        stack.pop()
        done.add(name)

    for name in graph:
        walk(name)


@each_module
def test_no_heavy_imports_at_module_level(path):
    never = {"tensorflow", "torch", "transformers", "wandb", "pickle", "cloudpickle"}
    names = {name for _, name in imports(path)}
    assert not {name.split(".")[0] for name in names} & never
    assert not [name for name in names if name.startswith("google.cloud")]
    if part_of(path) in WITHOUT_JAX:
        roots = {name.split(".")[0] for _, name in imports(path, module_level_only=True)}
        assert not roots & {"jax", "flax", "optax", "orbax"}


@each_module
def test_files_and_functions_are_short(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= MAX_FILE_LINES
    long = [
        f"{path}:{node.lineno}: {node.name} has {node.end_lineno - node.lineno + 1} lines"
        for node in ast.walk(parse(path))
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
        and node.end_lineno - node.lineno + 1 > MAX_FUNCTION_LINES
    ]
    assert not long, complaints(long)


def public_definitions(tree: ast.Module):
    """Public functions and classes, and the longer public methods; `validate` means the same in every config."""
    functions = (ast.FunctionDef, ast.AsyncFunctionDef)
    for node in tree.body:
        if isinstance(node, (*functions, ast.ClassDef)) and not node.name.startswith("_"):
            yield node
            for method in node.body if isinstance(node, ast.ClassDef) else ():
                long = isinstance(method, functions) and method.end_lineno - method.lineno >= 12
                if long and not method.name.startswith("_") and method.name != "validate":
                    yield method


@each_module
def test_public_names_have_docstrings(path):
    tree = parse(path)
    missing = [f"{path}:1: the module"] if tree.body and not ast.get_docstring(tree) else []
    missing += [
        f"{path}:{node.lineno}: {node.name}"
        for node in public_definitions(tree)
        if not ast.get_docstring(node)
    ]
    assert not missing, complaints(missing)


@each_module
def test_only_the_terminal_prints(path):
    if str(path.relative_to(PACKAGE)).startswith(MAY_PRINT):
        return
    prints = [
        f"{path}:{node.lineno}"
        for node in ast.walk(parse(path))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
    ]
    assert not prints, complaints(prints)


@each_module
def test_no_unfinished_business(path):
    text = path.read_text(encoding="utf-8")
    assert not any(word in text for word in ("TODO", "FIXME", "XXX", "raise NotImplementedError"))
    silent = [
        f"{path}:{node.lineno}: an exception is swallowed"
        for node in ast.walk(parse(path))
        if isinstance(node, ast.ExceptHandler) and all(isinstance(n, ast.Pass) for n in node.body)
    ]
    assert not silent, complaints(silent)


def test_every_layer_exists():
    known = set().union(*LAYERS)
    assert {part_of(path) for path in modules()} - {""} <= known
