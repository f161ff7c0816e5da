"use strict";
// Tables are sorted by a click on a column's name: numbers by their value, the largest first; what has none goes last.
for (const table of document.querySelectorAll("table.sortable")) {
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => head.querySelector("button").addEventListener("click", () => {
    const body = table.tBodies[0];
    const rows = [...body.rows].map((row) => [row.cells[column], row]);
    const numeric = rows.some(([cell]) => "v" in cell.dataset);
    const was = head.getAttribute("aria-sort");
    const down = was ? was === "ascending" : numeric;
    rows.sort(([a], [b]) => {
      if (numeric) {
        if (!("v" in a.dataset) || !("v" in b.dataset)) return ("v" in b.dataset) - ("v" in a.dataset);
        return (a.dataset.v - b.dataset.v) * (down ? -1 : 1);
      }
      return a.textContent.localeCompare(b.textContent) * (down ? -1 : 1);
    });
    heads.forEach((other) => other.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", down ? "descending" : "ascending");
    body.append(...rows.map(([, row]) => row));
  }));
}
