"""The import rules of docs/architecture.md (the map of packages) and the habits of STYLE that a program can see."""

import ast
import os
import statistics
import subprocess
import sys
from collections import Counter, defaultdict

import pytest

from tests.sources import FUNCTIONS, LINKED, ROOT, Import, Module, package_modules, project_files

MODULES = package_modules()
NAMES = {module.name for module in MODULES}
BY_NAME = {module.name: module for module in MODULES}
IMPORTS = {module.name: module.imports(NAMES) for module in MODULES}
FOLDERS = sorted({module.folder for module in MODULES if module.folder})
PROJECT_PYTHON = [path for path in project_files() if path.suffix == ".py" and path.is_file()]

# The root's modules, lowest first: each may import only what stands in a line before its own. `embedded` is a shell over client and node.
ROOT_LEVELS = [
    ["errors", "clock", "forking", "unpacking"],
    ["layout", "picture", "threads", "identity"],
    ["file_sums"],
    ["checkpoint_files"],
    ["keys"],
    ["blocks"],
    ["config"],
]
SHELLS = {"embedded": ["client", "node", "coordinator", "protocol", "config", "layout", "keys", "errors", "clock"]}
# Modules of the root under which others know the engine's parts: each may import what stands here, and nobody but doors imports one.
DOORS = {
    "quantization": ["codecs", "errors"],
    "compression": ["codecs", "quantization", "errors"],
    "strategies": ["policy", "errors"],
    "memory_manager": ["library", "errors"],
    "monitoring": ["library"],
    "persistence": ["library", "checkpoint"],
}
DOOR_LINES_MAX = 120

WORDS = ["errors", "clock", "forking", "unpacking", "threads", "layout", "identity"]
WORDS += ["file_sums", "checkpoint_files", "keys", "blocks", "config"]
"""The vocabulary: values that everyone speaks in, and that know nothing themselves."""
ENGINE = ["codecs", "memory", "policy", "store", "tiers", "protocol", "client", "node", "coordinator", "embedded"]
# What a folder may import of the project, beside itself: a folder or module with all below it.
MAY_IMPORT = {
    "codecs": ["layout", "keys", "errors", "unpacking"],
    "policy": ["keys", "errors", "blocks"],
    "memory": ["layout", "keys", "blocks", "errors", "forking", "unpacking"],
    "tiers": ["memory", "codecs", "blocks", "errors", "forking", "keys", "threads"],
    "store": ["policy", "tiers.base", "blocks", "keys", "clock", "errors", "threads"],
    "protocol": ["memory", "tiers.host", *WORDS],
    "client": ["protocol", "tiers.host", "tiers.disk.segments", "memory", "codecs", *WORDS],
    "coordinator": ["protocol", "policy", *WORDS],
    "node": ["protocol", "store", "tiers", "codecs", "policy", "memory", *WORDS],
    "checkpoint": ["node", "protocol", "tiers", "codecs", "memory", *WORDS],
    "integrations": ["client", "protocol", "codecs.rotation", *WORDS],
    "integrations.vllm": ["client", "cluster.attach", *WORDS],
    "library": ["embedded", "client", "node", "protocol", "checkpoint", "integrations", "codecs", "tiers.objects", *WORDS],
    "metrics": ["node", "coordinator", "protocol", "memory.client_page", "memory.histogram", *WORDS],
    "actors": ["metrics", "node", "coordinator", "protocol", *WORDS],
    "cluster": ["actors", "client", "node", "metrics.ports", "protocol", "checkpoint", "embedded", *WORDS],
    "tools.simulate": ["policy", "store", "keys", "blocks", "errors", "picture"],
    "tools.calibrate": ["integrations", "codecs", "layout", "identity", "keys", "errors"],
    "tools.demo": [*WORDS, *ENGINE, "integrations", "actors", "cluster"],
    "tools.bench": [
        *(*WORDS, *ENGINE, "checkpoint", "picture", "integrations", "actors", "cluster"),
        *("tools.calibrate", "tools.demo.model", "tools.demo.workload"),
    ],
    "tools": [],
}
ROOMS = {"tools.demo", "tools.bench", "tools.simulate", "tools.calibrate"}
MAY_OPEN_ROOMS = {f"tiered_kv.cluster.commands.{name}" for name in ("bench", "cli", "codecs", "explain", "simulate")}
MODULES_IN_A_FOLDER_MAX = 20

# What a folder may import of others' libraries, beside the standard library without these modules.
NOT_FOR_THE_PURE = {"time", "random", "threading", "asyncio", "socket", "os"}
LIBRARIES = {
    "": {"numpy", "xxhash", "torch", "matplotlib", "msgpack"},
    "codecs": {"numpy", "torch", "xxhash", "msgpack", "lz4", "zstandard", "triton"},  # triton: see test_kernels_are_optional
    "policy": {"numpy"},
    "memory": {"numpy", "torch", "msgpack", "psutil"},
    "tiers": {"numpy", "torch", "msgpack", "xxhash", "obstore", "botocore"},  # botocore: for the profiles of AWS, where it is installed
    "store": set(),
    "protocol": {"numpy", "msgpack", "psutil"},
    "client": {"numpy", "torch"},
    "coordinator": set(),
    "node": {"numpy", "torch", "msgpack"},
    "checkpoint": {"numpy", "msgpack", "torch"},
    "integrations": {"numpy", "torch", "transformers"},
    "integrations.vllm": {"torch", "vllm", "huggingface_hub", "prometheus_client"},
    "metrics": {"prometheus_client"},
    "library": {"numpy", "psutil", "torch", "transformers", "tensorboard", "wandb"},
    "actors": {"numpy", "ray"},
    "cluster": {"psutil", "ray", "rich"},
    "tools": set(),
    "tools.calibrate": {"numpy", "torch", "transformers"},
    "tools.demo": {"numpy", "torch", "ray", "rich", "transformers"},
    "tools.bench": {"numpy", "torch", "ray", "rich", "obstore"},
    "tools.simulate": {"numpy", "rich", "zstandard"},
}
ONLY_LATER = {
    "": {"torch", "matplotlib"},
    "cluster": {"torch", "ray"},
    "memory": {"psutil"},
    "protocol": {"psutil"},
    "tiers": {"obstore", "botocore"},
    "checkpoint": {"torch"},
    "tools.bench": {"obstore"},
    "library": {"transformers", "tensorboard", "wandb"},
}  # these may be imported inside of functions at most

# Where anything that fails is caught: the edge of a thread, of a request, of other people's code.
BOUNDARIES = {
    "tiered_kv/protocol/unix_socket.py SessionServer._answer",
    "tiered_kv/protocol/peer_listener.py PeerListener._serve_guarded",
    "tiered_kv/metrics/http_server.py MetricsServer._serve_guarded",
    "tiered_kv/node/node.py Node._run_beats",
    "tiered_kv/coordinator/keeper.py Keeper.run",
    "tiered_kv/node/reporter.py Reporter._report_guarded",
    "tiered_kv/node/seals.py Seals._run",
    "tiered_kv/store/engine.py Engine._guarded",
    "tiered_kv/threads.py _Job.run",
    "tiered_kv/codecs/kernels.py works_on",
    "tiered_kv/integrations/support.py _probe",
    "tiered_kv/integrations/transformers.py CachedModel._fetch",
    "tiered_kv/integrations/transformers.py CachedModel._store",
    "tiered_kv/integrations/transformers.py CachedModel.keep",
    "tiered_kv/integrations/transformers.py CachedModel.ready",
    "tiered_kv/integrations/vllm/connector.py TieredKV.register_kv_caches",
    "tiered_kv/integrations/vllm/connector.py guarded.decorate.safe",
    "tiered_kv/integrations/vllm/asker.py Asker._run",
    "tiered_kv/integrations/vllm/worker.py Worker._loaded",
    "tiered_kv/tools/demo/model.py _attempt",
}

FILE_LINES_MAX = 500
FUNCTION_LINES_MAX = 60
FUNCTION_LINES_MEDIAN = 8
FUNCTION_LINES_P90 = 20
LINE_CHARACTERS_MAX = 140


def below(module: str, allowed: str) -> bool:
    """Whether a module's import name is `tiered_kv.<allowed>` or within it."""
    return module == f"tiered_kv.{allowed}" or module.startswith(f"tiered_kv.{allowed}.")


def said(module: Module, line: int, what: str) -> str:
    return f"{module.place}:{line} {what}"


def own_imports(module: Module) -> list[Import]:
    return [each for each in IMPORTS[module.name] if each.module.split(".")[0] == "tiered_kv"]


def library_imports(module: Module) -> list[Import]:
    known = sys.stdlib_module_names | {"tiered_kv"}
    return [each for each in IMPORTS[module.name] if each.module.split(".")[0] not in known]


def test_every_folder_has_its_rules():
    assert set(FOLDERS) <= set(MAY_IMPORT) & set(LIBRARIES)


def test_root_modules_import_downwards_only():
    level = {f"tiered_kv.{name}": number for number, names in enumerate(ROOT_LEVELS) for name in names}
    doors = {f"tiered_kv.{name}" for name in DOORS}
    above = {"tiered_kv", *doors, *(f"tiered_kv.{name}" for name in SHELLS)}
    roots = [module for module in MODULES if not module.folder and module.name not in above]
    assert {module.name for module in roots} == set(level), "a root module without a level"
    wrong = [
        said(module, each.line, f"imports {each.module}")
        for module in roots
        for each in own_imports(module)
        if level.get(each.module, 99) >= level[module.name]
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("shell", SHELLS)
def test_a_shell_imports_what_it_puts_together(shell):
    module = BY_NAME[f"tiered_kv.{shell}"]
    wrong = [each.module for each in own_imports(module) if not any(below(each.module, name) for name in SHELLS[shell])]
    assert not wrong, wrong


@pytest.mark.parametrize(("folder", "never"), [("client", "node"), ("node", "client"), ("coordinator", "node"), ("node", "coordinator")])
def test_a_process_never_imports_another_one(folder, never):
    """Not even for typing: what they say to each other is in `protocol`."""
    wrong = [
        said(module, each.line, f"imports {each.module}")
        for module in MODULES
        if module.folder == folder
        for each in own_imports(module)
        if below(each.module, never)
    ]
    assert not wrong, "\n".join(wrong)


def test_folders_have_few_modules():
    counts = Counter(module.path.parent for module in MODULES if module.path.name != "__init__.py")
    full = [f"{folder.relative_to(ROOT)}: {count} modules" for folder, count in counts.items() if count > MODULES_IN_A_FOLDER_MAX]
    assert not full, "\n".join(full)


def test_a_class_name_means_one_thing():
    """Names that differ only in a leading underscore count as the same."""
    places: dict[str, list[str]] = defaultdict(list)
    for module in MODULES:
        for name, node in module.definitions():
            if isinstance(node, ast.ClassDef):
                places[name.split(".")[-1].lstrip("_")].append(f"{module.place}:{node.lineno}")
    twice = [f"{name}: {', '.join(where)}" for name, where in sorted(places.items()) if len(where) > 1]
    assert not twice, "\n".join(twice)


@pytest.mark.parametrize("door", DOORS)
def test_a_door_is_thin_and_opens_to_its_rooms_only(door):
    module = BY_NAME[f"tiered_kv.{door}"]
    wrong = [each.module for each in own_imports(module) if not any(below(each.module, name) for name in DOORS[door])]
    assert not wrong, wrong
    assert len(module.path.read_text().splitlines()) <= DOOR_LINES_MAX


def test_the_engine_does_not_go_through_doors():
    inside = [module for module in MODULES if module.name != "tiered_kv" and module.name.removeprefix("tiered_kv.") not in DOORS]
    wrong = [
        said(module, each.line, f"imports {each.module}")
        for module in inside
        for each in own_imports(module)
        if any(below(each.module, door) for door in DOORS)
    ]
    assert not wrong, "\n".join(wrong)


def test_the_package_itself_imports_folders_only_later():
    early = [each for each in own_imports(BY_NAME["tiered_kv"]) if not (each.later or each.typing)]
    assert {each.module for each in early} <= {f"tiered_kv.{name}" for names in ROOT_LEVELS for name in names}


@pytest.mark.parametrize("folder", FOLDERS)
def test_a_folder_imports_what_its_rule_allows(folder):
    allowed = [folder, *MAY_IMPORT[folder]]
    wrong = [
        said(module, each.line, f"imports {each.module}")
        for module in MODULES
        if module.folder == folder
        for each in own_imports(module)
        if each.module != "tiered_kv"
        and not any(below(each.module, name) for name in allowed)
        and not (module.name in MAY_OPEN_ROOMS and each.later and any(below(each.module, room) for room in ROOMS))
    ]
    assert not wrong, "\n".join(wrong)


def test_only_rooms_use_the_whole_package_as_others_do():
    wrong = [
        said(module, each.line, "imports tiered_kv as a whole")
        for module in MODULES
        if module.folder not in ROOMS
        for each in own_imports(module)
        if each.module == "tiered_kv"
    ]
    assert not wrong, "\n".join(wrong)


def test_the_machine_knows_no_tiers():
    for name in ("tiered_kv.store.machine", "tiered_kv.store.events"):
        assert not [each for each in own_imports(BY_NAME[name]) if below(each.module, "tiers")]


@pytest.mark.parametrize("folder", ["", *FOLDERS])
def test_a_folder_uses_the_libraries_of_its_rule(folder):
    late_only = ONLY_LATER.get(folder, set())
    wrong = []
    for module in (module for module in MODULES if module.folder == folder):
        for each in library_imports(module):
            name = each.module.split(".")[0]
            if name not in LIBRARIES[folder] and not each.typing:
                wrong.append(said(module, each.line, f"imports {name}"))
            elif name in late_only and not (each.later or each.typing):
                wrong.append(said(module, each.line, f"imports {name} at import"))
    assert not wrong, "\n".join(wrong)


def test_kernels_are_optional():
    """One module needs triton, and who needs that module brings it when it is needed."""
    users = {name for name, found in IMPORTS.items() if any(each.module.split(".")[0] == "triton" for each in found)}
    assert users == {"tiered_kv.codecs.kernels"}
    early = [name for name, found in IMPORTS.items() for each in found if each.module in users and not each.later]
    assert not early, early


def test_decisions_are_pure():
    pure = [
        module for module in MODULES if module.folder == "policy" or module.name in ("tiered_kv.store.machine", "tiered_kv.store.events")
    ]
    wrong = [
        said(module, each.line, f"imports {each.module}")
        for module in pure
        for each in IMPORTS[module.name]
        if each.module.split(".")[0] in NOT_FOR_THE_PURE
    ]
    assert not wrong, "\n".join(wrong)


def test_imports_by_name_are_the_packages_own_only():
    """`import_module` would hide an import from these tests."""
    users = [module.name for module in MODULES if "import_module" in module.path.read_text() or "__import__" in module.path.read_text()]
    assert users == ["tiered_kv"]


def components(edges: dict[str, set[str]]) -> list[set[str]]:
    """Strongly connected components of more than one module, or of one that imports itself (Tarjan, 1972)."""
    order: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[set[str]] = []

    def visit(name: str) -> None:
        order[name] = low[name] = len(order)
        stack.append(name)
        for other in edges[name]:
            if other not in order:
                visit(other)
                low[name] = min(low[name], low[other])
            elif other in stack:
                low[name] = min(low[name], order[other])
        if low[name] == order[name]:
            at = stack.index(name)
            members = set(stack[at:])
            del stack[at:]
            if len(members) > 1 or name in edges[name]:
                found.append(members)

    for name in edges:
        if name not in order:
            visit(name)
    return found


def test_cycles_are_found():
    assert components({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": {"d"}, "e": set()}) == [{"b", "c"}, {"d"}]


def test_modules_import_without_cycles():
    edges = {name: {each.module for each in found if not (each.later or each.typing)} & NAMES for name, found in IMPORTS.items()}
    assert components(edges) == []


def test_files_are_short():
    long = [
        f"{path.relative_to(ROOT)}: {count} lines"
        for path in PROJECT_PYTHON
        if (count := len(path.read_text().splitlines())) > FILE_LINES_MAX
    ]
    assert not long, "\n".join(long)


def test_lines_are_short():
    long = [
        f"{path.relative_to(ROOT)}:{number} {len(line)} characters"
        for path in PROJECT_PYTHON
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if len(line) > LINE_CHARACTERS_MAX
    ]
    assert not long, "\n".join(long)


def lines_of(function: ast.AST) -> int:
    return function.end_lineno - function.lineno + 1


def test_functions_are_short(record_property):
    trees = [(path.relative_to(ROOT), ast.parse(path.read_text())) for path in PROJECT_PYTHON]
    functions = [(place, node) for place, tree in trees for node in ast.walk(tree) if isinstance(node, FUNCTIONS)]
    long = [
        f"{place}:{node.lineno} {node.name}: {lines_of(node)} lines" for place, node in functions if lines_of(node) > FUNCTION_LINES_MAX
    ]
    assert not long, "\n".join(long)
    sizes = [lines_of(node) for module in MODULES for _, node in module.definitions() if isinstance(node, FUNCTIONS)]
    record_property("function_lines_median", statistics.median(sizes))
    assert statistics.median(sizes) <= FUNCTION_LINES_MEDIAN
    assert statistics.quantiles(sizes, n=10)[-1] <= FUNCTION_LINES_P90


def test_no_file_is_a_drawer():
    assert not [path for path in PROJECT_PYTHON if path.stem in ("utils", "util", "helpers", "misc", "common")]


def catches_all(handler: ast.ExceptHandler) -> bool:
    """Whether it swallows whatever comes; what cleans up and ends in a plain `raise` does not (ruff's BLE001 says the same)."""
    if isinstance(handler.body[-1], ast.Raise) and handler.body[-1].exc is None:
        return False
    caught = handler.type.elts if isinstance(handler.type, ast.Tuple) else [handler.type]
    return any(each is None or ast.unparse(each).split(".")[-1] in ("Exception", "BaseException") for each in caught)


def suppresses_all(node: ast.AST) -> bool:
    return (
        isinstance(node, ast.Call)
        and ast.unparse(node.func).endswith("suppress")
        and any(ast.unparse(each) in ("Exception", "BaseException") for each in node.args)
    )


def own_nodes(node: ast.AST):
    """The nodes of a function without those of functions and classes inside it."""
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, (*FUNCTIONS, ast.ClassDef)):
            yield child
            yield from own_nodes(child)


def test_everything_is_caught_at_named_boundaries_only():
    found = {}
    for module in MODULES:
        for name, definition in [("<module>", module.tree), *module.definitions()]:
            for node in own_nodes(definition):
                if (isinstance(node, ast.ExceptHandler) and catches_all(node)) or suppresses_all(node):
                    found[f"{module.place} {name}"] = node
    unnamed = [f"{where} (line {node.lineno})" for where, node in found.items() if where not in BOUNDARIES]
    assert not unnamed, "\n".join(unnamed)
    assert set(found) == BOUNDARIES, "a boundary is named here that is none any more"
    silent = [f"{where}: neither logs nor raises" for where, node in found.items() if not speaks(node)]
    assert not silent, "\n".join(silent)


def speaks(handler: ast.AST) -> bool:
    """Whether a handler raises, calls something that logs, or passes the error on to whoever asks for the outcome."""
    calls = [ast.unparse(node.func) for node in ast.walk(handler) if isinstance(node, ast.Call)]
    raises = any(isinstance(node, ast.Raise) for node in ast.walk(handler))
    return raises or any("log" in call or call.endswith("set_exception") for call in calls)


def test_what_is_public_says_what_it_is():
    silent = [
        said(module, node.lineno, f"{name} has no docstring")
        for module in MODULES
        for name, node in module.definitions()
        if not any(part.startswith("_") for part in name.split("."))
        and (isinstance(node, ast.ClassDef) or "." not in name)
        and not ast.get_docstring(node)
    ]
    silent += [said(module, 1, "has no docstring") for module in MODULES if not ast.get_docstring(module.tree)]
    assert not silent, "\n".join(silent)


@pytest.mark.parametrize("folder", FOLDERS)
def test_a_folder_says_what_it_owns_imports_and_never_knows(folder):
    text = (ast.get_docstring(BY_NAME[f"tiered_kv.{folder}"].tree) or "").lower()
    missing = [word for word in ("import", "never") if word not in text]
    assert not missing, f"{folder}/__init__.py does not say: {missing}"
    assert ":" in text or "own" in text


def test_nothing_is_left_for_later():
    marks = ["TO" + "DO", "FIX" + "ME", "XX" + "X"]
    found = [
        f"{path.relative_to(ROOT)}:{number} {line.strip()}"
        for path in PROJECT_PYTHON
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if any(mark in line for mark in marks)
    ]
    assert not found, "\n".join(found)


def run_python(code: str, *arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False, cwd="/")


@pytest.mark.parametrize("modules", ["tiered_kv", "tiered_kv.config", "tiered_kv.cluster.commands.cli", "cluster"])
def test_importing_brings_neither_torch_nor_ray(modules):
    if modules == "cluster":
        modules = ", ".join(name for name in sorted(NAMES) if below(name, "cluster"))
    done = run_python(f"import sys, {modules}; print(sorted({{'torch', 'ray', 'transformers'}} & set(sys.modules)))")
    assert (done.stdout, done.stderr) == ("[]\n", "")


@pytest.mark.parametrize("folder", LINKED)
def test_a_linked_folder_has_one_name_only(folder):
    done = run_python(f"import sys; sys.path.insert(0, sys.argv[1]); import {folder}", str(ROOT))
    assert "ImportError" in done.stderr
    assert f"tiered_kv.{folder}" in done.stderr


@pytest.mark.parametrize("folder", LINKED)
def test_links_are_relative_and_committed(folder):
    assert os.readlink(ROOT / "tiered_kv" / folder) == f"../{folder}"
    listing = subprocess.run(["git", "ls-files", "-s", f"tiered_kv/{folder}"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listing.returncode == 0:  # a copy without its history has only the link itself
        assert listing.stdout.startswith("120000 "), "the link is not committed as a link"
