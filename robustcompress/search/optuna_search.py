"""Optuna's tree-structured Parzen estimator as a searcher; the extra `search` installs it."""

from __future__ import annotations

import warnings
from typing import Any

from robustcompress.errors import InputError
from robustcompress.search.choices import at_least, checked
from robustcompress.search.domain import Config, Coordinate, Domain


class OptunaSearch:
    """Multivariate TPE (Bergstra et al. 2011) on the numbers of the options, as Optuna has it.

    A new sampler is seeded for every proposal, by its number: all that a proposal depends on is the seed and what was
    told, so that the state is the list of trials, and a search goes on exactly by being told them again.

    Args:
        domain: What there is to choose.
        seed: Of its draws.
        startup: How many first proposals are random.

    Raises:
        InputError: Optuna is not installed.
    """

    def __init__(self, domain: Domain, seed: int, *, startup: int = 10) -> None:
        at_least("OptunaSearch cannot start", 0, startup=startup)
        try:
            import optuna
        except ImportError as error:
            raise InputError(
                "the searcher 'optuna' needs Optuna: pip install 'robustcompress[search]', or take 'evolution'"
            ) from error
        self.domain = domain
        self.seed = seed
        self.startup = startup
        self._optuna: Any = optuna
        self._trials: list[tuple[Config, float | None]] = []
        self._study = self._new_study()

    def ask(self) -> Config:
        """A draw where the better ones are dense and the others are not."""
        number = len(self._trials)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", self._optuna.exceptions.ExperimentalWarning)
            self._study.sampler = self._optuna.samplers.TPESampler(
                multivariate=True,
                constant_liar=True,
                n_startup_trials=self.startup,
                seed=(1_000_003 * self.seed + number) % 2**32,
            )
            trial = self._study.ask(self._space())
        config = tuple(trial.params[str(place)] for place in range(len(self.domain.sizes)))
        self._trials.append((config, None))
        return config

    def tell(self, config: Config, reward: float) -> None:
        """Tell the oldest open trial of this configuration, or add one."""
        config, reward = checked(self.domain, config, reward)
        if (config, None) in self._trials:
            number = self._trials.index((config, None))
            self._trials[number] = (config, reward)
            self._study.tell(number, reward)
        else:
            self._trials.append((config, reward))
            self._add(config, reward)

    def state_dict(self) -> dict[str, Any]:
        """All trials, with None for the reward of those in flight."""
        return {"trials": [[list(config), reward] for config, reward in self._trials]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Begin anew, and tell all trials again."""
        self._trials = [(tuple(config), reward) for config, reward in state["trials"]]
        self._study = self._new_study()
        for config, reward in self._trials:
            self._add(config, reward)

    def _new_study(self) -> Any:
        logging = self._optuna.logging
        verbosity = logging.get_verbosity()
        logging.set_verbosity(logging.WARNING)  # it announces every study; the setting is the program's, not ours
        try:
            return self._optuna.create_study(direction="maximize")
        finally:
            logging.set_verbosity(verbosity)

    def _space(self) -> dict[str, Any]:
        known = self._optuna.distributions

        def options(coordinate: Coordinate) -> Any:
            count = len(coordinate.options)
            if coordinate.kind == "block":  # types have no order
                return known.CategoricalDistribution(tuple(range(count)))
            return known.IntDistribution(0, count - 1)

        return {str(place): options(coordinate) for place, coordinate in enumerate(self.domain.coordinates)}

    def _add(self, config: Config, reward: float | None) -> None:
        state = self._optuna.trial.TrialState
        self._study.add_trial(
            self._optuna.trial.create_trial(
                state=state.RUNNING if reward is None else state.COMPLETE,
                params={str(place): option for place, option in enumerate(config)},
                distributions=self._space(),
                value=reward,
            )
        )
