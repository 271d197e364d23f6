"use strict";
// Read values off the charts: every chart over the training steps follows the one under the pointer or the keyboard.
const whole = { maximumSignificantDigits: 4, maximumFractionDigits: 0, roundingPriority: "morePrecision" };
const write = (value) => value.toLocaleString("en", whole);

function readSeries(link) {
  const series = new Map();
  const lines = decodeURIComponent(link.href.slice(link.href.indexOf(",") + 1)).split("\n").slice(1);
  for (const line of lines) {
    const [name, step, value] = line.split(",");
    if (!series.has(name)) series.set(name, { steps: [], values: [] });
    series.get(name).steps.push(Number(step));
    series.get(name).values.push(Number(value));
  }
  return series;
}

// The index of the step closest to the given one.
function nearest(steps, step) {
  let low = 0, high = steps.length - 1;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (steps[middle] < step) low = middle + 1; else high = middle;
  }
  return low > 0 && step - steps[low - 1] < steps[low] - step ? low - 1 : low;
}

const charts = [...document.querySelectorAll("figure.curve")].map((figure) => ({
  plot: figure.querySelector("svg.plot"),
  cross: figure.querySelector(".cross"),
  step: figure.querySelector("[data-step]"),
  values: [...figure.querySelectorAll("[data-series]")],
  series: readSeries(figure.querySelector("a[download]")),
}));

function show(step) {
  for (const chart of charts) {
    const { low, high } = chart.plot.dataset;
    const place = `${(100 * (step - low)) / (high - low)}%`;
    for (const end of ["x1", "x2"]) chart.cross.setAttribute(end, place);
    chart.cross.setAttribute("visibility", "visible");
    chart.step.textContent = write(Math.round(step));
    for (const element of chart.values) {
      const { steps, values } = chart.series.get(element.dataset.series);
      element.textContent = write(values[nearest(steps, step)]);
    }
  }
}

function rest() {
  for (const chart of charts) {
    chart.cross.setAttribute("visibility", "hidden");
    for (const element of [chart.step, ...chart.values]) element.textContent = element.dataset.last;
  }
}

for (const chart of charts) {
  const { plot } = chart;
  const low = Number(plot.dataset.low), high = Number(plot.dataset.high);
  let current = high;
  const go = (step) => show(current = Math.min(high, Math.max(low, step)));
  plot.addEventListener("pointermove", (event) => {
    const box = plot.getBoundingClientRect();
    go(low + ((high - low) * (event.clientX - box.left)) / box.width);
  });
  plot.addEventListener("pointerleave", rest);
  plot.addEventListener("focus", () => { if (plot.matches(":focus-visible")) go(current); });
  plot.addEventListener("blur", rest);
  plot.addEventListener("keydown", (event) => {
    const stride = Math.max(1, (high - low) / 100);
    const moves = { ArrowLeft: current - stride, ArrowRight: current + stride, Home: low, End: high };
    if (!(event.key in moves)) return;
    event.preventDefault();
    go(moves[event.key]);
  });
}

const toggle = document.querySelector("#theme");
const dark = () => {
  const chosen = document.documentElement.dataset.theme;
  return chosen ? chosen === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
};
const label = () => { toggle.textContent = dark() ? "Light theme" : "Dark theme"; };
toggle.hidden = false;
toggle.addEventListener("click", () => {
  document.documentElement.dataset.theme = dark() ? "light" : "dark";
  label();
});
label();
