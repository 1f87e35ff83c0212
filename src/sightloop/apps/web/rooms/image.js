// Image: one image with everything that a model can do with it; boxes and outlines drawn over it.
import { html, useEffect, useRef, useState } from "../html.js";
import { get, lengthText, original, post, streamChat } from "../api.js";
import { go, info, isTyping, opened, preferred, route } from "../state.js";
import { text } from "../strings.js";
import { searchLike } from "./library.js";

const COLORS = ["#e6194b", "#3cb44b", "#4363d8", "#f58231", "#911eb4", "#008080", "#9a6324", "#808000"];
const TOOLS = [
  ["ask", ["chat", "answer"]],
  ["judge", ["match"]],
  ["classify", ["classify"]],
  ["regions", ["detect", "locate", "segment", "read"]],
  ["explain", ["match", "similarity"]],
  ["caption", ["caption"]],
];

/** Color of 0 ... 1: what the match does not depend on is dimmed, what it depends on glows. */
function heatColor(level) {
  const stops = [[10, 5, 50, 165], [150, 20, 110, 165], [245, 90, 30, 160], [255, 225, 60, 140]];
  const at = Math.min(2.999, 3 * level ** 0.8);
  const [from, to] = stops.slice(Math.floor(at), Math.floor(at) + 2);
  return from.map((value, i) => value + (at % 1) * (to[i] - value));
}

function lines(value) {
  return value.split("\n").map((line) => line.trim()).filter(Boolean);
}

function Overlay({ regions, hidden, size, heat, strength }) {
  const canvas = useRef(null);
  useEffect(() => {
    if (!heat || !canvas.current) return;
    const height = heat.length;
    const width = heat[0].length;
    const sorted = heat.flat().sort((a, b) => a - b);
    const top = Math.max(sorted[Math.floor(0.98 * (sorted.length - 1))], 1e-12); // a single peak does not hide the rest
    const pixels = new ImageData(width, height);
    heat.flat().forEach((value, i) => pixels.data.set(heatColor(Math.min(1, value / top)), 4 * i));
    canvas.current.width = width;
    canvas.current.height = height;
    canvas.current.getContext("2d").putImageData(pixels, 0, 0);
  }, [heat]);
  return html`
    ${heat && html`<canvas ref=${canvas} class="heat" style=${{ opacity: strength }} aria-hidden="true"></canvas>`}
    <svg class="boxes" viewBox=${`0 0 ${size.width} ${size.height}`} aria-hidden="true">
      ${regions.map((region, i) => {
        if (hidden.has(i)) return null;
        const color = COLORS[i % COLORS.length];
        const [left, top, right, bottom] = region.box;
        return html`<g stroke=${color} fill=${color} stroke-width=${Math.max(1, size.width / 300)}>
          ${region.polygons.map((polygon) => html`<polygon points=${polygon.join(" ")} fill-opacity="0.25" />`)}
          ${!region.polygons.length && html`<rect x=${left} y=${top} width=${right - left} height=${bottom - top} fill="none" />`}
        </g>`;
      })}
    </svg>`;
}

function Ask({ image, model }) {
  const [turns, setTurns] = useState([]);
  const [question, setQuestion] = useState("");
  const [error, setError] = useState("");
  async function ask(event) {
    event.preventDefault();
    const asked = question.trim();
    if (!asked) return;
    setQuestion("");
    setError("");
    const before = turns;
    const show = (answer) => setTurns([...before, { question: asked, answer }]);
    show("...");
    try {
      if (model.capabilities.includes("chat")) {
        const data = await (await fetch(original(image.id))).blob();
        const url = await new Promise((resolve) => {
          const reader = new FileReader();
          reader.onload = () => resolve(reader.result);
          reader.readAsDataURL(data);
        });
        const messages = [];
        for (const turn of before) {
          messages.push({ role: "user", content: turn.question }, { role: "assistant", content: turn.answer });
        }
        messages.push({ role: "user", content: asked });
        messages[0].content = [{ type: "image_url", image_url: { url } }, { type: "text", text: messages[0].content }];
        await streamChat({ model: model.id, messages }, show);
      } else {
        const answer = await post("api/answer", { model: model.id, images: { path: image.path }, questions: asked });
        show(answer.answers[0]);
      }
    } catch (problem) {
      setTurns(before);
      setQuestion(asked);
      setError(problem.message);
    }
  }
  return html`<form onSubmit=${ask}>
    <ol class="turns" aria-live="polite">${turns.map((turn) => html`<li><b>${turn.question}</b><br />${turn.answer}</li>`)}</ol>
    <label>${text("image.ask")}<input value=${question} placeholder=${text("image.ask.placeholder")} onInput=${(event) => setQuestion(event.target.value)} /></label>
    <button class="primary">${text("image.run")}</button><p class="error" role="alert">${error}</p></form>`;
}

/** A field of lines, and a table of line and probability. */
function Scores({ label, run, initial }) {
  const [value, setValue] = useState(initial ?? "");
  const [rows, setRows] = useState(null);
  const [error, setError] = useState("");
  async function go(event) {
    event.preventDefault();
    const texts = lines(value);
    if (!texts.length) return;
    try {
      const scores = await run(texts);
      setRows(texts.map((each, i) => [each, scores[i]]).sort((a, b) => b[1] - a[1]));
      setError("");
    } catch (problem) {
      setError(problem.message);
    }
  }
  return html`<form onSubmit=${go}>
    <label>${label}<textarea rows="4" value=${value} onInput=${(event) => setValue(event.target.value)} /></label>
    <button class="primary">${text("image.run")}</button>
    ${rows && html`<table class="scores" aria-live="polite"><tbody>${rows.map(([name, score]) => html`<tr><th scope="row">${name}</th>
      <td><meter min="0" max="1" value=${score}>${score.toFixed(2)}</meter> ${(100 * score).toFixed(1)} %</td></tr>`)}</tbody></table>`}
    <p class="error" role="alert">${error}</p></form>`;
}

function Regions({ image, model, regions, setRegions, hidden, setHidden }) {
  const [phrase, setPhrase] = useState("");
  const [error, setError] = useState("");
  const [ran, setRan] = useState(false);
  async function run(verb) {
    setError("");
    try {
      const body = { model: model.id, images: { path: image.path } };
      if (verb === "locate" || verb === "segment") body.phrases = phrase.trim();
      const answer = await post(`api/${verb}`, body);
      setHidden(new Set());
      setRegions(answer.regions[0]);
      setRan(true);
    } catch (problem) {
      setError(problem.message);
    }
  }
  const can = (verb) => model.capabilities.includes(verb);
  return html`<div>
    ${(can("locate") || can("segment")) && html`<label>${text("image.regions.phrase")}<input value=${phrase} onInput=${(event) => setPhrase(event.target.value)} /></label>`}
    <p class="buttons">${["detect", "locate", "segment", "read"].filter(can).map((verb) => html`<button onClick=${() => run(verb)}
      disabled=${(verb === "locate" || verb === "segment") && !phrase.trim()}>${text(`image.${verb}`)}</button>`)}</p>
    ${ran && !regions.length && html`<p>${text("image.noregions")}</p>`}
    ${regions.length > 0 && html`<fieldset><legend>${text("image.shown")}</legend>${regions.map((region, i) => html`<label class="check">
      <input type="checkbox" checked=${!hidden.has(i)} onChange=${() => {
        const next = new Set(hidden);
        if (!next.delete(i)) next.add(i);
        setHidden(next);
      }} /><span class="swatch" style=${{ background: COLORS[i % COLORS.length] }}></span>
      ${region.label} ${region.score === null ? "" : region.score.toFixed(2)}</label>`)}</fieldset>`}
    <p class="error" role="alert">${error}</p></div>`;
}

function Explain({ image, model, setHeat, strength, setStrength }) {
  const [value, setValue] = useState(image.caption.text ?? "");
  const [error, setError] = useState("");
  async function run(event) {
    event.preventDefault();
    try {
      const answer = await post("api/explain", { model: model.id, images: { path: image.path }, texts: value.trim() });
      setHeat(answer.maps[0]);
      setError("");
    } catch (problem) {
      setError(problem.message);
    }
  }
  return html`<form onSubmit=${run}>
    <label>${text("image.explain.hint")}<input value=${value} onInput=${(event) => setValue(event.target.value)} /></label>
    <button class="primary">${text("image.run")}</button>
    <label>${text("image.map")}<input type="range" min="0" max="1" step="0.1" value=${strength} onInput=${(event) => setStrength(Number(event.target.value))} /></label>
    <p class="error" role="alert">${error}</p></form>`;
}

function Caption({ image, model }) {
  const [captions, setCaptions] = useState([]);
  const [error, setError] = useState("");
  async function run() {
    try {
      const answer = await post("api/caption", { model: model.id, images: { path: image.path } });
      setCaptions([...captions, ...answer.captions]);
      setError("");
    } catch (problem) {
      setError(problem.message);
    }
  }
  return html`<div><button class="primary" onClick=${run}>${text("image.run")}</button>
    <ul aria-live="polite">${captions.map((caption) => html`<li>${caption}</li>`)}</ul><p class="error" role="alert">${error}</p></div>`;
}

export function ImageRoom() {
  const { id, at } = route.value; // at: second at which a video begins
  const [image, setImage] = useState(null);
  const [error, setError] = useState("");
  const [size, setSize] = useState({ width: 1, height: 1 });
  const [tool, setTool] = useState("ask");
  const [chosen, setChosen] = useState("");
  const [regions, setRegions] = useState([]);
  const [hidden, setHidden] = useState(new Set());
  const [heat, setHeat] = useState(null);
  const [strength, setStrength] = useState(0.9);
  useEffect(() => {
    setImage(null);
    setError("");
    setRegions([]);
    setHeat(null);
    get(`api/images/${id}/info`).then(setImage, (problem) => setError(problem.status === 404 ? text("image.missing") : problem.message));
  }, [id]);
  async function step(by) {
    const index = opened.index + by;
    const row = opened.rows && index >= 0 && index < opened.rows.total.value && (await opened.rows.row(index));
    if (!row) return;
    opened.index = opened.rows.active = index;
    go("image", row.id, row.start);
  }
  useEffect(() => {
    function onKey(event) {
      if (isTyping(event)) return;
      const acts = { ArrowLeft: () => step(-1), ArrowRight: () => step(1), Escape: () => go("library"), Backspace: () => go("library") };
      if (!(event.key in acts)) return;
      event.preventDefault();
      acts[event.key]();
    }
    addEventListener("keydown", onKey);
    return () => removeEventListener("keydown", onKey);
  });
  if (!image) return html`<p role="alert" class="error">${error}</p>`;
  const needed = TOOLS.find(([name]) => name === tool)[1];
  const able = info.value.models.filter((model) => needed.some((verb) => model.capabilities.includes(verb)));
  const model = able.find((each) => each.id === (chosen || preferred.value)) ?? able[0];
  const shared = { image, model };
  return html`<section class="image-room" aria-label=${text("room.image")}>
    <p class="buttons"><a class="button" href="#/library">${text("image.back")}</a>
      ${opened.rows && html`<button onClick=${() => step(-1)} disabled=${opened.index === 0}>${text("image.previous")} <kbd>\u2190</kbd></button>
        <button onClick=${() => step(1)} disabled=${opened.index + 1 >= opened.rows.total.value}>${text("image.next")} <kbd>\u2192</kbd></button>`}
      ${info.value.index && html`<button onClick=${() => searchLike(id)}>${text("hit.similar")}</button>`}</p>
    <h1>${image.path}</h1>
    <div class="split">
      <div><div class="frame" style=${{ aspectRatio: `${size.width} / ${size.height}`, width: `min(100%, ${(66 * size.width) / size.height}vh)` }}>${image.video ? html`<video controls preload="metadata" src=${`${original(id)}#t=${at}`} aria-label=${image.caption.text ?? image.path}
          onLoadedMetadata=${(event) => setSize({ width: event.target.videoWidth || 1, height: event.target.videoHeight || 1 })}></video>`
        : html`<img src=${original(id)} alt=${image.caption.text ?? image.path}
        onLoad=${(event) => setSize({ width: event.target.naturalWidth, height: event.target.naturalHeight })} />`}
        <${Overlay} regions=${tool === "regions" ? regions : []} hidden=${hidden} size=${size} heat=${tool === "explain" && heat} strength=${strength} /></div>
        <p>${image.caption.text ?? html`<em>${text("caption.none")}</em>`}</p>
        <p class="note">${text("image.size", { width: size.width, height: size.height })}${image.duration ? `, ${lengthText(image.duration)}` : ""}</p></div>
      ${!image.video && html`<div class="tools">
        <div class="tabs" role="group" aria-label=${text("image.tools")}>${TOOLS.map(([name]) => html`<button aria-pressed=${tool === name ? "true" : "false"} onClick=${() => setTool(name)}>${text(`image.${name}`)}</button>`)}</div>
        ${able.length > 1 && html`<label>${text("image.model")}<select value=${model.id} onChange=${(event) => setChosen(event.target.value)}>
          ${able.map((each) => html`<option value=${each.id}>${each.id}</option>`)}</select></label>`}
        ${!model && html`<p class="empty">${text("image.cannot", { verbs: needed.join(", "), models: info.value.models.map((each) => each.id).join(", ") })} <code>sightloop models</code></p>`}
        ${model && tool === "ask" && html`<${Ask} ...${shared} key=${id} />`}
        ${model && tool === "judge" && html`<${Scores} key=${`judge ${id}`} label=${text("image.judge.hint")} initial=${image.caption.text}
          run=${async (texts) => (await post("api/match", { model: model.id, images: { path: image.path }, texts })).probabilities} />`}
        ${model && tool === "classify" && html`<${Scores} key=${`classify ${id}`} label=${text("image.classify.hint")}
          run=${async (labels) => (await post("api/classify", { model: model.id, images: { path: image.path }, labels })).probabilities[0]} />`}
        ${model && tool === "regions" && html`<${Regions} ...${shared} regions=${regions} setRegions=${setRegions} hidden=${hidden} setHidden=${setHidden} />`}
        ${model && tool === "explain" && html`<${Explain} ...${shared} setHeat=${setHeat} strength=${strength} setStrength=${setStrength} />`}
        ${model && tool === "caption" && html`<${Caption} ...${shared} key=${id} />`}
      </div>`}</div></section>`;
}
