// The page works without this script. It updates the newest rows and makes whole rows clickable.
"use strict";

const UPDATE_MS = 2000; // minimum pause between two updates
const PAUSE_FACTOR = 4; // pause at least this many times as long as the last update took, to spare the database
const TRAFFIC_INTERVAL = 8; // every 8th update includes the traffic chart
const LIVE_PARTS = ["health", "alert", "rows"];

let updates = 0;
let paused = false;

// Do not replace a part in which the user has selected text.
function hasSelection(part) {
  const selection = window.getSelection();
  return !selection.isCollapsed && part.contains(selection.anchorNode);
}

// Replace one part of the page. Keep the keyboard focus and open <details>.
function replacePart(id, newPage) {
  const part = document.getElementById(id);
  const newPart = newPage.getElementById(id);
  if (!part || !newPart || hasSelection(part)) return;
  for (const details of part.querySelectorAll("details[open]")) {
    newPart.querySelector(`#${details.id}`)?.setAttribute("open", "");
  }
  enhance(newPart);
  if (newPart.outerHTML === part.outerHTML) return;
  const focusedId = part.contains(document.activeElement) ? document.activeElement.id : "";
  part.replaceWith(document.adoptNode(newPart));
  if (focusedId) document.getElementById(focusedId)?.focus({ preventScroll: true });
}

async function update() {
  if (paused || document.hidden) return;
  updates += 1;
  const withTraffic = updates % TRAFFIC_INTERVAL === 0;
  const url = new URL(location.href);
  if (!withTraffic) url.searchParams.set("part", "live");
  const response = await fetch(url, { credentials: "same-origin" });
  if (!response.ok) return;
  const newPage = new DOMParser().parseFromString(await response.text(), "text/html");
  for (const id of withTraffic ? [...LIVE_PARTS, "traffic"] : LIVE_PARTS) replacePart(id, newPage);
}

async function updateRepeatedly() {
  const startedAt = performance.now();
  try {
    await update();
  } catch {
    // mitmweb is busy or has stopped. Try again at the next update.
  }
  setTimeout(updateRepeatedly, Math.max(UPDATE_MS, PAUSE_FACTOR * (performance.now() - startedAt)));
}

// Remove mitmweb's token from the address, so that users do not copy it with a link.
function hideToken() {
  const url = new URL(location.href);
  if (!url.searchParams.has("token")) return;
  url.searchParams.delete("token");
  history.replaceState(null, "", url);
}

// Add what only works with this script. Called for the page and for each part that replaces another.
function enhance(part) {
  for (const table of part.querySelectorAll("table.rows")) table.classList.add("clickable");
  const pause = part.querySelector("#pause");
  if (pause) {
    pause.hidden = false;
    pause.textContent = paused ? "Resume updates" : "Pause updates";
  }
}

document.addEventListener("click", (event) => {
  if (event.target.id === "pause") {
    paused = !paused;
    enhance(document);
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
  history.back(); // keeps the search and the scroll position
});

hideToken();
enhance(document);
if (document.getElementById("pause")) setTimeout(updateRepeatedly, UPDATE_MS);
