/* Heads of a table.sortable become buttons that sort its lines: once upwards, again downwards. */
document.addEventListener("DOMContentLoaded", () => {
  for (const table of document.querySelectorAll("table.sortable")) {
    /* pandas writes the name of the first column into a row of its own */
    const rows = [...table.tHead.rows].map((row) => [...row.cells]);
    const named = (row) => row.filter((cell) => cell.textContent.trim() !== "").length;
    const heads = rows.reduce((best, row) => (named(row) > named(best) ? row : best));
    if (heads[0].textContent.trim() === "") heads[0].textContent = rows.at(-1)[0].textContent;
    rows.filter((row) => row !== heads).forEach((row) => row[0].parentElement.remove());
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

  /* A number where a cell holds one; null where it is empty or a dash. */
  function valueOf(cell) {
    const text = cell.textContent.trim();
    if (["", "–"].includes(text)) return null;
    const number = Number(text.replaceAll(",", ""));
    return Number.isNaN(number) ? text : number;
  }

  /* Numbers by size, before texts by alphabet; what is missing stays at the end either way. */
  function compare(a, b, sign) {
    if (a === null || b === null) return (a === null) - (b === null);
    if (typeof a === "number" && typeof b === "number") return sign * (a - b);
    if (typeof a !== typeof b) return sign * (typeof a === "number" ? -1 : 1);
    return sign * a.localeCompare(b, "en", { numeric: true });
  }
});
