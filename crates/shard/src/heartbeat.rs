//! Heartbeats between the stores of a cluster: leases given and taken.
//!
//! # Theory of operation
//!
//! One machine per store, two halves (docs/internals/replication.md, section 4).
//!
//! *Asking.* A primary claims a shard at the other members that it needs. To each such store goes one
//! PING every 200 ms, which says: "I serve these shards". The lease of (shard, store) is the *send*
//! time of the newest acknowledged PING that listed the shard in the present reign, plus L.
//!
//! *Promising.* The store that receives a PING promises, for each shard on the sender's list, not
//! to serve it as primary until G after the *receipt*. G exceeds L by more than two clocks can
//! disagree, and no PING is received before it is sent: so as long as a lease holds, the promise
//! behind it does. A shard listed in an epoch below the promised one is refused: that primary is
//! deposed.
//!
//! *Giving back.* A primary that has given its reign away says so (RELEASE) in its next heartbeats:
//! its leases have ended by then, and the receiver drops the promises that it made to earlier
//! heartbeats.
//!
//! *Difference coding.* A PING carries what has changed since the newest PING that this life of the
//! receiver has acknowledged (`base_sequence`); with base 0 the list is complete. The receiver holds
//! the list as of its newest PING h. A difference from base b to n holds the present state of
//! everything that changed after b, so it is right to apply it to any h with b <= h < n: loss and
//! reordering cost nothing. An older or repeated PING (n <= h) changes nothing. The answer repeats
//! `sequence`, names h in `base_sequence`, and names every listing of the *whole* list that is
//! refused now: promised epochs only grow, so the receiver never refuses less now than when h came
//! in, and acknowledging h is right even in the answer to an older PING. h = 0 means "I hold
//! nothing of you": the next PING is complete. Every PING names both lives. A store that restarts
//! is a new life, which holds nothing and was not addressed: so no acknowledgement by another life,
//! and no promise to one, is taken for the new life's own.
//!
//! *Costs.* A step is linear in the shards of one pair of stores. A pair without a claimed shard is
//! silent. What is kept is bounded: `SENT_MAX` send times per store, an entry per claimed shard and
//! store, and one time of hearing per (shard, store) that was ever listed.
//!
//! `term`, `lineage` and `revision` of a PING belong to the caller, which fills them in before it
//! sends one and reads them when one comes in: leases do not depend on them, so this machine leaves
//! them zero and ignores them.

use crate::conf::{Incarnation, StoreId};
use crate::mutant::Mutant;
use proto::wire::{HeartbeatEntry, HeartbeatKind, PAYLOAD_BYTES_MAX, Ping};
use proto::{Epoch, ShardId, Tick};
use std::collections::{BTreeMap, BTreeSet, VecDeque};

/// Times of the lease protocol, in nanoseconds of `CLOCK_BOOTTIME`; changed only by T9.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Timing {
    /// Between two heartbeats of a pair.
    pub heartbeat_nanos: u64,
    /// L: a primary serves reads this long after it *sent* a heartbeat that was acknowledged.
    pub lease_nanos: u64,
    /// G: a replica keeps its promise this long after it *received* a heartbeat. Larger than
    /// L x (1 + drift) + margin.
    pub grace_nanos: u64,
}

impl Default for Timing {
    fn default() -> Timing {
        Timing {
            heartbeat_nanos: 200_000_000,
            lease_nanos: 1_500_000_000,
            grace_nanos: 2_250_000_000,
        }
    }
}

/// What a replica asks about leases; answered from memory, on the read path.
pub trait Leases {
    /// Until when `store`, in this life, has promised not to serve `shard` in place of this store:
    /// send time of the newest heartbeat that it acknowledged *and* that listed the shard in the
    /// present reign, plus L. `Tick(0)`: no promise.
    fn lease_until(&self, shard: ShardId, store: StoreId, incarnation: Incarnation) -> Tick;

    /// Until when this store has promised *others* not to serve `shard` as primary (G after the
    /// receipt of each heartbeat that listed it). `Tick(0)`: no promise.
    fn promised_until(&self, shard: ShardId) -> Tick;

    /// When the last heartbeat of `store` that listed `shard` came in. A refused heartbeat is a
    /// deposed primary's and does not count. `None`: never in this life.
    fn heard_at(&self, shard: ShardId, store: StoreId) -> Option<Tick>;
}

/// Send times that are remembered per store: with the shortest distance of two PINGs (an eighth of
/// 200 ms) they reach back 1.6 s, and an acknowledgement older than L = 1.5 s is worth nothing.
const SENT_MAX: usize = 64;

/// A PING with news may follow the last one after this part of `heartbeat_nanos`.
const EARLY_DIVISOR: u64 = 8;

/// A machine that gets its Tick later than this part of L was not running: its leases are dropped
/// ("loop gap > L/4").
const GAP_DIVISOR: u64 = 4;

/// Bytes of one record of a PING.
const ENTRY_BYTES: u32 = 24;

/// Most records of one PING. What does not fit is listed one PING later.
pub const ENTRIES_MAX: usize = (PAYLOAD_BYTES_MAX / ENTRY_BYTES) as usize;

/// What the world tells the machine.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Event {
    /// Another store's heartbeat; answered by exactly one `Effect::Answer`.
    Ping {
        /// The store.
        from: StoreId,
        /// Comes back with the answer.
        token: u64,
        /// What it says.
        ping: Ping,
    },
    /// The answer to a heartbeat. Lost ones simply do not come.
    Pong {
        /// The store.
        from: StoreId,
        /// What it says.
        ping: Ping,
    },
    /// From now on list the shard in the heartbeats to these stores, in this epoch, and no longer in
    /// those to others. A new reign, and a new life of a store, start without lease.
    Claim {
        /// Which shard.
        shard: ShardId,
        /// Epoch in which the reign began.
        reign: Epoch,
        /// Present epoch, which the heartbeats carry.
        epoch: Epoch,
        /// Whose leases are needed. This store itself may be among them and is passed over.
        stores: Vec<(StoreId, Incarnation)>,
    },
    /// List the shard no longer; its leases are gone at once.
    Unclaim {
        /// Which shard.
        shard: ShardId,
    },
    /// Give back the promises of other stores for the shard, which this store serves no longer
    /// (T5): the shard's leases are gone at once, and a store that has promised may serve as soon
    /// as it has heard the RELEASE.
    Release {
        /// Which shard.
        shard: ShardId,
    },
    /// Refuse heartbeats that list the shard in an epoch below this.
    Promise {
        /// Which shard.
        shard: ShardId,
        /// The epoch.
        epoch: Epoch,
    },
    /// This life of a store has ended for certain, and so have those before it: promises to these
    /// lives are void.
    Dead {
        /// The store.
        store: StoreId,
        /// Its last life that is over.
        incarnation: Incarnation,
    },
    /// The time of `Effect::Wake` has come.
    Tick,
}

/// What the machine asks of the world.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Effect {
    /// Send a heartbeat.
    Send {
        /// To which store.
        to: StoreId,
        /// What it says.
        ping: Ping,
    },
    /// Answer `Event::Ping`.
    Answer {
        /// The heartbeat's.
        token: u64,
        /// The answer.
        ping: Ping,
    },
    /// Another store has promised this epoch, which is newer than the one claimed here.
    Newer {
        /// Which shard.
        shard: ShardId,
        /// The epoch.
        epoch: Epoch,
    },
    /// Send `Event::Tick` at this time at the latest. A time asked for earlier stays asked for; a
    /// Tick that comes too early does no harm.
    Wake(Tick),
}

/// A shard's place in the heartbeats to one store.
#[derive(Debug)]
struct Entry {
    epoch: Epoch,
    saying: Saying,
    /// The last heartbeat that said something new of the shard; 0: none has named it.
    changed: u64,
    /// What heartbeats have to say of the shard has changed since.
    is_news: bool,
}

/// What heartbeats say about a shard.
#[derive(Clone, Copy, Debug)]
enum Saying {
    Lease {
        reign: Epoch,
        /// First heartbeat of this reign that lists it; `None`: none yet.
        since: Option<u64>,
        until: Tick,
    },
    /// The promises are given back; said until the receiver has heard so or its promise has ended.
    Release {
        until: Tick,
    },
    Drop,
}

impl Saying {
    fn is_lease(self) -> bool {
        match self {
            Saying::Lease { .. } => true,
            Saying::Release { .. } | Saying::Drop => false,
        }
    }

    /// Whether the receiver waits to hear it: to renew its promise, or to be free of it.
    fn is_urgent(self) -> bool {
        match self {
            Saying::Lease { .. } | Saying::Release { .. } => true,
            Saying::Drop => false,
        }
    }
}

/// A store that leases are asked from.
#[derive(Debug)]
struct Asked {
    /// The life that heartbeats are addressed to: the newest that any claim has named. Lower ones
    /// have ended, because a newer one could not be registered otherwise.
    address: Incarnation,
    /// The last heartbeat sent; never goes back.
    sequence: u64,
    /// Newest heartbeat that the address has acknowledged, 0: the next is complete.
    base: u64,
    /// Send times of the last heartbeats.
    sent: VecDeque<(u64, Tick)>,
    entries: BTreeMap<ShardId, Entry>,
    /// When the next heartbeat is to be sent, while anything is listed.
    due: Tick,
}

impl Asked {
    fn new(address: Incarnation, now: Tick) -> Asked {
        let (sent, entries) = (VecDeque::new(), BTreeMap::new());
        Asked { address, sequence: 0, base: 0, sent, entries, due: now }
    }

    /// A new life of the receiver holds nothing and has promised nothing.
    fn readdress(&mut self, address: Incarnation) {
        assert!(address > self.address, "lives grow");
        self.address = address;
        self.base = 0;
        self.entries.clear();
    }

    fn is_speaking(&self) -> bool {
        self.entries.values().any(|entry| entry.saying.is_urgent())
    }

    /// A heartbeat with news follows the last one soon, but is not late where there was silence.
    fn hurry(&mut self, now: Tick, early_nanos: u64) {
        let last = self.sent.back().map_or(Tick(0), |&(_, at)| at);
        self.due = self.due.clamp(now, last.after_nanos(early_nanos).max(now));
    }

    /// True when this changed what the next heartbeat says.
    fn claim(&mut self, shard: ShardId, reign: Epoch, epoch: Epoch) -> bool {
        let fresh = Saying::Lease { reign, since: None, until: Tick(0) };
        let Some(entry) = self.entries.get_mut(&shard) else {
            let entry = Entry { epoch, saying: fresh, changed: 0, is_news: true };
            self.entries.insert(shard, entry);
            return true;
        };
        let is_same_reign = match entry.saying {
            Saying::Lease { reign: present, .. } => present == reign,
            Saying::Release { .. } | Saying::Drop => false,
        };
        if is_same_reign && entry.epoch == epoch {
            return false;
        }
        if !is_same_reign {
            entry.saying = fresh;
        }
        entry.epoch = epoch;
        entry.is_news = true;
        true
    }

    /// Not urgent: a receiver that lists the shard for too long only keeps its promise for too
    /// long.
    fn unclaim(&mut self, shard: ShardId) {
        let Some(entry) = self.entries.get_mut(&shard) else { return };
        if entry.changed == 0 {
            self.entries.remove(&shard);
        } else if entry.saying.is_lease() {
            entry.saying = Saying::Drop;
            entry.is_news = true;
        }
    }

    /// True when this changed what the next heartbeat says.
    fn release(&mut self, shard: ShardId, until: Tick) -> bool {
        let Some(entry) = self.entries.get_mut(&shard).filter(|entry| entry.saying.is_lease())
        else {
            return false;
        };
        if entry.changed == 0 {
            self.entries.remove(&shard);
            return false;
        }
        entry.saying = Saying::Release { until };
        entry.is_news = true;
        true
    }

    /// A RELEASE not heard before the promise ended would free nobody any more: `Drop` follows.
    fn expire(&mut self, now: Tick) {
        for entry in self.entries.values_mut() {
            if let Saying::Release { until } = entry.saying
                && until <= now
            {
                (entry.saying, entry.is_news) = (Saying::Drop, true);
            }
        }
    }

    /// The receiver holds nothing: say everything again, and count nothing sent so far.
    fn start_over(&mut self) {
        self.base = 0;
        self.sent.clear();
        self.entries.retain(|_, entry| entry.saying.is_lease());
        for entry in self.entries.values_mut() {
            (entry.changed, entry.is_news) = (0, true);
            // A list that does not fit into one heartbeat names this shard only later.
            if let Saying::Lease { since, .. } = &mut entry.saying {
                *since = None;
            }
        }
    }

    /// What the next heartbeat says: all that changed since its base.
    fn pick_records(&mut self) -> Vec<HeartbeatEntry> {
        let (sequence, base) = (self.sequence, self.base);
        // Shards that an unacknowledged heartbeat named are named again: without them, the list
        // that the receiver holds after this heartbeat would depend on whether the earlier one came
        // in.
        let repeated = self.entries.values().filter(|entry| entry.changed > base).count();
        let mut room = ENTRIES_MAX.checked_sub(repeated).expect("news are taken up as they fit");
        let mut records = Vec::new();
        for (&shard, entry) in &mut self.entries {
            if entry.changed <= base {
                if !entry.is_news || room == 0 {
                    continue;
                }
                room -= 1;
            }
            if std::mem::take(&mut entry.is_news) {
                entry.changed = sequence;
            }
            let kind = match &mut entry.saying {
                Saying::Lease { since, .. } => {
                    since.get_or_insert(sequence);
                    HeartbeatKind::Lease
                }
                Saying::Release { .. } => HeartbeatKind::Release,
                Saying::Drop => HeartbeatKind::Drop,
            };
            records.push(HeartbeatEntry { shard, epoch: entry.epoch, kind });
        }
        records
    }

    fn acknowledged(&mut self, sequence: u64, refused: &BTreeSet<ShardId>, lease_nanos: u64) {
        // An acknowledgement of a heartbeat whose send time is forgotten counts for nothing.
        let sent = self.sent.iter().find(|(number, _)| *number == sequence);
        let Some(&(_, sent_at)) = sent else { return };
        self.base = self.base.max(sequence);
        let lease = sent_at.after_nanos(lease_nanos);
        self.entries.retain(|shard, entry| match &mut entry.saying {
            Saying::Lease { since, until, .. } => {
                let is_listed = since.is_some_and(|since| since <= sequence);
                if is_listed && !refused.contains(shard) {
                    *until = lease.max(*until);
                }
                true
            }
            Saying::Release { .. } | Saying::Drop => entry.is_news || entry.changed > sequence,
        });
    }
}

/// A store that asks for promises.
#[derive(Debug, Default)]
struct Heard {
    /// Its newest life that was heard.
    incarnation: Incarnation,
    /// The newest heartbeat of that life, 0: none.
    sequence: u64,
    /// What that heartbeat and those before it list.
    listed: BTreeMap<ShardId, Epoch>,
}

/// A promise not to serve a shard as primary.
#[derive(Debug)]
struct Promised {
    until: Tick,
    /// Epoch in which it was last asked for.
    epoch: Epoch,
}

/// The machine of one store.
#[derive(Debug)]
pub struct Heartbeats {
    store: StoreId,
    incarnation: Incarnation,
    timing: Timing,
    mutant: Mutant,
    /// Latest time seen.
    now: Tick,
    /// The earliest Tick that is asked for.
    wake: Option<Tick>,
    asked: BTreeMap<StoreId, Asked>,
    heard: BTreeMap<StoreId, Heard>,
    /// Apart from the lists in `heard`: a promise outlives the listing that it answered.
    promises: BTreeMap<ShardId, BTreeMap<(StoreId, Incarnation), Promised>>,
    heard_at: BTreeMap<(ShardId, StoreId), Tick>,
    /// Epochs below which a listing is refused.
    epochs: BTreeMap<ShardId, Epoch>,
    /// Last life of each store that has ended for certain.
    dead: BTreeMap<StoreId, Incarnation>,
}

impl Heartbeats {
    /// Begin a life: nothing is claimed, promised or refused. A replica that promised an epoch in
    /// an earlier life tells it again by `Event::Promise`.
    #[must_use]
    pub fn new(
        store: StoreId,
        incarnation: Incarnation,
        booted: Tick,
        timing: Timing,
        mutant: Mutant,
    ) -> Heartbeats {
        assert!(incarnation > 0, "0 names nobody");
        assert!(timing.grace_nanos > timing.lease_nanos, "a promise outlives its lease");
        Heartbeats {
            store,
            incarnation,
            timing,
            mutant,
            now: booted,
            wake: None,
            asked: BTreeMap::new(),
            heard: BTreeMap::new(),
            promises: BTreeMap::new(),
            heard_at: BTreeMap::new(),
            epochs: BTreeMap::new(),
            dead: BTreeMap::new(),
        }
    }

    /// Handle one event at `now`, which never goes back.
    pub fn step(&mut self, now: Tick, event: Event, out: &mut Vec<Effect>) {
        assert!(now >= self.now, "CLOCK_BOOTTIME never goes back");
        self.now = now;
        let gap_nanos = self.timing.lease_nanos / GAP_DIVISOR;
        if self.wake.is_some_and(|wake| wake.after_nanos(gap_nanos) < now) {
            self.drop_leases();
        }
        match event {
            Event::Ping { from, token, ping } => {
                let ping = self.ping(from, ping);
                out.push(Effect::Answer { token, ping });
            }
            Event::Pong { from, ping } => self.pong(from, &ping, out),
            Event::Claim { shard, reign, epoch, stores } => {
                self.claim(shard, reign, epoch, &stores);
            }
            Event::Unclaim { shard } => {
                self.asked.values_mut().for_each(|asked| asked.unclaim(shard));
            }
            Event::Release { shard } => self.release(shard),
            Event::Promise { shard, epoch } => {
                let promised = self.epochs.entry(shard).or_default();
                *promised = epoch.max(*promised);
            }
            Event::Dead { store, incarnation } => self.dead(store, incarnation),
            Event::Tick => self.tick(out),
        }
        self.ask_wake(out);
    }

    /// Forget every lease: each comes back with the first acknowledged heartbeat that is sent from
    /// now on. For a caller that was not running for a while, or whose clock has jumped.
    pub fn drop_leases(&mut self) {
        for asked in self.asked.values_mut() {
            asked.sent.clear();
            asked.due = self.now.min(asked.due);
            for entry in asked.entries.values_mut() {
                if let Saying::Lease { until, .. } = &mut entry.saying {
                    *until = Tick(0);
                }
            }
        }
    }

    // -------------------------------------------------------------------------------- asking --

    fn claim(
        &mut self,
        shard: ShardId,
        reign: Epoch,
        epoch: Epoch,
        stores: &[(StoreId, Incarnation)],
    ) {
        assert!(reign <= epoch, "a reign begins before it goes on");
        let early_nanos = self.early_nanos();
        for &(store, incarnation) in stores.iter().filter(|(store, _)| *store != self.store) {
            let now = self.now;
            let asked = self.asked.entry(store).or_insert_with(|| Asked::new(incarnation, now));
            if incarnation > asked.address {
                asked.readdress(incarnation);
            }
            if incarnation < asked.address {
                // The claim names a life of the store that is over and gives no lease.
                asked.unclaim(shard);
            } else if asked.claim(shard, reign, epoch) {
                asked.hurry(now, early_nanos);
            }
        }
        for (store, asked) in &mut self.asked {
            if !stores.iter().any(|(claimed, _)| claimed == store) {
                asked.unclaim(shard);
            }
        }
    }

    fn early_nanos(&self) -> u64 {
        self.timing.heartbeat_nanos / EARLY_DIVISOR
    }

    fn release(&mut self, shard: ShardId) {
        let (now, early_nanos) = (self.now, self.early_nanos());
        let until = now.after_nanos(self.timing.grace_nanos);
        for asked in self.asked.values_mut() {
            if asked.release(shard, until) {
                asked.hurry(now, early_nanos);
            }
        }
    }

    fn tick(&mut self, out: &mut Vec<Effect>) {
        if self.wake.is_some_and(|wake| wake <= self.now) {
            self.wake = None;
        }
        for (&to, asked) in &mut self.asked {
            asked.expire(self.now);
            if asked.due > self.now || !asked.is_speaking() {
                continue;
            }
            asked.sequence += 1;
            let entries = asked.pick_records();
            if asked.sent.len() == SENT_MAX {
                asked.sent.pop_front();
            }
            asked.sent.push_back((asked.sequence, self.now));
            asked.due = self.now.after_nanos(self.timing.heartbeat_nanos);
            let ping = Ping {
                sequence: asked.sequence,
                base_sequence: asked.base,
                store: self.store,
                incarnation: self.incarnation,
                peer_incarnation: asked.address,
                entries,
                ..Ping::default()
            };
            out.push(Effect::Send { to, ping });
        }
    }

    fn pong(&mut self, from: StoreId, ping: &Ping, out: &mut Vec<Effect>) {
        let Some(asked) = self.asked.get_mut(&from) else { return };
        let is_from_address = ping.store == from && ping.incarnation == asked.address;
        if !is_from_address || ping.peer_incarnation != self.incarnation {
            return;
        }
        let mut shards = BTreeSet::new();
        for refused in ping.entries.iter().filter(|entry| entry.kind == HeartbeatKind::Refused) {
            shards.insert(refused.shard);
            let Some(entry) = asked.entries.get(&refused.shard) else { continue };
            if entry.saying.is_lease() && refused.epoch > entry.epoch {
                out.push(Effect::Newer { shard: refused.shard, epoch: refused.epoch });
            }
        }
        if ping.base_sequence == 0 {
            asked.start_over();
        } else {
            asked.acknowledged(ping.base_sequence, &shards, self.timing.lease_nanos);
        }
    }

    fn ask_wake(&mut self, out: &mut Vec<Effect>) {
        let speaking = self.asked.values().filter(|asked| asked.is_speaking());
        let Some(due) = speaking.map(|asked| asked.due).min() else { return };
        if self.wake.is_none_or(|wake| due < wake) {
            self.wake = Some(due);
            out.push(Effect::Wake(due));
        }
    }

    // ----------------------------------------------------------------------------- promising --

    fn ping(&mut self, from: StoreId, ping: Ping) -> Ping {
        let is_dead = self.dead.get(&from).is_some_and(|&last| ping.incarnation <= last);
        let is_meant = ping.store == from && ping.peer_incarnation == self.incarnation;
        let (sequence, peer_incarnation) = (ping.sequence, ping.incarnation);
        let (base_sequence, entries) =
            if is_meant && !is_dead { self.hear(from, ping) } else { (0, Vec::new()) };
        Ping {
            sequence,
            base_sequence,
            store: self.store,
            incarnation: self.incarnation,
            peer_incarnation,
            entries,
            ..Ping::default()
        }
    }

    /// The newest heartbeat that is held now, and what of its list is refused.
    fn hear(&mut self, from: StoreId, ping: Ping) -> (u64, Vec<HeartbeatEntry>) {
        let heard = self.heard.entry(from).or_default();
        if ping.incarnation < heard.incarnation {
            return (0, Vec::new());
        }
        if ping.incarnation > heard.incarnation {
            *heard = Heard { incarnation: ping.incarnation, ..Heard::default() };
        }
        if ping.base_sequence > heard.sequence {
            return (0, Vec::new());
        }
        let is_newer = ping.sequence > heard.sequence;
        if is_newer {
            self.apply(from, ping);
        }
        self.look_through(from, is_newer)
    }

    fn apply(&mut self, from: StoreId, ping: Ping) {
        let heard = self.heard.get_mut(&from).expect("whoever is heard has a place");
        heard.sequence = ping.sequence;
        if ping.base_sequence == 0 {
            heard.listed.clear();
        }
        for HeartbeatEntry { shard, epoch, kind } in ping.entries {
            match kind {
                HeartbeatKind::Lease => drop(heard.listed.insert(shard, epoch)),
                HeartbeatKind::Drop => drop(heard.listed.remove(&shard)),
                HeartbeatKind::Release => {
                    heard.listed.remove(&shard);
                    // Every promise to this life answered a heartbeat that was sent before this
                    // RELEASE.
                    let key = (from, heard.incarnation);
                    if let Some(given) = self.promises.get_mut(&shard)
                        && given.get(&key).is_some_and(|promised| promised.epoch <= epoch)
                    {
                        given.remove(&key);
                    }
                }
                // Said in answers only.
                HeartbeatKind::Refused => {}
            }
        }
    }

    /// Refuse what is listed in a deposed epoch; renew the rest if the heartbeat is a new one.
    fn look_through(&mut self, from: StoreId, is_newer: bool) -> (u64, Vec<HeartbeatEntry>) {
        let heard = &self.heard[&from];
        let until = self.now.after_nanos(self.timing.grace_nanos);
        let mut refused = Vec::new();
        for (&shard, &epoch) in &heard.listed {
            let promised = self.epochs.get(&shard).copied().unwrap_or_default();
            if epoch < promised && !self.mutant.is(Mutant::HeartbeatAnyEpoch) {
                let kind = HeartbeatKind::Refused;
                refused.push(HeartbeatEntry { shard, epoch: promised, kind });
            } else if is_newer {
                let given = self.promises.entry(shard).or_default();
                given.retain(|_, promised| promised.until > self.now);
                given.insert((from, heard.incarnation), Promised { until, epoch });
                self.heard_at.insert((shard, from), self.now);
            }
        }
        if refused.len() > ENTRIES_MAX {
            // A listing whose refusal has no room here would count as accepted: acknowledge
            // nothing.
            refused.truncate(ENTRIES_MAX);
            return (0, refused);
        }
        (heard.sequence, refused)
    }

    fn dead(&mut self, store: StoreId, incarnation: Incarnation) {
        let last = self.dead.entry(store).or_default();
        *last = incarnation.max(*last);
        for given in self.promises.values_mut() {
            given.retain(|&(to, life), _| to != store || life > incarnation);
        }
    }
}

impl Leases for Heartbeats {
    fn lease_until(&self, shard: ShardId, store: StoreId, incarnation: Incarnation) -> Tick {
        let asked = self.asked.get(&store).filter(|asked| asked.address == incarnation);
        match asked.and_then(|asked| asked.entries.get(&shard)).map(|entry| entry.saying) {
            Some(Saying::Lease { until, .. }) => until,
            // Seeded bug: what was given back still counts.
            Some(Saying::Release { until }) if self.mutant.is(Mutant::ReleasedGoesOn) => until,
            Some(Saying::Release { .. } | Saying::Drop) | None => Tick(0),
        }
    }

    fn promised_until(&self, shard: ShardId) -> Tick {
        let given = self.promises.get(&shard).into_iter().flat_map(BTreeMap::values);
        given.map(|promised| promised.until).max().unwrap_or_default()
    }

    fn heard_at(&self, shard: ShardId, store: StoreId) -> Option<Tick> {
        self.heard_at.get(&(shard, store)).copied()
    }
}

#[cfg(test)]
pub(crate) mod tests;
