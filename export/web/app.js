// The page: what is chosen, what is shown, and one attack at a time.

import { attack, uniform } from "./attack.js";
import { Model, paint, probabilities, readPicture } from "./model.js";

const SHOWN = 3; // classes of a prediction
const $ = (id) => document.getElementById(id);

let demo; // demo.json: models and samples, as prepare.py wrote them
let model; // the open one
let picture; // what was chosen, decoded
let image, label; // the same as the model reads it, and the class that it gets
let stopped = false; // the running attack shall end, and say how far it came
let job = 0; // of two overlapping jobs the later one wins: every step asks whether it is still its turn

function say(text, isError = false) {
  $("status").textContent = text;
  $("status").classList.toggle("error", isError);
}

const entry = () => demo.models[$("model").value];
const name = (k) => entry().classes[k] ?? `class ${k}`;
const eps = () => $("eps").value / 255;

function list(id, said, wrong) {
  const shares = probabilities(said);
  const order = shares.map((_, k) => k).sort((a, b) => shares[b] - shares[a]);
  const rows = order.slice(0, SHOWN).map((k) => {
    const row = document.createElement("li");
    const [what, share] = [document.createElement("span"), document.createElement("span")];
    const bar = document.createElement("div");
    bar.className = "bar";
    bar.append(document.createElement("div"));
    bar.firstChild.style.width = `${100 * shares[k]}%`;
    what.textContent = name(k);
    share.textContent = `${(100 * shares[k]).toFixed(1)} %`;
    row.append(what, share, bar);
    return row;
  });
  $(id).replaceChildren(...rows);
  $(id).classList.toggle("wrong", wrong);
  return order[0];
}

function clear() {
  for (const id of ["change", "after"]) paint($(id), new Float32Array(3).fill(0.5), [3, 1, 1]);
  $("scores-after").replaceChildren();
}

/** Begin a job: whatever ran before must not write any more. */
function begin() {
  $("attack").disabled = true;
  $("stop").disabled = true;
  return ++job;
}

/** Run something that the reader began, and say what went wrong with it. */
async function guard(work) {
  try {
    await work();
  } catch (error) {
    begin();
    say(error.message, true);
    $("attack").disabled = !(model && image); // what was there before is still there
  }
}

async function openModel() {
  begin();
  model = image = undefined;
  say("Loading the model.");
  const wanted = $("model").value;
  const opened = await Model.open(`demo/${entry().file}`);
  if (wanted !== $("model").value) return; // another one was chosen meanwhile, and is loading
  model = opened;
  $("eps").value = Math.round(255 * (entry().eps ?? 8 / 255));
  showEps();
  await classify();
}

async function choose(load, pressed) {
  const mine = begin();
  const chosen = await load();
  if (mine !== job) return;
  picture = chosen;
  if (pressed) $("file").value = "";
  for (const button of $("samples").children) button.setAttribute("aria-pressed", button === pressed);
  await classify();
}

async function classify() {
  const mine = begin();
  if (!model) return; // it classifies when it is there
  if (!picture) return say("Choose a picture.");
  clear();
  image = readPicture(picture, model.shape);
  const scores = await model.scores(image);
  if (mine !== job) return;
  paint($("before"), image, model.shape);
  label = list("scores-before", scores, false);
  say(`The model says ${name(label)}.`);
  $("attack").disabled = false;
}

async function run() {
  const mine = begin();
  const [used, size] = [model, eps()];
  const task = { image, shape: used.shape, label, eps: size, budget: Number($("budget").value), random: uniform(0) };
  let last;
  let shown = -Infinity;
  stopped = false;
  $("stop").disabled = false;
  for await (const step of attack({ ...task, scores: (trial) => used.scores(trial) })) {
    if (mine !== job) return;
    last = step;
    if (stopped) break;
    if (performance.now() > shown + 50) {
      show(step, size);
      say(`Attacking: ${step.queries} queries, margin ${step.margin.toFixed(2)}.`);
      await new Promise((ready) => setTimeout(ready)); // else nothing is painted, and no button heard
      shown = performance.now();
    }
  }
  if (mine !== job) return;
  const after = show(last, size);
  const spent = `${last.queries} ${last.queries === 1 ? "query" : "queries"}`;
  if (last.found) say(`Taken for ${name(after)} in place of ${name(label)} after ${spent}.`);
  else say(`Still ${name(label)} after ${spent}. This attack found nothing, which proves nothing: another one might.`);
  $("attack").disabled = false;
  $("stop").disabled = true;
}

function show(step, size) {
  const change = step.image.map((value, i) => (size > 0 ? 0.5 + (value - image[i]) / (2 * size) : 0.5));
  paint($("change"), change, model.shape);
  paint($("after"), step.image, model.shape);
  return list("scores-after", step.scores, step.found);
}

function showEps() {
  $("eps-shown").textContent = `${$("eps").value}/255`;
}

async function decode(blob) {
  try {
    return await createImageBitmap(blob);
  } catch {
    throw new Error("This file is no picture that the browser can read.");
  }
}

async function fetchSample(file) {
  const response = await fetch(`demo/${file}`);
  if (!response.ok) throw new Error(`demo/${file} cannot be fetched (status ${response.status})`);
  return decode(await response.blob());
}

async function start() {
  const response = await fetch("demo/demo.json");
  if (!response.ok) throw new Error("There is no demo/demo.json yet: python export/web/prepare.py RESULT makes it.");
  demo = await response.json();
  $("model").replaceChildren(...demo.models.map((found, i) => new Option(found.name, i)));
  for (const sample of demo.samples) {
    const button = document.createElement("button");
    const thumbnail = document.createElement("img");
    thumbnail.src = `demo/${sample.file}`;
    thumbnail.alt = `sample: ${sample.label}`;
    button.type = "button";
    button.append(thumbnail);
    button.addEventListener("click", () => guard(() => choose(() => fetchSample(sample.file), button)));
    $("samples").append(button);
  }
  $("model").addEventListener("change", () => guard(openModel));
  $("file").addEventListener("change", () => {
    const file = $("file").files[0];
    if (file) guard(() => choose(() => decode(file), null));
  });
  $("eps").addEventListener("input", showEps);
  $("attack").addEventListener("click", () => guard(run));
  $("stop").addEventListener("click", () => (stopped = true));
  await openModel();
  const first = demo.samples[0];
  if (first) await choose(() => fetchSample(first.file), $("samples").firstElementChild);
}

guard(start);
