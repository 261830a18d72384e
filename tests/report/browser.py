"""A real Chromium without a window: what the page shows at a width, and every word on its console."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)

# The page in a frame of the wanted width (a window cannot be as narrow as a phone); a script uses it and tells.
FRAME = """<!doctype html><meta charset="utf-8"><body style="margin:0">
<iframe id="f" src="{url}" style="border:0;width:{width}px;height:{height}px"></iframe><pre id="told"></pre><script>
document.getElementById("f").addEventListener("load", (event) => {{
  const doc = event.target.contentDocument, view = event.target.contentWindow, told = {{}};
  told.overflow = doc.documentElement.scrollWidth - doc.documentElement.clientWidth;
  told.height = doc.documentElement.scrollHeight;
  told.outside = [...doc.querySelectorAll("main *")].filter((e) => !e.closest(".wide") && !e.closest("svg")
    && e.getBoundingClientRect().right > doc.documentElement.clientWidth + 1).map((e) => e.outerHTML.slice(0, 80));
  told.background = view.getComputedStyle(doc.body).backgroundColor;
  told.svgs = [...doc.querySelectorAll("svg")].map((e) => Math.round(e.getBoundingClientRect().width));
  told.headings = [...doc.querySelectorAll("h2")].map((e) => e.textContent);
  const tokens = [...doc.querySelectorAll(".heat span")];
  told.tokens = tokens.length;
  told.tips = tokens.slice(0, 12).map((span) => {{
    span.dispatchEvent(new view.PointerEvent("pointerover", {{ bubbles: true }}));
    const box = doc.getElementById("tip").getBoundingClientRect();
    return {{ text: doc.getElementById("tip").innerText, hidden: doc.getElementById("tip").hidden, right: box.right,
      cells: doc.querySelectorAll("#tip .cells i").length, on: doc.querySelectorAll("#tip .cells i.x").length }};
  }});
  const heat = doc.querySelector(".heat"), tip = doc.getElementById("tip");
  const press = (key) => heat.dispatchEvent(new view.KeyboardEvent("keydown", {{ key, bubbles: true }}));
  heat.dispatchEvent(new view.PointerEvent("pointerleave", {{ pointerType: "mouse" }}));
  told.left = tip.hidden;
  told.keys = ["ArrowRight", "ArrowRight", "End", "ArrowLeft"].map((key) => {{ press(key); return tokens.indexOf(doc.querySelector(".heat .on")); }});
  told.shown = !tip.hidden;
  press("Escape");
  told.escaped = tip.hidden;
  tokens[3].dispatchEvent(new view.PointerEvent("pointerover", {{ bubbles: true, pointerType: "touch" }}));
  heat.dispatchEvent(new view.PointerEvent("pointerleave", {{ pointerType: "touch" }}));
  told.touched = !tip.hidden;
  doc.body.dispatchEvent(new view.PointerEvent("pointerdown", {{ bubbles: true, pointerType: "touch" }}));
  told.elsewhere = tip.hidden;
  told.cells = [...doc.querySelectorAll(".wide td")].filter((e) => view.getComputedStyle(e).display !== "none"
    && e.getBoundingClientRect().right > doc.documentElement.clientWidth).length;
  told.modes = [...doc.querySelectorAll("input[name=mode]")].map((radio) => {{
    radio.click();
    return [doc.querySelector(".heat").dataset.mode, tokens.map((t) => view.getComputedStyle(t).backgroundColor).join()];
  }});
  document.getElementById("told").textContent = JSON.stringify(told);
}});
</script></body>"""


@dataclass
class Seen:
    told: dict
    console: list[str]
    picture: Path


def look(page: Path, folder: Path, width: int, dark: bool) -> Seen:
    wrapper = folder / f"frame-{width}-{dark}.html"
    height = 6000
    wrapper.write_text(FRAME.format(url=page.resolve().as_uri(), width=width, height=height), encoding="utf-8")
    picture = folder / f"{width}-{'dark' if dark else 'light'}.png"
    command = [
        CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--enable-logging=stderr",
        "--allow-file-access-from-files", "--disable-background-networking", f"--user-data-dir={folder / 'profile'}",
        f"--blink-settings=preferredColorScheme={0 if dark else 1}", f"--window-size={max(500, width)},{height}",
        "--virtual-time-budget=3000",
    ]  # fmt: skip
    dump = subprocess.run([*command, "--dump-dom", wrapper.as_uri()], capture_output=True, text=True, timeout=120)
    subprocess.run(
        [*command, f"--screenshot={picture}", wrapper.as_uri()], capture_output=True, timeout=120, check=True
    )
    told = re.search(r'<pre id="told">(.*?)</pre>', dump.stdout, re.DOTALL)
    assert told, dump.stdout[-2000:] + dump.stderr[-2000:]
    import html

    console = [line for line in dump.stderr.splitlines() if "CONSOLE" in line]
    return Seen(json.loads(html.unescape(told.group(1))), console, picture)
