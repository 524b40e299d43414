// Filters, sorting and rows that open. Without it the page is the same table with its records folded below each row.
(() => {
  const table = document.querySelector(".scoreboard table");
  const claims = [...table.querySelectorAll("tbody.claim")];
  const parts = [...table.querySelectorAll("tbody.part")];

  // a row opens to its records
  for (const claim of claims) {
    const [more, title] = [claim.querySelector("tr.more"), claim.querySelector(".title")];
    const button = document.createElement("button");
    button.type = "button";
    button.className = "open";
    title.before(button);
    button.append(title);
    more.id = `${claim.id}-more`;
    button.setAttribute("aria-controls", more.id);
    claim.show = (open) => {
      more.hidden = !open;
      more.querySelector("details").open = open;
      button.setAttribute("aria-expanded", open);
    };
    claim.show(false);
    button.addEventListener("click", () => claim.show(more.hidden));
    claim.querySelector("tr").addEventListener("click", (event) => {
      if (!event.target.closest("a, button") && !String(getSelection())) claim.show(more.hidden);
    });
    more.querySelector("summary").addEventListener("click", (event) => {
      event.preventDefault();
      claim.show(false);
      button.focus();
    });
  }
  const openTarget = () => {
    const claim = document.getElementById(location.hash.slice(1));
    if (!claim?.show) return;
    claim.show(true);
    claim.scrollIntoView();
  };

  // filters
  const chosen = {};
  const bar = document.createElement("div");
  bar.className = "filters";
  bar.setAttribute("role", "group");
  bar.setAttribute("aria-label", "Which claims are shown");
  const count = document.createElement("output");
  let sorted = "order";
  const apply = () => {
    for (const claim of claims) claim.hidden = Object.entries(chosen).some(([key, v]) => v && claim.dataset[key] !== v);
    for (const part of parts) {
      part.hidden = sorted !== "order" || !claims.some((c) => !c.hidden && c.dataset.part === part.dataset.part);
    }
    count.textContent = `${claims.filter((c) => !c.hidden).length} of ${claims.length} claims`;
  };
  const select = (key, name, words) => {
    const box = document.createElement("select");
    box.id = `filter-${key}`;
    const values = [...new Set(claims.map((c) => c.dataset[key]))];
    for (const value of ["", ...values]) {
      const n = claims.filter((c) => c.dataset[key] === value).length;
      box.add(new Option(value ? `${words(value)} (${n})` : "all", value));
    }
    const label = document.createElement("label");
    label.append(`${name} `, box);
    box.addEventListener("change", () => {
      chosen[key] = box.value;
      apply();
    });
    bar.append(label);
  };
  select("verdict", "verdict", (v) => v);
  select("paper", "paper", (v) => v);
  select("part", "part", (v) => parts.find((p) => p.dataset.part === v).textContent.replace(/^Part /, ""));
  bar.append(count);
  table.closest(".scoreboard").before(bar);

  // sorting
  const byNumber = (key) => (a, b) => a.dataset[key] - b.dataset[key];
  const ways = {
    claim: ["title", (a, b) => a.dataset.title.localeCompare(b.dataset.title)],
    strip: ["at", byNumber("at")],
    judged: ["rank", byNumber("rank")],
    chapters: ["order", byNumber("order")],
  };
  const heads = [...table.querySelectorAll("thead th")];
  for (const head of heads) {
    const way = ways[head.className];
    if (!way) continue;
    const button = document.createElement("button");
    button.type = "button";
    button.append(...head.childNodes);
    head.append(button);
    button.addEventListener("click", () => {
      const down = head.getAttribute("aria-sort") === "ascending";
      for (const other of heads) other.removeAttribute("aria-sort");
      head.setAttribute("aria-sort", down ? "descending" : "ascending");
      sorted = down ? `-${way[0]}` : way[0];
      const rows = [...claims].sort((a, b) => (down ? -1 : 1) * way[1](a, b) || byNumber("order")(a, b));
      if (sorted !== "order") {
        table.append(...rows);
      } else {
        for (const part of parts) table.append(part, ...claims.filter((c) => c.dataset.part === part.dataset.part));
      }
      apply();
    });
  }
  apply();
  addEventListener("hashchange", openTarget);
  openTarget();
})();
