//! The extensions and records exactly as they lie on the wire: little-endian, packed, no padding.
//!
//! Field order here *is* the format of docs/reference/pfw.md. An extension is followed by the
//! CRC32C of its bytes; a message without extension has no such CRC.

use super::WireError;
use crate::checksum::crc32c;
use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// Names and values of fields for the description of the golden bytes.
#[cfg(test)]
pub(super) trait Describe {
    /// Append name and value (JSON) of every field.
    fn describe(&self, name: &str, out: &mut Vec<(String, String)>);
}

#[cfg(test)]
macro_rules! describe_numbers {
    ($($kind:ty => $get:expr),*) => {$(
        impl Describe for $kind {
            fn describe(&self, name: &str, out: &mut Vec<(String, String)>) {
                let get: fn(&$kind) -> u64 = $get;
                out.push((name.to_owned(), get(self).to_string()));
            }
        }
    )*};
}

#[cfg(test)]
describe_numbers!(
    u8 => |n| (*n).into(), U16 => |n| n.get().into(), U32 => |n| n.get().into(), U64 => |n| n.get()
);

#[cfg(test)]
impl<const N: usize> Describe for [u8; N] {
    fn describe(&self, name: &str, out: &mut Vec<(String, String)>) {
        let hex: String = self.iter().map(|byte| format!("{byte:02x}")).collect();
        out.push((name.to_owned(), format!("\"{hex}\"")));
    }
}

/// Declares packed structures with public fields.
macro_rules! wire_structs {
    ($($(#[$doc:meta])* $name:ident { $($field:ident: $kind:ty),* $(,)? })*) => {$(
        $(#[$doc])*
        #[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned, Clone, Copy)]
        #[repr(C)]
        pub(super) struct $name { $(pub $field: $kind),* }

        #[cfg(test)]
        impl Describe for $name {
            /// Nested structures are flat on the wire and flat here.
            fn describe(&self, _: &str, out: &mut Vec<(String, String)>) {
                $(self.$field.describe(stringify!($field), out);)*
            }
        }
    )*};
}

wire_structs! {
    /// The signed part of an attach ticket.
    Ticket { volume: U64, attach_epoch: U64, session: U64, expires: U64, rights: U32 }
    /// HELLO request.
    Hello {
        version_min: u8, version_max: u8, kind: u8, path_slot: u8, lane: U32,
        path_generation: U64, features: U64,
        payload_bytes_max: U32, requests_max: U32, inflight_bytes_max: U32,
        cluster_id: [u8; 16],
        ticket: Ticket, ticket_mac: [u8; 32],
        store: U64, incarnation: U64, nonce: [u8; 32], proof: [u8; 32],
    }
    /// HELLO reply.
    HelloReply {
        version: u8, reserved: u8, lanes: U16, features: U64,
        payload_bytes_max: U32, requests_max: U32, inflight_bytes_max: U32,
        store: U64, incarnation: U64, nonce: [u8; 32], proof: [u8; 32],
    }
    /// FENCE_PATH request.
    FencePath { generation: U64, slot: U32 }
    /// FENCE_PATH reply, one per request of the closed slot that has an lsn.
    FenceOutcome { command_id: U64, epoch: U64, seq: U64, status: U32, detail: U32 }
    /// PING request and reply.
    Ping {
        sequence: U64, base_sequence: U64, store: U64, incarnation: U64, peer_incarnation: U64,
        term: U64, lineage: U64, revision: U64,
    }
    /// PING record.
    HeartbeatEntry { volume: U64, epoch: U64, shard_index: U32, kind: U32 }
    /// READ request.
    Read { snap_seq: U64 }
    /// WRITE_ZEROES request.
    WriteZeroes { options: U32 }
    /// COMPARE_AND_WRITE request.
    CompareAndWrite { acked_upto: U64 }
    /// COMPARE_AND_WRITE reply.
    CompareReply { outcome: U32, first_difference: U32 }
    /// Common part of every message between replicas.
    Peer {
        seq: U64, commit_epoch: U64, commit_seq: U64, snap_seq: U64, incarnation: U64,
        lsn_epoch: U64, history_id: U64,
    }
    /// PREPARE request.
    Prepare {
        peer: Peer, session: U64, session_command: U64, acked_upto: U64, op: U32, options: U32,
    }
    /// SETTLE request.
    Settle { peer: Peer, layer_snap_seq: U64, state: U32 }
    /// COPY request.
    Copy { peer: Peer, resync_id: U64, layer_snap_seq: U64, state: U32, options: U32 }
    /// DIGEST request.
    Digest {
        peer: Peer, resync_id: U64, layer_snap_seq: U64, first_region: U32, region_count: U32,
    }
    /// SNAP request.
    Snap { peer: Peer, cut_id: U64, target_snap_seq: U64, action: U32 }
    /// ATTACH request.
    Attach { peer: Peer, attach_epoch: U64, client: U64, session: U64, until: U64, action: U32 }
    /// Reply of a replica.
    Ack { incarnation: U64, history_id: U64, lsn_epoch: U64, resync_id: U64, credit: U64 }
    /// TAILS reply.
    TailsReply {
        ack: Ack, complete_epoch: U64, complete_seq: U64, snap_seq: U64,
        record_count: U32, result_count: U32,
    }
    /// TAILS record.
    TailRecord {
        epoch: U64, seq: U64, offset: U64, snap_seq: U64, length: U32, op: U32, state: U32,
    }
    /// TAILS: result of an exactly-once operation.
    ResultRecord {
        session: U64, session_command: U64, epoch: U64, seq: U64,
        outcome: U32, first_difference: U32,
    }
}

/// Bytes of an extension on the wire.
pub(super) const fn with_crc<T>() -> usize {
    size_of::<T>() + 4
}

/// Append an extension and its CRC.
pub(super) fn put<T: IntoBytes + Immutable>(out: &mut impl Extend<u8>, extension: &T) {
    let bytes = extension.as_bytes();
    out.extend(bytes.iter().copied());
    out.extend(crc32c(bytes).to_le_bytes());
}

/// Take an extension off the front of `meta` and check its CRC; what is left are data CRCs.
pub(super) fn take<T: FromBytes + Immutable + KnownLayout + Unaligned + Clone>(
    meta: &[u8],
) -> Result<(T, &[u8]), WireError> {
    let short = || WireError::Truncated {
        what: "extension",
        expected: with_crc::<T>() as u64,
        found: meta.len() as u64,
    };
    let (extension, rest) = meta.split_at_checked(size_of::<T>()).ok_or_else(short)?;
    let (crc, rest) = U32::ref_from_prefix(rest).map_err(|_| short())?;
    let expected = crc32c(extension);
    if crc.get() != expected {
        return Err(WireError::ExtensionChecksum { expected, found: crc.get() });
    }
    let value = T::read_from_bytes(extension).expect("split at its size");
    Ok((value, rest))
}
