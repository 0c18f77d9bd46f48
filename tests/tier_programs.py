"""Programs that tests of the disk tier run in processes of their own, to kill or limit them.

``python tier_programs.py NAME ARGUMENTS...``; each prints what it did, line by line.
"""

import json
import os
import random
import resource
import shutil
import sys
from pathlib import Path

from quire.cache import disk_store
from quire.cache.disk import DiskTier
from quire.cache.disk_contents import open_contents
from quire.cache.disk_file import STORE_NAME
from quire.errors import TierError
from tier_records import chain, payload, record

IDENTITY = {"weights": "0123", "format": "bf16", "model": "tiny"}
SIZES = (500, 20_000, 60_000, 200_000)


def size(number: int) -> int:
    """Bytes of the payload that the page ``number`` has in every program."""
    return SIZES[number % len(SIZES)] + number % 97


def say(*words: object) -> None:
    print(*words, flush=True)


def write(directory: str, budget: str, first: str, count: str) -> None:
    """Put pages for ever, or ``count``, in bursts; print their numbers after each is stored."""
    tier = DiskTier(Path(directory), int(budget), IDENTITY)
    generator = random.Random(first)
    number, end = int(first), int(first) + int(count)
    while number < end:
        burst = range(number, min(number + generator.randrange(1, 9), end))
        stored = tier.usage().stored
        taken = sum(tier.put(record(i), payload(i, size(i))) for i in burst)
        tier.flush()
        if tier.usage().stored - stored == taken == len(burst):
            say(*burst)
        number = burst.stop
    tier.close()
    say("closed", tier.usage().last_drop)


def serve() -> None:
    """Run each line of standard input, JSON ``[FILE, NAME, ARGUMENTS...]``, in a fork of this
    process that prints to FILE. Says which process that is, and with which code it ended.
    """
    for line in sys.stdin:
        file, name, *arguments = json.loads(line)
        fork = os.fork()
        if not fork:
            try:
                os.dup2(os.open(file, os.O_WRONLY), sys.stdout.fileno())
                PROGRAMS[name](*arguments)
            finally:
                os._exit(1)  # nobody waits for the end of a program
        say(fork)
        say(os.waitstatus_to_exitcode(os.waitpid(fork, 0)[1]))


def share(directory: str, budget: str, seed: str, steps: str) -> None:
    """Put, get and discard random pages beside another process; print what was wrong."""
    tier = DiskTier(Path(directory), int(budget), IDENTITY)
    generator = random.Random(seed)
    hits = wrong = 0
    for step in range(int(steps)):
        i = generator.randrange(200)
        verb = generator.randrange(8)
        if step % 20 == 0:
            tier.flush()
        if verb < 4:
            tier.put(record(i), payload(i, size(i)))
        elif verb == 4:
            tier.discard([record(i).key])
        else:
            got = tier.get(record(i))
            hits += got is not None
            wrong += got not in (None, payload(i, size(i)))
    tier.flush()
    usage = tier.usage()
    tier.close()
    say(usage.stored, hits, wrong, usage.damaged, usage.evicted)
    say(usage.off, usage.no_writes)


def fill(directory: str, limit: str) -> None:
    """Put pages while files may not be longer than ``limit``; what is stored is still read."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(limit), int(limit)))
    tier = DiskTier(Path(directory), 64 << 20, IDENTITY)
    stored = []
    for i in range(200):
        if tier.put(record(i), payload(i, size(i))):
            tier.flush()
            stored += [i] if tier.contains([record(i).key]) == [True] else []
    usage = tier.usage()
    same = [i for i in stored if tier.get(record(i)) == payload(i, size(i))]
    tier.discard([record(0).key])
    tier.flush()
    tier.close()
    say(len(stored), len(same), usage.stored, usage.dropped)
    say(usage.no_writes)


def damage(pristine: str, scratch: str, count: str, *offsets: str) -> None:
    """For every offset use a copy of the store with one byte flipped, or cut there."""
    disk_store.SYNCHRONOUS = "OFF"  # nothing is killed here
    whole = Path(pristine, STORE_NAME).read_bytes()
    directory = Path(scratch)
    hits = off = refused = 0
    for offset in map(int, offsets):
        shutil.rmtree(directory, ignore_errors=True)
        directory.mkdir()
        broken = bytearray(whole[:-offset] if offset < 0 else whole)
        if offset >= 0:
            broken[offset] ^= 1 << random.Random(offset).randrange(8)
        (directory / STORE_NAME).write_bytes(broken)
        try:
            with open_contents(directory) as contents:
                contents.identities()
                assert len(list(contents.verify())) < 10_000
        except TierError:
            pass
        try:
            tier = DiskTier(directory, 8 << 20, IDENTITY)
        except TierError:
            refused += 1
            continue
        hits += _use(tier, int(count))
        off += tier.off != "the disk tier was closed"
    say(hits, off, refused)


def _use(tier: DiskTier, count: int) -> int:
    pages = chain(0, count)
    keys = [page.key for page in pages]
    assert len(tier.contains(keys)) == count
    hits = 0
    for again in range(2):
        for i, page in enumerate(pages):
            got = tier.get(page)
            assert got is None or got == payload(i, size(i)), f"page {i} is another"
            hits += got is not None and not again
        for i in range(1000, 1010):
            tier.put(record(i), payload(i, size(i)))
        tier.discard(keys[:3])
        tier.flush()
        tier.usage()
    for i in range(1000, 1010):
        assert tier.get(record(i)) in (None, payload(i, size(i)))
    tier.close()
    return hits


PROGRAMS = {"write": write, "serve": serve, "share": share, "fill": fill, "damage": damage}

if __name__ == "__main__":
    PROGRAMS[sys.argv[1]](*sys.argv[2:])
