"""Replication as docs/internals/replication.md has it, as a judge of traces.

Theory of operation. A `Specification` takes the lines of a simulated world one by one and keeps
only what the document speaks of: the stored configurations, lives and promises of stores, reigns,
and of each operation its place, its state and where it is durable. A line that no rule allows
raises `RefinementError` with the rule. It knows more than any replica does, as it sees the register
and every disk at once; so a rule is a plain sentence about all of them. `finish` judges what the
clients saw (`linear`). Pure.

Words. The *tenure* of an epoch: the configurations from there on as long as they name the same life
of the same store primary. A reign begins with the role settling, in the epoch that its lsns carry;
it may go on as long as its tenure.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Final

from pureflash.model.domain import Member, ShardConf
from pureflash.testing.model import trace
from pureflash.testing.model.conf import Refused, check_sound, step_name
from pureflash.testing.model.linear import History, NotLinearizableError

WINDOW: Final = 1_024
"""Operations above the watermark at most (section 1)."""
REGION_BLOCKS: Final = 256
FIRST_EPOCH: Final = 1

# Who may ask for what: "conductor", "primary", "named" (the replica that is to be primary).
_PROPOSERS: Final = {
    "T1": {"conductor", "primary"},
    "T2": {"conductor", "primary", "named"},
    "T3": {"conductor"},
    "T4": {"primary"},
    "T5": {"primary"},
    "T6": {"conductor"},
    "T7": {"conductor"},
    "T8": {"conductor", "primary"},
    "T9": {"conductor"},
}
_INTERRUPTED: Final = {"suspended", "leaving"}
"""A primary that does nothing until a newer configuration comes, or none after a transfer."""
_ROLES: Final = {"out", "learner", "secondary", "settling", "active", "fenced"} | _INTERRUPTED

Lsn = tuple[int, int]
Life = tuple[int, int]


class RefinementError(Exception):
    """The specification does not allow this step; the text has time, line and rule."""


def _require(is_met: bool, rule: str) -> None:
    if not is_met:
        raise RefinementError(rule)


@dataclass(slots=True)
class Operation:
    """One lsn. `durable` are the lives that have reported it, `primary_at` when its primary did."""

    first: int
    count: int
    is_settle: bool
    is_heal: bool = False
    primary_at: int | None = None
    durable: set[Life] = field(default_factory=set)
    committed_at: int | None = None

    @property
    def blocks(self) -> range:
        """Blocks of the shard that it changes."""
        return range(self.first, self.first + self.count)


@dataclass(slots=True)
class Reign:
    """One primary from settling on.

    `open` has the uncommitted seq of each block; up to `watermark` everything is decided.
    """

    life: Life
    epoch: int
    next_seq: int | None = None
    first_seq: int | None = None
    watermark: int = 0
    open: dict[int, int] = field(default_factory=dict)
    undecided: set[int] = field(default_factory=set)


@dataclass(slots=True)
class Replica:
    """What is known of one life of a replica; `resumes` is the role that was interrupted."""

    role: str = "out"
    epoch: int = 0
    reign: Reign | None = None
    resumes: str | None = None


@dataclass(slots=True)
class Holding:
    """What a disk holds beside the operations that it reported, as places in the trace."""

    place: tuple[str, str]
    admitted_at: int = -1
    copied_at: dict[int, int] = field(default_factory=dict)


class Shard:
    """The rules of one shard."""

    def __init__(self) -> None:
        self.confs: dict[int, ShardConf] = {}
        self.newest: ShardConf | None = None
        self.promised: dict[int, int] = {}
        self.replicas: defaultdict[Life, Replica] = defaultdict(Replica)
        self.reigns: list[Reign] = []
        self.operations: dict[Lsn, Operation] = {}
        self.last_committed: dict[int, Lsn] = {}
        self.top_seqs: dict[int, int] = {}
        self.holdings: dict[int, Holding] = {}
        self.place = 0

    # ------------------------------------------------------------------------- configurations

    def conf(self, line: trace.Conf, lives: dict[int, int]) -> None:
        """I7, I8: each follows from the last by a legal transition, of lives that were lived."""
        old, new = self.newest, line.conf
        try:
            check_sound(new)
        except Refused as cause:
            raise RefinementError(f"no sound configuration: {cause}") from None
        _require(new.index == line.shard, "the configuration is of another shard")
        if old is None:
            is_first = line.transition == "first" and new.epoch == FIRST_EPOCH and line.by == 0
            _require(is_first, "the first configuration has epoch 1 and is the conductor's")
        else:
            name = step_name(old, new)
            _require(name == line.transition, f"I7: that is {name or 'no transition'}")
            self._check_proposer(old, new, line)
            for copy in set(new.isr) - set(old.isr):
                self._check_admitted(new.member(copy))
        for member in new.members:
            if old is None or member not in old.members:
                is_known = lives.get(member.store, 0) >= member.incarnation
                _require(is_known or old is None, f"I8: {member} never lived")
                self._place_member(member)
        for copy in new.isr if new.isr != (old.isr if old else ()) else ():
            self._check_holds_all(new.member(copy))
        self.confs[new.epoch] = self.newest = new

    def _check_proposer(self, old: ShardConf, new: ShardConf, line: trace.Conf) -> None:
        who = set()
        if line.by == 0:
            who.add("conductor")
        if line.by == old.member(old.primary).store:
            who.add("primary")
        if line.by == new.member(new.primary).store:
            who.add("named")
        allowed = _PROPOSERS[line.transition]
        _require(bool(who & allowed), f"{line.transition} may not be proposed by {line.by}")

    def _check_admitted(self, member: Member) -> None:
        """T4: from now on it counts as having everything, which `_check_holds_all` asks for."""
        holding = self.holdings[member.store]
        self._check_holds_all(member)
        holding.admitted_at = self.place

    def _place_member(self, member: Member) -> None:
        """Begin anew with a disk that is another one, or was formatted."""
        place = (member.disk, member.format_uuid)
        known = self.holdings.get(member.store)
        if known is None or known.place != place:
            self.holdings[member.store] = Holding(place)
            self._forget_disk(member.store)
        else:
            # What was copied to an earlier life is copied again: complete_lsn did not grow.
            known.copied_at.clear()

    def _forget_disk(self, store: int) -> None:
        for operation in self.operations.values():
            operation.durable -= {life for life in operation.durable if life[0] == store}

    def _check_holds_all(self, member: Member) -> None:
        """I1: the newest committed operation of every block is on every member of the ISR."""
        holding = self.holdings[member.store]
        for block, lsn in self.last_committed.items():
            operation = self.operations[lsn]
            assert operation.committed_at is not None
            copied_at = holding.copied_at.get(block // REGION_BLOCKS, -1)
            held_since = max(holding.admitted_at, copied_at)
            is_held = operation.committed_at < held_since or any(
                store == member.store for store, _ in operation.durable
            )
            _require(is_held, f"I1: store {member.store} lacks {lsn} of block {block}")

    def _primary(self, epoch: int) -> Member:
        return self.confs[epoch].member(self.confs[epoch].primary)

    def tenure(self, epoch: int) -> list[ShardConf]:
        """Give the configurations of a tenure, from `epoch` on."""
        found = [self.confs[epoch]]
        primary = self._primary(epoch)
        while (conf := self.confs.get(found[-1].epoch + 1)) is not None:
            other = conf.member(conf.primary)
            if (other.store, other.incarnation) != (primary.store, primary.incarnation):
                break
            found.append(conf)
        return found

    # ---------------------------------------------------------------------- roles and promises

    def role(self, line: trace.Role) -> None:
        """Check that a role claims no more than its configuration gives, and comes in order."""
        _require(line.role in _ROLES, f"no role is called {line.role!r}")
        replica = self.replicas[line.store, line.inc]
        _require(line.epoch >= replica.epoch, "a replica goes back to an older configuration")
        conf = self.confs.get(line.epoch)
        is_nobody = conf is None
        _require(conf is not None or line.epoch == 0, "I21: this configuration was never stored")
        if line.role not in {"out", "fenced"}:
            _require(not is_nobody, f"{line.role} without a configuration")
            assert conf is not None
            self._check_named(conf, line)
            promised = self.promised.get(line.store, 0)
            is_over = line.role == "active" and promised > line.epoch
            _require(not is_over, f"{line.role} below its own promise of {promised}")
        before, replica.role = replica.role, line.role
        if before in _INTERRUPTED and line.role in {"settling", "active"}:
            self._check_resumed(replica, line, before)
        elif line.role == "settling":
            self._begin_reign(replica, line, before)
        elif line.role == "active":
            self._activate(replica, before)
        elif line.role == "suspended":
            _require(before in {"settling", "active", "leaving"}, f"suspended after {before}")
            replica.resumes = "active" if before == "leaving" else before
        elif line.role == "leaving":
            self._leave(replica, line, before)
        else:
            replica.reign = None
        replica.epoch = line.epoch

    def _check_named(self, conf: ShardConf, line: trace.Role) -> None:
        mine = [
            one for one in conf.members if (one.store, one.incarnation) == (line.store, line.inc)
        ]
        _require(len(mine) == 1, f"{line.role} in a life that the configuration does not name")
        copy = mine[0].copy
        is_named = {
            "learner": copy in conf.learners,
            "secondary": copy in conf.isr and copy != conf.primary,
        }.get(line.role, copy == conf.primary)
        _require(is_named, f"{line.role}, which configuration {conf.epoch} does not give it")

    def _begin_reign(self, replica: Replica, line: trace.Role, before: str) -> None:
        _require(before != "active", "settling after active")
        replica.reign = Reign((line.store, line.inc), line.epoch)
        self.reigns.append(replica.reign)

    def _leave(self, replica: Replica, line: trace.Role, before: str) -> None:
        """T5: "drained": who gives its reign away has decided all that it began."""
        _require(before == "active" and replica.reign is not None, f"leaving after {before}")
        assert replica.reign is not None
        last = self.tenure(replica.reign.epoch)[-1].epoch
        _require(line.epoch <= last, "leaving after another one was primary")
        self._forget_failed(replica.reign)
        _require(not replica.reign.undecided, "leaving with operations uncommitted")
        replica.resumes = before

    def _check_resumed(self, replica: Replica, line: trace.Role, before: str) -> None:
        assert replica.reign is not None
        _require(line.role == replica.resumes, f"{line.role}, but it was {replica.resumes} before")
        is_newer = line.epoch > replica.epoch
        _require(is_newer or before == "leaving", "who was refused goes on in its epoch")
        tenure = self.tenure(replica.reign.epoch)
        _require(line.epoch <= tenure[-1].epoch, "it goes on after another one was primary")

    def _activate(self, replica: Replica, before: str) -> None:
        reign = replica.reign
        _require(before == "settling" and reign is not None, f"active after {before}")
        assert reign is not None
        _require(not reign.undecided, "active with operations of the settling uncommitted")
        candidates = [conf for conf in self.tenure(reign.epoch) if conf.epoch >= replica.epoch]
        is_promised = any(
            all(self.promised.get(conf.member(copy).store, 0) >= reign.epoch for copy in conf.isr)
            for conf in candidates
        )
        _require(is_promised, "active before every ISR member has promised the epoch")

    def _serving_role(self, line: trace.ReplicaLine) -> str:
        """Give its role; an interrupted one goes on with a newer configuration of its tenure.

        It tells that it has promised that one a moment before it tells its role.
        """
        replica = self.replicas[line.store, line.inc]
        if replica.role not in _INTERRUPTED or replica.reign is None or replica.resumes is None:
            return replica.role
        last = self.tenure(replica.reign.epoch)[-1].epoch
        goes_on = replica.epoch < self.promised.get(line.store, 0) <= last
        return replica.resumes if goes_on else replica.role

    def promise(self, line: trace.Promised) -> None:
        """I6: promises never regress, and are of configurations that were stored."""
        _require(line.epoch in self.confs, "I21: this configuration was never stored")
        before = self.promised.get(line.store, 0)
        _require(line.epoch >= before, f"I6: {before} was promised before")
        self.promised[line.store] = line.epoch

    # ------------------------------------------------------------------------------ operations

    def assigned(self, line: trace.Assigned) -> None:
        """Check that a primary alone gives lsns: dense, in the window, one per block (I13)."""
        replica = self.replicas[line.store, line.inc]
        wanted = "settling" if line.settle else "active"
        role = self._serving_role(line)
        _require(role == wanted, f"an lsn is given while {role}")
        reign = replica.reign
        assert reign is not None, "settling began one"
        _require(line.epoch == reign.epoch, f"the reign began in epoch {reign.epoch}")
        self._check_reigning(line, reign)
        if reign.next_seq is None:
            # Later reigns say nothing here: a primary that slept does not know of them.
            before = [top for epoch, top in self.top_seqs.items() if epoch < line.epoch]
            top = max(before, default=0)
            _require(line.seq > top, f"seq {top} was committed before")
            reign.first_seq, reign.watermark = line.seq, line.seq - 1
        else:
            _require(line.seq == reign.next_seq, f"seqs are dense: {reign.next_seq} is next")
        operation = Operation(line.first, line.count, line.settle, line.heal)
        busy = {reign.open[block] for block in operation.blocks if block in reign.open}
        if busy or line.seq - reign.watermark > WINDOW:
            self._forget_failed(reign)
            busy &= reign.undecided
        _require(not busy, f"I13: {sorted(busy)} of these blocks are uncommitted")
        _require(line.seq - reign.watermark <= WINDOW, f"{reign.watermark} is the watermark")
        reign.next_seq = line.seq + 1
        reign.undecided.add(line.seq)
        reign.open.update(dict.fromkeys(operation.blocks, line.seq))
        self.operations[line.epoch, line.seq] = operation

    def _check_reigning(self, line: trace.ReplicaLine, reign: Reign) -> None:
        """Check that what it has promised goes on naming it primary."""
        last = self.tenure(reign.epoch)[-1].epoch
        promised = self.promised.get(line.store, 0)
        _require(promised <= last, f"its promise of {promised} ended its reign at {last}")

    def _forget_failed(self, reign: Reign) -> None:
        """Give up what the own disk failed to write, if the ISR is this one alone.

        The request ends in an error then, and the block is free again (section 5).
        """
        is_alone = any(len(conf.isr) == 1 for conf in self.tenure(reign.epoch))
        for seq in sorted(reign.undecided):
            operation = self.operations[reign.epoch, seq]
            if is_alone and reign.life not in operation.durable:
                self._decide(reign, seq, operation)

    def _decide(self, reign: Reign, seq: int, operation: Operation) -> None:
        reign.undecided.discard(seq)
        for block in operation.blocks:
            if reign.open.get(block) == seq:
                del reign.open[block]
        if seq == reign.watermark + 1:
            assert reign.next_seq is not None
            reign.watermark = min(reign.undecided, default=reign.next_seq) - 1

    def durable(self, line: trace.Durable) -> None:
        """Section 3: after a promise nothing of an earlier reign becomes durable."""
        operation = self.operations.get((line.epoch, line.seq))
        _require(operation is not None, "this lsn was never given")
        assert operation is not None
        promised = self.promised.get(line.store, 0)
        last = self.tenure(line.epoch)[-1].epoch
        rule = f"its promise is {promised}, the reign lasted from {line.epoch} to {last}"
        _require(line.epoch <= promised <= last, rule)
        operation.durable.add((line.store, line.inc))
        primary = self._primary(line.epoch)
        if (line.store, line.inc) == (primary.store, primary.incarnation):
            operation.primary_at = self.place

    def committed(self, line: trace.Committed) -> None:
        """I2, I9: everybody has it who was in the ISR at the end of the tenure, or is now."""
        replica = self.replicas[line.store, line.inc]
        reign, lsn = replica.reign, (line.epoch, line.seq)
        role = self._serving_role(line)
        _require(role in {"settling", "active"}, f"a commit while {role}")
        assert reign is not None, "settling began one"
        operation = self.operations.get(lsn)
        _require(line.epoch == reign.epoch and operation is not None, "not of this reign")
        assert operation is not None
        _require(operation.committed_at is None, "it was committed before")
        self._check_reigning(line, reign)
        tenure = self.tenure(line.epoch)
        for copy in tenure[-1].isr:
            member = tenure[-1].member(copy)
            rule = f"I9: it is not durable on store {member.store} of configuration"
            has_it = member.store in line.acked and self._has_it(member, operation)
            _require(has_it, f"{rule} {tenure[-1].epoch}")
        reported = {store for store, _ in operation.durable}
        _require(set(line.acked) <= reported, f"{line.acked}: durable only on {sorted(reported)}")
        self._check_enough(line, operation, tenure)
        for later in self.reigns:
            if later.epoch > line.epoch and later.first_seq is not None:
                _require(line.seq < later.first_seq, f"I2: reign {later.epoch} gave this seq too")
        operation.committed_at = self.place
        self.top_seqs[line.epoch] = max(self.top_seqs.get(line.epoch, 0), line.seq)
        for block in operation.blocks:
            self.last_committed[block] = max(lsn, self.last_committed.get(block, lsn))
        self._decide(reign, line.seq, operation)

    def _has_it(self, member: Member, operation: Operation) -> bool:
        """Whether this life has reported it, or was given it by a COPY of all its regions."""
        if (member.store, member.incarnation) in operation.durable:
            return True
        if operation.primary_at is None:
            return False
        copied_at = self.holdings[member.store].copied_at
        regions = {block // REGION_BLOCKS for block in operation.blocks}
        return all(copied_at.get(region, -1) > operation.primary_at for region in regions)

    def _check_enough(
        self, line: trace.Committed, operation: Operation, tenure: list[ShardConf]
    ) -> None:
        """Check |ISR| >= min_write in a configuration that it may know.

        Settling needs it not, nor does what writes a damaged block again.
        """
        known = max(self.replicas[line.store, line.inc].epoch, self.promised.get(line.store, 0))
        is_enough = any(
            len(conf.isr) >= conf.min_write
            and {conf.member(copy).store for copy in conf.isr} <= set(line.acked)
            for conf in tenure
            if conf.epoch >= known
        )
        needs_none = operation.is_settle or operation.is_heal
        _require(needs_none or is_enough, "fewer than min_write are in the ISR")

    def copied(self, line: trace.Copied) -> None:
        """Check that only a primary copies; one that was refused hears what it had sent before."""
        replica = self.replicas[line.store, line.inc]
        _require(
            replica.role in {"settling", "active", "suspended"},
            f"a COPY is acknowledged to {replica.role}",
        )
        holding = self.holdings.get(line.to)
        _require(holding is not None, f"store {line.to} has no replica")
        assert holding is not None
        holding.copied_at[line.region] = self.place

    def caught_up(self, line: trace.CaughtUp) -> None:
        """Check that who is proposed for admission is a learner."""
        replica = self.replicas[line.store, line.inc]
        _require(replica.role in {"active", "suspended"}, f"proposed by one that is {replica.role}")
        known = [conf for conf in self.confs.values() if conf.epoch >= replica.epoch]
        learners = {conf.member(copy).store for conf in known for copy in conf.learners}
        _require(line.to in learners, f"store {line.to} is no learner")

    def crashed(self, life: Life) -> None:
        """End a life, with everything that was only in memory; disks and promises stay."""
        self.replicas.pop(life, None)


class Specification:
    """All shards of one world, its stores and its clients."""

    def __init__(self) -> None:
        self.shards: defaultdict[int, Shard] = defaultdict(Shard)
        self.history = History()
        self.line_count = 0
        self._alive: dict[int, int] = {}
        self._newest_life: dict[int, int] = {}
        self._time = 0

    def feed(self, text: str) -> None:
        """Take lines; raises `RefinementError` at the first one that is not allowed."""
        self.take(trace.read(text))

    def take(self, lines: Iterable[trace.AnyLine]) -> None:
        """Take lines that are read already."""
        for line in lines:
            self.line_count += 1
            try:
                _require(line.t >= self._time, "time goes backwards")
                self._time = line.t
                self._step(line)
            except (RefinementError, NotLinearizableError) as cause:
                raise RefinementError(f"line {self.line_count}: {cause}: {line}") from None

    def finish(self) -> None:
        """Judge what the clients saw; the trace is over."""
        try:
            self.history.check()
        except NotLinearizableError as cause:
            raise RefinementError(f"I3: {cause}") from None

    def _step(self, line: trace.AnyLine) -> None:
        match line:
            case trace.Invoke():
                who = (line.client, line.id)
                self.history.invoke(line.t, who, line.op, line.first, line.count, line.values)
            case trace.Reply():
                self.history.reply(line.t, (line.client, line.id), line.status, line.values)
            case trace.Boot():
                is_new = line.inc > self._newest_life.get(line.store, 0)
                _require(is_new and line.store not in self._alive, "lives are new, one at a time")
                self._alive[line.store] = self._newest_life[line.store] = line.inc
            case trace.Crash():
                _require(self._alive.pop(line.store, None) == line.inc, "it was not alive")
                for shard in self.shards.values():
                    shard.crashed((line.store, line.inc))
            case trace.Conf():
                shard = self.shards[line.shard]
                shard.place = self.line_count
                shard.conf(line, self._newest_life)
            case _:
                self._replica_step(line)

    def _replica_step(
        self,
        line: trace.Role
        | trace.Promised
        | trace.Assigned
        | trace.Durable
        | trace.Committed
        | trace.Copied
        | trace.CaughtUp,
    ) -> None:
        _require(self._alive.get(line.store) == line.inc, "told by a life that is not alive")
        shard = self.shards[line.shard]
        shard.place = self.line_count
        match line:
            case trace.Role():
                shard.role(line)
            case trace.Promised():
                shard.promise(line)
            case trace.Assigned():
                shard.assigned(line)
            case trace.Durable():
                shard.durable(line)
            case trace.Committed():
                shard.committed(line)
            case trace.Copied():
                shard.copied(line)
            case trace.CaughtUp():
                shard.caught_up(line)
