"""A script runs under `fleet run --workers 1` as it runs under `python`: the same output, exit code and files.

Each script looks at many things at once, since a process costs more than a look.
"""

from __future__ import annotations

import py_compile
import re
import shutil
import subprocess
import sys
import zipapp
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import pytest
from commands import FLEET, environment, fleet


class Seen(NamedTuple):
    """What one run came to."""

    code: int
    stdout: list[str]
    stderr: list[str]
    files: dict[str, bytes]


def seen(command: Sequence[str | bytes], folder: Path, changes: dict[str, str], stdin: bytes = b"") -> Seen:
    before = {path for path in folder.rglob("*") if path.is_file()}
    env = {**environment(), "PYTHONDONTWRITEBYTECODE": "1", **changes}
    done = subprocess.run(command, cwd=folder, env=env, input=stdin, capture_output=True, timeout=60, check=False)
    made = sorted({path for path in folder.rglob("*") if path.is_file()} - before)
    files = {str(path.relative_to(folder)): path.read_bytes() for path in made}
    for path in made:
        path.unlink()
    lines = [
        [re.sub(rb"^0\| ", b"", line).decode(errors="replace") for line in data.splitlines()]
        for data in (done.stdout, done.stderr)
    ]
    own = (
        [line for line in lines[1] if not line.startswith(("fleet: ", "    "))]
        if command[: len(FLEET)] == FLEET
        else []
    )
    return Seen(done.returncode, lines[0], own, files)


def compare(folder: Path, words: Sequence[str | bytes], stdin: bytes = b"", **changes: str) -> Seen:
    """Runs both, and returns what both came to. A signal that kills is 128 and its number, as a shell has it."""
    python = seen([sys.executable, *words], folder, changes, stdin)
    if python.code < 0:
        python = python._replace(code=128 - python.code)
    fleet = seen([*FLEET, "run", "--workers", "1", *words], folder, changes, stdin)
    told = "\n".join(fleet.stderr)
    assert (fleet.code, fleet.stdout) == (python.code, python.stdout), told
    assert fleet.files == python.files, told
    return fleet


def script(folder: Path, source: str, name: str = "script.py") -> str:
    (folder / name).write_text(source)
    return name


OPEN_FILES = """
import csv, gzip, io, logging, os, sys, tempfile, weakref, zipfile, builtins, atexit, threading, ctypes
plain = open("plain.txt", "w"); plain.write("plain")
binary = open("binary.bin", "wb", buffering=1 << 16); binary.write(b"binary")
table = csv.writer(open("table.csv", "w", newline="")); table.writerow([1, 2])
packed = gzip.GzipFile("packed.gz", "wb", mtime=0); packed.write(b"packed" * 100)
text = io.TextIOWrapper(gzip.GzipFile("text.gz", "wb", mtime=0)); text.write("text" * 100)
both = open("both.txt", "w+"); both.write("both")
class Holder: pass
holder = Holder(); holder.self = holder; holder.file = open("cycle.txt", "w"); holder.file.write("cycle")
def closure():
    file = open("closure.txt", "w")
    return lambda text: file.write(text)
closure()("not kept")
kept = closure(); kept("kept")
builtins.anchored = open("builtins.txt", "w"); builtins.anchored.write("builtins")
os.anchored = open("module.txt", "w"); os.anchored.write("module")
logging.getLogger("x").addHandler(logging.FileHandler("log.txt")); logging.getLogger("x").warning("logged")
class Dies:
    def __init__(self, name): self.name = name
    def __del__(self, os=os): os.close(os.open(self.name, os.O_CREAT))
dies = Dies("del.txt"); holder.dies = Dies("del-cycle.txt")
weakref.finalize(holder, lambda: open("finalize.txt", "w").write("finalized"))
archive = zipfile.ZipFile("archive.zip", "w"); archive.writestr(zipfile.ZipInfo("a"), "archived")
libc = ctypes.CDLL(None); libc.fopen.restype = ctypes.c_void_p
libc.fputs(b"from C", ctypes.c_void_p(libc.fopen(b"c.txt", b"w"))); libc.puts(b"C's stdout")
def worker():
    import time; time.sleep(0.05)
    open("thread.txt", "w").write("thread")
threading.Thread(target=worker).start()
threading.Thread(target=threading.Event().wait, daemon=True).start()
atexit.register(lambda: open("atexit.txt", "w").write(str((plain.closed, __name__, "__file__" in globals()))))
print("last")
"""


LATE = """
torch.anchored = open("t.txt", "w"); torch.anchored.write("anchored")
class Late:
    def __del__(self, torch=torch): torch.save(torch.ones(2), "late.pt")
late = Late()
"""


def test_all_that_was_written_arrives(tmp_path: Path) -> None:
    found = compare(tmp_path, [script(tmp_path, OPEN_FILES)], PYTHONUNBUFFERED="")
    assert found.files["plain.txt"] == b"plain"
    assert len(found.files) == 18
    assert sorted(found.stdout) == ["C's stdout", "last"]


def test_with_torch_loaded_before_the_fork(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    source = "import numpy, torch, fleet\n" + OPEN_FILES + LATE
    found = compare(tmp_path, [script(tmp_path, source)], PYTHONUNBUFFERED="")
    assert found.files["t.txt"] == b"anchored"


@pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler")
def test_a_c_library_is_told_of_the_end(tmp_path: Path) -> None:
    (tmp_path / "end.c").write_text(
        '#include <stdio.h>\n#include <stdlib.h>\nstatic void at_exit(void) { fclose(fopen("at-exit.txt", "w")); }\n'
        "__attribute__((constructor)) static void start(void) { atexit(at_exit); }\n"
        '__attribute__((destructor)) static void end(void) { fclose(fopen("destructor.txt", "w")); }\n'
    )
    subprocess.run(["cc", "-shared", "-fPIC", "-o", "end.so", "end.c"], cwd=tmp_path, check=True, timeout=60)
    found = compare(tmp_path, [script(tmp_path, "import ctypes, fleet\nctypes.CDLL('./end.so')\n")])
    assert sorted(found.files) == ["at-exit.txt", "destructor.txt"]


@pytest.mark.parametrize(
    ("source", "code"),
    [
        ("import sys; sys.exit('a text')", 1),
        ("raise SystemExit(-1)", 255),
        ("raise SystemExit(256 + 7)", 7),
        ("raise SystemExit(None)", 0),
        ("import atexit\natexit.register(lambda: 1 / 0)\natexit.register(print, 'first')", 0),
        (
            "import threading as t\nt.excepthook = lambda args: print(args.exc_type)\nt.Thread(target=lambda: 1 / 0).start()",
            0,
        ),
        ("raise KeyboardInterrupt", 130),
        ("import os, signal; os.kill(os.getpid(), signal.SIGINT); import time; time.sleep(9)", 130),
        ("import os, signal; os.kill(os.getpid(), signal.SIGTERM)", 143),
        ("import os, signal; os.kill(os.getpid(), signal.SIGQUIT)", 131),
        ("import os; print('lost', end=''); os._exit(5)", 5),
        ("import os; os.abort()", 134),
        ("import os, sys; os.close(1); print('to nobody', end='')", 120),
        (
            "import sys\nsys.excepthook = lambda kind, error, tb: print('hook', kind, tb.tb_frame.f_lineno, tb.tb_next)\n1 / 0",
            1,
        ),
        ("import sys\ndef f(): 1 / 0\nf()", 1),
        ("import signal, os\nsignal.signal(signal.SIGTERM, lambda *_: print('handled'))\nos.kill(os.getpid(), 15)", 0),
        ("import os\nif os.fork() == 0:\n    print('child')\nelse:\n    os.wait(); print('parent')", 0),
    ],
)
def test_exit_codes(tmp_path: Path, source: str, code: int) -> None:
    assert compare(tmp_path, [script(tmp_path, source)], PYTHONUNBUFFERED="").code == code


WHO = """
import atexit, gc, io, locale, logging, multiprocessing as mp, os, random, resource, signal, sys, threading, warnings
def look(when):
    main = sys.modules["__main__"]
    print(when, sorted(name for name in vars(main) if name.startswith("__")))
    print(__name__, main.__dict__ is globals(), __file__ if when == "now" else "", __spec__ and __spec__.name, __package__)
    print(__builtins__, type(__loader__).__name__, __doc__, threading.current_thread() is threading.main_thread())
look("now")
print(mp.current_process().name, mp.parent_process(), mp.get_start_method(allow_none=True), mp.active_children())
print(sys.argv, sys.path, sys.flags, sys.warnoptions, sys._xoptions, sys.orig_argv[-len(sys.argv):])
print(warnings.filters if "numpy" not in sys.modules else "", sys.getrecursionlimit(), sys.getswitchinterval())
print(logging.root.handlers, logging.root.level, logging.Logger.manager.loggerDict.keys() - {"concurrent.futures"})
for stream in (sys.stdin, sys.stdout, sys.stderr):
    print(stream.name, stream.mode, stream.encoding, stream.errors, stream.newlines, stream.fileno(), stream.isatty())
print(os.getcwd(), os.umask(0o22), os.nice(0), [resource.getrlimit(n) for n in range(10)], locale.getlocale())
print([signal.getsignal(n) for n in (1, 2, 3, 10, 12, 13, 15, 17)], signal.pthread_sigmask(0, ()))
print(sorted(int(name) for name in os.listdir("/proc/self/fd"))[:3], gc.isenabled(), gc.get_threshold())
print(sys.stdin.read())
if "own" in sys.argv: import queue, secrets, fleet; print(queue.OWN, secrets.OWN, fleet.OWN)
atexit.register(look, "then")
"""


def test_what_a_script_sees(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    script(tmp_path / "real", WHO)
    (tmp_path / "link.py").symlink_to("real/script.py")
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "__init__.py").write_text("import sys\nprint('package', sys.argv)\n")
    script(tmp_path / "package", WHO, "module.py")
    for name in ("queue", "secrets", "fleet"):
        (tmp_path / "real" / f"{name}.py").write_text("OWN = True\n")
    compare(tmp_path, ["./link.py", "word", "own", b"caf\xe9"], b"given\n", PYTHONWARNINGS="always::UserWarning")
    compare(tmp_path, ["-m", "package.module", "a"], PYTHONUTF8="1")
    compare(tmp_path, ["real/script.py"], PYTHONIOENCODING="latin-1:replace", PYTHONSAFEPATH="1")


def test_a_folder_and_a_zip_file_with_a_main_module(tmp_path: Path) -> None:
    source = "import sys, other\nprint(sys.argv, sys.path[0], __file__, __spec__.name, __name__)\n"
    (tmp_path / "folder").mkdir()
    script(tmp_path / "folder", source, "__main__.py")
    script(tmp_path / "folder", "", "other.py")
    zipapp.create_archive(tmp_path / "folder", tmp_path / "packed.pyz", "/usr/bin/env python3")
    compare(tmp_path, ["folder", "a"])
    compare(tmp_path, ["packed.pyz", "a"])


def test_processes_of_a_script_find_its_main_module(tmp_path: Path) -> None:
    source = (
        "import multiprocessing as mp, os, sys\nprint('imported', __name__, os.path.basename(sys.argv[0]))\n"
        "def double(x): return 2 * x\n"
        "if __name__ == '__main__':\n"
        "    for method in ('fork', 'spawn', 'forkserver'):\n"
        "        with mp.get_context(method).Pool(1) as pool: print(method, pool.map(double, [1, 2]))\n"
        "    process = mp.get_context('fork').Process(target=print, args=('joined',)); process.start()\n"
    )
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "__init__.py").write_text("")
    script(tmp_path / "package", source, "main.py")
    found = compare(tmp_path, [script(tmp_path, source)])
    assert "forkserver [2, 4]" in found.stdout
    assert found.stdout[-1] == "joined"
    compare(tmp_path, ["-m", "package.main"])


def test_what_importing_does(tmp_path: Path) -> None:
    """Preloading is not to be seen: variables set before an import, imports that fail, what they and site hooks print."""
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "pandas.py").write_text("print('half')\nraise OSError('no library')\n")
    (tmp_path / "broken" / "scipy.py").write_text("import os; print('bye'); os._exit(3)\n")
    (tmp_path / "broken" / "sklearn.py").write_text("import warnings\nprint('loud'); warnings.warn('careful')\n")
    (tmp_path / "broken" / "sitecustomize.py").write_text("import sys; print('hook', file=sys.stderr)\n")
    optional = "try: import pandas\nexcept OSError as error: print('without', error)\nimport numpy\nprint('going on')\n"
    compare(tmp_path, [script(tmp_path, optional)], PYTHONPATH="broken")
    compare(tmp_path, [script(tmp_path, "print('before')\nimport scipy\n")], PYTHONPATH="broken")
    found = compare(tmp_path, [script(tmp_path, "import sklearn\nprint('done')\n")], PYTHONPATH="broken")
    assert any("careful" in line for line in found.stderr)
    assert found.stderr.count("hook") == 2  # of the command's own interpreter, and of the rank's


def test_seeds_differ_between_ranks(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    source = (
        "import numpy, random, torch, uuid, tempfile, multiprocessing\n"
        "print(random.random()); print(numpy.random.rand()); print(uuid.uuid4()); print(uuid.uuid1())\n"
        "print(next(tempfile._get_candidate_names())); print(bytes(multiprocessing.current_process().authkey))\n"
    )
    command = [*FLEET, "run", "--workers", "3", script(tmp_path, source)]
    done = subprocess.run(
        command, cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=60, check=True
    )
    values = [line.partition("| ")[2] for line in done.stdout.splitlines()]
    assert len(set(values)) == len(values) == 18


def test_ignored_signals_stay_ignored(tmp_path: Path) -> None:
    """As by nohup, and in the background of a shell script."""
    source = (
        "import os, signal\nprint([signal.getsignal(n) for n in (1, 2, 3)])\n"
        "[os.kill(os.getpid(), n) for n in (1, 2, 3)]\nprint('alive')\n"
    )
    name = script(tmp_path, source)
    for words in ([sys.executable], [*FLEET, "run", "--workers", "1"]):
        shell = f"trap '' HUP INT QUIT; {' '.join(words)} {name} & for n in HUP INT QUIT; do kill -$n $!; done; wait $!"
        done = subprocess.run(
            ["sh", "-c", shell],
            cwd=tmp_path,
            env=environment(),
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert (done.returncode, done.stdout.splitlines()[-1][-5:]) == (0, "alive"), done.stderr
        assert done.stdout.count("SIG_IGN") == 3


def test_compiled_scripts(tmp_path: Path) -> None:
    source = tmp_path / "source.py"
    source.write_text("import sys; print(sys.argv, __file__, __spec__, type(__loader__).__name__)\n")
    py_compile.compile(str(source), str(tmp_path / "made.pyc"))
    assert compare(tmp_path, ["made.pyc", "x"]).code == 0
    (tmp_path / "no_text.py").write_bytes(b"a\0b")
    done = subprocess.run(
        [*FLEET, "run", "no_text.py"], cwd=tmp_path, env=environment(), capture_output=True, check=False
    )
    assert (done.returncode, done.stderr.split(b":")[1:2]) == (2, [b" no_text.py"])
    assert b"None" not in done.stderr


def test_shared_memory_that_a_script_leaves_is_removed_and_said(tmp_path: Path) -> None:
    """The resource tracker of multiprocessing does both once the script has ended, and is given the time."""
    script = tmp_path / "leave.py"
    script.write_text(
        "from multiprocessing import shared_memory\n"
        "memory = shared_memory.SharedMemory(create=True, size=1000)\n"
        "print(memory.name)\n"
    )
    done = fleet("run", "--workers", "1", str(script))
    assert done.returncode == 0, done.stderr
    assert "1 leaked shared_memory object" in done.stderr
    name = done.stdout.split("| ")[1].strip()
    assert not Path("/dev/shm", name).exists()
