"""RC-NAS's searcher: REINFORCE on the policy over stages, with an answer to its stalling."""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch

from robustcompress.errors import Problems, nearest
from robustcompress.search.choices import at_least, checked, draw, mutated, seeded
from robustcompress.search.domain import Config, Domain
from robustcompress.search.gradient import Baseline, loss
from robustcompress.search.policy import Policy

Stall = Literal["mutate", "restart", "none"]

ELITE = 5
"""How many of the best compete to be mutated when the policy stalls."""

_FLATTER = 0.25
"""What a restart leaves of the logits."""

LR = 3e-2
TUNING_LR = 1e-2

_TRIES = 50


class Reinforce:
    """Samples from a policy and follows the gradient of the reward, a few rewards at a time.

    The vanilla policy gradient with a moving average as the baseline, advantages over the spread of the rewards of one
    update, an entropy bonus, and Adam (for RC-NAS: "VPG"; the settings are ours). An update follows `update_every` of
    its own proposals that are told, in whatever order; how many were asked for at once (`RCNAS.batch`) is no matter of
    it. A proposal that was made before counts for learning as well.

    A policy that has settled proposes little but what it has proposed already. When that is so for half of the last
    `4 * update_every` samples, it has stalled:
      mutate   what it samples and has proposed before teaches it at once by the reward that is known, and in its place
               one of the `ELITE` best is mutated until it is something new
      restart  the logits are made flat again (a quarter of them is left), and Adam forgets
      none     goes on

    Args:
        domain: What there is to choose.
        seed: Of the first weights and of all draws.
        policy: Weights to start from, such as a meta-trained policy's; copied. By default new ones, uniform.
        update_every: Rewards to an update of the policy.
        lr: Of Adam; by default `LR` for new weights and `TUNING_LR` for given ones, which a large step would undo.
        entropy: Weight of the entropy bonus.
        baseline: Weight of the past in the moving average.
        stall: What to do when it stalls.
        warm_entropy: With a policy given: weight of the entropy bonus at its first update, falling to `entropy` over
            `warm_updates`, so that what it knows is doubted briefly.
        warm_updates: See there.
    """

    def __init__(
        self,
        domain: Domain,
        seed: int,
        *,
        policy: Policy | None = None,
        update_every: int = 5,
        lr: float | None = None,
        entropy: float = 0.02,
        baseline: float = 0.9,
        stall: Stall = "mutate",
        warm_entropy: float = 0.1,
        warm_updates: int = 4,
    ) -> None:
        if lr is None:
            lr = LR if policy is None else TUNING_LR
        at_least("Reinforce cannot start", 1, update_every=update_every)
        at_least(
            "Reinforce cannot start", 0, lr=lr, entropy=entropy, warm_entropy=warm_entropy, warm_updates=warm_updates
        )
        problems = Problems("Reinforce cannot start")
        if stall not in get_args(Stall):
            problems.add(f"stall={stall!r} is unknown{nearest(str(stall), get_args(Stall))}")
        if not 0 <= baseline < 1:
            problems.add(f"baseline={baseline}: must be in [0, 1)")
        problems.raise_if_any()
        self.domain = domain
        self.policy = Policy(seed=seed) if policy is None else copy.deepcopy(policy)
        self.update_every = update_every
        self.entropy = entropy
        self.stall = stall
        self.warm_entropy = entropy if policy is None else max(entropy, warm_entropy)
        self.warm_updates = warm_updates
        self.stalls = 0
        self._optimizer = torch.optim.Adam(self.policy.parameters(), lr=lr)
        self._generator = seeded(seed)
        self._baseline = Baseline(baseline)
        self._updates = 0
        self._asked = 0
        self._pending: list[tuple[int, Config]] = []
        self._told: list[tuple[int, Config, float]] = []
        self._proposed: set[Config] = set()
        self._rewards: dict[Config, float] = {}
        self._repeats: deque[bool] = deque(maxlen=4 * update_every)
        self._logs: list[torch.Tensor] | None = None

    def ask(self) -> Config:
        """A choice drawn from the policy; when that has stalled, as `stall` says."""
        config = self._sample()
        repeat = config in self._proposed
        self._repeats.append(repeat)
        if self.stall != "none" and self._stalled():
            if self.stall == "restart":
                self._restart()
                config = self._sample()
            elif repeat:
                return self._propose(self._instead_of(config))
        self._asked += 1
        self._pending.append((self._asked, config))
        return self._propose(config)

    def tell(self, config: Config, reward: float) -> None:
        """Learn from rewards once there are enough of them; of what it did not sample it only notes how good it is."""
        config, reward = checked(self.domain, config, reward)
        self._rewards[config] = reward
        for place, (number, waiting) in enumerate(self._pending):
            if waiting == config:
                del self._pending[place]
                self._learn(number, config, reward)
                return

    def state_dict(self) -> dict[str, Any]:
        """Policy, optimizer, generator, baseline, and all that was proposed and told."""
        state: dict[str, Any] = {f"policy/{name}": value.clone() for name, value in self.policy.state_dict().items()}
        for number, parameter in enumerate(self.policy.parameters()):
            for name, value in self._optimizer.state.get(parameter, {}).items():
                state[f"optimizer/{number}/{name}"] = value.clone()
        return state | {
            "generator": self._generator.get_state(),
            "baseline": self._baseline.value,
            "updates": self._updates,
            "asked": self._asked,
            "stalls": self.stalls,
            "pending": [[number, list(config)] for number, config in self._pending],
            "told": [[number, list(config), reward] for number, config, reward in self._told],
            "proposed": [list(config) for config in sorted(self._proposed)],
            "rewards": [[list(config), reward] for config, reward in self._rewards.items()],
            "repeats": list(self._repeats),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state, which a searcher of the same settings gave."""
        weights = {name.removeprefix("policy/"): value for name, value in state.items() if name.startswith("policy/")}
        self.policy.take(weights)
        parameters = list(self.policy.parameters())
        self._optimizer.state.clear()
        for key, value in state.items():
            if key.startswith("optimizer/"):
                _, number, name = key.split("/")
                self._optimizer.state[parameters[int(number)]][name] = value.clone()
        self._generator.set_state(state["generator"])
        self._baseline.value = state["baseline"]
        self._updates, self._asked, self.stalls = state["updates"], state["asked"], state["stalls"]
        self._pending = [(number, tuple(config)) for number, config in state["pending"]]
        self._told = [(number, tuple(config), reward) for number, config, reward in state["told"]]
        self._proposed = {tuple(config) for config in state["proposed"]}
        self._rewards = {tuple(config): reward for config, reward in state["rewards"]}
        self._repeats.clear()
        self._repeats.extend(state["repeats"])
        self._logs = None

    @torch.no_grad()
    def _sample(self) -> Config:
        if self._logs is None:  # the same until the next update
            self._logs = self.policy(self.domain)
        return tuple(int(torch.multinomial(log.exp(), 1, generator=self._generator)) for log in self._logs)

    def _propose(self, config: Config) -> Config:
        self._proposed.add(config)
        return config

    def _stalled(self) -> bool:
        full = len(self._repeats) == self._repeats.maxlen
        return full and 2 * sum(self._repeats) >= len(self._repeats)

    def _instead_of(self, config: Config) -> Config:
        """Something new near the best; what was sampled is learned from at once, where its reward is known."""
        self.stalls += 1
        if config in self._rewards:
            self._asked += 1
            self._learn(self._asked, config, self._rewards[config])
        one_each = {
            reward: told for told, reward in self._rewards.items()
        }  # equal rewards: as good as the same network
        best = [one_each[reward] for reward in sorted(one_each, reverse=True)[:ELITE]]
        if best:
            config = best[draw(self._generator, len(best))]
        for _ in range(_TRIES):  # a walk, so that it leaves a neighbourhood that is used up
            config = mutated(self.domain, config, self._generator)
            if config not in self._proposed and config not in self._rewards:
                break
        return config

    def _restart(self) -> None:
        self.stalls += 1
        with torch.no_grad():
            for head in self.policy.heads:
                for parameter in head.parameters():
                    parameter.mul_(_FLATTER)
        self._optimizer.state.clear()
        self._repeats.clear()
        self._logs = None

    def _learn(self, number: int, config: Config, reward: float) -> None:
        self._told.append((number, config, reward))
        if len(self._told) == self.update_every:
            told, self._told = sorted(self._told), []
            self._update([config for _, config, _ in told], [reward for _, _, reward in told])

    def _update(self, configs: Sequence[Config], rewards: Sequence[float]) -> None:
        warmth = max(0.0, 1 - self._updates / self.warm_updates) if self.warm_updates else 0.0
        entropy = self.entropy + warmth * (self.warm_entropy - self.entropy)
        self._optimizer.zero_grad()
        advantages = self._baseline.advantages(rewards)
        torch.autograd.backward(loss(self.policy, self.domain, configs, advantages, entropy))
        self._optimizer.step()
        self._updates += 1
        self._logs = None
