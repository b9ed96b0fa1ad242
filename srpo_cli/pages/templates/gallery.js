"use strict";
// The gallery: a page of prompts at a time out of the data that the report carries. Text is only ever set as text.
(() => {
  const data = JSON.parse(document.getElementById("gallery-data").textContent);
  const byId = (id) => document.getElementById(id);
  const make = (tag, options = {}, ...children) => {
    const element = Object.assign(document.createElement(tag), options);
    element.append(...children);
    return element;
  };
  const text = (value) => make("bdi", { textContent: value });
  const written = (value, digits, sign = false) => {
    if (value === null) return "–";
    const fixed = Math.abs(value).toFixed(digits);
    const none = Number(fixed) === 0;
    return (value < 0 && !none ? "−" : sign && !none ? "+" : "") + fixed;
  };
  const swatch = (model) => {
    const of = document.querySelector(`[data-swatch="${model % 8}"]`);
    return of ? of.cloneNode(true) : "";
  };

  const controls = {};
  for (const name of ["search", "group", "column", "of", "order", "before", "after", "size"]) {
    controls[name] = byId(`show-${name}`);
  }
  let found = [];
  let page = 0;

  const pick = (name) => (controls[name] ? Number(controls[name].value) : -1);

  const key = (row) => {
    const column = data.values[pick("column")];
    if (!column) return row;
    const [before, after] = [column[pick("before")][row], column[pick("after")][row]];
    if (controls.of.value === "before") return before;
    if (controls.of.value === "after") return after;
    return before === null || after === null ? null : after - before;
  };

  // A model is not compared with itself: whoever takes the other side's model gives it their own.
  let sides = [pick("before"), pick("after")];
  const apart = () => {
    if (pick("before") === pick("after")) {
      if (pick("before") === sides[0]) controls.before.value = sides[1];
      else controls.after.value = sides[0];
    }
    sides = [pick("before"), pick("after")];
  };

  const search = () => {
    apart();
    const words = controls.search.value.toLowerCase().split(/\s+/).filter(Boolean);
    const group = pick("group");
    found = [];
    for (let row = 0; row < data.items.length; row += 1) {
      if (group >= 0 && data.group[row] !== group) continue;
      const where = `${data.prompts[row]} ${data.items[row]}`.toLowerCase();
      if (words.every((word) => where.includes(word))) found.push(row);
    }
    const sign = controls.order.value === "highest" ? -1 : 1;
    if (pick("column") >= 0) {
      const keys = new Map(found.map((row) => [row, key(row)]));
      found.sort((a, b) => {
        const [x, y] = [keys.get(a), keys.get(b)];
        if (x === null || y === null) return (x === null) - (y === null) || a - b;
        return sign * (x - y) || a - b;
      });
    }
    page = 0;
    show();
  };

  const picture = (model, row) => {
    const source = data.sources[data.pictures[model][row]];
    if (source === undefined) return make("span", { className: "missing", textContent: "no picture" });
    const alt = `${data.models[model]}: ${data.prompts[row]}`;
    return make("img", { loading: "lazy", decoding: "async", alt, src: source });
  };

  const figureOf = (model, row) => {
    const link = data.links && data.links[model][row];
    const frame = make(link ? "a" : "span", { className: "frame" }, picture(model, row));
    if (link) Object.assign(frame, { href: link, title: "the whole picture" });
    const caption = make("figcaption", {}, swatch(model), text(data.models[model]));
    const number = pick("column");
    if (number >= 0) {
      const { title, digits } = data.columns[number];
      const value = written(data.values[number][model][row], digits);
      caption.append(make("span", { className: "figure", textContent: `${title} ${value}` }));
    }
    return make("figure", {}, frame, caption);
  };

  const slider = (row) => {
    const [before, after] = [pick("before"), pick("after")];
    const names = [data.models[before], data.models[after]];
    const over = picture(after, row);
    over.classList.add("after");
    const range = make("input", { type: "range", min: 0, max: 100, value: 50 });
    range.setAttribute("aria-label", `Left of the line ${names[0]}, right of it ${names[1]}: ${data.prompts[row]}`);
    const frame = make("div", { className: "frame slider" }, picture(before, row), over);
    frame.append(make("div", { className: "bar" }), range);
    const move = () => {
      frame.style.setProperty("--at", `${range.value}%`);
      range.setAttribute("aria-valuetext", `${range.value} % ${names[0]}`);
    };
    range.addEventListener("input", move);
    move();
    const caption = make("figcaption", {}, swatch(before), text(names[0]), "/", swatch(after), text(names[1]));
    return make("figure", {}, frame, caption);
  };

  const table = (row) => {
    const head = make("tr", {}, make("th", { scope: "col", textContent: "measure" }));
    for (const label of data.models) head.append(make("th", { scope: "col" }, text(label)));
    const body = data.columns.map(({ title, digits }, c) => {
      const cells = data.models.map((_, m) => make("td", { textContent: written(data.values[c][m][row], digits) }));
      return make("tr", {}, make("th", { scope: "row", textContent: title }), ...cells);
    });
    const whole = make("table", {}, make("thead", {}, head), make("tbody", {}, ...body));
    return make("div", { className: "scroll" }, whole);
  };

  const card = (row) => {
    const facts = [data.items[row]];
    if (data.seeds[row] !== null) facts.push(`seed ${data.seeds[row]}`);
    const number = pick("column");
    if (number >= 0 && data.models.length > 1) {
      const column = data.values[number];
      const [before, after] = [column[pick("before")][row], column[pick("after")][row]];
      const { title, digits } = data.columns[number];
      if (before !== null && after !== null) {
        const names = `${data.models[pick("before")]} to ${data.models[pick("after")]}`;
        facts.push(`${title}, ${names}: ${written(after - before, digits, true)}`);
      }
    }
    const pictures = make("div", { className: "pictures" });
    data.models.forEach((_, model) => pictures.append(figureOf(model, row)));
    if (data.models.length > 1) pictures.append(slider(row));
    const article = make(
      "article",
      { className: "card prompt" },
      make("h3", {}, text(data.prompts[row])),
      make("p", { className: "facts" }, text(facts.join(" · "))),
      pictures,
    );
    article.dataset.item = data.items[row];
    if (data.columns.length) {
      const more = make("details", {}, make("summary", { textContent: "all figures of this prompt" }));
      more.addEventListener("toggle", () => more.childElementCount > 1 || more.append(table(row)));
      article.append(more);
    }
    return article;
  };

  const show = () => {
    const size = pick("size");
    const last = Math.max(0, Math.ceil(found.length / size) - 1);
    page = Math.min(Math.max(page, 0), last);
    const rows = found.slice(page * size, (page + 1) * size);
    const none = make("p", { className: "card empty", textContent: "No prompt matches." });
    byId("prompts").replaceChildren(...(rows.length ? rows.map(card) : [none]));
    const count = found.length.toLocaleString("en");
    const of = data.items.length.toLocaleString("en");
    const range = rows.length ? `${page * size + 1} to ${page * size + rows.length} of ` : "";
    byId("found").textContent = range + (found.length === data.items.length ? count : `${count} found among ${of}`);
    for (const button of document.querySelectorAll("[data-turn]")) {
      button.disabled = button.dataset.turn < 0 ? page === 0 : page === last;
    }
  };

  let waiting;
  controls.search.addEventListener("input", () => {
    clearTimeout(waiting);
    waiting = setTimeout(search, 120);
  });
  for (const [name, control] of Object.entries(controls)) {
    if (control && name !== "search") control.addEventListener("change", search);
  }
  for (const button of document.querySelectorAll("[data-turn]")) {
    button.addEventListener("click", () => {
      page += Number(button.dataset.turn);
      show();
      byId("pictures").scrollIntoView();
    });
  }
  for (const button of document.querySelectorAll("[data-sort]")) {
    button.addEventListener("click", () => {
      controls.column.value = button.dataset.column;
      controls.of.value = "after";
      controls.order.value = button.dataset.sort;
      search();
    });
  }

  // As many pixels to a picture as its row gives; small pictures by a whole factor, so that all their pixels are equal.
  const [width, height] = data.size.length ? data.size : [1, 1];
  const prompts = byId("prompts");
  const GAP = 8;
  const LEAST = 140;
  const MOST = 240;
  const fit = () => {
    const count = data.models.length + (data.models.length > 1);
    const columns = count <= 3 && prompts.clientWidth >= 1000 ? 2 : 1;
    const padding = innerWidth <= 640 ? 32 : 44;
    const room = (prompts.clientWidth - 16 * (columns - 1)) / columns - padding;
    const fits = Math.max(1, Math.floor((room + GAP) / (LEAST + GAP)));
    const inRow = Math.min(count, fits);
    let cell = Math.floor(Math.min(MOST, (room - GAP * (inRow - 1)) / inRow));
    if (data.pixelated) cell = width * Math.max(Math.ceil(120 / width), Math.floor(cell / width));
    prompts.style.setProperty("--cell", `${cell}px`);
    prompts.style.setProperty("--columns", columns);
  };
  prompts.style.setProperty("--ratio", `${width} / ${height}`);
  prompts.classList.toggle("pixelated", data.pixelated);
  addEventListener("resize", fit);
  fit();
  search();
})();
