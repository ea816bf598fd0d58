/* Heads of a table.sdnb-sortable become buttons that sort its lines: once upwards, again downwards. */
document.addEventListener("DOMContentLoaded", () => {
  for (const table of document.querySelectorAll("table.sdnb-sortable")) {
    const heads = [...table.tHead.rows[table.tHead.rows.length - 1].cells];
    heads.forEach((head, column) => {
      const button = document.createElement("button");
      button.type = "button";
      button.append(...head.childNodes);
      button.addEventListener("click", () => sortLines(table, heads, column));
      head.append(button);
    });
  }

  function sortLines(table, heads, column) {
    const upwards = heads[column].getAttribute("aria-sort") !== "ascending";
    heads.forEach((head) => head.removeAttribute("aria-sort"));
    heads[column].setAttribute("aria-sort", upwards ? "ascending" : "descending");
    const lines = [...table.tBodies[0].rows].map((line) => ({ line, value: valueOf(line.cells[column]) }));
    lines.sort((a, b) => compare(a.value, b.value, upwards ? 1 : -1));
    table.tBodies[0].append(...lines.map((entry) => entry.line));
  }

  /* The full number where a cell has one; null where it is empty. */
  function valueOf(cell) {
    const text = cell.dataset.value ?? cell.textContent.trim();
    if (text === "") return null;
    return Number.isNaN(Number(text)) ? text : Number(text);
  }

  /* Numbers by size, before texts by alphabet; what is missing stays at the end either way. */
  function compare(a, b, sign) {
    if (a === null || b === null) return (a === null) - (b === null);
    if (typeof a === "number" && typeof b === "number") return sign * (a - b);
    if (typeof a !== typeof b) return sign * (typeof a === "number" ? -1 : 1);
    return sign * a.localeCompare(b, "en", { numeric: true });
  }
});
