"""Every notebook runs from its first cell to its last, in one kernel, and is stored without outputs."""

from pathlib import Path

import pytest


nbformat = pytest.importorskip("nbformat", reason="notebooks need nbclient and ipykernel: pip install 'peft-ext[dev]'")
nbclient = pytest.importorskip("nbclient", reason="notebooks need nbclient and ipykernel: pip install 'peft-ext[dev]'")

FOLDER = Path(__file__).parents[2] / "examples" / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
QUICK = "information_flow"
RESET = "%reset -f\nimport os; os.chdir({folder!r})"


@pytest.fixture(scope="module")
def kernel():
    """One kernel for all notebooks: its imports are most of the time."""
    from jupyter_client.manager import start_new_kernel

    manager, client = start_new_kernel(kernel_name="python3")
    yield manager, client
    client.stop_channels()
    manager.shutdown_kernel(now=True)


@pytest.mark.parametrize(
    "path",
    [pytest.param(path, id=path.stem, marks=() if path.stem == QUICK else pytest.mark.slow) for path in NOTEBOOKS],
)
def test_the_notebook_runs(path, kernel, tmp_path):
    notebook = nbformat.read(path, as_version=4)
    notebook.cells.insert(0, nbformat.v4.new_code_cell(RESET.format(folder=str(FOLDER))))
    runner = nbclient.NotebookClient(notebook, km=kernel[0], timeout=60)
    runner.kc = kernel[1]
    with runner.setup_kernel(cleanup_kc=False):
        for index, cell in enumerate(notebook.cells):
            if cell.cell_type == "code":
                runner.execute_cell(cell, index)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_the_notebook_is_stored_without_outputs(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    for cell in notebook.cells:
        assert cell.cell_type != "code" or (not cell.outputs and cell.execution_count is None)
