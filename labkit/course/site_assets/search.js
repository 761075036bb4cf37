// Under each page that Sphinx's search finds: a quotation, from a script, since a file:// page may not fetch a page.
"use strict";

const texts = new Map();  // page → its text, once its script has come
const waiting = new Map();  // page → what to do then

function searchText(page, text) {
  texts.set(page, text);
  (waiting.get(page) ?? []).forEach((quote) => quote());
  waiting.delete(page);
}

function whenRead(page, quote) {
  if (texts.has(page)) return quote();
  if (waiting.has(page)) return waiting.get(page).push(quote);
  waiting.set(page, [quote]);
  const script = document.createElement("script");
  script.src = `_static/texts/${page}.js`;
  document.head.append(script);
}

const BEFORE = 90, AFTER = 150;  // letters quoted around a place

function placesOf(word, text) {
  const places = [];
  for (let at = text.indexOf(word); at >= 0; at = text.indexOf(word, at + 1)) places.push(at);
  return places;
}

// Where the most of the words stand close together; of equal places the first.
function bestPlace(text, words) {
  const near = (place) => text.slice(Math.max(0, place - BEFORE), place + AFTER);
  const score = (place) => words.filter((word) => near(place).includes(word)).length;
  const places = words.flatMap((word) => placesOf(word, text)).sort((a, b) => a - b);
  return places.reduce((best, place) => (score(place) > score(best) ? place : best), places[0]);
}

function excerpt(text, words) {
  const place = bestPlace(text.toLowerCase(), words);
  if (place === undefined) return "";
  const start = Math.max(0, place - BEFORE);
  return `${start ? "… " : ""}${text.slice(start, place + AFTER).trim()} …`;
}

document.addEventListener("DOMContentLoaded", () => {
  const results = document.getElementById("search-results");
  const words = (new URLSearchParams(location.search).get("q") ?? "").toLowerCase().split(/\s+/).filter(Boolean);
  if (!results || !words.length) return;
  new MutationObserver((changes) => changes.forEach((change) => change.addedNodes.forEach((item) => {
    const link = item.nodeName === "LI" && item.querySelector("a");
    if (!link) return;
    const page = new URL(link.href).pathname.split("/").pop().replace(/\.html$/, "");
    whenRead(page, () => {
      const quote = document.createElement("p");
      quote.className = "context";
      quote.textContent = excerpt(texts.get(page), words);
      item.append(quote);
    });
  }))).observe(results, { childList: true, subtree: true });
});
