"""Trees of drafted tokens: how they are laid out, and which path through them is accepted.

A request has n nodes, numbered from 0; node 0 is the last token that was accepted, and a node comes
after its parent. `retrieve_next_token` has each node's first child, `retrieve_next_sibling` the
next child of its parent; -1 where there is none. B is the number of requests.
"""

from __future__ import annotations

import torch

QLEN_ONLY = 1
"""SGLang's number for masks of n by n, which leave out what every node sees."""


def build_tree_kernel_efficient_cpu(
    parent_list: torch.Tensor,
    selected_index: torch.Tensor,
    seq_lens: torch.Tensor,
    tree_mask: torch.Tensor,
    positions: torch.Tensor,
    retrieve_index: torch.Tensor,
    retrieve_next_token: torch.Tensor,
    retrieve_next_sibling: torch.Tensor,
    topk: int,
    depth: int,
    draft_token_num: int,
    tree_mask_mode: int,
) -> None:
    """Lay out the candidates that were kept.

    Args:
        parent_list: which candidate each group of `topk` further ones came from, (B, groups).
        selected_index: numbers of the kept candidates, ascending, (B, n - 1).
        seq_lens: tokens of each request before its node 0, (B,).
        tree_mask: whether a row's node sees a column's, (B * n * n); written.
        positions: of each node in its request, (B * n); written.
        retrieve_index: number of each node in the batch, (B, n); written.
        retrieve_next_token: written.
        retrieve_next_sibling: written.
        topk: candidates of a group.
        depth: most tokens below node 0.
        draft_token_num: n.
        tree_mask_mode: SGLang's number of the mask's form.

    Raises:
        RuntimeError: the form is not `QLEN_ONLY`.
    """
    if tree_mask_mode != QLEN_ONLY:
        raise RuntimeError(f"the CPU's tree mask is {QLEN_ONLY}, not {tree_mask_mode}")
    parents = []
    for selected, groups in zip(selected_index.tolist(), parent_list.tolist(), strict=True):
        node_of = {candidate: node for node, candidate in enumerate(selected, 1)}
        parents.append([node_of[groups[i // topk]] if i >= topk else 0 for i in selected])
    _lay_out(parents, draft_token_num, seq_lens, positions, retrieve_index)
    _link(parents, retrieve_next_token, retrieve_next_sibling)
    tree_mask.copy_(_ancestors(parents, draft_token_num).flatten())


def reconstruct_indices_from_tree_mask(
    tree_mask: torch.Tensor,
    seq_lens: torch.Tensor,
    positions: torch.Tensor,
    retrieve_index: torch.Tensor,
    retrieve_next_token: torch.Tensor,
    retrieve_next_sibling: torch.Tensor,
    batch_size: int,
    draft_token_num: int,
) -> None:
    """Lay out trees that are given by their masks; arguments as above."""
    n = draft_token_num
    mask = tree_mask[: batch_size * n * n].view(batch_size, n, n).bool()
    above = mask & ~torch.eye(n, dtype=torch.bool)
    # Of the nodes that a node sees, all on one path, its parent is the last.
    parents = (above * torch.arange(n)).amax(-1)[:, 1:].tolist()
    _lay_out(parents, n, seq_lens, positions, retrieve_index)
    _link(parents, retrieve_next_token, retrieve_next_sibling)


def _lay_out(
    parents: list[list[int]],
    n: int,
    seq_lens: torch.Tensor,
    positions: torch.Tensor,
    retrieve_index: torch.Tensor,
) -> None:
    depths = [[0] * n for _ in parents]
    for row, of_nodes in zip(depths, parents, strict=True):
        for node, parent in enumerate(of_nodes, 1):
            row[node] = row[parent] + 1
    places = seq_lens[:, None] + torch.tensor(depths).view(-1, n)
    positions.copy_(places.flatten())
    retrieve_index.copy_(torch.arange(places.numel()).view(-1, n))


def _link(
    parents: list[list[int]], retrieve_next_token: torch.Tensor, retrieve_next_sibling: torch.Tensor
) -> None:
    """First child and next sibling of each node, children in ascending order."""
    children, siblings = [], []
    for of_nodes in parents:
        child, sibling = [-1] * (len(of_nodes) + 1), [-1] * (len(of_nodes) + 1)
        for node in range(len(of_nodes), 0, -1):
            parent = of_nodes[node - 1]
            sibling[node], child[parent] = child[parent], node
        children.append(child)
        siblings.append(sibling)
    retrieve_next_token.copy_(torch.tensor(children))
    retrieve_next_sibling.copy_(torch.tensor(siblings))


def _ancestors(parents: list[list[int]], n: int) -> torch.Tensor:
    """Whether a node sees another: itself and those on its path, (B, n, n)."""
    mask = torch.eye(n, dtype=torch.bool).repeat(len(parents), 1, 1)
    for own, of_nodes in zip(mask, parents, strict=True):
        for node, parent in enumerate(of_nodes, 1):
            own[node] |= own[parent]
    return mask


def verify_tree_greedy_cpu(
    predicts: torch.Tensor,
    accept_index: torch.Tensor,
    accept_token_num: torch.Tensor,
    candidates: torch.Tensor,
    retrive_index: torch.Tensor,
    retrive_next_token: torch.Tensor,
    retrive_next_sibling: torch.Tensor,
    target_predict: torch.Tensor,
) -> None:
    """Walk down from node 0 as long as a child is the token that the target has after its parent.

    SGLang names three arguments so.

    Args:
        predicts: the target's token after each node that was reached, (B * n); written.
        accept_index: numbers of the reached nodes in the batch, (B, longest path); written, -1
            stays past the end.
        accept_token_num: drafted tokens that were accepted, (B,); written.
        candidates: token of each node, (B, n).
        retrive_index: number of each node in the batch, (B, n).
        retrive_next_token: as above.
        retrive_next_sibling: as above.
        target_predict: the target's token after each node, (B, n).
    """
    n, longest = candidates.shape[1], accept_index.shape[1]
    if bool((retrive_next_sibling < 0).all()) and longest == n:  # chains: no loop over requests
        fits = candidates[:, 1:] == target_predict.view(-1, n)[:, :-1]
        accepted = fits.long().cumprod(1).sum(1)
        reached = torch.arange(n) <= accepted[:, None]
        accept_index.copy_(retrive_index.masked_fill(~reached, -1))
        accept_token_num.copy_(accepted)
        predicts.copy_(target_predict.flatten().where(reached.flatten(), predicts))
        return
    tables = (candidates, retrive_next_token, retrive_next_sibling, target_predict.view(-1, n))
    for b, (tokens, child, sibling, wanted) in enumerate(
        zip(*(table.tolist() for table in tables), strict=True)
    ):
        path = [0]
        while len(path) < longest:
            node = child[path[-1]]
            while node >= 0 and tokens[node] != wanted[path[-1]]:
                node = sibling[node]
            if node < 0:
                break
            path.append(node)
        accept_index[b, : len(path)] = retrive_index[b, path].to(accept_index.dtype)
        accept_token_num[b] = len(path) - 1
        for node in path:
            predicts[b * n + node] = wanted[node]


def fill_bonus_tokens_cpu(
    accept_tokens: torch.Tensor,
    accept_lens: torch.Tensor,
    bonus_tokens: torch.Tensor,
    accept_stride: int,
) -> None:
    """Take the last accepted token of each request into `bonus_tokens`, (B,)."""
    last = torch.arange(len(accept_lens)) * accept_stride + accept_lens.long() - 1
    bonus_tokens.copy_(accept_tokens.flatten()[last])


def fill_accept_out_cache_loc_cpu(
    accept_index: torch.Tensor, out_cache_loc: torch.Tensor, accept_out_cache_loc: torch.Tensor
) -> None:
    """Take the cache slots of accepted nodes, one after the other; the rest stays as it is."""
    kept = accept_index.flatten()
    kept = kept[kept >= 0].long()
    accept_out_cache_loc[: len(kept)] = out_cache_loc[kept].to(accept_out_cache_loc.dtype)
