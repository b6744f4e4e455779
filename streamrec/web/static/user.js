// A user: his last clicks, his published list, and why; in the demo, oneself.

import { ask, byId, count, el, milliseconds, replace, say, seconds, send, short, svg } from "./dom.js";

const REFRESH_MS = 1000;
const AFTER_CLICK_MS = 60;
const TYPING_MS = 150;

// item: whose score is explained, the first one unless another was chosen; seen: what is drawn; items: of that list
const shown = { user: "", item: "", chosen: false, seen: "", items: new Set() };
let demo = false;
let paused = false;
let own = "";
let clicked_ms = 0; // when a click was sent whose list has not come yet

export function start(about) {
  demo = about.demo;
  byId("be").hidden = !demo;
}

export function pause(yes) {
  paused = yes;
}

function name(item) {
  return item.title ? [item.title, " ", el("small", {}, item.id)] : [item.id];
}

function label(item) {
  return item.title ?? item.id;
}

// What is typed is asked for once the typing rests.
function on_typing(input, call) {
  let timer;
  input.addEventListener("input", () => {
    clearTimeout(timer);
    timer = setTimeout(call, TYPING_MS);
  });
}

async function suggest() {
  const users = await ask("api/users", { like: byId("search").value.trim() });
  replace(byId("users"), users.map((user) => el("option", { value: user })));
}

async function recent() {
  const users = await ask("api/users");
  // asked once the answer is there: a button that is replaced between press and release is not clicked
  if (byId("recent").matches(":has(button):is(:hover, :focus-within)")) return; // somebody is about to choose
  replace(byId("recent"), users.map((user) => {
    const button = el("button", { type: "button", "data-key": user }, user);
    button.addEventListener("click", () => show(user));
    return button;
  }));
}

function show(user) {
  Object.assign(shown, { user, item: "", chosen: false, seen: "", items: new Set() });
  clicked_ms = 0;
  byId("search").value = user;
  byId("try").hidden = !demo || user !== own;
  byId("found").hidden = true;
  const hash = user ? `#user=${encodeURIComponent(user)}` : "";
  if (location.hash !== hash) history.replaceState(null, "", hash || " ");
  say("user-state", user ? "" : "Type a user id, or choose one who clicked lately.");
  return refresh();
}

async function refresh() {
  const user = shown.user;
  if (!user) return;
  try {
    const found = await ask("api/user", { id: user });
    if (user === shown.user) draw(found);
  } catch (error) {
    if (user === shown.user) say("user-state", error.message);
  }
}

function draw(found) {
  const { list } = found;
  if (!found.n && !list) {
    byId("found").hidden = true;
    const nothing = "Nothing is known of this user yet: he sees the popular list.";
    if (!clicked_ms) say("user-state", shown.user === own ? "You have clicked nothing yet. Click something." : nothing);
    return;
  }
  byId("found").hidden = false;
  say("clicks-title", shown.user === own ? "Your last clicks" : `Last clicks of ${shown.user}`);
  say("list-title", shown.user === own ? "Your list" : "Published list");
  say("list-hint", list ? list_hint(found, list) : "None: it has expired, or was never made. The popular list is shown instead.");
  const seen = `${found.n} ${list?.n} ${list?.published_ts_ms}`;
  if (seen === shown.seen) return;
  const first = shown.seen === "";
  shown.seen = seen;
  if (!clicked_ms) say("user-state", "");
  else if (list && list.published_ts_ms >= clicked_ms) {
    say("user-state", `Your new list was published ${milliseconds(list.published_ts_ms - clicked_ms)} after the click.`);
    clicked_ms = 0;
  }
  draw_list(list, first);
  draw_clicks(found.clicks.map((click) => ({ ...click, fall: undefined })));
  explain();
}

function list_hint(found, list) {
  const age_s = Math.max(0, found.now_ms - list.published_ts_ms) / 1000;
  return `by model ${short(list.model)}, after ${count(list.n)} clicks, ${seconds(age_s)} ago`;
}

function draw_list(list, first) {
  const items = list?.items ?? [];
  if (!shown.chosen || !items.some((item) => item.id === shown.item)) {
    Object.assign(shown, { item: items[0]?.id ?? "", chosen: false });
  }
  replace(byId("list"), items.map((item, place) => {
    const fresh = !first && !shown.items.has(item.id);
    const why = el("button", { type: "button", "data-key": `why ${item.id}`, "aria-pressed": item.id === shown.item, "aria-label": `Why ${label(item)}?` }, "why");
    why.addEventListener("click", () => {
      Object.assign(shown, { item: item.id, chosen: true });
      for (const button of byId("list").querySelectorAll("[aria-pressed]")) button.setAttribute("aria-pressed", button === why);
      explain();
    });
    const acts = el("span", { class: "acts" }, why);
    if (demo && shown.user === own) acts.append(click_button(item, "click"));
    return el("li", { class: fresh ? "fresh" : null },
      el("span", { class: "n" }, `${place + 1}`), el("span", { class: "name", title: label(item) }, ...name(item)),
      el("span", { class: "score", title: "score" }, item.score.toFixed(2)), acts);
  }));
  shown.items = new Set(items.map((item) => item.id));
}

async function explain() {
  const { user, item, seen } = shown;
  const title = byId("why-title");
  if (!item) {
    title.textContent = "";
    return;
  }
  try {
    const why = await ask("api/why", { id: user, item });
    if (user !== shown.user || item !== shown.item || seen !== shown.seen) return;
    title.textContent = `Why ${label(why)}? How far its score, ${why.score.toFixed(2)}, falls when a click is left out:`;
    draw_clicks(why.clicks);
  } catch (error) {
    if (user === shown.user && item === shown.item) title.textContent = `Why cannot be told: ${error.message}`;
  }
}

function draw_clicks(clicks) {
  const most = Math.max(0.01, ...clicks.map((click) => Math.abs(click.fall ?? 0)));
  replace(byId("clicks"), clicks.map((click) => {
    const { fall } = click;
    const sign = Math.abs(fall ?? 0) < 0.005 ? "" : fall < 0 ? "−" : "+";
    const said = fall === undefined ? "" : fall === null ? "not seen" : `${sign}${Math.abs(fall).toFixed(2)}`;
    return el("li", {}, el("span", { class: "name", title: label(click) }, ...name(click)),
      bar(fall ?? 0, most), el("span", { class: "fall", title: fall === null ? "outside the model's window or vocabulary, or the only click" : "" }, said));
  }));
}

// From the middle to the right what holds the item up, to the left what holds it down.
function bar(fall, most) {
  const width = (Math.abs(fall) / most) * 49;
  return svg("svg", { class: "bar", viewBox: "0 0 100 10", preserveAspectRatio: "none", width: "100%", "aria-hidden": "true" },
    svg("rect", { class: fall < 0 ? "down" : "up", x: fall < 0 ? 50 - width : 50, y: 0, width, height: 10, rx: 1 }),
    svg("line", { x1: 50, y1: 0, x2: 50, y2: 10, "vector-effect": "non-scaling-stroke" }));
}

// --- only in the demo

function click_button(item, text) {
  const button = el("button", { type: "button", "data-key": `click ${item.id}`, "aria-label": `Click ${label(item)}` }, text);
  button.addEventListener("click", () => click(item));
  return button;
}

async function click(item) {
  try {
    const sent = await send("api/click", { user_id: own, item_id: item.id });
    clicked_ms = sent.sent_ts_ms;
    say("user-state", `You clicked ${label(item)}.`);
    for (let tries = 0; clicked_ms === sent.sent_ts_ms && tries < 50; tries++) {
      await refresh();
      await new Promise((wake) => setTimeout(wake, AFTER_CLICK_MS));
    }
  } catch (error) {
    say("user-state", error.message);
  }
}

async function find() {
  const items = await ask("api/items", { like: byId("find").value });
  replace(byId("items"), items.length ? items.map((item) => click_button(item, label(item))) : ["nothing of that name"]);
}

function be() {
  own ||= `visitor-${Math.random().toString(36).slice(2, 8).padEnd(4, "0")}`;
  show(own);
  find();
  byId("find").focus();
}

// --- wiring

const quietly = (call) => () => call().catch(() => undefined); // the state above says what is wrong

byId("lookup").addEventListener("submit", (event) => {
  event.preventDefault();
  show(byId("search").value.trim());
});
byId("be").addEventListener("click", be);
on_typing(byId("search"), quietly(suggest));
on_typing(byId("find"), quietly(find));
setInterval(() => {
  if (!paused && !document.hidden) refresh();
}, REFRESH_MS);
setInterval(() => {
  if (!paused && !document.hidden) quietly(recent)();
}, 3 * REFRESH_MS);
quietly(recent)();
const asked = new URLSearchParams(location.hash.slice(1)).get("user");
if (asked) show(asked);
