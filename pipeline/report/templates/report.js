"use strict";
// Pictures that play: the animation lies on the still while its button is pressed, or the pointer is on it.
for (const figure of document.querySelectorAll("figure[data-clip]")) {
  const button = figure.querySelector("button");
  const play = figure.querySelector("img.play");
  const show = (on) => {
    play.hidden = !on;
    button.setAttribute("aria-pressed", String(on));
  };
  let pressed = false;
  button.addEventListener("click", () => { pressed = !pressed; show(pressed); });
  if (!matchMedia("(prefers-reduced-motion: reduce)").matches && matchMedia("(hover: hover)").matches) {
    figure.addEventListener("mouseenter", () => show(true));
    figure.addEventListener("mouseleave", () => show(pressed));
  }
}

// Table of rows: filter, sort, pages of `SIZE` rows. Text is set as text, never as HTML.
const holder = document.getElementById("rows-data");
if (holder) {
  const SIZE = 100;
  const columns = JSON.parse(holder.textContent);
  const names = columns.map((column) => column.name);
  const data = { cells: columns[0].cells.map((_, at) => columns.map((each) => each.values ? each.values[each.cells[at]] : each.cells[at])) };
  const body = document.getElementById("rows-body");
  const state = document.getElementById("rows-state");
  const filter = document.getElementById("rows-filter");
  const bucket = document.getElementById("rows-bucket");
  const captions = document.getElementById("rows-captions");
  const [back, next] = ["rows-back", "rows-next"].map((id) => document.getElementById(id));
  const heads = [...document.querySelectorAll("#rows-table th")];
  const bucketAt = names.indexOf("bucket");
  const captionAt = names.indexOf("caption");
  const texts = data.cells.map((row) => row.filter((cell) => typeof cell === "string").join("\n").toLowerCase());
  const numeric = names.map((_, at) => data.cells.some((row) => typeof row[at] === "number"));
  const isName = names.map((name) => ["id", "key", "source"].includes(name));
  const compare = new Intl.Collator("en", { numeric: true }).compare;
  let order = data.cells.map((_, at) => at);
  let sorted = null;
  let falling = false;
  let page = 0;

  for (const name of [...new Set(data.cells.map((row) => row[bucketAt]))].sort(compare)) {
    bucket.append(new Option(name, name));
  }

  const find = () => {
    const words = filter.value.toLowerCase().split(/\s+/).filter(Boolean);
    order = data.cells.map((_, at) => at).filter((at) => {
      const row = data.cells[at];
      if (bucket.value && row[bucketAt] !== bucket.value) return false;
      if (captions.value && Boolean(row[captionAt]) !== (captions.value === "with")) return false;
      return words.every((word) => texts[at].includes(word));
    });
    if (sorted !== null) {
      const way = falling ? -1 : 1;
      order.sort((a, b) => {
        const [one, other] = [data.cells[a][sorted], data.cells[b][sorted]];
        if (one === null || other === null) return (one === null) - (other === null) || a - b;
        return way * (numeric[sorted] ? one - other : compare(one, other)) || a - b;
      });
    }
    page = 0;
    draw();
  };

  const draw = () => {
    const pages = Math.max(1, Math.ceil(order.length / SIZE));
    const lines = order.slice(page * SIZE, (page + 1) * SIZE).map((at) => {
      const line = document.createElement("tr");
      data.cells[at].forEach((cell, column) => {
        const item = document.createElement("td");
        item.className = numeric[column] ? "n" : column === captionAt ? "text" : isName[column] ? "name" : "";
        if (!numeric[column]) item.dir = "auto";
        item.textContent = cell === null ? "" : cell;
        line.append(item);
      });
      return line;
    });
    body.replaceChildren(...lines);
    state.textContent = `${order.length.toLocaleString("en")} of ${data.cells.length.toLocaleString("en")} rows, page ${page + 1} of ${pages}`;
    back.disabled = page === 0;
    next.disabled = page + 1 >= pages;
  };

  heads.forEach((head, column) => head.querySelector("button").addEventListener("click", () => {
    falling = sorted === column ? !falling : false;
    sorted = column;
    heads.forEach((each, at) => each.setAttribute("aria-sort", at !== column ? "none" : falling ? "descending" : "ascending"));
    find();
  }));
  for (const input of [filter, bucket, captions]) input.addEventListener("input", find);
  back.addEventListener("click", () => { page -= 1; draw(); });
  next.addEventListener("click", () => { page += 1; draw(); });
  draw();
}
