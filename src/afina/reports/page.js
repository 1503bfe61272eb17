/* Values under the pointer and zoom for the charts, sorting and filtering for the tables. The page is whole without it. */
"use strict";
(() => {
  const short = (v) => (v === 0 || (Math.abs(v) >= 1e-3 && Math.abs(v) < 1e6) ? String(+v.toPrecision(5)) : v.toExponential(2));
  const numbers = (text) => (text.match(/-?[\d.]+(?:e[-+]?\d+)?/g) || []).map(Number);

  function chart(svg) {
    const [x0, y0, x1, y1] = numbers(svg.dataset.box), names = JSON.parse(svg.dataset.names), log = svg.dataset.scale === "log";
    let [left, right, low, high] = numbers(svg.dataset.limits);
    if (log) [left, right] = [Math.log10(left), Math.log10(right)];
    /* The whole plot, and the part of it that is shown, in the drawing's own units. */
    let view = [x0, y0, x1, y1];
    const value = ([x, y]) => [left + ((x - x0) / (x1 - x0)) * (right - left), high - ((y - y0) / (y1 - y0)) * (high - low)];
    const shown = ([x, y]) => [x0 + ((x - view[0]) / (view[2] - view[0])) * (x1 - x0), y0 + ((y - view[1]) / (view[3] - view[1])) * (y1 - y0)];
    const whole = ([x, y]) => [view[0] + ((x - x0) / (x1 - x0)) * (view[2] - view[0]), view[1] + ((y - y0) / (y1 - y0)) * (view[3] - view[1])];
    const label = (x) => short(log ? 10 ** x : x);
    const parts = [], series = [];
    for (const group of svg.querySelectorAll("g[id*='-']")) {
      const kind = /-([bdfwmo])(\d+)[^-]*$/.exec(group.id);
      if (!kind) continue;
      const points = [];
      for (const path of group.querySelectorAll("path[d]")) {
        if (path.closest("defs")) continue;
        const pairs = numbers(path.getAttribute("d")).reduce((all, v, i) => (i % 2 ? all[all.length - 1].push(v) : all.push([v]), all), []);
        const end = /z\s*$/i.test(path.getAttribute("d")) ? "z" : "";
        parts.push(() => path.setAttribute("d", "M" + pairs.map((p) => shown(p).map((v) => v.toFixed(2)).join(" ")).join("L") + end));
        if (kind[1] === "b") points.push([(pairs[0][0] + pairs[1][0]) / 2, Math.min(...pairs.map((p) => p[1]))]);
        else points.push(...pairs);
      }
      for (const use of group.querySelectorAll("use")) {
        const at = [+use.getAttribute("x"), +use.getAttribute("y")];
        parts.push(() => { const [x, y] = shown(at); use.setAttribute("x", x); use.setAttribute("y", y);
          use.style.display = x < x0 - 1 || x > x1 + 1 || y < y0 - 1 || y > y1 + 1 ? "none" : ""; });
        if (!group.querySelector("path[d]:not(defs path)")) points.push(at);
      }
      if (!points.length || !"bd".includes(kind[1])) continue;
      const known = kind[1] === "b" && series.find(([name]) => name === names[+kind[2]]);
      if (known) known[1].push(...points);
      else series.push([names[+kind[2]] ?? "", points]);
    }
    for (const axis of ["x", "y"])
      for (const tick of svg.querySelectorAll(`.tick-${axis}`)) {
        const use = tick.querySelector("use"), text = tick.querySelector("text");
        if (!use || !text) continue;
        const at = [+use.getAttribute("x"), +use.getAttribute("y")], before = text.textContent;
        parts.push((zoomed) => { text.textContent = zoomed ? (axis === "x" ? label(value(whole(at))[0]) : short(value(whole(at))[1])) : before; });
      }
    const show = (to) => { view = to; parts.forEach((part) => part(to[0] !== x0 || to[2] !== x1 || to[1] !== y0 || to[3] !== y1)); };
    const place = (event) => {
      const box = svg.getBoundingClientRect(), size = svg.viewBox.baseVal;
      return [((event.clientX - box.left) / box.width) * size.width, ((event.clientY - box.top) / box.height) * size.height];
    };
    const inside = (p) => [Math.min(x1, Math.max(x0, p[0])), Math.min(y1, Math.max(y0, p[1]))];
    const draw = (name, values) => {
      const made = document.createElementNS("http://www.w3.org/2000/svg", name);
      for (const key in values) made.setAttribute(key, values[key]);
      return svg.appendChild(made);
    };
    let from = null, area = null, line = null;
    svg.addEventListener("pointermove", (event) => {
      const at = inside(place(event)), wanted = whole(at);
      if (from) {
        area?.remove();
        area = draw("rect", { x: Math.min(from[0], at[0]), y: Math.min(from[1], at[1]), width: Math.abs(at[0] - from[0]), height: Math.abs(at[1] - from[1]), fill: "var(--line-1)", "fill-opacity": 0.15 });
      }
      const rows = series.map(([name, points]) => {
        const dots = points.length > 1 && points.some((p, i) => i && p[0] < points[i - 1][0]);
        const far = (p) => Math.abs(p[0] - wanted[0]) + (dots ? Math.abs(p[1] - wanted[1]) : 0);
        return [name, points.reduce((best, p) => (far(p) < far(best) ? p : best)), dots];
      });
      if (!rows.length) return;
      const near = rows.reduce((a, b) => (Math.abs(b[1][0] - wanted[0]) < Math.abs(a[1][0] - wanted[0]) ? b : a));
      const x = shown(near[1])[0];
      line?.remove();
      line = draw("line", { x1: x, x2: x, y1: y0, y2: y1, stroke: "var(--soft)", "stroke-width": 0.6, "pointer-events": "none" });
      tip.textContent = [`${svg.dataset.x} ${label(value(near[1])[0])}`, ...rows.map(([name, p, dots]) => {
        const [px, py] = value(p);
        return `${name}: ${short(py)}${Math.abs(p[0] - near[1][0]) > 0.5 ? ` (at ${label(px)})` : ""}`;
      })].join("\n");
      tip.hidden = false;
      tip.style.left = `${Math.max(0, Math.min(event.pageX + 14, scrollX + innerWidth - tip.offsetWidth - 8))}px`;
      tip.style.top = `${event.pageY + 14}px`;
    });
    svg.addEventListener("pointerleave", () => { tip.hidden = true; line?.remove(); });
    svg.addEventListener("pointerdown", (event) => { if (event.pointerType === "mouse" && !event.button) from = inside(place(event)); });
    addEventListener("pointerup", (event) => {
      if (!from) return;
      const to = inside(place(event)), a = whole(from), b = whole(to);
      const large = Math.abs(from[0] - to[0]) > 6 && Math.abs(from[1] - to[1]) > 6;
      from = null; area?.remove();
      if (large) show([Math.min(a[0], b[0]), Math.min(a[1], b[1]), Math.max(a[0], b[0]), Math.max(a[1], b[1])]);
    });
    svg.addEventListener("dblclick", () => show([x0, y0, x1, y1]));
    svg.addEventListener("dragstart", (event) => event.preventDefault());
  }

  function table(whole) {
    const body = whole.tBodies[0], heads = [...whole.tHead.rows[0].cells];
    const key = (row, column) => {
      const text = row.cells[column].textContent.trim(), value = parseFloat(text.replace(/[,<+ ]/g, ""));
      return text === "–" ? [2, 0] : Number.isNaN(value) ? [1, text] : [0, value];
    };
    heads.forEach((head, column) => {
      const button = document.createElement("button");
      button.append(...head.childNodes);
      head.append(button);
      button.addEventListener("click", () => {
        const sign = head.getAttribute("aria-sort") === "descending" ? 1 : -1;
        heads.forEach((other) => other.removeAttribute("aria-sort"));
        head.setAttribute("aria-sort", sign > 0 ? "ascending" : "descending");
        const rows = [...body.rows].map((row) => [key(row, column), row]);
        rows.sort(([a], [b]) => a[0] - b[0] || sign * (typeof a[1] === "string" ? a[1].localeCompare(b[1]) : a[1] - b[1]));
        body.append(...rows.map(([, row]) => row));
      });
    });
    if (body.rows.length < 12) return;
    const filter = Object.assign(document.createElement("input"), { className: "filter", type: "search", placeholder: "filter rows" });
    filter.setAttribute("aria-label", `Filter: ${whole.caption?.textContent || "table"}`);
    filter.addEventListener("input", () => {
      const words = filter.value.toLowerCase().split(/\s+/);
      for (const row of body.rows) row.hidden = !words.every((word) => row.textContent.toLowerCase().includes(word));
    });
    whole.parentElement.before(filter);
  }

  const tip = Object.assign(document.createElement("div"), { id: "value", hidden: true });
  tip.setAttribute("aria-hidden", "true");
  document.body.append(tip);
  document.querySelectorAll("svg[data-box]").forEach(chart);
  document.querySelectorAll("table.sortable").forEach(table);
  addEventListener("beforeprint", () => document.querySelectorAll("details").forEach((one) => { one.open = true; }));
})();
