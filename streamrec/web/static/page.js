// The live part of the page: draws tiles, charts and dead letters from server-sent events.
// One event holds everything of one moment; numbers and their details are never fetched apart.

import { HitRates, Latency, Rates } from "./charts.js";
import { byId, clock, count, el, get_json, milliseconds, replace_children, seconds, set_text, short } from "./dom.js";
import * as user from "./user.js";

const MAX_POINTS = 3600; // as in history.py
const RECONNECT_MS = 2000;

const hit_rates = new HitRates();
const latency = new Latency();
const rates = new Rates();
let points = [];
let source = null;
let paused = false;

function set_state(kind, text) {
  byId("state").dataset.state = kind;
  set_text("state", text);
}

function open() {
  if (source || paused || document.hidden) return;
  source = new EventSource("api/live");
  source.addEventListener("about", (event) => {
    const about = JSON.parse(event.data);
    points = [];
    set_text("topic", about.topic);
    set_text("group", about.group);
    user.start(about);
  });
  source.addEventListener("live", (event) => show(JSON.parse(event.data)));
  source.addEventListener("error", async () => {
    close();
    set_state("bad", "connection lost, reconnecting");
    setTimeout(open, RECONNECT_MS);
    await get_json("api/users").catch(() => undefined); // shows the login form if the token has changed
  });
}

function close() {
  source?.close();
  source = null;
}

function show({ now, points: more, swaps, dead_letters }) {
  points = points.concat(more).slice(-MAX_POINTS);
  set_state(now.not_ready ? "wait" : "live", now.not_ready ?? "live");
  show_tiles(now);
  latency.show(now);
  if (more.length || !points.length) {
    hit_rates.show(points, swaps);
    rates.show(points, now);
  }
  if (dead_letters) show_dead_letters(dead_letters);
}

function show_tiles(now) {
  const windows = now.cache_hits + now.cache_misses;
  set_text("version", short(now.version) + (now.on_hold ? " (on hold)" : ""));
  byId("version").title = now.on_hold ? `${now.version}: on hold, no round of retraining promotes` : now.version;
  set_text("events-per-s", count(now.events_per_s));
  set_text("events", `${count(now.events)} since the start`);
  set_text("p50", milliseconds(now.p50_ms));
  set_text("p99", now.p99_ms === null ? "no click yet" : `99 % within ${milliseconds(now.p99_ms)}`);
  const since = now.since_start ? "All clicks since the start" : "Clicks of the last minute";
  const within = `half within ${milliseconds(now.p50_ms)}, 95 % within ${milliseconds(now.p95_ms)}, 99 % within ${milliseconds(now.p99_ms)}`;
  set_text("latency-hint", now.p50_ms === null ? "No click yet." : `${since}: ${within}.`);
  set_text("lag", count(now.lag_records));
  set_text("lag-s", now.lag_records ? `records, ${seconds(now.lag_s)} behind` : "waiting records");
  set_text("hit-rate", now.judged ? (now.hits / now.judged).toFixed(3) : "-");
  const times = now.popularity_hits ? `${(now.hits / now.popularity_hits).toFixed(1)} times popularity's` : "popularity's";
  set_text("popularity", now.judged ? `${times} ${(now.popularity_hits / now.judged).toFixed(3)}` : "no click yet");
  set_text("cache", windows ? `${((100 * now.cache_hits) / windows).toFixed(1)} %` : "-");
  set_text("cached", `${count(now.cached_users)} cached users`);
  set_text("dead", count(now.dead_letters));
}

function show_dead_letters(letters) {
  byId("dead-table").hidden = !letters.length;
  byId("dead-link").textContent = letters.length ? letters[0].reason.slice(0, 60) : "none";
  replace_children(byId("dead-table").tBodies[0], letters.map((letter) =>
    el("tr", {}, ...[clock(letter.at_ms), letter.partition, letter.offset, letter.reason].map((cell) => el("td", {}, `${cell}`)))));
}

byId("pause").addEventListener("click", () => {
  paused = !paused;
  user.pause(paused);
  byId("pause").setAttribute("aria-pressed", paused);
  byId("pause").textContent = paused ? "Resume" : "Pause";
  if (paused) {
    close();
    set_state("wait", "paused");
  } else open();
});
document.addEventListener("visibilitychange", () => (document.hidden ? close() : open()));
open();
