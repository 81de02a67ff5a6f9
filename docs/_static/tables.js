// A table that is wider than its place becomes a list of rows, each value under its column's name.
function fit() {
  for (const table of document.querySelectorAll(".bd-article table:has(thead)")) {
    table.classList.remove("stacked");
    // A table that scrolls by itself is narrower than its content.
    const place = Math.min(table.clientWidth, table.parentElement.clientWidth);
    if (table.scrollWidth <= place + 1) continue;
    const names = [...table.querySelectorAll("thead th")].map((cell) => cell.textContent);
    for (const row of table.querySelectorAll("tbody tr"))
      [...row.cells].forEach((cell, i) => (cell.dataset.column = names[i] || ""));
    table.classList.add("stacked");
  }
}
addEventListener("load", fit);
addEventListener("resize", fit);
