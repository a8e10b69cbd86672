"""The inside of the code sandbox. Started by rewards/sandbox.py; imports nothing of the project.

python -I -S -B rewards/sandbox_child.py FOLDER < request.json      (one JSON outcome per line on stdout)
python -I -S -B rewards/sandbox_child.py --probe                    (prints the isolation this machine offers)
"""

import ctypes
import json
import os
import platform
import resource
import select
import signal
import struct
import sys
import time

LIBC = ctypes.CDLL(None, use_errno=True)
NEWNS, NEWIPC, NEWUSER, NEWNET = 0x20000, 0x8000000, 0x10000000, 0x40000000
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_REMOUNT, MS_BIND, MS_REC, MS_PRIVATE = 1, 2, 4, 32, 4096, 16384, 1 << 18
MNT_DETACH = 2
PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS = 1, 4, 22, 38

# System calls that untrusted code does not get: new processes, programs, sockets, tracing, signals to others, mounts.
X86 = {
    "fork": 57, "vfork": 58, "execve": 59, "execveat": 322, "kill": 62, "tkill": 200, "tgkill": 234, "ptrace": 101,
    "socket": 41, "socketpair": 53, "connect": 42, "bind": 49, "mount": 165, "umount2": 166, "pivot_root": 155,
    "chroot": 161, "unshare": 272, "setns": 308, "process_vm_readv": 310, "process_vm_writev": 311, "bpf": 321,
    "pidfd_open": 434, "pidfd_getfd": 438, "pidfd_send_signal": 424, "io_uring_setup": 425, "keyctl": 250,
    "perf_event_open": 298, "userfaultfd": 323, "open_tree": 428, "move_mount": 429, "fsopen": 430, "prlimit64": 302,
}  # fmt: skip
ARM = {
    "execve": 221, "execveat": 281, "kill": 129, "tkill": 130, "tgkill": 131, "ptrace": 117, "socket": 198,
    "socketpair": 199, "connect": 203, "bind": 200, "mount": 40, "umount2": 39, "pivot_root": 41, "chroot": 51,
    "unshare": 97, "setns": 268, "process_vm_readv": 270, "process_vm_writev": 271, "bpf": 280, "pidfd_open": 434,
    "pidfd_getfd": 438, "pidfd_send_signal": 424, "io_uring_setup": 425, "keyctl": 219, "perf_event_open": 241,
    "userfaultfd": 282, "open_tree": 428, "move_mount": 429, "fsopen": 430, "prlimit64": 261,
}  # fmt: skip
ARCHITECTURES = {"x86_64": (0xC000003E, X86, 56), "aarch64": (0xC00000B7, ARM, 220)}
CLONE3, CLONE_THREAD = 435, 0x10000


def check(result, what):
    if result != 0:
        code = ctypes.get_errno()
        raise OSError(code, f"{what}: {os.strerror(code)}")


def mount(source, target, kind, flags, data=None):
    encode = lambda text: text.encode() if text else None  # noqa: E731
    check(
        LIBC.mount(encode(source), encode(target), encode(kind), ctypes.c_ulong(flags), encode(data)), f"mount {target}"
    )


def enter_namespaces(folder):
    """New user, mount, network and IPC namespaces; the root becomes an empty folder with read-only libraries.

    Raises OSError where the kernel or the container does not allow it.
    """
    uid, gid = os.getuid(), os.getgid()
    check(LIBC.unshare(NEWUSER | NEWNS | NEWNET | NEWIPC), "unshare")
    for name, text in (("setgroups", "deny"), ("uid_map", f"0 {uid} 1"), ("gid_map", f"0 {gid} 1")):
        with open(f"/proc/self/{name}", "w") as file:
            file.write(text)
    mount(None, "/", None, MS_REC | MS_PRIVATE)
    mount("tmpfs", folder, "tmpfs", MS_NOSUID | MS_NODEV, "size=16m,mode=755")
    for path in library_folders():
        inside = folder + path
        os.makedirs(inside, exist_ok=True)
        mount(path, inside, None, MS_BIND)
        flags = os.statvfs(path).f_flag & (MS_NOSUID | MS_NODEV | 8 | 1024 | 2048 | 4096 * 0)
        mount(None, inside, None, MS_REMOUNT | MS_BIND | MS_RDONLY | flags)
    os.makedirs(folder + "/box")
    os.makedirs(folder + "/.old")
    check(LIBC.pivot_root(folder.encode(), (folder + "/.old").encode()), "pivot_root")
    os.chdir("/box")
    check(LIBC.umount2(b"/.old", MNT_DETACH), "umount")
    os.rmdir("/.old")


def library_folders():
    """The standard library and the shared libraries it links; site-packages stay outside."""
    version = f"python{sys.version_info[0]}.{sys.version_info[1]}"
    folders = {os.path.realpath(os.path.dirname(os.__file__))}
    folders |= {f"{sys.base_prefix}/lib/{version}", "/lib/x86_64-linux-gnu", "/lib/aarch64-linux-gnu", "/lib64"}
    folders |= {"/usr/lib/x86_64-linux-gnu", "/usr/lib/aarch64-linux-gnu"}
    return sorted(path for path in folders if os.path.isdir(path))


def filter_system_calls():
    """A seccomp program: the calls of the table give EPERM, clone gives EPERM unless it makes a thread."""
    found = ARCHITECTURES.get(platform.machine())
    if found is None:
        raise OSError(38, f"no system-call table for {platform.machine()}")
    audit, table, clone = found
    load, equal, ret = 0x20, 0x15, 0x06
    allow, deny, missing = 0x7FFF0000, 0x00050000 | 1, 0x00050000 | 38
    program = [(load, 0, 0, 4), (equal, 1, 0, audit), (ret, 0, 0, deny), (load, 0, 0, 0)]
    for number in sorted(table.values()):
        program += [(equal, 0, 1, number), (ret, 0, 0, deny)]
    program += [(equal, 0, 1, CLONE3), (ret, 0, 0, missing)]
    program += [(equal, 0, 3, clone), (load, 0, 0, 16), (0x45, 1, 0, CLONE_THREAD), (ret, 0, 0, deny)]
    program += [(ret, 0, 0, allow)]
    code = b"".join(struct.pack("HBBI", *step) for step in program)
    buffer = ctypes.create_string_buffer(code, len(code))
    header = struct.pack("HxxxxxxP", len(program), ctypes.addressof(buffer))
    check(LIBC.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "no_new_privs")
    check(LIBC.prctl(PR_SET_SECCOMP, 2, ctypes.create_string_buffer(header, len(header)), 0, 0), "seccomp")


def drop_capabilities():
    """Inside the user namespace the process would be root: give up every capability, for good."""
    for capability in range(64):
        LIBC.prctl(24, capability, 0, 0, 0)  # PR_CAPBSET_DROP; unknown numbers fail, which is fine
    header = ctypes.create_string_buffer(struct.pack("Ii", 0x20080522, 0))
    empty = ctypes.create_string_buffer(24)
    LIBC.capset(header, empty)


def hook_files(folder):
    """Fallback without namespaces: no file is opened outside the library and the folder, nothing is deleted."""
    allowed = (os.path.realpath(folder), os.path.realpath(os.path.dirname(os.__file__)))
    real, isinstance_, str_, bytes_ = os.path.realpath, isinstance, str, bytes

    def refuse(event, args):
        if event == "open" and isinstance_(args[0], (str_, bytes_)):
            path = args[0].decode() if isinstance_(args[0], bytes_) else args[0]
            if not real(path).startswith(allowed):
                raise PermissionError(path)
        elif event in ("os.listdir", "os.scandir", "os.remove", "os.rename", "ctypes.dlopen", "os.symlink", "os.link"):
            raise PermissionError(event)

    sys.addaudithook(refuse)


def limits(request):
    for name, value in (
        ("RLIMIT_CPU", request["cpu_s"]),
        ("RLIMIT_AS", request["memory"]),
        ("RLIMIT_FSIZE", request["output"]),
        ("RLIMIT_CORE", 0),
        ("RLIMIT_NOFILE", 64),
    ):
        resource.setrlimit(getattr(resource, name), (value, value))


def run_test(request, program, test, pipe):
    """In the forked child: run the code, write one JSON outcome to `pipe`. Never returns."""
    # Bound before untrusted code can replace them in their modules.
    dumps, write, leave = json.JSONEncoder(allow_nan=True).encode, os.write, os._exit
    kinds, plain = (list, tuple), (str, int, float, bool, type(None))

    def native(value, depth=0):
        """Only None, bool, int, float, str, list, dict: contents as the base types hold them."""
        if depth > 64:
            raise TypeError("too deep")
        if type(value) in plain:
            return value
        if isinstance(value, kinds):
            base = list if isinstance(value, list) else tuple
            return [native(item, depth + 1) for item in base.__iter__(value)]
        if isinstance(value, dict):
            return {str(key): native(item, depth + 1) for key, item in dict.items(value)}
        for base in (bool, int, float, str):
            if isinstance(value, base):
                return base.__new__(base, value)
        raise TypeError(f"{type(value).__name__} does not survive")

    def report(outcome):
        line = dumps(outcome).encode() + b"\n"
        while line:
            line = line[write(pipe, line) :]

    scope = {"__name__": "__main__", "__builtins__": __builtins__}
    if "stdin" in test:
        exec(program, scope)
        sys.stdout.flush()
        report({"status": "ok"})
        leave(0)
    exec(program, scope)
    function = scope.get(request["entry"])
    if not callable(function):
        report({"status": "error"})
        leave(1)
    value = native(function(*test["args"]))
    report({"status": "ok", "value": value})
    leave(0)


def child(request, program, test, pipe, output, source):
    os.dup2(source, 0)
    os.dup2(output, 1)
    os.dup2(
        output if "stdin" in test else os.open("/dev/null", os.O_WRONLY) if os.path.exists("/dev/null") else output, 2
    )
    os.dup2(pipe, 3)
    os.closerange(4, 256)
    LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    LIBC.prctl(PR_SET_DUMPABLE, 0)
    sys.stdin = open(0, encoding="utf-8", errors="replace", closefd=False)  # noqa: SIM115
    sys.stdout = open(1, "w", encoding="utf-8", errors="replace", closefd=False)  # noqa: SIM115
    sys.stderr = open(os.devnull, "w") if os.path.exists(os.devnull) else sys.stdout  # noqa: SIM115
    sys.argv = ["program"]
    limits(request)
    if request["level"] == "namespaces":
        drop_capabilities()
    filter_system_calls()
    if request["level"] != "namespaces":
        hook_files(request["folder"])
    code = 1
    try:
        run_test(request, program, test, 3)
    except SystemExit as end:
        sys.stdout.flush()
        code = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
        # A program (stdin) may end by sys.exit(0); a function's file that exits never gave its result.
        if "stdin" in test and code == 0:
            os.write(3, b'{"status": "ok"}\n')
    except BaseException:
        code = 1
    os._exit(code & 255)


def parent(request, program, test):
    """Fork one test, collect its outcome, kill it at the wall-clock limit."""
    read_end, write_end = os.pipe()
    out_read, out_write = os.pipe()
    in_read, in_write = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(in_write)
        child(request, program, test, write_end, out_write, in_read)
    for end in (write_end, out_write, in_read):
        os.close(end)
    data = {read_end: b"", out_read: b""}
    given = test.get("stdin", "").encode()
    os.set_blocking(in_write, False)
    end = time.monotonic() + request["wall_s"]
    open_ends, late, writing = {read_end, out_read}, False, True
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)
    while open_ends:
        left = end - time.monotonic()
        if left <= 0:
            late = True
            break
        readable, writable, _ = select.select(list(open_ends), [in_write] if writing else [], [], min(left, 0.5))
        if writable:
            try:
                given = given[os.write(in_write, given[:65536]) :] if given else given
            except BrokenPipeError:
                given = b""
            if not given:
                os.close(in_write)
                writing = False
        for pipe in readable:
            part = os.read(pipe, 65536)
            if not part:
                open_ends.discard(pipe)
            data[pipe] += part
            if len(data[pipe]) > request["output"]:
                late = None
                open_ends.clear()
                break
    os.kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    for pipe in (read_end, out_read, *([in_write] if writing else [])):
        os.close(pipe)
    if late:
        return {"status": "timeout"}
    ended = os.WIFEXITED(status) and os.WEXITSTATUS(status) == 0
    killed = os.WIFSIGNALED(status) and os.WTERMSIG(status) in (signal.SIGXCPU, signal.SIGKILL)
    if late is None:
        return {"status": "error"}
    try:
        lines = data[read_end].split(b"\n")
        outcome = json.loads(lines[0]) if len(lines) == 2 and not lines[1] else None
    except (ValueError, RecursionError):
        outcome = None
    if not isinstance(outcome, dict) or outcome.get("status") != "ok":
        return {"status": "timeout" if killed and not data[read_end] else "error"}
    if "stdin" in test:
        return {"status": "ok" if ended or killed else "error", "stdout": data[out_read].decode("utf-8", "replace")}
    return {"status": "ok", "value": outcome.get("value")}


def main():
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    if sys.argv[1] == "--probe":
        import tempfile

        folder = tempfile.mkdtemp(prefix="sandbox_probe_")
        try:
            enter_namespaces(folder)
            print("namespaces", file=answers)
        except OSError as error:
            print(str(error), file=sys.stderr)
            os.rmdir(folder)
            print("filter", file=answers)
        return
    LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    request = json.loads(sys.stdin.buffer.read())
    request["folder"] = sys.argv[1]
    if request["level"] == "namespaces":
        enter_namespaces(sys.argv[1])
    try:
        limits({**request, "cpu_s": 20, "memory": 2 << 30})
        program = compile(request["code"], "<answer>", "exec", dont_inherit=True)
    except (SyntaxError, ValueError, MemoryError, RecursionError, OverflowError):
        print(json.dumps({"status": "compile"}), file=answers, flush=True)
        return
    for test in request["tests"]:
        outcome = parent(request, program, test)
        print(json.dumps(outcome), file=answers, flush=True)
        if request["stop"] and outcome["status"] != "ok":
            break


if __name__ == "__main__":
    main()
