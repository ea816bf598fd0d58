// Draws saved ipywidgets in a page without a kernel, from the state that the notebook holds: boxes, stacks,
// pictures, HTML, sliders over a list, buttons, and the links between them. Nothing is fetched from anywhere.
"use strict";

(function () {
  const STATE = "application/vnd.jupyter.widget-state+json";
  const VIEW = "application/vnd.jupyter.widget-view+json";
  const PREFIX = "IPY_MODEL_";

  /** The models of a page by id; each knows its values and who wants to hear of a change. */
  function readModels(saved) {
    const models = {};
    for (const [id, { model_name: kind, state, buffers = [] }] of Object.entries(saved)) {
      const values = { ...state };
      for (const { path, data } of buffers) values[path[0]] = data; // base64, as it is wanted below
      models[id] = { kind, values, listeners: {} };
    }
    return models;
  }

  function set(model, name, value) {
    if (model.values[name] === value) return;
    model.values[name] = value;
    for (const listener of model.listeners[name] || []) listener(value);
  }

  function listen(model, name, listener) {
    (model.listeners[name] ||= []).push(listener);
    listener(model.values[name]);
  }

  function resolve(models, reference) {
    return models[reference.slice(PREFIX.length)];
  }

  /** `jslink` goes both ways, `jsdlink` one way. */
  function connect(models) {
    for (const { kind, values } of Object.values(models)) {
      if (kind !== "LinkModel" && kind !== "DirectionalLinkModel") continue;
      const [source, from] = [resolve(models, values.source[0]), values.source[1]];
      const [target, to] = [resolve(models, values.target[0]), values.target[1]];
      listen(source, from, (value) => set(target, to, value));
      if (kind === "LinkModel") listen(target, to, (value) => set(source, from, value));
    }
  }

  function element(tag, className, properties = {}) {
    const made = Object.assign(document.createElement(tag), properties);
    made.className = className;
    return made;
  }

  function labelled(model, ...parts) {
    const row = element("div", "sdnb-widget-row");
    const name = model.values.description;
    if (name) row.append(element("span", "sdnb-widget-name", { textContent: name }));
    row.append(...parts);
    return row;
  }

  function box(models, model, className) {
    const made = element("div", className);
    for (const child of model.values.children) made.append(draw(models, resolve(models, child)));
    return made;
  }

  function stack(models, model) {
    const made = box(models, model, "sdnb-widget-stack");
    listen(model, "selected_index", (chosen) => {
      [...made.children].forEach((child, index) => (child.hidden = index !== chosen));
    });
    return made;
  }

  function image(models, model) {
    const made = element("img", "sdnb-widget-image", { alt: "frame of the explorer" });
    made.src = `data:image/${model.values.format};base64,${model.values.value}`;
    return made;
  }

  function slider(models, model) {
    const labels = model.values._options_labels;
    const range = element("input", "sdnb-widget-slider", { type: "range", min: 0, max: labels.length - 1 });
    range.setAttribute("aria-label", model.values.description);
    const readout = element("output", "sdnb-widget-readout");
    range.addEventListener("input", () => set(model, "index", Number(range.value)));
    listen(model, "index", (index) => {
      range.value = index;
      readout.textContent = labels[index];
      range.setAttribute("aria-valuetext", labels[index]);
    });
    return labelled(model, range, readout);
  }

  function buttons(models, model) {
    const made = model.values._options_labels.map((label, index) => {
      const button = element("button", "sdnb-widget-button", { type: "button", textContent: label });
      button.addEventListener("click", () => set(model, "index", index));
      return button;
    });
    listen(model, "index", (chosen) => {
      made.forEach((button, index) => button.setAttribute("aria-pressed", String(index === chosen)));
    });
    return labelled(model, ...made);
  }

  const DRAWN = {
    VBoxModel: (models, model) => box(models, model, "sdnb-widget-column"),
    HBoxModel: (models, model) => box(models, model, "sdnb-widget-row"),
    StackModel: stack,
    ImageModel: image,
    HTMLModel: (models, model) => element("div", "sdnb-widget-html", { innerHTML: model.values.value }),
    SelectionSliderModel: slider,
    ToggleButtonsModel: buttons,
  };

  function draw(models, model) {
    const drawn = model && DRAWN[model.kind];
    if (drawn) return drawn(models, model);
    const text = "This widget needs a kernel: run the notebook in JupyterLab.";
    return element("p", "sdnb-widget-none", { textContent: text });
  }

  function start() {
    const models = {};
    for (const script of document.querySelectorAll(`script[type="${STATE}"]`)) {
      Object.assign(models, readModels(JSON.parse(script.textContent).state));
    }
    connect(models);
    for (const script of document.querySelectorAll(`script[type="${VIEW}"]`)) {
      script.after(draw(models, models[JSON.parse(script.textContent).model_id]));
    }
  }

  if (document.readyState === "loading") document.addEventListener("DOMContentLoaded", start);
  else start();
})();
