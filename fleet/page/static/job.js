// One job: its state, its first failure, its ranks, what it prints, and what can be done about it.

import { RANKS_WITHIN_MS, act, ask, confirmed, fetched, tell } from "./ask.js";
import { byId, clock, el, hue, many, rankSet, say, shownOf, span } from "./dom.js";
import { isOver, sign, took } from "./jobs.js";
import { Logs } from "./logs.js";
import { Use } from "./use.js";

const ASK_EVERY_MS = 1000, RANKS_SHOWN = 512;

export class Job {
  constructor(feed, close) {
    this.feed = feed;
    this.close = close;
    this.id = null;
    this.place = byId("job");
    setInterval(() => this.look(), ASK_EVERY_MS);
  }

  show(id) {
    if (id === this.id) return;
    this.id = id;
    this.found = null;
    this.place.hidden = id === null;
    this.logs?.stop();
    this.use?.stop();
    if (id === null) return this.place.replaceChildren();
    const part = (name, ...more) => (this[name] = el("div", { class: `part ${name}` }, ...more));
    this.place.replaceChildren(
      el("div", { class: "head" }, this.title = el("h2", { id: "job-head", tabIndex: -1 }, `Job ${id}`), this.state = el("span", { class: "state" }),
        el("span", { class: "buttons" }, this.stop = el("button", { onclick: () => this.cancel() }, "Cancel job"),
          el("button", { onclick: () => this.close(), "aria-label": "Close this job" }, "Close"))),
      this.summary = el("p", { class: "summary" }, "Loading …"),
      part("failure"), part("ranks"), part("using"),
      el("h3", {}, "Ranks and their stacks"), part("doing"),
      el("h3", {}, "Output"), part("output"), part("history"));
    this.failure.hidden = true;
    this.doing.append(el("button", { class: "trace", onclick: (event) => this.trace(event.target) }, "Trace of the last minute"), " ", this.askButton = el("button", { onclick: () => this.stacks() }, "Ask each rank what it is doing"), this.answers = el("div"));
    this.logs = new Logs(this.output, id);
    this.use = new Use(this.using, id);
    this.render();
    this.look(true);
    this.place.scrollIntoView({ block: "nearest" });
    this.title.focus({ preventScroll: true });
  }

  async look(now = false) {
    const id = this.id;
    if (id === null || document.hidden || this.asking) return;
    const row = this.feed.tables.jobs.get(id);
    if (!now && this.found && this.row === row && row && isOver(row.status)) return; // nothing changes any more
    this.asking = true;
    try {
      const found = await ask("/api/job", { id });
      if (id === this.id) {
        this.found = found;
        this.row = row;
        this.render();
        if (isOver(found.job.outcome || found.job.state)) this.use.over();
        else this.use.look();
      }
    } catch (error) {
      if (id === this.id && this.feed.state === "live") say(this.summary, error.message);
    } finally {
      this.asking = false;
    }
  }

  render() {
    if (!this.found) return;
    const { job, ranks, cause, report } = this.found;
    const status = job.outcome || job.state, over = isOver(status);
    say(this.title, `Job ${job.job_id}${job.options.name ? ` (${job.options.name})` : ""}`);
    say(this.state, sign(status));
    this.place.dataset.status = status;
    if (over && document.activeElement === this.stop) this.title.focus(); // else the focus would be nowhere
    this.stop.hidden = over;
    const spread = new Set(job.workers).size;
    say(this.summary, [
      [job.target, ...job.args].join(" "),
      many(job.world_size, "rank") + (spread ? ` on ${many(spread, "worker")}` : ""),
      `submitted ${clock(job.submitted_at)}`,
      job.started_at ? `${over ? "ran" : "runs"} for ${took({ ...job, submitted_at: job.submitted_at })}` : `waits for ${job.waits_for || "its start"}`,
      job.attempt > 1 ? `attempt ${job.attempt} of at most ${job.options.max_restarts + 1}` : "",
    ].filter(Boolean).join(" · "));
    this.renderFailure(job, ranks, cause, report);
    this.renderRanks(job, ranks);
    this.renderHistory(job);
    this.use.show(job, this.found.slow);
    this.logs.of(job);
  }

  renderFailure(job, ranks, cause, report) {
    const first = ranks.find((rank) => rank.rank === cause);
    const words = report || (first ? `rank ${cause} failed` : "");
    this.failure.hidden = !words;
    const key = `${words}${first?.stderr_tail ?? ""}`;
    if (!words || this.failure.key === key) return;
    this.failure.key = key;
    this.failure.replaceChildren(el("h3", {}, first ? "First failure" : "Why it ended"), ...words.split("\n").map((line) => el("p", {}, line.replace(/^fleet: /, ""))));
    if (first?.stderr_tail) {
      this.failure.append(el("pre", { tabIndex: 0, "aria-label": `The end of stderr of rank ${cause}` }, lastTraceback(first.stderr_tail)));
    }
  }

  renderRanks(job, ranks) {
    const ended = new Map(ranks.map((rank) => [rank.rank, rank]));
    const key = JSON.stringify([job.workers, job.state, ranks.length, job.attempt]);
    if (this.ranks.key === key) return;
    this.ranks.key = key;
    const shown = Math.min(job.world_size, RANKS_SHOWN);
    const cells = [];
    for (let rank = 0; rank < shown; rank++) {
      const end = ended.get(rank), worker = job.workers[rank];
      const state = !worker ? "waiting" : !end ? job.state : end.stopped ? "stopped" : end.code || end.signal || end.reason ? "failed" : "succeeded";
      const mark = { failed: "✗", succeeded: "✓", stopped: "■" }[state] ?? "";
      const why = end ? (end.reason || (end.signal ? `signal ${end.signal}` : `exit code ${end.code}`)) : state;
      cells.push(el("li", { class: "cell busy", data: { hue: hue(job.job_id), state }, title: `rank ${rank}${worker ? ` on ${worker}` : ""}: ${why}` }, `${rank}${mark}`));
    }
    const byWorker = new Map();
    job.workers.forEach((worker, rank) => byWorker.set(worker, [...(byWorker.get(worker) ?? []), rank]));
    this.ranks.replaceChildren(el("ul", { class: "cells", "aria-label": "Ranks" }, ...cells),
      el("p", { class: "note" }, [shown < job.world_size ? `shown: ${shown} of ${job.world_size} ranks` : "",
        ...[...byWorker].slice(0, 8).map(([worker, some]) => `${rankSet(some)} on ${worker}`), byWorker.size > 8 ? `and ${byWorker.size - 8} more workers` : ""].filter(Boolean).join("; ")));
  }

  renderHistory(job) {
    const key = JSON.stringify([job.attempts, job.attempt_started_at, job.ended_at, job.state, job.left]);
    if (this.history.key === key) return;
    this.history.key = key;
    this.history.replaceChildren();
    if (job.attempts.length) this.history.append(el("h3", {}, "Attempts"), attempts(job));
    if (job.left?.length) this.history.append(el("h3", {}, "Files"), el("ul", {}, ...job.left.map((line) => el("li", {}, line))));
  }

  cancel() {
    const id = this.id;
    confirmed(`Cancel job ${id}? All its ranks are told to end.`, "Cancel the job", () => act("/api/cancel", { job: id }));
  }

  // A file for ui.perfetto.dev and chrome://tracing.
  async trace(button) {
    const id = this.id;
    if (!begin(button)) return;
    tell("Asking the ranks for their trace …");
    try {
      const response = await fetched(`/api/trace?${new URLSearchParams({ id })}`, {}, RANKS_WITHIN_MS);
      if (!response.ok) throw new Error((await response.json()).said);
      const address = URL.createObjectURL(await response.blob());
      el("a", { href: address, download: `trace-${id}.json` }).click();
      setTimeout(() => URL.revokeObjectURL(address), 60000);
      tell(`trace-${id}.json is downloaded: open it at ui.perfetto.dev`);
    } catch (error) {
      tell(error.message, true);
    } finally {
      end(button);
    }
  }

  async stacks() {
    const id = this.id, button = this.askButton;
    if (!begin(button)) return;
    say(this.answers, "Asking …");
    try {
      const { ranks } = await ask("/api/ranks", { id }, RANKS_WITHIN_MS);
      if (id !== this.id) return;
      this.answers.replaceChildren(el("p", { class: "note" }, [`As of ${clock(Date.now() / 1000)}`, shownOf(Math.min(RANKS_SHOWN, ranks.length), ranks.length, "ranks")].filter(Boolean).join("; ")), ...ranks.slice(0, RANKS_SHOWN).map((rank) =>
        el("details", {}, el("summary", {}, el("b", {}, `rank ${rank.rank}`), ` ${rank.host ?? ""} ${rank.pid ? `pid ${rank.pid}` : ""}: ${rank.doing}`),
          el("pre", { tabIndex: 0 }, [rank.stacks || "", (rank.recent ?? []).length ? `last collectives:\n${rank.recent.join("\n")}` : "it has made no collective yet"].filter(Boolean).join("\n\n")))));
    } catch (error) {
      say(this.answers, error.message);
    } finally {
      end(button);
    }
  }
}

// Whether what a button asks for is not asked for already. A disabled button would lose the focus.
function begin(button) {
  if (button.ariaDisabled === "true") return false;
  button.ariaDisabled = "true";
  return true;
}

const end = (button) => (button.ariaDisabled = "false");

// The last traceback of a text, or its last lines.
function lastTraceback(text) {
  const begin = text.lastIndexOf("Traceback (most recent call last):");
  return begin < 0 ? text.split("\n").slice(-30).join("\n") : text.slice(text.lastIndexOf("\n", begin) + 1);
}

// When each attempt started and ended, on which workers and which of them came and went, and why it ended.
function attempts(job) {
  const current = { number: job.attempt, started_at: job.attempt_started_at, ended_at: job.ended_at, workers: [...new Set(job.workers)], reason: job.reason || job.outcome || job.state };
  const all = [...job.attempts, ...(job.workers.length || job.ended_at ? [current] : [])];
  return el("ol", {}, ...all.map((one, at) => {
    const change = at && changed(all[at - 1], one), from = one.started_at, to = one.ended_at;
    const when = !from ? (to ? "never started" : "") : to ? `${moment(from)} to ${moment(to)}, ${span(to - from)}` : `since ${moment(from)}`;
    return el("li", {}, `${one.number}. `, el("b", {}, when), one.workers.length ? ` on ${some(one)}` : "", change ? `; ${change}` : "", `: ${one.reason}`);
  }));
}

const some = ({ workers, worker_count: count = workers.length }) => workers.slice(0, 8).join(", ") + (count > 8 ? ` and ${count - 8} more` : "");

function changed(before, now) {
  if (!before.workers.length || before.workers.length < before.worker_count || now.workers.length < (now.worker_count ?? 0)) return "";
  const came = now.workers.filter((worker) => !before.workers.includes(worker)), went = before.workers.filter((worker) => !now.workers.includes(worker));
  return [came.length ? `${some({ workers: came })} came` : "", went.length ? `${some({ workers: went })} went` : ""].filter(Boolean).join(", ");
}

// With its date, where that is not today's.
function moment(seconds) {
  const then = new Date(seconds * 1000);
  return then.toDateString() === new Date().toDateString() ? clock(seconds) : `${then.toLocaleDateString()} ${clock(seconds)}`;
}
