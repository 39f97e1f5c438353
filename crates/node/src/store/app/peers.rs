//! Other stores that call this one: their proof, what their replicas ask, and the end of a life.
//!
//! A store's connection begins with two HELLOs, the second with the proof that it holds the cluster
//! key (`identity`); a heartbeat connection then goes to the heartbeat thread. What replicas of
//! other stores ask goes to the replica here and is answered in any order.
//! How much of it one connection may have under way is said in `asks`; what comes beyond is refused
//! with BUSY, and the other side says it again. It is not held back by not reading, because the
//! answers of a healthy shard must not wait behind a shard whose lane is slow.

use super::asks::Asked;
use super::{Caller, StoreApp};
use crate::store::heart::HeartCommand;
use crate::store::identity::{Prover, nonce};
use proto::wire::{Failure, Header, Kind, Peer, Reply, ReplyOp, Request};
use proto::{Epoch, Seq, ShardId, Status};
use runtime::reactor::{ConnId, Context};
use shard::conf::{Incarnation, StoreId};
use shard::heartbeat::Event as HeartEvent;
use shard::replica::Event;

impl StoreApp {
    /// First and second HELLO of another store.
    pub(super) fn hello_store(
        &mut self,
        id: ConnId,
        kind: Kind,
        peer: Peer,
    ) -> Result<Peer, Status> {
        let Some(conn) = self.conns.get_mut(&id) else { return Err(Status::Cancelled) };
        match conn.caller {
            Caller::Unknown if peer.store == self.identity.store => Err(Status::Invalid),
            Caller::Unknown => {
                let mut own = self.identity.peer(nonce(), [0; 32]);
                own.proof = self.identity.prove(kind, Prover::Called, &peer, &own);
                conn.caller = Caller::Claims(kind, own, peer);
                Ok(own)
            }
            Caller::Claims(claimed, own, first) => {
                let is_same = claimed == kind
                    && (first.store, first.incarnation, first.nonce)
                        == (peer.store, peer.incarnation, peer.nonce);
                let sides = (&first, &own);
                if !is_same || !self.identity.verify(kind, Prover::Caller, sides, &peer.proof) {
                    return Err(Status::Unauthenticated);
                }
                conn.caller = Caller::Store(peer.store);
                conn.opener.open();
                Ok(own)
            }
            Caller::Client(_) | Caller::Store(_) => Err(Status::Invalid),
        }
    }

    /// Heartbeats have a thread of their own.
    pub(super) fn hand_over(&mut self, ctx: &mut Context, id: ConnId, store: StoreId) {
        match ctx.release(id) {
            Some((socket, leftover)) => {
                self.conns.remove(&id);
                let adopt = HeartCommand::Adopt { socket, leftover, store };
                // A full queue drops the connection, and the other side begins it again.
                let _ = self.heart.try_send(adopt);
            }
            None => ctx.close(id),
        }
    }

    /// A request of another store's replica.
    pub(super) fn peer_request(
        &mut self,
        ctx: &mut Context,
        id: ConnId,
        header: &Header,
        from: StoreId,
        request: Request,
    ) {
        let (shard, command_id) = (request.shard, request.command_id);
        let bytes = u64::from(header.body.payload_bytes);
        let token = self.next_token;
        self.next_token += 1;
        let status = if !self.shards.contains_key(&shard) {
            Some(Status::NotFound)
        } else if !self.asked.begin(token, id, command_id, bytes, ctx.now()) {
            Some(Status::Busy)
        } else {
            None
        };
        if let Some(status) = status {
            let opcode = request.op.opcode();
            let result = Err(Failure { opcode, status, detail: 0 });
            let (epoch, seq) = (Epoch(0), Seq(0));
            return self.send(ctx, id, &Reply { command_id, shard, epoch, seq, result });
        }
        self.step(ctx, shard, Event::Peer { from, token, request });
    }

    /// A replica has answered another one.
    pub(super) fn answer_peer(&mut self, ctx: &mut Context, token: u64, mut reply: Reply) {
        // Nobody waits for it any more if its connection has ended or it came very late.
        let Some(Asked { conn, command_id, since, .. }) = self.asked.finish(token) else { return };
        if matches!(reply.result, Ok(ReplyOp::Prepare(_))) {
            self.hops.served_writes.over(since);
        }
        reply.command_id = command_id;
        self.send(ctx, conn, &reply);
    }

    /// A life of a store, and every earlier one, is over.
    pub(super) fn died(&mut self, ctx: &mut Context, store: StoreId, incarnation: Incarnation) {
        let newest = self.dead.entry(store).or_default();
        if incarnation <= *newest {
            return;
        }
        *newest = incarnation;
        self.beat(HeartEvent::Dead { store, incarnation });
        let shards: Vec<ShardId> = self.shards.keys().copied().collect();
        for shard in shards {
            self.step(ctx, shard, Event::Dead { store, incarnation });
        }
    }

    /// Tell a replica that was just made what the others were told before.
    pub(super) fn catch_up(&mut self, ctx: &mut Context, shard: ShardId) {
        for (store, incarnation) in self.dead.clone() {
            self.step(ctx, shard, Event::Dead { store, incarnation });
        }
    }

    /// Tell the heartbeat machine at once, and its thread what follows.
    pub(super) fn beat(&self, event: HeartEvent) {
        let effects = self.leases.step(event);
        if !effects.is_empty() {
            // A full queue loses a PING or a wake, which the thread's own tick makes up for.
            let _ = self.heart.try_send(HeartCommand::Effects(effects));
        }
    }
}
