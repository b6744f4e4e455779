// The three charts, drawn by uPlot. Each has a legend, and a sentence for screen readers.

import { byId, clock, count, el, milliseconds, replace_children, short, svg } from "./dom.js";

// a hit rate covers the last SMOOTH_POINTS seconds, or fewer that have SMOOTH_CLICKS clicks; below MIN_CLICKS there is none
const SMOOTH_POINTS = 15;
const SMOOTH_CLICKS = 500;
const MIN_CLICKS = 20;
const MIN_BUCKETS = 10;

const color = (name) => getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();

function axis(more) {
  return { stroke: color("soft"), grid: { stroke: color("grid"), width: 1 }, ticks: { stroke: color("line"), width: 1 }, font: "12px system-ui", ...more };
}

// A chart in an element of the page. A change of its series or of the color scheme makes a new one.
class Chart {
  constructor(id, height) {
    this.element = byId(id);
    this.height = height;
    this.shape = null; // identifies the series that are drawn
    new ResizeObserver(() => this.plot?.setSize(this.size())).observe(this.element);
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
      this.shape = null;
      if (this.last) this.draw(...this.last);
    });
  }

  size() {
    return { width: Math.max(200, this.element.clientWidth), height: this.height };
  }

  // options() is called only if the shape has changed
  draw(shape, options, data) {
    this.last = [shape, options, data];
    if (shape === this.shape) return this.plot.setData(data);
    this.shape = shape;
    this.plot?.destroy();
    this.plot = new uPlot({ ...this.size(), legend: { show: false }, ...options() }, data, this.element);
  }

  describe(sentence) {
    if (this.element.getAttribute("aria-label") !== sentence) this.element.setAttribute("aria-label", sentence);
  }
}

function legend(id, entries) {
  replace_children(byId(id), entries.map(({ name, title, stroke, dash, value }) => {
    const line = svg("line", { x1: 0, y1: 5, x2: 22, y2: 5, stroke, "stroke-width": 3, "stroke-dasharray": dash ?? "" });
    const sample = svg("svg", { width: 22, height: 10, "aria-hidden": "true" }, line);
    return el("li", { title }, sample, el("span", {}, name), el("b", {}, value));
  }));
}

const time = (points) => points.map((point) => point[0] / 1000);
const clocks = (u, ticks) => ticks.map((s) => clock(s * 1000).slice(0, ticks.length > 1 && ticks[1] - ticks[0] < 60 ? 8 : 5));
const x_axis = () => axis({ values: clocks, space: 70, size: 30 });

// Rates over the last seconds and clicks, null at points without a click. A cell is [judged, hits, popularity hits];
// column is the index of the hits to count.
function rates(points, cells, column) {
  const sums = [[0, 0, 0]];
  for (const cell of cells) sums.push(sums.at(-1).map((sum, i) => sum + (cell ? cell[i] : 0)));
  let from = 0;
  return points.map((_, at) => {
    while (from < at - SMOOTH_POINTS + 1 && sums[at + 1][0] - sums[from + 1][0] >= SMOOTH_CLICKS) from++;
    const clicks = sums[at + 1][0] - sums[from][0];
    return cells[at] && clicks >= MIN_CLICKS ? (sums[at + 1][column] - sums[from][column]) / clicks : null;
  });
}

const last = (values) => values.findLast((value) => value !== null) ?? null;
const share = (value) => (value === null ? "-" : value.toFixed(3));

export class HitRates {
  constructor() {
    this.chart = new Chart("hit-plot", 250);
    this.swaps = [];
  }

  show(points, swaps) {
    this.swaps = swaps;
    const versions = [...new Set(points.flatMap((point) => Object.keys(point[5])))].slice(-5);
    const all = points.map((point) => {
      const cells = Object.values(point[5]);
      return cells.length ? [0, 1, 2].map((i) => cells.reduce((sum, cell) => sum + cell[i], 0)) : null;
    });
    const lines = versions.map((version) => rates(points, points.map((point) => point[5][version]), 1));
    const popularity = rates(points, all, 2);
    this.chart.draw(versions.join("\n"), () => this.options(versions), [time(points), popularity, ...lines]);
    legend("hit-legend", [
      ...versions.map((version, i) => ({ name: `model ${short(version)}`, title: version, stroke: color(`series-${i}`), value: share(last(lines[i])) })),
      { name: "popularity", stroke: color("popular"), dash: "5 4", value: share(last(popularity)) },
    ]);
    replace_children(byId("swaps"), swaps.slice(-5).map((swap) =>
      el("li", {}, `${clock(swap.at_ms)}: ${short(swap.before)} replaced by ${short(swap.after)}`)));
    const parts = versions.map((version, i) => `model ${version} ${share(last(lines[i]))}`);
    this.chart.describe(`Hit rate at 10 over time, now: ${[...parts, `popularity ${share(last(popularity))}`].join(", ")}; ${swaps.length} model swaps`);
  }

  options(versions) {
    const line = (stroke, more) => ({ stroke, width: 2, spanGaps: true, points: { show: false }, ...more });
    return {
      series: [{}, line(color("popular"), { dash: [5, 4] }), ...versions.map((_, i) => line(color(`series-${i}`)))],
      scales: { y: { range: (u, low, high) => [0, Math.max(0.05, (high ?? 0) * 1.15)] } },
      axes: [x_axis(), axis({ size: 46, values: (u, ticks) => ticks.map((tick) => tick.toFixed(2)) })],
      padding: [20, 18, 0, 0], // room for the labels of swaps above, and for the last time of day on the right
      cursor: { y: false },
      hooks: { draw: [(u) => this.mark(u)] },
    };
  }

  // Draw a line and a label at each model swap.
  mark(u) {
    const { ctx, bbox } = u;
    ctx.save();
    ctx.font = `${12 * devicePixelRatio}px system-ui`;
    ctx.fillStyle = ctx.strokeStyle = color("ink");
    ctx.setLineDash([4 * devicePixelRatio, 4 * devicePixelRatio]);
    for (const swap of this.swaps) {
      const x = u.valToPos(swap.at_ms / 1000, "x", true);
      if (x < bbox.left || x > bbox.left + bbox.width) continue;
      ctx.beginPath();
      ctx.moveTo(x, bbox.top);
      ctx.lineTo(x, bbox.top + bbox.height);
      ctx.stroke();
      const label = `new model ${short(swap.after)}`;
      const left = x + ctx.measureText(label).width + 8 * devicePixelRatio > bbox.left + bbox.width;
      ctx.textAlign = left ? "right" : "left";
      ctx.fillText(label, x + (left ? -6 : 6) * devicePixelRatio, bbox.top - 6 * devicePixelRatio);
    }
    ctx.restore();
  }
}

export class Latency {
  constructor() {
    this.chart = new Chart("latency-plot", 210);
  }

  // Show every bucket with clicks, and a few on both sides.
  show(now) {
    const full = now.latency.map(([, n], i) => (n ? i : -1)).filter((i) => i >= 0);
    let from = Math.max(0, (full[0] ?? 3) - 1);
    let to = Math.min(now.latency.length - 1, (full.at(-1) ?? 12) + 1);
    while (to - from + 1 < MIN_BUCKETS && (from > 0 || to < now.latency.length - 1)) {
      from = Math.max(0, from - 1);
      to = Math.min(now.latency.length - 1, to + 1);
    }
    const shown = now.latency.slice(from, to + 1);
    const names = shown.map(([bound]) => (bound === null ? "more" : bound < 1 ? `${+(bound * 1000).toFixed(1)}` : `${bound} s`));
    const data = [shown.map((_, i) => i), shown.map(([, n]) => n)];
    this.chart.draw(names.join(" "), () => this.options(names), data);
    this.chart.describe(`Distribution from click to published list: median ${milliseconds(now.p50_ms)}, 95 % within ${milliseconds(now.p95_ms)}, 99 % within ${milliseconds(now.p99_ms)}`);
  }

  options(names) {
    const fill = color("series-0");
    return {
      series: [{}, { fill, stroke: fill, width: 0, paths: uPlot.paths.bars({ size: [0.85, 60], radius: 0.15 }), points: { show: false } }],
      scales: { x: { time: false, range: [-0.6, names.length - 0.4] }, y: { range: (u, low, high) => [0, Math.max(4, (high ?? 0) * 1.1)] } },
      axes: [
        axis({ values: (u, ticks) => ticks.map((i) => (i % Math.ceil((names.length * 36) / u.width) ? "" : names[i])), splits: () => names.map((_, i) => i), grid: { show: false }, label: "milliseconds, up to", size: 28, labelSize: 18, labelFont: "12px system-ui" }),
        axis({ size: 50, values: (u, ticks) => ticks.map((tick) => (Number.isInteger(tick) ? count(tick) : "")) }),
      ],
      cursor: { show: false },
    };
  }
}

export class Rates {
  constructor() {
    this.chart = new Chart("rate-plot", 190);
  }

  show(points, now) {
    const data = [time(points), points.map((point) => point[1]), points.map((point) => point[2])];
    this.chart.draw("rates", () => this.options(), data);
    legend("rate-legend", [
      { name: "events per second", stroke: color("series-2"), value: count(now.events_per_s) },
      { name: "waiting records", stroke: color("series-1"), dash: "5 4", value: count(now.lag_records) },
    ]);
    this.chart.describe(`Events per second over time, now ${count(now.events_per_s)}; ${count(now.lag_records)} waiting records`);
  }

  options() {
    const from_zero = { range: (u, low, high) => [0, Math.max(5, (high ?? 0) * 1.15)] };
    const values = (u, ticks) => ticks.map((tick) => (Number.isInteger(tick) ? count(tick) : ""));
    return {
      padding: [8, 0, 0, 0],
      series: [
        {},
        { stroke: color("series-2"), width: 2, fill: `${color("series-2")}22`, points: { show: false } },
        { stroke: color("series-1"), width: 2, dash: [5, 4], scale: "lag", points: { show: false } },
      ],
      scales: { y: from_zero, lag: from_zero },
      axes: [x_axis(), axis({ size: 50, values }), axis({ size: 50, values, scale: "lag", side: 1, grid: { show: false } })],
      cursor: { y: false },
    };
  }
}
