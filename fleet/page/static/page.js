// The page of a cluster: what changes comes from the feed, and each part draws what is its own.

import { act, confirmed } from "./ask.js";
import { byId, say, span } from "./dom.js";
import { Feed } from "./feed.js";
import { Job } from "./job.js";
import { Jobs } from "./jobs.js";
import { Workers } from "./workers.js";

const ANNOUNCED_EVERY_MS = 10000;

const due = new Set();
let announced = { key: "", at: -Infinity };
let drawing = false, longest = 1;

const feed = new Feed((tables, anew) => {
  for (const name of tables) due.add(name);
  if (anew) due.add("anew");
  if (!drawing) {
    drawing = true;
    setTimeout(draw, 0);
  }
});
const open = (id) => (location.hash = `#job/${encodeURIComponent(id)}`);
const workers = new Workers(feed, open, drain);
const jobs = new Jobs(feed, open);
const job = new Job(feed, () => {
  history.replaceState(null, "", location.pathname);
  route();
  byId("jobs").focus({ preventScroll: true });
});

function draw() {
  const begun = performance.now();
  drawing = false;
  const now = new Set(due);
  due.clear();
  link();
  if (now.has("cluster")) health();
  announce();
  if (now.has("workers") || now.has("jobs")) workers.render();
  if (now.has("jobs") || now.has("cluster")) jobs.render();
  if (now.has("events")) workers.events();
  if (now.has("anew")) job.look(true);
  if (now.has("cluster")) measured(begun);
}

// What bench/page.py reads: when the page was there first, and how long the longest drawing took.
function measured(begun) {
  if (!performance.getEntriesByName("fleet-drawn").length) performance.mark("fleet-drawn");
  else if (performance.now() - begun > longest) longest = performance.measure("fleet-draw", { start: begun }).duration;
}

function health() {
  const told = feed.cluster;
  if (!told) return;
  say(byId("health"), `${told.sentence[0].toUpperCase()}${told.sentence.slice(1)}.`);
  byId("health").dataset.level = told.level;
  document.title = `${told.jobs_running ? `${told.jobs_running} ▶ ` : ""}fleet`;
}

// What is read aloud: the sentence once the level or a count in it changes, and no oftener than it can be heard. A step is none.
function announce() {
  const told = feed.cluster, now = Date.now();
  if (!told || now < announced.at + ANNOUNCED_EVERY_MS) return;
  const key = JSON.stringify([told.level, told.workers, told.jobs_running, told.jobs_waiting, told.jobs_held_up]);
  if (key === announced.key) return;
  announced = { key, at: now };
  say(byId("announced"), byId("health").textContent);
}

function link() {
  const place = byId("link-state");
  byId("link").dataset.state = feed.state;
  document.body.classList.toggle("stale", feed.state === "lost");
  say(byId("link-since"), feed.state === "lost" ? ` since ${span((Date.now() - feed.lostAt) / 1000)}; trying again` : "");
  if (feed.state === "live") say(place, "live");
  else if (feed.state === "loading") say(place, "connecting");
  else if (feed.state === "hidden") document.title = "fleet"; // what runs is not known
  else if (feed.state === "lost") say(place, "connection lost");
}

function drain(id, worker) {
  if (worker.state === "draining") return confirmed(`Give worker ${id} work again?`, "Give it work", () => act("/api/drain", { worker: id, undo: true }));
  confirmed(`Drain worker ${id}? It gets no new work, and what does not end there within 20 s starts again on others.`, "Drain it", () => act("/api/drain", { worker: id }));
}

function route() {
  const found = /^#job\/(.+)$/.exec(location.hash);
  jobs.opened = found ? decodeURIComponent(found[1]) : null;
  job.show(jobs.opened);
  document.body.classList.toggle("has-job", jobs.opened !== null);
  if (feed.cluster) jobs.render();
}

addEventListener("hashchange", route);
addEventListener("keydown", (event) => {
  if (event.key === "Escape" && jobs.opened !== null && !byId("confirm").open) job.close();
});
route();
