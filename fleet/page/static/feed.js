// The live tables: a snapshot, then differences. Says when the connection is lost, and since when. A tab that nobody sees has no
// connection: a browser opens six to a host, and those of more tabs would wait for ever.

const SILENT_S = 12; // the server says something every 5 s
const PATIENCE_S = 96; // at most, for a snapshot over a slow link

export class Feed {
  constructor(changed) {
    this.tables = { cluster: new Map(), workers: new Map(), jobs: new Map(), events: new Map() };
    this.instance = "";
    this.state = "loading"; // or "live", "lost", "hidden"
    this.heardAt = Date.now();
    this.lostAt = 0;
    this.patience = SILENT_S; // of a try to connect: a second one has twice as long
    this.changed = changed;
    this.turn();
    setInterval(() => this.look(), 1000);
    document.addEventListener("visibilitychange", () => this.turn());
  }

  // The tab is hidden, or it is seen (again).
  turn() {
    this.source?.close();
    if (document.hidden) {
      if (this.state !== "lost") this.state = "hidden";
    } else {
      if (this.state === "hidden") this.state = "loading", (this.heardAt = Date.now());
      this.connect();
    }
    this.changed(new Set(["link"]), false);
  }

  connect() {
    this.triedAt = Date.now();
    this.source = new EventSource("/events");
    this.source.addEventListener("snapshot", (event) => this.take(event, true));
    this.source.addEventListener("change", (event) => this.take(event, false));
    this.source.addEventListener("beat", () => this.heard());
    this.source.addEventListener("error", () => this.lost());
  }

  take(event, whole) {
    const told = JSON.parse(event.data);
    const anew = this.instance !== "" && told.instance !== this.instance;
    this.instance = told.instance;
    const changed = new Set();
    for (const [name, change] of Object.entries(told.tables)) {
      const table = (this.tables[name] ??= new Map());
      if (whole) table.clear();
      for (const key of change.gone ?? []) table.delete(key);
      for (const [key, row] of change.put ?? []) table.set(key, row);
      changed.add(name);
    }
    this.heard();
    this.changed(whole ? new Set(Object.keys(this.tables)) : changed, anew);
  }

  heard() {
    const back = this.state !== "live";
    this.heardAt = Date.now();
    this.patience = SILENT_S;
    this.state = "live";
    if (back) this.changed(new Set(["link"]), false);
  }

  lost() {
    if (this.state !== "lost") {
      this.state = "lost";
      this.lostAt = this.heardAt;
    }
    this.changed(new Set(["link"]), false);
  }

  look() {
    if (document.hidden) return;
    const silent = (Date.now() - this.heardAt) / 1000, tried = (Date.now() - this.triedAt) / 1000;
    const unanswered = this.state === "loading" && this.source.readyState === EventSource.CONNECTING;
    if ((this.state === "live" || unanswered) && silent > SILENT_S) this.lost();
    // A browser gives up after some errors, and a connection may break without a word: then a new one. One that connects, or
    // takes a snapshot, has its time.
    const broken = silent > SILENT_S && tried > this.patience;
    if (this.state === "lost" && (this.source.readyState === EventSource.CLOSED || broken)) {
      if (broken && this.triedAt > this.heardAt) this.patience = Math.min(PATIENCE_S, 2 * this.patience);
      this.source.close();
      this.connect();
    }
    this.changed(new Set(["link"]), false);
  }

  get cluster() {
    return this.tables.cluster.get("");
  }
}
