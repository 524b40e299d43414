"""The family of rank-one dictionaries: its rows, its one class, the papers' models, codes by pursuit, files."""

from helpers.dictionary.family import ACTIVATIONS, GATES, RankOneDictionary
from helpers.dictionary.files import load_packed, load_saelens, save_packed, save_saelens
from helpers.dictionary.models import dense_mlp, expander_sae, gated_sae, sae_to_moe, secret_moe, topk_sae
from helpers.dictionary.packed import GATHER_SHARE, Packed, packed_products
from helpers.dictionary.rows import Rows, Scaled, SparseCodes, Trace, gather_dots, weighted_sum
from helpers.dictionary.select import RULES, Select

__all__ = [
    "ACTIVATIONS", "GATES", "GATHER_SHARE", "Packed", "RULES", "RankOneDictionary", "Rows", "Scaled", "Select",
    "SparseCodes", "Trace",
    "dense_mlp", "expander_sae", "gated_sae", "gather_dots", "load_packed", "load_saelens", "packed_products",
    "sae_to_moe", "save_packed", "save_saelens", "secret_moe", "topk_sae", "weighted_sum",
]  # fmt: skip
