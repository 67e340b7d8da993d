"""The pages of audit and report: self-contained, safe with any text in them, and usable in a real browser."""

import re
import shutil
import subprocess

import pytest

from ica_plugin.tools.page import RowTable, Section, Verdict, write_page

HOSTILE = "</script><script>document.title = 'broken out'</script><img src=x onerror=\"document.title = 'broken out'\">"
# Types into the search field as a reader does, and says in the title how many rows are left and what is sorted first.
SEARCH = """<script>addEventListener("load", () => setTimeout(() => {
  const field = document.querySelector("input[type=search]");
  field.value = "needle"; field.dispatchEvent(new Event("input", { bubbles: true }));
  setTimeout(() => { document.title += ` ${document.querySelector(".dt-info").textContent}` }, 600);
}, 600))</script>"""


@pytest.fixture
def page(tmp_path):
    rows = [{"row": i, "weight": 1 / (i + 1), "text": f"row {i} {'needle' if i % 10 == 7 else ''}"} for i in range(50)]
    rows.append({"row": 50, "weight": float("nan"), "text": HOSTILE})
    verdict = Verdict("Keep it.", f"AUROC 0.8 {HOSTILE}", "ica:\n  holdout: good.jsonl")
    out = tmp_path / "page.html"
    write_page(out, "Page", [Section("Numbers", rows=[{"a": 1 / 3}])], {"a": 1}, verdicts=[verdict], rows=RowTable(rows, "All."))
    return out


def test_nothing_is_loaded_from_elsewhere(page):
    text = page.read_text()
    # What a browser would fetch without being asked: sources, styles, imports. Links that a reader may follow are none of them.
    assert not re.search(r"""(src|srcset)=["']?(https?:)?//""", text) and not re.search(r"<link[^>]+https?://", text)
    assert not re.search(r"""(import|from)\s*\(?["']https?://""", text)
    assert HOSTILE not in text and "0.3333" in text and "<pre>ica:" in text


@pytest.mark.skipif(shutil.which("chromium") is None, reason="no chromium on this machine")
def test_in_a_browser_rows_are_found_and_text_stays_text(page):
    page.write_text(page.read_text().replace("</body>", f"{SEARCH}</body>"))
    browser = subprocess.run(
        ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--virtual-time-budget=8000"]
        + ["--host-resolver-rules=MAP * ~NOTFOUND", "--dump-dom", page.as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert "CONSOLE" not in browser.stderr, browser.stderr
    title = re.search(r"<title>(.*?)</title>", browser.stdout, re.S)[1]
    assert title == "Page Showing 1 to 5 of 5 entries (filtered from 51 total entries)"
