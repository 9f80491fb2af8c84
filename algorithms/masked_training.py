"""Methods against heterogeneity, each inside one mask drawn before round 1: the mask's values alone travel.

A round is the method's with every gradient masked, and the server's that of ``fixed_mask``: the mean over
each weight's holders. What a method adds to a gradient comes before the mask: hooks call ``super()``.
"""

from __future__ import annotations

from dataclasses import dataclass

from algorithms.fedalign import FedAlign, FedAlignClient
from algorithms.feddyn import FedDyn, FedDynClient
from algorithms.fedreg import FedReg, FedRegClient
from algorithms.fedsam import FedSAM, FedSAMClient
from algorithms.fixed_mask import FixedMask, MaskedClient
from algorithms.moon import Moon, MoonClient
from algorithms.scaffold import Scaffold, ScaffoldClient


class _FedSAMClient(FedSAMClient, MaskedClient):
    pass


class _ScaffoldClient(ScaffoldClient, MaskedClient):
    pass


class _FedDynClient(FedDynClient, MaskedClient):
    pass


class _FedRegClient(FedRegClient, MaskedClient):
    pass


class _FedAlignClient(FedAlignClient, MaskedClient):
    pass


class _MoonClient(MoonClient, MaskedClient):
    pass


@dataclass(frozen=True, kw_only=True)
class MaskedFedSAM(FedSAM, FixedMask):
    """FedSAM inside a mask; so are its ascents."""

    name = "masked_fedsam"
    client = _FedSAMClient
    asynchronous = False


@dataclass(frozen=True, kw_only=True)
class MaskedScaffold(Scaffold, FixedMask):
    """SCAFFOLD inside a mask; control variates still travel dense, 0 outside it."""

    name = "masked_scaffold"
    shares_support = False
    client = _ScaffoldClient
    asynchronous = False


@dataclass(frozen=True, kw_only=True)
class MaskedFedDyn(FedDyn, FixedMask):
    """FedDyn inside a mask; h is 0 outside it."""

    name = "masked_feddyn"
    shares_support = False
    client = _FedDynClient
    asynchronous = False


@dataclass(frozen=True, kw_only=True)
class MaskedFedReg(FedReg, FixedMask):
    """FedReg inside a mask; the gradients that it projects on are masked too."""

    name = "masked_fedreg"
    client = _FedRegClient
    asynchronous = False


@dataclass(frozen=True, kw_only=True)
class MaskedFedAlign(FedAlign, FixedMask):
    """FedAlign inside a mask."""

    name = "masked_fedalign"
    client = _FedAlignClient
    asynchronous = False


@dataclass(frozen=True, kw_only=True)
class MaskedMoon(Moon, FixedMask):
    """MOON inside a mask; the models that it contrasts with are sparse as well."""

    name = "masked_moon"
    client = _MoonClient
    asynchronous = False
