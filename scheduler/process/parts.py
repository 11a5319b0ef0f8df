"""What an engine is put together from, as its config and its model have it."""

from __future__ import annotations

from scheduler.config import EngineConfig
from scheduler.core.seams import Drafter, Pacing
from scheduler.execution.runner import Runner
from scheduler.execution.steering import Steerings
from scheduler.features.context_window import ContextWindow
from scheduler.features.fair import FairShare
from scheduler.features.latency_target import LatencyTarget
from scheduler.features.leftovers import Leftovers
from scheduler.features.prices import Prices
from scheduler.features.sharing_policy import ArrivalOrder, PriorityFirst, SharingPolicy
from scheduler.features.speculation import Speculation
from scheduler.features.step_cost import StepCost
from scheduler.features.text_drafts import TextDrafts
from scheduler.features.turns import Turns
from scheduler.models.loading import Capabilities, LoadedModel


def make_policy(name: str, prices: Prices, leftovers: Leftovers) -> SharingPolicy:
    """The policy that `--policy` names."""
    match name:
        case "fair":
            return FairShare(prices, leftovers=leftovers)
        case "priority":
            return PriorityFirst()
        case "fcfs":
            return ArrivalOrder()
    raise ValueError(f"unknown policy {name!r}")


def pacing_of(config: EngineConfig, cost: StepCost, policy: SharingPolicy) -> Pacing:
    """What bounds a step: a target, or else that of a step that is divided."""
    if config.target_itl_ms is not None:
        return LatencyTarget(cost, config.target_itl_ms / 1000, policy)
    return Turns(cost, config.longest_step_ms / 1000, policy)


def drafter_of(config: EngineConfig, loaded: LoadedModel, cost: StepCost) -> Drafter | None:
    """Who guesses, if anybody does."""
    return Speculation(TextDrafts(cost)) if _looks_back(config, loaded) else None


def _looks_back(config: EngineConfig, loaded: LoadedModel) -> bool:
    """Whether guesses come from the text so far."""
    is_fast = loaded.can.is_native and not loaded.can.keeps_state
    return config.speculative == "ngram" or (config.speculative == "auto" and is_fast)


def window_of(can: Capabilities) -> ContextWindow | None:
    """What sequences look back on that go on beyond it, where the model can."""
    if can.shifted_len is None:
        return None
    # With one block more for the copy of the first.
    num_blocks = min(can.max_model_len // can.block_size, can.num_blocks - 1)
    return ContextWindow(num_blocks * can.block_size, can.block_size, can.shifted_len)


def runner_of(loaded: LoadedModel, num_seats: int) -> Runner:
    """What executes the steps of a model that was loaded here."""
    return Runner(
        loaded.model,
        loaded.cache,
        device=loaded.device,
        num_seats=num_seats,
        max_model_len=loaded.can.max_model_len,
        steerings=Steerings(loaded.can.vocab_size, loaded.can.eos_token_ids),
    )
