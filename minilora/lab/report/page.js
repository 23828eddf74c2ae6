"use strict";
// Draws the charts from the page's data, and answers to the controls and to the text.
// Texts enter the page as text nodes only.
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const chosen = {}; // the position of each chart's control

  // ---- charts: the names of colours become the shades of the page as it is now ----

  const shade = (name) =>
    getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();

  function coloured(value, key, shades) {
    if (Array.isArray(value)) return value.map((item) => coloured(item, key, shades));
    if (value !== null && typeof value === "object") {
      const items = Object.entries(value);
      return Object.fromEntries(items.map(([k, v]) => [k, coloured(v, k, shades)]));
    }
    const names = typeof value === "string" && (key.endsWith("color") || key === "colorscale");
    return names && value in shades ? shades[value] : value;
  }

  function draw(name) {
    const figure = data.figures[name];
    const shades = Object.fromEntries(data.colours.map((colour) => [colour, shade(colour)]));
    const traces = coloured(figure.traces, "", shades);
    const choice = figure.choices[chosen[name]];
    figure.changed.forEach((trace, i) => {
      traces[trace].x = choice.x[i];
      traces[trace].y = choice.y[i];
    });
    const layout = coloured(figure.layout, "", shades);
    layout.font.family = getComputedStyle(document.body).fontFamily;
    const config = { displayModeBar: false, responsive: true, doubleClick: false };
    Plotly.react(name, traces, layout, config);
  }

  function choose(control) {
    const name = control.dataset.chart;
    const figure = data.figures[name];
    chosen[name] = Number(control.value);
    const choice = figure.choices[chosen[name]];
    document.getElementById(`${name}-output`).textContent = choice.description;
    document.getElementById(name).setAttribute("aria-label", `${figure.alt} ${choice.description}`);
    if (control.type === "range") control.setAttribute("aria-valuetext", choice.name);
    draw(name);
  }

  const drawAll = () => Object.keys(data.figures).forEach(draw);
  for (const [name, figure] of Object.entries(data.figures)) chosen[name] = figure.start;
  drawAll();
  for (const control of document.querySelectorAll("[data-chart]")) {
    const event = control.type === "range" ? "input" : "change";
    control.addEventListener(event, () => choose(control));
  }

  // ---- light, dark, paper ----

  const onPaper = (paper) => {
    document.documentElement.classList.toggle("print", paper);
    drawAll();
  };
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawAll);
  addEventListener("beforeprint", () => onPaper(true));
  addEventListener("afterprint", () => onPaper(false));

  // ---- the text: one stop of the Tab key, arrows inside ----

  const text = document.getElementById("tokens");
  if (!text) return;
  const tokens = [...text.children];
  const rows = document.getElementById("token-table").tBodies[0].rows;
  const panel = document.getElementById("token-output");
  let current = 0;

  function element(kind, style, ...inside) {
    const made = document.createElement(kind);
    made.className = style;
    made.append(...inside);
    return made;
  }

  function copied(cell) {
    return [...cell.cloneNode(true).childNodes];
  }

  function show(i) {
    const [token, base, adapted, change, baseGuesses, adaptedGuesses] = rows[i].cells;
    const column = (title, cell) =>
      element("div", "", element("div", "head", title), ...copied(cell));
    panel.replaceChildren(
      element("div", "token", ...copied(token)),
      element(
        "div", "",
        `loss ${base.textContent} \u2192 ${adapted.textContent} nats (${change.textContent})`,
      ),
      element(
        "div", "both",
        column("the base expects", baseGuesses),
        column("the adapter expects", adaptedGuesses),
      ),
    );
  }

  function select(i) {
    tokens[current].tabIndex = -1;
    tokens[current].setAttribute("aria-selected", "false");
    current = i;
    tokens[i].tabIndex = 0;
    tokens[i].setAttribute("aria-selected", "true");
    show(i);
  }

  // The token in the line above (-1) or below (1) that is nearest to the left edge of this one.
  function inNextLine(direction) {
    const box = (token) => token.getClientRects()[0] ?? token.getBoundingClientRect();
    const from = box(tokens[current]);
    let best = current;
    let line = null;
    for (let i = current + direction; i >= 0 && i < tokens.length; i += direction) {
      const to = box(tokens[i]);
      if (Math.abs(to.top - from.top) < from.height / 2) continue;
      if (line === null) line = to.top;
      if (Math.abs(to.top - line) > from.height / 2) break;
      const nearer = Math.abs(to.left - from.left) < Math.abs(box(tokens[best]).left - from.left);
      if (best === current || nearer) best = i;
    }
    return best;
  }

  const moves = {
    ArrowLeft: () => Math.max(0, current - 1),
    ArrowRight: () => Math.min(tokens.length - 1, current + 1),
    ArrowUp: () => inNextLine(-1),
    ArrowDown: () => inNextLine(1),
    Home: () => 0,
    End: () => tokens.length - 1,
  };
  text.addEventListener("keydown", (event) => {
    const move = moves[event.key];
    if (!move || event.ctrlKey || event.altKey || event.metaKey) return;
    event.preventDefault();
    tokens[move()].focus();
  });
  text.addEventListener("focusin", (event) => select(tokens.indexOf(event.target)));
  text.addEventListener("mouseover", (event) => {
    const i = tokens.indexOf(event.target);
    if (i >= 0) show(i);
  });
  text.addEventListener("mouseleave", () => {
    if (tokens[current].getAttribute("aria-selected") === "true") show(current);
  });
})();
