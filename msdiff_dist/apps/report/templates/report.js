"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const narrow = matchMedia("(max-width: 640px)");
  const AXES = {step: "step", images: "images", pflop: "PFLOP"};
  const DASHES = ["solid", "dashed", "dotted"];
  const COLOURS = 8;

  // Columns of numbers; null, a gap, is NaN for Bokeh.
  const sources = {};
  for (const [name, columns] of Object.entries(data.sources)) {
    sources[name] = {};
    for (const [key, column] of Object.entries(columns)) sources[name][key] = column.map(v => v === null ? NaN : v);
  }

  // What a reader chose stays when the page refreshes itself; a browser may forbid to remember it.
  const kept = {
    get(key) { try { return sessionStorage.getItem(location.pathname + key); } catch { return null; } },
    set(key, value) { try { sessionStorage.setItem(location.pathname + key, value); } catch { /* forgotten */ } },
  };

  const css = name => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const colour = i => css(`--c${i % COLOURS}`);
  const colourChips = () => {
    for (const chip of document.querySelectorAll(".chip")) chip.style.background = colour(Number(chip.dataset.colour));
  };

  let axis = kept.get("axis") in AXES ? kept.get("axis") : "step";
  const hidden = new Map();  // chart -> labels that the reader switched off
  const drawings = new Map();  // figure -> Bokeh's view

  const positive = column => column.map(v => v > 0 ? v : NaN);

  function build(chart, number) {
    const overTraining = chart.x_label === null;
    const figure = Bokeh.Plotting.figure({
      sizing_mode: "stretch_both", min_width: 100, min_height: 100,
      x_axis_label: overTraining ? AXES[axis] : chart.x_label, y_axis_label: chart.y_label,
      y_axis_type: chart.log ? "log" : "linear",
      tools: narrow.matches ? "" : "box_zoom,pan,reset,save",
      // A finger that moves over a chart scrolls the page.
      active_drag: narrow.matches ? null : "auto",
      toolbar_location: narrow.matches ? null : "above", toolbar_inner: true,
    });
    figure.toolbar.logo = null;
    figure.toolbar.autohide = true;
    const off = hidden.get(number) ?? new Set();
    const tips = [];
    for (const line of chart.series) {
      const columns = sources[line.source];
      const x = columns[line.x ?? axis];
      const scaled = chart.log ? positive(columns[line.y]) : columns[line.y];
      const shown = {name: line.label, visible: !off.has(line.label)};
      if (line.style === "area") {
        const source = new Bokeh.ColumnDataSource({data: {x, y1: columns[line.base], y2: scaled}});
        figure.varea({field: "x"}, {field: "y1"}, {field: "y2"}, {source, fill_color: colour(line.colour), fill_alpha: 0.75, ...shown});
        continue;
      }
      if (line.style === "band") {
        const source = new Bokeh.ColumnDataSource({data: {x, y1: columns[line.base], y2: scaled}});
        figure.varea({field: "x"}, {field: "y1"}, {field: "y2"}, {source, fill_color: colour(line.colour), fill_alpha: 0.15, ...shown});
        continue;
      }
      const source = new Bokeh.ColumnDataSource({data: {x, y: scaled}});
      tips.push(figure.line({field: "x"}, {field: "y"}, {
        source, line_color: colour(line.colour), line_width: 1.8, line_dash: DASHES[line.dash], line_join: "round", ...shown,
      }));
      if (line.style === "dots" || x.length === 1) {
        figure.scatter({field: "x"}, {field: "y"}, {source, size: 6, fill_color: colour(line.colour), line_color: null, ...shown});
      }
    }
    const name = overTraining ? AXES[axis] : chart.x_label.split(",")[0];
    if (tips.length) {
      figure.add_tools(new Bokeh.HoverTool({
        renderers: tips, tooltips: [["", "$name"], [name, "@x{0,0.[0000]}"], [chart.y_label, "@y{0.[00000]a}"]], visible: false,
      }));
    }
    if (chart.log) {
      const drawn = chart.series.flatMap(line => sources[line.source][line.y]);
      for (const ax of [...figure.yaxis, ...figure.ygrid]) ax.ticker = new Bokeh.FixedTicker({ticks: logTicks(drawn)});
    }
    paint(figure);
    return figure;
  }

  // Powers of ten, and between them 2 and 5 where there are few. Bokeh's own leaves axes of a decade without numbers.
  function logTicks(values) {
    const logs = values.filter(v => v > 0).map(Math.log10);
    const low = Math.min(...logs), high = Math.max(...logs);
    const mantissas = high - low < 0.7 ? [1, 1.5, 2, 3, 4, 5, 6, 7, 8, 9] : high - low < 2.5 ? [1, 2, 5] : [1];
    const ticks = [];
    for (let e = Math.floor(low) - 1; e <= Math.ceil(high) + 1; e++) ticks.push(...mantissas.map(m => Number(`${m}e${e}`)));
    return ticks;
  }

  function paint(figure) {
    const [text, soft, line] = [css("--text"), css("--soft"), css("--line")];
    figure.background_fill_color = figure.border_fill_color = null;
    figure.outline_line_color = null;
    figure.min_border = 4;
    for (const ax of [...figure.xaxis, ...figure.yaxis]) {
      Object.assign(ax, {
        axis_label_text_color: soft, major_label_text_color: soft, axis_line_color: line, major_tick_line_color: line,
        minor_tick_line_color: null, axis_label_text_font_style: "normal", axis_label_text_font_size: "12px",
        major_label_text_font_size: "12px", axis_label_text_font: "system-ui, sans-serif",
        major_label_text_font: "system-ui, sans-serif",
      });
    }
    for (const ax of figure.yaxis) {
      ax.formatter = new Bokeh.NumeralTickFormatter({format: "0,0.[000000]"});
    }
    for (const grid of [...figure.xgrid, ...figure.ygrid]) grid.grid_line_color = line;
  }

  async function draw(element) {
    const number = Number(element.dataset.chart);
    const place = element.querySelector(".plot");
    const before = drawings.get(element);
    drawings.set(element, null);
    if (before) before.model.document?.clear();
    place.replaceChildren();
    const view = await Bokeh.Plotting.show(build(data.charts[number], number), place);
    drawings.set(element, view);
    element.dataset.drawn = axis;
    legend(element, number);
  }

  function legend(element, number) {
    const place = element.querySelector(".legend");
    const chart = data.charts[number];
    place.replaceChildren();
    const lines = chart.series.filter(line => line.style !== "band");  // a band is switched with its line
    if (lines.length < 2) return;
    const off = hidden.get(number) ?? new Set();
    for (const line of lines) {
      const button = document.createElement("button");
      button.type = "button";
      button.setAttribute("aria-pressed", String(!off.has(line.label)));
      const mark = document.createElement("i");
      mark.className = `dash${line.dash}`;
      mark.style.borderTopColor = colour(line.colour);
      button.append(mark, line.label);
      button.addEventListener("click", () => {
        off.has(line.label) ? off.delete(line.label) : off.add(line.label);
        hidden.set(number, off);
        draw(element);
      });
      place.append(button);
    }
  }

  // Charts are drawn when they come near the screen: a long report opens at once.
  const near = new IntersectionObserver(entries => {
    for (const entry of entries) {
      if (!entry.isIntersecting) continue;
      near.unobserve(entry.target);
      draw(entry.target);
    }
  }, {rootMargin: "400px"});

  function drawAll() {
    colourChips();
    for (const button of document.querySelectorAll("[data-axis]")) {
      button.setAttribute("aria-pressed", String(button.dataset.axis === axis));
    }
    for (const element of document.querySelectorAll(".chart")) {
      near.unobserve(element);
      near.observe(element);
    }
  }

  for (const button of document.querySelectorAll("[data-axis]")) {
    button.addEventListener("click", () => {
      axis = button.dataset.axis;
      kept.set("axis", axis);
      drawAll();
    });
  }
  dark.addEventListener("change", drawAll);
  narrow.addEventListener("change", drawAll);
  drawAll();

  for (const grids of document.querySelectorAll(".grids")) {
    const slider = grids.querySelector("input");
    if (!slider) continue;
    const images = [...grids.querySelectorAll("img")];
    const show = () => {
      images.forEach((image, i) => { image.hidden = i !== Number(slider.value); });
      grids.querySelector("output").textContent = images[Number(slider.value)].dataset.label;
    };
    const key = `grid${grids.dataset.key}`;
    if (kept.get(key) !== null && Number(kept.get(key)) < images.length) slider.value = kept.get(key);
    slider.addEventListener("input", () => {
      // At the newest grid a reader wants to see the next one, too.
      kept.set(key, Number(slider.value) === images.length - 1 ? String(images.length) : slider.value);
      show();
    });
    show();
  }

  const seconds = Number(document.body.dataset.refresh);
  if (seconds > 0) {
    let known = null;
    setInterval(async () => {
      try {
        const state = await (await fetch("state")).text();
        if (known !== null && state !== known) location.reload();
        known ??= state;
      } catch { /* the server has ended: the page stays as it is */ }
    }, seconds * 1000);
  }
})();
