"""The two cases of ``bench/peers.py`` in which engines keep prefixes between requests.

    sharedN     N requests at once, 2,048 shared and 64 own tokens each, 16 new each: seconds until
                the last token of all. Cold: nothing of it was seen before. As "warm": the same
                shared tokens again with fresh own ones
    multiturn   a conversation that begins with 1,024 tokens; 64 new, then 256 of the user, five
                times: seconds to the first token of the sixth turn

Replies are an engine's own, so prompts of later turns differ between engines, not in length.
"""

from collections.abc import Callable, Sequence
from typing import Any

Ids = list[list[int]]
Run = Callable[[Ids, int], dict[str, Any]]

SHARED, OWN, SHARED_NEW = 2048, 64, 16
FIRST, USER, REPLY, TURNS = 1024, 256, 64, 6
LAST_PROMPT = FIRST + (TURNS - 1) * (REPLY + USER)

SHARED_IDS = SHARED + 2 * OWN  # random ids wanted for each request: own ones for two runs
MULTITURN_IDS = FIRST + (TURNS - 1) * USER


def require_tokens(times: Sequence[Sequence[float]], sequences: int, new: int) -> None:
    """Raises ValueError if a sequence has another number of tokens than was asked for."""
    counts = {len(sequence) for sequence in times}
    if counts != {new} or len(times) != sequences:
        raise ValueError(f"{sequences} x {new} tokens were asked for, {counts} came")


def shared_prompts(ids: Ids) -> tuple[Ids, Ids]:
    """Prompts of the cold and of the warm run, from ``SHARED_IDS`` random ids a request."""
    common = ids[0][:SHARED]
    own = [(row[SHARED : SHARED + OWN], row[SHARED + OWN : SHARED_IDS]) for row in ids]
    return [common + first for first, _ in own], [common + second for _, second in own]


def run_shared(name: str, ids: Ids, run: Run) -> dict[str, Any]:
    """The answer of the cold run, with the seconds of both as ``rows``."""
    rows, answers = {}, []
    for row, prompts in zip((name, f"{name} warm"), shared_prompts(ids), strict=True):
        answer = run(prompts, SHARED_NEW)
        if "unsupported" in answer:
            return answer
        require_tokens(answer["times"], len(prompts), SHARED_NEW)
        rows[row] = [max(times[-1] for times in answer["times"])]
        answers.append(answer)
    return {**answers[0], "peak": _highest(answers), "rows": rows}


def run_multiturn(name: str, ids: Ids, run: Run) -> dict[str, Any]:
    """The answer of the first turn, with the seconds of the last one as ``rows``."""
    [fresh] = ids
    prompt, answers = fresh[:FIRST], []
    for turn in range(TURNS):
        new = REPLY if turn < TURNS - 1 else 1
        answer = run([prompt], new)
        if "unsupported" in answer:
            return answer
        require_tokens(answer["times"], 1, new)
        answers.append(answer)
        start = FIRST + turn * USER
        prompt = prompt + answer["ids"][0] + fresh[start : start + USER]
    rows = {name: [answers[-1]["times"][0][0]]}
    return {**answers[0], "peak": _highest(answers), "rows": rows}


def _highest(answers: Sequence[dict[str, Any]]) -> int | None:
    return max(answer["peak"] or 0 for answer in answers) or None
