// A table that is wider than its place becomes a list of rows, each value under its column's name.
function fit() {
  for (const table of document.querySelectorAll(".bd-article table:has(thead)")) {
    table.classList.remove("stacked");
    if (table.scrollWidth <= table.parentElement.clientWidth + 1) continue;
    const names = [...table.querySelectorAll("thead th")].map((cell) => cell.textContent);
    for (const row of table.querySelectorAll("tbody tr"))
      [...row.cells].forEach((cell, i) => (cell.dataset.column = names[i] || ""));
    table.classList.add("stacked");
  }
}
addEventListener("load", fit);
addEventListener("resize", fit);
