//! Clients of a store: their connections, what they ask, and how the answer goes back.
//!
//! A client's connection begins with HELLO and a ticket that the cluster key has signed. From then on
//! `shard::exchange` decides what each request comes to; here it gets a token, is counted against
//! the limits of its connection, and goes to its shard. The answer finds it by the token, tells
//! `shard::paths` what became of it, and leaves as the reply. A connection at its limits is not
//! read until something of it is answered: that holds the client back and nobody else.

use super::{Caller, Conn, StoreApp};
use hmac::{Hmac, KeyInit, Mac};
use proto::wire::{
    Header, Hello, HelloReply, Kind, Limits, Opcode, Peer, Reply, ReplyOp, Request, SignedTicket,
    Ticket, VersionRange, Who,
};
use proto::{Epoch, Seq, Status, Tick};
use runtime::clock;
use runtime::reactor::{ConnId, Context};
use sha2::Sha256;
use shard::client::Answer;
use shard::exchange::{Exchange, Finished, Turn, turn};
use shard::replica::Event;
use std::time::{SystemTime, UNIX_EPOCH};

/// A client's request that a shard works on.
pub(super) struct Pending {
    pub(super) conn: ConnId,
    pub(super) exchange: Exchange,
    pub(super) since: Tick,
}

/// True when the cluster key has signed the ticket and it has not expired.
#[must_use]
pub fn verify_ticket(key: &[u8], signed: &SignedTicket, now_seconds: u64) -> bool {
    let mut mac = Hmac::<Sha256>::new_from_slice(key).expect("HMAC takes keys of any length");
    mac.update(&signed.ticket.signed_bytes());
    // Constant time: how much of a forged MAC is right must not show.
    mac.verify_slice(&signed.mac).is_ok() && signed.ticket.expires > now_seconds
}

fn now_seconds() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}

impl StoreApp {
    pub(super) fn hello(&mut self, ctx: &mut Context, id: ConnId, header: &Header, hello: &Hello) {
        let verdict = match (&hello.who, hello.versions.agree(VersionRange::OWN)) {
            (_, None) => Err(Status::Unsupported),
            _ if hello.cluster_id != self.config.cluster_id => Err(Status::WrongCluster),
            (Who::Client(signed), Some(version)) => {
                if verify_ticket(&self.config.cluster_key, signed, now_seconds()) {
                    self.hello_client(id, signed.ticket, hello).map(|peer| (peer, version))
                } else {
                    Err(Status::Unauthenticated)
                }
            }
            (Who::Peer(peer), Some(version)) => {
                self.hello_store(id, Kind::Peer, *peer).map(|peer| (peer, version))
            }
            (Who::Heartbeat(peer), Some(version)) => {
                self.hello_store(id, Kind::Heartbeat, *peer).map(|peer| (peer, version))
            }
        };
        let (peer, version) = match verdict {
            Ok(accepted) => accepted,
            Err(status) => {
                self.send(ctx, id, &Reply::refuse(header, Epoch(0), status, 0));
                ctx.finish(id);
                return;
            }
        };
        let limits = hello.limits.agree(Limits::DEFAULT);
        let reply =
            HelloReply { version, features: 0, lanes: self.lanes.count() as u16, limits, peer };
        self.reply_ok(ctx, id, header, Seq(0), ReplyOp::Hello(Box::new(reply)));
        let Some(conn) = self.conns.get(&id) else { return };
        match conn.caller {
            Caller::Client(_) => ctx.set_conn_deadline(id, None),
            Caller::Store(store) => {
                ctx.set_conn_deadline(id, None);
                if matches!(hello.who, Who::Heartbeat(_)) {
                    self.hand_over(ctx, id, store);
                }
            }
            // The deadline of the handshake stands until the proof has come.
            Caller::Claims(..) | Caller::Unknown => {}
        }
    }

    fn hello_client(&mut self, id: ConnId, ticket: Ticket, hello: &Hello) -> Result<Peer, Status> {
        let (slot, generation) = (hello.path.slot, hello.path.generation);
        self.paths.hello(id, ticket.session, slot, generation)?;
        let Some(conn) = self.conns.get_mut(&id) else { return Err(Status::Cancelled) };
        conn.caller = Caller::Client(ticket);
        conn.opener.open();
        Ok(self.identity.peer([0; 32], [0; 32]))
    }

    /// A request of a client that has said HELLO with this ticket.
    pub(super) fn client_request(
        &mut self,
        ctx: &mut Context,
        id: ConnId,
        header: Header,
        request: Request,
        ticket: &Ticket,
    ) {
        let token = self.next_token;
        self.next_token += 1;
        let (exchange, question) = match turn(token, header, request, ticket) {
            Turn::Reply(op) => return self.reply_ok(ctx, id, &header, Seq(0), op),
            Turn::Refuse(status) => return self.refuse(ctx, id, &header, status),
            Turn::Fence { slot, generation } => {
                for conn in self.paths.fence(id, header, slot, generation) {
                    ctx.close(conn);
                }
                return self.answer_fences(ctx);
            }
            Turn::Ask(exchange, question) => (exchange, question),
        };
        if !self.shards.contains_key(&header.shard) {
            return self.refuse(ctx, id, &header, Status::NotPrimary);
        }
        if !self.paths.begin(id, &header, token) {
            // The connection's slot is fenced: the client has been told that the request has no
            // effect.
            return;
        }
        self.charge(ctx, id, exchange.bytes());
        self.pending.insert(token, Pending { conn: id, exchange, since: clock::now() });
        self.step(ctx, header.shard, Event::Client(question));
    }

    /// Count a request of a connection; a connection at its limits is not read for a while.
    fn charge(&mut self, ctx: &mut Context, id: ConnId, bytes: u64) {
        let Some(conn) = self.conns.get_mut(&id) else { return };
        conn.requests += 1;
        conn.bytes += bytes;
        if conn.is_full() && !conn.is_paused {
            conn.is_paused = true;
            ctx.pause(id);
        }
    }

    /// A shard has answered a client.
    pub(super) fn answer(&mut self, ctx: &mut Context, token: u64, result: Result<Answer, Status>) {
        let Pending { conn: id, exchange, since } =
            self.pending.remove(&token).expect("one answer per request");
        if exchange.header().opcode == Opcode::Read {
            self.hops.client_reads.over(since);
        } else {
            self.hops.client_writes.over(since);
        }
        let bytes = exchange.bytes();
        if let Some(conn) = self.conns.get_mut(&id) {
            conn.requests -= 1;
            conn.bytes -= bytes;
            if conn.is_paused && !conn.is_full() {
                conn.is_paused = false;
                ctx.resume(id);
            }
        }
        let shard = exchange.header().shard;
        // A replica that was deleted has ordered nothing that is answered now.
        let served = self.shards.get(&shard);
        let reign = served.map_or(Epoch(0), |served| served.replica.reign_epoch());
        let Finished { lsn, status, reply } = exchange.finish(result, self.epoch_of(shard), reign);
        self.paths.finish(token, lsn, status);
        for conn in self.paths.orphaned() {
            ctx.close(conn);
        }
        self.send(ctx, id, &reply);
        self.answer_fences(ctx);
    }

    fn answer_fences(&mut self, ctx: &mut Context) {
        for (conn, header, outcomes) in self.paths.ready_fences() {
            self.reply_ok(ctx, conn, &header, Seq(0), ReplyOp::FencePath(outcomes));
        }
    }

    /// The replica is gone: what its clients still wait for will not be done here.
    pub(super) fn answer_gone(&mut self, ctx: &mut Context, shard: proto::ShardId) {
        let of_shard = |pending: &Pending| pending.exchange.header().shard == shard;
        let open = self.pending.iter().filter(|(_, pending)| of_shard(pending));
        let mut tokens: Vec<u64> = open.map(|(&token, _)| token).collect();
        // In the order in which they came: a map's own order differs from run to run.
        tokens.sort_unstable();
        for token in tokens {
            self.answer(ctx, token, Err(Status::NotPrimary));
        }
    }

    /// Connections of clients.
    pub(super) fn clients(&self) -> usize {
        let is_client = |conn: &&Conn| matches!(conn.caller, Caller::Client(_));
        self.conns.values().filter(is_client).count()
    }
}
