//! Connections that this store begins to other stores, of one kind (replication or heartbeat).
//!
//! One connection per store, begun when something is to be sent and begun again after a pause. A
//! request sent while there is no connection waits in a short queue or is dropped: its sender says
//! again what matters, and judges each answer by what the answer itself says. Requests get numbers
//! of their own on the way, because two replicas may use the same.

use super::hops::is_prepare;
use super::identity::{Identity, Prover, nonce};
use crate::framing;
use proto::frame::Frame;
use proto::id_map::IdMap;
use proto::wire::{
    Header, Hello, Kind, Limits, PathSlot, Peer, Reply, ReplyOp, Request, RequestOp, VersionRange,
    Who,
};
use proto::{Epoch, ShardId, Tick};
use runtime::clock;
use runtime::reactor::{Address, ConnId, Context, HANDSHAKE_MS};
use std::collections::{BTreeMap, VecDeque};
use std::net::SocketAddr;

/// Requests that wait for a connection that is being made.
const QUEUE_MAX: usize = 256;
/// Requests without answer that are remembered; the oldest belong to answers that will not come.
const SENT_MAX: u64 = 16_384;
/// Pause before another attempt to connect.
const RETRY_MS: u64 = 100;

/// Another store, as the control plane names it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct PeerAddress {
    /// Its id.
    pub store: u64,
    /// Its life.
    pub incarnation: u64,
    /// Where it listens.
    pub address: SocketAddr,
}

/// A request whose answer is awaited.
struct Sent {
    /// The sender's own number for it.
    command_id: u64,
    /// When, if it is a PREPARE.
    since: Option<Tick>,
}

/// The answer to somebody's request.
pub(super) struct Answered {
    /// Of this store.
    pub(super) from: u64,
    /// With the sender's own number.
    pub(super) reply: Reply,
    /// When it was sent, if it was a PREPARE.
    pub(super) since: Option<Tick>,
}

enum State {
    Down,
    /// Connecting, or waiting for the answer to the first HELLO with this nonce.
    Greeting {
        conn: ConnId,
        own: Peer,
    },
    /// Waiting for the answer to the second.
    Proving {
        conn: ConnId,
    },
    Open {
        conn: ConnId,
    },
}

struct Link {
    address: SocketAddr,
    state: State,
    retry_at: Tick,
    queue: VecDeque<Request>,
    next: u64,
    /// By number on the connection.
    sent: BTreeMap<u64, Sent>,
}

impl Link {
    fn conn(&self) -> Option<ConnId> {
        match self.state {
            State::Down => None,
            State::Greeting { conn, .. } | State::Proving { conn } | State::Open { conn } => {
                Some(conn)
            }
        }
    }
}

/// The connections.
pub(super) struct Links {
    kind: Kind,
    identity: Identity,
    links: BTreeMap<u64, Link>,
    conns: IdMap<ConnId, u64>,
}

impl Links {
    pub(super) fn new(kind: Kind, identity: Identity) -> Links {
        Links { kind, identity, links: BTreeMap::new(), conns: IdMap::default() }
    }

    /// Take over where the stores are; connections to other addresses are ended.
    pub(super) fn set_peers(&mut self, ctx: &mut Context, peers: &[PeerAddress]) {
        let is_kept = |store: &u64, link: &Link| {
            peers.iter().any(|peer| peer.store == *store && peer.address == link.address)
        };
        let gone: Vec<u64> = self
            .links
            .iter()
            .filter(|(store, link)| !is_kept(store, link))
            .map(|(&store, _)| store)
            .collect();
        for store in gone {
            if let Some(conn) = self.links.remove(&store).and_then(|link| link.conn()) {
                self.conns.remove(&conn);
                ctx.close(conn);
            }
        }
        for peer in peers.iter().filter(|peer| peer.store != self.identity.store) {
            self.links.entry(peer.store).or_insert_with(|| Link {
                address: peer.address,
                state: State::Down,
                retry_at: Tick(0),
                queue: VecDeque::new(),
                next: 1,
                sent: BTreeMap::new(),
            });
        }
    }

    /// Send a request to a store, as soon as there is a connection.
    pub(super) fn send(&mut self, ctx: &mut Context, to: u64, request: Request) {
        let Some(link) = self.links.get_mut(&to) else { return };
        if let State::Open { conn } = link.state {
            Links::pass(ctx, link, conn, request);
            return;
        }
        if link.queue.len() >= QUEUE_MAX {
            link.queue.pop_front();
        }
        link.queue.push_back(request);
        if matches!(link.state, State::Down) && ctx.now() >= link.retry_at {
            self.connect(ctx, to);
        }
    }

    fn pass(ctx: &mut Context, link: &mut Link, conn: ConnId, mut request: Request) {
        let number = link.next;
        link.next += 1;
        let since = is_prepare(&request.op).then(clock::now);
        link.sent.insert(number, Sent { command_id: request.command_id, since });
        link.sent.remove(&number.saturating_sub(SENT_MAX));
        request.command_id = number;
        // A full queue ends the connection; `closed` follows.
        let _ = ctx.send(conn, request.encode());
    }

    fn connect(&mut self, ctx: &mut Context, to: u64) {
        let link = self.links.get_mut(&to).expect("looked up by the caller");
        link.retry_at = ctx.now().after_millis(RETRY_MS);
        let address = Address::Tcp(link.address);
        let Ok(conn) = ctx.connect(&address, framing::caller(2)) else { return };
        ctx.set_conn_deadline(conn, Some(ctx.now().after_millis(HANDSHAKE_MS)));
        let own = self.identity.peer(nonce(), [0; 32]);
        link.state = State::Greeting { conn, own };
        link.sent.clear();
        self.conns.insert(conn, to);
        self.greet(ctx, conn, own);
    }

    fn greet(&self, ctx: &mut Context, conn: ConnId, peer: Peer) {
        let who = match self.kind {
            Kind::Heartbeat => Who::Heartbeat(peer),
            Kind::Peer | Kind::Client => Who::Peer(peer),
        };
        let hello = Hello {
            versions: VersionRange::OWN,
            features: 0,
            cluster_id: self.identity.cluster_id,
            lane: 0,
            path: PathSlot { slot: 0, generation: 0 },
            limits: Limits::DEFAULT,
            who,
        };
        let request = Request {
            command_id: 0,
            shard: ShardId::default(),
            epoch: Epoch(0),
            attach_epoch: 0,
            is_fua: false,
            op: RequestOp::Hello(Box::new(hello)),
        };
        let _ = ctx.send(conn, request.encode());
    }

    /// Whether a connection is one of these.
    pub(super) fn owns(&self, conn: ConnId) -> bool {
        self.conns.contains_key(&conn)
    }

    /// A frame has come; an answer to somebody's request is handed out with its own number.
    pub(super) fn frame(
        &mut self,
        ctx: &mut Context,
        conn: ConnId,
        frame: Frame,
    ) -> Option<Answered> {
        let store = *self.conns.get(&conn)?;
        let header = Header::parse(&frame.header).expect("the framing has checked it");
        let Ok(mut reply) = Reply::parse(&header, frame) else {
            // Damaged data or a message that is none: nothing of this connection can be trusted.
            ctx.close(conn);
            return None;
        };
        let link = self.links.get_mut(&store)?;
        match (&link.state, &reply.result) {
            (State::Open { .. }, _) => {
                let sent = link.sent.remove(&reply.command_id)?;
                reply.command_id = sent.command_id;
                return Some(Answered { from: store, reply, since: sent.since });
            }
            (State::Greeting { own, .. }, Ok(ReplyOp::Hello(hello))) => {
                let (own, called) = (*own, hello.peer);
                let is_right = called.store == store
                    && self.identity.verify(
                        self.kind,
                        Prover::Called,
                        (&own, &called),
                        &called.proof,
                    );
                if is_right {
                    let proof = self.identity.prove(self.kind, Prover::Caller, &own, &called);
                    link.state = State::Proving { conn };
                    self.greet(ctx, conn, Peer { proof, ..own });
                } else {
                    ctx.close(conn);
                }
            }
            (State::Proving { .. }, Ok(ReplyOp::Hello(_))) => {
                link.state = State::Open { conn };
                ctx.set_conn_deadline(conn, None);
                for request in std::mem::take(&mut link.queue) {
                    Links::pass(ctx, link, conn, request);
                }
            }
            (State::Down | State::Greeting { .. } | State::Proving { .. }, _) => ctx.close(conn),
        }
        None
    }

    /// A connection has ended; whether it was one of these.
    pub(super) fn closed(&mut self, ctx: &mut Context, conn: ConnId) -> bool {
        let Some(store) = self.conns.remove(&conn) else { return false };
        if let Some(link) = self.links.get_mut(&store) {
            link.state = State::Down;
            link.retry_at = ctx.now().after_millis(RETRY_MS);
            link.sent.clear();
        }
        true
    }
}
