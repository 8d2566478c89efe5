"""fleet in a real kernel: the example notebook, then cells that fail, are interrupted, lose a rank, and leave nothing behind."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import warnings
from pathlib import Path
from typing import Any

import psutil
import pytest
from folded import lines_by_rank

nbformat = pytest.importorskip("nbformat", reason="nbclient, ipykernel and nbformat are not installed")
pytest.importorskip("ipykernel", reason="nbclient, ipykernel and nbformat are not installed")
nbclient = pytest.importorskip("nbclient", reason="nbclient, ipykernel and nbformat are not installed")

EXAMPLE = Path(__file__).parent.parent.parent / "examples" / "notebook.ipynb"


class Notebook:
    """A notebook whose cells are run one after the other in one kernel."""

    def __init__(self, cells: list[Any]) -> None:
        self.client = nbclient.NotebookClient(nbformat.v4.new_notebook(cells=cells), timeout=100, allow_errors=True)

    async def cell(self, source: str) -> Any:
        cell = nbformat.v4.new_code_cell(source)
        self.client.nb.cells.append(cell)
        return await self.client.async_execute_cell(cell, len(self.client.nb.cells) - 1)


def printed(cell: Any, name: str = "stdout") -> str:
    return "".join(output.text for output in cell.outputs if output.output_type == "stream" and output.name == name)


def value(cell: Any) -> str:
    return next((output.data["text/plain"] for output in cell.outputs if output.output_type == "execute_result"), "")


def error(cell: Any) -> str:
    return next(("\n".join(output.traceback) for output in cell.outputs if output.output_type == "error"), "")


async def run(folder: Path) -> None:
    example = nbformat.read(EXAMPLE, as_version=4).cells
    notebook = Notebook(example)
    async with notebook.client.async_setup_kernel():
        cells = {}
        for index, cell in enumerate(example):
            if cell.cell_type == "code":
                cells[cell.id] = await notebook.client.async_execute_cell(cell, index)
                assert not error(cells[cell.id]), error(cells[cell.id])
        await check_example(cells)
        await check_failures(notebook, folder)
        kernel = psutil.Process(int(value(await notebook.cell("import os; os.getpid()"))))
        processes = [kernel, *kernel.children(recursive=True)]
        assert len(processes) > 5
    _, alive = psutil.wait_procs(processes, 20)
    assert not alive


async def check_example(cells: dict[str, Any]) -> None:
    assert lines_by_rank(printed(cells["share"]), 4) == [["4 ranks"]] * 4
    assert [line[:2] for line in value(cells["share"]).splitlines()] == ["0|", "1|", "2|", "3|"]
    assert value(cells["mean"]).startswith("4 ranks| '")
    assert value(cells["ranks"]) == "<fleet.Cluster of 4 ranks: 4 ranks idle>"
    assert value(cells["code"]) == "[1, 11]"
    assert value(cells["function"]) == "[1024, 1024]"
    assert value(cells["tasks"]) == "2470"
    [bar] = [output for output in cells["tasks"].outputs if output.output_type == "display_data"]
    assert re.search(r"━{30} squares 20/20, \d+ s$", bar.data["text/plain"])
    assert '<progress value="20" max="20">' in bar.data["text/html"]


async def check_failures(notebook: Notebook, folder: Path) -> None:
    failed = await notebook.cell("%%fleet\nx = rank\nif rank == 2:\n    raise ValueError('boom')\ncomm.barrier()")
    assert "    raise ValueError('boom')" in error(failed)
    assert error(failed).endswith("rank 2 failed: ValueError: boom\ninterrupted because of it: ranks 0-1,3")
    assert "fleet/" not in error(failed)
    alike = await notebook.cell("%%fleet\n1 / 0")
    assert error(alike).endswith("all 4 ranks failed: ZeroDivisionError: division by zero")
    wrong = await notebook.cell("%%fleet\n1 +")
    assert error(wrong).endswith("1 +\n       ^\nSyntaxError: invalid syntax\nno rank has run the cell")
    assert "fleet/" not in error(wrong)
    assert error(await notebook.cell("%%fleet\n!ls")).endswith("ranks run Python alone, no lines of % and !")
    assert error(await notebook.cell("%%fleet\nawait 1")).endswith("use asyncio.run")
    misused = await notebook.cell("%%fleet --workers none\n1")
    assert "is not understood" in printed(misused, "stderr") + error(misused)

    assert not error(await notebook.cell("%reload_ext fleet"))
    assert value(await notebook.cell("%%fleet\nx")) == "0| 0\n1| 1\n2| 2\n3| 3"
    many = await notebook.cell("%%fleet\nfor number in range(3000):\n    print(number, flush=True)")
    assert lines_by_rank(printed(many), 4) == [[str(number) for number in range(3000)]] * 4
    # Jupyter drops output in more than a thousand messages a second.
    assert len(many.outputs) < 300
    begun = folder / "begun"
    waiting = asyncio.create_task(
        notebook.cell(f"%%fleet\nif rank:\n    comm.barrier()\nopen({str(begun)!r}, 'w').close()\nwhile True: pass")
    )
    while not begun.exists():
        await asyncio.sleep(0.02)
    await notebook.client.km.interrupt_kernel()
    interrupted = error(await waiting)
    assert interrupted.startswith("KeyboardInterrupt: rank 0 in "), interrupted
    assert interrupted.endswith('; ranks 1-3 in "<cell 7>", line 3, in <module>')

    lives = await notebook.cell("%%fleet\nn = np.array([x])\ncomm.all_reduce(n)\nn")
    assert value(lives) == "4 ranks| array([6])"
    dies = await notebook.cell("%%fleet\nimport os\nif rank == 1:\n    os.kill(os.getpid(), 9)\ncomm.barrier()")
    assert "rank 1 failed" in error(dies)
    assert "SIGKILL" in error(dies)
    assert "without the variables" in error(dies)
    anew = await notebook.cell("%%fleet\nimport os\nprint(os.getpid())\n'x' in globals()")
    assert value(anew) == "4 ranks| False"

    slots = "import psutil; [p] = [p for p in psutil.Process().children() if 'local-slots' in p.cmdline()]; p.kill()"
    lost = await notebook.cell(
        f"import threading\nthreading.Timer(0.3, lambda: exec({slots!r}, {{}})).start()\n"
        "get_ipython().run_cell_magic('fleet', '', 'import time; time.sleep(60)')"
    )
    assert error(lost).startswith(
        "the process with the ranks of this machine was killed by signal 9\nwith the next cell"
    )
    anew = await notebook.cell("%%fleet\nimport os\nprint(os.getpid())")

    pids = dict(line.split("| ") for line in printed(anew).splitlines())
    alive = [psutil.Process(int(pid)) for pid in pids.values()]
    os.kill(int(pids["3"]), signal.SIGKILL)
    psutil.wait_procs(alive, 20)
    after = await notebook.cell("%%fleet\nrank")
    assert "rank 3 failed" in printed(after, "stderr")
    assert value(after) == "0| 0\n1| 1\n2| 2\n3| 3"
    await notebook.cell("%fleet --close")
    assert "there are no ranks" in printed(await notebook.cell("%fleet"), "stderr")
    await notebook.cell("%%fleet --workers 4\n1")  # for what the end of the kernel leaves


def test_cells_run_on_ranks_that_stay_alive(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the notebook's own libraries
        asyncio.run(run(tmp_path))
