// Figures are drawn when they come into view, in the colours of the reader's system.
"use strict";
const dark = matchMedia("(prefers-color-scheme: dark)");

function looks(isDark) {
  const ink = isDark ? "#ddd" : "#2a3f5f", grid = isDark ? "#333" : "#e8e8ec";
  const own = structuredClone(TEMPLATE), layout = own.layout;
  Object.assign(layout, {paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)"});
  layout.font = {...layout.font, color: ink};
  layout.modebar = {bgcolor: "rgba(0,0,0,0)", color: isDark ? "#777" : "#aaa"};
  for (const axis of ["xaxis", "yaxis"])
    layout[axis] = {...layout[axis], gridcolor: grid, linecolor: isDark ? "#666" : "#999"};
  return own;
}

function step(axis) {  // decades on a logarithmic axis, or 1, 2 and 5 where it has fewer than three
  if (axis.type !== "log") return null;
  const [low, high] = axis.range, decades = Math.floor(high) - Math.ceil(low) + 1;
  return decades >= 3 ? Math.ceil(decades / 9) : high - low > 0.5 ? "D2" : null;
}

function draw(box, isDark = dark.matches) {
  const place = box.querySelector(".figure");
  if (place.data) return;
  const figure = JSON.parse(box.querySelector("script").textContent);
  Plotly.newPlot(place, figure.data, {...figure.layout, template: looks(isDark)},
    {displaylogo: false, responsive: true, modeBarButtonsToRemove: ["select2d", "lasso2d"]});
  if (!("scale" in box.dataset)) return;
  const button = document.createElement("button");
  button.className = "scale";
  const tell = () => { button.textContent = place.layout.yaxis.type === "log" ? "linear" : "log"; };
  button.onclick = () => {
    const type = place.layout.yaxis.type === "log" ? "linear" : "log";
    Plotly.relayout(place, {"yaxis.type": type, "yaxis.autorange": true, "yaxis.dtick": null})
      .then(() => Plotly.relayout(place, {"yaxis.dtick": step(place.layout.yaxis)})).then(tell);
  };
  tell();
  box.append(button);
}

function recolour(isDark) {
  for (const place of document.querySelectorAll(".figure"))
    if (place.data) Plotly.relayout(place, {template: looks(isDark)});
}

const boxes = [...document.querySelectorAll(".plot")];
const seen = new IntersectionObserver(
  entries => entries.filter(entry => entry.isIntersecting).forEach(entry => draw(entry.target)),
  {rootMargin: "400px"});
boxes.forEach(box => seen.observe(box));
function drawRest() {  // while nobody waits, so that scrolling does not
  const next = boxes.find(box => !box.querySelector(".figure").data && !box.closest("[hidden]"));
  if (next) { draw(next); setTimeout(drawRest, 50); }
}
setTimeout(drawRest, 500);
dark.addEventListener("change", () => recolour(dark.matches));
const PAPER = 690;  // pixels of a printed page, which wide figures would not fit
function widen(layout) {
  for (const place of document.querySelectorAll(".plot.wide .figure"))
    if (place.data) Plotly.relayout(place, layout);
}
addEventListener("beforeprint", () => {
  boxes.filter(box => !box.closest("[hidden]")).forEach(box => draw(box, false));
  recolour(false);
  widen({width: PAPER});
});
addEventListener("afterprint", () => {
  recolour(dark.matches);
  widen({width: null, autosize: true});
});

const choice = document.getElementById("choice");
function choose() {
  for (const box of document.querySelectorAll("[data-prompt]"))
    box.hidden = box.dataset.prompt !== choice.value;
  setTimeout(drawRest, 50);
}
if (choice) {
  choice.addEventListener("change", choose);
  choose();
}
