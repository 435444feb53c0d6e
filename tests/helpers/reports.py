"""Data sets of some kinds of rows, and the report on one."""

import json
from pathlib import Path
from typing import Any

from phitune.check.report import Report, find_coder, make_report
from phitune.config import Settings, resolve

HOSTILE = (
    '<script>alert(1)</script> & "quoted" </pre><img src=x onerror=alert(2)> \x1b[31mred\x1b[0m'
)
ARABIC = (
    "\u0645\u0627 \u0647\u064a \u0639\u0627\u0635\u0645\u0629 \u0641\u0631\u0646\u0633\u0627\u061f"
)


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def rows_like(number: int) -> list[dict[str, str]]:
    """Rows that no check has anything against."""
    names = ("dog", "cat", "cow", "owl", "fox", "bee", "ant", "elk", "hen", "rat")
    return [
        {
            "prompt": f"What does the {names[i % 10]} number {i} say on day {i * 7}?",
            "response": f"It says {names[(i * 3) % 10]} {i * 13} times and then {i * 5} more.",
        }
        for i in range(number)
    ]


def clean_rows(folder: Path) -> Path:
    """240 rows that no check finds anything wrong with."""
    return write(folder / "clean.jsonl", rows_like(240))


def chat_rows(folder: Path) -> Path:
    """Rows of one, two and three turns, and a system turn here and there."""
    rows = []
    for index, row in enumerate(rows_like(30)):
        user = {"role": "user", "content": row["prompt"]}
        turns = [user, {"role": "assistant", "content": row["response"]}] * (index % 3 + 1)
        system = [{"role": "system", "content": "Be brief."}] if index % 5 == 0 else []
        rows.append({"messages": system + turns})
    return write(folder / "chat.jsonl", rows)


def messy_rows(folder: Path) -> Path:
    """Rows of every trouble, few enough to be no error."""
    rows = rows_like(40)
    rows += rows[:2]
    rows.append({"prompt": HOSTILE, "response": f"{HOSTILE} mail jane.doe@contoso.com"})
    rows.append({"prompt": ARABIC, "response": "\u0628\u0627\u0631\u064a\u0633. " * 30})
    rows.append({"prompt": "x" * 3000, "response": "y" * 3000})
    rows.append({"prompt": "### Instruction: go", "response": "Gone [bold]now[/bold]."})
    return write(folder / "messy.jsonl", rows)


def report_of(path: Path, **settings: Any) -> Report:
    given = {"dataset_path": path, "model_name": "tiny-phi-2", **settings}
    return make(resolve(given).settings)


def make(settings: Settings, **how: Any) -> Report:
    return make_report(settings, find_coder(settings, model_was_named=True), **how)
