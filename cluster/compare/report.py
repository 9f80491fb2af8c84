"""What a comparison leaves: one HTML page with its pictures inside, and each part as a file of its own."""

from __future__ import annotations

from pathlib import Path

from cluster.compare import html, plots
from cluster.compare.formats import curve_rows, latex, markdown, number_rows, run_rows
from cluster.compare.reading import COMPARISON_KIND
from cluster.compare.table import Comparison
from cluster.records.csv_text import as_csv
from cluster.records.tracking_store import connect, find_experiment

#: Dots per inch of the PNG files: sharp in print at a column's width.
_DPI = 240


def write(comparison: Comparison, folder: Path) -> Path:
    """Write everything into a folder, over what an earlier comparison left there.

    That is ``report.html``, ``table.csv``, ``table.md``, ``table.tex``, ``runs.csv``, ``curves.csv`` and, in
    ``figures/``, every plot as PNG and PDF.

    Returns:
        The report.
    """
    figures = folder / "figures"
    figures.mkdir(parents=True, exist_ok=True)
    pictures, missing = [], []
    for plot, figure in plots.figures(comparison.table.groups):
        png, pdf = (figures / f"{plot.name}.{suffix}" for suffix in ("png", "pdf"))
        if figure is None:
            missing.append(plot.caption)
            png.unlink(missing_ok=True)
            pdf.unlink(missing_ok=True)
            continue
        figure.savefig(png, dpi=_DPI, metadata={"Software": None})
        figure.set_layout_engine("none")  # laid out once is enough
        figure.savefig(pdf, metadata={"CreationDate": None})
        pictures.append(html.Picture(plot.name, plot.caption, png.read_bytes()))
    files = {
        "table.csv": as_csv(number_rows(comparison.table)),
        "table.md": markdown(comparison.table),
        "table.tex": latex(comparison.table),
        "runs.csv": as_csv(run_rows(comparison)),
        "curves.csv": as_csv(curve_rows(comparison.table.groups)),
        "report.html": html.page(comparison, pictures, missing),
    }
    for name, text in files.items():
        (folder / name).write_text(text, encoding="utf-8")
    return folder / "report.html"


def log_to_mlflow(comparison: Comparison, folder: Path, uri: str, experiment: str) -> str:
    """Keep the files of a comparison in the experiment that its runs are from, as a run of their own.

    Its description is the table; its ``kind`` keeps later comparisons from reading it.

    Returns:
        The id of that run.
    """
    client = connect(uri)
    tags = {"kind": COMPARISON_KIND, "mlflow.note.content": markdown(comparison.table)}
    runs = sum(len(group.runs) for group in comparison.table.groups)
    run = client.create_run(
        find_experiment(client, uri, experiment), tags=tags, run_name=f"comparison of {runs} runs"
    )
    client.log_artifacts(run.info.run_id, str(folder))
    client.set_terminated(run.info.run_id)
    return str(run.info.run_id)
