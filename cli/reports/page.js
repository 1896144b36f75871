"use strict";
(() => {
  const root = document.documentElement;
  const toggle = document.getElementById("theme");
  const dark = () => (root.dataset.theme || (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light")) === "dark";
  const remember = (theme) => { try { localStorage.setItem("trueup-theme", theme); } catch { /* a file may have no store */ } };
  const label = () => { toggle.textContent = dark() ? "Light" : "Dark"; };
  try {
    const theme = localStorage.getItem("trueup-theme");
    if (theme === "dark" || theme === "light") root.dataset.theme = theme;
  } catch { /* then the system's choice holds */ }
  toggle.hidden = false;
  label();
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", label);
  toggle.addEventListener("click", () => {
    root.dataset.theme = dark() ? "light" : "dark";
    remember(root.dataset.theme);
    label();
  });

  const table = document.getElementById("drifts");
  if (!table) return;
  const body = table.tBodies[0];
  const rows = [...body.querySelectorAll("tr.drift")];
  // Each row is followed by its evidence: all shown where no script runs, here when asked for.
  const evidence = new Map(rows.map((row) => [row, row.nextElementSibling]));
  for (const row of rows) {
    const button = row.querySelector(".open button");
    const fold = (open) => {
      button.setAttribute("aria-expanded", String(open));
      evidence.get(row).hidden = !open;
    };
    button.hidden = false;
    fold(false);
    button.addEventListener("click", () => fold(button.getAttribute("aria-expanded") === "false"));
  }
  const announcement = document.getElementById("announcement");
  const heads = [...table.tHead.rows[0].cells];
  const compare = {
    number: (a, b) => Number(a) - Number(b),
    text: (a, b) => a.localeCompare(b, undefined, { numeric: true }),
  };
  const value = (row, column) => row.cells[column].dataset.value;

  heads.forEach((head, column) => {
    const button = head.querySelector("button");
    if (!button) return;
    button.addEventListener("click", () => {
      const kind = head.dataset.kind;
      const before = head.getAttribute("aria-sort");
      const direction = before ? (before === "ascending" ? "descending" : "ascending") : (kind === "number" ? "descending" : "ascending");
      heads.forEach((other) => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", direction);
      const sign = direction === "ascending" ? 1 : -1;
      rows.sort((a, b) => {
        const one = value(a, column), other = value(b, column);
        // What has no value stands last, whichever way.
        if (one === "" || other === "") return (one === "") - (other === "");
        return sign * compare[kind](one, other);
      });
      body.append(...rows.flatMap((row) => [row, evidence.get(row)]));
      announcement.textContent = `Sorted by ${button.textContent.trim()}, ${direction}.`;
    });
  });

  const filter = document.getElementById("filter");
  const texts = new Map(rows.map((row) => [row, row.dataset.text.toLowerCase()]));
  document.getElementById("filter-label").hidden = false;
  filter.addEventListener("input", () => {
    const wanted = filter.value.trim().toLowerCase().split(/\s+/).filter(Boolean);
    let shown = 0;
    for (const row of rows) {
      row.hidden = !wanted.every((word) => texts.get(row).includes(word));
      const open = row.querySelector(".open button").getAttribute("aria-expanded") === "true";
      evidence.get(row).hidden = row.hidden || !open;
      shown += row.hidden ? 0 : 1;
    }
    announcement.textContent = `${shown} of ${rows.length} rows shown.`;
  });
})();
