"use strict";
// Without this file everything is there too. It brings changes as they happen, and filters while the reader types.
const EVENTS = document.body.dataset.events, link = document.getElementById("link"), form = document.querySelector("form");
const PAUSE = 2000, RELOAD = 30000, AGAIN = 30000, TYPING = 250;

function say(text, live) {
  if (link.textContent !== text) link.textContent = text;
  link.classList.toggle("live", live);
}

// Puts an element in the place of the one with its id, and keeps the focus; false: there is none.
function swap(element) {
  const old = document.getElementById(element.id);
  if (!old) return false;
  const focused = old.contains(document.activeElement) ? document.activeElement.getAttribute("href") : null;
  old.replaceWith(element);
  if (focused) element.querySelector(`a[href="${CSS.escape(focused)}"]`)?.focus({preventScroll: true});
  return true;
}

let loading = false, again = false, planned = 0;

async function reload() {
  if (loading) { again = true; return; }
  loading = true;
  try {
    const response = await fetch(location.href, {signal: AbortSignal.timeout(10000)});
    const page = new DOMParser().parseFromString(await response.text(), "text/html");
    const found = [...page.querySelectorAll("[data-live]")];
    const same = page.body.dataset.events.split("?")[0] === EVENTS.split("?")[0];
    if (same && found.length === document.querySelectorAll("[data-live]").length) found.forEach(swap);
    else location.reload();  // there is another page now, such as that of a set that is gone
  } catch (error) {
    say("Not connected; trying again", false);
  }
  loading = false;
  if (again) { again = false; reload(); }
}

function soon() {
  planned ||= setTimeout(() => { planned = 0; reload(); }, PAUSE);
}

let source = null;

// Only while the page is visible: a browser has few connections to one host.
function connect() {
  if (source || document.hidden || !EVENTS) return;
  const parsed = document.createElement("template");
  source = new EventSource(EVENTS);
  source.onopen = () => say("Live", true);
  source.onmessage = event => {
    parsed.innerHTML = event.data;
    for (const element of parsed.content.querySelectorAll("[id]")) {
      element.classList.add("changed");
      if (!swap(element)) soon();
    }
  };
  source.addEventListener("reload", soon);
  source.onerror = () => {
    say("Not connected; trying again", false);
    if (source.readyState === EventSource.CLOSED) { source = null; setTimeout(connect, AGAIN); }
  };
}

function disconnect() {
  source?.close();
  source = null;
}

if (form) {
  let typing = 0;
  const show = () => {
    const given = new URLSearchParams([...new FormData(form)].filter(([, value]) => value));
    history.replaceState(null, "", `?${given}`);
    reload();
  };
  form.addEventListener("input", () => { clearTimeout(typing); typing = setTimeout(show, TYPING); });
  form.addEventListener("submit", event => { event.preventDefault(); show(); });
}
document.addEventListener("visibilitychange", () => document.hidden ? disconnect() : connect());
connect();
setInterval(() => document.hidden || reload(), RELOAD);
