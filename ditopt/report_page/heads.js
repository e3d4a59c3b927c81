// The matrix of choices and, beside it, one head: attention map, kept blocks, recall, numbers.

function headsSection(data) {
  const grid = $("#matrix");
  const state = { phase: data.phases.length - 1, view: data.views[0]?.id ?? "choice", site: 0, head: 0, call: 0 };
  const cells = [];
  const percent = (share) => `${(100 * share).toFixed(share > 0 && share < 0.0995 ? 1 : 0)}%`;
  const number = (value, digits = 2) => (value === null || value === undefined ? "not measured" : value.toFixed(digits));

  const classOf = ({ structure, pattern, margin }) => `${structure} (${pattern}), margin ${number(margin, 1)} dB`;
  const amount = ({ density, mask }) => {
    if (density === null) return "as many as the data asks for";
    return mask === null ? `${percent(density)} of the blocks, chosen from the data` : `${percent(density)} of the blocks`;
  };

  const choiceOf = (site, head) => data.choices[data.phases[state.phase].choice[site][head]];
  const errorOf = (site, head) => data.phases[state.phase].error[site][head];
  const factsOf = (site, head) => data.sites[site].facts?.[head] ?? null;

  /** Family, share 0 to 1 or null, and text of a cell in the current view. */
  function look(site, head) {
    const [choice, error, facts] = [choiceOf(site, head), errorOf(site, head), factsOf(site, head)];
    switch (state.view) {
      case "density": return { share: choice.density, text: choice.density === null ? "?" : Math.round(100 * choice.density) };
      case "error": return { share: error === null ? null : Math.min(1, error / data.largest_error), text: error === null ? "?" : (100 * error).toFixed(error < 0.0995 ? 1 : 0) };
      case "class": return { family: facts?.structure ?? "none" };
      case "verdict": return { family: facts?.verdict ?? "none", text: facts ? facts.verdict[0].toUpperCase() : "?" };
      default: return { family: choice.family, amount: choice.density };
    }
  }

  function describe(site, head) {
    const [choice, error, facts] = [choiceOf(site, head), errorOf(site, head), factsOf(site, head)];
    const lines = [`${data.sites[site].id}, head ${head}`];
    if (data.planned) {
      lines.push(
        choice.parameters ? `${choice.name}: ${choice.parameters}` : choice.name,
        amount(choice),
        `predicted error ${error === null ? "not measured" : percent(error)}`);
      if (choice.remainder) lines.push(`left-out blocks: ${choice.remainder}`);
    }
    if (facts) lines.push(`class ${classOf(facts)}`, `stability: ${facts.verdict}`);
    return lines;
  }

  function paint() {
    const large = data.columns <= 16;
    cells.forEach((cell, index) => {
      const [site, head] = cell.place;
      const { family, share, text, amount } = look(site, head);
      const heat = family === undefined;
      cell.className = heat ? `cell ${share === null ? "f-none" : "heat"}${share > 0.55 ? " deep" : ""}` : `cell f-${family}`;
      cell.style.setProperty("--p", share ?? 0);
      const parts = [];
      if (!heat && text === undefined) parts.push(glyph(family));
      else if (large) parts.push(make("span", { class: "num", text }));
      if (amount !== undefined && amount !== null && amount < 1) {
        const bar = make("span", { class: "amount" });
        bar.style.setProperty("--d", amount);
        parts.push(bar);
      }
      cell.replaceChildren(...parts);
      const lines = describe(site, head);
      cell.dataset.tip = lines.join("\n");
      cell.setAttribute("aria-label", lines.join(", "));
      cell.setAttribute("aria-selected", String(site === state.site && head === state.head));
    });
    legend();
  }

  function legend() {
    const view = data.views.find(({ id }) => id === state.view) ?? {};
    const list = $("#matrix-legend");
    if (view.ramp) {
      list.replaceChildren(make("li", {}, make("span", { text: view.ramp[0] }), make("span", { class: "ramp" }), make("span", { text: view.ramp[1] })));
      return;
    }
    const counts = new Map();
    for (const cell of cells) {
      const { family, text } = look(...cell.place);
      const entry = counts.get(family) ?? { count: 0, text };
      counts.set(family, { ...entry, count: entry.count + 1 });
    }
    list.replaceChildren(...[...counts].sort((a, b) => b[1].count - a[1].count).map(([family, { count, text }]) =>
      make("li", {},
        make("span", { class: `swatch f-${family}` }, text === undefined ? glyph(family) : make("span", { class: "small", text })),
        make("span", { text: `${data.names[family] ?? family} (${count})` }))));
    if (state.view === "choice") list.append(make("li", { class: "muted", text: "The bar under a sign is the share of blocks that is kept." }));
  }

  // The head that is looked at.
  const stops = () => (isDark()
    ? [[18, 20, 26], [38, 50, 122], [32, 124, 150], [122, 196, 110], [253, 231, 90]]
    : [[252, 251, 248], [186, 216, 232], [84, 156, 202], [28, 92, 166], [10, 26, 80]]);

  function colour(share) {
    const ramp = stops();
    const place = Math.min(0.9999, Math.max(0, share)) * (ramp.length - 1);
    const [low, part] = [Math.floor(place), place % 1];
    return ramp[low].map((value, channel) => value + part * (ramp[low + 1][channel] - value));
  }

  function draw(canvas, rows, columns, at) {
    canvas.width = columns;
    canvas.height = rows;
    const context = canvas.getContext("2d");
    const image = context.createImageData(columns, rows);
    for (let i = 0; i < rows * columns; i += 1) image.data.set([...at(i), 255], 4 * i);
    context.putImageData(image, 0, 0);
  }

  /** The slot of the selected head in the maps of a site. */
  const slot = (site, head) => state.call * data.sites[site].heads + head;

  /** One map of a site: bytes [rows * columns], decoded once. */
  function picture(maps, name, index) {
    const area = maps.rows * maps.columns;
    maps.decoded ??= {};
    maps.decoded[name] ??= bytes(maps[name]);
    return maps.decoded[name].subarray(index * area, (index + 1) * area);
  }

  /** Kept blocks: of the plan's choice, or those of most attention where the data decides. */
  function kept(choice, maps, index) {
    if (choice.mask !== null && data.planned) {
      choice.decoded ??= bytes(choice.mask);
      const order = choice.order ? `, in ${choice.order} order` : "";
      return { ...choice, values: choice.decoded, caption: `The plan keeps: ${choice.name}${order}` };
    }
    if (!maps) return null;
    const caption = data.planned
      ? "Chosen from the data; here the fewest blocks with 90% of the mass"
      : "The fewest blocks that hold 90% of the mass";
    return { ...maps, values: picture(maps, "top", index), caption };
  }

  function inspect() {
    const { site, head } = state;
    const [choice, facts, error] = [choiceOf(site, head), factsOf(site, head), errorOf(site, head)];
    const name = `${data.sites[site].id} · head ${head}`;
    $("#head-title").textContent = name;
    const [maps, index] = [data.maps?.sites[data.sites[site].id], slot(site, head)];
    const blocks = kept(choice, maps, index);
    const same = maps && blocks && maps.rows === blocks.rows && maps.columns === blocks.columns;
    const [mapCanvas, keptCanvas] = [$("#map"), $("#kept")];
    mapCanvas.hidden = !maps;
    $("#no-map").hidden = Boolean(maps);
    if (maps) {
      const [values, ground, dim] = [picture(maps, "values", index), stops()[0], same && $("#dim").checked];
      draw(mapCanvas, maps.rows, maps.columns, (i) => {
        const share = dim ? 0.15 + (0.85 * blocks.values[i]) / 255 : 1;
        return colour(values[i] / 255).map((value, channel) => ground[channel] + share * (value - ground[channel]));
      });
      const size = `${maps.rows} × ${maps.columns} blocks${maps.merged ? ", merged" : ""}`;
      mapCanvas.setAttribute("aria-label", `Attention map of ${name}, ${size}`);
      $("#map-caption").textContent = `Attention: queries down, keys across, ${size}`;
    }
    keptCanvas.hidden = !blocks;
    $("#no-kept").hidden = Boolean(blocks);
    if (blocks) {
      draw(keptCanvas, blocks.rows, blocks.columns, (i) => colour((blocks.values[i] / 255) * 0.75));
      keptCanvas.setAttribute("aria-label", blocks.caption);
    }
    $("#kept-caption").textContent = blocks?.caption ?? "Which blocks are kept differs from call to call.";
    const captured = data.phases[state.phase].captured[site]?.[head]?.[state.call] ?? null;
    recall(site, head, choice, captured);
    const rows = [];
    if (data.planned) {
      rows.push(
        ["Choice", choice.parameters ? `${choice.name}: ${choice.parameters}` : choice.name],
        ["Kept blocks", amount(choice)],
        ["Predicted error", error === null ? "not measured" : `${percent(error)} of the output's norm`]);
      if (choice.remainder) rows.push(["Left-out blocks", choice.remainder]);
      if (captured !== null) rows.push(["Attention it keeps", percent(captured)]);
    }
    if (facts) {
      rows.push(
        ["Class", classOf(facts)],
        ["Stability", facts.verdict],
        ["Same blocks", `${number(facts.jaccard_seeds)} over seeds, ${number(facts.jaccard_steps)} over steps (Jaccard)`],
        ["Same ranking", `${number(facts.rank_seeds)} over seeds, ${number(facts.rank_steps)} over steps (correlation)`],
        ["For 90% of the mass", `${percent(facts.density_at_recall_90)} of the blocks`],
        ["Rank of the rest", number(facts.effective_rank, 1)]);
    }
    $("#head-numbers").replaceChildren(...rows.flatMap(([term, text]) => [make("dt", { text: term }), make("dd", { text })]));
  }

  function recall(site, head, choice, captured) {
    const maps = data.maps?.sites[data.sites[site].id];
    const box = $("#recall");
    $("#recall-figure").hidden = !maps;
    if (!maps) return;
    const densities = maps.recall[slot(site, head)];
    const [left, top, width, height] = [34, 8, 300, 120];
    const x = (density) => left + width * density;
    const y = (share) => top + height * (1 - share);
    const points = [[0, 0], ...densities.map((density, level) => [density, data.maps.levels[level]]), [1, 1]];
    const nodes = [];
    for (const share of [0, 0.5, 0.9, 1]) {
      nodes.push(make("line", { class: "gridline", x1: left, x2: left + width, y1: y(share), y2: y(share) }),
        make("text", { x: left - 6, y: y(share) + (share === 0.9 ? 8 : 3), "text-anchor": "end", text: percent(share) }));
    }
    for (const share of [0, 0.25, 0.5, 0.75, 1]) {
      nodes.push(make("text", { x: x(share), y: top + height + 16, "text-anchor": "middle", text: percent(share) }));
    }
    nodes.push(make("path", { class: "line", d: points.map(([a, b], i) => `${i ? "L" : "M"}${x(a).toFixed(1)} ${y(b).toFixed(1)}`).join("") }));
    if (data.planned && choice.density !== null) {
      nodes.push(make("line", { class: "goal", x1: x(choice.density), x2: x(choice.density), y1: top, y2: top + height }));
      if (captured !== null) nodes.push(make("circle", { class: "audit", cx: x(choice.density), cy: y(captured), r: 4.5 }));
    }
    box.replaceChildren(...nodes);
    const levels = densities.map((density, level) => `${percent(data.maps.levels[level])} of the mass in ${percent(density)} of the blocks`);
    box.setAttribute("aria-label", `Recall curve: ${levels.join(", ")}`);
  }

  function select(site, head) {
    const before = cells.find((cell) => cell.getAttribute("aria-selected") === "true");
    before?.setAttribute("aria-selected", "false");
    Object.assign(state, { site, head });
    cells.find((cell) => cell.place[0] === site && cell.place[1] === head).setAttribute("aria-selected", "true");
    inspect();
  }

  // The grid: a row per site, a column per head.
  const side = data.columns > 24 ? "0.8rem" : data.columns > 12 ? "1.5rem" : "2.4rem";
  grid.classList.toggle("wide", data.columns > 24);
  grid.style.gridTemplateColumns = `max-content repeat(${data.columns}, minmax(${side}, 3.2rem))`;
  const top = make("div", { role: "row" }, make("span", { class: "site", role: "columnheader", text: "site" }));
  for (let head = 0; head < data.columns; head += 1) {
    top.append(make("span", { class: "head", role: "columnheader", text: head }));
  }
  grid.append(top);
  const order = [];
  data.sites.forEach((site, row) => {
    const line = make("div", { role: "row" }, make("span", { class: "site", role: "rowheader", text: site.id, "data-tip": site.id }));
    for (let head = 0; head < data.columns; head += 1) {
      if (head >= site.heads) { line.append(make("span", { role: "gridcell" })); continue; }
      const cell = make("button", { type: "button", role: "gridcell" });
      cell.place = [row, head];
      cells.push(cell);
      order[row * data.columns + head] = cell;
      line.append(cell);
    }
    grid.append(line);
  });
  const places = Array.from({ length: data.sites.length * data.columns }, (_, i) => order[i]);
  const move = (index, key) => {
    const [row, head] = cells[index].place;
    const last = data.sites[row].heads - 1;
    const to = {
      ArrowLeft: [row, head - 1], ArrowRight: [row, head < last ? head + 1 : last],
      ArrowUp: [row - 1, head], ArrowDown: [row + 1, head],
      Home: [row, 0], End: [row, last], PageUp: [0, head], PageDown: [data.sites.length - 1, head],
    }[key];
    return to && (to[1] < 0 ? cells[index] : places[to[0] * data.columns + to[1]] ?? cells[index]);
  };
  roving(cells, move, (index) => select(...cells[index].place));
  for (const cell of cells) cell.addEventListener("click", () => cell.focus());

  const phases = $$("#phases button");
  const pressPhase = pressOne(phases, (button) => { state.phase = Number(button.value); paint(); inspect(); });
  const views = $$("#views button");
  const pressView = pressOne(views, (button) => { state.view = button.value; paint(); });
  const slider = $("#call");
  slider?.addEventListener("input", () => {
    state.call = Number(slider.value);
    $("#call-name").textContent = slider.ariaValueText = data.maps.calls[state.call];
    inspect();
  });
  $("#dim")?.addEventListener("change", inspect);
  onTheme.push(inspect);
  if (views.length) pressView(views[0]);
  if (phases.length) pressPhase(phases[state.phase]);
  else { paint(); inspect(); }
}

if (DATA.heads) headsSection(DATA.heads);
