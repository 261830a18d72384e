(() => {
  const heat = document.querySelector(".heat");
  if (!heat) return;
  const facts = JSON.parse(document.getElementById("facts").textContent);
  const tip = document.getElementById("tip");
  const spans = [...heat.children];
  const low = document.getElementById("low"), high = document.getElementById("high");
  const n = facts.layers;
  const ends = {
    skip: ["0 of " + n, n + " of " + n],
    early: ["ran to the end", "left at layer 0"],
    bits: ["0 bits", facts.highest.toFixed(1) + " bits"],
    changed: ["as dense", "changed"],
  };
  for (const radio of document.querySelectorAll("input[name=mode]")) {
    radio.addEventListener("change", () => {
      heat.dataset.mode = radio.value;
      [low.textContent, high.textContent] = ends[radio.value];
    });
  }
  const line = (text, bold) => {
    const div = document.createElement("div");
    const part = document.createElement(bold ? "b" : "span");
    part.textContent = text;
    div.append(part);
    return div;
  };
  const p = (x) => (x === null ? "-" : x >= 0.001 ? x.toFixed(3) : x.toExponential(1));
  const show = (span) => {
    const [skipped, exit, bits, own, dense, same, risk, layers] = facts.tokens[spans.indexOf(span)];
    const rows = [
      line(JSON.stringify(span.textContent), true),
      line(skipped + " of " + n + " MLPs skipped" + (exit < n ? ", the first in layer " + exit : "")),
      line("entropy of what follows: " + bits.toFixed(2) + " bits"),
      line("probability of this token: " + p(own) + " (dense " + p(dense) + ")"),
      line("most likely next token: " + (same ? "as dense" : "not dense's")),
    ];
    if (risk) rows.push(line(facts.value + " " + risk[1].toFixed(3) + " at layer " + risk[0] + (risk[2] === null ? "" : ", threshold " + risk[2].toFixed(3))));
    const cells = document.createElement("div");
    cells.className = "cells";
    for (const bit of layers) {
      const cell = document.createElement("i");
      if (bit === "1") cell.className = "x";
      cells.append(cell);
    }
    tip.replaceChildren(...rows, cells);
    tip.hidden = false;
    place();
  };
  let on = null;
  const place = () => {
    const at = on.getClientRects()[0], box = tip.getBoundingClientRect();
    const wide = document.documentElement.clientWidth;
    tip.style.left = Math.max(8, Math.min(at.left, wide - box.width - 8)) + "px";
    tip.style.top = (at.top > box.height + 12 ? at.top - box.height - 6 : at.bottom + 6) + "px";
  };
  const leave = () => { if (on) on.classList.remove("on"); on = null; tip.hidden = true; };
  const choose = (span) => {
    leave();
    on = span;
    on.classList.add("on");
    show(on);
  };
  heat.addEventListener("pointerover", (event) => (event.target === heat ? leave() : choose(event.target)));
  // A finger that is lifted leaves too: what it tapped stays shown until something else is.
  heat.addEventListener("pointerleave", (event) => { if (event.pointerType !== "touch") leave(); });
  addEventListener("pointerdown", (event) => { if (!heat.contains(event.target)) leave(); });
  heat.addEventListener("blur", leave);
  heat.addEventListener("keydown", (event) => {
    if (event.key === "Escape") return leave();
    const steps = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: 10, ArrowUp: -10 };
    const first = { Home: 0, End: spans.length - 1 }[event.key];
    if (!(event.key in steps) && first === undefined) return;
    event.preventDefault();
    const next = first ?? (on ? spans.indexOf(on) + steps[event.key] : 0);
    choose(spans[Math.max(0, Math.min(spans.length - 1, next))]);
    on.scrollIntoView({ block: "nearest" });
    place();
  });
  addEventListener("scroll", () => { if (on) place(); }, { passive: true });
})();
