#!/usr/bin/python3
"""A client that records what it sees of the blocks of a volume, and the check of such records.

  tools/registers.py URI [URI …] --record FILE [--number N --of M]

The client writes and reads blocks through the first node that it is given, one request at a time, until its standard input ends; then
it reads them all. With several nodes it goes to the next one when a connection breaks, and repeats there what had no
answer. `tools/partitions` and `tools/survive` run it.

Each block is a register: what every client wrote and read, and when, must be explained by one order in which
every operation takes effect between its beginning and its end. A write that failed may have taken effect at any time after
its beginning, or never. That is decided exactly, block by block, since no content is written twice (Gibbons and Korach,
"Testing Shared Memories", SIAM Journal on Computing, 1997).
"""

import argparse
import json
import random
import struct
import sys
import threading
import time

BLOCK = 4096
BLOCKS = 24
# How long a client waits for an answer before it gives the connection up.
PATIENCE = 45
NEVER = float("inf")


# The check.


class Value:
    """A content of a block: who wrote it when, and who saw it when."""

    def __init__(self, begun, ended):
        self.begun, self.ended, self.reads = begun, ended, []


def check_block(number, operations):
    """What is wrong with a block's history, or None. An operation is (kind, value, begun, ended), ended: infinity if
    nobody knows; value 0 is what was there before."""
    values = {0: Value(-2.0, -1.0)}
    for kind, value, begun, ended in operations:
        if kind == "write":
            values[value] = Value(begun, ended)
    for kind, value, begun, ended in operations:
        if kind != "read":
            continue
        if value not in values:
            return f"block {number}: a read at {begun:.3f} s saw {value:#x}, which nobody wrote"
        if ended < values[value].begun:
            return f"block {number}: {value:#x} was read before it was written"
        values[value].reads.append((begun, ended))
    forward, backward = [], []
    for value, known in values.items():
        if not known.reads and known.ended == NEVER:
            # It may never have happened.
            continue
        first_end = min([known.ended] + [ended for _, ended in known.reads])
        last_begin = max([known.begun] + [begun for begun, _ in known.reads])
        if first_end < last_begin:
            forward.append((first_end, last_begin, value))
        else:
            backward.append((last_begin, first_end, value))
    forward.sort()
    for (begin, end, value), (later, _, other) in zip(forward, forward[1:]):
        if later < end:
            return (f"block {number}: {value:#x} was there from {begin:.3f} to {end:.3f} s and {other:#x} at "
                    f"{later:.3f} s: one of them was read too late")
    for begin, end, value in backward:
        for low, high, other in forward:
            if low < begin and end < high:
                return (f"block {number}: {value:#x} was written or read between {begin:.3f} and {end:.3f} s, while "
                        f"{other:#x} was there before and after")
    return None


def check(history):
    blocks = {}
    for kind, block, value, begun, ended in history:
        blocks.setdefault(block, []).append((kind, value, begun, ended))
    wrong = [check_block(block, operations) for block, operations in sorted(blocks.items())]
    return [what for what in wrong if what]


def self_check():
    good = [("write", 1, 0, 1), ("read", 0, 0, 1), ("read", 1, 0.5, 2), ("write", 2, 2, NEVER), ("read", 1, 3, 4), ("read", 2, 3, 5)]
    assert check_block(0, good) is None
    stale = [("write", 1, 0, 1), ("write", 2, 2, 3), ("read", 2, 4, 5), ("read", 1, 6, 7)]
    lost = [("write", 1, 0, 1), ("read", 1, 1, 2), ("write", 2, 3, 4), ("read", 1, 5, 6)]
    unread_stale = [("write", 1, 0, 1), ("write", 2, 2, 3), ("read", 1, 4, 5)]
    invented = [("read", 9, 0, 1)]
    undone = [("write", 1, 0, NEVER), ("read", 1, 1, 2), ("read", 0, 3, 4)]
    for name, history in [("stale", stale), ("lost", lost), ("unread", unread_stale), ("invented", invented), ("undone", undone)]:
        assert check_block(0, history), name
    print("the check finds what it has to", file=sys.stderr)


# The records: a line for each request that was answered, or failed; and for each answer that was an error, or failed to come.


def read_history(paths):
    """What was answered or may have happened, how many requests got an error, and how many connections broke."""
    history, counts = [], {"error": 0, "lost": 0}
    for path in paths:
        with open(path) as file:
            for line in file:
                kind, block, value, begun, ended = json.loads(line)
                if kind in counts:
                    counts[kind] += 1
                else:
                    history.append((kind, block, value, begun, NEVER if ended is None else ended))
    return history, counts["error"], counts["lost"]


def stall(history, since, until=NEVER):
    """Longest time that a request took which was answered and was under way then, and when that one began."""
    within = [(ended - begun, begun) for _, _, _, begun, ended in history if begun <= until and since <= ended != NEVER]
    return max(within, default=(0.0, since))


# The client: a process of its own, because a process is in one network namespace.


class Client:
    def __init__(self, options, out):
        self.options, self.out, self.handle, self.turn = options, out, None, 0
        self.choice, self.sequence = random.Random(options.number), 0
        self.told = threading.Event()
        threading.Thread(target=lambda: (sys.stdin.read(), self.told.set()), daemon=True).start()

    def now(self):
        return time.monotonic() - self.options.begun

    def record(self, kind, block, value, start, end):
        self.out.write(json.dumps([kind, block, value, start, None if end == NEVER else end]) + "\n")

    def attach(self):
        found = nbd.NBD()
        found.connect_uri(self.options.uris[self.turn % len(self.options.uris)])
        return found

    def ask(self, call):
        """The answer of one request, or an error after the patience: then the connection is given up."""
        if self.handle is None:
            self.handle = self.attach()
        cookie = call(self.handle)
        deadline = time.monotonic() + PATIENCE
        while not self.handle.aio_command_completed(cookie):
            if time.monotonic() > deadline:
                raise TimeoutError
            self.handle.poll(200)

    def attempt(self, kind, block, value):
        """The content of the block, as it was written or read."""
        if kind == "write":
            buffer = nbd.Buffer.from_bytearray(bytearray(struct.pack("<Q", value) * (BLOCK // 8)))
            self.ask(lambda handle: handle.aio_pwrite(buffer, block * BLOCK))
            return value
        buffer = nbd.Buffer(BLOCK)
        self.ask(lambda handle: handle.aio_pread(buffer, block * BLOCK))
        words = set(struct.unpack(f"<{BLOCK // 8}Q", buffer.to_bytearray()))
        return words.pop() if len(words) == 1 else -1

    def do(self, kind, block, value=None):
        """Whether the request was answered in the end."""
        start = self.now()
        while True:
            try:
                found = self.attempt(kind, block, value)
                self.record(kind, block, found, start, self.now())
                return True
            except (nbd.Error, TimeoutError) as error:
                broken = isinstance(error, nbd.Error) and (self.handle is None or not self.handle.aio_is_ready())
                self.record("lost" if broken else "error", block, str(error)[:100], start, self.now())
            # The requests under way end with it.
            self.handle = None
            self.turn += 1
            time.sleep(0.1)
            if len(self.options.uris) == 1:
                if kind == "write":
                    self.record(kind, block, value, start, NEVER)
                return False

    def run(self):
        options, choice = self.options, self.choice
        while not self.told.is_set():
            block = choice.randrange(BLOCKS)
            own = options.shared or block % options.of == options.number - 1
            if own and choice.random() < (0.5 if options.shared or options.of == 1 else 0.9):
                self.sequence += 1
                self.do("write", block, options.number << 40 | self.sequence)
            else:
                self.do("read", block)
            time.sleep(0.004)
        for block in range(BLOCKS):
            while not self.do("read", block):
                pass


def main():
    global nbd
    import nbd
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("uris", nargs="+", metavar="URI", help="where the volume is")
    parser.add_argument("--record", required=True, help="the file of its records")
    parser.add_argument("--number", type=int, default=1, help="which client this is")
    parser.add_argument("--of", type=int, default=1, help="how many there are: each writes blocks of its own")
    parser.add_argument("--shared", action="store_true", help="each writes all blocks")
    parser.add_argument("--begun", type=float, default=0.0, help="the monotonic clock's time that is 0 in the records")
    options = parser.parse_args()
    with open(options.record, "w", buffering=1) as out:
        Client(options, out).run()


if __name__ == "__main__":
    main()
