"""Rows for a router that is not trained: from embeddings, from hidden states, by ridge regression.

x_t (D,) is what the router of one layer sees of token t; e runs over the experts whose texts are
given, T_e are the tokens of e's, N_e their number.

    domain embedding        d_e = mean over documents i of e of embedder(i)
    rows of embeddings      g_e = d_e, in every layer

    weight of a token       w_t = 1 / N_e;   of prompts: 1 / (prompts of e * tokens of t's prompt)
    rows of hidden states   u_e = sum over t in T_e of w_t x_t,   v = mean of u_e over e
                            c_e = u_e - v,   a_e = c_e - v (c_e . v) / (v . v),   g_e = a_e / s
                            s^2 = mean over e, e' of sum over t in T_e' of w_t (a_e . x_t)^2

The sum of a_e over e is 0, so the logits' mean is 0, and s is their standard deviation.

    statistics              S_e = sum over t in T_e of x_t x_t^T,   b_e = sum over t in T_e of x_t
    rows by ridge           [g'_e] = (S + l I)^-1 [b_e],   S = sum_e S_e,   l = penalty trace(S) / D
                            g_e = g'_e / |g'_e| / temperature

g' is the least of sum over e, t in T_e of |G' x_t - onehot_e|^2 + l |G'|^2.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def domain_embedding(embeddings: Tensor) -> Tensor:
    """d (m,) of documents' embeddings (n, m)."""
    return embeddings.mean(0)


def hidden_rows(texts: Sequence[Sequence[Tensor]], by_prompt: bool = False) -> Tensor:
    """Rows (E, D) from, for each expert, the x (n, D) of its documents."""
    means, moments = [], []
    for own in texts:
        total, moment = 0.0, 0.0
        for x_nD in own:
            tokens = len(own) * len(x_nD) if by_prompt else sum(map(len, own))
            total = total + x_nD.sum(0) / tokens
            moment = moment + x_nD.T @ x_nD / tokens
        means.append(total)
        moments.append(moment)
    u_ED = torch.stack(means)
    v_D = u_ED.mean(0)
    c_ED = u_ED - v_D
    a_ED = c_ED - torch.outer(c_ED @ v_D / (v_D @ v_D), v_D)
    squares = [a_D @ moment @ a_D for a_D in a_ED for moment in moments]
    return a_ED / torch.stack(squares).mean().sqrt()


def ridge_statistics(x_TD: Tensor) -> tuple[Tensor, Tensor]:
    """S (D, D) and b (D,) of an owner's tokens."""
    return x_TD.T @ x_TD, x_TD.sum(0)


def ridge_rows(
    grams: Sequence[Tensor], totals: Sequence[Tensor], penalty: float, temperature: float
) -> Tensor:
    """Rows (E, D) from each expert's S and b."""
    S_DD, b_DE = torch.stack(list(grams)).sum(0), torch.stack(list(totals), 1)
    strength = penalty * S_DD.trace() / len(S_DD)
    g_ED = torch.linalg.solve(S_DD + strength * torch.eye(len(S_DD)).to(S_DD), b_DE).T
    return g_ED / g_ED.norm(dim=1, keepdim=True) / temperature
