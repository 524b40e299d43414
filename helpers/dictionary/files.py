"""Dictionaries on disk: SAELens' files, and packed atoms in one safetensors file."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor, nn

from helpers.dictionary.family import RankOneDictionary
from helpers.dictionary.models import as_sae
from helpers.dictionary.packed import Packed
from helpers.dictionary.rows import Rows, unit

# -- exchange with SAELens ---------------------------------------------------------------------------------------------


def save_saelens(sae: RankOneDictionary, folder: str | Path, metadata: dict[str, object] | None = None) -> Path:
    """Write a TopK SAE as SAELens does (`cfg.json`, `sae_weights.safetensors`), so that `SAE.load_from_disk` reads it.

    The files are written aside and moved into place, so a killed process leaves no half checkpoint. Raises `ValueError`
    for a model that SAELens' TopK SAE cannot express.
    """
    plain = {"router": "tied", "gate": "hard", "activation": "relu", "shared": False, "selection_bias": False}
    for name, allowed in {**plain, "expert_rank": 1}.items():
        if sae.knobs[name] != allowed:
            raise ValueError(f"{name}={sae.knobs[name]!r} is not an SAELens TopK SAE's; allowed: {allowed!r}")
    if sae.b_out is None or (sae.b_in is not None and sae.b_in is not sae.b_out) or sae.encoder.down is not None:
        raise ValueError(
            "b_in differs from b_out, or a low-rank encoder; allowed: b_in = b_out or none, a full encoder"
        )
    tensors = {
        "W_enc": sae.encoder.vectors().T,
        "b_enc": sae.encoder.bias if sae.encoder.bias is not None else sae.decoder.weight.new_zeros(sae.n_features),
        "W_dec": sae.decoder.vectors(),
        "b_dec": sae.b_out,
    }
    config = {
        "architecture": "topk",
        "d_in": sae.d_in,
        "d_sae": sae.n_features,
        "k": sae.k,
        "dtype": str(sae.decoder.weight.dtype).removeprefix("torch."),
        "device": "cpu",
        "apply_b_dec_to_input": sae.b_in is not None,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "rescale_acts_by_decoder_norm": False,
        "metadata": metadata or {},
    }
    folder = Path(folder)
    _write(
        folder / "sae_weights.safetensors",
        save({name: t.detach().cpu().clone().contiguous() for name, t in tensors.items()}),
    )
    _write(folder / "cfg.json", json.dumps(config, indent=1).encode())
    return folder


def _write(path: Path, content: bytes) -> None:
    """Aside and then into place, so that a killed process leaves no half file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as aside:
        Path(aside, "new").write_bytes(content)
        os.replace(Path(aside, "new"), path)


def load_saelens(folder: str | Path) -> RankOneDictionary:
    """Read a TopK SAE that SAELens or `save_saelens` wrote.

    `rescale_acts_by_decoder_norm` is folded into the weights, exactly: choosing by ‖d_j‖z_j and dividing again when
    decoding is a unit-norm decoder behind an encoder whose rows are longer by ‖d_j‖.
    """
    folder = Path(folder)
    for name in ("cfg.json", "sae_weights.safetensors"):
        if not (folder / name).is_file():
            raise ValueError(f"folder={str(folder)!r} has no {name}; allowed: a folder written by SAELens")
    try:
        config = dict(json.loads((folder / "cfg.json").read_text()))
        tensors = load_file(folder / "sae_weights.safetensors")
    except (OSError, ValueError, TypeError, RecursionError, SafetensorError) as error:
        raise ValueError(
            f"folder={str(folder)!r} is damaged ({error}); allowed: a folder written by SAELens"
        ) from error
    allowed = {
        "architecture": ("topk",),
        "normalize_activations": ("none", None),
        "reshape_activations": ("none", None),
    }
    for name, values in allowed.items():
        if config.get(name) not in values:
            raise ValueError(
                f"{name}={config.get(name)!r} in {folder / 'cfg.json'} is not read; allowed: {values[0]!r}"
            )
    w_enc, b_enc, w_dec = tensors["W_enc"].T.contiguous(), tensors["b_enc"], tensors["W_dec"]
    if config.get("rescale_acts_by_decoder_norm"):
        norms = w_dec.norm(dim=1)
        w_enc, b_enc, w_dec = w_enc * norms[:, None], b_enc * norms, unit(w_dec)  # a row of zeros stays one
    b_dec = nn.Parameter(tensors["b_dec"])
    b_in = b_dec if config.get("apply_b_dec_to_input", True) else None
    lengths = w_dec.norm(dim=1)
    like_ours = bool(((lengths - 1).abs() < 1e-3)[lengths > 0].all())
    rows = Rows(w_enc, b_enc), Rows(w_dec)
    return RankOneDictionary(*rows, k=config["k"], b_in=b_in, b_out=b_dec, unit_norm=like_ours)


# -- packed files ------------------------------------------------------------------------------------------------------


def save_packed(sae: RankOneDictionary, path: str | Path) -> Path:
    """Write an expander SAE as one safetensors file: values, row numbers, biases; k and the activation in its header.

    Written aside and moved into place. Raises `ValueError` for a model that `expander_sae` does not make.
    """
    atoms = sae.encoder
    plain = sae.router is sae.decoder is atoms and sae.gate == "hard" and sae.shared is None and sae.b_in is sae.b_out
    if not isinstance(atoms, Packed) or not plain or sae.b_in is None or atoms.bias is None:
        raise ValueError(f"{sae.knobs} is no expander SAE; allowed: what expander_sae makes")
    tensors = {"values": atoms.weight, "rows": atoms.rows, "b_enc": atoms.bias, "b_dec": sae.b_out}
    tensors |= {"degrees": atoms.degrees, "selection_bias": sae.selection_bias}
    if atoms.degrees is not None:  # the numbers in use, one atom after another
        used = ~atoms._unused()
        tensors |= {"values": atoms.weight[used], "rows": atoms.rows[used]}
    path, held = Path(path), {name: t.detach().cpu().contiguous() for name, t in tensors.items() if t is not None}
    _write(path, save(held, {"k": str(sae.k), "activation": sae.activation}))
    return path


def load_packed(path: str | Path) -> RankOneDictionary:
    """Read what `save_packed` wrote. Raises `ValueError` naming a file that is missing, damaged or something else."""
    try:
        with safe_open(path, "pt") as file:
            about, tensors = file.metadata() or {}, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise ValueError(f"path={str(path)!r} cannot be read ({error}); allowed: a file of save_packed") from error
    if not {"k", "activation"} <= set(about) or not {"values", "rows", "b_enc", "b_dec"} <= set(tensors):
        raise ValueError(f"path={str(path)!r} holds {sorted(tensors)}; allowed: a file of save_packed")
    values, rows, degrees = tensors["values"], tensors["rows"], tensors.get("degrees")
    whole = values.shape == rows.shape and (degrees is None or (degrees.min() >= 0 and degrees.sum() == len(values)))
    if not whole or (degrees is not None and degrees.max() > len(tensors["b_dec"])):
        raise ValueError(f"path={str(path)!r} is damaged: its values, rows and degrees do not fit each other")
    if degrees is not None:
        values, rows = _padded(values, rows, degrees, len(tensors["b_dec"]))
    atoms = Packed(values, rows, len(tensors["b_dec"]), tensors["b_enc"], degrees)
    chosen_by, k = tensors.get("selection_bias"), int(about["k"])
    options = {"activation": about["activation"], "selection_bias": chosen_by is not None}
    sae = as_sae(atoms, atoms, k, b_dec=tensors["b_dec"], **options)
    if chosen_by is not None:
        sae.selection_bias.copy_(chosen_by)
    return sae


def _padded(values: Tensor, rows: Tensor, degrees: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Flat numbers and places as [n, q]; behind an atom's own stand places that it does not use."""
    q = int(degrees.max())
    used = torch.arange(q) < degrees[:, None]
    full, places = values.new_zeros(used.shape), rows.new_zeros(used.shape)
    full[used], places[used] = values, rows
    for own, free in zip(places, used, strict=True):
        taken = torch.zeros(width, dtype=torch.bool)
        taken[own[free].long()] = True
        own[~free] = (~taken).nonzero()[: int((~free).sum()), 0].to(own.dtype)
    return full, places
