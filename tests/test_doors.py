"""The house keeps its doors: who may import whom, what runs without torch, names and sizes of files."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ROOMS = ("data", "rewards", "rollout", "train", "evaluate")
MAY_IMPORT = {
    "data": {"data"},
    "rewards": {"data", "rewards"},
    "rollout": {"data", "rewards", "rollout"},
    "train": {"data", "rewards", "rollout", "train"},
    "evaluate": {"data", "rewards", "evaluate"},
}
# The one narrow door: what evaluation gives vLLM is made by the code that makes the trainer's prompts.
ALSO = {"evaluate": {"rollout.vllm_inputs", "rollout.vllm_access"}}
MAX_LINES = 550
WITHOUT_TORCH = ("data.records", "data.prompts", "data.dataset", "train.report", "train.flops")
WITHOUT_TORCH_ROOMS = ("rewards",)
CATCHES_EVERYTHING = {  # file: why it may
    "rewards/sandbox_child.py": "runs a program that a model wrote; whatever it raises is its verdict",
    "evaluate/all.py": "runs other programs, as a shell would: what ends one is told with its traceback and counted",
}


def project_files(*endings: str) -> list[Path]:
    """Files of the project: what git does not ignore, or all but environments and outputs outside a checkout."""
    done = subprocess.run(
        ["git", "-C", ROOT, "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        capture_output=True,
        text=True,
    )
    if done.returncode == 0 and done.stdout:
        files = [ROOT / name for name in done.stdout.split("\0") if name]
    else:
        skip = {".venv", "runs", "playground", "build", "__pycache__"}
        files = [path for path in ROOT.rglob("*") if path.is_file() and not skip & set(path.relative_to(ROOT).parts)]
    return [path for path in files if path.is_file() and (not endings or path.suffix in endings)]


def python_files(room: str) -> list[Path]:
    return [path for path in project_files(".py") if path.is_relative_to(ROOT / room)]


def imported_modules(path: Path) -> set[tuple[str, int]]:
    """(module, line) of every import from one of our rooms, wherever in the file it stands; TYPE_CHECKING blocks too.

    `from rollout import vllm_access` counts as rollout.vllm_access, `from rollout.collect import f` as rollout.collect.
    """
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            inside = node.module in ROOMS  # what is imported from the room itself is a module
            names = [f"{node.module}.{alias.name}" for alias in node.names] if inside else [node.module]
        for name in names:
            if name.split(".")[0] in (*ROOMS, "scripts", "tests"):
                found.add((name, node.lineno))
    return found


def test_the_check_itself_sees_imports(tmp_path):
    file = tmp_path / "a.py"
    text = "import data.video\ndef f():\n    from train.losses import x\nimport dataclasses, torch\nfrom rollout import engine\n"
    file.write_text(text)
    assert imported_modules(file) == {("data.video", 1), ("train.losses", 3), ("rollout.engine", 5)}


@pytest.mark.parametrize("room", ROOMS)
def test_imports_go_one_way(room):
    files = python_files(room)
    assert files, f"no files in {room}/"
    wrong = [
        f"{path.relative_to(ROOT)}:{line} imports {module}"
        for path in files
        for module, line in sorted(imported_modules(path))
        if module.split(".")[0] not in MAY_IMPORT[room] and module not in ALSO.get(room, ())
    ]
    assert not wrong, "\n".join(wrong)


def test_torch_free_rooms_import_without_torch():
    """In a process where importing torch (or what needs it) fails."""
    modules = list(WITHOUT_TORCH)
    for room in WITHOUT_TORCH_ROOMS:
        modules += [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in python_files(room)]
    modules = [module.removesuffix(".__init__") for module in modules]
    blocked = ("torch", "torchvision", "transformers", "vllm", "deepspeed")
    program = (
        "import importlib.abc, sys\n"
        "class Blocked(importlib.abc.MetaPathFinder):\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        f"        if name.split('.')[0] in {blocked!r}: raise ImportError(name + ' is blocked')\n"
        "sys.meta_path.insert(0, Blocked())\n"
        f"sys.path.insert(0, {str(ROOT)!r})\n"
        "import importlib\n"
        f"for name in {modules!r}: importlib.import_module(name)\n"
        "print('imported')\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout == "imported\n", done.stderr[-2000:]


def test_no_module_is_named_like_the_standard_library():
    wrong = []
    for room in (*ROOMS, "scripts"):
        for path in python_files(room):
            if path.parent == ROOT / room and path.stem in sys.stdlib_module_names:
                wrong.append(str(path.relative_to(ROOT)))
    assert not wrong, f"named like a module of the standard library: {wrong}"
    assert not [room for room in ROOMS if room in sys.stdlib_module_names]


def test_no_file_is_too_long():
    counts = {
        path: len(path.read_text(encoding="utf-8").splitlines())
        for room in (*ROOMS, "scripts")
        for path in python_files(room)
    }
    wrong = [f"{path.relative_to(ROOT)}: {n} lines" for path, n in sorted(counts.items()) if n > MAX_LINES]
    assert not wrong, f"over {MAX_LINES} lines: {wrong}"
    main = ROOT / "train" / "main.py"
    assert counts.get(main, 0) <= 350, "train/main.py must read top to bottom in 350 lines"


def test_no_vague_file_names():
    vague = re.compile(r"(utils?|helpers?|common|misc|stuff|tools)")
    wrong = [
        str(path.relative_to(ROOT))
        for room in ROOMS
        for path in python_files(room)
        if vague.fullmatch(path.stem.strip("_"))
    ]
    assert not wrong, wrong


def passes_on(handler: ast.ExceptHandler) -> bool:
    """Whether a handler raises again, or stores what it caught for someone else to raise."""
    inner = list(ast.walk(handler))
    stored = [node.value for node in inner if isinstance(node, ast.Assign)]
    return any(isinstance(node, ast.Raise) for node in inner) or any(
        isinstance(value, ast.Name) and value.id == handler.name for value in stored
    )


def test_nothing_catches_everything():
    """A malformed response is data and a malformed sample is an error: neither is a reason to swallow any exception."""
    wrong = []
    for path in (path for room in ROOMS for path in python_files(room)):
        if str(path.relative_to(ROOT)) in CATCHES_EVERYTHING:
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ExceptHandler):
                names = node.type.elts if isinstance(node.type, ast.Tuple) else [node.type]
                everything = any(
                    name is None or getattr(name, "id", "") in ("Exception", "BaseException") for name in names
                )
                if everything and not passes_on(node):
                    wrong.append(f"{path.relative_to(ROOT)}:{node.lineno}")
    assert not wrong, f"catch what can happen, not everything: {wrong}"


def test_files_speak_of_the_project_alone():
    """No path of a machine that the project was written on, and no secret."""
    words = "|".join(("/" + "work/", "/root" + "/", "BEGIN [A-Z ]*PRIVATE " + "KEY", "hf" + "_[A-Za-z0-9]{30,}"))
    wrong = []
    for path in project_files(".py", ".sh", ".md", ".toml", ".txt", ".yaml", ".yml", ".css", ".jinja", ".cfg"):
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            if re.search(words, line):
                wrong.append(f"{path.relative_to(ROOT)}:{number}: {line.strip()[:100]}")
    assert not wrong, "\n".join(wrong)


def test_programs_start_with_their_command():
    """A program (a file with a __main__ guard) says in its docstring how to run it."""
    wrong = []
    for path in project_files(".py"):
        text = path.read_text(encoding="utf-8")
        if path.is_relative_to(ROOT / "tests") or not re.search(
            r'^if __name__ == "__main__":\n    (?!sys\.path)', text, re.M
        ):
            continue
        told = ast.get_docstring(ast.parse(text)) or ""
        if path.name not in told:
            wrong.append(str(path.relative_to(ROOT)))
    assert not wrong, f"docstring without the command: {wrong}"
