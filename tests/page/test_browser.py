"""The page as a person sees it: a real browser on a real cluster, with what users and ranks may write there.

One start of the browser and the cluster serves all checks, which follow each other as a person's day does.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest

from fleet.bus.address import free_port
from tests.chaos.commands import environment, fleet
from tests.chaos.place import Place
from tests.page.browser import MISSING, Browser, browser

ENTER, ESCAPE, TAB = "\ue007", "\ue00c", "\ue004"
HOSTILE = "<img src=x onerror='document.title=1'><script>document.title=2</script>"
TRAINS = f'''
import time
import numpy as np
import fleet

comm = fleet.init()
print("y" * 5000)
print("{HOSTILE} \\x1b]0;title\\x07\\x1b[31mred\\x1b[0m \\u202egnp", flush=True)
for step in range(100000):
    time.sleep(0.02)
    comm.all_reduce(np.ones(1000, np.float32))
    fleet.step()
    if step < 20:
        print(f"step {{step}}", flush=True)
    if step == 20:
        print("10 %\\r20 %\\r", end="", flush=True)
'''
FAILS = f'''
import fleet

comm = fleet.init()
print(f"rank {{comm.rank}} asks: go on? ", end="", flush=True)

def load_batch(step):
    if comm.rank == 1:
        raise ValueError("{HOSTILE} \\x1b[2J shard 7 is cut short")

load_batch(0)
comm.barrier()
'''
CALLS = """
import time
import fleet

def load_batch(step):
    if step > 20:
        time.sleep(600)

with fleet.Executor(max_workers=1, name="calls") as pool:
    pool.submit(pow, 2, 3)
    list(pool.map(load_batch, range(30)))
"""
CURVES = """
return import('/charts.js').then(({ Chart }) => {
  const place = document.body.appendChild(document.createElement('div')), chart = new Chart(place, 'cores', String);
  chart.add(1, [0.1, 0.2], ['rank 0', 'rank 1']);
  chart.add(2, [0.1, 0.2], ['rank 0', 'rank 1']);
  chart.add(3, [0.2], ['rank 1']);
  chart.add(4, [0.1, 0.2, 0.3], ['rank 0', 'rank 1', 'rank 2']);
  const drawn = chart.plot.data.map((curve) => [...curve]);
  chart.stop();
  place.remove();
  return drawn;
});
"""
LISTEN = """
window.announced = [];
const look = new MutationObserver((all) => all.forEach((one) => announced.push(one.target.textContent)));
for (const live of document.querySelectorAll('[aria-live], [role=status]'))
  look.observe(live, { subtree: true, childList: true, characterData: true });
document.querySelector('.collectives .scroll').focus();
"""
LIVE = "document.querySelector('#link').dataset.state === 'live'"


class Visit:
    """A person with a browser, and the cluster that they look at."""

    def __init__(self, place: Place, seen: Browser, folder: Path) -> None:
        self.place, self.seen, self.folder = place, seen, folder
        (folder / "trains.py").write_text(TRAINS)
        (folder / "fails.py").write_text(FAILS)
        (folder / "calls.py").write_text(CALLS)

    def fleet(self, *words: str) -> str:
        secret = str(self.folder / "secret")
        done = fleet(*words, ORCHESTRATOR_ADDR=self.place.address, FLEET_SECRET_FILE=secret)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def submit(self, script: str, workers: int, name: str = "") -> str:
        return self.fleet("submit", "--workers", str(workers), "--name", name, str(self.folder / script))

    def row(self, job: str) -> str:
        """What the table says of a job, by the script of an expression."""
        return f"[...document.querySelectorAll('#jobs-table tbody tr')].find(r => r.innerText.includes('{job}'))"

    def open(self, job: str) -> None:
        self.seen.run(f"{self.row(job)}.querySelector('a').focus()")
        self.seen.keys(ENTER)
        self.seen.until("document.querySelector('#job').dataset.status")
        self.seen.until(f"document.querySelector('#job h2')?.innerText.includes('{job}')")

    def press(self, selector: str) -> None:
        """The button, by the keyboard."""
        self.seen.until("document.querySelector(arguments[0])", selector)
        self.seen.run("document.querySelector(arguments[0]).focus()", selector)
        self.seen.keys(ENTER)


@pytest.mark.skipif(bool(MISSING), reason=MISSING)
@pytest.mark.timeout(300)
def test_the_page_in_a_browser(tmp_path: Path) -> None:
    with ExitStack() as stack:
        place = Place(stack, tmp_path, FLEET_METRICS_PORT=str(free_port("127.0.0.1")))
        seen = stack.enter_context(browser())
        visit = Visit(place, seen, tmp_path)
        the_token_lets_in(visit)
        an_empty_cluster_is_no_loading_one(visit)
        workers_come_as_they_join(visit)
        job = a_job_runs_and_what_it_prints_is_shown_and_not_obeyed(visit)
        the_first_failure_stands_first(visit)
        what_waits_says_why(visit)
        each_rank_says_what_it_is_doing(visit, job)
        tasks_of_an_executor_have_the_names_of_their_functions(visit)
        it_fits_a_narrow_window_and_the_dark(visit)
        many_tabs_are_live(visit, job)
        curves_stay_with_their_ranks(visit)
        it_can_be_used_by_keyboard_and_read_aloud(visit)
        assert seen.complaints() == []
        a_restarted_orchestrator_is_a_pause(visit, job)
        a_job_is_cancelled_and_a_worker_drained_once_that_is_confirmed(visit, job)


def the_token_lets_in(visit: Visit) -> None:
    address = visit.fleet("dashboard")
    assert re.fullmatch(r"http://127\.0\.0\.1:\d+/\?token=[0-9a-f]{64}", address)
    visit.seen.go(address.partition("?")[0])
    assert "needs its token" in visit.seen.text("body")
    visit.seen.go(address[:-1] + ("0" if address[-1] != "0" else "1"))
    assert "not the token" in visit.seen.text("body")
    visit.seen.complaints()  # of the two answers above
    visit.seen.go(address)
    visit.seen.until(LIVE)
    assert visit.seen.address == address.partition("?")[0]  # the token is in no address and no history
    assert visit.seen.run("return document.cookie") == ""


def an_empty_cluster_is_no_loading_one(visit: Visit) -> None:
    visit.seen.until("document.querySelector('#health').innerText.includes('No worker is connected')")
    assert "Nothing yet: no worker" in visit.seen.text("#workers-note")
    assert "Nothing yet: no job" in visit.seen.text("#jobs-note")


def workers_come_as_they_join(visit: Visit) -> None:
    for name in ("w1", "w2"):
        visit.place.start_worker(name)
        visit.place.wait_for_worker(name)
    visit.seen.until("document.querySelectorAll('#hosts .worker').length === 2", within_s=5)
    assert visit.seen.run("return document.querySelectorAll('#hosts .cell.free').length") == 4
    assert "2 of 2 workers are ready" in visit.seen.text("#health")


def a_job_runs_and_what_it_prints_is_shown_and_not_obeyed(visit: Visit) -> str:
    job = visit.submit("trains.py", 2, name="<b>bold</b> \u202egpj.exe")
    visit.seen.until(f"{visit.row(job)}?.dataset.status === 'running'")
    assert "<b>bold</b> \\u202egpj.exe" in visit.seen.run(f"return {visit.row(job)}.innerText")
    visit.seen.until("document.querySelectorAll('#hosts .cell.busy').length === 2")
    visit.open(job)
    visit.seen.until("document.querySelector('.log').innerText.includes('step 19')")
    assert "<b>bold</b> \\u202egpj.exe" in visit.seen.text("#health")
    assert "<b>bold</b> \\u202egpj.exe" in visit.seen.text("#job h2")
    assert not visit.seen.run("return document.documentElement.outerHTML.includes('\\u202e')")
    log = visit.seen.text(".log")
    assert f"{HOSTILE} \\x1b]0;title\\x07red \\u202egnp" in log  # colours left out, the rest escaped
    assert log.count("step 19") == 1
    assert "y … (shown: 4000 of 5000 characters)" in log
    visit.seen.until(r"/r0-1\s*20 %\s*$/.test(document.querySelector('.log').innerText)")  # a line that goes on
    assert re.search(r"r0-1\s*step 19", log)  # the lines of both ranks are one
    assert "fleet" in visit.seen.run("return document.title")  # and neither 1 nor 2
    assert visit.seen.run("return document.querySelectorAll('img, .log script, b b').length") == 0
    search = "const s = document.querySelector('.log').parentElement.querySelector('input'); s.value = arguments[0];"
    visit.seen.run(search + "s.dispatchEvent(new Event('input'))", "step 7")
    assert "shown: 2 of" in visit.seen.text(".part.output .note")
    visit.press(".part.output .head button")  # the same text, in the logs on the disk
    visit.seen.until("document.querySelector('.part.output').innerText.includes('2 lines with “step 7” in all')")
    return job


def the_first_failure_stands_first(visit: Visit) -> None:
    job = visit.submit("fails.py", 2)
    visit.seen.until(f"{visit.row(job)}?.dataset.status === 'failed'")
    visit.open(job)
    visit.seen.until("document.querySelector('.failure pre')")
    failure = visit.seen.text(".failure")
    assert failure.startswith("First failure")
    assert "rank 1 failed" in failure
    assert "in load_batch" in failure
    assert f"ValueError: {HOSTILE} \\x1b[2J shard 7 is cut short" in failure
    visit.seen.until(
        "document.querySelector('.log').innerText.includes('rank 1 asks: go on?')"
    )  # and never ended the line


def what_waits_says_why(visit: Visit) -> None:
    job = visit.submit("trains.py", 99)
    visit.seen.until(f"{visit.row(job)}?.innerText.includes('waits for')")
    assert "slots" in visit.seen.run(f"return {visit.row(job)}.innerText")
    visit.fleet("cancel", job)
    visit.seen.until(f"{visit.row(job)}.dataset.status === 'cancelled'")


def each_rank_says_what_it_is_doing(visit: Visit, job: str) -> None:
    visit.open(job)
    visit.press(".doing button:not(.trace)")
    visit.seen.until("document.querySelectorAll('.doing details').length === 2")
    assert "trains.py" in visit.seen.text(".doing")
    used = json.loads(visit.fleet("status", "--json", job))["used"]  # what the page shows is in --json too
    assert sorted(rank["rank"] for worker in used for rank in worker["ranks"]) == [0, 1]
    assert "thread MainThread" in visit.seen.run("return document.querySelector('.doing pre').textContent")
    visit.press(".doing .trace")
    visit.seen.until("document.querySelector('#said').innerText.includes('is downloaded')")


def tasks_of_an_executor_have_the_names_of_their_functions(visit: Visit) -> None:
    variables = environment(ORCHESTRATOR_ADDR=visit.place.address, FLEET_SECRET_FILE=str(visit.folder / "secret"))
    command = [sys.executable, str(visit.folder / "calls.py")]
    with subprocess.Popen(command, env=variables, stderr=subprocess.DEVNULL) as caller:
        named = "[...document.querySelectorAll('#jobs-table tr')].find(r => r.querySelector('.name')?.innerText === 'calls')"
        job = visit.seen.until(f"{named}?.querySelector('a').innerText")
        visit.open(job)
        visit.seen.until(
            "document.querySelector('.using').innerText.includes(arguments[0])", "Calls: load_batch 22, pow 1."
        )
        assert "22 tasks done, in task 23 (load_batch) for" in visit.seen.text(".using")
        caller.kill()
    visit.seen.until(f"{visit.row(job)}.dataset.status === 'cancelled'")


def it_fits_a_narrow_window_and_the_dark(visit: Visit) -> None:
    backs = set()
    for width, dark in ((400, False), (1400, True), (2600, False)):
        visit.seen.window(width, 900)
        visit.seen.dark(dark)
        assert visit.seen.run("return document.documentElement.scrollWidth") <= width
        backs.add(visit.seen.run("return getComputedStyle(document.body).backgroundColor"))
    assert len(backs) == 2
    visit.seen.window(1400, 900)


def many_tabs_are_live(visit: Visit, job: str) -> None:
    """A browser has six connections to a host, and a tab that nobody sees has none of them."""
    first, address = visit.seen.handle, visit.seen.address.partition("#")[0]
    others = [visit.seen.new_tab() for _ in range(7)]
    for tab in others:
        visit.seen.switch(tab)
        visit.seen.go(address)
        visit.seen.until(LIVE)
    for tab in others:
        visit.seen.switch(tab)
        visit.seen.close_tab()
    visit.seen.switch(first)
    visit.seen.until(LIVE)
    visit.open(job)


def it_can_be_used_by_keyboard_and_read_aloud(visit: Visit) -> None:
    names = visit.seen.run(
        "return [...document.querySelectorAll('button, a, input')].filter(e => e.checkVisibility())"
        ".map(e => e.getAttribute('aria-label') || e.innerText || e.labels?.[0]?.innerText || e.title)"
    )
    assert all(names)
    numbers_change_and_neither_speak_nor_take_the_focus(visit)
    visit.press(".doing button:not(.trace)")
    visit.seen.until("document.querySelectorAll('.doing details').length === 2")
    assert visit.seen.run("return document.activeElement.innerText") == "Ask each rank what it is doing"
    visit.seen.keys(ESCAPE)
    assert visit.seen.run("return document.querySelector('#job').hidden")
    assert (
        visit.seen.run("return document.activeElement.id") == "jobs"
    )  # where the list is that the job was opened from
    visit.seen.keys(TAB)
    assert visit.seen.run("return document.activeElement.id") == "jobs-filter"


def numbers_change_and_neither_speak_nor_take_the_focus(visit: Visit) -> None:
    visit.seen.until("document.querySelector('.collectives .scroll')?.checkVisibility()")
    visit.seen.run(LISTEN)
    for selector in ("#health", ".collectives tbody") * 3:
        before = visit.seen.text(selector)
        visit.seen.until("document.querySelector(arguments[0])?.innerText !== arguments[1]", selector, before)
    assert "step" in visit.seen.text("#health")
    assert len([said for said in visit.seen.run("return announced") if said]) <= 1  # of jobs that ended a moment ago
    assert visit.seen.run("return document.activeElement.className") == "scroll"
    visit.seen.until("document.querySelector('#announced').textContent.includes('2 of 2 workers are ready')")


def curves_stay_with_their_ranks(visit: Visit) -> None:
    """Rank 0 was away, and rank 2 came."""
    none = None
    assert visit.seen.run(CURVES) == [
        [1, 2, 3, 4], [0.1, 0.1, none, 0.1], [0.2, 0.2, 0.2, 0.2], [none, none, none, 0.3]
    ]  # fmt: skip


def a_restarted_orchestrator_is_a_pause(visit: Visit, job: str) -> None:
    visit.place.kill(visit.place.orchestrator)
    visit.seen.until("/connection lost since .* s/.test(document.querySelector('#link').innerText)")
    assert visit.seen.text("#link [role=status]") == "connection lost"  # the seconds are not read aloud
    visit.place.start_orchestrator()
    visit.seen.until(LIVE)
    visit.seen.until(f"{visit.row(job)}?.dataset.status === 'running'")
    visit.seen.until("document.querySelector('#health').innerText.includes('2 of 2 workers are ready')")
    visit.seen.complaints()  # of the connection


def a_job_is_cancelled_and_a_worker_drained_once_that_is_confirmed(visit: Visit, job: str) -> None:
    visit.open(job)
    visit.press("#job .head .buttons button")
    assert visit.seen.run("return document.activeElement.id") == "confirm-no"  # Enter alone cancels nothing
    visit.seen.keys(ENTER)
    assert not visit.seen.run("return document.querySelector('dialog').open")
    visit.press("#job .head .buttons button")
    visit.press("#confirm-yes")
    visit.seen.until(f"{visit.row(job)}.dataset.status === 'cancelled'")
    visit.press("[data-key='drain/w1']")
    visit.press("#confirm-yes")
    visit.seen.until("document.querySelector('.worker[data-state=draining]')")
    assert '"state":"draining"' in visit.fleet("workers", "--json").replace(" ", "")
