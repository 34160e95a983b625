"""stub for the time being."""

import torch


class RandomSearch:
    def __init__(self, domain, seed, **k):
        self.d = domain
        self.g = torch.Generator().manual_seed(seed)

    def ask(self):
        return tuple(int(torch.randint(n, (), generator=self.g)) for n in self.d.sizes)

    def tell(self, c, r):
        pass

    def state_dict(self):
        return {"g": self.g.get_state()}

    def load_state_dict(self, s):
        self.g.set_state(s["g"])


SEARCHERS = {"random": RandomSearch, "reinforce": RandomSearch}


def make_searcher(name, domain, seed, **k):
    return SEARCHERS[name](domain, seed, **k)
