"""Processes that start in no time: forks of one process that has imported the libraries, which takes seconds of each core.

`fork_server` is for functions, `run_notebook` for notebooks, and `forked_commands` for everything that starts `python`.
As a script, this file runs pytest in several processes that are forks, too, and whose tests use the same server.
"""

import atexit
import ctypes
import faulthandler
import fcntl
import json
import multiprocessing
import os
import runpy
import select
import shlex
import shutil
import signal
import socket
import sys
import tempfile
import threading
from contextlib import suppress
from functools import cache
from multiprocessing import forkserver, resource_tracker
from pathlib import Path
from types import ModuleType
from typing import NoReturn
from unittest import mock

from sandbox import ROOT, TIME_LIMIT, environment, last_lines

MAX_FILES = 64  # That a command may inherit
SPARE = 500  # Numbers of files from here on are free
STARTERS = ("accelerate", "torchrun")  # Commands that start Python
SHARED = "LANGMLM_FORKS"  # Variable that names the server of another process, in JSON
READ_AT_IMPORT = {"HF_HUB_OFFLINE": "1", "HF_ENDPOINT": None, "OMP_NUM_THREADS": "1"}  # With the values of the forks
CLIENT = """#!{python} -IS
import json, os, signal, socket, sys

PYTHON, ADDRESS, FIXED = {python!r}, {address!r}, {fixed!r}
words = sys.argv[1:]
while words and words[0] in ("-u", "-B"):
    words.pop(0)
is_known = words and (words[0] in ("-c", "-m") or words[0][0] != "-")
is_known = is_known and not (words[0] == "-c" and "sys.modules" in words[1])  # It asks what an import imports
if not is_known or any(os.environ.get(name) != value for name, value in FIXED.items()):
    os.execv(PYTHON, [PYTHON, *sys.argv[1:]])
files = []
for name in os.listdir("/dev/fd"):
    try:
        files += [int(name)] * os.get_inheritable(int(name))
    except OSError:  # It was that of the folder
        pass
facts = {{"words": words, "folder": os.getcwd(), "variables": dict(os.environ), "files": files, "process": os.getpid()}}
with socket.socket(socket.AF_UNIX) as server:
    server.connect(ADDRESS)
    replies = server.makefile("rb")
    process = int(replies.readline())
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT):
        signal.signal(number, lambda number, frame: os.kill(process, number))
    socket.send_fds(server, [b"x"], files)  # The fork waits for these two before it runs anything
    server.sendall(json.dumps(facts).encode() + b"\\n")
    status = int(replies.readline())
if status < 0:
    if -status != signal.SIGKILL:
        signal.signal(-status, signal.SIG_DFL)
    os.kill(os.getpid(), -status)
os._exit(status)
"""


@cache
def fork_server() -> multiprocessing.context.ForkServerContext:
    """The context of processes that are forks of one process, which has imported the libraries and does nothing else.

    `fork_server().Process(target=..., args=...)` starts in no time; a new process needs seven seconds for its imports.
    """
    context = multiprocessing.get_context("forkserver")
    if given := shared_server():
        server = forkserver._forkserver
        server._forkserver_address, server._forkserver_alive_fd = given["address"], os.open(os.devnull, os.O_WRONLY)
        server.ensure_running = resource_tracker.ensure_running
        return context
    context.set_forkserver_preload(["tools.preload"])
    with mock.patch.dict(os.environ, environment(ROOT), clear=True):  # The server has the environment of its start
        forkserver.ensure_running()
    return context


def shared_server() -> dict | None:
    "What another process has started for the same copy of the project, if this process is one of its workers."
    given = json.loads(os.environ.get(SHARED, "{}"))
    return given if given.get("project") == str(ROOT) else None


def facts_to_share() -> dict:
    "Start the server and the commands, unless they are shared, and return what other processes need to know of them."
    if given := shared_server():
        return given
    python = forked_python()
    return {"project": str(ROOT), "address": forkserver._forkserver._forkserver_address, "python": python}


def run_pytest(workers: int, *words: str) -> int:
    "Run pytest in several processes that are forks and share the server, and return its exit status."
    import pytest

    outputs = [(number, os.dup(number)) for number in (1, 2)]
    with open(os.devnull, "wb") as nothing:  # The server, its forks, and what warns of the files of those that are killed
        for number, _ in outputs:
            os.dup2(nothing.fileno(), number)
    try:
        facts = facts_to_share()
    finally:
        for number, output in outputs:
            os.dup2(output, number)
            os.close(output)
    os.environ[SHARED] = json.dumps(facts)
    options = ["--tx", f"{workers}*popen//python={shlex.quote(facts['python'])}"]
    options += ["-W", "ignore:Module already imported:pytest.PytestAssertRewriteWarning"]
    return pytest.main([*words, *options])


def forked_python() -> str:
    "The `python` among the commands below."
    return str(forked_commands() / "python")


@cache
def forked_commands() -> Path:
    """A folder with a `python` that runs scripts, modules and `-c` in a fork, as Python would.

    It runs them in the folder, the network and the environment of its caller, with its files, passes signals on, and ends
    as they end. Other options, and variables that libraries read when they are imported, lead to the real Python. Beside
    it are the commands of the environment; those that start Python start this one.
    """
    if given := shared_server():
        return Path(given["python"]).parent
    folder = Path(tempfile.mkdtemp(prefix="forks-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    python = folder / "python"
    for command in Path(sys.executable).parent.iterdir():
        if command.name in STARTERS:
            first, rest = command.read_text(encoding="utf-8").split("\n", 1)
            (folder / command.name).write_text(f"#!{python}\n{rest}", encoding="utf-8")
            (folder / command.name).chmod(0o755)
        elif not command.name.startswith("python"):
            (folder / command.name).symlink_to(command)
    address = str(folder / "socket")
    python.write_text(CLIENT.format(python=sys.executable, address=address, fixed=READ_AT_IMPORT), encoding="utf-8")
    python.chmod(0o755)
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(address)
    listener.listen(64)
    server = fork_server().Process(target=serve, args=(listener, str(python)))
    server.start()
    atexit.register(server.kill)
    return folder


def serve(listener: socket.socket, python: str) -> NoReturn:
    "Fork this process for each client that connects, tell it the status at the end, and kill the fork if the client is gone."
    wakes, wake = socket.socketpair()
    wake.setblocking(False)
    signal.set_wakeup_fd(wake.fileno(), warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    events, clients = select.poll(), {}
    for source in (listener, wakes, multiprocessing.parent_process().sentinel):
        events.register(source, select.POLLIN)
    while True:
        ready = [number for number, _ in events.poll()]
        if listener.fileno() in ready:
            client, _ = listener.accept()
            if (process := os.fork()) == 0:
                signal.set_wakeup_fd(-1)
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                for inherited in (listener, wakes, wake, *clients.values()):
                    inherited.close()
                become_python(client, python)
            clients[process] = client
            events.register(client, 0)  # Only for the end of the connection
        for process, client in clients.items():
            if client.fileno() in ready:
                events.unregister(client)
                os.kill(process, signal.SIGKILL)
        if wakes.fileno() in ready:
            wakes.recv(1024)
        while clients and (ended := os.waitpid(-1, os.WNOHANG))[0]:
            end_client(clients.pop(ended[0]), os.waitstatus_to_exitcode(ended[1]), events)
        if multiprocessing.parent_process().sentinel in ready:
            for process in clients:
                os.kill(process, signal.SIGKILL)
            os._exit(0)


def end_client(client: socket.socket, status: int, events: select.poll) -> None:
    "Tell a client, if it is still there, how its fork has ended."
    try:
        events.unregister(client)
        client.sendall(b"%d\n" % status)
    except (KeyError, OSError):
        pass
    client.close()


def become_python(client: socket.socket, python: str) -> NoReturn:
    "Run what a client asks for as Python does, and end this process."
    client.sendall(b"%d\n" % os.getpid())
    _, received, _, _ = socket.recv_fds(client, 1, MAX_FILES)
    with client.makefile("rb") as stream:
        facts = json.loads(stream.readline())
    client.close()
    enter_namespaces(facts["process"])
    move_files(received, facts["files"])
    os.chdir(facts["folder"])
    os.environ.clear()
    os.environ.update(facts["variables"])
    faulthandler.enable()  # Its report goes to the file with the number 2
    sys.stdin = open(0, closefd=False)
    sys.stdout.reconfigure(write_through="PYTHONUNBUFFERED" in os.environ, line_buffering=os.isatty(1))
    for number, handler in ((signal.SIGINT, signal.default_int_handler), (signal.SIGTERM, signal.SIG_DFL)):
        signal.signal(number, handler)
    use_executable(python)
    sys.path[:0] = [name for name in os.environ.get("PYTHONPATH", "").split(os.pathsep) if name]
    os._exit(run(*facts["words"]))


def use_executable(python: str | Path) -> None:
    "Start new Python processes of this one with another command."
    sys.executable = str(python)
    multiprocessing.set_executable(str(python))


def enter_namespaces(process: int) -> None:
    "Enter the network and the host name of a process."
    for name in ("net", "uts"):
        theirs = f"/proc/{process}/ns/{name}"
        if os.path.exists(theirs) and os.readlink(theirs) != os.readlink(f"/proc/self/ns/{name}"):
            with open(theirs) as stream:
                if ctypes.CDLL(None, use_errno=True).setns(stream.fileno(), 0):
                    raise OSError(ctypes.get_errno(), "cannot enter a namespace")


def move_files(received: list[int], numbers: list[int]) -> None:
    "Give open files the numbers that they have in another process."
    spare = [fcntl.fcntl(file, fcntl.F_DUPFD_CLOEXEC, SPARE) for file in received]
    for file in received:
        os.close(file)
    for file, number in zip(spare, numbers, strict=True):
        os.dup2(file, number)
        os.close(file)


def run(first: str, *rest: str) -> int:
    "Run a script, a module or a program with its arguments, and return the exit status; die of an interrupt."
    main = sys.modules["__main__"] = ModuleType("__main__")
    status = 0
    try:
        if first == "-m":
            sys.argv, sys.path[:0] = ["-m", *rest[1:]], [os.getcwd()]
            if not hasattr(sys.modules.get(rest[0]), "__path__"):
                sys.modules.pop(rest[0], None)  # It has been imported, and not as the main module
            runpy._run_module_as_main(rest[0])  # What `python -m` calls
        elif first == "-c":
            sys.argv, sys.path[:0] = ["-c", *rest[1:]], [""]
            exec(compile(rest[0], "<string>", "exec"), vars(main))
        else:
            sys.argv, sys.path[:0] = [first, *rest], [os.path.dirname(os.path.realpath(first))]
            main.__file__ = os.path.abspath(first)
            exec(compile(Path(first).read_bytes(), main.__file__, "exec"), vars(main))
    except SystemExit as stopped:
        status = stopped.code if isinstance(stopped.code, int) else int(stopped.code is not None)
        if status and not isinstance(stopped.code, int):
            print(stopped.code, file=sys.stderr)
    except BaseException as error:
        sys.excepthook(type(error), error, error.__traceback__)
        status = -signal.SIGINT if isinstance(error, KeyboardInterrupt) else 1
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    with suppress(OSError):  # Python ignores it, too
        sys.stderr.flush()
    if status == -signal.SIGINT:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        signal.raise_signal(signal.SIGINT)
    return status & 0xFF


def run_cells(path: Path, log: Path, flags: set[str], commands: Path) -> None:
    "Run the cells of a notebook as `nbdev_test` does; the exit status says whether all of them ran."
    os.setpgid(0, 0)
    stream = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(stream, 1)
    os.dup2(stream, 2)
    faulthandler.enable()
    use_executable(commands / "python")
    os.environ["PATH"] = f"{commands}{os.pathsep}{os.environ.get('PATH', os.defpath)}"
    from nbdev.test import test_nb

    passed, _ = test_nb(path, skip_flags=sorted(flags))
    sys.exit(0 if passed else 1)


def run_notebook(path: Path, flags: set[str]) -> None:
    "Run a notebook in a process of its own; raise AssertionError if it fails or hangs."
    __tracebackhide__ = True
    log = path.with_suffix(".log")
    process = fork_server().Process(target=run_cells, args=(path, log, flags, forked_commands()))
    process.start()
    process.join(TIME_LIMIT)
    status = process.exitcode
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)  # The notebook if it hangs, and what it left running
    process.kill()
    process.join()
    output = last_lines(log.read_text(encoding="utf-8", errors="replace")) if log.exists() else ""
    log.unlink(missing_ok=True)
    assert status is not None, f"no end after {TIME_LIMIT} s\n{output}"
    assert status == 0, f"exit status {status}\n{output}"


if __name__ == "__main__":
    import forks  # Processes find its functions by this name

    sys.exit(forks.run_pytest(int(sys.argv[1]), *sys.argv[2:]))
