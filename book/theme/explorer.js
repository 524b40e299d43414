// Looking into a dictionary: a list of its latents, and what one fires on, writes and resembles.
// A dictionary's data is a script of its own, loaded when it is picked; `#NAME/12` in the address picks latent 12.
(() => {
  const root = document.querySelector(".explorer");
  const { data, index } = window.explorer;
  const base = document.currentScript.src.replace(/[^/]*$/, "explorer/");
  const MOST = 300; // rows of the list before one asks for all
  const narrow = matchMedia("(max-width: 60rem)");
  let now = null; // the dictionary that is shown: its data, and what is derived from it

  const make = (tag, attributes, ...children) => {
    const svg = tag.startsWith("svg:");
    const made = svg ? document.createElementNS("http://www.w3.org/2000/svg", tag.slice(4)) : document.createElement(tag);
    for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
    made.append(...children);
    return made;
  };
  const comma = (n) => n.toLocaleString("en-GB");
  const percent = (share) => (share === 0 ? "never" : share < 1e-4 ? "< 0.01 %" : `${(100 * share).toPrecision(2) * 1} %`);
  const number = (value) => (value < 1000 ? value.toPrecision(3) : comma(Math.round(value)));
  const visible = (word) => word.replace(/\n/g, "⏎").replace(/\t/g, "⇥") || "∅";
  const seen = (word) => visible(word.trim() || word.replace(/ /g, "␣")); // without the blank before it

  const load = (about) =>
    new Promise((good, bad) => {
      if (data[about.name]) return good();
      const script = make("script", { src: `${base}${about.name}.js`, charset: "utf-8" });
      document.head.append(Object.assign(script, { onload: good, onerror: bad }));
    });
  const prepare = (about) => {
    const page = data[about.name];
    const { counts, contexts, text, tokens } = page;
    const word = (row) => tokens[text[row]];
    const rates = counts.map((count) => count / text.length);
    const fires = rates.map((_, j) => j).filter((j) => counts[j]);
    const peaks = contexts.map((some) => some.map(([row]) => word(row)));
    const usual = peaks.map((some) => {
      const times = new Map();
      for (const each of some.map(seen)) times.set(each, (times.get(each) ?? 0) + 1);
      return [...times].sort((a, b) => b[1] - a[1])[0]?.[0] ?? "";
    });
    const promoted = (j) => (page.promoted?.[j] ?? []).map((i) => tokens[i]);
    const sought = peaks.map((some, j) => [...some, ...promoted(j)].join("\n").toLowerCase());
    const rank = [];
    [...fires].sort((a, b) => counts[b] - counts[a] || a - b).forEach((j, i) => (rank[j] = i + 1));
    return { ...about, page, rates, fires, usual, sought, rank, order: [] };
  };
  const windowOf = (row) => {
    const { starts, text, window: [before, after] } = now.page;
    const piece = starts.findLastIndex((start) => start <= row);
    const end = starts[piece + 1] ?? text.length;
    return { piece, from: Math.max(starts[piece], row - before), to: Math.min(end, row + after + 1) };
  };

  // -- the list -------------------------------------------------------------------------------------------------------

  const picks = make("div", { class: "picks", role: "group", "aria-label": "Dictionaries" });
  const list = make("section", { class: "list" });
  const detail = make("section", { class: "detail", "aria-label": "The one that was picked" });
  const filter = make("input", { type: "search", id: "explorer-filter", placeholder: "whale, or a number" });
  const sort = make("select", { id: "explorer-sort" });
  const count = make("output", {});
  const rows = make("ol", { class: "rows" });
  const SORTS = {
    number: (a, b) => a - b,
    "largest activation": (a, b) => now.page.largest[b] - now.page.largest[a],
    "most frequent": (a, b) => now.rates[b] - now.rates[a],
    rarest: (a, b) => !now.rates[a] - !now.rates[b] || now.rates[a] - now.rates[b],
  };
  sort.append(...Object.keys(SORTS).map((name) => new Option(name)));
  const fill = (most = MOST) => {
    const wanted = filter.value.trim().toLowerCase();
    const matches = (j) => !wanted || String(j) === wanted || now.sought[j].includes(wanted);
    now.order = now.rates.map((_, j) => j).filter(matches).sort((a, b) => SORTS[sort.value](a, b) || a - b);
    const all = now.order.length;
    count.textContent = `${comma(all)} of ${comma(now.n)} ${now.unit}s`;
    const links = now.order.slice(0, most).map((j) => {
      const link = make("a", { href: `#${now.name}/${j}` }, make("b", {}, String(j)));
      link.append(make("span", { class: "word" }, now.usual[j]), make("span", {}, percent(now.rates[j])));
      link.append(make("span", {}, number(now.page.largest[j])));
      return make("li", {}, link);
    });
    rows.replaceChildren(...links);
    if (all > most) {
      const more = make("button", { type: "button" }, `show all ${comma(all)}`);
      more.onclick = () => fill(Infinity);
      rows.append(make("li", {}, more));
    }
    mark();
  };
  const current = (links, address) => {
    for (const link of links) {
      if (link.hash === address) link.setAttribute("aria-current", "true");
      else link.removeAttribute("aria-current");
    }
  };
  const mark = () => {
    current(rows.querySelectorAll("a"), `#${now.name}/${now.latent}`);
    const [row, all] = [rows.querySelector("[aria-current]"), rows].map((each) => each?.getBoundingClientRect());
    if (row && (row.top < all.top || row.bottom > all.bottom)) rows.scrollTop += row.top - all.top - all.height / 2;
  };
  filter.addEventListener("input", () => fill());
  sort.addEventListener("change", () => fill());
  rows.addEventListener("keydown", (event) => {
    const step = { ArrowDown: 1, ArrowUp: -1 }[event.key];
    const links = [...rows.querySelectorAll("a, button")];
    const to = links[links.indexOf(document.activeElement) + step];
    if (!step || !to) return;
    event.preventDefault();
    to.focus();
  });
  list.append(
    make("label", { for: filter.id }, "word or number"), filter, make("label", { for: sort.id }, "sorted by"), sort, count,
    make("p", { class: "heads", "aria-hidden": "true" }, ...["no.", "fires on", "rate", "largest"].map((n) => make("span", {}, n))),
    rows,
  );

  // -- one latent -----------------------------------------------------------------------------------------------------

  const context = ([row, ...pairs]) => {
    const { piece, from, to } = windowOf(row);
    const { text, tokens, document, documents } = now.page;
    const values = new Map();
    for (let i = 0; i < pairs.length; i += 2) values.set(row + pairs[i], pairs[i + 1]);
    const line = make("p", {}, from > now.page.starts[piece] ? "…" : "");
    for (let t = from; t < to; t++) {
      const value = values.get(t) ?? 0;
      const shown = visible(tokens[text[t]]);
      if (!value) {
        line.append(shown);
        continue;
      }
      const share = Math.abs(value) / 99;
      const title = (value < 0 ? "−" : "") + number(share * now.page.largest[now.latent]);
      const attributes = { class: value < 0 ? "on below" : "on", style: `--a: ${(0.15 + 0.85 * share).toFixed(2)}`, title };
      line.append(make(t === row ? "mark" : "span", attributes, shown));
    }
    const [title, source] = documents[document[piece]];
    return make("li", {}, line, make("small", {}, source ? `${title} · ${source}` : title));
  };
  const drawing = (label, ...parts) =>
    make("svg:svg", { viewBox: "0 0 340 80", role: "img", "aria-label": label }, ...parts);
  const words = (x, content) => {
    const anchor = x < 25 ? "start" : x > 315 ? "end" : "middle";
    const at = { start: 2, end: 338, middle: x }[anchor];
    return make("svg:text", { x: at, y: 76, "text-anchor": anchor }, content);
  };
  const bar = (x, width, high, own) => make("svg:rect", { x, width, y: 62 - high, height: high, class: own ? "own" : "" });
  const distribution = (j) => {
    const BINS = 34;
    const logs = now.fires.map((i) => Math.log10(now.rates[i]));
    const [low, high] = [Math.min(...logs) - 0.01, Math.max(...logs) + 0.01];
    const bin = (log) => Math.floor(((log - low) / (high - low)) * BINS);
    const heights = Array(BINS).fill(0);
    for (const log of logs) heights[bin(log)] += 1;
    const most = Math.max(...heights);
    const own = bin(Math.log10(now.rates[j]));
    const bars = heights.map((n, i) => bar(10 * i + 0.5, 9, (60 * n) / most, i === own));
    const decades = [1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1].filter((t) => Math.log10(t) >= low && Math.log10(t) <= high);
    const ticks = decades.length > 1 ? decades : [10 ** low, 10 ** high];
    const texts = ticks.map((t) => words(((Math.log10(t) - low) / (high - low)) * 340, percent(t)));
    const here = make("svg:path", { d: `M${10 * own + 5} 0v62` });
    const label = `How often the ${now.unit}s fire, as a histogram; this one on ${percent(now.rates[j])} of the tokens.`;
    return drawing(label, ...bars, here, ...texts);
  };
  const places = (j) => {
    const { places: all, by_place } = now.page;
    const name = (b) => (b < 2 ? String(b + 1) : `${2 ** (b - 1) + 1}–${2 ** b}`);
    const rates = all.map((n, b) => (n ? by_place[j][b] / n : 0));
    const [most, wide] = [Math.max(...rates, now.rates[j]), 340 / all.length];
    const bars = rates.map((rate, b) => bar(wide * b + 2, wide - 4, (60 * rate) / most, false));
    const even = make("svg:path", { class: "even", d: `M0 ${62 - (60 * now.rates[j]) / most}h340` });
    const texts = all.map((_, b) => words(wide * (b + 0.5), name(b))).filter((_, b) => b % 2 === 0);
    const said = rates.map((rate, b) => `${name(b)}: ${percent(rate)}`).join(", ");
    return drawing(`Rate by the token's place in its piece of text: ${said}.`, ...bars, even, ...texts);
  };
  const neighbours = (pairs) => {
    const items = [];
    for (let i = 0; i < pairs.length; i += 2) {
      const link = make("a", { href: `#${now.name}/${pairs[i]}` }, `${pairs[i]} `, make("span", { class: "word" }, now.usual[pairs[i]]));
      items.push(make("li", {}, link, ` ${(pairs[i + 1] / 100).toFixed(2).replace("-", "−")}`));
    }
    return make("ul", {}, ...items);
  };
  const chips = (ids) => make("p", { class: "chips" }, ...ids.flatMap((i) => [make("span", {}, seen(now.page.tokens[i])), " "]));
  const pair = (first, one, second, other) => {
    const parts = [[first, one], [second, other]].map(([title, child]) => make("div", {}, make("h3", {}, title), child));
    return make("div", { class: "pair" }, ...parts);
  };
  const show = (j) => {
    now.latent = j;
    const { page, unit, order } = now;
    const at = order.indexOf(j);
    const link = (to, name, text) => make("a", { href: `#${now.name}/${order[to]}`, class: name }, text);
    const step = (to, name, text) => (to in order ? link(to, name, text) : make("span", {}, text));
    const [tokens, weight] = [comma(page.text.length), unit === "expert" ? "router weight" : "activation"];
    const own = now.rates[j]
      ? `Fires on ${percent(now.rates[j])} of ${tokens} tokens (${comma(page.counts[j])}), rank ` +
        `${comma(now.rank[j])} of ${comma(now.fires.length)} by rate. Largest ${weight} ${number(page.largest[j])}.`
      : `Never fires on these ${tokens} tokens: a dead ${unit}, here.`;
    const parts = [make("h2", {}, `${unit} ${j} `, make("small", {}, now.title))];
    const steps = [step(at - 1, "back", "← previous"), step(at < 0 ? -1 : at + 1, "next", "next →")];
    parts.push(make("p", { class: "steps" }, ...steps), make("p", {}, own));
    if (now.rates[j]) {
      parts.push(make("ol", { class: "contexts" }, ...page.contexts[j].map(context)));
      parts.push(pair(`Rate, among all ${unit}s`, distribution(j), "Rate by place in the text", places(j)));
    }
    const { promoted, suppressed, writes, reads } = page;
    if (promoted) parts.push(pair("Raises the logit of", chips(promoted[j]), "Lowers the logit of", chips(suppressed[j])));
    else parts.push(make("p", { class: "none" }, page.about.lens));
    const near = unit === "expert" ? ["Writes a direction like", "Router row like"] : ["Decoder row like", "Encoder row like"];
    parts.push(pair(near[0], neighbours(writes[j]), near[1], neighbours(reads[j])));
    detail.replaceChildren(...parts);
    if (at < rows.querySelectorAll("a").length) mark();
    else fill(at + MOST);
  };
  const say = (text) => detail.replaceChildren(make("p", { class: "none" }, text));
  const asked = () => location.hash.slice(1).split("/");
  const route = async () => {
    const [name, latent] = asked();
    const about = index.find((each) => each.name === name);
    current(picks.children, `#${name}`);
    list.hidden = !about;
    if (!about) return say(name ? `There is no dictionary ${name} here.` : "Pick a dictionary.");
    if (now?.name !== name) {
      say("Reading …");
      const there = await load(about).then(() => true, () => false);
      if (!there) return say(`${name}.js could not be read.`);
      if (asked()[0] !== name) return; // another one was picked meanwhile
      now = prepare(about);
      list.setAttribute("aria-label", `${now.unit}s`);
      filter.value = "";
      fill();
    }
    const j = latent ? Number(latent) : now.order[0] ?? 0;
    if (now.rates[j] === undefined) return say(`There is no ${now.unit} ${latent}; there are 0 to ${now.n - 1}.`);
    show(j);
    if (latent && narrow.matches) detail.scrollIntoView();
  };
  for (const about of index) {
    const small = `${about.own ? "yours · " : ""}${comma(about.n)} ${about.unit}s · ${(about.bytes / 1e6).toFixed(1)} MB`;
    picks.append(make("a", { href: `#${about.name}` }, make("b", {}, about.title), make("small", {}, small)));
  }
  root.replaceChildren(picks, make("div", { class: "columns" }, list, detail));
  root.addEventListener("keydown", (event) => {
    const selector = { ArrowLeft: "a.back", ArrowRight: "a.next" }[event.key];
    if (selector && !event.target.closest("input, select")) detail.querySelector(selector)?.click();
  });
  addEventListener("hashchange", route);
  route();
})();
