// The page works without this: it brings the newest rows by itself, and makes a whole row clickable.
"use strict";

const LIVE_MS = 2000; // between two looks at the rows, at least
const REST_SHARE = 4; // so many times as long as a look took nothing is asked: a search keeps a database busy
const WHOLE_EVERY = 8; // looks: then the traffic too
const LIVE_PARTS = ["health", "sentence", "rows"];

let looks = 0;
let paused = false;

// Nothing is taken from under the hands of whoever has selected text or opened the gaps.
function isInUse(part) {
  const selection = window.getSelection();
  return !selection.isCollapsed && part.contains(selection.anchorNode);
}

function replace(id, page) {
  const part = document.getElementById(id);
  const fresh = page.getElementById(id);
  if (!part || !fresh || isInUse(part)) return;
  const open = [...part.querySelectorAll("details[open]")].map((it) => it.id);
  for (const it of open) fresh.querySelector(`#${it}`)?.setAttribute("open", "");
  prepare(fresh);
  if (fresh.outerHTML === part.outerHTML) return;
  const focused = part.contains(document.activeElement) ? document.activeElement.id : "";
  part.replaceWith(document.adoptNode(fresh));
  if (focused) document.getElementById(focused)?.focus({ preventScroll: true });
}

async function look() {
  if (paused || document.hidden) return;
  looks += 1;
  const whole = looks % WHOLE_EVERY === 0;
  const address = new URL(location.href);
  if (!whole) address.searchParams.set("part", "live");
  const answer = await fetch(address, { credentials: "same-origin" });
  if (!answer.ok) return;
  const page = new DOMParser().parseFromString(await answer.text(), "text/html");
  for (const id of whole ? [...LIVE_PARTS, "traffic"] : LIVE_PARTS) replace(id, page);
}

async function lookForEver() {
  const began = performance.now();
  try {
    await look();
  } catch {
    // mitmweb is gone, or busy: the next look will tell
  }
  setTimeout(lookForEver, Math.max(LIVE_MS, REST_SHARE * (performance.now() - began)));
}

// What the script adds to a part of the page, now and each time it is brought anew.
function prepare(part) {
  for (const table of part.querySelectorAll("table.rows")) table.classList.add("clickable");
  const pause = part.querySelector("#pause");
  if (pause) {
    pause.hidden = false;
    pause.textContent = paused ? "Go on updating" : "Pause updates";
  }
}

document.addEventListener("click", (event) => {
  if (event.target.id === "pause") {
    paused = !paused;
    prepare(document);
    return;
  }
  if (event.target.closest("a, button, input, summary") || !window.getSelection().isCollapsed) return;
  event.target.closest("table.clickable tbody tr")?.querySelector("a")?.click();
});

document.addEventListener("keydown", (event) => {
  const search = document.querySelector("input[type=search]");
  if (event.key !== "/" || !search || event.target.closest("input")) return;
  event.preventDefault();
  search.focus();
});

document.querySelector("[data-back]")?.addEventListener("click", (event) => {
  if (!document.referrer.startsWith(`${location.origin}/access-log`)) return;
  event.preventDefault();
  history.back(); // to the same search and place
});

prepare(document);
if (document.getElementById("pause")) setTimeout(lookForEver, LIVE_MS);
