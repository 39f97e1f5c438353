//! The life of a world: faults, then health, then a while without a conductor, then rest.
//!
//! | Phase | Clients | Faults | Over when |
//! |---|---|---|---|
//! | safety | ask | happen | its time is over |
//! | liveness | ask | none | every shard is whole and served (I23), else after `liveness_ms` |
//! | drain | wait | none | every request is answered (I23, I27) |
//! | conductorless | ask | no conductor | its time is over and all are answered (I22) |
//! | rest | gone | none | every copy was looked at (I1, I5, I15, I17) |

use crate::connections::Purpose;
use crate::events::What;
use crate::store::{Process, shard_id};
use crate::world::{MILLI, World};
use lane::map::BlockState;
use lane::tables::Tables;
use proto::BLOCK_BYTES;
use shard::conf::StoreId;
use shard::replica::Role;

/// How often a phase looks whether it is over.
const LOOK: u64 = 100 * MILLI;
/// Time to answer what is open when nothing fails, without a conductor: a store's own retries.
const ANSWER_WITHIN: u64 = 5_000 * MILLI;
/// Time for the last flushes, commit watermarks and heartbeats.
const REST: u64 = 1_500 * MILLI;

/// Where in its life a world is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Phase {
    /// Faults happen.
    Safety,
    /// Nothing fails any more.
    Liveness {
        /// When everything must be healthy.
        until: u64,
    },
    /// Clients wait for what is open.
    Drain {
        /// When all must be answered.
        until: u64,
    },
    /// There is no conductor.
    Conductorless {
        /// When the clients stop.
        until: u64,
    },
    /// There is no conductor, and clients wait for what is open.
    ConductorlessDrain {
        /// When all must be answered.
        until: u64,
    },
    /// Nothing is asked any more.
    Rest {
        /// When the lanes are looked at.
        until: u64,
    },
    /// The lanes are being looked at.
    Looking,
    /// It is over.
    Over,
}

impl Phase {
    /// Whether clients ask.
    #[must_use]
    pub fn has_clients(self) -> bool {
        match self {
            Phase::Safety | Phase::Liveness { .. } | Phase::Conductorless { .. } => true,
            Phase::Drain { .. }
            | Phase::ConductorlessDrain { .. }
            | Phase::Rest { .. }
            | Phase::Looking
            | Phase::Over => false,
        }
    }
}

impl World {
    fn enter(&mut self, phase: Phase) {
        let was_asking = self.phase.has_clients();
        self.phase = phase;
        self.trace.mark(self.now, u64::MAX, 0);
        if phase.has_clients() && !was_asking {
            for client in 0..self.clients.len() {
                self.events.push(self.now, What::Ask(client));
            }
        }
    }

    pub(crate) fn look_at_phase(&mut self) {
        let now = self.now;
        match self.phase {
            Phase::Safety => {
                self.end_faults();
                self.enter(Phase::Liveness { until: now + self.options.liveness_ms * MILLI });
            }
            Phase::Liveness { until } => match self.unhealthy() {
                None => {
                    // The conductor repeats what a client may have missed.
                    for client in 0..self.clients.len() {
                        self.tell_client(client);
                    }
                    self.enter(Phase::Drain { until });
                }
                Some(why) if now >= until => self.check.fail(format!("I23: {why}")),
                Some(_) => {}
            },
            Phase::Drain { until } => {
                if self.is_answered() {
                    self.is_conductor_up = self.options.conductorless_ms == 0;
                    let until = now + self.options.conductorless_ms * MILLI;
                    self.enter(Phase::Conductorless { until });
                } else if now >= until {
                    self.fail_unanswered("I23");
                }
            }
            Phase::Conductorless { until } => {
                if now >= until {
                    self.enter(Phase::ConductorlessDrain { until: now + ANSWER_WITHIN });
                }
            }
            Phase::ConductorlessDrain { until } => {
                if self.is_answered() && self.known_damage().is_none() {
                    self.is_conductor_up = true;
                    self.verify_all();
                    self.enter(Phase::Rest { until: now + REST });
                } else if now >= until && self.is_answered() {
                    let known = self.known_damage().unwrap_or_default();
                    self.check.fail(format!("I30: known to its primary and not mended: {known}"));
                } else if now >= until {
                    self.fail_unanswered("I22");
                }
            }
            Phase::Rest { until } => {
                if now >= until {
                    self.look_at_rest();
                }
            }
            Phase::Looking => {
                if self.audits.is_empty() {
                    self.compare();
                    self.check_rot();
                    self.enter(Phase::Over);
                }
            }
            Phase::Over => return,
        }
        self.events.push(now + LOOK, What::Phase);
    }

    fn is_answered(&self) -> bool {
        self.check.history.open().next().is_none()
    }

    fn fail_unanswered(&mut self, name: &str) {
        let open = self.check.history.open().map(|((client, id), open)| {
            format!(
                "request {id} of client {client} ({:?} of {}+{}, begun at {} ns)",
                open.kind,
                open.first,
                open.values.len(),
                open.at
            )
        });
        let open: Vec<String> = open.collect();
        let text = format!("{name}: nothing fails and not answered: {}", open.join("; "));
        self.check.fail(text);
    }

    /// What is missing to a healthy cluster.
    fn unhealthy(&self) -> Option<String> {
        (0..self.options.shards as u32).find_map(|shard| {
            let conf = self.conductor.conf(shard);
            let primary = conf.primary_member();
            let store = &self.stores[primary.store as usize - 1];
            let replica = store.process.as_ref().and_then(|process| process.replica(shard));
            let role = replica.map(shard::replica::Replica::role);
            // A member that has just stopped is still one: the conductor has to hear of it first.
            let is_there = |member: &shard::conf::Member| {
                let store = &self.stores[member.store as usize - 1];
                let replica = store.process.as_ref().and_then(|process| process.replica(shard));
                let role = replica.map(shard::replica::Replica::role);
                store.incarnation == member.incarnation
                    && matches!(role, Some(Role::Active | Role::Secondary))
            };
            let is_whole =
                conf.isr.len() == usize::from(conf.rf) && conf.isr_members().all(is_there);
            let is_served = role == Some(Role::Active)
                && replica.and_then(|replica| replica.conf()).is_some_and(|own| own == conf);
            if is_whole && is_served {
                return None;
            }
            let roles: Vec<String> = self
                .stores
                .iter()
                .map(|store| {
                    let replica = store.process.as_ref().and_then(|p| p.replica(shard));
                    match replica {
                        Some(replica) => format!(
                            "store {} life {}: {:?} at epoch {:?}, promised {}",
                            store.id,
                            store.incarnation,
                            replica.role(),
                            replica.conf().map(|conf| conf.epoch.0),
                            replica.promised().0
                        ),
                        None => format!("store {} is not up", store.id),
                    }
                })
                .collect();
            Some(format!(
                "{} ms after the last fault shard {shard} is not whole and served: epoch {}, \
                 primary {}, isr {:?}, learners {:?}; {}",
                (self.now - self.options.safety_ms * MILLI) / MILLI,
                conf.epoch.0,
                conf.primary,
                conf.isr,
                conf.learners,
                roles.join("; ")
            ))
        })
    }

    /// I1, I5, I15, I17: everything is quiet; look at every copy.
    fn look_at_rest(&mut self) {
        self.enter(Phase::Looking);
        for shard in 0..self.options.shards as u32 {
            let stores: Vec<StoreId> =
                self.conductor.conf(shard).isr_members().map(|member| member.store).collect();
            let blocks = self.blocks_of(shard);
            for &store in &stores {
                self.audit(store, &blocks, Purpose::Rest);
            }
            let result = self.compare_states(shard, &stores);
            self.check.expect(result);
        }
        for index in 0..self.stores.len() {
            let result = self.check_space(index);
            self.check.expect(result);
        }
    }

    fn tables(&self, store: StoreId) -> Option<&Tables> {
        let process = self.stores[store as usize - 1].process.as_ref()?;
        process.lane().map(lane::Lane::tables)
    }

    /// Every block that no client ever wrote is zeros, on every copy. Those that were written are
    /// read through the lane.
    fn compare_states(&self, shard: u32, stores: &[StoreId]) -> Result<(), String> {
        let size = self.options.regions * crate::client::REGION_BLOCKS;
        let written = self.blocks_of(shard);
        for &store in stores {
            let tables = self.tables(store).ok_or(format!("I23: store {store} is not up"))?;
            let ix =
                tables.find(shard_id(shard)).ok_or(format!("I1: store {store} has no copy"))?;
            let head = tables.shard(ix).expect("just found").head;
            for block in 0..size {
                if written.binary_search(&(u64::from(shard) * size + block)).is_ok() {
                    continue;
                }
                let (extent, within) =
                    (block as u32 / lane::EXTENT_BLOCKS, block as u32 % lane::EXTENT_BLOCKS);
                let entry = tables.extent(head, extent).expect("inside the shard");
                match entry.state(within) {
                    BlockState::Inherit | BlockState::Zero => {}
                    BlockState::Data => self.expect_zeros(store, entry, within, block)?,
                    BlockState::Poison => {
                        return Err(format!(
                            "I15: block {block} of shard {shard} was never written \
                                            and is lost on store {store}"
                        ));
                    }
                }
            }
        }
        Ok(())
    }

    fn expect_zeros(
        &self,
        store: StoreId,
        entry: &lane::map::Extent,
        within: u32,
        block: u64,
    ) -> Result<(), String> {
        let store = &self.stores[store as usize - 1];
        let slot = entry.slot(within / lane::SLOT_BLOCKS).expect("a block with data has a slot");
        let geometry = lane::format::Geometry::new(&store.mount.entry).expect("it is open");
        let offset = geometry.slot(slot, within % lane::SLOT_BLOCKS);
        let bytes = store.disk.read(offset, BLOCK_BYTES as u32);
        match bytes.iter().all(|&byte| byte == 0) {
            true => Ok(()),
            false => Err(format!(
                "I15: block {block} was never written and holds data on store {}",
                store.id
            )),
        }
    }

    /// I17: what the map names is what the counters say.
    fn check_space(&self, index: usize) -> Result<(), String> {
        let store = &self.stores[index];
        let Some(lane) = store.process.as_ref().and_then(Process::lane) else { return Ok(()) };
        let tables = lane.tables();
        let extents = tables.layers.iter().flatten().flat_map(|layer| &layer.extents);
        let mapped = extents.flat_map(|extent| extent.slots()).count() as u32;
        let used: u32 = tables.shards.iter().flatten().map(|shard| shard.used_slots).sum();
        let space = lane.space();
        if space.mapped == mapped && used == mapped && space.inflight == 0 && space.reserved == 0 {
            return Ok(());
        }
        Err(format!(
            "I17: store {}: the map names {mapped} slots, the shards count {used}, the allocator \
             says {space:?}",
            store.id
        ))
    }

    /// I5: the copies are equal.
    fn compare(&mut self) {
        for (block, copies) in std::mem::take(&mut self.found) {
            if copies.iter().any(|(_, value)| *value != copies[0].1) {
                let text = format!("I5: block {block} differs at rest: {copies:x?}");
                self.check.fail(text);
            }
        }
    }
}
