"""The method in plain Python loops: slow, and close enough to the formulas to be checked by eye."""

import math


def log_weights(log_ratios, *, mode, gamma=1.0, block_size=1, log_ratio_clip=(-0.08, 0.30)):
    """`g_t` of one sequence, from its loss tokens' raw log-ratios."""
    low, high = log_ratio_clip
    d = [min(max(x, low), high) for x in log_ratios]
    num = len(d)
    result = []
    for t in range(1, num + 1):
        if mode == "sequence":
            result.append(math.fsum(d))
            continue
        size = 1 if mode == "token" else block_size
        e = min(math.ceil(t / size) * size, num)
        result.append((num - e) * math.log(gamma) + math.fsum(d[e:]))
    return result


def weights(log_ratios, *, log_weight_clip=(-10.0, 5.0), **kwargs):
    low, high = log_weight_clip
    return [math.exp(min(max(g, low), high)) for g in log_weights(log_ratios, **kwargs)]


def flat_weights(policy, behavior, sequence_ids, loss_mask, **kwargs):
    """The same for a flat batch, in Python lists; 0 outside the mask."""
    out = [0.0] * len(policy)
    for sequence in sorted({s for s, keep in zip(sequence_ids, loss_mask, strict=True) if keep}):
        at = [i for i, s in enumerate(sequence_ids) if s == sequence and loss_mask[i]]
        for i, w in zip(at, weights([policy[i] - behavior[i] for i in at], **kwargs), strict=True):
            out[i] = w
    return out


def flat_span_log_weights(policy, behavior, sequence_ids, loss_mask, span_ids, *, gamma):
    """`g_t` when only totals over spans are known; 0 outside the mask."""
    out = [0.0] * len(policy)
    kept = [i for i, keep in enumerate(loss_mask) if keep]
    for sequence in sorted({sequence_ids[i] for i in kept}):
        own = [i for i in kept if sequence_ids[i] == sequence]
        spans = [[i for i in own if span_ids[i] == s] for s in sorted({span_ids[i] for i in own})]
        totals = [math.fsum(policy[i] - behavior[i] for i in span) for span in spans]
        d = [
            len(s) * min(max(total / len(s), -0.08), 0.30)
            for s, total in zip(spans, totals, strict=True)
        ]
        for number, span in enumerate(spans):
            num_after = sum(map(len, spans[number + 1 :]))
            for i in span:
                out[i] = num_after * math.log(gamma) + math.fsum(d[number + 1 :])
    return out


def loss(losses, weight, sequence_ids, loss_mask, *, reduction):
    """One reduction of a whole batch, straight from its definition."""
    kept = [i for i, keep in enumerate(loss_mask) if keep]
    sequences = sorted({sequence_ids[i] for i in kept})
    products = {i: weight[i] * losses[i] for i in kept}
    per_sequence = [[products[i] for i in kept if sequence_ids[i] == s] for s in sequences]
    if reduction == "sum":
        return sum(map(sum, per_sequence)) / len(sequences)
    if reduction == "token_mean":
        return sum(products.values()) / len(kept)
    if reduction == "seq_mean":
        return sum(sum(p) / len(p) for p in per_sequence) / len(sequences)
    return sum(products.values()) / sum(weight[i] for i in kept)
