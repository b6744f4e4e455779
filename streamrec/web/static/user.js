// A user: the last clicks, the published list, and the explanation of an item. In the demo visitors click themselves.

import { byId, count, el, get_json, milliseconds, post_json, replace_children, seconds, set_text, short, svg } from "./dom.js";

const REFRESH_MS = 1000;
const AFTER_CLICK_MS = 60; // between refreshes until the new list is published
const AFTER_CLICK_TRIES = 50;
const TYPING_MS = 150;

// item: the explained one, the first of the list unless the viewer chose another;
// state: identifies the drawn clicks and list; n: the user's events at that time; items: ids of the list
const nothing = () => ({ user: "", item: "", chosen: false, state: "", n: 0, items: new Set() });
const shown = nothing();
let demo = false;
let paused = false;
let own = "";
let clicked_ms = 0; // time of the own click that waits for its list; 0: none

export function start(about) {
  demo = about.demo;
  byId("click-yourself").hidden = !demo;
}

export function pause(yes) {
  paused = yes;
}

function name(item) {
  const categories = item.categories ? [" ", el("small", {}, item.categories.join(", "))] : [];
  return item.title ? [item.title, " ", el("small", {}, item.id), ...categories] : [item.id, ...categories];
}

function label(item) {
  return item.title ?? item.id;
}

// Call once the viewer pauses typing.
function on_typing(input, call) {
  let timer;
  input.addEventListener("input", () => {
    clearTimeout(timer);
    timer = setTimeout(call, TYPING_MS);
  });
}

async function suggest() {
  const users = await get_json("api/users", { like: byId("search").value.trim() });
  replace_children(byId("users"), users.map((user) => el("option", { value: user })));
}

async function recent() {
  const users = await get_json("api/users");
  // a button that is replaced between press and release gets no click: leave the buttons while one may be pressed
  if (byId("recent").matches(":has(button):is(:hover, :focus-within)")) return;
  replace_children(byId("recent"), users.map((user) => {
    const button = el("button", { type: "button", "data-key": user }, user);
    button.addEventListener("click", () => show(user));
    return button;
  }));
}

function show(user) {
  Object.assign(shown, nothing(), { user });
  clicked_ms = 0;
  byId("search").value = user;
  byId("try").hidden = !demo || user !== own;
  byId("found").hidden = true;
  const hash = user ? `#user=${encodeURIComponent(user)}` : "";
  if (location.hash !== hash) history.replaceState(null, "", hash || " ");
  set_text("user-state", user ? "" : "Type a user id, or choose a recent user.");
  return refresh();
}

async function refresh() {
  const user = shown.user;
  if (!user) return;
  try {
    const found = await get_json("api/user", { id: user });
    if (user === shown.user) draw(found);
  } catch (error) {
    if (user === shown.user) set_text("user-state", error.message);
  }
}

function draw(found) {
  const { list } = found;
  if (!found.n && !list) {
    byId("found").hidden = true;
    const text = shown.user === own ? "You have clicked nothing yet. Click an item." : "This user has no clicks yet, and gets the popular list.";
    if (!clicked_ms) set_text("user-state", text);
    return;
  }
  byId("found").hidden = false;
  set_text("clicks-title", shown.user === own ? "Your last clicks" : `Last clicks of ${shown.user}`);
  set_text("list-title", shown.user === own ? "Your list" : "Published list");
  set_text("list-hint", list ? list_hint(found, list) : "None: it has expired, or was never published. This user gets the popular list.");
  const state = `${found.n} ${list?.n} ${list?.published_ts_ms}`;
  if (state === shown.state) return;
  const first = shown.state === "";
  Object.assign(shown, { state, n: found.n });
  if (!clicked_ms) set_text("user-state", "");
  else if (list && list.published_ts_ms >= clicked_ms) {
    set_text("user-state", `Your new list was published ${milliseconds(list.published_ts_ms - clicked_ms)} after the click.`);
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
  replace_children(byId("list"), items.map((item, place) => {
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
  const { user, item, state } = shown;
  const title = byId("why-title");
  if (!item) {
    title.textContent = "";
    return;
  }
  try {
    const why = await get_json("api/why", { id: user, item });
    if (user !== shown.user || item !== shown.item || state !== shown.state) return;
    if (why.n !== shown.n) {
      await refresh(); // the user has clicked again: show these clicks with the list and explanation that belong to them
      return;
    }
    title.textContent = `Why ${label(why)}? Its score, ${why.score.toFixed(2)}, falls by this much without each click:`;
    draw_clicks(why.clicks);
  } catch (error) {
    if (user === shown.user && item === shown.item) title.textContent = `No explanation: ${error.message}`;
  }
}

function draw_clicks(clicks) {
  const largest = Math.max(0.01, ...clicks.map((click) => Math.abs(click.fall ?? 0)));
  replace_children(byId("clicks"), clicks.map((click) => {
    const { fall } = click;
    const sign = Math.abs(fall ?? 0) < 0.005 ? "" : fall < 0 ? "−" : "+";
    const text = fall === undefined ? "" : fall === null ? "not seen" : `${sign}${Math.abs(fall).toFixed(2)}`;
    return el("li", {}, el("span", { class: "name", title: label(click) }, ...name(click)),
      bar(fall ?? 0, largest), el("span", { class: "fall", title: fall === null ? "outside the model's window or vocabulary, or the only click" : "" }, text));
  }));
}

// A bar to the right of the middle raises the score, one to the left lowers it.
function bar(fall, largest) {
  const width = (Math.abs(fall) / largest) * 49;
  return svg("svg", { class: "bar", viewBox: "0 0 100 10", preserveAspectRatio: "none", width: "100%", "aria-hidden": "true" },
    svg("rect", { class: fall < 0 ? "down" : "up", x: fall < 0 ? 50 - width : 50, y: 0, width, height: 10, rx: 1 }),
    svg("line", { x1: 50, y1: 0, x2: 50, y2: 10, "vector-effect": "non-scaling-stroke" }));
}

// --- in the demo only

function click_button(item, text) {
  const button = el("button", { type: "button", "data-key": `click ${item.id}`, "aria-label": `Click ${label(item)}` }, text);
  button.addEventListener("click", () => click(item));
  return button;
}

async function click(item) {
  try {
    const sent = await post_json("api/click", { user_id: own, item_id: item.id });
    clicked_ms = sent.sent_ts_ms;
    set_text("user-state", `You clicked ${label(item)}.`);
    for (let tries = 0; clicked_ms === sent.sent_ts_ms && tries < AFTER_CLICK_TRIES; tries++) {
      await refresh();
      await new Promise((wake) => setTimeout(wake, AFTER_CLICK_MS));
    }
  } catch (error) {
    set_text("user-state", error.message);
  }
}

async function find() {
  const items = await get_json("api/items", { like: byId("find").value });
  replace_children(byId("items"), items.length ? items.map((item) => click_button(item, label(item))) : ["no item with this name"]);
}

function click_yourself() {
  own ||= `visitor-${Math.random().toString(36).slice(2, 8).padEnd(4, "0")}`;
  show(own);
  find();
  byId("find").focus();
}

// --- events

const quietly = (call) => () => call().catch(() => undefined); // the state of the connection shows the problem

byId("lookup").addEventListener("submit", (event) => {
  event.preventDefault();
  show(byId("search").value.trim());
});
byId("click-yourself").addEventListener("click", click_yourself);
on_typing(byId("search"), quietly(suggest));
on_typing(byId("find"), quietly(find));
setInterval(() => {
  if (!paused && !document.hidden) refresh();
}, REFRESH_MS);
setInterval(() => {
  if (!paused && !document.hidden) quietly(recent)();
}, 3 * REFRESH_MS);
quietly(recent)();
const linked = new URLSearchParams(location.hash.slice(1)).get("user");
if (linked) show(linked);
