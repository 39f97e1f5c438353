//! HELLO: who speaks, in which version, over which path slot, and how much may be in flight.
//!
//! A client shows an attach ticket. A peer proves the cluster key by challenge: HELLO brings its
//! nonce, the reply brings the other nonce and a proof over both, a second HELLO brings the peer's
//! own proof. Fields of the kind that was not chosen are zero, and anything else is refused, so
//! that one connection never has two identities.

use super::ticket::{SignedTicket, TICKET_MAC_BYTES, Ticket};
use super::{ID_LIMIT, WireError, raw};
use zerocopy::{FromZeros, IntoBytes};

/// The version of every header that this side sends.
pub const VERSION: u8 = 1;

/// Versions that a side can speak, both ends included.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct VersionRange {
    min: u8,
    max: u8,
}

impl VersionRange {
    /// What this build speaks.
    pub const OWN: VersionRange = VersionRange { min: VERSION, max: VERSION };

    /// Check a range: not empty, and 0 is no version.
    pub fn new(min: u8, max: u8) -> Result<VersionRange, WireError> {
        if min == 0 || min > max {
            return Err(WireError::Field { name: "version_min", value: min.into() });
        }
        Ok(VersionRange { min, max })
    }

    /// The highest version of both, if there is one.
    #[must_use]
    pub fn agree(self, other: VersionRange) -> Option<u8> {
        let highest = self.max.min(other.max);
        (highest >= self.min.max(other.min)).then_some(highest)
    }
}

/// What a connection is for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u8)]
pub enum Kind {
    /// A session of a volume.
    Client = 1,
    /// Replication between stores.
    Peer = 2,
    /// Heartbeats and leases between stores, on a thread of their own.
    Heartbeat = 3,
}

/// Proof of a store's identity.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Peer {
    /// Id of the store that calls.
    pub store: u64,
    /// Of its process.
    pub incarnation: u64,
    /// Fresh random bytes that the other side's proof must cover.
    pub nonce: [u8; 32],
    /// HMAC-SHA256 under the cluster key; zero in the first HELLO.
    pub proof: [u8; 32],
}

/// Who calls, with what that kind needs.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Who {
    /// A session with its ticket.
    Client(SignedTicket),
    /// A store that replicates.
    Peer(Peer),
    /// A store that beats.
    Heartbeat(Peer),
}

impl Who {
    /// The kind alone.
    #[must_use]
    pub fn kind(&self) -> Kind {
        match self {
            Who::Client(_) => Kind::Client,
            Who::Peer(_) => Kind::Peer,
            Who::Heartbeat(_) => Kind::Heartbeat,
        }
    }
}

/// One of a session's connections; the generation grows when the slot is opened again.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct PathSlot {
    /// Position, from 0.
    pub slot: u8,
    /// Which opening of it.
    pub generation: u64,
}

/// What a side is ready to hold for one connection; each not 0.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Limits {
    /// Data bytes in one message.
    pub payload_bytes_max: u32,
    /// Requests without reply.
    pub requests_max: u32,
    /// Data bytes of requests without reply.
    pub inflight_bytes_max: u32,
}

impl Limits {
    /// The limits of this version (architecture, section 8).
    pub const DEFAULT: Limits = Limits {
        payload_bytes_max: super::PAYLOAD_BYTES_MAX,
        requests_max: 128,
        inflight_bytes_max: 32 << 20,
    };

    /// The smaller of both sides.
    #[must_use]
    pub fn agree(self, other: Limits) -> Limits {
        Limits {
            payload_bytes_max: self.payload_bytes_max.min(other.payload_bytes_max),
            requests_max: self.requests_max.min(other.requests_max),
            inflight_bytes_max: self.inflight_bytes_max.min(other.inflight_bytes_max),
        }
    }

    fn parse(payload: u32, requests: u32, inflight: u32) -> Result<Limits, WireError> {
        let at_least = |name, value: u32, least: u32| match value >= least {
            true => Ok(value),
            false => Err(WireError::Field { name, value: value.into() }),
        };
        Ok(Limits {
            // Less than one block would make every request impossible.
            payload_bytes_max: at_least("payload_bytes_max", payload, 4096)?,
            requests_max: at_least("requests_max", requests, 1)?,
            inflight_bytes_max: at_least("inflight_bytes_max", inflight, 4096)?,
        })
    }
}

/// The first request of a connection.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Hello {
    /// What the caller speaks.
    pub versions: VersionRange,
    /// Bits of optional behaviour that the caller has; unknown ones are ignored.
    pub features: u64,
    /// The lane that the connection is for.
    pub lane: u32,
    /// Which of the session's paths this is.
    pub path: PathSlot,
    /// What the caller holds.
    pub limits: Limits,
    /// The cluster that the caller belongs to.
    pub cluster_id: [u8; 16],
    /// Identity.
    pub who: Who,
}

/// The answer to HELLO.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct HelloReply {
    /// Spoken from now on.
    pub version: u8,
    /// Bits that both have.
    pub features: u64,
    /// Lanes of the store.
    pub lanes: u16,
    /// Valid from now on.
    pub limits: Limits,
    /// Store, incarnation, and for peers nonce and proof (else zero).
    pub peer: Peer,
}

fn store_id(value: u64) -> Result<u64, WireError> {
    match value < ID_LIMIT {
        true => Ok(value),
        false => Err(WireError::Field { name: "store", value }),
    }
}

impl Hello {
    pub(super) fn to_raw(&self) -> raw::Hello {
        let mut raw = raw::Hello::new_zeroed();
        raw.version_min = self.versions.min;
        raw.version_max = self.versions.max;
        raw.kind = self.who.kind() as u8;
        raw.path_slot = self.path.slot;
        raw.lane = self.lane.into();
        raw.path_generation = self.path.generation.into();
        raw.features = self.features.into();
        raw.payload_bytes_max = self.limits.payload_bytes_max.into();
        raw.requests_max = self.limits.requests_max.into();
        raw.inflight_bytes_max = self.limits.inflight_bytes_max.into();
        raw.cluster_id = self.cluster_id;
        match &self.who {
            Who::Client(signed) => {
                raw.ticket = signed.ticket.to_raw();
                raw.ticket_mac = signed.mac;
            }
            Who::Peer(peer) | Who::Heartbeat(peer) => {
                raw.store = peer.store.into();
                raw.incarnation = peer.incarnation.into();
                raw.nonce = peer.nonce;
                raw.proof = peer.proof;
            }
        }
        raw
    }

    pub(super) fn from_raw(raw: &raw::Hello) -> Result<Hello, WireError> {
        Ok(Hello {
            versions: VersionRange::new(raw.version_min, raw.version_max)?,
            features: raw.features.get(),
            lane: raw.lane.get(),
            path: PathSlot { slot: raw.path_slot, generation: raw.path_generation.get() },
            limits: Limits::parse(
                raw.payload_bytes_max.get(),
                raw.requests_max.get(),
                raw.inflight_bytes_max.get(),
            )?,
            cluster_id: raw.cluster_id,
            who: who_from_raw(raw)?,
        })
    }
}

fn who_from_raw(raw: &raw::Hello) -> Result<Who, WireError> {
    let is_zero = |bytes: &[u8]| bytes.iter().all(|&byte| byte == 0);
    let has_ticket = !is_zero(raw.ticket.as_bytes()) || !is_zero(&raw.ticket_mac);
    let has_peer = raw.store.get() != 0
        || raw.incarnation.get() != 0
        || !is_zero(&raw.nonce)
        || !is_zero(&raw.proof);
    let peer = || -> Result<Peer, WireError> {
        Ok(Peer {
            store: store_id(raw.store.get())?,
            incarnation: raw.incarnation.get(),
            nonce: raw.nonce,
            proof: raw.proof,
        })
    };
    match raw.kind {
        1 if has_peer => Err(WireError::Field { name: "store", value: raw.store.get() }),
        1 => {
            let mac: [u8; TICKET_MAC_BYTES] = raw.ticket_mac;
            Ok(Who::Client(SignedTicket { ticket: Ticket::from_raw(&raw.ticket)?, mac }))
        }
        2 | 3 if has_ticket => {
            Err(WireError::Field { name: "ticket.volume", value: raw.ticket.volume.get() })
        }
        2 => Ok(Who::Peer(peer()?)),
        3 => Ok(Who::Heartbeat(peer()?)),
        other => Err(WireError::Field { name: "kind", value: other.into() }),
    }
}

impl HelloReply {
    pub(super) fn to_raw(&self) -> raw::HelloReply {
        raw::HelloReply {
            version: self.version,
            reserved: 0,
            lanes: self.lanes.into(),
            features: self.features.into(),
            payload_bytes_max: self.limits.payload_bytes_max.into(),
            requests_max: self.limits.requests_max.into(),
            inflight_bytes_max: self.limits.inflight_bytes_max.into(),
            store: self.peer.store.into(),
            incarnation: self.peer.incarnation.into(),
            nonce: self.peer.nonce,
            proof: self.peer.proof,
        }
    }

    pub(super) fn from_raw(raw: &raw::HelloReply) -> Result<HelloReply, WireError> {
        if raw.version == 0 || raw.reserved != 0 {
            return Err(WireError::Field { name: "version", value: raw.version.into() });
        }
        Ok(HelloReply {
            version: raw.version,
            features: raw.features.get(),
            lanes: raw.lanes.get(),
            limits: Limits::parse(
                raw.payload_bytes_max.get(),
                raw.requests_max.get(),
                raw.inflight_bytes_max.get(),
            )?,
            peer: Peer {
                store: store_id(raw.store.get())?,
                incarnation: raw.incarnation.get(),
                nonce: raw.nonce,
                proof: raw.proof,
            },
        })
    }
}
