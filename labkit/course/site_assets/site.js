// What every page of the site does: compare a prediction, open all folds, name and reach things without a mouse.
"use strict";

// The choice that was ticked, beside the answer that was recorded.
function compare(fold) {
  const ticked = document.querySelector(`input[name="${CSS.escape(fold.dataset.prediction)}"]:checked`);
  const answer = fold.querySelector(".answer").textContent;
  const said = fold.querySelector(".said");
  if (!ticked) said.textContent = "You ticked no choice.";
  else if (ticked.value === answer) said.textContent = "You predicted this.";
  else said.textContent = `You predicted: ${ticked.value}.`;
}

function addOpenAll(article) {
  const folds = article.querySelectorAll("details");
  if (folds.length < 2) return;
  const button = document.createElement("button");
  button.type = "button";
  button.className = "open-all";
  button.textContent = "Open all folds";
  button.addEventListener("click", () => {
    const open = button.textContent === "Open all folds";
    folds.forEach((fold) => { fold.open = open; });
    button.textContent = open ? "Close all folds" : "Open all folds";
  });
  article.querySelector("h1").after(button);
}

// Formulas, tables and code that are wider than the page scroll by themselves: by keyboard too.
function reachable() {
  document.querySelectorAll(".cell_output > .output, div.math, mjx-container, .wide, pre").forEach((box) => {
    if (box.scrollWidth > box.clientWidth + 1) box.tabIndex = 0;
  });
}

// A formula in a line that is wider than its paragraph gets a scroll bar of its own.
function tameFormulas() {
  document.querySelectorAll("span.math").forEach((formula) => {
    const room = formula.closest("p, li, td, dd, figcaption")?.clientWidth;
    formula.classList.toggle("wide", room > 0 && formula.firstElementChild?.scrollWidth > room);
  });
  reachable();
}

// The theme's arrows in the side bar have no words.
function nameArrows() {
  document.querySelectorAll("li.has-children > details > summary").forEach((arrow) => {
    const above = arrow.closest("li").querySelector("a").textContent.trim();
    arrow.setAttribute("aria-label", `Pages under ${above}`);
  });
}

document.addEventListener("DOMContentLoaded", () => {
  nameArrows();
  const article = document.querySelector("article.bd-article");
  if (!article) return;
  // MyST-NB names every fold "Toggle hidden content" for screen readers: let them read what everybody reads
  article.querySelectorAll("summary[aria-label]").forEach((summary) => summary.removeAttribute("aria-label"));
  document.querySelectorAll("details[data-prediction]").forEach((fold) => {
    fold.addEventListener("toggle", () => fold.open && compare(fold));
  });
  if (article.querySelector("h1")) addOpenAll(article);
  reachable();
});
window.addEventListener("load", () => (window.MathJax?.startup?.promise ?? Promise.resolve()).then(tameFormulas));
window.addEventListener("resize", tameFormulas);
