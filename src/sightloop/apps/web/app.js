// The page's frame: rooms, keyboard, key dialog.
import { html, render, useEffect, useRef, useState } from "./html.js";
import { isLost, needsKey, post } from "./api.js";
import { go, info, isTyping, loadInfo, message, route, searchAsked } from "./state.js";
import { text } from "./strings.js";
import { Library } from "./rooms/library.js";
import { Captions } from "./rooms/captions.js";
import { ImageRoom } from "./rooms/image.js";
import { Improve } from "./rooms/improve.js";
import { Duplicates } from "./rooms/duplicates.js";
import { Jobs } from "./rooms/jobs.js";

const ROOMS = ["library", "captions", "improve", "duplicates", "jobs"];
const VIEWS = { library: Library, captions: Captions, image: ImageRoom, improve: Improve, duplicates: Duplicates, jobs: Jobs };
const KEYS = [
  ["1 ... 5", "help.rooms"],
  ["/", "help.search"],
  ["arrows, Page Up, Home", "help.move"],
  ["Space", "help.select"],
  ["Enter", "help.open"],
  ["n", "help.next"],
  ["j, k", "help.step"],
  ["a", "help.accept"],
  ["e", "help.edit"],
  ["Ctrl+Enter", "help.save"],
  ["r", "help.reject"],
  ["u", "help.undo"],
  ["Escape", "help.escape"],
  ["?", "help.help"],
];

function Help({ open, onClose }) {
  const dialog = useRef(null);
  useEffect(() => {
    if (open) dialog.current.showModal();
    else dialog.current.close();
  }, [open]);
  return html`<dialog ref=${dialog} onClose=${onClose} aria-labelledby="help-title">
    <h2 id="help-title">${text("help.title")}</h2>
    <table><tbody>${KEYS.map(([keys, name]) => html`<tr><th scope="row"><kbd>${keys}</kbd></th><td>${text(name)}</td></tr>`)}</tbody></table>
    <button onClick=${onClose}>${text("help.close")}</button>
  </dialog>`;
}

function KeyForm() {
  const [key, setKey] = useState("");
  const [error, setError] = useState("");
  async function send(event) {
    event.preventDefault();
    try {
      await post("session", { key });
      needsKey.value = false;
      await loadInfo();
    } catch (problem) {
      setError(problem.message);
    }
  }
  return html`<form class="key" onSubmit=${send}>
    <h1>${text("key.title")}</h1>
    <label>${text("key.label")} <input type="password" autocomplete="current-password" autofocus value=${key}
      onInput=${(event) => setKey(event.target.value)} /></label>
    <p>${text("key.hint")}</p>
    <button>${text("key.send")}</button>
    <p class="error" role="alert">${error}</p>
  </form>`;
}

function App() {
  const [help, setHelp] = useState(false);
  const { room } = route.value;

  useEffect(() => {
    let timer;
    async function load() {
      try {
        await loadInfo();
      } catch (error) {
        if (error.status === undefined) timer = setTimeout(load, 3000);
      }
    }
    load();
    return () => clearTimeout(timer);
  }, []);

  useEffect(() => {
    if (!isLost.value) return;
    const timer = setInterval(() => loadInfo().catch(() => {}), 3000);
    return () => clearInterval(timer);
  }, [isLost.value]);

  useEffect(() => {
    function onKey(event) {
      if (event.key === "Escape" && event.target.matches?.("input, textarea, select")) event.target.blur();
      if (isTyping(event)) return;
      const number = Number(event.key);
      if (number >= 1 && number <= ROOMS.length) go(ROOMS[number - 1]);
      else if (event.key === "?") setHelp(true);
      else if (event.key === "/") {
        if (room !== "library") go("library");
        searchAsked.value += 1;
      } else return;
      event.preventDefault();
    }
    addEventListener("keydown", onKey);
    return () => removeEventListener("keydown", onKey);
  }, [room]);

  useEffect(() => {
    document.title = `${text(`room.${room}`)} - ${info.value?.name ?? ""} - sightloop`;
  }, [room, info.value]);

  if (needsKey.value) return html`<main><${KeyForm} /></main>`;
  const View = VIEWS[room] ?? Library;
  return html`
    <a class="skip" href="#content" onClick=${(event) => {
      event.preventDefault();
      document.querySelector("#content").focus();
    }}>${text("app.skip")}</a>
    <header>
      <strong>${info.value?.name ?? "sightloop"}</strong>
      <nav aria-label=${text("app.rooms")}>
        ${ROOMS.map((name) => html`<a href=${`#/${name}`} aria-current=${name === room ? "page" : undefined}>${text(`room.${name}`)}</a>`)}
      </nav>
      <button class="quiet" onClick=${() => setHelp(true)}>${text("app.help")} <kbd>?</kbd></button>
    </header>
    ${isLost.value && html`<p class="banner" role="alert">${text("app.lost")}</p>`}
    <main id="content" tabindex="-1">${info.value && html`<${View} />`}</main>
    <p class="said" role="status" aria-live="polite">${message.value}</p>
    <${Help} open=${help} onClose=${() => setHelp(false)} />`;
}

const root = document.getElementById("app");
root.replaceChildren();
render(html`<${App} />`, root);
