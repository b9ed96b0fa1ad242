// One question at a time. What the server has stored is the truth: the page asks it where to go on, and sends an answer
// again, under the same request, until the server says that it has it.
const $ = (id) => document.getElementById(id);
const body = document.body;
const PENDING = `pending ${location.pathname}`; // an answer that was not acknowledged before the page was reloaded
const GREETED = `greeted ${location.pathname}`;
const SMALL = 256; // px: pictures below are enlarged by whole factors, pixel by pixel
const LARGEST_FACTOR = 12;
const FIRST_WAIT = 250, LONGEST_WAIT = 4000, PATIENCE = 10000; // ms

let state = null; // as the server last told it
let ready = false; // the question is on the screen with its pictures, and may be answered
let sending = false; // an answer is on its way
let shownAt = 0;
let following = null; // what comes after the feedback of a training answer
let showing = 0; // counts what was shown, so that a picture that comes late is not taken for the present one

function setReady(value) {
  ready = value;
  $("panel").ariaBusy = String(!value);
  if (value) shownAt = performance.now();
}

const pause = (ms) => new Promise((done) => setTimeout(done, ms));

function tell(text, waiting = false) {
  $("status").textContent = text;
  $("status").classList.toggle("waiting", waiting);
}

// Try until it works, waiting longer each time.
async function insist(attempt, message) {
  for (let wait = FIRST_WAIT; ; wait = Math.min(2 * wait, LONGEST_WAIT)) {
    try {
      return await attempt();
    } catch {
      tell(message, true);
      await pause(wait * (0.75 + Math.random() / 2));
    }
  }
}

async function call(path, options = {}) {
  const response = await fetch(path, { cache: "no-store", signal: AbortSignal.timeout(PATIENCE), ...options });
  if (response.status >= 500 || response.status === 429) throw new Error(response.status);
  return response;
}

async function goOn() {
  const response = await insist(() => call("state"), "Reconnecting…");
  if (!response.ok) return fail("What you answered is stored");
  tell("");
  show(await response.json());
}

function newRequest() {
  const bytes = crypto.getRandomValues(new Uint8Array(16)); // randomUUID is for secure contexts only
  return Array.from(bytes, (byte) => byte.toString(16).padStart(2, "0")).join("");
}

async function send(answer) {
  sending = true;
  setReady(false);
  sessionStorage.setItem(PENDING, JSON.stringify(answer));
  tell("Saving…");
  const options = {
    method: "POST",
    headers: { "Content-Type": "application/json", "X-Rate": "1" },
    body: JSON.stringify(answer),
  };
  const reply = await insist(async () => {
    const response = await call("answers", options);
    return response.ok || response.status === 409 ? response.json() : null;
  }, "Reconnecting… your answer is kept");
  sessionStorage.removeItem(PENDING);
  sending = false;
  if (reply === null) return fail(`Your last answer was not ${answer.value === null ? "taken back" : "stored"}`);
  tell(reply.stored ? "" : "This was answered before");
  if (state && reply.stored && reply.known !== null) {
    teach(reply);
  } else {
    show(reply.state);
  }
}

function fail(stored) {
  body.dataset.screen = "end";
  $("farewell").textContent = "Something is wrong";
  $("epilogue").textContent = `The server does not take this page's answers. ${stored}: open your link again.`;
  $("again").hidden = true;
  tell("");
}

function choose(value) {
  if (!ready) return;
  const { task, dimension } = state.question;
  for (const button of $("answers").children) button.classList.toggle("chosen", Number(button.value) === value);
  send({ request: newRequest(), task, dimension, value, ms: Math.round(performance.now() - shownAt) });
}

function undo() {
  if (!state?.last || following || sending || !(ready || body.dataset.screen === "end")) return;
  const { task, dimension } = state.last;
  send({ request: newRequest(), task, dimension, value: null, ms: 0 });
}

// Training: the right answer beside one's own, until one goes on.
function teach(reply) {
  following = reply.state;
  for (const button of $("answers").children) {
    const value = Number(button.value);
    button.disabled = true;
    if (value === reply.known) button.dataset.mark = "right";
    else if (value === reply.value) button.dataset.mark = "wrong";
  }
  const right = state.question.answers[reply.known];
  $("verdict").textContent = reply.known === reply.value ? "That is right." : `The right answer is: ${nameOf(right)}.`;
  $("undo").disabled = true;
  $("feedback").hidden = false;
  $("go").focus();
}

function leaveLesson() {
  if (!following) return;
  const next = following;
  following = null;
  show(next);
}

function nameOf(answer) {
  return state.mode === "pairs" ? answer.text : answer.name;
}

async function show(next) {
  const before = state?.question;
  state = next;
  setReady(false);
  const current = ++showing;
  closeZoom();
  body.dataset.mode = state.mode;
  $("undo").disabled = !state.last;
  $("feedback").hidden = true;
  progress();
  const question = state.question;
  if (!question) return finish();
  if (before?.task !== question.task) await showPictures(question.pictures, current);
  if (current !== showing) return;
  body.dataset.screen = "question";
  ask(question);
  fit();
  $("stage").classList.add("shown");
  for (const address of state.upcoming) new Image().src = address;
  greet();
  setReady(true);
}

function progress() {
  const { done, total, question } = state;
  $("count").textContent = total ? `${Math.min(done + 1, total)} of ${total}` : "Picture study";
  $("badge").hidden = !question?.training;
  const share = total ? (done + (question ? question.step / question.steps : 0)) / total : 0;
  $("bar").setAttribute("aria-valuemax", total);
  $("bar").setAttribute("aria-valuenow", done);
  $("bar").firstElementChild.style.width = `${100 * share}%`;
}

function ask(question) {
  $("step").textContent = question.steps > 1 ? `Question ${question.step + 1} of ${question.steps}` : "";
  $("title").textContent = question.title;
  $("text").textContent = question.text;
  $("look").replaceChildren(...question.look_for.map((line) => element("li", line)));
  $("asked").classList.toggle("hidden", question.prompt === null);
  $("prompt").textContent = question.prompt ?? "not shown for this question";
  const pairs = state.mode === "pairs";
  const answers = pairs ? question.answers : question.answers.toReversed();
  const keys = pairs ? ["←", "T", "→"] : ["1", "2", "3", "4"];
  $("answers").replaceChildren(...answers.map((answer, i) => {
    const button = element("button", element("kbd", keys[i]), element("b", nameOf(answer)));
    if (!pairs) button.append(element("span", answer.text));
    button.type = "button";
    button.value = answer.value;
    button.addEventListener("click", () => choose(answer.value));
    return button;
  }));
  $("panel").scrollTop = 0;
}

function element(name, ...children) {
  const made = document.createElement(name);
  made.append(...children);
  return made;
}

async function showPictures(addresses, current) {
  $("stage").classList.remove("shown");
  const images = await Promise.all(addresses.map((address) => load(address)));
  if (current !== showing) return;
  $("stage").replaceChildren(...images.map((image, i) => {
    const frame = element("div", image);
    frame.className = "frame";
    const figure = element("figure", frame);
    if (images.length > 1) figure.prepend(element("figcaption", "AB"[i]));
    image.alt = images.length > 1 ? `Picture ${"AB"[i]}` : "The picture to grade";
    image.draggable = false;
    image.addEventListener("click", (event) => openZoom(i, event));
    return figure;
  }));
}

async function load(address) {
  const image = await insist(async () => {
    const made = new Image();
    made.src = address;
    await made.decode();
    return made;
  }, "Waiting for the picture…");
  if ($("status").textContent.startsWith("Waiting")) tell("");
  return image;
}

// As large as there is room: large pictures are made smaller, small ones larger by a whole factor.
function fit() {
  for (const image of $("stage").querySelectorAll("img")) {
    const frame = image.parentElement;
    const room = Math.min(frame.clientWidth / image.naturalWidth, frame.clientHeight / image.naturalHeight);
    const small = Math.max(image.naturalWidth, image.naturalHeight) < SMALL;
    const factor = room < 1 ? room : small ? Math.min(Math.floor(room), LARGEST_FACTOR) : 1;
    image.classList.toggle("small", small && factor >= 1);
    image.style.width = `${image.naturalWidth * factor}px`;
    image.style.height = `${image.naturalHeight * factor}px`;
  }
}

function finish() {
  body.dataset.screen = "end";
  const some = state.total > 0;
  $("farewell").textContent = some ? "Thank you!" : "Nothing to do yet";
  $("epilogue").textContent = some
    ? "You have answered everything, and all of it is stored. You can close this page."
    : "Keep this link: pictures will be here when others have disagreed about them.";
  $("again").hidden = false;
}

function greet() {
  if (state.done || state.question.step || localStorage.getItem(GREETED)) return;
  openGuide();
}

function openGuide() {
  const pairs = state?.mode === "pairs";
  $("pitch").textContent = pairs
    ? "You see two pictures of the same prompt, side by side. Say which one is better, or that they are equally good."
    : "You see one picture at a time, and are asked about one aspect of it at a time. Read what each grade means: it " +
      "differs from question to question.";
  const rows = pairs
    ? [["← →", "A or B is better"], ["T =", "equally good"]]
    : [["1 2 3 4", "Excellent, Good, Pass, Fail"]];
  rows.push(["U ⌫", "undo the last answer"], ["Z", "full size, as a click on the picture; drag to move"], ["?", "this help"]);
  $("keys").replaceChildren(...rows.flatMap(([keys, text]) => [
    element("dt", ...keys.split(" ").map((key) => element("kbd", key))),
    element("dd", text),
  ]));
  const first = !localStorage.getItem(GREETED);
  $("start").replaceChildren(first ? "Start " : "Close ", element("kbd", "Enter"));
  if (!$("guide").open) $("guide").showModal();
}

$("guide").addEventListener("close", () => {
  localStorage.setItem(GREETED, "1");
  shownAt = performance.now();
});

// The picture in its own pixels; small ones at twice the size that fits.
let zoomedPicture = 0;

function openZoom(index = 0, event = null) {
  const source = $("stage").querySelectorAll("img")[index];
  if (!ready || !source) return;
  zoomedPicture = index;
  const image = $("zoomed").querySelector("img");
  const small = source.classList.contains("small");
  const factor = small ? 2 * Math.max(1, Math.round(source.clientWidth / source.naturalWidth)) : 1;
  image.src = source.src;
  image.className = source.className;
  image.style.width = `${source.naturalWidth * factor}px`;
  image.style.height = `${source.naturalHeight * factor}px`;
  const pair = state.question.pictures.length > 1;
  $("hint").textContent = pair ? `Picture ${"AB"[index]} · ← → for the other one · Z to close` : "Drag to move · Z to close";
  const place = $("zoomed");
  const [x, y] = place.hidden ? whereIn(source, event) : [viewCentre(place, "x"), viewCentre(place, "y")];
  place.hidden = false;
  place.scrollLeft = x * place.scrollWidth - place.clientWidth / 2;
  place.scrollTop = y * place.scrollHeight - place.clientHeight / 2;
  place.focus();
}

// Where in the picture the pointer is, as shares of its sides; the middle where there is none.
function whereIn(image, event) {
  if (!event) return [0.5, 0.5];
  const box = image.getBoundingClientRect();
  return [(event.clientX - box.left) / box.width, (event.clientY - box.top) / box.height];
}

function viewCentre(place, axis) {
  return axis === "x"
    ? (place.scrollLeft + place.clientWidth / 2) / place.scrollWidth
    : (place.scrollTop + place.clientHeight / 2) / place.scrollHeight;
}

function closeZoom() {
  $("zoomed").hidden = true;
}

let drag = null;
$("zoomed").addEventListener("pointerdown", (event) => {
  const { scrollLeft, scrollTop } = $("zoomed");
  drag = { x: event.clientX, y: event.clientY, scrollLeft, scrollTop, moved: false, mouse: event.pointerType === "mouse" };
});
$("zoomed").addEventListener("pointermove", (event) => {
  if (!drag) return;
  const [x, y] = [event.clientX - drag.x, event.clientY - drag.y];
  drag.moved ||= Math.hypot(x, y) > 4;
  if (!drag.mouse || !drag.moved) return; // a finger scrolls by itself
  $("zoomed").classList.add("dragging");
  $("zoomed").scrollTo(drag.scrollLeft - x, drag.scrollTop - y);
});
$("zoomed").addEventListener("click", () => {
  if (!drag?.moved) closeZoom();
});
addEventListener("pointerup", () => {
  $("zoomed").classList.remove("dragging");
  setTimeout(() => (drag = null)); // after the click that belongs to it
});

function keyInZoom(key) {
  const steps = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
  if (["z", "Z", "Escape", "Enter"].includes(key)) closeZoom();
  else if (state.mode === "pairs" && ["ArrowLeft", "ArrowRight"].includes(key)) openZoom(key === "ArrowLeft" ? 0 : 1);
  else if (key in steps) $("zoomed").scrollBy(80 * steps[key][0], 80 * steps[key][1]);
  else return false;
  return true;
}

const ANSWER_KEYS = {
  grades: { 1: 3, 2: 2, 3: 1, 4: 0 },
  pairs: { ArrowLeft: 0, t: 1, T: 1, "=": 1, ArrowRight: 2 },
};

function press(key) {
  if (following) {
    if (key !== "Enter" && key !== " ") return false;
    leaveLesson();
  } else if (!$("zoomed").hidden && keyInZoom(key)) {
    return true;
  } else if (state && key in ANSWER_KEYS[state.mode]) {
    choose(ANSWER_KEYS[state.mode][key]);
  } else if (["u", "U", "Backspace"].includes(key)) {
    undo();
  } else if (["z", "Z"].includes(key)) {
    openZoom();
  } else if (key === "?") {
    openGuide();
  } else {
    return false;
  }
  return true;
}

addEventListener("keydown", (event) => {
  const elsewhere = $("guide").open || event.ctrlKey || event.altKey || event.metaKey;
  const scrolls = !$("zoomed").hidden && event.key.startsWith("Arrow");
  if (elsewhere || (event.repeat && !scrolls)) return;
  if (press(event.key)) event.preventDefault();
});
$("undo").addEventListener("click", undo);
$("zoom").addEventListener("click", () => openZoom());
$("help").addEventListener("click", openGuide);
$("go").addEventListener("click", leaveLesson);
$("again").addEventListener("click", goOn);
new ResizeObserver(fit).observe($("stage"));

const pending = sessionStorage.getItem(PENDING);
if (pending) send(JSON.parse(pending));
else goOn();
