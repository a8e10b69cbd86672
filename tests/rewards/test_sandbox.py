"""Untrusted code: what it can reach, what it can spend, and that wanted values never enter."""

from __future__ import annotations

import json

import pytest

from rewards import sandbox
from rewards.program import passes
from rewards.sandbox import same, same_output

SORTS = [{"args": [[3, 1, 2]], "want": [1, 2, 3]}, {"args": [[]], "want": []}]
SQUARES = [{"stdin": "3\n", "stdout": "9\n"}, {"stdin": "-4\n", "stdout": "16"}]


def outcome(code: str, argument=0):
    return sandbox.run(code, [{"args": [argument]}], "f")[0]


def test_right_programs_pass():
    assert passes("def solve(x):\n    return sorted(x)", SORTS, "solve") == (1.0, "ok")
    assert passes("import heapq\nsolve = lambda x: heapq.nsmallest(len(x), x)", SORTS, "solve") == (1.0, "ok")
    assert passes("import sys\nprint(int(sys.stdin.read()) ** 2, '  ')\nsys.exit(0)", SQUARES, None) == (1.0, "ok")


@pytest.mark.parametrize(
    ("code", "status"),
    [
        ("def solve(x):\n    return x", "ok"),
        ("def solve(x)\n    return x", "malformed"),
        ("x = " + "(" * 50_000, "malformed"),
        ("import os\nos._exit(0)", "ok"),
        ("def other(x):\n    return sorted(x)", "ok"),
        ("def solve(x):\n    print(sorted(x))", "ok"),
    ],
)
def test_wrong_programs_fail(code, status):
    assert passes(code, SORTS, "solve") == (0.0, status)


def test_all_tests_must_pass_and_exit_status_counts():
    assert passes("print(9)", SQUARES, None)[0] == 0
    assert passes("n = int(input())\nprint(n * n)\nraise SystemExit(1)", SQUARES, None)[0] == 0


def test_only_plain_values_come_back():
    assert outcome("def f(x):\n    return {'a': (1, 2.5, None, True), 3: 'é'}").value == {
        "a": [1, 2.5, None, True],
        "3": "é",
    }
    tricks = "class L(list):\n    def __eq__(self, o):\n        return True\n    def __iter__(self):\n        return iter([9])\n"
    assert outcome(tricks + "def f(x):\n    return L([1])").value == [1]
    assert outcome("def f(x):\n    return object()").status == "error"
    assert outcome("import json\njson.dumps = lambda *a: '[7]'\ndef f(x):\n    return [1]").value == [1]


def test_no_network_no_files_no_processes():
    assert outcome("def f(x):\n    return open('/etc/hostname').read()").status == "error"
    assert outcome("import socket\ndef f(x):\n    return str(socket.socket())").status == "error"
    assert outcome("import os\ndef f(x):\n    return os.fork()").status == "error"
    assert outcome("import os\ndef f(x):\n    os.execv('/bin/true', ['true'])").status == "error"
    assert outcome("import os\ndef f(x):\n    return dict(os.environ)").value in ({}, {"LC_CTYPE": "C.UTF-8"})
    if sandbox.isolation() == "namespaces":
        seen = outcome("import os\ndef f(x):\n    return os.listdir('.') + os.listdir('/proc')")
        assert seen.status == "error"  # no /proc
        assert outcome("import os\ndef f(x):\n    return os.listdir('.')").value == []
        assert outcome("def f(x):\n    open('a', 'w').write('1')\n    return open('a').read()").value == "1"
        assert outcome("import os\ndef f(x):\n    open(os.__file__, 'a').write(' ')").status == "error"


def test_a_fresh_process_per_test():
    code = "import builtins\ncount = getattr(builtins, 'count', 0) + 1\nbuiltins.count = count\ndef f(x):\n    return count"
    assert [item.value for item in sandbox.run(code, [{"args": [0]}, {"args": [0]}], "f")] == [1, 1]


def test_memory_and_output_are_limited():
    assert outcome("def f(x):\n    return len('x' * (600 << 20))").status == "error"
    assert sandbox.run("print('x' * (2 << 20))", [{"stdin": ""}], None)[0].status == "error"


@pytest.mark.slow
def test_time_is_limited():
    assert outcome("def f(x):\n    while True:\n        pass").status == "timeout"
    assert outcome("import time\ndef f(x):\n    time.sleep(60)").status == "timeout"
    endless = "import threading\ndef f(x):\n    while True:\n        threading.Thread(target=f, args=(x,)).start()"
    assert outcome(endless).status in ("timeout", "error")


def test_wanted_values_stay_outside():
    with pytest.raises(ValueError, match="only args and stdin"):
        sandbox.run("x = 1", [{"args": [1], "want": 2}], "f")
    reads_everything = (
        "import gc, sys\ndef f(x):\n    seen = [repr(o)[:2000] for o in gc.get_objects() if isinstance(o, (dict, list))]\n"
        "    return [s for s in seen if 'needle' in s and 'seen' not in s]"
    )
    tests = [{"args": [1], "want": "a needle in the gold"}]
    assert passes(reads_everything.replace("needle", "n" + "eedle"), tests, "f")[0] == 0


def test_comparison():
    assert same([1, 2.0000001], [1.0, 2])
    assert not same([1], [True])
    assert not same({"a": 1}, {"a": 1, "b": 2})
    assert not same(float("nan"), float("nan"))
    assert same_output("a  \nb\n\n", "a\nb") and not same_output("a b", "a  b")
    assert json.loads(json.dumps(outcome("def f(x):\n    return x", {"k": [1]}).value)) == {"k": [1]}
