"use strict";
// The page is whole without this: it adds sorting, a filter, the light on one setting, and tips.
(() => {
  const all = (selector, root = document) => [...root.querySelectorAll(selector)];
  const tip = document.getElementById("tip");

  // Sorting: a header becomes a button; a second press turns the order round.
  const keyOf = (cell) => {
    const data = cell.dataset.value;
    if (data !== undefined) return data === "" ? NaN : Number(data);
    const text = cell.textContent.trim();
    return text !== "" && !Number.isNaN(Number(text)) ? Number(text) : text;
  };
  const order = (a, b) => {
    const missing = (v) => v === "" || v === "–" || Number.isNaN(v);
    if (missing(a) || missing(b)) return NaN;
    if (typeof a === "number" && typeof b === "number") return a - b;
    return String(a).localeCompare(String(b), undefined, { numeric: true });
  };
  for (const table of all("table.sortable")) {
    const body = table.tBodies[0];
    const heads = all("thead th", table);
    heads.forEach((head, column) => {
      const button = document.createElement("button");
      button.type = "button";
      button.append(...head.childNodes);
      head.append(button);
      button.addEventListener("click", () => {
        const down = head.getAttribute("aria-sort") === "ascending";
        heads.forEach((other) => other.removeAttribute("aria-sort"));
        head.setAttribute("aria-sort", down ? "descending" : "ascending");
        const rows = [...body.rows].map((row) => [keyOf(row.cells[column]), row]);
        const known = rows.filter(([key]) => !Number.isNaN(order(key, key)));
        const rest = rows.filter(([key]) => Number.isNaN(order(key, key)));
        known.sort(([a], [b]) => (down ? -order(a, b) : order(a, b)));
        body.append(...[...known, ...rest].map(([, row]) => row));
      });
    });
  }

  // A filter over the rows of the large table.
  for (const table of all("table.numbers")) {
    const label = document.createElement("label");
    const field = document.createElement("input");
    const count = document.createElement("output");
    label.className = "filter";
    field.type = "search";
    field.placeholder = "student, teacher, learning_rate=…";
    label.append("Rows that contain ", field, " ", count);
    table.parentElement.before(label);
    field.addEventListener("input", () => {
      const wanted = field.value.toLowerCase().split(/\s+/).filter(Boolean);
      let shown = 0;
      for (const row of table.tBodies[0].rows) {
        const names = all("th", row).map((cell) => cell.textContent.toLowerCase()).join(" ");
        row.hidden = !wanted.every((word) => names.includes(word));
        shown += row.hidden ? 0 : 1;
      }
      count.textContent = wanted.length ? `${shown} of ${table.tBodies[0].rows.length}` : "";
    });
  }

  // The light on one setting: a name of a legend holds it, pointing at a mark lends it.
  let held = null;
  const light = (index) => {
    document.body.classList.toggle("lit", index !== null);
    for (const mark of all("[data-g]")) mark.classList.toggle("on", mark.dataset.g === index);
  };
  for (const item of all(".legend [data-g]")) {
    const button = document.createElement("button");
    button.type = "button";
    button.setAttribute("aria-pressed", "false");
    button.append(...item.childNodes);
    item.append(button);
    button.addEventListener("click", () => {
      held = held === item.dataset.g ? null : item.dataset.g;
      for (const other of all(".legend [data-g]")) {
        other.firstElementChild.setAttribute("aria-pressed", String(other.dataset.g === held));
      }
      light(held);
    });
    button.addEventListener("focus", () => light(item.dataset.g));
    button.addEventListener("blur", () => light(held));
  }
  for (const mark of all(".legend [data-g], svg [data-g]")) {
    mark.addEventListener("pointerenter", () => light(mark.dataset.g));
    mark.addEventListener("pointerleave", () => light(held));
  }
  addEventListener("keydown", (event) => {
    if (event.key !== "Escape") return;
    held = null;
    for (const button of all(".legend button")) button.setAttribute("aria-pressed", "false");
    light(null);
    tip.hidden = true;
  });

  // Tips of marks.
  for (const mark of all("[data-tip]")) {
    mark.addEventListener("pointermove", (event) => {
      tip.textContent = mark.dataset.tip;
      tip.hidden = false;
      const left = Math.min(event.clientX + 14, innerWidth - tip.offsetWidth - 8);
      tip.style.left = `${Math.max(8, left)}px`;
      tip.style.top = `${event.clientY + 16}px`;
    });
    mark.addEventListener("pointerleave", () => {
      tip.hidden = true;
    });
  }
  document.documentElement.dataset.scripts = "ready";
})();
