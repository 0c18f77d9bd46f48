"""Which tokens of a live sequence are dropped, or not read, above a budget: as text and as a plan.

::

    none                                   nothing is dropped
    window:budget=512,sink=4               the first tokens and the newest (StreamingLLM)
    knorm:budget=512,recent=10%            keys of the smallest norm, and the newest tokens
    snapkv:budget=512,window=32,kernel=7   what the newest queries of the prompt look at (SnapKV)
    h2o:budget=25%,recent=50%              what all queries have looked at most, and the newest
    quest:budget=1024,dense=2              drops nothing; reads pages whose keys can matter (Quest)
    lsh:budget=1024,bits=64,dense=2        the same by signatures of keys (SimHash)

Budgets are in tokens or a share of the prompt, ``recent`` in tokens or a share of the budget.
"""

import re
from dataclasses import dataclass
from fractions import Fraction

from quire.errors import ConfigError, did_you_mean

__all__ = ["NO_EVICTION", "Amount", "EvictChoice", "parse_eviction"]

NO_EVICTION = "none"

Amount = int | Fraction  # tokens, or a share of something

# Beside budget: each policy's options and what they are if not given.
_OPTIONS: dict[str, dict[str, Amount]] = {
    "window": {"sink": 4},
    "knorm": {"recent": Fraction(1, 10)},
    "snapkv": {"window": 32, "kernel": 7},
    "h2o": {"recent": Fraction(1, 2)},
    "quest": {"dense": 2},
    "lsh": {"bits": 64, "dense": 2},
}
_READING = ("quest", "lsh")
WORD = 64  # bits of a signature come in words of so many
MOST_BITS = 512
_EXAMPLE = "such as 'window:budget=512,sink=4' or 'snapkv:budget=25%'"


@dataclass(frozen=True)
class EvictChoice:
    """What a text such as ``"window:budget=512,sink=4"`` says.

    policy   ``window``, ``knorm``, ``snapkv`` or ``h2o``; ``quest`` or ``lsh``
    budget   tokens that a sequence keeps (quest, lsh: that a step reads), or their share of the
             prompt
    sink     first tokens that are always kept (window)
    window   newest queries that vote (snapkv); their tokens are always kept
    kernel   neighbours that share a vote (snapkv), odd
    recent   newest tokens that are always kept, or their share of the budget (knorm, h2o)
    bits     of a key's signature (lsh)
    dense    first layers that are read whole (quest, lsh)
    """

    policy: str
    budget: Amount
    sink: int = 0
    window: int = 0
    kernel: int = 1
    recent: Amount = 0
    bits: int = 0
    dense: int = 0

    def __str__(self) -> str:
        options = {"budget": self.budget} | {k: getattr(self, k) for k in _OPTIONS[self.policy]}
        return f"{self.policy}:" + ",".join(f"{k}={_text(v)}" for k, v in options.items())

    def tokens(self, prompt: int) -> int:
        """The budget of a sequence whose prompt has ``prompt`` tokens, in tokens.

        A share is rounded up, to no less than the policy can do with.
        """
        if isinstance(self.budget, int):
            return self.budget
        return max(_up(self.budget * prompt), self.least)

    def recent_of(self, budget: int) -> int:
        """Newest tokens that are always kept of ``budget``; at least one."""
        if self.policy == "snapkv":
            return self.window
        recent = self.recent if isinstance(self.recent, int) else _up(self.recent * budget)
        return max(1, min(recent, budget - 1))

    @property
    def least(self) -> int:
        """The smallest budget that leaves a token to choose."""
        fixed = self.recent if isinstance(self.recent, int) else 1
        return 1 + max(self.sink, self.window, fixed, 1)

    @property
    def drops(self) -> bool:
        """True if tokens above the budget are dropped, False if they stay and are not read."""
        return self.policy not in _READING

    @property
    def watches_all(self) -> bool:
        """True if every query counts from the first on, so that none may be skipped."""
        return self.policy == "h2o"


def parse_eviction(text: object) -> EvictChoice | None:
    """What ``text`` says; None for ``"none"``. Raises ConfigError for what it cannot mean."""
    if not isinstance(text, str):
        raise ConfigError(f"an eviction policy must be text {_EXAMPLE}, not {text!r}")
    if text == NO_EVICTION:
        return None
    policy, _, rest = text.partition(":")
    if policy not in _OPTIONS:
        near = did_you_mean(policy, [NO_EVICTION, *_OPTIONS])
        raise ConfigError(
            f"unknown eviction policy {policy!r}{near} (policies: none, {', '.join(_OPTIONS)}; "
            f"{_EXAMPLE})"
        )
    given = _given(text, policy, rest)
    if "budget" not in given:
        raise ConfigError(f"eviction {text!r} has no budget; write {policy}:budget=512 or =25%")
    choice = EvictChoice(policy, **{**_OPTIONS[policy], **given})  # type: ignore[arg-type]
    if choice.kernel % 2 == 0:
        raise ConfigError(f"eviction {text!r}: kernel must be odd, to have a middle")
    if choice.bits % WORD or choice.bits > MOST_BITS:
        raise ConfigError(
            f"eviction {text!r}: bits must be a multiple of {WORD}, at most {MOST_BITS}"
        )
    if isinstance(choice.budget, int) and choice.budget < choice.least:
        raise ConfigError(
            f"eviction {text!r}: a budget of {choice.budget} tokens leaves none to choose; give at "
            f"least {choice.least}"
        )
    return choice


def _given(text: str, policy: str, rest: str) -> dict[str, Amount]:
    known = ["budget", *_OPTIONS[policy]]
    given: dict[str, Amount] = {}
    for part in rest.split(",") if rest else ():
        name, _, value = (word.strip() for word in part.partition("="))
        if name not in known:
            raise ConfigError(
                f"eviction {text!r}: {policy} has no option {name!r}{did_you_mean(name, known)} "
                f"(options: {', '.join(known)})"
            )
        if name in given:
            raise ConfigError(f"eviction {text!r}: {name} is given twice")
        given[name] = _amount(text, name, value)
    return given


def _amount(text: str, name: str, value: str) -> Amount:
    """Tokens, or a share where one is allowed."""
    if re.fullmatch(r"[0-9]{1,12}", value) and (int(value) > 0 or name in ("sink", "dense")):
        return int(value)
    shares = name in ("budget", "recent")
    if shares and (match := re.fullmatch(r"([0-9]{1,3}(?:\.[0-9]{1,6})?)%", value)):
        share = Fraction(match.group(1)) / 100
        if 0 < share <= 1:
            return share
    kinds = "a number of tokens above 0, or a share such as 25%" if shares else "a whole number"
    raise ConfigError(f"eviction {text!r}: {name} must be {kinds}, not {value!r}")


def _up(number: Fraction) -> int:
    return -(-number.numerator // number.denominator)


def _text(value: Amount) -> str:
    return str(value) if isinstance(value, int) else f"{float(value * 100):g}%"
