// The table of jobs: those that run, the queue in its order with what each waits for, then those that have ended.

import { arrange, byId, el, many, note, say, shownOf, span } from "./dom.js";

const AT_FIRST = 100, MORE = 200;
const RUNS = new Set(["running", "stopping", "assigned"]), WAITS = new Set(["queued", "fetching"]);
const SIGNS = { running: "▶", stopping: "■", assigned: "…", queued: "○", fetching: "○", succeeded: "✓", failed: "✗", cancelled: "–", quarantined: "✗" };

export class Jobs {
  constructor(feed, open) {
    this.feed = feed;
    this.open = open;
    this.limit = AT_FIRST;
    this.made = new Map(); // rows of the table
    this.filter = byId("jobs-filter");
    this.filter.addEventListener("input", () => this.render());
    byId("jobs-more").addEventListener("click", () => {
      const first = this.limit;
      this.limit += MORE;
      this.render();
      if (byId("jobs-more").hidden) byId("jobs-table").tBodies[0].rows[first]?.querySelector("a").focus(); // the button had it
    });
    setInterval(() => this.tick(), 1000);
  }

  render() {
    const all = this.feed.tables.jobs, count = this.feed.cluster?.job_count ?? all.size;
    const wanted = this.filter.value.trim().toLowerCase();
    const found = [...all].filter(([id, job]) => !wanted || `${id} ${job.name ?? ""} ${job.sweep ?? ""} ${job.target} ${job.status}`.toLowerCase().includes(wanted));
    found.sort(([, a], [, b]) => place(a) - place(b) || (place(a) === 1 ? a.number - b.number : b.number - a.number));
    const shown = found.slice(0, this.limit);
    const body = byId("jobs-table").tBodies[0];
    byId("jobs-table").hidden = !shown.length;
    say(byId("jobs-count"), count ? `${count}` : "");
    arrange(body, this.made, shown, (id) => this.row(id), (row, job, id) => {
      if (row.job !== job) this.fill(row, job);
      row.classList.toggle("open", id === this.opened);
    });
    note(byId("jobs-note"), count === 0 ? "Nothing yet: no job has been submitted. `fleet run` and `fleet submit` start one."
      : found.length === 0 ? `No match: none of the ${all.size} jobs here has “${wanted}” in its id, name, script or state.`
      : [shownOf(shown.length, found.length, wanted ? "matches" : "jobs"), all.size < count ? `the page has ${all.size} of ${count}; \`fleet jobs --limit\` lists all` : ""].filter(Boolean).join("; "));
    byId("jobs-more").hidden = shown.length >= found.length;
    say(byId("jobs-more"), `Show ${Math.min(MORE, found.length - shown.length)} more`);
  }

  row(id) {
    const link = el("a", { href: `#job/${encodeURIComponent(id)}` }, id);
    const row = el("tr", { onclick: (event) => event.target.closest("a") || getSelection().toString() || this.open(id) },
      el("th", { scope: "row" }, link, el("span", { class: "name" })), el("td"), el("td", { class: "runs" }), el("td", { class: "number" }), el("td", { class: "number" }), el("td", { class: "reason" }));
    return row;
  }

  fill(row, job) {
    row.job = job;
    row.dataset.status = job.status;
    const [head, state, runs, ranks, , reason] = row.children;
    say(head.lastElementChild, job.name || job.sweep || "");
    say(state, `${SIGNS[job.status] ?? ""} ${job.status}${(job.attempt ?? 1) > 1 ? `, attempt ${job.attempt}` : ""}`);
    say(runs, job.target);
    runs.title = job.target;
    say(ranks, `${job.ranks}`);
    say(reason, job.waits_for ? `waits for ${job.waits_for}` : job.reason ?? "");
    reason.title = reason.textContent;
    this.time(row);
  }

  tick() {
    for (const row of this.made.values()) if (!row.job.ended_at) this.time(row);
  }

  time(row) {
    say(row.children[4], took(row.job));
  }
}

export function took(job) {
  const now = Date.now() / 1000;
  if (job.ended_at) return job.started_at ? span(job.ended_at - job.started_at) : "";
  return span(Math.max(0, now - (job.started_at || job.submitted_at)));
}

export const sign = (status) => `${SIGNS[status] ?? ""} ${status}`;
const place = (job) => (RUNS.has(job.status) ? 0 : WAITS.has(job.status) ? 1 : 2);
export const isOver = (status) => !RUNS.has(status) && !WAITS.has(status);
export { many };
