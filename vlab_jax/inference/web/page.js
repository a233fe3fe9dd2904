"use strict";

// Whatever comes from the server or the user becomes text, never HTML.
const $ = (id) => document.getElementById(id);
const still = matchMedia("(prefers-reduced-motion: reduce)");
let latestSearch = 0;
let chosen = null; // the hit or upload that captions and answers are about

function element(tag, text, className) {
  const made = document.createElement(tag);
  if (text) made.textContent = text;
  if (className) made.className = className;
  return made;
}

function say(message, status = "") {
  $("message").textContent = message;
  $("status").textContent = status;
}

async function ask(url, body, type = "application/json") {
  let response;
  try {
    const method = body === undefined ? "GET" : "POST";
    response = await fetch(url, { method, body, headers: body === undefined ? {} : { "content-type": type } });
  } catch {
    throw new Error("the server does not answer; is it still running?");
  }
  const found = await response.json().catch(() => ({ error: `the server answers with status ${response.status}` }));
  if (!response.ok) throw new Error(found.error);
  return found;
}

const basename = (path) => path.split("/").filter(Boolean).pop() || path;
const place = (hit) => ({ file: hit.upload ? undefined : hit.file, upload: hit.upload, start: hit.start, end: hit.end });
const about = (hit) => [hit.span, hit.score === undefined ? "" : hit.score.toFixed(3)].filter(Boolean).join(" · ");

// Videos play while they are on the screen, from where the hit starts to where it ends, again and again.
const onScreen = new IntersectionObserver((entries) => {
  for (const { target, isIntersecting } of entries) {
    if (!isIntersecting) target.pause();
    else {
      if (!target.src) target.src = target.dataset.src;
      if (!still.matches) target.play().catch(() => {}); // a browser may want a click first
    }
  }
});

function player(hit) {
  if (hit.kind === "none") return element("p", hit.error, "score");
  const shown = element(hit.kind === "image" ? "img" : "video");
  shown.addEventListener("error", async () => {
    const response = await fetch(hit.url).catch(() => null);
    const why = response && !response.ok ? (await response.json()).error : "this browser cannot play the file";
    shown.replaceWith(element("p", why, "score"));
  });
  if (hit.kind === "image") {
    shown.alt = hit.file;
    shown.src = hit.url;
    return shown;
  }
  Object.assign(shown, { muted: true, playsInline: true, preload: "auto" });
  shown.dataset.src = hit.url;
  const restart = () => {
    shown.currentTime = hit.play_from;
    if (!shown.paused || shown.ended) shown.play().catch(() => {});
  };
  shown.addEventListener("loadedmetadata", () => { shown.currentTime = hit.play_from; });
  shown.addEventListener("timeupdate", () => {
    if (hit.play_to !== null && !shown.paused && shown.currentTime >= hit.play_to) restart();
  });
  shown.addEventListener("ended", restart);
  onScreen.observe(shown);
  return shown;
}

function item(hit) {
  const made = element("li");
  const button = element("button", "Describe, ask");
  button.addEventListener("click", () => choose(hit, made));
  const shown = player(hit);
  made.addEventListener("pointerenter", () => { shown.controls = true; }); // they cover much of a small picture
  made.addEventListener("pointerleave", () => { shown.controls = false; });
  made.append(shown, element("p", hit.file), element("p", about(hit), "score"), button);
  return made;
}

async function search(event) {
  event.preventDefault();
  const mine = ++latestSearch;
  say("", "searching …");
  try {
    const found = await ask("search", JSON.stringify({ text: $("text").value }));
    if (mine !== latestSearch) return;
    $("hits").replaceChildren(...found.hits.map(item));
    say("", found.note);
  } catch (error) {
    if (mine === latestSearch) say(error.message);
  }
}

async function choose(hit, where) {
  chosen = hit;
  for (const other of document.querySelectorAll("#hits li")) other.classList.toggle("chosen", other === where);
  $("chosen").hidden = false;
  const shown = player(hit);
  shown.controls = true;
  $("shown").replaceChildren(shown);
  $("place").textContent = [hit.file, about(hit)].filter(Boolean).join(" · ");
  $("answers").replaceChildren();
  $("caption").textContent = "…";
  say("");
  try {
    const caption = await ask("caption", JSON.stringify(place(hit)));
    if (chosen === hit) $("caption").textContent = caption.text || "(the model says nothing)";
  } catch (error) {
    if (chosen === hit) {
      $("caption").textContent = "";
      say(error.message);
    }
  }
}

async function answer(event) {
  event.preventDefault();
  const hit = chosen;
  const question = $("question").value;
  say("", "answering …");
  try {
    const found = await ask("answer", JSON.stringify({ ...place(hit), question }));
    if (chosen !== hit) return;
    $("answers").prepend(element("dt", question), element("dd", found.text || "(the model says nothing)"));
    say("", found.note);
  } catch (error) {
    if (chosen === hit) say(error.message);
  }
}

async function upload(file) {
  if (!file) return;
  say("", `uploading ${file.name} …`);
  try {
    const kept = await ask(`upload?name=${encodeURIComponent(file.name)}`, file, "application/octet-stream");
    await choose(kept, null);
  } catch (error) {
    say(error.message);
  } finally {
    $("file").value = "";
  }
}

$("search").addEventListener("submit", search);
$("ask").addEventListener("submit", answer);
$("file").addEventListener("change", (event) => upload(event.target.files[0]));
ask("about").then(
  (found) => {
    $("about").textContent = `${found.windows} windows of ${basename(found.folder)}, by ${basename(found.model)}`;
    $("about").title = `${found.folder}, ${found.model}`;
  },
  (error) => say(error.message),
);
