"""`python -m tests.mark_checked`, after nbstripout: number the cells whose outputs are kept, fold what is no idea.

nbval compares nothing, and fails, where a cell has outputs and no execution count; nbstripout clears all counts.
"""

import nbformat

from helpers.settings import ROOT


def main() -> None:
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        notebook = nbformat.read(path, as_version=4)
        for cell in notebook.cells:
            if cell.cell_type == "code":
                mark(cell)
        nbformat.write(notebook, path)


def mark(cell: nbformat.NotebookNode) -> None:
    """A cell of code that is not tagged `idea` is folded, on the page and in JupyterLab."""
    tags = set(cell.metadata.get("tags", []))
    if "keep_output" in tags and cell.outputs:
        cell.execution_count = 1
    if "idea" not in tags:
        cell.metadata["tags"] = sorted(tags if "hide-cell" in tags else tags | {"hide-input"})
        cell.metadata["jupyter"] = cell.metadata.get("jupyter", {}) | {"source_hidden": True}


if __name__ == "__main__":
    main()
