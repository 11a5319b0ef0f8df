"""Sampling as requests may want it: steered first, with log-probabilities, and with how a token was chosen."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from scheduler.core.drawing import SamplingRow, Truncation, narrowed, uniform
from scheduler.core.sampling import Sampling
from scheduler.core.step import Choice, SampledToken, TokenLogprobs
from scheduler.execution.logits import NUM_CANDIDATES, LogitScans, TorchScans, are_all
from scheduler.execution.steering import SteeredStep


@torch.inference_mode()
def sample(
    logits: torch.Tensor,
    rows: Sequence[SamplingRow],
    scans: LogitScans = TorchScans(),  # noqa: B008 (it has no state)
    steered: SteeredStep | None = None,
) -> list[SampledToken | None]:
    """Choose one token for each row of `logits`, [len(rows), vocabulary] in any float type, steered first and in
    place. None for a row whose logits are not numbers, or where all are minus infinity."""
    logits = logits.float()
    reported = [i for i, row in enumerate(rows) if row.params.logprobs is not None]
    raw = _rows_of(logits, reported)
    if steered is not None:
        raw = raw.clone() if raw is logits else raw
        scans.steer(logits, steered.rows)
        for row, processor, tokens_so_far in steered.processed:
            logits[row] = processor(tokens_so_far, logits[row])
    best, tokens = scans.best(logits)
    random = [i for i, row in enumerate(rows) if not row.params.is_greedy]
    if random:
        tokens[random] = _draw(_rows_of(logits, random), [rows[i] for i in random], scans)
    # The maximum is NaN where any logit is, so one look at the maxima finds every broken row. Both come to the
    # host together: on a GPU each transfer is a wait.
    ids, broken = torch.stack([tokens, (~torch.isfinite(best)).long()]).tolist()
    counts = [rows[i].params.logprobs or 0 for i in reported]
    found = iter(logprobs(raw, tokens[reported], counts, scans) if reported else [])
    of_rows = {i: next(found) for i in reported}
    explained = {
        i: choice_of(logits[i : i + 1], ids[i], row, scans)
        for i, row in enumerate(rows)
        if row.params.explain and not broken[i]
    }
    return [
        None if broken[i] else SampledToken(ids[i], of_rows.get(i), explained.get(i)) for i in range(len(rows))
    ]


def choice_of(logits: torch.Tensor, token_id: int, row: SamplingRow, scans: LogitScans) -> Choice:
    """How a token came to be chosen from one row of steered logits, [1, vocabulary]. Candidates lie side by side
    as they did when the number was drawn: in the vocabulary's order, or where truncation narrowed them the
    likeliest first."""
    params = row.params
    temperature = 1.0 if params.is_greedy else params.temperature
    temperatures = torch.tensor([temperature], dtype=torch.float32, device=logits.device)
    log_total = scans.log_total(logits, temperatures)
    if params.is_greedy:
        return Choice(1, float((logits[0, token_id] - log_total[0]).exp()), 0.0, None)
    if row.is_truncated:
        weights, ids = _candidates(logits, params, temperatures, log_total, scans)
        place = int(torch.nonzero(ids == token_id))
    else:
        weights = ((logits[0] / temperature).double() - log_total.double()).exp()
        place = token_id
    total = float(weights.sum())
    low = float(weights[:place].sum()) / total
    number = float(uniform([row])[0])
    return Choice(int((weights > 0).sum()), float(weights[place]) / total, low, number)


def _candidates(
    logits: torch.Tensor,
    params: Sampling,
    temperatures: torch.Tensor,
    log_total: torch.Tensor,
    scans: LogitScans,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The probabilities of one row's likeliest tokens as truncation leaves them, and the tokens. The whole
    vocabulary is sorted only if a few of them are not all."""
    vocabulary = logits.shape[1]
    truncation = Truncation.of([params], logits.device)
    for count in (min(NUM_CANDIDATES, vocabulary), vocabulary):
        values, ids = scans.top(logits, count)
        weights = narrowed(values / temperatures, log_total, truncation, vocabulary)
        if are_all(weights, truncation, vocabulary)[0]:
            break
    return weights[0], ids[0]


def _rows_of(logits: torch.Tensor, chosen: list[int]) -> torch.Tensor:
    """Some rows; the whole tensor, not a copy, if all are chosen."""
    return logits if len(chosen) == len(logits) else logits[chosen]


def _draw(logits: torch.Tensor, rows: Sequence[SamplingRow], scans: LogitScans) -> torch.Tensor:
    """Sample each row with its own temperature and truncation; returns [len(rows)] int64."""
    device = logits.device
    temperatures = torch.tensor([row.params.temperature for row in rows], dtype=torch.float32, device=device)
    numbers = torch.from_numpy(uniform(rows)).to(device)
    whole = [i for i, row in enumerate(rows) if not row.is_truncated]
    cut = [i for i, row in enumerate(rows) if row.is_truncated]
    tokens = torch.empty(len(rows), dtype=torch.int64, device=device)
    if whole:
        tokens[whole] = scans.draw(_rows_of(logits, whole), temperatures[whole], numbers[whole])
    if cut:
        truncation = Truncation.of([rows[i].params for i in cut], device)
        tokens[cut] = scans.draw_truncated(_rows_of(logits, cut), temperatures[cut], numbers[cut], truncation)
    return tokens


def logprobs(
    logits: torch.Tensor, tokens: torch.Tensor, counts: Sequence[int], scans: LogitScans, *, ranked: bool = False
) -> list[TokenLogprobs]:
    """The log-probabilities of each row's token and of as many likeliest ones as `counts` says, before steering,
    temperature and truncation. Logits [rows, vocabulary], tokens [rows]. `ranked`: with the tokens' ranks."""
    logits = logits.float()
    log_total = scans.log_total(logits, torch.ones(len(logits), device=logits.device)).unsqueeze(1)
    chosen = logits.gather(1, tokens.unsqueeze(1))
    of_tokens = (chosen - log_total).squeeze(1).tolist()
    ranks = (logits >= chosen).sum(dim=1).tolist() if ranked else [0] * len(logits)
    values, top_tokens = scans.top(logits, min(max(1, *counts), logits.shape[1]))
    top_values, top_ids = (values - log_total).tolist(), top_tokens.tolist()
    return [
        TokenLogprobs(token, logprob, list(zip(ids[:count], top[:count], strict=True)), rank)
        for token, logprob, rank, ids, top, count in zip(
            tokens.tolist(), of_tokens, ranks, top_ids, top_values, counts, strict=True
        )
    ]
