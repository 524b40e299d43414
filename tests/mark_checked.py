"""`python -m tests.mark_checked`: number the cells whose outputs are kept, after nbstripout.

nbval compares nothing, and fails, where a cell has outputs and no execution count; nbstripout clears all counts.
"""

import nbformat

from helpers.settings import ROOT


def main() -> None:
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        notebook = nbformat.read(path, as_version=4)
        for cell in notebook.cells:
            if cell.cell_type == "code" and "keep_output" in cell.metadata.get("tags", []) and cell.outputs:
                cell.execution_count = 1
        nbformat.write(notebook, path)


if __name__ == "__main__":
    main()
