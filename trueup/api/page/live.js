"use strict";
(() => {
  const body = document.body, state = document.getElementById("state"), said = document.getElementById("announcement");
  if (!state) return;
  let seen = body.dataset.seen, say = body.dataset.say, source = null;
  // A part that has the focus is replaced when the focus leaves it.
  const waiting = new Map();
  const put = (name, html) => {
    const part = document.getElementById(name);
    if (!part) return;
    if (part.contains(document.activeElement)) { waiting.set(name, html); return; }
    waiting.delete(name);
    part.innerHTML = html;
  };
  document.addEventListener("focusout", () => setTimeout(() => waiting.forEach((html, name) => put(name, html))));
  const listen = () => {
    source = new EventSource(`/events?seen=${encodeURIComponent(seen)}`);
    source.addEventListener("open", () => { state.textContent = "live"; });
    source.addEventListener("parts", (event) => {
      const change = JSON.parse(event.data);
      seen = event.lastEventId;
      for (const [name, html] of Object.entries(change.parts)) put(name, html);
      if (change.say !== say) said.textContent = say = change.say;
      state.textContent = `live, last change ${new Date().toISOString().slice(11, 19)} UTC`;
    });
    source.addEventListener("error", () => {
      if (!source || source.readyState !== EventSource.CLOSED) { state.textContent = "connection lost, trying again"; return; }
      // The server refused, and does not say why to a script: it may be out of order, or the session has ended.
      source = null;
      state.textContent = "stopped, trying again soon; reload the page if it asks for a login";
      setTimeout(() => { if (!document.hidden && !source) listen(); }, 15000);
    });
  };
  // A hidden page costs nothing.
  document.addEventListener("visibilitychange", () => {
    if (document.hidden) { if (source) source.close(); source = null; state.textContent = "paused"; }
    else if (!source) listen();
  });
  if (!document.hidden) listen();
})();
