// A click on a column's heading sorts its table: numbers by their first number, what has none last, ties as they were.
const number = (text) => {
  const found = text.replaceAll(",", "").match(/^[^0-9a-z–-]*(-?[0-9.]+(e[+-]?[0-9]+)?)/i);
  return found ? Number(found[1]) : null;
};
const compare = (a, b, sign) => {
  const [x, y] = [number(a), number(b)];
  if (x !== null && y !== null) return sign * (x - y);
  if (x !== null || y !== null) return x === null ? 1 : -1;
  return sign * a.localeCompare(b);
};
for (const button of document.querySelectorAll("thead button")) {
  button.addEventListener("click", () => {
    const head = button.parentElement, place = head.cellIndex, body = head.closest("table").tBodies[0];
    const down = head.getAttribute("aria-sort") === "ascending";
    for (const other of head.parentElement.children) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", down ? "descending" : "ascending");
    const rows = [...body.rows].sort((a, b) =>
      compare(a.cells[place].textContent.trim(), b.cells[place].textContent.trim(), down ? -1 : 1));
    body.append(...rows);
  });
}
const open = [];
addEventListener("beforeprint", () => {
  for (const details of document.querySelectorAll("details:not([open])")) { details.open = true; open.push(details); }
});
addEventListener("afterprint", () => { while (open.length) open.pop().open = false; });
