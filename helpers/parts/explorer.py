"""The explorer: a file of data for a page on which one looks into a dictionary, latent by latent, without a server.

    python -m helpers.parts.explorer --name mine --sae FOLDER --teacher gemma-3-270m --layer 9 --site resid_post
    python -m helpers.parts.explorer --name smollm2 --sae book --teacher smollm2-135m --layer 14
    python -m helpers.parts.explorer --name book-moe --experts --teacher book-moe

The next `make book` shows it on `explorer.html`. `--export neuronpedia` writes SAEDashboard's batch beside it.
"""

from __future__ import annotations

import argparse
import json
import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from helpers import settings
from helpers.models import activations, corpora, teachers
from helpers.models.activations import ActivationStore
from helpers.models.corpora import SPLITS
from helpers.models.teachers import SITES, Teacher
from helpers.parts import inside
from helpers.parts.audit import Book, read_sae
from helpers.parts.latents import AFTER, BEFORE, Dictionary, View, nearest, places, promoted, words
from helpers.settings import allowed

SHADES = 99
"""Activations are kept as whole numbers up to this, the latent's largest."""
FITTING = 4000
"""Tokens that tell the sign of an expert's direction."""
NOTES = dict.fromkeys(
    ("book-texts", "wikipedia-sample"),
    "Texts from Wikipedia are by its contributors, under CC BY-SA 3.0 (authors in each article's history); State of the"
    " Union addresses and Moby-Dick are in the public domain.",
)
NO_LENS = "mlp_in is what the MLP reads, and nothing is written to the residual stream there: no logit lens."


# -- what the page reads -----------------------------------------------------------------------------------------------


def page(view: View) -> dict[str, object]:
    """A table of tokens, the text as numbers in it, and for each latent numbers alone.

    A context is the row it is about, then pairs: how far from it a token stands, and its activation in `SHADES`ths of
    the latent's largest. Neighbours are pairs too: a number, and its cosine in hundredths.
    """
    shown, store, place = view.dictionary, view.store, places(view.store)
    logits = {} if isinstance(view.logits, str) else {name: ids.numpy() for name, (ids, _) in view.logits.items()}
    every = [np.array(store.token_id, dtype=np.int64), *(ids.ravel() for ids in logits.values())]
    known, index = np.unique(np.concatenate(every), return_inverse=True)
    numbers = {article: i for i, article in enumerate(view.documents)}
    columns = {
        "about": view.about | {"lens": "" if logits else view.logits},
        "window": [BEFORE, AFTER],
        "tokens": words(store.tokenizer, known.tolist()),
        "text": index[: store.n],
        "starts": view.starts,
        "document": [numbers[article] for article in store.article[view.starts].tolist()],
        "documents": list(view.documents.values()),
        "places": np.bincount(place),
        "counts": shown.counts,
        "largest": [float(f"{value:.4g}") for value in shown.largest],
        "by_place": shown.by_place(place),
        "contexts": [[_context(view, j, int(row)) for row in rows] for j, rows in enumerate(view.rows)],
    }
    columns |= {name: np.searchsorted(known, ids) for name, ids in logits.items()}
    for name in ("writes", "reads"):
        others, cosines = nearest(getattr(shown, name))
        columns[name] = torch.stack([others, (100 * cosines).round().long()], 2).flatten(1)
    return columns


def _context(view: View, j: int, row: int) -> list[int]:
    window, values = view.around(j, row)
    shades = SHADES * values / view.dictionary.largest[j]
    shades = np.where(np.abs(shades) < 1, np.sign(shades), np.round(shades)).astype(int)
    fires = np.flatnonzero(values)
    return [row, *np.stack([fires + window.start - row, shades[fires]], 1).ravel().tolist()]


def write(path: Path, columns: dict[str, object]) -> Path:
    """A script that hands the page its data, since a page opened from the disk may load scripts and nothing else."""
    options = {"ensure_ascii": False, "separators": (",", ":"), "default": settings.as_json, "allow_nan": False}
    lines = ",\n".join(f'"{name}":{json.dumps(column, **options)}' for name, column in columns.items())
    settings.write(path, f'window.explorer.data["{columns["about"]["name"]}"] =\n{{{lines}}};\n'.encode())
    return path


# -- what SAEDashboard reads -------------------------------------------------------------------------------------------

NONE = tuple(f"correlated_{of}_{what}" for of in ("neurons", "features") for what in ("indices", "l1", "pearson"))
NONE += ("logits_hist_data_bar_heights", "logits_hist_data_bar_values", "decoder_weights_dist")
"""Lists that are left empty, as they are by default there: a model's own neurons, and histograms of all logits."""


def neuronpedia(view: View) -> dict[str, object]:
    """All latents as a batch of SAEDashboard, which its exporter makes Neuronpedia's files of."""
    about, bar = view.about, settings.progress(range(view.dictionary.n), desc="neuronpedia", delay=2)
    batch = {"model_id": about["teacher"], "layer": about["layer"], "sae_set": about["name"]}
    return batch | {"features": [_feature(view, j) for j in bar]}


def _feature(view: View, j: int) -> dict[str, object]:
    shown, tokenizer, vector = view.dictionary, view.store.tokenizer, view.dictionary.writes[j].numpy()
    heights, edges = np.histogram(shown.column(j)[1], 40)
    aligned = np.argsort(-np.abs(vector), kind="stable")[:3]
    feature = {"feature_index": j, "frac_nonzero": float(shown.counts[j] / view.store.n)} | {name: [] for name in NONE}
    for name, short in (("promoted", "pos"), ("suppressed", "neg")):
        ids, logits = ([], []) if isinstance(view.logits, str) else [each[j].tolist() for each in view.logits[name]]
        feature |= {f"{short}_str": words(tokenizer, ids), f"{short}_values": np.round(logits, 3).tolist()}
    feature["activations"] = []
    for row in view.rows[j].tolist():
        window, values = view.around(j, row)
        tokens = words(tokenizer, view.store.token_id[window].tolist())
        top = {"bin_min": -1, "bin_max": float(shown.largest[j]), "bin_contains": -1}
        top |= {"qualifying_token_index": row - window.start, "tokens": tokens, "values": values.round(3).tolist()}
        feature["activations"].append(top)
    return feature | {
        "neuron_alignment_indices": aligned,
        "neuron_alignment_values": vector[aligned].round(3).tolist(),
        "neuron_alignment_l1": (np.abs(vector[aligned]) / max(np.abs(vector).sum(), 1e-30)).round(3).tolist(),
        "freq_hist_data_bar_values": ((edges[:-1] + edges[1:]) / 2).round(3).tolist(),
        "freq_hist_data_bar_heights": heights,
        "n_prompts_total": len(view.starts),
        "n_tokens_in_prompt": int(np.diff(np.append(view.starts, view.store.n)).max()),
        "dataset": view.about["corpus"],
    }


# -- the command -------------------------------------------------------------------------------------------------------


def views(args: argparse.Namespace) -> Iterator[View]:
    """What was asked for; `ValueError` before anything long where it cannot be."""
    good = re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", args.name) is not None
    allowed(good, f"name={args.name!r}", "letters, digits, '-', '.' and '_'")
    allowed(args.experts or len(args.layer) == 1, f"layer={args.layer}", "one layer, where it is an SAE's")
    settings.made("to", args.to, to_write=True)
    args.device = str(settings.device(args.device))
    sae = None if args.experts or args.sae == "book" else read_sae(args.sae)
    experts = inside.read(args.teacher, args.layer or None) if args.experts else []
    teacher = teachers.load(args.teacher, device=args.device)
    if args.experts:
        yield from _of_experts(teacher, experts, args)
        return
    (layer,), site = args.layer, args.site
    teacher.block(layer)
    if sae is not None:
        what = f"{teacher.d_model}, as {site} of layer {layer} of {args.teacher}"
        allowed(sae.d_in == teacher.d_model, f"sae={args.sae!r} reads {sae.d_in} numbers", what)
    how = {"layer": layer, "sites": (site,), "n_tokens": args.tokens, "split": args.split}
    store = activations.harvest(teacher, args.corpus, **how)
    if sae is None:
        sizes = args.train_tokens, args.features, args.k, args.steps
        sae = Book(args.corpus, layer, site, *sizes, args.lr, args.balance).train(teacher, device=args.device)
    shown = Dictionary.of_sae(sae, store.tensor(site))
    yield _view(teacher, shown, store, args, {"layer": layer, "site": site, "k": sae.k, "name": args.name})


def _of_experts(teacher: Teacher, experts: list[inside.MoELayer], args: argparse.Namespace) -> Iterator[View]:
    layers, other = [moe.layer for moe in experts], next(split for split in SPLITS if split != args.split)
    fitting, judging = (
        activations.harvest(teacher, args.corpus, layer=layers, n_tokens=n, split=split)
        for split, n in ((other, FITTING), (args.split, args.tokens))
    )
    for moe in experts:
        store = judging[moe.layer]
        shown = Dictionary.of_experts(inside.LayerRows(moe, fitting[moe.layer], store, device=args.device))
        about = {"layer": moe.layer, "site": "mlp_out", "k": moe.top_k, "name": f"{args.name}-{moe.layer}"}
        yield _view(teacher, shown, store, args, about)


def _view(teacher: Teacher, shown: Dictionary, store: ActivationStore, args: argparse.Namespace, about: dict) -> View:
    kind = "experts" if shown.unit == "expert" else f"SAE at {about['site']}"
    about |= {"title": f"{Path(args.teacher).name}, layer {about['layer']}: {kind}"}
    what = {"unit": shown.unit, "n": shown.n, "teacher": args.teacher, "corpus": args.corpus, "split": args.split}
    what |= {"n_tokens": store.n, "note": NOTES.get(args.corpus, ""), "command": args.command}
    logits = NO_LENS if about["site"] == "mlp_in" else promoted(teacher, shown.writes)
    return View(shown, store, about | what, documents(args.corpus, args.split, store.article.tolist()), logits)


def documents(corpus: str, split: str, articles: list[int]) -> dict[int, list[str]]:
    """Title and source of the articles, in the order in which they come."""
    rows = corpora.load(corpus, split)
    first = dict(zip(*(each.tolist() for each in np.unique(rows["article"][:], return_index=True)), strict=True))
    found = {article: rows[first[article]] for article in dict.fromkeys(articles)}
    return {article: [row["title"], row.get("source", "")] for article, row in found.items()}


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m helpers.parts.explorer", description=__doc__.splitlines()[0])
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--sae", metavar="FOLDER", help="of SAELens' format, a packed file, or 'book': one is trained")
    what.add_argument("--experts", action="store_true", help="the experts of a mixture, a file for each layer")
    parser.add_argument("--name", required=True, help="of the file, and in links to it")
    parser.add_argument("--teacher", default=teachers.SECOND, help="as in the chapters (default: %(default)s)")
    parser.add_argument("--layer", type=int, nargs="+", default=[], help="one for an SAE; default of a mixture: all")
    parser.add_argument("--site", default="resid_post", choices=SITES, help="that the SAE reads (default: %(default)s)")
    parser.add_argument("--corpus", default="book-texts", help="the text that is shown (default: %(default)s)")
    parser.add_argument("--split", default="test", choices=SPLITS, help="(default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=40_000, help="how much of it (default: %(default)s)")
    parser.add_argument("--device", default="cpu", help="'cpu', 'cuda' or 'auto' (default: %(default)s)")
    parser.add_argument("--to", type=Path, default=settings.ROOT / "_build" / "explorer", help="folder of the file")
    parser.add_argument("--export", choices=["neuronpedia"], help="also write NAME/batch-0.json, as SAEDashboard does")
    book = parser.add_argument_group("of an SAE that is trained here (--sae book)")
    defaults = {"features": 1152, "k": 32, "steps": 1000, "train-tokens": 60_000, "lr": 3e-3, "balance": 0.01}
    for name, default in defaults.items():
        book.add_argument(f"--{name}", type=type(default), default=default, help="(default: %(default)s)")
    return parser


def main(arguments: list[str] | None = None) -> int:
    """The command; 0 when all was written, 2 where it was asked wrongly."""
    arguments = sys.argv[1:] if arguments is None else arguments
    args = parser().parse_args(arguments)
    args.command = shlex.join(["python", "-m", "helpers.parts.explorer", *arguments])
    try:
        for view in views(args):
            path = write(args.to / f"{view.about['name']}.js", page(view))
            print(f"{path} ({path.stat().st_size / 1e6:.1f} MB)")
            if args.export:
                settings.write_json(path.with_suffix("") / "batch-0.json", neuronpedia(view))
                print(path.with_suffix("") / "batch-0.json")
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
