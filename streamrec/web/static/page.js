// The live part: server-sent events in, tiles and charts out.

import { HitRates, Latency, Rates } from "./charts.js";
import { ask, byId, clock, count, el, milliseconds, replace, say, seconds, short } from "./dom.js";
import * as user from "./user.js";

const POINTS = 3600; // as many as the daemon keeps
const AGAIN_MS = 2000;

const hit_rates = new HitRates();
const latency = new Latency();
const rates = new Rates();
let points = [];
let source = null;
let paused = false;
let dead_letters = -1;

function state(kind, text) {
  byId("state").dataset.state = kind;
  say("state", text);
}

function open() {
  if (source || paused || document.hidden) return;
  source = new EventSource("api/live");
  source.addEventListener("about", (event) => {
    const about = JSON.parse(event.data);
    points = [];
    say("topic", about.topic);
    say("group", about.group);
    user.start(about);
  });
  source.addEventListener("live", (event) => show(JSON.parse(event.data)));
  source.addEventListener("error", async () => {
    close();
    state("bad", "connection lost, trying again");
    setTimeout(open, AGAIN_MS);
    await ask("api/dead-letters").catch(() => undefined); // asks for the token again where it is wanted
  });
}

function close() {
  source?.close();
  source = null;
}

function show({ now, points: more, swaps }) {
  points = points.concat(more).slice(-POINTS);
  state(now.not_ready ? "wait" : "live", now.not_ready ?? "live");
  tiles(now);
  latency.show(now);
  if (more.length || !points.length) {
    hit_rates.show(points, swaps);
    rates.show(points, now);
  }
  if (now.dead_letters !== dead_letters) {
    dead_letters = now.dead_letters;
    show_dead_letters().catch(() => undefined);
  }
}

function tiles(now) {
  const windows = now.cache_hits + now.cache_misses;
  say("version", short(now.version));
  byId("version").title = now.version;
  say("events-per-s", count(now.events_per_s));
  say("events", `${count(now.events)} since the start`);
  say("p50", milliseconds(now.p50_ms));
  say("p99", now.p99_ms === null ? "no click yet" : `99 % within ${milliseconds(now.p99_ms)}`);
  const since = now.whole ? "All clicks since the start" : "Clicks of the last minute";
  const within = `half within ${milliseconds(now.p50_ms)}, 95 % within ${milliseconds(now.p95_ms)}, 99 % within ${milliseconds(now.p99_ms)}`;
  say("latency-hint", now.p50_ms === null ? "No click yet." : `${since}: ${within}.`);
  say("lag", count(now.lag_records));
  say("lag-s", now.lag_records ? `records, ${seconds(now.lag_s)} behind` : "records wait");
  say("hit-rate", now.judged ? (now.hits / now.judged).toFixed(3) : "-");
  const times = now.popularity_hits ? `${(now.hits / now.popularity_hits).toFixed(1)} times popularity's` : "popularity's";
  say("popularity", now.judged ? `${times} ${(now.popularity_hits / now.judged).toFixed(3)}` : "no click yet");
  say("cache", windows ? `${((100 * now.cache_hits) / windows).toFixed(1)} %` : "-");
  say("cached", `${count(now.cached_users)} users in it`);
  say("dead", count(now.dead_letters));
}

async function show_dead_letters() {
  const letters = await ask("api/dead-letters");
  byId("dead-table").hidden = !letters.length;
  byId("dead-link").textContent = letters.length ? letters[0].reason.slice(0, 60) : "none";
  replace(byId("dead-table").tBodies[0], letters.map((letter) =>
    el("tr", {}, ...[clock(letter.at_ms), letter.partition, letter.offset, letter.reason].map((cell) => el("td", {}, `${cell}`)))));
}

byId("pause").addEventListener("click", () => {
  paused = !paused;
  user.pause(paused);
  byId("pause").setAttribute("aria-pressed", paused);
  byId("pause").textContent = paused ? "Go on" : "Pause";
  if (paused) {
    close();
    state("wait", "paused");
  } else open();
});
document.addEventListener("visibilitychange", () => (document.hidden ? close() : open()));
open();
