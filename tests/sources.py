"""The project's own source files as the tests of its shape see them: modules, syntax trees, imports."""

import ast
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LINKED = ("actors", "cluster")
HALLS = ("tools", "integrations")
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


@dataclass(frozen=True)
class Import:
    """One imported module; `later`: inside a function; `typing`: for type checkers only."""

    module: str
    line: int
    later: bool
    typing: bool


@dataclass(frozen=True)
class Module:
    """One source file of the package under its import name.

    `folder`: its first name below `tiered_kv`, its first two in a folder of HALLS that has folders itself (`tools.bench`), "" for the
    root.
    """

    name: str
    path: Path

    @property
    def folder(self) -> str:
        parts = self.name.split(".")[1:]
        folders = parts if self.path.name == "__init__.py" else parts[:-1]
        return ".".join(folders[: 2 if folders[:1] and folders[0] in HALLS else 1])

    @cached_property
    def tree(self) -> ast.Module:
        return ast.parse(self.path.read_text(), str(self.path))

    @property
    def place(self) -> str:
        """The path as one finds it in the repository."""
        return str(self.path.relative_to(ROOT))

    def imports(self, known: set[str]) -> list[Import]:
        """Everything this file imports; `from a import b` is `a.b` where that is one of the `known` modules."""
        found: list[Import] = []
        _collect(self.tree, known, False, False, found)
        return found

    def definitions(self) -> Iterator[tuple[str, ast.AST]]:
        """Every class and function with its qualified name."""
        yield from _definitions(self.tree, "")


def _collect(node: ast.AST, known: set[str], later: bool, typing: bool, found: list[Import]) -> None:
    if isinstance(node, ast.Import):
        found += [Import(alias.name, node.lineno, later, typing) for alias in node.names]
    elif isinstance(node, ast.ImportFrom):
        assert not node.level, f"line {node.lineno}: a relative import"
        for alias in node.names:
            whole = f"{node.module}.{alias.name}"
            found.append(Import(whole if whole in known else node.module, node.lineno, later, typing))
    elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
        for child in node.body:
            _collect(child, known, later, True, found)
        for child in node.orelse:
            _collect(child, known, later, typing, found)
    else:
        for child in ast.iter_child_nodes(node):
            _collect(child, known, later or isinstance(node, (*FUNCTIONS, ast.Lambda)), typing, found)


def _definitions(node: ast.AST, prefix: str) -> Iterator[tuple[str, ast.AST]]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (*FUNCTIONS, ast.ClassDef)):
            yield prefix + child.name, child
            yield from _definitions(child, f"{prefix}{child.name}.")
        else:
            yield from _definitions(child, prefix)


def package_modules() -> list[Module]:
    """All modules of `tiered_kv`, those of the linked folders under their import names."""
    modules = []
    for top, name in [(ROOT / "tiered_kv", "tiered_kv"), *((ROOT / folder, f"tiered_kv.{folder}") for folder in LINKED)]:
        for path in sorted(top.rglob("*.py")):
            below = path.relative_to(top)
            if below.parts[0] in LINKED and top.name == "tiered_kv":
                continue  # some versions of Python follow the links
            parts = [name, *below.with_suffix("").parts]
            modules.append(Module(".".join(parts).removesuffix(".__init__"), path))
    return modules


def project_files() -> list[Path]:
    """Files of the repository, committed or about to be, links as links; without git, all outside of hidden and built folders."""
    listing = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if listing.returncode == 0:
        paths = [ROOT / name for name in listing.stdout.split("\0") if name]
        return sorted({path for path in paths if path.is_symlink() or path.is_file()})
    links = [ROOT / "tiered_kv" / folder for folder in LINKED]
    built = ("__pycache__", "build", "dist")
    files = [path for path in ROOT.rglob("*") if path.is_file() and not any(link in path.parents for link in links)]
    own = [
        path
        for path in files
        if not any(part[0] == "." or part in built or part.endswith(".egg-info") for part in path.relative_to(ROOT).parts[:-1])
    ]
    return sorted([*own, *links])
