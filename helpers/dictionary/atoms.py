"""What a pursuit asks of a dictionary, packed or not: correlations, single atoms, products of atoms, sizes."""

from __future__ import annotations

import torch
from torch import Tensor

from helpers.dictionary.packed import GATHER_SHARE, Packed, packed_products
from helpers.dictionary.rows import Rows, gather_dots, power_of_two, weighted_sum


class Atoms:
    """What a pursuit asks of a dictionary, packed or not: correlations, single atoms, products of atoms."""

    def __init__(self, atoms: Rows | Tensor):
        if getattr(atoms, "down", None) is not None:
            raise ValueError("atoms are low-rank rows (down is given); allowed: rows whose weight is the atoms")
        self.weight = (atoms if isinstance(atoms, Tensor) else atoms.weight).detach()
        if self.weight.ndim != 2:
            raise ValueError(f"atoms have shape {list(self.weight.shape)}; allowed: [n, length]")
        self.packed = isinstance(atoms, Packed)
        self.rows = atoms.rows.long() if self.packed else None
        self.width = atoms.width if self.packed else self.weight.shape[1]
        self.gathers = self.packed and self.weight.shape[1] <= GATHER_SHARE * self.width
        self.dtype, self.longest = self.weight.dtype, self.weight.new_ones(())
        self.scale, self.ratio = self.weight.new_ones(len(self)), None
        self._dense = None if self.packed else self.weight

    def __len__(self) -> int:
        return len(self.weight)

    def scaled(self) -> Atoms:
        """In float32 at least, each divided by a power of two, `scale`, unless lengths are alike and ordinary."""
        self.weight = self.weight.to(torch.promote_types(self.weight.dtype, torch.float32))
        if self.weight.numel():
            lengths = self.weight.norm(dim=1)
            self.longest = top = lengths.amax()
            if not (1e-6 < top < 1e6 and lengths.amin() > top / 16):
                if not torch.isfinite(largest := self.weight.abs().amax(1)).all():
                    raise ValueError("atoms have entries that are infinite or not a number; allowed: finite ones")
                self.scale = power_of_two(largest).double()
                self.ratio = self.scale / self.scale[largest > 0].amax() if largest.any() else None
                self.weight = (self.weight / self.scale[:, None]).to(self.weight.dtype)
                self.longest = self.weight.norm(dim=1).amax()
        self._dense = None if self.packed else self.weight
        return self

    def weigh(self, score: Tensor, floor: Tensor) -> tuple[Tensor, Tensor]:
        """Scores with the atoms' own lengths, and what one must be above so that it is no rounding."""
        if self.ratio is None:
            return score, floor
        own = score * self.ratio
        return torch.where(score > floor[:, None], own, own.clamp_max(0)), torch.zeros_like(floor)

    @property
    def dense(self) -> Tensor:
        """[n, m]; packed atoms are spread out once, when first asked for."""
        if self._dense is None:
            self._dense = self.vectors(slice(None))
        return self._dense

    def vectors(self, which: Tensor | slice) -> Tensor:
        """[..., m]: some atoms at full length."""
        if self._dense is not None:
            return self._dense[which]
        values, rows = self.weight[which], self.rows[which]
        return values.new_zeros(*values.shape[:-1], self.width).scatter_(-1, rows, values)

    def correlate(self, x: Tensor) -> Tensor:
        return packed_products(x, self.weight, self.rows) if self.gathers else Rows(self.dense).scores(x)

    def combine(self, values: Tensor, indices: Tensor) -> Tensor:
        """Σ_i values[b,i] · d_{indices[b,i]}."""
        if self._dense is None:
            return (values[:, None] @ self.vectors(indices))[:, 0]
        return weighted_sum(values, indices, self._dense)

    def products(self, x: Tensor, indices: Tensor) -> Tensor:
        """x_b · d_{indices[b,i]}."""
        if self._dense is None:
            return (self.vectors(indices) @ x[:, :, None])[:, :, 0]
        return gather_dots(x, self._dense, indices)

    def gram(self) -> Tensor:
        """[n, n]: products of all pairs."""
        gram = self.weight.new_empty(len(self), len(self))
        for start in range(0, len(self), 512):
            stop = min(start + 512, len(self))
            block = self.vectors(slice(start, stop))
            if self.gathers:
                gram[start:stop] = self.correlate(block)
            else:  # half of them are enough
                gram[start:stop, :stop] = Rows(self.dense[:stop]).scores(block)
                gram[:start, start:stop] = gram[start:stop, :start].T
        return gram


def signals(x: Tensor, atoms: Atoms) -> Tensor:
    if x.ndim != 2 or x.shape[1] != atoms.width:
        raise ValueError(f"x has shape {list(x.shape)}; allowed: [batch, {atoms.width}], rows as long as the atoms")
    if not torch.isfinite(x).all():
        raise ValueError("x has entries that are infinite or not a number; allowed: finite ones")
    return x if x.is_floating_point() else x.to(atoms.weight.dtype)


def at_unit_size(x: Tensor, atoms: Atoms) -> tuple[Tensor, Tensor]:
    """Signals divided by powers of two so that their largest entries are 1 to 2, and these powers."""
    x = signals(x, atoms)
    size = power_of_two(x.abs().amax(1))
    return (x / size[:, None]).to(atoms.weight.dtype), size


def at_own_size(values: Tensor, indices: Tensor, size: Tensor, atoms: Atoms) -> Tensor:
    """Coefficients for signals and atoms as they were given."""
    factor = size.double()[:, None] / atoms.scale.double()[indices]
    found = torch.where(values == 0, 0.0, values.double() * factor).to(atoms.dtype)
    gone = bool(((values != 0).any(1) & ~(found != 0).any(1)).any())
    if gone or not torch.isfinite(found).all():
        different = f"x and atoms have sizes so different that coefficients {'vanish' if gone else 'overflow'}"
        raise ValueError(f"{different}; allowed: what {atoms.dtype} holds")
    return found
