"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const find = (id) => document.getElementById(id);
  const cards = find("cards");
  if (!cards) return;
  const trained = data.runs.some((run) => run.trained);
  cards.classList.add("slide");
  if (!trained) cards.classList.add("single");

  // Texts are only ever set as text: a prompt cannot become markup.
  function make(tag, className, text, attributes = {}) {
    const element = document.createElement(tag);
    if (className) element.className = className;
    if (text !== undefined) element.textContent = text;
    for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
    return element;
  }
  const signed = (value, digits = 2) => (value < 0 ? "−" : "+") + Math.abs(value).toFixed(digits);
  const tone = (value) => (value > 0 ? "up" : value < 0 ? "down" : "");
  const known = (value) => value !== null && value !== undefined;

  // The value that sorts and filters: the difference, of a base alone the value itself.
  function gain(prompt, metric) {
    const chosen = find("run") ? Number(find("run").value) : null;
    const run = prompt.runs.find((one) => chosen === null || one.run === chosen);
    const means = run && run.means[metric];
    if (!means || !known(means[0])) return null;
    return known(means[1]) ? means[1] - means[0] : data.runs[run.run].trained ? null : means[0];
  }

  function imageOf(index, className, alt) {
    const image = make("img", className, undefined, { alt, draggable: "false", decoding: "async" });
    image.src = data.images[index];
    image.addEventListener("load", () => image.classList.toggle("pixels", image.naturalWidth <= 128));
    return image;
  }

  function mark(accuracy) {
    return known(accuracy) ? (accuracy ? " ✓" : " ✗") : "";
  }

  function stageOf(prompt, run) {
    const stage = make("div", "stage");
    const slider = make("input", "", undefined, { type: "range", min: 0, max: 100, value: 50, "aria-label": "base to the left, LoRA to the right: " + prompt.text });
    slider.addEventListener("input", () => stage.style.setProperty("--cut", slider.value + "%"));
    const flipper = make("button", "flipper", undefined, { type: "button", "aria-label": "flip between base and LoRA: " + prompt.text });
    flipper.addEventListener("click", () => stage.classList.toggle("turned"));
    stage.show = (item) => {
      const paired = item.after !== null;
      const parts = [imageOf(item.before, "before", "base: " + prompt.text)];
      if (paired) parts.push(imageOf(item.after, "after", "LoRA: " + prompt.text));
      const name = (trained ? "base" : "") + mark(item.accuracy[0]);
      if (name) parts.push(make("span", "tag left", name));
      if (paired) parts.push(make("span", "tag right", "LoRA" + mark(item.accuracy[1])), slider, make("span", "knob", "⇆", { "aria-hidden": "true" }), flipper);
      stage.replaceChildren(...parts);
    };
    return stage;
  }

  function valuesOf(run) {
    const line = make("p", "values");
    const add = (name, text, delta) => {
      const part = make("span", "", name + " " + text + " ");
      if (known(delta)) part.append(make("b", tone(delta), signed(delta)));
      line.append(part);
    };
    const [before, after] = run.means.reward;
    add("reward", before.toFixed(2), known(after) ? after - before : null);
    if (run.right[0]) add("right", run.right[1] ? `${run.right[0][0]} → ${run.right[1][0]} of ${run.right[0][1]}` : `${run.right[0][0]} of ${run.right[0][1]}`);
    return line;
  }

  function runOf(prompt, run) {
    const box = make("div", "of-run");
    if (data.runs.length > 1) {
      const name = make("h4", "", data.runs[run.run].name);
      name.prepend(make("i", "dot s" + (run.run % 8)));
      box.append(name);
    }
    const stage = stageOf(prompt, run);
    const picks = make("div", "picks", undefined, { role: "group", "aria-label": "other noise" });
    const buttons = run.items.map((item) => {
      const button = make("button", "", undefined, { type: "button", title: "image " + (item.number + 1) });
      button.append(imageOf(item.after ?? item.before, "", ""));
      const change = known(item.reward[1]) ? item.reward[1] - item.reward[0] : null;
      button.append(make("span", change === null ? "" : tone(change), change === null ? item.reward[0].toFixed(1) : signed(change, 1)));
      button.addEventListener("click", () => pick(item));
      return button;
    });
    function pick(item) {
      stage.show(item);
      run.items.forEach((one, index) => buttons[index].setAttribute("aria-pressed", String(one === item)));
    }
    box.lead = (order) => pick(run.items[order === "loss" ? 0 : run.items.length - 1]);
    box.middle = () => pick(run.items[Math.floor((run.items.length - 1) / 2)]);
    picks.append(...buttons);
    box.append(stage, valuesOf(run));
    if (run.items.length > 1) box.append(picks);
    box.middle();
    return box;
  }

  function cardOf(prompt) {
    const card = make("article", "card");
    card.append(make("h3", "", prompt.text));
    if (prompt.category) card.append(make("span", "chip", prompt.category));
    const runs = make("div", "runs");
    runs.append(...prompt.runs.map((run) => runOf(prompt, run)));
    card.append(runs);
    card.lead = (order) => [...runs.children].forEach((box) => (order === "file" ? box.middle() : box.lead(order)));
    return card;
  }

  const made = new Map();
  const card = (prompt) => made.get(prompt) ?? made.set(prompt, cardOf(prompt)).get(prompt);

  const outcomes = {
    up: (prompt) => gain(prompt, "reward") > 0,
    down: (prompt) => gain(prompt, "reward") < 0,
    righted: (prompt) => gain(prompt, "accuracy") > 0,
    wronged: (prompt) => gain(prompt, "accuracy") < 0,
  };
  function wanted(prompt) {
    const outcome = find("outcome")?.value;
    const category = find("category").value;
    const words = find("search").value.trim().toLowerCase();
    return (!category || prompt.category === category) && (!outcome || outcomes[outcome](prompt)) && prompt.text.toLowerCase().includes(words);
  }

  // At first a row or so, with the numbers close below; then more cards at a time.
  const FIRST = data.runs.length > 1 ? 2 : matchMedia("(max-width: 640px)").matches ? 2 : 4, STEP = 24;
  let limit = FIRST;
  function update() {
    const order = find("sort").value;
    const metric = find("metric").value;
    let shown = data.prompts.filter(wanted);
    if (order !== "file") {
      const direction = order === "gain" ? -1 : 1;
      const value = (prompt) => gain(prompt, metric) ?? -direction * Infinity; // without a value: last
      const compare = (a, b) => (value(a) === value(b) ? 0 : direction * (value(a) - value(b)));
      shown = shown.sort(compare);
    }
    const first = shown.slice(0, limit);
    cards.replaceChildren(...first.map(card));
    first.forEach((prompt) => card(prompt).lead(order));
    find("count").textContent = `${shown.length} of ${data.prompts.length} prompts`;
    find("none").hidden = shown.length > 0;
    find("more").hidden = shown.length <= limit;
    const rest = shown.length - limit;
    find("more").textContent = rest > STEP ? `Show ${STEP} more of ${rest}` : `Show ${rest} more`;
  }

  function view() {
    const chosen = document.querySelector("input[name=view]:checked")?.value ?? "slide";
    for (const name of ["slide", "flip", "pair"]) cards.classList.toggle(name, name === chosen);
    find("flip").hidden = chosen !== "flip";
  }

  const names = [...new Set(data.prompts.map((prompt) => prompt.category).filter(Boolean))];
  find("category").append(...names.map((name) => make("option", "", name, { value: name })));
  find("category").parentElement.hidden = !names.length;
  const judged = data.prompts.some((prompt) => prompt.runs.some((run) => run.right[0]));
  for (const option of document.querySelectorAll("[data-needs=accuracy]")) if (!judged) option.remove();
  find("tools").addEventListener("submit", (event) => event.preventDefault());
  find("tools").addEventListener("input", (event) => {
    if (event.target.name === "view") return view();
    limit = STEP;
    update();
  });
  find("more").addEventListener("click", () => { limit += STEP; update(); });
  find("flip").addEventListener("click", () => {
    const stages = [...cards.querySelectorAll(".stage")];
    const turn = !stages.every((stage) => stage.classList.contains("turned"));
    stages.forEach((stage) => stage.classList.toggle("turned", turn));
  });
  find("clear").addEventListener("click", () => { find("tools").reset(); view(); update(); });
  view();
  update();
})();
