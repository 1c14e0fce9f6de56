// Fetches the page again every two seconds and replaces the sections that have changed. Without it the page reloads itself.
"use strict";

const EVERY_MS = 2000;
const LIMIT_MS = 5000;
const live = document.getElementById("live");
let awaySince = null;

function take(fresh) {
  document.title = fresh.title;
  for (const name of ["header h1", "header p"]) {
    const was = document.querySelector(name), now = fresh.querySelector(name);
    if (was && now && was.textContent !== now.textContent) was.textContent = now.textContent;
  }
  for (const now of fresh.querySelectorAll("main > section[id]")) {
    const was = document.getElementById(now.id);
    if (!was || was.outerHTML === now.outerHTML) continue;
    const scrolled = was.querySelector(".scroll")?.scrollLeft ?? 0;
    const focused = was.querySelector(".scroll") !== null && was.querySelector(".scroll") === document.activeElement;
    was.replaceWith(document.adoptNode(now));
    const region = now.querySelector(".scroll");
    if (region) region.scrollLeft = scrolled;
    if (region && focused) region.focus({ preventScroll: true });
  }
}

function clock(date) {
  return date.toISOString().slice(11, 19);
}

async function look() {
  try {
    const answer = await fetch("./", { signal: AbortSignal.timeout(LIMIT_MS), cache: "no-store" });
    if (!answer.ok) throw new Error(String(answer.status));
    take(new DOMParser().parseFromString(await answer.text(), "text/html"));
    awaySince = null;
    document.body.classList.remove("away");
    live.textContent = `live · ${clock(new Date())} UTC`;
  } catch {
    awaySince ??= new Date();
    document.body.classList.add("away");
    live.textContent = `coordinator away since ${clock(awaySince)} UTC · this is what it said last`;
  }
  setTimeout(look, EVERY_MS);
}

document.body.classList.add("scripted");
look();
