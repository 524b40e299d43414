"""JupyterLab: it opens on a start page that leads to every chapter, and a chapter begins wherever it is opened."""

import json
import os
import re
import subprocess
import sys

import yaml

from helpers.press.build import toc_files
from helpers.settings import ROOT

BEGINS = """
import ast, json, os, sys
for path in sys.argv[2:]:
    names = {"__name__": "__main__"}
    cells = [cell for cell in json.load(open(path, encoding="utf-8"))["cells"] if cell["cell_type"] == "code"]
    while "log" not in names and cells:
        cell = cells.pop(0)
        statements = ast.parse("".join(cell["source"])).body
        for statement in statements:
            if "log" not in names:  # what follows harvests and trains
                exec(compile(ast.Module([statement], []), path, "exec"), names)
        if "parameters" in cell["metadata"].get("tags", []):
            names["cache_dir"] = names["results_dir"] = sys.argv[1]
    assert names["log"].__class__.__name__ == "Chapter"
    print(os.path.basename(path), "begins", flush=True)
"""


def test_the_start_page_leads_to_every_chapter_in_the_book_s_order():
    text = (ROOT / "notebooks" / "start.md").read_text(encoding="utf-8")
    toc = toc_files(yaml.safe_load((ROOT / "_toc.yml").read_text(encoding="utf-8")))
    chapters = [name.removeprefix("notebooks/") for name in toc if name.startswith("notebooks/")]
    assert re.findall(r"\]\((\w+)\.ipynb\)", text) == chapters


def test_make_lab_opens_on_it_as_a_reader_sees_it():
    said = subprocess.run(["make", "-n", "lab"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert "jupyter lab notebooks/start.md" in said
    (folder,) = re.findall(r"JUPYTER_CONFIG_PATH=(\S+)", said)
    settings = json.loads(
        (ROOT / os.path.relpath(folder, ROOT) / "labconfig" / "default_setting_overrides.json").read_text()
    )
    assert settings["@jupyterlab/docmanager-extension:plugin"]["defaultViewers"] == {"markdown": "Markdown Preview"}


def test_a_chapter_begins_wherever_it_is_opened(tmp_path):
    notebooks = sorted((ROOT / "notebooks").glob("*.ipynb"))
    command = [sys.executable, "-c", BEGINS, str(tmp_path / "out"), *map(str, notebooks)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "MPLBACKEND": "agg"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:] + done.stdout[-2000:]
    assert done.stdout.count(" begins") == len(notebooks)
