// Tables sort by a click on a column's head; a number opens the rows that it comes from.
"use strict";
function sortBy(head) {
  const table = head.closest("table"), body = table.tBodies[0], column = head.cellIndex;
  const down = head.getAttribute("aria-sort") === "ascending";
  const valued = (row) => {
    const cell = row.cells[column], given = cell.dataset.value;
    return given === undefined ? (head.classList.contains("number") ? null : cell.textContent) : Number(given);
  };
  const order = (a, b) => {
    const x = valued(a), y = valued(b);
    if (x === null || y === null) return (x === null) - (y === null);
    const way = typeof x === "number" && typeof y === "number" ? x - y : String(x).localeCompare(String(y));
    return down ? -way : way;
  };
  for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
  head.setAttribute("aria-sort", down ? "descending" : "ascending");
  body.append(...[...body.rows].sort(order));
}
function show(ids) {
  for (const old of document.querySelectorAll(".found")) old.classList.remove("found");
  const found = ids.map((id) => document.getElementById(id)).filter((x) => x instanceof HTMLDetailsElement);
  for (const row of found) { row.open = true; row.classList.add("found"); }
  if (found.length) found[0].scrollIntoView({ block: "center" });
}
function paint(choice) {
  const words = choice.closest(".map").querySelectorAll(".tokens span"), chosen = choice.selectedOptions[0];
  words.forEach((word, i) => {
    word.dataset.all ??= word.getAttribute("style") ?? "";
    word.setAttribute("style", chosen.dataset.tiers ? JSON.parse(choice.dataset.looks)[chosen.dataset.tiers[i]] : word.dataset.all);
  });
}
document.addEventListener("change", (event) => { if (event.target.matches(".map select")) paint(event.target); });
document.addEventListener("click", (event) => {
  const head = event.target.closest("th.sorts");
  if (head) sortBy(head);
  const link = event.target.closest("a[href^='#']");
  if (link) setTimeout(() => show((link.dataset.rows || link.hash.slice(1)).split(" ")));
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && event.target.matches("th.sorts")) sortBy(event.target);
});
addEventListener("load", () => { if (location.hash) show([location.hash.slice(1)]); });
