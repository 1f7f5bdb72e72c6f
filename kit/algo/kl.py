"""Estimators of the KL divergence to a reference policy, from the sampled tokens alone.

Source: J. Schulman, "Approximating KL Divergence", 2020 (joschu.net/blog/kl-approx.html).
"""

from __future__ import annotations

from typing import Literal

import torch

KlKind = Literal["k1", "k2", "k3", "low_var_kl"]


def approx_kl(
    logp_T: torch.Tensor,
    ref_logp_T: torch.Tensor,
    kind: KlKind,
    ratio_T: torch.Tensor | None = None,
) -> torch.Tensor:
    """KL(policy || reference) by token, shape (T), in nats.

    With d = logp - ref_logp: k1 = d; k2 = d^2 / 2; k3 = e^(-d) - 1 + d; low_var_kl is k3 with -d
    clamped to +-20 and the result to +-10.

    Args:
        logp_T: log-probability of each sampled token under the policy.
        ref_logp_T: the same under the reference.
        kind: which estimator.
        ratio_T: importance ratio pi / pi_old; multiplies the estimate (before the last clamp of
            low_var_kl), so that its expectation is right for samples of an older policy.

    Raises:
        ValueError: `kind` is none of the four.
    """
    d_T = logp_T - ref_logp_T
    if kind == "k1":
        kl_T = d_T
    elif kind == "k2":
        kl_T = d_T.square() / 2
    elif kind == "k3":
        kl_T = torch.expm1(-d_T) + d_T
    elif kind == "low_var_kl":
        d_T = d_T.clamp(-20.0, 20.0)
        kl_T = torch.expm1(-d_T) + d_T
    else:
        raise ValueError(f"kl kind {kind!r} is none of k1, k2, k3, low_var_kl")
    if ratio_T is not None:
        kl_T = ratio_T * kl_T
    return kl_T.clamp(-10.0, 10.0) if kind == "low_var_kl" else kl_T
