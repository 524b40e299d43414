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
from helpers.dictionary.rows import Rows, Scaled, unit
from helpers.dictionary.select import Select

# -- exchange with SAELens ---------------------------------------------------------------------------------------------

CONFIG, WEIGHTS = "cfg.json", "sae_weights.safetensors"

ARCHITECTURES: dict[str, tuple[str, tuple[str, ...]]] = {
    "standard": ("positive", ("b_enc",)),
    "topk": ("token", ("b_enc",)),
    "abstopk": ("magnitude", ("b_enc",)),
    "jumprelu": ("threshold", ("b_enc", "threshold")),
    "gated": ("positive", ("b_gate", "b_mag", "r_mag")),
    "batchtopk": ("batch", ("b_enc", "topk_threshold")),
    "matryoshka_batchtopk": ("batch", ("b_enc", "topk_threshold")),
    "transcoder": ("positive", ("b_enc",)),
    "skip_transcoder": ("positive", ("b_enc", "W_skip")),
    "jumprelu_transcoder": ("threshold", ("b_enc", "threshold")),
    "jumprelu_skip_transcoder": ("threshold", ("b_enc", "threshold", "W_skip")),
}
"""SAELens' architectures: how they choose (`dictionary.RULES`), and their tensors beside W_enc, W_dec and b_dec. Those
with a `topk_threshold` stand in a training checkpoint; for use SAELens writes them as jumprelu. Not the family's are
matching pursuit, which finds codes one after another in what is left, and temporal SAEs, which look at other tokens."""

SHAPES: dict[str, tuple[str, ...]] = {
    "W_enc": ("d_in", "d_sae"),
    "W_dec": ("d_sae", "d_out"),
    "b_dec": ("d_out",),
    "W_skip": ("d_out", "d_in"),
    "topk_threshold": (),
} | dict.fromkeys(("b_enc", "b_gate", "b_mag", "r_mag", "threshold"), ("d_sae",))

NORMALISATIONS = "none", "expected_average_only_in", "covariance_whitening"
"""What a fixed affine map of the input does, and weights can take in; the others depend on the input."""

DTYPES = {
    str(each).removeprefix("torch."): each for each in (torch.float16, torch.bfloat16, torch.float32, torch.float64)
}


def save_saelens(sae: RankOneDictionary, folder: str | Path, metadata: dict[str, object] | None = None) -> Path:
    """Write a dictionary as SAELens does (`cfg.json`, `sae_weights.safetensors`); `SAE.load_from_disk` reads it.

    The rule of choosing says as which architecture; BatchTopK is written as it is used, with its threshold. A b_in that
    is not b_out goes into the encoder's bias. The files are written aside and moved into place, so a killed process
    leaves no half checkpoint. Raises `ValueError` for what no architecture of SAELens expresses.
    """
    architecture = _architecture(sae)
    transcoder, gated = "transcoder" in architecture, architecture == "gated"
    before = sae.b_in is not None and sae.b_in is sae.b_out and not transcoder
    biases = [_bias(rows, None if before else sae.b_in) for rows in (sae.router, sae.encoder)]
    like, select = sae.decoder.vectors(), sae.select
    tensors = {
        "W_enc": sae.router.vectors().T,
        "W_dec": like,
        "b_dec": like.new_zeros(sae.d_out) if sae.b_out is None else sae.b_out,
        "b_enc": biases[0],
        "b_gate": biases[0],
        "b_mag": biases[1],
        "r_mag": sae.encoder.log_scale if gated else None,
        "threshold": getattr(select, "threshold", like).expand(sae.n_features) if "jumprelu" in architecture else None,
        "W_skip": getattr(sae.shared, "weight", None),
    }
    wanted = "W_enc", "W_dec", "b_dec", *ARCHITECTURES[architecture][1]
    held = {name: tensors[name].detach().to("cpu", like.dtype).clone().contiguous() for name in wanted}
    trained = {"training_architecture": "batchtopk"} if select.rule == "batch" else {}
    about = {"sae_lens_version": "6.54.12", "training_architecture_details": {"k": sae.k}} | trained
    config = {
        "architecture": architecture,
        "d_in": sae.d_in,
        "d_sae": sae.n_features,
        "dtype": str(like.dtype).removeprefix("torch."),
        "device": "cpu",
        "apply_b_dec_to_input": before,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "metadata": about | (metadata or {}),
    }
    config |= {"d_out": sae.d_out} if transcoder else {}
    config |= {"k": sae.k, "rescale_acts_by_decoder_norm": False} if "topk" in architecture else {}
    folder = Path(folder)
    _write(folder / WEIGHTS, save(held))
    _write(folder / CONFIG, json.dumps(config, indent=1).encode())
    return folder


def _architecture(sae: RankOneDictionary) -> str:
    """Under which name SAELens has this member of the family; `ValueError` for the first knob that it does not have."""
    rule = sae.select.rule
    names = {"positive": "standard", "token": "topk", "magnitude": "abstopk", "threshold": "jumprelu"}
    names["batch"] = "jumprelu"
    _has("select", rule, names)
    _has("atoms", "some" if sae.n_features else "none", ["some"])
    routers = ("tied", "tied in direction") if rule == "positive" else ("tied",)
    plain = {"router": routers, "gate": ("hard",), "selection_bias": (False,), "expert_rank": (1,)}
    plain["activation"] = ("identity",) if rule == "magnitude" else ("relu",)
    for knob, allowed in plain.items():
        _has(knob, sae.knobs[knob], allowed)
    low = [part for part, rows in (("encoder", sae.encoder), ("router", sae.router)) if rows.down is not None]
    _has("low-rank rows", low, [[]])
    linear = type(sae.shared) is nn.Linear and sae.shared.bias is None
    _has("shared", None if sae.shared is None or linear else type(sae.shared).__name__, (None, "nn.Linear, no bias"))
    name = names[rule] if sae.router is sae.encoder else "gated"
    if sae.d_in == sae.d_out and sae.shared is None:
        return name
    kind = "skip_transcoder" if linear else "transcoder"
    full = {"standard": kind, "jumprelu": f"jumprelu_{kind}"}.get(name, f"{name} {kind}")
    _has("architecture", full, ARCHITECTURES)
    return full


def _has(knob: str, given: object, allowed) -> None:
    if given not in allowed:
        raise ValueError(f"{knob}={given!r} is not SAELens'; allowed: {', '.join(map(repr, allowed))}")


@torch.no_grad()
def _bias(rows: Rows, b_in: Tensor | None) -> Tensor:
    """What is added to w_j·x: the rows' own bias, and −w_j·b_in."""
    return rows.scores(-torch.zeros(1, rows.width).to(rows.weight) if b_in is None else -b_in[None])[0]


def _write(path: Path, content: bytes) -> None:
    """Aside and then into place, so that a killed process leaves no half file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as aside:
        Path(aside, "new").write_bytes(content)
        os.replace(Path(aside, "new"), path)


def load_saelens(source: str | Path, *, norm_factor: float | None = None) -> RankOneDictionary:
    """Read what SAELens or `save_saelens` wrote, in `ARCHITECTURES`, as it is used (in evaluation mode).

    What the file holds beside rows is folded into them, exactly, in float32 at least:
    - `rescale_acts_by_decoder_norm`: choosing by ‖d_j‖z_j and dividing again when decoding is a unit-norm decoder
      behind an encoder whose rows are longer by ‖d_j‖;
    - `normalize_activations`: a factor on the input, or a whitening, which SAELens leaves in a file of its own beside a
      checkpoint. Normalising by the input's own length or spread is none of the family.
    Of `reshape_activations="hook_z"` the heads are expected side by side in a row.

    Args:
        source: a folder, or "release:sae_id", which the installed sae_lens then loads from its hub (untested here).
        norm_factor: of `expected_average_only_in`, where no file says it.

    Raises `ValueError` naming the file, the field and what is allowed.
    """
    folder = Path(source)
    if not folder.is_dir() and ":" in str(source):
        return _from_release(str(source), norm_factor)
    config, tensors = _read(folder)
    tensors = {name: part.to(DTYPES[config["dtype"]]) for name, part in tensors.items()}
    if config["rescale_acts_by_decoder_norm"]:
        tensors = {name: part.to(torch.promote_types(part.dtype, torch.float32)) for name, part in tensors.items()}
        norms = tensors["W_dec"].norm(dim=1)
        tensors |= {"W_dec": unit(tensors["W_dec"])}  # a row of zeros stays one
        tensors |= {name: tensors[name] * norms for name in ("W_enc", "b_enc")}
    if (affine := _normalisation(folder, config, norm_factor)) is not None:
        tensors = _folded(tensors, config, *affine)
    return _member(config, tensors)


def _from_release(source: str, norm_factor: float | None) -> RankOneDictionary:
    try:
        from sae_lens import SAE
    except ImportError as error:
        raise ValueError(f"source={source!r} needs the package sae-lens; allowed without it: a folder") from error
    release, own = source.split(":", 1)
    try:
        sae = SAE.from_pretrained(release, own)
    except Exception as error:  # of the network, or a name that is unknown
        raise ValueError(
            f"source={source!r} cannot be loaded by sae-lens ({error}); allowed: release:sae_id"
        ) from error
    with tempfile.TemporaryDirectory() as folder:
        sae.save_model(folder)
        return load_saelens(folder, norm_factor=norm_factor)


def _read(folder: Path) -> tuple[dict, dict[str, Tensor]]:
    """Fields with their defaults filled in, and tensors of the right names and shapes."""
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise ValueError(f"folder={str(folder)!r} has no {name}; allowed: a folder written by SAELens")
    try:
        config = dict(json.loads((folder / CONFIG).read_text(encoding="utf-8")))
        tensors = load_file(folder / WEIGHTS)
    except (OSError, ValueError, TypeError, RecursionError, SafetensorError) as error:
        raise ValueError(
            f"folder={str(folder)!r} is damaged ({error}); allowed: a folder written by SAELens"
        ) from error
    config = _defaults(config)
    fields = {
        "architecture": ARCHITECTURES,
        "dtype": DTYPES,
        "normalize_activations": NORMALISATIONS[:1] if "transcoder" in str(config["architecture"]) else NORMALISATIONS,
        "reshape_activations": ("none", "hook_z"),
        "activation_fn": ("relu", "topk"),
        "apply_b_dec_to_input": (True, False),
        "rescale_acts_by_decoder_norm": (True, False) if "topk" in str(config["architecture"]) else (False,),
    }
    for name, allowed in fields.items():
        if not isinstance(config[name], str | bool) or config[name] not in allowed:
            raise ValueError(
                f"{name}={config[name]!r} in {folder / CONFIG} is not read; allowed: {', '.join(map(repr, allowed))}"
            )
    if (tensors.get("scaling_factor", torch.zeros(1)) == 1).all():
        del tensors["scaling_factor"]  # of old files: it does nothing
    _check_tensors(folder / WEIGHTS, config, tensors)
    return config, tensors


def _defaults(given: dict) -> dict:
    """The fields of a configuration, those of files before SAELens 6 under their names of today."""
    old = given.get("activation_fn_kwargs") or {}
    normalise = given.get("normalize_activations") or "none"
    activation = given.get("activation_fn", given.get("activation_fn_str", "relu"))
    topk = activation == "topk"
    config = {"d_in": None, "d_sae": None, "k": old.get("k") if isinstance(old, dict) else None}
    config |= {"architecture": "standard", "dtype": "float32", "apply_b_dec_to_input": True}
    config |= {"reshape_activations": "none", "rescale_acts_by_decoder_norm": False, "metadata": {}} | given
    config |= {"d_out": given.get("d_out", given.get("d_in")), "activation_fn": activation}
    config |= {"architecture": "topk"} if topk else {}
    config["normalize_activations"] = "expected_average_only_in" if normalise is True else normalise
    config["dtype"] = str(config["dtype"]).removeprefix("torch.")
    return config


def _check_tensors(path: Path, config: dict, tensors: dict[str, Tensor]) -> None:
    wanted = {"W_enc", "W_dec", "b_dec", *ARCHITECTURES[config["architecture"]][1]}
    if set(tensors) != wanted:
        raise ValueError(
            f"{path} holds {sorted(tensors)[:9]}; allowed with {config['architecture']!r}: {sorted(wanted)}"
        )
    for name, tensor in tensors.items():
        shape = tuple(config[size] for size in SHAPES[name])
        if tuple(tensor.shape) != shape or not tensor.is_floating_point():
            sizes = ", ".join(SHAPES[name])
            raise ValueError(f"{name} in {path} is {tensor.dtype}{list(tensor.shape)}; allowed: [{sizes}] = {shape}")
        if (tensor.isnan() if name == "threshold" else ~tensor.isfinite()).any():  # θ = ∞ is an atom that is off
            raise ValueError(f"{name} in {path} has entries that are infinite or not a number; allowed: finite ones")


def _normalisation(folder: Path, config: dict, factor: float | None) -> tuple[Tensor, Tensor, Tensor] | None:
    """Mean m, matrix M and its inverse, where z = (x − m) M is what the SAE was trained on."""
    kind = config["normalize_activations"]
    if factor is not None and kind != "expected_average_only_in":
        raise ValueError(
            f"norm_factor={factor!r} with normalize_activations={kind!r} in {folder / CONFIG} cannot be; "
            "allowed: with 'expected_average_only_in'"
        )
    if kind == "none":
        return None
    try:
        if kind == "covariance_whitening":
            held = load_file(folder / "activation_whitening.safetensors")
            affine = held["mean"], held["matrix"], held["inverse_matrix"]
            if [len(each) for each in affine] != [each.shape[-1] for each in affine] or len(affine[0]) != config[
                "d_in"
            ]:
                raise ValueError(f"of shapes {[tuple(each.shape) for each in affine]}")
            return affine
        beside = folder / "activation_scaler.json"
        factor = json.loads(beside.read_text(encoding="utf-8"))["scaling_factor"] if factor is None else factor
        if not 0 < float(factor) < float("inf"):
            raise ValueError(f"not with norm_factor={factor!r}")
        one = float(factor) * torch.eye(config["d_in"], dtype=torch.float64)
        return one.new_zeros(len(one)), one, one / float(factor) ** 2
    except (OSError, ValueError, TypeError, LookupError, ArithmeticError, RecursionError, SafetensorError) as error:
        wanted = "activation_whitening.safetensors" if "whitening" in kind else "activation_scaler.json, or norm_factor"
        raise ValueError(
            f"normalize_activations={kind!r} in {folder / CONFIG} needs what SAELens keeps beside it ({error}); "
            f"allowed: with {wanted}"
        ) from error


def _folded(tensors: dict, config: dict, mean: Tensor, matrix: Tensor, inverse: Tensor) -> dict[str, Tensor]:
    """The same function of x where it was one of z = (x − mean) @ matrix, whose output goes back the same way."""
    held = {name: part.to(torch.promote_types(part.dtype, torch.float32)) for name, part in tensors.items()}
    mean, matrix, inverse = (part.double() for part in (mean, matrix, inverse))
    for name in ("W_enc", "W_dec", "b_dec"):
        part = held[name].double()
        part = matrix @ part if name == "W_enc" else part @ inverse
        held[name] = (part + mean if name == "b_dec" else part).to(held[name].dtype)
    if not config["apply_b_dec_to_input"]:
        shift = (mean @ held["W_enc"].double()).to(held["W_enc"].dtype)
        scales = {"b_enc": 1.0, "b_gate": 1.0, "b_mag": held["r_mag"].exp() if "r_mag" in held else 1.0}
        held |= {name: held[name] - shift * scale for name, scale in scales.items() if name in held}
    return held


def _member(config: dict, tensors: dict[str, Tensor]) -> RankOneDictionary:
    rule, n = ARCHITECTURES[config["architecture"]][0], config["d_sae"]
    rows = Rows(tensors["W_enc"].T.contiguous(), tensors.get("b_gate", tensors.get("b_enc")))
    encoder = Scaled(rows, tensors["r_mag"], tensors["b_mag"]) if "r_mag" in tensors else rows
    select = Select(rule, n)
    if (threshold := tensors.get("threshold", tensors.get("topk_threshold"))) is not None:
        select.threshold.data = threshold.clamp_min(0)  # below it a ReLU lets nothing through
    b_dec, shared = nn.Parameter(tensors["b_dec"]), None
    before = config["apply_b_dec_to_input"] and "transcoder" not in config["architecture"]
    if (skip := tensors.get("W_skip")) is not None:
        shared = nn.utils.skip_init(nn.Linear, skip.shape[1], skip.shape[0], bias=False, dtype=skip.dtype)
        shared.weight.data = skip
    lengths = tensors["W_dec"].norm(dim=1)
    like_ours = bool(((lengths - 1).abs() < 1e-3)[lengths > 0].all())
    how = {"activation": "identity" if rule == "magnitude" else "relu", "unit_norm": like_ours, "shared": shared}
    how |= {"router": rows, "select": select, "b_in": b_dec if before else None, "b_out": b_dec}
    return RankOneDictionary(encoder, Rows(tensors["W_dec"]), k=_k(config, n), **how).eval()


def _k(config: dict, n: int) -> int:
    """How many codes there are; what training aimed at where the rule leaves it open, all where nothing says it."""
    rule = ARCHITECTURES[config["architecture"]][0]
    about = config["metadata"].get("training_architecture_details") if isinstance(config["metadata"], dict) else None
    aimed = about.get("k") or about.get("target_l0") if isinstance(about, dict) else None
    k = config["k"] if rule in ("token", "magnitude", "batch") else aimed
    good = isinstance(k, int | float) and not isinstance(k, bool) and 0 < k <= n
    if rule in ("token", "magnitude") and not (good and k == int(k)):
        raise ValueError(f"k={k!r} in {CONFIG} cannot be; allowed: 1 to d_sae={n}")
    return max(1, round(k)) if good else n


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
