/* Finds words, and words of the other field for the same thing, in the prose of all pages; reads texts.js, no network. */
(() => {
  const { synonyms, sections } = window.bookTexts;
  const field = document.getElementById("search-words");
  const list = document.getElementById("search-found"), status = document.getElementById("search-status");

  const stem = (word) => word.replace(/ies$/, "y").replace(/([^s])s$/, "$1");
  const escaped = (word) => word.replace(/[.*+?^${}()|[\]\\]/g, "\\$&");
  /* short words are looked for whole, long ones also as the beginning of another */
  const pattern = (word) => `(?<![\\p{L}\\d])${escaped(word)}${word.length < 4 ? "s?(?![\\p{L}\\d])" : "[\\p{L}\\d]*"}`;

  function terms(query) {
    return [...new Set((query.toLowerCase().match(/[\p{L}\d][\p{L}\d-]*/gu) || []).map(stem))].map((word) => {
      const others = synonyms.filter((group) => group.includes(word)).flat().filter((other) => other !== word);
      return { word, others, own: new RegExp(pattern(word), "giu"),
        any: new RegExp([word, ...others].map(pattern).join("|"), "giu") };
    });
  }

  const count = (text, expression) => (text.match(expression) || []).length;
  function weight(section, term) {
    const many = (expression) => 8 * count(section.heading, expression) + Math.min(6, count(section.text, expression));
    return many(term.any) && many(term.any) + many(term.own);
  }

  function search(query) {
    const wanted = terms(query), pages = new Map();
    if (!wanted.length) return { wanted, pages: [] };
    for (const section of sections) {
      const weights = wanted.map((term) => weight(section, term));
      const sum = weights.reduce((a, b) => a + b, 0) * weights.filter(Boolean).length ** 2;
      const page = pages.get(section.page) || { title: section.title, found: wanted.map(() => false), hits: [], score: 0 };
      weights.forEach((each, i) => { page.found[i] ||= each > 0; });
      if (sum) page.hits.push({ section, sum });
      page.score = Math.max(page.score, sum);
      pages.set(section.page, page);
    }
    const whole = [...pages.values()].filter((page) => page.found.every(Boolean));
    return { wanted, pages: whole.sort((a, b) => b.score - a.score) };
  }

  function marked(text, wanted, parent) {
    const any = new RegExp(wanted.map((term) => term.any.source).join("|"), "giu");
    let end = 0;
    for (const match of text.matchAll(any)) {
      parent.append(text.slice(end, match.index));
      parent.appendChild(document.createElement("mark")).textContent = match[0];
      end = match.index + match[0].length;
    }
    parent.append(text.slice(end));
  }

  /* the stretch of a section in which most of the words stand */
  function snippet(text, wanted) {
    const at = wanted.flatMap((term) => [...text.matchAll(term.any)].map((match) => ({ term, index: match.index })));
    let best = 0, most = 0;
    for (const { index } of at) {
      const near = new Set(at.filter((a) => a.index >= index && a.index < index + 160).map((a) => a.term)).size;
      if (near > most) [best, most] = [index, near];
    }
    const from = Math.max(0, text.lastIndexOf(" ", best - 60)), to = text.indexOf(" ", best + 180);
    return (from ? "… " : "") + text.slice(from, to < 0 ? undefined : to).trim() + (to < 0 ? "" : " …");
  }

  function show() {
    const { wanted, pages } = search(field.value);
    const others = wanted.flatMap((term) => term.others);
    list.replaceChildren();
    status.textContent = !wanted.length ? "" : `${pages.length} ${pages.length === 1 ? "page" : "pages"}`
      + (others.length ? `; also looked for: ${others.join(", ")}` : "");
    for (const page of pages) {
      const item = list.appendChild(document.createElement("li"));
      page.hits.sort((a, b) => b.sum - a.sum).slice(0, 3).forEach(({ section }, i) => {
        const link = document.createElement("a"), words = document.createElement("p");
        link.href = `${section.page}.html?highlight=${encodeURIComponent(wanted.map((t) => t.word).join(" "))}#${section.at}`;
        link.textContent = i || section.heading === page.title ? section.heading : `${page.title}: ${section.heading}`;
        item.appendChild(document.createElement(i ? "h3" : "h2")).append(link);
        marked(snippet(section.text, wanted), wanted, words);
        item.append(words);
      });
    }
  }

  field.value = new URLSearchParams(location.search).get("q") || "";
  field.addEventListener("input", show);
  document.getElementById("search-form").addEventListener("submit", (event) => event.preventDefault());
  show();
})();
