"""What the package may do with bytes that come from elsewhere: nothing in them can run code, and their lengths are limited."""

import ast

from tests.sources import Module, package_modules

MODULES = package_modules()
NAMES = {module.name for module in MODULES}
RUNS_CODE = {"pickle", "cPickle", "cloudpickle", "dill", "marshal", "shelve", "joblib", "yaml"}
CALLS_THAT_RUN_CODE = {"eval", "exec", "torch.load", "np.load", "numpy.load", "pickle.loads", "pickle.load"}
MAY_UNPACK = {"tiered_kv.unpacking"}
"""Where msgpack is opened: with limits."""


def test_nothing_that_comes_from_outside_can_run_code():
    """Frames, files, sockets and object stores hold plain data: no module of the package can open a pickle."""
    wrong = [
        said(module, each.line, f"imports {each.module}")
        for module in MODULES
        for each in module.imports(NAMES)
        if each.module.split(".")[0] in RUNS_CODE
    ]
    for module in MODULES:
        for node in ast.walk(module.tree):
            called = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
            if called in CALLS_THAT_RUN_CODE:
                wrong.append(said(module, node.lineno, f"calls {called}"))
    assert not wrong, "\n".join(wrong)


def test_msgpack_is_opened_within_limits_only():
    wrong = [
        said(module, node.lineno, f"calls {ast.unparse(node.func)}")
        for module in MODULES
        if module.name not in MAY_UNPACK
        for node in ast.walk(module.tree)
        if isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in ("unpackb", "Unpacker", "unpack_from_msgpack")
    ]
    assert not wrong, "\n".join(wrong)


def said(module: Module, line: int, what: str) -> str:
    return f"{module.place}:{line} {what}"
