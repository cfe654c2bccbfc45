"""The package is a house: no import goes up, and none goes round (docs/architecture.md draws it)."""

import ast
from pathlib import Path

import ovs3d_nerfstudio

ROOT = Path(ovs3d_nerfstudio.__file__).parent
NAME = ROOT.name
FLOORS = (
    ("cli",),
    ("demo",),
    ("catalogue", "doctor"),
    ("run",),
    ("run_files", "configs"),
    ("evaluation.splits", "objects.samples"),
    ("pipeline",),
    ("evaluation",),
    ("viewer",),
    ("models",),
    ("data",),
    ("losses",),
    ("features",),
    ("prompts",),
    ("engine",),
    ("encoders",),
    ("fields", "gaussians", "objects"),
    ("memory", "compiled", "pictures", "ply", "precision", "files"),
    ("errors",),
    ("",),
)
"""Top to bottom; a module stands where the longest name that begins its own does. The package itself is the ground."""


def modules() -> dict[str, ast.Module]:
    """All modules by their names below the package, a package as itself."""
    found = {}
    for path in sorted(ROOT.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(part for part in parts if part != "__init__")] = ast.parse(path.read_text(encoding="utf-8"))
    return found


def imports(tree: ast.Module, known: set[str]) -> set[str]:
    """The modules of ours that a module imports, anywhere in it and for types alone too."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute here"
            # What is imported may be a module itself, or a name of one.
            names = [
                f"{node.module}.{alias.name}"
                if f"{node.module}.{alias.name}".removeprefix(f"{NAME}.") in known
                else node.module
                for alias in node.names
            ]
        else:
            continue
        found |= {name.partition(".")[2] for name in names if name.partition(".")[0] == NAME}
    return found


def floor(module: str) -> int:
    """How far from the top."""
    rooms = [(len(room), level) for level, floor in enumerate(FLOORS) for room in floor if _in(module, room)]
    assert rooms, f"{module} stands on no floor"
    return max(rooms)[1]


def _in(module: str, room: str) -> bool:
    return module == room or (room and module.startswith(f"{room}.")) or (room == "" and module == "")


TREES = modules()
# The package itself is ground and front door: what it lends from above, it imports when that is asked for (test_python.py).
ARROWS = {name: imports(tree, set(TREES)) if name else set() for name, tree in TREES.items()}


def test_every_import_is_of_a_module_that_is_there():
    assert len(TREES) > 60 and sum(map(len, ARROWS.values())) > 200
    assert {target for targets in ARROWS.values() for target in targets} <= set(TREES)


def test_no_import_goes_up():
    rising = [
        f"{name} → {target}" for name, targets in ARROWS.items() for target in targets if floor(target) < floor(name)
    ]
    assert not rising


def test_no_import_goes_round():
    left = {name: set(targets) for name, targets in ARROWS.items()}
    while free := [name for name, targets in left.items() if not targets & set(left)]:
        for name in free:
            del left[name]
    assert not left


def test_what_a_user_can_mend_is_one_class():
    """Every error of ours derives from UserError where it is raised, and nothing lists them."""
    bases = {
        node.name: [ast.unparse(base) for base in node.bases]
        for tree in TREES.values()
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef) and node.name.endswith("Error")
    }
    assert bases.pop("UserError") == ["Exception"] and len(bases) >= 10
    assert set(map(tuple, bases.values())) == {("UserError",)}
    assert not ARROWS["errors"]


def test_benchmarks_take_from_the_house_what_is_there():
    """Most of them run only when somebody measures, and nothing else would notice."""
    lacking = []
    for file in sorted((ROOT.parent / "benchmarks").rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == NAME:
                module = (node.module or "").partition(".")[2]
                known = names_in(module)
                lacking += [f"{file.name}: {module}.{alias.name}" for alias in node.names if alias.name not in known]
    assert not lacking


def names_in(module: str) -> set[str]:
    """What can be imported from a module of ours; nothing where there is none."""
    room = module and f"{module}."
    below = {name.removeprefix(room).partition(".")[0] for name in TREES if name.startswith(room)}
    for node in ast.walk(TREES.get(module, ast.Module([], []))):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            below.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            below.add(node.id)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            below |= {alias.asname or alias.name for alias in node.names}
    return below
