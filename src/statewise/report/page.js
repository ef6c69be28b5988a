"use strict";
for (const table of document.querySelectorAll("table.sortable")) {
  const heads = [...table.tHead.rows[0].cells], body = table.tBodies[0], first = [...body.rows];
  const sortBy = (head, column) => {
    const next = { none: "descending", descending: "ascending", ascending: "none" }[head.getAttribute("aria-sort") || "none"];
    heads.forEach((h) => h.removeAttribute("aria-sort"));
    let rows = first;
    if (next !== "none") {
      head.setAttribute("aria-sort", next);
      const sign = next === "ascending" ? 1 : -1;
      const value = (row) => row.cells[column]?.dataset.value ?? "";
      rows = [...first].sort((a, b) => {
        const x = value(a), y = value(b);
        if (x === "" || y === "") return (x === "") - (y === "");
        return sign * (isNaN(x) || isNaN(y) ? x.localeCompare(y) : x - y);
      });
    }
    body.append(...rows);
  };
  heads.forEach((head, column) => {
    head.tabIndex = 0;
    head.addEventListener("click", () => sortBy(head, column));
    head.addEventListener("keydown", (e) => { if (e.key === "Enter" || e.key === " ") { e.preventDefault(); sortBy(head, column); } });
  });
}
const marked = [...document.querySelectorAll("[data-layer]")];
const light = (name) => {
  document.body.classList.toggle("dim", Boolean(name));
  marked.forEach((m) => m.classList.toggle("lit", m.dataset.layer === name));
};
marked.filter((m) => m.tagName !== "DETAILS").forEach((m) => {
  m.addEventListener("mouseenter", () => light(m.dataset.layer));
  m.addEventListener("mouseleave", () => light(null));
});
const copy = document.getElementById("copy");
if (navigator.clipboard) {
  copy.hidden = false;
  copy.addEventListener("click", async () => {
    await navigator.clipboard.writeText(document.getElementById("command").textContent);
    copy.textContent = "Copied";
  });
}
