//! The clients of a world and their connections; and the checker's own reads of the lanes.
//!
//! A connection keeps its order in both directions and can only be slow or break. When it breaks, each
//! end learns of it in its own time, and what was on its way still arrives: this is how ghost writes
//! come about.

use crate::client::{self, Client, store_at};
use crate::codec::frame_of;
use crate::content;
use crate::events::What;
use crate::history::{Kind, Moment};
use crate::network::Stream;
use crate::phases::Phase;
use crate::store::{Input, Process};
use crate::world::{MICRO, MILLI, World};
use proto::frame::Frame;
use proto::seam::Machine;
use proto::wire::{Reply, Request};
use proto::{BLOCK_BYTES, Tick};
use shard::conf::{Incarnation, ShardConf, StoreId};
use shard::replica::Replica;
use shard::session::{self, PathId};

/// A connection of a client.
pub(crate) struct Conn {
    pub client: usize,
    pub path: PathId,
    pub store: StoreId,
    /// The life that accepted it.
    life: Option<Incarnation>,
    pub is_client_open: bool,
    pub is_server_open: bool,
    /// Nothing sent from here on arrives.
    pub is_broken: bool,
    to_client: Stream,
    to_server: Stream,
}

/// The checker waits for what a lane holds.
pub(crate) struct Audit {
    pub store: StoreId,
    pub block: u64,
    begun: Moment,
    purpose: Purpose,
}

/// Why the checker looks.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Purpose {
    /// A replica serves; if its reign is new, under this number all copies must be equal.
    Opening(Option<u64>),
    /// At rest nothing may fail, and every copy must be equal.
    Rest,
}

impl World {
    // -------------------------------------------------------------------------------- clients -----

    pub(crate) fn ask(&mut self, index: usize) {
        if !self.phase.has_clients() {
            return;
        }
        let mean = 1_000 * MILLI * self.options.clients / self.options.ops_per_s;
        self.events.push(self.now + self.random.around(mean), What::Ask(index));
        let client = &mut self.clients[index];
        if client.open >= self.options.depth {
            return;
        }
        let asked = client.choose(&self.options, &self.hot, &mut self.random);
        client.open += 1;
        let (id, number) = (client.id, client.requests);
        let request = client.request(&asked, &self.pool, &mut self.random);
        let (op, what) = match asked.kind {
            Kind::Read => ("read", "op.read"),
            Kind::Write => ("write", "op.write"),
            Kind::Zero => ("zero", "op.zero"),
            Kind::Flush => ("flush", "op.flush"),
        };
        self.count(what);
        let values: &[u64] = if asked.kind == Kind::Write { &asked.values } else { &[] };
        let range = (asked.first, asked.values.len() as u64);
        self.trace.invoke(self.now, (id, number), op, range, values);
        self.check.history.begin(self.now, (id, number), asked.kind, asked.first, &asked.values);
        self.client_step(index, session::Event::Submit(request));
    }

    pub(crate) fn client_step(&mut self, index: usize, event: session::Event) {
        let mut out = Vec::new();
        self.clients[index].session.step(Tick(self.now + 1), event, &mut out);
        self.client_effects(index, out);
    }

    pub(crate) fn client_effects(&mut self, index: usize, out: Vec<session::Effect>) {
        for effect in out {
            match effect {
                session::Effect::Connect { path, address } => {
                    self.next_conn += 1;
                    let conn = Conn {
                        client: index,
                        path,
                        store: store_at(address),
                        life: None,
                        is_client_open: true,
                        is_server_open: false,
                        is_broken: false,
                        to_client: Stream::default(),
                        to_server: Stream::default(),
                    };
                    self.conns.insert(self.next_conn, conn);
                    self.paths.insert((index, path), self.next_conn);
                    let at = self.now + self.random.around(2 * self.options.delay_us * MICRO);
                    self.events.push(at, What::Connect(self.next_conn));
                }
                session::Effect::Send { path, request } => {
                    self.send_to_server(index, path, &request)
                }
                session::Effect::Disconnect(path) => {
                    if let Some(conn) = self.paths.remove(&(index, path)) {
                        self.client_closes(conn);
                    }
                }
                session::Effect::Reply { id, result } => self.replied(index, id, result),
                session::Effect::NeedConf { .. } => {
                    if self.is_conductor_up {
                        self.tell_client(index);
                    }
                }
            }
        }
        if let Some(wake) = self.clients[index..].first().and_then(|c| c.session.wake_at()) {
            let at = wake.0.max(self.now + MICRO);
            if self.client_timers[index].is_none_or(|before| at < before) {
                self.client_timers[index] = Some(at);
                self.events.push(at, What::ClientTimer(index));
            }
        }
    }

    /// Tell a client all configurations, a little later; what is lost it asks for again.
    pub(crate) fn tell_client(&mut self, index: usize) {
        if self.phase == Phase::Safety && self.random.chance(self.options.drop) {
            return self.count("fault.drop");
        }
        let confs = (0..self.options.shards as u32).map(|shard| self.conductor.conf(shard).clone());
        let confs = confs.collect();
        let at = self.now + self.random.around(2 * self.options.delay_us * MICRO);
        self.events.push(at, What::ClientConf(index, confs));
    }

    fn replied(
        &mut self,
        index: usize,
        number: u64,
        result: Result<proto::block::BlockData, proto::Status>,
    ) {
        let client = &mut self.clients[index];
        client.open = client.open.saturating_sub(1);
        let id = client.id;
        self.count("reply");
        let mut values = Vec::new();
        let mut torn = None;
        let status = match &result {
            Ok(data) => {
                for block in data.iter().flat_map(|buf| buf.chunks_exact(BLOCK_BYTES)) {
                    match content::value_of(block) {
                        Some(value) => values.push(value),
                        None => torn = Some(content::name_of(block)),
                    }
                }
                0
            }
            Err(status) => {
                self.count("reply.error");
                u64::from(status.number())
            }
        };
        self.trace.reply(self.now, (id, number), status, &values);
        if let Some(value) = torn {
            let text = format!(
                "I14: request {number} of client {id} brings a torn block, it begins with {value:#x}"
            );
            return self.check.fail(text);
        }
        let open = self.check.history.open().find(|(key, _)| **key == (id, number));
        if let Some((_, open)) = open.filter(|(_, open)| open.kind == Kind::Read) {
            let (first, count) = (open.first, open.values.len() as u64);
            self.check.read(self.now, first, &values);
            if result.is_err() {
                self.check_failed_read(first, count);
            }
        }
        // Refused before anything was logged: it must never be seen.
        let refused = |status| matches!(status, proto::Status::NoSpace | proto::Status::OutOfRange);
        let result = match result {
            Ok(_) => Ok(&values[..]),
            Err(status) => Err(refused(status)),
        };
        let ended = self.check.history.end(self.now, (id, number), result);
        self.check.expect(ended);
    }

    pub(crate) fn begin_client(&mut self, index: usize) {
        self.next_client += 1;
        let id = self.next_client;
        let confs: Vec<ShardConf> =
            (0..self.options.shards as u32).map(|s| self.conductor.conf(s).clone()).collect();
        let conf = client::volume_conf(id, &self.options, &confs);
        let mut out = Vec::new();
        let client = Client::new(id, Tick(self.now + 1), conf, &mut out);
        match self.clients.get_mut(index) {
            Some(place) => *place = client,
            None => self.clients.push(client),
        }
        self.client_effects(index, out);
    }

    /// A client ends with what it had open; nobody will ever send that again.
    pub(crate) fn replace_client(&mut self, index: usize) {
        // Values carry the client's number in one byte.
        if self.next_client >= 250 {
            return;
        }
        let id = self.clients[index].id;
        self.check.history.abandon(id);
        let conns: Vec<u64> =
            self.conns.iter().filter(|(_, c)| c.client == index).map(|(&id, _)| id).collect();
        for conn in conns {
            self.client_closes(conn);
        }
        self.paths.retain(|(client, _), _| *client != index);
        self.client_timers[index] = None;
        self.begin_client(index);
    }

    // -------------------------------------------------------------------------------- connections -

    pub(crate) fn connect(&mut self, id: u64) {
        let conn = &self.conns[&id];
        let (store, client, path) = (conn.store as usize - 1, conn.client, conn.path);
        if !conn.is_client_open {
            return;
        }
        let is_up = self.stores[store].process.as_ref().is_some_and(Process::is_up);
        if !is_up {
            return self.client_closed(id);
        }
        let life = self.stores[store].incarnation;
        let conn = self.conns.get_mut(&id).expect("looked at above");
        conn.life = Some(life);
        conn.is_server_open = true;
        self.client_step(client, session::Event::Connected(path));
    }

    fn frame_nanos(&mut self) -> u64 {
        let nanos = self.random.around(self.options.delay_us * MICRO);
        if self.phase == Phase::Safety && self.random.chance(self.options.frame_hold) {
            self.count("fault.frame_hold");
            return nanos + self.random.around(800 * MILLI);
        }
        nanos
    }

    fn send_to_server(&mut self, client: usize, path: PathId, request: &Request) {
        let nanos = self.frame_nanos();
        let Some(&id) = self.paths.get(&(client, path)) else { return };
        let conn = self.conns.get_mut(&id).expect("a path has a connection");
        if conn.is_broken {
            return;
        }
        let (_, frame) = frame_of(request.encode(), &self.pool);
        let at = conn.to_server.send(self.now, nanos);
        self.events.push(at, What::ToServer(id, Box::new(frame)));
    }

    pub(crate) fn send_to_client(&mut self, id: u64, reply: &Reply) {
        let nanos = self.frame_nanos();
        let Some(conn) = self.conns.get_mut(&id).filter(|conn| !conn.is_broken) else { return };
        let (_, frame) = frame_of(reply.encode(), &self.pool);
        let at = conn.to_client.send(self.now, nanos);
        self.events.push(at, What::ToClient(id, Box::new(frame)));
    }

    pub(crate) fn arrives_at_server(&mut self, id: u64, frame: Frame) {
        let Some(conn) = self.conns.get(&id).filter(|conn| conn.is_server_open) else { return };
        let (store, life) = (conn.store, conn.life);
        if self.runs(store, life) {
            let moment = self.check.history.moment();
            self.input(store as usize - 1, Input::Frame { conn: id, frame, moment });
        }
    }

    /// The client's end knows that the connection is over.
    pub(crate) fn client_closed(&mut self, id: u64) {
        let Some(conn) = self.conns.get_mut(&id).filter(|conn| conn.is_client_open) else { return };
        conn.is_client_open = false;
        let (client, path) = (conn.client, conn.path);
        self.paths.remove(&(client, path));
        self.client_step(client, session::Event::Closed(path));
        self.forget(id);
    }

    /// The store's end knows that the connection is over.
    pub(crate) fn server_closed(&mut self, id: u64) {
        let Some(conn) = self.conns.get_mut(&id).filter(|conn| conn.is_server_open) else { return };
        conn.is_server_open = false;
        let (store, life) = (conn.store, conn.life);
        if self.runs(store, life) {
            self.input(store as usize - 1, Input::Closed(id));
        }
        self.forget(id);
    }

    /// The client closes: what it sent before still arrives, then the end.
    fn client_closes(&mut self, id: u64) {
        let nanos = self.frame_nanos();
        let Some(conn) = self.conns.get_mut(&id) else { return };
        conn.is_client_open = false;
        let at = conn.to_server.send(self.now, nanos);
        self.events.push(at, What::ServerClosed(id));
    }

    pub(crate) fn server_closes(&mut self, id: u64) {
        let nanos = self.frame_nanos();
        let Some(conn) = self.conns.get_mut(&id).filter(|conn| conn.is_server_open) else { return };
        conn.is_server_open = false;
        let (store, life) = (conn.store, conn.life);
        let at = conn.to_client.send(self.now, nanos);
        self.events.push(at, What::ClientClosed(id));
        if self.runs(store, life) {
            // The reactor tells the application of every end, also of those that it asked for.
            self.events.push(self.now, What::Arrive(store, life, Box::new(Input::Closed(id))));
        }
    }

    fn forget(&mut self, id: u64) {
        let is_over = |conn: &Conn| !conn.is_client_open && !conn.is_server_open;
        if self.conns.get(&id).is_some_and(is_over) {
            self.conns.remove(&id);
        }
    }

    // -------------------------------------------------------------------------------- audits ------

    /// I1: every member of the ISR has every acknowledged write. I5: when a new reign begins to
    /// serve, all copies are equal; `new`: whose reign, and whether it is new.
    pub(crate) fn audit_isr(&mut self, shard: u32, (primary, is_new): (usize, bool)) {
        let conf = self.conductor.conf(shard).clone();
        let blocks: Vec<u64> = self.blocks_of(shard);
        let process = self.stores[primary].process.as_ref();
        let own = process.and_then(|process| process.replica(shard)).and_then(Replica::conf);
        // A block that could not be read anywhere is not settled: it may differ and is an error.
        let has_failed = self.stores.iter().any(|store| store.has_failed_reads);
        let reign = (is_new && own == Some(&conf) && !has_failed).then_some(self.happened);
        for member in conf.isr_members() {
            let store = &self.stores[member.store as usize - 1];
            let is_up = store.process.as_ref().is_some_and(Process::is_up);
            if store.paused.is_none() && is_up && store.incarnation == member.incarnation {
                self.audit(member.store, &blocks, Purpose::Opening(reign));
            }
        }
    }

    /// Blocks of a shard that were ever written, in blocks of the volume.
    pub(crate) fn blocks_of(&self, shard: u32) -> Vec<u64> {
        let size = self.options.regions * client::REGION_BLOCKS;
        let range = u64::from(shard) * size..(u64::from(shard) + 1) * size;
        self.check.history.blocks().filter(|block| range.contains(block)).collect()
    }

    pub(crate) fn audit(&mut self, store: StoreId, blocks: &[u64], purpose: Purpose) {
        let size = self.options.regions * client::REGION_BLOCKS;
        let life = self.stores[store as usize - 1].incarnation;
        let begun = self.check.history.moment();
        for &block in blocks {
            self.next_audit += 1;
            let token = self.next_audit;
            self.audits.insert(token, Audit { store, block, begun, purpose });
            let (shard, block) = ((block / size) as u32, (block % size) as u32);
            let input = Input::Audit { token, shard, block };
            self.events.push(self.now, What::Arrive(store, Some(life), Box::new(input)));
        }
    }

    pub(crate) fn audited(&mut self, token: u64, result: Result<Option<u64>, String>) {
        let Some(audit) = self.audits.remove(&token) else { return };
        self.count("audit");
        let Audit { store, block, begun, purpose } = audit;
        let value = match result {
            Ok(None) => {
                let text = format!("I14: block {block} on store {store} is torn and was returned");
                return self.check.fail(text);
            }
            Ok(Some(content::LOST)) | Err(_) if self.losses.contains(&block) => return,
            Err(problem) if purpose == Purpose::Rest => {
                let text = format!("I1: block {block} on store {store} is lost at rest: {problem}");
                return self.check.fail(text);
            }
            // While faults happen a disk may fail; the content is there or repaired.
            Err(_) => return,
            Ok(Some(value)) => value,
        };
        let allowed = self.check.history.check(block, value, begun, self.now);
        let named = allowed.map_err(|why| format!("I1: on store {store}, {why}"));
        self.check.expect(named);
        match purpose {
            Purpose::Rest => self.found.entry(block).or_default().push((store, Some(value))),
            Purpose::Opening(None) => {}
            Purpose::Opening(Some(reign)) => {
                let size = self.options.regions * client::REGION_BLOCKS;
                let place = ((block / size) as u32, (block % size) as u32);
                if self.check.is_changing(place.0, place.1, begun) {
                    return;
                }
                let copies = self.opening.entry((reign, block)).or_default();
                let other = copies.iter().find(|(_, held)| *held != value).copied();
                copies.push((store, value));
                if let Some((other, held)) = other {
                    self.check.fail(format!(
                        "I5: at {} ns block {block} differs when a reign begins to serve: {held:#x} on \
                         store {other}, {value:#x} on store {store}",
                        self.now
                    ));
                }
            }
        }
    }
}
