// The filters of the ledger's table: hide the rows that do not match, count the rest, keep the choice in the address.
"use strict";

document.addEventListener("DOMContentLoaded", () => {
  const form = document.querySelector("form.filters");
  if (!form) return;
  const rows = [...document.querySelectorAll("#ledger tbody tr")];
  const texts = rows.map((row) => row.textContent.toLowerCase());
  const found = document.getElementById("found");

  function matches(row, text, wanted) {
    return Object.entries(wanted).every(([key, value]) =>
      !value || (key === "words" ? value.toLowerCase().split(/\s+/).every((word) => text.includes(word))
                                 : row.dataset[key] === value));
  }

  function counted(shown) {
    const counts = new Map();
    shown.forEach((row) => counts.set(row.dataset.verdict, (counts.get(row.dataset.verdict) ?? 0) + 1));
    return [...counts].map(([verdict, count]) => `${count} ${verdict}`).join(", ");
  }

  function filter() {
    const wanted = Object.fromEntries(new FormData(form));
    rows.forEach((row, place) => { row.hidden = !matches(row, texts[place], wanted); });
    const shown = rows.filter((row) => !row.hidden);
    found.textContent = `${shown.length} of ${rows.length} rows${shown.length ? `: ${counted(shown)}` : ""}.`;
    const kept = new URLSearchParams(Object.entries(wanted).filter(([, value]) => value)).toString();
    history.replaceState(null, "", kept ? `?${kept}` : location.pathname);
  }

  new URLSearchParams(location.search).forEach((value, key) => {
    if (form.elements[key]) form.elements[key].value = value;
  });
  form.hidden = false;
  form.addEventListener("input", filter);
  form.addEventListener("submit", (event) => event.preventDefault());
  form.addEventListener("reset", () => setTimeout(filter));
  filter();
});
